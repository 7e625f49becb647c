"""vitrail points"""

from collections.abc import Sequence
from pathlib import Path

import tyro

from vitrail.backbones import load


def run(arguments: Sequence[str]) -> None:
    tyro.cli(points_verb, args=arguments, prog="vitrail points", config=(tyro.conf.PositionalRequiredArgs,))


def points_verb(
    backbone: str, weights: Path | None = None, image_px: int | None = None, pretrained: bool = False
) -> None:
    """List the hook points of a backbone, with shapes. Random weights will do, so nothing is fetched unless asked.

    Args:
        backbone: "toy/shapes", "timm/NAME", "open_clip/NAME", "hf/NAME" or a folder
        pretrained: fetch the weights from the hub
    """
    wanted = pretrained or backbone.startswith("toy/") or weights is not None
    opened = load(backbone, weights=weights, image_px=image_px, pretrained=None if wanted else False)
    grid = opened.grid
    print(
        f"{opened.name}: {opened.n_layers} blocks, d_model {opened.d_model}, {grid.height} x {grid.width} patches of "
        f"{grid.patch_px} px, {grid.n_cls} CLS, {grid.n_registers} registers"
    )
    for point in opened.points.values():
        tokens = grid.n_patches if point.name == "hook_embed" else grid.n_tokens
        shape = f"(b, {tokens}, {point.width})" if point.has_tokens else f"(b, {point.width})"
        print(f"  {point.name:<28} {shape}")
