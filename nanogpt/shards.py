"""Documents -> fixed-length token samples -> MDS shards + dataset.json. The write side of the data.

A split is one stream of tokens: its documents, each followed by end-of-text. Sample i holds the tokens
[i * stride, i * stride + block_size] of it: inputs are all but its last, targets all but its first. With stride =
block_size (always so in validation) neighbours share one token, and every token but the first is a target exactly once.

Pairs of prompt and completion are not cut: a sample holds whole ones, in their order, each followed by end-of-text, and
then padding. No token of a prompt or of padding is a target: these are stored as complements, ~id, which are below 0.

    DIR/train/  DIR/val/     index.json and shard.00000.mds …, with xxh64 hashes
    DIR/dataset.json         tokenizer, block_size, dtype, counts of each split, source; written last
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import types
from collections import deque
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from typing import Collection

import numpy as np

from nanogpt.errors import UserError
from nanogpt.tokenizer import Tokenizer, from_json

FORMAT = 1
MAX_BLOCK = 1 << 20
SHARD_BYTES = 1 << 26
PAIRS = "int32"  # dtype of datasets of pairs, and only of these
PIECE = 1 << 20  # token ids that are held at a time, of those that are there already
TASK_CHARACTERS = 1 << 20  # what a worker process gets at a time, unless one document is longer


def import_streaming():
    """The `streaming` module, imported without its parts for vision, text and multimodal data.

    Nothing here needs them, and they bring in transformers, and torchvision, which fails beside a CPU build of torch.
    Empty modules hold their places during the import, and leave it with no trace for others who want the real ones.
    """
    if "streaming" not in sys.modules:
        unwanted = [f"streaming.{part}" for part in ("vision", "text", "multimodal")]
        sys.modules.update({name: types.ModuleType(name) for name in unwanted})
        try:
            import streaming  # noqa: F401
        finally:
            for name in unwanted:
                del sys.modules[name]
    return sys.modules["streaming"]


def file_hash(path: Path, digest) -> str:
    """The hex digest of a file by an xxhash object, read in blocks. OSError: it cannot be read."""
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---- writing --------------------------------------------------------------------------------------------------------

def convert(documents: Collection[tuple[str, str | tuple[str, str]]], out, tokenizer: Tokenizer, block_size: int, *,
            stride: int | None = None, val_fraction: float = 0.01, seed: int = 2357, workers: int = 1,
            compression: str | None = None, overwrite: bool = False, source: dict | None = None, pairs: bool = False,
            skip_long: bool = False) -> tuple[dict, bool]:
    """Writes the dataset folder `out` from `documents`, pairs (name, text) that can be counted and are read once.

    stride         tokens from one training sample to the next; block_size if None
    val_fraction   share of the documents, or of the characters of a single one, for validation; 0: no such split
    seed           chooses the validation documents
    workers        processes that tokenize; the result does not depend on it
    compression    "zstd" or None
    overwrite      replace a dataset that is there
    source         JSON that identifies the documents, kept in dataset.json; its `paths` are for people, not compared
    pairs          each text is a (prompt, completion), of which only the completion is trained on
    skip_long      leave out and count the pairs that are longer than a sample, instead of a UserError

    Returns (card, written): what dataset.json says, and False when `out` already held just this.
    UserError: a bad option, text that is too short or cannot be encoded, a folder in the way, or no way to write.
    """
    check_options(block_size, stride, val_fraction, seed, workers, pairs)
    if pairs and tokenizer.eot is None:
        raise UserError(f"--tokenizer: {tokenizer.name} has no end-of-text, by which a model tells that a completion is over")
    if pairs and val_fraction and len(documents) == 1:
        raise UserError("--val-fraction: a single pair is not cut in two; give more of them, or --val-fraction 0")
    stride = block_size + 1 if pairs else stride or block_size  # samples of pairs have nothing in common
    out = Path(out).resolve()
    card = {"format": FORMAT, "tokenizer": tokenizer.to_json(), "block_size": block_size,
            "dtype": PAIRS if pairs else tokenizer.dtype.name, "splits": {},
            "source": {**(source or {}), "documents": len(documents), "stride": stride, "seed": seed,
                       "val_fraction": val_fraction, "compression": compression}}
    return _make(out, card, overwrite, lambda folder: _write_splits(documents, folder, tokenizer, card, workers, skip_long))


def convert_tokens(splits: dict[str, np.ndarray], out, tokenizer: Tokenizer, block_size: int, *, stride: int | None = None,
                   compression: str | None = None, overwrite: bool = False, source: dict | None = None) -> tuple[dict, bool]:
    """As `convert`, but from {"train": ids (n,), "val": ids (n,)} as they are, with whatever ends documents in them.

    UserError, beside those of `convert`: an id that the tokenizer does not have.
    """
    check_options(block_size, stride, val_fraction=0, seed=0, workers=1)
    out = Path(out).resolve()
    card = {"format": FORMAT, "tokenizer": tokenizer.to_json(), "block_size": block_size, "dtype": tokenizer.dtype.name,
            "splits": {}, "source": {**(source or {}), "stride": stride or block_size, "compression": compression}}
    return _make(out, card, overwrite, lambda folder: _write_tokens(splits, folder, tokenizer, card))


def _make(out: Path, card: dict, overwrite: bool, write) -> tuple[dict, bool]:
    """Makes `out`. write(folder) writes its splits into another folder, and their counts into `card`."""
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"  # beside out, so on the same disk: a rename publishes
    try:
        there = _already_there(out, card, overwrite)
        if there:
            return there, False
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process that had the same number
        partial.mkdir(parents=True)
        write(partial)
        (partial / "dataset.json").write_text(json.dumps(card, indent=1) + "\n")
        _publish(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); take another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is there after a success
    return card, True


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


def _already_there(out: Path, card: dict, overwrite: bool) -> dict | None:
    """The card of `out` if it holds what `card` asks for, None if it may be written. UserError: it is in the way."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if "dataset.json" not in names or names - {"train", "val", "dataset.json"}:  # --overwrite removes no other files
        raise UserError(f"{out}: exists and is not a dataset folder; take another --out")
    if overwrite:
        return None
    old = load_dataset_card(out)
    differs = [key for key in ("tokenizer", "block_size", "dtype") if old[key] != card[key]]
    differs += [f"source.{key}" for key in card["source"]
                if key != "paths" and old["source"].get(key) != card["source"][key]]
    if differs:
        raise UserError(f"{out}: holds another dataset ({', '.join(differs)}); take another --out or --overwrite")
    return old


