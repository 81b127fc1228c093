"""Shards: what is in the samples, who goes where, identical bytes, nothing half-written, refusals.

References: token streams joined here by hand and cut by plain slices; shards are read by streaming's own reader.
"""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanogpt import errors
from nanogpt.errors import UserError
from nanogpt import convert as engine
from nanogpt.documents import InMemory
from nanogpt.shards import import_streaming, load_dataset_card
from nanogpt.tokenizer import from_json, from_name

ROOT = Path(__file__).parents[1]
DOCUMENTS = [(f"doc{i}", f"document {i}: " + "é🙂x\r\n\0" * (i % 7) + "<|endoftext|>" * (i % 2)) for i in range(40)]
BYTE = from_name("byte")


def stream_of(texts):
    """The byte tokens of a split, by hand: each document, then end-of-text (256)."""
    return [token for text in texts for token in [*text.encode("utf-8"), 256]]


def read(folder):
    """All samples of a split through streaming's reader: (samples, block_size + 1)."""
    import_streaming()
    from streaming import LocalDataset
    return np.stack([sample["tokens"] for sample in LocalDataset(str(folder))])


def hashes(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def convert(documents, *arguments, **options):
    """nanogpt.convert, of a list of (name, text or pair)."""
    return engine.convert(InMemory(documents), *arguments, **options)


def make(out, documents=DOCUMENTS, block_size=16, **options):
    card, written = convert(documents, out, BYTE, block_size, **options)
    assert card == load_dataset_card(out)
    return card


# ---- samples --------------------------------------------------------------------------------------------------------

def test_every_token_but_the_first_is_a_target_once(tmp_path):
    split = make(tmp_path / "out", val_fraction=0)["splits"]["train"]
    tokens = stream_of(text for _, text in DOCUMENTS)
    samples = read(tmp_path / "out" / "train")
    assert samples.dtype == np.uint16 and samples.shape == ((len(tokens) - 1) // 16, 17)
    again = [samples[0, 0], *samples[:, 1:].flatten()]
    assert again == tokens[:len(again)]
    assert split == {"stride": 16, "tokens": len(tokens), "samples": len(samples), "documents": 40,
                     "bytes": len(tokens) - 40, "dropped_tokens": len(tokens) - len(again)}
    assert split["dropped_tokens"] < 16
    assert not (tmp_path / "out" / "val").exists()


@pytest.mark.parametrize("stride", [1, 5, 15, 16])
@pytest.mark.parametrize("length", [17, 18, 32, 33, 34, 100])
def test_strides(tmp_path, stride, length):
    text = "".join(chr(33 + i % 90) for i in range(length - 1))
    split = make(tmp_path / "out", [("a", text)], stride=stride, val_fraction=0)["splits"]["train"]
    tokens = stream_of([text])
    starts = [start for start in range(0, length, stride) if start + 17 <= length]
    assert read(tmp_path / "out" / "train").tolist() == [tokens[start:start + 17] for start in starts]
    assert split["dropped_tokens"] == length - (starts[-1] + 17)


def test_validation_keeps_its_stride(tmp_path):
    card = make(tmp_path / "out", stride=4, val_fraction=0.2)
    assert {name: split["stride"] for name, split in card["splits"].items()} == {"train": 4, "val": 16}
    val = read(tmp_path / "out" / "val")
    assert (val[1:, 0] == val[:-1, -1]).all()


def test_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.shards.SHARD_BYTES", 600)
    make(tmp_path / "out", val_fraction=0)
    assert len(list((tmp_path / "out" / "train").glob("shard.*.mds"))) > 10
    tokens = stream_of(text for _, text in DOCUMENTS)
    samples = read(tmp_path / "out" / "train")
    assert samples.tolist() == [tokens[i:i + 17] for i in range(0, len(tokens) - 16, 16)]


def test_compression(tmp_path):
    import zstd
    make(tmp_path / "plain")
    make(tmp_path / "zstd", compression="zstd")
    folder = tmp_path / "zstd" / "train"
    assert not list(folder.glob("*.mds"))
    for packed in folder.glob("*.zstd"):
        packed.with_suffix("").write_bytes(zstd.decompress(packed.read_bytes()))
    assert (read(folder) == read(tmp_path / "plain" / "train")).all()


# ---- who goes where -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fraction, n_val", [(0.1, 4), (0.11, 4), (0.001, 1), (0.999, 39)])
def test_split_by_whole_documents(tmp_path, fraction, n_val):
    card = make(tmp_path / "out", val_fraction=fraction, seed=7)
    chosen = np.random.default_rng(7).choice(40, n_val, replace=False)
    for name, picked in (("val", [i in chosen for i in range(40)]), ("train", [i not in chosen for i in range(40)])):
        tokens = stream_of(text for (_, text), here in zip(DOCUMENTS, picked) if here)
        samples = read(tmp_path / "out" / name)
        assert samples.tolist() == [tokens[i:i + 17] for i in range(0, len(tokens) - 16, 16)]
        assert card["splits"][name]["documents"] == sum(picked)


def test_split_depends_on_the_seed(tmp_path):
    for seed in (1, 2):
        make(tmp_path / str(seed), val_fraction=0.2, seed=seed)
    one, two = (hashes(tmp_path / seed / "val") for seed in "12")
    assert one != two


def test_single_document_gives_its_last_part(tmp_path):
    text = "".join(chr(192 + i % 99) for i in range(1001))  # two bytes each: the cut counts characters
    card = make(tmp_path / "out", [("a", text)], val_fraction=0.1)
    for name, part in (("train", text[:900]), ("val", text[900:])):  # nanoGPT: data[:int(n*0.9)], data[int(n*0.9):]
        tokens = stream_of([part])
        assert read(tmp_path / "out" / name).tolist() == [tokens[i:i + 17] for i in range(0, len(tokens) - 16, 16)]
        assert card["splits"][name]["bytes"] == 2 * len(part)
        assert card["splits"][name]["documents"] == 1


# ---- the same bytes always ------------------------------------------------------------------------------------------

def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.documents.CHUNK", 100)  # many tasks
    char = from_name("char", (text for _, text in DOCUMENTS))
    for name, workers in (("one", 1), ("again", 1), ("two", 2)):
        convert(DOCUMENTS, tmp_path / name, char, 16, val_fraction=0.2, workers=workers)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "again") == hashes(tmp_path / "two")
    assert len(hashes(tmp_path / "one")) == 5
    with pytest.raises(UserError, match=r"^doc1: character \d+, "):  # of a worker, as without
        convert(DOCUMENTS, tmp_path / "bad", from_name("char", ["document 0: "]), 16, workers=2)
    assert not (tmp_path / "bad").exists()


def test_done_already(tmp_path):
    out = tmp_path / "out"
    inputs = InMemory(DOCUMENTS)
    inputs.options["paths"] = ["here"]
    card, written = engine.convert(inputs, out, BYTE, 16)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    inputs.options["paths"] = ["elsewhere"]  # for people
    again, written_again = engine.convert(inputs, out, BYTE, 16, workers=2)
    assert (written, written_again) == (True, False) and again == card
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.parametrize("difference, named", [
    ({"block_size": 8}, "block_size"), ({"stride": 8}, "source.stride"), ({"val_fraction": 0.2}, "source.val_fraction"),
    ({"seed": 1}, "source.seed"), ({"compression": "zstd"}, "source.compression"),
    ({"documents": DOCUMENTS[::-1]}, "source.xxh3_128"), ({"shuffle": 1}, "source.shuffle"),
    ({"tokenizer": from_name("char", [text for _, text in DOCUMENTS])}, "tokenizer"),
])
def test_another_dataset_is_in_the_way(tmp_path, difference, named):
    options = {"documents": DOCUMENTS, "out": tmp_path / "out", "tokenizer": BYTE, "block_size": 16}
    convert(**options)
    before = hashes(tmp_path)
    with pytest.raises(UserError, match=rf"another dataset \({named}[,)].*--overwrite"):
        convert(**{**options, **difference})
    assert hashes(tmp_path) == before
    card, written = convert(**{**options, **difference}, overwrite=True)
    assert written and card == load_dataset_card(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_other_folders_are_left_alone(tmp_path):
    for name in ("notes.txt", "dataset.json/x", "train/x"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
    make(tmp_path / "dataset")
    (tmp_path / "dataset" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = hashes(tmp_path)
    for folder in tmp_path.iterdir():
        with pytest.raises(UserError, match=str(folder)):
            make(folder, overwrite=folder.name != "dataset.json-x")
    assert hashes(tmp_path) == before
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")


# ---- nothing half-written -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, seen", [(OSError(28, "No space left on device"), UserError),
                                         (KeyboardInterrupt(), None), (RuntimeError("a bug"), None)])
@pytest.mark.parametrize("there_before", [False, True])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, error, seen, there_before):
    if there_before:
        make(tmp_path / "out")
    before = hashes(tmp_path)

    def fail(*_):
        raise error

    monkeypatch.setattr(engine, "_encode", fail)
    with pytest.raises(seen or type(error)):
        make(tmp_path / "out", overwrite=True)
    assert hashes(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"] * there_before


def test_a_failing_rename_keeps_the_old_dataset(tmp_path, monkeypatch):
    make(tmp_path / "out")
    before, rename = hashes(tmp_path / "out"), os.rename

    def fail(source, target):
        if target == tmp_path / "out" and source.name == "dataset":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match="Input/output error"):
        make(tmp_path / "out", block_size=8, overwrite=True)
    assert hashes(tmp_path / "out") == before


SLOW = """
import multiprocessing, sys, time
sys.path.insert(0, sys.argv[1])
from nanogpt import convert
from nanogpt.documents import InMemory
from nanogpt.errors import run
from nanogpt.tokenizer import from_name

submit, submitted = convert._Pool._submit, []

def slow(*arguments):
    future = submit(*arguments)
    submitted.append(future)
    if len(submitted) == int(sys.argv[3]):
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        time.sleep(60)
    return future

def main():
    convert._Pool._submit = slow
    documents = [(f"doc{i}", "text " * 400_000) for i in range(6)]
    convert.convert(InMemory(documents), sys.argv[2], from_name("byte"), 1024, workers=2)

if __name__ == "__main__":
    run(main)
"""


@pytest.mark.parametrize("end, when", [(signal.SIGINT, "2"),  # the workers are still importing
                                       (signal.SIGKILL, "6")])  # they have begun
def test_killed(tmp_path, end, when):
    script, out = tmp_path / "slow.py", tmp_path / "here" / "out"
    script.write_text(SLOW)
    command = [sys.executable, str(script), str(ROOT), str(out), when]
    with open(tmp_path / "stderr", "w+") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True)
        workers = process.stdout.readline().split()
        assert len(workers) == 2
        if end == signal.SIGINT:
            os.killpg(process.pid, end)  # as a terminal does
        else:
            process.kill()
        process.stdout.read()  # to its end: nobody holds the pipe any more, workers neither
        status = process.wait()
        stderr.seek(0)
        said = stderr.read()
    assert not out.exists()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(alive(pid) for pid in workers):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
    if end == signal.SIGINT:
        assert status == 130 and said == "" and os.listdir(out.parent) == []
    else:
        assert os.listdir(out.parent) == [".out.partial"]  # what it had written; nobody takes it for a dataset
        make(out, overwrite=True)


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{int(pid)}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"block_size": 0}, "--block-size: 0"), ({"block_size": 2**21}, "--block-size"), ({"stride": 0}, "--stride: 0"),
    ({"stride": 17}, "--stride: 17"), ({"val_fraction": 1.0}, "--val-fraction: 1.0"),
    ({"val_fraction": -0.1}, "--val-fraction: -0.1"), ({"val_fraction": float("nan")}, "--val-fraction: nan"),
    ({"seed": -1}, "--seed: -1"), ({"workers": 0}, "--workers: 0"),
])
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        convert(**{"documents": DOCUMENTS, "out": tmp_path / "out", "tokenizer": BYTE, "block_size": 16, **options})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("length, block_size, message", [
    (15, 16, r"train split has 16 tokens.* 17; .*smaller --block-size$"),
    (40, 16, r"val split has 5 tokens.* 17; .*larger --val-fraction, or --val-fraction 0"),
])
def test_too_short(tmp_path, length, block_size, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", [("a", "x" * length)], block_size, val_fraction=0 if length < 16 else 0.1)
    assert os.listdir(tmp_path) == []


def test_dataset_card_is_checked(tmp_path):
    out = tmp_path / "out"
    card = make(out)
    assert from_json(card["tokenizer"]).fingerprint == BYTE.fingerprint

    def refused(content, message):
        (out / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError, match=f"dataset.json: .*{message}") as error:
            load_dataset_card(out)
        assert "\n" not in str(error.value)

    for where, key, value in [
        ((), "format", 2), ((), "format", True), ((), "tokenizer", "byte"), ((), "block_size", 0),
        ((), "block_size", "16"), ((), "dtype", "object"), ((), "splits", []), ((), "splits", {}), ((), "source", None),
        (("tokenizer",), "fingerprint", None), (("tokenizer",), "vocab_size", 2.5), (("splits",), "train", 7),
        (("splits", "train"), "samples", -1), (("splits", "val"), "stride", None), (("splits",), "../x", {}),
    ]:
        changed = json.loads(json.dumps(card))
        inner = changed
        for step in where:
            inner = inner[step]
        inner[key] = value
        refused(changed, "format" if key == "format" else "splits" if key in ("splits", "../x") else key)
    refused(json.dumps(card)[:-20], "is damaged")
    refused("[]", "format")
    refused("", "is damaged")
    (out / "dataset.json").unlink()
    with pytest.raises(UserError, match="dataset.json: is missing; make the dataset with tools/convert_text_to_mds.py"):
        load_dataset_card(out)
    with pytest.raises(UserError, match="is missing"):
        load_dataset_card(tmp_path / "nowhere")


def test_import_streaming_leaves_no_trace():
    code = """if True:
        import sys
        from nanogpt.shards import import_streaming
        streaming = import_streaming()
        assert import_streaming() is streaming is sys.modules["streaming"] and streaming.MDSWriter
        assert not {"streaming.vision", "streaming.text", "streaming.multimodal", "torchvision"} & set(sys.modules)
        from importlib.machinery import PathFinder
        assert PathFinder.find_spec("streaming.vision", streaming.__path__)  # whoever wants the real one imports it
        sys.modules["streaming.vision"] = mark = object()  # as if it had been imported before
        assert import_streaming() is streaming and sys.modules["streaming.vision"] is mark
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- the tools ------------------------------------------------------------------------------------------------------

def run_tool(tool, *arguments, cwd=None):
    """A tool in a process of its own."""
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def call_tool(capsys, monkeypatch, tool, *arguments):
    """A tool in this process, which has imported everything already: (status, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("tool_under_test", ROOT / "tools" / tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    try:
        errors.run(module.main)
        status = 0
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def one_line(status, stderr):
    return status == 1 and stderr.startswith("error: ") and stderr.count("\n") == 1 and "Traceback" not in stderr


@pytest.fixture
def corpus(tmp_path):
    """A folder of files, which the tools take in the order of their paths: a/b.txt, a/c.py, b.txt, z/é.txt."""
    texts = {"z/é.txt": "last\r\n" * 30, "b.txt": "third " * 30, "a/c.py": "print('second')\n" * 30,
             "a/b.txt": "first🙂" * 30, "a/empty.txt": ""}
    for name, text in texts.items():
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_bytes(text.encode())
    return tmp_path / "corpus"


def test_tools_from_anywhere(tmp_path, corpus):
    done = run_tool("convert_text_to_mds.py", "--input", "corpus", "--out", "deep/out", "--tokenizer", "byte",
                    "--block-size", 32, "--val-fraction", 0, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    tokens = stream_of((corpus / name).read_bytes().decode() for name in ("a/b.txt", "a/c.py", "b.txt", "z/é.txt"))
    assert read(tmp_path / "deep/out/train").tolist() == [tokens[i:i + 33] for i in range(0, len(tokens) - 32, 32)]
    assert f"tokens {len(tokens):,}" in done.stdout and "documents 4" in done.stdout and "deep/out" in done.stdout

    shown = run_tool("inspect_mds.py", "deep/out", "--verify", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"tokens {len(tokens):,}" in shown.stdout and "verified: 1 shards" in shown.stdout
    assert BYTE.fingerprint[:16] in shown.stdout
    assert f"train sample 2, tokens 64 to 96: {bytes(tokens[64:97]).decode('utf-8', 'replace')!r}" in shown.stdout


def test_inputs(tmp_path, corpus, capsys, monkeypatch):
    def converted(*arguments):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        status, _, stderr = call_tool(capsys, monkeypatch, "convert_text_to_mds.py", *arguments, "--out", out,
                                      "--tokenizer", "char", "--block-size", 8, "--val-fraction", 0)
        assert (status, stderr) == (0, "")
        card = load_dataset_card(out)
        samples = read(out / "train")
        decoded = from_json(card["tokenizer"]).decode([samples[0, 0], *samples[:, 1:].flatten()])
        return [text[:5] for text in decoded.split("<|endoftext|>") if text]

    assert converted("--input", corpus, "--glob", "*.txt") == ["first", "third", "last\r"]
    assert converted("--input", corpus / "z", corpus / "b.txt") == ["last\r", "third"]
    assert converted("--input", f"{corpus}/**/*.txt", corpus / "b.txt") == ["first", "third", "last\r"]
    (corpus / "bad.txt").write_bytes(b"good " * 10 + b"\xff" + b"bad " * 10)
    assert converted("--input", corpus, "--errors", "skip") == ["first", "print", "third", "last\r"]
    assert converted("--input", corpus, "--errors", "replace") == ["first", "print", "third", "good ", "last\r"]


def test_run_again(tmp_path, corpus, capsys, monkeypatch):
    arguments = ["convert_text_to_mds.py", "--input", corpus, "--out", tmp_path / "out", "--tokenizer", "char",
                 "--block-size", 8, "--val-fraction", 0.5]
    assert call_tool(capsys, monkeypatch, *arguments)[0] == 0
    before = hashes(tmp_path / "out")
    done = run_tool(*arguments)
    assert (done.returncode, done.stderr) == (0, "") and "is there already" in done.stdout
    (corpus / "b.txt").write_text("changed " * 30)
    done = run_tool(*arguments)
    assert one_line(done.returncode, done.stderr) and "source.xxh3_128" in done.stderr
    assert hashes(tmp_path / "out") == before


@pytest.mark.parametrize("arguments, message", [
    (["--input", "nowhere.txt"], "nowhere.txt: is not there"),
    (["--input", "corpus/*.md"], "corpus/*.md: is not there"),
    (["--input", "corpus/a/empty.txt"], "corpus/a/empty.txt: holds no text"),
    (["--input", "void"], "void: holds no file that matches *"),
    (["--input", "corpus", "--glob", "*.md"], "corpus: holds no file that matches *.md"),
    (["--input", "."], "out: lies inside the input ."),
    (["--input", "corpus", "--out", "corpus"], "corpus: lies inside the input corpus"),
    (["--input", "corpus", "--out", "corpus/a/b.txt/out"], "corpus/a/b.txt/out: lies inside"),
    (["--input", "corpus/b.txt", "--out", "corpus/b.txt"], "corpus/b.txt: exists and is not a dataset folder"),
    (["--input", "corpus", "--block-size", "0"], "--block-size: 0 is out of range"),
    (["--input", "corpus", "--block-size", "1.5"], "invalid int value: '1.5'"),
    (["--input", "corpus", "--stride", "9"], "--stride: 9 is out of range; take 1 to the block size, 8"),
    (["--input", "corpus", "--val-fraction", "1"], "--val-fraction: 1.0 is out of range"),
    (["--input", "corpus", "--val-fraction", "nan"], "--val-fraction: nan is out of range"),
    (["--input", "corpus", "--tokenizer", "bite"], "did you mean byte?"),
    (["--input", "corpus", "--tokenizer", "corpus/b.txt"], "corpus/b.txt: line 1 is b'third third"),
    (["--input", "corpus", "--compression", "gzip"], "invalid choice: 'gzip'"),
    (["--input", "corpus", "--workesr", "2"], "unrecognized arguments: --workesr 2"),
    (["--out", "out"], "--input"),
])
def test_bad_input(tmp_path, corpus, arguments, message):
    (tmp_path / "void").mkdir()
    before = hashes(tmp_path)
    defaults = ["--out", "out", "--tokenizer", "byte", "--block-size", "8"]
    done = run_tool("convert_text_to_mds.py", *defaults, *arguments, cwd=tmp_path)
    assert one_line(done.returncode, done.stderr), done.stderr
    assert message in done.stderr
    assert hashes(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["corpus", "void"]


@pytest.mark.parametrize("arguments, message", [
    (["--input", "bad.txt"], "bad.txt: is not UTF-8 at byte 52"),
    (["--input", "corpus", "--block-size", "10000"], "the train split has"),
    (["--input", "corpus/b.txt", "--block-size", "100"], "the val split has 3 tokens, and a sample takes"),
    (["--input", "corpus", "--out", "/proc/nanogpt/out"], "/proc/nanogpt/out: cannot be written"),
    (["--input", "corpus", "--out", "file/out"], "file/out: cannot be written (Not a directory)"),
])
def test_bad_input_found_while_writing(tmp_path, corpus, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"x" * 52 + b"\xff")
    (tmp_path / "file").write_text("")
    before = hashes(tmp_path)
    defaults = ["--out", "out", "--tokenizer", "byte", "--block-size", "8"]
    status, stdout, stderr = call_tool(capsys, monkeypatch, "convert_text_to_mds.py", *defaults, *arguments)
    assert one_line(status, stderr), stderr
    assert message in stderr and stdout == ""
    assert hashes(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["bad.txt", "corpus", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everywhere")
def test_no_permission(tmp_path, corpus, capsys, monkeypatch):
    (tmp_path / "locked").mkdir(mode=0o500)
    (corpus / "b.txt").chmod(0)
    for arguments, message in ((["--input", corpus / "z", "--out", tmp_path / "locked/out"], "Permission denied"),
                               (["--input", corpus, "--out", tmp_path / "out"], "b.txt: cannot be read")):
        status, _, stderr = call_tool(capsys, monkeypatch, "convert_text_to_mds.py", *arguments, "--tokenizer", "byte")
        assert one_line(status, stderr) and message in stderr


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_inspect_finds_damage(tmp_path, monkeypatch, capsys, compression):
    monkeypatch.setattr("nanogpt.shards.SHARD_BYTES", 600)
    out = tmp_path / "out"
    make(out, compression=compression, val_fraction=0.3)
    inspect = ("inspect_mds.py", out, "--samples", "1")
    status, stdout, stderr = call_tool(capsys, monkeypatch, *inspect, "--verify")
    assert (status, stderr) == (0, "") and "val sample 0" in stdout

    flipped, cut, lost = shards = sorted((out / "train").glob("shard.*"))[1:4]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    lost.unlink()
    status, stdout, stderr = call_tool(capsys, monkeypatch, *inspect, "--verify")
    lines = stderr.splitlines()
    assert status == 1 and len(lines) == 3
    for line, path, problem in zip(lines, shards, ("is damaged", "bytes", "is missing")):
        assert line.startswith(f"error: {path}: ") and problem in line

    first = out / "train" / lost.name.replace("3", "0", 1)
    for damage in (first.read_bytes()[:50], b""):
        first.write_bytes(damage)
        status, stdout, stderr = call_tool(capsys, monkeypatch, *inspect)
        assert one_line(status, stderr) and f"{first.name}: cannot be read" in stderr
    (out / "train" / "index.json").write_text('{"shards": [{')
    status, stdout, stderr = call_tool(capsys, monkeypatch, *inspect)
    assert one_line(status, stderr) and "train/index.json: is damaged" in stderr and "val sample 0" in stdout


def test_inspect_bad_input(tmp_path):
    make(tmp_path / "out", val_fraction=0)
    for arguments, message in (([tmp_path / "nowhere"], "dataset.json: is missing"), ([], "DIR"),
                               ([tmp_path / "out", "--sample", "x"], "invalid int value")):
        done = run_tool("inspect_mds.py", *arguments)
        assert one_line(done.returncode, done.stderr) and message in done.stderr
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    card["tokenizer"]["fingerprint"] = "0" * 64
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(card))
    done = run_tool("inspect_mds.py", tmp_path / "out")
    assert one_line(done.returncode, done.stderr) and "stored tokenizer 'byte'" in done.stderr


def test_control_characters_stay_off_the_terminal(tmp_path):
    make(tmp_path / "out", [("a", "\x1b[2J\x07\u202e\x9b" * 20 + "é")], val_fraction=0)
    done = subprocess.run([sys.executable, str(ROOT / "tools/inspect_mds.py"), str(tmp_path / "out")],
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0
    assert not set(done.stdout) & (set(range(32)) - {10}) and max(done.stdout) < 127


def test_help_is_quick():
    for tool in ("convert_text_to_mds.py", "inspect_mds.py"):
        done = run_tool(tool, "--help")
        assert done.returncode == 0 and "usage:" in done.stdout
    code = "import sys, nanogpt.shards, nanogpt.convert; assert not {'torch', 'streaming', 'tiktoken'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
