"""tools/migrate_nanogpt.py: values worked out by hand, learning rates step by step, and files that would run code."""

import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.config import load_config
from nanogpt.errors import UserError
from nanogpt.optim import learning_rate

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import migrate_nanogpt  # noqa: E402

CHAR = """'''A small one.'''
import time
out_dir = 'out-char'     # where
eval_interval = 25 * 10
eval_iters = 20
always_save_checkpoint = False
wandb_run_name = 'mini ' + str(time.time())
dataset = 'letters'
micro = 2 ** 4
batch_size = micro // 2
gradient_accumulation_steps = 5 * batch_size
n_layer = 6 - 3
n_head = n_layer
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "char.py").write_text(CHAR)
    return tmp_path


def call(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["migrate_nanogpt.py", *map(str, argv)])
    migrate_nanogpt.main()
    said = capsys.readouterr()
    return said.out, said.err


def test_a_config_by_hand(files, monkeypatch, capsys):
    out, err = call(monkeypatch, capsys, "--out", "mine.yaml", "torchrun", "--standalone", "--nproc_per_node=4", "--nnodes", "2",
                    "train.py", "char.py", "--n_embd=96", "--max_iters=4000", "--warmup_iters=100", "--lr_decay_iters=3000",
                    "--block_size=64", "--dropout=0.25", "--compile=False", "--wandb_log=True", "--learning_rate=1e-3")
    assert out == "" and yaml.safe_load(Path("mine.yaml").read_text()) == dict(
        run=dict(name="mini", dir="out-char"), data=dict(path="data/letters"),
        model=dict(n_layer=3, n_head=3, n_embd=96, block_size=64, dropout=0.25, bias=False),
        optim=dict(learning_rate=0.001, min_learning_rate=6e-5, warmup_steps=100, decay_steps=3000),
        train=dict(max_steps=4000, global_batch_size=8 * 40, micro_batch_size=8, compile=False),
        eval=dict(interval=250, sequences=160), checkpoint=dict(interval=250, keep_best=True),
        log=dict(interval=1, wandb="online", wandb_project="owt"), sharding=dict(strategy="replicate"))
    config = load_config(["mine.yaml"], 8, 4)
    assert config.accumulation(8) * 8 == 40 and config.train.precision == "auto" and config.optim.beta2 == 0.95
    told = err.splitlines()
    assert told[0].startswith("note: char.py: line 9: micro is no setting of nanoGPT's") and len(told) == 6
    assert [line.partition(":")[0] for line in told] == ["note"] * 4 + ["data", "start"]
    assert told[-1] == "start: torchrun --standalone --nproc_per_node=4 --nnodes 2 launch/train.sh mine.yaml"
    assert told[-2].split(": ", 1)[1].strip() == ("python tools/convert_nanogpt.py --data NANOGPT/data/letters --block-size 64 "
                                                  "--out data/letters")


def test_what_nobody_set_is_nanogpts(files, monkeypatch, capsys):
    """Of its train.py, where ours differ: no biases, 40 accumulated, lr from 6e-4 over 600,000 steps to 6e-5."""
    out, _ = call(monkeypatch, capsys, "train.py")
    Path("all.yaml").write_text(out)
    c = load_config(["all.yaml"])
    assert (c.model.bias, c.model.n_layer, c.model.n_embd, c.model.block_size, c.model.dropout) == (False, 12, 768, 1024, 0.0)
    assert (c.train.global_batch_size, c.train.micro_batch_size, c.train.max_steps, c.train.compile) == (480, 12, 600000, None)
    assert (c.optim.learning_rate, c.optim.min_learning_rate, c.optim.warmup_steps, c.optim.decay_steps, c.optim.weight_decay,
            c.optim.beta1, c.optim.beta2, c.optim.grad_clip, c.optim.name) == (6e-4, 6e-5, 2000, 600000, 0.1, 0.9, 0.95, 1.0,
                                                                              "adamw")
    assert (c.eval.interval, c.checkpoint.interval, c.eval.sequences, c.log.interval) == (2000, 2000, 2400, 1)
    assert (c.run.init_from, c.run.device, c.log.wandb, c.data.path, c.run.seed) == (None, "auto", "off", "data/openwebtext", 1337)


def get_lr(it, peak, warmup, decay, end):
    """nanoGPT's schedule, from its formula: a line, half a cosine, and its end."""
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    if it > decay:
        return end
    return end + 0.5 * (1 + math.cos(math.pi * (it - warmup) / (decay - warmup))) * (peak - end)


