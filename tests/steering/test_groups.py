"""Intervals, paired tests and layouts, against hand-worked numbers, statsmodels and scipy."""

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.proportion import proportion_confint

from vitrail.images import open_images
from vitrail.steering.groups import (
    GroupedImages,
    Share,
    group_accuracy,
    group_change,
    mcnemar,
    open_groups,
    wilson,
)


def test_wilson_by_hand():
    # 9 of 10, z = 1.96, z^2 = 3.8415: centre (0.9 + 0.19207) / 1.38415 = 0.78899,
    # half width 1.96 sqrt(0.009 + 0.0096036) / 1.38415 = 0.19314.
    assert wilson(9, 10) == pytest.approx((0.59585, 0.98213), abs=1e-4)
    assert wilson(0, 7)[0] == 0
    assert wilson(7, 7)[1] == 1
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (144, 642), (140, 180), (3987, 5794), (5, 5)])
def test_wilson_is_that_of_statsmodels(k, n):
    assert wilson(k, n) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-9)


def test_mcnemar_by_hand():
    # 1 lost, 5 gained: 2 (C(6,0) + C(6,1)) / 2^6 = 14 / 64.
    assert mcnemar(5, 1) == 14 / 64
    assert mcnemar(1, 5) == 14 / 64
    assert mcnemar(3, 3) == 1
    assert mcnemar(0, 0) == 1
    assert mcnemar(6, 0) == 2 / 64


@pytest.mark.parametrize(("gained", "lost"), [(10, 3), (1, 0), (40, 41), (300, 240), (2500, 2400)])
def test_mcnemar_is_that_of_statsmodels_and_scipy(gained, lost):
    assert mcnemar(gained, lost) == pytest.approx(binomtest(gained, gained + lost, 0.5).pvalue, rel=1e-9)
    table = [[7, lost], [gained, 9]]
    assert mcnemar(gained, lost) == pytest.approx(reference_mcnemar(table, exact=True).pvalue, rel=1e-6)


def test_overall_is_the_mean_of_groups_by_their_sizes():
    # a: 3 of 4, b: 1 of 2, c: none there. Overall 4 of 6; the worst is b.
    right = np.array([1, 1, 1, 0, 1, 0], dtype=bool)
    group = np.array([0, 0, 0, 0, 1, 1])
    found = group_accuracy(right, group, ["a", "b", "c"])
    assert found.overall == Share(4, 6)
    assert found.groups == {"a": Share(3, 4), "b": Share(1, 2)}
    assert (found.worst, found.worst_share.value) == ("b", 0.5)
    weighted = sum(share.n * share.value for share in found.groups.values()) / found.overall.n
    assert weighted == pytest.approx(found.overall.value)
    told = found.to_json()
    assert told["worst"]["group"] == "b"
    assert told["b"]["low"], told["b"]["high"] == pytest.approx(wilson(1, 2))


