"""torch.distributed.checkpoint, plus what makes a checkpoint count: written aside, hashed, published by one rename.

    checkpoints/step-00001000/
        __0_0.distcp …  .metadata     DCP's shards and their index: `model.NAME` and `optim.NAME.STATE`, tensors alone
        state.json                    step, tokens, config, identities of data and tokenizer, versions
        manifest.json                 size and hash of every other file; written last

    checkpoints/best -> step-…        the one with the lowest validation loss (checkpoint.keep_best)

A folder without a manifest that fits is not a checkpoint. Any number of ranks and any strategy can load it.
"""

import contextlib
import io
import json
import math
import os
import pickle
import shutil
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, with the errors of all ranks
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from nanogpt.config import Model, Train
from nanogpt.errors import UserError
from nanogpt.shards import file_hash

FORMAT = 2  # 1 knew no mixtures, and left out the remainder of an epoch


def tensors(model, optimizer=None) -> dict[str, torch.Tensor]:
    """Everything that is saved, by name; the very tensors, so that loading into them is all there is to loading."""
    names = {p: name for name, p in model.named_parameters()}
    state = {f"model.{name}": p.detach() for p, name in names.items()}
    if optimizer is not None:
        if not optimizer.state:
            _fill_state(optimizer)
        state |= {f"optim.{names[p]}.{key}": value for p, s in optimizer.state.items() for key, value in s.items()}
    return state


