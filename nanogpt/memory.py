"""Bytes of a rank by component, predicted from a config alone: what tools/plan.py prints, and every run at its start.

Weights, gradients and optimizer state follow exactly from the shapes. Activations are what autograd keeps of model.py,
tensor by tensor (Korthikanti et al., 2022, count so: 34 bytes a token, layer and unit of width, with dropout). What lives
for a moment, in the loss, in backward, between ranks, is counted where it is largest. The rank is the first, which holds
the most; what CUDA itself, NCCL's channels and gaps between tensors take is not in it.
"""

import contextlib
import math
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch

from nanogpt.config import Config
from nanogpt.cpu import ROWS, attends_by_hand
from nanogpt.errors import UserError
from nanogpt.loss import CHUNK_LOGITS
from nanogpt.model import GPT, padded

MODES = ("none", "selective", "full")  # of sharding.activation_checkpointing


def shards_of(c: Config, world_size: int, local_world_size: int | None = None) -> int:
    """Ranks among which one copy of the weights is split, as sharding.make_mesh does it."""
    if c.sharding.strategy == "hybrid":
        return c.sharding.shard_size or local_world_size or world_size
    return 1 if c.sharding.strategy == "replicate" else world_size


def parameters(c: Config) -> tuple[list, list]:
    """Of a block's parameters (name, shape, how many blocks have it, how many train it); and the same of the root's."""
    with torch.device("meta"):
        model = GPT(c.model.model_copy(update=dict(n_layer=1)))
    layers, frozen = c.model.n_layer, c.train.freeze_blocks
    block, root = [], []
    for name, p in model.named_parameters():
        if ".h." in name:
            block.append((name, p.shape, layers, layers - frozen))
        else:
            root.append((name, p.shape, 1, int(not frozen or ".wte." not in name and ".wpe." not in name)))
    return block, root


