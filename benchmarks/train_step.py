"""One training step of vitrail against the peers', each by its own trainer's arithmetic, as ratios in one run.

    pip install --no-deps eai-sparsify sae-lens dictionary-learning overcomplete natsort simple-parsing
    python benchmarks/train_step.py                    the table at d_sae = 6,144
    python benchmarks/train_step.py --d-sae 24576 --only topk_bf16 sparsify_topk product_bfloat16
    python benchmarks/train_step.py --device cuda --steps 50 --d-sae 24576

Random float32 activations, d_in 768, batch 4,096, k 64. vitrail's step is `vitrail.train` itself: loss, AuxK, dead
counters, log, gradient projection, clipping, Adam, unit norm. A peer's is its trainer's step: loss, backward, what it
does to the decoder, clipping, Adam; what its package imports and a step does not use is stood in for. Every contender
runs in a process of its own, in shuffled rounds; medians over steps and rounds of wall and of CPU milliseconds, and
the peak of memory over what the process held before. On a machine with other work give --threads 1 and read the CPU
column: threads that wait for each other count as work. Peers that are not installed are named as such. saev's TopK is
in no published version and MSAE is no package: saev is left out, and `msae_*` is the arithmetic of MSAE's released
code written out below.

On CUDA the rows lie on the card from the start, the clock is read when the card has nothing left to do, memory is the
allocator's peak, and the peers run as they would there: sparsify with its Triton kernels, under its own bfloat16
autocast. Each step is also set against the time in which the card could make the encoder's product at the rate that it
reaches in a large square bfloat16 product (`square_bfloat16`).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

D_IN, BATCH, K = 768, 4096, 64
Step = Callable[[Any], object]
WARM_UP = {"cpu": 2, "cuda": 10}  # kernels are compiled, the card's clock rises
SQUARE = 8192  # rows and columns of the product that gives the card's rate


def now(device: str) -> tuple[float, float]:
    """(wall, CPU) seconds, once the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


# -- vitrail


def vitrail_seconds(
    architecture: str, d_sae: int, n_steps: int, compute_dtype: str, device: str
) -> list[tuple[float, float]]:
    """Of each step: between one batch being asked for and the next."""
    import torch

    from vitrail.coders import make_coder
    from vitrail.training import TensorSource, TrainConfig, train

    marks: list[tuple[float, float]] = []

    class Timed(TensorSource):
        def __iter__(self) -> Iterator[Any]:  # the same rows again and again: reading is not what is measured
            for _ in range(n_batches):
                marks.append(now(device))
                yield rows

    k = {"k": K} if "topk" in architecture else {}
    coder = make_coder(architecture, d_in=D_IN, d_sae=d_sae, **k).to(device)
    source = Timed(torch.randn(BATCH, D_IN), batch_size=BATCH)
    rows, n_batches = source.x.to(device), n_steps + WARM_UP[device] + 1
    config = TrainConfig(n_rows=BATCH * n_batches, lr=2e-4, compute_dtype=compute_dtype)
    with tempfile.TemporaryDirectory() as folder:
        train(coder, cast("Any", source), folder + "/coder", config=config, held_out=[source.x[:512]])
    used = marks[-(n_steps + 1) :]
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(used, used[1:], strict=False)]


# -- peers


