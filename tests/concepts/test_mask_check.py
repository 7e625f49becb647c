"""Names against masks: a number by hand, scikit-learn, latents planted in a world, and a few COCO pictures."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from vitrail.backbones import load
from vitrail.backbones.grid import Grid
from vitrail.backbones.preprocess import Preprocess
from vitrail.coders import TopK
from vitrail.coders.sparse import Codes
from vitrail.concepts.mask_check import check_masks, class_said, write_mask_checks
from vitrail.concepts.masks import (
    patch_codes,
    patch_shares,
    read_mask_classes,
    truth_of_labels,
    truth_of_masks,
    truth_of_pictures,
)
from vitrail.concepts.table import Concept
from vitrail.images import open_images
from vitrail.metrics.truth import Truth
from vitrail.statistics import ActivationStats

LENIENT = {"min_fires": 1, "min_patches": 1, "min_pictures": 1}
PREPROCESS = Preprocess.of((32, 32))
GRID = Grid(height=2, width=2, patch_px=16, image_px=(32, 32), n_cls=1, n_registers=0)


def named(latent, name, method="top_images"):
    return Concept(latent=latent, method=method, name=name, score=0.5, runner_up="other", runner_up_score=0.1)


def truth_of(shown, unclear=None):
    """`shown` (n_images, n_patches, n_concepts) of bools; concepts are "p", "q", "r"."""
    n_patches, n_concepts = shown.shape[1:]
    unclear = np.zeros_like(shown) if unclear is None else unclear
    bits = [np.packbits(one.reshape(-1, n_concepts), axis=1) for one in (shown, unclear)]
    return Truth(tuple("pqr"[:n_concepts]), shown.any(1), (1, n_patches), *bits)


def test_numbers_by_hand():
    # Two pictures of three patches; "p" is on the first patch of each, "q" on the second of each.
    shown = np.zeros((2, 3, 2), dtype=bool)
    shown[:, 0, 0] = shown[:, 1, 1] = True
    z = torch.tensor([[4.0], [1.0], [0.0], [2.0], [0.0], [3.0]])
    found = check_masks(Codes.from_dense(z), truth_of(shown), [named(0, "p")], n_bootstrap=0, **LENIENT)
    (row,) = found.rows
    # On p: 4 and 2; elsewhere 1, 0, 0, 3. Of 8 pairs all but (2, 3) are in order: 7/8.
    # Precision (4 + 2) / 10, counted 2 of 4; p is on 2 of 6 patches, so lift .6 * 3.
    # Best of picture 1: above 1 (4 alone); used on picture 2 it lets 2 and 3 in: 1 true, 1 false. Best of picture 2:
    # above 0 (2 and 3: F1 2/3); used on picture 1 it lets 4 and 1 in: 1 true, 1 false. IoU 2 / (2 + 2).
    assert row.auc == pytest.approx(7 / 8)
    assert (row.precision, row.counted, row.lift) == pytest.approx((0.6, 0.5, 1.8))
    assert row.iou == pytest.approx(0.5)
    assert (row.n_fires, row.n_patches, row.n_pictures) == (4, 2, 2)
    # q: 1 and 0 against 4, 0, 2, 3: pairs won 1, tied 1 of 8.
    assert (row.rank, row.best, row.n_classes) == (1, "p", 2)
    assert row.random == pytest.approx(1.5 / 8)


def test_auc_is_scikit_learns_with_ties_and_patches_that_do_not_count():
    rng = np.random.default_rng(0)
    shown = rng.random((12, 5, 3)) < 0.3
    unclear = ~shown & (rng.random(shown.shape) < 0.2)
    z = rng.integers(0, 4, (60, 7)) * (rng.random((60, 7)) < 0.5)
    codes = Codes.from_dense(torch.from_numpy(z).float())
    rows = [named(latent, "pqr"[latent % 3]) for latent in range(7)]
    found = check_masks(codes, truth_of(shown, unclear), rows, n_bootstrap=50, **LENIENT)
    for row in found.measured:
        for at, concept in enumerate(found.classes):
            counts = ~unclear[..., at].ravel()
            expected = roc_auc_score(shown[..., at].ravel()[counts], z[counts, row.latent])
            assert found.auc[row.latent, at] == pytest.approx(expected)
            if concept == row.concept:
                assert row.auc == pytest.approx(expected)
    assert len(found.measured) == 7


def test_each_resample_is_the_auc_of_the_pictures_drawn():
    rng = np.random.default_rng(3)
    shown = np.zeros((6, 4, 2), dtype=bool)
    shown[:, 0, 0] = shown[:, 1, 1] = True
    z = rng.integers(0, 3, (24, 1)).astype(float)
    found = check_masks(
        Codes.from_dense(torch.from_numpy(z).float()), truth_of(shown), [named(0, "p")], n_bootstrap=9, **LENIENT
    )
    drawn = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=9)
    for weights, auc in zip(drawn, found.draws[0], strict=True):
        pictures = np.repeat(np.arange(6), weights)
        y, x = shown[pictures, :, 0].ravel(), z.reshape(6, 4)[pictures].ravel()
        assert auc == pytest.approx(roc_auc_score(y, x))
    (row,) = found.rows
    assert (row.low, row.high) == pytest.approx(tuple(np.percentile(found.draws[0], [2.5, 97.5])))


@pytest.fixture(scope="module")
def planted():
    """A world's truth, and codes of a latent a concept that fires on its patches, one that fires anywhere after."""
    world = open_images("world:shapes?n=120&seed=4&image_px=64")
    truth = Truth.of_world(world, range(len(world)), grid=(8, 8), classes=False)
    rng = np.random.default_rng(1)
    z = np.zeros((truth.n * truth.n_patches, len(truth.concepts) + 1), dtype=np.float32)
    for at in range(len(truth.concepts)):
        shown, _ = truth.patch_labels(at)
        z[:, at] = (shown & (rng.random(len(shown)) < 0.9)) * rng.uniform(1, 2, len(shown))
    z[:, -1] = (rng.random(len(z)) < 0.1) * rng.uniform(1, 2, len(z))
    return truth, Codes.from_dense(torch.from_numpy(z))


