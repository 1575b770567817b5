"""ShareGPT4V: long captions by GPT-4V, and those that a captioner learnt from them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_recipes.annotations import llava
from data_recipes.formats import Fault
from data_recipes.recipe import Pictures, Recipe, Source
from data_recipes.sources import LLAVA_MIX
from vlm.messages import Record

_HUB = "https://huggingface.co/datasets/"
_DOCS = "github.com/InternLM/InternLM-XComposer, projects/ShareGPT4V/docs/Data.md"
_SAM = Source("sam_images", None, page="https://ai.meta.com/datasets/segment-anything-downloads")
_LLAVA = Source("llava_images.zip", _HUB + "liuhaotian/LLaVA-Pretrain/resolve/main/images.zip")
_WEB = ("share_textvqa", "web-celebrity", "web-landmark", "wikiart")

_PICTURES = (
    *LLAVA_MIX,
    Pictures("llava/llava_pretrain/images/", _LLAVA),
    Pictures("sam/images/", _SAM),
    *(Pictures(f"{name}/images/", Source(name, None, page=_DOCS), "images/") for name in _WEB),
)


def records(file: str, source: str, folder: Path) -> Iterator[Record | Fault]:
    """The entries in the file's order; ids repeat in the file, so the index is put behind."""
    return llava(folder, file, source)


def _recipe(name: str, file: str, size: str, about: str) -> Recipe:
    return Recipe(
        about=about,
        license="CC BY-NC 4.0",
        size=f"{size} of annotations; pictures unknown",
        count=None,
        sources=(Source(file, f"{_HUB}Lin-Chen/ShareGPT4V/resolve/main/{file}"),),
        pictures=_PICTURES,
        records=partial(records, file, name),
    )


CAPTIONS = _recipe(
    "sharegpt4v",
    "sharegpt4v_instruct_gpt4-vision_cap100k.json",
    "134 MB",
    "102K long captions by GPT-4V",
)
PRETRAIN = _recipe(
    "sharegpt4v-pt",
    "share-captioner_coco_lcs_sam_1246k_1107.json",
    "1.49 GB",
    "1,246K long captions by a captioner that learnt from GPT-4V",
)
MIX = _recipe(
    "sharegpt4v-mix665k",
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
    "1.23 GB",
    "the LLaVA-1.5 mix with 23K entries replaced by long captions",
)
