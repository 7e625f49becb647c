"""The table of peers, and how their files are opened and converted. A new one is its file and its entry here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitrail.coders.base import SparseCoder
from vitrail.coders.checkpoint import coder_metadata, save_coder
from vitrail.coders.table import make_coder
from vitrail.files import file_digest
from vitrail.foreign import dictionary_learning, msae, prisma, saelens, saev, sparsify, visaebench
from vitrail.foreign.base import Opened, Peer
from vitrail.foreign.pickles import attributes
from vitrail.statistics import ActivationStats

# In the order in which they are tried: the most particular file names first.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        saelens.PEER,
        sparsify.PEER,
        dictionary_learning.PEER,
        msae.PEER,
        saev.PEER,
        visaebench.PEER,
        visaebench.OVERCOMPLETE,
        prisma.PEER,
    )
}


def open_foreign(path: Path | str, peer: str | None = None, *, stats: ActivationStats | None = None) -> SparseCoder:
    """A coder that another library saved, as one of ours: the same codes and reconstructions. Runs none of its code.

    `stats`: of the training activations, for peers that normalise before the coder and keep the numbers elsewhere
    (visaebench, overcomplete). Without them such a coder takes normalised rows. Raises ValueError, naming what is
    missing, where ours would not give its authors' numbers.
    """
    return read_foreign(path, peer, stats=stats)[1].coder


def read_foreign(
    path: Path | str, peer: str | None = None, *, stats: ActivationStats | None = None
) -> tuple[Peer, Opened]:
    """The same with the format that was found, the peer's settings and notes."""
    path = Path(path)
    found = recognise(path) if peer is None else _named(peer)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: there is no checkpoint here.")
    opened = found.read(path)
    if stats is not None:
        if opened.outside is None:
            raise ValueError(f"a {found.name} file says how its activations are normalised, so it takes no statistics.")
        normalize_inside(opened, stats)
    return found, opened


def convert(
    path: Path | str,
    out: Path | str,
    peer: str | None = None,
    *,
    stats: ActivationStats | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Opened:
    """Write it as a vitrail coder. `metadata`: of what it is for, as `save_coder` takes it; the origin is added."""
    found, opened = read_foreign(path, peer, stats=stats)
    save_opened(found, opened, Path(out), metadata)
    return opened


def save_opened(peer: Peer, opened: Opened, out: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError if `out` holds a coder of another origin."""
    origin = {
        "peer": peer.name,
        "layout": peer.layout,
        "sha256": {file.name: file_digest(file) for file in opened.files},
        "config": attributes(opened.config),
        "notes": opened.notes,
    }
    if (out / "coder.json").is_file():
        there = coder_metadata(out).get("origin") or {}
        if there.get("sha256") != origin["sha256"]:
            raise ValueError(f"{out} already holds another coder. Remove it, or choose another folder.")
    of_peer = {} if opened.point is None else {"point": opened.point}
    save_coder(out, opened.coder, {**of_peer, **(metadata or {}), "origin": origin})


def normalize_inside(opened: Opened, stats: ActivationStats) -> None:
    """Make it a coder of raw activations: what the peer does before its coder becomes the coder's normalisation."""
    assert opened.outside is not None
    old = opened.coder
    if stats.mean.shape != (old.d_in,):
        raise ValueError(f"the statistics are of {len(stats.mean)} dimensions; this coder has d_in={old.d_in}.")
    coder = make_coder(old.name, **{**old.config, "normalization": opened.outside}).to(old.W_dec.dtype)
    state = coder.state_dict()
    with torch.no_grad():
        for name, tensor in old.state_dict().items():
            state[name].copy_(tensor)
    coder.normalize.fit(stats)
    coder.calibration = old.calibration
    opened.coder, opened.notes = coder.eval(), [f"raw activations are normalised inside ({opened.outside})"]


def recognise(path: Path) -> Peer:
    """The first format in the table that these files have."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: there is no checkpoint here.")
    if (path / "coder.json").is_file():
        raise ValueError(f"{path} is a vitrail coder already: load_coder opens it.")
    for peer in PEERS.values():
        if peer.recognises(path):
            return peer
    layouts = "; ".join(f"{peer.name}: {peer.layout}" for peer in PEERS.values())
    raise ValueError(f"{path} is in none of the formats that vitrail knows ({layouts}).")


def _named(peer: str) -> Peer:
    if peer not in PEERS:
        raise ValueError(f"there is no peer {peer!r}. Known: {', '.join(PEERS)}.")
    return PEERS[peer]
