"""The served page from outside: gradio's own client, plain HTTP, and what must not work."""

import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from serve.app import build_app, running
from vlm.errors import ConfigError

Messages = list[dict[str, Any]]
SAMPLING = (16, 0.0, 1.0, "")


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def connect(url: str) -> Client:
    return Client(url, verbose=False)


def ask(client: Client, text: str, *pictures: Path) -> None:
    files = [handle_file(path) for path in pictures]
    client.predict({"text": text, "files": files}, api_name="/ask")


def shown(client: Client) -> Messages:
    """The conversation as the page draws it."""
    return client.predict(api_name="/show")[-1]  # type: ignore[no-any-return]


def last_reply(messages: Messages) -> str:
    assert messages[-1]["role"] == "assistant"
    return str(messages[-1]["content"][-1]["text"]).strip()


def answer(client: Client) -> str:
    return last_reply(client.predict(*SAMPLING, api_name="/answer"))


def test_an_answer_streams_and_pictures_stay(page: str, standin: Any, picture: Path) -> None:
    client = connect(page)
    ask(client, "what is it?", picture, picture)
    job = client.submit(*SAMPLING, api_name="/answer")
    job.result()
    texts = [last_reply(messages) for messages in job.outputs()]
    assert texts[-1] == "2 pictures, 1 messages: what is it?"
    assert len(set(texts)) > 2 and all(a in b for a, b in itertools.pairwise(texts))
    ask(client, "and now?")
    assert answer(client) == "2 pictures, 3 messages: and now?"
    assert [m.role for m in standin.seen[-1]] == ["user", "assistant", "user"]
    assert standin.options[-1] == {
        "max_new_tokens": 16,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": None,
    }


def test_stop_stops_the_model_and_nothing_leaks_into_the_next_answer(
    page: str, standin: Any
) -> None:
    client = connect(page)
    ask(client, "stuck forever")
    client.submit(*SAMPLING, api_name="/answer")
    wait_for(lambda: standin.steps > 3)
    client.predict(api_name="/stop")
    ask(client, "hello")
    assert answer(client) == "0 pictures, 3 messages: hello"
    assert standin.ended.wait(5)
    steps = standin.steps
    time.sleep(0.2)
    assert standin.steps == steps
    texts = json.dumps(shown(client))
    assert "STALE" not in texts and "tick (stopped)" in texts


def test_leaving_the_page_stops_the_model(page: str, standin: Any) -> None:
    client = connect(page)
    ask(client, "forever")
    body = {
        "data": [None, *SAMPLING],
        "fn_index": next(
            d["id"] for d in client.config["dependencies"] if d["api_name"] == "answer"
        ),
        "session_hash": client.session_hash,
    }
    httpx.post(f"{page}/gradio_api/queue/join", json=body).raise_for_status()
    stream = httpx.stream(
        "GET", f"{page}/gradio_api/queue/data", params={"session_hash": client.session_hash}
    )
    with stream as events:
        for line in events.iter_lines():
            if "tick" in line:
                break
    assert standin.ended.wait(10)


def test_two_visitors_do_not_meet(page: str, standin: Any, picture: Path) -> None:
    anne, bert = connect(page), connect(page)
    ask(anne, "anne's", picture)
    ask(bert, "bert's")
    jobs = [client.submit(*SAMPLING, api_name="/answer") for client in (anne, bert)]
    texts = [last_reply(job.result()) for job in jobs]
    assert texts == ["1 pictures, 1 messages: anne&#x27;s", "0 pictures, 1 messages: bert&#x27;s"]
    assert "anne" not in json.dumps(shown(bert)) and "bert" not in json.dumps(shown(anne))
    bert.predict(api_name="/clear")
    assert len(shown(anne)) == 2 and shown(bert) == []


def test_errors_are_told_and_the_chat_goes_on(page: str, tmp_path: Path) -> None:
    client = connect(page)
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    ask(client, "what is it?", empty)
    assert "empty" in answer(client)
    ask(client, "crash please")
    reply = answer(client)
    assert "secret" not in reply and "log" in reply
    ask(client, "still there?")
    assert answer(client) == "0 pictures, 1 messages: still there?"


def test_undo_gives_the_question_back_and_retry_asks_again(page: str, picture: Path) -> None:
    client = connect(page)
    ask(client, "what is it?", picture)
    first = answer(client)
    client.predict(api_name="/retry")
    assert answer(client) == first
    box, messages = client.predict(api_name="/undo")
    assert messages == []
    assert box["value"]["text"] == "what is it?" and len(box["value"]["files"]) == 1


@pytest.mark.parametrize("bad", [float("nan"), -1, 10**9, "hot"])
def test_sampling_out_of_range_is_refused(page: str, standin: Any, bad: object) -> None:
    client = connect(page)
    for position in range(3):
        options: list[object] = list(SAMPLING)
        options[position] = bad
        ask(client, "hello")
        with pytest.raises(Exception, match=r".+"):
            client.predict(*options, api_name="/answer")
    assert standin.seen == []


@pytest.mark.parametrize(("text", "seed"), [(" 7 ", 7), ("", None), (None, None), ("0", 0)])
def test_a_seed_is_a_number_or_nothing(
    page: str, standin: Any, text: str | None, seed: object
) -> None:
    client = connect(page)
    ask(client, "hello")
    client.predict(*SAMPLING[:3], text, api_name="/answer")
    assert standin.options[-1]["seed"] == seed


def test_a_seed_of_letters_is_told(page: str, standin: Any) -> None:
    client = connect(page)
    ask(client, "hello")
    shown = client.predict(*SAMPLING[:3], "lucky", api_name="/answer")
    assert "whole number" in last_reply(shown)
    assert standin.seen == []


