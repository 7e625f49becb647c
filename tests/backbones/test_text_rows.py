"""Captions as rows, and a coder trained on them."""

import pytest
import torch
from small_backbones import build_case

from vitrail.backbones.text_rows import text_rows
from vitrail.coders import make_coder
from vitrail.training import TensorSource, TrainConfig, train

THINGS, COLOURS, PLACES = ("cat", "dog", "tree", "car"), ("red", "blue", "green"), ("sea", "street", "field")
CAPTIONS = [f"a {colour} {thing} by the {place}" for thing in THINGS for colour in COLOURS for place in PLACES]


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_rows_are_those_of_the_text_tower_in_order(batch_size):
    backbone = build_case("open_clip").backbone
    found = text_rows(backbone, CAPTIONS, batch_size=batch_size)
    assert found.shape == (36, backbone.d_embed)
    assert not found.requires_grad
    torch.testing.assert_close(found, backbone.text.encode(CAPTIONS))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(36))


def test_a_coder_learns_from_texts_as_from_anything(tmp_path):
    x = text_rows(build_case("open_clip").backbone, CAPTIONS)
    coder = make_coder("matryoshka", d_in=x.shape[1], d_sae=64, ks=[2, 4, 64], inference_k=4)
    config = TrainConfig(n_rows=6_000, lr=5e-3, warmup_steps=5)
    result = train(coder, TensorSource(x, batch_size=32), tmp_path, config=config, metadata={"modality": "text"})
    x_hat = result.coder(x)
    assert (x_hat - x).square().sum() < 0.5 * (x - x.mean(0)).square().sum()


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="toy/random has no text tower"):
        text_rows(build_case("toy").backbone, ["a cat"])
    for texts in ([], "a cat"):
        with pytest.raises(ValueError, match="a list of at least one string"):
            text_rows(build_case("open_clip").backbone, texts)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        text_rows(build_case("open_clip").backbone, ["a cat"], batch_size=0)
