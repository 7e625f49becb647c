"""vitrail bias"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from vitrail.cli.opened import open_coder_and_backbone
from vitrail.cli.options import pick_device, pick_workers
from vitrail.concepts.bias_study import ALPHA, bias_study
from vitrail.concepts.table import names_of, read_concepts
from vitrail.images import open_images
from vitrail.progress import Terminal


def run(arguments: Sequence[str]) -> None:
    tyro.cli(bias_verb, args=arguments, prog="vitrail bias")


def bias_verb(
    coder: Annotated[Path, tyro.conf.Positional],
    images: str,
    target: str,
    out: Path,
    split: str | None = None,
    fit_on: str | None = None,
    concepts: Path | None = None,
    backbone: str | None = None,
    weights: Path | None = None,
    image_px: int | None = None,
    shown: int = 6,
    changed: int = 64,
    permutations: int = 2000,
    seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
) -> None:
    """Which latents go with a classifier's answers, and which move them.

    Args:
        coder: a coder that `vitrail train` wrote
        images: pictures; half of them fit the classifier, the other half is asked
        target: what the classifier tells: "label=CLASS" ("label=A|B": any of these), or a concept ("ground:water")
        out: a folder
        fit_on: other pictures to fit the classifier on; all of `images` are then asked
        concepts: concepts.parquet of `vitrail name`, for names of latents
        shown: so many latents are turned up of those it leans on most given the class, and of those that go with its
            answer most
        changed: on so many pictures
    """
    loaded, about, model = open_coder_and_backbone(
        coder, backbone=backbone, weights=weights, image_px=image_px, device=pick_device(device)
    )
    told = bias_study(
        model,
        loaded,
        open_images(images, split=split),
        out,
        point=about["point"],
        tokens=about["tokens"],
        target=target,
        fit_on=None if fit_on is None else open_images(fit_on),
        names=None if concepts is None else names_of(read_concepts(concepts)),
        n_shown=shown,
        n_changed=changed,
        n_permutations=permutations,
        n_workers=pick_workers(workers),
        seed=seed,
        progress=Terminal(),
    )
    print(f"the classifier of {target!r} is right in {told['accuracy']:.1%} of {told['n']['asked']} pictures")
    for title, key, r in _TABLES:
        rows = [one for one in told[key] if one["p_family"] <= ALPHA][:shown]
        print(f"{title}:" if rows else f"{title}: nothing at p family {ALPHA}")
        for one in rows:
            print(
                f"  {one['latent']:>6} {one['name'] or '(no name)':24} r {one[r]:+.2f}, p family {one['p_family']:.2g}"
            )
    print("turned up:" if told["interventions"] else "nothing was turned up.")
    for one in told["interventions"]:
        ways = {"right": "", "wrong": " (the wrong way)", "none": " (does not move)"}
        curve = one["curve"]
        print(
            f"  {one['latent']:>6} {one['name'] or '(no name)':24} P {curve[0]['probability']:.3f} to "
            f"{curve[-1]['probability']:.3f}{ways[one['way']]}"
        )
    print(f"the page: {Path(out) / 'report.html'}")


_TABLES = (
    ("leans on, given the class, latents of one name together", "concepts", "r_given"),
    ("leans on, given the class", "leanings", "r_given"),
    ("goes with its answers", "associations", "point_biserial"),
)
