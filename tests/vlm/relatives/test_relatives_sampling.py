"""The same sampling options for models that answer by their own `generate`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from vlm import testing
from vlm.messages import user

PICTURE = testing.draw_image((40, 30), seed=1)
CHAT = [user("what is it?", PICTURE)]
LENGTH = 16


def theirs(relative: Any, **options: Any) -> Any:
    """What `generate` itself returns for the same prompt, greedily."""
    model = hf.AutoModelForImageTextToText.from_pretrained(relative.folder).eval()
    prompt = relative.assistant.prepare(CHAT).prompt
    found = model.generate(
        **prompt.tensors,
        do_sample=False,
        max_new_tokens=LENGTH,
        suppress_tokens=relative.assistant.processor.never_text,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return found.sequences[0, len(prompt.input_ids) :].tolist(), found.scores


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl"])
def test_a_repetition_penalty_is_that_of_transformers(
    relatives: Callable[[str], Any], name: str
) -> None:
    relative = relatives(name)
    answers = set()
    for penalty in (1.0, 1.6):
        ids, _ = theirs(relative, repetition_penalty=penalty)
        (answer,) = relative.assistant.generate(
            [CHAT], max_new_tokens=LENGTH, repetition_penalty=penalty
        )
        assert answer.text == relative.assistant.processor.decode(ids)
        answers.add(answer.text)
    assert len(answers) == 2


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl"])
def test_a_bias_is_that_of_transformers(relatives: Callable[[str], Any], name: str) -> None:
    relative = relatives(name)
    plain, _ = theirs(relative)
    first = plain[0]
    ids, _ = theirs(relative, sequence_bias=[[[first], -100.0]])
    (answer,) = relative.assistant.generate([CHAT], max_new_tokens=LENGTH, logit_bias={first: -100})
    assert answer.text == relative.assistant.processor.decode(ids)
    assert ids != plain and first not in ids


@pytest.mark.parametrize("name", ["llava_next", "blip2_t5"])
def test_logprobs_are_those_of_transformers(relatives: Callable[[str], Any], name: str) -> None:
    relative = relatives(name)
    (answer,) = relative.assistant.generate([CHAT], max_new_tokens=LENGTH, logprobs=2)
    _, scores = theirs(relative)
    assert answer.tokens and len(answer.tokens) == answer.num_new_tokens
    for token, row in zip(answer.tokens, scores, strict=False):
        best = row[0].double().log_softmax(dim=-1).topk(2).values.tolist()
        assert [value for _, value in token.alternatives] == pytest.approx(best, abs=1e-4)
        assert token.logprob == pytest.approx(best[0], abs=1e-4)
    assert answer.mean_logprob is not None and answer.mean_logprob < 0


def test_stop_strings_end_answers_and_streams(relative: Any) -> None:
    model = relative.assistant
    text = model.ask(PICTURE, "what is it?", max_new_tokens=LENGTH)
    stop = text[3:5]
    expected = text[: text.index(stop)]
    (answer,) = model.generate([CHAT], max_new_tokens=LENGTH, stop_strings=stop)
    assert (answer.text, answer.finish_reason) == (expected, "stop")
    assert "".join(model.stream(CHAT, max_new_tokens=LENGTH, stop_strings=[stop])) == expected


def test_loops_end_an_answer(relatives: Callable[[str], Any]) -> None:
    model = relatives("paligemma").assistant
    options: Any = {"max_new_tokens": 200, "repetition_penalty": 0.01}
    (whole,) = model.generate([CHAT], stop_loops=False, **options)
    (ended,) = model.generate([CHAT], **options)
    assert (whole.num_new_tokens, whole.finish_reason) == (200, "length")
    assert ended.finish_reason == "repetition" and ended.num_new_tokens < 200
    assert whole.text.startswith(ended.text)


def test_rows_of_one_batch_keep_their_own_options(relatives: Callable[[str], Any]) -> None:
    model = relatives("llava_next").assistant
    options: list[Any] = [{}, {"temperature": 1.5, "seed": 1, "top_k": 9}, {"stop_strings": "a"}]
    asked = [model.prepare(CHAT, max_new_tokens=LENGTH, **each) for each in options]
    alone = [model.run([each])[0] for each in asked]
    together = model.run(asked)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    torch.testing.assert_close(
        [answer.mean_logprob for answer in together],
        [answer.mean_logprob for answer in alone],
        rtol=1e-4,
        atol=1e-4,
    )
