#!/usr/bin/env bash
""":"
# Starts training. One file, the same words in each way:
#
#     bash launch/train.sh CONFIG [--section.key value …]                    on every local GPU, else one CPU process
#     bash launch/train.sh --nnodes N … CONFIG …                             torchrun's options first: its words, fewer lines
#     torchrun --nnodes N … launch/train.sh CONFIG [--section.key value …]   torchrun reads this file as Python
#     torchrun --no-python … launch/train.sh CONFIG …                        torchrun runs this file as a shell script
#
# To the shell, these lines are the program, and nothing after exec is ever read. To Python, they are one string.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v python3 || command -v python)
[ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
exec "$python" "$root/launch/train.sh" "$@"
":"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import PeerLost, Stopped, UserError, one_line, report, run_rank  # noqa: E402


def local_gpus() -> int:
    """GPUs that this process may use, counted without the seconds that importing torch takes."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([d for d in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if d.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def main():
    from nanogpt.config import help_text, load_config  # here, so that `run` tells what is not installed
    options, argv = torchrun_options(sys.argv[1:])
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return
    under_torchrun = "RANK" in os.environ
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
               if under_torchrun and name not in os.environ]
    if missing:
        raise UserError(f"RANK is set and {', '.join(missing)} is not: start with torchrun, or unset RANK")
    ranks = int(os.environ["WORLD_SIZE"]) if under_torchrun else 1
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun else 1
    gpus = 0 if under_torchrun or {"--run.device=cpu", "cpu"} & set(argv) else local_gpus()
    if options and under_torchrun:
        raise UserError(f"{options[0]}: is torchrun's; these ranks have been started already")
    if options:
        start_torchrun([*options, __file__, *argv])
        return
    if gpus > 1:
        load_config(argv, gpus, gpus)  # what is wrong is told here, once, and not by every rank
        start_torchrun(["--standalone", "--nproc_per_node", str(gpus), __file__, *argv])
        return
    config = load_config(argv, ranks, local_ranks)
    from nanogpt.console import calm
    with calm(int(os.environ.get("RANK", 0))):
        from nanogpt.train import start
        start(config)


def torchrun_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before CONFIG, if an option without a section (--nnodes, not --train.max_steps) is there; the rest."""
    config = next((i for i, word in enumerate(argv) if word.endswith((".yaml", ".yml"))), 0)
    leading = [word.partition("=")[0] for word in argv[:config] if word.startswith("-")]
    return (argv[:config], argv[config:]) if any("." not in word for word in leading) else ([], argv)


def start_torchrun(words: list[str]):
    """torchrun in this process; a rank that fails has told why, so torchrun's own report of it is left out."""
    import logging
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read by this import: no pages of C++ frames where a port is closed

    import torch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun
    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the ranks' own may tell more
    logging.disable(logging.ERROR)  # of this process alone, which does nothing but watch over the ranks
    parser = get_args_parser()
    parser.error = lambda message: report(f"{message} (see torchrun --help)") or sys.exit(2)
    args = parser.parse_args(["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", *words])
    if args.numa_binding and not torch.cuda.is_available():
        raise UserError("--numa-binding: binds ranks to the cores next to their GPUs, and PyTorch finds none here; leave it out")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, with a banner; ranks.py takes the cores there are
    try:
        torchrun(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could tell nothing
            perhaps = " (out of memory, perhaps)" if failure.exitcode == -signal.SIGKILL else ""
            raise UserError(f"rank {rank} was ended by {failure.signal_name()}{perhaps}; the same command goes on from the "
                            "last checkpoint") from None
        sys.exit(failure.exitcode or 1)
    except SignalException as error:
        sys.exit(130 if error.sigval == signal.SIGINT else Stopped.STATUS)
    except DistError as error:  # of the store at which they meet: a port that is taken, a host that does not answer
        raise UserError(f"torchrun could not open the port where ranks meet ({one_line(error)}); choose "
                        "another --master-port, or --rdzv-endpoint HOST:PORT, or end what listens there") from None
    except ValueError as error:
        raise UserError(f"{' '.join(str(error).split())} (see torchrun --help)") from None
    except RendezvousError as error:
        raise UserError(f"the machines did not meet ({one_line(error).rstrip(': ')}); type the same "
                        "--nnodes and --rdzv-endpoint HOST:PORT on each, with a HOST and PORT that all of them reach") from None


def one_voice():
    """main, but what goes wrong on all ranks is told by rank 0 alone: the others wait for torchrun to end them.

    So does a rank that hears no more of another one: whoever failed first tells why.
    """
    try:
        main()
    except Exception as error:
        rank = int(os.environ.get("RANK", 0))
        own = isinstance(error, UserError) and not isinstance(error, PeerLost)
        if own:
            tell_torchrun(str(error))
        if os.environ.get("WORLD_SIZE", "1") == "1" or isinstance(error, Stopped) or rank == 0 and own:
            raise
        from nanogpt import watch
        if not watch.asked:
            time.sleep(5)
        if watch.asked:  # torchrun has asked this rank to stop: another one was first, and tells
            sys.exit(1)
        if not isinstance(error, UserError):
            raise
        report(f"rank {rank}: {error}")  # still here: the trouble was this rank's own
        sys.exit(1)


def tell_torchrun(line: str):
    """The file from which torchrun takes the reason for its report."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = dict(py_callstack=line, timestamp=str(int(time.time())))
        Path(file).write_text(json.dumps(dict(message=dict(message=line, extraInfo=extra))))


if __name__ == "__main__":
    run_rank(one_voice)
