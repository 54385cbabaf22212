"""A tracking server may answer anything: what it tells is no path, command or code here, and a download is checked."""

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import mlflow
import pytest

from gpt2.core.files import write_json
from gpt2.model.weights import read_config
from gpt2.tracking import registry, store
from gpt2.tracking.champion import STRIDE, VAL_LOSS
from gpt2.tracking.local_registry import MODEL_SHA256
from gpt2.tracking.provenance import provenance
from gpt2.tracking.registry import RUN_ID, TEST_LOSS, fetch_model
from gpt2.tracking.runs import ENVIRONMENT, THREADS

ErrorLine = Callable[[Callable[[], object]], str]
RUN_OF_IT = "0" * 32
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


class Server(SimpleNamespace):
    """A server with one version and one logged model; a test changes what it answers and which files it has."""

    answers: dict[str, Any]
    files: dict[str, bytes]
    asked: list[str]

    def answer(self, address: str) -> bytes | None:
        self.asked.append(address)
        url = urlsplit(address)
        if url.path == ARTIFACTS:
            folder = parse_qs(url.query).get("path", [""])[0].removeprefix("1").strip("/")
            below = [
                name.removeprefix(f"{folder}/" if folder else "") for name in self.files if name.startswith(folder)
            ]
            files = {one.partition("/")[0] if one[:1] not in "./" else one: "/" in one for one in below}
            return json.dumps({"files": [{"path": name, "is_dir": is_dir} for name, is_dir in files.items()]}).encode()
        if url.path.startswith(ARTIFACTS):
            return self.files.get(url.path.removeprefix(f"{ARTIFACTS}/1/"))
        found = self.answers.get(url.path.partition("/mlflow/")[2])
        return found if found is None or isinstance(found, bytes) else json.dumps(found).encode()


@pytest.fixture
def server(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Answers as MLflow's own server does; its files are those of a tiny model."""
    tags = [{"key": MODEL_SHA256, "value": read_config(model_folder)[1]}]
    version = {"name": "gpt2", "version": "1", "tags": tags, "status": "READY"}
    model = {
        "info": {"model_id": "m-1", "name": "step-1", "artifact_uri": "mlflow-artifacts:/1", "tags": tags, "status": 2}
    }
    answers = {
        "model-versions/get": {"model_version": version},
        "model-versions/get-download-uri": {"artifact_uri": "mlflow-artifacts:/1"},
        "model-versions/search": {"model_versions": [version]},
        "registered-models/alias": {"model_version": version},
        "registered-models/get": {"registered_model": {"name": "gpt2"}},
        "runs/get": {"run": {"info": {"run_id": RUN_OF_IT, "experiment_id": "1"}, "data": {"tags": tags}}},
        "logged-models/search": {"models": [model]},
        "logged-models/m-1": {"model": model},
    }
    files = {f"artifacts/model/{file.name}": file.read_bytes() for file in model_folder.iterdir()}
    state = Server(answers=answers, files=files, asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = state.answer(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"{}")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        root = tmp_path / "a" / "b" / "checkout"
        (root / ".cache" / "models").mkdir(parents=True)
        for module in (registry, store):
            monkeypatch.setattr(module, "main_root", lambda: root)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{http.server_port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):  # which the store sets
            monkeypatch.setenv(name, "")
        yield state
        http.shutdown()
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.is_relative_to(root / ".cache") for path in written), written


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("a/b/checkout/.cache/models/*") if path.suffix != ".lock")


@pytest.mark.parametrize("uri", ["models:/gpt2/1", "models:/gpt2@champion", f"runs:/{RUN_OF_IT}/model"])
def test_a_version_is_downloaded_once(server: Server, tmp_path: Path, model_folder: Path, uri: str) -> None:
    folder = fetch_model(uri)
    count = sum(ARTIFACTS in address for address in server.asked)
    assert fetch_model(uri) == folder and sum(ARTIFACTS in address for address in server.asked) == count
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in model_folder.iterdir()
    }
    assert kept(tmp_path) == [read_config(model_folder)[1]]


@pytest.mark.parametrize(
    "uri", ["models:/gpt2/1", f"runs:/{RUN_OF_IT}/model", "models:/m-1", f"runs:/{RUN_OF_IT}/step-1"]
)
@pytest.mark.parametrize("sha256", ["../../../x", "/tmp/x", "5" * 63, "5" * 64 + "\n", "F" * 64, ""])
def test_a_tag_that_is_no_sha256_names_no_folder(
    server: Server, tmp_path: Path, error_line: ErrorLine, uri: str, sha256: str
) -> None:
    text = json.dumps(server.answers)
    [digest] = {tag["value"] for tag in server.answers["runs/get"]["run"]["data"]["tags"]}
    server.answers = json.loads(text.replace(json.dumps(digest), json.dumps(sha256)))
    assert "another program has" in error_line(lambda: fetch_model(uri)) or not sha256
    assert not kept(tmp_path)


