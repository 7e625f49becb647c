"""What goes with a classifier's answers, and what moves them."""

import numpy as np
import pytest
import torch

from vitrail.coders.sparse import Codes
from vitrail.concepts.bias import (
    CurvePoint,
    associations,
    by_name,
    densities,
    dose_response,
    fit_classifier,
    intervention_curve,
    leanings,
    plateau,
    strengths_of,
)
from vitrail.metrics.measured import Measured


def planted(n=120, d_sae=12, seed=0):
    """Latent 3 goes with the answer, latent 5 against it, the others with nothing; latent 11 fires twice."""
    generator = torch.Generator().manual_seed(seed)
    said = torch.rand(n, generator=generator) < 0.4
    z = torch.rand(n, d_sae, generator=generator, dtype=torch.float64)
    z[torch.rand(n, d_sae, generator=generator) < 0.6] = 0
    z[:, 3] = torch.where(said, 0.8, 0.0) * (0.5 + z[:, 0]) + 0.1 * z[:, 1]
    z[:, 5] = torch.where(said, 0.0, 0.6) + 0.1 * z[:, 2]
    z[:, 11] = 0
    z[:2, 11] = 1
    return Codes.from_dense(z), z, said


def test_numbers_are_scipys_and_scikit_learns():
    stats, metrics = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    codes, z, said = planted()
    found = associations(codes, said, n_permutations=200)
    assert [one.latent for one in found[:2]] == [5, 3]
    assert 11 not in {one.latent for one in found}, "too few images to say anything"
    for one in found:
        column = z[:, one.latent].numpy()
        assert one.point_biserial == pytest.approx(stats.pointbiserialr(said.numpy(), column)[0])
        assert one.auc == pytest.approx(metrics.roc_auc_score(said.numpy(), column))
        a, b = column[said.numpy()], column[~said.numpy()]
        pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2))
        assert one.effect == pytest.approx((a.mean() - b.mean()) / pooled)
        assert one.fires == pytest.approx((column > 0).mean())


def test_what_was_planted_is_found_and_nothing_else():
    codes, _, said = planted()
    found = {one.latent: one for one in associations(codes, said, n_permutations=999)}
    for latent in (3, 5):
        assert found[latent].p_family == found[latent].p == 1 / 1000
        assert found[latent].p_holm <= 0.05
    others = [one for latent, one in found.items() if latent not in (3, 5)]
    assert min(one.p_family for one in others) > 0.05
    assert all(one.p <= one.p_family for one in found.values())
    assert found[3].point_biserial > 0 > found[5].point_biserial


def test_exact_permutations_by_hand():
    # One latent, values 0 1 2 3, answers on the two largest: of 6 ways two are as extreme, so p goes to 1/3.
    codes = Codes.from_dense(torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64))
    (one,) = associations(codes, torch.tensor([False, False, True, True]), n_permutations=6000, min_fires=1)
    assert one.p == pytest.approx(1 / 3, abs=0.03)
    assert one.p_family == one.p
    assert (one.mean_said, one.mean_other, one.auc) == (2.5, 0.5, 1.0)
    assert one.effect == pytest.approx(2 / np.sqrt(0.5))


def test_answers_that_are_all_the_same_are_refused():
    codes, _, said = planted()
    with pytest.raises(ValueError, match="says no of all 120 images: nothing can go with it"):
        associations(codes, torch.zeros_like(said))
    with pytest.raises(ValueError, match="120 rows of codes and 7 answers"):
        associations(codes, said[:7])


def test_densities_are_shares():
    codes, z, said = planted()
    rows = densities(codes, said, 3, n_bins=10)
    for who in ("said", "other"):
        assert sum(row[who] for row in rows) == pytest.approx(1)
    assert rows[0]["other"] == pytest.approx(float((z[~said, 3] == 0).double().mean()))


def test_a_curve_by_hand_and_its_plateau():
    # P(yes) = sigmoid(2 x) of one dimension; setting the latent to v moves x to v.
    rows = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    classifier = fit_classifier(rows, (rows[:, 0] > 0).long(), ["no", "yes"])

    def edited(latent, value):
        assert latent == 7
        return torch.full_like(rows, value)

    curve = intervention_curve(classifier, rows, edited, 7, [-50.0, 0.0, 50.0, 60.0], answer=1, n_bootstrap=50)
    own = classifier.probabilities(torch.tensor([[0.0]], dtype=torch.float64))[0, 1]
    assert curve[1].probability.value == pytest.approx(float(own))
    assert curve[1].probability.low == curve[1].probability.high, "all images are the same then"
    before = float(classifier.probabilities(rows)[:, 1].mean())
    assert curve[2].change.value == pytest.approx(curve[2].probability.value - before)
    assert curve[2].change.low < curve[2].change.value < curve[2].change.high
    assert plateau(curve) == 50.0


def test_a_curve_that_still_rises_has_no_plateau():
    def point(value, level):
        return CurvePoint(value, Measured(level, "", 1), Measured(0.0, "", 1))

    rising = [point(0, 0.1), point(1, 0.5), point(2, 0.9)]
    assert plateau(rising) is None
    assert plateau([point(0, 0.4), point(1, 0.4)]) == 0


