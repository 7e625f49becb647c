"""The common measure of benchmarks/quality.py, the order everyone reads in, and the search for a coefficient."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from vitrail.metrics.reconstruction import fvu
from vitrail.training import TensorSource

SCRIPT = Path(__file__).parents[1] / "benchmarks/quality.py"


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quality"]


def test_the_largest_of_a_batch_are_ranked_by_multiples_of_their_thresholds(quality):
    # Divided by (1, 2, 4): 3 1 1.5 and 2 2.5 .25; n=2, k=1: the two largest multiples are 3 and 2.5.
    activations = torch.tensor([[3.0, 2.0, 6.0], [2.0, 5.0, 1.0]])
    kept = quality.largest(activations, torch.tensor([1.0, 2.0, 4.0]), 1)
    assert torch.equal(kept, torch.tensor([[3.0, 0.0, 0.0], [0.0, 5.0, 0.0]]))


def test_a_mean_l0_of_k_is_one_factor_on_all_thresholds(quality):
    g = torch.Generator().manual_seed(0)
    activations, thresholds = torch.rand(50, 30, generator=g).double(), torch.rand(30, generator=g).double() + 0.1
    kept = quality.largest(activations, thresholds, 4)
    factor = (activations / thresholds)[kept > 0].min()
    assert int((kept > 0).sum()) == 200
    assert torch.equal(kept, activations * (activations >= factor * thresholds * (1 - 1e-12)))


def identity(quality, thresholds):
    return quality.Trained(lambda x: x * (x > 1.5), lambda z: z, lambda x: x, thresholds)


def test_the_measure_by_hand(quality):
    # Mean (1.5, 2), spread 2*.25 + 2*4 = 8.5. In use only 4 and 2 fire: errors 1 + 0, so FVU 1/8.5; one entry a row.
    # The latents (0 and 1) both fire, so none is dead. At k=2: all of 1 4 2 0, no error, three entries on two rows.
    x = torch.tensor([[1.0, 4.0], [2.0, 0.0]])
    measured = quality.measure(identity(quality, torch.ones(2)), x, 2)
    assert measured["fvu"] == pytest.approx(1 / 8.5)
    assert measured["l0"] == 1
    assert measured["dead"] == 0
    assert measured["fvu_at_k"] == 0
    assert measured["l0_at_k"] == 1.5


def test_a_topk_is_measured_as_it_is(quality):
    x = torch.tensor([[1.0, 4.0], [1.0, 0.0]])
    measured = quality.measure(identity(quality, None), x, 2)
    assert measured["fvu_at_k"] == measured["fvu"]
    assert measured["dead"] == 0.5  # latent 0 fires nowhere


def test_the_measure_agrees_with_the_metric_over_chunks(quality, monkeypatch):
    monkeypatch.setattr(quality, "MEASURED_AT_ONCE", 7)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 3
    trained = identity(quality, None)
    assert quality.measure(trained, x, 2)["fvu"] == pytest.approx(fvu(x, trained.encode(x)), rel=1e-12)


def test_everyone_reads_the_batches_that_vitrail_reads(quality):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    source = TensorSource(x, batch_size=5, seed=7)
    theirs = list(quality.Batches(x, quality.orders(20, 5, 6, 7)))
    ours = [*source, *source][:6]
    assert len(theirs) == 6
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_a_peers_steps_shrink_in_short_runs_and_stay_in_long_ones(quality):
    assert quality.Job(4, 8, 2, 16, 500, 1e-3, 0).scaled(1000) == 50
    assert quality.Job(4, 8, 2, 16, 20_000, 1e-3, 0).scaled(1000) == 1000


def test_the_next_coefficient_is_where_the_line_through_the_last_two_is_zero(quality):
    # L0 = 1000 / c^0.5 and k = 10: the answer is c = 10,000, exactly, from any two.
    def excess(log_c):
        return math.log(1000 * math.exp(-0.5 * log_c) / 10)

    tried = [(log_c, excess(log_c)) for log_c in (math.log(900), math.log(2000))]
    assert quality.next_coefficient(tried) == pytest.approx(math.log(10_000))


def test_the_t_interval_by_hand(quality):
    # 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.3027, so the half width is 4.3027 / sqrt(3) = 2.4841.
    assert quality.t_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.4841, abs=1e-4))
