"""Activations on disk, and their streaming twin."""

from vitrail.store.read import Store, StoreReader
from vitrail.store.stream import ActivationStream
from vitrail.store.write import extract

__all__ = ["ActivationStream", "Store", "StoreReader", "extract"]
