"""nanoGPT's files: the same logits and losses as a forward written out here, the same tokens, refusals.

A checkpoint is made here as nanoGPT's train.py saves it, a dataset as its prepare.py does.
"""

import importlib.util
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from test_shards import call_tool, hashes, one_line, read, run_tool

from nanogpt import checkpoint, resume, tokenizer
from nanogpt.errors import UserError
from nanogpt.generate import load_run
from nanogpt.model import GPT
from nanogpt.convert import convert_tokens
from nanogpt.shards import load_dataset_card

ROOT = Path(__file__).parents[1]
TEXT = "Größe? Der Mond, 東京 und 🙂; noch einmal:\n" * 40
ALPHABET = "".join(sorted(set(TEXT)))
ARGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=True, vocab_size=len(ALPHABET), dropout=0.1)

spec = importlib.util.spec_from_file_location("convert_nanogpt", ROOT / "tools" / "convert_nanogpt.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def weights(args):
    """Random ones, by nanoGPT's names."""
    C, generator = args["n_embd"], torch.Generator().manual_seed(0)
    shapes = {"transformer.wte": (args["vocab_size"], C), "transformer.wpe": (args["block_size"], C)}
    for i in range(args["n_layer"]):
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in (
            ("ln_1", (C,)), ("attn.c_attn", (3 * C, C)), ("attn.c_proj", (C, C)), ("ln_2", (C,)),
            ("mlp.c_fc", (4 * C, C)), ("mlp.c_proj", (C, 4 * C)))}
    shapes["transformer.ln_f"] = (C,)
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.3
        if args["bias"] and ".w" not in name:
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.3
    return state | {"lm_head.weight": state["transformer.wte.weight"]}  # one matrix under two names


def reference(state, args, idx):
    """Logits (B, T, vocab_size) for idx (B, T) by nanoGPT's weights, with nothing but plain operations."""
    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state.get(f"{name}.bias", 0)

    (B, T), H = idx.shape, args["n_head"]
    x = state["transformer.wte.weight"][idx] + state["transformer.wpe.weight"][:T]
    for i in range(args["n_layer"]):
        h = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, -1)
        q, k, v = (y.view(B, T, H, -1).transpose(1, 2) for y in qkv)
        scores = q @ k.transpose(2, 3) / q.size(-1) ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1)
        x = x + linear((scores @ v).transpose(1, 2).reshape(B, T, -1), f"{h}.attn.c_proj")
        y = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        x = x + linear(0.5 * y * (1 + torch.erf(y / 2 ** 0.5)), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def saved(state=None, **changes):
    """What nanoGPT hands to torch.save."""
    args = ARGS | changes
    state = weights(args) if state is None else state
    return dict(model=state, optimizer=dict(state={0: dict(step=torch.tensor(9.0))}, param_groups=[dict(lr=1e-3)]),
                model_args=args, iter_num=200, best_val_loss=torch.tensor(2.5),
                config=dict(dataset="mond", batch_size=3, gradient_accumulation_steps=4, out_dir="out", compile=True))


def meta_of(alphabet):
    return dict(vocab_size=len(alphabet), itos=dict(enumerate(alphabet)), stoi={c: i for i, c in enumerate(alphabet)})


@pytest.fixture
def meta(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta_of(ALPHABET)))
    return tmp_path / "meta.pkl"


@pytest.fixture
def ckpt(tmp_path):
    torch.save(saved(), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def refused(message, function, *args):
    with pytest.raises(UserError, match=message) as error:
        function(*args)
    assert "\n" not in str(error.value)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias, prefix, mask, dtype", [
    (True, "", False, torch.float32), (False, "_orig_mod.", False, torch.float32),
    (True, "_orig_mod.", True, torch.bfloat16)])
