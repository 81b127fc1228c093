"""The process group: this process joins the others that torchrun started, or makes a group of one."""

import contextlib
import ctypes
import hashlib
import json
import os
import secrets
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanogpt.config import Config, Train
from nanogpt.errors import UserError


def init_process_group(config: Config) -> torch.device:
    """Joins the ranks that torchrun started, or makes a group of one. Returns this rank's device."""
    use_cuda = torch.cuda.is_available() if config.run.device == "auto" else config.run.device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise UserError("run.device: cuda is asked for, and PyTorch finds none here; leave it at auto, or install a "
                        "CUDA build of torch")
    alone = "RANK" not in os.environ
    if alone:  # streaming reads these too
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    rank, world_size, local_rank, local_world_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"{local_world_size} ranks on this machine, and {torch.cuda.device_count()} GPUs: start "
                        "torchrun with --nproc_per_node gpu")
    # watch.py is quicker than this, once the first step is done.
    group: dict[str, Any] = dict(timeout=timedelta(seconds=config.run.first_timeout_s))
    if alone:
        group |= dict(store=dist.HashStore(), rank=0, world_size=1)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        group |= dict(store=meet(rank, world_size), rank=rank, world_size=world_size)
    if use_cuda:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **group)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))  # torchrun says 1
        keep_memory()
        dist.init_process_group("gloo", **group)
    return device


def keep_memory():
    """What is freed stays with this process (glibc's allocator; others do not mind).

    By default each large tensor's memory goes back to the kernel, and comes from it anew, zeroed, page by page: a tenth of a
    step of a small model on a CPU, and a quarter where micro-batches are large.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(AttributeError):  # a libc that has no such settings
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)          # never


def settle_precision(c: Train, device: torch.device) -> str:
    """Makes of train.precision auto what suits the device, on all ranks the same. Returns the reason, for the table."""
    if c.precision != "auto":
        return ""
    if device.type == "cuda":
        c.precision = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        return "" if c.precision == "bfloat16" else " (this GPU has no bfloat16)"
    gain = torch.tensor(bfloat16_gain())
    if dist.is_initialized():
        dist.broadcast(gain, 0)
    c.precision = "bfloat16" if gain > 1 else "float32"
    return f" (bfloat16 matmuls are {gain:.2g} x as fast as float32's here)"


def bfloat16_gain() -> float:
    """How many times as fast as float32's this CPU's bfloat16 matmuls are: 4 with AMX, 2 on many, 0.1 without instructions
    for them, 0.5 on some that have them.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(6):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def connect() -> dist.Store:
    """A connection of its own to the store that torchrun's agent, or rank 0, keeps."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         timeout=timedelta(seconds=60))


meeting = ""  # the name of the last


def meet(rank: int, world_size: int) -> dist.Store:
    """A store for these ranks alone, in a corner of the agent's.

    After a restart of the ranks, torchrun's agent keeps its store, with all that the dead ranks wrote: addresses where
    nobody listens any more. And its count of restarts is not the same on all machines. So each rank draws a token,
    rank 0 collects them, and once all have seen their own in its collection, that is the name of the corner.
    """
    global meeting
    store, mine = connect(), secrets.token_hex(8)
    store.set(f"join {rank}", mine)
    while True:
        if rank == 0:
            tokens = [store.get(f"join {r}").decode() for r in range(world_size)]
            store.set("meeting", json.dumps(tokens))
        else:
            tokens = json.loads(store.get("meeting"))
        meeting = hashlib.sha256("".join(tokens).encode()).hexdigest()[:16]
        if len(tokens) == world_size and tokens[rank] == mine:  # else the tokens of dead ranks are among them
            store.set(f"{meeting} {rank}", "")
            if rank == 0 and store.check([f"{meeting} {r}" for r in range(world_size)]):
                store.set(f"{meeting} complete", "")
            if store.check([f"{meeting} complete"]):
                return dist.PrefixStore(meeting, store)
        time.sleep(0.02)
