"""Mixtures: the shares that were asked for, in an order that nothing but the seed changes."""

import doctest
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import data_recipes.mix.order
from data_recipes.formats import read, write_parquet
from data_recipes.mix import Mixture, gather, load_mix, mix
from data_recipes.mix.order import draw
from vlm.errors import ConfigError, RecordError
from vlm.messages import Record, assistant, read_records, user
from vlm.record_files import RecordFiles

Write = Callable[..., Path]
BEGINNING = ["b29", "a499", "a280", "a372", "a589", "a166", "a567", "a636"]
HASH = "5c2a45be0b72889cc7ba504eaa4b5eef7e376cf386244749fd18b784d04b2817"


class Characters:
    """A processor: one token a character, ten a picture."""

    num_visual_tokens, context_length = 10, 1000

    def encode_ids(self, messages: Any) -> tuple[list[int], list[bool]]:
        number = sum(len(m.text) + 10 * len(m.images) for m in messages)
        return [0] * number, [True] * number


def records(name: str, number: int) -> list[Record]:
    return [Record(f"{name}{i}", (), (user("q"), assistant(name * 5))) for i in range(number)]


def rows(folder: Path, name: str, number: int, picture: bool = True) -> None:
    """A LLaVA-like JSONL file with scores, sources and answers of growing length."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), "red").save(folder / "p.png")
    with (folder / "records.jsonl").open("w") as file:
        for i in range(number):
            asked = [*([{"type": "image"}] if picture else []), {"type": "text", "text": "what?"}]
            row = {
                "id": f"{name}{i}",
                "images": ["p.png"] if picture else [],
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": "x" * (i + 1)},
                ],
                "source": "odd" if i % 2 else "even",
                "license": "CC0",
                "meta": {"clip": i / 10},
            }
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def recipe(tmp_path: Path) -> Write:
    def write(**values: Any) -> Path:
        path = tmp_path / "mix.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def ids(found: Any) -> list[str]:
    return [found[i].id for i in range(len(found))]


def test_the_order_is_the_same_on_any_machine() -> None:
    """Literal hashes: what another machine, numpy or Python must give as well."""
    sources = [records("a", 700), records("b", 31), records("c", 5)]
    mixture = Mixture(sources, [500, 100, 12], seed=7)
    assert ids(mixture)[:8] == BEGINNING
    assert mixture.fingerprint() == HASH
    assert Mixture(sources, [500, 100, 12], seed=8).fingerprint() != HASH


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_one_order_also_after_a_resume(world: int) -> None:
    sources = [records("a", 90), records("b", 37)]
    counts = [60, 80]
    whole = ids(Mixture(sources, counts, seed=3))

    def together(ranks: list[Mixture], steps: int) -> list[str]:
        """What the ranks take, a record each at a time."""
        return [rank[i].id for i in range(steps) for rank in ranks if i < len(rank)]

    ranks = [Mixture(sources, counts, seed=3).shard(rank, world) for rank in range(world)]
    assert together(ranks, len(whole)) == whole
    assert sum(map(len, ranks)) == len(whole)

    stop = random.Random(world).randrange(1, len(ranks[-1]))
    states = [json.loads(json.dumps(rank.state(stop))) for rank in ranks]
    assert all(state == states[0] for state in states)
    taken = together(ranks, stop)
    for new_world in (1, 2, 4):
        again = Mixture(sources, counts, seed=3).resume(states[0])
        rest = [again.shard(rank, new_world) for rank in range(new_world)]
        assert taken + together(rest, len(whole)) == whole
        assert rest[0].state(2)["position"] == len(taken) + 2 * new_world


def test_a_state_of_another_mixture_is_refused() -> None:
    state = Mixture([records("a", 9)], [9], seed=0).state(3)
    with pytest.raises(ConfigError, match="of another mixture"):
        Mixture([records("a", 9)], [9], seed=1).resume(state)
    with pytest.raises(ConfigError, match="of another mixture"):
        Mixture([records("a", 8)], [8], seed=0).resume(state)
    shard = Mixture([records("a", 9)], [9]).shard(0, 2)
    with pytest.raises(ConfigError, match="shard already"):
        shard.shard(0, 2)
    with pytest.raises(ConfigError, match="no rank 2 of 2"):
        Mixture([records("a", 9)], [9]).shard(2, 2)
    with pytest.raises(IndexError):
        shard[5]
    assert shard[-1].id == shard[4].id


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_beginning_has_the_shares_of_the_whole(shuffle: bool) -> None:
    sizes, counts = [400, 30, 200], [250, 100, 50]
    order = draw(sizes, counts, 5, shuffle)
    source = np.searchsorted(np.cumsum(sizes), order, side="right")
    assert np.bincount(source).tolist() == counts
    for number in range(1, 401):
        seen = np.bincount(source[:number], minlength=3)
        exact = number * np.array(counts) / sum(counts)
        assert (abs(seen - exact) <= len(sizes) + 1).all()


def test_all_records_come_before_any_comes_again() -> None:
    again = ids(Mixture([records("a", 7), records("b", 20)], [24, 20], seed=1))
    of_a = [name for name in again if name[0] == "a"]
    for start in (0, 7, 14):
        assert len(set(of_a[start : start + 7])) == 7
    assert of_a[:7] != of_a[7:14]  # epochs differ
    kept = Mixture([records("a", 3), records("b", 3)], [3, 3], shuffle=False)
    assert ids(kept) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_mixture_of_files_of_any_format(tmp_path: Path, recipe: Write) -> None:
    rows(tmp_path / "a", "a", 12)
    llava = [
        {
            "id": f"l{i}",
            "image": "p.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?"},
                {"from": "gpt", "value": "a cat"},
            ],
        }
        for i in range(10)
    ]
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    inside = [Record(f"b{i}", (png(i),), (user("?", png(i)), assistant("x"))) for i in range(6)]
    write_parquet(inside, tmp_path / "b")
    path = recipe(
        size=40,
        seed=4,
        sources=[
            {"path": "a", "epochs": 1.5},
            {"path": "llava.json", "format": "llava", "images": "a", "weight": 3},
            {"path": "b", "weight": 1},
            {"path": "b/records.parquet", "count": 2},
        ],
    )
    mixed = mix(load_mix(path), tmp_path / "out")
    assert [each.taken for each in mixed.sources] == [18, 15, 5, 2]
    found = list(read_records(tmp_path / "out" / "records.jsonl"))
    assert Counter(record.id[0] for record in found) == {"a": 18, "l": 15, "b": 7}
    for record in found:
        (image,) = record.images
        inside_out = str(image).startswith(str(tmp_path / "out" / "images"))
        assert inside_out == (record.id[0] == "b")
        assert Image.open(str(image)).size == ((4, 3) if record.id[0] != "b" else (3, 2))
    used = {record.images[0] for record in found if record.id[0] == "b"}
    assert len(list((tmp_path / "out" / "images").iterdir())) == len(used)
    account = json.loads((tmp_path / "out" / "mix.json").read_text())
    assert (account["records"], account["order"]) == (40, mixed.order)
    assert account["config"]["seed"] == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "images",
        "mix.json",
        "records.jsonl",
    ]
    again = mix(load_mix(path), tmp_path / "again")
    lines = [(tmp_path / name / "records.jsonl").read_bytes() for name in ("out", "again")]
    assert lines[0] == lines[1] and again.order == mixed.order


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("filters", "kept", "reason"),
    [
        ({"min_characters": 8, "max_characters": 10}, "234", "characters"),  # 5 + i + 1
        ({"min_score": {"clip": 0.7}}, "789", "min_score clip"),
        ({"min_score": {"nsfw": 0.1}}, "", "min_score nsfw"),
        ({"sources": ["odd", "other"]}, "13579", "sources"),
        ({"licenses": ["MIT"]}, "", "licenses"),
        ({"has_picture": True}, "0123456789", ""),
        ({"has_picture": False}, "", "has_picture"),
        ({"min_tokens": 17, "max_tokens": 18}, "12", "tokens"),  # 10 + 5 + i + 1
        ({"sources": ["odd"], "min_score": {"clip": 0.2}}, "3579", "sources"),
    ],
)
def test_filters_keep_what_they_say(
    filters: dict[str, Any], kept: str, reason: str, tmp_path: Path, recipe: Write
) -> None:
    rows(tmp_path / "a", "", 10)
    config = load_mix(recipe(sources=[{"path": "a", "filters": filters}], shuffle=False))
    if not kept:
        with pytest.raises(ConfigError, match=rf"nothing is kept of .*/a: .*{reason} 10; widen"):
            gather(config, tmp_path / "pool", Characters())
        return
    mixture, (told,) = gather(config, tmp_path / "pool", Characters())
    assert "".join(ids(mixture)) == kept
    assert (told.read, told.kept) == (10, len(kept))
    assert sum(told.left_out.values()) == 10 - len(kept)
    assert next(iter(told.left_out), "") == reason


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"sources": [{"path": "a", "wieght": 2}]}, r"'sources.0.wieght'; did you mean 'sources.w"),
        ({"sources": [{"path": "a", "filters": {"max_token": 2}}]}, r"did you mean .*max_tokens"),
        ({"sources": []}, "at least 1 item"),
        ({"seed": 1}, "'sources' is missing"),
        ({"sources": [{"path": "a", "weight": 1}]}, "add size"),
        ({"sources": [{"path": "a"}], "size": 3}, "size goes with sources that have a weight"),
        ({"sources": [{"path": "a", "count": 1, "epochs": 2}]}, "a: epochs and count exclude"),
        ({"sources": [{"path": "a", "weight": -1}], "size": 3}, "greater than 0"),
    ],
)
def test_wrong_recipes_are_told(values: dict[str, Any], text: str, recipe: Write) -> None:
    with pytest.raises(ConfigError, match=text):
        load_mix(recipe(**values))


def test_what_cannot_be_mixed_is_told(tmp_path: Path, recipe: Write) -> None:
    rows(tmp_path / "a", "a", 10)
    source = {"path": "a"}
    config = load_mix(recipe(sources=[{**source, "filters": {"max_tokens": 3}}]))
    with pytest.raises(ConfigError, match="--model"):
        gather(config, tmp_path / "pool")
    config = load_mix(recipe(sources=[source, {**source, "weight": 1}], size=4))
    with pytest.raises(ConfigError, match="have 10 records, but size is 4"):
        gather(config, tmp_path / "pool")
    with pytest.raises(ConfigError, match="holds the source"):
        mix(load_mix(recipe(sources=[source])), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file"):
        load_mix(tmp_path / "nothing.yaml")
    with pytest.raises(RecordError, match="no data file"):
        mix(load_mix(recipe(sources=[{"path": "gone"}])), tmp_path / "out")
    assert not (tmp_path / "out" / ".mix").exists()
    line = (tmp_path / "a" / "records.jsonl").read_text().replace('"clip": 0.0', '"clip": "good"')
    (tmp_path / "a" / "records.jsonl").write_text(line)
    scores = {"min_score": {"clip": 0.1}}
    with pytest.raises(RecordError, match="'a0': its meta has 'good' as clip"):
        mix(load_mix(recipe(sources=[{**source, "filters": scores}])), tmp_path / "out")


def test_bad_rows_end_a_mixture_or_are_told(tmp_path: Path, recipe: Write) -> None:
    rows(tmp_path / "a", "a", 4)
    with (tmp_path / "a" / "records.jsonl").open("a") as file:
        file.write('{"id": "broken"\n')
    config = load_mix(recipe(sources=[{"path": "a"}]))
    with pytest.raises(RecordError, match=r"line 5: not JSON"):
        mix(config, tmp_path / "out")
    assert not (tmp_path / "out" / "mix.json").exists()
    told: list[Any] = []
    assert mix(config, tmp_path / "out", faults=told.append).records == 4
    assert [fault.line for fault in told] == [5]


def test_a_mixture_is_trained_from_as_any_data(tmp_path: Path, recipe: Write) -> None:
    """`vlm train` opens the file by the same class."""
    rows(tmp_path / "a", "a", 5)
    mix(load_mix(recipe(sources=[{"path": "a"}])), tmp_path / "out")
    found = RecordFiles([tmp_path / "out" / "records.jsonl"])
    assert sorted(ids(found)) == [f"a{i}" for i in range(5)]
    with pytest.raises(RecordError, match="allow its folder by --images"):
        list(read(tmp_path / "out"))
    assert len(list(read(tmp_path / "out", images=tmp_path))) == 5


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(data_recipes.mix.order).failed == 0
