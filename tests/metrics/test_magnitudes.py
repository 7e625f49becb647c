import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from seen_examples import coder_of, same_in_two_batches, seen_codes, setting_of, values

from vitrail.coders.sparse import Codes
from vitrail.metrics.magnitudes import N_BINS, Magnitudes, binned, row_maxima


def some_codes(n=40, d_sae=9, seed=0):
    z = torch.randn(n, d_sae, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 1.5, d_sae)
    z[7] = 0
    return z.relu()


def test_by_hand():
    # Two images of two rows. Above 15: latent 0 in both rows of the first image, latent 1 in its second row and in
    # the second image: 3 pairs, 2 latents, 3 of 4 rows.
    z = torch.tensor([[16.0, 1, 0], [20, 30, 0], [0, 15.5, 15], [0, 0, 0]])
    metric = Magnitudes(setting_of(coder_of(3), n_tokens=2), valid={1, 2})
    metric.update(seen_codes(z, 2))
    got = values(metric.compute(n_bootstrap=10))
    assert got["high_pairs"] == 3
    assert got["high_latents"] == 2  # 15 itself is not above 15
    assert got["high_rows"] == 3 / 4
    assert got["high_valid_pairs"] == pytest.approx(2 / 3)  # latent 1 in either image
    assert got["high_valid_latents"] == 1 / 2
    assert got["high_of_valid"] == 1 / 2
    curves = metric.curves()
    filled = {row["log10_low"]: row["count"] for row in curves["activation_histogram"] if row["count"]}
    # log10: 16 1.204, 1 0, 20 1.301, 30 1.477, 15.5 1.190, 15 1.176
    assert filled == {0.0: 1, 1.1: 2, 1.2: 1, 1.3: 1, 1.4: 1}
    filled = {row["log10_low"]: row["count"] for row in curves["maximum_histogram"] if row["count"]}
    assert filled == {1.1: 1, 1.2: 1, 1.4: 1}  # the silent row has no bin


def test_histogram_is_numpys():
    values_ = some_codes()[some_codes() > 0]
    counts, _ = np.histogram(np.log10(values_.numpy()), bins=np.linspace(-4, 4, N_BINS + 1))
    inside = (values_ > 1e-4).sum()
    assert binned(values_).sum() == len(values_)
    got = binned(values_)
    got[0] -= len(values_) - inside  # smaller ones share the first bin
    assert got.tolist() == counts.tolist()


def test_extremes_share_the_end_bins_and_edges_begin_a_bin():
    counts = binned(torch.tensor([1e-9, 1e9, 1.0, 0.999]))
    assert counts[0] == counts[-1] == 1
    assert counts[40] == counts[39] == 1  # 10^0 begins bin 40


def test_row_maxima_are_the_dense_ones():
    z = some_codes()
    assert torch.equal(row_maxima(Codes.from_dense(z)), z.max(1).values)


def test_streaming_in_two_batches_equals_one():
    z = some_codes() * 10
    same_in_two_batches(
        lambda: Magnitudes(setting_of(coder_of(9), n_tokens=5), threshold=3, valid=[0, 8]),
        seen_codes(z, 5),
        [seen_codes(z[:15], 5), seen_codes(z[15:], 5)],
    )


def test_nothing_fires_without_names_and_wrong_input():
    metric = Magnitudes(setting_of(coder_of(3)))
    metric.update(seen_codes(torch.zeros(2, 3)))
    assert values(metric.compute()) == {"high_pairs": 0, "high_latents": 0, "high_rows": 0}
    named = Magnitudes(setting_of(coder_of(3)), valid=[])
    named.update(seen_codes(torch.zeros(2, 3)))
    assert np.isnan(named.compute()["high_of_valid"].value)
    with pytest.raises(ValueError, match=r"valid latents must be in 0..2, got 3"):
        Magnitudes(setting_of(coder_of(3)), valid=[1, 3])
    with pytest.raises(ValueError, match="threshold must be positive"):
        Magnitudes(setting_of(coder_of(3)), threshold=0)
    with pytest.raises(ValueError, match="no images"):
        Magnitudes(setting_of(coder_of(3))).compute()


@pytest.mark.shared
def test_table_4_of_the_paper_has_these_shares_of_its_counts():
    path = (
        Path(os.environ.get("VITRAIL_SHARED", "../shared")) / "reference" / "tables" / "msae_table04_high_magnitude.csv"
    )
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with path.open() as file:
        for row in csv.DictReader(file):
            high, valid, named = (
                int(row[key]) for key in ("high_magnitude_samples", "valid_count", "all_valid_neurons_table3_x8")
            )
            d_sae = high + named
            z = torch.zeros(1, d_sae)
            z[0, :high] = 20.0
            metric = Magnitudes(setting_of(coder_of(d_sae)), valid=range(high - valid, high - valid + named))
            metric.update(seen_codes(z))
            got = values(metric.compute())
            assert round(100 * got["high_valid_latents"]) == int(row["valid_pct"])
            assert round(100 * got["high_of_valid"]) == int(row["high_mag_rate_pct"])
