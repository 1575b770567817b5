"""Uploading: what arrives at a hub, what never leaves, and what is said when it fails."""

import base64
import json
import re
import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm import lora, testing, weights
from vlm.checkpoint import load_checkpoint, save_checkpoint
from vlm.errors import CheckpointError, ConfigError
from vlm.publish import files_of, push

REPO = "org/name"
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """The endpoints of a hub that an upload needs, on loopback, keeping what arrives."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.branches: dict[str, Files] = {}
        self.blobs: Files = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.created: dict[str, Any] = {}
        self.large = re.compile(r".*\.safetensors")  # not sent within the commit
        self.refusals: dict[str, int] = {}  # pattern of "METHOD path" to status


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_any()

    def do_POST(self) -> None:
        self.handle_any()

    def do_PUT(self) -> None:
        self.handle_any()

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        what = f"{self.command} {path}"
        self.server.asked.append(what)
        self.server.tokens.add(self.headers["Authorization"])
        for pattern, status in self.server.refusals.items():
            if re.fullmatch(pattern, what):
                return self.answer({"error": "refused"}, status)
        if self.command == "PUT":
            self.server.blobs[path.rpartition("/")[2]] = body
            return self.answer({})
        return self.answer(*self.reply(path.removeprefix(f"/api/models/{REPO}"), body))

    def reply(self, path: str, body: bytes) -> tuple[Any, int]:
        hub, (kind, _, branch) = self.server, path.removeprefix("/").partition("/")
        lines = [json.loads(line) for line in body.splitlines()]
        if path == "/api/repos/create":
            hub.created, hub.branches["main"] = lines[0], {}
            return {"url": f"{hub.endpoint}/{REPO}"}, 200
        if path.endswith(".git/info/lfs/objects/batch"):
            for each in lines[0]["objects"]:
                each["actions"] = {"upload": {"href": f"{hub.endpoint}/blobs/{each['oid']}"}}
            return lines[0], 200
        if not hub.branches:
            return {"error": "none"}, 404
        if kind == "branch":
            exists = branch in hub.branches
            hub.branches.setdefault(branch, dict(hub.branches["main"]))
            return {}, 409 if exists else 200
        if kind == "tree":
            files = hub.branches[branch].items()
            return [{"type": "file", "path": n, "size": len(b), "oid": ""} for n, b in files], 200
        if kind == "preupload":
            for each in lines[0]["files"]:
                each["uploadMode"] = "lfs" if hub.large.fullmatch(each["path"]) else "regular"
                each["shouldIgnore"] = False
            return lines[0], 200
        if kind == "commit":
            self.commit(hub.branches[branch], lines)
            return {"commitUrl": f"{hub.endpoint}/{REPO}/commit/1", "commitOid": "1" * 40}, 200
        return {"id": REPO, "sha": "1" * 40}, 200

    def commit(self, files: Files, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]

    def answer(self, data: Any, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files by LFS, as where hf_xet is absent: its protocol has no place on loopback."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(*load_checkpoint(testing.tiny_llava_folder(tmp_path / "start")), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def adapter(folder: Path) -> Path:
    """An adapter beside the model that it was made for."""
    model, _ = load_checkpoint(folder)
    lora.save_adapter(lora.attach(model, r=2, alpha=4), folder.parent / "adapter")
    return folder.parent / "adapter"


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(hub: Hub, folder: Path, *reasons: str) -> None:
    """The folder is refused in one line, and the hub has heard nothing."""
    with pytest.raises(CheckpointError) as caught:
        push(folder, REPO, token="hf_test", endpoint=hub.endpoint)
    assert "\n" not in str(caught.value) and hub.asked == []
    assert all(reason in str(caught.value) for reason in reasons), caught.value


@pytest.mark.usefixtures("plain_http")
def test_the_model_arrives_byte_for_byte_and_nothing_else_does(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"README.md", "vlm.json", "tokenizer.json", "model.safetensors"} < wanted.keys()
    for name in ("run.yaml", "history.json", "notes.txt", "trained.safetensors", ".cache/x.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for the world")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "config.json").write_text("{}")
    (folder / "example.png").write_bytes(b"a picture")
    examples = [{"image": name, "question": "what?"} for name in ("example.png", "notes.txt")]
    (folder / "about.json").write_text(json.dumps({"examples": examples}))
    for name in ("example.png", "about.json"):
        wanted[name] = (folder / name).read_bytes()
    url = push(folder, REPO, token="hf_test", endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/{REPO}"
    assert hub.branches == {"main": wanted}
    assert set(files_of(folder)) == wanted.keys()
    assert len(hub.blobs) == 1  # the weights went by themselves
    assert "Bearer hf_test" in hub.tokens
    for name, content in hub.branches["main"].items():
        (tmp_path / name).write_bytes(content)
    ours, theirs = (load_checkpoint(f)[0].state_dict() for f in (folder, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_branch_of_a_private_repository(hub: Hub, folder: Path) -> None:
    hub.large = re.compile("nothing")
    url = push(folder, REPO, private=True, revision="v2", token="t", endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/{REPO}/tree/v2"
    assert hub.created["name"] == "name" and hub.created["organization"] == "org"
    assert "private" in hub.created.values()
    assert hub.branches["main"] == {} and set(hub.branches["v2"]) == set(files_of(folder))
    push(folder, REPO, revision="v2", token="t", endpoint=hub.endpoint)
    assert set(hub.branches["v2"]) == set(files_of(folder))
    assert hub.asked.count("POST /api/repos/create") == 1


def test_shards_of_an_earlier_upload_make_place(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.large = re.compile("nothing")
    others = {".gitattributes": b"x", "extra/model.txt": b"kept"}
    old = {"model-00001-of-00009.safetensors": b"old", weights.INDEX: b"{}"}
    hub.branches["main"] = {**old, **others}
    push(folder, REPO, token="t", endpoint=hub.endpoint)
    assert hub.branches["main"].keys() == {*files_of(folder), *others}
    monkeypatch.setattr(
        weights,
        "split_torch_state_dict_into_shards",
        lambda *args, **kwargs: huggingface_hub.split_torch_state_dict_into_shards(
            *args, max_shard_size=100_000, **kwargs
        ),
    )
    save_checkpoint(*load_checkpoint(folder), folder)
    assert not (folder / "model.safetensors").exists()
    push(folder, REPO, token="t", endpoint=hub.endpoint)
    assert hub.branches["main"].keys() == {*files_of(folder), *others}


def test_an_adapter_goes_with_the_name_of_its_base(hub: Hub, adapter: Path) -> None:
    hub.large = re.compile("nothing")
    refused(hub, adapter, "its base model '../m' is a folder", "`vlm merge")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/base")
    push(adapter, REPO, token="t", endpoint=hub.endpoint)
    assert hub.branches["main"] == {p.name: p.read_bytes() for p in adapter.iterdir()}


def test_what_others_could_not_or_should_not_open_is_refused(
    hub: Hub, folder: Path, adapter: Path, tmp_path: Path
) -> None:
    refused(hub, tmp_path / "absent", "no such folder")
    (folder / "training_args.bin").write_bytes(b"")
    refused(hub, folder, "training_args.bin", "pickle")
    (folder / "training_args.bin").unlink()
    (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    refused(hub, folder, "checkpoints", "has not ended")
    shutil.rmtree(folder / "checkpoints")
    (adapter / "projector.safetensors").unlink()
    refused(hub, adapter, "no projector.safetensors")
    edit_json(folder / "vlm.json", weights_sha256="0" * 64)
    refused(hub, folder, "changed after vlm.json was written", "weights_sha256", "remove vlm.json")
    (folder / "vlm.json").unlink()
    state = load_file(folder / "model.safetensors")
    projector = "multi_modal_projector.linear_1."
    state["extra"] = state.pop(projector + "bias")
    state[projector + "weight"] = state[projector + "weight"][:, 1:].contiguous()
    save_file(state, folder / "model.safetensors")
    refused(hub, folder, f"{projector}bias is missing", "extra is unexpected", "[32, 31] and not")
    (folder / "tokenizer.json").unlink()
    refused(hub, folder, "tokenizer.json")


@pytest.mark.parametrize(
    ("asked", "status", "reasons"),
    [
        ("POST /api/repos/create", 401, ["hf auth login"]),
        ("POST /api/repos/create", 403, ["may not write", "hf auth login"]),
        ("POST .*/commit/main", 403, ["may not write"]),
        ("PUT .*", 403, ["may not write"]),
        ("GET .*/xet-write-token/main", 403, ["may not write"]),
        ("GET .*/tree/.*", 404, ["no such repository or branch"]),
        ("POST /api/repos/create", 400, ["answered 400"]),
    ],
)
def test_an_answer_of_no_is_told_in_one_line(
    hub: Hub, folder: Path, asked: str, status: int, reasons: list[str], request: Any
) -> None:
    hub.refusals[asked] = status
    if "xet" not in asked:
        request.getfixturevalue("plain_http")
    with pytest.raises(CheckpointError) as caught:
        push(folder, REPO, token="hf_test", endpoint=hub.endpoint)
    assert str(caught.value).startswith(f"{REPO}: ") and "\n" not in str(caught.value)
    assert all(reason in str(caught.value) for reason in reasons), caught.value
    assert not hub.branches.get("main")


def test_a_hub_out_of_reach_is_told_in_one_line(folder: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: nothing answers
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CheckpointError, match="cannot be reached") as caught:
            push(folder, REPO, token="hf_test", endpoint=endpoint)
    assert endpoint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a/b/c", "a b/c", "org/na--me", "name"])
def test_a_name_that_no_repository_can_have(hub: Hub, folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        push(folder, name, endpoint=hub.endpoint)
    assert hub.asked == []
