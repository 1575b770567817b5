"""`load` a model and talk to it: the Python face of the toolkit.

    assistant = load()
    assistant.ask("cat.png", "what is top left?")

Importing this module imports no torch; `load` does, after it has found the folder.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from vlm import hub
from vlm.about import About, read_about
from vlm.captioning import CaptionResult, caption_many, check_batch_size
from vlm.errors import MessageError
from vlm.fingerprint import fingerprint
from vlm.images import ImageSource
from vlm.messages import Message, parse_messages, user
from vlm.startup import paused_gc

if TYPE_CHECKING:
    import torch

    from vlm.engine.request import Completion, FinishReason, Request, Row
    from vlm.model import VisionLanguageModel
    from vlm.processor import Processor

Images = ImageSource | Sequence[ImageSource] | None


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of every method that generates; see `vlm.engine.sampling.Sampling`."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    Attributes:
        text: without special tokens.
        finish_reason: ``"stop"``, ``"length"`` or ``"cancelled"``.
        num_prompt_tokens: positions of the prompt, visual tokens included.
        num_new_tokens: generated tokens, the ending one left out.
    """

    text: str
    finish_reason: "FinishReason"
    num_prompt_tokens: int
    num_new_tokens: int


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: "str | torch.device" = "auto",
    dtype: "str | torch.dtype" = "auto",
) -> "Assistant":
    """Open a model.

    Args:
        model: None for the built-in one, a LLaVA folder, or a hub id (downloaded once).
        device: ``"auto"`` takes CUDA, else MPS, else the CPU.
        dtype: ``"auto"`` is float32 on the CPU and the checkpoint's own type elsewhere.

    Raises:
        CheckpointError: no such model, or its folder cannot be used.
        ConfigError: an unknown device or dtype.
    """
    folder = hub.resolve(model)
    is_hub_id = isinstance(model, str) and not os.path.isdir(model)
    about = read_about(folder, str(model) if is_hub_id else folder.resolve().name)
    with paused_gc():
        from vlm.device import resolve_device, resolve_dtype

        place = resolve_device(device)
        precision = resolve_dtype(dtype, place)
        from vlm.checkpoint import load_checkpoint

        parts = load_checkpoint(folder, place, precision)
        return Assistant(*parts, about=about, identity=fingerprint(folder), built_in=model is None)


class Assistant:
    """A model that answers questions about pictures. Safe to share between threads.

    Args:
        model: in evaluation mode.
        processor: of the same folder.
        about: what to show of it.
        identity: changes when the model changes; by default unique to this object.
        built_in: whether it is the model that ships with the package.
    """

    def __init__(
        self,
        model: "VisionLanguageModel",
        processor: "Processor",
        *,
        about: About | None = None,
        identity: str | None = None,
        built_in: bool = False,
    ) -> None:
        from vlm.engine.runner import Engine

        self._about = about or About("model in memory")
        self.processor = processor
        self.engine = Engine(model, processor, identity)
        self.built_in = built_in

    @property
    def name(self) -> str:
        """A short name."""
        return self._about.name

    @property
    def about(self) -> str:
        """One honest line on what it knows."""
        return self._about.knows

    @property
    def examples(self) -> tuple[tuple[Path, str], ...]:
        """Pairs of a picture file and a question to try."""
        return self._about.examples

    @property
    def caption_prompt(self) -> str:
        """The question that `caption` asks by default."""
        return self._about.caption_prompt

    @property
    def identity(self) -> str:
        """A short hash of weights, tokenizer and preprocessing."""
        return self.engine.identity

    @property
    def device(self) -> "torch.device":
        """Where the model runs."""
        return self.engine.model.device

    @property
    def num_parameters(self) -> int:
        """How many weights it has, shared ones counted once."""
        return sum(p.numel() for p in self.engine.model.parameters())

    def ask(self, image: Images, question: str, **sampling: Unpack[SamplingOptions]) -> str:
        """Answer one question.

        Args:
            image: a picture, several, or None for a question without one.
            question: plain text; ``<image>`` or role markers in it mean nothing.
            sampling: max_new_tokens, temperature (0 is greedy), top_p, seed.

        Raises:
            ImageError: the picture cannot be used.
            MessageError: the question is empty.
            ConfigError: a sampling value is out of range.
            ContextLengthError: question and pictures do not fit.
        """
        return self.generate([[question_about(image, question)]], **sampling)[0].text

    def caption(
        self,
        image: ImageSource,
        *,
        prompt: str | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """Describe a picture; `prompt` replaces the model's own captioning question."""
        return self.ask(image, self.caption_prompt if prompt is None else prompt, **sampling)

    def stream(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        stop: threading.Event | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Answer the last message of a conversation, piece by piece.

        The pieces joined are what `generate` returns. Wrong arguments raise here,
        before the first piece; `stop` ends the answer before the next token.
        """
        request = self.prepare(messages, stop=stop, **sampling)
        return self._pieces(self.engine.stream(request))

    def generate(
        self,
        conversations: Iterable[Sequence[Message | Mapping[str, Any]]],
        *,
        stop: threading.Event | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Answer]:
        """Answer several conversations as one batch, in their order."""
        return self.run([self.prepare(chat, stop=stop, **sampling) for chat in conversations])

    def ask_many(
        self,
        pairs: Iterable[tuple[Images, str]],
        batch_size: int = 16,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Answers to (image, question) pairs in their order, computed in batches.

        The first bad picture or question raises, after the answers of earlier batches.
        """
        check_batch_size(batch_size)
        iterator = iter(pairs)
        while batch := list(islice(iterator, batch_size)):
            chats = [[question_about(image, question)] for image, question in batch]
            yield from (answer.text for answer in self.generate(chats, **sampling))

    def caption_many(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        batch_size: int = 16,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[CaptionResult]:
        """Caption files and folders, in order; see `vlm.captioning.caption_many`."""
        return caption_many(
            self, paths, batch_size=batch_size, prompt=prompt, max_new_tokens=max_new_tokens
        )

    def prepare(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        stop: threading.Event | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> "Request":
        """Check and encode one conversation; needs no turn at the model."""
        from vlm.engine.request import Request
        from vlm.engine.sampling import Sampling

        settings = Sampling(**sampling)
        chat = parse_messages(messages)
        if chat[-1].role != "user":
            raise MessageError("the last message is an answer; end with the user's question")
        prompt = self.processor.encode(chat, add_generation_prompt=True)
        return Request(prompt, settings, stop)

    def run(self, requests: "Sequence[Request]") -> list[Answer]:
        """Answer prepared requests as one batch, in their order."""
        return [self._answer(completion) for completion in self.engine.generate(requests)]

    def _answer(self, completion: "Completion") -> Answer:
        text = self.processor.decode(completion.ids)
        reason = completion.finish_reason
        return Answer(text, reason, completion.num_prompt_tokens, len(completion.ids))

    def _pieces(self, steps: "Iterator[Row]") -> Iterator[str]:
        from vlm.engine.stream import Detokenizer

        text = Detokenizer(self.processor.decode)
        for row in steps:
            for token in row.ids[len(text.ids) :]:
                if piece := text.add(token):
                    yield piece
        if rest := text.finish():
            yield rest


def question_about(image: Images, question: str) -> Message:
    """One user turn: no, one or several pictures, then the question."""
    if image is None:
        return user(question)
    return user(question, *(image if isinstance(image, list | tuple) else [image]))
