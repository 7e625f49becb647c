"""Do metrics of coders foretell what features are good for, over a handful of backbones? Ranks, and exact p-values.

    spearman     Pearson's correlation of ranks, ties at their mean rank; kendall: tau-b
    p            share of all n! orders whose |rho| is as large (n <= 9; above, of 100,000 drawn ones, itself included)
    p_one_sided  the same of rho itself, in the direction that was foretold
    p_t          Student's t with n - 2 degrees of freedom, which is what papers print; at n = 5 it is far off
    holm         p-values of a family, each as it is after all others were looked at as well (Holm 1979)

With n backbones no two-sided p lies below 2 / n!: at n = 5 it is 1/60 for |rho| = 1 and 1/12 for |rho| = 0.9, so that
nothing but perfect agreement is below 0.05, and of a family of four not even that. `p_least` says so in each row.

ViSAEBench sections 4.5, 5.8 and appendices D, J, O, Q; SPEC rows 82 to 84, 88, 89 and 144. It prints p_t, and once an
exact p (rho = 1 on DTD).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import islice, permutations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vitrail.metrics.families import holm

Array = NDArray[np.float64]
Verdict = Literal["supported", "above the threshold, p not", "not supported"]
EXACT_UP_TO = 9
DRAWN = 100_000
ALPHA = 0.05
EQUAL = 1e-9  # rounding, in comparisons of correlations
AT_ONCE = 40_320


@dataclass(frozen=True)
class Correlation:
    """NaN where either side is constant."""

    rho: float
    p: float
    p_one_sided: float
    p_t: float
    p_least: float
    n: int
    exact: bool


def spearman(x: Sequence[float] | Array, y: Sequence[float] | Array, *, seed: int = 0) -> Correlation:
    """p_one_sided is that of a positive rho; for a negative hypothesis turn one side round."""
    a, b = _paired(x, y)
    return _correlation(ranks(a), ranks(b), _pearson, seed)


def kendall(x: Sequence[float] | Array, y: Sequence[float] | Array, *, seed: int = 0) -> Correlation:
    """tau-b under the name of rho. p_t is NaN: there is none."""
    a, b = _paired(x, y)
    i, j = np.triu_indices(len(a), 1)

    def tau(one: Array, others: Array) -> Array:
        of_one, of_others = np.sign(one[i] - one[j]), np.sign(others[:, i] - others[:, j])
        ties = np.sqrt((of_one**2).sum() * (of_others**2).sum(1))
        return np.divide(of_others @ of_one, ties, out=np.full(len(others), math.nan), where=ties > 0)

    return _correlation(ranks(a), ranks(b), tau, seed, has_t=False)


def ranks(values: Array) -> Array:
    """From 1, the smallest; equal ones share their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def t_two_sided(t: float, df: int) -> float:
    """P(|T| >= |t|), in closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    if df < 1:
        raise ValueError(f"df must be at least 1, got {df}.")
    if math.isinf(t):
        return 0.0
    theta = math.atan(abs(t) / math.sqrt(df))
    cos2, term, total = math.cos(theta) ** 2, 1.0, 0.0
    first = 1 if df % 2 == 0 else 2
    for step in range((df - 1) // 2 if df % 2 else df // 2):
        total += term
        term *= cos2 * (2 * step + first) / (2 * step + first + 1)
    if df % 2 == 0:
        return 1 - math.sin(theta) * total
    return 1 - 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)


# ------------------------------------------------------------------------------------------- hypotheses and the matrix


@dataclass(frozen=True)
class Hypothesis:
    """The metric and the task correlate over backbones, by `threshold` at least."""

    name: str
    metric: str
    task: str
    threshold: float


# ViSAEBench section 4.5. A task that ends in "*" is the first whose name begins so: `resolve`.
HYPOTHESES = (
    Hypothesis("H1", "moran", "segmentation_miou_raw@*", 0.7),
    Hypothesis("H2", "monosemanticity_normalized", "linear_accuracy_raw@test", 0.6),
    Hypothesis("H3", "preservation", "retrieval_r@1_raw", 0.6),
    Hypothesis("H4", "ovr_auc_128", "cross_domain_codes_accuracy_128@*", 0.7),
)


def hypotheses_of(options: Mapping[str, Any]) -> tuple[Hypothesis, ...]:
    """`hypotheses` of a study's options, a list of {name, metric, task, threshold}; HYPOTHESES where there are none.

    Raises ValueError for a list of anything else.
    """
    told = options.get("hypotheses")
    if told is None:
        return HYPOTHESES
    if isinstance(told, str | Mapping) or not isinstance(told, Sequence):
        raise ValueError("hypotheses must be a list, as [{name: H1, metric: moran, task: ..., threshold: 0.7}].")
    known, found = {one.name for one in fields(Hypothesis)}, []
    for one in told:
        if not isinstance(one, Mapping) or set(one) != known:
            raise ValueError(f"a hypothesis has name, metric, task and threshold, each once; got {one!r}.")
        if isinstance(one["threshold"], bool) or not isinstance(one["threshold"], int | float):
            raise ValueError(f"threshold of {one['name']} must be a number in -1..1, got {one['threshold']!r}.")
        if not -1 <= one["threshold"] <= 1:
            raise ValueError(f"threshold of {one['name']} must be in -1..1, got {one['threshold']}.")
        found.append(Hypothesis(str(one["name"]), str(one["metric"]), str(one["task"]), float(one["threshold"])))
    return tuple(found)


def resolve(one: Hypothesis, metrics: Iterable[str], tasks: Iterable[str]) -> Hypothesis | None:
    """The hypothesis with names that there are; None where its metric or task was not measured."""
    metric, task = _first(one.metric, metrics), _first(one.task, tasks)
    return None if metric is None or task is None else replace(one, metric=metric, task=task)


ByBackbone = Mapping[str, float]


def judge(
    hypotheses: Sequence[Hypothesis],
    metrics: Mapping[str, ByBackbone],
    tasks: Mapping[str, ByBackbone],
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row each, with p_holm over all of them. Supported: rho at the threshold or above it, and p_holm <= 0.05.

    Over the backbones that both sides have. Raises KeyError for a metric or task without numbers.
    """
    rows = []
    for one in hypotheses:
        found = _over_backbones(_named(metrics, one.metric, "metric"), _named(tasks, one.task, "task"), seed)
        rows.append(
            {"hypothesis": one.name, "metric": one.metric, "task": one.task, "threshold": one.threshold, **found}
        )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        reached = row["rho"] >= row["threshold"] - EQUAL
        verdict: Verdict = "not supported"
        if reached:
            verdict = "supported" if p <= ALPHA else "above the threshold, p not"
        row |= {"p_holm": p, "verdict": verdict}
    return rows


