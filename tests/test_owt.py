"""tools/convert_owt_to_mds.py on a dataset that is laid out as OpenWebText is on the hub: as a folder, and from a hub.

References: the split that nanoGPT's prepare.py makes, by the datasets library itself; bytes joined by hand. The hub is a
server on loopback that answers as the real one does.
"""

import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.parse

import pyarrow
import pyarrow.parquet
import pytest
from test_shards import ROOT, call_tool, hashes, one_line, read, stream_of

from nanogpt.shards import load_dataset_card

NAME, COMMIT = "Skylion007/openwebtext", "0123456789abcdef0123456789abcdef01234567"
README = """---
configs:
- config_name: plain_text
  data_files: [{split: train, path: plain_text/train-*}, {split: other, path: other/*}]
---
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder in the hub's layout, and its documents: three Parquet files with row groups of several sizes."""
    folder = tmp_path_factory.mktemp("hub") / "openwebtext"
    choose = random.Random(0)
    texts = ["".join(choose.choices("ab é🙂\r\n\0", k=choose.randrange(1, 100))) for _ in range(2500)]
    texts[7], texts[8] = "", "<|endoftext|>"
    for i, rows in enumerate((7, 300, 10000)):
        path = folder / "plain_text" / f"train-{i:05}-of-00003.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        column = pyarrow.array(texts[i * 1000:(i + 1) * 1000])
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=rows)
    (folder / "other").mkdir()
    (folder / "other" / "x.parquet").write_bytes(path.read_bytes())
    (folder / "README.md").write_text(README)
    return folder, texts


OPTIONS = ["--tokenizer", "byte", "--block-size", "16"]


def convert(capsys, monkeypatch, *arguments):
    return call_tool(capsys, monkeypatch, "convert_owt_to_mds.py", *OPTIONS, *arguments)


