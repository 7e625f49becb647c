"""Rows in the papers' layouts."""

import csv
import io
import json

import pytest
from rich.console import Console

from vitrail.cli import main
from vitrail.studies.paper_tables import LAYOUTS, differences_table, paper_table
from vitrail.studies.table_text import print_pairs


def row(name, control_of=None, **numbers):
    measured = {
        key: {"value": value, "low": value - 0.01, "high": value + 0.01, "definition": "d", "n": 9}
        for key, value in numbers.items()
    }
    return {"name": name, "control_of": control_of, "point": "blocks.1", "architecture": "topk", "measured": measured}


ROWS = [
    row("top_k", explained_variance=0.9712, cosine=0.98, l0_tokens=16.04, ce_recovered=98.951),
    row("top_k / pca", "top_k", explained_variance=0.5, l0_tokens=16.0),
]


def test_markdown_by_hand():
    assert paper_table(ROWS, "prisma") == (
        "|  | % explained var. | avg L0 | cos sim | % CE recovered |\n"
        "|---|---:|---:|---:|---:|\n"
        "| **top_k (blocks.1)** | 97.1 | 16.04 | 0.980 | 98.95 |\n"
        "| pca | 50.0 | 16.00 | – | – |\n"
    )
    without = paper_table(ROWS, "prisma", controls=False, intervals=True)
    assert "97.1 [96.1, 98.1]" in without
    assert "pca" not in without


def test_latex_and_html_escape_what_they_must():
    latex = paper_table(ROWS, "prisma", form="latex")
    assert r"\% explained var." in latex
    assert r"\textbf{top\_k (blocks.1)}" in latex
    assert r"\quad pca & 50.0 & 16.00 & -- & -- \\" in latex
    html = paper_table([row("<b>", explained_variance=0.5)], "prisma", form="html")
    assert "<td>&lt;b&gt; (blocks.1)</td><td>50.0</td>" in html


def test_a_csv_has_full_precision_intervals_and_definitions():
    (first, second) = csv.DictReader(io.StringIO(paper_table(ROWS, "prisma", form="csv")))
    assert float(first["pct_explained_var"]) == 100 * 0.9712
    assert (float(first["avg_L0_low"]), first["avg_L0_definition"]) == (16.04 - 0.01, "d")
    assert (second["control_of"], second["cos_sim"], second["cos_sim_definition"]) == ("top_k", "", "")


def test_spreads_stand_behind_their_means():
    found = paper_table([row("a", sparsity=0.95, sparsity_std=0.008, lp_kl=5.05e-5, lp_kl_std=7.7e-5)], "msae")
    assert "| 0.950 ± 0.008 | 50.50 ± 77.00 |" in found


def test_what_cannot_be_written_is_a_sentence():
    with pytest.raises(ValueError, match="layout must be one of prisma, prisma-published, msae"):
        paper_table(ROWS, "prism")
    with pytest.raises(ValueError, match="form must be one of markdown, latex, html, csv, got 'pdf'"):
        paper_table(ROWS, "prisma", form="pdf")
    with pytest.raises(ValueError, match="none of these 2 rows has a number of the msae table"):
        paper_table([row("a", x=1.0), row("b", x=2.0)], "msae")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_column_is_a_known_measure(layout):
    from vitrail.metrics import MEASURES

    for column in LAYOUTS[layout]:
        assert column.measure in MEASURES
        assert column.spread is None or column.spread in MEASURES


def test_from_the_command_line(tmp_path, capsys):
    import json

    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    main(["table", "prisma", str(tmp_path), "--out", str(tmp_path / "t.csv"), "--form", "csv"])
    assert (tmp_path / "t.csv").read_text() == paper_table(ROWS, "prisma", form="csv")
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(row(f"a#{i}", explained_variance=0.5 + i / 10)) + "\n" for i in range(3)))
    main(["table", "prisma", str(seeds), "--seeds", "--intervals"])
    # .5, .6, .7: mean .6, standard deviation .1, t = 4.303: .6 -+ 4.303 * .1 / sqrt(3) = .3516 to .8484.
    assert "| **a (blocks.1)** | 60.0 [35.2, 84.8] |" in capsys.readouterr().out
    main(["table", "prisma", str(path), "--no-controls"])
    assert "**top_k (blocks.1)** | 97.1" in capsys.readouterr().out


def paired_rows():
    """As above, and less what: by hand, 97.12 % less 50 % with 47.12, 46.9 and 47.3."""
    coder, pca = ROWS
    other = row("b", explained_variance=0.9, cosine=0.9)
    differences = {"explained_variance": {"value": 0.4712, "low": 0.469, "high": 0.473, "n": 9}}
    against_other = {"explained_variance": {"value": 0.0712, "low": None, "high": None, "n": 1}}
    return [{**coder, "paired": {"top_k / pca": differences, "b": against_other}}, pca, other]


def test_differences_have_signs_intervals_and_dashes():
    assert differences_table(paired_rows(), "prisma") == (
        "|  | % explained var. | avg L0 | cos sim | % CE recovered |\n"
        "|---|---:|---:|---:|---:|\n"
        "| top_k (blocks.1) less pca | +47.1 [+46.9, +47.3] | – | – | – |\n"
    )
    assert "top_k (blocks.1) less b | +7.1 | –" in differences_table(paired_rows(), "prisma", against="b")
    assert r"top\_k (blocks.1) less pca & +47.1" in differences_table(paired_rows(), "prisma", form="latex")
    assert "<td>+47.1 [+46.9, +47.3]</td>" in differences_table(paired_rows(), "prisma", form="html", against="pca")
    (line,) = csv.DictReader(io.StringIO(differences_table(paired_rows(), "prisma", form="csv")))
    assert (line["less"], float(line["pct_explained_var_low"]), line["cos_sim"]) == ("top_k / pca", 46.9, "")


def test_differences_that_there_are_none_of_are_a_sentence(capsys, tmp_path):
    with pytest.raises(ValueError, match="no differences over the same images"):
        differences_table(ROWS, "prisma")
    with pytest.raises(ValueError, match="no row was compared with 'c'. There are: top_k / pca, b"):
        differences_table(paired_rows(), "prisma", against="c")
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(one) + "\n" for one in paired_rows()))
    main(["table", "prisma", str(tmp_path / "e.jsonl"), "--paired", "--against", "b"])
    assert "top_k (blocks.1) less b | +7.1" in capsys.readouterr().out
    for wrong in (["--against", "b"], ["--paired", "--seeds"]):
        with pytest.raises(SystemExit):
            main(["table", "prisma", str(tmp_path / "e.jsonl"), *wrong])
        assert "--paired" in capsys.readouterr().err


def test_the_terminal_shows_them_too(capsys):
    print_pairs(paired_rows(), Console(width=150))
    told = capsys.readouterr().out
    assert "coder less control, paired over the same images" in told
    assert "top_k less pca" in told
    assert "+0.471 [+0.469, +0.473]" in told
    print_pairs(ROWS, Console(width=150))
    assert capsys.readouterr().out == ""
