"""torch.distributed.checkpoint, plus what makes a checkpoint count: written aside, hashed, published by one rename.

    checkpoints/step-00001000/
        __0_0.distcp …  .metadata     DCP's shards and their index: `model.NAME` and `optim.NAME.STATE`, tensors alone
        state.json                    step, tokens, config, identities of data and tokenizer, versions
        manifest.json                 size and hash of every other file; written last

A folder without a manifest that fits is not a checkpoint. Any number of ranks and any strategy can load it.
"""

import io
import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, with the errors of all ranks
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from nanogpt.errors import UserError

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

    def __init__(self, folder: Path, keep_last: int, keep_every: int, async_save: bool, warn=print):
        """folder: RUN/checkpoints. Every rank makes one; rank 0 publishes."""
        self.folder, self.keep_last, self.keep_every, self.async_save = folder, keep_last, keep_every, async_save
        self.warn = warn
        self.group = dist.new_group(backend="gloo")  # of its own: the background thread talks while training does
        self.writing = None                          # DCP's future of the save under way
        self.published = threading.Event()           # rank 0: the publishing of the last save has ended
        self.failure, self.told = None, False
        self.seconds, self.warned_of_grace = 0.0, False  # what the last save took until it was published

    def save(self, model, optimizer, state: dict):
        """Saves as step-STEP. Returns when weights and state may change again; `wait` tells whether it worked."""
        self.wait()
        final = self.folder / f"step-{state['step']:08d}"
        partial = self.folder / f".{final.name}.partial"
        self.failure, self.published, self.told, self.began = None, threading.Event(), False, time.monotonic()
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                _write(partial / "state.json", json.dumps({"format": FORMAT} | state, indent=1))
            except OSError as error:
                self.failure = error
        dist.barrier(self.group)
        writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
        everything = tensors(model, optimizer)
        if self.async_save:
            self.writing = dcp.async_save(everything, storage_writer=writer, process_group=self.group)
            self.writing.add_done_callback(lambda done: self._publish(done.exception(), partial, final))
        else:
            error = None
            try:
                dcp.save(everything, storage_writer=writer, process_group=self.group)
            except (Exception, CheckpointException) as raised:  # on all ranks, whichever one failed
                error = raised
            self._publish(error, partial, final)

    def _publish(self, error, partial: Path, final: Path):
        """Rank 0, in the background: every rank's file is on disk by now."""
        try:
            self.failure = self.failure or error
            if dist.get_rank() == 0 and self.failure is None:
                files = {p.name: {"bytes": p.stat().st_size, "xxh3_128": _hash(p)} for p in sorted(partial.iterdir())}
                _write(partial / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1))
                if final.exists():  # a step saved before, after which the run was resumed from an older one
                    shutil.rmtree(final)
                os.rename(partial, final)
                _sync(self.folder)
                self._retain()
                self.seconds = time.monotonic() - self.began
        except Exception as raised:
            self.failure = raised
        finally:
            if self.failure is not None and dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self.published.set()

    def _retain(self):
        """Keeps the newest keep_last and each keep_every-th."""
        for path in complete_steps(self.folder)[:-self.keep_last]:
            if not (self.keep_every and step_of(path) % self.keep_every == 0):
                gone = path.with_name(f".{path.name}.deleted")
                os.rename(path, gone)
                shutil.rmtree(gone, ignore_errors=True)

    def wait(self) -> bool:
        """Waits for the save under way. Returns, on all ranks alike, whether the last one was published."""
        if self.writing is not None:
            try:
                self.writing.result()
            except (Exception, CheckpointException):
                pass  # _publish has it
            self.published.wait()
            self.writing = None
        failed = [self.failure and _reason(self.failure)]
        dist.broadcast_object_list(failed, src=0, group=self.group)
        if dist.get_rank() == 0:
            self.tell()
        self.failure = None
        return failed[0] is None


    def tell(self):
        """Rank 0: warns, once, if the save in the background has failed."""
        if self.published.is_set() and self.failure is not None and not self.told:
            self.told = True
            self.warn(f"warning: checkpoint not saved ({_reason(self.failure)}); the older ones are kept")


