"""Edits of concepts in rows and inside the forward pass, what else they change, and how neighbours move."""

import pytest
import torch

from vitrail.backbones import load
from vitrail.coders import TopK, make_coder
from vitrail.concepts.dense import EmbeddingIndex
from vitrail.concepts.editing import Edit, drift, edit_rows, edited, requery
from vitrail.metrics.heads import ZeroShotHead
from vitrail.statistics import ActivationStats

POINT = "blocks.1.hook_resid_post"


def coder_of(d_in=12, d_sae=30, normalization="mean_std", k=6, seed=0):
    coder = TopK(d_in=d_in, d_sae=d_sae, k=k, normalization=normalization, seed=seed).eval()
    x = rows(200, d_in)
    coder.fit(ActivationStats.of(x), x)
    with torch.no_grad():
        coder.b_dec.copy_(torch.linspace(-0.3, 0.3, d_in))
    return coder


def rows(n, d_in=12, seed=0):
    return 3 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) + 1


def test_an_edit_by_hand():
    # identity coder without normalisation: z of (1, 2) is (1, 2). Set latent 0 to 5: x' = x + (5 - 1) (1, 0)
    coder = TopK(d_in=2, d_sae=2, k=2, normalization="none", seed=0).eval()
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(2))
        coder.W_dec.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 2.0]])
    for operation, value, becomes in [
        ("set", 5, 5),
        ("add", 0.5, 1.5),
        ("add", -3, 0),
        ("scale", 3, 3),
        ("remove", 0, 0),
    ]:
        assert edit_rows(coder, x, [Edit((0,), operation, value)]).tolist() == [[becomes, 2.0]], operation
    # one after the other: 1 -> 5 -> 10
    assert edit_rows(coder, x, [Edit((0,), "set", 5.0), Edit((0,), "scale", 2.0)]).tolist() == [[10.0, 2.0]]


@pytest.mark.parametrize("normalization", ["none", "mean_std", "mean_norm", "layer_norm", "row_norm"])
@pytest.mark.parametrize("keep_error", [True, False])
def test_an_edit_is_the_dense_formula(normalization, keep_error):
    coder, x = coder_of(normalization=normalization), rows(40, seed=1)
    with torch.no_grad():
        z = coder.encode(x)
        new = z.clone()
        new[:, 4], new[:, 9], new[:, 2] = 7.0, new[:, 9] * 0.5, 0.0
        decoded, x_hat = coder.decode(new, like=x), coder(x)
        expected = x + (decoded - x_hat) if keep_error else decoded
    before = x.clone()
    edits = [Edit((4,), "set", 7.0), Edit((9,), "scale", 0.5), Edit((2,), "remove")]
    torch.testing.assert_close(edit_rows(coder, x, edits, keep_error=keep_error), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, before)


def test_an_edit_that_changes_nothing_is_bit_identical():
    coder, x = coder_of(), rows(50, seed=2)
    x[0, 0] = -0.0
    silent = int((coder.encode(x) > 0).sum(0).argmin())
    for edit in (Edit((3, 5), "scale", 1.0), Edit((3,), "add", 0.0)):
        assert edit_rows(coder, x, [edit]).view(torch.int32).equal(x.view(torch.int32))
    gone = edit_rows(coder, x, [Edit((silent,), "remove")])
    off = (coder.encode(x)[:, silent] == 0).nonzero().squeeze(1)
    assert len(off)
    assert torch.equal(gone[off], x[off])


def test_names_become_latents_and_mistakes_get_a_sentence():
    names = {3: "red", 5: "red", 7: "circle"}
    assert Edit.of("red", "set", 2.0, names=names).latents == (3, 5)
    assert Edit.of("7", "remove").latents == (7,)
    with pytest.raises(ValueError, match="no table of names"):
        Edit.of("red", "set", 2.0)
    with pytest.raises(ValueError, match="not negative"):
        Edit((1,), "set", -1.0)
    with pytest.raises(ValueError, match="operation must be one of"):
        Edit((1,), "steer")
    with pytest.raises(IndexError, match=r"latent must be in 0\.\.29, got 30"):
        edit_rows(coder_of(), rows(2), [Edit((30,), "remove")])
    crosscoder = make_coder("topk_transcoder", d_in=12, d_sae=30, k=4)
    with pytest.raises(ValueError, match="cannot edit it"):
        edit_rows(crosscoder, rows(2), [Edit((3,), "remove")])


# -- inside the forward pass


@pytest.fixture(scope="module")
def clip():
    backbone = load("toy/clip")
    images = torch.randn(3, 3, *backbone.preprocess.image_px, generator=torch.Generator().manual_seed(0))
    x = backbone.activations(images, [POINT])[POINT].detach()
    coder = coder_of(d_in=x.shape[-1], d_sae=200, k=12)
    coder.fit(ActivationStats.of(x.flatten(0, 1)), x.flatten(0, 1))
    return backbone, images, coder, x


