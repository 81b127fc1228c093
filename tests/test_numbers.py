"""A loss or gradient that is not finite never reaches the weights; a loss out of the ordinary is told, and no other."""

import contextlib
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from test_train import SMALL, STEPS, plain_optimizer, small_run  # noqa: F401

from nanogpt.errors import Stopped, UserError
from nanogpt.health import loss_spikes
from nanogpt.trackers import take_back

MICRO = "--train.micro_batch_size=2"
ONE_THREAD = mock.patch.object(os, "sched_getaffinity", lambda process: {0})  # is the quicker for so small a model


def strict(path: Path) -> list[dict]:
    """The records of metrics.jsonl, which must be JSON as everybody else reads it: without NaN and Infinity."""
    def refuse(literal):
        raise AssertionError(f"{path}: {literal} is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# ---- runs in which some steps go wrong ------------------------------------------------------------------------------

SIGTERM = "asked to stop, and nothing wrong"
NAN, INF, GRADIENT = "a loss that is NaN", "an infinite loss, a finite gradient", "a finite loss, a NaN gradient"


def spoil(out: torch.Tensor, how) -> torch.Tensor:
    """What the model gives, made bad. how: one of the above, or a factor."""
    if how == SIGTERM:
        return out
    if how == INF:
        return out + math.inf
    if how == GRADIENT:
        out = out.clone()
        out.register_hook(lambda gradient: gradient * math.nan)
        return out
    return out * (math.nan if how == NAN else how)


def disturbed(argv: list[str], bad: dict, bad_rank: int) -> str | None:
    """One rank of a run in which, on one rank, steps go wrong: {step (from 1): how}. Returns what stopped it."""
    import nanogpt.train as training
    from nanogpt import watch
    from nanogpt.config import load_config
    build, learning_rate, now = training.build, training.learning_rate, [0]

    def begins(step, config):
        now[0] = step + 1
        if bad.get(now[0]) == SIGTERM:
            watch.asked.append("SIGTERM")
        return learning_rate(step, config)

    def at_its_end(model, args, out):
        wrong = model.training and int(os.environ["RANK"]) == bad_rank and now[0] in bad
        return spoil(out, bad[now[0]]) if wrong else out

    def hooked(config, device):
        model = build(config, device)
        model.register_forward_hook(at_its_end)
        return model

    with mock.patch.object(training, "build", hooked), mock.patch.object(training, "learning_rate", begins), ONE_THREAD:
        try:
            training.start(load_config(argv, int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])))
        except (UserError, Stopped) as error:
            return str(error)


@pytest.fixture(scope="module")
def bad_run(small_run, ranks):  # noqa: F811
    """Like small_run, with steps that go wrong on the last rank: (metrics, what stopped it)."""
    def run(name, world_size, bad, *options, steps=STEPS):
        folder = small_run.folder / name
        argv = [str(small_run.config), *SMALL, MICRO, f"--run.dir={folder}", f"--train.max_steps={steps}", *options]
        said = ranks(world_size, disturbed, argv, bad, world_size - 1)
        assert len(set(said)) == 1  # all ranks decide alike
        return strict(folder / "metrics.jsonl"), said[0]
    return run


def plain(batches, skipped=()):
    """Losses of a loop without FSDP, ranks or accumulation: one batch (n, 33) a step. Those in `skipped`, from 1, are
    not applied.
    """
    from nanogpt.config import Model
    from nanogpt.model import GPT
    model = GPT(Model(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257))
    model.init_weights(1337)
    optimizer = plain_optimizer(model.parameters())
    losses = []
    for step, tokens in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * step / 5 if step <= 4 else \
                0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * min(1, (step - 5) / (25 - 4))))
        logits = model.lm_head(model.hidden(tokens[:, :-1]))[..., :257]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        if step not in skipped:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return losses


@pytest.fixture(scope="module")
def stream(small_run):  # noqa: F811
    from nanogpt.config import load_config
    from nanogpt.stream import TrainStream
    return TrainStream(load_config([str(small_run.config), *SMALL, MICRO, f"--train.max_steps={STEPS}"]))


@pytest.fixture(scope="module")
def without(stream, text_dataset):
    """Losses of the plain loop without the updates of some steps (from 1)."""
    from nanogpt.shards import import_streaming
    samples = import_streaming().LocalDataset(local=str(text_dataset / "train"))
    batches = [torch.from_numpy(np.stack([samples[s]["tokens"][part * 32:part * 32 + 33] for s, part in
                                          stream.sequences(step).tolist()]).astype(np.int64)) for step in range(STEPS)]
    return lambda *skipped: plain(batches, skipped)


