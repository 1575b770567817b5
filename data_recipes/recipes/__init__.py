"""The recipes by name; each is a file of this package, imported when it is asked for."""

import difflib
import importlib
from typing import cast

from data_recipes.recipe import Recipe
from vlm.errors import ConfigError

RECIPES = {
    "llava-pretrain": "llava_pretrain",
    "llava-mix665k": "llava_mix665k",
    "llava-instruct-150k": "llava_instruct",
    "coco-captions": "coco_captions",
    "vqav2": "vqav2",
    "gqa": "gqa",
    "okvqa": "okvqa",
    "ocr-vqa": "ocr_vqa",
    "textvqa": "textvqa",
    "textcaps": "textcaps",
    "aokvqa": "aokvqa",
    "visual-genome-qa": "visual_genome.QA",
    "visual-genome-regions": "visual_genome.REGIONS",
    "refcoco": "refcoco.REFCOCO",
    "refcoco+": "refcoco.PLUS",
    "refcocog": "refcoco.G",
    "sharegpt4v": "sharegpt4v.CAPTIONS",
    "sharegpt4v-pt": "sharegpt4v.PRETRAIN",
    "sharegpt4v-mix665k": "sharegpt4v.MIX",
    "the-cauldron": "the_cauldron",
    "finevision": "finevision",
    "laion-webdataset": "laion_webdataset",
}


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ConfigError: there is none; the message offers the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, [*RECIPES, "scenes"], 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no data recipe {name!r}; {hint}`vlm data list` shows all")
    file, _, variable = RECIPES[name].partition(".")
    module = importlib.import_module(f"data_recipes.recipes.{file}")
    return cast(Recipe, getattr(module, variable or "RECIPE"))
