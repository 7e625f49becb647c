"""Coders of images and of texts, each on both."""

import pytest
import torch

from vitrail.coders import make_coder
from vitrail.metrics.reconstruction import fvu
from vitrail.statistics import ActivationStats
from vitrail.studies.modality_table import measure_rows, modality_table
from vitrail.studies.paper_tables import paper_table


@pytest.fixture(scope="module")
def clouds():
    """Two clouds of the same sparse directions: texts are smaller, and lie elsewhere."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)

    def cloud(n):
        z = torch.rand(n, 12, generator=generator) * (torch.rand(n, 12, generator=generator) < 0.15)
        return z @ directions

    images, texts = cloud(400), 0.2 * cloud(400) + torch.linspace(-3, 3, 8)
    return directions, {"image": images, "text": texts}


def test_a_row_for_each_coder_and_modality(clouds):
    directions, rows = clouds
    coders, trained_on = {}, {"of images": "image", "of texts": "text"}
    for name, modality in trained_on.items():
        coder = make_coder("topk", d_in=8, d_sae=12, k=4, normalization="mean_std")
        coder.fit(ActivationStats.of(rows[modality]), rows[modality])
        with torch.no_grad():
            coder.W_dec.copy_(directions)
            coder.W_enc.copy_(directions.t())
        coders[name] = coder.eval()
    table = modality_table(coders, trained_on, rows, rows, n_bootstrap=20)
    assert [row["name"] for row in table] == [
        "of images on images", "of images on texts", "of texts on images", "of texts on texts",
    ]  # fmt: skip
    found = {row["name"]: row["measured"]["fvu"]["value"] for row in table}
    # Witness: the two own cells are the plain FVU of rows in memory.
    for name, modality in trained_on.items():
        with torch.no_grad():
            x_hat = coders[name](rows[modality])
        assert found[f"{name} on {modality}s"] == pytest.approx(fvu(rows[modality], x_hat), rel=1e-4)
    # Given the other modality's mean and scale, the same directions say it as well; without, hardly at all.
    assert found["of images on texts"] == pytest.approx(found["of texts on texts"], rel=0.05)
    plain, _ = measure_rows(coders["of images"], rows["text"], shift=rows["text"].double().mean(0), n_bootstrap=0)
    assert plain["fvu"].value > 3 * found["of images on texts"]
    assert "of images on texts" in paper_table(table, "msae")


def test_rows_of_the_modality_a_coder_learnt_are_needed(clouds):
    _, rows = clouds
    coder = make_coder("topk", d_in=8, d_sae=12, k=4)
    with pytest.raises(ValueError, match="coder a was trained on 'text', and there are rows of image only"):
        modality_table({"a": coder}, {"a": "text"}, {"image": rows["image"]}, rows)
