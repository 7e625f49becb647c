"""Controls: fair, and equal to what they claim to be."""

import pytest
import torch
from coder_examples import D_IN, D_SAE, K, fitted, make, planted, rows, train_briefly
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.decomposition import PCA as SklearnPCA

from vitrail.coders import BASELINES, PCA, KMeans, Neurons, RandomDirections, controls, untrained_like
from vitrail.coders.baselines import kmeans_plus_plus, lloyd
from vitrail.statistics import ActivationStats


def error(coder, x):
    return (coder(x) - x).square().sum(1).mean().item()


@pytest.mark.parametrize("normalization", ["none", "mean_std"])
def test_pca_is_the_rank_k_projection_of_scikit_learn(normalization):
    x = rows(300).double()
    coder = PCA(d_in=D_IN, k=6, normalization=normalization).double()
    coder.fit(ActivationStats.of(x), x)
    witness = SklearnPCA(n_components=6).fit(x.numpy())
    expected = torch.from_numpy(witness.inverse_transform(witness.transform(x.numpy())))
    torch.testing.assert_close(coder(x), expected, rtol=1e-6, atol=1e-6)
    assert (coder.encode_sparse(x).l0() == 6).all()


def test_more_components_make_pca_a_stronger_control_at_the_same_l0():
    x = rows(300)
    fixed, free = (make("pca", k=4, n_components=m) for m in (4, D_IN))
    for coder in (fixed, free):
        coder.fit(ActivationStats.of(x), x)
        assert (coder.encode_sparse(x).l0() == 4).all()
    assert error(free, x) < error(fixed, x)


def test_neurons_keep_the_largest_coordinates_by_hand():
    coder = Neurons(d_in=4, k=2, normalization="none")
    assert torch.equal(coder(torch.tensor([[1.0, -5.0, 3.0, -2.0]])), torch.tensor([[0.0, -5.0, 3.0, 0.0]]))


def test_the_scale_of_random_directions_is_the_best_one_scale():
    x = rows(400)
    best = fitted("random", x)
    plain = fitted("random", x, fit_scale=False)
    assert error(best, x) < error(plain, x)
    for factor in (0.97, 1.03):
        other = fitted("random", x)
        with torch.no_grad():
            other.W_enc.mul_(factor)
        assert error(other, x) > error(best, x)
    assert torch.equal(best.encode(x) > 0, plain.encode(x) > 0)  # the same latents, of another size
    best.fit(ActivationStats.of(x), x)  # again: from the start, not from the scale it had
    assert error(best, x) == pytest.approx(error(fitted("random", x), x))


def test_an_untrained_control_starts_where_the_trained_coder_did():
    x, _ = planted(2000)
    coder = fitted("batch_topk", x, k=3, seed=4)
    start = {key: value.clone() for key, value in coder.state_dict().items()}
    train_briefly(coder, x, n_steps=50)
    untrained = untrained_like(coder, x)
    for key in ("W_enc", "W_dec", "b_enc", "normalize.mean", "normalize.scale"):
        assert torch.equal(untrained.state_dict()[key], start[key]), key
    assert untrained.encode_sparse(x).l0().float().mean().item() == pytest.approx(3, rel=0.005)
    assert error(coder, x) < error(untrained, x)


def test_controls_come_fitted_at_the_l0_asked_for_and_a_trained_coder_beats_them():
    x, _ = planted(4000)
    coder = train_briefly(fitted("topk", x, k=3, d_sae=40), x, n_steps=300)
    found = controls(coder, x, k=3)
    assert set(found) == {*BASELINES, "pca_all", "untrained"} - {"kmeans"}  # a control of truth recovery alone
    for name, control in found.items():
        assert not control.training
        assert control.encode_sparse(x).l0().float().mean().item() <= 3 + 1e-6, name
        assert error(control, x) > error(coder, x), name
    assert found["random"].d_sae == coder.d_sae


