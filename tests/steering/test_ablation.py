"""Many sets at once give what the plain forward pass with one hook gives, set by set."""

import numpy as np
import pytest
import torch

from backbones.small_backbones import build_case
from vitrail.coders import TopK
from vitrail.images import open_images
from vitrail.metrics.heads import LinearHead, ZeroShotHead
from vitrail.statistics import ActivationStats
from vitrail.steering.ablation import FeatureSet, Rows, ablated_answers, ablated_logits
from vitrail.steering.interventions import Directions, Dose, Intervention, Latents, intervened, moved_rows
from vitrail.steering.selection import Site, latents_at, neurons_at

N = 10
IMAGES = open_images(f"world:shapes?n={N}&seed=4")


def coder_on(backbone, point, normalization="mean_std"):
    with torch.no_grad():
        pixels = torch.stack([backbone.preprocess(IMAGES.load(i)) for i in range(N)])
        rows = backbone.activations(pixels, [point])[point].flatten(0, -2)
    coder = TopK(d_in=rows.shape[1], d_sae=30, k=5, normalization=normalization, seed=2)
    coder.fit(ActivationStats.of(rows), rows)
    return coder.eval()


def head_of(backbone, n=7):
    return ZeroShotHead(torch.randn(n, backbone.d_embed, generator=torch.Generator().manual_seed(3)), 30.0)


def logits(backbone, head, sets, batch_size=4):
    batches = list(ablated_logits(backbone, IMAGES, head, sets, batch_size=batch_size))
    return torch.cat([one.before for one in batches]), torch.cat([one.after for one in batches], 1)


def naive(backbone, head, site, which, dose):
    pixels = torch.stack([backbone.preprocess(IMAGES.load(i)) for i in range(N)])
    asked = Intervention(site.point, site.basis, which, dose, site.where)
    with torch.no_grad(), intervened(backbone, asked):
        return head(backbone.activations(pixels, ["hook_image_embed"])["hook_image_embed"])


POINTS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"]


