"""MDS shards -> StreamingDataset -> batches on the device. What a step trains on is a function of the step alone.

An epoch is one flat order of the samples, which streaming's shuffle makes from (seed, epoch). A step takes the next
`samples_per_step` of it, and its ranks share them out: neither their number, nor that of nodes, threads or
micro-batches, nor any restart can change what step 1000 sees. So nothing of the loader is saved, and resuming at step
100,000 costs what resuming at step 10 does. The remainder of an epoch that fills no step is left out, another one
each epoch.
"""

import contextlib
import hashlib
import json
import os
import secrets
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from nanogpt.config import Config
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE
from nanogpt.shards import import_streaming, load_dataset_card


HASHED_AT_START = 1 << 30  # bytes of a split


class Split:
    """Random access to the samples of one split, wherever its shards are."""

    def __init__(self, config: Config, name: str):
        """Raises UserError where the split is missing, damaged or does not fit the config."""
        self.name, self.path = name, config.data.path
        # Compressed shards are unpacked into a cache too, wherever they are: a dataset folder stays as it is.
        remote = "://" in self.path or _is_compressed(Path(self.path) / name / "index.json")
        folder = Path(config.data.cache_dir or config.run_dir / "cache") if remote else Path(self.path)
        if remote:
            _download(f"{self.path}/dataset.json", folder / "dataset.json")
        self.card = load_dataset_card(folder)
        if name not in self.card["splits"]:
            raise UserError(f"{self.path}: has no {name} split; convert again, with --val-fraction above 0")
        stored = self.card["block_size"]
        if stored % config.model.block_size:
            raise UserError(f"model.block_size: {config.model.block_size} is neither the {stored} that {self.path} "
                            f"holds nor a divisor of it")
        vocab_size = self.card["tokenizer"]["vocab_size"]
        if config.model.vocab_size not in (None, vocab_size):
            raise UserError(f"model.vocab_size: {config.model.vocab_size} is not that of {self.path}, {vocab_size}; "
                            "leave it out")
        self.vocab_size = vocab_size
        self.block_size = config.model.block_size
        self.parts = stored // self.block_size  # sequences in a sample
        self.dataset = _open(folder, self.path if remote else None, name, config)
        self.local = None if remote else folder / name
        if self.local:
            self._check_files()
        column = f"ndarray:{self.card['dtype']}:{stored + 1}"
        for shard in self.dataset.shards:
            if shard.column_encodings != [column]:
                raise UserError(f"{self.path}/{name}/index.json: its samples are {', '.join(shard.column_encodings)}, "
                                f"those of dataset.json {column}; convert the text again")
        self.samples = self.dataset.num_samples
        if self.samples != self.card["splits"][name]["samples"]:
            raise UserError(f"{self.path}/{name}/index.json: holds {self.samples} samples, dataset.json says "
                            f"{self.card['splits'][name]['samples']}; convert the text again")
        self.index_sha256 = hashlib.sha256((folder / name / "index.json").read_bytes()).hexdigest()

    def _check_files(self):
        """A local shard that is missing, cut short or changed is found now, not in the middle of the night.

        Content is compared where that takes a second (tools/inspect_mds.py DIR --verify does it for any size).
        """
        small = sum(shard.raw_data.bytes for shard in self.dataset.shards) <= HASHED_AT_START
        for shard in self.dataset.shards:
            path, expected = self.local / shard.raw_data.basename, shard.raw_data.hashes.get("xxh64")
            size = path.stat().st_size if path.exists() else None
            found = None
            if size != shard.raw_data.bytes:
                found = "is missing" if size is None else f"has {size} of {shard.raw_data.bytes} bytes"
            elif small and expected and xxhash.xxh64(path.read_bytes()).hexdigest() != expected:
                found = "has changed since it was written"
            if found:
                raise UserError(f"{path}: {found}; copy it again, or convert the text again")

    def read(self, sequences: np.ndarray) -> torch.Tensor:
        """sequences (n, 2) of (sample, part) -> tokens (n, block_size + 1), int64."""
        T = self.block_size
        rows = []
        for sample, part in sequences.tolist():
            try:
                rows.append(self.dataset.get_item(sample)["tokens"][part * T:part * T + T + 1])
            except Exception as error:  # streaming raises a different one for each kind of damage
                raise UserError(f"{self._shard_of(sample)}: sample {sample} cannot be read ({_one_line(error)}); "
                                f"tools/inspect_mds.py {self.path} --verify finds damaged shards") from error
        tokens = np.stack(rows).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            row = int((tokens.max(1) >= self.vocab_size).argmax())
            sample = int(sequences[row, 0])
            raise UserError(f"{self._shard_of(sample)}: sample {sample} holds id {tokens[row].max()}, the vocabulary "
                            f"ends at {self.vocab_size - 1}; the shard is damaged or of another tokenizer")
        return torch.from_numpy(tokens)

    def _shard_of(self, sample: int) -> str:
        return f"{self.path}/{self.name}/{self.dataset.shards[self.dataset.spanner[sample][0]].raw_data.basename}"

    def fixed_batches(self, sequences: int, micro_batch_size: int, rank: int, world_size: int):
        """Yields (x, y) of the first `sequences` of the split for this rank: the same ones at every evaluation.

        Every rank gets the same number of batches, each (micro_batch_size, block_size): sequences that are not there
        are filled with targets that do not count.
        """
        n = min(sequences, self.samples * self.parts)
        for first in range(0, n, micro_batch_size * world_size):
            mine = np.arange(first + rank * micro_batch_size, first + (rank + 1) * micro_batch_size)
            real = mine[mine < n]
            tokens = torch.zeros(micro_batch_size, self.block_size + 1, dtype=torch.int64)
            targets = torch.full((micro_batch_size, self.block_size), IGNORE)
            if len(real):
                tokens[:len(real)] = self.read(np.stack([real // self.parts, real % self.parts], 1))
                targets[:len(real)] = tokens[:len(real), 1:]
            yield tokens[:, :-1], targets


class TrainStream:
    """The training split in the order of the run."""

    def __init__(self, config: Config):
        self.split = Split(config, "train")
        self.data = config.data
        self.global_batch_size, self.micro_batch_size = config.train.global_batch_size, config.train.micro_batch_size
        split = self.split
        if self.global_batch_size % split.parts:
            raise UserError(f"train.global_batch_size: {self.global_batch_size} sequences of {split.block_size} tokens "
                            f"do not fill whole samples of {split.card['block_size']}; take a multiple of {split.parts}")
        self.samples_per_step = self.global_batch_size // split.parts
        self.steps_per_epoch = split.samples // self.samples_per_step
        if not self.steps_per_epoch:
            raise UserError(f"{split.path}: its train split has {split.samples * split.parts} sequences, fewer than one "
                            f"step takes; lower train.global_batch_size from {self.global_batch_size}")
        self.nodes = min(config.data.num_canonical_nodes, split.samples)
        self.order = lru_cache(maxsize=2)(self._order)

    def identity(self) -> dict:
        """All that decides which sequences a step sees. A run is resumed only where this is unchanged."""
        return {
            "train index.json sha256": self.split.index_sha256,
            "tokenizer fingerprint": self.split.card["tokenizer"]["fingerprint"],
            "samples per epoch": self.split.samples,
            "data.num_canonical_nodes": self.data.num_canonical_nodes,
            "data.shuffle": self.data.shuffle,
            "data.shuffle_algo": self.data.shuffle_algo,
            "data.shuffle_seed": self.data.shuffle_seed,
            "data.shuffle_block_size": self.data.shuffle_block_size,
            "model.block_size": self.split.block_size,
            "train.global_batch_size": self.global_batch_size,
        }

    def _order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch in order, each once: (samples,) int64."""
        from streaming.base.batching import generate_work
        from streaming.base.world import World
        alone = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        order = generate_work("random", self.split.dataset, alone, epoch, 0).flatten()
        # Streaming deals samples to canonical nodes in contiguous runs, takes one of each in turn, and repeats the
        # last sample of the shorter runs in the last row. A sample is to be seen once: drop the repetitions.
        starts = np.arange(self.nodes + 1) * self.split.samples // self.nodes
        rows = -(-self.split.samples // self.nodes)
        last_row = np.arange(self.nodes)[np.diff(starts) == rows] + (rows - 1) * self.nodes
        return np.concatenate([order[:(rows - 1) * self.nodes], order[last_row]])

    def sequences(self, step: int) -> np.ndarray:
        """(global_batch_size, 2) of (sample, part): what optimizer step `step` (from 0) trains on.

        Neighbours come from the same canonical node, so that the consecutive ranks of a machine, which take
        consecutive pieces, read few shards.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        position = np.arange(self.samples_per_step) + step_in_epoch * self.samples_per_step
        position = position[np.argsort(position % self.nodes, kind="stable")]
        samples = self.order(epoch)[position]
        parts = self.split.parts
        return np.stack([np.repeat(samples, parts), np.tile(np.arange(parts), len(samples))], 1)

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[np.ndarray]:
        """This rank's share of a step: arrays (micro_batch_size, 2) of (sample, part)."""
        mine = np.split(self.sequences(step), world_size)[rank]
        return np.split(mine, len(mine) // self.micro_batch_size)

    def batches(self, first_step: int, last_step: int, rank: int, world_size: int, device: torch.device):
        """Iterates over tokens (micro_batch_size, block_size + 1) from first_step on, read ahead by threads."""
        from torchdata.nodes import IterableWrapper, Mapper, ParallelMapper, PinMemory, Prefetcher
        node = IterableWrapper(m for step in range(first_step, last_step)
                               for m in self.micro_batches(step, rank, world_size))
        if self.split.local is None:  # shards arrive while earlier ones are read
            node = Prefetcher(ParallelMapper(node, _telling(self._download_shards), num_workers=4), prefetch_factor=64)
        node = Prefetcher(Mapper(node, _telling(self.split.read)), prefetch_factor=8)
        if device.type == "cuda":
            node = PinMemory(node)
        node.reset()
        return map(_told, node)

    def _download_shards(self, sequences: np.ndarray) -> np.ndarray:
        dataset = self.split.dataset
        for shard in {int(dataset.spanner[sample][0]) for sample in sequences[:, 0].tolist()}:
            try:
                dataset.prepare_shard(shard)
            except Exception as error:
                raise UserError(f"{self.split.path}/train/{dataset.shards[shard].raw_data.basename}: "
                                f"cannot be fetched ({_one_line(error)})") from error
        return sequences


def _telling(function):
    """function, but a UserError is handed on as a result: torchdata's threads would make a page of traceback of it."""
    def call(argument):
        if isinstance(argument, UserError):
            return argument
        try:
            return function(argument)
        except UserError as error:
            return error
    return call


def _told(result):
    if isinstance(result, UserError):
        raise result
    return result


# ---- opening a StreamingDataset -------------------------------------------------------------------------------------

def _open(folder: Path, remote: str | None, split: str, config: Config):
    """StreamingDataset over folder/split, or over remote/split with folder as its cache."""
    index = folder / split / "index.json"
    if remote is None and not index.exists():
        raise UserError(f"{index}: is missing; copy it again, or convert the text again")
    _check_shared_memory()
    streaming = import_streaming()
    import streaming.base.dataset as internals
    try:
        with mock.patch.object(internals, "get_shm_prefix", _shared_memory_prefix):
            return streaming.StreamingDataset(
                remote=remote, local=str(folder), split=split, validate_hash="xxh64" if remote else None,
                cache_limit=config.data.cache_limit if remote else None, batch_size=1,
                num_canonical_nodes=config.data.num_canonical_nodes, shuffle=config.data.shuffle,
                shuffle_algo=config.data.shuffle_algo, shuffle_seed=config.data.shuffle_seed,
                shuffle_block_size=config.data.shuffle_block_size)
    except Exception as error:
        raise UserError(f"{index if remote is None else remote}: cannot be opened ({_one_line(error)})") from error


def _shared_memory_prefix(*_):
    """Names for what the ranks of a machine share about a dataset: a number that no other run has drawn.

    Streaming's own search takes the first that looks free. Runs that start in the same moment find the same one, and
    what a killed run left behind, or another that just ended, makes it stumble again and again (FileExistsError).
    """
    number = [secrets.randbelow(10**9)]
    if dist.is_initialized():
        dist.broadcast_object_list(number, src=0)
    return number[0], None


def _check_shared_memory(needed: int = 1 << 20):
    """StreamingDataset keeps the state of shards in /dev/shm; writing to a full one kills a process without a word."""
    if os.path.isdir("/dev/shm"):
        room = os.statvfs("/dev/shm")
        free = room.f_bavail * room.f_frsize
        if free < needed:
            raise UserError(f"/dev/shm: {free >> 10} KiB are free, {needed >> 10} are needed; enlarge it "
                            "(mount -o remount,size=1g /dev/shm, docker run --shm-size 1g) or remove what dead runs left")


def _is_compressed(index: Path) -> bool:
    try:
        return any(shard["zip_data"] for shard in json.loads(index.read_text())["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # what is wrong with it is told when it is opened


def _download(remote: str, local: Path):
    import_streaming()
    from streaming.base.storage import CloudDownloader
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            CloudDownloader.direct_download(remote, str(local))
    except Exception as error:
        with contextlib.suppress(OSError):
            os.removedirs(local.parent)  # what is empty
        raise UserError(f"{remote}: cannot be fetched ({_one_line(error)})") from error
    finally:
        if dist.is_initialized():
            dist.barrier()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
