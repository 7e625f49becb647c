"""Crosscoders: one step by hand, source by source, and to whom a latent belongs. The contract is tested elsewhere."""

import pytest
import torch
from coder_examples import D_IN, D_SAE, fitted, make, rows, rows_for, train_briefly
from torch.nn.functional import normalize

from vitrail.coders import CODERS, Crosscoder, MultiSource, TopKCrosscoder, load_coder, save_coder
from vitrail.coders.normalize import make_normalization
from vitrail.statistics import ActivationStats
from vitrail.training import TensorSource, TrainConfig, read_log, train

CROSSCODERS = sorted(name for name, coder in CODERS.items() if issubclass(coder, MultiSource))
every_crosscoder = pytest.mark.parametrize("name", CROSSCODERS)
WIDTHS = [8, 12]
A, B = slice(0, 8), slice(8, 20)


def test_one_step_by_hand():
    # Sources of widths 1 and 2, two latents. W_dec: latent 0 writes (1 | 0, 0), latent 1 writes (1 | 0, 2).
    # Row (3 | 1, 1), encoders (1 | 0, 0) and (0 | 0, 1): z = (3, 1). y_hat = 3 (1|0,0) + (1|0,2) = (4 | 0, 2).
    # Source 0: 1; source 1: 1 + 1 = 2. Norms: latent 0 has 1 + 0, latent 1 has 1 + 2. L1 = 3 * 1 + 1 * 3 = 6.
    coder = Crosscoder(d_in=3, d_sae=2, widths=[1, 2], l1=0.5, normalization="none")
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[1.0, 0], [0, 0], [0, 1]]))
        coder.W_dec.copy_(torch.tensor([[1.0, 0, 0], [1, 0, 2]]))
    step = coder.loss(torch.tensor([[3.0, 1.0, 1.0]]))
    assert step.terms["reconstruction"].item() == pytest.approx(3)
    assert step.terms["l1"].item() == pytest.approx(0.5 * 6)
    assert step.penalty == ("l1",)
    assert coder.source_norms().tolist() == [[1, 1], [0, 2]]
    torch.testing.assert_close(coder.relative_norm(), torch.tensor([0.0, 2 / 3]))
    assert coder.exclusive_to(0).tolist() == [True, False]
    assert coder.exclusive_to(1, at_least=0.6).tolist() == [False, True]
    assert not coder.shared().any()
    assert coder.shared(tolerance=0.4).tolist() == [False, True]  # 2/3 and 1/3 are 1/2 (1 +- 1/3)


def test_selection_by_hand_counts_what_a_latent_writes_in_all():
    # Joint unit norm: (.6 | .8, 0) writes on both sources. k = 1 keeps the larger of pre = (1, 1.4).
    coder = TopKCrosscoder(d_in=3, d_sae=2, widths=[1, 2], k=1, normalization="none")
    with torch.no_grad():
        coder.W_dec.copy_(torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0]]))
        coder.W_enc.copy_(coder.W_dec.t())
    x = torch.tensor([[1.0, 1.0, 0.0]])
    assert coder.encode(x).tolist() == [[0, pytest.approx(1.4)]]
    # y_hat = 1.4 (.6 | .8, 0) = (.84 | 1.12, 0): .16^2 + .12^2 = .04.
    assert coder.loss(x).loss.item() == pytest.approx(0.04)


@every_crosscoder
def test_encoders_of_all_sources_are_summed_and_each_source_has_its_decoder(name):
    coder = fitted(name)
    x = rows_for(coder)
    y_a, y_b = (coder.normalize(x).y[:, columns] for columns in (A, B))
    pre = (y_a - coder.b_dec[A]) @ coder.encoder_of(0) + (y_b - coder.b_dec[B]) @ coder.encoder_of(1) + coder.b_enc
    torch.testing.assert_close(coder.pre_activations(coder.normalize(x).y), pre)
    z, codes = coder.encode(x), coder.encode_sparse(x)
    for source, columns in enumerate((A, B)):
        assert coder.decoder_of(source).shape == (D_SAE, WIDTHS[source])
        torch.testing.assert_close(coder.decode_source(z, source), coder(x)[:, columns])
        torch.testing.assert_close(coder.decode_source(codes, source), coder(x)[:, columns])
    assert torch.equal(coder.join([x[:, A], x[:, B]]), x)


@every_crosscoder
@pytest.mark.parametrize("normalization", ["mean_std", "mean_norm", "msae_code"])
def test_each_source_has_its_own_mean_and_scale(name, normalization):
    x = rows() * torch.tensor([1.0] * 8 + [100.0] * 12)
    coder = fitted(name, x, normalization=normalization)
    for source, columns in enumerate((A, B)):
        alone = make_normalization(normalization, d_in=WIDTHS[source])
        alone.fit(ActivationStats.of(x[:, columns]))
        torch.testing.assert_close(coder.normalize(x).y[:, columns], alone(x[:, columns]).y)
    torch.testing.assert_close(coder.normalize.invert(coder.normalize(x).y, None, None), x, rtol=1e-4, atol=1e-3)


def test_the_penaltys_norms_are_free_and_pull_a_decoder_that_is_of_no_use_to_nothing():
    coder = fitted("crosscoder")
    with torch.no_grad():
        coder.W_dec.mul_(1.7)
    coder.loss(rows()).loss.backward()
    gradient, weights = coder.W_dec.grad.clone(), coder.W_dec.detach().clone()
    coder.constrain_gradients()
    coder.constrain_weights()
    assert torch.equal(coder.W_dec.grad, gradient)
    assert torch.equal(coder.W_dec.detach(), weights)
    # A decoder of norm zero has no direction to be pulled in: its gradient is the reconstruction's, and finite.
    with torch.no_grad():
        coder.W_dec[:, B] = 0
    coder.zero_grad()
    coder.loss(rows()).loss.backward()
    assert coder.W_dec.grad.isfinite().all()


