"""A run as data: a YAML recipe, strict keys, ``key=value`` overrides.

A recipe is a file or the name of a shipped one (`train/recipes`). Unknown keys and
wrong types are errors that name the nearest known key; nothing is ignored.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm.errors import ConfigError

RECIPES = Path(__file__).with_name("recipes")
StageName = Literal["contrastive", "language", "align", "instruct"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VisionSize(_Strict):
    """A CLIP tower to be made from nothing."""

    image_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    text_vocab_size: int = Field(1024, gt=261)


class LanguageSize(_Strict):
    """A Llama decoder and its byte-level BPE tokenizer, to be made from nothing."""

    vocab_size: int = Field(gt=261)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    context_length: int = Field(gt=0)


class ModelConfig(_Strict):
    """Where the parts come from.

    ``contrastive`` takes ``new_vision``, or ``vision`` to go on from a folder; ``language``
    takes ``new_language`` or ``language``; ``align`` takes ``vision`` and ``language``
    folders; ``instruct`` takes ``start``, the output folder of ``align``.
    """

    new_vision: VisionSize | None = None
    new_language: LanguageSize | None = None
    vision: str | None = None
    language: str | None = None
    start: str | None = None
    projector: str = "mlp2x_gelu"
    vision_feature_layer: int = -2


class LoraConfig(_Strict):
    """LoRA on every linear layer of the language model but ``lm_head``."""

    r: int = Field(128, gt=0)
    alpha: int = Field(256, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)


class RunConfig(_Strict):
    """One training run. Rates and sizes are per optimiser step unless said otherwise.

    ``batch_size`` is per device and forward pass; the global batch is batch_size x
    gradient_accumulation x number of processes.
    """

    stage: StageName
    output: str
    data: list[str] = Field(min_length=1)
    eval_data: str | None = None
    model: ModelConfig
    lora: LoraConfig | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(gt=0)
    projector_learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_size: int = Field(gt=0)
    gradient_accumulation: int = Field(1, gt=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int = -1
    warmup_steps: float = Field(0.03, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    num_workers: int = Field(0, ge=0)
    eval_steps: float = Field(0.1, gt=0)
    save_steps: float = Field(0.1, gt=0)
    log_steps: int = Field(20, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _parts_fit_the_stage(self) -> "RunConfig":
        model, stage = self.model, self.stage
        wanted = {
            "contrastive": model.new_vision or model.vision,
            "language": model.new_language or model.language,
            "align": model.vision and model.language,
            "instruct": model.start,
        }
        hint = {
            "contrastive": "model.new_vision or model.vision",
            "language": "model.new_language or model.language",
            "align": "model.vision and model.language",
            "instruct": "model.start",
        }
        if not wanted[stage]:
            raise ValueError(f"stage {stage} needs {hint[stage]}")
        if self.lora is not None and stage != "instruct":
            raise ValueError(f"lora is for the stage instruct, not for {stage}; remove it")
        return self


def list_recipes() -> list[str]:
    """The names of the shipped recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe file or a shipped recipe, then apply ``key=value`` overrides.

    Keys of nested values are joined by dots (``lora.r=8``); values are YAML.

    Raises:
        ConfigError: no such recipe, no YAML, an unknown key or a wrong value.
    """
    values = _read(_find(recipe))
    for override in overrides or []:
        _apply(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(recipe, error)) from None


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
        f"(a .yaml file, or one of: {', '.join(known)})"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a YAML file: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold key: value pairs, it holds {type(values).__name__}")
    return values


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


def _explain(recipe: str, error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(step) for step in item["loc"])
        if item["type"] == "extra_forbidden":
            near = _nearest(where)
            parts.append(f"unknown key {where!r}{f'; did you mean {near!r}?' if near else ''}")
        elif item["type"] == "missing":
            parts.append(f"key {where!r} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            parts.append(f"{where}: {message} (got {item['input']!r})" if where else message)
    return f"recipe {recipe}: {'; '.join(parts)}"


def _nearest(key: str) -> str | None:
    """The known key that is spelt most like this one, or has its name elsewhere."""
    known = [prefix + name for prefix, model in _SECTIONS.items() for name in model.model_fields]
    last = key.rpartition(".")[2]
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    return next(iter(difflib.get_close_matches(key, known, 1) or same_name), None)


_SECTIONS: dict[str, type[_Strict]] = {
    "": RunConfig,
    "model.": ModelConfig,
    "model.new_vision.": VisionSize,
    "model.new_language.": LanguageSize,
    "lora.": LoraConfig,
}
