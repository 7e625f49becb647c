"""The recipe of every toy: all that decides its weights, up to the rounding of the machine that trains it."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAIN = "world:shapes"
EXPOSED = "world:shapes?words=0.6&wrong_words=0.3&vocabulary=shape"
ATTACK = "world:shapes?words=1.0&wrong_words=1.0&vocabulary=shape"
RIGHT = "world:shapes?words=1.0&vocabulary=shape"


@dataclass(frozen=True, kw_only=True)
class ToyRecipe:
    """A ToyViT that names the classes of a world."""

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
    n_kept: int = 0  # weights kept on the way, spread evenly in the logarithm of the step, the first before training
    about: str = ""

    def __post_init__(self) -> None:
        if self.n_images < self.batch_size or self.batch_size < 1:
            raise ValueError(f"n_images={self.n_images} must hold at least one batch of batch_size={self.batch_size}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in 0..1, got {self.warmup}.")
        if self.n_kept == 1 or not 0 <= self.n_kept <= self.n_steps + 1:
            raise ValueError(f"n_kept must be 0 or in 2..n_steps + 1={self.n_steps + 1}, got {self.n_kept}.")

    @property
    def n_steps(self) -> int:
        return self.n_images // self.batch_size

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """n_kept different steps: 0, then from 1 to n_steps as evenly spread in the logarithm as whole numbers are."""
        if not self.n_kept:
            return ()
        wanted, tried = self.n_kept - 1, self.n_kept - 1
        while True:
            ratio = self.n_steps ** (1 / max(1, tried - 1))
            steps = sorted({min(self.n_steps, round(ratio**i)) for i in range(tried)})
            if len(steps) >= wanted:
                return (0, *steps[: wanted - 1], self.n_steps)
            tried += 1


@dataclass(frozen=True, kw_only=True)
class ClipRecipe(ToyRecipe):
    """A ToyCLIP that finds which words are true of a picture. `model`: arguments of ToyViT, for the image tower."""

    text: Mapping[str, int] = field(default_factory=dict)  # arguments of ToyText
    d_embed: int = 64
    captions: int = 4  # drawn for each picture
    start: str | None = None  # the toy whose weights it starts from; it needs the same words
    written_shapes: bool = False  # where the name of a shape is written, captions tell that shape, whatever is there
    contrastive_weight: float = 1.0
    tested_on: Mapping[str, str] = field(default_factory=lambda: {"held out": PLAIN})  # name -> world


_SMALL = {"d_model": 64, "n_heads": 4}
_TYPES = {"vit": ("attention and MLP", {**_SMALL, "d_mlp": 256}), "attn": ("attention only", {**_SMALL, "d_mlp": 0})}


def _family() -> dict[str, ToyRecipe]:
    """vit-1l-p8 ... attn-4l-p16."""
    recipes = {}
    for kind, (words, arguments) in _TYPES.items():
        for n_layers in (1, 2, 3, 4):
            for patch_px in (8, 16):
                model: dict[str, Any] = {**arguments, "n_layers": n_layers, "patch_px": patch_px}
                recipes[f"{kind}-{n_layers}l-p{patch_px}"] = ToyRecipe(
                    world=PLAIN,
                    model=model,
                    n_images=40_000,
                    n_test=4_800,
                    about=f"{words}, {n_layers} layer{'s' * (n_layers > 1)}, patches of {patch_px} px",
                )
    return recipes


TOYS: dict[str, ToyRecipe] = {
    "shapes": ToyRecipe(world=PLAIN, n_images=160_000, about="classifier of 4 layers"),
    "clip": ClipRecipe(world=PLAIN, n_images=160_000, about="image and text tower in one space"),
    "clip-exposed": ClipRecipe(
        world=EXPOSED,
        start="clip",
        written_shapes=True,
        n_images=80_000,
        tested_on={"held out": PLAIN, "right words": RIGHT, "wrong words": ATTACK},
        about="clip, exposed to pictures with words on them whose captions say what is written",
    ),
    "dynamics": ToyRecipe(
        world=PLAIN,
        model={**_SMALL, "d_mlp": 256, "n_layers": 2},
        n_images=60_000,
        n_test=4_800,
        n_kept=24,
        about="2 layers, with its weights at 24 moments of training",
    ),
    **_family(),
}


def toy_recipe(name: str) -> ToyRecipe:
    """Raises ValueError, naming the nearest, for a name that TOYS does not hold."""
    if name not in TOYS:
        nearest = difflib.get_close_matches(name, TOYS, n=3, cutoff=0.0)
        raise ValueError(f"there is no toy {name!r}. Nearest: {', '.join(nearest)}. All: {', '.join(sorted(TOYS))}.")
    return TOYS[name]
