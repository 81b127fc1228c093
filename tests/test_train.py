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


@pytest.fixture(scope="module")
def plain_loop(small_run, text_dataset):
    """(losses, gradient norms) of a loop without FSDP, ranks, accumulation or our reader of shards."""
    from nanogpt.config import load_config
    from nanogpt.model import GPT
    from nanogpt.shards import import_streaming
    from nanogpt.stream import TrainStream
    config = load_config([str(small_run.config), *SMALL, f"--train.max_steps={STEPS}", "--train.micro_batch_size=8"])
    stream = TrainStream(config)
    samples = import_streaming().LocalDataset(local=str(text_dataset / "train"))
    config.model.vocab_size = 257
    model = GPT(config.model)
    model.init_weights(config.run.seed)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() == 2) == two] for two in (True, False))
    optimizer = torch.optim.AdamW([dict(params=matrices), dict(params=vectors, weight_decay=0.0)], betas=(0.9, 0.95),
                                  weight_decay=0.1)
    losses, norms = [], []
    for step in range(STEPS):
        lr = 0.01 * (step + 1) / 5 if step < 4 else \
            0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = [samples[s]["tokens"][part * 32:part * 32 + 33] for s, part in stream.sequences(step).tolist()]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        logits = model.lm_head(model.hidden(tokens[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


LAYOUTS = [  # ranks, ranks of a machine, micro-batch, options
    (1, 1, 8, []),
    (1, 1, 2, ["--sharding.strategy=grad", "--train.compile=true"]),
    (1, 1, 4, ["--sharding.cpu_offload=true"]),
    (2, 2, 4, ["--sharding.strategy=replicate"]),
    (2, 2, 1, ["--sharding.strategy=grad", "--sharding.activation_checkpointing=selective"]),
    (2, 1, 2, ["--sharding.strategy=hybrid"]),
    (4, 2, 1, ["--sharding.strategy=hybrid", "--sharding.activation_checkpointing=full"]),
    (4, 4, 2, []),
    (4, 4, 1, ["--sharding.strategy=replicate"]),
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


def test_stop_on_two_ranks_go_on_on_one_then_four(small_run, plain_loop):
    small_run("elastic", 2, "--train.micro_batch_size=2", steps=10)
    small_run("elastic", 1, "--train.micro_batch_size=8", "--sharding.strategy=replicate", steps=18)
    metrics = small_run("elastic", 4, "--train.micro_batch_size=1", "--sharding.strategy=grad")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in metrics] == pytest.approx(plain_loop[0], rel=1e-4)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(plain_loop[1], rel=1e-4)
