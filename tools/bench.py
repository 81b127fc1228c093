"""How fast a config trains on this machine, and where its time and memory go.

    python tools/bench.py configs/gpt2_124m.yaml --train.global_batch_size 12     any setting of launch/train.sh
    python tools/bench.py configs/shakespeare_char.yaml --ladder                  what each thing that is switched on gains
    python tools/bench.py configs/shakespeare_char.yaml --vs-tokens-per-iter 16384 --vs \\
        'cd ../nanoGPT && python train.py config/train_shakespeare_char.py --max_iters=60 --log_interval=1'

What is timed is launch/train.sh itself, as a command, in a run folder that is thrown away: warm-up, then the timed steps,
undisturbed; then a few more with clocks around forward, backward and optimizer, a few in torch's profiler, and a
checkpoint. Where the config's data is not there, random tokens of the same vocabulary and block take its place.
"""

import contextlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THEIRS = dict(os.environ)  # of another trainer: without what the import of ours sets in it, for threads that wait
sys.path.insert(0, str(ROOT))

from nanogpt.errors import Parser, UserError, die_with_torchrun, run  # noqa: E402

PARTS, TRACED = 5, 3  # steps with clocks around their parts; steps in torch's profiler
NANOGPT = r"iter \d+: loss \S+, time ([\d.]+)ms"
UNITS = {"ms": 1e-3, "s": 1.0}  # of a step


# ---- one rank: launch/train.sh, with clocks -------------------------------------------------------------------------

