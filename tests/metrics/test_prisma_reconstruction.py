import pytest
import torch
from seen_examples import coder_of, seen_by, setting_of, values

from vitrail.metrics.passing import Seen
from vitrail.metrics.prisma_reconstruction import PrismaReconstruction, cosine_over_tokens
from vitrail.metrics.reconstruction import explained_variance_mean_of_ratios


def shown(x, x_hat):
    return Seen(x=x, target=x, codes=coder_of(4).encode_sparse(x.flatten(0, 1)), x_hat=x_hat)


def test_rows_that_are_parallel_are_not_perfect_over_the_token_axis():
    # x = (1, 0), (0, 1), (1, 1) at lengths 1, 5, .1. Dimension 0: x = 1 0 1, x_hat = 1 0 .1: 1.1 / sqrt(2 * 1.01);
    # dimension 1: x = 0 1 1, x_hat = 0 5 .1: 5.1 / sqrt(2 * 25.01).
    x = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    x_hat = x * torch.tensor([1.0, 5, 0.1])[:, None]
    by_hand = (1.1 / (2 * 1.01) ** 0.5 + 5.1 / (2 * 25.01) ** 0.5) / 2
    assert float(cosine_over_tokens(x, x_hat)) == pytest.approx(by_hand)
    metric = PrismaReconstruction(setting_of(coder_of(4), n_tokens=3))
    metric.update(shown(x[None], x_hat[None]))
    got = values(metric.compute(n_bootstrap=5))
    assert got["cosine_prisma"] == pytest.approx(by_hand)
    assert got["cosine_token_axis"] == pytest.approx(by_hand)


def test_means_of_ratios_are_the_functions_in_memory():
    coder = coder_of(12, 6, normalization="mean_std")
    x = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(0)) + 4
    seen, parts = seen_by(coder, x), [seen_by(coder, part) for part in x.split([5, 3])]
    flat, flat_hat = x.flatten(0, 1), seen.x_hat.flatten(0, 1)
    metric = PrismaReconstruction(setting_of(coder, n_tokens=3, shift=flat.double().mean(0)))
    for part in parts:
        metric.update(part)
    got = metric.compute(n_bootstrap=20)
    expected = explained_variance_mean_of_ratios(flat, flat_hat)
    assert got["explained_variance_mean_of_ratios"].value == pytest.approx(expected, rel=1e-4)
    assert got["cosine_token_axis"].value == pytest.approx(float(cosine_over_tokens(flat, flat_hat)), rel=1e-6)
    pairs = [(part.target.flatten(0, 1), part.x_hat.flatten(0, 1)) for part in parts]
    ratios = [len(a) * explained_variance_mean_of_ratios(a, b) for a, b in pairs]
    assert got["explained_variance_prisma"].value == pytest.approx(sum(ratios) / len(flat), rel=1e-4)
    cosines = [float(cosine_over_tokens(a, b)) for a, b in pairs]
    assert got["cosine_prisma"].value == pytest.approx(sum(cosines) / 2, rel=1e-6)
    assert got["cosine_prisma"].definition == "prisma-batches"
    assert got["explained_variance_prisma"].low <= got["explained_variance_prisma"].value


def test_rows_at_the_mean_are_left_out():
    x = torch.tensor([[[1.0, 1]], [[-1, -1]], [[0, 0]]])
    metric = PrismaReconstruction(setting_of(coder_of(4)))
    metric.update(shown(x, x + 1))
    assert values(metric.compute(n_bootstrap=0))["explained_variance_prisma"] == pytest.approx(0)  # 1 - 2/2, twice


def test_nothing_shown_raises():
    with pytest.raises(ValueError, match="no images were measured"):
        PrismaReconstruction(setting_of(coder_of(4))).compute()
