"""Downstream tasks: by hand, against scikit-learn and torchmetrics, and codes against the same numbers laid out."""

import numpy as np
import pytest
import torch

from vitrail.coders.sparse import Codes
from vitrail.metrics.downstream import (
    fit_logistic,
    lift,
    linear_accuracy,
    miou,
    nearest,
    nearest_accuracy,
    retrieval,
    segmentation,
    upsampled,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(n=90, d=6, n_classes=4, noise=1.0, seed=0):
    labels = torch.arange(n) % n_classes
    return draw(n_classes, d, seed=seed + 9)[labels] + noise * draw(n, d, seed=seed), labels


def sparse(n=60, d=20, seed=0):
    return draw(n, d, seed=seed).relu() * (draw(n, d, seed=seed + 1) > 0.3)


def test_retrieval_by_hand():
    # Angles 0, 10, 40, 60, 200 degrees. Nearest: 0 -> 1, 1 -> 0, 2 -> 3, 3 -> 2, and the last is alone in its class.
    angle = torch.tensor([0.0, 10, 40, 60, 200]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([1.0, 5, 2, 9, 1])[:, None]
    labels = torch.tensor([0, 0, 1, 0, 2])
    found = retrieval(x, torch.tensor([0, 0, 1, 1, 2]), ks=(1,), n_bootstrap=0)
    assert (found["retrieval_r@1"].value, found["retrieval_r@1"].n) == (1.0, 4)
    # Class 0 is 0, 1 and 3: picture 3 finds 2 first (wrong), then 1. Picture 2 is alone too.
    found = retrieval(x, labels, ks=(1, 2), n_bootstrap=0)
    assert (found["retrieval_r@1"].value, found["retrieval_r@2"].value) == (pytest.approx(2 / 3), 1.0)


@pytest.mark.parametrize("similarity", ["cosine", "l1"])
def test_neighbours_are_scikit_learns_for_tensors_and_codes(similarity, monkeypatch):
    from sklearn.neighbors import NearestNeighbors

    z, other = sparse(), sparse(25, seed=7) + 0.0
    other[:, 0] += 0.1  # no query is orthogonal to many rows: among ties scikit-learn picks any
    z[:, 0] += 0.01 * torch.arange(60)
    fitted = NearestNeighbors(
        n_neighbors=5, metric={"cosine": "cosine", "l1": "manhattan"}[similarity], algorithm="brute"
    )
    expected = fitted.fit(z.double().numpy()).kneighbors(other.double().numpy(), return_distance=False)
    monkeypatch.setattr("vitrail.metrics.downstream.BLOCK_VALUES", 7 * 60)  # in several blocks
    for queries, gallery in ((other, z), (Codes.from_dense(other), Codes.from_dense(z)), (other, Codes.from_dense(z))):
        assert np.array_equal(nearest(queries, gallery, 5, similarity=similarity).numpy(), expected)


def test_recall_is_torchmetrics():
    from torchmetrics.functional.retrieval import retrieval_hit_rate

    x, labels = classes(noise=2.0)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    cosines = unit @ unit.T
    found = retrieval(x, labels, n_bootstrap=20)
    for k in (1, 5, 10):
        hits = []
        for i in range(len(x)):
            others = torch.arange(len(x)) != i
            hits.append(float(retrieval_hit_rate(cosines[i, others], labels[others] == labels[i], top_k=k)))
        assert found[f"retrieval_r@{k}"].value == pytest.approx(np.mean(hits))
    assert found["retrieval_r@1"].low <= found["retrieval_r@1"].value <= found["retrieval_r@1"].high


def test_nearest_neighbours_vote_as_scikit_learns():
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (test, test_y) = classes(noise=2.0), classes(40, noise=2.0, seed=0)
    for k in (1, 4, 20):
        expected = KNeighborsClassifier(k, metric="cosine").fit(x.double(), y).score(test.double(), test_y)
        assert nearest_accuracy(x, y, test, test_y, k=k, n_bootstrap=0).value == pytest.approx(expected)


@pytest.mark.parametrize("c", [1.0, 0.01])
def test_logistic_regression_is_scikit_learns(c):
    from sklearn.linear_model import LogisticRegression

    x, y = classes(noise=1.5)
    x = x + 3  # the bias is free
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(x.double().numpy(), y.numpy())
    ours = fit_logistic(x, y, c=c)
    assert ours.gradient < 1e-7
    assert np.allclose(ours.weight.numpy(), theirs.coef_, atol=1e-4)
    bias = ours.bias.numpy() - ours.bias.numpy().mean()
    assert np.allclose(bias, theirs.intercept_ - theirs.intercept_.mean(), atol=1e-3)
    test, test_y = classes(40, noise=1.5, seed=0)
    expected = theirs.score((test + 3).double().numpy(), test_y.numpy())
    assert linear_accuracy(x, y, test + 3, test_y, c=c, n_bootstrap=0).value == pytest.approx(expected)


def test_codes_are_fitted_as_the_same_numbers_laid_out_and_classes_may_be_missing():
    z, y = sparse(), torch.arange(60) % 3 * 2  # classes 0, 2, 4
    z[:, 5] = 0
    dense, codes = fit_logistic(z, y), fit_logistic(Codes.from_dense(z), y, n_classes=6)
    assert torch.allclose(dense.weight, codes.weight[:5], atol=1e-6)
    assert float(codes.weight[:, 5].abs().max()) == 0
    assert set(codes.predict(Codes.from_dense(z)).tolist()) <= {0, 2, 4}
    assert torch.equal(dense.predict(z), codes.predict(Codes.from_dense(z)))
    assert float(dense.bias[1]) == -np.inf


def test_mean_iou_by_hand_and_against_torchmetrics():
    # Class 0: 1 of 2; class 1: 1 of 3 (said at places 1, 2; there at 1, 3); class 2 is neither there nor said.
    labels, said = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 1, 1, 2]])
    found = miou(said, labels, n_classes=4, n_bootstrap=0)
    assert found["segmentation_miou"].value == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert found["segmentation_accuracy"].value == 0.5
    from torchmetrics.functional.classification import multiclass_jaccard_index

    generator = torch.Generator().manual_seed(0)
    labels, said = (torch.randint(0, 5, (7, 30), generator=generator) for _ in range(2))
    said = torch.where(torch.rand(7, 30, generator=generator) < 0.5, labels, said)
    expected = float(multiclass_jaccard_index(said, labels, 6, ignore_index=2))
    found = miou(said, labels, n_classes=6, ignore=2, n_bootstrap=50)["segmentation_miou"]
    assert found.value == pytest.approx(expected, abs=1e-6)
    assert found.low < found.value < found.high


