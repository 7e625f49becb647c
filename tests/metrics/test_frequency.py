import numpy as np
import pytest
import torch
from seen_examples import coder_of, same_in_two_batches, seen_codes, setting_of, values

from vitrail.coders.sparse import Codes
from vitrail.metrics import frequency
from vitrail.metrics.frequency import FiringFrequency, frequency_histogram, images_fired


def some_codes(n=40, d_sae=9, seed=0):
    z = torch.randn(n, d_sae, generator=torch.Generator().manual_seed(seed)) - torch.linspace(-1, 4, d_sae)
    return z.relu()


def test_by_hand():
    # 2 images of 2 rows. Latent 0 fires in all 4 rows, 1 in one, 2 never.
    z = torch.tensor([[1.0, 2, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    metric = FiringFrequency(setting_of(coder_of(3), n_tokens=2))
    metric.update(seen_codes(z, 2))
    got = values(metric.compute())
    assert got["above_10"] == pytest.approx(2 / 3)
    assert got["above_50"] == pytest.approx(1 / 3)
    assert got["l0_above_50"] == pytest.approx(4 / 5)
    curves = metric.curves()
    assert curves["firing_histogram"][0] == {"log10_low": None, "log10_high": None, "latents": 1, "share": 1 / 3}
    filled = {row["log10_low"]: row["latents"] for row in curves["firing_histogram"] if row["latents"]}
    assert filled == {None: 1, -0.75: 1, -0.25: 1}  # log10 .25 = -.602; log10 1 = 0 shares the last bin
    filled = {row["log10_low"]: row["latents"] for row in curves["firing_histogram_images"] if row["latents"]}
    assert filled == {None: 1, -0.5: 1, -0.25: 1}  # 1 of 2 images: -.301


@pytest.mark.parametrize("cells", [1, 50, 1 << 24])
def test_images_are_counted_as_by_a_slow_loop(cells, monkeypatch):
    monkeypatch.setattr(frequency, "CELLS_AT_ONCE", cells)
    z = some_codes()
    slow = (z.view(8, 5, -1) > 0).any(1).sum(0)
    assert images_fired(Codes.from_dense(z), 5).tolist() == slow.tolist()
    assert images_fired(Codes.from_dense(z), 1).tolist() == (z > 0).sum(0).tolist()


def test_histogram_is_numpys_and_edges_belong_to_the_bin_they_begin():
    fired = torch.tensor([0, 0, 1, 3, 10, 100, 1000, 777, 50])
    rows = frequency_histogram(fired, 1000)
    logs = np.log10(fired[2:].numpy() / 1000)
    counts, _ = np.histogram(logs, bins=np.arange(-8, 0.01, 0.25))
    assert [row["latents"] for row in rows] == [2, *counts]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert next(row["latents"] for row in rows if row["log10_low"] == -1) == 1  # 100 of 1,000


def test_streaming_in_two_batches_equals_one():
    z = some_codes()
    same_in_two_batches(
        lambda: FiringFrequency(setting_of(coder_of(9), n_tokens=5)),
        seen_codes(z, 5),
        [seen_codes(z[:15], 5), seen_codes(z[15:], 5)],
    )


def test_nothing_fires_and_nothing_shown():
    metric = FiringFrequency(setting_of(coder_of(3)))
    metric.update(seen_codes(torch.zeros(2, 3)))
    got = values(metric.compute())
    assert got["above_1"] == 0
    assert np.isnan(got["l0_above_1"])
    assert metric.curves()["firing_histogram"][0]["share"] == 1
    with pytest.raises(ValueError, match="no images were measured"):
        FiringFrequency(setting_of(coder_of(3))).compute()
