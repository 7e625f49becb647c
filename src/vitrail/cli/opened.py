"""A coder and the model it was trained on, as several verbs open them."""

from pathlib import Path
from typing import Any

import torch

from vitrail.backbones import Backbone, load
from vitrail.coders import SparseCoder, coder_metadata, load_coder


def open_coder_and_backbone(
    coder: Path, *, backbone: str | None, weights: Path | None, image_px: int | None, device: torch.device
) -> tuple[SparseCoder, dict[str, Any], Backbone]:
    """(coder, what it says of its data, the model). `backbone`: instead of the one that the coder names.

    Raises ValueError where the coder does not say its point, tokens or backbone, or the model has other weights.
    """
    loaded, about = load_coder(coder, device=device), coder_metadata(coder)
    for needed in ("point", "tokens", "backbone"):
        if needed not in about and not (needed == "backbone" and backbone):
            raise ValueError(f"{coder} does not say its {needed}: it was not trained by `vitrail train`.")
    model = load(backbone or about["backbone"], weights=weights, image_px=image_px, device=device)
    if "backbone_digest" in about and model.digest != about["backbone_digest"]:
        raise ValueError(
            f"{model.name} has other weights than the coder was trained on ({model.digest[:12]}, not "
            f"{about['backbone_digest'][:12]}). Pass the --weights that `vitrail extract` had."
        )
    return loaded.eval(), about, model
