"""Transcoders: codes of one hook point that reconstruct another, such as what an MLP makes of what it reads.

    y = n(x_in)                                          the input's normalisation
    z = select((y - b_dec) @ W_enc + b_enc)              as the coder of the same name without "_transcoder"
    x_hat_out = n_out^-1(z @ W_dec + b_out [+ y @ W_skip])
    loss = mean_rows ||n_out(x_out) - (z @ W_dec + b_out [+ y @ W_skip])||^2  [+ l1 * ||z||_1]

Dunefsky et al. 2024, arXiv:2406.11944; the skip: Paulo et al. 2025, arXiv:2501.18823. `b_dec` (d_in) is
what the encoder subtracts, `b_out` (d_out) what every output starts from. A row in training is [x_in | x_out], d_row =
d_in + d_out wide; encode and forward take x_in alone.

Encoder and decoder live in different spaces, so they start as independent unit directions and not as each other's
transpose. W_skip starts at zero, as in Paulo et al.; their zero decoder cannot have unit norm. The output is normalised
by the statistics of x_out, so that with b_out = 0 it starts at its mean. `output_normalization="input_row"` does as
Prisma does: each output row by the numbers that its *input* row was normalised by.

With a skip, `Step.target` and `Step.x_hat` are what is left for the latents, y_out - y @ W_skip and z @ W_dec + b_out:
the error is the same, and revival and the log's fvu speak of what latents have to explain.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.coders.base import SparseCoder, Step, geometric_median, squared_error
from vitrail.coders.batch_topk import BatchTopK
from vitrail.coders.columns import stats_of_columns
from vitrail.coders.normalize import NORMALIZATIONS, Normalization, make_normalization
from vitrail.coders.relu import ReLU
from vitrail.coders.sparse import Codes, activations, decode
from vitrail.coders.thresholded import rectified
from vitrail.coders.topk import TopK
from vitrail.statistics import ActivationStats

INPUT_ROW = "input_row"


class Transcoder(SparseCoder):
    """Goes before an architecture among a class's bases; `add_output` follows the architecture's constructor."""

    b_out: Float[Tensor, " d_out"]
    W_skip: Float[Tensor, "d_in d_out"] | None

    def add_output(self, *, d_out: int | None, skip: bool, output_normalization: str) -> None:
        """`d_out` None: as wide as the input."""
        d_out = self.d_in if d_out is None else d_out
        if d_out < 1:
            raise ValueError(f"d_out must be at least 1, got {d_out}.")
        self.skip, self.output_normalization = skip, output_normalization
        self.normalize_out = self._output_normalization(d_out)
        # A stream of its own: with the encoder's seed and d_in = d_out the decoder would be the encoder's transpose.
        directions = torch.randn(self.d_sae, d_out, generator=torch.Generator().manual_seed(self.seed + 0x5EED))
        self.W_dec = nn.Parameter(directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True))
        self.b_out = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(self.d_in, d_out)) if skip else None
        self.fitted.logical_and_(torch.tensor(not self.normalize_out.needs_fit))

    def _output_normalization(self, d_out: int) -> Normalization:
        if self.output_normalization == INPUT_ROW:
            if not self.normalize.per_row:
                raise ValueError(
                    f"output_normalization={INPUT_ROW!r} uses the numbers of each input row, but normalization="
                    f"{self.normalization!r} has none. Use layer_norm or row_norm for the input."
                )
            return Normalization(d_in=d_out)
        if getattr(NORMALIZATIONS.get(self.output_normalization), "per_row", False):
            raise ValueError(
                f"output_normalization={self.output_normalization!r} needs each output row's own numbers, which are "
                f"not known where only the input is. Use mean_std, or {INPUT_ROW!r} for the input row's numbers."
            )
        return make_normalization(self.output_normalization, d_in=d_out)

    # -- training, on rows [x_in | x_out]

    def loss(self, x: Float[Tensor, "n d_row"]) -> Step:
        y, target = self.normalized_pair(x)
        with torch.no_grad():
            support = self.training_codes(y)
        codes = activations(y, self.b_dec, self.W_enc, self.b_enc, support)
        x_hat = decode(codes, self.W_dec) + self.b_out
        error = squared_error(target, x_hat)
        return Step(error, {"reconstruction": error}, codes.detach(), y=y, target=target, x_hat=x_hat)

    def normalized_pair(self, x: Float[Tensor, "n d_row"]) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """What the encoder reads, and what the latents are to reconstruct: n_out(x_out), less the skip's part."""
        x_in, x_out = self.split(x)
        y, shift, scale = self.normalize(self._checked(x_in))
        x_out = x_out.to(y.dtype)
        by_row = self._input_row_terms(shift, scale)
        target = self.normalize_out(x_out).y if by_row is None else (x_out - by_row[0]) / by_row[1]
        return y, target if self.W_skip is None else target - y @ self.W_skip

    def normalized(self, x: Float[Tensor, "n d_row"]) -> Float[Tensor, "n d_in"]:
        return self.normalize(self._checked(self.split(x)[0])).y

    def split(self, x: Float[Tensor, "n d_row"]) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """The two halves of training rows."""
        if x.shape[1] != self.d_row:
            raise ValueError(
                f"a transcoder learns from rows [x_in | x_out], {self.d_in} + {self.d_out} = {self.d_row} wide; "
                f"got {x.shape[1]}. This coder takes activations of d_in={self.d_in} in encode and forward."
            )
        if len(x) == 0:
            raise ValueError("a batch of no rows has no loss.")
        return x[:, : self.d_in], x[:, self.d_in :]

    @torch.no_grad()
    def fit(self, stats: ActivationStats, sample: Float[Tensor, "n d_row"]) -> None:
        if stats.mean.shape != (self.d_row,):
            raise ValueError(
                f"the statistics are of {len(stats.mean)} dimensions; this coder has d_in={self.d_in} and "
                f"d_out={self.d_out}, and rows of both side by side."
            )
        self.normalize.fit(stats_of_columns(stats, sample, slice(0, self.d_in)))
        self.normalize_out.fit(stats_of_columns(stats, sample, slice(self.d_in, self.d_row)))
        self.fitted.fill_(True)
        if self.b_dec_init == "geometric_median":
            y, target = self.normalized_pair(sample)
            self.b_dec.copy_(geometric_median(y))
            self.b_out.copy_(geometric_median(target))

    # -- in use, on x_in

    def decode_sparse(self, codes: Codes, like: Float[Tensor, "n d_in"] | None = None) -> Float[Tensor, "n d_out"]:
        """`like`: the rows that were encoded; needed only by a skip."""
        if codes.d_sae != self.d_sae:
            raise ValueError(f"the codes have d_sae={codes.d_sae}, this coder has {self.d_sae}: another coder's codes.")
        return self._output(decode(codes, self.W_dec) + self.b_out, codes if like is None else like)

    def decode(
        self, z: Float[Tensor, "n d_sae"], like: Codes | Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        return self._output(z @ self.W_dec + self.b_out, like)

    def forward(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        return self.decode_sparse(self.encode_sparse(x), like=x)

    def _output(
        self, y_hat: Float[Tensor, "n d_out"], like: Codes | Float[Tensor, "n d_in"] | None
    ) -> Float[Tensor, "n d_out"]:
        """Raw, with the skip's part."""
        shift, scale = (like.shift, like.scale) if isinstance(like, Codes) else (None, None)
        if isinstance(like, Tensor):
            y, shift, scale = self.normalize(self._checked(like))
            y_hat = y_hat if self.W_skip is None else y_hat + y @ self.W_skip
        elif self.W_skip is not None:
            raise ValueError(
                "this transcoder has a skip connection, so its output is not a function of the codes alone. "
                "Use coder(x_in), decode(z, like=x_in) or decode_sparse(codes, like=x_in)."
            )
        by_row = self._input_row_terms(shift, scale)
        return self.normalize_out.invert(y_hat, None, None) if by_row is None else y_hat * by_row[1] + by_row[0]

    def _input_row_terms(self, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """What an output row is normalised by, where that is its input row's own."""
        if self.output_normalization != INPUT_ROW:
            return None
        if shift is None or scale is None:
            raise ValueError(
                "this transcoder normalises each output row by its input row's numbers, so codes alone cannot be "
                "decoded. Use decode_sparse on codes from encode_sparse, or pass the input as decode(z, like=x_in)."
            )
        return shift, scale

    # -- what it is

    @property
    def d_row(self) -> int:
        return self.d_in + self.d_out

    def output_bias(self) -> Float[Tensor, " d_out"]:
        return self.b_out


class TopKTranscoder(Transcoder, TopK):
    name = "topk_transcoder"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        k: int = 32,
        inference: str = "topk",
        skip: bool = False,
        normalization: str = "mean_std",
        output_normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        TopK.__init__(
            self,
            d_in=d_in,
            d_sae=d_sae,
            k=k,
            inference=inference,
            normalization=normalization,
            b_dec_init=b_dec_init,
            seed=seed,
        )
        self.add_output(d_out=d_out, skip=skip, output_normalization=output_normalization)


class BatchTopKTranscoder(Transcoder, BatchTopK):
    name = "batch_topk_transcoder"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        k: int = 32,
        skip: bool = False,
        normalization: str = "mean_std",
        output_normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        BatchTopK.__init__(
            self, d_in=d_in, d_sae=d_sae, k=k, normalization=normalization, b_dec_init=b_dec_init, seed=seed
        )
        self.add_output(d_out=d_out, skip=skip, output_normalization=output_normalization)


class ReLUTranscoder(Transcoder, ReLU):
    name = "relu_transcoder"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        l1: float = 1.0,
        skip: bool = False,
        normalization: str = "mean_std",
        output_normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        ReLU.__init__(
            self, d_in=d_in, d_sae=d_sae, l1=l1, normalization=normalization, b_dec_init=b_dec_init, seed=seed
        )
        self.add_output(d_out=d_out, skip=skip, output_normalization=output_normalization)

    def loss(self, x: Float[Tensor, "n d_row"]) -> Step:
        y, target = self.normalized_pair(x)
        weights = (self.b_dec, self.W_enc, self.b_enc, self.W_dec)
        found = rectified(y, *weights, dtype=self.selection_dtype)
        x_hat = found.decoded + self.b_out
        terms = {"reconstruction": squared_error(target, x_hat), "l1": self.l1 * found.per_latent.sum() / len(y)}
        loss, fired = terms["reconstruction"] + terms["l1"], found.rows_fired
        return Step(loss, terms, found.codes, y=y, target=target, x_hat=x_hat, penalty=("l1",), fired=fired)