def test_kmeans_by_hand_a_latent_fires_where_its_centroid_is_nearer_than_the_mean():
    # Rows 0, 1, 9, 10: mean 5, centroids 0.5 and 9.5, so c = -4.5 and 4.5 from the mean and ||c||^2 / 2 = 10.125.
    # At 10: y = 5, z = 5 * 4.5 - 10.125 = 12.375; at 9: 4 * 4.5 - 10.125 = 7.875. Each fires one latent.
    x = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
    coder = KMeans(d_in=1, d_sae=2, k=2, normalization="none")
    coder.fit(ActivationStats.of(x), x)
    assert sorted((coder.W_dec + coder.b_dec).flatten().tolist()) == [0.5, 9.5]
    z = coder.encode(x)
    g = (coder.W_enc[0].abs() / 4.5)[0].item()
    near_ten = int(coder.W_dec[:, 0].argmax())
    torch.testing.assert_close(z[:, near_ten], g * torch.tensor([0.0, 0.0, 7.875, 12.375]))
    torch.testing.assert_close(z[:, 1 - near_ten], g * torch.tensor([12.375, 7.875, 0.0, 0.0]))
    assert coder.encode(torch.tensor([[5.0], [7.0]])).count_nonzero() == 0  # as near to the mean, or nearer


def test_kmeans_is_scikit_learns_from_the_same_start_and_as_good_from_its_own():
    x, _ = planted(1500)
    start = kmeans_plus_plus(x, 12, seed=3)
    assert len(start.unique(dim=0)) == 12
    witness = SklearnKMeans(12, init=start.numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(x.numpy())
    found = lloyd(x, start, n_iterations=300)
    torch.testing.assert_close(found, torch.from_numpy(witness.cluster_centers_), rtol=1e-4, atol=1e-5)

    def inertia(centroids):
        return torch.cdist(x, centroids).min(1).values.square().sum().item()

    alone = SklearnKMeans(12, n_init=1, random_state=0).fit(x.numpy()).inertia_
    assert inertia(found) < 1.05 * alone
    assert inertia(found) < inertia(start)


def test_kmeans_with_one_latent_a_row_assigns_rows_to_their_nearest_centroid():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.nn.functional.normalize(torch.randn(6, D_IN, generator=generator), dim=1)
    cluster = torch.arange(240) % 6
    x = centres[cluster] + 0.3 * torch.randn(240, D_IN, generator=generator)
    coder = KMeans(d_in=D_IN, d_sae=6, k=1)
    coder.fit(ActivationStats.of(x), x)
    codes = coder.encode_sparse(x)
    assert (codes.l0() == 1).all()
    nearest = torch.cdist(coder.normalize(x).y, coder.W_dec + coder.b_dec).argmin(1)
    assert torch.equal(codes.indices, nearest)
    assert len({(a, b) for a, b in zip(cluster.tolist(), nearest.tolist(), strict=True)}) == 6  # one to one


def test_a_centroid_that_lost_its_rows_finds_others():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [50.0]])
    found = lloyd(x, torch.tensor([[0.0], [1.0], [1000.0]]), n_iterations=50)
    assert sorted(found.flatten().tolist()) == [0.5, 10.5, 50.0]


def test_what_a_control_needs_is_named():
    with pytest.raises(ValueError, match="k=9, n_components=4"):
        PCA(d_in=20, k=9, n_components=4)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.d_in=3, got 4"):
        Neurons(d_in=3, k=4)
    with pytest.raises(ValueError, match="5 were asked for, the sample has 4 different rows among 8"):
        kmeans_plus_plus(torch.arange(4.0).repeat(2)[:, None], 5, seed=0)
    with pytest.raises(RuntimeError, match="has not seen its data"):
        PCA(d_in=D_IN, k=K, normalization="none").encode(rows())  # even where the normalisation needs nothing
    assert RandomDirections(d_in=D_IN, d_sae=D_SAE, k=K, normalization="none").encode(rows()).shape == (64, D_SAE)