def _fill_state(optimizer):
    """Makes the optimizer's state exist before its first step: a step of length zero, and then zeros."""
    lrs = [g["lr"] for g in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"] = lr
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


class Saver:
    """Saves checkpoints into one run folder, keeps the newest, and reports what failed instead of ending the run."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int, async_save: bool, keep_best: bool = False, warn=print,
                 saved=lambda line: None):
        """folder: RUN/checkpoints. Every rank makes one; rank 0 publishes. warn, saved: say a line."""
        self.folder, self.keep_last, self.keep_every, self.async_save = folder, keep_last, keep_every, async_save
        self.keep_best, self.warn, self.saved = keep_best, warn, saved
        self.group = dist.new_group(backend="gloo")  # of its own: the background thread talks while training does
        self.aside, self.thread = {}, ThreadPoolExecutor(1, "checkpoint")  # what it writes, in host memory
        self.writing: Future | None = None           # the future of the save under way
        self.published = threading.Event()           # rank 0: the publishing of the last save has ended
        self.failure: BaseException | None = None
        self.worked: bool | None = True              # None: `wait` has still to tell
        self.told = False
        self.seconds, self.warned_of_grace = 0.0, False  # what the last save took until it was published
        if dist.get_rank() == 0:  # what a killed run left behind
            for pattern in (".step-*.partial", ".step-*.deleted"):
                for path in folder.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)

    def save(self, model, optimizer, state: dict):
        """Saves as step-STEP. Returns when weights and state may change again; `wait` tells whether it worked."""
        self.wait()
        self.final, self.failure, self.published = step_folder(self.folder, state["step"]), None, threading.Event()
        self.told, self.worked, self.began = False, None, time.monotonic()
        text, best_step = json.dumps({"format": FORMAT} | state, indent=1), state.get("held_out", {}).get("best_step")
        everything = tensors(model, optimizer)
        if self.async_save:
            self._set_aside(everything)
            self.writing = self.thread.submit(self._to_disk, self.aside, text, best_step)
        else:
            self._to_disk(everything, text, best_step)

    @torch.no_grad()  # with it, a DTensor's local part costs nothing
    def _set_aside(self, everything: dict[str, torch.Tensor]):
        """Copies that training does not change: made by the first save, and written over by the later ones.

        dcp.async_save does the same, but makes new ones each time, in ten times the time where tensors are many and small.
        """
        if self.aside.keys() != everything.keys():
            self.aside = {name: tensor.to("cpu", copy=True) for name, tensor in everything.items()}
        else:
            torch._foreach_copy_([_local(self.aside[name]) for name in everything], [_local(t) for t in everything.values()])

    def _to_disk(self, everything: dict[str, torch.Tensor], text: str, best_step: int | None):
        """All that is done on disk, in the background or not. Whatever fails on one rank, no other waits for it for ever."""
        partial = self.final.with_name(f".{self.final.name}.partial")
        try:
            if dist.get_rank() == 0:
                try:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                    _write(partial / "state.json", text)
                except OSError as error:  # goes on beside the others, so that they end too
                    self.failure = error
            dist.barrier(self.group)
            writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
            dcp.save(everything, storage_writer=writer, process_group=self.group)
        except (Exception, CheckpointException) as raised:  # on all ranks, whichever one failed
            self.failure = self.failure or raised
        self._publish(partial, self.final, best_step)

    def _publish(self, partial: Path, final: Path, best_step: int | None):
        """Rank 0: every rank's file is on disk by now."""
        try:
            if dist.get_rank() == 0 and self.failure is None:
                write_manifest(partial)
                gone = final.with_name(f".{final.name}.deleted")
                if final.exists():  # a step that an earlier run has saved too
                    os.rename(final, gone)
                os.rename(partial, final)
                _sync(self.folder)
                shutil.rmtree(gone, ignore_errors=True)
                if self.keep_best:
                    self.point_at_best(best_step)
                self._retain(best_step)
                self.seconds = time.monotonic() - self.began
        except Exception as raised:
            self.failure = raised
        finally:
            if self.failure is not None and dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self.published.set()

    def point_at_best(self, step: int | None):
        """Rank 0: `best` becomes a link to that step; where that could not be saved, it stays with the best that was."""
        if step is not None and (step_folder(self.folder, step) / "manifest.json").exists():
            link = self.folder / ".best.partial"
            with contextlib.suppress(OSError):  # a file system without links: the folder itself is kept all the same
                link.unlink(missing_ok=True)
                link.symlink_to(step_folder(self.folder, step).name)
                os.replace(link, self.folder / "best")

    def _retain(self, best_step: int | None):
        """Keeps the newest keep_last, each keep_every-th, and the best."""
        best = {step_folder(self.folder, best_step or 0).name, (self.folder / "best").resolve().name} if self.keep_best else ()
        for path in complete_steps(self.folder)[:-self.keep_last]:
            if not (self.keep_every and step_of(path) % self.keep_every == 0) and path.name not in best:
                gone = path.with_name(f".{path.name}.deleted")
                os.rename(path, gone)
                shutil.rmtree(gone, ignore_errors=True)

    def wait(self) -> bool:
        """Waits for the save under way. Returns, on all ranks alike, whether the last one was published."""
        if self.worked is None:  # on all ranks or on none, as they save together
            if self.writing is not None:
                self.writing.result()
                self.writing = None
            failed = [self.failure and _reason(self.failure)]
            dist.broadcast_object_list(failed, src=0, group=self.group)
            if dist.get_rank() == 0:
                self.tell()
            self.failure, self.worked = None, failed[0] is None
        return self.worked

    def tell(self):
        """Rank 0: says, once, that the save in the background has ended, and warns if it has failed."""
        if self.published.is_set() and not self.told:
            self.told = True
            if self.failure is not None:
                self.warn(f"warning: checkpoint not saved ({_reason(self.failure)}); the older ones are kept")
            else:
                self.saved(f"saved       {self.final} in {self.seconds:.1f} s")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_alone(folder: Path, everything: dict[str, torch.Tensor], state: dict):
    """Writes a checkpoint without a process group, into a new folder that the caller publishes. Raises UserError."""
    try:
        folder.mkdir(parents=True)
        _write(folder / "state.json", json.dumps({"format": FORMAT} | state, indent=1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # DCP remarks that it saves in a single process
            dcp.save(everything, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), no_dist=True)
        write_manifest(folder)
    except (OSError, CheckpointException) as error:
        raise UserError(f"{folder}: cannot be written ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """The first rank's error, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said if said.isprintable() else ascii(said)}"


def write_manifest(folder: Path):
    """Size and hash of every file of a checkpoint."""
    files = {p.name: {"bytes": p.stat().st_size, "xxh3_128": file_hash(p, xxhash.xxh3_128())}
             for p in sorted(folder.iterdir()) if p.name != "manifest.json"}
    _write(folder / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1))


# ---- finding --------------------------------------------------------------------------------------------------------

def step_folder(folder: Path, step: int) -> Path:
    """RUN/checkpoints -> that of a step."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Its step: from the folder's name, or where somebody gave it another name, from state.json."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else read_state(path)["step"]


def published(folder: Path) -> list[Path]:
    """Checkpoints of RUN/checkpoints, oldest first; those too which have lost their manifest since."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdecimal()), key=step_of)


def complete_steps(folder: Path) -> list[Path]:
    """Published checkpoints with a manifest, oldest first."""
    return [p for p in published(folder) if (p / "manifest.json").exists()]


def put_aside(path: Path) -> Path:
    """Gives a damaged checkpoint another name, under which it is neither taken nor kept in the place of a good one."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    return aside


def find(path: str | Path) -> Path:
    """A checkpoint folder from one, or from a run folder: then its newest complete one. Raises UserError."""
    path = Path(path)
    try:
        if (path / "manifest.json").exists():
            return path
        steps = complete_steps(path / "checkpoints")
    except OSError as error:  # a folder of others, a name that is too long
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not steps:
        raise UserError(f"{path}: no complete checkpoint there; give a run folder or one of its checkpoints/step-…")
    return steps[-1]


def verify(path: Path):
    """Raises UserError unless every file of the manifest is there, whole and unchanged. Ranks share the hashing."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problem = None
    try:
        files = read_json(path / "manifest.json")["files"]
        if unlisted := {"state.json", ".metadata", *(p.name for p in path.glob("*.distcp"))} - files.keys():
            raise UserError(f"{path}/manifest.json: does not list {min(unlisted)}")
        for name, expected in sorted(files.items())[rank::world]:
            file = path / name
            if Path(name).name != name or name in ("", ".."):
                raise UserError(f"{path}/manifest.json: {name!r:.60} is not a file of this folder")
            if not file.exists():
                raise UserError(f"{file}: is missing")
            if file.stat().st_size != expected["bytes"]:
                raise UserError(f"{file}: has {file.stat().st_size} of {expected['bytes']!r:.20} bytes")
            if file_hash(file, xxhash.xxh3_128()) != expected["xxh3_128"]:
                raise UserError(f"{file}: its content has changed since it was written")
    except UserError as error:
        problem = str(error)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"{path}/manifest.json: damaged ({_reason(error)})"
    problems = [problem]
    if world > 1:
        problems = [None] * world
        dist.all_gather_object(problems, problem)
    problem = next((p for p in problems if p), None)
    if problem:
        raise UserError(f"{problem}; choose another checkpoint, or remove {path}")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


Step = Annotated[int, Field(ge=0, lt=1 << 40)]
Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
Text = Annotated[str, Field(max_length=2000, pattern=r"^[^\p{Cc}\p{Zl}\p{Zp}]*$")]  # what may be shown in a line


class Identity(_Strict):
    """What train.py computes with, of all that decides which sequences a step sees."""
    __pydantic_extra__: dict[Text, Text | int | float | bool]
    model_config = ConfigDict(extra="allow")
    global_batch_size: Positive = Field(alias="train.global_batch_size")
    block_size: Positive = Field(alias="model.block_size")
    samples_per_epoch: Positive | None = Field(None, alias="samples per epoch")


class Era(_Strict):
    """Steps on the same data, from from_step on."""
    from_step: Step
    tokens: int
    identity: Identity
    parts: Positive
    data: dict[str, Any]


class TokenizerName(_Strict):
    name: Text
    fingerprint: Text


class HeldOut(_Strict):
    """The validation loss: before the first step of a finetuning, the lowest since, and evaluations since that one."""
    before: float | None
    best: float | None
    best_step: Step | None
    since: Annotated[int, Field(ge=0)]


class Clock(_Strict):
    """When the run was first started, and the seconds that its steps have taken since: see meter.py."""
    began: float | None
    trained_s: Annotated[float, Field(ge=0)]


class State(_Strict):
    """state.json, as train.py writes it."""
    step: Step
    tokens: int
    config: dict[Text, dict[Text, Text | int | float | bool | list | dict | None]]
    data_history: list[Era] = Field(min_length=1)
    next_samples: Text
    tokenizer: TokenizerName
    world_size: Positive
    skipped_steps: list[Step]
    held_out: HeldOut = HeldOut(before=None, best=None, best_step=None, since=0)
    clock: Clock = Clock(began=None, trained_s=0.0)
    recent_losses: list[Annotated[float, Field(ge=-3e38, le=3e38)] | None]
    versions: dict[Text, Text]

    @model_validator(mode="after")
    def _agrees(self):
        era = self.data_history[-1]
        batches = Train(global_batch_size=era.identity.global_batch_size,
                        batch_schedule=self.config.get("train", {}).get("batch_schedule"))
        sequences = batches.sequences(self.step) - batches.sequences(era.from_step)
        if era.from_step > self.step or len(self.recent_losses) > self.step or \
                self.tokens != era.tokens + sequences * era.identity.block_size:
            raise ValueError("its steps, tokens and losses contradict each other")
        return self


def read_state(path: Path) -> dict:
    """state.json of a checkpoint. Raises UserError where it is damaged or of another format."""
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state)
        raise UserError(f"{path}/state.json: its format is {found!r:.60}, this version reads {FORMAT}; go on with the "
                        "version that wrote it, or start another run.name")
    try:
        checked = State.model_validate(state)
        state["recent_losses"] = checked.recent_losses  # floats, where JSON has whole numbers too
        state["held_out"], state["clock"] = checked.held_out.model_dump(), checked.clock.model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{key}: " for key in map(str, first["loc"]) if key.isprintable())
        raise UserError(f"{path}/state.json: {where}{first['msg']}: damaged") from None
    return state


def model_of(path: Path, state: dict) -> Model:
    """The model settings of a checkpoint. Raises UserError where they are damaged, or would fill the memory."""
    try:
        config = Model.model_validate(state["config"]["model"])
        n_stored = len(SafeReader(path).read_metadata().state_dict_metadata)
        if config.vocab_size is None or any(config.contradictions()) or config.n_layer > n_stored:
            raise ValueError("its model is none of ours")
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}/state.json: damaged ({' '.join(str(error).split())[:200]})") from None
    return config


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


