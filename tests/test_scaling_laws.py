"""tools/scaling_laws.py: constants that are known, found again; the published ones, worked out by hand; grids that are killed."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_train import SMALL, train_run

from nanogpt.errors import Stopped, UserError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import plan  # noqa: E402
import scaling_laws  # noqa: E402
from scaling_laws import PUBLISHED, Law, Point  # noqa: E402

TRUTH = Law(1.8, 500.0, 2000.0, 0.35, 0.38)


def synthetic(noise: float = 0.0, law: Law = TRUTH, budgets=(1e17, 3e17, 1e18, 3e18, 1e19), sizes: int = 7) -> list[Point]:
    """Runs around the best size of each budget, each 1.7 times the one before; losses off by a share of about `noise`."""
    draw = np.random.default_rng(1)
    return [Point(n, c / 6 / n, law.loss(n, c / 6 / n) * math.exp(noise * draw.standard_normal()), f"{c:g} {i}")
            for c in budgets for i in range(sizes) for n in [law.best(c)[0] * 1.7 ** (i - sizes // 2)]]


def call(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr(sys, "argv", ["scaling_laws.py", *map(str, argv)])
    scaling_laws.main()
    return capsys.readouterr().out


# ---- the fits -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("truth", [TRUTH, PUBLISHED["hoffmann"], PUBLISHED["besiroglu"], Law(0.5, 60.0, 9000.0, 0.25, 0.6)], ids=str)
def test_known_constants_are_found_again(truth):
    """Without noise exactly; by parabolas, which are not the law's own curves, the exponent to 0.01."""
    points = synthetic(law=truth)
    found, _ = scaling_laws.fit(points)
    assert found == pytest.approx(truth, rel=1e-4)
    k, a = scaling_laws.power_law(scaling_laws.iso_curves(points))
    assert a == pytest.approx(truth.beta / (truth.alpha + truth.beta), abs=0.01)
    for c in (1e17, 1e19, 1e22):
        assert k * c**a == pytest.approx(truth.best(c)[0], rel=0.2)


def test_noise_and_what_it_leaves_open():
    """Losses off by 0.3 %: exponents to 0.03, and brackets that hold the truth and have a width."""
    points = synthetic(0.003)
    found, theta = scaling_laws.fit(points)
    assert abs(found.alpha - TRUTH.alpha) < 0.03 and abs(found.beta - TRUTH.beta) < 0.03 and abs(found.E - TRUTH.E) < 0.1
    study = scaling_laws.study(points, [1e21], 60)
    for name in ("alpha", "beta", "E"):
        low, high = scaling_laws.around([getattr(law, name) for law in study["laws"]])
        assert low - 0.02 < getattr(TRUTH, name) < high + 0.02 and 1e-4 < high - low < 0.2, name
    for answer in study["budgets"][0]["answers"]:
        assert answer["n"] == pytest.approx(TRUTH.best(1e21)[0], rel=0.25)
        assert answer["n_range"][0] < answer["n"] < answer["n_range"][1]
        assert 6 * answer["n"] * answer["d"] == pytest.approx(1e21)
    wide = scaling_laws.study(synthetic(0.02), [1e21], 60)["budgets"][0]["answers"]
    for noisy, answer in zip(wide, study["budgets"][0]["answers"]):
        assert noisy["n_range"][1] / noisy["n_range"][0] > answer["n_range"][1] / answer["n_range"][0]


def test_a_run_that_went_wrong_counts_less():
    """Huber's loss: one run of 35 that ended 20 % too high moves the exponents by little; least squares would by much."""
    points = synthetic(0.001)
    points[3] = points[3]._replace(loss=1.2 * points[3].loss)
    found, _ = scaling_laws.fit(points)
    assert abs(found.alpha - TRUTH.alpha) < 0.02 and abs(found.beta - TRUTH.beta) < 0.02


