"""vitrail recover"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from vitrail.backbones import load
from vitrail.cli.options import pick_device, pick_workers
from vitrail.files import replacing
from vitrail.images import open_images
from vitrail.metrics.truth import Pool
from vitrail.progress import Terminal
from vitrail.store import Store
from vitrail.studies.calibration import calibrate as calibrated
from vitrail.studies.calibration import calibration_picture
from vitrail.studies.first_look import control_sample, load_coders
from vitrail.studies.table_text import print_recovery
from vitrail.studies.truth_recovery import truth_recovery
from vitrail.studies.truth_splits import check_known, read_split


def run(arguments: Sequence[str]) -> None:
    tyro.cli(recover_verb, args=arguments, prog="vitrail recover")


def recover_verb(
    coders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    choose: str,
    score: str,
    out: Path,
    backbone: str | None = None,
    weights: Path | None = None,
    image_px: int | None = None,
    store: Path | None = None,
    controls: bool = True,
    calibrate: bool = False,
    pool: Pool = "max",
    coverage: float = 0.5,
    patches_per_image: int | None = None,
    min_fires: int = 10,
    batch_size: int = 64,
    n_bootstrap: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
) -> None:
    """Which concepts of a world coders recover, beside neurons, PCA, k-means, random and untrained ones.

    Args:
        coders: coder folders, all of one hook point; folders NAME#0, NAME#1, ... are seeds of NAME
        choose: pictures on which latents and thresholds are chosen, "world:shapes?n=500&split=val"
        score: other pictures, on which they are scored, "world:shapes?n=500&split=test"
        out: a folder; RUN/recovery for what `vitrail report RUN` shall show
        backbone: default: the one the coders were trained on
        weights: a local weights file for the backbone
        store: where controls are fitted (default: the store the first coder was trained on)
        calibrate: also spoil the truth step by step, and see the numbers of the first coder fall
        pool: a picture's activation from its patches: max, or mean
        coverage: share of a patch that a concept must cover to be shown by it
        patches_per_image: count so many patches of each picture, drawn at random: quicker where controls are dense
        min_fires: how often a latent must fire to be a part of a concept (splitting)
    """
    on = pick_device(device)
    loaded, about = load_coders(list(coders), on)
    for needed in ("point", "tokens", "backbone"):
        if needed not in about and not (needed == "backbone" and backbone):
            raise ValueError(f"{coders[0]} does not say its {needed}: it was not trained by `vitrail train`.")
    model = load(backbone or about["backbone"], weights=weights, image_px=image_px, device=on)
    if "backbone_digest" in about and model.digest != about["backbone_digest"]:
        raise ValueError(
            f"{model.name} has other weights than the coders were trained on ({model.digest[:12]}, not "
            f"{about['backbone_digest'][:12]}). Pass the --weights that `vitrail extract` had."
        )
    splits = (open_images(choose), open_images(score))
    for images in splits:
        check_known(images)
        if images.fingerprint() == about.get("images_fingerprint"):
            print(f"note: the coders were trained on {images.spec}.", file=sys.stderr)
    n_workers = pick_workers(workers)
    sample = None
    if controls:
        if store is None and not about.get("store"):
            raise ValueError(
                f"{coders[0]} does not say its store, where controls are fitted: --store, or --no-controls."
            )
        fitted_on = Store.open(store or about["store"])
        sample = control_sample(fitted_on, about["point"], about["tokens"], seed=seed).to(on)
    at = {"point": about["point"], "tokens": about["tokens"]}
    read = {"coverage": coverage, "batch_size": batch_size, "n_workers": n_workers, "progress": Terminal()}
    rows = truth_recovery(
        model,
        *splits,
        loaded,
        out,
        control_sample=sample,
        pool=pool,
        patches_per_image=patches_per_image,
        min_fires=min_fires,
        n_bootstrap=n_bootstrap,
        seed=seed,
        **at,
        **read,
    )
    print_recovery(rows)
    print("each number of a control is that of its better variant: at the coders' L0, or with no limit")
    print(f"{len(rows)} rows in {out / 'recovery.jsonl'}; concepts and pictures of each coder in {out}/NAME")
    if calibrate:
        name, coder = next(iter(loaded.items()))
        known = [read_split(model, images, **at, **read) for images in splits]
        curve = calibrated(coder, known, patches_per_image=patches_per_image, seed=seed, progress=Terminal())
        with replacing(out / "calibration.jsonl") as temporary:
            temporary.write_text("".join(json.dumps({"name": name, **row}) + "\n" for row in curve), encoding="utf-8")
        print(f"{name} under spoilt truths: {out / 'calibration.jsonl'}")
        print(calibration_picture(curve, out / "calibration.png", title=f"{name}, {at['point']} of {model.name}"))
