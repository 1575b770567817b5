"""Recipes on small files in each publisher's layout, and the downloader on loopback."""

import hashlib
import io
import json
import pickle
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_recipes.build import Options, build
from data_recipes.download import fetch
from data_recipes.recipe import Source, region
from data_recipes.recipes import RECIPES, recipe
from vlm.errors import ConfigError, RecordError
from vlm.messages import read_records
from vlm.testing import draw_image

SHORT = "\nAnswer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."
BODY = bytes(range(256)) * 40


def zipped(**members: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def dump(raw: Any) -> bytes:
    return json.dumps(raw).encode()


def tarred(mode: str, **members: bytes) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def png(side: int = 3) -> bytes:
    data = io.BytesIO()
    draw_image((4, side)).save(data, "PNG")
    return data.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """As the hub has it: pictures as structs of bytes and path, texts as a list of structs."""
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), data)
    return data.getvalue()


LLAVA = {
    "id": "7",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "What?\n<image>"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Big?"},
        {"from": "gpt", "value": "No."},
    ],
}
TURNS = [("What?", "A cat."), ("Big?", "No.")]
MIX = [
    LLAVA | {"image": "vg/VG_100K_2/a.jpg"},
    {
        "id": "t",
        "conversations": [{"from": "human", "value": "Hi <image>"}, LLAVA["conversations"][1]],
    },
]
ASKED = dump({"questions": [{"question_id": 5, "image_id": 9, "question": "Hue?"}]})
VOTES = [{"answer": "blue"}, {"answer": "red"}, {"answer": "red"}]
ANNOTATED = {"question_id": 5, "image_id": 9, "answers": VOTES, "multiple_choice_answer": "red"}
COCO14 = {"train2014.zip": zipped(**{"train2014/COCO_train2014_000000000009.jpg": b"P"})}
COCO17 = {"train2017.zip": zipped(**{"train2017/a.jpg": b"P"})}
TEXT = {"train_val_images.zip": zipped(**{"train_images/a.jpg": b"P"})}
COCO_JSON = dump(
    {
        "images": [{"id": 3, "file_name": "a.jpg"}],
        "annotations": [{"id": 4, "image_id": 3, "caption": "A cat. "}],
    }
)
OCR = {
    "a": {"split": 1, "questions": ["Hue?"], "answers": ["red"], "imageURL": ""},
    "b": {"split": 3, "questions": ["Hue?"], "answers": ["blue"], "imageURL": ""},
}
REFS = [
    {
        "split": split, "ref_id": i, "ann_id": i, "image_id": 9, "category_id": 1,
        "file_name": f"COCO_train2014_000000000009_{i}.jpg",
        "sentences": [{"sent": sent, "raw": sent, "sent_id": 0, "tokens": []} for sent in said],
    }
    for i, split, said in [(1, "train", ["a cat", "the left one"]), (2, "train", ["a dog"]),
                           (3, "val", ["a bus"])]
]  # fmt: skip
INSTANCES = {
    "images": [
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 200, "height": 100}
    ],
    "annotations": [
        {"id": i, "image_id": 9, "bbox": [50.0 * i, 0.0, 50.0, 100.0]} for i in (1, 2, 3)
    ],
}
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}."
DESCRIBE = "Please provide a short description for this region: {}."
CAT, DOG = "[0.25, 0.25, 0.5, 0.75]", "[0.5, 0.25, 0.75, 0.75]"


def refcoco(name: str, split: str) -> dict[str, bytes]:
    """Python 2 wrote the pickles: protocol 2, and texts as its bytes."""
    members = {
        f"{name}/refs({split}).p": pickle.dumps(REFS, protocol=2),
        f"{name}/instances.json": dump(INSTANCES),
    }
    return {f"{name}.zip": zipped(**members), **COCO14}


REFERRED = [
    ("9", [(LOCATE.format("a cat"), CAT), (DESCRIBE.format(DOG), "a dog"),
           (LOCATE.format("the left one"), CAT)])
]  # fmt: skip
VG_FILES = {
    "image_data.json.zip": zipped(**{"image_data.json": dump(
        [{"image_id": 1, "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg",
          "width": 800, "height": 600, "coco_id": None, "flickr_id": None}]
    )}),
    "vg_images2.zip": zipped(**{"VG_100K_2/1.jpg": b"P"}),
}  # fmt: skip
HUB_TEXTS = [{"user": "What?", "assistant": "A cat.", "source": "VQA"},
             {"user": "Big?", "assistant": "No.", "source": "VQA"}]  # fmt: skip
HUB_ROW = {"images": [{"bytes": png(), "path": None}], "texts": HUB_TEXTS}
LAION = {"000000000.jpg": png(), "000000000.txt": b"A cat.",
         "000000000.json": dump({"key": "000000000", "url": "http://x/a.jpg"})}  # fmt: skip
