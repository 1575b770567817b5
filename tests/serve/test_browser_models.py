"""The page in a real Chromium on real models: random weights, and the built-in one."""

from pathlib import Path
from typing import Any

import vlm
from data_recipes.scenes import Scene, SceneObject, draw_scene
from serve.app import running
from vlm.testing import tiny_llava_folder


def test_a_real_model_streams_stops_and_reports(
    open_tab: Any, picture: Path, tmp_path: Path
) -> None:
    """Random weights: what it says means nothing, but every part is the real one."""
    tiny_llava_folder(tmp_path / "tiny")
    assistant = vlm.load(tmp_path / "tiny", device="cpu")
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:-20])
    with running(assistant, port=0) as url:
        visitor = open_tab(url)
        visitor.attach(picture)
        said = visitor.ask("hi")
        assert said and "\u26a0" not in said
        assert said.split() == assistant.ask(picture, "hi").split()
        visitor.attach(broken)
        assert "broken.png" in visitor.ask("and this?")
        too_much = visitor.ask("word " * 20_000)
        assert too_much.startswith("\u26a0")
        assert "positions" in too_much
        visitor.context.close()  # before its server goes


def scene() -> Scene:
    def thing(kind: Any, name: str, colour: str | None, place: int) -> SceneObject:
        return SceneObject(
            kind=kind, name=name, colour=colour, place=place, size=1 / 3, dx=0, dy=0, angle=0
        )

    return Scene(
        objects=(
            thing("emoji", "dog", None, 0),
            thing("shape", "circle", "red", 4),
            thing("shape", "square", "blue", 8),
        ),
        background="plain",
        colours=((240, 240, 250), (240, 240, 250)),
        noise_seed=0,
    )


def test_the_built_in_model_answers_about_a_freshly_drawn_scene(
    open_tab: Any, tmp_path: Path
) -> None:
    path = tmp_path / "scene.png"
    draw_scene(scene(), side=288).save(path)
    with running(vlm.load(device="cpu"), port=0) as url:
        visitor = open_tab(url)
        visitor.attach(path)
        assert "three" in visitor.ask("how many objects are there?")
        assert "dog" in visitor.ask("what is top left?")
        visitor.screenshot("built-in")
        assert "red" in visitor.ask("what colour is the circle?")
        assert visitor.ask("is there a blue square?").startswith("yes")
        visitor.tab.locator("#new-chat").click()
        visitor.tab.locator("#chat .example").first.wait_for()
        visitor.context.close()


def test_it_shows_where_it_looked(open_tab: Any, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    draw_scene(scene(), side=288).save(path)
    with running(vlm.load(device="cpu"), port=0) as url:
        visitor = open_tab(url)
        visitor.tab.get_by_text("Where it looked").click()
        visitor.tab.locator("#look").click()
        visitor.tab.get_by_text("There is no answer about a picture yet.").wait_for()
        visitor.attach(path)
        said = visitor.ask("what is top left?")
        assert "dog" in said
        visitor.tab.locator("#look").click()
        words = visitor.tab.locator("#look-words .caption-label")
        words.filter(has_text="dog").first.wait_for()
        assert words.all_inner_texts() == ["all words", *said.split()]
        visitor.tab.locator("#look-words img").nth(len(said.split())).wait_for()
        visitor.screenshot("looked")
        visitor.context.close()  # before its server goes