def test_planted_latents_hold_and_dealt_names_do_not(planted):
    truth, codes = planted
    words = [concept.partition(":")[2] for concept in truth.concepts]
    found = check_masks(codes, truth, [named(at, word) for at, word in enumerate(words)], n_bootstrap=100)
    said = found.summary()
    assert said["measured"] > 20
    assert said["auc"] > 0.94
    assert said["best"] == 1.0
    assert said["holds"] / said["measured"] > 0.9
    assert said["p"] < 0.01
    assert said["dealt_interval"][0] <= said["dealt"] <= said["dealt_interval"][1] < said["auc"] - 0.2
    for row in found.measured:
        assert row.low <= row.auc <= row.high
        assert row.precision == pytest.approx(1)
        assert row.iou > 0.7
        assert row.lift_low <= row.lift <= row.lift_high
    few = found.only({1, 2, 3})
    assert [row.latent for row in few.measured] == [1, 2, 3]
    assert few.summary()["measured"] == len(few.draws) == 3
    assert few.measured[0] == next(row for row in found.measured if row.latent == 1)
    shuffled = [named(at, words[(at + 5) % len(words)]) for at in range(len(words))]
    wrong = check_masks(codes, truth, shuffled, n_bootstrap=100).summary()
    assert wrong["auc"] < 0.7
    assert wrong["best"] < 0.1


def test_a_latent_that_fires_anywhere_is_at_chance(planted):
    truth, codes = planted
    found = check_masks(codes, truth, [named(codes.d_sae - 1, "large"), named(0, "star")], n_bootstrap=100)
    row = found.rows[0]
    assert row.auc == pytest.approx(0.5, abs=0.04)
    assert row.lift == pytest.approx(1, abs=0.3)
    assert not row.holds