def _publish(partial: Path, out: Path):
    """Puts `partial` in the place of `out`, which keeps what it had if that fails."""
    aside = partial.with_name(partial.name + ".old")
    if out.exists():
        os.rename(out, aside)
    try:
        os.rename(partial, out)
    except BaseException:
        if aside.exists():
            os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write_splits(documents, folder: Path, tokenizer: Tokenizer, card: dict, workers: int, skip_long: bool):
    """Writes folder/train and folder/val and puts their counts into card["splits"]."""
    from tqdm import tqdm

    source, block_size, pairs = card["source"], card["block_size"], card["dtype"] == PAIRS
    strides = {"train": source["stride"]} | ({"val": block_size} if source["val_fraction"] else {})
    splits = {}
    for name, stride in strides.items():
        mds = _mds_writer(folder / name, card)
        splits[name] = (_PairWriter(mds, block_size, tokenizer, skip_long) if pairs else
                        _SplitWriter(mds, block_size, stride, tokenizer))
    pieces = _assign(documents, source["val_fraction"], source["seed"])
    unit = " pairs" if pairs else " documents"
    with tqdm(total=len(documents), unit=unit, disable=None) as bar:  # None: only on a terminal
        for name, document, ids, n_bytes in _encode_all(pieces, tokenizer, workers):
            splits[name].add(document, ids, n_bytes)
            bar.set_postfix_str(f"{sum(split.tokens for split in splits.values()):,} tokens", refresh=False)
            bar.update(name == "train" or len(documents) > 1)  # the second part of a single one is no other document
    for name, split in splits.items():
        card["splits"][name] = split.finish(name)


