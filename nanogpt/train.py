"""Trains a GPT: this page, top to bottom.

    bash launch/train.sh configs/quickstart.yaml                                   every GPU of this machine, else its CPU
    bash launch/train.sh configs/gpt2_124m.yaml --optim.learning_rate 3e-4         any setting of --help
    torchrun --nproc_per_node 8 launch/train.sh configs/gpt2_124m.yaml             8 GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 launch/train.sh …   2 machines

The same command starts a run and resumes it. In order: config checked -> process group -> data and checkpoint found
to fit -> model sharded, initialised or loaded -> steps.
"""

import gc
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.distributed.fsdp import FSDPModule

from nanogpt import __version__, checkpoint, tokenizer
from nanogpt.config import Config
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE
from nanogpt.meter import Meter
from nanogpt.optim import learning_rate, make_optimizer
from nanogpt.sharding import build
from nanogpt.stream import Split, TrainStream


def train(config: Config, device: torch.device) -> dict:
    """Runs or resumes the run that config describes. Returns the last record of metrics.jsonl."""
    rank, world_size = dist.get_rank(), dist.get_world_size()

    # ---- data, and where to start from ------------------------------------------------------------------------------
    stream = TrainStream(config)
    splits = {"train": stream.split} | ({"val": Split(config, "val")} if "val" in stream.split.card["splits"] else {})
    config = config.model_copy(update=dict(
        model=config.model.model_copy(update=dict(vocab_size=stream.split.vocab_size))))
    tok = tokenizer.from_json(stream.split.card["tokenizer"])
    token_bytes = torch.from_numpy(tok.token_bytes()).to(device)
    resumed, state = starting_point(config, stream.identity())
    first_step = state["step"] if resumed else 0

    # ---- model and optimizer ----------------------------------------------------------------------------------------
    model = build(config, device)
    optimizer = make_optimizer(model, config.optim)
    if resumed:
        checkpoint.load(resumed, model, optimizer)
    elif config.run.init_from:
        load_weights(model, config, tok)
    meter = Meter(config, device, world_size, model.flops_per_token(), writes=rank == 0)
    if rank == 0:
        prepare_run_folder(config)
    dist.barrier()
    meter.open(first_step)
    introduce(meter, config, stream, model, resumed, state)
    saver = checkpoint.Saver(config.run_dir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_every,
                             config.checkpoint.async_save, warn=meter.say)

    # ---- steps ------------------------------------------------------------------------------------------------------
    last_step, accumulation = config.max_steps, config.accumulation(world_size)
    sums_late = config.sharding.strategy in ("grad", "replicate")  # gradients stay whole until the last micro-batch
    bad_step = torch.full((), -1, device=device)                   # the first step whose gradient was not finite
    batches = stream.batches(first_step, last_step, rank, world_size, device)
    saved, record = True, {}
    gc.collect()
    gc.disable()  # a collection at a random moment on one rank is a wait for all: at log steps instead, on all at once
    meter.start(first_step)
    model.train()

    for step in range(first_step, last_step):
        if config.model.dropout:  # a function of the step too, so that nothing of it needs saving
            torch.manual_seed(hash((config.run.seed, step, rank)) & (2**63 - 1))
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The whole step's tokens are at hand before its first forward: each loss is divided by the count of all ranks.
        with meter.waiting_for_data():
            tokens = [next(batches).to(device, non_blocking=True) for _ in range(accumulation)]
        count = sum((t[:, 1:] != IGNORE).sum() for t in tokens)
        if world_size > 1:
            dist.all_reduce(count)
        loss = torch.zeros((), device=device)
        for i, t in enumerate(tokens):                                           # t: (micro_batch_size, block_size + 1)
            model.set_requires_gradient_sync(not sums_late or i == accumulation - 1)
            part = model(t[:, :-1], t[:, 1:]) / count
            part.backward()
            loss += part.detach()

        # Clipping, and a guard: from the first gradient that is not finite, AdamW's kernel leaves everything as it is.
        # The host learns of it when it next looks, and stops with weights that are good.
        norm = gradient_norm(model)
        bad_step = torch.where((bad_step < 0) & ~norm.isfinite(), step, bad_step)
        if config.optim.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.grad_clip, norm)
        optimizer.grad_scale, optimizer.found_inf = None, (bad_step >= 0).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # ---- now and then: tell, evaluate, save ---------------------------------------------------------------------
        done = step + 1
        evaluates = done == last_step or due(done, config.eval.interval)
        saves = done == last_step or due(done, config.checkpoint.interval)
        if evaluates or saves or done == first_step + 1 or due(done, config.log.interval):
            dist.all_reduce(loss)
            stop_if_not_finite(bad_step, loss, stream)                           # the host waits for the device here
            record = meter.record(done, loss.item(), lr, norm.item())
            with meter.not_training():
                if evaluates:
                    for name, split in splits.items():
                        nats, bits_per_byte = evaluate(model, split, config, token_bytes, device)
                        record |= {f"{name}_loss": nats, f"{name}_bits_per_byte": bits_per_byte}
                meter.log(record)
                if saves:
                    saver.save(model, optimizer, run_state(config, done, stream, tok))
                    if done == last_step:
                        saved = saver.wait()
                gc.collect(2 if saves else 1)

    # ---- end --------------------------------------------------------------------------------------------------------
    gc.enable()
    if first_step >= last_step:
        meter.say(f"nothing to do: step {first_step} of {last_step} is done (a larger train.max_steps goes on)")
    meter.close()
    if not saved:
        raise UserError(f"{config.run_dir}: the last checkpoint could not be saved; make room and run the command again")
    return record


