"""The paper's printed digits: sizes, intervals, bounds of paired tests."""

import csv
import os
from pathlib import Path

import pytest

from vitrail.steering.groups import mcnemar
from vitrail.steering.paper_tables import (
    BEST_RELAXED,
    CELEBA,
    TABLE_1,
    TABLE_2,
    WATERBIRDS,
    best_p,
    fits,
    markdown,
    of_printed,
    sizes_that_fit,
    what_it_says,
    worst_p,
)

TABLES = Path(os.environ.get("VITRAIL_SHARED", Path(__file__).parents[2] / ".." / "shared")) / "reference" / "tables"


def rows_of(name):
    if not TABLES.is_dir():
        pytest.skip(f"{TABLES} is not here")
    with (TABLES / f"steering_{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_sizes_by_hand():
    # 33.33 and 66.67 % are thirds; 50 % needs an even number. So multiples of 6.
    assert sizes_that_fit([33.33, 66.67, 50.0], n_max=20) == [6, 12, 18]
    assert fits(22.43, 642)  # 144 of 642 is 22.4299
    assert not fits(22.43, 640)
    assert not fits(50.01, 5000)  # 2500 of 5000 are 50.00 %, 2501 are 50.02 %
    with pytest.raises(ValueError, match=r"in 0\.\.100"):
        sizes_that_fit([101.0], n_max=3)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("files", "overall", "worst"),
    [
        (("table5_celeba_strict", "table6_celeba_relaxed"), [720, 1440], [180, 360]),
        (("table7_waterbirds_strict", "table8_waterbirds_relaxed"), [5794], [642]),
    ],
)
def test_the_digits_of_the_tables_say_how_many_images_there_were(files, overall, worst):
    printed = {"overall": set(), "worst": set()}
    for name in files:
        for row in rows_of(name):
            for kind, values in printed.items():
                values |= {float(value) for key, value in row.items() if value and key.endswith(kind)}
    assert sizes_that_fit(printed["overall"], n_max=6000)[:2] == overall
    assert sizes_that_fit(printed["worst"], n_max=642)[:2] == worst
    assert CELEBA[:2] == (720, 180)
    assert WATERBIRDS[:2] == (5794, 642)


@pytest.mark.shared
def test_constants_are_those_of_the_tables():
    rows = rows_of("table1_disentangle_main")
    assert (float(rows[0]["celeba_orig_overall"]), float(rows[0]["celeba_orig_worst"])) == CELEBA[2:]
    assert (float(rows[0]["waterbirds_orig_overall"]), float(rows[0]["waterbirds_orig_worst"])) == WATERBIRDS[2:]
    for name, some in TABLE_1.items():
        for layer, overall, worst in some:
            row = rows[layer + 1]
            found = float(row[f"{name.lower()}_sae_overall"]), float(row[f"{name.lower()}_sae_worst"])
            assert found == (overall, worst)
    printed = {
        row.pop(next(iter(row))): tuple(float(value) for value in row.values()) for row in rows_of("table2_typographic")
    }
    assert printed == TABLE_2
    for table, _, layer, overall, worst in BEST_RELAXED:
        name = "table6_celeba_relaxed" if table == "Table 6" else "table8_waterbirds_relaxed"
        row = rows_of(name)[layer]
        assert (float(row["vanilla_overall"]), float(row["vanilla_worst"])) == (overall, worst)


def test_what_a_paired_test_could_at_best_say():
    # CelebA, layer 7: 140 -> 146 of 180. Six gained, none lost: 2 / 2^6. At most 34 lost and 40 gained.
    assert best_p(140, 146) == 2 / 64
    assert worst_p(140, 146, 180) == mcnemar(40, 34)
    told = what_it_says("CelebA", 93.61, 81.11)
    assert told["worst_gain"] == 6
    assert told["worst_best_p"] == 2 / 64
    assert told["overall_gain"] == 6  # 668 -> 674 of 720
    for _, overall, worst in TABLE_1["CelebA"]:  # of twelve layers none would stay below 0.05 / 12
        assert what_it_says("CelebA", overall, worst)["worst_best_p"] > 0.05 / 12
    assert best_p(10, 10) == 1


def test_printed_numbers_have_counts_and_intervals():
    found = of_printed(77.78, 180)
    assert (found.right, found.n) == (140, 180)
    assert found.low < 77.78 < found.high
    with pytest.raises(ValueError, match=r"no number of 180 images is 77\.79 %"):
        of_printed(77.79, 180)
    with pytest.raises(ValueError, match="CelebA and Waterbirds"):
        what_it_says("CUB", 1.0, 1.0)
    assert markdown().count("\n") == 2 + 24 + 2
