"""What a CPU computes by hand, held against PyTorch's own in float64. (Dropout by itself: tests/test_model.py.)"""

import pytest
import torch
import torch.nn.functional as F

from nanogpt.cpu import RMSNorm, causal_attention, drop, relu2


def results(function, *inputs, grad):
    """[value, gradient of each input]"""
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = function(*inputs)
    return [value, *torch.autograd.grad(value, inputs, grad.to(value.dtype))]


@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 7, 16), (1, 4)], ids=str)
def test_rms_norm_and_its_gradients(dtype, close, shape):
    torch.manual_seed(0)
    x, weight, grad = 3 * torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)
    x, weight, grad = (t.to(dtype).transpose(0, -2) if t.dim() > 1 else t.to(dtype) for t in (x, weight, grad))
    norm = RMSNorm(shape[-1], eps=0.1)
    ours = results(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), x, weight, grad=grad)
    right = results(lambda x, w: F.rms_norm(x, x.shape[-1:], w, 0.1), x.double(), weight.double(), grad=grad)
    for mine, theirs in zip(ours, right):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= close * theirs.abs().max()
    assert type(ours[0].grad_fn).__name__ == "_RMSNormBackward"  # by hand


def test_relu2_to_the_bit():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = torch.randn(2, 9, 33, dtype=dtype), torch.randn(2, 9, 33, dtype=dtype)
        for mine, theirs in zip(results(relu2, x, grad=grad), results(lambda x: F.relu(x).square(), x, grad=grad)):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("T", [2, 64, 65, 150])
def test_attention_and_its_gradients(dtype, close, T):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, T, 3, 8, dtype=dtype).transpose(1, 2) for _ in range(4))
    ours = results(causal_attention, q, k, v, grad=grad)
    right = results(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), *(x.double() for x in (q, k, v)), grad=grad)
    for mine, theirs in zip(ours, right):
        assert mine.dtype == dtype and (mine - theirs).abs().max() <= close * theirs.abs().max()


def test_attention_with_dropout():
    """With the very elements that it drops, it is attention written out; and so are its gradients."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, 100, 8) for _ in range(4))
    torch.manual_seed(1)
    ours = results(lambda *qkv: causal_attention(*qkv, 0.3), q, k, v, grad=grad)
    torch.manual_seed(1)
    kept = torch.zeros(6, 100, 100)
    kept[:, :64, :64], kept[:, 64:] = drop(torch.ones(6, 64, 64), 0.3), drop(torch.ones(6, 36, 100), 0.3)
    assert 0.6 < (kept[:, 64:] > 0).float().mean() < 0.8

    def written_out(q, k, v):
        scores = (q @ k.mT / 8 ** 0.5).masked_fill(torch.ones(100, 100).triu(1) > 0, float("-inf"))
        return (scores.softmax(-1) * kept.view(2, 3, 100, 100)) @ v

    for mine, theirs in zip(ours, results(written_out, *(x.double() for x in (q, k, v)), grad=grad)):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_model_takes_it_where_it_is_quicker(monkeypatch):
    """On a CPU, without a mask, a cache or compile."""
    from nanogpt import model
    from nanogpt.config import Model
    calls = []
    monkeypatch.setattr(model, "causal_attention", lambda q, *rest: calls.append(q.shape) or causal_attention(q, *rest))
    gpt = model.GPT(Model(n_layer=1, n_head=2, n_kv_head=1, n_embd=16, block_size=128, vocab_size=64, position="rope"))
    gpt.init_weights(1)
    ids = torch.randint(64, (3, 128))
    by_hand = gpt.hidden(ids)
    assert calls == [(3, 2, 128, 8)]
    gpt.hidden(ids[:, :64])
    gpt.hidden(ids, mask=torch.ones(1, 1, 128, 128, dtype=torch.bool).tril())
    assert len(calls) == 1
    gpt.bfloat16().hidden(ids[:, :64])
    assert len(calls) == 2
    gpt.float()
    monkeypatch.setattr(model, "attends_by_hand", lambda *_: False)
    assert torch.allclose(gpt.hidden(ids), by_hand, atol=0.02)
