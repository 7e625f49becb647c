"""What a classifier says when sets of coordinates are ablated: many sets, each image run once up to the point.

    z'    = t + c (z - t)                 c = 0, t = 0: zero ablation.  c: "scale".  t = mean: mean ablation
    x'    = x + s sum_j (z'_j - z_j) n_j  s undoes the coder's normalisation; what the coder misses stays

A set changes nothing in an image where none of its latents fires: its answer there is the model's own, bit for bit. Of
the others only the blocks after the point run, of the last one the class token alone where the model allows it.

"Steering CLIP's vision transformer with sparse autoencoders", section 7.1; SPEC row 118.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.coders.sparse import Codes, decode
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.heads import Head
from vitrail.metrics.substitution import Rerun
from vitrail.progress import SILENT, Progress
from vitrail.steering.closed_form import IMAGE_EMBED
from vitrail.steering.interventions import Basis, Latents, marked_tokens
from vitrail.steering.routes import class_token_of_last
from vitrail.steering.selection import Site


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Coordinates that are ablated together. `which` may be empty: the model as it is.

    factor      0: ablated.  0.5: halved.  1: left alone
    towards     what they are scaled towards: 0, or a value for each of `which` (their means, for mean ablation)
    """

    name: str
    site: Site
    which: Sequence[int] | Int[np.ndarray, " m"]
    factor: float = 0.0
    towards: Float[Tensor, " m"] | None = None

    def __post_init__(self) -> None:
        if not isfinite(self.factor):
            raise ValueError(f"the factor must be a finite number, got {self.factor}.")
        if self.towards is not None and self.towards.shape != (len(self.which),):
            told = f"{len(self.which)} coordinates go towards {tuple(self.towards.shape)} values"
            raise ValueError(f"{told}: one value each.")
        if len(self.which):
            self.site.basis.checked(torch.as_tensor(np.asarray(self.which, dtype=np.int64)))

    @property
    def key(self) -> tuple[object, ...]:
        """Sets of one key give one answer."""
        towards = None if self.towards is None else self.towards.cpu().numpy().tobytes()
        which = np.asarray(self.which, dtype=np.int64)
        return (*_place(self.site), which.tobytes(), self.factor, towards)


@dataclass(frozen=True, eq=False)
class BatchAnswers:
    """Logits of some images: `before` of the model as it is, `after` with each set. `embedding`: as it is."""

    positions: list[int]
    embedding: Float[Tensor, "b d_embed"]
    before: Float[Tensor, "b n_classes"]
    after: Float[Tensor, "s b n_classes"]


@dataclass(frozen=True, eq=False)
class Answers:
    """The classes that were said, over the images that could be read. `positions`: which of the source they are;
    `embeddings`: of the model as it is."""

    names: tuple[str, ...]
    positions: Int[np.ndarray, " n"]
    embeddings: Float[Tensor, "n d_embed"]
    before: Int[np.ndarray, " n"]
    after: Int[np.ndarray, "s n"]

    def of(self, name: str) -> Int[np.ndarray, " n"]:
        if name not in self.names:
            raise KeyError(f"there is no set {name!r}. Sets: {', '.join(self.names[:12])}.")
        return self.after[self.names.index(name)]


