"""One step of each architecture, worked by hand, and the facts that must hold exactly."""

import copy

import pytest
import torch
from coder_examples import D_IN, D_SAE, fitted, rows

from vitrail.coders import BatchTopK, Codes, Matryoshka, ReLU, TopK, load_coder, save_coder
from vitrail.coders.base import geometric_median
from vitrail.coders.matryoshka import default_levels
from vitrail.coders.select import Encoder, largest_of_batch

# Three latents over two dimensions: the coordinates, and their diagonal.
W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])


def by_hand(coder):
    with torch.no_grad():
        coder.W_dec.copy_(W)
        coder.W_enc.copy_(W.t())
    return coder


def test_relu_by_hand():
    # x = (2, -1): pre = (2, -1, 0.4), z = (2, 0, 0.4), x_hat = (2 + .24, .32), error .24^2 + 1.32^2 = 1.8; L1 2.4.
    coder = by_hand(ReLU(d_in=2, d_sae=3, l1=0.5, normalization="none"))
    step = coder.loss(torch.tensor([[2.0, -1.0]]))
    assert step.terms["reconstruction"].item() == pytest.approx(1.8)
    assert step.terms["l1"].item() == pytest.approx(1.2)
    assert step.loss.item() == pytest.approx(3.0)


def test_topk_by_hand_ranks_before_the_relu():
    coder = by_hand(TopK(d_in=2, d_sae=3, k=2, normalization="none"))
    # (1, 2): pre = (1, 2, 2.2), the two largest are latents 2 and 1.
    # (-3, 1): pre = (-3, 1, -1): the two largest are 1 and -1, of which one is positive.
    assert torch.equal(
        coder.encode(torch.tensor([[1.0, 2.0], [-3.0, 1.0]])) > 0, torch.tensor([[0, 1, 1], [0, 1, 0]]) > 0
    )
    # x_hat of row 0 = 2 (0, 1) + 2.2 (.6, .8) = (1.32, 3.76): error .32^2 + 1.76^2 = 3.2. Row 1: (0, 1): error 9.
    assert coder.loss(torch.tensor([[1.0, 2.0], [-3.0, 1.0]])).loss.item() == pytest.approx((3.2 + 9) / 2)


def test_topk_in_use_may_drop_the_ranking():
    x = rows()
    ranked, free = fitted("topk"), fitted("topk", inference="relu")
    assert ranked.encode_sparse(x).l0().max() == ranked.k
    assert free.encode_sparse(x).l0().max() > free.k
    assert free.loss(x).loss == ranked.loss(x).loss  # it is trained ranked all the same


def as_it_is(pre):
    """An encoder whose pre-activations are these."""
    return Encoder(pre, torch.eye(pre.shape[1]), torch.zeros(pre.shape[1]))


def test_batch_topk_by_hand_counts_k_per_row_and_spends_it_where_needed():
    # n=2, k=2: the 4 largest of {1,3,2,6,4,5} are 6,5,4,3, so row 0 keeps one and row 1 three.
    pre = torch.tensor([[1.0, 3.0, 2.0], [6.0, 4.0, 5.0]])
    picked = largest_of_batch(as_it_is(pre), 2 * 2)
    assert picked.to_dense().tolist() == [[0, 3, 0], [6, 4, 5]]
    coder = BatchTopK(d_in=3, d_sae=3, k=2, normalization="none")
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(3))
    codes = coder.loss(pre).codes
    assert codes.l0().tolist() == [1, 3]
    assert codes.nnz == 2 * coder.k


def test_batch_topk_never_picks_a_negative_entry():
    pre = torch.tensor([[-1.0, 3.0, -2.0], [0.0, -4.0, 5.0]])
    assert largest_of_batch(as_it_is(pre), 4).to_dense().tolist() == [[0, 3, 0], [0, 0, 5]]


def test_batch_topk_answers_do_not_depend_on_what_was_usual():
    pre = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    slow = pre.relu() * (pre >= pre.flatten().sort(descending=True).values[249])
    for usual in (None, 0.0, 0.5, 0.9, 5.0):
        assert torch.equal(largest_of_batch(as_it_is(pre), 250, usual=usual).to_dense(), slow)


