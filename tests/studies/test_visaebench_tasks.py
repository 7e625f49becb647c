"""What features are good for, in a study's cell."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.backbones.grid import Grid
from vitrail.backbones.preprocess import Preprocess
from vitrail.coders.sparse import Codes
from vitrail.metrics.cross_domain import Domain
from vitrail.studies.study import run_study
from vitrail.studies.study_plan import plan_from_json
from vitrail.studies.visaebench import measure, read_wnids
from vitrail.studies.visaebench_tasks import linear_task, patch_labels, retrieval_task

GRID = Grid(height=2, width=2, patch_px=2, image_px=(4, 4), n_cls=0, n_registers=0)


def test_the_label_of_a_patch_by_hand():
    preprocess = Preprocess.of((4, 4))
    mask = np.array([[7, 7, 0, 0], [7, 3, 0, 5], [2, 2, 9, 4], [1, 1, 9, 4]])
    # 7 covers three of four; 0 three; 1 and 2, and 4 and 9, cover the same: the smaller number
    assert patch_labels(mask, preprocess, GRID).tolist() == [7, 0, 1, 4]


def test_a_mask_is_cropped_as_the_picture_is():
    # 4 x 8: the centre is kept, columns 2 to 5
    mask = np.zeros((4, 8), dtype=np.uint8)
    mask[:, 2:4], mask[:, 4:6], mask[:, 6:] = 1, 2, 3
    assert patch_labels(mask, Preprocess.of((4, 4)), GRID).tolist() == [1, 2, 1, 2]
    with pytest.raises(ValueError, match=r"a class of 0..255 for each pixel, got shape \(4, 8, 3\)"):
        patch_labels(np.zeros((4, 8, 3), dtype=np.uint8), Preprocess.of((4, 4)), GRID)


def domain_of(raw, codes, labels):
    n = len(labels)
    return Domain(
        raw, raw.clone(), Codes.from_dense(codes), labels, torch.zeros(raw.shape[1]), 1.0,
        torch.ones(n), torch.ones(n), 0.0,
    )  # fmt: skip


def test_codes_that_tell_what_raw_features_hide_have_a_lift():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    raw = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    codes = torch.nn.functional.one_hot(labels, 5).double() + 0.01
    found, shared = {}, {}
    found |= retrieval_task(domain_of(raw, codes, labels), shared, ks=(1, 5), n_bootstrap=20)
    found |= linear_task(domain_of(raw, codes, labels), shared, "test", n_bootstrap=20)
    assert found["retrieval_r@1_codes"].value == 1
    assert found["linear_accuracy_codes@test"].value == 1
    raw_hits = found["retrieval_r@1_raw"].value
    # by the definition, over all other pictures
    unit = raw / raw.norm(dim=1, keepdim=True)
    near = (unit @ unit.T).fill_diagonal_(-9).argmax(1)
    assert raw_hits == pytest.approx((labels[near] == labels).double().mean())
    assert found["retrieval_r@1_lift"].value == pytest.approx(1 / raw_hits)
    again = retrieval_task(domain_of(raw * 0, codes, labels), shared, ks=(1, 5), n_bootstrap=20)
    assert again["retrieval_r@1_raw"] is found["retrieval_r@1_raw"], "of a backbone, once"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two kinds of pictures, whose halves are of two colours; masks say which half is which."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    for number in range(40):
        kind = number % 2
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        pixels[:, :16], pixels[:, 16:] = (220, 30, 30), (30, 30, 220)
        pixels += rng.integers(0, 30, pixels.shape, dtype=np.uint8)
        mask = np.ones((32, 32), dtype=np.uint8)
        mask[:, 16:] = 2
        if kind:
            pixels, mask = pixels.swapaxes(0, 1), mask.T
        mask[:8, :8] = 0  # nobody said
        for where, array in ((f"photos/{'ab'[kind]}", pixels), ("masks", mask)):
            (folder / where).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(array)).save(folder / where / f"{number:02d}.png")
    plan = plan_from_json(
        {
            "backbones": [
                {"name": "toy/vit-1l-p8", "label": "one", "point": "blocks.0.hook_resid_post", "evaluator": "two"},
                {"name": "toy/vit-2l-p8", "label": "two", "point": "blocks.0.hook_resid_post", "evaluator": "one"},
            ],
            "coders": [{"name": "topk", "architecture": "topk", "arguments": {"d_sae": 48, "k": 6}}],
            "images": {
                "train": f"{folder}/photos",
                "test": f"{folder}/photos",
                "halves": f"{folder}/photos",
                "drawings": "world:drawings?n=60&split=test",
            },
            "masks": {"halves": f"{folder}/masks"},
            "common_evaluator": "two",
            "batch_size": 256,
            "training": {"epochs": 2, "warmup_steps": 1},
            "options": {
                "n_bootstrap": 20,
                "spatial_coherence": {"min_images": 2, "min_active": 2},
                "sparse_probing": {"ks": [1, 4], "headline": 4},
                "retrieval": {"ks": [1, 5]},
            },
        }
    )
    rows = run_study(plan, folder / "out", measure=measure, version="1")
    return folder, plan, rows


def test_a_cell_has_domains_and_tasks(study):
    folder, _, rows = study
    measured = rows[0]["measured"]
    for name in ("raw", "recon", "codes", "lift"):
        assert measured[f"segmentation_miou_{name}@halves"]["value"] >= 0
        assert measured[f"linear_accuracy_{name}@drawings"]["value"] >= 0
        assert f"retrieval_r@1_{name}" in measured
    assert measured["segmentation_miou_raw@halves"]["value"] > 0.9, "red and blue are told apart"
    assert measured["linear_accuracy_raw@test"]["value"] == 1
    assert measured["cross_domain_fvu@drawings"]["value"] > 0
    assert "cross_domain_preservation@halves" in measured
    assert {"moran", "raw_moran", "monosemanticity", "monosemanticity_common_normalized"} <= set(measured)
    seconds = rows[0]["cost"]["seconds_by_metric"]
    assert {"encoding and decoding", "spatial_coherence", "segmentation", "linear", "cross_domain"} <= set(seconds)
    table = (folder / "out/cells/one/topk/seed0/latents.csv").read_text().splitlines()
    assert table[0].startswith("latent,moran,n_images")
    assert len(table) == 49


def test_who_is_judged_by_the_common_evaluator_has_one_number_twice(study):
    _, _, (one, two) = study
    key = "monosemanticity_common_normalized"
    assert one["measured"][key]["value"] == one["measured"]["monosemanticity_normalized"]["value"]
    assert two["measured"][key]["value"] != two["measured"]["monosemanticity_normalized"]["value"]


def test_embeddings_are_read_from_the_evaluators_store(study, monkeypatch):
    folder, plan, rows = study
    monkeypatch.setattr(type(plan), "evaluator", lambda *_: pytest.fail("the evaluator was run again"))
    again = run_study(plan, folder / "out", measure=measure, version="2", only=["one"])
    assert again[0]["measured"] == rows[0]["measured"]


def test_a_mask_that_is_missing_is_a_sentence(study, tmp_path):
    folder, plan, _ = study
    from dataclasses import replace

    with pytest.raises(FileNotFoundError, match="has no mask"):
        run_study(replace(plan, masks={"drawings": f"{folder}/masks"}), folder / "out", measure=measure, version="1")


def test_wnids_of_labels(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps([{"label": 1, "wnid": "n00000002"}, {"label": 0, "wnid": "n00000001"}]))
    assert read_wnids(str(path)) == ["n00000001", "n00000002"]
    (tmp_path / "classes.txt").write_text("n00000003\nn00000004\n")
    assert read_wnids(str(tmp_path / "classes.txt")) == ["n00000003", "n00000004"]
    with pytest.raises(ValueError, match="wnids look like n01440764, got 'goldfish'"):
        read_wnids(["goldfish"])
    with pytest.raises(FileNotFoundError, match=r"no\.json is missing"):
        read_wnids(str(tmp_path / "no.json"))
