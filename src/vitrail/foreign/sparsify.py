"""sparsify (EleutherAI): cfg.json and sae.safetensors.

    z = TopK_k(ReLU(W (x - b_dec) + b)),    x_hat = z @ W_dec + b_dec

A transcoder subtracts nothing and may add x @ W_skip^T. The hook point is the name of the folder. `groupmax`, one
latent of each of k groups, is another model.
"""

from pathlib import Path

from vitrail.files import read_json, read_tensors
from vitrail.foreign.base import Opened, Peer, Weights, build, exactly, folder_of, positive_int, transcoder

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
TENSORS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def recognises(path: Path) -> bool:
    folder = folder_of(path)
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(path: Path) -> Opened:
    folder = folder_of(path)
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    config = read_json(config_path, "sparsify config")
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} holds no settings by name.")
    if (activation := config.get("activation", "topk")) != "topk":
        raise ValueError(f"{config_path}: the activation is {activation!r}; vitrail's TopK ranks over all latents.")
    if config.get("signed"):
        raise ValueError(f"{config_path}: its latents may be negative (signed); vitrail's are not.")
    tensors = read_tensors(weights_path, "sparsify weights")
    k = positive_int(config.get("k"), "k", config_path)
    has_skip, notes = bool(config.get("skip_connection")), []
    exactly(tensors, (*TENSORS, "W_skip") if has_skip else TENSORS, weights_path)
    encoder = tensors["encoder.weight"]
    weights = Weights(encoder.t(), tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"])
    if config.get("transcode"):
        weights = weights._replace(b_dec=weights.b_dec.new_zeros(encoder.shape[1]))
        W_skip = tensors["W_skip"].t() if has_skip else None
        none = {"normalization": "none", "output_normalization": "none"}
        coder = transcoder("topk_transcoder", weights, tensors["b_dec"], W_skip, k=k, **none)
        notes.append(f"a transcoder: it reads the input of {folder.name} and reconstructs its output")
    elif has_skip:
        raise ValueError(f"{config_path}: an autoencoder with a skip connection copies its input; vitrail has none.")
    else:
        coder = build("topk", weights, subtracts_b_dec=True, k=k)
    return Opened(coder, (config_path, weights_path), config, point=folder.name, notes=notes)


PEER = Peer("sparsify", f"a folder with {CONFIG} and {WEIGHTS}", recognises, read)
