"""Substitution: what the rest of the model makes of a reconstruction, clean, substituted, and with the point zeroed.

    ce, recon_ce, zero_ce   mean over images of -log softmax(logits)[label], in nats
    ce_recovered            100 (zero_ce - recon_ce) / (zero_ce - ce), of the averages
    recon_cosine            mean over images of cosine(image embedding clean, substituted)
    accuracy, recon_accuracy, zero_accuracy    top-1

and, of heads with a temperature, the same at logit scale 1: `ce_unscaled`, `recon_ce_unscaled`, ...

Range. Cross-entropies from 0, in nats; ce_recovered in per cent, 100 is the clean model and 0 the zeroed one, not
clamped: above 100 and below 0 are possible. A constant answer over balanced classes has a CE of at least ln(number of
classes); unscaled cosines over 1,000 classes lie in 4.9141..8.9069.

Moves with. The head's temperature; the denominator: where zero_ce - ce is near 0 the recovered share means little,
read its interval. Late points, where only the CLS token still matters.

Does not show. That the reconstruction is faithful to each image: losses that rise and fall cancel in a mean.
recon_cosine is the stricter number. Nor which latents did it.

Source. Prisma sections 5.2 and 9 and its evals.py; "Steering CLIP's vision transformer with sparse autoencoders",
tables 3 and 4; SPEC rows 42 to 44 and 47.

Tags. Substitution and zeroing act on the same tokens: "trained-tokens", those that the coder was trained on, or
"all-tokens", what Prisma's code does, also for CLS-only coders. A transcoder's reconstruction, and its zeros, are put
where it writes. Several points at once: ".../at-once" puts all reconstructions of a crosscoder, made of the clean run;
".../in-turn" splices several coders, each reading what those before it left. "prisma" is what Prisma's code computes:
all tokens, cosines at logit scale 1 with raw class names, and 1e-6 added to the denominator. It is the `..._unscaled`
numbers of a `raw_name_head`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.metrics.heads import Head, ZeroShotHead, zero_shot_head
from vitrail.metrics.measured import Array, Measured, over_images


class Rerun:
    """One batch of images, run once; then the blocks after a hook point again for each replacement there.

    Of several points, any may be replaced, alone or together; the run starts again at the earliest that is.
    """

    def __init__(self, backbone: Backbone, points: str | Sequence[str], images: Float[Tensor, "b 3 h w"]) -> None:
        self.backbone = backbone
        self.points = (points,) if isinstance(points, str) else tuple(dict.fromkeys(points))
        self._images = images
        self._entries = {point: entry(backbone, point) for point in self.points}
        entries = [name for _, name in self._entries.values() if name]
        names = [*self.points, "hook_image_embed", *entries]
        self.output, self._cache = backbone.run_with_cache(images, list(dict.fromkeys(names)))

    @property
    def activation(self) -> Float[Tensor, "b ..."]:
        """Of the first point."""
        return self._cache[self.points[0]]

    @property
    def activations(self) -> dict[str, Tensor]:
        return {point: self._cache[point] for point in self.points}

    @property
    def embedding(self) -> Float[Tensor, "b d_embed"]:
        return self._cache["hook_image_embed"]

    def replaced(self, value: Float[Tensor, "b ..."]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d_embed"]]:
        """(output, image embedding) of the model with `value` put at the first point."""
        return self.replaced_at({self.points[0]: value})

    def replaced_at(self, values: Mapping[str, Tensor]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d_embed"]]:
        """The same with a value for each of some of the points."""
        return self.edited({point: lambda _, value=value: value for point, value in values.items()})

    def edited(
        self, edits: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d_embed"]]:
        """The same, each value made of what is there when the run comes by: after the edits of earlier points."""
        if strangers := [point for point in edits if point not in self._entries]:
            raise ValueError(f"{strangers[0]} was not named when the images were run: it has no start to run from.")
        start, name = min((self._entries[point] for point in edits), key=lambda e: -1 if e[1] is None else e[0])
        with _embedding_of(self.backbone, edits) as seen:
            if name is None:
                output = self.backbone(self._images)
            else:
                output = self.backbone.finish(self.backbone.run_blocks(self._cache[name], start=start))
        return output, seen[0]


def entry(backbone: Backbone, point: str) -> tuple[int, str | None]:
    """(block, hook point of what enters it) from which a run with another value at `point` may start: everything before
    is the same in every run. None: before the first block, where the embedding has to be run again."""
    described, n = backbone.point(point), backbone.n_layers
    if described.layer is not None:
        return described.layer, f"blocks.{described.layer}.hook_resid_pre"
    if described.blocks_needed == n:
        return n, f"blocks.{n - 1}.hook_resid_post"
    return 0, None


@contextmanager
def _embedding_of(backbone: Backbone, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def keep(x: Tensor, where: object) -> None:
        seen.append(x)

    hooks: dict[str, list[Callable[..., Tensor | None]]] = {
        point: [lambda x, _, edit=edit: edit(x)] for point, edit in edits.items()
    }
    hooks.setdefault("hook_image_embed", []).append(keep)
    with backbone.hooks(hooks):
        yield seen


RAW_NAMES = "zero-shot-raw-names"


def raw_name_head(backbone: Backbone, class_names: Sequence[str]) -> ZeroShotHead:
    """A zero-shot head of the class names alone, without a template: what Prisma's code compares images with."""
    return replace(zero_shot_head(backbone, class_names, ["{}"]), kind=RAW_NAMES)