def _reason(error: BaseException) -> str:
    """The first rank's error, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---- finding --------------------------------------------------------------------------------------------------------

def step_of(path: Path) -> int:
    """Its step: from the folder's name, or where somebody gave it another name, from state.json."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else read_state(path)["step"]


def published(folder: Path) -> list[Path]:
    """Checkpoints of RUN/checkpoints, oldest first; those too which have lost their manifest since."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), key=step_of)


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
    if (path / "manifest.json").exists():
        return path
    steps = complete_steps(path / "checkpoints")
    if not steps:
        raise UserError(f"{path}: no complete checkpoint there; give a run folder or one of its checkpoints/step-…")
    return steps[-1]


def verify(path: Path):
    """Raises UserError unless every file of the manifest is there, whole and unchanged. Ranks share the hashing."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problem = None
    try:
        files = read_json(path / "manifest.json")["files"]
        for name, expected in sorted(files.items())[rank::world]:
            file = path / name
            if Path(name).name != name:
                raise UserError(f"{path}/manifest.json: {name!r} is not a file of this folder")
            if not file.exists():
                raise UserError(f"{file}: is missing")
            if file.stat().st_size != expected["bytes"]:
                raise UserError(f"{file}: has {file.stat().st_size} of {expected['bytes']} bytes")
            if _hash(file) != expected["xxh3_128"]:
                raise UserError(f"{file}: its content has changed since it was written")
    except UserError as error:
        problem = str(error)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        problem = f"{path}/manifest.json: damaged ({type(error).__name__}: {error})"
    problems = [problem]
    if world > 1:
        problems = [None] * world
        dist.all_gather_object(problems, problem)
    problem = next((p for p in problems if p), None)
    if problem:
        raise UserError(f"{problem}; choose another checkpoint, or remove {path}")


STATE = dict(step=int, tokens=int, config=dict, data_history=list, next_samples=str, tokenizer=dict, world_size=int,
             skipped_steps=list, recent_losses=list, versions=dict)


def read_state(path: Path) -> dict:
    """state.json of a checkpoint. Raises UserError where it is damaged or of another format."""
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}/state.json: its format is {found}, this version reads {FORMAT}; go on with the version "
                        "that wrote it, or start another run.name")
    for key, kind in STATE.items():
        if type(state.get(key)) is not kind:
            raise UserError(f"{path}/state.json: {key} is {state.get(key)!r:.60}, no {kind.__name__}: damaged")
    return state


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


# ---- loading --------------------------------------------------------------------------------------------------------

def load(path: Path, model, optimizer=None):
    """Fills model, and optimizer where one is given, from a verified checkpoint of any number of ranks and strategy."""
    wanted = tensors(model, optimizer)
    reader = SafeReader(path)
    stored = reader.read_metadata().state_dict_metadata
    prefixes = ("model.", "optim.") if optimizer else ("model.",)
    different = {k for k in stored if k.startswith(prefixes)} ^ set(wanted)
    different |= {k for k in wanted.keys() & stored.keys() if stored[k].size != wanted[k].shape}
    if different:
        name = sorted(different)[0]
        sizes = [str(tuple(t)) if t is not None else "absent" for t in
                 (stored[name].size if name in stored else None, wanted[name].shape if name in wanted else None)]
        raise UserError(f"{path}: does not fit this model: {name} is {sizes[0]} there and {sizes[1]} here")
    # Without a process group (sampling) DCP loads alone.
    dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, but for its index: a pickle, here read through a list of what may be in it."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
            entries = metadata.state_dict_metadata
            # No asserts: `python -O` would leave them out. DCP would follow an index that points out of the folder.
            if not (isinstance(metadata, Metadata) and all(isinstance(e, TensorStorageMetadata) for e in entries.values())
                    and all(Path(i.relative_path).name == i.relative_path for i in metadata.storage_data.values())):
                raise ValueError("entries that are no tensors, or files of another folder")
        except UserError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(f"{file}: not an index of tensors ({type(error).__name__}: {error})") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


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
        raise UserError(f".metadata: names {module}.{name}, which no checkpoint of ours holds; it is refused unread")


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


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
