"""saev 0.1.0, which wrote the released coders."""

import pytest
from sameness import D_IN, Pair, ours, randomise, rows
from stand_ins import importing_a_peer

from vitrail.foreign import read_foreign

with importing_a_peer():
    from saev import config, nn


def peer_of(**options):
    return randomise(nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=D_IN, exp_factor=3, **options)))


@pytest.mark.usefixtures("either_way")
def test_relu(compared):
    """Its error is a mean over dimensions, ours a sum: d_in is the constant, and so is it for the penalty's weight."""
    peer, x = peer_of(sparsity_coeff=0.1).double(), rows()
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    coder = ours("relu", d_sae=3 * D_IN, l1=0.1 * D_IN)
    pair = Pair(coder, peer, lambda: {name: getattr(peer, name) for name in names})
    x_hat, z, loss = peer(x)
    pair.step(x, z, x_hat, D_IN * loss.loss)
    pair.in_use(x, z, x_hat)
    compared(pair)


def test_a_checkpoint(opened, tmp_path):
    nn.dump(str(tmp_path / "sae.pt"), peer_of())
    theirs, x = nn.load(str(tmp_path / "sae.pt")), 2 * rows().float()
    peer, found = read_foreign(tmp_path)
    assert peer.name == "saev"
    x_hat, z, _ = theirs(x)
    opened("Relu", found.coder, x, z, x_hat)
