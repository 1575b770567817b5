"""The one seam from messages to tensors: ids, loss mask and pixels.

Training, chat and captioning all come through here, and nowhere else does a picture
become positions in a prompt. Shapes: B rows, T positions, H and W pixels.
"""

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from vlm.errors import CheckpointError, ConfigError, ContextLengthError
from vlm.folder import read_config
from vlm.images import CleanImage, load_image
from vlm.language import load_tokenizer
from vlm.messages import Message
from vlm.padding import pad_rows
from vlm.pixels import (
    DEFAULT_PREPROCESSING,
    ImageProcessor,
    Preprocessing,
    fit,
    level_table,
    load_image_processor,
)
from vlm.plain_template import PlainTemplate
from vlm.template import ChatTemplate, own_template, slot_texts
from vlm.tokens import TextEncoder
from vlm.vision import num_patches, num_visual_tokens


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model takes it.

    Attributes:
        input_ids: T ids; each picture is `num_visual_tokens` image tokens.
        loss_mask: T flags, True on answers and their end-of-turn tokens.
        images: the pictures in the order of their image tokens.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    images: list[CleanImage]


class Processor:
    """Tokenizer, chat template and preprocessing of one model folder.

    Args:
        tokenizer: a fast tokenizer whose vocabulary has the image token.
        image_processor: the vision tower's preprocessing, PIL backend.
        config: the model's config, which settles the number of visual tokens.
        generation_config: names further end-of-sequence ids.
        chat_template: by default the tokenizer's, else LLaVA-1.5's.

    Raises:
        CheckpointError: the parts contradict each other.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: ImageProcessor,
        config: LlavaConfig,
        generation_config: GenerationConfig | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.image_token_id: int = config.image_token_index
        self.image_token = _image_token(tokenizer, config)
        self.never_text = [self.image_token_id]  # as `vlm.relative_processor` names it
        self.num_visual_tokens = num_visual_tokens(config)
        self.context_length: int = config.text_config.max_position_embeddings
        self.image_size: int = config.vision_config.image_size
        self.chat_template = chat_template or own_template(tokenizer)
        tokenizer.chat_template = self.chat_template
        self._template: ChatTemplate | PlainTemplate = ChatTemplate(
            self.chat_template, tokenizer, self.image_token
        )
        self._encoder = TextEncoder(tokenizer, self.chat_template)
        self.end_of_turn = self._template.turn_end()
        self.eos_token_ids = self._eos_token_ids(generation_config)
        self._preprocessing: Preprocessing = DEFAULT_PREPROCESSING
        self._levels = level_table(image_processor)

    @property
    def preprocessing(self) -> Preprocessing:
        """How files become pixels, see `vlm.pixels.Preprocessing`; may be set."""
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, way: Preprocessing) -> None:
        if way not in get_args(Preprocessing):
            known = ", ".join(get_args(Preprocessing))
            raise ConfigError(f"unknown preprocessing {way!r}; known: {known}")
        self._preprocessing = way

    @property
    def draft_to(self) -> int | None:
        """JPEGs may be decoded smaller, as long as this much remains to resize from."""
        return 2 * self.image_size if self.preprocessing == "draft" else None

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike[str], config: LlavaConfig | None = None
    ) -> "Processor":
        """The processor of a LLaVA folder.

        Args:
            folder: with tokenizer and preprocessing.
            config: its checked config, if it has been read already.

        Raises:
            CheckpointError: a file is missing, or contradicts config.json.
        """
        folder = Path(folder)
        config = config or read_config(folder)
        tokenizer = load_tokenizer(folder)
        image_processor = load_image_processor(folder, config)
        generation = None
        if (folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        template = None if tokenizer.chat_template else _legacy_template(folder)
        return cls(tokenizer, image_processor, config, generation, template)

    def plain(self) -> "Processor":
        """The same without a chat template, for alignment; see `vlm.plain_template`."""
        view = copy.copy(self)
        view._template = PlainTemplate(self.image_token)
        view.chat_template = "plain"
        return view

    def with_image_processor(self, image_processor: ImageProcessor) -> "Processor":
        """The same with another preprocessing."""
        view = copy.copy(self)
        view.image_processor = image_processor
        view._levels = level_table(image_processor)
        return view

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer, template and preprocessing as transformers' LlavaProcessor does."""
        strategy = self.config.vision_feature_select_strategy
        patches = num_patches(self.config.vision_config)
        standard = LlavaProcessor(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            patch_size=self.config.vision_config.patch_size,
            vision_feature_select_strategy=strategy,
            chat_template=self.chat_template,
            image_token=self.image_token,
            # LlavaProcessor counts one token less for "default", whatever the tower.
            num_additional_image_tokens=self.num_visual_tokens - patches + (strategy == "default"),
        )
        standard.save_pretrained(folder)

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> Encoded:
        """A conversation to ids, loss mask and clean pictures.

        Args:
            messages: as `parse_messages` returns them.
            add_generation_prompt: end with the opening of an assistant turn.

        Raises:
            ContextLengthError: more positions than the model has, with the arithmetic.
            ImageError: a picture cannot be used.
        """
        ids, mask = self.encode_ids(messages, add_generation_prompt=add_generation_prompt)
        num_images = sum(len(message.images) for message in messages)
        self.check_length(len(ids), num_images)
        sources = [source for message in messages for source in message.images]
        images = [load_image(source, draft_to=self.draft_to) for source in sources]
        return Encoded(ids, mask, images)

    def encode_ids(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Ids and loss mask of a conversation of any length; no picture is opened."""
        skeleton = self._template.skeleton(messages, add_generation_prompt)
        return self._expand(*self._encoder.encode(skeleton, slot_texts(messages)))

    def pixel_values(self, images: Sequence[CleanImage]) -> torch.Tensor:
        """Pictures to normalised pixels: B pictures -> (B, 3, H, W) float32.

        The same values as CLIPImageProcessorPil, save what `preprocessing` allows.
        """
        size = self.image_size
        if not images:
            return torch.zeros(0, 3, size, size)
        return torch.from_numpy(np.stack([self._pixels(image) for image in images]))

    def collate(
        self,
        rows: Sequence[Encoded],
        padding_side: str = "left",
        labels: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Rows to a padded batch.

        Returns:
            input_ids and attention_mask (B, T); pixel_values (pictures, 3, H, W) if any
            row has a picture; labels (B, T), -100 off the loss mask, if asked for.
        """
        learnt = [row.loss_mask for row in rows] if labels else None
        ids = [row.input_ids for row in rows]
        batch = pad_rows(ids, learnt, self.tokenizer.pad_token_id, padding_side)
        images = [image for row in rows for image in row.images]
        if images:
            batch["pixel_values"] = self.pixel_values(images)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def check_length(self, num_tokens: int, num_images: int) -> None:
        """Raise ContextLengthError if so many positions, visual tokens included, do not fit."""
        num_text = num_tokens - num_images * self.num_visual_tokens
        if num_tokens > self.context_length:
            raise ContextLengthError(
                f"{num_images} pictures x {self.num_visual_tokens} visual tokens + {num_text} "
                f"text tokens = {num_tokens} positions, but the model has {self.context_length}; "
                "shorten the conversation or use fewer pictures"
            )

    def _expand(self, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        """Multiply each image token to as many as the picture has visual tokens."""
        all_ids: list[int] = []
        all_flags: list[bool] = []
        for number, flag in zip(ids, mask, strict=True):
            times = self.num_visual_tokens if number == self.image_token_id else 1
            all_ids += [number] * times
            all_flags += [flag] * times
        return all_ids, all_flags

    def _pixels(self, image: CleanImage) -> np.ndarray:
        exact = self.preprocessing == "exact"
        if self.preprocessing == "draft":  # the values of any other picture stay as they are
            exact = not image.is_drafted
        picture = None
        if self._levels is not None:
            picture = fit(self.image_processor, image.pixels, exact=exact)
        if picture is None or self._levels is None:
            out = self.image_processor(image.pixels, return_tensors="np")
            return np.asarray(out["pixel_values"][0], dtype=np.float32)
        values = np.asarray(picture).transpose(2, 0, 1)
        return np.stack([self._levels[c][values[c]] for c in range(3)])

    def _eos_token_ids(self, generation_config: GenerationConfig | None) -> frozenset[int]:
        named: Any = generation_config.eos_token_id if generation_config else None
        ids = {self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        if self.end_of_turn:
            ids.add(self.tokenizer.convert_tokens_to_ids(self.end_of_turn))
        return frozenset(i for i in ids if i is not None)


def _legacy_template(folder: Path) -> str | None:
    """The template of folders that keep it in chat_template.json."""
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["chat_template"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no chat_template in it ({error})") from error


def _image_token(tokenizer: PreTrainedTokenizerBase, config: LlavaConfig) -> str:
    number = config.image_token_index
    if number in tokenizer.added_tokens_decoder:
        return str(tokenizer.added_tokens_decoder[number].content)
    raise CheckpointError(
        f"the tokenizer has no special token with the image_token_index {number}; "
        "add <image> to it and set image_token_index in config.json"
    )
