"""A stranger's pickle, read as data.

Peers save with torch.save: a zip of tensors and one pickle, which may ask the reader to call anything. Here torch's
weights-only reader does the work: tensors and plain containers. A class that it does not know (Prisma's config) becomes
an inert bag: it may be made empty and given attributes, but never called; nothing of the class's own code is imported.
A pickle that calls anything else is refused.
"""

import contextlib
import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

# numpy arrays and numbers are data too (MSAE's mean and scale may be); their dtypes are classes of their own.
_NUMPY = [np.ndarray, np.dtype, *{type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "?")}]
_NUMPY_MAKERS = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}


class _Inert(type):
    """`cls.__new__(cls)` makes a bag; a call, which is how a pickle would run code, does not."""

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        raise pickle.UnpicklingError(f"it calls {cls.__qualname__}")


class _Bag(metaclass=_Inert):
    """Attributes without a class."""


def read_pickle(path: Path, content: bytes | None = None) -> Any:
    """What torch.save wrote to `path` (or `content`, where the pickle is a part of the file). Runs none of its code."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is no checkpoint here.")
    if not zipfile.is_zipfile(path if content is None else io.BytesIO(content)):
        raise ValueError(
            f"{path} is not a file of torch.save (a zip), or is cut short. Older pickles are not read: save it again "
            f"with torch.save(...) where its library is installed and trusted."
        )

    def stream() -> Any:
        return contextlib.closing(io.BytesIO(content)) if content is not None else path.open("rb")

    try:
        with _allowed([*_NUMPY, *_numpy_makers()]):
            with stream() as source:
                unknown = torch.serialization.get_unsafe_globals_in_checkpoint(source)
            bags = [(_Inert(name.rpartition(".")[2], (_Bag,), {"__qualname__": name}), name) for name in unknown]
            with _allowed(bags), stream() as source:
                return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, TypeError, AttributeError, KeyError, AssertionError, EOFError, IndexError) as error:
        found = re.search(r"it calls [\w.]+|GLOBAL [\w.]+", str(error))
        reason = found.group().replace("GLOBAL", "it names") if found else type(error).__name__
        raise ValueError(
            f"{path} is a pickle that does more than hold tensors and settings ({reason}). A pickle can run code when "
            f"it is opened, so this one is not."
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{path} is not a whole file of torch.save: {str(error).splitlines()[0]}") from error


def attributes(value: Any) -> Any:
    """The bags in it as dicts, dtypes and devices as text: what JSON can hold."""
    if isinstance(value, _Bag):
        return {"class": type(value).__qualname__} | attributes(vars(value))
    if isinstance(value, dict):
        return {str(name): attributes(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [attributes(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if isinstance(value, type):
        return value.__qualname__
    return str(value) if isinstance(value, torch.dtype | torch.device) else f"<{type(value).__name__}>"


def _numpy_makers() -> Iterator[tuple[Any, str]]:
    for package in ("numpy.core", "numpy._core"):  # numpy 1 and 2
        for name, maker in _NUMPY_MAKERS.items():
            yield maker, f"{package}.multiarray.{name}"


def _allowed(names: list[Any]) -> Any:
    return torch.serialization.safe_globals(names)
