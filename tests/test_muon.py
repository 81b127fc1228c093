"""Muon on sharded matrices: torch's own, on any number of ranks; nothing that is not finite gets in, no restart shows."""

import math

import pytest
import torch
from test_numbers import GRADIENT, INF, NAN, bad_run, newest_state, told_skipped  # noqa: F401
from test_train import MODERN, SMALL, STEPS, plain_parts, small_run  # noqa: F401

from nanogpt.errors import UserError

MUON = ["--optim.name=muon", "--optim.adamw_learning_rate=0.004", "--model.zero_init=true"]


def plain_loop(small_run, text_dataset, *options, skipped=()):  # noqa: F811
    """(losses, norms) of a loop with torch.optim.Muon and AdamW, one process and no FSDP; steps in `skipped` (from 1) are
    not applied.
    """
    from nanogpt.sharding import freeze
    config, model, loss_of, share = plain_parts(small_run, text_dataset, *options)
    freeze(model, config.train.freeze_blocks)
    (H, K, D), swiglu = config.model.heads, config.model.mlp == "swiglu"
    matrices, matrix_of, rest = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if ".h." not in name or p.dim() < 2:
            rest.append(p)
            continue
        heights = [H * D, K * D, K * D] if "c_attn" in name else [len(p) // 2] * 2 if swiglu and "c_fc" in name else [len(p)]
        for i, part in enumerate(p.data.split(heights)):  # torch's Muon makes its steps in the weights themselves
            matrices.append(torch.nn.Parameter(part))
            matrix_of.append((p, heights, i))
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([dict(params=[p for p in rest if p.dim() == 2]),
                               dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)], betas=(0.9, 0.95), weight_decay=0.1)
    losses, norms = [], []
    for step in range(STEPS):
        muon.param_groups[0]["lr"] = 0.01 * share(step)
        for group in adamw.param_groups:
            group["lr"] = 0.004 * share(step)
        loss = loss_of(step)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for part, (p, heights, i) in zip(matrices, matrix_of):
            part.grad = p.grad.split(heights)[i]
        if step + 1 not in skipped:
            muon.step()
            adamw.step()
    return losses, norms


@pytest.fixture(scope="module")
def plain(small_run, text_dataset):  # noqa: F811
    return plain_loop(small_run, text_dataset, *MUON)


def same(metrics, losses, norms=None):
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=5e-4)  # torch's makes its steps of bfloat16, always
    if norms:
        assert [m["grad_norm"] for m in metrics] == pytest.approx(norms, rel=5e-3)  # of small gradients


LAYOUTS = [  # ranks, ranks of a machine, micro-batch, options
    (1, 1, 8, []),
    (2, 2, 4, ["--sharding.strategy=replicate"]),
    (2, 2, 2, ["--sharding.cpu_offload=true"]),
    (4, 2, 1, ["--sharding.strategy=hybrid", "--sharding.activation_checkpointing=full"]),
    (4, 4, 2, ["--sharding.strategy=grad"]),
]


@pytest.mark.parametrize("world_size, local, micro, options", LAYOUTS,
                         ids=["-".join([f"{w}ranks", *(x.split(".")[1] for x in o)]) for w, _, m, o in LAYOUTS])
def test_every_layout_is_the_plain_loop(small_run, plain, request, world_size, local, micro, options):  # noqa: F811
    metrics = small_run(request.node.callspec.id, world_size, *MUON, f"--train.micro_batch_size={micro}", *options,
                        local_world_size=local)
    same(metrics, *plain)
    assert plain[0][-1] < plain[0][0] - 1  # it learns


def test_stop_on_two_ranks_go_on_on_one_then_four(small_run, plain):  # noqa: F811
    small_run("elastic", 2, *MUON, "--train.micro_batch_size=2", steps=10)
    small_run("elastic", 1, *MUON, "--train.micro_batch_size=8", "--sharding.strategy=replicate", steps=18)
    same(small_run("elastic", 4, *MUON, "--train.micro_batch_size=1", "--sharding.strategy=grad"), *plain)


@pytest.mark.parametrize("world_size, options", [(2, MODERN), (4, ["--train.freeze_blocks=1"])], ids=["modern", "frozen"])
def test_other_models(small_run, text_dataset, request, world_size, options):  # noqa: F811
    """Several matrices on top of one another, of unequal height; matrices that are no longer trained."""
    same(small_run(request.node.name, world_size, *MUON, "--train.micro_batch_size=2", *options),
         *plain_loop(small_run, text_dataset, *MUON, *options))


# ---- one step, by torch.optim.Muon -----------------------------------------------------------------------------------

SHAPES = [((7, 5), (7,)), ((3, 8), (3,)), ((12, 4), (6, 3, 3)), ((2, 6), (2,))]


