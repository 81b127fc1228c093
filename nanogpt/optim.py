"""AdamW, Muon on matrices that are spread over the ranks, and the learning rate as a function of the step."""

import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nanogpt.config import Config, Optim
from nanogpt.model import GPT, Block


def make_optimizer(model: GPT, c: Optim, dtype: torch.dtype = torch.bfloat16) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019), one fused kernel for all parameters; matrices decay, vectors do not.

    c.name muon: the matrices of the blocks by Muon, and only embeddings, head and vectors by AdamW. In each group,
    `of_peak` is what its learning rate is of the schedule's. dtype: in which Muon computes.
    """
    params, alike, of_peak = [p for p in model.parameters() if p.requires_grad], {}, 1.0
    if c.name == "muon":
        for block in model.transformer.h:
            for p in block.parameters():
                if p.requires_grad and p.dim() == 2:
                    alike.setdefault((p.shape, heights(block, p)), []).append(p)
        of_peak = (c.adamw_learning_rate or c.learning_rate) / c.learning_rate
    by_muon = {id(p) for same in alike.values() for p in same}
    params = [p for p in params if id(p) not in by_muon]
    groups = [
        dict(params=[p for p in params if p.dim() >= 2], weight_decay=c.weight_decay, of_peak=of_peak),
        dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0, of_peak=of_peak),
        *(dict(params=same, weight_decay=c.weight_decay, of_peak=1.0, heights=of) for (_, of), same in alike.items()),
    ]
    groups = [g for g in groups if g["params"]]
    kind = Muon if c.name == "muon" else torch.optim.AdamW
    optimizer = kind(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=1e-8, fused=True)
    if isinstance(optimizer, Muon):
        optimizer.dtype = dtype
    return optimizer


def heights(block: Block, p: torch.Tensor) -> tuple[int, ...]:
    """Rows of the matrices that stand on top of one another in p: those of queries, keys and values; of gate and values."""
    if p is block.attn.c_attn.weight:
        return block.attn.widths
    stacked = 2 if p is block.mlp.c_fc.weight and block.mlp.kind == "swiglu" else 1
    return (p.size(0) // stacked,) * stacked


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) in the groups that have `heights`, each of matrices of one shape; AdamW in the others.

    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (Liu et al., 2025): the momentum, made orthogonal, in steps as
    long as AdamW's, so that both take the same learning rate. One momentum is all that is kept, sharded as the weights.
    """
    MOMENTUM = 0.95
    dtype = torch.bfloat16  # precise enough; but some CPUs multiply float32 in half the time

    @torch.no_grad()
    def step(self, closure=None):
        dealt = 0
        for group in self.param_groups:
            if "heights" in group:
                self.muon(group, dealt)
                dealt += len(group["params"])
        super().step(closure)

    def muon(self, group: dict, dealt: int):
        """One step of a group. dealt: how many other matrices were orthogonalised in this step."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights, grads, momenta = ([t.to_local() if isinstance(t, DTensor) else t for t in of] for of in
                                   (params, [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]))
        grad, momentum, rate = torch.stack(grads), torch.stack(momenta), group["lr"]  # (n, rows, columns): few kernels
        for p in params:
            p.grad = None                                                         # so that AdamW leaves it alone
        if (scale := getattr(self, "grad_scale", None)) is not None:              # both as AdamW's kernel does, without
            grad.div_(scale)                                                      # asking the device
        if (bad := getattr(self, "found_inf", None)) is not None:
            grad = torch.where(bad > 0, momentum, grad)                           # the momentum stays what it is,
            rate = rate * (1 - bad)                                               # and the step has no length
        momentum.lerp_(grad, 1 - self.MOMENTUM)
        torch._foreach_copy_(momenta, momentum.unbind())
        ahead = grad.lerp_(momentum, self.MOMENTUM).to(self.dtype)                # Nesterov's
        update = orthogonal_rows(ahead, params[0], group["heights"], dealt)
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(weights, update.mul_(rate).unbind())


def orthogonal_rows(local: torch.Tensor, like: torch.Tensor, heights: tuple[int, ...], dealt: int = 0) -> torch.Tensor:
    """local (n, r, columns): this rank's rows of n matrices that are sharded as `like` -> those of what each
    becomes, float32: orthogonal, with elements of 0.2 in the root mean square. Of the matrices, each holds several on top of
    one another, of `heights`.

    The matrices are dealt to all ranks, after `dealt` others: each rank gets its own whole, from the ranks that have the rest
    of its rows, and gives to each rank the rows that it keeps.
    """
    (n, _, columns), height, home = local.shape, like.size(0), local.device
    world, rank, shards = 1, 0, 1
    if isinstance(like, DTensor):
        world, rank, shards = dist.get_world_size(), dist.get_rank(), like.device_mesh.size(-1)
        local = local.to(like.device_mesh.device_type)  # with cpu_offload it is on the host
    chunk = -(-height // shards)                        # as torch.chunk shares the rows, and with it fully_shard
    rows = [slice(min(height, r % shards * chunk), min(height, (r % shards + 1) * chunk)) for r in range(world)]
    theirs = [range((r - dealt) % world, n, world) for r in range(world)]  # matrices that rank r makes orthogonal

    whole = local
    if world > 1:
        near = [r // shards == rank // shards for r in range(world)]  # together they have all rows
        parts = exchange([local[theirs[r].start::world] if near[r] else local[:0] for r in range(world)],
                         [(len(theirs[rank]) * near[r], rows[r].stop - rows[r].start, columns) for r in range(world)])
        whole = torch.cat([part for r, part in enumerate(parts) if near[r]], 1)  # (matrices of this rank, height, columns)
    whole = torch.cat([orthogonal(part) for part in whole.split(heights, 1)], 1)
    if world > 1:
        parts = exchange([whole[:, rows[r]] for r in range(world)],
                         [(len(theirs[r]), *local.shape[1:]) for r in range(world)])
        local = torch.empty_like(local)
        for r, part in enumerate(parts):
            local[theirs[r].start::world] = part
        whole = local
    scale = torch.cat([torch.full((h, 1), 0.2 * math.sqrt(max(h, columns)), device=home) for h in heights])
    return whole.to(home).float().mul_(scale[rows[rank]])


def exchange(parts: list[torch.Tensor], shapes: list[tuple]) -> list[torch.Tensor]:
    """Sends parts[r] to rank r. Returns what all ranks sent here, of these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    out = torch.cat([part.flatten() for part in parts])
    back = out.new_empty(sum(sizes))
    dist.all_to_all_single(back, out, sizes, [part.numel() for part in parts])
    return [part.view(shape) for part, shape in zip(back.split(sizes), shapes)]


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """x (n, rows, columns) -> of each U Vᵀ, where U S Vᵀ is x, but for singular values between about 0.7 and 1.2.

    Five Newton-Schulz steps with Jordan's coefficients, which are quick to take the small ones up rather than exact.
    """
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


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
