"""Defences against written words: chosen on some pictures, fonts and words, measured on others.

    F(tau)      latents larger with words than without            select (Eq. 9), over all tokens, or under the text
    F*          and those whose directions are near: cos > lambda  expanded
    the choice  of all (tau, lambda): the highest accuracy under attack on validation pictures, of those that cost at
                most one point of clean accuracy there; of equals the fewest latents
    back        (defended - attacked) / (clean - attacked)         of the accuracy that the words took

Each picture is run once up to the point; a defence is then tried with the blocks after it alone, on the pictures that
it changes. Intervals: Wilson's for shares, a paired bootstrap over pictures for what comes back and what is lost, and
McNemar's exact test.

"Steering CLIP's vision transformer with sparse autoencoders", section 7.2; SPEC rows 117-119 and 125-130.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.images.attacked import AttackedImages
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.heads import Head
from vitrail.metrics.measured import Measured, over_images
from vitrail.progress import SILENT, Progress
from vitrail.steering.ablation import logits_of
from vitrail.steering.defences import Defence, Removal
from vitrail.steering.groups import mcnemar, wilson
from vitrail.steering.interventions import Latents, marked_tokens
from vitrail.steering.routes import class_token_of_last
from vitrail.steering.selection import Site, expanded, select

EMBEDDING = "hook_image_embed"
CLEAN_LOSS = 0.01  # SPEC row 127
TAUS = tuple(np.logspace(-3, 1, 17).tolist())
LAMBDAS = (1.0, 0.6, 0.4, 0.2)  # 1: no expansion
Over = Literal["tokens", "text"]

# ------------------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True, eq=False)
class Shown:
    """Pictures at a point. `x`: (n, t, d). `right[i, c]`: class c is an answer to picture i. `written`: the class whose
    name stands on it, -1 for none. `said`: what the model answers as it is. `text`: patches with text, where known."""

    ids: tuple[str, ...]
    x: Float[Tensor, "n t d"]
    right: Bool[np.ndarray, "n c"]
    written: Int[np.ndarray, " n"]
    said: Int[np.ndarray, " n"]
    text: Bool[Tensor, "n p"] | None = None

    @property
    def n(self) -> int:
        return len(self.x)

    def is_right(self, answers: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return self.right[np.arange(self.n), answers]

    def chosen(self, marks: Bool[np.ndarray, " n"]) -> "Shown":
        kept = torch.from_numpy(marks)
        text = None if self.text is None else self.text[kept]
        ids = tuple(one for one, mark in zip(self.ids, marks.tolist(), strict=True) if mark)
        return Shown(ids, self.x[kept], self.right[marks], self.written[marks], self.said[marks], text)


@torch.inference_mode()
def look_at(
    backbone: Backbone,
    images: ImageSource,
    point: str,
    head: Head,
    classes: Sequence[str],
    *,
    present: Mapping[str, Collection[str]] | None = None,
    batch_size: int = 32,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> Shown:
    """Unreadable pictures are left out. `present`: by id, all class names that are true of a picture; else its label.

    Raises ValueError for a point without tokens, pictures without a right answer, or where none can be read.
    """
    if not backbone.point(point).has_tokens:
        raise ValueError(f"{point} has one row an image: choose a point between blocks, where patches are.")
    xs, said, positions, texts = [], [], [], []
    device, grid = next(backbone.parameters()).device, backbone.grid
    batches = load_batches(images, range(len(images)), backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("look", len(images), "images") as task:
        for batch in batches:
            task.advance(len(batch.positions) + len(batch.skipped))
            if batch.positions:
                seen = backbone.activations(batch.images.to(device), list(dict.fromkeys([point, EMBEDDING])))
                xs.append(seen[point].float().cpu())
                said.append(logits_of(backbone, seen[EMBEDDING], head).argmax(1).cpu())
                positions += batch.positions
    if not positions:
        raise ValueError(f"none of the {len(images)} pictures of {images.spec} could be read.")
    if isinstance(images, AttackedImages):
        texts = [text_patches(images, i, backbone) for i in positions]
    records = [images.record(i) for i in positions]
    right, place = np.zeros((len(records), len(classes)), dtype=bool), {name: j for j, name in enumerate(classes)}
    for i, record in enumerate(records):
        names = [record.class_name] if present is None else list(present.get(record.id, ()))
        right[i, [place[name] for name in names if name in place]] = True
    written = np.full(len(records), -1)
    if isinstance(images, AttackedImages):
        words = [images.written(i) for i in positions]
        written = np.array([place.get(one.word, -1) if one else -1 for one in words])
    text = torch.stack(texts).view(-1, grid.n_patches) if texts else None
    ids = tuple(record.id for record in records)
    return Shown(ids, torch.cat(xs), right, written, torch.cat(said).numpy(), text)


def text_patches(images: AttackedImages, i: int, backbone: Backbone) -> Bool[Tensor, "h w"]:
    """The patches of the model's crop that show any of the text: its mask goes the picture's own way."""
    from PIL import Image

    mask = Image.fromarray(images.mask(i).astype(np.uint8) * 255).convert("RGB")
    blank = Image.new("RGB", mask.size)
    shown = (backbone.preprocess(mask) - backbone.preprocess(blank)).amax(0)
    height, width = backbone.grid.height, backbone.grid.width
    most = float(backbone.preprocess(Image.new("RGB", (32, 32), "white")).amax() - backbone.preprocess(blank).amax())
    share = torch.nn.functional.adaptive_avg_pool2d((shown > 0.25 * most).float()[None], (height, width))[0]
    return share > 0.02


# ------------------------------------------------------------------------------------------------------------- answers


class Rest:
    """From a point's values to answers. Of the last block the class token alone, where the model allows it.

    `half`: the blocks run in bfloat16 (autocast), the edits in fp32 all the same.
    """

    def __init__(
        self, backbone: Backbone, point: str, head: Head, x: Float[Tensor, "n t d"], *, half: bool = False
    ) -> None:
        if point.rpartition(".")[2] not in ("hook_resid_pre", "hook_resid_post"):
            raise ValueError(f"defences are tried between blocks (hook_resid_pre, hook_resid_post), not at {point}.")
        self.backbone, self.head, self.start = backbone, head, backbone.point(point).blocks_needed
        self._device = next(backbone.parameters()).device
        self._half = half
        with torch.no_grad():
            self._last = class_token_of_last(backbone, x[:4].to(self._device), self.start)

    @torch.no_grad()
    def answers(self, x: Float[Tensor, "n t d"], batch_size: int = 64) -> Int[np.ndarray, " n"]:
        parts = [self._some(part.to(self._device)).argmax(1).cpu() for part in x.split(batch_size)]
        return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.int64)

    def _some(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b c"]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            if self._last is None:
                embedding = self.backbone.pool(self.backbone.run_blocks(x, start=self.start))
            else:
                leaving = self.backbone.run_blocks(x, start=self.start, stop=self.backbone.n_layers - 1)
                embedding = self.backbone.pool(self._last(leaving))
        return logits_of(self.backbone, embedding.float(), self.head)

    def with_head(self, head: Head) -> "Rest":
        other = copy(self)
        other.head = head
        return other

    def defended(self, shown: Shown, defence: Defence, batch_size: int = 64) -> Int[np.ndarray, " n"]:
        """Answers with the defence; pictures that it does not change keep theirs, and are not run again."""
        said = shown.said.copy()
        for start in range(0, shown.n, batch_size):
            x = shown.x[start : start + batch_size].to(self._device)
            after = defence(x)
            changed = (after != x).flatten(1).any(1).cpu()
            if bool(changed.any()):
                places = start + np.flatnonzero(changed.numpy())
                said[places] = self.answers(after[changed], batch_size)
        return said


# ----------------------------------------------------------------------------------------------------------- selection


@torch.no_grad()
def mean_rows(site: Site, backbone: Backbone, shown: Shown, over: Over = "tokens") -> Float[Tensor, " n_basis"]:
    """Each coordinate's mean over the site's tokens, or over the patches under text ("text"), all pictures together.

    Raises ValueError where the text's place is not known.
    """
    marks = marked_tokens(backbone, site.point, site.where)[0].expand(shown.x.shape[:2])
    if over == "text":
        if shown.text is None or not bool(shown.text.any()):
            raise ValueError("over='text' needs pictures of which it is known where the text stands.")
        marks = torch.nn.functional.pad(shown.text, (backbone.grid.n_special, 0), value=False)
    total, n = torch.zeros(site.basis.n, dtype=torch.float64), 0
    for rows, marked in zip(shown.x.split(64), marks.split(64), strict=True):
        chosen = rows[marked]
        n += len(chosen)
        if isinstance(site.basis, Latents):
            codes = site.basis.coder.encode_sparse(chosen)
            total.index_add_(0, codes.indices.long(), codes.values.double())
        else:
            total += site.basis.read(chosen).columns(torch.arange(site.basis.n)).double().sum(0)
    return (total / max(n, 1)).float()


@dataclass(frozen=True, eq=False)
class Candidate:
    """A set of features and how it was found: `over` which tokens, above which tau, expanded by which lambda."""

    features: Int[np.ndarray, " m"]
    over: str
    tau: float
    lam: float

    def to_json(self) -> dict[str, Any]:
        return {"n": len(self.features), "over": self.over, "tau": self.tau, "lambda": self.lam}


def candidates(
    site: Site,
    backbone: Backbone,
    clean: Shown,
    attacked: Shown,
    *,
    overs: Sequence[Over] = ("tokens", "text"),
    taus: Sequence[float] = TAUS,
    lambdas: Sequence[float] = LAMBDAS,
    most: float = 0.5,
) -> list[Candidate]:
    """Every different set, by (tau, lambda), of at most `most` of all features. Lambda expands latents alone."""
    found: dict[bytes, Candidate] = {}
    outside = mean_rows(site, backbone, clean, "tokens")
    for over in overs:
        inside = mean_rows(site, backbone, attacked, over)
        for tau in sorted(taus, reverse=True):
            chosen = select(inside, outside, tau)
            for lam in lambdas if isinstance(site.basis, Latents) else (1.0,):
                grown = chosen
                if lam < 1 and isinstance(site.basis, Latents):
                    grown = expanded(chosen, site.basis.coder.W_dec, lam)
                if 0 < len(grown) <= most * site.basis.n:
                    found.setdefault(grown.tobytes(), Candidate(grown, over, tau, lam))
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Tried:
    """A defence on the validation pictures: accuracies there, and what clean accuracy it costs (>= 0: lost)."""

    defence: Defence
    clean: float
    attacked: float
    clean_loss: float
    about: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {**self.about, "clean": self.clean, "attacked": self.attacked, "clean_loss": self.clean_loss}


def sweep(
    rest: Rest,
    clean: Shown,
    attacked: Shown,
    defences: Sequence[tuple[Defence, Mapping[str, Any]]],
    *,
    progress: Progress = SILENT,
) -> list[Tried]:
    tried, base = [], clean.is_right(clean.said).mean()
    with progress.task("sweep", len(defences), "defences") as task:
        for defence, about in defences:
            after = clean.is_right(rest.defended(clean, defence)).mean()
            under = attacked.is_right(rest.defended(attacked, defence)).mean()
            tried.append(Tried(defence, float(after), float(under), float(base - after), dict(about)))
            task.advance(1)
    return tried


def best(tried: Sequence[Tried], *, clean_loss: float = CLEAN_LOSS) -> Tried | None:
    """The highest accuracy under attack at no more than this clean loss; of equals the one with fewer features."""
    allowed = [one for one in tried if one.clean_loss <= clean_loss + 1e-9]
    return max(allowed, key=lambda one: (one.attacked, -int(one.about.get("n", 0))), default=None)


def removals(
    backbone: Backbone, site: Site, found: Sequence[Candidate], *, name: str = ""
) -> list[tuple[Defence, Mapping[str, Any]]]:
    return [(Removal(backbone, site, one.features, name=name), one.to_json()) for one in found]


# ---------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Row:
    """A defence under a condition. `back`: None on clean pictures. `change`: accuracy less that without the defence."""

    defence: str
    condition: str
    n: int
    right: int
    said_word: float | None
    change: Measured
    back: Measured | None
    p: float

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    def to_json(self) -> dict[str, Any]:
        low, high = wilson(self.right, self.n)
        told: dict[str, Any] = {"defence": self.defence, "condition": self.condition, "n": self.n}
        told |= {"accuracy": self.accuracy, "low": low, "high": high, "said_word": self.said_word}
        told |= {"change": self.change.to_json(), "p": self.p}
        return told | {"back": None if self.back is None else self.back.to_json()}


def evaluate(
    rest: Rest,
    clean: Shown,
    attacked: Mapping[str, Shown],
    defences: Sequence[Defence],
    *,
    heads: Mapping[str, Head] | None = None,
    with_clean: bool = True,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> list[Row]:
    """Rows of "none" and of every defence, on the clean pictures (unless `with_clean` is False) and under every attack.

    `attacked` may hold fewer of the clean pictures, by id. `heads`: further text sides (a prefix) by name, each alone
    and beside every defence.
    """
    sides = {"": rest, **{name: rest.with_head(head) for name, head in (heads or {}).items()}}
    named: list[tuple[str, Defence | None, Rest, bool]] = []
    for side, here in sides.items():
        for defence in (None, *defences):
            parts = [part for part in (side, defence.name if defence else "") if part]
            named.append((" + ".join(parts) or "none", defence, here, side != ""))
    place = {one: i for i, one in enumerate(clean.ids)}
    rows = []
    for name, defence, here, other_text in named if with_clean else ():
        answers = _answers(here, clean, defence, other_text)
        rows.append(_row(name, "clean", clean, clean.said, answers, None, n_bootstrap, seed))
    for condition, shown in attacked.items():
        at = np.array([place[one] for one in shown.ids])
        whole = clean.is_right(clean.said)[at]
        for name, defence, here, other_text in named:
            answers = _answers(here, shown, defence, other_text)
            rows.append(_row(name, condition, shown, shown.said, answers, whole, n_bootstrap, seed))
    return rows


def _answers(rest: Rest, shown: Shown, defence: Defence | None, other_text: bool) -> Int[np.ndarray, " n"]:
    if not other_text:
        return shown.said if defence is None else rest.defended(shown, defence)
    parts = [rest.answers(part if defence is None else defence(part)) for part in shown.x.split(64)]
    return np.concatenate(parts)


def _row(
    name: str,
    condition: str,
    shown: Shown,
    before: Int[np.ndarray, " n"],
    after: Int[np.ndarray, " n"],
    whole: Bool[np.ndarray, " n"] | None,
    n_bootstrap: int,
    seed: int,
) -> Row:
    was, now = shown.is_right(before), shown.is_right(after)
    sums = {"n": np.ones(shown.n), "was": was.astype(float), "now": now.astype(float)}
    change = over_images(
        sums, lambda s: (s["now"] - s["was"]) / s["n"], definition="accuracy less", n_bootstrap=n_bootstrap, seed=seed
    )
    back = None
    if whole is not None:
        sums["whole"] = whole.astype(float)
        back = over_images(
            sums,
            lambda s: (s["now"] - s["was"]) / (s["whole"] - s["was"]),
            definition="share of the loss",
            n_bootstrap=n_bootstrap,
            seed=seed,
        )
    words = shown.written >= 0
    said = float((after == shown.written)[words].mean()) if words.any() else None
    p = mcnemar(int((~was & now).sum()), int((was & ~now).sum()))
    return Row(name, condition, shown.n, int(now.sum()), said, change, back, p)


def random_removals(
    backbone: Backbone, site: Site, n: int, *, draws: int = 20, seed: int = 0, of: Int[np.ndarray, " m"] | None = None
) -> list[Removal]:
    """The control: sets of n features drawn evenly from `of` (those that are alive), or from all (SPEC row 123)."""
    pool, rng = np.arange(site.basis.n) if of is None else of, np.random.default_rng(seed)
    if not 1 <= n <= len(pool):
        raise ValueError(f"{n} features cannot be drawn from {len(pool)}.")
    drawn = [rng.choice(pool, n, replace=False) for _ in range(draws)]
    return [Removal(backbone, site, one, name=f"{n} random {site.basis.kind}") for one in drawn]
