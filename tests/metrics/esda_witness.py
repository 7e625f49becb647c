"""Moran's I by esda, in a process of its own: python esda_witness.py IN.npz OUT.npy

IN holds `maps` (m, p) and `shape`; OUT is of queens, then of rooks. What the two import beside what is wanted of them
(geopandas, shapely, and much else) is stood in for: pip install --no-deps esda libpysal.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))
from stand_ins import Finder

UNUSED = (
    *("geopandas", "shapely", "pandas", "statsmodels", "patsy", "seaborn", "matplotlib", "requests", "bs4"),
    *("platformdirs", "libpysal.examples", "libpysal.io", "libpysal.graph", "libpysal.cg"),
)
sys.meta_path.insert(0, Finder(set(UNUSED)))
# Only esda's moran.py: the package itself imports everything that it has.
found = importlib.util.find_spec("esda")
package = types.ModuleType("esda")
package.__path__ = list(found.submodule_search_locations)
sys.modules["esda"] = package

from esda.moran import Moran  # noqa: E402
from libpysal.weights import lat2W  # noqa: E402

with np.load(sys.argv[1]) as given:
    maps, shape = given["maps"], given["shape"].tolist()
out = []
for rook in (False, True):
    weights = lat2W(*shape, rook=rook)
    each = [Moran(one, weights, transformation="B", permutations=0) for one in maps]
    out.append([[one.I, one.EI, weights.s0] for one in each])
np.save(sys.argv[2], np.array(out))
