"""Small JSON files beside a model that may be there or not. No import of torch."""

import json
from pathlib import Path
from typing import Any

from vlm.errors import CheckpointError


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file.

    Raises:
        CheckpointError: the file holds anything else.
    """
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); correct or remove it") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object; correct or remove it")
    return raw
