"""Where documents come from: text, JSONL, Parquet, pairs; those of Hugging Face in hub.py. Read twice, never held.

    inputs = text_files(["books", "more.jsonl.gz"])   what the user named: names, sizes and times
    source = inputs.scan(val_fraction, cuttable)      reads it all once: how many documents, a hash, a table of tasks
    for task, data in source.feed(order):             in the parent
        for document in source.read(task, data):      in a worker

A task is as many whole documents of one file as fit into CHUNK bytes, or a longer one, or the rows of a row group; the
input alone decides what the tasks are. A text of more than CHUNK bytes is read in pieces, which end at a *safe cut*: before
a blank, a newline or one of 、。， that follows a letter or a digit. There the split patterns of GPT-2, cl100k, o200k and
the like always cut too, so that the pieces have the token ids of the whole. A text without such places, a line of JSONL and
a cell of Parquet are read whole, however long they are.
"""

import bisect
import contextlib
import fnmatch
import glob
import itertools
import json
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple
from collections.abc import Iterable, Iterator

import numpy as np

from nanogpt.errors import Unread, UserError, one_line

CHUNK = 1 << 20  # bytes of text a task
GROUP = 8  # row groups of up to so many CHUNKs are one task
ROWS = 1 << 14  # and up to so many rows: equal texts take no room in a Parquet file

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}  # of names; text, if none of these
CODECS = {".gz": "gzip", ".zst": "zstd"}


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
    fed: bool       # read by the parent alone, in order: what is packed, and large row groups

    @property
    def lines(self) -> bool:
        return self.format in ("jsonl", "pairs")

    @property
    def table(self) -> bool:
        return self.format in ("parquet", "arrow")


# ---- what the user named --------------------------------------------------------------------------------------------

class Inputs:
    """What the user named, before it is read.

    options  JSON: all that decides which documents there are; its `paths` are for people
    newest   time.time() of the last change of a file's contents or attributes; 0.0 for a revision of the hub
    files    paths
    bytes    of all files as they are, packed or not
    pairs    whether the documents are (prompt, completion)
    """
    def __init__(self, options: dict, files: list[File], newest: float, items: list | None = None):
        self.options, self._files, self.newest, self.items = options, files, newest, items

    @property
    def files(self) -> list[str]:
        return [file.path for file in self._files]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self._files)

    @property
    def pairs(self) -> bool:
        return "pair" in self.options["kind"]

    @property
    def seekable(self) -> bool:
        """False: a file is packed, so that its tasks are to be fed in ascending order."""
        return not any(file.packing for file in self._files)

    def scan(self, val_fraction: float, cuttable: bool, progress: bool = True) -> "Source":
        """Reads every byte once.

        cuttable: whether a long text may be tokenized in pieces.
        UserError: a file that cannot be read, is damaged, or is not UTF-8 where errors are strict; no such column; no text.
        """
        source = Source(self.options, self._files, self.items)
        source._scan(val_fraction, cuttable, progress)
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
        packing = next((suffix for suffix in CODECS if name.endswith(suffix)), "")
        kind = "pairs" if pairs else format or FORMATS.get(os.path.splitext(name.removesuffix(packing))[1], "text")
        if kind == "parquet" and packing:
            raise UserError(f"{path}: a Parquet file is read from its end on; unpack it first")
        file, changed = stat_file(str(path), kind, packing)
        files.append(file)
        newest = max(newest, changed)
    if separator is not None and not any(file.format == "text" for file in files):
        raise UserError("--document-separator: is for text files, and there is none; leave it out, or take --format text")
    options = {"kind": "pair files" if pairs else "text files", "paths": inputs, "glob": pattern, "format": format,
               "column": column, "separator": separator and separator.decode("utf-8", "surrogateescape"), "errors": errors}
    return Inputs(options, files, newest)


