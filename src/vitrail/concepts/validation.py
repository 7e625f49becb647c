"""Which names to believe: MSAE's three rules, detection on held-out pictures (detection.py), the truth of a world.

    cosine     score > 0.42
    ratio      score / runner-up's > 2.0, of a latent's two best words; a runner-up at 0 or below passes
    unique     of the latents with this name, the one with the highest score keeps it (of equals the lower number)

MSAE appendix A and table 3; SPEC row 95. The first two are rules for cosines. There counts are of concepts of a
vocabulary of 37,445, here of latents; intersections are what they are there, and cannot exceed their members.

`valid`: where detection was measured, its interval lies above the 95 % range of random names by `margin` at least, and
no other word of the vocabulary, chosen on the naming pictures, detects the latent better, and a class named by labels
has an F1 of .5 there; where it was not, all three rules hold. The rules ask whether a word is near; detection asks
whether it is so.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from vitrail.concepts.detection import MARGIN, Detection
from vitrail.concepts.naming import Named
from vitrail.concepts.table import Concept

COSINE, RATIO = 0.42, 2.0
RULES = ("cosine", "unique", "cosine and unique", "ratio", "all")
_FILLERS = {"a", "an", "the", "of", "photo", "picture", "thing", "at", "on", "in"}


def validated(
    named: Named,
    *,
    cosine: float = COSINE,
    ratio: float = RATIO,
    margin: float = MARGIN,
    detections: Sequence[Detection | None] | None = None,
    fires: np.ndarray | None = None,
    rivals: Sequence[str] | None = None,
) -> list[Concept]:
    """A row a latent, rules and detection filled in. `fires`: share of pictures of each latent of the coder.

    `detections` and `rivals` are of `named.latents`, in that order.
    """
    scores, seconds = named.scores, named.runner_up_scores
    owner: dict[str, int] = {}
    for at in np.lexsort((named.latents, -scores)).tolist():
        owner.setdefault(named.names[at], at)
    rows = []
    for at, latent in enumerate(named.latents.tolist()):
        score, second = float(scores[at]), float(seconds[at])
        row = Concept(
            latent=latent,
            method=named.method,
            name=named.names[at],
            score=score,
            runner_up=named.runners_up[at],
            runner_up_score=second,
            cosine_ok=score > cosine if named.cosines else None,
            ratio_ok=score > 0 and score > ratio * max(second, 0.0) if named.cosines else None,
            unique_ok=owner[named.names[at]] == at,
            fires=None if fires is None else float(fires[latent]),
        )
        seen = None if detections is None else detections[at]
        if seen is None:
            rules = bool(row.cosine_ok and row.ratio_ok and row.unique_ok)
            rows.append(replace(row, valid=detections is None and rules))
        else:
            rows.append(
                replace(
                    row,
                    valid=seen.found(margin),
                    detection_auc=seen.auc,
                    detection_low=seen.low,
                    detection_high=seen.high,
                    detection_random=seen.random,
                    detection_random_low=seen.random_low,
                    detection_random_high=seen.random_high,
                    rival=(rivals[at] or None) if rivals is not None and seen.rival is not None else None,
                    rival_auc=seen.rival,
                    class_f1=seen.class_f1,
                )
            )
    return rows


def rule_counts(rows: Sequence[Concept]) -> dict[str, int]:
    """How many of these latents pass each rule, and each intersection of MSAE's table 3; `latents`: how many in all."""
    marks = [(bool(row.cosine_ok), row.unique_ok, bool(row.ratio_ok)) for row in rows]
    return {
        "latents": len(marks),
        "cosine": sum(near for near, _, _ in marks),
        "unique": sum(only for _, only, _ in marks),
        "cosine and unique": sum(near and only for near, only, _ in marks),
        "ratio": sum(alone for _, _, alone in marks),
        "all": sum(all(three) for three in marks),
    }


def broken_invariants(counts: Mapping[str, int]) -> list[str]:
    """What cannot be: an intersection larger than one of its members. Sentences; none for counts that can be."""
    members = {"cosine and unique": ("cosine", "unique"), "all": ("cosine", "unique", "ratio", "cosine and unique")}
    return [
        f"{whole} has {counts[whole]}, more than the {counts[part]} of {part}"
        for whole, parts in members.items()
        for part in parts
        if counts[whole] > counts[part]
    ]


def with_truth(rows: Sequence[Concept], best: Mapping[int, str | None], concepts: Sequence[str]) -> list[Concept]:
    """The same rows, with each latent's best concept in truth, and whether the name says it.

    `best`: latent -> its concept (detection.py: best_concepts), None where it has none: no name is true of it then.
    `true` is None for latents that `best` does not know.
    """
    said = {row.name: concept_said(row.name, concepts) for row in rows}
    return [
        replace(row, truth=best[row.latent], true=best[row.latent] is not None and best[row.latent] == said[row.name])
        if row.latent in best
        else row
        for row in rows
    ]


def concept_said(name: str, concepts: Sequence[str]) -> str | None:
    """The concept "family:value" that a name says: "thing at the top left" says "position:top left". None: none."""
    content = content_words(name)
    return next((one for one in concepts if content and content_words(one.partition(":")[2]) == content), None)


def content_words(name: str) -> tuple[str, ...]:
    """Words of a name but articles, prepositions and "thing"."""
    return tuple(word for word in re.findall(r"[\w-]+", name.lower()) if word not in _FILLERS)


def agreement(rows: Sequence[Concept], *, valid_only: bool = False) -> list[dict[str, Any]]:
    """For each two methods: latents that both name, the share whose names are the same, and share a content word.

    NaN shares where no latent has both.
    """
    by_method: dict[str, dict[int, str]] = {}
    for row in rows:
        if row.valid or not valid_only:
            by_method.setdefault(row.method, {})[row.latent] = row.name
    table = []
    for one, other in combinations(by_method, 2):
        both = [
            (content_words(by_method[one][latent]), content_words(by_method[other][latent]))
            for latent in by_method[one].keys() & by_method[other].keys()
        ]
        n = len(both)
        same, shared = sum(a == b for a, b in both), sum(bool(set(a) & set(b)) for a, b in both)
        nan = float("nan")
        table.append(
            {
                "a": one,
                "b": other,
                "n": n,
                "same": same / n if n else nan,
                "shares_a_word": shared / n if n else nan,
            }
        )
    return table
