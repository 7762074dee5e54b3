"""The code that loads from the hub, against a hub of our own on this machine, and against its absence."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from test_data_prep import phrase_bank

ROOT = Path(__file__).parent.parent
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub's API that a download needs; `root/<models|datasets>/<id>/` holds the files."""

    root: Path
    broken = False

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repository(self, kind: str, rest: str) -> tuple[str, Path, str]:
        """The id of the repository that a path begins with, its folder, and the rest of the path."""
        for folder in (self.root / kind).glob("*/*"):
            name = f"{folder.parent.name}/{folder.name}"
            if rest == name or rest.startswith(f"{name}/"):
                return name, folder, rest.removeprefix(name).strip("/")
        return "", self.root, ""

    def entry(self, folder: Path, path: Path) -> dict:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": ""}
        content = path.read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        kind = "datasets" if path.removeprefix("api/").startswith("datasets/") else "models"
        name, folder, rest = self.repository(kind, path.removeprefix("api/").removeprefix(f"{kind}/"))
        file = folder / rest.removeprefix(f"resolve/{REVISION}/")
        if self.broken:
            self.answer(b"", 500)
        elif not name:
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        elif rest.startswith("revision/") and rest.removeprefix("revision/") not in ("main", REVISION):
            self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
        elif rest.startswith("tree/"):
            under = folder / rest.removeprefix(f"tree/{REVISION}").strip("/")
            found = under.rglob("*") if "recursive=true" in url.query.lower() else under.glob("*")
            self.answer_json([self.entry(folder, path) for path in found])
        elif path.startswith("api/"):
            self.answer_json({"id": name, "sha": REVISION, "siblings": [], "tags": []})
        elif rest.startswith("resolve/") and file.is_file():
            etag = f'"{self.entry(folder, file)["oid"]}"'
            self.answer(file.read_bytes(), ETag=etag, X_Repo_Commit=REVISION)
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound")

    def answer_json(self, content: object) -> None:
        self.answer(json.dumps(content).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, tiny_bert: Path) -> Iterator[ThreadingHTTPServer]:
    """A hub with one model, under the newer of BERT-base's two names, and with SST-2 as the hub lays it out."""
    root = tmp_path / "hub"
    model, data = root / "models" / "google-bert" / "bert-base-uncased", root / "datasets" / "stanfordnlp" / "sst2"
    model.mkdir(parents=True)
    (data / "data").mkdir(parents=True)
    for path in tiny_bert.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    pickled = root / "models" / "org" / "pickled"
    pickled.mkdir(parents=True)
    (pickled / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"a pickle")
    texts, labels = phrase_bank()
    frame = pd.DataFrame({"idx": range(len(texts)), "sentence": texts, "label": [int(label) for label in labels]})
    frame[20:].to_parquet(data / "data" / "train-00000-of-00001.parquet")
    frame[:20].to_parquet(data / "data" / "validation-00000-of-00001.parquet")
    (data / "README.md").write_text("---\nlicense: unknown\n---\n")
    handler = type("OurHub", (Hub,), {"root": root})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


SCRIPTS = """
import importlib, json, sys
for script, *flags in json.loads(sys.argv[1]):
    sys.argv = [f"{script}.py", *flags]
    try:
        importlib.import_module(script).main()
    except SystemExit as end:
        print(script, "ends with", end.code)
"""


# What was had from the hub is there without it, also under the model's older name, and is the same run.
def test_with_a_hub_and_then_without(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    data_dir, outputs = tmp_path / "data", tmp_path / "outputs"

    def run(port: int, *scripts: tuple[str, ...], **more: str) -> subprocess.CompletedProcess:
        hub_there = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": f"http://127.0.0.1:{port}"} | more
        command = [sys.executable, "-c", SCRIPTS, json.dumps(scripts)]
        options = {"capture_output": True, "text": True, "timeout": 300, "check": True}
        return subprocess.run(command, cwd=ROOT, env=os.environ | hub_there, **options)

    def train(model: str, *flags: str) -> tuple[str, ...]:
        what = ("--corrupt", "bottom", "--frac", "0.5", "--num_train_epochs", "1", "--disable_tqdm", "True")
        return ("train", "--model", model, *flags, *what, "--data_dir", str(data_dir), "--output_dir", str(outputs))

    def prepare(folder: Path, *what: str) -> tuple[str, ...]:
        return ("data_prep", "--data_dir", str(folder), "--dataset", *what)

    sst2 = ("sst2", "--train_size", "80", "--test_size", "40")
    wanted = train("google-bert/bert-base-uncased", "--revision", REVISION)
    others = [train("google-bert/bert-base-uncased", "--revision", "v9"), train("org/pickled")]
    done = run(hub.server_port, prepare(data_dir, *sst2), wanted, *others, train("org/no-such-model"))
    manifest = json.loads((data_dir / "sst2" / "manifest.json").read_text())
    assert manifest["source"] == {"hub": "stanfordnlp/sst2", "revision": REVISION}
    (path,) = outputs.glob("runs/*/result.json")
    assert path.parent.name.startswith("bert-base-uncased@") and f"done: {path.parent}" in done.stdout
    model = json.loads(path.read_text())["model"]
    assert (model["name"], model["revision"]) == ("google-bert/bert-base-uncased", REVISION)
    assert "unknown model 'org/no-such-model'" in done.stderr and done.stdout.count("train ends with 2\n") == 3
    assert "google-bert/bert-base-uncased has no --revision v9: give one of its branches" in done.stderr
    assert "'org/pickled' has no model.safetensors, and pickled weights are never loaded" in done.stderr
    assert "give --revision refs/pr/N" in done.stderr

    # nothing listens at port 9
    again = run(9, train("bert-base-uncased", "--revision", REVISION), train("distilbert-base-uncased"))
    assert f"was there already: {path.parent}" in again.stdout
    assert "bert-base-uncased is read from the cache" in again.stderr
    assert "'distilbert-base-uncased' is not on this machine and the hub cannot be reached" in again.stderr

    # rows, too: a cache of `datasets` serves a set that is prepared elsewhere, with its revision
    hub.RequestHandlerClass.broken = True
    without = [(9, {}), (9, {"HF_HUB_OFFLINE": "1"}), (hub.server_port, {})]
    for number, (port, offline) in enumerate(without):
        elsewhere = tmp_path / f"elsewhere {number}"
        again = run(port, prepare(elsewhere, *sst2), prepare(elsewhere, "rte"), **offline)
        of_cache, of_none = again.stderr.splitlines()
        assert of_cache.endswith(f"stanfordnlp/sst2 is read from the cache, revision {REVISION}")
        assert json.loads((elsewhere / "sst2" / "manifest.json").read_text()) == manifest
        assert "nyu-mll/glue cannot be read from the hub or its cache (connect, or copy its parquet files" in of_none
        assert again.stdout.endswith("data_prep ends with 2\n") and not (elsewhere / "rte").exists()