def test_the_best_of_a_budget_by_hand():
    """Hoffmann et al. for Chinchilla's 5.76e23 FLOP: C / 6 = 9.6e22; G = (138.176 / 114.996)^(1 / 0.62) = 1.34471;
    N = G (9.6e22)^(0.28 / 0.62) = 1.34471 x 2.39381e10; D = 9.6e22 / N. Of Besiroglu et al. N = 0.119629 x 6.0393e11.
    """
    n, d = PUBLISHED["hoffmann"].best(5.76e23)
    assert (n, d) == pytest.approx((3.2190e10, 2.9823e12), rel=1e-3)
    assert PUBLISHED["hoffmann"].loss(n, d) == pytest.approx(1.69 + 406.4 * 3.219e10**-0.34 + 410.7 * 2.9823e12**-0.28, rel=1e-4)
    n, d = PUBLISHED["besiroglu"].best(5.76e23)
    assert (n, d) == pytest.approx((7.2248e10, 1.3288e12), rel=1e-3)  # Chinchilla itself: 70B, 1.4T
    unrounded = PUBLISHED["hoffmann"]._replace(alpha=0.3392, beta=0.2849)
    assert unrounded.best(5.76e23)[0] == pytest.approx(40e9, rel=0.02)  # as their text says
    for law in PUBLISHED.values():  # and no size near it is better
        n, d = law.best(1e21)
        assert all(law.loss(n, d) < law.loss(n * x, d / x) for x in (0.5, 0.98, 1.02, 2))
    assert plan.chinchilla(10**9, 2 * 10**10)["best_parameters"] == pytest.approx(PUBLISHED["hoffmann"].best(1.2e20)[0])


def test_parabolas():
    """An exact one is found; one whose end is its lowest says where to look; budgets are told apart."""
    runs = [Point(n, 1e18 / 6 / n, 3 + 0.05 * math.log(n / 2e8) ** 2, str(n)) for n in (5e7, 1e8, 2.5e8, 6e8, 1e9)]
    curve, = scaling_laws.iso_curves(runs)
    assert curve["best"] == pytest.approx(dict(n=2e8, d=1e18 / 6 / 2e8, loss=3.0))
    for some, word in ((runs[3:] + [Point(2e9, 1e18 / 6 / 2e9, 3.3, "")], "smaller"), (runs[:2] + [Point(2e7, 1e18 / 6 / 2e7, 3.3, "")], "larger")):
        curve, = scaling_laws.iso_curves(some)
        assert curve["best"] is None and curve["why"] == f"no lowest point within its sizes; add {word} ones"
    assert [len(c["runs"]) for c in scaling_laws.iso_curves(synthetic())] == [7] * 5
    assert scaling_laws.power_law(scaling_laws.iso_curves(runs)) is None
    assert scaling_laws.resampled_powers(scaling_laws.iso_curves(synthetic(sizes=3)), 9) == []  # no freedom left


@pytest.mark.parametrize("points, said", [
    (synthetic()[:5], "needs 6 runs or more, better 15; there are 5"),
    ([p._replace(n=1e8) for p in synthetic()], "needs three sizes and three numbers of tokens or more, to tell E from the rest; there are 1 and"),
    (synthetic(budgets=(1e18,)), "one follows from the other, as with a single budget"),
    ([Point(n, 20 * n, TRUTH.loss(n, 20 * n), "") for n in np.geomspace(1e7, 1e9, 9)], "one follows from the other")], ids=range(4))
def test_runs_from_which_nothing_follows(points, said):
    assert said in scaling_laws.cannot_fit(points)


def test_losses_that_do_not_depend_on_size():
    """A law is fitted, and tells no best size: that is said, where it would be 0 or without end."""
    flat = [p._replace(loss=1.8 + 2000 * p.d**-0.38) for p in synthetic()]
    study = scaling_laws.study(flat, [1e20], 20)
    assert study["law"] is None and study["problem"].startswith("approach 3 finds no power law of size in the losses of these runs")
    flat = [p._replace(loss=1.8 + 500 * p.n**-0.35) for p in synthetic()]
    assert "no power law of tokens" in scaling_laws.study(flat, [1e20], 20)["problem"]
    assert scaling_laws.says_nothing(TRUTH, synthetic()) is None


# ---- files ----------------------------------------------------------------------------------------------------------

