"""Pairs of prompt and completion: packed whole, and only completions are trained on.

References: samples packed here by hand, losses by a plain loop over the lines of the JSONL file.
"""

import json
import random

import numpy as np
import pytest
import torch
import yaml
from conftest import convert as convert_text
from test_shards import BYTE, call_tool, convert, hashes, make, one_line, read
from test_train import SMALL, plain_optimizer, plain_step, train_run

from nanogpt.config import Model, load_config
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE
from nanogpt.model import GPT
from nanogpt.shards import load_dataset_card
from nanogpt.stream import Split, TrainStream, inputs_and_targets
from nanogpt.tokenizer import from_json, from_name

END, PAD = 256, ~256
BLOCK = 32


def random_pairs(n: int) -> list[tuple[str, str]]:
    """Some without a prompt, some that fill a sample."""
    choose = random.Random(0)
    pairs = [("".join(choose.choices("abcé", k=choose.choice([0, 1, 3, 8]))),
              "".join(choose.choices("uvwxyz🙂", k=choose.choice([1, 2, 5])))) for _ in range(n)]
    return [*pairs, ("p" * 31, "c"), ("", "c" * 31)]


def named(pairs):
    return [(f"line {i}", pair) for i, pair in enumerate(pairs, 1)]


def packed(pairs, block_size=BLOCK) -> list[list[int]]:
    """The samples of byte tokens, by hand."""
    samples = []
    for prompt, completion in pairs:
        ids = [~byte for byte in prompt.encode()] + [*completion.encode(), END]
        if not samples or len(samples[-1]) + len(ids) > block_size + 1:
            samples.append([] if prompt else [PAD])
        samples[-1] += ids
    return [sample + [PAD] * (block_size + 1 - len(sample)) for sample in samples]