def held(shape, shards: int) -> int:
    """Elements of a parameter on the first rank: fully_shard cuts the first dimension, rounded up."""
    return -(-shape[0] // shards) * math.prod(shape[1:])


def states(c: Config, world_size: int, local_world_size: int | None = None) -> dict[str, int]:
    """Bytes of what lasts from step to step, of the first rank: {weights, gradients, optimizer}. Exact."""
    shards, found = shards_of(c, world_size, local_world_size), dict(weights=0, gradients=0, optimizer=0)
    for name, shape, there, trained in sum(parameters(c), []):
        n = held(shape, shards)
        found["weights"] += 4 * n * there
        found["gradients"] += 4 * n * trained
        found["optimizer"] += (4 * n * moments(c, name, shape) + 4 * (moments(c, name, shape) == 2)) * trained
    return found


def moments(c: Config, name: str, shape) -> int:
    """Tensors of its size that the optimizer keeps of a parameter: 2, of AdamW; 1, of Muon, for the matrices of blocks."""
    return 1 if c.optim.name == "muon" and ".h." in name and len(shape) == 2 else 2


def kept(c: Config, cuda: bool) -> list[tuple[str, float, str]]:
    """What autograd keeps of a block: (tensor, bytes a token, in which of MODES, by their first letters)."""
    m, (H, K, D), compiled = c.model, c.model.heads, c.train.compiles(cuda)
    e, C, M, T = element(c), m.n_embd, m.mlp_width, m.block_size
    apart = not (cuda or compiled)                                # then RMSNorm keeps its result in float32, and not x
    norm = ("norm", 4 * C + 4 if apart and m.norm == "rmsnorm" else 8, "n")
    x = "" if apart and m.norm == "rmsnorm" else "n"
    hand = apart and not m.mask_documents and attends_by_hand(T, e == 2, m.dropout)
    short = not cuda and (e == 2 and T <= 512 or m.dropout > 0)   # plain_attention
    seen = sum(min(T, i + ROWS) * min(ROWS, T - i) for i in range(0, T, ROWS)) / T if hand else T
    flex = cuda and compiled and not m.dropout and 16 <= D <= 128
    tensors: list[tuple[str, float, str]] = [("x", e * C, "sf" + x), norm, ("ln_1(x)", e * C, "n")]
    if hand or short:                                             # no fused kernel: (heads, T, T) is kept, or half of it
        tensors += [("q, k, v", e * (H + 2 * K) * D, "s"), ("q, k, v by head", e * 3 * H * D, "n"),
                    ("attention to each token", e * H * seen * ((3 - hand) if m.dropout else 1), "n"),
                    ("attention", e * H * D, "n")]
    else:
        tensors += [("q, k, v", e * (H + 2 * K) * D, "ns"), ("attention, log of its sums", (e * D + 4) * H, "ns"),
                    ("q, k turned", e * (H + K) * D * (m.qk_norm or m.position == "rope"), "n"),
                    ("k, v repeated", e * 2 * H * D * (K < H and cuda and e == 4), "n"),
                    ("mask", e * T * (m.mask_documents and not flex), "n")]
    return [*tensors, ("norms of q, k", (4 * D * apart + 4) * (H + K) * m.qk_norm, "n"),
            ("attention's projection", e * C, "s"),
            ("x + attention", e * C, x), norm, ("ln_2(x)", e * C, "n"),
            ("c_fc", e * M * (2 if m.mlp == "swiglu" else 1), "ns"),
            ("silu(gate)", e * M * (m.mlp == "swiglu" and not compiled), "n"), ("activation", e * M, "n"),
            ("MLP's projection", e * C * (not compiled), "s"),
            ("dropout", (1 if cuda or compiled else e) * 2 * C * (m.dropout > 0), "n")]


def element(c: Config) -> int:
    """Bytes of an element of weights and activations at work."""
    return 4 if c.train.precision == "float32" else 2


def activations(c: Config, cuda: bool = True) -> float:
    """Bytes that a micro-batch leaves for its backward, without the loss."""
    m, e = c.model, element(c)
    block = sum(n for _, n, modes in kept(c, cuda) if c.sharding.activation_checkpointing[0] in modes)
    norm = 4 if m.norm == "rmsnorm" and not cuda else e                            # ln_f is not compiled
    ends = (norm + e + (1 if cuda else e) * (m.dropout > 0)) * m.n_embd            # its input and output
    ids = 16 + m.mask_documents * (8 + m.block_size)                               # and targets, positions, mask
    angles = 8 * m.heads[2] * m.block_size * (m.position == "rope")
    return c.train.micro_batch_size * m.block_size * (m.n_layer * block + ends + ids) + angles


def predict(c: Config, world_size: int, local_world_size: int | None = None, cuda: bool = True) -> dict[str, int]:
    """Bytes of the first rank when its memory is fullest: {component: bytes}, whose sum is the peak.

    c.model.vocab_size must be set. With cuda, of the GPU alone (see host); without, of a CPU, all that there is.
    """
    L, tokens, e = c.model.n_layer, c.train.micro_batch_size * c.model.block_size, element(c)
    shards, frees = shards_of(c, world_size, local_world_size), c.sharding.strategy in ("full", "hybrid")
    blocks, root = parameters(c)
    block, others = (sum(math.prod(shape) for _, shape, *_ in part) for part in (blocks, root))
    state, whole, more = states(c, world_size, local_world_size), block * L + others, c.accumulation(world_size) > 1
    if cuda and c.sharding.cpu_offload:
        state = dict.fromkeys(state, 0)

    # Weights: whole in the root, in the block at work, and in the next, which is on its way; or everywhere.
    gathered = e * (others + block * (1 + (shards > 1)) if frees else whole)
    # Gradients of the micro-batches before: sharded, or whole where they are summed late.
    late = more and not c.sharding.syncs_each
    summed = 4 * whole if late else state["gradients"] * more
    # On their way in float32: those of a block; at last of the root, in, out, and a copy where all is on every rank.
    replicas = c.sharding.strategy in ("hybrid", "replicate")
    sent = 4 * block * (1 / shards if late else 1 + replicas / shards)
    last = 4 * max(block if frees or world_size > 1 else whole, others) * (1 + 1 / shards + (shards == 1 < world_size))

    mode, tensors = c.sharding.activation_checkpointing[0], kept(c, cuda)
    acts, of_a_block = activations(c, cuda), tokens * sum(n for _, n, modes in tensors if mode in modes)
    recomputed = tokens * sum(n for _, n, modes in tensors if "n" in modes and mode not in modes)

    rows, C = padded(c.model.vocab_size), c.model.n_embd
    logits, head = tokens * rows, rows * C
    if logits <= CHUNK_LOGITS:
        loss = 12 * logits                                                         # log p, and two gradients of its size
    else:
        n = CHUNK_LOGITS // rows * rows                                            # logits of a chunk, and their log p
        loss = 8 * n + 4 * head + e * tokens * C

    # Muon, of the matrices of one shape at once: copies of gradient and momentum, and what its iterations have at work.
    muon = (8 + 6 + e) * max((held(shape, shards) * trained for name, shape, _, trained in blocks
                              if moments(c, name, shape) == 1), default=0)

    aside = 0 if cuda or not c.checkpoint.async_save else state["weights"] + state["optimizer"]
    stages = [
        # the loss, when all activations are there
        dict(gathered=gathered, gradients=summed, activations=acts, loss=loss),
        # backward: in the last block nothing is on its way yet; in the one before, the last one's activations are gone
        dict(gathered=gathered, gradients=summed + e * (block // 2 + head), communication=max(0, sent - of_a_block),
             activations=acts + recomputed + tokens * e * c.model.mlp_width),
        # its end: the root's gradients
        dict(gradients=state["gradients"] * (more and not late), communication=last),
        # the optimizer
        dict(gradients=state["gradients"] + muon)]
    fullest = max(stages, key=lambda stage: sum(stage.values()))
    names = ("weights", "gradients", "optimizer", "gathered", "activations", "loss", "communication", "checkpoint")
    found = dict(weights=state["weights"], optimizer=state["optimizer"], checkpoint=aside) | fullest
    return {name: round(found.get(name, 0)) for name in names}


def host(c: Config, world_size: int, local_world_size: int | None = None) -> int:
    """Bytes in host memory of a rank on a GPU: what is offloaded, and what an asynchronous save keeps aside."""
    state = states(c, world_size, local_world_size)
    saved = state["weights"] + state["optimizer"]
    return sum(state.values()) * c.sharding.cpu_offload + saved * c.checkpoint.async_save


# ---- does it fit? ---------------------------------------------------------------------------------------------------

def changed(c: Config, **sharding_or_train) -> Config:
    """A copy with other values of sharding and train."""
    copy = c.model_copy()
    for section in ("sharding", "train"):
        values = getattr(c, section)
        mine = {k: v for k, v in sharding_or_train.items() if k in type(values).model_fields}
        setattr(copy, section, values.model_copy(update=mine))
    return copy


def largest_micro_batch(c: Config, world_size: int, local_world_size: int | None, room: int, cuda: bool = True,
                        divides: bool = False) -> int:
    """The largest train.micro_batch_size whose peak is within room, 0: none. divides: the global batch, over all ranks."""
    share = min(c.train.global_batch_size // world_size, 1 << 16)
    sizes = [n for n in range(1, share + 1) if not divides or c.train.global_batch_size % (n * world_size) == 0]
    return max((0, *sizes[:bisect_right(sizes, room, key=lambda n: sum(
        predict(changed(c, micro_batch_size=n), world_size, local_world_size, cuda).values()))]))


def room(device: torch.device, local_world_size: int = 1) -> int:
    """Bytes that this rank may take: the GPU's memory, or its share of what the host has left, swap and all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    left = []
    with contextlib.suppress(OSError, ValueError):
        info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        left = [1024 * (int(info["MemAvailable"].split()[0]) + int(info["SwapFree"].split()[0]))]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container: cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):            # `max`: none
            left.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(left, default=1 << 62) // local_world_size


def check(c: Config, device: torch.device, world_size: int, local_world_size: int, room: int) -> tuple[str, str | None]:
    """(the estimate in a line, a warning or None). Raises UserError where not even what is certain fits into room bytes."""
    cuda, lasting = device.type == "cuda", states(c, world_size, local_world_size)
    found = predict(c, world_size, local_world_size, cuda)
    peak = sum(found.values())
    parts = ", ".join(f"{k} {gib(v)}" for k, v in sorted(found.items(), key=lambda part: -part[1])[:4] if v)
    line = f"{gib(peak)} GiB of {gib(room)} GiB a rank, as predicted: {parts}"
    if not (cuda and c.sharding.cpu_offload) and sum(lasting.values()) > room:
        raise UserError(f"memory: weights, gradients and optimizer state take {gib(sum(lasting.values()))} GiB a rank, and "
                        f"{device.type} has {gib(room)} GiB; " + remedy(c, world_size, local_world_size, room, cuda))
    if peak <= 0.9 * room:
        return line, None
    return line, (f"memory: the peak is predicted as {gib(peak)} GiB a rank ({parts}), and {device.type} has {gib(room)} "
                  "GiB; should it not fit, " + remedy(c, world_size, local_world_size, room, cuda))


def remedy(c: Config, world_size: int, local_world_size: int, room: int, cuda: bool) -> str:
    """What to change so that the peak is within nine tenths of room: the first that does."""
    more = MODES[MODES.index(c.sharding.activation_checkpointing) + 1:]
    ways: list[dict[str, Any]] = [{}, *(dict(activation_checkpointing=mode) for mode in more)]
    shard = [] if c.sharding.strategy == "full" or world_size == 1 else [dict(strategy="full", shard_size=None)]
    for way in [*ways, *(a | b for b in shard for a in ways), *([dict(cpu_offload=True)] if cuda else [])]:
        other = changed(c, **way)
        if n := largest_micro_batch(other, world_size, local_world_size, int(0.9 * room), cuda, divides=True):
            n = min(n, c.train.micro_batch_size)
            options = [f"--sharding.{key} {value}" for key, value in way.items() if value is not None]
            options += [f"--train.micro_batch_size {n}"] * (n < c.train.micro_batch_size)
            if options:
                return "take " + " ".join(options)
    return "take more ranks with --sharding.strategy full, or a smaller model"


def gib(n: float) -> str:
    """Bytes in GiB, in three digits or so."""
    n /= 2**30
    return f"{n:.3f}" if n < 1 else f"{n:.2f}" if n < 10 else f"{n:,.1f}"
