"""A run as data: a YAML recipe, strict keys, ``key=value`` overrides.

A recipe is a file or the name of a shipped one (`train/recipes`). Unknown keys and
wrong types are errors that name the nearest known key; nothing is ignored.
"""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from train.settings import SECTIONS, LanguageSize, LoraConfig, RunConfig, VisionSize
from vlm.errors import ConfigError
from vlm.strict_yaml import explain, read_yaml

__all__ = [
    "LanguageSize",
    "LoraConfig",
    "RunConfig",
    "VisionSize",
    "list_recipes",
    "load_config",
    "save_config",
]

RECIPES = Path(__file__).with_name("recipes")


def list_recipes() -> list[str]:
    """The names of the shipped recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def describe_recipes() -> dict[str, str]:
    """The names of the shipped recipes, and the first line of each, which says what it is."""
    found = {}
    for name in list_recipes():
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        found[name] = text.partition("\n")[0].removeprefix("#").strip().rstrip(".")
    return found


def load_config(recipe: str, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe file or a shipped recipe, then apply ``key=value`` overrides.

    Keys of nested values are joined by dots (``lora.r=8``); values are YAML.

    Raises:
        ConfigError: no such recipe, no YAML, an unknown key or a wrong value.
    """
    values = read_yaml(_find(recipe))
    for override in overrides or []:
        _apply(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(f"recipe {recipe}", error, SECTIONS)) from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved run as YAML, so that a folder says how it was made."""
    path.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")


def _find(recipe: str) -> Path:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"no recipe file {recipe}; see `vlm train --list` for the shipped ones")
    known = list_recipes()
    if recipe in known:
        return RECIPES / f"{recipe}.yaml"
    near = difflib.get_close_matches(recipe, known, 1)
    raise ConfigError(
        f"no recipe {recipe!r}{f'; did you mean {near[0]!r}?' if near else ''} "
        f"(a .yaml file, or one of: {', '.join(known)}; values have the form key=value)"
    )


def _apply(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        inner = place.setdefault(parent, {})
        if inner is None:
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {parent} holds a value, not keys")
        place = inner
    place[last] = value