def test_dose_response_by_hand():
    # Of four images P goes from .1 .1 .2 .2 over .3 to .5 .5 .8 .8: the mean rise is .5, every image's above 0.
    def point(value, each):
        each = np.array(each)
        return CurvePoint(value, Measured(float(each.mean()), "", 4), Measured(0.0, "", 4), each)

    rising = [point(0, [0.1, 0.1, 0.2, 0.2]), point(1, [0.3] * 4), point(2, [0.5, 0.5, 0.8, 0.8])]
    found = dose_response(rising, expected=0.3)
    assert found.rise.value == pytest.approx(0.5)
    assert 0.39 < found.rise.low < 0.5 < found.rise.high < 0.61
    assert (found.rank, found.way) == (1.0, "right")
    assert dose_response(rising, expected=-0.3).way == "wrong"
    wavering = [rising[0], point(1, [0.0] * 4), rising[2]]
    assert dose_response(wavering, 1).rank == pytest.approx(0.5)
    still = dose_response([rising[0], point(1, [0.2, 0.0, 0.3, 0.1])], expected=1)
    assert still.way == "none"
    assert still.rise.value == pytest.approx(0.0)
    assert dose_response([rising[0], rising[0]], expected=1).rank == 0
    with pytest.raises(ValueError, match="at two values at least"):
        dose_response(rising[:1], expected=1)


def leaning_data(n=300, seed=0):
    """Log-odds of a classifier that sees the class (latent 0 too) and leans on latent 2, which class does not tell."""
    generator = torch.Generator().manual_seed(seed)
    true = (torch.rand(n, generator=generator) < 0.5).long()
    z = torch.rand(n, 8, generator=generator, dtype=torch.float64)
    z[torch.rand(n, 8, generator=generator) < 0.5] = 0
    z[:, 0] += 3 * true
    odds = 8 * true - 4 + 1.5 * z[:, 2] + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    return Codes.from_dense(z), z, odds, true


def test_a_leaning_is_found_where_the_answers_say_the_class():
    codes, _, odds, true = leaning_data()
    assert associations(codes, odds > 0, n_permutations=99)[0].latent == 0, "answers go with the class first"
    found = leanings(codes, odds, true, n_permutations=499)
    assert found[0].latent == 2
    assert found[0].p == found[0].p_family == 1 / 500
    assert min(one.p_family for one in found[1:]) > 0.05, "the class's own latent is no leaning"
    assert all(one.p <= one.p_family for one in found)


def test_a_leaning_is_the_partial_correlation():
    codes, z, odds, true = leaning_data(n=80, seed=3)
    design = np.stack([np.ones(80), true.numpy()], 1)

    def rest(y):
        return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]

    for one in leanings(codes, odds, true, n_permutations=10):
        a, b = rest(z[:, one.latent].numpy()), rest(odds.numpy())
        assert one.r_given == pytest.approx(np.corrcoef(a, b)[0, 1])
        assert one.slope == pytest.approx(np.polyfit(a, b, 1)[0] * np.sqrt((a**2).sum() / 78))


def test_latents_of_one_name_are_added_up():
    z = torch.tensor([[2.0, 0, 4, 1], [1, 0, 0, 0], [0, 3, 2, 5]])
    codes, said = by_name(Codes.from_dense(z), {0: "red", 2: "red", 1: "blue"})
    assert said == ("blue", "red")
    # Latents 0 and 2 have largest 2 and 4: 2/2 + 4/4, 1/2 + 0, 0 + 2/4; latent 3 has no name.
    torch.testing.assert_close(codes.to_dense(), torch.tensor([[0, 2.0], [0, 0.5], [1, 0.5]]))
    assert codes.fired().tolist() == [1, 3]
    assert by_name(Codes.from_dense(z), {})[1] == ()


def test_a_split_concept_leans_more_than_its_parts():
    generator = torch.Generator().manual_seed(2)
    true, red = (torch.rand(200, generator=generator) < 0.5).long(), torch.rand(200, generator=generator) < 0.4
    which = torch.randint(0, 3, (200,), generator=generator)
    z = torch.zeros(200, 5, dtype=torch.float64)
    z[red, which[red]] = 1.0 + torch.rand(int(red.sum()), generator=generator, dtype=torch.float64)
    z[:, 4] = torch.rand(200, generator=generator)
    odds = 4 * true + red.double() + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64)
    codes = Codes.from_dense(z)
    parts = leanings(codes, odds, true, n_permutations=50)
    whole, said = by_name(codes, {0: "red", 1: "red", 2: "red", 4: "noise"})
    first = leanings(whole, odds, true, n_permutations=50)[0]
    assert said[first.latent] == "red"
    assert first.r_given > 1.3 * parts[0].r_given


def test_what_cannot_lean_is_a_sentence():
    codes, _, odds, true = leaning_data(n=40)
    with pytest.raises(ValueError, match="40 rows of codes, 39 log-odds and 40 classes"):
        leanings(codes, odds[1:], true)
    with pytest.raises(ValueError, match="1 of 40 log-odds are not finite"):
        leanings(codes, torch.cat([odds[1:], torch.tensor([float("inf")])]), true)
    with pytest.raises(ValueError, match="the same for all pictures of a class"):
        leanings(codes, true.double(), true)


def test_strengths_go_beyond_what_was_seen():
    codes, z, _ = planted()
    values = strengths_of(codes, 3, n=4, beyond=3)
    assert values == pytest.approx([0, *(float(z[:, 3].max()) * k for k in (1, 2, 3))])
