"""Small coders, one per entry of the tables, and data whose sparse directions are known."""

import torch
from torch import Tensor

from vitrail.coders import BASELINES, CODERS, SparseCoder, Transcoder
from vitrail.statistics import ActivationStats

D_IN, D_SAE, K = 20, 28, 4
D_OUT = 23  # of transcoders, whose rows in training are [x_in | x_out]

# Few rows as candidates, so that they are not already the planted directions.
OF_DATA = {"n_candidates": 20, "candidates_from": "subsample"}
# Entries whose untrained codes may reconstruct worse than nothing: dense ones, and directions that overlap.
OVERSHOOTING = {"gated", "archetypal_batch_topk"}
SCALED = {"archetypal_topk", "archetypal_batch_topk"}  # W_enc starts as a multiple of W_dec's transpose
TIED = {"matching_pursuit"}  # W_enc is W_dec's transpose and moves with it

# What each entry needs beyond d_in, d_sae and seed at this size. A new entry without a line here fails the contract.
ARGUMENTS = {
    "relu": {"d_sae": D_SAE, "l1": 0.3},
    "topk": {"d_sae": D_SAE, "k": K},
    "batch_topk": {"d_sae": D_SAE, "k": K},
    "matryoshka": {"d_sae": D_SAE, "ks": [2, 4, 8, D_SAE], "inference_k": K},
    "jump_relu": {"d_sae": D_SAE, "l0_coefficient": 0.3, "bandwidth": 0.3, "initial_threshold": 1.0},
    "gated": {"d_sae": D_SAE, "l1": 3.0},
    "topk_transcoder": {"d_sae": D_SAE, "d_out": D_OUT, "k": K},
    "batch_topk_transcoder": {"d_sae": D_SAE, "d_out": D_OUT, "k": K},
    "relu_transcoder": {"d_sae": D_SAE, "d_out": D_OUT, "l1": 0.3},
    "crosscoder": {"d_sae": D_SAE, "widths": [8, 12], "l1": 0.3},
    "topk_crosscoder": {"d_sae": D_SAE, "widths": [8, 12], "k": K},
    "batch_topk_crosscoder": {"d_sae": D_SAE, "widths": [8, 12], "k": K},
    "matryoshka_prefix": {"d_sae": D_SAE, "k": K, "prefixes": [20]},
    "archetypal_topk": {"d_sae": D_SAE, "k": K, **OF_DATA},
    "archetypal_batch_topk": {"d_sae": D_SAE, "k": K, **OF_DATA},
    "matching_pursuit": {"d_sae": D_SAE, "k": K},
    "random": {"d_sae": D_SAE, "k": K},
    "pca": {"k": K, "n_components": 10},
    "neurons": {"k": K},
    "kmeans": {"d_sae": D_SAE, "k": K},
}
ALL = CODERS | BASELINES


def _error(coder, y, z):
    return (z @ coder.W_dec + coder.b_dec - y).pow(2).sum(-1).mean()


def _jump_relu_loss(coder, y):
    pre, theta = (y - coder.b_dec) @ coder.W_enc + coder.b_enc, coder.log_threshold.exp()
    fired = (pre > theta).to(pre.dtype)
    # A rectangle as wide as the bandwidth; constants times (theta - itself) carry the estimated derivative.
    slope = ((pre - theta).abs() < coder.bandwidth / 2).to(pre.dtype) / coder.bandwidth
    moved = theta - theta.detach()
    z = pre * fired - theta.detach() * slope * moved
    return _error(coder, y, z) + coder.coefficient * (fired - slope * moved).sum(1).mean()


def _gated_loss(coder, y):
    shared = (y - coder.b_dec) @ coder.W_enc
    pre = shared + coder.b_enc
    z = (coder.r_mag.exp() * shared + coder.b_mag).relu() * (pre > 0).detach()
    via_gate = pre.relu() @ coder.W_dec.detach() + coder.b_dec.detach()
    return _error(coder, y, z) + coder.l1 * pre.relu().sum(1).mean() + (via_gate - y).pow(2).sum(1).mean()


def _kept_by_row(pre, k):
    return pre.relu() * (pre >= pre.sort(1, descending=True).values[:, k - 1 : k]).detach()


def _kept_by_batch(pre, k):
    return pre.relu() * (pre >= pre.flatten().sort(descending=True).values[len(pre) * k - 1]).detach()


def _matching_pursuit_loss(coder, y):
    residual, z = y - coder.b_dec, torch.zeros(len(y), coder.d_sae, dtype=y.dtype)
    for _ in range(coder.k):
        pre = residual @ coder.W_dec.t() + coder.b_enc
        step = pre.relu() * (pre == pre.max(1, keepdim=True).values).detach()
        z, residual = z + step, residual - step @ coder.W_dec
    return _error(coder, y, z)


def _plain_loss(coder, y, z_of):
    return _error(coder, y, z_of((y - coder.b_dec) @ coder.W_enc + coder.b_enc))


