"""From pictures to a folder of concepts: name on one half by every method there is, try the names on the other.

    OUT/concepts.parquet, OUT/concepts.json, OUT/review.csv     table.py

Without a text tower the words are the names of the pictures' classes, each with the mean embedding of its pictures
(vocabulary.py: class_vocabulary).
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from vitrail.backbones.base import Backbone
from vitrail.backbones.text import OPENAI_SIMPLE
from vitrail.coders.base import SparseCoder
from vitrail.coders.sparse import Codes
from vitrail.concepts.detection import MARGIN, Detection, best_concepts, best_words, class_f1s, detect, firing, largest
from vitrail.concepts.effect import effect
from vitrail.concepts.naming import N_TOP, Named, Space, captions, decoder_text, labels, top_images
from vitrail.concepts.pictures import Pictures, read_pictures
from vitrail.concepts.table import METHODS, Concept, to_json, write_concepts, write_review
from vitrail.concepts.validation import (
    COSINE,
    RATIO,
    agreement,
    content_words,
    rule_counts,
    validated,
    with_truth,
)
from vitrail.concepts.vocabulary import Vocabulary, class_vocabulary, embed
from vitrail.files import tensors_digest
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.monosemanticity import TopImages
from vitrail.metrics.truth import Pool
from vitrail.progress import SILENT, Progress
from vitrail.provenance import provenance


@dataclass(frozen=True, kw_only=True)
class NamingOptions:
    """`methods` empty: all that coder, backbone and pictures allow. `above`: detection.py."""

    methods: tuple[str, ...] = ()
    templates: tuple[str, ...] = OPENAI_SIMPLE
    space: Space = "normalised"
    keep_bias: bool = False
    n_top: int = N_TOP
    above: float = 0.0
    cosine: float = COSINE
    ratio: float = RATIO
    margin: float = MARGIN
    n_effect_images: int = 4
    n_random: int = 200
    pool: Pool = "max"
    batch_size: int = 64
    n_bootstrap: int = 500
    seed: int = 0


def name_latents(
    backbone: Backbone,
    coder: SparseCoder,
    images: ImageSource,
    out: str | Path,
    *,
    point: str,
    tokens: str,
    words: Sequence[str],
    source: str = "words",
    cache: str | Path | None = None,
    vocabulary: Vocabulary | None = None,
    options: NamingOptions | None = None,
    said: Mapping[str, Any] | None = None,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> dict[str, dict[str, Any]]:
    """Writes the folder; returns, by method, counts per rule, how many are valid, and means over latents.

    `vocabulary` takes the place of `words`: embeddings that were made elsewhere. `said` goes into concepts.json.
    Raises ValueError for a method that needs what is not there, and where there are neither words nor labels.
    """
    options = options or NamingOptions()
    if not 0 <= options.above < 1:
        raise ValueError(f"above is a share of the largest activation, in 0..1 without 1, got {options.above}.")
    pictures = read_pictures(
        backbone,
        images,
        coder,
        point,
        tokens,
        pool=options.pool,
        batch_size=options.batch_size,
        n_workers=n_workers,
        progress=progress,
    )
    naming, trying = pictures.halves(seed=options.seed)
    said_in_words = vocabulary is not None or backbone.text is not None
    methods = _methods(options.methods, backbone, point, pictures, said_in_words=said_in_words)
    if vocabulary is None:
        vocabulary = _vocabulary(backbone, words, naming, source, cache, options)
    highest = largest(naming.codes)
    limit = options.above * highest
    named: dict[str, Named] = {}
    for method in methods:
        if method == "decoder_text":
            every = decoder_text(coder, vocabulary, space=options.space, keep_bias=options.keep_bias)
            named[method] = every
        elif method == "top_images":
            named[method] = top_images(naming.codes, naming.embeddings, vocabulary, n_top=options.n_top)
        elif method == "labels":
            named[method] = labels(firing(naming.codes, limit), naming.labels, naming.classes)
        elif method == "captions":
            named[method] = captions(naming.codes, naming.captions, n_top=options.n_top)
        else:
            shown = _load(backbone, images, naming, options)
            live = np.flatnonzero(highest > 0)
            by = None if backbone.text is None and backbone.class_names and backbone.n_classes else vocabulary
            named[method] = effect(backbone, coder, shown, point, tokens, live, by, highest=highest, progress=progress)
    fires = pictures.codes.fired().numpy() / pictures.n
    rows = tried(named, trying, vocabulary, backbone, limit, options, fires, naming=naming)
    if pictures.truth is not None:
        live = np.flatnonzero(fires > 0).tolist()
        best = best_concepts(firing(pictures.codes, limit), pictures.truth, live)
        # Classes are not among the concepts: what labels name is judged by detection alone.
        judged = [row for row in rows if row.method != "labels"]
        rows = with_truth(judged, best, pictures.truth.concepts) + [row for row in rows if row.method == "labels"]
    out = Path(out)
    summary = {method: summary_of([row for row in rows if row.method == method]) for method in methods}
    spaces = _spaces(coder, vocabulary, options) if "decoder_text" in methods else None
    write_concepts(out / "concepts.parquet", rows)
    about = {
        "backbone": backbone.name,
        "point": point,
        "tokens": tokens,
        "coder_digest": tensors_digest(coder.state_dict()),
        "images": images.spec,
        "n_images": {"naming": naming.n, "held_out": trying.n},
        "words": {"source": vocabulary.source, "n": len(vocabulary.words), "digest": vocabulary.digest},
        "options": asdict(options),
        "methods": summary,
        "decoder_text_spaces": spaces,
        "agreement": agreement(rows),
        "provenance": provenance(),
        **(said or {}),
    }
    to_json(out / "concepts.json", rows, about)
    tops = TopImages.of_codes(naming.codes, max(2, options.n_top)).images[:, :5]
    examples = {row.latent: [naming.ids[one] for one in tops[row.latent] if one >= 0] for row in rows}
    said_of = {
        row.latent: [naming.captions[one] or "" for one in tops[row.latent] if one >= 0 and naming.captions[one]]
        for row in rows
    }
    write_review(out / "review.csv", rows, examples, said_of)
    return summary


def tried(
    named: Mapping[str, Named],
    trying: Pictures,
    vocabulary: Vocabulary,
    backbone: Backbone,
    limit: Float[np.ndarray, " d_sae"],
    options: NamingOptions,
    fires: Float[np.ndarray, " d_sae"],
    *,
    naming: Pictures | None = None,
) -> list[Concept]:
    """Rules and held-out detection of every name. `limit`: above which a latent counts as firing.

    `naming`: the pictures the names were found on, and rivals are; None: names have no rivals.
    """
    rng = np.random.default_rng(options.seed)
    n_random = min(options.n_random, len(vocabulary.words))
    random = vocabulary.embeddings[torch.from_numpy(rng.permutation(len(vocabulary.words))[:n_random])]
    known = rows_of({name for one in named.values() for name in one.names}, vocabulary, backbone, options)
    codes = firing(trying.codes, limit)
    found = None if naming is None else firing(naming.codes, limit)
    rows: list[Concept] = []
    for one in named.values():
        rivals = words = None
        if naming is not None and found is not None:
            rivals, words = rivals_of(one, found, naming.embeddings, vocabulary)
        each = torch.stack([known[name] for name in one.names]) if one.names else random[:0]
        detections: list[Detection | None] = detect(
            codes,
            trying.embeddings,
            one.latents,
            each,
            random,
            rivals=rivals,
            n_bootstrap=options.n_bootstrap,
            seed=options.seed,
        )
        if one.method == "labels" and naming is not None:
            classes = np.array([naming.classes.index(name) for name in one.names], dtype=np.int64)
            f1s = class_f1s(naming.codes, naming.labels, trying.codes, trying.labels, one.latents, classes)
            detections = [
                None if seen is None else replace(seen, class_f1=f1)
                for seen, f1 in zip(detections, f1s.tolist(), strict=True)
            ]
        rows += validated(
            one,
            cosine=options.cosine,
            ratio=options.ratio,
            margin=options.margin,
            detections=detections,
            fires=fires,
            rivals=words,
        )
    return rows


def rivals_of(
    named: Named, codes: Codes, embeddings: Float[Tensor, "n d_embed"], vocabulary: Vocabulary
) -> tuple[Float[Tensor, "m d_embed"], list[str]]:
    """For each latent the row of the word that detects it best on these pictures, of those that say something other
    than its name, and the word; zeros and "" for none."""
    saying: dict[tuple[str, ...], list[int]] = {}
    for j, word in enumerate(vocabulary.words):
        saying.setdefault(content_words(word), []).append(j)
    barred = [saying.get(content_words(name), []) for name in named.names]
    best = torch.from_numpy(best_words(codes, embeddings, named.latents, vocabulary.embeddings, barred))
    words = [vocabulary.words[j] if j >= 0 else "" for j in best.tolist()]
    return vocabulary.embeddings[best.clamp(min=0)] * (best >= 0)[:, None], words


def rows_of(
    names: set[str], vocabulary: Vocabulary, backbone: Backbone, options: NamingOptions
) -> dict[str, Float[Tensor, " d_embed"]]:
    """Each name's unit row: the vocabulary's, or the text tower's; zeros for a name that neither knows."""
    rows = {name: vocabulary.embeddings[vocabulary.place[name]] for name in names if name in vocabulary.place}
    missing = sorted(names - rows.keys())
    if missing and backbone.text is not None:
        # With two words of the vocabulary, which can be read: embed wants two at least.
        asked = [*missing, *vocabulary.words[:2]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            more = embed(backbone.text, asked, vocabulary.templates or options.templates, skip_unknown=True)
        rows |= {name: more.embeddings[more.place[name]] for name in missing if name in more.place}
    silent = torch.zeros(vocabulary.embeddings.shape[1])
    return {name: rows.get(name, silent) for name in names}


def summary_of(rows: Sequence[Concept]) -> dict[str, Any]:
    """Counts per rule, how many are valid, means over latents where detection was measured, and shares that are true.

    None where nothing was measured.
    """
    measured = [row for row in rows if row.detection_auc is not None]
    judged = [row for row in rows if row.truth is not None]
    return {
        "rules": rule_counts(rows),
        "valid": sum(row.valid for row in rows),
        "detection_measured": len(measured),
        "detection_auc": _mean([row.detection_auc for row in measured]),
        "detection_random": _mean([row.detection_random for row in measured]),
        "true": _mean([row.true for row in judged]),
        "true_of_valid": _mean([row.true for row in judged if row.valid]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    return float(np.mean([float(value or 0) for value in values])) if values else None


def _vocabulary(
    backbone: Backbone,
    words: Sequence[str],
    naming: Pictures,
    source: str,
    cache: str | Path | None,
    options: NamingOptions,
) -> Vocabulary:
    if backbone.text is None:
        if not naming.classes:
            raise ValueError(f"{backbone.name} has no text tower and the pictures have no labels: there are no words.")
        return class_vocabulary(
            normalize(naming.embeddings - naming.embeddings.mean(0), dim=1), naming.labels, naming.classes
        )
    return embed(
        backbone.text,
        words,
        options.templates,
        cache=cache,
        identity=backbone.digest,
        skip_unknown=True,
        source=source,
    )


def _methods(
    asked: Sequence[str], backbone: Backbone, point: str, pictures: Pictures, *, said_in_words: bool
) -> tuple[str, ...]:
    """Those that can be used here, or those asked for. Raises ValueError for one that cannot."""
    answers = bool(backbone.class_names) or not backbone.n_classes
    lacking = {
        "decoder_text": ""
        if point == "hook_image_embed" and said_in_words
        else "a coder of hook_image_embed and a text tower",
        "top_images": "",
        "effect": "" if answers else "class names or a text tower",
        "captions": "" if any(pictures.captions) else "pictures with captions",
        "labels": "" if len(set(pictures.labels.tolist()) - {-1}) > 1 else "pictures with labels of two classes",
    }
    for method in asked:
        if method not in METHODS:
            raise ValueError(f"there is no naming method {method!r}. Known: {', '.join(METHODS)}.")
        if lacking[method]:
            raise ValueError(f"naming by {method} needs {lacking[method]}. Possible here: {', '.join(_free(lacking))}.")
    return tuple(dict.fromkeys(asked)) or _free(lacking)


def _free(lacking: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(method for method in METHODS if not lacking[method])


def _load(
    backbone: Backbone, images: ImageSource, naming: Pictures, options: NamingOptions
) -> Float[Tensor, "b 3 h w"]:
    """A few of the naming pictures, preprocessed."""
    rng = np.random.default_rng(options.seed)
    at = naming.positions[rng.permutation(naming.n)[: options.n_effect_images]].tolist()
    batches = load_batches(images, at, backbone.preprocess, batch_size=len(at))
    with closing(batches):
        return next(batches).images


def _spaces(coder: SparseCoder, vocabulary: Vocabulary, options: NamingOptions) -> list[dict[str, Any]]:
    """Counts per rule of decoder_text in both spaces, with b_dec and without: SPEC row 94 asks for both."""
    table = []
    spaces: tuple[Space, ...] = ("normalised", "model")
    for space in spaces:
        for keep_bias in (False, True):
            one = decoder_text(coder, vocabulary, space=space, keep_bias=keep_bias)
            rows = validated(one, cosine=options.cosine, ratio=options.ratio)
            largest_score = float(one.scores.max())
            table.append({"space": space, "keep_bias": keep_bias, "largest": largest_score, **rule_counts(rows)})
    return table
