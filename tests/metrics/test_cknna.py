"""CKNNA against the n x n arithmetic of its definitions, under what must not matter, and in batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.backbones.grid import Grid
from vitrail.coders import Codes, TopK
from vitrail.metrics.cknna import (
    CKNNA,
    _CodesKernel,
    _Pairs,
    _platonic,
    cknna,
    jackknife_error,
    largest,
    neighbours,
    rows_of_images,
)
from vitrail.metrics.passing import Seen, Setting


def naive(a, b, k, variant="platonic"):
    """Huh et al.'s `AlignmentMetrics.cknna` and `hsic_unbiased`, and the two printed formulas, line by line."""
    a, b = a.double(), b.double()
    n = len(a)
    K, L = a @ a.t(), b @ b.t()

    def mask(kernel):
        nearest = kernel.clone().fill_diagonal_(-torch.inf)
        # Equal numbers: the first column first (a stable sort).
        index = nearest.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return torch.zeros(n, n, dtype=torch.float64).scatter_(1, index, 1)

    def hsic(one, other):
        one, other = one.clone().fill_diagonal_(0), other.clone().fill_diagonal_(0)
        value = (one * other.t()).sum()
        value = value + one.sum() * other.sum() / ((n - 1) * (n - 2))
        value = value - 2 * (one @ other).sum() / (n - 2)
        return value / (n * (n - 3))

    def similarity(one, other):
        both = mask(one) * mask(other)
        return hsic(both * one, both * other)

    def align(one, other, masked=True):
        both = mask(one) * mask(other) if masked else 1
        return (both * (one - one.mean(1, keepdim=True)) * (other - other.mean(1, keepdim=True))).sum()

    if variant == "platonic":
        return float(similarity(K, L) / (similarity(K, K) * similarity(L, L)).sqrt())
    masked = variant == "centred_align"
    return float(align(K, L) / (align(K, K, masked) * align(L, L, masked)).sqrt())


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def related_codes(x, d_sae, l0, seed=1):
    return TopK(d_in=x.shape[1], d_sae=d_sae, k=l0, normalization="none", seed=seed).encode_sparse(x)


def test_by_hand():
    # Points 5, 4, 3, 1, k = 1: everyone's largest product is with 5, whose is with 4. Pairs (i, j) of the mask:
    # 01, 10, 20, 30, of kernel 20, 20, 15, 5. tr A A: the mutual pair twice, 2 * 400; sum 60; by column 40, 20, 0, 0
    # and by row 20, 20, 15, 5: together 1200. HSIC = 800 + 3600 / 6 - 1200 = 200.
    # Codes 1, 2, 3, 0.5: row 2's largest is with row 1, the others' with row 2. Pairs 02, 12, 21, 32: none is shared.
    x, z = torch.tensor([[5.0], [4], [3], [1]]), torch.tensor([[1.0], [2], [3], [0.5]])
    assert neighbours(x, 1).index[:, 0].tolist() == [1, 0, 0, 0]
    assert _platonic(pairs := _Pairs.of(neighbours(x, 1)), pairs, 4) == pytest.approx(1)
    assert cknna(x, z, k=1) == 0.0
    # Codes 5, 4, 0, 1 (row 2 did not fire: its first neighbour is row 0, of kernel 0): pairs 01, 10, 20, 30 again, of
    # kernel 20, 20, 0, 5. H(L, L) = 800 + 45^2 / 6 - (25 * 20 + 20 * 20) = 237.5. H(K, L) = 800 + 60 * 45 / 6 -
    # (columns of K 40, 20 by rows of L 20, 20: 1200) = 50. 50 / sqrt(200 * 237.5) = 0.22942.
    z = torch.tensor([[5.0], [4], [0], [1]])
    assert cknna(x, z, k=1) == pytest.approx(50 / math.sqrt(200 * 237.5))
    assert naive(x, z, 1) == pytest.approx(50 / math.sqrt(200 * 237.5))


@pytest.mark.parametrize("variant", ["platonic", "centred_align", "msae_eq5"])
@pytest.mark.parametrize(("n", "k"), [(5, 1), (12, 11), (67, 10), (400, 10)])
def test_the_same_as_n_by_n_kernels(variant, n, k):
    x = rows(n, 7)
    codes = related_codes(x, 24, 5)
    assert cknna(x, codes, k, variant) == pytest.approx(naive(x, codes.to_dense(), k, variant), abs=2e-5)
    assert cknna(x + 3, x.relu(), k, variant) == pytest.approx(naive(x + 3, x.relu(), k, variant), abs=2e-5)


