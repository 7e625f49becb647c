"""Training sparse coders."""

from vitrail.training.config import TrainConfig
from vitrail.training.grid import Grid
from vitrail.training.log import read_log
from vitrail.training.loop import TrainResult, train
from vitrail.training.planted import Planted, PlantedSource
from vitrail.training.revive import REVIVERS
from vitrail.training.schedule import SCHEDULES
from vitrail.training.source import MixedSource, Source, TensorSource
from vitrail.training.sweep import SweepResult, sweep

__all__ = [
    "REVIVERS",
    "SCHEDULES",
    "Grid",
    "MixedSource",
    "Planted",
    "PlantedSource",
    "Source",
    "SweepResult",
    "TensorSource",
    "TrainConfig",
    "TrainResult",
    "read_log",
    "sweep",
    "train",
]
