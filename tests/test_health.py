"""What log.health full tells of each block, against a plain loop that works it out from the definitions."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_train import MODERN, plain_optimizer, plain_parts, plain_step, small_run  # noqa: F401

FULL = ["--log.health=full", "--log.interval=5"]
KEYS = ("weight_norm", "update_norm", "update_ratio", "activation_rms", "attention_logit_max", "dead_units")


def norm(tensors):
    return math.sqrt(sum((t.double() ** 2).sum().item() for t in tensors))


def inside(model, idx, positions=None, mask=None) -> dict:
    """activation_rms, attention_logit_max, dead_units of a plain model, from what the model itself computes on the way."""
    attended, tokens = [], idx.size(1)
    attention = F.scaled_dot_product_attention

    def spy(q, k, v, mask, *args, **kwargs):  # what softmax gets, head by head and query by query
        B, H, T, D = q.shape
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1) if mask is None else ~mask.expand(B, 1, T, T)
        scores = torch.stack([q[:, h] @ k[:, h * k.size(1) // H].transpose(1, 2) for h in range(H)], 1) / math.sqrt(D)
        attended.append(scores.masked_fill(hidden, -math.inf).max().item())
        return attention(q, k, v, mask, *args, **kwargs)

    rms, dead, c = [], [], model.config
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", spy):
        x, rope = model.transformer.wte(idx), None
        if c.position == "rope":
            from nanogpt.model import rope_angles
            rope = rope_angles(c, torch.arange(tokens) if positions is None else positions)
        else:
            x = x + model.transformer.wpe(torch.arange(tokens) if positions is None else positions)
        for block in model.transformer.h:
            into_mlp = block.ln_2(x + block.attn(block.ln_1(x), rope, mask))
            units = F.linear(into_mlp, block.mlp.c_fc.weight, block.mlp.c_fc.bias)[..., :c.mlp_width]  # a gate comes first
            dead.append(sum(not (units[..., i] > 0).any() for i in range(c.mlp_width)) / c.mlp_width)
            x = block(x, rope, mask)
            attended.pop()  # this one came twice
            rms.append(math.sqrt((x.double() ** 2).mean().item()))
    return dict(activation_rms=rms, attention_logit_max=attended, dead_units=dead)


def of_weights(before, after):
    """weight_norm, update_norm, update_ratio of lists of each block's weights."""
    weight, update = [norm(of) for of in after], [norm([a - b for a, b in zip(*of)]) for of in zip(after, before)]
    return dict(weight_norm=weight, update_norm=update, update_ratio=[u / w for u, w in zip(update, weight)])


def blocks(model):
    return [[p.detach().clone() for p in block.parameters()] for block in model.transformer.h]


def separate(of, text_dataset):
    """Of a config, or a model."""
    from nanogpt.model import separate_documents
    from nanogpt.shards import load_dataset_card
    from nanogpt.tokenizer import from_json
    return separate_documents(getattr(of, "model", None) or of.config, from_json(load_dataset_card(text_dataset)["tokenizer"]))


def plain_loop(small_run, text_dataset, *options):  # noqa: F811
    """Five steps without FSDP, ranks or accumulation: (model, its blocks before the last step, the norms of the gradients, ids of
    the last step).
    """
    config, model, loss, share = plain_parts(small_run, text_dataset, *options)
    apart, hidden, asked, norms = separate(config, text_dataset), model.hidden, [], []
    optimizer = plain_optimizer(model.parameters())
    with mock.patch.object(model, "hidden", lambda idx: asked.append(idx) or hidden(idx, *apart(idx))):
        for step in range(5):
            before = blocks(model)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * share(step)
            norms.append(plain_step(optimizer, loss(step))[1])
    return model.eval(), before, norms, asked[-1]


def agree(metrics, expected):
    """The record of step 5 is as expected, and no other has any such key: they are no multiples of log.interval."""
    found = {m["step"]: [key for key in m if key.startswith("health/")] for m in metrics}
    assert {step: keys for step, keys in found.items() if keys} == {5: [f"health/{key}" for key in KEYS]}
    record = next(m for m in metrics if m["step"] == 5)
    for key in KEYS:
        assert record[f"health/{key}"] == pytest.approx(expected[key], rel=1e-5), key
    assert 0 < max(expected["dead_units"]) < 1 and len(set(expected["attention_logit_max"])) == 2


