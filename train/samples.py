"""The records of a run as the samples that it trains on, and a word on what did not fit."""

from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import Dataset

from train.arguments import training_arguments
from train.checkpoints import CHECKPOINTS
from train.config import RunConfig
from train.dataset import RecordDataset
from train.dialogues import Dialogues
from train.survey import Samples, Survey
from vlm.messages import Record

TOO_LONG = "over-long.jsonl"  # in a run's output folder


def survey_data(
    config: RunConfig, dialogues: Dialogues | None, data: RecordDataset, name: str = "training"
) -> tuple[Dataset[Record], list[str]]:
    """Survey the records of a stage that has pictures; those of others stay as they are.

    The first process of a machine reads; the others take its result from the disk.

    Args:
        config: of the run.
        dialogues: of its job.
        data: its records.
        name: of the data set, for files and lines.

    Returns:
        The samples, and lines for people.

    Raises:
        RecordError: see `train.survey.survey`.
    """
    if dialogues is None:
        return data, []
    output = Path(config.output)
    folder = output / CHECKPOINTS
    with training_arguments(config).main_process_first(desc="reading records"):
        folder.mkdir(parents=True, exist_ok=True)
        found = dialogues.survey(data, folder / f"{name}.npz", config.num_workers)
        if found.too_long and name == "training":
            (output / TOO_LONG).write_text("\n".join(found.too_long) + "\n", encoding="utf-8")
    return Samples(data, found), list(_lines(config, dialogues, data, found, name))


def _lines(
    config: RunConfig, dialogues: Dialogues, data: RecordDataset, found: Survey, name: str
) -> Iterator[str]:
    if found.too_long:
        yield (
            f"{len(found.too_long):,} of {len(data):,} {name} records are too long: "
            f"{config.batches.over_long} made {len(found.length):,} samples of the data"
            + (f" (see {TOO_LONG})" if name == "training" else "")
        )
    if dialogues.cache is not None:
        size = dialogues.cache.num_bytes(found.num_pictures) / 1e9
        yield (
            f"features of {found.num_pictures:,} {name} pictures take {size:.1f} GB "
            f"in {dialogues.cache.folder}"
        )
