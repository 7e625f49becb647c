"""vitrail steer"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from jaxtyping import Int

from vitrail.backbones import Backbone
from vitrail.cli.opened import open_coder_and_backbone
from vitrail.cli.options import pick_device, pick_workers
from vitrail.cli.search import find_names
from vitrail.concepts.vocabulary import Vocabulary, embed, read_words, stored_vocabulary
from vitrail.files import read_json
from vitrail.images import open_images
from vitrail.progress import Terminal
from vitrail.steering.bench import SteerOptions
from vitrail.steering.figures import figures
from vitrail.steering.interventions import Dose
from vitrail.steering.run import steer
from vitrail.steering.steer_page import write_page


def run(arguments: Sequence[str]) -> None:
    tyro.cli(steer_verb, args=arguments, prog="vitrail steer")


def steer_verb(
    coder: Annotated[Path, tyro.conf.Positional],
    images: str,
    out: Path,
    words: str = "everyday",
    word_rows: Path | None = None,
    templates: tuple[str, ...] = ("a photo of a {}.",),
    latents: tuple[str, ...] = ("all",),
    strength: float | None = None,
    dose: str | None = None,
    own: Literal["max", "mean"] = "max",
    where: Literal["all", "cls", "spatial"] | None = None,
    keep_error: bool = True,
    against: tuple[Literal["neurons", "random"], ...] = (),
    against_dose: Literal["equal", "same"] = "equal",
    n_random: int | None = None,
    logit_scale: float | None = None,
    gamma: float = 0.1,
    beta: float = 0.5,
    n_curves: int = 6,
    backbone: str | None = None,
    weights: Path | None = None,
    image_px: int | None = None,
    cache: Path | None = None,
    batch_size: int = 32,
    n_bootstrap: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
) -> None:
    """Turn latents up, one at a time on every image, and measure what the model's zero-shot answer makes of it.

    Writes steerability.parquet (a row a latent), steerability.json, curves.parquet, report.html and, where matplotlib
    is, pictures. Killed and run again, it goes on.

    Args:
        coder: a coder that `vitrail train` wrote
        images: "world:shapes?n=100&split=test"
        out: a folder
        words: a file with a word a line, or "everyday" or "shapes" of the package
        word_rows: a .npy with a row a word in the image embedding's space, for models without a text tower
        templates: what words are put into
        latents: all; sample N, drawn at random; or numbers, 1,2,3
        strength: set the latent to this, in its own units (default: 150, the paper's)
        dose: set:150, own:3 (times the latent's own scale), norm:12 (length of the edit), add:5, scale:2 or ablate
        own: a latent's own scale: its largest activation on these images, or its mean where it fires
        where: tokens that are steered (default: those the coder reads)
        keep_error: what the coder does not reconstruct stays as it is
        against: the same for neurons, and for random directions
        against_dose: equal: at edits of equal length. same: at the same number
        n_random: random directions (default: as many as neurons)
        logit_scale: what cosines are multiplied by (default: the text tower's, or 100)
        gamma: steerable means S above this
        beta: a word is reached where S is above this
        n_curves: latents whose curve over strength is written
        cache: where embedded words are kept (default: OUT/vocabulary)
    """
    if strength is not None and dose is not None:
        raise ValueError(f"give --strength {strength:g} or --dose {dose}, not both.")
    asked = Dose.of(dose) if dose is not None else Dose("set", 150.0 if strength is None else strength)
    loaded, about, model = open_coder_and_backbone(
        coder, backbone=backbone, weights=weights, image_px=image_px, device=pick_device(device)
    )
    options = SteerOptions(
        dose=asked,
        where=where,
        keep_error=keep_error,
        own=own,
        against=against,
        against_dose=against_dose,
        n_random=n_random,
        logit_scale=logit_scale,
        gamma=gamma,
        beta=beta,
        n_curves=n_curves,
        batch_size=batch_size,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    vocabulary = open_vocabulary(model, words, word_rows, templates, cache or out / "vocabulary")
    chosen = chosen_latents(latents, loaded.d_sae, seed)
    layers = steer(
        model,
        loaded,
        open_images(images),
        out,
        point=about["point"],
        tokens=about["tokens"],
        vocabulary=vocabulary,
        latents=chosen,
        options=options,
        said={"coder": str(coder), "coder_sha256": about.get("weights_sha256")},
        n_workers=pick_workers(workers),
        progress=Terminal(),
    )
    for name, one in layers.items():
        interval = "" if one.share_sampling is None else " ({:.3f} to {:.3f})".format(*one.share_sampling)
        print(f"{name}: {one.n} of {one.n_all}; mean S {one.mean_s.value:.4f}")
        print(f"  {one.count} with S > {one.gamma:g}, {one.share:.3f}{interval}")
        print(f"  {one.eq8_count} with S > {one.beta:g}, which reach {one.concepts} words")
        print(f"  {one.ipr_count} with ipr > {one.beta:g}, which reach {one.ipr_concepts} words")
    at = min(layers["latents"].concepts_of, default=None)
    if len(layers) > 1 and at is not None:
        for told in ("concepts_of", "ipr_concepts_of"):
            counts = {name: getattr(one, told).get(at) for name, one in layers.items()}
            shown = ", ".join(f"{name} {count:.1f}" for name, count in counts.items() if count is not None)
            print(f"words with {'ipr' if told[0] == 'i' else 'S'} > {beta:g}, of {at} each: {shown}")
    flat = read_json(out / "steerability.json", "run of steering")["before"]["s_of_flattening"]
    print(f"S of an answer that is merely made flat: {flat:.4f}")
    drawn = figures(out) if find_spec("matplotlib") is not None else []
    page = write_page(out, names=_names(coder))
    print(
        f"{out}: {', '.join(['steerability.parquet', 'steerability.json', *(path.name for path in drawn), page.name])}"
    )


def open_vocabulary(
    model: Backbone, words: str, rows: Path | None, templates: Sequence[str], cache: Path
) -> Vocabulary:
    """Raises ValueError for a model without a text tower and no rows."""
    if rows is not None:
        if not rows.is_file():
            raise FileNotFoundError(f"there is no file of word rows at {rows}.")
        return stored_vocabulary(read_words(words), rows, source=words, d_embed=model.d_embed)
    if model.text is None:
        raise ValueError(f"{model.name} has no text tower: give the words' embeddings with --word-rows FILE.npy.")
    return embed(
        model.text, read_words(words), templates, cache=cache, identity=model.digest, skip_unknown=True, source=words
    )


def chosen_latents(asked: Sequence[str], d_sae: int, seed: int) -> Int[np.ndarray, " m"] | None:
    """None for all. Raises ValueError for what is neither all, sample N, nor numbers."""
    text = ",".join(asked).replace("sample,", "sample ")
    if text == "all":
        return None
    if text.startswith("sample "):
        number = text.removeprefix("sample ")
        if not number.isdecimal() or not 1 <= int(number) <= d_sae:
            raise ValueError(f"a sample is of 1..{d_sae} latents, got {number!r}.")
        return np.sort(np.random.default_rng(seed).choice(d_sae, int(number), replace=False))
    parts = [part for part in text.split(",") if part]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(f"latents are all, sample N, or numbers such as 1,2,3; got {text!r}.")
    return np.array(sorted({int(part) for part in parts}), dtype=np.int64)


def _names(coder: Path) -> dict[int, str] | None:
    """Of `vitrail name`, where it was run on this coder of a run."""
    run_folder = coder.resolve().parents[1] if coder.resolve().parent.name == "coders" else None
    return find_names(None, run_folder, coder.resolve().name)
