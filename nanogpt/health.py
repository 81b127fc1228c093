"""Losses and gradients that are not finite are kept from the weights; those out of the ordinary are told.

All of it stays on the device until the host looks, at log steps.
"""

import torch

from nanogpt.config import Config
from nanogpt.errors import UserError
from nanogpt.meter import Meter, loss_spikes
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
        for i, loss in enumerate(state["recent_losses"]):
            step = state["step"] - len(state["recent_losses"]) + i
            self.losses[step % len(self.losses)] = float("nan") if loss is None else loss

    def see(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """1.0 if this step must not be applied, else 0.0; the same on all ranks. After one too many, none is."""
        bad = ~(loss.isfinite() & norm.isfinite())
        self.bad_steps = torch.where(bad & (self.slots == self.n_bad), step, self.bad_steps)
        self.n_bad = self.n_bad + bad
        self.losses[step % len(self.losses)] = loss
        return (bad | (self.n_bad > self.allowed)).float().to(norm.device)  # there, with cpu_offload, the kernel reads it

    def recent(self, done: int) -> list[float]:
        """The losses of the last steps before `done`, oldest first."""
        losses = self.losses.tolist()
        return [losses[s % len(losses)] for s in range(max(0, done - len(losses)), done)]

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
