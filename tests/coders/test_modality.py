"""Coders of one modality in use on another."""

import pytest
import torch
from coder_examples import BASELINES, CODERS, D_IN, fitted, planted, rows, train_briefly

from vitrail.coders import MultiSource, Transcoder, load_coder, save_coder
from vitrail.coders.modality import for_modality
from vitrail.coders.normalize import NORMALIZATIONS
from vitrail.statistics import ActivationStats


@pytest.fixture(scope="module")
def two_modalities():
    """The same sparse concepts, seen by images and by texts: the texts' cloud is smaller and lies elsewhere."""
    images, _ = planted(6000)
    gap = torch.linspace(-3, 3, D_IN)
    return images[:4000], 0.2 * images[4000:] + gap


def fvu(coder, x):
    return ((coder(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item()


def test_a_coder_of_images_reads_texts_by_the_texts_own_mean_and_scale(two_modalities):
    images, texts = two_modalities
    coder = train_briefly(fitted("topk", images, d_sae=40, k=3), images)
    before = {key: value.clone() for key, value in coder.state_dict().items()}
    of_texts = for_modality(coder, ActivationStats.of(texts))
    assert fvu(coder, images) < 0.1
    assert fvu(coder, texts) > 1  # nothing but the gap
    assert fvu(of_texts, texts) < 0.15
    assert all(torch.equal(value, before[key]) for key, value in coder.state_dict().items())
    for key in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(of_texts.state_dict()[key], before[key])
    # The same concepts fire: texts brought back to the images' place and size give the same codes.
    moved = (texts - texts.mean(0)) / of_texts.normalize.scale * coder.normalize.scale + coder.normalize.mean
    torch.testing.assert_close(of_texts.encode(texts), coder.encode(moved), rtol=1e-3, atol=1e-3)


OF_ONE_POINT = [name for name, coder in (CODERS | BASELINES).items() if not issubclass(coder, Transcoder | MultiSource)]


@pytest.mark.parametrize("name", sorted(OF_ONE_POINT))
@pytest.mark.parametrize("normalization", ["mean_std", "mean_norm"])
def test_the_copy_is_a_coder_fitted_to_the_other_statistics(name, normalization, tmp_path):
    coder, x = fitted(name, normalization=normalization), rows(seed=8) * 3 - 5
    other = for_modality(coder, ActivationStats.of(x))
    y = other.normalize(x).y
    torch.testing.assert_close(y.mean(0), torch.zeros(D_IN), rtol=0, atol=1e-4)
    assert not torch.equal(other.encode(x), coder.encode(x))
    save_coder(tmp_path, other)
    assert torch.equal(load_coder(tmp_path)(x), other(x))
    assert load_coder(tmp_path).calibration["normalization_refitted_on_rows"] == len(x)


@pytest.mark.parametrize("normalization", [name for name, kind in NORMALIZATIONS.items() if not kind.needs_fit])
def test_where_nothing_is_fitted_nothing_changes(normalization):
    coder, x = fitted("topk", normalization=normalization), rows(seed=8)
    assert torch.equal(for_modality(coder, ActivationStats.of(x))(x), coder(x))


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match=f"of 3 dimensions; this coder has d_in={D_IN}"):
        for_modality(fitted("topk"), ActivationStats.of(torch.randn(5, 3)))
    for name in ("topk_transcoder", "crosscoder"):
        with pytest.raises(ValueError, match=f"a {name} coder reads and writes several points"):
            for_modality(fitted(name), ActivationStats.of(rows()))
