"""What a CPU computes by hand, held against PyTorch's own in float64. (Dropout: tests/test_model.py.)"""

import pytest
import torch
import torch.nn.functional as F

from nanogpt.pointwise import RMSNorm, relu2


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
