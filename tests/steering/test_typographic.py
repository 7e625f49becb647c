"""Defences against written words: by hand, against a slow loop, and on a planted answer."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitrail.backbones import load
from vitrail.coders import TopK
from vitrail.images.attacked import Attack, AttackedImages
from vitrail.images.worlds import open_world
from vitrail.metrics.heads import zero_shot_head
from vitrail.steering.defences import Blank, Correction, Gate, Removal, fit_corrections, fit_gate
from vitrail.steering.defending import Pictures, defend, save_defence, summary
from vitrail.steering.interventions import Latents
from vitrail.steering.selection import Site
from vitrail.steering.typographic import (
    Rest,
    Shown,
    Tried,
    best,
    candidates,
    evaluate,
    look_at,
    mean_rows,
    random_removals,
    removals,
    sweep,
)

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def toy():
    backbone = load("toy/clip")
    world = open_world("world:shapes?n=24&seed=9&split=test")
    head = zero_shot_head(backbone, world.classes, ("a photo of a {}.",))
    names = ("star", "heart", "ring")
    source = AttackedImages(world, Attack(names, ("regular",), (30, 40), ("middle",)))
    clean = look_at(backbone, world, POINT, head, world.classes)
    attacked = look_at(backbone, source, POINT, head, world.classes)
    return backbone, world, head, source, clean, attacked


def coder_reading(direction, d_in, *, others=3):
    """Latent 0 reads and writes one direction; the others nothing."""
    coder = TopK(d_in=d_in, d_sae=1 + others, k=1, normalization="none")
    with torch.no_grad():
        coder.W_enc.zero_()
        coder.W_dec.zero_()
        coder.b_enc.zero_()
        coder.b_dec.zero_()
        coder.W_enc[:, 0] = direction
        coder.W_dec[0] = direction
    return coder.eval()


def test_looking_gives_the_models_own_answers_and_the_labels(toy):
    backbone, world, head, _, clean, attacked = toy
    pixels = torch.stack([backbone.preprocess(world.load(i)) for i in range(24)])
    with torch.no_grad():
        want = head(backbone(pixels)).argmax(1).numpy()
    assert np.array_equal(clean.said, want)
    assert clean.ids == attacked.ids
    assert [world.classes[c] for c in clean.right.argmax(1)] == [world.record(i).class_name for i in range(24)]
    rest = Rest(backbone, POINT, head, clean.x)
    assert np.array_equal(rest.answers(clean.x), want)  # the blocks after the point alone


def test_text_patches_are_where_the_text_is(toy):
    _backbone, _, _, source, clean, attacked = toy
    assert clean.text is None
    assert attacked.text is not None
    for i in range(24):
        left, top, right, bottom = source.written(i).box
        marks, px = attacked.text[i].view(8, 8).nonzero(), 8
        assert len(marks)
        assert (marks[:, 0] >= top // px).all()
        assert (marks[:, 0] <= bottom // px).all()
        assert (marks[:, 1] >= left // px).all()
        assert (marks[:, 1] <= right // px).all()


def test_removal_takes_its_latent_out_and_nothing_else(toy):
    backbone, _, _, _, clean, _ = toy
    direction = torch.zeros(backbone.d_model)
    direction[4] = 1.0
    site = Site(POINT, Latents(coder_reading(direction, backbone.d_model)), "spatial")
    after = Removal(backbone, site, [0])(clean.x)
    want = clean.x.clone()
    want[:, 1:, 4] = want[:, 1:, 4].clamp(max=0)  # a latent is what is positive along its direction
    torch.testing.assert_close(after, want)
    assert torch.equal(after[:, 0], clean.x[:, 0])
    gate = Gate(site.basis.coder, np.array([0]), 0.5, 1)
    gated = Removal(backbone, site, [0], gate=gate)(clean.x)
    marked = clean.x[:, 1:, 4] > 0.5
    assert torch.equal(gated[:, 1:][~marked], clean.x[:, 1:][~marked])
    assert marked.any()
    torch.testing.assert_close(gated[:, 1:][marked], want[:, 1:][marked])
    mean = clean.x[:, 1:].mean(0)
    blank = Blank(POINT, gate, mean)(clean.x)
    torch.testing.assert_close(blank[:, 1:][marked], mean.expand_as(clean.x[:, 1:])[marked])
    assert torch.equal(blank[:, 1:][~marked], clean.x[:, 1:][~marked])


def test_a_hook_does_what_the_cached_run_does(toy):
    backbone, _, head, source, _, attacked = toy
    direction = torch.randn(backbone.d_model, generator=torch.Generator().manual_seed(0))
    site = Site(POINT, Latents(coder_reading(direction / 3, backbone.d_model)), "all")
    defence = Removal(backbone, site, [0])
    pixels = torch.stack([backbone.preprocess(source.load(i)) for i in range(24)])
    with torch.no_grad():
        whole = head(backbone.run_with_hooks(pixels, {POINT: defence.hook})).argmax(1).numpy()
    rest = Rest(backbone, POINT, head, attacked.x)
    assert np.array_equal(rest.defended(attacked, defence, batch_size=7), whole)
    assert not np.array_equal(whole, attacked.said)


def test_a_correction_by_hand_and_a_planted_one():
    # Attacked patches have 2 more along (1, 0). Clean ones are at (0, +-1): the least squares of rank 1 takes it away.
    clean = torch.tensor([[[9.0, 9.0], [0.0, 1.0], [0.0, -1.0]]] * 4)
    attacked = clean.clone()
    attacked[:, 1:, 0] += 2.0
    (one,) = fit_corrections("p", clean, attacked, 1, ranks=(1,), ridge=1e-9)
    # centre (1, 0): here = (1, y), there = (-1, y); B = -((1 * 2) / (1 + 1)) = -1 in the first row and column.
    torch.testing.assert_close(one.matrix, torch.tensor([[-1.0, 0.0], [0.0, 0.0]]), atol=1e-5, rtol=0)
    after = one(attacked)
    torch.testing.assert_close(after[:, 1:, 0], torch.ones(4, 2))  # half way, as the clean ones go half way up
    assert torch.equal(after[:, 0], attacked[:, 0])
    (kept,) = fit_corrections("p", clean, attacked, 1, ranks=(1,), ridge=1e-9, clean_weight=100.0)
    assert (kept(clean) - clean).abs().max() < (one(clean) - clean).abs().max()


def test_means_over_text_and_candidates_find_the_planted_latent(toy):
    backbone, _, _, _, clean, attacked = toy
    direction = torch.zeros(backbone.d_model)
    direction[7] = 1.0
    site, x = Site(POINT, Latents(coder_reading(direction, backbone.d_model)), "all"), attacked.x.clone()
    x[:, 1:][attacked.text] += 50 * direction
    planted = replace(attacked, x=x)
    text = mean_rows(site, backbone, planted, "text")
    rows = x[:, 1:][attacked.text][:, 7].clamp(min=0)
    assert float(text[0]) == pytest.approx(float(rows.mean()), rel=1e-5)
    assert text[1:].abs().max() == 0
    assert float(mean_rows(site, backbone, planted)[0]) < float(text[0]) / 2  # most tokens have no text
    found = candidates(site, backbone, clean, planted, overs=("tokens", "text"), taus=(20.0,), lambdas=(1.0,))
    assert [(one.over, one.features.tolist()) for one in found] == [("text", [0])]
    with pytest.raises(ValueError, match="where the text stands"):
        mean_rows(site, backbone, clean, "text")


def test_the_gate_finds_planted_text(toy):
    backbone, _, _, _, clean, attacked = toy
    direction = torch.zeros(backbone.d_model)
    direction[7] = 1.0
    coder, x = coder_reading(direction, backbone.d_model), attacked.x.clone()
    base = clean.x.clone()
    base[..., 7], x[..., 7] = -1.0, -1.0
    x[:, 1:][attacked.text] += 50 * direction
    gate = fit_gate(coder, base, x, attacked.text, 1)
    assert gate is not None
    assert gate.features.tolist() == [0]
    assert torch.equal(gate(x), attacked.text)
    assert not gate(base).any()
    assert fit_gate(coder, x, x, attacked.text, 1, precision=1.0) is None


def test_the_best_is_the_highest_within_the_bound():
    def tried(attacked, loss, n):
        return Tried(Correction("p", torch.zeros(1), torch.zeros(1, 1), 0, rank=1), 0.9, attacked, loss, {"n": n})

    few, many, dear = tried(0.7, 0.01, 3), tried(0.7, 0.0, 9), tried(0.9, 0.011, 1)
    assert best([many, few, dear]) is few
    assert best([many, few, dear], clean_loss=0.02) is dear
    assert best([dear]) is None


def test_rows_count_what_came_back():
    # 4 pictures, all right when clean; words fool 3 of them; the defence brings 2 back: 2 of 3.
    right = np.eye(2, dtype=bool)[[0, 0, 1, 1]]
    clean = Shown(tuple("abcd"), torch.zeros(4, 2, 1), right, np.full(4, -1), np.array([0, 0, 1, 1]))
    fooled = replace(clean, written=np.array([1, 1, 0, 0]), said=np.array([1, 1, 0, 1]), x=torch.ones(4, 2, 1))

    class Given(Rest):
        def __init__(self):
            pass

        def defended(self, shown, defence, batch_size=64):
            return np.array([0, 0, 0, 1]) if shown is fooled else clean.said

    some = Correction("p", torch.zeros(1), torch.zeros(1, 1), 0, rank=1, name="some")
    rows = {(row.defence, row.condition): row for row in evaluate(Given(), clean, {"words": fooled}, [some])}
    assert rows["none", "words"].accuracy == 0.25
    assert rows["none", "words"].said_word == 0.75
    row = rows["some", "words"]
    assert row.accuracy == 0.75
    assert row.back is not None
    assert row.back.value == pytest.approx(2 / 3)
    assert row.p == 0.5
    assert row.said_word == 0.25
    assert rows["some", "clean"].change.value == 0
    assert rows["some", "clean"].back is None


def test_everything_together_is_saved_and_a_random_set_is_no_defence(toy, tmp_path):
    backbone, _, head, _, clean, attacked = toy
    direction = torch.zeros(backbone.d_model)
    direction[7] = 1.0
    coder, rest = coder_reading(direction, backbone.d_model, others=8), Rest(backbone, POINT, head, clean.x)
    x, base = attacked.x.clone(), clean.x.clone()
    base[..., 7], x[..., 7] = 0.0, 0.0
    x[:, 1:][attacked.text] += 50 * direction
    shown = replace(clean, x=base, said=rest.answers(base)), replace(attacked, x=x, said=rest.answers(x))
    pictures = Pictures(*shown, *shown, shown[0], {"words": shown[1]})
    found = defend(
        backbone, rest, coder, POINT, "all", pictures, taus=(20.0, 1.0), lambdas=(1.0,), ranks=(1,), n_random=2,
        n_bootstrap=50,
    )  # fmt: skip
    assert found.main is not None
    assert found.main.defence.features.tolist() == [0]
    rows = {(row["defence"], row["condition"]): row for row in summary([row.to_json() for row in found.rows])}
    assert rows["none", "words"]["accuracy"] == shown[1].is_right(shown[1].said).mean()
    assert rows[found.main.defence.name, "words"]["accuracy"] >= rows["none", "words"]["accuracy"]
    assert rows["random latents", "words"]["draws"] == 2
    save_defence(tmp_path, found, backbone, coder, coder_path="runs/c", point=POINT, tokens="all")
    told = json.loads((tmp_path / "defence.json").read_text())
    assert told["format"] == "vitrail-defence"
    assert told["version"] == 1
    assert told["operation"] == "remove"
    assert told["features"] == [0]
    assert told["backbone_digest"] == backbone.digest
    assert told["where"] == "all"
    assert (tmp_path / "correction.safetensors").is_file()
    assert (tmp_path / "sweep.json").is_file()
    with pytest.raises(ValueError, match="pairs"):
        Pictures(shown[0], shown[1].chosen(np.arange(24) < 5), *shown, shown[0], {})


def test_random_sets_are_seeded_and_bounded(toy):
    backbone, *_ = toy
    site = Site(POINT, Latents(coder_reading(torch.ones(backbone.d_model), backbone.d_model, others=9)), "all")
    one, same = (random_removals(backbone, site, 3, draws=2, seed=1) for _ in range(2))
    assert [r.features.tolist() for r in one] == [r.features.tolist() for r in same]
    assert len(set(one[0].features.tolist())) == 3
    with pytest.raises(ValueError, match="cannot be drawn"):
        random_removals(backbone, site, 11)
    tried = sweep(Rest(backbone, POINT, toy[2], toy[4].x), toy[4], toy[5], removals(backbone, site, []))
    assert tried == []
