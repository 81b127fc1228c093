"""What may change when a run is resumed, what may not, and what a change of the data costs that the user allows."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from test_numbers import ONE_THREAD, plain, strict
from test_stream import convert, three  # noqa: F401
from test_train import SMALL

from nanogpt import checkpoint
from nanogpt.config import load_config
from nanogpt.errors import UserError
from nanogpt.stream import TrainStream


def attempt(argv: list[str]) -> tuple[str, str, list]:
    """One rank of a run: (what stopped it, its stderr, [bytes of the rows of each forward pass in training])."""
    import nanogpt.train as training
    build, said, rows, stopped = training.build, io.StringIO(), [], None

    def seen(model, args):
        if model.training:
            rows.append(sorted(x.tobytes() for x in torch.cat([args[0], args[1][:, -1:]], 1).numpy()))

    def hooked(config, device):
        model = build(config, device)
        model.register_forward_pre_hook(seen)
        return model

    with contextlib.redirect_stderr(said), ONE_THREAD, mock.patch.object(training, "build", hooked):
        try:
            training.start(load_config(argv, int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])))
        except UserError as error:
            stopped = str(error)
    return stopped, said.getvalue(), rows


def mixed(*parts) -> str:
    """What a config says of a mixture of (dataset, proportion)."""
    return "data: {train: [" + ", ".join(f"{{path: {path}, proportion: {share}}}" for path, share in parts) + "]}"


class Runs:
    """Run folders in one place, and what is started in them."""

    def __init__(self, folder: Path, ranks):
        self.folder, self.ranks = folder, ranks

    def argv(self, name, data, steps, options):
        """data: a dataset, or {dataset: its proportion}."""
        if isinstance(data, dict):
            data = mixed(*data.items())
        else:
            data = f"data: {{path: {data}}}"
        config = self.folder / f"{name}.yaml"
        config.write_text(data)
        return [str(config), *SMALL, f"--run.dir={self.folder / name}", f"--train.max_steps={steps}",
                "--train.micro_batch_size=2", *options]

    def attempt(self, name, data, steps, *options, world_size=1):
        return self.ranks(world_size, attempt, self.argv(name, data, steps, options))

    def __call__(self, name, data, steps, *options, world_size=1):
        """The metrics of a run that does not stop before its end."""
        stopped = self.attempt(name, data, steps, *options, world_size=world_size)[0][0]
        assert stopped is None
        return strict(self.folder / name / "metrics.jsonl")

    def copy(self, name, to):
        return shutil.copytree(self.folder / name, self.folder / to)

    def state(self, name):
        return checkpoint.read_state(checkpoint.find(self.folder / name))

    def batches(self, data, *steps, options=(), first_step=0):
        """What steps are to be trained on, one batch each."""
        stream = TrainStream(load_config(self.argv("by-hand", data, 25, options)), first_step)
        return [stream.read(stream.sequences(step)) for step in steps]


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), ranks)


@pytest.fixture(scope="module")
def single(runs, text_dataset):
    """A run on one dataset that has done ten steps."""
    runs("single", text_dataset, 10)
    return "single"


@pytest.fixture(scope="module")
def mixture(runs, three):  # noqa: F811
    """A run on two that has done ten steps: its data."""
    data = {three[0]: 6, three[1]: 3}
    runs("mixture", data, 10)
    return data


def contents(folder: Path) -> dict:
    """Every file but the lock, which tells who looked last."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


# ---- what is refused ------------------------------------------------------------------------------------------------

def refused(runs, name, data, changed: dict, *options, world_size=1):
    """changed: {key: (was, is now)}: just these are named, one a line, and the folder stays as it is."""
    before = contents(runs.folder / name)
    path = runs.folder / name / "checkpoints" / "step-00000010"
    for stopped, said, rows in runs.attempt(name, data, 25, *options, world_size=world_size):
        assert sorted(stopped.splitlines()) == sorted(
            f"{path}: {key} is {now} now and was {was}: the samples would come in another order; take the old value, "
            "start another run.name, or accept it with --run.allow_data_change true"
            for key, (was, now) in changed.items())
        assert rows == []
    assert contents(runs.folder / name) == before


