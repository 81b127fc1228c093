"""tools/sizing.py against what PyTorch counts of the real model: its parameters by name, its FLOPs by module."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanogpt import memory
from nanogpt.config import Config, load_config
from nanogpt.errors import UserError
from nanogpt.model import GPT, CausalSelfAttention
from nanogpt.optim import make_optimizer
from nanogpt.sharding import freeze

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import sizing  # noqa: E402

MODERN = dict(position="rope", norm="rmsnorm", mlp="swiglu", qk_norm=True, n_kv_head=1, bias=False, tied=False)


def make(model=(), train=(), **optim) -> Config:
    return Config(model=dict(n_layer=3, n_head=2, n_embd=32, block_size=24, vocab_size=70) | dict(model),
                  train=dict(max_steps=7, global_batch_size=2, micro_batch_size=2) | dict(train), optim=optim)


def counted(config: Config):
    """(FLOPs of forward, of backward, of the optimizer's step, {module: FLOPs of both ways}) of two sequences."""
    model = GPT(config.model)
    model.init_weights(1)
    freeze(model, config.train.freeze_blocks)
    optimizer = make_optimizer(model, config.optim)
    ids = torch.zeros(2, config.model.block_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as both:
        with FlopCounterMode(display=False) as forward:
            loss = model(ids, ids)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    with FlopCounterMode(display=False) as step:
        optimizer.step()
    modules = {name: sum(of.values()) for name, of in both.get_flop_counts().items()}
    return forward.get_total_flops(), backward.get_total_flops(), step.get_total_flops(), modules, model


@pytest.mark.parametrize("config", [make(), make(MODERN | dict(mlp_dim=40, head_dim=10)), make(train=dict(freeze_blocks=2)),
                                    make(MODERN, dict(freeze_blocks=1)), make(dict(mlp="swiglu"), name="muon")],
                         ids=["GPT-2", "modern", "frozen", "modern, frozen", "muon"])
def test_against_what_torch_counts(config, monkeypatch):
    monkeypatch.setattr(CausalSelfAttention, "fused", False)  # of the CPU's fused kernel torch counts nothing
    found = sizing.sizing(config)
    forward, backward, step, modules, model = counted(config)
    tokens = 2 * config.model.block_size
    assert (found["forward"] * tokens, found["backward"] * tokens, found["optimizer_flops_a_step"]) == (forward, backward, step)
    assert found["tokens_per_step"] == tokens and found["tokens"] == 7 * tokens
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        of = found["components"][name]
        by_torch = sum(modules.get(f"GPT.transformer.h.{i}.{name}", 0) for i in range(3))
        assert (of["forward"] + of["backward"]) * tokens == by_torch > 0, name

    parameters, trained = {}, {}
    for name, p in model.named_parameters():
        name = ".".join(part for part in name.split(".")[:-1] if part not in ("transformer", "h") and not part.isdigit())
        parameters[name] = parameters.get(name, 0) + p.numel()
        trained[name] = trained.get(name, 0) + p.numel() * p.requires_grad
    components = found["components"]
    assert {name: of["parameters"] for name, of in components.items() if of["parameters"]} == parameters
    assert {name: of["trained"] for name, of in components.items() if of["parameters"]} == trained
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    for key, n in memory.states(config, 1).items():  # which are held against real tensors
        assert sum(of[key] for of in components.values()) == n, key


def test_gpt2_by_hand():
    """nanoGPT's notebook has 124,337,664 parameters, with 50,257 rows; and 291,648,307,200 FLOPs of a forward of 1024."""
    config = load_config([str(ROOT / "configs" / "gpt2_124m.yaml")])
    config.model.vocab_size = 50257
    found, rows = sizing.sizing(config), 50304 - 50257
    assert found["parameters"] - rows * 768 == 124337664
    assert 1024 * (found["forward"] - 2 * rows * 768) == 291648307200
    scores = found["components"]["attn.scores"]
    assert scores["forward"] == 12 * 2 * 1024 * 768 and scores["backward"] == 2 * scores["forward"]
    assert found["six_n"] == 6 * (124337664 + rows * 768) and found["palm"] == GPT.flops_per_token(meta(config))
    with FlopCounterMode(display=False) as both:
        model = meta(config)
        ids = torch.zeros(1, 1024, dtype=torch.int64, device="meta")
        CausalSelfAttention.fused = False
        try:
            model(ids, ids).backward()
        finally:
            CausalSelfAttention.fused = True
    assert both.get_total_flops() == 1024 * (found["forward"] + found["backward"])
    time = sizing.time_of(found, 312e12, 8, 0.3)  # the notebook's 3.46 days for 300B tokens, by 6 N D
    assert time["run_by_6nd_s"] / 86400 == pytest.approx(3.46 * found["tokens"] / 300e9 * 124373760 / 124337664, rel=2e-3)
    assert time["run_s"] / time["run_by_6nd_s"] == pytest.approx(854654976 / found["six_n"])


def meta(config) -> GPT:
    with torch.device("meta"):
        return GPT(config.model)


def test_activations_are_those_of_memory():
    for mode in memory.MODES:
        config = memory.changed(make(MODERN), activation_checkpointing=mode)
        found = sizing.sizing(config)
        ends = memory.activations(config) - memory.activations(config.model_copy(update=dict(
            model=config.model.model_copy(update=dict(n_layer=1))))) - 2 * sum(n for _, n in found["activations"]) * 48
        assert ends == 0 and found["micro_tokens"] == 48  # two blocks more or less
        assert (found["recomputed"] > 0) == (mode == "full")


def call(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr(sys, "argv", ["sizing.py", *map(str, argv)])
    sizing.main()
    return capsys.readouterr().out


def test_the_command(monkeypatch, capsys, tmp_path):
    config = ROOT / "configs" / "gpt2_350m.yaml"
    found = json.loads(call(monkeypatch, capsys, config, "--vocab-size", 100, "--json", "--gpus", 4, "--gpu", "A100"))
    assert found["time"]["step_s"] == pytest.approx(
        (found["forward"] + found["backward"]) * 480 * 1024 / (4 * 312e12 * 0.4))
    said = call(monkeypatch, capsys, config, "--sharding.strategy", "hybrid", "--sharding.shard_size", 8, "--optim.name",
                "muon", "--sharding.activation_checkpointing", "full", "--out", tmp_path / "s.svg")
    assert "note: vocabulary of 50,257, GPT-2's: the dataset is not here" in said
    row = next(line.split() for line in said.splitlines() if line.startswith("all "))
    assert row[1] == f"{50304 * 1024 + 1024 * 1024 + 24 * (12 * 1024**2 + 2 * 1024) + 1024:,}"
    assert "and Muon, once a step: " in said and "and recomputed in backward (full): " in said
    assert "<svg" in (tmp_path / "s.svg").read_text() and [p.name for p in tmp_path.iterdir()] == ["s.svg"]
    for argv, wrong in ((["--mfu", 40], "--mfu: 40 is no share"), (["--gpu", "Abacus"], "Abacus is not known"),
                        (["--out", "s.gif"], "s.gif ends neither in"), (["--layers", 3], "--layers: no option of this tool"),
                        (["--out", tmp_path / "no" / "s.png"], "s.png: cannot be written")):
        with pytest.raises(UserError, match=wrong):
            call(monkeypatch, capsys, config, *argv)


@pytest.mark.parametrize("tool", ["sizing", "scaling_laws", "migrate_nanogpt"])
def test_help_imports_nothing_heavy(tool):
    code = (f"import sys; sys.argv = ['{tool}.py', '--help']; import runpy\n"
            f"try: runpy.run_path('tools/{tool}.py', run_name='__main__')\n"
            "except SystemExit: assert not {'torch', 'numpy', 'scipy', 'matplotlib', 'streaming'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python tools/{tool}.py " in done.stdout
