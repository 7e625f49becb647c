"""The answer of a steered last layer without running the model again.

A coordinate moves the row r that is pooled along its direction n by a. Where the model then makes

    embedding = norm(r + a n) @ W + b,     norm(x) = (x - mean x) * gain / sigma + bias

everything of size d is a sum of parts that belong to the image or to the direction alone:

    c = r - mean r,  m = n - mean n,       sigma^2 = (|c|^2 + 2 a c.m + a^2 |m|^2) / d + eps
    sigma embedding = A + a B + sigma C,   A = (c * gain) W,  B = (m * gain) W,  C = bias W + b
    logits = scale (A T + a B T + sigma C T) / |A + a B + sigma C|

with T the words' unit rows, so a pair of image and direction costs three numbers a word. As a grows, x + a n becomes
n: the embedding tends to (m * gain / sd(n)) W + C whatever the image, the curve's asymptote.

How a model pools and projects is not asked of its class but measured on it: `find_tail` reads W and b off the model's
answers to unit vectors, and keeps them only if they give the model's own embeddings on tokens as they come.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitrail.backbones.base import Backbone
from vitrail.hooks import Site, capturing
from vitrail.metrics.heads import ZeroShotHead

LN_FINAL, IMAGE_EMBED = "ln_final.hook_normalized", "hook_image_embed"


@dataclass(frozen=True, eq=False)
class Norm:
    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    eps: float


@dataclass(frozen=True, eq=False)
class Tail:
    """embedding = norm(token_weights . x) @ weight + offset; without tokens, norm or weight where those are None."""

    token_weights: Float[Tensor, " t"] | None
    norm: Norm | None
    weight: Float[Tensor, "d d_embed"] | None
    offset: Float[Tensor, " d_embed"]

    def pooled(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        return x.float() if self.token_weights is None else torch.einsum("btd,t->bd", x.float(), self.token_weights)

    def __call__(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b d_embed"]:
        row = self.pooled(x)
        if self.norm is not None:
            gain, bias = self.norm.gain, self.norm.bias
            row = nn.functional.layer_norm(row, (len(gain),), gain, bias, self.norm.eps)
        return (row if self.weight is None else row @ self.weight) + self.offset


@torch.no_grad()
def find_tail(backbone: Backbone, point: str, x: Float[Tensor, "b ..."]) -> Tail | None:
    """What follows `point`, if it is of this form; None if it is not. `x`: the point's values on a few images.

    Form and fit are measured: CLS or mean pooling, any projection that is affine. An attention pooling, a tanh, a
    normalisation of another kind or a precision below fp32 give None.
    """
    if point == IMAGE_EMBED:
        return Tail(None, None, None, torch.zeros(x.shape[1], device=x.device))
    known = backbone.points.get(LN_FINAL)
    if known is None or point not in (LN_FINAL, f"blocks.{backbone.n_layers - 1}.hook_resid_post"):
        return None
    affine = _affine(backbone, has_tokens=known.has_tokens)
    norm = None if point == LN_FINAL else _norm(backbone)
    if affine is None or (norm is None and point != LN_FINAL):
        return None
    for weights in _poolings(backbone, x, pools_first=point != LN_FINAL and not known.has_tokens):
        tail = Tail(weights, norm, *affine)
        if _fits(backbone, point, tail, x):
            return tail
    return None


class ClosedForm:
    """Probabilities of n images for any directions and steps. `base`: the point's values, as the edit finds them."""

    def __init__(self, tail: Tail, base: Float[Tensor, "n ..."], head: ZeroShotHead) -> None:
        self.tail, self.n = tail, len(base)
        rows = tail.pooled(base)
        self._words = normalize(head.classes.to(rows), dim=1)
        self._scale = 1.0 if head.logit_scale is None else head.logit_scale
        self._c = self._centred(rows)
        self._a = self._through(self._c)
        constant = tail.offset
        if tail.norm is not None and tail.weight is not None:
            constant = tail.norm.bias @ tail.weight + tail.offset
        self._at, self._ct = self._a @ self._words.T, constant @ self._words.T
        self._constant = constant.double()
        self._buffers: list[Tensor] = []

    @property
    def n_words(self) -> int:
        return len(self._words)

    def probabilities(
        self, directions: Float[Tensor, "m d"], steps: Float[Tensor, "n m"]
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "k b v"]]]:
        """(coordinates, images, P~) in parts of at most PAIRS_AT_ONCE x words numbers, coordinates outermost.

        A part's memory is used again for the next one.
        """
        m = self._centred(directions.to(self._c))
        b = self._through(m)
        steps, sigma, norms = self._sizes(m, b, steps)
        bt = b @ self._words.T
        unit = self._scale / norms
        at_once, images_at_once = parts_of(self.n, len(directions), self.n_words)
        for first in range(0, len(directions), at_once):
            chosen = slice(first, min(first + at_once, len(directions)))
            basis = torch.stack([bt[chosen], self._ct.expand_as(bt[chosen])], 1)  # (k, 2, v)
            for start in range(0, self.n, images_at_once):
                images = slice(start, min(start + images_at_once, self.n))
                u = unit[images, chosen].T  # (k, b)
                pair = torch.stack([u * steps[images, chosen].T, u * sigma[images, chosen].T], 2)
                logits, out = self._buffer((len(pair), len(pair[0]), self.n_words))
                torch.mul(self._at[images], u[:, :, None].float(), out=logits)
                logits.baddbmm_(pair.float(), basis)
                yield chosen, images, torch.softmax(logits, 2, out=out)

    def embeddings(self, directions: Float[Tensor, "m d"], steps: Float[Tensor, "n m"]) -> Float[Tensor, "m n d_embed"]:
        """The same before the words, made unit rows: for few."""
        m = self._centred(directions.to(self._c))
        b = self._through(m)
        steps, sigma, norms = self._sizes(m, b, steps)
        parts = self._a[None] + (steps.T[:, :, None] * b[:, None]) + sigma.T[:, :, None] * self._constant
        return (parts / norms.T[:, :, None]).float()

    def limits(self, directions: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        """P~ as the step grows without end: the same for every image. NaN for a direction that the norm takes away."""
        m = self._centred(directions.to(self._c))
        embedding = self._through(m)
        if self.tail.norm is not None:
            sigma = m.square().mean(1, keepdim=True).sqrt()
            embedding = embedding / sigma + self._constant.float()
        return (self._scale * normalize(embedding, dim=1) @ self._words.T).softmax(1)

    # -- details

    def _centred(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(1, keepdim=True) if self.tail.norm is not None else rows

    def _through(self, rows: Tensor) -> Tensor:
        rows = rows if self.tail.norm is None else rows * self.tail.norm.gain
        return rows if self.tail.weight is None else rows @ self.tail.weight

    def _sizes(self, m: Tensor, b: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(steps, sigma, |A + a B + sigma C|), each (n, m), in double: the parts may be far larger than their sum."""
        a, steps = self._a.double(), steps.double()
        m, b, c, constant = m.double(), b.double(), self._c.double(), self._constant
        sigma = torch.ones_like(steps)
        if self.tail.norm is not None:
            squares = c.square().sum(1)[:, None] + 2 * steps * (c @ m.T) + steps.square() * m.square().sum(1)
            sigma = (squares.clamp_min(0) / c.shape[1] + self.tail.norm.eps).sqrt()
        squares = a.square().sum(1)[:, None] + steps.square() * b.square().sum(1)
        squares = squares + sigma.square() * constant.square().sum() + 2 * steps * (a @ b.T)
        squares = squares + 2 * sigma * ((a @ constant)[:, None] + steps * (b @ constant))
        # as normalize() of the embedding, whose length is this divided by sigma
        return steps, sigma, torch.maximum(squares.clamp_min(0).sqrt(), 1e-12 * sigma)

    def _buffer(self, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        size = shape[0] * shape[1] * shape[2]
        if not self._buffers or self._buffers[0].numel() < size:
            self._buffers = [self._at.new_empty(size) for _ in range(2)]
        logits, out = (buffer[:size].view(shape) for buffer in self._buffers)
        return logits, out


NUMBERS_AT_ONCE = 400_000  # of probabilities: two such buffers stay in a core's cache


def parts_of(n_images: int, m: int, n_words: int, numbers: int = NUMBERS_AT_ONCE) -> tuple[int, int]:
    """(coordinates, images) at once: all images of some coordinates, or of one coordinate some images."""
    coordinates = max(1, min(m, numbers // (n_images * n_words)))
    return coordinates, max(1, min(n_images, numbers // n_words))


def _affine(backbone: Backbone, *, has_tokens: bool) -> tuple[Tensor, Tensor] | None:
    """(weight, offset) of what follows the final norm, from its answers to 0 and to the unit vectors."""
    d, n_tokens = backbone.points[LN_FINAL].width, backbone.grid.n_tokens
    weight = next(backbone.parameters())
    if weight.dtype != torch.float32:
        return None
    answers = []
    for rows in torch.cat([torch.zeros(1, d), torch.eye(d)]).to(weight.device).split(64):
        value = rows[:, None, :].expand(-1, n_tokens, -1) if has_tokens else rows
        if has_tokens:  # of the class token alone: whether that is what is read, the trial tells
            value = value * (torch.arange(n_tokens, device=rows.device) == 0)[:, None]
        empty = torch.zeros(len(rows), n_tokens, backbone.d_model, device=rows.device)
        with backbone.hooks({LN_FINAL: lambda _value, _point, value=value: value}):
            answers.append(backbone.pool(empty))
    every = torch.cat(answers)
    return every[1:] - every[:1], every[0]


def _norm(backbone: Backbone) -> Norm | None:
    """The final LayerNorm: the one through whose output the hook point's value passes."""
    weight = next(backbone.parameters())
    tokens = torch.randn(2, backbone.grid.n_tokens, backbone.d_model, generator=torch.Generator().manual_seed(0))
    norms = {str(at): one for at, one in enumerate(backbone.module.modules()) if isinstance(one, nn.LayerNorm)}
    seen: list[Tensor] = []
    # The sites keep what passed last; those that nothing passed are not in the cache.
    sites, keep = {at: Site(one, "output") for at, one in norms.items()}, lambda value, _point: seen.append(value)
    with capturing(sites) as cache, backbone.hooks({LN_FINAL: keep}):
        backbone.pool(tokens.to(weight))
    for at, value in cache.items():
        one = norms[at]
        if seen and value.shape == seen[0].shape and torch.equal(value, seen[0]) and len(one.normalized_shape) == 1:
            d = one.normalized_shape[0]
            gain = torch.ones(d, device=weight.device) if one.weight is None else one.weight.detach()
            bias = torch.zeros(d, device=weight.device) if one.bias is None else one.bias.detach()
            return Norm(gain, bias, one.eps)
    return None


def _poolings(backbone: Backbone, x: Tensor, *, pools_first: bool) -> Iterator[Tensor | None]:
    """Token weights to try. Behind a norm of every token only one token's row is a row before it."""
    if x.ndim == 2:
        yield None
        return
    t, n_special = x.shape[1], backbone.grid.n_special
    first = torch.zeros(t, device=x.device)
    first[0] = 1
    yield first
    if pools_first:
        for start in dict.fromkeys((n_special, 0, backbone.grid.n_cls)):
            weights = torch.zeros(t, device=x.device)
            weights[start:] = 1 / (t - start)
            yield weights


def _fits(backbone: Backbone, point: str, tail: Tail, x: Tensor) -> bool:
    """Whether the tail gives the model's embeddings of x, and of x disturbed in every token."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * x.std()
    for value in (x, x + 3 * noise):
        if point == LN_FINAL:
            empty = torch.zeros(len(x), backbone.grid.n_tokens, backbone.d_model).to(x)
            with backbone.hooks({LN_FINAL: lambda _value, _point, value=value: value}):
                expected = backbone.pool(empty)
        else:
            expected = backbone.pool(value)
        if not torch.allclose(tail(value), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
            return False
    return True
