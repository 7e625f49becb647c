"""BatchTopK coder: k latents per row on average, spent where the batch needs them.

    training:  z = the n*k largest entries of ReLU(pre) over the whole batch of n rows
    in use:    z = ReLU(pre) where it exceeds a threshold, each row on its own

Bussmann et al. 2024, arXiv:2412.06410; ViSAEBench equation 1 and appendix E. k counts per row. Ranked after the ReLU,
so that a batch has exactly n*k entries if enough are positive, and nothing negative is ever picked. Only `loss` looks
at the batch: encode uses the threshold in train and eval mode alike.

The threshold follows the smallest entry picked in each training batch (running mean), until `calibrate` sets it to the
quantile of held-out activations at which the mean L0 is k. The sources do not name their estimator; ours is saved.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.coders.base import ROWS_AT_ONCE, SparseCoder
from vitrail.coders.select import Encoder, largest_of_batch
from vitrail.coders.sparse import Codes

RUNNING_WEIGHT = 0.05  # of the newest batch's minimum in the running threshold


class BatchTopK(SparseCoder):
    name = "batch_topk"
    threshold: Tensor

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int = 32,
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, normalization=normalization, b_dec_init=b_dec_init, seed=seed)
        if not 1 <= k <= d_sae:
            raise ValueError(f"k must be in 1..d_sae={d_sae} and counts per row, got {k}.")
        self.k = k
        self.register_buffer("threshold", torch.tensor(math.nan))  # nan: nothing estimated yet

    def select(self, pre: Float[Tensor, "n d_sae"]) -> Codes:
        if math.isnan(float(self.threshold)):
            raise RuntimeError(
                f"this {self.name} coder has no threshold yet, so no row can be encoded on its own. "
                "Train it, load it, or call coder.calibrate(held_out_batches)."
            )
        return _above(pre, float(self.threshold))

    def training_codes(self, y: Float[Tensor, "n d_in"]) -> Codes:
        usual = None if math.isnan(float(self.threshold)) else float(self.threshold)
        encoder = Encoder(y - self.b_dec, self.W_enc, self.b_enc, self.selection_dtype)
        codes = largest_of_batch(encoder, len(y) * self.k, usual=usual)
        if self.training and codes.nnz:
            smallest = codes.values.min()
            known = smallest if usual is None else self.threshold
            self.threshold.copy_(torch.lerp(known.to(smallest.dtype), smallest, RUNNING_WEIGHT))
            self.calibration = {"estimator": "running_mean_of_batch_minima", "weight": RUNNING_WEIGHT}
        return codes

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "_ d_in"]]) -> dict[str, Any]:
        """Set the threshold so that the mean L0 over these raw activations is k. They are held in memory meanwhile."""
        held_out = [rows for batch in batches for rows in self.normalized(batch).split(ROWS_AT_ONCE)]
        if not held_out:
            raise ValueError("calibration needs held-out activations, got no batches.")
        n_rows = sum(len(rows) for rows in held_out)
        threshold = self._quantile(held_out, n_rows * self.k)
        self.threshold.fill_(threshold)
        entries = sum(_above(self.pre_activations(rows), float(self.threshold)).nnz for rows in held_out)
        self.calibration = {
            "estimator": "quantile_where_mean_l0_is_k",
            "threshold": float(self.threshold),
            "mean_l0": entries / n_rows,
            "n_rows": n_rows,
        }
        return self.calibration

    def _quantile(self, held_out: list[Tensor], count: int) -> float:
        """Halfway between the count-th largest positive pre-activation and the next; 0 if there are no more.

        Exact in bounded memory: a first pass counts by the high bits of the float (positive floats sort like their
        bits), a second looks only at the values that share the answer's bits. Halfway, because a row encoded alone
        comes out of the matrix product a rounding error away from the same row in a batch.
        """
        bins = sum(torch.bincount(_high_bits(self._positive(rows)), minlength=1 << 15) for rows in held_out)
        from_the_top = torch.as_tensor(bins).flip(0).cumsum(0)
        if int(from_the_top[-1]) <= count:
            return 0.0
        place = int(torch.searchsorted(from_the_top, count))
        above = int(from_the_top[place - 1]) if place else 0
        bits = (1 << 15) - 1 - place
        candidates, below = [], torch.zeros(1, device=self.W_enc.device)
        for positive in map(self._positive, held_out):
            high = _high_bits(positive)
            candidates.append(positive[high == bits])
            below = torch.cat([below, positive[high < bits]]).max(0, keepdim=True).values
        ranked = torch.cat([torch.cat(candidates).sort(descending=True).values, below])
        return float(ranked[count - above - 1 : count - above + 1].double().mean())

    def _positive(self, rows: Tensor) -> Tensor:
        pre = self.pre_activations(rows).float()
        return pre[pre > 0]


def _above(pre: Tensor, threshold: float) -> Codes:
    rows, indices = (pre > threshold).nonzero(as_tuple=True)
    return Codes.from_entries(rows, indices, pre[rows, indices], n=pre.shape[0], d_sae=pre.shape[1])


def _high_bits(values: Tensor) -> Tensor:
    return values.view(torch.int32) >> 16
