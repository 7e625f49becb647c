"""The contract of a sparse coder.

    y = n(x)                                    normalisation, part of the coder (normalize.py)
    z = select((y - b_dec) @ W_enc + b_enc)     non-negative, mostly zero; `select` is the architecture
    x_hat = n^-1(z @ W_dec + b_dec)

A coder takes raw activations. Whether it is in train or eval mode changes nothing in encode and decode, and no row sees
another: what an architecture does to a whole batch at once (BatchTopK) it does inside `loss`.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.coders.normalize import make_normalization
from vitrail.coders.sparse import Codes, activations, decode, dense_pre_activations
from vitrail.statistics import ActivationStats

# Pre-activations are made for this many rows at a time and thrown away: they stay near the cache, and memory does not
# grow with the batch. Costs at most 6 % of the product (PEERS.md, section 10).
ROWS_AT_ONCE = 1024
DIRECTIONS_AT_ONCE = 256  # so many of 768 dimensions stay in a core's cache while they are worked on


class Step:
    """One batch's objective. `terms` are already weighted and sum to `loss`.

    `y` is what the encoder read, `target` what `x_hat` reconstructs, all in the normalised space in which the loss is
    measured; but for transcoders, `target` is `y`. `penalty` names the terms that buy sparsity (L1 and its like), which
    a trainer may phase in. Where half of the latents are positive, `codes` cost as much as a dense product: give a
    function that makes them when they are asked for, and `fired`, in how many rows each latent fired, beside it.
    """

    def __init__(
        self,
        loss: Float[Tensor, ""],
        terms: dict[str, Float[Tensor, ""]],
        codes: Codes | Callable[[], Codes],
        *,
        y: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"],
        x_hat: Float[Tensor, "n d_out"],
        penalty: tuple[str, ...] = (),
        fired: Int[Tensor, " d_sae"] | None = None,
    ) -> None:
        self.loss, self.terms, self.y, self.target, self.x_hat, self.penalty = loss, terms, y, target, x_hat, penalty
        self._codes, self._fired = codes, fired

    @property
    def codes(self) -> Codes:
        """What fires in use, without gradient."""
        if not isinstance(self._codes, Codes):
            self._codes = self._codes()
        return self._codes

    def fired(self) -> Int[Tensor, " d_sae"]:
        return self.codes.fired() if self._fired is None else self._fired


class SparseCoder(nn.Module):
    """A subclass names itself, keeps its constructor's arguments under their own names, and says how to `select`."""

    name: ClassVar[str]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    fitted: Tensor

    def __init__(self, *, d_in: int, d_sae: int, normalization: str, b_dec_init: str, seed: int) -> None:
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in and d_sae must be at least 1, got d_in={d_in}, d_sae={d_sae}.")
        if b_dec_init not in ("zeros", "geometric_median"):
            raise ValueError(f"b_dec_init must be 'zeros' or 'geometric_median', got {b_dec_init!r}.")
        self.d_in, self.d_sae = d_in, d_sae
        self.normalization, self.b_dec_init, self.seed = normalization, b_dec_init, seed
        self.normalize = make_normalization(normalization, d_in=d_in)
        directions = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        self.W_dec = nn.Parameter(directions)
        # .clone(): without it W_enc is a view of W_dec, and load_state_dict writes one over the other. Its memory lies
        # latent by latent, like W_dec's, so that the sparse gradients (sparse.py) need no transposing copy.
        self.W_enc = nn.Parameter(directions.clone().t())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("fitted", torch.tensor(not self.normalize.needs_fit and b_dec_init == "zeros"))
        # In which the dense product that finds the latents is made; their values and all gradients stay in the weights'
        # own. A matter of training, not of what the coder is: never saved.
        self.selection_dtype: torch.dtype | None = None
        # What was estimated, how, and on what. It describes the buffers and shapes no output; saved with the coder.
        self.calibration: dict[str, Any] = {}

    # -- what an architecture says

    def select(self, pre: Float[Tensor, "n d_sae"]) -> Codes:
        """The latents that fire, given the pre-activations; each row on its own."""
        raise NotImplementedError

    def training_codes(self, y: Float[Tensor, "n d_in"]) -> Codes:
        """The support the loss is taken on. No gradient. As in use, unless the architecture looks at the batch."""
        return self.by_chunks(self.select, y)

    def loss(self, x: Float[Tensor, "n d_in"]) -> Step:
        """Mean over rows of the squared error summed over d_in, in normalised space."""
        y = self.normalized(x)
        with torch.no_grad():
            support = self.training_codes(y)
        codes = activations(y, self.b_dec, self.W_enc, self.b_enc, support)
        y_hat = decode(codes, self.W_dec) + self.b_dec
        error = squared_error(y, y_hat)
        return Step(error, {"reconstruction": error}, codes.detach(), y=y, target=y, x_hat=y_hat)

    def calibrate(self, batches: Iterable[Float[Tensor, "_ d_in"]]) -> dict[str, Any]:
        """Estimate, on held-out raw activations, what inference needs beyond the weights. Returns what was done."""
        return {}

    # -- the way of a row

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> Codes:
        y, shift, scale = self.normalize(self._checked(x))
        with torch.no_grad():
            support = self.by_chunks(self.select, y)
        codes = activations(y, self.b_dec, self.W_enc, self.b_enc, support)
        return codes.with_row_terms(shift, scale)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return self.encode_sparse(x).to_dense()

    def decode_sparse(self, codes: Codes) -> Float[Tensor, "n d_in"]:
        if codes.d_sae != self.d_sae:
            raise ValueError(f"the codes have d_sae={codes.d_sae}, this coder has {self.d_sae}: another coder's codes.")
        return self.normalize.invert(decode(codes, self.W_dec) + self.b_dec, codes.shift, codes.scale)

    def decode(
        self, z: Float[Tensor, "n d_sae"], like: Codes | Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_in"]:
        """`like`: codes or activations of the same rows; needed only where a row is normalised by its own numbers."""
        if isinstance(like, Tensor):
            _, shift, scale = self.normalize(self._checked(like))
        else:
            shift, scale = (None, None) if like is None else (like.shift, like.scale)
        return self.normalize.invert(z @ self.W_dec + self.b_dec, shift, scale)

    def forward(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        return self.decode_sparse(self.encode_sparse(x))

    def pre_activations(self, y: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return dense_pre_activations(y, self.b_dec, self.W_enc, self.b_enc)

    def by_chunks(self, select: Callable[[Tensor], Codes], y: Float[Tensor, "n d_in"]) -> Codes:
        """`select` on the pre-activations of a few rows at a time."""
        return Codes.cat([select(self.pre_activations(rows)) for rows in y.split(ROWS_AT_ONCE)])

    def normalized(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """y = n(x), in which the loss is measured."""
        x = self._checked(x)
        if len(x) == 0:
            raise ValueError("a batch of no rows has no loss.")
        return self.normalize(x).y

    # -- before and during training

    @torch.no_grad()
    def fit(self, stats: ActivationStats, sample: Float[Tensor, "n d_in"]) -> None:
        """Normalisation and whatever else of the starting point depends on the data. `sample`: raw activations."""
        if stats.mean.shape != (self.d_in,):
            raise ValueError(f"the statistics are of {len(stats.mean)} dimensions; this coder has d_in={self.d_in}.")
        self.normalize.fit(stats)
        self.fitted.fill_(True)
        if self.b_dec_init == "geometric_median":
            self.b_dec.copy_(geometric_median(self.normalized(sample)))

    @property
    def is_fitted(self) -> bool:
        return bool(self.fitted)

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Take from W_dec's gradient what is parallel to each direction: it would only change a norm that is fixed."""
        if self.W_dec.grad is None:
            return
        at_once = DIRECTIONS_AT_ONCE if self.W_dec.device.type == "cpu" else self.d_sae
        for g, w in zip(self.W_dec.grad.split(at_once), self.W_dec.split(at_once), strict=True):
            g.addcmul_(w, (g * w).sum(1, keepdim=True), value=-1)

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """Decoder directions back to unit norm."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_dec.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny))

    # -- what it is

    @property
    def d_out(self) -> int:
        """Width of a reconstruction: d_in, but for transcoders."""
        return self.W_dec.shape[1]

    @property
    def d_row(self) -> int:
        """Width of the rows that `fit`, `loss` and `calibrate` take: d_in, or more where a row carries its target."""
        return self.d_in

    def output_bias(self) -> Float[Tensor, " d_out"]:
        """What every reconstruction starts from, in normalised space."""
        return self.b_dec

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: type(coder)(**coder.config) is the same coder before training."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def _checked(self, x: Tensor) -> Tensor:
        if not self.is_fitted:
            raise RuntimeError(
                f"this {self.name} coder has not seen its data: its {self.normalization!r} normalisation is not set. "
                f"Train it, load it, or call coder.fit(stats, sample)."
            )
        if x.shape[1] != self.d_in:
            raise ValueError(f"this coder takes activations of d_in={self.d_in}, got {x.shape[1]} per row.")
        return x.to(self.W_dec.dtype)


def squared_error(y: Float[Tensor, "n d_in"], y_hat: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
    """Summed over dimensions, averaged over rows."""
    return (y_hat - y).square().sum(1).mean()


def geometric_median(y: Float[Tensor, "n d_in"], n_iterations: int = 100) -> Float[Tensor, " d_in"]:
    """The point of least summed distance to the rows, by Weiszfeld's iteration."""
    median = y.mean(0)
    for _ in range(n_iterations):
        distance = torch.linalg.vector_norm(y - median, dim=1).clamp_min(1e-8)
        weight = distance.reciprocal()
        moved = (weight @ y) / weight.sum()
        if torch.allclose(moved, median, rtol=1e-6, atol=1e-8):
            return moved
        median = moved
    return median
