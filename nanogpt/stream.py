"""MDS shards -> StreamingDataset -> batches on the device. What a step trains on is a function of the step alone.

A dataset is one endless order of samples: epoch after epoch, each sample once in each, as streaming's shuffle makes it
from (seed, epoch). Step s begins at the sum of the batches before it, s * samples_per_step unless there is a
train.batch_schedule, and its ranks share it out: neither their number, nor that of nodes, threads or micro-batches, nor
any restart can change what step 1000 sees. So nothing of the loader is saved, and resuming at step 100,000 costs what
resuming at step 10 does.

A mixture deals the samples of a step to its datasets by a fixed pattern; each goes through its own endless order.

Tokens are ids; in datasets of prompt/completion pairs, those that are no targets are complements, ~id, below 0.
"""

import hashlib
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from nanogpt import foreign
from nanogpt.cache import NotThere, damage, download, is_compressed, open_dataset
from nanogpt.config import Config
from nanogpt.errors import UserError, one_line
from nanogpt.loss import IGNORE
from nanogpt.shards import PAIRS, load_dataset_card, load_index
from nanogpt.tokenizer import from_name

HASHED_AT_START = 1 << 30  # bytes of a split; the shards of a larger one are hashed as they are first read
DEAL = 1 << 16             # samples after which the pattern of a mixture begins anew: proportions are rounded to 1/DEAL


class NoSplit(UserError):
    """The dataset is there, but has no such split."""


