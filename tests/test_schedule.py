"""A batch and a block that grow with the step: the position is the sum of the batches, and the losses are a plain loop's."""

import math
import subprocess
import time

import numpy as np
import pytest
import torch
from test_launch import ENV, ROOT, TORCHRUN
from test_stream import convert, make_config, mixed, three  # noqa: F401
from test_train import SMALL, STEPS, plain_optimizer, plain_step, train_run

from nanogpt import checkpoint
from nanogpt.config import load_config
from nanogpt.errors import UserError
from nanogpt.stream import Split, TrainStream

LINEAR = "{kind: linear, points: [[0, 4], [6, 12], [10, 24]]}"
STEPPED = "{kind: stepped, points: [[0, 4], [3, 8], [7, 24]]}"
SIZES = {  # by hand; the last one goes on
    LINEAR: [4, 4, 4, 8, 8, 8, 12, 12, 16, 20, 24],  # 4 + 4/3 s, then 12 + 3 s, rounded down to multiples of 4
    STEPPED: [4, 4, 4, 8, 8, 8, 8, 24],
}


def sizes_of(schedule, n) -> list[int]:
    return (SIZES[schedule] + [24] * n)[:n]


def scheduled(tmp_path, schedule, *options):
    (tmp_path / "c.yaml").write_text("data: {path: d}\nmodel: {block_size: 16}\ntrain: {max_steps: 9, micro_batch_size: 2, "
                                     f"global_batch_size: 24, batch_schedule: {schedule}}}")
    return load_config([str(tmp_path / "c.yaml"), *options], 1)


@pytest.mark.parametrize("schedule", SIZES, ids=["linear", "stepped"])
def test_sizes_sums_and_their_inverse(tmp_path, schedule):
    train = scheduled(tmp_path, schedule).train
    sizes = sizes_of(schedule, 40)
    assert [train.batch(step) for step in range(40)] == sizes
    sums = [sum(sizes[:n]) for n in range(41)]
    assert [train.sequences(n) for n in range(41)] == sums
    assert train.sequences(10**6) == sums[20] + (10**6 - 20) * 24
    assert [train.steps(n) for n in range(sums[40])] == [next(s for s in range(41) if sums[s] >= n) for n in range(sums[40])]
    assert train.uneven(4) is None and train.uneven(8)[1:] == ("4, from step 0 on,", "8")
    assert train.uneven(5)[1:] == ("4, from step 0 on,", "5")
    for tokens in (1, sums[5] * 16 - 1, sums[5] * 16, sums[5] * 16 + 1, sums[30] * 16 + 1):  # in the ramp, and after it
        config = scheduled(tmp_path, schedule, f"--train.max_tokens={tokens}", "--train.max_steps=null")
        assert sums[config.max_steps - 1] * 16 < tokens <= sums[config.max_steps] * 16
        config._before = 2, 7000  # the data changed after step 2, and there were steps of other sizes before
        assert config.max_steps == max(0, next(n for n in range(40) if sums[n] - sums[2] >= (tokens - 7000) / 16))
    assert scheduled(tmp_path, schedule).accumulation(2, 0) == 1 and scheduled(tmp_path, schedule).accumulation(2) == 6


