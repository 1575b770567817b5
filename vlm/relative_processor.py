"""The seam from messages to tensors for a model that is not ours; see `vlm.relatives`.

The family's own processor in transformers does the work. Pictures reach it through our
gate, so every model sees the same ones, and prompts through `vlm.prompts`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from vlm.errors import CheckpointError, ContextLengthError, ImageError, MessageError
from vlm.folder import one_line
from vlm.images import load_image
from vlm.messages import Message
from vlm.processor import Encoded
from vlm.prompts import Prompter, special_ids


@dataclass(frozen=True)
class Inputs(Encoded):
    """A prompt as the model's `generate` takes it.

    Attributes:
        tensors: by the names of `generate`, for a batch of one.
    """

    tensors: dict[str, torch.Tensor]


class RelativeProcessor:
    """Tokenizer, prompts and preprocessing of a model that is not ours.

    Args:
        standard: the family's processor in transformers.
        config: the model's config.
        generation_config: names the tokens that end an answer.
        template: the folder's chat template; None asks as `vlm.prompts.PLAIN` says.
    """

    def __init__(
        self,
        standard: Any,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        template: str | None,
    ) -> None:
        self.standard = standard
        self.tokenizer = standard.tokenizer
        self.context_length = _context_length(config)
        self._prompter = Prompter(standard, config.model_type, template)
        self.image_token_id: int | None = getattr(config, "image_token_id", None)
        self._nested = template is not None
        ends, self.never_text = special_ids(self.tokenizer, config.model_type)
        named = generation_config.eos_token_id
        named = self.tokenizer.eos_token_id if named is None else named
        ends.update(n for n in (named if isinstance(named, list) else [named]) if n is not None)
        self.eos_token_ids = frozenset(ends)
        pad = self.tokenizer.pad_token_id
        self.pad_token_id: int = min(ends, default=0) if pad is None else pad

    @property
    def caption_prompt(self) -> str:
        """The question that suits captions."""
        return self._prompter.caption

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> Inputs:
        """A conversation to everything that `generate` takes, pixels included.

        Args:
            messages: as `parse_messages` returns them, the last one a question.
            add_generation_prompt: always done.

        Raises:
            ImageError: a picture cannot be used, or (``unfit``) not by this model.
            MessageError: a conversation of a kind that the model cannot take.
            ContextLengthError: more positions than the model has.
            CheckpointError: the folder's processor gives pictures no place in the prompt.
        """
        pictures = [load_image(source).pixels for m in messages for source in m.images]
        prompt = self._prompter(messages)
        options: dict[str, Any] = {"return_tensors": "pt"}
        if isinstance(prompt, list):
            shown = iter(pictures)
            options["text"] = [[next(shown) if piece is None else piece for piece in prompt]]
            options["add_end_of_utterance_token"] = False
        else:
            options["text"] = [prompt]
            if pictures:
                options["images"] = [pictures] if self._nested else pictures
            if self.tokenizer.bos_token and prompt.startswith(self.tokenizer.bos_token):
                options["add_special_tokens"] = False
        try:
            found = self.standard(**options)
        except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            if pictures:
                raise ImageError(
                    f"this model cannot take the picture: {one_line(error)}; use another one",
                    "unfit",
                ) from error
            raise MessageError(f"this model cannot take the question: {one_line(error)}") from error
        tensors = {k: v for k, v in found.items() if isinstance(v, torch.Tensor) and k != "labels"}
        ids: list[int] = tensors["input_ids"][0].tolist()
        self._check(ids, len(pictures))
        return Inputs(ids, [False] * len(ids), [], tensors)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens and, after a plain prompt, leading spaces left out."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text) if self._nested else str(text).lstrip(" ")

    def _check(self, ids: list[int], num_pictures: int) -> None:
        if len(ids) > self.context_length:
            raise ContextLengthError(
                f"the conversation needs {len(ids)} positions, {num_pictures} pictures included, "
                f"but the model has {self.context_length}; shorten it, or use fewer or smaller "
                "pictures"
            )
        if self.image_token_id is not None and ids.count(self.image_token_id) < num_pictures:
            raise CheckpointError(
                "the processor gives the picture no place in the prompt; correct "
                "processor_config.json (num_query_tokens) or the chat template"
            )


def _context_length(config: PretrainedConfig) -> int:
    """Positions of the language model; as good as endless where none are named."""
    text_config = config.get_text_config(decoder=True)
    return getattr(text_config, "max_position_embeddings", None) or sys.maxsize
