"""A picture that is in no store, as a query: its codes and its embedding, made as those of the store were."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.coders.sparse import Codes
from vitrail.codes import CodeStore, as_stored
from vitrail.files import tensors_digest
from vitrail.store.tokens import select_tokens, stored_kind

EMBEDDING = "hook_image_embed"


@dataclass(frozen=True, eq=False)
class PictureQuery:
    """`tokens`: a row a stored token of an image, as `CodeStore.image` gives them."""

    tokens: Codes
    embedding: Float[Tensor, "1 d_embed"]


@torch.inference_mode()
def picture_query(backbone: Backbone, coder: SparseCoder, codes: CodeStore, picture: Image.Image) -> PictureQuery:
    """What `codes` would hold of this picture. Raises ValueError where another coder, or several points, made them."""
    request = codes.manifest.request
    if request.get("beside"):
        raise ValueError(f"{codes.path} are a crosscoder's codes, of several points: ask by --image.")
    if tensors_digest(coder.state_dict()) != request["coder_digest"]:
        raise ValueError(f"{codes.path} were made by another coder, or by other weights of this one. Encode again.")
    device = next(backbone.parameters()).device
    pixels = backbone.preprocess(picture)[None].to(device)
    point = request["point"]
    seen = backbone.activations(pixels, list(dict.fromkeys([point, EMBEDDING])))
    kind = stored_kind(request["tokens"], has_tokens=backbone.point(point).has_tokens)
    x = select_tokens(seen[point], backbone.grid, kind).float()[0]
    tokens = as_stored(coder.eval().encode_sparse(x).to("cpu"), request["dtype"])
    return PictureQuery(tokens, seen[EMBEDDING].float().cpu())
