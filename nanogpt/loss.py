"""Summed cross-entropy that never holds the logits of a whole batch: at GPT-2's vocabulary they outweigh the model."""

import torch
import torch.nn.functional as F

IGNORE = -100            # a target that counts for nothing
CHUNK_LOGITS = 1 << 26   # logits held at once; 256 MiB in float32

# torch's own F.linear_cross_entropy (2.13) rounds the loss of bfloat16 inputs to bfloat16, 3 digits, and its chunked
# path took 50 times as long as the plain one on a CPU, so it is not used yet.


def finished(logits, vocab_size, softcap=0.0):
    """x·weightᵀ (…, rows) of any dtype -> logits (…, rows) float32: capped, and -inf in the padding of the vocabulary."""
    logits = logits.float()
    if softcap:  # Gemma 2 (Riviere et al., 2024)
        logits = softcap * torch.tanh(logits / softcap)
    if vocab_size < logits.size(-1):
        logits[..., vocab_size:] = float("-inf")
    return logits


def cross_entropy_sum(x, weight, targets, vocab_size, softcap=0.0):
    """x (N, n_embd), weight (rows, n_embd), targets (N,) ids or IGNORE -> Σ -log softmax(logits)[target], float32."""
    if x.size(0) * weight.size(0) <= CHUNK_LOGITS:
        return F.cross_entropy(finished(F.linear(x, weight), vocab_size, softcap), targets, ignore_index=IGNORE, reduction="sum")
    return _ChunkedCrossEntropy.apply(x, weight, targets, vocab_size, softcap, max(1, CHUNK_LOGITS // weight.size(0)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Takes the gradient of each chunk while its logits are there, so that backward has nothing to recompute."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, chunk):
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        with_grad, trained = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]  # a frozen head is not
        grad_x = torch.empty_like(x) if with_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        for rows in range(0, x.size(0), chunk):
            part, target = x[rows:rows + chunk], targets[rows:rows + chunk, None]           # (n, n_embd), (n, 1)
            counts = (target != IGNORE)                                                     # (n, 1)
            capped = finished(F.linear(part, weight), vocab_size, softcap)                  # (n, vocabulary rows)
            log_p = capped.log_softmax(-1)
            capped = capped if softcap else None                                            # its memory is needed
            loss -= (log_p.gather(1, target.clamp(min=0)) * counts).sum()
            if with_grad:  # d loss / d logits = p - onehot(target)
                d_logits = log_p.exp_().scatter_add_(1, target.clamp(min=0), -torch.ones_like(target, dtype=log_p.dtype))
                if softcap:  # d tanh = 1 - tanh²
                    d_logits *= 1 - (capped.clamp_(min=-softcap) / softcap).square()
                d_logits = d_logits.mul_(counts).to(x.dtype)
                grad_x[rows:rows + chunk] = d_logits @ weight
                if trained:
                    grad_weight += d_logits.t() @ part
            log_p = d_logits = None                                                         # and by the next chunk
        if with_grad:
            ctx.save_for_backward(grad_x, grad_weight)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_x * grad.to(grad_x.dtype), grad_weight, None, None, None, None
