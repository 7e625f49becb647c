"""Matryoshka by prefix: every prefix reconstructs by itself, and early latents are the general ones."""

import pytest
import torch
from coder_examples import D_IN, D_SAE, fitted, rows, train_briefly

from vitrail.coders import BatchTopK, MatryoshkaPrefix, load_coder, save_coder
from vitrail.coders.base import squared_error
from vitrail.coders.matryoshka_prefix import default_prefixes
from vitrail.coders.sparse import decode
from vitrail.statistics import ActivationStats


def test_one_step_by_hand():
    # Rows (1, 2), (-3, 1): pre (1, 2, 2.2), (-3, 1, -1). k=2 per row: 4 entries, all positive ones: 2.2, 2, 1, 1.
    # Prefix 1 (latent 0): (1, 0) -> error 4; nothing -> error 10.
    # Prefix 3: (1, 0) + 2 (0, 1) + 2.2 (.6, .8) = (2.32, 3.76) -> 1.32^2 + 1.76^2 = 4.84; (0, 1) -> 9.
    # Prefix 2: (1, 2) -> 0; (0, 1) -> 9.
    coder = MatryoshkaPrefix(d_in=2, d_sae=3, k=2, prefixes=[1, 2, 3], normalization="none")
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    with torch.no_grad():
        coder.W_dec.copy_(W)
        coder.W_enc.copy_(W.t())
    step = coder.loss(torch.tensor([[1.0, 2.0], [-3.0, 1.0]]))
    assert {key: term.item() for key, term in step.terms.items()} == pytest.approx(
        {"prefix_1": (4 + 10) / 2 / 3, "prefix_2": 9 / 2 / 3, "prefix_3": (4.84 + 9) / 2 / 3}
    )
    torch.testing.assert_close(step.x_hat, torch.tensor([[2.32, 3.76], [0, 1]]))
    # The gradient at z_0 of row 0 is that of all three prefixes (suffix sums):
    # 2 ((0, -2) + (0, 0) + (1.32, 1.76)) . (1, 0) / (3 * 2) = 0.44; only row 0 has latent 0, so it is b_enc_0's too.
    step.loss.backward()
    assert coder.b_enc.grad[0].item() == pytest.approx(0.44)


def test_gradients_equal_those_of_dense_prefixes():
    coder, x = fitted("matryoshka_prefix").double(), rows(32).double()
    with torch.no_grad():
        coder.b_dec.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        coder.b_enc.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    coder.loss(x).loss.backward()
    found = {key: parameter.grad.clone() for key, parameter in coder.named_parameters()}
    coder.zero_grad()
    by_slices(coder, coder.normalize(x).y).backward()
    for key, parameter in coder.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-9, atol=1e-9, msg=key)


def by_slices(coder, y):
    """Dense, chunk by chunk. Compared in numbers with dictionary-learning 0.1.0 (MatryoshkaBatchTopKTrainer.loss with
    weights of one and its `mean_l2_loss`, no revival): equal to 1e-12."""
    pre = ((y - coder.b_dec) @ coder.W_enc + coder.b_enc).relu()
    z = pre * (pre >= pre.flatten().sort(descending=True).values[len(y) * coder.k - 1]).detach()
    y_hat, losses, start = coder.b_dec.expand_as(y), [], 0
    for end in coder.widths:
        y_hat = y_hat + z[:, start:end] @ coder.W_dec[start:end]
        losses.append((y - y_hat).pow(2).sum(1).mean())
        start = end
    return torch.stack(losses).mean()


def test_one_prefix_is_batch_topk():
    x = rows()
    whole, plain = fitted("matryoshka_prefix", prefixes=[D_SAE]), fitted("batch_topk")
    torch.testing.assert_close(whole.loss(x).loss, plain.loss(x).loss, rtol=0, atol=0)
    assert torch.equal(whole.encode(x), plain.encode(x))
    assert whole.threshold == plain.threshold


def test_a_prefix_in_use_is_a_coder_of_its_own():
    coder, x = fitted("matryoshka_prefix"), rows()
    step, y = coder.loss(x), coder.normalize(x).y
    for width in coder.widths:
        part = step.codes.keep(step.codes.indices < width)
        error = squared_error(y, decode(part, coder.W_dec) + coder.b_dec)
        torch.testing.assert_close(step.terms[f"prefix_{width}"], error / len(coder.widths))


def test_early_latents_are_the_general_ones():
    # Four families of four members: a family's common direction, and a member's own, half as large.
    generator = torch.Generator().manual_seed(0)
    parts = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=generator)).Q
    family, member = torch.randint(4, (8192,), generator=generator), torch.randint(4, (8192,), generator=generator)
    x = parts[family] + 0.5 * parts[4 + 4 * family + member]
    first_four = {}
    for coder in (
        MatryoshkaPrefix(d_in=D_IN, d_sae=24, k=2, prefixes=[4, 24], normalization="mean_std"),
        BatchTopK(d_in=D_IN, d_sae=24, k=2, normalization="mean_std"),
    ):
        coder.fit(ActivationStats.of(x), x)
        train_briefly(coder, x, n_steps=300)
        codes, y = coder.loss(x).codes, coder.normalize(x).y
        part = codes.keep(codes.indices < 4)
        error = squared_error(y, decode(part, coder.W_dec) + coder.b_dec)
        first_four[coder.name] = (error / squared_error(y, y.mean(0).expand_as(y))).item()
    # Shares of the variance that the first four latents leave. Knowing the family leaves 0.19.
    assert first_four["matryoshka_prefix"] < 0.5
    assert first_four["batch_topk"] > 0.8


def test_calibration_and_threshold_are_batch_topks_and_survive_saving(tmp_path):
    coder = fitted("matryoshka_prefix")
    assert coder.calibration["estimator"] == "quantile_where_mean_l0_is_k"
    assert coder.encode_sparse(rows()).l0().float().mean().item() == pytest.approx(coder.k, rel=0.02)
    save_coder(tmp_path, coder)
    assert load_coder(tmp_path).threshold == coder.threshold


def test_default_prefixes_are_the_papers():
    assert default_prefixes(65536) == (2048, 6144, 14336, 30720, 65536)
    assert default_prefixes(5) == (1, 2, 5)
    assert default_prefixes(1) == (1,)
    assert MatryoshkaPrefix(d_in=3, d_sae=64, k=2).config["prefixes"] is None


def test_the_whole_dictionary_is_the_last_level_named_or_not():
    for prefixes in ([2], [2, 5]):
        coder = MatryoshkaPrefix(d_in=3, d_sae=5, k=1, prefixes=prefixes)
        assert coder.widths == (2, 5)
        assert coder.config["prefixes"] == prefixes


@pytest.mark.parametrize("prefixes", [[2, 2, 5], [0, 5], [2, 6], [3, 2]])
def test_impossible_prefixes_are_named(prefixes):
    with pytest.raises(ValueError, match=rf"rise strictly within 1\.\.d_sae=5, got \({prefixes[0]}, {prefixes[1]}"):
        MatryoshkaPrefix(d_in=3, d_sae=5, k=1, prefixes=prefixes)
