"""The learned token of the text side: where it goes, what it learns, what is refused."""

import numpy as np
import pytest
import torch

from vitrail.backbones import load
from vitrail.backbones.text import class_embeddings
from vitrail.steering.prefix import (
    Prefix,
    load_prefix,
    prefixed_embeddings,
    prefixed_head,
    token_embedding,
    train_prefix,
)

NAMES = ("star", "heart", "ring", "cross")


@pytest.fixture(scope="module")
def toy():
    return load("toy/clip")


def test_a_prefix_that_is_a_words_own_embedding_says_that_word(toy):
    module = token_embedding(toy)
    (ids,) = toy.module.tokenizer(["red"])
    red = module.weight[int(ids[1])].detach()  # after the start
    with torch.no_grad():
        want = class_embeddings(toy.text, [f"red {name}" for name in NAMES], ("a {}.", "a photo of a {}."))
        got = prefixed_embeddings(toy, red, NAMES, ("a {}.", "a photo of a {}."))
    # class_embeddings takes the mean over templates as well.
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(toy.text.encode(["a star."]), class_embeddings(toy.text, ["star"], ("a {}.",)))


def test_training_brings_attacked_pictures_back_and_touches_no_weight(toy):
    with torch.no_grad():
        plain = class_embeddings(toy.text, NAMES)
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(4).repeat(8)
    clean = plain[label] + 0.02 * torch.randn(32, plain.shape[1], generator=generator)
    attacked = 0.42 * plain[label] + 0.58 * plain[(label + 1) % 4]  # nearer to the next class
    right = torch.eye(4, dtype=torch.bool)[label]
    before, digest = [parameter.clone() for parameter in toy.parameters()], toy.digest
    prefix = train_prefix(toy, attacked, clean, right, NAMES, n_steps=40, weight=1.0, lr=0.05)
    assert float(prefix.about["loss_last"]) < float(prefix.about["loss_first"])
    again = train_prefix(toy, attacked, clean, right, NAMES, n_steps=40, weight=1.0, lr=0.05)
    assert torch.equal(prefix.vector, again.vector)
    assert digest == toy.digest
    assert all(torch.equal(a, b) for a, b in zip(before, toy.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in toy.parameters())
    head = prefixed_head(toy, prefix, NAMES)
    assert (head(clean).argmax(1) == label).float().mean() == 1.0


def test_a_prefix_is_saved_and_read_back(toy, tmp_path):
    vector = torch.randn(128, generator=torch.Generator().manual_seed(1))
    Prefix(vector, {"from": "here"}).save(tmp_path / "p.safetensors")
    back = load_prefix(tmp_path / "p.safetensors")
    assert torch.equal(back.vector, vector)
    assert back.about == {"from": "here"}
    np.savez(tmp_path / "p.npz", prefix=vector.numpy()[None])
    np.save(tmp_path / "p.npy", vector.numpy())
    assert torch.equal(load_prefix(tmp_path / "p.npz").vector, vector)
    assert torch.equal(load_prefix(tmp_path / "p.npy").vector, vector)


def test_what_is_no_prefix_is_refused(toy, tmp_path):
    (tmp_path / "p.pt").write_bytes(b"x")
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    np.save(tmp_path / "square.npy", np.zeros((2, 3)))
    for name, message in (("p.pt", "pickles"), ("o.npy", "without pickles"), ("two.npz", "name the prefix's"),
                          ("square.npy", "one row")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_prefix(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_prefix(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="128 wide"):
        prefixed_embeddings(toy, torch.zeros(5), NAMES)
    with pytest.raises(ValueError, match="no text tower"):
        token_embedding(load("toy/shapes"))
    with pytest.raises(ValueError, match="an answer in each row"):
        train_prefix(toy, torch.zeros(2, 64), torch.zeros(2, 64), torch.zeros(2, 4, dtype=torch.bool), NAMES)
