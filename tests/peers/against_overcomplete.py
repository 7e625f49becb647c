"""Overcomplete 0.3.0: its SAEs in training mode, as its train_sae calls them. Dictionaries have unit norm + 1e-8.

It has no bias at the output and none that the encoder subtracts. It has no AuxK or ghosts of this kind.
"""

import pytest
import torch
from sameness import D_IN, D_SAE, K, N, Pair, normal, ours, randomise, rows
from stand_ins import importing_a_peer
from torch.nn.functional import normalize

from vitrail.coders.jump_relu import KERNELS
from vitrail.foreign import read_foreign
from vitrail.statistics import ActivationStats

with importing_a_peer():
    from overcomplete import sae as overcomplete
    from overcomplete.sae.archetypal_dictionary import RelaxedArchetypalDictionary
    from overcomplete.sae.jump_sae import heaviside

NEARLY = dict(rtol=1e-6, atol=1e-6)  # it divides by norm + 1e-8, and so again in every call
BANDWIDTH = 1 / 32


def randomised(peer):
    """The dictionary brought to unit norm, as the first call would."""
    randomise(peer.double())
    peer.get_dictionary()
    return peer


def encoder(peer):
    linear = peer.encoder.final_block[0]
    return {"W_enc": linear.weight.t(), "b_enc": linear.bias}


def weights(peer):
    return encoder(peer) | {"W_dec": peer.dictionary._weights}


def mse(x, x_hat):
    """Its losses are means over dimensions too; ours are sums: d_in is the constant."""
    return D_IN * (x - x_hat).square().mean()


def test_topk(compared):
    peer, x = randomised(overcomplete.TopKSAE(D_IN, D_SAE, top_k=K)), rows()
    pair = Pair(ours("topk", k=K), peer, lambda: weights(peer), without=["b_dec"])
    _, z, x_hat = peer(x)
    pair.step(x, z, x_hat, mse(x, x_hat), NEARLY)
    compared(pair)


def test_batch_topk(compared):
    """Its k counts for the whole batch."""
    peer, x = randomised(overcomplete.BatchTopKSAE(D_IN, D_SAE, top_k=K * N)), rows()
    pair = Pair(ours("batch_topk", k=K), peer, lambda: weights(peer), without=["b_dec"])
    _, z, x_hat = peer(x)
    pair.step(x, z, x_hat, mse(x, x_hat), NEARLY)
    peer.eval()
    pair.coder.threshold.fill_(float(peer.running_threshold) - 1e-9)  # z >= threshold there
    _, z, x_hat = peer(x)
    pair.in_use(x, z, x_hat, NEARLY)
    compared(pair)


# What its kernels integrate to.
AREA = {"rectangle": 1.0, "triangle": 1.0, "epanechnikov": 1.0, "gaussian": 0.5, "silverman": 2.0}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kernel", KERNELS)
def test_jump_relu(compared, kernel):
    """Its thresholds get the kernel's area and a further 1 / bandwidth; both are taken out of their gradient here, for
    z and for L0. Float32 in places."""
    names = {"triangle": "triangular"}
    peer = overcomplete.JumpSAE(D_IN, D_SAE, kernel=names.get(kernel, kernel), bandwidth=BANDWIDTH)
    randomised(peer)
    with torch.no_grad():
        peer.thresholds.copy_((0.6 + 0.3 * normal(D_SAE, seed=5).abs()).log())
    x = rows(n=400)
    coder = ours("jump_relu", l0_coefficient=0.5, kernel=kernel, bandwidth=BANDWIDTH)

    def all_weights():
        return weights(peer) | {"log_threshold": peer.thresholds}

    pair = Pair(coder, peer, all_weights, without=["b_dec"])
    pre, z, x_hat = peer(x)
    on = heaviside(pre, peer.thresholds.exp(), peer.kernel_fn, peer.bandwidth)
    loss = mse(x, x_hat) + 0.5 * on.sum(1).mean()
    constants = {"thresholds": BANDWIDTH / AREA[kernel]}
    pair.step(x, z, x_hat, loss, dict(rtol=1e-5, atol=1e-5), constants=constants)
    compared(pair)


def test_matching_pursuit(compared):
    peer, x = overcomplete.MpSAE(D_IN, D_SAE, k=K), rows()
    randomised(peer)
    pair = Pair(
        ours("matching_pursuit", k=K), peer, lambda: {"W_dec": peer.dictionary._weights}, without=["b_enc", "b_dec"]
    )
    residual, z, x_hat = peer(x)
    assert bool((z >= 0).all())  # below zero the two differ: ours has stopped
    assert bool((z > 0).sum(1).min() < K)  # a direction was taken twice
    torch.testing.assert_close(residual, x - x_hat)
    pair.step(x, z, x_hat, residual.square().sum(1).mean(), NEARLY)
    pair.in_use(x, z, x_hat, NEARLY)
    compared(pair)


