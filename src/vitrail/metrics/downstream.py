"""What can be done with features: finding alike pictures, naming their class, segmenting them. ViSAEBench's tasks.

    retrieval      R@k: share of pictures among whose k nearest others one is of the same class
    nearest        accuracy of the most common class among the k nearest training pictures
    linear         accuracy of multinomial logistic regression
    segmentation   mean over classes of I / U, summed over patches: a linear head on patches against labels of patches
    lift           the number on codes over the number on raw features, of the same pictures

on raw features, reconstructions (tensors) or codes (`Codes`, CSR): each function takes either.

Range. 0..1, higher is better; lift has no upper end. Chance is the share of the commonest class (linear, nearest);
for R@k 1 - (1 - p)^k or so, p the share of a class.

Moves with. The number of classes and pictures: R@1 falls as pictures of other classes are added. Cosines, with whatever
mean the rows share. Regularisation: C = 1 means little for features of large variance and much for small ones, so that
a rescaled coder has another accuracy.

Does not show. That codes hold more than the features they were made of: they cannot, and a lift above 1 says that the
linear head finds it more easily in more dimensions. Raw is the denominator of lift: noise in it alone makes the two
correlate negatively over backbones (studies/hypotheses.py: codes_lift).

Source. ViSAEBench section 4.5 and appendices L, M, O and P; SPEC rows 85 to 88. Retrieval leaves one out, by cosine,
and counts a hit where the class is the same: the paper does not say. Pictures alone in their class are asked nothing,
but may be found. Logistic regression: lbfgs, C = 1 as in the paper, to its optimum, in float64; features are not
standardised. Segmentation: one linear layer on patches, and labels of patches; for pixels, `upsampled` brings its
scores to any size first.

Tags. "leave-one-out, cosine" and so on, each saying how near is meant. Intervals are a bootstrap over test pictures.

Cost. Retrieval and nearest compare all pairs, in blocks; L1 between codes costs pictures x entries. Logistic
regression (multinomial.py) costs 2 x entries x classes a step, a hundred steps or so; where pictures are fewer than
dimensions their number stands for both.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.metrics.features import Features, checked, n_rows, product, select, unit_rows, width
from vitrail.metrics.measured import Measured, over_images
from vitrail.metrics.multinomial import fit_logistic

Similarity = Literal["cosine", "l1"]
BLOCK_VALUES = 2**24


def retrieval(
    features: Features,
    labels: Int[Tensor, " n_labels"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    similarity: Similarity = "cosine",
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Measured]:
    """`retrieval_r@1`, ...: each picture asks all the others. Of equally near ones the earlier comes first.

    Raises ValueError if no two pictures share a class.
    """
    n, labels = checked(features, labels)
    if not ks or min(ks) < 1 or max(ks) >= n:
        raise ValueError(f"R@k looks at k of the {n - 1} other pictures: got k = {list(ks)}.")
    asks = torch.bincount(labels, minlength=int(labels.max()) + 1)[labels] > 1
    if not bool(asks.any()):
        raise ValueError(f"each of the {n} pictures is alone in its class: there is nothing to be found.")
    order = nearest(features, features, max(ks), similarity=similarity, leave_one_out=True)
    hit = (labels[order] == labels[:, None])[asks]
    tag = f"leave-one-out, {similarity}"
    return {f"retrieval_r@{k}": _share(hit[:, :k].any(1), tag, n_bootstrap, seed) for k in ks}


def nearest(
    queries: Features, gallery: Features, k: int, *, similarity: Similarity = "cosine", leave_one_out: bool = False
) -> Int[Tensor, "n k"]:
    """The k nearest rows of `gallery` to each row of `queries`, nearest first; of equal ones the earlier row."""
    if similarity not in ("cosine", "l1"):
        raise ValueError(f"similarity must be 'cosine' or 'l1', got {similarity!r}.")
    if width(queries) != width(gallery):
        raise ValueError(f"rows of {width(queries)} and of {width(gallery)} dimensions cannot be compared.")
    if similarity == "cosine":
        queries, gallery = unit_rows(queries), unit_rows(gallery)
    n, m = n_rows(queries), n_rows(gallery)
    at_once = max(1, BLOCK_VALUES // max(m, width(gallery)))
    found = []
    for start in range(0, n, at_once):
        rows = torch.arange(start, min(start + at_once, n))
        near = (_dots if similarity == "cosine" else _minus_l1)(select(queries, rows), gallery)
        if leave_one_out:
            near[torch.arange(len(rows)), rows] = -math.inf
        # Rounded: equal rows should be equally near whatever block they were in.
        found.append(_first_largest(near.mul(2**40).round() if similarity == "cosine" else near, k))
    return torch.cat(found)


def nearest_accuracy(
    train: Features,
    train_labels: Int[Tensor, " n_train"],
    test: Features,
    test_labels: Int[Tensor, " n_test"],
    *,
    k: int = 20,
    similarity: Similarity = "cosine",
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Measured:
    """The most common class of the k nearest; of equally common ones the smaller number."""
    n, train_labels = checked(train, train_labels)
    _, test_labels = checked(test, test_labels)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, the training pictures, got {k}.")
    votes = train_labels[nearest(test, train, k, similarity=similarity)]
    counts = torch.zeros(len(votes), int(train_labels.max()) + 1, dtype=torch.long)
    counts.scatter_add_(1, votes, torch.ones_like(votes))
    right = _first_largest(counts.double(), 1)[:, 0] == test_labels
    return _share(right, f"{k}-nearest, {similarity}", n_bootstrap, seed)


# -- linear


def linear_accuracy(
    train: Features,
    train_labels: Int[Tensor, " n_train"],
    test: Features,
    test_labels: Int[Tensor, " n_test"],
    *,
    c: float = 1.0,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Measured:
    """On test pictures; a test class that training pictures lack counts as wrong."""
    right = linear_hits(train, train_labels, test, test_labels, c=c)
    return _share(right, f"logistic, C={c:g}", n_bootstrap, seed)


def linear_hits(
    train: Features,
    train_labels: Int[Tensor, " n_train"],
    test: Features,
    test_labels: Int[Tensor, " n_test"],
    *,
    c: float = 1.0,
) -> Bool[Tensor, " n_test"]:
    """Which test pictures are named right: for ratios of two representations over the same pictures (`lift`)."""
    _, test_labels = checked(test, test_labels)
    return fit_logistic(train, train_labels, c=c).predict(test) == test_labels


def lift(
    hits: Bool[Tensor, " n"], raw_hits: Bool[Tensor, " n_raw"], *, n_bootstrap: int = 1000, seed: int = 0
) -> Measured:
    """Share of hits over share of raw hits, over the same test pictures, which are drawn as pairs. NaN without any."""
    if len(hits) != len(raw_hits):
        raise ValueError(f"{len(hits)} and {len(raw_hits)} pictures: both must be asked about the same ones.")
    columns = {"ours": hits.double().numpy(), "raw": raw_hits.double().numpy()}
    return over_images(
        columns, lambda s: s["ours"] / s["raw"], definition="ratio, paired", n_bootstrap=n_bootstrap, seed=seed
    )


# -- segmentation


def segmentation(
    train: Features,
    train_labels: Int[Tensor, " n_train"],
    test: Features,
    test_labels: Int[Tensor, " n_test"],
    *,
    n_tokens: int,
    n_classes: int | None = None,
    ignore: int | None = None,
    c: float = 1.0,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Measured]:
    """`segmentation_miou` and `segmentation_accuracy` of patches. Rows are patches, image-major, `n_tokens` a picture.

    `ignore`: a label whose patches are left out, of fitting and of scoring.
    """
    _, train_labels = checked(train, train_labels)
    _, test_labels = checked(test, test_labels)
    n_classes = int(max(train_labels.max(), test_labels.max())) + 1 if n_classes is None else n_classes
    if ignore is not None:
        kept = torch.nonzero(train_labels != ignore)[:, 0]
        train, train_labels = select(train, kept), train_labels[kept]
    head = fit_logistic(train, train_labels, n_classes=n_classes, c=c)
    given = {"n_classes": n_classes, "ignore": ignore, "n_bootstrap": n_bootstrap, "seed": seed}
    return miou(head.predict(test).reshape(-1, n_tokens), test_labels.reshape(-1, n_tokens), **given)


def miou(
    predicted: Int[Tensor, "n_images n_places"],
    labels: Int[Tensor, "n_images n_places"],
    *,
    n_classes: int,
    ignore: int | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Measured]:
    """`segmentation_miou`, over the classes that are there or predicted, and `segmentation_accuracy`.

    Intersections and unions are summed over all pictures before they are divided. Places are patches or pixels; where
    the label is `ignore` a place counts nowhere, and the class has no IoU.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"predictions {tuple(predicted.shape)} and labels {tuple(labels.shape)} must match.")
    counts = labels != ignore if ignore is not None else torch.ones_like(labels, dtype=torch.bool)
    for name, values in (("labels", labels[counts]), ("predictions", predicted)):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < n_classes:
            raise ValueError(f"{name} must be in 0..{n_classes - 1}, got {int(values.min())}..{int(values.max())}.")
    image = torch.arange(len(labels))[:, None].expand_as(labels)[counts]

    def per_image(classes: Tensor, which: Tensor) -> np.ndarray:
        flat = torch.bincount(image[which] * n_classes + classes[which], minlength=len(labels) * n_classes)
        return flat.reshape(len(labels), n_classes).double().numpy()

    shown, said = labels[counts], predicted[counts]
    every = torch.ones_like(shown, dtype=torch.bool)
    both, one, other = per_image(shown, shown == said), per_image(shown, every), per_image(said, every)
    classes = [k for k in range(n_classes) if k != ignore]
    columns = {f"i{k}": both[:, k] for k in classes} | {f"u{k}": (one + other - both)[:, k] for k in classes}
    columns |= {"right": both.sum(1), "all": one.sum(1)}

    def mean(sums: dict[str, np.ndarray]) -> np.ndarray:
        union = np.stack([sums[f"u{k}"] for k in classes])
        iou = np.stack([sums[f"i{k}"] for k in classes]) / np.maximum(union, 1)
        return iou.sum(0) / (union > 0).sum(0)

    given = {"n_bootstrap": n_bootstrap, "seed": seed}
    return {
        "segmentation_miou": over_images(columns, mean, definition="patches, linear", **given),
        "segmentation_accuracy": over_images(
            {name: columns[name] for name in ("right", "all")},
            lambda s: s["right"] / s["all"],
            definition="patches, linear",
            **given,
        ),
    }


