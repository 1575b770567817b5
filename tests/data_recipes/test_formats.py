"""Every publisher's layout, written by hand, gives the same records."""

import base64
import csv
import doctest
import gzip
import importlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_recipes.formats import FORMATS, read
from data_recipes.formats.row import CAPTION_QUESTION
from vlm.messages import ImagePart, Message, Record, TextPart, assistant, user


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (colour, 7, 7)).save(file, "PNG")
    return file.getvalue()


DATA = [png(1), png(2)]
NAMES = ["a.png", "b.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in zip(NAMES, DATA, strict=True):
        (tmp_path / name).write_bytes(data)
    return tmp_path


def content(source: str | bytes) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def plain(records: Any) -> list[Any]:
    """Turns, with a picture's bytes where it stands: what must not depend on the format."""
    found = []
    for record in records:
        turns = []
        for message in record.messages:
            parts = [
                part.text if isinstance(part, TextPart) else content(part.source)
                for part in message.content
            ]
            turns.append((message.role, parts))
        assert [content(image) for image in record.images] == [
            part for _, parts in turns for part in parts if isinstance(part, bytes)
        ]
        found.append(turns)
    return found


# Two turns about a picture, a text-only entry, two pictures in one question.
DIALOGUES = [
    [
        ("user", [DATA[0], "What is it?"]),
        ("assistant", ["A cat."]),
        ("user", ["And its colour?"]),
        ("assistant", ["Red."]),
    ],
    [("user", ["Say hi."]), ("assistant", ["Hi."])],
    [("user", [DATA[0], DATA[1], "Which is larger?"]), ("assistant", ["The first."])],
]
CAPTIONS = [
    [("user", [data, CAPTION_QUESTION]), ("assistant", [text])]
    for data, text in zip(DATA, ["A cat.", "Zwölf Äpfel, rot"], strict=True)
]


def dump(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def turns(*texts: str, keys: tuple[str, str] = ("from", "value"), user: str = "human") -> list[Any]:
    roles = (user, "gpt" if user == "human" else "assistant")
    return [{keys[0]: roles[i % 2], keys[1]: text} for i, text in enumerate(texts)]


LLAVA = [
    {
        "id": "000000033471",
        "image": "a.png",
        "conversations": turns("<image>\nWhat is it?", "A cat.", "And its colour?", "Red."),
    },
    {"id": 7, "model": "", "conversations": turns("Say hi.", "Hi.")},
    {
        "image": NAMES,
        "conversations": turns("<image>\n<image>\nWhich is larger?", "The first."),
    },
]
TRL = [
    {
        "images": ["a.png"],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            {"role": "user", "content": "And its colour?"},
            {"role": "assistant", "content": "Red."},
        ],
    },
    {"images": [], "messages": turns("Say hi.", "Hi.", keys=("role", "content"), user="user")},
    {
        "images": NAMES,
        "messages": turns("Which is larger?", "The first.", keys=("role", "content"), user="user"),
    },
]


def image_url(data: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def openai(folder: Path) -> list[Any]:
    one = [image_url(DATA[0]), {"type": "text", "text": "What is it?"}]
    file = {"type": "image_url", "image_url": {"url": "b.png"}}
    both = [image_url(DATA[0]), file, {"type": "text", "text": "Which is larger?"}]
    return [
        {"messages": [{"role": "user", "content": one}, *TRL[0]["messages"][1:]]},
        {"messages": TRL[1]["messages"]},
        {"messages": [{"role": "user", "content": both}, TRL[2]["messages"][1]]},
    ]


def openai_lines(folder: Path) -> Path:
    return lines(folder / "tune.jsonl", openai(folder))


def batch_lines(folder: Path) -> Path:
    bodies = [{"model": "m", **each} for each in openai(folder)]
    url = {"method": "POST", "url": "/v1/chat/completions"}
    rows = [{"custom_id": f"request-{i}", **url, "body": body} for i, body in enumerate(bodies)]
    return lines(folder / "batch.jsonl", rows)


def sharegpt(folder: Path) -> Path:
    rows: list[Any] = [
        {"conversations": each["conversations"], "images": images}
        for each, images in zip(LLAVA, [["a.png"], [], NAMES], strict=True)
    ]
    return dump(folder / "sharegpt.json", rows)


def sharegpt_roles(folder: Path) -> Path:
    rows = []
    for each, images in zip(LLAVA, [["a.png"], [], NAMES], strict=True):
        texts = [turn["value"] for turn in each["conversations"]]
        conversation = turns(*texts, keys=("role", "content"), user="user")
        rows.append({"conversations": conversation, "images": images})
    return lines(folder / "roles.jsonl", rows)


def cauldron_rows() -> list[Any]:
    images = [[0], [], [0, 1]]
    pairs = [
        [("What is it?", "A cat."), ("And its colour?", "Red.")],
        [("Say hi.", "Hi.")],
        [("Which is larger?", "The first.")],
    ]
    return [
        {
            "images": [{"bytes": DATA[i], "path": None} for i in some],
            "texts": [{"user": q, "assistant": a, "source": "VQAv2"} for q, a in each],
        }
        for some, each in zip(images, pairs, strict=True)
    ]


def cauldron(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(cauldron_rows()), folder / "train-00000-of-00001.parquet")
    return folder / "train-00000-of-00001.parquet"


def hugging_face(folder: Path) -> Path:
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({k: datasets.Value("string") for k in ("user", "assistant")}),
        }
    )
    rows = [
        {**each, "texts": [{k: t[k] for k in ("user", "assistant")} for t in each["texts"]]}
        for each in cauldron_rows()
    ]
    saved = folder / "saved"
    datasets.Dataset.from_list(rows, features=features).save_to_disk(saved)
    return saved