def one_step(shape, heights, replicas: int):
    """Five matrices of a shape after two steps, on ranks of which so many hold the same; momenta too."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from nanogpt.optim import Muon
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas))
    generator = torch.Generator().manual_seed(0)
    draw = lambda: distribute_tensor(torch.randn(shape, generator=generator), mesh, [Replicate(), Shard(0)])  # noqa: E731
    weights = [torch.nn.Parameter(draw()) for _ in range(5)]
    optimizer = Muon([dict(params=weights[:2], heights=heights), dict(params=weights[2:], heights=heights)], lr=0.1,
                     weight_decay=0.3, fused=True)
    for _ in range(2):
        for w in weights:
            w.grad = draw()
        optimizer.step()
    assert all(s.keys() == {"momentum_buffer"} for s in optimizer.state.values())
    return [t.full_tensor().detach() for w in weights for t in (w, optimizer.state[w]["momentum_buffer"])]


@pytest.mark.parametrize("world_size, replicas", [(1, 1), (3, 1), (4, 1), (4, 2), (3, 3)])
def test_of_any_shape_on_any_mesh(ranks, world_size, replicas):
    """Fewer rows than ranks, rows that do not divide, more ranks than matrices."""
    for shape, heights in SHAPES:
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(shape, generator=generator) for _ in range(5)]
        parts = [[torch.nn.Parameter(part) for part in w.split(heights)] for w in whole]
        optimizer = torch.optim.Muon(sum(parts, []), lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
        for _ in range(2):
            for of in parts:
                for part, g in zip(of, torch.randn(shape, generator=generator).split(heights)):
                    part.grad = g
            optimizer.step()
        momenta = [torch.cat([optimizer.state[part]["momentum_buffer"] for part in of]) for of in parts]
        for found in ranks(world_size, one_step, shape, heights, replicas):
            for i, (w, m) in enumerate(zip(whole, momenta)):
                torch.testing.assert_close(found[2 * i], w, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(found[2 * i + 1], m)


def test_what_newton_and_schulz_make_of_a_matrix():
    from nanogpt.optim import orthogonal
    for shape in ((3, 48, 32), (2, 16, 64)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        made = orthogonal(x.bfloat16()).float()
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        left, size, right = torch.linalg.svd(made, full_matrices=False)
        assert 0.6 < size.min() and size.max() < 1.25
        exact = u @ vh
        assert ((made * exact).sum((1, 2)) / made.norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).min() > 0.97


# ---- left out --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world_size, options", [(1, ["--sharding.cpu_offload=true"]), (2, ["--sharding.strategy=replicate"])])
def test_steps_that_are_not_finite_are_left_out(
        small_run, bad_run, text_dataset, world_size, options):  # noqa: F811
    bad, name = {1: NAN, 7: INF, 12: GRADIENT}, f"bad-{world_size}"
    metrics, stopped = bad_run(name, world_size, bad, *MUON, "--train.max_skipped_steps=3", *options)
    assert stopped is None and told_skipped(metrics) == {1: [1], 7: [7], 12: [12]}
    losses = plain_loop(small_run, text_dataset, *MUON, "--train.micro_batch_size=2", skipped=bad)[0]
    assert [m["loss"] for m in metrics if m["step"] not in (1, 7)] == pytest.approx(
        [x for step, x in enumerate(losses, start=1) if step not in (1, 7)], rel=1e-4)
    assert newest_state(small_run, name)["skipped_steps"] == [0, 6, 11]


def bad_step(bad: float):
    """A step that must be left out, or not: whether all weights and momenta are what they were, to the bit."""
    from test_checkpoint import make, whole

    from nanogpt import checkpoint
    model, optimizer = make(["--optim.name=muon"])
    before = whole(checkpoint.tensors(model, optimizer))
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan if bad else 1.0)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(bad)
    optimizer.step()
    after = whole(checkpoint.tensors(model, optimizer))
    assert {name.rsplit(".", 1)[1] for name in after if name.startswith("optim.transformer.h.0.attn.c_attn.weight")} == \
        {"momentum_buffer"}
    return [name for name in before if not torch.equal(before[name], after[name])], len(before)


def test_nothing_of_such_a_step_stays(ranks):
    assert [changed for changed, _ in ranks(2, bad_step, 1.0)] == [[], []]
    changed, n = ranks(2, bad_step, 0.0)[0]
    assert len(changed) == n


# ---- what is refused -------------------------------------------------------------------------------------------------

def test_of_another_optimizer(small_run):  # noqa: F811
    small_run("changed", 1, "--train.micro_batch_size=8", steps=5)
    with pytest.raises(RuntimeError, match=r"c_attn.weight.exp_avg is .* there and absent here; is optim.name another one than it was\?"):
        small_run("changed", 1, "--optim.name=muon", "--train.micro_batch_size=8", steps=6)


def test_what_only_muon_has(small_run):  # noqa: F811
    from nanogpt.config import load_config
    with pytest.raises(UserError, match="adamw_learning_rate: only name muon has it; AdamW alone takes learning_rate"):
        load_config([str(small_run.config), *SMALL, "--train.max_steps=9", "--train.micro_batch_size=8",
                     "--optim.adamw_learning_rate=1e-3"])


def test_by_default_it_is_torchs_adamw_in_two_groups():
    from nanogpt.config import Model, Optim
    from nanogpt.model import GPT
    from nanogpt.optim import make_optimizer
    model = GPT(Model(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=50))
    optimizer = make_optimizer(model, Optim())
    assert type(optimizer) is torch.optim.AdamW and [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(g["of_peak"] == 1.0 for g in optimizer.param_groups)


def test_zero_init():
    from nanogpt.config import Model
    from nanogpt.model import GPT
    model = GPT(Model(n_layer=2, n_head=1, n_embd=8, block_size=8, vocab_size=50, tied=False, zero_init=True))
    model.init_weights(0)
    zero = {name for name, p in model.named_parameters() if name.endswith("weight") and not p.any()}
    assert zero == {"lm_head.weight", *(f"transformer.h.{i}.{part}.c_proj.weight" for i in (0, 1) for part in ("attn", "mlp"))}
    assert model(torch.arange(8)[None], torch.arange(8)[None]).item() == pytest.approx(8 * math.log(50), rel=1e-5)
