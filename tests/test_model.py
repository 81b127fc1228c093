"""The GPT against independent references: transformers' GPT-2, attention written out, hand counts."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanogpt import loss as loss_module
from nanogpt.config import Model
from nanogpt.loss import IGNORE, cross_entropy_sum
from nanogpt.model import GPT, CausalSelfAttention, drop, padded


def small(**changes) -> GPT:
    config = Model(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=50, **changes)
    model = GPT(config)
    model.init_weights(1)
    return model


def test_logits_and_loss_are_those_of_transformers_gpt2(transformers):
    ours = small().eval()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, activation_function="gelu",
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    for p in ours.parameters():  # biases and norms too, so that none can be forgotten
        torch.nn.init.normal_(p, std=0.2)
    state = ours.state_dict()
    for name, weight in theirs.named_parameters():
        value = state[name]  # the names are the same; transformers keeps its matrices transposed
        transposed = any(k in name for k in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weight.data.copy_(value.t() if transposed else value[:len(weight)])
    idx = torch.randint(0, 50, (3, 16))
    logits = ours.logits(ours.hidden(idx))
    assert torch.allclose(logits, theirs(idx).logits, atol=1e-5)
    assert torch.allclose(ours(idx), logits[:, -1:], atol=1e-6)  # at inference: the last position alone
    mean = theirs(idx, labels=idx).loss                           # transformers shifts by itself
    assert torch.allclose(ours(idx[:, :-1], idx[:, 1:]) / (3 * 15), mean, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_fused_attention_is_plain_attention(bias, monkeypatch):
    model = small(bias=bias)
    idx = torch.randint(0, 50, (2, 16))
    fused = model.hidden(idx)
    monkeypatch.setattr(CausalSelfAttention, "fused", False)
    assert torch.allclose(fused, model.hidden(idx), atol=1e-5)


def test_no_token_sees_a_later_one():
    model = small().eval()
    idx = torch.randint(0, 50, (1, 16))
    changed = idx.clone()
    changed[0, 9] = (idx[0, 9] + 1) % 50
    before, after = model.hidden(idx), model.hidden(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_initial_weights():
    model = GPT(Model(n_layer=8, n_head=4, n_embd=128, block_size=64, vocab_size=500))
    model.init_weights(3)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif ".ln_" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    # At the start the model knows nothing: the loss is that of a uniform guess over all rows.
    idx = torch.randint(0, 500, (4, 64))
    assert (model(idx, idx.roll(-1)) / idx.numel()).item() == pytest.approx(math.log(500), rel=0.02)


def test_parameters_of_gpt2():
    """124,439,808 is the count that OpenAI's GPT-2 has; ours pads 50,257 rows to 50,304."""
    with torch.device("meta"):
        model = GPT(Model(vocab_size=50257))
    assert model.num_params() == 124_439_808 + 47 * 768
    n = model.num_params() - 1024 * 768
    assert model.num_params(lookups=False) == n
    assert model.flops_per_token() == 6 * n + 12 * 12 * 12 * 64 * 1024


def test_crop_block_size():
    model = small().eval()
    idx = torch.randint(0, 50, (2, 8))
    before = model.hidden(idx)
    model.crop_block_size(8)
    assert torch.equal(before, model.hidden(idx))
    with pytest.raises(AssertionError):
        model.hidden(torch.zeros(1, 9, dtype=torch.int64))


# ---- loss -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_chunked_loss_and_gradients_are_those_of_the_plain_one(monkeypatch, dtype, tolerance, softcap):
    torch.manual_seed(0)
    x, weight, targets = torch.randn(37, 24), torch.randn(96, 24), torch.randint(0, 90, (37,))
    targets[[3, 36]] = IGNORE
    exact = [t.to(dtype).double().requires_grad_() for t in (x, weight)]
    logits = (exact[0] @ exact[1].T)[:, :90]  # six rows of padding
    expected = F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, reduction="sum")
    (expected / 7).backward()
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 10 * 96)  # four chunks, the last one short
    ours = [t.to(dtype).requires_grad_() for t in (x, weight)]
    loss = cross_entropy_sum(*ours, targets, 90, softcap)
    (loss / 7).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for a, b in zip(ours, exact):
        assert (a.grad - b.grad).norm() / b.grad.norm() < tolerance
    frozen = cross_entropy_sum(ours[0], ours[1].detach(), targets, 90, softcap)  # a head that is not trained
    before, ours[0].grad = ours[0].grad, None
    (frozen / 7).backward()
    assert torch.equal(ours[0].grad, before)
    with torch.no_grad():
        assert cross_entropy_sum(*ours, targets, 90, softcap).item() == pytest.approx(loss.item(), rel=1e-6)


def test_padding_of_the_vocabulary():
    assert [padded(n) for n in (1, 64, 65, 257, 50257)] == [64, 64, 128, 320, 50304]
    assert small().lm_head.weight.shape == (64, 32)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.999])
def test_dropout_on_a_cpu(p):
    """Elements are kept one independently of another, and what is kept makes up for the rest."""
    x = torch.full((1001, 999), 3.0, requires_grad=True)
    torch.manual_seed(1)
    y = drop(x, p)
    kept = (y != 0).double()
    sigma = (p * (1 - p) / y.numel()) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * sigma + 1 / 65536
    torch.testing.assert_close(y, 3 / (1 - p) * kept.float(), rtol=0.02 if p > 0.9 else 1e-4, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / 3)
    flat = kept.flatten() - kept.mean()
    for lag in (1, 2, 3, 4, 5, 999):  # four come from one draw
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 * p * (1 - p) / y.numel() ** 0.5, lag
    torch.manual_seed(1)
    assert torch.equal(drop(x, p), y) and not torch.equal(drop(x, p), y)
    assert drop(x, p, training=False) is x and drop(x, 0.0) is x