@pytest.mark.parametrize("uri", ["models:/m-1", f"runs:/{RUN_OF_IT}/step-1"])
def test_an_id_names_no_folder(server: Server, tmp_path: Path, model_folder: Path, uri: str) -> None:
    server.answers["logged-models/m-1"]["model"]["info"]["model_id"] = "../../../x"
    assert read_config(fetch_model(uri)) == read_config(model_folder)
    assert kept(tmp_path) == [f"step-{read_config(model_folder)[1]}"]


@pytest.mark.parametrize("name", ["../../../x", "/absolute-x", "artifacts/../../../../x", "%2e%2e/%2e%2e/x", "..\\x"])
def test_a_name_outside_its_folder_is_not_written(
    server: Server, tmp_path: Path, error_line: ErrorLine, name: str
) -> None:
    server.files[name] = b"x"
    server.files[f"artifacts/{name}"] = b"x"
    assert "models:/gpt2/1 cannot be downloaded from mlflow-artifacts:/1 (" in error_line(
        lambda: fetch_model("models:/gpt2/1")
    )
    assert not kept(tmp_path) and not Path("/absolute-x").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", None])
def test_a_download_that_is_not_what_was_registered_is_not_kept(
    server: Server, tmp_path: Path, error_line: ErrorLine, file: str | None
) -> None:
    if file is None:
        server.files.clear()
    else:
        server.files[f"artifacts/model/{file}"] = server.files[f"artifacts/model/{file}"].replace(b"0", b"1")
    for uri in ("models:/gpt2/1", "models:/m-1"):
        error_line(partial(fetch_model, uri))
    assert not kept(tmp_path)


@pytest.mark.parametrize(
    "answer",
    [b"", b"<html>", b"5", b"[]", {"model_version": 5}, {"model_version": {"name": 5, "tags": "x"}}, {}, b"\xff\x00"],
)
@pytest.mark.parametrize("method", ["model-versions/get", "model-versions/get-download-uri"])
def test_an_answer_that_is_none_is_one_line(server: Server, error_line: ErrorLine, method: str, answer: Any) -> None:
    server.answers[method] = answer
    line = error_line(lambda: fetch_model("models:/gpt2/1"))
    assert "hunter2" not in line


@pytest.mark.parametrize(
    "source", ["/etc", "file:///etc", "file:///etc/..", "nonsense://x", "runs:/x", "models:/x/1", "sftp:///x"]
)
def test_a_source_elsewhere_is_refused(server: Server, tmp_path: Path, error_line: ErrorLine, source: str) -> None:
    server.answers["model-versions/get-download-uri"] = {"artifact_uri": source}
    error_line(lambda: fetch_model("models:/gpt2/1"))
    assert not kept(tmp_path)


def test_a_lineage_that_is_none_tells_no_commands(server: Server, error_line: ErrorLine, tmp_path: Path) -> None:
    lineage = {"commit": "abc", "diff": "", "prepare": {"source": "sotu"}, "files": {"data/tokens/train.bin": "5" * 64}}
    version, names = server.answers["model-versions/get"]["model_version"], (STRIDE, VAL_LOSS, TEST_LOSS, RUN_ID)
    version["tags"] += [{"key": name, "value": "1"} for name in (*names, ENVIRONMENT, THREADS)]
    version["name"] = "gpt2;reboot"
    server.files |= {"artifacts/params.yaml": b"{}", "artifacts/lineage.json": json.dumps(lineage).encode()}
    told = provenance("models:/gpt2/1")
    assert "git -C" in told and " 'models:/gpt2;reboot/1'/artifacts/params.yaml " in told
    [file] = tmp_path.glob("a/b/checkout/.cache/models/*/artifacts/lineage.json")
    for commit in ("; reboot", "$(reboot)", "--orphan", "abc\nreboot"):
        write_json(file, lineage | {"commit": commit})
        told = provenance("models:/gpt2/1")
        assert "git -C" not in told and "so there is no commit to make it again from" in told
    for broken in (b"{}", b"[]", b"5", b"\xff", b'{"commit": ["x"]}', b"[" * 10**5):
        file.write_bytes(broken)
        error_line(lambda: provenance("models:/gpt2/1"))
