"""The main job, start to end: from pictures to measured, visible coders.

    extract -> for each coder: train -> encode -> index    -> Prisma's table with controls -> one HTML page

Everything goes into one folder; each stage goes on where it was when it is run again:

    OUT/store  OUT/coders/NAME  OUT/codes/NAME  OUT/index/NAME  OUT/eval.jsonl  OUT/report.html

What `vitrail recover` found is on the page too, where it lies in OUT/recovery.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones import Backbone
from vitrail.coders import MultiSource, SparseCoder, Transcoder, coder_metadata, load_coder, make_coder
from vitrail.codes import CodeStore, encode
from vitrail.concepts import table as names_table
from vitrail.concepts.table import Concept
from vitrail.files import json_digest, replacing, tensors_digest
from vitrail.images import ImageSource, open_images
from vitrail.index import Index, build_index
from vitrail.metrics.dead import dead_at_end_of_training
from vitrail.metrics.faithfulness import causal_faithfulness
from vitrail.metrics.groups import chosen
from vitrail.metrics.heads import Head
from vitrail.metrics.linear_probe import LinearProbe, ProbeAgreement, fit_linear_probe
from vitrail.metrics.places import place_in
from vitrail.progress import SILENT, Progress
from vitrail.provenance import VERSION
from vitrail.store import ActivationStream, Store, extract
from vitrail.store.joined import JoinedSource, Part
from vitrail.studies.prisma_table import Coders, Row, prisma_table
from vitrail.studies.report import Indexed, write_report
from vitrail.studies.truth_concepts import read_concepts
from vitrail.studies.truth_recovery import truth_recovery
from vitrail.training import TrainConfig, train

CONTROL_ROWS = 20_000
HELD_OUT_ROWS = 16_384
TRUTH_PATCHES = 16  # of each picture, drawn at random: where controls are dense, all of them are more than it takes


@dataclass(frozen=True)
class CoderPlan:
    """A coder to train: its name in tables, its architecture, and the constructor's arguments but d_in."""

    name: str
    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None  # instead of the training config's


