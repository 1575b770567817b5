"""Where the model looked: transformers' own attention as the oracle, drawn scenes as the truth."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_recipes.scenes import build
from vlm import testing
from vlm.assistant import Assistant, load
from vlm.checkpoint import compose
from vlm.errors import ConfigError, MessageError
from vlm.look_sheet import overlay, words_of, write_sheet
from vlm.looking import Glance, look
from vlm.messages import assistant, read_records, user

PLACES = ("top left", "top center", "top right", "middle left", "center", "middle right")
PLACES += ("bottom left", "bottom center", "bottom right")


@pytest.mark.parametrize("language", ["llama", "qwen3", "gemma2", "gpt_neox", "mistral"])
def test_maps_are_the_attention_that_transformers_tells(
    tmp_path: Path, language: testing.Language
) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    model, processor = compose(vision, testing.tiny_language_folder(tmp_path / "l", language))
    one = Assistant(model, processor)
    chat = [user("what is it?", testing.draw_image((40, 40), 1), testing.draw_image((30, 50), 2))]
    glances = look(one, chat, "a red fish")
    encoded = processor.encode([*chat, assistant("a red fish")])
    ids = torch.tensor([encoded.input_ids])
    features = model.encode_images(processor.pixel_values(encoded.images))
    model.language_model.set_attn_implementation("eager")
    with torch.inference_mode():
        told = model.language_model(
            inputs_embeds=model.embed(ids, features), output_attentions=True
        ).attentions
    mean = torch.stack(told)[:, 0].mean(dim=(0, 1))  # (T, T)
    places = (ids[0] == processor.image_token_id).nonzero()[:, 0]
    first = next(i for i, learnt in enumerate(encoded.loss_mask) if learnt)
    assert "".join(glance.piece for glance in glances).strip() == "a red fish"
    for number, glance in enumerate(glances):
        expected = mean[first + number - 1][places].view(2, -1).numpy()
        assert np.allclose([m.ravel() for m in glance.maps], expected, atol=1e-6)
        assert 0 <= glance.share < 1
        assert glance.share > 0 or language == "mistral"  # whose window is short
    assert model.language_model.config._attn_implementation == "eager"  # as it was


def test_the_built_in_model_looks_where_the_thing_is(tmp_path: Path) -> None:
    """What is at a place is read there: by chance one in nine."""
    one, hits = load(), []
    for record in read_records(build(40, 11, tmp_path, turns=6)):
        turns = zip(record.messages[::2], record.messages[1::2], strict=True)
        for question, answer in turns:
            place = next((n for n, p in enumerate(PLACES) if question.text.endswith(f"{p}?")), None)
            if place is None or "what is" not in question.text or "nothing" in answer.text:
                continue
            glances = look(one, [user(question.text, record.images[0])], answer.text)
            grid = sum(glance.maps[0] for glance in glances)
            edges = np.linspace(0, len(grid), 4).round().astype(int)
            cells = np.add.reduceat(np.add.reduceat(grid, edges[:3], 0), edges[:3], 1)
            sizes = np.outer(np.diff(edges), np.diff(edges))
            hits.append((cells / sizes).argmax() == place)
    assert len(hits) >= 8 and np.mean(hits) >= 0.7, hits


def test_what_cannot_be_looked_at_is_told(tmp_path: Path) -> None:
    one = load()
    with pytest.raises(MessageError, match="no picture"):
        look(one, [user("what?")], "yes")
    with pytest.raises(MessageError, match="answer is empty"):
        look(one, [user("what?", testing.draw_image())], " ")

    class Other:
        name, engine = "other", None

    with pytest.raises(ConfigError, match="other is no LLaVA folder"):
        look(Other(), [user("what?", testing.draw_image())], "yes")  # type: ignore[arg-type]


def test_words_are_their_tokens_mean() -> None:
    pieces: list[tuple[str, Any]] = [("a", 1.0), (" fi", 2.0), ("sh", 4.0)]
    glances = [Glance(piece, (np.full((2, 2), value),)) for piece, value in pieces]
    words = words_of(glances)
    assert [(word.piece, word.maps[0].tolist()) for word in words] == [
        ("a", [[1.0, 1.0], [1.0, 1.0]]),
        ("fish", [[3.0, 3.0], [3.0, 3.0]]),
    ]


def test_the_sheet_is_red_where_it_looked(tmp_path: Path) -> None:
    grid = np.zeros((3, 3))
    grid[0, 2] = 0.5
    drawn = np.asarray(overlay(Image.new("RGB", (90, 90), "gray"), grid)).astype(int)
    redness = drawn[..., 0] - drawn[..., 2]
    assert redness[15, 75] > 60 and abs(redness[75, 15]) <= 1
    assert drawn[75, 15].min() > 150  # paler than the picture
    one, picture = load(), testing.draw_image((60, 40))
    glances = look(one, [user("what is it?", picture)], "a $x cat\x07")
    write_sheet(tmp_path / "look.png", one.processor, [picture], glances)
    assert Image.open(tmp_path / "look.png").size[0] > 500
    with pytest.raises(ConfigError, match=r"look\.nonsense cannot be written"):
        write_sheet(tmp_path / "look.nonsense", one.processor, [picture], glances)
