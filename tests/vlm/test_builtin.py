"""The shipped model: it does what its card says, it looks, and transformers opens it too."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlm
from data_recipes.scenes import build, draw_scene, make_scene
from vlm import builtin
from vlm.assistant import Assistant
from vlm.evaluation import evaluate
from vlm.messages import Record, read_records

MOST_BYTES = 25 * 2**20
SEED = 555_001  # of no training set


@pytest.fixture(scope="module")
def model() -> Assistant:
    return vlm.load(device="cpu")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    out = tmp_path_factory.mktemp("scenes")
    return list(read_records(build(60, SEED, out, split="test")))


def files() -> Iterator[Path]:
    return (path for path in builtin.path().rglob("*") if path.is_file())


def test_it_is_small_and_holds_no_pickle() -> None:
    assert sum(path.stat().st_size for path in files()) <= MOST_BYTES
    assert {path.suffix for path in files()} == {".safetensors", ".json", ".jinja", ".md", ".png"}


def test_it_answers_about_scenes_that_nobody_has_seen(
    model: Assistant, records: list[Record]
) -> None:
    report = evaluate(model, records)
    assert report.overall.accuracy >= 0.75
    kinds = {score.kind: score for score in report.kinds}
    assert kinds["count"].accuracy >= 0.85
    assert 0.3 <= (kinds["exists"].yes_ratio or 0) <= 0.7


def test_with_somebody_elses_picture_it_guesses(model: Assistant, records: list[Record]) -> None:
    """A model that did not look would score the same with every picture."""
    seen, guessed = evaluate(model, records), evaluate(model, records, shuffle_pictures=True)
    assert guessed.overall.accuracy <= seen.overall.accuracy - 0.3
    low, high = guessed.overall.interval
    assert high < seen.overall.interval[0], (low, high)


def test_transformers_gives_the_same_words(model: Assistant) -> None:
    folder = builtin.path()
    theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    picture = draw_scene(make_scene(SEED, 3, split="test")[0])
    question = model.caption_prompt
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=prompt, images=[picture], return_tensors="pt")
    with torch.no_grad():
        ids = theirs.generate(**inputs, max_new_tokens=60, do_sample=False)
    said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == model.ask(picture, question, max_new_tokens=60)
    assert len(said.split()) >= 5


def test_its_examples_can_be_asked(model: Assistant) -> None:
    assert len(model.examples) >= 3
    for picture, question in model.examples:
        assert model.ask(picture, question).strip()


def test_its_card_and_header_say_what_it_does_not_know(model: Assistant) -> None:
    card = (builtin.path() / "README.md").read_text(encoding="utf-8")
    assert "does not know" in card and "photographs" in card
    assert "@" not in card  # no figure is left to be filled in
    assert "drawn scenes only" in model.about
    about = json.loads((builtin.path() / "about.json").read_text(encoding="utf-8"))
    assert about["caption_prompt"] == model.caption_prompt
