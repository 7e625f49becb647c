"""Words a latent may be called by, as directions in a dual encoder's space.

    row of a word    mean over templates of the unit embeddings of template.format(word), made a unit vector
    centred row      (row - mean of all rows), made a unit vector: what tells this word from the others

Texts lie in a narrow cone of their own (Liang et al. 2022, arXiv:2203.02053), which the mean takes away; MSAE's
preprocessing of words does the same (appendix A; SPEC row 93). Lists come from the package ("everyday", "shapes") or
from any text file with a word or phrase a line, such as SpLiCE's LAION unigrams or CLIP-Dissect's 20,000 words.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import normalize

from vitrail.backbones.text import OPENAI_SIMPLE, TextTower
from vitrail.files import json_digest, read_tensors, write_tensors

LISTS = Path(__file__).parent / "words"
BUILT_IN = ("everyday", "shapes")
OF_CLASSES = "classes of the pictures"
UNIT_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """`words[j]` has the unit row `embeddings[j]`. `source`: where the words are from; `digest`: of words and rows'
    making, so that equal digests mean equal rows."""

    words: tuple[str, ...]
    embeddings: Float[Tensor, "n d_embed"]
    templates: tuple[str, ...]
    source: str
    digest: str

    @cached_property
    def centred(self) -> Float[Tensor, "n d_embed"]:
        """Unit rows less their mean. Raises ValueError where all words have the same row."""
        rows = self.embeddings - self.embeddings.mean(0)
        if not bool((torch.linalg.vector_norm(rows, dim=1) > 0).any()):
            raise ValueError(f"all {len(self.words)} words of {self.source} have one direction: give different words.")
        return normalize(rows, dim=1)

    @cached_property
    def place(self) -> dict[str, int]:
        return {word: j for j, word in enumerate(self.words)}


def read_words(source: str | Path) -> tuple[str, ...]:
    """The words of a file, or of a list of the package ("everyday", "shapes"). Each once, in order.

    A file has a word a line, where empty lines and those that begin with "# " are left out; a .json is a list of words.
    Raises FileNotFoundError, and ValueError for a file of fewer than two words: a name needs another to be compared
    with.
    """
    path = LISTS / f"{source}.txt" if str(source) in BUILT_IN else Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no word list {str(source)!r}: give a text file with a word a line, or {' or '.join(BUILT_IN)}."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}.") from error
    if path.suffix == ".json":
        lines = _json_words(path, text)
    else:
        lines = [line.strip() for line in text.splitlines() if not line.startswith("# ")]
    words = tuple(dict.fromkeys(line for line in lines if line))
    if len(words) < 2:
        raise ValueError(f"{path} holds {len(words)} words; a vocabulary needs two at least, one a line.")
    return words


@torch.no_grad()
def embed(
    tower: TextTower,
    words: Sequence[str],
    templates: Sequence[str] = OPENAI_SIMPLE,
    *,
    cache: str | Path | None = None,
    identity: str | None = None,
    skip_unknown: bool = False,
    source: str = "words",
    batch_size: int = 256,
) -> Vocabulary:
    """One unit fp32 row a word, on the CPU.

    `cache`: a folder; the same words, templates and tower are read back from it. `identity` tells towers apart
    (Backbone.digest); None: what the tower says of the first texts does. `skip_unknown`: words that the tower raises
    ValueError for (a toy's tower reads few) are left out, with a warning, unless fewer than two are left.
    """
    words, templates = tuple(words), tuple(templates)
    if len(set(words)) < max(2, len(words)):
        raise ValueError(
            f"a vocabulary is two words at least, each once; got {len(words)}, {len(set(words))} different."
        )
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"a template must hold {{}} where the word goes, got {template!r}.")
    if not templates:
        raise ValueError('templates is empty: give at least one, such as "{}".')
    path, digest = None, json_digest([words, templates, identity])
    if cache is not None:
        digest = json_digest([words, templates, identity or _voice(tower, words, templates)])
        path = Path(cache) / f"vocabulary-{digest[:24]}.safetensors"
        if path.is_file():
            found = read_tensors(path, "vocabulary")
            kept = tuple(words[j] for j in found["kept"].tolist())
            _say_unknown(words, kept)
            return Vocabulary(kept, found["embeddings"], templates, source, digest)
    parts, kept = [], []
    for start in range(0, len(words), batch_size):
        rows, known = _rows(tower, words[start : start + batch_size], templates, skip_unknown=skip_unknown)
        parts.append(rows)
        kept += [start + j for j in known]
    if len(kept) < 2:
        raise ValueError(f"the text tower reads {len(kept)} of {len(words)} words; two at least are needed.")
    embeddings = torch.cat([rows for rows in parts if len(rows)])
    if path is not None:
        write_tensors(path, {"embeddings": embeddings, "kept": torch.tensor(kept)})
    names = tuple(words[j] for j in kept)
    _say_unknown(words, names)
    return Vocabulary(names, embeddings, templates, source, digest)


def stored_vocabulary(
    words: Sequence[str], rows: Path | Float[np.ndarray, "n d_embed"], *, source: str, d_embed: int | None = None
) -> Vocabulary:
    """Of embeddings that were made elsewhere: a .npy file or an array, one unit row a word.

    `d_embed`: the width of the space that the rows should be in. Raises ValueError if there are not as many rows as
    words, and for rows of another width, with NaN or infinite values, or all zeros; rows become unit rows,
    with a warning where those of a file are not (to 1 %: half precision).
    """
    where = str(rows) if isinstance(rows, Path) else source
    array = _loaded(rows) if isinstance(rows, Path) else rows
    words = tuple(words)
    if array.ndim != 2:
        raise ValueError(f"embeddings must be (n_words, d_embed), a row a word; {where} has shape {array.shape}.")
    if len(array) != len(words):
        turned = " They lie in columns: transpose them." if array.shape[1] == len(words) else ""
        raise ValueError(f"{where} has {len(array)} rows, and there are {len(words)} words: one row a word.{turned}")
    if len(set(words)) < max(2, len(words)):
        raise ValueError(
            f"a vocabulary is two words at least, each once; got {len(words)}, {len(set(words))} different."
        )
    if d_embed is not None and array.shape[1] != d_embed:
        raise ValueError(
            f"{where} has {array.shape[1]} columns, the model's image embedding {d_embed}: "
            "take the words as this model's own text tower embeds them."
        )
    array = np.asarray(array, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        raise ValueError(f"the row of {words[bad[0]]!r} in {where} has NaN or infinite values.")
    lengths = np.linalg.norm(array, axis=1)
    if not lengths.all():
        raise ValueError(f"the row of {words[int(lengths.argmin())]!r} in {where} is all zeros: it has no direction.")
    if isinstance(rows, Path) and np.abs(lengths - 1).max() > UNIT_TOLERANCE:
        warnings.warn(
            f"rows of {where} have lengths {lengths.min():.4g} to {lengths.max():.4g}, not 1: only directions count. "
            "If they were meant to be unit rows, look whether words lie in columns.",
            stacklevel=2,
        )
    embeddings = normalize(torch.from_numpy(array), dim=1)
    return Vocabulary(words, embeddings, (), source, json_digest([list(words), embeddings.tolist()]))


def class_vocabulary(
    embeddings: Float[Tensor, "n d_embed"], labels: Int[np.ndarray, " n"], classes: Sequence[str]
) -> Vocabulary:
    """For backbones without a text tower: a class's row is the mean of its pictures' unit embeddings, made a unit one.

    Classes without pictures are left out (label -1 is none). Raises ValueError if fewer than two have any.
    """
    seen = [label for label in range(len(classes)) if bool((labels == label).any())]
    if len(seen) < 2:
        raise ValueError(f"class names need pictures of two classes at least, got {len(seen)}.")
    rows = torch.stack([embeddings[torch.from_numpy(labels == label)].mean(0) for label in seen])
    names = tuple(classes[label] for label in seen)
    rows = normalize(rows, dim=1)
    return Vocabulary(names, rows, (), OF_CLASSES, json_digest([names, rows.tolist()]))


def _json_words(path: Path, text: str) -> list[str]:
    try:
        told = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(told, list) or not all(isinstance(word, str) for word in told):
        raise ValueError(f'{path} must be a list of words, ["zebra", "bear", ...].')
    return [word.strip() for word in told]


def _loaded(path: Path) -> Shaped[np.ndarray, "..."]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it should hold a row a word.")
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is no .npy file of numbers: {error}.") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"{path} is no .npy file of numbers, (n_words, d_embed).")
    return array


def _rows(
    tower: TextTower, words: Sequence[str], templates: Sequence[str], *, skip_unknown: bool
) -> tuple[Float[Tensor, "m d_embed"], list[int]]:
    """Rows of the words that can be read, and their places."""
    texts = [template.format(word) for word in words for template in templates]
    try:
        said = tower.encode(texts)
    except ValueError:
        if not skip_unknown:
            raise
        if len(words) == 1:
            return torch.zeros(0, 1), []
        each = [_rows(tower, [word], templates, skip_unknown=True) for word in words]
        known = [j for j, (rows, _) in enumerate(each) if len(rows)]
        return torch.cat([each[j][0] for j in known]) if known else torch.zeros(0, 1), known
    unit = normalize(said.float().cpu(), dim=1).reshape(len(words), len(templates), -1)
    return normalize(unit.mean(1), dim=1), list(range(len(words)))


def _voice(tower: TextTower, words: Sequence[str], templates: Sequence[str]) -> list[float]:
    """What tells this tower from others: the row of the first word it reads."""
    for word in words:
        rows, known = _rows(tower, [word], templates, skip_unknown=True)
        if known:
            return [round(value, 4) + 0.0 for value in rows[0].tolist()]
    return []


def _say_unknown(words: Sequence[str], kept: Sequence[str]) -> None:
    if len(kept) < len(words):
        left = [word for word in words if word not in set(kept)]
        warnings.warn(
            f"the text tower does not read {len(left)} of {len(words)} words, which are left out: "
            f"{', '.join(left[:5])}{', ...' if len(left) > 5 else ''}.",
            stacklevel=3,
        )
