"""The StreamingDataset behind a split: every shard is there, whole and as it was written, or one line says why not.

Streaming alone ends an epoch without a word where a download fails, never notices a bit that flips in a file, and lets
the other ranks wait for ever for the one that failed. Here shards come into the cache whole and hashed or not at all,
downloads are tried again after longer and longer pauses, and what cannot be mended is told.
"""

import contextlib
import errno
import json
import os
import random
import secrets
import struct
import sys
import time
from functools import cached_property
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from unittest import mock

import numpy as np
import torch.distributed as dist
import xxhash
from filelock import FileLock

from nanogpt.config import Config
from nanogpt.errors import UserError, one_line
from nanogpt.shards import file_hash, import_streaming

streaming = import_streaming()
import streaming.base.dataset as internals  # noqa: E402
import streaming.base.shared.memory as shared  # noqa: E402
from streaming.base.compression import decompress  # noqa: E402
from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader, S3Downloader  # noqa: E402
from streaming.base.util import bytes_to_int  # noqa: E402

ATTEMPTS, PAUSE_S = 6, 0.5  # of a download; the pauses between them double
TIMEOUT_S = 10              # without a byte; boto alone goes through three of these, or five, in each of our attempts,
NOT_THERE = "copy it there again, or mend data.path"
PATIENCE_S = 60             # so after this long there is no further attempt, but for a second one


def open_dataset(folder: Path, remote: str | None, split: str, config: Config) -> "Dataset":
    """StreamingDataset over folder/split, or over remote/split with folder as its cache."""
    index = folder / split / "index.json"
    _check_shared_memory()
    made = []  # shared memory, by this rank

    def make(name, create=False, size=0):
        memory = SharedMemory(name, create, size)
        if create:
            made.append(memory)
        return memory

    try:
        with mock.patch.object(internals, "get_shm_prefix", _shared_memory_prefix), \
                mock.patch.object(shared, "BuiltinSharedMemory", make):
            dataset = Dataset(
                streams=[_Stream(remote=remote, local=str(folder), split=split)], batch_size=1,
                num_canonical_nodes=config.data.num_canonical_nodes, shuffle=config.data.shuffle,
                shuffle_algo=config.data.shuffle_algo, shuffle_seed=config.data.shuffle_seed,
                shuffle_block_size=config.data.shuffle_block_size)
    except Exception as error:
        raise UserError(f"{index if remote is None else remote}: cannot be opened ({one_line(error)})") from error
    # All ranks of the machine have it open: without a name, it goes with the last of them, however that one ends.
    if dist.is_initialized():
        dist.barrier()
    for memory in made:
        memory.unlink()
    if remote is not None:
        dataset.cache_limit = _cache_limit(config.data.cache_limit, f"{remote}/{split}", dataset.shards)
        for left in index.parent.glob(".*.partial*"):  # by a killed run: another one may be writing the younger ones
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - 3600:
                    left.unlink()
    return dataset


