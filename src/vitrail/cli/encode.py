"""vitrail encode"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from vitrail.cli.join import beside_when_encoding
from vitrail.cli.options import pick_device
from vitrail.coders import coder_metadata, load_coder
from vitrail.codes import encode
from vitrail.progress import Terminal
from vitrail.store import Store


def run(arguments: Sequence[str]) -> None:
    tyro.cli(encode_verb, args=arguments, prog="vitrail encode", config=(tyro.conf.PositionalRequiredArgs,))


def encode_verb(
    coder: Path,
    store: Path,
    out: Path,
    point: str | None = None,
    beside: tuple[str, ...] = (),
    tokens: Literal["all", "spatial", "cls", "pooled"] | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    device: str = "auto",
) -> None:
    """Encode every row of a store once; everything after reads the sparse codes.

    Args:
        coder: a coder's folder
        store: a store that `vitrail extract` wrote
        out: the folder for the codes
        point: hook point (default: the one the coder was trained on)
        beside: of a crosscoder: what it reads beside that point, as in `vitrail train` (default: where it was trained)
        tokens: token kind (default: the coder's)
        dtype: of the stored values
    """
    loaded, rows = load_coder(coder, device=pick_device(device)), Store.open(store)
    codes = encode(
        loaded,
        rows,
        out,
        point=point,
        beside=beside_when_encoding(loaded, coder_metadata(coder), rows, beside),
        tokens=tokens,
        dtype=dtype,
        coder_path=coder,
        progress=Terminal(),
    )
    nnz = sum(shard.nnz for shard in codes.manifest.shards)
    n_rows = codes.n_images * codes.n_tokens
    print(f"{out}: {n_rows:,} rows, {nnz / n_rows:.2f} active latents each, of {codes.d_sae:,}")
