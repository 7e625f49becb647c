"""What turns a backbone's output into class logits: its own head, class names in words, or a fitted linear layer.

A zero-shot head's cosines lie in -1..1, and a cross-entropy over them depends on the temperature: published tables mix
unscaled cosines with the model's own scale (SPEC row 43). So `logit_scale` is explicit, and kept with each number.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.backbones.text import class_embeddings
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.progress import SILENT, Progress


@runtime_checkable
class Head(Protocol):
    """`logit_scale` is None where the logits are the model's own and no temperature applies."""

    @property
    def kind(self) -> str: ...

    @property
    def logit_scale(self) -> float | None: ...

    @property
    def n_classes(self) -> int: ...

    def __call__(self, output: Float[Tensor, "b d"]) -> Float[Tensor, "b n_classes"]: ...


@dataclass(frozen=True)
class OwnHead:
    """The backbone's output is already class logits."""

    n_classes: int
    kind: str = "own"
    logit_scale: float | None = None

    def __call__(self, output: Float[Tensor, "b d"]) -> Float[Tensor, "b n_classes"]:
        return output


@dataclass(frozen=True)
class ZeroShotHead:
    """logit_scale * cosine(image embedding, class text embedding). `classes`: (n_classes, d_embed)."""

    classes: Float[Tensor, "n_classes d_embed"]
    logit_scale: float | None = 100.0
    kind: str = "zero-shot"

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    def __call__(self, output: Float[Tensor, "b d"]) -> Float[Tensor, "b n_classes"]:
        image = torch.nn.functional.normalize(output, dim=-1)
        text = torch.nn.functional.normalize(self.classes.to(output), dim=-1)
        scale = 1.0 if self.logit_scale is None else self.logit_scale
        return scale * image @ text.T


@dataclass(frozen=True)
class LinearHead:
    """output @ weight.T + bias, fitted by multinomial logistic regression. weight (n_classes, d_embed)."""

    weight: Float[Tensor, "n_classes d_embed"]
    bias: Float[Tensor, " n_classes"]
    kind: str = "linear"
    logit_scale: float | None = None

    @property
    def n_classes(self) -> int:
        return len(self.bias)

    def __call__(self, output: Float[Tensor, "b d"]) -> Float[Tensor, "b n_classes"]:
        return output @ self.weight.to(output).T + self.bias.to(output)

    @classmethod
    def fit(
        cls, output: Float[Tensor, "n d"], labels: Int[Tensor, " n"], *, n_classes: int, c: float = 1.0
    ) -> "LinearHead":
        """scikit-learn's logistic regression on standardised outputs, folded into one layer.

        A class without a training row keeps weight 0 and a bias far below the others. Needs `vitrail[probes]`.
        """
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError('a linear head is fitted by scikit-learn: pip install "vitrail[probes]".') from error
        x = output.double()
        mean, std = x.mean(0), x.std(0).clamp_min(1e-8)
        model = LogisticRegression(C=c, max_iter=1000).fit(((x - mean) / std).numpy(), labels.numpy())
        coefficients, intercept = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
            coefficients, intercept = (
                torch.cat([-coefficients, coefficients]) / 2,
                torch.cat([-intercept, intercept]) / 2,
            )
        weight = torch.zeros(n_classes, x.shape[1], dtype=torch.float64)
        bias = torch.full((n_classes,), float(intercept.min()) - 50.0, dtype=torch.float64)
        weight[model.classes_] = coefficients / std
        bias[model.classes_] = intercept - (coefficients / std) @ mean
        return cls(weight=weight.float(), bias=bias.float())


def fit_linear_head(
    backbone: Backbone,
    images: ImageSource,
    *,
    batch_size: int = 64,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> LinearHead:
    """A linear head on the backbone's image embeddings of these labelled images: never those that are evaluated."""
    outputs: list[Tensor] = []
    labels: list[int | None] = []
    device = next(backbone.parameters()).device
    batches = load_batches(images, range(len(images)), backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("fit linear head", len(images), "images") as task, torch.inference_mode():
        for batch in batches:
            if batch.positions:
                outputs.append(backbone(batch.images.to(device)).float().cpu())
                labels += [images.record(position).label for position in batch.positions]
            task.advance(len(batch.positions) + len(batch.skipped))
    if not outputs or None in labels:
        raise ValueError(f"a linear head is fitted on labelled images; {images.spec} lacks some labels.")
    return LinearHead.fit(torch.cat(outputs).clone(), torch.tensor(labels), n_classes=len(images.classes))


def own_head(backbone: Backbone) -> OwnHead:
    """Raises ValueError where the backbone's output is features, not logits."""
    if backbone.n_classes is None:
        raise ValueError(
            f"{backbone.name} has no classifier head. Pass class embeddings (zero-shot) or labelled images to fit a "
            "linear head on."
        )
    return OwnHead(n_classes=backbone.n_classes)


def zero_shot_head(backbone: Backbone, class_names: Sequence[str], templates: Sequence[str]) -> ZeroShotHead:
    """Class names in words, through the backbone's own text tower. Raises ValueError where it has none."""
    if backbone.text is None:
        raise ValueError(
            f"{backbone.name} has no text tower. Pass class embeddings made elsewhere (.npy), or labelled images."
        )
    classes = class_embeddings(backbone.text, class_names, templates)
    return ZeroShotHead(classes=classes, logit_scale=backbone.text.logit_scale)
