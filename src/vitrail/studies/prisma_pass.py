"""The pass over the images behind Prisma's table: what is put where, and each row's running sums.

Sums          what becomes one row: its metrics, and what the model made of each image
Measurement   one coder's sums; of a crosscoder, also those of each of its points alone
Together      several coders spliced in at once
Table         shows each batch to all of them
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.coders.columns import column_slices
from vitrail.coders.sparse import Codes
from vitrail.metrics.heads import Head
from vitrail.metrics.measured import Measured
from vitrail.metrics.passing import Curve, Metric, Seen, Setting
from vitrail.metrics.places import Place, Tokens, check_place, decoded
from vitrail.metrics.reconstruction import Reconstruction
from vitrail.metrics.sparsity import Sparsity
from vitrail.metrics.substitution import PerImage, Rerun, class_columns, image_cosine
from vitrail.store.tokens import patch_slice, stored_kind

MetricFactory = Callable[[Setting], Metric]


class Reconstructs(Metric):
    """`Reconstruction` of what a coder writes."""

    def __init__(self, shift: Float[Tensor, " d_out"]) -> None:
        self._sums = Reconstruction(shift)

    def update(self, seen: Seen) -> None:
        self._sums.update(seen.target, seen.x_hat)

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        return self._sums.compute(n_bootstrap=n_bootstrap, seed=seed)


class CountsLatents(Metric):
    """`Sparsity` of a coder's codes."""

    def __init__(self, *, d_sae: int, n_tokens: int, cls_token: int | None) -> None:
        self._sums = Sparsity(d_sae=d_sae, n_tokens=n_tokens, cls_token=cls_token)

    def update(self, seen: Seen) -> None:
        self._sums.update(seen.codes)

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        return self._sums.compute(n_bootstrap=n_bootstrap, seed=seed)


class Sums:
    """What becomes one row: its metrics, and what the model made of each image with the reconstruction put in."""

    def __init__(self, metrics: Sequence[Metric], place: Place, definition: str) -> None:
        self.place, self.definition = place, definition
        self.metrics: dict[str, Metric] = {}
        for metric in metrics:
            name, n = type(metric).__name__, 2
            while name in self.metrics:
                name, n = f"{type(metric).__name__} {n}", n + 1
            self.metrics[name] = metric
        self.seconds = dict.fromkeys(self.metrics, 0.0)
        self.substituted = PerImage()

    def update(self, seen: Seen) -> None:
        for name, metric in self.metrics.items():
            began = time.perf_counter()
            metric.update(seen)
            self.seconds[name] += time.perf_counter() - began

    def compute(self, *, n_bootstrap: int, seed: int) -> tuple[dict[str, Measured], dict[str, Curve]]:
        """Of two metrics that give one name to two numbers, the later's is kept as "name (Metric)", with a warning."""
        measured: dict[str, Measured] = {}
        curves: dict[str, Curve] = {}
        for name, metric in self.metrics.items():
            began = time.perf_counter()
            numbers = metric.compute(n_bootstrap=n_bootstrap, seed=seed)
            for found, into in ((numbers, measured), (metric.curves(), curves)):
                for key, value in found.items():
                    if key in into and into[key] != value:
                        warnings.warn(
                            f"two metrics measure {key!r}; that of {name} is {f'{key} ({name})'!r}", stacklevel=2
                        )
                        key = f"{key} ({name})"
                    into[key] = value  # pyright: ignore[reportArgumentType]
            self.seconds[name] += time.perf_counter() - began
        return measured, curves


