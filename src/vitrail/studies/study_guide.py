"""Which backbone for which task, from a study's own numbers, and how little that may be worth.

Of each task: the backbones by what was measured there, raw features and codes; the metric that goes with the task most
closely over backbones, in its good direction, and the order it would have given. No name is written here: all follow
from the rows. ViSAEBench appendix P draws such a table by hand.
"""

import math
from typing import Any

from vitrail.studies.hypotheses import ALPHA, EQUAL
from vitrail.studies.study_analyses import TASK, StudyRows, Table, about

FEW = 6  # below, no p after Holm over four hypotheses can be below .05


def guide_rows(study: StudyRows, matrix: Table) -> Table:
    """A row a task. `pays`: whether the metric's p after Holm over the whole matrix is at most ALPHA."""
    return [_of_task(study, task, [row for row in matrix if row["task"] == task]) for task in study.tasks]


def _of_task(study: StudyRows, task: str, pairs: Table) -> dict[str, Any]:
    own = study.by_backbone(task)
    codes = study.by_backbone(_codes_of(task))
    best, good = None, 0.0
    for row in pairs:
        rho = _good(row)
        if rho > good + EQUAL:
            best, good = row, rho
    found: dict[str, Any] = {"task": task, "raw": _order(own, task), "codes": _order(codes, task)}
    if best is None:
        return found | dict.fromkeys(("metric", "rho", "p", "p_holm", "by_metric")) | {"n": len(own), "pays": False}
    kept = {key: best[key] for key in ("metric", "rho", "p", "p_holm", "n")}
    by_metric = _order(study.by_backbone(best["metric"]), best["metric"])
    tied = sum(abs(abs(row["rho"]) - good) <= EQUAL for row in pairs if row is not best and _good(row) > 0)
    return found | kept | {"by_metric": by_metric, "tied": tied, "pays": best["p_holm"] <= ALPHA}


def guide_words(study: StudyRows, rows: Table) -> list[str]:
    """A sentence each task, after the caveats that hold for all."""
    n = len(study.backbones)
    said = []
    if n < FEW:
        least = f"with {n} there is no rank correlation"
        if n > 2:
            least = f"the least two-sided p that {n} allow is {2 / math.factorial(n):.2g}, before any correction"
        said.append(
            f"{n} backbone{'s' if n != 1 else ''}: too few to say which metric foretells a task ({least}). "
            "The orders below are of these backbones on these pictures, and nothing more."
        )
    if any(row["metric"] for row in rows) and not any(row["pays"] for row in rows):
        said.append(
            "After Holm over all pairs of metric and task nothing is significant: choose by the task's own numbers, "
            "which are in the table, not by a metric of coders."
        )
    if study.untrained:
        said.append(
            f"{', '.join(study.untrained)}: of random weights, as far as names and plan say. A metric that only tells "
            "trained from untrained will look good in rank correlations."
        )
    for row in rows:
        first = row["raw"].split(" > ")[0] if row["raw"] else None
        if first is None:
            continue
        words = f"{about(row['task']).title}: {first}"
        other = row["codes"].split(" > ")[0] if row["codes"] else None
        if other is not None and row["codes"] != row["raw"]:
            words += (
                f"; by codes {other}" if other != first else "; also by codes, though the order behind it is another"
            )
        if row["metric"] is None:
            words += ". No metric goes with it." if n > 2 else "."
        else:
            says = row["by_metric"].split(" > ")[0]
            agreeing = "would have chosen the same" if says == first else f"would have chosen {says}"
            ties = f" ({row['tied']} more as near)" if row["tied"] else ""
            worth = "" if row["pays"] else ", not significant"
            words += (
                f". Nearest metric: {about(row['metric']).title}{ties}, rho {row['rho']:+.2f} over {row['n']} "
                f"backbones, p {row['p']:.2g}, after Holm {row['p_holm']:.2g}{worth}; it {agreeing}."
            )
        said.append(words)
    return said


def _good(row: dict[str, Any]) -> float:
    """rho, positive where the better metric goes with the better task; -1 where there is none."""
    rho = -row["rho"] if about(row["metric"]).better == "lower" else row["rho"]
    return -1.0 if math.isnan(rho) else rho


def _codes_of(task: str) -> str:
    found = TASK.fullmatch(task)
    if found:
        return f"{found[1]}_codes" + (f"@{found[3]}" if found[3] else "")
    return task.replace("cross_domain_raw_accuracy@", "cross_domain_codes_accuracy_128@")


def _order(values: dict[str, float], name: str) -> str:
    sign = 1 if about(name).better == "lower" else -1
    return " > ".join(sorted(values, key=lambda backbone: sign * values[backbone]))
