"""Conversations to the prompts of other vision-language families.

A family with a chat template in its folder is asked by that template. The older ones have
none; `PLAIN` says how their papers and cards ask. No text of a user's can write a control
token: one that is spelled out in a text is taken apart by a space.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jinja2 import TemplateError

from vlm.about import CAPTION_PROMPT
from vlm.errors import MessageError
from vlm.messages import Message, TextPart

# Texts, and None where the next picture stands.
Pieces = list[str | None]


@dataclass(frozen=True)
class Plain:
    """How a family without a chat template is asked.

    Args:
        caption: the prompt that `Assistant.caption` uses by default.
        question: a user's turn, up to its pictures.
        opening: what follows them; the answer begins here.
        answer: an earlier answer; None where the family takes a single turn.
        tasks: texts that begin so are given as they are.
        lead: goes before everything.
        interleaved: any number of pictures stand among the texts; otherwise every
            prompt has exactly one.
        end: a token that ends answers, where the tokenizer knows it.
        never: tokens that are ruled out, as its card does.
    """

    caption: str
    question: str = "{}"
    opening: str = ""
    answer: str | None = None
    tasks: tuple[str, ...] = ()
    lead: str = ""
    interleaved: bool = False
    end: str = ""
    never: tuple[str, ...] = ()


PLAIN = {
    # Li et al. 2023, arXiv:2301.12597; further turns as on its card at the hub
    "blip-2": Plain("a photo of", "Question: {}", " Answer:", " {}. ", tasks=("a photo of",)),
    # Dai et al. 2023, arXiv:2305.06500, appendix: instructions are plain text
    "instructblip": Plain("Write a short description for the image."),
    # Beyer et al. 2024, arXiv:2407.07726: prefixes of the tasks
    "paligemma": Plain(
        "caption en",
        "answer en {}",
        tasks=("answer", "caption", "cap", "describe", "detect", "ocr", "question", "segment"),
        lead="<image>",
    ),
    # Laurençon et al. 2023, arXiv:2306.16527, and the card of idefics-9b-instruct
    "idefics": Plain(
        "Describe this image.",
        # Trap: its processor fetches a text that is a URL; one with a space never is.
        "User: {}",
        "<end_of_utterance>\nAssistant:",
        " {}<end_of_utterance>\n",
        interleaved=True,
        end="<end_of_utterance>",
        never=("<image>", "<fake_token_around_image>"),
    ),
}


class Prompter:
    """Writes the prompts of one model.

    Args:
        standard: the model's processor in transformers.
        model_type: of its config; a key of `PLAIN` where there is no template.
        template: the folder's chat template, or None.
    """

    def __init__(self, standard: Any, model_type: str, template: str | None) -> None:
        self._tokenizer = standard.tokenizer
        self._model_type = model_type
        self._template = template
        self._plain = PLAIN[model_type] if template is None else None
        tokens = sorted(_control_tokens(standard, template or ""), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    @property
    def caption(self) -> str:
        """The question that suits captions."""
        return self._plain.caption if self._plain else CAPTION_PROMPT

    def __call__(self, messages: Sequence[Message]) -> str | Pieces:
        """A conversation that ends with a question, as its processor takes it.

        Raises:
            MessageError: a conversation of a kind that the model cannot take.
        """
        if self._plain is None:
            return self._chat(messages)
        self._check(messages, self._plain)
        pieces = self._pieces(messages, self._plain)
        return pieces if self._plain.interleaved else "".join(piece or "" for piece in pieces)

    def _chat(self, messages: Sequence[Message]) -> str:
        chat = [{"role": m.role, "content": self._parts(m)} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                chat, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise MessageError(f"the model's chat template refuses this: {reason}") from error
        return str(text)

    def _parts(self, message: Message) -> list[dict[str, str]]:
        """Neighbouring texts become one, or they could spell a control token together."""
        parts: list[dict[str, str]] = []
        for is_text, group in groupby(message.content, lambda p: isinstance(p, TextPart)):
            if is_text:
                text = "".join(part.text for part in group if isinstance(part, TextPart))
                parts.append({"type": "text", "text": self._safe(text)})
            else:
                parts += [{"type": "image"} for _ in group]
        return parts

    def _check(self, messages: Sequence[Message], plain: Plain) -> None:
        num_pictures = sum(len(message.images) for message in messages)
        if messages[0].role == "system":
            problem = "takes no system message; put it into the question"
        elif plain.answer is None and len(messages) > 1:
            problem = "answers single questions; ask this one on its own"
        elif not plain.interleaved and num_pictures != 1:
            problem = f"takes exactly one picture a conversation, and this one has {num_pictures}"
        else:
            return
        raise MessageError(f"the model ({self._model_type}) {problem}")

    def _pieces(self, messages: Sequence[Message], plain: Plain) -> Pieces:
        pieces: Pieces = [plain.lead]
        for message in messages:
            text = self._safe(message.text).strip()
            if message.role == "assistant":
                pieces.append((plain.answer or "{}").format(text))
            elif text.startswith(plain.tasks or ("\0",)):
                pieces.append(text)
            else:
                pieces.append(plain.question.format(text))
                pieces += [None] * len(message.images) if plain.interleaved else []
                pieces.append(plain.opening)
        if plain.end and not _knows(self._tokenizer, plain.end):
            pieces = [piece and piece.replace(plain.end, "") for piece in pieces]
        return pieces

    def _safe(self, text: str) -> str:
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def special_ids(tokenizer: Any, model_type: str) -> tuple[set[int], list[int]]:
    """Further tokens that end an answer of a plain family, and those that it must not write."""
    plain = PLAIN.get(model_type)
    if plain is None:
        return set(), []
    ends, never = (
        [tokenizer.convert_tokens_to_ids(t) for t in tokens if t and _knows(tokenizer, t)]
        for tokens in ((plain.end,), plain.never)
    )
    return set(ends), never


def _knows(tokenizer: Any, token: str) -> bool:
    return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)


def _control_tokens(standard: Any, template: str) -> set[str]:
    tokens = {
        token.content
        for token in standard.tokenizer.added_tokens_decoder.values()
        if token.special or token.content in template
    }
    for name, token in vars(standard).items():
        if name.endswith("_token") and token:
            tokens.add(str(getattr(token, "content", token)))
    return {token for token in tokens if len(token.strip()) > 1}
