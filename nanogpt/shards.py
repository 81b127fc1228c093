"""Tokens -> fixed-length samples -> MDS shards + dataset.json. The format of the data; convert.py is what fills it.

A split is one stream of tokens: its documents, each followed by end-of-text. Sample i holds the tokens
[i * stride, i * stride + block_size] of it: inputs are all but its last, targets all but its first. With stride =
block_size (always so in validation) neighbours share one token, and every token but the first is a target exactly once.

Pairs of prompt and completion are not cut: a sample holds whole ones, in their order, each followed by end-of-text, and
then padding. No token of a prompt or of padding is a target: these are stored as complements, ~id, which are below 0.

    DIR/train/  DIR/val/     index.json and shard.00000.mds …, with xxh64 hashes
    DIR/tokenizer.tiktoken   the ranks of a tokenizer that was trained on this text
    DIR/dataset.json         tokenizer, block_size, dtype, counts of each split, source; written last
"""

import json
import os
import sys
import types
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanogpt.errors import UserError

FORMAT = 1
MAX_BLOCK = 1 << 20
SHARD_BYTES = 1 << 26
PAIRS = "int32"  # dtype of datasets of pairs, and only of these
COPIED = 1 << 22  # bytes that are held at a time, of a file that is read again


def import_streaming():
    """The `streaming` module, imported without its parts for vision, text and multimodal data.

    Nothing here needs them, nor the loader that knows two classes of transformers, and they bring in torchvision, which
    fails beside a CPU build of torch, and seconds of imports. Empty modules hold their places during the import, and leave
    it with no trace for others who want the real ones.
    """
    if "streaming" not in sys.modules:
        unwanted = {f"streaming.{part}": None for part in ("vision", "text", "multimodal")}
        if "transformers" not in sys.modules:
            unwanted |= {"transformers": None, "transformers.feature_extraction_utils": "BatchFeature",
                         "transformers.tokenization_utils_base": "BatchEncoding"}
        for name, wanted in unwanted.items():
            sys.modules[name] = types.ModuleType(name)
            if wanted:
                setattr(sys.modules[name], wanted, type(wanted, (), {}))
        try:
            import streaming  # noqa: F401
        finally:
            for name in unwanted:
                del sys.modules[name]
    return sys.modules["streaming"]


def file_hash(path: Path, digest) -> str:
    """The hex digest of a file by an xxhash object, read in blocks. OSError: it cannot be read."""
    with open(path, "rb") as file:
        while block := file.read(COPIED):
            digest.update(block)
    return digest.hexdigest()


def check_options(block_size: int, stride: int | None, val_fraction: float, seed: int, workers: int, pairs: bool = False):
    """UserError: a line for each option that is out of its range."""
    ranges = (("block-size", block_size, 1 <= block_size <= MAX_BLOCK, f"1 to {MAX_BLOCK}"),
              ("stride", stride, stride is None or 1 <= stride <= block_size, f"1 to the block size, {block_size}"),
              ("val-fraction", val_fraction, 0 <= val_fraction < 1, "0 (no validation split) up to, not including, 1"),
              ("seed", seed, seed >= 0, "0 or more"), ("workers", workers, workers >= 1, "1 or more"))
    problems = [f"--{name}: {value} is out of range; take {wanted}" for name, value, good, wanted in ranges if not good]
    if pairs and stride is not None:
        problems.append("--stride: pairs are not cut into windows; leave it out")
    if problems:
        raise UserError("\n".join(problems))


# ---- samples --------------------------------------------------------------------------------------------------------

