"""Means of many groups in one pass, the choice by tau, and its expansion."""

import numpy as np
import pytest
import torch

from backbones.small_backbones import build_case
from vitrail.coders import TopK
from vitrail.coders.sparse import Codes
from vitrail.images import open_images
from vitrail.statistics import ActivationStats
from vitrail.steering.selection import (
    TAUS,
    MeanSums,
    balanced,
    expanded,
    latents_at,
    mean_activations,
    neurons_at,
    select,
    standardised,
)

POINT = "blocks.1.hook_resid_post"


def coder_on(backbone, d_sae=30, k=4):
    rows = torch.randn(200, backbone.point(POINT).width, generator=torch.Generator().manual_seed(5)) * 2 + 0.3
    coder = TopK(d_in=rows.shape[1], d_sae=d_sae, k=k, normalization="mean_std", seed=1)
    coder.fit(ActivationStats.of(rows), rows)
    return coder.eval()


def test_means_by_hand():
    # Two images of two rows. Latent 0: image 0 has 2 and 4, image 1 none. Latent 1: image 1 has 6 and 0.
    codes = Codes.from_dense(torch.tensor([[2.0, 0, 0], [4, 0, 0], [0, 6, 0], [0, 0, 0]]))
    members = torch.tensor([[True, True], [False, True]])  # groups "first", "both"
    mean, largest = MeanSums(3, ["first", "both"]), MeanSums(3, ["first", "both"], pool="max")
    for sums in (mean, largest):
        sums.add_codes(codes, members)
    assert mean.means().of("first").tolist() == [3, 0, 0]
    assert mean.means().of("both").tolist() == [1.5, 1.5, 0]  # (2+4)/4 and 6/4
    assert largest.means().of("both").tolist() == [2, 3, 0]  # (4+0)/2 and (0+6)/2
    assert mean.means().alive().tolist() == [0, 1]
    assert mean.means().n_images.tolist() == [1, 2]


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("tokens", ["cls", "spatial", "all"])
def test_one_pass_gives_what_dense_codes_give_group_by_group(pool, tokens):
    backbone, images = build_case("toy-clip").backbone, open_images("world:shapes?n=11&seed=3")
    coder = coder_on(backbone)
    groups = {"low": np.arange(11) < 4, "even": np.arange(11) % 2 == 0}
    sites = {"latents": latents_at(coder, POINT, tokens), "neurons": neurons_at(backbone, POINT, tokens)}
    found = mean_activations(backbone, images, sites, groups, pool=pool, batch_size=4)
    with torch.no_grad():
        pixels = torch.stack([backbone.preprocess(images.load(i)) for i in range(11)])
        x = backbone.activations(pixels, [POINT])[POINT][:, backbone.grid.tokens(tokens)]
        z = coder.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    for name, dense in (("latents", z), ("neurons", x)):
        pooled = dense.amax(1) if pool == "max" else dense.mean(1)
        for group, marks in groups.items():
            torch.testing.assert_close(found[name].of(group).float(), pooled[marks].mean(0), rtol=1e-4, atol=1e-5)
            spread = found[name].variances[list(groups).index(group)].float()
            torch.testing.assert_close(spread, pooled[marks].var(0, correction=0), rtol=1e-3, atol=1e-4)


def test_features_are_those_that_are_larger_by_more_than_tau():
    inside, outside = torch.tensor([1.0, 0.5, 0.2, 0.0]), torch.tensor([0.0, 0.4, 0.2, 1.0])
    assert select(inside, outside, 0.05).tolist() == [0, 1]
    assert select(inside, outside, 0.1).tolist() == [0]  # 0.5 > 0.4 + 0.1 is no strict inequality in float32
    assert select(inside, outside, 0.999).tolist() == [0]
    assert select(inside, outside, 1.0).tolist() == []
    assert len(TAUS) == 25
    assert TAUS[0] == pytest.approx(1e-6)
    assert TAUS[-1] == 1
    assert np.diff(np.log10(TAUS)) == pytest.approx(0.25)