def test_change_of_the_worst_group_takes_the_minimum_anew():
    # Before: a 2 of 4, b 4 of 4. After: a 4 of 4, b 3 of 4. Worst-group accuracy 0.5 -> 0.75, though a gained 0.5.
    before = np.array([1, 1, 0, 0, 1, 1, 1, 1], dtype=bool)
    after = np.array([1, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
    found = group_change(before, after, np.array([0] * 4 + [1] * 4), ["a", "b"])
    assert found.worst == 0.25
    assert found.groups["a"].value == 0.5
    assert (found.in_worst.gained, found.in_worst.lost, found.in_worst.p) == (2, 0, 0.5)
    assert (found.overall.gained, found.overall.lost) == (2, 1)
    assert found.worst_low < 0.25 < found.worst_high


def test_bootstrap_of_one_large_group_is_the_normal_interval():
    # 1000 images, 120 gained and 60 lost: the change is 0.06, its variance (0.18 - 0.06^2) / 1000.
    before = np.repeat([False, True, True], [120, 60, 820])
    after = np.repeat([True, False, True], [120, 60, 820])
    far = np.ones(1000, dtype=bool)  # a second group that is never the worst
    group = np.repeat([0, 1], 1000)
    found = group_change(np.r_[before, far], np.r_[after, far], group, ["a", "b"], n_bootstrap=20_000)
    half = 1.96 * np.sqrt((0.18 - 0.06**2) / 1000)
    assert (found.worst_low, found.worst_high) == pytest.approx((0.06 - half, 0.06 + half), abs=2e-3)


def test_worlds_know_their_groups():
    found = open_groups("world:shapes?n=40&seed=1&background_bias=0.95", split="val")
    world = open_images("world:shapes?n=40&seed=1&background_bias=0.95&split=val")
    assert found.groups == ("land, land", "land, water", "water, land", "water, water")
    for i in range(40):
        home, ground = found.groups[found.group[i]].split(", ")
        assert world.factors(i).group == f"{home} thing on {ground}"
    assert sum(found.counts().values()) == 40
    colours = open_groups("world:shapes?n=30", label="texture", attribute="colour")
    assert colours.classes == ("checked", "dotted", "plain", "striped")
    assert "red" in colours.attributes
    with pytest.raises(ValueError, match="no factor 'mood'"):
        open_groups("world:shapes?n=4", attribute="mood")


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path)


@pytest.fixture
def waterbirds(tmp_path):
    rows = ["img_id,img_filename,y,split,place,place_filename"]
    for i, (y, split, place) in enumerate([(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0), (1, 2, 1), (0, 2, 0)]):
        picture(tmp_path / f"species/{i}.jpg", i)
        rows.append(f"{i},species/{i}.jpg,{y},{split},{place},/a/b")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    return tmp_path


def test_waterbirds_layout(waterbirds):
    found = open_groups(str(waterbirds), split="val")
    assert found.groups == ("landbird, land", "landbird, water", "waterbird, land", "waterbird, water")
    assert found.group.tolist() == [1, 2]
    assert found.images.record(0).id == "species/2.jpg"
    assert found.images.load(1).size == (4, 4)
    assert open_groups(str(waterbirds)).counts() == dict(zip(found.groups, [2, 1, 1, 2], strict=True))
    found.write_table(waterbirds / "val.csv")
    assert open_images(str(waterbirds / "val.csv")).record(1).class_name == "waterbird"
    again = open_groups(str(waterbirds / "val.csv"), label_column="class_name", group_columns=["attribute"])
    assert (again.group.tolist(), again.groups) == ([1, 2], found.groups)
    (waterbirds / "metadata.csv").write_text("img_filename,y,split\na.jpg,0,0\n")
    with pytest.raises(ValueError, match="no column 'place'"):
        open_groups(str(waterbirds))
    (waterbirds / "metadata.csv").write_text("img_filename,y,split,place\na.jpg,0,7,0\n")
    with pytest.raises(ValueError, match="got '7'"):
        open_groups(str(waterbirds))
    (waterbirds / "metadata.csv").write_text("img_filename,y,split,place\na.jpg,2,0,0\nb.jpg,0,0,1\n")
    with pytest.raises(ValueError, match=r"has class 2; known are 0 \(landbird\) to 1"):
        open_groups(str(waterbirds))


@pytest.mark.parametrize("text", [True, False])
def test_celeba_layout(tmp_path, text):
    rows = [("1.jpg", 1, -1, 1, 0), ("2.jpg", -1, 1, -1, 0), ("3.jpg", 1, 1, 1, 2), ("4.jpg", -1, -1, 1, 2)]
    for name, *_ in rows:
        picture(tmp_path / "img_align_celeba" / name)
    if text:
        lines = ["4", "Male Blond_Hair Young"] + [f"{name}  {a} {b}  {c}" for name, a, b, c, _ in rows]
        (tmp_path / "list_attr_celeba.txt").write_text("\n".join(lines))
        (tmp_path / "list_eval_partition.txt").write_text("\n".join(f"{row[0]} {row[4]}" for row in rows))
    else:
        lines = ["image_id,Male,Blond_Hair,Young"] + [f"{name},{a},{b},{c}" for name, a, b, c, _ in rows]
        (tmp_path / "list_attr_celeba.csv").write_text("\n".join(lines))
        parts = ["image_id,partition"] + [f"{row[0]},{row[4]}" for row in rows]
        (tmp_path / "list_eval_partition.csv").write_text("\n".join(parts))
    found = open_groups(str(tmp_path), split="test")
    assert found.classes == ("not Male", "Male")
    assert found.attributes == ("not Blond_Hair", "Blond_Hair")
    assert found.group.tolist() == [3, 0]
    assert found.images.load(0).size == (4, 4)
    with pytest.raises(ValueError, match="no attribute 'Bald'"):
        open_groups(str(tmp_path), attribute="Bald")
    if text:
        (tmp_path / "list_attr_celeba.txt").write_text("\n".join(lines[:-1]))
        with pytest.raises(ValueError, match="announces 4 pictures and names 3"):
            open_groups(str(tmp_path))


def test_any_table_with_columns_of_groups(tmp_path):
    rows = ["file,what,where,when,split", "a.png,cat,in,day,test", "b.png,dog,out,day,test", "c.png,cat,out,night,val"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    found = open_groups(str(tmp_path / "t.csv"), label_column="what", group_columns=["where", "when"])
    assert found.attributes == ("in and day", "out and day", "out and night")
    assert [found.groups[g] for g in found.group] == ["cat, in and day", "dog, out and day", "cat, out and night"]
    assert len(open_groups(str(tmp_path / "t.csv"), split="test", label_column="what", group_columns=["where"])) == 2
    with pytest.raises(ValueError, match="no column 'group'"):
        open_groups(str(tmp_path / "t.csv"), label_column="what")
    with pytest.raises(ValueError, match="has no split 'train'"):
        open_groups(str(tmp_path / "t.csv"), split="train", label_column="what", group_columns=["where"])
    (tmp_path / "t.csv").write_text("file,label,group\na.png,,x\n")
    with pytest.raises(ValueError, match="line 2: label or group is empty"):
        open_groups(str(tmp_path / "t.csv"))


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 to 4 can be right, got 5"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="not negative"):
        mcnemar(-1, 2)
    with pytest.raises(ValueError, match="one each"):
        group_accuracy(np.ones(3, bool), np.zeros(2, int), ["a"])
    with pytest.raises(FileNotFoundError, match="is missing"):
        open_groups(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="in no layout known here"):
        open_groups(str(tmp_path))
    with pytest.raises(ValueError, match="layout must be auto"):
        open_groups("world:shapes?n=4", layout="birds")
    with pytest.raises(ValueError, match="does not take these options"):
        open_groups("world:shapes?n=4", label_column="a")
    images = open_images("world:shapes?n=3")
    with pytest.raises(ValueError, match="at least two classes"):
        GroupedImages(images, np.zeros(3, int), np.array([0, 1, 0]), ("a", "b"), ("c", "d"))
