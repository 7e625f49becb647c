"""Texts as rows to train on or to encode: the text tower's embeddings of captions.

Rows are unit vectors, as TextTower gives them, while `hook_image_embed` is not scaled. A coder that is fitted to each
modality's own mean and scale (`vitrail.coders.modality`) does not see the difference in size, but rows of an image
that are to be compared one by one with texts should be made unit vectors as well.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones.base import Backbone


def text_rows(backbone: Backbone, texts: Sequence[str], *, batch_size: int = 256) -> Float[Tensor, "n d_embed"]:
    """One fp32 row per text, on the CPU, in order. Raises ValueError for a model without a text tower."""
    if backbone.text is None:
        raise ValueError(f"{backbone.name} has no text tower. Texts need a dual encoder, such as open_clip/ViT-B-32.")
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of at least one string, got {texts!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    with torch.no_grad():
        parts = [
            backbone.text.encode(texts[at : at + batch_size]).float().cpu() for at in range(0, len(texts), batch_size)
        ]
    return torch.cat(parts)
