"""Where documents come from: text, JSONL, Parquet, pairs, Hugging Face datasets. Read twice, never held.

    inputs = text_files(["books", "more.jsonl.gz"])   what the user named: names, sizes and times
    source = inputs.scan(val_fraction, cuttable)      reads it all once: how many documents, a hash, a table of tasks
    for task, data in source.feed(order):             in the parent
        for document in source.read(task, data):      in a worker

A task is a chunk of whole documents of one file, or a piece of a long one, about CHUNK bytes of text; the input alone
decides what the tasks are. A plain text of more than CHUNK bytes is read in pieces, which end at a *safe cut*: before a
blank, a newline or one of 、。， that follows a letter or a digit. There the split patterns of GPT-2, cl100k, o200k and the
like always cut too, so that the pieces have the token ids of the whole. A text without such places, a line of JSONL and a
cell of Parquet are read whole, however long they are.
"""

import codecs
import contextlib
import fnmatch
import glob
import gzip
import json
import os
import re
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np

from nanogpt.errors import UserError

CHUNK = 1 << 20  # bytes of text a task
BLOCK = 1 << 22  # bytes that a scan reads at a time
GROUP = 8  # row groups of up to so many CHUNKs are one task each, so that no two workers decode the same one
ROWS = 1 << 14  # of a task, at most: equal texts take no room in a Parquet file
CONNECT_S = 10  # seconds until the hub has to answer

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}  # of names; text, if none of these
PACKED = (".gz", ".zst")


class Task(NamedTuple):
    """A row of Source.tasks: whole documents of one file, or a piece of a long one."""
    file: int       # number of the file
    start: int      # bytes of the unpacked file; rows of Parquet and Arrow; items of a list
    end: int
    first: int      # number of the first document, over all files, empty and bad ones included
    documents: int  # how many; 1, of a piece
    begins: int     # 1: a document begins at start; 0: a piece from further on
    ends: int       # 1: a document ends at end; 0: it goes on in the next task


class Document(NamedTuple):
    """A document, or a piece of one."""
    number: int
    name: str       # for messages: FILE, "FILE, document N", FILE:LINE (both from 1), "FILE, row N" (from 0)
    text: str | tuple[str, str] | None  # (prompt, completion) of a pair; None: left out
    left_out: str   # "", or why: "empty", "undecodable", "no pair"
    begins: bool    # True, True, but for the pieces of a long one
    ends: bool


class File(NamedTuple):
    path: str
    format: str     # text, jsonl, pairs, parquet, arrow
    packing: str    # "", ".gz" or ".zst"
    size: int
    mtime_ns: int   # -1 on the hub, where a revision does not change
    fed: bool       # read by the parent alone


# ---- what the user named --------------------------------------------------------------------------------------------

class Inputs:
    """What the user named, before it is read.

    options  JSON: all that decides which documents there are; its `paths` are for people
    bytes    of all files as they are, packed or not
    files    their paths
    newest   time.time() of the last change of a file's contents or attributes; 0.0 for a revision of the hub
    pairs    whether the documents are (prompt, completion)
    """
    def __init__(self, options: dict, files: list[File], newest: float = 0.0, separator: bytes | None = None):
        self.options, self._files, self.newest, self.separator = options, files, newest, separator
        self.pairs = options["kind"] == "pair files"

    @property
    def files(self) -> list[str]:
        return [file.path for file in self._files]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self._files)

    @property
    def paths(self) -> str:
        return " ".join(self.options["paths"])

    @property
    def seekable(self) -> bool:
        """False: a file is packed, so that its tasks are to be fed in ascending order."""
        return not any(file.packing for file in self._files)

    def scan(self, val_fraction: float, cuttable: bool, progress: bool = True) -> "Source":
        """Reads every byte once, of remote Parquet files the footers alone.

        cuttable: whether a long text may be tokenized in pieces.
        UserError: a file that cannot be read, or is damaged; no such column; nothing there at all.
        """
        source = Source(self.options, list(self._files), self.separator)
        source._scan(val_fraction, cuttable, progress)
        if not source.bytes:
            raise UserError(f"{self.paths}: holds no {'pair' if self.pairs else 'text'}; give files that are not empty")
        return source


def text_files(inputs: list[str], pattern: str = "*", out="", *, errors: str = "strict", format: str | None = None,
               column: str = "text", separator: bytes | None = None, pairs: bool = False) -> Inputs:
    """Text files, JSONL and Parquet files, .gz and .zst of the first two; or, with pairs, JSONL of prompts and completions.

    inputs     files, folders and globs
    pattern    of the names of files that are taken from folders
    out        folder to be written, which may not lie in one of these; or a URL
    errors     what is not UTF-8, no JSON or has no text: "strict" (UserError), "replace" what is not UTF-8, "skip" it
    format     "text", "jsonl" or "parquet", whatever the names are
    column     of JSONL and Parquet: which one is the text
    separator  what stands between the documents of a text file; None: a file is a document
    UserError: nothing of that name, or options that do not go together
    """
    files, newest = [], 0.0
    for path in find_files(inputs, pattern, out):
        name = path.name.lower()
        packing = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
        suffix = os.path.splitext(name.removesuffix(packing))[1]
        kind = "pairs" if pairs else format or FORMATS.get(suffix, "text")
        if kind == "parquet" and packing:
            raise UserError(f"{path}: a Parquet file is read from its end on; unpack it first")
        file, changed = _stat(str(path), kind, packing)
        files.append(file)
        newest = max(newest, changed)
    if separator is not None and not any(file.format == "text" for file in files):
        raise UserError("--document-separator: is for text files, and there is none; leave it out, or take --format text")
    if not any(file.size or file.format == "parquet" for file in files):
        raise UserError(f"{' '.join(inputs)}: holds no {'pair' if pairs else 'text'}; give files that are not empty")
    options = {"kind": "pair files" if pairs else "text files", "paths": inputs, "glob": pattern, "format": format,
               "column": column, "separator": separator and separator.decode("utf-8", "backslashreplace"), "errors": errors}
    return Inputs(options, files, newest, separator)


