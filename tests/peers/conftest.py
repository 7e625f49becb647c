"""What a test has compared, into the report that test_peers.py reads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sameness import SINGLE, Pair
from torch import Tensor

from vitrail.coders import thresholded
from vitrail.coders.base import SparseCoder


@pytest.fixture(params=["sparse", "dense"])
def either_way(request, monkeypatch) -> None:
    """The two ways in which a thresholded coder makes its products; which one it takes depends on what fires."""
    share = {"sparse": 2.0, "dense": 0.0}[request.param]
    monkeypatch.setattr(thresholded, "sparse_below", lambda dtype, device: share)


@pytest.fixture
def compared(record_property) -> Callable[[Pair], None]:
    """Say so, after the assertions: the architecture's name is read off the coder that was compared."""

    def done(pair: Pair) -> None:
        assert {"codes", "reconstruction", "loss"} <= set(pair.differences)
        assert any(name.startswith("gradient of") for name in pair.differences)
        record_property("compared", pair.coder.name)
        record_property("differences", json.dumps(pair.differences))

    return done


@pytest.fixture
def revived(record_property) -> Callable[[str, Pair], None]:
    def done(name: str, pair: Pair) -> None:
        assert any(name.startswith("gradient of") for name in pair.differences)
        record_property("revived", name)
        record_property("differences", json.dumps(pair.differences))

    return done


@pytest.fixture
def opened(record_property) -> Callable[..., None]:
    """A peer's file, opened by vitrail, gives the peer's codes and reconstructions of the same rows."""

    def done(
        kind: str, coder: SparseCoder, x: Tensor, z: Tensor, x_hat: Tensor, tolerance: dict[str, float] = SINGLE
    ) -> None:
        pairs = [(coder.encode(x).detach(), z.detach()), (coder(x).detach(), x_hat.detach())]
        for found, theirs in pairs:
            assert bool(theirs.any())
            torch.testing.assert_close(found, theirs, **tolerance)
        record_property("opened", f"{kind} as {coder.name}")
        names = ("codes in use", "reconstruction in use")
        found = {name: float((a - b).abs().max()) for name, (a, b) in zip(names, pairs, strict=True)}
        record_property("differences", json.dumps(found))

    return done


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """sae.pt and a config, as ViSAEBench has them: JSON, or YAML by its one-line JSON."""

    def written(state: dict[str, Tensor], config: dict[str, object], name: str = "config.json") -> Path:
        torch.save({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "sae.pt")
        (tmp_path / name).write_text(json.dumps(config))
        return tmp_path

    return written
