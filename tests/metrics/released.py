"""Modules of visaebench 0.1, without what its package imports on the way (backbones, and with them transformers)."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest


def released(monkeypatch, name: str) -> types.ModuleType:
    """`name`: such as "metrics.spatial_coherence.localization". Skips the test where visaebench is not installed."""
    spec = importlib.util.find_spec("visaebench")
    if spec is None:
        pytest.skip("visaebench is not installed: pip install --no-deps visaebench")
    parts = ["visaebench", *name.split(".")[:-1]]
    for n in range(1, len(parts) + 1):
        package = types.ModuleType(".".join(parts[:n]))
        package.__path__ = [str(Path(spec.submodule_search_locations[0], *parts[1:n]))]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    for known in ("core", "core.types", "core.results", "metrics.base", name):
        monkeypatch.delitem(sys.modules, f"visaebench.{known}", raising=False)
    return importlib.import_module(f"visaebench.{name}")