def write_csv(path: Path, points) -> Path:
    path.write_text("loss, N ,name,D\n" + "".join(f"{p.loss},{p.n},{p.name},{p.d}\n" for p in points))
    return path


def test_a_csv_to_answers_and_a_picture(monkeypatch, capsys, tmp_path):
    file = write_csv(tmp_path / "runs.csv", synthetic())
    said = call(monkeypatch, capsys, "--read", file, "--resamplings", 20, "--budget", 1e20, 1e21, "--gpu-hours", 10, "--gpu", "A100",
                "--mfu", 0.5)
    assert said.startswith("35 runs of 35 sizes: ") and said.rstrip().endswith(str(tmp_path / "scaling_laws.png"))
    assert f"  alpha{0.35:>19.4g}  [" in said and "best size grows as C^0.521 [" in said
    assert f"{10 * 3600 * 312e12 * 0.5:.3g} FLOP, 10 hours of one A100 at 50% of its peak (assumed, not measured):" in said
    assert "100 times the largest run's budget" in said
    assert (tmp_path / "scaling_laws.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads(call(monkeypatch, capsys, "--read", file, "--resamplings", 0, "--budget", 1e20, "--json", "--out",
                            tmp_path / "s.svg"))
    assert found["law"] == pytest.approx(TRUTH._asdict(), rel=1e-4) and found["law_range"]["alpha"] is None
    assert [a["how"] for a in found["budgets"][0]["answers"]] == ["approach 3", "approach 2"]
    assert "<svg" in (tmp_path / "s.svg").read_text()

    # One budget: no law, but its parabola, and no power law.
    one = write_csv(tmp_path / "one.csv", synthetic(budgets=(1e18,)))
    said = call(monkeypatch, capsys, "--read", one, "--budget", 1e20)
    assert "none: approach 3 needs sizes and tokens that vary" in said and "no power law: it needs two budgets" in said
    assert "no answer: neither fit could be made" in said and "       1e+18     7" in said


def test_published_laws_in_words(monkeypatch, capsys):
    said = call(monkeypatch, capsys, "--law", "hoffmann", "--budget", "5.76e23")
    assert "as published: 32.2B parameters, 2.98T tokens, 92.6 tokens a parameter, loss 1.9307" in said
    assert json.loads(call(monkeypatch, capsys, "--law", "besiroglu", "--json"))["law"]["E"] == 1.8172


def test_what_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    few = write_csv(tmp_path / "few.csv", synthetic()[:2])
    (tmp_path / "bad.csv").write_text("N,D,loss\n1,2,3\n1,-2,3\n")
    (tmp_path / "no.csv").write_text("N,tokens\n1,2\n")
    (tmp_path / "empty").mkdir()
    for argv, said in ((["--read", few], "approach 3 has five constants, and needs 6 runs or more, better 15; there are 2; and approach 2 needs"),
                       (["--read", "bad.csv"], "bad.csv: line 3: N, D and loss are not all numbers above 0"),
                       (["--read", "no.csv"], "no.csv: has no column d, loss; its first line names them"),
                       (["--read", "absent.csv"], r"absent.csv: cannot be read \(No such file"),
                       (["--read", "empty"], "empty: is neither a run folder, nor one that holds some"),
                       (["--run", "c.yaml"], "--sizes, --budgets: both belong to --run"),
                       (["--read", few, "--sizes", "2x2"], "both belong to --run"),
                       (["--read", few, "--optim.beta1", "0.8"], "--optim.beta1: settings are for --run"),
                       (["--law", "hoffmann", "--out", "a.png"], "--out: a.png shows runs"),
                       (["--read", few, "--out", "a.gif"], "a.gif ends neither in"),
                       (["--read", few, "--budget", "lots"], "invalid number of FLOP value: 'lots'"),
                       (["--read", few, "--resamplings", -1], "--resamplings: -1 is not between"), ([], "one of the arguments")):
        with pytest.raises(UserError, match=said):
            call(monkeypatch, capsys, *argv)


