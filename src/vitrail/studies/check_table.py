"""Tables of coders, published or our own, checked against themselves: what cannot be, and what contradicts itself.

    % CE recovered     100 (zero - recon) / (zero - CE), from the row's own three, within what their digits leave open
    CE of cosines      in ln(1 + (C - 1) e^-2) .. ln(1 + (C - 1) e^2) for C classes at logit scale 1
    ranges             EV at most 1 (100 %), FVU not negative, shares in 0..1, cosines in -1..1, L0 at most d_sae
    EV, FVU            add up to 1
    L0, sparsity       L0 = (1 - sparsity) d_sae; sum over an image's tokens = tokens x L0 within 15 %
    DO                 not below the Welch bound; stability not below that of random directions
    accuracies         overall is the mean of its groups, weighted by their sizes, and not below the worst
    shares, counts     a share is its count over its total; those that meet two conditions are not more than meet one
    Spearman           rho is that of the two rankings; p is the exact one for up to 8 pairs
    repeats            numbers that are another row's (check_repeats.py)

A number is read as the interval that rounds to it: 6.762 is 6.7615..6.7625. A finding says that no numbers in these
intervals agree; it does not say which of them is wrong. Columns are known by name (`ALIASES`); what a table does not
say (classes, tokens, widths) can be given for all of its rows. SPEC section N lists what is wrong in the papers.
"""

import csv
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from itertools import permutations, product
from pathlib import Path

from vitrail.metrics.orthogonality import welch_bound
from vitrail.metrics.stability import limit_floor

ROUNDING = 1e-6  # relative: numbers of full precision were computed in another order
TOKEN_SLACK = 0.15  # means over other images than those of L0
EXACT_UP_TO = 8  # pairs whose permutations are gone through

ALIASES: dict[str, tuple[str, ...]] = {
    "ce": ("ce", "clean_ce"),
    "recon_ce": ("recon_ce", "recon"),
    "zero_ce": ("zero_abl_ce", "zero_ce", "zero"),
    "ce_recovered": ("pct_ce_recovered", "%_ce_recovered", "ce_recovered", "printed"),
    "ce_unscaled": ("ce_unscaled",),
    "recon_ce_unscaled": ("recon_ce_unscaled",),
    "zero_ce_unscaled": ("zero_ce_unscaled",),
    "ce_recovered_unscaled": ("ce_recovered_unscaled",),
    "ev_percent": ("pct_explained_var", "%_explained_variance", "pct_explained_variance"),
    "ev": ("explained_var", "explained_variance", "evr", "ev"),
    "fvu": ("fvu",),
    "l0": ("l0_tokens", "avg_l0", "l0"),
    "l0_cls": ("l0_cls", "avg_cls_l0"),
    "l0_image_sum": ("l0_image_sum", "avg_img_l0"),
    "sparsity": ("sparsity", "l0_zero_fraction"),
    "d_sae": ("d_sae", "latent_size"),
    "d_in": ("d_in",),
    "k": ("k",),
    "n_tokens": ("n_tokens", "tokens_an_image"),
    "n_classes": ("n_classes",),
    "do": ("do", "do_mean_sq", "do_msae_code"),
    "stability_decoder": ("stability_decoder",),
    "stability_encoder": ("stability_encoder",),
    "cosine": ("cosine", "cos_sim", "cs"),
    "recon_cosine": ("recon_cosine", "recon_cos_sim"),
    "alive_percent": ("pct_alive", "%_alive"),
    "alive": ("alive",),
    "cknna": ("cknna",),
    "accuracy": ("accuracy", "lp_acc"),
    "overall": ("overall", "overall_accuracy"),
    "rho": ("rho",),
    "p": ("p",),
    "n": ("n",),
}

# role -> the least and the most it can be
RANGES: dict[str, tuple[float, float]] = {
    "ev": (-math.inf, 1),
    "ev_percent": (-math.inf, 100),
    "fvu": (0, math.inf),
    "l0": (0, math.inf),
    "l0_cls": (0, math.inf),
    "sparsity": (0, 1),
    "cosine": (-1, 1),
    "recon_cosine": (-1, 1),
    "alive": (0, 1),
    "alive_percent": (0, 100),
    "cknna": (-1, 1),
    "accuracy": (0, 1),
    "do": (0, 1),
    "stability_decoder": (-1, 1),
    "stability_encoder": (-1, 1),
    "rho": (-1, 1),
    "p": (0, 1),
}

