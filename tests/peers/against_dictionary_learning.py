"""dictionary_learning 0.1.0: its trainers' losses, and what its load_dictionary reads."""

import json

import pytest
import torch
from sameness import D_IN, D_SAE, MANY, SINGLE, K, N, Pair, normal, ours, randomise, rows
from stand_ins import importing_a_peer

from vitrail.foreign import read_foreign
from vitrail.training.revive import AuxK, Ghost

with importing_a_peer():
    from dictionary_learning import dictionary, trainers
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary


def trainer_of(kind, width=D_IN, d_sae=D_SAE, **options):
    """In float64, its dictionary drawn at random; the learning rate's schedule plays no part."""
    about = dict(steps=9, activation_dim=width, dict_size=d_sae, layer=0, lm_name="none", device="cpu", warmup_steps=1)
    trainer = kind(**about, **options)
    randomise(trainer.ae.double())
    return trainer


def linear(ae, b_dec="b_dec"):
    return {
        "W_enc": ae.encoder.weight.t(),
        "b_enc": ae.encoder.bias,
        "W_dec": ae.decoder.weight.t(),
        "b_dec": getattr(ae, b_dec),
    }


def step(pair, trainer, x, constant=1.0, **more):
    told = trainer.loss(x, step=0, logging=True)
    x_hat = told.recon if hasattr(told, "recon") else told.x_hat
    return pair.step(x, told.f, x_hat, constant * trainer.loss(x, step=0), **more)


@pytest.mark.usefixtures("either_way")
def test_relu(compared):
    trainer = trainer_of(trainers.StandardTrainer, l1_penalty=0.7, sparsity_warmup_steps=None)
    pair = Pair(ours("relu", l1=0.7), trainer.ae, lambda: linear(trainer.ae, "bias"))
    step(pair, trainer, rows())
    compared(pair)


def test_crosscoder_of_one_source(compared):
    """Anthropic's April update: the penalty weighs latents by their decoder's norm. That is a crosscoder's, of one
    source; this release has no crosscoder of several."""
    trainer = trainer_of(StandardTrainerAprilUpdate, l1_penalty=0.7, sparsity_warmup_steps=None)
    pair = Pair(ours("crosscoder", l1=0.7), trainer.ae, lambda: linear(trainer.ae, "bias"))
    step(pair, trainer, rows())
    compared(pair)


@pytest.mark.parametrize("d_sae", [D_SAE, MANY])
def test_topk(compared, d_sae):
    trainer = trainer_of(trainers.TopKTrainer, d_sae=d_sae, k=K)
    pair = Pair(ours("topk", d_sae=d_sae, k=K), trainer.ae, lambda: linear(trainer.ae))
    step(pair, trainer, rows())
    pair.in_use(rows(), trainer.ae.encode(rows()), trainer.ae(rows()))
    compared(pair)


@pytest.mark.parametrize("d_sae", [D_SAE, MANY])
def test_batch_topk(compared, d_sae):
    trainer = trainer_of(trainers.BatchTopKTrainer, d_sae=d_sae, k=K)
    pair = Pair(ours("batch_topk", d_sae=d_sae, k=K), trainer.ae, lambda: linear(trainer.ae))
    step(pair, trainer, rows())
    for threshold in (1.25, 0.0):
        pair.coder.threshold.fill_(threshold)
        trainer.ae.threshold.fill_(threshold)
        pair.in_use(rows(), trainer.ae.encode(rows()), trainer.ae(rows()))
    compared(pair)


