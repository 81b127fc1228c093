"""Predicted memory against bytes that are there: tensors of sharded models, what autograd keeps, what the allocator gave."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from test_train import SMALL, train_run

from nanogpt import loss, memory
from nanogpt.config import Config, Optim
from nanogpt.errors import UserError
from nanogpt.model import GPT, Block
from nanogpt.sharding import build, checkpoint_activations

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import plan  # noqa: E402

MODERN = dict(position="rope", norm="rmsnorm", mlp="swiglu", qk_norm=True, n_kv_head=2, bias=False, tied=False)


def make(model=(), train=(), **sharding) -> Config:
    return Config(model=dict(n_layer=4, n_head=4, n_embd=64, block_size=1024, vocab_size=300) | dict(model),
                  train=dict(micro_batch_size=1, global_batch_size=2, compile=False, max_steps=1, precision="bfloat16") | dict(train),
                  sharding=sharding, checkpoint=dict(async_save=False))


def by_muon(config: Config) -> Config:
    return config.model_copy(update=dict(optim=Optim(name="muon")))


# ---- states: exactly ------------------------------------------------------------------------------------------------

STATES = [make(dict(n_embd=36, n_head=2, n_layer=2, block_size=33) | model, dict(freeze_blocks=frozen), **sharding)
          for sharding in (dict(strategy="full"), dict(strategy="grad"), dict(strategy="hybrid", shard_size=2),
                           dict(strategy="replicate"))
          for model, frozen in ((MODERN | dict(n_kv_head=1), 0), (dict(), 1))]
STATES.append(by_muon(make(dict(n_embd=36, n_head=2, n_layer=2, block_size=33), strategy="full")))


def measured_states(configs: list[Config]) -> list[dict]:
    """Sums of the bytes of this rank's tensors, after a step."""
    import torch.distributed as dist

    from nanogpt.optim import make_optimizer
    dist.init_process_group("gloo")
    found = []
    for config in configs:
        model = build(config, torch.device("cpu"))
        optimizer = make_optimizer(model, config.optim)
        ids = torch.zeros(1, 8, dtype=torch.int64)
        model(ids, ids).backward()
        params = [p for p in model.parameters()]
        gradients = [p.grad for p in params if p.grad is not None]
        optimizer.step()
        of = dict(weights=params, gradients=gradients,
                  optimizer=[t for state in optimizer.state.values() for t in state.values()])
        found.append({k: sum(getattr(t, "_local_tensor", t).nbytes for t in tensors) for k, tensors in of.items()})
    return found


def test_states_are_exact(ranks):
    found = ranks(4, measured_states, STATES, local_world_size=2)
    for i, config in enumerate(STATES):
        assert memory.states(config, 4, 2) == found[0][i], config.sharding
        assert all(of[i][key] <= found[0][i][key] for of in found for key in of[i])  # the first rank has the most


# ---- what autograd keeps --------------------------------------------------------------------------------------------

def allocations(function) -> tuple[list[int], object]:
    """Bytes in use by all that function allocates, after each allocation or release on the CPU, and what it returns."""
    from torch.profiler import ProfilerActivity, profile
    gc.collect()  # what was there before is not released meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    changes = sorted((e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    in_use = [0]
    for _, change in changes:
        in_use.append(in_use[-1] + change)
    return in_use, result


def kept_by_autograd(module, function) -> int:
    """Bytes of the storages that autograd keeps, parameters apart."""
    own, kept = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()  # so alive, and its address its own
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    kept[out.untyped_storage().data_ptr()] = out.untyped_storage()
    return sum(storage.nbytes() for storage in kept.values())


FLOAT32 = dict(precision="float32")
ACTIVATIONS = [make(), make(train=FLOAT32), make(dict(block_size=256)), make(dict(dropout=0.1, block_size=512)),
               make(dict(dropout=0.1, block_size=256), FLOAT32), make(MODERN), make(MODERN, FLOAT32),
               make(dict(mlp="relu2", norm="rmsnorm")), make(dict(mlp="swiglu", mlp_dim=100, head_dim=32, n_kv_head=1))]


@pytest.mark.parametrize("config", ACTIVATIONS, ids=lambda c: " ".join(map(str, (
    c.train.precision, c.model.block_size, c.model.mlp, c.model.norm, c.model.dropout))))
