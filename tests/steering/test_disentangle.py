"""The protocol: both choices, controls, ceilings; the recipe's augmentations."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from backbones.small_backbones import build_case
from vitrail.coders import TopK
from vitrail.images import open_images
from vitrail.metrics.heads import LinearHead
from vitrail.statistics import ActivationStats
from vitrail.steering.disentangle import (
    Candidate,
    DisentangleOptions,
    Method,
    Seen,
    Tried,
    disentangle,
    linear_head,
    pick,
    read_disentangle,
    removals,
)
from vitrail.steering.groups import GroupAccuracy, Share, group_accuracy, open_groups
from vitrail.steering.interventions import Dose, Intervention, intervened
from vitrail.steering.selection import latents_at
from vitrail.steering.task_coders import ANGLES, AugmentedImages, augmented, drawn, train_task_coder
from vitrail.tables import read_table
from vitrail.training import TrainConfig

POINT = "blocks.1.hook_resid_post"
METHOD = Method("latents", "c", "pooled", "with")


def tried(*right, n_set=1):
    """Accuracies of groups of 100, the first of them the worst before."""
    shares = {f"g{i}": Share(one, 100) for i, one in enumerate(right)}
    accuracy = GroupAccuracy(Share(sum(right), 100 * len(right)), shares)
    return Tried(Candidate(METHOD, 0.1, np.arange(n_set)), accuracy)


def test_strict_and_relaxed_by_hand():
    was = tried(50, 90, 95).accuracy  # overall 235, worst 50
    more_worst = tried(60, 86, 91)  # worst 60, overall 237: each other group loses 4
    most_worst = tried(70, 85, 90)  # worst 70, overall 245; the others lose 5
    less_overall = tried(62, 87, 85)  # overall 234: 95 -> 85
    assert pick([more_worst, most_worst, less_overall], was, "strict") is most_worst
    assert pick([more_worst, most_worst, less_overall], was, "relaxed") is more_worst
    assert pick([less_overall], was, "strict") is None
    assert pick([less_overall], was, "relaxed") is None
    assert pick([less_overall], was, "relaxed", drop=0.1) is less_overall
    only_overall = tried(50, 95, 95)
    assert pick([only_overall], was, "strict") is only_overall  # as bad a worst group, overall better
    assert pick([tried(50, 90, 95)], was, "strict") is None  # nothing better than the model as it is
    assert pick([], was, "relaxed") is None
    large, small = tried(70, 90, 95, n_set=9), tried(70, 90, 95, n_set=2)
    assert pick([large, small], was, "strict") is small
    relaxed = tried(80, 86, 91)  # overall may fall where the worst group gains: not here, it rises
    assert pick([relaxed, most_worst], was, "relaxed") is relaxed


def small_run(tmp_path, **changed):
    backbone = build_case("toy-clip").backbone
    spec = "world:shapes?n={}&seed=3"
    train, val, test = (
        open_groups(spec.format(n), split=split) for n, split in ((48, "train"), (40, "val"), (44, "test"))
    )
    with torch.no_grad():
        pixels = torch.stack([backbone.preprocess(train.images.load(i)) for i in range(len(train))])
        seen = backbone.activations(pixels, [POINT, "hook_image_embed"])
    rows = seen[POINT][:, 0]
    coder = TopK(d_in=rows.shape[1], d_sae=40, k=6, normalization="mean_std", seed=1)
    coder.fit(ActivationStats.of(rows), rows)
    # The worst victim there is: it tells the ground and is asked for the home.
    head = linear_head(seen["hook_image_embed"], torch.from_numpy(train.attribute), train.classes)
    sites = {"small": latents_at(coder.eval(), POINT, "cls")}
    options = DisentangleOptions(taus=(1e-3, 0.05, 0.3), drop=1.0, n_random=3, n_bootstrap=200)
    told = disentangle(
        backbone, head, train, val, test, sites, tmp_path, spurious="water", options=replace(options, **changed)
    )
    return told, backbone, head, (train, val, test), sites


def test_a_run_from_start_to_end(tmp_path):
    told, backbone, head, (_, val, test), sites = small_run(tmp_path)
    assert read_disentangle(tmp_path) == json.loads((tmp_path / "disentangle.json").read_text())
    assert told["counts"]["test"] == test.counts()
    chosen = [row for row in told["test"] if not row["control"]]
    assert len(chosen) == 2 * (3 * 3 + 1) * 2  # kinds, rules and sides or any of them, choices
    # Witness: the chosen set by a plain forward pass with a hook, counted by hand.
    row = max((one for one in chosen if one["kind"] == "latents"), key=lambda one: one["n_set"])
    assert row["n_set"] > 0
    tau_rows = [one for one in told["val"] if one["n_set"]]
    assert {one["tau"] for one in tau_rows} <= {1e-3, 0.05, 0.3}
    for kind in ("latents", "neurons"):  # "any" is one of the others, the best on validation images
        for choice in ("strict", "relaxed"):
            own = [one for one in chosen if (one["kind"], one["choice"]) == (kind, choice)]
            best = next(one for one in own if one["rule"] == "any")
            tried = [one["worst"] for one in told["val"] if one["kind"] == kind]
            numbers = ("tau", "n_set", "overall", "worst")
            assert any(all(one[k] == best[k] for k in numbers) for one in own if one["rule"] != "any")
            assert best["n_set"] == 0 or max(tried) >= told["before"]["val"]["worst"]["accuracy"]
    random = [one for one in told["test"] if one["control"] == "random"]
    assert len(random) == 3 * sum(one["n_set"] > 0 for one in chosen)
    assert all(
        one["n_set"] == next(
            c["n_set"] for c in chosen if all(c[k] == one[k] for k in ("kind", "site", "rule", "side", "choice"))
        )
        for one in random
    )  # fmt: skip
    assert {one["rule"] for one in told["test"] if one["control"] == "ceiling"} == {
        "mean difference", "1 classifier direction", "4 classifier directions",
        "last layer fitted again on balanced groups",
    }  # fmt: skip
    columns = read_table(tmp_path / "rows.parquet")
    assert len(columns["part"]) == len(told["val"]) + len(told["test"])
    with (tmp_path / "rows.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == len(columns["part"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 1
    assert "Strict choice" in page
    for part, images in (("val", val), ("test", test)):
        before = told["before"][part]["overall"]
        with torch.no_grad():
            pixels = torch.stack([backbone.preprocess(images.images.load(i)) for i in range(len(images))])
            said = head(backbone.activations(pixels, ["hook_image_embed"])["hook_image_embed"]).argmax(1).numpy()
        assert before["right"] == int((said == images.labels).sum())
    # A candidate on validation images, by the plain forward pass.
    one = told["val"][0]
    train = open_groups("world:shapes?n=48&seed=3", split="train")
    with torch.no_grad():
        x = torch.stack([backbone.preprocess(train.images.load(i)) for i in range(len(train))])
        z = sites["small"].basis.coder.encode(backbone.activations(x, [POINT])[POINT][:, 0])
        has = torch.from_numpy(train.attribute == train.attributes.index("water"))
        which = torch.nonzero(z[has].mean(0) > z[~has].mean(0) + one["tau"])[:, 0]
        assert (one["kind"], one["rule"], one["side"], one["n_set"]) == ("latents", "pooled", "with", len(which))
        pixels = torch.stack([backbone.preprocess(val.images.load(i)) for i in range(len(val))])
        with intervened(backbone, Intervention(POINT, sites["small"].basis, which, Dose("ablate"), "cls")):
            said = head(backbone.activations(pixels, ["hook_image_embed"])["hook_image_embed"]).argmax(1).numpy()
    accuracy = group_accuracy(said == val.labels, val.group, val.groups)
    assert one["overall"] == accuracy.overall.value
    assert one["worst"] == accuracy.worst_share.value


def test_factors_are_tried_too(tmp_path):
    told, *_ = small_run(tmp_path, rules=("balanced",), sides=("both",), taus=(0.05,), factors=(0.0, 0.5), n_random=1)
    assert [(one["kind"], one["factor"]) for one in told["val"]] == [
        (kind, factor) for kind in ("latents", "neurons") for factor in (0.0, 0.5)
    ]
    chosen = [one for one in told["test"] if not one["control"] and one["n_set"]]
    random = [one for one in told["test"] if one["control"] == "random"]
    assert [one["factor"] for one in chosen] == [one["factor"] for one in random]


def test_a_planted_direction_is_removed_and_the_class_stays():
    # Axis 0 is the class, axis 1 the attribute; 90 % of the images have both or neither.
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    attribute = np.where(rng.random(400) < 0.9, labels, 1 - labels)
    rows = torch.from_numpy(rng.normal(size=(400, 6)) * 0.2).float()
    rows[:, 0] += torch.from_numpy(labels) * 2.0
    rows[:, 1] += torch.from_numpy(attribute) * 2.0
    train = open_groups("world:shapes?n=400&background_bias=0.9")
    train = replace(train, labels=labels, attribute=attribute)
    seen = Seen({}, {}, rows, np.arange(400), attribute == 1, train.classes)
    found = removals(rows, train, seen, DisentangleOptions(directions=(1, 2)))
    for name in ("mean difference", "1 classifier direction"):
        assert float(found[name][0, 1].abs()) > 0.98, name
        assert float(found[name][0, 0].abs()) < 0.15, name
    pair = found["2 classifier directions"]
    torch.testing.assert_close(pair @ pair.T, torch.eye(2), atol=1e-5, rtol=0)


def test_a_linear_head_is_the_classifier():
    x = torch.randn(90, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2
    labels = (x[:, 0] + x[:, 1] > 4).long()
    from vitrail.concepts.bias import fit_classifier

    head, fitted = linear_head(x, labels, ("a", "b")), fit_classifier(x, labels, ("a", "b"))
    torch.testing.assert_close(head(x).softmax(1).double(), fitted.probabilities(x), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_is_refused(tmp_path):
    _, backbone, head, (train, val, test), sites = small_run(tmp_path, rules=("pooled",), sides=("with",), taus=(0.3,))
    given = {"spurious": "water"}
    with pytest.raises(ValueError, match="no attribute 'fire'"):
        disentangle(backbone, head, train, val, test, sites, tmp_path, spurious="fire")
    with pytest.raises(ValueError, match="at least one coder"):
        disentangle(backbone, head, train, val, test, {}, tmp_path, **given)
    three = LinearHead(torch.zeros(3, backbone.d_embed), torch.zeros(3))
    with pytest.raises(ValueError, match="tells 3 classes, the images have 2"):
        disentangle(backbone, three, train, val, test, sites, tmp_path, **given)
    other = open_groups("world:shapes?n=20", attribute="colour")
    with pytest.raises(ValueError, match="they differ"):
        disentangle(backbone, head, train, val, other, sites, tmp_path, **given)
    with pytest.raises(ValueError, match="rules are pooled, balanced, standardised"):
        DisentangleOptions(rules=("best",))
    with pytest.raises(ValueError, match="drop is a share"):
        DisentangleOptions(drop=4)
    with pytest.raises(FileNotFoundError, match="has not finished"):
        read_disentangle(tmp_path / "nothing")


def test_augmentations_are_those_of_the_paper_and_the_same_every_time():
    kinds = {"rotation": 0, "crop": 0, "contrast": 0, "flip": 0}
    for i in range(400):
        what = drawn(f"picture {i}", 1)
        assert what == drawn(f"picture {i}", 1)
        assert what
        for name, value in what.items():
            kinds[name] += 1
            low, high = {"rotation": (-20, 20), "crop": (0.05, 0.15), "contrast": (1.1, 1.3), "flip": (1, 1)}[name]
            assert low <= value <= high
            assert name != "rotation" or value in ANGLES
    assert all(170 < count < 250 for count in kinds.values())  # a half, and a 64th more where none was drawn
    assert set(drawn("a", 3, ("flip",))) == {"flip"}
    rows = np.zeros((8, 8, 3), dtype=np.uint8)
    rows[:, :4] = 200
    picture = Image.fromarray(rows)
    assert np.array_equal(np.asarray(augmented(picture, {"flip": 1})), rows[:, ::-1])
    # Contrast 1.2 about the mean grey 100: 200 -> 220, 0 -> -20, cut at 0.
    assert set(np.unique(np.asarray(augmented(picture, {"contrast": 1.2})))) == {0, 220}
    turned = np.asarray(augmented(Image.fromarray(np.full((9, 9, 3), 77, np.uint8)), {"rotation": 20, "crop": 0.1}))
    assert turned.shape == (9, 9, 3)
    assert (turned == 77).all()  # the border is repeated: no black corners


def test_copies_follow_the_pictures_and_train_a_coder(tmp_path):
    images = open_images("world:shapes?n=16&seed=2")
    both = AugmentedImages(images, copies=2)
    assert len(both) == 48
    assert both.record(3) == images.record(3)
    assert both.record(19).id == f"{images.record(3).id}~1"
    assert both.record(19).label == images.record(3).label
    assert np.array_equal(np.asarray(both.load(5)), np.asarray(images.load(5)))
    assert not np.array_equal(np.asarray(both.load(21)), np.asarray(images.load(5)))
    assert both.fingerprint() != AugmentedImages(images, copies=2, seed=1).fingerprint()
    backbone = build_case("toy-clip").backbone
    config = TrainConfig(epochs=3, warmup_steps=1)
    coder = train_task_coder(backbone, images, tmp_path, point=POINT, tokens="cls", d_sae=20, k=4, config=config)
    assert (coder.d_sae, coder.d_in) == (20, backbone.point(POINT).width)
    again = train_task_coder(backbone, images, tmp_path, point=POINT, tokens="cls", d_sae=20, k=4, config=config)
    assert torch.equal(again.W_dec, coder.W_dec)
    with pytest.raises(ValueError, match="augmentations are rotation"):
        AugmentedImages(images, kinds=("blur",))
