"""The table: what identity, zeros and equal L0 must give; nothing measured on other tokens than was said."""

import json

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SkPCA
from torchmetrics.functional import r2_score

from vitrail.backbones.toy import ToyViT, wrap
from vitrail.coders import make_coder
from vitrail.coders.baselines import controls
from vitrail.images import load_batches, open_images
from vitrail.metrics.heads import own_head
from vitrail.statistics import ActivationStats
from vitrail.studies.prisma_table import matched_l0, prisma_table

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    model = ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=3, n_heads=2, d_mlp=32, n_classes=48)
    return wrap(model, name="toy/t")


@pytest.fixture(scope="module")
def images():
    return open_images("world:shapes?n=30&image_px=32&split=test")


@pytest.fixture(scope="module")
def activations(backbone, images):
    batch = next(load_batches(images, range(30), backbone.preprocess, batch_size=30))
    with torch.inference_mode():
        return backbone.activations(batch.images, [POINT])[POINT].clone()


def fitted(architecture, sample, **arguments):
    coder = make_coder(architecture, d_in=24, **arguments)
    coder.fit(ActivationStats.of(sample), sample)
    return coder.eval().requires_grad_(False)


def identity(sample):
    """A coder that loses nothing: every coordinate and its opposite."""
    return fitted("neurons", sample, k=24)


def table(backbone, images, coders, **options):
    defaults = dict(point=POINT, tokens="all", head=own_head(backbone), control_sample=None, batch_size=8)
    rows = prisma_table(backbone, images, coders, **{**defaults, **options})
    return {row.name: row for row in rows}


