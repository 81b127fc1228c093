"""What tests share: small datasets, and ranks that are started once."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two files are tested at a time, and threads that wait for others spin
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    """The longest files first, so that of two workers none is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_faults.py", "test_train.py"))


@pytest.fixture(scope="session")
def transformers():
    """transformers, which would import torchvision, which fails beside a CPU torch: say that there is none."""
    import transformers.utils.import_utils as available
    available._torchvision_available = False
    import transformers
    return transformers


@pytest.fixture(scope="session")
def ranks():
    from ranks import Ranks
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def text_dataset(tmp_path_factory):
    """Folder of a small byte dataset: 64-token samples of pseudo-English, with a val split."""
    import random
    folder = tmp_path_factory.mktemp("text")
    words = "the of and to in that was his he it with is for as had you not be her on at by which have or from".split()
    choose = random.Random(0)
    (folder / "text.txt").write_text(" ".join(choose.choice(words) for _ in range(12000)))
    convert(folder / "text.txt", folder / "mds")
    return folder / "mds"


def convert(source, out, *options):
    """tools/convert_text_to_mds.py, as a user would type it."""
    import subprocess
    tool = Path(__file__).parents[1] / "tools" / "convert_text_to_mds.py"
    command = [sys.executable, str(tool), "--input", str(source), "--out", str(out), "--tokenizer", "byte",
               "--block-size", "64", "--val-fraction", "0.1", *options]
    subprocess.run(command, check=True, capture_output=True)
