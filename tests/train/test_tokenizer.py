"""The tokenizer made from records: what it must encode, learn and render."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from train.dataset import RecordDataset
from train.tokenizer import END, IMAGE, PAD, texts_of, train_tokenizer
from vlm.language import load_tokenizer

TEXTS = ["what is at the top left?", "a red guitar.", "how many guitars are there?", "two."] * 5
BYTES = 256
SPECIAL = (PAD, "<|system|>", "<|user|>", "<|assistant|>", END, IMAGE)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def test_the_vocabulary_has_the_wanted_size(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 300
    assert len(train_tokenizer([""], 300)) == BYTES + len(SPECIAL)  # nothing to merge


def test_special_tokens_are_one_token_each(tokenizer: PreTrainedTokenizerFast) -> None:
    for token in SPECIAL:
        ids = tokenizer(token).input_ids
        assert len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids) == [token]
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)


@pytest.mark.parametrize("text", ["a red guitar.", "zwölf äpfel 🍎", "漢字", "tab\tand\nline"])
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids).strip() == text
    assert max(ids) < len(tokenizer)


def test_upper_and_lower_case_mean_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("A Red GUITAR").input_ids == tokenizer("a red guitar").input_ids


def test_frequent_words_become_short(tokenizer: PreTrainedTokenizerFast) -> None:
    known, unknown = tokenizer("guitar").input_ids, tokenizer("zyxwvq").input_ids
    assert len(known) <= 2 < len(unknown)


def test_the_template_opens_and_closes_every_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|user|><image>what?<|end|><|assistant|>red<|end|>"
    )
    opened = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<|user|><image>what?<|end|><|assistant|>"


def test_it_survives_its_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in (*TEXTS[:4], "<|user|>Hi<|end|>"):
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.chat_template == tokenizer.chat_template


def test_the_same_texts_give_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(iter(TEXTS), 300).get_vocab() == tokenizer.get_vocab()


def test_texts_are_taken_from_all_over_the_records(tmp_path: Path) -> None:
    paths = []
    for name in ("first", "second"):
        turns = [{"role": "user", "content": name}, {"role": "assistant", "content": f"{name}!"}]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text((json.dumps({"id": name, "messages": turns}) + "\n") * 10)
    data = RecordDataset(paths)
    assert list(texts_of(data, 2)) == ["first", "first!", "second", "second!"]
    assert len(list(texts_of(data, 1000))) == 2 * len(data)
