"""A GPT trainer: MDS shards -> StreamingDataset -> fully_shard -> torch.distributed.checkpoint."""

__version__ = "0.1.0"
