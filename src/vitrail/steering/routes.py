"""From steps along directions to probabilities, by the cheapest way that is exact for the point.

    closed        last layer, final norm or image embedding, a pooling that is understood: no forward at all
    blocks+cls    the stream between blocks: the blocks after the point, several coordinates a batch; of the last block
                  the class token alone (its query against all keys and values)
    blocks        the same with the whole last block, where the pooling reads more or the block is of no known kind
    rerun         any other point: from the block that it lies in, one coordinate at a time

A route is taken only if, on the images at hand, it gives the model's own answer where nothing is steered; `name` says
which one it was.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrail.backbones.base import Backbone
from vitrail.metrics.heads import Head, ZeroShotHead
from vitrail.metrics.substitution import Rerun
from vitrail.steering.closed_form import IMAGE_EMBED, ClosedForm, find_tail, parts_of

RouteName = Literal["closed", "blocks+cls", "blocks", "rerun"]
TOKENS_AT_ONCE = 8192  # of the blocks route: rows of a batch of coordinates x images


@dataclass(frozen=True, eq=False)
class Seen:
    """Images run once. `x`: the point's values; `probabilities`: P. `batches`: the images, kept for `rerun`."""

    x: Float[Tensor, "n ..."]
    embedding: Float[Tensor, "n d_embed"]
    probabilities: Float[Tensor, "n v"]
    batches: tuple[Tensor, ...]

    @property
    def n(self) -> int:
        return len(self.x)


@torch.no_grad()
def look(backbone: Backbone, batches: Sequence[Float[Tensor, "_ 3 h w"]], point: str, head: Head) -> Seen:
    """Raises ValueError without images, or where the head is of another width than the embedding."""
    xs, embeddings, device = [], [], next(backbone.parameters()).device
    for images in batches:
        if len(images):
            seen = backbone.activations(images.to(device), list(dict.fromkeys([point, IMAGE_EMBED])))
            xs.append(seen[point])
            embeddings.append(seen[IMAGE_EMBED])
    if not xs:
        raise ValueError("there are no images to steer.")
    embedding = torch.cat(embeddings)
    if isinstance(head, ZeroShotHead) and head.classes.shape[1] != embedding.shape[1]:
        told = f"the image embedding of {backbone.name} is {embedding.shape[1]} wide"
        raise ValueError(f"{told}, the words' rows {head.classes.shape[1]}.")
    kept = tuple(images for images in batches if len(images))
    return Seen(torch.cat(xs), embedding, answers(backbone, embedding, head), kept)


def answers(backbone: Backbone, embedding: Float[Tensor, "b d_embed"], head: Head) -> Float[Tensor, "b v"]:
    """Probabilities, from what is handed to the model's head. A head of kind "own" is the model's."""
    output = backbone.head(embedding) if head.kind == "own" else embedding
    return head(output.float()).softmax(1)


class Route(ABC):
    """`used`: the tokens whose edit matters here, (n, t), or None where an image has one row. Steps are of their rows
    in order: image by image, token by token."""

    name: RouteName

    def __init__(self, seen: Seen, base: Tensor, used: Bool[Tensor, "n t"] | None) -> None:
        self.seen, self.base, self.used = seen, base, used

    def rows(self) -> Float[Tensor, "r d"]:
        """What the coder reads: the clean values of the tokens in use."""
        return self.seen.x if self.used is None else self.seen.x[self.used]

    @abstractmethod
    def probabilities(
        self, directions: Float[Tensor, "m d"], steps: Float[Tensor, "r m"]
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "k b v"]]]:
        """(coordinates, images, P~) in parts; every pair once; for each coordinate images in order. A part may be
        overwritten by the next."""

    def limits(self, directions: Float[Tensor, "m d"]) -> Float[Tensor, "m v"] | None:
        """P~ as steps grow without end, where that is known."""
        return None

    def _full(self, steps: Float[Tensor, "r k"]) -> Float[Tensor, "k n t 1"]:
        """Steps at every token, 0 where nothing is edited."""
        if self.used is None:
            return steps.T[:, :, None]
        full = steps.new_zeros(*self.used.shape, steps.shape[1])
        full[self.used] = steps
        return full.permute(2, 0, 1)[..., None]


class Closed(Route):
    name = "closed"

    def __init__(self, form: ClosedForm, seen: Seen, base: Tensor, used: Bool[Tensor, "n t"] | None) -> None:
        super().__init__(seen, base, used)
        self.form = form
        weights = form.tail.token_weights
        if used is not None and weights is not None:
            self.used = used & (weights != 0)
            self._image, self._weight = torch.nonzero(self.used)[:, 0], weights[torch.nonzero(self.used)[:, 1]]

    def probabilities(
        self, directions: Float[Tensor, "m d"], steps: Float[Tensor, "r m"]
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "k b v"]]]:
        if self.used is not None:  # what arrives at the pooled row
            pooled = steps.new_zeros(self.seen.n, steps.shape[1])
            steps = pooled.index_add_(0, self._image, self._weight.to(steps)[:, None] * steps)
        return self.form.probabilities(directions, steps)

    def limits(self, directions: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        return self.form.limits(directions)


class Blocks(Route):
    def __init__(
        self,
        backbone: Backbone,
        start: int,
        head: Head,
        seen: Seen,
        base: Tensor,
        used: Bool[Tensor, "n t"] | None,
        last: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__(seen, base, used)
        self.backbone, self.start, self.head, self.last = backbone, start, head, last
        self.name = "blocks" if last is None else "blocks+cls"

    def probabilities(
        self, directions: Float[Tensor, "m d"], steps: Float[Tensor, "r m"]
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "k b v"]]]:
        n, t = self.base.shape[:2]
        at_once, images_at_once = parts_of(n, len(directions), t, TOKENS_AT_ONCE)
        for first in range(0, len(directions), at_once):
            chosen = slice(first, min(first + at_once, len(directions)))
            full = self._full(steps[:, chosen])
            for start in range(0, n, images_at_once):
                images = slice(start, min(start + images_at_once, n))
                value = self.base[images].float() + full[:, images] * directions[chosen, None, None]
                embedding = self._rest(value.flatten(0, 1).to(self.base.dtype))
                p = answers(self.backbone, embedding, self.head)
                yield chosen, images, p.view(chosen.stop - first, -1, p.shape[1])

    def _rest(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b d_embed"]:
        if self.last is None:
            return self.backbone.pool(self.backbone.run_blocks(tokens, start=self.start))
        return self.backbone.pool(
            self.last(self.backbone.run_blocks(tokens, start=self.start, stop=self.backbone.n_layers - 1))
        )


class Reruns(Route):
    name = "rerun"

    def __init__(
        self, backbone: Backbone, point: str, head: Head, seen: Seen, base: Tensor, used: Bool[Tensor, "n t"] | None
    ) -> None:
        super().__init__(seen, base, used)
        self.backbone, self.head = backbone, head
        device = next(backbone.parameters()).device
        self._runs = [Rerun(backbone, point, images.to(device)) for images in seen.batches]

    def probabilities(
        self, directions: Float[Tensor, "m d"], steps: Float[Tensor, "r m"]
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "k b v"]]]:
        for one in range(len(directions)):
            full, start = self._full(steps[:, one : one + 1])[0], 0
            for run in self._runs:
                images = slice(start, start + len(run.activation))
                value = (self.base[images].float() + full[images] * directions[one]).to(self.base.dtype)
                embedding = run.replaced(value)[1]
                yield slice(one, one + 1), images, answers(self.backbone, embedding, self.head)[None]
                start = images.stop


@torch.no_grad()
def choose_route(
    backbone: Backbone,
    point: str,
    head: Head,
    seen: Seen,
    marks: Bool[Tensor, "_ t"] | None,
    *,
    base: Float[Tensor, "n ..."] | None = None,
    route: str = "auto",
) -> Route:
    """`marks`: edited tokens (interventions.marked_tokens), None at a point of one row an image. `base`: what steps are
    added to, where that is not the clean values. `route`: one by name instead of the cheapest.

    Raises ValueError for a route that this point or this model does not allow.
    """
    if route not in ("auto", *get_args(RouteName)):
        raise ValueError(f"route must be auto, {', '.join(get_args(RouteName))}, got {route!r}.")
    base = seen.x if base is None else base
    used = None if marks is None else marks.to(base.device).expand(base.shape[:2])
    if route in ("auto", "closed") and isinstance(head, ZeroShotHead):
        tail = find_tail(backbone, point, seen.x[:4])
        if tail is not None:
            return Closed(ClosedForm(tail, base, head), seen, base, used)
    where = backbone.point(point)
    between = point.rpartition(".")[2] in ("hook_resid_pre", "hook_resid_post")
    if route in ("auto", "blocks+cls", "blocks") and between:
        last = None if route == "blocks" else class_token_of_last(backbone, seen.x[:4], where.blocks_needed)
        if last is not None or route != "blocks+cls":
            return Blocks(backbone, where.blocks_needed, head, seen, base, used, last)
    if route in ("auto", "rerun"):
        return Reruns(backbone, point, head, seen, base, used)
    raise ValueError(f"{point} of {backbone.name} cannot be steered by the route {route!r}; auto chooses one that can.")


