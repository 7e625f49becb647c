"""The metrics that one pass can feed, by name and by group: what each needs, and what it costs.

chosen("all")                   every metric of KINDS
chosen("msae,l0_maps")          a group and a metric
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from vitrail.metrics.cknna import CKNNA, cknna
from vitrail.metrics.dead import Dead
from vitrail.metrics.frequency import FiringFrequency
from vitrail.metrics.l0_maps import L0Maps
from vitrail.metrics.magnitudes import Magnitudes
from vitrail.metrics.moran import RawCoherence, SpatialCoherence
from vitrail.metrics.msae_reconstruction import MSAEReconstruction
from vitrail.metrics.orthogonality import DecoderOrthogonality
from vitrail.metrics.passing import Metric, Setting
from vitrail.metrics.prisma_reconstruction import PrismaReconstruction
from vitrail.metrics.progressive import Progressive

MetricFactory = Callable[[Setting], Metric]


@dataclass(frozen=True)
class Kind:
    """`cost`: beside encoding the same rows, at d_sae 6,144 and L0 64 (docs/benchmarks.md)."""

    make: MetricFactory
    group: str
    needs: str
    cost: str


def _progressive(setting: Setting) -> Metric:
    return Progressive(setting, cknna=lambda x, codes: cknna(x - x.mean(0), codes), sample_rows=PROGRESSIVE_ROWS)


PROGRESSIVE_ROWS = 2_000  # of the CKNNA at each k

KINDS: dict[str, Kind] = {
    "prisma_reconstruction": Kind(PrismaReconstruction, "prisma", "rows, reconstruction", "2 %"),
    "l0_maps": Kind(L0Maps, "prisma", "codes", "under 1 %"),
    "frequency": Kind(FiringFrequency, "prisma", "codes", "under 1 %"),
    "msae_reconstruction": Kind(MSAEReconstruction, "msae", "rows, codes, reconstruction", "4 %"),
    "cknna": Kind(CKNNA, "msae", "a sample of at most 10,000 rows and codes", "3 s at the end"),
    "orthogonality": Kind(DecoderOrthogonality, "msae", "the decoder", "6 s at 24,576 latents, at the end"),
    "dead": Kind(Dead, "msae", "codes", "under 1 %"),
    "progressive": Kind(_progressive, "msae", "rows, codes", "15 %"),
    "magnitudes": Kind(Magnitudes, "msae", "codes", "1 %"),
    "moran": Kind(SpatialCoherence, "visae", "codes of all patches", "0.5 ms an image"),
    "raw_moran": Kind(RawCoherence, "visae", "rows of all patches", "more than encoding a narrow coder"),
}
GROUPS = tuple(dict.fromkeys(kind.group for kind in KINDS.values()))


def chosen(names: str) -> dict[str, Kind]:
    """Of "all", or names of groups and metrics with commas between; "" is none. KeyError names the nearest."""
    wanted: set[str] = set()
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name == "all":
            wanted |= set(KINDS)
        elif name in GROUPS:
            wanted |= {metric for metric, kind in KINDS.items() if kind.group == name}
        elif name in KINDS:
            wanted.add(name)
        else:
            known = ["all", *GROUPS, *KINDS]
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise KeyError(f"there is no metric {name!r}. Nearest: {', '.join(nearest)}. Known: {', '.join(known)}.")
    return {name: kind for name, kind in KINDS.items() if name in wanted}