def _mds_writer(folder: Path, card: dict):
    column = f"ndarray:{card['dtype']}:{card['block_size'] + 1}"
    return import_streaming().MDSWriter(columns={"tokens": column}, out=str(folder), hashes=["xxh64"],
                                        compression=card["source"]["compression"], size_limit=SHARD_BYTES)


def _write_tokens(splits: dict[str, np.ndarray], folder: Path, tokenizer: Tokenizer, card: dict):
    """Writes folder/train and folder/val from the ids of `splits`, and puts their counts into card["splits"]."""
    from tqdm import tqdm

    block_size, token_bytes = card["block_size"], tokenizer.token_bytes()
    with tqdm(total=sum(map(len, splits.values())), unit=" tokens", unit_scale=True, disable=None) as bar:
        for name, ids in splits.items():
            if len(ids) <= block_size:
                raise UserError(f"the {name} split has {len(ids)} tokens, and a sample takes block_size + 1 = "
                                f"{block_size + 1}; take a smaller --block-size")
            stride = card["source"]["stride"] if name == "train" else block_size
            split = _SplitWriter(_mds_writer(folder / name, card), block_size, stride, tokenizer)
            for start in range(0, len(ids), PIECE):
                piece = np.array(ids[start:start + PIECE])
                counts = np.bincount(piece, minlength=tokenizer.vocab_size)
                if len(counts) > tokenizer.vocab_size:
                    raise UserError(f"the {name} split holds id {len(counts) - 1}, and {tokenizer.name} ends at "
                                    f"{tokenizer.vocab_size - 1}; take the tokenizer that made the ids")
                split.append(piece.astype(tokenizer.dtype), int(counts @ token_bytes))
                split.documents += int(counts[tokenizer.eot]) if tokenizer.eot is not None else 0
                bar.update(len(piece))
            split.documents += int(ids[-1] != tokenizer.eot)  # the last one, without its end
            card["splits"][name] = split.finish(name)


