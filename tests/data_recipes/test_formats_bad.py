"""Bad data: a typed error with its place, or a fault and the rest of the rows."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from data_recipes.formats import Fault, read
from vlm.errors import ConfigError, ImageError, RecordError
from vlm.testing import draw_image


def png_bytes() -> bytes:
    file = io.BytesIO()
    draw_image((4, 3)).save(file, "PNG")
    return file.getvalue()


ENTRY: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
}
SEEN = {
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
    ]
}


def lines(path: Path, *rows: Any) -> Path:
    texts = [each if isinstance(each, str) else json.dumps(each) for each in rows]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def faults(path: Any, **options: Any) -> tuple[list[str], list[Fault]]:
    """Ids of what could be read, and the faults; without a listener the first one raises."""
    found: list[Fault] = []
    ids = [record.id for record in read(path, faults=found.append, **options)]
    if found:
        with pytest.raises(RecordError) as error:
            list(read(path, **options))
        assert str(error.value) == str(found[0])
    return ids, found


def test_a_broken_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", ENTRY, '{"conversations": [', "", "[1]", ENTRY)
    ids, found = faults(path)
    assert ids == ["x-0", "x-2"]  # the row between is no object
    assert [(f.line, f.code) for f in found] == [(2, "malformed"), (4, "malformed")]
    assert found[0].where == f"{path}, line 2"


def test_an_unknown_shape_tells_line_and_keys(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", ENTRY, {"prompt": "a", "completion": "b"})
    _, (fault,) = faults(path)
    assert fault.code == "unknown_shape" and fault.line == 2
    assert "keys prompt, completion" in fault.reason


def test_a_format_that_is_named_must_fit(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", ENTRY)
    assert len(list(read(path, format="llava"))) == 1
    _, (fault,) = faults(path, format="trl")
    assert "not of the format trl" in fault.reason
    with pytest.raises(ConfigError, match="did you mean 'llava'"):
        read(path, format="lava")


def test_an_object_that_is_not_cocos(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"data": [ENTRY], "version": 1}, indent=1))
    with pytest.raises(RecordError, match="keys data, version"):
        list(read(path))


@pytest.mark.parametrize("cut", [1, 20, 90])
def test_a_cut_list_gives_what_is_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([ENTRY] * 3, indent=1)[:-cut])
    ids, (fault,) = faults(path)
    assert ids == ["x-0", "x-1", "x-2"][: len(ids)] and len(ids) >= 2
    assert fault.code == "truncated" and "after entry" in fault.where


def test_a_broken_list_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(f"[\n{json.dumps(ENTRY)},\n{{oops}},\n{json.dumps(ENTRY)}]")
    ids, (fault,) = faults(path)
    assert ids == ["x-0"]
    assert (fault.code, fault.line) == ("malformed", 3)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_utf_16_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps([ENTRY]), encoding="utf-16")
    with pytest.raises(RecordError, match=r"ff fe at byte 0 say UTF-16.*save it as UTF-8"):
        list(read(path))


def test_latin_1_names_the_byte(tmp_path: Path) -> None:
    good = json.dumps(ENTRY).encode()
    bad = json.dumps(ENTRY).replace("Ho", "Zwölf").encode("latin-1")
    (tmp_path / "x.jsonl").write_bytes(good + b"\n" + bad + b"\n" + good)
    ids, (fault,) = faults(tmp_path / "x.jsonl")
    assert len(ids) == 2
    assert (fault.code, fault.line) == ("encoding", 2)
    assert f"byte {bad.index(0xF6) + 1} of the line is 0xf6" in fault.reason
    (tmp_path / "x.json").write_bytes(b"[" + good + b",\n" + bad + b"]")
    ids, (fault,) = faults(tmp_path / "x.json")
    assert fault.code == "encoding" and "0xf6" in fault.reason


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "coco.json"])
def test_half_of_a_surrogate_pair_is_no_question_mark(tmp_path: Path, name: str) -> None:
    rows: Any = [
        ENTRY,
        {"conversations": [ENTRY["conversations"][0], {**ENTRY["conversations"][1]}]},
    ]
    rows[1]["conversations"][1]["value"] = "Ho \ud83d!"
    text = json.dumps(rows) if name == "x.json" else "\n".join(map(json.dumps, rows))
    if name == "coco.json":
        images = [{"id": 9, "file_name": "a.jpg"}]
        said = [{"id": i, "image_id": 9, "caption": c} for i, c in enumerate(["Hi", "Ho \ud83d!"])]
        text = json.dumps({"images": images, "annotations": said})
    (tmp_path / name).write_text(text)
    ids, (fault,) = faults(tmp_path / name)
    assert len(ids) == 1
    assert fault.code == "malformed" and "lone surrogate" in fault.reason


def test_cut_archives_are_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    rows = "\n".join(json.dumps({**ENTRY, "id": os.urandom(8).hex()}) for _ in range(5000))
    path.write_bytes(gzip.compress(rows.encode())[:-3000])
    ids, (fault,) = faults(path)
    assert fault.code == "truncated" and 0 < len(ids) < 5000

    files = [(f"{i}{suffix}", data) for i in range(3) for suffix, data in SAMPLE]
    whole = tar(tmp_path / "whole.tar", files).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for at in (end - 700, 512 * 8 + 100, 512 * 8, len(SAMPLE) * 2 * 512):
        (tmp_path / "cut.tar").write_bytes(whole[:at])
        ids, (fault,) = faults(tmp_path / "cut.tar")
        assert fault.code == "truncated", at
        assert len(ids) < 3
    damaged = bytearray(whole)
    damaged[2048:2060] = b"x" * 12
    (tmp_path / "bad.tar").write_bytes(damaged)
    assert faults(tmp_path / "bad.tar")[1][0].code == "truncated"

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files:
            archive.writestr(name, data)
    (tmp_path / "cut.zip").write_bytes((tmp_path / "x.zip").read_bytes()[:-30])
    assert faults(tmp_path / "cut.zip")[1][0].code == "truncated"


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(100))
    ids, (fault,) = faults(tmp_path / "x.parquet")
    assert (ids, fault.code) == ([], "truncated")
    assert fault.where.endswith("x.parquet") and "no whole Parquet file" in fault.reason


SAMPLE = [(".png", png_bytes()), (".txt", b"A cat.")]


def tar(
    path: Path, files: list[tuple[str, bytes]], extra: list[tarfile.TarInfo] | None = None
) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra or []:
            archive.addfile(info)
    return path


def test_members_that_leave_are_refused(tmp_path: Path) -> None:
    link, device = tarfile.TarInfo("1.jpg"), tarfile.TarInfo("2.jpg")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    files = [("../a.png", SAMPLE[0][1]), ("/b.txt", b"x")]
    files += [(f"0{suffix}", data) for suffix, data in SAMPLE]
    ids, found = faults(tar(tmp_path / "x.tar", files, [link, device]))
    assert ids == ["0"]
    assert [f.code for f in found] == ["path_escape"] * 2 + ["unsafe_member"] * 2
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files:
            archive.writestr(name, data)
    ids, found = faults(tmp_path / "x.zip")
    assert ids == ["0"] and {f.code for f in found} == {"path_escape"}


def test_a_sample_without_or_with_two_pictures(tmp_path: Path) -> None:
    files = [("a.txt", b"x"), ("b.png", SAMPLE[0][1]), ("b.jpg", SAMPLE[0][1]), ("b.txt", b"x")]
    ids, found = faults(tar(tmp_path / "x.tar", files))
    assert ids == []
    assert [f.reason.partition(" ")[0] for f in found] == ["0", "2"]


@pytest.mark.parametrize(
    "name", ["../secret.png", "sub/../../secret.png", "{absolute}", "link.png", "linked/secret.png"]
)
def test_paths_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(png_bytes())
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "linked").symlink_to(tmp_path)
    name = name.replace("{absolute}", str(tmp_path / "secret.png"))
    (tmp_path / "data-not").mkdir()  # a name that begins alike is no part of the folder
    path = lines(data / "x.jsonl", {**SEEN, "image": name}, ENTRY)
    ids, (fault,) = faults(path)
    assert ids == ["x-1"]
    assert (fault.code, fault.line) == ("path_escape", 1)
    (allowed, _) = read(path, images=tmp_path)
    assert allowed.images == (str(tmp_path / "secret.png"),)


def test_a_neighbour_whose_name_begins_alike(tmp_path: Path) -> None:
    for name in ("data", "data-other"):
        (tmp_path / name).mkdir()
    path = lines(tmp_path / "data" / "x.jsonl", {**SEEN, "image": "../data-other/a.png"})
    assert faults(path)[1][0].code == "path_escape"


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:1/a.png", "HTTPS://x.org/a", "s3://b/k", "ftp://x/y"]
)
def test_urls_are_not_fetched(tmp_path: Path, name: str) -> None:
    _, (fault,) = faults(lines(tmp_path / "x.jsonl", {**SEEN, "image": name}))
    assert fault.code == "remote_url"
    part = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": "x"}]}
    _, (fault,) = faults(lines(tmp_path / "y.jsonl", row))
    assert fault.code == "remote_url"


def test_urls_are_fetched_where_that_is_allowed(tmp_path: Path) -> None:
    asked: list[str] = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        if "private" in url:
            raise ImageError("no public address", "private_address")
        return png_bytes()

    urls = ["https://x.org/a.png", "http://private/a.png", "a.png"]
    path = lines(tmp_path / "x.jsonl", *({**SEEN, "image": url} for url in urls))
    found: list[Fault] = []
    first, second = read(path, faults=found.append, fetch=fetch)
    assert first.images == (png_bytes(),) and second.images == (str(tmp_path / "a.png"),)
    assert asked == urls[:2]
    assert [(f.code, f.line, f.reason) for f in found] == [("remote_url", 2, "no public address")]


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    _, (fault,) = faults(lines(tmp_path / "x.jsonl", {**SEEN, "image": "file:///etc/passwd"}))
    assert fault.code == "path_escape"


def test_a_linked_sidecar_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").write_bytes(png_bytes())
    (data / "b.png").write_bytes(png_bytes())
    (data / "a.txt").symlink_to(tmp_path / "secret")
    ids, found = faults(data)
    assert ids == []
    assert [f.code for f in found] == ["path_escape", "malformed"]


@pytest.mark.parametrize(
    ("row", "code", "reason"),
    [
        ({**SEEN}, None, ""),
        ({**SEEN, "image": ["a.png", "b.png"]}, "image_mismatch", "2 pictures for 1 <image>"),
        ({**ENTRY, "image": "a.png"}, "image_mismatch", "1 pictures for 0 <image>"),
        ({**SEEN, "image": {"x": 1}}, "malformed", "a picture is"),
        ({**SEEN, "image": "a\0.png"}, "malformed", "no possible file name"),
        ({**SEEN, "image": "data:image/png;base64,@@@"}, "malformed", "no valid base64"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "malformed", "unknown role 'bing'"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "malformed", "user first|no user"),
        ({"conversations": [{"from": "human", "text": "x"}]}, "malformed", "no text 'value'"),
        ({"conversations": ["x"]}, "malformed", "turn 1 is a str"),
        (
            {
                "images": ["a.png"],
                "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            },
            "image_mismatch",
            "1 images but 0 image parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "malformed",
            "unknown part",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
            "malformed",
            "tool_calls",
        ),
        ({"image": "a.png", "caption": " "}, "malformed", "the caption is ' '"),
        (
            {"id": "1", "images": ["a.png"], "mesages": []},
            "unknown_shape",
            "keys id, images, mesages",
        ),
        ({"texts": [{"user": "a", "assistant": None}], "images": []}, "malformed", "not text"),
    ],
)
def test_rows_that_break_a_rule(
    tmp_path: Path, row: dict[str, Any], code: str | None, reason: str
) -> None:
    _, found = faults(lines(tmp_path / "x.jsonl", row))
    assert [f.code for f in found] == ([code] if code else [])
    if code:
        assert any(each in found[0].reason for each in reason.split("|"))


def test_tables_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("picture,words\na.png,A cat.\n")
    _, (fault,) = faults(path)
    assert "keys picture, words" in fault.reason
    _, (fault,) = faults(path, format="captions")
    assert "picture, words" in fault.reason
    path.write_text("image,caption\na.png,A cat, red.\nb.png\nc.png,A dog.\n")
    ids, found = faults(path)
    assert [f.line for f in found] == [2, 3] and len(ids) == 1


def test_what_is_not_there(tmp_path: Path) -> None:
    for name in ("x.json", "{0..2}.tar", "*.tar"):
        with pytest.raises(RecordError, match="no data file"):
            list(read(tmp_path / name))
    with pytest.raises(RecordError, match="no data file and no pictures"):
        list(read(tmp_path))
    (tmp_path / "x.doc").touch()
    with pytest.raises(RecordError, match="ends in none of"):
        list(read(tmp_path / "x.doc"))


def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecordError, match=r"hf://nobody/nothing.*save_to_disk"):
        list(read("hf://nobody/nothing"))