def test_what_cannot_be_measured_is_none(planted):
    truth, codes = planted
    codes = Codes.from_entries(codes.rows(), codes.indices, codes.values, n=codes.n, d_sae=codes.d_sae + 1)
    rows = [named(0, "spaceship"), named(codes.d_sae - 1, "star"), named(1, "star")]
    found = check_masks(codes, truth, rows, n_bootstrap=10)
    assert found.rows[:2] == (None, None)
    assert found.rows[2] is not None
    nothing = check_masks(codes, truth, rows[:1], n_bootstrap=10)
    assert nothing.measured == []
    assert nothing.summary() == {"names": 1, "measured": 0, "n_classes": len(nothing.classes)}
    among = check_masks(codes, truth, rows, n_bootstrap=10, among=["star", "a circle", "spaceship"])
    assert set(among.classes) == {"shape:star", "shape:circle"}
    with pytest.raises(ValueError, match="there must be a row a patch"):
        check_masks(codes.select_rows(torch.arange(5)), truth, rows)


def test_names_say_classes():
    assert class_said("a zebra", ["bear", "zebra"]) == "zebra"
    assert class_said("Hot dog", ["dog", "hot dog"]) == "hot dog"
    assert class_said("thing at the top left", ["position:top left"]) == "position:top left"
    assert class_said("thing", ["zebra"]) is None


def test_the_sheet_has_a_row_a_measured_name(planted, tmp_path):
    truth, codes = planted
    found = check_masks(codes, truth, [named(0, "spaceship"), named(1, "star"), named(2, "star")], n_bootstrap=10)
    write_mask_checks(tmp_path / "mask_check.csv", found.measured)
    with (tmp_path / "mask_check.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["latent"]) for row in rows] == [
        row.latent for row in sorted(found.measured, key=lambda row: -row.auc)
    ]
    assert {row["holds"] for row in rows} <= {"True", "False"}


def test_pictures_with_labels_are_patches_of_their_own():
    truth = truth_of_labels(np.array([0, 1, -1, 0, 1, 1]), ["cat", "dog"])
    z = torch.tensor([[3.0], [1.0], [9.0], [2.0], [0.0], [0.0]])
    found = check_masks(Codes.from_dense(z), truth, [named(0, "cat")], n_bootstrap=0, **LENIENT)
    assert found.rows[0].auc == 1
    assert found.rows[0].precision == pytest.approx(5 / 6)  # the unlabelled picture's 9 counts nowhere
    assert found.rows[0].lift == pytest.approx(5 / 6 / (2 / 5))
    with pytest.raises(ValueError, match="-1 or in 0..1"):
        truth_of_labels(np.array([2]), ["cat", "dog"])


# -- masks on disk


def write_masks(folder, masks, classes):
    (folder / "masks").mkdir(parents=True)
    (folder / "classes.json").write_text(json.dumps({"classes": classes}))
    for name, mask in masks.items():
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{name}.png")
    return folder / "masks"


def test_masks_are_read_patch_by_patch(tmp_path):
    mask = np.zeros((32, 32))
    mask[:16, :16] = 5  # the first patch is all zebra
    mask[:16, 16:20] = 5  # a quarter of the second, the rest road
    mask[:16, 20:] = 9
    mask[16:, :16] = 9  # the third all road; the fourth is not labelled
    folder = write_masks(tmp_path, {"one": mask}, {0: "unlabeled", 5: "zebra", 9: "road"})
    truth = truth_of_masks(["pictures/one.jpg"], folder, PREPROCESS, GRID)
    assert truth.concepts == ("zebra", "road")
    zebra, road = truth.patch_labels(0), truth.patch_labels(1)
    assert zebra[0].tolist() == [True, False, False, False]
    assert zebra[1].tolist() == [True, False, True, False]
    assert road[0].tolist() == [False, True, True, False]
    assert road[1].tolist() == [True, True, True, False]
    assert truth.images.tolist() == [[True, True]]


def test_masks_are_cut_as_the_model_sees_the_picture():
    mask = np.zeros((32, 64))
    mask[:, 16:48] = 3  # the middle square is what is left of it
    assert patch_shares(mask, PREPROCESS, GRID)[:, 3].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("[1, 2]", "must map numbers to names"),
        ('{"classes": {"one": "zebra"}}', "a class is a number in 0..255, got 'one'"),
        ('{"classes": {"300": "zebra"}}', "a class is a number in 0..255, got '300'"),
        ('{"classes": {"1": "zebra", "2": "zebra"}}', "each once; it has 2, 1 different"),
        ('{"classes": ', "is not JSON"),
    ],
)
def test_bad_lists_of_classes(tmp_path, classes, message):
    (tmp_path / "classes.json").write_text(classes)
    with pytest.raises(ValueError, match=message):
        read_mask_classes(tmp_path)