def _transcoder_loss(coder, y, z_of):
    """`y`: both halves, normalised."""
    y_in, y_out = y[:, : coder.d_in], y[:, coder.d_in :]
    z = z_of((y_in - coder.b_dec) @ coder.W_enc + coder.b_enc)
    skipped = y_in @ coder.W_skip if coder.skip else 0
    error = (z @ coder.W_dec + coder.b_out + skipped - y_out).pow(2).sum(1).mean()
    return error + coder.l1 * z.sum(1).mean() if coder.name == "relu_transcoder" else error


def _crosscoder_loss(coder, y, z_of):
    """Source by source, as the paper writes it."""
    ends = [sum(coder.widths[: i + 1]) for i in range(len(coder.widths))]
    parts = [slice(end - width, end) for end, width in zip(ends, coder.widths, strict=True)]
    z = z_of(sum((y[:, m] - coder.b_dec[m]) @ coder.W_enc[m] for m in parts) + coder.b_enc)
    loss = sum((z @ coder.W_dec[:, m] + coder.b_dec[m] - y[:, m]).pow(2).sum(1).mean() for m in parts)
    if coder.name == "crosscoder":
        loss = loss + coder.l1 * (z * sum(coder.W_dec[:, m].norm(dim=1) for m in parts)).sum(1).mean()
    return loss


def _matryoshka_prefix_loss(coder, y):
    z = _kept_by_batch((y - coder.b_dec) @ coder.W_enc + coder.b_enc, coder.k)
    latents = torch.arange(coder.d_sae)
    return sum(_error(coder, y, z * (latents < width)) for width in coder.widths) / len(coder.widths)


# The loss by dense products and plain autograd: what an entry's gradients must equal.
DENSE_LOSSES = {
    "jump_relu": _jump_relu_loss,
    "gated": _gated_loss,
    "matryoshka_prefix": _matryoshka_prefix_loss,
    "matching_pursuit": _matching_pursuit_loss,
    # W_dec's gradient is checked here, what it passes on to the mixing in test_archetypal.py.
    "archetypal_topk": lambda coder, y: _plain_loss(coder, y, lambda pre: _kept_by_row(pre, coder.k)),
    "archetypal_batch_topk": lambda coder, y: _plain_loss(coder, y, lambda pre: _kept_by_batch(pre, coder.k)),
    "topk_transcoder": lambda coder, y: _transcoder_loss(coder, y, lambda pre: _kept_by_row(pre, coder.k)),
    "batch_topk_transcoder": lambda coder, y: _transcoder_loss(coder, y, lambda pre: _kept_by_batch(pre, coder.k)),
    "relu_transcoder": lambda coder, y: _transcoder_loss(coder, y, torch.relu),
    "crosscoder": lambda coder, y: _crosscoder_loss(coder, y, torch.relu),
    "topk_crosscoder": lambda coder, y: _crosscoder_loss(coder, y, lambda pre: _kept_by_row(pre, coder.k)),
    "batch_topk_crosscoder": lambda coder, y: _crosscoder_loss(coder, y, lambda pre: _kept_by_batch(pre, coder.k)),
}


def make(name: str, **changes) -> SparseCoder:
    return ALL[name](**{"d_in": D_IN, **ARGUMENTS[name], **changes})


def fitted(name: str, x: Tensor | None = None, **changes) -> SparseCoder:
    """In train mode, as constructed; normalised and calibrated on x."""
    coder = make(name, **changes)
    x = rows(d_in=coder.d_row) if x is None else x
    coder.fit(ActivationStats.of(x), x)
    coder.calibrate([x])
    return coder


def rows(n: int = 64, seed: int = 1, d_in: int = D_IN) -> Tensor:
    """Off centre and of unequal spread, as real activations are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator) * torch.linspace(0.5, 3, d_in) + torch.linspace(-4, 9, d_in)


def rows_for(coder: SparseCoder, n: int = 64) -> Tensor:
    """What `fit`, `loss` and `calibrate` take: rows of d_row."""
    return rows(n, d_in=coder.d_row)


def inputs_for(coder: SparseCoder, n: int = 64) -> Tensor:
    """What encode and forward take: the first d_in of the same rows."""
    return rows_for(coder, n)[:, : coder.d_in]


def normalized_row(coder: SparseCoder, x: Tensor) -> Tensor:
    """What the coder reads, and after it what it reconstructs if that is something else."""
    if not isinstance(coder, Transcoder):
        return coder.normalize(x).y
    return torch.cat([coder.normalize(x[:, : coder.d_in]).y, coder.normalize_out(x[:, coder.d_in :]).y], 1)


def planted(n: int, n_directions: int = 24, seed: int = 77, d_row: int = D_IN) -> tuple[Tensor, Tensor]:
    """Rows that are sparse positive sums of known unit directions, and the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_directions, d_row, generator=generator), dim=1)
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
    """For each true direction the best cosine among the decoder's, averaged. Of a longer row, the end is decoded."""
    directions = torch.nn.functional.normalize(directions[:, -coder.d_out :], dim=1)
    found = torch.nn.functional.normalize(coder.W_dec.detach(), dim=1)
    return (directions @ found.t()).max(1).values.mean().item()
