"""The `vitrail` command: one verb a file. A verb is imported when it is called, so that help costs nothing."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

# verb -> what it does, in the order in which one would use them
VERBS = {
    "demo": "the main job from start to end, on the built-in world and model",
    "extract": "images through a backbone: activations on disk",
    "train": "a sparse coder on a store",
    "sweep": "a grid of coders over one reading of a store, their table and Pareto front",
    "convert": "a coder of another library, as a vitrail coder",
    "encode": "every stored row into sparse codes",
    "index": "per latent: top images and patches, density, histogram",
    "eval": "Prisma's table of a coder, beside its controls",
    "table": "rows of eval in a paper's layout: Markdown, LaTeX, HTML, CSV",
    "compare": "two families of coders at equal L0",
    "modality": "a coder of images and one of texts, each on both",
    "figures": "the curves of eval, drawn: vector, PNG, and their numbers",
    "check-table": "published or own tables: rows that cannot be, or contradict themselves",
    "recover": "which concepts of a world coders recover, beside controls",
    "name": "names for a coder's latents, each with its evidence",
    "bias": "which latents go with a classifier's answers, and which move them",
    "disentangle": "latents of what a classifier should not lean on, ablated, beside controls",
    "search": "images like an image, of a concept, or of what fires in a box; and why",
    "edit": "concepts set, added, scaled or removed; what the images are near then",
    "steer": "every latent turned up: how far it moves the zero-shot answer, and to which words",
    "repair": "a model with latents edited inside: one module, saved, exported",
    "attack": "wrong words written on pictures: a typographic attack, and its record",
    "defend": "latents to remove against written words, chosen, swept and tested apart",
    "study": "backbones x coders x seeds from one file, resumed cell by cell",
    "report": "one self-contained HTML page of a run folder",
    "hub": "publish and fetch coders: hub push, hub pull",
    "points": "the hook points of a backbone",
    "world": "list, show and make built-in worlds",
    "toy": "list, train, measure and fetch the built-in models",
    "verify": "read every byte of a store and compare checksums",
}

# What a user can get wrong, and the machine: a sentence, not a traceback.
EXPECTED = (ValueError, LookupError, ArithmeticError, ImportError, OSError, RuntimeError, TypeError)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    verb, *rest = arguments
    if verb == "--version":
        from vitrail.provenance import VERSION

        print(f"vitrail {VERSION}")
        return
    if verb not in VERBS:
        sys.exit(f"vitrail: there is no verb {verb!r}. Verbs: {', '.join(VERBS)}.")
    run = import_module(f"vitrail.cli.{verb.replace('-', '_')}").run
    try:
        with warnings_as_sentences(verb):
            run(rest)
    except KeyboardInterrupt:
        sys.exit(f"vitrail {verb}: stopped. Run the same command again to go on where it was.")
    except BrokenPipeError:  # `vitrail ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except EXPECTED as error:
        if os.environ.get("VITRAIL_DEBUG"):
            raise
        told = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"vitrail {verb}: {told}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def warnings_as_sentences(verb: str) -> Iterator[None]:
    """vitrail's own warnings without the line of source that Python prints with them; others' as they are."""
    as_python_does = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], filename: str, *more: Any, **others: Any) -> str:
        if Path(filename).is_relative_to(Path(__file__).parents[1]) and not os.environ.get("VITRAIL_DEBUG"):
            return f"vitrail {verb}: {message}\n"
        return as_python_does(message, category, filename, *more, **others)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = as_python_does


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: vitrail VERB ...      (vitrail VERB --help says more)",
            "",
            *lines,
            "",
            "Every verb can be killed and run again: it goes on where it was. VITRAIL_DEBUG=1 shows tracebacks.",
        ]
    )