def due(done: int, interval: int) -> bool:
    return interval > 0 and done % interval == 0


def gradient_norm(model) -> torch.Tensor:
    """The 2-norm of the whole gradient, over all ranks; a scalar on the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def stop_if_not_finite(bad_step: torch.Tensor, loss: torch.Tensor, stream: TrainStream):
    """Raises UserError naming the step and its samples if a gradient was not finite. No weight has changed since."""
    step = bad_step.item()
    if step < 0:
        return
    samples = sorted(set(stream.sequences(step)[:, 0].tolist()))
    shown = ", ".join(map(str, samples[:16])) + (f", … ({len(samples)} in all)" if len(samples) > 16 else "")
    raise UserError(f"step {step + 1}: loss or gradient is not finite (loss of the last step: {loss.item():g}); it was "
                    f"not applied. Its samples: {shown}. The last checkpoint is good: try a lower optim.learning_rate")


@torch.no_grad()
def evaluate(model, split: Split, config: Config, token_bytes: torch.Tensor, device) -> tuple[float, float]:
    """(mean loss in nats a token, bits a byte) over the first eval.sequences of a split, by all ranks together."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    for x, y in split.fixed_batches(config.eval.sequences, config.train.micro_batch_size,
                                    dist.get_rank(), dist.get_world_size()):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        counts = y != IGNORE
        sums += torch.stack([model(x, y).double(), counts.sum(), (token_bytes[y.clamp(min=0)] * counts).sum()])
    for module in model.modules():  # without a backward, fully_shard would leave some weights whole
        if isinstance(module, FSDPModule):
            module.reshard()
    model.train()
    dist.all_reduce(sums)
    nats, tokens, n_bytes = sums.tolist()
    return nats / tokens, nats / max(1.0, n_bytes) / math.log(2)


# ---- before the first step ------------------------------------------------------------------------------------------

def starting_point(config: Config, identity: dict) -> tuple[Path | None, dict | None]:
    """(checkpoint to resume from, its state.json), or (None, None): start anew. Raises UserError on what does not fit.

    A damaged newest checkpoint is passed over, loudly, where an older one is whole.
    """
    found = [checkpoint.complete_steps(config.run_dir / "checkpoints")]
    dist.broadcast_object_list(found, src=0)  # a network file system may show other ranks another folder
    found = found[0]
    if config.run.resume == "never":
        if found:
            raise UserError(f"{config.run_dir}: has checkpoints, and run.resume is never; choose another run.name, "
                            "or remove the folder")
        return None, None
    if config.run.resume == "auto":
        candidates = found[::-1]
    else:
        candidates = [checkpoint.find(config.run.resume)]
        newer = [p for p in found if checkpoint.step_of(p) > checkpoint.step_of(candidates[0])]
        if newer:
            raise UserError(f"{newer[-1]}: is newer than {candidates[0]}, from which you resume; move it away, or give "
                            "another run.name")
    for i, path in enumerate(candidates):
        try:
            checkpoint.verify(path)
            state = checkpoint.read_state(path)
            break
        except UserError as error:
            if i == len(candidates) - 1:
                raise
            if dist.get_rank() == 0:
                print(f"warning: {error}\nwarning: going on from {candidates[i + 1]} instead", file=sys.stderr, flush=True)
    else:
        return None, None
    different = [f"{path}: {key} is {identity[key]} now and was {state['data'].get(key)}: the samples would come in "
                 "another order; take the old value, or start another run.name"
                 for key in identity if state["data"].get(key) != identity[key]]
    if different:
        raise UserError("\n".join(different))
    return path, state


