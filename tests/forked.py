"""Commands as a user types them, without the seconds that a Python of their own would import for.

A server that has imported torch, streaming and all of training forks for each: what is forked goes through the script from
its first line, with arguments, folder, environment, stdout and stderr of its own. The ranks of ranks.py come from it too.
"""

import atexit
import gc
import multiprocessing as mp
import multiprocessing.resource_tracker
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["nanogpt.train", "torch._dynamo"])
LOCK = threading.Lock()  # multiprocessing looks after all its children at each start


def _become(command, cwd, env, stdout, stderr):
    """In the fork: what `python command…` does, and what becomes of it at its end."""
    gc.freeze()  # what was imported is no garbage: looking through it takes most of a short run's time
    os.setsid()
    for number, pipe in ((1, stdout), (2, stderr)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1, errors="backslashreplace")
    os.chdir(cwd)
    at_import = {"GOMP_SPINCOUNT": os.environ["GOMP_SPINCOUNT"]}  # nanogpt sets it, and is imported already
    os.environ.clear()
    os.environ.update(at_import | env)
    mp.resource_tracker._resource_tracker.__init__()  # one of its own, whose complaints are the command's
    sys.argv, sys.path[:0] = command, [os.path.dirname(os.path.abspath(command[0]))]
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()


class Forked:
    """Like subprocess.Popen of [sys.executable, *command], with pipes for stdout and stderr, in a session of its own.

    stdout: a file, which then gets stderr too.
    """

    def __init__(self, command, cwd=".", env=None, stdout=None):
        pipes = [] if stdout else [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        writers = [Connection(os.dup(stdout.fileno()), readable=False) for _ in range(2)] if stdout else [w for _, w in pipes]
        self.args, environment = command, dict(os.environ if env is None else env)
        self.process = CONTEXT.Process(target=_become, args=(list(map(str, command)), str(cwd), environment, *writers))
        with LOCK:
            self.process.start()
        for writer in writers:
            writer.close()
        self.pid, self.said = self.process.pid, ["", ""]
        self.readers = [threading.Thread(target=self._read, args=(i, r), daemon=True) for i, (r, _) in enumerate(pipes)]
        for reader in self.readers:
            reader.start()

    def _read(self, i, pipe):
        with open(os.dup(pipe.fileno()), errors="replace") as file:
            pipe.close()
            self.said[i] = file.read()

    def poll(self) -> int | None:
        with LOCK:
            return self.process.exitcode

    @property
    def returncode(self):
        return self.poll()

    def wait(self, timeout=300) -> int:
        limit = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired(self.process.name, timeout)
            time.sleep(0.005)
        return self.poll()

    def communicate(self, timeout=300) -> tuple[str, str]:
        self.wait(timeout)
        for reader in self.readers:
            reader.join()
        return tuple(self.said)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run_forked(command, cwd=".", env=None, timeout=300) -> subprocess.CompletedProcess:
    """subprocess.run([sys.executable, *command], capture_output=True, text=True, …)"""
    process = Forked(command, cwd, env)
    try:
        stdout, stderr = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
