"""Truth and its recovery: by hand, against scikit-learn, on planted codes, and under what must not matter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.coders.sparse import Codes
from vitrail.images import open_world
from vitrail.metrics.entries import Entries
from vitrail.metrics.recovery import Recovery, halves, hierarchy_of, recovery
from vitrail.metrics.recovery_picture import recovery_picture
from vitrail.metrics.truth import Firing, Truth, displaced, mixed, pooled, shuffled

GRID = (4, 4)
WORLD = open_world("shapes?n=240&image_px=32")


def truth_of(*columns: list[int], concepts: tuple[str, ...] = ()) -> Truth:
    """Image labels only; a list for each concept."""
    present = np.array(columns, dtype=bool).T
    return Truth(concepts or tuple(f"thing:{i}" for i in range(len(columns))), present)


def firing_of(*columns: list[float]) -> Firing:
    """One row per picture; a list for each latent."""
    return Firing(Codes.from_dense(torch.tensor(columns, dtype=torch.float32).t().contiguous()))


def same(firing: Firing, truth: Truth) -> Recovery:
    """Chosen and scored on the same pictures."""
    return recovery(firing, truth, firing, truth)


@pytest.fixture(scope="module")
def shapes() -> Truth:
    return Truth.of_world(WORLD, range(240), grid=GRID)


def planted(truth: Truth, *, noise: float = 0.0, seed: int = 0) -> Firing:
    """Latent i fires where concept perm[i] covers anything of a patch, and, with `noise`, on a share of the others."""
    rng = np.random.default_rng(seed)
    labels = [truth.patch_labels(c) for c in range(len(truth.concepts))]
    z = np.stack([shown if counts is None else shown | ~counts for shown, counts in labels], 1).astype(np.float32)
    z *= rng.uniform(1.0, 2.0, z.shape).astype(np.float32)
    z += (rng.random(z.shape) < noise) * rng.uniform(0.0, 1.5, z.shape).astype(np.float32)
    z = z[:, rng.permutation(z.shape[1])]
    return Firing.of_codes(Codes.from_dense(torch.from_numpy(z)), truth.n_patches, slice(None))


# -- what is there


def test_the_truth_of_a_world_is_what_its_masks_say(shapes):
    names = shapes.concepts
    for row in (0, 7, 239):
        scene = WORLD.scene(row)
        there = {names[c] for c in np.flatnonzero(shapes.images[row])}
        assert there == {*scene.masks, f"class:{WORLD.classes[scene.label]}"}
        coverage = WORLD.patch_coverage(row, 8).flatten(1).numpy()  # 32 pixels in 4 patches
        for c, concept in enumerate(WORLD.concepts):
            shown, counts = shapes.patch_labels(c)
            mine = slice(16 * row, 16 * row + 16)
            assert np.array_equal(shown[mine], coverage[c] >= 0.5), concept
            assert counts is not None
            assert np.array_equal(counts[mine], (coverage[c] == 0) | (coverage[c] >= 0.5)), concept
    object_, star = (
        shapes.patch_labels(names.index(name))[0].reshape(240, 16) for name in ("object", "class:plain star")
    )
    pictures = shapes.images[:, names.index("class:plain star")]
    assert np.array_equal(star[pictures], object_[pictures])
    assert not star[~pictures].any()


def test_selected_pictures_keep_their_patches(shapes):
    rows = np.array([5, 3, 5])
    part, whole = shapes.select(rows), shapes.patch_labels(4)[0].reshape(240, 16)
    assert np.array_equal(part.patch_labels(4)[0].reshape(3, 16), whole[rows])
    firing = planted(shapes)
    chosen = firing.select(rows)
    assert torch.equal(chosen.images.to_dense(), firing.images.to_dense()[rows])
    assert torch.equal(
        chosen.patches.to_dense().reshape(3, 16, -1), firing.patches.to_dense().reshape(240, 16, -1)[rows]
    )


def test_a_picture_is_the_maximum_or_the_mean_of_its_patches():
    # Two pictures of CLS and two patches; CLS is left out.
    z = torch.tensor([[9.0, 9.0], [1.0, 0.0], [3.0, 0.0], [0.0, 9.0], [0.0, 0.0], [0.0, 4.0]])
    codes = Codes.from_dense(z)
    firing = Firing.of_codes(codes, 3, slice(1, 3))
    assert firing.images.to_dense().tolist() == [[3.0, 0.0], [0.0, 4.0]]
    assert torch.equal(firing.patches.to_dense(), z[[1, 2, 4, 5]])
    assert pooled(firing.patches, 2, "mean").to_dense().tolist() == [[2.0, 0.0], [0.0, 2.0]]
    assert Firing.of_codes(codes, 3, None).images.to_dense().tolist() == [[9.0, 9.0], [0.0, 9.0]]


# -- scores


def test_by_hand():
    # Positives 3, 2, 0; negatives 1, 0, 0. Above 2: TP 1; above 1: TP 2; above 0: TP 2, FP 1.
    # F1 = 2/4, 4/5, 4/6. AUC: 3 + 3 + (0 + 1/2 + 1/2) of 9 pairs.
    found = same(firing_of([3, 2, 0, 1, 0, 0]), truth_of([1, 1, 1, 0, 0, 0])).levels["image"]
    assert found.f1_choose[0, 0] == pytest.approx(0.8)
    assert found.f1[0, 0] == pytest.approx(0.8)
    assert found.threshold[0, 0] == 1
    assert found.auc[0, 0] == pytest.approx(7 / 9)
    assert found.iou[0, 0] == pytest.approx(2 / 3)
    assert (found.precision[0, 0], found.recall[0, 0]) == (1, pytest.approx(2 / 3))
    assert found.constant[0] == pytest.approx(2 / 3)  # "always": TP 3, FP 3


def test_the_threshold_is_chosen_on_one_split_and_applied_to_the_other():
    # As above, threshold 1. Scoring split: 1 is not above it, 2 and 5 are: TP 1, FP 1, FN 1.
    found = recovery(
        firing_of([3, 2, 0, 1, 0, 0]), truth_of([1, 1, 1, 0, 0, 0]), firing_of([1, 2, 5, 0]), truth_of([1, 1, 0, 0])
    )
    assert found.levels["image"].f1[0, 0] == pytest.approx(0.5)
    assert found.levels["image"].f1_choose[0, 0] == pytest.approx(0.8)
    assert found.levels["image"].auc[0, 0] == pytest.approx(2 / 4)  # 1 > 0, 2 > 0


def test_every_pair_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    n, d_sae, n_concepts, per = 60, 7, 3, 4

    def split() -> tuple[Firing, Truth]:
        z = rng.integers(0, 4, (n * per, d_sae)) * (rng.random((n * per, d_sae)) < 0.5)  # many ties
        z[:, 5] = 0  # never fires
        shown, unclear = rng.random((n * per, n_concepts)) < 0.3, rng.random((n * per, n_concepts)) < 0.2
        bits = (np.packbits(shown & ~unclear, axis=1), np.packbits(unclear, axis=1))
        labels = (shown & ~unclear).reshape(n, per, -1).any(1)
        truth = Truth(("a:0", "a:1", "a:2"), labels, (2, 2), *bits)
        return Firing.of_codes(Codes.from_dense(torch.from_numpy(z).float()), per, slice(None)), truth

    (choose, choose_truth), (score, score_truth) = split(), split()
    found = recovery(choose, choose_truth, score, score_truth)
    for level, pairs in found.levels.items():
        z, other = (getattr(f, level + ("s" if level == "image" else "es")).to_dense().numpy() for f in (choose, score))
        for c in range(n_concepts):
            for i in range(d_sae):
                (y, kept), (w, other_kept) = found._labels(level, 0, c), found._labels(level, 1, c)
                a, y = (z[:, i], y) if kept is None else (z[kept, i], y[kept])
                b, w = (other[:, i], w) if other_kept is None else (other[other_kept, i], w[other_kept])
                assert pairs.auc_choose[c, i] == pytest.approx(metrics.roc_auc_score(y, a))
                assert pairs.auc[c, i] == pytest.approx(metrics.roc_auc_score(w, b))
                best = max((metrics.f1_score(y, a > t, zero_division=0.0) for t in np.unique(a)), default=0)
                assert pairs.f1_choose[c, i] == pytest.approx(best)
                t = pairs.threshold[c, i]
                assert pairs.f1_choose[c, i] == pytest.approx(metrics.f1_score(y, a > t, zero_division=0.0))
                for name, scored in (
                    ("f1", metrics.f1_score),
                    ("iou", metrics.jaccard_score),
                    ("precision", metrics.precision_score),
                    ("recall", metrics.recall_score),
                ):
                    assert getattr(pairs, name)[c, i] == pytest.approx(scored(w, b > t, zero_division=0.0)), name


def test_codes_that_are_the_truth_are_recovered_whole(shapes):
    found = same(planted(shapes), shapes)
    assert set(found.levels) == {"image", "patch"}
    for row in found.rows(n_bootstrap=20):
        assert row["f1"] == row["f1_choose"] == row["auc"] == row["iou"] == row["recall"] == 1, row
        assert (row["f1_low"], row["f1_high"]) == (1, 1)
    summary = found.summary(n_bootstrap=20)
    assert summary["image_recovered_f1_0.9"].value == 1
    assert summary["patch_recovered_auc_0.95"].value == 1
    measured = [shapes.concepts[c] for c in np.flatnonzero(found.levels["image"].measured)]
    assert "object" not in measured  # it is in every picture, so nothing can tell it from "always"
    assert {row["family"] for row in found.families()} == {*(n.partition(":")[0] for n in measured), "object", "all"}


def test_shuffled_labels_give_chance(shapes):
    firing = planted(shapes, noise=0.02)
    found = halves(firing, shuffled(shapes, 1.0, seed=3))
    # The chosen latent is the luckiest of 108 on the choosing split, and no more than any other on the scoring one.
    auc = [row["auc"] for row in found.rows(by="auc", n_bootstrap=0) if row["level"] == "image"]
    assert abs(np.mean(auc) - 0.5) < 0.04
    rows = [row for row in found.rows(n_bootstrap=0) if row["level"] == "image"]
    assert np.mean([row["f1"] - row["constant"] for row in rows]) < 0
    assert np.mean([row["f1_choose"] - row["f1"] for row in rows]) > 0.05


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_order_and_positive_scales_of_latents_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    n, d_sae = 40, 6
    z = rng.random((n, d_sae)) * (rng.random((n, d_sae)) < 0.6)
    truth = Truth(("a:0", "a:1"), rng.random((n, 2)) < 0.4)
    order = rng.permutation(d_sae)
    scales = 2.0 ** rng.integers(-3, 4, d_sae)  # exact in binary: ties stay ties
    one, other = (halves(Firing(Codes.from_dense(torch.from_numpy(v))), truth) for v in (z, (z * scales)[:, order]))
    a, b = one.levels["image"], other.levels["image"]
    assert np.array_equal(a.measured, b.measured)
    for name in ("f1_choose", "auc_choose", "auc", "f1", "iou"):
        assert np.array_equal(getattr(a, name)[:, order], getattr(b, name), equal_nan=True), name
    np.testing.assert_allclose((a.threshold * scales)[:, order], b.threshold, rtol=1e-6)


def test_a_row_names_the_best_the_runner_up_and_how_many_are_as_good():
    y = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    # F1: 0 (one wrong picture), 8/9 (four of five), 1 (all five).
    found = same(firing_of([0.0] * 9 + [1.0], y[:4] + [0] * 6, y), truth_of(y))
    row = found.rows()[0]
    assert (row["latent"], row["runner_up"]) == (2, 1)
    assert row["runner_up_f1"] == pytest.approx(8 / 9)
    assert row["n_redundant"] == 1  # 0.889 is not 0.9 of 1
    twice = same(firing_of([0.0] * 9 + [1.0], y, y), truth_of(y)).rows()[0]
    assert (twice["latent"], twice["n_redundant"]) == (1, 2)


def test_concepts_that_one_split_lacks_are_not_measured():
    truth = truth_of([1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1])
    found = halves(firing_of([1, 0, 1, 0]), truth)
    assert found.levels["image"].measured.tolist() == [True, False, False]
    assert [row["concept"] for row in found.rows()] == ["thing:0"]


def test_a_concept_of_half_the_pictures_is_reached_at_f1_one_half_by_always():
    y = [1, 0] * 20
    found = same(firing_of([1.0] * 40), truth_of(y))
    summary = found.summary()
    assert summary["image_recovered_f1_0.5"].value == summary["image_constant_f1_0.5"].value == 1
    assert summary["image_auc"].value == 0.5
    assert "image_redundancy" not in summary  # nothing is found better than by "always"


def test_intervals_are_those_of_resampled_pictures():
    rng = np.random.default_rng(0)
    y = rng.random(200) < 0.5
    on = np.where(rng.random(200) < 0.8, y, ~y)
    found = same(
        Firing(Codes.from_dense(torch.from_numpy(on.astype(np.float32))[:, None])), Truth(("a:0",), y[:, None])
    )
    row = found.rows(n_bootstrap=2000)[0]
    picks = rng.integers(0, 200, (2000, 200))  # another stream of random numbers
    tp, wrong = (y & on)[picks].sum(1), (y ^ on)[picks].sum(1)
    low, high = np.percentile(2 * tp / (2 * tp + wrong), [2.5, 97.5])
    assert row["f1_low"] == pytest.approx(low, abs=0.01)
    assert row["f1_high"] == pytest.approx(high, abs=0.01)
    summary = found.summary(n_bootstrap=2000)["image_f1"]
    assert (summary.value, summary.low, summary.high) == (
        pytest.approx(row["f1"]),
        pytest.approx(row["f1_low"]),
        pytest.approx(row["f1_high"]),
    )


# -- splitting and absorption


def test_splitting_by_hand():
    # Ten of twenty pictures show it. Latent 0 fires on five of them, latent 1 on the last of these and four others,
    # latent 2 on all ten and five more (precision 2/3: no part of it), latent 3 on the last.
    y = [1] * 10 + [0] * 10
    z = np.zeros((4, 20))
    z[0, :5], z[1, 4:9], z[2, :15], z[3, 9] = 1, 1, 1, 1
    found = same(firing_of(*z.tolist()), truth_of(y))
    row = found.splitting(min_fires=1)[0]
    assert (row["latents"], row["n_latents"]) == ([0, 1], 2)
    assert row["coverage_choose"] == row["coverage"] == pytest.approx(0.9)
    assert row["precision"] == 1
    row = found.splitting(min_fires=6)[0]
    assert (row["latents"], row["n_latents"], row["coverage"], row["precision"]) == ([], None, 0, None)


def test_whole_and_split_concepts_are_told_apart(shapes):
    firing = planted(shapes)
    dense = firing.patches.to_dense()
    sand = shapes.concepts.index("background:sand")
    at = int(halves(firing, shapes).levels["patch"].chosen("f1")[sand, 0])  # its latent, cut in three by picture
    picture = torch.arange(len(dense)) // 16 % 3
    thirds = [dense[:, at] * (picture == k) for k in range(3)]
    cut = torch.cat([dense[:, :at], dense[:, at + 1 :], torch.stack(thirds, 1)], 1)
    split = Firing.of_codes(Codes.from_dense(cut), 16, slice(None))
    before, after = (
        {row["concept"]: row["n_latents"] for row in halves(f, shapes).splitting(level="patch", min_fires=1)}
        for f in (firing, split)
    )
    assert set(before.values()) == {1}
    assert after == before | {"background:sand": 3}


def test_absorption_by_hand():
    # The parent is in eight pictures, the child in four of them. The parent's latent is off in three of the child's,
    # in two of which the child's is on; and off in one of the parent's other four.
    parent, child = [1] * 8 + [0] * 4, [1] * 4 + [0] * 8
    of_parent = [1, 0, 0, 0, 1, 1, 1, 0] + [0] * 4
    of_child = [1, 1, 1, 0] + [0] * 8
    truth = truth_of(parent, child, concepts=("shape:star", "class:plain star"))
    rows = same(firing_of(of_parent, of_child), truth).absorption([("shape:star", "class:plain star")])
    row = rows[0]
    assert (row["parent_latent"], row["child_latent"], row["n"]) == (0, 1, 4)
    assert (row["absorbed"], row["missed"], row["elsewhere"]) == (0.5, 0.75, 0.25)


def test_absorption_rises_with_what_is_taken_from_the_parent(shapes):
    firing, names = planted(shapes), shapes.concepts
    found = halves(firing, shapes)
    assert ("ground:land", "background:sand") in found.hierarchy
    assert ("shape:star", "class:striped star") in found.hierarchy
    assert not any(parent.startswith(("colour:", "size:", "position:")) for parent, _ in found.hierarchy)
    best = found.levels["image"].chosen("f1")[:, 0]
    land, sand = (int(best[names.index(name)]) for name in ("ground:land", "background:sand"))
    dense = firing.patches.to_dense()
    rates = []
    for share in (0.0, 0.5, 1.0):
        z = dense.clone()
        eaten = (z[:, sand] > 0) & (torch.arange(len(z)) // 16 % 10 < 10 * share)
        z[eaten, land] = 0
        rows = halves(Firing.of_codes(Codes.from_dense(z), 16, slice(None)), shapes).absorption()
        by_pair = {(row["parent"], row["child"]): row for row in rows}
        rates.append(by_pair["ground:land", "background:sand"]["absorbed"])
        assert by_pair["ground:land", "background:grass"]["absorbed"] == 0
    assert rates[0] == 0
    assert 0.3 < rates[1] < 0.7
    assert rates[2] == 1


def test_a_family_that_only_happens_to_fit_is_no_hierarchy():
    present = np.array([[1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 1, 0, 0, 1]] * 5, dtype=bool)
    names = ("up:a", "up:b", "low:x", "low:y", "low:z")
    # z is b's only child: b and z are one concept, not parent and child.
    assert hierarchy_of(names, present) == []
    more = np.concatenate([present, np.zeros((20, 1), dtype=bool)], axis=1)
    more[3::4, 4], more[3::4, 5] = False, True
    assert hierarchy_of((*names, "low:w"), more) == [
        ("up:a", "low:x"),
        ("up:a", "low:y"),
        ("up:b", "low:z"),
        ("up:b", "low:w"),
    ]


# -- dials


def falls(values: list[float]) -> bool:
    return all(a > b for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("level", ["image", "patch"])
@pytest.mark.parametrize("name", ["f1", "iou", "auc"])
def test_recovery_falls_with_every_dial(level, name, shapes):
    firing, key = planted(shapes, noise=0.01), f"{level}_{name}"

    def read(firing: Firing, truth: Truth) -> float:
        return halves(firing, truth).summary(n_bootstrap=0)[key].value

    whole = read(firing, shapes)
    assert falls([whole, *(read(firing, shuffled(shapes, share)) for share in (0.25, 0.5, 1.0))])
    if name != "auc":  # a pair's other latent rarely fires in the same rows: its rank hardly moves
        assert falls([whole, *(read(mixed(firing, dial), shapes) for dial in (0.4, 0.5))])
    if level == "patch":
        assert falls([whole, *(read(firing, displaced(shapes, step)) for step in (1, 2))])


def test_dials_at_nothing_leave_everything_as_it_is(shapes):
    firing = planted(shapes)
    assert mixed(firing, 0.0) is firing
    assert np.array_equal(shuffled(shapes, 0.0).images, shapes.images)
    assert np.array_equal(displaced(shapes, 4, -4).shown, shapes.shown)  # once around


def test_mixed_latents_by_hand():
    z = torch.tensor([[2.0, 0.0], [1.0, 4.0]])
    mixed_codes = mixed(Firing(Codes.from_dense(z)), 0.25).images.to_dense()
    assert mixed_codes.tolist() == [[1.5, 0.5], [1.75, 3.25]]


def test_displaced_masks_move_by_whole_patches(shapes):
    before, after = (t.patch_labels(0)[0].reshape(240, 4, 4) for t in (shapes, displaced(shapes, 1, 2)))
    assert np.array_equal(after[:, 1:, 2:], before[:, :-1, :-2])


# -- picture, refusals


def test_the_picture_shows_the_diagonal(shapes, tmp_path):
    found = halves(planted(shapes), shapes)
    svg, png = recovery_picture(found, tmp_path / "truth", level="patch")
    assert "shape:star" in svg.read_text()
    with Image.open(png) as image:
        assert image.width > 400
    with pytest.raises(ValueError, match=r"level must be one of image, patch, got 'pixel'"):
        recovery_picture(found, tmp_path / "truth", level="pixel")


def test_what_does_not_fit_is_refused(shapes):
    firing = planted(shapes)
    with pytest.raises(ValueError, match="the scoring split has codes of 240 pictures and labels of 2"):
        recovery(firing, shapes, firing, shapes.select(np.arange(2)))
    with pytest.raises(ValueError, match=r"16 patches a picture in its codes, and labels for 2 x 2"):
        same(firing, replace(shapes, grid=(2, 2)))
    with pytest.raises(ValueError, match="a grid of 5 x 5 does not cut a picture of 32 x 32 pixels"):
        Truth.of_world(WORLD, [0], grid=(5, 5))
    with pytest.raises(ValueError, match="coverage must be above 0"):
        Truth.of_world(WORLD, [0], coverage=0.0)
    with pytest.raises(ValueError, match=r"share must be in 0\.\.1, got 2"):
        shuffled(shapes, 2.0)
    with pytest.raises(ValueError, match=r"dial must be in 0\.\.0\.5, got 0\.6"):
        mixed(firing, 0.6)
    with pytest.raises(ValueError, match="n_tokens must divide the 3840 rows"):
        Firing.of_codes(firing.patches, 7, None)
    with pytest.raises(KeyError, match="no concept 'shape:cube'"):
        halves(firing, shapes).absorption([("shape:cube", "object")])
    with pytest.raises(ValueError, match="nothing is known of patches"):
        truth_of([1, 0]).patch_labels(0)


def test_latents_that_never_fire_are_at_chance():
    entries = Entries(Codes.from_dense(torch.zeros(4, 3)))
    f1, threshold, auc = entries.best((np.array([True, False, True, False]), None))
    assert (f1.tolist(), threshold.tolist(), auc.tolist()) == ([0] * 3, [0] * 3, [0.5] * 3)


def test_a_resample_without_the_concept_says_nothing_of_it():
    # One of 10 pictures shows it: a third of the resamples do not hold it, and those that do find it.
    y = [1] + [0] * 9
    found = same(firing_of(y), truth_of(y))
    assert [(row["f1_low"], row["f1_high"]) for row in found.rows(n_bootstrap=100)] == [(1, 1)]


def test_mixed_by_frequency_pairs_latents_that_fire_as_often():
    # Latents fire in 1, 3, 2 and 3 pictures: by frequency 0, 2, 1, 3, so that 0 and 2 are a pair, and 1 and 3.
    z = torch.tensor([[4.0, 8.0, 0.0, 1.0], [0.0, 8.0, 2.0, 1.0], [0.0, 8.0, 2.0, 1.0]])
    firing = Firing(Codes.from_dense(z))
    assert firing.frequency_order().tolist() == [0, 2, 1, 3]
    found = mixed(firing, 0.5, order=firing.frequency_order()).images.to_dense()
    assert found.tolist() == [[2.0, 4.5, 2.0, 4.5], [1.0, 4.5, 1.0, 4.5], [1.0, 4.5, 1.0, 4.5]]
