"""tools/inspect_mds.py on dataset folders: lengths of documents, two folders compared, every shard hashed, MDS of others.

References: token streams that are joined here by hand, and counted and compared by plain Python.
"""

import ast
import fcntl
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_shards import call_tool, one_line

from nanogpt import shards
from nanogpt.config import Config
from nanogpt.convert import convert
from nanogpt.documents import InMemory, text_files
from nanogpt.shards import import_streaming, load_dataset_card
from nanogpt.tokenizer import from_name

ROOT = Path(__file__).parents[1]
BYTE = from_name("byte")
LENGTHS = [1, 2, 3, 4, 40, 63, 64, 65, 200, 7, 8, 900, 31, 32, 5, 128] * 3 + [50]
TEXTS = ["".join(chr(97 + (i * 7 + k) % 26) for k in range(n)) for i, n in enumerate(LENGTHS)]
CHANGED = [*TEXTS[:30], TEXTS[30][:9] + "É" + TEXTS[30][11:], *TEXTS[31:]]  # as many bytes
PAIRS = [(f"ask {i}", f"answer {'x' * (i % 9)}") for i in range(60)]


def stream_of(texts):
    return [token for text in texts for token in [*text.encode(), 256]]


def written(folder, texts, block_size, tokenizer=BYTE, **options):
    """A dataset of texts, all to train on, in shards of a few samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 1500)
        documents = InMemory((f"doc{i}", text) for i, text in enumerate(texts))
        convert(documents, folder, tokenizer, block_size, **{"val_fraction": 0, **options})
    assert len(list((folder / "train").glob("shard.*"))) > 2
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    for name, texts, block_size, options in [
        ("plain", TEXTS, 32, {}), ("again", TEXTS, 32, {}), ("windows", TEXTS, 16, dict(stride=5, compression="zstd")),
        ("changed", CHANGED, 24, {}), ("longer", [*TEXTS, "more" * 20], 32, {}),
        ("split", TEXTS, 32, dict(val_fraction=0.3)), ("split, other tail", TEXTS, 31, dict(val_fraction=0.3)),
        ("char", TEXTS, 32, dict(tokenizer=from_name("char", TEXTS))), ("pairs", PAIRS, 64, {}),
        ("pairs, longer rows", PAIRS, 100, {}),
        ("other pairs", [*PAIRS[:7], ("ask 7", "Answer xxxxxxx"), *PAIRS[8:]], 64, {}),
    ]:
        written(folder / name, texts, block_size, **options)
    return folder


@pytest.fixture
def inspect(capsys, monkeypatch):
    def call(*arguments):
        return call_tool(capsys, monkeypatch, "inspect_mds.py", *arguments)
    return call


def the_tool():
    spec = importlib.util.spec_from_file_location("inspect_under_test", ROOT / "tools" / "inspect_mds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- lengths --------------------------------------------------------------------------------------------------------

def table(stdout):
    """{shortest length: (documents, share, tokens up to here in percent)} and the tokens of an unfinished one, of train."""
    line = re.compile(r"^ +([\d,]+)(?: to [\d,]+)? +([\d,]+) +([\d.]+)% +([\d.]+)%(?:  #+)?$", re.M)
    part = stdout[stdout.index("train documents by length"):].split("\nval ")[0]
    rows = {int(a.replace(",", "")): (int(b.replace(",", "")), float(c), float(d)) for a, b, c, d in line.findall(part)}
    unfinished = re.search(r"one more goes on .* after ([\d,]+) tokens", part)
    return rows, unfinished and int(unfinished[1])


def counted(tokens):
    """The same by plain Python, of a stream of tokens."""
    lengths, open_ = [], 0
    for token in tokens:
        if token == 256:
            lengths.append(open_)
        open_ = 0 if token == 256 else open_ + 1
    bins = [0, *(1 << k for k in range(20))]
    bins = [low for low in bins if low <= max(lengths) and 2 * low > min(lengths)]
    groups = [[n for n in lengths if low <= n < max(1, 2 * low)] for low in bins]
    rows = {low: (len(g), round(100 * len(g) / len(lengths), 1), round(100 * sum(map(sum, groups[:i])) / sum(lengths), 1))
            for i, (low, g) in enumerate(zip(bins, groups), 1)}
    return rows, open_ or None


@pytest.mark.parametrize("name, stored", [("plain", 32), ("windows", 5)])
def test_lengths_of_documents(folders, inspect, name, stored):
    card = load_dataset_card(folders / name)["splits"]["train"]
    tokens = stream_of(TEXTS)
    assert len(tokens) == card["tokens"] and card["stride"] == stored
    status, stdout, stderr = inspect(folders / name, "--samples", 0)
    assert (status, stderr) == (0, "") and "of all shards" in stdout
    assert table(stdout) == counted(tokens[:len(tokens) - card["dropped_tokens"]])


def test_lengths_of_pairs(folders, inspect):
    tokens = [token for prompt, completion in PAIRS for token in [*prompt.encode(), *completion.encode(), 256]]
    for name in ("pairs", "pairs, longer rows"):
        assert table(inspect(folders / name, "--samples", 0)[1]) == counted(tokens)


def test_lengths_of_the_first_shards(folders, capsys, monkeypatch):
    tool, index = the_tool(), json.loads((folders / "plain" / "train" / "index.json").read_text())["shards"]
    budget = index[0]["raw_data"]["bytes"] + 1  # not enough for two
    monkeypatch.setattr(tool, "HISTOGRAM", budget)

    def shown(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect_mds.py", str(folders / "plain"), "--samples", "0", *arguments])
        tool.main()
        return capsys.readouterr().out
    samples = sum(shard["samples"] for shard in index[:2])
    assert f"of the first 2 of {len(index)} shards (--histogram all: of all)" in (stdout := shown())
    assert table(stdout) == counted(stream_of(TEXTS)[:samples * 32])
    everything = table(shown("--histogram", "all"))
    assert everything == table(shown("--verify")) and everything != table(stdout)
    assert "by length" not in shown("--histogram", "none") + shown("--histogram", "none", "--verify")


# ---- two datasets ---------------------------------------------------------------------------------------------------

def test_the_same_tokens(folders, inspect):
    status, stdout, stderr = inspect("--diff", folders / "plain", folders / "again")
    shown = stdout.splitlines()
    n = len(list((folders / "plain" / "train").glob("shard.*")))
    assert (status, stderr) == (0, "") and shown[-1] == "they hold the same tokens"
    assert f"  train: A has {n} shards, B {n}; {n} are the same by index.json" in shown and "tokenizer" not in stdout

    status, stdout, stderr = inspect("--diff", folders / "plain", folders / "windows")
    assert (status, stderr) == (0, "") and stdout.endswith("they hold the same tokens\n")
    for said in ("block_size: 32 and 16\n", "source.stride: 32 and 5\n", "source.compression: None and 'zstd'\n",
                 "; 0 are the same by index.json\n"):
        assert said in stdout
    a, b = (load_dataset_card(folders / name)["splits"]["train"] for name in ("plain", "windows"))
    held = [split["tokens"] - split["dropped_tokens"] for split in (a, b)]
    assert held[0] != held[1] and f"of {a['tokens']:,} A holds the first {held[0]:,}, B {held[1]:,}" in stdout

    assert inspect("--diff", folders / "split", folders / "split, other tail")[0] == 0
    assert inspect("--diff", folders / "pairs", folders / "pairs, longer rows")[0] == 0  # other rows, other padding


def test_the_first_difference(folders, inspect):
    one, other = stream_of(TEXTS), stream_of(CHANGED)
    at = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    for a, b, blocks in (("plain", "changed", (32, 24)), ("changed", "plain", (24, 32)), ("windows", "changed", (5, 24))):
        status, stdout, stderr = inspect("--diff", folders / a, folders / b)
        assert one_line(status, stderr)
        where = [f"in {letter} token {at % block} of sample {at // block}" for letter, block in zip("AB", blocks)]
        assert f"{folders / a} and {folders / b} differ: train from token {at} on ({', '.join(where)})" in stderr
        assert f"the first {at:,} tokens are the same" in stdout and "hold the same" not in stdout
        both, *texts = map(ast.literal_eval, re.findall(r"^    (?:both  …|A    |B    ) ('.*')(?: …)?$", stdout, re.M))
        assert both == BYTE.decode(one[at - 24:at])
        assert texts == [BYTE.decode(tokens[at:at + 24]) for tokens in ((one, other) if b == "changed" else (other, one))]


def test_other_differences(folders, inspect):
    for b, message in [("longer", "train from token "), ("char", "their tokenizers differ"),
                       ("split", "only B has a val split"), ("pairs", "one is of pairs, the other of text")]:
        status, stdout, stderr = inspect("--diff", folders / "plain", folders / b)
        assert one_line(status, stderr) and message in stderr, stderr
    assert "tokenizer.name: 'byte' and 'char'" in inspect("--diff", folders / "plain", folders / "char")[1]
    held = load_dataset_card(folders / "plain")["splits"]["train"]
    status, stdout, stderr = inspect("--diff", folders / "plain", folders / "longer")
    assert f"from token {held['tokens'] - held['dropped_tokens']} on (in A after the last sample" in stderr
    assert "    A     nothing more\n" in stdout

    pairs = [token for prompt, completion in PAIRS for token in [*prompt.encode(), *completion.encode(), 256]]
    at = sum(len(p) + len(c) + 1 for p, c in PAIRS[:7]) + len("ask 7")
    row = rows_of_pairs(folders / "pairs")
    sample = next(i for i in range(len(row)) if sum(map(len, row[:i + 1])) > at)
    place = f"token {at - sum(map(len, row[:sample]))} of sample {sample}"
    assert chr(pairs[at]) == "a"
    status, stdout, stderr = inspect("--diff", folders / "pairs", folders / "other pairs")
    assert one_line(status, stderr) and f"train from token {at} on (in A {place}, in B {place})" in stderr
    assert re.search(r"A     'answer xxxxxxx<\|endoftext\|>\[\[ask 8\]\]", stdout) and "B     'Answer xxx" in stdout


def rows_of_pairs(folder):
    """What each row holds before its padding."""
    import_streaming()
    from streaming import LocalDataset
    samples = LocalDataset(str(folder / "train"))
    return [[token for token in sample["tokens"].tolist() if token != ~256] for sample in samples]


# ---- every shard hashed ---------------------------------------------------------------------------------------------

def test_a_bar_while_hashing(folders):
    index = [json.loads((folders / "split" / name / "index.json").read_text())["shards"] for name in ("train", "val")]
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows and columns: without these no bar
    command = [sys.executable, str(ROOT / "tools" / "inspect_mds.py"), str(folders / "split"), "--verify", "--samples", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=its, text=True, timeout=60)
    os.close(its)
    bar = os.read(ours, 1 << 20).decode()
    os.close(ours)
    total = sum(shard["raw_data"]["bytes"] for shards_ in index for shard in shards_)
    assert done.returncode == 0 and f"verified: {sum(map(len, index))} shards hold what was written" in done.stdout
    size = rf"{total / 1000:.3g}\d*k"
    assert re.search(rf"hashing: 100%.* {size}/{size} \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", bar), bar


def test_bad_shards_of_both_splits_are_named(folders, inspect, tmp_path):
    copy = shutil.copytree(folders / "split", tmp_path / "copy")
    bad = [sorted((copy / name).glob("shard.*"))[-1] for name in ("train", "val")]
    for path in bad:
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    status, stdout, stderr = inspect(copy, "--verify", "--samples", 0)
    assert status == 1
    assert [line.split(": is damaged")[0] for line in stderr.splitlines()] == [f"error: {path}" for path in bad]
    assert "verified" not in stdout and "by length" not in stdout


# ---- MDS that others wrote ------------------------------------------------------------------------------------------

FOREIGN = {"arrays": ({"tokens": "ndarray:int32"}, {}), "bytes": ({"id": "str", "tokens": "bytes", "n": "int"}, {}),
           "fixed": ({"tokens": "ndarray:int32:50"}, dict(compression="zstd", hashes=["sha1"]))}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Folders as llm-foundry's converters write them: (folder, rows (n, 50))"""
    folder = tmp_path_factory.mktemp("foreign")
    rows = np.array(stream_of(TEXTS))[:len(stream_of(TEXTS)) // 50 * 50].reshape(-1, 50)
    for name, (columns, options) in FOREIGN.items():
        for split, its in (("train_small", rows[:80]), ("val_small", rows[80:])):
            where = str(folder / name / split)
            with import_streaming().MDSWriter(columns=columns, out=where, size_limit=3000, **options) as out:
                for i, row in enumerate(its):
                    tokens = row.astype(np.int64).tobytes() if name == "bytes" else row.astype(np.int32)
                    out.write({key: tokens if key == "tokens" else {"id": "x" * i, "n": i}[key] for key in columns})
    return folder, rows


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_wrote(foreign, inspect, tmp_path, name):
    folder, rows = foreign
    status, stdout, stderr = inspect(folder / name, "--tokenizer", "byte", "--samples", 2, "--verify")
    assert (status, stderr) == (0, ""), stderr
    n = [len(list((folder / name / split).glob("shard.*"))) for split in ("train_small", "val_small")]
    assert f"  train_small  tokens 4,000, samples 80, shards {n[0]}\n" in stdout and n[0] > 2
    assert f"  val_small  tokens {len(rows[80:]) * 50:,}, samples {len(rows) - 80}, shards {n[1]}\n" in stdout
    for split, its in (("train_small", rows[:80]), ("val_small", rows[80:])):
        for i in range(2):
            assert f"{split} sample {i}, tokens {i * 50} to {i * 50 + 49}: {BYTE.decode(its[i])!r}\n" in stdout
    assert table(stdout.replace("train_small", "train").replace("val_small", "val")) == counted(rows[:80].flatten())
    hashed = "verified: {} shards hold what was written" if name == "fixed" else \
        "verified: {} shards have the sizes that were written; their index has no hashes to compare"
    assert hashed.format(sum(n)) in stdout
    assert "val_small" not in inspect(folder / name, "--tokenizer", "byte", "--split", "train_small")[1]

    copy = shutil.copytree(folder / name, tmp_path / "copy")
    path = sorted((copy / "train_small").glob("shard.*"))[-1]
    path.write_bytes(path.read_bytes()[:-1])
    status, _, stderr = inspect(copy, "--tokenizer", "byte", "--samples", 0, "--verify")
    assert one_line(status, stderr) and f"{path}: has " in stderr
    (copy / "train_small" / "index.json").write_text('{"shards": [')
    status, _, stderr = inspect(copy, "--tokenizer", "byte")
    assert one_line(status, stderr) and "train_small/index.json: is damaged" in stderr


def test_a_step_of_what_others_wrote(foreign, inspect, tmp_path):
    folder, rows = foreign
    config = Config(data={"train": [{"path": str(folder / "bytes"), "split": "train_small", "val_split": "val_small"}],
                          "tokenizer": "byte"}, model={"block_size": 25},
                    train={"max_steps": 5, "global_batch_size": 8, "micro_batch_size": 8})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    status, stdout, stderr = inspect("--run", tmp_path, "--step", 2)
    found = re.findall(r"sequence \d: .*/train_small/shard.*, sample (\d+), part (\d) of 2, tokens (\d+) to (\d+)\n  (.*)",
                       stdout)
    assert status == 0 and len(found) == 8 and "another tool wrote it" in stderr
    for sample, part, first, last, text in found:
        begin = int(part) * 25
        assert (int(first), int(last)) == (int(sample) * 50 + begin, int(sample) * 50 + begin + (25 if part == "0" else 24))
        assert ast.literal_eval(text) == BYTE.decode(rows[int(sample), begin:begin + 26])


# ---- names of documents ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, {"separator": b"\n%\n"}, {"single": True}, {"like_nanogpt": True}, {"jsonl": True}, {"errors": "replace"},
])
def test_names_of_documents(tmp_path, options):
    """Each document of the stream is in the file and place that its name tells."""
    options, texts = dict(options), {}
    like_nanogpt, jsonl, single = (options.pop(key, False) for key in ("like_nanogpt", "jsonl", "single"))
    (tmp_path / "in").mkdir()
    for i in range(1 if single else 12):
        parts = [f"text {i} part {k} " * (9 if single else i + 1) for k in range(3)]
        path = tmp_path / "in" / (f"{i:02}.jsonl" if jsonl else f"{i:02}.txt")
        path.write_text("\n".join(json.dumps({"text": part}) for part in parts) if jsonl else "\n%\n".join(parts))
        if jsonl:
            texts |= {f"{path}:{k + 1}": part for k, part in enumerate(parts)}
        elif "separator" in options:
            texts |= {f"{path}, document {k + 1}": part for k, part in enumerate(parts)}
        else:
            texts[str(path)] = path.read_text()

    def made(name, **more):
        inputs = text_files([str(tmp_path / "in")], **options)
        return convert(inputs, tmp_path / name, BYTE, 16, val_fraction=0.3, like_nanogpt=like_nanogpt, **more)[0]

    names = the_tool().names_of_documents
    card = made("out")
    found = names(card)(0, 999)
    rows = rows_of_pairs(tmp_path / "out")
    stream = BYTE.decode([rows[0][0], *(token for row in rows for token in row[1:])]).split("<|endoftext|>")
    assert len(found) == card["splits"]["train"]["documents"] and (single or 0 < len(found) < len(texts))
    for name, text in list(zip(found, stream))[:-1] or [(found[0], stream[0])]:
        assert text == texts[name] or single and text and texts[name].startswith(text)
    assert names(card)(1, 2) == found[1:3]
    if not single:
        assert names(made("shuffled", shuffle=1))(0, 999) == []
    path = next((tmp_path / "in").iterdir())
    path.write_text(path.read_text()[:-1] + "?")
    assert names(card)(0, 999) == []


