"""The contact sheet: what it marks as learnt is what the processor says is learnt."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import data_recipes.preview.cards
from data_recipes.preview import preview
from data_recipes.preview.page import sample
from vlm import testing
from vlm.as_seen import AsSeen
from vlm.errors import ConfigError
from vlm.messages import Record, assistant, user
from vlm.processor import Processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = testing.tiny_llava_folder(tmp_path_factory.mktemp("preview") / "model")
    return Processor.from_folder(folder)


class Page(HTMLParser):
    """Spans of tokens of each article, other text, and tags that were opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cards: list[list[tuple[set[str], str]]] = []
        self.text, self.tags, self.sources = "", Counter[str](), []
        self._token: set[str] | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attrs)
        classes = set((values.get("class") or "").split())
        if tag == "article":
            self.cards.append([])
        self._token = classes if "t" in classes and self.cards else None
        self.sources += [values[key] for key in ("src", "href") if key in values]

    def handle_endtag(self, tag: str) -> None:
        self._token = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._token is not None:
            self.cards[-1].append((self._token, data))


def record(name: str, *images: str | bytes, answer: str = "a cat", question: str = "?") -> Record:
    return Record(name, images, (user(question, *images), assistant(answer)))


def test_learnt_tokens_are_marked_as_the_processor_learns_them(
    processor: Processor, tmp_path: Path
) -> None:
    testing.draw_image(seed=1).save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    records = [
        record("one", picture, answer="Ein Öl.\nGut <b>", question="was <i>?"),
        record("two", picture, Path(picture).read_bytes(), answer="🍎"),
        record("none", answer="</s>"),
    ]
    out = tmp_path / "p.html"
    preview(records, out, AsSeen(processor), title="x", model="m")
    page = Page(out)
    assert len(page.cards) == 3 and page.tags["img"] == 3
    for shown, each in zip(page.cards, records, strict=True):
        ids, mask = processor.encode_ids(each.messages)
        wanted = [number for number, learnt in zip(ids, mask, strict=True) if learnt]
        learnt = "".join(text for classes, text in shown if "l" in classes)
        decoded = processor.tokenizer.decode(wanted, skip_special_tokens=False)
        assert learnt == decoded.replace("\n", "↵\n")
        pictures = [text for _, text in shown if " × " in text]
        assert pictures == [f"<image> × {processor.num_visual_tokens}"] * len(each.images)
    assert "s" in page.cards[2][-1][0] and page.cards[2][-1][1] == "</s>"
    assert re.search(r"\b2 +learnt", page.text.replace("\n", " ")) is None


def test_nothing_of_the_data_is_html(processor: Processor, tmp_path: Path) -> None:
    bad = "</span><script>alert(1)</script><img src=http://example.org/x>\"'&"
    odd = str(tmp_path / '"><b>.png')
    Image.new("RGB", (9, 9)).save(odd)
    each = Record(bad, (odd,), (user(bad, odd), assistant(bad)), source=bad, license=bad)
    out = tmp_path / "p.html"
    preview([each], out, AsSeen(processor), title=bad, model=bad)
    page = Page(out)
    assert not {"script", "b", "iframe", "link"} & set(page.tags) - {"b"}
    assert page.tags["b"] == 1 and page.tags["img"] == 1  # the card's own
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert page.text.count("<script>alert(1)</script>") >= 6
    assert "default-src 'none'" in out.read_text()


def test_what_cannot_be_shown_is_told(processor: Processor, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    missing, broken = (str(tmp_path / name) for name in ("gone.png", "broken.png"))
    records = [
        record("pictures", missing, broken),
        Record("alone", (missing,)),
        Record("question", (), (user("and?"),)),
        record("long", answer="x" * processor.context_length),
    ]
    preview(records, tmp_path / "p.html", AsSeen(processor), title="x", model="m")
    page = Page(tmp_path / "p.html")
    text = " ".join(page.text.split())
    assert page.tags["img"] == 0 and text.count("gone.png' does not exist") == 2
    assert "No tokens: there are no turns" in text
    assert "0 learnt" in text
    assert f"more than the model's {processor.context_length:,} positions" in text
    with pytest.raises(ConfigError, match="cannot be written"):
        preview(records, tmp_path / "no" / "p.html", AsSeen(processor), title="x", model="m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png", "p.html"]


def test_tokens_that_are_left_out_are_counted(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_recipes.preview.cards, "_MOST_PIECES", 10)
    each = record("x", answer="y" * 40)
    ids, mask = processor.encode_ids(each.messages)
    preview([each], tmp_path / "p.html", AsSeen(processor), title="x", model="m")
    page = Page(tmp_path / "p.html")
    assert len(page.cards[0]) == 10
    hidden = f"and {len(ids) - 10} more tokens, {sum(mask[10:])} of them learnt"
    assert hidden in " ".join(page.text.split())


def test_a_sample_is_drawn_evenly_and_the_same_by_seed() -> None:
    records = [Record(str(i)) for i in range(20)]
    drawn, number = sample(iter(records), 5, seed=1)
    assert number == 20 and drawn == sample(records, 5, seed=1)[0] != sample(records, 5, seed=2)[0]
    assert [int(each.id) for each in drawn] == sorted(int(each.id) for each in drawn)
    assert sample(records, 50, seed=1) == (records, 20)
    seen = Counter(each.id for seed in range(2000) for each in sample(records, 5, seed)[0])
    assert len(seen) == 20 and all(abs(num - 500) < 100 for num in seen.values())  # 5 sigma