# (count, total, percentage), as MSAE's table 4 has them
SHARES = (
    ("valid_count", "high_magnitude_samples", "valid_pct"),
    ("valid_count", "all_valid_neurons_table3_x8", "high_mag_rate_pct"),
)
# (those that meet all of it, those that meet this part), with the same ending; MSAE's table 3
PARTS = (
    ("above_and_best", "sim_above_0.42"),
    ("above_and_best", "best_vector"),
    ("all_conditions", "above_and_best"),
    ("all_conditions", "ratio_gt_2"),
)


@dataclass(frozen=True)
class Finding:
    """`row` counts from 1, as the lines below the header do."""

    file: str
    row: int
    label: str
    value: str  # column and what is printed there
    why: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row} ({self.label}): {self.value}: {self.why}"


@dataclass(frozen=True)
class Interval:
    """What rounds to a printed number."""

    low: float
    high: float
    text: str

    @classmethod
    def of(cls, text: str | None) -> "Interval | None":
        """None where there is no number."""
        try:
            number = Decimal((text or "").strip().rstrip("%"))
        except InvalidOperation:
            return None
        exponent = number.as_tuple().exponent
        if not isinstance(exponent, int):  # NaN, infinity
            return None
        value = float(number)
        slack = (1 + ROUNDING) * max(0.5 * 10.0**exponent, ROUNDING * abs(value))
        return cls(value - slack, value + slack, (text or "").strip())

    def meets(self, low: float, high: float) -> bool:
        return self.low <= high and low <= self.high

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Known:
    """What a table does not say of itself. `unscaled_classes`: its CE are of unscaled cosines over so many classes."""

    unscaled_classes: int | None = None
    n_tokens: int | None = None
    d_in: int | None = None
    d_sae: int | None = None


@dataclass(frozen=True, eq=False)
class Sheet:
    """A CSV as text."""

    name: str
    header: list[str]
    rows: list[dict[str, str]]
    roles: dict[str, str] = field(default_factory=dict)  # role -> column

    @classmethod
    def read(cls, path: Path) -> "Sheet":
        """Raises ValueError if the file is no CSV with a header and rows of its width."""
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [row for row in reader if any(cell.strip() for cell in row)]
        if not header or len(set(header)) < len(header):
            raise ValueError(f"{path} needs a header line whose names differ, got {header}.")
        for number, row in enumerate(rows, 1):
            if len(row) != len(header):
                raise ValueError(f"{path}, row {number} has {len(row)} cells; its header has {len(header)}.")
        roles = {}
        named = {simple(name): name for name in header}
        for role, aliases in ALIASES.items():
            found = [named[alias] for alias in aliases if alias in named]
            if found:
                roles[role] = found[0]
        cells = [dict(zip(header, (cell.strip() for cell in row), strict=True)) for row in rows]
        return cls(path.name, header, cells, roles)

    def label(self, row: Mapping[str, str]) -> str:
        """Which coder a row is of: its texts, and the columns that say which one."""
        return ", ".join(row[name] for name in self.label_columns if row[name])

    @functools.cached_property
    def label_columns(self) -> list[str]:
        """Those without numbers, and those that say which coder, layer or setting a row is of."""
        naming = {"layer", "sublayer", "sub", "row", "table", "alpha", "beta", "l1_coeff", "latent_size", "d_sae"}
        return [
            name
            for name in self.header
            if simple(name) in naming or not any(Interval.of(row[name]) for row in self.rows)
        ]

    @functools.cached_property
    def number_columns(self) -> list[str]:
        return [name for name in self.header if name not in self.label_columns]


