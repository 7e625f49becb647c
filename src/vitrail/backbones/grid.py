"""Where a token sits: token index <-> patch (row, column) <-> pixels of the pre-processed image.

Tokens are in the order CLS, registers (a distillation token counts as one), patches row by row.
"""

from dataclasses import dataclass
from typing import Literal, Self

TokenKind = Literal["cls", "spatial", "all"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """height x width patches of patch_px pixels, on an image of image_px = (height, width) pixels."""

    height: int
    width: int
    patch_px: int
    image_px: tuple[int, int]
    n_cls: int
    n_registers: int

    @classmethod
    def of_tokens(
        cls, n_tokens: int, *, image_px: tuple[int, int], patch_px: int, n_cls: int, n_registers: int
    ) -> Self:
        """The grid of a sequence of n_tokens. Raises ValueError if patches and special tokens do not add up to it."""
        height, width = image_px[0] // patch_px, image_px[1] // patch_px
        grid = cls(
            height=height, width=width, patch_px=patch_px, image_px=image_px, n_cls=n_cls, n_registers=n_registers
        )
        if grid.n_tokens != n_tokens:
            raise ValueError(
                f"the model makes {n_tokens} tokens of an image of {image_px} pixels, but {height} x {width} patches "
                f"of {patch_px} pixels and {grid.n_special} special tokens are {grid.n_tokens}."
            )
        return grid

    @property
    def n_special(self) -> int:
        return self.n_cls + self.n_registers

    @property
    def n_patches(self) -> int:
        return self.height * self.width

    @property
    def n_tokens(self) -> int:
        return self.n_special + self.n_patches

    def tokens(self, kind: str) -> slice:
        """The positions of a kind: "cls", "spatial" (patches) or "all"."""
        if kind == "all":
            return slice(0, self.n_tokens)
        if kind == "spatial":
            return slice(self.n_special, self.n_tokens)
        if kind == "cls":
            if not self.n_cls:
                raise ValueError("this model has no CLS token; use tokens='spatial' or 'all'.")
            return slice(0, 1)
        raise ValueError(f"tokens must be 'cls', 'spatial' or 'all', got {kind!r}.")

    def patch_of_token(self, token: int) -> tuple[int, int] | None:
        """(row, column) of a token, None for a special token."""
        if not 0 <= token < self.n_tokens:
            raise ValueError(f"token must be in 0..{self.n_tokens - 1}, got {token}.")
        if token < self.n_special:
            return None
        return divmod(token - self.n_special, self.width)

    def token_of_patch(self, row: int, column: int) -> int:
        if not (0 <= row < self.height and 0 <= column < self.width):
            raise ValueError(f"patch must lie in {self.height} x {self.width}, got row {row}, column {column}.")
        return self.n_special + row * self.width + column

    def box_px(self, token: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a patch token in the pre-processed image; right and bottom are past the end.

        A special token sees the whole image, and gets it.
        """
        patch = self.patch_of_token(token)
        if patch is None:
            return (0, 0, self.image_px[1], self.image_px[0])
        row, column = patch
        left, top = column * self.patch_px, row * self.patch_px
        return (left, top, left + self.patch_px, top + self.patch_px)

    def to_json(self) -> dict[str, int | list[int]]:
        return {
            "height": self.height,
            "width": self.width,
            "patch_px": self.patch_px,
            "image_px": list(self.image_px),
            "n_cls": self.n_cls,
            "n_registers": self.n_registers,
        }

    @classmethod
    def from_json(cls, value: dict[str, int | list[int]]) -> Self:
        kept = {key: value[key] for key in ("height", "width", "patch_px", "n_cls", "n_registers")}
        image_px = value["image_px"]
        assert isinstance(image_px, list)
        return cls(**kept, image_px=(image_px[0], image_px[1]))  # pyright: ignore[reportArgumentType]
