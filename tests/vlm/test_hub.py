"""From a model's name to a folder: existing paths first, the hub last, never by guessing."""

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from vlm.errors import CheckpointError
from vlm.hub import ALLOWED_FILES, resolve


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """Replace the download; what is asked of it is listed."""
    made: list[tuple[str, Any]] = []

    def snapshot(hub_id: str, *, allow_patterns: list[str]) -> str:
        made.append((hub_id, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return made


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)


def test_a_folder_is_a_folder(calls: list[Any], tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert not calls


def test_a_local_folder_wins_over_a_hub_id(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert not calls


def test_a_hub_id_is_downloaded_and_nothing_that_can_run(calls: list[Any], tmp_path: Path) -> None:
    assert resolve("llava-hf/llava-1.5-7b-hf") == tmp_path / "snapshot"
    assert calls == [("llava-hf/llava-1.5-7b-hf", list(ALLOWED_FILES))]
    for name in ("*.py", "*.bin", "*.pt", "*.pkl", "*.h5"):
        assert not any(pattern.endswith(name[1:]) for pattern in ALLOWED_FILES)


def test_what_else_is_downloaded_is_said_by_the_caller(calls: list[Any]) -> None:
    resolve("org/name", also=["*.bin"])
    assert calls == [("org/name", [*ALLOWED_FILES, "*.bin"])]


@pytest.mark.parametrize(
    "name",
    ["nowhere", "./a/b", "/no/such/place", "a/b/c", "../up", "org/", "https://hf.co/a/b", ""],
)
def test_what_is_neither_folder_nor_hub_id_is_told(calls: list[Any], name: str) -> None:
    if name == "":
        assert resolve(name) == Path()  # the current folder exists; its contents are judged later
        return
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(name)
    assert not calls


def test_a_path_object_is_never_a_hub_id(calls: list[Any]) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(Path("org/name"))
    assert not calls


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="folder, not a file"):
        resolve(file)


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("offline"), HTTPError("no route"), OSError("disk")]
)
def test_without_a_network_the_way_out_is_named(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(CheckpointError, match="hf download org/name --local-dir FOLDER"):
        resolve("org/name")


def test_an_unknown_name_on_the_hub_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    fail_with(monkeypatch, RepositoryNotFoundError("404", response=response))
    with pytest.raises(CheckpointError, match="no such model on the hub"):
        resolve("org/name")


def test_the_real_client_offline_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be reached"):
        resolve("org/name")