def find_files(inputs: list[str], pattern: str, out) -> list[Path]:
    """The files of all inputs in their order, those of a folder or of a glob sorted by path, each once."""
    out = "" if "://" in str(out) else out
    files = {}
    for given in inputs:
        paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        if not paths:
            raise UserError(f"{given}: is not there; --input takes files, folders and quoted globs")
        for path in map(Path, paths):
            if path.is_dir():
                if out and Path(out).resolve().is_relative_to(path.resolve()):
                    raise UserError(f"{out}: lies inside the input {path}; take an --out elsewhere")
                walk = os.walk(path, onerror=_stop)
                found = [Path(folder, name) for folder, _, names in walk for name in fnmatch.filter(names, pattern)]
                found = sorted(file for file in found if file.is_file())
                if not found:
                    raise UserError(f"{path}: holds no file that matches {pattern}; take another folder or --glob")
            elif path.is_file():
                found = [path]
            else:
                raise UserError(f"{path}: is neither a file nor a folder")
            files.update((file.resolve(), file) for file in found if file.resolve() not in files)
    return list(files.values())


def _stop(error: OSError):
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")


def _stat(path: str, format: str, packing: str = "") -> tuple[File, float]:
    """A file as it is now, and when it was changed last."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return File(path, format, packing, stat.st_size, stat.st_mtime_ns, bool(packing)), max(stat.st_mtime, stat.st_ctime)


def unescape(text: str) -> bytes:
    r"""The bytes of a separator as typed, with \n \t \r \0 \\ and \xNN in it. UserError: another escape, or nothing."""
    known = {"n": b"\n", "t": b"\t", "r": b"\r", "0": b"\0", "\\": b"\\"}

    def value(match):
        escape = match[1].decode()
        if escape in known:
            return known[escape]
        if len(escape) == 3:
            return bytes.fromhex(escape[1:])
        raise UserError(f"--document-separator: \\{escape} is none of \\n \\t \\r \\0 \\\\ \\xNN; write a backslash as \\\\")

    if not text:
        raise UserError("--document-separator: is empty; leave it out where every file is one document")
    return re.sub(rb"\\(x[0-9a-fA-F]{2}|[\x00-\x7f]|[^\x00-\x7f]+|$)", value, os.fsencode(text))


def spool_stdin(folder: Path) -> Path:
    """Standard input as a file in `folder`. The same text, piped again, is the same file by name, size and time."""
    import xxhash

    partial, digest = folder / f"stdin.partial-{os.getpid()}", xxhash.xxh3_128()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            while block := sys.stdin.buffer.read(BLOCK):
                digest.update(block)
                file.write(block)
        os.utime(partial, (0, 0))  # its name tells what is in it
        path = folder / f"stdin-{digest.hexdigest()}"
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{folder}: cannot hold the standard input ({error.strerror}); make room, or take another --out"
                        ) from None
    return path


class InMemory(Inputs):
    """Documents that are there already, (name, text) or (name, (prompt, completion)): for tests."""

    def __init__(self, documents: Iterable[tuple[str, str | tuple[str, str]]]):
        self.items = list(documents)
        super().__init__({"kind": "in memory", "paths": []}, [], float("inf"))
        self.pairs = bool(self.items) and not isinstance(self.items[0][1], str)

    def scan(self, val_fraction, cuttable, progress=True):
        source = Source(self.options, [], None)
        source._take(self.items, val_fraction, self.pairs)
        if not source.bytes:
            raise UserError("the documents hold no text; give some that are not empty")
        return source


# ---- Hugging Face datasets ------------------------------------------------------------------------------------------

class HuggingFace(Inputs):
    """A split of a dataset of the hub, or of a folder that is laid out like one.

    Parquet files, which most datasets have, are taken as they are: downloaded, or with `streaming` read in place, where
    their footers tell how many rows there are. Any other kind goes through load_dataset, and its Arrow files are read.
    """

    def __init__(self, name: str, config: str | None = None, split: str = "train", column: str = "text",
                 revision: str | None = None, streaming: bool = False, errors: str = "strict"):
        """UserError, in seconds: no such dataset, revision, configuration or split, or no way to the hub."""
        self.local, self.streaming = os.path.isdir(name), streaming
        if self.local and revision:
            raise UserError("--revision: is of a dataset of the hub, and a folder has none; leave it out")
        self.name, commit = (name, None) if self.local else _find_dataset(name, revision)
        options = {"kind": "hugging face", "paths": [name], "config": config, "split": split, "column": column,
                   "revision": commit, "errors": errors}
        super().__init__(options, [])
        self._found = False
        if self.local:  # the search for what is of this split takes seconds, and waits until it is needed
            paths = [os.path.join(folder, file) for folder, _, files in os.walk(name) for file in files]
            self.newest = max((_stat(path, "")[1] for path in paths), default=0.0)

    @property
    def files(self):
        self._find()
        return [file.path for file in self._files]

    @property
    def bytes(self):
        self._find()
        return sum(file.size for file in self._files)

    def _find(self):
        """Looks which data files the split has."""
        if self._found:
            return
        from datasets import DownloadConfig, load_dataset_builder
        from datasets.packaged_modules.parquet.parquet import Parquet
        config, split, commit = (self.options[key] for key in ("config", "split", "revision"))
        try:
            builder = load_dataset_builder(self.name, config, revision=commit, download_config=DownloadConfig(max_retries=1))
        except Exception as error:  # datasets raises whatever comes up
            raise UserError(f"{self._where}: cannot be opened ({_said(error)}); --hf-config names one of its configurations"
                            ) from None
        data_files = builder.config.data_files or {}
        if split not in data_files:
            raise UserError(f"--split: {self._where} has no {split!r}, but {', '.join(map(str, data_files)) or 'none'}")
        paths = [str(path) for path in data_files[split]]
        self._files = [_stat(path, "parquet")[0] for path in paths] if self.local else self._listed(paths)
        self.parquet = isinstance(builder, Parquet) and all(path.lower().endswith(".parquet") for path in paths)
        if self.streaming and not self.parquet:
            raise UserError(f"--streaming: reads Parquet files in place, and {self._where} has files like "
                            f"{os.path.basename(paths[0])}; leave it out")
        self._found = True

    @property
    def _where(self) -> str:
        return self.options["paths"][0]

    def _listed(self, paths: list[str]) -> list[File]:
        """The data files of a revision of the hub with their sizes."""
        from huggingface_hub import HfApi
        prefix = f"hf://datasets/{self.name}@{self.options['revision']}/"
        if not all(path.startswith(prefix) for path in paths):
            raise UserError(f"{self._where}: has data files elsewhere, like {paths[0]}; download them, and take "
                            "tools/convert_text_to_mds.py")
        names = [path[len(prefix):] for path in paths]
        sizes = {}
        try:
            for start in range(0, len(names), 500):
                infos = HfApi().get_paths_info(self.name, names[start:start + 500], repo_type="dataset",
                                               revision=self.options["revision"])
                sizes.update((info.path, info.size) for info in infos)
            return [File(path, "parquet", "", sizes[name], -1, False) for path, name in zip(paths, names)]
        except Exception as error:  # of whichever HTTP library
            raise UserError(f"{self._where}: cannot be listed ({_said(error)}); the same command tries again") from None

    def scan(self, val_fraction, cuttable, progress=True):
        self._find()
        prefix = f"hf://datasets/{self.name}@{self.options['revision']}/"
        identity = None if self.local else [(file.path[len(prefix):], file.size) for file in self._files]
        files = self._files
        try:
            if not self.parquet:
                files = self._arrow()
            elif not self.local and not self.streaming:
                from huggingface_hub import snapshot_download
                names = [name.replace("[", "[[]") for name, _ in identity]
                folder = snapshot_download(self.name, repo_type="dataset", revision=self.options["revision"],
                                           allow_patterns=names)
                files = [_stat(os.path.join(folder, name), "parquet")[0] for name, _ in identity]
        except UserError:
            raise
        except Exception as error:  # of datasets, or of whichever HTTP library
            raise UserError(f"{self._where}: cannot be downloaded ({_said(error)}); the same command goes on where it was"
                            ) from None
        source = Source(self.options, files, None)
        source.given = [len(self._files), sum(file.size for file in self._files)]
        # Arrow files are datasets' own: what identifies them is what they were made of.
        source._scan(val_fraction, cuttable, progress, identity, None if self.parquet else self._files)
        if not source.bytes:
            raise UserError(f"{self._where}: holds no text; take another --split or --column")
        return source

    def _arrow(self) -> list[File]:
        from datasets import load_dataset
        config, split, commit = (self.options[key] for key in ("config", "split", "revision"))
        data = load_dataset(self.name, config, split=split, revision=commit)
        return [_stat(file["filename"], "arrow")[0] for file in data.cache_files]


def _find_dataset(name: str, revision: str | None) -> tuple[str, str]:
    """The full name of a dataset of the hub, and the commit of a branch or tag. UserError: there is none, or no network."""
    from huggingface_hub import HfApi, errors
    where = name + (f"@{revision}" if revision else "")
    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=CONNECT_S)
        return info.id, info.sha
    except errors.GatedRepoError:
        raise UserError(f"{where}: its owner lets only some in; ask for access on the hub, and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{where}: there is no such branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{where}: there is no such dataset on the hub, or it is private: then set HF_TOKEN") from None
    except errors.HFValidationError:
        raise UserError(f"{where}: is neither a folder nor the name of a dataset on the hub, like Skylion007/openwebtext"
                        ) from None
    except Exception as error:  # of whichever HTTP library
        raise UserError(f"{where}: the hub cannot be reached ({_said(error)}); where it can, run huggingface-cli download "
                        f"{name} --repo-type dataset --local-dir DIR, copy DIR here, and give that folder as --hf-dataset"
                        ) from None


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'…' * (len(text) > 160)}"


# ---- reading bytes --------------------------------------------------------------------------------------------------

class _Bytes:
    """The unpacked bytes of a file. In a packed one, going back means to unpack it from its beginning."""

    def __init__(self, file: File):
        self.file, self.stream = file, None
        self._open()

    def _open(self):
        self.close()
        with _readable(self.file):
            self.raw = open(self.file.path, "rb", buffering=0 if not self.file.packing else BLOCK)
            self.stream, self.at = self.raw, 0
            if self.file.packing == ".gz":
                self.stream = gzip.GzipFile(fileobj=self.raw)
            elif self.file.packing == ".zst" and self.file.size:  # nothing at all is no frame
                import pyarrow
                self.stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self.raw, "r"), "zstd")

    def close(self):
        if self.stream is not None:
            self.stream.close()
            self.raw.close()
            self.stream = None

    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length), fewer at the end. UserError: it cannot be read, or is damaged."""
        if self.file.packing and start < self.at:
            self._open()
        with _readable(self.file):
            if not self.file.packing:
                self.raw.seek(start)
                self.at = start
            while self.at < start and (block := self.stream.read(min(BLOCK, start - self.at))):
                self.at += len(block)
            parts = []
            while length > 0 and (block := self.stream.read(length)):
                parts.append(block)
                length -= len(block)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.at += len(data)
        return data


