"""Documents -> a dataset folder, as fast as they can be tokenized, whatever kills it on the way.

The input is cut into tasks that are fixed by the input alone (documents.py). Workers read and tokenize them; this process
takes their tokens in order, and appends them to the shards (shards.py). So neither the number of workers nor an
interruption can change a byte. Every few seconds the state is noted: the number of tasks that are done, and how far the
shards are good. A killed conversion goes on from there.

    .NAME.partial/            beside the folder to be, and renamed into its place at the end
        plan.json, source/    options, tokenizer, tasks: the same command goes on only with the same ones
        state.json            how far it is
        dataset/              train/, val/, at last dataset.json
"""

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path

import numpy as np

from nanogpt.documents import Inputs, Source, Task
from nanogpt.errors import Unread, UserError
from nanogpt.shards import FORMAT, PAIRS, PairWriter, SplitWriter, check_options, load_dataset_card
from nanogpt.tokenizer import Tokenizer, from_json, make

NOTE_S = 2     # seconds between two notes of the state
TELL_S = 60    # seconds between two lines in a log, where there is no terminal
GROUP = 32     # tasks whose documents are shuffled among each other
BUNDLE = 1 << 18  # bytes of text that a worker gets at least
WARM = 1 << 26  # bytes of input, from which on workers are started before they have to do
PIECE = 1 << 20  # ids that are held at a time, of those that are there already
RANKS = "tokenizer.tiktoken"
NO_SHUFFLE = ("--shuffle-documents: reads here and there, which neither compressed files allow nor Parquet files of large row "
              "groups; unpack them, or leave it out")


class BadText(UserError):
    """A document that cannot be converted: with these options there is nothing to go on to."""


class WorkerLost(UserError):
    pass


def convert(inputs: Inputs, out, tokenizer: Tokenizer | str, block_size: int, *, stride: int | None = None,
            val_fraction: float = 0.01, seed: int = 2357, workers: int = 1, compression: str | None = None,
            overwrite: bool = False, skip_long: bool = False, shuffle: int | None = None,
            like_nanogpt: bool = False) -> tuple[dict, bool]:
    """Writes the dataset folder, or URL, `out` from the documents of `inputs`.

    tokenizer      one, or what is to be made of the text: "char", "bpe-4096"
    stride         tokens from one training sample to the next; block_size if None
    val_fraction   share of the documents, or of the characters of a single one, for validation; 0: no such split
    seed           chooses the validation documents
    workers        processes that tokenize; the result does not depend on it
    compression    "zstd" or None
    overwrite      replace a dataset that is there, or an unfinished one with other options
    skip_long      leave out and count the pairs that are longer than a sample, instead of a UserError
    shuffle        seed of the order of the documents; None: that of the input
    like_nanogpt   draw the validation documents as the datasets library does in nanoGPT's prepare.py

    Returns (card, written): what dataset.json says, and False when `out` already held just this.
    UserError: a bad option, text that is too short or cannot be encoded, a folder in the way, or no way to write.
    """
    check_options(block_size, stride, val_fraction, seed, workers, inputs.pairs)
    if inputs.pairs and not isinstance(tokenizer, str) and tokenizer.eot is None:
        raise UserError(f"--tokenizer: {tokenizer.name} has no end-of-text, by which a model tells that a completion is over")
    if shuffle is not None and not inputs.seekable:
        raise UserError(NO_SHUFFLE)
    stride = block_size + 1 if inputs.pairs else stride or block_size  # samples of pairs have nothing in common
    card = {"format": FORMAT, "tokenizer": tokenizer if isinstance(tokenizer, str) else tokenizer.to_json(),
            "block_size": block_size, "splits": {}, "left_out": {},
            "source": {**inputs.options, "stride": stride, "seed": seed, "val_fraction": val_fraction,
                       "compression": compression, "skip_long": skip_long, "shuffle": shuffle,
                       "like_nanogpt": like_nanogpt}}
    card["dtype"] = PAIRS if inputs.pairs else "" if isinstance(tokenizer, str) else tokenizer.dtype.name  # "": not known yet
    scan = functools.cache(lambda: inputs.scan(val_fraction, True if isinstance(tokenizer, str) else tokenizer.cuttable))
    with _Place(out) as place:
        if there := place.already_there(card, inputs, scan, overwrite):
            place.sweep()
            return there, False
        with _Pool(workers, None if inputs.bytes < WARM or isinstance(tokenizer, str) else tokenizer) as pool:
            job = _Job(place, card, inputs, scan, tokenizer, overwrite)
            job.run(pool)
        place.publish(job.card)
    return job.card, True