def test_activations(config):
    for mode in memory.MODES:
        config = memory.changed(config, activation_checkpointing=mode)
        model = GPT(config.model)
        model.init_weights(1)
        model = model.to(getattr(torch, config.train.precision))
        for block in model.transformer.h if mode != "none" else ():
            checkpoint_activations(block, mode == "selective")
        ids = torch.zeros(1, config.model.block_size, dtype=torch.int64)
        predicted = memory.activations(config, cuda=False)
        if mode == "none":
            assert kept_by_autograd(model, lambda: model.hidden(ids)) == pytest.approx(predicted, rel=0.1)
        in_use, _ = allocations(lambda: model.hidden(ids))
        assert in_use[-1] == pytest.approx(predicted, rel=0.1), mode


@pytest.mark.parametrize("model", [{}, dict(mlp="swiglu", norm="rmsnorm", bias=False)], ids=["gelu", "swiglu"])
def test_activations_of_a_compiled_block(model):
    """By inductor's own partition of forward and backward, without its kernels, which a test has no time to compile."""
    config = make(model, dict(compile=True))
    block = Block(config.model).bfloat16()
    compiled = torch.compile(block, backend="aot_eager_decomp_partition")
    x = torch.randn(1, 1024, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = kept_by_autograd(block, lambda: compiled(x)) - x.nbytes  # its result is the next one's
    assert kept == pytest.approx(1024 * sum(n for _, n, modes in memory.kept(config, cuda=False) if "n" in modes), rel=0.1)


# ---- the peak -------------------------------------------------------------------------------------------------------

SMALL_CHUNKS = 1 << 19
PEAKS = [(make(), 1 << 26), (make(activation_checkpointing="full"), 1 << 26),
         (make(activation_checkpointing="selective"), 1 << 26), (make(train=dict(global_batch_size=1)), 1 << 26),
         (make(strategy="replicate"), 1 << 26),
         (make(dict(block_size=128, n_embd=128), strategy="grad"), 1 << 26),        # fullest at the end of backward
         (make(dict(vocab_size=3000), FLOAT32), 1 << 26), (make(MODERN), 1 << 26),        # … in the loss
         (make(dict(vocab_size=1000)), SMALL_CHUNKS), (make(dict(vocab_size=1000), FLOAT32), SMALL_CHUNKS),
         *((by_muon(make(dict(block_size=32, n_embd=128, mlp=mlp), dict(precision=precision))), 1 << 26)  # … in the optimizer
           for mlp, precision in (("gelu", "float32"), ("gelu", "bfloat16"), ("swiglu", "bfloat16")))]


def train_steps(config: Config, device: torch.device, measured):
    """Two steps as train.py takes them; the second is measured."""
    import torch.distributed as dist

    from nanogpt.optim import make_optimizer
    model = build(config, device)
    optimizer = make_optimizer(model, config.optim, getattr(torch, config.train.precision))
    last = config.accumulation(dist.get_world_size()) - 1
    ids = torch.zeros(config.train.micro_batch_size, config.model.block_size, dtype=torch.int64, device=device)

    def step():
        for i in range(last + 1):
            model.set_requires_gradient_sync(i == last or config.sharding.syncs_each)
            model.set_requires_all_reduce(i == last)
            (model(ids, ids) / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step()
    states = sum(getattr(t, "_local_tensor", t).nbytes for t in (
        *model.parameters(), *(t for state in optimizer.state.values() for t in state.values())))
    return states, measured(step)


def measured_peaks(configs) -> list[int]:
    import torch.distributed as dist
    dist.init_process_group("gloo")
    found = []
    for config, loss.CHUNK_LOGITS in configs:
        states, (in_use, _) = train_steps(config, torch.device("cpu"), allocations)
        found.append(states + max(in_use))
    loss.CHUNK_LOGITS = 1 << 26
    return found


def test_peak_of_a_step(ranks, monkeypatch):
    """One rank: on several the profiler misses what gloo's own threads release."""
    for (config, chunk), found in zip(PEAKS, ranks(1, measured_peaks, PEAKS)[0]):
        monkeypatch.setattr(memory, "CHUNK_LOGITS", chunk)
        predicted = memory.predict(config, 1, 1, cuda=False)
        assert sum(predicted.values()) == pytest.approx(found, rel=0.1), (predicted, config)


def measured_on_gpu(configs: list[Config]) -> list[int]:
    import torch.distributed as dist
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0))
    found = []
    for config in configs:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_steps(config, torch.device("cuda", 0), lambda step: step())
        found.append(torch.cuda.max_memory_allocated() - before)
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_on_a_gpu(ranks):
    gpt2 = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, bias=False)
    train = dict(micro_batch_size=8, global_batch_size=16)
    configs = [make(gpt2 | model, train | dict(compile=compiled), activation_checkpointing=mode)
               for model in ({}, MODERN | dict(n_kv_head=4)) for compiled in (False, True) for mode in memory.MODES]
    for config, found in zip(configs, ranks(1, measured_on_gpu, configs)[0]):
        assert sum(memory.predict(config, 1, 1).values()) == pytest.approx(found, rel=0.1), config