@contextlib.contextmanager
def _readable(file: File):
    """What goes wrong with a file inside is told as UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if file.mtime_ns < 0:  # of whichever HTTP library
            raise UserError(f"{file.path}: cannot be read ({_said(error)}); the same command goes on where it was") from None
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{file.path}: cannot be read ({error.strerror})") from None
        if isinstance(error, (OSError, EOFError, zlib.error)) or type(error).__module__.startswith("pyarrow"):
            raise UserError(f"{file.path}: is damaged, or of another kind than its name says ({_said(error)}); mend it, or "
                            "leave it out") from None
        raise


# Before a blank, a newline, or one of 、。， where a letter or a digit may stand before it.
_CUT = re.compile(rb"[0-9A-Za-z\x80-\xbf](?=[ \n]|\xe3\x80[\x81\x82]|\xef\xbc\x8c)")
_LOOK = 3  # bytes that the pattern may look ahead


def _safe_cut(data: bytes, start: int, end: int) -> int:
    """The first place in [start, end) where a text may be cut, -1 for none; 4 bytes before start are looked at."""
    for match in _CUT.finditer(data, max(0, start - 1)):
        cut = match.end()
        if cut >= end:
            return -1
        if data[cut - 1] < 0x80:
            return cut
        before = cut - 1
        while before > max(0, cut - 4) and 0x80 <= data[before] < 0xc0:
            before -= 1
        try:
            character = data[before:cut].decode()
        except UnicodeDecodeError:
            continue
        # Unicode 3.2, since letters stay letters in later versions, whatever Python's; but for these two. And some become
        # a letter and a mark where a tokenizer normalizes.
        if len(character) == 1 and character not in "\u1885\u1886" and unicodedata.is_normalized("NFC", character):
            category = unicodedata.ucd_3_2_0.category(character)
            if category[0] == "L" or category == "Nd":
                return cut
    return -1


def _whole(data: bytes) -> int:
    """The length of `data` without a character at its end that is not all there."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte >= 0xc0:
            return len(data) - back * (back < 2 + (byte >= 0xe0) + (byte >= 0xf0))
        if byte < 0x80:
            break
    return len(data)


