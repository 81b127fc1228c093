"""Where the time of chosen steps goes. log.profile [100, 103] makes rank 0 write, in RUN/profile:

    steps-100-103.json.gz   the trace, for ui.perfetto.dev or chrome://tracing: operators, kernels, communication
    steps-100-103.txt       in words: how often the host waited for the device, communication, the dearest operators
    steps-100-103.pickle    on CUDA, what was allocated when, for pytorch.org/memory_viz
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd import DeviceType

from nanogpt.config import Config
from nanogpt.meter import Meter
from nanogpt.watch import Watch

# What the host calls when it waits for the device. aten::item asks for a number: on the device it waits too.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
COMMUNICATION = ("nccl", "gloo:")


def profiled(steps: range, config: Config, device: torch.device, meter: Meter, guard: Watch):
    """Yields the steps, from 0; those of log.profile (from 1, as everywhere in what a user reads) are traced by rank 0.

    A large trace takes minutes to write: guard is told, as of a save, and the other ranks wait.
    """
    first, last = config.log.profile or (0, 0)
    wanted, trace = range(first - 1, last) if meter.writes else range(0), None
    try:
        for step in steps:
            if trace is None and (step in wanted or step + 1 in wanted):  # the step before warms the profiler up
                with meter.not_training():
                    trace = Trace(config.run_dir / "profile", max(step, wanted[0]), last, step not in wanted, device)
            yield step
            if trace:
                trace.step(step)
            if step + 1 == last:
                guard.at(last, "checkpoint")
                with meter.not_training():
                    if trace:
                        meter.say(f"profile     {trace.write()}")
                    dist.barrier()
                trace = None
    finally:  # the run ends before
        if trace and trace.done > trace.first:
            guard.at(trace.done, "checkpoint")
            meter.say(f"profile     {trace.write()}")


class Trace:
    """torch.profiler over the steps [first, last), after one more where warms_up."""

    def __init__(self, folder: Path, first: int, last: int, warms_up: bool, device: torch.device):
        self.folder, self.first, self.cuda = folder, first, device.type == "cuda"
        self.done = first
        kinds = torch.profiler.ProfilerActivity
        self.profile = torch.profiler.profile(
            activities=[kinds.CPU] + [kinds.CUDA] * self.cuda,
            schedule=torch.profiler.schedule(wait=0, warmup=int(warms_up), active=last - first, repeat=1))
        self.profile.start()
        if self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)

    def step(self, step: int):
        """To be called after each step."""
        self.profile.step()
        self.done = step + 1

    def write(self) -> Path:
        """The files; returns the trace's path."""
        self.profile.stop()
        self.folder.mkdir(exist_ok=True)
        name = f"steps-{self.first + 1}-{self.done}"
        path = self.folder / f"{name}.json.gz"
        if self.cuda:
            torch.cuda.memory._dump_snapshot(str(path.with_name(f"{name}.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profile.export_chrome_trace(str(path))
        sort = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        table = self.profile.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=60)
        path.with_name(f"{name}.txt").write_text(
            in_words(summary(self.profile.events())[:self.done - self.first], self.first + 1, self.cuda) + "\n" + table)
        return path


def summary(events) -> list[dict]:
    """Of each traced step: {seconds, waits: {what the host called: how often}, communication_s, exposed_s}.

    exposed_s: of the communication, that during which no other kernel runs (on a CPU: no operator; gloo has threads of its
    own). events: of torch.profiler, in whose ranges named ProfilerStep the steps lie.
    """
    host, device = ([e for e in events if (e.device_type == DeviceType.CPU) == of] for of in (True, False))
    spans = sorted((e.time_range.start, e.time_range.end) for e in host if e.name.startswith("ProfilerStep"))
    device = [e for e in device if not e.name.startswith("ProfilerStep")]
    where = device or host
    talks = union([e for e in where if is_communication(e.name)])
    computes = union([e for e in where if not is_communication(e.name) and (device or e.name.startswith("aten::"))])
    found = []
    for start, end in spans:
        waits = [e.name for e in host if e.name in WAITS and start <= e.time_range.start < end]
        talk, both = clipped(talks, start, end), length(overlap(clipped(talks, start, end), computes))
        found.append(dict(seconds=(end - start) / 1e6, waits={name: waits.count(name) for name in WAITS if name in waits},
                          communication_s=length(talk) / 1e6, exposed_s=(length(talk) - both) / 1e6))
    return found


def is_communication(name: str) -> bool:
    return name.lower().startswith(COMMUNICATION)


def union(events) -> list[tuple[float, float]]:
    """The times at which at least one of the events is under way, as intervals in order."""
    merged = []
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def overlap(a, b) -> list[tuple[float, float]]:
    """The intersection of two such lists."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return found


def clipped(intervals, start: float, end: float):
    return overlap(intervals, [(start, end)])


def length(intervals) -> float:
    return sum(end - start for start, end in intervals)


def in_words(steps: list[dict], first: int, cuda: bool) -> str:
    lines = []
    for number, step in enumerate(steps, start=first):
        waits = ", ".join(f"{name} {n} times" for name, n in step["waits"].items()) or "never"
        lines.append(f"step {number}: {step['seconds'] * 1e3:.2f} ms on the host; communication "
                     f"{step['communication_s'] * 1e3:.2f} ms, {step['exposed_s'] * 1e3:.2f} ms of them alone; "
                     + (f"the host waited for the device: {waits}" if cuda else f"numbers asked for (aten::item): {waits}"))
    lines.append("A wait is meant to be where a log line is due, and nowhere else." if cuda else
                 "There is no device that the host could wait for.")
    return "\n".join(lines) + "\n"
