#!/usr/bin/env bash
""":"
# Starts training. One file, three ways, the same words:
#
#     bash launch/train.sh CONFIG [--section.key value …]                    on every local GPU, else one CPU process
#     torchrun --nnodes N … launch/train.sh CONFIG [--section.key value …]   torchrun reads this file as Python
#     torchrun --no-python … launch/train.sh CONFIG …                        torchrun runs this file as a shell script
#
# To the shell, these lines are the program, and nothing after exec is ever read. To Python, they are one string.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v python3 || command -v python)
[ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
exec "$python" "$root/launch/train.sh" "$@"
":"""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.errors import UserError, report, run  # noqa: E402


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
    argv = sys.argv[1:]
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
    if gpus > 1:
        load_config(argv, gpus, gpus)  # what is wrong is told here, once, and not by every rank
        start_torchrun(gpus, argv)
        return
    config = load_config(argv, ranks, local_ranks)
    from nanogpt.train import start
    start(config)


def start_torchrun(ranks: int, argv: list[str]):
    """torchrun in this process; a rank that fails has told why, so torchrun's own report of it is left out."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun
    try:
        torchrun(parse_args(["--standalone", "--nproc_per_node", str(ranks), __file__, *argv]))
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode or 1)


def one_voice():
    """main, but what goes wrong on all ranks is told by rank 0 alone: the others wait for torchrun to end them.

    So does a rank that hears no more of another one: whoever failed first tells why.
    """
    try:
        main()
    except Exception as error:
        rank = int(os.environ.get("RANK", 0))
        if os.environ.get("WORLD_SIZE", "1") == "1" or rank == 0 and isinstance(error, UserError):
            raise
        time.sleep(5)
        if not isinstance(error, UserError):
            raise
        report(f"rank {rank}: {error}")  # still here: the trouble was this rank's own
        sys.exit(1)


if __name__ == "__main__":
    run(one_voice)