def streaming(folder: Path) -> Any:
    return datasets.load_from_disk(hugging_face(folder)).to_iterable_dataset()


def gzipped(folder: Path) -> Path:
    path = folder / "mix.jsonl.gz"
    path.write_bytes(gzip.compress(lines(folder / "plain.jsonl", LLAVA).read_bytes()))
    return path


def own(folder: Path) -> Path:
    rows = [{"id": str(i), **each} for i, each in enumerate(TRL[:2])]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is larger?"}]
    last = [{"role": "user", "content": parts}, TRL[2]["messages"][1]]
    return lines(folder / "own.jsonl", [*rows, {"id": "2", "images": NAMES, "messages": last}])


@pytest.mark.parametrize(
    "make",
    [
        lambda f: dump(f / "llava_v1_5_mix665k.json", LLAVA),
        lambda f: lines(f / "llava.jsonl", LLAVA),
        gzipped,
        own,
        openai_lines,
        batch_lines,
        lambda f: dump(f / "trl.json", TRL),
        sharegpt,
        sharegpt_roles,
        cauldron,
        hugging_face,
        streaming,
        lambda f: datasets.load_from_disk(hugging_face(f)),
    ],
    ids=[
        *("llava", "llava-lines", "gzip", "own", "openai", "batch", "trl", "sharegpt", "roles"),
        *("parquet", "saved", "streaming", "map"),
    ],
)
def test_dialogues(folder: Path, make: Callable[[Path], Any]) -> None:
    records = list(read(make(folder)))
    assert plain(records) == DIALOGUES
    assert len({record.id for record in records}) == 3


def table(folder: Path, name: str, delimiter: str) -> Path:
    with (folder / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        rows = zip(NAMES, [c[1][1][0] for c in CAPTIONS], strict=True)
        writer.writerows([("Image", "Caption"), *rows])
    return folder / name


def coco(folder: Path) -> Path:
    images = [
        {"id": 9, "width": 3, "height": 2, "file_name": "a.png", "license": 1},
        {"id": 4, "width": 3, "height": 2, "file_name": "b.png", "license": 1},
    ]
    notes = [
        {"image_id": at, "id": 48 + at, "caption": c[1][1][0]}
        for at, c in zip((9, 4), CAPTIONS, strict=True)
    ]
    value = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": notes}
    return dump(folder / "captions_train2017.json", value)


def members() -> list[tuple[str, bytes]]:
    found = []
    for i, (data, caption) in enumerate(zip(DATA, CAPTIONS, strict=True)):
        key = f"{i:09}"
        text = caption[1][1][0]
        extra = {"caption": text, "url": "http://example.org/x", "status": "success", "key": key}
        found += [
            (f"{key}.jpg", data),
            (f"{key}.json", json.dumps(extra).encode()),
            (f"{key}.txt", text.encode()),
        ]
    return found


def tar(path: Path, files: list[tuple[str, bytes]], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path) -> str:
    tar(folder / "00000.tar", members()[:3])
    tar(folder / "00001.tar", members()[3:])
    return str(folder / "{00000..00001}.tar")


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "0.zip", "w") as archive:
        for name, data in members():
            archive.writestr(name, data)
    return folder / "0.zip"


def sidecars(folder: Path) -> Path:
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (folder / name).with_suffix(".txt").write_text(caption[1][1][0] + "\n", encoding="utf-8")
    return folder


