"""Records out and in again: nothing is lost."""

import io
import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import data_recipes.formats.write
from data_recipes.formats import WRITERS, read, write_jsonl, write_llava, write_parquet
from serve.cli import app
from vlm.errors import RecordError
from vlm.messages import ImagePart, Message, Record, TextPart, assistant, read_records, user
from vlm.record_files import RecordFiles
from vlm.testing import draw_image


def png(seed: int) -> bytes:
    file = io.BytesIO()
    draw_image((8, 6), seed).save(file, "PNG")
    return file.getvalue()


PNG = [png(0), png(1)]
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)
spoken = texts.filter(lambda text: text.strip())
asked = spoken.filter(lambda text: "<image>" not in text)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """What LLaVA's files can express, and the keys that are kept beside it."""
    messages = []
    if draw(st.booleans()):
        messages.append(Message("system", (TextPart(draw(spoken)),)))
    for _ in range(draw(st.integers(1, 3))):
        before, between, after = (draw(st.lists(st.sampled_from(PNG), max_size=2)) for _ in "abc")
        parts = [*map(ImagePart, before), TextPart(draw(asked))]
        if between:
            parts += [*map(ImagePart, between), TextPart(draw(asked))]
        messages.append(Message("user", (*parts, *map(ImagePart, after))))
        messages.append(Message("assistant", (TextPart(draw(spoken)),)))
    images = tuple(image for message in messages for image in message.images)
    name = st.none() | spoken
    meta = st.dictionaries(texts, st.integers() | texts, max_size=2)
    return Record(draw(texts), images, tuple(messages), draw(name), draw(name), draw(meta))


def with_bytes(record: Record) -> Record:
    """Pictures that became files as bytes again."""

    def content(source: object) -> bytes:
        return source if isinstance(source, bytes) else Path(str(source)).read_bytes()

    messages = tuple(
        Message(
            m.role,
            tuple(
                ImagePart(content(p.source)) if isinstance(p, ImagePart) else p for p in m.content
            ),
        )
        for m in record.messages
    )
    images = tuple(map(content, record.images))
    return Record(record.id, images, messages, record.source, record.license, record.meta)


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_round_trip_loses_nothing(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    write, file = WRITERS[name]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(records(), min_size=1, max_size=3))
    def check(given: list[Record]) -> None:
        folder = tmp_path_factory.mktemp("out")
        assert write(given, folder) == len(given)
        assert [with_bytes(each) for each in read(folder / file)] == given
        if name != "llava":
            index = RecordFiles([folder / file])
            assert [with_bytes(index[i]) for i in range(len(index))] == given

    check()


@pytest.fixture
def files(tmp_path: Path) -> list[Record]:
    found = []
    for i in range(70):
        path = tmp_path / f"{i}.png"
        path.write_bytes(PNG[i % 2])
        turns = (user(f"What is {i}?", str(path)), assistant("A scene."))
        found.append(Record(str(i), (str(path),), turns, license="CC0"))
    return found


def test_jsonl_is_what_everything_else_reads(files: list[Record], tmp_path: Path) -> None:
    write_jsonl(files, tmp_path / "out")
    assert list(read_records(tmp_path / "out" / "records.jsonl")) == files
    assert not list((tmp_path / "out").glob("*.part"))


def test_parquet_is_what_datasets_reads(
    files: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_recipes.formats.write, "_ROWS", 32)
    write_parquet(files, tmp_path)
    path = tmp_path / "records.parquet"
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert rows.features["images"] == datasets.List(datasets.Image())
    (picture,) = rows[1]["images"]
    assert picture.tobytes() == draw_image((8, 6), 1).tobytes()
    assert json.loads(rows[1]["messages"])[1] == {"role": "assistant", "content": "A scene."}
    assert pq.ParquetFile(path).num_row_groups == 3
    back = RecordFiles([path, path])
    assert len(back) == 140
    assert [back[i].id for i in (0, 31, 32, 69, 70, 139, -1)] == [
        "0",
        "31",
        "32",
        "69",
        "0",
        "69",
        "69",
    ]
    assert back[33].images == (PNG[1],)
    with pytest.raises(IndexError):
        back[140]