def test_identity_is_perfect_in_every_column(backbone, images, activations):
    row = table(backbone, images, {"id": identity(activations.flatten(0, 1))})["id"]
    value = {name: measured.value for name, measured in row.measured.items()}
    assert value["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert value["cosine"] == pytest.approx(1, abs=1e-6)
    assert value["recon_cosine"] == pytest.approx(1, abs=1e-6)
    assert value["recon_ce"] == pytest.approx(value["ce"], abs=1e-5)
    assert value["ce_recovered"] == pytest.approx(100, abs=0.05)
    assert value["l0_tokens"] == pytest.approx(24)
    assert value["l0_image_sum"] == pytest.approx(24 * 17)


def test_numbers_are_those_of_rows_held_in_memory(backbone, images, activations):
    x = activations.flatten(0, 1)
    coder = fitted("topk", x, d_sae=40, k=3)
    value = {n: m.value for n, m in table(backbone, images, {"c": coder})["c"].measured.items()}
    x_hat, z = coder(x), coder.encode(x).reshape(30, 17, 40)
    r2 = r2_score(x_hat.double(), x.double(), multioutput="variance_weighted")
    assert value["explained_variance"] == pytest.approx(float(r2), abs=1e-5)
    assert value["l0_tokens"] == pytest.approx(float((z > 0).sum(-1).double().mean()))
    assert value["l0_cls"] == pytest.approx(float((z[:, 0] > 0).sum(-1).double().mean()))
    assert value["l0_image_unique"] == pytest.approx(float((z > 0).any(1).sum(-1).double().mean()))
    assert value["alive"] == pytest.approx(float((z > 0).any(0).any(0).double().mean()))


@pytest.mark.parametrize(("tokens", "positions"), [("spatial", slice(1, 17)), ("cls", slice(0, 1))])
def test_only_the_trained_tokens_are_measured_and_replaced(backbone, images, activations, tokens, positions):
    x = activations[:, positions]
    coder = fitted("topk", x.flatten(0, 1), d_sae=40, k=2)
    row = table(backbone, images, {"c": coder}, tokens=tokens)["c"]
    value = {n: m.value for n, m in row.measured.items()}
    r2 = r2_score(coder(x.flatten(0, 1)).double(), x.flatten(0, 1).double(), multioutput="variance_weighted")
    assert value["explained_variance"] == pytest.approx(float(r2), abs=1e-4)
    assert ("l0_cls" in value) == (tokens == "cls")

    def put(whole, point):
        whole = whole.clone()
        whole[:, positions] = coder(whole[:, positions].flatten(0, 1)).reshape(whole[:, positions].shape)
        return whole

    batch = next(load_batches(images, range(30), backbone.preprocess, batch_size=30))
    with torch.inference_mode():
        logits = backbone.run_with_hooks(batch.images, {POINT: put})
    labels = torch.tensor([images.record(i).label for i in range(30)])
    assert value["recon_ce"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-4)
    assert row.measured["recon_ce"].definition == "trained-tokens"


def test_all_tokens_is_another_definition_under_its_own_tag(backbone, images, activations):
    coder = fitted("topk", activations[:, :1].flatten(0, 1), d_sae=40, k=2)
    trained = table(backbone, images, {"c": coder}, tokens="cls")["c"].measured["recon_ce"]
    everywhere = table(backbone, images, {"c": coder}, tokens="cls", substitution="all-tokens")["c"].measured[
        "recon_ce"
    ]
    assert everywhere.definition == "all-tokens"
    assert everywhere.value != trained.value


def test_controls_spend_no_more_latents_than_their_coder(backbone, images, activations):
    sample = activations.flatten(0, 1)
    relu = fitted("relu", sample, d_sae=40)
    k = matched_l0(relu, sample)
    rows = table(backbone, images, {"relu": relu}, control_sample=sample)
    own = rows["relu"].measured["l0_tokens"].value
    assert k - 1 < own <= k
    beside = [row for row in rows.values() if row.control_of == "relu"]
    names = ("random", "pca", "pca_all", "neurons", "kmeans", "untrained")
    assert [row.name for row in beside] == [f"relu / {control}" for control in names]
    for row in beside:
        assert row.measured["l0_tokens"].value <= k + 1e-9


def test_the_pca_control_is_scikit_learns(activations):
    sample = activations.flatten(0, 1)
    coder = fitted("topk", sample, d_sae=40, k=5)
    x_hat = controls(coder, sample, k=5)["pca"](sample).detach()
    witness = SkPCA(n_components=5).fit(sample.numpy())
    expected = witness.inverse_transform(witness.transform(sample.numpy()))
    np.testing.assert_allclose(x_hat.numpy(), expected, atol=2e-4)


def test_a_pooled_point_is_measured_too(backbone, images):
    batch = next(load_batches(images, range(30), backbone.preprocess, batch_size=30))
    with torch.inference_mode():
        x = backbone.activations(batch.images, ["hook_image_embed"])["hook_image_embed"].clone()
    row = table(backbone, images, {"id": identity(x)}, point="hook_image_embed", tokens="all")["id"]
    assert row.about["tokens"] == "pooled"
    assert row.measured["ce_recovered"].value == pytest.approx(100, abs=0.05)
    assert "l0_cls" not in row.measured


def test_a_row_is_json_with_definitions_and_provenance(backbone, images, activations):
    row = table(backbone, images, {"c": identity(activations.flatten(0, 1))}, limit=10)["c"].to_json()
    again = json.loads(json.dumps(row, allow_nan=False))
    assert again["n_images"] == 10
    assert again["measured"]["fvu"]["definition"] == "ratio-of-sums"
    assert {"vitrail", "commit", "versions", "platform"} <= set(again["provenance"])
    assert again["backbone_digest"] == backbone.digest


def test_wrong_widths_and_labels_say_so(backbone, images, activations):
    wide = make_coder("topk", d_in=32, d_sae=64, k=5, normalization="none")
    with pytest.raises(ValueError, match=r"coder w takes d_in=32, but blocks.1.hook_resid_post of toy/t is 24 wide"):
        table(backbone, images, {"w": wide})
    few = wrap(ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=3, n_heads=2, d_mlp=32, n_classes=2), name="few")
    with pytest.raises(ValueError, match=r"has label \d+, but the head has 2 classes"):
        table(few, images, {"c": identity(activations.flatten(0, 1))}, head=own_head(few))
    with pytest.raises(ValueError, match="substitution must be one of"):
        table(backbone, images, {"c": identity(activations.flatten(0, 1))}, substitution="some")


