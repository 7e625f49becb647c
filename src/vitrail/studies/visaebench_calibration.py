"""Does each of ViSAEBench's metrics move when the truth moves, and only then? Codes that are known, under dials.

    planted    latents are a world's concepts: z = gain x share of the patch that shows the concept; x = z W + noise
    trained    a coder's own codes of a backbone's patches

A dial spoils the codes, the labels or the pictures by so much, and says beforehand what each metric must do: fall,
rise, or stay where it is. `measure` gives the numbers at each strength, `verdicts` what became of what was expected:

    moved       at a strength: in all seeds the interval there lies beyond that at the dial's start, on the same side,
                by SMALLEST at least
    expected to fall or rise    "yes": moved so at the last strength, in no step back by more than SMALLEST;
                "turns": moved so somewhere, but not "yes"; "backwards": moved the other way, never this; "blind": never
    expected to stay            "stays": never moved; "moved": it did, although what it is said to measure did not
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.backbones.grid import Grid
from vitrail.coders import SparseCoder, TopK
from vitrail.coders.sparse import Codes
from vitrail.images import open_images
from vitrail.metrics.absorption import Absorption
from vitrail.metrics.cross_domain import CrossDomain
from vitrail.metrics.measured import Measured
from vitrail.metrics.monosemanticity import Monosemanticity
from vitrail.metrics.moran import SpatialCoherence
from vitrail.metrics.passing import Metric, Seen, Setting
from vitrail.metrics.preservation import Preservation, Probes
from vitrail.metrics.probe_projection import ProbeProjection
from vitrail.metrics.reconstruction import Reconstruction
from vitrail.metrics.sparse_probing import SparseProbing
from vitrail.progress import SILENT, Progress

METRICS: dict[str, tuple[str, ...]] = {
    "M1 spatial coherence": ("moran",),
    "M2 FVU": ("fvu",),
    "M3 preservation": ("preservation", "preservation_mean_pool"),
    "M4 sparse probing": ("ovr_auc_1", "ovr_auc_128", "multi_acc_128", "k_acc_area"),
    "M5 monosemanticity": ("monosemanticity_normalized", "monosemanticity"),
    "M7 absorption": ("absorption", "absorption_unread"),
    "absorption by projection": ("absorption_full", "absorption_share", "child_absorbed"),
    "splitting": ("feature_splits",),
}
ELSEWHERE = {
    "M6 cross-domain": ("cross_domain_preservation", "cross_domain_alive_kept"),
    "across domains, refit by none": ("cross_domain_selective_kept", "cross_domain_transfer_codes"),
}
SHAPES = ("circle", "square", "triangle", "star")  # of the world's twelve: 16 classes
LATENTS = ("shape", "class", "colour", "size", "position", "background", "ground")  # families that have latents
FACTS = ("shape", "texture", "colour", "size", "position", "background")  # what the evaluator of M5 sees
D_IN, D_SAE, NOISE = 64, 128, 0.1  # NOISE: FVU of the planted coder
GAIN = (0.75, 1.25)
SMALLEST = 0.02


@dataclass(frozen=True, eq=False)
class Case:
    """Activations of pictures' patches, and codes of them: x_hat = z W_dec + b_dec + error. All dense, and small."""

    x: Float[Tensor, "n t d"]
    z: Float[Tensor, "n t d_sae"]
    W_dec: Float[Tensor, "d_sae d"]
    b_dec: Float[Tensor, " d"]
    labels: Int[Tensor, " n"]
    facts: Float[Tensor, "n m"]  # of each picture, to M5's evaluator
    grid: tuple[int, int]
    groups: Mapping[str, Sequence[int]]
    class_directions: Float[Tensor, "d r"]  # orthonormal: where classes differ
    names: tuple[str, ...] = ()  # of the latents, where they are planted
    thing: Float[Tensor, "n t"] | None = None  # share of each patch that shows the thing
    error: Float[Tensor, "n 1 d"] | None = None

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def x_hat(self) -> Float[Tensor, "n t d"]:
        x_hat = self.z @ self.W_dec + self.b_dec
        return x_hat if self.error is None else x_hat + self.error

    @property
    def live(self) -> Int[Tensor, " n_live"]:
        return (self.z.amax((0, 1)) > 0).nonzero()[:, 0]

    def family(self, *families: str) -> Int[Tensor, " m"]:
        """Latents of these families of concepts."""
        return torch.tensor([j for j, name in enumerate(self.names) if name.partition(":")[0] in families])

    def select(self, images: Int[Tensor, " m"]) -> "Case":
        thing, error = (None if each is None else each[images] for each in (self.thing, self.error))
        return replace(
            self,
            x=self.x[images],
            z=self.z[images],
            labels=self.labels[images],
            facts=self.facts[images],
            thing=thing,
            error=error,
        )


