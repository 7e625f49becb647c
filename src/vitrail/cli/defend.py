"""vitrail defend"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image

from vitrail.backbones import Backbone
from vitrail.backbones.text import OPENAI_SIMPLE
from vitrail.cli.edit import class_head
from vitrail.cli.opened import open_coder_and_backbone
from vitrail.cli.options import pick_device, pick_workers
from vitrail.concepts.editing import columns_of
from vitrail.concepts.vocabulary import read_words, stored_vocabulary
from vitrail.files import read_json
from vitrail.images import ImageSource, open_images
from vitrail.images.attacked import AttackedImages, AttackSplits
from vitrail.images.part import PartOfImages
from vitrail.metrics.heads import Head, ZeroShotHead
from vitrail.progress import Terminal
from vitrail.steering.defences import Removal
from vitrail.steering.defending import Defended, Pictures, defend, save_defence, summary
from vitrail.steering.prefix import load_prefix, prefixed_head
from vitrail.steering.typographic import Rest, Shown, look_at
from vitrail.studies.defence_report import Example, write_defence_report

FONTS = ("built-in", "bold", "dejavu-serif", "regular", "dejavu-mono", "slanted")
N_EXAMPLES = 8


KNOWS = 0.5  # of clean pictures: below it there is little that words could take


def run(arguments: Sequence[str]) -> None:
    tyro.cli(defend_verb, args=arguments, prog="vitrail defend")


def defend_verb(
    coder: Annotated[Path, tyro.conf.Positional],
    images: Annotated[str, tyro.conf.Positional],
    out: Path,
    split: str | None = None,
    fonts: tuple[str, ...] = FONTS,
    outline: float = 0.5,
    classes: Path | None = None,
    class_rows: Path | None = None,
    logit_scale: float = 100.0,
    present: Path | None = None,
    templates: tuple[str, ...] = OPENAI_SIMPLE,
    prefix: Path | None = None,
    parts: tuple[float, float] = (0.4, 0.6),
    clean_loss: float = 0.01,
    random: int = 20,
    backbone: str | None = None,
    weights: Path | None = None,
    image_px: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Latents to remove against written words, and what that costs: chosen, swept and tested on separate pictures.

    Args:
        coder: a coder that `vitrail train` wrote, of a point between blocks
        images: labelled pictures; words are written on them here
        out: a folder: defence.json, rows.json, sweep.json, report.html
        fonts: the first half to choose on, the others unseen; TrueType files by path
        outline: share of the words with an outline
        classes: a file with a class a line (default: the pictures' own), whose names are also the words
        class_rows: a .npy with a unit row a class, where the backbone has no text tower
        logit_scale: with class_rows
        present: a JSON of picture id to all class names that are true of it (default: its label)
        templates: texts around class names
        prefix: a learned token for the text side (safetensors, npz), alone and beside the defence
        parts: pictures whose share lies below the first are for choosing, below the second for the sweep
        clean_loss: the most that may be lost of clean accuracy on the sweep's pictures
        random: so many random sets of latents as a control
    """
    loaded, about, model = open_coder_and_backbone(
        coder, backbone=backbone, weights=weights, image_px=image_px, device=pick_device(device)
    )
    source, point, tokens = open_images(images, split=split), about["point"], about["tokens"]
    head, names = _head(model, source, templates, classes, class_rows, logit_scale)
    known = None if present is None else {one: set(all_of) for one, all_of in read_json(present, "table").items()}
    splits = AttackSplits.of(names, fonts, seed=seed, outline=outline)
    if not 0 < parts[0] < parts[1] < 1:
        raise ValueError(f"parts must be two shares, 0 < first < second < 1, got {parts}.")
    train, check, test = (
        PartOfImages(source, *ends) for ends in ((0.0, parts[0]), (parts[0], parts[1]), (parts[1], 1.0))
    )
    progress, n_workers = Terminal(), pick_workers(workers)

    def look(pictures: ImageSource) -> Shown:
        return look_at(
            model,
            pictures,
            point,
            head,
            names,
            present=known,
            batch_size=batch_size,
            n_workers=n_workers,
            progress=progress,
        )

    attacked = {name: AttackedImages(test, one, present=known) for name, one in splits.unseen.items()}
    attacked = {"seen": AttackedImages(test, splits.selection, present=known), **attacked}
    pictures = Pictures(
        look(train),
        look(AttackedImages(train, splits.selection, present=known)),
        look(check),
        look(AttackedImages(check, splits.selection, present=known)),
        look(test),
        {name: look(one) for name, one in attacked.items()},
    )
    rest = Rest(model, point, head, pictures.test.x)
    heads: dict[str, Head] = {}
    if prefix is not None:
        heads["prefix"] = prefixed_head(model, load_prefix(prefix), names, templates)
    found = defend(
        model,
        rest,
        loaded,
        point,
        tokens,
        pictures,
        heads=heads,
        clean_loss=clean_loss,
        n_random=random,
        seed=seed,
        progress=progress,
    )
    said = {"images": source.spec, "seed": seed, "selection": splits.selection.to_json()}
    said |= {"unseen": {name: one.to_json() for name, one in splits.unseen.items()}, "clean_loss": clean_loss}
    save_defence(out, found, model, loaded, coder_path=coder, point=point, tokens=tokens, said=said)
    rows = summary([row.to_json() for row in found.rows])
    facts = {"model": model.name, "coder": f"{coder} at {point}, {tokens} tokens", "pictures": source.spec}
    facts["chosen"] = _told(found)
    hard = "all unseen"
    write_defence_report(
        out / "report.html",
        title="A defence against written words",
        facts=facts,
        rows=rows,
        sweeps={kind: [one.to_json() for one in some] for kind, some in found.tried.items()},
        clean_loss=clean_loss,
        examples=_examples(model, rest, found, attacked[hard], pictures.tests[hard], names),
    )
    show(rows)
    clean = next(row["accuracy"] for row in rows if (row["defence"], row["condition"]) == ("none", "clean"))
    if clean < KNOWS:
        print(
            f"note: the model is right in only {clean:.1%} of the clean pictures, so words can take little, and what a "
            "defence gives back means little. Other --templates, or pictures that this model knows?"
        )
    print(f"{_told(found)}\n{out / 'report.html'}")