def agree(metrics, losses, but=()):
    """Each step is logged once, with the loss of the plain loop; those in `but` with null."""
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    assert [m["step"] for m in metrics if m["loss"] is None] == list(but)
    assert [m["loss"] for m in metrics if m["step"] not in but] == pytest.approx(
        [x for step, x in enumerate(losses[:len(metrics)], start=1) if step not in but], rel=1e-4)


# ---- left out -------------------------------------------------------------------------------------------------------

def newest_state(small_run, name):  # noqa: F811
    from nanogpt.checkpoint import find, read_state
    return read_state(find(small_run.folder / name))


def told_skipped(metrics):
    return {m["step"]: m["skipped_steps"] for m in metrics if "skipped_steps" in m}


def test_left_out_on_all_ranks_and_counted_over_restarts(small_run, bad_run, stream, without):  # noqa: F811
    options = ["--train.max_skipped_steps=2", "--checkpoint.interval=10"]
    metrics, stopped = bad_run("counted", 2, {7: NAN}, *options, steps=10)
    assert stopped is None and told_skipped(metrics) == {7: [7]}
    agree(metrics, without(7), but=[7])
    assert [m["grad_norm"] for m in metrics].index(None) == 6
    samples = ", ".join(map(str, sorted(set(stream.sequences(6)[:, 0].tolist()))))
    log = small_run.folder / "counted" / "log.txt"
    assert f"warning: step 7: loss or gradient is not finite; left out (1 of 2 that may be). Its samples: {samples}" \
        in log.read_text()
    assert newest_state(small_run, "counted")["skipped_steps"] == [6]

    metrics, stopped = bad_run("counted", 1, {13: NAN}, *options, steps=15)  # one more may be
    assert stopped is None and told_skipped(metrics) == {7: [7], 13: [13]}
    agree(metrics, without(7, 13), but=[7, 13])
    assert "step 13: loss or gradient is not finite; left out (2 of 2 that may be)" in log.read_text()
    metrics, stopped = bad_run("counted", 2, {18: NAN}, *options)            # and that is one too many
    assert stopped.startswith("step 18: loss or gradient is not finite (loss of step 18: nan); it was not applied")
    assert stopped.endswith("leave out such steps with --train.max_skipped_steps 3")
    agree(metrics, without(7, 13), but=[7, 13])
    assert len(metrics) == 17 and newest_state(small_run, "counted")["step"] == 15

    metrics, stopped = bad_run("counted", 2, {18: NAN}, "--train.max_skipped_steps=3")
    assert stopped is None and len(metrics) == STEPS
    agree(metrics, without(7, 13, 18), but=[7, 13, 18])
    assert newest_state(small_run, "counted")["skipped_steps"] == [6, 12, 17]
    # Who allows fewer than there were allows no more.
    assert bad_run("counted", 1, {}, "--train.max_skipped_steps=0")[1] is None


@pytest.mark.parametrize("how, world_size, options", [
    (INF, 2, ["--sharding.strategy=replicate"]), (GRADIENT, 1, []), (GRADIENT, 2, ["--sharding.cpu_offload=true"]),
], ids=str)
def test_the_device_decides_at_once_and_the_host_looks_late(
        small_run, bad_run, without, how, world_size, options, request):  # noqa: F811
    options = ["--train.max_skipped_steps=3", "--log.interval=10", *options]
    metrics, stopped = bad_run(request.node.name, world_size, {7: how, 10: how, 12: how}, *options, steps=21)
    assert stopped is None
    assert [m["step"] for m in metrics] == [1, 10, 20, 21]
    assert told_skipped(metrics) == {10: [7, 10], 20: [12]}
    assert [(m["loss"] is None, m["grad_norm"] is None) for m in metrics] == [
        (False, False), (how == INF, how == GRADIENT), (False, False), (False, False)]
    losses = without(7, 10, 12)
    assert [metrics[i]["loss"] for i in (0, 2, 3)] == pytest.approx([losses[i] for i in (0, 19, 20)], rel=1e-4)
    # In state.json, for later: the losses of all steps, those that the host never looked at too.
    recent = newest_state(small_run, request.node.name)["recent_losses"]
    assert len(recent) == 21
    for step, loss in enumerate(recent, start=1):
        expected = None if how == INF and step in (7, 10, 12) else pytest.approx(losses[step - 1], rel=1e-4)
        assert loss == expected


