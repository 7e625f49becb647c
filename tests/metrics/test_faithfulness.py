"""Faithfulness: what a model that is linear behind the point must give, and what edits of nothing and of all do."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from vitrail.backbones.splice import splice
from vitrail.backbones.toy import ToyViT, wrap
from vitrail.coders import make_coder
from vitrail.metrics.faithfulness import Faithfulness, _Batch, areas, causal_faithfulness, scores
from vitrail.metrics.heads import LinearHead, own_head
from vitrail.statistics import ActivationStats

POINT = "blocks.1.hook_resid_post"
LAST = "blocks.2.hook_resid_post"


def toy(linear=False):
    torch.manual_seed(0)
    model = ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=3, n_heads=2, d_mlp=32, n_classes=5)
    if linear:
        model.norm = nn.Identity()
    return wrap(model, name="t")


@pytest.fixture(scope="module")
def backbone():
    return toy()


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def coder_at(backbone, images, *points, tokens="all", architecture="topk", **arguments):
    with torch.no_grad():
        seen = backbone.activations(images, list(points))
    rows = [x[:, backbone.grid.tokens(tokens)].flatten(0, 1) if x.ndim == 3 else x for x in seen.values()]
    x = torch.cat(rows, 1)
    sizes = {"d_in": rows[0].shape[1], "d_out": rows[-1].shape[1]} if len(rows) > 1 else {"d_in": x.shape[1]}
    if "widths" in arguments:
        sizes = {"d_in": x.shape[1]}
    coder = make_coder(architecture, **sizes, **{"d_sae": 40, **arguments})
    coder.fit(ActivationStats.of(x), x)
    return coder.eval().requires_grad_(False)


def measured(backbone, coder, images, labels=None, splits=(None,), **options):
    measure = Faithfulness(backbone, coder, **{"point": POINT, "tokens": "all", "head": own_head(backbone), **options})
    for a, b in itertools.pairwise([0, *(s for s in splits if s), len(images)]):
        measure.update(images[a:b], None if labels is None else labels[a:b])
    return measure


def test_areas_by_hand():
    # n = 3: steps 0, 1, 2, all = 3 lie at log2(1, 2, 3, 4) / 2 = 0, .5, .7925, 1; the curve is 0, 2, 2, 4.
    # .5 * 1 + .2925 * 2 + .2075 * 3 = 1.7075
    found = areas(np.array([[0.0, 2.0, 2.0, 4.0]]), [0, 1, 2], np.array([3.0]))
    half = math.log2(3) / 2
    assert found[0] == pytest.approx(0.5 + 2 * (half - 0.5) + 3 * (1 - half))
    # Steps beyond the image's latents have no width; an image without any has no area.
    again = areas(np.array([[0.0, 2.0, 2.0, 4.0, 4.0]]), [0, 1, 2, 4], np.array([3.0]))
    assert again[0] == pytest.approx(found[0])
    assert areas(np.zeros((1, 4)), [0, 1, 2], np.array([0.0]))[0] == 0


def test_scores_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    assert scores(logits, torch.tensor([1]), "logit").item() == pytest.approx(math.log(3))
    assert scores(logits, torch.tensor([1]), "probability").item() == pytest.approx(0.75)


@pytest.mark.parametrize("case", ["cls of the last block", "image embedding"])
def test_where_the_rest_is_linear_curves_are_sums_of_attributions(images, case):
    backbone = toy(linear=True)
    point, tokens = (LAST, "cls") if case == "cls of the last block" else ("hook_image_embed", "all")
    coder = coder_at(backbone, images, point, tokens=tokens if point == LAST else "all", k=7)
    measure = measured(backbone, coder, images, point=point, tokens=tokens)
    with torch.no_grad():
        x = backbone.activations(images, [point])[point]
        x = x[:, 0] if x.ndim == 3 else x
        weight, clean = backbone.module.head.weight, backbone(images)
        effects = coder.encode(x) * coder.normalize.scale * (coder.W_dec @ weight[clean.argmax(1)].T).T  # (b, d_sae)
    n = (coder.encode(x) > 0).sum(1)
    drops, gains = measure.curves()["deletion"], measure.curves()["insertion"]
    for i, m in enumerate([0, 1, 2, 4, 8, 16, 32, 40]):
        expected = 0.0
        for row, active in zip(effects, coder.encode(x) > 0, strict=True):
            expected += float(row[active].sort(descending=True).values[:m].sum()) / len(images)
        for curve in (drops, gains):  # on a linear model both are the same sum
            assert curve[i]["attribution"] == pytest.approx(expected, abs=1e-4)
    for order in ("attribution", "random", "matched"):
        assert drops[-1][order] == pytest.approx(float(effects.sum(1).mean()), abs=1e-4)
    numbers = measure.compute(n_bootstrap=50)
    assert numbers["latents_effect"].value == pytest.approx(float(effects.sum(1).mean()), abs=1e-4)
    assert numbers["latents_active"].value == pytest.approx(float(n.double().mean()))
    assert numbers["necessity"].value == pytest.approx(numbers["sufficiency"].value, abs=1e-4)
    assert numbers["necessity"].value > 0
    assert numbers["necessity"].low > 0
    assert numbers["necessity"].definition == "area-log2/logit/prediction"
    # No order is better, whatever it is, where effects simply add up.
    assert all(row["attribution"] >= row[o] - 1e-5 for row in drops for o in ("random", "matched"))


@pytest.mark.parametrize("tokens", ["all", "cls", "spatial", "pooled"])
def test_deleting_nothing_is_the_clean_run_and_deleting_all_leaves_the_bias_and_the_error(backbone, images, tokens):
    kind = "all" if tokens == "pooled" else tokens
    coder = coder_at(backbone, images, POINT, tokens=kind, k=4)
    measure = Faithfulness(backbone, coder, point=POINT, tokens=tokens, head=own_head(backbone))
    with torch.no_grad():
        batch = _Batch(measure, images)
        assert torch.equal(batch.logits(~batch.none()), batch.clean)
        if tokens == "pooled":
            return
        found = batch.logits(batch.none())
        hook = splice(coder, backbone.grid.tokens(tokens), use_error_term=True, edit=lambda z, _: torch.zeros_like(z))
        expected = backbone.run_with_hooks(images, {POINT: hook})
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, batch.clean, atol=1e-3)


def test_curves_are_those_of_a_slow_loop_with_spliced_coders(backbone, images):
    coder = coder_at(backbone, images, POINT, k=2)
    measure = measured(backbone, coder, images)
    with torch.no_grad():
        x = backbone.activations(images, [POINT])[POINT]
        clean = backbone(images)
    classes = clean.argmax(1)
    z = coder.encode(x.flatten(0, 1)).detach().requires_grad_()
    with backbone.with_coders({POINT: coder}, use_error_term=True, edit=lambda _z, _p: z):
        total = backbone(images).gather(1, classes[:, None]).sum()
    gradient = torch.autograd.grad(total, z)[0]
    attribution = (gradient * z).detach().reshape(6, 17, 40).sum(1)
    active = (z > 0).reshape(6, 17, 40).any(1)
    for i, m in enumerate([0, 1, 2, 4]):
        drop, gain = 0.0, 0.0
        for image in range(6):
            ranked = sorted(active[image].nonzero()[:, 0].tolist(), key=lambda j: -float(attribution[image, j]))
            first = torch.zeros(40, dtype=torch.bool)
            first[ranked[:m]] = True
            values = []
            for keep in (~first, first, torch.zeros(40, dtype=torch.bool)):
                edit = lambda z, _, keep=keep: z * keep
                with torch.no_grad(), backbone.with_coders({POINT: coder}, use_error_term=True, edit=edit):
                    values.append(float(backbone(images[image : image + 1])[0, classes[image]]))
            drop += (float(clean[image, classes[image]]) - values[0]) / 6
            gain += (values[1] - values[2]) / 6
        assert measure.curves()["deletion"][i]["attribution"] == pytest.approx(drop, abs=1e-4)
        assert measure.curves()["insertion"][i]["attribution"] == pytest.approx(gain, abs=1e-4)


def test_orders_hold_each_place_once_and_the_matched_one_stays_in_its_quantile(backbone, images):
    coder = coder_at(backbone, images, POINT, k=8)
    measure = Faithfulness(backbone, coder, point=POINT, tokens="all", head=own_head(backbone))
    with torch.no_grad():
        batch = _Batch(measure, images)
        batch.attribute(batch.clean.argmax(1))
    place = batch.order_of(batch.attribution)
    seeds = [(0, i) for i in range(6)]
    matched, shuffled = batch.matched_order(place, seeds), batch.random_order(seeds)
    mass = torch.zeros(len(place)).index_add(0, batch.pair, batch.codes.values)
    assert not torch.equal(matched, place)
    for image in range(6):
        own = batch.image == image
        n = int(own.sum())
        for order in (place, matched, shuffled):
            assert sorted(order[own].tolist()) == list(range(n))
        assert (batch.attribution[own][place[own].argsort()].diff() <= 0).all()
        by_mass = mass[own].argsort(descending=True, stable=True)
        quantile = torch.empty(n, dtype=torch.long)
        quantile[by_mass] = torch.arange(n) * 10 // n
        for q in range(10):  # each decile has the places it had
            assert sorted(place[own][quantile == q].tolist()) == sorted(matched[own][quantile == q].tolist())


@pytest.mark.parametrize("score", ["logit", "probability"])
def test_two_batches_are_one(backbone, images, score):
    coder = coder_at(backbone, images, POINT, k=3)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    options = {"score": score, "of": "label"}
    one = measured(backbone, coder, images, labels, **options)
    two = measured(backbone, coder, images, labels, splits=(2,), **options)
    for key, value in one.compute(n_bootstrap=20).items():
        again = two.compute(n_bootstrap=20)[key]
        assert again.value == pytest.approx(value.value, abs=1e-5), key
        assert again.definition == value.definition == f"{value.definition.split('/')[0]}/{score}/label"
    assert one.cost()["runs"] < two.cost()["runs"]
    assert one.cost()["runs_per_image"] == one.cost()["runs"]


def test_a_transcoder_and_a_crosscoder_are_measured_where_they_write(backbone, images):
    read, written = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    transcoder = coder_at(backbone, images, read, written, architecture="topk_transcoder", k=4, skip=True)
    found = measured(backbone, transcoder, images, point=read, target_point=written).compute(n_bootstrap=10)
    assert found["latents_effect"].value != 0
    points = ("blocks.0.hook_mlp_out", "blocks.2.hook_attn_out")
    crosscoder = coder_at(backbone, images, *points, architecture="topk_crosscoder", k=4, widths=[24, 24])
    measure = Faithfulness(backbone, crosscoder, point=points[0], points=points, tokens="all", head=own_head(backbone))
    with torch.no_grad():
        batch = _Batch(measure, images)
        assert torch.equal(batch.logits(~batch.none()), batch.clean)
    measure.update(images)
    assert measure.compute(n_bootstrap=10)["latents_effect"].value != 0


def test_a_coder_whose_latents_never_fire_explains_nothing(backbone, images):
    coder = coder_at(backbone, images, POINT, k=3)
    with torch.no_grad():
        coder.b_enc.fill_(-1e6)
    measure = measured(backbone, coder, images[:1])
    numbers = measure.compute(n_bootstrap=10)
    assert all(value.value == 0 for value in numbers.values())
    assert all(row["attribution"] == 0 for row in measure.curves()["deletion"])


def test_parameters_get_no_gradients(backbone, images):
    measured(backbone, coder_at(backbone, images, POINT, k=3), images)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_the_study_over_pictures_says_what_it_cost(backbone):
    from vitrail.images import load_batches, open_images

    pictures = open_images("world:shapes?n=9&image_px=32&split=test")
    batch = next(load_batches(pictures, range(9), backbone.preprocess, batch_size=9))
    coder = coder_at(backbone, batch.images, POINT, k=3)
    head = LinearHead(weight=torch.randn(48, 5), bias=torch.zeros(48))
    numbers, curves, cost = causal_faithfulness(
        backbone,
        pictures,
        coder,
        limit=5,
        batch_size=5,
        n_bootstrap=20,
        point=POINT,
        tokens="all",
        head=head,
        of="label",
    )
    assert numbers["necessity"].n == 5
    chosen = sorted(np.random.default_rng(0).permutation(9)[:5].tolist())
    with torch.no_grad():
        x = backbone.activations(batch.images[chosen], [POINT])[POINT]
    n = int((coder.encode(x.flatten(0, 1)).reshape(5, 17, 40) > 0).any(1).sum(1).max())
    # a backward, nothing left, and 2 ways x 3 orders at each m below the most latents
    assert cost["runs"] == cost["runs_per_image"] == 2 + 6 * sum(m < n for m in (1, 2, 4, 8, 16, 32))
    assert [row["latents"] for row in curves["deletion"]][:4] == [0, 1, 2, 4]
    assert curves["deletion"][-1]["all"]


def test_what_cannot_be_measured_says_so(backbone, images):
    coder = coder_at(backbone, images, POINT, k=3)
    with pytest.raises(ValueError, match="score must be one of logit, probability"):
        Faithfulness(backbone, coder, point=POINT, tokens="all", head=own_head(backbone), score="loss")
    with pytest.raises(ValueError, match="these images have none. Use of='prediction'"):
        measured(backbone, coder, images, of="label")
    with pytest.raises(ValueError, match="no images were measured"):
        Faithfulness(backbone, coder, point=POINT, tokens="all", head=own_head(backbone)).compute()
