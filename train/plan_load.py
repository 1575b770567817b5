"""What a mean record of a run's data asks for, from a sample of it."""

from collections.abc import Sequence

from train.config import RunConfig
from train.dataset import RecordDataset
from train.outline import processor_of
from train.plan_memory import Load
from train.survey import Limits, survey
from vlm.messages import Record
from vlm.processor import Processor

_SAMPLE = 400  # records, spread over all files
_COUNTED = 32  # of them, whose supervised tokens are counted


class Spread(RecordDataset):
    """Some records of files, at equal distances.

    Attributes:
        num_all: records in the files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(paths)
        self.num_all = super().__len__()
        self._kept = min(self.num_all, _SAMPLE)

    def __len__(self) -> int:
        return self._kept if hasattr(self, "_kept") else super().__len__()

    def __getitem__(self, index: int) -> Record:
        return super().__getitem__(index * self.num_all // self._kept)

    def fingerprint(self) -> str:
        """Nothing: only caches ask for it, and the whole files would be read."""
        return ""


def limits_of(config: RunConfig, processor: Processor) -> Limits:
    """How long a sample of the run may be."""
    most = min(config.batches.max_length or processor.context_length, processor.context_length)
    return Limits(most, config.batches.over_long)


def mean_load(records: RecordDataset, processor: Processor, limits: Limits) -> Load:
    """Of records that are encoded as the run will.

    Raises:
        RecordError: some are malformed, have no answer or are too long.
    """
    found = survey(records, processor, limits)
    some = [records[int(index)].messages for index in found.record[:_COUNTED]]
    learnt = sum(sum(processor.encode_ids(messages)[1]) for messages in some)
    pictures = float((found.picture > 0).mean())
    return Load(int(found.length.mean()), max(1, learnt // len(some)), pictures)


def load_of_data(config: RunConfig, data: Spread, earlier: Sequence[RunConfig]) -> Load | None:
    """Of the run's own data; None where its model has no processor yet.

    Args:
        config: of the run.
        data: of its files.
        earlier: runs that will have been done by then.

    Raises:
        RecordError: as `mean_load`.
        CheckpointError: the processor's files contradict each other.
    """
    processor = processor_of(config, earlier)
    if processor is None:
        return None
    return mean_load(data, processor, limits_of(config, processor))
