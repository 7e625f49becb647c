"""M6: planted domains, scikit-learn's probes, the released package, and passes that come in parts."""

import warnings

import numpy as np
import pytest
import torch
from seen_examples import coder_of, same_in_two_batches, setting_of, values

from vitrail.coders.sparse import Codes
from vitrail.metrics.cross_domain import CrossDomain
from vitrail.metrics.passing import Seen

N_CLASSES, D_SAE, D = 4, 10, 6


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(n=80, *, seed=0, order=range(N_CLASSES), noise=0.5, error=0.1, silent=()):
    """Latent order[c] fires on class c at one of 3 patches; the others at random. Row 0 of an image is its CLS."""
    labels = torch.arange(n) % N_CLASSES
    z = draw(n, 4, D_SAE, seed=seed).relu() * noise
    z[torch.arange(n), 1 + torch.arange(n) % 3, torch.tensor(list(order))[labels]] += 2.0
    z[:, :, list(silent)] = 0
    z[:, 0] = 50.0  # on CLS, which is no patch
    x = z @ draw(D_SAE, D, seed=99) + 1.5
    x_hat = x + error * draw(n, 4, D, seed=seed + 5)
    return Seen(x=x, target=x, codes=Codes.from_dense(z.flatten(0, 1)), x_hat=x_hat, labels=labels)


def part(seen, rows):
    at = torch.arange(rows.start * 4, rows.stop * 4)
    return Seen(
        x=seen.x[rows], target=seen.target[rows], codes=seen.codes.select_rows(at), x_hat=seen.x_hat[rows],
        labels=seen.labels[rows],
    )  # fmt: skip


def setting(n=80):
    return setting_of(coder_of(D_SAE, D), n_tokens=4, patches=slice(1, 4), n_images=n, shift=torch.full((D,), 1.0))


def passed(seen, **given):
    metric = CrossDomain(setting(), k=4, **given)
    metric.update(seen)
    return metric


def test_probes_and_fvu_are_those_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import r2_score

    from vitrail.metrics.sparse_probing import stratified_split

    seen = pictures(error=1.0)
    found = values(passed(seen).compute(n_bootstrap=0))
    x, x_hat = seen.target[:, 1:].double(), seen.x_hat[:, 1:].double()
    flat = x.flatten(0, 1)
    mean, s = flat.mean(0), flat.var(0, correction=0).mean().sqrt()
    train, test = stratified_split(seen.labels.numpy(), 0.2, 42)
    accuracy = []
    for rows in (x, x_hat):
        u = ((rows.amax(1) - mean) / s).numpy()
        probe = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(u[train], seen.labels[train])
        accuracy.append(probe.score(u[test], seen.labels[test]))
    assert found["cross_domain_raw_accuracy"] == pytest.approx(accuracy[0])
    assert found["cross_domain_recon_accuracy"] == pytest.approx(accuracy[1])
    assert found["cross_domain_preservation"] == pytest.approx(accuracy[1] / accuracy[0])
    r2 = r2_score(flat.numpy(), x_hat.flatten(0, 1).numpy(), multioutput="variance_weighted")
    assert found["cross_domain_fvu"] == pytest.approx(1 - r2)
    assert found["cross_domain_codes_accuracy_4"] == 1.0


def test_latents_that_mean_other_classes_elsewhere_are_not_kept():
    home = passed(pictures()).domain()
    same, turned = (
        values(passed(pictures(seed=3, order=order), home=home, same_classes=True).compute(n_bootstrap=0))
        for order in (range(4), (1, 2, 3, 0))
    )
    for found in (same, turned):
        assert found["cross_domain_selective_home"] == 1.0
        assert found["cross_domain_codes_accuracy_4"] == 1.0  # its own probe does not mind
    assert same["cross_domain_selective_kept"] > 0.98
    assert same["cross_domain_transfer_codes"] == 1.0
    assert turned["cross_domain_selective"] < 0.5
    assert turned["cross_domain_selective_kept"] < 0
    assert turned["cross_domain_transfer_codes"] < 0.1


def test_alive_by_hand():
    # At home 9 of 10 latents fire, here 7 of them and the tenth: 7 / 9, and 7 of 10 in either... less the one silent.
    home = passed(pictures(silent=[9])).domain()
    found = values(passed(pictures(seed=1, silent=[7, 8]), home=home).compute(n_bootstrap=0))
    assert found["cross_domain_alive_kept"] == pytest.approx(7 / 9)
    assert found["cross_domain_jaccard"] == pytest.approx(7 / 10)


def test_in_two_batches_and_with_intervals():
    home = passed(pictures()).domain()
    seen = pictures(seed=2, noise=2.0, error=1.0)
    same_in_two_batches(
        lambda: CrossDomain(setting(), k=4, home=home, same_classes=True),
        seen,
        [part(seen, slice(0, 30)), part(seen, slice(30, 80))],
    )
    one = passed(seen).compute(n_bootstrap=100)["cross_domain_preservation"]
    assert one.low <= one.value <= one.high
    assert (one.n, one.definition) == (16, "max-pool, logistic C=1")


def test_the_released_package_has_this_number():
    pytest.importorskip("visaebench")
    from visaebench.metrics.concept_detection.cross_domain import CrossDomainGeneralization

    home, other = pictures(silent=[9]), pictures(seed=4, noise=1.5, error=0.7, silent=[8])
    mine = passed(other, home=passed(home).domain(), compat="visaebench-0.1").compute(n_bootstrap=0)

    class Coder:  # looks up what the planted coder says of these rows
        def __init__(self):
            rows = torch.cat([seen.x.flatten(0, 1) for seen in (home, other)])
            z = torch.cat([seen.codes.to_dense() for seen in (home, other)])
            x_hat = torch.cat([seen.x_hat.flatten(0, 1) for seen in (home, other)])
            self._of = {row.numpy().tobytes(): (a, b) for row, a, b in zip(rows, z, x_hat, strict=True)}

        def encode(self, x):
            self._last = [self._of[row.numpy().tobytes()] for row in x]
            return torch.stack([z for z, _ in self._last])

        def decode(self, codes):
            return torch.stack([x_hat for _, x_hat in self._last])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a latent that never moves
        theirs = CrossDomainGeneralization().compute(
            Coder(),
            home.x[:, 1:].contiguous(),
            device="cpu",
            ood_datasets={"other": {"activations": other.x[:, 1:].contiguous(), "labels": other.labels.numpy()}},
        )
    assert mine["cross_domain_visaebench"].value == pytest.approx(theirs.value, abs=1e-6)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="give `home`"):
        passed(pictures(), same_classes=True)
    with pytest.raises(ValueError, match=r"compat must be 'visaebench-0\.1'"):
        passed(pictures(), compat="1")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        CrossDomain(setting(), k=0)
    seen = pictures()
    bare = Seen(x=seen.x, target=seen.target, codes=seen.codes, x_hat=seen.x_hat)
    with pytest.raises(ValueError, match="have no labels"):
        passed(bare)
    with pytest.raises(ValueError, match="no images were measured"):
        CrossDomain(setting()).compute()
    with pytest.raises(ValueError, match="no class has two images|one class"):
        passed(part(seen, slice(0, 1))).compute()
    home = passed(seen).domain()
    strange = Seen(x=seen.x, target=seen.target, codes=seen.codes, x_hat=seen.x_hat, labels=seen.labels + 100)
    with pytest.raises(ValueError, match="no class in common"):
        passed(strange, home=home, same_classes=True).compute()
    assert np.isfinite(passed(strange, home=home).compute(n_bootstrap=0)["cross_domain_preservation"].value)