def write(file, pairs):
    file.write_text("\n\n".join(json.dumps({"id": 7, "prompt": p, "completion": c}, ensure_ascii=False) for p, c in pairs))
    return file


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Folder of a dataset of 150 pairs without a val split, beside pairs.jsonl."""
    folder = tmp_path_factory.mktemp("pairs")
    convert_text(write(folder / "pairs.jsonl", random_pairs(148)), folder / "mds", "--pairs", "--block-size", str(BLOCK),
                 "--val-fraction", "0", "--workers", "2")
    return folder / "mds"


def make_config(tmp_path, data, *options):
    (tmp_path / "c.yaml").write_text(f"data: {data if isinstance(data, str) else f'{{path: {data}}}'}")
    return load_config([str(tmp_path / "c.yaml"), *SMALL, "--train.micro_batch_size=4", "--train.max_steps=20",
                        f"--run.dir={tmp_path}/run", *options])


def of_jsonl(dataset) -> list[tuple[str, str]]:
    lines = (dataset.parent / "pairs.jsonl").read_text().splitlines()
    return [(pair["prompt"], pair["completion"]) for pair in map(json.loads, filter(None, lines))]


# ---- samples --------------------------------------------------------------------------------------------------------

def test_packing_by_hand(tmp_path):
    a, b, c, d, e = (~ord(letter) for letter in "abcde")  # of prompts
    u, v, w, x, y = map(ord, "uvwxy")
    pairs = [("ab", "uv"), ("c", "w"), ("", "x"),  # 5 + 3 + 2 tokens fill a sample of 10
             ("d", "xy"), ("e", "uvwxy"),          # 4, and 7 that do not fit beside them
             ("", "uvwxyuvw"),                     # 9, and the end-of-text before it
             ("abcdeabc", "u")]
    card, _ = convert(named(pairs), tmp_path / "out", BYTE, 9, val_fraction=0)
    samples = read(tmp_path / "out" / "train")
    assert samples.dtype == np.int32 and samples.tolist() == [
        [a, b, u, v, END, c, w, END, x, END],
        [d, x, y, END, PAD, PAD, PAD, PAD, PAD, PAD],
        [e, u, v, w, x, y, END, PAD, PAD, PAD],
        [PAD, u, v, w, x, y, u, v, w, END],
        [a, b, c, d, e, a, b, c, u, END]] == packed(pairs, 9)
    assert card == load_dataset_card(tmp_path / "out") and card["dtype"] == "int32"
    assert card["splits"]["train"] == {
        "stride": 10, "tokens": 40, "samples": 5, "documents": 7, "bytes": 33, "dropped_tokens": 0, "targets": 27,
        "padding": 10} and card["left_out"] == {}


def test_every_token_of_a_completion_is_a_target_once_and_none_of_a_prompt(tmp_path, dataset):
    split = Split(make_config(tmp_path, dataset), "train", str(dataset))
    x, y = (torch.cat(both) for both in zip(*split.fixed_batches(10**6, 4, 0, 1)))
    pairs = of_jsonl(dataset)
    assert y[y != IGNORE].tolist() == [token for _, text in pairs for token in [*text.encode(), END]]
    rows = packed(pairs)
    assert len(x) % 4 == 0 and len(x) - len(rows) < 4 and (y[len(rows):] == IGNORE).all()
    for row, ids, targets in zip(rows, x.tolist(), y.tolist()):
        assert ids == [max(token, ~token) for token in row[:-1]]
        assert targets == [token if token >= 0 else IGNORE for token in row[1:]]


def test_of_text_every_token_is_input_and_target():
    tokens = torch.randint(0, 257, (3, 9))
    x, y = inputs_and_targets(tokens)
    assert torch.equal(x, tokens[:, :-1]) and torch.equal(y, tokens[:, 1:])


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.documents.CHUNK", 100)  # many tasks
    pairs = named(random_pairs(100))
    char = from_name("char", ("".join(pair) for _, pair in pairs))
    for workers in (1, 2):
        convert(pairs, tmp_path / str(workers), char, BLOCK, val_fraction=0.2, workers=workers)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")


def test_validation_has_whole_pairs(tmp_path):
    pairs = random_pairs(38)
    card, _ = convert(named(pairs), tmp_path / "out", BYTE, BLOCK, val_fraction=0.1, seed=7)
    chosen = np.random.default_rng(7).choice(40, 4, replace=False)
    for name, its in (("val", [pair for i, pair in enumerate(pairs) if i in chosen]),
                      ("train", [pair for i, pair in enumerate(pairs) if i not in chosen])):
        assert read(tmp_path / "out" / name).tolist() == packed(its)
        assert card["splits"][name]["documents"] == len(its)


# ---- what is refused ------------------------------------------------------------------------------------------------

BAD_LINES = [
    (b"{'prompt': 1}", "is not JSON (Expecting property name"), (b"[" * 9999, "is not JSON (maximum recursion"),
    (b'{"prompt": "a", "completion": ' + b"9" * 5000, "is not JSON"), (b'["a", "b"]', "is no JSON object"),
    (b'{"prompt": "a"}', "has no completion"), (b'{"completion": "a"}', "has no prompt"),
    (b'{"prompt": ["a"], "completion": "b"}', "its prompt is no string, but list"),
    (b'{"prompt": "a", "completion": null}', "its completion is no string, but NoneType"),
    (b'{"prompt": "a", "completion": ""}', "its completion is empty"),
    (b'{"prompt": "\\ud800", "completion": "b"}', "its prompt holds half of a surrogate pair"),
    (b'{"prompt": "a\xff", "completion": "b"}', "is not UTF-8 at byte 13")]
GOOD = b'{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize("line, said", BAD_LINES, ids=[said for _, said in BAD_LINES])
def test_a_bad_line_is_named(tmp_path, capsys, monkeypatch, line, said):
    (tmp_path / "p.jsonl").write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD)
    arguments = ["convert_text_to_mds.py", "--pairs", "--input", tmp_path / "p.jsonl", "--out", tmp_path / "out",
                 "--tokenizer", "byte", "--block-size", "8", "--val-fraction", "0"]
    status, stdout, stderr = call_tool(capsys, monkeypatch, *arguments)
    assert one_line(status, stderr) and f"error: {tmp_path}/p.jsonl:3: {said}" in stderr and stdout == ""
    assert not (tmp_path / "out").exists()
    status, stdout, stderr = call_tool(capsys, monkeypatch, *arguments, "--errors", "skip")
    assert (status, stderr) == (0, "") and "1 lines that are no pair" in stdout and "pairs 2, tokens 6" in stdout


def test_errors_replace_and_byte_order_marks(tmp_path, capsys, monkeypatch):
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "\xff", "completion": "b"}\r\n')
    status, _, stderr = call_tool(capsys, monkeypatch, "convert_text_to_mds.py", "--pairs", "--input", tmp_path / "p.jsonl",
                                  "--out", tmp_path / "out", "--tokenizer", "char", "--block-size", "4",
                                  "--val-fraction", "0", "--errors", "replace")
    assert (status, stderr) == (0, "")
    assert from_json(load_dataset_card(tmp_path / "out")["tokenizer"]).alphabet == "b\ufffd"
    assert read(tmp_path / "out" / "train").tolist() == [[~1, 0, 2, ~2, ~2]]


@pytest.mark.parametrize("pair, length", [(("p" * 8, "c"), 10), (("p", "c" * 8), 10), (("", "c" * 8), 10)], ids=str)
def test_a_pair_that_is_longer_than_a_sample(tmp_path, pair, length):
    pairs = named([("p" * 7, "c"), pair, ("", "c" * 7)])  # the others just fit
    with pytest.raises(UserError, match=f"^line 2: is {length} tokens long, and a sample holds .* 9; take a --block-size of "
                                        f"{length - 1} or more, or --errors skip"):
        convert(pairs, tmp_path / "out", BYTE, 8, val_fraction=0)
    card, _ = convert(pairs, tmp_path / "out", BYTE, 8, val_fraction=0, skip_long=True)
    assert card["left_out"] == {"too long": 1} and card["splits"]["train"]["documents"] == 2
    assert read(tmp_path / "out" / "train").tolist() == packed([pairs[0][1], pairs[2][1]], 8)
    convert(pairs, tmp_path / "larger", BYTE, length - 1, val_fraction=0)
    with pytest.raises(UserError, match="^the train split has no pair that fits into a sample"):
        convert(pairs[1:2], tmp_path / "none", BYTE, 8, val_fraction=0, skip_long=True)


def test_options_that_do_not_go_with_pairs(tmp_path):
    with pytest.raises(UserError, match="^--stride: pairs are not cut into windows; leave it out$"):
        convert(named(random_pairs(9)), tmp_path / "out", BYTE, BLOCK, stride=4)
    with pytest.raises(UserError, match="^--val-fraction: a single pair is not cut"):
        convert(named(random_pairs(9))[:1], tmp_path / "out", BYTE, BLOCK)
    make(tmp_path / "out", block_size=BLOCK)
    with pytest.raises(UserError, match=r"another dataset \(dtype, "):
        convert(named(random_pairs(9)), tmp_path / "out", BYTE, BLOCK)


def test_a_shorter_block_would_cut_pairs(tmp_path, dataset):
    with pytest.raises(UserError, match="^model.block_size: 16 would cut the pairs of .*; take 32, or convert them again"):
        TrainStream(make_config(tmp_path, dataset, "--model.block_size=16"))


def test_dataset_json_of_pairs_is_checked(tmp_path):
    convert(named(random_pairs(9)), tmp_path / "out", BYTE, BLOCK, val_fraction=0)
    card = load_dataset_card(tmp_path / "out")
    card["splits"]["train"]["targets"] = -1
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="dataset.json: splits.train.targets is -1, no int"):
        load_dataset_card(tmp_path / "out")


@pytest.mark.parametrize("stored", [257, ~257])
def test_an_id_out_of_the_vocabulary_is_named(tmp_path, stored):
    convert(named(random_pairs(9)), tmp_path / "out", BYTE, BLOCK, val_fraction=0)
    shard = next((tmp_path / "out" / "train").glob("*.mds"))
    index = json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"] = {}  # made elsewhere
    (tmp_path / "out" / "train" / "index.json").write_text(json.dumps(index))
    shard.write_bytes(shard.read_bytes()[:-4] + np.int32(stored).tobytes())
    split = Split(make_config(tmp_path, tmp_path / "out"), "train", str(tmp_path / "out"))
    with pytest.raises(UserError, match=f"sample {split.samples - 1} holds id 257, the vocabulary ends at 256"):
        split.read(np.array([[split.samples - 1, 0]]))


# ---- training on them -----------------------------------------------------------------------------------------------

def test_loss_is_that_of_a_plain_loop_over_the_completions(tmp_path, dataset):
    model = GPT(Model(n_layer=2, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=257)).double().eval()
    model.init_weights(1)
    nats = targets = 0
    for row in packed(of_jsonl(dataset)):
        logits = model.lm_head(model.hidden(torch.tensor([[max(token, ~token) for token in row]])[:, :BLOCK]))[0, :, :257]
        for i, token in enumerate(row[1:]):
            if token >= 0:
                nats -= logits[i].log_softmax(-1)[token].item()
                targets += 1
    split = Split(make_config(tmp_path, dataset), "train", str(dataset))
    sums = [(model(x, y).item(), int((y != IGNORE).sum())) for rank in range(2)
            for x, y in split.fixed_batches(10**6, 4, rank, 2)]
    assert sum(n for _, n in sums) == targets == split.card["splits"]["train"]["targets"]
    assert sum(loss for loss, _ in sums) == pytest.approx(nats, rel=1e-5)


def test_a_step_is_divided_by_the_targets_of_all_ranks(tmp_path, dataset, ranks):
    """Against a loop without ranks: the samples of a step have from 2 to 33 targets."""
    steps, options = 6, ["--train.max_steps=6", "--train.micro_batch_size=2", "--optim.warmup_steps=0"]
    config = make_config(tmp_path, dataset, *options)
    argv = [str(tmp_path / "c.yaml"), *SMALL, *options, f"--run.dir={tmp_path}/run", "--sharding.strategy=grad"]
    found = ranks(2, train_run, argv)[0]

    stream, rows = TrainStream(config), packed(of_jsonl(dataset))
    config.model.vocab_size = 257
    model = GPT(config.model)
    model.init_weights(config.run.seed)
    optimizer = plain_optimizer(model.parameters())
    losses, counts = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = found[step]["learning_rate"]
        tokens = torch.tensor([rows[sample] for sample, _ in stream.sequences(step).tolist()])
        y = torch.where(tokens < 0, IGNORE, tokens)[:, 1:]
        logits = model.lm_head(model.hidden(torch.where(tokens < 0, -tokens - 1, tokens)[:, :-1]))[..., :257]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())  # the mean over what is not ignored
        losses.append(plain_step(optimizer, loss)[0])
        counts.append((y[:4] != IGNORE).sum() / (y != IGNORE).sum())  # the share of the first rank
    assert [m["loss"] for m in found] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0] and max(counts) - min(counts) > 0.1


def test_a_mixture_of_text_and_pairs(tmp_path, dataset):
    make(tmp_path / "text", block_size=BLOCK, val_fraction=0)
    stream = TrainStream(make_config(tmp_path, f"{{train: [{{path: {dataset}}}, {{path: {tmp_path / 'text'}}}]}}"))
    rows = [packed(of_jsonl(dataset)), read(tmp_path / "text" / "train").tolist()]
    for batch, sequences in zip(stream.batches(0, 5, 0, 1, torch.device("cpu")),
                                (m for step in range(5) for m in stream.micro_batches(step, 0, 1))):
        for row, (sample, _) in zip(batch.tolist(), sequences):
            split, number = stream.find(int(sample))
            assert row == rows[stream.splits.index(split)][number]


# ---- tools/inspect_mds.py -------------------------------------------------------------------------------------------

def test_inspect(tmp_path, dataset, capsys, monkeypatch):
    pairs = [("2+2=", "4"), ("", "hello"), ("x" * 30, "[y]")]
    write(tmp_path / "pairs.jsonl", pairs)
    convert(named(pairs), tmp_path / "out", BYTE, 40, val_fraction=0)
    status, stdout, stderr = call_tool(capsys, monkeypatch, "inspect_mds.py", tmp_path / "out", "--verify")
    assert (status, stderr) == (0, "")
    assert "pairs 3, tokens 46, targets 12, samples 2, padding 43.9%" in stdout
    assert "train sample 0, tokens 0 to 40: '[[2+2=]]4<|endoftext|>hello<|endoftext|>[[29 x <|endoftext|>]]'\n" in stdout
    assert f"train sample 1, tokens 41 to 81: '[[{'x' * 30}]][y]<|endoftext|>[[7 x <|endoftext|>]]'\n" in stdout
    assert "verified: 1 shards hold what was written" in stdout

    card = load_dataset_card(tmp_path / "out")
    card["splits"]["train"]["targets"] += 1
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(card))
    status, stdout, stderr = call_tool(capsys, monkeypatch, "inspect_mds.py", tmp_path / "out", "--verify")
    assert one_line(status, stderr) and "train: holds targets 12, and 13 by dataset.json" in stderr


def test_inspect_a_step(tmp_path, dataset, capsys, monkeypatch):
    """The pairs of each sequence by number and line: numbers are those of the blank-separated lines of the file."""
    config = make_config(tmp_path, dataset)
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    status, stdout, _ = call_tool(capsys, monkeypatch, "inspect_mds.py", "--run", config.run_dir, "--step", 3, "--full")
    assert status == 0
    shown = [line for line in stdout.splitlines() if line.startswith("sequence ")]
    pairs, first, wanted = of_jsonl(dataset), 0, {}
    for sample, row in enumerate(packed(pairs)):
        last = first + row.count(END) - 1
        numbers = f"pair {first}" if first == last else f"pairs {first} to {last}"
        lines = [f"'{dataset.parent}/pairs.jsonl:{2 * i + 1}'" for i in range(first, last + 1)]
        wanted[sample] = f", {numbers} ({', '.join(lines if len(lines) <= 4 else [lines[0], '…', lines[-1]])})"
        first = last + 1
    samples = TrainStream(config).sequences(2)[:, 0].tolist()
    assert len(shown) == len(samples) == 8
    for line, sample in zip(shown, samples):
        assert f"sample {sample}, tokens {33 * sample} to {33 * sample + 32}{wanted[sample]}" in line
    assert stdout.count("[[") > 8