def _characters(data: bytes, errors: str) -> int:
    """How many there are; with anything but "replace" it is UTF-8, or an error is to come."""
    if errors == "replace":
        return len(data.decode("utf-8", "replace"))
    return int(np.count_nonzero(np.frombuffer(data, np.int8) >= -64))  # all bytes but those that continue a character


def _byte_of(data: _Bytes, end: int, wanted: int, marks: list[tuple[int, int]]) -> int:
    """The byte at which a text has `wanted` characters before it. marks: (byte, characters before it), BLOCK apart."""
    byte, before = max(mark for mark in marks if mark[1] <= wanted)
    block = data.read(byte, min(BLOCK + 4, end - byte))
    low, high = 0, len(block)
    while low < high:
        middle = (low + high + 1) // 2
        if before + len(block[:middle].decode("utf-8", "replace")) <= wanted:
            low = middle
        else:
            high = middle - 1
    return byte + low


# ---- reading rows ---------------------------------------------------------------------------------------------------

class _Rows:
    """One column of a Parquet or Arrow file, by ranges of rows, without beginning its row group anew for the next one."""

    def __init__(self, file: File, column: str):
        """UserError: not such a file, or no such column."""
        import pyarrow
        self.file, self.column, self.stream = file, column, None
        with _readable(file):
            if file.format == "arrow":
                self.table = pyarrow.ipc.open_stream(pyarrow.memory_map(file.path)).read_all()
                schema = self.table.schema
                sizes = ([(len(chunk), chunk.nbytes) for chunk in self.table.column(column).chunks]
                         if column in schema.names else [])
            else:
                import pyarrow.parquet
                # Parts of a row group are buffered, not the whole column; and no thread reads ahead.
                self.parquet = pyarrow.parquet.ParquetFile(_open_remote(file.path) or file.path, pre_buffer=False,
                                                           buffer_size=CHUNK)
                schema, sizes = self.parquet.schema_arrow, _group_sizes(self.parquet.metadata, column)
        if column not in schema.names:
            raise UserError(f"{file.path}: has no column {column!r}, but {', '.join(map(repr, schema.names))}; name the "
                            "text's by --column")
        kind = schema.field(column).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        is_type = pyarrow.types
        if not any(is_kind(kind) for is_kind in (is_type.is_string, is_type.is_large_string, is_type.is_string_view,
                                                 is_type.is_binary, is_type.is_large_binary, is_type.is_null)):
            raise UserError(f"{file.path}: its column {column!r} is of type {kind}, no text; name the text's by --column")
        self.sizes = sizes  # (rows, bytes) of each row group
        self.starts = np.cumsum([0, *(rows for rows, _ in sizes)])
        average = sum(size for _, size in sizes) / max(1, self.starts[-1])
        self.batch_size = int(np.clip(CHUNK / 4 / max(1, average), 1, 256))

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start: int, end: int) -> Iterator[bytes | None]:
        """The cells of rows [start, end)."""
        if self.file.format == "arrow":
            yield from _cells(self.table.column(self.column).slice(start, end - start))
            return
        group = int(np.searchsorted(self.starts, start, "right")) - 1
        if self.stream is None or start < self.at or group > self.group:
            self.stream, self.group, self.at, self.batch = self._batches(group), group, int(self.starts[group]), None
        while start < end:
            if self.batch is None or self.at + len(self.batch) <= start:  # at: the first row of the batch
                self.at += 0 if self.batch is None else len(self.batch)
                with _readable(self.file):
                    self.batch = next(self.stream, None)
                if self.batch is None:
                    raise _changed(self.file)
                continue
            stop = min(end, self.at + len(self.batch))
            yield from _cells(self.batch.slice(start - self.at, stop - start))
            start = stop

    def _batches(self, group: int):
        for number in range(group, len(self.sizes)):
            self.group = number
            for batch in self.parquet.iter_batches(self.batch_size, [number], [self.column], use_threads=False):
                yield batch.column(0)


