import math

import numpy as np
import pytest
import torch
from released import released
from seen_examples import coder_of, grid_of, same_in_two_batches, setting_of, values
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from vitrail.coders.sparse import Codes
from vitrail.metrics import preservation
from vitrail.metrics.passing import Seen
from vitrail.metrics.preservation import Preservation, Probes, fit_probe, split

T, DIM, CLASSES = 5, 7, 4  # CLS and 2 x 2 patches


def setting(**changes):
    given = {"n_tokens": T, "grid": grid_of(2, 2), "cls_token": 0, "patches": slice(1, T)}
    return setting_of(coder_of(9, DIM), **{**given, **changes})


def images(n=200, seed=0, apart=0.6):
    """Rows about a centre of the image's class, with a mean far from zero; CLS is of no concern, and says so."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(9)) * apart
    x = torch.randn(n, T, DIM, generator=generator) + centres[labels][:, None] + 20
    x[:, 0] = 1e4
    return x, labels


def seen(x, x_hat, labels):
    empty = Codes.from_dense(torch.zeros(x.shape[0] * x.shape[1], 9))
    return Seen(x=x, target=x, codes=empty, x_hat=x_hat, labels=labels)


def shown(metric, x, x_hat, labels):
    metric.update(seen(x, x_hat, labels))
    return metric


def noisy(x, by=1.0, seed=1):
    return x + by * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    # One dimension, two classes at 0 and 10, each 20 times; phi's border lies at 5. The reconstruction puts all images
    # at 0: of the 8 test images, stratified, half are right, where all were.
    labels = torch.tensor([0, 1] * 20)
    x = (10.0 * labels)[:, None, None].expand(40, T, 1)
    one = setting_of(coder_of(9, 1), n_tokens=T, grid=grid_of(2, 2), patches=slice(1, T))
    got = shown(Preservation(one), x, torch.zeros_like(x), labels).compute()
    assert values(got) == {
        "preservation": 0.5,
        "preservation_same": 0.5,
        "probe_accuracy": 1.0,
        "recon_probe_accuracy": 0.5,
    }
    assert {measured.n for measured in got.values()} == {8}
    # All 4 right of 8, resampled: between 1 and 7 of 8 in all but 5 % of draws.
    assert 0 < got["preservation"].low < 0.5 < got["preservation"].high < 1


def test_perfect_reconstruction_preserves_all_and_keeps_its_interval_there():
    x, labels = images()
    got = shown(Preservation(setting(), refit=True), x, x, labels).compute()
    for name in ("preservation", "preservation_refit", "preservation_same"):
        assert (got[name].value, got[name].low, got[name].high) == (1, 1, 1)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_scikit_learns_accuracies(pool):
    x, labels = images()
    x_hat = noisy(x, 2.0) * 0.9
    got = shown(Preservation(setting(), pool=pool, refit=True), x, x_hat, labels).compute()
    train, test = train_test_split(np.arange(200), test_size=0.2, stratify=labels.numpy(), random_state=42)
    patches = x[train, 1:].double().numpy().reshape(-1, DIM)
    mean, s = patches.mean(0), math.sqrt(patches.var(0).mean())

    def u(rows):
        maps = (rows[:, 1:].double().numpy() - mean) / s
        return maps.max(1) if pool == "max" else maps.mean(1)

    raw, recon, y = u(x), u(x_hat), labels.numpy()
    phi = LogisticRegression(tol=1e-8, max_iter=1000).fit(raw[train], y[train])
    psi = LogisticRegression(tol=1e-8, max_iter=1000).fit(recon[train], y[train])
    expected = {
        "probe_accuracy": phi.score(raw[test], y[test]),
        "recon_probe_accuracy": phi.score(recon[test], y[test]),
        "recon_refit_accuracy": psi.score(recon[test], y[test]),
        "preservation_same": (phi.predict(raw[test]) == phi.predict(recon[test])).mean(),
    }
    expected["preservation"] = expected["recon_probe_accuracy"] / expected["probe_accuracy"]
    expected["preservation_refit"] = expected["recon_refit_accuracy"] / expected["probe_accuracy"]
    assert values(got) == pytest.approx(expected)
    assert len(set(expected.values())) > 3  # or this says little
    assert got["preservation"].definition == f"{pool}-pool, lbfgs C=1"


def test_reconstruct_then_pool_is_not_pool_then_reconstruct():
    # A reconstruction that keeps the patches' mean and shrinks what lies about it: mean-pooling does not see it.
    x, labels = images()
    x_hat = x.mean(1, keepdim=True) + 0.05 * (x - x.mean(1, keepdim=True))
    x_hat[:, 1:] += (x[:, 1:] - x_hat[:, 1:]).mean(1, keepdim=True)
    by_mean = shown(Preservation(setting(), pool="mean"), x, x_hat, labels).compute()
    by_max = shown(Preservation(setting()), x, x_hat, labels).compute()
    assert by_mean["preservation"].value == 1
    assert by_max["preservation_same"].value < 0.9


def test_noise_costs_and_a_shift_is_no_loss_to_a_refitted_probe():
    x, labels = images()
    found = [
        shown(Preservation(setting()), x, noisy(x, by), labels).compute()["preservation"].value for by in (0, 2, 6)
    ]
    assert found[0] == 1 > found[1] > found[2]
    got = shown(Preservation(setting(), refit=True), x, x + 3 * torch.arange(DIM), labels).compute()
    assert got["preservation"].value < 0.7
    assert got["preservation_refit"].value == pytest.approx(1, abs=0.05)


def test_pairs_make_the_interval_narrow():
    x, labels = images(600)
    got = shown(Preservation(setting()), x, noisy(x, 0.1), labels).compute()
    width = got["preservation"].high - got["preservation"].low
    alone = (got["recon_probe_accuracy"].high - got["recon_probe_accuracy"].low) / got["probe_accuracy"].value
    assert width < 0.7 * alone


def test_streaming_in_two_batches_equals_one():
    x, labels = images(80)
    x_hat = noisy(x)
    parts = [seen(x[part], x_hat[part], labels[part]) for part in (slice(0, 30), slice(30, 80))]
    same_in_two_batches(lambda: Preservation(setting()), seen(x, x_hat, labels), parts)


def test_coders_share_the_raw_probe(monkeypatch):
    x, labels = images(80)
    fitted = []
    monkeypatch.setattr(preservation, "fit_probe", lambda *a, **k: fitted.append(1) or fit_probe(*a, **k))
    probes = Probes()
    first = shown(Preservation(setting(), probes=probes), x, noisy(x), labels).compute()
    second = shown(Preservation(setting(), probes=probes), x, noisy(x, 3.0), labels).compute()
    assert len(fitted) == 1
    assert first["probe_accuracy"] == second["probe_accuracy"]
    assert first["preservation"].value > second["preservation"].value
    shown(Preservation(setting(), probes=probes), x + 1e-3 * x**2, x, labels).compute()
    assert len(fitted) == 2


def test_one_row_an_image_is_its_own_pool():
    x, labels = images()
    one = setting_of(coder_of(9, DIM), n_tokens=1)
    got = shown(Preservation(one), x[:, 1:2], noisy(x)[:, 1:2], labels).compute()
    assert 0.3 < got["preservation"].value <= 1.1


def test_labels_need_not_count_from_zero():
    x, labels = images()
    x_hat, mapped = noisy(x), torch.tensor([4, 7, 30, 100])[labels]
    plain, other = (shown(Preservation(setting()), x, x_hat, y).compute() for y in (labels, mapped))
    assert values(plain) == values(other)


def test_what_cannot_be_divided_is_left_out_with_a_warning():
    x, labels = images(60)
    assert shown(Preservation(setting()), x, x, None).compute() == {}
    alone = labels.clone()
    alone[0] = 99
    with pytest.warns(UserWarning, match="1 of 5 classes have a single image"):
        assert shown(Preservation(setting()), x, x, alone).compute() == {}
    with pytest.warns(UserWarning, match="all labelled images are of one class"):
        assert shown(Preservation(setting()), x, x, torch.zeros_like(labels)).compute() == {}
    assert split(torch.tensor([0, 0, 1, 1, 2, 2]), 0.2, 42) == "6 images do not divide into 3 classes on both sides."
    with pytest.raises(ValueError, match="no images were measured"):
        Preservation(setting()).compute()


def test_bad_options():
    with pytest.raises(ValueError, match="'max' or 'mean', got 'cls'"):
        Preservation(setting(), pool="cls")
    with pytest.raises(ValueError, match="between 0 and 1"):
        Preservation(setting(), test_share=1.0)
    with pytest.raises(ValueError, match="compat must be"):
        Preservation(setting(), compat="0.1")
    x, labels = images(40)
    with pytest.raises(ValueError, match="one label a row"):
        fit_probe(x[:, 1], labels[:39])
    with pytest.raises(ValueError, match="all of one class"):
        fit_probe(x[:, 1], torch.zeros(40, dtype=torch.long))
    with pytest.raises(ValueError, match="rows of 7 dimensions, got 6"):
        fit_probe(x[:, 1], labels)(x[:, 1, :6])
    with pytest.warns(UserWarning, match="did not converge in 2 iterations"):
        assert not fit_probe(x[:, 1], labels, max_iterations=2).converged


class AsGiven:
    """What visaebench calls an SAE; it reconstructs with a fixed error."""

    def encode(self, x):
        return x

    def decode(self, z):
        return 0.8 * z + 3 * torch.sin(5 * z)


def test_visaebenchs_number(monkeypatch):
    DownstreamPreservation = released(monkeypatch, "metrics.reconstruction.downstream").DownstreamPreservation
    x, labels = images(300)
    x = x[:, 1:] - 20
    theirs = DownstreamPreservation().compute(AsGiven(), x, device="cpu", labels=labels.numpy())
    assert 0.3 < theirs.value < 0.95
    patches = setting_of(coder_of(9, DIM), n_tokens=T - 1, grid=grid_of(2, 2, 0), patches=slice(0, T - 1))
    got = shown(Preservation(patches, compat="visaebench-0.1"), x, AsGiven().decode(x), labels).compute()
    assert list(got) == ["preservation_visaebench"]
    assert got["preservation_visaebench"].value == pytest.approx(theirs.value, abs=1e-12)
