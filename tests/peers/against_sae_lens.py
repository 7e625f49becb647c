"""SAELens 6.54.12: its training SAEs' losses, its transcoders, and what it saves. Its hook points are identities here.

Decoder directions have unit norm: there the norms that it multiplies penalties by are 1. Their gradients, which ours
leaves to the projection, are taken from its loss by `without_gradient`.
"""

import pytest
import torch
from sameness import D_IN, D_OUT, D_SAE, SINGLE, K, N, Pair, normal, ours, randomise, rows, unit_
from stand_ins import importing_a_peer
from torch import nn

from vitrail.foreign import read_foreign
from vitrail.training.revive import AUX_WEIGHT, AuxK

with importing_a_peer():
    from sae_lens import saes
    from sae_lens.saes.batchtopk_sae import BatchTopK
    from sae_lens.saes.sae import SAE, SAEMetadata, TrainStepInput
    from sae_lens.saes.topk_sae import TopK

FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")


def peer_of(kind, *, dtype="float64", **options):
    sizes = dict(d_in=D_IN, d_sae=D_SAE, dtype=dtype)
    peer = randomise(getattr(saes, kind)(getattr(saes, f"{kind}Config")(**sizes, **options)))
    if "Transcoder" not in kind:
        unit_(peer.W_dec, 1)
    return peer


def four(peer):
    return {name: getattr(peer, name) for name in FOUR}


def step(peer, x, **coefficients):
    return peer.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients=coefficients, dead_neuron_mask=None, n_training_steps=5, is_logging_step=False
        )
    )


def without_gradient(loss, term):
    """The loss, less what reaches the parameters through `term`."""
    return loss - (term - term.detach())


@pytest.mark.usefixtures("either_way")
def test_relu(compared):
    peer, x = peer_of("StandardTrainingSAE"), rows()
    pair = Pair(ours("relu", l1=0.7), peer, lambda: four(peer))
    out = step(peer, x, l1=0.7)
    by_norms = 0.7 * (out.feature_acts.detach() * peer.W_dec.norm(dim=1)).sum(1).mean()
    pair.step(x, out.feature_acts, out.sae_out, without_gradient(out.loss, by_norms))
    pair.in_use(x, peer.encode(x), peer(x))
    compared(pair)


def test_crosscoder_of_one_source(compared):
    """The penalty by free decoder norms is a crosscoder's, of one source; SAELens has none of several."""
    peer, x = randomise(peer_of("StandardTrainingSAE")), rows()
    pair = Pair(ours("crosscoder", l1=0.7), peer, lambda: four(peer))
    out = step(peer, x, l1=0.7)
    pair.step(x, out.feature_acts, out.sae_out, out.loss)
    compared(pair)


@pytest.mark.parametrize(("name", "kind"), [("topk", "TopKTrainingSAE"), ("batch_topk", "BatchTopKTrainingSAE")])
def test_topk_and_batch_topk(compared, name, kind):
    peer, x = peer_of(kind, k=K, rescale_acts_by_decoder_norm=False), rows()
    pair = Pair(ours(name, k=K), peer, lambda: four(peer))
    out = step(peer, x)
    pair.step(x, out.feature_acts, out.sae_out, out.loss)
    if name == "topk":
        pair.in_use(x, peer.encode(x), peer(x))
    compared(pair)


def test_matryoshka_prefix(compared):
    """Its loss is the levels' sum, ours their mean."""
    widths = [4, 9, D_SAE]
    peer = peer_of(
        "MatryoshkaBatchTopKTrainingSAE", k=K, rescale_acts_by_decoder_norm=False, matryoshka_widths=list(widths)
    )
    x = rows()
    pair = Pair(ours("matryoshka_prefix", k=K, prefixes=widths), peer, lambda: four(peer))
    out = step(peer, x)
    pair.step(x, out.feature_acts, out.sae_out, out.loss / len(widths))
    compared(pair)


@pytest.mark.usefixtures("either_way")
def test_jump_relu(compared):
    """DeepMind's mode, "step"; thresholds are float32 and no logarithms there."""
    peer, x = peer_of("JumpReLUTrainingSAE", jumprelu_bandwidth=0.5), rows()
    with torch.no_grad():
        peer.threshold.copy_(0.5 + normal(D_SAE, seed=5).abs())
    coder = ours("jump_relu", l0_coefficient=0.5, bandwidth=0.5)
    pair = Pair(coder, peer, lambda: four(peer) | {"log_threshold": peer.threshold.double().log()})
    out = step(peer, x, l0=0.5)
    pair.step(x, out.feature_acts, out.sae_out, out.loss, SINGLE)
    pair.in_use(x, peer.encode(x), peer(x))
    compared(pair)


@pytest.mark.usefixtures("either_way")
def test_gated(compared):
    """Its auxiliary reconstruction teaches W_dec and b_dec too; the paper's and ours must not."""
    peer, x = peer_of("GatedTrainingSAE"), rows()

    def weights():
        names = {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}
        return {name: getattr(peer, name) for name in ("W_enc", "W_dec", "b_dec")} | {
            name: getattr(peer, there) for name, there in names.items()
        }

    pair = Pair(ours("gated", l1=0.7), peer, weights)
    out = step(peer, x, l1=0.7)
    gate = ((x - peer.b_dec) @ peer.W_enc + peer.b_gate).relu().detach()
    by_norms = 0.7 * (gate * peer.W_dec.norm(dim=1)).sum(1).mean()
    by_decoder = (gate @ peer.W_dec + peer.b_dec - x).square().sum(1).mean()
    pair.step(x, out.feature_acts, out.sae_out, without_gradient(out.loss, by_norms + by_decoder))
    pair.in_use(x, peer.encode(x), peer(x))
    compared(pair)