@pytest.mark.parametrize(
    ("name", "kind", "k"),
    [("archetypal_topk", "RATopKSAE", K), ("archetypal_batch_topk", "BatchTopKSAE", K * N)],
)
def test_archetypal(compared, name, kind, k):
    """The peer's directions are free in length, ours have unit norm: a relaxation that gives unit norm makes both
    equal, and what the norm takes from the gradient is worked out by autograd. There is no batch version of its own:
    its BatchTopK with its archetypal dictionary."""
    x, points = rows(), rows(n=15)
    coder = ours(name, k=K, n_candidates=15, delta=9.0)
    about = dict(delta=9.0, use_multiplier=False)
    if kind == "RATopKSAE":
        peer = overcomplete.RATopKSAE(D_IN, D_SAE, points, top_k=k, **about)
    else:
        peer = overcomplete.BatchTopKSAE(D_IN, D_SAE, top_k=k)
        peer.dictionary = RelaxedArchetypalDictionary(D_IN, D_SAE, points, **about)
    dictionary = randomise(peer.double()).dictionary
    with torch.no_grad():
        dictionary.W.copy_(normal(D_SAE, 15, seed=3).softmax(1))
        dictionary.Relax.copy_(normalize(normal(D_SAE, D_IN, seed=4), dim=1) - dictionary.W @ points)

    coder.fit(ActivationStats.of(x), x)
    coder.candidates.copy_(points)
    pair = Pair(
        coder, peer, lambda: encoder(peer) | {"W_dec": dictionary.get_dictionary()}, ["b_dec", "mixing", "relaxation"]
    )
    with torch.no_grad():
        coder.mixing.copy_(dictionary.W.log())
        coder.relaxation.copy_(dictionary.Relax)
        coder.constrain_weights()
    pair.equal(coder.W_dec, dictionary.get_dictionary(), "dictionary", NEARLY)
    _, z, x_hat = peer(x)
    loss = mse(x, x_hat)
    at_dictionary = torch.autograd.grad(loss, dictionary.Relax, retain_graph=True)[0]
    pair.step(x, z, x_hat, loss, NEARLY)

    mixing, relaxation = (p.detach().clone().requires_grad_() for p in (coder.mixing, coder.relaxation))
    unit = normalize(mixing.softmax(1) @ points + relaxation, dim=1)
    expected = torch.autograd.grad(unit, (mixing, relaxation), at_dictionary)
    pair.equal(coder.mixing.grad, expected[0], "gradient of the mixing", NEARLY)
    pair.equal(coder.relaxation.grad, expected[1], "gradient of the relaxation", NEARLY)
    compared(pair)


def test_relaxations_go_back_into_the_same_ball():
    x, points = rows(), rows(n=15)
    coder = ours("archetypal_topk", k=K, n_candidates=15, delta=0.5)
    coder.fit(ActivationStats.of(x), x)
    dictionary = RelaxedArchetypalDictionary(D_IN, D_SAE, points, delta=0.5).double()
    with torch.no_grad():
        coder.candidates.copy_(points)
        coder.mixing.copy_(normal(D_SAE, 15, seed=3))
        coder.relaxation.copy_(normal(D_SAE, D_IN, seed=4))
        dictionary.W.copy_(coder.mixing.softmax(1))
        dictionary.Relax.copy_(coder.relaxation)
    coder.constrain_weights()
    torch.testing.assert_close(coder.mixtures(), dictionary.get_dictionary(), **NEARLY)
    torch.testing.assert_close(coder.W_dec, normalize(dictionary.get_dictionary(), dim=1), **NEARLY)


def untied(bias):
    return lambda: overcomplete.TopKSAE(D_IN, D_SAE, top_k=K).untied(bias=bias)


CHECKPOINTS = {
    "topk": ("topk", {"k": K}, lambda: overcomplete.TopKSAE(D_IN, D_SAE, top_k=K)),
    "topk, untied": ("topk", {"k": K}, untied(False)),
    "topk, untied with a bias": ("topk", {"k": K}, untied(True)),
    "batchtopk": ("batchtopk", {"k": K, "threshold": 1.25}, lambda: overcomplete.BatchTopKSAE(D_IN, D_SAE, top_k=9)),
    "jumprelu": ("jumprelu", {}, lambda: overcomplete.JumpSAE(D_IN, D_SAE)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint(opened, write, kind):
    activation, config, make = CHECKPOINTS[kind]
    theirs, x = randomise(make()), 2 * rows().float()
    theirs.running_threshold = torch.tensor(1.25)
    theirs.dictionary.multiplier.fill_(0.3)
    folder = write(theirs.state_dict(), {"activation": activation, **config})
    theirs.eval()
    _, z, x_hat = theirs(x)
    opened(kind, read_foreign(folder, "overcomplete")[1].coder, x, z, x_hat)
