"""How `align` and `instruct` turn records into a step of the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from train.attention import packed_rows
from train.collate import DialogueCollator
from train.dataset import RecordDataset
from train.feature_cache import DiskFeatures
from train.packing import trees_of
from train.pictures import complete
from train.settings import BatchConfig
from train.survey import Limits, Survey, survey
from train.trial import enable_packing
from vlm.model import VisionLanguageModel
from vlm.processor import Processor


class Dialogues:
    """The collator of a run, and what surrounds each forward and backward pass.

    Args:
        model: gets the attention that packing needs, if its decoder takes it.
        processor: of the model.
        config: packing, sharing and cache.

    Attributes:
        collate: records to a batch.
        processor: of the model.
        cache: what the frozen tower said, or None.
        padded_because: why rows are padded although packing is asked for, or None.
    """

    def __init__(
        self, model: VisionLanguageModel, processor: Processor, config: BatchConfig
    ) -> None:
        self._model, self.processor, self._config = model, processor, config
        self.padded_because: str | None = None
        if config.packing:
            self.padded_because = enable_packing(model.language_model)
        folder = config.feature_cache
        self.cache = None if folder is None else DiskFeatures(Path(folder), model, processor)
        self.collate = DialogueCollator(
            processor,
            packing=config.packing and self.padded_because is None,
            share_pictures=config.share_pictures,
            cache=self.cache,
        )

    def survey(self, records: RecordDataset, cache: Path | None, num_workers: int = 0) -> Survey:
        """The samples that the records make; see `train.survey.survey`."""
        most = self.processor.context_length
        limits = Limits(min(self._config.max_length or most, most), self._config.over_long)
        return survey(records, self.processor, limits, cache=cache, num_workers=num_workers)

    @contextmanager
    def around(self, batch: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
        """What the model takes of a batch; inside, its attention knows the batch's blocks."""
        inputs = dict(batch)
        trees = inputs.pop("trees", None)
        if self.cache is not None:
            inputs = complete(inputs, self._model, self.cache)
        with packed_rows(None if trees is None else trees_of(trees), inputs.get("labels")):
            yield inputs
