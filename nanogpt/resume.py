"""Where a run starts from, what it may not change on the way, and what its checkpoints remember of it."""

import contextlib
import importlib.metadata
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from nanogpt import __version__, checkpoint, huggingface, watch
from nanogpt.config import Config, check_shape
from nanogpt.errors import UserError
from nanogpt.health import Numbers
from nanogpt.meter import Meter
from nanogpt.sharding import place_like
from nanogpt.stream import TrainStream


forgotten = dict(best=None, best_step=None, since=0)  # of held_out


def starting_point(config: Config, stream: TrainStream, warnings: list[str]) -> tuple[Path | None, dict]:
    """(checkpoint to resume from, its state.json), or (None, the state of a new run). Tells the stream where it begins.

    A damaged newest checkpoint is passed over, loudly, where an older one is whole. Raises UserError on what does not
    fit.
    """
    found = agreed(lambda: checkpoint.published(config.run_dir / "checkpoints"))
    if config.run.resume == "never":
        if found:
            raise UserError(f"{config.run_dir}: has checkpoints, and run.resume is never; choose another run.name, "
                            "or remove the folder")
        return None, new_state(stream)
    if config.run.resume == "auto":
        candidates = found[::-1]
    else:
        candidates = [agreed(lambda: checkpoint.find(config.run.resume))]
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
            if i == len(candidates) - 1 or config.eval.only:
                raise
            if dist.get_rank() == 0:
                aside = checkpoint.put_aside(path)  # it would count as the newest, to be kept in the place of a good one
                warn(warnings, f"{error}", f"it is {aside.name} now; going on from {candidates[i + 1]} instead")
    else:
        return None, new_state(stream)
    if not config.eval.only and not checkpoint.has_optimizer(path):
        raise UserError(f"{path}: holds weights alone, so it cannot be resumed; start another run from it, with run.init_from")
    was_frozen = state["config"].get("train", {}).get("freeze_blocks", 0)
    if was_frozen != config.train.freeze_blocks and not config.eval.only:
        raise UserError(f"train.freeze_blocks: is {config.train.freeze_blocks} and was {was_frozen} in {path}, whose optimizer "
                        "knows other weights; take the old value, or start another run from it, with run.init_from")
    if state["config"].get("eval", {}).get("sequences") != config.eval.sequences:
        state["held_out"] |= forgotten  # losses of other sequences cannot be compared
    now = state["data_history"][-1]
    stream.first_step = now["from_step"]
    different = stream.differences(now["identity"])
    if not different and stream.fingerprint(state["step"]) != state["next_samples"]:
        libraries = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
        different = {f"the order of step {state['step'] + 1}, with all settings the same (libraries then: {libraries}),":
                     (state["next_samples"], stream.fingerprint(state["step"]))}
    if different and not config.run.allow_data_change:
        raise UserError("\n".join(
            f"{path}: {key} is {value} now and was {was}: the samples would come in another order; take the old value, "
            "start another run.name, or accept it with --run.allow_data_change true"
            for key, (was, value) in different.items()))
    if different:
        change_data(path, state, stream, different, warnings)
    return path, state