def test_segmentation_of_patches_on_tensors_and_codes():
    labels = torch.arange(10 * 6) % 3
    z = torch.eye(3)[labels] + 0.2 * draw(60, 3).abs()
    dense = segmentation(z[:30], labels[:30], z[30:], labels[30:], n_tokens=6, n_bootstrap=0)
    codes = [Codes.from_dense(part) for part in (z[:30], z[30:])]
    assert dense["segmentation_miou"].value == 1
    assert segmentation(codes[0], labels[:30], codes[1], labels[30:], n_tokens=6, n_bootstrap=0) == dense
    ignored = segmentation(codes[0], labels[:30], codes[1], labels[30:], n_tokens=6, ignore=0, n_bootstrap=0)
    assert ignored["segmentation_accuracy"].value == 1
    pixels = upsampled(torch.eye(2)[torch.tensor([0, 1])].double(), (1, 2), (4, 8))
    assert pixels.shape == (1, 4, 8)
    assert pixels[0, :, :4].sum() == 0
    assert pixels[0, :, 4:].sum() == 16


def test_lift_by_hand():
    ours, raw = torch.tensor([True, True, False, True]), torch.tensor([True, False, False, True])
    assert lift(ours, raw, n_bootstrap=0).value == 1.5
    assert lift(raw, raw).low == lift(raw, raw).high == 1  # paired: no noise in a number over itself


def test_wrong_input_is_named():
    x, y = classes()
    with pytest.raises(ValueError, match="90 rows and 3 labels"):
        retrieval(x, y[:3])
    with pytest.raises(ValueError, match=r"k of the 89 other pictures: got k = \[90\]"):
        retrieval(x, y, ks=(90,))
    with pytest.raises(ValueError, match="alone in its class"):
        retrieval(x, torch.arange(90))
    with pytest.raises(ValueError, match="needs two classes, got 1"):
        fit_logistic(x, y * 0)
    with pytest.raises(ValueError, match="rows of 6 and of 2 dimensions"):
        nearest(x, x[:, :2], 3)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.90"):
        nearest_accuracy(x, y, x, y, k=91)
    with pytest.raises(ValueError, match="not finite"):
        fit_logistic(x / 0, y)
    with pytest.raises(ValueError, match="4 and 3 pictures"):
        lift(torch.ones(4, dtype=torch.bool), torch.ones(3, dtype=torch.bool))
