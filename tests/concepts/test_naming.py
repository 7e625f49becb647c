"""Names by each method, on latents whose meaning was planted."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from vitrail.coders import TopK
from vitrail.coders.sparse import Codes
from vitrail.concepts.naming import captions, decoder_rows, decoder_text, labels, top_images, top_two
from vitrail.concepts.vocabulary import stored_vocabulary

WORDS = ("sun", "moon", "star", "sea", "sand")


def words(d=6, seed=0):
    rows = torch.randn(len(WORDS), d, generator=torch.Generator().manual_seed(seed))
    return stored_vocabulary(WORDS, rows.numpy(), source="planted")


def coder_of(rows, **more):
    d_sae, d_in = rows.shape
    coder = TopK(d_in=d_in, d_sae=d_sae, k=1, normalization="none", **more)
    with torch.no_grad():
        coder.W_dec.copy_(rows)
    return coder


def test_top_two_is_a_sort_in_any_chunks():
    generator = torch.Generator().manual_seed(1)
    rows, others = torch.randn(23, 4, generator=generator), torch.randn(11, 4, generator=generator)
    slow = (rows @ others.t()).sort(1, descending=True)
    for at_once in (1, 5, 23, 100):
        two = top_two(rows, others, at_once=at_once)
        np.testing.assert_array_equal(two.first, slow.indices[:, 0])
        np.testing.assert_array_equal(two.second, slow.indices[:, 1])
        np.testing.assert_allclose(two.first_score, slow.values[:, 0], rtol=1e-6)
        np.testing.assert_allclose(two.second_score, slow.values[:, 1], rtol=1e-6)
    with pytest.raises(ValueError, match="two words at least"):
        top_two(rows, others[:1])


def test_directions_that_are_words_are_named_by_them():
    vocabulary = words()
    planted = [3, 0, 4, 0]
    named = decoder_text(coder_of(vocabulary.centred[planted]), vocabulary)
    assert named.names == ("sea", "sun", "sand", "sun")
    np.testing.assert_allclose(named.scores, 1, rtol=1e-5)
    assert (named.runner_up_scores < 1).all()
    # In model space words are as they are.
    raw = decoder_text(coder_of(vocabulary.embeddings[planted]), vocabulary, space="model")
    assert raw.names == named.names
    with pytest.raises(ValueError, match="7 dimensions, the words' 6"):
        decoder_text(coder_of(torch.eye(7)), vocabulary)


def test_model_space_and_bias_by_hand():
    coder = TopK(d_in=2, d_sae=1, k=1, normalization="mean_std")
    with torch.no_grad():
        coder.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
        coder.b_dec.copy_(torch.tensor([0.0, 1.0]))
    coder.normalize.mean.copy_(torch.tensor([0.0, 6.0]))
    coder.normalize.scale.fill_(8.0)
    coder.fitted.fill_(True)
    torch.testing.assert_close(decoder_rows(coder), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(decoder_rows(coder, keep_bias=True), torch.tensor([[1.0, 1.0]]) / 2**0.5)
    # 8 (1, 0) + (0, 6) = (8, 6); with the bias 8 (1, 1) + (0, 6) = (8, 14).
    torch.testing.assert_close(decoder_rows(coder, space="model"), torch.tensor([[0.8, 0.6]]))
    torch.testing.assert_close(
        decoder_rows(coder, space="model", keep_bias=True), normalize(torch.tensor([[8.0, 14.0]]), dim=1)
    )


def planted_pictures(vocabulary, n=60, seed=0):
    """Picture i shows word i % 5; latent j fires in the pictures of word j; latent 5 never does."""
    generator = torch.Generator().manual_seed(seed)
    shows = torch.arange(n) % len(WORDS)
    cone = torch.full((vocabulary.embeddings.shape[1],), 3.0)  # all pictures lie in one narrow cone
    noise = 0.1 * torch.randn(n, len(cone), generator=generator)
    embeddings = normalize(cone + vocabulary.embeddings[shows] + noise, dim=1)
    z = torch.zeros(n, len(WORDS) + 1)
    z[torch.arange(n), shows] = 1 + torch.rand(n, generator=generator)
    return Codes.from_dense(z), embeddings, shows.numpy()


def test_top_pictures_name_what_they_show():
    vocabulary = words()
    codes, embeddings, _ = planted_pictures(vocabulary)
    named = top_images(codes, embeddings, vocabulary, n_top=8)
    assert named.names == WORDS
    assert named.latents.tolist() == [0, 1, 2, 3, 4]  # the silent one has no name
    # The witness, slowly: latent 2's eight strongest pictures.
    strongest = codes.to_dense()[:, 2].topk(8).indices
    row = normalize(embeddings[strongest].mean(0) - embeddings.mean(0), dim=0)
    assert named.scores[2] == pytest.approx(float(row @ vocabulary.centred[2]), rel=1e-5)
    with pytest.raises(ValueError, match="one row a picture"):
        top_images(codes, embeddings[1:], vocabulary)


def test_labels_by_hand():
    # Latent 0 fires in both pictures of b and, more faintly, in one of a. z > 1: TP 2, FP 0: F1 1. For a, z > 0:
    # TP 1, FP 2, FN 2: 2/(2 + 2 + 2) = 1/3. Latent 2 fires in all of a: F1 1, and nowhere in b: 0.
    z = torch.tensor([[1.0, 0, 2], [0, 0, 3], [0, 0, 1], [2, 0, 0], [3, 0, 0], [5, 0, 0]])
    label = np.array([0, 0, 0, 1, 1, -1])  # the last has no class and counts for none
    named = labels(Codes.from_dense(z), label, ("a", "b"))
    assert named.latents.tolist() == [0, 2]
    assert named.names == ("b", "a")
    np.testing.assert_allclose(named.scores, [1, 1])
    np.testing.assert_allclose(named.runner_up_scores, [1 / 3, 0])
    with pytest.raises(ValueError, match="two classes"):
        labels(Codes.from_dense(z), np.zeros(6, dtype=int), ("a", "b"))


def test_captions_by_hand():
    z = torch.tensor([[3.0, 0], [2.0, 0], [0, 1.0], [0, 0]])
    said = ("a red star", "a red ring", "a blue star", None)
    named = captions(Codes.from_dense(z), said, n_top=2)
    # Latent 0: "red" in 2 of 2, in 2 of 3 of all: +1/3. "ring" 1/2 - 1/3. Latent 1: "blue" 1 - 1/3, "star" 1 - 2/3.
    assert named.names == ("red", "blue")
    np.testing.assert_allclose(named.scores, [1 / 3, 2 / 3])
    assert named.runners_up == ("ring", "star")
    np.testing.assert_allclose(named.runner_up_scores, [1 / 6, 1 / 3])
