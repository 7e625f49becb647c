"""Publish a coder, and fetch one: a Hugging Face repository, or a folder anywhere.

    hub:OWNER/NAME[@REVISION][/SUBFOLDER]        file:FOLDER

What travels is coder.json, weights.safetensors and a model card, README.md. All three are data: a coder that was pulled
is opened by `load_coder`, which runs none of its author's code. Names of folders on this machine do not travel: what
coder.json says of stores and pictures is cut to the last part of its path.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.coders.checkpoint import coder_metadata
from vitrail.files import file_digest, read_json, read_tensors, replacing, tensors_digest, write_json

CODER, WEIGHTS, CARD = "coder.json", "weights.safetensors", "README.md"
HUB = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<subfolder>[\w./ -]+?))?/?")
LOCAL_PATH = re.compile(r"(?<![\w.])(?:~?/|[A-Za-z]:\\)(?:[^\s?\"']*[/\\])?(?=[^\s?/\\\"'])")


@dataclass(frozen=True)
class HubAddress:
    """A place in a repository of the hub."""

    repo: str
    revision: str | None = None
    subfolder: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hub:{self.repo}{revision}" + (f"/{self.subfolder}" if self.subfolder else "")


def push(
    coder: Path | str, to: str, *, table: Path | str | None = None, private: bool = False, license: str | None = None
) -> str:
    """Publish a coder folder; the address to pull it from. `table`: an eval.jsonl whose row goes on the card.

    A README.md of the coder's own is kept. Raises FileNotFoundError or ValueError if the folder is not a whole coder.
    """
    folder, where = Path(coder), parse(to)
    check(folder)
    with tempfile.TemporaryDirectory() as made:
        ready = Path(made)
        shutil.copyfile(folder / WEIGHTS, ready / WEIGHTS)
        if (folder / CARD).is_file():
            shutil.copyfile(folder / CARD, ready / CARD)
        else:
            rows = rows_of(folder, None if table is None else Path(table))
            (ready / CARD).write_text(model_card(folder, str(where), rows=rows, license=license), encoding="utf-8")
        write_json(ready / CODER, without_local_paths(read_json(folder / CODER, "coder")))
        if isinstance(where, HubAddress):
            _upload(ready, where, private)
        else:
            _copy(ready, where)
    return str(where) if isinstance(where, HubAddress) else f"file:{where}"


def pull(address: str, *, cache: Path | str | None = None) -> Path:
    """The coder's folder on this machine, whole and as its author digested it. Open it with `load_coder`.

    `cache`: instead of huggingface_hub's own. What is there already is not fetched again.
    """
    where = parse(address)
    folder = where if isinstance(where, Path) else _download(where, None if cache is None else Path(cache))
    if not (folder / CODER).is_file():
        raise FileNotFoundError(f"{address} holds no {CODER}: there is no vitrail coder there. Is the subfolder right?")
    check(folder)
    return folder


def download_folder(address: str, names: Sequence[str], *, cache: Path | str | None = None) -> Path:
    """The folder on this machine that holds the files `names` of an address. FileNotFoundError names a missing one."""
    where = parse(address)
    folder = where if isinstance(where, Path) else _download(where, None if cache is None else Path(cache), names)
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{address} holds no {name}.")
    return folder


def parse(address: str) -> HubAddress | Path:
    """Raises ValueError for anything but the two forms."""
    if address.startswith("file:") and address != "file:":
        return Path(address.removeprefix("file:")).expanduser()
    found = HUB.fullmatch(address)
    subfolder = found["subfolder"] if found else None
    if found is None or (subfolder is not None and ".." in subfolder.split("/")):
        raise ValueError(
            f"{address!r} is no address of a coder. Use hub:OWNER/NAME, hub:OWNER/NAME@REVISION/SUBFOLDER or "
            f"file:FOLDER."
        )
    return HubAddress(found["repo"], found["revision"], subfolder)


def check(folder: Path) -> None:
    """Raises unless the folder holds a whole coder whose weights are those that coder.json describes."""
    coder_metadata(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing: the coder is not whole. Copy the folder again.")
    digest, recorded = file_digest(weights), read_json(folder / CODER, "coder")["weights_sha256"]
    if digest != recorded:
        raise ValueError(
            f"{weights} is not the file that {folder / CODER} describes: its sha256 begins {digest[:12]}, "
            f"{str(recorded)[:12]} is recorded. It was altered or cut short; fetch or copy it again."
        )


# -- the card


def model_card(folder: Path, address: str, *, rows: Sequence[dict[str, Any]] = (), license: str | None = None) -> str:
    """What the coder is, for whom finds it: front matter, where it belongs, how it measured, how to open it."""
    description = read_json(folder / CODER, "coder")
    about = without_local_paths(description["metadata"])
    name = address.removeprefix("file:").rstrip("/").rsplit("/", 1)[-1].split("@")[0]
    tags = ["vitrail", "sparse-autoencoder", "interpretability", "vision", description["architecture"]]
    front = [
        "---",
        "library_name: vitrail",
        *([f"license: {json.dumps(license)}"] if license else []),
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    facts = {
        "architecture": description["architecture"],
        "d_in, d_sae": f"{description['d_in']}, {description['d_sae']}",
        "hook point": about.get("point"),
        "tokens": about.get("tokens"),
        "backbone": about.get("backbone"),
        "backbone weights": _short(about.get("backbone_digest")),
        "trained on": about.get("images"),
        "normalisation": about.get("normalization"),
        "converted from": (about.get("origin") or {}).get("peer"),
        "weights (sha256)": description["weights_sha256"],
    }
    known = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value is not None]
    pulled = address if address.startswith("hub:") else "hub:OWNER/NAME"
    return "\n".join(
        [
            *front,
            "",
            f"# {name}",
            "",
            "A sparse coder of a vision transformer: it takes activations at one hook point apart into sparse latents.",
            "",
            "| | |",
            "|---|---|",
            *known,
            "",
            *_measured(rows),
            "## Open it",
            "",
            "```python",
            "from vitrail import load_coder",
            "from vitrail.hub import pull",
            f'coder = load_coder(pull("{pulled}"))',
            "```",
            "",
            "It takes activations of the hook point: `coder.encode(x)`, `coder(x)`. The files hold data only, no code.",
            *(f"\nNote: {note}." for note in (about.get("origin") or {}).get("notes", ())),
            "",
        ]
    )


def rows_of(folder: Path, table: Path | None = None) -> list[dict[str, Any]]:
    """This coder's rows of an eval.jsonl: of `table`, or of one beside the coder or in its run folder."""
    near = [folder / "eval.jsonl", folder.parent / "eval.jsonl", folder.parent.parent / "eval.jsonl"]
    found = next((path for path in near if path.is_file()), None) if table is None else table
    if found is None:
        return []
    if not found.is_file():
        raise FileNotFoundError(f"{found} is missing: there is no table here.")
    try:
        rows = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{found} is not a table that `vitrail eval` wrote: {error}.") from error
    digest = tensors_digest(read_tensors(folder / WEIGHTS, "coder's weights"))
    mine = [row for row in rows if isinstance(row, dict) and row.get("coder_digest") == digest]
    if table is not None and not mine:
        raise ValueError(f"{table} has no row of {folder}: it was measured on other weights.")
    return mine