class Dataset(streaming.StreamingDataset):  # type: ignore[name-defined]  # import_streaming has returned it
    """StreamingDataset, but what fails in one thread or rank does not leave the others waiting for ever."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        # Under these names streaming finds one lock for all; else it makes one at each use, and cannot release it.
        self.cache_filelock = self._cache_filelock = FileLock(self._cache_filelock_path)

    def prepare_shard(self, shard_id: int, blocking: bool = True):
        """Returns once the shard is there, or another thread or rank has failed at it. UserError: this one has."""
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            self._shard_states[shard_id] = internals._ShardState.REMOTE  # not: under way
            self._cache_filelock.release(force=True)                     # if it is this thread's
            raise

    def replace_shard(self, shard_id: int):
        """Throws a damaged shard out of the cache and fetches it again, unless another rank has done so just now."""
        info = self.shards[shard_id].raw_data
        path = Path(self.streams[0].local, self.streams[0].split, info.basename)
        with self._cache_filelock:
            if (problem := damage(path, info)) and path.exists():
                print(f"warning: {path}: {problem}; fetched again", file=sys.stderr, flush=True)
                self._evict_shard(shard_id)
        self.prepare_shard(shard_id)

    def rows(self, shard_id: int, numbers: list[int], dtype: str, width: int) -> np.ndarray | None:
        """(numbers, width): those samples of a shard that has one column, of so many numbers; its file is opened once, not
        for each, as by get_item. None: it is not there or not as it should be; get_item mends that, or tells of it.
        """
        stream, size = self.streams[0], width * np.dtype(dtype).itemsize
        found = []
        try:
            with open(f"{stream.local}/{stream.split}/{self.shards[shard_id].raw_data.basename}", "rb", 0) as file:
                for number in numbers:
                    begin, end = struct.unpack("<II", os.pread(file.fileno(), 8, 4 + 4 * number))
                    found.append(os.pread(file.fileno(), size, begin))
                    if not len(found[-1]) == size == end - begin:
                        return None
        except (OSError, struct.error):
            return None
        self._shard_access_times[shard_id] = time.time_ns()  # the coldest shard is evicted first
        return np.frombuffer(b"".join(found), dtype).reshape(-1, width)

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.array([shard.raw_data.bytes for shard in self.shards])

    @property
    def cache_usage(self) -> int:
        """Counted anew each time: streaming's sum drifts with each failure, until nothing more may be cached."""
        return int(self.sizes[self._shard_states.numpy() == internals._ShardState.LOCAL].sum())

    @cache_usage.setter
    def cache_usage(self, _):
        pass


class _Stream(streaming.Stream):  # type: ignore[name-defined]  # the same
    """Fetches a shard into the cache: whole, hashed and under its name, or not at all. So one killed leaves no half."""

    def prepare_shard(self, shard) -> int:
        wanted = shard.zip_data or shard.raw_data
        path = Path(self.local, self.split, shard.raw_data.basename)
        remote = f"{self.remote}/{self.split}/{wanted.basename}"

        def get(file: Path):
            try:
                self._downloader.download(remote, str(file), TIMEOUT_S)  # type: ignore[has-type]  # one for all threads
            except Exception:
                if remote.startswith("sftp:"):  # has one connection, which is dead now; the others mend themselves
                    self._downloader = CloudDownloader.get(self.remote)
                raise
            _check(file, wanted)
            if shard.zip_data:
                file.write_bytes(decompress(shard.compression, file.read_bytes()))
                _check(file, shard.raw_data)

        if not path.exists():
            if self.remote is None:
                raise UserError(f"{path}: is missing; copy it again, or convert the text again")
            _fetch(remote, path, get)
        return 0  # Dataset counts what is cached


class NotThere(UserError):
    """The file does not exist there: the storage itself has answered."""


def _cache_limit(setting: str | None, what: str, shards: list) -> int | None:
    """data.cache_limit in bytes. One that cannot hold what is read and fetched at once is refused, in whatever order."""
    if setting is None:
        return None
    try:
        limit = bytes_to_int(setting)
    except (ValueError, OverflowError):
        raise UserError(f"data.cache_limit: {setting!r} is no size; write it as 200gb") from None
    least = 4 * max(shard.get_max_size() for shard in shards)
    if limit < least:
        raise UserError(f"data.cache_limit: {setting} does not hold four of the shards of {what}; take at least "
                        f"{-(-least >> 10)}kb, and rather the whole dataset's size")
    return limit


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


