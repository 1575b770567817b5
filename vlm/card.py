"""README.md of a folder that we write: a model card with the facts of its vlm.json.

A card that somebody wrote or edited is never written over. Ours ends its front matter
with a comment that holds a hash of the rest, so an edit of any kind makes it theirs.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.about import KNOWS, read_about
from vlm.errors import VlmError
from vlm.folder import ADAPTER_CONFIG, read_json
from vlm.history import History, Run, base_models
from vlm.manifest import (
    Manifest,
    ModelFacts,
    describe,
    model_facts,
    weight_files,
    write_manifest,
    write_text,
)

if TYPE_CHECKING:
    from vlm.model import VisionLanguageModel
    from vlm.processor import Processor

CARD = "README.md"
PIPELINE = "image-text-to-text"
_MARK = "<!-- Written by vlm, and kept as it is once it is edited: {} -->\n"
_MARK_PATTERN = re.compile(re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{16})"))
_OPEN_BY_VLM = """\
```python
import vlm

assistant = vlm.load("FOLDER")  # this folder, or its name on the hub
print(assistant.ask("picture.png", "what is in the picture?"))
```
"""
_OPEN_BY_TRANSFORMERS = """\
It is a standard LLaVA folder, so plain transformers opens it too:

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained("FOLDER")
model = LlavaForConditionalGeneration.from_pretrained("FOLDER")
question = [{"type": "image"}, {"type": "text", "text": "what is in the picture?"}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True
)
inputs = processor(text=prompt, images=[Image.open("picture.png")], return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def document(
    folder: Path, model: "VisionLanguageModel", processor: "Processor", training: Run | None
) -> None:
    """Write the card and then the vlm.json of a model whose files have just been written.

    Raises:
        CheckpointError: the folder cannot be written, or its about.json is malformed.
    """
    facts = model_facts(model, processor)
    manifest = describe(weight_files(folder), model.history, training, facts)
    write_model_card(folder, manifest, processor)
    write_manifest(folder, manifest)


def document_adapter(folder: Path, history: History, training: Run | None) -> None:
    """The same of an adapter.

    Raises:
        CheckpointError: the folder cannot be read or written.
    """
    manifest = describe(weight_files(folder), history, training)
    write_adapter_card(folder, manifest)
    write_manifest(folder, manifest)


def write_model_card(folder: Path, manifest: Manifest, processor: "Processor") -> None:
    """Write the card of a whole model, unless the folder has one that is not ours.

    Raises:
        CheckpointError: the folder cannot be written, or its about.json is malformed.
    """
    facts = manifest.model
    assert facts is not None
    # Never by the folder's name: it may be moved, and saved before it has its own.
    joined = [facts.parts[name]["class"] for name in ("vision_tower", "language_model")]
    about = read_about(folder, f"A LLaVA model of {' and '.join(joined)}")
    size = facts.image_size
    sections = [
        f"# {about.name}",
        f"A vision-language model in the standard LLaVA folder. Every picture is brought to "
        f"{size} x {size} pixels and becomes {facts.num_visual_tokens} visual tokens; the context "
        f"is {processor.context_length} positions.",
        _parts(facts),
        _prompt(processor),
        "## How to open it",
        _OPEN_BY_VLM,
        _other_readers(facts.portability),
        _training(manifest),
        _limits(about.knows, manifest.training),
    ]
    tags = ["llava", "vlm"]
    library = "vlm" if facts.portability else "transformers"
    _write(folder, _front_matter(library, tags, base_models(manifest.training)), sections)


def write_adapter_card(folder: Path, manifest: Manifest) -> None:
    """Write the card of an adapter, unless the folder has one that is not ours.

    Raises:
        CheckpointError: the folder cannot be read or written.
    """
    config = read_json(folder, ADAPTER_CONFIG)
    base = str(config.get("base_model_name_or_path"))
    known = base_models(manifest.training)
    sections = [
        "# A LoRA adapter",
        f"An adapter (rank {config.get('r')}, alpha {config.get('lora_alpha')}) for the "
        f"language model of the vision-language model `{base}`, and the projector that was "
        "trained with it.",
        "## How to open it",
        _OPEN_BY_VLM,
        "The base model is opened with it. `vlm merge FOLDER --out DIR` writes both as one plain "
        "folder; peft alone would leave the projector out.",
        _training(manifest),
        _limits(KNOWS, manifest.training),
    ]
    tags = ["llava", "vlm", "lora"]
    _write(folder, _front_matter("vlm", tags, [base] if base in known else known), sections)


def may_write(folder: Path) -> bool:
    """Whether the folder has no card, or one of ours that nobody has edited."""
    path = folder / CARD
    if not path.exists():
        return True
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    found = _MARK_PATTERN.search(text)
    return found is not None and found[1] == _hash(text[: found.start()] + text[found.end() :])


def _write(folder: Path, front_matter: str, sections: Sequence[str]) -> None:
    if not may_write(folder):
        return
    body = "\n" + "\n\n".join(part.strip() for part in sections if part.strip()) + "\n"
    mark = _MARK.format(_hash(front_matter + body))
    write_text(folder / CARD, front_matter + mark + body)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _front_matter(library: str, tags: Sequence[str], bases: Iterable[str]) -> str:
    """What the hub reads. No license: that of the parts and of the data is not ours to know."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name=library,
        pipeline_tag=PIPELINE,
        base_model=list(bases) or None,
        tags=list(tags),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _parts(facts: ModelFacts) -> str:
    counts = {name: int(part["num_parameters"]) for name, part in facts.parts.items()}
    rows = [(name, part["class"], f"{counts[name]:,}") for name, part in facts.parts.items()]
    total = f"{sum(counts.values()):,}"
    return _table(("part", "class", "parameters"), [*rows, ("all", "", total)])


def _prompt(processor: "Processor") -> str:
    """The chat template at work on one question and its answer."""
    from vlm.inspection import render_example  # it opens folders, whose writers write cards

    try:
        text = "".join(piece.text for piece in render_example(processor))
    except VlmError:  # a context that holds no picture; everything else about it still holds
        return ""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"## How it is prompted\n\n{fence}text\n{text}\n{fence}"


def _other_readers(reasons: Sequence[str]) -> str:
    if not reasons:
        return _OPEN_BY_TRANSFORMERS
    return "Plain transformers would give other answers:\n\n" + "\n".join(f"- {r}" for r in reasons)


def _training(manifest: Manifest) -> str:
    heads = ("stage", "from", "steps", "seconds", "loss", "held-out loss", "date")
    rows = [_run_row(run) for run in manifest.training]
    made = _table(heads, rows) if rows else "Nothing was recorded."
    versions = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
    return f"## How it was made\n\n{made}\n\nWritten with {versions}."


def _run_row(run: Run) -> tuple[str, ...]:
    losses, data = run.get("losses") or {}, run.get("data") or {}
    if run.get("stage") == "compose":
        source = f"{run.get('vision')} + {run.get('language')}, {run.get('projector')}"
    elif "records" in data:
        source = f"{data['records']:,} records"
    else:
        source = ", ".join(run.get("base_models", ()))
    values = (run.get("steps"), run.get("seconds"), losses.get("training"), losses.get("held_out"))
    date = str(run.get("date", ""))[:10]
    return str(run.get("stage", "")), source, *(_number(value) for value in values), date


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _limits(knows: str, history: History) -> str:
    lines = [
        knows,
        "The licenses of the models and the data that it was made from apply to it too.",
    ]
    if history and history[-1].get("stage") == "compose":
        lines.insert(0, "Its projector is untrained: until it is trained, answers are noise.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
