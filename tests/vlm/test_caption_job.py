"""`vlm.caption_images`: prompts, words, copies, limits and interruptions of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from vlm import testing
from vlm.assistant import Assistant
from vlm.caption_prompts import CaptionPrompts
from vlm.errors import (
    ConfigError,
    ErrorLimitError,
    GenerationError,
    MessageError,
    RecordError,
)
from vlm.ledger import Summary

TOKENS = 16


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def run(model: Any, source: Any, out: Path, **options: Any) -> Summary:
    options = {"max_new_tokens": TOKENS, "batch_size": 3, **options}
    return vlm.caption_images(source, out, model=model, **options)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_row_has_all_that_is_known(model: Assistant, pictures: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = run(model, pictures, out, on_progress=lambda *facts: seen.append(facts))
    assert done == Summary(7, 0, 0) and seen[-1] == (7, 0)
    [answer] = model.generate(
        [[vlm.messages.user(model.caption_prompt, pictures / "0.png")]], max_new_tokens=TOKENS
    )
    first = rows(out)[0]
    assert list(first)[:3] == ["path", "status", "caption"]
    assert (first["status"], first["caption"]) == ("captioned", answer.text)
    assert first["mean_logprob"] == pytest.approx(answer.mean_logprob, abs=1e-4)
    assert 0 < first["read_ms"] < first["total_ms"] and 0 <= first["wait_ms"] < first["total_ms"]
    assert first["options"] == {} and len({row["run"] for row in rows(out)}) == 1
    assert not {"missing", "unwanted", "captions", "questions", "copy_of"} & set(first)


def test_several_prompts_give_several_captions(
    model: Assistant, pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = model.engine.model.encode_images
    monkeypatch.setattr(
        model.engine.model, "encode_images", lambda p: encoded.append(len(p)) or encode(p)
    )
    model.engine.cache.clear()
    prompts = {"short": "what is it?", "long": "describe all of it."}
    run(model, pictures, out, prompt=prompts, prefix="<", suffix=">")
    assert sum(encoded) == 7  # each picture once
    for row in rows(out):
        expected = {
            key: f"<{model.ask(row['path'], text, max_new_tokens=TOKENS)}>"
            for key, text in prompts.items()
        }
        assert {key: each["text"] for key, each in row["captions"].items()} == expected
        assert row["caption"] == expected["short"] and row["prompt"] == prompts


def test_prompts_may_hold_what_is_known_of_a_picture(
    model: Assistant, pictures: Path, out: Path, tmp_path: Path
) -> None:
    source = [{"image": str(pictures / "0.png"), "tags": ["dog", "cat"]}]
    text = "{{x}} {name} in {directory}: {tags} {"
    run(model, source, out, prompt=text)
    [row] = rows(out)
    assert row["questions"] == {"caption": "{x} 0 in pictures: dog, cat {"}
    asked = model.ask(pictures / "0.png", "{x} 0 in pictures: dog, cat {", max_new_tokens=TOKENS)
    assert row["caption"] == asked
    other = tmp_path / "other.jsonl"
    with pytest.raises(ConfigError, match=r"\{tags\} is not known.*directory, name"):
        run(model, pictures, other, prompt=text)
    source.append({"image": str(pictures / "1.png")})
    assert run(model, source, out, prompt=text) == Summary(0, 1, 1)
    assert rows(out)[1]["code"] == "prompt"
    source += [{"image": str(pictures / "2.png"), "tags": "a" * 900}]
    assert run(model, source, out, prompt=text) == Summary(0, 1, 2)
    assert rows(out)[2]["code"] == "context_length"
    source = [{"image": str(pictures / f"{i}.png"), "tags": "x" * (i == 0)} for i in range(2)]
    assert run(model, source, other, prompt="{tags}") == Summary(1, 1, 0)
    assert rows(other)[1]["code"] == "prompt"
    with pytest.raises(ConfigError, match="temperature"):
        run(model, source, other, prompt="{tags}", temperature=-1)


def test_words_that_are_missing_or_unwanted_are_told() -> None:
    prompts = CaptionPrompts("what?", include=["red dog", "cat"], discourage=["image", "a"])
    said = prompts.caption("An Image of a Red  dog", "stop", -0.5)
    assert (said.missing, said.unwanted) == (("red dog", "cat"), ("image", "a"))
    assert prompts.caption("red dog; concatenated images", "stop", None).missing == ("cat",)
    assert prompts.caption("red dog; concatenated images", "stop", None).unwanted == ()
    for words in (["a", " "], [3]):
        with pytest.raises(ConfigError, match=r"discourage is .*none empty"):
            CaptionPrompts("what?", discourage=words)
    with pytest.raises(ConfigError, match="include is the text 'dog'"):
        CaptionPrompts("what?", include="dog")
    with pytest.raises(ConfigError, match="no key"):
        CaptionPrompts({"a b": "what?"})
    with pytest.raises(ConfigError, match="no prompt"):
        CaptionPrompts({})
    with pytest.raises(MessageError):
        CaptionPrompts({"a": " "})


def test_discouraged_words_are_kept_out_and_make_another_run(
    model: Assistant, pictures: Path, out: Path, tmp_path: Path
) -> None:
    """Of letters, so that there are words: random weights write few otherwise."""
    letters = dict.fromkeys(model.processor.tokenizer.convert_tokens_to_ids(list("abcdeuvw")), 50)
    run(model, pictures, out, logit_bias=letters)
    plain = [row["caption"] for row in rows(out)]
    letter = plain[0][0]
    other = tmp_path / "other.jsonl"
    run(model, pictures, other, logit_bias=letters, discourage=[letter])
    kept = [row["caption"] for row in rows(other)]
    asked = {**letters, letter: -100}
    expected = [
        model.caption(row["path"], max_new_tokens=TOKENS, logit_bias=asked) for row in rows(other)
    ]
    assert kept == expected != plain and not any(letter in text.lower() for text in kept)
    runs = {row["run"] for row in rows(out) + rows(other)}
    assert len(runs) == 2 and rows(other)[0]["options"]["discourage_bias"] == -100
    for changed in ({}, {"discourage": ["zoo"]}, {"discourage": [letter, "zoo"]}):
        with pytest.raises(ConfigError, match="give another ledger"):
            run(model, pictures, other, logit_bias=letters, **changed)
    with pytest.raises(ConfigError, match="give another ledger"):
        run(model, pictures, other, logit_bias={**letters, 5: 1.0}, discourage=[letter])
    with pytest.raises(ConfigError, match="logit_bias of 3 is 500"):
        run(model, pictures, other, logit_bias={3: 500}, discourage=[letter])
    run(model, pictures, tmp_path / "own.jsonl", logit_bias={letter: 50}, discourage=[letter])
    own = rows(tmp_path / "own.jsonl")
    assert all(letter in row["caption"].lower() for row in own)  # a bias of one's own counts


def test_another_preprocessing_is_another_run_with_features_of_its_own(
    folder: Path, out: Path, tmp_path: Path
) -> None:
    model = vlm.load(folder)
    photo = tmp_path / "photo.jpg"
    testing.draw_image((640, 480), seed=4).save(photo)
    asked = [[vlm.messages.user("what?", photo)]]
    run(model, [photo], out)
    drafted = model.generate(asked, logprobs=0)
    model.processor.preprocessing = "exact"
    with pytest.raises(ConfigError, match=r"preprocessing None.*not 'exact'"):
        run(model, [photo], out)
    other = vlm.load(folder)
    other.processor.preprocessing = "exact"
    exact = model.generate(asked, logprobs=0)
    assert exact == other.generate(asked, logprobs=0)  # nothing drafted comes from the cache
    assert exact[0].mean_logprob != drafted[0].mean_logprob
    picture, keys = vlm.images.load_image(photo), set()
    for way in ("exact", "box", "draft"):  # of the same pixels
        model.processor.preprocessing = way
        keys.add(model.engine.encoder.key(picture))
    assert len(keys) == 3


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_the_same_bytes_are_captioned_once(
    model: Assistant, pictures: Path, out: Path, batch_size: int
) -> None:
    for name in ("0 again.png", "z.png"):
        (pictures / name).write_bytes((pictures / "0.png").read_bytes())
    assert run(model, pictures, out, batch_size=batch_size) == Summary(9, 0, 0, copied=2)
    found = {Path(row["path"]).name: row for row in rows(out)}
    first, copy = found["0 again.png"], found["z.png"]  # a space sorts before a dot
    assert (first["status"], copy["status"]) == ("captioned", "copied")
    assert copy["copy_of"] == found["0.png"]["copy_of"] == first["path"]
    assert (
        copy["caption"]
        == first["caption"]
        == model.caption(pictures / "z.png", max_new_tokens=TOKENS)
    )
    (pictures / "later.png").write_bytes((pictures / "0.png").read_bytes())
    assert run(model, pictures, out) == Summary(1, 0, 9, copied=1)


def test_another_option_is_refused(model: Assistant, pictures: Path, out: Path) -> None:
    run(model, pictures, out, prefix="a")
    with pytest.raises(ConfigError, match=r"prefix 'a' .*not 'b'; give another ledger"):
        run(model, pictures, out, prefix="b")
    with pytest.raises(ConfigError, match=r"temperature None .*not 0.5"):
        run(model, pictures, out, prefix="a", temperature=0.5)
    with pytest.raises(ConfigError, match="max_errors"):
        run(model, pictures, out, max_errors=-1)


def test_too_many_errors_end_the_run(model: Assistant, pictures: Path, out: Path) -> None:
    for name in ("1", "3", "5"):
        (pictures / f"{name}.png").write_text("no picture")
    with pytest.raises(ErrorLimitError, match=r"2 pictures failed.*max_errors 1.*--retry-errors"):
        run(model, pictures, out, max_errors=1)
    assert [Path(row["path"]).name for row in rows(out)][-1] == "3.png"
    assert run(model, pictures, out, max_errors=1) == Summary(2, 1, 4)


def test_changed_rows_of_a_list_get_a_new_row(model: Assistant, pictures: Path, out: Path) -> None:
    data = [(pictures / f"{seed}.png").read_bytes() for seed in range(4)]
    assert run(model, data[:3], out) == Summary(3, 0, 0)
    assert run(model, [data[0], data[3], b""], out) == Summary(1, 1, 1)
    assert [row["path"] for row in rows(out)] == ["list#0", "list#1", "list#2", "list#1", "list#2"]
    pil = [testing.draw_image(seed=seed) for seed in range(2)]
    assert run(model, pil, out) == Summary(0, 0, 2)


def test_a_picture_that_breaks_the_model_takes_no_other_with_it(
    model: Assistant, pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = model.engine.model.encode_images
    bad: list[torch.Tensor] = []

    def encode_images(batch: torch.Tensor) -> torch.Tensor:
        found = encode(batch)
        for row, given in enumerate(batch):
            if any(torch.equal(given, each) for each in bad):
                found[row] = torch.nan
        return found

    def forget() -> None:
        model.engine.cache.clear()
        model.engine.prefixes.clear()

    loaded = [vlm.load_image(pictures / f"{seed}.png") for seed in range(7)]
    bad += [model.processor.pixel_values([image])[0] for image in loaded[2:3]]
    monkeypatch.setattr(model.engine.model, "encode_images", encode_images)
    forget()
    assert run(model, pictures, out) == Summary(6, 1, 0)
    assert [row["code"] for row in rows(out)] == [None, None, "generation", *[None] * 4]
    bad.clear()
    forget()
    assert run(model, pictures, out, retry_errors=True) == Summary(1, 0, 6)
    bad += [model.processor.pixel_values([image])[0] for image in loaded]
    forget()
    out.unlink()
    with pytest.raises(GenerationError):  # a model that never answers is no matter of pictures
        run(model, pictures, out)
    assert out.read_bytes() == b""
    forget()


def test_malformed_sources_end_with_file_and_line(
    model: Assistant, pictures: Path, out: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"image": "{pictures}/0.png"}}\n{{"imge": "x.png"}}\n')
    with pytest.raises(RecordError, match=r"rows\.jsonl:2 has no column 'image.*imge"):
        run(model, path, out)
    shape = Summary(0, 0, 0)
    assert run(model, [], out) == shape
