"""The project's own small models, trained on its own worlds, so that everything can be tried offline."""

from vitrail.backbones.toys import WEIGHTS
from vitrail.toys.fitting import normalized
from vitrail.toys.held_out import accuracy, held_out, zero_shot
from vitrail.toys.recipes import TOYS, ClipRecipe, ToyRecipe, toy_recipe
from vitrail.toys.train import measured, train_toy

__all__ = [
    "TOYS",
    "WEIGHTS",
    "ClipRecipe",
    "ToyRecipe",
    "accuracy",
    "held_out",
    "measured",
    "normalized",
    "toy_recipe",
    "train_toy",
    "zero_shot",
]
