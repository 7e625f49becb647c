"""The loop that trains a toy: every picture is rendered when it is needed and seen once.

What is learnt is an `Objective`: a module that holds the toy and whatever else learns beside it, and says the loss of a
batch. A run writes its state now and then; killed and run again it goes on there, to the same weights.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vitrail.backbones.toy import ToyViT
from vitrail.backbones.toy_clip import ToyCLIP
from vitrail.files import json_digest, open_tensors, read_tensors, write_tensors
from vitrail.images.worlds import World
from vitrail.images.worlds.base import scene_coverage
from vitrail.progress import Progress
from vitrail.toys.recipes import ToyRecipe
from vitrail.training.checkpoint import load_optimizer, optimizer_tensors

STATE = "state.safetensors"
SAVE_EVERY = 250  # steps


@dataclass(frozen=True, eq=False)
class Batch:
    """`coverage`: share of each patch that shows each concept. `first`: position of the first picture in the world."""

    images: Float[Tensor, "b 3 h w"]
    labels: Int[Tensor, " b"]
    coverage: Float[Tensor, "b p n_concepts"]
    attributes: Sequence[Mapping[str, str]]
    first: int


class Objective(nn.Module):
    """What is trained, and towards what."""

    @property
    @abstractmethod
    def toy(self) -> ToyViT | ToyCLIP:
        """What is kept."""

    @property
    @abstractmethod
    def vit(self) -> ToyViT:
        """Its image tower."""

    @abstractmethod
    def loss(self, tokens: Float[Tensor, "b t d"], batch: Batch) -> tuple[Float[Tensor, ""], float]:
        """The loss of a batch, given the normed tokens of its pictures, and the part of it that is shown."""


class Heads(nn.Module):
    """What is asked of a toy in training only: every attribute of the CLS token, every concept of each patch token.

    The two are linear, and thrown away. They make a small model learn shapes in minutes, and give it reasons to keep
    colour, place and ground, which class names do not ask for.
    """

    def __init__(self, world: World, d_model: int) -> None:
        super().__init__()
        families = sorted({concept.partition(":")[0] for concept in world.concepts if ":" in concept})
        self.families = {
            family: [at for at, concept in enumerate(world.concepts) if concept.startswith(f"{family}:")]
            for family in families
        }
        self.of_image = nn.Linear(d_model, len(world.concepts))
        self.of_patch = nn.Linear(d_model, len(world.concepts))

    def attribute_loss(
        self, cls_token: Float[Tensor, "b d"], coverage: Float[Tensor, "b p n_concepts"]
    ) -> Float[Tensor, ""]:
        """Mean over families of the cross entropy of the value that is present, over the pictures that have one."""
        logits, present = self.of_image(cls_token), coverage.amax(1) > 0
        losses = []
        for members in self.families.values():
            has = present[:, members].any(1)
            if has.any():
                value = present[has][:, members].int().argmax(1)
                losses.append(nn.functional.cross_entropy(logits[has][:, members], value))
        return torch.stack(losses).mean()

    def patch_loss(
        self, patch_tokens: Float[Tensor, "b p d"], coverage: Float[Tensor, "b p n_concepts"]
    ) -> Float[Tensor, ""]:
        return nn.functional.binary_cross_entropy_with_logits(self.of_patch(patch_tokens), coverage)

    def loss(
        self, tokens: Float[Tensor, "b t d"], coverage: Float[Tensor, "b p n_concepts"], recipe: ToyRecipe
    ) -> Float[Tensor, ""]:
        return recipe.attribute_weight * self.attribute_loss(tokens[:, 0], coverage) + (
            recipe.patch_weight * self.patch_loss(tokens[:, 1:], coverage)
        )


def fit(objective: Objective, world: World, recipe: ToyRecipe, folder: Path, progress: Progress) -> list[float]:
    """Trains in place; returns the mean shown loss of each twentieth of the run.

    `folder` keeps the state of an unfinished run, and the weights of recipe.kept_steps as step-0000123.safetensors.
    """
    optimizers = _optimizers(objective, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: rate(step, recipe)) for one in optimizers]
    made_of = json_digest(asdict(recipe))
    step, losses = _resumed(folder, objective, optimizers, schedules, made_of)
    kept, weights = set(recipe.kept_steps), [*objective.parameters()]
    objective.train()
    if step == 0 and 0 in kept:
        write_tensors(folder / f"step-{0:07d}.safetensors", half(objective.toy))
    n_images, done = recipe.n_steps * recipe.batch_size, step * recipe.batch_size
    with progress.task(f"training on {world.name}", n_images, "img", done) as task:
        for batch in batches(world, recipe, int(objective.vit.config["patch_px"]), step):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                tokens = objective.vit.embed(batch.images)
                for block in objective.vit.blocks:
                    tokens = block(tokens)
            loss, shown = objective.loss(objective.vit.norm(tokens.float()), batch)
            if not bool(torch.isfinite(loss)):
                raise ArithmeticError(f"the loss at step {step} is {float(loss.detach())}: lower muon_rate.")
            loss.backward()
            nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)
            for stepping in (*optimizers, *schedules):
                stepping.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            step += 1
            losses.append(shown)
            task.advance(len(batch.images), f"loss {shown:.3f}")
            if step in kept:
                write_tensors(folder / f"step-{step:07d}.safetensors", half(objective.toy))
            if step % SAVE_EVERY == 0:
                _save(folder, objective, optimizers, step, losses, made_of)
    twentieth = max(1, len(losses) // 20)
    return [round(float(np.mean(losses[at : at + twentieth])), 4) for at in range(0, len(losses), twentieth)]


def half(toy: nn.Module) -> dict[str, Tensor]:
    """The weights as they are kept: fp16."""
    return {k: t.detach().half() if t.is_floating_point() else t for k, t in toy.state_dict().items()}


def normalized(
    images: UInt8[np.ndarray, "b h w 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b 3 h w"]:
    """What a toy is given: (pixel / 255 - mean) / std, channel by channel."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def batches(world: World, recipe: ToyRecipe, patch_px: int, first_step: int = 0) -> Iterator[Batch]:
    """The batches from `first_step` on. Labels come shuffled from the world."""
    for start in range(first_step * recipe.batch_size, recipe.n_steps * recipe.batch_size, recipe.batch_size):
        scenes = [world.scene(i) for i in range(start, start + recipe.batch_size)]
        coverage = torch.stack([scene_coverage(scene, world.concepts, patch_px) for scene in scenes])
        yield Batch(
            images=normalized(np.stack([scene.image for scene in scenes]), recipe.mean, recipe.std),
            labels=torch.tensor([scene.label for scene in scenes]),
            coverage=coverage.flatten(2).transpose(1, 2),
            attributes=[scene.attributes for scene in scenes],
            first=start,
        )


