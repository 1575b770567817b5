"""``vlm.json``: what a folder holds, by which versions, and the runs that made it.

    {"format": 1, "versions": {...}, "weights_sha256": "...", "model": {...}, "training": [...]}

``model`` is there for whole models only; ``training`` is the record of `vlm.history`. The
file is written last, so a new folder that has it is whole.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import CheckpointError
from vlm.folder import ADAPTER_WEIGHTS, is_adapter, read_config
from vlm.headers import content_sha256, read_headers
from vlm.history import FILE, History, Run, history_in, read_file, versions
from vlm.portability import transformers_differences
from vlm.weights import shard_paths

if TYPE_CHECKING:
    from vlm.model import VisionLanguageModel
    from vlm.processor import Processor

FORMAT = 1
_PARTS = ("vision_tower", "multi_modal_projector", "language_model")
_TYPES: dict[str, Any] = {
    "num_visual_tokens": int,
    "image_size": int,
    "image_token_id": int,
    "chat_template_sha256": str,
    "parts": dict,
    "portability": list,
    "versions": dict,
    "weights_sha256": str,
    "training": tuple,
    "model": object,
}


@dataclass(frozen=True)
class ModelFacts:
    """What must hold of a model for its folder to be used.

    Attributes:
        num_visual_tokens: of one picture.
        image_size: side of the pictures, in pixels.
        image_token_id: of the positions that visual tokens take.
        chat_template_sha256: of the template's text.
        parts: by attribute name, the ``class`` and the ``num_parameters``.
        portability: why `LlavaForConditionalGeneration` would answer differently.
    """

    num_visual_tokens: int
    image_size: int
    image_token_id: int
    chat_template_sha256: str
    parts: Mapping[str, Mapping[str, Any]]
    portability: Sequence[str]


@dataclass(frozen=True)
class Manifest:
    """A folder's vlm.json.

    Attributes:
        versions: of Python and of the packages that wrote the folder.
        weights_sha256: of all tensors, see `vlm.headers.content_sha256`.
        training: the runs that made the weights, the first one first.
        model: of a whole model; None for an adapter and for a part.
    """

    versions: Mapping[str, str]
    weights_sha256: str
    training: History
    model: ModelFacts | None = None


def model_facts(model: "VisionLanguageModel", processor: "Processor") -> ModelFacts:
    """The facts of a model in memory; its weights are not looked at."""
    parts = {name: model.get_submodule(name) for name in _PARTS}
    return ModelFacts(
        num_visual_tokens=processor.num_visual_tokens,
        image_size=processor.image_size,
        image_token_id=processor.image_token_id,
        chat_template_sha256=hashlib.sha256(processor.chat_template.encode()).hexdigest(),
        parts={
            name: {
                "class": type(part).__name__,
                "num_parameters": sum(p.numel() for p in part.parameters()),
            }
            for name, part in parts.items()
        },
        portability=transformers_differences(model),
    )


def describe(
    weights: Sequence[Path],
    before: History,
    training: Run | None = None,
    model: ModelFacts | None = None,
) -> Manifest:
    """The manifest of files that have just been written; reads them once.

    Args:
        weights: the safetensors files.
        before: the runs behind the weights that the last run began with.
        training: the last run, if there was one.
        model: of a whole model.

    Raises:
        CheckpointError: a file cannot be read.
    """
    runs = before if training is None else (*before, training)
    return Manifest(versions(), content_sha256(read_headers(weights)), runs, model)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write vlm.json whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    raw = {"format": FORMAT, **dataclasses.asdict(manifest)}
    if manifest.model is None:
        del raw["model"]
    write_text(folder / FILE, json.dumps(raw, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's vlm.json; None without one.

    Raises:
        CheckpointError: it is malformed, or of a later version of this package.
    """
    raw = read_file(folder)
    if raw is None:
        return None
    if raw.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / FILE}: its format is {raw.get('format')!r}, and this version of vlm reads "
            f"{FORMAT}; update vlm, or remove the file"
        )
    try:
        model = None if raw.get("model") is None else _checked(ModelFacts, raw["model"])
        return _checked(Manifest, {**raw, "training": history_in(raw), "model": model})
    except TypeError as error:
        raise CheckpointError(f"{folder / FILE}: {error}; correct or remove it") from error


def verify(folder: Path) -> list[str]:
    """Where vlm.json and its folder disagree, one line each; nothing if all is as told.

    All weights are read. Not compared is what depends on the versions at hand: they
    themselves, and what other programs make of the folder.

    Raises:
        CheckpointError: there is no vlm.json, or the folder cannot be opened.
    """
    told = read_manifest(folder)
    if told is None:
        raise CheckpointError(f"{folder}: no {FILE} to compare with; save the model by vlm anew")
    weights = content_sha256(read_headers(weight_files(folder)))
    pairs: list[tuple[str, Any, Any]] = [("weights_sha256", told.weights_sha256, weights)]
    if told.model is not None:
        says, has = _flat(told.model), _flat(_facts_of(folder))
        pairs += [(name, says.get(name), has.get(name)) for name in {**says, **has}]
    return [
        f"{name}: {FILE} says {says}, the folder has {has}"
        for name, says, has in pairs
        if says != has
    ]


def weight_files(folder: Path) -> list[Path]:
    """The files whose tensors count: a model's shards, or an adapter and its projector.

    Raises:
        CheckpointError: one is missing.
    """
    if not is_adapter(folder):
        return shard_paths(folder)
    for name in ADAPTER_WEIGHTS:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: no {name}; is the download complete?")
    return [folder / name for name in ADAPTER_WEIGHTS]


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there.

    Raises:
        CheckpointError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def _facts_of(folder: Path) -> ModelFacts:
    """The facts of a folder, told by its configs and processor alone."""
    from vlm.checkpoint import empty_model  # it imports this module
    from vlm.processor import Processor

    config = read_config(folder)
    return model_facts(empty_model(config, "meta"), Processor.from_folder(folder, config))


def _flat(facts: ModelFacts) -> dict[str, Any]:
    """Names and plain values; `portability` is left out."""
    flat = dataclasses.asdict(facts)
    del flat["portability"]
    for part, told in flat.pop("parts").items():
        flat |= {f"{part}.{name}": value for name, value in told.items()}
    return flat


def _checked(kind: Any, raw: Mapping[str, Any]) -> Any:
    """`kind` made of its own keys in `raw`, if they have the types that they should have."""
    if not isinstance(raw, dict):
        raise TypeError(f"an object was expected and not {raw!r}")
    names = [field.name for field in dataclasses.fields(kind)]
    if missing := [name for name in names if name not in raw]:
        raise TypeError(f"{missing[0]} is missing")
    values = {name: raw[name] for name in names}
    for name, value in values.items():
        if not isinstance(value, _TYPES[name]):
            raise TypeError(f"{name} has a wrong type, {type(value).__name__}")
    for part in values.get("parts", {}).values():
        if not isinstance(part, dict):
            raise TypeError(f"parts has a wrong value, {part!r}")
    return kind(**values)
