"""What happens to a run, through the real commands: SIGKILL at every stage of a save, a full disk, damaged checkpoints,
a second run in the folder, preemption, a rank that dies, a rank that hangs. The README's table of faults rests on these.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked, run_forked
from test_bad_input import OWN_MOUNTS, may_mount
from test_launch import ENV, ROOT, TORCHRUN
from test_train import SMALL, STEPS, plain_loop, small_run, train_run  # noqa: F401

from nanogpt import checkpoint
from nanogpt.errors import UserError

WITHIN = ["bash", "launch/train.sh", "--nproc_per_node=2"]

# ---- SIGKILL at every stage of a save -------------------------------------------------------------------------------

SAVES = """
import json, os, shutil, signal, sys
sys.path[:0] = ["tests", "."]
import gc
import torch, torch._dynamo, xxhash
import torch.distributed as dist, torch.distributed.checkpoint, torch.distributed.fsdp
from test_checkpoint import make
from nanogpt import checkpoint
import nanogpt.sharding, nanogpt.optim
gc.freeze()
folder, asynchronous = sys.argv[1], sys.argv[2] == "async"
os.environ.update(WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
os.environ.pop("RANK", None)

def save_and_die(at):
    "Saves step 10 if at is 0, else step 20 up to the at-th time that anything below the folder is touched."
    model, optimizer = make()
    saver = checkpoint.Saver(checkpoint.Path(folder), 1, 0, asynchronous)
    if not at:
        return saver.save(model, optimizer, dict(step=10)), saver.wait()
    open(folder + "/.step-00000015.partial", "w").close()  # what is left of an older kill does not matter
    touched = 0
    def hook(event, args):
        nonlocal touched
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree") and \\
                folder in str(args[0]):
            touched += 1
            if touched == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    saver.save(model, optimizer, dict(step=20)); saver.wait()

def status_of(at):
    child = os.fork()
    if not child:
        try:
            save_and_die(at)
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(0)
    return os.waitpid(child, 0)[1]

at = 1
assert status_of(0) == 0
os.rename(folder, folder + ".10")
while True:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder + ".10", folder)
    status = status_of(at)
    print(json.dumps([at, status, sorted(os.listdir(folder))]), flush=True)
    newest = checkpoint.find(os.path.dirname(folder))
    checkpoint.verify(newest)
    print(json.dumps(newest.name), flush=True)
    if status == 0:
        break
    at += 1