# ---- at the start of a run ------------------------------------------------------------------------------------------

def test_what_fits_is_told_and_what_does_not_is_refused():
    config = make(dict(n_embd=256), dict(micro_batch_size=4, global_batch_size=8), strategy="replicate")
    cpu = torch.device("cpu")
    peak, certain = (sum(of.values()) for of in (memory.predict(config, 2, 2, False), memory.states(config, 2, 2)))
    line, warning = memory.check(config, cpu, 2, 2, 2 * peak)
    assert warning is None
    assert line.startswith(f"{memory.gib(peak)} GiB of {memory.gib(2 * peak)} GiB a rank, as predicted: activations ")
    _, warning = memory.check(config, cpu, 2, 2, round(1.05 * peak))  # within a tenth
    assert "take --train.micro_batch_size 2" in warning
    _, warning = memory.check(config, cpu, 2, 2, certain + 1)  # may not fit: no reason to refuse
    assert "--sharding.strategy full" in warning or "--sharding.activation_checkpointing" in warning
    with pytest.raises(UserError, match="^memory: weights, gradients .* take 0.0.* has 0.0.*; take --sharding") as error:
        memory.check(config, cpu, 2, 2, certain - 1)
    options = dict(zip(*[iter(str(error.value).partition("take --")[2].replace("--", "").split())] * 2))
    other = memory.changed(config, **{k.partition(".")[2]: int(v) if v.isdigit() else v for k, v in options.items()})
    assert sum(memory.predict(other, 2, 2, False).values()) < certain  # what it says helps
    with pytest.raises(UserError, match="take more ranks with --sharding.strategy full, or a smaller model$"):
        memory.check(config, cpu, 2, 2, 1000)


def refused_run(argv):
    kept, memory.room = memory.room, lambda *_: 10_000
    try:
        train_run(argv)
    except UserError as error:
        return str(error)
    finally:
        memory.room = kept


def test_a_run_tells_its_memory_and_is_refused_before_its_first_step(ranks, text_dataset, tmp_path):
    (tmp_path / "c.yaml").write_text(f"data: {{path: {text_dataset}}}")
    argv = [str(tmp_path / "c.yaml"), *SMALL, "--train.micro_batch_size=4", "--train.max_steps=1", "--optim.warmup_steps=0"]
    for said in ranks(2, refused_run, [*argv, f"--run.dir={tmp_path}/no"]):
        assert said.startswith("memory: weights, gradients and optimizer state take 0.000 GiB a rank, and cpu has 0.0")
    assert not (tmp_path / "no").exists()
    ranks(1, train_run, [*argv, f"--run.dir={tmp_path}/yes"])
    assert " GiB a rank, as predicted: " in (tmp_path / "yes" / "log.txt").read_text()


# ---- tools/plan.py --------------------------------------------------------------------------------------------------

def call(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, argv)])
    plan.main()
    return capsys.readouterr().out


XL = (ROOT / "configs" / "gpt2_1558m.yaml", "--gpus", 8, "--gpu-memory", 80)


def test_plan(monkeypatch, capsys):
    found = json.loads(call(monkeypatch, capsys, *XL, "--price", 2, "--mfu", 0.5, "--json"))
    N = 50304 * 1600 + 1024 * 1600 + 48 * (12 * 1600**2 + 2 * 1600) + 1600
    flops = 6 * (N - 1024 * 1600) + 12 * 48 * 1600 * 1024
    assert (found["parameters"], found["flops_per_token"], found["tokens"]) == (N, flops, 600000 * 480 * 1024)
    again = 2 * 48 * (12 * 1600**2 + 2 * 1600) + 4 * 48 * 1600 * 1024  # forward of the blocks
    assert found["modes"]["full"]["hardware_flops_per_token"] == flops + again
    for mode, of in found["modes"].items():
        hours = found["tokens"] * of["hardware_flops_per_token"] / (8 * 0.5 * 989e12) / 3600
        assert (of["hours"], of["usd"]) == pytest.approx((hours, hours * 16))
        config = memory.changed(plan.load_config([str(XL[0])], 8, 8), activation_checkpointing=mode)
        config.model.vocab_size = 50257
        peak = [sum(memory.predict(memory.changed(config, micro_batch_size=of["largest_micro_batch"] + more), 8, 8).values())
                for more in (0, 1)]
        assert peak[0] <= 72 * 2**30 < peak[1] or of["largest_micro_batch"] == 60  # all of the batch
        assert 480 % (8 * of["largest_that_divides"]) == 0 < of["largest_that_divides"] <= of["largest_micro_batch"]
    assert found["chinchilla"]["tokens"] == 20 * N