def test_names_where_documents_were_left_out(tmp_path):
    names = the_tool().names_of_documents
    for i in range(9):
        (tmp_path / f"{i}.txt").write_bytes(b"" if i == 2 else f"text {i} ".encode() * 9 + b"\xff" * (i == 5))
    card = convert(text_files([str(tmp_path / "*.txt")], errors="skip"), tmp_path / "out", BYTE, 16, val_fraction=0)[0]
    assert card["left_out"] == {"empty": 1, "undecodable": 1}
    assert names(card)(0, 9) == [str(tmp_path / f"{i}.txt") for i in (0, 1, 3, 4, 6, 7, 8)]
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(json.dumps({"prompt": "a" * i, "completion": "b"}) for i in range(8)))
    for block, left_out, found in ((15, {"empty": 7}, [1, 3]), (6, {"empty": 7, "too long": 2}, [])):
        inputs = text_files([str(tmp_path / "pairs.jsonl")], pairs=True)
        card = convert(inputs, tmp_path / f"pairs{block}", BYTE, block, val_fraction=0, skip_long=True)[0]
        assert card["left_out"] == left_out
        assert names(card)(0, 1) == [f"{tmp_path}/pairs.jsonl:{line}" for line in found]


@pytest.mark.parametrize("arguments, message", [
    (["--diff", "PLAIN"], "--diff: expected 2 arguments"), (["--diff", "PLAIN", "PLAIN", "--verify"], "give either DIR"),
    (["--diff", "PLAIN", "nowhere"], "nowhere/dataset.json: is missing"),
    (["PLAIN", "--histogram", "some"], "invalid choice: 'some'"), (["PLAIN", "--split", "x"], "--split goes with"),
    (["PLAIN", "--tokenizer", "byte"], "PLAIN has a dataset.json, which knows"),
    (["FOREIGN"], "FOREIGN/dataset.json: is missing; where another tool wrote this, name its --tokenizer"),
    (["FOREIGN", "--tokenizer", "bite"], "did you mean byte?"),
    (["EMPTY", "--tokenizer", "byte"], "no folder with an index.json"),
    (["FOREIGN", "--tokenizer", "byte", "--split", "x"], "FOREIGN/x/index.json: is missing"),
])
def test_bad_input(folders, foreign, inspect, tmp_path, arguments, message):
    places = {"PLAIN": folders / "plain", "FOREIGN": foreign[0] / "arrays", "EMPTY": tmp_path}
    status, stdout, stderr = inspect(*(places.get(a, a) for a in arguments))
    for name, path in places.items():
        message = message.replace(name, str(path))
    assert one_line(status, stderr) and message in stderr and stdout == "", stderr