def test_more_than_may_be_between_two_looks_stops_before_the_next_save(small_run, bad_run, without):  # noqa: F811
    bad = {12: NAN, 13: INF, 14: GRADIENT, 15: NAN}
    options = ["--log.interval=10", "--checkpoint.interval=10", "--checkpoint.async_save=false"]
    metrics, stopped = bad_run("late", 2, bad, "--train.max_skipped_steps=2", *options)
    assert stopped.startswith("step 14: loss or gradient is not finite (loss of step 20: ")
    assert [m["step"] for m in metrics] == [1, 10]
    state = newest_state(small_run, "late")
    assert (state["step"], state["skipped_steps"]) == (10, [])
    metrics, stopped = bad_run("late", 1, {}, "--log.interval=1")
    losses = without()
    assert [m["step"] for m in metrics] == [1, *range(10, 26)]
    assert [m["loss"] for m in metrics] == pytest.approx([losses[0], *losses[9:]], rel=1e-4)


def test_between_the_last_look_and_a_signal(small_run, bad_run, without):  # noqa: F811
    """A run that is asked to stop still tells of a step that was left out since its last line."""
    options = ["--train.max_skipped_steps=1", "--log.interval=10"]
    metrics, stopped = bad_run("asked", 1, {7: NAN, 8: SIGTERM}, *options)
    assert stopped == "" and [m["step"] for m in metrics] == [1, 8] and told_skipped(metrics) == {8: [7]}
    metrics, stopped = bad_run("asked", 2, {}, *options, steps=12)
    assert [m["step"] for m in metrics] == [1, 8, 9, 10, 12] and told_skipped(metrics) == {8: [7]}
    assert metrics[-1]["loss"] == pytest.approx(without(7)[11], rel=1e-4)


@pytest.mark.parametrize("bad_step", [1, 6])
def test_just_before_a_checkpoint_and_an_evaluation(small_run, bad_run, without, bad_step):  # noqa: F811
    """What is evaluated and saved after a bad step is what was there before: at the very first, the initial weights."""
    name, options = f"before-{bad_step}", ["--eval.interval=1", "--train.max_skipped_steps=1"]
    each = ["--checkpoint.interval=1", "--checkpoint.keep_last=9"]
    metrics, stopped = bad_run(name, 2, {bad_step: NAN}, *options, *each, steps=7)
    assert stopped is None and told_skipped(metrics) == {bad_step: [bad_step]}
    val = [m["val_loss"] for m in metrics]
    assert len(set(val)) == len(val) - (bad_step > 1)
    if bad_step > 1:
        assert val[bad_step - 1] == val[bad_step - 2]
    else:
        assert val[0] == pytest.approx(math.log(257), abs=0.05)  # it knows nothing yet
    for later in range(bad_step + 1, 8):
        shutil.rmtree(small_run.folder / name / "checkpoints" / f"step-{later:08d}")
    state = newest_state(small_run, name)
    assert (state["step"], state["skipped_steps"]) == (bad_step, [bad_step - 1])
    metrics, stopped = bad_run(name, 1, {}, *options, steps=11)
    assert stopped is None and len(metrics) == 11
    agree(metrics, without(bad_step), but=[bad_step])


def test_by_default_the_first_one_stops_all_ranks_with_one_line(small_run, bad_run, without):  # noqa: F811
    from nanogpt.generate import load_run
    options = ["--checkpoint.interval=6", "--checkpoint.async_save=false"]
    metrics, stopped = bad_run("stops", 2, {7: NAN}, *options)  # the same line on both: bad_run has looked
    assert stopped.startswith("step 7: ") and "\n" not in stopped and len(metrics) == 6
    assert all(p.isfinite().all() for p in load_run(small_run.folder / "stops")[0].parameters())
    metrics, stopped = bad_run("stops", 2, {}, *options)
    assert stopped is None and len(metrics) == STEPS
    agree(metrics, without())


# ---- out of the ordinary --------------------------------------------------------------------------------------------

