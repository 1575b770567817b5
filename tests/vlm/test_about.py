"""The optional about.json: what it may hold, and what stands in where it is silent."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.about import CAPTION_PROMPT, KNOWS, About, read_about
from vlm.errors import CheckpointError


def write(folder: Path, content: Any) -> Path:
    (folder / "about.json").write_text(json.dumps(content))
    return folder


def test_without_a_file_the_text_is_generic(tmp_path: Path) -> None:
    expected = About("tiny", KNOWS, CAPTION_PROMPT, ())
    assert read_about(tmp_path, "tiny") == expected
    assert read_about(write(tmp_path, {}), "tiny") == expected
    assert read_about(tmp_path / "absent", "tiny") == expected


def test_each_key_counts_alone(tmp_path: Path) -> None:
    found = read_about(write(tmp_path, {"knows": "scenes", "licence": "ignored"}), "tiny")
    assert found == About("tiny", "scenes")
    found = read_about(write(tmp_path, {"name": "Ünï", "caption_prompt": "what?"}), "tiny")
    assert found == About("Ünï", KNOWS, "what?")


def test_examples_are_files_of_the_folder_in_order(tmp_path: Path) -> None:
    listed = [{"image": f"examples/{name}.png", "question": f"{name}?"} for name in "ba"]
    found = read_about(write(tmp_path, {"examples": listed}), "tiny")
    assert found.examples == tuple((tmp_path / "examples" / f"{n}.png", f"{n}?") for n in "ba")


@pytest.mark.parametrize("image", ["/etc/passwd", "../secret.png", "a/../../secret.png"])
def test_examples_outside_the_folder_are_refused(tmp_path: Path, image: str) -> None:
    """A downloaded model must not put this machine's files on show."""
    write(tmp_path, {"examples": [{"image": image, "question": "what?"}]})
    with pytest.raises(CheckpointError, match="inside the folder"):
        read_about(tmp_path, "tiny")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "not a JSON object"),
        ("text", "not a JSON object"),
        ({"name": 3}, "name must be a text"),
        ({"knows": " "}, "knows must be a text"),
        ({"caption_prompt": None}, "caption_prompt must be a text"),
        ({"examples": {}}, "examples must be a list"),
        ({"examples": ["a.png"]}, "an example must be"),
        ({"examples": [{"image": "a.png"}]}, "an example must be"),
        ({"examples": [{"image": "a.png", "question": 3}]}, "an example must be"),
    ],
)
def test_malformed_content_is_told(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_about(write(tmp_path, content), "tiny")
    assert str(tmp_path / "about.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}", b"{'name': 'x'}"])
def test_what_is_no_json_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "about.json").write_bytes(data)
    with pytest.raises(CheckpointError, match="not JSON"):
        read_about(tmp_path, "tiny")