class _SplitWriter:
    """Cuts the tokens of one split into samples, and writes these."""

    def __init__(self, mds, block_size: int, stride: int, tokenizer: Tokenizer):
        self.mds, self.block_size, self.stride = mds, block_size, stride
        self.eot = np.array([] if tokenizer.eot is None else [tokenizer.eot], tokenizer.dtype)
        self.rest = np.empty(0, tokenizer.dtype)  # the tokens from the start of the next sample on
        self.tokens = self.samples = self.documents = self.bytes = 0

    def add(self, name: str, ids: np.ndarray, n_bytes: int):
        """Appends a document of ids (n,), and end-of-text where the tokenizer has one."""
        self.append(np.concatenate([ids, self.eot]), n_bytes)
        self.documents += 1

    def append(self, ids: np.ndarray, n_bytes: int):
        """Appends ids (n,) as they are."""
        rest = np.concatenate([self.rest, ids])
        samples = max(0, (len(rest) - 1 - self.block_size) // self.stride + 1)
        for start in range(0, samples * self.stride, self.stride):
            self.mds.write({"tokens": rest[start:start + self.block_size + 1]})
        self.rest = rest[samples * self.stride:].copy()  # a view would keep the whole document
        self.tokens += len(ids)
        self.samples += samples
        self.bytes += n_bytes

    def finish(self, name: str) -> dict:
        """Writes the last shard and the index; returns the split's part of dataset.json."""
        if not self.samples:
            remedy = ", a larger --val-fraction, or --val-fraction 0 for no such split" if name == "val" else ""
            raise UserError(f"the {name} split has {self.tokens} tokens, and a sample takes block_size + 1 = "
                            f"{self.block_size + 1}; give more text or a smaller --block-size{remedy}")
        self.mds.finish()
        shared = self.block_size + 1 - self.stride  # tokens at the start of the rest that the last sample has too
        return {"stride": self.stride, "tokens": self.tokens, "samples": self.samples, "documents": self.documents,
                "bytes": self.bytes, "dropped_tokens": len(self.rest) - shared}


class _PairWriter:
    """Packs whole pairs into the samples of one split, and writes these.

    The first token of a sample has no input before it, so it can be no target. It is the first of a prompt, which is none
    anyway: so prompts are also seen where sampling has them, at the very beginning. Only a pair without a prompt gets an
    end-of-text before it there, one of padding; elsewhere that of the pair before it does.
    """

    def __init__(self, mds, block_size: int, tokenizer: Tokenizer, skip_long: bool):
        self.mds, self.size, self.skip_long = mds, block_size + 1, skip_long
        self.eot = np.array([tokenizer.eot], PAIRS)
        self.row, self.used = np.repeat(~self.eot, self.size), 0  # the next sample, and how much of it is taken
        self.tokens = self.targets = self.samples = self.documents = self.left_out = self.bytes = 0

    def add(self, name: str, ids: np.ndarray, n_bytes: int):
        """Appends a pair of ids (n,), complements in its prompt, and end-of-text. UserError: it does not fit."""
        ids = np.concatenate([ids, self.eot])
        before = int(ids[0] >= 0)  # end-of-text before it at the beginning of a sample
        length = before + len(ids)
        if length > self.size and self.skip_long:
            self.left_out += 1
            return
        if length > self.size:
            raise UserError(f"{name}: is {length} tokens long, and a sample holds block_size + 1 = {self.size}; take a "
                            f"--block-size of {length - 1} or more, or --errors skip, which leaves out such pairs")
        if self.used + len(ids) > self.size:
            self._write()
        self.used = max(self.used, before)
        self.row[self.used:self.used + len(ids)] = ids
        self.used += len(ids)
        self.tokens += len(ids)
        self.targets += int(np.count_nonzero(ids >= 0))
        self.documents += 1
        self.bytes += n_bytes

    def _write(self):
        self.mds.write({"tokens": self.row})
        self.row[:], self.used = ~self.eot, 0
        self.samples += 1

    def finish(self, name: str) -> dict:
        """Writes the last sample, shard and the index; returns the split's part of dataset.json."""
        if not self.documents:
            raise UserError(f"the {name} split has no pair, {self.left_out} are left out as too long; give more pairs, or a "
                            "larger --block-size")
        self._write()
        self.mds.finish()
        return {"stride": self.size, "tokens": self.tokens, "samples": self.samples, "documents": self.documents,
                "bytes": self.bytes, "dropped_tokens": 0, "targets": self.targets,
                "padding": self.samples * self.size - self.tokens, "left_out": self.left_out}


def _assign(documents, val_fraction: float, seed: int):
    """Yields (split, name, text). Whole documents go to validation by the seed, or the last part of a single one."""
    n = len(documents)
    if val_fraction and n > 1:
        n_val = min(max(1, round(n * val_fraction)), n - 1)
        val = set(np.random.default_rng(seed).choice(n, n_val, replace=False).tolist())
        for i, (name, text) in enumerate(documents):
            yield "val" if i in val else "train", name, text
    elif val_fraction:
        for name, text in documents:
            cut = int(len(text) * (1 - val_fraction))
            yield "train", name, text[:cut]
            yield "val", name, text[cut:]
    else:
        for name, text in documents:
            yield "train", name, text


# ---- tokenizing, in this process or in several ----------------------------------------------------------------------

def _encode_all(pieces, tokenizer: Tokenizer, workers: int):
    """Yields (split, name, ids, bytes of text) in the order of `pieces`, at most a few tasks ahead of the reader."""
    if workers == 1:
        for piece in pieces:
            yield _encode(tokenizer, piece)
        return
    # spawn, since a forked copy of a process with threads can hang.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (tokenizer.to_json(),))
    try:
        waiting = deque()
        for task in _tasks(pieces):
            waiting.append(_submit(pool, task))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for memory; take fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool, task):
    """Workers are started here, on demand, and inherit the mask: Ctrl-C is for this process alone."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode_task, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _tasks(pieces):
    task, characters = [], 0
    for piece in pieces:
        task.append(piece)
        characters += len(whole(piece[2]))
        if characters >= TASK_CHARACTERS:
            yield task
            task, characters = [], 0
    if task:
        yield task


def _start_worker(tokenizer_json: dict):
    global _worker_tokenizer
    # A parent that is killed cannot end its workers, and they would wait for it for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker_tokenizer = from_json(tokenizer_json)


def _encode_task(task):
    return [_encode(_worker_tokenizer, piece) for piece in task]


def _encode(tokenizer: Tokenizer, piece):
    split, name, text = piece
    try:
        before = np.array([] if tokenizer.bos is None else [tokenizer.bos], tokenizer.dtype)
        if isinstance(text, str):
            ids = np.concatenate([before, tokenizer.encode(text)])
        else:
            prompt, completion = (tokenizer.encode(part).astype(PAIRS) for part in text)
            ids = np.concatenate([~before.astype(PAIRS), ~prompt, completion])
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return split, name, ids, len(whole(text).encode("utf-8"))


def whole(text: str | tuple[str, str]) -> str:
    """The text of a document, or of a pair."""
    return text if isinstance(text, str) else "".join(text)


# ---- reading dataset.json -------------------------------------------------------------------------------------------

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
            counts |= dict.fromkeys(("targets", "padding", "left_out"), int)
        check(split, f"splits.{name}.", **counts)
    for field, allowed in (("block_size", range(1, MAX_BLOCK + 1)), ("dtype", ("uint16", "uint32", PAIRS))):
        if card[field] not in allowed:
            raise UserError(f"{path}: {field} is {card[field]!r:.60}; convert the text again")
    return card


def load_index(file: Path, card: dict, split: str, path: str | None = None) -> list[dict]:
    """The shards that a split's index.json lists, all that is said of them checked before streaming acts on it.

    It would follow a name out of the folder, delete a shard that is compressed by name alone, and decode any column.
    UserError names the file, or where it came from: path.
    """
    path = path or file
    wanted = dict(version=2, format="mds", column_names=["tokens"],
                  column_encodings=[f"ndarray:{card['dtype']}:{card['block_size'] + 1}"],
                  column_sizes=[(card["block_size"] + 1) * np.dtype(card["dtype"]).itemsize])
    samples = card["splits"][split]["samples"]
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        for shard in index["shards"]:
            for key, value in wanted.items():
                if shard[key] != value:
                    raise ValueError(f"{key} is {shard[key]!r:.60}, and {value!r} by dataset.json")
            if type(shard["samples"]) is not int or shard["samples"] < 1 or type(shard["size_limit"]) not in (int, type(None)) \
                    or (shard["compression"] is None) != (shard["zip_data"] is None):
                raise ValueError("samples, size_limit or compression are of the wrong kind")
            for file in filter(None, (shard["raw_data"], shard["zip_data"])):
                name = file["basename"]
                if Path(name).name != name or name in ("", "..") or not name.isprintable():
                    raise ValueError(f"{name!r:.60} is no file of its folder")
                if type(file["bytes"]) is not int or not all(type(value) is str for value in file["hashes"].values()):
                    raise ValueError(f"bytes or hashes of {name!r:.60} are of the wrong kind")
        if (found := sum(shard["samples"] for shard in index["shards"])) != samples or index["version"] != 2:
            raise ValueError(f"it holds {found} samples, and {samples} by dataset.json")
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; copy it again, or convert the text again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again, or convert the text again") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); copy it again, or convert the text again") from None
    return index["shards"]