@pytest.mark.parametrize("options, changed", [
    (["--data.shuffle=false"], {"data.shuffle": (True, False)}),
    (["--data.shuffle_algo=py1br"], {"data.shuffle_algo": ("py1e", "py1br")}),
    (["--data.shuffle_seed=7"], {"data.shuffle_seed": (9176, 7)}),
    (["--data.shuffle_block_size=1000"], {"data.shuffle_block_size": (1 << 18, 1000)}),
    (["--data.num_canonical_nodes=4"], {"data.num_canonical_nodes": (3, 4)}),
    (["--train.global_batch_size=16"], {"train.global_batch_size": (8, 16)}),
    (["--train.batch_schedule={kind: stepped, points: [[0, 4], [9, 8]]}"],
     {"train.batch_schedule": (None, "stepped [[0, 4], [9, 8]]")}),
    (["--data.shuffle_seed=7", "--train.global_batch_size=4", "--data.shuffle_algo=naive"],
     {"data.shuffle_seed": (9176, 7), "train.global_batch_size": (8, 4), "data.shuffle_algo": ("py1e", "naive")}),
], ids=lambda x: " ".join(x) if isinstance(x, dict) else "")
def test_settings_of_the_order_may_not_change(runs, single, text_dataset, options, changed):
    refused(runs, single, text_dataset, changed, *options)


def test_the_dataset_may_not_change(runs, single, mixture, text_dataset, three):  # noqa: F811
    def index(path):
        import hashlib
        return hashlib.sha256((path / "train" / "index.json").read_bytes()).hexdigest()

    def samples(path):
        return json.loads((path / "dataset.json").read_text())["splits"]["train"]["samples"]

    a, b, c = three
    assert a == text_dataset
    other = {"train index.json sha256": (index(a), index(b)), "samples per epoch": (samples(a), samples(b))}
    refused(runs, single, b, other, world_size=2)
    refused(runs, "mixture", mixture, {"data.mixture": ("random", "stratified")}, "--data.mixture=stratified")
    refused(runs, "mixture", {a: 2, b: 3},
            {"data.train.0 proportion": (2 / 3, 0.4), "data.train.1 proportion": (1 / 3, 0.6)})
    more = {"number of datasets": (2, 3), "data.train.2 index.json sha256": (None, index(c)),
            "data.train.2 samples per epoch": (None, samples(c)), "data.train.2 proportion": (None, 0.1)}
    refused(runs, "mixture", {a: 6, b: 3, c: 1},
            more | {"data.train.0 proportion": (2 / 3, 0.6), "data.train.1 proportion": (1 / 3, 0.3)})
    facts = {"index.json sha256": index, "samples per epoch": samples, "proportion": {a: 2 / 3, b: 1 / 3}.get}
    refused(runs, "mixture", {b: 3, a: 6}, {  # the order of the datasets is part of it
        f"data.train.{i} {what}": (of(was), of(now))
        for i, was, now in ((0, a, b), (1, b, a)) for what, of in facts.items()})
    # The same proportions in other numbers, and the same dataset in another place, are no change.
    shutil.copytree(b, runs.folder / "moved")
    runs.copy("mixture", "mixture-moved")
    assert len(runs("mixture-moved", {a: 60, runs.folder / "moved": 30}, 11)) == 11


def test_another_order_with_all_settings_the_same_is_refused(runs, single, text_dataset):
    """As if a library had come to shuffle otherwise: the checkpoint knows what the next step would have seen."""
    folder = runs.copy(single, "libraries")
    path = checkpoint.find(folder)
    state = json.loads((path / "state.json").read_text())
    right, state["next_samples"] = state["next_samples"], "0" * 32
    (path / "state.json").write_text(json.dumps(state))
    checkpoint.write_manifest(path)
    before = contents(folder)
    stopped, _, rows = runs.attempt("libraries", text_dataset, 25)[0]
    libraries = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    assert "torch 2." in libraries and "mosaicml-streaming 0." in libraries
    assert stopped.startswith(f"{path}: the order of step 11, with all settings the same (libraries then: "
                              f"{libraries}), is {right} now and was {'0' * 32}: ")
    assert "\n" not in stopped and rows == []
    assert contents(folder) == before
    # Where it is allowed, the order that there is now begins anew.
    metrics = runs("libraries", text_dataset, 14, "--run.allow_data_change=true")
    losses = plain(runs.batches(text_dataset, *range(10), *range(4)))
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-4)