def warn(warnings: list[str], *lines: str):
    """Told at once, and in log.txt as soon as there is one."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    warnings += lines


def new_state(stream: TrainStream) -> dict:
    """What state.json says of a run before its first step."""
    return dict(step=0, tokens=0, data_history=[dict(from_step=0, tokens=0, **stream.settings())], skipped_steps=[],
                held_out=dict(before=None, best=None, best_step=None, since=0), clock=dict(began=None, trained_s=0.0),
                recent_losses=[])


def change_data(path: Path, state: dict, stream: TrainStream, different: dict, warnings: list[str]):
    """run.allow_data_change: the new data is read from its beginning. Says what that costs, and notes it in the state."""
    if "tokenizer fingerprint" in different:
        raise UserError(f"{path}: its tokenizer, {state['tokenizer']['name']}, is not that of {stream.splits[0].path} (another "
                        "fingerprint): the same ids would be other text; convert the text with the same one")
    was = state["data_history"][-1]
    taken = (state["tokens"] - was["tokens"]) // was["identity"]["model.block_size"] // was["parts"]
    epoch = was["identity"].get("samples per epoch")
    cost = f"{taken % epoch:,} of {epoch:,} samples" if epoch else f"up to {taken:,} samples"
    if dist.get_rank() == 0:
        warn(warnings, *(f"{path}: {key} was {before} and is {now} now" for key, (before, now) in different.items()),
             f"the data changes after step {state['step']} and is read from its beginning: {cost} of the epoch under way "
             "were trained on, and come again if they are in the new data too. From here on each sample comes once an "
             "epoch; the checkpoints remember the change")
    stream.first_step = state["step"]
    state["held_out"] |= forgotten
    state["data_history"].append(dict(from_step=state["step"], tokens=state["tokens"], **stream.settings(),
                                      changed={key: list(values) for key, values in different.items()}))


class Weights:
    """What run.init_from names: a model's shape, its tokenizer's fingerprint, and its weights."""

    def __init__(self, path: str):
        """Raises UserError where there is nothing to be found, or it is damaged."""
        self.path = path
        if huggingface.is_hf(path):
            self.source = huggingface.Source(path)
            self.model = self.source.config
        else:
            found = agreed(lambda: checkpoint.find(path))  # that run may save another one just now
            self.source, self.path = None, found
            checkpoint.verify(found)
            state = checkpoint.read_state(found)
            self.model, self.tokenizer = checkpoint.model_of(found, state), state["tokenizer"]

    def check_tokenizer(self, tok, data: str, warnings: list[str]):
        """Raises UserError unless `tok`, that of the data, gives the ids that the weights know."""
        if self.source:
            try:
                theirs = self.source.tokenizer()
            except UserError as error:
                if dist.get_rank() == 0:
                    warn(warnings, f"{error}: whether its ids are those of {data} could not be checked")
                return
            name, fingerprint = theirs.name, theirs.fingerprint
        else:
            name, fingerprint = self.tokenizer["name"], self.tokenizer["fingerprint"]
        if fingerprint != tok.fingerprint:
            raise UserError(f"{self.path}: its tokenizer is {name}, that of {data} is {tok.name} (another fingerprint): "
                            "convert the text with the same one")

    def fill(self, model):
        """Into a model, sharded or not, whose context may be shorter than theirs."""
        if self.source:
            return huggingface.fill(model, self.source)
        name, instead = "model.transformer.wpe.weight", {}
        if self.model.position == "learned" and self.model.block_size > model.config.block_size:
            positions = model.transformer.wpe.weight
            instead[name] = torch.empty(self.model.block_size, *positions.shape[1:], device=positions.device)
        checkpoint.load(self.path, model, instead=instead)
        if instead:
            with torch.no_grad():
                positions.copy_(place_like(instead[name][:len(positions)], positions))


def take_shape(config: Config) -> Weights | None:
    """run.init_from: what the config does not state of the model comes with the weights. Sets config.model.

    Returns the weights, or None where the run goes on from a checkpoint of its own, and has them. Raises UserError
    where the config states another shape.
    """
    if not config.run.init_from:
        return None
    def newest():
        for path in reversed(checkpoint.published(config.run_dir / "checkpoints")):
            with contextlib.suppress(UserError):  # damaged: starting_point tells
                return path, checkpoint.model_of(path, checkpoint.read_state(path))

    weights = None
    if own := agreed(newest):
        path, theirs = own
    else:
        weights = Weights(config.run.init_from)
        path, theirs = config.run.init_from, weights.model
    stated = {key: getattr(config.model, key) for key in config.model.model_fields_set}
    free = ("block_size", "dropout", "mask_documents", "rope_base", "rope_scaling", "zero_init")
    for key, value in stated.items():
        wanted = theirs.model_copy(update={key: value}).filled()
        if key not in free and wanted != theirs.filled():
            raise UserError(f"model.{key}: is {value}, and that of {path} is {getattr(theirs, key)}; leave it out")
    if theirs.position == "learned" and stated.get("block_size", 0) > theirs.block_size:
        raise UserError(f"model.block_size: {config.model.block_size}, and the learned positions of {path} end at "
                        f"{theirs.block_size}")
    config.model = theirs.model_copy(update={key: stated[key] for key in free if key in stated})
    check_shape(config)
    return weights


def agreed(function):
    """What function() returns on rank 0, on all ranks: a network file system may show others another folder.

    Raises its UserError on all.
    """
    if not dist.is_initialized():
        return function()
    said = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = function()
        except UserError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0)
    if said[1]:
        raise UserError(said[1])
    return said[0]


def take_run_folder(config: Config, make: bool):
    """No other run may train in the folder from here on. make: it is made where it is missing, and config.yaml written.

    Raises UserError, on all ranks, where another run is there, or nothing can be written.
    """
    folder = config.run_dir

    def take():
        try:
            if make:
                (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            if folder.is_dir():
                watch.lock(folder)
            if make:
                aside = folder / ".config.yaml.partial"
                aside.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
                os.replace(aside, folder / "config.yaml")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another run.dir") from None

    agreed(take)


def run_state(config: Config, step: int, stream: TrainStream, tok, state: dict, numbers: Numbers, meter: Meter) -> dict:
    """state.json: what a checkpoint knows beside its tensors."""
    return dict(step=step, tokens=meter.tokens(step), config=config.model_dump(), data_history=state["data_history"],
                next_samples=stream.fingerprint(step), tokenizer=tok.to_json(), world_size=dist.get_world_size(),
                skipped_steps=numbers.skipped, held_out=state["held_out"], clock=state["clock"],
                recent_losses=[x if math.isfinite(x) else None for x in numbers.recent(step)[-numbers.RECENT:]],
                versions=versions())


def versions() -> dict[str, str]:
    """Of what numbers and orders depend on."""
    return dict(nanogpt=__version__, python=sys.version.split()[0],
                **{name: importlib.metadata.version(name) for name in ("torch", "mosaicml-streaming", "numpy")})
