"""vitrail: open up vision transformers. The front door; everything else is one import below it.

Names are looked up when first used, so that `import vitrail` and `vitrail --help` are cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitrail.provenance import VERSION as __version__

if TYPE_CHECKING:
    from vitrail.backbones import Backbone, load
    from vitrail.coders import CODERS, Codes, SparseCoder, load_coder, make_coder, save_coder
    from vitrail.codes import CodeStore, encode
    from vitrail.foreign import open_foreign
    from vitrail.images import open_images
    from vitrail.index import Index, build_index
    from vitrail.metrics import MEASURES
    from vitrail.progress import Terminal
    from vitrail.store import ActivationStream, Store, extract
    from vitrail.studies.first_look import first_look
    from vitrail.studies.prisma_table import prisma_table
    from vitrail.studies.report import write_report
    from vitrail.training import TrainConfig, train

_WHERE = {
    "ActivationStream": "vitrail.store",
    "Backbone": "vitrail.backbones",
    "CODERS": "vitrail.coders",
    "CodeStore": "vitrail.codes",
    "Codes": "vitrail.coders",
    "Index": "vitrail.index",
    "MEASURES": "vitrail.metrics",
    "SparseCoder": "vitrail.coders",
    "Store": "vitrail.store",
    "Terminal": "vitrail.progress",
    "TrainConfig": "vitrail.training",
    "build_index": "vitrail.index",
    "encode": "vitrail.codes",
    "extract": "vitrail.store",
    "first_look": "vitrail.studies.first_look",
    "load": "vitrail.backbones",
    "load_coder": "vitrail.coders",
    "make_coder": "vitrail.coders",
    "open_foreign": "vitrail.foreign",
    "open_images": "vitrail.images",
    "prisma_table": "vitrail.studies.prisma_table",
    "save_coder": "vitrail.coders",
    "train": "vitrail.training",
    "write_report": "vitrail.studies.report",
}

__all__ = [
    "CODERS",
    "MEASURES",
    "ActivationStream",
    "Backbone",
    "CodeStore",
    "Codes",
    "Index",
    "SparseCoder",
    "Store",
    "Terminal",
    "TrainConfig",
    "__version__",
    "build_index",
    "encode",
    "extract",
    "first_look",
    "load",
    "load_coder",
    "make_coder",
    "open_foreign",
    "open_images",
    "prisma_table",
    "save_coder",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}.")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
