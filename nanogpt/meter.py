"""What a run measures of itself, and says in a line. Speed is measured over the training steps alone.

Goodput is the share of the time since the run was first started that became training: the time of its steps, each once,
and without the first after each start, which compiles. What is lost: evaluations, saves, starts, steps done again after
a kill, and all the time in which nothing ran. Both times outlive a kill, one in RUN/.started, one in the checkpoints.
"""

import contextlib
import math
import resource
import time
from pathlib import Path

import torch

from nanogpt.console import Live
from nanogpt.trackers import Lines, Trackers
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
        self.text: Lines | None = None
        self.trackers: Trackers | None = None
        self.live: Live | None = None
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
            self.text = Lines(folder / "log.txt")
            for line in warnings:
                self.text.write(f"warning: {line}")
            self.trackers = Trackers(self.config, first_step, self.say)
        self.start(first_step)

    def go_live(self, first_step: int, place):
        """From here on a terminal shows, in its last line, where the run is. place: see console.Live."""
        if self.writes:
            self.live = Live(self.config, first_step, place)

    def say(self, line: str):
        """One line for the user, on the console and in log.txt."""
        if self.writes:
            print(line, flush=True)
            if self.text:
                self.text.write(line)

    def say_on_terminal(self, line: str):
        """What is worth a line there alone, above the live one."""
        if self.live and self.live.on:
            print(line, flush=True)

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
        self.warm, now = True, time.time()
        record = dict(step=step, tokens=self.tokens(step), loss=loss, learning_rate=learning_rate,
                      grad_norm=grad_norm, step_time_s=seconds / steps, tokens_per_s=tokens_per_s, mfu=mfu, hfu=hfu,
                      data_wait_fraction=self.waited / seconds, goodput=self.goodput(now),
                      memory_gib=memory_gib(self.device), time=now)
        self.start(step)
        return record

    def goodput(self, now: float) -> float | None:
        """Training time as a share of the time since the run was first started; None on ranks that do not write."""
        return self.clock["began"] and self.clock["trained_s"] / max(1e-9, now - self.clock["began"])

    # ---- words ------------------------------------------------------------------------------------------------------

    def log(self, record: dict):
        """Writes one record to metrics.jsonl, to wandb and the like and, as a line, to the console and to log.txt."""
        if not self.writes:
            return
        self.trackers.log(record)
        line = self.line(record)
        if self.live and self.live.on:
            self.live.show(record, self.left(record))
            if "train_loss" not in record:
                return self.text.write(line)  # the live line has it
        self.say(line)

    def left(self, r: dict) -> float:
        """Seconds of training to the run's end, at the speed of a record."""
        return (self.tokens(self.last_step) - r["tokens"]) / r["tokens_per_s"]

    def line(self, r: dict) -> str:
        if r["loss"] is None:
            return f"step {r['step']:>{len(str(self.last_step))}}/{self.last_step}{self.losses(r)}"
        parts = [f"step {r['step']:>{len(str(self.last_step))}}/{self.last_step}", f"loss {r['loss']:.4f}",
                 f"lr {r['learning_rate']:.2e}", f"norm {r['grad_norm']:.2f}", f"{short(r['tokens_per_s'])} tok/s",
                 f"mfu {r['mfu']:.1%}" if r["mfu"] is not None else "", f"data {r['data_wait_fraction']:.1%}",
                 f"goodput {r['goodput']:.0%}" if r["goodput"] is not None else "",
                 f"mem {r['memory_gib']:.1f} GiB", f"eta {duration(self.left(r))}"]
        return "  ".join(p for p in parts if p) + self.losses(r)

    def losses(self, r: dict) -> str:
        """What an evaluation found."""
        if "train_loss" not in r:
            return ""
        val = f" val {r['val_loss']:.4f} ({r['val_bits_per_byte']:.4f} bits/byte)" if "val_loss" in r else ""
        each = ", ".join(f"{key.partition('/')[2]} {r[key]:.4f}" for key in r if key.startswith("val_loss/"))
        return f"  | train {r['train_loss']:.4f}{val}" + (f": {each}" if each else "")

    def close(self) -> str | None:
        """Why a file of the run folder could not be written to its end; None: all are."""
        if self.live:
            self.live.close()
        if self.writes and self.text:
            problems = self.trackers.close(), self.text.close()
            return problems[0] or problems[1]
        return None
