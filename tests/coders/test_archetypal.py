"""Archetypal coders: W_dec is always the mixture it claims to be, and the mixture is what is trained."""

import copy
import io
import pickle

import pytest
import torch
from coder_examples import D_IN, D_SAE, fitted, mean_max_cosine, planted, rows, train_briefly

from vitrail.coders import ArchetypalBatchTopK, ArchetypalTopK, TopK, load_coder, save_coder
from vitrail.coders.baselines import untrained_like
from vitrail.coders.dictionary import initial_mixing, kmeans
from vitrail.statistics import ActivationStats
from vitrail.training import TensorSource, TrainConfig, train

every_archetypal = pytest.mark.parametrize("name", ["archetypal_topk", "archetypal_batch_topk"])


def is_its_mixture(coder) -> bool:
    unit = torch.nn.functional.normalize(coder.mixtures(), dim=1)
    within = coder.relaxation is None or coder.relaxation.norm(dim=1).max() <= coder.delta * (1 + 1e-5)
    return torch.allclose(coder.W_dec, unit, atol=1e-6) and bool(within)


def test_one_step_by_hand():
    # Two candidates (2, 0), (0, 1), one latent half and half, no relaxation: V = (1, 0.5), |V| = sqrt(1.25).
    # x = V: pre = z = |V| with the tied encoder, y_hat = V, error 0. With the encoder doubled z = 2 |V|, y_hat = 2 V:
    # dloss/dW_dec = 2 z (y_hat - y) = 4 |V| V: parallel to V, so nothing is to be gained by turning it: no gradient.
    # x = (1, 0), encoder (1, 0): z = 1, y_hat = V / |V| = (.8944, .4472):
    #   dloss/dW = 2 (-.1056, .4472) = (-.2111, .8944).
    #   Its part along W: -.1888 + .4 = .2111; the rest: (-.2111 - .1888, .8944 - .0944) = (-.4, .8), over |V|
    #   dloss/dV = (-.3578, .7155). At the weights: (2 * -.3578, .7155) = (-.7155, .7155), mean 0.
    #   At the logits: 1/2 of that: (-.3578, .3578): less of the second candidate.
    coder = ArchetypalTopK(d_in=2, d_sae=1, k=1, n_candidates=2, delta=0.0, normalization="none")
    with torch.no_grad():
        coder.fitted.fill_(True)
        coder.candidates.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        coder.mixing.zero_()
        coder.constrain_weights()
        coder.W_enc.copy_(2 * coder.W_dec.t())
    torch.testing.assert_close(coder.mixtures(), torch.tensor([[1.0, 0.5]]))
    step = coder.loss(torch.tensor([[1.0, 0.5]]))
    torch.testing.assert_close(step.x_hat, torch.tensor([[2.0, 1.0]]))
    step.loss.backward()
    torch.testing.assert_close(coder.mixing.grad, torch.zeros(1, 2), atol=1e-6, rtol=0)
    coder.zero_grad()
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[1.0], [0.0]]))
    coder.loss(torch.tensor([[1.0, 0.0]])).loss.backward()
    torch.testing.assert_close(coder.mixing.grad, torch.tensor([[-0.3578, 0.3578]]), atol=1e-4, rtol=0)


def test_directions_are_those_of_the_authors_library():
    # Row by row as RelaxedArchetypalDictionary.get_dictionary has it, with weights given instead of logits. Compared in
    # numbers with overcomplete 0.3.0: mixtures equal to 3e-8, which is the 1e-8 it adds to each row's sum.
    coder = fitted("archetypal_topk", delta=0.5).double()
    with torch.no_grad():
        for i, parameter in enumerate((coder.mixing, coder.relaxation)):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        coder.relaxation[::2] *= 0.01  # within the ball: these stay as they are
    expected = []
    for logits, relaxation in zip(coder.mixing.detach(), coder.relaxation.detach().clone(), strict=True):
        weights = logits.exp() / logits.exp().sum()
        shrunk = relaxation * min(0.5 / relaxation.norm().item(), 1)
        expected.append(sum(w * point for w, point in zip(weights, coder.candidates, strict=True)) + shrunk)
    coder.constrain_weights()
    torch.testing.assert_close(coder.mixtures().detach(), torch.stack(expected))
    torch.testing.assert_close(coder.W_dec.detach(), torch.stack([v / v.norm() for v in expected]))


