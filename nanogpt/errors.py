"""How every command ends when its user has to mend something: one line a problem on stderr, a status, no traceback."""

import argparse
import atexit
import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: what is wrong, where, and what to type instead. One line a problem."""


class Unread(UserError):
    """An input that could not be read this time; what was done before is good."""


class PeerLost(UserError):
    """Another rank does not answer. Why, it tells itself, if it can."""


class Stopped(Exception):
    """A signal asked the run to stop; it is saved, and the same command goes on."""
    STATUS = 75  # EX_TEMPFAIL: try again later


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with errors raised as UserError (one line, not a page of usage). description: the tool's whole docstring."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def one_line(error: BaseException) -> str:
    """What an error of a library says, short enough to be part of a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def written_whole(out: Path):
    """Yields a path beside `out`, with its ending, to be written to; then it takes the place of `out`. Raises UserError."""
    aside = out.with_name(f".{out.stem}.partial{out.suffix}")
    try:
        yield aside
        os.replace(aside, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); take another --out") from None


def report(error):
    """Prints each line of a UserError to stderr as `error: …`."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)


def run(main):
    """Runs a command's `main()` and exits: 0 when it returns, 1 on a UserError, 75 on Stopped, 130 on Ctrl-C."""
    if sys.stderr is None:  # closed; and the next file that is opened must not become it
        sys.stderr = open(os.devnull, "w")
    try:
        main()
    except UserError as error:
        report(error)
        sys.exit(1)
    except Stopped:
        sys.exit(Stopped.STATUS)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `tools/inspect_mds.py DIR | head`
        sys.stderr.close()
        sys.exit(1)
    except RuntimeError as error:  # torch's, without importing it
        if type(error).__name__ != "OutOfMemoryError":
            raise
        report(f"{str(error).splitlines()[0]} Take smaller batches, or shorter texts")
        sys.exit(1)
    except ModuleNotFoundError as error:
        report(f"{error.name} is not installed for {sys.executable}; bash launch/quickstart.sh sets up everything")
        sys.exit(1)


def run_rank(main):
    """run, for what torchrun starts: it ends with torchrun, and at once.

    Threads that read ahead, or listen, may be within C++ code, where the interpreter's own end would abort the process.
    """
    die_with_torchrun()
    try:
        run(main)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # `… | head`
            stream.flush()
    os._exit(status)


def die_with_torchrun():
    """A rank ends when its torchrun does, even by SIGKILL: else it would hold the run folder, and its GPU."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
