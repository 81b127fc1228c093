"""What a run tells: console and log.txt, metrics.jsonl, wandb. Speed is measured over the training steps alone.

Goodput is the share of the time since the run was first started that became training: the time of its steps, each once,
and without the first after each start, which compiles. What is lost: evaluations, saves, starts, steps done again after
a kill, and all the time in which nothing ran. Both times outlive a kill, one in RUN/.started, one in the checkpoints.
"""

import contextlib
import json
import math
import os
import resource
import statistics
import sys
import time
import uuid
from pathlib import Path

import torch

from nanogpt.words import duration, short

# Dense bfloat16 tensor-core peaks in TFLOP/s, from the vendors' data sheets; the first name found in the device's
# own name counts, so the longer names come first.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989,
    "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10": 125, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71, "RTX A6000": 155, "RTX 6000 Ada": 364,
    "MI300X": 1307, "MI250X": 383,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak bfloat16 FLOP/s of the device that is really there; None where it is not in the table, or a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)


def memory_gib(device: torch.device) -> float:
    """Largest memory so far in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def recomputed_flops(model, activation_checkpointing: str) -> int:
    """FLOPs a token that backward does again: the blocks' forward, 2 N + 4 L H Q T, or nothing that counts (selective)."""
    if activation_checkpointing != "full":
        return 0
    (H, _, D), c = model.config.heads, model.config
    return 2 * sum(p.numel() for p in model.transformer.h.parameters()) + 4 * c.n_layer * H * D * c.block_size


def first_start(folder: Path) -> float:
    """When training first began in a run folder, in seconds since 1970: now, if it never has."""
    file, now = folder / ".started", time.time()
    with contextlib.suppress(OSError), open(file, "x") as new:  # there already, or a full disk
        new.write(f"{now}\n")
    try:
        return then if 0 < (then := float(file.read_text())) <= now else now
    except (OSError, ValueError):
        return now