def convert_tokens(splits: dict[str, np.ndarray], out, tokenizer: Tokenizer, block_size: int, *, stride: int | None = None,
                   compression: str | None = None, overwrite: bool = False, source: dict | None = None) -> tuple[dict, bool]:
    """As `convert`, but from {"train": ids (n,), "val": ids (n,)} as they are, with whatever ends documents in them.

    UserError, beside those of `convert`: an id that the tokenizer does not have.
    """
    check_options(block_size, stride, val_fraction=0, seed=0, workers=1)
    card = {"format": FORMAT, "tokenizer": tokenizer.to_json(), "block_size": block_size, "dtype": tokenizer.dtype.name,
            "splits": {}, "source": {**(source or {}), "stride": stride or block_size, "compression": compression}}
    with _Place(out) as place:
        if there := place.already_there(card, None, None, overwrite):
            return there, False
        place.clear()
        _write_tokens(splits, place.dataset, tokenizer, card)
        place.publish(card)
    return card, True


def _write_tokens(splits: dict[str, np.ndarray], folder: Path, tokenizer: Tokenizer, card: dict):
    """Writes folder/train and folder/val from the ids of `splits`, and puts their counts into card["splits"]."""
    from tqdm import tqdm

    block_size, token_bytes = card["block_size"], tokenizer.token_bytes()
    with tqdm(total=sum(map(len, splits.values())), unit=" tokens", unit_scale=True, disable=None) as bar:
        for name, ids in splits.items():
            if len(ids) <= block_size:
                raise UserError(f"the {name} split has {len(ids)} tokens, and a sample takes block_size + 1 = "
                                f"{block_size + 1}; take a smaller --block-size")
            split = SplitWriter(folder / name, card, card["source"]["stride"] if name == "train" else block_size)
            for start in range(0, len(ids), PIECE):
                piece = np.array(ids[start:start + PIECE])
                counts = np.bincount(piece, minlength=tokenizer.vocab_size)
                if len(counts) > tokenizer.vocab_size:
                    raise UserError(f"the {name} split holds id {len(counts) - 1}, and {tokenizer.name} ends at "
                                    f"{tokenizer.vocab_size - 1}; take the tokenizer that made the ids")
                ends = int(counts[tokenizer.eot]) if tokenizer.eot is not None else 0
                split.add(piece.astype(tokenizer.dtype), None, ends, int(counts @ token_bytes))
                bar.update(len(piece))
            split.documents += int(ids[-1] != tokenizer.eot)  # the last one, without its end
            card["splits"][name] = split.finish()


# ---- where it is written --------------------------------------------------------------------------------------------

def partial_folder(out) -> Path:
    """Where a dataset is made: beside the folder it is to be; for a URL, in the current folder. UserError: no such place."""
    if "://" in str(out):
        url = str(out).rstrip("/")
        return Path.cwd() / f".{url.rsplit('/', 1)[-1]}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.partial"
    try:
        out = Path(out).resolve()
    except (OSError, RuntimeError) as error:  # links that lead to each other
        raise UserError(f"{out}: leads nowhere ({error}); take another --out") from None
    return out.parent / f".{out.name}.partial"


