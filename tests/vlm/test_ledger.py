"""Captions on disk: however a run ends, a rerun leaves one right row for every file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlm import testing
from vlm.assistant import Assistant, load
from vlm.errors import ConfigError, MessageError, RecordError
from vlm.ledger import Summary, caption_to_ledger

NUMBER = 12


def run(model: Assistant, album: Path, out: Path, **options: Any) -> Summary:
    return caption_to_ledger(
        model, [album], out, **{"max_new_tokens": 12, "batch_size": 2, **options}
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_row_tells_everything(model: Assistant, album: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "out.jsonl"
    seen: list[str] = []
    done = run(model, album, out, on_row=lambda result: seen.append(result.path))
    assert done == Summary(captioned=NUMBER - 1, failed=1, skipped=0)
    found = rows(out)
    assert [row["path"] for row in found] == seen == sorted(map(str, album.iterdir()))
    results = model.caption_many([album], max_new_tokens=12)
    for row, result in zip(found, results, strict=True):
        assert row["caption"] == result.caption
        assert (row["sha256"], row["size"]) == (result.sha256, result.size)
        assert (row["error"], row["code"]) == (result.error, result.code)
        assert (row["model"], row["model_id"]) == ("tiny", model.identity)
        assert (row["prompt"], row["max_new_tokens"]) == (model.caption_prompt, 12)
    assert len({row["caption"] for row in found}) > 4
    assert found[3]["code"] == "undecodable"


def test_a_second_run_does_nothing(model: Assistant, album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(model, album, out)
    before = out.read_bytes()
    assert run(model, album, out) == Summary(captioned=0, failed=0, skipped=NUMBER)
    for path in album.iterdir():
        os.utime(path, (0, 0))  # copied elsewhere and back: other times, same bytes
    assert run(model, album, out).skipped == NUMBER
    assert out.read_bytes() == before


def test_new_and_changed_files_get_a_row(model: Assistant, album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(model, album, out)
    (album / "00.png").write_bytes((album / "01.png").read_bytes())
    testing.draw_image(seed=3).save(album / "03.png")
    testing.draw_image(seed=50).save(album / "50.png")
    (album / "02.png").unlink()
    assert run(model, album, out) == Summary(3, 0, skipped=NUMBER - 3, copied=1)
    last = {row["path"]: row["caption"] for row in rows(out)}
    assert last[str(album / "00.png")] == last[str(album / "01.png")]
    assert last[str(album / "03.png")] == model.caption(album / "03.png", max_new_tokens=12)


def test_errors_are_tried_again_when_asked(model: Assistant, album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(model, album, out)
    assert run(model, album, out, retry_errors=True) == Summary(0, 1, NUMBER - 1)
    assert [row["code"] for row in rows(out)].count("undecodable") == 2
    assert run(model, album, out) == Summary(0, 0, NUMBER)


# Refusals


def test_another_prompt_length_or_model_is_refused(
    model: Assistant, album: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run(model, album, out)
    before = out.read_bytes()
    other = load(testing.tiny_llava_folder(tmp_path / "tiny", "qwen2", seed=1))
    with pytest.raises(ConfigError, match=r"prompt 'describe the picture\.'.*not 'why\?'"):
        run(model, album, out, prompt="why?")
    with pytest.raises(ConfigError, match=r"max_new_tokens 12 .*not None"):
        run(model, album, out, max_new_tokens=None)
    with pytest.raises(ConfigError, match="model_id"):
        run(other, album, out)
    assert out.read_bytes() == before
    assert run(model, album, out, prompt=model.caption_prompt).skipped == NUMBER


def test_wrong_options_write_nothing(model: Assistant, album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match="batch_size"):
        run(model, album, out, batch_size=0)
    with pytest.raises(MessageError):
        run(model, album, out, prompt=" ")
    assert not out.exists() or out.read_bytes() == b""


FOREIGN = [
    "notes\n",
    "notes",
    "\n",
    "{}\n",
    '{"path": "a"}\n',
    '{"path": "a", "caption": 3\n',
    '{"image": "a", "caption": "b"}\n',
]


@pytest.mark.parametrize("text", FOREIGN)
def test_somebody_elses_file_is_left_alone(
    model: Assistant, album: Path, tmp_path: Path, text: str
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(text)
    with pytest.raises(RecordError, match=r"out\.jsonl:1 is no row of captions"):
        run(model, album, out)
    assert out.read_text() == text


@pytest.mark.parametrize("change", [{"size": ...}, {"sha256": "xyz"}, {"sha256": 3}, {"path": []}])
def test_a_row_that_was_edited_is_told_by_its_number(
    model: Assistant, album: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    out = tmp_path / "out.jsonl"
    run(model, album, out)
    found = rows(out)
    found[4] = {key: value for key, value in (found[4] | change).items() if value is not ...}
    out.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    with pytest.raises(RecordError, match=r"out\.jsonl:5 is no row"):
        run(model, album, out)
