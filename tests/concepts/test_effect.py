"""What turning a latent up does."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from vitrail.backbones import load
from vitrail.coders import TopK
from vitrail.concepts.detection import largest
from vitrail.concepts.effect import effect
from vitrail.concepts.vocabulary import embed
from vitrail.images import open_images

POINT = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def toy():
    backbone = load("toy/clip")
    world = open_images("world:shapes?n=3&seed=4&split=val&image_px=64")
    images = torch.stack([backbone.preprocess(world.load(i)) for i in range(3)])
    assert backbone.text is not None
    return backbone, images, embed(backbone.text, ["star", "ring", "red thing", "thing on ice"])


def coder_at(width, rows=None, **more):
    coder = TopK(d_in=width, d_sae=6, k=2, normalization="none", seed=1, **more)
    if rows is not None:
        with torch.no_grad():
            coder.W_dec[: len(rows)].copy_(rows)
            coder.W_enc.copy_(coder.W_dec.t())
    return coder


def probabilities(backbone, output, words):
    return (backbone.text.logit_scale * normalize(output, dim=1) @ words.embeddings.t()).softmax(1)


@pytest.mark.parametrize("point", [POINT, "blocks.2.hook_mlp_out"])
@pytest.mark.parametrize("tokens", ["all", "spatial"])
def test_the_effect_is_that_of_a_splice_with_the_error_term(toy, point, tokens):
    backbone, images, words = toy
    coder = coder_at(backbone.d_model)
    with torch.no_grad():
        x = backbone.activations(images, [point])[point][:, backbone.grid.tokens(tokens)]
        highest = largest(coder.encode_sparse(x.flatten(0, 1)))
        latent = int(highest.argmax())
        named = effect(backbone, coder, images, point, tokens, np.array([latent]), words, highest=highest, strength=2.0)

        def turned_up(z, _point):
            z = z.clone()
            z[:, latent] = 2 * float(highest[latent])
            return z

        with backbone.with_coders({point: coder}, use_error_term=True, tokens=tokens, edit=turned_up):
            after = probabilities(backbone, backbone(images), words)
        change = (after - probabilities(backbone, backbone(images), words)).mean(0)
    assert named.names == (words.words[int(change.argmax())],)
    assert named.scores[0] == pytest.approx(float(change.max()), abs=1e-5)
    assert named.runner_up_scores[0] == pytest.approx(float(change.sort().values[-2]), abs=1e-5)
    assert named.scores[0] > 1e-3


def test_a_direction_that_is_a_word_raises_that_word(toy):
    backbone, images, words = toy
    coder = coder_at(backbone.d_embed, words.embeddings)
    live = np.arange(4)
    highest = np.full(6, 20.0)
    named = effect(backbone, coder, images, "hook_image_embed", "pooled", live, words, highest=highest)
    assert named.names == words.words
    assert (named.scores > named.runner_up_scores).all()


def test_what_cannot_be_is_told(toy):
    backbone, images, words = toy
    coder, live = coder_at(backbone.d_model), np.array([0])
    with pytest.raises(ValueError, match="strength must be positive"):
        effect(backbone, coder, images, POINT, "all", live, words, highest=np.ones(6), strength=0)
    with pytest.raises(ValueError, match="no words were given"):
        effect(backbone, coder, images, POINT, "all", live, None, highest=np.ones(6))
    with pytest.raises(ValueError, match="the coder reads 'pooled'"):
        effect(backbone, coder, images, POINT, "pooled", live, words, highest=np.ones(6))
