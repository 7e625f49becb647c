"""vitrail train"""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.cli.options import pick_device
from vitrail.coders import CODERS, SparseCoder, make_coder
from vitrail.progress import Terminal
from vitrail.store import Store
from vitrail.studies.first_look import coder_about
from vitrail.training import TrainConfig, TrainResult, train


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
        ("tokens", str | None, dataclasses.field(default=None)),
        ("batch_size", Annotated[int, tyro.conf.arg(help="rows per step")], dataclasses.field(default=4096)),
        ("expansion", Annotated[int, tyro.conf.arg(help="d_sae as a multiple of d_in")], dataclasses.field(default=8)),
        ("d_sae", Annotated[int | None, tyro.conf.arg(help="instead of --expansion")], dataclasses.field(default=None)),
        (
            "held_out",
            Annotated[float, tyro.conf.arg(help="share of the images that only the threshold sees")],
            dataclasses.field(default=0.05),
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
        if name not in ("d_in", "d_sae")
    ]
    of_coder = dataclasses.make_dataclass(f"{coder.__name__}Options", fields)
    own[-1] = ("coder", tyro.conf.OmitArgPrefixes[of_coder], dataclasses.field(default_factory=of_coder))
    return dataclasses.make_dataclass("Options", own)


def train_verb(architecture: str, asked: Any) -> TrainResult:
    store = Store.open(asked.store)
    point = store.default_point(asked.point)
    tokens = store.kind(point, asked.tokens)
    if not 0 <= asked.held_out < 1:
        raise ValueError(f"held_out must be in 0..1, a share of the images, got {asked.held_out}.")
    n_train = store.n_images - round(asked.held_out * store.n_images)
    read = {"tokens": tokens, "batch_size": asked.batch_size, "seed": asked.data_seed}
    source = store.reader(point, images=(0, n_train), **read)
    held_out = store.reader(point, images=(n_train, store.n_images), **read) if n_train < store.n_images else None
    d_sae = asked.d_sae or asked.expansion * source.d_in
    arguments = {name.removeprefix("coder_"): value for name, value in dataclasses.asdict(asked.coder).items()}
    coder = make_coder(architecture, d_in=source.d_in, d_sae=d_sae, **arguments)
    return train(
        coder.to(pick_device(asked.device)),
        source,
        asked.out,
        config=asked.train,
        held_out=held_out,
        metadata={**coder_about(store, point, tokens), "train_images": [0, n_train]},
        progress=Terminal(),
    )


def describe(result: TrainResult) -> str:
    last, coder = result.last, result.coder
    lines = [
        f"{result.path}: {coder.name}, {coder.d_in} -> {coder.d_sae}; {result.steps:,} steps, {result.rows:,} rows, "
        f"{result.seconds:.1f} s",
        f"  last batch: FVU {last['fvu']:.4f}, L0 {last['l0']:.1f}, {last['dead']} dead",
    ]
    if coder.calibration:
        lines.append("  " + ", ".join(f"{name} {value}" for name, value in coder.calibration.items()))
    return "\n".join(lines)
