"""The `vlm` command as people type it: real models, real files, exact exit codes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.session import Sampling
from serve.terminal import TerminalChat, printable
from vlm.assistant import load
from vlm.messages import read_records
from vlm.testing import (
    draw_image,
)

COMMAND = [sys.executable, "-c", "from serve.cli import main; main()"]


Run = Callable[..., Any]


def test_help_and_version(run: Run) -> None:
    told = run("--help")
    assert told.code == 0
    for name in ("ask", "caption", "chat", "serve", "train", "data", "eval"):
        assert re.search(rf"^  {name} ", told.out, re.MULTILINE)
    assert re.fullmatch(r"vlm \d+\.\d+\.\d+\n", run("--version").out)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["ask"],
        ["ask", "a.png"],
        ["ask", "a.png", "hi", "--nonsense"],
        ["ask", "a.png", "hi", "--max-new-tokens", "0"],
        ["ask", "a.png", "hi", "--temperature", "-1"],
        ["ask", "a.png", "hi", "--temperature", "hot"],
        ["caption"],
        ["caption", "a.png", "--batch-size", "0"],
        ["serve", "--port", "70000"],
        ["data"],
        ["data", "build", "scenes", "--out", "x", "--split", "nonsense"],
        ["data", "build", "scenes"],
    ],
)
def test_usage_errors_end_with_2(run: Run, words: list[str]) -> None:
    assert run(*words).code == 2


def test_ask_answers_as_python_does(run: Run, model: Path, pictures: Path) -> None:
    picture = pictures / "a.png"
    told = run("ask", picture, "what is it?", "--model", model, "--max-new-tokens", 12)
    expected = load(model).ask(picture, "what is it?", max_new_tokens=12)
    assert (told.code, told.out) == (0, printable(expected) + "\n")


def test_a_question_from_standard_input(
    run: Run, model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n"))
    asked = run("ask", pictures / "a.png", "-", "--model", model, "--max-new-tokens", 12)
    expected = load(model).ask(pictures / "a.png", "what is it?", max_new_tokens=12)
    assert asked.out.strip() == printable(expected).strip()


def test_ask_with_bad_input(run: Run, model: Path, tmp_path: Path, pictures: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    picture = pictures / "a.png"
    assert "does not exist" in run("ask", tmp_path / "absent.png", "hi", "--model", model).refused()
    assert "no picture that" in run("ask", text, "hi", "--model", model).refused()
    assert "is a folder" in run("ask", pictures, "hi", "--model", model).refused()
    assert "empty" in run("ask", picture, " \n ", "--model", model).refused()
    assert "nonsense" in run("ask", picture, "hi", "--model", tmp_path / "nonsense").refused()
    assert "warp" in run("ask", picture, "hi", "--model", model, "--device", "warp").refused()
    assert "float3" in run("ask", picture, "hi", "--model", model, "--dtype", "float3").refused()
    told = run("ask", picture, "hi", "--model", model, "--temperature", "nan")
    assert told.code == 2 and "temperature" in told.err


def test_a_wrong_path_is_told_without_loading_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from serve.cli import main; sys.argv = ['vlm', 'ask', 'absent.png', 'hi']\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2 False\n"


def rows(ledger: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in ledger.read_text().splitlines()]


def test_caption_skips_bad_files_and_goes_on_later(run: Run, model: Path, pictures: Path) -> None:
    (pictures / "bad.jpg").write_text("no picture")
    (pictures / "notes.txt").write_text("not even named like one")
    ledger = pictures.parent / "captions.jsonl"
    words = ("caption", pictures, "-o", ledger, "--model", model, "--batch-size", 2)
    told = run(*words)
    assert told.code == 0
    assert "3 captioned, 1 failed" in told.out
    assert "bad.jpg" in told.err and "no picture" in told.err
    names = [Path(str(row["path"])).name for row in rows(ledger)]
    assert names == ["a.png", "b.png", "bad.jpg", "c.png"]
    expected = load(model).caption(pictures / "a.png")
    assert rows(ledger)[0]["caption"] == expected

    draw_image(seed=9).save(pictures / "d.png")
    again = run(*words)
    assert (again.code, len(rows(ledger))) == (0, 5)
    assert "1 captioned, 0 failed, 4 were done before" in again.out
    assert "prompt" in run(*words, "--prompt", "another one").refused()


def test_caption_ends_with_1_when_all_failed(run: Run, model: Path, tmp_path: Path) -> None:
    bad, ledger = tmp_path / "bad.png", tmp_path / "captions.jsonl"
    bad.write_text("no picture")
    words = ("caption", bad, tmp_path / "absent.png", "-o", ledger, "--model", model)
    assert run(*words).code == 1
    assert run(*words).code == 1  # nothing left to do, and still no caption
    draw_image(seed=0).save(bad)
    assert run(*words, "--retry-errors").code == 0


def test_caption_of_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    assert "no picture in" in run("caption", tmp_path, "--model", model).refused()
    picture, taken = tmp_path / "a.png", tmp_path / "taken.jsonl"
    draw_image(seed=0).save(picture)
    taken.write_text("my diary\n")
    assert "taken.jsonl" in run("caption", picture, "-o", taken, "--model", model).refused()
    assert taken.read_text() == "my diary\n"


def test_chat_reads_lines_until_quit(
    run: Run, model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["/image absent.png", f"/image {pictures / 'b.png'}", "hi", "/nonsense", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    words = ("chat", pictures / "a.png", "--model", model, "--max-new-tokens", 6)
    told = run(*words)
    assert told.code == 0
    assert "error: 'absent.png' does not exist" in told.out
    assert "No command /nonsense" in told.out
    both = [pictures / "a.png", pictures / "b.png"]
    assert printable(load(model).ask(both, "hi", max_new_tokens=6)) in told.out
    assert run("chat", "absent.png", "--model", model).refused()


class Chatter:
    """Speaks `words`, and notes the conversations that it was given."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.seen: list[tuple[list[str], int]] = []
        self.interrupt = False

    def stream(self, messages, *, stop=None, **_: object):  # type: ignore[no-untyped-def]
        texts = [message.text for message in messages]
        self.seen.append((texts, sum(len(message.images) for message in messages)))
        for word in self.words:
            yield word
            if self.interrupt:
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(5)


