"""Every peer's file opens, and gives the codes and reconstructions of the peer's own arithmetic, done slowly."""

import math

import pytest
import torch
from foreign_examples import (
    D_IN,
    D_SAE,
    K,
    above,
    affine,
    autoencoder,
    linear,
    of_visaebench,
    plain,
    random_tensors,
    relu,
    rows,
    topk,
    write_dictionary_learning,
    write_msae,
    write_prisma,
    write_prisma_legacy,
    write_saelens,
    write_saev,
    write_sparsify,
    write_visaebench,
)

from vitrail.foreign import open_foreign, read_foreign
from vitrail.statistics import ActivationStats


def agrees(coder, forward, *, inverse_is_off=False):
    """Codes and reconstructions equal the slow ones. `inverse_is_off`: by 1e-5/sd, the peers' layer_norm."""
    x = rows()
    slow = [forward(row) for row in x.double().tolist()]
    z, x_hat = (torch.tensor([pair[side] for pair in slow], dtype=torch.float64) for side in (0, 1))
    assert 0 < int((z > 0).sum()) < z.numel()
    torch.testing.assert_close(coder.encode(x).double(), z, rtol=1e-5, atol=2e-5)
    off = 1e-4 if inverse_is_off else 0.0
    torch.testing.assert_close(coder(x).double(), x_hat, rtol=1e-5, atol=1e-4 + off)


# -- SAELens


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("centre", [True, False])
def test_saelens_standard(tmp_path, norm, centre):
    weights = plain()
    config = {"architecture": "standard", "apply_b_dec_to_input": centre, "normalize_activations": norm}
    peer, opened = read_foreign(write_saelens(tmp_path, weights, **config))
    assert peer.name == "saelens"
    assert opened.point == "blocks.3.hook_resid_post"
    agrees(opened.coder, autoencoder(weights, relu, centre=centre, norm=norm), inverse_is_off=norm == "layer_norm")


@pytest.mark.parametrize("rescale", [True, False])
def test_saelens_topk_with_latents_in_decoder_norms(tmp_path, rescale):
    weights = plain()
    config = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": True}
    coder = open_foreign(write_saelens(tmp_path, weights, **config))
    norms = weights["W_dec"].double().norm(dim=1)

    def forward(x):
        centred = [a - b for a, b in zip(x, weights["b_dec"].double().tolist(), strict=True)]
        pre = affine(centred, weights["W_enc"], weights["b_enc"])
        scaled = [p * n for p, n in zip(pre, norms.tolist(), strict=True)] if rescale else pre
        z = topk(K)(scaled)
        codes = [a / n for a, n in zip(z, norms.tolist(), strict=True)] if rescale else z
        return z, affine(codes, weights["W_dec"], weights["b_dec"])

    agrees(coder, forward)


def test_saelens_jumprelu_has_a_threshold_for_each_latent(tmp_path):
    weights = plain()
    limits = torch.linspace(-1, 3, D_SAE)  # below zero the ReLU decides
    config = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    coder = open_foreign(write_saelens(tmp_path, {**weights, "threshold": limits}, **config))
    agrees(coder, autoencoder(weights, above(limits), centre=False))


@pytest.mark.parametrize("centre", [True, False])
def test_saelens_gated(tmp_path, centre):
    gate = random_tensors(b_gate=(D_SAE,), r_mag=(D_SAE,), b_mag=(D_SAE,))
    weights = plain()
    tensors = {name: weights[name] for name in ("W_enc", "W_dec", "b_dec")} | gate
    coder = open_foreign(write_saelens(tmp_path, tensors, architecture="gated", apply_b_dec_to_input=centre))
    agrees(coder, gated_forward(weights, gate, centre))