class PerImage:
    """Named columns, one number per image, gathered batch by batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, columns: dict[str, Float[Tensor, " b"]]) -> None:
        for name, values in columns.items():
            self._parts.setdefault(name, []).append(values.double().cpu())

    def columns(self, prefix: str) -> dict[str, Array]:
        return {f"{prefix}{name}": torch.cat(parts).numpy() for name, parts in self._parts.items()}


def class_columns(
    head: Head, output: Float[Tensor, "b d"], labels: Int[Tensor, " b"]
) -> dict[str, Float[Tensor, " b"]]:
    """Per image: `ce` in nats, `right` (1 where the label has the largest logit), `ce_unscaled` at logit scale 1."""
    logits = head(output.double().cpu())
    columns = {
        "ce": torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
        "right": (logits.argmax(1) == labels).double(),
    }
    if head.logit_scale is not None:
        unscaled = logits / head.logit_scale
        columns["ce_unscaled"] = torch.nn.functional.cross_entropy(unscaled, labels, reduction="none")
    return columns


def image_cosine(clean: Float[Tensor, "b d"], other: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    return torch.cosine_similarity(clean.double(), other.double(), dim=-1).cpu()


def substitution_metrics(
    clean: PerImage,
    zeroed: PerImage,
    substituted: PerImage,
    *,
    definition: str,
    unscaled_definition: str | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Measured]:
    """All of this file's numbers from per-image columns; those of a head are left out where there was none.

    `unscaled_definition`: of the numbers at logit scale 1, where it is another ("prisma").
    """
    columns = clean.columns("clean_") | zeroed.columns("zero_") | substituted.columns("recon_")
    columns["n"] = np.ones(len(columns["recon_cosine"]))

    def measure(statistic: Callable[[dict[str, Array]], Array], tag: str = definition) -> Measured:
        return over_images(columns, statistic, definition=tag, n_bootstrap=n_bootstrap, seed=seed)

    def mean(column: str, tag: str = definition) -> Measured:
        return measure(lambda c: c[column] / c["n"], tag)

    out = {"recon_cosine": mean("recon_cosine")}
    for ce, suffix, tag in (("ce", "", definition), ("ce_unscaled", "_unscaled", unscaled_definition or definition)):
        if f"clean_{ce}" not in columns:
            continue
        clean_ce, recon_ce, zero_ce = f"clean_{ce}", f"recon_{ce}", f"zero_{ce}"
        out[f"ce{suffix}"], out[f"recon_ce{suffix}"] = mean(clean_ce, tag), mean(recon_ce, tag)
        out[f"zero_ce{suffix}"] = mean(zero_ce, tag)
        recovered = _recovered(clean_ce, recon_ce, zero_ce, epsilon=1e-6 if tag == "prisma" else 0.0)
        out[f"ce_recovered{suffix}"] = measure(recovered, tag)
    if "clean_right" in columns:
        out["accuracy"], out["recon_accuracy"] = mean("clean_right"), mean("recon_right")
        out["zero_accuracy"] = mean("zero_right")
    return out


def _recovered(clean: str, recon: str, zero: str, *, epsilon: float) -> Callable[[dict[str, Array]], Array]:
    """`epsilon` is added to the difference of the averages."""
    return lambda c: 100 * (c[zero] - c[recon]) / (c[zero] - c[clean] + (epsilon * c["n"] if epsilon else 0.0))
