"""tools/bench.py: figures held against counts by hand; no test looks at how fast anything was."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from nanogpt.errors import UserError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import bench  # noqa: E402

TRAINER = """
import sys, time
for i in range(int(sys.argv[1])):
    time.sleep(0.001)
    print(f"iter {i}: loss {4 - i / 10:.4f}, time {1000 if i < 2 else 10 + i:.2f}ms, mfu 1.00%", flush=True)
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(
        "data: {path: data/chars}\nmodel: {n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, bias: false}\n"
        "train: {max_steps: 10, global_batch_size: 4, micro_batch_size: 2, compile: false}\n"
        "sharding: {activation_checkpointing: full}\noptim: {warmup_steps: 7}\nlog: {interval: 2}\n")
    (tmp_path / "trainer.py").write_text(TRAINER)
    return "tiny.yaml"


def command(monkeypatch, *argv):
    """bench.py with these options, in this process: the runs that it measures are processes of their own all the same."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, argv)])
    bench.main()


def test_the_figures_of_a_run(config, monkeypatch, capsys):
    command(monkeypatch, config, "--steps", 4, "--warmup", 2, "--ranks", 1, "--peak-tflops", 0.5, "--json", "out.json",
            "--profile", 2)
    found = json.loads(Path("out.json").read_text())
    rows, width, layers, block = 128, 32, 2, 16  # 66 characters in rows of 64
    matrices = layers * 12 * width * width
    parameters = rows * width + block * width + matrices + (2 * layers + 1) * width
    memory, states = found["memory_mib"], parameters * 4 / 2**20
    assert memory["weights"] == memory["gradients"] == pytest.approx(states)
    # Two moments, and a float of its own for each tensor's count of steps.
    tensors = 2 + 6 * layers + 1
    assert memory["optimizer"] == pytest.approx(2 * states + tensors * 4 / 2**20, rel=1e-6)
    assert found["checkpoint"]["bytes"] / 2**20 == pytest.approx(memory["weights"] + memory["optimizer"])
    assert found["tokens_per_step"] == 64 and found["steps"] == 4 and found["ranks"] == 1
    assert found["tokens_per_s"] == pytest.approx(64e3 / found["step_ms"])
    flops = 6 * (parameters - block * width) + 12 * layers * width * block
    again = 2 * (matrices + 2 * layers * width) + 4 * layers * width * block  # activation checkpointing: all blocks again
    assert found["mfu"] == pytest.approx(found["tokens_per_s"] * flops / 0.5e12)
    assert found["hfu"] == pytest.approx(found["mfu"] * (flops + again) / flops)
    assert found["parts_ms"].keys() == {"forward", "backward", "gradient norm", "optimizer", "the rest"}
    assert all(ms > 0 for ms in found["parts_ms"].values())
    assert found["startup_s"].keys() == {"import", "process group", "data", "model", "first step", "all"}
    assert found["startup_s"]["all"] > sum(found["startup_s"].values()) / 2
    assert {"sync_stall_s", "async_stall_s"} <= found["checkpoint"].keys()
    said = capsys.readouterr().out
    assert "data/chars is not there: random tokens of 66 ids" in said and f"MFU {found['mfu']:.1%}, HFU" in said

    # The trace: 2 warm-up steps, 4 timed, 5 with clocks, one for the profiler to warm up, and then the 2.
    assert sorted(p.name for p in Path("profile").iterdir()) == ["steps-13-14.json.gz", "steps-13-14.txt"]
    events = json.loads(gzip.open("profile/steps-13-14.json.gz").read())["traceEvents"]
    names = [e.get("name", "") for e in events]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert sum(name == "Optimizer.step#AdamW.step" for name in names) == 2
    text = Path("profile/steps-13-14.txt").read_text()
    assert text.startswith("step 13: ") and "\nstep 14: " in text and "aten::mm" in text


def test_beside_another_trainer(config, monkeypatch, capsys):
    command(monkeypatch, config, "--steps", 2, "--warmup", 2, "--ranks", 1, "--repeats", 1, "--json", "out.json",
            "--vs", f"{sys.executable} trainer.py 7", "--vs-tokens-per-iter", 600, "--vs-skip", 2)
    found = json.loads(Path("out.json").read_text())
    assert found["theirs"] == [pytest.approx(600 / 0.014)]  # the median of 12, 13, 14, 15, 16 ms
    assert len(found["ours"]) == 1 and found["ratio"] == pytest.approx(found["ours"][0] * 0.014 / 600)
    assert f"ratio {found['ratio']:.2f} (" in capsys.readouterr().out


def measured(speed):
    """What Bench.measure returns of a run with so many tokens a second."""
    return dict(step_s=[1.0], tokens_per_step=speed, flops_per_token=1, recomputed=0, peak_flops=None, world_size=1,
                device="CPU", data_s=0.0, memory=dict(peak=2**20), startup={}, trace=[])


def test_turns_are_taken_and_each_pair_has_its_ratio(monkeypatch, capsys):
    order, speeds = [], iter([100, 300, 200])

    def measure():
        order.append("ours")
        return measured(next(speeds))

    monkeypatch.setattr(bench, "other", lambda *_: order.append("theirs") or 50.0 * len(order))
    found = bench.versus(SimpleNamespace(measure=measure),
                         SimpleNamespace(vs="", vs_regex="", vs_unit="ms", vs_tokens_per_iter=1, vs_skip=0, repeats=3))
    assert order == ["ours", "theirs"] * 3
    assert found["theirs"] == [100, 200, 300] and found["ratios"] == pytest.approx([1, 1.5, 2 / 3]) and found["ratio"] == 1
    assert "ratio 1.00 (0.67 to 1.50, 3 turns)" in capsys.readouterr().out


@pytest.mark.parametrize("text, pattern, unit, expected", [
    ("iter 1: loss 3.0, time 20.00ms, mfu\niter 2: loss nan, time 40.00ms\n", bench.NANOGPT, "ms", [500, 250]),
    ("step 3 0.5 s/it\nstep 4 2 s/it", r"([\d.]+) s/it", "s", [20, 5]),
    ("a 12.5k tok/s\nb 1,250 tok/s\nc 3M tok/s", r"(\S+) tok/s", "tokens/s", [12500, 1250, 3e6])])
def test_what_another_trainer_says(text, pattern, unit, expected):
    assert bench.other_speeds(text, pattern, unit, 10, 0) == pytest.approx(expected)
    assert bench.other_speeds(text, pattern, unit, 10, 1) == pytest.approx(expected[1:])


@pytest.mark.parametrize("command_line, said", [
    ("echo fine; echo out of luck >&2; exit 3", "--vs: the command ended with status 3: out of luck"),
    ("echo 'iter 0: loss 1.0, time 5.00ms'", "--vs: no line of its output, but for the first 1"),
    ("no-such-program", "status 127")])
def test_another_trainer_that_fails_is_told_in_a_line(command_line, said):
    with pytest.raises(UserError) as error:
        bench.other(command_line, bench.NANOGPT, "ms", 10, 1)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_another_trainer_runs_in_the_environment_of_its_user():
    """Ours sets GOMP_SPINCOUNT when it is imported."""
    code = "import sys; sys.path.insert(0, 'tools'); import bench, os; assert os.environ['GOMP_SPINCOUNT'] == '3000'; " \
           "print(bench.other('echo iter 1: loss 1, time ${GOMP_SPINCOUNT:-7}ms', bench.NANOGPT, 'ms', 7, 0))"
    for given, speed in (({}, "1000.0"), ({"GOMP_SPINCOUNT": "3000"}, "2.3333333333333335")):
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | given
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == speed, done.stderr


@pytest.mark.parametrize("argv, said", [
    (["--vs", "true"], "--vs-tokens-per-iter: how many"),
    (["--vs", "true", "--vs-unit", "tokens/s", "--vs-regex", "x"], "no group"),
    (["--vs", "true", "--vs-unit", "tokens/s", "--vs-regex", "("], "no regular expression"),
    (["--steps", "0"], "--steps: 0 is below 1"),
    (["--ladder", "--vs", "true", "--vs-tokens-per-iter", "1"], "one at a time"),
    (["--peak-tflops", "-1"], "not above 0"), (["--ranks", "3"], "is not a multiple of 3 ranks"),
    (["--ranks", "1", "--train.nonsense", "1"], "no such setting"), (["--stps", "1"], "unrecognized arguments")])
def test_what_is_wrong_is_told_before_anything_runs(config, monkeypatch, argv, said):
    with pytest.raises(UserError, match=said):
        command(monkeypatch, config, *argv)


def test_settings_and_options_are_told_apart():
    argv = ["a.yaml", "--steps", "5", "--train.compile", "false", "--ladder", "--run.seed=3", "--x.y"]
    assert bench.settings_apart(argv) == (
        ["a.yaml", "--steps", "5", "--ladder"], ["--train.compile", "false", "--run.seed=3", "--x.y"])


def test_percentile():
    assert bench.percentile(list(range(1, 101)), 0.95) == 95
    assert bench.percentile([3.0, 1.0, 2.0], 0.95) == 3.0 and bench.percentile([7.0], 0.95) == 7.0


def test_the_ladder_switches_one_thing_at_a_time(config, monkeypatch, capsys):
    from nanogpt.config import load_config
    loaded = load_config([config, "--train.compile=true", "--train.precision=bfloat16", "--optim.warmup_steps=0"])
    steps = bench.rungs(loaded)
    for (_, was, without, _), (_, now, less, _) in zip(steps, steps[1:]):
        assert less <= without and len(without - less) + sum(was[key] != now[key] for key in was) == 1
    assert steps[0][1:3] == ({"train.precision": "float32", "train.compile": "false"}, set(bench.WITHOUT))
    assert steps[-1][1] == {"train.precision": "bfloat16", "train.compile": "true"} and all(stays for *_, stays in steps)

    # What the config does not have is measured, and nothing after it has it.
    other = bench.rungs(load_config([config, "--train.precision=float32", "--optim.warmup_steps=0"]))
    assert [step[1]["train.precision"] for step in other] == ["float32", "bfloat16", "float32", "float32", "float32"]
    assert [step[1]["train.compile"] for step in other] == ["false"] * 4 + ["true"]
    assert [step[3] for step in other] == [True, False, True, True, False]

    speeds = iter([10, 20, 25, 50, 100, 12, 24, 30, 60, 120])
    rows = bench.ladder(SimpleNamespace(config=loaded, measure=lambda *_: measured(next(speeds))), 2)
    assert [row["tokens_per_s"] for row in rows] == [11, 22, 27.5, 55, 110]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 7 and table[-1].endswith("| 110 | 2.00 | 10.00 | 1 |")
    assert table[4].endswith("| 28 | 1.25 | 2.50 | 1 |")
    speeds = iter([10, 5, 20, 40, 30])
    monkeypatch.setattr(bench, "rungs", lambda _: other)
    assert [row["before"] for row in bench.ladder(SimpleNamespace(config=None, measure=lambda *_: measured(next(speeds))), 1)] == [
        1, 0.5, 2, 2, 0.75]
    assert "bfloat16 (left out from here on) | 5 |" in capsys.readouterr().out


def test_what_is_taken_away_on_the_lower_rungs(monkeypatch):
    from nanogpt import loss
    from nanogpt.config import Optim
    from nanogpt.optim import make_optimizer
    from nanogpt.stream import TrainStream
    for name in ("__init__", "step"):
        monkeypatch.setattr(torch.optim.AdamW, name, getattr(torch.optim.AdamW, name))
    monkeypatch.setattr(loss, "CHUNK_LOGITS", loss.CHUNK_LOGITS)
    monkeypatch.setattr(TrainStream, "batches", TrainStream.batches)
    for take_away in bench.WITHOUT.values():
        take_away()
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model, Optim())
    optimizer.found_inf = torch.zeros(())  # as the loop does
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert optimizer.defaults["fused"] is optimizer.defaults["foreach"] is False
    calls = []
    monkeypatch.setattr(loss._ChunkedCrossEntropy, "apply", lambda *_: calls.append(1))
    loss.cross_entropy_sum(torch.ones(2000, 1), torch.ones(1 << 16, 1), torch.zeros(2000, dtype=torch.int64), 1 << 16)
    assert not calls
    source = SimpleNamespace(micro_batches=lambda step, rank, world: [(step, 0), (step, 1)], read=lambda m: m)
    assert list(TrainStream.batches(source, 3, 5, 0, 1, None)) == [(3, 0), (3, 1), (4, 0), (4, 1)]


def event(name, start, end, device=DeviceType.CPU):
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))


def test_waits_and_communication_of_a_trace_by_hand():
    from nanogpt.profiler import in_words, summary
    gpu = DeviceType.CUDA
    events = [event("ProfilerStep*", 0, 100), event("ProfilerStep*", 100, 200), event("ProfilerStep*", 0, 90, gpu),
              event("cudaStreamSynchronize", 10, 20), event("aten::item", 150, 160),
              event("cudaDeviceSynchronize", 210, 220), event("nccl:all_gather", 0, 5),
              event("gemm", 0, 50, gpu), event("gemm", 40, 60, gpu), event("ncclDevKernel_AllGather", 50, 80, gpu),
              event("ncclDevKernel_ReduceScatter", 70, 130, gpu), event("gemm", 120, 200, gpu)]
    first, second = summary(events)
    assert first["waits"] == {"cudaStreamSynchronize": 1} and second["waits"] == {"aten::item": 1}
    assert first["communication_s"] == pytest.approx(50e-6) and first["exposed_s"] == pytest.approx(40e-6)
    assert second["communication_s"] == pytest.approx(30e-6) and second["exposed_s"] == pytest.approx(20e-6)
    assert "step 7: 0.10 ms on the host; communication 0.05 ms, 0.04 ms of them alone" in in_words([first, second], 7, True)
    ours = [event("ProfilerStep*", 0, 100), event("gloo:all_gather", 10, 50), event("aten::mm", 20, 60), event("FSDP::x", 0, 99)]
    of_cpu, = summary(ours)
    assert of_cpu["communication_s"] == pytest.approx(40e-6) and of_cpu["exposed_s"] == pytest.approx(10e-6)


# ---- goodput --------------------------------------------------------------------------------------------------------

def train_run(argv):
    """The lines of metrics.jsonl, on one rank."""
    from nanogpt.config import load_config
    from nanogpt.train import start
    config = load_config(argv)
    start(config)
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_goodput_over_a_kill_and_a_restart(ranks, text_dataset, tmp_path):
    """Steps count once, whatever was done again; the first after each start not at all; time with no run is lost."""
    import shutil
    (tmp_path / "good.yaml").write_text(
        f"data: {{path: {text_dataset}}}\nmodel: {{n_layer: 1, n_head: 1, n_embd: 16, block_size: 64}}\n"
        f"train: {{global_batch_size: 4, micro_batch_size: 4, compile: false}}\nrun: {{dir: {tmp_path / 'run'}}}\n"
        "checkpoint: {interval: 4, keep_last: 9, async_save: false}\neval: {sequences: 4}\nlog: {interval: 2}")
    argv = [str(tmp_path / "good.yaml"), "--train.max_steps"]
    first = ranks(1, train_run, [*argv, "8"])[0]
    began = float((tmp_path / "run" / ".started").read_text())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")  # as if it had been killed before: 5 to 8 come again
    time.sleep(0.3)
    second = ranks(1, train_run, [*argv, "10", "--log.profile=[6, 7]"])[0]
    assert [r["step"] for r in second] == [1, 2, 4, 5, 6, 8, 10]
    assert second[:3] == first[:3]
    assert float((tmp_path / "run" / ".started").read_text()) == began
    trained, before = 0.0, 0
    for record in second:
        trained += record["step_time_s"] * (record["step"] - before) * (record["step"] not in (1, 5))
        assert record["goodput"] == pytest.approx(trained / (record["time"] - began)), record["step"]
        before = record["step"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000010" / "state.json").read_text())
    assert state["clock"] == {"began": began, "trained_s": pytest.approx(trained)}
    assert (tmp_path / "run" / "profile" / "steps-6-7.json.gz").exists()

    from nanogpt.checkpoint import State
    del state["clock"]  # a checkpoint of an earlier version
    assert State.model_validate(state).clock.model_dump() == dict(began=None, trained_s=0.0)


def test_when_a_run_first_started(tmp_path):
    from nanogpt.meter import first_start
    now = first_start(tmp_path)
    assert now == first_start(tmp_path) == pytest.approx(time.time(), abs=60)
    for text, good in (("12.5\n", True), ("", False), ("nan", False), ("1e99", False), ("x", False), ("-3", False)):
        (tmp_path / ".started").write_text(text)
        assert (first_start(tmp_path) == 12.5) == good and 0 < first_start(tmp_path) < time.time() + 60


@pytest.mark.parametrize("value, said", [
    ("[5, 4]", "comes after its last"), ("[0, 4]", "greater than 0"), ("7", "list"), ("[1]", "at least 2")])
def test_log_profile_that_is_wrong(config, value, said):
    from nanogpt.config import load_config
    with pytest.raises(UserError, match=f"--log.profile.*{said}"):
        load_config([config, f"--log.profile={value}"])
    assert load_config([config, "--log.profile", "[4, 4]"]).log.profile == [4, 4]