@pytest.mark.parametrize("schedule", SIZES, ids=["linear", "stepped"])
def test_steps_take_the_order_piece_by_piece_on_any_ranks(tmp_path, text_dataset, schedule):
    options = ["--train.global_batch_size=24", f"--train.batch_schedule={schedule}"]
    n, ends = 60, np.cumsum([0, *sizes_of(schedule, 60)])
    plain = Split(make_config(tmp_path, text_dataset, "--data.num_canonical_nodes=1"), "train", str(text_dataset))
    epochs = np.concatenate([plain.order(epoch) for epoch in range(ends[-1] // plain.samples + 1)])
    assert ends[-1] > plain.samples  # beyond an epoch
    for world_size in (1, 2, 4):
        for micro in (1, 2):
            if (world_size, micro) == (4, 2):  # the first steps have 4 sequences
                continue
            stream = TrainStream(make_config(tmp_path, text_dataset, *options, "--data.num_canonical_nodes=1",
                                             f"--train.micro_batch_size={micro}"))
            seen = [sample for step in range(n) for rank in range(world_size)
                    for batch in stream.micro_batches(step, rank, world_size) for sample in batch[:, 0]]
            assert seen == epochs[:ends[-1]].tolist()
    late = TrainStream(make_config(tmp_path, text_dataset, *options, "--data.num_canonical_nodes=1"), first_step=5)
    assert late.epochs(20) == [(ends[20] - ends[5]) / plain.samples]  # of the data since it changed
    assert late.samples(5).tolist() == epochs[:sizes_of(schedule, 6)[5]].tolist()
    assert late.samples(20).tolist() == epochs[ends[20] - ends[5]:ends[21] - ends[5]].tolist()


def test_steps_of_a_mixture_with_a_schedule(tmp_path, three):  # noqa: F811
    """As many samples of each dataset, and the same, as the pattern deals to one of these steps after the other."""
    whole = mixed(tmp_path, three, "--train.global_batch_size=2")
    stream = mixed(tmp_path, three, f"--train.batch_schedule={LINEAR}")
    ends = np.cumsum([0, *sizes_of(LINEAR, 40)])
    dealt = np.concatenate([whole.samples(step) for step in range(ends[-1] // 2)])
    for step in range(40):
        assert sorted(stream.samples(step)) == sorted(dealt[ends[step]:ends[step + 1]])
    assert stream.epochs(40) == pytest.approx([ends[-1] * share / split.samples for share, split in
                                               zip((0.6, 0.3, 0.1), stream.splits)])


# ---- a run ----------------------------------------------------------------------------------------------------------

GROWING = ["--train.batch_schedule={kind: linear, points: [[0, 4], [9, 8], [15, 20]]}", "--train.global_batch_size=20",
           "--train.block_schedule=[[0, 8], [5, 16], [12, 32]]", "--checkpoint.interval=3"]
BATCHES = [4] * 9 + [8, 8, 12, 12, 16, 16] + [20] * 10  # 8 + 2 s, rounded down to multiples of 4
BLOCKS = [8] * 5 + [16] * 7 + [32] * 13


def plain_loop(dataset, tmp_path):
    """Losses of a loop that cuts the endless order of samples by hand: half a sample of 64 is a sequence."""
    from nanogpt.model import GPT
    from nanogpt.shards import import_streaming
    (tmp_path / "plain.yaml").write_text(f"data: {{path: {dataset}}}")
    config = load_config([str(tmp_path / "plain.yaml"), *SMALL, f"--train.max_steps={STEPS}", "--train.micro_batch_size=4"])
    split = Split(config, "train", str(dataset))
    order = np.concatenate([split.order(epoch) for epoch in range(2)])
    samples = import_streaming().LocalDataset(local=str(dataset / "train"))
    config.model.vocab_size = 257
    model = GPT(config.model)
    model.init_weights(config.run.seed)
    optimizer, losses, first = plain_optimizer(model.parameters()), [], 0
    for step in range(STEPS):
        lr = 0.01 * (step + 1) / 5 if step < 4 else 0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = np.stack([samples[i]["tokens"] for i in order[first:first + BATCHES[step] // 2]]).astype(np.int64)
        first += len(rows)
        x, y = (torch.from_numpy(tokens.reshape(-1, BLOCKS[step])) for tokens in (rows[:, :-1].copy(), rows[:, 1:].copy()))
        logits = model.lm_head(model.hidden(x))[..., :257]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        losses.append(plain_step(optimizer, loss)[0])
    return losses


def test_killed_within_the_ramp_and_resumed_on_fewer_ranks(tmp_path, text_dataset, ranks):
    """Two ranks by torchrun, killed; then one: each step once, with the losses of a plain loop, and tokens that add up."""
    (tmp_path / "c.yaml").write_text(f"data: {{path: {text_dataset}}}")
    argv = [str(tmp_path / "c.yaml"), *SMALL, *GROWING, "--train.micro_batch_size=2", f"--run.dir={tmp_path / 'run'}"]
    env = ENV | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen([*TORCHRUN, str(ROOT / "launch" / "train.sh"), *argv, "--train.max_steps=13"], env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    losses = plain_loop(text_dataset, tmp_path)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not (
            metrics.exists() and metrics.read_text().count("\n") >= 7):
        time.sleep(0.005)
    process.kill()  # its ranks end with it
    process.wait()
    assert 7 <= metrics.read_text().count("\n") <= 13
    lines = ranks(1, train_run, [*argv, "--train.max_tokens=8577"])[0]
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "resuming" in said and "2 -> 1 ranks" in said and "batch_schedule: linear [[0, 4], [9, 8], [15, 20]]" in said
    assert [m["step"] for m in lines] == list(range(1, 25))  # after 23 steps there are 8576 tokens
    assert [m["tokens"] for m in lines] == (np.cumsum(BATCHES) * 32).tolist()[:24]
    assert [m["loss"] for m in lines] == pytest.approx(losses[:24], rel=1e-4)
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert (state["step"], state["tokens"]) == (24, 9216)
    assert state["data_history"][0]["identity"]["train.batch_schedule"] == "linear [[0, 4], [9, 8], [15, 20]]"


def test_what_a_schedule_may_not_be(tmp_path, text_dataset):
    def refused(said, *options, ranks=1):
        with pytest.raises(UserError, match=said) as error:
            TrainStream(load_config([str(tmp_path / "c.yaml"), *options], ranks))
        assert "\n" not in str(error.value)

    make_config(tmp_path, text_dataset)
    refused("^--train.batch_schedule: 4, from step 0 on, is not a multiple of 2 ranks x micro_batch_size 3 = 6; take 6$",
            "--train.batch_schedule={kind: stepped, points: [[0, 4], [9, 12]]}",
            "--train.micro_batch_size=3", ranks=2)
    refused("^--train.batch_schedule: 10, from step 4 on, is not a multiple of .* = 4; take 8 or 12$",
            "--train.micro_batch_size=4", "--train.batch_schedule={kind: stepped, points: [[0, 8], [4, 10], [8, 12]]}")
    refused("^--train.batch_schedule: ends with 10, and train.global_batch_size is 12; make these the same$",
            "--train.batch_schedule={kind: stepped, points: [[0, 4], [9, 10]]}")
    refused("batch_schedule: size 10 of its points is not a multiple of the first, 4$",
            "--train.batch_schedule={kind: linear, points: [[0, 4], [9, 10]]}")
    for points in ("[[1, 12]]", "[[0, 4], [0, 12]]", "[[0, 4], [5, 8], [4, 12]]"):
        refused("^--train.batch_schedule.points: its points are .* their steps must begin with 0 and rise",
                f"--train.batch_schedule={{kind: stepped, points: {points}}}")
    refused("^--train.batch_schedule.points: its points are .* sizes must be above 0 and not fall",
            "--train.batch_schedule={kind: stepped, points: [[0, 24], [5, 12]]}")
    refused("--train.batch_schedule: not valid YAML", "--train.batch_schedule={kind: stepped")
    refused("^train.batch_schedule: 6, from step 2 on, sequences of 16 tokens do not fill whole samples of 64; take 4 or 8$",
            "--model.block_size=16",
            "--train.batch_schedule={kind: stepped, points: [[0, 4], [2, 6], [4, 12]]}")
    refused("^--train.block_schedule: ends with 32, and model.block_size is 64; make these the same$",
            "--train.block_schedule=[[0, 16], [5, 32]]")
    refused("each of its blocks must divide the next, and 24 does not divide 64",
            "--train.block_schedule=[[0, 24], [5, 64]]")


def test_no_block_schedule_for_pairs(tmp_path):
    convert([("ask", "answer")] * 90, tmp_path / "pairs")
    with pytest.raises(UserError, match=f"^train.block_schedule: would cut the pairs of {tmp_path}/pairs; leave it out$"):
        TrainStream(make_config(tmp_path, tmp_path / "pairs", "--train.global_batch_size=2",
                                "--train.block_schedule=[[0, 16], [5, 64]]"))
