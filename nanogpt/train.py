"""Trains a GPT: this page, top to bottom.

    bash launch/train.sh configs/quickstart.yaml                                   every GPU of this machine, else its CPU
    bash launch/train.sh configs/gpt2_124m.yaml --optim.learning_rate 3e-4         any setting of --help
    torchrun --nproc_per_node 8 launch/train.sh configs/gpt2_124m.yaml             8 GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 launch/train.sh …   2 machines

The same command starts a run and resumes it. In order: config checked -> process group -> data and checkpoint found
to fit -> model sharded, initialised or loaded -> steps. SIGTERM or SIGUSR1: the step is finished and saved, status 75.
"""

import gc
import math
import os
import re
import time

import torch
import torch.distributed as dist

from nanogpt import checkpoint, memory, tokenizer, watch
from nanogpt.config import Config
from nanogpt.console import introduce
from nanogpt.errors import PeerLost, Stopped, UserError
from nanogpt.health import Numbers, Vitals
from nanogpt.loss import IGNORE
from nanogpt.meter import Meter, recomputed_flops
from nanogpt.model import separate_documents
from nanogpt.optim import learning_rate, make_optimizer
from nanogpt.profiler import profiled
from nanogpt.ranks import init_process_group, settle_precision
from nanogpt.resume import run_state, starting_point, take_run_folder, take_shape, warn
from nanogpt.sharding import DTYPES, build, norms, reshard
from nanogpt.stream import Split, TrainStream, inputs_and_targets


