"""Records to batches, one collator for each kind of stage. They run in loader workers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase

from train.contrastive import MAX_TEXT_TOKENS
from train.feature_cache import DiskFeatures
from train.packing import Row, pack
from train.pictures import PictureReader
from vlm.errors import RecordError, VlmError
from vlm.images import CleanImage, load_image
from vlm.messages import Record
from vlm.padding import pad_rows
from vlm.processor import Encoded, Processor
from vlm.template import ChatTemplate, slot_texts
from vlm.tokens import TextEncoder


class DialogueCollator:
    """Conversations with pictures, for `align` and `instruct`.

    Args:
        processor: of the model.
        packing: one row of all records; else rows padded on the right.
        share_pictures: compute like beginnings once; see `train.packing`.
        cache: of what the frozen tower said.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        packing: bool = False,
        share_pictures: bool = True,
        cache: DiskFeatures | None = None,
    ) -> None:
        self._processor = processor
        self._packing = packing
        self._share = share_pictures
        self._reader = PictureReader(processor, cache)

    def __call__(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """A batch with labels, see `collate`."""
        return self.collate([self.encode(record) for record in records])

    def encode(self, record: Record) -> Row:
        """One record as tokens, with its pictures opened.

        Raises:
            RecordError: it is too long, has nothing to learn, or a picture cannot be used.
        """
        with _naming(record):
            ids, mask = self._processor.encode_ids(record.messages)
            self._processor.check_length(len(ids), len(record.images))
            pictures = tuple(self._reader.open(image) for image in record.images)
        _check_learnt(record, mask)
        return Row(ids, mask, pictures)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows to a batch: `train.packing.PackedRow.tensors`, or `Processor.collate`."""
        if self._packing:
            packed = pack(rows, self._processor.image_token_id, share=self._share)
            return packed.tensors() | self._reader.tensors(packed.pictures)
        plain = [Encoded(row.input_ids, row.loss_mask, []) for row in rows]
        batch = self._processor.collate(plain, padding_side="right", labels=True)
        return batch | self._reader.tensors([p for row in rows for p in row.pictures])


class TextCollator:
    """Conversations without pictures, for `language`. Pads on the right."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        assert isinstance(tokenizer.chat_template, str)
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._template = ChatTemplate(tokenizer.chat_template, tokenizer, "<image>")
        self._encoder = TextEncoder(tokenizer, tokenizer.chat_template)

    def __call__(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, each (B, T)."""
        rows = [self._encode(record) for record in records]
        ids, learnt = [ids for ids, _ in rows], [mask for _, mask in rows]
        return pad_rows(ids, learnt, self._tokenizer.pad_token_id, "right")

    def _encode(self, record: Record) -> tuple[list[int], list[bool]]:
        if record.images:
            raise RecordError(f"record {record.id} has pictures; the stage language takes text")
        with _naming(record):
            skeleton = self._template.skeleton(record.messages, False)
        ids, mask = self._encoder.encode(skeleton, slot_texts(record.messages))
        if len(ids) > self._context_length:
            raise RecordError(
                f"record {record.id} has {len(ids)} tokens, the model takes "
                f"{self._context_length}; shorten it or raise model.new_language.context_length"
            )
        _check_learnt(record, mask)
        return ids, mask


class PairCollator:
    """Pictures and the texts that belong to them, for `contrastive`.

    Every assistant turn of a record is a text of its one picture. A picture smaller than
    the tower's stays as it is (a close-up), a larger one is resized and cropped.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, preprocessing: CLIPImageProcessorPil, side: int
    ) -> None:
        self._tokenizer = tokenizer
        self._preprocessing = preprocessing
        self._side = side

    def __call__(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """pixel_values (B, 3, H, W), text_ids and text_mask (U, T), targets (B, U)."""
        pairs = [self._pair(record) for record in records]
        texts = sorted({text for _, own in pairs for text in own})
        encoded: Any = self._tokenizer(
            texts, padding=True, padding_side="right", return_tensors="pt"
        )
        self._check_lengths(records, texts, encoded["attention_mask"].sum(1).tolist())
        number = {text: index for index, text in enumerate(texts)}
        targets = torch.zeros(len(pairs), len(texts))
        for row, (_, own) in enumerate(pairs):
            targets[row, [number[text] for text in own]] = 1
        return {
            "pixel_values": torch.stack([self._pixels(image) for image, _ in pairs]),
            "text_ids": encoded["input_ids"],
            "text_mask": encoded["attention_mask"],
            "targets": targets,
        }

    def _pair(self, record: Record) -> tuple[CleanImage, list[str]]:
        texts = [message.text for message in record.messages if message.role == "assistant"]
        if len(record.images) != 1 or not texts:
            raise RecordError(
                f"record {record.id} has {len(record.images)} pictures and {len(texts)} answers; "
                "the stage contrastive takes one picture and at least one answer"
            )
        with _naming(record):
            return load_image(record.images[0]), texts

    def _check_lengths(
        self, records: Sequence[Record], texts: Sequence[str], lengths: Sequence[int]
    ) -> None:
        for text, length in zip(texts, lengths, strict=True):
            if length > MAX_TEXT_TOKENS:
                ids = [r.id for r in records if any(m.text == text for m in r.messages)]
                raise RecordError(
                    f"record {ids[0]} has an answer of {length} tokens, the text tower takes "
                    f"{MAX_TEXT_TOKENS}; shorten it"
                )

    def _pixels(self, image: CleanImage) -> Tensor:
        small = max(image.pixels.size) < self._side
        steps = {"do_resize": not small, "do_center_crop": not small}
        values = self._preprocessing(image.pixels, return_tensors="np", **steps)
        return torch.from_numpy(np.asarray(values["pixel_values"][0], dtype=np.float32))


@contextmanager
def _naming(record: Record) -> Iterator[None]:
    """Errors say which record they are about."""
    try:
        yield
    except VlmError as error:
        raise RecordError(f"record {record.id}: {error}") from error


def _check_learnt(record: Record, mask: Sequence[bool]) -> None:
    """A batch of records with nothing to learn would have a loss of 0 / 0."""
    if not any(mask):
        raise RecordError(f"record {record.id} has no answer to learn from; remove it")