def _open_remote(path: str):
    """A file of the hub, in place; None for one that is here."""
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem
        return HfFileSystem().open(path, block_size=1 << 22)


def _group_sizes(metadata, column: str) -> list[tuple[int, int]]:
    """(rows, bytes of the column) of the row groups of a Parquet file, by its footer."""
    where = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [(group.num_rows, sum(group.column(i).total_uncompressed_size for i in where)) for group in groups]


def _cells(array) -> Iterator[bytes | None]:
    import pyarrow
    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        array, kind = array.cast(kind.value_type), kind.value_type
    yield from (array if pyarrow.types.is_null(kind) else array.cast(pyarrow.large_binary())).to_pylist()  # UTF-8 or not


def _unpack(data: bytes, n: int) -> Iterator[bytes | None]:
    """The n cells that `Source.feed` packed."""
    lengths, at = np.frombuffer(data, np.int64, n), 8 * n
    for length in lengths.tolist():
        yield None if length < 0 else data[at:at + length]
        at += max(0, length)


def _is_utf8(data: _Bytes, start: int, end: int) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while start < end:
            block = data.read(start, min(BLOCK, end - start))
            start += len(block) or end
            decoder.decode(block, final=start >= end)
        return True
    except UnicodeDecodeError:
        return False


def _hash_into(digest, file: File, bar):
    """A file as it is becomes a part of a hash."""
    import xxhash
    data, of_file, at = _Bytes(file), xxhash.xxh3_128(), 0
    while block := data.read(at, BLOCK):
        of_file.update(block)
        at += len(block)
        bar.update(len(block))
    data.close()
    digest.update(of_file.digest() + file.format.encode())


def parse_pair(line: bytes, errors: str) -> tuple[str, str]:
    """(prompt, completion) of a line of JSONL; errors "strict" or "replace". ValueError: what is wrong with it."""
    record, escaped = _parse(line, errors)
    for key in ("prompt", "completion"):
        if key not in record:
            raise ValueError(f"has no {key}")
        if not isinstance(record[key], str):
            raise ValueError(f"its {key} is no string, but {type(record[key]).__name__}")
    prompt, completion = (_unicode(record[key], key, errors) if escaped else record[key] for key in ("prompt", "completion"))
    if not completion:
        raise ValueError("its completion is empty, so that there is nothing to learn")
    return prompt, completion


def parse_text(line: bytes, column: str, errors: str) -> str:
    """The text of a line of JSONL, "" for null; errors "strict" or "replace". ValueError: what is wrong with it."""
    record, escaped = _parse(line, errors)
    if column not in record:
        raise ValueError(f"has no {column!r}, but {', '.join(map(repr, record)) or 'nothing'} (--column names the text's)")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"its {column!r} is no string, but {type(text).__name__}")
    return _unicode(text, column, errors) if text and escaped else text or ""


def _parse(line: bytes, errors: str) -> tuple[dict, bool]:
    """The object of a line of JSONL, and whether it has escapes, by which half of a surrogate pair can come in."""
    try:
        record = json.loads(line.decode("utf-8-sig", errors))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    return record, b"\\u" in line


