"""Chat templates: one rendering with placeholders, so that every text's place is known.

A template is rendered with a private-use sentinel in place of each text. The result,
cut at the sentinels, is a *skeleton*: pieces that the template wrote and slots for
the texts. Texts are put in afterwards, so no text can pass for template, and the
answers' places need no searching. Skeletons depend only on roles and pictures and are
cached.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from vlm.errors import CheckpointError, MessageError
from vlm.messages import ImagePart, Message

# The prompt of LLaVA-1.5 (Liu et al. 2023b): Vicuna's, an answer closed by the
# end-of-sequence token. Used for language models without a chat template.
DEFAULT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "A chat between a curious human and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the human's questions. "
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Put before a template of a text-only model: contents that are lists of parts become the
# strings that it knows, a picture standing on a line of its own.
_FLATTEN_PARTS = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set text = namespace(value=message['content']) -%}"
    "{%- if text.value is not string and text.value is iterable -%}"
    "{%- set text.value = '' -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set text.value = text.value + IMAGE -%}"
    "{%- else -%}{%- set text.value = text.value + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=text.value)] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
_OPEN, _CLOSE = "\ue000", "\ue001"
_SENTINEL = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_MAX_SKELETONS = 1024


@dataclass(frozen=True)
class Literal:
    """Text that the template wrote; the first `num_learnt` characters belong to an answer."""

    text: str
    num_learnt: int = 0


@dataclass(frozen=True)
class Slot:
    """Place of the text number `index` of the conversation."""

    index: int
    is_answer: bool


@dataclass(frozen=True)
class Skeleton:
    """A rendered conversation without its texts."""

    pieces: tuple[Literal | Slot, ...]
    num_images: int


@dataclass(frozen=True)
class _Text:
    """One text part: spaces around it stay with the template, which may trim them."""

    role: str
    before: str
    after: str


def template_with_pictures(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """The tokenizer's own template, or LLaVA-1.5's, able to take contents made of parts.

    A text-only model's template prints such contents or fails on them, so it gets a
    preamble; transformers' AutoProcessor then renders it as we do.
    """
    source = own_template(tokenizer)
    if ChatTemplate(source, tokenizer, image_token).takes_parts:
        return source
    return _FLATTEN_PARTS.replace("IMAGE", repr(image_token + "\n")) + source


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template, the one named default of several; else LLaVA-1.5's."""
    source = tokenizer.chat_template or DEFAULT_TEMPLATE
    return str(source["default"] if isinstance(source, dict) else source)


