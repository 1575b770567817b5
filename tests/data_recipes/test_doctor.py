"""The doctor: each kind of fault is found where it was planted, and nowhere else."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_recipes.doctor import KINDS, Options, Summary, doctor
from data_recipes.doctor.baseline import Baseline, form
from data_recipes.doctor.pictures import difference_hash
from data_recipes.doctor.texts import script
from data_recipes.formats import read
from serve.cli import app
from vlm.errors import ConfigError, RecordError
from vlm.images import load_image
from vlm.messages import Message, Record, assistant, read_records, user

Row = dict[str, Any]
LIMIT, VISUAL = 200, 4


@dataclass
class Letters:
    """One token a character, four a picture; answers are learnt unless they are '-'."""

    num_visual_tokens: int = VISUAL
    context_length: int = LIMIT

    def encode_ids(self, messages: Any) -> tuple[list[int], list[bool]]:
        mask: list[bool] = []
        for message in messages:
            learnt = message.role == "assistant" and message.text != "-"
            mask += [False] * VISUAL * len(message.images) + [learnt] * len(message.text)
        return [0] * len(mask), mask


def noise(seed: int, size: tuple[int, int] = (32, 24)) -> Image.Image:
    dice = np.random.default_rng(seed)
    return Image.fromarray(dice.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def row(name: str, image: str | None, question: str = "what is it?", answer: str = "noise") -> Row:
    parts = [{"type": "image"}] if image else []
    said = [*parts, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return {"id": name, "images": [image] if image else [], "messages": turns}


def write(folder: Path, rows: list[Row | bytes]) -> Path:
    path = folder / "records.jsonl"
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def run(path: Path, out: Path, **options: Any) -> tuple[Summary, list[Row], list[Row]]:
    clean = options.pop("clean", None)
    summary = doctor(
        lambda faults: read(path, faults=faults),
        out,
        title=str(path),
        processor=Letters(),
        special_tokens=["<mark>"],
        options=Options(**options),
        clean=clean,
    )
    lists = [
        [json.loads(line) for line in (out / name).read_text().splitlines()]
        for name in ("quarantine.jsonl", "notes.jsonl")
    ]
    return summary, lists[0], lists[1]


def plant_missing(folder: Path) -> Row:
    return row("missing", "nowhere.png", "plant 1")


def plant_unreadable(folder: Path) -> Row:
    (folder / "u.png").write_bytes(b"no picture at all")
    return row("unreadable", "u.png", "plant 2")


def plant_truncated(folder: Path) -> Row:
    stream = io.BytesIO()
    noise(-1 % 999).save(stream, "jpeg")
    (folder / "t.jpg").write_bytes(stream.getvalue()[:-200])
    return row("truncated", "t.jpg", "plant 3")


def plant_too_large(folder: Path) -> Row:
    (folder / "big.png").write_bytes(bytes(8))
    os.truncate(folder / "big.png", 65 * 1024 * 1024)  # sparse
    return row("too_large", "big.png", "plant 4")


def plant_aspect(folder: Path) -> Row:
    noise(5001, (110, 10)).save(folder / "thin.png")
    return row("aspect", "thin.png", "plant 5")


def plant_path_escape(folder: Path) -> Row:
    noise(5002).save(folder.parent / "outside.png")
    return row("path_escape", "../outside.png", "plant 6")


def plant_remote_url(folder: Path) -> Row:
    return row("remote_url", "https://example.org/a.png", "plant 7")


def plant_image_mismatch(folder: Path) -> Row:
    return row("image_mismatch", "0.png", "plant 8") | {"images": ["0.png", "1.png"]}


def plant_empty_answer(folder: Path) -> Row:
    return row("empty_answer", "0.png", "plant 9", " ")


def plant_no_supervised(folder: Path) -> Row:
    return row("no_supervised", "0.png", "plant 10", "-")


def plant_too_long(folder: Path) -> Row:
    return row("too_long", "0.png", "plant 11" + "x" * (LIMIT - VISUAL - 8), "noise")


def plant_special_token(folder: Path) -> Row:
    return row("special_token", "0.png", "plant 12", "a <mark>")


def plant_control_character(folder: Path) -> Row:
    return row("control_character", "0.png", "plant 13", "a\u0007b")


def plant_duplicate_record(folder: Path) -> Row:
    return row("duplicate_record", "7.png", "what is it 7?", "noise 7")


def plant_malformed(folder: Path) -> bytes:
    return b'{"id": "malformed", "images": [}'


def plant_rotated(folder: Path) -> Row:
    exif = Image.Exif()
    exif[274] = 6
    noise(5003).save(folder / "turned.jpg", exif=exif)
    return row("rotated", "turned.jpg", "plant 15")


def plant_animated(folder: Path) -> Row:
    frames = [Image.new("L", (16, 16), i % 251) for i in range(10_000)]
    frames[0] = noise(5004, (16, 16)).convert("L")
    frames[0].save(folder / "long.gif", save_all=True, append_images=frames[1:])
    return row("animated", "long.gif", "plant 16")


def plant_duplicate_picture(folder: Path) -> Row:
    (folder / "copy.png").write_bytes((folder / "5.png").read_bytes())
    return row("duplicate_picture", "copy.png", "plant 17")


def plant_near_duplicate(folder: Path) -> Row:
    Image.open(folder / "6.png").save(folder / "again.bmp")
    return row("near_duplicate", "again.bmp", "plant 18")


PLANTS: dict[str, Callable[[Path], Row | bytes]] = {
    name.removeprefix("plant_"): value
    for name, value in list(globals().items())
    if name.startswith("plant_")
}


@pytest.fixture(scope="module")
def clean_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A thousand records without any fault, and their pictures."""
    folder = tmp_path_factory.mktemp("doctor") / "data"
    folder.mkdir()
    for i in range(1000):
        noise(i).save(folder / f"{i}.png", compress_level=1)
    return folder, [row(str(i), f"{i}.png", f"what is it {i}?", f"noise {i}") for i in range(1000)]


