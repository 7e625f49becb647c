"""Training the project's own small models on its own worlds, so that everything can be tried offline.

Every training picture is rendered when it is needed and seen once: what a toy knows, it has not memorised.

    loss = CE(class) + mean over families CE(attribute) + patch_weight * BCE(share of each patch that shows a concept)

The two auxiliary terms have linear heads on the CLS and the patch tokens, which are thrown away. They make a small
model learn shapes in minutes, and give it reasons to keep colour, place and ground, which classes do not ask for.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vitrail.backbones.toy import ToyViT
from vitrail.files import tensors_digest, write_json, write_tensors
from vitrail.images.worlds import World, open_world
from vitrail.images.worlds.base import scene_coverage
from vitrail.progress import SILENT, Progress
from vitrail.provenance import provenance

WEIGHTS = Path(__file__).parent / "backbones" / "weights"


@dataclass(frozen=True)
class ToyRecipe:
    """All that decides a toy's weights, up to the rounding of the machine that trains it."""

    world: str  # spec without n and split: training reads "train", the held-out accuracy "test"
    model: Mapping[str, int | str] = field(default_factory=dict)  # arguments of ToyViT
    n_images: int = 110_000
    batch_size: int = 64
    learning_rate: float = 2e-3  # of AdamW: stem, norms, heads
    muon_rate: float = 0.02  # of Muon (Jordan et al. 2024): the matrices of the blocks
    warmup: float = 0.05  # share of the steps over which the learning rate rises; it then falls as a half cosine
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 5.0
    attribute_weight: float = 1.0
    patch_weight: float = 5.0
    bfloat16: bool = True  # forward and backward products only; weights, sums and losses stay fp32
    seed: int = 0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    n_test: int = 9_600

    def __post_init__(self) -> None:
        if self.n_images < self.batch_size or self.batch_size < 1:
            raise ValueError(f"n_images={self.n_images} must hold at least one batch of batch_size={self.batch_size}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in 0..1, got {self.warmup}.")

    @property
    def n_steps(self) -> int:
        return self.n_images // self.batch_size


TOYS: dict[str, ToyRecipe] = {"shapes": ToyRecipe(world="world:shapes")}


def train_toy(
    name: str, out: Path | None = None, *, recipe: ToyRecipe | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Train the toy `name` and write out/name.safetensors and out/name.json; returns what the JSON says.

    `out`: a folder, by default the package's own weights. `recipe`: instead of TOYS[name].
    """
    recipe = recipe or toy_recipe(name)
    began = time.monotonic()
    torch.manual_seed(recipe.seed)
    world = open_world(recipe.world, split="train", n=recipe.n_images)
    test = open_world(recipe.world, split="test", n=recipe.n_test)
    model = ToyViT(**{**recipe.model, "image_px": world.image_px, "n_classes": len(world.classes)})
    losses = _fit(model, world, recipe, progress)
    # Kept in fp16, measured as kept.
    weights = {k: t.half() if t.is_floating_point() else t for k, t in model.state_dict().items()}
    model.load_state_dict(weights)
    description = {
        "model": model.config,
        "class_names": list(world.classes),
        "mean": list(recipe.mean),
        "std": list(recipe.std),
        "world": recipe.world,
        "recipe": asdict(recipe),
        "losses": losses,
        "held_out": held_out(model, test, recipe.mean, recipe.std, progress=progress),
        "train_seconds": round(time.monotonic() - began, 1),
        "digest": tensors_digest(weights),
        "provenance": provenance(),
    }
    folder = out or WEIGHTS
    write_tensors(folder / f"{name}.safetensors", weights)
    write_json(folder / f"{name}.json", description)
    return description


def toy_recipe(name: str) -> ToyRecipe:
    if name not in TOYS:
        raise ValueError(f"there is no toy {name!r}. Known: {', '.join(sorted(TOYS))}.")
    return TOYS[name]


def held_out(
    model: ToyViT,
    world: World,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Top-1 accuracy on the pictures of `world`: overall, per sibling group and per size, each with n and interval."""
    model.eval()
    hits: dict[str, list[bool]] = {"all": []}
    with torch.no_grad(), progress.task("held-out accuracy", len(world), "img") as task:
        for start in range(0, len(world), 96):
            scenes = [world.scene(i) for i in range(start, min(start + 96, len(world)))]
            images = normalized(np.stack([scene.image for scene in scenes]), mean, std)
            for scene, answer in zip(scenes, model(images).argmax(1).tolist(), strict=True):
                for key in ("all", f"shape:{scene.attributes['shape']}", f"size:{scene.attributes['size']}"):
                    hits.setdefault(key, []).append(answer == scene.label)
            task.advance(len(scenes))
    overall = accuracy(hits.pop("all"))
    return {"source": world.spec, "top1": overall, "by": {key: accuracy(hits[key]) for key in sorted(hits)}}


def accuracy(hits: list[bool]) -> dict[str, float | int]:
    """Share of hits in 0..1 with its 95 % interval (Wilson 1927), which stays inside 0..1 and is right near 1."""
    n, share, z = len(hits), sum(hits) / len(hits), 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"accuracy": round(share, 4), "low": round(centre - half, 4), "high": round(centre + half, 4), "n": n}


