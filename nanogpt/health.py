"""Losses and gradients that are not finite are kept from the weights; those out of the ordinary are told.

All of it stays on the device until the host looks, at log steps. How the blocks are, log.health full tells there:

    health/weight_norm          of all parameters of a block
    health/update_norm          of what the step has added to them
    health/update_ratio         the second divided by the first
    health/activation_rms       root mean square of what a block gives to the next, over tokens and width
    health/attention_logit_max  the greatest q·k / sqrt(head), of all heads, of what a query sees; where it grows without end,
                                attention comes to choose one token, and training diverges (Dehghani et al., 2023)
    health/dead_units           share of the MLP's units that no token made fire: whose input to the activation, the gate's in
                                swiglu, was above 0 for none

a list each, block by block. The last three are of one more forward of the first micro-batch of every rank, without dropout
or gradient, with the weights after the step.
"""

import contextlib
import math
import statistics

import torch
import torch.distributed as dist

from nanogpt.config import Config
from nanogpt.errors import UserError
from nanogpt.meter import Meter
from nanogpt.model import GPT, separate_documents
from nanogpt.sharding import norms, reshard
from nanogpt.stream import TrainStream


class Numbers:
    """One in each rank; all come to the same."""
    RECENT = 128  # steps that a loss is compared with

    def __init__(self, config: Config, state: dict, device):
        """state: of the checkpoint; it knows the steps left out so far, and the last losses."""
        self.skipped = list(state["skipped_steps"])
        self.allowed = max(config.train.max_skipped_steps, len(self.skipped))
        self.slots = torch.arange(self.allowed + 1, device=device)
        self.bad_steps = torch.full((self.allowed + 1,), -1, device=device)  # the steps whose numbers were not finite
        self.n_bad = torch.tensor(len(self.skipped), device=device)
        self.losses = torch.full((self.RECENT + config.log.interval,), float("nan"), device=device)  # of step s at s % size
        self.looked = state["step"]
        self.clip, self.clipped = config.optim.grad_clip, torch.zeros((), device=device)  # steps since the last look
        for i, loss in enumerate(state["recent_losses"]):
            step = state["step"] - len(state["recent_losses"]) + i
            self.losses[step % len(self.losses)] = float("nan") if loss is None else loss

    def see(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """1.0 if this step must not be applied, else 0.0; the same on all ranks. After one too many, none is."""
        bad = ~(loss.isfinite() & norm.isfinite())
        self.bad_steps = torch.where(bad & (self.slots == self.n_bad), step, self.bad_steps)
        self.n_bad = self.n_bad + bad
        self.losses[step % len(self.losses)] = loss
        self.clipped = self.clipped + (norm > self.clip)
        return (bad | (self.n_bad > self.allowed)).float().to(norm.device)  # there, with cpu_offload, the kernel reads it

    def recent(self, done: int) -> list[float]:
        """The losses of the last steps before `done`, oldest first."""
        losses = self.losses.tolist()
        return [losses[s % len(losses)] for s in range(max(0, done - len(losses)), done)]

    def clipped_fraction(self, done: int) -> dict:
        """Of the steps since the last look, those whose gradient was longer than optim.grad_clip."""
        clipped, self.clipped = self.clipped, torch.zeros_like(self.clipped)
        return {"clipped_fraction": clipped.item() / max(1, done - self.looked)} if self.clip else {}

    def look(self, done: int, stream: TrainStream, meter: Meter) -> dict:
        """What there is to tell of the steps since the last look. Raises UserError after one bad step too many."""
        told = {}
        n = int(self.n_bad)
        steps = self.bad_steps.tolist()
        if n > self.allowed:
            step = steps[self.allowed]
            raise UserError(f"step {step + 1}: loss or gradient is not finite (loss of step {done}: "
                            f"{self.losses[(done - 1) % len(self.losses)].item():g}); it was not applied. "
                            f"{samples_of(stream, step, meter)}. The last checkpoint is good: try a lower "
                            f"optim.learning_rate, or leave out such steps with --train.max_skipped_steps {self.allowed + 1}")
        if new := steps[len(self.skipped):n]:
            self.skipped += new
            told["skipped_steps"] = [step + 1 for step in new]
            for step in new:
                meter.say(f"warning: step {step + 1}: loss or gradient is not finite; left out ({len(self.skipped)} of "
                          f"{self.allowed} that may be). {samples_of(stream, step, meter)}")
        recent = self.recent(done)
        if spikes := loss_spikes(recent, done - self.looked, self.RECENT):
            told["loss_spikes"] = [done - len(recent) + i + 1 for i in spikes]
            for i, step in zip(spikes, told["loss_spikes"]):
                meter.say(f"spike at step {step}: loss {recent[i]:.4f}; python tools/inspect_mds.py --run "
                          f"{meter.config.run_dir} --step {step} shows its text")
        self.looked = done
        return told


def samples_of(stream: TrainStream, step: int, meter: Meter) -> str:
    samples = sorted(set(stream.samples(step).tolist()))
    shards = sorted({split.shard_of(number) for split, number in map(stream.find, samples)})
    first = [", ".join(map(str, some[:n])) + (f", … ({len(some)} in all)" if len(some) > n else "")
             for some, n in ((samples, 16), (shards, 4))]
    return (f"Its samples: {first[0]}, of {first[1]} (python tools/inspect_mds.py --run {meter.config.run_dir} --step "
            f"{step + 1} shows them)")


def loss_spikes(losses: list[float], new: int, recent: int) -> list[int]:
    """Which of the last `new` losses lie more than 6 standard deviations, and 0.1, above the mean of those before.

    Each is compared with up to `recent` before it, of which 32 must be there. Returns positions in `losses`.
    """
    found = []
    for i in range(max(0, len(losses) - new), len(losses)):
        before = [x for x in losses[max(0, i - recent):i] if math.isfinite(x)]
        if len(before) >= 32 and math.isfinite(losses[i]):
            if losses[i] > statistics.fmean(before) + max(6 * statistics.pstdev(before), 0.1):
                found.append(i)
    return found


# ---- block by block -------------------------------------------------------------------------------------------------

class Vitals:
    """log.health full: what each block is like, at the steps that are multiples of log.interval. One in each rank.

    From before the optimizer's step until the log line it keeps a copy of this rank's weights of the blocks: 4 bytes for each.
    """

    def __init__(self, config: Config, model: GPT, tok):
        self.every = config.log.interval if config.log.health == "full" else 0
        self.model = model
        self.weights: list[list[torch.Tensor]] | None = None
        self.separate = separate_documents(config.model, tok)  # a mask that can be looked at
        # Hooks, in what is compiled, would compile it anew.
        self.eager = (lambda: torch.compiler.set_stance("force_eager")) if config.train.compile else contextlib.nullcontext

    def before(self, step: int):
        """Before the optimizer's step `step`, from 0: keeps the weights, if this is a step to look at."""
        if self.every and (step + 1) % self.every == 0:
            self.weights = [[w.clone() for w in of] for of in local_weights(self.model)]

    def after(self, x: torch.Tensor) -> dict:
        """After it, on all ranks: what there is to tell. x (B, T): ids, some of the step's. {}: no step to look at."""
        if self.weights is None:
            return {}
        now, before, self.weights = local_weights(self.model), self.weights, None
        for olds, news in zip(before, now):
            torch._foreach_sub_(olds, news)
        weight, update = norms(self.model, now).tolist(), norms(self.model, before).tolist()
        del before
        with self.eager():
            inside = look_inside(self.model, x, *self.separate(x))
        return {"health/weight_norm": weight, "health/update_norm": update,
                "health/update_ratio": [u / w for u, w in zip(update, weight)]} | inside


def local_weights(model: GPT) -> list[list[torch.Tensor]]:
    """Of each block, what this rank holds of its parameters."""
    return [[p.detach().to_local() for p in block.parameters()] for block in model.transformer.h]


@torch.no_grad()
def look_inside(model: GPT, x: torch.Tensor, positions=None, mask=None) -> dict:
    """x (B, T): ids, this rank's. What one forward shows of each block, of all ranks' ids together: see above.

    Hooks look at it, and are taken away. mask: no BlockMask.
    """
    blocks, device = model.transformer.h, x.device
    squares = torch.zeros(len(blocks), 2, dtype=torch.float64, device=device)      # sum and count
    logits = torch.full((len(blocks),), -math.inf, device=device)
    fired: list[torch.Tensor] = [None] * len(blocks)
    hooks: list = []

    def watch(i, block):
        def attention(attn, args):
            logits[i] = largest_logit(attn, *args[:3])

        def units(c_fc, args, out):                                                # out (B, T, width, and the gate's before)
            gate = out.chunk(2, -1)[0] if block.mlp.kind == "swiglu" else out
            fired[i] = (gate > 0).flatten(0, -2).any(0)

        def residual(block, args, out):                                            # (B, T, n_embd)
            squares[i] += torch.stack([out.float().square().sum(), torch.tensor(float(out.numel()), device=device)])

        hooks.extend([block.attn.register_forward_pre_hook(attention), block.mlp.c_fc.register_forward_hook(units),
                      block.register_forward_hook(residual)])

    training = model.training
    model.eval()
    try:
        for i, block in enumerate(blocks):
            watch(i, block)
        model(x, None, positions, mask)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
        reshard(model)
    alive = torch.stack(fired).float()                                             # (blocks, units)
    dist.all_reduce(squares)
    for most in (logits, alive):
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return {"health/activation_rms": (squares[:, 0] / squares[:, 1]).sqrt().tolist(),
            "health/attention_logit_max": logits.tolist(), "health/dead_units": (1 - alive.mean(1)).tolist()}


def largest_logit(attn, x: torch.Tensor, rope=None, mask=None) -> torch.Tensor:
    """x (B, T, n_embd): what the attention gets -> the greatest of what its softmax would get; one sequence at a time."""
    q, k, _ = attn.by_head(x, rope)
    k = k.repeat_interleave(q.size(1) // k.size(1), 1)                             # (B, heads, T, head)
    seen = torch.ones(*[x.size(1)] * 2, dtype=torch.bool, device=x.device).tril()[None, None] if mask is None else mask
    return torch.stack([(q[b].float() @ k[b].float().mT).masked_fill(~seen[b % len(seen)], -math.inf).amax()
                        for b in range(len(q))]).amax() / math.sqrt(attn.head_dim)
