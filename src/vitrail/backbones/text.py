"""The text side of a dual encoder, and class names turned into directions to compare images with."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

OPENAI_SIMPLE = ("a photo of a {}.",)


@runtime_checkable
class TextTower(Protocol):
    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by to become logits: exp of the model's own parameter; 100 for most CLIPs."""
        ...

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n d_embed"]:
        """One unit row per text, in the space of the image embedding."""
        ...


class TokenizedTextTower:
    """A text tower made of a tokenizer, loaded when first needed, and a function from token ids to embeddings."""

    def __init__(
        self,
        *,
        name: str,
        tokenizer: Callable[[], Callable[[list[str]], Int[Tensor, "n length"]]],
        embed: Callable[[Int[Tensor, "n length"]], Tensor],
        log_scale: Callable[[], Tensor],
    ) -> None:
        self._name, self._load, self._embed, self._log_scale = name, tokenizer, embed, log_scale
        self._tokenizer: Callable[[list[str]], Int[Tensor, "n length"]] | None = None

    @property
    def logit_scale(self) -> float:
        return float(self._log_scale().detach().exp())

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n d_embed"]:
        if self._tokenizer is None:
            try:
                self._tokenizer = self._load()
            except (OSError, ValueError) as error:
                raise ConnectionError(
                    f"the tokenizer of {self._name} is not on this machine and could not be fetched ({error}). "
                    "Connect to a model hub once, or load the model from a folder that holds its tokenizer."
                ) from error
        ids = self._tokenizer(list(texts)).to(self._log_scale().device)
        return torch.nn.functional.normalize(self._embed(ids), dim=-1)


def class_embeddings(
    text: TextTower, class_names: Sequence[str], templates: Sequence[str] = OPENAI_SIMPLE
) -> Float[Tensor, "n_classes d_embed"]:
    """One unit row per class: the mean of the unit embeddings of `template.format(name)` over templates, renormalised.

    Radford et al. 2021, arXiv:2103.00020, section 3.1.4 (an ensemble over the embedding space).
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"a template must hold {{}} where the class name goes, got {template!r}.")
    rows = [text.encode([template.format(name) for template in templates]).mean(0) for name in class_names]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)
