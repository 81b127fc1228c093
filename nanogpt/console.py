"""What a run says on a screen: the table at its start, each warning once, and on a terminal a last line that is alive.

    ████▎       42%  step 253/600  loss 2.8931  ▆▄▅█▆▆▂▁▃▆▂▁  lr 4.01e-04  20.1k tok/s  mem 0.3 GiB  eta 0:04  saves in 147 (0:01)

Whatever else is printed goes above that line and stays. The cursor waits at the line's first character, from where the
terminal itself erases to the end of the screen: so nothing stays behind when the window gets narrower and the line is
wrapped. (tqdm's cursor waits behind the line: there, a piece of it would be left.)

In a file, a pipe, CI, or on a terminal that calls itself dumb: plain lines, and no control codes.
"""

import contextlib
import logging
import os
import sys
import textwrap
import threading
import time
import warnings
from collections import deque

from nanogpt.config import Config
from nanogpt.words import duration, short

UNICODE, ASCII = (" ▏▎▍▌▋▊▉█", "▁▂▃▄▅▆▇█"), (" -=#", "_.-~=+*#")  # a cell of the bar as it fills; a sparkline from low to high


def lives(stream) -> bool:
    """Whether a line can be drawn anew there."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and \
        os.environ.get("CI", "") in ("", "0", "false")


def knows_unicode(stream) -> bool:
    """By its encoding, and by the locale: in that of C, Python takes UTF-8 nevertheless, and the terminal may not."""
    locale = next((value for name in ("LC_ALL", "LC_CTYPE", "LANG") if (value := os.environ.get(name))), "utf-8")
    return "utf" in locale.lower() and "utf" in (stream.encoding or "").lower()


class Live:
    """The last line of a terminal. A thread draws it from what the loop has left for it: nobody waits, for the device or for a
    slow terminal. Time moves on, and so does the step: the host's, which may be a few ahead of the device's.
    """
    EVERY_S = 0.5

    def __init__(self, config: Config, first_step: int, place):
        """place.step, .phase, .first: where the loop is, as in watch.Watch. Without a terminal it does nothing."""
        self.config, self.first_step, self.place = config, first_step, place
        self.record: dict | None = None
        self.left, self.at, self.losses = 0.0, time.monotonic(), deque(maxlen=12)
        self.stdout, self.stderr, self.on = sys.stdout, sys.stderr, lives(sys.stdout)
        self.blocks, self.sparks = UNICODE if knows_unicode(sys.stdout) else ASCII
        self.colour = not os.environ.get("NO_COLOR")
        if not self.on:
            return
        self.fd, self.drawn, self.whole = sys.stdout.fileno(), False, True  # whole: what was printed last ends with its line
        self.lock, self.ended = threading.RLock(), threading.Event()
        sys.stdout = Above(self, sys.stdout)
        if lives(sys.stderr):
            sys.stderr = Above(self, sys.stderr)
        self.thread = threading.Thread(target=self._draw, daemon=True)
        self.thread.start()
        alive.append(self)

    def show(self, record: dict, left: float):
        """What was logged last. left: seconds to the end of the run."""
        self.losses += [record["loss"]] if record["loss"] == record["loss"] else []  # not NaN
        self.record, self.left, self.at = record, left, time.monotonic()

    def close(self):
        """Takes the line away, and gives sys.stdout and sys.stderr back."""
        if not self.on or self.ended.is_set():
            return
        self.ended.set()
        self.thread.join(5)  # it may wait for a terminal that was stopped by Ctrl-S
        sys.stdout, sys.stderr = self.stdout, self.stderr
        self.erase()

    def erase(self):
        if self.drawn:
            self.drawn = False
            with contextlib.suppress(OSError):
                os.write(self.fd, b"\r\x1b[J")

    def _draw(self):
        while not self.ended.wait(self.EVERY_S):
            with self.lock:
                if self.whole:
                    try:  # not by way of sys.stdout: wandb keeps what comes there
                        os.write(self.fd, f"\r{self.text(columns(self.fd))}\x1b[J\r".encode(self.stdout.encoding, "replace"))
                    except OSError:  # the terminal is gone
                        return
                    self.drawn = True

    def text(self, width: int) -> str:
        """The line, at most width - 1 characters long: what matters least is left out first."""
        r, now, phase = self.record, time.monotonic(), self.place.phase
        last = self.config.max_steps
        done = max(self.first_step, self.place.step - (phase in ("data", "compute")))
        share = min(1.0, done / max(1, last))
        parts = [(3, f"{bar(share, 20 if width >= 120 else 10, self.blocks)} {share:4.0%}"), (0, f"step {done}/{last}")]
        if r:
            every = self.config.checkpoint.interval or last
            n = min((done // every + 1) * every, last) - done
            busy = dict(evaluation="evaluating", checkpoint="saving").get(phase)
            parts += [(1, f"loss {r['loss']:.4f}"), (5, sparkline(self.losses, self.sparks)), (7, f"lr {r['learning_rate']:.2e}"),
                      (4, f"{short(r['tokens_per_s'])} tok/s"), (6, f"mfu {r['mfu']:.1%}" if r["mfu"] is not None else ""),
                      (8, f"mem {r['memory_gib']:.1f} GiB"), (2, f"eta {duration(max(0, self.left - (now - self.at)))}"),
                      (9, busy or (f"saves in {n} ({duration(n * r['step_time_s'])})" if n else ""))]
        else:
            parts += [(1, f"{'first step' if phase in ('data', 'compute') else phase} {duration(now - self.at)}")]
        parts = [part for part in parts if part[1]]
        while len(parts) > 1 and sum(len(text) + 2 for _, text in parts) > width:  # a blank before, and the last column
            parts.remove(max(parts))
        line = "  ".join(text for _, text in parts)[:max(0, width - 2)]
        if self.colour and parts[0][0] == 3:
            of = line.rindex(" ", 0, line.index("%"))
            line = f"\x1b[36m{line[:of]}\x1b[0m{line[of:]}"
        return " " + line


alive: list[Live] = []


class Above:
    """A stream whose text goes above the live line, which comes again with its next turn."""

    def __init__(self, live: Live, stream):
        self._live, self._stream = live, stream

    def write(self, text: str) -> int:
        with self._live.lock:
            self._live.erase()
            written = self._stream.write(text)
            self._stream.flush()
            self._live.whole = text.endswith("\n") if text else self._live.whole
        return written

    def __getattr__(self, name):
        return getattr(self._stream, name)


def columns(fd: int) -> int:
    """Of the terminal as it is now; not as it was when $COLUMNS was set."""
    try:
        return os.get_terminal_size(fd).columns or 80
    except OSError:
        return 80


def bar(share: float, width: int, blocks: str) -> str:
    """blocks: a cell that is empty, … , full."""
    full, part = divmod(round(share * width * (len(blocks) - 1)), len(blocks) - 1)
    return blocks[-1] * full + (blocks[part] + blocks[0] * (width - full - 1) if full < width else "")


def sparkline(values, sparks: str) -> str:
    """A character for each value, from their least to their greatest."""
    low, high = min(values, default=0), max(values, default=0)
    return "".join(sparks[round((x - low) / (high - low) * (len(sparks) - 1)) if high > low else 0] for x in values)


@contextlib.contextmanager
def calm(rank: int):
    """For as long as a rank runs: each warning of a library is told once, in a line, and by rank 0; what cannot be encoded is
    printed as what it is escaped to; and no live line is left behind.
    """
    told, shown = set(), warnings.showwarning

    def tell(message, category, filename, lineno, file=None, line=None):
        if rank == 0 and (where := (category, filename, lineno)) not in told:
            told.add(where)
            print(f"warning: {' '.join(str(message).split())[:500]} ({category.__name__})", file=sys.stderr, flush=True)

    warnings.showwarning = tell
    if rank:
        logging.disable(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        warnings.showwarning = shown
        while alive:
            alive.pop().close()


# ---- the table at the start -----------------------------------------------------------------------------------------

def introduce(meter, config: Config, stream, val: list, model, resumed, state: dict, reason: str, estimate=None):
    """The run in a few lines: model, data, batch, sharding, device, memory, folder, and what the command line has changed.

    val: the splits for validation; resumed: the checkpoint, whose state.json is state, or None; reason: for the precision;
    estimate: of memory.py.
    """
    import torch
    import torch.distributed as dist
    c, t, ranks, epochs = config, config.train, dist.get_world_size(), stream.epochs(config.max_steps)
    device = torch.cuda.get_device_name(meter.device) if meter.device.type == "cuda" else \
        f"CPU, {torch.get_num_threads()} threads a rank, GOMP_SPINCOUNT {os.environ['GOMP_SPINCOUNT']}"
    meter.say(f"model       {model.num_params() / 1e6:.2f}M parameters: {c.model.n_layer} layers, {c.model.n_head} heads, "
              f"width {c.model.n_embd}, block {c.model.block_size}, vocabulary {c.model.vocab_size} in "
              f"{model.transformer.wte.weight.size(0)} rows")
    for split, share, passes in zip(stream.splits, stream.proportions, epochs):
        part = f"{share:.1%} of a {c.data.mixture} mixture, " if len(epochs) > 1 else ""
        meter.say(f"data        {split.path}: {part}{split.card['splits'][split.name]['tokens']:,} tokens, "
                  f"{split.samples:,} samples, {passes:.3g} epochs, {split.card['tokenizer']['name']} tokenizer")
        if split.path not in {of.path for of in val}:
            meter.say(f"warning: {split.path} has no val split: there is no validation loss of it")
    meter.say(f"batch       {t.global_batch_size} sequences = {ranks} ranks x {t.micro_batch_size} x "
              f"{c.accumulation(ranks)} accumulated; {c.tokens_per_step:,} tokens a step, {c.max_steps} steps, "
              f"{meter.tokens(c.max_steps) / 1e6:.3g}M tokens")
    for key in ("batch_schedule", "block_schedule"):
        if schedule := getattr(t, key):
            meter.say(f"            train.{key}: {schedule}")
    if c.model.mask_documents:
        meter.say("documents   each by itself: attention does not leave it, and positions begin anew with it")
    meter.say(f"sharding    {c.sharding.strategy}, activation checkpointing {c.sharding.activation_checkpointing}, "
              f"{c.train.precision}{reason}, compile {'on' if c.train.compile else 'off'}")
    meter.say(f"device      {device}" + ("" if meter.peak else "; its peak FLOP/s is not known, so no MFU"))
    if estimate:
        meter.say(f"memory      {estimate}")
    meter.say(f"run         {c.run_dir}" + (f", from {c.run.init_from}" if c.run.init_from and not resumed else ""))
    if changed := [f"{key} {word(value)} ({word(was)})" for key, (was, value) in c.overridden.items()]:
        more = f", and {len(changed) - 12} more" if len(changed) > 12 else ""
        for line in textwrap.wrap("overridden  " + ", ".join(changed[:12]) + more, 120, subsequent_indent=" " * 12,
                                  break_long_words=False, break_on_hyphens=False):
            meter.say(line)
    if resumed:
        meter.say(f"resuming    {resumed}: step {state['step']} on {state['world_size']} -> {ranks} ranks")
        for key, (was, now) in changes(state["config"], c.model_dump()).items():
            meter.say(f"            changed since: {key} {was} -> {now}")


def word(value) -> str:
    """As in YAML."""
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)


def changes(was: dict, now: dict) -> dict:
    """{section.key: (was, now)} of two configs."""
    known = Config().model_dump()  # what an older version did not know was as it is by default
    return {f"{section}.{key}": (before, value) for section, values in now.items() for key, value in values.items()
            if (before := was.get(section, {}).get(key, known[section][key])) != value}
