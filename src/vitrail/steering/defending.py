"""Every kind of defence at one point: chosen on validation pictures, measured on test pictures, and kept.

    OUT/defence.json       vitrail-defence, version 1: the latents whose removal is the defence, and where
    OUT/rows.json          a row a defence and condition: accuracy, what came back, what was lost, with intervals
    OUT/sweep.json         every set that was tried on the validation pictures
    OUT/correction.safetensors, OUT/gate.json     the defences that need more than a list of latents

`vitrail repair` builds a model from defence.json.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.files import tensors_digest, write_json, write_tensors
from vitrail.metrics.heads import Head
from vitrail.progress import SILENT, Progress
from vitrail.steering.defences import Blank, Correction, Defence, Removal, fit_corrections, fit_gate
from vitrail.steering.selection import Site, latents_at, neurons_at
from vitrail.steering.typographic import (
    CLEAN_LOSS,
    LAMBDAS,
    TAUS,
    Over,
    Rest,
    Row,
    Shown,
    Tried,
    best,
    candidates,
    evaluate,
    random_removals,
    removals,
    sweep,
)

FORMAT, VERSION = "vitrail-defence", 1
PAPER, UNDER_TEXT, NEURONS = "latents, all tokens", "latents, under text", "neurons, under text"
GATED, BLANK, CORRECTION = "latents where text latents fire", "blank where text latents fire", "linear correction"
KINDS = (PAPER, UNDER_TEXT, NEURONS, GATED, BLANK, CORRECTION)


@dataclass(frozen=True, eq=False)
class Pictures:
    """`clean` and `attacked` are pairs to choose on, `check` and `check_attacked` for the sweep; `tests`, by condition,
    of the pictures of `test` or some of them. No picture may be in two of the three."""

    clean: Shown
    attacked: Shown
    check: Shown
    check_attacked: Shown
    test: Shown
    tests: Mapping[str, Shown]

    def __post_init__(self) -> None:
        if self.clean.ids != self.attacked.ids:
            raise ValueError("the pictures to choose on are pairs: the same ones, clean and attacked, in one order.")


@dataclass(frozen=True, eq=False)
class Defended:
    """`chosen`: by kind, the best of its sweep; `main`: the removal of latents that defence.json holds, None where no
    set of latents stayed within the bound. `tried`: by kind, everything."""

    rows: list[Row]
    chosen: dict[str, Tried]
    main: Tried | None
    tried: dict[str, list[Tried]]


def defend(
    backbone: Backbone,
    rest: Rest,
    coder: SparseCoder,
    point: str,
    tokens: str,
    pictures: Pictures,
    *,
    heads: Mapping[str, Head] | None = None,
    taus: Sequence[float] = TAUS,
    lambdas: Sequence[float] = LAMBDAS,
    ranks: Sequence[int] = (1, 4, 16, 64),
    clean_weights: Sequence[float] = (1.0,),
    clean_loss: float = CLEAN_LOSS,
    kinds: Collection[str] = KINDS,
    n_random: int = 20,
    n_bootstrap: int = 2000,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Defended:
    """`heads`: text sides with a prefix, by name, each alone and beside `main` (SPEC row 129). `kinds`: of KINDS.

    Raises ValueError for a kind that there is not.
    """
    if set(kinds) - set(KINDS):
        raise ValueError(f"kinds of defences are {'; '.join(KINDS)}; got {'; '.join(sorted(set(kinds) - set(KINDS)))}.")
    latents, neurons = latents_at(coder, point, tokens), neurons_at(backbone, point, tokens)
    knows_text = pictures.attacked.text is not None and bool(pictures.attacked.text.any())
    asked: dict[str, list[tuple[Defence, Mapping[str, Any]]]] = {}
    asks: list[tuple[str, Site, Over]] = [(PAPER, latents, "tokens"), (UNDER_TEXT, latents, "text")]
    asks.append((NEURONS, neurons, "text"))
    for kind, site, over in asks:
        if over == "tokens" or knows_text:
            some = candidates(
                site, backbone, pictures.clean, pictures.attacked, overs=(over,), taus=taus, lambdas=lambdas
            )
            asked[kind] = removals(backbone, site, some)
    first = backbone.grid.n_special
    gate = None
    if knows_text and pictures.attacked.text is not None and tokens != "cls":
        gate = fit_gate(coder, pictures.clean.x, pictures.attacked.x, pictures.attacked.text, first)
    if gate is not None:
        asked[GATED] = [
            (Removal(backbone, latents, one.features, gate=gate), about)
            for one, about in asked[UNDER_TEXT]
            if isinstance(one, Removal)
        ]
        asked[BLANK] = [(Blank(point, gate, pictures.clean.x[:, first:].mean(0)), {})]
    pairs = point, pictures.clean.x, pictures.attacked.x, first
    asked[CORRECTION] = [
        (one, {"rank": one.rank, "clean_weight": weight})
        for weight in clean_weights
        for one in fit_corrections(*pairs, ranks=ranks, clean_weight=weight)
    ]
    tried = {
        kind: sweep(rest, pictures.check, pictures.check_attacked, some, progress=progress)
        for kind, some in asked.items()
        if kind in kinds
    }
    found = {kind: best(some, clean_loss=clean_loss) for kind, some in tried.items()}
    chosen = {kind: one for kind, one in found.items() if one is not None}
    for kind, one in chosen.items():
        one.defence.name = kind
    of_latents = [chosen[kind] for kind in (PAPER, UNDER_TEXT) if kind in chosen]
    main = best(of_latents, clean_loss=clean_loss)
    shown: list[Defence] = [one.defence for one in chosen.values()]
    if main is not None and isinstance(main.defence, Removal) and n_random:
        controls = random_removals(backbone, latents, len(main.defence.features), draws=n_random, seed=seed)
        for draw, one in enumerate(controls):
            one.name = f"random latents {draw}"
        shown += controls
    given: dict[str, Any] = {"n_bootstrap": n_bootstrap, "seed": seed}
    rows = evaluate(rest, pictures.test, pictures.tests, shown, **given)
    if heads:
        beside = evaluate(rest, pictures.test, pictures.tests, [main.defence] if main else [], heads=heads, **given)
        rows += [row for row in beside if row.defence.startswith(tuple(heads))]
    return Defended(rows, chosen, main, tried)


def save_defence(
    out: Path,
    found: Defended,
    backbone: Backbone,
    coder: SparseCoder,
    *,
    coder_path: Path | str,
    point: str,
    tokens: str,
    said: Mapping[str, Any] | None = None,
) -> None:
    """Writes the folder. Without a set of latents within the bound there is no defence.json, and rows.json says so."""
    told: dict[str, Any] = {"backbone": backbone.name, "backbone_digest": backbone.digest, "coder": str(coder_path)}
    told |= {"coder_digest": tensors_digest(coder.state_dict()), "point": point, "tokens": tokens}
    if found.main is not None and isinstance(found.main.defence, Removal):
        removal = found.main.defence
        about = {"format": FORMAT, "version": VERSION, **told, "where": removal.site.where}
        about |= {"features": removal.features.tolist(), "operation": "remove", "chosen": found.main.to_json()}
        write_json(out / "defence.json", about)
    for one in found.chosen.values():
        if isinstance(one.defence, Correction):
            write_tensors(out / "correction.safetensors", one.defence.tensors, {"point": point})
    if GATED in found.chosen:
        write_json(out / "gate.json", {**told, **found.chosen[GATED].defence.to_json()})
    write_json(out / "sweep.json", {kind: [one.to_json() for one in some] for kind, some in found.tried.items()})
    chosen = {kind: one.to_json() for kind, one in found.chosen.items()}
    rows = summary([row.to_json() for row in found.rows])
    write_json(out / "rows.json", {**told, "chosen": chosen, **(said or {}), "rows": rows})


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows, those of random sets as one: the mean over draws of accuracy and change, `sd` and `draws` beside them."""
    kept = [row for row in rows if not row["defence"].startswith("random latents")]
    for condition in dict.fromkeys(row["condition"] for row in rows):
        draws = [r for r in rows if r["condition"] == condition and r["defence"].startswith("random latents")]
        if draws:
            accuracy = np.array([row["accuracy"] for row in draws])
            spread = float(accuracy.std(ddof=1)) if len(draws) > 1 else None
            one = {"defence": "random latents", "condition": condition, "n": draws[0]["n"], "draws": len(draws)}
            one |= {"accuracy": float(accuracy.mean()), "sd": spread, "low": None, "high": None, "p": None}
            change = {"value": float(np.mean([row["change"]["value"] for row in draws])), "low": None, "high": None}
            words = [row["said_word"] for row in draws]
            said = None if None in words else float(np.mean(words))
            kept.append({**one, "change": change, "back": None, "said_word": said})
    return kept