def test_batch_topk_without_a_threshold_says_so_and_has_one_after_a_step():
    coder, x = fitted("topk"), rows()
    coder = BatchTopK(d_in=D_IN, d_sae=D_SAE, k=4, normalization="none")
    with pytest.raises(RuntimeError, match="no threshold yet"):
        coder.encode(x)
    step = coder.loss(x)
    assert coder.threshold.item() == pytest.approx(step.codes.values.min().item())
    assert coder.encode_sparse(x).l0().float().mean().item() == pytest.approx(4, abs=0.1)


def test_batch_topk_calibration_makes_the_mean_l0_k_on_held_out_rows():
    coder = fitted("batch_topk")
    held_out = [rows(700, seed=8), rows(311, seed=9)]
    done = coder.calibrate(iter(held_out))  # an iterator: read once
    mean_l0 = coder.encode_sparse(torch.cat(held_out)).l0().float().mean().item()
    assert mean_l0 == pytest.approx(coder.k, rel=0.005)
    assert done == coder.calibration
    assert done["estimator"] == "quantile_where_mean_l0_is_k"
    assert done["mean_l0"] == pytest.approx(mean_l0)
    assert done["n_rows"] == 1011
    # Witness: the same quantile by sorting everything.
    pre = coder.pre_activations(coder.normalize(torch.cat(held_out)).y).relu().flatten().sort(descending=True).values
    assert pre[1011 * coder.k - 1] > coder.threshold > pre[1011 * coder.k]


def test_batch_topk_threshold_survives_saving_and_its_estimator_is_named(tmp_path):
    coder = fitted("batch_topk")
    save_coder(tmp_path, coder)
    reloaded = load_coder(tmp_path)
    assert reloaded.threshold == coder.threshold
    assert "threshold" in coder.state_dict()
    assert reloaded.calibration["estimator"] == "quantile_where_mean_l0_is_k"


def test_batch_topk_where_less_than_k_are_positive_everything_positive_is_kept():
    coder = BatchTopK(d_in=2, d_sae=3, k=3, normalization="none")
    coder.calibrate([torch.randn(50, 2)])
    assert coder.threshold == 0
    with pytest.raises(ValueError, match="got no batches"):
        coder.calibrate([])


def test_matryoshka_nested_loss_by_hand():
    # Levels 1, 2, 3 (all positive) with weights 3, 2, 1.
    # Row (1, 2): pre (1, 2, 2.2). Level 1: 2.2 (.6, .8) = (1.32, 1.76): error .32^2 + .24^2 = .16.
    #   Level 2: + 2 (0, 1) = (1.32, 3.76): 3.2.   Level 3: + 1 (1, 0) = (2.32, 3.76): 1.32^2 + 1.76^2 = 4.84.
    # Row (-3, 1): pre (-3, 1, -1). One positive latent: every level gives (0, 1): error 9.
    coder = by_hand(Matryoshka(d_in=2, d_sae=3, ks=[1, 2, 3], weighting="reverse", normalization="none"))
    step = coder.loss(torch.tensor([[1.0, 2.0], [-3.0, 1.0]]))
    levels = [(0.16 + 9) / 2, (3.2 + 9) / 2, (4.84 + 9) / 2]
    assert step.terms["level_1"].item() == pytest.approx(3 / 6 * levels[0])
    assert step.terms["level_2"].item() == pytest.approx(2 / 6 * levels[1])
    assert step.terms["level_3"].item() == pytest.approx(1 / 6 * levels[2])
    uniform = by_hand(Matryoshka(d_in=2, d_sae=3, ks=[1, 2, 3], weighting="uniform", normalization="none"))
    assert uniform.loss(torch.tensor([[1.0, 2.0], [-3.0, 1.0]])).loss.item() == pytest.approx(sum(levels) / 3)


def test_matryoshka_levels_are_nested_by_k_and_draw_on_the_whole_dictionary():
    coder, x = fitted("matryoshka", inference_k=None), rows()
    codes = coder.encode_sparse(x)
    supports = [codes.top(k).to_dense() > 0 for k in coder.levels]
    for smaller, larger in zip(supports, supports[1:], strict=False):
        assert (smaller <= larger).all()
        assert smaller.sum() < larger.sum()
    assert supports[0].any(0).sum() > coder.levels[0]  # by prefix it would be the first k latents only