def metric_task_matrix(
    metrics: Mapping[str, ByBackbone], tasks: Mapping[str, ByBackbone], *, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for each pair, with p_holm over all pairs. Values as they are: of an error a negative rho is good."""
    rows = [
        {"metric": metric, "task": task, **_over_backbones(values, outcome, seed)}
        for metric, values in metrics.items()
        for task, outcome in tasks.items()
    ]
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def rank_intervals(
    samples: Mapping[str, Sequence[float]], *, higher_is_better: bool = True, n_bootstrap: int = 10_000, seed: int = 0
) -> list[dict[str, Any]]:
    """Each backbone's rank (1: the best) by its mean, and where 95 % of bootstraps of its configurations or seeds put
    it. Best first. A backbone of one value does not move by itself."""
    if len(samples) < 2:
        raise ValueError(f"ranks need two backbones, got {len(samples)}.")
    rng, sign = np.random.default_rng(seed), -1.0 if higher_is_better else 1.0
    values = {name: np.asarray(each, dtype=np.float64) for name, each in samples.items()}
    means = np.array([each.mean() for each in values.values()])
    drawn = np.stack([rng.choice(each, (n_bootstrap, len(each))).mean(1) for each in values.values()], axis=1)
    again = np.apply_along_axis(ranks, 1, sign * drawn)
    low, high = np.percentile(again, [2.5, 97.5], axis=0)
    own = ranks(sign * means)
    rows = [
        {"backbone": name, "mean": float(means[i]), "rank": float(own[i]), "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(values)
    ]
    return sorted(rows, key=lambda row: row["rank"])


# ------------------------------------------------------------------------------ families, layers, lifts, scatter plots


def family_ranks(
    one: Mapping[str, ByBackbone],
    other: Mapping[str, ByBackbone],
    *,
    lower_is_better: Sequence[str] = (),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Do two families of coders put backbones in the same order? A row for each metric that both have, with Holm."""
    rows = []
    for metric in (name for name in one if name in other):
        found = _over_backbones(one[metric], other[metric], seed)
        shared = [name for name in one[metric] if name in other[metric]]
        sign = 1 if metric in lower_is_better else -1
        orders = [sorted(shared, key=lambda name, of=of: sign * of[metric][name]) for of in (one, other)]
        rows.append({"metric": metric, "order": orders[0], "other_order": orders[1], **found})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def of_orders(one: Sequence[str], other: Sequence[str], *, seed: int = 0) -> Correlation:
    """Of two rankings, as names from the best to the worst. Raises ValueError if they rank other things."""
    if sorted(one) != sorted(other) or len(set(one)) < len(one):
        raise ValueError(f"both must rank the same things, each once: got {list(one)} and {list(other)}.")
    return spearman(list(map(float, range(len(one)))), [float(other.index(name)) for name in one], seed=seed)


def layer_ablation(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], *, layers: tuple[Any, Any], layer_column: str = "layer"
) -> list[dict[str, Any]]:
    """Per metric: the second layer's mean less the first's, over backbones that have both; in how many it rises; the
    two-sided p of an exact sign-flip test over backbones; and rho between the layers' orders of backbones."""
    out = []
    for metric in metrics:
        means: list[dict[str, float]] = []
        for layer in layers:
            values: dict[str, list[float]] = {}
            for row in rows:
                if row[layer_column] == layer and row.get(metric) is not None:
                    values.setdefault(row["backbone"], []).append(float(row[metric]))
            means.append({name: float(np.mean(each)) for name, each in values.items()})
        shared = [name for name in means[0] if name in means[1]]
        if not shared:
            raise ValueError(f"no backbone has {metric!r} at both layers {layers[0]} and {layers[1]}.")
        change = np.array([means[1][name] - means[0][name] for name in shared])
        rho = _over_backbones(means[0], means[1], 0)["rho"] if len(shared) > 1 else math.nan
        out.append(
            {
                "metric": metric,
                "n": len(shared),
                "first": float(np.mean([means[0][name] for name in shared])),
                "change": float(change.mean()),
                "rises": int((change > 0).sum()),
                "p": sign_flip_p(change),
                "rho_of_orders": rho,
            }
        )
    return out


