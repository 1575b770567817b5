"""Logit biases: transformers' own classes and its `generate` are the oracle."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, SequenceBiasLogitsProcessor

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.engine.bias import Bias, checked_bias, spellings
from vlm.engine.request import Completion, Request, Row
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampling
from vlm.errors import ConfigError
from vlm.messages import user

NUM_TOKENS = 24
TOKENIZER = testing.byte_tokenizer()
LETTERS: dict[int | str, float] = dict.fromkeys(
    TOKENIZER.convert_tokens_to_ids(list("abcdefgopqrsu")), 50.0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.tiny_llava_folder(tmp_path_factory.mktemp("bias") / "tiny", seed=2)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(*load_checkpoint(folder))


def ask(engine: Engine, text: str = "what is this?", **sampling: Any) -> Request:
    prompt = engine.processor.encode([user(text)], add_generation_prompt=True)
    return Request(prompt, Sampling(NUM_TOKENS, stop_loops=False, **sampling))


def answer(engine: Engine, **sampling: Any) -> Completion:
    (found,) = engine.generate([ask(engine, **sampling)])
    return found


def written(engine: Engine) -> str:
    """An answer of letters, which random weights would not give."""
    return str(TOKENIZER.decode(answer(engine, logit_bias=LETTERS).ids))


def by_sequence(biases: dict[int | str, float]) -> dict[tuple[int, ...], float]:
    """As transformers takes them, for words without a capital or space variant in common."""
    found: dict[tuple[int, ...], float] = {}
    for key, value in biases.items():
        for ids in [(key,)] if isinstance(key, int) else spellings(TOKENIZER, key):
            found[ids] = float(value)
    return found


def test_logits_are_those_of_transformers() -> None:
    """At every point of a text in which the words begin, go on, end and overlap."""
    biases: dict[int | str, float] = {40: 3.0, 41: -100.0, "abab": -2.5, "ab": 4.0, "xyz": 7.0}
    theirs = SequenceBiasLogitsProcessor(
        [[list(ids), value] for ids, value in by_sequence(biases).items()]
    )
    lots = random.Random(0)
    text = TOKENIZER.encode("".join(lots.choices("abxyzABXYZ ", k=60)), add_special_tokens=False)
    start = 7
    ours = Bias(biases, TOKENIZER, text[:start])
    logits = torch.randn(len(TOKENIZER), generator=torch.Generator().manual_seed(0))
    changed = set()
    for place in range(start, len(text)):
        expected = theirs(torch.tensor([text[:place]]), logits[None])[0]
        found = ours.add_to(logits)
        torch.testing.assert_close(found, expected)
        changed.add(int((found != logits).sum()))
        ours.take(text[place])
    assert len(changed) > 2  # some words were about to be complete


def test_greedy_answers_are_those_of_generate(engine: Engine, folder: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    plain = answer(engine)
    first = plain.ids[0]
    word = written(engine)[:2]
    assert len(spellings(TOKENIZER, word)[0]) == 2  # its last letter is kept out after its first
    cases: list[dict[int | str, float]] = [
        {first: -100},
        {first: -100, 77: 0.3, 90: 0.2},
        {**LETTERS, word: -100},
    ]
    found = []
    for biases in cases:
        request = ask(engine, logit_bias=biases)
        (ours,) = engine.generate([request])
        theirs = model.generate(
            torch.tensor([request.prompt.input_ids]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            sequence_bias=[[list(ids), value] for ids, value in by_sequence(biases).items()],
            suppress_tokens=[engine.processor.image_token_id],
        )
        ids = theirs[0, len(request.prompt.input_ids) :].tolist()
        ended = ids[-1] in engine.processor.eos_token_ids
        assert list(ours.ids) == (ids[:-1] if ended else ids)
        found.append(ours.ids)
    assert plain.ids not in found and first not in found[0]
    assert word not in TOKENIZER.decode(found[2])


def test_a_row_is_the_same_alone_and_among_others(engine: Engine) -> None:
    plain = answer(engine)
    options: list[dict[str, Any]] = [
        {},
        {"logit_bias": {plain.ids[0]: -100}},
        {"logit_bias": {**LETTERS, written(engine)[:2]: -100.0}, "repetition_penalty": 1.2},
        {"logit_bias": {50: 2.0}, "temperature": 1.0, "seed": 3},
    ]
    alone = [answer(engine, **each).ids for each in options]
    together = engine.generate([ask(engine, **each) for each in options])
    assert [each.ids for each in together] == alone and len(set(alone)) == 4
    assert alone[0] == plain.ids


def test_logprobs_stay_those_of_the_model(engine: Engine) -> None:
    plain = answer(engine, logprobs=20)
    assert plain.top_logprobs is not None
    second = plain.top_logprobs[0][1]
    found = answer(engine, logprobs=20, logit_bias={plain.ids[0]: -100})
    assert found.top_logprobs is not None and found.top_logprobs[0] == plain.top_logprobs[0]
    assert found.ids[0] == second[0] and found.logprobs[0] == pytest.approx(second[1], abs=1e-6)


def test_a_word_is_kept_out_in_every_spelling() -> None:
    found = {TOKENIZER.decode(ids) for ids in spellings(TOKENIZER, "red Dog")}
    texts = {"red Dog", "red dog", "Red Dog", "RED DOG"}
    assert found == texts | {f" {text}" for text in texts}
    # " a" is one token here, so both of "a" and " a" must be there
    assert [len(ids) for ids in spellings(TOKENIZER, "a")] == [1, 1, 1, 2]
    special = set(TOKENIZER.all_special_ids)
    assert not special & {each for ids in spellings(TOKENIZER, "</s>") for each in ids}


def test_spellings_in_common_count_once_and_the_stronger_one() -> None:
    letter = TOKENIZER.convert_tokens_to_ids("B")
    zeros = torch.zeros(len(TOKENIZER))
    for biases, expected in (
        ({"b": -3.0, "B": -5.0}, -5.0),
        ({"b": -3.0, letter: 2.0}, -3.0),
        ({"b": -3.0, letter: 4.0}, 4.0),
    ):
        assert float(Bias(biases, TOKENIZER).add_to(zeros)[letter]) == expected


def test_ids_beyond_a_narrower_head_are_passed_over() -> None:
    found = Bias({1: 2.0, 200: 3.0}, TOKENIZER).add_to(torch.zeros(4))
    assert found.tolist() == [0, 2, 0, 0]


def test_a_token_that_the_model_lacks_is_told(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="token 270, but the model has 270 tokens"):
        Row(ask(engine, logit_bias={270: 1.0}), engine.processor)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (5, "logit_bias is 5"),
        ("dog", "logit_bias is 'dog'"),
        ([3], "3 in it"),
        ({1.5: 1}, "token of logit_bias is 1.5"),
        ({True: 1}, "token of logit_bias is True"),
        ({-1: 1}, "must lie between 0"),
        ({1: "no"}, "logit_bias of 1 is 'no'"),
        ({1: 101}, "logit_bias of 1 is 101"),
        ({1: -math.inf}, "logit_bias of 1 is -inf"),
        ({"dog": math.nan}, "logit_bias of 'dog' is nan"),
        ({" ": 1}, "the word ' '"),
        ({"x" * 101: 1}, "1 to 100 characters"),
        (dict.fromkeys(range(1025), 1), "1025 entries; at most 1024"),
    ],
)
def test_a_bad_value_is_named(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Sampling(logit_bias=given)


def test_settings_are_hashed_by_their_values() -> None:
    ones = [Sampling(logit_bias=each) for each in ({5: 1}, {5: 1.0}, ((5, 1.0),))]
    assert len(set(ones)) == 1 and ones[0].logit_bias == ((5, 1.0),)
    assert checked_bias(ones[0].logit_bias) == ones[0].logit_bias
    assert Sampling(logit_bias={}) == Sampling() != ones[0]