@pytest.mark.parametrize("where", ["cls", "spatial", "all"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", ["toy-clip", "timm-average"])
def test_sets_of_latents_and_neurons_are_those_of_a_hook(name, point, where):
    backbone = build_case(name).backbone
    if where == "cls" and not backbone.grid.n_cls:
        pytest.skip("this model has no class token")
    head = head_of(backbone)
    latents, neurons = latents_at(coder_on(backbone, point), point, where), neurons_at(backbone, point, where)
    sets = [FeatureSet("few", latents, [3]), FeatureSet("many", latents, range(0, 30, 2))]
    sets += [FeatureSet("half", latents, [1, 2, 5, 8], 0.5), FeatureSet("neurons", neurons, [0, 7, 20])]
    _, after = logits(backbone, head, sets)
    for one, dose, found in zip(sets, ["ablate", "ablate", "scale:0.5", "ablate"], after, strict=True):
        expected = naive(backbone, head, one.site, list(one.which), Dose.of(dose))
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_at_the_embedding_too():
    backbone = build_case("toy-clip").backbone
    head, site = head_of(backbone), latents_at(coder_on(backbone, "hook_image_embed"), "hook_image_embed", "pooled")
    _, after = logits(backbone, head, [FeatureSet("some", site, range(12))])
    torch.testing.assert_close(
        after[0], naive(backbone, head, site, list(range(12)), Dose("ablate")), rtol=1e-4, atol=1e-4
    )


def test_an_edit_that_changes_nothing_leaves_the_answer_bit_for_bit():
    backbone = build_case("toy-clip").backbone
    head, point = head_of(backbone), "blocks.1.hook_resid_post"
    coder = coder_on(backbone, point)
    site = latents_at(coder, point, "cls")
    with torch.no_grad():
        pixels = torch.stack([backbone.preprocess(IMAGES.load(i)) for i in range(N)])
        z = coder.encode(backbone.activations(pixels, [point])[point][:, 0])
    silent, sometimes = int((z > 0).sum(0).argmin()), int(((z > 0).sum(0) * ((z > 0).sum(0) < N)).argmax())
    assert not (z[:, silent] > 0).all()
    sets = [FeatureSet("empty", site, []), FeatureSet("as it is", site, range(30), factor=1.0)]
    before, after = logits(backbone, head, [*sets, FeatureSet("sometimes", site, [sometimes])])
    assert torch.equal(after[0], before)
    assert torch.equal(after[1], before)
    fires = z[:, sometimes] > 0
    assert fires.any()
    assert not fires.all()
    assert torch.equal(after[2][~fires], before[~fires])
    assert (after[2][fires] != before[fires]).any(1).all()


@pytest.mark.parametrize("normalization", ["none", "mean_std", "layer_norm"])
def test_rows_are_those_of_the_interventions(normalization):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    coder = TopK(d_in=6, d_sae=11, k=3, normalization=normalization, seed=2)
    coder.fit(ActivationStats.of(x), x)
    basis = Latents(coder.eval())
    one = FeatureSet("some", Site("anywhere", basis), [2, 5, 9])
    touched, changed = Rows(basis, x).changed(one)
    expected = moved_rows(basis, x, [2, 5, 9], Dose("ablate"))
    torch.testing.assert_close(changed, expected[touched])
    assert torch.equal(expected[~touched], x[~touched])


def test_mean_ablation_by_hand():
    # Direction (3, 4) / 5. Row (5, 0): z = 3, towards 1: step -2 along (0.6, 0.8). Row (0.6, 0.8): z = 1 already.
    basis = Directions(torch.tensor([[3.0, 4.0]]))
    x = torch.tensor([[5.0, 0.0], [0.6, 0.8]])
    touched, changed = Rows(basis, x[:1]).changed(FeatureSet("d", Site("p", basis), [0], 0.0, torch.tensor([1.0])))
    assert touched.tolist() == [True]
    torch.testing.assert_close(changed, torch.tensor([[3.8, -1.6]]))


def test_patches_that_nothing_reads_any_more_change_nothing():
    backbone, point = build_case("toy-clip").backbone, "blocks.2.hook_resid_post"  # the last: the class token is pooled
    site = latents_at(coder_on(backbone, point), point, "spatial")
    before, after = logits(backbone, head_of(backbone), [FeatureSet("all", site, range(30))])
    assert torch.equal(after[0], before)


def test_answers_do_not_depend_on_the_batch_or_on_other_sets():
    backbone = build_case("toy-clip").backbone
    head, point = head_of(backbone), "blocks.1.hook_resid_post"
    site = latents_at(coder_on(backbone, point), point, "all")
    a, b = FeatureSet("a", site, range(15)), FeatureSet("b", site, range(15, 30))
    whole = ablated_answers(backbone, IMAGES, head, [a, b], batch_size=3)
    alone = ablated_answers(backbone, IMAGES, head, [b], positions=[9, 2, 5])
    assert alone.positions.tolist() == [9, 2, 5]
    assert np.array_equal(alone.of("b"), whole.of("b")[[9, 2, 5]])
    assert np.array_equal(alone.before, whole.before[[9, 2, 5]])
    assert (whole.after != whole.before).any()


def test_a_linear_head_is_asked_too_and_what_cannot_be_is_refused():
    backbone = build_case("toy-clip").backbone
    head = LinearHead(torch.randn(3, backbone.d_embed, generator=torch.Generator().manual_seed(0)), torch.zeros(3))
    point = "blocks.2.hook_resid_post"
    site = latents_at(coder_on(backbone, point), point, "cls")
    _, after = logits(backbone, head, [FeatureSet("a", site, [0, 1])])
    torch.testing.assert_close(after[0], naive(backbone, head, site, [0, 1], Dose("ablate")), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a name of its own"):
        ablated_answers(backbone, IMAGES, head, [FeatureSet("a", site, [0]), FeatureSet("a", site, [1])])
    with pytest.raises(IndexError, match=r"latents are 0\.\.29, got 30"):
        FeatureSet("a", site, [30])
    with pytest.raises(ValueError, match="30 coordinates go towards"):
        FeatureSet("a", site, range(30), towards=torch.zeros(2))
    with pytest.raises(ValueError, match="where='all', not 'cls'"):
        wrong = Site("hook_image_embed", neurons_at(backbone, "hook_image_embed", "all").basis, "cls")
        ablated_answers(backbone, IMAGES, head, [FeatureSet("a", wrong, [0])])
    other = Site(point, Latents(TopK(d_in=5, d_sae=8, k=2).eval()), "cls")
    with pytest.raises(ValueError, match="5 wide"):
        ablated_answers(backbone, IMAGES, head, [FeatureSet("a", other, [0])])
