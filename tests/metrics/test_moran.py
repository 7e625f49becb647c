import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from released import released
from scipy import stats
from seen_examples import coder_of, grid_of, same_in_two_batches, seen_codes, setting_of, values

from vitrail.coders.sparse import Codes
from vitrail.metrics import patch_maps
from vitrail.metrics.latent_means import representatives, verdict
from vitrail.metrics.lattice import Lattice, SparseMorans, morans_i
from vitrail.metrics.moran import (
    MoranSensitivity,
    RawCoherence,
    SpatialCoherence,
    permutation_test,
    rank_correlation,
)
from vitrail.metrics.passing import Seen

H, W, D = 4, 6, 9
SHAPES = [(14, 14), (4, 6), (1, 7), (5, 2), (3, 4, 5)]


def of(map_, neighbours="queen") -> float:
    map_ = torch.as_tensor(map_).double()
    return float(morans_i(map_.flatten(), Lattice(tuple(map_.shape), neighbours)))


def weights_of(shape, neighbours):
    """The definition: patches whose places differ by at most one along every axis, or along one axis only."""
    places = np.array(list(itertools.product(*map(range, shape))))
    apart = np.abs(places[:, None] - places[None])
    return (apart.max(-1) == 1) if neighbours == "queen" else (apart.sum(-1) == 1)


def by_definition(maps, weights):
    centred = maps - maps.mean(1, keepdims=True)
    numerator = np.einsum("mp,pq,mq->m", centred, weights, centred)
    with np.errstate(divide="ignore", invalid="ignore"):
        return maps.shape[1] / weights.sum() * numerator / (centred**2).sum(1)


def sparse_maps(m, n, seed=0, share=0.4):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((m, n)) < share, np.round(rng.exponential(size=(m, n)), 1) + 0.1, 0)  # with ties


def some_codes(n_images=40, n_tokens=H * W, seed=0, share=0.35):
    """Dense codes (rows, D): latent 0 fires everywhere with one value, 1 never, 2 on the left, the others anywhere."""
    z = sparse_maps(n_images * n_tokens, D, seed, share).reshape(n_images, n_tokens, D)
    z[..., 0], z[..., 1] = 2.0, 0.0
    z[..., 2] = np.where(np.arange(n_tokens) % W < 2, z[..., 2] + 1, 0)
    return torch.from_numpy(z.reshape(-1, D)).float()


def setting(d_sae=D, h=H, w=W, n_cls=0, **changes):
    n = h * w + n_cls
    given = {"n_tokens": n, "grid": grid_of(h, w, n_cls), "patches": slice(n_cls, n)}
    return setting_of(coder_of(d_sae), **{**given, **changes})


def shown(metric, z, n_tokens=H * W):
    metric.update(seen_codes(z, n_tokens))
    return metric


# -- Moran's I itself


def test_two_by_two_by_hand():
    # x = 1 0 / 0 0, queen: every patch touches every other, W = 12, m = 1/4, so that sum_ij w_ij = (sum)^2 - sum of
    # squares = 0 - 3/4, and I = 4/12 * (-3/4) / (3/4) = -1/3 = -1/(P-1). Rook: W = 8; 1 meets two patches and the last
    # of them two zeros: 2 (2 * -3/16 + 2 * 1/16) = -1/2, and I = 4/8 * (-1/2) / (3/4) = -1/3 again.
    one = [[1, 0], [0, 0]]
    assert of(one) == pytest.approx(-1 / 3)
    assert of(one, "rook") == pytest.approx(-1 / 3)
    # x = 1 1 / 0 0, rook: two pairs agree and two do not: 0.
    assert of([[1, 1], [0, 0]], "rook") == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("n", [2, 4, 8, 14, 16])
def test_a_checkerboard_is_not_minus_one(n):
    board = np.indices((n, n)).sum(0) % 2
    assert of(board) == pytest.approx(-1 / (2 * n - 1), abs=1e-14)
    assert of(board, "rook") == pytest.approx(-1)


def test_row_gradients_and_sums_of_weights():
    for n, gradient, weight in ((14, 311 / 351, 1404), (16, 419 / 465, 1860)):
        lattice = Lattice((n, n))
        assert lattice.weight == weight == lattice.degrees.sum()
        rows = np.arange(float(n)).repeat(n).reshape(n, n)
        assert of(rows) == pytest.approx(gradient, abs=1e-14)
        assert of(rows.T) == pytest.approx(gradient, abs=1e-14)