# ---- what is free ---------------------------------------------------------------------------------------------------

def test_all_else_may_change_and_the_samples_stay(runs, single, text_dataset):
    runs.copy(single, "free")
    sections = {
        "run": dict(name="other", seed=5, timeout_s=60, first_timeout_s=600, grace_s=9, allow_data_change="true"),
        "data": dict(cache_dir="/nowhere", cache_limit="3gb"),
        "optim": dict(learning_rate=1e-3, min_learning_rate=1e-5, schedule="wsd", decay_steps=5, warmup_steps=2,
                      weight_decay=0.2, beta1=0.8, beta2=0.99, grad_clip=0.5),
        "train": dict(max_steps=17, max_tokens=4600, micro_batch_size=1, precision="bfloat16", max_skipped_steps=3),
        "model": dict(dropout=0.1),
        "eval": dict(interval=5, sequences=7),
        "sharding": dict(strategy="hybrid", shard_size=2, activation_checkpointing="selective", cpu_offload="true"),
        "checkpoint": dict(interval=4, keep_last=7, keep_every=2, async_save="false"),
        "log": dict(interval=3)}
    options = [f"--{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]
    results = runs.attempt("free", text_dataset, 17, *options, world_size=4)
    for stopped, said, _ in results:
        assert stopped is None and "data changes" not in said
    metrics = strict(runs.folder / "free" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [*range(1, 13), 15, 16, 17]  # 5, 4 and 3 steps, and the first and the last
    assert [m["tokens"] for m in metrics] == [m["step"] * 256 for m in metrics]
    state = runs.state("free")
    assert len(state["data_history"]) == 1 and state["step"] == 17
    seen = [result[2] for result in results]  # of each rank: two forward passes a step
    for i, batch in enumerate(runs.batches(text_dataset, *range(10, 17))):
        rows = [row for rank in seen for rows in rank[2 * i:2 * i + 2] for row in rows]
        assert sorted(rows) == sorted(row.tobytes() for row in batch.numpy())
    assert all(len(rank) == 7 * 2 for rank in seen)
    told = (runs.folder / "free" / "log.txt").read_text()
    for line in ("train.precision float32 -> bfloat16", "sharding.strategy full -> hybrid", "eval.sequences 13 -> 7"):
        assert f"changed since: {line}\n" in told


# ---- what a change costs --------------------------------------------------------------------------------------------

def test_an_allowed_change_begins_the_new_data_and_goes_on_there(runs, single, text_dataset, three):  # noqa: F811
    """Ten steps, eight of another order and batch, seven of another dataset, stopped in between: a plain loop.

    The new batch grows on the way, after step 13.
    """
    allow = "--run.allow_data_change=true"
    twice = ["--data.shuffle_seed=5", "--train.global_batch_size=16",
             "--train.batch_schedule={kind: stepped, points: [[0, 8], [13, 16]]}"]
    runs.copy(single, "changed")
    stopped, said, _ = runs.attempt("changed", text_dataset, 14, *twice, allow)[0]
    assert stopped is None
    path = runs.folder / "changed" / "checkpoints" / "step-00000010"
    warnings = [f"warning: {path}: data.shuffle_seed was 9176 and is 5 now",
                f"warning: {path}: train.global_batch_size was 8 and is 16 now",
                f"warning: {path}: train.batch_schedule was None and is stepped [[0, 8], [13, 16]] now"]
    n = json.loads((text_dataset / "dataset.json").read_text())["splits"]["train"]["samples"]
    cost = ("the data changes after step 10 and is read from its beginning: "
            f"40 of {n} samples of the epoch under way were trained on, and come again")  # 10 x 8 sequences, 2 a sample
    *told, last = said.splitlines()
    assert sorted(told) == sorted(warnings) and last.startswith(f"warning: {cost}")
    log = (runs.folder / "changed" / "log.txt").read_text()
    assert all(f"{line}\n" in log for line in said.splitlines())

    # Without the flag, on two ranks; a whole run beside it shows that the stop made no difference.
    *_, (stopped, said, _) = runs.attempt("changed", text_dataset, 18, *twice, world_size=2)
    assert stopped is None and "warning" not in said
    runs.copy(single, "whole")
    whole = runs("whole", text_dataset, 18, *twice, allow)
    assert "data changes" not in "".join(runs.attempt("changed", text_dataset, 18, *twice, allow)[0][1])

    # A second change, to another dataset and the old batch; and a stop on the way.
    stopped, said, _ = runs.attempt("changed", three[1], 21, allow)[0]
    assert stopped is None
    assert f"after step 18 and is read from its beginning: {3 * 4 + 5 * 8} of {n} samples" in said
    metrics = runs("changed", three[1], 25)

    losses = plain([*runs.batches(text_dataset, *range(10)),
                    *runs.batches(text_dataset, *range(10, 18), options=twice, first_step=10),
                    *runs.batches(three[1], *range(7))])
    assert [m["step"] for m in metrics] == list(range(1, 26))
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-4)
    assert [m["loss"] for m in whole] == pytest.approx(losses[:18], rel=1e-4)
    assert [m["tokens"] for m in metrics] == [*np.cumsum([256] * 13 + [512] * 5 + [256] * 7)]
    history = runs.state("changed")["data_history"]
    assert [(era["from_step"], era["tokens"]) for era in history] == [(0, 0), (10, 2560), (18, 3328 + 2560)]
    assert history[1]["changed"] == {"data.shuffle_seed": [9176, 5], "train.global_batch_size": [8, 16],
                                     "train.batch_schedule": [None, "stepped [[0, 8], [13, 16]]"]}
    assert history[1]["batch_schedule"] == {"kind": "stepped", "points": [[0, 8], [13, 16]]}
    assert history[2]["changed"].keys() == {"data.shuffle_seed", "train.global_batch_size", "train.batch_schedule",
                                            "train index.json sha256", "samples per epoch"}
    assert runs.state("changed")["tokens"] == 3328 + 2560 + 7 * 256
    # And now this is what may not change.
    assert "train index.json sha256 is" in runs.attempt("changed", text_dataset, 30)[0][0]


def test_what_a_change_costs_in_a_later_epoch_and_from_a_mixture(runs, three):  # noqa: F811
    _, b, c = three
    n = json.loads((c / "dataset.json").read_text())["splits"]["train"]["samples"]
    steps = n // 4 + 2  # 4 samples each: an epoch, and a little of the second
    runs("small", c, steps)
    said = runs.attempt("small", {b: 1, c: 1}, steps + 2, "--run.allow_data_change=true")[0][1]
    assert f"after step {steps} and is read from its beginning: {steps * 4 - n} of {n} samples of the epoch" in said
    assert "number of datasets was None and is 2 now" in said and "samples per epoch was" in said
    said = runs.attempt("small", c, steps + 3, "--run.allow_data_change=true")[0][1]
    assert f"after step {steps + 2} and is read from its beginning: up to 8 samples of the epoch under way" in said
    metrics = strict(runs.folder / "small" / "metrics.jsonl")
    losses = plain([*runs.batches(c, *range(steps)), *runs.batches({b: 1, c: 1}, 0, 1), *runs.batches(c, 0)])
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-4)


