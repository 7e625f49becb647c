"""vitrail verify"""

from collections.abc import Sequence
from pathlib import Path

import tyro

from vitrail.store import Store


def run(arguments: Sequence[str]) -> None:
    tyro.cli(verify_verb, args=arguments, prog="vitrail verify", config=(tyro.conf.PositionalRequiredArgs,))


def verify_verb(store: Path) -> None:
    """Read every byte of a store and compare it with the manifest's checksums.

    Args:
        store: a store that `vitrail extract` wrote
    """
    opened = Store.open(store)
    opened.verify()
    n_bytes = sum(sum(shard.bytes.values()) for shard in opened.manifest.shards)
    print(f"{store}: {len(opened.manifest.shards)} shards, {n_bytes / 1e6:.1f} MB, every checksum is right")
