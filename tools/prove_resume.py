"""Proves that no restart changes a run: trains a small model undisturbed, then again while it is killed, and compares.

    python tools/prove_resume.py                         20 kills, a few minutes on 2 CPU cores
    python tools/prove_resume.py --kills 50 --seed 7     other moments, other layouts
    python tools/prove_resume.py --start-times           is a resume at step 100,000 as quick as one at step 10?

Everything is real: MDS shards, torchrun, gloo ranks, fully_shard, torch.distributed.checkpoint, SIGKILL. The kills fall
at random: before the first step, within a step, during an evaluation, while a checkpoint is written, while it is
published; on all processes, on one rank, or on torchrun alone. Each time the run goes on with another number of ranks,
another micro-batch and another sharding strategy. What each rank puts through the model is recorded at the model's
door, and looked up in the shards. Compared are the sequences of every step, whichever process did it and however often;
the losses; the final weights. The status is 0 only if nothing differs.
"""

import json
import os
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanogpt.errors import Parser, UserError, die_with_torchrun, run  # noqa: E402

BATCH, BLOCK = 12, 32  # sequences of a step: 1, 2, 3, 4 ranks divide it
LOSSES, WEIGHTS = 1e-4, 1e-3  # the largest relative differences that rounding may make
START, STEP, EVALUATION, WRITING, PUBLISHING, END = range(6)  # what rank 0 is doing
NAMES = ("start", "a step", "an evaluation", "writing a checkpoint", "publishing one")


# ---- one rank: launch/train.sh, with a recorder at the model's door -------------------------------------------------

