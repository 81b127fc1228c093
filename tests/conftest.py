"""What tests share: small datasets, and ranks that are started once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def transformers():
    """transformers, which would import torchvision, which fails beside a CPU torch: say that there is none."""
    import transformers.utils.import_utils as available
    available._torchvision_available = False
    import transformers
    return transformers