def test_every_kind_has_a_plant() -> None:
    assert set(PLANTS) == set(KINDS)


def test_clean_data_is_clean(clean_rows: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, rows = clean_rows
    summary, faults, notes = run(write(folder, list(rows)), tmp_path, full=True, workers=2)
    assert (faults, notes, summary.num_faulty) == ([], [], 0)
    assert summary.num_records == summary.num_pictures == summary.num_decoded == 1000


def test_one_of_each_in_a_thousand(clean_rows: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, rows = clean_rows
    mixed: list[Row | bytes] = list(rows)
    for i, plant in enumerate(PLANTS.values()):
        mixed.insert(50 * (i + 1), plant(folder))
    path = write(folder, mixed)
    summary, faults, notes = run(path, tmp_path / "out", full=True, clean=tmp_path / "clean")
    found = {entry["code"]: entry["id"] for entry in faults + notes}
    assert set(found) == set(KINDS)
    assert len(faults) + len(notes) == len(KINDS)
    assert {entry["code"] for entry in faults} == {c for c in KINDS if KINDS[c].is_fault}
    for code, name in found.items():
        by_line = name.startswith(f"{path}, line ")
        number = 50 * (list(PLANTS).index(code) + 1) + 1
        assert name == (f"{path}, line {number}" if by_line else code)
    assert summary.num_faulty == len(faults)
    kept = [record.id for record in read_records(tmp_path / "clean" / "records.jsonl")]
    named = [line["id"] for line in mixed if isinstance(line, dict)]
    assert kept == [name for name in named if not (name in KINDS and KINDS[name].is_fault)]
    page = (tmp_path / "out" / "doctor.html").read_text()
    assert all(kind.title in page for kind in KINDS.values())
    assert "http://" not in page and "<script" not in page


@pytest.mark.parametrize("code", PLANTS)
def test_a_fault_alone(code: str, clean_rows: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, rows = clean_rows
    planted = [*rows[:8], PLANTS[code](folder)]
    _, faults, notes = run(write(folder, planted), tmp_path, full=True)
    assert [entry["code"] for entry in faults + notes] == [code]
    assert (faults != []) is KINDS[code].is_fault


def test_the_arithmetic_of_a_record_that_is_too_long(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "0.png")
    path = write(tmp_path, [plant_too_long(tmp_path)])
    _, faults, _ = run(path, tmp_path / "out")
    told = "1 pictures x 4 visual tokens + 201 text tokens = 205 positions, but the model has 200"
    assert faults[0]["reason"] == told
    assert faults[0]["record"] == 0


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    noise(0).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    path = write(folder, [row("a", "link.png"), row("b", "loop.png")])
    _, faults, _ = run(path, tmp_path / "out")
    assert faults[0]["code"] == "path_escape"
    assert faults[1]["code"] == "unreadable"
    allowed = list(read(path, images=tmp_path))
    assert "a" in [record.id for record in allowed]


def test_bytes_that_are_no_utf8_name_their_place(tmp_path: Path) -> None:
    path = write(tmp_path, ["Größe".encode("latin-1"), row("fine", None)])
    summary, faults, _ = run(path, tmp_path / "out")
    assert faults[0]["id"] == f"{path}, line 1" and "byte 3 of" in faults[0]["reason"]
    assert "0xf6" in faults[0]["reason"]
    assert summary.num_records == 1


def test_other_formats_are_examined_too(tmp_path: Path) -> None:
    """LLaVA's JSON, one picture is missing and the list is cut; a shard with a broken member."""
    noise(0).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]
    entries = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(3)]
    (tmp_path / "llava.json").write_text(json.dumps(entries)[:-40])
    summary, faults, _ = run(tmp_path / "llava.json", tmp_path / "a", clean=tmp_path / "clean")
    assert [entry["code"] for entry in faults] == ["malformed", "missing"]  # read in batches
    assert (summary.num_records, summary.num_faulty) == (2, 2)
    (copy,) = read_records(tmp_path / "clean" / "records.jsonl")
    assert copy.images == (str(tmp_path / "0.png"),)

    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in [
            ("0.png", (tmp_path / "0.png").read_bytes()),
            ("0.txt", b"noise"),
            ("1.png", b"no picture"),
            ("1.txt", b"noise"),
            ("2.txt", b"alone"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    summary, faults, _ = run(tmp_path / "x.tar", tmp_path / "b", clean=tmp_path / "c2")
    assert sorted(entry["code"] for entry in faults) == ["malformed", "unreadable"]
    (copy,) = read_records(tmp_path / "c2" / "records.jsonl")
    assert Path(str(copy.images[0])).read_bytes() == (tmp_path / "0.png").read_bytes()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no data file"):
        run(tmp_path / "none.jsonl", tmp_path / "out")


def test_pixels_tell_what_headers_hide(tmp_path: Path) -> None:
    """A PNG whose middle is cut out keeps header and end."""
    stream = io.BytesIO()
    noise(0, (64, 64)).save(stream, "png")
    data = stream.getvalue()
    (tmp_path / "0.png").write_bytes(data[:4000] + b"\0" * 500 + data[4500:])
    path = write(tmp_path, [row("a", "0.png")])
    assert run(path, tmp_path / "out", sample=0)[1] == []
    assert [f["code"] for f in run(path, tmp_path / "out", full=True)[1]] == ["truncated"]


def test_a_sample_is_spread_over_all(clean_rows: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, rows = clean_rows
    summary, _, _ = run(write(folder, list(rows)), tmp_path, sample=50)
    assert 100 < summary.num_decoded < 300  # 50 (1 + ln(1000 / 50)) = 200


def test_a_jpeg_of_the_same_picture_is_near_and_another_is_not() -> None:
    smooth = noise(1, (12, 9)).resize((320, 240), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    smooth.resize((200, 150)).save(stream, "jpeg", quality=80)
    other = noise(2, (12, 9)).resize((320, 240), Image.Resampling.BICUBIC)
    signs = [
        int.from_bytes(difference_hash(load_image(source)))
        for source in (smooth, stream.getvalue(), other)
    ]
    assert (signs[0] ^ signs[1]).bit_count() <= 12
    assert (signs[0] ^ signs[2]).bit_count() > 60


def test_the_commonest_answer_of_each_form() -> None:
    counted = Baseline()
    for answer in ["red", "red", "Red.", "blue"]:
        counted.add(Record("a", (), (user("What color is the bus?"), assistant(answer))))
    for answer in ["yes", "no"]:
        counted.add(Record("a", (), (user("Is there a dog?"), assistant(answer))))
    counted.add(Record("a", (), (user("Tell me a story"), assistant("x" * 100))))
    assert counted.share() == (3 + 1) / 6
    first = counted.forms()[0]
    assert (first.opening, first.num, first.answer, first.share) == (
        "what color is",
        4,
        "red",
        0.75,
    )
    assert form("12 cats?") == "# cats"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a cat", "Latin"),
        ("Größe", "Latin"),
        ("кот", "Cyrillic"),
        ("猫が座る", "Kana"),
        ("一只猫", "Han"),
        ("고양이", "Hangul"),
        ("12 + 3", "none"),
        ("ჩემი", "other"),
    ],
)
def test_scripts(text: str, name: str) -> None:
    assert script(text) == name


def test_text_in_the_page_is_escaped(tmp_path: Path) -> None:
    path = write(tmp_path, [row("<script>x", None, "<b>bold", "<mark>")])
    run(path, tmp_path / "out")
    page = (tmp_path / "out" / "doctor.html").read_text()
    assert "<script>" not in page and "&lt;b&gt;bold" in page


def test_a_picture_inside_a_record(tmp_path: Path) -> None:
    stream = io.BytesIO()
    noise(0).save(stream, "png")
    message = Message("user", user("what?", stream.getvalue()).content)
    record = Record("a", (stream.getvalue(),), (message, assistant("noise")))  # type: ignore[arg-type]

    def read(faults: object) -> Iterator[Record]:
        return iter([record])

    doctor(read, tmp_path / "out", title="x", clean=tmp_path / "clean")
    (copy,) = read_records(tmp_path / "clean" / "records.jsonl")
    assert Path(str(copy.images[0])).read_bytes() == stream.getvalue()


def test_the_command_tells_by_its_exit_code(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    noise(0).save(data / "0.png")
    write(data, [row("a", "0.png")])
    options = ["--out", str(out), "--full"]
    runner = CliRunner()
    assert runner.invoke(app, ["data", "doctor", str(data), *options]).exit_code == 0
    write(data, [row("a", "0.png"), row("b", "1.png")])
    told = runner.invoke(app, ["data", "doctor", str(data), *options])
    assert told.exit_code == 1 and "missing" in told.output
    own = runner.invoke(app, ["data", "doctor", str(data), *options, "--clean", str(data)])
    assert isinstance(own.exception, ConfigError)  # `main` makes it one line and code 2


KILLED = """
import sys, time
from pathlib import Path
from data_recipes.doctor import doctor
from vlm.messages import Record
def read(faults):
    for i in range(3000):
        if i == 2900:
            print("ready", flush=True)
            time.sleep(60)
        yield Record(str(i % 7), ("/nowhere",))
doctor(read, sys.argv[1], title="x", clean=sys.argv[2])
"""


def test_a_kill_leaves_nothing_torn(tmp_path: Path) -> None:
    out, clean = tmp_path / "out", tmp_path / "clean"
    command = [sys.executable, "-c", KILLED, str(out), str(clean)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    left = [path.name for path in out.iterdir()]
    assert left and all(name.endswith(".part") for name in left)
    assert not clean.exists()
    run(write(tmp_path, [row("a", None)]), out)
    assert sorted(path.name for path in out.iterdir()) == [
        "doctor.html",
        "notes.jsonl",
        "quarantine.jsonl",
    ]