@every_archetypal
@pytest.mark.parametrize("delta", [0.0, 0.7])
def test_gradients_reach_the_mixing_as_by_plain_autograd(name, delta):
    coder, x = fitted(name, delta=delta).double(), rows(32).double()
    with torch.no_grad():
        for i, parameter in enumerate((coder.b_dec, coder.b_enc, coder.mixing, coder.relaxation)):
            if parameter is not None:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        coder.constrain_weights()
    coder.loss(x).loss.backward()
    found = {key: parameter.grad.clone() for key, parameter in coder.named_parameters()}
    coder.zero_grad()
    y = coder.normalize(x).y
    W_dec = torch.softmax(coder.mixing, 1) @ coder.candidates
    W_dec = W_dec if coder.relaxation is None else W_dec + coder.relaxation
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    W_dec.retain_grad()
    pre = (y - coder.b_dec) @ coder.W_enc + coder.b_enc
    if name == "archetypal_topk":
        smallest = pre.sort(1, descending=True).values[:, coder.k - 1 : coder.k]
    else:
        smallest = pre.flatten().sort(descending=True).values[len(y) * coder.k - 1]
    z = pre.relu() * (pre >= smallest).detach()
    (z @ W_dec + coder.b_dec - y).pow(2).sum(1).mean().backward()
    for key, parameter in coder.named_parameters():
        dense = W_dec.grad if key == "W_dec" else parameter.grad
        torch.testing.assert_close(found[key], dense, rtol=1e-9, atol=1e-9, msg=key)
        assert dense.abs().sum() > 0
    assert ("relaxation" in found) == (delta > 0)


def test_gradients_of_several_backward_passes_add_up():
    coder, x = fitted("archetypal_topk").double(), rows(32).double()
    coder.loss(x).loss.backward()
    once = {key: parameter.grad.clone() for key, parameter in coder.named_parameters()}
    coder.loss(x).loss.backward()
    for key, parameter in coder.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[key], msg=key)


@every_archetypal
def test_w_dec_is_its_mixture_after_fit_after_steps_and_after_loading(name, tmp_path):
    x = rows(512)
    coder = fitted(name, x, delta=0.3)
    assert is_its_mixture(coder)
    torch.testing.assert_close(coder.W_enc, coder.W_enc[:, 0].norm() * coder.W_dec.t())
    before = {key: value.clone() for key, value in coder.state_dict().items()}
    train_briefly(coder, x, n_steps=5)
    assert is_its_mixture(coder)
    assert coder.relaxation.norm(dim=1).max() > 0.01
    for key in ("mixing", "relaxation", "W_dec"):
        assert not torch.equal(before[key], coder.state_dict()[key])
    assert torch.equal(before["candidates"], coder.candidates)
    save_coder(tmp_path, coder)
    loaded = load_coder(tmp_path)
    assert torch.equal(loaded.W_dec, coder.W_dec)
    assert is_its_mixture(loaded)
    train_briefly(loaded.train(), x, n_steps=2)
    assert is_its_mixture(loaded)
    assert not torch.equal(loaded.mixing, coder.mixing)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "double"])
def test_copies_pass_gradients_on_to_their_own_mixing_once(how):
    coder, x = fitted("archetypal_topk"), rows(32)
    if how == "deepcopy":
        twin = copy.deepcopy(coder)
    elif how == "pickle":
        twin = pickle.load(io.BytesIO(pickle.dumps(coder)))
    else:
        twin = copy.deepcopy(coder).double()
    coder.loss(x).loss.backward()
    assert twin.mixing.grad is None
    twin.loss(x).loss.backward()
    torch.testing.assert_close(twin.mixing.grad.float(), coder.mixing.grad, rtol=1e-4, atol=1e-6)


def test_without_relaxation_directions_lie_in_the_cone_of_the_data():
    x, directions = planted(4096)
    coder = fitted("archetypal_topk", x, d_sae=40, k=3, n_candidates=200, candidates_from="kmeans", delta=0.0)
    train_briefly(coder, x)
    assert mean_max_cosine(directions, coder) > 0.95
    assert coder.relaxation is None
    weights = coder.mixing.softmax(1)
    torch.testing.assert_close(weights.sum(1), torch.ones(40))
    in_hull = weights @ coder.candidates
    torch.testing.assert_close(coder.W_dec, torch.nn.functional.normalize(in_hull, dim=1))