@torch.no_grad()
def test_a_no_op_leaves_the_output_bit_identical(clip):
    backbone, images, coder, _ = clip
    expected = backbone(images)
    with edited(backbone, POINT, coder, [Edit((1, 2, 3), "scale", 1.0)]):
        assert torch.equal(backbone(images), expected)
    with edited(backbone, POINT, coder, [Edit((1,), "set", 9.0)]):
        assert not torch.equal(backbone(images), expected)
    assert torch.equal(backbone(images), expected)


@torch.no_grad()
def test_only_the_chosen_tokens_are_edited(clip):
    backbone, images, coder, x = clip
    edit, grid = [Edit((1,), "set", 9.0)], backbone.grid
    marks = torch.zeros(grid.height, grid.width, dtype=torch.bool)
    marks[2, 3] = True
    each = torch.stack([marks, torch.zeros_like(marks), ~marks])
    at = grid.token_of_patch(2, 3)
    tokens = {
        "all": torch.ones(3, grid.n_tokens, dtype=torch.bool),
        "cls": torch.arange(grid.n_tokens).expand(3, -1) == 0,
        "spatial": torch.arange(grid.n_tokens).expand(3, -1) > 0,
    }
    alone = torch.arange(grid.n_tokens) == at
    cases = [*tokens.items(), (marks, alone.expand(3, -1))]
    cases.append((each, torch.stack([alone, torch.zeros_like(alone), ~alone & (torch.arange(grid.n_tokens) > 0)])))
    for where, expected in cases:
        with edited(backbone, POINT, coder, edit, where=where):
            seen = backbone.activations(images, [POINT])[POINT]
        assert torch.equal((seen != x).any(2), expected)
        by_hand = edit_rows(coder, x[expected], edit)
        torch.testing.assert_close(seen[expected], by_hand, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="marks of patches are"), edited(backbone, POINT, coder, edit, where=marks[1:]):
        pass
    final = coder_of(d_in=backbone.d_embed)
    with (
        pytest.raises(ValueError, match="one row an image"),
        edited(backbone, "hook_image_embed", final, edit, where="cls"),
    ):
        pass


# -- what else changes


def test_drift_by_hand():
    coder = TopK(d_in=3, d_sae=3, k=3, normalization="none", seed=0).eval()
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(3))
        coder.W_dec.copy_(torch.eye(3))
    before = torch.tensor([[3.0, 4.0, 0.0]])
    edit = [Edit((0,), "set", 6.0)]
    after = edit_rows(coder, before, edit)
    told = drift(coder, before, after, edit)
    # |x'| - 3 of |x| = 5; no other latent moves; latent 0 is what it was set to
    assert (told.norm_share, told.latents_changed, told.codes_share, told.reached) == (0.6, 0.0, 0.0, 1.0)
    assert told.probability is None
    # logits ln 2, 0, 0 -> p = (2, 1, 1) / 4; then ln 2, ln 3, 0 -> (2, 3, 1) / 6. Target 0: 1/3 - 1/2.
    # among the others (1/2, 1/2) -> (3/4, 1/4): total variation 1/4. The first class was 0 and is 1.
    head = ZeroShotHead(torch.eye(3), logit_scale=1.0)
    logits = torch.tensor([[2.0, 1.0, 1.0], [2.0, 3.0, 1.0]]).log()
    head = type("Plain", (), {"kind": "own", "logit_scale": None, "n_classes": 3, "__call__": lambda _, x: x})()
    told = drift(coder, before, after, edit, outputs=(logits[:1], logits[1:]), head=head, targets=[0])
    assert told.probability == pytest.approx(-1 / 6)
    assert told.others == pytest.approx(0.25)
    assert told.top_changed == 1.0
    with pytest.raises(ValueError, match="every class is a target"):
        drift(coder, before, after, edit, outputs=(logits[:1], logits[1:]), head=head, targets=[0, 1, 2])


def test_neighbours_leave_one_by_one_as_strength_grows():
    # queries on the unit circle walk from row 0 towards row 3
    angles = torch.tensor([0.0, 0.1, 0.2, 1.4, 1.5])
    index = EmbeddingIndex(torch.stack([angles.cos(), angles.sin()], 1))
    query = torch.tensor([[1.0, 0.0]])
    edited_at = {s: torch.tensor([[1.0, s]]) for s in (0.0, 1.0, 100.0)}
    table = requery(lambda q: index.nearest(q, 2), query, edited_at)
    assert [row.neighbours.rows.tolist() for row in table] == [[[0, 1]], [[2, 3]], [[4, 3]]]
    assert [row.kept for row in table] == [(1.0,), (0.0,), (0.0,)]