def rank(folder: Path, argv: list[str]):
    """Runs launch/train.sh with argv. Writes what goes through the model, and tells at any time what is being done."""
    die_with_torchrun()
    import xxhash

    import nanogpt.checkpoint
    import nanogpt.train as training

    number = os.environ.get("RANK", "0")
    seen = os.open(folder / f"{os.environ['PROVE_ATTEMPT']}.{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    doing = os.open(folder / "doing", os.O_WRONLY) if number == "0" else None
    step = 0

    def tell(what: int):
        if doing is not None:
            os.pwrite(doing, struct.pack("<II", what, step), 0)

    def during(what: int, function):
        def call(*args, **kwargs):
            tell(what)
            try:
                return function(*args, **kwargs)
            finally:
                tell(STEP)
        return call

    def record(model, args):
        if model.training:  # one write, which a kill leaves whole: step, rows, and a hash of each row's tokens
            idx, targets = (t.cpu().numpy() for t in args[:2])
            hashes = [xxhash.xxh64(x.astype("<i8").tobytes() + y[-1:].astype("<i8").tobytes()).intdigest()
                      for x, y in zip(idx, targets)]
            os.write(seen, struct.pack(f"<II{len(hashes)}Q", step, len(hashes), *hashes))

    def at_the_door(config, device):
        model = build(config, device)
        model.register_forward_pre_hook(record)
        return model

    def begins(this_step, config):
        nonlocal step
        step = this_step
        tell(STEP)
        return learning_rate(this_step, config)

    build, training.build = training.build, at_the_door
    learning_rate, training.learning_rate = training.learning_rate, begins
    training.evaluate = during(EVALUATION, training.evaluate)
    nanogpt.checkpoint.Saver._to_disk = during(WRITING, nanogpt.checkpoint.Saver._to_disk)
    nanogpt.checkpoint.Saver._publish = during(PUBLISHING, nanogpt.checkpoint.Saver._publish)
    tell(START)
    sys.argv = [str(ROOT / "launch" / "train.sh"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


# ---- the run, undisturbed and killed --------------------------------------------------------------------------------

class Trial:
    """One run in one folder, started as often as it takes."""

    def __init__(self, folder: Path, config: Path, steps: int):
        self.folder, self.config, self.steps, self.attempts = folder, config, steps, 0
        (folder / "seen").mkdir(parents=True)
        (folder / "seen" / "doing").write_bytes(bytes(8))

    def start(self, layout: dict) -> subprocess.Popen:
        """Starts or resumes the run, in a session of its own."""
        self.attempts += 1
        (self.folder / "seen" / "doing").write_bytes(bytes(8))
        command = [sys.executable, str(Path(__file__).resolve()), "--rank", str(self.folder / "seen"), "--",
                   str(self.config), f"--run.dir={self.folder / 'run'}", f"--train.max_steps={self.steps}",
                   f"--train.micro_batch_size={layout['micro']}", f"--sharding.strategy={layout['strategy']}"]
        if layout["strategy"] == "hybrid":
            command += [f"--sharding.shard_size={layout['shard_size']}"]
        if layout["ranks"] > 1:
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={layout['ranks']}"]
        under_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        environment = {k: v for k, v in os.environ.items() if k not in under_torchrun}
        environment |= dict(PROVE_ATTEMPT=f"{self.attempts:04}", CUDA_VISIBLE_DEVICES="")
        self.out = open(self.folder / f"attempt-{self.attempts:04}.txt", "w")
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.out, stderr=subprocess.STDOUT,
                                env=environment, start_new_session=True)

    def said(self) -> str:
        return (self.folder / f"attempt-{self.attempts:04}.txt").read_text()

    def doing(self) -> tuple[int, int]:
        """(what rank 0 is doing, in which step)"""
        return struct.unpack("<II", (self.folder / "seen" / "doing").read_bytes())

    def resumed_from(self) -> str:
        found = re.search(r"^resuming .*: step (\d+) on", self.said(), re.M)
        return found[1] if found else "-" if self.doing()[0] == START else "0"

    def finish(self, process, seconds: float = 600) -> int:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise UserError(f"attempt {self.attempts} hangs; see {self.out.name}") from None
        finally:
            end_session(process.pid)


def end_session(leader: int):
    """SIGKILL to all processes of a session, ranks of torchrun included."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[3]) == leader:
                os.kill(int(entry.name), signal.SIGKILL)
        except (OSError, IndexError):
            pass


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def draw_layout(choose: random.Random, but: dict) -> dict:
    """Ranks, micro-batch and strategy: other ones than those before."""
    while True:
        ranks = choose.choice([1, 2, 3, 4])
        micro = choose.choice([m for m in range(1, BATCH // ranks + 1) if BATCH // ranks % m == 0])
        strategy = choose.choice(["full", "grad", "replicate"] + ["hybrid"] * (ranks > 1))
        layout = dict(ranks=ranks, micro=micro, strategy=strategy)
        if strategy == "hybrid":
            layout["shard_size"] = choose.choice([s for s in (1, 2, 4) if ranks % s == 0])
        if layout["ranks"] != but.get("ranks") and layout["strategy"] != but.get("strategy"):
            return layout


def kill_at(trial: Trial, process, moment: int, step: int, delay: float, victim: str, choose) -> str | None:
    """Waits for the moment, and kills. Returns what was killed, or None if the run ended before by itself."""
    if moment == START:
        limit = time.monotonic() + delay
        while time.monotonic() < limit and process.poll() is None and trial.doing()[0] == START:
            time.sleep(0.01)
    else:
        was = None
        while process.poll() is None:
            what, at = trial.doing()
            if what == moment and at >= step and (moment == STEP or was != moment):
                time.sleep(delay)
                break
            if at >= step + 12:  # a short moment can slip by
                break
            was = what
            time.sleep(0.0002)
    if process.poll() is not None:
        return None
    ranks = children(process.pid) if "torch.distributed.run" in process.args else []
    if victim == "one rank" and ranks:
        one = choose.randrange(len(ranks))
        os.kill(ranks[one], signal.SIGKILL)
        trial.finish(process, 120)  # the others end by themselves, and torchrun
        return f"rank {one}"
    if victim == "torchrun" and ranks:
        os.kill(process.pid, signal.SIGKILL)
        limit = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < limit:
            time.sleep(0.01)  # its ranks must not outlive it
        process.wait()
        if any(Path(f"/proc/{pid}").exists() for pid in ranks):
            raise UserError(f"attempt {trial.attempts}: torchrun was killed, and its ranks live on")
        return "torchrun"
    end_session(process.pid)
    process.wait()
    return "all"


def killed_run(trial: Trial, kills: int, choose: random.Random) -> int:
    """Trains to the end in spite of `kills` kills. Returns how many restarts needed a second attempt."""
    layout, again, began = {}, 0, time.monotonic()
    print(f"{'kill':>4}  {'ranks':>5} {'micro':>5} {'strategy':<10} {'from step':>9}  {'killed during':<21} {'in step':>7}  "
          f"{'killed':<8} {'time':>5}")
    for kill in range(kills):
        layout = draw_layout(choose, layout)
        # Each kill has its own stretch of the run, so that the run gets on.
        step = int((kill + choose.random()) * (trial.steps - 20) / kills)
        moment = choose.choices([START, STEP, EVALUATION, WRITING, PUBLISHING], [2, 6, 3, 5, 4])[0]
        # As long as what is to be hit takes, about.
        delay = choose.random() * {START: 8.0, STEP: 0.05, EVALUATION: 0.05, WRITING: 0.04, PUBLISHING: 0.004}[moment]
        victim = choose.choice(["all", "all", "one rank", "torchrun"])
        for attempt in range(4):
            process = trial.start(layout)
            killed = kill_at(trial, process, moment, step, delay, victim, choose)
            what, at = trial.doing()
            if killed:
                break
            status = trial.finish(process)
            if status == 0:
                raise UserError(f"the run was over before kill {kill + 1}")
            again += 1
            print(f"      a start failed by itself with status {status}: {trial.out.name}", flush=True)
        else:
            raise UserError(f"four starts in a row failed by themselves; see {trial.out.name}")
        name = "hybrid/" + str(layout["shard_size"]) if layout["strategy"] == "hybrid" else layout["strategy"]
        print(f"{kill + 1:>4}  {layout['ranks']:>5} {layout['micro']:>5} {name:<10} {trial.resumed_from():>9}  "
              f"{NAMES[what]:<21} {'' if what == START else at + 1:>7}  {killed:<8} {time.monotonic() - began:>4.0f}s",
              flush=True)
    for attempt in range(4):
        layout = draw_layout(choose, layout)
        process = trial.start(layout)
        if trial.finish(process) == 0:
            print(f" end  {layout['ranks']:>5} {layout['micro']:>5} {layout['strategy']:<10} {trial.resumed_from():>9}  "
                  f"{'not killed any more':<21} {trial.steps:>7}  {'':<8} {time.monotonic() - began:>4.0f}s")
            return again
        again += 1
    raise UserError(f"the last stretch does not end; see {trial.out.name}")


# ---- what is compared -----------------------------------------------------------------------------------------------

def recorded(trial: Trial) -> dict[int, list[list]]:
    """{step: [what each attempt put through the model in it: {rank: [hash of each sequence, in order]}]}"""
    steps = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for file in (trial.folder / "seen").glob("*.*"):
        attempt, number = file.name.split(".")
        data, place = file.read_bytes(), 0
        while place < len(data):
            step, n = struct.unpack_from("<II", data, place)
            steps[step][attempt][int(number)] += struct.unpack_from(f"<{n}Q", data, place + 8)
            place += 8 + 8 * n
    return {step: list(attempts.values()) for step, attempts in steps.items()}


def read_shards(datasets: list[Path]) -> dict[int, tuple[int, int]]:
    """{hash of a sequence: (dataset, sample)}, read from the shards by streaming alone."""
    import numpy as np
    import xxhash

    from nanogpt.shards import import_streaming
    known = {}
    for i, path in enumerate(datasets):
        samples = import_streaming().LocalDataset(local=str(path / "train"))
        for j in range(len(samples)):
            row = samples[j]["tokens"].astype("<i8")
            key = xxhash.xxh64(np.ascontiguousarray(row[:-1]).tobytes() + row[-1:].tobytes()).intdigest()
            if known.setdefault(key, (i, j)) != (i, j):
                raise UserError("two samples of the text are the same; take another --seed")
    return known


def compare_samples(undisturbed: dict, killed: dict, steps: int, known: dict) -> list[str]:
    """A line for each thing that is wrong."""
    problems, count, sizes = [], Counter(), Counter(dataset for dataset, _ in known.values())
    passes = {dataset: 0 for dataset in sizes}
    for step in range(steps):
        if len(undisturbed.get(step, [])) != 1:
            return [f"step {step + 1}: the undisturbed run did it {len(undisturbed.get(step, []))} times"]
        expected = [h for _, rows in sorted(undisturbed[step][0].items()) for h in rows]
        if len(expected) != BATCH or any(h not in known for h in expected):
            return [f"step {step + 1}: what went through the model is not in the shards"]
        whole = 0
        for ranks in killed.get(step, []):
            rows = [h for _, rows in sorted(ranks.items()) for h in rows]
            if len(rows) == BATCH:  # the order of the step, too, is the same on any number of ranks
                whole += 1
                if rows != expected:
                    problems.append(f"step {step + 1}: other sequences than in the undisturbed run")
            elif Counter(rows) - Counter(expected):
                problems.append(f"step {step + 1}: before it was killed, other sequences than in the undisturbed run")
        if not whole:
            problems.append(f"step {step + 1}: never done as a whole")
        # Exactly once an epoch: no sample comes again before all others of its dataset have come as often.
        count.update(known[h] for h in expected)
        for dataset, size in sizes.items():
            of_it = [count[key] for key in known.values() if key[0] == dataset]
            if max(of_it) - min(of_it) > 1:
                problems.append(f"step {step + 1}: dataset {dataset + 1} repeats a sample within an epoch")
            passes[dataset] = sum(of_it) / size
    print(f"sequences    {steps} steps x {BATCH}, looked up in the shards; "
          + ", ".join(f"{p:.2f} epochs of {sizes[d]} samples" for d, p in passes.items())
          + f"; {sum(len(a) for a in killed.values()) - steps} repetitions of a step: "
          + ("all the same" if not problems else f"{len(problems)} DIFFER"))
    return problems


def compare_losses(a: Path, b: Path, steps: int) -> list[str]:
    records = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (a, b)]
    problems = [f"{path}/metrics.jsonl: not each step once" for path, lines in zip((a, b), records)
                if [r["step"] for r in lines] != list(range(1, steps + 1))]
    if problems:
        return problems
    for key in ("loss", "grad_norm", "val_loss"):
        differences = [(abs(x[key] - y[key]) / abs(x[key]), x["step"]) for x, y in zip(*records) if key in x]
        largest, step = max(differences)
        wrong = largest > LOSSES and key != "grad_norm"
        print(f"{key:<12} {len(differences)} values, largest relative difference {largest:.1e}, in step {step}"
              + (f": MORE than {LOSSES:.0e}" if wrong else ""))
        if wrong:
            problems.append(f"{key} of step {step} differs by {largest:.1e}")
    first, last = (records[0][i]["loss"] for i in (0, -1))
    print(f"             it learned: {first:.3f} -> {last:.3f}")
    return problems


def compare_weights(a: Path, b: Path) -> list[str]:
    from nanogpt.generate import load_run
    (one, _, _), (other, _, _) = load_run(a), load_run(b)
    largest, name = max((((p - q).norm() / p.norm().clamp(min=1e-12)).item(), n) for (n, p), q in
                        zip(one.state_dict().items(), other.state_dict().values()))
    wrong = largest > WEIGHTS
    print(f"weights      {sum(p.numel() for p in one.parameters()):,}, largest relative difference of a tensor {largest:.1e}, "
          f"{name}" + (f": MORE than {WEIGHTS:.0e}" if wrong else ""))
    return [f"{name} differs by {largest:.1e}"] if wrong else []


# ---- from shards to verdict -----------------------------------------------------------------------------------------

def make_data(folder: Path, choose: random.Random, steps: int) -> tuple[Path, list[Path]]:
    """A config, and the datasets it reads: one, or a mixture of one cut in blocks and one in shifted windows.

    About three epochs in `steps` steps.
    """
    kind = choose.choice(["one dataset", "a random mixture", "a stratified mixture"])
    made = []
    words = steps * BATCH * BLOCK // 18  # of 6 characters
    for name, count, stride in (("a", words, BLOCK), ("b", words // 4, BLOCK * 5 // 8))[:1 if kind == "one dataset" else 2]:
        drawn = (f"{choose.choice(('yes', 'no', 'not', 'one', 'all'))}{choose.randrange(1000)}" for _ in range(count))
        text = " ".join(drawn)
        (folder / f"{name}.txt").write_text(text)
        made.append(folder / name)
        subprocess.run([sys.executable, str(ROOT / "tools" / "convert_text_to_mds.py"), "--input", str(folder / f"{name}.txt"),
                        "--out", str(made[-1]), "--tokenizer", "byte", "--block-size", str(BLOCK), "--stride", str(stride),
                        "--val-fraction", "0.2"], check=True, stdout=subprocess.DEVNULL)
    if len(made) == 1:
        data = f"path: {made[0]}"
    else:
        data = (f"train: [{{path: {made[0]}, proportion: 0.7}}, {{path: {made[1]}, proportion: 0.3}}], "
                f"mixture: {kind.split()[1]}")
    nodes, algo = choose.choice([1, 3, 8]), choose.choice(["py1e", "py1br", "py1s"])
    # No biases: that of the keys cancels out in softmax, so its gradient is rounding alone, which AdamW makes steps of.
    config = folder / "config.yaml"
    config.write_text(f"""
data: {{{data}, num_canonical_nodes: {nodes}, shuffle_algo: {algo}, shuffle_seed: {choose.randrange(1000)}}}
model: {{n_layer: 2, n_head: 2, n_embd: 32, block_size: {BLOCK}, bias: false}}
optim: {{learning_rate: 1.0e-3, warmup_steps: 5}}
train: {{global_batch_size: {BATCH}, precision: float32, compile: false}}
eval: {{interval: 4, sequences: 48}}
checkpoint: {{interval: 3, keep_last: 2}}
log: {{interval: 1}}
""")
    print(f"data         {kind}, {algo} over {nodes} canonical nodes")
    return config, made


def prove(folder: Path, kills: int, seed: int):
    choose = random.Random(seed)
    steps = 6 * kills + 30
    print(f"seed         {seed}")
    config, datasets = make_data(folder, choose, steps)
    undisturbed, killed = (Trial(folder / name, config, steps) for name in ("undisturbed", "killed"))
    if undisturbed.finish(undisturbed.start(dict(ranks=1, micro=BATCH, strategy="full"))):
        raise UserError(f"the undisturbed run failed; see {undisturbed.out.name}")
    print(f"undisturbed  {steps} steps on 1 rank\n")
    again = killed_run(killed, kills, choose)
    print()
    problems = compare_samples(recorded(undisturbed), recorded(killed), steps, read_shards(datasets))
    problems += compare_losses(undisturbed.folder / "run", killed.folder / "run", steps)
    problems += compare_weights(undisturbed.folder / "run", killed.folder / "run")
    print(f"restarts     {kills}, of which {again} needed a second attempt")
    if again * 100 > kills:
        problems.append(f"{again} of {kills} restarts needed a second attempt")
    if problems:
        raise UserError("\n".join(problems[:20] + [f"{len(problems)} differences, in {folder}"]))
    print(f"\nproved: {kills} kills, and the run is the same")


# ---- is a late start as quick? --------------------------------------------------------------------------------------

def start_times(folder: Path, repeats: int, seed: int):
    """Resumes at step 10 and at step 100,000 in turn, and compares the seconds until the first step is done."""
    import statistics

    from nanogpt import checkpoint
    from nanogpt.config import load_config
    from nanogpt.stream import TrainStream
    config, _ = make_data(folder, random.Random(seed), 100)
    early, late = 10, 100_000
    trial = Trial(folder / "early", config, early)
    layout = dict(ranks=1, micro=BATCH, strategy="full")
    if trial.finish(trial.start(layout)):
        raise UserError(f"the run failed; see {trial.out.name}")
    # The same checkpoint, but of a run that is at step 100,000 and has logged each of them.
    run_folder = folder / "late" / "run"
    shutil.copytree(folder / "early" / "run", run_folder)
    there = run_folder / "checkpoints" / f"step-{late:08d}"
    os.rename(checkpoint.find(run_folder), there)
    for other in checkpoint.published(there.parent)[:-1]:
        shutil.rmtree(other)
    state = checkpoint.read_state(there)
    stream = TrainStream(load_config([str(config), f"--train.max_steps={late}", f"--train.micro_batch_size={BATCH}"]))
    state |= dict(step=late, tokens=late * BATCH * BLOCK, next_samples=stream.fingerprint(late))
    (there / "state.json").write_text(json.dumps(state))
    checkpoint.write_manifest(there)
    line = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line | {"step": s}) + "\n" for s in range(1, late + 1)))
    seconds = {early: [], late: []}
    for repeat in range(repeats):
        for step in (early, late):
            place = folder / f"{step}-{repeat}"
            shutil.copytree(folder / ("early" if step == early else "late") / "run", place / "run")
            trial = Trial(place, config, step + 1)
            began = time.monotonic()
            process = trial.start(layout)
            while process.poll() is None and f"step {step + 1}" not in trial.said():
                time.sleep(0.005)
            seconds[step].append(time.monotonic() - began)
            if trial.finish(process) or trial.resumed_from() != str(step):
                raise UserError(f"the resume at step {step} failed; see {trial.out.name}")
            shutil.rmtree(place)
    for step, times in seconds.items():
        print(f"resume at step {step:>7,}: {statistics.median(times):.2f} s until the next step is done, median of {repeats} "
              f"({min(times):.2f} to {max(times):.2f})")
    print(f"ratio {statistics.median(seconds[late]) / statistics.median(seconds[early]):.3f}")


def main():
    if sys.argv[1:2] == ["--rank"]:
        return rank(Path(sys.argv[2]), sys.argv[4:])
    parser = Parser(description=__doc__, epilog="Status 0: nothing differs.")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often the run is killed")
    parser.add_argument("--seed", type=int, default=None, metavar="N",
                        help="of data, moments and layouts; drawn if not given")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR",
                        help="a new folder that keeps all of it; else removed")
    parser.add_argument("--start-times", action="store_true", help="compare the start at step 100,000 with that at step 10")
    args = parser.parse_args()
    if args.kills < 1:
        raise UserError(f"--kills: {args.kills} is below 1")
    if args.out and args.out.exists():
        raise UserError(f"--out: {args.out} exists already; give a new folder")
    import torch  # noqa: F401 — where it is not installed, `run` tells, before anything is begun
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    folder = (args.out or Path(tempfile.mkdtemp(prefix="prove_resume."))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if args.start_times:
            start_times(folder, 5, seed)
        else:
            prove(folder, args.kills, seed)
    except UserError as error:
        raise UserError(f"{error}\nseed {seed}; everything is kept in {folder}") from None
    if not args.out:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run(main)
