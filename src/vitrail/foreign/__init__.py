"""Coders that other libraries saved, opened as ours. docs/foreign.md says which, and against what each was checked."""

from vitrail.foreign.base import Opened, Peer
from vitrail.foreign.table import (
    PEERS,
    convert,
    normalize_inside,
    open_foreign,
    read_foreign,
    recognise,
    save_opened,
)

__all__ = [
    "PEERS",
    "Opened",
    "Peer",
    "convert",
    "normalize_inside",
    "open_foreign",
    "read_foreign",
    "recognise",
    "save_opened",
]
