"""launch/train.sh as shell and torchrun read it, and how a run that fails ends.

The other two ways, torchrun and `bash launch/train.sh --nproc_per_node=2`, are in test_faults.py: what a signal to the
launcher does. Errors of two ranks are in test_bad_input.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import SMALL

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENV = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": "the tests' own"}


@pytest.mark.parametrize("launcher, ranks", [
    (["bash", "launch/train.sh"], 1),
    ([*TORCHRUN, "--no-python", "launch/train.sh"], 2)], ids=["bash", "torchrun --no-python"])
def test_two_of_four_ways(launcher, ranks, text_dataset, tmp_path):
    config = tmp_path / "launched.yaml"
    config.write_text(f"data: {{path: {text_dataset}}}\nrun: {{dir: {tmp_path}/run}}")
    command = [*launcher, str(config), *SMALL, "--train.max_steps=6", "--train.micro_batch_size", "2"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert f"8 sequences = {ranks} ranks x 2 x {4 // ranks} accumulated" in done.stdout  # rank 0 alone speaks
    assert done.stdout.count("step 6/6") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["world_size"] == ranks


@pytest.mark.parametrize("options, status, said", [
    (["--nproc_per_node=2", "CONFIG"], 1, "absent/dataset.json: is missing"),
    (["--nproc_per_node=two", "CONFIG"], 1, "Unsupported nproc_per_node value: two (see torchrun --help)"),
    (["--nprocs=2", "CONFIG"], 2, "unrecognized arguments: --nprocs=2 (see torchrun --help)"),
    (["--numa-binding=node", "--nproc_per_node=2", "CONFIG"], 1, "--numa-binding: binds ranks to the cores next to their GPUs"),
], ids=["missing data", "wrong value", "unknown option", "NUMA without GPUs"])
def test_torchrun_from_within_ends_in_one_line(text_dataset, tmp_path, options, status, said):
    config = tmp_path / "bad.yaml"
    config.write_text(f"data: {{path: {tmp_path}/absent}}\nrun: {{dir: {tmp_path}/run}}")
    options = [str(config) if word == "CONFIG" else word for word in options]
    done = subprocess.run(["bash", "launch/train.sh", *options, *SMALL, "--train.max_steps=6", "--train.micro_batch_size=2"],
                          cwd=ROOT, env=ENV | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=400)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
