import math

import numpy as np
import pytest
import torch
from scipy import stats
from seen_examples import coder_of, same_in_two_batches, seen_by, setting_of, values
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from vitrail.metrics.linear_probe import LinearProbe, ProbeAgreement, fit_linear_probe, kl_divergence, macro_f1
from vitrail.metrics.passing import Seen


def classes(n=400, d=8, n_classes=4, seed=0):
    """Clusters about an offset that all of them share; the centres do not depend on the seed."""
    centres = torch.randn(n_classes, d, generator=torch.Generator().manual_seed(99)) * 2
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, n_classes, (n,), generator=generator)
    return centres[labels] + torch.randn(n, d, generator=generator) + 20, labels


def by_hand_probe(d=2):
    return LinearProbe(torch.eye(d), torch.zeros(d), torch.zeros(d), False, 1, 1.0, 2)


def test_kl_and_agreement_by_hand():
    # u = (1, 0) against (0, 1) under W = I: p = (e, 1) / (e + 1), q = (1, e) / (e + 1), so that
    # KL = (e - 1) / (e + 1); the second image is its own reconstruction.
    x = torch.tensor([[[3.0, 0]], [[0, 5]]])
    x_hat = torch.tensor([[[0.0, 2]], [[0, 0.1]]])
    coder = coder_of(4)
    metric = ProbeAgreement(setting_of(coder), probe=by_hand_probe())
    labels = torch.tensor([0, 0])
    metric.update(Seen(x=x, target=x, codes=coder.encode_sparse(x[:, 0]), x_hat=x_hat, labels=labels))
    got = values(metric.compute(n_bootstrap=5))
    kl = (math.e - 1) / (math.e + 1)
    assert got["lp_kl"] == pytest.approx(kl / 2)
    assert got["lp_kl_std"] == pytest.approx(kl / 2)
    assert got["lp_agreement"] == 0.5
    assert got["lp_accuracy"] == 0.5
    assert got["recon_lp_accuracy"] == 0.0


def test_kl_is_scipys_and_from_clean_to_reconstruction():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 7, generator=generator).double().softmax(1) for _ in range(2))
    expected = [stats.entropy(a, b) for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    np.testing.assert_allclose(kl_divergence(p.log(), q.log()), expected, rtol=1e-9)
    both = torch.nn.functional.kl_div(q.log(), p, reduction="batchmean")  # as MSAE's code calls it
    assert float(kl_divergence(p.log(), q.log()).mean()) == pytest.approx(float(both))


def test_a_fitted_probe_agrees_with_scikit_learns():
    x, labels = classes()
    held_out, truth = classes(300, seed=1)
    probe = fit_linear_probe(x, labels, batch_size=32)
    u, v = (torch.nn.functional.normalize(each - x.mean(0), dim=1) for each in (x, held_out))
    witness = LogisticRegression().fit(u.numpy(), labels.numpy())
    ours = probe.log_probabilities(held_out).argmax(1).numpy()
    assert (ours == witness.predict(v.numpy())).mean() > 0.95
    accuracy = witness.score(v.numpy(), truth.numpy())
    assert (ours == truth.numpy()).mean() == pytest.approx(accuracy, abs=0.03)
    assert probe.validation_f1 > 0.8
    assert 1 <= probe.n_epochs <= 100


def test_same_seed_same_probe_and_no_trace_on_the_global_generator():
    x, labels = classes(60)
    before = torch.get_rng_state()
    a, b, c = (fit_linear_probe(x, labels, max_epochs=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.weight, b.weight)
    assert not torch.equal(a.weight, c.weight)
    assert torch.equal(before, torch.get_rng_state())


def test_the_best_epochs_weights_are_kept():
    x, labels = classes(60)
    long, short = fit_linear_probe(x, labels, lr=3.0), fit_linear_probe(x, labels, lr=3.0, max_epochs=1)
    assert long.validation_f1 >= short.validation_f1
    assert long.n_epochs > 1


def test_macro_f1_is_scikit_learns():
    generator = np.random.default_rng(0)
    for _ in range(5):
        predicted, labels = generator.integers(0, 4, 12), generator.integers(0, 5, 12)
        got = macro_f1(torch.from_numpy(predicted), torch.from_numpy(labels), 6)
        assert got == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))


def test_perfect_reconstruction_and_streaming():
    x, labels = classes(40, d=6)
    coder = coder_of(12, 6, normalization="mean_std", k=3)
    probe = fit_linear_probe(x, labels, max_epochs=5)
    seen = seen_by(coder, x[:, None], labels=labels)
    same_in_two_batches(
        lambda: ProbeAgreement(setting_of(coder), probe=probe),
        seen,
        [seen_by(coder, x[:9, None], labels=labels[:9]), seen_by(coder, x[9:, None], labels=labels[9:])],
    )
    perfect = ProbeAgreement(setting_of(coder), probe=probe)
    perfect.update(Seen(x=seen.x, target=seen.target, codes=seen.codes, x_hat=seen.target))
    measured = perfect.compute(n_bootstrap=5)
    assert values(measured) == {"lp_kl": 0, "lp_kl_std": 0, "lp_agreement": 1, "lp_agreement_std": 0}  # no labels
    assert measured["lp_kl"].definition == "centred-l2"


def test_wrong_input_is_named():
    x, labels = classes(20)
    with pytest.raises(ValueError, match="20 rows and 19 labels"):
        fit_linear_probe(x, labels[:19])
    with pytest.raises(ValueError, match="rows to judge epochs by"):
        fit_linear_probe(x[:1], labels[:1])
    with pytest.raises(ValueError, match=r"labels must be in 0..1"):
        fit_linear_probe(x, labels, n_classes=2)
    with pytest.raises(ValueError, match="one row an image, got 5"):
        ProbeAgreement(setting_of(coder_of(4), n_tokens=5), probe=by_hand_probe())
    with pytest.raises(ValueError, match="rows of 3 dimensions; this coder writes 2"):
        ProbeAgreement(setting_of(coder_of(4)), probe=by_hand_probe(3))
    with pytest.raises(ValueError, match="no images were measured"):
        ProbeAgreement(setting_of(coder_of(4)), probe=by_hand_probe()).compute()