class Measurement:
    """One coder's running sums; where it writes several points, also those of each point alone."""

    def __init__(
        self,
        coder: SparseCoder,
        place: Place,
        metrics: Sequence[Metric],
        *,
        definition: str,
        at_most: int | None = None,
    ) -> None:
        self.coder, self.place, self._at_most = coder.eval(), place, at_most
        several = len(place.writes) > 1
        self.sums = Sums(metrics, place, f"{definition}/at-once" if several else definition)
        self.parts: dict[str, tuple[slice, Sums]] = {}

    def add_parts(self, widths: Sequence[int], shift: Float[Tensor, " d_out"], definition: str) -> None:
        for point, columns in zip(self.place.writes, column_slices(widths), strict=True):
            sums = Sums([Reconstructs(shift[columns])], Place((point,), (point,)), definition)
            self.parts[point] = (columns, sums)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Codes:
        """The coder's codes; a control's, cut to the number of latents it may spend."""
        codes = self.coder.encode_sparse(x)
        return codes if self._at_most is None else codes.top(self._at_most)

    def reconstruct(self, x: Float[Tensor, "b t d_in"]) -> tuple[Codes, Float[Tensor, "b t d_out"]]:
        rows = x.flatten(0, 1)
        codes = self.encode(rows)
        return codes, decoded(self.coder, codes, rows).reshape(*x.shape[:2], self.coder.d_out)

    def update(
        self,
        x: Float[Tensor, "b t d_in"],
        target: Float[Tensor, "b t d_out"] | None = None,
        labels: Int[Tensor, " b"] | None = None,
        positions: Sequence[int] = (),
    ) -> Seen:
        """Whole images' rows, raw. `target`: what is reconstructed, where it is not `x`."""
        target = x if target is None else target
        codes, x_hat = self.reconstruct(x)
        seen = Seen(x=x, target=target, codes=codes, x_hat=x_hat, labels=labels, positions=positions)
        self.sums.update(seen)
        for columns, sums in self.parts.values():
            of_point = Seen(x=target[..., columns], target=target[..., columns], codes=codes, x_hat=x_hat[..., columns])
            sums.update(of_point)
        return seen


@dataclass(frozen=True)
class Contender:
    """A coder or a control before the pass."""

    coder: SparseCoder
    place: Place
    control_of: str | None = None
    at_most: int | None = None
    shift: Tensor | None = None
    given_as: str = ""  # the coder's or the set's name among those given
    in_set: bool = False
    control: str | None = None  # its own name, without the coder's

    def name_of_set(self) -> str:
        """Of the row of all members, or of the same control of all members, together."""
        return self.given_as if self.control is None else f"{self.given_as} / {self.control}"


class Together:
    """Several coders, each at its own point, spliced in at the same time. `first`: as one of them was given."""

    def __init__(self, members: Mapping[str, Measurement], sums: Sums, first: Contender) -> None:
        self.members, self.sums, self.first = members, sums, first

    def update(self, seen: Sequence[Seen]) -> None:
        """`seen`: what each member made of the clean run, in their order."""
        target = torch.cat([one.target for one in seen], 2)
        joined = Seen(
            x=target,
            target=target,
            codes=side_by_side([one.codes for one in seen]),
            x_hat=torch.cat([one.x_hat for one in seen], 2),
            labels=seen[0].labels,
            positions=seen[0].positions,
        )
        self.sums.update(joined)


def side_by_side(parts: Sequence[Codes]) -> Codes:
    """Codes of the same rows by several coders, as those of one: latents numbered one coder after another."""
    starts = np.cumsum([0, *(part.d_sae for part in parts)]).tolist()
    rows = torch.cat([part.rows() for part in parts])
    indices = torch.cat([part.indices.long() + start for part, start in zip(parts, starts, strict=False)])
    order = torch.sort(rows, stable=True).indices
    values = torch.cat([part.values for part in parts])
    return Codes.from_entries(rows[order], indices[order], values[order], n=parts[0].n, d_sae=starts[-1])


