"""MDS that llm-foundry's converters wrote: samples of L tokens, that share none, in columns of their kinds.

They are written here by streaming's MDSWriter as those converters call it, and read back by a plain loop over streaming.
"""

import base64
import json
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_launch import ROOT
from test_numbers import plain
from test_stream import make_config
from test_train import SMALL, STEPS, train_run

from nanogpt.config import load_config
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE
from nanogpt.shards import import_streaming
from nanogpt.stream import Split, TrainStream, inputs_and_targets

L = 64
KINDS = {  # column tokens, how a row of ids is given to the writer, what else there is
    "int32": ("ndarray:int32", np.ndarray.copy, {}),
    "int32-fixed": (f"ndarray:int32:{L}", np.ndarray.copy, dict(compression="zstd", hashes=["sha1", "xxh64"])),
    "int64-bytes": ("bytes", lambda row: row.astype(np.int64).tobytes(), {}),
}


def rows_of(text_dataset, n) -> np.ndarray:
    """(n, L): the text in pieces, with end-of-text here and there."""
    text = np.frombuffer((text_dataset.parent / "text.txt").read_bytes(), np.uint8).astype(np.int32)
    text[::997] = 256
    return text[:n * L].reshape(n, L)


def write(folder, rows, column="ndarray:int32", encode=np.ndarray.copy, **options):
    """A split, in shards of about 30 samples, or half as many."""
    with import_streaming().MDSWriter(columns={"tokens": column}, out=str(folder), size_limit=1 << 13, **options) as out:
        for row in rows:
            out.write({"tokens": encode(row)})


@pytest.fixture(scope="module")
def folders(text_dataset, tmp_path_factory):
    """One folder for each kind, with train/ and val/; `small` has train_small/ and val_small/, and another column."""
    folder = tmp_path_factory.mktemp("foreign")
    rows = rows_of(text_dataset, 400)
    for name, (column, encode, options) in KINDS.items():
        write(folder / name / "train", rows[:360], column, encode, **options)
        write(folder / name / "val", rows[360:], column, encode, **options)
    for split, its in (("train_small", rows[:100]), ("val_small", rows[360:])):
        with import_streaming().MDSWriter(columns={"id": "str", "tokens": "ndarray:int32", "at": "int"},
                                          out=str(folder / "small" / split)) as out:
            for i, row in enumerate(its):
                out.write({"id": "x" * (i % 7), "tokens": row, "at": i})
    return folder


BYTE = "--data.tokenizer=byte"


@pytest.mark.parametrize("name", KINDS)
def test_every_token_but_the_first_of_a_sample_is_a_target_once(tmp_path, folders, text_dataset, name):
    rows = rows_of(text_dataset, 400)
    path = folders / name
    whole, halves = (Split(make_config(tmp_path, path, BYTE, f"--model.block_size={T}"), "train", str(path)) for T in (64, 32))
    assert (whole.samples, whole.parts, halves.parts) == (360, 1, 2) and len(whole.dataset.shards) > 10
    assert whole.card["splits"]["train"]["tokens"] == 360 * L
    x, y = inputs_and_targets(whole.read(np.stack([np.arange(360), np.zeros(360, int)], 1)))
    assert np.array_equal(x, rows[:360]) and np.array_equal(y[:, :-1], rows[:360, 1:]) and (y[:, -1] == IGNORE).all()
    x, y = inputs_and_targets(halves.read(np.array([[7, 0], [7, 1], [359, 1]])))
    assert np.array_equal(x, [rows[7, :32], rows[7, 32:], rows[359, 32:]])
    assert np.array_equal(y, [rows[7, 1:33], [*rows[7, 33:], IGNORE], [*rows[359, 33:], IGNORE]])


def test_splits_by_other_names_other_columns_and_a_mixture_with_ours(tmp_path, folders, text_dataset):
    rows = rows_of(text_dataset, 400)
    (tmp_path / "c.yaml").write_text(f"""
data: {{tokenizer: byte, train: [{{path: {folders}/small, split: train_small, val_split: val_small, repeat: 3}},
                                 {{path: {text_dataset}, repeat: 1}}]}}
model: {{block_size: 64}}
train: {{max_steps: 9, global_batch_size: 12, micro_batch_size: 2}}""")
    config = load_config([str(tmp_path / "c.yaml")])
    stream = TrainStream(config)
    ours = stream.splits[1].samples
    assert stream.proportions == pytest.approx([300 / (300 + ours), ours / (300 + ours)])
    tokens = stream.read(np.array([[5, 0], [100, 0], [99, 0]]))
    assert np.array_equal(tokens[[0, 2], :L], rows[[5, 99]])
    text = np.frombuffer((text_dataset.parent / "text.txt").read_bytes()[:65], np.uint8)
    assert np.array_equal(tokens[1], text)
    assert [(split.name, split.samples, split.label) for split in stream.validation(config)] == [
        ("val_small", 40, "small"), ("val", Split(config, "val", str(text_dataset)).samples, "mds")]


