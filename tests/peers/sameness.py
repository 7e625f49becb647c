"""The same weights and rows on both sides: codes, reconstruction, loss, and gradients in the peer's own coordinates.

A comparison says each of vitrail's parameters as a function of the peer's live ones: a transpose, a logarithm, a bias
that the peer does not subtract. The same function carries values over before, and gradients back after.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.coders import make_coder
from vitrail.coders.base import SparseCoder, Step

D_IN, D_OUT, D_SAE, K, N = 7, 5, 20, 3, 40
MANY = 1024  # latents, among which the k largest are found by groups
EXACT = dict(rtol=1e-9, atol=1e-10)  # float64 on both sides
SINGLE = dict(rtol=2e-5, atol=2e-5)  # float32 somewhere


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(width: int = D_IN, n: int = N) -> Tensor:
    return normal(n, width, seed=1) + 0.3


@torch.no_grad()
def randomise(module: nn.Module, scale: float = 0.5) -> Any:
    """Every parameter drawn anew, biases too: a peer's own start leaves them at zero, where much is equal."""
    for seed, parameter in enumerate(module.parameters(), start=10):
        parameter.copy_(scale * normal(*parameter.shape, seed=seed))
    return module


@torch.no_grad()
def unit_(weights: Tensor, dim: int) -> None:
    weights.div_(torch.linalg.vector_norm(weights, dim=dim, keepdim=True))


def ours(architecture: str, **options: Any) -> SparseCoder:
    """In float64, of raw rows; its own start is overwritten."""
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "normalization": "none"}
    return make_coder(architecture, **{**sizes, **options}).double()


class Pair:
    """One of our coders and the peer that it is to equal.

    `weights` gives our parameters by name, as differentiable functions of the peer's. Those that the peer has not are
    named in `without` and are zero on our side.
    """

    def __init__(
        self, coder: SparseCoder, peer: nn.Module, weights: Callable[[], dict[str, Tensor]], without: Collection = ()
    ) -> None:
        self.coder, self.peer, self.weights = coder, peer, weights
        self.differences: dict[str, float] = {}
        own, theirs = dict(coder.named_parameters()), weights()
        assert set(own) == {*theirs, *without}, f"ours are {sorted(own)}, given were {sorted(theirs)}"
        with torch.no_grad():
            for name, parameter in own.items():
                value = theirs.get(name, torch.zeros_like(parameter))
                assert parameter.shape == value.shape, f"{name}: {parameter.shape}, {value.shape}"
                parameter.copy_(value)

    def equal(self, a: Tensor, b: Tensor, what: str, tolerance: dict[str, float] = EXACT) -> None:
        a, b = a.detach().double(), b.detach().double()
        assert bool(b.any()), f"{what}: the peer's are all zero, nothing is compared"
        torch.testing.assert_close(a, b, **tolerance, msg=lambda found: f"{what}: {found}")
        self.differences[what] = float((a - b).abs().max())

    def step(
        self, x: Tensor, z: Tensor, x_hat: Tensor, loss: Tensor, tolerance: dict[str, float] = EXACT, **more: Any
    ) -> Step:
        """One training step. `loss`: the peer's, times the stated constant between the conventions."""
        step = self.coder.loss(x)
        self.equal(step.codes.to_dense(), z, "codes", tolerance)
        self.equal(step.x_hat, x_hat, "reconstruction", tolerance)
        self.equal(step.loss, loss, "loss", tolerance)
        self.gradients(step.loss, loss, tolerance, **more)
        return step

    def gradients(
        self,
        our_loss: Tensor,
        loss: Tensor,
        tolerance: dict[str, float] = EXACT,
        but: Collection[str] = (),
        constants: Mapping[str, float] | None = None,
    ) -> None:
        """At every parameter of the peer. `but`: those whose gradients are known to differ, or do not exist.
        `constants`: by what a peer's gradient is to be multiplied."""
        leaves = {name: parameter for name, parameter in self.peer.named_parameters() if name not in but}
        assert set(but) <= dict(self.peer.named_parameters()).keys()
        theirs = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        self.coder.zero_grad()
        our_loss.backward()
        images = self.weights()
        own = {name: p.grad for name, p in self.coder.named_parameters() if name in images and p.grad is not None}
        carried = torch.autograd.grad(
            [images[name] for name in own], list(leaves.values()), list(own.values()), allow_unused=True
        )
        for name, a, b in zip(leaves, carried, theirs, strict=True):
            assert a is not None, f"nothing of ours depends on the peer's {name}"
            self.equal(a, b * (constants or {}).get(name, 1.0), f"gradient of {name}", tolerance)

    def in_use(self, x: Tensor, z: Tensor, x_hat: Tensor, tolerance: dict[str, float] = EXACT) -> None:
        """Each row on its own, after training."""
        self.coder.eval()
        self.equal(self.coder.encode(x), z, "codes in use", tolerance)
        self.equal(self.coder(x), x_hat, "reconstruction in use", tolerance)
        self.coder.train()