def gated_forward(weights, gate, centre):
    def forward(x):
        b_dec = weights["b_dec"].double().tolist()
        read = [a - b for a, b in zip(x, b_dec, strict=True)] if centre else x
        opened = affine(read, weights["W_enc"], gate["b_gate"])
        magnitude = affine(read, weights["W_enc"].double() * gate["r_mag"].double().exp(), gate["b_mag"])
        z = [max(m, 0.0) if g > 0 else 0.0 for g, m in zip(opened, magnitude, strict=True)]
        return z, affine(z, weights["W_dec"], weights["b_dec"])

    return forward


def test_saelens_batchtopk_in_training_has_one_threshold(tmp_path):
    weights = plain()
    tensors = {**weights, "topk_threshold": torch.tensor(1.5)}
    coder = open_foreign(write_saelens(tmp_path, tensors, architecture="batchtopk", k=3.0, apply_b_dec_to_input=True))
    assert (coder.name, coder.config["k"]) == ("batch_topk", 3)
    agrees(coder, autoencoder(weights, above(1.5), centre=True))


@pytest.mark.parametrize("skip", [True, False])
def test_saelens_transcoder(tmp_path, skip):
    t = random_tensors(W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, 4), b_dec=(4,), W_skip=(4, D_IN))
    tensors = {name: tensor for name, tensor in t.items() if skip or name != "W_skip"}
    config = {"architecture": "skip_transcoder" if skip else "transcoder", "d_out": 4, "apply_b_dec_to_input": False}

    def forward(x):
        z = relu(affine(x, t["W_enc"], t["b_enc"]))
        out = affine(z, t["W_dec"], t["b_dec"])
        more = affine(x, t["W_skip"].t(), torch.zeros(4)) if skip else [0.0] * 4
        return z, [a + b for a, b in zip(out, more, strict=True)]

    agrees(open_foreign(write_saelens(tmp_path, tensors, **config)), forward)


def test_saelens_before_version_6(tmp_path):
    weights = plain()
    old = {"metadata": None, "hook_point": "blocks.3.attn.hook_z", "activation_fn_str": "topk"}
    old |= {"activation_fn_kwargs": {"k": K}, "normalize_activations": False}
    tensors = {**weights, "scaling_factor": torch.ones(D_SAE)}
    opened = read_foreign(write_saelens(tmp_path, tensors, **old))[1]
    assert opened.point == "blocks.3.attn.hook_z"
    assert "hook_z" in opened.notes[0]
    agrees(opened.coder, autoencoder(weights, topk(K), centre=True))


# -- dictionary_learning


def test_dictionary_learning_autoencoder_measures_latents_along_unit_directions(tmp_path):
    weights = plain()
    path = write_dictionary_learning(tmp_path, "AutoEncoder", linear(weights, "bias"))
    forward = autoencoder(weights, relu, centre=True)
    norms = weights["W_dec"].double().norm(dim=1).tolist()

    def normalised(x):
        z, x_hat = forward(x)
        return [a * n for a, n in zip(z, norms, strict=True)], x_hat

    agrees(open_foreign(path), normalised)