def test_a_run_and_its_resume_are_the_plain_loop(tmp_path, folders, text_dataset, ranks):
    """Ten steps on two ranks, the rest on one; the first kind is the one written today."""
    path = folders / "int32"
    (tmp_path / "c.yaml").write_text(f"data: {{path: {path}, tokenizer: byte}}")
    argv = [str(tmp_path / "c.yaml"), *SMALL, f"--run.dir={tmp_path / 'run'}", "--train.micro_batch_size=2"]
    ranks(2, train_run, [*argv, "--train.max_steps=10"])
    metrics = ranks(1, train_run, [*argv, f"--train.max_steps={STEPS}"])[0]
    said = (tmp_path / "run" / "log.txt").read_text()
    assert f"{path}: {360 * L:,} tokens, 360 samples, " in said and "byte tokenizer" in said and "2 -> 1 ranks" in said
    stream = TrainStream(load_config([*argv, f"--train.max_steps={STEPS}"]))
    theirs, batches = import_streaming().LocalDataset(local=str(path / "train")), []
    for step in range(STEPS):
        batches.append(torch.full((8, 33), IGNORE))
        for row, (sample, part) in zip(batches[-1], stream.sequences(step).tolist()):
            its = torch.from_numpy(theirs[sample]["tokens"][part * 32:part * 32 + 33].astype(np.int64))
            row[:len(its)] = its
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in metrics] == pytest.approx(plain(batches), rel=1e-4)
    assert sum(int((batch == IGNORE).sum()) for batch in batches) == sum(
        int((stream.sequences(step)[:, 1] == 1).sum()) for step in range(STEPS)) > 0  # the second halves have 31 targets


def test_tools_on_folders_of_others(tmp_path, folders, text_dataset, capsys, monkeypatch):
    """evaluate.py has a name for the tokenizer, and leaves out what has no val split, as a run does; gz is read too."""
    evaluate, inspect = (SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / f"{name}.py")))
                         for name in ("evaluate", "inspect_mds"))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    model = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(block_size=L)), state={})

    def opened(data=None, tokenizer=None, split="val", **state):
        model.state = state
        args = SimpleNamespace(run="RUN", hf=None, data=data, tokenizer=tokenizer, split=split, block_size=None, cache_dir=None)
        return [(found.path, found.name) for found in evaluate.open_splits(args, model)]

    path = str(folders / "int32")
    assert opened([path], "byte") == [(path, "val")]
    with pytest.raises(UserError, match=f"^{path}/dataset.json: is missing. .*, as --tokenizer gpt2, a ranks file or"):
        opened([path])
    rows = rows_of(text_dataset, 60)
    write(tmp_path / "gz" / "train", rows, compression="gz", hashes=["xxh64"])
    gz = str(tmp_path / "gz")
    data = dict(tokenizer="byte", train=[dict(path=gz), dict(path=str(folders / "small"), val_split="val_small")])
    run = dict(config=dict(run=dict(dir=str(tmp_path / "run")), data=data))
    assert opened(**run) == [(str(folders / "small"), "val_small")]
    assert capsys.readouterr().err.startswith(f"note: left out: {gz}: has neither dataset.json nor val/index.json")
    with pytest.raises(UserError, match="gz: has neither dataset.json nor val/index.json"):
        opened([gz], **run)
    shards = json.loads((tmp_path / "gz" / "train" / "index.json").read_text())["shards"]
    read = [inspect.read_shard(tmp_path / "gz" / "train", shard, {"dtype": "foreign"}) for shard in shards]
    assert np.array_equal(np.concatenate(read), rows)


# ---- what is refused ------------------------------------------------------------------------------------------------

