"""eta^2 and omega^2: by hand, against statsmodels, and on the paper's own table."""

import csv
import warnings
from itertools import product

import numpy as np
import pytest

from vitrail.studies.variance import decompose, decompose_rows, interactions, omega_squared


def table(sizes=(5, 3, 4), drop=(), seeds=1, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for place, (a, b, c, s) in enumerate(product(*map(range, sizes), range(seeds))):
        if place not in drop:
            value = 2.0 * a + 0.5 * b - 0.2 * c + 0.4 * a * (b == 1) + 0.3 * rng.normal()
            rows.append({"backbone": f"b{a}", "width": 2**b, "k": c, "seed": s, "m": value})
    return rows


def columns(rows, *names):
    return [row["m"] for row in rows], {name: [row[name] for row in rows] for name in names}


def test_by_hand():
    # Rows 1 3 and 5 7: mean 4, total 9+1+1+9 = 20. Rows differ by 4: 16; columns by 2: 4; nothing is left.
    found = decompose([1, 3, 5, 7], {"row": "aabb", "column": "xyxy"})
    assert [(one.term, one.df) for one in found.terms] == [("row", 1), ("column", 1), ("residual", 1)]
    assert [one.eta2 for one in found.terms] == pytest.approx([0.8, 0.2, 0.0])
    assert (found.balanced, found.ss_total) == (True, 20)


def statsmodels_of(rows, formula):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pandas = pytest.importorskip("pandas")
        anova = pytest.importorskip("statsmodels.stats.anova")
        from statsmodels.formula.api import ols

        return anova.anova_lm(ols(formula, pandas.DataFrame(rows)).fit(), typ=2)


@pytest.mark.parametrize("drop", [(), (3, 17, 18, 44, 59)])
@pytest.mark.parametrize("terms", [("backbone", "width", "k"), ("backbone", "width", "k", "backbone:width")])
def test_statsmodels_has_the_same_sums_of_squares(drop, terms):
    rows = table(drop=drop)
    found = decompose(*columns(rows, "backbone", "width", "k"), terms=terms)
    theirs = statsmodels_of(rows, "m ~ " + " + ".join(":".join(f"C({f}, Sum)" for f in t.split(":")) for t in terms))
    for share, (ss, df, f) in zip(found.terms, theirs[["sum_sq", "df", "F"]].to_numpy(), strict=False):
        assert share.ss == pytest.approx(ss, rel=1e-8, abs=1e-10)
        assert share.df == df
        if share.term != "residual":
            assert share.f == pytest.approx(f, rel=1e-8)
    assert sum(one.eta2 for one in found.terms) == pytest.approx(1, abs=1e-12)
    assert found.balanced == (not drop)
    assert [one.term for one in found.terms] == [*terms, "residual", *(["shared"] if drop else [])]


def test_shares_of_a_balanced_design_sum_to_one_without_a_shared_part():
    found = decompose(*columns(table(), "backbone", "width", "k"), terms=interactions(["backbone", "width", "k"]))
    assert sum(one.eta2 for one in found.terms) == pytest.approx(1, abs=1e-12)
    assert found["residual"].df == 4 * 2 * 3
    with pytest.raises(KeyError, match="no term 'shared'"):
        found["shared"]


def test_omega_squared_is_near_zero_for_a_factor_that_does_nothing():
    rng = np.random.default_rng(0)
    factors = {"a": [i % 5 for i in range(60)], "b": [i // 5 for i in range(60)]}
    drawn = [decompose(rng.normal(size=60), factors)["b"] for _ in range(200)]
    assert np.mean([one.omega2 for one in drawn]) == pytest.approx(0, abs=0.02)
    assert np.mean([one.eta2 for one in drawn]) > 0.15  # 11 of 59 degrees of freedom
    one = decompose(rng.normal(size=60), factors)
    again = omega_squared(one["b"].eta2, one["b"].df, one["residual"].eta2, one["residual"].df)
    assert again == pytest.approx(one["b"].omega2)


def test_seeds_give_intervals():
    rows = table(sizes=(3, 2, 2), seeds=3)
    found = decompose_rows(rows, "m", ["backbone", "width", "k"], n_bootstrap=50)
    share = found["backbone"]
    assert share.low is not None
    assert share.high is not None
    assert 0 < share.low < share.high <= 1
    assert decompose_rows(table(), "m", ["backbone", "width"], n_bootstrap=50)["width"].low is not None
    assert decompose_rows(table(), "m", ["backbone", "width", "k"], n_bootstrap=50)["width"].low is None  # one a cell


def test_the_papers_shares_sum_to_one_and_two_statements_about_them_fail(shared_data):
    path = shared_data.parent / "reference/tables/visae_table3_variance.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with path.open() as file:
        rows = {row.pop("metric"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}
    for shares in rows.values():
        assert sum(shares.values()) == pytest.approx(1, abs=0.0015 + 1e-9)  # three numbers of three digits
    backbone = {name: shares["eta2_backbone"] for name, shares in rows.items()}
    assert sum(value > 0.9 for value in backbone.values()) == 3  # "over 90% on three metrics": holds
    assert sum(value > 0.6 for value in backbone.values()) == 5  # "over 60% on five of seven": holds
    assert [name for name, s in rows.items() if s["eta2_hp"] > s["eta2_backbone"]] == ["M2", "M6_iNat"]  # "only" M2
    assert max(backbone["M4"], backbone["M6_iNat"]) < 0.7  # "roughly three-quarters": fails
    omega = {m: omega_squared(s["eta2_backbone"], 4, s["eta2_resid"], 44) for m, s in rows.items()}
    assert omega["M1"] == pytest.approx(0.996, abs=0.001)
    assert omega["M4"] == pytest.approx(0.640, abs=0.001)
    assert omega_squared(rows["M4"]["eta2_hp"], 11, rows["M4"]["eta2_resid"], 44) == pytest.approx(0.0045, abs=0.001)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        decompose([1.0, float("nan")], {"a": "xy"})
    with pytest.raises(ValueError, match="'a' has one level only"):
        decompose([1.0, 2.0], {"a": "xx"})
    with pytest.raises(ValueError, match="'a' has 3 levels for 2 values"):
        decompose([1.0, 2.0], {"a": "xyz"})
    with pytest.raises(KeyError, match="no factor 'b'"):
        decompose([1.0, 2.0], {"a": "xy"}, terms=["a:b"])
    with pytest.raises(ValueError, match="residual degrees of freedom"):
        omega_squared(0.5, 1, 0.5, 0)
