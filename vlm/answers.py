"""How an answer is asked for, and how it is given: its text, why it ended, how sure it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from vlm.engine.stream import REPLACEMENT, Detokenizer

if TYPE_CHECKING:
    from vlm.engine.bias import Biases
    from vlm.engine.request import Completion, FinishReason
    from vlm.processor import Processor
    from vlm.relative_processor import RelativeProcessor

_CONTEXT = 8  # tokens before one that may change how it is spelt: a space, half a character


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of every method that generates; see `vlm.engine.sampling.Sampling`."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    top_k: int
    min_p: float
    repetition_penalty: float
    logit_bias: "Biases"
    stop_strings: str | Sequence[str]
    logprobs: int | None
    stop_loops: bool
    json_schema: Mapping[str, Any] | str | None


@dataclass(frozen=True)
class AnswerToken:
    """One token of an answer.

    Attributes:
        piece: its part of the text; empty where a character goes on in the next token.
        logprob: natural logarithm of its probability, by the model's own distribution.
        alternatives: the likeliest tokens at its place and their logprobs, likeliest
            first, this one among them if it is that likely; a special token is spelt as in
            the vocabulary.
    """

    piece: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    Attributes:
        text: without special tokens.
        finish_reason: ``"stop"``, ``"length"``, ``"repetition"``, ``"cancelled"`` or
            ``"deadline"``, see `vlm.engine.request.Completion`.
        num_prompt_tokens: positions of the prompt, visual tokens included.
        num_new_tokens: generated tokens, the ending one left out.
        mean_logprob: of the generated tokens, the ending one left out; exp(-mean_logprob)
            is the answer's perplexity. None where there are none.
        tokens: one by one, the pieces joined being `text`; None unless `logprobs` asks
            for them.
    """

    text: str
    finish_reason: "FinishReason"
    num_prompt_tokens: int
    num_new_tokens: int
    mean_logprob: float | None = None
    tokens: tuple[AnswerToken, ...] | None = None


def to_answer(completion: "Completion", processor: "Processor | RelativeProcessor") -> Answer:
    """What a completion says, by the processor of its model."""
    ids, logprobs = completion.ids, completion.logprobs
    text = processor.decode(ids) if completion.text is None else completion.text
    return Answer(
        text,
        completion.finish_reason,
        completion.num_prompt_tokens,
        len(ids),
        sum(logprobs) / len(logprobs) if logprobs else None,
        None if completion.top_logprobs is None else _tokens(completion, text, processor),
    )


def _tokens(
    completion: "Completion", text: str, processor: "Processor | RelativeProcessor"
) -> tuple[AnswerToken, ...]:
    ids, likeliest = completion.ids, completion.top_logprobs or ()
    spelt = [
        tuple((spell(processor, ids[:i], token), value) for token, value in pairs)
        for i, pairs in enumerate(likeliest)
    ]
    pieces = _pieces(ids, text, processor.decode)
    return tuple(map(AnswerToken, pieces, completion.logprobs, spelt))


def _pieces(ids: Sequence[int], text: str, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text in as many pieces as there are tokens."""
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.add(token) for token in ids]
    if pieces:
        pieces[-1] += detokenizer.finish()
    room = len(text)  # it may end inside a token, before a stop string
    for i, piece in enumerate(pieces):
        pieces[i] = piece[:room]
        room -= len(pieces[i])
    return pieces


def spell(processor: "Processor | RelativeProcessor", before: Sequence[int], token: int) -> str:
    """A token as it would be written after those before it."""
    context = list(before[-_CONTEXT:])
    known = processor.decode(context).rstrip(REPLACEMENT)
    text = processor.decode([*context, token])
    piece = text[len(known) :] if text.startswith(known) else processor.decode([token])
    return piece or str(processor.tokenizer.convert_ids_to_tokens(token))