def refused(tmp_path, said, path, *options):
    with pytest.raises(UserError, match=said) as error:
        config = make_config(tmp_path, path, *options)
        stream = TrainStream(config)
        stream.validation(config)
        stream.read(np.stack([np.arange(stream.splits[0].samples), np.zeros(stream.splits[0].samples, int)], 1))
    assert "\n" not in str(error.value)


def test_the_tokenizer_must_be_named(tmp_path, folders):
    path = folders / "int32"
    refused(tmp_path, f"^{path}/dataset.json: is missing. MDS that .* as --data.tokenizer gpt2, a ranks file or", path)
    refused(tmp_path, "^data.tokenizer: 'bite' is neither a tokenizer .* did you mean byte", path, "--data.tokenizer=bite")
    refused(tmp_path, "^data.tokenizer: char would need the text that it was made of; name another", path, "--data.tokenizer=char")


def test_samples_that_are_no_tokens(tmp_path, text_dataset):
    rows = rows_of(text_dataset, 60)
    for name, column, change, said in (
            ("high", "ndarray:int32", lambda rows: [*rows[:50], np.full(L, 257, np.int32)],
             "high/train/shard.00001.mds: sample 50 holds id 257, the vocabulary ends at 256; the shard is damaged or of "),
            ("negative", "ndarray:int32", lambda rows: [*rows[:50], np.full(L, -3, np.int32)],
             "negative/train/shard.00001.mds: sample 50 holds id -3, below 0; the shard is damaged"),
            ("short", "ndarray:int32", lambda rows: [*rows[:50], rows[50, :9]],
             "short/train/shard.00001.mds: sample 50 has 9 tokens, and others have 64; convert"),
            ("floats", "ndarray:float32", lambda rows: rows.astype(np.float32),
             "floats/train/index.json: its tokens are ndarray:float32, and not"),
            ("square", "ndarray:int32", lambda rows: [*rows[:50], rows[:2]],
             r"square/train/shard.0000\d.mds: sample 50 cannot be read .*its tokens are int32 \(2, 64\), and not a row"),
            ("odd", "bytes", lambda rows: [b"x" * 9], r"odd/train/shard.00000.mds: sample 0 cannot be read"),
            ("text", None, None, "text/train/index.json: its samples have text, and no tokens; make them with ")):
        if column:
            write(tmp_path / name / "train", change(rows), column, lambda row: row)
        else:
            with import_streaming().MDSWriter(columns={"text": "str"}, out=str(tmp_path / name / "train")) as out:
                out.write({"text": "abc"})
        refused(tmp_path, said, tmp_path / name, BYTE, "--train.global_batch_size=1", "--train.micro_batch_size=1")


def test_folders_and_settings_that_do_not_fit(tmp_path, folders, text_dataset):
    refused(tmp_path, "small: has neither dataset.json nor train/index.json; mend the path, or name the folders",
            folders / "small", BYTE)
    refused(tmp_path, "model.block_size: 48 is neither the 64 that", folders / "int32", BYTE, "--model.block_size=48")
    source = f"--data.train={{path: {folders}/int32, val_split: valid}}"
    refused(tmp_path, "int32: has neither dataset.json nor valid/index.json; ", "null", "--data.path=null", source, BYTE)
    # A name that leads out of the folder, and what streaming would make of a shard that is unsafe to decode.
    index = json.loads((folders / "int32" / "train" / "index.json").read_text())
    for change, said in ((lambda shard: shard["raw_data"].update(basename="../x"),
                          "is damaged .'../x' is no file of its folder"),
                         (lambda shard: shard.update(column_names=["tokens", "tokens"]), "is damaged .* of the wrong kind"),
                         (lambda shard: shard.update(column_encodings=["pkl"]), "its tokens are ndarray:int32 and pkl")):
        bad = json.loads(json.dumps(index))
        change(bad["shards"][2])
        (tmp_path / "bad" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bad" / "train" / "index.json").write_text(json.dumps(bad))
        refused(tmp_path, f"bad/train/index.json: {said}", tmp_path / "bad", BYTE)
    # Our own tell their tokenizer, and another one is not taken for it.
    assert TrainStream(make_config(tmp_path, text_dataset, BYTE)).vocab_size == 257
    ranks = tmp_path / "ranks"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256)))
    refused(tmp_path, f"^data.tokenizer: ranks is not that of {text_dataset}, byte .another fingerprint.; leave it out",
            text_dataset, f"--data.tokenizer={ranks}")
