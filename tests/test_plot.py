"""tools/plot.py: pictures from metrics.jsonl, and one line for each kind of bad input; what it shares with report.py."""

import json
import math
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.text import Text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from plot import draw, read_metrics, smoothed, spread, summary  # noqa: E402

from nanogpt.config import Model  # noqa: E402
from nanogpt.curves import along, column, differences, flops_per_token, names, thinned  # noqa: E402
from nanogpt.errors import UserError  # noqa: E402
from nanogpt.model import GPT  # noqa: E402


def make_run(folder: Path, steps: int = 200) -> Path:
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            record = dict(step=step, tokens=step * 512, loss=1.5 + 4 / step)
            if step % 50 == 0:
                record |= dict(val_loss=record["loss"] + 0.1, val_bits_per_byte=(record["loss"] + 0.1) / math.log(2))
            file.write(json.dumps(record) + "\n")
    return folder


def lines_of(figure):
    """The loss panel's lines: (x values, y values)."""
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in figure.axes[0].lines]


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


# ---- what is drawn --------------------------------------------------------------------------------------------------

@pytest.fixture
def figures(monkeypatch):
    """The figures that draw() saves, as it saves them."""
    from matplotlib.figure import Figure
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: (kept.append(figure), save(figure, *args, **kwargs)))
    return kept


def test_what_lies_along_x(tmp_path, figures):
    """Steps, tokens and seconds by hand, FLOPs by the model's own count; resumed in between, so steps are uneven."""
    model = Model(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64)
    logged = [dict(step=step, tokens=7 * step, loss=3.0, step_time_s=0.5 + step / 100) for step in (1, 10, 20, 21, 30)]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in logged))
    (folder / "config.yaml").write_text(json.dumps(dict(model=model.model_dump())))
    each = GPT(model).flops_per_token()
    assert flops_per_token(dict(model=model.model_dump())) == each
    expected = dict(steps=[1, 10, 20, 21, 30], tokens=[7, 70, 140, 147, 210],
                    flops=[n * each for n in (7, 70, 140, 147, 210)],
                    time=[0.51, 0.51 + 9 * 0.6, 5.91 + 10 * 0.7, 12.91 + 0.71, 13.62 + 9 * 0.8])
    for axis, values in expected.items():
        assert along(axis, read_metrics(folder), each) == pytest.approx(values)
        if axis in ("steps", "time"):
            draw({str(folder): read_metrics(folder)}, tmp_path / "x.png", axis=axis, dpi=50)
            assert lines_of(figures[-1])[0][0] == pytest.approx(values)
    old = make_run(tmp_path / "old", 3)
    for axis, words in (("time", "has no step_time_s; take another --x"), ("flops", "no whole model section")):
        with pytest.raises(UserError, match=words):
            draw({str(old): read_metrics(old)}, tmp_path / "x.png", axis=axis)


def test_thinned_curves_keep_every_extreme(tmp_path, figures):
    draw_number = random.Random(0)
    a, b = ([draw_number.gauss(0, 1) for _ in range(50_000)] for _ in range(2))
    a[12_345], b[40_000], b[7] = 99.0, -99.0, math.nan
    rows = thinned([a, b], 100)
    assert len(rows) <= 5 * 100 + 1 and rows == sorted(set(rows)) and rows[:100] == list(range(100)) and rows[-1] == 49_999
    for values in (a, b):
        for i in range(100):
            part = [v for v in values[100 + 49_900 * i // 100:100 + 49_900 * (i + 1) // 100] if v == v]
            assert {min(part), max(part)} <= {values[row] for row in rows}
    assert thinned([a[:300], b[:300]], 100) == list(range(300))

    records = [dict(step=i + 1, tokens=i + 1, loss=10 + v) for i, v in enumerate(a)]
    draw({"long": records}, tmp_path / "long.svg")
    x, y = lines_of(figures[0])[0]
    assert len(x) < 10_000 and max(y) == 109 and (tmp_path / "long.svg").stat().st_size < 2_000_000
    low, high = figures[0].axes[0].get_ylim()
    assert high < 20 and low < 8  # one spike does not press the rest onto the floor


def test_runs_are_compared(tmp_path, figures):
    """12 of them: each is named at its end, no name covers another, and the table tells what differs."""
    curves = {}
    for i in range(12):
        folder = make_run(tmp_path / f"$run_{i}$", steps=100 + i)
        config = dict(optim=dict(learning_rate=1e-3 * (1 + i % 3)), run=dict(name=f"n{i}"), train=dict(max_steps=111),
                      model=dict(n_layer=24 if i == 5 else 12))
        (folder / "config.yaml").write_text(json.dumps(config))
        curves[str(folder)] = read_metrics(folder)
    table = summary(curves)
    assert table[0] == ["run", "steps", "tokens", "train loss", "val loss", "n_layer", "learning_rate"]
    assert table[1][:3] == ["$run_0$", "100 of 111", "51.2k"] and table[12][1] == "111"
    assert [row[5] for row in table[1:]] == ["12"] * 5 + ["24"] + ["12"] * 6
    assert [row[6] for row in table[1:]] == ["0.001", "0.002", "0.003"] * 4
    draw(curves, tmp_path / "x.png", tmp_path / "x.svg")
    assert png_size(tmp_path / "x.png")[0] >= 2000 and "<svg" in (tmp_path / "x.svg").read_text()
    axes = figures[0].axes[0]
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without its line
    assert sorted(text.get_text().split()[0] for text in axes.texts) == sorted(f"$run_{i}$" for i in range(12))
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(0 < box.x0 and box.x1 < figures[0].bbox.x1 for box in boxes)
    thick = [line for line in axes.lines if line.get_linewidth() > 1.5]
    assert len(thick) == 12 == len({(line.get_color(), str(line._dash_pattern)) for line in thick})


def test_what_differs_between_configs():
    a, b = dict(optim=dict(beta1=0.9), run=dict(name="a")), dict(optim=dict(beta1=0.8, new=[1]), run=dict(name="b"), eval={})
    assert differences([a, b]) == {"optim.beta1": [0.9, 0.8], "optim.new": [None, [1]]}  # 0.9 stands, and is the default
    assert differences([{}, a]) == {}
    assert names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"] and names([Path("/a/b")]) == ["b"]
    assert names([Path("/a/b"), Path("/a/b")]) == ["b", "b"]


def test_labels_find_room():
    assert spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.5, 0.6, 0.7])
    assert spread([0.95, 0.99, 2.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])


def test_odd_numbers_are_no_numbers(tmp_path):
    huge = "1" + "0" * 400
    (tmp_path / "metrics.jsonl").write_text("\n".join(f'{{"tokens": 1, {rest}}}' for rest in (
        '"step": "1", "loss": 1', '"step": 1, "loss": true', '"step": 2, "loss": 1, "grad_norm": "x"',
        f'"step": 3, "loss": 1, "grad_norm": {huge}', '"step": 4, "loss": 1, "grad_norm": 2', f'"step": {huge}, "loss": 1')))
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [2, 3, 4]
    assert [v == v for v in column(records, "grad_norm")] == [False, False, True]
