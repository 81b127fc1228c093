"""What is seen on a terminal, by an emulator that wraps and unwraps lines when its width changes; and what is not elsewhere."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_train import SMALL

from nanogpt.console import ASCII, UNICODE, Live, bar, calm, sparkline

ROOT = Path(__file__).parents[1]
RESIZE = re.compile(r"\x1b\]resize;(\d+)\x07")  # our tests' own word to the emulator


class Screen:
    """A terminal as VTE, kitty and tmux have it: what is written past the edge goes on in the next row, and rows join again
    when it gets wider; the cursor stays with its character. It knows \\r, \\n, colours, and erasing to the end; nothing else.
    """

    def __init__(self, width):
        self.width, self.lines, self.line, self.at = width, [""], 0, 0  # the cursor: in which line, how far
        self.seen = []                                                  # every state of the line that the cursor is in

    def feed(self, text):
        for token in re.findall(r"\x1b\][^\x07]*\x07|\x1b\[[0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            line = self.lines[self.line]
            if size := RESIZE.fullmatch(token):
                self.width = int(size[1])
            elif token == "\r":
                self.at -= self.at % self.width
            elif token == "\n":  # to the row below
                below = self.at - self.at % self.width + self.width
                if below < len(line):
                    self.at = below
                else:
                    self.line, self.at = self.line + 1, 0
                    self.lines += [""] * (self.line == len(self.lines))
            elif token == "\x1b[J":
                self.lines[self.line:] = [line[:self.at]]
            elif token[0] == "\x1b":
                assert re.fullmatch(r"\x1b\[\d*m", token), f"an unknown {token!r}"
            else:
                assert token.isprintable(), repr(token)
                self.lines[self.line] = line[:self.at].ljust(self.at) + token + line[self.at + len(token):]
                self.at += len(token)
            if self.lines[self.line].strip() and self.lines[self.line] not in self.seen[-1:]:
                self.seen.append(self.lines[self.line])
        return self

    def text(self):
        return "\n".join(line.rstrip() for line in self.lines).rstrip("\n")


def test_the_emulator():
    """It shows what goes wrong with a line whose end is where the cursor waits."""
    screen = Screen(20).feed("one\ntwo\r" + "x" * 19 + "\r\x1b[J").feed("three\nabcdefghij\r123")
    assert screen.text() == "one\nthree\n123defghij"
    wrapped = f"above\n{'-' * 15}\x1b]resize;10\x07\rnew\x1b[J\n"
    assert Screen(20).feed(wrapped).text() == f"above\n{'-' * 10}new"


def on_a_terminal(command, width=110, env=(), timeout=120, **options) -> tuple[int, str, Screen]:
    """(status, what was written, the screen) of a command whose stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, width, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "COLUMNS", "LC_ALL", "LC_CTYPE", "LANG")}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True,
                               env=clean | {"TERM": "xterm", "LANG": "C.UTF-8"} | dict(env), **options)
    os.close(theirs)
    raw = b""
    with contextlib.suppress(OSError):  # Linux: the last one has closed it
        while data := os.read(ours, 65536):
            raw += data
    os.close(ours)
    said = raw.decode().replace("\r\n", "\n")
    return process.wait(timeout), said, Screen(width).feed(said)


# ---- the live line by itself ----------------------------------------------------------------------------------------

LOOP = textwrap.dedent("""
    import fcntl, os, struct, sys, termios, time, warnings
    from types import SimpleNamespace
    sys.path.insert(0, {root!r})
    from nanogpt.console import Live, calm
    Live.EVERY_S = 0.01
    config = SimpleNamespace(max_steps=200, checkpoint=SimpleNamespace(interval=50))
    place = SimpleNamespace(step=0, phase="start", first=True)

    def drawn():  # anew
        if live.on:
            with live.lock:
                live.erase()
            while not live.drawn:
                time.sleep(0.001)

    def resize(width):
        with live.lock:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("4H", 40, width, 0, 0))
            os.write(1, b"\\x1b]resize;%d\\x07" % width)

    with calm(0):
        print("before")
        live = Live(config, 0, place)
        drawn()
        for step in range(1, 41):
            place.step, place.phase = step, "compute"
            live.show(dict(loss=5 - step / 10, learning_rate=1e-3, tokens_per_s=1234.0, mfu=0.4, memory_gib=1.5, step_time_s=2.0), 320.0)
        drawn()
        print("a line", "of two words")
        drawn()
        print("a warning", file=sys.stderr)
        drawn()
        if live.on:
            resize(40)
        print("in a narrow window, a line that is longer than it")
        drawn()
        print("half a line, ", end="")
        time.sleep(0.05)
        print("and the rest")
        for _ in range(3):
            warnings.warn("told once", stacklevel=1)
            warnings.resetwarnings()
        drawn()
        raise SystemExit(3)
""").format(root=str(ROOT))
LEFT = ["before", "a line of two words", "a warning", "in a narrow window, a line that is longer than it",
        "half a line, and the rest", "warning: told once (UserWarning)"]


