"""Training a sparse coder: Adam over a source of rows, checkpointed, resumable to the bit.

Which architecture it is, the loop never asks. Killed at any moment, the same call continues from the last checkpoint
and ends in the weights that an uninterrupted run gives. A finished run called again returns at once.

    out/  coder.json  weights.safetensors     the trained coder (vitrail.coders.load_coder)
          log.jsonl                           step, rows, loss, terms, l0, fvu, dead, lr, grad_norm
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
from vitrail.coders.sparse import decode
from vitrail.progress import SILENT, Progress
from vitrail.provenance import peak_memory_mb
from vitrail.training.checkpoint import (
    load_optimizer,
    optimizer_tensors,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)
from vitrail.training.config import TrainConfig, check_same_request
from vitrail.training.log import Log
from vitrail.training.revive import REVIVERS, DeadCounter
from vitrail.training.schedule import learning_rate
from vitrail.training.source import Source

ROWS_FOR_FIT = 4096  # from the front of the source, for data-dependent starting points


@dataclass(frozen=True)
class TrainResult:
    """`last` is the last line of the log; `resumed_at` the step a checkpoint was taken up at, 0 for a fresh run."""

    coder: SparseCoder
    path: Path
    steps: int
    rows: int
    last: dict[str, Any]
    resumed_at: int
    seconds: float


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
        with progress.task(f"training {coder.name}", total=run.total, unit="rows", done=run.rows) as task:
            for x in run.batches():
                run.train_on(x)
                task.advance(len(x), run.note)
    return run.finish(held_out)


class _Run:
    """The state of one training run: what a checkpoint holds."""

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
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
        )
        self.dead = DeadCounter(coder.d_sae, window=config.dead_window_rows, device=self.device)
        self.step, self.rows, self.resumed_at, self.note = 0, 0, 0, ""
        self.last: dict[str, Any] = {}
        self.seconds_before, self.began = 0.0, time.monotonic()

    # -- beginning

    def begin(self) -> None:
        """From the last checkpoint if there is one, else from the coder as given."""
        torch.manual_seed(self.config.seed)
        found = read_checkpoint(self.out)
        if found is None:
            if not self.coder.is_fitted:
                self._fit()
            self.log = Log(self.out / "log.jsonl")
        else:
            self._resume(*found)
        self.coder.train()

    def _fit(self) -> None:
        position = self.source.state_dict()
        sample = torch.cat(list(_first_rows(self.source, ROWS_FOR_FIT)))
        self.source.load_state_dict(position)
        self.coder.fit(self.source.stats, sample.to(self.device))

    def _resume(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        check_same_request(state["request"], self.request, self.out)
        self.step, self.rows, self.resumed_at = state["step"], state["rows"], state["step"]
        self.last, self.seconds_before = state["last"], state["seconds"]
        self.coder.load_state_dict(
            {key.removeprefix("coder/"): tensor for key, tensor in tensors.items() if key.startswith("coder/")}
        )
        load_optimizer(self.optimizer, tensors)
        self.dead.rows_since_fired.copy_(tensors["rows_since_fired"])
        torch.set_rng_state(tensors["rng"])
        self.source.load_state_dict(state["source_position"])
        self.log = Log(self.out / "log.jsonl", keep_bytes=state["log_bytes"])

    # -- going on

    def batches(self) -> Iterator[Float[Tensor, "n d_in"]]:
        while self.rows < self.total:
            rows_before = self.rows
            for x in self.source:
                yield x[: self.total - self.rows].to(self.device)
                if self.rows >= self.total:
                    return
            if self.rows == rows_before:
                raise ValueError("the source gave no rows in a whole epoch: there is nothing to train on.")

    def train_on(self, x: Float[Tensor, "n d_in"]) -> None:
        share, self.step = self.rows / self.total, self.step + 1
        lr = learning_rate(
            self.config.lr, self.config.schedule, share=share, step=self.step, warmup_steps=self.config.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        step = self.coder.loss(x)
        step.terms[self.config.revive] = REVIVERS[self.config.revive](self.coder, step, self.dead.dead())
        loss = step.loss + step.terms[self.config.revive]
        self._stop_unless_finite(loss, "loss")
        self.optimizer.zero_grad()
        loss.backward()
        self.coder.constrain_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf)
        self._stop_unless_finite(norm, "norm of the gradient")
        self.optimizer.step()
        self.coder.constrain_weights()
        self.rows += len(x)
        self.dead.update(step.codes.fired(), len(x))
        finished = self.rows >= self.total
        if self.step == 1 or self.step % self.config.log_every == 0 or finished:
            self._record(step, loss, lr, norm)
        if self.step % self.config.checkpoint_every == 0 and not finished:
            self._save()

    @torch.no_grad()
    def _record(self, step: Step, loss: Tensor, lr: float, grad_norm: Tensor) -> None:
        spread = (step.target - step.target.mean(0)).square().sum()
        # What these codes reconstruct, so that fvu and l0 speak of the same latents: a Matryoshka step's x_hat is that
        # of its largest level.
        error = step.target - decode(step.codes, self.coder.W_dec) - self.coder.output_bias()
        self.last = {
            "step": self.step,
            "rows": self.rows,
            "loss": loss.item(),
            "terms": {name: term.item() for name, term in step.terms.items()},
            "l0": step.codes.nnz / step.codes.n,
            # of this batch, about the batch's mean; null where the batch has no spread
            "fvu": error.square().sum().item() / spread.item() if spread > 0 else None,
            "dead": int(self.dead.dead().sum()),
            "lr": lr,
            "grad_norm": grad_norm.item(),
        }
        self.log.append(self.last)
        fvu = "" if self.last["fvu"] is None else f" fvu {self.last['fvu']:.3f}"
        self.note = f"loss {self.last['loss']:.4g}{fvu} l0 {self.last['l0']:.1f} dead {self.last['dead']}"

    def _save(self) -> None:
        state = {
            "request": self.request,
            "rows": self.rows,
            "source_position": self.source.state_dict(),
            "log_bytes": self.log.flushed_bytes(),
            "last": self.last,
            "seconds": self.seconds,
        }
        tensors = {f"coder/{key}": tensor for key, tensor in self.coder.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors |= {"rows_since_fired": self.dead.rows_since_fired, "rng": torch.get_rng_state()}
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
        batches = _first_rows(self.source, self.config.calibration_rows) if held_out is None else held_out
        estimated = self.coder.calibrate(x.to(self.device) for x in batches)
        if estimated:
            self.coder.calibration = {**estimated, "rows": "training" if held_out is None else "held_out"}
        self.coder.eval()
        ran = {"steps": self.step, "rows": self.rows, "last": self.last, "seconds": self.seconds}
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
        return TrainResult(
            coder=self.coder,
            path=self.out,
            steps=ran["steps"],
            rows=ran["rows"],
            last=ran["last"],
            resumed_at=self.resumed_at,
            seconds=ran["seconds"],
        )


def _first_rows(source: Source, n_rows: int) -> Iterator[Float[Tensor, "_ d_in"]]:
    """Whole batches from where the source stands, until n_rows or as many as an epoch has."""
    wanted = n_rows if source.n_rows is None else min(n_rows, source.n_rows)
    seen, seen_before = 0, -1
    while seen_before < seen < wanted:
        seen_before = seen
        for x in source:
            yield x
            seen += len(x)
            if seen >= wanted:
                return