def test_plan_without_data_in_words(monkeypatch, capsys):
    said = call(monkeypatch, capsys, *XL, "--train.micro_batch_size", 2)
    assert "note: vocabulary of 50,257, GPT-2's: the dataset is not here" in said and "micro-batch 2, 30 accumulated" in said
    said = call(monkeypatch, capsys, *XL, "--vocab-size", 100, "--train.micro_batch_size", 7)
    assert "note: planned with micro_batch_size 1, because " in said and "a multiple of 8 ranks x micro_batch_size 7" in said
    assert "vocabulary" not in said
    for option, value, wrong in (("--gpu", "Abacus", "--gpu: Abacus is not known"), ("--mfu", 40, "--mfu: 40 is no share"),
                                 ("--pirce", 2, "--pirce: no option of this tool"), ("--model.n_layers", 2, "did you mean"),
                                 ("--gpus", 12, "--gpus: 12 is not a multiple"), ("--gpu-memory", 0, "invalid positive")):
        with pytest.raises(UserError, match=wrong):
            call(monkeypatch, capsys, *XL, option, value)


def test_many_gpus_against_published_figures(monkeypatch, capsys, tmp_path):
    """torchtitan's Llama 3.1 8B of December 2024: 6,667 tokens/s a GPU on 8 H100s, 6,514 on 128; eager 5,762 and 5,605."""
    (tmp_path / "llama.yaml").write_text("""
        data: {path: none}
        model: {n_layer: 32, n_head: 32, n_kv_head: 8, n_embd: 4096, mlp_dim: 14336, block_size: 8192, vocab_size: 128256,
                position: rope, norm: rmsnorm, mlp: swiglu, bias: false, tied: false}
        train: {max_steps: 100, global_batch_size: 16, micro_batch_size: 2}
        sharding: {strategy: full, activation_checkpointing: selective}""")
    flops = 6 * (8030261248 - 128256 * 4096) + 12 * 32 * 4096 * 8192
    for at_8, at_128 in ((6667, 6514), (5762, 5605)):
        found = json.loads(call(monkeypatch, capsys, tmp_path / "llama.yaml", "--gpus", 8, "--gpu-memory", 96, "--json",
                                "--mfu", at_8 * flops / 989e12))
        assert found["parameters"] == 8030261248
        scaling = {row["gpus"]: row for row in found["scaling"]}
        assert scaling[8]["tokens_per_s_a_gpu"] == pytest.approx(at_8, rel=1e-6)
        assert scaling[128]["tokens_per_s_a_gpu"] == pytest.approx(at_128, rel=0.03)
        assert scaling[128]["efficiency"] < 1
        assert f"The model\nsays {scaling[128]['efficiency']:.1%}".replace("%", " %") in plan.__doc__ or at_8 == 5762


def test_volume_of_communication():
    """By hand, within a node, where nothing but the volume counts: GB/s x 0.8."""
    config = make(dict(vocab_size=256), dict(global_batch_size=16))
    block = 12 * 64**2 + 9 * 64 + 4 * 64
    root = 256 * 64 + 1024 * 64 + 128
    all_of_it, rate = 4 * block + root, 450e9 * 0.8
    for strategy, volume in (("full", 2 * 7 / 8 * (2 * 2 * 4 * block + 2 * root + 4 * all_of_it)),
                             ("grad", 7 / 8 * (2 * 2 * all_of_it + 4 * all_of_it)),
                             ("replicate", 7 / 8 * 2 * 4 * all_of_it)):
        config = memory.changed(config, strategy=strategy)
        assert plan.communication(config, 8, 8, "H100") == pytest.approx(volume / rate), strategy
    two = plan.communication(config, 16, 8, "H100")  # a node takes in half of it, twice, by 8 x 50 GB/s; 10 collectives
    assert two == pytest.approx(max(15 / 16 / 450, 1 / 2 / 400) * 8 * all_of_it / 0.8e9 + 10 * 10e-6)
