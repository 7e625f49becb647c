"""The project's own small vision transformer: pre-norm, CLS token, learned positions."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.backbones.base import Backbone, Parts
from vitrail.backbones.checkpoints import load_exactly, read_weights
from vitrail.backbones.preprocess import HALF, Preprocess
from vitrail.files import read_json
from vitrail.hooks import Site

WEIGHTS = Path(__file__).with_name("weights")


class ToyAttention(nn.Module):
    def __init__(self, *, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(z.transpose(1, 2).reshape(b, t, d))


class ToyBlock(nn.Module):
    def __init__(self, *, d_model: int, n_heads: int, d_mlp: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attn = ToyAttention(d_model=d_model, n_heads=n_heads)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_mlp), nn.GELU(), nn.Linear(d_mlp, d_model))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ToyStem(nn.Sequential):
    """Patches by a few strided 3 x 3 convolutions instead of one large one: (b, 3, h, w) -> (b, d_model, h/p, w/p).

    Xiao et al. 2021, arXiv:2106.14881: a ViT then learns from far fewer pictures. A patch token sees its patch and
    patch_px - 1 pixels above and to the left of it: its field of view is centred on the patch's upper left corner.
    """

    def __init__(self, *, d_model: int, patch_px: int) -> None:
        halvings = patch_px.bit_length() - 1
        if patch_px < 2 or patch_px != 2**halvings:
            raise ValueError(f"stem='conv' needs a patch_px that is a power of 2, got {patch_px}. Use stem='patch'.")
        widths = [3, *(max(8, d_model >> (halvings - i)) for i in range(1, halvings + 1))]
        layers: list[nn.Module] = []
        for i in range(halvings):
            layers.append(nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1))
            if i < halvings - 1:
                layers += [nn.BatchNorm2d(widths[i + 1]), nn.GELU()]
        super().__init__(*layers)


class ToyViT(nn.Module):
    """images (b, 3, image_px, image_px) -> class logits (b, n_classes), read from the CLS token."""

    def __init__(
        self,
        *,
        image_px: int = 64,
        patch_px: int = 8,
        d_model: int = 128,
        n_layers: int = 4,
        n_heads: int = 4,
        d_mlp: int = 512,
        n_classes: int = 48,
        stem: str = "conv",
    ) -> None:
        super().__init__()
        if stem not in ("conv", "patch"):
            raise ValueError(f"stem must be conv or patch, got {stem!r}.")
        if image_px % patch_px:
            raise ValueError(f"image_px must be a multiple of patch_px={patch_px}, got {image_px}.")
        self.config = {
            "image_px": image_px,
            "patch_px": patch_px,
            "d_model": d_model,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "d_mlp": d_mlp,
            "n_classes": n_classes,
            "stem": stem,
        }
        self.patch_embed = (
            ToyStem(d_model=d_model, patch_px=patch_px)
            if stem == "conv"
            else nn.Conv2d(3, d_model, patch_px, stride=patch_px)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (image_px // patch_px) ** 2, d_model) * 0.02)
        self.blocks = nn.ModuleList(ToyBlock(d_model=d_model, n_heads=n_heads, d_mlp=d_mlp) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, n_classes)

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return tokens + self.pos_embed

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n_classes"]:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def wrap(
    model: ToyViT, *, name: str, class_names: Sequence[str] = (), preprocess: Preprocess | None = None
) -> Backbone:
    """A ToyViT as a Backbone."""
    image_px = model.config["image_px"]
    parts = Parts(
        embed=model.embed,
        blocks=tuple(model.blocks),
        pool=lambda tokens: model.norm(tokens)[:, 0],
        head=model.head,
        patches=Site(model.patch_embed, "output", layout="channels_first"),
        full_embed=None,
        ln_final=Site(model.norm, "output"),
    )
    return Backbone(
        model,
        parts,
        name=name,
        preprocess=preprocess or Preprocess.of((image_px, image_px), mean=HALF, std=HALF),
        patch_px=model.config["patch_px"],
        n_cls=1,
        n_registers=0,
        has_head=True,
        class_names=class_names,
    )


def load(
    name: str,
    *,
    weights: Path | None = None,
    pretrained: bool | str | None = None,
    image_px: int | tuple[int, int] | None = None,
    allow_pickle: bool = False,
) -> Backbone:
    """ "shapes": the weights that ship with vitrail, or `weights`, a safetensors file with its JSON beside it.

    The JSON holds "model" (the arguments of ToyViT), "class_names", and "mean" and "std" of the input.
    `pretrained=False` gives random weights.
    """
    if isinstance(pretrained, str):
        raise ValueError(f"a toy model has one set of weights: pretrained must be True or False, got {pretrained!r}.")
    path = weights or WEIGHTS / f"{name}.safetensors"
    if weights is None and not path.is_file():
        known = sorted(found.stem for found in WEIGHTS.glob("*.safetensors"))
        raise KeyError(f"there is no toy model {name!r}. Known: {', '.join(known) or 'none'}.")
    about = read_json(path.with_suffix(".json"), "description of a toy model")
    model = ToyViT(**about["model"])
    own_px = model.config["image_px"]
    if image_px not in (None, own_px, (own_px, own_px)):
        raise ValueError(f"toy/{name} takes images of {own_px} pixels and has no positions for others, got {image_px}.")
    if pretrained is not False:
        load_exactly(model, read_weights(path, allow_pickle=allow_pickle), what=f"toy/{name}")
    preprocess = Preprocess.of((own_px, own_px), mean=tuple(about.get("mean", HALF)), std=tuple(about.get("std", HALF)))
    return wrap(model, name=f"toy/{name}", class_names=about.get("class_names", ()), preprocess=preprocess)
