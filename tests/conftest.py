"""Shared by all tests: offline, torchvision made importable, the folder of real pictures and weights."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One thread a test process: tests run side by side, and sums come out in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from vitrail.backbones.torchvision_shim import ensure_torchvision

ensure_torchvision()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pictures and weights, for tests marked `shared`. Where they are not, the test says so and is skipped."""
    folder = Path(os.environ.get("VITRAIL_SHARED", Path(__file__).parents[1] / ".." / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: set VITRAIL_SHARED to try real pictures and weights")
    return folder
