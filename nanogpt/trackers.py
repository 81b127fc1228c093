"""Where metrics go: metrics.jsonl always, Weights & Biases and TensorBoard where the config asks for them.

Each gets every record once, also of a run that was killed and goes on: what was logged past its checkpoint is cut off
metrics.jsonl, told to TensorBoard to be forgotten, and not taken by wandb, which knows these steps already. None of them
can hurt the run: one that fails is told of in a line, and left out from there on.
"""

import json
import math
import os
import sys
import uuid
from pathlib import Path

from nanogpt.config import Config
from nanogpt.errors import one_line


class Trackers:
    """One door to all of them. say(line) tells the user."""

    def __init__(self, config: Config, first_step: int, say):
        """The run goes on after first_step: what was logged of later ones is taken back."""
        take_back(config.run_dir / "metrics.jsonl", first_step or -1)  # a new run logs its step 0 anew
        self.lines, self.say, self.others = Lines(config.run_dir / "metrics.jsonl"), say, {}
        for name, opened, wanted in (("wandb", Wandb, config.log.wandb != "off"),
                                     ("tensorboard", TensorBoard, config.log.tensorboard)):
            if wanted:
                try:
                    self.others[name] = opened(config, first_step)
                except Exception as error:
                    say(f"warning: {name} is off for this run ({one_line(error)})")

    def log(self, record: dict):
        self.lines.write(json.dumps({k: finite(v) for k, v in record.items()}))
        for name in list(self.others):
            try:
                self.others[name].log(flat(record), record["step"])
            except Exception as error:
                self.others.pop(name)
                self.say(f"warning: {name} is off from here on ({one_line(error)})")

    def close(self) -> str | None:
        """Why metrics.jsonl could not be written to its end; None: it is."""
        for name, tracker in self.others.items():
            try:
                tracker.close()
            except Exception as error:
                self.say(f"warning: {name} did not finish ({one_line(error)})")
        return self.lines.close()


class Wandb:
    """Online or offline; the key comes from its own login."""

    def __init__(self, config: Config, first_step: int):
        import wandb
        id_file = config.run_dir / "wandb_id"  # a resumed run goes on in the same curve
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self.run = wandb.init(project=config.log.wandb_project, name=config.run.name, id=id_file.read_text().strip(),
                              dir=str(config.run_dir), mode=config.log.wandb,  # type: ignore[arg-type]  # never off, here
                              config=config.model_dump(),
                              resume="allow" if config.log.wandb == "online" else None)

    def log(self, scalars: dict, step: int):
        self.run.log(scalars, step=step)

    def close(self):
        self.run.finish()


class TensorBoard:
    """Event files in RUN/tensorboard: tensorboard --logdir runs"""

    def __init__(self, config: Config, first_step: int):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=first_step + (first_step > 0))

    def log(self, scalars: dict, step: int):
        for key, value in scalars.items():
            if key != "step":
                self.writer.add_scalar(key, value, step)
        self.writer.flush()  # what a checkpoint has behind it, nobody logs again

    def close(self):
        self.writer.close()


def finite(value):
    """NaN and Infinity are no JSON: null. Lists of numbers alike."""
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(record: dict) -> dict:
    """The numbers of a record: what is listed block by block under health/ as one each, of a list of steps how many."""
    found = {}
    for key, value in record.items():
        if isinstance(value, list) and key.startswith("health/"):
            found |= {f"{key}/{i:0{len(str(len(value) - 1))}}": x for i, x in enumerate(value)}
        else:
            found[key] = len(value) if isinstance(value, list) else value
    return {key: value for key, value in found.items() if isinstance(value, (int, float))}


class Lines:
    """A file that is written line by line. A full disk does not end a run: what could not be written is written with the
    next line, if it can be.
    """

    def __init__(self, path: Path):
        self.path, self.waiting = path, b""
        self.problem: str | None = None
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, line: str):
        self.waiting += line.encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[os.write(self.fd, self.waiting):]
            self.problem = None
        except OSError as error:
            if not self.problem:
                print(f"warning: {self.path}: cannot be written ({error.strerror}); kept in memory, and tried again",
                      file=sys.stderr, flush=True)
            self.problem = error.strerror

    def close(self) -> str | None:
        """Why something could not be written; None: all is."""
        os.close(self.fd)
        return self.problem


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


def _step(line: bytes) -> int:
    """Step of a line of metrics.jsonl; one that was cut short by a crash counts as later than everything."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return sys.maxsize