def test_chat_remembers_until_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["one", "two", "/reset", "three"])

    def lines(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", lines)
    model = Chatter("ye", "s\x1b[2J")
    TerminalChat(model, Sampling(), ["a.png"]).run()
    said = "yes\x1b[2J"
    assert model.seen == [(["one"], 1), (["one", said, "two"], 1), (["three"], 0)]
    assert "yes[2J\n" in capsys.readouterr().out  # and the escape did not reach the terminal


def test_a_conversation_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pictures: Path,
    tmp_path: Path,
) -> None:
    page, record = tmp_path / "a chat.md", tmp_path / "chat.jsonl"
    first = f"/save {page}"
    typed = iter([first, "one", first, "two", f"/save {record}", first, "/save x.txt", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    picture = pictures / "a.png"
    TerminalChat(Chatter("ye", "s"), Sampling(), [str(picture)]).run()
    out = capsys.readouterr().out
    assert "error: there is no answer to save yet" in out
    assert f"{page}: 1 answers" in out and f"{record}: 2 answers" in out
    assert f"error: {page} exists" in out and "error: x.txt ends in neither" in out
    assert page.read_text() == f"# a chat\n\n![a.png](<{picture}>)\n\n**one**\n\nyes\n"
    (kept,) = read_records(record)
    assert kept.images == (str(picture),)
    assert [(m.role, m.text) for m in kept.messages] == [
        ("user", "one"),
        ("assistant", "yes"),
        ("user", "two"),
        ("assistant", "yes"),
    ]


def test_control_c_stops_the_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["one", "two", "/quit"])
    model = Chatter("half", "never said")
    model.interrupt = True

    def lines(_: str) -> str:
        model.interrupt = not model.seen
        return next(typed)

    monkeypatch.setattr("builtins.input", lines)
    TerminalChat(model, Sampling()).run()
    out = capsys.readouterr().out
    assert "half [stopped]\n" in out and out.count("never said") == 1
    assert model.seen[1] == (["one", "half", "two"], 0)


def test_serve_answers_and_ends_on_control_c(model: Path) -> None:
    server = subprocess.Popen(
        [*COMMAND, "serve", "--model", str(model), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        assert found is not None
        with urllib.request.urlopen(found.group(), timeout=30) as answer:
            assert answer.status == 200
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.communicate()
