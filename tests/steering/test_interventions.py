"""Interventions: doses, bases, tokens, and that nothing changes where nothing is asked."""

import pytest
import torch

from backbones.small_backbones import build_case
from vitrail.coders import TopK
from vitrail.concepts.editing import Edit, edit_rows
from vitrail.statistics import ActivationStats
from vitrail.steering.interventions import (
    Directions,
    Dose,
    Intervention,
    Latents,
    Neurons,
    columns_of,
    intervened,
    marked_tokens,
    moved_rows,
    own_of_codes,
    random_directions,
)

POINT = "blocks.1.hook_resid_post"


def coder_of(d_in=5, d_sae=9, normalization="none", seed=0, rows=None):
    coder = TopK(d_in=d_in, d_sae=d_sae, k=3, normalization=normalization, seed=seed)
    rows = torch.randn(64, d_in, generator=torch.Generator().manual_seed(seed)) * 2 + 1 if rows is None else rows
    coder.fit(ActivationStats.of(rows), rows)
    return coder.eval(), rows


@pytest.mark.parametrize("normalization", ["none", "mean_std", "layer_norm"])
@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize(
    ("dose", "edit"),
    [
        (Dose("set", 7.0), Edit((2, 5), "set", 7.0)),
        (Dose("add", -0.3), Edit((2, 5), "add", -0.3)),
        (Dose("scale", 2.5), Edit((2, 5), "scale", 2.5)),
        (Dose("ablate"), Edit((2, 5), "remove")),
    ],
)
def test_latents_move_as_edited_rows_do(normalization, keep_error, dose, edit):
    coder, x = coder_of(normalization=normalization)
    expected = edit_rows(coder, x, [edit], keep_error=keep_error)
    torch.testing.assert_close(moved_rows(Latents(coder), x, [2, 5], dose, keep_error=keep_error), expected)


def test_a_dose_by_hand():
    # x = (3, 4); the unit direction (0.6, 0.8) has projection 5. Set to 0 leaves what is orthogonal: nothing.
    x = torch.tensor([[3.0, 4.0]])
    along = Directions(torch.tensor([[6.0, 8.0]]))
    assert moved_rows(along, x, [0], Dose("set", 0.0)) == pytest.approx(torch.zeros(1, 2), abs=1e-6)
    # Neuron 1 set to 10 is a step of 6; downwards (number 2 + 1) its value is -4, set to 10 the coordinate is -10.
    neurons = Neurons(2, both_signs=True)
    assert moved_rows(neurons, x, [1], Dose("set", 10.0)).tolist() == [[3.0, 10.0]]
    assert moved_rows(neurons, x, [3], Dose("set", 10.0)).tolist() == [[3.0, -10.0]]
    assert moved_rows(neurons, x, [0], Dose("add", 2.0, "norm")).tolist() == [[5.0, 4.0]]
    assert moved_rows(neurons, x, [0], Dose("set", 3.0, "own"), own=neurons.own(x)).tolist() == [[9.0, 4.0]]


@pytest.mark.parametrize("normalization", ["none", "mean_std", "layer_norm"])
def test_equal_norm_is_equal_for_every_basis(normalization):
    coder, x = coder_of(normalization=normalization)
    with torch.no_grad():
        coder.W_dec.mul_(torch.rand(9, 1) + 0.5)  # loaded coders need not have unit directions
    for basis in (Latents(coder), Neurons(5), random_directions(4, 5, seed=3)):
        for one in range(basis.n):
            moved = moved_rows(basis, x, [one], Dose.of("norm:2.5")) - x
            torch.testing.assert_close(torch.linalg.vector_norm(moved, dim=1), torch.full((64,), 2.5))


def test_rows_in_which_nothing_changes_are_bit_identical():
    coder, x = coder_of(normalization="mean_std")
    basis, codes = Latents(coder), coder.encode_sparse(x)
    silent = columns_of(codes, torch.tensor([4]))[:, 0] == 0
    assert silent.any()
    moved = moved_rows(basis, x, [4], Dose("ablate"))
    assert torch.equal(moved[silent], x[silent])
    assert not (moved[~silent] == x[~silent]).all(1).any()
    for dose in (Dose("scale", 1.0), Dose("add", 0.0)):
        assert torch.equal(moved_rows(basis, x, [0, 4], dose), x)
    assert torch.equal(moved_rows(basis, x, [0], Dose("set", 2.0, "own"), own=torch.zeros(9)), x) == bool(
        (columns_of(codes, torch.tensor([0])) == 0).all()
    )