def test_row_groups_of_large_pictures_are_small(
    files: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_recipes.formats.write, "_BYTES", 4 * min(map(len, PNG)))
    assert write_parquet(files, tmp_path) == 70
    file = pq.ParquetFile(tmp_path / "records.parquet").metadata
    sizes = [file.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert set(sizes[:-1]) == {4} and sum(sizes) == 70
    back = RecordFiles([tmp_path / "records.parquet"])
    assert [back[i].id for i in range(70)] == [str(i) for i in range(70)]


def test_nested_messages_of_parquet(files: list[Record], tmp_path: Path) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    reply = [{"type": "text", "text": "A cat."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    row = {"id": "x", "images": [{"bytes": None, "path": "0.png"}], "messages": messages}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "x.parquet")
    expected = user("What?", str(tmp_path / "0.png"))
    assert RecordFiles([tmp_path / "x.parquet"])[0].messages[0] == expected
    assert next(read(tmp_path / "x.parquet")).messages[0] == expected


def test_llava_refuses_what_it_would_misread(tmp_path: Path) -> None:
    record = Record("1", (PNG[0],), (user("Is <image> a tag?", PNG[0]), assistant("Yes.")))
    with pytest.raises(RecordError, match="'1': the text has <image> in it"):
        write_llava([record], tmp_path)
    assert not (tmp_path / "llava.json").exists()


def test_llava_entries_are_llavas(files: list[Record], tmp_path: Path) -> None:
    write_llava(files[:1], tmp_path)
    turns = [
        {"from": "human", "value": "<image>\nWhat is 0?"},
        {"from": "gpt", "value": "A scene."},
    ]
    entry = {"id": "0", "image": "0.png", "conversations": turns, "license": "CC0"}
    assert json.loads((tmp_path / "llava.json").read_text()) == [entry]


def test_a_picture_that_is_none(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.png")
    record = Record("1", (absent,), (user("What?", absent), assistant("A cat.")))
    with pytest.raises(RecordError, match=r"record '1'.*does not exist"):
        write_parquet([record], tmp_path)
    broken = Record("2", (b"no picture",), (user("What?", b"no picture"), assistant("A cat.")))
    with pytest.raises(RecordError, match="record '2'"):
        write_jsonl([broken], tmp_path)


def vlm(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_the_command(files: list[Record], tmp_path: Path) -> None:
    one = tmp_path / "one"
    write_llava(files, one)
    there = ("--images", tmp_path, "--format", "parquet")
    done = vlm("data", "convert", one / "llava.json", "--out", one / "p", *there)
    assert done[0] == 0 and "70 records" in done[1]
    back = one / "p" / "records.parquet"
    assert vlm("data", "convert", back, "--out", one / "j", "--from", "record")[0] == 0
    found = list(read(one / "j"))
    assert list(map(with_bytes, found)) == list(map(with_bytes, files))


def test_the_command_and_faults(tmp_path: Path) -> None:
    good = '{"id": "a", "messages": [{"role": "user", "content": "Hi"}]}'
    (tmp_path / "x.jsonl").write_text(f"{good}\n{{\n{good}\n")
    with pytest.raises(RecordError, match="line 2: not JSON"):
        vlm("data", "convert", tmp_path / "x.jsonl", "--out", tmp_path / "out")
    code, text = vlm(
        "data", "convert", tmp_path / "x.jsonl", "--out", tmp_path / "out", "--skip-faults"
    )
    assert code == 1 and "2 records, 1 faults" in text
    (fault,) = (tmp_path / "out" / "faults.jsonl").read_text().splitlines()
    assert json.loads(fault)["line"] == 2


def test_the_formats_are_listed() -> None:
    code, text = vlm("data", "list-formats")
    assert code == 0
    assert {line.partition(":")[0] for line in text.splitlines()} >= {"llava", "coco", "cauldron"}