def planted(seed: int, n: int = 480, *, patch_px: int = 8, size: str = "") -> Case:
    """The world's concepts as latents, of `n` pictures of four shapes; `size`: only of things that have it.

    The same seed has the same pictures, gains of each (picture, concept) and directions, whatever the patches. Each
    class has a latent, and each shape, colour, ...; textures have none: with them a class would have two.
    """
    positions, world = _pictures(seed, n, size)
    names = tuple(concept for concept in world.concepts if concept.partition(":")[0] in LATENTS)
    names = tuple(name for name in names if not name.startswith("shape:") or name.partition(":")[2] in SHAPES)
    labels, groups, classes = _classes(world, positions)
    names += tuple(f"class:{name}" for name in classes)
    side = world.image_px // patch_px
    z, thing = torch.zeros(n, side * side, D_SAE), torch.zeros(n, side * side)
    facts: list[list[str]] = []
    for row, i in enumerate(positions):
        scene = world.scene(i)
        masks = {**scene.masks, f"class:{world.classes[world.true_label(i)]}": scene.masks["object"]}
        cover: dict[int, Tensor] = {}  # concepts of one thing share one mask
        for column, name in [*enumerate(names), (-1, "object")]:
            if (mask := masks.get(name)) is None:
                continue
            if id(mask) not in cover:
                shares = mask.reshape(side, patch_px, side, patch_px).mean((1, 3), dtype=np.float32)
                cover[id(mask)] = torch.from_numpy(shares.reshape(-1))
            (thing[row] if name == "object" else z[row, :, column]).copy_(cover[id(mask)])
        facts.append([f"{fact}:{scene.attributes[fact]}" for fact in FACTS])
    draws = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=draws)).Q
    W_dec = torch.cat([directions[: len(names)], torch.zeros(D_SAE - len(names), D_IN)])
    z *= GAIN[0] + (GAIN[1] - GAIN[0]) * torch.rand(n, 1, D_SAE, generator=draws)
    z /= variance(z @ W_dec).sqrt()  # as in the space that coders are trained in: the rows' variance is 1
    x = z @ W_dec
    x = x + (NOISE / (1 - NOISE)) ** 0.5 * torch.randn(x.shape, generator=draws)
    told = [j for j, name in enumerate(names) if name.partition(":")[0] in ("class", "shape")]
    return Case(
        *(x, z, W_dec, torch.zeros(D_IN), labels, one_hot(facts), (side, side), groups),
        class_directions=torch.linalg.qr(W_dec[told].t()).Q,
        names=names + ("",) * (D_SAE - len(names)),
        thing=thing,
    )


def trained(coder: SparseCoder, backbone: Backbone, point: str, seed: int, n: int = 480, *, at_once: int = 120) -> Case:
    """Codes of a coder of one point's patches, on the pictures that `planted` has for this seed."""
    positions, world = _pictures(seed, n)
    labels, groups, _ = _classes(world, positions)
    grid, parts = backbone.grid, []
    with torch.inference_mode():
        for start in range(0, n, at_once):
            images = torch.stack([backbone.preprocess(world.load(i)) for i in positions[start : start + at_once]])
            parts.append(backbone.activations(images, [point])[point][:, grid.tokens("spatial")].float())
        x = torch.cat(parts)
        z = coder.encode(x.flatten(0, 1)).unflatten(0, (n, -1))
        b_dec = coder.decode(torch.zeros(1, coder.d_sae))[0]
        W_dec = coder.decode(torch.eye(coder.d_sae)) - b_dec
    x, z, b_dec, W_dec = (each.clone() for each in (x, z, b_dec, W_dec))
    s = variance(x).sqrt()  # of rows with variance 1, as above
    mean = x.mean((0, 1))
    facts = [[f"{fact}:{value}" for fact, value in _facts(world, i).items()] for i in positions]
    means = torch.stack([x[labels == c].mean((0, 1)) for c in labels.unique()])
    return Case(
        *((x - mean) / s, z, W_dec / s, (b_dec - mean) / s, labels, one_hot(facts), (grid.height, grid.width), groups),
        class_directions=torch.linalg.qr((means - means.mean(0)).t()[:, :-1]).Q,
    )


def variance(x: Float[Tensor, "n t d"]) -> Tensor:
    """Of all rows about their mean, a dimension."""
    return (x - x.mean((0, 1))).square().mean()


