"""ViSAEBench's metrics under dials: each dial by hand, the rule of the verdicts, and a small run."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitrail.metrics.reconstruction import fvu
from vitrail.studies import visaebench_calibration as study
from vitrail.studies.visaebench_calibration import DIALS, Case, calibrate, moved, planted, summary, verdicts


def by_hand() -> Case:
    """Two pictures of 1 x 3 patches, three latents of which the last is dead, two classes of one shape."""
    z = torch.tensor([[[2.0, 0, 0], [2, 0, 0], [0, 1, 0]], [[0, 3, 0], [0, 0, 0], [4, 0, 0]]])
    W_dec = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    return Case(
        *(z @ W_dec, z, W_dec, torch.zeros(2), torch.tensor([0, 1]), torch.eye(2), (1, 3), {"star": (0, 1)}),
        class_directions=torch.tensor([[1.0], [0.0]]),
        names=("shape:star", "class:striped star", ""),
        thing=torch.tensor([[1.0, 1, 0], [0, 0, 0.5]]),
    )


@pytest.fixture(scope="module")
def case() -> Case:
    return planted(0, 96)


# -- the case


def test_planted_latents_are_the_concepts_of_the_pictures(case):
    present = case.z.amax(1) > 0
    for shape, group in case.groups.items():
        inside = torch.isin(case.labels, torch.tensor(group))
        assert torch.equal(present[:, case.names.index(f"shape:{shape}")], inside)
    assert torch.equal(present[:, case.family("class")].sum(1), torch.ones(96, dtype=torch.long))
    assert sorted(case.labels.unique().tolist()) == list(range(16))
    assert len(case.live) == sum(map(bool, case.names)) == 48
    torch.testing.assert_close(fvu(case.x.flatten(0, 1), case.x_hat.flatten(0, 1)), study.NOISE, atol=0.005, rtol=0)
    # 6 facts, of which two pictures share some: cosines are sixths
    cosines = case.facts @ case.facts.t() * 6
    torch.testing.assert_close(cosines, cosines.round(), atol=1e-4, rtol=0)


def test_the_same_seed_has_the_same_pictures_in_other_patches(case):
    coarse = planted(0, 96, patch_px=16)
    assert torch.equal(coarse.labels, case.labels)
    assert coarse.grid == (4, 4)
    assert torch.equal(coarse.z.amax(1) > 0, case.z.amax(1) > 0)
    small = planted(0, 16, size="small")
    assert torch.equal((small.z.amax((0, 1)) > 0)[[small.names.index(f"size:{s}") for s in ("small", "large")]],
                       torch.tensor([True, False]))  # fmt: skip


# -- dials


@pytest.mark.parametrize("name", DIALS)
def test_at_its_start_a_dial_changes_nothing(name, case):
    dial = DIALS[name]
    turned = dial.turn(case, dial.strengths[0], 3)
    for field in ("x", "z", "W_dec", "labels", "x_hat"):
        assert torch.equal(getattr(turned, field), getattr(case, field)), field
    torch.testing.assert_close(turned.facts @ turned.facts.t(), case.facts @ case.facts.t())


@pytest.mark.parametrize("name", ["mixed", "split", "duplicated", "dead", "scaled"])
def test_dials_that_leave_the_reconstruction_as_it_was(name, case):
    turned = DIALS[name].turn(case, DIALS[name].strengths[-1], 3)
    torch.testing.assert_close(turned.x_hat, case.x_hat, atol=1e-4, rtol=1e-4)
    assert not torch.equal(turned.z, case.z) or name == "dead"


@pytest.mark.parametrize("name", ["scattered", "silent", "mislabelled"])
def test_what_is_spoilt_at_one_strength_is_spoilt_at_the_next(name, case):
    field = "labels" if name == "mislabelled" else "z"
    less, more = (getattr(DIALS[name].turn(case, s, 3), field) != getattr(case, field) for s in (0.3, 0.7))
    if name == "mislabelled":  # who moves is the same; now and then somebody gets a label like his own
        assert (less & ~more).sum() <= 0.1 * len(less)
    else:
        assert not (less & ~more).any()
    assert less.any()
    assert more.sum() > less.sum()


def test_scattered_takes_activations_along():
    one = by_hand()
    turned = study.scattered(one, 1.0, 1)
    torch.testing.assert_close(turned.x, turned.x_hat)
    assert torch.equal(turned.z.sort(1).values, one.z.sort(1).values)


def test_displaced_moves_codes_down_and_leaves_activations():
    one = replace(by_hand(), grid=(3, 1))
    turned = study.displaced(one, 1, 0)
    assert turned.z[0].tolist() == [[0, 1, 0], [2, 0, 0], [2, 0, 0]]
    assert torch.equal(turned.x, one.x)


def test_mixed_by_hand():
    turned = study.mixed(by_hand(), 0.25, 0)
    assert turned.z[0].tolist() == [[1.5, 0.5, 0], [1.5, 0.5, 0], [0.25, 0.75, 0]]
    assert turned.W_dec.tolist() == [[1.5, -0.5], [-0.5, 1.5], [0, 0]]
    with pytest.raises(ValueError, match="dial must be in 0..0.5, got 0.5"):
        study.mixed(by_hand(), 0.5, 0)


def test_lost_and_silent(case):
    turned = study.lost(case, 0.25, 0)
    assert len(turned.live) == 36
    off = (study.silent(case, 0.3, 0).z.amax(1) == 0)[case.z.amax(1) > 0]
    assert 0.2 < off.float().mean() < 0.4


def test_wrong_latents_fire_on_the_thing_where_their_concept_is_not(case):
    turned = study.wrong(case, 0.1, 0)
    was, now = case.z.amax(1) > 0, turned.z.amax(1) > 0
    assert torch.equal(turned.z.amax(1)[was], case.z.amax(1)[was])
    assert len(turned.live) == 48
    fresh = (now & ~was)[:, case.live]
    assert 0.08 < fresh.sum() / (~was[:, case.live]).sum() < 0.12
    image, latent = (now & ~was).nonzero()[0]
    assert torch.equal(turned.z[image, :, latent] > 0, case.thing[image] > 0)
    weak = study.faint(case, 0.1, 0)
    torch.testing.assert_close(weak.z[image, :, latent], 0.3 * turned.z[image, :, latent])
    with pytest.raises(ValueError, match="known of planted codes only"):
        study.wrong(replace(case, thing=None), 0.1, 0)


def test_mislabelled_keeps_how_many_there_are_of_each_class(case):
    labels = study.mislabelled(case, 0.5, 0).labels
    assert torch.equal(labels.bincount(), case.labels.bincount())
    assert 0.35 < (labels != case.labels).float().mean() <= 0.5


def test_absorbed_by_hand():
    turned = study.absorbed(by_hand(), 1, 0)
    assert turned.z[0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]  # class 0 is the first of the shape's two
    assert torch.equal(turned.z[1], by_hand().z[1])
    assert turned.W_dec.tolist() == [[1, 0], [1, 1], [0, 0]]


def test_split_puts_each_picture_into_one_part(case):
    turned = study.split(case, 3, 0)
    cut = case.family("class", "shape")
    assert len(cut) == 20
    pieces = torch.stack([turned.z[..., cut], *turned.z[..., study.D_SAE :].split(20, 2)])
    assert torch.equal(pieces.sum(0), case.z[..., cut])
    assert int((pieces.amax(2) > 0).sum(0).max()) == 1


@pytest.mark.parametrize("name", ["noise_class", "noise_other"])
def test_noise_adds_its_fvu_in_its_directions(name, case):
    turned = DIALS[name].turn(case, 0.5, 0)
    added = fvu(turned.x.flatten(0, 1), turned.x_hat.flatten(0, 1)) - study.NOISE
    assert added == pytest.approx(0.5, abs=0.06)
    along = (turned.error @ case.class_directions).square().sum() / turned.error.square().sum()
    assert float(along) == pytest.approx(1.0 if name == "noise_class" else 0.0, abs=1e-4)


def test_shrunk_keeps_what_is_nearest_the_centre_of_mass():
    z = torch.tensor([1.0, 1, 4, 1, 1, 0])[None, :, None]  # centre: 2 of 0..4
    one = Case(
        *(z, z, torch.ones(1, 1), torch.zeros(1), torch.tensor([0]), torch.eye(1), (1, 6), {}),
        class_directions=torch.eye(1),
    )
    assert study.shrunk(one, 0.4, 0).z[0, :, 0].tolist() == [0, 1, 4, 1, 0, 0]
    assert study.shrunk(one, 0.75, 0).z[0, :, 0].tolist() == [0, 1, 4, 0, 0, 0]  # of equals the first


def test_fewer_takes_from_all_classes_alike(case):
    counts = study.fewer(case, 0.5, 0).labels.bincount()
    assert counts.tolist() == [(int(n) + 1) // 2 for n in case.labels.bincount()]


def test_a_cone_leaves_normalized_monosemanticity(case):
    plain, narrow = (study.measure(one)["monosemanticity_normalized"] for one in (case, study.cone(case, 3, 0)))
    assert narrow.value == pytest.approx(plain.value, abs=1e-5)
    raw = study.measure(study.cone(case, 3, 0))["monosemanticity"].value
    assert raw == pytest.approx((study.measure(case)["monosemanticity"].value + 9) / 10, abs=1e-5)


def test_meaning_and_style_are_reconstructed_as_well_as_ever(case):
    for turned in (study.meaning(case, 1.0, 0), study.style(case, 1.0, 0)):
        torch.testing.assert_close(turned.x - turned.x_hat, case.x - case.x_hat, atol=1e-4, rtol=0)
    changed = study.meaning(case, 1.0, 0).z.amax(1) > 0
    assert not torch.equal(changed[:, case.family("class")], (case.z.amax(1) > 0)[:, case.family("class")])


# -- verdicts


def curve(values, expected, width=0.01, seeds=2, **more):
    """Rows of one dial and metric: at strengths 0, 1, 2, ..., for each seed alike."""
    return [
        {"source": "s", "dial": "d", "about": "a", "spoils": True, "metric": "m", "expected": expected}
        | {"strength": strength, "seed": seed, "value": value, "low": value - width, "high": value + width}
        | more
        for seed in range(seeds)
        for strength, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "expected", "verdict", "since"),
    [
        ([0.9, 0.8, 0.5], "falls", "yes", 1),
        ([0.9, 0.89, 0.5], "falls", "yes", 2),
        ([0.9, 0.895, 0.9], "falls", "blind", None),
        ([0.9, 0.95, 0.99], "falls", "backwards", None),
        ([0.9, 0.5, 0.9], "falls", "turns", 1),
        ([0.9, 0.5, 0.6], "falls", "turns", 1),  # a step back of .1
        ([0.1, 0.3, 0.5], "rises", "yes", 1),
        ([0.9, 0.9, 0.9], "stays", "stays", None),
        ([0.9, 0.7, 0.9], "stays", "moved", 1),
        ([0.9, 0.2, 0.1], "", "not asked", 1),
    ],
)
def test_the_verdict_by_hand(values, expected, verdict, since):
    (found,) = verdicts(curve(values, expected))
    assert (found["verdict"], found["since"]) == (verdict, since)


def test_a_small_step_or_a_wide_interval_or_one_seed_alone_is_no_move():
    assert moved(*(curve([v], "stays", width=0.001) for v in (0.5, 0.519))) == 0
    assert moved(*(curve([v], "stays", width=0.001) for v in (0.5, 0.521))) == 1
    assert moved(*(curve([v], "stays", width=0.2) for v in (0.5, 0.8))) == 0
    start, at = curve([0.5], "stays"), curve([0.8], "stays")
    assert moved(start, at) == 1
    assert moved(start, [at[0], curve([0.2], "stays")[1]]) == 0
    assert moved(curve([0.5], "", low=None, high=None), curve([0.4], "", low=None, high=None)) == -1
    none = [row | {"value": None, "low": None, "high": None} for row in start]
    assert moved(start, none) == 0
    assert verdicts(start + [row | {"strength": 1} for row in none])[0]["verdict"] == "no number"


def test_the_word_for_a_metric():
    rows = verdicts(curve([0.9, 0.5], "falls") + curve([0.9, 0.5], "stays", dial="e"))
    assert summary(rows)[0] == {
        "source": "s",
        "metric": "m",
        "asked": 1,
        "yes": 1,
        "missed": [],
        "also": [("e", pytest.approx(-0.4))],
        "word": "follows",
    }
    assert summary(rows[:1])[0]["word"] == "sound"
    blind = verdicts(curve([0.9, 0.9], "falls", dial="f"))
    assert (summary(blind)[0]["word"], summary(blind)[0]["missed"]) == ("no", ["f (blind)"])
    assert summary(rows + blind)[0]["word"] == "partly"


# -- all of it, small


def test_a_small_run_moves_what_it_must(tmp_path):
    dials = {name: replace(DIALS[name], strengths=(0, 1)) for name in ("scattered", "noise_class")}
    rows = calibrate(lambda seed: planted(seed, 240), (0,), source="planted", dials=dials, n_bootstrap=50)
    found = {(row["dial"], row["metric"]): row for row in verdicts(rows)}
    assert found["scattered", "moran"]["verdict"] == "yes"
    assert found["scattered", "fvu"]["verdict"] == "stays"
    assert found["noise_class", "fvu"]["verdict"] == "yes"
    assert found["noise_class", "fvu"]["change"] == pytest.approx(1.0, abs=0.1)
    assert found["noise_class", "preservation"]["verdict"] == "yes"
    assert found["noise_class", "moran"]["verdict"] == "stays"
    pages = script()
    text = pages.tables(list(found.values()))
    assert "| `moran` | 1 of 1 |" in text
    rows = json.loads(json.dumps(rows))
    path = pages.picture(rows, verdicts(rows), study.METRICS, tmp_path / "c.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_m6_sees_that_class_information_is_lost_and_not_that_latents_change_their_meaning():
    home, other = planted(0, 160), planted(1, 160)
    other = replace(other, x=other.x + other.z @ (home.W_dec - other.W_dec), W_dec=home.W_dec)
    plain, swapped = (study.measure_elsewhere(home, one) for one in (other, study.meaning(other, 1.0, 0)))
    assert plain["cross_domain_selective_kept"].value == pytest.approx(1.0, abs=0.02)
    assert swapped["cross_domain_selective_kept"].value < 0.5
    assert swapped["cross_domain_preservation"].value > 0.9


def script():
    path = Path(__file__).parents[2] / "scripts/visaebench_calibration.py"
    spec = importlib.util.spec_from_file_location("visaebench_calibration_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
