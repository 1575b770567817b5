"""Records read where they lie: by position, line by line."""

import json
import pickle
from pathlib import Path

import pytest

from train.dataset import RecordDataset
from vlm.errors import RecordError
from vlm.messages import read_records


def line(name: str, text: str = "hi") -> str:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return json.dumps({"id": name, "messages": messages}, ensure_ascii=False)


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_records_stand_in_the_order_of_files_and_lines(tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", line("a"), line("b", "zwölf Äpfel 🍎"), line("c"))
    second = write(tmp_path / "second.jsonl", line("d"))  # no newline at the end
    data = RecordDataset([first, str(second)])
    expected = [*read_records(first), *read_records(second)]
    assert len(data) == 4
    assert [data[i] for i in range(4)] == expected
    assert [data[i] for i in (3, 1, 2, 0)] == [expected[i] for i in (3, 1, 2, 0)]
    with pytest.raises(IndexError):
        data[4]


def test_blank_lines_are_no_records(tmp_path: Path) -> None:
    data = RecordDataset([write(tmp_path / "a.jsonl", "", line("a"), "  \t", "", line("b"), "")])
    assert [data[i].id for i in range(len(data))] == ["a", "b"]


def test_pictures_are_found_beside_their_own_file(tmp_path: Path) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    record = {"id": "a", "images": ["x.png"], "messages": [{"role": "user", "content": content}]}
    paths = [write(tmp_path / name / "r.jsonl", json.dumps(record)) for name in ("one", "two")]
    data = RecordDataset(paths)
    assert [data[i].images for i in range(2)] == [
        (str(tmp_path / name / "x.png"),) for name in ("one", "two")
    ]


def test_a_loader_worker_gets_it_whole(tmp_path: Path) -> None:
    data = RecordDataset([write(tmp_path / "a.jsonl", line("a"), line("b"))])
    copy = pickle.loads(pickle.dumps(data))
    assert [copy[i] for i in range(2)] == [data[i] for i in range(2)]


def test_only_positions_are_kept_in_memory(tmp_path: Path) -> None:
    short = RecordDataset([write(tmp_path / "a.jsonl", *[line("a")] * 50)])
    long = RecordDataset([write(tmp_path / "b.jsonl", *[line("a", "x" * 5000)] * 50)])
    assert abs(len(pickle.dumps(long)) - len(pickle.dumps(short))) < 64


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    full = write(tmp_path / "full.jsonl", line("a"))
    with pytest.raises(RecordError, match=r"absent\.jsonl.*vlm data build"):
        RecordDataset([full, tmp_path / "absent.jsonl"])
    empty = write(tmp_path / "empty.jsonl", "", "  ")
    with pytest.raises(RecordError, match=r"empty\.jsonl holds no record"):
        RecordDataset([full, empty])


def test_a_broken_record_is_named_by_its_position(tmp_path: Path) -> None:
    good = line("a")
    path = write(tmp_path / "a.jsonl", good, '{"id": "b", "mesages": []}')
    with pytest.raises(RecordError, match=rf"a\.jsonl, byte {len(good) + 1}: .*'messages'"):
        RecordDataset([path])[1]
    path.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(RecordError, match=r"a\.jsonl, byte 0: not UTF-8"):
        RecordDataset([path])[0]


def test_the_fingerprint_follows_names_contents_and_order(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", line("a")), write(tmp_path / "b.jsonl", line("b"))
    before = RecordDataset([a, b]).fingerprint()
    assert RecordDataset([a, b]).fingerprint() == before
    assert RecordDataset([b, a]).fingerprint() != before
    assert RecordDataset([a]).fingerprint() != before
    renamed = write(tmp_path / "c.jsonl", line("a"))
    assert RecordDataset([renamed, b]).fingerprint() != before
    elsewhere = write(tmp_path / "elsewhere" / "a.jsonl", line("a"))
    assert RecordDataset([elsewhere, b]).fingerprint() == before
    write(b, line("c"))
    assert RecordDataset([a, b]).fingerprint() != before
