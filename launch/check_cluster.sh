#!/usr/bin/env bash
""":"
# Are these nodes fit to train on? Before the first run on them, and when a run is slow or does not start:
#
#     srun --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 launch/check_cluster.sh    under SLURM: one task a node
#     torchrun --nnodes 4 … launch/check_cluster.sh                                   elsewhere: as training is started
#     bash launch/check_cluster.sh                                                    this machine alone
#
# To the shell, these lines are the program, as in launch/train.sh; to Python, they are one string. See nanogpt/cluster.py.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -e "$root/launch/train.sh" ] || root=$PWD  # sbatch runs a copy
python=$(command -v python3 || command -v python)
[ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
exec "$python" "$root/launch/check_cluster.sh" "$@"
":"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.cluster import main  # noqa: E402
from nanogpt.errors import run_rank  # noqa: E402

if __name__ == "__main__":
    run_rank(main)
