"""Evaluation: each question with its picture, and the controls that hide the picture."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm import testing
from vlm.assistant import Assistant, load
from vlm.errors import ConfigError, ImageError, RecordError
from vlm.evaluation import derange, evaluate, questions_of
from vlm.images import ImageSource
from vlm.messages import Record


class Looker:
    """Answers with the name of the picture that it is shown; keeps what it was asked."""

    name = "looker"

    def __init__(self) -> None:
        self.asked: list[tuple[ImageSource, str]] = []
        self.batch_sizes: list[int] = []

    def ask_many(
        self, pairs: Iterable[tuple[ImageSource, str]], batch_size: int = 1
    ) -> Iterator[str]:
        self.batch_sizes.append(batch_size)
        for image, text in pairs:
            self.asked.append((image, text))
            yield image if isinstance(image, str) else "nothing"


def record(name: str, *questions: Any, **meta: Any) -> Record:
    listed = list(questions) or [
        {"question": f"who is {name}?", "answer": name, "kind": "who", "place": 3},
        {"question": "is it?", "answer": "yes", "kind": "is"},
    ]
    return Record(name, (name,), meta={"questions": listed, **meta})


RECORDS = [record(f"{letter}.png") for letter in "abcde"]


def test_every_question_goes_with_its_own_picture() -> None:
    looker = Looker()
    report = evaluate(looker, iter(RECORDS), batch_size=7)
    expected = [(f"{x}.png", q) for x in "abcde" for q in (f"who is {x}.png?", "is it?")]
    assert looker.asked == expected and looker.batch_sizes == [7]
    assert (report.model, report.control) == ("looker", None)
    who = next(kind for kind in report.kinds if kind.kind == "who")
    assert (who.n, who.correct, who.majority) == (5, 5, 1)
    assert report.overall.n == 10 and report.overall.correct == 5
    assert [question.record for question in report.questions] == [x for x, _ in expected]


def test_shuffled_pictures_are_never_ones_own() -> None:
    looker = Looker()
    report = evaluate(looker, RECORDS, shuffle_pictures=True)
    assert report.control == "shuffled pictures"
    shown = {q.image: image for q, (image, _) in zip(report.questions, looker.asked, strict=True)}
    assert all(own != other for own, other in shown.items())
    assert sorted(map(str, shown.values())) == sorted(shown)
    assert [text for _, text in looker.asked] == [q.text for q in report.questions]
    assert report.overall.correct == 0
    again, other = Looker(), Looker()
    evaluate(again, RECORDS, shuffle_pictures=True)
    evaluate(other, RECORDS, shuffle_pictures=True, seed=1)
    assert again.asked == looker.asked != other.asked


def test_blind_shows_one_grey_picture() -> None:
    looker = Looker()
    report = evaluate(looker, RECORDS, blind=True)
    assert report.control == "blank picture" and report.overall.correct == 0
    for image, _ in looker.asked:
        assert isinstance(image, Image.Image)
        assert (image.size, image.getcolors()) == ((224, 224), [(224 * 224, (128, 128, 128))])


@pytest.mark.parametrize("number", [2, 3, 10, 257])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_derangement_is_one_cycle(number: int, seed: int) -> None:
    names = [str(i) for i in range(number)]
    found = derange([*names, *names[:1]], seed)
    assert set(found) == set(found.values()) == set(names)
    seen, here = [], names[0]
    for _ in names:
        seen.append(here)
        here = found[here]
    assert here == names[0] and len(set(seen)) == number
    assert derange(reversed(names), seed) == found


def test_all_derangements_of_four_in_one_cycle_occur() -> None:
    found = {tuple(sorted(derange("abcd", seed).items())) for seed in range(200)}
    assert len(found) == 6  # (4 - 1)!


# Wrong input


def test_controls_that_cannot_be_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        evaluate(Looker(), RECORDS, shuffle_pictures=True, blind=True)
    with pytest.raises(ConfigError, match="at least two"):
        evaluate(Looker(), [RECORDS[0], record("a.png")], shuffle_pictures=True)


def test_records_without_any_question_are_refused() -> None:
    for records in ([], [Record("a", ("a.png",))]):
        with pytest.raises(RecordError, match="no questions"):
            evaluate(Looker(), records)
    assert evaluate(Looker(), [Record("x", ("x.png",)), *RECORDS]).overall.n == 10


@pytest.mark.parametrize(
    "question",
    [
        "who?",
        None,
        {},
        {"question": "who?", "answer": "a"},
        {"question": "who?", "answer": " ", "kind": "who"},
        {"question": "who?", "answer": 3, "kind": "who"},
        {"question": ["who?"], "answer": "a", "kind": "who"},
    ],
)
def test_malformed_questions_are_told_by_record_and_number(question: Any) -> None:
    good = {"question": "who?", "answer": "a", "kind": "who"}
    looker = Looker()
    with pytest.raises(RecordError, match=r"'bad', question 2"):
        evaluate(looker, [*RECORDS, record("bad", good, question)])
    assert not looker.asked  # told before the model is troubled


def test_records_need_one_picture_and_a_list() -> None:
    for pictures in ((), ("a.png", "b.png")):
        with pytest.raises(RecordError, match=f"'x' has {len(pictures)} pictures"):
            list(questions_of(Record("x", pictures)))
    with pytest.raises(RecordError, match="must be a list"):
        list(questions_of(record("x", questions={"question": "who?"})))


# A real model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return load(testing.tiny_llava_folder(folder, "qwen2", seed=1))


def test_a_real_model_is_asked_about_real_pictures(model: Assistant, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{seed}.png") for seed in range(3)]
    for seed, path in enumerate(paths):
        testing.draw_image(seed=seed).save(path)
    answers = [model.ask(path, "what?") for path in paths]
    assert len(set(answers)) == 3
    records = [
        record(path, {"question": "what?", "answer": answer, "kind": "what"})
        for path, answer in zip(paths, answers, strict=True)
    ]
    seeing = evaluate(model, records, batch_size=2)
    assert (list(seeing.answers), seeing.overall.correct) == (answers, 3)
    assert seeing.model == "tiny"
    shuffled = evaluate(model, records, shuffle_pictures=True)
    assert sorted(shuffled.answers) == sorted(answers) and shuffled.overall.correct == 0
    blind = evaluate(model, records, blind=True)
    assert len(set(blind.answers)) == 1
    assert blind.answers[0] == model.ask(Image.new("RGB", (28, 28), (128, 128, 128)), "what?")
    (tmp_path / "2.png").unlink()
    with pytest.raises(ImageError, match=r"2\.png"):
        evaluate(model, records)