def train(config: Config, device: torch.device) -> dict:
    """Runs or resumes the run that config describes. Returns the last record of metrics.jsonl.

    Raises UserError where the run cannot go on, Stopped once it is saved because a signal asked for its end.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    guard = watch.Watch(config.run)
    config.train.compile = config.train.compiles(device.type == "cuda")
    reason = settle_precision(config.train, device)

    # ---- data, and where to start from ------------------------------------------------------------------------------
    warnings = []
    weights = take_shape(config)
    stream = TrainStream(config)
    splits = {"train": stream.splits, "val": stream.validation(config)}
    config.model.vocab_size = config.model.vocab_size or stream.vocab_size
    tok = tokenizer.from_json(stream.card["tokenizer"])
    token_bytes = torch.from_numpy(tok.token_bytes()).to(device)
    separate = separate_documents(config.model, tok, blocks=config.train.compile and device.type == "cuda")
    if weights:
        weights.check_tokenizer(tok, config.data.sources[0].path, warnings)
    if not splits["val"] and (config.eval.patience or config.checkpoint.keep_best):
        raise UserError("eval.patience, checkpoint.keep_best: the data has no val split; convert it again with --val-fraction")
    take_run_folder(config, make=False)
    resumed, state = starting_point(config, stream, warnings)
    first_step, era = state["step"], state["data_history"][-1]
    config._before = era["from_step"], era["tokens"]  # with another batch size, train.max_tokens is other steps

    # ---- model and optimizer ----------------------------------------------------------------------------------------
    estimate = None if config.eval.only else room_for(config, device, warnings)
    model = build(config, device)
    optimizer = make_optimizer(model, config.optim, DTYPES[config.train.precision]) if not config.eval.only else None
    if resumed:
        checkpoint.load(resumed, model, optimizer)
    elif weights:
        weights.fill(model)
    meter = Meter(config, device, world_size, model.flops_per_token(), writes=rank == 0, state=state,
                  recomputed=recomputed_flops(model, config.sharding.activation_checkpointing))

    def losses_now(step: int) -> dict:
        """Loss and bits a byte of each split."""
        guard.at(step, "evaluation")
        found = {}
        for name in filter(splits.get, splits):
            nats, bits, each = evaluate(model, splits[name], config, token_bytes, separate, device,
                                        lambda: guard.at(step, "evaluation"))
            found |= {f"{name}_loss": nats, f"{name}_bits_per_byte": bits} | {f"{name}_loss/{k}": v for k, v in each.items()}
        return found

    if config.eval.only:
        introduce(meter, config, stream, splits["val"], model, resumed, state, reason)
        record = losses_now(first_step)
        meter.say(f"step {first_step}" + meter.losses(record))
        return record
    take_run_folder(config, make=True)
    meter.open(first_step, warnings)
    introduce(meter, config, stream, splits["val"], model, resumed, state, reason, estimate)
    saver = checkpoint.Saver(config.run_dir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_every,
                             config.checkpoint.async_save, config.checkpoint.keep_best, warn=meter.say,
                             saved=meter.say_on_terminal)

    # ---- steps ------------------------------------------------------------------------------------------------------
    last_step = config.max_steps
    numbers, vitals = Numbers(config, state, device), Vitals(config, model, tok)
    batches = stream.batches(first_step, last_step, rank, world_size, device)
    done, saved_step, record, signal_name = first_step, first_step, {}, None
    held_out = state["held_out"]
    if rank == 0 and config.checkpoint.keep_best:
        saver.point_at_best(held_out["best_step"])  # killed between the two, a run had saved it and not pointed at it
    if weights:  # finetuning: what there was before
        record = dict(step=0, tokens=0, loss=None, time=time.time()) | losses_now(0)
        held_out["before"] = record.get("val_loss")
        meter.log(record)
    if early := stops_early(config, held_out):
        last_step = first_step
    gc.collect()
    gc.freeze()   # all that was imported: looking through it takes longer than a small model's step
    gc.disable()  # a collection at a random moment on one rank is a wait for all: at log steps instead, on all at once
    meter.start(first_step)
    meter.go_live(first_step, guard)
    model.train()

    for step in profiled(range(first_step, last_step), config, device, meter, guard):
        if signal_name := guard.asked_to_stop():
            break
        if config.model.dropout:  # a function of the step too, so that nothing of it needs saving
            torch.manual_seed(hash((config.run.seed, step, rank)) & (2**63 - 1))
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["of_peak"]

        # The whole step's tokens are at hand before its first forward: each loss is divided by the count of all ranks.
        guard.at(step + 1, "data")
        accumulation, block = config.accumulation(world_size, step), config.block(step)
        with meter.waiting_for_data():
            read = [next(batches) for _ in range(accumulation)]
        tokens = [inputs_and_targets(part.to(device, non_blocking=True), block) for part in read]
        count = sum((y != IGNORE).sum() for _, y in tokens)
        guard.at(step + 1, "compute")
        if world_size > 1:
            dist.all_reduce(count)
        count = count.clamp(min=1)  # type: ignore[union-attr]  # all of it prompts: nothing to learn
        loss = torch.zeros((), device=device)
        for i, (x, y) in enumerate(tokens):                                      # x, y: (micro_batch_size, block_size)
            if accumulation > 1:
                last = i == accumulation - 1
                model.set_requires_gradient_sync(last or config.sharding.syncs_each)  # type: ignore[operator]  # of FSDPModule
                model.set_requires_all_reduce(last)  # type: ignore[operator]  # of hybrid's replicas
            part = model(x, y, *separate(x)) / count
            part.backward()
            loss += part.detach()
            guard.at(step + 1, "compute")
        if world_size > 1:
            dist.all_reduce(loss)
        norm = gradient_norm(model)

        # What is not finite never reaches the weights: the optimizer then leaves everything as it is. The host learns
        # of it when it next looks. And it divides by grad_scale, so that clipping (as clip_grad_norm_) takes no pass of its own.
        optimizer.found_inf = numbers.see(step, loss, norm)  # type: ignore[attr-defined]  # as GradScaler does
        scale = ((norm + 1e-6) / config.optim.grad_clip).clamp(min=1) if config.optim.grad_clip else None
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        vitals.before(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # ---- now and then: tell, evaluate, save ---------------------------------------------------------------------
        done = step + 1
        evaluates = done == last_step or due(done, config.eval.interval)
        saves = done == last_step or due(done, config.checkpoint.interval)
        if evaluates or saves or done == first_step + 1 or due(done, config.log.interval):
            record = meter.record(done, loss.item(), lr, norm.item())            # the host waits for the device here
            guard.first = False
            try:
                record |= numbers.clipped_fraction(done) | numbers.look(done, stream, meter)
            except UserError:
                saver.wait()  # the checkpoint under way is of a good step
                raise
            with meter.not_training():
                record |= vitals.after(tokens[0][0])
                best = False
                if evaluates:
                    record |= losses_now(done)
                    best = weigh(record, held_out)
                    early = stops_early(config, held_out)
                meter.log(record)
                if saves or early or best and config.checkpoint.keep_best:
                    guard.at(done, "checkpoint")
                    saver.save(model, optimizer, run_state(config, done, stream, tok, state, numbers, meter))
                    saved_step = done
                gc.collect(2 if saves else 1)
                saver.tell()
                warn_of_short_grace(meter, config, saver, record)
        if early:
            break

    # ---- end --------------------------------------------------------------------------------------------------------
    gc.enable()
    gc.unfreeze()
    guard.at(done, "checkpoint")
    if signal_name and done > saved_step:
        if told := numbers.look(done, stream, meter):
            meter.log(meter.record(done, loss.item(), lr, norm.item()) | told)
        saver.save(model, optimizer, run_state(config, done, stream, tok, state, numbers, meter))
    saved = saver.wait()
    guard.settle()
    if early:
        meter.say(f"ended at step {done} of {config.max_steps}: {held_out['since']} evaluations in a row without a new lowest "
                  "validation loss (eval.patience)")
    elif first_step >= last_step:
        meter.say(f"nothing to do: step {first_step} of {last_step} is done (a larger train.max_steps goes on)")
    if signal_name and saved:
        meter.say(f"stopped by {signal_name} after step {done} of {last_step}, and saved; the same command goes on")
    if None not in (held_out["before"], held_out["best"]):
        kept = checkpoint.step_folder(config.run_dir / "checkpoints", held_out["best_step"])
        meter.say(f"validation loss {held_out['before']:.4f} before, {held_out['best']:.4f} at its lowest, after step "
                  f"{held_out['best_step']}" + (f" ({kept})" if kept.exists() else " (not kept)"))
    lost = meter.close()
    if not saved:
        raise UserError(f"{config.run_dir}: the last checkpoint could not be saved; make room and run the command again")
    if lost:
        raise UserError(f"{config.run_dir}: metrics.jsonl and log.txt could not be written to their end ({lost})")
    if signal_name:
        raise Stopped
    return record


def weigh(record: dict, held_out: dict) -> bool:
    """Whether an evaluation found a new lowest validation loss. held_out is told."""
    best = record.get("val_loss", math.inf) < (math.inf if held_out["best"] is None else held_out["best"])
    if best:
        held_out |= dict(best=record["val_loss"], best_step=record["step"], since=-1)
    held_out["since"] += 1
    return best


def stops_early(config: Config, held_out: dict) -> bool:
    return 0 < config.eval.patience <= held_out["since"]


def due(done: int, interval: int) -> bool:
    return interval > 0 and done % interval == 0


def gradient_norm(model) -> torch.Tensor:
    """The 2-norm of the whole gradient, over all ranks; a scalar on the device."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return norms(model, [[grad.to_local() for grad in grads]])[0]