def test_logits_and_loss(tmp_path, meta, bias, prefix, mask, dtype):
    args = ARGS | dict(bias=bias)
    state = {name: w.to(dtype) for name, w in weights(args).items()}
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)} if mask else {}
    torch.save(saved({prefix + name: w for name, w in (state | masks).items()}, bias=bias), tmp_path / "ckpt.pt")
    tool.convert_checkpoint(tmp_path / "ckpt.pt", meta, tmp_path / "runs" / "nano")
    assert sorted(os.listdir(tmp_path / "runs")) == ["nano"]
    model, tok, _ = load_run(tmp_path / "runs" / "nano")

    tokens = torch.from_numpy(tok.encode(TEXT).astype(np.int64))[:9 * 20].view(20, 9)
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    expected = reference({name: w.float() for name, w in state.items()}, args, idx)
    with torch.no_grad():
        logits, loss = model.logits(model.hidden(idx)), model(idx, targets)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert loss.item() / 160 == pytest.approx(F.cross_entropy(expected.flatten(0, 1), targets.flatten()).item(), abs=1e-6)
    assert (tok.eot, tok.vocab_size, tok.decode(tok.encode(TEXT))) == (None, len(ALPHABET), TEXT)
    assert model.transformer.wte.weight[len(ALPHABET):].abs().max() == 0


def test_what_the_run_says(tmp_path, ckpt, meta, capsys, monkeypatch):
    run = tmp_path / "nano"
    status, stdout, stderr = call_tool(capsys, monkeypatch, "convert_nanogpt.py", "--checkpoint", ckpt, "--meta", meta,
                                       "--out", run)
    assert (status, stderr) == (0, "") and "step 200" in stdout and "loss 2.5" in stdout
    path = checkpoint.find(run)
    checkpoint.verify(path)
    state = checkpoint.read_state(path)
    assert path.name == "step-00000200"
    assert (state["step"], state["tokens"]) == (200, 200 * 12 * 8)
    assert (state["held_out"]["best"], state["held_out"]["best_step"]) == (2.5, None)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config == state["config"] and config["data"]["path"] == "data/mond"
    assert {key: config["model"][key] for key in ARGS} == ARGS
    assert (config["train"]["global_batch_size"], config["train"]["micro_batch_size"]) == (12, 3)


def test_weights_for_finetuning_and_none_to_resume(tmp_path, ckpt, meta):
    run, warnings = tmp_path / "nano", []
    tool.convert_checkpoint(ckpt, meta, run)
    given = resume.Weights(str(run))
    given.check_tokenizer(tokenizer.CharTokenizer(ALPHABET, with_eot=False), "data", warnings)
    refused("its tokenizer is char", given.check_tokenizer, tokenizer.CharTokenizer(ALPHABET), "data", warnings)
    model = GPT(given.model)
    given.fill(model)
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, weights(ARGS)["transformer.h.1.mlp.c_fc.weight"])
    assert not checkpoint.has_optimizer(checkpoint.find(run))


@pytest.mark.parametrize("ids", [50257, 50304])
def test_gpt2(tmp_path, monkeypatch, ids):
    asked = []  # its vocabulary may not be here
    monkeypatch.setattr(tokenizer, "from_name", lambda name: asked.append(name) or tokenizer.ByteTokenizer())
    torch.save(saved(vocab_size=ids, n_layer=1), tmp_path / "ckpt.pt")
    tool.convert_checkpoint(tmp_path / "ckpt.pt", None, tmp_path / "nano")
    assert asked == ["gpt2"] and load_run(tmp_path / "nano")[0].config.vocab_size == ids


def changed(name, value):
    """saved(), with another value of one weight; None: without it."""
    def change():
        state = weights(ARGS)
        state.pop(name, None)
        return saved(state | ({} if value is None else {name: value}))
    return change