def test_masks_that_are_missing_or_of_unknown_classes(tmp_path):
    folder = write_masks(tmp_path, {"one": np.full((32, 32), 7)}, {5: "zebra"})
    with pytest.raises(ValueError, match="has the number 7, which is no class"):
        truth_of_masks(["one.jpg"], folder, PREPROCESS, GRID)
    with pytest.raises(FileNotFoundError, match=r"two\.jpg has no mask"):
        truth_of_masks(["two.jpg"], folder, PREPROCESS, GRID)
    empty = tmp_path / "else" / "where"
    empty.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no classes\.yaml"):
        read_mask_classes(empty)
    (tmp_path / "classes.yaml").write_text("classes:\n  0: unlabeled\n  7: zebra\n")
    assert read_mask_classes(folder) == {7: "zebra"}


def test_pictures_without_masks_are_told(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="knows of no masks"):
        truth_of_pictures(open_images(str(tmp_path)), [0], load("toy/shapes"), None)


@pytest.mark.shared
def test_on_a_few_coco_pictures_raw_pixels_find_what_is_there(shared_data):
    """Six pictures, classes by their numbers; latents that are told where the classes are, through stored masks."""
    folder = shared_data / "coco_masks" / "masks"
    ids = [path.name for path in sorted((shared_data / "coco_masks" / "images").glob("*.jpg"))[:6]]
    preprocess, grid = (
        Preprocess.of((224, 224)),
        Grid(height=14, width=14, patch_px=16, image_px=(224, 224), n_cls=1, n_registers=0),
    )
    truth = truth_of_masks(ids, folder, preprocess, grid)
    assert truth.n == 6
    assert len(truth.concepts) > 80
    shown = [at for at in range(len(truth.concepts)) if truth.patch_labels(at)[0].sum() >= 10]
    z = np.stack([truth.patch_labels(at)[0] for at in shown], 1).astype(np.float32)
    rows = [named(place, truth.concepts[at]) for place, at in enumerate(shown)]
    found = check_masks(Codes.from_dense(torch.from_numpy(z)), truth, rows, n_bootstrap=20, min_pictures=2)
    assert len(found.measured) >= 3
    assert all(row.auc == 1 and row.rank == 1 and row.iou == 1 for row in found.measured)
    random = Codes.from_dense(torch.rand(z.shape, generator=torch.Generator().manual_seed(0)))
    for row in check_masks(random, truth, rows, n_bootstrap=20, min_pictures=2).measured:
        assert row.auc == pytest.approx(0.5, abs=0.2)
        assert replace(row, low=0.4).holds is False


def test_codes_of_patches_lie_as_the_truth_of_patches_does():
    toy = load("toy/shapes")
    world = open_images(f"world:shapes?n=6&seed=2&image_px={toy.grid.image_px[0]}")
    point = f"blocks.{toy.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        x = toy.activations(torch.stack([toy.preprocess(world.load(i)) for i in range(6)]), [point])[point]
    rows = x[:, toy.grid.tokens("spatial")].flatten(0, 1)
    coder = TopK(d_in=x.shape[-1], d_sae=40, k=3)
    coder.fit(ActivationStats.of(rows), rows)
    codes, positions = patch_codes(toy, coder.eval(), world, point, "spatial", batch_size=4)
    assert positions == list(range(6))
    with torch.no_grad():
        torch.testing.assert_close(codes.to_dense(), coder.encode(rows))
    truth = truth_of_pictures(world, positions, toy, None)
    assert codes.n == truth.n * truth.n_patches
    whole, _ = patch_codes(toy, coder, world, point, "all", batch_size=4)
    torch.testing.assert_close(whole.to_dense(), codes.to_dense())
    with pytest.raises(ValueError, match="not 'cls'"):
        patch_codes(toy, coder, world, point, "cls")