def test_two_seeds_agree_more_than_those_of_an_unconstrained_coder():
    x = rows(4096)  # no sparse structure: an unconstrained dictionary is arbitrary
    agreement = {}
    for make in (ArchetypalTopK, TopK):
        extra = {"n_candidates": 40, "delta": 0.0} if make is ArchetypalTopK else {}
        found = []
        for seed in (0, 1):
            coder = make(d_in=D_IN, d_sae=40, k=4, seed=seed, **extra)
            coder.fit(ActivationStats.of(x), x)
            found.append(train_briefly(coder, x, n_steps=200))
        agreement[make.name] = mean_max_cosine(found[0].W_dec.detach(), found[1])
    assert agreement["archetypal_topk"] > agreement["topk"] + 0.03, agreement


def test_it_trains_revives_and_resumes(tmp_path):
    x = rows(512)
    config = TrainConfig(n_rows=512, lr=1e-2, checkpoint_every=3, dead_window_rows=64)

    def coder():
        return ArchetypalBatchTopK(d_in=D_IN, d_sae=60, k=2, n_candidates=32)

    whole = coder()
    train(whole, TensorSource(x, batch_size=64), tmp_path / "whole", config=config)
    assert is_its_mixture(whole)

    class Killed(Exception):
        pass

    broken = coder()
    plain_loss, calls = broken.loss, []

    def loss(batch):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return plain_loss(batch)

    broken.loss = loss
    with pytest.raises(Killed):
        train(broken, TensorSource(x, batch_size=64), tmp_path / "cut", config=config)
    resumed = coder()
    train(resumed, TensorSource(x, batch_size=64), tmp_path / "cut", config=config)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    assert is_its_mixture(untrained_like(whole, x))


def test_candidates_are_of_the_data():
    x = rows(256)
    sampled = fitted("archetypal_topk", x, candidates_from="subsample")
    y = sampled.normalize(x).y
    assert torch.cdist(sampled.candidates, y).min(1).values.max() < 1e-2  # cdist's own rounding
    centres = fitted("archetypal_topk", x, candidates_from="kmeans").candidates
    assert not torch.allclose(centres, sampled.candidates)
    torch.testing.assert_close(centres.mean(0), y.mean(0), atol=1.0, rtol=0)
    assert not ArchetypalTopK(d_in=D_IN, d_sae=D_SAE, k=2, normalization="none").is_fitted


def test_kmeans_by_a_slow_loop_and_on_plain_clusters():
    y = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    found = kmeans(y, 7, generator=torch.Generator().manual_seed(1), n_iterations=4)
    centres = [y[i] for i in torch.randperm(300, generator=torch.Generator().manual_seed(1))[:7]]
    for _ in range(4):
        members = [[] for _ in centres]
        for row in y:
            members[min(range(7), key=lambda j: (row - centres[j]).norm())].append(row)
        centres = [torch.stack(m).mean(0) if m else c for m, c in zip(members, centres, strict=True)]
    torch.testing.assert_close(found, torch.stack(centres))
    # Twelve rows, of which two are distinct: centres that own nothing stay where they are, nothing is nan.
    two = torch.tensor([[0.0, 0.0], [4.0, 4.0]]).repeat(6, 1)
    assert set(map(tuple, kmeans(two, 5, generator=torch.Generator().manual_seed(0)).tolist())) == {(0, 0), (4, 4)}


def test_mixtures_start_as_one_candidate_each_then_as_pairs():
    weights = initial_mixing(7, 4, seed=0).softmax(1)
    torch.testing.assert_close(weights.sum(1), torch.ones(7))
    own = weights.max(1)
    assert sorted(own.indices[:4].tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(own.values[:4], torch.full((4,), 0.9 + 0.1 / 4))
    assert initial_mixing(3, 1, seed=0).softmax(1).tolist() == [[1], [1], [1]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n_candidates": 0}, "n_candidates must be at least 1, got 0"),
        ({"candidates_from": "grid"}, "one of kmeans, subsample, got 'grid'"),
        ({"delta": -0.1}, "delta must not be negative"),
    ],
)
def test_impossible_settings_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ArchetypalTopK(d_in=3, d_sae=5, k=1, **arguments)


def test_too_few_rows_for_the_candidates_are_named():
    with pytest.raises(ValueError, match="n_candidates=80 cannot be found among the 64 rows"):
        fitted("archetypal_topk", n_candidates=80)


@pytest.mark.parametrize("name", ["archetypal_topk", "archetypal_batch_topk"])
def test_training_starts_below_the_error_of_saying_nothing(name):
    x = rows(512) + 20  # directions made of such rows nearly coincide, and k of them say the same thing k times
    coder = fitted(name, x, normalization="mean_std")
    step = coder.loss(x)
    assert step.loss < step.target.square().sum(1).mean()
