"""Truth recovery as a study: planted coders are found, controls fair, seeds have intervals, nothing is done twice."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from vitrail.backbones.preprocess import Preprocess
from vitrail.backbones.toy import ToyViT, wrap
from vitrail.coders import make_coder
from vitrail.coders.sparse import Codes
from vitrail.images import open_images
from vitrail.metrics import MEASURES, RECOVERY_COLUMNS
from vitrail.metrics.recovery import recovery
from vitrail.metrics.truth import Firing, Truth
from vitrail.statistics import ActivationStats
from vitrail.studies import truth_recovery as module
from vitrail.studies.calibration import calibrate, calibration_picture
from vitrail.studies.seeds import check_seeds, over_seeds, t_quantile
from vitrail.studies.table_text import print_recovery
from vitrail.studies.truth_concepts import concept_of_latents, is_recovered, read_concepts
from vitrail.studies.truth_recovery import (
    UNLIMITED,
    Contender,
    best_of_variants,
    encode_rows,
    summary_of,
    truth_controls,
    truth_recovery,
)
from vitrail.studies.truth_splits import AsSeen, Split, read_split, sample_patches, truth_of

POINT = "blocks.0.hook_resid_post"
CHOOSE, SCORE = (open_images(f"world:shapes?n=48&image_px=32&split={split}") for split in ("val", "test"))


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    model = ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=2, n_heads=2, d_mlp=32, n_classes=48)
    return wrap(model, name="toy/t")


@pytest.fixture(scope="module")
def splits(backbone):
    return [read_split(backbone, images, POINT, "all", batch_size=16) for images in (CHOOSE, SCORE)]


def fitted(architecture, sample, **arguments):
    coder = make_coder(architecture, d_in=sample.shape[1], **arguments)
    coder.fit(ActivationStats.of(sample), sample)
    return coder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def coders(splits):
    sample = splits[0].x
    return {
        "topk#0": fitted("topk", sample, d_sae=32, k=3, seed=0),
        "topk#1": fitted("topk", sample, d_sae=32, k=3, seed=1),
        "relu": fitted("relu", sample, d_sae=40),
    }


def study(backbone, coders, sample, out, **options):
    settings = dict(point=POINT, tokens="all", control_sample=sample, n_bootstrap=20, batch_size=16)
    return truth_recovery(backbone, CHOOSE, SCORE, coders, out, **{**settings, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory, backbone, coders, splits):
    out = tmp_path_factory.mktemp("recovery")
    return out, study(backbone, coders, splits[0].x, out)


# -- pictures and truth


def test_a_splits_rows_are_the_backbones_image_by_image(backbone, splits):
    images = torch.stack([backbone.preprocess(CHOOSE.load(i)) for i in range(48)])
    with torch.inference_mode():
        x = backbone.activations(images, [POINT])[POINT]
    assert splits[0].n_tokens == 17
    torch.testing.assert_close(splits[0].x, x.flatten(0, 1))
    assert np.array_equal(splits[0].truth.images, Truth.of_world(CHOOSE, range(48), grid=(4, 4)).images)


@pytest.mark.parametrize(("tokens", "n_tokens", "patches"), [("spatial", 16, slice(None)), ("cls", 1, None)])
def test_other_tokens_have_their_own_patches(backbone, tokens, n_tokens, patches):
    split = read_split(backbone, CHOOSE, POINT, tokens)
    assert (split.n_tokens, split.patches) == (n_tokens, patches)
    assert (split.truth.grid is None) == (patches is None)


def test_masks_are_cropped_as_the_pictures_are():
    """The middle 32 of 64 pixels, in 4 x 4 patches of 8: rows and columns 16..47."""
    world = open_images("world:shapes?n=12&image_px=64&split=test")
    middle = Preprocess.of((32, 32), crop_pct=0.5)
    assert middle.resize_px == (64, 64)
    seen = truth_of(world, range(12), middle, grid=(4, 4))
    place = seen.concepts.index("object")
    for i in range(12):
        mask = world.scene(i).masks["object"][16:48, 16:48].reshape(4, 8, 4, 8).mean((1, 3))
        assert np.array_equal(seen.patch_labels(place)[0].reshape(12, 4, 4)[i], mask >= 0.5)
    assert isinstance(AsSeen(world, middle).scene(0).image, np.ndarray)


def test_pictures_without_a_truth_are_refused_with_a_sentence(backbone, coders, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos/a.png")
    photos = open_images(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"does not say what is in its pictures.*Use a world"):
        read_split(backbone, photos, POINT, "all")
    with pytest.raises(ValueError, match="must be chosen on other pictures than they are scored on"):
        truth_recovery(backbone, CHOOSE, CHOOSE, coders, tmp_path / "r", point=POINT, tokens="all", control_sample=None)


def test_sampled_patches_count_alone_and_pictures_stay():
    """Independent witness: the same counts from dense arrays of the kept patches only."""
    truth = Truth.of_world(CHOOSE, range(48), grid=(4, 4))
    rng = np.random.default_rng(0)
    z = (rng.random((48 * 16, 6)) * (rng.random((48 * 16, 6)) < 0.4)).astype(np.float32)
    firing = Firing.of_codes(Codes.from_dense(torch.from_numpy(z)), 16, slice(None))
    few, few_truth = sample_patches(firing, truth, 5, seed=3)
    counted = few_truth.patch_labels(0)[1].reshape(48, 16)
    assert np.array_equal(few_truth.images, truth.images)
    assert torch.equal(few.images.to_dense(), firing.images.to_dense())
    place = truth.concepts.index("background:sand")
    shown = truth.patch_labels(place)[0]
    found = recovery(few, few_truth, few, few_truth).levels["patch"]
    sampled_counts = few_truth.patch_labels(place)[1]
    inside = sampled_counts & (z > found.threshold[place]).T
    expected = [(row & shown).sum() for row in inside]
    assert found.tp[place].tolist() == expected
    assert found.n_true[place] == (shown & sampled_counts).sum()
    assert (counted.sum(1) <= 5).all()
    every, every_truth = sample_patches(firing, truth, 16)
    assert every is firing
    assert every_truth is truth
    with pytest.raises(ValueError, match="patches_per_image must be at least 1, got 0"):
        sample_patches(firing, truth, 0)


# -- the study


def test_rows_are_coders_controls_at_both_limits_and_means_over_seeds(run, coders):
    out, rows = run
    assert [row["name"] for row in rows if row["kind"] == "coder"] == list(coders)
    controls = {row["name"]: row for row in rows if row["kind"] == "control"}
    families = ("neurons", "pca", "kmeans", "random")
    assert set(controls) == {*families, *(family + UNLIMITED for family in families), "untrained"}
    assert [(row["name"], row["seeds"]) for row in rows if row["kind"] == "mean"] == [("topk", ["topk#0", "topk#1"])]
    for row in rows:
        assert row["n_images"] == [48, 48]
        assert row["point"] == POINT
        assert set(row["measured"]) <= set(MEASURES)
        assert {"image_f1", "image_auc", "patch_iou", "image_recovered_f1_0.7"} <= set(row["measured"])
    assert controls["neurons" + UNLIMITED]["measured"]["l0_tokens"]["value"] == pytest.approx(24, abs=0.01)
    assert controls["random" + UNLIMITED]["measured"]["l0_tokens"]["value"] > 15
    assert not (out / "unfinished.jsonl").exists()
    assert [json.loads(line) for line in (out / "recovery.jsonl").read_text().splitlines()] == rows
    for name in coders:
        names = {path.name for path in (out / name).iterdir()}
        assert names == {"found.jsonl", "concepts.json", "image.svg", "image.png", "patch.svg", "patch.png"}


def test_a_row_is_what_recovery_says_of_the_same_codes(run, splits, coders):
    """By the metrics alone, from codes of all rows at once."""
    parts = []
    for split in splits:
        codes = coders["topk#1"].encode_sparse(split.x)
        parts += [Firing.of_codes(codes, 17, slice(1, 17)), split.truth]
    found = recovery(*parts)
    expected = {name: one.to_json() for name, one in summary_of(found, n_bootstrap=20).items()}
    row = next(row for row in run[1] if row["name"] == "topk#1")
    assert {name: row["measured"][name] for name in expected} == expected
    assert row["measured"]["l0_tokens"]["value"] == pytest.approx(3)


def test_controls_spend_at_most_the_coders_latents_or_all(splits, coders):
    made = truth_controls([coders["topk#0"]], splits[0].x)
    for name, contender in made.items():
        l0 = encode_rows(contender, splits[1].x).l0()
        assert (int(l0.max()) <= 3) == (not name.endswith(UNLIMITED)), name
    x = splits[1].x[:50]
    unlimited = made["neurons" + UNLIMITED].coder
    y = unlimited.normalize(x).y
    torch.testing.assert_close(unlimited.encode(x), torch.cat([y, -y], 1).relu())  # every neuron, both signs


def test_doing_it_again_reads_back_and_a_killed_run_goes_on(run, backbone, coders, splits, tmp_path, monkeypatch):
    out, rows = run
    real, asked = module.found_by, []

    def counting(contender, *arguments, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(contender)
        return real(contender, *arguments, **options)

    monkeypatch.setattr(module, "found_by", counting)
    assert study(backbone, coders, splits[0].x, out) == rows
    assert asked == []
    with pytest.raises(KeyboardInterrupt):
        study(backbone, coders, None, tmp_path)
    assert not (tmp_path / "recovery.jsonl").exists()
    asked.clear()
    monkeypatch.setattr(module, "found_by", lambda c, *a, **k: asked.append(c) or real(c, *a, **k))
    again = study(backbone, coders, None, tmp_path)
    assert len(asked) == 1
    assert [row["name"] for row in again] == ["topk#0", "topk#1", "relu", "topk"]
    same = {row["name"]: row["measured"] for row in rows}
    assert all(row["measured"] == same[row["name"]] for row in again)
    with pytest.raises(ValueError, match="holds rows of another recovery"):
        study(backbone, coders, splits[0].x, out, coverage=0.6)


def test_latents_that_are_the_truth_recover_it_and_controls_do_not():
    """Activations that hold each concept as a coordinate, rotated: a coder of those directions finds them."""
    turn = torch.linalg.qr(torch.randn(93, 93, generator=torch.Generator().manual_seed(0))).Q
    rotated = []
    for split in ("val", "test"):
        truth = Truth.of_world(open_images(f"world:shapes?n=240&image_px=32&split={split}"), range(240), grid=(4, 4))
        labels = np.stack([truth.patch_labels(c)[0] for c in range(len(truth.concepts))], 1).astype(np.float32)
        rotated.append(Split(torch.from_numpy(labels) @ turn, 16, slice(None), truth))
    coder = make_coder("topk", d_in=93, d_sae=93, k=40, normalization="none").eval()
    with torch.no_grad():
        coder.W_enc.copy_(turn.t())
        coder.b_enc.fill_(-0.5)
    found, _ = module.found_by(Contender(coder), rotated)
    value = {name: one.value for name, one in found.summary(n_bootstrap=0).items()}
    # Two classes share all their patches in the choosing split with another concept, and take its latent.
    assert value["patch_f1"] > 0.97
    assert value["patch_recovered_f1_0.9"] == pytest.approx(91 / 93, abs=0.002)
    made = truth_controls([coder], rotated[0].x)
    for name in ("kmeans", "random", "neurons" + UNLIMITED):
        other = module.found_by(made[name], rotated)[0].summary(n_bootstrap=0)
        assert other["patch_f1"].value < 0.6, name


# -- seeds and variants


def row(name, kind="coder", family=None, **values):
    measured = {m: {"value": v, "low": None, "high": None, "n": 9, "definition": "d"} for m, v in values.items()}
    return {
        "name": name,
        "kind": kind,
        "family": family,
        "d_sae": 8,
        "measured": {"l0_tokens": {"value": 3}} | measured,
    }


def test_means_over_seeds_have_students_interval_by_hand():
    # 0.2, 0.3, 0.4: mean 0.3, standard deviation 0.1, t = 4.303: 0.3 -+ 4.303 * 0.1 / sqrt(3) = 0.3 -+ 0.2484
    rows = [row(f"a#{i}", image_f1=value) for i, value in enumerate((0.2, 0.3, 0.4))] + [row("b#0", image_f1=0.9)]
    for one in rows:
        one["measured"]["l0_tokens"] = {"value": 3.0, "n": 9, "definition": "d"}
    (mean,) = over_seeds(rows)
    found = mean["measured"]["image_f1"]
    assert (mean["name"], mean["kind"], mean["seeds"]) == ("a", "mean", ["a#0", "a#1", "a#2"])
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.3, 0.0516, 0.5484), abs=1e-4)
    assert "3 seeds" in found["definition"]
    for freedom in (1, 2, 9, 14, 15, 30, 100):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.01)
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        t_quantile(0)


def test_one_coder_under_two_names_is_no_two_seeds():
    with pytest.raises(ValueError, match="x#0 and x#1 are one coder, weight for weight"):
        check_seeds({"x#0": "d", "y#0": "d", "x#1": "d"})
    check_seeds({"x#0": "d", "y#0": "d", "plain": "d", "other": "d", "x#1": "e"})
    rows = [{**row(f"a#{i}", image_f1=0.2), "coder_digest": "same"} for i in range(2)]
    with pytest.raises(ValueError, match="--coder-seed 1 --data-seed 1"):
        over_seeds(rows)


def test_a_control_is_shown_by_its_better_variant_number_by_number():
    rows = [
        row("pca", "control", "pca", image_f1=0.3, image_auc=0.6, absorbed=0.2),
        row("pca" + UNLIMITED, "control", "pca", image_f1=0.2, image_auc=0.8, absorbed=0.1),
        row("topk", image_f1=0.5),
    ]
    coder, control = best_of_variants(rows)
    assert coder["name"] == "topk"
    values = {name: one["value"] for name, one in control["measured"].items()}
    assert values == {"l0_tokens": 3, "image_f1": 0.3, "image_auc": 0.8, "absorbed": 0.1}


def test_the_table_is_printed_with_means_instead_of_seeds(run, capsys):
    print_recovery(run[1])
    told = capsys.readouterr().out
    lines = {line.split()[0] for line in told.splitlines()[2:] if line.strip()}
    assert {"topk", "relu", "neurons", "pca", "kmeans", "random", "untrained"} <= lines
    assert "topk#0" not in told
    assert set(RECOVERY_COLUMNS) <= set(MEASURES)


# -- a concept per latent


def test_a_latent_is_named_after_what_it_tells_best_beside_always():
    # 8 pictures; "ground:land" in 1..6 (always: 12/14 = 0.857), "shape:star" in 1, 2 (always: 4/10 = 0.4).
    # Latent 0 fires in 1..4: star 4/6 = 0.67, (0.67 - 0.4) / 0.6 = 0.44; land 8/10 = 0.8, more, but less than 0.857.
    # Latent 1 fires in 1..6 and 7: land 12/13 = 0.923, lift 0.46; star 4/9.
    # Latent 2 fires in 7 and 8 alone: no better than "always" at anything.
    land, star = [1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]
    truth = Truth(("ground:land", "shape:star"), np.array([land, star], dtype=bool).T)
    z = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 1]]).float()
    firing = Firing(Codes.from_dense(z.t().contiguous()))
    first, second, third = concept_of_latents(recovery(firing, truth, firing, truth))
    assert (first["concept"], second["concept"], third) == ("shape:star", "ground:land", {"latent": 2, "concept": None})
    assert (first["f1"], first["constant"], first["iou"]) == pytest.approx((2 / 3, 0.4, 0.5))
    assert second["f1"] == pytest.approx(12 / 13)
    assert is_recovered(first)
    assert is_recovered(second)
    assert not is_recovered(third)
    assert not is_recovered({**second, "f1": 0.8})  # less than always


def test_concepts_are_read_back_and_fit_the_table_of_concepts(run, coders):
    out, rows = run
    digest, found = read_concepts(out / "topk#0")
    assert digest == next(row["coder_digest"] for row in rows if row["name"] == "topk#0")
    assert sorted(found) == list(range(32))
    named = [row for row in found.values() if row["concept"] is not None]
    assert named
    assert all(0 <= row["f1"] <= 1 and 0 <= row["patch"]["iou"] <= 1 for row in named if "patch" in row)
    by_concept = [json.loads(line) for line in (out / "topk#0/found.jsonl").read_text().splitlines()]
    best = {row["concept"]: row for row in by_concept if row["level"] == "image"}
    for row in named:
        if best[row["concept"]]["latent"] == row["latent"]:
            assert row["f1"] == pytest.approx(best[row["concept"]]["f1"])
    value = json.loads((out / "topk#0/concepts.json").read_text())
    (out / "broken").mkdir(exist_ok=True)
    (out / "broken/concepts.json").write_text(json.dumps({**value, "version": 99}))
    with pytest.raises(ValueError, match="not a vitrail-concepts file of version 1"):
        read_concepts(out / "broken")


# -- calibration


def test_numbers_fall_as_the_truth_is_spoilt(splits, tmp_path):
    """Codes that are the truth, as activations of a coder that passes them on."""
    known = []
    for split in splits:
        labels = np.stack([split.truth.patch_labels(c)[0] for c in range(len(split.truth.concepts))], 1)
        known.append(replace(split, x=torch.from_numpy(labels.astype(np.float32)), n_tokens=16, patches=slice(None)))
    coder = make_coder("relu", d_in=93, d_sae=93, normalization="none").eval()
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(93))
    rows = calibrate(coder, known, strengths={"shuffled": (0, 0.4, 1.0), "displaced": (0, 1)})
    assert [(row["dial"], row["strength"]) for row in rows][:3] == [("shuffled", 0), ("shuffled", 0.4), ("shuffled", 1)]
    for measure in ("image_f1", "image_auc", "patch_iou", "patch_auc"):
        plain, some, most = (row[measure] for row in rows[:3])
        assert plain > some > most, measure
    assert rows[0]["patch_iou"] > 0.96  # a few concepts share all their patches in the choosing split
    assert rows[4]["patch_iou"] < rows[3]["patch_iou"]
    assert rows[4]["image_f1"] == rows[3]["image_f1"]  # pictures know nothing of where
    with Image.open(calibration_picture(rows, tmp_path / "calibration.png", title="t")) as picture:
        assert picture.width > 300
    with pytest.raises(ValueError, match="dials are shuffled, displaced, mixed, got 'blurred'"):
        calibrate(coder, known, strengths={"blurred": (0,)})
