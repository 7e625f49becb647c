"""Training a sparse coder: Adam over a source of rows, checkpointed, resumable to the bit.

Which architecture it is, the loop never asks. Killed at any moment, the same call continues from the last checkpoint
and ends in the weights that an uninterrupted run gives. A finished run called again returns at once.

    out/  coder.json  weights.safetensors     the trained coder (vitrail.coders.load_coder)
          log.jsonl                           what training looked like (record.py): the same after any resume
          timing.jsonl                        step, rows, rows_per_s, memory_mb: as this machine was that day
          checkpoint-<step>/                  while it runs; removed at the end
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.coders import SparseCoder, Step, coder_metadata, load_coder, save_coder
from vitrail.memory import reused_memory
from vitrail.progress import SILENT, Progress
from vitrail.provenance import peak_memory_mb
from vitrail.training.adam import Adam
from vitrail.training.averaging import Average
from vitrail.training.checkpoint import (
    load_optimizer,
    optimizer_tensors,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)
from vitrail.training.config import TrainConfig, check_same_request
from vitrail.training.draws import generator
from vitrail.training.early_stop import reason_to_stop
from vitrail.training.objective import backward
from vitrail.training.record import Meter, measured, note
from vitrail.training.revive import REVIVERS, DeadCounter
from vitrail.training.schedule import learning_rate, penalty_factor
from vitrail.training.source import Source, first_rows
from vitrail.training.watch import Records

ROWS_FOR_FIT = 4096  # from the front of the source, for data-dependent starting points


@dataclass(frozen=True)
class TrainResult:
    """`last` is the last line of the log; `resumed_at` the step a checkpoint was taken up at, 0 for a fresh run;
    `stopped` why it ended before its rows did, if it did.
    """

    coder: SparseCoder
    path: Path
    steps: int
    rows: int
    last: dict[str, Any]
    resumed_at: int
    seconds: float
    stopped: str | None = None


@reused_memory()
def train(
    coder: SparseCoder,
    source: Source,
    out: Path | str,
    *,
    config: TrainConfig | None = None,
    held_out: Iterable[Float[Tensor, "_ d_in"]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train `coder` in place and leave it, in eval mode, in `out`.

    `held_out`: batches of raw activations on which the inference threshold is estimated (BatchTopK); None: the next
    `config.calibration_rows` rows of the source, which the saved metadata then calls "training" rows. `metadata` is
    kept beside the weights: hook point, tokens, backbone, store digest.
    """
    run = _Run(coder, source, Path(out), config or TrainConfig(), dict(metadata or {}))
    if (run.out / "coder.json").is_file():
        return run.finished_before()
    with torch.random.fork_rng(devices=[]):
        run.begin()
        try:
            with progress.task(f"training {coder.name}", total=run.total, unit="rows", done=run.rows) as task:
                for x in run.batches():
                    run.train_on(x)
                    task.advance(len(x), run.note)
        finally:
            run.records.close()
    return run.finish(held_out)