def test_sets_are_nested_as_tau_grows():
    inside, outside = torch.rand(2, 60, generator=torch.Generator().manual_seed(0))
    sets = [set(select(inside, outside, tau).tolist()) for tau in TAUS]
    assert all(later <= earlier for earlier, later in zip(sets, sets[1:], strict=False))
    assert sets[0]


def test_balanced_means_do_not_find_the_class():
    # Latent 0 is the class (1 in class a), latent 1 the attribute. Class and attribute nearly always go together.
    z = {"a+": [1.0, 1.0], "a-": [1.0, 0.0], "b+": [0.0, 1.0], "b-": [0.0, 0.0]}
    groups = ["a+", "a-", "b+", "b-", "+", "-"]
    sums = MeanSums(2, groups)
    for name, n in (("a+", 9), ("a-", 1), ("b+", 1), ("b-", 9)):
        own = torch.tensor([[group in (name, name[1]) for group in groups]])
        for _ in range(n):
            sums.add_rows(torch.tensor([[z[name]]]), own)
    means = sums.means()
    assert select(means.of("+"), means.of("-"), 0.1).tolist() == [0, 1]
    assert select(*balanced(means, [("a+", "a-"), ("b+", "b-")]), 0.1).tolist() == [1]


def test_standardised_differences_are_cohens_d():
    # Group a+: 1, 3 (mean 2, variance 1); a-: 0, 2 (1, 1). d = 1 / 1. Times 100: the same. A constant: 0.
    sums = MeanSums(3, ["a+", "a-"])
    for z, own in ((1.0, [True, False]), (3.0, [True, False]), (0.0, [False, True]), (2.0, [False, True])):
        sums.add_rows(torch.tensor([[[z, 100 * z, 5.0]]]), torch.tensor([own]))
    inside, outside = standardised(sums.means(), [("a+", "a-")])
    assert (inside - outside).tolist() == pytest.approx([1, 1, 0])
    assert select(inside, outside, 0.9).tolist() == [0, 1]


def test_expansion_is_one_pass():
    # A chain: neighbours have cosine cos 30 = 0.87, next but one cos 60 = 0.5.
    angle = torch.deg2rad(torch.tensor([0.0, 30, 60, 90]))
    W_dec = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [5.0], [0.1], [2.0]])
    assert expanded([0], W_dec, 0.8).tolist() == [0, 1]  # the closure would go on to 2 and 3
    assert expanded([0], W_dec, 0.4).tolist() == [0, 1, 2]
    assert expanded([3, 0], W_dec, 0.8).tolist() == [0, 1, 2, 3]
    assert expanded([2], W_dec, 1.0).tolist() == [2]
    assert expanded([], W_dec, 0.2).tolist() == []


def test_what_cannot_be_is_refused():
    backbone, images = build_case("toy-clip").backbone, open_images("world:shapes?n=3")
    site = latents_at(coder_on(backbone), POINT, "cls")
    with pytest.raises(ValueError, match=r"marks \(2,\) images, the source has 3"):
        mean_activations(backbone, images, {"a": site}, {"some": np.ones(2, dtype=bool)})
    means = mean_activations(backbone, images, {"a": site}, {"none": np.zeros(3, bool), "all": np.ones(3, bool)})["a"]
    with pytest.raises(ValueError, match="'none' has no images"):
        means.of("none")
    with pytest.raises(KeyError, match="no group 'water'"):
        means.of("water")
    with pytest.raises(ValueError, match="tau must be a finite number"):
        select(torch.zeros(2), torch.zeros(2), float("nan"))
    with pytest.raises(ValueError, match="cosine, in -1..1, got 2"):
        expanded([0], torch.eye(2), 2)
    with pytest.raises(IndexError, match=r"features are 0\.\.1, got 2"):
        expanded([2], torch.eye(2), 0.1)
    with pytest.raises(ValueError, match="pool must be mean or max"):
        MeanSums(2, ["a"], pool="median")