@pytest.mark.parametrize("tokens", ["spatial", "pooled"])
def test_the_embedding_before_cls_has_patches_only(backbone, images, tokens):
    batch = next(load_batches(images, range(30), backbone.preprocess, batch_size=30))
    with torch.inference_mode():
        x = backbone.activations(batch.images, ["hook_embed"])["hook_embed"].clone()
    rows = x.flatten(0, 1) if tokens == "spatial" else x.mean(1)
    row = table(backbone, images, {"id": identity(rows)}, point="hook_embed", tokens=tokens)["id"]
    assert row.measured["recon_cosine"].value == pytest.approx(1, abs=1e-5)
    assert row.measured["recon_ce"].value == pytest.approx(row.measured["ce"].value, abs=1e-4)
    if tokens == "pooled":
        with pytest.raises(ValueError, match="there are no other tokens for substitution='all-tokens'"):
            table(
                backbone, images, {"id": identity(rows)}, point="hook_embed", tokens=tokens, substitution="all-tokens"
            )


def test_a_limit_below_one_says_so(backbone, images, activations):
    with pytest.raises(ValueError, match="limit must be at least 1, got -3"):
        table(backbone, images, {"id": identity(activations.flatten(0, 1))}, limit=-3)


def test_a_coder_is_compared_with_its_controls_and_the_other_coders_over_the_same_images(backbone, images, activations):
    sample = activations.flatten(0, 1)
    coders = {name: fitted("topk", sample, d_sae=40, k=k) for name, k in (("a", 2), ("b", 4))}
    rows = table(backbone, images, coders, control_sample=sample, random_backbone="encode", n_bootstrap=200)
    a, b = rows["a"], rows["b"]
    assert set(a.paired) == {row.name for row in rows.values() if row.control_of == "a"} | {"b"}
    assert "a / random backbone" in a.paired
    assert not rows["a / pca"].paired
    # L0 is 2 and 4 in every image: the difference has no spread. What is no sum over images has no pair.
    l0 = a.paired["b"]["l0_tokens"]
    assert (l0.value, l0.low, l0.high, l0.n) == pytest.approx((-2, -2, -2, 30))
    assert "alive" not in a.paired["b"]
    # Witness: each resample of images by index, both coders' explained variances of it, and the percentiles.
    centred = (activations.double() - sample.double().mean(0)).square().sum((1, 2)).numpy()
    errors = [
        (activations - coder(sample).reshape(activations.shape)).double().square().sum((1, 2)).numpy()
        for coder in coders.values()
    ]
    counts = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=200)
    drawn = [np.repeat(np.arange(30), times) for times in counts]
    evs = np.array([[1 - error[at].sum() / centred[at].sum() for error in errors] for at in drawn])
    found = a.paired["b"]["explained_variance"]
    assert found.value == pytest.approx(a.measured["explained_variance"].value - b.measured["explained_variance"].value)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(evs[:, 0] - evs[:, 1], [2.5, 97.5])), abs=1e-5)
    said = json.loads(json.dumps(a.to_json(), allow_nan=False))["paired"]["b"]["explained_variance"]
    assert said == {"value": found.value, "low": found.low, "high": found.high, "n": 30}


def test_coders_of_other_places_are_not_subtracted(backbone, images, activations):
    sample = activations.flatten(0, 1)
    sets = {"blocks.0.hook_resid_post": identity(sample), POINT: identity(sample)}
    rows = table(backbone, images, {"set": sets, "alone": identity(sample)}, n_bootstrap=20)
    assert set(rows["alone"].paired) == {f"set @ {POINT}"}
    assert not rows["set"].paired
