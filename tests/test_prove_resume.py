"""tools/prove_resume.py proves what it says, and would notice if it were not so."""

import contextlib
import io
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from forked import Forked

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import prove_resume  # noqa: E402

KILLS, STEPS = 2, 42  # of a mixture; on 1 rank, 2 ranks, whose torchrun is killed, and 1 rank


@pytest.fixture(scope="module", autouse=True)
def forked_where_alone():
    """One rank is a fork of forked.py's, which takes seconds less to start; several are torchrun's, and real."""
    def popen(command, **options):
        if "--rank" in command and "-m" not in command:
            return Forked(command[1:], env=options["env"], stdout=options["stdout"])
        return subprocess.Popen(command, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prove_resume, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))
        yield


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("proof") / "out", io.StringIO()
    command = ["prove_resume.py", "--kills", str(KILLS), "--seed", "527", "--out", str(folder)]
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(said):
        prove_resume.main()
    return folder, said.getvalue()


@pytest.fixture
def trials(proof, tmp_path):
    """A copy of both runs, to be tampered with."""
    made = []
    for name in ("undisturbed", "killed"):
        trial = object.__new__(prove_resume.Trial)
        trial.folder = shutil.copytree(proof[0] / name, tmp_path / name)
        made.append(trial)
    return made


@pytest.fixture(scope="module")
def known(proof):
    return prove_resume.read_shards([proof[0] / name for name in ("a", "b") if (proof[0] / name).exists()])


def test_kills_are_told_and_nothing_differs(proof):
    _, said = proof
    rows = [line.split() for line in said.splitlines() if line[:4].strip().isdigit()]
    assert len(rows) == KILLS and f"proved: {KILLS} kills, and the run is the same" in said
    assert "all the same" in said and "0 needed a second attempt" in said
    assert len({row[1] for row in rows}) > 1  # ranks


def samples(trials, known):
    return prove_resume.compare_samples(*map(prove_resume.recorded, trials), STEPS, known)


def test_a_sequence_that_differs_is_found(trials, known):
    assert samples(trials, known) == []
    file = sorted((trials[1].folder / "seen").glob("*.*"))[0]
    data = bytearray(file.read_bytes())
    other = next(iter(known))
    struct.pack_into("<Q", data, 8, other if other != struct.unpack_from("<Q", data, 8)[0] else list(known)[1])
    file.write_bytes(data)
    assert any("other sequences than in the undisturbed run" in line for line in samples(trials, known))


def test_a_step_that_is_left_out_is_found(trials, known):
    last = sorted((trials[1].folder / "seen").glob("*.*"))[-1].name.split(".")[0]
    for file in (trials[1].folder / "seen").glob(f"{last}.*"):
        data = file.read_bytes()
        file.write_bytes(data[:8 + 8 * struct.unpack_from("<II", data)[1]])  # its first micro-batch alone
    assert any("never done as a whole" in line for line in samples(trials, known))


def test_a_sample_that_comes_twice_in_an_epoch_is_found(trials, known):
    """In both runs alike: they agree with each other, and are wrong."""
    for trial in trials:
        for file in (trial.folder / "seen").glob("*.*"):
            data, place = bytearray(file.read_bytes()), 0
            while place < len(data):
                step, n = struct.unpack_from("<II", data, place)
                for i in range(n):
                    if struct.unpack_from("<Q", data, place + 8 + 8 * i)[0] == list(known)[0]:
                        struct.pack_into("<Q", data, place + 8 + 8 * i, list(known)[1])
                place += 8 + 8 * n
            file.write_bytes(data)
    assert any("repeats a sample within an epoch" in line for line in samples(trials, known))


@pytest.mark.parametrize("change, said", [
    (lambda lines: [line | {"loss": line["loss"] * 1.001} if line["step"] == 9 else line for line in lines], "loss of step 9"),
    (lambda lines: [line for line in lines if line["step"] != 9], "not each step once"),
    (lambda lines: lines + lines[-1:], "not each step once")], ids=["loss", "gap", "twice"])
def test_a_loss_that_differs_is_found(trials, change, said):
    one, other = (trial.folder / "run" for trial in trials)
    assert prove_resume.compare_losses(one, other, STEPS) == []
    file = other / "metrics.jsonl"
    lines = change([json.loads(line) for line in file.read_text().splitlines()])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any(said in problem for problem in prove_resume.compare_losses(one, other, STEPS))


def test_weights_that_differ_are_found(trials):
    one, other = (trial.folder / "run" for trial in trials)
    assert prove_resume.compare_weights(one, other) == []
    steps = sorted((other / "checkpoints").glob("step-*"))
    shutil.rmtree(steps[-1])  # those of the last step but a few
    assert any("differs by" in problem for problem in prove_resume.compare_weights(one, other))


def test_start_times(tmp_path, capsys):
    prove_resume.start_times(tmp_path, 1, 1)
    assert "resume at step 100,000: " in capsys.readouterr().out


@pytest.mark.parametrize("options, said", [(["--kills", "0"], "--kills: 0 is below 1"),
                                           (["--out", "."], "--out: . exists already"),
                                           (["--kill"], "expected one argument")])
def test_bad_options(options, said):
    done = subprocess.run([sys.executable, "tools/prove_resume.py", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1