"""


@pytest.mark.parametrize("how", ["async", "sync"])
def test_sigkill_at_every_stage_of_a_save(tmp_path, how):
    """Whatever is being opened, made, renamed or removed: one whole checkpoint is there, and only it is kept."""
    folder = tmp_path / "checkpoints"
    done = subprocess.run([sys.executable, "-c", SAVES, str(folder), how], cwd=ROOT, text=True, capture_output=True,
                          timeout=300, env=ENV)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    stages, newest = lines[::2], lines[1::2]
    assert len(stages) >= 12 and [status for _, status, _ in stages] == [signal.SIGKILL] * (len(stages) - 1) + [0]
    # First the older one counts, from the moment of the rename on the newer one.
    first = newest.index("step-00000020")
    assert 5 < first and newest == ["step-00000010"] * first + ["step-00000020"] * (len(newest) - first)
    assert stages[-1][2] == [".step-00000015.partial", "step-00000020"]
    assert any(".step-00000020.partial" in names for _, _, names in stages)


# ---- full disk, second run ------------------------------------------------------------------------------------------

def command(small_run, name, *options):  # noqa: F811
    return [sys.executable, "launch/train.sh", str(small_run.config), *SMALL, f"--run.dir={small_run.folder / name}",
            f"--train.max_steps={STEPS}", "--train.micro_batch_size=2", *options]


def metrics(small_run, name):  # noqa: F811
    return [json.loads(line) for line in (small_run.folder / name / "metrics.jsonl").read_text().splitlines()]


def agrees(small_run, name, plain_loop):  # noqa: F811
    """The run is the plain loop, each step logged once, however it came about."""
    lines = metrics(small_run, name)
    assert [m["step"] for m in lines] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in lines] == pytest.approx(plain_loop[0], rel=1e-4)


@pytest.mark.skipif(not may_mount(), reason="needs mounts of its own, and unshare -m is not permitted here")
def test_a_full_disk_does_not_end_the_run(small_run, plain_loop):  # noqa: F811
    """A disk on which one checkpoint has room, and a second one has not: then more room, and the same command."""
    folder = small_run.folder / "full"
    folder.mkdir()
    train = " ".join(command(small_run, "full", "--checkpoint.interval=5"))
    script = f"""
        mount -t tmpfs -o size=850k none {folder} || exit 99
        {train} 2>&1; echo "status $?"; ls {folder}/checkpoints; echo ----
        mount -o remount,size=20m {folder}
        {train} 2>&1; echo "status $?"; ls {folder}/checkpoints
        cat {folder}/metrics.jsonl > {folder}.copy"""
    done = subprocess.run([*OWN_MOUNTS, script], cwd=ROOT, env=ENV, text=True, capture_output=True, timeout=180)
    first, second = done.stdout.split("----\n")
    first, listed = first.split("status 1\n")
    second, listed_again = second.split("status 0\n")
    assert "No space left" in first and "warning: checkpoint not saved" in first and "step 25/25" in first
    assert first.count("warning: checkpoint not saved") == 4
    assert first.splitlines()[-1].startswith("error: ") and "last checkpoint could not be saved" in first.splitlines()[-1]
    assert listed.split() == ["step-00000005"]  # the older one is kept, and nothing half-written
    assert "resuming" in second and "step-00000005: step 5 on 1 -> 1 ranks" in second and "error" not in second
    assert listed_again.split() == ["step-00000020", "step-00000025"]
    shutil.move(f"{folder}.copy", folder / "metrics.jsonl")
    agrees(small_run, "full", plain_loop)


def started(small_run, name, *options, launcher=None, steps=5):  # noqa: F811
    """A run in a session of its own, in which some steps are done."""
    words = command(small_run, name, *options)
    if launcher:
        words = [*launcher, *words[2 if launcher is WITHIN else 1:]]
        process = subprocess.Popen(words, cwd=ROOT, env=ENV | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    else:
        process = Forked(words[1:], ROOT, ENV)
    until(lambda: count(small_run, name) >= steps, process)
    return process


def count(small_run, name):  # noqa: F811
    path = small_run.folder / name / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def until(condition, process, seconds=300):  # on a busy machine all of it is slow
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit and process.poll() is None, process.communicate(timeout=5)
        time.sleep(0.002)


SLOWLY = ["--train.micro_batch_size=1", "--eval.interval=1", "--eval.sequences=64"]  # enough time to be hit


def test_a_second_run_in_the_folder_is_refused(small_run):  # noqa: F811
    first = started(small_run, "two", *SLOWLY, "--checkpoint.interval=2", "--train.max_steps=100000")
    first.send_signal(signal.SIGSTOP)  # it lives, and leaves the cores to others
    second = run_forked(command(small_run, "two")[1:], ROOT, ENV)
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert second.stderr.startswith(f"error: {small_run.folder}/two: another run trains there (process {first.pid} on ")
    assert len(second.stderr.splitlines()) == 1
    third = run_forked(command(small_run, "two", "--train.max_steps=1", "--optim.warmup_steps=0")[1:], ROOT, ENV)
    assert third.returncode == 0, third.stderr  # the lock has died with its owner


# ---- damaged checkpoints --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over_loudly(small_run, plain_loop, damage):  # noqa: F811
    """auto takes the newest whole one; a path is refused; the damaged one is not kept in the place of good ones."""
    name = f"damaged-{damage}"
    small_run(name, 1, "--train.micro_batch_size=8", "--checkpoint.interval=6", steps=18)
    newest = small_run.folder / name / "checkpoints" / "step-00000018"
    file = newest / ("manifest.json" if damage == "manifest" else "__0_0.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.unlink()
    if damage in ("cut", "flip"):
        file.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises((RuntimeError, UserError), match=file.name.replace(".", "[.]") if damage != "manifest" else "no complete"):
        small_run(name, 2, "--train.micro_batch_size=4", f"--run.resume={newest}")
    small_run(name, 2, "--train.micro_batch_size=4", "--checkpoint.interval=6", "--checkpoint.keep_last=1")
    agrees(small_run, name, plain_loop)
    said = (small_run.folder / name / "log.txt").read_text()
    assert f"warning: {file}: " in said and f"going on from {newest.with_name('step-00000012')} instead" in said
    there = sorted(p.name for p in newest.parent.iterdir())
    assert there == ["step-00000018.damaged", "step-00000025"]
    checkpoint.verify(newest.with_name("step-00000025"))


# ---- preemption -----------------------------------------------------------------------------------------------------

def test_sigusr1_finishes_the_step_saves_and_ends_with_75(small_run, plain_loop):  # noqa: F811
    process = started(small_run, "usr1", *SLOWLY)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 75 and err == ""
    lines = metrics(small_run, "usr1")
    assert f"stopped by SIGUSR1 after step {len(lines)} of {STEPS}, and saved" in out and len(lines) < STEPS
    assert checkpoint.step_of(checkpoint.find(small_run.folder / "usr1")) == len(lines)
    small_run("usr1", 2, "--train.micro_batch_size=2")
    agrees(small_run, "usr1", plain_loop)


@pytest.mark.parametrize("launcher, number", [(TORCHRUN, "SIGTERM"), (WITHIN, "SIGTERM"), (WITHIN, "SIGUSR1")],
                         ids=["torchrun", "bash", "bash-SIGUSR1"])
def test_a_signal_to_the_launcher_saves_on_all_ranks(small_run, plain_loop, launcher, number, request):  # noqa: F811
    name = request.node.callspec.id
    process = started(small_run, name, *SLOWLY, launcher=launcher)
    process.send_signal(signal.Signals[number])
    out, err = process.communicate(timeout=180)
    lines = metrics(small_run, name)
    assert process.returncode == 75 and err == "" if launcher is WITHIN else process.returncode != 0 and "error: " not in err
    assert f"stopped by {number} after step {len(lines)} of {STEPS}, and saved" in out and len(lines) < STEPS
    assert out.count("8 sequences = 2 ranks x 1 x 4 accumulated") == out.count(f" 3/{STEPS} ") == 1  # rank 0 alone speaks
    state = checkpoint.read_state(checkpoint.find(small_run.folder / name))
    assert (state["step"], state["world_size"]) == (len(lines), 2)
    small_run(name, 1, "--train.micro_batch_size=8")
    agrees(small_run, name, plain_loop)


def test_a_save_that_does_not_fit_into_the_grace_time_is_told(small_run):  # noqa: F811
    small_run("grace", 1, "--train.micro_batch_size=8", "--checkpoint.interval=5", "--run.grace_s=0")
    said = "a preemption would lose the steps since the last checkpoint"
    assert (small_run.folder / "grace" / "log.txt").read_text().count(said) == 1
    small_run("no-grace", 1, "--train.micro_batch_size=8", "--checkpoint.interval=5")
    assert said not in (small_run.folder / "no-grace" / "log.txt").read_text()


# ---- a rank dies, a rank hangs --------------------------------------------------------------------------------------

def ranks_of(process) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_max_restarts_brings_a_run_back_by_itself(small_run, plain_loop):  # noqa: F811
    """One rank is killed; after the restart one hangs. torchrun starts the ranks again, and the run is the same."""
    process = started(small_run, "restarts", *SLOWLY, "--checkpoint.interval=2", "--run.timeout_s=3",
                      launcher=[*TORCHRUN, "--max-restarts=2"])
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    log = small_run.folder / "restarts" / "log.txt"
    until(lambda: log.read_text().count("resuming") == 1, process)
    at = count(small_run, "restarts")
    until(lambda: count(small_run, "restarts") >= at + 3, process)
    waiting, hung = ranks_of(process)
    os.kill(hung, signal.SIGSTOP)
    until(lambda: waiting not in ranks_of(process), process)
    os.kill(hung, signal.SIGKILL)  # torchrun would, half a minute later
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert log.read_text().count("resuming") == 2
    agrees(small_run, "restarts", plain_loop)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "nothing is heard of rank 1 (" in said[0] and "step " in said[0], err


HANGS_IN_A_SAVE = """
import os, runpy, signal, sys
sys.path.insert(0, ".")
from nanogpt import checkpoint
save = checkpoint.Saver.save
def hang(*args):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return save(*args)
checkpoint.Saver.save = hang
sys.argv[0] = "launch/train.sh"
runpy.run_path("launch/train.sh", run_name="__main__")
"""


def test_a_rank_that_hangs_in_a_save_is_not_waited_for(small_run, tmp_path):  # noqa: F811
    """A save may take half an hour, but not with a rank that gives no sign of life."""
    (tmp_path / "hangs.py").write_text(HANGS_IN_A_SAVE)
    words = command(small_run, "hangs", "--checkpoint.interval=2", "--checkpoint.async_save=false", "--run.timeout_s=3")
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([*TORCHRUN, str(tmp_path / "hangs.py"), *words[2:]], cwd=ROOT, env=ENV, stderr=err,
                                   stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        until(lambda: "error: " in (tmp_path / "err").read_text(), process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "nothing is heard of rank 1 (" in (tmp_path / "err").read_text()
    assert "rank 0" in (tmp_path / "err").read_text() and "step 2, checkpoint" in (tmp_path / "err").read_text()


def looked_after(argv: list[str], goes_on: bool) -> int:
    """One of two ranks that saves; the other's beats are late, and while it is listened for, the save may come to its end."""
    from unittest import mock

    from nanogpt.config import load_config
    from nanogpt.ranks import init_process_group
    from nanogpt.watch import Watch
    config, ends, listened = load_config(argv, 2, 2), [], []
    init_process_group(config)

    def silent(self, seconds):
        listened.append(seconds)
        if goes_on:
            self.at(len(listened), "checkpoint")
        return True

    with mock.patch.object(Watch, "_silent", silent), mock.patch.object(Watch, "_end", lambda self, why: ends.append(why)):
        guard = Watch(config.run)
        while len(listened) < 2:
            time.sleep(0.05)
        guard.close()
    return len(ends)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_rank_that_goes_on_is_not_ended_for_late_beats(small_run, ranks, goes_on):  # noqa: F811
    argv = [*command(small_run, "late")[2:], "--run.timeout_s=0.4"]
    ended = ranks(2, looked_after, argv, goes_on)
    assert ended == [0, 0] if goes_on else min(ended) >= 1


def test_a_killed_rank_without_restarts_is_told_in_one_line(small_run):  # noqa: F811
    process = started(small_run, "alone", *SLOWLY, launcher=WITHIN)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    began = time.monotonic()
    out, err = process.communicate(timeout=180)
    assert process.returncode == 1 and time.monotonic() - began < 20
    assert err == ("error: rank 1 was ended by SIGKILL (out of memory, perhaps); the same command goes on from the last "
                   "checkpoint\n")


def test_ranks_do_not_outlive_torchrun(small_run):  # noqa: F811
    process = started(small_run, "orphans", *SLOWLY, launcher=TORCHRUN)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    process.kill()
    process.wait()
    limit = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < limit
        time.sleep(0.02)