def rank(folder: Path, argv: list[str]):
    """Runs launch/train.sh with argv. Rank 0 leaves what the clocks said in folder/measured.json."""
    die_with_torchrun()
    plan = json.loads((folder / "plan.json").read_text())
    found = dict(startup={}, memory={}, checkpoint={}, trace=[])
    import torch
    import torch.distributed as dist
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    import nanogpt.checkpoint
    import nanogpt.profiler
    import nanogpt.train as training
    found["startup"]["import"] = time.time() - plan["began"]
    for name in plan["without"]:
        WITHOUT[name]()
    cuda, at, data_s = False, -1, 0.0
    marks, entered, parts = [], [], {}  # parts: name -> [(step, its begin, its end)]

    def now():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(begin, end) -> float:
        return begin.elapsed_time(end) / 1e3 if cuda else end - begin

    def clocked() -> bool:
        return plan["parts"] <= at < plan["parts"] + PARTS

    @contextlib.contextmanager
    def part(name):
        begin = now() if clocked() else None
        yield
        if begin is not None:
            parts.setdefault(name, []).append((at, begin, now()))

    def enter(name):
        entered.append(part(name))
        entered[-1].__enter__()

    def leave():
        entered.pop().__exit__(None, None, None)

    def within(name, function):
        def call(*args, **kwargs):
            with part(name):
                return function(*args, **kwargs)
        return call

    def startup(name, function):
        def call(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                found["startup"][name] = time.perf_counter() - begin
        return call

    def in_parts(config, device):
        nonlocal cuda
        cuda = device.type == "cuda"
        found["memory"]["before"] = resident()
        model = build(config, device)
        model.register_forward_pre_hook(lambda *_: enter("forward"), prepend=True)  # before FSDP's own, and after them
        model.register_forward_hook(lambda *_: leave())
        found["memory"]["weights"] = size(model.parameters())
        found["device"] = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads a rank"
        return model

    def before_step(optimizer, *_):
        if clocked():
            grads = (p.grad for group in optimizer.param_groups for p in group["params"])
            found["memory"]["gradients"] = size(grad for grad in grads if grad is not None)
        enter("optimizer")

    def after_step(optimizer, *_):
        leave()
        if clocked():
            values = (value for state in optimizer.state.values() for value in state.values())
            found["memory"]["optimizer"] = size(value for value in values if torch.is_tensor(value))

    @contextlib.contextmanager
    def waiting(meter):
        nonlocal data_s
        start = time.perf_counter()
        with waiting_for_data(meter):
            yield
        data_s += (time.perf_counter() - start) * (plan["warmup"] <= at < plan["warmup"] + plan["steps"])

    def save(saver, model, optimizer, state):
        for name, background in (("first", True), ("sync", False), ("async", True)) if plan["checkpoint"] else ():
            saver.async_save, start = background, time.perf_counter()
            saver_save(saver, model, optimizer, state)
            found["checkpoint"][f"{name}_stall_s"] = time.perf_counter() - start
            saver.wait()
            found["checkpoint"][f"{name}_s"] = time.perf_counter() - start
        found["checkpoint"]["bytes"] = size(nanogpt.checkpoint.tensors(model, optimizer).values())

    def steps(of, config, device, meter, guard):
        nonlocal at
        begun = time.perf_counter()
        for at in profiled(of, config, device, meter, guard):
            if at == 1:
                found["startup"]["first step"] = time.perf_counter() - begun
                found["startup"]["all"] = time.time() - plan["began"]
            if at == plan["warmup"] and cuda:
                torch.cuda.reset_peak_memory_stats(device)
            if at == plan["warmup"] + plan["steps"]:
                found["memory"]["peak"] = torch.cuda.max_memory_allocated(device) if cuda else resident("VmHWM")
            marks.append(now())
            yield at
        if cuda:
            torch.cuda.synchronize()
        step_s = [seconds(a, b) for a, b in zip(marks, marks[1:])]
        found.update(step_s=step_s[plan["warmup"]:plan["warmup"] + plan["steps"]], data_s=data_s,
                     tokens_per_step=config.tokens_per_step, flops_per_token=meter.flops_per_token,
                     recomputed=meter.recomputed, peak_flops=meter.peak, world_size=dist.get_world_size())
        found["parts"] = {"whole": step_s[plan["parts"]:plan["parts"] + PARTS]} | {
            name: [sum(seconds(a, b) for step, a, b in those if step == plan["parts"] + i) for i in range(PARTS)]
            for name, those in parts.items()}
        if meter.writes:
            (folder / "measured.json").write_text(json.dumps(found))

    def summary(events):
        found["trace"] = nanogpt_summary(events)
        return found["trace"]

    build, training.build = training.build, startup("model", in_parts)
    profiled, training.profiled = training.profiled, steps
    nanogpt_summary, nanogpt.profiler.summary = nanogpt.profiler.summary, summary
    saver_save, nanogpt.checkpoint.Saver.save = nanogpt.checkpoint.Saver.save, save
    waiting_for_data, training.Meter.waiting_for_data = training.Meter.waiting_for_data, waiting
    training.init_process_group = startup("process group", training.init_process_group)
    training.TrainStream = startup("data", training.TrainStream)
    training.gradient_norm = within("gradient norm", training.gradient_norm)
    torch.autograd.backward = within("backward", torch.autograd.backward)
    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)
    sys.argv = [str(ROOT / "launch" / "train.sh"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def size(tensors) -> int:
    """Bytes of this rank's part of them."""
    return sum(t.nbytes for t in (getattr(t, "_local_tensor", t) for t in tensors))


def resident(field: str = "VmRSS") -> int:
    """Bytes of memory of this process, now, or at most so far (VmHWM); 0 where there is no /proc."""
    with contextlib.suppress(OSError):
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    return 0


# What has no setting, because nobody wants it off but to see what it gains.

def whole_logits():
    from nanogpt import loss
    loss.CHUNK_LOGITS = 1 << 62


def plain_optimizer():
    """AdamW, one parameter after the other; it neither clips nor leaves out a step that is not finite."""
    from torch.optim import AdamW
    init, step = AdamW.__init__, AdamW.step

    def unguarded(self, *args):
        self.grad_scale = self.found_inf = None
        return step(self, *args)

    AdamW.__init__ = lambda self, *args, **kwargs: init(self, *args, **kwargs | dict(fused=False, foreach=False))
    AdamW.step = unguarded


def no_reading_ahead():
    from nanogpt.stream import TrainStream
    TrainStream.batches = lambda self, first_step, last_step, rank, world_size, device: (
        self.read(m) for step in range(first_step, last_step) for m in self.micro_batches(step, rank, world_size))


WITHOUT = {"chunks": whole_logits, "fused": plain_optimizer, "ahead": no_reading_ahead}


# ---- a run ----------------------------------------------------------------------------------------------------------

class Bench:
    """A config on this machine, with a folder for what is thrown away."""

    def __init__(self, argv: list[str], ranks: int, warmup: int, steps: int, traced: int, folder: Path):
        from nanogpt.config import load_config
        self.ranks, self.warmup, self.steps, self.traced, self.folder, self.runs = ranks, warmup, steps, traced, folder, 0
        self.config = load_config([*argv, *self.own(9)], ranks, ranks)
        self.argv = argv + stand_in(self.config, folder)

    def own(self, steps: int) -> list[str]:
        """What a measurement asks of the run: its length, and nothing beside training."""
        return [f"--train.max_steps={steps}", "--train.max_tokens=null", "--optim.warmup_steps=0",
                "--train.batch_schedule=null", "--train.block_schedule=null", "--eval.interval=0", "--eval.sequences=1",
                "--eval.patience=0", "--eval.only=false", "--checkpoint.interval=0", "--checkpoint.keep_best=false",
                "--log.wandb=off", "--run.resume=never"]

    def measure(self, options=(), without=(), fully: bool = False) -> dict:
        """One run: its figures. fully: with what comes after the timed steps. UserError: it failed."""
        self.runs += 1
        folder = self.folder / f"run{self.runs}"
        folder.mkdir()
        parts = self.warmup + self.steps
        first = parts + PARTS + 2  # from 1, after a step in which the profiler warms up
        total = first + self.traced if fully else parts + 1  # and one more, which evaluates and saves
        argv = [*self.argv, *options, *self.own(total), f"--run.dir={folder / 'run'}"]
        argv += [f"--log.profile=[{first}, {first + self.traced - 1}]"] if fully else ["--log.profile=null"]
        command = [sys.executable, str(Path(__file__).resolve()), "--rank", str(folder), "--", *argv]
        if self.ranks > 1:
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        under_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        environment = {k: v for k, v in os.environ.items() if k not in under_torchrun}
        plan = dict(warmup=self.warmup, steps=self.steps, parts=parts, checkpoint=fully, without=list(without))
        (folder / "plan.json").write_text(json.dumps(plan | dict(began=time.time())))
        with ended_with_us(command, env=environment) as process:
            said = process.communicate()[0].splitlines()
        if process.returncode or not (folder / "measured.json").exists():
            told = [line.removeprefix("error: ") for line in said if line.startswith("error: ")] or said[-1:]
            raise UserError("\n".join(told) or f"the run ended with status {process.returncode}, and said nothing")
        return json.loads((folder / "measured.json").read_text())


@contextlib.contextmanager
def ended_with_us(command, **kwargs):
    """A process whose output is read, and which ends, with its children, when we do."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", start_new_session=True, **kwargs)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stand_in(config, folder: Path) -> list[str]:
    """Options for random data in the place of what is not there: the config's block, and a vocabulary of its kind.

    That is model.vocab_size, or that of characters or bytes where the dataset's name says so, or else GPT-2's.
    """
    if all("://" in s.path or (Path(s.path) / s.split / "index.json").exists() for s in config.data.sources):
        return []
    name, block = config.data.sources[0].path, config.model.block_size
    ids = config.model.vocab_size or (66 if "char" in name else 257 if "byte" in name or "quickstart" in name else 50257)
    alphabet = [chr(0x20000 + i) for i in range(ids - 1)]  # a character an id, and end-of-text
    n = max(64, 2 * config.train.global_batch_size) * block + len(alphabet)
    text = folder / "text.txt"
    text.write_text("".join(alphabet + random.Random(0).choices(alphabet, k=n)), encoding="utf-8")
    tool = ROOT / "tools" / "convert_text_to_mds.py"
    done = subprocess.run([sys.executable, str(tool), "--input", str(text), "--out", str(folder / "data"), "--tokenizer",
                           "char", "--block-size", str(block), "--val-fraction", "0.05"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"no data to measure with: {done.stderr.strip()}")
    print(f"data        {name} is not there: random tokens of {ids:,} ids in its place", flush=True)
    return [f"--data.path={folder / 'data'}", "--data.train=null", "--data.tokenizer=null"]


def figures(m: dict, peak_tflops: float | None) -> dict:
    """What is shown and kept of a run. Times in ms, memory in MiB."""
    step = statistics.median(m["step_s"])
    tokens_per_s = m["tokens_per_step"] / step
    peak = peak_tflops * 1e12 if peak_tflops else m["peak_flops"]
    mfu = tokens_per_s * m["flops_per_token"] / (peak * m["world_size"]) if peak else None
    shown = dict(tokens_per_s=tokens_per_s, step_ms=step * 1e3, step_ms_p95=percentile(m["step_s"], 0.95) * 1e3,
                 steps=len(m["step_s"]), tokens_per_step=m["tokens_per_step"], ranks=m["world_size"], device=m["device"],
                 tflops_per_rank=tokens_per_s * m["flops_per_token"] / m["world_size"] / 1e12, mfu=mfu,
                 hfu=mfu and mfu * (1 + m["recomputed"] / m["flops_per_token"]), peak_tflops=peak and peak / 1e12,
                 data_wait=m["data_s"] / sum(m["step_s"]), peak_mib=m["memory"]["peak"] / 2**20, startup_s=m["startup"])
    if m["trace"]:
        of_steps = dict(m["parts"])
        whole = of_steps.pop("whole")
        of_steps["the rest"] = [step - sum(those) for step, *those in zip(whole, *of_steps.values())]
        parts = {name: statistics.median(values) * 1e3 for name, values in of_steps.items()}
        waits = [sum(n for name, n in step["waits"].items() if name != "aten::item") for step in m["trace"]]
        shown |= dict(parts_ms=parts, memory_mib={
            name: n / 2**20 for name, n in m["memory"].items()}, checkpoint=m["checkpoint"], waits_per_step=waits,
            communication_ms=statistics.median(s["communication_s"] for s in m["trace"]) * 1e3,
            exposed_ms=statistics.median(s["exposed_s"] for s in m["trace"]) * 1e3)
    return shown


def percentile(values: list[float], p: float) -> float:
    """The smallest of the values that at least the share p of them does not exceed."""
    return sorted(values)[max(0, -int(-p * len(values) // 1) - 1)]


def show(f: dict):
    cuda = not f["device"].startswith("CPU")
    print(f"device      {f['ranks']} x {f['device']}")
    print(f"speed       {f['tokens_per_s']:,.0f} tokens/s; a step of {f['tokens_per_step']:,} tokens takes "
          f"{f['step_ms']:.2f} ms (median of {f['steps']}), {f['step_ms_p95']:.2f} ms at the 95th percentile")
    print(f"            {f['tflops_per_rank']:.3g} TFLOP/s a rank" + (
        f", MFU {f['mfu']:.1%}, HFU {f['hfu']:.1%} of {f['peak_tflops']:g}" if f["mfu"] else
        "; no MFU: the peak of this device is not known (--peak-tflops)"))
    print("a step      " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in f["parts_ms"].items())
          + f"; waiting for data {f['data_wait']:.2%}")
    print(f"            communication {f['communication_ms']:.2f} ms, {f['exposed_ms']:.2f} ms of them with nothing computed beside"
          + (f"; the host waited for the device {f['waits_per_step']} times in the traced steps" if cuda else ""))
    c, m = f["checkpoint"], f["memory_mib"]
    print(f"checkpoint  in the background the loop stands still for {c['async_stall_s'] * 1e3:.0f} ms, else for "
          f"{c['sync_stall_s'] * 1e3:.0f} ms ({c['async_stall_s'] / c['sync_stall_s']:.1%}); "
          f"written after {c['async_s']:.2f} s; until then a copy takes {c['bytes'] / 2**20:.1f} MiB of host memory")
    states = m["weights"] + m["gradients"] + m["optimizer"]
    base = 0 if cuda else m["before"]
    print(f"memory      weights {m['weights']:.1f} MiB, gradients {m['gradients']:.1f}, optimizer {m['optimizer']:.1f}"
          + ("" if cuda else f", libraries and data {base:.1f}")
          + f", the rest {m['peak'] - states - base:.1f}: {m['peak']:.1f} at most")
    s = dict(f["startup_s"])
    whole = s.pop("all")
    known = sum(s.values())
    print("startup     " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in s.items())
          + f", the rest {whole - known:.2f} s: {whole:.2f} s until the first step is done")


# ---- one thing at a time --------------------------------------------------------------------------------------------

def rungs(config) -> list[tuple[str, dict, set, bool]]:
    """(what is switched on, settings, what has no setting and is off, whether it stays on). Each has all that stayed before.

    On this machine a precision, or compiling, that the config does not have here is tried, and switched off again.
    """
    import torch

    from nanogpt import loss
    from nanogpt.model import padded
    from nanogpt.ranks import settle_precision
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    here = config.train.model_copy()
    settle_precision(here, device)
    settings, without = {"train.precision": "float32", "train.compile": "false"}, set(WITHOUT)
    found = [("float32, whole logits, AdamW tensor by tensor, no reading ahead", dict(settings), set(without), True)]

    def switch(what, on=(), off="", stays=True):
        nonlocal settings
        with_it = settings | dict(on)
        without.discard(off)
        found.append((what, with_it, set(without), stays))
        settings = with_it if stays else settings

    logits = config.train.micro_batch_size * config.model.block_size * padded(config.model.vocab_size or 1)
    switch("bfloat16", {"train.precision": "bfloat16"}, stays=here.precision == "bfloat16")
    switch("AdamW in one fused kernel", off="fused")
    if logits > loss.CHUNK_LOGITS:  # else there is but one chunk
        switch("loss in chunks", off="chunks")
    switch("data read ahead", off="ahead")
    switch("compiled, block by block", {"train.compile": "true"}, stays=here.compiles(device.type == "cuda"))
    return found


def ladder(bench: Bench, repeats: int) -> list[dict]:
    """Measures all rungs in turn, so often. Prints the table."""
    steps = rungs(bench.config)
    runs = [[] for _ in steps]
    for i in range(repeats):
        for those, (what, settings, without, _) in zip(runs, steps):
            those.append(figures(bench.measure([f"--{key}={value}" for key, value in settings.items()], without), None))
            print(f"  {i + 1}/{repeats}  {those[-1]['tokens_per_s']:>12,.0f} tokens/s  {what}", file=sys.stderr, flush=True)
    rows = [dict(what=what, stays=stays, tokens_per_s=statistics.median(f["tokens_per_s"] for f in those),
                 peak_mib=statistics.median(f["peak_mib"] for f in those), runs=[f["tokens_per_s"] for f in those])
            for (what, _, _, stays), those in zip(steps, runs)]
    device = f"{runs[0][0]['ranks']} x {runs[0][0]['device']}"
    print(f"| {device} | tokens/s | x before | x first | memory, MiB |\n|---|---|---|---|---|")
    before = first = rows[0]["tokens_per_s"]
    for i, row in enumerate(rows):
        row |= dict(before=row["tokens_per_s"] / before, first=row["tokens_per_s"] / first)
        sign, left_out = "+ " * (i > 0), "" if row["stays"] else " (left out from here on)"
        print(f"| {sign}{row['what']}{left_out} | {row['tokens_per_s']:,.0f} | {row['before']:.2f} | {row['first']:.2f} | "
              f"{row['peak_mib']:,.0f} |")
        before = row["tokens_per_s"] if row["stays"] else before
    return rows


# ---- side by side ---------------------------------------------------------------------------------------------------

def other_speeds(text: str, pattern: str, unit: str, tokens_per_iter: int | None, skip: int) -> list[float]:
    """Tokens a second of each line of another trainer's output that the pattern finds, but for the first `skip`.

    The pattern's first group is a number: the time of an iteration, in ms or s, or tokens a second (1.2k, 3M too).
    """
    found = []
    for number in re.findall(pattern, text):
        number = (number if isinstance(number, str) else number[0]).replace(",", "")
        scale = {"k": 1e3, "K": 1e3, "M": 1e6}.get(number[-1:], 1.0)
        try:
            value = float(number[:-1] if scale > 1 else number) * scale
        except ValueError:
            raise UserError(f"--vs-regex: finds {number!r:.60}, which is no number") from None
        found.append(value if unit == "tokens/s" else tokens_per_iter / max(1e-12, value * UNITS[unit]))
    return found[skip:]


def other(command: str, *reading) -> float:
    """The median speed of another trainer, tokens a second. UserError: it failed, or said nothing that is understood."""
    with ended_with_us(["bash", "-c", command], env=THEIRS) as process:
        said = process.communicate()[0]
    if process.returncode:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"--vs: the command ended with status {process.returncode}: {last[:300]}")
    speeds = other_speeds(said, *reading)
    if not speeds:
        raise UserError(f"--vs: no line of its output, but for the first {reading[-1]} that count as warm-up, fits "
                        f"{reading[0]!r}; let it run longer, or give --vs-regex")
    return statistics.median(speeds)


def versus(bench: Bench, args) -> dict:
    """Both in turn, so often; the ratio of each pair."""
    reading = args.vs_regex, args.vs_unit, args.vs_tokens_per_iter, args.vs_skip
    ours, theirs = [], []
    for i in range(args.repeats):
        ours.append(figures(bench.measure(), None)["tokens_per_s"])
        theirs.append(other(args.vs, *reading))
        print(f"  {i + 1}/{args.repeats}  {ours[-1]:>12,.0f} tokens/s here  {theirs[-1]:>12,.0f} there  "
              f"ratio {ours[-1] / theirs[-1]:.2f}", file=sys.stderr, flush=True)
    ratios = [a / b for a, b in zip(ours, theirs)]
    print(f"here {statistics.median(ours):,.0f} tokens/s, there {statistics.median(theirs):,.0f}: "
          f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} turns)")
    return dict(ours=ours, theirs=theirs, ratio=statistics.median(ratios), ratios=ratios)


# ---- command --------------------------------------------------------------------------------------------------------

def settings_apart(argv: list[str]) -> tuple[list[str], list[str]]:
    """(our own options, `--section.key value`s)"""
    ours, theirs, i = [], [], 0
    while i < len(argv):
        option, equals, _ = argv[i].partition("=")
        n = 1
        if option.startswith("--") and "." in option:
            n += not equals and i + 1 < len(argv) and not argv[i + 1].startswith("--")
            theirs += argv[i:i + n]
        else:
            ours.append(argv[i])
        i += n
    return ours, theirs


def default_ranks() -> int:
    return max(1, runpy.run_path(str(ROOT / "launch" / "train.sh"))["local_gpus"]())


def main():
    if sys.argv[1:2] == ["--rank"]:
        return rank(Path(sys.argv[2]), sys.argv[4:])
    parser = Parser(description=__doc__, allow_abbrev=False,
                    usage="bench.py CONFIG [options] [--section.key value …]",
                    epilog="Settings of the config follow as --section.key value; launch/train.sh --help lists them.")
    parser.add_argument("config", metavar="CONFIG", help="as configs/gpt2_124m.yaml")
    parser.add_argument("--steps", type=int, default=50, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes (default: the GPUs of this machine, else 1)")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="of a device, in bfloat16, where our table lacks it")
    parser.add_argument("--ladder", action="store_true", help="one thing after the other switched on, as a Markdown table")
    parser.add_argument("--vs", metavar="CMD", help="another trainer's command, which takes turns with ours")
    parser.add_argument("--vs-tokens-per-iter", type=int, metavar="N", help="tokens of one of its iterations")
    parser.add_argument("--vs-regex", default=NANOGPT, help="finds the number in its output")
    parser.add_argument("--vs-unit", default="ms", choices=["ms", "s", "tokens/s"],
                        help="of that number: the time of an iteration, or a speed")
    parser.add_argument("--vs-skip", type=int, default=5, metavar="N", help="of its lines, so many are warm-up")
    parser.add_argument("--repeats", type=int, default=3, help="turns of --ladder and --vs")
    parser.add_argument("--profile", type=int, metavar="STEPS", help="keep a trace of so many steps, in ./profile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures, for programs")
    ours, settings = settings_apart(sys.argv[1:])
    args = parser.parse_args(ours)
    for name, least in (("steps", 1), ("warmup", 2), ("ranks", 1), ("repeats", 1), ("profile", 1), ("vs_skip", 0),
                        ("vs_tokens_per_iter", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: {value} is below {least}")
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise UserError(f"--peak-tflops: {args.peak_tflops} is not above 0")
    if args.ladder and args.vs:
        raise UserError("--ladder and --vs: one at a time")
    if args.vs and args.vs_unit in UNITS and not args.vs_tokens_per_iter:
        raise UserError("--vs-tokens-per-iter: how many tokens has an iteration of the other trainer? Give batch x "
                        "accumulation x block")
    try:
        if re.compile(args.vs_regex).groups < 1:
            raise UserError(f"--vs-regex: {args.vs_regex!r} has no group (…) around the number")
    except re.error as error:
        raise UserError(f"--vs-regex: {args.vs_regex!r} is no regular expression ({error})") from None

    with tempfile.TemporaryDirectory(prefix="bench.") as folder:
        bench = Bench([args.config, *settings], args.ranks or default_ranks(), args.warmup, args.steps,
                      args.profile or TRACED, Path(folder))
        if args.ladder:
            result = ladder(bench, args.repeats)
        elif args.vs:
            result = versus(bench, args)
        else:
            result = figures(bench.measure(fully=True), args.peak_tflops)
            show(result)
        if args.profile and not (args.ladder or args.vs):
            shutil.copytree(Path(folder) / "run1" / "run" / "profile", "profile", dirs_exist_ok=True)
            print("profile     " + ", ".join(f"profile/{p.name}" for p in sorted(Path("profile").glob("steps-*"))))
    if args.json:
        try:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json: {args.json}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run(main)
