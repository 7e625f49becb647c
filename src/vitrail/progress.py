"""Long work shows how far it is, how fast it goes and how long is left.

On a terminal: one live line. Elsewhere (a log file, CI): a plain line every few seconds. Library code takes a
`Progress` and never prints by itself; `SILENT` is the default.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from io import TextIOBase
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


@runtime_checkable
class Task(Protocol):
    def advance(self, n: float, note: str = "") -> None: ...


@runtime_checkable
class Progress(Protocol):
    def task(self, title: str, total: float | None, unit: str, done: float = 0) -> AbstractContextManager[Task]: ...


class _SilentTask:
    def advance(self, n: float, note: str = "") -> None:
        pass


class Silent:
    @contextmanager
    def task(self, title: str, total: float | None, unit: str, done: float = 0) -> Iterator[Task]:
        yield _SilentTask()


SILENT: Progress = Silent()


class _Rate:
    """Units per second since the task began in this process; work done before a resume does not count."""

    def __init__(self, total: float | None, unit: str, done: float) -> None:
        self.total, self.unit, self.done = total, unit, done
        self._done_before, self._began = done, time.monotonic()

    def text(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self.done - self._done_before) / seconds
        return f"{_si(rate)} {self.unit}/s"

    def left(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self.done - self._done_before) / seconds
        if self.total is None or rate <= 0:
            return ""
        return f"{_clock((self.total - self.done) / rate)} left"


class _LiveTask(_Rate):
    def __init__(self, bar: RichProgress, title: str, total: float | None, unit: str, done: float) -> None:
        super().__init__(total, unit, done)
        self._bar = bar
        self._id = bar.add_task(title, total=total, completed=int(done), rate="", note="")

    def advance(self, n: float, note: str = "") -> None:
        self.done += n
        self._bar.update(self._id, completed=int(self.done), rate=self.text(), note=note)


class _PlainTask(_Rate):
    def __init__(self, out: Any, every_s: float, title: str, total: float | None, unit: str, done: float) -> None:
        super().__init__(total, unit, done)
        self._out, self._every_s, self._title = out, every_s, title
        self._last = time.monotonic()

    def advance(self, n: float, note: str = "") -> None:
        self.done += n
        finished = self.total is not None and self.done >= self.total
        if finished or time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            of = f"/{_si(self.total)}" if self.total is not None else ""
            parts = [
                f"{self._title}: {_si(self.done)}{of} {self.unit}",
                self.text(),
                "" if finished else self.left(),
                note,
            ]
            print("  " + ", ".join(part for part in parts if part), file=self._out, flush=True)


class Terminal:
    """Live lines on a terminal, plain lines elsewhere. Written to stderr, so that stdout carries only results."""

    def __init__(self, out: TextIOBase | None = None, every_s: float = 5.0) -> None:
        self._out: Any = out or sys.stderr
        self._every_s = every_s

    @contextmanager
    def task(self, title: str, total: float | None, unit: str, done: float = 0) -> Iterator[Task]:
        if not self._out.isatty():
            yield _PlainTask(self._out, self._every_s, title, total, unit, done)
            return
        columns = [
            TextColumn("  {task.description:<28}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        ]
        with RichProgress(*columns, console=Console(file=self._out)) as bar:
            yield _LiveTask(bar, title, total, unit, done)


def _si(value: float) -> str:
    for bound, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= bound:
            return f"{value / (1e3 if suffix == 'k' else bound):.1f}{suffix}"
    return f"{value:.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.1f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
