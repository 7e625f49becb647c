"""Let a torchvision wheel built for CUDA import beside a CPU build of torch.

Such a pair fails with "operator torchvision::nms does not exist", and takes timm, open_clip and parts of transformers
with it, although none of what they use needs that operator. Declaring the two missing schemas is enough to import. A
healthy installation, or none at all, is left as it is.
"""

import importlib
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # kept alive: the schemas go when the object goes


def ensure_torchvision() -> None:
    """Call before the first import of timm, open_clip or transformers. Cheap to call again."""
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return  # vitrail itself does not need it
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _declare()
        importlib.import_module("torchvision")


def _declare() -> None:
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
