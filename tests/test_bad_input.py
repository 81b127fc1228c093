"""Bad input, typed as users type it: one clear line on stderr, a status, no traceback, no hang, nothing half-written.

A case is (what is bad, what is broken first, what is typed, the lines that are wanted…). What is wanted is a part of a
line: the file or the option, and what is wrong or what to do. Each case runs in a folder of its own, with

    small.yaml       a tiny run of mds         run/         3 steps of it, and their checkpoint step-00000003
    mds/  char/      one text as two datasets, of the byte tokenizer and of char
    empty.txt  short.txt

which it must leave as it was, to the byte. What Python runs is forked.py's, but for bash, torchrun, mounts, and a Python
in which nothing is installed.
"""

import functools
import hashlib
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import convert
from forked import run_forked

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300
CKPT = "run/checkpoints/step-00000003"
SMALL = """
run: {dir: run}
data: {path: mds}
model: {n_layer: 2, n_head: 2, n_embd: 32, block_size: 32}
train: {max_steps: 3, global_batch_size: 4, micro_batch_size: 2, compile: false, precision: float32}
eval: {sequences: 4}
"""
BOMB = "k0: &k0 {a: 1}\n" + "".join(f"k{i}: &k{i} {{a: *k{i - 1}, b: *k{i - 1}}}\n" for i in range(1, 64))

# ---- what is typed --------------------------------------------------------------------------------------------------

TRAIN = [sys.executable, f"{ROOT}/launch/train.sh"]
TOOLS = {"convert": "convert_text_to_mds", "inspect": "inspect_mds", "sample": "sample", "plot": "plot",
         "prove": "prove_resume"}
TOOLS = {word: [sys.executable, f"{ROOT}/tools/{name}.py"] for word, name in TOOLS.items()}
OWN_MOUNTS = ["unshare", "-m", *([] if os.geteuid() == 0 else ["-r"]), "sh", "-c"]  # which the command alone sees
PROGRAMS = TOOLS | {
    "train": TRAIN,
    "bash-train": ["bash", TRAIN[1]],
    "torchrun-train": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAIN[1]],
    "small-shm-train": [*OWN_MOUNTS, 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"', "-", *TRAIN],
    "full-disk-train": [*OWN_MOUNTS, 'mount -t tmpfs -o size=4k none new && exec "$@"', "-", *TRAIN],
    **{f"bare-{name}": [sys.executable, "-SE", *command[1:]]  # a Python in which nothing is installed
       for name, command in (TOOLS | {"train": TRAIN}).items()},
}
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun's, should these tests run below one
# The CPU, on machines with GPUs too; and the Python of these tests, for bash.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix,
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


# ---- what is broken first: functions of the case's folder -----------------------------------------------------------

def write(name, text):
    def function(here):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text)
    return function


def bad_yaml(text):
    return write("bad.yaml", f"base: small.yaml\n{text}")


def remove(name):
    return lambda here: (here / name).unlink()


def make_folder(name):
    return lambda here: (here / name).mkdir(parents=True)


def change(name, function):
    return lambda here: (here / name).write_bytes(function((here / name).read_bytes()))