@pytest.mark.parametrize("content, message", [
    (changed("transformer.wpe.weight", None), "'transformer.wpe.weight' is missing"),
    (changed("transformer.h.0.attn.q_norm.weight", torch.ones(8)), "attn.q_norm.weight' is no tensor of its model_args"),
    (changed("transformer.h.1.ln_1.weight", torch.ones(17)), r"transformer.h.1.ln_1.weight is \(17,\), and \(16,\)"),
    (changed("transformer.wte.weight", torch.ones(len(ALPHABET), 16)), "lm_head.weight is not transformer.wte.weight"),
    (changed("transformer.ln_f.bias", torch.ones(16, dtype=torch.int64)), "transformer.ln_f.bias is no tensor of floating"),
    (changed("transformer.ln_f.bias", torch.ones(16, device="meta")), "transformer.ln_f.bias is no tensor of floating"),
    (changed("transformer.ln_f.bias", [1.0] * 16), "transformer.ln_f.bias is no tensor of floating"),
    (lambda: saved(bias=False) | dict(model_args=ARGS), "'transformer.h.0.attn.c_attn.bias' is missing"),
    (lambda: saved() | dict(model_args=ARGS | dict(n_head=3)), "its model_args are of no model"),
    (lambda: saved() | dict(model_args=ARGS | dict(n_layer=1 << 20)), "its model_args are of no model"),
    (lambda: saved() | dict(model_args=ARGS | dict(n_expert=8)), "model.n_expert Extra inputs"),
    (lambda: saved() | dict(model_args=ARGS | dict(vocab_size=None)), "is no checkpoint of nanoGPT"),
    (lambda: saved() | dict(model_args=[1]), "is no checkpoint of nanoGPT"),
    (lambda: saved() | dict(model={1: 2}), "is no checkpoint of nanoGPT"),
    (lambda: saved() | dict(iter_num="many"), "train.max_steps"),
    (lambda: saved() | dict(best_val_loss=torch.ones(3)), "is no checkpoint of nanoGPT"),
    (lambda: saved() | dict(config={}), "KeyError: 'dataset'"),
    (lambda: saved() | dict(config=saved()["config"] | dict(dataset="a\x1b[2J")), "state.json: config: data: path"),
    (lambda: {"model": {}}, "KeyError: 'config'"), (lambda: torch.ones(3), "it holds a Tensor"),
    (lambda: saved() | dict(config=Path("x")), "holds more than tensors and plain values"),
    (lambda: saved(vocab_size=99), rf"has {len(ALPHABET)} characters, and the model of .* 99 ids"),
], ids=lambda value: value if isinstance(value, str) else "content")
def test_other_checkpoints_are_refused(tmp_path, meta, content, message):
    file = tmp_path / "ckpt.pt"
    torch.save(content(), file)
    refused(f"(ckpt.pt: |meta.pkl: |/).*({message})", tool.convert_checkpoint, file, meta, tmp_path / "nano")
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "meta.pkl"]


def test_small_files_of_huge_tensors(tmp_path, meta):
    args = ARGS | dict(block_size=1 << 20)
    positions = torch.ones(1, 16).expand(1 << 20, 16)
    torch.save(changed("transformer.wpe.weight", positions)() | dict(model_args=args), tmp_path / "ckpt.pt")
    refused("its tensors are larger than the file", tool.convert_checkpoint, tmp_path / "ckpt.pt", meta, tmp_path / "nano")


def test_damaged_checkpoints(tmp_path, ckpt):
    good, choose = ckpt.read_bytes(), random.Random(0)
    right = tool.read_checkpoint(ckpt)[1]
    for i in range(80):
        bad, at = bytearray(good), choose.randrange(len(good))
        if i % 4 == 0:
            del bad[at:]
        elif i % 4 == 1:
            bad[choose.randrange(3000)] ^= 1 << choose.randrange(8)
        else:
            bad[at] ^= 1 << choose.randrange(8)
        ckpt.write_bytes(bad)
        try:  # not every byte of a zip file means something
            tensors = tool.read_checkpoint(ckpt)[1]
            assert i % 4 and all(torch.equal(tensors[name], w) for name, w in right.items())
        except UserError as error:
            assert str(error).startswith(f"{ckpt}: is ") and "\n" not in str(error)


def test_files_that_are_none(tmp_path, meta, ckpt):
    torch.save(saved(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(saved(model=None)))
    for name, message in (("old.pt", "no checkpoint of nanoGPT"), ("empty.pt", "is cut short"), ("pickle.pt", "no checkp"),
                          ("nowhere.pt", "cannot be read .No such file"), ("", "cannot be read .Is a directory")):
        refused(message, tool.convert_checkpoint, tmp_path / name, meta, tmp_path / "nano")
    refused(f"has {len(ALPHABET)} ids, and gpt2 has 50257; --meta data/mond/meta.pkl", tool.convert_checkpoint, ckpt, None,
            tmp_path / "nano")
    refused("nowhere.pkl: cannot be read", tool.convert_checkpoint, ckpt, tmp_path / "nowhere.pkl", tmp_path / "nano")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("")
    for out in (ckpt, tmp_path / "there"):
        refused("is there already; take another --out", tool.convert_checkpoint, ckpt, meta, out)
    refused("cannot be written", tool.convert_checkpoint, ckpt, meta, ckpt / "nano")
    refused("cannot be written", tool.convert_checkpoint, ckpt, meta, Path("/proc/nanogpt/nano"))


def test_a_full_disk_leaves_nothing(tmp_path, ckpt, meta, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "write_manifest", full)
    refused("cannot be written .*No space left", tool.convert_checkpoint, ckpt, meta, tmp_path / "nano")
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "meta.pkl"]