def test_max_tokens_after_a_change_of_the_batch(runs, single, text_dataset):
    """12 steps of 256 tokens are done in 10 of these and 1 of 512; and a later resume knows."""
    runs.copy(single, "tokens")
    options = ["--train.global_batch_size=16", "--train.max_tokens=3072"]
    for allow in ("true", "false"):
        metrics = runs("tokens", text_dataset, 25, *options, f"--run.allow_data_change={allow}")
        assert [(m["step"], m["tokens"]) for m in metrics[9:]] == [(10, 2560), (11, 3072)]
    assert [m["step"] for m in runs("tokens", text_dataset, 25, options[0], "--train.max_tokens=3073")[9:]] == [10, 11, 12]


def test_another_tokenizer_is_refused_whatever_is_allowed(runs, single, three, tmp_path):  # noqa: F811
    convert((three[0].parent / "text.txt").read_text(), tmp_path / "char", "char")
    before = contents(runs.folder / single)
    for allow in ("false", "true"):
        stopped = runs.attempt(single, tmp_path / "char", 25, f"--run.allow_data_change={allow}")[0][0]
        assert "tokenizer" in stopped
    assert "the same ids would be other text" in stopped
    assert contents(runs.folder / single) == before


# ---- mixtures -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["random", "stratified"])
def test_a_mixture_is_the_plain_loop_on_any_ranks_and_over_stops(runs, three, method):  # noqa: F811
    data, option = {path: share for path, share in zip(three, (5, 3, 2))}, f"--data.mixture={method}"
    losses = plain(runs.batches(data, *range(13), options=[option]))
    one = runs(f"one-{method}", data, 13, option)
    runs(f"parts-{method}", data, 7, option, world_size=2)
    parts = runs(f"parts-{method}", data, 13, option)
    two = runs(f"two-{method}", data, 13, option, world_size=2)
    for metrics in (one, two, parts):
        assert [m["step"] for m in metrics] == list(range(1, 14))
        assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-4)


