"""Sparse coders: what takes an activation apart into latents, and the controls they are judged by."""

from vitrail.coders.archetypal import ArchetypalBatchTopK, ArchetypalTopK
from vitrail.coders.base import SparseCoder, Step
from vitrail.coders.baselines import PCA, KMeans, Neurons, RandomDirections, controls, untrained_like
from vitrail.coders.batch_topk import BatchTopK
from vitrail.coders.checkpoint import coder_metadata, load_coder, save_coder
from vitrail.coders.crosscoder import BatchTopKCrosscoder, Crosscoder, MultiSource, TopKCrosscoder
from vitrail.coders.gated import Gated
from vitrail.coders.jump_relu import JumpReLU
from vitrail.coders.matching_pursuit import MatchingPursuit
from vitrail.coders.matryoshka import Matryoshka
from vitrail.coders.matryoshka_prefix import MatryoshkaPrefix
from vitrail.coders.normalize import NORMALIZATIONS, Normalization
from vitrail.coders.relu import ReLU
from vitrail.coders.sparse import Codes
from vitrail.coders.table import BASELINES, CODERS, make_coder
from vitrail.coders.topk import TopK
from vitrail.coders.transcoder import BatchTopKTranscoder, ReLUTranscoder, TopKTranscoder, Transcoder

__all__ = [
    "BASELINES",
    "CODERS",
    "NORMALIZATIONS",
    "PCA",
    "ArchetypalBatchTopK",
    "ArchetypalTopK",
    "BatchTopK",
    "BatchTopKCrosscoder",
    "BatchTopKTranscoder",
    "Codes",
    "Crosscoder",
    "Gated",
    "JumpReLU",
    "KMeans",
    "MatchingPursuit",
    "Matryoshka",
    "MatryoshkaPrefix",
    "MultiSource",
    "Neurons",
    "Normalization",
    "RandomDirections",
    "ReLU",
    "ReLUTranscoder",
    "SparseCoder",
    "Step",
    "TopK",
    "TopKCrosscoder",
    "TopKTranscoder",
    "Transcoder",
    "coder_metadata",
    "controls",
    "load_coder",
    "make_coder",
    "save_coder",
    "untrained_like",
]