def cut(name):
    return change(name, lambda content: content[:len(content) // 2])


def flip(name):
    return change(name, lambda content: content[:-50] + bytes([content[-50] ^ 1]) + content[-49:])


def fill(name):
    """Ids that no tokenizer has in every sample of a shard but the first, and no hash that would tell before."""
    def function(content):
        second = struct.unpack_from("<I", content, 8)[0]  # a shard begins with its number of samples, and their places
        return content[:second] + b"\xff" * (len(content) - second)

    def both(here):
        change(name, function)(here)
        replace(f"{Path(name).parent}/index.json", r'"hashes": {"xxh64": "\w+"}', '"hashes": {}')(here)
    return both


def replace(name, old, new):
    return lambda here: write(name, re.sub(old, new, (here / name).read_text(), count=1))(here)


# ---- the cases ------------------------------------------------------------------------------------------------------

CONFIGS = [  # told in a moment, before torch is imported
    ("no config file", None, "train --train.max_steps=5", "one config file is needed"),
    ("two config files", None, "train small.yaml mds", "one config file is needed"),
    ("misspelt config file", None, "train smal.yaml", "smal.yaml: no such file or directory; did you mean small.yaml?"),
    ("a folder as config file", None, "train mds", "mds: is a directory"),
    ("invalid YAML", bad_yaml("train: {max_steps: 3"), "train bad.yaml", "bad.yaml: not valid YAML"),
    ("a list as config", write("bad.yaml", "- train"), "train bad.yaml", "bad.yaml: expected sections"),
    ("duplicate key", bad_yaml("train: {max_steps: 3, max_steps: 4}"), "train bad.yaml", "'max_steps' stands twice"),
    ("duplicate section", bad_yaml("log: {interval: 3}\nlog: {}"), "train bad.yaml",
     "bad.yaml: not valid YAML: 'log' stands twice"),
    ("a config that runs code", bad_yaml("run: !!python/object/apply:os.system ['touch ran']"), "train bad.yaml",
     "bad.yaml: not valid YAML"),
    ("a config within itself", bad_yaml("run: &run {dir: *run}"), "train bad.yaml", "bad.yaml: not valid YAML"),
    ("a config of 2^63 keys", write("bad.yaml", BOMB), "train bad.yaml", "bad.yaml: not valid YAML"),
    ("base: missing", write("bad.yaml", "base: smal.yaml"), "train bad.yaml", "smal.yaml: no such file or directory"),
    ("base: cycle", write("bad.yaml", "base: bad.yaml"), "train bad.yaml", "bad.yaml: its base leads back to itself"),
    ("an empty section", bad_yaml("train:"), "train bad.yaml", "bad.yaml: train: "),
    ("unknown key", bad_yaml("optim: {learnign_rate: 1}"), "train bad.yaml",
     "bad.yaml: optim.learnign_rate: no such setting; did you mean optim.learning_rate?"),
    ("unknown section", bad_yaml("optimizer: {beta1: 0}"), "train bad.yaml", "bad.yaml: optimizer: no such setting"),
    ("unknown option", None, "train small.yaml --optim.learnign_rate 1",
     "--optim.learnign_rate: no such setting; did you mean optim.learning_rate?"),
    ("nanoGPT's option", None, "train small.yaml --max_iters=5 --dropout=0", "--max_iters: no such setting",
     "--dropout: no such setting; did you mean model.dropout?"),
    ("option without a value", None, "train small.yaml --train.max_steps", "--train.max_steps: a value is needed"),
    ("option before an option", None, "train small.yaml --log.interval --run.seed=1",
     "--log.interval: a value is needed"),
    ("wrong type", bad_yaml("train: {max_steps: many}"), "train bad.yaml",
     "bad.yaml: train.max_steps: input should be a valid integer"),
    ("a switch for a number", bad_yaml("train: {max_steps: yes}"), "train bad.yaml",
     "bad.yaml: train.max_steps: input should be a valid integer"),
    ("a fraction of a step", None, "train small.yaml --train.max_steps=2.5",
     "--train.max_steps: input should be a valid integer"),
    ("not a choice", None, "train small.yaml --sharding.strategy=fsdp",
     "--sharding.strategy: input should be 'full', 'grad', 'hybrid' or 'replicate' (found 'fsdp')"),
    ("dropout 1.5", bad_yaml("model: {dropout: 1.5}"), "train bad.yaml", "model.dropout: input should be less than 1"),
    ("negative learning rate", None, "bash-train small.yaml --optim.learning_rate -1e-3",
     "--optim.learning_rate: input should be greater than 0"),
    ("learning rate nan", bad_yaml("optim: {learning_rate: .nan}"), "train bad.yaml",
     "bad.yaml: optim.learning_rate: "),
    ("huge seed", None, f"train small.yaml --run.dir=new --run.seed={10**30}", "--run.seed: "),
    ("a run named ..", None, "train small.yaml --run.name=..", "--run.name: "),
    ("width not a multiple of heads", bad_yaml("model: {n_embd: 33}"), "train bad.yaml",
     "bad.yaml: model.n_embd: 33 is not a multiple of n_head 2"),
    ("warmup as long as the run", None, "train small.yaml --optim.warmup_steps=3",
     "--optim.warmup_steps: 3 is not below the 3 steps of the run"),
    ("indivisible batch", None, "train small.yaml --train.micro_batch_size=3",
     "small.yaml: train.global_batch_size: 4 is not a multiple of 1 rank x micro_batch_size 3 = 3; take 3 or 6"),
    ("ranks that do not divide the batch", None,
     "RANK=0 WORLD_SIZE=3 LOCAL_RANK=0 LOCAL_WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=1 train small.yaml",
     "small.yaml: train.global_batch_size: 4 is not a multiple of 3 ranks x micro_batch_size 2 = 6; take 6"),
    ("many problems", bad_yaml("trian: {}\nmodel: {n_head: 3, dropout: 2}"),
     "train bad.yaml --train.micro_batch_size=3", "bad.yaml: model.dropout: ", "bad.yaml: trian: no such",
     "small.yaml: model.n_embd: 32 is not a multiple of n_head 3", "small.yaml: train.global_batch_size: 4 is not"),
    ("half of torchrun's environment", None, "RANK=0 train small.yaml", "RANK is set and WORLD_SIZE, "),
    ("nothing installed", None, "bare-train small.yaml", "is not installed for"),
    ("nothing installed, sample", None, "bare-sample --run run", "torch is not installed for"),
    ("nothing installed, convert", None, "bare-convert --input short.txt --out new", "is not installed for"),
    ("nothing installed, inspect", None, "bare-inspect mds", "is not installed for"),
    ("nothing installed, prove", None, "bare-prove --out new", "torch is not installed for"),
    ("nothing installed, plot", None, "bare-plot run", "is not installed for"),
]

DATA = [
    ("missing input file", None, "convert --input no.txt --out new", "no.txt: is not there"),
    ("empty input file", None, "convert --input empty.txt --out new", "empty.txt: holds no text"),
    ("text shorter than a block", None, "convert --input short.txt --out new --tokenizer byte --val-fraction 0",
     "train split has 6 tokens, and a sample takes block_size + 1 = 1025; give more text or a smaller --block-size"),
    ("unknown tokenizer", None, "convert --input short.txt --out new --tokenizer gtp2", "did you mean gpt2?"),
    ("another dataset in the way", None, "convert --input short.txt --out mds --tokenizer byte --block-size 2",
     "mds: holds another dataset"),
    ("a run in the way", None, "convert --input short.txt --out run --tokenizer byte --overwrite",
     "run: exists and is not a dataset folder"),
    ("--out not to be written", None, "convert --input short.txt --out /proc/nanogpt/new --tokenizer byte "
     "--block-size 2 --val-fraction 0", "/proc/nanogpt/new: cannot be written"),
    ("--out below a file", None, "convert --input short.txt --out empty.txt/new --tokenizer byte --block-size 2",
     "empty.txt/new: cannot be written"),
    ("missing folder to inspect", None, "inspect nowhere", "nowhere/dataset.json: is missing; make the dataset with "),
    ("missing dataset.json", remove("mds/dataset.json"), "inspect mds", "mds/dataset.json: is missing"),
    ("truncated dataset.json", cut("mds/dataset.json"), "inspect mds", "mds/dataset.json: is damaged"),
    ("dataset.json of wrong types", replace("mds/dataset.json", '"samples": ', '"samples": 0.'), "inspect mds",
     "mds/dataset.json: splits.train.samples is 0."),
    ("truncated index.json", cut("mds/train/index.json"), "inspect mds", "mds/train/index.json: is damaged"),
    ("flipped bit in a shard", flip("mds/train/shard.00000.mds"), "inspect mds --verify",
     "shard.00000.mds: is damaged"),
    ("missing data folder", None, "train small.yaml --data.path=nowhere --run.dir=new",
     "nowhere/dataset.json: is missing; make the dataset with tools/convert_text_to_mds.py"),
    ("unknown kind of URL", None, "train small.yaml --data.path=foo://bar --run.dir=new",
     "foo://bar/dataset.json: cannot be fetched"),
    ("block_size does not divide", None, "train small.yaml --model.block_size=48 --run.dir=new",
     "model.block_size: 48 is neither the 64 that mds holds nor a divisor of it"),
    ("data shorter than a step", None, "train small.yaml --train.global_batch_size=8000 --run.dir=new",
     "mds: its train split has"),
    ("dataset.json of other shards", replace("mds/dataset.json", '"block_size": 64', '"block_size": 32'),
     "train small.yaml --run.dir=new", "mds/train/index.json: "),
    ("truncated shard", cut("mds/train/shard.00000.mds"), "train small.yaml --run.dir=new",
     "mds/train/shard.00000.mds: has"),
    ("changed shard", flip("mds/train/shard.00000.mds"), "train small.yaml --run.dir=new",
     "mds/train/shard.00000.mds: has changed since it was written"),
    ("missing shard", remove("mds/val/shard.00000.mds"), "train small.yaml --run.dir=new",
     "mds/val/shard.00000.mds: is missing; copy it again, or convert the text again"),
]

RUNS = [
    ("truncated checkpoint", cut(f"{CKPT}/__0_0.distcp"), "train small.yaml", f"{CKPT}/__0_0.distcp: has "),
    ("flipped bit in a checkpoint", flip(f"{CKPT}/__0_0.distcp"), f"train small.yaml --run.resume={CKPT}",
     f"{CKPT}/__0_0.distcp: its content has changed since it was written; choose another checkpoint, or remove {CKPT}"),
    ("resume from nothing", None, "train small.yaml --run.resume=nowhere", "nowhere: no complete checkpoint there"),
    ("resume in another order", None, "train small.yaml --data.shuffle_seed=1",
     f"{CKPT}: data.shuffle_seed is 1 now and was 9176"),
    ("resume on other data", None, "train small.yaml --data.path=char", f"{CKPT}: train index.json sha256 is ",
     f"{CKPT}: tokenizer fingerprint is "),
    ("resume another model", None, "train small.yaml --model.n_embd=64", f"{CKPT}: does not fit this model"),
    ("resume never", None, "train small.yaml --run.resume=never", "run: has checkpoints, and run.resume is never"),
    ("weights of another tokenizer", None, "train small.yaml --data.path=char --run.dir=new --run.init_from=run",
     f"{CKPT}: its tokenizer is byte, that of char is char"),
    ("run folder below a file", None, "train small.yaml --run.dir=empty.txt/new", "empty.txt/new: cannot be written"),
    ("CUDA where there is none", None, "train small.yaml --run.device=cuda --run.dir=new",
     "run.device: cuda is asked for"),
    ("small /dev/shm", None, "small-shm-train small.yaml --run.dir=new", "/dev/shm: 64 KiB are free, 1024 are needed"),
    ("two ranks, indivisible batch", None, "torchrun-train small.yaml --train.micro_batch_size=4 --run.dir=new",
     "small.yaml: train.global_batch_size: 4 is not a multiple of 2 ranks x micro_batch_size 4 = 8; take 8"),
    ("two ranks, run folder not to be written", None, "torchrun-train small.yaml --run.dir=/proc/nanogpt",
     "/proc/nanogpt: cannot be written"),
    ("sample a missing run", None, "sample --run nowhere", "nowhere: no complete checkpoint there; give a run folder"),
    ("sample a truncated checkpoint", cut(f"{CKPT}/__0_0.distcp"), f"sample --run {CKPT}",
     f"{CKPT}/__0_0.distcp: has "),
    ("sample with another tokenizer", replace(f"{CKPT}/state.json", '"name": "byte"', '"name": "char"'),
     "sample --run run", f"{CKPT}/state.json: its content has changed since it was written"),
    ("sample as for another dataset", None, "sample --run run --tokenizer char",
     "char: its tokenizer (char) is not the one of run (byte)"),
    ("negative temperature", None, "sample --run run --temperature -1", "--temperature: -1 "),
    ("temperature inf", None, "sample --run run --temperature inf", "--temperature: inf "),
    ("top-k 0", None, "sample --run run --top-k 0", "--top-k: 0 is below 1"),
    ("huge seed of samples", None, f"sample --run run --seed {10**30}", "--seed: 1000"),
    ("no samples", None, "sample --run run --num-samples 0", "--num-samples: at least 1 is needed"),
    ("plot a missing run", None, "plot nowhere", "nowhere: there is no such run folder"),
    ("plot a run without a step", make_folder("new"), "plot new", "new/metrics.jsonl: cannot be read"),
]

LATER = [  # found when the run folder has been made, which keeps its logs
    ("ids out of the vocabulary", fill("mds/train/shard.00000.mds"), "train small.yaml --run.dir=new",
     "mds/train/shard.00000.mds: sample "),
    ("ids out of the vocabulary on one of two ranks", fill("mds/train/shard.00000.mds"), "torchrun-train small.yaml "
     "--run.dir=new --data.shuffle=off --data.num_canonical_nodes=1",
     "rank 1: mds/train/shard.00000.mds: sample 1 holds "),
    ("a folder for metrics.jsonl", make_folder("new/metrics.jsonl"), "train small.yaml --run.dir=new",
     "new/metrics.jsonl: "),
    ("a file for checkpoints", write("new/checkpoints", ""), "train small.yaml --run.dir=new",
     "new: cannot be written"),
    ("full disk", make_folder("new"), "full-disk-train small.yaml --run.dir=new", "new: cannot be written (No space left on device)"),
]

CASES = {case[0]: case[1:] for case in CONFIGS + DATA + RUNS + LATER}
LOGS = {f"new{name}" for name in ("", "/checkpoints", "/config.yaml", "/log.txt", "/metrics.jsonl", "/.lock", "/.started")} | {"run/.lock"}


# ---- the test -------------------------------------------------------------------------------------------------------

def run(typed: str, here: Path) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a line like `NAME=value program arguments…`, typed in a folder."""
    words = shlex.split(typed)
    first = next(i for i, word in enumerate(words) if "=" not in word)
    environment = {name: value for name, value in os.environ.items() if name not in RANKS} | ENVIRONMENT
    environment |= dict(word.split("=", 1) for word in words[:first])
    program = PROGRAMS[words[first]]
    if program[0] == sys.executable and len(program) == 2:
        done = run_forked([program[1], *words[first + 1:]], here, environment, TIMEOUT_S)
        return done.returncode, done.stdout, done.stderr
    process = subprocess.Popen([*program, *words[first + 1:]], cwd=here, env=environment, text=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's ranks too
        raise
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def good(text_dataset, tmp_path_factory):
    """The folder of which every case gets a copy."""
    here = tmp_path_factory.mktemp("good")
    shutil.copytree(text_dataset, here / "mds")
    convert(text_dataset.parent / "text.txt", here / "char", "--tokenizer", "char")
    for name, text in (("small.yaml", SMALL), ("empty.txt", ""), ("short.txt", "short")):
        (here / name).write_text(text)
    status, _, stderr = run("train small.yaml", here)
    assert (status, stderr) == (0, "")
    return here


@pytest.fixture(scope="module")
def attempts(request, good):
    """What became of each selected case. Importing torch takes seconds, so they run ahead of the tests, one a core."""
    names = [item.callspec.params["name"] for item in request.session.items if item.module is request.module]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    yield {name: pool.submit(attempt, good, *CASES[name][:2]) for name in names}
    pool.shutdown(cancel_futures=True)


def attempt(good: Path, breaking, typed: str):
    """(status, stdout, stderr, paths that are not as they were) of what is typed in a copy of a folder."""
    if "unshare" in PROGRAMS.get(typed.split()[0], ()) and not may_mount():
        return None
    with tempfile.TemporaryDirectory(dir=good.parent) as here:
        here = shutil.copytree(good, Path(here) / "here")
        if breaking:
            breaking(here)
        before = contents(here)
        ended = run(typed, here)
        return *ended, {path for path, _ in before.items() ^ contents(here).items()}


@functools.cache
def may_mount() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run(
        [*OWN_MOUNTS, "mount -t tmpfs none /mnt"], capture_output=True).returncode == 0


def contents(here: Path) -> dict:
    return {str(path.relative_to(here)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in here.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line(name, attempts):
    typed, *wanted = CASES[name][1:]
    ended = attempts[name].result()
    if ended is None:
        pytest.skip("needs mounts of its own, and unshare -m is not permitted here")
    status, stdout, stderr, changed = ended
    if typed.startswith("torchrun"):  # has a report of its own, which begins as `W0131 23:59:59.` and says Traceback
        stderr, report = re.split(r"^(?=[WE]\d{4} \d\d:)", stderr + "W0131 23:59:59.", maxsplit=1, flags=re.MULTILINE)
        assert "error: " not in report and "[rank" not in report
        assert "error_file: <N/A>" not in report.split("Root Cause")[-1]  # which is our line
    lines = stderr.splitlines()
    assert status == 1, stderr
    assert len(lines) == len(wanted), stderr
    for line, part in zip(lines, wanted):
        assert line.startswith("error: ") and part in line
    assert "Traceback" not in stdout
    assert changed <= (LOGS if name in {case[0] for case in LATER} else {"run/.lock"})
