"""The report of a run: whole, escaped, and in need of nothing else."""

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import TrainerState

from train.charts import HEIGHT, WIDTH, draw, number
from train.config import RunConfig
from train.gallery import Answered
from train.page import charts, samples, write_page
from train.run import run
from train.stages import PartReport
from vlm.history import versions
from vlm.testing import draw_image

Recipe = Callable[..., str]
Scenes = Callable[..., str]
NASTY = "<script>alert('x')</script> & \"quotes\"\nsecond line \ud800"
VOID = {"meta", "img", "br", "link", "input"}


class Reader(HTMLParser):
    """Every tag closed in its order, what links anywhere, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    values = {"stage": "align", "output": str(tmp_path), "data": [f"{NASTY}.jsonl"]}
    parts = {"vision": "<v>", "language": "l"}
    return RunConfig.model_validate(
        {**values, "model": parts, "learning_rate": 0.1, "batch_size": 1}
    )


def answered(step: int, answer: str, **more: Any) -> Answered:
    values = {"id": "a", "images": (), "question": "which?", "expected": "A cat."}
    return Answered(step=step, answer=answer, **{**values, **more})


def test_everything_is_escaped_and_nothing_is_fetched(tmp_path: Path, config: RunConfig) -> None:
    draw_image((640, 480)).save(tmp_path / "wide.png")
    pictures = (str(tmp_path / "wide.png"), str(tmp_path / "<u>none.png"))
    asked = {"images": pictures, "question": NASTY, "expected": NASTY}
    answers = [answered(1, NASTY, **asked), answered(2, "", error=NASTY, **asked)]
    history = [{"step": 1, "loss": 2.0, "grad_norm_<i>": 1.0, "grad_norm": 1.0}]
    state = TrainerState(global_step=1, max_steps=2, epoch=0.5, log_history=history)
    parts = [PartReport("<i>part", "FROZEN", 1234567, 0)]
    write_page(config, parts, state, answers, {"training": 3})

    page = read(tmp_path / "report.html")
    assert {"script", "link", "iframe", "u", "i"}.isdisjoint(page.tags)
    assert page.tags.count("img") == 1
    (uri,) = page.links
    kind, _, data = uri.partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert kind == "data:image/jpeg" and image.format == "JPEG"
        assert image.size == (320, 240)
    source = (tmp_path / "report.html").read_text(encoding="utf-8").replace(uri, "")
    assert not re.search(r"https?:|//\w|url\(|@import", source)
    visible = NASTY.replace("\ud800", "?")
    assert page.text.count(visible) == 5  # data, question, expected answer, answer, error
    for told in ("<u>none.png cannot be shown", "<i>part", "1,234,567", "<v>", "3 samples"):
        assert told in page.text, told
    assert "not finished" in page.text and versions()["torch"] in page.text
    assert not (tmp_path / "report.html.tmp").exists()


def test_equal_answers_in_a_row_are_one_stretch() -> None:
    said = ["a dog", "a cat", "a cat", "a dog", ""]
    answers = [answered(10 * n, text) for n, text in enumerate(said, 1)]
    other = answered(50, "x", id="b")
    first, second = samples([*answers, other])
    assert [(s.steps, s.answer, s.right) for s in first.stretches] == [
        ("10", "a dog", False),
        ("20–30", "a cat", True),
        ("40", "a dog", False),
        ("50", "", False),
    ]
    assert [s.answer for s in second.stretches] == ["x"]


def test_a_run_leaves_a_report_with_all_that_was_seen(
    tmp_path: Path, recipe: Recipe, scenes: Scenes, llava: str
) -> None:
    data = scenes("instruct")
    values = {"stage": "instruct", "data": [data], "eval_data": data, "model": {"start": llava}}
    watch = {"samples": 5, "probes": 3}
    more = {"lora": {"r": 2, "alpha": 4}, "watch": watch, "log_steps": 1}
    output = run(recipe(tmp_path / "out", **values, **more))
    page = read(output / "report.html")
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert page.tags.count("article") == 5 == len({row["id"] for row in rows})
    for row in rows:
        assert row["question"] in page.text and row["expected"] in page.text
        assert not row["answer"] or row["answer"] in page.text
    assert page.tags.count("svg") == 6
    for told in ("held out", "right picture", "another", "blank", "projector", "adapter", "LORA"):
        assert told in page.text, told
    assert "it looks: " in page.text or "it does not look yet: " in page.text
    assert "learning_rate: 0.01" in page.text  # the whole recipe
    assert {link.partition(",")[0] for link in page.links} == {"data:image/jpeg;base64"}


def test_charts_show_what_the_history_has() -> None:
    history = [
        {"step": 1, "loss": 4.0, "grad_norm": 5.0, "grad_norm_adapter": 3.0, "grad_norm_x_y": 4.0},
        {"step": 1, "probe_right": 1.0, "probe_blank": 2.0, "probe_other": 3.0},
        {"step": 2, "loss": 2.0, "learning_rate": 0.1},
        {"step": 2, "eval_loss": 3.0},
    ]
    found = {chart.title: [line.label for line in chart.lines] for chart in charts(history)}
    assert found == {
        "Loss": ["training", "held out"],
        "Sight probes: loss a token": ["right picture", "blank", "another"],
        "Gradient norm before clipping": ["all", "adapter", "x y"],
        "Learning rate": ["all"],
    }
    assert charts([]) == []


@pytest.mark.parametrize(("values", "middle"), [((1, 2, 3), 2), ((0.1, 1, 10), 1), ((5, 5, 5), 5)])
def test_points_are_where_they_belong(values: tuple[float, ...], middle: float) -> None:
    chart = draw("t", {"l": [(10.0 * n, v) for n, v in enumerate(values, 1)]})
    assert chart is not None
    (line,) = chart.lines
    across, down = zip(*((dot.x, dot.y) for dot in line.dots), strict=True)
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    assert down[0] - down[1] == pytest.approx(down[1] - down[2], abs=0.2)  # evenly, or as decades
    assert all(0 <= x <= WIDTH for x in across) and all(0 <= y <= HEIGHT for y in down)
    assert line.last == number(values[-1]) and len(chart.y_ticks) >= 2
    places = {tick.label: tick.at for tick in chart.y_ticks}
    if number(middle) in places:
        assert places[number(middle)] == pytest.approx(down[1], abs=0.1)
    assert re.fullmatch(r"M[\d.]+ [\d.]+( L[\d.]+ [\d.]+){2}", line.path)


def test_one_point_is_a_chart_and_none_is_not() -> None:
    one = draw("t", {"a": [(3.0, 0.0)], "b": []})
    assert one is not None and [line.label for line in one.lines] == ["a"]
    assert one.lines[0].dots[0].text == "step 3: 0"
    assert draw("t", {"a": []}) is None
    assert (number(12345.6), number(0.00123456), number(0)) == ("12,346", "0.00123", "0")
