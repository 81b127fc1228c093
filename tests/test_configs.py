"""Every file of configs/ is valid, and builds its model on the meta device; reference.yaml is what the code says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from nanogpt.config import Config, load_config
from nanogpt.model import GPT

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "configs" / "reference.yaml"
CONFIGS = sorted(set(REFERENCE.parent.glob("*.yaml")) - {REFERENCE})
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


def test_the_reference_is_current():
    made = subprocess.run([sys.executable, "-m", "nanogpt.config"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert REFERENCE.read_text() == made, "settings have changed; type: python -m nanogpt.config > configs/reference.yaml"


def test_the_reference_is_a_config_of_the_defaults():
    """It lacks what has no default: data, and an end."""
    needed = ["--data.path=data/owt", "--train.max_steps=9"]
    defaults = Config(data=dict(path="data/owt"), train=dict(max_steps=9))
    assert load_config([str(REFERENCE), *needed]).model_dump() == defaults.model_dump()
    written = yaml.safe_load(REFERENCE.read_text())
    assert {k: v.keys() for k, v in written.items()} == {k: v.keys() for k, v in Config().model_dump().items()}


def test_what_the_reference_says():
    """Of each kind of setting one."""
    text = REFERENCE.read_text()
    for line in ("  # sequences an optimizer step, over all ranks\n  global_batch_size: 480  # integer > 0\n",
                 "  wandb: 'off'  # off | online | offline\n", "  dropout: 0.0  # number >= 0 and < 1\n",
                 "  n_layer: 12  # integer > 0 and <= 1048576\n", "  max_tokens: null  # integer > 0, or null\n",
                 "  profile: null  # list of 2 x (integer > 0), or null\n", "  shuffle: true  # boolean\n",
                 "  #     kind: linear | llama3\n"):
        assert line in text
