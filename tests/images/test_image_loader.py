"""Batches: the order asked for, the same for any number of workers, bad pictures listed and nothing lost."""

import os
import signal

import numpy as np
import pytest
import torch
from image_examples import encoded
from PIL import Image

from vitrail.images import load_batches, open_images

ORDER = [7, 0, 3, 11, 1, 2, 9]


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


def killed(image: Image.Image) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def by_size(image: Image.Image) -> torch.Tensor:
    image.thumbnail((image.getpixel((0, 0))[0] % 7 + 2,) * 2)  # pyright: ignore
    return to_tensor(image)


@pytest.mark.parametrize("kind", ["world", "folder", "table", "tar"])
def test_batches_keep_the_order_of_positions_with_and_without_workers(kind, specs):
    source = open_images(specs[kind])
    for n_workers in (0, 2):
        batches = list(load_batches(source, ORDER, to_tensor, batch_size=3, n_workers=n_workers))
        assert [batch.positions for batch in batches] == [[7, 0, 3], [11, 1, 2], [9]]
        images = torch.cat([batch.images for batch in batches])
        for row, i in enumerate(ORDER):
            assert torch.equal(images[row], to_tensor(source.load(i)))
        assert all(batch.skipped == [] for batch in batches)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_bad_pictures_leave_their_own_batch_smaller_and_no_other(n_workers, specs, tmp_path):
    source = open_images(specs["folder"])
    whole = list(load_batches(source, range(12), to_tensor, batch_size=4))
    (tmp_path / "folder" / "ape" / "03.png").write_bytes(encoded(3)[:100])  # position 1
    (tmp_path / "folder" / "ape" / "06.png").write_bytes(b"")  # position 2
    batches = list(load_batches(source, range(12), to_tensor, batch_size=4, n_workers=n_workers))
    assert [batch.positions for batch in batches] == [[0, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [i for i, _ in batches[0].skipped] == [1, 2]
    assert "cannot be decoded" in batches[0].skipped[0][1]
    assert "empty" in batches[0].skipped[1][1]
    assert torch.equal(batches[0].images, whole[0].images[[0, 3]])
    assert torch.equal(batches[1].images, whole[1].images)


def test_a_batch_of_nothing_but_bad_pictures_is_empty(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    (batch,) = load_batches(open_images(tmp_path), [0], to_tensor, batch_size=2)
    assert (batch.positions, batch.images.shape, len(batch.skipped)) == ([], (0, 3, 0, 0), 1)


def test_a_killed_worker_is_named_with_what_to_do(specs):
    batches = load_batches(open_images(specs["folder"]), range(4), killed, batch_size=2, n_workers=1)
    with pytest.raises(RuntimeError, match=r"was killed .*fewer workers than 1 \(0 reads in this process\)"):
        list(batches)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_an_error_of_the_transform_is_not_swallowed(n_workers, specs):
    with pytest.raises(ValueError, match="must give pictures of one shape"):
        list(load_batches(open_images(specs["folder"]), range(12), by_size, batch_size=12, n_workers=n_workers))


def test_what_cannot_be_is_refused_at_once(specs):
    source = open_images(specs["folder"])
    with pytest.raises(IndexError, match=r"0\.\.11, got 12"):
        load_batches(source, [0, 12], to_tensor, batch_size=2, n_workers=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        load_batches(source, [0], to_tensor, batch_size=0, n_workers=0)
    assert list(load_batches(source, [], to_tensor, batch_size=2, n_workers=0)) == []
