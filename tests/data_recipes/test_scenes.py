"""The drawn world: pictures show what the scene says, and words say what is shown."""

import hashlib
import json
import random

import numpy as np
import pytest
from PIL import Image

from data_recipes.scenes import build, draw_scene, make_scene
from data_recipes.scenes.build import make_scene as scene_of
from data_recipes.scenes.names import CHARACTER_OF, EMOJI_NAMES
from data_recipes.scenes.sprites import emoji_sprite, find_font, render_emoji
from data_recipes.scenes.world import COLOURS, HELD_OUT, Scene, SceneObject, draw_lots
from vlm.errors import ConfigError, MissingExtraError
from vlm.messages import read_records


def thing(name: str, place: int, colour: str | None = None) -> SceneObject:
    kind = "shape" if colour else "emoji"
    return SceneObject(
        kind=kind, name=name, colour=colour, place=place, size=1 / 3, dx=0.0, dy=0.0, angle=0
    )


def plain(*objects: SceneObject) -> Scene:
    white = ((255, 255, 255), (255, 255, 255))
    return Scene(objects=objects, background="plain", colours=white, noise_seed=0)


def test_a_shape_has_its_colour_in_its_place_and_nowhere_else() -> None:
    picture = np.asarray(draw_scene(plain(thing("square", 5, "red")), side=96))
    assert tuple(picture[48, 80]) == COLOURS["red"]  # middle of the place "middle right"
    rest = picture.copy()
    rest[32:64, 64:96] = 255
    assert (rest == 255).all()


def test_every_place_is_a_third_of_the_picture() -> None:
    for place in range(9):
        picture = np.asarray(draw_scene(plain(thing("circle", place, "black")), side=300))
        ys, xs = np.nonzero(picture.sum(2) < 300)
        assert (ys.mean() // 100, xs.mean() // 100) == divmod(place, 3)


def test_objects_at_the_edge_stay_whole() -> None:
    edge = SceneObject(
        kind="shape", name="circle", colour="black", place=0, size=0.36, dx=-0.03, dy=-0.03, angle=0
    )
    corner = np.asarray(draw_scene(plain(edge), side=96)).sum(2) < 300
    middle = np.asarray(draw_scene(plain(thing("circle", 4, "black")), side=96)).sum(2) < 300
    assert corner.sum() > middle.sum()  # larger, and not cut


def test_the_sprite_sheet_shows_what_the_font_draws() -> None:
    font = find_font()
    for name in ("dog", "crown", "hot dog", "kite", EMOJI_NAMES[0], EMOJI_NAMES[-1]):
        fresh = render_emoji(CHARACTER_OF[name], font).resize((32, 32), Image.Resampling.LANCZOS)
        stored = emoji_sprite(name, 32, 0)
        difference = np.abs(
            np.asarray(fresh, np.float32)[..., 3] - np.asarray(stored, np.float32)[..., 3]
        )
        assert difference.mean() < 12, name


def test_a_missing_font_names_the_package(tmp_path) -> None:
    with pytest.raises(MissingExtraError, match="apt-get install fonts-noto-color-emoji"):
        find_font((tmp_path / "none.ttf",))


def test_there_are_at_least_a_hundred_emoji_with_short_unicode_names() -> None:
    assert len(set(EMOJI_NAMES)) == len(EMOJI_NAMES) >= 100
    assert all(len(name.split()) <= 2 for name in EMOJI_NAMES)


def test_held_out_combinations_appear_in_their_split_only() -> None:
    def combinations(split: str) -> list[bool]:
        scenes = [make_scene(3, index, split=split)[0] for index in range(300)]
        return [any((o.colour, o.name) in HELD_OUT for o in scene.objects) for scene in scenes]

    assert not any(combinations("train"))
    assert not any(combinations("test"))
    assert all(combinations("heldout"))


def test_scenes_follow_from_the_seed_and_splits_differ() -> None:
    assert make_scene(1, 7)[0] == scene_of(1, 7)[0]
    assert make_scene(1, 7)[0] != make_scene(2, 7)[0]
    train = {make_scene(1, i)[0].noise_seed for i in range(500)}
    test = {make_scene(1, i, split="test")[0].noise_seed for i in range(500)}
    assert not train & test


def test_objects_stand_in_different_places_and_counts_are_even() -> None:
    scenes = [make_scene(5, index)[0] for index in range(800)]
    for scene in scenes:
        assert len({item.place for item in scene.objects}) == len(scene.objects)
    sizes = np.bincount([len(scene.objects) for scene in scenes], minlength=5)[1:]
    assert sizes.sum() == 800 and (abs(sizes - 200) < 45).all()


def test_too_many_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="num_objects is 7"):
        draw_lots(random.Random(0), num_objects=7)


def test_build_writes_the_same_bytes_for_the_same_seed(tmp_path) -> None:
    def digest(folder) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    build(12, 4, tmp_path / "a", split="test")
    build(12, 4, tmp_path / "b", split="test")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert len(digest(tmp_path / "a")) == 13


def test_records_are_readable_and_bound_to_their_pictures(tmp_path) -> None:
    path = build(10, 1, tmp_path, turns=3)
    records = list(read_records(path))
    assert len(records) == 10
    for record in records:
        with Image.open(record.images[0]) as picture:
            assert picture.size == (96, 96)
        assert [m.role for m in record.messages] == ["user", "assistant"] * 3


def test_close_ups_hold_the_object(tmp_path) -> None:
    path = build(10, 1, tmp_path, task="phrases", close_up=True)
    for record in read_records(path):
        with Image.open(record.images[0]) as picture:
            assert picture.size == (48, 48)
            pixels = np.asarray(picture, np.float32)
        assert pixels[12:36, 12:36].std() > 8
        assert len(record.messages) == 2


def test_texts_need_no_picture(tmp_path) -> None:
    for task in ("language", "pairs"):
        path = build(5, 1, tmp_path / task, task=task)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == 5 and not any("images" in line for line in lines)
        assert not (tmp_path / task / "images").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num": 0}, "num is 0; it must be from 1"),
        ({"task": "sing"}, "no task 'sing'"),
        ({"split": "dev"}, "no split 'dev'"),
        ({"side": 8}, "side is 8"),
        ({"max_objects": 9}, "max_objects is 9"),
    ],
)
def test_wrong_arguments_name_the_value(tmp_path, wrong, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**{"num": 1, "seed": 0, "out": tmp_path, **wrong})