def inputs_and_targets(tokens: torch.Tensor, block: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens (B, T + 1), ids or complements of those that are no targets -> x (B, T) ids, y (B, T) ids or IGNORE.

    With a block that divides T, both are cut into (B * T / block, block).
    """
    x, y = torch.maximum(tokens, ~tokens)[:, :-1], tokens[:, 1:]
    y = y.masked_fill(y < 0, IGNORE)
    return (x, y) if block == -1 else (x.reshape(-1, block), y.reshape(-1, block))


@lru_cache(maxsize=2)
def named_tokenizer(name: str):
    """data.tokenizer. Raises UserError where there is none of that name."""
    if name == "char":
        raise UserError("data.tokenizer: char would need the text that it was made of; name another one")
    try:
        return from_name(name)
    except UserError as error:
        raise UserError(f"data.tokenizer: {error}") from None


class Split:
    """Random access to the samples of one split of one dataset, wherever its shards are."""
    label, share = "", 1.0  # in a mixture: what its losses are called, and its share of the samples

    def __init__(self, config: Config, name: str, path: str):
        """name: its folder. Raises NoSplit where there is none, UserError where it is damaged or does not fit the config."""
        self.name, self.path = name, path
        tok = named_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        # Compressed shards are unpacked into a cache too, wherever they are: a dataset folder stays as it is.
        self.remote = "://" in path or is_compressed(Path(path) / name / "index.json")
        root = Path(path)
        if self.remote:
            root = Path(config.data.cache_dir or config.run_dir / "cache") / hashlib.sha256(path.encode()).hexdigest()[:12]
        self.folder = root / name
        self.card = self._card(root, tok)
        self.foreign, index = self.card is None, self.folder / "index.json"
        if not self.foreign and name not in self.card["splits"]:
            others = f", but {' and '.join(self.card['splits'])}"
            raise NoSplit(f"{path}: has no {name} split"
                          + ("; convert again, with --val-fraction above 0" if name == "val" else others))
        try:
            if self.remote:
                download(f"{path}/{name}/index.json", index)
            elif self.foreign and not index.exists():
                raise NotThere(f"{index}: is missing")
        except NotThere:
            if not self.foreign:
                raise
            raise NoSplit(f"{path}: has neither dataset.json nor {name}/index.json; mend the path, or name the folders of "
                          f"its splits: data.train: {{path: {path}, split: train_small, val_split: val_small}}") from None
        if self.foreign:
            length = foreign.check_index(index, f"{path}/{name}/index.json")
        else:
            load_index(index, self.card, name, f"{path}/{name}/index.json")
        self.dataset = open_dataset(root, path if self.remote else None, name, config)
        self.samples = self.dataset.num_samples
        self.index_sha256 = hashlib.sha256(index.read_bytes()).hexdigest()
        self.shard_ends = np.cumsum([shard.samples for shard in self.dataset.shards])
        self.nodes = min(config.data.num_canonical_nodes, self.samples)
        self.order = lru_cache(maxsize=2)(self._order)
        self.known_whole = set()  # shards whose content has been compared with their hash
        if not self.remote:
            self._check_files()
        if self.foreign:
            foreign.ignore_other_columns(self.dataset)
            if length is None:
                self.make_sure_of(0)
                length = len(self._row(0)) - 1
            self.card = foreign.card(name, self.samples, length, tok)
        self._check_fit(config, tok)

    def _card(self, root: Path, tok) -> dict | None:
        """dataset.json. None: there is none, but data.tokenizer says what MDS from elsewhere does not."""
        try:
            if self.remote:
                download(f"{self.path}/dataset.json", root / "dataset.json")
            elif not (root / "dataset.json").exists() and (tok or (self.folder / "index.json").exists()):
                raise NotThere(f"{self.path}/dataset.json: is missing")
        except NotThere as error:
            if tok:
                return None
            raise UserError(f"{error}. MDS that other tools wrote, as llm-foundry's, has none: name its tokenizer, as "
                            "--data.tokenizer gpt2, a ranks file or a tokenizer.json") from None
        return load_dataset_card(root)

    def _check_fit(self, config: Config, tok):
        """Raises UserError where tokenizer, block or vocabulary are not those of the config."""
        path, stored, theirs = self.path, self.card["block_size"], self.card["tokenizer"]
        if tok and tok.fingerprint != theirs["fingerprint"]:
            raise UserError(f"data.tokenizer: {tok.name} is not that of {path}, {theirs['name']} (another fingerprint); "
                            "leave it out: dataset.json has it")
        if stored % config.model.block_size:
            raise UserError(f"model.block_size: {config.model.block_size} is neither the {stored} that {path} "
                            f"holds nor a divisor of it; take --model.block_size {stored}")
        if self.card["dtype"] == PAIRS and stored != config.model.block_size:
            raise UserError(f"model.block_size: {config.model.block_size} would cut the pairs of {path}; take {stored}, or "
                            f"convert them again with --block-size {config.model.block_size}")
        self.vocab_size = self.card["tokenizer"]["vocab_size"]
        if (config.model.vocab_size or self.vocab_size) < self.vocab_size:
            raise UserError(f"model.vocab_size: {config.model.vocab_size} is below the {self.vocab_size} ids of {path}; "
                            "leave it out")
        self.block_size = config.model.block_size
        self.parts = stored // self.block_size  # sequences in a sample

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

    def working_set(self, begin: float, end: float, machines: int) -> int:
        """Bytes of the shards that are in use at once, each from its first to its last sample of an epoch, on the machine
        where these are most. begin, end: where in a step, from 0 to 1, its samples lie, one canonical node after the other.
        """
        N, sizes, most = self.nodes, self.dataset.sizes, 0
        order = self.order(0)[:self.samples // N * N].reshape(-1, N)
        of_sample = np.repeat(np.arange(len(sizes), dtype=np.int32), np.diff(self.shard_ends, prepend=0))
        at = (np.arange(machines + 1) / machines - begin) / (end - begin) * N  # the nodes at which the machines begin
        for a, b in {(max(0, math.floor(a + 1e-6)), min(N, math.ceil(b - 1e-6))) for a, b in zip(at, at[1:])}:
            shards = of_sample[order[:, a:b].ravel()]
            n = len(shards) + 1
            first, after = np.full(len(sizes), n - 1), np.full(len(sizes), n - 1)  # of one that is not used, never
            first[shards[::-1]], after[shards] = np.arange(n - 1)[::-1], np.arange(1, n)
            most = max(most, int(np.cumsum(np.bincount(first, sizes, n) - np.bincount(after, sizes, n)).max()))
        return most + max(shard.get_zip_size() or 0 for shard in self.dataset.shards)  # and room to unpack

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(self, sequences: np.ndarray) -> torch.Tensor:
        """sequences (n, 2) of (sample, part) -> tokens (n, block_size + 1), int64, for inputs_and_targets."""
        T = self.block_size
        tokens = np.empty((len(sequences), T + 1), np.int64)
        shards = np.searchsorted(self.shard_ends, sequences[:, 0], "right")
        for shard in np.unique(shards).tolist():
            self.make_sure_of(shard)
            at = np.flatnonzero(shards == shard)
            for row, part, stored in zip(at, sequences[at, 1].tolist(), self._rows(shard, sequences[at, 0])):
                tokens[row] = stored[part * T:part * T + T + 1]
        if max(tokens.max(), ~tokens.min()) >= self.vocab_size:
            highest = np.maximum(tokens, ~tokens).max(1)
            row = int((highest >= self.vocab_size).argmax())
            sample = int(sequences[row, 0])
            raise UserError(f"{self.shard_of(sample)}: sample {sample} holds id {highest[row]}, the vocabulary "
                            f"ends at {self.vocab_size - 1}; the shard is damaged or of another tokenizer")
        return torch.from_numpy(tokens)

    def _rows(self, shard: int, samples: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """What _row returns for each; samples are of one shard."""
        if not self.foreign:
            numbers = samples + self.dataset.shards[shard].samples - self.shard_ends[shard]
            rows = self.dataset.rows(shard, numbers.tolist(), self.card["dtype"], self.card["block_size"] + 1)
            if rows is not None:
                return rows
        return [self._row(sample) for sample in samples.tolist()]

    def _row(self, sample: int) -> np.ndarray:
        """(the dataset's block_size + 1,): ids of a sample, or complements. Of MDS from elsewhere the last one is made up.

        UserError: it cannot be read, or is no sample.
        """
        try:
            stored = self.dataset.get_item(sample)["tokens"]
            if not self.foreign:
                return stored
            ids = foreign.ids(stored)
        except UserError:  # evicted since, and not to be fetched again
            raise
        except Exception as error:  # streaming raises a different one for each kind of damage
            raise UserError(f"{self.shard_of(sample)}: sample {sample} cannot be read ({one_line(error)}); "
                            f"tools/inspect_mds.py {self.path} --verify finds damaged shards") from error
        if self.card and len(ids) != self.card["block_size"]:
            raise UserError(f"{self.shard_of(sample)}: sample {sample} has {len(ids)} tokens, and others have "
                            f"{self.card['block_size']}; convert the text again, with all of one length")
        if ids.min() < 0:
            raise UserError(f"{self.shard_of(sample)}: sample {sample} holds id {ids.min()}, below 0; the shard is damaged, "
                            "or holds no tokens")
        return np.append(ids, ~0)  # no target

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
        self.data, self.train, self.first_step = config.data, config.train, first_step
        self.splits = [Split(config, source.split, source.path) for source in config.data.sources]
        self.card, self.vocab_size, self.parts = self.splits[0].card, self.splits[0].vocab_size, self.splits[0].parts
        for split in self.splits[1:]:
            for what, field in (("block_size", lambda card: card["block_size"]),
                                ("tokenizer", lambda card: card["tokenizer"]["fingerprint"][:16])):
                if field(split.card) != field(self.card):
                    raise UserError(f"{split.path}: its {what} is {field(split.card)}, that of {self.splits[0].path} is "
                                    f"{field(self.card)}; the datasets of a mixture need the same one")
        self.block_size = config.model.block_size
        self._check_sizes()
        weights = np.array([source.repeat * split.samples if source.repeat else source.samples or source.proportion or 1
                            for source, split in zip(config.data.sources, self.splits)])
        self.proportions = weights / weights.sum()
        ends = np.cumsum([0, *self.proportions])
        self.counts = np.diff(np.rint(ends * DEAL).astype(np.int64))  # of each dataset in a round of the deal
        self.first_sample = np.cumsum([0] + [split.samples for split in self.splits])  # samples are numbered through
        labels, whole = ([Path(split.path).name for split in self.splits],
                         [f"{split.path.rstrip('/')}/{split.name}" for split in self.splits])
        if len(set(labels)) < len(set(whole)):  # the names of folders do not tell them apart
            labels = whole
        for i, split in enumerate(self.splits):
            split.share, split.label = float(self.proportions[i]), labels[i] if len(labels) > 1 else ""
            self._check_share(split, int(self.counts[i]), ends[i], ends[i + 1])
        self.deal = lru_cache(maxsize=2)(self._deal)

    def _check_sizes(self):
        """Raises UserError unless every batch is of whole samples, and every block of them may be cut."""
        if uneven := self.train.uneven(self.parts):
            key, size, near = uneven
            raise UserError(f"{key}: {size} sequences of {self.block_size} tokens do not fill whole samples of "
                            f"{self.card['block_size']}; take {near}")
        for split in self.splits:
            if self.train.block_schedule and split.card["dtype"] == PAIRS:
                raise UserError(f"train.block_schedule: would cut the pairs of {split.path}; leave it out")

    def _check_share(self, split: Split, count: int, begin: float, end: float):
        """Raises UserError where a dataset has too few samples, or comes too seldom, or its cache is too small.

        count: its samples in a round of the deal; begin, end: where they lie in a step, from 0 to 1.
        """
        batch, share, limit = self.train.global_batch_size, split.share, split.dataset.cache_limit
        if split.samples < batch // self.parts * share:
            raise UserError(f"{split.path}: its {split.name} split has {split.samples * self.parts} sequences, fewer than "
                            f"one step takes; lower train.global_batch_size from {batch}")
        if not count:
            raise UserError(f"data.train: {share:.2g} of the samples would come from {split.path}, and {1 / DEAL:.2g} is "
                            "the least; raise its share, or leave it out")
        machines = int(os.environ.get("WORLD_SIZE", 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if limit and limit < (least := split.working_set(begin, end, machines)):
            raise UserError(f"data.cache_limit: {self.data.cache_limit} does not hold the shards of {split.path} that the "
                            "shuffle has in use at once on a machine, and they would be fetched again and again; take at "
                            f"least {-(-least >> 10)}kb, or a data.shuffle_block_size below {self.data.shuffle_block_size}")

    def validation(self, config: Config) -> list[Split]:
        """The validation splits of those datasets that have one, each with its share and its label."""
        found = []
        for source, split in zip(config.data.sources, self.splits):
            try:
                found.append(Split(config, source.val_split, source.path))
                found[-1].share, found[-1].label = split.share, split.label
            except NoSplit:
                if source.val_split != "val":
                    raise
        return found

    def epochs(self, steps: int) -> list[float]:
        """How often each dataset is gone through up to that step."""
        return [max(0, self._first(steps)) * split.share / split.samples for split in self.splits]

    def identity(self) -> dict:
        """All that decides which sequences a step sees. A run is resumed only where this is unchanged."""
        if len(self.splits) > 1:
            several: dict[str, Any] = {"data.mixture": self.data.mixture, "number of datasets": len(self.splits)}
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
            "train.global_batch_size": self.train.global_batch_size,
        } | ({"train.batch_schedule": str(self.train.batch_schedule)} if self.train.batch_schedule else {})

    def differences(self, was: dict) -> dict:
        """{key: (was, now)} of another identity and this one."""
        now = self.identity()
        return {key: (was.get(key), now.get(key)) for key in now | was if was.get(key) != now.get(key)}

    def settings(self) -> dict:
        """What a checkpoint keeps of the data: enough to know it again, and to find any step's samples later."""
        schedule = self.train.batch_schedule
        return dict(identity=self.identity(), parts=self.parts, data=self.data.model_dump()) | (
            {"batch_schedule": schedule.model_dump()} if schedule else {})

    def _deal(self, round: int) -> tuple[np.ndarray, np.ndarray]:
        """The pattern of a mixture: (dataset of each of DEAL samples (DEAL,), how many of them before it are of it)."""
        counts = self.counts
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

    def _first(self, step: int) -> int:
        """Where in the endless order of the samples a step begins."""
        return (self.train.sequences(step) - self.train.sequences(self.first_step)) // self.parts

    def samples(self, step: int) -> np.ndarray:
        """(samples of the step,): what step `step` takes, numbered through all datasets.

        Neighbours come from the same canonical node, so that the consecutive ranks of a machine, which take
        consecutive pieces, read few shards.
        """
        first = self._first(step)
        n = self._first(step + 1) - first
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
        """(sequences of the step, 2) of (sample, part): what optimizer step `step` (from 0) trains on, in order."""
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
        if len(self.splits) == 1:
            return self.splits[0].read(sequences)
        which = np.searchsorted(self.first_sample, sequences[:, 0], "right") - 1
        tokens = torch.empty(len(sequences), self.block_size + 1, dtype=torch.int64)
        for i in np.unique(which).tolist():
            tokens[torch.from_numpy(which == i)] = self.splits[i].read(sequences[which == i] - [self.first_sample[i], 0])
        return tokens

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[np.ndarray]:
        """This rank's share of a step: arrays (micro_batch_size, 2) of (sample, part)."""
        mine = np.split(self.sequences(step), world_size)[rank]
        return np.split(mine, len(mine) // self.train.micro_batch_size)

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