def stand_in() -> None:
    """Modules that the peers import and a training step does not use."""
    import importlib.abc
    import importlib.machinery
    import types

    from torch import nn

    class HookedRootModule(nn.Module):
        def setup(self) -> None:
            pass

    class HookPoint(nn.Identity):
        pass

    known = {"HookedRootModule": HookedRootModule, "HookPoint": HookPoint}

    class Anything(type):
        def __getattr__(cls, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything(name, (), {"__init__": lambda self, *a, **k: None})

    class Module(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return known.get(name) or getattr(Anything("stand_in", (), {}), name)

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        roots = ("transformer_lens", "wandb", "datasets", "accelerate", "schedulefree", "cv2", "nnsight", "torchvision")
        roots += ("skimage", "requests", "plotly", "pandas", "timm", "transformers")

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if name.split(".")[0] in self.roots:
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
            return None

        def create_module(self, spec: Any) -> Any:
            return Module(spec.name)

        def exec_module(self, module: Any) -> None:
            pass

    sys.meta_path.insert(0, Finder())


def sparsify_topk(d_sae: int, device: str) -> Step:
    import torch

    if device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify.config import SparseCoderConfig  # pyright: ignore[reportMissingImports]
    from sparsify.sparse_coder import SparseCoder  # pyright: ignore[reportMissingImports]

    sae = SparseCoder(D_IN, SparseCoderConfig(num_latents=d_sae, k=K, activation="topk"), device=device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4)
    since_fired = torch.zeros(d_sae, dtype=torch.long, device=device)

    def step(x: Any) -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=since_fired > 10_000_000)
        fired = torch.zeros(d_sae, dtype=torch.bool, device=device)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(len(x))
        since_fired[fired] = 0

    return step


def dictionary_learning(d_sae: int, device: str, trainer: str) -> Step:
    import importlib

    module = {"TopKTrainer": "top_k", "BatchTopKTrainer": "batch_top_k"}[trainer]
    made = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), trainer)(
        steps=100_000, activation_dim=D_IN, dict_size=d_sae, k=K, layer=0, lm_name="none", lr=2e-4, device=device
    )
    count = iter(range(1, 10_000))  # not 0: there it works out a geometric median
    return lambda x: made.update(next(count), x)


def sae_lens(d_sae: int, device: str, architecture: str, *, autocast: bool = False) -> Step:
    import torch
    from sae_lens import saes  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]

    made = getattr(saes, f"{architecture}TrainingSAE")
    config = getattr(saes, f"{architecture}TrainingSAEConfig")(d_in=D_IN, d_sae=d_sae, k=K, device=device)
    sae = made(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4)
    since_fired, frequency = torch.zeros(d_sae, device=device), torch.zeros(d_sae, device=device)

    def step(x: Any) -> None:
        sae.train()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = sae.training_forward_pass(
                step_input=TrainStepInput(
                    sae_in=x,
                    dead_neuron_mask=since_fired > 1000,
                    coefficients={},
                    n_training_steps=5,
                    is_logging_step=False,
                )
            )
            with torch.no_grad():
                firing = out.feature_acts.bool().float()
                fired = firing.sum(-2).bool()
                fired = fired.to_dense() if fired.is_sparse else fired
                since_fired.add_(1)
                since_fired[fired] = 0
                frequency.add_(firing.sum(0))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def overcomplete(d_sae: int, device: str, name: str) -> Step:
    import matplotlib.cm
    import torch

    setattr(matplotlib.cm, "get_cmap", matplotlib.colormaps.get_cmap)  # noqa: B010  its pictures ask for what is gone
    from overcomplete import sae as module  # pyright: ignore[reportMissingImports]
    from overcomplete.sae.trackers import DeadCodeTracker  # pyright: ignore[reportMissingImports]

    made = getattr(module, name)(D_IN, nb_concepts=d_sae, top_k=K if name == "TopKSAE" else K * BATCH, device=device)
    optimizer = torch.optim.Adam(made.parameters(), lr=2e-4)
    tracker = DeadCodeTracker(d_sae, device)

    def step(x: Any) -> None:
        optimizer.zero_grad()
        _, z, x_hat = made(x)
        loss = (x - x_hat).square().mean()
        made.get_dictionary()
        tracker.update(z)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()

    return step