@pytest.mark.parametrize("neighbours", ["queen", "rook"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse_and_dense_are_the_definition(shape, neighbours):
    lattice, weights = Lattice(shape, neighbours), weights_of(shape, neighbours)
    assert lattice.weight == weights.sum()
    np.testing.assert_array_equal(lattice.degrees, weights.sum(1))
    maps = sparse_maps(60, lattice.n)
    maps[7] += 1  # a dense one
    maps = maps[(maps > 0).any(1)]
    expected = by_definition(maps, weights)
    np.testing.assert_allclose(morans_i(torch.from_numpy(maps), lattice).numpy(), expected, rtol=0, atol=1e-12)
    which, patch = np.nonzero(maps)
    order = np.random.default_rng(1).permutation(len(which))  # entries may come in any order
    which, patch = which[order], patch[order]
    sparse = SparseMorans(lattice)
    for _ in range(2):  # the second call finds the table as the first did
        pairs = sparse(which // 6, which % 6, patch, maps[which, patch], n_maps=10, d_sae=6)
        np.testing.assert_array_equal(pairs.map * 6 + pairs.latent, np.arange(len(maps)))
        np.testing.assert_allclose(pairs.moran, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(pairs.variance, maps.var(1), rtol=1e-10)
        np.testing.assert_array_equal(pairs.active, (maps > 0).sum(1))


def test_shift_scale_turn_and_flip_change_nothing():
    map_ = torch.from_numpy(sparse_maps(1, 36)[0]).reshape(6, 6)
    found = of(map_)
    for other in (3.7 * map_ + 1e3, -map_, map_.rot90(1, (0, 1)), map_.flip(0), map_.flip(1), map_.T):
        assert of(other) == pytest.approx(found, abs=1e-12)


def test_mean_over_all_permutations():
    map_ = np.array([0, 0, 2.5, 1, 0, 1])
    orders = np.array(list(itertools.permutations(map_)))
    for neighbours in ("queen", "rook"):
        lattice = Lattice((2, 3), neighbours)
        found = morans_i(torch.from_numpy(orders), lattice)
        assert float(found.mean()) == pytest.approx(-1 / 5, abs=1e-14) == lattice.null_mean


def test_constant_and_nearly_constant_maps():
    assert np.isnan(of(np.full((3, 4), 0.1)))
    # Far from zero, and with hardly any variance: sums of squares would have lost it.
    x = 1e3 + 1e-4 * np.arange(12.0)
    lattice = Lattice((3, 4))
    pairs = SparseMorans(lattice)(np.zeros(12, dtype=int), np.zeros(12, dtype=int), np.arange(12), x, n_maps=1, d_sae=1)
    assert pairs.moran[0] == pytest.approx(by_definition((x - 1e3)[None], weights_of((3, 4), "queen"))[0], abs=1e-6)
    assert pairs.variance[0] == pytest.approx(np.var(1e-4 * np.arange(12)), rel=1e-5)


def test_esdas_moran(tmp_path):
    if not all(importlib.util.find_spec(name) for name in ("esda", "libpysal")):
        pytest.skip("esda and libpysal are not installed: pip install --no-deps esda libpysal")
    maps = sparse_maps(12, H * W)
    np.savez(tmp_path / "in.npz", maps=maps, shape=[H, W])
    script = Path(__file__).with_name("esda_witness.py")
    subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "in.npz", "out.npy"], check=True, cwd=tmp_path, timeout=120
    )
    for neighbours, theirs in zip(("queen", "rook"), np.load(tmp_path / "out.npy"), strict=True):
        lattice = Lattice((H, W), neighbours)
        np.testing.assert_allclose(morans_i(torch.from_numpy(maps), lattice).numpy(), theirs[:, 0], rtol=0, atol=1e-13)
        np.testing.assert_allclose(theirs[:, 1:], [[lattice.null_mean, lattice.weight]] * 12)


# -- M1


def expected_scores(z, n_tokens=H * W, *, min_active=5, min_images=1, neighbours="queen", shape=(H, W)):
    """A slow loop over the definition."""
    maps = z.double().numpy().reshape(-1, n_tokens, z.shape[1]).transpose(2, 0, 1)
    weights, scores, n = weights_of(shape, neighbours), [], []
    for of_latent in maps:
        valid = ((of_latent != 0).sum(1) >= min_active) & (of_latent.var(1) > 1e-8)
        found = by_definition(of_latent[valid], weights)
        scores.append(found.mean() if len(found) else np.nan)
        n.append(len(found))
    scores, n = np.array(scores), np.array(n)
    return np.where(n >= min_images, scores, np.nan), n


@pytest.mark.parametrize("min_active", [1, 5, 9])
@pytest.mark.parametrize("neighbours", ["queen", "rook"])
def test_scores_are_those_of_a_slow_loop(neighbours, min_active):
    z = some_codes()
    least = 10 if min_active == 9 else 1
    metric = shown(SpatialCoherence(setting(), neighbours=neighbours, min_active=min_active, min_images=least), z)
    scores, n = expected_scores(z, min_active=min_active, min_images=least, neighbours=neighbours)
    table, got = metric.table(), metric.compute()
    np.testing.assert_array_equal(table["n_images"], n)
    np.testing.assert_allclose(np.where(table["evaluable"], table["moran"], np.nan), scores, rtol=0, atol=1e-6)
    kept = scores[np.isfinite(scores)]
    assert 0 < len(kept) < D  # latents 0, constant, and 1, dead, are not evaluable
    assert got["moran"].value == pytest.approx(kept.mean(), abs=1e-6)
    assert got["moran_median"].value == pytest.approx(np.median(kept), abs=1e-6)
    assert got["moran_iqr"].value == pytest.approx(stats.iqr(kept), abs=1e-6)
    assert got["moran_latents"].value == len(kept)
    assert got["moran_evaluable"].value == pytest.approx(len(kept) / D)
    assert got["moran_null"].value == -1 / (H * W - 1)
    z_score = (kept.mean() + 1 / (H * W - 1)) / (kept.std(ddof=1) / np.sqrt(len(kept)))
    assert got["moran_z"].value == pytest.approx(z_score, rel=1e-4)
    mass = z.sum(0).double().numpy()
    if min_active == 1:
        of = np.isfinite(scores)
        assert got["moran_weighted"].value == pytest.approx((scores[of] * mass[of]).sum() / mass[of].sum(), abs=1e-6)
        np.testing.assert_allclose(table["mass"][of], mass[of], rtol=1e-5)


def test_special_tokens_are_no_patches():
    z = some_codes(6).reshape(6, H * W, D)
    with_cls = torch.cat([torch.full((6, 2, D), 7.0), z], 1).flatten(0, 1)
    plain = shown(SpatialCoherence(setting(), min_images=1), z.flatten(0, 1))
    special = shown(SpatialCoherence(setting(n_cls=2), min_images=1), with_cls, H * W + 2)
    np.testing.assert_array_equal(plain.table()["moran"], special.table()["moran"])


def test_codes_of_half_precision_are_read():
    z = some_codes(6).bfloat16()
    half, full = (shown(SpatialCoherence(setting(), min_images=1), codes).table() for codes in (z, z.float()))
    np.testing.assert_array_equal(half["moran"], full["moran"])


def test_streaming_in_two_batches_equals_one(monkeypatch):
    monkeypatch.setattr(patch_maps, "CELLS_AT_ONCE", 3 * D * H * W)
    z, t = some_codes(), H * W
    parts = [seen_codes(z[: 7 * t], t), seen_codes(z[7 * t :], t)]
    for arguments in ({}, {"n_permutations": 9, "n_sampled": 20}, {"resample": (3, 3)}, {"images_at_most": 30}):
        same_in_two_batches(
            lambda arguments=arguments: SpatialCoherence(setting(), min_images=3, **arguments), seen_codes(z, t), parts
        )


def test_frames_on_their_own_and_through_time():
    z = some_codes(10)
    frames = shown(SpatialCoherence(setting(), min_images=1), z).table()
    clips = setting(n_tokens=5 * H * W, patches=slice(0, 5 * H * W))
    alone = shown(SpatialCoherence(clips, min_images=1, frames=5), z, 5 * H * W)
    np.testing.assert_allclose(alone.table()["moran"], frames["moran"], rtol=0, atol=1e-14)
    assert "per frame" in alone.compute()["moran"].definition
    together = shown(SpatialCoherence(clips, min_images=1, frames=5, through_time=True), z, 5 * H * W)
    scores, n = expected_scores(z, 5 * H * W, shape=(5, H, W))
    np.testing.assert_array_equal(together.table()["n_images"], n)
    np.testing.assert_allclose(together.table()["moran"], scores, rtol=0, atol=1e-6)
    assert together.compute()["moran_null"].value == -1 / (5 * H * W - 1)
    with pytest.raises(ValueError, match="4 frames of 4 x 6 patches are not 120"):
        SpatialCoherence(clips, frames=4)


def test_resampling():
    z = some_codes(6)
    metric = shown(SpatialCoherence(setting(), min_images=1, resample=(3, 4)), z)
    assert "resampled to 3x4" in metric.compute()["moran"].definition
    assert metric.compute()["moran_null"].value == -1 / 11
    maps = z.reshape(6, H, W, D).permute(3, 0, 1, 2).double()
    smaller = torch.nn.functional.interpolate(maps, (3, 4), mode="bilinear", antialias=True).flatten(2)
    expected = by_definition(smaller[2].numpy(), weights_of((3, 4), "queen")).mean()
    assert metric.table()["moran"][2] == pytest.approx(expected, abs=1e-12)
    same = shown(SpatialCoherence(setting(), min_images=1, resample=(H, W)), z).table()
    plain = shown(SpatialCoherence(setting(), min_images=1), z).table()
    np.testing.assert_allclose(same["moran"], plain["moran"], rtol=0, atol=1e-12)


def test_planted_blobs_lie_above_the_null_and_noise_does_not():
    rng = np.random.default_rng(0)
    z = np.zeros((80, 8, 8, 24))
    for image, latent in itertools.product(range(80), range(12)):
        row, column = rng.integers(0, 6, 2)
        z[image, row : row + 3, column : column + 3, latent] = rng.random((3, 3)) + 0.5
        z[image].reshape(64, -1)[rng.choice(64, 9, replace=False), latent + 12] = rng.random(9) + 0.5
    flat, found = torch.from_numpy(z).reshape(-1, 24).float(), {}
    for name, part in (("blobs", flat[:, :12]), ("noise", flat[:, 12:])):
        metric = shown(SpatialCoherence(setting(12, 8, 8), n_permutations=99), part.contiguous(), 64)
        found[name] = metric.compute()
    blobs, noise = found["blobs"], found["noise"]
    assert blobs["moran"].low > 0.4
    assert verdict(blobs) == "above the null"
    assert blobs["moran_p"].value == 0.01
    assert blobs["moran_pairs_above"].value > 0.95
    assert noise["moran"].low < -1 / 63 < noise["moran"].high
    assert verdict(noise) == "null-sized effect"
    assert noise["moran_p"].value > 0.05
    assert noise["moran_pairs_above"].value < 0.12
    assert abs(noise["moran_z"].value) < 3


def test_permutation_p_is_exact_where_it_can_be():
    # All 720 orders of one map, against the test's 2,000 random ones.
    map_, lattice = np.array([0, 0, 1.0, 1.5, 0, 2.0]), Lattice((2, 3))
    all_orders = morans_i(torch.from_numpy(np.array(list(itertools.permutations(map_)))), lattice).numpy()
    found = float(morans_i(torch.from_numpy(map_), lattice))
    exact = (np.abs(all_orders + 0.2) >= abs(found + 0.2) - 1e-12).mean()
    p, _ = permutation_test(map_[None], lattice, 2000)
    assert p == pytest.approx(exact, abs=0.03)
    assert 0.05 < exact < 0.95


def test_the_interval_covers():
    # Latents' scores are means over images: the error over images, not over latents, is what another draw shows.
    estimates, inside = [], 0
    for seed in range(30):
        measured = shown(SpatialCoherence(setting(), min_images=1), some_codes(60, seed=seed)).compute()["moran"]
        estimates.append(measured)
    truth = np.mean([one.value for one in estimates])
    inside = np.mean([one.low <= truth <= one.high for one in estimates])
    assert inside >= 0.8
    widths = [one.high - one.low for one in estimates]
    assert np.mean(widths) < 8 * np.std([one.value for one in estimates])
    assert shown(SpatialCoherence(setting(), min_images=1), some_codes(19)).compute()["moran"].low is None


def test_curves_and_representatives():
    metric = shown(SpatialCoherence(setting(), min_images=1), some_codes())
    curves, scores = metric.curves(), metric.table()["moran"]
    assert sum(row["latents"] for row in curves["moran_histogram"]) == D - 2
    top = curves["moran_top"]
    assert top[0]["latent"] == 2  # the one on the left
    assert [row["moran"] for row in top[: D - 2]] == sorted(scores[2:].tolist(), reverse=True)
    assert [row["kind"] for row in top[-2:]] == ["mean", "high"]
    # 40 latents: the top 5 % are two, and the second of them is picked; the mean, 19.5, is as near to 19 as to 20.
    assert representatives(np.arange(40.0), np.arange(40)) == {"mean": 19, "high": 38}
    assert representatives(np.arange(3.0), np.arange(0)) == {}


def test_sensitivity():
    z = some_codes()
    metric = shown(MoranSensitivity(setting(), min_images=1, resample=(3, 4)), z)
    rows = metric.curves()["moran_sensitivity"]
    assert metric.compute() == {}
    assert [row["definition"].split(", images")[0] for row in rows] == [
        *(f"{name}, active>={least}" for name in ("queen", "rook") for least in (1, 5, 20)),
        "queen, active>=5",
    ]
    assert rows[1]["moran"] == values(shown(SpatialCoherence(setting(), min_images=1), z).compute())["moran"]
    assert rows[1]["spearman"] == pytest.approx(1)
    a, b = np.array([1, 2, 2, 5, 3.0]), np.array([3, 1, 1, 2, 9.0])
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(rank_correlation(a[:1], b[:1]))


def test_raw_dimensions():
    x = torch.randn(30, 1 + H * W, 5, generator=torch.Generator().manual_seed(0))
    x[..., 3] = 4.0  # no variance
    x[:, 1:, 2] = torch.arange(H * W) // W + 100.0
    metric = RawCoherence(setting(n_cls=1), min_images=20)
    seen = Seen(x=x, target=x, codes=Codes.from_dense(torch.zeros(30 * (1 + H * W), D)), x_hat=x)
    metric.update(seen)
    maps = x[:, 1:].double().permute(2, 0, 1).numpy()
    expected = np.array([by_definition(maps[i], weights_of((H, W), "queen")).mean() for i in (0, 1, 2, 4)])
    got = metric.compute()
    assert got["raw_moran"].value == pytest.approx(expected.mean(), abs=1e-12)
    assert got["raw_moran_latents"].value == 4
    assert metric.curves()["raw_moran_top"][0]["dimension"] == 2


def test_what_cannot_be_asked_or_said():
    cls_only = SpatialCoherence(setting_of(coder_of(D)))
    cls_only.update(seen_codes(some_codes(1), 1))
    assert cls_only.compute() == {}
    assert cls_only.curves() == {}
    assert MoranSensitivity(setting_of(coder_of(D))).curves() == {}
    assert RawCoherence(setting_of(coder_of(D))).compute() == {}
    few = shown(SpatialCoherence(setting()), some_codes(8)).compute()  # none has 50 images
    assert few["moran_latents"].value == 0
    assert np.isnan(few["moran"].value)
    assert np.isnan(few["moran_z"].value)
    silent = shown(SpatialCoherence(setting(), min_images=1), torch.zeros(3 * H * W, D)).compute()
    assert np.isnan(silent["moran"].value)
    with pytest.raises(ValueError, match="no images were measured"):
        SpatialCoherence(setting()).compute()
    with pytest.raises(ValueError, match="'queen' or 'rook', got 'bishop'"):
        SpatialCoherence(setting(), neighbours="bishop")
    with pytest.raises(ValueError, match="at least two patches"):
        Lattice((1, 1))
    with pytest.raises(ValueError, match="min_active and min_images"):
        SpatialCoherence(setting(), min_active=0)
    with pytest.raises(ValueError, match="compat must be"):
        SpatialCoherence(setting(), compat="visaebench")
    with pytest.raises(ValueError, match="has 6 patches; these maps have 5"):
        morans_i(torch.zeros(2, 5), Lattice((2, 3)))


# -- the released package


class AsGiven:
    """What visaebench calls an SAE; its rows are codes already."""

    def encode(self, x):
        return x


def test_visaebenchs_numbers(monkeypatch):
    FeatureLocalization = released(monkeypatch, "metrics.spatial_coherence.localization").FeatureLocalization
    d_sae, n = 600, 300
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(n, H * W, d_sae, generator=generator)
    rate = torch.linspace(0.2, 1, d_sae)  # from rare to background
    z = z * (torch.rand(z.shape, generator=generator) < rate)
    theirs = FeatureLocalization(grid_size=(H, W)).compute(AsGiven(), z, device="cpu")
    metric = SpatialCoherence(setting(d_sae), compat="visaebench-0.1")
    for part in z.split(90):
        metric.update(seen_codes(part.flatten(0, 1), H * W))
    got = metric.compute()
    each = theirs.metadata["per_feature_scores"]
    evaluable = metric.table()["evaluable"]
    assert [one is not None for one in each] == evaluable.tolist()
    assert 500 < evaluable.sum() < d_sae  # so that some are drawn, and some not
    assert 200 < metric.table()["n_images"].max() < 264
    expected = torch.tensor([one for one in each if one is not None])
    torch.testing.assert_close(torch.from_numpy(metric.table()["moran"][evaluable]).float(), expected)
    assert got["moran_visaebench"].value == pytest.approx(theirs.value, abs=1e-6)
    assert got["moran_visaebench_median"].value == pytest.approx(theirs.metadata["median_morans_i"], abs=1e-6)
    assert got["moran_visaebench_non_localized"].value == pytest.approx(theirs.metadata["frac_non_localized"])
    assert got["moran_visaebench_latents"].value == theirs.metadata["num_features_scored"] == 500
