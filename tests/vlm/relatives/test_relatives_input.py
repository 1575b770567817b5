"""What a user may type or pass to other families: plain text stays text, and limits are told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlm import testing
from vlm.errors import ConfigError, ContextLengthError, GenerationError, ImageError, VlmError
from vlm.messages import Message, TextPart, user

WIDE = testing.draw_image((40, 30), seed=1)
LENGTH = 16
CONTROL = ("<image>", "</s>", "<|im_end|>", "<fake_token_around_image>", "<|image_pad|>")


def test_control_tokens_in_a_text_mean_nothing(relative: Any) -> None:
    model = relative.assistant
    known = model.processor.tokenizer.get_vocab()
    typed = " ".join(name for name in CONTROL if name in known)
    apart = typed.replace("<", "< ")
    text = model.ask(WIDE, f"{typed}?", max_new_tokens=LENGTH)
    assert text == model.ask(WIDE, f"{apart}?", max_new_tokens=LENGTH)
    [joined] = model.generate(
        [[Message("user", (*user("<im", WIDE).content, TextPart("age>")))]], max_new_tokens=LENGTH
    )
    assert joined.text == model.ask(WIDE, "< image>", max_new_tokens=LENGTH)


def test_a_url_is_a_text_like_any_other(relative: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = relative.assistant.processor.standard.image_processor
    fetch, seen = images.fetch_images, []
    monkeypatch.setattr(images, "fetch_images", lambda what: seen.append(what) or fetch(what))
    relative.assistant.ask(WIDE, "http://127.0.0.1:9/a.png", max_new_tokens=2)
    assert "http" not in repr(seen)


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("caption en", "caption en"),
        ("answer de was?", "answer de was?"),
        ("what?", "answer en what?"),
    ],
)
def test_paligemma_takes_its_own_tasks_as_they_are(
    relatives: Callable[[str], Any], text: str, asked: str
) -> None:
    model = relatives("paligemma").assistant
    ids = model.prepare([user(text, WIDE)]).prompt.input_ids
    assert model.processor.decode(ids) == f"{asked}\n"
    assert model.caption_prompt == "caption en"


def test_answers_to_plain_prompts_begin_without_a_space(relative: Any) -> None:
    processor = relative.assistant.processor
    ids = processor.tokenizer(" a cat", add_special_tokens=False)["input_ids"]
    assert processor.decode(ids) == (" a cat" if relative.chats else "a cat")


def test_what_does_not_fit_is_told_before_anything_runs(relative: Any) -> None:
    model = relative.assistant
    with pytest.raises(ConfigError, match="temperature"):
        model.stream([user("a?", WIDE)], temperature=-1)
    with pytest.raises(ImageError):
        model.stream([user("a?", b"")])
    with pytest.raises(VlmError) as told:
        model.stream([user("a?", "http://example.com/a.png")])
    assert "\n" not in str(told.value)
    if relative.name == "blip2_t5":
        assert model.ask(WIDE, "a" * 600, max_new_tokens=2)  # relative positions have no end
    else:
        with pytest.raises(ContextLengthError, match="positions"):
            model.stream([user("a" * 600, WIDE)])


def test_memory_that_ends_is_an_error_of_the_answer(
    relatives: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    relative = relatives("llava_next")
    chat = [user("what is it?", testing.draw_image((40, 30), seed=1))]
    with monkeypatch.context() as patch:
        patch.setattr(relative.assistant.engine.model.lm_head, "forward", _out_of_memory)
        with pytest.raises(GenerationError, match=r"out of memory for 1 answers .*smaller batch"):
            relative.assistant.generate([chat])
    assert relative.assistant.generate([chat], max_new_tokens=2)[0].num_new_tokens > 0


def _out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")
