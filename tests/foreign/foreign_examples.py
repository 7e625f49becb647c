"""Tiny checkpoints in the peers' layouts, key by key, and the peers' arithmetic in plain loops over Python numbers."""

import dataclasses
import io
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 5, 9, 3


def random_tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def plain() -> dict[str, Tensor]:
    return random_tensors(W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, D_IN), b_dec=(D_IN,))


def rows(n: int = 40) -> Tensor:
    return 2 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1)) + 0.3


# -- slow arithmetic: lists of floats in, lists of floats out


Row = list[float]
Select = Callable[[Row], Row]


def affine(x: Row, W: Tensor, b: Tensor) -> Row:
    """x @ W + b, one number at a time."""
    matrix, bias = W.double().tolist(), b.double().tolist()
    return [bias[j] + sum(x[i] * matrix[i][j] for i in range(len(x))) for j in range(len(bias))]


def relu(pre: Row) -> Row:
    return [max(p, 0.0) for p in pre]


def topk(k: int) -> Select:
    def select(pre: Row) -> Row:
        kept = sorted(range(len(pre)), key=lambda i: -pre[i])[:k]
        return [max(p, 0.0) if i in kept else 0.0 for i, p in enumerate(pre)]

    return select


def above(limits: float | Tensor) -> Select:
    def select(pre: Row) -> Row:
        each = limits.double().tolist() if isinstance(limits, Tensor) else [limits] * len(pre)
        return [p if p > max(t, 0.0) else 0.0 for p, t in zip(pre, each, strict=True)]

    return select


def autoencoder(weights: dict[str, Tensor], select: Select, *, centre: bool, norm: str = "none") -> Any:
    """x -> (z, x_hat), by the peer's conventions."""

    def forward(x: Row) -> tuple[Row, Row]:
        y, undo = normalized(x, norm)
        read = [a - b for a, b in zip(y, weights["b_dec"].double().tolist(), strict=True)] if centre else y
        z = select(affine(read, weights["W_enc"], weights["b_enc"]))
        return z, undo(affine(z, weights["W_dec"], weights["b_dec"]))

    return forward


def normalized(x: Row, norm: str) -> tuple[Row, Callable[[Row], Row]]:
    if norm == "layer_norm":
        mu = sum(x) / len(x)
        sd = math.sqrt(sum((v - mu) ** 2 for v in x) / (len(x) - 1))
        return [(v - mu) / (sd + 1e-5) for v in x], lambda y: [v * sd + mu for v in y]  # the peers' inverse
    if norm == "constant_norm_rescale":
        scale = math.sqrt(len(x)) / math.sqrt(sum(v * v for v in x))
        return [v * scale for v in x], lambda y: [v / scale for v in y]
    return x, lambda y: y


# -- writers


def write_safetensors(folder: Path, name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def write_saelens(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    about = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post", "model_name": "vit"}
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": about} | config
    return write_safetensors(folder, "sae_weights.safetensors", tensors, config)


def write_sparsify(folder: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    tensors = {
        "encoder.weight": weights["W_enc"].t(),
        "encoder.bias": weights["b_enc"],
        **{name: weights[name] for name in ("W_dec", "b_dec", "W_skip") if name in weights},
    }
    settings = {"activation": "topk", "k": K, "num_latents": D_SAE, "transcode": False, "d_in": D_IN} | config
    return write_safetensors(folder / "layers.3.mlp", "sae.safetensors", tensors, settings)


def write_dictionary_learning(folder: Path, kind: str, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    trainer = {"dict_class": kind, "k": K, "submodule_name": "resid_post_layer_3", "layer": 3}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


def of_visaebench(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "encoder.weight": weights["W_enc"].t(),
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"],
    }


def linear(weights: dict[str, Tensor], b_dec: str = "b_dec") -> dict[str, Tensor]:
    """encoder.weight and decoder.weight as of nn.Linear."""
    return {
        "encoder.weight": weights["W_enc"].t(),
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].t(),
        b_dec: weights["b_dec"],
    }


PRISMA = {
    "model_name": "open-clip:laion/CLIP",
    "hook_point_layer": 9,
    "layer_subtype": "hook_resid_post",
    "d_in": D_IN,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "normalize_activations": "layer_norm",
    "architecture": "standard",
    "l1_coefficient": 2e-4,
    "is_transcoder": False,
    "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
}


def write_prisma(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps(PRISMA | config))
    return folder


def write_prisma_legacy(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """One .pt with a pickled dataclass of a module that the reader does not have."""
    module = types.ModuleType("vit_prisma_stand_in.sae.config")
    names = {**PRISMA, "dtype": torch.float32, "device": torch.device("cpu"), **config}
    cls = dataclasses.make_dataclass("VisionModelSAERunnerConfig", list(names))
    cls.__module__ = module.__name__
    module.VisionModelSAERunnerConfig = cls  # pyright: ignore[reportAttributeAccessIssue]
    parents = {name: types.ModuleType(name) for name in ("vit_prisma_stand_in", "vit_prisma_stand_in.sae")}
    sys.modules.update(parents | {module.__name__: module})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"cfg": cls(**names), "state_dict": tensors}, path)
    finally:
        for name in (*parents, module.__name__):
            del sys.modules[name]
    return path


def write_msae(folder: Path, name: str, weights: dict[str, Tensor], mean: Any, factor: Any, **more: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model = {
        "pre_bias": weights["b_dec"],
        "encoder": weights["W_enc"],
        "latent_bias": weights["b_enc"],
        "decoder": weights["W_dec"],
        "latents_activation_frequency": torch.zeros(D_SAE, dtype=torch.int64),
        **more,
    }
    torch.save({"model": model, "mean_center": mean, "scaling_factor": factor, "target_norm": None}, folder / name)
    return folder / name


def write_visaebench(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], *, yaml: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "sae.pt")
    if yaml:
        (folder / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in config.items()))
    else:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_saev(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(header).encode() + b"\n" + buffer.getvalue())
    return path
