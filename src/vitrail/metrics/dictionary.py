"""How near a dictionary is to the true one.

    mean_max_cosine      mean over true directions of the largest cosine with any found one; in -1..1. Two true
                         directions may share a found one.
    matched_cosine       the same, each found direction used once: the mean cosine of the best matching. GT-MCC of
                         Song et al. 2025, arXiv:2505.20254, but for the sign: v and -v are two latents.
    matched_correlation  the same over codes: Pearson's correlation of each true concept's activations with those of
                         its latent. The mean correlation coefficient (MCC) of independent component analysis.

SPEC row 143. Matchings are Hungarian (scipy: the extra `probes`). What a high value does not show: that a latent fires
where its concept is (a direction says nothing of thresholds), nor that nothing else was learnt.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.coders.sparse import Codes, scatter_to_latents


@dataclass(frozen=True)
class Matching:
    """`latent[i]` is matched to concept i, -1 where there were fewer latents than concepts; `value[i]` how well."""

    latent: Int[Tensor, " n_concepts"]
    value: Float[Tensor, " n_concepts"]

    @property
    def mean(self) -> float:
        """Over all concepts; one without a latent counts as 0."""
        return float(self.value.double().mean())


def cosines(
    true: Float[Tensor, "n_concepts d"], found: Float[Tensor, "d_sae d_found"]
) -> Float[Tensor, "n_concepts d_sae"]:
    """A direction of length 0 has cosine 0 with everything."""
    if true.shape[1] != found.shape[1]:
        raise ValueError(f"directions of different spaces: {true.shape[1]} and {found.shape[1]} dimensions.")
    a, b = (torch.nn.functional.normalize(t.double(), dim=1, eps=1e-30) for t in (true, found))
    return a @ b.t()


def mean_max_cosine(true: Float[Tensor, "n_concepts d"], found: Float[Tensor, "d_sae d_found"]) -> float:
    return float(cosines(true, found).max(1).values.mean())


def matched_cosine(true: Float[Tensor, "n_concepts d"], found: Float[Tensor, "d_sae d_found"]) -> Matching:
    return match(cosines(true, found))


def correlations(z: Float[Tensor, "n n_concepts"], codes: Codes) -> Float[Tensor, "n_concepts d_sae"]:
    """Pearson's, from sparse codes. 0 where either never changes."""
    if len(z) != codes.n:
        raise ValueError(f"{len(z)} rows of truth and {codes.n} rows of codes: they must be the same rows.")
    n, z, values = len(z), z.double(), codes.values.double()
    together = scatter_to_latents(z, values, codes)
    sums, squares = (z.new_zeros(codes.d_sae).index_add_(0, codes.indices.long(), v) for v in (values, values.square()))
    mean_z, mean_f = z.mean(0), sums / n
    covariance = (together / n - mean_f[:, None] * mean_z).t()
    spread_z = (z.square().mean(0) - mean_z.square()).clamp_min(0).sqrt()
    spread_f = (squares / n - mean_f.square()).clamp_min(0).sqrt()
    scale = spread_z[:, None] * spread_f
    return torch.where(scale > 1e-12, covariance / scale.clamp_min(1e-300), 0.0)


def matched_correlation(z: Float[Tensor, "n n_concepts"], codes: Codes) -> Matching:
    return match(correlations(z, codes))


def match(values: Float[Tensor, "n_concepts d_sae"]) -> Matching:
    """The one-to-one matching of concepts and latents with the largest sum."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('matching concepts and latents needs scipy: pip install "vitrail[probes]".') from error
    concepts, latents = linear_sum_assignment(values.numpy(), maximize=True)
    latent = np.full(len(values), -1)
    latent[concepts] = latents
    value = np.zeros(len(values))
    value[concepts] = values.numpy()[concepts, latents]
    return Matching(torch.from_numpy(latent), torch.from_numpy(value))
