"""One multinomial regression for all: against scikit-learn, with more rows than columns and fewer, dense and sparse."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vitrail.coders.sparse import Codes
from vitrail.metrics import multinomial
from vitrail.metrics.minimise import FewRows
from vitrail.metrics.multinomial import fit_logistic


def rows(n, d, n_classes=4, seed=0):
    """Sparse and not negative; column 1 is constant, 2 dead, 4 is column 3 again; row 5 is row 1 again."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    z = rng.exponential(1.0, (n, d)) * (rng.random((n, d)) < 0.3)
    z[np.arange(n), 5 + y] += 1.0
    z[:, 1], z[:, 2], z[:, 4] = 0.7, 0, z[:, 3]
    z[5] = z[1]
    return torch.from_numpy(z).float(), torch.from_numpy(y)


def reference(x, y, c=1.0):
    return LogisticRegression(C=c, tol=1e-12, max_iter=100_000).fit(x.double().numpy(), y.numpy())


def test_a_diagonal_and_a_few_rows_by_hand():
    # H = diag(1, 4) + (1, 2)^T (1, 2) = [[2, 2], [2, 8]], with inverse [[8, -2], [-2, 2]] / 12: of (3, 0) (2, -1/2).
    scale = FewRows.of(torch.tensor([[1.0, 4.0]]), torch.tensor([[[1.0, 2.0]]]))
    torch.testing.assert_close(scale(torch.tensor([[3.0, 0.0]])), torch.tensor([[2.0, -0.5]]))


@pytest.mark.parametrize(("n", "d"), [(60, 12), (30, 90)])
@pytest.mark.parametrize("sparse", [False, True])
def test_scikit_learns_weights_with_more_rows_than_columns_and_with_fewer(n, d, sparse):
    z, y = rows(n, d)
    found, want = fit_logistic(Codes.from_dense(z) if sparse else z, y, c=2.0), reference(z, y, 2.0)
    assert found.converged
    assert found.gradient < 1e-7
    np.testing.assert_allclose(found.weight, want.coef_, atol=1e-5)
    np.testing.assert_allclose(found.bias - found.bias.mean(), want.intercept_ - want.intercept_.mean(), atol=1e-5)
    assert found.weight[:, 2].abs().max() < 1e-12
    np.testing.assert_allclose(found.scores(z).softmax(1), want.predict_proba(z.double().numpy()), atol=1e-5)


def test_by_rows_and_by_columns_end_alike(monkeypatch):
    z, y = rows(30, 90)
    short = fit_logistic(z, y)
    monkeypatch.setattr(multinomial, "MOST_ROWS", 0)
    torch.testing.assert_close(short.weight, fit_logistic(z, y).weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("n", "d"), [(60, 20), (24, 90)])
def test_a_start_changes_the_way_and_not_the_end(n, d):
    z, y = rows(n, d)
    few = fit_logistic(z[:, :12], y)
    torch.testing.assert_close(fit_logistic(z, y, start=few).weight, fit_logistic(z, y).weight, atol=1e-6, rtol=0)
    there = fit_logistic(z, y, start=fit_logistic(z, y), max_iter=1)
    assert there.gradient < 1e-7


def test_two_classes_are_scikit_learns_with_half_the_c():
    z, y = rows(40, 12, n_classes=2)
    found, want = fit_logistic(z, y, c=0.5), reference(z, y)
    np.testing.assert_allclose(found.weight[1] - found.weight[0], want.coef_[0], atol=1e-5)


def test_rows_of_nothing_but_constants_give_the_shares():
    found = fit_logistic(torch.ones(4, 9), torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(found.scores(torch.ones(1, 9)).softmax(1), torch.tensor([[0.75, 0.25]]).double())


def test_too_few_steps_are_told():
    z, y = rows(60, 12)
    assert not fit_logistic(z, y, max_iter=2).converged


@pytest.mark.parametrize("sparse", [False, True])
def test_a_latent_that_all_rows_share_drowns_nothing(sparse):
    z, y = rows(40, 90)
    want = fit_logistic(z, y)
    z = z.double()
    z[:, 1] = 3e5  # instead of 0.7: constant either way, so that only its own weight, which is 0, could tell
    found = fit_logistic(Codes.from_dense(z) if sparse else z, y)
    assert found.converged
    np.testing.assert_allclose(found.weight, want.weight, atol=1e-5)
    z[:, 1] *= torch.linspace(0.9, 1.1, 40, dtype=torch.float64)  # products of rows now have a condition of 1e10
    assert fit_logistic(Codes.from_dense(z) if sparse else z, y).converged