class SplitWriter:
    """Cuts the tokens of one split into samples, and writes these."""

    def __init__(self, folder: Path, card: dict, stride: int, state: dict | None = None):
        """state: what state() said when the conversion was interrupted."""
        self.block_size, self.stride, self.dtype = card["block_size"], stride, np.dtype(card["dtype"])
        state = state or dict(rest=[], tokens=0, samples=0, documents=0, bytes=0, shards=None)
        self.rest = np.array(state["rest"], self.dtype)  # the tokens from the start of the next sample on
        self.tokens, self.samples, self.documents, self.bytes = (
            state[key] for key in ("tokens", "samples", "documents", "bytes"))
        self.shards = ShardWriter(folder, card, state["shards"])

    def add(self, ids: np.ndarray, lengths: np.ndarray, documents: int, n_bytes: int):
        """Appends ids (n,), in which `documents` end. Where one ends, lengths tell; here it does not matter."""
        rest = np.concatenate([self.rest, ids])
        samples = max(0, (len(rest) - 1 - self.block_size) // self.stride + 1)
        if samples:
            windows = np.lib.stride_tricks.sliding_window_view(rest, self.block_size + 1)
            self.shards.write(windows[:samples * self.stride:self.stride])
        self.rest = rest[samples * self.stride:].copy()  # a view would keep all of them
        self.tokens += len(ids)
        self.samples += samples
        self.documents += documents
        self.bytes += n_bytes

    def state(self) -> dict:
        """JSON from which another writer goes on, once this one is gone: what was written so far is on disk."""
        return dict(rest=self.rest.tolist(), tokens=self.tokens, samples=self.samples, documents=self.documents,
                    bytes=self.bytes, shards=self.shards.state())

    def finish(self) -> dict:
        """Writes the last shard and the index; returns the split's part of dataset.json. UserError: there is no sample."""
        name = self.shards.folder.name
        if not self.samples:
            remedy = ", a larger --val-fraction, or --val-fraction 0 for no such split" if name == "val" else ""
            raise UserError(f"the {name} split has {self.tokens} tokens, and a sample takes block_size + 1 = "
                            f"{self.block_size + 1}; give more text or a smaller --block-size{remedy}")
        self.shards.finish()
        shared = self.block_size + 1 - self.stride  # tokens at the start of the rest that the last sample has too
        return {"stride": self.stride, "tokens": self.tokens, "samples": self.samples, "documents": self.documents,
                "bytes": self.bytes, "dropped_tokens": len(self.rest) - shared}


class PairWriter:
    """Packs whole pairs into the samples of one split, and writes these.

    The first token of a sample has no input before it, so it can be no target. It is the first of a prompt, which is none
    anyway: so prompts are also seen where sampling has them, at the very beginning. Only a pair without a prompt gets an
    end-of-text before it there, one of padding; elsewhere that of the pair before it does.
    """
    COUNTS = ("tokens", "targets", "samples", "documents", "bytes")

    def __init__(self, folder: Path, card: dict, state: dict | None = None):
        """state: what state() said when the conversion was interrupted."""
        self.size, self.padding = card["block_size"] + 1, np.array(~card["tokenizer"]["eot"], PAIRS)
        state = state or {**dict.fromkeys(self.COUNTS, 0), "rest": [], "shards": None}
        self.row, self.used = np.full(self.size, self.padding), len(state["rest"])  # the next sample, and how much is taken
        self.row[:self.used] = state["rest"]
        self.tokens, self.targets, self.samples, self.documents, self.bytes = (state[key] for key in self.COUNTS)
        self.shards = ShardWriter(folder, card, state["shards"])

    def add(self, ids: np.ndarray, lengths: np.ndarray, documents: int, n_bytes: int):
        """Appends pairs: ids (n,), complements in prompts, end-of-text after each; lengths (documents,): of each of them."""
        for pair in np.split(ids, np.cumsum(lengths)[:-1]):
            if self.used + len(pair) > self.size:
                self._write()
            self.used = max(self.used, int(pair[0] >= 0))  # end-of-text before it at the beginning of a sample
            self.row[self.used:self.used + len(pair)] = pair
            self.used += len(pair)
        self.tokens += len(ids)
        self.targets += int(np.count_nonzero(ids >= 0))
        self.documents += documents
        self.bytes += n_bytes

    def _write(self):
        self.shards.write(self.row[None])
        self.row[:], self.used = self.padding, 0
        self.samples += 1

    def state(self) -> dict:
        """JSON from which another writer goes on, once this one is gone: what was written so far is on disk."""
        return {key: getattr(self, key) for key in self.COUNTS} | dict(
            rest=self.row[:self.used].tolist(), shards=self.shards.state())

    def finish(self) -> dict:
        """Writes the last sample, shard and the index; returns the split's part of dataset.json. UserError: no pair."""
        if not self.documents:
            raise UserError(f"the {self.shards.folder.name} split has no pair that fits into a sample; give more pairs, or a "
                            "larger --block-size")
        self._write()
        self.shards.finish()
        return {"stride": self.size, "tokens": self.tokens, "samples": self.samples, "documents": self.documents,
                "bytes": self.bytes, "dropped_tokens": 0, "targets": self.targets,
                "padding": self.samples * self.size - self.tokens}


# ---- shards ---------------------------------------------------------------------------------------------------------

class ShardWriter:
    """The MDS shards of one split, byte for byte those of streaming's MDSWriter.

    That one takes samples one at a time, 30 microseconds each, and keeps a whole shard in memory until it is full: the
    tokenizer would wait for it, and a killed conversion would have nothing to go on from. Here samples are appended to the
    shard's file many at a time, and state() says how far it is good. An open shard lies beside the dataset, as
    SPLIT.00007.open, and stays there until a state says that it is complete.
    """

    def __init__(self, folder: Path, card: dict, state: dict | None = None):
        """card: dtype, block_size and source.compression count. state: what state() said. OSError: cannot be written."""
        self.folder, self.width, self.dtype = folder, card["block_size"] + 1, np.dtype(card["dtype"])
        self.sample_bytes = self.width * self.dtype.itemsize
        self.config = dict(
            version=2, format="mds", compression=card["source"]["compression"], hashes=["xxh64"], size_limit=SHARD_BYTES,
            column_names=["tokens"], column_encodings=[f"ndarray:{card['dtype']}:{self.width}"],
            column_sizes=[self.sample_bytes])
        self.config_bytes = json.dumps(self.config, sort_keys=True).encode()
        room = SHARD_BYTES - 8 - len(self.config_bytes)
        self.full = max(1, room // (self.sample_bytes + 4))  # samples of a shard that is not the last
        self.file: BinaryIO | None = None
        self.shards, self.samples = [], 0  # finished ones; samples in the open one
        self.needed = []  # open files that only the last state needs
        folder.mkdir(parents=True, exist_ok=True)
        if state:
            self.shards = state["shards"]
            self._open(state["samples"])

    def _paths(self) -> tuple[Path, Path]:
        """Of the next shard: while it is open, and then."""
        n = len(self.shards)
        return self.folder.parent.parent / f"{self.folder.name}.{n:05}.open", self.folder / f"shard.{n:05}.mds"

    def _header(self, samples: int) -> bytes:
        """Number of samples, where each begins and the last ends, and the config."""
        first = 4 + 4 * (samples + 1) + len(self.config_bytes)
        offsets = first + self.sample_bytes * np.arange(samples + 1, dtype=np.int64)
        return np.uint32(samples).tobytes() + offsets.astype(np.uint32).tobytes() + self.config_bytes

    def _open(self, samples: int = 0):
        """Opens the next shard, of which so many samples are on disk. It is taken for a full one until the end."""
        import xxhash
        (path, complete), header, self.samples = self._paths(), self._header(self.full), samples
        if not samples:
            path.write_bytes(header)
        elif not path.exists():  # completed since the state
            os.rename(complete, path)
        self.file, self.digest = open(path, "r+b"), xxhash.xxh64()
        length = len(header) + samples * self.sample_bytes
        self.file.truncate(length)  # what is beyond came after the state
        while block := self.file.read(COPIED):
            self.digest.update(block)
        if self.file.tell() != length:
            raise UserError(f"{path}: is shorter than it was; remove {path.parent}, and the same command begins anew")

    def write(self, samples: np.ndarray):
        """Appends samples (n, block_size + 1)."""
        step = max(1, COPIED // self.sample_bytes)
        done = 0
        while done < len(samples):
            if self.file is None:
                self._open()
            n = min(step, self.full - self.samples, len(samples) - done)
            data = np.ascontiguousarray(samples[done:done + n], self.dtype).data
            self.file.write(data)
            self.digest.update(data)
            self.samples += n
            done += n
            if self.samples == self.full:
                self._close()

    def _close(self, path: Path | None = None):
        """The open shard is complete, or `path` holds a copy of it that is."""
        opened, complete = self._paths()
        path = path or opened
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        info = dict(basename=complete.name, bytes=path.stat().st_size, hashes={"xxh64": self.digest.hexdigest()})
        zipped = None
        if self.config["compression"]:
            import xxhash
            import zstd
            data = zstd.compress(path.read_bytes(), 3)  # streaming's level
            with open(complete.with_name(f"{complete.name}.zstd"), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a state is going to count on it
            zipped = dict(basename=f"{complete.name}.zstd", bytes=len(data), hashes={"xxh64": xxhash.xxh64(data).hexdigest()})
            self.needed.append(path)
        else:
            os.rename(path, complete)
        self.shards.append(dict(samples=self.samples, raw_data=info, zip_data=zipped))
        self.file, self.samples = None, 0

    def state(self) -> dict:
        """JSON: the shards that are complete, and the samples in the open one; all of it is on disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        return dict(shards=self.shards, samples=self.samples)

    def forget(self):
        """The last state() is on disk: what the one before needed is removed."""
        while self.needed:
            self.needed.pop().unlink(missing_ok=True)

    def finish(self):
        """Writes the last shard, which is shorter, and index.json."""
        if self.samples:
            self._close(self._shortened())
        index = dict(version=2, shards=[shard | self.config for shard in self.shards])
        (self.folder / "index.json").write_text(json.dumps(index, sort_keys=True))

    def _shortened(self) -> Path:
        """A copy of the open shard with the header of the samples that it has; the shard itself stays what a state needs."""
        import xxhash
        self.file.seek(len(self._header(self.full)))
        self.digest = xxhash.xxh64()
        with open(path := self._paths()[0].with_suffix(".last"), "wb") as file:
            block = self._header(self.samples)
            while block:
                file.write(block)
                self.digest.update(block)
                block = self.file.read(COPIED)
            os.fsync(file.fileno())
        return path


# ---- reading dataset.json -------------------------------------------------------------------------------------------

def pair_counts(split: dict, block_size: int) -> str:
    """What dataset.json counts of a split of pairs, for people."""
    share = split["padding"] / max(1, split["samples"] * (block_size + 1))
    return (f"pairs {split['documents']:,}, tokens {split['tokens']:,}, targets {split['targets']:,}, samples "
            f"{split['samples']:,}, padding {share:.1%}")


def load_dataset_card(folder) -> dict:
    """dataset.json of a dataset folder, its fields and their types checked. UserError names the file and the field."""
    path = Path(folder) / "dataset.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: is missing; make the dataset with tools/convert_text_to_mds.py --input TEXT --out "
                        f"{folder}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); convert the text again") from None

    def check(obj, where, **fields):
        for key, wanted in fields.items():
            value = obj.get(key) if isinstance(obj, dict) else None
            if type(value) is not wanted or (wanted is int and value < 0):
                raise UserError(f"{path}: {where}{key} is {value!r:.60}, no {wanted.__name__}; convert the text again")

    check(card, "", format=int)
    if card["format"] != FORMAT:
        raise UserError(f"{path}: has format {card['format']}, this version reads {FORMAT}; convert the text again")
    check(card, "", tokenizer=dict, block_size=int, dtype=str, splits=dict, source=dict)
    check(card["tokenizer"], "tokenizer.", name=str, vocab_size=int, fingerprint=str)
    if card["dtype"] == PAIRS or card["tokenizer"].get("eot", -1) is not None:
        check(card["tokenizer"], "tokenizer.", eot=int)
    check(card["splits"], "splits.", train=dict)
    if set(card["splits"]) - {"train", "val"}:
        raise UserError(f"{path}: splits has more than train and val; convert the text again")
    for name, split in card["splits"].items():
        counts = dict.fromkeys(("stride", "tokens", "samples", "documents", "bytes", "dropped_tokens"), int)
        if card["dtype"] == PAIRS:
            counts |= dict.fromkeys(("targets", "padding"), int)
        check(split, f"splits.{name}.", **counts)
    for field, allowed in (("block_size", range(1, MAX_BLOCK + 1)), ("dtype", ("uint16", "uint32", PAIRS))):
        if card[field] not in allowed:
            raise UserError(f"{path}: {field} is {card[field]!r:.60}; convert the text again")
    return card


def load_index(file: Path, card: dict, split: str, path: str | None = None) -> list[dict]:
    """The shards that a split's index.json lists, checked as read_index does, and against dataset.json."""
    path = path or file
    wanted = dict(column_names=["tokens"], column_encodings=[f"ndarray:{card['dtype']}:{card['block_size'] + 1}"],
                  column_sizes=[(card["block_size"] + 1) * np.dtype(card["dtype"]).itemsize])

    def check(shard):
        for key, value in wanted.items():
            if shard[key] != value:
                raise ValueError(f"{key} is {shard[key]!r:.60}, and {value!r} by dataset.json")

    shards = read_index(file, path, check)
    if (found := sum(shard["samples"] for shard in shards)) != (samples := card["splits"][split]["samples"]):
        raise UserError(f"{path}: is damaged (it holds {found} samples, and {samples} by dataset.json); copy it again, or "
                        "convert the text again")
    return shards


def read_index(file: Path, path, check) -> list[dict]:
    """The shards that an index.json lists, all that is said of them checked before streaming acts on it.

    It would follow a name out of the folder, delete a shard that is compressed by name alone, and decode any column.
    check(shard) raises ValueError where its columns are others. UserError names path, where the file came from.
    """
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        for shard in index["shards"]:
            if (shard["version"], shard["format"]) != (2, "mds"):
                raise ValueError(f"it lists a shard of format {shard['format']!r:.60}, version {shard['version']!r:.60}")
            check(shard)
            if type(shard["samples"]) is not int or shard["samples"] < 1 or type(shard["size_limit"]) not in (int, type(None)) \
                    or (shard["compression"] is None) != (shard["zip_data"] is None):
                raise ValueError("samples, size_limit or compression are of the wrong kind")
            for file in filter(None, (shard["raw_data"], shard["zip_data"])):
                name = file["basename"]
                if Path(name).name != name or name in ("", "..") or not name.isprintable():
                    raise ValueError(f"{name!r:.60} is no file of its folder")
                if type(file["bytes"]) is not int or not all(type(value) is str for value in file["hashes"].values()):
                    raise ValueError(f"bytes or hashes of {name!r:.60} are of the wrong kind")
        if index["version"] != 2:
            raise ValueError(f"version is {index['version']!r:.60}, and not 2")
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; copy it again, or convert the text again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again, or convert the text again") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); copy it again, or convert the text again") from None
    return index["shards"]
