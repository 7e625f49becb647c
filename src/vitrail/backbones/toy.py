"""The project's own small vision transformer: pre-norm, CLS token, learned positions; blocks with an MLP or without."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.backbones.base import Backbone, Parts
from vitrail.backbones.preprocess import HALF, Preprocess
from vitrail.hooks import Site


class ToyAttention(nn.Module):
    """`causal`: a token sees itself and what lies before it, as in a text tower."""

    def __init__(self, *, d_model: int, n_heads: int, causal: bool = False) -> None:
        super().__init__()
        self.n_heads, self.causal = n_heads, causal
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(z.transpose(1, 2).reshape(b, t, d))


class ToyBlock(nn.Module):
    """Attention, then an MLP; with d_mlp=0 attention alone."""

    def __init__(self, *, d_model: int, n_heads: int, d_mlp: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attn = ToyAttention(d_model=d_model, n_heads=n_heads, causal=causal)
        self.norm2 = nn.LayerNorm(d_model) if d_mlp else None
        self.mlp = nn.Sequential(nn.Linear(d_model, d_mlp), nn.GELU(), nn.Linear(d_mlp, d_model)) if d_mlp else None

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        x = x + self.attn(self.norm1(x))
        return x if self.mlp is None or self.norm2 is None else x + self.mlp(self.norm2(x))


class ToyStem(nn.Sequential):
    """Patches by a few strided convolutions instead of one large one: (b, 3, h, w) -> (b, d_model, h/p, w/p).

    Xiao et al. 2021, arXiv:2106.14881: a ViT then learns from far fewer pictures. Kernels are 4 x 4 and not their
    3 x 3: at a stride of 2 an odd kernel looks half a pixel up and left, which adds up to half a patch. So a patch
    token's view is centred on its patch, and patch_px - 1 pixels wider on every side.
    """

    def __init__(self, *, d_model: int, patch_px: int) -> None:
        halvings = patch_px.bit_length() - 1
        if patch_px < 2 or patch_px != 2**halvings:
            raise ValueError(f"stem='conv' needs a patch_px that is a power of 2, got {patch_px}. Use stem='patch'.")
        widths = [3, *(max(8, d_model >> (halvings - i)) for i in range(1, halvings + 1))]
        layers: list[nn.Module] = []
        for i in range(halvings):
            layers.append(nn.Conv2d(widths[i], widths[i + 1], 4, stride=2, padding=1))
            if i < halvings - 1:
                layers += [nn.BatchNorm2d(widths[i + 1]), nn.GELU()]
        super().__init__(*layers)


class ToyViT(nn.Module):
    """images (b, 3, image_px, image_px) -> class logits (b, n_classes), read from the CLS token.

    n_classes=0: the CLS token itself, (b, d_model). d_mlp=0: attention only.
    """

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
        self.head = nn.Linear(d_model, n_classes) if n_classes else nn.Identity()

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], dim=1)
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