def test_matching_pursuit(compared):
    """With none of its two further ways to end a row."""
    options = dict(residual_threshold=0.0, max_iterations=K, stop_on_duplicate_support=False, decoder_init_norm=1.0)
    peer, x = peer_of("MatchingPursuitTrainingSAE", **options), rows()
    coder = ours("matching_pursuit", k=K)
    pair = Pair(coder, peer, lambda: {"W_dec": peer.W_dec, "b_dec": peer.b_dec}, without=["b_enc"])
    out = step(peer, x)
    pair.step(x, out.feature_acts, out.sae_out, out.loss)
    pair.in_use(x, peer.encode(x), peer(x))
    compared(pair)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["relu_transcoder", "topk_transcoder", "batch_topk_transcoder"])
def test_transcoders(compared, name, skip):
    """Its transcoders have no loss of their own, so theirs is the squared error of their output, and no TopK; here with
    its TopK and BatchTopK as activation. Their only bias is the output's."""
    peer = peer_of("SkipTranscoder" if skip else "Transcoder", d_out=D_OUT, apply_b_dec_to_input=False)
    peer.activation_fn = {"relu": nn.ReLU(), "topk": TopK(K), "batch_topk": BatchTopK(K)}[
        name.removesuffix("_transcoder")
    ]
    x, y = rows(), normal(N, D_OUT, seed=3)
    by_skip = x @ peer.W_skip.t() if skip else 0.0

    def weights():
        return (
            {name: getattr(peer, name) for name in ("W_enc", "b_enc", "W_dec")}
            | {"b_out": peer.b_dec}
            | ({"W_skip": peer.W_skip.t()} if skip else {})
        )

    options = {"l1": 0.0} if name == "relu_transcoder" else {"k": K}
    coder = ours(name, d_out=D_OUT, skip=skip, output_normalization="none", **options)
    pair = Pair(coder, peer, weights, without=["b_dec"])
    z, x_hat = peer.encode(x), peer(x)
    pair.step(torch.cat([x, y], 1), z, x_hat - by_skip, (y - x_hat).square().sum(1).mean())
    if name != "batch_topk_transcoder":
        pair.in_use(x, z, x_hat)
    compared(pair)


def test_auxk(revived):
    """It measures e_hat against nothing, ours against e. It has no ReLU on the dead latents that it picks: here all of
    them are positive."""
    peer, x = peer_of("TopKTrainingSAE", k=K, rescale_acts_by_decoder_norm=False), rows()
    dead = torch.arange(D_SAE) % 2 == 0
    with torch.no_grad():
        peer.b_enc[dead] = 9.0
        peer.b_enc[~dead] = 20.0  # or the dead would be those that fire
    pair = Pair(ours("topk", k=K), peer, lambda: four(peer))
    one = pair.coder.loss(x)
    z, pre = peer.encode_with_hidden_pre(x)
    assert bool((pre[:, dead] > 0).all())
    assert not bool(z[:, dead].any())
    x_hat = peer.decode(z)
    e = (x - x_hat).detach()
    constant = AUX_WEIGHT * (x - x.mean(0)).square().sum() / e.square().sum()
    theirs = constant * peer.calculate_topk_aux_loss(x, x_hat, pre, dead)
    term = AuxK().term(pair.coder, one, dead)
    pair.equal(term, theirs, "term")
    pair.gradients(term, theirs, but=["b_dec"])
    revived("auxk", pair)


INFERENCE = {
    "standard": ("StandardSAE", {}),
    "standard, not centred": ("StandardSAE", {"apply_b_dec_to_input": False}),
    "standard, layer_norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "standard, constant_norm_rescale": ("StandardSAE", {"normalize_activations": "constant_norm_rescale"}),
    "topk": ("TopKSAE", {"k": K}),
    "topk by decoder norms": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "gated, not centred": ("GatedSAE", {"apply_b_dec_to_input": False}),
    "transcoder": ("Transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "skip_transcoder": ("SkipTranscoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
}


@pytest.mark.parametrize("kind", INFERENCE)
def test_a_checkpoint(opened, tmp_path, kind):
    name, options = INFERENCE[kind]
    about = SAEMetadata(hook_name="blocks.3.hook_resid_post", model_name="none")
    randomise(peer_of(name, dtype="float32", metadata=about, **options)).save_model(tmp_path)
    theirs, x = SAE.load_from_disk(tmp_path), 3 * rows().float()
    peer, found = read_foreign(tmp_path)
    assert (peer.name, found.point) == ("saelens", "blocks.3.hook_resid_post")
    # The inverse of its layer_norm multiplies by sd where it divided by sd + 1e-5: docs/foreign.md.
    tolerance = dict(rtol=1e-4, atol=1e-4) if "layer_norm" in kind else SINGLE
    opened(kind, found.coder, x, theirs.encode(x), theirs(x), tolerance)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", ["BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"])
def test_a_checkpoint_of_training(opened, tmp_path, kind, rescale):
    """What it would save for use is a JumpReLU; ours keeps what was trained. Both files open."""
    widths = {"matryoshka_widths": [8, D_SAE]} if kind.startswith("Matryoshka") else {}
    training = randomise(peer_of(kind, dtype="float32", k=K, rescale_acts_by_decoder_norm=rescale, **widths))
    training.topk_threshold.fill_(1.25)
    training.save_model(tmp_path / "training")
    training.save_inference_model(tmp_path / "use")
    theirs, x = SAE.load_from_disk(tmp_path / "use"), 3 * rows().float()
    for folder in ("training", "use"):
        coder = read_foreign(tmp_path / folder)[1].coder
        opened(f"{kind}, {folder}, {rescale}", coder, x, theirs.encode(x), theirs(x))