# ---- loading --------------------------------------------------------------------------------------------------------

def load(path: Path, model, optimizer=None, instead: dict[str, torch.Tensor] | None = None):
    """Fills model, and optimizer where one is given, from a verified checkpoint of any number of ranks and strategy.

    instead: name -> a tensor to fill in the place of the model's.
    """
    wanted = tensors(model, optimizer) | (instead or {})
    reader = fitting_reader(path, wanted, ("model.", "optim.") if optimizer else ("model.",))
    try:
        # Without a process group (sampling) DCP loads alone.
        dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise UserError(f"{path}: cannot be loaded ({_reason(error).split('. ')[0]})") from error


def has_optimizer(path: Path) -> bool:
    """Whether it can be resumed: one that was made of somebody else's weights cannot."""
    return any(name.startswith("optim.") for name in SafeReader(path).read_metadata().state_dict_metadata)


def fitting_reader(path: Path, wanted: dict[str, torch.Tensor], prefixes=("model.",)) -> "SafeReader":
    """For a checkpoint that has just the wanted tensors, of those whose names begin so. Raises UserError otherwise."""
    reader = SafeReader(path)
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata  # of tensors alone: SafeReader refuses the rest
    different = {k for k in stored if k.startswith(prefixes)} ^ set(wanted)
    different |= {k for k in wanted.keys() & stored.keys() if stored[k].size != wanted[k].shape}
    if different:
        name = sorted(different)[0]
        sizes = [str(tuple(t)) if t is not None else "absent" for t in
                 (stored[name].size if name in stored else None, wanted[name].shape if name in wanted else None)]
        hint = "; is optim.name another one than it was?" if name.startswith("optim.") else ""
        raise UserError(f"{path}: does not fit this model: {name} is {sizes[0]} there and {sizes[1]} here{hint}")
    return reader


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, but for its index: a pickle, here read through a list of what may be in it."""
    metadata: Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        if self.metadata is not None:
            return self.metadata
        file = Path(self.path) / ".metadata"
        try:
            metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
            # No asserts: `python -O` would leave them out. DCP would follow an index that points out of the folder, and
            # leave what it says nothing of as it was.
            if not (isinstance(metadata, Metadata) and all(map(_is_whole, metadata.state_dict_metadata.items()))
                    and all(map(_is_within, metadata.storage_data.values()))):
                raise ValueError("entries that are no tensors, or files of another folder")
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
        except UserError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(f"{file}: not an index of tensors ({_reason(error)})") from None
        self.metadata = metadata
        return metadata


def _is_whole(item) -> bool:
    """name -> a tensor, and chunks that lie within it and have as many elements."""
    name, tensor = item
    return (type(name) is str and name.isprintable()
            and isinstance(tensor, TensorStorageMetadata) and isinstance(tensor.size, torch.Size)
            and all(len(c.offsets) == len(c.sizes) == len(tensor.size) for c in tensor.chunks)
            and all(0 <= at <= at + n <= end for c in tensor.chunks for at, n, end in zip(c.offsets, c.sizes, tensor.size))
            and sum(math.prod(c.sizes) for c in tensor.chunks) == math.prod(tensor.size))


def _is_within(place) -> bool:
    """A file of this folder, as it is."""
    name = place.relative_path
    return type(name) is str and Path(name).name == name and name not in ("", "..") and not place.transform_descriptors


class _MetadataUnpickler(pickle.Unpickler):
    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
            "StorageMeta", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "device", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "Path"},
    }

    def find_class(self, module, name):
        if name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11.0 to 3.11.3 pickle a member of an enum
            return self.member
        raise UserError(f".metadata: names {module + '.' + name!r:.100}, which no checkpoint of ours holds; it is refused "
                        "unread")

    @staticmethod
    def member(kind, name):
        """Of DCP's own enum alone: getattr itself would reach anything."""
        if kind is not _MEM_FORMAT_ENCODING or name not in kind.__members__:
            raise UserError(".metadata: names 'builtins.getattr', of what no checkpoint of ours holds; it is refused unread")
        return kind[name]


def _write(path: Path, text: str):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path):
    """Makes a rename in it last."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
