"""Checkpoints: complete or not at all, and the same on any number of ranks."""

import json
import os
import pickle
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from nanogpt import checkpoint
from nanogpt.errors import UserError

SHAPE = ["--model.n_layer=2", "--model.n_head=2", "--model.n_embd=24", "--model.block_size=16", "--model.vocab_size=50"]


def make(options=(), seed=1):
    """A sharded model and its optimizer after one step, on this rank."""
    from nanogpt.config import Config, load_config
    from nanogpt.optim import make_optimizer
    from nanogpt.sharding import build
    from nanogpt.ranks import init_process_group
    file = f"/tmp/nanogpt-test-{os.getpid()}.yaml"
    with open(file, "w") as f:
        f.write("data: {path: none}\ntrain: {max_steps: 1, global_batch_size: 4, micro_batch_size: 1, compile: false,"
                " precision: float32}")
    config: Config = load_config([file, *SHAPE, f"--run.seed={seed}", *options], int(os.environ["WORLD_SIZE"]),
                                 int(os.environ["LOCAL_WORLD_SIZE"]))
    os.unlink(file)
    device = init_process_group(config)
    model = build(config, device)
    optimizer = make_optimizer(model, config.optim)
    idx = torch.arange(16)[None] + seed
    (model(idx, idx.roll(-1)) / 64).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def whole(state: dict) -> dict:
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for k, v in state.items()}


def save(folder, options, steps, async_save, keep_last=2, keep_every=0):
    """Saves at each of `steps`; every weight changes after each save has returned. Returns what was saved first."""
    model, optimizer = make(options)
    saver = checkpoint.Saver(folder, keep_last, keep_every, async_save)
    first = whole(checkpoint.tensors(model, optimizer))
    worked = []
    for step in steps:
        saver.save(model, optimizer, dict(step=step))
        with torch.no_grad():
            for p in model.parameters():
                p += 1
        worked.append(saver.wait() if step == steps[-1] else True)
    return first, worked


def load(path, options, with_optimizer):
    model, optimizer = make(options, seed=2)
    checkpoint.verify(path)
    checkpoint.load(path, model, optimizer if with_optimizer else None)
    return whole(checkpoint.tensors(model, optimizer))


@pytest.mark.parametrize("async_save", [True, False], ids=["async", "sync"])
def test_saved_on_two_ranks_is_loaded_on_any(ranks, tmp_path, async_save):
    folder = tmp_path / "checkpoints"
    saved, worked = ranks(2, save, folder, ["--sharding.strategy=full"], [7], async_save)[0]
    assert worked == [True]
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000007"]
    path = checkpoint.find(tmp_path)
    for world_size, options in ((1, []), (4, ["--sharding.strategy=hybrid", "--sharding.shard_size=2"]),
                                (2, ["--sharding.strategy=replicate", "--sharding.activation_checkpointing=full"])):
        for loaded in ranks(world_size, load, path, options, True):
            assert loaded.keys() == saved.keys()
            for name in saved:
                assert torch.equal(loaded[name], saved[name]), name
    fresh = ranks(1, load, path, [], False)[0]  # weights alone: the optimizer is the new run's own
    for name in saved:
        assert torch.equal(fresh[name], saved[name]) == name.startswith("model.") or name.endswith(".step"), name


def test_weights_load_without_ranks(ranks, tmp_path):
    from nanogpt.config import Model
    from nanogpt.model import GPT
    saved, _ = ranks(2, save, tmp_path / "checkpoints", [], [7], True)[0]
    model = GPT(Model(n_layer=2, n_head=2, n_embd=24, block_size=16, vocab_size=50))
    checkpoint.load(checkpoint.find(tmp_path), model)
    for name, p in model.named_parameters():
        assert torch.equal(p, saved[f"model.{name}"])
    other = GPT(Model(n_layer=2, n_head=2, n_embd=48, block_size=16, vocab_size=50))
    with pytest.raises(UserError, match=r"does not fit this model: .*c_attn.bias is \(72,\) there and \(144,\) here"):
        checkpoint.load(checkpoint.find(tmp_path), other)


