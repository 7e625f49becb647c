"""Which coders a sweep trains, what they are called, and what they will cost."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from vitrail.coders import CODERS, MultiSource, SparseCoder, Transcoder, make_coder


@dataclass(frozen=True)
class Cell:
    """One coder of a grid. `arguments` are its constructor's, all but d_in."""

    name: str
    architecture: str
    arguments: dict[str, Any]
    lr: float
    seed: int

    def coder(self, d_in: int) -> SparseCoder:
        return make_coder(self.architecture, d_in=d_in, **self.arguments)


@dataclass(frozen=True)
class Grid:
    """Architectures x widths x constructor arguments x learning rates x seeds.

    An argument goes to the architectures whose constructor takes it. `expansions` are widths as multiples of d_in,
    `d_saes` widths outright, instead of them. A seed is that of the starting weights and of training.
    """

    architectures: Sequence[str]
    expansions: Sequence[int] = (8,)
    d_saes: Sequence[int] = ()
    arguments: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    lrs: Sequence[float] = (5e-4,)
    seeds: Sequence[int] = (0,)

    def cells(self, d_in: int) -> list[Cell]:
        """Every coder of the grid, each with a name of its own. Raises ValueError for what no coder can be."""
        widths = list(self.d_saes) or [expansion * d_in for expansion in self.expansions]
        for name, values in {"architectures": self.architectures, "lrs": self.lrs, "seeds": self.seeds}.items():
            if not list(values):
                raise ValueError(f"the grid has no {name}: give at least one.")
        cells: dict[str, Cell] = {}
        for architecture in self.architectures:
            if architecture not in CODERS:
                raise ValueError(f"there is no coder architecture {architecture!r}. Known: {', '.join(CODERS)}.")
            if issubclass(CODERS[architecture], Transcoder | MultiSource):
                raise ValueError(
                    f"a sweep reads one hook point and {architecture} needs several. Train it by `vitrail train`."
                )
            known = inspect.signature(CODERS[architecture]).parameters
            own = {name: list(values) for name, values in self.arguments.items() if name in known}
            for d_sae, chosen, lr, seed in product(widths, product(*own.values()), self.lrs, self.seeds):
                arguments = {"d_sae": d_sae, **dict(zip(own, chosen, strict=True)), "seed": seed}
                name = cell_name(architecture, d_in, arguments, lr)
                cells[name] = Cell(name, architecture, arguments, float(lr), int(seed))
        self._check_arguments()
        return list(cells.values())

    def _check_arguments(self) -> None:
        for name, values in self.arguments.items():
            takers = [a for a in self.architectures if name in inspect.signature(CODERS[a]).parameters]
            if not takers or name in ("d_in", "d_sae", "seed"):
                raise ValueError(f"none of {', '.join(self.architectures)} takes {name!r} as an argument to vary.")
            if not list(values):
                raise ValueError(f"the grid has no values for {name}: give at least one.")


def cell_name(architecture: str, d_in: int, arguments: Mapping[str, Any], lr: float) -> str:
    """topk-x8-k32-lr0.0005-s0: the same for the same coder in whatever grid it stands.

    The constructor's first argument after the widths (k, l1) is always named, another where it is not the default.
    """
    parameters = inspect.signature(CODERS[architecture]).parameters
    own = [name for name in parameters if name not in ("d_in", "d_sae", "seed")]
    d_sae = arguments["d_sae"]
    parts = [architecture, f"x{d_sae // d_in}" if d_sae % d_in == 0 else f"d{d_sae}"]
    for name in own:
        value = arguments.get(name, parameters[name].default)
        if value != parameters[name].default or (name == own[0] and value is not None):
            parts.append(_named(name, value))
    return "-".join([*parts, _named("lr", lr), _named("s", arguments["seed"])])


def _named(name: str, value: Any) -> str:
    """k32, l1_0.5, inference_relu, ks1.3.9"""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = f"{value:.12g}" if number else str(value)
    if isinstance(value, list | tuple):
        text, number = ".".join(f"{inner}" for inner in value), True
    return f"{name}_{text}" if not number or name[-1].isdigit() else f"{name}{text}"


@dataclass(frozen=True)
class Cost:
    """What one coder takes. `held_bytes`: weights, gradients and Adam's two moments. `step_flops`: of one batch."""

    parameters: int
    held_bytes: int
    step_bytes: int
    step_flops: int


def estimated_cost(cell: Cell, d_in: int, batch_size: int) -> Cost:
    """Before anything is trained. FLOPs: the encoder's product, and the other products over k latents a row, or over
    half of them where the architecture names no k."""
    coder = cell.coder(d_in)
    parameters = sum(p.numel() for p in coder.parameters() if p.requires_grad)
    size = coder.W_dec.element_size()
    k = getattr(coder, "k", None)
    active = k if isinstance(k, int) else coder.d_sae // 2
    # decode, its two gradients and the encoder's: 2 + 4 + 2 per active latent and dimension
    flops = 2 * batch_size * d_in * coder.d_sae + 8 * batch_size * d_in * active + 12 * parameters
    # the pre-activations and what is made of them
    return Cost(parameters, 4 * size * parameters, 2 * size * batch_size * coder.d_sae, flops)