# ---- runs -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(text_dataset, tmp_path_factory):
    """(config file, settings) of runs that take a second."""
    file = tmp_path_factory.mktemp("grid") / "small.yaml"
    file.write_text(f"data: {{path: {text_dataset}}}")
    return file, [o for o in SMALL if "decay_steps" not in o] + ["--optim.warmup_steps=10", "--train.micro_batch_size=8"]


def test_a_grid_is_trained_and_read(base, ranks, monkeypatch, capsys, tmp_path):
    """Each run in a rank that is there already, in the place of a process of its own."""
    folder, trained = tmp_path / "grid", []

    def launch(argv, path):
        trained.append(path.name)
        ranks(1, train_run, argv)
    monkeypatch.setattr(scaling_laws, "launch", launch)
    argv = ["--run", base[0], "--sizes", "1x32", "1x48", "2x48", "--budgets", "2.5e9", "6e9", "--resamplings", 0, "--json",
            "--budget", "1e12", "--folder", folder, *base[1]]
    said = call(monkeypatch, capsys, *argv)
    names = [f"{size}-{budget}" for size in ("1x32", "1x48", "2x48") for budget in ("2.5e9", "6e9")]
    assert trained == names
    found = json.loads(said[said.index("{"):])
    points = {p["name"]: p for p in found["points"]}
    assert set(points) == set(names) and (folder / "scaling_laws.png").exists()
    for name, p in points.items():
        size, budget = name.split("-")
        layers, width = map(int, size.split("x"))
        rows = 320  # 257 ids
        assert p["n"] == rows * width + 32 * width + layers * (12 * width**2 + 13 * width) + 2 * width
        steps = round(float(budget) / 6 / p["n"] / 32 / 8)
        assert abs(p["d"] / (8 * 32) - steps) <= 1 and 6 * p["n"] * p["d"] == pytest.approx(float(budget), rel=0.05)
        config = yaml.safe_load((folder / name / "config.yaml").read_text())
        assert config["model"]["n_head"] == width // 16 and config["optim"]["decay_steps"] is None
        steps = config["train"]["max_steps"]
        assert config["optim"]["warmup_steps"] == min(10, steps // 10)
        records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert records[-1]["step"] == steps and p["loss"] == records[-1]["val_loss"] and p["d"] == records[-1]["tokens"]

    # The same again: nothing is trained. With a run whose end is missing: it does not count.
    assert call(monkeypatch, capsys, *argv).count(": there already") == 6 and len(trained) == 6
    metrics = folder / "1x32-6e9" / "metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:-1]) + '{"step": 9')
    assert {p.name for p in scaling_laws.read([folder])} == set(names) - {"1x32-6e9"}
    assert f"warning: {folder}/1x32-6e9: left out: it is not finished, step " in capsys.readouterr().err
    with pytest.raises(UserError) as error:
        call(monkeypatch, capsys, *argv, "--optim.beta1=0.8", "--sizes", "1x32")
    assert str(error.value) == "\n".join(f"{folder}/1x32-{budget}: was started with optim.beta1 0.9, and it is 0.8 now; take "
                                         "another --folder" for budget in ("2.5e9", "6e9"))


def test_what_a_grid_refuses(base, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        call(monkeypatch, capsys, "--run", base[0], *base[1], "--sizes", "1x40", "axb", "1x32", "--budgets", "1e8", "1e11", "1.1e11")
    lines = str(error.value).splitlines()
    for line, said in zip(lines, ("--budgets: 1e+11 and 1.1e+11 are too close", "--sizes: 1x40 has no whole number of heads 16 wide",
                                  "--sizes: axb is not blocks x width, as 4x128", "--budgets: 1e+08 FLOP are 3 steps of 1x32 (24k")):
        assert line.startswith(said), line
    assert len(lines) == 4 and not (tmp_path / "runs").exists()
    for option, said in (("--run.init_from=hf:x", "run.init_from, eval.only"), ("--model.mlp_dim=9", "model.mlp_dim: leave it out")):
        with pytest.raises(UserError, match=said):
            call(monkeypatch, capsys, "--run", base[0], *base[1], "--sizes", "1x32", "--budgets", "1e10", option)


def test_what_of_runs_is_left_out(tmp_path, capsys):
    for name, config, last in (
            ("whole", {}, dict(step=9, tokens=900, val_loss=3.0)), ("cut", {}, dict(step=8, tokens=800, val_loss=3.0)),
            ("blind", {}, dict(step=9, tokens=900)), ("tuned", dict(run=dict(init_from="hf:x")), dict(step=9, tokens=9, val_loss=1)),
            ("nan", {}, dict(step=9, tokens=900, val_loss=None)), ("none", {}, None), ("odd", dict(train=3), {})):
        (tmp_path / name).mkdir()
        made = dict(data=dict(path="d", train=None), model=dict(vocab_size=50, n_layer=1, n_embd=24, block_size=8)) | config
        made.setdefault("train", dict(max_steps=9))
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(made))
        if last is not None:
            (tmp_path / name / "metrics.jsonl").write_text(json.dumps(last) + "\n" + '{"st')
    point, = scaling_laws.read([tmp_path])
    assert point == Point(64 * 24 + 8 * 24 + 12 * 24**2 + 13 * 24 + 48, 900, 3.0, "whole")
    said = {line.split("/")[-1].split(":")[0]: line.split("left out: ")[1] for line in capsys.readouterr().err.splitlines()}
    for name, why in dict(cut="it is not finished, step 8 of 9; the command", blind="it has no validation loss; its data needs",
                          tuned="it began with the weights of hf:x", nan="it cannot be read (TypeError)", none="it has no metrics.jsonl yet",
                          odd="it cannot be read (ValidationError)").items():
        assert said[name].startswith(why), said
    other = tmp_path / "other"
    other.mkdir()
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config | dict(data=dict(path="e", train=None))))
    (other / "metrics.jsonl").write_text((tmp_path / "whole" / "metrics.jsonl").read_text())
    with pytest.raises(UserError, match="their losses are of other data, d with 50 ids in blocks of 8 and e with 50 ids"):
        scaling_laws.read([tmp_path / "whole", other])


