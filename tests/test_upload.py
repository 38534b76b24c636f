"""Uploads to the hub, against a server here that speaks the part of its protocol that the client of the hub uses."""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import one_line
from test_cli import run
from tiny import tiny_checkpoint

import headfold
from headfold.core.errors import AlreadyFinished, UserError

__all__ = ["run"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>':DeprecationWarning"
)  # the client's own, where it stores files
REPOSITORY = "someone/folded"
PLAIN: dict[str, Any] = {"kv_heads": 2, "merge": "mean", "group": "contiguous", "refit": False}


class Hub(BaseHTTPRequestHandler):
    """Keeps what is committed to it; `refuses` gives the path whose requests it refuses, and the status; at the path `breaks` it reads a
    part of the request and closes the connection. Weights are stored before the commit that names them, as large files are."""

    files: dict[str, bytes]
    stored: dict[str, bytes]
    created: list[dict[str, Any]]
    refuses: tuple[str, int] | None
    breaks: str

    def do_GET(self) -> None:
        if self.path.startswith(f"/api/models/{REPOSITORY}/tree"):
            self._answer([{"type": "file", "path": name, "size": 1, "oid": "1"} for name in self.files])
            return
        self._answer({"name": "someone", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def _breaks(self) -> bool:
        if not self.breaks or self.breaks not in self.path:
            return False
        self.rfile.read(100)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def do_PUT(self) -> None:
        if not self._breaks():
            self.stored[self.path.rpartition("/")[2]] = self._body()
            self._answer({})

    def _body(self) -> bytes:
        if (length := self.headers["Content-Length"]) is not None:
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):  # sent in chunks, as files are
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        if self._breaks():
            return
        body = self._body()
        if self.path.startswith("/api/repos/create"):
            self.created.append(json.loads(body))
            self._answer({"url": f"http://{self.headers['Host']}/{REPOSITORY}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            self._answer({"files": [
                {"path": path, "uploadMode": modes[path.endswith(".safetensors")], "shouldIgnore": False} for path in named
            ]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            place = f"http://{self.headers['Host']}/storage"
            self._answer({"transfer": "basic", "objects": [
                one | {"actions": {"upload": {"href": f"{place}/{one['oid']}"}}} for one in json.loads(body)["objects"]
            ]})  # fmt: skip
        else:
            assert self.path.startswith(f"/api/models/{REPOSITORY}/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.stored[line["value"]["oid"]]
                elif line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
            self._answer({"commitUrl": f"http://{self.headers['Host']}/{REPOSITORY}/commit/1", "commitOid": "1"})

    def _answer(self, found: dict[str, Any] | list[Any]) -> None:
        refused = self.refuses is not None and self.refuses[0] in self.path
        text = json.dumps({"error": "no rights"} if refused else found).encode()
        self.send_response(self.refuses[1] if refused and self.refuses else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *words: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class Fresh(Hub):
        files, stored, created, refuses, breaks = {}, {}, [], None, ""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told = {"ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in told.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_for_tests")
    yield Fresh
    server.shutdown()
    server.server_close()


def test_a_fold_is_uploaded_as_it_was_written(hub: type[Hub], run: Any, tmp_path: Path) -> None:  # noqa: F811
    """Every file of it, once it is verified, to a repository of the account's own visibility."""
    out = tmp_path / "out"
    ran = run("fold", str(tiny_checkpoint("llama", torch.float32)), str(out), "--kv-heads", "2", "--merge", "mean", "--group", "contiguous",
              "--no-refit", "--push-to-hub", REPOSITORY)  # fmt: skip
    assert ran.code == 0, ran.err
    assert hub.files == {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert {"config.json", "model.safetensors", "plan.json", "README.md"} <= hub.files.keys()
    assert [(made["name"], "private" in made) for made in hub.created] == [("folded", False)]
    assert f"/{REPOSITORY}" in ran.out and "uploaded to http" in ran.out


def test_weights_of_an_earlier_model_go(hub: type[Hub], tmp_path: Path) -> None:
    """Readers prefer a single file to the shards of a fold; what is not a model's weights by its name stays."""
    stale = [
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
        "consolidated.safetensors",
    ]
    kept = ["logo.png", "onnx/model.onnx", "original/model.safetensors", "it-q8_0.gguf"]
    hub.files |= dict.fromkeys([*stale, *kept, "model.safetensors"], b"earlier")
    headfold.fold(tiny_checkpoint("llama", torch.float32), tmp_path / "out", push_to_hub=REPOSITORY, **PLAIN)
    assert not hub.files.keys() & set(stale) and all(hub.files[name] == b"earlier" for name in kept)
    assert hub.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_what_a_killed_run_finished_is_uploaded_by_the_next(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after the output was whole, and before anything was uploaded."""
    out, source = tmp_path / "out", tiny_checkpoint("llama", torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr("headfold.checkpoint.staging._clear_up", killed)
        with pytest.raises(KeyboardInterrupt):
            headfold.fold(source, out, push_to_hub=REPOSITORY, **PLAIN)
    assert (out / "config.json").exists() and not hub.files
    with pytest.raises(AlreadyFinished) as finished:
        headfold.fold(source, out, push_to_hub=REPOSITORY, **PLAIN)
    one_line(finished, "an earlier run of the same job finished this", "uploaded to http")
    assert hub.files == {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize("path", ["storage", "commit"])
def test_a_broken_connection_publishes_nothing_and_the_same_call_uploads(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """In the middle of the weights, or of the commit: the repository stays as it was, and the fold is whole and not made anew."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the client
    out, source = tmp_path / "out", tiny_checkpoint("llama", torch.float32)
    hub.files |= {"model.safetensors": b"earlier", "README.md": b"earlier"}
    hub.breaks = path
    for _ in range(2):  # as often as it is tried
        with pytest.raises(UserError) as error:
            headfold.fold(source, out, push_to_hub=REPOSITORY, **PLAIN)
        one_line(error, f"{out} is whole, but was not uploaded: ", "Error: ", "run the same command again")
        assert set(hub.files.values()) == {b"earlier"} and headfold.load(out).config.num_key_value_heads == 2
    hub.breaks, written = "", (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(AlreadyFinished) as finished:
        headfold.fold(source, out, push_to_hub=REPOSITORY, **PLAIN)
    one_line(finished, "an earlier run of the same job finished this; uploaded to http")
    assert hub.files == {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_an_interrupted_upload_is_done_by_the_same_command(
    hub: type[Hub],
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:
    out = tmp_path / "out"
    words = ("fold", str(tiny_checkpoint("llama", torch.float32)), str(out), "--kv-heads", "2", "--merge", "mean", "--group", "contiguous",
             "--no-refit", "--push-to-hub", REPOSITORY)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.create_commit", killed)
        assert run(*words).code == 130
    assert (out / "config.json").exists() and not hub.files
    ran = run(*words)
    assert ran.code == 0 and "finished this; uploaded to http" in ran.err, ran.err
    assert hub.files == {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


def killed(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("path", "written"), [("whoami", False), ("repos/create", True), ("commit", True)])
def test_a_refusal_is_one_line_and_keeps_the_output(hub: type[Hub], tmp_path: Path, path: str, written: bool) -> None:
    """Who the hub does not know is refused before any work; what it refuses later, the directory outlives."""
    hub.refuses = path, 401 if path == "whoami" else 403
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        headfold.fold(tiny_checkpoint("llama", torch.float32), out, push_to_hub=REPOSITORY, **PLAIN)
    one_line(error, f"--push-to-hub {REPOSITORY}", "was not uploaded" if written else "your token")
    assert (out / "config.json").exists() == written and not (tmp_path / "out.partial").exists()
    assert not written or headfold.load(out).config.num_key_value_heads == 2


def test_a_name_that_is_none_is_refused_at_once(hub: type[Hub], tmp_path: Path) -> None:
    for name in ("a/b/c", "", "some one/x"):
        with pytest.raises(UserError) as error:
            headfold.fold(tiny_checkpoint("llama", torch.float32), tmp_path / "out", push_to_hub=name, **PLAIN)
        one_line(error, f"--push-to-hub {name}", "check the name")
    assert not hub.created and not (tmp_path / "out").exists()


def test_without_a_network_it_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        headfold.fold(tiny_checkpoint("llama", torch.float32), tmp_path / "out", push_to_hub=REPOSITORY, **PLAIN)
    one_line(error, f"--push-to-hub {REPOSITORY}", "hf auth login")
    assert not (tmp_path / "out").exists()
