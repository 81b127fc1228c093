"""launch/quickstart.sh and launch/setup.sh: a whole small run, and how .venv is made, with a stand-in for Python."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["launch/setup.sh", "launch/quickstart.sh", "tests/run.sh", ".ci/run"]
SET_UP = "set -euo pipefail; . launch/setup.sh; set_up; echo $python"

# Takes the place of a Python: has a version, makes "environments", and its pip notes down what it is asked.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    --version) echo "Python VERSION" ;;
    *version_info*) [[ VERSION == 3.1[012].* ]] ;;
    *ensurepip*) [ -z "${NO_VENV:-}" ] ;;
    "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip --version") ;;
    "-m pip install "*) echo "$*" >>installed; sleep "${PIP_TAKES:-0}"; echo "ERROR: full"; exit "${PIP_STATUS:-0}" ;;
    *sys.prefix*) echo "$PWD/.venv" ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A clone with one Python on PATH: a fake one, 3.11 unless clone.python says otherwise."""
    class Clone:
        folder = tmp_path / "clone"
        env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}

        def python(self, version: str, names=("python3", "python3.12", "python3.11", "python3.10", "python")):
            for name in names:
                (tmp_path / "bin" / name).write_text(FAKE_PYTHON.replace("VERSION", version))
                (tmp_path / "bin" / name).chmod(0o755)

        def run(self, command: str, **env):
            return subprocess.run(["bash", "-c", command], cwd=self.folder, env=self.env | env, capture_output=True,
                                  text=True, timeout=60)

        def installations(self) -> int:
            log = self.folder / "installed"
            return len(log.read_text().splitlines()) if log.exists() else 0

    (tmp_path / "bin").mkdir()
    Clone.folder.mkdir()
    (Clone.folder / "launch").symlink_to(ROOT / "launch")
    (Clone.folder / "requirements.txt").write_text("torch>=2\n")
    clone = Clone()
    clone.python("3.11.7")
    return clone


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_shell(script):
    assert subprocess.run(["bash", "-n", ROOT / script], capture_output=True).stderr == b""


def test_installs_once_and_again_when_requirements_change(clone):
    for requirements, installations in [("torch>=2\n", 1), ("torch>=2\n", 1), ("torch>=3\n", 2), ("torch>=3\n", 2)]:
        (clone.folder / "requirements.txt").write_text(requirements)
        done = clone.run(SET_UP)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{clone.folder}/.venv/bin/python"
        assert clone.installations() == installations


def test_a_failed_installation_does_not_count(clone):
    done = clone.run(SET_UP, PIP_STATUS="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "ERROR: full"
    assert done.stderr.splitlines()[1].startswith("error: pip could not install requirements.txt")
    assert clone.run(SET_UP).returncode == 0
    assert clone.installations() == 2


def test_an_interrupted_installation_ends_pip_and_does_not_count(clone):
    takes = str(10**6 + os.getpid())  # seconds, as no other test of this machine has them
    started = subprocess.Popen(["bash", "-c", SET_UP], cwd=clone.folder, env=clone.env | {"PIP_TAKES": takes},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not clone.installations():
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    assert "stopped" in started.communicate(timeout=20)[1]
    assert started.returncode == 130
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if _read(p) == f"sleep\0{takes}\0".encode()]
    assert not left
    assert clone.run(SET_UP).returncode == 0
    assert clone.installations() == 2


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""


def test_python_is_chosen_by_its_version(clone):
    clone.python("3.13.0")
    done = clone.run(SET_UP)
    assert done.returncode == 1
    assert re.fullmatch(r"error: Python 3.10, 3.11 or 3.12 is needed on PATH, python3 is Python 3.13.*\n", done.stderr)
    assert not (clone.folder / ".venv").exists()
    clone.python("3.10.1", names=["python3.10"])
    assert "bin/python3.10, Python 3.10.1" in clone.run(SET_UP).stdout


def test_a_missing_venv_module_is_named(clone):
    done = clone.run(SET_UP, NO_VENV="1")
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("python, words", [("/no/python", "no such program"), ("python3", "has no ")])
def test_a_given_python_is_checked(clone, python, words):
    (clone.folder / "requirements.txt").write_text("no-such-package>=1\n")
    clone.env["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = clone.run(SET_UP, PYTHON=python)
    assert done.returncode == 1 and words in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize("options, words", [
    ("--txt a", "--txt: no such option"),
    ("--text", "files or folders"),
    ("--text nowhere.txt", "nowhere.txt: is not there"),
    ("--name", "a name is needed"),
    ("--name a/b", "only letters"),
])
def test_bad_options_are_one_line(clone, options, words):
    done = clone.run(f"bash launch/quickstart.sh {options}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr


def test_help(clone):
    done = clone.run("bash launch/quickstart.sh --help")
    assert done.returncode == 0
    assert "--text PATH" in done.stdout and "set -e" not in done.stdout


def test_a_whole_run(tmp_path):
    """Converts, trains, is killed, resumes, plots, samples, sums up; the second time there is nothing left to do."""
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    for folder in (clone, elsewhere):
        folder.mkdir()
    for name in ("nanogpt", "configs", "tools", "launch", "requirements.txt"):
        (clone / name).symlink_to(ROOT / name)
    (elsewhere / "my text.txt").write_text((ROOT / "LICENSE").read_text() * 20)
    small = "--model.n_layer 1 --model.n_head 1 --model.n_embd 16 --model.block_size 64 --train.global_batch_size 4 " \
            "--train.micro_batch_size 4 --optim.warmup_steps 0 --train.max_steps 400 --checkpoint.interval 20 " \
            "--log.interval 1 --eval.interval 0 --eval.sequences 8 --run.device cpu"
    command = ["bash", clone / "launch/quickstart.sh", "--text", "my text.txt", "--name", "small", "--", *small.split()]
    env = os.environ | {"PYTHON": sys.executable}
    for time_of in ("the first", "the second"):
        done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("killed with SIGKILL" in done.stdout) == (time_of == "the first"), done.stdout
        assert ("resuming " in done.stdout) and ("nothing to do" in done.stdout) == (time_of == "the second")
        assert re.search(r"^validation +\d\.\d+ nats a byte = \d\.\d+ bits/byte$", done.stdout, re.M)
        assert re.search(r"^xz -9 +\d\.\d+ bits/byte on the same [\d,]+ bytes$", done.stdout, re.M)
        assert done.stdout.count("-" * 20 + "\n") == 3  # samples
    records = [json.loads(line) for line in (clone / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [*range(1, 401)]
    assert (clone / "runs/small/loss.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in clone.iterdir()} - {"nanogpt", "configs", "tools", "launch", "requirements.txt"} == {"data", "runs"}
