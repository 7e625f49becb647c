"""vitrail modality"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.backbones import Backbone, load
from vitrail.backbones.text_rows import text_rows
from vitrail.cli.options import pick_device, pick_workers
from vitrail.coders import coder_metadata, load_coder
from vitrail.files import json_digest, replacing
from vitrail.images import ImageSource, open_images
from vitrail.progress import Terminal
from vitrail.store import Store
from vitrail.studies.first_look import control_sample
from vitrail.studies.modality_table import METRICS, POINT, coder_of_texts, image_rows, modality_table
from vitrail.studies.paper_tables import paper_table


def run(arguments: Sequence[str]) -> None:
    tyro.cli(modality_verb, args=arguments, prog="vitrail modality")


def modality_verb(
    image_coder: Annotated[Path, tyro.conf.Positional],
    text_coder: Annotated[Path, tyro.conf.Positional],
    images: str,
    out: Path,
    texts: Path | None = None,
    train_texts: Path | None = None,
    store: Path | None = None,
    backbone: str | None = None,
    weights: Path | None = None,
    image_px: int | None = None,
    metrics: str = METRICS,
    split: str | None = None,
    batch_size: int = 64,
    n_bootstrap: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
) -> None:
    """A coder of images and a coder of texts, each on both modalities of a dual encoder: MSAE's table 2.

    A coder meets the other modality with that modality's mean and scale; weights and thresholds stay.

    Args:
        image_coder: a coder of hook_image_embed that `vitrail train` wrote
        text_coder: a coder of the text tower's embeddings; where there is none, one is trained here on the training
            texts as the image coder was on images
        images: evaluation images, not those the coder was trained on
        out: the .jsonl file to write
        texts: evaluation texts, a file with one a line (default: the captions of the evaluation images)
        train_texts: the texts that a coder learns from and whose mean and scale coders are given (default: the captions
            of the images in the store)
        store: what the image coder was trained on, if it lies elsewhere now
        backbone: default: the one the image coder was trained on
        metrics: beside reconstruction and L0: names, as in `vitrail eval`
    """
    about = coder_metadata(image_coder)
    if about.get("point") != POINT:
        raise ValueError(
            f"{image_coder} is of {about.get('point')}; modalities meet in the final space: extract and train at "
            f"{POINT}."
        )
    model = load(backbone or about["backbone"], weights=weights, image_px=image_px, device=pick_device(device))
    trained_on = Store.open(store or about["store"])
    source = open_images(images, split=split)
    learnt = lines_of(train_texts) or captions(
        trained_on.images()["caption"].tolist(), "the stored images", "--train-texts"
    )
    shown = lines_of(texts) or captions(
        [source.record(position).caption for position in range(len(source))], source.spec, "--texts"
    )
    training_rows = {
        "image": control_sample(trained_on, POINT, "pooled", seed=seed).float(),
        "text": text_rows(model, learnt),
    }
    said = {"backbone": model.name, "backbone_digest": model.digest, "texts_digest": json_digest(learnt)}
    if (text_coder / "coder.json").is_file():
        of_texts = load_coder(text_coder, device=pick_device(device))
    else:
        of_texts = coder_of_texts(
            training_rows["text"], image_coder, about, text_coder, metadata=said, progress=Terminal()
        )
    for path, told in ((image_coder, about), (text_coder, coder_metadata(text_coder))):
        check_backbone(path, told, model)
    names = [path.resolve().name for path in (image_coder, text_coder)]
    if names[0] == names[1]:
        raise ValueError(f"both coders are called {names[0]!r}: give their folders different names.")
    rows = modality_table(
        {names[0]: load_coder(image_coder, device=pick_device(device)), names[1]: of_texts},
        {names[0]: "image", names[1]: "text"},
        {
            "image": image_rows(
                model, source, batch_size=batch_size, n_workers=pick_workers(workers), progress=Terminal()
            ),
            "text": text_rows(model, shown),
        },
        training_rows,
        metrics=metrics,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    for row in rows:
        row |= of_data(row["modality"], model, source, shown, learnt)
    with replacing(out) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(paper_table(rows, "msae"), end="")
    print(f"{len(rows)} rows in {out}")


def of_data(
    modality: str, model: Backbone, images: ImageSource, texts: Sequence[str], learnt: Sequence[str]
) -> dict[str, Any]:
    """What a row says of the model and of what was measured."""
    data: dict[str, Any] = {"texts_digest": json_digest(texts), "n_texts": len(texts)}
    if modality == "image":
        data = {"images": images.spec, "images_fingerprint": images.fingerprint(), "n_images": len(images)}
    data["training_texts_digest"] = json_digest(learnt)
    return {"backbone": model.name, "backbone_digest": model.digest, **data}


def check_backbone(path: Path, about: dict[str, Any], model: Backbone) -> None:
    if about.get("backbone_digest", model.digest) != model.digest:
        raise ValueError(
            f"{model.name} has other weights than {path} was trained on ({model.digest[:12]}, not "
            f"{about['backbone_digest'][:12]}). Pass its --weights."
        )


def lines_of(path: Path | None) -> list[str]:
    """The lines that say something; none without a path. Raises ValueError if all are empty."""
    if path is None:
        return []
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it should hold texts, one a line.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"{path} holds no texts: it should have one a line.")
    return [line for line in lines if line]


def captions(found: Sequence[str | None], whose: str, option: str) -> list[str]:
    """Those that there are. Raises ValueError if there are none."""
    said = [str(caption) for caption in found if caption]
    if not said:
        raise ValueError(f"{whose} have no captions: give texts, one a line, with {option} FILE.")
    return said