def first_look(
    backbone: Backbone,
    out: str | Path,
    *,
    train_images: ImageSource,
    eval_images: ImageSource,
    held_out_images: ImageSource,
    point: str,
    plans: Sequence[CoderPlan],
    config: TrainConfig,
    head: Head | None,
    tokens: str = "all",
    batch_size: int = 4096,
    eval_limit: int | None = None,
    title: str = "",
    notes: Sequence[str] = (),
    truth: tuple[ImageSource, ImageSource] | None = None,
    n_workers: int = 0,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Run every stage and write OUT/report.html. Returns the table's rows as they are in OUT/eval.jsonl.

    The three image sets must not overlap: coders learn from `train_images`, inference thresholds from
    `held_out_images`, and the table is of `eval_images`. `truth`: pictures of which everything is known, to choose each
    concept's latent on and to score it on; the page then says what each latent stands for (OUT/recovery).
    """
    out = Path(out)
    store = extract(
        backbone, train_images, [point], out / "store", tokens=tokens, n_workers=n_workers, seed=seed, progress=progress
    )
    coders = {}
    for plan in plans:
        source = store.reader(point, batch_size=batch_size, seed=seed)
        coder = make_coder(plan.architecture, d_in=source.d_in, **plan.arguments)
        trained = train(
            coder.to(next(backbone.parameters()).device),
            source,
            out / "coders" / plan.name,
            config=config if plan.lr is None else replace(config, lr=plan.lr),
            held_out=HeldOut(backbone, held_out_images, point, tokens, n_workers, seed),
            metadata=coder_about(store, point, tokens),
            progress=progress,
        )
        coders[plan.name] = trained.coder
        encode_and_index(trained.coder, store, out, plan.name, progress)
    rows = evaluate(
        out / "eval.jsonl",
        backbone,
        eval_images,
        coders,
        replace_rows=True,
        point=point,
        tokens=tokens,
        head=head,
        control_sample=control_sample(store, point, tokens, seed=seed),
        limit=eval_limit,
        n_workers=n_workers,
        seed=seed,
        progress=progress,
    )
    if truth is not None:
        truth_recovery(
            backbone,
            *truth,
            coders,
            out / "recovery",
            point=point,
            tokens=tokens,
            control_sample=control_sample(store, point, tokens, seed=seed),
            patches_per_image=TRUTH_PATCHES,
            n_workers=n_workers,
            seed=seed,
            replace_rows=True,
            progress=progress,
        )
    report_folder(out, title=title or f"{backbone.name}, {point}", notes=notes, images=train_images, progress=progress)
    return rows


def coder_about(store: Store, point: str, tokens: str) -> dict[str, Any]:
    """What a saved coder must say of its data, so that it can be used on the right model at the right place."""
    request = store.manifest.request
    return {
        "point": point,
        "tokens": store.kind(point, None if tokens == "all" else tokens),
        "store": str(store.path.resolve()),
        "store_digest": store.digest,
        **{
            name: request[name]
            for name in ("backbone", "backbone_digest", "images", "images_fingerprint", "preprocess")
        },
    }


class HeldOut:
    """Activations of held-out images, about HELD_OUT_ROWS rows; made when asked for, so a finished run costs none."""

    def __init__(
        self, backbone: Backbone, images: ImageSource, point: str, tokens: str, n_workers: int, seed: int
    ) -> None:
        self._made = (backbone, images, point, tokens, n_workers, seed)

    def __iter__(self) -> Iterator[Float[Tensor, "n d_in"]]:
        backbone, images, point, tokens, n_workers, seed = self._made
        stream = ActivationStream(
            backbone, images, point, tokens=tokens, window_images=256, stats_images=16, n_workers=n_workers, seed=seed
        )
        n_rows = 0
        for batch in stream:
            yield batch
            n_rows += len(batch)
            if n_rows >= HELD_OUT_ROWS:
                return


def encode_and_index(coder: SparseCoder, store: Store, out: Path, name: str, progress: Progress) -> Index:
    codes = encode(coder, store, out / "codes" / name, coder_path=out / "coders" / name, progress=progress)
    return build_index(codes, out / "index" / name, progress=progress)


def control_sample(
    store: Store, point: str | None, tokens: str | None, *, seed: int, n_rows: int = CONTROL_ROWS
) -> Float[Tensor, "n d_in"]:
    """Training rows on which controls are fitted."""
    reader = store.reader(point, tokens=tokens, batch_size=n_rows, seed=seed, prefetch=0)
    return next(iter(reader))


def probe_of(store: Store, point: str | None, tokens: str | None, *, seed: int = 0) -> LinearProbe:
    """A linear probe of a store's labelled images, one row each. Raises ValueError where an image has several rows, or
    no label.
    """
    point = store.default_point(point)
    kind = store.kind(point, tokens)
    if store.tokens_per_image(point, kind) != 1:
        raise ValueError(
            f"a linear probe reads one row an image, and {store.path} holds {store.tokens_per_image(point, kind)} of "
            f"{point} ({kind}). It is for coders of image embeddings, of CLS tokens or of pooled rows."
        )
    labels = store.images()["label"][: store.n_images].tolist()
    if None in labels:
        raise ValueError(f"a linear probe needs labels, and image {labels.index(None)} of {store.path} has none.")
    rows = torch.cat([x[:, 0].float() for _, x in store.image_batches(point, kind)])
    return fit_linear_probe(rows, torch.tensor(labels, dtype=torch.long), seed=seed)


def joined_sample(
    about: Mapping[str, Any], store: Store | None = None, *, seed: int, n_rows: int = CONTROL_ROWS
) -> Float[Tensor, "n d_row"]:
    """The same for a transcoder or crosscoder: rows of all its points side by side, as its metadata names them.
    `store`: instead of the one that holds the first.
    """
    first = about["parts"][0]
    parts = [
        Part(
            store if store and part["store"] == first["store"] else Store.open(part["store"]),
            part["point"],
            part["tokens"],
        )
        for part in about["parts"]
    ]
    return next(iter(JoinedSource(parts, batch_size=n_rows, seed=seed, prefetch=0)))


def evaluate(
    path: Path,
    backbone: Backbone,
    images: ImageSource,
    coders: Coders,
    *,
    replace_rows: bool = False,
    metrics: str = "",
    faithfulness: int = 0,
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
    probe: LinearProbe | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Prisma's table, and the `metrics` of metrics/groups.py in the same pass, as JSON lines in `path`. A file of rows
    measured on the same inputs is read back instead; one of other rows is refused, unless `replace_rows`.

    `faithfulness`: on so many images also necessity and sufficiency of what attribution names (faithfulness.py),
    of SAEs, which a head is needed for. `metadata`: of coders by name, for what training says of dead latents.
    `probe`: a linear probe of the same rows, for what it makes of reconstructions (`probe_of`).
    """
    kinds = chosen(metrics)
    also: dict[str, Any] = ({"metrics": list(kinds)} if kinds else {}) | (
        {"faithfulness": faithfulness} if faithfulness else {}
    )
    if probe is not None:
        also["probe"] = tensors_digest({"weight": probe.weight, "bias": probe.bias, "mean": probe.mean})
    asked = request_of(backbone, images, coders, {**options, **also})
    if path.is_file():
        rows = read_rows(path)
        if rows and all(row.get("request") == asked for row in rows):
            return rows
        if rows and not replace_rows:
            raise ValueError(f"{path} holds rows of another evaluation. Choose another file, or delete it.")
    factories = [kind.make for kind in kinds.values()]
    factories += [] if probe is None else [lambda setting: ProbeAgreement(setting, probe=probe)]
    table: list[Row] = prisma_table(backbone, images, coders, metrics=factories, **options)
    rows = [{**row.to_json(), "request": asked} for row in table]
    for row in rows:
        dead = dead_at_end_of_training((metadata or {}).get(row["name"], {}))
        if dead is not None:
            row["measured"]["dead_train"] = dead.to_json()
    if faithfulness:
        _add_faithfulness(rows, backbone, images, coders, faithfulness, options)
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows


def _add_faithfulness(
    rows: list[dict[str, Any]],
    backbone: Backbone,
    images: ImageSource,
    coders: Coders,
    n_images: int,
    options: Mapping[str, Any],
) -> None:
    if options.get("head") is None:
        raise ValueError("faithfulness asks what the model answers: give a head.")
    shared = {name: options[name] for name in ("n_workers", "n_bootstrap", "seed", "progress") if name in options}
    where = {"point": options["point"], "tokens": options["tokens"], "head": options["head"]}
    for row in rows:
        coder = coders.get(row["name"])
        if isinstance(coder, SparseCoder) and not isinstance(coder, Transcoder | MultiSource):
            measured, curves, cost = causal_faithfulness(backbone, images, coder, limit=n_images, **where, **shared)
            row["measured"] |= {name: one.to_json() for name, one in measured.items()}
            row["curves"] = {**row.get("curves", {}), **curves}
            row["cost"] = {**row["cost"], "faithfulness": cost}


def request_of(backbone: Backbone, images: ImageSource, coders: Coders, options: Mapping[str, Any]) -> str:
    """A digest of everything that decides the table's numbers."""
    sample, head = options.get("control_sample"), options.get("head")
    plain = {k: v for k, v in options.items() if k not in ("control_sample", "head", "progress", "n_workers")}
    later = ("target_point", "points", "random_backbone")  # options that did not always exist: unsaid is as before
    plain = {k: v for k, v in plain.items() if k not in later or v}
    return json_digest(
        {
            **plain,
            "backbone": [backbone.digest, backbone.preprocess.to_json()],
            "images": images.fingerprint(),
            "coders": {name: _said_of(coder) for name, coder in coders.items()},
            "vitrail": VERSION,
            "control_sample": None if sample is None else tensors_digest(_as_mapping(sample)),
            "head": None if head is None else [head.kind, head.logit_scale, head_digest(head)],
        }
    )


def _said_of(coder: SparseCoder | Mapping[str, SparseCoder]) -> Any:
    """Name, configuration and digest; of a set, those of each point."""
    if isinstance(coder, SparseCoder):
        return [coder.name, coder.config, tensors_digest(coder.state_dict())]
    return {point: _said_of(one) for point, one in coder.items()}


def _as_mapping(sample: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"x": sample} if isinstance(sample, Tensor) else sample


def head_digest(head: Head) -> str:
    return tensors_digest({name: value for name, value in vars(head).items() if isinstance(value, torch.Tensor)})


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `vitrail eval` first.")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a table that `vitrail eval` wrote: {error}.") from error


