"""A toy that finds which words are true of a picture.

    logits = scale * cosine(image, caption)          b pictures x all captions drawn for them
    loss   = mean over pictures of -mean over captions that are true of it of log softmax over captions
             + the same the other way round, halved;  + the losses of the heads that every toy has

A caption that is true of several pictures of the batch has all of them as its answer (UniCL, Yang et al. 2022,
arXiv:2204.03610, eq. 4): CLIP's loss takes them for mistakes, which half-told captions would suffer most.
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrail.backbones.toy import ToyViT
from vitrail.backbones.toy_clip import ToyCLIP
from vitrail.images.worlds import World
from vitrail.images.worlds.draws import stream_key
from vitrail.toys.describing import draw_captions
from vitrail.toys.fitting import Batch, Heads, Objective
from vitrail.toys.recipes import ClipRecipe

MOST_SCALE = 100.0


class Contrasting(Objective):
    def __init__(self, model: ToyCLIP, world: World, recipe: ClipRecipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.heads = Heads(world, int(model.visual.config["d_model"]))
        self._key = stream_key(recipe.seed, *b"captions")

    @property
    def toy(self) -> ToyCLIP:
        return self.model

    @property
    def vit(self) -> ToyViT:
        return self.model.visual

    def loss(self, tokens: Float[Tensor, "b t d"], batch: Batch) -> tuple[Float[Tensor, ""], float]:
        attributes = batch.attributes
        if self.recipe.written_shapes:
            attributes = [{**values, "shape": values.get("word", values["shape"])} for values in attributes]
        captions, true = draw_captions(attributes, self._key, batch.first, self.recipe.captions)
        image = nn.functional.normalize(self.model.visual_proj(tokens[:, 0]), dim=-1)
        text = nn.functional.normalize(self.model.encode_text(self.model.tokenizer(captions)), dim=-1)
        scale = self.model.log_scale.exp().clamp(max=MOST_SCALE)
        loss = contrastive_loss(scale * image @ text.T, true)
        weighted = self.recipe.contrastive_weight * loss + self.heads.loss(tokens, batch.coverage, self.recipe)
        return weighted, float(loss.detach())


def contrastive_loss(logits: Float[Tensor, "n m"], true: Bool[Tensor, "n m"]) -> Float[Tensor, ""]:
    """Cross entropy in both directions, halved; the answer is spread evenly over all that is true."""
    share = true.to(logits.dtype)
    of_captions = -(share / share.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    of_pictures = -(share / share.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (of_captions + of_pictures) / 2
