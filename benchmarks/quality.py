"""What vitrail's training reaches against the peers' own, on the same real activations, rows, order and seeds.

    pip install --no-deps eai-sparsify sae-lens dictionary-learning overcomplete natsort simple-parsing schedulefree
    vitrail extract IMAGES STORE --backbone BACKBONE --points POINT --tokens spatial
    python benchmarks/quality.py STORE --out FOLDER            trains what FOLDER lacks, then prints the tables

Rows: the store's, centred and divided by one number so that E||x||^2 = d_in over the training images; the last tenth of
the images (which lie in random order) is held out. Everyone reads the same batches in the same order. A peer is trained
by its package's own training code (trainSAE, SAETrainer, Trainer, train_sae) with its defaults for start, loss,
optimiser, clipping, revival and schedule; numbers of steps meant for long runs (warm-ups, the start of a threshold, the
window of a dead latent) shrink in proportion in runs of fewer than 10,000 steps, as vitrail's warm-up does. Schedules
differ (vitrail's falls along a cosine, most peers' is constant), so that one learning rate for all would compare
schedules: on the first seed everyone is trained at each of --lrs, on the others at its own best. Then one function here
measures all of them on the held-out rows:

    FVU       sum ||x - x_hat||^2 / sum ||x - mean||^2 of what the contender's own inference returns
    L0, dead  of its codes there: active latents per row, share of latents that fire in no row
    FVU at k  the same with the mean L0 brought to k: in each chunk of rows the n*k entries with the largest
              activation / threshold are kept (one threshold for BatchTopK, one a latent for JumpReLU). TopK: its own.

A JumpReLU that takes a coefficient and no target is run with several on the first seed until its L0 is near k; the
other seeds use the nearest. One cell is one process and one JSON file: kill it at any time and start it again.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

HELD_OUT = 0.1  # of the images
LONG_RUN = 10_000  # steps; in shorter runs a peer's numbers of steps shrink in proportion
MEASURED_AT_ONCE = 2560  # rows
NEAR = 0.15  # an L0 this share of k away from k ends the search for a coefficient
MOST_COEFFICIENTS = 5
BANDWIDTH = 0.05  # of vitrail's JumpReLU, where the rows' root mean square is 1


@dataclass(frozen=True)
class Job:
    """What all contenders are asked."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int
    lr: float
    seed: int
    coefficient: float | None = None

    def scaled(self, steps: int) -> int:
        """A peer's default number of steps, in a run as short as this."""
        return min(steps, max(1, steps * self.steps // LONG_RUN))


@dataclass(frozen=True)
class Trained:
    """A contender in use. `thresholds`: what an activation must exceed; None where the k of each row are kept."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    activations: Callable[[Tensor], Tensor]
    thresholds: Tensor | None = None


class Batches:
    """The rows of a run, batch by batch, as often as they are asked for."""

    def __init__(self, x: Float[Tensor, "n d_in"], order: list[Int[Tensor, " b"]]) -> None:
        self.x, self.order = x, order

    def __iter__(self) -> Iterator[Float[Tensor, "b d_in"]]:
        return (self.x[rows] for rows in self.order)


Train = Callable[[Batches, Job], Trained]
Cells = dict[tuple[str, str], list[dict[str, Any]]]


# -- vitrail


def vitrail(batches: Batches, job: Job, *, architecture: str) -> Trained:
    from vitrail.coders import make_coder
    from vitrail.training import TensorSource, TrainConfig, train

    of_jump_relu = {"target_l0": float(job.k), "bandwidth": BANDWIDTH}
    arguments = of_jump_relu if architecture == "jump_relu" else {"k": job.k}
    coder: Any = make_coder(architecture, d_in=job.d_in, d_sae=job.d_sae, seed=job.seed, **arguments)
    source = TensorSource(batches.x, batch_size=job.batch, seed=job.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(n_rows=job.steps * job.batch, lr=job.lr, seed=job.seed)
        train(coder, cast("Any", source), folder, config=config)
    thresholds = {"topk": lambda: None, "batch_topk": lambda: coder.threshold.expand(job.d_sae)}
    thresholds["jump_relu"] = lambda: coder.log_threshold.exp()
    return Trained(
        coder.encode,
        coder.decode,
        lambda x: coder.pre_activations(coder.normalized(x)).relu(),
        thresholds[architecture](),
    )


# -- peers


def dictionary_learning(batches: Batches, job: Job, *, architecture: str) -> Trained:
    """`trainSAE` with normalize_activations, which brings E||x||^2 to one in training and back at the end."""
    from dictionary_learning.training import trainSAE  # pyright: ignore[reportMissingImports]

    name, module = {
        "topk": ("TopKTrainer", "top_k"),
        "batch_topk": ("BatchTopKTrainer", "batch_top_k"),
        "jump_relu": ("JumpReluTrainer", "jumprelu"),
    }[architecture]
    trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)
    of_jump_relu = {"target_l0": float(job.k), "sparsity_warmup_steps": job.scaled(2000)}
    arguments = of_jump_relu if architecture == "jump_relu" else {"k": job.k, "threshold_start_step": job.scaled(1000)}
    made: list[Any] = []

    def make(**config: Any) -> Any:
        made.append(trainer(**config))
        return made[-1]

    config = {
        "trainer": make,
        "steps": job.steps,
        "activation_dim": job.d_in,
        "dict_size": job.d_sae,
        "layer": 0,
        "lm_name": "rows",
        "lr": job.lr,
        "warmup_steps": job.scaled(1000),
        "seed": job.seed,
        "device": "cpu",
        **arguments,
    }
    trainSAE(batches, [config], steps=job.steps, normalize_activations=True, device="cpu")
    sae = made[0].ae
    if architecture == "jump_relu":
        return Trained(sae.encode, sae.decode, lambda x: (x @ sae.W_enc + sae.b_enc).relu(), sae.threshold)
    thresholds = None if architecture == "topk" else sae.threshold.expand(job.d_sae)
    return Trained(sae.encode, sae.decode, lambda x: sae.encoder(x - sae.b_dec).relu(), thresholds)


def sae_lens(batches: Batches, job: Job, *, architecture: str, **arguments: Any) -> Trained:
    """`SAETrainer.fit`, then what `save_inference_model` writes."""
    from sae_lens import saes  # pyright: ignore[reportMissingImports]
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    name = {"topk": "TopK", "batch_topk": "BatchTopK", "jump_relu": "JumpReLU"}[architecture]
    if architecture != "jump_relu":
        arguments = {"k": job.k}
    elif job.coefficient is not None:
        arguments = {"l0_coefficient": job.coefficient}
    else:
        arguments = {"target_l0": float(job.k), **arguments}
    config = getattr(saes, f"{name}TrainingSAEConfig")(d_in=job.d_in, d_sae=job.d_sae, **arguments)
    training = SAETrainerConfig(
        total_training_samples=job.steps * job.batch,
        train_batch_size_samples=job.batch,
        lr=job.lr,
        lr_end=job.lr / 10,  # the runner's default; a constant schedule does not use it
        dead_feature_window=job.scaled(1000),
    )
    made = SAETrainer(training, getattr(saes, f"{name}TrainingSAE")(config), iter(batches)).fit()
    with tempfile.TemporaryDirectory() as folder:
        made.save_inference_model(folder)
        sae = saes.SAE.load_from_disk(folder)
    thresholds = None if architecture == "topk" else sae.threshold
    return Trained(sae.encode, sae.decode, lambda x: (sae.process_sae_in(x) @ sae.W_enc + sae.b_enc).relu(), thresholds)


class Rows(torch.nn.Module):
    """A model for sparsify's `Trainer`: its one layer gives the rows that its input ids name."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.rows = torch.nn.Embedding.from_pretrained(x)
        self.device, self.dummy_inputs = torch.device("cpu"), {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> "Rows":
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows(input_ids)


def sparsify(batches: Batches, job: Job, *, optimizer: str) -> Trained:
    """`Trainer.fit`. With its default, signum, at its own default rate; with adam at the rate given."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # there is no GPU
    import accelerate.utils  # pyright: ignore[reportMissingImports]

    accelerate.utils.send_to_device = lambda values, device: values
    package: Any = importlib.import_module("sparsify")

    dataset: Any = [{"input_ids": row[None]} for rows in batches.order for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        config = package.TrainConfig(
            package.SparseCoderConfig(num_latents=job.d_sae, k=job.k),
            batch_size=job.batch,
            optimizer=optimizer,
            lr=job.lr if optimizer == "adam" else None,
            lr_warmup_steps=job.scaled(1000),
            hookpoints=["rows"],
            init_seeds=[job.seed],
            log_to_wandb=False,
            save_dir=folder,
            run_name="run",
        )
        package.Trainer(config, dataset, Rows(batches.x)).fit()
        sae = package.SparseCoder.load_from_disk(f"{folder}/run/rows")

    def encode(x: Tensor) -> Tensor:
        values, indices, pre = sae.encode(x)
        return torch.zeros_like(pre).scatter(1, indices, values)

    return Trained(encode, lambda z: z @ sae.W_dec + sae.b_dec, lambda x: sae.encoder(x - sae.b_dec).relu())


def overcomplete(batches: Batches, job: Job, *, architecture: str) -> Trained:
    """`train_sae` with the mean squared error, as its README has it; JumpSAE with its paper's L0 penalty beside it."""
    import matplotlib
    import matplotlib.cm

    setattr(matplotlib.cm, "get_cmap", matplotlib.colormaps.get_cmap)  # noqa: B010  its pictures ask for what is gone
    module: Any = importlib.import_module("overcomplete.sae")

    if architecture == "jump_relu":
        sae = module.JumpSAE(job.d_in, nb_concepts=job.d_sae, device="cpu")
    else:
        made = {"topk": (module.TopKSAE, job.k), "batch_topk": (module.BatchTopKSAE, job.k * job.batch)}
        kind, top_k = made[architecture]
        sae = kind(job.d_in, nb_concepts=job.d_sae, top_k=top_k, device="cpu")

    def criterion(x: Tensor, x_hat: Tensor, pre: Tensor, z: Tensor, dictionary: Tensor) -> Tensor:
        error = (x - x_hat).square().mean()
        if job.coefficient is None:
            return error
        fired = module.heaviside(pre.relu(), sae.thresholds.exp(), sae.kernel_fn, sae.bandwidth)
        return error + job.coefficient * fired.sum(1).mean() / job.d_in

    optimizer = torch.optim.Adam(sae.parameters(), lr=job.lr)
    module.train_sae(sae, batches, criterion, optimizer, nb_epochs=1, monitoring=0)
    sae.eval()
    thresholds = {"topk": lambda: None, "batch_topk": lambda: sae.running_threshold.expand(job.d_sae)}
    thresholds["jump_relu"] = lambda: sae.thresholds.exp()
    return Trained(
        lambda x: sae.encode(x)[1], sae.decode, lambda x: sae.encoder(x)[0].relu(), thresholds[architecture]()
    )


ARCHITECTURES = ("topk", "batch_topk", "jump_relu")
CONTENDERS: dict[str, dict[str, Train]] = {
    architecture: {
        who.__name__: partial(who, architecture=architecture)
        for who in (vitrail, dictionary_learning, sae_lens, overcomplete)
    }
    for architecture in ARCHITECTURES
}
CONTENDERS["topk"]["sparsify (adam)"] = partial(sparsify, optimizer="adam")
CONTENDERS["topk"]["sparsify (signum)"] = partial(sparsify, optimizer="signum")
CONTENDERS["jump_relu"]["sae_lens (quadratic)"] = partial(
    sae_lens, architecture="jump_relu", jumprelu_sparsity_loss_mode="quadratic"
)
OWN_RATE = ("topk", "sparsify (signum)")  # takes its default learning rate
# Where the search for a coefficient begins, of those that have no target.
FIRST_COEFFICIENT = {("jump_relu", "sae_lens"): 1.0, ("jump_relu", "overcomplete"): 1.0}


# -- what is measured


@torch.no_grad()
def measure(trained: Trained, held_out: Float[Tensor, "n d_in"], k: int) -> dict[str, float]:
    """FVU, L0 and dead share of a contender's own inference, and its FVU at an L0 of k."""
    mean = held_out.double().mean(0)
    total = error = error_at_k = entries = entries_at_k = 0.0
    fired: Tensor | None = None
    for x in held_out.split(MEASURED_AT_ONCE):
        z = trained.encode(x)
        total += float((x.double() - mean).square().sum())
        error += float((x.double() - trained.decode(z).double()).square().sum())
        entries += float((z > 0).sum())
        fired = (z > 0).any(0) if fired is None else fired | (z > 0).any(0)
        if trained.thresholds is not None:
            z = largest(trained.activations(x), trained.thresholds, k)
        error_at_k += float((x.double() - trained.decode(z).double()).square().sum())
        entries_at_k += float((z > 0).sum())
    assert fired is not None
    return {
        "fvu": error / total,
        "l0": entries / len(held_out),
        "fvu_at_k": error_at_k / total,
        "l0_at_k": entries_at_k / len(held_out),
        "dead": 1 - float(fired.double().mean()),
    }


def largest(
    activations: Float[Tensor, "n d_sae"], thresholds: Float[Tensor, " d_sae"], k: int
) -> Float[Tensor, "n d_sae"]:
    """The n*k entries whose activation is the largest multiple of its latent's threshold; zero elsewhere."""
    margin = (activations / thresholds.clamp_min(1e-12)).flatten()
    kept = margin.topk(min(len(activations) * k, len(margin)), sorted=False).indices
    z = torch.zeros_like(margin).index_copy(0, kept, activations.flatten()[kept])
    return z.view_as(activations)


def orders(n_rows: int, batch: int, steps: int, seed: int) -> list[Int[Tensor, " b"]]:
    """The rows of each batch as vitrail's TensorSource draws them."""
    from vitrail.training import TensorSource

    numbers = TensorSource(torch.arange(n_rows, dtype=torch.float64)[:, None], batch_size=batch, seed=seed)
    order: list[Tensor] = []
    while len(order) < steps:
        order += [rows[:, 0].long() for rows in numbers]
    return order[:steps]


def prepared(store_path: str, batch: int) -> dict[str, Tensor]:
    """`train`, a multiple of `batch` rows, and `held_out`; both centred and scaled by the training rows' numbers."""
    from vitrail.store import Store

    store = Store.open(store_path)
    point = store.default_point(None)
    images = torch.cat([x for _, x in store.image_batches(point, store.kind(point, None))])
    n_train = round(len(images) * (1 - HELD_OUT))
    train, held_out = (part.flatten(0, 1) for part in (images[:n_train], images[n_train:]))
    mean = train.double().mean(0)
    scale = (train.double() - mean).square().mean().sqrt()
    train, held_out = (((rows.double() - mean) / scale).float() for rows in (train, held_out))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))  # so that no image is cut off
    return {"train": train[order[: len(train) // batch * batch]], "held_out": held_out}


# -- the run


def run_cell(rows: Path, who: tuple[str, str], job: Job) -> dict[str, Any]:
    stored = torch.load(rows, mmap=True, weights_only=True)
    train, held_out = stored["train"].clone(), stored["held_out"].clone()
    if who[1] != "vitrail":
        stand_in_for_the_unused()
    batches = Batches(train, orders(len(train), job.batch, job.steps, job.seed))
    torch.manual_seed(job.seed)
    began, cpu = time.perf_counter(), time.process_time()
    trained = CONTENDERS[who[0]][who[1]](batches, job)
    taken = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return {"architecture": who[0], "who": who[1], **asdict(job), **measure(trained, held_out, job.k), **taken}


def stand_in_for_the_unused() -> None:
    """As in a training step (train_step.py); what a schedule or an optimiser is made of stays real."""
    import contextlib

    from transformers.optimization import get_linear_schedule_with_warmup

    from train_step import stand_in

    with contextlib.suppress(ImportError):
        import schedulefree  # pyright: ignore[reportMissingImports]  # noqa: F401
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        del sys.modules[name]
    stand_in()
    import transformers

    setattr(transformers, "get_linear_schedule_with_warmup", get_linear_schedule_with_warmup)  # noqa: B010


class Study:
    """The cells of one run, each a file in `out`."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.out = asked, Path(asked.out)
        self.failed: dict[tuple[str, str], str] = {}

    def begin(self) -> int:
        """Write the rows once. Returns d_in. Raises ValueError where the folder holds a run with other numbers."""
        self.out.mkdir(parents=True, exist_ok=True)
        asked = {name: getattr(self.asked, name) for name in ("d_sae", "k", "batch", "steps", "store")}
        settings, rows = self.out / "settings.json", self.out / "rows.pt"
        if settings.exists() and (was := json.loads(settings.read_text())) != asked:
            raise ValueError(f"{self.out} holds a run of {was}, asked for {asked}: take another --out.")
        settings.write_text(json.dumps(asked))
        if not rows.exists():
            torch.save(prepared(self.asked.store, self.asked.batch), rows.with_suffix(".part"))
            rows.with_suffix(".part").rename(rows)
        return torch.load(rows, mmap=True, weights_only=True)["train"].shape[1]

    def job(self, d_in: int, lr: float, seed: int, coefficient: float | None = None) -> Job:
        a = self.asked
        return Job(d_in, a.d_sae, a.k, a.batch, a.steps, lr, seed, coefficient)

    def cell(self, who: tuple[str, str], job: Job) -> dict[str, Any] | None:
        """From its file, or computed in a process of its own. None where it failed."""
        name = f"{'-'.join(who)}-lr{job.lr:g}-seed{job.seed}"
        name += "" if job.coefficient is None else f"-c{job.coefficient:.3g}"
        path = self.out / (name.replace(" ", "_") + ".json")
        if not path.exists():
            request = json.dumps({"rows": str(self.out / "rows.pt"), "who": who, "job": asdict(job), "to": str(path)})
            command = [sys.executable, __file__, "--one", request, "--threads", str(self.asked.threads)]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if not path.exists():
                self.failed[who] = (ran.stderr.strip().splitlines() or ["no output"])[-1]
                print(f"{name}: {self.failed[who]}", flush=True)
                return None
            cell = json.loads(path.read_text())
            print(f"{name}: FVU {cell['fvu']:.4f}, L0 {cell['l0']:.1f}, at k {cell['fvu_at_k']:.4f}", flush=True)
        return json.loads(path.read_text())

    def first(self, who: tuple[str, str], d_in: int, lr: float) -> dict[str, Any] | None:
        """The first seed's cell; of the coefficients tried, the one whose L0 is nearest to k in ratio."""
        seed = self.asked.seeds[0]
        if who not in FIRST_COEFFICIENT:
            return self.cell(who, self.job(d_in, lr, seed))
        tried: list[tuple[float, float]] = []  # log coefficient, log (L0 / k)
        found: list[dict[str, Any]] = []
        trying = math.log(FIRST_COEFFICIENT[who])
        while len(tried) < MOST_COEFFICIENTS:
            cell = self.cell(who, self.job(d_in, lr, seed, float(f"{math.exp(trying):.3g}")))
            if cell is None:
                return None
            found.append(cell)
            tried.append((trying, math.log(max(cell["l0"], 1e-3) / self.asked.k)))
            if abs(tried[-1][1]) < NEAR:
                break
            trying = next_coefficient(tried)
        return found[min(range(len(tried)), key=lambda i: abs(tried[i][1]))]

    def run(self) -> tuple[Cells, Cells]:
        """What everyone reached on every seed at its best rate, and on the first seed at every rate."""
        d_in = self.begin()
        names = [(arch, who) for arch in self.asked.architectures for who in CONTENDERS[arch]]
        names = [who for who in names if not self.asked.only or who[1] in (*self.asked.only, "vitrail")]
        every: Cells = {}
        for lr in self.asked.lrs:
            for who in names:
                if who not in self.failed and not (who == OWN_RATE and lr != self.asked.lrs[0]):
                    cell = self.first(who, d_in, lr)
                    every.setdefault(who, []).extend([] if cell is None else [cell])
        cells = {who: [min(tried, key=lambda cell: cell["fvu_at_k"])] for who, tried in every.items() if tried}
        for seed in self.asked.seeds[1:]:
            for who in cells:
                best = cells[who][0]
                cell = self.cell(who, self.job(d_in, best["lr"], seed, best["coefficient"]))
                cells[who] += [] if cell is None else [cell]
        return cells, every


def next_coefficient(tried: list[tuple[float, float]]) -> float:
    """Log coefficient at which a line through the last two of (log coefficient, log excess) is zero; at first and
    where the two do not fall, one of slope -1. At most a factor of 30 away."""
    (here, excess), slope = tried[-1], -1.0
    if len(tried) > 1:
        before, excess_before = tried[-2]
        between = (excess - excess_before) / (here - before)
        slope = between if between < -0.05 else slope
    move = -excess / slope
    return here + max(-math.log(30), min(math.log(30), move))


# -- the table


def print_table(cells: Cells) -> None:
    head = (
        f"{'':12}{'':24}{'n':>2}{'lr':>8}{'L0':>8}{'FVU':>9}{'sd':>8}{'FVU at k':>10}{'sd':>8}{'dead':>7}{'CPU s':>7}"
    )
    print(head + "   vitrail - peer, FVU at k, 95 %")
    for (architecture, who), runs in cells.items():
        rate = "own" if (architecture, who) == OWN_RATE else f"{runs[0]['lr']:g}"
        line = f"{architecture:12}{who:24}{len(runs):2}{rate:>8}{mean(runs, 'l0'):8.2f}"
        line += (
            f"{mean(runs, 'fvu'):9.4f}{sd(runs, 'fvu'):8.4f}{mean(runs, 'fvu_at_k'):10.4f}{sd(runs, 'fvu_at_k'):8.4f}"
        )
        line += f"{mean(runs, 'dead'):7.3f}{statistics.median(run['cpu_seconds'] for run in runs):7.0f}"
        print(line + ("" if who == "vitrail" else "   " + compared(cells[architecture, "vitrail"], runs)))


def print_first(every: Cells) -> None:
    """FVU at k (L0) on the first seed at every rate."""
    rates = sorted({cell["lr"] for cells in every.values() for cell in cells})
    print(f"{'':36}" + "".join(f"{f'lr {rate:g}':>18}" for rate in rates))
    for (architecture, who), tried in every.items():
        by_rate = {cell["lr"]: f"{cell['fvu_at_k']:.4f} ({cell['l0']:.1f})" for cell in tried}
        print(f"{architecture:12}{who:24}" + "".join(f"{by_rate.get(rate, ''):>18}" for rate in rates))


def compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    by_seed = {run["seed"]: run["fvu_at_k"] for run in ours}
    differences = [by_seed[run["seed"]] - run["fvu_at_k"] for run in theirs if run["seed"] in by_seed]
    if len(differences) < 2:
        return f"{differences[0]:+.4f}" if differences else ""
    centre, half = t_interval(differences)
    verdict = "worse" if centre - half > 0 else "better" if centre + half < 0 else "no worse"
    return f"{centre:+.4f} ({centre - half:+.4f} to {centre + half:+.4f}) {verdict}"


def t_interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half the width of the 95 % interval for the mean of paired differences (Student's t)."""
    from scipy.stats import t

    n = len(differences)
    return statistics.mean(differences), float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)


def mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(run[name] for run in runs)


def sd(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.stdev(run[name] for run in runs) if len(runs) > 1 else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", help="a store that `vitrail extract` wrote, with one hook point")
    parser.add_argument("--out", default=f"{tempfile.gettempdir()}/vitrail-quality", help="one JSON file a cell")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", help="these contenders and vitrail")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.one:
        request = json.loads(asked.one)
        cell = run_cell(Path(request["rows"]), tuple(request["who"]), Job(**request["job"]))
        partial_path = Path(request["to"] + ".part")
        partial_path.write_text(json.dumps(cell, indent=1))
        partial_path.rename(request["to"])
        return
    if asked.store is None:
        parser.error("give the store")
    study = Study(asked)
    cells, every = study.run()
    a = asked
    print(f"\nd_sae {a.d_sae}, k {a.k}, batch {a.batch}, {a.steps} steps, seeds {a.seeds}, {a.store}\n")
    print_table(cells)
    print(f"\nseed {a.seeds[0]} at every learning rate: FVU at k (L0 of its own inference)\n")
    print_first(every)
    for who, reason in study.failed.items():
        print(f"{' '.join(who)} did not run: {reason}")


if __name__ == "__main__":
    main()
