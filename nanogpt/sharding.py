"""One function turns a GPT on the meta device into one that is spread over the ranks and ready to train.

    mesh -> activation checkpointing -> compile, block by block -> fully_shard, block by block -> memory -> weights

No rank ever holds the whole model: it comes into being sharded, one parameter at a time.
"""

import functools
import logging
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanogpt.config import Config, Sharding
from nanogpt.errors import UserError
from nanogpt.model import GPT

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build(config: Config, device: torch.device) -> GPT:
    """The GPT of config.model (vocab_size set), sharded over all ranks, on `device`, with its initial weights."""
    with torch.device("meta"):
        model = GPT(config.model)
    freeze(model, config.train.freeze_blocks)
    shard(model, config, device.type)
    model.to_empty(device="cpu" if config.sharding.cpu_offload else device)
    model.tie_weights()
    init_weights(model, config.run.seed)
    return model


def freeze(model: GPT, n: int):
    """The first n blocks and the embeddings, with them a tied head, keep their weights. Raises UserError: too many."""
    if n > model.config.n_layer:
        raise UserError(f"train.freeze_blocks: {n}, and the model has {model.config.n_layer} blocks")
    if n:
        embeddings = [part for name, part in model.transformer.items() if name in ("wte", "wpe")]
        for part in (*embeddings, *model.transformer.h[:n]):
            part.requires_grad_(False)


def make_mesh(c: Sharding, device_type: str) -> DeviceMesh:
    """full, grad, and one rank: (world,), all share. Else (replicas, shards): shards are neighbours, on one machine.

    FSDP's ZeRO-3, ZeRO-2, HSDP and plain data parallelism are the same code on these meshes (Rajbhandari et al., 2020).
    """
    world = dist.get_world_size()
    if c.strategy in ("full", "grad") or world == 1:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    shards = 1 if c.strategy == "replicate" else c.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return init_device_mesh(device_type, (world // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard(model: GPT, config: Config, device_type: str):
    """Wraps a model in place."""
    c = config.sharding
    mesh = make_mesh(c, device_type)
    dtypes = {}
    if config.train.precision != "float32":
        dtypes = dict(param_dtype=DTYPES[config.train.precision], reduce_dtype=torch.float32)
    precision = MixedPrecisionPolicy(cast_forward_inputs=False, **dtypes)  # angles of rotary positions stay float32
    wrap = functools.partial(fully_shard, mesh=mesh, mp_policy=precision,
                             offload_policy=CPUOffloadPolicy(pin_memory=device_type != "cpu") if c.cpu_offload else OffloadPolicy())
    frees = c.strategy in ("full", "hybrid")  # the others keep a block's weights between forward and backward

    for block in model.transformer.h:
        if c.activation_checkpointing != "none":
            checkpoint_activations(block, selective=c.activation_checkpointing == "selective")
        if config.train.compile:
            block.compile()
        if frees or mesh.size() > 1:  # else nothing to free and nobody to talk to: one group, fewer hooks
            wrap(block, reshard_after_forward=frees)
    wrap(model, reshard_after_forward=False)  # embedding, head and last norm: needed at both ends of forward

    # Gradients are summed over ranks, not averaged: the loss is already divided by the tokens of all ranks. Each module
    # has a setting of its own, and gloo knows no other reduction than the plain sum. (Alone, even to divide by 1 is a copy.)
    for module in model.modules():
        if isinstance(module, FSDPModule) and mesh.size() > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def norms(model: GPT, local: list[list[torch.Tensor]]) -> torch.Tensor:
    """(lists,): of each list of this rank's parts the 2-norm, together with those of the ranks that hold the rest."""
    mesh = next(model.parameters()).device_mesh  # type: ignore[attr-defined]  # a DTensor, as fully_shard makes it
    found = torch.stack([torch.nn.utils.get_total_norm(parts) for parts in local])
    if mesh.size(-1) > 1:  # ranks that have one part each
        squares = found.square()
        dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
        found = squares.sqrt()
    return found


def reshard(model: GPT):
    """After a forward without a backward, which would leave some weights whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def checkpoint_activations(block: torch.nn.Module, selective: bool):
    """The block's activations are recomputed in backward (Chen et al., 2016); selective: but for those of matmuls."""
    context = {}
    if selective:
        saved = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.higher_order.flex_attention,
                 torch.ops.aten._scaled_dot_product_flash_attention.default,
                 torch.ops.aten._scaled_dot_product_efficient_attention.default,
                 torch.ops.aten._scaled_dot_product_cudnn_attention.default,
                 torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}

        def policy(ctx, op, *args, **kwargs):
            return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

        context = dict(context_fn=functools.partial(create_selective_checkpoint_contexts, policy))
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # it warns of in-place operations
    forward = block.forward

    # Not torch's wrapper module: that would put its own name into every parameter's. And not functools.partial: there
    # torch.compile would see nothing to compile.
    def recomputed(*args):
        return checkpoint(forward, *args, use_reentrant=False, **context)

    block.forward = recomputed


@torch.no_grad()
def init_weights(model: GPT, seed: int):
    """model.init_weights on a sharded model: each parameter is drawn whole, in turn, and each rank keeps its part.

    So the weights do not depend on the number of ranks, nor on the strategy.
    """
    for i, (name, weight) in enumerate(model.named_parameters()):
        whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        model.init_weight(name, whole, torch.Generator(weight.device).manual_seed(seed + i))
        weight.copy_(place_like(whole, weight))


def place_like(whole: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The part of `whole`, which every rank holds, that this rank keeps of `weight`: no communication."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