def _pictures(seed: int, n: int, size: str = "") -> tuple[list[int], Any]:
    """Positions of the first n pictures of the four shapes, and their world."""
    world: Any = open_images(f"world:shapes?n={(12 if size else 4) * n}&seed={seed}&split=test")
    found = (i for i in range(len(world)) if world.factors(i).shape in SHAPES)
    positions = [i for i in found if not size or world.factors(i).size == size][:n]
    if len(positions) < n:
        raise ValueError(f"the world has {len(positions)} such pictures, not {n}.")
    return positions, world


def _classes(world: Any, positions: Sequence[int]) -> tuple[Tensor, dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Labels from 0, their groups and names, of the four shapes' classes."""
    groups = {shape: world.groups[shape] for shape in SHAPES}
    number = {label: new for new, label in enumerate(label for group in groups.values() for label in group)}
    labels = torch.tensor([number[world.true_label(i)] for i in positions])
    return (
        labels,
        {shape: tuple(number[label] for label in group) for shape, group in groups.items()},
        tuple(world.classes[label] for label in number),
    )


def _facts(world: Any, i: int) -> dict[str, str]:
    factors = world.factors(i)
    return {fact: str(getattr(factors, fact)) for fact in FACTS}


def one_hot(facts: Sequence[Sequence[str]]) -> Float[Tensor, "n m"]:
    """Rows of length 1: the cosine of two pictures is the share of facts that they have in common."""
    place = {fact: column for column, fact in enumerate(sorted({fact for those in facts for fact in those}))}
    out = torch.zeros(len(facts), len(place))
    for row, those in enumerate(facts):
        out[row, [place[fact] for fact in those]] = len(those) ** -0.5
    return out


def settings(case: Case) -> Setting:
    coder = TopK(d_in=case.x.shape[2], d_sae=case.W_dec.shape[0], k=1, normalization="none")
    with torch.no_grad():
        coder.W_dec.copy_(case.W_dec)
        coder.b_dec.copy_(case.b_dec)
    height, width = case.grid
    px = 64 // height
    return Setting(
        coder=coder.eval(),
        n_tokens=height * width,
        tokens="spatial",
        grid=Grid(height=height, width=width, patch_px=px, image_px=(px * height, px * width), n_cls=0, n_registers=0),
        cls_token=None,
        patches=slice(0, height * width),
        n_images=case.n,
        shift=case.x.mean((0, 1)),
    )


def batches(case: Case, at_once: int = 120) -> Iterable[Seen]:
    for start in range(0, case.n, at_once):
        part = case.select(torch.arange(start, min(start + at_once, case.n)))
        codes = Codes.from_dense(part.z.flatten(0, 1))
        yield Seen(x=part.x, target=part.x, codes=codes, x_hat=part.x_hat, labels=part.labels)


# -- dials. What is spoilt at one strength is spoilt at the next as well


def scattered(case: Case, share: float, seed: int) -> Case:
    """Of a share of the pictures the patches change places, activations and codes alike."""
    draws = _draws(seed)
    taken = torch.rand(case.n, generator=draws) < share
    order = torch.rand(case.x.shape[:2], generator=draws).argsort(1)
    order[~taken] = torch.arange(case.x.shape[1])
    rows = torch.arange(case.n)[:, None]
    return replace(case, x=case.x[rows, order], z=case.z[rows, order])


def displaced(case: Case, patches: float, seed: int) -> Case:
    """Codes move down by so many rows of patches; activations stay."""
    maps = case.z.unflatten(1, case.grid)
    return replace(case, z=maps.roll(int(patches), 1).flatten(1, 2))


def mixed(case: Case, dial: float, seed: int) -> Case:
    """Live latents in pairs, each takes so much of its partner; the decoder undoes it, so that x_hat is what it was."""
    if not 0 <= dial < 0.5:
        raise ValueError(f"what is mixed by half cannot be undone: dial must be in 0..0.5, got {dial}.")
    pairs = case.live[torch.randperm(len(case.live), generator=_draws(seed))][: len(case.live) // 2 * 2].reshape(-1, 2)
    one, other = torch.cat([pairs, pairs.flip(1)]).T
    z, W_dec = case.z.clone(), case.W_dec.clone()
    z[..., one] = (1 - dial) * case.z[..., one] + dial * case.z[..., other]
    W_dec[one] = ((1 - dial) * case.W_dec[one] - dial * case.W_dec[other]) / (1 - 2 * dial)
    return replace(case, z=z, W_dec=W_dec)


def lost(case: Case, share: float, seed: int) -> Case:
    """A share of the live latents never fire again."""
    order = case.live[torch.randperm(len(case.live), generator=_draws(seed))]
    z = case.z.clone()
    z[..., order[: round(share * len(order))]] = 0
    return replace(case, z=z)


def silent(case: Case, share: float, seed: int) -> Case:
    """Each latent, on its own, is silent in a share of the pictures."""
    off = torch.rand(case.n, 1, case.z.shape[2], generator=_draws(seed)) < share
    return replace(case, z=case.z.masked_fill(off, 0.0))


def wrong(case: Case, share: float, seed: int, *, strength: float = 1.0) -> Case:
    """Each live latent fires on the thing in a share of the pictures that do not show its concept, as strongly as in
    those that do, or `strength` times as strongly."""
    if case.thing is None:
        raise ValueError("which patches show the thing is known of planted codes only.")
    draws = _draws(seed)
    taken = torch.rand(case.n, 1, case.z.shape[2], generator=draws) < share
    gain = GAIN[0] + (GAIN[1] - GAIN[0]) * torch.rand(taken.shape, generator=draws)
    height = strength * float(case.z.max()) / GAIN[1]
    alive = torch.zeros(case.z.shape[2], dtype=torch.bool)
    alive[case.live] = True
    absent = (case.z.amax(1, keepdim=True) == 0) & alive & taken
    return replace(case, z=torch.where(absent, height * gain * case.thing[..., None], case.z))


def faint(case: Case, share: float, seed: int) -> Case:
    return wrong(case, share, seed, strength=0.3)


def mislabelled(case: Case, share: float, seed: int) -> Case:
    """The labels of a share of the pictures change places."""
    draws = _draws(seed)
    moved = torch.randperm(case.n, generator=draws)[: round(share * case.n)]
    labels = case.labels.clone()
    labels[moved] = case.labels[moved[torch.randperm(len(moved), generator=draws)]]
    return replace(case, labels=labels)


def absorbed(case: Case, classes: float, seed: int) -> Case:
    """Of so many classes of each shape the class's latent writes the shape as well, and the shape's is off there."""
    z, W_dec = case.z.clone(), case.W_dec.clone()
    for shape, group in case.groups.items():
        parent = case.names.index(f"shape:{shape}")
        for label in group[: int(classes)]:
            mine = case.labels == label
            z[mine, :, parent] = 0
            (child,) = [j for j in case.family("class").tolist() if bool((case.z[mine, :, j] > 0).any())]
            W_dec[child] += case.W_dec[parent]
    return replace(case, z=z, W_dec=W_dec)


def split(case: Case, parts: float, seed: int) -> Case:
    """Each latent of a class or a shape (where nothing is planted: each live one) becomes so many; in each picture one
    of them fires, the same on all its patches."""
    parts, cut = int(parts), case.family("class", "shape") if case.names else case.live
    part = torch.randint(parts, (case.n, 1, len(cut)), generator=_draws(seed))
    pieces = [case.z[..., cut].masked_fill(part != p, 0.0) for p in range(parts)]
    z = case.z.clone()
    z[..., cut] = pieces[0]
    more = parts - 1
    return replace(
        case, z=torch.cat([z, *pieces[1:]], 2), W_dec=torch.cat([case.W_dec, case.W_dec[cut].repeat(more, 1)])
    )


def noise_class(case: Case, fvu: float, seed: int) -> Case:
    """x_hat is off by the same in all patches of a picture, in directions in which classes differ."""
    return _noisy(case, fvu, seed, case.class_directions)


def noise_other(case: Case, fvu: float, seed: int) -> Case:
    """The same, as far, in directions at right angles to all in which classes differ."""
    d, r = case.class_directions.shape
    start = torch.randn(d, d - r, generator=_draws(0))
    away = start - case.class_directions @ (case.class_directions.t() @ start)
    return _noisy(case, fvu, seed, torch.linalg.qr(away).Q)


def _noisy(case: Case, fvu: float, seed: int, directions: Float[Tensor, "d r"]) -> Case:
    d, r = directions.shape
    drawn = torch.randn(case.n, 1, r, generator=_draws(seed)) @ directions.t()
    return replace(case, error=drawn * (fvu * variance(case.x) * d / r).sqrt()) if fvu else case


def shrunk(case: Case, lost: float, seed: int) -> Case:
    """Of each map a share of the patches falls silent, those farthest from its centre of mass."""
    height, width = case.grid
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()  # (t, 2)
    on = case.z > 0
    mass = case.z.sum(1).clamp_min(1e-12)
    centre = torch.einsum("ntj,tc->njc", case.z, places) / mass[..., None]
    away = (places[None, :, None] - centre[:, None]).square().sum(3).masked_fill(~on, torch.inf)
    rank = away.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    kept = (on.sum(1, keepdim=True) * (1 - lost)).ceil()
    return replace(case, z=case.z.masked_fill(rank >= kept, 0.0))


def duplicated(case: Case, copies: float, seed: int) -> Case:
    """Each live latent has so many copies, all of which fire; their directions are shorter by as much."""
    copies, live = int(copies), case.live
    W_dec = case.W_dec.clone()
    W_dec[live] /= copies
    z = torch.cat([case.z, case.z[..., live].repeat(1, 1, copies - 1)], 2)
    return replace(case, z=z, W_dec=torch.cat([W_dec, W_dec[live].repeat(copies - 1, 1)]))


def dead(case: Case, latents: float, seed: int) -> Case:
    """So many more latents, that never fire."""
    more = int(latents)
    W_dec = torch.cat([case.W_dec, torch.randn(more, case.W_dec.shape[1], generator=_draws(seed))])
    return replace(case, z=torch.cat([case.z, case.z.new_zeros(*case.z.shape[:2], more)], 2), W_dec=W_dec)


def scaled(case: Case, power: float, seed: int) -> Case:
    """Codes ten to so many times as large, directions shorter by as much."""
    return replace(case, z=case.z * 10**power, W_dec=case.W_dec / 10**power)


def fewer(case: Case, share: float, seed: int) -> Case:
    """So many pictures less, of all classes alike."""
    rank = torch.zeros(case.n)
    for c in case.labels.unique():
        mine = (case.labels == c).nonzero()[:, 0]
        rank[mine] = torch.arange(len(mine)) / len(mine)
    return case.select((rank < 1 - share).nonzero()[:, 0])


def cone(case: Case, length: float, seed: int) -> Case:
    """M5's evaluator adds the same to all embeddings, so many times as long as they are."""
    facts = torch.cat([case.facts, torch.full((case.n, 1), float(length))], 1)
    return replace(case, facts=facts / facts.norm(dim=1, keepdim=True))


def meaning(case: Case, share: float, seed: int) -> Case:
    """A share of the live latents change what they mean among themselves: codes and activations both."""
    moved = case.live[torch.randperm(len(case.live), generator=_draws(seed))][: round(share * len(case.live))]
    z = case.z.clone()
    z[..., moved] = case.z[..., moved.roll(1)]
    return replace(case, z=z, x=case.x + (z - case.z) @ case.W_dec)


def style(case: Case, length: float, seed: int) -> Case:
    """All patches are off by one vector, so many standard deviations a dimension, and so are their reconstructions."""
    v = length * torch.randn(case.x.shape[2], generator=_draws(seed))
    return replace(case, x=case.x + v, error=v.expand(case.n, 1, -1))


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(7919 * seed + 17)


@dataclass(frozen=True)
class Dial:
    """`expected`: of metrics that must "fall" or "rise", or that nobody can say of (""). All others must stay."""

    about: str
    strengths: tuple[float, ...]
    turn: Callable[[Case, float, int], Case]
    expected: Mapping[str, str] = field(default_factory=dict)
    spoils: bool = True  # what some metric is said to measure
    planted_only: bool = False


PROBED = ("ovr_auc_1", "ovr_auc_128", "multi_acc_128", "k_acc_area")
FALL = dict.fromkeys(PROBED, "falls")
WORSE = {"fvu": "rises", "preservation": "falls", "preservation_mean_pool": "falls"}
MONO = dict.fromkeys(("monosemanticity_normalized", "monosemanticity"), "falls")
OPEN = {"feature_splits": "", "absorption_unread": "rises"}
UNKNOWN = dict.fromkeys(("preservation", "preservation_mean_pool"), "")
DIALS: dict[str, Dial] = {
    "scattered": Dial("share of pictures, patches shuffled", (0, 0.1, 0.25, 0.5, 1), scattered, {"moran": "falls"}),
    "displaced": Dial("codes moved, patches", (0, 1, 2, 4), displaced, {"moran": "falls", "fvu": "rises"} | UNKNOWN),
    "noise_class": Dial("FVU added, where classes differ", (0, 0.05, 0.2, 0.5, 1), noise_class, WORSE),
    "noise_other": Dial("FVU added, elsewhere", (0, 0.05, 0.2, 0.5, 1), noise_other, {"fvu": "rises"}),
    "lost": Dial("share of latents lost", (0, 0.2, 0.4, 0.7), lost, WORSE | FALL | OPEN),
    "silent": Dial("share of its pictures a latent misses", (0, 0.1, 0.3, 0.6), silent, WORSE | FALL | OPEN),
    "wrong": Dial(
        "share of other pictures a latent fires in",
        (0, 0.03, 0.1, 0.3),
        wrong,
        WORSE | FALL | MONO | OPEN,
        planted_only=True,
    ),
    "faint": Dial(
        "the same, a third as strongly",
        (0, 0.03, 0.1, 0.3),
        faint,
        {"fvu": "rises"} | UNKNOWN | FALL | MONO | OPEN,
        planted_only=True,
    ),
    "mixed": Dial(
        "share of a partner",
        (0, 0.1, 0.2, 0.3, 0.4),
        mixed,
        MONO | {"ovr_auc_1": "falls", "k_acc_area": "falls"} | OPEN | {"absorption_unread": ""},
    ),
    "mislabelled": Dial("share of labels shuffled", (0, 0.1, 0.3, 0.6, 1), mislabelled, FALL | UNKNOWN | OPEN),
    "absorbed": Dial(
        "classes of four absorbed",
        (0, 1, 2, 3),
        absorbed,
        dict.fromkeys(("absorption", "absorption_full", "absorption_share", "child_absorbed"), "rises")
        | {"fvu": "", "feature_splits": "", "k_acc_area": ""}
        | UNKNOWN,
        planted_only=True,
    ),
    "split": Dial(
        "latents that a latent became",
        (1, 2, 3, 4),
        split,
        {"feature_splits": "rises", "ovr_auc_1": "falls", "k_acc_area": "falls"},
    ),
    "shrunk": Dial(
        "share of a map's patches lost, from its edge",
        (0, 0.25, 0.5, 0.75),
        shrunk,
        {"fvu": "rises", "absorption_full": "", "absorption_share": ""} | UNKNOWN,
        spoils=False,
    ),
    "duplicated": Dial("copies of each latent", (1, 2, 4), duplicated, spoils=False),
    "dead": Dial("dead latents added", (0, 128, 512), dead, spoils=False),
    "scaled": Dial("codes larger, powers of ten", (0, -2, -1, 1), scaled, spoils=False),
    "fewer": Dial("share of pictures left out", (0, 0.25, 0.5, 0.75), fewer, spoils=False),
    "cone": Dial("length of what all embeddings share", (0, 1, 3), cone, spoils=False),
}
# Cases of their own: pictures of things of one size, other patches. The first is where the dial starts.
REMADE: dict[str, tuple[str, dict[float, dict[str, Any]]]] = {
    "size": (
        "radius of the thing, pixels of 64",
        {13.5: {"size": "medium"}, 10: {"size": "small"}, 16.5: {"size": "large"}},
    ),
    "grid": ("patches a side", {8: {"patch_px": 8}, 4: {"patch_px": 16}, 16: {"patch_px": 4}}),
}
KEPT = ("cross_domain_selective_kept", "cross_domain_transfer_codes")
OTHER_DIALS: dict[str, Dial] = {
    "meaning": Dial("share of latents that mean another thing", (0, 0.3, 1), meaning, dict.fromkeys(KEPT, "falls")),
    "noise_class": Dial(
        "FVU added, where classes differ", (0, 0.2, 1), noise_class, {"cross_domain_preservation": "falls"}
    ),
    "noise_other": Dial("FVU added, elsewhere", (0, 0.2, 1), noise_other),
    "lost": Dial(
        "share of latents lost",
        (0, 0.3, 0.7),
        lost,
        dict.fromkeys((*KEPT, "cross_domain_preservation", "cross_domain_alive_kept"), "falls"),
    ),
    "style": Dial("one vector added, sd", (0, 0.3, 1), style, spoils=False),
    "fewer": Dial("share of pictures left out", (0, 0.5, 0.75), fewer, spoils=False),
}


# -- numbers


def measure(
    case: Case,
    *,
    n_bootstrap: int = 500,
    memo: dict[str, Any] | None = None,
) -> dict[str, Measured]:
    """Of each metric in METRICS. `memo`, a dict of the caller's, keeps what was measured of the first case that came
    with it, and probes of raw rows: a metric that reads the same tensors of another case is not asked again."""
    memo = {} if memo is None else memo
    setting, probes = settings(case), memo.setdefault("probes", Probes())
    written = (case.z, case.W_dec, case.error, case.x)
    asked: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
        "moran": (lambda: SpatialCoherence(setting), (case.z,)),
        "fvu": (lambda: _Fvu(setting), written),
        "preservation": (lambda: Preservation(setting, probes=probes), (*written, case.labels)),
        "mean": (lambda: Preservation(setting, pool="mean", probes=probes), (*written, case.labels)),
        "probing": (lambda: SparseProbing(setting, ks=(1,)), (case.z, case.labels)),
        "monosemanticity": (lambda: Monosemanticity(setting, embeddings=case.facts), (case.z, case.facts)),
        "absorption": (lambda: Absorption(setting, groups=case.groups), (case.z, case.labels)),
        "projection": (lambda: ProbeProjection(setting, groups=case.groups), (*written, case.labels)),
    }
    # An id is a tensor's own as long as the tensor lives: what is kept is of the first case, and the case with it.
    kept = memo.setdefault("first", (case, {}))
    keys = {name: (name, *map(id, read)) for name, (_, read) in asked.items()}
    made = {name: make() for name, (make, _) in asked.items() if keys[name] not in kept[1]}
    for seen in batches(case):
        for metric in made.values():
            metric.update(seen)
    found = {name: metric.compute(n_bootstrap=n_bootstrap) for name, metric in made.items()}
    if kept[0] is case:
        kept[1].update({keys[name]: measured for name, measured in found.items()})
    out = {}
    for name, key in keys.items():
        measured = found[name] if name in found else kept[1][key]
        out |= {"preservation_mean_pool": measured["preservation"]} if name == "mean" else measured
    return {name: out[name] for of in METRICS.values() for name in of}


class _Fvu(Metric):
    def __init__(self, setting: Setting) -> None:
        self._sums = Reconstruction(setting.shift)

    def update(self, seen: Seen) -> None:
        self._sums.update(seen.target, seen.x_hat)

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        return self._sums.compute(n_bootstrap=n_bootstrap, seed=seed)


def measure_elsewhere(home: Case, other: Case, *, n_bootstrap: int = 500) -> dict[str, Measured]:
    """M6, of `other` with `home` as the domain that it is held against."""
    at_home, there = CrossDomain(settings(home)), settings(other)
    for seen in batches(home):
        at_home.update(seen)
    metric = CrossDomain(there, home=at_home.domain(), same_classes=True)
    for seen in batches(other):
        metric.update(seen)
    found = metric.compute(n_bootstrap=n_bootstrap)
    return {name: found[name] for of in ELSEWHERE.values() for name in of}


Row = dict[str, Any]


def calibrate(
    make: Callable[..., Case],
    seeds: Sequence[int],
    *,
    source: str,
    dials: Mapping[str, Dial] = DIALS,
    remade: Mapping[str, tuple[str, Mapping[float, Mapping[str, Any]]]] | None = None,
    n_bootstrap: int = 500,
    progress: Progress = SILENT,
) -> list[Row]:
    """A row for each dial, strength, seed and metric. `make(seed)` makes a case, given more, those of `remade`."""
    rows: list[Row] = []
    with progress.task(f"calibration, {source}", len(seeds) * (len(dials) + len(remade or {})), "dials") as task:
        for seed in seeds:
            start, memo = make(seed), {}
            for name, dial in dials.items():
                for strength in dial.strengths:
                    case = start if strength == dial.strengths[0] else dial.turn(start, strength, seed)
                    found = measure(case, n_bootstrap=n_bootstrap, memo=memo)
                    rows += _rows(source, name, dial.about, strength, seed, found, dial.expected, dial.spoils)
                task.advance(1)
            for name, (about, cases) in (remade or {}).items():
                for strength, how in cases.items():
                    found = measure(make(seed, **how), n_bootstrap=n_bootstrap)
                    rows += _rows(source, name, about, strength, seed, found, {}, False)
                task.advance(1)
    return rows


def calibrate_elsewhere(
    make: Callable[..., Case], seeds: Sequence[int], *, n_bootstrap: int = 500, progress: Progress = SILENT
) -> list[Row]:
    """The same of M6: the other domain is the case of another seed, with home's directions, and the dials turn it."""
    rows: list[Row] = []
    with progress.task("calibration, other domain", len(seeds) * len(OTHER_DIALS), "dials") as task:
        for seed in seeds:
            home, away = make(seed), make(seed + 1000)
            x = away.x + away.z @ (home.W_dec - away.W_dec)  # the same noise, written in home's directions
            away = replace(away, x=x, W_dec=home.W_dec, class_directions=home.class_directions)
            plain = None
            for name, dial in OTHER_DIALS.items():
                for strength in dial.strengths:
                    if strength == dial.strengths[0] and plain is not None:
                        found = plain
                    else:
                        found = measure_elsewhere(home, dial.turn(away, strength, seed), n_bootstrap=n_bootstrap)
                    plain = plain or found
                    rows += _rows("other domain", name, dial.about, strength, seed, found, dial.expected, dial.spoils)
                task.advance(1)
    return rows


def _rows(
    source: str,
    dial: str,
    about: str,
    strength: float,
    seed: int,
    found: Mapping[str, Measured],
    expected: Mapping[str, str],
    spoils: bool,
) -> list[Row]:
    return [
        {
            "source": source,
            "dial": dial,
            "about": about,
            "spoils": spoils,
            "strength": strength,
            "seed": seed,
            "metric": metric,
            "expected": expected.get(metric, "stays"),
            **{key: value for key, value in one.to_json().items() if key in ("value", "low", "high")},
        }
        for metric, one in found.items()
    ]


# -- verdicts


def moved(start: Sequence[Row], at: Sequence[Row]) -> int:
    """1 or -1 where the intervals of all seeds lie above or below those at the start, by SMALLEST at least; else 0."""
    directions = set()
    for a, b in zip(start, at, strict=True):
        ends = [row[end] if row[end] is not None else row["value"] for row in (a, b) for end in ("low", "high")]
        if any(end is None for end in ends):
            return 0
        low, high, other_low, other_high = ends
        change = b["value"] - a["value"]
        apart = (other_low > high) - (other_high < low)
        directions.add(apart if abs(change) >= SMALLEST and apart * change > 0 else 0)
    return directions.pop() if len(directions) == 1 else 0


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """One of each source, dial and metric: see the top of this file. `change`: of the mean over seeds, the largest one
    where it stays, else that at the last strength. `since`: the first strength at which it had moved."""
    grouped: dict[tuple[str, str, str], dict[float, list[Row]]] = {}
    for row in rows:
        by_strength = grouped.setdefault((row["source"], row["dial"], row["metric"]), {})
        by_strength.setdefault(row["strength"], []).append(row)
    return [_verdict(key, by_strength) for key, by_strength in grouped.items()]


def _verdict(key: tuple[str, str, str], by_strength: Mapping[float, Sequence[Row]]) -> Row:
    strengths = list(by_strength)
    ordered = [sorted(by_strength[strength], key=lambda row: row["seed"]) for strength in strengths]
    expected = ordered[0][0]["expected"]
    values = np.array([[math.nan if row["value"] is None else row["value"] for row in at] for at in ordered]).mean(1)
    moves = [moved(ordered[0], at) for at in ordered[1:]]
    changes = values[1:] - values[0]
    since = next((s for s, move in zip(strengths[1:], moves, strict=True) if move), None)
    change = float(changes[-1])
    if expected == "":
        verdict = "not asked"
    elif np.isnan(values).any():
        verdict = "no number"
    elif expected == "stays":
        change = float(changes[np.abs(changes).argmax()])
        verdict = "moved" if any(moves) else "stays"
    else:
        sign = 1 if expected == "rises" else -1
        back = (sign * np.diff(values) < -SMALLEST).any()
        if moves[-1] == sign and not back:
            verdict = "yes"
        elif sign in moves:
            verdict = "turns"
        else:
            verdict = "backwards" if -sign in moves else "blind"
        since = next((s for s, move in zip(strengths[1:], moves, strict=True) if move == sign), None)
    return {
        **dict(zip(("source", "dial", "metric"), key, strict=True)),
        **{name: ordered[0][0][name] for name in ("about", "spoils", "expected")},
        "verdict": verdict,
        "start": None if math.isnan(values[0]) else float(values[0]),
        "change": None if math.isnan(change) else change,
        "since": since,
    }


def summary(found: Sequence[Row]) -> list[Row]:
    """Of each source and metric: how many of the dials that must move it do; which do not; what else moves it; a word.

    "sound": all, and nothing else. "follows": all, and other things too. "partly": some. "no": none. "": none asked.
    """
    out: dict[tuple[str, str], Row] = {}
    for one in found:
        row = out.setdefault(
            (one["source"], one["metric"]),
            {"source": one["source"], "metric": one["metric"], "asked": 0, "yes": 0, "missed": [], "also": []},
        )
        if one["expected"] in ("falls", "rises"):
            row["asked"] += 1
            row["yes"] += one["verdict"] == "yes"
            if one["verdict"] != "yes":
                row["missed"].append(f"{one['dial']} ({one['verdict']})")
        elif one["verdict"] == "moved":
            row["also"].append((one["dial"], one["change"]))
    for row in out.values():
        if not row["asked"]:
            row["word"] = ""
        elif row["yes"] == row["asked"]:
            row["word"] = "follows" if row["also"] else "sound"
        else:
            row["word"] = "partly" if row["yes"] else "no"
    return list(out.values())
