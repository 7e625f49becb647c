"""Many coders, one pass: a grid of coders trained in step over one reading of the rows.

    OUT/sweep.json                       the declared grid and its cells
    OUT/<name>/                          one coder, in the bits and files of `train` on it alone
    OUT/results.jsonl  OUT/results.csv   a row per coder

Every batch is read, moved and cut once, and normalised once for all coders that normalise alike; so are the rows for
the starting points and those held out. What a coder makes of them is its own: its optimiser, log, checkpoints and
random numbers. Killed at any moment, the same call goes on: a coder whose last checkpoint is of a later step waits for
the others. A coder whose loss is no longer finite is stopped and reported, and the others go on.
"""

import csv
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.coders import SparseCoder
from vitrail.files import json_digest, read_json, replacing, write_json
from vitrail.memory import reused_memory
from vitrail.progress import SILENT, Progress
from vitrail.training.config import TrainConfig, check_same_request
from vitrail.training.grid import Cell, Grid
from vitrail.training.loop import TrainResult, _Run
from vitrail.training.shared import Batches, HeldOut, SharedNormalization, SharedReading
from vitrail.training.source import Source

FORMAT = "vitrail-sweep"
VERSION = 1


@dataclass(frozen=True)
class SweepResult:
    """`rows`: as in results.jsonl, this grid's cells in order. `stopped`: what ended coders early, by name."""

    path: Path
    rows: list[dict[str, Any]]
    stopped: dict[str, str]


@reused_memory()
def sweep(
    grid: Grid,
    source: Source,
    out: Path | str,
    *,
    config: TrainConfig | None = None,
    held_out: Batches | None = None,
    metadata: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    workers: int = 1,
    progress: Progress = SILENT,
) -> SweepResult:
    """Train every coder of the grid in step, or what is left to train of it.

    `config`: the grid's cells replace its lr and seed. `held_out`: raw activations for inference thresholds, as in
    `train`, and for the table's held-out columns. `workers` coders are stepped at the same time, each with its share of
    torch's threads; bits are those of `train` with as many threads. Raises ValueError if a folder of OUT holds a coder
    that was asked something else; coders that OUT has beyond this grid stay.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    config = config or TrainConfig()
    cells = grid.cells(source.d_in)
    running = _Sweep(cells, source, Path(out), config, held_out, dict(metadata or {}), torch.device(device), workers)
    try:
        running.take_stock()
        _declare(Path(out), grid, cells, source)
        running.train(progress)
        running.finish(progress)
    finally:
        running.close()
    return running.result()


class _Member(_Run):
    """One coder's run, handed its batches. Its seconds are those spent on it; its random numbers are its own."""

    busy: float = 0.0
    since: float | None = None
    position: dict[str, Any]  # of the source, where this run stands
    rng: Tensor

    @property
    def ended(self) -> bool:
        """Also where it stopped early, of its own."""
        return self.rows >= self.total or getattr(self, "stopped", None) is not None

    @property
    def seconds(self) -> float:
        return self.seconds_before + self.busy + (0.0 if self.since is None else time.monotonic() - self.since)

    def step_on(self, x: Float[Tensor, "n d_in"]) -> FloatingPointError | None:
        with self.counted():
            try:
                self.train_on(x)
            except FloatingPointError as error:
                return error
        return None

    def close_records(self) -> None:
        """What `finish` closes, where a run does not come to it."""
        records = getattr(self, "records", None)  # there is none before `begin`
        if records is not None:
            records.close()

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.busy, self.since = self.seconds - self.seconds_before, None


