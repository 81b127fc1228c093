"""Every file of configs/ is valid, and builds its model on the meta device."""

from pathlib import Path

import pytest
import torch

from nanogpt.config import load_config
from nanogpt.model import GPT

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
PARAMETERS = {"gpt2_124m": 124, "gpt2_350m": 354, "gpt2_774m": 773, "gpt2_1558m": 1557, "gpt2_1558m_80gb": 1557,
              "gpt_modern": 114, "shakespeare_char": 10.7, "shakespeare_char_cpu": 0.8}  # millions, as published (vectors of biases apart)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config(path):
    gpus = 8 if path.stem.startswith("gpt2") else 1
    config = load_config([str(path)], gpus, gpus)
    assert config.run.name == path.stem
    assert config.accumulation(gpus) * gpus * config.train.micro_batch_size == config.train.global_batch_size
    char, gpt2 = 66, 50257
    config.model.vocab_size = gpt2 if "gpt" in path.stem or config.run.init_from else char
    with torch.device("meta"):
        model = GPT(config.model)
    assert all(p.is_meta for p in model.parameters())
    if path.stem in PARAMETERS:
        assert model.num_params() / 1e6 == pytest.approx(PARAMETERS[path.stem], rel=0.03)