def is_compressed(index: Path) -> bool:
    try:
        return any(shard["zip_data"] for shard in json.loads(index.read_text())["shards"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False  # what is wrong with it is told when it is opened


# ---- downloading ----------------------------------------------------------------------------------------------------

class _S3(S3Downloader):
    """streaming's, but it waits no minute for a connection, nor does it ask for ever where the answer is always 400."""

    def _create_s3_client(self, unsigned: bool = False, timeout: float = TIMEOUT_S):
        from boto3.session import Session
        from botocore import UNSIGNED
        from botocore.config import Config
        if unsigned and self._s3_client is not None and self._s3_client.meta.config.signature_version is UNSIGNED:
            raise ConnectionError("400 Bad Request, with credentials and without; is S3_ENDPOINT_URL right?")
        config = Config(connect_timeout=timeout, read_timeout=timeout, retries={"mode": "adaptive"},
                        signature_version=UNSIGNED if unsigned else None)
        self._s3_client = Session().client("s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL"))


DOWNLOADER_MAPPINGS["s3"] = _S3


def download(remote: str, local: Path):
    """A small file of a remote dataset, each time anew: what was cached may be of another dataset."""
    problem = None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            _fetch(remote, local, lambda file: CloudDownloader.direct_download(remote, str(file), TIMEOUT_S))
        except UserError as error:
            problem = error
            with contextlib.suppress(OSError):
                os.removedirs(local.parent)  # what is empty
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if any(problems):
        raise next(filter(None, problems))


def _fetch(remote: str, local: Path, get):
    """Puts the file that get(path) writes in the place of `local`. Tries again, after longer and longer pauses."""
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{local.parent}: cannot be written ({error.strerror}); set data.cache_dir to a folder that "
                        "can be") from error
    began = time.monotonic()
    aside = local.with_name(f".{local.name}.{secrets.token_hex(4)}.partial")  # other runs may share the cache
    for attempt in range(1, ATTEMPTS + 1):
        try:
            get(aside)
            return os.replace(aside, local)
        except Exception as error:
            said = one_line(getattr(error, "last_exception", error))  # boto's RetriesExceededError alone tells nothing
            remedy = _remedy(error, said)
            if isinstance(error, _Damaged) and "://" not in remote:  # a file beside it: it will not change by itself
                remedy = "copy it again, or convert the text again"
            if remedy is None:  # another attempt may help
                if attempt < ATTEMPTS and (attempt == 1 or time.monotonic() - began < PATIENCE_S):
                    print(f"warning: {remote}: {said}; trying again ({attempt + 1} of {ATTEMPTS})", file=sys.stderr,
                          flush=True)
                    time.sleep(PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
                    continue
                remedy = f"tried {attempt} times; " + (
                    "copy it there again, or convert the text again" if isinstance(error, _Damaged) else
                    "once that is mended, the same command goes on")
            kind = NotThere if remedy == NOT_THERE else UserError
            raise kind(f"{remote}: cannot be fetched ({said}); {remedy}") from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()


def _remedy(error: Exception, said: str) -> str | None:
    """What helps against an error that another attempt would only meet again; None: another attempt may do."""
    local, number = (getattr(error, name, None) for name in ("filename", "errno"))
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "make room, set data.cache_limit, or move data.cache_dir"
    if local and number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "set data.cache_dir to a folder that can be written"
    if "nable to locate credentials" in said or "credentials were not found" in said:
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what else your storage asks for"
    if isinstance(error, FileNotFoundError) or "not found" in said.lower():
        return NOT_THERE
    if local or isinstance(error, ImportError) or "Unsupported" in said:
        return "mend data.path or data.cache_dir"
    return None


class _Damaged(Exception):
    pass


def _check(path: Path, info):
    if problem := damage(path, info):
        raise _Damaged(f"it {problem}")


def damage(path: Path, info, hashed: bool = True) -> str | None:
    """What is wrong with a shard's file, if anything. info: what index.json says of it."""
    try:
        size = path.stat().st_size
        if size != info.bytes:
            return f"has {size} of {info.bytes} bytes"
        expected = info.hashes.get("xxh64")  # shards made elsewhere may have none
        if hashed and expected and file_hash(path, xxhash.xxh64()) != expected:
            return "has changed since it was written"
    except FileNotFoundError:
        return "is missing"
    return None
