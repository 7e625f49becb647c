"""The manifest of a store: what its rows are, where they lie, and what is known of them.

    STORE/manifest.json                          this; state "writing" until every shard is there, then "complete"
    STORE/images.parquet                         one row per image asked for: id, uri, label, ..., or why it was skipped
    STORE/shards/shard-00000/POINT.safetensors   tensor "x" (n_images, n_tokens, d_in), image-major
    STORE/shards/shard-00000/record.json         positions, skipped images, checksums, moments
    STORE/cost.json                              seconds, images/s, MB: the only file that differs between two runs

A shard folder appears by one rename, so it is there with all its points or not at all. docs/formats.md is the norm.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from vitrail.backbones.grid import Grid
from vitrail.files import json_digest, read_json, write_json

FORMAT = "vitrail-store"
VERSION = 1
DTYPES = ("float16", "bfloat16", "float32")
TOKEN_KINDS = ("cls", "spatial", "all", "pooled")


@dataclass(frozen=True)
class StoredPoint:
    """How one hook point was stored. `tokens` is a token kind; `n_tokens` rows of width `d_in` per image."""

    tokens: str
    n_tokens: int
    d_in: int


@dataclass(frozen=True)
class ShardEntry:
    name: str
    n_images: int
    bytes: dict[str, int]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    request: dict[str, Any]  # what was asked for; a resumed run must ask for the same
    state: str  # "writing" | "complete"
    grid: Grid
    n_shards: int
    n_images: int = 0  # stored; skipped ones are not counted
    n_skipped: int = 0
    points: dict[str, StoredPoint] = field(default_factory=dict)
    shards: list[ShardEntry] = field(default_factory=list)
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)  # point -> token kind -> ActivationStats

    @property
    def digest(self) -> str:
        """The identity of the rows: request and checksums, nothing of time or place."""
        request = {key: value for key, value in self.request.items() if key != "images"}  # the fingerprint says it
        return json_digest({"request": request, "shards": [asdict(shard) for shard in self.shards]})

    def write(self, store: Path) -> None:
        value = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_json(store / "manifest.json", value)

    @classmethod
    def read(cls, store: Path) -> Self:
        """Raises FileNotFoundError or ValueError, naming the file, where there is no readable manifest."""
        path = store / "manifest.json"
        value = read_json(path, "store manifest")
        if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a {FORMAT} manifest. A store is the folder that `vitrail extract` wrote.")
        version = value.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"{path} has format version {version}; this vitrail reads version {VERSION}. "
                "Extract again, or use the vitrail that wrote it."
            )
        grid = value.pop("grid")
        value["grid"] = Grid(**{**grid, "image_px": tuple(grid["image_px"])})
        value["points"] = {name: StoredPoint(**point) for name, point in value["points"].items()}
        value["shards"] = [ShardEntry(**shard) for shard in value["shards"]]
        return cls(**value)
