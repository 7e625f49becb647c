"""vitrail name"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vitrail.cli.opened import open_coder_and_backbone
from vitrail.cli.options import pick_device, pick_workers
from vitrail.concepts.mask_check import Masked, write_mask_checks
from vitrail.concepts.masks import patch_codes, truth_of_pictures
from vitrail.concepts.study import NamingOptions, name_latents
from vitrail.concepts.table import names_of, read_concepts
from vitrail.concepts.vocabulary import read_words, stored_vocabulary
from vitrail.files import file_digest, read_json, write_json
from vitrail.images import ImageSource, open_images
from vitrail.metrics.truth import Pool
from vitrail.progress import Terminal

Method = Literal["decoder_text", "top_images", "effect", "captions", "labels"]


def run(arguments: Sequence[str]) -> None:
    tyro.cli(name_verb, args=arguments, prog="vitrail name")


def name_verb(
    coder: Annotated[Path, tyro.conf.Positional],
    images: str,
    out: Path | None = None,
    words: str = "everyday",
    word_rows: Path | None = None,
    templates: tuple[str, ...] = ("a photo of a {}.",),
    method: tuple[Method, ...] = (),
    split: str | None = None,
    mask_images: str | None = None,
    masks: Path | None = None,
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

    Writes concepts.parquet, concepts.json and review.csv, a sheet for people; with --mask-images also mask_check.csv.

    Args:
        coder: a coder that `vitrail train` wrote
        images: pictures it was not trained on, "world:shapes?n=500&split=test"
        out: a folder (default, of RUN/coders/NAME: RUN/concepts/NAME, where search, edit and report look for names)
        words: a file with a word a line, a .json list, or "everyday" or "shapes" of the package
        word_rows: a .npy with a unit row a word, for a backbone whose text tower is not here
        templates: what words are put into
        mask_images: other pictures, with masks: does a latent fire on the patches of the class it is named after?
        masks: the folder of their masks, a PNG a picture and classes.yaml; worlds know their own
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
    if out is None:
        if coder.resolve().parent.name != "coders":
            raise ValueError(f"{coder} lies in no run's coders/: say where the names go with --out.")
        out = coder.resolve().parents[1] / "concepts" / coder.resolve().name
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
    source, listed = open_images(images, split=split), read_words(words)
    checked = _pictures_with_masks(mask_images, masks, source)
    said: dict[str, Any] = {"coder": str(coder), "coder_sha256": about.get("weights_sha256")}
    vocabulary = None
    if word_rows is not None:
        width = model.point("hook_image_embed").width
        vocabulary = stored_vocabulary(listed, word_rows, source=f"{words}, {word_rows}", d_embed=width)
        said["word_rows_sha256"] = file_digest(word_rows)
    found = name_latents(
        model,
        loaded,
        source,
        out,
        point=about["point"],
        tokens=about["tokens"],
        words=listed,
        source=words,
        cache=cache or out / "vocabulary",
        vocabulary=vocabulary,
        options=options,
        said=said,
        n_workers=pick_workers(workers),
        progress=Terminal(),
    )
    named = names_of(read_concepts(out))
    print(f"{len(named)} of {loaded.d_sae} latents have a valid name, {len(set(named.values()))} different ones")
    for name, one in found.items():
        counts = one["rules"]
        line = f"{name}: {counts['latents']} latents named, {one['valid']} valid"
        if one["detection_auc"] is not None:
            line += f"; held-out AUC {one['detection_auc']:.3f} (random names {one['detection_random']:.3f})"
        if one["true_of_valid"] is not None:
            line += f"; {100 * one['true_of_valid']:.0f} % of the valid are true"
        print(line)
        print(f"  rules: {', '.join(f'{rule} {counts[rule]}' for rule in list(counts)[1:])}")
    for pair in read_json(out / "concepts.json", "table of names")["about"]["agreement"]:
        if pair["n"]:
            print(
                f"{pair['a']} and {pair['b']}: the same name for {pair['same']:.0%} of {pair['n']} latents, a word in "
                f"common for {pair['shares_a_word']:.0%}"
            )
    if checked is not None:
        codes, positions = patch_codes(
            model,
            loaded,
            checked,
            about["point"],
            about["tokens"],
            batch_size=batch_size,
            n_workers=pick_workers(workers),
            progress=Terminal(),
        )
        truth = truth_of_pictures(checked, positions, model, masks)
        among = listed if model.text is not None or vocabulary is not None else None
        rows = read_concepts(out)
        masked = Masked(codes, truth, among=among, seed=seed)
        checks = {
            name: masked.check([row for row in rows if row.method == name], n_bootstrap=n_bootstrap) for name in found
        }
        write_mask_checks(out / "mask_check.csv", [row for one in checks.values() for row in one.measured])
        summaries = {name: one.summary(seed=seed) for name, one in checks.items()}
        write_json(out / "mask_check.json", {"images": checked.spec, "n_images": truth.n, "methods": summaries})
        for name, one in summaries.items():
            print(f"{name}, against masks: {_told(one)}")
    print(f"{out}: concepts.parquet, concepts.json, review.csv{', mask_check.csv' if checked is not None else ''}")


def _pictures_with_masks(spec: str | None, masks: Path | None, naming: ImageSource) -> ImageSource | None:
    """Raises ValueError where masks have no pictures, or the pictures are those that find the names."""
    if spec is None:
        if masks is not None:
            raise ValueError(f"--masks {masks} needs --mask-images: the pictures that these are the masks of.")
        return None
    images = open_images(spec)
    if images.fingerprint() == naming.fingerprint():
        raise ValueError(
            f"--mask-images {spec} are the pictures that find the names: a name is tried on others. "
            'Take parts, "PICTURES@0:0.5" and "PICTURES@0.5:1".'
        )
    return images


def _told(one: Mapping[str, Any]) -> str:
    line = f"{one['measured']} of {one['names']} names can be measured"
    if one["measured"]:
        line += (
            f" ({one['classes_named']} classes of {one['n_classes']}); AUC {one['auc']:.3f}, dealt names "
            f"{one['dealt']:.3f}; the best class for {100 * one['best']:.0f} % "
            f"(dealt {100 * one['best_dealt']:.0f} %), {one['holds']} above the other names"
        )
    return line