ROWS = ("the-cauldron", "finevision", "laion-webdataset")
CASES: dict[str, tuple[dict[str, bytes], list[tuple[str, list[tuple[str, str]]]]]] = {
    "llava-pretrain": (
        {"blip_laion_cc_sbu_558k.json": dump([LLAVA]), "images.zip": zipped(**{"a.jpg": b"P"})},
        [("7", TURNS)],
    ),
    "llava-mix665k": (
        {
            "llava_v1_5_mix665k.json": dump(MIX),
            "vg_images2.zip": zipped(**{"VG_100K_2/a.jpg": b"P"}),
        },
        [("7-0", TURNS), ("t-1", [("Hi <image>", "A cat.")])],
    ),
    "llava-instruct-150k": (
        {"llava_instruct_150k.json": dump([LLAVA]), **COCO17},
        [("7-0", TURNS)],
    ),
    "coco-captions": (
        {
            "annotations_trainval2017.zip": zipped(
                **{"annotations/captions_train2017.json": COCO_JSON}
            ),
            **COCO17,
        },
        [("4", [(CAPTION, "A cat.")])],
    ),
    "vqav2": (
        {
            "v2_Questions_Train_mscoco.zip": zipped(
                **{"v2_OpenEnded_mscoco_train2014_questions.json": ASKED}
            ),
            "v2_Annotations_Train_mscoco.zip": zipped(
                **{"v2_mscoco_train2014_annotations.json": dump({"annotations": [ANNOTATED]})}
            ),
            **COCO14,
        },
        [("5", [("Hue?" + SHORT, "red")])],
    ),
    "okvqa": (
        {
            "OpenEnded_mscoco_train2014_questions.json.zip": zipped(
                **{"OpenEnded_mscoco_train2014_questions.json": ASKED}
            ),
            "mscoco_train2014_annotations.json.zip": zipped(
                **{"mscoco_train2014_annotations.json": dump({"annotations": [ANNOTATED]})}
            ),
            **COCO14,
        },
        [("5", [("Hue?" + SHORT, "red")])],
    ),
    "gqa": (
        {
            "questions1.2.zip": zipped(
                **{
                    "train_balanced_questions.json": dump(
                        {"02": {"question": "Hue?", "answer": "red", "imageId": "a"}}
                    )
                }
            ),
            "gqa_images.zip": zipped(**{"images/a.jpg": b"P"}),
        },
        [("02", [("Hue?" + SHORT, "red")])],
    ),
    "ocr-vqa": (
        {"dataset.json": dump(OCR), "ocr_vqa_images/a.jpg": b"P"},
        [("a", [("Hue?" + SHORT, "red")])],
    ),
    "textvqa": (
        {
            "TextVQA_0.5.1_train.json": dump(
                {"data": [{"question_id": 1, "image_id": "a", "question": "Hue?",
                           "answers": ["blue", "red", "red"]}]}
            ),
            **TEXT,
        },
        [("1", [("Hue?" + SHORT, "red")])],
    ),
    "textcaps": (
        {
            "TextCaps_0.1_train.json": dump(
                {"data": [{"caption_id": 1, "image_id": "a", "caption_str": "A sign."}]}
            ),
            **TEXT,
        },
        [("1", [(CAPTION, "A sign.")])],
    ),
    "aokvqa": (
        {
            "aokvqa_v1p0.tar.gz": tarred("w:gz", **{"./aokvqa_v1p0_train.json": dump(
                [{"split": "train", "image_id": 9, "question_id": "q", "question": "Awaits?",
                  "choices": ["train", "cab"], "correct_choice_idx": 1,
                  "direct_answers": ["cab"], "rationales": []}]
            )}),
            "train2017.zip": zipped(**{"train2017/000000000009.jpg": b"P"}),
        },
        [("q", [("Awaits?\nA. train\nB. cab\nAnswer with the option's letter from the given "
                 "choices directly.", "B")])],
    ),
    "visual-genome-qa": (
        {
            "question_answers.json.zip": zipped(**{"question_answers.json": dump(
                [{"id": 1, "qas": [{"qa_id": 5, "image_id": 1, "question": "Hue?",
                                    "answer": "Green.", "a_objects": [], "q_objects": []}] * 11},
                 {"id": 2, "qas": []}]
            )}),
            **VG_FILES,
        },
        [("1-0", [("Hue?" + SHORT, "Green.")] * 10), ("1-1", [("Hue?" + SHORT, "Green.")])],
    ),
    "visual-genome-regions": (
        {
            "region_descriptions.json.zip": zipped(**{"region_descriptions.json": dump(
                [{"id": 1, "regions": [{"region_id": 3, "image_id": 1, "phrase": "a clock ",
                                        "x": 400, "y": 0, "width": 80, "height": 600}] * 2}]
            )}),
            **VG_FILES,
        },
        [("1-0", [(DESCRIBE.format("[0.5, 0.12, 0.6, 0.88]"), "a clock"),
                  (LOCATE.format("a clock"), "[0.5, 0.12, 0.6, 0.88]")])],
    ),
    "refcoco": (refcoco("refcoco", "unc"), REFERRED),
    "refcoco+": (refcoco("refcoco+", "unc"), REFERRED),
    "refcocog": (refcoco("refcocog", "umd"), REFERRED),
    "sharegpt4v": (
        {
            "sharegpt4v_instruct_gpt4-vision_cap100k.json": dump(
                [LLAVA | {"image": "sam/images/sa_1.jpg"}]
            ),
            "sam_images/sa_1.jpg": b"P",
        },
        [("7-0", TURNS)],
    ),
    "sharegpt4v-pt": (
        {
            "share-captioner_coco_lcs_sam_1246k_1107.json": dump(
                [LLAVA | {"image": "llava/llava_pretrain/images/00453/4.jpg"}]
            ),
            "llava_images.zip": zipped(**{"00453/4.jpg": b"P"}),
        },
        [("7-0", TURNS)],
    ),
    "sharegpt4v-mix665k": (
        {
            "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json": dump(
                [LLAVA | {"image": "wikiart/images/a.jpg"}]
            ),
            "wikiart/images/a.jpg": b"P",
        },
        [("7-0", TURNS)],
    ),
    "the-cauldron": (
        {"ai2d/train-00000-of-00001-2ce3.parquet": parquet([HUB_ROW])},
        [("ai2d-0", TURNS)],
    ),
    "finevision": (
        {"chartqa/train-00000-of-00001.parquet": parquet(
            [HUB_ROW | {"source": "chartqa", "relevance_ratings": [5, 4], "relevance_min": 4}]
        )},
        [("chartqa-0", TURNS)],
    ),
    "laion-webdataset": (
        {"00000.tar": tarred("w", **LAION), "00000.parquet": parquet([{"url": "x", "key": "0"}])},
        [("000000000", [("Provide a brief description of the given image.", "A cat.")])],
    ),
}  # fmt: skip


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_every_recipe_has_its_section() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in RECIPES:
        section = page.split(f"### {name}\n")[1].split("###")[0]
        assert f"vlm data build {name} --out" in section
        assert recipe(name).license in section
        count = recipe(name).count
        assert count is None or f"{count:,}" in section


