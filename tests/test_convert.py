"""The converter: exactly the tokens, the same bytes whatever kills it, to a folder or an object store.

References: tiktoken's own encode_ordinary on each document, streaming's MDSWriter and reader, an undisturbed conversion.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from test_shards import BYTE, DOCUMENTS, ROOT, call_tool, hashes, one_line, read
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str

from nanogpt import convert as engine
from nanogpt import documents, shards
from nanogpt.convert import convert
from nanogpt.documents import InMemory
from nanogpt.errors import UserError
from nanogpt.shards import ShardWriter, import_streaming, load_dataset_card
from nanogpt.tokenizer import from_json

TOOL = "convert_text_to_mds.py"


def tokens_of(folder: Path) -> list[int]:
    """The token stream of a split with stride = block_size, without its dropped tail."""
    samples = read(folder)
    return [int(samples[0, 0]), *samples[:, 1:].flatten().tolist()]


# ---- shards ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compression", [None, "zstd"])
def test_shards_are_those_of_streamings_own_writer(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(shards, "SHARD_BYTES", 3000)
    card = dict(block_size=16, dtype="uint16", source=dict(compression=compression))
    ids = np.random.default_rng(0).integers(0, 60000, (500, 17)).astype(np.uint16)
    for n in (1, 74, 75, 76, 500):  # 75 fill a shard
        with import_streaming().MDSWriter(columns={"tokens": "ndarray:uint16:17"}, out=str(tmp_path / f"{n}"), hashes=["xxh64"],
                                          compression=compression, size_limit=3000) as theirs:
            for row in ids[:n]:
                theirs.write({"tokens": row})
        ours = ShardWriter(tmp_path / f"ours {n}" / "dataset" / "train", card)
        for rows in np.array_split(ids[:n], 7):
            ours.write(rows)
        ours.finish()
        assert hashes(ours.folder) == hashes(tmp_path / f"{n}")
    assert len(hashes(tmp_path / "500")) == 8


# ---- exactly the tokens ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """Folder of the worst of texts, and mds/, a dataset of them with the BPE that came with trained/, a dataset of one of them."""
    choose = random.Random(0)
    words = ["the", "and", " ", "\n", "'ll", "don't", "été", "東京", "Ελλάδα", "🙂", "1234", "\t", "\u00a0", "e\u0301", ";", "=="]
    line = "".join(choose.choice(words) + choose.choice(" \n  ") for _ in range(300_000)).replace("\n", " ")  # 2 MB
    texts = {"a.txt": line, "b.txt": "\n" * 1_000_000, "c.txt": "x" * 300_000 + " end", "crlf.txt": "one\r\n\r\ntwo \r\n" * 5000,
             "empty.txt": "", "nul.txt": "a\0b\0\0 c" * 1000, "special.txt": "<|endoftext|>" * 3 + " <|endoftext|>\n" * 9,
             "short.txt": "x", "marked.txt": "\ufeffhello", "words.txt": "".join(choose.choice(words) for _ in range(100_000))}
    folder = tmp_path_factory.mktemp("hard")
    (folder / "texts").mkdir()
    for name, text in texts.items():
        (folder / "texts" / name).write_bytes(text.encode())
    tool = [sys.executable, ROOT / "tools" / TOOL, "--block-size", "64", "--workers", "2", "--input", folder / "texts"]
    for options in (["--glob", "[w-z]*.txt", "--out", folder / "trained", "--train-bpe", "400"],
                    ["--val-fraction", "0.2", "--out", folder / "mds", "--tokenizer", folder / "trained" / "tokenizer.tiktoken"]):
        done = subprocess.run([*tool, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder, {name: text for name, text in sorted(texts.items()) if text}, done.stdout


def test_reassembled_samples_are_encode_ordinary_of_each_document(hard):
    folder, texts, said = hard
    ranks = load_tiktoken_bpe(str(folder / "trained" / "tokenizer.tiktoken"))
    theirs = tiktoken.Encoding("theirs", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
    card = load_dataset_card(folder / "mds")
    assert len(ranks) == 399 and card["tokenizer"]["vocab_size"] == 400 and card["left_out"] == {"empty": 1}
    chosen = np.random.default_rng(2357).choice(10, 2, replace=False)  # of all files, the empty one too
    numbers = [i for i, name in enumerate(sorted([*texts, "empty.txt"])) if name != "empty.txt"]
    for name in ("train", "val"):
        stream = [i for number, text in zip(numbers, texts.values()) if (number in chosen) == (name == "val")
                  for i in [*theirs.encode_ordinary(text), 399]]
        found = tokens_of(folder / "mds" / name)
        split = card["splits"][name]
        assert found == stream[:len(found)]
        assert split["dropped_tokens"] == len(stream) - len(found) < 64 and split["tokens"] == len(stream)
        assert split["samples"] == (len(stream) - 1) // 64
        assert f"dropped at the end {split['dropped_tokens']:,}" in said
    assert sum(split["documents"] for split in card["splits"].values()) == len(texts)
    assert sum(split["bytes"] for split in card["splits"].values()) == sum(len(text.encode()) for text in texts.values())


def test_the_ranks_file_is_the_tokenizer(hard):
    folder, _, _ = hard
    one, other = (from_json(load_dataset_card(folder / name)["tokenizer"]) for name in ("trained", "mds"))
    assert one.fingerprint == other.fingerprint and (one.name, other.name) == ("bpe-400", "tokenizer")
    assert sorted(os.listdir(folder / "trained")) == ["dataset.json", "tokenizer.tiktoken", "train", "val"]


# ---- killed ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["text", "zstd", "shuffled", "pairs"])
def test_interrupted_anywhere(tmp_path, monkeypatch, kind):
    """Within a shard, between two, in the middle of a note: what is there is a state, and files that may be further."""
    monkeypatch.setattr(documents, "CHUNK", 200)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1500)
    texts = [(name, (text[:5], text[5:12]) if kind == "pairs" else text) for name, text in DOCUMENTS * 5]
    options = dict(val_fraction=0.1, compression="zstd" if kind == "zstd" else None, shuffle=1 if kind == "shuffled" else None)
    monkeypatch.setattr(engine, "GROUP", 3)
    convert(InMemory(texts), tmp_path / "whole", BYTE, 32, **options)
    monkeypatch.setattr(engine, "NOTE_S", 0)
    choose, interruptions, out = random.Random(0), 0, tmp_path / "out"
    noted, results = engine._Place.note, engine._Pool.results

    class Killed(BaseException):
        pass

    def hit():
        if choose.random() < 0.06:
            raise Killed

    def flaky_results(*arguments):
        for result in results(*arguments):
            hit()
            yield result

    def flaky_note(place, name, value):
        if name == "state.json":
            hit()
        noted(place, name, value)
        hit()

    monkeypatch.setattr(engine._Pool, "results", flaky_results)
    monkeypatch.setattr(engine._Place, "note", flaky_note)
    monkeypatch.setattr(engine._Place, "__exit__", lambda place, *_: place.made and place.lock.release())  # as a dead one
    for _ in range(6):
        shutil.rmtree(out, ignore_errors=True)
        while not out.exists():
            try:
                convert(InMemory(texts), out, BYTE, 32, **options)
            except Killed:
                interruptions += 1
        assert hashes(out) == hashes(tmp_path / "whole")
    assert interruptions > 10 and len(hashes(out)) > 8 and sorted(os.listdir(tmp_path)) == ["out", "whole"]


SLOWLY = """
import runpy, sys, time
sys.path.insert(0, sys.argv[1])
from nanogpt import convert, documents, shards
documents.CHUNK, shards.SHARD_BYTES, convert.NOTE_S = 5000, 40000, 0.02
if __name__ == "__main__":
    feed = documents.Source.feed
    def slowly(self, order):
        for fed in feed(self, order):
            time.sleep(0.02)
            yield fed
    documents.Source.feed = slowly
    sys.argv[:2] = [sys.argv[1] + "/tools/convert_text_to_mds.py"]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_killed_at_random_moments(tmp_path, hard, workers):
    """SIGKILL to the whole process group, again and again: the same command goes on, and the bytes are the same."""
    folder, _, _ = hard
    script, out = tmp_path / "slowly.py", tmp_path / "out"
    script.write_text(SLOWLY)
    command = [sys.executable, script, ROOT, "--input", folder / "texts", "--glob", "[!abc].txt", "--tokenizer", "byte", "--block-size",
               "64", "--val-fraction", "0.2", "--compression", "zstd"]
    command = [*map(str, command)]
    command[command.index("--glob") + 1] = "[m-w]*.txt"  # without the largest
    if not (reference := folder / "undisturbed").exists():
        subprocess.run([*command, "--out", str(reference)], check=True, capture_output=True)
    choose, kills = random.Random(workers), 0
    while kills < (10 if workers == 2 else 4):
        process = subprocess.Popen([*command, "--out", str(out), "--workers", str(workers)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, start_new_session=True)
        time.sleep(choose.uniform(0.3, 1.5))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills >= 2, process.stderr.read()
    done = subprocess.run([*command, "--out", str(out), "--workers", str(workers)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hashes(out) == hashes(reference) and sorted(os.listdir(tmp_path)) == ["out", "slowly.py"]


def test_an_unfinished_one_goes_on_only_as_it_was_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", 100)
    monkeypatch.setattr(engine, "NOTE_S", 0)
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("\n".join(text for _, text in DOCUMENTS), newline="")

    def inputs():
        return documents.text_files([str(text)], separator=b"\n")

    def interrupted(after=5, **options):
        encode, left = engine._encode, iter(range(after))

        def stopping(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return encode(*arguments)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(engine, "_encode", stopping)
            convert(inputs(), out, BYTE, 16, **options)

    interrupted()
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "text.txt"]
    for options, named in ((dict(seed=1), "source.seed"), (dict(val_fraction=0.5), "source.val_fraction")):
        with pytest.raises(UserError, match=rf"\.out\.partial: is a conversion that is not finished, .*\({named}\).*--overwrite"):
            convert(inputs(), out, BYTE, 16, **options)
    interrupted(after=0, overwrite=True)  # the same options: goes on too
    assert json.loads((tmp_path / ".out.partial" / "state.json").read_text())["done"] == 5
    interrupted(seed=1, overwrite=True)  # others: anew
    card, _ = convert(inputs(), out, BYTE, 16, seed=1)
    convert(inputs(), tmp_path / "whole", BYTE, 16, seed=1)
    assert hashes(out) == hashes(tmp_path / "whole") and sorted(os.listdir(tmp_path)) == ["out", "text.txt", "whole"]

    shutil.rmtree(out)
    interrupted()
    text.write_text("other " * 100)
    with pytest.raises(UserError, match=r"\(bytes, .*text.txt\)|\(bytes\)"):
        convert(inputs(), out, BYTE, 16)


def test_two_at_once(tmp_path):
    import filelock
    (tmp_path / ".out.partial").mkdir()
    with filelock.FileLock(tmp_path / ".out.partial" / "lock"), pytest.raises(UserError, match="out: another conversion writes it"):
        convert(InMemory(DOCUMENTS), tmp_path / "out", BYTE, 16)


def test_files_that_change(tmp_path, capsys, monkeypatch):
    """Before a second run, in which a touched file is read again, and while it is converted."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("some text " * 1000)
    arguments = (TOOL, "--input", text, "--out", out, "--tokenizer", "byte", "--block-size", 16, "--workers", 1)
    assert call_tool(capsys, monkeypatch, *arguments)[0] == 0
    os.utime(text)
    status, said, _ = call_tool(capsys, monkeypatch, *arguments)
    assert status == 0 and "is there already" in said
    text.write_text("some next " * 1000)  # as long
    status, _, stderr = call_tool(capsys, monkeypatch, *arguments)
    assert one_line(status, stderr) and "holds another dataset (source.xxh3_128)" in stderr

    other = tmp_path / "other.txt"
    other.write_text("some text " * 999 + "other text")
    time.sleep(0.01)
    os.utime(out / "dataset.json")  # younger than both
    status, _, stderr = call_tool(capsys, monkeypatch, *(other if argument == text else argument for argument in arguments))
    assert one_line(status, stderr) and "holds another dataset (source.xxh3_128)" in stderr

    encode = engine._encode

    def changing(*arguments):
        text.write_text("other " * 999)
        return encode(*arguments)

    monkeypatch.setattr(engine, "_encode", changing)
    status, _, stderr = call_tool(capsys, monkeypatch, *arguments, "--overwrite")
    assert one_line(status, stderr) and f"{text}: was changed while it was read" in stderr
    assert load_dataset_card(out)["source"]["bytes"] == 10_000  # the old one


def test_what_came_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    def coming(*arguments):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        return encode(*arguments)

    encode = engine._encode
    monkeypatch.setattr(engine, "_encode", coming)
    with pytest.raises(UserError, match="out: exists and is not a dataset folder"):
        convert(InMemory(DOCUMENTS), tmp_path / "out", BYTE, 16)
    os.rename(tmp_path / "out", tmp_path / "mine")
    monkeypatch.setattr(engine, "_encode", None)  # all of it is done
    convert(InMemory(DOCUMENTS), tmp_path / "out", BYTE, 16)
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"] and os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_in_a_log(tmp_path, monkeypatch, capsys):
    """Where there is no terminal for a bar, a line now and then."""
    monkeypatch.setattr(documents, "CHUNK", 500)
    monkeypatch.setattr(engine, "TELL_S", 0)
    convert(InMemory(DOCUMENTS), tmp_path / "out", BYTE, 16, val_fraction=0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and lines[-1].startswith("100%  40.0 documents, ") and lines[-1].endswith(" tokens/s, 0 min left")


# ---- in another order -----------------------------------------------------------------------------------------------

def test_shuffled_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", 100)
    monkeypatch.setattr(engine, "GROUP", 4)
    plain = [(name, text) for name, text in DOCUMENTS if "<" not in text]
    for name, options in (("plain", {}), ("one", dict(shuffle=1)), ("two", dict(shuffle=1, workers=2)), ("other", dict(shuffle=2))):
        convert(InMemory(plain), tmp_path / name, BYTE, 16, val_fraction=0, **options)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") != hashes(tmp_path / "other")
    texts = {name: bytes(i if i < 256 else 1 for i in tokens_of(tmp_path / name / "train")).split(b"\1")[:-1]
             for name in ("plain", "one", "other")}
    whole = {text.encode() for _, text in plain}
    for name in texts:
        assert set(texts[name]) <= whole and len(texts[name]) == len(set(texts[name])) >= len(plain) - 2
    assert texts["one"] != texts["plain"] and texts["one"] != texts["other"]
    first = [int(text.split()[1][:-1]) for text in texts["one"][:8]]  # the first group comes from all over
    assert max(first) - min(first) > len(DOCUMENTS) // 3


# ---- to an object store ---------------------------------------------------------------------------------------------

def test_to_an_object_store(tmp_path, monkeypatch, capsys):
    """Killed on the way, with a folder for what is not uploaded yet: in the end the very files of a local conversion."""
    import boto3
    from test_remote import AWS, serve
    monkeypatch.setattr(documents, "CHUNK", 100)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1500)
    monkeypatch.setattr(engine, "NOTE_S", 0)
    monkeypatch.chdir(tmp_path)
    address, faults, end = serve()
    try:
        for name, value in (AWS | {"S3_ENDPOINT_URL": address}).items():
            monkeypatch.setenv(name, value)
        s3 = boto3.client("s3", endpoint_url=address)
        s3.create_bucket(Bucket="there")

        def names():
            return {entry["Key"]: s3.get_object(Bucket="there", Key=entry["Key"])["Body"].read()
                    for entry in s3.list_objects_v2(Bucket="there").get("Contents", [])}

        convert(InMemory(DOCUMENTS), tmp_path / "whole", BYTE, 16)
        encode, left, choose = engine._encode, iter(range(9)), random.Random(0)

        def stopping(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return encode(*arguments)

        monkeypatch.setattr(engine, "_encode", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(InMemory(DOCUMENTS), "s3://there/data/it", BYTE, 16)
        monkeypatch.setattr(engine, "_encode", encode)
        early = names()
        assert early and all(key.endswith(".mds") for key in early)
        assert not {Path(key).name for key in early if "/train/" in key} & {f.name for f in tmp_path.glob(".it-*/dataset/train/*")}
        faults.rule = lambda *_: "503" if choose.random() < 1 / 3 else None
        card, written = convert(InMemory(DOCUMENTS), "s3://there/data/it", BYTE, 16)
        faults.rule = None
        assert written and os.listdir(tmp_path) == ["whole"]
        assert names() == {f"data/it/{path.relative_to(tmp_path / 'whole')}": path.read_bytes()
                           for path in (tmp_path / "whole").rglob("*") if path.is_file()}
        assert convert(InMemory(DOCUMENTS), "s3://there/data/it/", BYTE, 16) == (card, False)
        with pytest.raises(UserError, match=r"^s3://there/data/it: holds another dataset \(source.seed\); take another --out$"):
            convert(InMemory(DOCUMENTS), "s3://there/data/it", BYTE, 16, seed=1)
        with pytest.raises(UserError, match=r"^s3://nowhere/it: cannot be written .*NoSuchBucket|^s3://nowhere/it"):
            convert(InMemory(DOCUMENTS), "s3://nowhere/it", BYTE, 16)
    finally:
        end()