# ---- meta.pkl -------------------------------------------------------------------------------------------------------

GOOD = meta_of("abc")


@pytest.mark.parametrize("content, message", [
    (meta_of("acb"), "its characters are not sorted"), (GOOD | {"stoi": {"a": 0, "b": 2, "c": 1}}, "do not turn ids"),
    (GOOD | {"itos": {0: "a", 1: "b", 2: "b"}}, "do not turn ids"), (GOOD | {"itos": {0: "a", 1: "bc"}}, "KeyError: 2"),
    (GOOD | {"itos": {0: "a", 1: "b", 2: "cd"}}, "do not turn ids"), (GOOD | {"itos": "abc"}, "do not turn ids"),
    (GOOD | {"itos": {0: "a", 1: "b", 2: 3}}, "expected str"), (GOOD | {"vocab_size": 2}, "do not turn ids"),
    (GOOD | {"vocab_size": 10 ** 12}, "KeyError: 3"), (GOOD | {"vocab_size": "3"}, "TypeError"),
    ({"vocab_size": 3}, "KeyError: 'itos'"), ([], "TypeError"), (None, "TypeError"),
    (GOOD | {"itos": np.array(["a", "b", "c"])}, "it names 'numpy.* refused unread"),
    (Path("x"), "it names 'pathlib.* refused unread"),
], ids=str)
def test_other_metas_are_refused(tmp_path, content, message):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    refused(f"meta.pkl: is no meta.pkl of characters .*{message}", tool.read_meta, tmp_path / "meta.pkl")


def test_damaged_metas(tmp_path):
    choose, file = random.Random(0), tmp_path / "meta.pkl"
    for i in range(300):
        bad = bytearray(pickle.dumps(meta_of(ALPHABET), protocol=choose.randrange(6)))
        at = choose.randrange(len(bad))
        bad[at:at + 4] = choose.randbytes(4) if i % 3 else b""
        file.write_bytes(bad if i % 3 else bad[:at])
        try:
            assert tool.read_meta(file).alphabet == "".join(sorted(tool.read_meta(file).alphabet))
        except UserError as error:
            assert str(error).startswith(f"{file}: is no meta.pkl") and "\n" not in str(error)


# ---- datasets -------------------------------------------------------------------------------------------------------

@pytest.fixture
def prepared(tmp_path, meta):
    """A folder as prepare.py leaves it, and the ids of its splits."""
    ids = np.array([ALPHABET.index(c) for c in TEXT], dtype=np.uint16)
    splits = {"train": ids[:int(len(ids) * 0.9)], "val": ids[int(len(ids) * 0.9):]}
    for name, part in splits.items():
        part.tofile(tmp_path / f"{name}.bin")
    return tmp_path, splits


