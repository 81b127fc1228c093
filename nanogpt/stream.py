"""MDS shards -> StreamingDataset -> batches on the device. What a step trains on is a function of the step alone.

A dataset is one endless order of samples: epoch after epoch, each sample once in each, as streaming's shuffle makes it
from (seed, epoch). Step s takes the samples_per_step that begin at s * samples_per_step, and its ranks share them out:
neither their number, nor that of nodes, threads or micro-batches, nor any restart can change what step 1000 sees. So
nothing of the loader is saved, and resuming at step 100,000 costs what resuming at step 10 does.

A mixture deals the samples of a step to its datasets by a fixed pattern; each goes through its own endless order.

Tokens are ids; in datasets of prompt/completion pairs, those that are no targets are complements, ~id, below 0.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import xxhash

from nanogpt.cache import damage, download, is_compressed, one_line, open_dataset
from nanogpt.config import Config
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE
from nanogpt.shards import PAIRS, load_dataset_card, load_index

HASHED_AT_START = 1 << 30  # bytes of a split; the shards of a larger one are hashed as they are first read
DEAL = 1 << 16             # samples after which the pattern of a mixture begins anew: proportions are rounded to 1/DEAL


def inputs_and_targets(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens (B, T + 1), ids or complements of those that are no targets -> x (B, T) ids, y (B, T) ids or IGNORE."""
    y = tokens[:, 1:]
    return torch.maximum(tokens, ~tokens)[:, :-1], y.masked_fill(y < 0, IGNORE)


