"""vitrail sweep"""

import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from vitrail.cli.options import pick_device
from vitrail.coders import CODERS
from vitrail.files import replacing
from vitrail.metrics.pareto import pareto_front as front_of
from vitrail.progress import Terminal
from vitrail.store import Store
from vitrail.studies.first_look import coder_about
from vitrail.training import Grid, TrainConfig, sweep
from vitrail.training.grid import Cell, Cost, estimated_cost
from vitrail.training.sweep import SweepResult, read_results

# What a preset asks for; an option given beside it wins. ViSAEBench, section 3 and table 1: the paper names no warm-up,
# clipping or revival; "constant" is taken to mean no warm-up, the other two are vitrail's own.
PRESETS: dict[str, dict[str, Any]] = {
    "visaebench": {
        "architecture": ("batch_topk",),
        "expansion": (8, 16, 32),
        "k": ("64", "128", "192", "256"),
        "lr": (1e-3,),
        "seed": (42,),
        "batch_size": 8192,
        "train": {"epochs": 1.0, "schedule": "constant", "warmup_steps": 0},
    },
}


def run(arguments: Sequence[str]) -> None:
    """`vitrail sweep STORE OUT ...`: every list is a direction of the grid."""
    arguments = list(arguments)
    asked = tyro.cli(
        options(preset_of(arguments)),
        args=arguments,
        prog="vitrail sweep",
        description="Train a grid of coders over one reading of a store. Constructor arguments take lists: "
        "--k 32 64 --l1 0.5 1; one that is a list itself is written with commas: --ks 8,16,32 16,32.",
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    result = sweep_verb(asked)
    if result is None:
        return
    rows = read_results(asked.out / "results.jsonl")
    print_results(rows)
    for path in pareto_picture(rows, asked.out):
        print(path)
    if result.stopped:
        told = "".join(f"\n  {name}: {error}" for name, error in result.stopped.items())
        sys.exit(
            f"vitrail sweep: {len(result.stopped)} of {len(result.rows)} coders stopped; the others are whole.{told}"
        )


def preset_of(arguments: Sequence[str]) -> str | None:
    """The preset's values become the options' defaults, so it must be known before they are read."""
    for at, argument in enumerate(arguments):
        if argument.startswith("--preset"):
            name = argument.partition("=")[2] or next(iter(arguments[at + 1 :]), "")
            if name not in PRESETS:
                raise ValueError(f"there is no preset {name!r}. Known: {', '.join(PRESETS)}.")
            return name
    return None


@dataclasses.dataclass(frozen=True)
class _Training(TrainConfig):
    """The training config without what the grid says."""

    lr: tyro.conf.Suppress[tyro.conf.Fixed[float]] = TrainConfig.lr
    seed: tyro.conf.Suppress[tyro.conf.Fixed[int]] = TrainConfig.seed


def options(preset: str | None) -> Any:
    """A dataclass of the verb's own options, the grid's directions and the training config."""
    given = PRESETS[preset] if preset else {}

    def own(name: str, kind: Any, default: Any, told: str) -> tuple[str, Any, Any]:
        return name, Annotated[kind, tyro.conf.arg(help=told)], dataclasses.field(default=given.get(name, default))

    training = _Training(**given.get("train", {}))
    fields = [
        ("store", Annotated[Path, tyro.conf.arg(help="a store that `vitrail extract` wrote")]),
        ("out", Annotated[Path, tyro.conf.arg(help="the folder for the coders and their table")]),
        own("preset", str | None, preset, f"a published grid: {', '.join(PRESETS)}"),
        own("architecture", tuple[str, ...], ("topk",), f"of {', '.join(CODERS)}"),
        own("expansion", tuple[int, ...], (8,), "d_sae as multiples of d_in"),
        own("d_sae", tuple[int, ...], (), "instead of --expansion"),
        own("lr", tuple[float, ...], (TrainConfig.lr,), "Adam's learning rate, the schedule's highest"),
        own("seed", tuple[int, ...], (0,), "of the starting weights and of training"),
        own("plan", bool, False, "say what it is and what it takes, and train nothing"),
        own("workers", int, 1, "coders stepped at the same time, each with its share of the threads"),
        own("point", str | None, None, "a hook point of the store"),
        own("tokens", str | None, None, "a token kind of the store"),
        own("batch_size", int, 4096, "rows per step"),
        own("held_out", float, 0.05, "share of the images for thresholds and the table's held-out columns"),
        own("data_seed", int, 0, "of the order of rows"),
        own("device", str, "auto", "cpu, cuda or auto"),
        ("train", tyro.conf.OmitArgPrefixes[_Training], dataclasses.field(default=training)),
    ]
    arguments = [
        own(name, tuple[str, ...], (), f"of {', '.join(takers)}") for name, takers in constructor_arguments().items()
    ]
    of_coders = dataclasses.make_dataclass("CoderOptions", arguments, frozen=True)
    fields.append(("coder", tyro.conf.OmitArgPrefixes[of_coders], dataclasses.field(default=of_coders())))
    return dataclasses.make_dataclass("Options", fields)


def constructor_arguments() -> dict[str, list[str]]:
    """Which architectures take which argument."""
    takers: dict[str, list[str]] = {}
    for architecture, coder in CODERS.items():
        for name in inspect.signature(coder).parameters:
            if name not in ("d_in", "d_sae", "seed"):
                takers.setdefault(name, []).append(architecture)
    return takers


def parsed(text: str) -> Any:
    """32, 0.5, none, true, [8, 16] from "8,16", or the text itself."""
    if "," in text:
        return [parsed(part) for part in text.split(",") if part]
    named = {"none": None, "true": True, "false": False}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def grid_of(asked: Any) -> Grid:
    given = {field.name: getattr(asked.coder, field.name) for field in dataclasses.fields(asked.coder)}
    return Grid(
        architectures=asked.architecture,
        expansions=asked.expansion,
        d_saes=asked.d_sae,
        arguments={name: [parsed(value) for value in values] for name, values in given.items() if values},
        lrs=asked.lr,
        seeds=asked.seed,
    )


def sweep_verb(asked: Any) -> SweepResult | None:
    store = Store.open(asked.store)
    point = store.default_point(asked.point)
    tokens = store.kind(point, asked.tokens)
    if not 0 <= asked.held_out < 1:
        raise ValueError(f"held_out must be in 0..1, a share of the images, got {asked.held_out}.")
    n_train = store.n_images - round(asked.held_out * store.n_images)
    read = {"tokens": tokens, "batch_size": asked.batch_size, "seed": asked.data_seed}
    source = store.reader(point, images=(0, n_train), **read)
    held_out = store.reader(point, images=(n_train, store.n_images), **read) if n_train < store.n_images else None
    grid, config = grid_of(asked), TrainConfig(**dataclasses.asdict(asked.train))
    cells = grid.cells(source.d_in)
    n_rows = config.total_rows(source.n_rows)
    costs = {cell.name: estimated_cost(cell, source.d_in, asked.batch_size) for cell in cells}
    print_plan(cells, costs, n_rows=n_rows, batch_size=asked.batch_size, workers=asked.workers)
    if asked.plan:
        return None
    return sweep(
        grid,
        source,
        asked.out,
        config=config,
        held_out=held_out,
        metadata={**coder_about(store, point, tokens), "train_images": [0, n_train]},
        device=pick_device(asked.device),
        workers=asked.workers,
        progress=Terminal(),
    )


# -- what is printed


def print_plan(cells: Sequence[Cell], costs: Mapping[str, Cost], *, n_rows: int, batch_size: int, workers: int) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("d_sae", "parameters", "weights, gradients, Adam", "FLOPs a step"):
        table.add_column(title, justify="right")
    for cell in cells:
        cost = costs[cell.name]
        held, flops = f"{_bytes(cost.held_bytes)}", f"{cost.step_flops:.2e}"
        table.add_row(cell.name, f"{cell.arguments['d_sae']:,}", f"{cost.parameters:,}", held, flops)
    _console().print(table)
    steps = math.ceil(n_rows / batch_size)
    held = sum(cost.held_bytes for cost in costs.values())
    stepping = sum(sorted((cost.step_bytes for cost in costs.values()), reverse=True)[:workers])
    flops = sum(cost.step_flops for cost in costs.values())
    print(
        f"{len(cells)} coders, {n_rows:,} rows in {steps:,} steps of {batch_size:,}; {flops:.2e} FLOPs a step of all, "
        f"{flops * steps:.2e} in all\nmemory: about {_bytes(held + stepping)} ({_bytes(held)} held, {_bytes(stepping)} "
        f"while stepping {workers} at a time), and the window of rows"
    )


def print_results(rows: Sequence[Mapping[str, Any]]) -> None:
    """Every coder of the folder; those on the Pareto front are marked."""
    front = {row["name"] for row in pareto_front(rows)}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "FVU", "L0", "dead", "held-out FVU", "held-out L0", "seconds", ""):
        table.add_column(title, justify="left" if not title else "right")
    for row in rows:
        if row["state"] == "stopped":
            table.add_row(row["name"], "stopped", style="red")
            continue
        numbers = [_number(row.get(key), digits) for key, digits in (("fvu", 4), ("l0", 1), ("dead", 0))]
        numbers += [_number(row.get(key), digits) for key, digits in (("held_out_fvu", 4), ("held_out_l0", 1))]
        marks = ["on the front"] if row["name"] in front else []
        marks += ["not converged"] if row.get("converged") is False else []
        marks += [f"ended early: {row['stopped_early']}"] if row.get("stopped_early") else []
        table.add_row(row["name"], *numbers, f"{row['seconds']:.1f}", ", ".join(marks))
    _console().print(table)


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 150, highlight=False)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _bytes(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


# -- the picture

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 74, 24, 44, 92
TICK_ROOM = 60  # pixels between two numbers of an axis
COLOURS = ("#3b5b92", "#2a8c82", "#8a4f9e", "#a8503a", "#5c6b3c", "#7a7a7a")
FRONT, INK, FAINT = "#d98c00", "#22262e", "#d9dce2"
SCALE = 2  # pixels of the PNG per unit of the SVG
# ("line", x1, y1, x2, y2, colour) ("dot", x, y, radius, fill, edge) ("text", x, y, words, size, colour, anchor)
Mark = tuple[Any, ...]


def coordinates(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """(L0, FVU) on held-out rows, or of the last batch where there are none; None where they cannot be drawn."""
    l0, fvu = row.get("held_out_l0"), row.get("held_out_fvu")
    if l0 is None or fvu is None:
        l0, fvu = row.get("l0"), row.get("fvu")
    return None if not l0 or fvu is None or fvu <= 0 else (float(l0), float(fvu))


def pareto_front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The coders that no other beats in both L0 and FVU, sparsest first."""
    placed = [(place, row) for row in rows if (place := coordinates(row)) is not None]
    return [placed[at][1] for at in front_of([place for place, _ in placed], better=("lower", "lower"))]


def pareto_picture(rows: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """OUT/pareto.svg and OUT/pareto.png: FVU against L0, both on log scales; nothing where no coder can be drawn."""
    if not any(coordinates(row) for row in rows):
        return []
    marks = picture_marks(rows)
    with replacing(out / "pareto.svg") as temporary:
        temporary.write_text(_as_svg(marks), encoding="utf-8")
    with replacing(out / "pareto.png") as temporary:
        _as_image(marks).save(temporary, "PNG")
    return [out / "pareto.svg", out / "pareto.png"]


def picture_marks(rows: Sequence[Mapping[str, Any]]) -> list[Mark]:
    placed = [(row, place) for row in rows if (place := coordinates(row)) is not None]
    x_axis = _Axis([place[0] for _, place in placed], LEFT, WIDTH - RIGHT)
    y_axis = _Axis([place[1] for _, place in placed], HEIGHT - BOTTOM, TOP)
    measured = "held-out rows" if all(row.get("held_out_fvu") is not None for row, _ in placed) else "the last batch"
    marks: list[Mark] = [("text", LEFT, 24, f"FVU against L0, on {measured}", 15, INK, "start")]
    for tick in x_axis.ticks():
        marks.append(("line", x_axis(tick), TOP, x_axis(tick), HEIGHT - BOTTOM, FAINT))
        marks.append(("text", x_axis(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", 12, INK, "middle"))
    for tick in y_axis.ticks():
        marks.append(("line", LEFT, y_axis(tick), WIDTH - RIGHT, y_axis(tick), FAINT))
        marks.append(("text", LEFT - 8, y_axis(tick) + 4, f"{tick:g}", 12, INK, "end"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks.append(("text", middle, HEIGHT - BOTTOM + 38, "L0, latents per row", 13, INK, "middle"))
    marks.append(("text", 14, TOP - 8, "FVU", 13, INK, "start"))
    front = [row["name"] for row in pareto_front(rows)]
    at = {row["name"]: (x_axis(l0), y_axis(fvu)) for row, (l0, fvu) in placed}
    for one, other in zip(front, front[1:], strict=False):
        marks.append(("line", *at[one], *at[other], FRONT))
    architectures = sorted({row["architecture"] for row, _ in placed})
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(architectures)}
    widths = sorted({row["d_sae"] for row, _ in placed})
    radius = {d_sae: 4.0 + 5.0 * i / max(1, len(widths) - 1) for i, d_sae in enumerate(widths)}
    for row, _ in sorted(placed, key=lambda one: -one[0]["d_sae"]):
        edge = FRONT if row["name"] in front else "#ffffff"
        marks.append(("dot", *at[row["name"]], radius[row["d_sae"]], colours[row["architecture"]], edge))
    return marks + _legend(colours, radius)


def _legend(colours: Mapping[str, str], radius: Mapping[int, float]) -> list[Mark]:
    marks: list[Mark] = []
    entries = [(name, 6.0, colour, "#ffffff") for name, colour in colours.items()]
    entries += [("Pareto front", 6.0, "#ffffff", FRONT)]
    sizes = [(f"{d_sae:,} latents", size, "#9aa1ad", "#ffffff") for d_sae, size in radius.items()]
    for line, kind in enumerate((entries, sizes)):
        x, y = LEFT, HEIGHT - 32 + 20 * line
        for words, size, fill, edge in kind:
            marks += [("dot", x + 8, y - 4, size, fill, edge), ("text", x + 24, y, words, 12, INK, "start")]
            x += 44 + 7 * len(words)
    return marks


class _Axis:
    """A log scale over the values, with some room at both ends."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.08 * (high - low), 0.04)
        self.low, self.high, self.start, self.stop = low - room, high + room, start, stop

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self) -> list[float]:
        """Round numbers that do not crowd: the coarsest of these steps that gives at least three."""
        found: list[float] = []
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(i / 10 for i in range(10, 100, 2))):
            found = [
                step * 10.0**power
                for power in range(math.floor(self.low), math.ceil(self.high) + 1)
                for step in steps
                if self.low <= math.log10(step * 10.0**power) <= self.high
            ]
            if len(found) >= 3:
                break
        kept = found[:1]
        for tick in found:
            if abs(self(tick) - self(kept[-1])) >= TICK_ROOM:
                kept.append(tick)
        return kept


