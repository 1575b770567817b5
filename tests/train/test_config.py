"""Recipes: what is accepted, and what is said of the rest."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from train.config import RECIPES, list_recipes, load_config, save_config
from train.stages import STAGES
from vlm.errors import ConfigError

ALIGN: dict[str, Any] = {
    "stage": "align",
    "output": "out",
    "data": ["records.jsonl"],
    "model": {"vision": "tower", "language": "decoder"},
    "learning_rate": 0.001,
    "batch_size": 2,
}


def written(folder: Path, values: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def refused(recipe: str, *overrides: str) -> str:
    """The one line that a refused recipe is answered with."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_shipped_recipe_loads() -> None:
    names = list_recipes()
    assert names == sorted(path.stem for path in RECIPES.iterdir())
    assert {load_config(name).stage for name in names} == STAGES.keys()
    assert len({load_config(name).output for name in names}) == len(names)


def test_a_shipped_stage_reads_only_what_another_one_wrote() -> None:
    configs = [load_config(name) for name in list_recipes()]
    outputs = {config.output for config in configs}
    for config in configs:
        parts = {config.model.vision, config.model.language, config.model.start} - {None}
        assert {part for part in parts if part.startswith("runs/")} <= outputs


def test_values_that_are_not_given_have_their_defaults(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, ALIGN))
    assert config.model_dump(include=ALIGN.keys(), exclude_unset=True) == ALIGN
    assert (config.lora, config.optimizer, config.gradient_accumulation) == (None, "adamw", 1)
    assert (config.model.projector, config.model.vision_feature_layer) == ("mlp2x_gelu", -2)


def test_a_resolved_run_is_read_back_as_the_same(tmp_path: Path) -> None:
    for name in list_recipes():
        config = load_config(name, ["seed=7", "learning_rate=1e-3"])
        save_config(config, tmp_path / "run.yaml")
        assert load_config(str(tmp_path / "run.yaml")) == config


def test_overrides_replace_values_at_any_depth(tmp_path: Path) -> None:
    recipe = written(tmp_path, ALIGN)
    overrides = ["batch_size=3", "learning_rate=2e-5", "data=[a.jsonl, b.jsonl]", "eval_data=null"]
    config = load_config(recipe, [*overrides, "model.projector=linear", "batch_size=4"])
    assert (config.batch_size, config.learning_rate) == (4, 2e-5)
    assert config.data == ["a.jsonl", "b.jsonl"] and config.eval_data is None
    assert (config.model.projector, config.model.vision) == ("linear", "tower")
    assert load_config(recipe).batch_size == 2


def test_an_override_opens_and_closes_a_section(tmp_path: Path) -> None:
    instruct = ALIGN | {"stage": "instruct", "model": {"start": "align"}, "lora": None}
    recipe = written(tmp_path, instruct)
    assert load_config(recipe).lora is None
    opened = load_config(recipe, ["lora.r=8", "lora.dropout=0"]).lora
    assert opened is not None and (opened.r, opened.alpha, opened.dropout) == (8, 256, 0)
    assert load_config(recipe, ["lora.r=8", "lora=null"]).lora is None


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("lerning_rate=1", "learning_rate"),
        ("model.projektor=linear", "model.projector"),
        ("model.new_vision.patchsize=2", "model.new_vision.patch_size"),
        ("dropout=0.1", "lora.dropout"),
        ("model.batch_size=1", "batch_size"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(
    tmp_path: Path, override: str, nearest: str
) -> None:
    message = refused(written(tmp_path, ALIGN), override)
    unknown = override.partition("=")[0]
    assert f"unknown key {unknown!r}; did you mean {nearest!r}?" in message


def test_a_key_like_no_other_is_named_alone(tmp_path: Path) -> None:
    message = refused(written(tmp_path, ALIGN), "zzzz=1")
    assert message.endswith("mine.yaml: unknown key 'zzzz'")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("batch_size=many", "batch_size"),
        ("batch_size=0", "batch_size"),
        ("batch_size=1.5", "batch_size"),
        ("learning_rate=-1", "learning_rate"),
        ("data=records.jsonl", "data"),
        ("data=[]", "data"),
        ("stage=aline", "stage"),
        ("optimizer=sgd", "optimizer"),
        ("precision=float16", "precision"),
        ("model.vision=[tower]", "model.vision"),
        ("model.vision_feature_layer=last", "model.vision_feature_layer"),
        ("lora.dropout=1", "lora.dropout"),
        ("model.new_vision.image_size=0", "model.new_vision.image_size"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(tmp_path: Path, override: str, key: str) -> None:
    message = refused(written(tmp_path, ALIGN), override)
    value = yaml.safe_load(override.partition("=")[2])
    assert f"{key}: " in message and f"(got {value!r})" in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    values = {key: value for key, value in ALIGN.items() if key != "output"}
    message = refused(written(tmp_path, values), "batch_size=many", "sead=1")
    assert "key 'output' is missing" in message
    assert "batch_size" in message and "did you mean 'seed'?" in message


@pytest.mark.parametrize(
    ("stage", "model", "needed"),
    [
        ("contrastive", {"language": "decoder"}, "model.new_vision or model.vision"),
        ("language", {"vision": "tower"}, "model.new_language or model.language"),
        ("align", {"vision": "tower"}, "model.vision and model.language"),
        ("align", {"start": "align"}, "model.vision and model.language"),
        ("instruct", {"vision": "tower", "language": "decoder"}, "model.start"),
    ],
)
def test_a_stage_asks_for_its_parts(
    tmp_path: Path, stage: str, model: dict[str, str], needed: str
) -> None:
    recipe = written(tmp_path, ALIGN | {"stage": stage, "model": model})
    assert refused(recipe).endswith(f"stage {stage} needs {needed}")


@pytest.mark.parametrize("stage", sorted(STAGES.keys() - {"instruct"}))
def test_lora_is_for_instruct_alone(tmp_path: Path, stage: str) -> None:
    model = {"vision": "tower", "language": "decoder", "start": "align"}
    recipe = written(tmp_path, ALIGN | {"stage": stage, "model": model})
    assert f"not for {stage}" in refused(recipe, "lora.r=8")
    assert load_config(recipe, ["stage=instruct", "lora.r=8"]).lora is not None


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.yaml")
    assert absent in refused(absent)
    message = refused("builtin-aling")
    assert "did you mean 'builtin-align'?" in message
    assert all(name in message for name in list_recipes())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"stage: [align", "not a YAML file"),
        (b"\xff\xfe\x00", "not a YAML file"),
        (b"", "holds NoneType"),
        (b"- align", "holds list"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    message = refused(str(path))
    assert str(path) in message and reason in message


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("batch_size", "not of the form key=value"),
        ("=2", "not of the form key=value"),
        ("data=[a", "not a YAML value"),
        ("stage.name=align", "stage holds a value"),
    ],
)
def test_an_override_that_is_none(tmp_path: Path, override: str, reason: str) -> None:
    message = refused(written(tmp_path, ALIGN), override)
    assert repr(override) in message and reason in message
