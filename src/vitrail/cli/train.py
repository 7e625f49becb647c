"""vitrail train"""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.cli.join import joined, reads_several_points
from vitrail.cli.options import pick_device
from vitrail.coders import CODERS, SparseCoder, make_coder
from vitrail.progress import Terminal
from vitrail.store import Store
from vitrail.studies.first_look import coder_about
from vitrail.training import MixedSource, Source, TrainConfig, TrainResult, train


def run(arguments: Sequence[str]) -> None:
    """`vitrail train ARCHITECTURE ...`: the architecture's constructor is the command's options."""
    arguments = list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: vitrail train ARCHITECTURE STORE OUT ...   ({', '.join(CODERS)}; each has its own --help)")
        return
    architecture = arguments.pop(0)
    if architecture not in CODERS:
        raise ValueError(f"there is no coder architecture {architecture!r}. Known: {', '.join(CODERS)}.")
    asked = tyro.cli(
        options(CODERS[architecture]),
        args=arguments,
        prog=f"vitrail train {architecture}",
        description=f"Train a coder on a store. {(inspect.getdoc(sys.modules[CODERS[architecture].__module__]) or '')}",
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    result = train_verb(architecture, asked)
    print(describe(result))


def options(coder: type[SparseCoder]) -> Any:
    """A dataclass of the verb's own options, the training config and the constructor's arguments."""
    own = [
        ("store", Annotated[Path, tyro.conf.arg(help="a store that `vitrail extract` wrote")]),
        ("out", Annotated[Path, tyro.conf.arg(help="the folder for the coder")]),
        ("point", str | None, dataclasses.field(default=None)),
        (
            "to",
            Annotated[str | None, tyro.conf.arg(help="of a transcoder: the point it writes")],
            dataclasses.field(default=None),
        ),
        (
            "beside",
            Annotated[tuple[str, ...], tyro.conf.arg(help="of a crosscoder: further POINT, STORE or STORE:POINT ...")],
            dataclasses.field(default=()),
        ),
        ("tokens", str | None, dataclasses.field(default=None)),
        ("batch_size", Annotated[int, tyro.conf.arg(help="rows per step")], dataclasses.field(default=4096)),
        ("expansion", Annotated[int, tyro.conf.arg(help="d_sae as a multiple of d_in")], dataclasses.field(default=8)),
        ("d_sae", Annotated[int | None, tyro.conf.arg(help="instead of --expansion")], dataclasses.field(default=None)),
        (
            "held_out",
            Annotated[float, tyro.conf.arg(help="share of the images that only the threshold sees")],
            dataclasses.field(default=0.05),
        ),
        (
            "mix",
            Annotated[
                tuple[str, ...],
                tyro.conf.arg(
                    help="STORE=WEIGHT ...: further stores' rows in each batch; the first store's weight is 1"
                ),
            ],
            dataclasses.field(default=()),
        ),
        ("data_seed", Annotated[int, tyro.conf.arg(help="of the order of rows")], dataclasses.field(default=0)),
        ("device", str, dataclasses.field(default="auto")),
        ("train", tyro.conf.OmitArgPrefixes[TrainConfig], dataclasses.field(default_factory=TrainConfig)),
        ("coder", Any, dataclasses.field(default=None)),
    ]
    # The training config has a seed of its own, so the coder's is --coder-seed.
    fields = [
        ("coder_seed" if name == "seed" else name, parameter.annotation, dataclasses.field(default=parameter.default))
        for name, parameter in inspect.signature(coder).parameters.items()
        if name not in ("d_in", "d_sae", "d_out", "widths")
    ]
    of_coder = dataclasses.make_dataclass(f"{coder.__name__}Options", fields)
    own[-1] = ("coder", tyro.conf.OmitArgPrefixes[of_coder], dataclasses.field(default_factory=of_coder))
    return dataclasses.make_dataclass("Options", own)


def train_verb(architecture: str, asked: Any) -> TrainResult:
    if not 0 <= asked.held_out < 1:
        raise ValueError(f"held_out must be in 0..1, a share of the images, got {asked.held_out}.")
    if reads_several_points(architecture) or asked.to or asked.beside:
        if asked.mix:
            raise ValueError(
                f"--mix joins rows of one point; a {architecture} coder here reads several. Leave one out."
            )
        several = joined(
            architecture,
            asked.store,
            point=asked.point,
            to=asked.to,
            beside=asked.beside,
            tokens=asked.tokens,
            batch_size=asked.batch_size,
            seed=asked.data_seed,
            held_out=asked.held_out,
        )
        source, held_out, widths, metadata = several.source, several.held_out, several.widths, several.about
    else:
        source, held_out, metadata = of_one_point(asked)
        widths = {"d_in": source.d_in}
    d_sae = asked.d_sae or asked.expansion * widths["d_in"]
    arguments = {name.removeprefix("coder_"): value for name, value in dataclasses.asdict(asked.coder).items()}
    coder = make_coder(architecture, d_sae=d_sae, **widths, **arguments)
    return train(
        coder.to(pick_device(asked.device)),
        source,
        asked.out,
        config=asked.train,
        held_out=held_out,
        metadata=metadata,
        progress=Terminal(),
    )


def of_one_point(asked: Any) -> tuple[Source, Source | None, dict[str, Any]]:
    """Rows to train on, rows held out, and what is said of them."""
    weights = {asked.store: 1.0, **mixed_in(asked.mix)}
    if len(weights) <= len(asked.mix):
        raise ValueError(f"each store may be given once, and {asked.store} has weight 1: got --mix {asked.mix}.")
    stores = {path: Store.open(path) for path in weights}
    about = [about_training(store, asked) for store in stores.values()]
    source = read_together(stores, weights, asked, held_out=False)
    some_held_out = all(
        told["train_images"][1] < stores[path].n_images for path, told in zip(stores, about, strict=True)
    )
    held_out = read_together(stores, weights, asked, held_out=True) if some_held_out else None
    others = [{"weight": weight, **told} for weight, told in zip(weights.values(), about, strict=True)][1:]
    return source, held_out, {**about[0], **({"mixed_with": others} if others else {})}


def mixed_in(mix: Sequence[str]) -> dict[Path, float]:
    """`STORE=WEIGHT` words."""
    weights = {}
    for word in mix:
        path, separator, weight = word.rpartition("=")
        try:
            weights[Path(path)] = float(weight)
        except ValueError:
            separator = ""
        if not separator or not path:
            raise ValueError(f"--mix takes STORE=WEIGHT, such as runs/texts=0.5; got {word!r}.")
    return weights


def about_training(store: Store, asked: Any) -> dict[str, Any]:
    """What the coder says of one store: what it is, and which images it was trained on."""
    point = store.default_point(asked.point)
    n_train = store.n_images - round(asked.held_out * store.n_images)
    return {**coder_about(store, point, store.kind(point, asked.tokens)), "train_images": [0, n_train]}


def read_together(stores: dict[Path, Store], weights: dict[Path, float], asked: Any, *, held_out: bool) -> Source:
    """The stores' rows for training, or those held out; mixed by weight if there are several stores."""
    sources: list[tuple[Source, float]] = []
    for path, store in stores.items():
        told = about_training(store, asked)
        n_train = told["train_images"][1]
        reader = store.reader(
            told["point"],
            tokens=store.kind(told["point"], asked.tokens),
            batch_size=asked.batch_size,
            seed=asked.data_seed,
            images=(n_train, store.n_images) if held_out else (0, n_train),
        )
        sources.append((reader, weights[path]))
    if len(sources) == 1:
        return sources[0][0]
    # Names without folders: a run is the same run wherever its stores lie.
    named = {f"store {number}": source for number, source in enumerate(sources)}
    return MixedSource(named, batch_size=asked.batch_size, seed=asked.data_seed)


def describe(result: TrainResult) -> str:
    last, coder = result.last, result.coder
    fvu = "unknown" if last["fvu"] is None else f"{last['fvu']:.4f}"
    lines = [
        f"{result.path}: {coder.name}, {coder.d_in} -> {coder.d_sae}; {result.steps:,} steps, {result.rows:,} rows, "
        f"{result.seconds:.1f} s",
        f"  last batch: FVU {fvu}, L0 {last['l0']:.1f}, {last['dead']} dead",
    ]
    if result.stopped is not None:
        lines.append(f"  stopped early: {result.stopped}")
    if coder.calibration:
        lines.append("  " + ", ".join(f"{name} {value}" for name, value in coder.calibration.items()))
    return "\n".join(lines)
