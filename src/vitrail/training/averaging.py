"""A running average of the weights, which is what is saved.

    average_t = sum_s d^(t-s) theta_s / sum_s d^(t-s),   s = 1..t

The exponential moving average without a memory of the starting weights: after the first step it is that step's weights.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from vitrail.coders.base import SparseCoder


class Average:
    def __init__(self, coder: SparseCoder, *, decay: float) -> None:
        self.coder, self.decay = coder, decay
        self.values = {name: parameter.detach().clone() for name, parameter in coder.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step numbered `step`, from 1."""
        newest = (1 - self.decay) / (1 - self.decay**step)
        for name, parameter in self.coder.named_parameters():
            self.values[name].lerp_(parameter, newest)

    @torch.no_grad()
    def begin_anew(self, latents: Int[Tensor, " m"]) -> None:
        """What these latents were before is no part of what they are now."""
        if "W_enc" in self.values:  # else tied to the decoder
            self.values["W_enc"][:, latents] = self.coder.W_enc[:, latents]
        self.values["W_dec"][latents] = self.coder.W_dec[latents]
        self.values["b_enc"][latents] = self.coder.b_enc[latents]

    @torch.no_grad()
    def put_into_coder(self) -> None:
        """An average of unit directions is shorter than one: the coder's constraint is applied again."""
        for name, parameter in self.coder.named_parameters():
            parameter.copy_(self.values[name])
        self.coder.constrain_weights()

    def tensors(self) -> dict[str, Tensor]:
        return {f"average/{name}": tensor for name, tensor in self.values.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.values.items():
            tensor.copy_(tensors[f"average/{name}"])
