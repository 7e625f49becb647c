"""The page of a run of `vitrail steer`: the paper's layer row beside neurons and random directions, pictures, latents.

OUT/report.html     one page that needs nothing else
"""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.files import read_json, replacing
from vitrail.tables import read_table

N_LATENTS = 25
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:68em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}p.note{color:#666;font-size:13px}"""
HEAD = ("", "n", "mean S", "S > γ", "S > β: count, words", "ipr > β: count, words", "edit norm", "words of {at} each")


def write_page(folder: str | Path, *, names: Mapping[int, str] | None = None) -> Path:
    """`names`: latents by name. Raises FileNotFoundError where the folder is no run of steering."""
    folder = Path(folder)
    told = read_json(folder / "steerability.json", "run of steering")
    table = read_table(folder / "steerability.parquet")
    at = min((int(n) for n in told["families"]["latents"]["concepts_of"]), default=None)
    head = [one.format(at=at) for one in HEAD][: None if at else -1]
    rows = [family_row(name, one, at) for name, one in told["families"].items()]
    pictures = "".join(
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in (folder / f"{name}.png" for name in ("histogram", "coverage", "curves"))
        if path.is_file()
    )
    say, dose, latents = html.escape, told["dose"], told["latents"]
    asked = f"{dose['operation']} {dose['value']:g}" + ("" if dose["unit"] == "absolute" else f" ({dose['unit']})")
    flat, one = told["before"]["s_of_flattening"], told["families"]["latents"]
    alike = "edits of the same length" if told["against_dose"] == "equal" else "the same number, not length"
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Steerability</title>
<style>{STYLE}</style><h1>How far each latent moves the answer</h1>
<p>{latents["n"]:,} of {latents["n_all"]:,} latents of {say(told["point"])}, {say(told["backbone"])},
one at a time: {say(asked)} on {say(told["where"])} tokens of {told["n_images"]} pictures ({say(told["images"])}),
the error term {"kept" if told["keep_error"] else "replaced"}; {told["words"]["n"]:,} words
({say(told["words"]["source"])}), logit scale {told["logit_scale"]:g}. Way of computing: {say(told["route"])};
{told["seconds"]:.0f} s.</p>
<table><tr>{"".join(f"<th>{say(one)}</th>" for one in head)}</tr>{"".join(rows)}</table>
<p class="note">S: mean over pictures of the summed squared change of the words' probabilities (Eq. 5), 0 to 2. An
answer that is merely made flat has S = {flat:.3f} here: read ipr (1/n for n words alike, 1 for one word) beside it.
γ = {one["gamma"]:g}, β = {one["beta"]:g}. Neurons and random directions at {alike}. Words: different ones that are
first where the threshold is passed; counts compare only at equal numbers, the last column.</p>{pictures}
<h2>Latents that move the answer most</h2><table><tr><th>latent</th><th>name</th><th>S</th><th>ipr</th>
<th>to the word</th><th>P</th><th>ΔP most of</th><th>ΔP</th></tr>
{"".join(latent_rows(table, names or {}))}</table></html>
"""
    path = folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def family_row(name: str, one: Mapping[str, Any], at: int | None) -> str:
    mean = one["mean_s"]
    cells = [
        name,
        f"{one['n']:,}",
        f"{mean['value']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})",
        f"{one['count']:,} ({one['share']:.1%})",
        f"{one['eq8_count']:,}, {one['concepts']}",
        f"{one['ipr_count']:,}, {one['ipr_concepts']}",
        f"{one['edit_norm']:.3g}",
    ]
    if at is not None:
        by_s, by_ipr = (one[key].get(str(at)) for key in ("concepts_of", "ipr_concepts_of"))
        cells.append("–" if by_s is None else f"{by_s:.1f} by S, {by_ipr:.1f} by ipr")
    return "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"


def latent_rows(table: Mapping[str, np.ndarray], names: Mapping[int, str]) -> Sequence[str]:
    """The latents of largest S."""
    mine = np.flatnonzero(table["family"] == "latents")
    order = mine[np.argsort(-table["s"][mine].astype(float), kind="stable")][:N_LATENTS]
    rows = []
    for at in order.tolist():
        number = int(table["number"][at])
        cells = [
            str(number),
            names.get(number, "–"),
            f"{table['s'][at]:.3f}",
            f"{table['ipr'][at]:.3f}",
            str(table["top"][at]),
            f"{table['top_probability'][at]:.3f}",
            str(table["delta_word"][at]),
            f"{table['delta_max'][at]:.3f}",
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return rows
