"""What a run meets from outside: it is asked to stop, a rank dies or hangs, a second run wants the same folder.

SIGTERM and SIGUSR1 ask. All ranks agree, without waiting for the device, after which step they stop; the run is saved
and ends with status 75, "try again later" (EX_TEMPFAIL of sysexits.h). A rank that makes no progress holds up all
others: a thread in each of them notices, says which one it is and in which step, and ends its own process.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nanogpt import ranks
from nanogpt.config import Run
from nanogpt.errors import Stopped, UserError

PHASES = ("start", "data", "compute", "evaluation", "checkpoint")  # of a step, in order
BEAT_S = 2.0
asked: list[str] = []  # the signals that asked to stop; one process, one list


def listen():
    """From here on SIGTERM and SIGUSR1 ask."""
    asked.clear()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))


def deafen():
    """SIGTERM and SIGUSR1 end the process again."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


watching: list["Watch"] = []
locked: list[int] = []


def end():
    """The run is over, one way or another."""
    for one in watching:
        one.close()
    watching.clear()
    deafen()
    while locked:
        os.close(locked.pop())


class Watch:
    """One in each rank, from the process group on. The loop tells it where it is."""

    def __init__(self, run: Run):
        self.run, self.rank, self.world_size = run, dist.get_rank(), dist.get_world_size()
        self.step, self.phase, self.idle, self.longest, self.ask_after = 0, "start", 0.0, 0.0, run.timeout_s
        self.first = True           # the first step is not done: it compiles, and may take its time
        self.vote, self.votes = torch.zeros(1, dtype=torch.int32), None
        self.store = None
        if self.world_size > 1:
            self.store = dist.PrefixStore(f"{ranks.meeting} watch", ranks.connect())
            self.store.set_timeout(timedelta(seconds=10))
        watching.append(self)
        self.ended = threading.Event()
        self.ear, self.mouth = os.pipe()  # signals reach the thread even while the loop waits in a collective
        os.set_blocking(self.mouth, False)
        signal.set_wakeup_fd(self.mouth, warn_on_full_buffer=False)
        for target in (self._guard, *([self._beat] if self.store else [])):
            threading.Thread(target=target, daemon=True).start()

    def at(self, step: int, phase: str):
        """The loop has come to this phase of step `step` (counted from 1, as everywhere in what a user reads)."""
        if not self._patient():
            self.longest = max(self.longest, self.idle)
        self.step, self.phase, self.idle, self.ask_after = step, phase, 0.0, self.run.timeout_s

    def asked_to_stop(self) -> str | None:
        """The signal, if any rank had one; the same answer on all ranks. Call it once a step, on all.

        A step's votes are counted at the next: so nobody waits for them, nor for the device.
        """
        if self.world_size == 1:
            return asked[0] if asked else None
        if self.votes is None:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.run.first_timeout_s))
        else:
            self.votes.wait()
        stop = int(self.vote)
        self.vote.fill_(getattr(signal, asked[0]) if asked else 0)
        self.votes = dist.all_reduce(self.vote, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return signal.Signals(stop).name if stop else None

    def settle(self):
        """After the last step, on all ranks: the last votes are in."""
        if self.votes is not None:
            self.votes.wait()
        self.close()

    def close(self):
        """The loop is over: from here on nobody is ended."""
        if self.ended.is_set():
            return
        self.ended.set()
        signal.set_wakeup_fd(-1)
        os.close(self.mouth)

    # ---- in the background ------------------------------------------------------------------------------------------

    def _patient(self) -> bool:
        return self.first or self.phase in ("start", "checkpoint")

    def _guard(self):
        asked_at, heard = None, select.poll()
        heard.register(self.ear, select.POLLIN)
        while not self.ended.is_set():
            start = time.monotonic()
            if heard.poll(500) and set(os.read(self.ear, 99)) & {signal.SIGTERM, signal.SIGUSR1}:
                asked_at = self.step, self.phase
            # A process that was itself asleep (Ctrl-Z) must not take that for the others' delay: two seconds at most.
            self.idle += min(time.monotonic() - start, 2.0)
            limit = self.run.first_timeout_s if self._patient() else max(self.run.timeout_s, 4 * self.longest)
            if self.idle > limit:
                self._end(f"no progress for {self.idle:.0f} s")
            # Compiling and saving may take long; a rank that does not even beat meanwhile is gone.
            if self.store and self._patient() and self.idle > self.ask_after:
                self.ask_after = self.idle + self.run.timeout_s
                if self._silent(max(3 * BEAT_S, self.run.timeout_s / 4)) and self.idle:  # the loop did not go on meanwhile
                    self._end(f"no progress for {self.idle:.0f} s")
            if asked_at and (self.phase == "start" or self.phase == "evaluation" and self.first):
                # Nothing to save yet, and perhaps a collective that has no end.
                if self.rank == 0:
                    print("stopped by a signal before the first step: there is nothing new to save", flush=True)
                os._exit(Stopped.STATUS)
            # torchrun asks the others to stop when a rank has died. They cannot: it is missing in their collective.
            if asked_at == (self.step, self.phase) and self.world_size > 1 and not self._patient() \
                    and self.idle > max(10.0, 5 * self.longest):
                self._end(f"asked to stop, and no progress for {self.idle:.0f} s")
        os.close(self.ear)

    def _beat(self):
        for number in itertools.count():
            with contextlib.suppress(Exception):  # the store is not the run: if its host is gone, the guard will notice
                self.store.set(f"rank {self.rank}", json.dumps(dict(
                    number=number, step=self.step, phase=PHASES.index(self.phase), host=socket.gethostname())))
            if self.ended.wait(BEAT_S):
                return

    def _beats(self) -> dict[int, dict]:
        """What each rank last said. A beat that stays the same is of a rank that is gone."""
        known = [r for r in range(self.world_size) if self.store.check([f"rank {r}"])]
        return {r: json.loads(self.store.get(f"rank {r}")) for r in known}

    def _silent(self, seconds: float) -> bool:
        """Whether a rank, or the store itself, says nothing new for so long."""
        try:
            before = self._beats()
            time.sleep(seconds)
            return any(beat == before.get(r) for r, beat in self._beats().items())
        except Exception:  # whatever a store raises that is gone, or behind a link that was cut
            return True

    def _end(self, why: str):
        if self.ended.is_set():
            return
        told = threading.Thread(target=self._tell, args=(why,), daemon=True)
        told.start()
        told.join(15)  # the store may be behind a link that was cut
        os._exit(1)

    def _tell(self, why: str):
        here = f"rank {self.rank} ({socket.gethostname()}): step {self.step}, {self.phase}: {why}"
        again = "the same command goes on from the last checkpoint"
        if not self.store:
            return _say(f"{here}; {again}")
        try:
            if self.store.add("told", 1) > 1:  # another rank tells, and wants to hear of this one meanwhile
                time.sleep(4 * BEAT_S)
                return
            before = self._beats()
            time.sleep(3 * BEAT_S)
            beats = self._beats()
        except Exception:  # the same
            return _say(f"{here}, and none from the store at {os.environ['MASTER_ADDR']}: the link to it may be cut; {again}")
        silent = [r for r in range(self.world_size) if r not in beats or beats[r] == before.get(r)]
        place = {r: (b["step"], b["phase"]) for r, b in beats.items()}
        behind = [r for r in place if place[r] < max(place.values())]
        where = {r: f"rank {r}" + (f" ({b['host']}, step {b['step']}, {PHASES[b['phase']]})" if (b := beats.get(r)) else "")
                 for r in range(self.world_size)}
        if silent:
            _say(f"{here}: nothing is heard of {', '.join(where[r] for r in silent)}: hung, or its link is cut; {again}")
        elif behind:
            _say(f"{here}: waits for {', '.join(where[r] for r in behind)}; {again}")
        else:
            _say(f"{here}: all ranks are there and wait for each other: the network between them; {again}")


def _say(line: str):
    print(f"error: {line}", file=sys.stderr, flush=True)


# ---- one run, one folder --------------------------------------------------------------------------------------------

def lock(folder: Path):
    """Makes this process the only one that trains in a run folder, until it ends, however it ends.

    Waits ten seconds for one that is just dying. Raises UserError where another one lives.
    """
    if locked:
        return
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    locked.append(file)
    try:
        for attempt in range(50):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
        else:
            owner = os.pread(file, 200, 0).decode(errors="replace").strip()
            raise UserError(f"{folder}: another run trains there ({owner}); end it, or choose another run.name")
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n".encode(), 0)
    except OSError as error:  # a file system without locks, or a full one
        if error.errno != errno.ENOSPC:
            print(f"warning: {folder}: cannot be locked ({error.strerror}): make sure that no other run uses it",
                  file=sys.stderr, flush=True)
