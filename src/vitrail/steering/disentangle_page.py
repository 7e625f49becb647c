"""One page of a disentanglement: the paper's table layout with intervals, controls, groups, and curves over tau."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;margin:.5em 0 1.5em}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;
text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}td small{color:#666}
.note{color:#555;font-size:13px}svg{display:block;max-width:100%}b.up{color:#0a6b2d}b.down{color:#a3201a}"""
COLOURS = ("#d99a00", "#2b6cb0", "#2f855a", "#b83280", "#6b46c1", "#718096")
_KEYS = ("kind", "site", "rule", "side", "choice")


def page(told: Mapping[str, Any]) -> str:
    """Needs nothing else. `told`: disentangle.json."""
    say, before = html.escape, told["before"]["test"]
    sizes = ", ".join(f"{say(name)} {n}" for name, n in told["counts"]["test"].items())
    title = f"What leans on “{say(told['spurious'])}”"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1><p>{say(told["backbone"])}, a {say(told["head"])} head of {say(", ".join(told["classes"]))}.
Test images: {sizes}. As it is: overall {_share(before["overall"])}, worst group ({say(before["worst"]["group"])})
{_share(before["worst"])}.</p><p class="note">In brackets: 95 % intervals, Wilson's of an accuracy, bootstrap within
groups of a change. Sets and thresholds are chosen on training and validation images alone. Random: as many coordinates,
drawn among those that are not always 0. Rule “pooled”, side “with” is the paper's own.</p>
{"".join(_choice(told, choice) for choice in ("strict", "relaxed"))}
<h2>What is known to work</h2><p class="note">The attribute's direction projected out (to its mean) at the same tokens;
the last layer fitted again on as many training images of each group.</p>{_ceilings(told)}
<h2>Group by group</h2>{_groups(told)}<h2>Over tau, on validation images</h2>{_curves(told)}</html>
"""


def _choice(told: Mapping[str, Any], choice: str) -> str:
    head = (
        "<tr><th>coder or point</th><th>rule</th><th>side</th><th>tau</th><th>set</th><th>overall</th>"
        "<th>worst group</th><th>change of worst</th><th>p in worst</th>"
        "<th>random: overall</th><th>random: worst</th></tr>"
    )
    random = {tuple(one[k] for k in _KEYS): one for one in told["random"]}
    body = []
    for kind, name in (("latents", "Latents"), ("neurons", "Neurons")):
        rows = [one for one in told["test"] if (one["kind"], one["choice"], one["control"]) == (kind, choice, "")]
        body.append(f'<tr><th colspan="11">{name}</th></tr>')
        for row in rows:
            control = random.get(tuple(row[k] for k in _KEYS))
            if row["n_set"]:
                found = f"<td>{row['tau']:.3g}</td><td>{row['n_set']}</td>{_pair(row)}{_change(row)}"
            else:
                found = '<td>–</td><td>0</td><td colspan="4">nothing beats the model as it is on validation images</td>'
            body.append(
                f"<tr><td>{html.escape(row['site'])}</td><td>{row['rule']}</td><td>{row['side']}</td>{found}"
                f"{_random(control)}</tr>"
            )
    rule = {
        "strict": "Largest worst-group accuracy, then overall; neither below the model as it is.",
        "relaxed": f"Largest worst-group accuracy; no other group loses more than {told['options']['drop']:.0%}.",
    }[choice]
    return f'<h2>{choice.capitalize()} choice</h2><p class="note">{rule}</p><table>{head}{"".join(body)}</table>'


def _ceilings(told: Mapping[str, Any]) -> str:
    rows = [one for one in told["test"] if one["control"] == "ceiling"]
    names = ("what", "where", "overall", "worst group", "change of worst", "p in worst")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    body = []
    for row in rows:
        change = _change(row) if row.get("change_worst") is not None else "<td></td><td></td>"
        body.append(f"<tr><td>{row['rule']}</td><td>{html.escape(row['site'])}</td>{_pair(row)}{change}</tr>")
    return f"<table>{head}{''.join(body)}</table>"


def _groups(told: Mapping[str, Any]) -> str:
    groups = told["groups"]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in groups)
    before = told["before"]["test"]
    as_it_is = {name: before[name] for name in groups if name in before}
    body = [f"<tr><td>as it is</td>{_cells(groups, as_it_is)}</tr>"]
    for row in told["test"]:
        if row["control"] != "random" and (row["n_set"] or row["control"]):
            name = ", ".join(str(row[k]) for k in _KEYS if row[k])
            body.append(f"<tr><td>{html.escape(name)}</td>{_cells(groups, row['groups'])}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(body)}</table>"


def _cells(groups: Sequence[str], shares: Mapping[str, Mapping[str, Any]]) -> str:
    return "".join(
        f"<td>{100 * shares[name]['accuracy']:.2f} <small>of {shares[name]['n']}</small></td>"
        if name in shares
        else "<td>–</td>"
        for name in groups
    )


def _pair(row: Mapping[str, Any]) -> str:
    found = []
    for name in ("overall", "worst"):
        value, low, high = (100 * row[f"{name}{end}"] for end in ("", "_low", "_high"))
        found.append(f"<td>{value:.2f} <small>({low:.1f}–{high:.1f})</small></td>")
    return "".join(found)


def _change(row: Mapping[str, Any]) -> str:
    low, high, value = (100 * row[f"change_worst{end}"] for end in ("_low", "_high", ""))
    mark = "up" if low > 0 else "down" if high < 0 else ""
    shown = f"{value:+.2f} <small>({low:+.1f} to {high:+.1f})</small>"
    return f"<td>{f'<b class={mark}>{shown}</b>' if mark else shown}</td><td>{row['p_in_worst']:.2g}</td>"


def _random(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "<td></td><td></td>"
    return "".join(f"<td>{100 * one[name]:.2f} ± {100 * one[f'{name}_sd']:.2f}</td>" for name in ("overall", "worst"))


def _share(one: Mapping[str, Any]) -> str:
    return f"{one['accuracy']:.2%} ({one['low']:.1%} to {one['high']:.1%}, n = {one['n']})"


def _curves(told: Mapping[str, Any]) -> str:
    """Worst-group accuracy on validation images over tau: a picture for each rule and side."""
    base = told["before"]["val"]["worst"]["accuracy"]
    found = []
    for rule in told["options"]["rules"]:
        for side in told["options"]["sides"]:
            least = min(told["options"]["factors"])  # curves of the strongest edit alone
            rows = [one for one in told["val"] if (one["rule"], one["side"], one["factor"]) == (rule, side, least)]
            lines: dict[str, list[tuple[float, float]]] = {}
            for one in rows:
                lines.setdefault(f"{one['kind']}: {one['site']}", []).append((one["tau"], one["worst"]))
            if lines:
                found.append(f"<h3>{rule}, {side}</h3>{chart(lines, base)}")
    return "".join(found) or "<p>No set was tried.</p>"


def chart(lines: Mapping[str, Sequence[tuple[float, float]]], base: float) -> str:
    """Shares over a log axis; the dashed line is the model as it is."""
    wide, high, left, low, top = 620, 240, 44, 28, 10
    taus = [math.log10(tau) for points in lines.values() for tau, _ in points if tau > 0] or [0.0]
    first, last = min(taus), max(max(taus), min(taus) + 1)

    def x(tau: float) -> float:
        return left + (math.log10(tau) - first) / (last - first) * (wide - left - 10)

    def y(share: float) -> float:
        return top + (1 - share) * (high - top - low)

    parts = [
        f'<line x1="{left}" x2="{wide - 10}" y1="{y(one):.1f}" y2="{y(one):.1f}" stroke="#e2e2e2"/>'
        f'<text x="{left - 6}" y="{y(one) + 4:.1f}" text-anchor="end">{one:.0%}</text>'
        for one in (0, 0.25, 0.5, 0.75, 1)
    ]
    for power in range(math.ceil(first), math.floor(last) + 1):
        parts.append(f'<text x="{x(10.0**power):.1f}" y="{high - 8}" text-anchor="middle">10^{power}</text>')
    parts.append(
        f'<line x1="{left}" x2="{wide - 10}" y1="{y(base):.1f}" y2="{y(base):.1f}" stroke="#444" '
        'stroke-dasharray="5 4"/>'
    )
    legend = []
    for i, (name, points) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x(tau):.1f},{y(share):.1f}" for tau, share in sorted(points) if tau > 0)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        legend.append(f'<span style="color:{colour}">■</span> {html.escape(name)}')
    frame = f'viewBox="0 0 {wide} {high}" width="{wide}" font-size="11" font-family="system-ui" role="img"'
    picture = f'<svg {frame} aria-label="worst-group accuracy over tau">{"".join(parts)}</svg>'
    return f'{picture}<p class="note">{" &nbsp; ".join(legend)}</p>'
