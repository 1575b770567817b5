"""The small model that ships with the package; no import of torch."""

from pathlib import Path

from vlm.errors import CheckpointError


def path() -> Path:
    """The built-in model's folder.

    Raises:
        CheckpointError: this copy of the package has none; the message names the command.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: the built-in model is absent; build it with `make built-in`, "
            "or give a model folder or hub id"
        )
    return folder