def normalized(
    images: UInt8[np.ndarray, "b h w 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b 3 h w"]:
    """What a toy is given: (pixel / 255 - mean) / std, channel by channel."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


class _Heads(torch.nn.Module):
    """What is asked of a toy in training only: every attribute of the CLS token, every concept of each patch token."""

    def __init__(self, world: World, d_model: int) -> None:
        super().__init__()
        families = sorted({concept.partition(":")[0] for concept in world.concepts if ":" in concept})
        self.families = {
            family: [at for at, concept in enumerate(world.concepts) if concept.startswith(f"{family}:")]
            for family in families
        }
        self.of_image = torch.nn.Linear(d_model, len(world.concepts))
        self.of_patch = torch.nn.Linear(d_model, len(world.concepts))

    def attribute_loss(
        self, cls_token: Float[Tensor, "b d"], coverage: Float[Tensor, "b t n_concepts"]
    ) -> Float[Tensor, ""]:
        """Mean over families of the cross entropy of the value that is present."""
        logits, present = self.of_image(cls_token), coverage.amax(1) > 0
        losses = [
            torch.nn.functional.cross_entropy(logits[:, members], present[:, members].int().argmax(1))
            for members in self.families.values()
        ]
        return torch.stack(losses).mean()

    def patch_loss(
        self, patch_tokens: Float[Tensor, "b t d"], coverage: Float[Tensor, "b t n_concepts"]
    ) -> Float[Tensor, ""]:
        return torch.nn.functional.binary_cross_entropy_with_logits(self.of_patch(patch_tokens), coverage)


def _fit(model: ToyViT, world: World, recipe: ToyRecipe, progress: Progress) -> list[float]:
    """Trains in place; returns the mean class loss of each twentieth of the run."""
    heads = _Heads(world, int(model.config["d_model"]))
    optimizers = _optimizers(model, heads, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: _rate(step, recipe)) for one in optimizers]
    weights = [*model.parameters(), *heads.parameters()]
    losses: list[float] = []
    model.train()
    with progress.task(f"training on {world.name}", len(world), "img") as task:
        for images, labels, coverage in _training_batches(world, recipe, int(model.config["patch_px"])):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                tokens = model.embed(images)
                for block in model.blocks:
                    tokens = block(tokens)
            tokens = model.norm(tokens.float())
            class_loss = torch.nn.functional.cross_entropy(model.head(tokens[:, 0]), labels)
            loss = class_loss + recipe.attribute_weight * heads.attribute_loss(tokens[:, 0], coverage)
            loss = loss + recipe.patch_weight * heads.patch_loss(tokens[:, 1:], coverage)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)
            for stepping in (*optimizers, *schedules):
                stepping.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses.append(float(class_loss.detach()))
            task.advance(len(images), f"loss {losses[-1]:.3f}")
    twentieth = max(1, len(losses) // 20)
    return [round(float(np.mean(losses[at : at + twentieth])), 4) for at in range(0, len(losses), twentieth)]


def _optimizers(model: ToyViT, heads: _Heads, recipe: ToyRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"training a toy needs torch.optim.Muon, of torch 2.9 or newer; this is {torch.__version__}.")
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    others = [
        weight
        for weight in (*model.parameters(), *heads.parameters())
        if all(weight is not matrix for matrix in matrices)
    ]
    decayed = [weight for weight in others if weight.ndim in (2, 4)]
    plain = [weight for weight in others if weight.ndim not in (2, 4)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas),
    ]


def _rate(step: int, recipe: ToyRecipe) -> float:
    """The share of the learning rate at a step: a line up, then half a cosine down to 0."""
    rising = max(1, round(recipe.warmup * recipe.n_steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, recipe.n_steps - rising)))


Batch = tuple[Float[Tensor, "b 3 h w"], Int[Tensor, " b"], Float[Tensor, "b t n_concepts"]]


def _training_batches(world: World, recipe: ToyRecipe, patch_px: int) -> Iterator[Batch]:
    """Pictures, labels, and the share of each patch that shows each concept. Labels come shuffled from the world."""
    for start in range(0, recipe.n_steps * recipe.batch_size, recipe.batch_size):
        scenes = [world.scene(i) for i in range(start, start + recipe.batch_size)]
        coverage = torch.stack([scene_coverage(scene, world.concepts, patch_px) for scene in scenes])
        images = normalized(np.stack([scene.image for scene in scenes]), recipe.mean, recipe.std)
        yield images, torch.tensor([scene.label for scene in scenes]), coverage.flatten(2).transpose(1, 2)
