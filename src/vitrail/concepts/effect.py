"""What turning a latent up does to the model's answer: a name for latents of any layer that comes from the model.

    x'        x + (v - z_i) dx/dz_i at every token the coder reads; v `strength` times the latent's largest activation
              on the pictures, z_i what it is there, dx/dz_i = W_dec[i], put back through the normalisation. The rest
              of x, what the coder misses included, stays (the error term is kept)
    effect    mean over pictures of p'(word) - p(word), p the softmax over words of logit_scale x cosine with the image
              embedding, or over classes where the backbone has a head

Named after the word whose probability rises most; -1..1. Only blocks after the point are run again. p depends on all
words together: in a long list each has little, and near-synonyms share.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.concepts.naming import Named, TopTwo
from vitrail.concepts.vocabulary import Vocabulary
from vitrail.progress import SILENT, Progress
from vitrail.store.tokens import stored_kind


@torch.inference_mode()
def effect(
    backbone: Backbone,
    coder: SparseCoder,
    images: Float[Tensor, "b 3 h w"],
    point: str,
    tokens: str,
    latents: Int[np.ndarray, " m"],
    vocabulary: Vocabulary | None,
    *,
    highest: Float[np.ndarray, " d_sae"],
    strength: float = 1.0,
    progress: Progress = SILENT,
) -> Named:
    """Names of `latents`, by their effect on these preprocessed pictures. One run of the later blocks a latent.

    `highest`: each latent's largest activation. `vocabulary` None: the classes of the backbone's head. Raises
    ValueError where there are neither, for a pooled token kind, and for a strength that is not positive.
    """
    if not strength > 0:
        raise ValueError(f"strength must be positive, in units of the latent's largest activation, got {strength}.")
    if vocabulary is None and not (backbone.n_classes and backbone.class_names):
        raise ValueError(f"{backbone.name} has no classes by name, and no words were given: nothing to have effect on.")
    where = backbone.point(point)
    kind = stored_kind(tokens, has_tokens=where.has_tokens)
    if where.has_tokens and kind not in ("all", "spatial", "cls"):
        raise ValueError(f"an effect needs tokens of their own, all, spatial or cls; the coder reads {kind!r}.")
    chosen = None
    if where.has_tokens:
        whole = kind == "all" or (point == "hook_embed" and kind == "spatial")
        chosen = slice(None) if whole else backbone.grid.tokens(kind)
    images = images.to(next(backbone.parameters()).device)
    x = backbone.activations(images, [point])[point]
    finish = rest_of(backbone, point, images)
    words, names = _answers(backbone, vocabulary)
    before = _probabilities(backbone, finish(x), words)
    part = x if chosen is None else x[:, chosen]
    rows = part.reshape(-1, part.shape[-1]).float()
    codes = coder.encode_sparse(rows)
    scale = _scale(coder, codes.scale)
    places, changes = np.zeros((2, len(latents)), dtype=np.int64), np.zeros((2, len(latents)))
    with progress.task("effect", len(latents), "latents") as task:
        for row, latent in enumerate(latents.tolist()):
            z = torch.zeros(len(rows), device=rows.device)
            mine = codes.indices == latent
            z[codes.rows()[mine]] = codes.values[mine].float()
            step = (strength * float(highest[latent]) - z)[:, None] * scale * coder.W_dec[latent]
            moved = (rows + step).reshape(part.shape).to(x.dtype)
            if chosen is not None:
                edited = x.clone()
                edited[:, chosen] = moved
            else:
                edited = moved
            rise = (_probabilities(backbone, finish(edited), words) - before).mean(0).topk(2)
            changes[:, row], places[:, row] = rise.values.cpu().numpy(), rise.indices.cpu().numpy()
            task.advance(1)
    two = TopTwo(places[0], changes[0], places[1], changes[1])
    return Named.of("effect", np.asarray(latents), two, names, cosines=False)


def rest_of(backbone: Backbone, point: str, images: Float[Tensor, "b 3 h w"]) -> Callable[[Tensor], Tensor]:
    """What turns a value at `point` into the output: the blocks after it where it is the residual stream between
    blocks, the whole forward pass with that value put in elsewhere."""
    where, last = backbone.point(point), point.rpartition(".")[2]
    if last in ("hook_resid_pre", "hook_resid_post"):
        return lambda value: backbone.finish(backbone.run_blocks(value, start=where.blocks_needed))
    if point == "hook_image_embed":
        return backbone.head

    def whole(value: Tensor) -> Tensor:
        return backbone.run_with_hooks(images, {point: lambda _value, _point: value})

    return whole


def _answers(backbone: Backbone, vocabulary: Vocabulary | None) -> tuple[Tensor | None, Sequence[str]]:
    if vocabulary is None:
        return None, backbone.class_names
    return vocabulary.embeddings.to(next(backbone.parameters()).device), vocabulary.words


def _probabilities(backbone: Backbone, output: Tensor, words: Tensor | None) -> Float[Tensor, "b n"]:
    if words is None:
        return output.float().softmax(1)
    scale = 100.0 if backbone.text is None else backbone.text.logit_scale
    return (scale * normalize(output.float(), dim=1) @ words.t()).softmax(1)


def _scale(coder: SparseCoder, per_row: Tensor | None) -> Tensor:
    """Raw length of a unit step in normalised space: one number, or one a row."""
    if per_row is not None:
        return per_row
    zero = coder.W_dec.new_zeros(1, coder.d_out)
    inverse = coder.normalize.invert
    return (inverse(zero + 1, None, None) - inverse(zero, None, None)).mean()
