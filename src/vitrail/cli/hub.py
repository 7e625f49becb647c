"""vitrail hub push | pull"""

from collections.abc import Sequence
from pathlib import Path

import tyro

from vitrail.hub import pull, push


def run(arguments: Sequence[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"push": push_verb, "pull": pull_verb},
        args=arguments,
        prog="vitrail hub",
        description="Publish and fetch coders.",
        config=(tyro.conf.PositionalRequiredArgs,),
    )


def push_verb(
    coder: Path, to: str, table: Path | None = None, private: bool = False, license: str | None = None
) -> None:
    """Publish a coder folder with a model card.

    Args:
        coder: the folder with coder.json and weights.safetensors. Its own README.md is kept, else one is written
        to: hub:OWNER/NAME, hub:OWNER/NAME@REVISION/SUBFOLDER, or file:FOLDER
        table: an eval.jsonl; the coder's row goes on the card (default: the one in its run folder)
        private: of a repository that is new
        license: for the card, "apache-2.0"
    """
    print(push(coder, to, table=table, private=private, license=license))


def pull_verb(address: str, cache: Path | None = None) -> None:
    """Fetch a coder and print its folder.

    Args:
        address: hub:OWNER/NAME, hub:OWNER/NAME@REVISION/SUBFOLDER, or file:FOLDER
        cache: instead of huggingface_hub's own
    """
    print(pull(address, cache=cache))
