"""Write docs/metrics.md from the docstrings of the metrics: python scripts/metrics_page.py

A metric's file opens with a title, an indented block of formulas, and paragraphs that begin with one of HEADS.
"""

import ast
import sys
from pathlib import Path

from vitrail.metrics.groups import KINDS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "metrics.md"
HEADS = ("Range", "Moves with", "Does not show", "Source", "Tags", "Cost")
FILES = {
    "What every coder is asked": ("reconstruction", "sparsity", "substitution"),
    "As the papers print them": ("prisma_reconstruction", "msae_reconstruction", "linear_probe"),
    "Representation and dictionary": ("cknna", "orthogonality", "dead", "stability", "pareto"),
    "Curves and maps": ("progressive", "magnitudes", "frequency", "l0_maps"),
    "What the model does with it": ("faithfulness",),
    "ViSAEBench": (
        "moran",
        "preservation",
        "sparse_probing",
        "monosemanticity",
        "cross_domain",
        "absorption",
        "probe_projection",
        "downstream",
    ),
}


def main() -> None:
    text = page()
    if sys.argv[1:] == ["--check"]:
        sys.exit(None if PAGE.read_text(encoding="utf-8") == text else f"{PAGE} is not what the docstrings say.")
    PAGE.write_text(text, encoding="utf-8")


def page() -> str:
    parts = [OPENING, kinds()]
    for heading, names in FILES.items():
        parts.append(f"## {heading}\n")
        parts += [entry(name) for name in names]
    return "\n".join(parts)


def kinds() -> str:
    """What `--metrics` takes."""
    lines = ["| name | group | needs | cost beside encoding |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {kind.group} | {kind.needs} | {kind.cost} |" for name, kind in KINDS.items()]
    return "\n".join(lines) + "\n"


def entry(name: str) -> str:
    """Raises ValueError if the docstring has no title, or not every head but Cost."""
    source = (ROOT / "src" / "vitrail" / "metrics" / f"{name}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    title, _, rest = text.partition("\n\n")
    missing = [head for head in HEADS[:-1] if f"\n{head}. " not in text]
    if not title.endswith((".", "?")) or missing:
        raise ValueError(f"{name}.py: the docstring has no {', '.join(missing) or 'title that ends with a period'}.")
    lines = [f"### {title.removesuffix('.').replace(chr(10), ' ')}", "", f"`metrics/{name}.py`", ""]
    for part in rest.split("\n\n"):
        head = part.partition(".")[0]
        if part.startswith("    "):
            lines += ["```text", *(line.removeprefix("    ") for line in part.splitlines()), "```", ""]
        elif head in HEADS:
            lines += [f"**{head}.**" + part.removeprefix(f"{head}."), ""]
        else:
            lines += [part, ""]
    return "\n".join(lines)


OPENING = """# Metrics

One clear definition each; a published variant that differs has a name and a tag of its own. Every number is kept with
its tag, the number of rows or images it was taken over, and, where it can have one, a 95 % interval.

    vitrail eval CODER --images ... --out eval.jsonl --metrics all      # one pass: the coder encodes once
    vitrail table prisma eval.jsonl                                     # a paper's layout; msae, and -published
    vitrail table prisma eval.jsonl --paired                            # each coder less each of its controls
    vitrail table prisma eval.jsonl --form parquet --out n.parquet      # every number, a line each, full precision
    vitrail compare eval.jsonl --a "topk*" --b "matryoshka*"            # at equal L0, never extrapolated
    vitrail figures eval.jsonl --out figures                            # curves, as vector and PNG, with their numbers
    vitrail modality IMAGES TEXTS --images ... --out both.jsonl         # coders of images and of texts, each on both
    vitrail check-table table.csv                                       # rows that cannot be, or contradict themselves

`--metrics` takes names and groups: `prisma`, `msae`, `visae`, `all`. Reconstruction, L0 and substitution are always
measured; `--linear-probe` and `--faithfulness N` bring what needs a probe or a head of its own.
Each coder stands beside its controls, which may spend as many active latents: random directions, principal components,
raw neurons, k-means, the untrained coder, and with `--metrics all` the same coder on the same model with random weights
(`--random-backbone none` leaves it out: it doubles the forward passes). `--random-backbone train` adds the other
reading, "trained on random backbone": a coder of the same architecture, size, seed and steps that is trained on the
random model's activations of the same training images, once, and kept in a folder beside `--out`.

Rows of one pass are over the same images, so each coder's row also holds `paired`: by the name of each of its controls
and of each other coder at its place, every measure less theirs, with a 95 % interval of the difference. Both numbers
come from the same resamples of images, so what makes an image hard for both cancels: two intervals may overlap where
the difference is plain. `vitrail eval` prints them, `vitrail table ... --paired` writes them in every form, and
`--against NAME` takes the difference from another row. Where a number's interval is not over images (CKNNA's is a
jackknife over groups of rows; what is of a decoder alone has none), it has no paired one: a dash.

Truth recovery, where the truth is known, has [a page of its own](truth.md).

This page is made from the docstrings (`python scripts/metrics_page.py`); a test says when they differ.
"""


if __name__ == "__main__":
    main()