def test_bins_become_shards(prepared, capsys, monkeypatch):
    folder, splits = prepared
    done = run_tool("convert_nanogpt.py", "--data", ".", "--block-size", 16, "--stride", 5, "--out", "out/mds", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    card = load_dataset_card(folder / "out" / "mds")
    assert os.listdir(folder / "out") == ["mds"]
    assert tokenizer.from_json(card["tokenizer"]).alphabet == ALPHABET and card["tokenizer"]["eot"] is None
    for name, stride in (("train", 5), ("val", 16)):
        ids, samples = splits[name].tolist(), read(folder / "out" / "mds" / name)
        assert samples.dtype == np.uint16
        assert samples.tolist() == [ids[i:i + 17] for i in range(0, len(ids) - 16, stride)]
        dropped = len(ids) - (len(samples) - 1) * stride - 17
        n_bytes = len("".join(ALPHABET[i] for i in ids).encode())
        assert card["splits"][name] == dict(stride=stride, tokens=len(ids), samples=len(samples), documents=1, bytes=n_bytes,
                                            dropped_tokens=dropped)
    status, stdout, stderr = call_tool(capsys, monkeypatch, "inspect_mds.py", folder / "out" / "mds", "--verify")
    assert (status, stderr) == (0, "")
    assert "end-of-text none" in stdout and repr(TEXT[:17]) in stdout


def test_pieces_change_nothing_and_done_is_done(prepared, monkeypatch, capsys):
    folder, _ = prepared
    tool.convert_data(folder, folder / "whole", 16, None, "zstd", False)
    monkeypatch.setattr("nanogpt.convert.PIECE", 7)
    tool.convert_data(folder, folder / "pieces", 16, None, "zstd", False)
    assert hashes(folder / "whole") == hashes(folder / "pieces")
    assert capsys.readouterr().out.count("written") == 2
    tool.convert_data(folder, folder / "pieces", 16, None, "zstd", False)
    assert "is there already" in capsys.readouterr().out
    np.zeros(99, np.uint16).tofile(folder / "val.bin")
    refused(r"another dataset \(source.sha256\)", tool.convert_data, folder, folder / "pieces", 16, None, "zstd", False)
    tool.convert_data(folder, folder / "pieces", 16, None, "zstd", True)
    assert hashes(folder / "whole") != hashes(folder / "pieces")


@pytest.mark.parametrize("text, documents", [("ab.cd.", 2), ("ab.cd", 2), ("...", 3), ("abcd", 1)])
def test_documents_are_counted_where_they_end(tmp_path, text, documents):
    ids = np.array([256 if c == "." else ord(c) for c in text], dtype=np.uint16)
    card, _ = convert_tokens({"train": ids, "val": ids}, tmp_path / "out", tokenizer.ByteTokenizer(), 2)
    assert card["splits"]["train"]["documents"] == documents
    assert card["splits"]["train"]["bytes"] == len(text.replace(".", ""))
    assert (card["splits"]["train"]["tokens"], read(tmp_path / "out" / "train")[0].tolist()) == (len(text), ids[:3].tolist())


@pytest.mark.parametrize("name, content, message", [
    ("train.bin", b"", "train.bin: has 0 bytes"), ("val.bin", b"123", "val.bin: has 3 bytes, and its ids take two each"),
    ("val.bin", None, "val.bin: cannot be read .No such file.*with train.bin and val.bin"),
    ("val.bin", b"\0" * 32, "the val split has 16 tokens, and a sample takes block_size . 1 = 17"),
    ("train.bin", b"\x80\0" * 99, f"the train split holds id 128, and char ends at {len(ALPHABET) - 1}"),
    ("meta.pkl", b"", "meta.pkl: is no meta.pkl of characters"),
])
def test_other_data_is_refused(prepared, name, content, message):
    folder, _ = prepared
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    before = hashes(folder)
    refused(message, tool.convert_data, folder, folder / "out", 16, None, None, False)
    assert hashes(folder) == before


@pytest.mark.parametrize("arguments, message", [
    (["--out", "x"], "give either --checkpoint"), (["--data", "x"], "--out"),
    (["--data", "x", "--checkpoint", "y", "--out", "z"], "give either"),
    (["--data", "x", "--meta", "y", "--out", "z"], "give either"),
    (["--checkpoint", "x", "--block-size", "8", "--out", "z"], "give either"),
    (["--data", ".", "--block-size", "0", "--out", "z"], "--block-size: 0 is out of range"),
    (["--data", ".", "--block-size", "16", "--stride", "17", "--out", "z"], "--stride: 17 is out of range"),
    (["--data", ".", "--block-size", "16", "--out", "."], "exists and is not a dataset folder"),
    (["--data", "nowhere", "--out", "z"], "nowhere/train.bin: cannot be read"),
])
def test_bad_options(prepared, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(prepared[0])
    before = hashes(prepared[0])
    status, stdout, stderr = call_tool(capsys, monkeypatch, "convert_nanogpt.py", *arguments)
    assert one_line(status, stderr) and message in stderr and stdout == ""
    assert hashes(prepared[0]) == before
