"""Imports go down: the house's floors, read from the source with ast."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "vitrail"

# Lowest first. A module may import from lower floors and from its own package; floors of two rooms never meet
# sideways: `coders` and `training` know nothing of vision, `backbones`, `images` and `store` nothing of coders.
FLOORS = [
    {"files", "memory", "statistics", "progress", "provenance"},
    {"tables"},
    {"hooks", "images", "coders"},
    {"backbones", "training", "foreign", "hub"},
    {"store"},
    {"codes"},
    {"index"},
    {"metrics"},
    {"concepts"},
    {"steering"},
    {"toys", "studies"},
    {"cli"},
]
FORBIDDEN = {("coders", "images"), ("training", "hooks"), ("training", "images")} | {
    (room, vision) for room in ("foreign", "hub") for vision in ("hooks", "images")
}
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
OPTIONAL = {"timm", "open_clip", "transformers", "sklearn", "scipy", "torchvision", "matplotlib"} | {
    "huggingface_hub",
    "yaml",
    "usearch",
}


def modules() -> list[Path]:
    return sorted(
        path for path in SRC.rglob("*.py") if path.name not in ("__main__.py",) and path != SRC / "__init__.py"
    )


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("vitrail.")}


def top_level_packages(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_down(path: Path) -> None:
    tree, room = ast.parse(path.read_text(encoding="utf-8")), room_of(path)
    for other in imported_rooms(tree) - {room}:
        assert other in FLOOR, f"{other} stands on no floor: add it to FLOORS"
        assert FLOOR[other] < FLOOR[room], f"{path.name} ({room}) imports {other}, which is not below it"
        assert (room, other) not in FORBIDDEN, f"{room} must know nothing of {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SRC)))
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert not top_level_packages(ast.parse(path.read_text(encoding="utf-8"))) & OPTIONAL


def test_the_test_sees_an_import_that_climbs() -> None:
    tree = ast.parse("from vitrail.cli import main\nimport vitrail.store.read")
    assert imported_rooms(tree) == {"cli", "store"}
