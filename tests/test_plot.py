"""tools/plot.py: a picture from metrics.jsonl, and one line for each kind of bad input."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from plot import smoothed  # noqa: E402


def make_run(folder: Path, steps: int = 200) -> Path:
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            record = dict(step=step, tokens=step * 512, loss=1.5 + 4 / step)
            if step % 50 == 0:
                record |= dict(val_loss=record["loss"] + 0.1, val_bits_per_byte=(record["loss"] + 0.1) / math.log(2))
            file.write(json.dumps(record) + "\n")
    return folder


def plot(*args):
    return subprocess.run([sys.executable, ROOT / "tools/plot.py", *map(str, args)], capture_output=True, text=True)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_one_run_and_several(tmp_path):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", steps=30)
    done = plot(one)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(one / "loss.png")
    width, height = png_size(one / "loss.png")
    assert width >= 1000 and height >= 600
    done = plot(one, two, "--out", tmp_path / "both.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two", "both.svg"}


def test_damaged_lines_and_numbers_are_left_out_loudly(tmp_path):
    folder = make_run(tmp_path / "run", steps=1)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"step": 3, "tokens": 1536, "loss": NaN}\n{"step": 4, "tok')
    done = plot(folder)
    assert done.returncode == 0
    assert [line.split("metrics.jsonl: ")[1] for line in done.stderr.splitlines()] == [
        "line 2 is damaged and left out", "line 4 is damaged and left out"]
    assert png_size(folder / "loss.png")


def test_bad_input_is_one_line(tmp_path):
    good, empty = make_run(tmp_path / "good"), tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "none").mkdir()
    (tmp_path / "none/metrics.jsonl").touch()
    for args, words in [
        ([tmp_path / "nowhere"], "no such run folder"),
        ([empty], "metrics.jsonl: cannot be read"),
        ([tmp_path / "none"], "holds no step"),
        ([good, "--out", tmp_path / "loss.gif"], ".png"),
        ([good, "--out", tmp_path / "no/such/folder.png"], "cannot be written"),
        ([], "RUN"),
    ]:
        done = plot(*args)
        assert done.returncode == 1, args
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    assert not (good / "loss.png").exists()


def test_smoothing_keeps_the_mean_and_the_start():
    assert smoothed([3.0] * 1000) == [3.0] * 1000
    line = [float(i) for i in range(1000)]
    assert smoothed(line)[:980] == line[:980]  # centred: it does not lag
    for n in (80, 1000):
        noisy = [i % 2 for i in range(n)]
        assert all(abs(v - 0.5) < 0.15 for v in smoothed(noisy)[n // 4:])
    assert smoothed([1.0, math.nan, 1.0])[2] == 1.0