def sign_flip_p(changes: Array) -> float:
    """Two-sided, over all 2^n signs (n <= 20): 2 / 2^n at the least."""
    if not 1 <= len(changes) <= 20:
        raise ValueError(f"all signs are tried for 1 to 20 changes, got {len(changes)}.")
    signs = 1 - 2 * (np.arange(2 ** len(changes))[:, None] >> np.arange(len(changes)) & 1)
    sums = np.abs(signs @ changes)
    return float((sums >= abs(changes.sum()) * (1 - EQUAL)).mean())


def codes_lift(
    raw: ByBackbone, codes: Mapping[str, Sequence[float]], *, seed: int = 0
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of lifts, and Spearman's rho between raw performance and lift.

    lift = mean over configurations of codes / raw. Raw is its denominator: noise in raw alone makes rho negative.
    `rho_by_chance` is rho's mean over all ways of giving the codes' numbers to other backbones: if codes had nothing to
    do with raw features, that is what would be seen. `p_by_chance`: the share of those ways whose rho is as low.
    """
    names = [name for name in raw if name in codes]
    own = np.array([raw[name] for name in names])
    if len(names) < 3 or (own <= 0).any():
        raise ValueError(f"lifts need three backbones whose raw performance is above 0, got {len(names)}.")
    ratios = [np.asarray(codes[name], dtype=np.float64) / raw[name] for name in names]
    lift = np.array([each.mean() for each in ratios])
    means = np.array([np.mean(codes[name]) for name in names])
    orders, _ = _orders(len(names), seed)
    drawn = np.array([_pearson(ranks(own), ranks(means[order] / own)[None])[0] for order in orders])
    found = spearman(own, lift, seed=seed)
    rows = [
        {"backbone": name, "raw": raw[name], "codes": float(means[i]), "lift": float(lift[i]), "sd": _sd(ratios[i])}
        for i, name in enumerate(names)
    ]
    by_chance = {
        "rho_by_chance": float(np.nanmean(drawn)),
        "p_by_chance": float((drawn <= found.rho + EQUAL).mean()),
    }
    return rows, {**_as_row(found), **by_chance}


def within_and_between(
    rows: Sequence[Mapping[str, Any]], x: str, y: str, *, group: str = "backbone", seed: int = 0
) -> list[dict[str, Any]]:
    """Spearman of two columns within each group, over the groups' means ("between"), and over all rows ("all").

    What holds between backbones need not hold within one: FVU against preservation (SPEC row 84). NaN for fewer than
    three pairs.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        groups.setdefault(row[group], []).append((float(row[x]), float(row[y])))
    out = [{group: name, **_of_pairs(pairs, seed)} for name, pairs in groups.items()]
    if len(groups) > 2:
        out.append({group: "between", **_of_pairs([tuple(np.mean(pairs, axis=0)) for pairs in groups.values()], seed)})
    return [*out, {group: "all", **_of_pairs([pair for pairs in groups.values() for pair in pairs], seed)}]


# -- helpers


def _first(asked: str, names: Iterable[str]) -> str | None:
    begins = asked.removesuffix("*")
    return next((name for name in names if name == asked or (begins != asked and name.startswith(begins))), None)


def _paired(x: Sequence[float] | Array, y: Sequence[float] | Array) -> tuple[Array, Array]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired.")
    if len(a) < 3:
        raise ValueError(f"a correlation of ranks needs three pairs, got {len(a)}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("values must be finite: leave pairs without numbers out.")
    return a, b


def _pearson(one: Array, others: Array) -> Array:
    """Of one row with each of the others; NaN for a constant."""
    a, b = one - one.mean(), others - others.mean(1, keepdims=True)
    lengths = np.sqrt((a @ a) * np.square(b).sum(1))  # so that a row with itself has exactly 1
    return np.divide(b @ a, lengths, out=np.full(len(b), math.nan), where=lengths > 1e-12)


def _correlation(
    a: Array, b: Array, measure: Callable[[Array, Array], Array], seed: int, *, has_t: bool = True
) -> Correlation:
    n, rho = len(a), float(measure(a, b[None])[0])
    least = 2 / math.factorial(n) if n <= EXACT_UP_TO else 1 / (DRAWN + 1)
    if math.isnan(rho):
        return Correlation(rho, math.nan, math.nan, math.nan, least, n, n <= EXACT_UP_TO)
    as_far = as_high = total = 0
    orders, exact = _orders(n, seed)
    for start in range(0, len(orders), AT_ONCE):
        drawn = measure(a, b[orders[start : start + AT_ONCE]])
        as_far += int((np.abs(drawn) >= abs(rho) - EQUAL).sum())
        as_high += int((drawn >= rho - EQUAL).sum())
        total += len(drawn)
    if not exact:
        as_far, as_high, total = as_far + 1, as_high + 1, total + 1
    p_t = math.nan
    if has_t:
        p_t = 0.0 if abs(rho) > 1 - EQUAL else t_two_sided(rho * math.sqrt((n - 2) / (1 - rho * rho)), n - 2)
    return Correlation(rho, as_far / total, as_high / total, p_t, least, n, exact)


@lru_cache(maxsize=4)  # a matrix asks for the same ones for each of its pairs
def _orders(n: int, seed: int) -> tuple[NDArray[np.int64], bool]:
    """All n! orders, or some that are drawn."""
    if n <= EXACT_UP_TO:
        flat = np.fromiter((i for order in islice(permutations(range(n)), None) for i in order), dtype=np.int64)
        return flat.reshape(-1, n), True
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(n), (DRAWN, 1)), axis=1), False


def _named(tables: Mapping[str, ByBackbone], name: str, what: str) -> ByBackbone:
    if name not in tables:
        raise KeyError(f"there are no numbers for {what} {name!r}. There are {', '.join(tables)}.")
    return tables[name]


def _over_backbones(x: ByBackbone, y: ByBackbone, seed: int) -> dict[str, Any]:
    shared = [name for name in x if name in y and math.isfinite(x[name]) and math.isfinite(y[name])]
    return _of_pairs([(x[name], y[name]) for name in shared], seed)


def _of_pairs(pairs: Sequence[tuple[float, ...]], seed: int) -> dict[str, Any]:
    if len(pairs) < 3:
        return {**dict.fromkeys(("rho", "p", "p_one_sided", "p_t", "p_least"), math.nan), "n": len(pairs)}
    return _as_row(spearman([pair[0] for pair in pairs], [pair[1] for pair in pairs], seed=seed))


def _as_row(found: Correlation) -> dict[str, Any]:
    names = ("rho", "p", "p_one_sided", "p_t", "p_least", "n")
    return {name: getattr(found, name) for name in names}


def _sd(values: Array) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan
