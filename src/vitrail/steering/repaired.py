"""A backbone with edits inside: one nn.Module that takes and gives what the plain model does. Knows nothing of coders.

    y = n(x)                          the coder's normalisation, shared or by row
    pre = (y - b_dec) @ W + b         of the edited latents alone where each fires by itself, else of all
    z = pre where it fires, else 0    above a threshold; or among the k largest of the row
    x' = x + s (z' - z) @ W_dec       the error term stays; a token in which nothing changes is bit for bit x

Everything is dense and has fixed shapes, so that torch.export takes it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.backbones.base import Backbone

RULES = ("threshold", "largest", "gate")
NORMALIZATIONS = ("none", "shared", "layer_norm", "row_norm")
OPERATIONS = ("set", "add", "scale", "ablate")
IMAGE_EMBED = "hook_image_embed"


class EditedLatents(nn.Module):
    """m latents of one point changed. `tensors` are its buffers; all else is told by `about`, which goes to JSON.

    W        (d, m); (d, d_sae) for the rule "largest", where `latents` (m,) says which are edited
    b        as W's columns           W_dec  (m, d)         value  (m,), what an operation sets, adds or scales by
    b_dec    (d,)                     mean (d,), scale ()   of a shared normalisation
    floor    (m,), rule "threshold": fires above it         log_ratio, b_mag (m,), rule "gate"
    about    rule, k, normalization, operation, tokens ("all", "cls", "spatial", "row"), first and stop (of tokens)
    """

    W: Tensor
    b: Tensor
    W_dec: Tensor
    b_dec: Tensor
    value: Tensor
    mean: Tensor
    scale: Tensor
    floor: Tensor
    latents: Tensor
    log_ratio: Tensor
    b_mag: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        super().__init__()
        for name, known in (("rule", RULES), ("normalization", NORMALIZATIONS), ("operation", OPERATIONS)):
            if about[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {about[name]!r}.")
        self.about = dict(about)
        self.rule, self.k = str(about["rule"]), int(about["k"] or 0)
        self.normalization, self.operation = str(about["normalization"]), str(about["operation"])
        self.first, self.stop = about["first"], about["stop"]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone().contiguous())

    def forward(self, value: Float[Tensor, "b *t d"]) -> Float[Tensor, "b *t d"]:
        if value.ndim == 2 or (self.first is None and self.stop is None):
            return self._moved(value)
        first, stop = self.first or 0, self.stop if self.stop is not None else value.shape[1]
        return torch.cat([value[:, :first], self._moved(value[:, first:stop]), value[:, stop:]], 1)

    def _moved(self, x: Tensor) -> Tensor:
        rows = x.to(self.W.dtype)
        y, scale = self._normalized(rows)
        z = self._codes(y)
        change = self._new(z) - z
        moved = (rows + scale * (change @ self.W_dec)).to(x.dtype)
        return torch.where((change != 0).any(-1, keepdim=True), moved, x)

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        if self.normalization == "shared":
            return (x - self.mean) / self.scale, self.scale
        if self.normalization == "layer_norm":
            mean, spread = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5
            return (x - mean) / spread, spread
        if self.normalization == "row_norm":
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            norm = norm.clamp_min(torch.finfo(x.dtype).tiny * x.shape[-1]) / x.shape[-1] ** 0.5
            return x / norm, norm
        return x, 1.0

    def _codes(self, y: Tensor) -> Tensor:
        pre = (y - self.b_dec) @ self.W + self.b
        if self.rule == "largest":
            floor = pre.topk(self.k, dim=-1).values[..., -1:]
            pre = pre.index_select(-1, self.latents)
            return torch.where((pre >= floor) & (pre > 0), pre, 0.0)
        if self.rule == "gate":
            magnitude = self.log_ratio.exp() * (pre - self.b) + self.b_mag
            return torch.where((pre > 0) & (magnitude > 0), magnitude, 0.0)
        return torch.where(pre > self.floor, pre, 0.0)

    def _new(self, z: Tensor) -> Tensor:
        if self.operation == "set":
            return self.value.expand_as(z)
        if self.operation == "add":
            return (z + self.value).clamp_min(0)
        return z * self.value if self.operation == "scale" else torch.zeros_like(z)

    @property
    def n_latents(self) -> int:
        return self.W_dec.shape[0]

    def products_per_token(self) -> int:
        """Multiplications of one edited token: into the latents and back."""
        return self.W.numel() + self.W_dec.numel()


class LinearCorrection(nn.Module):
    """x' = x + ((x - centre) @ left) @ right on some tokens: what `vitrail defend` fits, of low rank, without a coder.

    tensors: centre (d,), left (d, r), right (r, d). about: kind "correction", tokens, first and stop, rank.
    """

    centre: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        super().__init__()
        self.about = dict(about)
        self.first, self.stop = about["first"], about["stop"]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone().contiguous())

    @classmethod
    def of_matrix(
        cls, centre: Float[Tensor, " d"], matrix: Float[Tensor, "d d"], about: Mapping[str, Any], *, tol: float = 1e-6
    ) -> "LinearCorrection":
        """`matrix` in two factors: directions whose singular value is below `tol` of the largest are left out."""
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        rank = max(1, int((s > tol * s[0]).sum()))
        left, right = (u[:, :rank] * s[:rank]).float(), vh[:rank].float()
        return cls({"centre": centre.float(), "left": left, "right": right}, {**about, "rank": rank})

    def forward(self, value: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        first, stop = self.first or 0, self.stop if self.stop is not None else value.shape[1]
        x = value[:, first:stop].to(self.centre.dtype)
        moved = (x + ((x - self.centre) @ self.left) @ self.right).to(value.dtype)
        return torch.cat([value[:, :first], moved, value[:, stop:]], 1)

    def products_per_token(self) -> int:
        return self.left.numel() + self.right.numel()


InPlace = EditedLatents | LinearCorrection


def edit_of(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> InPlace:
    """What `about` says it is. Raises ValueError for a kind that is not known."""
    kind = about.get("kind", "latents")
    if kind not in ("latents", "correction"):
        raise ValueError(f"an edit is of latents or a correction, not {kind!r}: a newer vitrail wrote it. Upgrade.")
    return LinearCorrection(tensors, about) if kind == "correction" else EditedLatents(tensors, about)


class Repaired(nn.Module):
    """`repaired(images)` is what the plain model gives, of edited activations. `edits`: by point, in order.

    Points are those between blocks (`blocks.L.hook_resid_pre`, `blocks.L.hook_resid_post`) and `hook_image_embed`.
    Raises ValueError for another point, or one named twice.
    """

    def __init__(self, backbone: Backbone, edits: Sequence[tuple[str, InPlace]]) -> None:
        super().__init__()
        if not edits:
            raise ValueError("a repaired model has at least one edit.")
        self.backbone = backbone
        self.points = tuple(point for point, _ in edits)
        self.edits = nn.ModuleList([edit for _, edit in edits])
        places = [before_block(backbone, point) for point in self.points]
        if len(set(places)) < len(places):
            raise ValueError(f"two edits are at one place: {', '.join(self.points)}. Put their latents into one edit.")
        self._by_place = dict(zip(places, range(len(places)), strict=True))
        self.eval()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d_out"]:
        backbone, tokens = self.backbone, self.backbone.embed(images)
        for layer in range(backbone.n_layers):
            tokens = self._edited(layer, tokens)
            tokens = backbone.run_blocks(tokens, start=layer, stop=layer + 1)
        tokens = self._edited(backbone.n_layers, tokens)
        return backbone.head(self._edited(None, backbone.pool(tokens)))

    def _edited(self, place: int | None, value: Tensor) -> Tensor:
        return self.edits[self._by_place[place]](value) if place in self._by_place else value

    # What a caller asks of the plain model.

    @property
    def name(self) -> str:
        return f"{self.backbone.name} (repaired)"

    @property
    def preprocess(self) -> Any:
        return self.backbone.preprocess

    @property
    def text(self) -> Any:
        return self.backbone.text

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.backbone.class_names

    @property
    def n_classes(self) -> int | None:
        return self.backbone.n_classes

    def overhead(self) -> dict[str, float]:
        """`parameters`: numbers added; `products`: multiplications added an image, as a share of the blocks' linear
        layers' (an estimate: 12 d^2 a token and block, attention left out)."""
        grid, d = self.backbone.grid, self.backbone.d_model
        added = 0
        for edit in self.edits:
            assert isinstance(edit, EditedLatents | LinearCorrection)
            first, stop, _ = slice(edit.first, edit.stop).indices(grid.n_tokens)
            n = 1 if edit.about["tokens"] == "row" else stop - first
            added += n * edit.products_per_token()
        plain = 12 * d * d * grid.n_tokens * self.backbone.n_layers
        numbers = sum(tensor.numel() for tensor in self.edits.buffers())
        return {"parameters": numbers, "products": added, "products_share": added / plain}


def before_block(backbone: Backbone, point: str) -> int | None:
    """The block before which a point's value is read; n_layers: after the last; None: the image embedding."""
    known = backbone.point(point)
    last = point.rpartition(".")[2]
    if point == IMAGE_EMBED:
        return None
    if known.layer is not None and last in ("hook_resid_pre", "hook_resid_post"):
        return known.layer + (last == "hook_resid_post")
    raise ValueError(
        f"a repaired model is edited between blocks or at {IMAGE_EMBED}, not at {point}: take a coder of "
        "hook_resid_pre or hook_resid_post."
    )