# --------------------------------------------------------------------------------- the last block, class token alone


def class_token_of_last(
    backbone: Backbone, x: Float[Tensor, "b t d"], start: int
) -> Callable[[Tensor], Float[Tensor, "b 1 d"]] | None:
    """(b, t, d) entering the last block to the class token leaving it. None where the block is of no known kind, the
    last block is before the point, or the pooling reads other tokens too. `x`: what enters block `start`."""
    last = backbone.n_layers - 1
    if start > last or not backbone.grid.n_cls:
        return None
    found = _class_token_of(backbone.blocks[last])
    if found is None:
        return None
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * x.std()
    for value in (x, x + noise):
        entering = backbone.run_blocks(value, start=start, stop=last)
        leaving = backbone.run_blocks(entering, start=last)
        try:
            alone = found(entering)
            embeddings = backbone.pool(alone), backbone.pool(leaving)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None
        for mine, whole in ((alone, leaving[:, :1]), embeddings):
            if mine.shape != whole.shape or not _close(mine, whole):
                return None
        others = leaving.clone()
        others[:, 1:] = 0  # a pooling that reads the patches would have changed
        if not _close(backbone.pool(others), embeddings[1]):
            return None
    return found


def _close(mine: Tensor, whole: Tensor) -> bool:
    return torch.allclose(mine, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def _class_token_of(block: Any) -> Callable[[Tensor], Tensor] | None:
    """Pre-norm blocks: x + scale1(attention(norm1 x)), then x + scale2(mlp(norm2 x)). Attention by its parts' names."""
    norm1 = _first(block, "norm1", "ln_1", "layer_norm1", "layernorm_before")
    norm2 = _first(block, "norm2", "ln_2", "layer_norm2", "layernorm_after")
    attention, mlp = _first(block, "attn", "self_attn", "attention"), _first(block, "mlp")
    query = None if attention is None else _attention_of(attention)
    if norm1 is None or query is None or (mlp is not None and norm2 is None):
        return None
    scale1 = _first(block, "ls1", "ls_1", "layer_scale1") or nn.Identity()
    scale2 = _first(block, "ls2", "ls_2", "layer_scale2") or nn.Identity()

    def run(x: Float[Tensor, "b t d"]) -> Float[Tensor, "b 1 d"]:
        cls = x[:, :1] + scale1(query(norm1(x)))
        return cls if mlp is None or norm2 is None else cls + scale2(mlp(norm2(cls)))

    return run


def _attention_of(attention: Any) -> Callable[[Tensor], Tensor] | None:
    """Normed tokens (b, t, d) to what attention adds to the first."""
    if isinstance(attention, nn.MultiheadAttention):
        return lambda y: attention(y[:, :1], y, y, need_weights=False)[0]
    counts = (getattr(attention, name, None) for name in ("num_heads", "n_heads", "num_attention_heads"))
    heads = next((count for count in counts if isinstance(count, int)), None)
    qkv, out = getattr(attention, "qkv", None), _first(attention, "proj", "out_proj", "o_proj")
    if out is None or heads is None:
        return None
    if isinstance(qkv, nn.Linear):
        d, weight, bias = qkv.out_features // 3, qkv.weight, qkv.bias

        def project(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q = nn.functional.linear(y[:, :1], weight[:d], None if bias is None else bias[:d])
            k, v = nn.functional.linear(y, weight[d:], None if bias is None else bias[d:]).chunk(2, dim=2)
            return q, k, v

    else:
        parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if not all(isinstance(part, nn.Linear) for part in parts):
            return None
        of_q, of_k, of_v = (part for part in parts if part is not None)

        def project(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return of_q(y[:, :1]), of_k(y), of_v(y)

    norms = [_first(attention, name) or nn.Identity() for name in ("q_norm", "k_norm")]

    def run(y: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in project(y))
        z = nn.functional.scaled_dot_product_attention(norms[0](q), norms[1](k), v)
        return out(z.transpose(1, 2).flatten(2))

    return run


def _first(module: Any, *names: str) -> nn.Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((one for one in found if isinstance(one, nn.Module)), None)