@pytest.mark.parametrize("env, blocks, colour", [
    ({}, UNICODE, True), ({"LC_ALL": "C", "NO_COLOR": "1"}, ASCII, False), ({"PYTHONIOENCODING": "latin-1"}, ASCII, True)],
    ids=["utf-8", "C, no colour", "latin-1"])
def test_other_lines_stay_and_nothing_else(env, blocks, colour):
    status, said, screen = on_a_terminal([sys.executable, "-c", LOOP], env=env)
    assert status == 3 and screen.text().splitlines() == LEFT
    assert ("\x1b[36m" in said) == colour and said.isascii() == (blocks is ASCII)
    live = [line for line in screen.seen if "step " in line]
    assert re.fullmatch(r" .{10}   0%  step 0/200  start 0:0\d", live[0])
    share = bar(39 / 200, 10, blocks[0])
    assert any(re.match(rf" {re.escape(share)}  2\d%  step 39/200  loss 1\.0000 ", line) and " eta 5:" in line for line in live)
    assert any(len(line) <= 39 and "step 39/200  loss 1.0000  eta 5:" in line for line in live)  # in the narrow window


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"CI": "true"}], ids=str)
def test_plain_lines_on_a_terminal_that_cannot_or_need_not(env):
    status, said, _ = on_a_terminal([sys.executable, "-c", LOOP], env=env)
    assert status == 3 and said.splitlines() == LEFT