def find_files(inputs: list[str], pattern: str, out) -> list[Path]:
    """The files of all inputs in their order, those of a folder or of a glob sorted by path, each once."""
    where = Path.cwd() if "://" in str(out) else Path(out).resolve() if out else None  # a URL's shards wait here
    files = {}
    for given in inputs:
        found = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        paths = [path for path in found if path == given or Path(path).resolve() != where]
        if not paths:
            raise UserError(f"{given}: is not there; --input takes files, folders and quoted globs")
        for path in map(Path, paths):
            if path.is_dir():
                if where and where.is_relative_to(path.resolve()):
                    raise UserError(f"{out}: lies inside the input {path}; take an --out elsewhere" if "://" not in str(out) else
                                    f"{path}: holds the current folder, where the shards of {out} wait; go to another one")
                walk = os.walk(path, onerror=_stop)
                found = [Path(folder, name) for folder, _, names in walk for name in fnmatch.filter(names, pattern)]
                found = sorted(file for file in found if file.is_file())
                if not found:
                    raise UserError(f"{path}: holds no file that matches {pattern}; take another folder or --glob")
            elif path.is_file():
                found = [path]
            else:
                raise UserError(f"{path}: is neither a file nor a folder")
            for file in found:
                files.setdefault(file.resolve(), file)
    return list(files.values())


def _stop(error: OSError):
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")


