"""Every latent of a coder turned up on every image; beside it neurons and random directions. Killed, it goes on.

    OUT/steerability.parquet     a row a coordinate: the columns of COLUMNS
    OUT/steerability.json        the layer's numbers of each family, and how they were taken
    OUT/curves.parquet           of a few latents, over strength: s, delta, three words of the largest probability
    OUT/shards/                  what is done so far

Families are compared at edits of equal length: each token's edit by a neuron or a random direction has the mean length
that edits by the latents have there. With `against_dose="same"` they are set to the latents' own number instead, as in
the paper, where an edit of a neuron is of another size.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.concepts.vocabulary import Vocabulary
from vitrail.files import read_json, read_tensors, write_json, write_tensors
from vitrail.images.base import ImageSource
from vitrail.progress import SILENT, Progress, Task
from vitrail.provenance import peak_memory_mb, provenance
from vitrail.steering.bench import AT_ONCE, Bench, Family, SteerOptions, chunks, prepare
from vitrail.steering.steerability import Layer, Tally, layer, limit_steerability, word_distances
from vitrail.tables import read_table, write_table

FAR = 100.0  # times the dose: where a curve's end is looked for when it is not known in closed form
COLUMNS = {
    "family": "VARCHAR",  # latents, neurons, random
    "number": "INTEGER",
    "s": "DOUBLE",
    "s_sd": "DOUBLE",  # over images
    "ipr": "DOUBLE",
    "delta_max": "DOUBLE",
    "delta_word": "VARCHAR",
    "delta_tv": "DOUBLE",
    "top": "VARCHAR",
    "top_probability": "DOUBLE",
    "distance": "DOUBLE",
    "edit_norm": "DOUBLE",  # mean length of the edit, over the tokens that matter to the route
    "limit_s": "DOUBLE",  # as the dose grows without end; NULL where that is not known in closed form
    "limit_top": "VARCHAR",
}
_NUMBERS = ("s", "s_sd", "ipr", "delta_max", "delta_tv", "top_probability", "distance")
CURVE_COLUMNS = {"number": "INTEGER", "strength": "DOUBLE", "s": "DOUBLE", "ipr": "DOUBLE", "delta_max": "DOUBLE"} | {
    f"{what}_{rank}": kind for rank in (1, 2, 3) for what, kind in (("word", "VARCHAR"), ("p", "DOUBLE"))
}
FORMAT, VERSION = "vitrail-steerability", 1


@torch.inference_mode()
def steer(
    backbone: Backbone,
    coder: SparseCoder,
    images: ImageSource,
    out: str | Path,
    *,
    point: str,
    tokens: str,
    vocabulary: Vocabulary,
    latents: Sequence[int] | Int[np.ndarray, " m"] | None = None,
    options: SteerOptions | None = None,
    said: Mapping[str, Any] | None = None,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Layer]:
    """Writes the folder; the layer's numbers by family. `latents` None: all of them. `said` goes into the JSON.

    Raises ValueError as `prepare`, and for a folder that holds a run of other settings.
    """
    options, out, began = options or SteerOptions(), Path(out), time.monotonic()
    chosen = np.arange(coder.d_sae) if latents is None else np.unique(np.asarray(latents, dtype=np.int64))
    bench = prepare(
        backbone,
        coder,
        images,
        point=point,
        tokens=tokens,
        vocabulary=vocabulary,
        chosen=chosen,
        options=options,
        n_workers=n_workers,
        progress=progress,
    )
    _same_run(out / "run.json", bench.settings)
    numbers = {name: chosen if name == "latents" else np.arange(one.basis.n) for name, one in bench.families.items()}
    sizes = tuple(sorted({len(one) for one in numbers.values()}))
    tables: dict[str, dict[str, np.ndarray]] = {}
    layers: dict[str, Layer] = {}
    for name, family in bench.families.items():
        table, per_image = run_family(bench, family, numbers[name], out / "shards", options.shard, progress)
        tables[name] = table
        layers[name] = layer(
            table["s"],
            table["ipr"],
            np.array([vocabulary.place[word] for word in table["top"]]),
            per_image,
            n_all=family.basis.n,
            gamma=options.gamma,
            beta=options.beta,
            concepts_of=sizes,
            n_bootstrap=options.n_bootstrap,
            seed=options.seed,
        )
    merged = {name: np.concatenate([table[name] for table in tables.values()]) for name in COLUMNS}
    write_table(out / "steerability.parquet", merged, COLUMNS)
    if bench.families["latents"].has_limit and options.n_curves > 0 and options.n_strengths > 1:
        curves = curves_of(bench, distinct_first(tables["latents"], options.n_curves), options.n_strengths, progress)
        write_table(out / "curves.parquet", curves, CURVE_COLUMNS)
    told = {
        "format": FORMAT,
        "version": VERSION,
        **bench.settings,
        "n_images": bench.seen.n,
        "skipped_images": bench.skipped,
        "before": bench.before(),
        "s_without_a_change": bench.replacing_alone(),
        "families": {
            name: {**one.to_json(), **_more(tables[name]), "route": bench.families[name].route.name}
            for name, one in layers.items()
        },
        "seconds": time.monotonic() - began,
        "peak_memory_mb": peak_memory_mb(),
        "provenance": provenance(),
        **(said or {}),
    }
    write_json(out / "steerability.json", _plain(told))
    return layers


def run_family(
    bench: Bench, family: Family, numbers: Int[np.ndarray, " m"], folder: Path, shard: int, progress: Progress = SILENT
) -> tuple[dict[str, np.ndarray], Float[np.ndarray, " n_images"]]:
    """(columns, each image's mean of s), shard by shard of coordinates; shards that are there are read."""
    shards = {folder / f"{family.name}-{at:05d}.parquet": part for at, part in enumerate(chunks(numbers, shard))}
    done = sum(len(part) for path, part in shards.items() if path.is_file())
    tables, sums = [], np.zeros(bench.seen.n)
    with progress.task(f"steer {family.name}", len(numbers), family.name, done) as task:
        for path, part in shards.items():
            if not path.is_file():
                columns, total = measured(bench, family, part, task)
                write_tensors(path.with_suffix(".safetensors"), {"s": torch.from_numpy(total)})
                write_table(path, columns, COLUMNS)  # last: a shard with a table is whole
            tables.append(read_table(path))
            sums += read_tensors(path.with_suffix(".safetensors"), "sums of a shard's images")["s"].numpy()
    return {name: np.concatenate([one[name] for one in tables]) for name in COLUMNS}, sums / len(numbers)


def measured(
    bench: Bench, family: Family, numbers: Int[np.ndarray, " m"], task: Task
) -> tuple[dict[str, np.ndarray], Float[np.ndarray, " n_images"]]:
    """(COLUMNS of these coordinates, each image's sum of s over them)."""
    words, distances = np.array(bench.vocabulary.words, dtype=object), word_distances(bench.head.classes)
    parts, total = [], np.zeros(bench.seen.n)
    for at in chunks(numbers, AT_ONCE):
        which = torch.from_numpy(at).to(family.basis.device)
        directions, found = family.directions(which), family.tally(which).result(distances)
        lengths = family.steps(which).abs().mean(0) * torch.linalg.vector_norm(directions, dim=1)
        columns = {name: getattr(found, name) for name in _NUMBERS}
        columns |= {"family": np.full(len(at), family.name, dtype=object), "number": at}
        columns |= {"delta_word": words[found.delta_word], "top": words[found.top], "edit_norm": lengths.cpu().numpy()}
        columns |= {"limit_s": np.full(len(at), np.nan), "limit_top": np.full(len(at), None, dtype=object)}
        limits = family.route.limits(directions) if family.has_limit else None
        if limits is not None:
            s, top = limit_steerability(limits, bench.seen.probabilities)
            columns |= {"limit_s": s.cpu().numpy(), "limit_top": words[top.cpu().numpy()]}
        parts.append(columns)
        total += found.per_image.sum(0)
        task.advance(len(at))
    return {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}, total


def curves_of(
    bench: Bench, numbers: Int[np.ndarray, " m"], n_strengths: int, progress: Progress = SILENT
) -> dict[str, list[Any]]:
    """CURVE_COLUMNS of these latents: on a log grid up to the dose, then as it grows without end (strength inf).

    Where the end is not known in closed form it is that of FAR times the dose.
    """
    family, words = bench.families["latents"], bench.vocabulary.words
    which = torch.from_numpy(numbers).to(family.basis.device)
    limits, dose = family.route.limits(family.directions(which)), family.dose
    strengths = np.geomspace(dose.value / 300, dose.value, n_strengths).tolist()
    columns: dict[str, list[Any]] = {name: [] for name in CURVE_COLUMNS}
    with progress.task("curves", len(strengths) + 1, "strengths") as task:
        for strength in [*strengths, float("inf")]:
            if strength == float("inf") and limits is not None:
                tally = Tally(len(which), bench.seen.probabilities)
                for image in range(bench.seen.n):
                    tally.add(slice(None), slice(image, image + 1), limits[:, None].clone())
            else:
                tally = family.tally(which, dose.with_value(min(strength, FAR * dose.value)))
            found, three = tally.result(word_distances(bench.head.classes)), tally.mean_after.topk(min(3, len(words)))
            for row, number in enumerate(numbers.tolist()):
                ranked = list(zip(three.indices[row].tolist(), three.values[row].tolist(), strict=True))
                ranked += [(None, None)] * (3 - len(ranked))
                values = [number, strength, found.s[row], found.ipr[row], found.delta_max[row]]
                for place, p in ranked:
                    values += [None if place is None else words[place], p]
                for name, value in zip(CURVE_COLUMNS, values, strict=True):
                    columns[name].append(value)
            task.advance(1)
    return columns


def distinct_first(table: Mapping[str, np.ndarray], n: int) -> Int[np.ndarray, " k"]:
    """The n most steerable coordinates of different top words; where words run out, the next most steerable."""
    order = np.argsort(-table["s"], kind="stable")
    first = np.sort(np.unique(table["top"][order].astype(str), return_index=True)[1])
    rest = np.setdiff1d(np.arange(len(order)), first)
    return table["number"][order[np.concatenate([first, rest])[:n]]].astype(np.int64)


def _same_run(path: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where the folder holds a run of other settings."""
    if not path.is_file():
        write_json(path, settings)
        return
    before = read_json(path, "record of a run")
    other = [name for name, value in settings.items() if before.get(name) != value]
    if other:
        raise ValueError(f"{path.parent} holds a run of other {', '.join(other)}: give another folder, or delete it.")


def _more(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Beyond the layer's metrics: how many put nearly all on one word; whether the dose is where the curves end."""
    known = np.isfinite(columns["limit_s"].astype(np.float64))
    arrived = columns["top"][known] == columns["limit_top"][known]
    near = np.abs(columns["s"][known] - columns["limit_s"][known]) < 0.05
    return {
        "one_word": int((columns["ipr"] > 0.9).sum()),
        "edit_norm": float(columns["edit_norm"].mean()),
        "limit_mean_s": float(columns["limit_s"][known].mean()) if known.any() else None,
        "top_is_limits": float(arrived.mean()) if known.any() else None,
        "s_within_0.05_of_limit": float(near.mean()) if known.any() else None,
    }


def _plain(value: Any) -> Any:
    """NaN as null, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
