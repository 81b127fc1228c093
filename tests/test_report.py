"""tools/report.py: one HTML page, looked at in a real browser that has no network."""

import base64
import contextlib
import hashlib
import io
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from browser import PROGRAM, Browser

from nanogpt.errors import UserError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SIZES = [(1280, 900), (390, 844)]
needs_browser = pytest.mark.skipif(not PROGRAM, reason="no chromium, chromium-browser or google-chrome here "
                                                       "(Debian: apt-get install chromium)")


def make_run(folder: Path, steps: int, every: int = 1, val: int = 50, seed: int = 0, **config) -> Path:
    """A run folder without the training: losses that fall and are noisy, and one of them is a spike."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(every, steps + 1, every):
            loss = 2 + 8 / (1 + step / 20) + draw.gauss(0, 0.05) + 4 * (step == steps * 3 // 5)
            record = dict(step=step, tokens=step * 512, loss=loss, learning_rate=1e-3 * (1 - step / steps / 2),
                          grad_norm=1 + draw.random(), step_time_s=0.25,
                          tokens_per_s=2048 * (1 + 0.1 * draw.random()), mfu=None, goodput=0.9, time=1.7e9 + step)
            if step == steps * 3 // 5:
                record["loss_spikes"] = [step]
            if val and step % val == 0:
                record |= dict(val_loss=2.1 + 8 / (1 + step / 20), val_bits_per_byte=3.0)
            file.write(json.dumps(record) + "\n")
    model = dict(n_layer=2, n_embd=32, n_head=2, vocab_size=64)
    settings = dict(run=dict(name="gpt"), train=dict(max_steps=steps), model=model) | config
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def records(folder: Path) -> dict[int, dict]:
    return {r["step"]: r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def report(*args, samples="0") -> str:
    """The command, in this process, where torch is imported once. Returns what it said on stderr."""
    import report as tool
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report.py", *map(str, args), "--samples", samples])
        tool.main()
    return said.getvalue()


class Page(HTMLParser):
    """What a browser would find: tags, the text of each, and of <script> and <style>."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.open, self.texts = [], [], {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        self.texts.setdefault("", []).append("")
        self.tags.append(("", {}))

    def handle_data(self, data):
        if self.tags:
            self.texts[self.tags[-1][0]][-1] += data

    @property
    def data(self):
        return json.loads(self.texts["script"][0])


# ---- without a browser ----------------------------------------------------------------------------------------------