@given(n=st.integers(6, 40), k=st.integers(1, 5), scale=st.floats(0.01, 100), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_scaled_and_rotated_representations_are_the_same_but_not_by_msaes_equation(n, k, scale, seed):
    x = rows(n, 6, seed)
    rotation = torch.linalg.qr(rows(6, 6, seed + 1))[0]
    for other in (x, scale * x, x @ rotation):
        assert cknna(x, other, k) == pytest.approx(1, abs=1e-3)
        assert cknna(x, other, k, "centred_align") == pytest.approx(1, abs=1e-3)
        if n > 3 * k:
            assert cknna(x, other, k, "msae_eq5") < 0.95


def test_unrelated_representations_are_near_zero():
    assert abs(cknna(rows(600, 20), rows(600, 20, 1))) < 0.03


def test_codes_may_be_dense_or_sparse_and_wide_ones_are_laid_out_in_parts():
    x = rows(400, 8)
    z = x @ rows(8, 40, 1)
    mostly_on, mostly_off = z.relu(), (z - 6).relu()
    assert _CodesKernel(Codes.from_dense(mostly_on))._dense
    assert not _CodesKernel(Codes.from_dense(mostly_off))._dense
    for z in (mostly_on, mostly_off):
        assert cknna(x, Codes.from_dense(z)) == pytest.approx(cknna(x, z), abs=1e-6)
        assert cknna(x, Codes.from_dense(z)) == pytest.approx(naive(x, z, 10), abs=2e-5)


def test_largest_ranks_equal_numbers_by_column():
    block = torch.zeros(3, 640)
    block[0, [600, 5, 300]] = 1.0  # three, and then zeros
    block[1] = torch.arange(640.0)
    block[2, 7] = -1.0
    assert largest(block, 5).tolist() == [[5, 300, 600, 0, 1], [639, 638, 637, 636, 635], [0, 1, 2, 3, 4]]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="5 rows and 6 rows"):
        cknna(rows(5, 2), rows(6, 2))
    with pytest.raises(ValueError, match="more rows than k >= 1, and at least 4; got 10 rows and k=10"):
        cknna(rows(10, 2), rows(10, 2))
    with pytest.raises(ValueError, match="no variant 'cka'"):
        cknna(rows(20, 2), rows(20, 2), variant="cka")


# -- in a pass


def setting(coder, n_images, n_tokens):
    return Setting(
        coder=coder,
        n_tokens=n_tokens,
        tokens="all",
        grid=Grid(height=1, width=n_tokens, patch_px=1, image_px=(1, n_tokens), n_cls=0, n_registers=0),
        cls_token=None,
        patches=slice(0, n_tokens),
        n_images=n_images,
        shift=torch.zeros(coder.d_in),
        seed=3,
    )


@torch.no_grad()
def seen(coder, x):
    codes = coder.encode_sparse(x.flatten(0, 1))
    return Seen(x=x, target=x, codes=codes, x_hat=coder.decode_sparse(codes).view_as(x))


def shown(metric, coder, x, batch):
    for part in x.split(batch):
        metric.update(seen(coder, part))
    return metric


def test_batches_do_not_matter_and_all_rows_are_the_plain_function():
    coder = TopK(d_in=6, d_sae=30, k=4, normalization="none", seed=0).eval()
    x = rows(120, 6).view(40, 3, 6)
    one, two = (shown(CKNNA(setting(coder, 40, 3), k=5), coder, x, batch).compute() for batch in (40, 7))
    assert one == two
    flat = x.flatten(0, 1)
    assert one["cknna"].n == 120
    assert one["cknna"].value == pytest.approx(naive(flat - flat.mean(0), seen(coder, x).codes.to_dense(), 5), abs=2e-5)
    assert one["cknna"].low < one["cknna"].value < one["cknna"].high
    assert one["cknna"].definition == "platonic-rep, k=5, up-to-3-rows-an-image, jackknife"
    assert one["cknna_eq5"].definition == "msae-eq5, k=5, up-to-3-rows-an-image"
    assert one["cknna_eq5"].low is None


def test_one_row_an_image_where_there_are_enough_images():
    rng = np.random.default_rng(0)
    assert rows_of_images(50, 4, 30, rng).sum() == 30
    assert rows_of_images(50, 4, 30, rng).max() == 1
    assert sorted(rows_of_images(7, 4, 10, rng)) == [1, 1, 1, 1, 2, 2, 2]
    assert rows_of_images(7, 4, 100, rng).tolist() == [4] * 7
    coder = TopK(d_in=6, d_sae=30, k=4, normalization="none", seed=0).eval()
    metric = shown(CKNNA(setting(coder, 50, 4), n=30), coder, rows(200, 6).view(50, 4, 6), 8)
    assert metric.compute()["cknna"].n == 30
    assert "one-row-an-image" in metric.compute()["cknna"].definition


def test_too_few_rows_no_codes_and_one_image():
    coder = TopK(d_in=6, d_sae=30, k=4, normalization="none", seed=0).eval()
    assert math.isnan(CKNNA(setting(coder, 5, 2)).compute()["cknna"].value)  # none was shown
    few = shown(CKNNA(setting(coder, 5, 2)), coder, rows(10, 6).view(5, 2, 6), 5).compute()
    assert math.isnan(few["cknna"].value)
    assert few["cknna"].n == 10
    image = shown(CKNNA(setting(coder, 1, 40)), coder, rows(40, 6).view(1, 40, 6), 1).compute()["cknna"]
    assert math.isfinite(image.value)
    assert image.low is None  # no groups of images
    x = rows(60, 6).view(30, 2, 6)
    silent = CKNNA(setting(coder, 30, 2))
    silent.update(Seen(x=x, target=x, codes=Codes.from_dense(torch.zeros(60, 30)), x_hat=x))
    assert all(math.isnan(m.value) and m.low is None for m in silent.compute().values())


def test_the_jackknife_is_that_of_n_by_n_kernels():
    x = rows(100, 5)
    z = (x @ rows(5, 12, 1)).relu()
    image = np.arange(100) // 2
    values = [naive(x[image % 20 != group], z[image % 20 != group], 4) for group in range(20)]
    slow = math.sqrt(19 / 20 * np.square(np.array(values) - np.mean(values)).sum())
    assert jackknife_error(neighbours(x, 4), neighbours(z, 4), image) == pytest.approx(slow, rel=1e-3)