def _names(folder: Path, codes: CodeStore) -> dict[int, Concept] | None:
    """Of `vitrail name`, where it was run. Raises ValueError where it was run on another coder."""
    if not (folder / "concepts.parquet").is_file():
        return None
    named, coder = names_table.coder_of_names(folder), codes.manifest.request["coder_digest"]
    if named not in (None, coder):
        raise ValueError(f"{folder} names another coder than {codes.path} are codes of. Name again, or delete it.")
    return names_table.best_of(names_table.read_concepts(folder))


def report_folder(
    out: str | Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    images: ImageSource | None = None,
    progress: Progress = SILENT,
) -> Path:
    """The page of a run folder: its table if there is one, and every coder that has codes and an index."""
    out, indexed, logs = Path(out), [], {}
    for folder in sorted((out / "index").glob("*")):
        codes, index = CodeStore.open(out / "codes" / folder.name), Index.open(folder)
        store = Store.open(out / "store" if (out / "store").is_dir() else codes.manifest.store)
        if codes.manifest.request["store_digest"] != store.digest:
            raise ValueError(f"{codes.path} are codes of another store than {store.path}. Encode again.")
        if index.manifest["codes_digest"] != codes.manifest.digest:
            raise ValueError(f"{folder} is an index of other codes than {codes.path}. Index again.")
        concepts = None
        if (out / "recovery" / folder.name / "concepts.json").is_file():
            coder_digest, concepts = read_concepts(out / "recovery" / folder.name)
            if coder_digest != codes.manifest.request["coder_digest"]:
                raise ValueError(
                    f"{out / 'recovery' / folder.name} tells of another coder than {codes.path} are codes of. Recover "
                    "again, or delete it."
                )
        names = _names(out / "concepts" / folder.name, codes)
        indexed.append(Indexed(name=folder.name, store=store, codes=codes, index=index, concepts=concepts, names=names))
        log = out / "coders" / folder.name / "log.jsonl"
        if log.is_file():
            logs[folder.name] = log
    if not indexed:
        raise ValueError(f"{out} holds no index: run `vitrail index` into {out}/index/NAME first.")
    request = indexed[0].store.manifest.request
    if images is None:
        images = open_images(request["images"])
    if images.fingerprint() != request["images_fingerprint"]:
        raise ValueError(
            f"{images.spec} holds other pictures than the store was made of: captions would stand under the wrong "
            "ones. Say with --images where the old ones are, or extract again."
        )
    rows = read_rows(out / "eval.jsonl") if (out / "eval.jsonl").is_file() else []
    return write_report(
        out / "report.html",
        title=title,
        rows=rows,
        indexed=indexed,
        images=images,
        logs=logs,
        notes=notes,
        progress=progress,
    )