class Table:
    """The pass over the images."""

    def __init__(
        self,
        backbone: Backbone,
        contenders: Mapping[str, Contender],
        *,
        tokens: str,
        head: Head | None,
        substitution: str,
        metrics: Sequence[MetricFactory] = (),
        n_images: int = 0,
        seed: int = 0,
    ) -> None:
        self.backbone, self.head, self.contenders = backbone, head, contenders
        places = [contender.place for contender in contenders.values()]
        self.points = tuple(dict.fromkeys(point for place in places for point in (*place.reads, *place.writes)))
        kinds = {stored_kind(tokens, has_tokens=backbone.point(point).has_tokens) for point in self.points}
        self.tokens = stored_kind(tokens, has_tokens=backbone.point(places[0].reads[0]).has_tokens)
        self.whole = substitution == "all-tokens"
        if self.whole and "pooled" in kinds:
            raise ValueError("pooled rows are one per image: there are no other tokens for substitution='all-tokens'.")
        self.measured_tokens = Tokens(backbone.grid, self.tokens)
        self.put_tokens = Tokens(backbone.grid, "all") if self.whole else self.measured_tokens
        self.substitution = substitution
        self._metrics, self._limit, self._seed = metrics, n_images, seed
        self.clean = PerImage()
        self.zeroed: dict[tuple[str, ...], PerImage] = {}
        self.measurements: dict[str, Measurement] = {}
        self.sets: dict[str, Together] = {}
        self.n_images = 0
        for name, contender in contenders.items():
            check_place(backbone, contender.coder, contender.place, name=name)

    def update(
        self, images: Float[Tensor, "b 3 h w"], labels: Int[Tensor, " b"] | None, positions: Sequence[int] = ()
    ) -> None:
        run = Rerun(self.backbone, self.points, images)
        self.n_images += len(images)
        if not self.measurements:
            self._begin(run.activations)
        classes = None if self.head is None else labels
        if self.head is not None and classes is not None:
            self.clean.add(class_columns(self.head, run.output, classes))
            for points, zeroed in self.zeroed.items():
                values = {point: self._zero(run.activations[point]) for point in points}
                zeroed.add(class_columns(self.head, run.replaced_at(values)[0], classes))
        seen: dict[Measurement, Seen] = {}
        for measurement in self.measurements.values():
            reads, writes = measurement.place.reads, measurement.place.writes
            x = self.measured_tokens.rows(run.activations, reads)
            target = x if reads == writes else self.measured_tokens.rows(run.activations, writes)
            seen[measurement] = measurement.update(x, target, labels, positions)
            x_hat = self._to_put(measurement, run.activations, seen[measurement])
            values = self.put_tokens.put_all(run.activations, writes, x_hat)
            self._substitute(measurement.sums, run, lambda v=values: run.replaced_at(v), classes)
            for point, (_, sums) in measurement.parts.items():
                self._substitute(sums, run, lambda p=point, v=values: run.replaced_at({p: v[p]}), classes)
        for together in self.sets.values():
            together.update([seen[member] for member in together.members.values()])
            edits = {point: self._in_turn(point, member) for point, member in together.members.items()}
            self._substitute(together.sums, run, lambda e=edits: run.edited(e), classes)

    def _substitute(
        self,
        sums: Sums,
        run: Rerun,
        replaced: Callable[[], tuple[Tensor, Tensor]],
        labels: Int[Tensor, " b"] | None,
    ) -> None:
        output, embedding = replaced()
        sums.substituted.add({"cosine": image_cosine(run.embedding, embedding)})
        if self.head is not None and labels is not None:
            sums.substituted.add(class_columns(self.head, output, labels))

    def _to_put(self, measurement: Measurement, activations: Mapping[str, Tensor], seen: Seen) -> Tensor:
        """The reconstruction of the tokens that are replaced: those measured, or every position, whatever the coder
        was trained on.
        """
        if self.put_tokens == self.measured_tokens:
            return seen.x_hat
        return measurement.reconstruct(self.put_tokens.rows(activations, measurement.place.reads))[1]

    def _in_turn(self, point: str, member: Measurement) -> Callable[[Tensor], Tensor]:
        def edit(activation: Tensor) -> Tensor:
            rows = self.put_tokens.rows({point: activation}, (point,))
            return self.put_tokens.put(activation, member.reconstruct(rows)[1])

        return edit

    def _zero(self, activation: Tensor) -> Tensor:
        rows = self.put_tokens.rows({"": activation}, ("",))
        return self.put_tokens.put(activation, torch.zeros_like(rows))

    def _begin(self, activations: Mapping[str, Tensor]) -> None:
        for name, contender in self.contenders.items():
            coder, place = contender.coder, contender.place
            n_tokens = self.measured_tokens.rows(activations, place.reads).shape[1]
            if n_tokens != (m := self.measured_tokens.rows(activations, place.writes).shape[1]):
                raise ValueError(
                    f"{place.reads[0]} has {n_tokens} {self.tokens!r} rows per image and {place.writes[0]} has {m}: "
                    f"coder {name} needs one for one."
                )
            shift = torch.zeros(coder.d_out) if contender.shift is None else contender.shift
            setting = self._setting(coder, n_tokens, shift)
            metrics: list[Metric] = [
                Reconstructs(shift),
                CountsLatents(d_sae=coder.d_sae, n_tokens=n_tokens, cls_token=setting.cls_token),
                *(make(setting) for make in self._metrics),
            ]
            measurement = Measurement(coder, place, metrics, definition=self.substitution, at_most=contender.at_most)
            if len(place.writes) > 1:
                widths = [self.backbone.point(point).width for point in place.writes]
                measurement.add_parts(widths, shift, self.substitution)
            self.measurements[name] = measurement
        for name in dict.fromkeys(one.name_of_set() for one in self.contenders.values() if one.in_set):
            self.sets[name] = self._together(name, activations)
        rows = [measurement.sums for measurement in self.measurements.values()]
        rows += [sums for measurement in self.measurements.values() for _, sums in measurement.parts.values()]
        rows += [together.sums for together in self.sets.values()]
        self.zeroed = {sums.place.writes: PerImage() for sums in rows}

    def _together(self, name: str, activations: Mapping[str, Tensor]) -> Together:
        found = {
            one.place.writes[0]: (key, one)
            for key, one in self.contenders.items()
            if one.in_set and one.name_of_set() == name
        }
        points = tuple(point for point in self.backbone.points if point in found)  # in order of computation
        contenders = [found[point][1] for point in points]
        n_tokens = self.measured_tokens.rows(activations, points).shape[1]
        shifts = [torch.zeros(one.coder.d_out) if one.shift is None else one.shift for one in contenders]
        counts = CountsLatents(
            d_sae=sum(one.coder.d_sae for one in contenders), n_tokens=n_tokens, cls_token=self._cls_token(n_tokens)
        )
        shift = torch.cat([one.double().cpu() for one in shifts])
        sums = Sums([Reconstructs(shift), counts], Place(points, points), f"{self.substitution}/in-turn")
        return Together({point: self.measurements[found[point][0]] for point in points}, sums, contenders[0])

    def _setting(self, coder: SparseCoder, n_tokens: int, shift: Tensor) -> Setting:
        grid, patches = self.backbone.grid, None
        if self.tokens == "spatial":
            patches = slice(0, n_tokens)
        elif self.tokens == "all" and n_tokens in (grid.n_tokens, grid.n_patches):
            patches = patch_slice(grid, n_tokens)
        return Setting(
            coder=coder,
            n_tokens=n_tokens,
            tokens=self.tokens,
            grid=grid,
            cls_token=self._cls_token(n_tokens),
            patches=patches,
            n_images=self._limit,
            shift=shift,
            seed=self._seed,
        )

    def _cls_token(self, n_tokens: int) -> int | None:
        grid = self.backbone.grid
        has_cls = grid.n_cls > 0 and self.tokens in ("all", "cls") and n_tokens != 0
        return 0 if has_cls and n_tokens in (1, grid.n_tokens) else None
