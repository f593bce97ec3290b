"""From a name to a folder, with a hub of our own on 127.0.0.1."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmpare.compress.checkpoint.locate import resolve
from llmpare.compress.errors import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"x",
    "chat_template.jinja": b"x",
    "additional_chat_templates/tool.jinja": b"x",
    "modeling_x.py": b"x",
    "LICENSE": b"x",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"weights again",
    "original/model.safetensors": b"weights again",
    "model.gguf": b"x",
    "picture.png": b"x",
}
FETCHED = list(FILES)[:8]


class Hub(BaseHTTPRequestHandler):
    """The four requests that fetching a model takes, for the one model org/name."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        path = self.path.split("?")[0].removeprefix("/")
        if path in ("api/models/org/name", "api/models/org/name/revision/main"):
            self.answer_json({"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        elif path == f"api/models/org/name/tree/{COMMIT}":
            self.answer_json([{"type": "file", "path": n, "size": len(b), "oid": f"0{n}"} for n, b in FILES.items()])
        elif path.startswith("api/models/org/name/revision/"):
            self.refuse(404, "RevisionNotFound")
        elif path.startswith("api/models/org/gated"):
            self.refuse(403, "GatedRepo")
        elif path.startswith("api/models/org/broken"):
            self.refuse(501, "")
        elif path.startswith("api/models/"):
            self.refuse(404, "RepoNotFound")
        else:
            name = path.removeprefix(f"org/name/resolve/{COMMIT}/")
            self.answer(FILES[name], name)

    do_HEAD = do_GET

    def answer_json(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), "json", "application/json")

    def answer(self, data: bytes, tag: str, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{tag.encode().hex()}"')
        self.end_headers()
        if self.command == "GET":
            # A server that dies in the middle of the weights, as often as it is asked.
            broken = self.server.breaks and data == b"weights"  # type: ignore[attr-defined]
            self.wfile.write(data[:3] if broken else data)
            self.close_connection = broken

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class HubServer(ThreadingHTTPServer):
    breaks = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def nowhere() -> str:
    """An address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


Resolve = Callable[..., dict[str, str]]


@pytest.fixture
def resolve_with(tmp_path: Path) -> Resolve:
    """resolve() in a process of its own: the hub's client reads its environment when it is imported."""

    def run(endpoint: str, model: str, revision: str | None = None, **environment: str) -> dict[str, str]:
        code = """if True:
            import json, sys
            from llmpare.compress.checkpoint.locate import resolve
            from llmpare.compress.errors import LlmpareError
            try:
                result = {"folder": str(resolve(sys.argv[1], revision=json.loads(sys.argv[2])))}
            except LlmpareError as error:
                result = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
            print(json.dumps(result))
        """
        kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name[:3] != "HF_"}
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, model, json.dumps(revision)],
            env={**kept, **settings, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        result: dict[str, str] = json.loads(done.stdout)
        return result

    return run


# --- local names


def test_a_local_folder_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve(str(tmp_path / "org")) == tmp_path / "org"


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no revision 'main'"):
        resolve(str(tmp_path), revision="main")


@pytest.mark.parametrize(
    "model",
    ["missing", "./org/name", "/no/such/folder", "a/b/c", "org/name/", "", "x\0y", "~/model", "x" * 5000, "../a/b"],
)
def test_a_path_that_does_not_exist(model: str) -> None:
    with pytest.raises(UsageError, match="expected a folder with config.json") as caught:
        resolve(model)
    assert repr(model[:300])[:-1] in caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("url", ["https://huggingface.co/org/name", "hf://org/name", "s3://bucket/name"])
def test_an_address_is_not_a_name(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(url)
    assert "organisation/name" in caught.value.hint


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"is not a folder: expected a folder with config.json"):
        resolve(str(tmp_path / "model.safetensors"))
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="is not a folder"):
        resolve(str(tmp_path / "link"))


@pytest.mark.parametrize("name", ["m.zip", "m.tar", "m.tar.gz", "M.TGZ", "m.tar.zst", "m.7z", "a\nb.zip"])
def test_archives_are_not_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    for model in (str(tmp_path / name), f"org/{name}"):
        with pytest.raises(UsageError, match="archives are not unpacked"):
            resolve(model)


# --- the hub


def test_a_model_is_fetched_then_taken_from_the_cache(hub: HubServer, nowhere: str, resolve_with: Resolve) -> None:
    folder = Path(resolve_with(hub.url, "org/name")["folder"])
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: FILES[name] for name in FETCHED}

    assert resolve_with(nowhere, "org/name") == {"folder": str(folder)}
    count = len(hub.requests)
    assert resolve_with(hub.url, "org/name", HF_HUB_OFFLINE="1") == {"folder": str(folder)}
    assert len(hub.requests) == count, "offline means no requests"
    assert resolve_with(hub.url, "org/name") == {"folder": str(folder)}
    assert not any("model.safetensors" in path for path in hub.requests[count:]), "the weights were fetched again"


def test_neither_network_nor_cache(nowhere: str, resolve_with: Resolve) -> None:
    start = time.monotonic()
    result = resolve_with(nowhere, "org/name")
    assert time.monotonic() - start < 10
    assert result["kind"] == "InputError"
    assert "'org/name' is not a local folder, the hub cannot be reached" in result["message"]
    assert "hf download org/name" in result["hint"]


def test_a_network_that_swallows_everything(resolve_with: Resolve) -> None:
    """A server that accepts connections and never answers stands for a firewall that drops packets."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        start = time.monotonic()
        result = resolve_with(f"http://127.0.0.1:{silent.getsockname()[1]}", "org/name")
        assert time.monotonic() - start < 10
    assert result["kind"] == "InputError"
    assert "the hub cannot be reached" in result["message"]


def test_a_model_that_the_hub_does_not_know(hub: HubServer, resolve_with: Resolve) -> None:
    result = resolve_with(hub.url, "org/other")
    assert result["kind"] == "UsageError"
    assert "'org/other' is neither a folder nor a model on the hub" in result["message"]


def test_a_revision_that_the_hub_does_not_know(hub: HubServer, resolve_with: Resolve) -> None:
    result = resolve_with(hub.url, "org/name", "v9")
    assert (result["kind"], result["message"]) == ("UsageError", "'org/name' has no revision 'v9' on the hub")
    assert "folder" in resolve_with(hub.url, "org/name", "main")


def test_a_gated_model(hub: HubServer, resolve_with: Resolve) -> None:
    result = resolve_with(hub.url, "org/gated")
    assert result["kind"] == "InputError"
    assert "is gated" in result["message"]
    assert "hf auth login" in result["hint"]


def test_a_hub_that_fails(hub: HubServer, resolve_with: Resolve) -> None:
    result = resolve_with(hub.url, "org/broken")
    assert result["kind"] == "InputError"
    assert "'org/broken'" in result["message"]


def test_a_download_that_breaks_off(hub: HubServer, resolve_with: Resolve) -> None:
    hub.breaks = True
    result = resolve_with(hub.url, "org/name")
    assert result["kind"] == "InputError"
    assert "'org/name' cannot be fetched from the hub" in result["message"]
    hub.breaks = False
    assert "folder" in resolve_with(hub.url, "org/name")