def test_matryoshka_prefix(compared):
    """Its levels' mean, as ours, where its own weights for the levels (1/3 each, beside the mean) are set to 1."""
    fractions = [0.2, 0.25, 0.55]
    trainer = trainer_of(MatryoshkaBatchTopKTrainer, k=K, group_fractions=fractions, group_weights=[1.0] * 3)
    ae = trainer.ae
    coder = ours("matryoshka_prefix", k=K, prefixes=ae.group_sizes.cumsum(0).tolist())
    assert coder.widths == (4, 9, D_SAE)
    pair = Pair(coder, ae, lambda: {name: getattr(ae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")})
    step(pair, trainer, rows())
    compared(pair)


@pytest.mark.usefixtures("either_way")
def test_jump_relu(compared):
    """Without its penalty: it is quadratic in L0 / target, and its gradient is taken at z instead of pre, so that it
    sees only what lies above the thresholds. The encoder does not subtract b_dec."""
    trainer = trainer_of(trainers.JumpReluTrainer, bandwidth=0.5, sparsity_penalty=0.0, sparsity_warmup_steps=None)
    ae = trainer.ae
    with torch.no_grad():
        ae.threshold.copy_(0.5 + normal(D_SAE, seed=5).abs())

    def weights():
        moved = ae.b_enc + ae.b_dec @ ae.W_enc
        threshold = ae.threshold.log()
        return {"W_enc": ae.W_enc, "b_enc": moved, "W_dec": ae.W_dec, "b_dec": ae.b_dec, "log_threshold": threshold}

    pair = Pair(ours("jump_relu", l0_coefficient=0.0, bandwidth=0.5), ae, weights)
    step(pair, trainer, rows())
    pair.in_use(rows(), ae.encode(rows()), ae(rows()))
    compared(pair)


@pytest.mark.usefixtures("either_way")
def test_gated(compared):
    trainer = trainer_of(
        trainers.GatedAnnealTrainer, initial_sparsity_penalty=0.7, sparsity_warmup_steps=None, anneal_start=8
    )
    ae = trainer.ae

    def weights():
        return {
            "W_enc": ae.encoder.weight.t(),
            "b_enc": ae.gate_bias,
            "W_dec": ae.decoder.weight.t(),
            "b_dec": ae.decoder_bias,
            "r_mag": ae.r_mag,
            "b_mag": ae.mag_bias,
        }

    pair = Pair(ours("gated", l1=0.7), ae, weights)
    step(pair, trainer, rows())
    pair.in_use(rows(), ae.encode(rows()), ae(rows()))
    compared(pair)


def test_crosscoders_are_the_peers_on_joined_rows(compared):
    """TopK and BatchTopK of two sources side by side: what vitrail defines them as."""
    for name, kind in (("topk_crosscoder", trainers.TopKTrainer), ("batch_topk_crosscoder", trainers.BatchTopKTrainer)):
        trainer = trainer_of(kind, width=12, k=K)
        pair = Pair(ours(name, d_in=12, widths=[7, 5], k=K), trainer.ae, lambda t=trainer: linear(t.ae))
        step(pair, trainer, rows(12))
        compared(pair)


def with_dead(trainer):
    trainer.num_tokens_since_fired[::2] = trainer.dead_feature_threshold
    return torch.arange(D_SAE) % 2 == 0


def test_auxk(revived):
    """Its share is of the variance of e, ours of its square; both have 1/32. b_dec: ours leaves it to the living.
    The peer's term is float32."""
    trainer, x = trainer_of(trainers.TopKTrainer, k=K), rows()
    pair = Pair(ours("topk", k=K), trainer.ae, lambda: linear(trainer.ae))
    one = pair.coder.loss(x)
    dead = with_dead(trainer)
    _, _, _, acts = trainer.ae.encode(x, return_topk=True)
    e = (x - trainer.ae(x)).detach()
    theirs = trainer.auxk_alpha * trainer.get_auxiliary_loss(e, acts)
    term = AuxK().term(pair.coder, one, dead)
    constant = (e - e.mean(0)).square().sum() / e.square().sum() * (x - x.mean(0)).square().sum() / N
    pair.equal(term, theirs * constant, "term", SINGLE)
    pair.gradients(term, theirs * constant, SINGLE, but=["b_dec"])
    revived("auxk", pair)


def test_ghost(revived):
    """Its ghost forward; it has no loss of it, so the loss on it is Anthropic's."""
    trainer, x = trainer_of(trainers.StandardTrainer, sparsity_warmup_steps=None), rows()
    pair = Pair(ours("relu"), trainer.ae, lambda: linear(trainer.ae, "bias"))
    dead = torch.arange(D_SAE) % 2 == 0
    x_hat, ghosts = trainer.ae(x, ghost_mask=dead)
    e = (x - x_hat).detach()
    ghosts = ghosts * (e.norm(dim=1, keepdim=True) / (2 * ghosts.detach().norm(dim=1, keepdim=True)))
    unscaled = (e - ghosts).square().sum(1).mean()
    theirs = unscaled * (e.square().sum(1).mean() / unscaled.detach())
    one = pair.coder.loss(x)
    term = Ghost().term(pair.coder, one, dead)
    pair.equal(term, theirs, "term")
    pair.gradients(term, theirs, but=["bias"])
    revived("ghost", pair)


KINDS = {
    "AutoEncoder": lambda: dictionary.AutoEncoder(D_IN, D_SAE),
    "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D_IN, D_SAE),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, D_SAE, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [8, 12]),
    "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D_IN, D_SAE),
    "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D_IN, D_SAE),
}


@pytest.mark.parametrize("threshold", [1.25, -1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint(opened, tmp_path, capsys, kind, threshold):
    made = randomise(KINDS[kind]())
    if hasattr(made, "threshold"):
        made.threshold.data.fill_(threshold)
    torch.save(made.state_dict(), tmp_path / "ae.pt")
    told = {"dict_class": kind, "k": K, "submodule_name": "resid_post_layer_3"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": told, "buffer": {}}))
    theirs, _ = load_dictionary(str(tmp_path), "cpu")
    peer, found = read_foreign(tmp_path)
    assert peer.name == "dictionary_learning"
    x = 3 * rows().float()
    z = theirs.encode(x)
    opened(f"{kind}, {threshold}", found.coder, x, z, theirs.decode(z))
