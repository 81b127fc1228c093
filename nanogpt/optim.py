"""Which parameters decay, AdamW, and the learning rate as a function of the step."""

import math

import torch

from nanogpt.config import Config, Optim


def make_optimizer(model: torch.nn.Module, c: Optim) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019), one fused kernel for all parameters. Matrices decay, vectors do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in params if p.dim() >= 2], weight_decay=c.weight_decay),
        dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0),
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """Of optimizer step `step`, counted from 0. Linear warmup, then one of three shapes:

    cosine    from the peak to the end over decay_steps, as nanoGPT (Loshchilov & Hutter, 2017)
    wsd       the peak, then a line to the end over the last decay_steps (Hu et al., 2024)
    constant  the peak
    """
    c, steps = config.optim, config.max_steps
    peak = c.learning_rate
    end = c.min_learning_rate if c.min_learning_rate is not None else 0.0 if c.schedule == "wsd" else peak / 10
    if step < c.warmup_steps:
        return peak * (step + 1) / (c.warmup_steps + 1)
    if c.schedule == "cosine":
        done = (step - c.warmup_steps) / max(1, (c.decay_steps or steps) - c.warmup_steps)
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if c.schedule == "wsd":
        length = c.decay_steps or max(1, steps // 5)
        return end + (peak - end) * min(1.0, (steps - step) / length)
    return peak
