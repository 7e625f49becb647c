"""L0 and alive latents: how many fire, and which ever do.

    l0_tokens        mean number of active latents per row
    l0_cls           the same over CLS tokens only
    l0_image_sum     mean over images of the number of active (token, latent) pairs
    l0_image_unique  mean over images of the number of different latents active anywhere in the image
    alive            share of latents that fire at least once on the evaluation set

Range. Counts in 0..d_sae (l0_image_sum: times the number of tokens), no fractions; alive in 0..1.

Moves with. For TopK coders L0 is what was asked for. alive grows with the number of rows looked at.

Does not show. Whether few latents are the right few. MSAE's "L0" is the opposite, the share of zeros: `sparsity`.

Source. Prisma section 9; "Steering CLIP's vision transformer with sparse autoencoders", table 3, whose "Avg img L0" is
the sum over tokens, while Prisma's later code counts different latents; SPEC rows 40 and 45.

Tags. "count-active", "fired-once-on-eval-set".
"""

import numpy as np
import torch
from torch import Tensor

from vitrail.coders.sparse import Codes
from vitrail.metrics.measured import Measured, over_images


class Sparsity:
    """Streams over images. `cls_token`: which of an image's rows is the CLS token, None if none is."""

    def __init__(self, *, d_sae: int, n_tokens: int, cls_token: int | None) -> None:
        self.d_sae, self.n_tokens, self.cls_token = d_sae, n_tokens, cls_token
        self._l0: list[Tensor] = []  # (n_images, n_tokens)
        self._unique: list[Tensor] = []
        self._fired = torch.zeros(d_sae, dtype=torch.long)

    def update(self, codes: Codes) -> None:
        """Codes of whole images, image-major."""
        codes = codes.to("cpu")
        self._l0.append(codes.l0().reshape(-1, self.n_tokens))
        images = codes.rows() // self.n_tokens
        pairs = torch.unique(images * self.d_sae + codes.indices)
        self._unique.append(torch.bincount(pairs // self.d_sae, minlength=codes.n // self.n_tokens))
        self._fired += torch.bincount(codes.indices, minlength=self.d_sae)

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        l0 = torch.cat(self._l0).double().numpy()
        images = np.ones(len(l0))
        columns = {"sum": l0.sum(1), "unique": torch.cat(self._unique).double().numpy(), "images": images}
        drawn = {"n_bootstrap": n_bootstrap, "seed": seed, "definition": "count-active"}
        out = {
            "l0_tokens": over_images(columns, lambda c: c["sum"] / c["images"] / self.n_tokens, **drawn),
            "l0_image_sum": over_images(columns, lambda c: c["sum"] / c["images"], **drawn),
            "l0_image_unique": over_images(columns, lambda c: c["unique"] / c["images"], **drawn),
            "alive": Measured(
                value=float((self._fired > 0).double().mean()), definition="fired-once-on-eval-set", n=l0.size
            ),
        }
        if self.cls_token is not None:
            cls = {"cls": l0[:, self.cls_token], "images": images}
            out["l0_cls"] = over_images(cls, lambda c: c["cls"] / c["images"], **drawn)
        return out