class _Run:
    """The state of one training run: what a checkpoint holds."""

    records: Records  # from `begin` on

    def __init__(
        self, coder: SparseCoder, source: Source, out: Path, config: TrainConfig, metadata: dict[str, Any]
    ) -> None:
        if source.d_in != coder.d_row:
            raise ValueError(f"the source's rows have d_in={source.d_in}, the coder takes d_in={coder.d_row}.")
        self.coder, self.source, self.out, self.config, self.metadata = coder, source, out, config, metadata
        self.total = config.total_rows(source.n_rows)
        request = {
            "architecture": coder.name,
            "coder": coder.config,
            "config": asdict(config),
            "source": {"identity": source.identity, "rows_in_all": self.total},
        }
        self.request = json.loads(json.dumps(request))  # as it will be read back: tuples are lists
        self.parameters = [parameter for parameter in coder.parameters() if parameter.requires_grad]
        self.device = coder.W_dec.device
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = Adam(self.parameters, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        self.dead = DeadCounter(coder.d_sae, window=config.dead_window_rows, device=self.device)
        self.meter = Meter(coder.d_sae, device=self.device)
        self.average = None if config.average_decay is None else Average(coder, decay=config.average_decay)
        self.step, self.rows, self.resumed_at, self.note = 0, 0, 0, ""
        self.stopped: str | None = None
        self.last: dict[str, Any] = {}
        self.seconds_before, self.began = 0.0, time.monotonic()

    # -- beginning

    def begin(self) -> None:
        """From the last checkpoint if there is one, else from the coder as given."""
        torch.manual_seed(self.config.seed)
        found = read_checkpoint(self.out)
        if found is not None:
            self._resume(*found)
        elif not self.coder.is_fitted:
            self._fit()
        kept = None if found is None else found[0]["lengths"]
        self.records = Records(self.out, self.request, self.config.watch, step=self.step, rows=self.rows, kept=kept)
        self.coder.selection_dtype = self.config.selection_dtype
        self.coder.train()

    def _fit(self) -> None:
        position = self.source.state_dict()
        sample = torch.cat(list(first_rows(self.source, ROWS_FOR_FIT)))
        self.source.load_state_dict(position)
        self.coder.fit(self.source.stats, sample.to(self.device))

    def _resume(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        check_same_request(state["request"], self.request, self.out)
        self.step, self.rows, self.resumed_at = state["step"], state["rows"], state["step"]
        self.last, self.seconds_before = state["last"], state["seconds"]
        of_coder = {key: tensor for key, tensor in tensors.items() if key.startswith("coder/")}
        self.coder.load_state_dict({key.removeprefix("coder/"): tensor for key, tensor in of_coder.items()})
        load_optimizer(self.optimizer, tensors)
        self.dead.rows_since_fired.copy_(tensors["rows_since_fired"])
        self.meter.fired.copy_(tensors["fired_since_line"])
        self.meter.rows, self.meter.revived = state["since_line"]["rows"], state["since_line"]["revived"]
        if self.average is not None:
            self.average.load(tensors)
        torch.set_rng_state(tensors["rng"])
        self.source.load_state_dict(state["source_position"])

    # -- going on

    @property
    def finished(self) -> bool:
        return self.rows >= self.total or self.stopped is not None

    def batches(self) -> Iterator[Float[Tensor, "n d_row"]]:
        while not self.finished:
            rows_before = self.rows
            for x in self.source:
                yield x[: self.total - self.rows].to(self.device)
                if self.finished:
                    return
            if self.rows == rows_before:
                raise ValueError("the source gave no rows in a whole epoch: there is nothing to train on.")

    def train_on(self, x: Float[Tensor, "n d_row"]) -> None:
        """One step. Nothing, once the run has stopped early."""
        if self.stopped is not None:
            return
        config, share, self.step = self.config, self.rows / self.total, self.step + 1
        shape = {"warmup_steps": config.warmup_steps, "min_lr_share": config.min_lr_share}
        lr = learning_rate(config.lr, config.schedule, share=share, step=self.step, **shape)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        step = backward(
            self.coder,
            x,
            dead=self.dead.dead(),
            reviver=REVIVERS[config.revive],
            revival=config.revive,
            penalty_factor=penalty_factor(self.step, config.penalty_warmup_steps),
            accumulate=config.accumulate,
            check_loss=lambda loss: self._stop_unless_finite(loss, "loss"),
        )
        self.coder.constrain_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip or math.inf)
        self._stop_unless_finite(norm, "norm of the gradient")
        is_last = self.rows + len(x) >= self.total
        due = self.step == 1 or self.step % config.log_every == 0 or is_last
        seen = measured(self.coder, step) if due else None  # while the weights are those of the step
        self.optimizer.step()
        self.coder.constrain_weights()
        self.rows += len(x)
        self._after_step(step)
        if seen is not None:
            self._record(seen, lr, norm)
        if self.step % config.checkpoint_every == 0 and not self.finished:
            self._save()

    def _after_step(self, step: Step) -> None:
        fired = step.fired()
        self.dead.update(fired, len(step.y))
        self.meter.update(fired, len(step.y))
        if self.average is not None:
            self.average.update(self.step)
        if self.step % self.config.resample_every == 0 and not self.finished:
            reviver, draws = REVIVERS[self.config.revive], generator(self.config.seed, self.step)
            revived = reviver.after_step(self.coder, step, self.dead.dead(), self.optimizer, draws)
            self.dead.begin_anew(revived)
            self.meter.revived += len(revived)
            if self.average is not None:
                self.average.begin_anew(revived)

    def _record(self, seen: dict[str, Any], lr: float, grad_norm: Tensor) -> None:
        n_dead = int(self.dead.dead().sum())
        self.last = {"step": self.step, "rows": self.rows, **seen}
        self.last |= {"dead": n_dead, "dead_share": n_dead / self.coder.d_sae, **self.meter.read()}
        self.last |= {"lr": lr, "grad_norm": grad_norm.item()}
        self.stopped = reason_to_stop(self.config, self.last, self.rows / self.total)
        self.note = note(self.last)
        self.records.line(self.last, self.device)

    def _save(self) -> None:
        state = {
            "request": self.request,
            "rows": self.rows,
            "source_position": self.source.state_dict(),
            "lengths": self.records.lengths(),
            "since_line": {"rows": self.meter.rows, "revived": self.meter.revived},
            "last": self.last,
            "seconds": self.seconds,
        }
        tensors = {f"coder/{key}": tensor for key, tensor in self.coder.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors |= {} if self.average is None else self.average.tensors()
        tensors |= {"rows_since_fired": self.dead.rows_since_fired, "fired_since_line": self.meter.fired}
        tensors |= {"rng": torch.get_rng_state()}
        write_checkpoint(self.out, self.step, state, tensors)

    def _stop_unless_finite(self, value: Tensor, what: str) -> None:
        if not bool(value.isfinite()):
            raise FloatingPointError(
                f"the {what} is {value.item()} at step {self.step}, after {self.rows} rows. The last good checkpoint "
                f"in {self.out} is untouched. Look for activations that are not finite, or lower lr={self.config.lr} "
                f"in a new folder."
            )

    # -- ending

    def finish(self, held_out: Iterable[Float[Tensor, "_ d_in"]] | None) -> TrainResult:
        self.records.close()
        self.coder.selection_dtype = None
        if self.average is not None:
            self.average.put_into_coder()
        batches = first_rows(self.source, self.config.calibration_rows) if held_out is None else held_out
        estimated = self.coder.calibrate(x.to(self.device) for x in batches)
        if estimated:
            self.coder.calibration = {**estimated, "rows": "training" if held_out is None else "held_out"}
        self.coder.eval()
        ran = {"steps": self.step, "rows": self.rows, "last": self.last, "seconds": self.seconds}
        ran |= {"stopped": self.stopped}
        training = {"request": self.request, **ran, "peak_memory_mb": peak_memory_mb()}
        save_coder(self.out, self.coder, {**self.metadata, "training": training})
        remove_checkpoints(self.out)
        return self._result(ran)

    def finished_before(self) -> TrainResult:
        training = coder_metadata(self.out).get("training")
        if training is None:
            raise ValueError(f"{self.out} holds a coder that was not trained here. Choose a new folder.")
        check_same_request(training["request"], self.request, self.out)
        finished = load_coder(self.out)
        self.coder.load_state_dict(finished.state_dict())
        self.coder.calibration = finished.calibration
        self.coder.eval()
        remove_checkpoints(self.out)  # if it was killed between saving the coder and this
        return self._result(training)

    @property
    def seconds(self) -> float:
        """Of training, over all its sittings."""
        return self.seconds_before + time.monotonic() - self.began

    def _result(self, ran: dict[str, Any]) -> TrainResult:
        counted = {name: ran[name] for name in ("steps", "rows", "last", "seconds")}
        return TrainResult(
            coder=self.coder, path=self.out, resumed_at=self.resumed_at, stopped=ran.get("stopped"), **counted
        )