@every_crosscoder
def test_one_source_is_a_plain_coder(name):
    coder, plain = fitted(name, widths=None), fitted(name.removesuffix("crosscoder").rstrip("_") or "relu")
    x = rows()
    assert coder.n_sources == 1
    torch.testing.assert_close(coder(x), plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(coder.loss(x).loss, plain.loss(x).loss)  # all norms are 1 at the start
    assert torch.equal(coder.shares(), torch.ones(1, D_SAE))


@every_crosscoder
def test_three_sources_survive_saving(name, tmp_path):
    coder = fitted(name, widths=[5, 9, 6])
    save_coder(tmp_path, coder)
    reloaded = load_coder(tmp_path)
    x = rows()
    assert reloaded.config["widths"] == [5, 9, 6]
    assert torch.equal(reloaded(x), coder(x))
    torch.testing.assert_close(coder.shares().sum(0), torch.ones(D_SAE))
    for source in range(3):
        assert torch.equal(
            reloaded.decode_source(reloaded.encode(x), source), coder.decode_source(coder.encode(x), source)
        )
    with pytest.raises(ValueError, match="has 3. Use shares"):
        coder.relative_norm()


# ---------------------------------------------------------------------------------------------------- model diffing

N_SHARED, N_OWN, WIDE = 12, 6, (20, 26)


@pytest.fixture(scope="module")
def two_models():
    """Rows of two models, B a hundred times the size of A. 12 concepts are in both, 6 in A alone, 6 in B alone."""
    generator = torch.Generator().manual_seed(11)
    n = N_SHARED + 2 * N_OWN
    z = (torch.rand(8192, n, generator=generator) < 0.08) * (0.5 + torch.rand(8192, n, generator=generator))
    directions = [normalize(torch.randn(n, width, generator=generator), dim=1) for width in WIDE]
    directions[0][N_SHARED + N_OWN :] = 0
    directions[1][N_SHARED : N_SHARED + N_OWN] = 0
    x = torch.cat([z @ directions[0], 100 * z @ directions[1] + 500], 1)
    return x, torch.cat(directions, 1)


@every_crosscoder
def test_latents_of_both_models_and_of_one_are_told_apart(name, two_models):
    x, planted = two_models
    sparsity = {"l1": 0.3} if name == "crosscoder" else {"k": 2}
    coder = fitted(name, x, d_in=sum(WIDE), d_sae=48, widths=list(WIDE), **sparsity)
    assert coder.shared(tolerance=0.5).all()  # at the start every latent writes everywhere
    train_briefly(coder, x, n_steps=800)
    # Each planted concept's latent is the decoder row nearest to it, both scaled as the coder sees them.
    scales = torch.cat([torch.full((w,), coder.normalize.of(m).scale.item()) for m, w in enumerate(WIDE)])
    size = torch.cat([torch.ones(WIDE[0]), torch.full((WIDE[1],), 100.0)])
    cosine = normalize(planted * size / scales, dim=1) @ normalize(coder.W_dec.detach(), dim=1).t()
    best, latent = cosine.max(1)
    assert best.mean() > 0.93
    r = coder.relative_norm()[latent]
    both, only_a, only_b = r[:N_SHARED], r[N_SHARED : N_SHARED + N_OWN], r[N_SHARED + N_OWN :]
    assert (coder.shared()[latent[:N_SHARED]]).all(), both
    assert (coder.exclusive_to(0)[latent[N_SHARED : N_SHARED + N_OWN]]).all(), only_a
    assert (coder.exclusive_to(1)[latent[N_SHARED + N_OWN :]]).all(), only_b


def test_trained_by_the_loop_as_any_coder(two_models, tmp_path):
    x, _ = two_models
    coder = make("crosscoder", d_in=sum(WIDE), d_sae=48, widths=list(WIDE), l1=1.0)
    result = train(
        coder, TensorSource(x, batch_size=256), tmp_path, config=TrainConfig(n_rows=60_000, lr=5e-3, warmup_steps=10)
    )
    log = read_log(tmp_path / "log.jsonl")
    assert log[-1]["fvu"] < 0.5 * log[0]["fvu"]
    assert torch.equal(load_coder(tmp_path).relative_norm(), result.coder.relative_norm())


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: make("crosscoder", widths=[8, 11]), "sum to d_in=20, got \\[8, 11\\]"),
        (lambda: make("crosscoder", widths=[20, 0]), "sum to d_in=20, got \\[20, 0\\]"),
        (lambda: make("crosscoder", widths=[]), "sum to d_in=20, got \\[\\]"),
        (lambda: make("topk_crosscoder", normalization="layer_norm"), "a mean and scale per source"),
        (lambda: make("crosscoder").decoder_of(2), "source must be in 0..1, got 2"),
        (lambda: make("crosscoder").exclusive_to(-1), "source must be in 0..1, got -1"),
        (lambda: make("crosscoder").join([torch.zeros(2, 12), torch.zeros(2, 8)]), "in this order; got \\[12, 8\\]"),
        (lambda: make("crosscoder").encode(torch.zeros(2, D_IN)), None),
    ],
)
def test_impossible_settings_are_named_where_they_enter(ask, sentence):
    if sentence is None:
        with pytest.raises(RuntimeError, match="has not seen its data"):
            ask()
        return
    with pytest.raises(ValueError, match=sentence):
        ask()