@pytest.mark.parametrize("options, args", [
    (["--max_iters=60", "--warmup_iters=10", "--lr_decay_iters=50", "--min_lr=1e-5"], (6e-4, 10, 50, 1e-5)),
    (["--max_iters=60", "--warmup_iters=0", "--learning_rate=1e-2"], (1e-2, 0, 600000, 6e-5)),
    (["--max_iters=60"], (6e-4, 2000, 600000, 6e-5)),                          # ends within its warmup
    (["--max_iters=60", "--warmup_iters=60"], (6e-4, 60, 600000, 6e-5)),
    (["--max_iters=60", "--decay_lr=False"], (6e-4, 0, 1e18, 6e-4))], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_the_learning_rate_of_each_step(files, monkeypatch, capsys, options, args):
    out, _ = call(monkeypatch, capsys, "train.py", *options)
    Path("c.yaml").write_text(out)
    config = load_config(["c.yaml"])
    for step in range(60):
        assert learning_rate(step, config) == pytest.approx(get_lr(step, *args), rel=1e-12), step


def test_where_it_starts_and_what_it_runs_on(files, monkeypatch, capsys):
    def made(*options):
        out, err = call(monkeypatch, capsys, "python3", "train.py", "--max_iters=9", "--decay_lr=False", *options)
        return yaml.safe_load(out), [line.split(": ")[1] for line in err.splitlines() if line.startswith("note: ")]
    ours, notes = made("--init_from=gpt2-xl", "--eval_only=True", "--batch_size=8", "--eval_iters=500", "--block_size=256")
    assert ours == dict(run=dict(init_from="hf:gpt2-xl"), data=dict(path="data/openwebtext"), model=dict(block_size=256),
                        train=dict(micro_batch_size=8), eval=dict(only=True, sequences=4000), log=dict(interval=1))
    ours, notes = made("--init_from=gpt2", "--dropout=0.1", "--device=cuda:3", "--dtype=float16", "--backend=gloo")
    assert ours["model"] == dict(dropout=0.1) and ours["run"] == dict(init_from="hf:gpt2", device="cuda")
    assert notes == ["device='cuda:3'", "dtype='float16'", "backend='gloo'", "eval_iters"] and "precision" not in ours["train"]
    ours, notes = made("--init_from=resume", "--out_dir=o d", "--device=mps")
    assert ours["run"] == dict(dir="o d", init_from="runs/migrated_nanogpt", device="cpu") and "model" not in ours
    assert notes == ["init_from='resume'", "device='mps'", "eval_iters"] and "precision" not in ours["train"]
    ours, notes = made("--device=cpu")
    assert ours["train"]["precision"] == "float32" and notes == ["dtype", "eval_iters"]  # as nanoGPT does there
    ours, notes = made("--device=cpu", "--dtype=float32")
    assert ours["train"]["precision"] == "float32" and notes == ["eval_iters"]


@pytest.mark.parametrize("text, line, said", [
    ("batch_size = 4\n__import__('os').system('touch ran')", 2, "would have to be run, and nothing is"),
    ("batch_size = __import__('os').system('touch ran') or 8", 1, "would have to be run"),
    ("import os", 1, "import os would have to be run"),
    ("from os import *", 1, "would have to be run"),
    ("if True:\n  batch_size = 4", 1, "would have to be run"),
    ("x = [open('ran', 'w') for i in (1,)]", 1, "would have to be run"),
    ("wandb_run_name = 'a' + str(open('ran', 'w'))", 1, "line 1: str(open('ran', 'w')) would have to be run"),
    ("wandb_run_name = f'{open(\"ran\", \"w\")}'", 1, "would have to be run"),
    ("DEFAULTS.x = 3", 1, "would have to be run"),
    ("batch_size = (lambda: 3)()", 1, "would have to be run"),
    ("batch_size = 9 ** 9 ** 9", 1, "cannot be worked out"),
    ("batch_size = 4 // 0", 1, "cannot be worked out"),
    ("out_dir = 'a' * 10 ** 9", 1, "cannot be worked out"),
    ("batch_size = 2.5", 1, "batch_size: 2.5 is not a whole number, as nanoGPT's own 12"),
    ("\nbias = 1", 2, "bias: 1 is not True or False"),
    ("n_layer = -1", 1, "n_layer: -1 is not above 0"),
    ("learning_rate = 1e999", 1, "learning_rate: inf is not above 0"),
    ("dataset = 'a\\nb'", 1, "dataset: 'a\\nb' is too long for a name, or holds control characters"),
    ("batch_size = 4 +", 1, "not Python"),
    ("x = " + "-" * 50000 + "1", 0, "not Python"),
], ids=str)
def test_what_is_no_value_is_named_and_never_run(files, monkeypatch, capsys, text, line, said):
    Path("bad.py").write_text(text)
    with pytest.raises(UserError) as error:
        call(monkeypatch, capsys, "--out", "no.yaml", "bad.py")
    told = str(error.value)
    assert said in told and told.startswith(f"bad.py: line {line}: " if line else "bad.py: ") and len(told.splitlines()) == 1
    assert sorted(p.name for p in files.iterdir()) == ["bad.py", "char.py"]


def test_all_problems_at_once_and_of_the_command(files, monkeypatch, capsys):
    Path("bad.py").write_text("batch_size = f()\nn_layer = 'x'")
    for argv, said in ((["train.py", "bad.py", "--n_layers=3", "--bias"], [
            "bad.py: line 1: f() would", "bad.py: line 2: n_layer: 'x' is", "--n_layers: no setting of nanoGPT's train.py; did "
            "you mean n_layer?", "--bias: nanoGPT takes --key=value"]),
            (["nowhere.py"], ["nowhere.py: cannot be read (No such file or directory)"]), ([], ["what to read is missing"]),
            (["train.py", "--init_from=gpt3"], ["init_from: 'gpt3' is nothing that nanoGPT knows"]),
            (["train.py", "--device=tpu"], ["device: 'tpu' is not"]), (["train.py", "--dtype=int8"], ["dtype: 'int8' is not"]),
            (["train.py", "--lr_decay_iters=2000"], ["lr_decay_iters: 2000 is not above warmup_iters 2000"]),
            (["train.py", "--min_lr=1.0"], ["min_lr: 1 is above learning_rate"]),
            (["torchrun", "--nproc_per_node=3", "train.py"], ["gradient_accumulation_steps: nanoGPT divides it by its 3"]),
            (["torchrun", "--nproc_per_node=gpu", "train.py"], ["--nproc_per_node=gpu: 'gpu' is not a number"]),
            (["--out", "char.py", "char.py"], ["--out: char.py does not end in .yaml"]),
            (["train.py", "--n_head=7"], ["what nanoGPT was given makes no config here: model.n_embd: 768 is not"])):
        with pytest.raises(UserError) as error:
            call(monkeypatch, capsys, *argv)
        told = str(error.value).splitlines()
        assert len(told) == len(said) and all(a.startswith(b) for a, b in zip(told, said)), told
    Path("there.yaml").touch()
    with pytest.raises(UserError, match="there.yaml: is there already"):
        call(monkeypatch, capsys, "--out", "there.yaml", "char.py")


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.recursive(
    st.sampled_from(["1", "2.5", "'a'", "True", "batch_size", "None", "x", "()"]),
    lambda inner: st.tuples(inner, st.sampled_from(["+", "*", "**", "/", "//", "%", "-", "and"]), inner).map(
        lambda t: f"({t[0]} {t[1]} {t[2]})"), max_leaves=6).map(lambda text: f"batch_size = {text}".encode())))
def test_any_file_is_read_as_python_would_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "any.py"
    path.write_bytes(content)
    try:
        _, values, found, _ = migrate_nanogpt.read_command([str(path)])
    except UserError:
        return
    names = dict(migrate_nanogpt.DEFAULTS)
    exec(compile(ast.parse(content), "any.py", "exec"), {"__builtins__": {}}, names)  # nothing but what was let through
    assert {key: values[key] for key in found} == {key: names[key] for key in found}


def test_as_a_command(files):
    done = subprocess.run([sys.executable, str(ROOT / "tools/migrate_nanogpt.py"), "char.py"], capture_output=True, text=True)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["model"]["n_layer"] == 3
    done = subprocess.run([sys.executable, str(ROOT / "tools/migrate_nanogpt.py"), "char.yaml"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: char.yaml: cannot be read")
