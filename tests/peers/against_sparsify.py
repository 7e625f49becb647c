"""sparsify 1.3.3 (eai-sparsify), with its eager decoder."""

import os

import pytest
import torch
from sameness import D_IN, D_SAE, MANY, K, N, Pair, normal, ours, randomise, rows
from stand_ins import importing_a_peer

from vitrail.foreign import read_foreign
from vitrail.training.revive import AUX_WEIGHT, AuxK

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
with importing_a_peer():
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder


def peer_of(dtype=torch.float64, d_sae=D_SAE, **options):
    return randomise(SparseCoder(D_IN, SparseCoderConfig(num_latents=d_sae, k=K, **options), dtype=dtype))


def weights(peer, b_dec="b_dec"):
    return {
        "W_enc": peer.encoder.weight.t(),
        "b_enc": peer.encoder.bias,
        "W_dec": peer.W_dec,
        b_dec: peer.b_dec,
    }


def dense(out, d_sae=D_SAE):
    none = torch.zeros(len(out.latent_acts), d_sae, dtype=out.latent_acts.dtype)
    return none.scatter(1, out.latent_indices, out.latent_acts)


def spread(x):
    return (x - x.mean(0)).square().sum() / len(x)


@pytest.mark.parametrize("d_sae", [D_SAE, MANY])
def test_topk(compared, d_sae):
    """Its loss is a share of the variance, ours is not divided."""
    peer, x = peer_of(d_sae=d_sae), rows()
    pair = Pair(ours("topk", d_sae=d_sae, k=K), peer, lambda: weights(peer))
    out = peer(x)
    z = dense(out, d_sae)
    pair.step(x, z, out.sae_out, out.fvu * spread(x))
    pair.in_use(x, z, out.sae_out)
    compared(pair)


@pytest.mark.parametrize("skip", [False, True])
def test_topk_transcoder(compared, skip):
    """Its only bias is the output's. With a skip, ours says what is left for the latents."""
    peer, x, y = peer_of(transcode=True, skip_connection=skip), rows(), normal(N, D_IN, seed=3)
    out = peer(x, y)
    by_skip = x @ peer.W_skip.t() if skip else 0.0

    def all_weights():
        return weights(peer, "b_out") | ({"W_skip": peer.W_skip.t()} if skip else {})

    coder = ours("topk_transcoder", k=K, d_out=D_IN, skip=skip, output_normalization="none")
    pair = Pair(coder, peer, all_weights, without=["b_dec"])
    pair.step(torch.cat([x, y], 1), dense(out), out.sae_out - by_skip, out.fvu * spread(y))
    pair.in_use(x, dense(out), out.sae_out)
    compared(pair)


def test_auxk(revived):
    """It measures e_hat against the variance of y, ours against e, and lessens it where fewer are dead than k_aux.
    Its fused backward sends the term to the decoder alone."""
    peer, x = peer_of(), rows()
    dead = torch.arange(D_SAE) % 2 == 0
    pair = Pair(ours("topk", k=K), peer, lambda: weights(peer))
    one, out = pair.coder.loss(x), peer(x, dead_mask=dead)
    e = (x - out.sae_out).detach()
    theirs = out.auxk_loss * AUX_WEIGHT * spread(x) ** 2 * N / e.square().sum()
    term = AuxK().term(pair.coder, one, dead)
    pair.equal(term, theirs, "term")
    pair.gradients(term, theirs, but=["encoder.weight", "encoder.bias", "b_dec"])
    revived("auxk", pair)


@pytest.mark.parametrize("options", [{}, {"transcode": True}, {"transcode": True, "skip_connection": True}], ids=str)
def test_a_checkpoint(opened, tmp_path, options):
    folder = tmp_path / "layers.3.mlp"
    randomise(peer_of(torch.float32, **options)).save_to_disk(folder)
    theirs, x = SparseCoder.load_from_disk(folder), 3 * rows().float()
    peer, found = read_foreign(folder)
    assert peer.name == "sparsify"
    out = theirs(x)
    opened("+".join(options) or "autoencoder", found.coder, x, dense(out), out.sae_out)
