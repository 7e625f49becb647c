"""Which positions of a hook point become rows: the four token kinds, on writing and on reading.

cls      the CLS token                       (n_images, 1, d)
spatial  the patch tokens                    (n_images, n_patches, d)
all      every position, registers included  (n_images, n_tokens, d)
pooled   one row per image: the mean over patch tokens, or the value itself at a point without a token axis
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones.grid import Grid


def stored_kind(kind: str, *, has_tokens: bool) -> str:
    """What a point is stored as when `kind` is asked for: a point without a token axis has one row per image."""
    return kind if has_tokens else "pooled"


def select_tokens(x: Float[Tensor, "b ..."], grid: Grid, kind: str) -> Float[Tensor, "b t d"]:
    """The rows of `kind` from one point's activations, (b, tokens, d) or (b, d)."""
    if x.ndim == 2:
        return x[:, None, :]
    if kind == "pooled":
        return x[:, patch_slice(grid, x.shape[1])].mean(1, keepdim=True)
    if x.shape[1] == grid.n_patches and grid.n_special:  # hook_embed: patches before CLS is put in front
        if kind == "cls":
            raise ValueError("this hook point has patch tokens only, no CLS token. Ask for tokens='spatial'.")
        return x
    return x[:, grid.tokens(kind)]


def patch_slice(grid: Grid, n_tokens: int) -> slice:
    return slice(0, n_tokens) if n_tokens == grid.n_patches else grid.tokens("spatial")


def view_slice(stored: str, n_tokens: int, wanted: str, grid: Grid, *, name: str) -> slice:
    """The token slice that reads `wanted` rows out of a point stored as `stored`."""
    if wanted == stored:
        return slice(0, n_tokens)
    if stored == "all" and wanted in ("cls", "spatial") and n_tokens == grid.n_tokens:
        return grid.tokens(wanted)
    raise ValueError(
        f"{name} was stored with tokens={stored!r} and cannot be read as {wanted!r}. "
        f"Ask for {stored!r}, or extract again with --tokens {wanted}."
    )


def moment_slices(stored: str, n_tokens: int, grid: Grid) -> dict[str, slice]:
    """The disjoint groups of positions over which moments are kept, so that every readable kind has its own."""
    if stored == "all" and n_tokens == grid.n_tokens and grid.n_special:
        groups = {"cls": slice(0, grid.n_cls), "registers": slice(grid.n_cls, grid.n_special)}
        groups["spatial"] = grid.tokens("spatial")
        return {name: group for name, group in groups.items() if group.stop > group.start}
    return {stored: slice(0, n_tokens)}


def as_dtype(x: Tensor, dtype: str, *, point: str) -> Tensor:
    """`x` cast for storage. Raises ValueError if a value is NaN or infinite before or after the cast."""
    cast = x.to(getattr(torch, dtype))
    if bool(torch.isfinite(cast).all()):
        return cast
    if not bool(torch.isfinite(x).all()):
        row = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"{point} has NaN or infinite activations (image {row} of the batch). The model, its weights or its "
            "precision is at fault; nothing of this shard was written."
        )
    raise ValueError(
        f"{point} has activations up to {float(x.abs().max()):.6g}, more than {dtype} can hold. "
        "Extract with --dtype bfloat16 or float32."
    )
