"""vitrail name"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vitrail.cli.opened import open_coder_and_backbone
from vitrail.cli.options import pick_device, pick_workers
from vitrail.concepts.study import NamingOptions, name_latents
from vitrail.concepts.vocabulary import read_words
from vitrail.images import open_images
from vitrail.metrics.truth import Pool
from vitrail.progress import Terminal

Method = Literal["decoder_text", "top_images", "effect", "captions", "labels"]


def run(arguments: Sequence[str]) -> None:
    tyro.cli(name_verb, args=arguments, prog="vitrail name")


def name_verb(
    coder: Annotated[Path, tyro.conf.Positional],
    images: str,
    out: Path,
    words: str = "everyday",
    templates: tuple[str, ...] = ("a photo of a {}.",),
    method: tuple[Method, ...] = (),
    split: str | None = None,
    backbone: str | None = None,
    weights: Path | None = None,
    image_px: int | None = None,
    cache: Path | None = None,
    space: Literal["normalised", "model"] = "normalised",
    keep_bias: bool = False,
    n_top: int = 16,
    above: float = 0.0,
    cosine: float = 0.42,
    ratio: float = 2.0,
    margin: float = 0.05,
    n_effect_images: int = 4,
    n_random: int = 200,
    pool: Pool = "max",
    batch_size: int = 64,
    n_bootstrap: int = 500,
    seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
) -> None:
    """Names for a coder's latents, each with its evidence. Half of the pictures name, the other half tries the names.

    Writes concepts.parquet, concepts.json and review.csv, a sheet for people.

    Args:
        coder: a coder that `vitrail train` wrote
        images: pictures it was not trained on, "world:shapes?n=500&split=test"
        out: a folder
        words: a file with a word a line, or "everyday" or "shapes" of the package
        templates: what words are put into
        method: default: all that coder, backbone and pictures allow
        cache: where embedded words are kept (default: OUT/vocabulary)
        space: for decoder_text: the coder's normalised space, or the model's
        keep_bias: for decoder_text: add b_dec to each direction
        n_top: top pictures a latent
        above: a latent counts as firing above this share of its largest activation
        cosine: MSAE's threshold; a name's cosine must be above it
        ratio: MSAE's ratio; a name's cosine must be above so many times the runner-up's
        margin: a name is valid where its held-out AUC's interval lies so much above what random names reach
        n_effect_images: pictures on which latents are turned up
        n_random: random words that a name is compared with
    """
    loaded, about, model = open_coder_and_backbone(
        coder, backbone=backbone, weights=weights, image_px=image_px, device=pick_device(device)
    )
    options = NamingOptions(
        methods=method,
        templates=templates,
        space=space,
        keep_bias=keep_bias,
        n_top=n_top,
        above=above,
        cosine=cosine,
        ratio=ratio,
        margin=margin,
        n_effect_images=n_effect_images,
        n_random=n_random,
        pool=pool,
        batch_size=batch_size,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    found = name_latents(
        model,
        loaded,
        open_images(images, split=split),
        out,
        point=about["point"],
        tokens=about["tokens"],
        words=read_words(words),
        source=words,
        cache=cache or out / "vocabulary",
        options=options,
        said={"coder": str(coder), "coder_sha256": about.get("weights_sha256")},
        n_workers=pick_workers(workers),
        progress=Terminal(),
    )
    for name, one in found.items():
        counts = one["rules"]
        line = f"{name}: {counts['latents']} latents named, {one['valid']} valid"
        if one["detection_auc"] is not None:
            line += f"; held-out AUC {one['detection_auc']:.3f} (random names {one['detection_random']:.3f})"
        if one["true_of_valid"] is not None:
            line += f"; {100 * one['true_of_valid']:.0f} % of the valid are true"
        print(line)
        print(f"  rules: {', '.join(f'{rule} {counts[rule]}' for rule in list(counts)[1:])}")
    print(f"{out}: concepts.parquet, concepts.json, review.csv")
