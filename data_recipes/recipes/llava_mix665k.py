"""The LLaVA-1.5 instruction mix, with its six folders of pictures."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.recipe import Pictures, Recipe, Source, from_llava, load
from vlm.messages import Record

_FILE = "llava_v1_5_mix665k.json"
_HUB = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/"
_COCO = Source("train2017.zip", "http://images.cocodataset.org/zips/train2017.zip")
_GQA = Source("gqa_images.zip", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip")
_TEXTVQA = Source(
    "train_val_images.zip", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
)
_OCR = Source("ocr_vqa_images", None, page="https://ocr-vqa.github.io (a folder of pictures)")
_VG = "https://cs.stanford.edu/people/rak248/VG_100K_2/"


def records(folder: Path) -> Iterator[Record]:
    """The entries in the file's order; ids repeat in the file, so the index is put behind."""
    for i, entry in enumerate(load(folder, _FILE)):
        yield from_llava(entry, f"{entry['id']}-{i}", "llava-mix665k")


RECIPE = Recipe(
    about="665K instructions for the second stage of LLaVA-1.5",
    license="CC BY 4.0 and the terms of each source",
    size="unknown",
    count=665_298,
    sources=(Source(_FILE, _HUB + _FILE),),
    pictures=(
        Pictures("coco/train2017/", _COCO, "train2017/"),
        Pictures("gqa/images/", _GQA, "images/"),
        Pictures("ocr_vqa/images/", _OCR),
        Pictures("textvqa/train_images/", _TEXTVQA, "train_images/"),
        Pictures("vg/VG_100K/", Source("vg_images.zip", _VG + "images.zip"), "VG_100K/"),
        Pictures("vg/VG_100K_2/", Source("vg_images2.zip", _VG + "images2.zip"), "VG_100K_2/"),
    ),
    records=records,
)
