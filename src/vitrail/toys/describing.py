"""What is said of a picture when a toy CLIP learns: some of what is true of it, in a sentence.

A caption that tells everything fits one picture; "a red thing" fits every eighth. A toy is told both kinds, so that
single words come to mean what they mean, and the loss knows which other pictures of the batch a caption is true of.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vitrail.images.worlds.backgrounds import BACKGROUNDS
from vitrail.images.worlds.draws import Draws, pick

FAMILIES = ("size", "colour", "texture", "shape", "position", "background")
OPENINGS = ("", "a photo of ", "a picture of ")
ALL, CLASS = 0.25, 0.25  # shares of the captions that tell everything, and the class alone; the others tell of each
# family or not as a coin falls


def described(attributes: Mapping[str, str], families: Collection[str] = FAMILIES) -> str:
    """ "a large red striped star at the top left on sand", less the families that are left out."""
    words = [attributes[family] for family in FAMILIES[:3] if family in families and family in attributes]
    thing = " ".join([*words, attributes["shape"] if "shape" in families else "thing"])
    sentence = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
    sentence += f" at the {attributes['position']}" if "position" in families else ""
    return sentence + (f" on {BACKGROUNDS[attributes['background']].phrase}" if "background" in families else "")


def families_told(share: float, coins: Sequence[float]) -> tuple[str, ...]:
    """Which families a caption tells of. Never none."""
    if share < ALL:
        return FAMILIES
    told = tuple(family for family, coin in zip(FAMILIES, coins, strict=True) if coin < 0.5)
    return ("texture", "shape") if share < ALL + CLASS or not told else told


def draw_captions(
    attributes: Sequence[Mapping[str, str]], key: tuple[int, int], first: int, n_captions: int
) -> tuple[list[str], Bool[Tensor, "n_images n_captions_in_all"]]:
    """n_captions for each picture, picture by picture, and which caption is true of which picture."""
    captions, told = [], []
    for row, values in enumerate(attributes):
        for number in range(n_captions):
            share, opening, *coins = Draws(key, first + row, number).uniform(2 + len(FAMILIES))
            families = families_told(share, coins)
            captions.append(pick(OPENINGS, opening) + described(values, families))
            told.append([family in families for family in FAMILIES])
    return captions, true_of(_numbered(attributes), torch.tensor(told))


def true_of(values: Int[Tensor, "n f"], told: Bool[Tensor, "m f"]) -> Bool[Tensor, "n m"]:
    """Caption j, of picture j // (m / n), is true of every picture that has the same value in each family it tells."""
    own = values.repeat_interleave(len(told) // len(values), 0)
    return ((values[:, None] == own[None]) | ~told[None]).all(2)


def _numbered(attributes: Sequence[Mapping[str, str]]) -> Int[Tensor, "n f"]:
    numbers: dict[tuple[str, str], int] = {}
    return torch.tensor(
        [
            [numbers.setdefault((family, values.get(family, "")), len(numbers)) for family in FAMILIES]
            for values in attributes
        ]
    )


def words_of(worlds_attributes: Sequence[Mapping[str, str]]) -> list[str]:
    """Every word that a caption of these pictures may hold, sorted."""
    words = {word for opening in OPENINGS for word in opening.split()} | {"a", "an", "thing"}
    for values in worlds_attributes:
        words.update(described(values).replace(",", "").split())
    return sorted(words)