@pytest.mark.parametrize("world_size, micro, of_model, options", [
    (1, 8, [], []), (1, 4, [], ["--sharding.strategy=grad"]),
    (2, 4, [], ["--sharding.activation_checkpointing=full"]),
    (2, 4, MODERN, ["--sharding.activation_checkpointing=selective"]),
    (2, 4, ["--model.mask_documents=true"], ["--sharding.strategy=replicate"]),
], ids=["one rank", "accumulated", "two ranks", "modern", "documents"])
def test_each_layout_is_the_plain_loop(small_run, text_dataset, request, world_size, micro, of_model, options):  # noqa: F811
    model, before, norms, idx = plain_loop(small_run, text_dataset, *of_model)
    idx = idx[:micro * world_size]  # the first micro-batch
    expected = of_weights(before, blocks(model)) | inside(model, idx, *separate(model, text_dataset)(idx))
    metrics = small_run(request.node.callspec.id, world_size, *FULL, *of_model, *options, f"--train.micro_batch_size={micro}",
                        steps=6)
    agree(metrics, expected)
    # The share of clipped steps, in the steps that a record ends.
    assert [m["clipped_fraction"] for m in metrics[:2]] == [norms[0] > 1, sum(x > 1 for x in norms[1:]) / 4]


@pytest.mark.parametrize("world_size, options", [
    (2, ["--optim.name=muon"]), (1, ["--model.mlp=relu2", "--train.freeze_blocks=1", "--sharding.cpu_offload=true"])],
    ids=["muon", "relu2, frozen, offloaded"])
def test_it_is_what_the_checkpoints_say(small_run, text_dataset, request, world_size, options):  # noqa: F811
    """Those before the step and after it, put into a plain model. (Muon's bfloat16 makes other layouts differ in 3 digits.)"""
    from nanogpt.generate import load_run
    name = request.node.callspec.id
    idx = plain_loop(small_run, text_dataset)[3]
    metrics = small_run(name, world_size, *FULL, *options, f"--train.micro_batch_size={8 // world_size}",
                        "--checkpoint.interval=1", "--checkpoint.keep_last=6", steps=6)
    before, after = (load_run(small_run.folder / name / "checkpoints" / f"step-0000000{step}")[0] for step in (4, 5))
    expected = of_weights(blocks(before), blocks(after)) | inside(after.eval(), idx)
    agree(metrics, expected)
    assert (expected["update_norm"][0] == 0) == ("freeze" in str(options)) and expected["update_norm"][1] > 0


def test_looking_changes_nothing(small_run):  # noqa: F811
    """The same losses to the bit, with dropout. (Compiled: test_train.py has a layout that looks.)"""
    options = ["--model.dropout=0.2", "--train.micro_batch_size=4"]
    off = small_run("not looking", 1, *options, steps=6)
    on = small_run("looking", 1, *options, "--log.health=full", steps=6)
    assert [m["loss"] for m in on] == [m["loss"] for m in off] and [m["grad_norm"] for m in on] == [m["grad_norm"] for m in off]
    assert all("health/dead_units" in m for m in on) and not any("health/dead_units" in m for m in off)


@pytest.mark.parametrize("limit, expected", [(1.0, [0.5, 0.0, 1.0]), (0.0, [None] * 3), (9e9, [0.0] * 3)])
def test_clipped_steps(limit, expected):
    """Of the steps since the last look. NaN and what is just at the limit are not clipped."""
    from nanogpt.config import Config
    from nanogpt.health import Numbers
    state = dict(step=0, skipped_steps=[], recent_losses=[])
    numbers, done, found = Numbers(Config(optim=dict(grad_clip=limit), train=dict(max_skipped_steps=9)), state, "cpu"), 0, []
    for norms in ([0.5, 1.5, math.nan, 2.0], [1.0, 0.1], [7.0]):
        for x in norms:
            numbers.see(done, torch.tensor(3.0), torch.tensor(x))
            done += 1
        found.append(numbers.clipped_fraction(done).get("clipped_fraction"))
        numbers.looked = done  # as look leaves it
    assert found == expected


def test_dead_units_and_logits_by_hand():
    """One block whose numbers one can see."""
    from nanogpt.config import Model
    from nanogpt.health import largest_logit
    from nanogpt.model import GPT
    model = GPT(Model(n_layer=1, n_head=2, n_embd=4, block_size=4, vocab_size=5))
    attn = model.transformer.h[0].attn
    with torch.no_grad():
        attn.c_attn.bias.zero_()
        attn.c_attn.weight.zero_()
        attn.c_attn.weight[:4], attn.c_attn.weight[4:8] = torch.eye(4), torch.eye(4)  # q = k = x
        x = torch.tensor([[[1.0, 0, 0, 0], [2, 0, 0, 0], [0, 0, 1, 1], [-9, 0, 0, 0]]])
        # Of the first head: 81 is that of the last token with itself; without it, 4 of the second.
        assert largest_logit(attn, x).item() == pytest.approx(81 / math.sqrt(2))
        assert largest_logit(attn, x[:, :3]).item() == pytest.approx(4 / math.sqrt(2))
        # What a query does not see does not count: -9 · -9, but not 1 · 2 before its time.
        only_itself = torch.eye(4, dtype=torch.bool)[None, None]
        assert largest_logit(attn, x[:, [0, 2, 1, 0]] * -1, None, only_itself).item() == pytest.approx(4 / math.sqrt(2))
        later = torch.tensor([[[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0], [5, 0, 0, 0]]])
        assert largest_logit(attn, later[:, :3]).item() == pytest.approx(1 / math.sqrt(2))