@pytest.fixture(scope="module")
def converted(hub, tmp_path_factory):
    """The dataset of the folder, written in a process of its own by two workers."""
    out = tmp_path_factory.mktemp("converted") / "owt"
    done = run_tool("--hf-dataset", hub[0], "--out", out, "--workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "documents 2,497" in done.stdout and "left out: 1 empty documents" in done.stdout
    return out


def run_tool(*arguments, **environment):
    command = [sys.executable, str(ROOT / "tools" / "convert_owt_to_mds.py"), *OPTIONS, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def test_the_split_is_that_of_nanogpt(hub, converted):
    import datasets
    split = datasets.Dataset.from_dict({"text": hub[1]}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    held_out = split["test"]["text"]
    assert len(held_out) == 2  # ceil, not round
    card = load_dataset_card(converted)
    for name, chosen in (("val", [text for text in hub[1] if text in held_out]),
                         ("train", [text for text in hub[1] if text and text not in held_out])):
        tokens = stream_of(chosen)
        assert sorted(held_out) == sorted(chosen) or name == "train"
        assert read(converted / name).tolist() == [tokens[i:i + 17] for i in range(0, len(tokens) - 16, 16)]
        assert card["splits"][name]["documents"] == len(chosen) and card["splits"][name]["tokens"] == len(tokens)
    assert card["source"]["kind"] == "hugging face" and card["source"]["documents"] == 2500


def test_streaming_is_the_same(hub, converted, tmp_path, capsys, monkeypatch):
    status, _, stderr = convert(capsys, monkeypatch, "--hf-dataset", hub[0], "--out", tmp_path / "owt", "--workers", "1",
                                "--streaming", "--hf-config", "plain_text")
    assert (status, stderr) == (0, "")
    same, again = hashes(converted), hashes(tmp_path / "owt")
    assert same.pop("dataset.json") != again.pop("dataset.json") and same == again  # another option, the same shards
    status, stdout, _ = convert(capsys, monkeypatch, "--hf-dataset", hub[0], "--out", converted, "--streaming")
    assert status == 0 and "is there already" in stdout


@pytest.mark.parametrize("arguments, message", [
    (["--split", "test"], "--split: .*openwebtext has no 'test', but train, other$"),
    (["--column", "body"], r"00000-of-00003.parquet: has no column 'body', but 'text'; name the text's by --column$"),
    (["--hf-config", "raw"], r"openwebtext: cannot be opened \(ValueError: BuilderConfig 'raw' not found. Available: "),
    (["--revision", "main"], "--revision: is of a dataset of the hub, and a folder has none"),
    (["--val-fraction", "2"], "--val-fraction: 2.0 is out of range"),
    (["--shuffle-documents", "-1"], "--shuffle-documents: -1 is out of range"),
    (["--train-bpe", "0"], "--train-bpe: 0 is out of range")])
def test_bad_input(hub, tmp_path, capsys, monkeypatch, arguments, message):
    status, stdout, stderr = convert(capsys, monkeypatch, "--hf-dataset", hub[0], "--out", tmp_path / "owt", *arguments)
    assert one_line(status, stderr) and re.search(message, stderr) and stdout == "", stderr
    assert os.listdir(tmp_path) == []


# ---- from a hub -----------------------------------------------------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub answers of one dataset, whose files are in `folder`; `asked` notes the bytes of files that were sent."""
    folder, sent, protocol_version = None, 0, "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        if path == f"/api/datasets/{NAME}" or path.startswith(f"/api/datasets/{NAME}/revision/"):
            if path.endswith("/nowhere"):
                return self.answer(b"{}", 404, **{"X-Error-Code": "RevisionNotFound"})
            names = [str(file.relative_to(self.folder)) for file in sorted(self.folder.rglob("*")) if file.is_file()]
            return self.answer({"id": NAME, "sha": COMMIT, "private": False, "gated": False, "downloads": 0, "likes": 0,
                                "tags": [], "siblings": [{"rfilename": name} for name in names]})
        if path.startswith(f"/api/datasets/{NAME}/tree/{COMMIT}"):
            inner = self.folder / path.removeprefix(f"/api/datasets/{NAME}/tree/{COMMIT}").strip("/")
            if not inner.is_dir():
                return self.answer(b"{}", 404, **{"X-Error-Code": "EntryNotFound"})
            found = inner.rglob("*") if "recursive=true" in url.query.lower() else inner.iterdir()
            return self.answer([self.entry(file) for file in sorted(found)])
        if path.startswith(f"/datasets/{NAME}/resolve/{COMMIT}/"):
            file = self.folder / path.removeprefix(f"/datasets/{NAME}/resolve/{COMMIT}/")
            if not file.is_file():
                return self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            data, status, headers = file.read_bytes(), 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{self.entry(file)["oid"]}"'}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                data, status = data[first:last + 1], 206
            if self.command == "GET":
                Hub.sent += len(data) * file.name.endswith(".parquet")
            return self.answer(data, status, **headers)
        self.answer(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body) if body.startswith("{") else urllib.parse.parse_qs(body)
        self.answer([self.entry(self.folder / name) for name in asked["paths"] if (self.folder / name).exists()])

    def entry(self, file):
        kind = "directory" if file.is_dir() else "file"
        return {"type": kind, "path": str(file.relative_to(self.folder)), "size": file.stat().st_size,
                "oid": f"{hash(file.name) % 2**64:040x}"}

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def server(hub):
    Hub.folder, Hub.sent = hub[0], 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_from_a_hub(hub, converted, tmp_path, server, streaming):
    where = {"HF_ENDPOINT": server, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    workers = "2" if streaming else "1"
    done = run_tool("--hf-config", "plain_text", "--out", tmp_path / "owt", "--workers", workers, *streaming, **where)
    assert done.returncode == 0, done.stderr
    card = load_dataset_card(tmp_path / "owt")
    assert card["source"]["revision"] == COMMIT and card["source"]["files"] == 3 and card["source"]["documents"] == 2500
    same, again = hashes(converted), hashes(tmp_path / "owt")
    assert same.pop("dataset.json") != again.pop("dataset.json") and same == again
    sizes = [file.stat().st_size for file in (hub[0] / "plain_text").iterdir()]
    assert Hub.sent >= sum(sizes)
    stored = [file for file in (tmp_path / "home").rglob("*")
              if file.is_file() and not file.is_symlink() and file.stat().st_size in sizes]
    assert len(stored) == (0 if streaming else 3)
    if not streaming:
        assert Hub.sent == sum(sizes)
        before = Hub.sent
        done = run_tool("--hf-config", "plain_text", "--out", tmp_path / "owt", "--streaming", **where)
        assert done.returncode == 0 and "is there already" in done.stdout and Hub.sent == before


@pytest.mark.parametrize("arguments, message", [
    (["--revision", "nowhere"], f"{NAME}@nowhere: there is no such branch, tag or commit"),
    (["--hf-dataset", "no/such"], "no/such: there is no such dataset on the hub, or it is private: then set HF_TOKEN"),
    (["--hf-dataset", "./nowhere"], "./nowhere: is neither a folder nor the name of a dataset on the hub, like")])
def test_what_the_hub_lacks(tmp_path, server, arguments, message):
    done = run_tool("--out", tmp_path / "owt", *arguments, HF_ENDPOINT=server, HF_HOME=str(tmp_path / "home"))
    assert one_line(done.returncode, done.stderr) and message in done.stderr, done.stderr
    assert not (tmp_path / "owt").exists()


def test_no_network(tmp_path):
    began = time.monotonic()
    done = run_tool("--out", tmp_path / "owt", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    assert one_line(done.returncode, done.stderr) and time.monotonic() - began < 15
    assert f"{NAME}: the hub cannot be reached (" in done.stderr and "give that folder as --hf-dataset" in done.stderr
    assert not (tmp_path / "owt").exists()