def stat_file(path: str, format: str, packing: str = "") -> tuple[File, float]:
    """A file as it is now, and when it was changed last."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return File(path, format, packing, stat.st_size, stat.st_mtime_ns, bool(packing)), max(stat.st_mtime, stat.st_ctime)


def unescape(text: str) -> bytes:
    r"""The bytes of a separator as typed, with \n \t \r \0 \\ and \xNN in it. UserError: another escape, or nothing."""
    known = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"0": b"\0", b"\\": b"\\"}

    def value(match):
        if match[1]:
            return bytes.fromhex(match[1].decode())
        if match[2] in known:
            return known[match[2]]
        raise UserError(f"--document-separator: \\{os.fsdecode(match[2])} is none of \\n \\t \\r \\0 \\\\ \\xNN; write a "
                        "backslash as \\\\")

    if not text:
        raise UserError("--document-separator: is empty; leave it out where every file is one document")
    return re.sub(rb"\\(?:x([0-9a-fA-F]{2})|([\x00-\x7f]|[^\x00-\x7f]+|$))", value, os.fsencode(text))


def spool_stdin(folder: Path) -> Path:
    """Standard input as a file in `folder`. The same text, piped again, is the same file by name, size and time."""
    import xxhash

    partial, digest = folder / f"stdin.partial-{os.getpid()}", xxhash.xxh3_128()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            while block := sys.stdin.buffer.read(CHUNK):
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
        items = list(documents)
        kind = "pairs in memory" if items and not isinstance(items[0][1], str) else "in memory"
        super().__init__({"kind": kind, "paths": ["memory"]}, [], float("inf"), items)


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
    """
    STATE = "options", "identity", "documents", "bytes", "firsts", "single", "items"

    def __init__(self, options: dict, files: list[File], items: list | None = None):
        self.options, self._files, self.items = options, list(files), items
        separator, self.column = options.get("separator"), options.get("column")
        self.separator = separator and separator.encode("utf-8", "surrogateescape")
        self.errors, self.pairs, self.single = options.get("errors"), "pair" in options["kind"], False
        self.firsts = [0]         # number of the first document of each file, and of one more
        self.undecodable = set()  # numbers of those that were found in the scan, since they are tasks of their own
        self._opened: tuple[int | None, _Rows | _Bytes | None] = None, None

    @property
    def files(self) -> list[str]:
        return [file.path for file in self._files]

    @property
    def seekable(self) -> bool:
        """False: there are files whose tasks are to be fed in ascending order."""
        return not any(file.fed for file in self._files)

    def __getstate__(self):
        return {**self.__dict__, "_opened": (None, None)}

    # ---- the scan

    def _scan(self, val_fraction: float, cuttable: bool, progress: bool, known: str | None = None):
        """known: what identifies the contents of tables, so that they need no hash."""
        import xxhash
        from tqdm import tqdm

        digest, table, self.bytes, characters = xxhash.xxh3_128(), [], 0, 0
        row_groups = self._row_groups(progress)
        size = sum(file.size for file in self._files)
        with tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=not progress or bool(known) or None) as bar:
            for number, file in enumerate(self._files):
                first = document = self.firsts[-1]
                data = None if known else _Bytes(file, digest, bar)
                if file.table:
                    table += self._tasks_of_rows(number, row_groups[number])
                    document += sum(rows for rows, _ in row_groups[number])
                    self.bytes += sum(size for _, size in row_groups[number])
                    while data and data.more(CHUNK):
                        pass
                else:
                    separator = b"\n" if file.lines else self.separator
                    for chunk, start, documents, begins, ends in _chunks(data, separator, cuttable and not file.lines):
                        table.append(Task(number, start, start + len(chunk), document, documents, int(begins), int(ends)))
                        self._check(table[-1], chunk, much=size > 1 << 26)
                        if first == document == 0 and documents == 1 and val_fraction:
                            characters += np.count_nonzero(_beginnings(chunk))
                        document += documents * ends
                    self.bytes += data.at
                if data:
                    digest.update(f"{data.at} {file.format}\n".encode())
                self.firsts.append(document)
        if self.items is not None:
            table = self._tasks_of_items(val_fraction, digest)
        elif val_fraction and self.firsts == [0, 1] and self._files[0].format == "text":
            table = self._split(table, int(characters * (1 - val_fraction)))  # as nanoGPT does
        if not self.bytes:
            where, what = " ".join(self.options["paths"]), "pair" if self.pairs else "text"
            raise UserError(f"{where}: holds no {what}; give files that are not empty")
        self.tasks = np.array(table, np.int64).reshape(-1, len(Task._fields))
        self.documents = self.firsts[-1]
        self.identity = {**self.options, "files": len(self._files), "bytes": size, "documents": self.documents,
                         "xxh3_128": known or digest.hexdigest()}

    def _check(self, task: Task, chunk: bytes, much: bool):
        """Looks whether a chunk is UTF-8."""
        if self.errors == "replace" or is_utf8(chunk, much):
            return
        if self.errors == "strict":
            for _ in self.read(task, chunk):  # raises the UserError, unless it is the separator that is not UTF-8
                pass
        elif task.documents == 1 and self._files[task.file].format == "text":
            self.undecodable.add(task.first)

    def _split(self, table: list[Task], wanted: int) -> list[Task]:
        """The tasks of the only document, where its first `wanted` characters are document 0, and the rest is document 1."""
        if self.undecodable:
            raise UserError(f"{self._files[0].path}: is not UTF-8, and there is no other document; take --errors replace")
        data, end, rows = _Bytes(self._files[0]), table[-1].end, []
        while len(places := np.flatnonzero(_beginnings(block := data.more(CHUNK)))) <= wanted and data.at < end:
            wanted -= len(places)
        cut = data.at - len(block) + int(places[wanted]) if wanted < len(places) else end
        for number, (first, last) in enumerate([(0, cut), (cut, end)]):
            bounds = [first, *(task.start for task in table if first < task.start < last), last]
            rows += [Task(0, a, b, number, 1, int(a == first), int(b == last)) for a, b in zip(bounds, bounds[1:])]
        self.firsts, self.single = [0, 2], True
        return rows

    def _row_groups(self, progress: bool) -> list:
        """(rows, bytes) of the row groups of each table; several files at a time, since those of the hub take a while."""
        from concurrent.futures import ThreadPoolExecutor

        from tqdm import tqdm
        if not any(file.table for file in self._files):
            return []
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda file: file.table and _Rows(file, self.column).groups, self._files)
            return list(tqdm(found, "reading footers", len(self._files), leave=False, disable=None if progress else True))

    def _tasks_of_rows(self, number: int, groups: list[tuple[int, int]]) -> list[Task]:
        """The tasks of a table: row groups, or ranges of a large one, which is decoded once, in the parent."""
        tasks, at, first = [], 0, self.firsts[-1]
        for rows, size in groups:
            step = max(1, rows)
            if rows > ROWS or size > GROUP * CHUNK:
                step = min(max(1, CHUNK * rows // max(1, size)), ROWS)
                self._files[number] = self._files[number]._replace(fed=self._files[number].format == "parquet")
            for start in range(at, at + rows, step):
                end = min(start + step, at + rows)
                tasks.append(Task(number, start, end, first + start, end - start, 1, 1))
            at += rows
        return tasks

    def _tasks_of_items(self, val_fraction: float, digest) -> list[Task]:
        """The tasks of documents that are in memory."""
        if len(self.items) == 1 and val_fraction and not self.pairs:
            name, text = self.items[0]
            cut = int(len(text) * (1 - val_fraction))
            self.items, self.single = [(name, text[:cut]), (name, text[cut:])], True
        texts = [json.dumps(text).encode() for _, text in self.items]
        digest.update(b"\n".join(texts))
        self.bytes, self.firsts = sum(len(text) for text, (_, item) in zip(texts, self.items) if item), [0, len(texts)]
        table, start, held = [], 0, 0
        for end, text in enumerate(texts, 1):
            held += len(text)
            if held >= CHUNK or end == len(texts) or self.single:
                table.append(Task(0, start, end, start, end - start, 1, 1))
                start, held = end, 0
        return table

    # ---- reading

    def weight(self, task: Task) -> int:
        """Bytes of text of a task; of rows and items, whose sizes nobody knows yet, CHUNK."""
        return CHUNK if self.items is not None or self._files[task.file].table else task.end - task.start

    def feed(self, order: Iterable[int]) -> Iterator[tuple[Task, bytes | list | None]]:
        """In the parent: the tasks of these numbers, and for `read` the data of those that a worker should not read."""
        for number in order:
            task = Task(*self.tasks[number].tolist())
            fed = self.items is None and self._files[task.file].fed
            yield task, self._data(task) if fed else None

    def read(self, task: Task, data: bytes | list | None = None) -> Iterator[Document]:
        """In the worker: the documents of a task, with the data that `feed` had for it.

        UserError names the document and the byte: it is not UTF-8, or no record with such a text, and errors are strict.
        """
        if self.items is not None:
            for number, (name, text) in enumerate(self.items[task.start:task.end], task.first):
                yield Document(number, name, text or None, "" if text else "empty", True, True)
            return
        if task.first in self.undecodable:  # in one task, or several
            if task.begins:
                yield Document(task.first, self.name(task.first), None, "undecodable", True, True)
            return
        file, parts, at = self._files[task.file], self._data(task) if data is None else data, task.start
        separator = b"\n" if file.lines else self.separator or b""
        if not file.table:
            parts = [parts] if task.documents == 1 else parts.split(separator)  # type: ignore[union-attr]  # bytes, of no table
        if len(parts) != task.documents:
            raise _changed(file)
        for number, part in enumerate(parts, task.first):
            yield self._document(number, file, part or b"", at, bool(task.begins), bool(task.ends))
            at += len(part or b"") + len(separator)

    def _document(self, number: int, file: File, data: bytes, at: int, begins: bool, ends: bool) -> Document:
        """A document of bytes, or a piece of it; at: the byte of a text file where it begins."""
        name, columns = self.name(number), ["prompt", "completion"] if self.pairs else [self.column]
        decoding = "replace" if self.errors == "replace" else "strict"
        try:
            text = parse_line(data, columns, decoding) if file.lines else data.decode("utf-8", decoding)
        except ValueError as error:
            if self.errors == "skip":
                return Document(number, name, None, "no pair" if self.pairs else "undecodable", begins, ends)
            hint, said = "leave it out, or take --errors replace or --errors skip", error
            if isinstance(error, UnicodeDecodeError):
                said = f"is not UTF-8 at byte {error.start + (at if file.format == 'text' else 0)}"
            if file.lines:
                example = ", ".join(f'"{column}": "…"' for column in columns)
                hint = f"a line is {{{example}}}, and --errors skip leaves out what is none"
            raise UserError(f"{name}: {said}; {hint}") from None
        if not text and begins and ends:
            return Document(number, name, None, "empty", True, True)
        return Document(number, name, text, "", begins, ends)

    def _data(self, task: Task) -> bytes | list[bytes | None]:
        """What there is of a task: bytes, or the cells of a table. Readers stay open, and go forwards only."""
        number, reader = self._opened
        if number != task.file or task.start < reader.at:
            file = self._files[task.file]
            reader = _Rows(file, self.column) if file.table else _Bytes(file)
            self._opened = task.file, reader
        return reader.read(task.start, task.end)

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
        index = bisect.bisect(self.firsts, number) - 1
        file, number = self._files[index], number - self.firsts[index]
        if file.table:
            return f"{file.path}, row {number}"
        if file.lines:
            return f"{file.path}:{number + 1}"
        return file.path if self.separator is None or self.single else f"{file.path}, document {number + 1}"

    # ---- between two runs

    def save(self, folder: Path):
        """Writes source.json and tasks.npy."""
        state = {key: getattr(self, key) for key in self.STATE}
        state |= {"files": self._files, "undecodable": sorted(self.undecodable)}
        (Path(folder) / "source.json").write_text(json.dumps(state))
        np.save(Path(folder) / "tasks.npy", self.tasks)

    @staticmethod
    def load(folder: Path) -> "Source":
        """What `save` wrote. ValueError, KeyError, OSError: something else."""
        state = json.loads((Path(folder) / "source.json").read_text())
        source = Source(state["options"], [File(*file) for file in state["files"]])
        for key in Source.STATE:
            setattr(source, key, state[key])
        if source.items is not None:
            source.items = [(name, text if isinstance(text, str) else tuple(text)) for name, text in source.items]
        source.undecodable = set(state["undecodable"])
        source.tasks = np.load(Path(folder) / "tasks.npy")
        return source

    def changed(self) -> str | None:
        """A file that is not as the scan found it, by its size and time; None: all are."""
        for file in self._files:
            with contextlib.suppress(OSError):
                if file.mtime_ns < 0:
                    continue
                stat = os.stat(file.path)
                if (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns):
                    continue
            return file.path
        return None


# ---- how a file is cut into tasks -----------------------------------------------------------------------------------

def _chunks(data: "_Bytes", separator: bytes | None, cuttable: bool) -> Iterator[tuple[bytes, int, int, bool, bool]]:
    """(bytes, where they start, documents, begins, ends) of each task of a file, from its beginning.

    Whole documents as long as they fit into CHUNK bytes, without the separator behind them; or a longer one, up to its end;
    or, if cuttable, its pieces, each of CHUNK bytes and up to the next safe cut.
    """
    held, at, begins = b"", 0, True
    overlaps = any(separator.startswith(separator[i:]) for i in range(1, len(separator))) if separator else False
    while held := held + data.more(CHUNK - len(held)):
        documents, gap = held.count(separator) if separator else 0, len(separator or b"")
        if documents and not begins:  # the end of a long one, alone
            documents, length = 1, held.find(separator)
        elif documents:  # of "\n\n\n" the first two are the "\n\n" between two documents, as everywhere
            length = len(held) - len(held.split(separator)[-1]) - gap if overlaps else held.rfind(separator)
        elif len(held) < CHUNK:  # the end of the file
            gap, length = 0, len(held)
        else:
            held, length, gap = _read_on(data, bytearray(held), separator, cuttable)
        ends = gap > 0 or length == len(held)
        yield bytes(memoryview(held)[:length]), at, max(1, documents), begins, ends
        held, at, begins = bytes(held[length + gap:]), at + length + gap, ends
    if at == 0 and separator is None:
        yield b"", 0, 1, True, True


def _read_on(data: "_Bytes", held: bytearray, separator: bytes | None, cuttable: bool) -> tuple[bytearray, int, int]:
    """Reads on to the end of a document of more than CHUNK bytes, or to a safe cut.

    Returns (all bytes, length of the document or piece, length of the separator behind it).
    """
    margin = len(separator or b"") + LOOK  # what may be half of something
    at = max(0, CHUNK - margin)
    while True:
        block = data.more(max(CHUNK >> 4, margin))
        held += block
        end = len(held) - (margin if block else 0)
        stop = held.find(separator, at) if separator else -1
        cut = _safe_cut(held, max(at, CHUNK), end) if cuttable else -1
        if stop >= 0 and not 0 <= cut < stop:
            return held, stop, len(separator)
        if cut >= 0 or not block:
            return held, cut if cut >= 0 else len(held), 0
        at = max(at, end)


# Before a blank, a newline, or one of 、。， where a letter or a digit may stand before it.
_CUT = re.compile(rb"[0-9A-Za-z\x80-\xbf](?=[ \n]|\xe3\x80[\x81\x82]|\xef\xbc\x8c)")
LOOK = 3  # bytes that the pattern may look ahead


def _safe_cut(data: bytes | bytearray, start: int, end: int) -> int:
    """The first place in [start, end) where a text may be cut, -1 for none; 4 bytes before start are looked at."""
    for match in _CUT.finditer(data, max(0, start - 1)):
        cut = match.end()
        if cut >= end:
            return -1
        if data[cut - 1] < 0x80:
            return cut
        character = bytes(data[max(0, cut - 4):cut]).decode("utf-8", "replace")[-1]  # U+FFFD is neither letter nor digit
        # Unicode 3.2, since letters stay letters in later versions, whatever Python's; but for these two. And some become
        # a letter and a mark where a tokenizer normalizes.
        if character not in "\u1885\u1886" and unicodedata.is_normalized("NFC", character):
            category = unicodedata.ucd_3_2_0.category(character)
            if category[0] == "L" or category == "Nd":
                return cut
    return -1


def is_utf8(data: bytes, much: bool) -> bool:
    """Whether it can be decoded. much: there is so much text that pyarrow, 10 times as fast, is worth its loading."""
    try:
        if much:
            import pyarrow
            parts = [None, pyarrow.py_buffer(np.array([0, len(data)])), pyarrow.py_buffer(data)]
            pyarrow.Array.from_buffers(pyarrow.large_string(), 1, parts).validate(full=True)
        else:
            data.decode()
    except ValueError:  # of pyarrow too
        return False
    return True


def _beginnings(data: bytes) -> np.ndarray:
    """Which bytes begin a character: all but those that continue one. (n,) bool."""
    return np.frombuffer(data, np.int8) >= -64


# ---- reading files --------------------------------------------------------------------------------------------------

class _Bytes:
    """The unpacked bytes of a file, forwards."""

    def __init__(self, file: File, digest=None, bar=None):
        """digest, bar: take in all that is read."""
        self.file, self.digest, self.bar, self.at = file, digest, bar, 0
        with readable(file):
            self.raw = self.stream = open(file.path, "rb", buffering=0)
            if file.packing and file.size:  # nothing at all is no frame
                import pyarrow
                self.stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self.raw, "r"), CODECS[file.packing])

    def more(self, length: int) -> bytes:
        """The next bytes, fewer at the end only. UserError: they cannot be read, or are damaged."""
        parts, before = [], self.raw.tell()
        with readable(self.file):
            while length > 0 and (block := self.stream.read(length)):
                parts.append(block)
                length -= len(block)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.at += len(data)
        if self.digest is not None:
            self.digest.update(data)
            self.bar.update(self.raw.tell() - before)
        return data

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end). UserError: they are not there any more."""
        if not self.file.packing:
            self.at = self.raw.seek(start)
        while self.at < start and self.more(min(CHUNK, start - self.at)):
            pass
        data = self.more(end - start)
        if self.at != end:
            raise _changed(self.file)
        return data


class _Rows:
    """One column of a Parquet or Arrow file, forwards."""

    def __init__(self, file: File, column: str):
        """UserError: not such a file, or no such column."""
        import pyarrow
        import pyarrow.parquet
        self.file, self.column, self.at = file, column, 0
        with readable(file):
            if file.format == "arrow":
                self.table = pyarrow.ipc.open_stream(pyarrow.memory_map(file.path)).read_all()
                schema = self.table.schema
            else:
                path = file.path
                if path.startswith("hf://"):  # read in place
                    from huggingface_hub import HfFileSystem
                    path = HfFileSystem().open(path, block_size=1 << 22)
                # Parts of a row group are buffered, not the whole column; and no thread reads ahead.
                self.parquet = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK)
                schema = self.parquet.schema_arrow
        if column not in schema.names:
            raise UserError(f"{file.path}: has no column {column!r}, but {', '.join(map(repr, schema.names))}; name the "
                            "text's by --column")
        kind = schema.field(column).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if str(kind).removeprefix("large_").removesuffix("_view") not in ("string", "binary", "null"):
            raise UserError(f"{file.path}: its column {column!r} is of type {kind}, no text; name the text's by --column")
        if file.format == "arrow":
            self.groups = [(len(chunk), chunk.nbytes) for chunk in self.table.column(column).chunks]
        else:
            footer = self.parquet.metadata
            parts = [i for i in range(footer.num_columns) if footer.schema.column(i).path == column]
            groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
            self.groups = [(group.num_rows, sum(group.column(i).total_uncompressed_size for i in parts)) for group in groups]
        self.stream = self._cells(0)

    def read(self, start: int, end: int) -> list[bytes | None]:
        """The cells of rows [start, end). UserError: they are not there any more."""
        with readable(self.file):
            if self.file.format == "arrow":
                return _as_bytes(self.table.column(self.column).slice(start, end - start))
            if start > self.at:  # a row group is read from its beginning on
                starts = list(itertools.accumulate((rows for rows, _ in self.groups), initial=0))
                group = bisect.bisect(starts, start) - 1
                if starts[group] > self.at:
                    self.stream, self.at = self._cells(group), starts[group]
            cells = list(itertools.islice(self.stream, start - self.at, end - self.at))
        self.at = end
        if len(cells) != end - start:
            raise _changed(self.file)
        return cells

    def _cells(self, first: int) -> Iterator[bytes | None]:
        """All cells from a row group on, few of which are decoded at a time."""
        size, rows = sum(size for _, size in self.groups), sum(rows for rows, _ in self.groups)
        at_once = min(max(1, CHUNK * rows // (4 * max(1, size))), 256)
        for number in range(first, len(self.groups)):
            for batch in self.parquet.iter_batches(at_once, [number], [self.column], use_threads=False):
                yield from _as_bytes(batch.column(0))


def _as_bytes(array) -> list[bytes | None]:
    import pyarrow
    if pyarrow.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    return (array if pyarrow.types.is_null(array.type) else array.cast(pyarrow.large_binary())).to_pylist()  # UTF-8 or not


@contextlib.contextmanager
def readable(file: File):
    """What goes wrong with a file inside is told as UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if file.mtime_ns < 0:  # of whichever HTTP library
            raise Unread(f"{file.path}: cannot be read ({one_line(error)}); the same command goes on where it was") from None
        if isinstance(error, OSError) and error.strerror:
            raise Unread(f"{file.path}: cannot be read ({error.strerror})") from None
        if isinstance(error, OSError) or type(error).__module__.startswith("pyarrow"):
            raise UserError(f"{file.path}: is damaged, or of another kind than its name says ({one_line(error)}); mend it, or "
                            "leave it out") from None
        raise


def _changed(file: File) -> UserError:
    return UserError(f"{file.path}: was changed while it was read; the same command begins again")


def parse_line(line: bytes, columns: list[str], errors: str) -> str | tuple[str, str]:
    """The text, "" for none, or (prompt, completion) of a line of JSONL; errors "strict" or "replace".

    ValueError: what is wrong with it; UnicodeDecodeError: where.
    """
    if not line or line.isspace():
        return ""
    text, pair = line.decode("utf-8-sig", errors), len(columns) == 2
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    found = []
    for key in columns:
        if key not in record:
            there = ", ".join(map(repr, record)) or "nothing"
            raise ValueError(f"has no {key}, but {there}" + " (--column names the text's)" * (not pair))
        text = record[key]
        if text is None and not pair:
            return ""
        if not isinstance(text, str):
            raise ValueError(f"its {key} is no string, but {type(text).__name__}")
        if b"\\u" in line and re.search("[\ud800-\udfff]", text):
            if errors != "replace":
                raise ValueError(f"its {key} holds half of a surrogate pair, which is not Unicode text")
            text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        found.append(text)
    if pair and not found[1]:
        raise ValueError("its completion is empty, so that there is nothing to learn")
    return (found[0], found[1]) if pair else found[0]