@torch.no_grad()
def evaluate(model, splits: list[Split], config: Config, token_bytes: torch.Tensor, separate, device,
             alive) -> tuple[float, float, dict]:
    """(mean loss in nats a token, bits a byte) over the first eval.sequences of each split, by all ranks together.

    Several splits, those of a mixture, count in its proportions; {label: its own loss}. alive() is called once a batch.
    """
    model.eval()
    sums = torch.zeros(len(splits), 3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    for i, split in enumerate(splits):
        for x, y in split.fixed_batches(config.eval.sequences, config.train.micro_batch_size,
                                        dist.get_rank(), dist.get_world_size()):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            counts = y != IGNORE
            nats = model(x, y, *separate(x)).double()
            sums[i] += torch.stack([nats, counts.sum(), (token_bytes[y.clamp(min=0)] * counts).sum()])
            alive()
    reshard(model)
    model.train()
    dist.all_reduce(sums)
    weights = torch.tensor([split.share for split in splits], dtype=torch.float64)
    nats, tokens, n_bytes = sums.cpu().T
    loss, bytes_a_token = ((weights * of / tokens).sum().item() / weights.sum().item() for of in (nats, n_bytes))
    each = {split.label: nat.item() for split, nat in zip(splits, nats / tokens) if split.label}
    return loss, loss / max(1e-9, bytes_a_token) / math.log(2), each


def warn_of_short_grace(meter: Meter, config: Config, saver, record: dict):
    """Says, once, that a save takes longer than there is between SIGTERM and SIGKILL."""
    needed = saver.seconds + 2 * record["step_time_s"]
    if saver.seconds and needed > config.run.grace_s and not saver.warned_of_grace:
        saver.warned_of_grace = True
        meter.say(f"warning: to finish a step and save takes {needed:.1f} s, and SIGKILL follows SIGTERM after "
                  f"{config.run.grace_s:g} s (run.grace_s): a preemption would lose the steps since the last "
                  f"checkpoint. Give more time (SLURM's --signal=USR1@SECONDS; newer torchruns' --shutdown-timeout), or save "
                  f"more often than every {config.checkpoint.interval} steps")


# ---- before the first step ------------------------------------------------------------------------------------------

def room_for(config: Config, device: torch.device, warnings: list[str]) -> str:
    """The predicted memory in a line. Raises UserError, on all ranks, where what is certain does not fit."""
    ranks, local_ranks = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    room = torch.tensor(memory.room(device, local_ranks), device=device)
    dist.all_reduce(room, dist.ReduceOp.MIN)
    line, warning = memory.check(config, device, ranks, local_ranks, int(room.item()))
    if warning and dist.get_rank() == 0:
        warn(warnings, warning)
    return line


# ---- in and out -----------------------------------------------------------------------------------------------------

def start(config: Config) -> dict:
    """Process group, run, and out again. What launch/train.sh calls once the config is known to be good."""
    device = init_process_group(config)  # a rank that waits here for one that has died is still ended by SIGTERM
    watch.listen()
    try:
        record = train(config, device)
    except Stopped:
        dist.destroy_process_group()
        raise
    except BrokenPipeError:  # `… | head`
        raise
    except OSError as error:  # another user's file, a disk that fails
        raise UserError(f"{error.filename or config.run_dir}: {error.strerror or error}; once that is mended, the same "
                        "command goes on from the last checkpoint") from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in LOST):
            raise
        said = " ".join(re.sub(r"\[/\S+\]", "", str(error)).split())[:100]
        raise PeerLost(f"lost another rank ({said}); the same command goes on from the last checkpoint") from error
    finally:
        watch.end()
    dist.destroy_process_group()
    return record


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "gloo/transport")