def columns(folder: Path) -> Path:
    rows = [
        {"image": {"bytes": data, "path": "x.png"}, "text": caption[1][1][0]}
        for data, caption in zip(DATA, CAPTIONS, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "0.parquet")
    return folder / "0.parquet"


def blip(folder: Path) -> Path:
    """LLaVA-Pretrain's layout: the placeholder first or last."""
    rows = []
    for i, (name, caption) in enumerate(zip(NAMES, CAPTIONS, strict=True)):
        question = [f"{CAPTION_QUESTION}\n<image>", f"<image>\n{CAPTION_QUESTION}"][i]
        rows.append(
            {
                "id": f"00453945{i}",
                "image": name,
                "conversations": turns(question, caption[1][1][0]),
            }
        )
    return dump(folder / "blip_laion_cc_sbu_558k.json", rows)


@pytest.mark.parametrize(
    "make",
    [
        lambda f: table(f, "x.csv", ","),
        lambda f: table(f, "x.tsv", "\t"),
        lambda f: lines(
            f / "metadata.jsonl",
            [{"file_name": n, "text": c[1][1][0]} for n, c in zip(NAMES, CAPTIONS, strict=True)],
        ),
        coco,
        lambda f: tar(f / "0.tar", members()),
        lambda f: tar(f / "0.tar.gz", members(), "w:gz"),
        shards,
        zipped,
        sidecars,
        columns,
    ],
    ids=["csv", "tsv", "jsonl", "coco", "tar", "tar.gz", "braces", "zip", "folder", "parquet"],
)
def test_captions(folder: Path, make: Callable[[Path], Any]) -> None:
    assert plain(read(make(folder))) == CAPTIONS


def test_the_placeholder_at_the_end_and_in_the_middle(folder: Path) -> None:
    first, second = plain(read(blip(folder)))
    assert first == [("user", [CAPTION_QUESTION, DATA[0]]), CAPTIONS[0][1]]
    assert second == CAPTIONS[1]
    row = {"image": "a.png", "conversations": turns("Left of <image> is\n\n<image>?", "A dog.")}
    row["image"] = NAMES
    (found,) = plain(read(lines(folder / "x.jsonl", [row])))
    assert found[0] == ("user", ["Left of ", DATA[0], " is\n", DATA[1], "?"])


def test_a_class_without_a_text(folder: Path) -> None:
    path = tar(folder / "0.tar", [("n/1.png", DATA[0]), ("n/1.cls", b"42")])
    (record,) = read(path)
    assert record.id == "n/1"
    assert record.messages[1] == assistant("42")


def test_system_ids_and_what_else_a_row_says(folder: Path) -> None:
    entries = [
        {"system": "Be brief.", "conversations": turns("Hi", "Ho"), "source": "mine", "n": 3},
        {"conversations": [{"from": "system", "value": "Be."}, *turns("Hi", "Ho")], "id": 12},
    ]
    first, second = read(dump(folder / "x.json", entries))
    assert first == Record(
        "x-0",
        messages=(Message("system", (TextPart("Be brief."),)), user("Hi"), assistant("Ho")),
        source="mine",
        meta={"n": 3},
    )
    assert second.id == "12"
    assert second.messages[0].text == "Be."


@pytest.mark.parametrize("write", [dump, lambda path, rows: lines(path, rows)])
def test_numbers_are_kept(folder: Path, write: Callable[[Path, Any], Path]) -> None:
    numbers = {"big": 2**70, "score": 0.25, "tiny": -1e-9, "list": [1, 2.5]}
    entry = {"conversations": turns("Hi", "Ho"), "id": 2**64, "meta": numbers}
    (record,) = read(write(folder / "x.json", [entry]))
    assert record.id == str(2**64)
    assert json.dumps(record.meta) == json.dumps(numbers)


def test_a_placeholder_without_a_picture_is_text(folder: Path) -> None:
    (record,) = read(dump(folder / "x.json", [{"conversations": turns("A tag: <image>", "Yes")}]))
    assert record.messages[0] == user("A tag: <image>")


def test_pictures_of_another_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = tmp_path_factory.mktemp("annotations")
    path = dump(data / "x.json", LLAVA)
    assert plain(read(path, images=folder)) == DIALOGUES


def test_a_split_is_chosen(folder: Path) -> None:
    saved = folder / "both"
    rows = datasets.Dataset.from_list([{"image": "a.png", "text": "A cat."}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(saved)
    with pytest.raises(ValueError, match="splits train, test; choose by --split"):
        list(read(saved))
    (record,) = read(saved, split="test", images=folder)
    assert content(record.images[0]) == DATA[0]


def test_parts_are_of_the_same_objects(folder: Path) -> None:
    (record, *_) = read(dump(folder / "x.json", LLAVA))
    (part, _) = record.messages[0].content
    assert isinstance(part, ImagePart) and part.source == record.images[0]


def test_formats_are_described() -> None:
    assert all(name == each.name and each.about for name, each in FORMATS.items())


@pytest.mark.parametrize("module", ["captions", "row", "read"])
def test_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"data_recipes.formats.{module}"))
    assert result.attempted and not result.failed
