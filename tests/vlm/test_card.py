"""The model card: what a hub reads of it, that its code runs, and that no edit is lost."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from vlm import lora, testing
from vlm.card import CARD, may_write
from vlm.checkpoint import compose, load_checkpoint, save_checkpoint
from vlm.errors import CheckpointError
from vlm.history import composed

REVISION = "0123456789abcdef0123456789abcdef01234567"
RUN = {
    "stage": "align",
    "data": {"records": 60_000},
    "steps": 1_200,
    "seconds": 4321.25,
    "losses": {"training": 1.23456, "held_out": None},
    "date": "2025-01-02T03:04:05+00:00",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    start = testing.tiny_llava_folder(tmp_path / "start")
    model, processor = load_checkpoint(start)
    save_checkpoint(model, processor, tmp_path / "saved", RUN)
    return tmp_path / "saved"


def save_again(folder: Path) -> None:
    save_checkpoint(*load_checkpoint(folder), folder)


def rows(text: str) -> list[list[str]]:
    """The cells of all tables."""
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def test_a_hub_reads_what_it_needs(folder: Path) -> None:
    card = ModelCard.load(folder / CARD)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.tags == ["llava", "vlm"]
    assert card.data.license is None and card.data.base_model is None
    assert "license" not in (folder / CARD).read_text().split("---")[1]


def test_people_read_parts_tokens_and_runs(folder: Path) -> None:
    text = (folder / CARD).read_text(encoding="utf-8")
    table = rows(text)
    assert ["vision_tower", "CLIPVisionModel", "44,768"] in table
    assert ["all", "", "82,752"] in table
    run = ["align", "60,000 records", "1,200", "4,321", "1.235", "", "2025-01-02"]
    assert run in table
    assert "28 x 28 pixels and becomes 4 visual tokens" in text
    assert "USER: <image> x 4" in text and "ASSISTANT: a grey square.</s>" in text
    assert "torch 2." in text and "## Limits" in text
    assert "untrained" not in text
    assert "\n# A LLaVA model of CLIPVisionModel and LlamaForCausalLM\n" in text
    assert folder.name not in text  # it may be moved


def test_its_code_runs_and_both_ways_give_one_answer(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    testing.draw_image().save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / CARD).read_text(), re.DOTALL | re.M)
    said = []
    for block in blocks:
        exec(compile(block.replace("FOLDER", str(folder)), "card", "exec"), {})
        said.append(capsys.readouterr().out)
    assert len(said) == 2 and said[0] == said[1] and len(said[0]) > 20


def test_where_transformers_would_differ_it_says_so(tmp_path: Path) -> None:
    start = testing.tiny_llava_folder(tmp_path / "start", "cohere")
    save_checkpoint(*load_checkpoint(start), tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / CARD)
    assert card.data.library_name == "vlm"  # or the hub would offer transformers' own lines
    assert "- cohere scales or caps its logits" in card.text
    assert "LlavaForConditionalGeneration.from_pretrained" not in card.text


def test_a_composed_model_names_its_parts(tmp_path: Path) -> None:
    names = {"vision": "models--openai--clip", "language": "models--lmsys--vicuna"}
    places = {part: tmp_path / name / "snapshots" / REVISION for part, name in names.items()}
    testing.tiny_vision_folder(places["vision"])
    testing.tiny_language_folder(places["language"])
    model, processor = compose(places["vision"], places["language"])
    model.history = composed(places["vision"], places["language"], "mlp")
    save_checkpoint(model, processor, tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / CARD)
    assert card.data.base_model == ["openai/clip", "lmsys/vicuna"]
    assert "projector is untrained" in card.text
    assert ["compose", "openai/clip + lmsys/vicuna, mlp"] in [row[:2] for row in rows(card.text)]
    assert str(tmp_path) not in card.text


def test_an_adapter_names_its_base(folder: Path, tmp_path: Path) -> None:
    model, _ = load_checkpoint(folder)
    lora.attach(model, r=2, alpha=4)
    lora.save_adapter(model, tmp_path / "adapter", {"stage": "instruct"})
    card = ModelCard.load(tmp_path / "adapter" / CARD)
    assert card.data.library_name == "vlm" and "lora" in card.data.tags
    assert card.data.base_model is None  # it is a folder here
    assert "`../saved`" in card.text and "rank 2, alpha 4" in card.text
    assert [row[0] for row in rows(card.text)][2:] == ["align", "instruct"]


def test_about_json_gives_name_and_limits(folder: Path) -> None:
    (folder / "about.json").write_text(json.dumps({"name": "Birds", "knows": "Birds alone."}))
    save_again(folder)
    text = (folder / CARD).read_text()
    assert "\n# Birds\n" in text and "\n- Birds alone.\n" in text
    (folder / "about.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"about\.json: not JSON"):
        save_again(folder)


def test_our_own_card_is_brought_up_to_date(folder: Path) -> None:
    model, processor = load_checkpoint(folder)
    save_checkpoint(model, processor, folder, {"stage": "instruct", "steps": 7})
    assert "instruct" in [row[0] for row in rows((folder / CARD).read_text())]


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "# My own card\n",
        lambda text: text.replace("## Limits", "## What it cannot do"),
        lambda text: text.replace("tags:", "license: mit\ntags:"),
        lambda text: text + "One line more.\n",
        lambda text: re.sub("<!-- Written by vlm.*-->\n", "", text),
        lambda text: "",
    ],
    ids=["new", "body", "front matter", "end", "no mark", "empty"],
)
def test_a_card_that_somebody_wrote_or_edited_is_kept(
    folder: Path, edit: Callable[[str], str]
) -> None:
    path = folder / CARD
    assert may_write(folder)
    path.write_text(edit(path.read_text()))
    before = path.read_bytes()
    assert not may_write(folder)
    save_again(folder)
    assert path.read_bytes() == before


def test_a_card_that_is_no_text_is_kept(folder: Path) -> None:
    (folder / CARD).write_bytes(b"\xff\xfe")
    save_again(folder)
    assert (folder / CARD).read_bytes() == b"\xff\xfe"


def test_a_template_with_fences_and_cells_with_bars_stay_in_their_places(tmp_path: Path) -> None:
    fenced = testing.ROLE_TOKENS.replace("<|end|>", "\n````<|end|>")
    start = testing.tiny_llava_folder(tmp_path / "start", template=fenced)
    model, processor = load_checkpoint(start)
    save_checkpoint(model, processor, tmp_path / "saved", {"stage": "a | b\nc"})
    text = (tmp_path / "saved" / CARD).read_text()
    assert re.search(r"^`````text\n.*^`````$", text, re.DOTALL | re.MULTILINE)
    assert "| a \\| b c |" in text


def test_a_context_that_holds_no_picture_is_no_reason_not_to_save(tmp_path: Path) -> None:
    model, processor = load_checkpoint(testing.tiny_llava_folder(tmp_path / "start"))
    processor.context_length = 8
    save_checkpoint(model, processor, tmp_path / "saved")
    text = (tmp_path / "saved" / CARD).read_text()
    assert "How it is prompted" not in text and "How to open it" in text