def without_local_paths(value: Any) -> Any:
    """The same JSON, with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {name: without_local_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    return LOCAL_PATH.sub("", value) if isinstance(value, str) and "://" not in value else value


def _measured(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["## Measured", "", "| measure | value | 95 % interval | definition | images |", "|---|---|---|---|---|"]
    for row in rows:
        for name, measure in row.get("measured", {}).items():
            if measure is None or measure.get("value") is None:
                continue
            low, high = measure.get("low"), measure.get("high")
            interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
            cells = (name, f"{measure['value']:.4g}", interval, measure.get("definition", ""), measure.get("n", ""))
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return [*lines, ""]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _short(digest: Any) -> str | None:
    return None if digest is None else str(digest)[:12]


# -- the two places


def _copy(ready: Path, out: Path) -> None:
    there = out / CODER
    if there.is_file() and read_json(there, "coder").get("weights_sha256") != file_digest(ready / WEIGHTS):
        raise ValueError(f"{out} already holds another coder. Remove it, or choose another folder.")
    for name in (WEIGHTS, CARD, CODER):  # coder.json last: a folder with one is whole
        with replacing(out / name) as temporary:
            shutil.copyfile(ready / name, temporary)


def _upload(ready: Path, where: HubAddress, private: bool) -> None:
    hub = _huggingface_hub()
    if hub.get_token() is None:
        raise ValueError(f"no token to write to {where.repo}: run `hf auth login`, or set HF_TOKEN.")
    with _told(where):
        hub.create_repo(where.repo, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=where.repo,
            folder_path=ready,
            path_in_repo=where.subfolder,
            revision=where.revision,
            commit_message="vitrail: a sparse coder",
        )


def _download(where: HubAddress, cache: Path | None, names: Sequence[str] = (CODER, WEIGHTS, CARD)) -> Path:
    hub, prefix = _huggingface_hub(), f"{where.subfolder}/" if where.subfolder else ""
    with _told(where):
        snapshot = hub.snapshot_download(
            where.repo,
            revision=where.revision,
            cache_dir=cache,
            allow_patterns=[prefix + name for name in names],
        )
    return Path(snapshot) / (where.subfolder or "")


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "hub: addresses need huggingface_hub: pip install vitrail[hub]. file: addresses do not."
        ) from error
    return huggingface_hub


@contextmanager
def _told(where: HubAddress) -> Iterator[None]:
    """What the hub refuses, in a sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(f"{where.repo} is gated: ask for access on its page, then run `hf auth login`.") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no repository {where.repo} on the hub, or it is private: check the name, or run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{where.repo} has no revision {where.revision!r}.") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{where.repo!r} is not a name the hub allows: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ValueError(
            f"{where} is not in the cache, and the hub cannot be reached (HF_HUB_OFFLINE, or no network)."
        ) from error
    except errors.HfHubHTTPError as error:
        raise ValueError(f"the hub refused {where}: {str(error).splitlines()[0]}") from error
