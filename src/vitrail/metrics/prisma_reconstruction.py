"""Reconstruction as Prisma's code computes it: cosine over the token axis, explained variance as a mean of ratios.

    cosine_prisma              per batch: mean over dimensions of cosine(x[:, d], x_hat[:, d]) over the batch's rows;
                               mean over batches                                        "prisma-batches"
    cosine_token_axis          the same over all rows at once                           "prisma-token-axis"
    explained_variance_prisma  mean over rows of 1 - ||x - x_hat||^2 / ||x - mean||^2, mean: the batch's
                                                                                        "prisma-batch-mean"
    explained_variance_mean_of_ratios  the same, mean: that of training rows            "mean-of-ratios"

Range. Cosines in -1..1; the explained variances at most 1, without a lower bound. No unit.

Moves with. The cosines are of dimensions, not of rows: a reconstruction that is parallel to every row, each at another
length, is not perfect here; and a dimension with a large mean is near 1 whatever is reconstructed. A mean of ratios is
ruled by the few rows nearest the mean: it can be far below 0 where the ratio of sums is .9. The two that depend on
batches move with the batch size and with the order of images.

Does not show. More than `cosine` and `explained_variance` of reconstruction.py do; these are here so that published
numbers can be compared with what they are.

Source. Prisma's evals.py and train_sae.py (cosine_similarity(dim=0) on flattened tokens; per_token_l2_loss /
total_variance); SPEC rows 39 and 41.

Tags. "prisma-batches", "prisma-token-axis", "prisma-batch-mean", "mean-of-ratios". Rows that equal the mean have no
ratio and are left out (Prisma's code gives -inf). Definition "prisma-mean-of-ratios" with the evaluation set's own
mean, which cannot be streamed, is `reconstruction.explained_variance_mean_of_ratios`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.metrics.measured import Measured, over_images
from vitrail.metrics.passing import Metric, Seen, Setting
from vitrail.metrics.slabs import slabs


def cosine_over_tokens(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Cosine over rows, dimension by dimension; mean over dimensions."""
    return torch.cosine_similarity(x, x_hat, dim=0).mean()


def mean_of_ratios(
    x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], mean: Float[Tensor, " d"]
) -> Float[Tensor, " n"]:
    """1 - ||x - x_hat||^2 / ||x - mean||^2 of each row; NaN where a row is the mean."""
    total = (x - mean).square().sum(1)
    return 1 - (x - x_hat).square().sum(1) / torch.where(total > 0, total, torch.nan)


class PrismaReconstruction(Metric):
    """Keeps three sums a dimension, and two numbers an image."""

    def __init__(self, setting: Setting) -> None:
        self._mean = setting.shift.double()
        self._products: Float[Tensor, "3 d"] = torch.zeros(3, len(self._mean), dtype=torch.float64)
        self._of_batches: list[float] = []
        self._ratios: dict[str, list[Tensor]] = {"batch": [], "fixed": []}
        self._rows = 0

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        x, x_hat = seen.target.flatten(0, 1).float(), seen.x_hat.flatten(0, 1).float()
        products = x.new_zeros(3, x.shape[1], dtype=torch.float64)
        means = {"batch": x.mean(0, dtype=torch.float64).float(), "fixed": self._mean.float().to(x.device)}
        ratios: dict[str, list[Tensor]] = {name: [] for name in means}
        for rows in slabs(len(x), x.shape[1], x.device):
            a, b = x[rows], x_hat[rows]
            products += torch.stack([(a * b).sum(0), a.square().sum(0), b.square().sum(0)])
            for name, mean in means.items():
                ratios[name].append(mean_of_ratios(a, b, mean))
        self._products += products.cpu()
        self._of_batches.append(float(_cosine(products)))
        self._rows += len(x)
        for name, parts in ratios.items():
            of_images = torch.cat(parts).double().reshape(seen.n_images, seen.n_tokens)
            has = of_images.isfinite()
            sums = torch.stack([has.double().sum(1), torch.where(has, of_images, 0.0).sum(1)])
            self._ratios[name].append(sums.cpu())

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        if not self._of_batches:
            raise ValueError("no images were measured: there is nothing to report.")
        of_batches = sum(self._of_batches) / len(self._of_batches)
        out = {
            "cosine_prisma": Measured(value=of_batches, definition="prisma-batches", n=len(self._of_batches)),
            "cosine_token_axis": Measured(
                value=float(_cosine(self._products)), definition="prisma-token-axis", n=self._rows
            ),
        }
        for name, key, tag in (
            ("batch", "explained_variance_prisma", "prisma-batch-mean"),
            ("fixed", "explained_variance_mean_of_ratios", "mean-of-ratios"),
        ):
            n, sums = torch.cat(self._ratios[name], 1).numpy()
            out[key] = over_images(
                {"n": n, "sum": sums},
                lambda c: c["sum"] / c["n"],
                definition=tag,
                n_bootstrap=n_bootstrap,
                seed=seed,
            )
        return out


def _cosine(products: Float[Tensor, "3 d"]) -> Float[Tensor, ""]:
    """As torch.cosine_similarity: each length at least 1e-8."""
    dot, a, b = products
    return (dot / (a.sqrt().clamp_min(1e-8) * b.sqrt().clamp_min(1e-8))).mean()
