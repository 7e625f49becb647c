"""Training sparse coders."""

from vitrail.train.config import TrainConfig
from vitrail.train.log import read_log
from vitrail.train.loop import TrainResult, train
from vitrail.train.revive import REVIVERS
from vitrail.train.schedule import SCHEDULES
from vitrail.train.source import Source, TensorSource

__all__ = [
    "REVIVERS",
    "SCHEDULES",
    "Source",
    "TensorSource",
    "TrainConfig",
    "TrainResult",
    "read_log",
    "train",
]