def load_weights(model, config: Config, tok):
    """run.init_from: weights alone, of a run with the same tokenizer and shape."""
    path = checkpoint.find(config.run.init_from)
    checkpoint.verify(path)
    known = checkpoint.read_state(path)["tokenizer"]
    if known["fingerprint"] != tok.fingerprint:
        raise UserError(f"{path}: its tokenizer is {known['name']}, that of {config.data.path} is {tok.name} (another "
                        "fingerprint): convert the text with the same one")
    checkpoint.load(path, model)


def prepare_run_folder(config: Config):
    folder = config.run_dir
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another run.dir") from None


def run_state(config: Config, step: int, stream: TrainStream, tok) -> dict:
    """state.json: what a checkpoint knows beside its tensors."""
    return dict(step=step, tokens=step * config.tokens_per_step, config=config.model_dump(), data=stream.identity(),
                tokenizer=tok.to_json(), world_size=dist.get_world_size(),
                versions=dict(nanogpt=__version__, torch=torch.__version__, python=sys.version.split()[0]))


def introduce(meter: Meter, config: Config, stream: TrainStream, model, resumed, state):
    """The run in a few lines."""
    c, ranks, split = config, dist.get_world_size(), stream.split
    device = torch.cuda.get_device_name(meter.device) if meter.device.type == "cuda" else \
        f"CPU, {torch.get_num_threads()} threads a rank"
    meter.say(f"model       {model.num_params() / 1e6:.2f}M parameters: {c.model.n_layer} layers, {c.model.n_head} heads, "
              f"width {c.model.n_embd}, block {c.model.block_size}, vocabulary {c.model.vocab_size} in "
              f"{model.transformer.wte.weight.size(0)} rows")
    meter.say(f"data        {split.path}: {split.card['splits']['train']['tokens']:,} tokens, "
              f"{stream.steps_per_epoch} steps an epoch, {split.card['tokenizer']['name']} tokenizer")
    meter.say(f"batch       {c.train.global_batch_size} sequences = {ranks} ranks x {c.train.micro_batch_size} x "
              f"{c.accumulation(ranks)} accumulated; {c.tokens_per_step:,} tokens a step, {c.max_steps} steps, "
              f"{c.max_steps * c.tokens_per_step / 1e6:.3g}M tokens, {c.max_steps / stream.steps_per_epoch:.3g} epochs")
    meter.say(f"sharding    {c.sharding.strategy}, activation checkpointing {c.sharding.activation_checkpointing}, "
              f"{c.train.precision}, compile {'on' if c.train.compile else 'off'}")
    meter.say(f"device      {device}" + ("" if meter.peak else "; its peak FLOP/s is not known, so no MFU"))
    meter.say(f"run         {c.run_dir}" + (f", from {c.run.init_from}" if c.run.init_from and not resumed else ""))
    if "val" not in split.card["splits"]:
        meter.say(f"warning: {split.path} has no val split: there is no validation loss")
    if resumed:
        meter.say(f"resuming    {resumed}: step {state['step']} on {state['world_size']} -> {ranks} ranks")
        for key, (was, now) in changes(state["config"], c.model_dump()).items():
            meter.say(f"            changed since: {key} {was} -> {now}")


def changes(was: dict, now: dict) -> dict:
    """{section.key: (was, now)} of two configs."""
    return {f"{section}.{key}": (was.get(section, {}).get(key), value)
            for section, values in now.items() for key, value in values.items()
            if was.get(section, {}).get(key) != value}


# ---- process group --------------------------------------------------------------------------------------------------

def init_process_group(config: Config) -> torch.device:
    """Joins the ranks that torchrun started, or makes a group of one. Returns this rank's device."""
    use_cuda = torch.cuda.is_available() if config.run.device == "auto" else config.run.device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise UserError("run.device: cuda is asked for, and PyTorch finds none here; leave it at auto, or install a "
                        "CUDA build of torch")
    alone = "RANK" not in os.environ
    if alone:  # streaming reads these too
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    group = dict(store=dist.HashStore(), rank=0, world_size=1) if alone else {}
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{local_world_size} ranks on this machine, and {torch.cuda.device_count()} GPUs: start "
                            "torchrun with --nproc_per_node gpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **group)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))  # torchrun says 1
        dist.init_process_group("gloo", **group)
    return device


def start(config: Config) -> dict:
    """Process group, run, and out again. What launch/train.sh calls once the config is known to be good."""
    device = init_process_group(config)
    try:
        record = train(config, device)
    except BrokenPipeError:  # `… | head`
        raise
    except OSError as error:  # a full disk, another user's file
        raise UserError(f"{error.filename or config.run_dir}: {error.strerror or error}; once that is mended, the same "
                        "command goes on from the last checkpoint") from error
    dist.destroy_process_group()
    return record