class Meter:
    """Times the loop and writes what it is given. Only rank 0 writes; all ranks may call everything."""

    def __init__(self, config, device: torch.device, world_size: int, flops_per_token: int, writes: bool, state: dict,
                 recomputed: int = 0):
        self.config, self.device, self.world_size, self.writes = config, device, world_size, writes
        self.flops_per_token, self.recomputed, self.peak = flops_per_token, recomputed, peak_flops(device)
        self.clock, self.warm = state["clock"], False
        self.metrics, self.text, self.wandb = None, None, None
        self.last_step = config.max_steps
        self.era = state["data_history"][-1]  # since then, tokens follow from the config

    def tokens(self, step: int) -> int:
        """Tokens trained on in the first `step` steps."""
        sequences = self.config.train.sequences
        return self.era["tokens"] + (sequences(step) - sequences(self.era["from_step"])) * self.config.model.block_size

    def open(self, first_step: int, warnings: list[str]):
        """Opens the run folder's files, and takes back what was logged past first_step (the run goes on from there).

        warnings: what was told before there was a log.
        """
        if self.writes:
            folder = self.config.run_dir
            self.clock["began"] = min(self.clock["began"] or math.inf, first_start(folder))
            take_back(folder / "metrics.jsonl", first_step or -1)  # a new run logs its step 0 anew
            self.metrics, self.text = Lines(folder / "metrics.jsonl"), Lines(folder / "log.txt")
            for line in warnings:
                self._write(self.text, f"warning: {line}")
            self._open_wandb(folder)
        self.start(first_step)

    def _open_wandb(self, folder: Path):
        c = self.config
        if c.log.wandb == "off":
            return
        try:
            import wandb
            id_file = folder / "wandb_id"  # a resumed run goes on in the same curve
            if not id_file.exists():
                id_file.write_text(uuid.uuid4().hex[:12])
            self.wandb = wandb.init(project=c.log.wandb_project, name=c.run.name, id=id_file.read_text().strip(),
                                    dir=str(folder), mode=c.log.wandb, config=c.model_dump(),
                                    resume="allow" if c.log.wandb == "online" else None)
        except Exception as error:
            self.say(f"warning: wandb is off for this run ({type(error).__name__}: {error})")

    def say(self, line: str):
        """One line for the user, on the console and in log.txt."""
        if self.writes:
            print(line, flush=True)
            if self.text:
                self._write(self.text, line)

    def _write(self, file: "Lines", line: str):
        """A full disk does not end a run: what could not be written is written with the next line, if it can be."""
        was = file.problem
        file.write(line)
        if file.problem and not was:
            print(f"warning: {file.path}: cannot be written ({file.problem}); kept in memory, and tried again",
                  file=sys.stderr, flush=True)

    # ---- time -------------------------------------------------------------------------------------------------------

    def start(self, step: int):
        """Begins a window of steps after `step`."""
        self.window_step, self.window_start = step, time.perf_counter()
        self.waited = self.paused = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self):
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def not_training(self):
        """Evaluation and saving do not count as training time."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def record(self, step: int, loss: float, learning_rate: float, grad_norm: float) -> dict:
        """The metrics of the window that ends with `step` steps done. Call it once the device has finished them."""
        steps = max(1, step - self.window_step)
        seconds = max(1e-9, time.perf_counter() - self.window_start - self.paused)
        tokens_per_s = (self.tokens(step) - self.tokens(step - steps)) / seconds
        mfu = tokens_per_s * self.flops_per_token / (self.peak * self.world_size) if self.peak else None
        hfu = mfu * (1 + self.recomputed / self.flops_per_token) if mfu else None
        self.clock["trained_s"] += seconds * self.warm  # the first step of a start compiles: its time is lost
        self.warm = True
        record = dict(step=step, tokens=self.tokens(step), loss=loss, learning_rate=learning_rate,
                      grad_norm=grad_norm, step_time_s=seconds / steps, tokens_per_s=tokens_per_s, mfu=mfu, hfu=hfu,
                      data_wait_fraction=self.waited / seconds, goodput=self.goodput(),
                      memory_gib=memory_gib(self.device), time=time.time())
        self.start(step)
        return record

    def goodput(self) -> float | None:
        """Training time as a share of the time since the run was first started; None on ranks that do not write."""
        return self.clock["began"] and self.clock["trained_s"] / max(1e-9, time.time() - self.clock["began"])

    # ---- words ------------------------------------------------------------------------------------------------------

    def log(self, record: dict):
        """Writes one record to metrics.jsonl, to wandb and, as a line, to the console."""
        if not self.writes:
            return
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
        self._write(self.metrics, json.dumps(finite))
        if self.wandb:
            try:
                self.wandb.log(record, step=record["step"])
            except Exception as error:
                self.wandb = None
                self.say(f"warning: wandb is off from here on ({type(error).__name__}: {error})")
        self.say(self.line(record))

    def line(self, r: dict) -> str:
        if r["loss"] is None:
            return f"step {r['step']:>{len(str(self.last_step))}}/{self.last_step}{self.losses(r)}"
        left = (self.tokens(self.last_step) - r["tokens"]) / r["tokens_per_s"]
        parts = [f"step {r['step']:>{len(str(self.last_step))}}/{self.last_step}", f"loss {r['loss']:.4f}",
                 f"lr {r['learning_rate']:.2e}", f"norm {r['grad_norm']:.2f}", f"{short(r['tokens_per_s'])} tok/s",
                 f"mfu {r['mfu']:.1%}" if r["mfu"] is not None else "", f"data {r['data_wait_fraction']:.1%}",
                 f"goodput {r['goodput']:.0%}" if r["goodput"] is not None else "",
                 f"mem {r['memory_gib']:.1f} GiB", f"eta {duration(left)}"]
        return "  ".join(p for p in parts if p) + self.losses(r)

    def losses(self, r: dict) -> str:
        """What an evaluation found."""
        if "train_loss" not in r:
            return ""
        val = f" val {r['val_loss']:.4f} ({r['val_bits_per_byte']:.4f} bits/byte)" if "val_loss" in r else ""
        each = ", ".join(f"{key.partition('/')[2]} {r[key]:.4f}" for key in r if key.startswith("val_loss/"))
        return f"  | train {r['train_loss']:.4f}{val}" + (f": {each}" if each else "")

    def close(self):
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as error:
                self.say(f"warning: wandb did not finish ({type(error).__name__}: {error})")
        return next((file.problem for file in (self.metrics, self.text) if file and file.close()), None)


class Lines:
    """A file that is written line by line, and keeps what it could not write."""

    def __init__(self, path: Path):
        self.path, self.waiting, self.problem = path, b"", None
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, line: str):
        self.waiting += line.encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[os.write(self.fd, self.waiting):]
            self.problem = None
        except OSError as error:
            self.problem = error.strerror

    def close(self) -> bool:
        """Whether something could not be written."""
        os.close(self.fd)
        return bool(self.waiting)


def take_back(path: Path, step: int):
    """Cuts the lines of later steps off metrics.jsonl. Read from its end: as quick after 100,000 steps as after 10."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        tail, keep = b"", None
        while end and keep is None:
            start = max(0, end - (1 << 16))
            file.seek(start)
            tail, end = file.read(end - start) + tail, start
            lines = tail.splitlines(True)
            for i in range(len(lines) - 1, -1 if start == 0 else 0, -1):  # the first may be cut, unless the file begins there
                if _step(lines[i]) <= step:
                    keep = start + sum(map(len, lines[:i + 1]))
                    break
            tail = lines[0]
        file.truncate(keep or 0)
        if keep and not lines[i].endswith(b"\n"):  # whole, but for its end
            file.seek(keep)
            file.write(b"\n")


def loss_spikes(losses: list[float], new: int, recent: int) -> list[int]:
    """Which of the last `new` losses lie more than 6 standard deviations, and 0.1, above the mean of those before.

    Each is compared with up to `recent` before it, of which 32 must be there. Returns positions in `losses`.
    """
    found = []
    for i in range(max(0, len(losses) - new), len(losses)):
        before = [x for x in losses[max(0, i - recent):i] if math.isfinite(x)]
        if len(before) >= 32 and math.isfinite(losses[i]):
            if losses[i] > statistics.fmean(before) + max(6 * statistics.pstdev(before), 0.1):
                found.append(i)
    return found


def _step(line: bytes) -> int:
    """Step of a line of metrics.jsonl; one that was cut short by a crash counts as later than everything."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return sys.maxsize