def msae(d_sae: int, device: str, levels: list[int] | None) -> Step:
    """MSAE's released code: every level ranked and decoded by itself; nmse; the decoder rescaled after the backward."""
    import torch

    directions = torch.nn.functional.normalize(torch.randn(d_sae, D_IN), dim=1).to(device)
    encoder, decoder = (torch.nn.Parameter(t.clone()) for t in (directions.t().contiguous(), directions))
    pre_bias, latent_bias = (torch.nn.Parameter(torch.zeros(size, device=device)) for size in (D_IN, d_sae))
    parameters = [encoder, decoder, pre_bias, latent_bias]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, eps=6.25e-10, weight_decay=0)
    frequency = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def nmse(x_hat: Any, x: Any) -> Any:
        return (((x_hat - x) ** 2).mean(1) / (x**2).mean(1)).mean()

    def step(x: Any) -> None:
        optimizer.zero_grad()
        pre = (x - pre_bias) @ encoder + latent_bias
        z = torch.relu(pre)
        if levels is None:
            loss = nmse(z @ decoder + pre_bias, x) + 0.003 * (z.abs().sum(1) / x.norm(dim=1)).mean()
        else:
            losses = []
            for k in levels:
                if k >= d_sae:
                    z = torch.relu(pre)
                else:
                    top = torch.topk(pre, k=k, dim=-1)
                    z = torch.zeros_like(pre)
                    z.scatter_(-1, top.indices, torch.relu(top.values))
                losses.append(nmse(z @ decoder + pre_bias, x))
            weights = range(len(losses), 0, -1)
            loss = torch.stack([w * one for w, one in zip(weights, losses, strict=True)]).sum() / sum(weights)
        loss.backward()
        with torch.no_grad():
            frequency.add_(torch.count_nonzero(z, dim=0))
            norm = decoder.norm(dim=1)
            decoder.div_(norm[:, None])
            encoder.mul_(norm)
            latent_bias.mul_(norm)
            gradient: Any = decoder.grad
            gradient -= (gradient * decoder).sum(1, keepdim=True) * decoder
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def msae_levels(d_sae: int) -> list[int]:
    return [k for k in (64 * 2**i for i in range(20)) if k < d_sae] + [d_sae]


VITRAIL = {
    f"{name}{'' if dtype == 'float32' else '_bf16'}": (name, dtype)
    for name in ("topk", "batch_topk", "matryoshka", "relu")
    for dtype in ("bfloat16", "float32")
}
PEERS: dict[str, Callable[[int, str], Step]] = {
    "sparsify_topk": sparsify_topk,
    "sae_lens_topk": lambda d_sae, device: sae_lens(d_sae, device, "TopK"),
    "sae_lens_topk_autocast": lambda d_sae, device: sae_lens(d_sae, device, "TopK", autocast=True),
    "sae_lens_batch_topk": lambda d_sae, device: sae_lens(d_sae, device, "BatchTopK"),
    "dictionary_learning_topk": lambda d_sae, device: dictionary_learning(d_sae, device, "TopKTrainer"),
    "dictionary_learning_batch_topk": lambda d_sae, device: dictionary_learning(d_sae, device, "BatchTopKTrainer"),
    "overcomplete_topk": lambda d_sae, device: overcomplete(d_sae, device, "TopKSAE"),
    "overcomplete_batch_topk": lambda d_sae, device: overcomplete(d_sae, device, "BatchTopKSAE"),
    "msae_relu": lambda d_sae, device: msae(d_sae, device, None),
    "msae_matryoshka": lambda d_sae, device: msae(d_sae, device, msae_levels(d_sae)),
}
PRODUCTS = ("product_float32", "product_bfloat16")  # the encoder's product alone, by chunks
RATE = "square_bfloat16"


def product(d_sae: int, dtype: str, device: str) -> Step:
    import torch

    from vitrail.coders.select import Encoder

    weights, bias = torch.randn(d_sae, D_IN).to(device).t(), torch.zeros(d_sae, device=device)

    def step(x: Any) -> None:
        for _ in Encoder(x, weights, bias, getattr(torch, dtype)).chunks():
            pass

    return step