def load_set(paths: Sequence[Path], device: torch.device) -> tuple[dict[str, SparseCoder], list[dict[str, Any]]]:
    """SAEs of several points of one model, to be put in together: by point, and what each says of itself."""
    about = [coder_metadata(path) for path in paths]
    for name in ("tokens", "backbone", "backbone_digest"):
        found = {str(one.get(name)) for one in about}
        if len(found) > 1:
            raise ValueError(f"these coders have different {name}s ({', '.join(sorted(found))}): they make no set.")
    points = [one["point"] for one in about]
    if len(set(points)) < len(points):
        raise ValueError(f"two of these coders are of {max(points, key=points.count)}: a set has one for each point.")
    return {one["point"]: load_coder(path, device=device) for path, one in zip(paths, about, strict=True)}, about


def set_sample(
    about: Sequence[Mapping[str, Any]], *, seed: int, n_rows: int = CONTROL_ROWS
) -> dict[str, Float[Tensor, "n _"]]:
    """Aligned training rows of a set's points. Their stores must hold the same images in the same order."""
    parts = [Part(Store.open(one["store"]), one["point"], one["tokens"]) for one in about]
    source = JoinedSource(parts, batch_size=n_rows, seed=seed, prefetch=0)
    rows = next(iter(source)).split(list(source.widths), 1)
    return {one["point"]: part for one, part in zip(about, rows, strict=True)}


def load_coders(paths: Sequence[Path], device: torch.device) -> tuple[dict[str, SparseCoder], dict[str, Any]]:
    """Coders by folder name, and what they share: point, tokens, backbone, store. Raises ValueError if they differ."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"two coders are called {max(names, key=names.count)!r}: give their folders different names.")
    coders = {name: load_coder(path, device=device) for name, path in zip(names, paths, strict=True)}
    about = [coder_metadata(path) for path in paths]
    shared = [{**one, **place_in(one)} for one in about]
    for name in ("point", "target_point", "points", "tokens", "backbone", "backbone_digest"):
        found = {str(one.get(name)) for one in shared}
        if len(found) > 1:
            raise ValueError(
                f"these coders have different {name}s ({', '.join(sorted(found))}): evaluate them one by one."
            )
    return coders, shared[0]
