"""Watching a run: log.jsonl and timing.jsonl always, and whichever other place was asked for.

A sink gets each line's numbers under flat names ("terms/l1"). What it shows is for the eye: after a resume it may hold
the steps between the checkpoint and the kill twice, where log.jsonl holds them once. Each package is imported when its
sink is opened.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from vitrail.files import json_digest
from vitrail.provenance import peak_memory_mb
from vitrail.training.log import Log


class Sink(Protocol):
    def line(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, out: Path, request: Mapping[str, Any], step: int) -> None:
        module = _imported("torch.utils.tensorboard", package="tensorboard")
        # purge_step hides what was written after the checkpoint.
        self._writer = module.SummaryWriter(log_dir=str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def line(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project "vitrail", one for each folder. W&B drops steps it has already seen."""

    def __init__(self, out: Path, request: Mapping[str, Any], step: int) -> None:
        module = _imported("wandb", package="wandb")
        self._run = module.init(
            project="vitrail", name=out.name, id=_name_of(out), resume="allow", dir=str(out), config=dict(request)
        )

    def line(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of the project "vitrail", one for each folder."""

    def __init__(self, out: Path, request: Mapping[str, Any], step: int) -> None:
        self._module = _imported("trackio", package="trackio")
        self._module.init(project="vitrail", name=_name_of(out), resume="allow", config=dict(request))

    def line(self, step: int, numbers: Mapping[str, float]) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()


SINKS: dict[str, Callable[[Path, Mapping[str, Any], int], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


class Records:
    """One run's log.jsonl, timing.jsonl and sinks."""

    def __init__(
        self,
        out: Path,
        request: Mapping[str, Any],
        watch: tuple[str, ...],
        *,
        step: int = 0,
        rows: int = 0,
        kept: Mapping[str, int] | None = None,
    ) -> None:
        """`kept`: the lengths of the files at the checkpoint of this step; what is longer is cut off."""
        kept = {} if kept is None else kept
        self._log = Log(out / "log.jsonl", keep_bytes=kept.get("log", 0))
        self._timing = Log(out / "timing.jsonl", keep_bytes=kept.get("timing", 0))
        self._sinks = [SINKS[name](out, request, step) for name in watch]
        self._timed_at, self._rows_timed = time.monotonic(), rows

    def line(self, line: Mapping[str, Any], device: torch.device) -> None:
        now, rows = time.monotonic(), line["rows"]
        rows_per_s = (rows - self._rows_timed) / max(now - self._timed_at, 1e-9)
        self._timed_at, self._rows_timed = now, rows
        timing = {"rows_per_s": rows_per_s, "memory_mb": memory_mb(device)}
        self._log.append(dict(line))
        self._timing.append({"step": line["step"], "rows": rows, **timing})
        for sink in self._sinks:
            sink.line(line["step"], flat({**line, **timing}))

    def lengths(self) -> dict[str, int]:
        """Of the files, once they are on the disk."""
        return {"log": self._log.flushed_bytes(), "timing": self._timing.flushed_bytes()}

    def close(self) -> None:
        """The sinks; once is enough."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()


def flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line, nested names joined by "/". Lists and what is null are left out."""
    numbers: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            numbers[prefix + name] = value
    return numbers


def memory_mb(device: torch.device) -> float:
    """The most that was held so far: of the GPU if the coder is on one, else of the process."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else peak_memory_mb()


def _name_of(out: Path) -> str:
    """Of this folder alone, so that a resumed training goes on in its run and another folder's `topk` does not."""
    return f"{out.name}-{json_digest(str(out.resolve()))[:8]}"


def _imported(module: str, *, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"watching with {package} needs the package {package}: pip install 'vitrail[{package}]'."
        ) from error
