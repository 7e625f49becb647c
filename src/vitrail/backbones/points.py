"""The vocabulary of hook points: names as in TransformerLens and Prisma, and where each lies in a block.

hook_embed                      patch embeddings, before CLS and positions            (b, n_patches, d)
hook_full_embed                 CLS, registers and positions added; before any pre-norm   (b, t, d)
blocks.{l}.hook_resid_pre       what enters block l                                    (b, t, d)
blocks.{l}.hook_attn_out        what attention adds to the residual stream, after LayerScale
blocks.{l}.hook_resid_mid       the stream between attention and MLP
blocks.{l}.hook_mlp_out         what the MLP adds, after LayerScale
blocks.{l}.hook_resid_post      what leaves block l; blocks of attention alone have no resid_mid and no mlp_out
ln_final.hook_normalized        output of the final norm; (b, d) in models that pool first
hook_image_embed                the pooled representation handed to the head           (b, d_embed)
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from vitrail.hooks import Site

# What lies in a block under which name, the first found counting: timm, open_clip, transformers 4 and 5, ours.
_ATTN_OUT = ("drop_path1", "ls1", "ls_1", "layer_scale1", "attn", "self_attn", "attention")
_MLP_OUT = ("drop_path2", "ls2", "ls_2", "layer_scale2", "mlp", "output.dropout")
_MLP_NORM = ("norm2", "ln_2", "layer_norm2", "layernorm_after")


@dataclass(frozen=True)
class Point:
    """A hook point of one backbone. Its values are (b, t, width) if it `has_tokens`, else (b, width).

    `blocks_needed`: how many blocks must run before it is known.
    """

    name: str
    layer: int | None
    has_tokens: bool
    blocks_needed: int
    width: int


def block_sites(block: nn.Module, *, post_norm: bool = False) -> dict[str, Site]:
    """The points within a residual block, by the last part of their names, in order of computation.

    `post_norm`: the norms follow attention and MLP, so the MLP itself is what reads the stream.
    """
    sites = {"hook_resid_pre": Site(block, "input"), "hook_attn_out": Site(_first(block, _ATTN_OUT), "output")}
    if getattr(block, "mlp", block) is not None:
        mlp_reader = _first(block, ("mlp",) if post_norm else _MLP_NORM)
        sites["hook_resid_mid"] = Site(mlp_reader, "input", in_place=True)
        sites["hook_mlp_out"] = Site(_first(block, _MLP_OUT), "output")
    return sites | {"hook_resid_post": Site(block, "output")}


def unknown_point(backbone: str, asked: str, known: Iterable[str]) -> KeyError:
    nearest = difflib.get_close_matches(asked, list(known), n=3, cutoff=0.0)
    return KeyError(f"{backbone} has no hook point {asked!r}. Nearest: {', '.join(nearest)}.")


def _first(block: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        found: object = block
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module):
            return found
    raise ValueError(f"a {type(block).__name__} is not a block vitrail understands: it has none of {', '.join(names)}.")