def test_spikes_by_hand():
    draw = random.Random(0)
    flat = [3 + draw.gauss(0, 0.05) for _ in range(600)]
    assert loss_spikes(flat, 600, 128) == []
    jump = [*flat]
    jump[300] += 0.4  # 8 standard deviations
    assert loss_spikes(jump, 600, 128) == [300]
    assert loss_spikes(jump, 300, 128) == [300] and loss_spikes(jump, 299, 128) == []  # only of the last `new`
    assert loss_spikes(jump[:301], 1, 128) == [300]
    up, down = flat[:200] + [4.0] * 100, flat[:200] + [2.0] * 100
    found = loss_spikes(up, 300, 128)
    assert found[0] == 200 and found == list(range(200, 200 + len(found))) and len(found) < 10  # soon that is ordinary
    assert loss_spikes(down, 300, 128) == []
    # Those that are not finite neither count nor are spikes.
    holes = [math.nan if i % 3 == 0 else math.inf if i % 3 == 1 and i < 100 else x for i, x in enumerate(jump)]
    holes[299], holes[301] = math.inf, -math.inf
    assert 300 % 3 == 0 and loss_spikes(holes, 600, 128) == []
    holes[300] = jump[300]
    assert loss_spikes(holes, 600, 128) == [300]
    # 32 must be there before: finite ones.
    for n, expected in ((31, []), (32, [32])):
        assert loss_spikes([3.0] * n + [4.0], n + 1, 128) == expected
        assert loss_spikes([math.nan] * 9 + [3.0] * n + [4.0], n + 10, 128) == [x + 9 for x in expected]
    # Constant ones have no deviation: a rise of 0.1 is needed.
    assert loss_spikes([3.0] * 100, 100, 128) == []
    assert loss_spikes([3.0] * 100 + [3.099], 101, 128) == [] and loss_spikes([3.0] * 100 + [3.101], 101, 128) == [100]
    assert loss_spikes([], 5, 128) == loss_spikes([math.nan] * 50, 50, 128) == []