def _head(
    model: Backbone,
    source: ImageSource,
    templates: Sequence[str],
    classes: Path | None,
    class_rows: Path | None,
    logit_scale: float,
) -> tuple[Head, list[str]]:
    names = list(source.classes) if classes is None else list(read_words(classes))
    if class_rows is not None:
        rows = stored_vocabulary(names, class_rows, source=str(class_rows), d_embed=model.d_embed).embeddings
        return ZeroShotHead(classes=rows, logit_scale=logit_scale), names
    head, known = class_head(model, source, templates)
    if head is None:
        raise ValueError(f"{model.name} has no head and no text tower: give --class-rows, a unit row a class.")
    return head, known


def _told(found: Defended) -> str:
    if found.main is None:
        return "no set of latents stayed within the bound on clean accuracy: there is no defence.json"
    about = found.main.to_json()
    loss = 100 * about["clean_loss"]
    return (
        f"{about['n']} latents ({found.main.defence.name}; tau {about['tau']:g}, lambda {about['lambda']:g}); on the "
        f"sweep's pictures {100 * about['attacked']:.1f} % under attack, clean accuracy {-loss:+.1f} points"
    )


def show(rows: Sequence[dict]) -> None:
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    width = max(len(row["defence"]) for row in rows)
    print(" " * width, *(f"{one:>24}" for one in conditions))
    for defence in dict.fromkeys(row["defence"] for row in rows):
        cells = []
        for condition in conditions:
            row = next((r for r in rows if r["defence"] == defence and r["condition"] == condition), None)
            low = None if row is None else row["low"]
            span = "" if row is None or low is None else f" ({100 * low:.1f}-{100 * row['high']:.1f})"
            told = "-" if row is None else f"{100 * row['accuracy']:.1f}{span}"
            cells.append(f"{told:>24}")
        print(f"{defence:<{width}}", *cells)


@torch.no_grad()
def _examples(
    model: Backbone, rest: Rest, found: Defended, images: AttackedImages, shown: Shown, names: Sequence[str]
) -> list[Example]:
    """Pictures that the words turned: first those that come back."""
    main = found.main.defence if found.main else None
    if not isinstance(main, Removal):
        return []
    after, grid = rest.defended(shown, main), model.grid
    fooled = ~shown.is_right(shown.said)
    order = [*np.flatnonzero(fooled & shown.is_right(after)), *np.flatnonzero(fooled & ~shown.is_right(after))]
    place = {images.record(i).id: i for i in range(len(images))}
    coder, examples = getattr(main.site.basis, "coder"), []  # noqa: B009 (a Basis need not have one)
    for at in map(int, order[:N_EXAMPLES]):
        i = place[shown.ids[at]]
        codes = coder.encode_sparse(shown.x[at, grid.n_special :])
        heat = columns_of(codes, torch.from_numpy(main.features)).sum(1).view(grid.height, grid.width).numpy()
        written = images.written(i)
        truth = " or ".join(names[c] for c in np.flatnonzero(shown.right[at]).tolist()) or "?"
        picture = Image.fromarray(_as_seen(model, images.load(i)))
        said = names[int(shown.said[at])], names[int(after[at])]
        examples.append(Example(picture, heat, truth, written.word if written else "", *said))
    return examples


def _as_seen(model: Backbone, picture: Image.Image) -> np.ndarray:
    """The crop that the model sees, back in colours."""
    white, black = (model.preprocess(Image.new("RGB", picture.size, colour)) for colour in ("white", "black"))
    share = (model.preprocess(picture) - black) / (white - black)
    return (share.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
