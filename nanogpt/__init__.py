"""A GPT trainer: MDS shards -> StreamingDataset -> fully_shard -> torch.distributed.checkpoint."""

import os

__version__ = "0.1.0"

# How long a CPU thread spins before it sleeps when it waits for the others: by default so long that one more busy
# process on the machine makes training 20 times slower, and not 2. libgomp reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def __getattr__(name):
    """`from nanogpt import load`: torch is imported for those who ask for it."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanogpt.generate import load
    return load