def test_spikes_are_those_of_numpy():
    """Long random curves with holes and jumps, window after window, against a plain masked mean and deviation."""
    draw = np.random.RandomState(0)
    for trial in range(10):
        losses = 3 + 3 * np.exp(-np.arange(400) / 60) + draw.normal(0, 0.1, 400)
        losses[draw.randint(0, 400, 12)] += draw.uniform(0.2, 3, 12)
        losses[draw.randint(0, 400, 20)] = draw.choice([np.nan, np.inf], 20)
        recent, interval = int(draw.randint(33, 128)), int(draw.choice([1, 7, 50]))
        expected = set()
        for i in range(400):
            before = losses[max(0, i - recent):i]
            before = before[np.isfinite(before)]
            if len(before) >= 32 and np.isfinite(losses[i]) and losses[i] - before.mean() > max(6 * before.std(), 0.1):
                expected.add(i)
        found = set()
        for done in range(interval, 401, interval):  # as train.py looks: at the last steps alone
            first = max(0, done - recent - interval)
            found |= {first + i for i in loss_spikes(losses[first:done].tolist(), interval, recent)}
        assert found == {i for i in expected if i < 400 // interval * interval} and expected


def spikes(metrics):
    return {m["step"]: m["loss_spikes"] for m in metrics if "loss_spikes" in m}


def test_a_spike_is_told_once_whenever_one_looks_and_whatever_was_restarted(small_run, bad_run):  # noqa: F811
    """And an ordinary run, with its steep fall at the beginning, has none."""
    bad, folder = {45: 4.0}, small_run.folder
    ordinary, _ = bad_run("ordinary", 1, {}, steps=60)
    assert ordinary[0]["loss"] > ordinary[-1]["loss"] + 2 and spikes(ordinary) == {}
    assert "spike" not in (folder / "ordinary" / "log.txt").read_text()
    whole, _ = bad_run("spike", 1, bad, steps=60)
    assert spikes(whole) == {45: [45]}
    assert whole[44]["loss"] == pytest.approx(4 * ordinary[44]["loss"], rel=1e-4)
    log = (folder / "spike" / "log.txt").read_text()
    assert f"spike at step 45: loss {whole[44]['loss']:.4f}; python tools/inspect_mds.py --run {folder}/spike" in log
    assert log.count("spike at") == 1
    whole, _ = bad_run("spike", 1, bad, steps=62)  # it is still among the recent losses, and has been told
    assert len(whole) == 62 and spikes(whole) == {45: [45]}

    bad_run("spike-parts", 1, bad, "--log.interval=7", steps=40)
    recent = newest_state(small_run, "spike-parts")["recent_losses"]
    assert recent == pytest.approx([m["loss"] for m in whole[:40]], rel=1e-6)
    parts, _ = bad_run("spike-parts", 1, bad, "--log.interval=7", steps=60)
    assert [m["step"] for m in parts] == [1, 7, 14, 21, 28, 35, 40, 41, 42, 49, 56, 60]
    assert spikes(parts) == {49: [45]}
    # Without the losses of before the stop there would be too few to compare with.


# ---- metrics.jsonl --------------------------------------------------------------------------------------------------

def test_plot_draws_gaps(tmp_path, capsys):
    """A loss that was not finite is null in metrics.jsonl: a gap, and nothing to warn of."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import plot
    lines = [dict(step=s, tokens=s * 256, loss=2 + 3 / s, grad_norm=1.0) for s in range(1, 101)]
    for step in (1, 40, 41, 100):
        lines[step - 1] |= dict(loss=None, grad_norm=None, skipped_steps=[step])
    lines[49] |= dict(val_loss=None, val_bits_per_byte=None)
    lines[59] |= dict(val_loss=2.1, val_bits_per_byte=3.0)
    for name, all_gaps in (("some", {}), ("all", dict(loss=None))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line | all_gaps) + "\n" for line in lines))
        records = plot.read_metrics(tmp_path / name)
        plot.draw({name: records}, tmp_path / name / "loss.png")
        assert capsys.readouterr().err == "" and len(records) == 100 and math.isnan(records[39]["loss"])
        assert (tmp_path / name / "loss.png").stat().st_size > 10_000


def taken_back(content: bytes, step: int) -> bytes:
    """The simple way: everything up to the last whole line that is not later than `step`."""
    lines, keep = content.splitlines(True), 0
    for i, line in enumerate(lines, start=1):
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                keep = i
    kept = b"".join(lines[:keep])
    return kept + b"\n" * (kept[-1:] not in (b"", b"\n"))


@pytest.mark.parametrize("width", [40, 300, 3 << 15, 1 << 16], ids=lambda w: f"lines of {w}")
def test_take_back_is_the_simple_way(tmp_path, width):
    """Files of several blocks of 64 KiB, with boundaries within lines and between them, cut at any length."""
    path, draw, block = tmp_path / "metrics.jsonl", random.Random(width), 1 << 16
    lines = [json.dumps(dict(step=s)).encode() for s in range(1, 5 * block // width + 2)]
    exact = b"".join(line[:-1] + b" " * (width - 1 - len(line)) + b"}\n" for line in lines)
    ragged = b"".join(line[:-1] + b" " * draw.randrange(width) + b"}\n" for line in lines)
    for content in (exact, ragged):
        assert len(content) > 2 * block
        for step in (0, 1, 2, len(lines) // 2, len(lines) - 1, len(lines), len(lines) + 9):
            for cut in (0, 2, width // 2, block + 1):
                path.write_bytes(content[:len(content) - cut])
                take_back(path, step)
                assert path.read_bytes() == taken_back(content[:len(content) - cut], step), (step, cut)


def test_take_back_of_what_a_crash_leaves(tmp_path):
    path, one, two = tmp_path / "metrics.jsonl", b'{"step": 1, "loss": null}\n', b'{"step": 2, "loss": 2.5}\n'
    take_back(path, 5)
    assert not path.exists()
    for content, step, expected in [
            (b"", 5, b""), (b"\n", 5, b""), (b'{"st', 5, b""), (one + two, 0, b""), (one + two, 1, one),
            (one + two, 2, one + two), (one + two[:-5], 2, one), (one + two[:9], 2, one),
            (one + two[:-1], 2, one + two),                   # only the end of the line is missing: it is put there
            (one + two[:-1], 1, one), (one[:-1], 1, one),
            (one + b"[]\n3\nnull\n{}\n" + two, 2, one + b"[]\n3\nnull\n{}\n" + two), (one + b"[]\n3\n{}\n", 2, one),
            (one + b"cut" + b'{"step": 2' + b" " * 65524 + b"}\n", 2, one),  # the part in the last 64 KiB looks whole
            (one + b'{"step": null}\n{"step": 1e999}\n' + b"[" * 99999 + b"\n\xff\0\n", 2, one)]:
        path.write_bytes(content)
        take_back(path, step)
        assert path.read_bytes() == expected, (content[:200], step)