def test_own_scales_are_largest_and_mean_where_it_fires():
    coder, x = coder_of()
    z = coder.encode(x).detach()
    codes = coder.encode_sparse(x)
    torch.testing.assert_close(own_of_codes(codes), z.amax(0))
    torch.testing.assert_close(own_of_codes(codes, "mean"), z.sum(0) / (z > 0).sum(0).clamp_min(1))
    along = random_directions(3, 5, seed=1)
    torch.testing.assert_close(along.own(x), (x @ along.rows.T).abs().amax(0))
    torch.testing.assert_close(Neurons(5).own(x, "mean"), x.abs().mean(0))


@pytest.mark.parametrize("where", ["all", "cls", "spatial", "marks"])
def test_only_the_marked_tokens_move(where):
    case = build_case("toy-clip")
    backbone, images = case.backbone, case.images(3)
    marks = torch.zeros(3, 4, 4, dtype=torch.bool)
    marks[0, 1, 2] = marks[2, 3, 3] = True
    asked = Intervention(
        POINT, random_directions(2, 24, seed=1), [0, 1], Dose("add", 3.0),
        where=marks if where == "marks" else where,
    )  # fmt: skip
    with torch.no_grad():
        before = backbone.activations(images, [POINT])[POINT]
        with intervened(backbone, asked):
            after = backbone.activations(images, [POINT])[POINT]
    changed = (after != before).any(2)
    expected = torch.zeros(3, 17, dtype=torch.bool)
    if where == "marks":
        expected[0, 1 + 1 * 4 + 2] = expected[2, 1 + 3 * 4 + 3] = True
    else:
        expected[:, backbone.grid.tokens(where)] = True
    assert torch.equal(changed, expected)


def test_no_op_interventions_at_several_points_leave_the_output_bit_identical():
    case = build_case("toy-clip")
    backbone, images = case.backbone, case.images(2)
    coder, _ = coder_of(24, 40, rows=torch.randn(60, 24, generator=torch.Generator().manual_seed(2)))
    asked = [
        Intervention("blocks.0.hook_resid_post", Neurons(24), [3], Dose("scale", 1.0)),
        Intervention(POINT, Latents(coder), range(40), Dose("scale", 1.0)),
        Intervention("hook_image_embed", random_directions(2, 20), [1], Dose("add", 0.0)),
    ]
    with torch.no_grad():
        plain = backbone(images)
        with intervened(backbone, asked):
            assert torch.equal(backbone(images), plain)
        with intervened(backbone, [*asked, Intervention(POINT, Latents(coder), [1], Dose("set", 4.0))]):
            assert not torch.equal(backbone(images), plain)


def test_random_directions_repeat_by_seed():
    assert torch.equal(random_directions(3, 7, seed=5).rows, random_directions(3, 7, seed=5).rows)
    assert not torch.equal(random_directions(3, 7, seed=5).rows, random_directions(3, 7, seed=6).rows)


def test_doses_in_words():
    assert Dose.of("set:150") == Dose("set", 150.0)
    assert Dose.of("own:3") == Dose("set", 3.0, "own")
    assert Dose.of("ablate") == Dose("ablate")
    for text in ("150", "set", "set:much", "norm:inf", "turn:3"):
        with pytest.raises(ValueError, match="a dose is one of"):
            Dose.of(text)


def test_what_cannot_be_is_told():
    coder, x = coder_of()
    latents = Latents(coder)
    with pytest.raises(ValueError, match="not negative"):
        moved_rows(latents, x, [0], Dose("set", -1.0))
    with pytest.raises(ValueError, match="own scales"):
        moved_rows(latents, x, [0], Dose("set", 1.0, "own"))
    with pytest.raises(IndexError, match=r"0\.\.8, got 9"):
        moved_rows(latents, x, [9], Dose("ablate"))
    with pytest.raises(ValueError, match="nothing to steer"):
        moved_rows(latents, x, [], Dose("ablate"))
    with pytest.raises(ValueError, match="keep_error=True"):
        moved_rows(Neurons(5), x, [0], Dose("ablate"), keep_error=False)
    with pytest.raises(ValueError, match="it does not set"):
        Dose("set", 1.0, "norm")
    with pytest.raises(ValueError, match="none of them 0"):
        Directions(torch.zeros(1, 4))
    backbone = build_case("toy-clip").backbone
    with pytest.raises(ValueError, match="4 x 4"):
        marked_tokens(backbone, POINT, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no CLS token"):
        marked_tokens(backbone, "hook_embed", "cls")
    with (
        pytest.raises(ValueError, match="24 wide"),
        intervened(backbone, Intervention(POINT, latents, [0], Dose("ablate"))),
    ):
        pass