class _Sweep:
    """The state of one sweep. In `members`: the coders still to be trained."""

    def __init__(
        self,
        cells: list[Cell],
        source: Source,
        out: Path,
        config: TrainConfig,
        held_out: Batches | None,
        metadata: dict[str, Any],
        device: torch.device,
        workers: int,
    ) -> None:
        self.cells = {cell.name: cell for cell in cells}
        self.reading, self.out, self.config, self.metadata = SharedReading(source), out, config, metadata
        self.held_out = None if held_out is None else HeldOut(held_out, device)
        self.device, self.workers = device, workers
        self.table, self.normal = _Table(out, list(self.cells)), SharedNormalization()
        self.members: dict[str, _Member] = {}
        self.finished: dict[str, TrainResult] = {}
        self.stopped: dict[str, str] = {}

    def _run(self, cell: Cell) -> _Member:
        coder = cell.coder(self.reading.d_in).to(self.device)
        config = replace(self.config, lr=cell.lr, seed=cell.seed)
        return _Member(coder, self.reading, self.out / cell.name, config, self.metadata)

    # -- beginning

    def take_stock(self) -> None:
        """What is finished, what was stopped, and everything else at its last checkpoint. Nothing is trained yet."""
        start = self.reading.state_dict()
        with torch.random.fork_rng(devices=[]), self.reading.remembering():
            for name, cell in self.cells.items():
                run, stopped = self._run(cell), self.out / name / "stopped.json"
                if (run.out / "coder.json").is_file():
                    self._take_finished(name, run)
                elif stopped.is_file():
                    found = read_json(stopped, "report of a stopped coder")
                    check_same_request(found["request"], run.request, run.out)
                    self.stopped[name] = found["error"]
                else:
                    self.reading.load_state_dict(start)
                    with run.counted():
                        run.begin()
                    run.position, run.rng = self.reading.state_dict(), torch.get_rng_state()
                    self.members[name] = run
        self.reading.load_state_dict(start)

    def _take_finished(self, name: str, run: _Member) -> None:
        result = run.finished_before()
        if not self.table.has(name, self._measured_on(name)):
            self.finished[name] = result

    # -- training

    def train(self, progress: Progress) -> None:
        if not self.members:
            return
        last = min(self.members.values(), key=lambda run: run.rows)
        self.reading.load_state_dict(last.position)
        title, total, rows = f"training {len(self.members)} coders", last.total, last.rows
        with (
            self.normal.of(run.coder.normalize for run in self.members.values()),
            torch.random.fork_rng(devices=[]),
            self._pool() as pool,
            progress.task(title, total=total, unit="rows", done=rows) as task,
        ):
            for x in self.reading.batches(rows, total, self.device):
                # A coder whose checkpoint is of a later step waits here until the others have come to it.
                self._step([name for name, run in self.members.items() if run.rows == rows and not run.ended], x, pool)
                rows += len(x)
                task.advance(len(x), self._note())
                if all(run.ended for run in self.members.values()):
                    break

    @contextmanager
    def _pool(self) -> Iterator[ThreadPoolExecutor]:
        """`workers` threads that share torch's."""
        threads = torch.get_num_threads()
        each = max(1, threads // self.workers)
        try:
            with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(each,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(threads)

    def _step(self, names: list[str], x: Float[Tensor, "n d_in"], pool: ThreadPoolExecutor) -> None:
        self.normal.prepare(x.chunk(getattr(self.config, "accumulate", 1)))
        runs = {name: self.members[name] for name in names}
        # torch's random numbers are one stream for all threads. So where several coders step at a time none may draw,
        # and the steps that write checkpoints, with the stream's state in them, are made one by one.
        saves = any((run.step + 1) % run.config.checkpoint_every == 0 for run in runs.values())
        if self.workers == 1 or saves:
            errors = {name: self._step_alone(run, x, pool) for name, run in runs.items()}
        else:
            before = torch.get_rng_state()
            widest_first = sorted(runs, key=lambda name: -runs[name].coder.d_sae)
            made = {name: pool.submit(runs[name].step_on, x) for name in widest_first}
            errors = {name: future.result() for name, future in made.items()}
            if not torch.equal(before, torch.get_rng_state()):
                raise RuntimeError(
                    "a coder drew random numbers in a step, so coders stepped at the same time would not come out the "
                    "same twice. Run the same again with workers=1; it goes on from the last checkpoints."
                )
        for name, error in errors.items():
            runs[name].position = self.reading.state_dict()
            if error is not None:
                self._stop(name, str(error))

    def _step_alone(self, run: _Member, x: Tensor, pool: ThreadPoolExecutor) -> FloatingPointError | None:
        torch.set_rng_state(run.rng)
        error = run.step_on(x) if self.workers == 1 else pool.submit(run.step_on, x).result()
        run.rng = torch.get_rng_state()
        return error

    def _stop(self, name: str, error: str) -> None:
        run = self.members.pop(name)
        run.close_records()
        self.stopped[name] = error
        write_json(run.out / "stopped.json", {"error": error, "step": run.step, "request": run.request})

    def _note(self) -> str:
        fvu = {name: run.last["fvu"] for name, run in self.members.items() if run.last.get("fvu") is not None}
        stopped = f", {len(self.stopped)} stopped" if self.stopped else ""
        if not fvu:
            return stopped.removeprefix(", ")
        best, worst = min(fvu, key=fvu.__getitem__), max(fvu, key=fvu.__getitem__)
        return f"fvu {fvu[best]:.3f} ({best}) to {fvu[worst]:.3f} ({worst}){stopped}"

    # -- ending

    def finish(self, progress: Progress) -> None:
        """Inference thresholds, the coders' folders, and their rows of the table, each as soon as it is there."""
        names = [*self.finished, *self.members]
        with (
            self.normal.of(run.coder.normalize for run in self.members.values()),
            self.reading.remembering(),
            self._pool() as pool,
            progress.task("finishing", total=len(names), unit="coders") as task,
        ):
            if self.held_out is not None and names:
                self.normal.prepare(self.held_out.keep())
            for name in names:
                if name in self.members:
                    run = self.members[name]
                    self.reading.load_state_dict(run.position)
                    self.finished[name] = pool.submit(self._finish, run).result()
                self.table.put(self._row(name, self.finished[name]))
                for done in (self.finished, self.members):  # its weights and moments are no longer needed
                    done.pop(name, None)
                task.advance(1, name)
        for name, error in self.stopped.items():
            self.table.put(self._row_of_stopped(name, error))
        self.table.write()

    def close(self) -> None:
        self.reading.close()
        for run in self.members.values():
            run.close_records()

    def _finish(self, run: _Member) -> TrainResult:
        with run.counted():
            return run.finish(self.held_out)

    def _row(self, name: str, result: TrainResult) -> dict[str, Any]:
        coder, last = result.coder, result.last
        held_out = {} if self.held_out is None else self.held_out.measure(coder)
        return {
            **self._about(name, coder),
            "state": "finished",
            "stopped_early": getattr(result, "stopped", None),
            "steps": result.steps,
            "rows": result.rows,
            **{key: last.get(key) for key in ("fvu", "l0", "dead")},
            "held_out_fvu": held_out.get("fvu"),
            "held_out_l0": held_out.get("l0"),
            "held_out_rows": held_out.get("rows"),
            "seconds": round(result.seconds, 3),
            "converged": coder.calibration.get("converged"),
            "calibration": coder.calibration,
            "error": None,
            "measured_on": self._measured_on(name),
        }

    def _row_of_stopped(self, name: str, error: str) -> dict[str, Any]:
        coder = self.cells[name].coder(self.reading.d_in)
        return {**self._about(name, coder), "state": "stopped", "error": error}

    def _about(self, name: str, coder: SparseCoder) -> dict[str, Any]:
        own = {key: value for key, value in coder.config.items() if key not in ("d_in", "d_sae", "seed")}
        cell = self.cells[name]
        about = {"version": VERSION, "name": name, "architecture": cell.architecture}
        return {**about, "d_in": coder.d_in, "d_sae": coder.d_sae, **own, "lr": cell.lr, "seed": cell.seed}

    def _measured_on(self, name: str) -> str:
        """A row that says the same is not measured again. Held-out rows without an identity never are the same."""
        weights = read_json(self.out / name / "coder.json", "coder")["weights_sha256"]
        return json_digest([weights, "" if self.held_out is None else self.held_out.identity])

    def result(self) -> SweepResult:
        return SweepResult(self.out, [self.table.rows[name] for name in self.cells], dict(self.stopped))


def _declare(out: Path, grid: Grid, cells: list[Cell], source: Source) -> None:
    """sweep.json: the grid as asked last, and every cell that was ever asked for in this folder."""
    path = out / "sweep.json"
    before = read_json(path, "sweep")["cells"] if path.is_file() else {}
    declared = {cell.name: {key: value for key, value in asdict(cell).items() if key != "name"} for cell in cells}
    about = {"format": FORMAT, "version": VERSION, "grid": asdict(grid), "cells": {**before, **declared}}
    write_json(path, {**about, "d_in": source.d_in, "source": source.identity})


class _Table:
    """results.jsonl and results.csv, rewritten whole with every row that comes."""

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        self.out, self.names = out, names
        path = out / "results.jsonl"
        self.rows: dict[str, dict[str, Any]] = (
            {row["name"]: row for row in read_results(path)} if path.is_file() else {}
        )

    def has(self, name: str, measured_on: str) -> bool:
        return self.rows.get(name, {}).get("measured_on") == measured_on

    def put(self, row: dict[str, Any]) -> None:
        self.rows[row["name"]] = row
        self.write()

    def write(self) -> None:
        """This grid's coders in its order, then those of earlier grids."""
        order = [name for name in self.names if name in self.rows]
        rows = [self.rows[name] for name in [*order, *(name for name in self.rows if name not in order)]]
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        columns = dict.fromkeys(key for row in rows for key in row if key not in ("calibration", "measured_on"))
        sheet = io.StringIO()
        writer = csv.DictWriter(sheet, list(columns), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for name, content in (("results.jsonl", text), ("results.csv", sheet.getvalue())):
            with replacing(self.out / name) as temporary:
                temporary.write_text(content, encoding="utf-8")


def read_results(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a results.jsonl."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
