"""Names for latents: what is most like a latent among words, classes or captions, and what comes second.

    decoder_text   cos(W_dec[i], word): a coder of the final embedding. In the coder's normalised space words are less
                   their mean, as its inputs are (MSAE appendix A, eq. 3); in model space the direction is put back
                   through the normalisation, as MSAE's code does. keep_bias: W_dec[i] + b_dec (SPEC rows 93, 94)
    top_images     cos(mean of the unit embeddings of the N top pictures less that of all pictures, word): any layer.
                   The mean of random pictures, without the draw; words are less their mean too
    labels         F1 of "z > threshold" for each class, at the best threshold: any backbone, pictures with labels
    captions       share of the N top pictures whose caption has the word, less the share of all pictures: with captions

`effect` (effect.py) is the fifth: what turning a latent up does to the model's answer. Words come in as a Vocabulary of
n words; products are made chunk by chunk, so that memory holds no latents x words.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vitrail.coders.base import SparseCoder
from vitrail.coders.sparse import Codes
from vitrail.concepts.vocabulary import Vocabulary
from vitrail.metrics.entries import Entries
from vitrail.metrics.monosemanticity import TopImages

Space = Literal["normalised", "model"]
N_TOP = 16
AT_ONCE = 512  # latents: with 20,000 words a chunk is 40 MB


class TopTwo(NamedTuple):
    """Of each row the best word and the second, and their scores."""

    first: Int[np.ndarray, " n"]
    first_score: Float[np.ndarray, " n"]
    second: Int[np.ndarray, " n"]
    second_score: Float[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Named:
    """Names of m latents, by one method. `cosines`: whether the scores are cosines, for which MSAE's rules are made."""

    method: str
    latents: Int[np.ndarray, " m"]
    names: tuple[str, ...]
    scores: Float[np.ndarray, " m"]
    runners_up: tuple[str, ...]
    runner_up_scores: Float[np.ndarray, " m"]
    cosines: bool

    @classmethod
    def of(
        cls, method: str, latents: Int[np.ndarray, " m"], two: TopTwo, words: Sequence[str], *, cosines: bool
    ) -> Self:
        names = tuple(words[int(j)] for j in two.first)
        seconds = tuple(words[int(j)] for j in two.second)
        return cls(method, latents, names, two.first_score, seconds, two.second_score, cosines)


@torch.no_grad()
def top_two(rows: Float[Tensor, "n d"], words: Float[Tensor, "n_words d"], *, at_once: int = AT_ONCE) -> TopTwo:
    """The two largest products of each row with the words; of equals the earlier word. n_words must be 2 or more."""
    if len(words) < 2:
        raise ValueError(f"a name and its runner-up need two words at least, got {len(words)}.")
    n = len(rows)
    places, scores = torch.zeros(2, n, dtype=torch.long), torch.zeros(2, n)
    turned = words.t()
    product = torch.empty(min(at_once, n), len(words), dtype=rows.dtype, device=rows.device)  # one buffer for all
    for start in range(0, n, at_once):
        part = rows[start : start + at_once]
        cosines = torch.mm(part, turned, out=product[: len(part)])
        for which in range(2):
            best, at = cosines.max(1)
            scores[which, start : start + at_once], places[which, start : start + at_once] = best.cpu(), at.cpu()
            cosines[torch.arange(len(part), device=rows.device), at] = -torch.inf
    first, second = places.numpy()
    return TopTwo(first, scores[0].numpy().astype(np.float64), second, scores[1].numpy().astype(np.float64))


@torch.no_grad()
def decoder_rows(coder: SparseCoder, *, space: Space = "normalised", keep_bias: bool = False) -> Float[Tensor, "m d"]:
    """A unit row a latent, on the CPU. Raises ValueError for a space that is neither "normalised" nor "model"."""
    rows = coder.W_dec + coder.output_bias() if keep_bias else coder.W_dec
    if space == "model":
        # Where each row is normalised by its own numbers there is no one way back; scale 1 leaves directions.
        rows = coder.normalize.invert(rows, rows.new_zeros(len(rows), 1), rows.new_ones(len(rows), 1))
    elif space != "normalised":
        raise ValueError(f"space must be 'normalised' or 'model', got {space!r}.")
    return normalize(rows.detach().float().cpu(), dim=1)


def decoder_text(
    coder: SparseCoder, vocabulary: Vocabulary, *, space: Space = "normalised", keep_bias: bool = False
) -> Named:
    """Names of all latents of a coder of the final embedding, by cosine of direction and word: -1..1.

    In model space words are as the tower gives them. Raises ValueError where the coder writes in another space than
    that of the words.
    """
    if coder.d_out != vocabulary.embeddings.shape[1]:
        raise ValueError(
            f"the coder's directions have {coder.d_out} dimensions, the words' {vocabulary.embeddings.shape[1]}: only "
            "coders of hook_image_embed are in the words' space. Use top_images, effect or labels."
        )
    words = vocabulary.centred if space == "normalised" else vocabulary.embeddings
    two = top_two(decoder_rows(coder, space=space, keep_bias=keep_bias), words)
    return Named.of("decoder_text", np.arange(coder.d_sae), two, vocabulary.words, cosines=True)