def _as_svg(marks: Sequence[Mark]) -> str:
    parts = []
    for kind, *rest in marks:
        if kind == "line":
            x1, y1, x2, y2, colour = rest
            thick = 2 if colour == FRONT else 1
            parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{thick}"/>')
        elif kind == "dot":
            x, y, r, fill, edge = rest
            thick = 2.5 if edge == FRONT else 1
            parts.append(
                f'<circle cx="{x}" cy="{y}" r="{r:.1f}" fill="{fill}" stroke="{edge}" stroke-width="{thick}"/>'
            )
        else:
            x, y, words, size, colour, anchor = rest
            place = f'x="{x}" y="{y}" text-anchor="{anchor}"'
            parts.append(f'<text {place} font-size="{size}" fill="{colour}">{escape(words)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _as_image(marks: Sequence[Mark]) -> Image.Image:
    drawn = 2 * SCALE  # and then halved: Pillow's lines have hard edges
    image = Image.new("RGB", (WIDTH * drawn, HEIGHT * drawn), "white")
    draw = ImageDraw.Draw(image)
    for kind, *rest in marks:
        if kind == "line":
            *ends, colour = rest
            draw.line([drawn * value for value in ends], colour, drawn * (2 if colour == FRONT else 1))
        elif kind == "dot":
            x, y, r, fill, edge = rest
            thick = 2.5 if edge == FRONT else 1
            r += thick / 2  # SVG's edges lie half outside, Pillow's inside
            box = [drawn * value for value in (x - r, y - r, x + r, y + r)]
            draw.ellipse(box, fill, edge, round(drawn * thick))
        else:
            x, y, words, size, colour, anchor = rest
            at = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
            draw.text((drawn * x, drawn * y), words, colour, ImageFont.load_default(size * drawn), at)
    return image.resize((WIDTH * SCALE, HEIGHT * SCALE), Image.Resampling.LANCZOS)
