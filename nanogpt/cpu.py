"""What a CPU spends on memory rather than on arithmetic, in fewer passes over it: dropout, RMSNorm, ReLU², attention.

On a GPU, and where torch.compile fuses, these are PyTorch's own; the numbers are the same up to rounding.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def by_hand(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def drop(x, p, training=True):
    """F.dropout (Srivastava et al., 2014). On a CPU that draws one number after the other, and takes most of a small model's
    step; there, 16 random bits decide on each element, and four of them come from one word of numpy's quickest generator.
    """
    if not (p and training) or not by_hand(x):
        return F.dropout(x, p, training)
    p = min(round(p * 65536), 65535)  # of 65536
    words = np.random.SFC64(torch.randint(2**63 - 1, ()).item()).random_raw(-(-x.numel() // 4))
    bits = torch.from_numpy(words.view(np.int16))[:x.numel()].view(x.shape)
    kept = torch.ge(bits, p - 32768, out=torch.empty_like(x))  # 0 or 1 at once: to go from bool to bfloat16 is slow
    return x * kept.mul_(65536 / (65536 - p))


class RMSNorm(torch.nn.RMSNorm):
    """Zhang & Sennrich, 2019. On a CPU PyTorch's is five operators forward, and a dozen backward."""

    def forward(self, x):
        return _RMSNorm.apply(x, self.weight, self.eps) if by_hand(x) else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        """x (…, n) -> x / √(mean x² + eps) · weight, of its dtype; inside, all is float32 (float64 stays)."""
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale.square_().div_(x.size(-1)).add_(eps).rsqrt_()                        # (…, 1)
        unit = x * scale                                                           # (…, n) float32
        ctx.save_for_backward(unit, scale, weight)
        return (unit * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, scale, weight = ctx.saved_tensors
        dtype, weight = weight.dtype, weight.to(unit.dtype)
        part = grad * unit
        d_weight = part.sum(tuple(range(part.dim() - 1)))
        along = (part @ (weight / unit.size(-1))).unsqueeze(-1)                    # what goes along with x changes nothing
        d_x = (grad * weight).addcmul_(unit, along, value=-1).mul_(scale)
        return d_x.to(grad.dtype), d_weight.to(dtype), None


def relu2(x):
    """max(0, x)² (So et al., 2021)."""
    return _ReLU2.apply(x) if by_hand(x) else F.relu(x).square()


class _ReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = F.relu(x)
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return (grad * x).mul_(2)


ROWS = 64  # queries whose attention is computed at once


def attends_by_hand(tokens: int, bfloat16: bool, dropout: float) -> bool:
    """Whether causal_attention is quicker than F.scaled_dot_product_attention, which has no dropout on a CPU."""
    return dropout > 0 or (0 if bfloat16 else ROWS) < tokens <= 512


def causal_attention(q, k, v, dropout=0.0):
    """q, k, v (B, heads, T, head) -> the same: each query attends to its key, and to those before it.

    Some rows of queries at a time, against the keys that they may see: half of the whole matrix is never computed.
    """
    return _CausalAttention.apply(q, k, v, dropout)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, dropout):
        B, H, T, D = ctx.shape = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        y, kept = torch.empty_like(q), []
        for i in range(0, T, ROWS):
            rows, end = slice(i, i + ROWS), min(T, i + ROWS)
            hidden = torch.full((end - i, end), -math.inf, dtype=q.dtype).triu_(1 + i)
            p = torch.baddbmm(hidden, q[:, rows], k[:, :end].mT, alpha=1 / math.sqrt(D)).softmax(-1)
            dropped = drop(p, dropout)
            y[:, rows] = dropped @ v[:, :end]
            kept += [p, dropped] if dropout else [p]
        ctx.save_for_backward(q, k, v, y, *kept)
        ctx.each = 1 + (dropout > 0)
        return y.view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, y, *kept = ctx.saved_tensors
        T, scale = q.size(1), 1 / math.sqrt(q.size(2))
        grad = grad.reshape(q.shape)
        along = (grad * y).sum(-1, keepdim=True)                                   # Σ p · d p, as in FlashAttention (Dao, 2022)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, p, dropped in zip(range(0, T, ROWS), kept[::ctx.each], kept[ctx.each - 1::ctx.each]):
            rows, end = slice(i, i + ROWS), min(T, i + ROWS)
            d_v[:, :end].baddbmm_(dropped.mT, grad[:, rows])
            d_p = grad[:, rows] @ v[:, :end].mT
            d_scores = d_p.mul_(dropped).addcmul_(p, along[:, rows], value=-1) if ctx.each > 1 else d_p.sub_(along[:, rows]).mul_(p)
            d_q[:, rows] = (d_scores @ k[:, :end]).mul_(scale)
            d_k[:, :end].baddbmm_(d_scores.mT, q[:, rows], alpha=scale)
        return *(x.view(ctx.shape) for x in (d_q, d_k, d_v)), None
