"""Sparse coders: what takes an activation apart into latents, and the controls they are judged by."""

from vitrail.coders.base import SparseCoder, Step
from vitrail.coders.baselines import PCA, Neurons, RandomDirections, controls, untrained_like
from vitrail.coders.batch_topk import BatchTopK
from vitrail.coders.checkpoint import coder_metadata, load_coder, save_coder
from vitrail.coders.matryoshka import Matryoshka
from vitrail.coders.normalize import NORMALIZATIONS, Normalization
from vitrail.coders.relu import ReLU
from vitrail.coders.sparse import Codes
from vitrail.coders.table import BASELINES, CODERS, make_coder
from vitrail.coders.topk import TopK

__all__ = [
    "BASELINES",
    "CODERS",
    "NORMALIZATIONS",
    "PCA",
    "BatchTopK",
    "Codes",
    "Matryoshka",
    "Neurons",
    "Normalization",
    "RandomDirections",
    "ReLU",
    "SparseCoder",
    "Step",
    "TopK",
    "coder_metadata",
    "controls",
    "load_coder",
    "make_coder",
    "save_coder",
    "untrained_like",
]
