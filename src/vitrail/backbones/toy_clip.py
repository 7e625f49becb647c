"""The project's own small CLIP: a toy vision transformer and a toy text transformer that answer in one space.

    image embedding   norm(tokens)[CLS] @ visual_proj          before it is made a unit vector, as open_clip gives it
    text embedding    norm(tokens)[end token] @ text_proj
    logits            exp(log_scale) * cosine(image, text)

The text transformer is causal and reads words, not pieces of them (Radford et al. 2021, arXiv:2103.00020, in small).
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.backbones.base import Backbone, Parts
from vitrail.backbones.preprocess import HALF, Preprocess
from vitrail.backbones.text import TokenizedTextTower
from vitrail.backbones.toy import ToyBlock, ToyViT
from vitrail.hooks import Site

PAD, START, END = 0, 1, 2
N_SPECIAL = 3


class WordTokenizer:
    """Texts to token ids (n, context_length): start, a number for each word, end, then padding.

    Letters are made small; what is neither letter, digit nor hyphen separates words. Raises ValueError for a word that
    the model never read, and for a text that is too long.
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        self.words, self.context_length = tuple(words), context_length
        self._ids = {word: place + N_SPECIAL for place, word in enumerate(words)}

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "n length"]:
        ids = torch.full((len(texts), self.context_length), PAD)
        for row, text in enumerate(texts):
            tokens = [START, *map(self._id, split_words(text)), END]
            if len(tokens) > self.context_length:
                raise ValueError(f"a text may have {self.context_length - 2} words, got {len(tokens) - 2}: {text!r}.")
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids

    def _id(self, word: str) -> int:
        if word not in self._ids:
            nearest = difflib.get_close_matches(word, self.words, n=3, cutoff=0.0)
            raise ValueError(
                f"the toy's text tower knows {len(self.words)} words, and {word!r} is none of them. Nearest: "
                f"{', '.join(nearest)}. All: backbone.module.tokenizer.words."
            )
        return self._ids[word]


def split_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9-]+", text.lower())


class ToyText(nn.Module):
    """Token ids (n, length) -> (n, d_model) at the end token."""

    def __init__(
        self, *, n_tokens: int, context_length: int, d_model: int, n_layers: int, n_heads: int, d_mlp: int
    ) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(n_tokens, d_model)
        self.pos_embed = nn.Parameter(torch.randn(context_length, d_model) * 0.02)
        self.blocks = nn.ModuleList(
            ToyBlock(d_model=d_model, n_heads=n_heads, d_mlp=d_mlp, causal=True) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model)

    def forward(self, ids: Int[Tensor, "n length"]) -> Float[Tensor, "n d_model"]:
        end = (ids == END).int().argmax(1)
        ids = ids[:, : int(end.max()) + 1]  # no token sees what comes after it: padding that no text needs is not read
        x = self.token_embed(ids) + self.pos_embed[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x[torch.arange(len(ids), device=ids.device), end])


class ToyCLIP(nn.Module):
    """`words`: those of the tokenizer. `vision`: arguments of ToyViT but n_classes. `text`: of ToyText but n_tokens."""

    def __init__(
        self, *, words: Sequence[str], vision: Mapping[str, Any], text: Mapping[str, Any], d_embed: int = 64
    ) -> None:
        super().__init__()
        self.visual = ToyViT(**{**vision, "n_classes": 0})
        given = {"context_length": 32, "d_model": 128, "n_layers": 2, "n_heads": 4, "d_mlp": 512, **text}
        self.config = {"words": list(words), "vision": self.visual.config, "text": given, "d_embed": d_embed}
        self.tokenizer = WordTokenizer(words, given["context_length"])
        self.text = ToyText(n_tokens=len(words) + N_SPECIAL, **given)
        self.visual_proj = nn.Linear(int(self.visual.config["d_model"]), d_embed, bias=False)
        self.text_proj = nn.Linear(given["d_model"], d_embed, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def pool(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b d_embed"]:
        return self.visual_proj(self.visual.norm(tokens)[:, 0])

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d_embed"]:
        tokens = self.visual.embed(images)
        for block in self.visual.blocks:
            tokens = block(tokens)
        return self.pool(tokens)

    def encode_text(self, ids: Int[Tensor, "n length"]) -> Float[Tensor, "n d_embed"]:
        return self.text_proj(self.text(ids))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d_embed"]:
        return self.encode_image(images)


def wrap(
    model: ToyCLIP, *, name: str, class_names: Sequence[str] = (), preprocess: Preprocess | None = None
) -> Backbone:
    """A ToyCLIP as a Backbone with a text tower."""
    visual = model.visual
    image_px = visual.config["image_px"]
    parts = Parts(
        embed=visual.embed,
        blocks=tuple(visual.blocks),
        pool=model.pool,
        head=lambda embedding: embedding,
        patches=Site(visual.patch_embed, "output", layout="channels_first"),
        full_embed=None,
        ln_final=Site(visual.norm, "output"),
    )
    return Backbone(
        model,
        parts,
        name=name,
        preprocess=preprocess or Preprocess.of((image_px, image_px), mean=HALF, std=HALF),
        patch_px=visual.config["patch_px"],
        n_cls=1,
        n_registers=0,
        has_head=False,
        class_names=class_names,
        text=TokenizedTextTower(
            name=name,
            tokenizer=lambda: model.tokenizer,
            embed=model.encode_text,
            log_scale=lambda: model.log_scale,
        ),
    )