def test_matryoshka_any_k_at_inference_is_progressive_recovery():
    x = rows()
    whole = fitted("matryoshka", inference_k=None)
    for k in (1, 3, 10):
        at_k = fitted("matryoshka", inference_k=k)
        assert torch.equal(at_k.encode(x), whole.encode_sparse(x).top(k).to_dense())
    z = whole.encode(x)
    torch.testing.assert_close(z, whole.pre_activations(whole.normalize(x).y).relu())


def test_matryoshka_default_levels_are_the_papers():
    assert default_levels(6144) == (64, 128, 256, 512, 1024, 2048, 4096, 6144)
    assert default_levels(4096) == (64, 128, 256, 512, 1024, 2048, 4096)
    assert default_levels(10) == (10,)
    assert Matryoshka(d_in=3, d_sae=300).alphas == [4, 3, 2, 1]
    assert Matryoshka(d_in=3, d_sae=300, weighting="uniform").alphas == [1, 1, 1, 1]


def test_matryoshka_without_the_full_level_never_sees_what_lies_below_the_ranks():
    coder, x = fitted("matryoshka", ks=[1, 2]), rows()
    step = coder.loss(x)
    pre = coder.pre_activations(step.target)
    top2 = Codes.from_dense(pre.relu().detach()).top(2)
    torch.testing.assert_close(step.x_hat, top2.to_dense() @ coder.W_dec + coder.b_dec)


def test_soft_cap_by_hand():
    # c = 2: 2 tanh(1 / 2) = 0.92423, 2 tanh(6 / 2) = 1.99011.
    coder = Matryoshka(d_in=2, d_sae=2, soft_cap=2.0, normalization="none")
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(2))
        coder.W_dec.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 6.0]])
    torch.testing.assert_close(coder.encode(x), torch.tensor([[0.92423, 1.99011]]), rtol=1e-4, atol=0)
    assert coder.loss(x).loss.item() == pytest.approx((1 - 0.92423) ** 2 + (6 - 1.99011) ** 2, rel=1e-4)


def test_the_point_of_least_distance_is_robust():
    # Weiszfeld on a symmetric cross with one far outlier stays at the cross; the mean does not.
    y = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [0.0, 0.0], [0, 500]])
    assert geometric_median(y).norm() < 0.3
    coder = TopK(d_in=2, d_sae=4, k=1, normalization="none", b_dec_init="geometric_median")
    with pytest.raises(RuntimeError, match="has not seen its data"):
        coder.encode(y)


def test_geometric_median_start_is_in_the_normalised_space():
    x = rows(200)
    coder = fitted("topk", x, b_dec_init="geometric_median")
    torch.testing.assert_close(coder.b_dec.detach(), geometric_median(coder.normalize(x).y))


def test_weights_do_not_share_memory():
    coder = copy.deepcopy(fitted("topk"))
    with torch.no_grad():
        coder.W_enc.zero_()
    assert coder.W_dec.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TopK(d_in=3, d_sae=5, k=6), "k must be in 1..d_sae=5, got 6"),
        (lambda: TopK(d_in=3, d_sae=5, k=2, inference="threshold"), "'topk' or 'relu', got 'threshold'"),
        (lambda: BatchTopK(d_in=3, d_sae=5, k=0), "counts per row, got 0"),
        (lambda: ReLU(d_in=3, d_sae=5, l1=-1.0), "l1 must not be negative"),
        (lambda: ReLU(d_in=3, d_sae=0), "at least 1, got d_in=3, d_sae=0"),
        (lambda: ReLU(d_in=3, d_sae=5, b_dec_init="mean"), "'zeros' or 'geometric_median', got 'mean'"),
        (lambda: ReLU(d_in=3, d_sae=5, normalization="l2"), "no normalisation 'l2'"),
        (lambda: Matryoshka(d_in=3, d_sae=5, ks=[2, 2]), "ks must rise strictly"),
        (lambda: Matryoshka(d_in=3, d_sae=5, ks=[2, 9]), "ks must rise strictly"),
        (lambda: Matryoshka(d_in=3, d_sae=5, weighting="RW"), "one of uniform, reverse, got 'RW'"),
        (lambda: Matryoshka(d_in=3, d_sae=5, inference_k=7), "inference_k must be in 1..d_sae=5"),
        (lambda: Matryoshka(d_in=3, d_sae=5, soft_cap=0.0), "soft_cap must be positive"),
    ],
)
def test_impossible_settings_are_named_where_they_enter(make, sentence):
    with pytest.raises(ValueError, match=sentence.replace("..", r"\.\.")):
        make()
