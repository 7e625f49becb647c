"""What a study's file declares: backbones x coders x seeds, and the pictures. docs/studies.md lists every key."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from vitrail.backbones import Backbone, load
from vitrail.coders import CODERS
from vitrail.files import json_digest
from vitrail.studies.hypotheses import hypotheses_of
from vitrail.training import TrainConfig

CONTROLS = ("random", "pca", "pca_all", "neurons", "kmeans", "untrained")
ROLES = ("main", "layer")


@dataclass(frozen=True, kw_only=True)
class BackbonePlan:
    """A model at a point. `role`: "main", or "layer" for a further point that is compared with the model's main one."""

    name: str  # as `load` takes it
    point: str
    label: str = ""  # in tables and folders; without one the name
    tokens: str = "spatial"
    weights: str | None = None
    image_px: int | None = None
    random: int | None = None  # a seed: the architecture with weights that were never trained
    role: str = "main"
    coders: tuple[str, ...] | None = None  # of the plan's, by name; None: all
    evaluator: str | None = None  # a backbone, by label or by name, whose embeddings judge this one's latents (M5)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a backbone's role must be {' or '.join(ROLES)}, got {self.role!r}.")
        if self.random is not None and self.weights is not None:
            raise ValueError(f"{self.shown} has weights and random: {self.random}: it can have one of them.")

    @property
    def shown(self) -> str:
        return self.label or self.name

    @property
    def folder(self) -> str:
        return self.shown.replace("/", "-").replace("@", "-")

    @property
    def model(self) -> tuple[Any, ...]:
        """Places of one model are extracted together."""
        return (self.name, self.weights, self.image_px, self.random, self.tokens)

    def loaded(self, device: torch.device | str = "cpu") -> Backbone:
        if self.random is None:
            return load(self.name, weights=self.weights, image_px=self.image_px, device=device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random)
            return load(self.name, pretrained=False, image_px=self.image_px, device=device)


@dataclass(frozen=True, kw_only=True)
class StudyCoder:
    """`arguments`: of the constructor, but d_in and seed; `expansion` instead of d_sae is d_sae / d_in.

    `control_of`: the name of a coder of the plan; the architecture is then one of CONTROLS, fitted at that coder's L0.
    """

    name: str
    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    seeds: tuple[int, ...] | None = None  # None: the plan's
    control_of: str | None = None

    def __post_init__(self) -> None:
        known = CONTROLS if self.control_of else tuple(CODERS)
        if self.architecture not in known:
            what = "control" if self.control_of else "coder architecture"
            raise ValueError(f"{self.name}: there is no {what} {self.architecture!r}. Known: {', '.join(known)}.")
        if {"expansion", "d_sae"} <= set(self.arguments):
            raise ValueError(f"{self.name} has d_sae and expansion: give one of them.")

    def arguments_at(self, d_in: int) -> dict[str, Any]:
        told = dict(self.arguments)
        if "expansion" in told:
            told["d_sae"] = round(d_in * float(told.pop("expansion")))
        return told

    @property
    def k(self) -> int | None:
        """The L0 that was asked for."""
        return next(
            (int(self.arguments[key]) for key in ("k", "target_l0", "inference_k") if key in self.arguments), None
        )


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """`images`: sets by name; "train" is learnt from, "test" measured, others are other domains.

    `masks`: of an image set the folder of its masks, PNGs of class numbers named as the pictures, 0 for no class.
    """

    backbones: tuple[BackbonePlan, ...]
    coders: tuple[StudyCoder, ...]
    images: Mapping[str, str]
    masks: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    title: str = ""
    batch_size: int = 4096
    common_evaluator: str | None = None  # judges the latents of all backbones, beside each one's own (M5)
    training: Mapping[str, Any] = field(default_factory=dict)  # of TrainConfig
    options: Mapping[str, Any] = field(default_factory=dict)  # of the study's measures

    def __post_init__(self) -> None:
        for needed in ("train", "test"):
            if needed not in self.images:
                raise ValueError(f"images must have a {needed!r} set, got {', '.join(self.images) or 'none'}.")
        called = {"backbones": [one.shown for one in self.backbones], "coders": [one.name for one in self.coders]}
        for what, names in called.items():
            if not names:
                raise ValueError(f"a study needs {what}: name at least one.")
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                more = " (label: of your choice)" if what == "backbones" else ""
                raise ValueError(f"two {what} are called {twice!r}: give them different names{more}.")
        for one in self.coders:
            _check_seeds(one.seeds if one.seeds is not None else self.seeds)
            of = next((other for other in self.coders if other.name == one.control_of), None)
            if one.control_of and (of is None or of.control_of):
                trained = ", ".join(other.name for other in self.coders if not other.control_of)
                raise ValueError(f"{one.name} is a control of {one.control_of!r}, which must be one of {trained}.")
        hypotheses_of(self.options)  # raises for an entry that says too little
        _known("masks", self.masks, self.images, "images")
        for place in self.backbones:
            _known(f"coders of {place.shown}", place.coders or (), called["coders"], "coders")
        self.config  # noqa: B018 (raises for what TrainConfig does not take)

    @property
    def config(self) -> TrainConfig:
        return _made(TrainConfig, self.training, "training")

    def coders_of(self, place: BackbonePlan) -> list[StudyCoder]:
        """Controls last: they look at the coder they stand beside."""
        here = [one for one in self.coders if place.coders is None or one.name in place.coders]
        here = [one for one in here if one.control_of is None or any(other.name == one.control_of for other in here)]
        return sorted(here, key=lambda one: one.control_of is not None)

    def seeds_of(self, coder: StudyCoder) -> tuple[int, ...]:
        """A control has the seeds of its own, or the first of its coder's: it has to be there to look at."""
        if coder.seeds is not None or coder.control_of is None:
            return self.seeds if coder.seeds is None else coder.seeds
        return self.seeds_of(next(one for one in self.coders if one.name == coder.control_of))[:1]

    def cells(self) -> Iterator[tuple[BackbonePlan, StudyCoder, int]]:
        for backbone in self.backbones:
            for coder in self.coders_of(backbone):
                for seed in self.seeds_of(coder):
                    yield backbone, coder, seed

    @property
    def n_cells(self) -> int:
        return sum(1 for _ in self.cells())

    def models(self) -> list[list[BackbonePlan]]:
        """Places by model, in the plan's order."""
        out: dict[tuple[Any, ...], list[BackbonePlan]] = {}
        for place in self.backbones:
            out.setdefault(place.model, []).append(place)
        return list(out.values())

    def place(self, label: str) -> BackbonePlan | None:
        return next((one for one in self.backbones if one.shown == label), None)

    def evaluator(self, named: str) -> Backbone:
        """By the label of a backbone of this plan, with its weights, or by name."""
        place = self.place(named)
        return load(named) if place is None else place.loaded()


