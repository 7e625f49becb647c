"""A coder in use on another modality than it was trained on: images through a coder of texts, or the other way round.

    y = n'(x)       the normalisation with the other modality's mean and scale; weights and thresholds as they are

The two clouds of a dual encoder lie apart (Liang et al. 2022, arXiv:2203.02053), so that one mean for both makes every
row of the other modality mostly the gap. MSAE evaluates texts with the texts' own mean and scale (SPEC row 36).
"""

import copy

from vitrail.coders.base import SparseCoder
from vitrail.coders.crosscoder import MultiSource
from vitrail.coders.transcoder import Transcoder
from vitrail.statistics import ActivationStats


def for_modality(coder: SparseCoder, stats: ActivationStats) -> SparseCoder:
    """A copy that is normalised by `stats`, the other modality's; the given coder is left as it is.

    Where a coder has nothing to fit ("none", and what normalises each row by itself) the copy is the same coder. A
    threshold is measured in normalised space and is kept; `calibrate` on rows of the new modality estimates it anew.
    """
    if isinstance(coder, Transcoder | MultiSource):
        raise ValueError(f"a {coder.name} coder reads and writes several points; fit it to the rows of all of them.")
    if stats.mean.shape != (coder.d_in,):
        raise ValueError(f"the statistics are of {len(stats.mean)} dimensions; this coder has d_in={coder.d_in}.")
    other = copy.deepcopy(coder)
    if other.normalize.needs_fit:
        other.normalize.fit(stats)
        other.calibration = {**coder.calibration, "normalization_refitted_on_rows": stats.n}
    return other