def test_a_killed_grid_goes_on(base, ranks, monkeypatch, capsys, tmp_path):
    """SIGKILL to the tool alone: its run saves and ends; the same command goes on from there, and finishes."""
    argv = ["--run", base[0], "--sizes", "1x32", "--budgets", "2e10", "--folder", tmp_path / "grid", "--resamplings", "0", *base[1]]
    process = subprocess.Popen([sys.executable, str(ROOT / "tools" / "scaling_laws.py"), *map(str, argv)], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "grid" / "1x32-2e10"
    limit = time.monotonic() + 300
    while not (path / "metrics.jsonl").exists() or '"step": 5,' not in (path / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < limit, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.wait()
    while "stopped by SIGTERM" not in (log := (path / "log.txt").read_text()):
        assert time.monotonic() < limit, log
        time.sleep(0.02)
    assert "is not finished" in scaling_laws.of_run(path)
    monkeypatch.setattr(scaling_laws, "launch", lambda argv, path: ranks(1, train_run, argv))
    with pytest.raises(UserError, match="^approach 3 has five constants, and needs 6 runs or more, better 15; there are 1; and approach 2"):
        call(monkeypatch, capsys, *argv)
    assert "resuming    " in (path / "log.txt").read_text() and isinstance(scaling_laws.of_run(path), Point)


def test_how_a_run_ends_is_how_the_grid_does(monkeypatch, tmp_path):
    (tmp_path / "launch").mkdir()
    monkeypatch.setattr(scaling_laws, "ROOT", tmp_path)
    (tmp_path / "launch" / "train.sh").write_text('trap "exit 75" TERM; [ "$1" = wait ] || exit $1; touch started; while :; do sleep 0.05; done')
    monkeypatch.chdir(tmp_path)
    scaling_laws.launch(["0"], Path("run"))
    with pytest.raises(UserError, match="^run: the run ended with status 3, as told above; once that is mended, the same command"):
        scaling_laws.launch(["3"], Path("run"))

    def ask():
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
    thread = threading.Thread(target=ask)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    with pytest.raises(Stopped):
        scaling_laws.launch(["wait"], Path("run"))
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