class Split:
    """Random access to the samples of one split of one dataset, wherever its shards are."""

    def __init__(self, config: Config, name: str, path: str):
        """Raises UserError where the split is missing, damaged or does not fit the config."""
        self.name, self.path = name, path
        # Compressed shards are unpacked into a cache too, wherever they are: a dataset folder stays as it is.
        self.remote = "://" in path or is_compressed(Path(path) / name / "index.json")
        root = Path(path)
        if self.remote:
            root = Path(config.data.cache_dir or config.run_dir / "cache") / hashlib.sha256(path.encode()).hexdigest()[:12]
            download(f"{path}/dataset.json", root / "dataset.json")
        self.card = load_dataset_card(root)
        if name not in self.card["splits"]:
            raise UserError(f"{path}: has no {name} split; convert again, with --val-fraction above 0")
        stored = self.card["block_size"]
        if stored % config.model.block_size:
            raise UserError(f"model.block_size: {config.model.block_size} is neither the {stored} that {path} "
                            f"holds nor a divisor of it")
        if self.card["dtype"] == PAIRS and stored != config.model.block_size:
            raise UserError(f"model.block_size: {config.model.block_size} would cut the pairs of {path}; take {stored}, or "
                            f"convert them again with --block-size {config.model.block_size}")
        self.vocab_size = self.card["tokenizer"]["vocab_size"]
        if (config.model.vocab_size or self.vocab_size) < self.vocab_size:
            raise UserError(f"model.vocab_size: {config.model.vocab_size} is below the {self.vocab_size} ids of {path}; "
                            "leave it out")
        self.block_size = config.model.block_size
        self.parts = stored // self.block_size  # sequences in a sample
        self.folder = root / name
        if self.remote:
            download(f"{path}/{name}/index.json", self.folder / "index.json")
        load_index(self.folder / "index.json", self.card, name, f"{path}/{name}/index.json")
        self.dataset = open_dataset(root, path if self.remote else None, name, config)
        self.samples = self.dataset.num_samples
        self.index_sha256 = hashlib.sha256((self.folder / "index.json").read_bytes()).hexdigest()
        self.shard_ends = np.cumsum([shard.samples for shard in self.dataset.shards])
        self.nodes = min(config.data.num_canonical_nodes, self.samples)
        self.order = lru_cache(maxsize=2)(self._order)
        self.known_whole = set()  # shards whose content has been compared with their hash
        if not self.remote:
            self._check_files()

    # ---- order ------------------------------------------------------------------------------------------------------

    def _order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch in order, each once: (samples,) int64."""
        from streaming.base.batching import generate_work
        from streaming.base.world import World
        alone = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        order = generate_work("random", self.dataset, alone, epoch, 0).flatten()
        # Streaming deals samples to canonical nodes in contiguous runs, takes one of each in turn, and repeats the
        # last sample of the shorter runs in the last row. A sample is to be seen once: drop the repetitions.
        starts = np.arange(self.nodes + 1) * self.samples // self.nodes
        rows = -(-self.samples // self.nodes)
        last_row = np.arange(self.nodes)[np.diff(starts) == rows] + (rows - 1) * self.nodes
        return np.concatenate([order[:(rows - 1) * self.nodes], order[last_row]])

    def take(self, first: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n samples of the endless order from the first-th on: (sample (n,), the canonical node that each is of (n,))."""
        epochs, places = np.divmod(np.arange(first, first + n), self.samples)
        samples = [self.order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate([*samples, np.empty(0, np.int64)]), places % self.nodes

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(self, sequences: np.ndarray) -> torch.Tensor:
        """sequences (n, 2) of (sample, part) -> tokens (n, block_size + 1), int64, for inputs_and_targets."""
        T = self.block_size
        tokens = np.empty((len(sequences), T + 1), np.int64)
        shards = np.searchsorted(self.shard_ends, sequences[:, 0], "right")
        for shard in np.unique(shards).tolist():
            self.make_sure_of(shard)
            for row in np.flatnonzero(shards == shard):
                sample, part = sequences[row].tolist()
                try:
                    tokens[row] = self.dataset.get_item(sample)["tokens"][part * T:part * T + T + 1]
                except UserError:  # evicted since, and not to be fetched again
                    raise
                except Exception as error:  # streaming raises a different one for each kind of damage
                    raise UserError(f"{self.shard_of(sample)}: sample {sample} cannot be read ({one_line(error)}); "
                                    f"tools/inspect_mds.py {self.path} --verify finds damaged shards") from error
        if max(tokens.max(), ~tokens.min()) >= self.vocab_size:
            highest = np.maximum(tokens, ~tokens).max(1)
            row = int((highest >= self.vocab_size).argmax())
            sample = int(sequences[row, 0])
            raise UserError(f"{self.shard_of(sample)}: sample {sample} holds id {highest[row]}, the vocabulary "
                            f"ends at {self.vocab_size - 1}; the shard is damaged or of another tokenizer")
        return torch.from_numpy(tokens)

    def shard_of(self, sample: int) -> str:
        shard = int(np.searchsorted(self.shard_ends, sample, "right"))
        return f"{self.path}/{self.name}/{self.dataset.shards[shard].raw_data.basename}"

    def fixed_batches(self, sequences: int, micro_batch_size: int, rank: int, world_size: int):
        """Yields (x, y) of the first `sequences` of the split for this rank: the same ones at every evaluation.

        Every rank gets the same number of batches, each (micro_batch_size, block_size): sequences that are not there
        are filled with targets that do not count.
        """
        n = min(sequences, self.samples * self.parts)
        for first in range(0, n, micro_batch_size * world_size):
            mine = np.arange(first + rank * micro_batch_size, first + (rank + 1) * micro_batch_size)
            real = mine[mine < n]
            tokens = torch.full((micro_batch_size, self.block_size + 1), ~0)  # no targets
            if len(real):
                tokens[:len(real)] = self.read(np.stack([real // self.parts, real % self.parts], 1))
            yield inputs_and_targets(tokens)

    # ---- damage -----------------------------------------------------------------------------------------------------

    def _check_files(self):
        """A local shard that is missing, cut short or changed is found now, not in the middle of the night."""
        small = sum(shard.raw_data.bytes for shard in self.dataset.shards) <= HASHED_AT_START
        for shard in range(len(self.dataset.shards)):
            self.make_sure_of(shard, hashed=small)

    def make_sure_of(self, shard: int, hashed: bool = True):
        """A shard is there and holds what was written: fetched where need be, hashed once before its first use.

        A damaged one in the cache is thrown away and fetched again. Raises UserError where that does not help.
        """
        info = self.dataset.shards[shard].raw_data
        path = self.folder / info.basename
        try:
            while self.remote and not path.exists():  # again where another rank failed to fetch it, or has evicted it
                self.dataset.prepare_shard(shard)
            if shard in self.known_whole:
                return
            if problem := damage(path, info, hashed):
                if not self.remote:
                    raise UserError(f"{path}: {problem}; copy it again, or convert the text again")
                self.dataset.replace_shard(shard)
        except OSError as error:
            raise UserError(f"{path}: cannot be read or replaced ({one_line(error)})") from error
        if hashed:
            self.known_whole.add(shard)


class TrainStream:
    """The training data in the order of the run."""

    def __init__(self, config: Config, first_step: int = 0):
        """first_step: the step that begins at the beginning of the data; not 0 where the data was changed on the way."""
        self.data, self.first_step = config.data, first_step
        self.global_batch_size, self.micro_batch_size = config.train.global_batch_size, config.train.micro_batch_size
        self.splits = [Split(config, "train", source.path) for source in config.data.sources]
        self.card, self.vocab_size, self.parts = self.splits[0].card, self.splits[0].vocab_size, self.splits[0].parts
        for split in self.splits[1:]:
            for what, field in (("block_size", lambda card: card["block_size"]),
                                ("tokenizer", lambda card: card["tokenizer"]["fingerprint"][:16])):
                if field(split.card) != field(self.card):
                    raise UserError(f"{split.path}: its {what} is {field(split.card)}, that of {self.splits[0].path} is "
                                    f"{field(self.card)}; the datasets of a mixture need the same one")
        if self.global_batch_size % self.parts:
            raise UserError(f"train.global_batch_size: {self.global_batch_size} sequences of {config.model.block_size} "
                            f"tokens do not fill whole samples of {self.card['block_size']}; take a multiple of "
                            f"{self.parts}")
        self.block_size = config.model.block_size
        self.samples_per_step = self.global_batch_size // self.parts
        weights = np.array([source.proportion for source in config.data.sources])
        self.proportions = weights / weights.sum()
        self.first_sample = np.cumsum([0] + [split.samples for split in self.splits])  # samples are numbered through
        for split, share in zip(self.splits, self.proportions):
            if split.samples < self.samples_per_step * share:
                raise UserError(f"{split.path}: its train split has {split.samples * self.parts} sequences, fewer than one "
                                f"step takes; lower train.global_batch_size from {self.global_batch_size}")
        self.deal = lru_cache(maxsize=2)(self._deal)

    def epochs(self, steps: int) -> list[float]:
        """How often each dataset is gone through in so many steps."""
        return [steps * self.samples_per_step * share / split.samples
                for split, share in zip(self.splits, self.proportions)]

    def identity(self) -> dict:
        """All that decides which sequences a step sees. A run is resumed only where this is unchanged."""
        if len(self.splits) > 1:
            several = {"data.mixture": self.data.mixture, "number of datasets": len(self.splits)}
            for i, split in enumerate(self.splits):
                several |= {f"data.train.{i} index.json sha256": split.index_sha256,
                            f"data.train.{i} samples per epoch": split.samples,
                            f"data.train.{i} proportion": float(self.proportions[i])}
        else:
            several = {"train index.json sha256": self.splits[0].index_sha256,
                       "samples per epoch": self.splits[0].samples}
        return several | {
            "tokenizer fingerprint": self.card["tokenizer"]["fingerprint"],
            "data.num_canonical_nodes": self.data.num_canonical_nodes,
            "data.shuffle": self.data.shuffle,
            "data.shuffle_algo": self.data.shuffle_algo,
            "data.shuffle_seed": self.data.shuffle_seed,
            "data.shuffle_block_size": self.data.shuffle_block_size,
            "model.block_size": self.block_size,
            "train.global_batch_size": self.global_batch_size,
        }

    def differences(self, was: dict) -> dict:
        """{key: (was, now)} of another identity and this one."""
        now = self.identity()
        return {key: (was.get(key), now.get(key)) for key in now | was if was.get(key) != now.get(key)}

    def settings(self) -> dict:
        """What a checkpoint keeps of the data: enough to know it again, and to find any step's samples later."""
        return dict(identity=self.identity(), parts=self.parts, data=self.data.model_dump())

    def _deal(self, round: int) -> tuple[np.ndarray, np.ndarray]:
        """The pattern of a mixture: (dataset of each of DEAL samples (DEAL,), how many of them before it are of it)."""
        counts = np.diff(np.rint(np.cumsum([0, *self.proportions]) * DEAL).astype(np.int64))
        dealt = np.repeat(np.arange(len(counts)), counts)
        if self.data.mixture == "random":  # RandomState: numpy promises that it will draw the same for ever
            dealt = np.random.RandomState([self.data.shuffle_seed, round]).permutation(dealt)
        else:  # each dataset's samples at equal distances, so that any stretch holds all in proportion
            place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts if n])
            dealt = dealt[np.argsort(place, kind="stable")]
        before = np.empty(DEAL, np.int64)
        for i in range(len(counts)):
            before[dealt == i] = np.arange(counts[i]) + round * counts[i]
        return dealt, before

    def samples(self, step: int) -> np.ndarray:
        """(samples_per_step,) of sample: what step `step` takes, numbered through all datasets.

        Neighbours come from the same canonical node, so that the consecutive ranks of a machine, which take
        consecutive pieces, read few shards.
        """
        first, n = (step - self.first_step) * self.samples_per_step, self.samples_per_step
        if len(self.splits) == 1:
            samples, nodes = self.splits[0].take(first, n)
            return samples[np.argsort(nodes, kind="stable")]
        rounds, places = np.divmod(np.arange(first, first + n), DEAL)
        parts = [[a[places[rounds == r]] for a in self.deal(int(r))] for r in np.unique(rounds)]
        dealt, before = (np.concatenate(p) for p in zip(*parts))
        found = []
        for i, split in enumerate(self.splits):
            its = before[dealt == i]  # consecutive numbers
            samples, nodes = split.take(int(its[0]) if len(its) else 0, len(its))
            found.append(samples[np.argsort(nodes, kind="stable")] + self.first_sample[i])
        return np.concatenate(found)

    def sequences(self, step: int) -> np.ndarray:
        """(global_batch_size, 2) of (sample, part): what optimizer step `step` (from 0) trains on, in order."""
        samples = self.samples(step)
        return np.stack([np.repeat(samples, self.parts), np.tile(np.arange(self.parts), len(samples))], 1)

    def fingerprint(self, step: int) -> str:
        """Of the samples of a step: a checkpoint keeps that of the next, and finds out when it comes out another."""
        return xxhash.xxh3_128(self.samples(step).astype("<i8").tobytes()).hexdigest()

    def find(self, sample: int) -> tuple[Split, int]:
        """(split, its own number of the sample)."""
        i = int(np.searchsorted(self.first_sample, sample, "right")) - 1
        return self.splits[i], sample - int(self.first_sample[i])

    def read(self, sequences: np.ndarray) -> torch.Tensor:
        """sequences (n, 2) of (sample, part) -> tokens (n, block_size + 1), int64, for inputs_and_targets."""
        which = np.searchsorted(self.first_sample, sequences[:, 0], "right") - 1
        tokens = torch.empty(len(sequences), self.block_size + 1, dtype=torch.int64)
        for i in np.unique(which).tolist():
            tokens[torch.from_numpy(which == i)] = self.splits[i].read(sequences[which == i] - [self.first_sample[i], 0])
        return tokens

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[np.ndarray]:
        """This rank's share of a step: arrays (micro_batch_size, 2) of (sample, part)."""
        mine = np.split(self.sequences(step), world_size)[rank]
        return np.split(mine, len(mine) // self.micro_batch_size)

    def batches(self, first_step: int, last_step: int, rank: int, world_size: int, device: torch.device):
        """Iterates over tokens (micro_batch_size, block_size + 1) from first_step on, read ahead by threads.

        inputs_and_targets makes of each, on its device, what the model takes.
        """
        from torchdata.nodes import IterableWrapper, Mapper, ParallelMapper, PinMemory, Prefetcher
        node = IterableWrapper(m for step in range(first_step, last_step)
                               for m in self.micro_batches(step, rank, world_size))
        if any(split.remote for split in self.splits):  # shards arrive while earlier ones are read
            node = Prefetcher(ParallelMapper(node, _telling(self._fetch), num_workers=4), prefetch_factor=64)
        node = Prefetcher(Mapper(node, _telling(self.read)), prefetch_factor=8)
        if device.type == "cuda":
            node = PinMemory(node)
        node.reset()
        return map(_told, node)

    def _fetch(self, sequences: np.ndarray) -> np.ndarray:
        for sample in np.unique(sequences[:, 0]).tolist():
            split, number = self.find(sample)
            if split.remote:
                split.make_sure_of(int(np.searchsorted(split.shard_ends, number, "right")))
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
