"""Modules that the peers import and their coders do not use, for a process that compares one peer and then ends."""

import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Language models, data sets, pictures, logs. Stood in for even where they are installed: half of them take seconds.
UNUSED = (
    *("transformer_lens", "transformers", "nnsight", "timm", "torchvision", "accelerate", "schedulefree"),
    *("datasets", "wandb", "plotly", "plotly_express", "pandas", "cv2", "skimage", "matplotlib", "sklearn"),
    *("babe", "nltk", "requests", "dotenv", "zstandard", "umap", "circuitsvis", "typer", "tenacity"),
    "overcomplete.visualization",
)


class HookPoint(nn.Identity):
    """What TransformerLens hangs hooks on; without hooks it is the identity."""


class HookedRootModule(nn.Module):
    def setup(self) -> None:
        pass


KNOWN = {"HookPoint": HookPoint, "HookedRootModule": HookedRootModule}


class Anything(type):
    """A class with every attribute; it may be made, subscripted, subclassed and used in annotations."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda self, *a, **k: None, "__call__": _as_decorator})

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    def __ror__(cls, other: Any) -> Any:
        return cls


def _as_decorator(self: Any, *arguments: Any, **options: Any) -> Any:
    return arguments[0] if arguments and callable(arguments[0]) else self


class StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return KNOWN.get(name) or getattr(Anything(self.__name__, (), {}), name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, roots: set[str]) -> None:
        self.roots = roots

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if any(fullname == root or fullname.startswith(f"{root}.") for root in self.roots):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return StandIn(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


@contextmanager
def importing_a_peer() -> Iterator[None]:
    """What it does not use is stood in for, from now on; warnings of its import are its own."""
    sys.meta_path.insert(0, Finder(set(UNUSED) - set(sys.modules)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
