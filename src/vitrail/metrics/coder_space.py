"""Rows as a coder's loss sees them: the normalised space in which it reads, writes and decides what is large.

    y = n(x),   y_hat = n(x_hat)         n: the normalisation of what the coder writes (coders/normalize.py)
    x_hat = scale * y_hat + a constant   `output_scale`, of each dimension or of each row

Where rows are normalised by their own numbers, x_hat is normalised by its row's, which came with the codes.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.coders.base import SparseCoder
from vitrail.coders.crosscoder import PerSource
from vitrail.coders.normalize import Normalization
from vitrail.coders.sparse import Codes
from vitrail.coders.transcoder import INPUT_ROW, Transcoder

RowTerms = tuple[Tensor, Tensor] | None  # shift and scale, (n, 1) each


def row_terms(codes: Codes, rows: slice) -> RowTerms:
    """What some rows of the codes carry, if they carry anything."""
    return None if codes.shift is None or codes.scale is None else (codes.shift[rows], codes.scale[rows])


def in_coders_space(coder: SparseCoder, rows: Float[Tensor, "n d_out"], terms: RowTerms) -> Float[Tensor, "n d_out"]:
    """Raw rows of what the coder writes, targets or reconstructions, normalised. `terms`: of their codes."""
    rows = rows.to(coder.W_dec.dtype)
    own = _of_written_rows(coder, terms)
    return _of_output(coder)(rows).y if own is None else (rows - own[0]) / own[1]


def output_scale(coder: SparseCoder, terms: RowTerms) -> Float[Tensor, "n_or_1 d_or_1"]:
    """What a step of one in the coder's space is in raw activations."""
    own = _of_written_rows(coder, terms)
    if own is not None:
        return own[1]
    return _scale_of(_of_output(coder)).to(coder.W_dec)


def _scale_of(normalization: Normalization) -> Float[Tensor, "1 d_or_1"]:
    if isinstance(normalization, PerSource):
        widths = [columns.stop - columns.start for columns in normalization.columns]
        return torch.cat([_scale_of(normalization.of(m)).expand(1, width) for m, width in enumerate(widths)], 1)
    scale = getattr(normalization, "scale", None)
    return torch.ones(1, 1) if scale is None else scale.reshape(1, 1)


def _of_output(coder: SparseCoder) -> Normalization:
    return coder.normalize_out if isinstance(coder, Transcoder) else coder.normalize


def _of_written_rows(coder: SparseCoder, terms: RowTerms) -> RowTerms:
    """A transcoder's codes carry the terms of the rows it reads, which it may or may not write by."""
    return None if isinstance(coder, Transcoder) and coder.output_normalization != INPUT_ROW else terms
