import pytest

from vitrail.backbones import Grid


@pytest.fixture
def grid():
    """2 x 3 patches of 16 pixels after CLS and two registers: tokens 0 | 1 2 | 3 4 5 / 6 7 8."""
    return Grid.of_tokens(9, image_px=(32, 48), patch_px=16, n_cls=1, n_registers=2)


def test_tokens_by_kind(grid):
    everything = list(range(9))
    assert everything[grid.tokens("cls")] == [0]
    assert everything[grid.tokens("spatial")] == [3, 4, 5, 6, 7, 8]
    assert everything[grid.tokens("all")] == everything
    with pytest.raises(ValueError, match="'patches'"):
        grid.tokens("patches")


def test_no_cls_token_to_ask_for():
    grid = Grid.of_tokens(6, image_px=(32, 48), patch_px=16, n_cls=0, n_registers=0)
    with pytest.raises(ValueError, match="no CLS token"):
        grid.tokens("cls")


def test_token_to_patch_and_back(grid):
    assert [grid.patch_of_token(t) for t in (0, 1, 2)] == [None, None, None]
    assert grid.patch_of_token(7) == (1, 1)  # 7 - 3 = 4 = 1 * 3 + 1
    for token in range(3, 9):
        assert grid.token_of_patch(*grid.patch_of_token(token)) == token
    for token in (-1, 9):
        with pytest.raises(ValueError, match=r"0\.\.8"):
            grid.patch_of_token(token)
    with pytest.raises(ValueError, match="row 0, column 3"):
        grid.token_of_patch(0, 3)


def test_boxes_tile_the_image(grid):
    assert grid.box_px(7) == (16, 16, 32, 32)
    covered = {
        (x, y)
        for token in range(3, 9)
        for box in [grid.box_px(token)]
        for x in range(box[0], box[2])
        for y in range(box[1], box[3])
    }
    assert len(covered) == 32 * 48
    assert grid.box_px(0) == (0, 0, 48, 32), "a special token sees the whole image"


def test_a_grid_that_does_not_add_up_is_refused():
    with pytest.raises(ValueError, match=r"makes 10 tokens .* 2 x 3 patches of 16 pixels and 1 special tokens are 7"):
        Grid.of_tokens(10, image_px=(32, 48), patch_px=16, n_cls=1, n_registers=0)


def test_json_round_trip(grid):
    assert Grid.from_json(grid.to_json()) == grid
