"""Ranking against f_classif, probes against LogisticRegression, AUC against roc_auc_score; a planted class latent."""

import warnings

import numpy as np
import pytest
import torch
from seen_examples import coder_of, same_in_two_batches, seen_codes, setting_of
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from vitrail.coders.sparse import Codes
from vitrail.metrics import logistic_probes, sparse_probing
from vitrail.metrics.class_sums import ClassSums, ranking
from vitrail.metrics.logistic_probes import Probes, fit_binary
from vitrail.metrics.multinomial import fit_logistic
from vitrail.metrics.passing import Seen
from vitrail.metrics.sparse_probing import (
    SparseProbing,
    area,
    column_logits,
    columns,
    fit_columns,
    roc_auc,
    stratified_split,
    visaebench_area,
)

D_SAE, N_CLASSES = 40, 5


def pictures(n=120, d_sae=D_SAE, seed=0, share=0.3):
    """Latent c < 5 fires most in class c. 35 and 36 are the same, 37 is constant, 38 and 39 are dead."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % N_CLASSES
    z = rng.exponential(1.0, (n, d_sae)) * (rng.random((n, d_sae)) < share)
    z[np.arange(n), labels] += 1.5 * (rng.random(n) < 0.7)
    z[:, 36], z[:, 37], z[:, 38:] = z[:, 35], 0.3, 0
    z = np.round(z, 1)  # ties
    return torch.from_numpy(z).float(), labels


def sums_of(z, labels):
    return ClassSums.of(Codes.from_dense(z), labels, int(labels.max()) + 1)


# -- ranking


def test_f_by_hand():
    # A latent at 1, 3 in class 0 and at 5, 7 in class 1. Means 2 and 6, over all 4. Between: 2 * 4 + 2 * 4 = 16 with
    # 1 degree of freedom; within: 4 * 1 = 4 with 2. F = 16 / 2 = 8.
    z, labels = torch.tensor([[1.0], [3.0], [5.0], [7.0]]), np.array([0, 0, 1, 1])
    assert sums_of(z, labels).one_vs_rest([0, 1]).ravel() == pytest.approx([8.0, 8.0])
    assert sums_of(z, labels).all_classes() == pytest.approx([8.0])


def test_f_is_f_classif_of_one_class_against_the_rest_and_of_all():
    z, labels = pictures()
    sums, live = sums_of(z, labels), slice(0, 37)
    x = z.double().numpy()[:, live]
    for c in range(N_CLASSES):
        np.testing.assert_allclose(sums.one_vs_rest([c])[0, live], f_classif(x, labels == c)[0], rtol=1e-9)
    np.testing.assert_allclose(sums.all_classes()[live], f_classif(x, labels)[0], rtol=1e-9)


def test_f_among_siblings_sees_their_rows_alone():
    z, labels = pictures()
    few = np.isin(labels, [1, 2, 4])
    want = f_classif(z.double().numpy()[few][:, :37], labels[few] == 2)[0]
    np.testing.assert_allclose(sums_of(z, labels).one_vs_rest([2], among=[1, 2, 4])[0, :37], want, rtol=1e-9)


def test_constant_and_dead_latents_have_no_f_and_rank_last_and_ties_rank_by_number():
    z, labels = pictures()
    f = sums_of(z, labels).one_vs_rest(range(N_CLASSES))
    assert np.isnan(f[:, 37:]).all()
    assert not np.isnan(f[:, :37]).any()
    ranked = ranking(f, D_SAE)
    assert (ranked[:, -3:] == [37, 38, 39]).all()
    place = ranked.argsort(1)
    assert (place[:, 36] == place[:, 35] + 1).all()


def test_a_latent_that_is_the_class_has_an_infinite_f_and_ranks_first():
    z, labels = pictures()
    z[:, 7] = torch.from_numpy(labels == 3) * 0.7
    f = sums_of(z, labels).one_vs_rest([3])
    assert np.isinf(f[0, 7])
    assert ranking(f, 1)[0, 0] == 7


# -- probes


def reference(x, y, **more):
    return LogisticRegression(tol=1e-12, max_iter=100_000, **more).fit(x, y)


@pytest.mark.parametrize("k", [1, 2, 4, 20, 40])
def test_probes_are_scikit_learns(k):
    z, labels = pictures()
    codes = Codes.from_dense(z)
    latents = torch.from_numpy(ranking(sums_of(z, labels).one_vs_rest(range(N_CLASSES)), k))
    positive = torch.from_numpy(labels[None] == np.arange(N_CLASSES)[:, None])
    found = fit_columns(codes, latents, positive)
    assert float(found.gradient.max()) <= 1e-8
    logits = column_logits(codes, latents, found)
    for c in range(N_CLASSES):
        x = z.double().numpy()[:, latents[c].numpy()]
        want = reference(x, labels == c)
        np.testing.assert_allclose(found.weight[c], want.coef_[0], atol=1e-5)
        np.testing.assert_allclose(found.bias[c], want.intercept_[0], atol=1e-5)
        np.testing.assert_allclose(logits[c], want.decision_function(x), atol=1e-4)


@pytest.mark.parametrize("sparse_up_to", [0.0, 1.0])
def test_sparse_and_dense_rows_give_the_same_probe(monkeypatch, sparse_up_to):
    monkeypatch.setattr(logistic_probes, "SPARSE_UP_TO", sparse_up_to)
    z, labels = pictures(share=0.05)
    latents = torch.arange(30).repeat(2, 1)
    positive = torch.from_numpy(labels[None] == np.array([[1], [3]]))
    found = fit_columns(Codes.from_dense(z), latents, positive)
    want = reference(z.double().numpy()[:, :30], labels == 3)
    np.testing.assert_allclose(found.weight[1], want.coef_[0], atol=1e-5)


def test_a_start_changes_the_way_and_not_the_end():
    z, labels = pictures()
    latents, positive = torch.arange(30)[None], torch.from_numpy(labels == 2)[None]
    few = fit_columns(Codes.from_dense(z), latents[:, :4], positive)
    a, b = (fit_columns(Codes.from_dense(z), latents, positive, start=start) for start in (None, few))
    torch.testing.assert_close(a.weight, b.weight, atol=1e-5, rtol=0)


def test_probes_of_counted_rows_see_no_others():
    z, labels = pictures()
    here = np.isin(labels, [0, 3])
    found = fit_columns(
        Codes.from_dense(z),
        torch.tensor([[0, 3, 9]]),
        torch.from_numpy(labels == 3)[None],
        counted=torch.from_numpy(here)[None],
    )
    want = reference(z.double().numpy()[here][:, [0, 3, 9]], labels[here] == 3)
    np.testing.assert_allclose(found.weight[0], want.coef_[0], atol=1e-5)


def test_separable_classes_have_a_finite_probe():
    x = torch.tensor([[[0.0], [0.0], [1.0], [1.0]]])
    y = torch.tensor([[False, False, True, True]])
    want = reference(x[0].double().numpy(), y[0].numpy())
    np.testing.assert_allclose(fit_binary(x, y).weight[0], want.coef_[0], atol=1e-6)


def test_dead_latents_have_no_weight():
    z, labels = pictures()
    found = fit_columns(Codes.from_dense(z), torch.tensor([[38, 0, 39]]), torch.from_numpy(labels == 0)[None])
    assert found.weight[0, [0, 2]].tolist() == [0.0, 0.0]


def test_one_kind_of_rows_is_refused():
    with pytest.raises(ValueError, match="both kinds"):
        fit_binary(torch.rand(1, 4, 2), torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("k", [1, 12])
def test_multinomial_is_scikit_learns_with_a_class_that_has_no_row(k):
    z, labels = pictures()
    labels = np.where(labels == 4, 5, labels)  # none has 4
    found = fit_logistic(z[:, :k], torch.from_numpy(labels), n_classes=6)
    want = reference(z.double().numpy()[:, :k], labels)
    there = [0, 1, 2, 3, 5]
    np.testing.assert_allclose(found.weight[there], want.coef_, atol=1e-5)
    p = (z[:, :k].double() @ found.weight.t() + found.bias).softmax(1)
    np.testing.assert_allclose(p[:, there], want.predict_proba(z.double().numpy()[:, :k]), atol=1e-5)
    assert not p[:, 4].any()


# -- scores


def test_auc_with_ties_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores, positive = np.round(rng.normal(size=(4, 30)), 1), rng.random((4, 30)) < 0.3
    auc, pull = roc_auc(scores, positive)
    np.testing.assert_allclose(auc, [roc_auc_score(y, s) for s, y in zip(scores, positive, strict=True)])
    np.testing.assert_allclose(pull.mean(1), 0, atol=1e-12)


def test_auc_by_hand():
    # Positives 3 and 1, negatives 2, 1, 0: 3 beats all three, 1 beats one and equals one. (3 + 1.5) / 6 = 0.75.
    auc, _ = roc_auc(np.array([[3.0, 1.0, 2.0, 1.0, 0.0]]), np.array([[True, True, False, False, False]]))
    assert auc[0] == 0.75
    assert np.isnan(roc_auc(np.ones((1, 3)), np.ones((1, 3), dtype=bool))[0][0])


def test_the_error_of_an_auc_is_delongs():
    rng = np.random.default_rng(1)
    y = np.repeat([True, False], [40, 60])
    s = rng.normal(size=100) + y
    psi = (s[y][:, None] > s[~y][None]).astype(float)
    want = psi.mean(1).var() / 40 + psi.mean(0).var() / 60
    assert np.square(roc_auc(s[None], y[None])[1]).mean() / 100 == pytest.approx(want)


def test_area_is_numpys():
    ks, values = [1, 5, 10, 20], [0.1, 0.4, 0.5, 0.45]
    assert area(ks, values) == pytest.approx(np.trapezoid(values, ks) / 19)


def test_a_split_is_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [10, 20, 1])
    train, test = stratified_split(labels, 0.2, 42)
    assert np.bincount(labels[test], minlength=3).tolist() == [2, 4, 0]
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(31))
    assert np.array_equal(test, stratified_split(labels, 0.2, 42)[1])
    assert not np.array_equal(test, stratified_split(labels, 0.2, 43)[1])


def test_each_class_is_scored_as_by_a_loop_of_scikit_learn():
    z, labels = pictures(200)
    found = sparse_probing.sparse_probing(Codes.from_dense(z), labels, ks=[1, 4])
    x = z.double().numpy()
    for c in range(N_CLASSES):
        f = np.nan_to_num(sums_of(z[found.train], labels[found.train]).one_vs_rest([c])[0], nan=-1)
        top = np.argsort(-f, kind="stable")[:4]
        want = reference(x[found.train][:, top], labels[found.train] == c)
        auc = roc_auc_score(labels[found.test] == c, want.decision_function(x[found.test][:, top]))
        assert found.auc[4][c] == pytest.approx(auc, abs=1e-9)
        assert found.first[c] == c  # the planted one


def test_the_ranking_does_not_see_test_rows():
    z, labels = pictures()
    train, test = stratified_split(labels, 0.2, 42)
    codes = Codes.from_dense(z)
    before = sparse_probing.sparse_probing(codes, labels, ks=[1])
    z[test, 30] = torch.from_numpy(labels[test] == 0) * 9.0  # a perfect latent, on the test rows alone
    after = sparse_probing.sparse_probing(Codes.from_dense(z), labels, ks=[1])
    assert after.first[0] == before.first[0] == 0
    z[train, 30] = torch.from_numpy(labels[train] == 0) * 9.0
    assert sparse_probing.sparse_probing(Codes.from_dense(z), labels, ks=[1]).first[0] == 30


# -- the metric


def shown(z, labels):
    seen = seen_codes(z)
    return Seen(x=seen.x, target=seen.target, codes=seen.codes, x_hat=seen.x_hat, labels=torch.from_numpy(labels))


def test_the_metric_gives_three_scores_with_intervals_whatever_the_batches():
    z, labels = pictures()

    def metric():
        return SparseProbing(setting_of(coder_of(D_SAE)), ks=(1, 2, 4), headline=4)

    same_in_two_batches(metric, shown(z, labels), [shown(z[:50], labels[:50]), shown(z[50:], labels[50:])])
    one = metric()
    one.update(shown(z, labels))
    out = one.compute(n_bootstrap=100)
    assert {"ovr_auc_1", "ovr_auc_4", "ovr_auc_4_classes", "multi_acc_4", "multi_acc_4_classes", "k_acc_area"} <= set(
        out
    )
    for each in out.values():
        assert each.low <= each.value <= each.high
    assert out["ovr_auc_4"].value > 0.8  # planted
    curve = one.curves()["sparse_probing"]
    assert [row["k"] for row in curve] == [1, 2, 4, 5, 10, 20]
    assert curve[2]["ovr_auc"] == out["ovr_auc_4"].value


def test_codes_are_pooled_over_patches():
    z, labels = pictures()
    patches = torch.stack([z, z / 2], 1).reshape(-1, D_SAE)
    seen = seen_codes(patches, n_tokens=2)
    seen = Seen(x=seen.x, target=seen.target, codes=seen.codes, x_hat=seen.x_hat, labels=torch.from_numpy(labels))
    ours, whole = (SparseProbing(setting_of(coder_of(D_SAE), n_tokens=t), ks=(1, 4), headline=4) for t in (2, 1))
    ours.update(seen)
    whole.update(shown(z, labels))
    assert ours.compute(n_bootstrap=0) == whole.compute(n_bootstrap=0)


def test_shuffled_labels_are_read_by_chance():
    z, labels = pictures(400)
    shuffled = np.random.default_rng(0).permutation(labels)
    found = sparse_probing.sparse_probing(Codes.from_dense(z), shuffled, ks=[4])
    measured = found.auc_measured(4, "")
    assert abs(measured.value - 0.5) < 0.1
    assert measured.low < 0.5 < measured.high


def test_bad_input_is_named():
    z, labels = pictures()
    codes = Codes.from_dense(z)
    with pytest.raises(ValueError, match="no labels"):
        SparseProbing(setting_of(coder_of(D_SAE))).update(seen_codes(z))
    with pytest.raises(ValueError, match="one label a row"):
        sparse_probing.sparse_probing(codes, labels[1:])
    with pytest.raises(ValueError, match="two classes"):
        sparse_probing.sparse_probing(codes, labels * 0)
    with pytest.raises(ValueError, match="negative"):
        sparse_probing.sparse_probing(codes, labels - 1)
    with pytest.raises(ValueError, match="compat"):
        SparseProbing(setting_of(coder_of(D_SAE)), compat="visaebench")


# -- the released package


def released(z, labels, ks):
    """What visaebench 0.1.0 computes, from its description."""
    from sklearn.model_selection import train_test_split

    x = z.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranked = np.argsort(np.nan_to_num(f_classif(x, labels)[0], nan=-np.inf))[::-1]
        a, b, y, y_test = train_test_split(x, labels, test_size=0.2, stratify=labels, random_state=42)
        accuracy = [
            LogisticRegression(max_iter=500).fit(a[:, ranked[:k]], y).score(b[:, ranked[:k]], y_test) for k in ks
        ]
    return np.trapezoid(accuracy, ks) / (ks[-1] - ks[0]), dict(zip(ks, accuracy, strict=True))


def test_compat_is_the_released_packages_number():
    z, labels = pictures()
    value, accuracy = visaebench_area(Codes.from_dense(z), labels)
    want, each = released(z, labels, [1, 5, 10, 20])
    assert value == pytest.approx(want, abs=1e-12)
    assert accuracy == each


def test_columns_are_the_dense_ones():
    z, _ = pictures()
    assert torch.equal(columns(Codes.from_dense(z), torch.tensor([5, 0, 38])), z[:, [5, 0, 38]])


def test_logits_of_a_batch():
    probes = Probes(torch.ones(1, 2).double(), torch.tensor([0.5]).double(), torch.zeros(1))
    assert probes.logits(torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])).tolist() == [[3.5, 0.5]]