def test_every_recipe_has_a_case() -> None:
    assert set(CASES) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_publishers_files_become_records(name: str, tmp_path: Path) -> None:
    files, expected = CASES[name]
    path = build(name, tmp_path / "out", lay(tmp_path / "in", files))
    found = list(read_records(path))
    assert [
        (r.id, [(a.text, b.text) for a, b in zip(r.messages[::2], r.messages[1::2], strict=True)])
        for r in found
    ] == expected
    assert {Path(i).read_bytes() for r in found for i in r.images} == (
        {png()} if name in ROWS else {b"P"}
    )
    place = {"the-cauldron": "the-cauldron/ai2d", "finevision": "chartqa"}.get(name, name)
    assert (found[0].source, found[0].license) == (place, recipe(name).license)
    counts = json.loads((path.parent / "counts.json").read_text())
    assert (counts["written"], counts["missing"], counts["faulty"]) == (len(expected), 0, 0)


def test_missing_pictures_are_listed_and_the_rest_is_built(tmp_path: Path) -> None:
    entries = [LLAVA, LLAVA | {"id": "8", "image": "gone.jpg"}]
    files = CASES["llava-pretrain"][0] | {"blip_laion_cc_sbu_558k.json": dump(entries)}
    path = build("llava-pretrain", tmp_path / "out", lay(tmp_path / "in", files))
    assert [r.id for r in read_records(path)] == ["7"]
    lost = json.loads((path.parent / "missing.jsonl").read_text())
    assert lost == {"id": "8", "images": ["gone.jpg"]}
    counts = json.loads((path.parent / "counts.json").read_text())
    assert counts == {"written": 1, "missing": 1, "faulty": 0, "expected": 558128}


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    files = {"blip_laion_cc_sbu_558k.json": dump([LLAVA | {"image": "../a.jpg"}])}
    with pytest.raises(RecordError, match="leaves the data folder"):
        build("llava-pretrain", tmp_path / "out", lay(tmp_path / "in", files))
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_entries_that_are_no_records_are_listed(tmp_path: Path) -> None:
    turns = LLAVA["conversations"]
    bad = [
        LLAVA | {"conversations": turns[::2]},
        {"id": "x"},
        LLAVA | {"image": "http://10.0.0.1/a"},
    ]
    files = CASES["llava-pretrain"][0] | {"blip_laion_cc_sbu_558k.json": dump([*bad, LLAVA])}
    asked: list[str] = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        return png()

    path = build("llava-pretrain", tmp_path / "out", lay(tmp_path / "in", files))
    assert [r.id for r in read_records(path)] == ["7"]
    lines = (path.parent / "faults.jsonl").read_text().splitlines()
    assert [json.loads(line)["code"] for line in lines] == [
        "malformed", "unknown_shape", "remote_url",
    ]  # fmt: skip
    assert json.loads((path.parent / "counts.json").read_text())["faulty"] == 3
    path = build("llava-pretrain", tmp_path / "b", tmp_path / "in", Options(fetch=fetch))
    assert asked == ["http://10.0.0.1/a"] and len(list(read_records(path))) == 2


