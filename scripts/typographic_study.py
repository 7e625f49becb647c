"""Typographic attacks and what stops them: the two studies of docs/typographic.md.

    python scripts/typographic_study.py OUT world [SEED ...]        toy/clip-exposed, three seeds
    python scripts/typographic_study.py OUT cache                   the pictures through CLIP ViT-B/16, once
    python scripts/typographic_study.py OUT real LAYER [CODER]      OpenAI's CLIP ViT-B/16 on COCO pictures
    python scripts/typographic_study.py OUT tables                  Markdown of what is there

`cache` and `real` read $VITRAIL_SHARED/data (default ../shared). What is computed is kept in OUT and found there again.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from real_first_look import CLIP_CONFIG, SHARED, dequantised
from vitrail.backbones import Backbone, load
from vitrail.backbones.text import OPENAI_SIMPLE
from vitrail.coders import SparseCoder, coder_metadata, load_coder, make_coder
from vitrail.files import read_tensors, write_json, write_tensors
from vitrail.images import ImageSource, open_images
from vitrail.images.attacked import Attack, AttackedImages, AttackSplits, halves
from vitrail.images.loader import load_batches
from vitrail.images.part import PartOfImages
from vitrail.images.worlds.silhouettes import SILHOUETTES
from vitrail.metrics.heads import Head, ZeroShotHead, zero_shot_head
from vitrail.steering.defending import CORRECTION, GATED, PAPER, UNDER_TEXT, Pictures, defend, save_defence, summary
from vitrail.steering.prefix import prefixed_head, train_prefix
from vitrail.steering.typographic import EMBEDDING, Rest, Shown, evaluate, text_patches
from vitrail.training import TensorSource, TrainConfig, train

REAL_POINTS = tuple(f"blocks.{layer}.hook_resid_post" for layer in (4, 6, 8, 10))
TTF = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# Those before the middle are for choosing, the others unseen.
FONTS = ("built-in", "bold", str(TTF / "DejaVuSerif.ttf"), "dejavu-mono", str(TTF / "DejaVuSansMono-Bold.ttf"))
FONTS = (*FONTS, str(TTF / "STIXGeneralItalic.ttf"))


def clip_b16(out: Path) -> Backbone:
    folder = out / "weights" / "clip-vit-base-patch16"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
    dequantised("clip_vit_b16_vision", out / "weights", folder / "model.safetensors")
    return load(f"hf/{folder}")


def coco_things() -> tuple[list[str], dict[str, set[str]]]:
    """The 80 names, and by picture those that its mask shows."""
    names = json.loads((SHARED / "vocabulary/clip_vit_b16_coco80_names.json").read_text())
    listed = (SHARED / "coco_masks/classes.yaml").read_text().split("classes:")[1]
    of_pixel = {int(index): name.strip() for index, name in re.findall(r"^\s+(\d+): (.*)$", listed, re.MULTILINE)}
    things = {}
    for picture in sorted((SHARED / "coco_masks/images").glob("*.jpg")):
        found = np.unique(np.asarray(Image.open(SHARED / f"coco_masks/masks/{picture.stem}.png")))
        things[picture.name] = {of_pixel.get(int(i)) for i in found} & set(names)
    return names, things


def real_sets() -> dict[str, ImageSource]:
    """Photographs without labels to choose latents on, others to sweep on, COCO pictures to test on."""
    names, things = coco_things()
    splits = AttackSplits.of(names, FONTS)
    photographs = open_images(f"{SHARED}/imagenet_1000/labels.csv")
    coco = open_images(f"{SHARED}/coco_masks/images")
    plain = Attack(tuple(names), ("built-in",), (36, 36), ("middle",), ("black", "white"), outline=1.0)
    train, sweep = PartOfImages(photographs, 0.0, 0.12), PartOfImages(photographs, 0.12, 0.22)
    sets: dict[str, ImageSource] = {"train clean": train, "train attacked": AttackedImages(train, splits.selection)}
    sets |= {"sweep clean": sweep, "sweep attacked": AttackedImages(sweep, splits.selection)}
    sets |= {"test clean": coco}
    tests = {"seen": splits.selection, "all unseen": splits.unseen["all unseen"], "plain 36 px": plain}
    tests |= {name: attack for name, attack in splits.unseen.items() if name != "all unseen"}
    return sets | {f"test {name}": AttackedImages(coco, a, present=things) for name, a in tests.items()}


@torch.inference_mode()
def cached(backbone: Backbone, images: ImageSource, points: Sequence[str], path: Path) -> dict[str, Any]:
    """By point (n, t, d) in fp16, and "embedding" (n, d_embed); read back where they are."""
    if not path.is_file():
        kept: dict[str, list[torch.Tensor]] = {}
        batches = load_batches(images, range(len(images)), backbone.preprocess, batch_size=8)
        with closing(batches), torch.autocast("cpu", torch.bfloat16):
            for batch in batches:
                seen = backbone.activations(batch.images, [*points, "hook_image_embed"])
                for name, value in seen.items():
                    kept.setdefault(name, []).append(value.half())
        write_tensors(path, {name: torch.cat(values) for name, values in kept.items()})
    return read_tensors(path, "cache of activations")


def real_shown(backbone: Backbone, head: Head, out: Path, name: str, images: ImageSource, point: str) -> Shown:
    """From the cache. What is right: the things in a COCO picture; of photographs without labels the model's own answer
    to the clean picture. `said` is what the cached values give, so that nothing but an edit changes an answer."""
    found = cached(backbone, images, REAL_POINTS, out / "cache" / f"{name}.safetensors")
    x, names = found[point].float(), coco_things()[0]
    place, records = {one: i for i, one in enumerate(names)}, [images.record(i) for i in range(len(images))]
    with torch.no_grad():
        said = head(found["hook_image_embed"].float()).argmax(1).numpy()
    right = np.zeros((len(x), len(names)), dtype=bool)
    if name.startswith("test"):
        things = coco_things()[1]
        for i, record in enumerate(records):
            right[i, [place[one] for one in things[record.id]]] = True
    written, text = np.full(len(x), -1), None
    if isinstance(images, AttackedImages):
        words = [images.written(i) for i in range(len(images))]
        written = np.array([place[one.word] if one else -1 for one in words])
        path = out / "cache" / f"{name} text.safetensors"
        if not path.is_file():
            marks = torch.stack([text_patches(images, i, backbone).flatten() for i in range(len(images))])
            write_tensors(path, {"text": marks})
        text = read_tensors(path, "marks of text")["text"]
    return Shown(tuple(record.id for record in records), x, right, written, said, text)


def pseudo_labelled(clean: Shown, attacked: Shown) -> tuple[Shown, Shown]:
    right = np.zeros_like(clean.right)
    right[np.arange(clean.n), clean.said] = True
    return replace(clean, right=right), replace(attacked, right=right)


def coco_head() -> ZeroShotHead:
    classes = np.load(SHARED / "vocabulary/clip_vit_b16_coco80_text_embeddings.npy").astype(np.float32)
    return ZeroShotHead(classes=torch.from_numpy(classes), logit_scale=100.0)


# ----------------------------------------------------------------------------------------------------------- the world

WORLD_TRAIN, WORLD_SWEEP, WORLD_TEST = 400, 400, 500  # pictures; of attacked ones, those with words of one half stay
SEEN_FONTS, UNSEEN_FONTS = "regular,bold", "slanted,aileron,aileron-large,aileron-capitals,dejavu-serif,dejavu-mono"
WORLD_POINTS = tuple(f"blocks.{layer}.hook_resid_post" for layer in (0, 1, 2))


@torch.no_grad()
def world_shown(backbone: Backbone, head: Head, points: Sequence[str], spec: str) -> tuple[dict[str, Shown], Tensor]:
    """(by point, image embeddings) of a world's pictures. `written` is the written shape's place among the shapes, so
    that it tells words apart, not a class."""
    world: Any = open_images(spec)
    grid = backbone.grid
    xs: dict[str, list[Tensor]] = {point: [] for point in (*points, EMBEDDING)}
    labels, written, text = [], [], []
    for start in range(0, len(world), 50):
        scenes = [world.scene(i) for i in range(start, min(start + 50, len(world)))]
        pixels = torch.stack([backbone.preprocess(Image.fromarray(scene.image)) for scene in scenes])
        for point, value in backbone.activations(pixels, list(xs)).items():
            xs[point].append(value)
        for scene in scenes:
            mask = scene.masks.get("written", np.zeros(scene.image.shape[:2], dtype=bool))
            side = scene.image.shape[0] // grid.height
            text.append(mask.reshape(grid.height, side, grid.width, side).any((1, 3)).ravel())
            labels.append(scene.label)
            written.append(list(SILHOUETTES).index(scene.attributes["word"]) if "word" in scene.attributes else -1)
    embedding = torch.cat(xs[EMBEDDING])
    said, right = head(embedding).argmax(1).numpy(), np.zeros((len(labels), len(world.classes)), dtype=bool)
    right[np.arange(len(labels)), labels] = True
    ids = tuple(f"{i}" for i in range(len(labels)))
    marks = torch.from_numpy(np.stack(text))
    found = {p: Shown(ids, torch.cat(xs[p]), right, np.array(written), said, marks) for p in points}
    return found, embedding


def world(out: Path, seed: int) -> None:
    backbone = load("toy/clip-exposed")
    plain = open_images("world:shapes?n=1")
    head = zero_shot_head(backbone, plain.classes, OPENAI_SIMPLE)
    seen_words, _ = halves(tuple(SILHOUETTES), seed=seed)
    is_seen = np.array([name in seen_words for name in SILHOUETTES])

    def sets(kind: int, n: int, fonts: str | None) -> tuple[dict[str, Shown], Tensor]:
        words = "" if fonts is None else f"&words=1.0&wrong_words=1.0&vocabulary=shape&fonts={fonts}"
        spec = f"world:shapes?n={n}&seed={1000 + 10 * seed + kind}&split=test{words}"
        return world_shown(backbone, head, WORLD_POINTS, spec)

    train, train_rows = sets(0, WORLD_TRAIN, None)
    attacked, attacked_rows = sets(0, WORLD_TRAIN, SEEN_FONTS)
    checks, checks_attacked = sets(1, WORLD_SWEEP, None)[0], sets(1, WORLD_SWEEP, SEEN_FONTS)[0]
    test = {name: sets(2, WORLD_TEST, fonts) for name, fonts in TEST_FONTS.items()}
    rows: list[dict[str, Any]] = []
    prefix_at = ~np.isin(attacked[WORLD_POINTS[0]].written, np.flatnonzero(~is_seen))
    prefix = train_prefix(
        backbone,
        attacked_rows[torch.from_numpy(prefix_at)],
        train_rows,
        torch.from_numpy(attacked[WORLD_POINTS[0]].right[prefix_at]),
        plain.classes,
        n_steps=120,
        seed=seed,
    )
    prefix.save(out / f"world-{seed}" / "prefix.safetensors")
    for point in WORLD_POINTS:
        said = attacked[point].written
        mine = is_seen[said]  # pictures with words for choosing
        clean, under = train[point].chosen(mine), attacked[point].chosen(mine)
        x = torch.cat([train[point].x, under.x]).flatten(0, 1)
        folder = out / f"world-{seed}" / point
        coder = small_coder(x, folder / "coder", d_sae=1024, k=16, seed=seed, backbone=backbone, point=point)
        check = checks[point]
        check_under = checks_attacked[point].chosen(is_seen[checks_attacked[point].written])
        tests = {}
        for name, (by_point, _) in test.items():
            if name != "clean":
                marks = is_seen[by_point[point].written]
                tests[f"{name}, seen words"] = by_point[point].chosen(marks)
                tests[f"{name}, unseen words"] = by_point[point].chosen(~marks)
        rest = Rest(backbone, point, head, check.x)
        pictures = Pictures(clean, under, check, check_under, test["clean"][0][point], tests)
        heads = {"prefix": prefixed_head(backbone, prefix, plain.classes)} if point == WORLD_POINTS[0] else {}
        found = compare(rest, coder, point, "all", pictures, heads, out=folder, seed=seed)
        rows += [{"seed": seed, "point": point, **row} for row in found]
        write_json(out / f"world-{seed}.json", rows)


TEST_FONTS = {"clean": None, "seen fonts": SEEN_FONTS, "unseen fonts": UNSEEN_FONTS}


# ------------------------------------------------------------------------------------------------------------ together


def small_coder(
    x: Tensor, folder: Path, *, d_sae: int, k: int, seed: int, backbone: Backbone, point: str, **others: Any
) -> SparseCoder:
    if not (folder / "coder.json").is_file():
        coder = make_coder("batch_topk", d_in=x.shape[1], d_sae=d_sae, k=k, seed=seed)
        said = {"backbone": backbone.name, "backbone_digest": backbone.digest, "point": point, "tokens": "all"}
        config = TrainConfig(lr=2e-3, warmup_steps=20, **{"epochs": 3.0, **others})
        source: Any = TensorSource(x, batch_size=1024, seed=seed)
        train(coder, source, folder, config=config, metadata=said)
    return load_coder(folder).eval()


def compare(
    rest: Rest,
    coder: SparseCoder,
    point: str,
    tokens: str,
    pictures: Pictures,
    heads: Mapping[str, Head],
    *,
    out: Path,
    seed: int,
) -> list[dict[str, Any]]:
    """`defend` with grids that fit two cores; its folder at `out`, and a line of each choice."""
    found = defend(
        rest.backbone,
        rest,
        coder,
        point,
        tokens,
        pictures,
        heads=heads,
        taus=(3.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.03, 0.01),
        lambdas=(1.0, 0.4, 0.2),
        n_random=3,
        n_bootstrap=1000,
        seed=seed,
    )
    for kind, one in found.chosen.items():
        print(point, kind, json.dumps(one.to_json()), flush=True)
    save_defence(out, found, rest.backbone, coder, coder_path=out / "coder", point=point, tokens=tokens)
    return [row.to_json() for row in found.rows]


# ---------------------------------------------------------------------------------------------------------- real CLIP

REAL_TAUS = (1.0, 0.3, 0.1)
SURE = 0.6  # of a photograph's clean answer, for it to serve the sweep
FIRST_TESTS = ("all unseen",)
MORE_TESTS = ("plain 36 px", "seen", "unseen fonts", "unseen words", "unseen places and sizes")


def real(out: Path, layer: int, coder_at: str | None = None, n_check: int = 32) -> None:
    """One block of CLIP. `coder_at`: a coder made elsewhere; else one is trained here, on the training pictures."""
    point, backbone, head, sets = f"blocks.{layer}.hook_resid_post", clip_b16(out), coco_head(), real_sets()

    def shown(name: str) -> Shown:
        return real_shown(backbone, head, out, name, sets[name], point)

    clean, attacked = shown("train clean"), shown("train attacked")
    folder = out / "results" / f"block{layer}{'-elsewhere' if coder_at else ''}"
    if coder_at is None:
        x = torch.cat([clean.x, attacked.x]).flatten(0, 1)
        few: dict[str, Any] = {"epochs": 2.5, "compute_dtype": "bfloat16", "checkpoint_every": 1000}
        coder = small_coder(x, out / point / "coder", d_sae=1536, k=32, seed=0, backbone=backbone, point=point, **few)
        where = str(out / point / "coder")
    else:
        coder, where = load_coder(Path(coder_at)).eval(), coder_at
    tokens = str(coder_metadata(Path(where))["tokens"])
    rest = Rest(backbone, point, head, clean.x, half=True)
    check, check_attacked = shown("sweep clean"), shown("sweep attacked")
    with torch.no_grad():
        stored = read_tensors(out / "cache" / "sweep clean.safetensors", "cache")["hook_image_embed"].float()
        sure = head(stored).softmax(1).amax(1).numpy() >= SURE
    sure &= np.cumsum(sure) <= n_check
    check, check_attacked = (with_answers(rest, one.chosen(sure)) for one in (check, check_attacked))
    check, check_attacked = pseudo_labelled(check, check_attacked)
    test = shown("test clean")
    kept = np.asarray(test.right.any(1))
    test = with_answers(rest, test.chosen(kept))

    def tests(names: Sequence[str]) -> dict[str, Shown]:
        return {name: with_answers(rest, shown(f"test {name}").chosen(kept)) for name in names}

    print(point, "sweep on", check.n, "test on", test.n, flush=True)
    found = defend(
        backbone,
        rest,
        coder,
        point,
        tokens,
        Pictures(clean, attacked, check, check_attacked, test, tests(FIRST_TESTS)),
        taus=(*REAL_TAUS, 0.03) if layer == 6 else REAL_TAUS,
        lambdas=(1.0, 0.3) if layer == 6 else (1.0,),
        ranks=(8, 64),
        clean_weights=(1.0, 10.0),
        kinds=(PAPER, UNDER_TEXT, GATED, CORRECTION),
        n_random=1 if layer == 6 else 0,
        n_bootstrap=1000,
    )
    said = {"sweep_pictures": check.n, "test_pictures": test.n}
    save_defence(folder, found, backbone, coder, coder_path=where, point=point, tokens=tokens, said=said)
    for kind, one in found.chosen.items():
        print(point, kind, json.dumps(one.to_json()), flush=True)
    if layer == 6:
        best_two = [one.defence for kind, one in found.chosen.items() if one is found.main or kind == CORRECTION]
        for name in MORE_TESTS:
            rows = evaluate(rest, test, tests([name]), best_two, with_clean=False, n_bootstrap=1000)
            write_json(folder / f"more {name}.json", [row.to_json() for row in rows])


def with_answers(rest: Rest, shown: Shown) -> Shown:
    """`said` by the very numbers that the defences start from: the cached values, the blocks in bfloat16."""
    return replace(shown, said=rest.answers(shown.x))


# ------------------------------------------------------------------------------------------------------------- tables


def tables(out: Path) -> None:
    """Markdown of what is there: of the world each seed's numbers, of CLIP each block's."""
    of_world = [row for path in sorted(out.glob("world-*.json")) for row in json.loads(path.read_text())]
    for point in dict.fromkeys(row["point"] for row in of_world):
        print(f"\n{point} of toy/clip-exposed, seeds {sorted({r['seed'] for r in of_world if r['point'] == point})}\n")
        _table([[r for r in of_world if r["point"] == point and r["seed"] == seed] for seed in (0, 1, 2)])
    for folder in sorted((out / "results").glob("*")):
        rows = json.loads((folder / "rows.json").read_text())["rows"]
        for path in folder.glob("more *.json"):
            rows += json.loads(path.read_text())
        print(f"\n{folder.name} of CLIP ViT-B/16, {rows[0]['n']} pictures\n")
        _table([rows])


def _table(by_seed: list[list[dict[str, Any]]]) -> None:
    by_seed = [summary(rows) for rows in by_seed if rows]
    conditions = list(dict.fromkeys(row["condition"] for rows in by_seed for row in rows))
    print("| defence |", " | ".join(conditions), "|\n|---|" + "---|" * len(conditions))
    for defence in dict.fromkeys(row["defence"] for rows in by_seed for row in rows):
        cells = []
        for condition in conditions:
            found = [r for rows in by_seed for r in rows if (r["defence"], r["condition"]) == (defence, condition)]
            cells.append("; ".join(map(_told, found)) or "-")
        print(f"| {defence} |", " | ".join(cells), "|")


def _told(row: dict[str, Any]) -> str:
    """Accuracy; of a defence what came back with its interval, on clean pictures the change."""
    told, number = f"{100 * row['accuracy']:.1f}", row["change"] if row["condition"] == "clean" else row["back"]
    if row["defence"] == "none" or number is None:
        return told
    sign = "+.1f" if row["condition"] == "clean" else ".0f"
    span = "" if number["low"] is None else f" {100 * number['low']:{sign}} to {100 * number['high']:{sign}}"
    return f"{told} ({100 * number['value']:{sign}}:{span})"


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, what = Path(sys.argv[1]), sys.argv[2]
    if what == "world":
        for seed in map(int, sys.argv[3:] or ("0", "1", "2")):
            world(out, seed)
    elif what == "real":
        real(out, int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
    elif what == "tables":
        tables(out)
    elif what == "cache":
        backbone = clip_b16(out)
        for name, images in real_sets().items():
            cached(backbone, images, REAL_POINTS, out / "cache" / f"{name}.safetensors")
            print(name, len(images), flush=True)


if __name__ == "__main__":
    main()