@pytest.mark.parametrize("kind", ["AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "BatchTopKSAE untrained"])
def test_dictionary_learning_linear(tmp_path, kind):
    weights = plain()
    limit = -1.0 if "untrained" in kind else 1.5
    buffers = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(limit)}
    more = {} if kind == "AutoEncoderNew" else buffers
    names = linear(weights, "decoder.bias" if kind == "AutoEncoderNew" else "b_dec")
    coder = open_foreign(write_dictionary_learning(tmp_path, kind.split()[0], {**names, **more}))
    select = {"AutoEncoderNew": relu, "AutoEncoderTopK": topk(K), "BatchTopKSAE": above(limit)}[kind.split()[0]]
    agrees(coder, autoencoder(weights, select, centre=kind != "AutoEncoderNew"))


def test_dictionary_learning_matryoshka_keeps_its_prefixes(tmp_path):
    weights = plain()
    more = {"k": torch.tensor(K), "threshold": torch.tensor(1.5), "group_sizes": torch.tensor([4, 5])}
    coder = open_foreign(write_dictionary_learning(tmp_path, "MatryoshkaBatchTopKSAE", {**weights, **more}))
    assert (coder.name, coder.config["prefixes"]) == ("matryoshka_prefix", [4, 9])
    agrees(coder, autoencoder(weights, above(1.5), centre=True))


def test_dictionary_learning_jumprelu_and_gated(tmp_path):
    weights = plain()
    limits = torch.linspace(0.1, 3, D_SAE)
    path = write_dictionary_learning(tmp_path / "jump", "JumpReluAutoEncoder", {**weights, "threshold": limits})
    agrees(open_foreign(path), autoencoder(weights, above(limits), centre=False))
    gate = random_tensors(b_gate=(D_SAE,), r_mag=(D_SAE,), b_mag=(D_SAE,))
    names = linear(weights, "decoder_bias") | {"gate_bias": gate["b_gate"], "mag_bias": gate["b_mag"]}
    names["r_mag"] = gate["r_mag"]
    del names["encoder.bias"]
    path = write_dictionary_learning(tmp_path / "gated", "GatedAutoEncoder", names)
    agrees(open_foreign(path), gated_forward(weights, gate, centre=True))


# -- sparsify


def test_sparsify(tmp_path):
    weights = plain()
    path = write_sparsify(tmp_path, weights)
    peer, opened = read_foreign(path)
    assert (peer.name, opened.point) == ("sparsify", "layers.3.mlp")
    agrees(opened.coder, autoencoder(weights, topk(K), centre=True))
    agrees(open_foreign(path / "sae.safetensors"), autoencoder(weights, topk(K), centre=True))


@pytest.mark.parametrize("skip", [True, False])
def test_sparsify_transcoder(tmp_path, skip):
    weights = plain() | (random_tensors(W_skip=(D_IN, D_IN)) if skip else {})
    coder = open_foreign(write_sparsify(tmp_path, weights, transcode=True, skip_connection=skip))

    def forward(x):
        z, out = autoencoder(weights, topk(K), centre=False)(x)
        more = affine(x, weights["W_skip"].t(), torch.zeros(D_IN)) if skip else [0.0] * D_IN
        return z, [a + b for a, b in zip(out, more, strict=True)]

    agrees(coder, forward)


# -- Prisma


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale", "none"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_prisma(tmp_path, norm, legacy, activation):
    weights = plain()
    options = {"k": K} if activation == "topk" else {}
    config = {"normalize_activations": norm, "activation_fn_str": activation, "activation_fn_kwargs": options}
    if legacy:
        path = write_prisma_legacy(tmp_path / "sae.pt", weights, **config)
    else:
        path = write_prisma(tmp_path, weights, **config)
    peer, opened = read_foreign(path)
    assert (peer.name, opened.point) == ("prisma", "blocks.9.hook_resid_post")
    select = topk(K) if activation == "topk" else relu
    agrees(opened.coder, autoencoder(weights, select, centre=True, norm=norm), inverse_is_off=norm == "layer_norm")


def test_prisma_gated(tmp_path):
    weights, gate = plain(), random_tensors(b_gate=(D_SAE,), r_mag=(D_SAE,), b_mag=(D_SAE,))
    path = write_prisma(tmp_path, {**weights, **gate}, architecture="gated", normalize_activations="none")
    agrees(open_foreign(path), gated_forward(weights, gate, centre=True))


def test_prisma_transcoder_ends_in_the_input_rows_numbers(tmp_path):
    t = plain() | random_tensors(b_dec_out=(4,))
    t["W_dec"] = random_tensors(W=(D_SAE, 4))["W"]
    coder = open_foreign(write_prisma(tmp_path, t, is_transcoder=True, d_out=4))

    def forward(x):
        mu = sum(x) / len(x)
        sd = math.sqrt(sum((v - mu) ** 2 for v in x) / (len(x) - 1))
        y = [(v - mu) / (sd + 1e-5) for v in x]
        z = relu(affine([a - b for a, b in zip(y, t["b_dec"].tolist(), strict=True)], t["W_enc"], t["b_enc"]))
        return z, [v * sd + mu for v in affine(z, t["W_dec"], t["b_dec_out"])]

    agrees(coder, forward, inverse_is_off=True)


# -- MSAE


@pytest.mark.parametrize(
    ("said", "architecture", "cap"),
    [
        ("ReLU_003", "relu", 0.0),
        ("TopKReLU_3", "topk", 0.0),
        ("BatchTopKReLU_3", "relu", 0.0),
        ("TopKReLU_3_RW", "matryoshka", 0.0),
        ("TopKReLU_3_UW", "matryoshka", 2.0),
        ("TopKReLU_3", "matryoshka", 2.0),
        ("ReLU_003", "matryoshka", 2.0),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_msae_uses_every_positive_latent_of_centred_scaled_rows(tmp_path, said, architecture, cap, tied):
    weights, mean, factor = plain(), torch.linspace(-1, 1, D_IN), 0.4
    name = f"{D_SAE}_{D_IN}_{said}_{tied}_False_{cap}_cc3m_ViT-L~14_train_image_2905936_{D_IN}.pth"
    path = write_msae(tmp_path, name, weights, mean, factor)
    if tied:
        content = torch.load(path)
        del content["model"]["decoder"]
        torch.save(content, path)
        weights["W_dec"] = weights["W_enc"].t()
    peer, opened = read_foreign(path)
    assert (peer.name, opened.coder.name) == ("msae", architecture)
    capped = (lambda pre: [cap * math.tanh(max(p, 0.0) / cap) for p in pre]) if cap else relu
    in_normalised_space = autoencoder(weights, capped, centre=True)

    def forward(x):
        z, y_hat = in_normalised_space([(v - m) * factor for v, m in zip(x, mean.tolist(), strict=True)])
        return z, [v / factor + m for v, m in zip(y_hat, mean.tolist(), strict=True)]

    agrees(opened.coder, forward)
    if "RW" in said:
        assert (opened.coder.config["ks"], opened.coder.config["weighting"]) == ([3, 6, 9], "reverse")


def test_msae_numbers_may_be_numpys(tmp_path):
    mean = torch.zeros(D_IN).numpy()
    name = f"{D_SAE}_{D_IN}_ReLU_003_False_False_0.0_x.pth"
    coder = open_foreign(write_msae(tmp_path, name, plain(), mean, mean.dtype.type(0.5)))
    assert float(coder.state_dict()["normalize.scale"]) == 2.0


# -- ViSAEBench and Overcomplete


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("yaml", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_visaebench(tmp_path, kind, yaml, bias):
    weights, limits = plain(), torch.linspace(0.1, 3, D_SAE)
    tensors = of_visaebench(weights)
    tensors |= {"decoder.bias": weights["b_dec"]} if bias else {}
    tensors |= {"jump_thresholds": limits} if kind == "jumprelu" else {}
    if not bias:
        weights["b_dec"] = torch.zeros(D_IN)
    path = write_visaebench(tmp_path, tensors, {"sae_type": kind, "k": K, "threshold": 1.5}, yaml=yaml)
    peer, opened = read_foreign(path)
    assert peer.name == "visaebench"
    select = {"topk": topk(K), "batchtopk": above(1.5), "jumprelu": above(limits)}[kind]
    agrees(opened.coder, autoencoder(weights, select, centre=False))


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_overcompletes_own_reading_differs(tmp_path, kind):
    weights, logs = plain(), torch.linspace(-1, 1, D_SAE)
    tensors = {
        "encoder.final_block.0.weight": weights["W_enc"].t(),
        "encoder.final_block.0.bias": weights["b_enc"],
        "dictionary._weights": weights["W_dec"],
        "dictionary.multiplier": torch.tensor(0.3),
    } | ({"thresholds": logs} if kind == "jumprelu" else {})
    path = write_visaebench(tmp_path, tensors, {"activation": kind, "k": K, "threshold": 1.5})
    select = {"topk": topk(K), "batchtopk": above(1.5), "jumprelu": above(logs.exp())}[kind]
    stored = {**weights, "W_dec": weights["W_dec"] * math.exp(0.3), "b_dec": torch.zeros(D_IN)}
    if kind != "jumprelu":
        agrees(open_foreign(path), autoencoder(stored, select, centre=False))
    unit = stored["W_dec"] / weights["W_dec"].norm(dim=1, keepdim=True)
    agrees(open_foreign(path, "overcomplete"), autoencoder({**stored, "W_dec": unit}, select, centre=False))


def test_a_code_at_the_threshold_fires_as_in_visaebench(tmp_path):
    # One latent reads x_0: pre-activations 1.5 and the next number below it. z >= 1.5 keeps the first only.
    weights = {
        "encoder.weight": torch.tensor([[1.0]]),
        "encoder.bias": torch.zeros(1),
        "decoder.weight": torch.ones(1, 1),
    }
    coder = open_foreign(write_visaebench(tmp_path, weights, {"sae_type": "batchtopk", "k": 1, "threshold": 1.5}))
    below = torch.nextafter(torch.tensor(1.5), torch.tensor(0.0))
    assert coder.encode(torch.tensor([[1.5], [float(below)]])).flatten().tolist() == [1.5, 0.0]


def test_statistics_make_it_a_coder_of_raw_activations(tmp_path):
    weights = plain()
    tensors = of_visaebench(weights)
    path = write_visaebench(tmp_path, tensors, {"sae_type": "topk", "k": K})
    stats = ActivationStats.of(rows() * 3 + 1)
    raw, normalised = open_foreign(path, stats=stats), open_foreign(path)
    y = (rows().double() - stats.mean) / stats.scalar_std
    torch.testing.assert_close(raw.encode(rows()), normalised.encode(y.float()), rtol=1e-5, atol=1e-5)
    expected = normalised(y.float()).double() * stats.scalar_std + stats.mean
    torch.testing.assert_close(raw(rows()).double(), expected, rtol=1e-5, atol=1e-4)


# -- saev


def test_saev_released_files_subtract_b_dec_and_later_ones_do_not(tmp_path):
    weights = plain()
    released = write_saev(tmp_path / "a/sae.pt", weights, {"d_vit": D_IN, "exp_factor": 2, "sparsity_coeff": 4e-4})
    peer, opened = read_foreign(released.parent)
    assert (peer.name, opened.outside) == ("saev", "mean_norm")
    agrees(opened.coder, autoencoder(weights, relu, centre=True))
    relu_config = {"cls": "Relu", "params": {}}
    header = {
        "schema": 5,
        "cfg": {"d_model": D_IN, "d_sae": D_SAE, "activation": relu_config},
        "commit": "x",
        "lib": "0.2",
    }
    later = write_saev(tmp_path / "b/sae.pt", weights, header)
    agrees(open_foreign(later), autoencoder(weights, relu, centre=False))


@pytest.mark.parametrize("limit", [1.5, 0.0])
def test_saev_batchtopk(tmp_path, limit):
    weights = plain()
    config = {"cls": "BatchTopK", "params": {"top_k": K, "momentum": 0.1}}
    header = {"schema": 5, "cfg": {"d_model": D_IN, "d_sae": D_SAE, "activation": config}, "commit": "x", "lib": "0.2"}
    path = write_saev(tmp_path / "sae.pt", {**weights, "activation.threshold": torch.tensor(limit)}, header)
    agrees(open_foreign(path), autoencoder(weights, above(limit), centre=False))