def upsampled(
    scores: Float[Tensor, "n_patches_in_all n_classes"], grid: tuple[int, int], size: tuple[int, int]
) -> Int[Tensor, "n_images height width"]:
    """The class of each pixel, from a linear head's scores of patches, bilinearly between patch centres."""
    maps = scores.reshape(-1, *grid, scores.shape[1]).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False).argmax(1)


# -- helpers


def _dots(queries: Features, gallery: Features) -> Float[Tensor, "b m"]:
    dense = queries.to_dense() if isinstance(queries, Codes) else queries
    return product(gallery)(dense.double().t().contiguous()).t().contiguous()


def _minus_l1(queries: Features, gallery: Features) -> Float[Tensor, "b m"]:
    """Of codes: |a - b| = a + b - 2 min(a, b), and the minimum is 0 wherever either is."""
    if not isinstance(queries, Codes) or not isinstance(gallery, Codes):
        dense = [part.to_dense() if isinstance(part, Codes) else part for part in (queries, gallery)]
        return -torch.cdist(dense[0].double(), dense[1].double(), p=1)
    table, values = queries.to_dense().double(), gallery.values.double()
    sums, row_of = torch.zeros(gallery.n, dtype=torch.float64).index_add_(0, gallery.rows(), values), gallery.rows()
    out = torch.empty(queries.n, gallery.n, dtype=torch.float64)
    for row, query in enumerate(table):
        least = torch.minimum(query[gallery.indices.long()], values)
        common = torch.bincount(row_of, weights=least, minlength=gallery.n)
        out[row] = 2 * common - sums - query.sum()
    return out


def _first_largest(values: Float[Tensor, "b m"], k: int) -> Int[Tensor, "b k"]:
    """Largest first, of equal ones the earlier: numpy's stable sort."""
    if k == 1:
        return torch.from_numpy(values.numpy().argmax(1))[:, None]  # the first of equal ones
    return torch.from_numpy(np.argsort(-values.numpy(), axis=1, kind="stable")[:, :k].copy())


def _share(hits: Bool[Tensor, " n"], definition: str, n_bootstrap: int, seed: int) -> Measured:
    columns = {"hits": hits.double().numpy(), "n": np.ones(len(hits))}
    return over_images(columns, lambda s: s["hits"] / s["n"], definition=definition, n_bootstrap=n_bootstrap, seed=seed)
