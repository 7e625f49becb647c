"""Arrays of an .npz, a zip of .npy files, read as data: mapped where they lie, or inflated a block at a time.

numpy.load inflates an array whole and maps none of an .npz.
"""

import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 2**24  # bytes inflated at a time


def opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is cut short or not a .npz file: {error}.") from error


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(f"{name}.npy")
    except KeyError:
        found = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist()) or "nothing"
        raise ValueError(f"{path} has no array {name!r}. Found: {found}.") from None


def _npy_header(path: Path, name: str, stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {name} is no array that can be read: {error}.") from error
    if fortran and len(shape) > 1:
        raise ValueError(f"{path}: {name} lies in Fortran order; save it with numpy.ascontiguousarray.")
    return shape, dtype


def array_header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    with opened(path) as archive, archive.open(_member(path, archive, name)) as stream:
        return _npy_header(path, name, stream)


def array(path: Path, name: str) -> np.ndarray:
    """A whole array. Raises ValueError if it is missing, damaged, or would have to be unpickled."""
    try:
        with opened(path) as archive, archive.open(_member(path, archive, name)) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: {name} cannot be read: {error}") from error


def data(path: Path, name: str) -> np.ndarray | None:
    """`array`, or None where there is none, or only a pickled one."""
    with opened(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
    return None if array_header(path, name)[1].hasobject else array(path, name)


def mapped(path: Path, name: str) -> np.ndarray | None:
    """The array where it lies in the file; None if it is compressed."""
    with opened(path) as archive:
        member = _member(path, archive, name)
        if member.compress_type != zipfile.ZIP_STORED:
            return None
    with path.open("rb") as stream:
        stream.seek(member.header_offset)
        local = stream.read(30)  # its own extra field may be longer than the directory's
        start = (
            member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        )
        stream.seek(start)
        shape, dtype = _npy_header(path, name, stream)
        offset = stream.tell()
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {name} is cut short: {error}.") from error


def inflated(path: Path, name: str) -> tuple[np.ndarray, bool]:
    """(n, bytes) bits of pictures that are black and white, or (n, h, w); and which it is."""
    with opened(path) as archive, archive.open(_member(path, archive, name)) as stream:
        shape, _ = _npy_header(path, name, stream)
        size = math.prod(shape[1:])
        bits = np.empty((shape[0], -(-size // 8)), dtype=np.uint8)
        done = 0
        for block in _blocks(path, name, stream, shape[0], size):
            if block.max() > 1:
                return array(path, name), False
            bits[done : done + len(block)] = np.packbits(block, axis=1)
            done += len(block)
    return bits, True


def _blocks(path: Path, name: str, stream: Any, n: int, size: int) -> Iterator[np.ndarray]:
    rows = max(1, BLOCK // size)
    for at in range(0, n, rows):
        wanted = min(rows, n - at) * size
        try:
            data = stream.read(wanted)
        except (zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}.") from error
        if len(data) < wanted:
            raise ValueError(f"{path}: {name} is cut short.")
        yield np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