def test_nothing_in_a_run_becomes_markup(tmp_path):
    folder = make_run(tmp_path / "<script>alert(3)<" / "run & <b>", 20, data=dict(path=EVIL), run=dict(name=EVIL))
    (folder / "log.txt").write_text(
        f"model       {EVIL}\ndevice      {EVIL}\nwarning: {EVIL}\x1b[2J\u202e\nstopped by {EVIL}\n")
    sample = dict(step=20, checkpoint="x", prompt=EVIL, number=0, text=EVIL + "\0\ud800")
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    result = dict(task=EVIL, metric=EVIL, value=1.0, stderr=None, n=1)
    (folder / "evaluation.json").write_text(json.dumps(dict(results=[result])))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(dict(step=21, tokens=1, loss=2.0) | {EVIL: 1.0}) + "\n")
    assert report(folder) == ""
    text, page = (folder / "report.html").read_text(), Page(folder / "report.html")
    assert text.count("alert(1)") >= 8  # all of it is shown
    assert [name for name, _ in page.tags].count("script") == 2 and "img" not in dict(page.tags)
    assert not any(key.startswith("on") or key in ("src", "href") for _, attributes in page.tags for key in attributes)
    assert page.data["runs"][0]["name"] == "run & <b>" and page.data["charts"][-1]["key"] == EVIL
    # The policy names exactly the style and the script that are there: nothing else would run, were it there.
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for name, inside in ("script", page.texts["script"][1]), ("style", page.texts["style"][0]):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_what_a_report_tells(tmp_path):
    folder = make_run(tmp_path / "run", 100)
    state = dict(step=90, tokens=1, config={}, world_size=2, clock=dict(began=1.7e9, trained_s=20.0),
                 versions=dict(torch="2.99"), held_out=dict(best_step=90))
    for step in (50, 90):
        kept = folder / f"checkpoints/step-{step:08}"
        kept.mkdir(parents=True)
        (kept / "state.json").write_text(json.dumps(state | dict(step=step)))
        (kept / "manifest.json").write_text(json.dumps(dict(files={"a": dict(bytes=3 << 20), "b": dict(bytes=1 << 19)})))
    (folder / "log.txt").write_text(
        "model       small\nbatch       4 sequences = 2 ranks x 2 x 1 accumulated\ndevice      an H1000\n"
        "step  1/100  loss 9\nstep 57/100  loss 3\n"
        "model       small\nbatch       4 sequences = 1 ranks x 2 x 2 accumulated\ndevice      a CPU\n"
        "resuming    there: step 50 on 2 -> 1 ranks\nstep 90/100  loss 2\n"
        "stopped by SIGTERM after step 90 of 100, and saved\n"
        "model       small\nresuming    there: step 90 on 1 -> 1 ranks\nstep 100/100  loss 2\nwarning: it is late\n")
    assert report(folder) == ""
    text = re.sub("<[^>]+>", "|", (folder / "report.html").read_text())
    text = re.sub(r"\|[|\s]*", "|", text)
    best = min((r["val_loss"], step) for step, r in records(folder).items() if "val_loss" in r)
    for words in (f"|{best[0]:.4f}|best validation loss|100|at step|", "|100|steps|", "|0:25|trained for|", "|2|restarts|",
                  "|step-00000050|3.5 MiB|", "|step-00000090|3.5 MiB|-|best|",
                  "|0|57|2|killed, or an error; 7 steps done again|",
                  "|50|90|1|stopped by SIGTERM after step 90 of 100, and saved|", "|90|100|-|done|", "|torch|2.99|",
                  "|warning: it is late|", "|60|spike of the loss|", "|model.n_layer|2|12|", "done: 100 steps"):
        assert words in text, words


def test_the_health_of_blocks_becomes_two_curves(tmp_path):
    folder = make_run(tmp_path / "run", 3, val=0)
    more = {"health/dead_units": [0.1, None, 0.4, 0.2], "clipped_fraction": 0.5}
    lines = [json.dumps(r | more) for r in records(folder).values()]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert report(folder) == ""
    columns = Page(folder / "report.html").data["runs"][0]["columns"]
    assert columns["health/dead_units, the largest block's"] == [0.4] * 3 and columns["clipped_fraction"] == [0.5] * 3
    assert columns["health/dead_units, the median block's"] == [0.2] * 3


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("long") / "run", 100_000, val=1000)
    assert report(folder) == ""
    return folder


def test_long_runs_keep_every_extreme(long_run):
    folder, path = long_run, long_run / "report.html"
    assert path.stat().st_size < 4_000_000
    run, there = Page(path).data["runs"][0], records(folder)
    steps = run["x"]["steps"]
    assert 5_000 < len(steps) < 40_000 and steps[0] == 1 and steps[-1] == 100_000
    for key in ("loss", "val_loss", "grad_norm"):
        assert len(run["columns"][key]) == len(steps)
        for step, value in zip(steps, run["columns"][key]):
            assert value == (None if key not in there[step] else pytest.approx(there[step][key], rel=1e-5))
    for first in range(1, 100_000, 10_000):  # of any stretch, the lowest and the highest loss are there
        logged = [there[step]["loss"] for step in range(first, first + 10_000)]
        drawn = [v for step, v in zip(steps, run["columns"]["loss"]) if first <= step < first + 10_000]
        assert (min(drawn), max(drawn)) == pytest.approx((min(logged), max(logged)), rel=1e-5)
    assert run["x"]["time"][-1] == pytest.approx(25_000) and run["x"]["tokens"][-1] == 51_200_000


