"""From what a user calls a model to a folder on this machine; no import of torch."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vlm import builtin
from vlm.errors import CheckpointError

# All that a standard folder needs, and nothing that could hold code or pickles.
WEIGHTS = "*.safetensors"
ALLOWED_FILES = (
    WEIGHTS,
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "spiece.model",
    "merges.txt",
    "vocab.txt",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    model: str | os.PathLike[str] | None, also: Sequence[str] = (), *, weights: bool = True
) -> Path:
    """The folder of a model.

    Args:
        model: None for the built-in one; an existing folder; else a hub id such as
            ``"llava-hf/llava-1.5-7b-hf"``, which is downloaded once and then reused.
        also: patterns of further files to download, for a caller that reads them safely.
        weights: download them too; without, a few small files say what a model is.

    Raises:
        CheckpointError: there is no such folder, or the hub cannot give it.
    """
    if model is None:
        return builtin.path()
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: a model is a folder, not a file; give the folder around it")
    if not isinstance(model, str) or not is_hub_id(model):
        raise CheckpointError(
            f"{path}: no such folder, and no hub id of the form org/name; check the path"
        )
    wanted = [pattern for pattern in ALLOWED_FILES if weights or pattern != WEIGHTS]
    return _download(model, [*wanted, *also])


def is_hub_id(name: str) -> bool:
    """Whether the name has the form org/name; a folder here may be called so too."""
    return _HUB_ID.fullmatch(name) is not None


def _download(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id}: its owner asks for a login; accept the terms on the hub's page, "
            "then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{hub_id}: no such folder here and no such model on the hub; check the name"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HTTPError, OSError) as error:
        raise CheckpointError(
            f"{hub_id}: no such folder here, and the hub cannot be reached; where there is a "
            f"network, run `hf download {hub_id} --local-dir FOLDER` and give that folder"
        ) from error
