"""The tables of coders. A new one is its file and its entry here; contract tests, trainer and CLI then know it."""

from vitrail.coders.archetypal import ArchetypalBatchTopK, ArchetypalTopK
from vitrail.coders.base import SparseCoder
from vitrail.coders.baselines import PCA, KMeans, Neurons, RandomDirections
from vitrail.coders.batch_topk import BatchTopK
from vitrail.coders.crosscoder import BatchTopKCrosscoder, Crosscoder, TopKCrosscoder
from vitrail.coders.gated import Gated
from vitrail.coders.jump_relu import JumpReLU
from vitrail.coders.matching_pursuit import MatchingPursuit
from vitrail.coders.matryoshka import Matryoshka
from vitrail.coders.matryoshka_prefix import MatryoshkaPrefix
from vitrail.coders.relu import ReLU
from vitrail.coders.topk import TopK
from vitrail.coders.transcoder import BatchTopKTranscoder, ReLUTranscoder, TopKTranscoder

CODERS: dict[str, type[SparseCoder]] = {
    coder.name: coder
    for coder in (
        ReLU,
        TopK,
        BatchTopK,
        Matryoshka,
        JumpReLU,
        Gated,
        MatryoshkaPrefix,
        ArchetypalTopK,
        ArchetypalBatchTopK,
        MatchingPursuit,
        TopKTranscoder,
        BatchTopKTranscoder,
        ReLUTranscoder,
        Crosscoder,
        TopKCrosscoder,
        BatchTopKCrosscoder,
    )
}
BASELINES: dict[str, type[SparseCoder]] = {coder.name: coder for coder in (RandomDirections, PCA, Neurons, KMeans)}


def make_coder(architecture: str, **arguments: object) -> SparseCoder:
    """A coder, or a control, by the name of its architecture."""
    known = CODERS | BASELINES
    if architecture not in known:
        raise ValueError(f"there is no coder architecture {architecture!r}. Known: {', '.join(known)}.")
    return known[architecture](**arguments)  # pyright: ignore[reportArgumentType]
