"""M7 on planted siblings, against a loop of scikit-learn; the frozen hierarchy; SAEBench's rule by hand."""

import hashlib
import warnings

import numpy as np
import pytest
import torch
from seen_examples import coder_of, same_in_two_batches, seen_by, setting_of
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from vitrail.coders.sparse import Codes
from vitrail.images.worlds import open_world
from vitrail.metrics import hierarchies
from vitrail.metrics.absorption import (
    Absorption,
    absorption_grid,
    absorption_rate,
    sibling_tasks,
    visaebench_absorption,
)
from vitrail.metrics.passing import Seen
from vitrail.metrics.probe_projection import ProbeProjection, main_latents, projections

D_SAE = 30
GROUPS = {"upper": (0, 1, 2), "lower": (3, 4, 5, 6)}


def pictures(n=420, seed=0):
    """Class 0 has a latent of its own; class 1 is where latents 10 to 13 are; class 2 is the rest of its group.
    24 to 27 fire for the lower group, 28 is constant, 29 dead."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 7
    z = rng.exponential(0.3, (n, D_SAE)) * (rng.random((n, D_SAE)) < 0.2)
    z[:, 0] += 2.0 * (labels == 0)
    for latent in range(10, 14):
        z[:, latent] += 1.0 * ((labels == 1) & (rng.random(n) < 0.6))
    for latent in range(3, 7):
        z[:, latent] += 1.0 * ((labels == latent) & (rng.random(n) < 0.5))
    z[:, 24:28] += (labels >= 3)[:, None] * rng.random((n, 4))
    z[:, 28], z[:, 29] = 0.4, 0
    return torch.from_numpy(np.round(z, 2)).float(), labels


def shown(z, labels, *, x=None, x_hat=None):
    rows = torch.zeros(len(z), 1, 2) if x is None else x
    back = rows if x_hat is None else x_hat
    return Seen(x=rows, target=rows, codes=Codes.from_dense(z), x_hat=back, labels=torch.from_numpy(labels))


# -- M7


def test_f1_pairs_are_scikit_learns_on_both_splits():
    z, labels = pictures()
    found = sibling_tasks(Codes.from_dense(z), labels, GROUPS)
    from vitrail.metrics.sparse_probing import stratified_split

    train, test = stratified_split(labels, 0.2, 42)
    x = z.double().numpy()
    assert list(zip(found.group, found.label, strict=True)) == [(name, c) for name in GROUPS for c in GROUPS[name]]
    for t, (name, c) in enumerate(zip(found.group, found.label, strict=True)):
        rows = {split: of[np.isin(labels[of], GROUPS[name])] for split, of in (("train", train), ("test", test))}
        a = x[rows["train"]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            f = f_classif(a[:, :28], labels[rows["train"]] == c)[0]
        top = np.argsort(-f, kind="stable")[:4]
        assert found.latents[t].tolist() == top.tolist()
        for i, k in enumerate((1, 4)):
            fit = LogisticRegression(tol=1e-10, max_iter=10_000).fit(a[:, top[:k]], labels[rows["train"]] == c)
            for split, of in rows.items():
                want = f1_score(labels[of] == c, fit.predict(x[of][:, top[:k]]), zero_division=0.0)
                assert found.f1[split][i][t] == pytest.approx(want)


def test_a_class_that_four_latents_read_and_one_does_not_is_absorbed():
    z, labels = pictures()
    rows = {row["class"]: row for row in sibling_tasks(Codes.from_dense(z), labels, GROUPS).rows()}
    assert rows[0]["f1_1_test"] > 0.95
    assert rows[1]["f1_1_test"] < 0.8 < rows[1]["f1_4_test"]


def test_rates_by_hand():
    tasks = [{"f1_1_test": few, "f1_4_test": more} for few, more in ((0.9, 0.95), (0.5, 0.9), (0.5, 0.4), (0.8, 0.6))]
    # Absorbed at (0.8, 0.5): only (0.5, 0.9); (0.8, 0.6) is not below 0.8. At (0.85, 0.5) it is.
    assert absorption_rate(tasks, 0.8, 0.5) == 0.25
    assert absorption_rate(tasks, 0.85, 0.5) == 0.5
    assert absorption_rate(tasks, 0.8, 0.3) == 0.5
    assert np.isnan(absorption_rate([], 0.8, 0.5))


def test_the_rate_does_not_fall_as_alpha_grows_nor_rise_as_beta_grows():
    z, labels = pictures()
    rows = sibling_tasks(Codes.from_dense(z), labels, GROUPS).rows()
    alphas, betas = np.linspace(0, 1, 21), np.linspace(0, 1, 11)
    grid = absorption_grid(rows, alphas.tolist(), betas.tolist())
    for split in ("train", "test"):
        rate = np.array([row["rate"] for row in grid if row["split"] == split]).reshape(21, 11)
        assert (np.diff(rate, axis=0) >= 0).all()
        assert (np.diff(rate, axis=1) <= 0).all()
        assert rate.min() < rate.max()


@pytest.mark.shared
def test_the_papers_table_is_monotone_too(shared_data):
    import csv

    with open(shared_data.parent / "reference" / "tables" / "visae_table7_m7_sensitivity.csv") as file:
        rows = list(csv.DictReader(file))
    for backbone in ("DINOv2", "CLIP", "SigLIP", "DeiT", "MAE"):
        rate = np.array([float(row[backbone]) for row in rows]).reshape(3, 3)
        assert (np.diff(rate, axis=0) >= 0).all()
        assert (np.diff(rate, axis=1) <= 0).all()


def test_the_metric_has_intervals_and_does_not_depend_on_batches():
    z, labels = pictures()

    def metric():
        return Absorption(setting_of(coder_of(D_SAE)), groups=GROUPS, hierarchy="planted")

    same_in_two_batches(metric, shown(z, labels), [shown(z[:99], labels[:99]), shown(z[99:], labels[99:])])
    one = metric()
    one.update(shown(z, labels))
    out = one.compute(n_bootstrap=200)
    rows = one.curves()["absorption_tasks"]
    assert out["absorption"].value == absorption_rate(rows, 0.8, 0.5)
    assert out["absorption_train"].value == absorption_rate(rows, 0.8, 0.5, "train")
    assert out["absorption"].low <= out["absorption"].value <= out["absorption"].high
    assert "planted" in out["absorption"].definition
    assert out["absorption_unread"].value == np.mean([row["f1_4_test"] <= 0.5 for row in rows])


def test_few_images_or_few_siblings_are_not_eligible():
    z, labels = pictures(56)  # eight of each class, six to train on
    assert sibling_tasks(Codes.from_dense(z), labels, GROUPS).rows() == []
    assert len(sibling_tasks(Codes.from_dense(z), labels, GROUPS, min_positives=6).rows()) == 7
    assert sibling_tasks(Codes.from_dense(z), labels, {"two": (0, 1)}, min_positives=6).rows() == []
    one = Absorption(setting_of(coder_of(D_SAE)), groups=GROUPS)
    one.update(shown(z, labels))
    assert np.isnan(one.compute()["absorption"].value)
    with pytest.raises(ValueError, match="different labels"):
        Absorption(setting_of(coder_of(D_SAE)), groups={"twice": (1, 1, 2)})
    with pytest.raises(ValueError, match="no sibling groups"):
        Absorption(setting_of(coder_of(D_SAE)), groups={})


def test_compat_is_the_released_packages_rule():
    z, labels = pictures(140)
    value, rows = visaebench_absorption(Codes.from_dense(z), labels, GROUPS)
    x, absorbed = z.numpy(), []
    for group in GROUPS.values():
        here = np.isin(labels, group)
        for c in group:
            own, all_of = (set(np.argsort(x[mask].mean(0))[-10:]) for mask in (labels == c, here))
            y = labels[here] == c
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ranked = np.argsort(np.nan_to_num(f_classif(x[here], y)[0], nan=-np.inf))[::-1]
            f1 = [
                f1_score(y, LogisticRegression(max_iter=500).fit(part, y).predict(part), zero_division=0.0)
                for part in (x[here][:, ranked[:1]], x[here][:, ranked[:4]])
            ]
            absorbed.append(f1[1] - f1[0] > 0.1 or len(own & all_of) / len(own | all_of) > 0.5)
    assert [row["absorbed"] for row in rows] == absorbed
    assert value == np.mean(absorbed)


# -- the hierarchy


def test_the_hierarchy_is_frozen():
    assert hashlib.sha256(hierarchies.FILE.read_bytes()).hexdigest() == hierarchies.DIGEST
    assert hierarchies.DIGEST == "c5279dd50c00a3b9d98fcd536dbb446a68151602e1e6673578891a5677138e41"
    groups = hierarchies.imagenet_groups()
    assert len(groups) == 95
    assert sum(map(len, groups.values())) == 424
    assert min(map(len, groups.values())) >= hierarchies.MIN_SIZE
    assert len(hierarchies.imagenet_groups(depth=2)) == 95


def test_groups_are_wordnets():
    groups = {name.split()[0]: labels for name, labels in hierarchies.imagenet_groups().items()}
    assert groups["big_cat"] == (288, 289, 290, 291, 292, 293)  # leopard, snow leopard, jaguar, lion, tiger, cheetah
    assert groups["bear"] == (294, 295, 296, 297)


def test_a_data_set_with_fewer_classes_has_its_own_labels():
    # Finches: brambling, goldfinch, house finch, junco (n01530575, n01531178, n01532829, n01534433), and a tench.
    wnids = ["n01534433", "n01440764", "n01530575", "n01531178"]
    assert hierarchies.imagenet_groups(wnids) == {"finch n01529672": (0, 2, 3)}
    assert hierarchies.imagenet_groups(wnids[:3]) == {}
    with pytest.raises(ValueError, match="twice"):
        hierarchies.imagenet_groups(["n01534433"] * 2)
    with pytest.raises(ValueError, match="depth"):
        hierarchies.imagenet_groups(depth=3)


def test_a_worlds_groups_will_do():
    world = open_world("shapes", n=8)
    z = torch.rand(200, D_SAE) * (torch.rand(200, D_SAE) < 0.3)
    labels = np.arange(200) % len(world.classes)
    found = sibling_tasks(Codes.from_dense(z), labels, world.groups, min_positives=2)
    assert set(found.group) <= set(world.groups)


# -- SAEBench's rule


def planted(n=210):
    """Latent 0 writes the parent's direction, latent 1 the parent's and the child's own, latent 2 something else.

    Parent: classes 0 to 2. Latent 0 fires in classes 0 and 1; in class 2 only the absorbing latent 1 does.
    """
    labels = np.arange(n) % 6
    z = torch.zeros(n, 6)
    z[:, 0] = torch.from_numpy(labels < 2) * 2.0
    z[:, 1] = torch.from_numpy(labels == 2) * 2.0
    z[:, 2] = torch.from_numpy(labels >= 3) * 1.0
    W_dec = torch.zeros(6, 5)
    W_dec[0, 0] = 1
    W_dec[1, 0], W_dec[1, 1] = 0.8, 0.6
    W_dec[2, 2] = 1
    W_dec[3:, 3] = 1
    return z, labels, W_dec


def test_absorption_by_projection():
    z, labels, W_dec = planted()
    y = z @ W_dec
    parents, children = projections(y, torch.zeros_like(y), Codes.from_dense(z), W_dec, labels, {"up": (0, 1, 2)})
    (parent,) = parents
    assert parent["probe_f1"] == 1.0
    # F1 of latent 0 alone: 2/3 of the parent's images, 2 * 2/3 / (1 + 2/3) = 0.8; with latent 1 as well 1: a split.
    assert parent["main"] == "0 1"
    assert parent["full"] == parent["share"] == 0
    here = [(row["class"], row["missed"], row["absorbed"]) for row in children]
    assert here == [(2, 1.0, 1.0)]  # classes 0 and 1 have no latent but their parent's
    assert children[0]["elsewhere"] == 0.0
    assert children[0]["outside"] == 0.0


def test_a_silent_main_latent_and_one_that_says_it_instead(monkeypatch):
    z, labels, W_dec = planted()
    monkeypatch.setattr("vitrail.metrics.probe_projection.MAX_MAIN", 1)
    y = z @ W_dec
    ((parent,), _) = projections(y, torch.zeros_like(y), Codes.from_dense(z), W_dec, labels, {"up": (0, 1, 2)})
    assert parent["main"] == "0"
    # In class 2, a third of the parent's images, latent 0 is off and latent 1 makes up all of the projection.
    assert parent["full"] == pytest.approx(1 / 3)
    assert parent["share"] == pytest.approx(1 / 3)
    # Where an error that no latent explains makes up most of the projection, no latent absorbs it.
    probe = torch.zeros_like(y)
    probe[:, 0] = 20.0
    ((parent,), _) = projections(y + probe, probe, Codes.from_dense(z), W_dec, labels, {"up": (0, 1, 2)})
    assert parent["full"] == 0.0


def test_a_main_latent_that_fires_less_is_absorbed_in_part(monkeypatch):
    z, labels, W_dec = planted()
    z[:, 0] += torch.from_numpy(labels == 2) * 0.5  # 2.0 elsewhere
    monkeypatch.setattr("vitrail.metrics.probe_projection.MAX_MAIN", 1)
    y = z @ W_dec
    ((parent,), _) = projections(y, torch.zeros_like(y), Codes.from_dense(z), W_dec, labels, {"up": (0, 1, 2)})
    assert parent["full"] == 0.0
    assert 0.2 < parent["share"] < 1 / 3


def test_splits_end_where_a_latent_adds_little():
    z = torch.zeros(100, 4)
    positive = np.arange(100) < 50
    z[:25, 0] = z[25:50, 1] = 3.0
    z[:2, 2] = 3.0
    assert main_latents(Codes.from_dense(z), [0, 1, 2, 3], positive) == [0, 1]


def test_the_projection_metric_reads_activations_in_the_coders_space():
    labels = pictures(280)[1]
    coder = coder_of(D_SAE, d_in=8, k=4, normalization="layer_norm")
    x = torch.randn(280, 3, 8, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] += torch.from_numpy(labels < 3)[:, None] * 3.0

    def metric():
        return ProbeProjection(setting_of(coder, n_tokens=3), groups=GROUPS)

    whole, *parts = (seen_by(coder, x[part], labels=torch.from_numpy(labels[part])) for part in
                     (slice(None), slice(0, 100), slice(100, None)))  # fmt: skip
    same_in_two_batches(metric, whole, parts)
    one = metric()
    one.update(whole)
    out = one.compute(n_bootstrap=50)
    assert 0 <= out["absorption_full"].value <= out["absorption_share"].value + 1
    assert out["feature_splits"].value >= 1
    row = one.curves()["absorption_parents"][0]
    assert row["probe_f1"] > 0.8
    with pytest.raises(ValueError, match="no labels"):
        metric().update(seen_by(coder, x))
