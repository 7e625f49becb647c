"""Substitution: what identity, zero and a hand-made head must give, and that only the tail of the model runs again."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vitrail.backbones.toy import ToyViT, wrap
from vitrail.metrics.heads import LinearHead, OwnHead, ZeroShotHead, own_head, zero_shot_head
from vitrail.metrics.substitution import PerImage, Rerun, class_columns, image_cosine, substitution_metrics

POINTS = [
    "hook_embed",
    "hook_full_embed",
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_resid_mid",
    "blocks.2.hook_mlp_out",
    "blocks.2.hook_resid_post",
    "ln_final.hook_normalized",
    "hook_image_embed",
]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return wrap(ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=3, n_heads=2, d_mlp=32, n_classes=5), name="t")


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("point", POINTS)
def test_putting_back_what_was_there_changes_nothing(backbone, images, point):
    with torch.inference_mode():
        run = Rerun(backbone, point, images)
        output, embedding = run.replaced(run.activation)
    assert torch.equal(output, run.output)
    assert torch.equal(embedding, run.embedding)


@pytest.mark.parametrize("point", POINTS)
def test_a_replacement_is_what_hooks_give(backbone, images, point):
    with torch.inference_mode():
        run = Rerun(backbone, point, images)
        output, _ = run.replaced(run.activation * 0.5)
        expected = backbone.run_with_hooks(images, {point: lambda x, _: x * 0.5})
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert not torch.equal(output, run.output)


def test_only_the_blocks_from_the_point_on_run_again(backbone, images):
    with torch.inference_mode():
        run = Rerun(backbone, "blocks.1.hook_mlp_out", images)
        ran = []
        handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(backbone.blocks)]
        run.replaced(run.activation)
        for handle in handles:
            handle.remove()
    assert ran == [1, 2]


def columns(logits, labels, head=None):
    return class_columns(head or OwnHead(n_classes=logits.shape[1]), logits, labels)


def test_ce_recovered_by_hand():
    # two classes, one image of label 0: logits (a, 0) have CE = log(1 + e^-a)
    def per_image(a):
        gathered = PerImage()
        gathered.add(columns(torch.tensor([[a, 0.0], [a, 0.0]]), torch.tensor([0, 0])))
        return gathered

    clean, recon, zero = per_image(3.0), per_image(1.0), per_image(0.0)
    recon.add({"cosine": torch.tensor([0.5, 1.0])})
    measured = substitution_metrics(clean, zero, recon, definition="d")
    ce = [math.log1p(math.exp(-a)) for a in (3.0, 1.0, 0.0)]
    assert measured["ce"].value == pytest.approx(ce[0])
    assert measured["recon_ce"].value == pytest.approx(ce[1])
    assert measured["zero_ce"].value == pytest.approx(math.log(2))
    assert measured["ce_recovered"].value == pytest.approx(100 * (ce[2] - ce[1]) / (ce[2] - ce[0]))
    assert measured["recon_cosine"].value == pytest.approx(0.75)
    assert measured["accuracy"].value == 1.0


def test_identity_recovers_100_zero_0_and_better_than_clean_is_not_clamped():
    labels = torch.tensor([0, 1, 1, 0])
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    better = torch.nn.functional.one_hot(labels).double() * 5

    def recovered(recon):
        parts = []
        for value in (logits.double(), torch.zeros(4, 2).double(), recon.double()):
            gathered = PerImage()
            gathered.add(columns(value, labels))
            parts.append(gathered)
        parts[2].add({"cosine": torch.ones(4)})
        return substitution_metrics(*parts, definition="d")["ce_recovered"].value

    assert recovered(logits) == pytest.approx(100)
    assert recovered(torch.zeros(4, 2)) == pytest.approx(0)
    assert not 0 <= recovered(better) <= 100


def test_the_logit_scale_is_explicit_and_both_are_reported():
    classes = torch.eye(3)
    output = torch.tensor([[1.0, 0, 0]])
    # cosines (1, 0, 0): CE at scale 1 is log(1 + 2/e); at 100 it is log(1 + 2 e^-100), nearly 0
    got = class_columns(ZeroShotHead(classes=classes, logit_scale=100.0), output, torch.tensor([0]))
    assert float(got["ce_unscaled"]) == pytest.approx(math.log(1 + 2 / math.e))
    assert float(got["ce"]) == pytest.approx(2 * math.exp(-100), abs=1e-12)
    # SPEC section M: CE of unscaled cosines over 1000 classes lies in [4.9141, 8.9069]
    low = class_columns(
        ZeroShotHead(classes=torch.cat([torch.ones(1, 1), -torch.ones(999, 1)]), logit_scale=1.0),
        torch.ones(1, 1),
        torch.tensor([0]),
    )["ce"]
    assert float(low) == pytest.approx(4.9141, abs=1e-4)


def test_a_constant_output_costs_at_least_the_log_of_the_classes():
    labels = torch.arange(7).repeat(3)
    for seed in range(5):
        constant = torch.randn(1, 7, generator=torch.Generator().manual_seed(seed)).expand(21, 7)
        assert float(columns(constant, labels)["ce"].mean()) >= math.log(7) - 1e-9


def test_a_linear_head_is_scikit_learns(backbone):
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(120, 6, generator=generator) * 3 + 5, torch.arange(120) % 3
    x[range(120), labels] += 4
    head = LinearHead.fit(x, labels, n_classes=4)
    scaled = ((x - x.mean(0)) / x.std(0)).numpy()
    witness = LogisticRegression(C=1.0, max_iter=1000).fit(scaled, labels.numpy())
    logits = head(x)
    np.testing.assert_allclose(torch.softmax(logits[:, :3], 1), witness.predict_proba(scaled), atol=1e-3)
    assert float(torch.softmax(logits, 1)[:, 3].max()) < 1e-9  # a class without a training row


def test_a_head_that_is_not_there_says_what_to_do(backbone):
    with pytest.raises(ValueError, match="has no text tower. Pass class embeddings"):
        zero_shot_head(backbone, ["cat"], ["a {}"])
    assert own_head(backbone).n_classes == 5


def test_image_cosine_is_per_image():
    a, b = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[5.0, 0], [2, 0]])
    assert image_cosine(a, b).tolist() == [1.0, 0.0]