def square(device: str) -> Step:
    import torch

    a, b = (torch.randn(SQUARE, SQUARE, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda x: torch.mm(a, b, out=out)


def step_of(name: str, d_sae: int, device: str) -> Step:
    if name in PEERS:
        stand_in()
        return PEERS[name](d_sae, device)
    return square(device) if name == RATE else product(d_sae, name.removeprefix("product_"), device)


def measure(name: str, d_sae: int, n_steps: int, device: str) -> dict[str, Any]:
    import resource

    import torch

    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name in VITRAIL:
        taken = vitrail_seconds(VITRAIL[name][0], d_sae, n_steps, VITRAIL[name][1], device)
    else:
        x = torch.randn(BATCH, D_IN).to(device)
        step = step_of(name, d_sae, device)
        taken = []
        for _ in range(n_steps + WARM_UP[device]):
            wall, cpu = now(device)
            step(x)
            after = now(device)
            taken.append((after[0] - wall, after[1] - cpu))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    kept = taken[-n_steps:]
    return {"wall": [a * 1e3 for a, _ in kept], "cpu": [b * 1e3 for _, b in kept], "mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--steps", type=int, default=4, help="measured in each round, after some to warm up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", help="these contenders alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        import torch

        torch.set_num_threads(asked.threads)
        print("RESULT " + json.dumps(measure(asked.one, asked.d_sae, asked.steps, asked.device)))
        return
    card = card_name(parser) if asked.device == "cuda" else ""
    names = list(asked.only or [*VITRAIL, *PEERS, *PRODUCTS])
    if card and RATE not in names:
        names.append(RATE)
    results: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": [], "mb": []} for name in names}
    failed: dict[str, str] = {}
    for seed in range(asked.rounds):
        for name in random.Random(seed).sample(names, len(names)):
            command = [sys.executable, __file__, "--one", name]
            command += ["--d-sae", str(asked.d_sae), "--steps", str(asked.steps), "--threads", str(asked.threads)]
            command += ["--device", asked.device]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                failed[name] = (ran.stderr.strip().splitlines() or ["no output"])[-1]
                continue
            one = json.loads(lines[-1].removeprefix("RESULT "))
            results[name]["wall"] += one["wall"]
            results[name]["cpu"] += one["cpu"]
            results[name]["mb"].append(one["mb"])
    about = f"d_in {D_IN}, batch {BATCH}, k {K}, {asked.threads} threads, {asked.rounds} rounds of {asked.steps} steps"
    print(f"d_sae {asked.d_sae}, {about}{f', {card}' if card else ''}\n")
    rows = {name: {key: statistics.median(v) for key, v in r.items()} for name, r in results.items() if r["wall"]}
    print(f"{'':32}{'wall ms':>10}{'CPU ms':>10}{'peak MB':>10}")
    digits = 2 if card else 0
    for name, row in rows.items():
        print(f"{name:32}{row['wall']:10.{digits}f}{row['cpu']:10.{digits}f}{row['mb']:10.0f}")
    for name, reason in failed.items():
        print(f"{name:32} did not run: {reason}")
    print("\nratios of wall time (of CPU time)")
    for ours, theirs in pairs(rows):
        wall, cpu = rows[theirs]["wall"] / rows[ours]["wall"], rows[theirs]["cpu"] / rows[ours]["cpu"]
        print(f"  {wall:6.2f} ({cpu:.2f})  {theirs} / {ours}")
    if RATE in rows:
        against_roofline(rows, asked.d_sae)


def card_name(parser: argparse.ArgumentParser) -> str:
    import torch

    if not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here. Leave it out to measure on the CPU.")
    return torch.cuda.get_device_name()


def against_roofline(rows: dict[str, Any], d_sae: int) -> None:
    """Wall time over that of the encoder's product, were it made at the rate of the large square one."""
    per_ms = 2 * SQUARE**3 / rows[RATE]["wall"]
    floor = 2 * BATCH * D_IN * d_sae / per_ms
    print(f"\nover the encoder's product at {per_ms / 1e9:.1f} bfloat16 TFLOP/s: {floor:.3f} ms")
    for name, row in rows.items():
        if name != RATE:
            print(f"  {row['wall'] / floor:6.2f}  {name}")


def pairs(rows: dict[str, Any]) -> list[tuple[str, str]]:
    """(of which, over which) to print: a peer over vitrail's own, and a step over what it cannot do without."""
    wanted: list[tuple[str, str]] = []
    for ours in ("topk_bf16", "topk"):
        wanted += [(ours, peer) for peer in PEERS if peer.endswith(("topk", "autocast")) and "batch" not in peer]
    for ours in ("batch_topk_bf16", "batch_topk"):
        wanted += [(ours, peer) for peer in PEERS if "batch_topk" in peer]
    wanted += [(ours, "msae_matryoshka") for ours in ("matryoshka_bf16", "matryoshka")] + [("relu", "msae_relu")]
    wanted += [("relu_bf16", "msae_relu")]
    wanted += [("relu", "matryoshka"), ("relu", "matryoshka_bf16"), ("relu_bf16", "matryoshka_bf16")]
    wanted += [("product_bfloat16", "topk_bf16"), ("product_bfloat16", "batch_topk_bf16"), ("product_float32", "topk")]
    return [(ours, theirs) for ours, theirs in wanted if ours in rows and theirs in rows]


if __name__ == "__main__":
    main()