class _Place:
    """The folder or URL of a dataset, and the partial folder beside it (for a URL: here) in which it is made."""

    def __init__(self, out):
        self.url = str(out).rstrip("/") if "://" in str(out) else None
        self.partial = partial_folder(out)
        if not self.url:
            self.out = Path(out).resolve()
        self.name, self.dataset = self.url or self.out, self.partial / "dataset"
        self.made = False

    def __enter__(self) -> "_Place":
        return self

    def __exit__(self, kind, error, _):
        if not self.made:
            return
        if isinstance(error, BadText) or not (self.partial / "state.json").exists():  # nothing is done yet
            self._remove()
        elif error and not isinstance(error, UserError):
            print(f"note: what is done is kept in {self.partial}; the same command goes on from there", file=sys.stderr)
        self.lock.release()  # again, where it is removed: that does no harm
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or self.name}: cannot be written ({error.strerror or error}); make room, or take "
                            "another --out") from error

    # ---- what is there already

    def already_there(self, card: dict, inputs: Inputs | None, scan, overwrite: bool) -> dict | None:
        """The card of what is there, if it is what `card` asks for; None: it may be written. UserError: it is in the way."""
        if self.url:
            old, written = self._remote_card(), math.inf  # nothing is known of when the upload was
            if old and overwrite:
                raise UserError(f"{self.url}: holds a dataset, and --overwrite is for folders; remove it, or take another --out")
        else:
            try:
                if os.path.ismount(self.out):
                    raise UserError(f"{self.out}: is where a disk is mounted, and cannot be replaced; take a folder in it")
                old, written = self._local_card(overwrite)
            except OSError as error:
                raise UserError(f"{self.out}: cannot be read ({error.strerror}); take another --out") from None
        if old is None or overwrite:
            return None
        made = isinstance(card["tokenizer"], str)  # of the text
        differs = differences({**old, "tokenizer": old["tokenizer"]["name"]} if made else old,
                              {key: card[key] for key in ("tokenizer", "block_size", "dtype", "source") if card[key] != ""})
        if inputs and not differs:
            known = {key: old["source"].get(key) for key in ("paths", "bytes", "files")}
            unchanged = not inputs.newest or inputs.newest < written and known == dict(  # 0: a fixed revision of the hub
                paths=inputs.options["paths"], bytes=inputs.bytes, files=len(inputs.files))
            if not unchanged:
                differs = differences(old["source"], scan().identity, "source.")
        if differs:
            raise UserError(f"{self.name}: holds another dataset ({', '.join(differs)}); take another --out"
                            + (" or --overwrite" if not self.url else ""))
        return old

    def _local_card(self, overwrite: bool) -> tuple[dict | None, float]:
        """(card, when it was written) of a dataset folder; (None, 0): there is none. UserError: something else is there."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return None, 0
        names = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        if "dataset.json" not in names or names - {"train", "val", "dataset.json", RANKS}:  # --overwrite removes no others
            raise UserError(f"{self.out}: exists and is not a dataset folder; take another --out")
        return (None, 0) if overwrite else (load_dataset_card(self.out), (self.out / "dataset.json").stat().st_mtime)

    def _remote_card(self) -> dict | None:
        from nanogpt.upload import fetch
        there = self._scratch() / "there"
        return load_dataset_card(there) if fetch("dataset.json", there, self.url) else None

    # ---- making it

    def _scratch(self) -> Path:
        """The partial folder, which is no other process's from here on."""
        if not self.made:
            import filelock
            try:
                self.partial.mkdir(parents=True, exist_ok=True)
                self.lock = filelock.FileLock(self.partial / "lock")
                self.lock.acquire(timeout=0)
            except filelock.Timeout:
                raise UserError(f"{self.name}: another conversion writes it; wait for its end, or take another --out") from None
            except OSError as error:
                raise UserError(f"{self.name}: cannot be written ({error.strerror or error}); take another --out") from None
            self.made = True
        return self.partial

    def clear(self):
        """Throws away what an earlier conversion left."""
        (self._scratch() / "plan.json").unlink(missing_ok=True)  # without it nothing goes on from the rest
        for path in self._scratch().iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.dataset.mkdir()

    def note(self, name: str, value: dict):
        """Puts JSON into a file of the partial folder, whole or not at all."""
        aside = self.partial / f"{name}.new"
        with open(aside, "w") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.partial / name)

    def read(self, name: str) -> dict | None:
        try:
            return json.loads((self.partial / name).read_text())
        except (OSError, ValueError):
            return None

    def publish(self, card: dict):
        """dataset.json is written, and all is put into its place."""
        file = self.dataset / "dataset.json"
        file.write_text(json.dumps(card, indent=1) + "\n")
        if self.url:
            self._upload([path for path in self.dataset.rglob("*") if path.is_file() and path != file])
            self._upload([file])
        else:
            aside = self.partial / "old"
            if self.out.exists():
                self._local_card(overwrite=True)  # UserError: somebody has put something else there meanwhile
                os.rename(self.out, aside)
            try:
                os.rename(self.dataset, self.out)
            except BaseException:
                if aside.exists():
                    os.rename(aside, self.out)
                raise
        self._remove()

    def _remove(self):
        """Removes the partial folder; first the plan, without which nothing goes on from what a kill leaves of it."""
        (self.partial / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.made = False
        self.lock.release()

    def sweep(self):
        """Removes what a process left that was killed when it had published, and nothing that can still go on."""
        if self.url or self.partial.exists() and not self.dataset.exists():
            self._scratch()
            self._remove()

    def upload_shards(self, names: list[str]):
        """The complete shards that a state has noted go up, and are gone here. What is not here any more is there."""
        if self.url:
            self._upload([path for name in names if (path := self.dataset / name).exists()])

    def _upload(self, paths: list[Path]):
        from nanogpt.upload import upload
        if paths:
            upload(paths, self.dataset, self.url)


# ---- doing it -------------------------------------------------------------------------------------------------------

class _Job:
    """One conversion, from its plan to the last shard."""

    def __init__(self, place: _Place, card: dict, inputs: Inputs, scan, tokenizer: Tokenizer | str, overwrite: bool):
        """Takes up what an earlier process left, or makes a plan. UserError: it left something else."""
        self.place, self.trained = place, isinstance(tokenizer, str) and tokenizer != "char"
        plan = place.read("plan.json") if place._scratch() and place.dataset.exists() else None  # not there: published
        state = place.read("state.json") if plan else None
        asked = {**card, "files": inputs.files, "bytes": inputs.bytes}
        if plan and not (differs := differences(plan["asked"], asked)):
            self.source = Source.load(place.partial / "source")
            if changed := self.source.changed():
                differs = [changed]
        if plan and differs and state and not overwrite:
            raise UserError(f"{place.partial}: is a conversion that is not finished, and was begun with others ({', '.join(differs)}); "
                            "go on with those, remove it, or begin anew with --overwrite")
        if not plan or differs:
            place.clear()
            self.source, state = scan(), None
            if card["source"]["val_fraction"] and self.source.documents == 1 and not self.source.single:
                raise UserError(f"--val-fraction: a single {'pair' if inputs.pairs else 'document'} is not cut in two; give more of "
                                "them, or --val-fraction 0")
            if card["source"]["shuffle"] is not None and not self.source.seekable:
                raise UserError(NO_SHUFFLE)
            (place.partial / "source").mkdir()
            self.source.save(place.partial / "source")
            if isinstance(tokenizer, str):
                tokenizer = make(tokenizer, self.source.texts())
            plan = dict(asked=asked, tokenizer=tokenizer.to_json())
            place.note("plan.json", plan)
        self.tokenizer = from_json(plan["tokenizer"])
        self.card = {**card, "tokenizer": plan["tokenizer"], "dtype": PAIRS if inputs.pairs else self.tokenizer.dtype.name,
                     "source": {**card["source"], **self.source.identity}}
        self.state = state or dict(done=0, splits={}, left_out={})
        self.held_out = _held_out(self.source, card["source"])
        self.order, self.flush = arranged(self.source.tasks, card["source"]["shuffle"])

    def run(self, pool: "_Pool"):
        """Writes the shards, and what there is to tell of them into the card."""
        card, state = self.card, self.state
        strides = {"train": card["source"]["stride"]} | ({"val": card["block_size"]} if len(self.held_out) else {})
        self.writers = {name: PairWriter(self.place.dataset / name, card, state["splits"].get(name)) if card["dtype"] == PAIRS
                        else SplitWriter(self.place.dataset / name, card, stride, state["splits"].get(name))
                        for name, stride in strides.items()}
        self.done, self.between = self.state["done"], True  # between two tasks, so that a note is right
        try:
            self._write(pool)
        except BadText:
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                if self.between and self.done:
                    self._note()
            raise
        if changed := self.source.changed():
            raise UserError(f"{changed}: has changed while it was converted; remove {self.place.partial}, and run this again")
        try:
            for name, writer in self.writers.items():
                card["splits"][name] = writer.finish()
        except UserError as error:  # too little of it
            raise BadText(str(error)) from None
        card["left_out"] = self.state["left_out"]
        if self.trained:
            (self.place.dataset / RANKS).write_bytes(self.tokenizer.ranks_file())  # type: ignore[attr-defined]  # a BPE

    def _write(self, pool: "_Pool"):
        from tqdm import tqdm

        card, waiting, began, first = self.card, [], time.monotonic(), self.done
        told = noted = began
        before = sum(writer.tokens for writer in self.writers.values())
        encoding = self.source, self.tokenizer, self.held_out, card["block_size"] + 1, card["source"]["skip_long"]
        results = _told(pool.results(encoding, self.order[self.done:], self.place.partial))
        bar_format = "{percentage:3.0f}%|{bar}| {desc}, {elapsed}, {remaining} left"
        with contextlib.closing(results), \
                tqdm(total=len(self.order), initial=self.done, bar_format=bar_format, disable=None) as bar:
            for position, result in enumerate(results, self.done):
                waiting.append(result)
                bar.update()
                if not self.flush[position]:
                    continue
                self.between = False
                for name, writer in self.writers.items():
                    if parts := [result.splits[name] for result in waiting if name in result.splits]:
                        writer.add(*self._in_order(parts, position))
                for result in waiting:
                    for why, n in result.left_out.items():
                        self.state["left_out"][why] = self.state["left_out"].get(why, 0) + n
                waiting, self.done, self.between = [], position + 1, True
                now = time.monotonic()
                tokens = sum(writer.tokens for writer in self.writers.values())
                documents = sum(writer.documents for writer in self.writers.values())
                short = [tqdm.format_sizeof(n) for n in (documents, tokens, (tokens - before) / max(1e-9, now - began))]
                said = f"{short[0]} documents, {short[1]} tokens, {short[2]} tokens/s"
                bar.set_description_str(said, refresh=False)
                if bar.disable and now > told + TELL_S:  # into a log
                    left = (now - began) / max(1, self.done - first) * (len(self.order) - self.done)
                    print(f"{self.done / len(self.order):.0%}  {said}, {left / 60:.0f} min left", file=sys.stderr, flush=True)
                    told = now
                if now > noted + NOTE_S:
                    self._note()
                    noted = time.monotonic()
        self._note()

    def _in_order(self, parts: list[tuple], position: int) -> tuple:
        """(ids, lengths, documents, bytes) of all parts; with a shuffle, the documents of the group in another order."""
        ids, lengths = (np.concatenate(column) for column in list(zip(*parts))[:2])
        shuffle = self.card["source"]["shuffle"]
        if shuffle is not None and len(lengths) > 1:  # RandomState: numpy promises that it will draw the same for ever
            documents = np.split(ids, np.cumsum(lengths)[:-1])
            order = np.random.RandomState([shuffle % 2**32, position]).permutation(len(lengths))
            ids, lengths = np.concatenate([documents[i] for i in order]), lengths[order]
        return ids, lengths, sum(part[2] for part in parts), sum(part[3] for part in parts)

    def _note(self):
        """Notes down how far it is; complete shards of a URL go up."""
        self.state |= dict(done=self.done, splits={name: writer.state() for name, writer in self.writers.items()})
        self.place.note("state.json", self.state)
        for name, writer in self.writers.items():
            writer.shards.forget()
            files = [shard["zip_data"] or shard["raw_data"] for shard in writer.shards.shards]
            self.place.upload_shards([f"{name}/{file['basename']}" for file in files])


def differences(was: dict, now: dict, where: str = "") -> list[str]:
    """The keys, as "source.seed", of a card, or a part of one, for which another was different; `paths` are for people."""
    found = []
    for key in now:
        if key == "source":
            found += differences(was[key], now[key], f"{where}{key}.")
        elif was.get(key) != now[key] and key != "paths":
            found.append(f"{where}{key}")
    return found


def _held_out(source: Source, asked: dict) -> np.ndarray:
    return validation(source.documents, asked["val_fraction"], asked["seed"], asked["like_nanogpt"], source.single)


def validation(documents: int, val_fraction: float, seed: int, like_nanogpt: bool, single: bool) -> np.ndarray:
    """The numbers of the validation documents, sorted: (n,) int64.

    like_nanogpt: those of datasets' train_test_split, by which nanoGPT's prepare.py splits OpenWebText.
    """
    if not val_fraction:
        return np.empty(0, np.int64)
    if single:
        return np.array([1])
    generator = np.random.default_rng(seed)
    if like_nanogpt:
        return np.sort(generator.permutation(documents)[:math.ceil(val_fraction * documents)])
    n_val = min(max(1, round(documents * val_fraction)), documents - 1)
    return np.sort(generator.choice(documents, n_val, replace=False))


def arranged(tasks: np.ndarray, shuffle: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(order of the tasks (n,), where the documents so far may be written (n,) bool).

    With a shuffle whole groups of tasks from all over the input are written together, so that their documents can change
    places. The tasks of a long document stay together, and are no group with others.
    """
    n = len(tasks)
    if shuffle is None:
        return np.arange(n), np.ones(n, bool)
    starts = np.flatnonzero(tasks[:, Task._fields.index("begins")])  # units of one task, or all those of a long document
    units = np.split(np.arange(n), starts[1:])
    order, flush = [], []
    waiting = 0
    for i in np.random.RandomState([shuffle % 2**32, n]).permutation(len(units)):
        unit = units[i]
        if len(unit) > 1 and waiting:
            flush[-1], waiting = True, 0
        order.append(unit)
        waiting = 0 if len(unit) > 1 else (waiting + 1) % GROUP
        flush += [not waiting] * len(unit)
    flush[-1:] = [True] * min(1, n)
    return np.concatenate([*order, np.empty(0, np.int64)]), np.array(flush, bool)


# ---- tokenizing, in this process or in several ----------------------------------------------------------------------

class Result:
    """What a task comes to. splits: {"train": (ids (n,), lengths of documents or pieces (d,), documents that end, bytes)}"""

    def __init__(self):
        self.splits, self.left_out = {}, {}


class _Pool:
    """Worker processes, or this one if it is alone."""

    def __init__(self, workers: int, warm: Tokenizer | None):
        """warm: the workers start at once, and load this tokenizer while the text is scanned."""
        self.workers = workers
        # spawn, since a forked copy of a process with threads can hang.
        spawn, tokenizer = multiprocessing.get_context("spawn"), warm.to_json() if warm else None
        self.pool = ProcessPoolExecutor(workers, spawn, _start_worker, (tokenizer,)) if workers > 1 else None
        for _ in range(workers if warm and self.pool else 0):
            self._submit(time.sleep, 0)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def results(self, encoding: tuple, order: np.ndarray, folder: Path):
        """Yields the Result of each task in order, at most a few tasks ahead of the reader.

        encoding: the first arguments of _encode, which workers take from the plan in `folder`.
        """
        source = encoding[0]
        if not self.pool or len(order) < 2:
            for task, data in source.feed(order):
                yield _encode(*encoding, task, data)  # type: ignore[call-arg]  # encoding is five of them
            return
        try:
            waiting = deque()
            for bundle in _bundles(source, order):
                waiting.append(self._submit(_encode_bundle, folder, bundle))
                if len(waiting) > 3 * self.workers + 12:  # they have to do while this process waits for the disk
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise WorkerLost("a worker process was killed, perhaps for memory; the same command goes on, with fewer --workers "
                             "too") from None

    def _submit(self, function, *args):
        """Workers are started here, on demand, and inherit the mask: Ctrl-C is for this process alone."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self.pool.submit(function, *args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _told(results):
    try:
        yield from results
    except (WorkerLost, Unread):
        raise
    except UserError as error:
        raise BadText(str(error)) from None


def _bundles(source: Source, order: np.ndarray):
    """The tasks with their data; those of tiny files go to a worker together."""
    bundle, weight = [], 0
    for task, data in source.feed(order):
        bundle.append((task, data))
        weight += source.weight(task)
        if weight >= BUNDLE:
            yield bundle
            bundle, weight = [], 0
    if bundle:
        yield bundle


def _start_worker(tokenizer: dict | None):
    # A parent that is killed cannot end its workers, and they would wait for it for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)),  # type: ignore[func-returns-value]
                     daemon=True).start()
    if tokenizer:
        from_json(tokenizer)


@functools.cache
def _encoding(folder: Path) -> tuple:
    plan, source = json.loads((folder / "plan.json").read_text()), Source.load(folder / "source")
    asked = plan["asked"]
    return (source, from_json(plan["tokenizer"]), _held_out(source, asked["source"]), asked["block_size"] + 1,
            asked["source"]["skip_long"])


def _encode_bundle(folder: Path, bundle: list):
    return [_encode(*_encoding(folder), task, data)  # type: ignore[call-arg]  # as above
            for task, data in bundle]


def _encode(source: Source, tokenizer: Tokenizer, val: np.ndarray, size: int, skip_long: bool, task: Task, data) -> Result:
    """Tokenizes the documents of a task. UserError names the one that cannot be."""
    bos = np.array([] if tokenizer.bos is None else [tokenizer.bos], tokenizer.dtype)
    eot = np.array([] if tokenizer.eot is None else [tokenizer.eot], tokenizer.dtype)
    result, parts = Result(), {}
    first, last = np.searchsorted(val, (task.first, task.first + task.documents))
    held_out = set(val[first:last].tolist())
    for document in source.read(task, data):
        if document.text is None:
            result.left_out[document.left_out] = result.left_out.get(document.left_out, 0) + 1
            continue
        try:
            if isinstance(document.text, str):
                pieces = [bos] * document.begins + [tokenizer.encode(document.text)] + [eot] * document.ends
                n_bytes = len(document.text.encode())
            else:
                prompt, completion = (tokenizer.encode(part).astype(PAIRS) for part in document.text)
                pieces = [~bos.astype(PAIRS), ~prompt, completion, eot.astype(PAIRS)]
                n_bytes = sum(len(part.encode()) for part in document.text)
        except UserError as error:
            raise UserError(f"{document.name}: {error}") from None
        length = sum(map(len, pieces))
        if source.pairs:
            needed = length + (len(bos) + len(prompt) == 0)  # end-of-text before it at the beginning of a sample
            if needed > size and skip_long:
                result.left_out["too long"] = result.left_out.get("too long", 0) + 1
                continue
            if needed > size:
                raise UserError(f"{document.name}: is {needed} tokens long, and a sample holds block_size + 1 = {size}; take a "
                                f"--block-size of {needed - 1} or more, or --errors skip, which leaves out such pairs")
        of = parts.setdefault("val" if document.number in held_out else "train", ([], [], [], []))
        of[0].extend(pieces)
        of[1].append(length)
        of[2].append(bool(document.ends))
        of[3].append(n_bytes)
    for name, (pieces, lengths, ends, n_bytes) in parts.items():
        result.splits[name] = np.concatenate(pieces), np.array(lengths), sum(ends), sum(n_bytes)
    return result
