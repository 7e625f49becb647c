"""What the rest of the model makes of a reconstruction: cross-entropy clean, substituted, and with the point zeroed.

    CE, recon CE, zero-ablation CE     mean over images of -log softmax(logits)[label], in nats
    % CE recovered = 100 (CE_zero - CE_recon) / (CE_zero - CE)     of the averages, not clamped: above 100 is possible,
                                       and where CE_zero - CE is near 0 the number means little: read its interval
    recon cosine                       mean over images of cosine(image embedding clean, substituted)
    accuracy                           top-1, of clean, substituted and zeroed

SPEC rows 42-44. Substitution and zeroing act on the same tokens: those that the coder was trained on (definition
"trained-tokens"), or all of them ("all-tokens": what Prisma's code does, also for CLS-only coders).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.metrics.heads import Head
from vitrail.metrics.measured import Array, Measured, over_images


class Rerun:
    """One batch of images, run once; then the blocks after the hook point again for each replacement there."""

    def __init__(self, backbone: Backbone, point: str, images: Float[Tensor, "b 3 h w"]) -> None:
        self.backbone, self.point = backbone, point
        self._images = images
        self._start, self._entry = entry(backbone, point)
        names = [point, "hook_image_embed", *([self._entry] if self._entry else [])]
        self.output, self._cache = backbone.run_with_cache(images, list(dict.fromkeys(names)))

    @property
    def activation(self) -> Float[Tensor, "b ..."]:
        return self._cache[self.point]

    @property
    def embedding(self) -> Float[Tensor, "b d_embed"]:
        return self._cache["hook_image_embed"]

    def replaced(self, value: Float[Tensor, "b ..."]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d_embed"]]:
        """(output, image embedding) of the model with `value` put at the point."""
        with _embedding_of(self.backbone, self.point, value) as seen:
            if self._entry is None:
                output = self.backbone(self._images)
            else:
                tokens = self.backbone.run_blocks(self._cache[self._entry], start=self._start)
                output = self.backbone.finish(tokens)
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
def _embedding_of(backbone: Backbone, point: str, value: Tensor) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def put(x: Tensor, where: object) -> Tensor:
        return value

    def keep(x: Tensor, where: object) -> None:
        seen.append(x)

    hooks: dict[str, list[Callable[..., Tensor | None]]] = {point: [put]}
    hooks.setdefault("hook_image_embed", []).append(keep)
    with backbone.hooks(hooks):
        yield seen


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
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Measured]:
    """All of this file's numbers from per-image columns; those of a head are left out where there was none."""
    columns = clean.columns("clean_") | zeroed.columns("zero_") | substituted.columns("recon_")
    columns["n"] = np.ones(len(columns["recon_cosine"]))

    def measure(statistic: Callable[[dict[str, Array]], Array]) -> Measured:
        return over_images(columns, statistic, definition=definition, n_bootstrap=n_bootstrap, seed=seed)

    def mean(column: str) -> Measured:
        return measure(lambda c: c[column] / c["n"])

    out = {"recon_cosine": mean("recon_cosine")}
    for ce, suffix in (("ce", ""), ("ce_unscaled", "_unscaled")):
        if f"clean_{ce}" not in columns:
            continue
        clean_ce, recon_ce, zero_ce = f"clean_{ce}", f"recon_{ce}", f"zero_{ce}"
        out[f"ce{suffix}"], out[f"recon_ce{suffix}"] = mean(clean_ce), mean(recon_ce)
        out[f"zero_ce{suffix}"] = mean(zero_ce)
        out[f"ce_recovered{suffix}"] = measure(
            lambda c, names=(clean_ce, recon_ce, zero_ce): (
                100 * (c[names[2]] - c[names[1]]) / (c[names[2]] - c[names[0]])
            )
        )
    if "clean_right" in columns:
        out["accuracy"], out["recon_accuracy"] = mean("clean_right"), mean("recon_right")
        out["zero_accuracy"] = mean("zero_right")
    return out
