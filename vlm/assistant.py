"""`load` a model and talk to it: the Python face of the toolkit.

    assistant = load()
    assistant.ask("cat.png", "what is top left?")

Importing this module imports no torch; `load` does, after it has found the folder.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from vlm import hub
from vlm.about import CAPTION_PROMPT, About, read_about
from vlm.answers import Answer, SamplingOptions, to_answer
from vlm.captioning import CaptionResult, caption_many, check_batch_size
from vlm.errors import ConfigError, MessageError
from vlm.fingerprint import fingerprint
from vlm.images import ImageSource
from vlm.messages import Message, parse_messages, user
from vlm.startup import paused_gc

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from vlm.chat import Chat
    from vlm.engine.request import Request
    from vlm.processor import Processor
    from vlm.quantize import Bits
    from vlm.relative_processor import RelativeProcessor

Images = ImageSource | Sequence[ImageSource] | None


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: "str | torch.device" = "auto",
    dtype: "str | torch.dtype" = "auto",
    quantize: "Bits | None" = None,
    compile: bool = False,
) -> "Assistant":
    """Open a model.

    Args:
        model: None for the built-in one, a LLaVA folder, or a hub id (downloaded once);
            or the same of any other image-text-to-text model, see `vlm.relatives`.
        device: ``"auto"`` takes CUDA, else MPS, else the CPU.
        dtype: ``"auto"`` is float32 on the CPU and the checkpoint's own type elsewhere.
        quantize: ``"4bit"`` or ``"8bit"`` for the language model's linear layers.
        compile: decode steps in compiled form, see `vlm.engine.compiled`.

    Raises:
        CheckpointError: no such model, or its folder cannot be used.
        ConfigError: an unknown device or dtype.
        MissingExtraError: the model's family needs a package that is not installed.
    """
    folder = hub.resolve(model)
    is_hub_id = isinstance(model, str) and not os.path.isdir(model)
    about = read_about(folder, str(model) if is_hub_id else folder.resolve().name)
    with paused_gc():
        from vlm.opening import open_parts

        parts = open_parts(folder, device, dtype, quantize, compile)
        ours = getattr(parts[1], "caption_prompt", None)
        if ours is not None and about.caption_prompt == CAPTION_PROMPT:
            about = replace(about, caption_prompt=ours)
        return Assistant(
            *parts,
            about=about,
            identity=fingerprint(folder),
            built_in=model is None,
            compile=compile,
        )


class Assistant:
    """A model that answers questions about pictures. Safe to share between threads.

    Args:
        model: in evaluation mode; a LLaVA of `vlm.checkpoint` or one of `vlm.relatives`.
        processor: of the same folder.
        about: what to show of it.
        identity: changes when the model changes; by default unique to this object.
        built_in: whether it is the model that ships with the package.
        compile: see `load`.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        processor: "Processor | RelativeProcessor",
        *,
        about: About | None = None,
        identity: str | None = None,
        built_in: bool = False,
        compile: bool = False,
    ) -> None:
        from vlm.engine import start

        self._about = about or About("model in memory")
        self.processor = processor
        self.engine = start(model, processor, identity, compile)
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
            sampling: max_new_tokens, temperature (0 is greedy) and more, see
                `vlm.engine.sampling.Sampling`.

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
        keep: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Answer the last message of a conversation, piece by piece.

        The pieces joined are what `generate` returns. Wrong arguments raise here,
        before the first piece; `stop` ends the answer before the next token; `keep` lets
        the next turn of the conversation start from what this one computed.
        """
        from vlm.engine.stream import pieces

        request = self.prepare(messages, stop=stop, keep=keep, **sampling)
        return pieces(self.engine.stream(request), self.processor.decode)

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
        """Answers to (image, question) pairs in their order, `batch_size` of them at a time.

        Pairs are taken in a thread, at most a batch ahead. The first bad picture or question
        raises, after the answers to those before it.
        """
        check_batch_size(batch_size)
        requests = (self.prepare_ahead(*pair, **sampling) for pair in pairs)
        yield from (answer.text for answer in self.run_all(requests, batch_size))

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

    def chat(self, system: str | None = None, *, trim: bool = False) -> "Chat":
        """A conversation that computes only what is new in each turn; see `vlm.chat.Chat`."""
        from vlm.chat import Chat

        return Chat(self, system, trim=trim)

    def prepare(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        stop: threading.Event | None = None,
        keep: bool = False,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> "Request":
        """Check and encode one conversation; needs no turn at the model."""
        from vlm.engine.request import Request
        from vlm.engine.sampling import Sampling

        if stop is not None and not hasattr(stop, "is_set"):
            raise ConfigError(f"stop is {stop!r}, which is no event; use stop_strings for strings")
        settings = Sampling(**sampling)
        chat = parse_messages(messages)
        if chat[-1].role != "user":
            raise MessageError("the last message is an answer; end with the user's question")
        prompt = self.processor.encode(chat, add_generation_prompt=True)
        deadline = None if timeout is None else time.monotonic() + timeout
        return Request(prompt, settings, stop, keep=keep, deadline=deadline)

    def prepare_ahead(
        self, image: Images, question: str, **sampling: Unpack[SamplingOptions]
    ) -> "Request":
        """One question, as for `ask`, with all done that needs no turn at the model."""
        return self.engine.ahead(self.prepare([question_about(image, question)], **sampling))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a standard folder; see `vlm.checkpoint.save_checkpoint`.

        Raises:
            CheckpointError: the folder cannot be written, or the weights are quantised.
            ConfigError: the model is none of our LLaVAs.
        """
        from vlm.checkpoint import save_checkpoint
        from vlm.processor import Processor

        if not isinstance(self.processor, Processor):
            raise ConfigError(f"{self.name} is no LLaVA folder; copy the folder it came from")
        save_checkpoint(self.engine.model, self.processor, folder)

    def run(self, requests: "Sequence[Request]") -> list[Answer]:
        """Answer prepared requests as one batch, in their order."""
        return [to_answer(each, self.processor) for each in self.engine.generate(requests)]

    def run_all(self, requests: "Iterable[Request]", batch_size: int = 16) -> Iterator[Answer]:
        """Answers to any number of prepared requests, in their order; few are in memory.

        `batch_size` of them run together, and as many are taken ahead, in a thread. An error
        of a request raises after the answers before it.
        """
        found = self.engine.generate_all(requests, batch_size)
        return (to_answer(each, self.processor) for each in found)


def question_about(image: Images, question: str) -> Message:
    """One user turn: no, one or several pictures, then the question."""
    if image is None:
        return user(question)
    return user(question, *(image if isinstance(image, list | tuple) else [image]))
