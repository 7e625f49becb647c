"""What is said of a picture, what it is true of, and the loss that knows."""

import math

import pytest
import torch

from vitrail.images.worlds import open_world
from vitrail.toys.clip import contrastive_loss
from vitrail.toys.describing import FAMILIES, described, draw_captions, families_told, words_of

STAR = {
    "size": "large", "colour": "red", "texture": "striped", "shape": "star", "position": "top left",
    "background": "sand",
}  # fmt: skip


def test_descriptions_say_what_they_are_asked_to():
    assert described(STAR) == "a large red striped star at the top left on sand"
    assert described(STAR, ("colour",)) == "a red thing"
    assert described(STAR, ("shape", "background")) == "a star on sand"
    assert described(STAR | {"colour": "orange"}, ("colour", "position")) == "an orange thing at the top left"


def test_a_full_description_is_the_worlds_own_caption():
    world = open_world("world:shapes?n=40")
    for i in range(40):
        scene = world.scene(i)
        assert described(scene.attributes).removeprefix("an ").removeprefix("a ") == scene.caption.removeprefix("a ")


def test_shares_of_what_is_told():
    assert families_told(0.1, [0.9] * 6) == FAMILIES
    assert families_told(0.3, [0.1] * 6) == ("texture", "shape")
    assert families_told(0.9, [0.1, 0.9, 0.9, 0.9, 0.9, 0.4]) == ("size", "background")
    assert families_told(0.9, [0.9] * 6) == ("texture", "shape")  # never nothing


def test_a_caption_is_true_of_its_picture_and_of_those_that_agree():
    """Witness: a caption is true of a picture if telling the same of that picture gives the same words."""
    world = open_world("world:shapes?n=60")
    attributes = [world.scene(i).attributes for i in range(60)]
    captions, true = draw_captions(attributes, (3, 4), 0, 3)
    assert true.shape == (60, 180)
    assert len(captions) == 180
    for column, caption in enumerate(captions):
        plain = caption.removeprefix("a photo of ").removeprefix("a picture of ")
        own = attributes[column // 3]
        told = [family for family in FAMILIES if _tells(plain, family, own)]
        assert described(own, told) == plain
        for row, values in enumerate(attributes):
            assert bool(true[row, column]) == (described(values, told) == plain)
    assert true.sum() > 180, "half-told captions fit other pictures too"


def _tells(caption, family, values):
    if family == "position":
        return " at the " in caption
    if family == "background":
        return " on " in caption
    return values[family] in caption.split(" at ")[0].split(" on ")[0].split()


def test_captions_depend_on_the_picture_and_not_on_the_batch():
    world = open_world("world:shapes?n=8")
    attributes = [world.scene(i).attributes for i in range(8)]
    together, _ = draw_captions(attributes, (3, 4), 0, 2)
    later, _ = draw_captions(attributes[4:], (3, 4), 4, 2)
    assert later == together[8:]
    assert draw_captions(attributes, (3, 5), 0, 2)[0] != together


def test_words_are_those_of_every_caption():
    world = open_world("world:shapes?n=400")
    attributes = [world.scene(i).attributes for i in range(400)]
    words = words_of(attributes)
    assert words == sorted(set(words))
    assert {"photo", "thing", "striped", "pond", "bottom", "an"} <= set(words)
    captions, _ = draw_captions(attributes[:50], (1, 1), 0, 4)
    assert {word for caption in captions for word in caption.split()} <= set(words)


def test_contrastive_loss_by_hand():
    # Two pictures, two captions, the second caption true of both.
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    true = torch.tensor([[True, True], [False, True]])
    # captions of picture 0: softmax (3/4, 1/4), answers half and half: (ln 4/3 + ln 4) / 2; of picture 1: ln 2.
    captions = ((math.log(4 / 3) + math.log(4)) / 2 + math.log(2)) / 2
    # pictures of caption 0: softmax (3/4, 1/4), the answer is picture 0: ln 4/3; of caption 1: ln 2.
    pictures = (math.log(4 / 3) + math.log(2)) / 2
    assert contrastive_loss(logits, true).item() == pytest.approx((captions + pictures) / 2, rel=1e-6)


def test_with_one_truth_each_it_is_clips_loss():
    """Witness: open_clip's ClipLoss."""
    open_clip = pytest.importorskip("open_clip")
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=-1) for _ in range(2))
    theirs = open_clip.loss.ClipLoss()(image, text, torch.tensor(12.0))
    torch.testing.assert_close(contrastive_loss(12.0 * image @ text.T, torch.eye(6, dtype=torch.bool)), theirs)
