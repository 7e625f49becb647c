"""ViSAEBench 0.1.0: its load_sae, on files with its own names and on files that Overcomplete's layers have written."""

import pytest
import torch
from sameness import D_IN, D_SAE, K, normal, rows
from stand_ins import importing_a_peer

from vitrail.foreign import read_foreign

with importing_a_peer():
    from visaebench.hub import load_sae

NAMES = {
    "its own": ("encoder.weight", "encoder.bias", "decoder.weight"),
    "overcomplete": ("encoder.final_block.0.weight", "encoder.final_block.0.bias", "dictionary._weights"),
}
KINDS = {
    "topk": ({"k": K}, {}),
    "batchtopk": ({"k": K, "threshold": 1.25}, {}),
    "batchtopk, running": ({"k": K}, {"_running_threshold": torch.tensor(1.25)}),
    "jumprelu": ({}, {"jump_thresholds": normal(D_SAE, seed=5).abs().float()}),
}


@pytest.mark.parametrize("config", ["config.json", "config.yaml"])
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint(opened, write, names, kind, config):
    settings, more = KINDS[kind]
    drawn = (normal(D_SAE, D_IN, seed=1), normal(D_SAE, seed=2), normal(D_SAE, D_IN, seed=3))
    state = {name: tensor.float() for name, tensor in zip(NAMES[names], drawn, strict=True)}
    if names == "its own":
        state["decoder.bias"] = normal(D_IN, seed=9).float()
    else:
        state["dictionary.multiplier"] = torch.tensor(0.3)
    folder = write(state | more, {"sae_type": kind.partition(",")[0], **settings}, config)
    theirs, x = load_sae(str(folder), device="cpu"), 2 * rows().float()
    peer, found = read_foreign(folder)
    assert peer.name == "visaebench"
    z, x_hat = theirs(x)
    opened(f"{kind}, names of {names}, {config}", found.coder, x, z, x_hat)