def test_losses_of_a_mixture_one_by_one_and_weighted_by_its_proportions(runs, three, tmp_path):  # noqa: F811
    """Those without a val split do not count in val; one that is there twice counts twice."""
    from nanogpt.generate import load_run
    from nanogpt.shards import import_streaming
    a, b, c = three
    no_val = shutil.copytree(c, tmp_path / "no-val")
    card = json.loads((no_val / "dataset.json").read_text())
    del card["splits"]["val"]
    (no_val / "dataset.json").write_text(json.dumps(card))
    config = tmp_path / "c.yaml"
    parts = [(a, 0.1), (no_val, 0.4), (b, 0.3), (a, 0.2)]
    config.write_text(mixed(*parts))
    argv = [str(config), *SMALL, f"--run.dir={tmp_path / 'run'}", "--train.max_steps=8", "--train.micro_batch_size=2"]
    assert [stopped for stopped, *_ in runs.ranks(2, attempt, argv)] == [None, None]
    last = strict(tmp_path / "run" / "metrics.jsonl")[-1]
    model = load_run(tmp_path / "run")[0]

    def of(path, split):
        """(loss, bytes a token) of the first 13 sequences of a split."""
        samples = import_streaming().LocalDataset(local=str(path / split))
        rows = np.stack([samples[i // 2]["tokens"][i % 2 * 32:i % 2 * 32 + 33]
                         for i in range(min(13, 2 * len(samples)))]).astype(np.int64)
        tokens = torch.from_numpy(rows)
        with torch.no_grad():
            logits = model.lm_head(model.hidden(tokens[:, :-1]))[..., :257]
        return (torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item(),
                (rows[:, 1:] < 256).mean())

    for split in ("train", "val"):
        weights = [(share, of(path, split)) for path, share in parts if split == "train" or path != no_val]
        loss, size = (sum(share * x[i] for share, x in weights) / sum(share for share, _ in weights) for i in (0, 1))
        assert last[f"{split}_loss"] == pytest.approx(loss, rel=1e-5)
        assert last[f"{split}_bits_per_byte"] == pytest.approx(loss / size / np.log(2), rel=1e-5)
        names = {"mds": a, "b": b, "no-val": no_val}  # what the paths end with
        assert {key: value for key, value in last.items() if key.startswith(f"{split}_loss/")} == {
            f"{split}_loss/{name}": pytest.approx(of(path, split)[0], rel=1e-5) for name, path in names.items()
            if split == "train" or path != no_val}
    assert len({of(path, "val")[0] for path in three}) == 3  # the weights make a difference
    console = (tmp_path / "run" / "log.txt").read_text().splitlines()[-1]
    each = ", ".join(f"{name} {last[f'val_loss/{name}']:.4f}" for name in ("mds", "b"))
    assert console.endswith(f" val {last['val_loss']:.4f} ({last['val_bits_per_byte']:.4f} bits/byte): {each}")