def simple(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


@dataclass(frozen=True, eq=False)
class _Row:
    """One row under check: numbers by role, and what is found."""

    sheet: Sheet
    number: int
    cells: Mapping[str, str]
    known: Known

    def __getitem__(self, role: str) -> Interval | None:
        return Interval.of(self.cells[self.sheet.roles[role]]) if role in self.sheet.roles else None

    def finding(self, column: str, why: str) -> Finding:
        value = f"{column} = {self.cells[column]}"
        return Finding(self.sheet.name, self.number, self.sheet.label(self.cells), value, why)

    def of(self, role: str, why: str) -> Finding:
        return self.finding(self.sheet.roles[role], why)

    def width(self, role: str) -> int | None:
        """d_in, d_sae, n_tokens: the row's own, or what is known of the table."""
        own = self[role]
        return getattr(self.known, role) if own is None else round(own.middle)


def check_sheet(sheet: Sheet, known: Known | None = None) -> list[Finding]:
    """All findings in one table but repeats."""
    known = known or Known()
    found = []
    for number, cells in enumerate(sheet.rows, 1):
        row = _Row(sheet, number, cells, known)
        for check in CHECKS:
            found += check(row)
    return found


# -- checks of a row


def recovered_interval(ce: Interval, recon: Interval, zero: Interval) -> tuple[float, float]:
    """% CE recovered of any three numbers that round to these; infinite where zero - CE may be 0."""
    if zero.low <= ce.high and ce.low <= zero.high:
        return -math.inf, math.inf
    values = [
        100 * (z - r) / (z - c)
        for c, r, z in product((ce.low, ce.high), (recon.low, recon.high), (zero.low, zero.high))
    ]
    return min(values), max(values)  # monotone in each of the three: the extremes are at corners


def _ce_recovered(row: _Row) -> Iterator[Finding]:
    for ending in ("", "_unscaled"):
        ce, recon, zero = (row[f"{name}{ending}"] for name in ("ce", "recon_ce", "zero_ce"))
        printed = row[f"ce_recovered{ending}"]
        if ce and recon and zero and printed:
            low, high = recovered_interval(ce, recon, zero)
            if not printed.meets(low, high):
                told = f"the row's own CE {ce.text}, {recon.text} and {zero.text} give {low:.3f}..{high:.3f} %"
                yield row.of(f"ce_recovered{ending}", told)


def cosine_ce_range(n_classes: int) -> tuple[float, float]:
    """The cross-entropy of unscaled cosines: all other classes at -1 and the right one at 1, and the reverse."""
    if n_classes < 2:
        raise ValueError(f"cross-entropy needs two classes or more, got {n_classes}.")
    return math.log1p((n_classes - 1) * math.exp(-2)), math.log1p((n_classes - 1) * math.exp(2))


def _ce_of_cosines(row: _Row) -> Iterator[Finding]:
    own = row["n_classes"]
    n_classes = row.known.unscaled_classes if own is None else round(own.middle)
    if n_classes is None:
        return
    names = [f"{name}_unscaled" for name in ("ce", "recon_ce", "zero_ce")]
    if row.known.unscaled_classes is not None:
        names += ["ce", "recon_ce", "zero_ce"]
    low, high = cosine_ce_range(n_classes)
    for name in names:
        value = row[name]
        if value and not value.meets(low, high):
            told = f"unscaled cosines over {n_classes} classes can only have {low:.4f}..{high:.4f}"
            yield row.of(name, told)


def _ranges(row: _Row) -> Iterator[Finding]:
    for role, (low, high) in RANGES.items():
        value = row[role]
        if role == "accuracy" and value and value.low > 1:
            high = 100.0
        if value and not value.meets(low, high):
            told = f"cannot be below {low:g}" if value.high < low else f"cannot be above {high:g}"
            yield row.of(role, told)


def _variance(row: _Row) -> Iterator[Finding]:
    fvu = row["fvu"]
    for role, whole in (("ev", 1.0), ("ev_percent", 100.0)):
        ev = row[role]
        if fvu and ev and not ev.meets(whole * (1 - fvu.high), whole * (1 - fvu.low)):
            told = f"with FVU {fvu.text} it should be {whole * (1 - fvu.middle):g}: they add up to {whole:g}"
            yield row.of(role, told)


def _l0(row: _Row) -> Iterator[Finding]:
    l0, sparsity, d_sae = row["l0"], row["sparsity"], row.width("d_sae")
    for role in ("l0", "l0_cls"):
        value = row[role]
        if value and d_sae and value.low > d_sae:
            yield row.of(role, f"there are only {d_sae} latents")
        k = row["k"]
        if value and k and value.low > round(k.middle):
            yield row.of(role, f"a row has at most k = {k.text} active latents")
    if l0 and sparsity and d_sae:
        low, high = ((1 - s) * d_sae for s in (sparsity.high, sparsity.low))
        if not l0.meets(low, high):
            yield row.of("l0", f"sparsity {sparsity.text} of {d_sae} latents is an L0 of {low:.2f}..{high:.2f}")
    summed, n_tokens = row["l0_image_sum"], row.width("n_tokens")
    if l0 and summed and n_tokens:
        low, high = (1 - TOKEN_SLACK) * n_tokens * l0.low, (1 + TOKEN_SLACK) * n_tokens * l0.high
        if not summed.meets(low, high):
            yield row.of("l0_image_sum", f"{n_tokens} tokens with an L0 of {l0.text} sum up to {low:.0f}..{high:.0f}")


def _bounds(row: _Row) -> Iterator[Finding]:
    d_in, d_sae = row.width("d_in"), row.width("d_sae")
    if not (d_in and d_sae):
        return
    orthogonality, bound = row["do"], welch_bound(d_sae, d_in)
    if orthogonality and orthogonality.high < bound:
        told = f"{d_sae} directions in {d_in} dimensions have a mean squared cosine of {bound:.5f} or more (Welch)"
        yield row.of("do", told)
    for role in ("stability_decoder", "stability_encoder"):
        score = row[role]
        if score and score.high < (floor := _floor(d_sae, d_in)):
            yield row.of(role, f"random directions match better: {floor:.3f} for {d_sae} in {d_in} dimensions")


@functools.cache
def _floor(d_sae: int, d_in: int) -> float:
    return limit_floor(d_sae, d_in)


def _accuracies(row: _Row) -> Iterator[Finding]:
    header = row.sheet.header
    for column in header:
        prefix, ends, _ = column.partition("_overall")
        if ends and not _:
            overall, worst = Interval.of(row.cells[column]), Interval.of(row.cells.get(f"{prefix}_worst"))
            if overall and worst and worst.low > overall.high:
                yield row.finding(column, f"the worst group has more: {worst.text}")
    groups = {name[len("accuracy_") :]: name for name in header if name.startswith("accuracy_")}
    sizes = {group: Interval.of(row.cells.get(f"n_{group}")) for group in groups}
    parts = [(Interval.of(row.cells[name]), sizes[group]) for group, name in groups.items()]
    overall = row["overall"] or row["accuracy"]
    if parts and overall and all(accuracy and size for accuracy, size in parts):
        total = sum(size.middle for _, size in parts if size)
        ends = [
            sum(getattr(accuracy, end) * size.middle for accuracy, size in parts if accuracy and size) / total
            for end in ("low", "high")
        ]
        if not overall.meets(*ends):
            column = row.sheet.roles["overall" if row["overall"] else "accuracy"]
            told = f"its groups, weighted by their sizes, have {ends[0]:.4g}..{ends[1]:.4g}"
            yield row.finding(column, told)


def _shares(row: _Row) -> Iterator[Finding]:
    for count, total, share in SHARES:
        part, whole, printed = (Interval.of(row.cells.get(name)) for name in (count, total, share))
        if part and whole and printed and whole.middle > 0:
            value = 100 * part.middle / whole.middle
            if not printed.meets(value, value):
                yield row.finding(share, f"{part.text} of {whole.text} are {value:.2f} %")
    for column in row.sheet.header:  # preservation: what is left of an accuracy
        if column.endswith("_P"):
            names = (column, f"{column[:-2]}_recon", f"{column[:-2]}_raw")
            printed, recon, raw = (Interval.of(row.cells.get(name)) for name in names)
            if printed and recon and raw and raw.low > 0:
                low, high = recon.low / raw.high, recon.high / raw.low
                if not printed.meets(low, high):
                    yield row.finding(column, f"{recon.text} of {raw.text} is {low:.3f}..{high:.3f}")


def _parts(row: _Row) -> Iterator[Finding]:
    for both, one in PARTS:
        for column in row.sheet.header:
            if column.startswith(one):
                whole, part = (Interval.of(row.cells.get(name)) for name in (column, both + column[len(one) :]))
                if whole and part and part.low > whole.high:
                    yield row.finding(column, f"{both}{column[len(one) :]} counts {part.text} of these")


def spearman_exact_p(rho: float, n: int) -> float:
    """Two-sided: the share of all n! orders whose |rho| is as large."""
    most = n * (n * n - 1) / 6
    hits = total = 0
    for order in permutations(range(n)):
        total += 1
        value = 1 - sum((i - j) ** 2 for i, j in enumerate(order)) / most
        hits += abs(value) >= abs(rho) - 1e-9
    return hits / total


def _spearman(row: _Row) -> Iterator[Finding]:
    rho, p, n = row["rho"], row["p"], row["n"]
    pairs = round(n.middle) if n else None
    rankings = [text.split(">") for name, text in row.cells.items() if "ranking" in name and ">" in text]
    if len(rankings) == 2 and sorted(rankings[0]) == sorted(rankings[1]):
        pairs = len(rankings[0])
        apart = sum((i - rankings[1].index(name)) ** 2 for i, name in enumerate(rankings[0]))
        value = 1 - 6 * apart / (pairs * (pairs * pairs - 1))
        if rho and not rho.meets(value, value):
            yield row.of("rho", f"the two rankings give {value:.3f}")
    if rho and p and pairs and 3 <= pairs <= EXACT_UP_TO:
        steps = pairs * (pairs * pairs - 1) / 6  # rho comes in steps of 2 of these
        exact = spearman_exact_p(1 - 2 * round((1 - rho.middle) * steps / 2) / steps, pairs)
        if not p.meets(exact, exact):
            yield row.of("p", f"rho {rho.text} over {pairs} pairs has an exact two-sided p of {exact:.4f}")


CHECKS: Sequence[Callable[[_Row], Iterator[Finding]]] = (
    _ce_recovered,
    _ce_of_cosines,
    _ranges,
    _variance,
    _l0,
    _bounds,
    _accuracies,
    _shares,
    _parts,
    _spearman,
)
