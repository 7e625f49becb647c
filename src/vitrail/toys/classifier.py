"""A toy that names classes.

loss = CE(class) + mean over families CE(attribute) + patch_weight * BCE(share of each patch that shows a concept)
"""

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.backbones.toy import ToyViT
from vitrail.images.worlds import World
from vitrail.toys.fitting import Batch, Heads, Objective
from vitrail.toys.recipes import ToyRecipe


class Classifying(Objective):
    def __init__(self, model: ToyViT, world: World, recipe: ToyRecipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.heads = Heads(world, int(model.config["d_model"]))

    @property
    def toy(self) -> ToyViT:
        return self.model

    @property
    def vit(self) -> ToyViT:
        return self.model

    def loss(self, tokens: Float[Tensor, "b t d"], batch: Batch) -> tuple[Float[Tensor, ""], float]:
        loss = nn.functional.cross_entropy(self.model.head(tokens[:, 0]), batch.labels)
        return loss + self.heads.loss(tokens, batch.coverage, self.recipe), float(loss.detach())