def test_captions_table_and_download(page: str, picture: Path, tmp_path: Path) -> None:
    client = connect(page)
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:-30])
    other = tmp_path / "other.png"
    Image.new("RGB", (41, 9)).save(other)
    files = [handle_file(path) for path in (picture, broken, other, picture)]
    status, table, download = client.predict(files, "", api_name="/caption")
    assert status == "3 of 3 pictures, 1 could not be used."
    cells = [row[1] for row in table["data"]]
    assert (cells[0], cells[2]) == ("a picture of 40", "a picture of 41")
    assert cells[1].startswith("\u26a0") and "'broken.png'" in cells[1]  # and no folder
    rows = [json.loads(line) for line in Path(download["value"]).read_text().splitlines()]
    assert rows[0] == {"file": "my picture.png", "caption": "a picture of 40"}
    assert set(rows[1]) == {"file", "error", "code"}


def test_captions_stop(page: str, tmp_path: Path) -> None:
    client = connect(page)
    files = []
    for i in range(80):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (i + 1, 9)).save(path)
        files.append(handle_file(path))
    job = client.submit(files, "", api_name="/caption")
    wait_for(lambda: len(job.outputs()) > 1)
    client.predict(api_name="/caption_stop")
    status = job.result()[0]
    assert status.endswith("Stopped.") and int(status.split()[0]) < 80


def test_files_of_the_machine_cannot_be_had(page: str, standin: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    project = Path(__file__).parents[2]
    for path in ("/etc/passwd", secret, project / "README.md", "../../../etc/passwd", "."):
        for form in (f"file={path}", f"file/{path}", f"file=/tmp/../{path}"):
            reply = httpx.get(f"{page}/gradio_api/{form}", follow_redirects=True)
            assert reply.status_code in (403, 404), form
    client = connect(page)
    ids = {d["api_name"]: d["id"] for d in client.config["dependencies"]}
    for path in ("/etc/passwd", str(secret)):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [None, {"text": "x", "files": [file]}], "fn_index": ids["ask"]}
        reply = httpx.post(
            f"{page}/gradio_api/run/ask", json={**body, "session_hash": client.session_hash}
        )
        assert reply.status_code == 500 and "data" not in reply.json()
        no_meta = {"path": path}
        body["data"] = [None, {"text": "x", "files": [no_meta]}]
        reply = httpx.post(
            f"{page}/gradio_api/run/ask", json={**body, "session_hash": client.session_hash}
        )
        assert reply.status_code != 200 or path not in reply.text
    assert standin.seen == []


def test_one_upload_is_served_back_as_what_it_is(page: str, picture: Path) -> None:
    files = {"files": ("x.html", b"<script>alert(1)</script>", "text/html")}
    path = httpx.post(f"{page}/gradio_api/upload", files=files).json()[0]
    reply = httpx.get(f"{page}/gradio_api/file={path}")
    assert reply.headers["content-disposition"].startswith("attachment")
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_uploads_are_capped_and_deleted_at_the_end(
    standin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.server.MAX_UPLOAD_BYTES", 2**20)
    with running(standin, port=0) as url:
        big = httpx.post(f"{url}/gradio_api/upload", files={"files": b"x" * (2**20 + 1)})
        assert big.status_code == 413
        upload = httpx.post(f"{url}/gradio_api/upload", files={"files": b"x"}).json()[0]
        assert Path(upload).exists() and Path(upload).parents[1].stat().st_mode & 0o077 == 0
    assert not Path(upload).parents[1].exists()


def test_an_upload_that_finds_no_room_is_told_and_leaves_nothing(page: str) -> None:
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        files = {"files": ("x.png", b"x" * 500_000)}
        reply = httpx.post(f"{page}/gradio_api/upload", files=files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert reply.status_code == 507 and "disk is full" in reply.text
    assert not [path for path in folder.iterdir() if path.is_file()]
    files = {"files": ("x.png", b"x")}
    assert httpx.post(f"{page}/gradio_api/upload", files=files).status_code == 200


def test_the_end_of_the_server_is_the_end_of_the_answer(standin: Any) -> None:
    with running(standin, port=0) as url:
        client = connect(url)
        ask(client, "forever")
        client.submit(*SAMPLING, api_name="/answer")
        wait_for(lambda: standin.steps > 3)
        started = time.monotonic()
    assert standin.ended.is_set()
    assert time.monotonic() - started < 2


def test_the_page_names_nothing_from_elsewhere_to_load(page: str) -> None:
    config = httpx.get(f"{page}/config").json()
    assert config["analytics_enabled"] is False
    assert config["stylesheets"] == []
    theme = httpx.get(f"{page}/theme.css").text
    assert "http" not in theme.replace("http://www.w3.org/2000/svg", "")


def test_the_header_is_honest_and_escaped(standin: Any) -> None:
    def header() -> str:
        blocks = build_app(standin).blocks.values()
        return next(str(vars(b)["value"]) for b in blocks if b.elem_id == "header")

    assert "Stand-in &lt;b&gt;" in header()
    assert "Knows nothing &amp; says so." in header()
    assert "1.23 million parameters" in header() and "on cpu" in header()
    assert "llava-1.5-7b-hf" not in header()
    standin.built_in = True
    assert "vlm serve --model llava-hf/llava-1.5-7b-hf" in header()


def test_a_taken_port_is_an_error_of_one_line(standin: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}.*--port"), running(standin, port=port):
            pass


def test_gradio_is_not_needed_for_the_conversation_itself() -> None:
    code = (
        "import sys, serve.session, serve.view\n"
        "assert not {'gradio', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
