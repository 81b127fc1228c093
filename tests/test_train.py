"""Whole runs on gloo ranks: every layout computes what a plain loop computes, and no restart changes that."""

import json
import math

import numpy as np
import pytest
import torch

STEPS = 25
SMALL = ["--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=32",
         "--train.global_batch_size=8", f"--optim.decay_steps={STEPS}", "--optim.warmup_steps=4",
         "--optim.learning_rate=0.01", "--train.precision=float32", "--train.compile=false", "--log.interval=1",
         "--eval.sequences=13", "--eval.interval=0", "--checkpoint.interval=0", "--data.num_canonical_nodes=3"]


def train_run(argv: list[str]) -> list[dict]:
    """One rank of a run; the lines of its metrics.jsonl."""
    import os

    from nanogpt.config import load_config
    from nanogpt.train import start
    config = load_config(argv, int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    start(config)
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def small_run(ranks, text_dataset, tmp_path_factory):
    """Runs training on some ranks and returns the metrics. The same name is the same run folder."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "small.yaml"
    config.write_text(f"data: {{path: {text_dataset}}}")

    def run(name, world_size, *options, local_world_size=None, steps=STEPS):
        argv = [str(config), *SMALL, f"--run.dir={folder / name}", f"--train.max_steps={steps}", *options]
        return ranks(world_size, train_run, argv, local_world_size=local_world_size)[0]

    run.folder = folder
    run.config = config
    return run


MODERN = ["--model.position=rope", "--model.norm=rmsnorm", "--model.mlp=swiglu", "--model.qk_norm=true", "--model.n_kv_head=1",
          "--model.bias=false", "--model.tied=false"]


@pytest.fixture(scope="module")
def plain_loop(small_run, text_dataset):
    return run_plain_loop(small_run, text_dataset)


def plain_optimizer(parameters):
    """AdamW with nanoGPT's groups, as all the plain loops of these tests have it."""
    parameters = list(parameters)
    matrices, vectors = ([p for p in parameters if (p.dim() == 2) == two] for two in (True, False))
    return torch.optim.AdamW([dict(params=matrices), dict(params=vectors, weight_decay=0.0)], betas=(0.9, 0.95),
                             weight_decay=0.1)


def plain_step(optimizer, loss):
    """One step down the gradient of loss, clipped to 1: (the loss, the norm before)."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item(), norm.item()


def plain_parts(small_run, text_dataset, *options):
    """(config, model, loss of step i, its learning rate as a share of the peak): what a loop without FSDP, ranks,
    accumulation or our reader of shards is made of.
    """
    from nanogpt.config import load_config
    from nanogpt.model import GPT
    from nanogpt.shards import import_streaming
    from nanogpt.stream import TrainStream
    config = load_config([str(small_run.config), *SMALL, f"--train.max_steps={STEPS}", "--train.micro_batch_size=8", *options])
    stream = TrainStream(config)
    samples = import_streaming().LocalDataset(local=str(text_dataset / "train"))
    config.model.vocab_size = 257
    model = GPT(config.model)
    model.init_weights(config.run.seed)

    def loss(step):
        rows = [samples[s]["tokens"][part * 32:part * 32 + 33] for s, part in stream.sequences(step).tolist()]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        logits = model.lm_head(model.hidden(tokens[:, :-1]))[..., :257]  # without the padding of the vocabulary
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def share(step):
        return (step + 1) / 5 if step < 4 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4)))

    return config, model, loss, share


def run_plain_loop(small_run, text_dataset, *options):
    """(losses, gradient norms)"""
    _, model, loss, share = plain_parts(small_run, text_dataset, *options)
    optimizer = plain_optimizer(model.parameters())
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * share(step)
        for found, value in zip((losses, norms), plain_step(optimizer, loss(step))):
            found.append(value)
    return losses, norms


LAYOUTS = [  # ranks, ranks of a machine, micro-batch, options
    (1, 1, 8, []),
    (1, 1, 2, ["--sharding.strategy=grad", "--train.compile=true", "--log.health=full"]),
    (1, 1, 4, ["--sharding.cpu_offload=true"]),
    (2, 2, 4, ["--sharding.strategy=replicate"]),
    (2, 2, 1, ["--sharding.strategy=grad", "--sharding.activation_checkpointing=selective"]),
    (2, 1, 2, ["--sharding.strategy=hybrid"]),
    (4, 2, 1, ["--sharding.strategy=hybrid", "--sharding.activation_checkpointing=full"]),
    (4, 4, 1, ["--sharding.gradient_sync=last"]),
    (4, 4, 1, ["--sharding.strategy=replicate", "--sharding.gradient_sync=each"]),
]


@pytest.mark.parametrize("world_size, local, micro, options", LAYOUTS,
                         ids=["-".join([f"{w}ranks", f"micro{m}", *(x.split(".")[1] for x in o)]) for w, _, m, o in LAYOUTS])
def test_every_layout_is_the_plain_loop(small_run, plain_loop, request, world_size, local, micro, options):
    metrics = small_run(request.node.callspec.id, world_size, f"--train.micro_batch_size={micro}", *options,
                        local_world_size=local)
    losses, norms = plain_loop
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert [m["grad_norm"] for m in metrics] == pytest.approx(norms, rel=1e-4)
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0] - 1  # it learns
    assert all(("health/activation_rms" in m) == ("--log.health=full" in options) for m in metrics)


def test_stop_on_two_ranks_go_on_on_one_then_four(small_run, plain_loop):
    small_run("elastic", 2, "--train.micro_batch_size=2", steps=10)
    small_run("elastic", 1, "--train.micro_batch_size=8", "--sharding.strategy=replicate", steps=18)
    metrics = small_run("elastic", 4, "--train.micro_batch_size=1", "--sharding.strategy=grad")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in metrics] == pytest.approx(plain_loop[0], rel=1e-4)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(plain_loop[1], rel=1e-4)


def test_three_machines_where_the_order_has_eight_parts(small_run):
    options = ["--train.global_batch_size=12", "--data.num_canonical_nodes=8", "--train.micro_batch_size=2"]
    small_run("machines", 3, *options, local_world_size=1, steps=5)
    many = small_run("machines", 2, *options, local_world_size=1, steps=9)
    one = small_run("machine", 1, *options, steps=9)
    assert len(many) == 9
    assert [m["loss"] for m in many] == pytest.approx([m["loss"] for m in one], rel=1e-4)


def command(small_run, name, *options):
    """What a user types, on one CPU process."""
    import sys
    from pathlib import Path
    train_sh = Path(__file__).parents[1] / "launch" / "train.sh"
    return [sys.executable, str(train_sh), str(small_run.config), *SMALL, f"--run.dir={small_run.folder / name}",
            f"--train.max_steps={STEPS}", "--train.micro_batch_size=8", *options]


def test_evaluation_and_bits_per_byte(small_run, plain_loop, text_dataset):
    """val_loss is the mean over the first sequences of the split of the model that the last checkpoint holds."""
    from nanogpt.generate import load_run
    from nanogpt.shards import import_streaming
    metrics = small_run("evaluated", 2, "--train.micro_batch_size=2", "--eval.interval=10")
    assert [m["step"] for m in metrics if "val_loss" in m] == [10, 20, STEPS]
    # Evaluation leaves no trace in training: not in its mode, nor in its weights.
    assert [m["loss"] for m in metrics] == pytest.approx(plain_loop[0], rel=1e-4)
    model, tok, state = load_run(small_run.folder / "evaluated")
    assert state["step"] == STEPS and state["tokens"] == STEPS * 256
    samples = import_streaming().LocalDataset(local=str(text_dataset / "val"))
    for split in ("train", "val"):
        samples = import_streaming().LocalDataset(local=str(text_dataset / split))
        rows = np.stack([samples[i // 2]["tokens"][i % 2 * 32:i % 2 * 32 + 33] for i in range(13)]).astype(np.int64)
        tokens = torch.from_numpy(rows)
        with torch.no_grad():
            logits = model.lm_head(model.hidden(tokens[:, :-1]))[..., :257]  # without the padding of the vocabulary
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
        assert metrics[-1][f"{split}_loss"] == pytest.approx(expected, rel=1e-5)
        n_bytes = (rows[:, 1:] < 256).sum()
        assert metrics[-1][f"{split}_bits_per_byte"] == pytest.approx(expected * 13 * 32 / n_bytes / math.log(2), rel=1e-5)


def test_weights_alone_from_another_run(small_run):
    small_run("first", 2, "--train.micro_batch_size=4")
    before = json.loads((small_run.folder / "first" / "metrics.jsonl").read_text().splitlines()[-1])
    tuned = small_run("tuned", 1, "--train.micro_batch_size=8", f"--run.init_from={small_run.folder / 'first'}",
                      "--optim.learning_rate=1e-9", "--optim.min_learning_rate=0", steps=6)
    assert tuned[0]["step"] == 0 and tuned[0]["val_loss"] == pytest.approx(before["val_loss"], rel=1e-6)
    assert tuned[-1]["val_loss"] == pytest.approx(before["val_loss"], rel=1e-4)


def test_dropout_is_the_same_after_a_restart_and_another_in_each_step(small_run, plain_loop):
    options = ["--model.dropout=0.3", "--train.micro_batch_size=4"]
    whole = small_run("dropout", 2, *options, steps=8)
    small_run("dropout-parts", 2, *options, steps=5)
    parts = small_run("dropout-parts", 2, *options, steps=8)
    assert [m["loss"] for m in parts] == pytest.approx([m["loss"] for m in whole], rel=1e-6)
    assert whole[-1]["loss"] != pytest.approx(plain_loop[0][7], rel=1e-3)


def test_the_modern_block_on_two_ranks(small_run, text_dataset):
    losses, norms = run_plain_loop(small_run, text_dataset, *MODERN)
    metrics = small_run("modern", 2, *MODERN, "--train.micro_batch_size=2", "--sharding.activation_checkpointing=selective")
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-4)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(norms, rel=1e-4)
    # In bfloat16 and compiled it learns alike.
    metrics = small_run("bf16", 2, *MODERN, "--train.micro_batch_size=4", "--train.precision=bfloat16", "--train.compile=true")
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=0.03)


def test_a_gradient_that_is_not_finite_stops_the_run_by_name(small_run, text_dataset):
    import subprocess
    small_run("exploding", 1, "--train.micro_batch_size=8", steps=5)
    options = ["--optim.learning_rate=1e38", "--optim.min_learning_rate=1e38", "--log.interval=7"]
    result = subprocess.run(command(small_run, "exploding", *options), capture_output=True, text=True, timeout=400)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: step 7: loss or gradient is not finite")  # 6 spoils the weights, 7 shows it
    from nanogpt.config import load_config
    from nanogpt.stream import TrainStream
    config = load_config([str(small_run.config), *SMALL, f"--train.max_steps={STEPS}", "--train.micro_batch_size=8"])
    samples = sorted(set(TrainStream(config).sequences(6)[:, 0].tolist()))
    assert f"Its samples: {', '.join(map(str, samples))}, of {text_dataset}/train/shard.00000.mds (python" in result.stderr
    assert [p.name for p in (small_run.folder / "exploding" / "checkpoints").iterdir()] == ["step-00000005"]


def step_with_a_bad_gradient(bad_rank: int):
    """One optimizer step in which one rank's part of one gradient is NaN: (weights unchanged, norm finite)."""
    import torch.distributed as dist
    from test_checkpoint import make

    from nanogpt.train import gradient_norm
    model, optimizer = make()
    before = [p.full_tensor().clone() for p in model.parameters()]
    idx = torch.arange(16)[None]
    (model(idx, idx) / 64).backward()
    if dist.get_rank() == bad_rank:
        next(model.parameters()).grad.to_local().fill_(float("nan"))
    norm = gradient_norm(model)
    optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
    optimizer.step()
    return all(torch.equal(p.full_tensor(), b) for p, b in zip(model.parameters(), before)), norm.isfinite().item()


@pytest.mark.parametrize("bad_rank, unchanged", [(1, True), (-1, False)])
def test_the_guard_keeps_bad_gradients_from_the_weights_of_every_rank(ranks, bad_rank, unchanged):
    assert ranks(2, step_with_a_bad_gradient, bad_rank) == [(unchanged, not unchanged)] * 2


def test_wandb_offline(small_run):
    for steps in (6, 8):  # resumed: the same run
        small_run("wandb", 1, "--log.wandb=offline", "--train.micro_batch_size=8", steps=steps)
    assert "wandb is off" not in (small_run.folder / "wandb" / "log.txt").read_text()
    written = list((small_run.folder / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 2 and {path.stem for path in written} == {f"run-{(small_run.folder / 'wandb' / 'wandb_id').read_text()}"}


def test_what_is_told_of_a_config_that_changed(small_run):
    """A setting that an older version did not know was as it is by default."""
    from nanogpt.config import load_config
    from nanogpt.console import changes
    now = load_config([str(small_run.config), "--train.max_steps=9"]).model_dump()
    was = {section: dict(values) for section, values in now.items()}
    del was["model"]["mask_documents"], was["data"]["tokenizer"], was["train"]["batch_schedule"]
    was["train"]["max_steps"] = 7
    assert changes(was, now) == {"train.max_steps": (7, 9)}
    now["model"]["mask_documents"] = True
    assert changes(was, now)["model.mask_documents"] == (False, True)


@pytest.mark.parametrize("schedule, options, expected", [
    ("cosine", ["--optim.decay_steps=21"], {0: 0.01 / 5, 3: 0.04 / 5, 4: 0.01, 12.5: 0.0055, 21: 0.001, 24: 0.001}),
    ("wsd", ["--optim.decay_steps=10"], {0: 0.01 / 5, 4: 0.01, 15: 0.01, 20: 0.005, 24: 0.001}),
    ("constant", [], {0: 0.01 / 5, 3: 0.04 / 5, 4: 0.01, 24: 0.01})])
def test_learning_rate_by_hand(small_run, schedule, options, expected):
    from nanogpt.config import load_config
    from nanogpt.optim import learning_rate
    config = load_config([str(small_run.config), *SMALL, f"--train.max_steps={STEPS}", "--train.micro_batch_size=8",
                          f"--optim.schedule={schedule}", *options])
    for step, rate in expected.items():
        assert learning_rate(step, config) == pytest.approx(rate), step


def settled(gains: list[float], asked: str) -> tuple[str, str]:
    """On a rank whose matmuls in bfloat16 gain so much: (what train.precision becomes, the reason that is told)."""
    import os
    from unittest import mock

    from nanogpt import ranks
    from nanogpt.config import Config
    config = Config(train=dict(precision=asked))
    device = ranks.init_process_group(config)
    with mock.patch.object(ranks, "bfloat16_gain", lambda: gains[int(os.environ["RANK"])]):
        reason = ranks.settle_precision(config.train, device)
    torch.distributed.destroy_process_group()
    return config.train.precision, reason


def test_a_cpu_takes_the_precision_whose_matmuls_are_quicker(ranks):
    """On all ranks that of the first."""
    assert ranks(2, settled, [0.55, 4.0], "auto") == [
        ("float32", " (bfloat16 matmuls are 0.55 x as fast as float32's here)")] * 2
    assert [precision for precision, _ in ranks(2, settled, [2.1, 0.1], "auto")] == ["bfloat16"] * 2
    assert ranks(1, settled, [0.55], "bfloat16") == [("bfloat16", "")]


def test_what_bfloat16_gains_is_measured():
    from nanogpt.ranks import bfloat16_gain
    assert 0.001 < bfloat16_gain() < 100