def test_help_and_bad_input_are_short(tmp_path):
    code = ("import runpy, sys; sys.argv = ['report.py', '--help']\n"
            "try: runpy.run_path('tools/report.py', run_name='__main__')\nexcept SystemExit: pass\n"
            "assert not {'torch', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "python tools/report.py runs/a runs/b" in done.stdout, done.stderr
    good = make_run(tmp_path / "good", 3)
    with pytest.raises(UserError, match="no/x.html: cannot be written"):
        report(good, "--out", tmp_path / "no/x.html")
    for args, words in [([tmp_path / "no"], "no such run folder"), ([good, "--out", "x.pdf"], "does not end in .html")]:
        done = subprocess.run([sys.executable, ROOT / "tools/report.py", *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
        assert done.stderr.count("\n") == 1


# ---- in a browser ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def place(browser: Browser, key: str) -> tuple[float, float, float, float]:
    """(left, top, width, height) of what a chart draws within, in the window, once it has been scrolled there."""
    browser.js(f"charts.find(c => c.spec.key === {key!r}).plot.scrollIntoView({{block: 'center'}})")
    browser.drawn()
    return browser.js(f"""(() => {{
        const c = charts.find(c => c.spec.key === {key!r}), r = c.top.getBoundingClientRect(), b = c.box;
        return [r.left + b.left, r.top + b.top, b.right - b.left, b.bottom - b.top]; }})()""")


def hover(browser: Browser, key: str, share: float) -> list[list[str]]:
    """The rows that are told at that share of a chart's width."""
    left, top, width, height = place(browser, key)
    browser.mouse("Moved", left + share * width, top + height / 2)
    browser.drawn()
    return browser.js(f"""[...charts.find(c => c.spec.key === {key!r}).tip.querySelectorAll("tr")].map(
        row => [...row.children].map(cell => cell.textContent))""")


@needs_browser
@pytest.mark.parametrize("number", [1, 3, 12])
def test_in_a_browser(browser, tmp_path, number):
    """No complaint, no request, nothing wider than the window; hovering tells metrics.jsonl's values; zooming, and back."""
    runs = [make_run(tmp_path / f"run {i}", 400 - 10 * i, every=2, val=0 if i == 1 else 20, seed=i,
                     optim=dict(learning_rate=1e-3 * (i + 1))) for i in range(number)]
    assert report(*runs) == ""
    for width, height in SIZES:
        browser.open(runs[0] / "report.html", width, height, dark=width < 500, mobile=width < 500)
        assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert browser.js("[...document.querySelectorAll('.plot')].every(p => p.clientWidth > 250) && charts.length") == 5

        rows = hover(browser, "loss", 0.5)
        assert len(rows) == number + 1 and rows[0][0].startswith("step ") == (number == 1 or "step" in rows[0][0])
        for row in rows[1:]:
            i = int(re.match(r"run (\d+)", row[0])[1]) if number > 1 else 0
            step = int(re.search(r"(\d+)$", row[0])[1]) if rows[0][0] == "" else int(rows[0][0].split()[1])
            there = records(runs[i])
            assert abs(step - 200) <= 2 and row[1] == f"{there[step]['loss']:.4f}"
            if "val" in rows[0] and i != 1:
                seen = max(s for s, r in there.items() if s <= step and "val_loss" in r)
                assert row[3].startswith(f"{there[seen]['val_loss']:.4f}")
        if number == 1:
            told = hover(browser, "grad_norm", 0.25)[1][1]
            assert float(told) == pytest.approx(records(runs[0])[100]["grad_norm"], rel=1e-3)

        assert browser.js("state.view") is None
        left, top, wide, high = place(browser, "loss")
        browser.mouse("Pressed", left + 0.25 * wide, top + 20, button="left", buttons=1, clickCount=1)
        browser.mouse("Moved", left + 0.4 * wide, top + 30, button="left", buttons=1)
        browser.mouse("Released", left + 0.5 * wide, top + 30, button="left", clickCount=1)
        assert browser.js("state.view") == pytest.approx([100, 200], abs=1.5)
        assert browser.js("charts.every(c => Math.abs(c.at(c.box.left) - state.view[0]) < 1e-6)")
        at = hover(browser, "loss", 0.5)[0][0] or hover(browser, "loss", 0.5)[1][0]
        assert abs(int(at.split()[-1]) - 150) <= 2
        for count in (1, 2):
            for kind in ("Pressed", "Released"):
                browser.mouse(kind, left + 0.3 * wide, top + 20, button="left", clickCount=count)
        assert browser.js("state.view") is None

        for axis, last in (("tokens", 400 * 512), ("time", 100), ("flops", None)):
            browser.js(f"[...$('axis').children].find(b => b.textContent.toLowerCase() === {axis!r}).click()")
            assert last is None or browser.js("wholeX()[1]") == last
        for control in ("logx", "logy", "raw"):
            browser.js(f"$({control!r}).click()")
        assert hover(browser, "loss", 0.9)
        if number > 1:
            browser.js("document.querySelector('#legend button').click()")
            assert browser.js("visible().length") == number - 1
        assert browser.requests() == [(runs[0] / "report.html").resolve().as_uri()] and browser.complaints() == []


@needs_browser
def test_100_000_steps_in_a_browser(browser, long_run):
    """What is drawn again at each zoom and movement stays small; a stretch between two spikes is found and told."""
    folder = long_run
    browser.open(folder / "report.html", 1280, 900)
    assert browser.js("Math.max(...runs.map(run => run.x.steps.length))") < 40_000
    step = int(hover(browser, "loss", 0.6)[0][0].split()[1].replace(",", ""))
    assert abs(step - 60_000) < 200
    assert hover(browser, "loss", 0.6)[1][1] == f"{records(folder)[step]['loss']:.4f}"
    browser.js("zoom([59950, 60050])")
    assert browser.js("charts[0].range(...state.view)[1]") > 5.5  # the spike of step 60,000 is in sight
    rows = hover(browser, "loss", 0.5)
    assert rows[0][0] == "step 60,000" and rows[1][1] == f"{records(folder)[60_000]['loss']:.4f}"
    assert "a spike at step 60,000" in browser.js("charts[0].tip.textContent")
    assert browser.complaints() == []


@needs_browser
def test_hostile_names_do_nothing_in_a_browser(browser, tmp_path):
    runs = [make_run(tmp_path / f"{i}<script>window.bad=1<" / "img src=x onerror=bad=1>", 60) for i in range(2)]
    (runs[0] / "samples.jsonl").write_text(json.dumps(dict(step=60, checkpoint="x", prompt="", number=0, text=EVIL)) + "\n")
    assert report(*runs) == ""
    browser.open(runs[0] / "report.html", 1280, 900)
    hover(browser, "loss", 0.5)
    assert browser.js("typeof window.bad + document.images.length") == "undefined0"
    assert EVIL in browser.js("document.body.textContent")
    # Were there a picture all the same, it would not be fetched, nor its script run.
    browser.js("document.body.insertAdjacentHTML('beforeend', '<img src=http://127.0.0.1:9/x onerror=window.bad=1>')")
    browser.drawn()
    browser.drawn()
    assert browser.js("typeof window.bad") == "undefined"
    failed = [event["params"] for event in browser.seen if event.get("method") == "Network.loadingFailed"]
    assert [event.get("blockedReason") for event in failed] == ["csp"]


# ---- samples --------------------------------------------------------------------------------------------------------

def test_samples_of_kept_checkpoints_are_remembered(text_dataset, tmp_path):
    run = tmp_path / "run"
    small = ("--model.n_layer 1 --model.n_head 1 --model.n_embd 16 --model.block_size 64 --train.compile false "
             "--train.global_batch_size 2 --train.micro_batch_size 2 --optim.warmup_steps 0 --train.max_steps 4 "
             "--checkpoint.interval 2 --eval.sequences 2 --run.device cpu").split()
    command = [sys.executable, ROOT / "launch/train.sh", ROOT / "configs/quickstart.yaml", *small]
    subprocess.run([*command, "--data.path", text_dataset, "--run.dir", run], check=True, capture_output=True)
    assert re.findall("from (step-.*)", report(run, samples="2")) == ["step-00000002", "step-00000004"]
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["number"]) for s in lines] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    from nanogpt import load
    assert load(run).generate(["", ""], 240, seed=1337, temperature=0.8) == [s["text"] for s in lines[2:]]
    page = (run / "report.html").read_text()
    assert report(run, samples="2") == "" and len((run / "samples.jsonl").read_text().splitlines()) == 4
    for words in ("byte, 257 ids", f"<code>{text_dataset}</code>", "step-00000004", "CPU, "):
        assert words in page, words
