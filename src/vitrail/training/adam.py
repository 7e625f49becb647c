"""torch's Adam, for weights whose memory lies column by column, as W_enc's does.

torch's fused kernel goes through memory in order, and copies a gradient that is not contiguous first: at d_sae = 24,576
a third of its time. Seen transposed, weights, gradient and moments are contiguous, and the numbers are the same.
"""

from typing import Any

import torch
from torch import Tensor


class Adam(torch.optim.Adam):
    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`lists`: parameters, gradients, first and second moments (and what has no shape), one entry a parameter."""
        has_complex = super()._init_group(group, *lists)
        for place in range(len(lists[0])):
            alike = [tensors[place] for tensors in lists[:4]]
            if all(_lies_transposed(tensor) for tensor in alike):
                for tensors, tensor in zip(lists[:4], alike, strict=True):
                    tensors[place] = tensor.t()
        return has_complex


def _lies_transposed(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous()