class ChatTemplate:
    """Renders skeletons of one template.

    Args:
        source: the Jinja template.
        tokenizer: gives the special tokens that templates refer to.
        image_token: what the template writes for a picture.

    Raises:
        CheckpointError: the template cannot be used with pictures.
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> None:
        self.source = source
        self.image_token = image_token
        self._specials = {
            key: value for key, value in tokenizer.special_tokens_map.items() if value is not None
        }
        added = tokenizer.added_tokens_decoder.values()
        marks = sorted((t.content for t in added if t.content.strip()), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        self._cache: dict[Any, Skeleton] = {}
        self.takes_parts = self._probe()

    def skeleton(self, messages: Sequence[Message], add_generation_prompt: bool) -> Skeleton:
        """The pieces of the rendered conversation, in order.

        Raises:
            MessageError: the template refuses these roles.
            CheckpointError: the template loses, doubles or changes a text or a picture.
        """
        key = (add_generation_prompt, tuple(_signature(m) for m in messages))
        found = self._cache.get(key)
        if found is not None:
            return found
        texts = [t for _, parts in key[1] for t in parts if isinstance(t, _Text)]
        chat = self._chat(key[1])
        rendered = self._render(chat, add_generation_prompt)
        num_images = sum(len(m.images) for m in messages)
        result = self._cut(rendered, texts, num_images)
        if len(self._cache) >= _MAX_SKELETONS:
            self._cache.clear()
        self._cache[key] = result
        return result

    def turn_end(self) -> str | None:
        """The token that closes an answer, or None if the template writes none."""
        text = (_Text("user", "", ""),)
        answer = (_Text("assistant", "", ""),)
        chat = self._chat((("user", text), ("assistant", answer)))
        rendered = self._render(chat, False)
        tail = rendered[rendered.rfind(_CLOSE) + 1 :]
        end = self._close(tail)
        return tail[:end].strip() or None

    def _chat(self, shape: Sequence[tuple[str, Sequence[_Text | None]]]) -> list[dict[str, Any]]:
        """Messages with sentinels, in the form that the template takes."""
        chat: list[dict[str, Any]] = []
        number = 0
        for role, parts in shape:
            content: list[dict[str, str]] = []
            for part in parts:
                if part is None:
                    content.append({"type": "image"})
                else:
                    text = f"{part.before}{_OPEN}{number}{_CLOSE}{part.after}"
                    content.append({"type": "text", "text": text})
                    number += 1
            chat.append({"role": role, "content": content})
        if self.takes_parts:
            return chat
        for message in chat:
            message["content"] = "".join(
                part.get("text", f"{self.image_token}\n") for part in message["content"]
            )
        return chat

    def _render(self, chat: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            rendered, _ = render_jinja_template(
                conversations=[chat],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                **self._specials,
            )
        except Exception as error:  # a template is code: 1 / 0 is no TemplateError
            raise MessageError(f"the chat template refuses this conversation: {error}") from error
        return str(rendered[0])

    def _probe(self) -> bool:
        """Whether contents are lists of parts (as in LLaVA folders) or plain strings.

        Lists are tried first: a template that only takes strings either fails on a
        list or prints it, and then no sentinel stands alone between template text.
        """
        shape = (("user", (None, _Text("user", "", ""))),)
        for takes_parts in (True, False):
            self.takes_parts = takes_parts
            try:
                rendered = self._render(self._chat(shape), True)
            except MessageError:
                continue
            whole = f"{_OPEN}0{_CLOSE}"
            printed = "'type'" in rendered or '"type"' in rendered
            if rendered.count(whole) == 1 and rendered.count(self.image_token) == 1 and not printed:
                return takes_parts
        raise CheckpointError(
            f"the chat template does not write one {self.image_token} and the text for a user "
            "turn with a picture; correct chat_template.jinja"
        )

    def _cut(self, rendered: str, texts: Sequence[_Text], num_images: int) -> Skeleton:
        pieces: list[Literal | Slot] = []
        seen: list[int] = []
        answered = False
        fragments = _SENTINEL.split(rendered)  # literal, number, literal, number, ..., literal
        for i, fragment in enumerate(fragments):
            if i % 2:
                seen.append(int(fragment))
                text = texts[seen[-1]]
                answered = text.role == "assistant"
                if answered and text.before:
                    _split_off(pieces, text.before)
                pieces.append(Slot(seen[-1], answered))
            elif fragment:
                pieces.append(Literal(fragment, self._close(fragment) if answered else 0))
                answered = False
        if sorted(seen) != list(range(len(texts))):
            raise CheckpointError(
                f"the chat template wrote {len(seen)} of {len(texts)} texts; it does not support "
                "this order of roles, correct chat_template.jinja"
            )
        written = sum(p.text.count(self.image_token) for p in pieces if isinstance(p, Literal))
        if written != num_images:
            raise CheckpointError(
                f"the chat template wrote {written} {self.image_token} for {num_images} pictures; "
                "correct chat_template.jinja"
            )
        return Skeleton(tuple(pieces), num_images)

    def _close(self, literal: str) -> int:
        """Length of the end-of-turn token (and spaces before it) at the start of `literal`."""
        found = self._marks.search(literal)
        if found and not literal[: found.start()].strip() and found.group() != self.image_token:
            return found.end()
        return 0


def _split_off(pieces: list[Literal | Slot], spaces: str) -> None:
    """Count the spaces that open an answer to the answer, if the template kept them."""
    last = pieces[-1] if pieces else None
    if isinstance(last, Literal) and last.text.endswith(spaces):
        rest = last.text.removesuffix(spaces)
        pieces[-1:] = [Literal(rest, min(last.num_learnt, len(rest))), Literal(spaces, len(spaces))]


def _signature(message: Message) -> tuple[str, tuple[_Text | None, ...]]:
    """What of a message a skeleton depends on; None stands for a picture."""
    parts: list[_Text | None] = []
    for part in message.content:
        if isinstance(part, ImagePart):
            parts.append(None)
            continue
        core = part.text.strip()
        if core:
            start = part.text.index(core)
            before, after = part.text[:start], part.text[start + len(core) :]
            parts.append(_Text(message.role, before, after))
        elif part.text:
            parts.append(_Text(message.role, "", ""))  # spaces alone are a text of their own
    return message.role, tuple(parts)


def slot_texts(messages: Sequence[Message]) -> list[str]:
    """The texts for the slots, in the order of their numbers."""
    return [
        part.text.strip() or part.text
        for message in messages
        for part in message.content
        if not isinstance(part, ImagePart) and part.text
    ]