def test_an_entry_of_another_layout_is_no_crash(tmp_path: Path) -> None:
    archive = zipped(**{"train_balanced_questions.json": dump({"02": {"question": "Hue?"}})})
    files = lay(tmp_path / "in", {"questions1.2.zip": archive})
    with pytest.raises(RecordError, match=r"not in the publisher's layout .*answer"):
        build("gqa", tmp_path / "out", files)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    archive = zipped(**{"refcoco/refs(unc).p": pickle.dumps([Evil()])})
    with pytest.raises(RecordError, match="data has no reason to"):
        build("refcoco", tmp_path / "out", lay(tmp_path / "in", {"refcoco.zip": archive}))
    assert not (tmp_path / "ran").exists()


def test_boxes_are_shares_of_the_padded_square() -> None:
    assert region((0, 0, 100, 200), (100, 200)) == "[0.25, 0.0, 0.75, 1.0]"
    assert region((-5, 0, 210, 100), (200, 100)) == "[0.0, 0.25, 1.0, 0.75]"


def test_rows_of_the_hub_are_streamed_as_far_as_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    made: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for i in range(1000):
            made.append(i)
            yield HUB_ROW

    def opened(name: str, config: str, **options: Any) -> Any:
        assert (name, config) == ("HuggingFaceM4/the_cauldron", "ai2d")
        assert options == {"split": "train", "streaming": True}
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["ai2d", "vqav2"])
    monkeypatch.setattr(datasets, "load_dataset", opened)
    path = build("the-cauldron", tmp_path, None, Options(limit=3))
    assert [r.id for r in read_records(path)] == ["ai2d-0", "ai2d-1", "ai2d-2"]
    assert len(made) < 10
    assert len(list((tmp_path / "images").iterdir())) == 1  # named by content


def test_subsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lay(tmp_path / "in", {f"{n}/a.parquet": parquet([HUB_ROW]) for n in ("a", "b", "c")})
    path = build("finevision", tmp_path / "out", folder, Options(subsets=["c", "a"]))
    assert [r.source for r in read_records(path)] == ["finevision/c", "finevision/a"]
    with pytest.raises(ConfigError, match="no subset 'd'"):
        build("finevision", tmp_path / "out", folder, Options(subsets=["d"]))
    with pytest.raises(ConfigError, match="has no subsets"):
        build("gqa", tmp_path / "out", folder, Options(subsets=["d"]))
    with pytest.raises(ConfigError, match=r"--from-dir FOLDER with \*\.tar"):
        build("laion-webdataset", tmp_path / "out")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"hf download HuggingFaceM4/FineVision .*--from-dir"):
        build("finevision", tmp_path / "out", None, Options(subsets=["a"]))


def test_absent_files_are_named_with_their_url(tmp_path: Path) -> None:
    url = recipe("gqa").sources[0].url
    with pytest.raises(ConfigError, match=re.escape(f"questions1.2.zip <- {url}")):
        build("gqa", tmp_path / "out", tmp_path)


class Handler(BaseHTTPRequestHandler):
    ranges: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(BODY) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.end_headers()
        self.wfile.write(BODY[start:])

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.bin"
    server.shutdown()
    server.server_close()


def test_a_download_resumes_and_is_checked(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(BODY[:1000])
    fetch([Source("a.bin", url, hashlib.sha256(BODY).hexdigest())], tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert (Handler.ranges[-1] or "").startswith("bytes=1000-")
    with pytest.raises(RecordError, match="sha256"):
        fetch([Source("a.bin", url, "0" * 64)], tmp_path)


def test_no_network_names_the_file_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"b\.bin <- http://127\.0\.0\.1:9/b .*--from-dir"):
        fetch([Source("b.bin", "http://127.0.0.1:9/b")], tmp_path)