def test_plain_lines_in_a_pipe():
    done = subprocess.run([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert done.returncode == 3 and done.stdout.splitlines() == LEFT


def make_live(step, phase="compute", first_step=0, interval=50):
    live = Live(SimpleNamespace(max_steps=200, checkpoint=SimpleNamespace(interval=interval)), first_step,
                SimpleNamespace(step=step, phase=phase))
    assert not live.on  # pytest's stdout is no terminal
    live.blocks, live.sparks, live.colour = *UNICODE, False
    return live


RECORD = dict(loss=2.5, learning_rate=6e-4, tokens_per_s=24_400.0, mfu=0.413, memory_gib=1.26, step_time_s=0.5)


def test_the_line_by_hand():
    live = make_live(61)
    for loss in (4.0, float("nan"), 3.0, 2.5):
        live.show(RECORD | dict(loss=loss), 70.4)
    whole = (" ██████                30%  step 60/200  loss 2.5000  █▃▁  lr 6.00e-04  24.4k tok/s  mfu 41.3%  mem 1.3 GiB  "
             "eta 1:10  saves in 40 (0:20)")
    assert live.text(200) == whole
    live.record = RECORD | dict(mfu=None)
    assert live.text(200) == whole.replace("  mfu 41.3%", "")
    # With less room: what matters least goes first, and nothing is cut in two.
    parts, gone = re.split("  +", live.text(119).strip()), []
    for width in range(118, 19, -1):
        line = live.text(width)
        left = [part for part in parts if part in line]
        assert len(line) < width and re.split("  +", line.strip()) == left
        gone += [part for part in parts if part not in left and part not in gone]
    order = ["saves", "mem", "lr", "█▃▁", "24.4k", "███", "eta", "loss"]
    assert [part.split()[0] for part in gone if part != "30%"] == order
    assert live.text(10) == " step 60/"


@pytest.mark.parametrize("step, phase, interval, expected", [
    (50, "evaluation", 50, "step 50/200 … evaluating"), (50, "checkpoint", 50, "step 50/200 … saving"),
    (51, "data", 50, "step 50/200 … saves in 50 (0:25)"), (199, "compute", 70, "step 198/200 … saves in 2 (0:01)"),
    (120, "compute", 0, "step 119/200 … saves in 81 (0:40)"), (200, "start", 50, "step 200/200 … eta 0:00")])
def test_where_the_run_is(step, phase, interval, expected):
    live = make_live(step, phase, interval=interval)
    live.show(RECORD, 0.0)
    first, last = expected.split(" … ")
    assert first + "  loss" in live.text(200) and live.text(200).endswith(last)


def test_a_resumed_run_begins_where_it_was():
    assert make_live(0, "start", first_step=100).text(80).startswith(f" {bar(0.5, 10, UNICODE[0])}  50%  step 100/200  start 0:")


def test_bar_and_sparkline_by_hand():
    assert [bar(x, 3, " ▌█") for x in (0, 1 / 6, 1 / 3, 0.5, 5 / 6, 1)] == ["   ", "▌  ", "█  ", "█▌ ", "██▌", "███"]
    assert all(len(bar(i / 1000, 10, blocks)) == 10 for i in range(1001) for blocks in (UNICODE[0], ASCII[0]))
    assert sparkline([1, 2, 3, 8], UNICODE[1]) == "▁▂▃█" and sparkline([5, 5], UNICODE[1]) == "▁▁" and sparkline([], "ab") == ""


def test_a_library_that_warns_again_and_again(capsys):
    shown = warnings.showwarning
    for rank in (0, 1):
        with calm(rank), warnings.catch_warnings():
            warnings.simplefilter("always")
            for i in range(5):
                warnings.warn(f"for the {i}th\ntime", stacklevel=1)
            warnings.warn("another", stacklevel=1)
        assert capsys.readouterr().err.splitlines() == [
            "warning: for the 0th time (UserWarning)", "warning: another (UserWarning)"] * (rank == 0)
    assert warnings.showwarning is shown


# ---- a whole run ----------------------------------------------------------------------------------------------------

def test_two_ranks_on_a_terminal(text_dataset, tmp_path):
    """By the launch command: rank 0 has the terminal, and draws; log.txt has the plain lines all the same."""
    (tmp_path / "small.yaml").write_text(f"data: {{path: {text_dataset}}}\nrun: {{dir: {tmp_path}/run}}")
    command = ["bash", str(ROOT / "launch/train.sh"), "--nproc_per_node=2", str(tmp_path / "small.yaml"), *SMALL,
               "--train.max_steps=60", "--eval.interval=30", "--checkpoint.interval=30", "--train.micro_batch_size=4",
               "--checkpoint.async_save=false"]
    python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": "the tests' own"}
    status, said, screen = on_a_terminal(command, env=python, cwd=ROOT)
    assert status == 0, said
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    steps = [line for line in log if line.startswith("step ")]
    assert len(steps) == 60 and "\x1b" not in "".join(log)
    kept = [line for line in log if line not in steps or "| train" in line]
    saved = [f"saved       {tmp_path}/run/checkpoints/step-000000{n}" for n in (30, 60)]
    left = [line for line in screen.text().splitlines() if not line.startswith(saved[0]) and not line.startswith(saved[1])]
    assert left == kept and len(screen.text().splitlines()) == len(left) + 2
    assert sum("| train" in line for line in left) == 2
    live = [line for line in screen.seen if re.match(" .{10} ...%  step ", line)]
    assert live, said
    assert any(re.search(r"  step \d+/60  (loss \d|start|first step)", line) for line in live)
    # The table at the start: each thing once.
    heads = [line.split()[0] for line in left[:8]]
    assert heads == ["model", "data", "batch", "sharding", "device", "memory", "run", "overridden"]
    told = " ".join(" ".join(left[7:]).partition("step ")[0].split())
    assert told.startswith("overridden model.n_layer 2 (12), model.n_head 2 (12), ") and told.endswith(" more")
    assert "train.precision float32 (auto), train.compile false (null), log.interval 1 (10)" in told


# ---- --help ---------------------------------------------------------------------------------------------------------

TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


def test_help_of_every_tool_has_examples_and_imports_nothing_heavy(capsys, monkeypatch):
    """All in one fresh Python, one after the other."""
    code = textwrap.dedent("""
        import contextlib, io, json, runpy, sys
        sys.path.insert(0, "tools")
        said = {}
        for tool in sys.argv[1:]:
            sys.argv = [f"tools/{tool}", "--help"]
            with contextlib.redirect_stdout(io.StringIO()) as out:
                try:
                    runpy.run_path(f"tools/{tool}", run_name="__main__")
                except SystemExit as end:
                    status = end.code
            heavy = [name for name in ("torch", "streaming", "matplotlib", "numpy", "transformers") if name in sys.modules]
            said[tool] = status, heavy, out.getvalue()
        print(json.dumps(said))""")
    done = subprocess.run([sys.executable, "-c", code, *TOOLS], cwd=ROOT, capture_output=True, text=True, check=True)
    for tool, (status, heavy, said) in json.loads(done.stdout).items():
        assert status in (0, None) and heavy == [], tool
        assert said.startswith("usage: ") and f"\n    python tools/{tool} " in said, tool
        assert "(default: None)" not in said and "(default: False)" not in said, tool


@pytest.mark.parametrize("script", ["launch/train.sh", "launch/quickstart.sh", "tests/run.sh"])
def test_help_of_the_scripts(script, tmp_path):
    """Without setting anything up. That of launch/train.sh imports nothing heavy: test_config.py."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": "the tests' own"}
    done = subprocess.run(["bash", str(ROOT / script), "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and f"bash {script} " in done.stdout