def test_retention(ranks, tmp_path):
    ranks(1, save, tmp_path, [], [10, 20, 25, 30, 35, 40], True, 2, 20)
    assert [p.name for p in checkpoint.complete_steps(tmp_path)] == [f"step-000000{n}" for n in (20, 35, 40)]
    assert len(list(tmp_path.iterdir())) == 3  # nothing left lying


def test_a_step_saved_anew_takes_the_place_of_the_old(ranks, tmp_path):
    _, worked = ranks(1, save, tmp_path, [], [10, 10, 10], True)[0]
    assert worked[-1] and [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
    checkpoint.verify(tmp_path / "step-00000010")


def test_training_goes_on_before_anything_is_on_disk(ranks, tmp_path):
    """Rank 0's disk does not answer at first; then it is full for a moment, which the other rank does not see."""
    results = ranks(2, save_on_a_slow_disk, tmp_path)
    assert results[0][0] == results[0][1] == []
    assert [worked for _, _, *worked in results] == [[True, False]] * 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def save_on_a_slow_disk(folder):
    """What is there when each of two saves returns, and whether they worked."""
    model, optimizer = make()
    saver = checkpoint.Saver(folder / "checkpoints", 2, 0, True)
    mkdir, there, worked = Path.mkdir, [], []
    for step in (10, 20):
        answers, made = threading.Event(), []

        def slow(path, *args, **kwargs):
            made.append(path)
            if os.environ["RANK"] == "0" and len(made) == 1:
                answers.wait(10)
                if step == 20:
                    raise OSError(28, "No space left on device")
            return mkdir(path, *args, **kwargs)

        with mock.patch.object(Path, "mkdir", slow):
            saver.save(model, optimizer, dict(step=step))
            there.append(sorted(p.name for p in folder.glob("checkpoints/.*")))
            answers.set()
            worked.append(saver.wait())
    return *there, *worked


def test_a_save_that_fails_is_told_and_keeps_the_older_ones(ranks, tmp_path):
    ranks(1, save, tmp_path, [], [10], True)
    results = ranks(2, save_into_a_file, tmp_path)
    assert results == [False, False]
    assert [p.name for p in checkpoint.complete_steps(tmp_path)] == ["step-00000010"]


def save_into_a_file(folder):
    """The folder of the checkpoints turns out to be a file, on every rank alike."""
    model, optimizer = make()
    saver = checkpoint.Saver(folder / "step-00000010" / "state.json", 2, 0, True)
    saver.save(model, optimizer, dict(step=20))
    return saver.wait()


# ---- damage ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def good(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    ranks(2, save, folder / "checkpoints", [], [7], True)
    return checkpoint.find(folder)


def test_every_byte_counts(good, tmp_path):
    checkpoint.verify(good)
    for file in sorted(p.name for p in good.iterdir() if p.name != "manifest.json"):
        for damage in ("flip", "cut", "remove"):
            copy = tmp_path / f"{file}-{damage}"
            shutil.copytree(good, copy)
            content = bytearray((copy / file).read_bytes())
            if damage == "remove":
                (copy / file).unlink()
            else:
                content[len(content) // 2] ^= 1
                (copy / file).write_bytes(content[:-1] if damage == "cut" else content)
            with pytest.raises(UserError, match=f"{file}: "):
                checkpoint.verify(copy)


def test_without_a_manifest_it_is_no_checkpoint(good, tmp_path):
    shutil.copytree(good, tmp_path / "checkpoints" / "step-00000007")
    (tmp_path / "checkpoints" / "step-00000007" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": {"../../x": {"bytes": 1, "xxh3_128": ""}}}',
                                      '{"files": {"state.json": 3}}'])
def test_a_damaged_manifest_is_refused(good, tmp_path, manifest):
    copy = shutil.copytree(good, tmp_path / "step-00000007")
    (copy / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="manifest.json"):
        checkpoint.verify(copy)


def test_another_format_is_refused_by_name(good, tmp_path):
    copy = shutil.copytree(good, tmp_path / "step-00000007")
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(UserError, match="its format is 99, this version reads 2"):
        checkpoint.read_state(copy)


def test_an_index_that_points_out_of_its_folder_is_refused(good, tmp_path):
    metadata = checkpoint.SafeReader(good).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    copy = shutil.copytree(good, tmp_path / "step-00000007")
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="not an index of tensors"):
        checkpoint.SafeReader(copy).read_metadata()
