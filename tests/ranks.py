"""Gloo ranks that are started once, and run one function after another in process groups of any size.

Starting a process takes longer than a process group: so four processes live as long as the suite.
"""

import gc
import os
import socket
import traceback

from forked import CONTEXT

RANKS = 4
TIMEOUT_S = 400


def _serve(rank: int, pipe):
    import torch
    import torch.distributed as dist
    gc.freeze()  # see forked.py
    torch.set_num_threads(1)
    os.sched_getaffinity = lambda process: {0}  # so does ranks.py then: two threads make so small a model slower
    while (task := pipe.recv()) is not None:
        function, args, world_size, local_world_size, port = task
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank % local_world_size),
                          LOCAL_WORLD_SIZE=str(local_world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            result = function(*args), None
        except BaseException as error:
            result = None, (f"{type(error).__name__}: {error}", traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(result)


class Ranks:
    def __init__(self):
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, world_size: int, function, *args, local_world_size: int | None = None) -> list:
        """function(*args) on ranks 0 … world_size - 1, with torchrun's environment: their results, in order of rank."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for pipe in self.pipes[:world_size]:
            pipe.send((function, args, world_size, local_world_size or world_size, port))
        results = []
        for rank, pipe in enumerate(self.pipes[:world_size]):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} of {world_size} hangs")
            results.append(pipe.recv())
        errors = [error for _, error in results if error]
        if errors:
            raise RuntimeError("\n".join(f"{said}\n{where}" for said, where in errors))
        return [value for value, _ in results]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()