def _unicode(text: str, key: str, errors: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        if errors == "replace":
            return re.sub("[\ud800-\udfff]", "\ufffd", text)
        raise ValueError(f"its {key} holds half of a surrogate pair, which is not Unicode text") from None


def _changed(file: File) -> UserError:
    return UserError(f"{file.path}: was changed while it was read; the same command begins again")


# ---- documents ------------------------------------------------------------------------------------------------------

class Source:
    """What a scan found, and the way to the documents. Picklable; opens files as it needs them, and keeps the last open.

    files      paths
    documents  how many, empty and bad ones included
    bytes      of their text, with what separates them; of Parquet, uncompressed
    pairs      whether they are (prompt, completion)
    identity   JSON: the options and counts of Inputs, and a hash of contents, their order and boundaries, not their names
    tasks      (n, 7) int64, rows are `Task`, in the order of the documents
    single     one plain text and a validation split: document 0 is what is trained on, document 1 the last part
    seekable   False: tasks are to be fed in ascending order
    """
    KEYS = ("options", "documents", "bytes", "pairs", "single", "undecodable", "items", "digest", "given")

    def __init__(self, options: dict, files: list[File], separator: bytes | None):
        self.options, self.separator, self._files = options, separator, files
        self.column, self.errors = options.get("column"), options.get("errors", "strict")
        self._decoding = "strict" if self.errors == "skip" else self.errors
        self.pairs, self.single, self.items, self.undecodable = options["kind"] == "pair files", False, None, []
        self.given = [len(files), sum(file.size for file in files)]
        self._open = self._opened = None

    @property
    def files(self) -> list[str]:
        return [file.path for file in self._files]

    @property
    def seekable(self) -> bool:
        return not any(file.packing for file in self._files)

    @property
    def identity(self) -> dict:
        files, size = self.given
        return {**self.options, "files": files, "bytes": size, "documents": self.documents, "xxh3_128": self.digest}

    def __getstate__(self):
        return {**self.__dict__, "_open": None, "_opened": None}

    # ---- the scan

    def _scan(self, val_fraction: float, cuttable: bool, progress: bool, listed=None, made_of: list[File] | None = None):
        """listed: JSON that identifies the contents, so that they need no hash; made_of: the files to be hashed instead."""
        import xxhash
        from tqdm import tqdm

        digest, table, firsts, total = xxhash.xxh3_128(), [], [0], 0
        contents = listed is None and made_of is None
        if listed is not None:
            digest.update(json.dumps(listed).encode())
        alone = len(self._files) == 1 and self._files[0].format == "text" and val_fraction > 0
        footers = self._footers()
        to_read = 0 if listed is not None else sum(file.size for file in made_of or self._files)
        with tqdm(total=to_read, unit="B", unit_scale=True, desc="reading", disable=None if progress else True) as bar:
            for file in made_of or ():
                _hash_into(digest, file, bar)
            for number, file in enumerate(self._files):
                if file.format in ("parquet", "arrow"):
                    sizes = footers[number] if footers else self._rows(number).sizes
                    documents = self._add_rows(table, number, firsts[-1], sizes)
                    size = sum(size for _, size in sizes)
                    if contents:
                        _hash_into(digest, file, bar)
                else:
                    fraction = val_fraction if alone else 0
                    documents, size = self._scan_file(table, number, firsts[-1], cuttable, fraction, digest, bar)
                firsts.append(firsts[-1] + documents)
                total += size
        self._finish(table, firsts, total, digest.hexdigest())

    def _finish(self, table, firsts, total, digest):
        self.tasks = np.array(table, np.int64).reshape(-1, len(Task._fields))
        self.firsts = np.array(firsts, np.int64)  # number of the first document of each file, and of one more
        self.documents, self.bytes, self.digest = int(self.firsts[-1]), int(total), digest

    def _footers(self) -> list | None:
        """The row groups of files of the hub, several at a time, since each takes a while; None where files are here."""
        if not any(file.mtime_ns < 0 for file in self._files):
            return None
        from concurrent.futures import ThreadPoolExecutor

        from tqdm import tqdm
        with ThreadPoolExecutor(8) as pool:
            sizes = pool.map(lambda file: _Rows(file, self.column).sizes, self._files)
            return list(tqdm(sizes, total=len(self._files), unit=" files", desc="reading footers", disable=None))

    def _add_rows(self, table: list, number: int, first: int, sizes: list[tuple[int, int]]) -> int:
        """The tasks of a Parquet or Arrow file: row groups, several small ones together, parts of large ones."""
        start = size = at = 0
        for in_group, bytes_in_group in sizes:
            small = bytes_in_group <= GROUP * CHUNK and in_group <= ROWS
            if at > start and (size + bytes_in_group > CHUNK or at + in_group - start > ROWS):
                table.append((number, start, at, first + start, at - start, 1, 1))
                start, size = at, 0
            at, size = at + in_group, size + bytes_in_group
            if not small:  # decoded once, in the parent
                self._files[number] = self._files[number]._replace(fed=self._files[number].format == "parquet")
                step = int(np.clip(CHUNK * in_group / max(1, bytes_in_group), 1, ROWS))
                for row in range(start, at, step):
                    end = min(row + step, at)
                    table.append((number, row, end, first + row, end - row, 1, 1))
                start, size = at, 0
        if at > start:
            table.append((number, start, at, first + start, at - start, 1, 1))
        return at

    def _scan_file(self, table: list, number: int, first: int, cuttable: bool, val_fraction: float, digest, bar) -> tuple:
        """Appends the tasks of a file of text or lines, read block by block; returns its documents and bytes.

        val_fraction: 0, unless it is the only file, whose only document is to be split.
        """
        import xxhash

        file = self._files[number]
        data, of_file = _Bytes(file), xxhash.xxh3_128()
        separator = self.separator if file.format == "text" else b"\n"
        cuttable = cuttable and file.format == "text"
        group = _Groups(table, number, first, cuttable)
        at = opened = shown = chars = 0  # bytes read; where the document begins whose end is not seen yet; bytes shown
        carry = tail = part = b""        # ends of the block before: of a separator, before a cut, of a character
        marks = [(0, 0)]                 # (byte, characters before it) near the beginnings of blocks
        while block := data.read(at, BLOCK):
            of_file.update(block)
            if cuttable:
                group.find_cuts(tail + block, at - len(tail))
                tail = (tail + block if len(block) < 8 else block)[-8:]
            if separator:
                parts = (carry + block if carry else block).split(separator)
                if len(parts) > 1:
                    lengths = np.fromiter(map(len, parts[:-1]), np.int64, len(parts) - 1)
                    starts = at - len(carry) + np.cumsum(lengths + len(separator))  # of what follows each separator
                    group.add(np.concatenate([[opened], starts[:-1]]), starts - len(separator))
                    opened = int(starts[-1])
                carry = parts[-1][max(0, len(parts[-1]) - len(separator) + 1):]
            if val_fraction:
                part += block
                whole = _whole(part)
                chars += _characters(part[:whole], self.errors)
                part = part[whole:]
                marks.append((at + len(block) - len(part), chars))
            at += len(block)
            bar.update((read := data.raw.tell()) - shown)
            shown = read
        if cuttable:
            group.find_cuts(tail, at - len(tail), last=True)
        rest = at > opened or separator is None  # behind the last separator
        if val_fraction and at and group.count + rest == 1:
            end = at if rest else group.end_of_first
            chars += _characters(part, self.errors) - (not rest and len(separator.decode("utf-8", "replace")))
            if self.errors == "skip" and not _is_utf8(data, 0, end):
                raise UserError(f"{file.path}: is not UTF-8, and there is no other document; take --errors replace")
            cut = _byte_of(data, end, int(chars * (1 - val_fraction)), marks)  # as nanoGPT does
            group.split(cut, end)
            self.single = True
        elif rest:
            group.add(np.array([opened]), np.array([at]))
        group.close()
        if self.errors == "skip" and not self.single:
            self.undecodable += [number for number, start, end in group.long if not _is_utf8(data, start, end)]
        data.close()
        digest.update(of_file.digest() + file.format.encode())
        return group.count, at

    def _take(self, items: list, val_fraction: float, pairs: bool):
        """Documents that are in memory."""
        import xxhash

        digest, table, at, size, total = xxhash.xxh3_128(), [], 0, 0, 0
        for _, text in items:
            parts = [part.encode("utf-8", "surrogatepass") for part in ((text,) if isinstance(text, str) else text)]
            for part in parts:
                digest.update(len(part).to_bytes(8, "little") + part)
                total += len(part)
        if len(items) == 1 and val_fraction > 0 and not pairs:
            name, text = items[0]
            cut = int(len(text) * (1 - val_fraction))
            items, self.single = [(name, text[:cut]), (name, text[cut:])], True
        for i, (_, text) in enumerate(items):
            size += sum(map(len, (text,) if isinstance(text, str) else text))
            if size >= CHUNK or i == len(items) - 1 or self.single:
                table.append((0, at, i + 1, at, i + 1 - at, 1, 1))
                at, size = i + 1, 0
        self.items, self.pairs = items, pairs
        self._finish(table, [0, len(items)], total, digest.hexdigest())

    # ---- reading

    def feed(self, order: Iterable[int]) -> Iterator[tuple[Task, bytes | None]]:
        """In the parent: the tasks of these numbers, and the bytes of those that a worker should not read itself."""
        for number in order:
            task = Task(*self.tasks[number].tolist())
            yield task, self._data(task) if self._files and self._files[task.file].fed else None

    def _data(self, task: Task) -> bytes:
        if self._files[task.file].format == "parquet":
            cells = list(self._rows(task.file).read(task.start, task.end))
            lengths = np.array([-1 if cell is None else len(cell) for cell in cells], np.int64)
            return lengths.tobytes() + b"".join(cell or b"" for cell in cells)
        if task.first in self.undecodable:
            return b""
        return self._bytes_of(task)

    def read(self, task: Task, data: bytes | None = None) -> Iterator[Document]:
        """In the worker: the documents of a task, with the data that `feed` had for it.

        UserError names the document and the byte: it is not UTF-8, or no record with such a text, and errors are strict.
        """
        if self.items is not None:
            for number in range(task.start, task.end):
                name, text = self.items[number]
                yield Document(number, name, text or None, "" if text else "empty", True, True)
            return
        file = self._files[task.file]
        if file.format in ("parquet", "arrow"):
            cells = self._rows(task.file).read(task.start, task.end) if data is None else _unpack(data, task.documents)
            for number, cell in enumerate(cells, task.first):
                yield self._document(number, cell)
        elif task.first in self.undecodable:  # a long one, in one or more tasks
            if task.begins:
                yield Document(task.first, self.name(task.first), None, "undecodable", True, True)
        elif task.documents == 1 and file.format == "text":
            data = self._bytes_of(task) if data is None else data
            offset = task.start - (0 if self.separator is None else self._begin(task))
            yield self._document(task.first, data, bool(task.begins), bool(task.ends), offset)
        else:
            data = self._bytes_of(task) if data is None else data
            parts = data.split(self.separator if file.format == "text" else b"\n")
            if len(parts) != task.documents:
                raise _changed(file)
            for number, part in enumerate(parts, task.first):
                yield self._record(number, part, file.format) if file.format != "text" else self._document(number, part)

    def _begin(self, task: Task) -> int:
        """Where the document of a piece begins in its file."""
        return int(self.tasks[np.searchsorted(self.tasks[:, 3], task.first), 1])

    def _document(self, number: int, data: bytes | None, begins=True, ends=True, offset: int = 0) -> Document:
        """A document of bytes, or a piece of it that begins at byte `offset`."""
        if not data and begins and ends:
            return Document(number, self.name(number), None, "empty", True, True)
        try:
            return Document(number, self.name(number), data.decode("utf-8", self._decoding), "", begins, ends)
        except UnicodeDecodeError as error:
            if self.errors != "skip":
                raise UserError(f"{self.name(number)}: is not UTF-8 at byte {offset + error.start}; leave it out, or take "
                                "--errors replace or --errors skip") from None
            return Document(number, self.name(number), None, "undecodable", begins, ends)

    def _record(self, number: int, line: bytes, format: str) -> Document:
        """A document of a line of JSONL."""
        if not line or line.isspace():
            return Document(number, self.name(number), None, "empty", True, True)
        try:
            if format == "pairs":
                text = parse_pair(line, self._decoding)
            else:
                text = parse_text(line, self.column, self._decoding)
        except ValueError as error:
            if self.errors == "skip":
                return Document(number, self.name(number), None, "no pair" if self.pairs else "undecodable", True, True)
            example = '{"prompt": "…", "completion": "…"}' if self.pairs else f'{{"{self.column}": "…"}}'
            rest = f"is {example}, and --errors skip leaves out what is none"
            raise UserError(f"{self.name(number)}: {error}; a line {rest}") from None
        return Document(number, self.name(number), text or None, "" if text else "empty", True, True)

    def _bytes_of(self, task: Task) -> bytes:
        if self._opened != ("bytes", task.file):
            if isinstance(self._open, _Bytes):
                self._open.close()
            self._open, self._opened = _Bytes(self._files[task.file]), ("bytes", task.file)
        data = self._open.read(task.start, task.end - task.start)
        if len(data) != task.end - task.start:
            raise _changed(self._files[task.file])
        return data

    def _rows(self, number: int) -> _Rows:
        if self._opened != ("rows", number):
            self._open, self._opened = _Rows(self._files[number], self.column), ("rows", number)
        return self._open

    def texts(self) -> Iterator[str]:
        """All text, once, in pieces."""
        for task, data in self.feed(range(len(self.tasks))):
            for document in self.read(task, data):
                if document.text is not None:
                    yield from (document.text,) if isinstance(document.text, str) else document.text

    def name(self, number: int) -> str:
        """The name of a document, for people."""
        if self.items is not None:
            return self.items[number][0]
        index = int(np.searchsorted(self.firsts, number, "right")) - 1
        file, number = self._files[index], number - int(self.firsts[index])
        if file.format in ("parquet", "arrow"):
            return f"{file.path}, row {number}"
        if file.format != "text":
            return f"{file.path}:{number + 1}"
        return file.path if self.separator is None or self.single else f"{file.path}, document {number + 1}"

    # ---- between two runs

    def save(self, folder: Path):
        """Writes source.json, tasks.npy and firsts.npy."""
        state = {key: getattr(self, key) for key in self.KEYS}
        state |= {"separator": self.separator and self.separator.hex(), "list": self._files}
        (Path(folder) / "source.json").write_text(json.dumps(state))
        np.save(Path(folder) / "tasks.npy", self.tasks)
        np.save(Path(folder) / "firsts.npy", self.firsts)

    @staticmethod
    def load(folder: Path) -> "Source":
        """What `save` wrote. ValueError, KeyError, OSError: something else."""
        state = json.loads((Path(folder) / "source.json").read_text())
        separator = state.pop("separator")
        separator = None if separator is None else bytes.fromhex(separator)
        source = Source(state["options"], [File(*file) for file in state.pop("list")], separator)
        for key in Source.KEYS:
            setattr(source, key, state[key])
        if source.items is not None:
            source.items = [(name, text if isinstance(text, str) else tuple(text)) for name, text in source.items]
        source.tasks, source.firsts = (np.load(Path(folder) / f"{name}.npy") for name in ("tasks", "firsts"))
        return source

    def changed(self) -> str | None:
        """A file that is not as the scan found it, by its size and time; None: all are."""
        for file in self._files:
            if file.mtime_ns >= 0:
                try:
                    stat = os.stat(file.path)
                except OSError:
                    return file.path
                if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
                    return file.path


class _Groups:
    """Makes tasks of the documents of one file: several small ones together, a long one in pieces."""

    def __init__(self, table: list, file: int, first: int, cuttable: bool):
        self.table, self.file, self.first, self.cuttable = table, file, first, cuttable
        self.rows = len(table)                 # of other files
        self.count = self.held = 0             # documents so far, and those of them that are in no task yet
        self.start = self.end = 0              # of the latter
        self.end_of_first = 0
        self.cuts, self.nominal = [], CHUNK    # places where a text may be cut, and from where to look for the next
        self.long = []                         # (number, start, end) of long documents

    def find_cuts(self, data: bytes, at: int, last: bool = False):
        """Looks for the first safe cut at or after each multiple of CHUNK. data: the next bytes, from `at` on."""
        end = at + len(data) - (0 if last else _LOOK)
        while self.nominal < end:
            cut = _safe_cut(data, self.nominal - at, end - at)
            if cut < 0:
                self.nominal = end
            else:
                self.cuts.append(at + cut)
                self.nominal = ((at + cut) // CHUNK + 1) * CHUNK

    def add(self, starts: np.ndarray, ends: np.ndarray):
        """More documents, in their order."""
        i = 0
        if not self.count:
            self.end_of_first = int(ends[0])
        while i < len(ends):
            if self._is_long(starts[i], ends[i]):
                self.close()
                self._pieces(int(starts[i]), int(ends[i]))
                i += 1
                continue
            if not self.held:
                self.start = int(starts[i])
            full = int(np.searchsorted(ends, self.start + CHUNK))  # the document that fills the task
            stop = full if full == len(ends) or self._is_long(starts[full], ends[full]) else full + 1
            self.held, self.count, self.end, i = self.held + stop - i, self.count + stop - i, int(ends[stop - 1]), stop
            if stop > full:
                self.close()
        if self.count > 1:
            self.cuts = [cut for cut in self.cuts if cut > ends[-1]]

    def close(self):
        """The documents that are held become a task."""
        if self.held:
            self.table.append((self.file, self.start, self.end, self.first + self.count - self.held, self.held, 1, 1))
            self.held = 0

    def split(self, cut: int, end: int):
        """Instead of one document up to `end`, two."""
        del self.table[self.rows:]
        self.count = self.held = 0
        self._pieces(0, cut)
        self._pieces(cut, end)

    def _is_long(self, start: int, end: int) -> bool:
        return self.cuttable and end - start > CHUNK

    def _pieces(self, start: int, end: int):
        number = self.first + self.count
        inside = [cut for cut in self.cuts if start < cut < end] if self._is_long(start, end) else []
        bounds = [start, *inside, end]
        for a, b in zip(bounds, bounds[1:]):
            self.table.append((self.file, a, b, number, 1, int(a == start), int(b == end)))
        self.long.append((number, start, end))
        self.count += 1