def store_folder(places: Sequence[BackbonePlan]) -> str:
    """Of the activations at all points of one model."""
    points = list(dict.fromkeys(place.point for place in places))
    return f"{places[0].folder}-{json_digest([points, places[0].tokens])[:8]}"


def read_plan(path: str | Path) -> StudyPlan:
    """Raises ValueError for a key that there is not, naming those there are."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it should say what to study.")
    text = path.read_text(encoding="utf-8")
    told = json.loads(text) if path.suffix == ".json" else _from_yaml(text, path)
    if not isinstance(told, Mapping):
        raise ValueError(f"{path} must hold names and values, as backbones: [...].")
    return plan_from_json(told, path.name)


def plan_from_json(told: Mapping[str, Any], where: str = "the plan") -> StudyPlan:
    told = dict(told)
    for key, kind in (("backbones", BackbonePlan), ("coders", StudyCoder)):
        told[key] = tuple(_made(kind, _with_tuples(one), f"{key} of {where}") for one in told.get(key) or ())
    told["seeds"] = tuple(told.get("seeds", (0,)))
    return _made(StudyPlan, told, where)


def plan_to_json(plan: StudyPlan) -> dict[str, Any]:
    out = {one.name: getattr(plan, one.name) for one in fields(plan)}
    for key in ("backbones", "coders"):
        out[key] = [{one.name: _plain(getattr(item, one.name)) for one in fields(item)} for item in out[key]]
    return {key: _plain(value) for key, value in out.items()}


def training_of(plan: StudyPlan, coder: StudyCoder, seed: int) -> TrainConfig:
    config = replace(plan.config, seed=seed)
    return config if coder.lr is None else replace(config, lr=coder.lr)


# -- helpers


def _made(kind: Any, told: Mapping[str, Any], where: str) -> Any:
    if not isinstance(told, Mapping):
        raise ValueError(f"{where} must hold names and values, got {told!r}.")
    known = {one.name for one in fields(kind)}
    strange = next((key for key in told if key not in known), None)
    if strange is not None:
        raise ValueError(f"{where} has no {strange!r}. Known: {', '.join(sorted(known))}.")
    try:
        return kind(**told)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from error


def _with_tuples(told: Any) -> Any:
    if not isinstance(told, Mapping):
        return told
    return {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}.")


def _known(what: str, named: Any, there: Any, where: str) -> None:
    strange = next((name for name in named if name not in there), None)
    if strange is not None:
        raise ValueError(f"{what}: {strange!r} is not among the {where} ({', '.join(there)}).")


def _from_yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('a study in YAML needs pyyaml: pip install "vitrail[study]". JSON does not.') from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML that can be read: {error}.") from error