def ablated_answers(
    backbone: Backbone,
    images: ImageSource,
    head: Head,
    sets: Sequence[FeatureSet],
    *,
    positions: Sequence[int] | None = None,
    batch_size: int = 64,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> Answers:
    """The class with the largest logit, for every set and image. Raises ValueError where no image could be read, for
    two sets of one name, and as `ablated_logits`."""
    names = tuple(one.name for one in sets)
    if len(set(names)) < len(names):
        raise ValueError("every set needs a name of its own.")
    at: list[int] = []
    embeddings, before, after = [], [], []
    for batch in ablated_logits(
        backbone, images, head, sets, positions=positions, batch_size=batch_size, n_workers=n_workers, progress=progress
    ):
        at += batch.positions
        embeddings.append(batch.embedding.float().cpu())
        before.append(batch.before.argmax(1).cpu())
        after.append(batch.after.argmax(2).cpu())
    if not at:
        raise ValueError("there are no images to ask about, or none could be read.")
    said = torch.cat(after, 1).numpy()
    return Answers(names, np.asarray(at), torch.cat(embeddings), torch.cat(before).numpy(), said)


def ablated_logits(
    backbone: Backbone,
    images: ImageSource,
    head: Head,
    sets: Sequence[FeatureSet],
    *,
    positions: Sequence[int] | None = None,
    batch_size: int = 64,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> Iterator[BatchAnswers]:
    """Batch by batch. Raises ValueError for sets whose tokens or widths do not fit their point."""
    for one in sets:
        _check(backbone, one)
    device = next(backbone.parameters()).device
    points = list(dict.fromkeys(one.site.point for one in sets))
    runs: dict[str, _Rest] = {}
    wanted = range(len(images)) if positions is None else list(positions)
    batches = load_batches(images, wanted, backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("ablations", len(wanted), "images") as task:
        for batch in batches:
            task.advance(len(batch.positions) + len(batch.skipped))
            if not batch.positions:
                continue
            with torch.inference_mode():  # not around the yield, where it would reach whoever reads
                pixels = batch.images.to(device)
                seen = backbone.activations(pixels, list(dict.fromkeys([*points, IMAGE_EMBED])))
                before = logits_of(backbone, seen[IMAGE_EMBED], head)
                for point in points:
                    if point not in runs:
                        runs[point] = _Rest(backbone, point, head, seen[point])
                after = _after(sets, seen, before, runs, pixels)
            yield BatchAnswers(batch.positions, seen[IMAGE_EMBED], before, after)


def logits_of(backbone: Backbone, embedding: Float[Tensor, "b d_embed"], head: Head) -> Float[Tensor, "b n_classes"]:
    """From what is handed to the model's head. A head of kind "own" is the model's."""
    output = backbone.head(embedding) if head.kind == "own" else embedding
    return head(output.float())


class Rows:
    """The rows of one batch at one site, read once, changed by any number of sets."""

    def __init__(self, basis: Basis, x: Float[Tensor, "n d"]) -> None:
        self.basis, self.x = basis, x
        self.codes: Codes | None = None
        if isinstance(basis, Latents):
            self.codes = basis.coder.encode_sparse(x)
            self._reading = basis.reading(self.codes)
        else:
            self._reading = basis.read(x)

    def changed(self, one: FeatureSet) -> tuple[Bool[Tensor, " n"], Float[Tensor, "m d"]]:
        """(which rows change, what they become). The others stay as they are, bit for bit."""
        which = torch.as_tensor(np.asarray(one.which, dtype=np.int64), device=self.x.device)
        if len(which) == 0 or one.factor == 1:
            return torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device), self.x[:0]
        if isinstance(self.basis, Latents) and self.codes is not None and one.towards is None:
            marked = torch.zeros(self.basis.n, dtype=torch.bool, device=self.x.device)
            marked[which] = True
            kept = self.codes.keep(marked[self.codes.indices.long()])
            touched = kept.l0() > 0
            step = (one.factor - 1) * decode(kept.select_rows(touched.nonzero()[:, 0]), self.basis.coder.W_dec)
        else:
            z = self._reading.columns(which)
            towards = 0.0 if one.towards is None else one.towards.to(z)
            change = (1 - one.factor) * (towards - z)
            touched = (change != 0).any(1)
            step = change[touched] @ self.basis.directions(which).to(change)
        scale = self._reading.scale
        if isinstance(scale, Tensor) and scale.ndim == 2:
            scale = scale[touched]
        return touched, (self.x[touched].to(step.dtype) + scale * step).to(self.x.dtype)


# ------------------------------------------------------------------------------------------------------------ details


class _Rest:
    """What comes after a point, down to logits, by the cheapest way that gives the model's own answer."""

    def __init__(self, backbone: Backbone, point: str, head: Head, x: Tensor) -> None:
        self.backbone, self.point, self.head = backbone, point, head
        self.between = point.rpartition(".")[2] in ("hook_resid_pre", "hook_resid_post")
        self.start = backbone.point(point).blocks_needed
        self._last: Callable[[Tensor], Tensor] | None = None
        if self.between:
            self._last = class_token_of_last(backbone, x[:4], self.start)
        self._first_only = self.between and self.start == backbone.n_layers and _reads_the_first_alone(backbone, x[:4])

    def in_use(self, site: Site, x: Tensor) -> tuple[Tensor, Bool[Tensor, " t"] | None]:
        """The point's value without tokens that nothing reads any more, and which of its tokens are the site's."""
        if x.ndim == 2:
            return x, None
        marks = marked_tokens(self.backbone, site.point, site.where)[0].to(x.device)
        return (x[:, :1], marks[:1]) if self._first_only else (x, marks)

    def of(self, pixels: Tensor) -> Callable[[Tensor, Bool[Tensor, " b"]], Tensor]:
        """For one batch: (values of the marked images, marks) to logits."""
        if self.point == IMAGE_EMBED:
            return lambda value, _: logits_of(self.backbone, value, self.head)
        if self.between:
            return lambda value, _: logits_of(self.backbone, self._pooled(value), self.head)

        def rerun(value: Tensor, marks: Tensor) -> Tensor:
            embedding = Rerun(self.backbone, self.point, pixels[marks]).replaced(value)[1]
            return logits_of(self.backbone, embedding, self.head)

        return rerun

    def _pooled(self, value: Float[Tensor, "b t d"]) -> Float[Tensor, "b d_embed"]:
        if self._last is None:
            return self.backbone.pool(self.backbone.run_blocks(value, start=self.start))
        stop = self.backbone.n_layers - 1
        return self.backbone.pool(self._last(self.backbone.run_blocks(value, start=self.start, stop=stop)))


def _after(
    sets: Sequence[FeatureSet],
    seen: dict[str, Tensor],
    before: Float[Tensor, "b n_classes"],
    runs: dict[str, _Rest],
    pixels: Tensor,
) -> Float[Tensor, "s b n_classes"]:
    read: dict[tuple[object, ...], tuple[Rows, Bool[Tensor, " t"] | None]] = {}
    known: dict[tuple[object, ...], Tensor] = {}
    for one in sets:
        if one.key in known:
            continue
        run, place = runs[one.site.point], _place(one.site)
        x, marks = run.in_use(one.site, seen[one.site.point])
        if place not in read:
            read[place] = Rows(one.site.basis, x if marks is None else x[:, marks].flatten(0, 1)), marks
        touched, changed = read[place][0].changed(one)
        touched = touched.view(len(x), -1)
        images = touched.any(1)
        after = before.clone()
        if bool(images.any()):
            value = x[images]
            if marks is None:
                value[:] = changed
            else:
                everywhere = torch.zeros(value.shape[:2], dtype=torch.bool, device=x.device)
                everywhere[:, marks] = touched[images]
                value[everywhere] = changed
            after[images] = run.of(pixels)(value, images)
        known[one.key] = after
    return torch.stack([known[one.key] for one in sets]) if sets else before.new_zeros(0, *before.shape)


def _reads_the_first_alone(backbone: Backbone, x: Float[Tensor, "b t d"]) -> bool:
    """Whether the pooling of what leaves the last block is a matter of the class token, on these and on noise."""
    if not backbone.grid.n_cls:
        return False
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * x.std()
    for value in (x, x + noise):
        try:
            alone, whole = backbone.pool(value[:, :1]), backbone.pool(value)
        except (RuntimeError, IndexError, ValueError):
            return False
        if alone.shape != whole.shape or not torch.allclose(
            alone, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max())
        ):
            return False
    return True


def _place(site: Site) -> tuple[object, ...]:
    return site.point, id(site.basis), site.where


def _check(backbone: Backbone, one: FeatureSet) -> None:
    known = backbone.point(one.site.point)
    if one.site.basis.width != known.width:
        told = f"{one.site.point} of {backbone.name} is {known.width} wide"
        raise ValueError(f"the set {one.name!r} is of rows {one.site.basis.width} wide, {told}.")
    if known.has_tokens:
        marked_tokens(backbone, one.site.point, one.site.where)
    elif one.site.where != "all":
        raise ValueError(f"{one.site.point} has one row an image: its sets have where='all', not {one.site.where!r}.")
