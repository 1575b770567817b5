"""Files made from a ledger: sidecars, CSV, Parquet."""

import csv
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest

import vlm
from vlm import testing
from vlm.assistant import Assistant
from vlm.caption_export import Exported, export_captions
from vlm.errors import ConfigError, RecordError
from vlm.ledger_rows import read_rows


def run(model: Assistant, source: Any, out: Path, **options: Any) -> dict[str, Any]:
    """The last row of each picture."""
    vlm.caption_images(source, out, model=model, max_new_tokens=8, **options)
    return {row["path"]: row for _, row in read_rows(out)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_text_beside_each_picture(model: Assistant, pictures: Path, out: Path) -> None:
    testing.draw_image(seed=8).save(pictures / "0.jpg")  # shares its stem with 0.png
    (pictures / "1.png").write_text("no picture")
    (pictures / "2.txt").write_text("by hand")
    name = "n" * 251 + ".png"
    testing.draw_image(seed=9).save(pictures / name)
    rows = run(model, pictures, out)
    assert export_captions(out, sidecar="beside") == Exported(sidecars=7, kept=1)
    texts = {path.name: path.read_text() for path in pictures.glob("*.txt")}
    assert texts.pop("2.txt") == "by hand"
    expected = {f"{n}.txt": f"{n}.png" for n in (3, 4, 5, 6)}
    expected |= {"0.png.txt": "0.png", "0.jpg.txt": "0.jpg", "n" * 251 + ".txt": name}
    captions = {text: rows[str(pictures / n)]["caption"] + "\n" for text, n in expected.items()}
    assert texts == captions
    assert export_captions(out, sidecar="beside", overwrite=True) == Exported(sidecars=8)
    assert (pictures / "2.txt").read_text() == rows[str(pictures / "2.png")]["caption"] + "\n"
    assert not list(pictures.glob(".*"))
    testing.draw_image(seed=20).save(pictures / "3.png")  # an earlier caption is replaced
    rows = run(model, pictures, out)
    (pictures / "4.txt").write_text("by hand")
    assert export_captions(out, sidecar="beside") == Exported(sidecars=7, kept=1)
    assert (pictures / "3.txt").read_text() == rows[str(pictures / "3.png")]["caption"] + "\n"
    assert (pictures / "3.txt").read_text() != texts["3.txt"]


def test_a_folder_that_mirrors_the_pictures(
    model: Assistant, pictures: Path, out: Path, tmp_path: Path
) -> None:
    shard, mirror = tmp_path / "pictures" / "00.tar", tmp_path / "mirror"
    buffer = io.BytesIO()
    testing.draw_image().save(buffer, "PNG")
    with tarfile.open(shard, "w") as file:
        for key in ("x/a", "../../evil"):
            info = tarfile.TarInfo(f"{key}.png")
            info.size = len(buffer.getvalue())
            file.addfile(info, io.BytesIO(buffer.getvalue()))
    (pictures / "deep").mkdir()
    os.replace(pictures / "6.png", pictures / "deep" / "6.png")
    prompts = {"short": "what?", "long": "describe."}
    rows = run(model, [pictures, shard], out, prompt=prompts, sidecar=mirror)
    found = {str(path.relative_to(mirror)) for path in mirror.rglob("*") if path.is_file()}
    stems = [*map(str, range(6)), "deep/6", "00.tar/x/a", "00.tar/evil"]
    assert found == {f"{stem}.{key}.txt" for stem in stems for key in prompts}
    first = rows[str(pictures / "0.png")]["captions"]
    assert (mirror / "0.long.txt").read_text() == first["long"]["text"] + "\n"
    with pytest.raises(ConfigError, match="no file of its own"):
        export_captions(out, sidecar="beside")


def test_tables_have_the_last_row_of_each_picture(
    model: Assistant, pictures: Path, out: Path, tmp_path: Path
) -> None:
    (pictures / "1.png").write_text("no picture")
    run(model, pictures, out)
    testing.draw_image(seed=1).save(pictures / "1.png")
    table, parquet = tmp_path / "out.csv", tmp_path / "out.parquet"
    rows = run(model, pictures, out, retry_errors=True, csv=table, parquet=parquet)
    assert len(rows) == 7 and len(out.read_text().splitlines()) == 8
    expected = {path: row["caption"] for path, row in rows.items()}
    with table.open(newline="", encoding="utf-8") as file:
        assert {row["path"]: row["caption"] for row in csv.DictReader(file)} == expected
    loaded = datasets.Dataset.from_parquet(str(parquet), cache_dir=str(tmp_path / "cache"))
    assert dict(zip(loaded["path"], loaded["caption"], strict=True)) == expected
    assert loaded["status"] == ["captioned"] * 7 and max(loaded["mean_logprob"]) <= 0
    assert not list(tmp_path.glob("*.tmp"))


def test_no_rows_give_empty_tables(tmp_path: Path, out: Path) -> None:
    out.write_bytes(b"")
    export_captions(out, csv=tmp_path / "a.csv", parquet=tmp_path / "a.parquet", sidecar=tmp_path)
    assert (tmp_path / "a.csv").read_text() == ""
    with pytest.raises(RecordError, match="cannot be written"):
        export_captions(out, csv=tmp_path / "absent" / "a.csv")
    with pytest.raises(RecordError, match="cannot be read"):
        export_captions(tmp_path / "absent.jsonl", csv=tmp_path / "a.csv")