def top_images(
    codes: Codes, embeddings: Float[Tensor, "n d_embed"], vocabulary: Vocabulary, *, n_top: int = N_TOP
) -> Named:
    """Names of the latents that fire in a picture at least, by cosine of their top pictures' mean and word: -1..1.

    `codes`: one row a picture (Firing.images); `embeddings`: unit rows of the same pictures.
    """
    _check_pictures(codes, len(embeddings))
    means, latents = top_means(codes, embeddings, n_top)
    rows = normalize(means - embeddings.mean(0), dim=1)
    return Named.of("top_images", latents, top_two(rows, vocabulary.centred), vocabulary.words, cosines=True)


def top_means(
    codes: Codes, embeddings: Float[Tensor, "n d_embed"], n_top: int
) -> tuple[Float[Tensor, "m d_embed"], Int[np.ndarray, " m"]]:
    """The mean embedding of each firing latent's top pictures (fewer than n_top where it fires in fewer)."""
    images = TopImages.of_codes(codes, n_top).images
    latents = np.flatnonzero(images[:, 0] >= 0)
    means = torch.zeros(len(latents), embeddings.shape[1])
    for row, latent in enumerate(latents.tolist()):
        means[row] = embeddings[torch.from_numpy(images[latent][images[latent] >= 0])].mean(0)
    return means, latents


def labels(codes: Codes, label: Int[np.ndarray, " n"], classes: Sequence[str]) -> Named:
    """Names of the latents that fire, by the largest F1 over thresholds with a class, 0..1 (entries.py).

    Pictures labelled -1 have no class and count for none. Raises ValueError if fewer than two classes have pictures.
    """
    _check_pictures(codes, len(label))
    seen = [one for one in range(len(classes)) if bool((label == one).any())]
    if len(seen) < 2:
        raise ValueError(f"naming by labels needs pictures of two classes at least, got {len(seen)}.")
    entries, known = Entries(codes), None if bool((label >= 0).all()) else label >= 0
    best = np.full((2, codes.d_sae), -np.inf)
    place = np.zeros((2, codes.d_sae), dtype=np.int64)
    for one in seen:
        f1, _, _ = entries.best((label == one, known))
        first, second = f1 > best[0], (f1 > best[1]) & (f1 <= best[0])
        best[1], place[1] = np.where(first, best[0], best[1]), np.where(first, place[0], place[1])
        best[0], place[0] = np.where(first, f1, best[0]), np.where(first, one, place[0])
        best[1], place[1] = np.where(second, f1, best[1]), np.where(second, one, place[1])
    fires = entries.fired
    two = TopTwo(place[0, fires], best[0, fires], place[1, fires], best[1, fires])
    return Named.of("labels", fires, two, classes, cosines=False)


def captions(codes: Codes, said: Sequence[str | None], *, n_top: int = N_TOP) -> Named:
    """Names of the latents that fire, by words of the top pictures' captions: difference of shares, -1..1.

    Pictures without a caption say nothing. Raises ValueError if the captions have fewer than two words. SPEC row 99.
    """
    _check_pictures(codes, len(said))
    words_of = [set(re.findall(r"[^\W_][\w'-]*", text.lower())) if text else set[str]() for text in said]
    told = np.array([text is not None for text in said])
    overall = Counter(word for words in words_of for word in words)
    words = sorted(overall)
    if len(words) < 2:
        raise ValueError(f"naming by captions needs two words at least, the captions have {len(words)}.")
    share = np.array([overall[word] for word in words]) / told.sum()
    column = {word: j for j, word in enumerate(words)}
    images = TopImages.of_codes(codes, n_top).images
    latents = np.flatnonzero((images >= 0).any(1))
    two = np.zeros((2, len(latents)), dtype=np.int64), np.zeros((2, len(latents)))
    for row, latent in enumerate(latents.tolist()):
        top = [image for image in images[latent].tolist() if image >= 0 and told[image]]
        lift = -share
        if top:
            counted = Counter(word for image in top for word in words_of[image])
            lift = lift.copy()
            lift[[column[word] for word in counted]] += np.array(list(counted.values())) / len(top)
        order = np.argsort(-lift, kind="stable")[:2]
        two[0][:, row], two[1][:, row] = order, lift[order]
    found = TopTwo(two[0][0], two[1][0], two[0][1], two[1][1])
    return Named.of("captions", latents, found, words, cosines=False)


def _check_pictures(codes: Codes, n: int) -> None:
    if codes.n != n:
        raise ValueError(f"{codes.n} rows of codes, {n} pictures: there must be one row a picture (Firing.images).")