def rate(step: int, recipe: ToyRecipe) -> float:
    """The share of the learning rate at a step: a line up, then half a cosine down to 0."""
    rising = max(1, round(recipe.warmup * recipe.n_steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, recipe.n_steps - rising)))


def _optimizers(objective: Objective, recipe: ToyRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"training a toy needs torch.optim.Muon, of torch 2.9 or newer; this is {torch.__version__}.")
    matrices, decayed, plain = [], [], []
    for name, weight in objective.named_parameters():
        of_block = ".blocks." in name and weight.ndim == 2
        (matrices if of_block else decayed if weight.ndim in (2, 4) else plain).append(weight)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas),
    ]


def _save(
    folder: Path,
    objective: Objective,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    losses: Sequence[float],
    made_of: str,
) -> None:
    tensors = {f"weights/{name}": tensor for name, tensor in objective.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        tensors |= {f"{number}/{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    write_tensors(folder / STATE, tensors, {"step": str(step), "recipe": made_of})


def _resumed(
    folder: Path,
    objective: Objective,
    optimizers: Sequence[torch.optim.Optimizer],
    schedules: Sequence[torch.optim.lr_scheduler.LambdaLR],
    made_of: str,
) -> tuple[int, list[float]]:
    """The step to go on at, with weights and optimisers as they were there; 0 where there is nothing to go on from."""
    path = folder / STATE
    if not path.is_file():
        return 0, []
    with open_tensors(path) as stored:
        about = stored.metadata()
    if about["recipe"] != made_of:
        raise ValueError(f"{path} is of another recipe. Delete {folder}, or train into another folder.")
    tensors, step = read_tensors(path, "state of a toy's training"), int(about["step"])
    named = {name: tensor for name, tensor in tensors.items() if name.startswith("weights/")}
    objective.load_state_dict({name.removeprefix("weights/"): tensor for name, tensor in named.items()})
    for number, optimizer in enumerate(optimizers):
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{number}/")}
        load_optimizer(optimizer, {name.removeprefix(f"{number}/"): tensor for name, tensor in own.items()})
    for schedule, optimizer in zip(schedules, optimizers, strict=True):
        schedule.last_epoch = step
        for group, base in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = base * schedule.lr_lambdas[0](step)
    return step, tensors["losses"].tolist()
