"""Small coders, one per entry of the tables, and data whose sparse directions are known."""

import torch
from torch import Tensor

from vitrail.coders import BASELINES, CODERS, SparseCoder
from vitrail.statistics import ActivationStats

D_IN, D_SAE, K = 20, 28, 4

# What each entry needs beyond d_in, d_sae and seed at this size. A new entry without a line here fails the contract.
ARGUMENTS = {
    "relu": {"d_sae": D_SAE, "l1": 0.3},
    "topk": {"d_sae": D_SAE, "k": K},
    "batch_topk": {"d_sae": D_SAE, "k": K},
    "matryoshka": {"d_sae": D_SAE, "ks": [2, 4, 8, D_SAE], "inference_k": K},
    "random": {"d_sae": D_SAE, "k": K},
    "pca": {"k": K, "n_components": 10},
    "neurons": {"k": K},
}
ALL = CODERS | BASELINES


def make(name: str, **changes) -> SparseCoder:
    return ALL[name](**{"d_in": D_IN, **ARGUMENTS[name], **changes})


def fitted(name: str, x: Tensor | None = None, **changes) -> SparseCoder:
    """In train mode, as constructed; normalised and calibrated on x."""
    x = rows() if x is None else x
    coder = make(name, **changes)
    coder.fit(ActivationStats.of(x), x)
    coder.calibrate([x])
    return coder


def rows(n: int = 64, seed: int = 1, d_in: int = D_IN) -> Tensor:
    """Off centre and of unequal spread, as real activations are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator) * torch.linspace(0.5, 3, d_in) + torch.linspace(-4, 9, d_in)


def planted(n: int, n_directions: int = 24, seed: int = 77) -> tuple[Tensor, Tensor]:
    """Rows that are sparse positive sums of known unit directions, and the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_directions, D_IN, generator=generator), dim=1)
    active = torch.rand(n, n_directions, generator=generator) < 0.1
    size = 0.5 + torch.rand(n, n_directions, generator=generator)
    return (active * size) @ directions, directions


def train_briefly(coder: SparseCoder, x: Tensor, n_steps: int = 600, lr: float = 1e-2, batch: int = 256) -> SparseCoder:
    optimizer = torch.optim.Adam(coder.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 2 - 2 * step / n_steps)
        picked = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        coder.loss(x[picked]).loss.backward()
        coder.constrain_gradients()
        optimizer.step()
        coder.constrain_weights()
    return coder


def mean_max_cosine(directions: Tensor, coder: SparseCoder) -> float:
    """For each true direction the best cosine among the decoder's, averaged."""
    found = torch.nn.functional.normalize(coder.W_dec.detach(), dim=1)
    return (directions @ found.t()).max(1).values.mean().item()
