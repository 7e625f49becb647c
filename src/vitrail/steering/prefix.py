"""Defense-Prefix: a learned token before the class name, on the text side of a dual encoder.

    text        "a photo of a [v] dog."        v (d,) takes the place of one token's embedding; nothing else is learned
    logits      scale cosine(image, text with v)
    loss        CE(logits of attacked images, their classes) + weight KL(p(clean) || p_v(clean))

The second term keeps the answers on clean images. Azuma & Matsui 2023 (arXiv:2304.04512) train v so, on random words
written on ImageNet; "Steering CLIP's vision transformer with sparse autoencoders", section 7.2.1, puts it beside an
edit of the image tower, which it does not touch: the two compose (SPEC row 129). Images enter by their embeddings
alone, so that an edit of the image tower may be in place, or not, while v is learned.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitrail.backbones.base import Backbone
from vitrail.backbones.text import OPENAI_SIMPLE, TextTower, class_embeddings
from vitrail.files import open_tensors, write_tensors
from vitrail.metrics.heads import ZeroShotHead
from vitrail.progress import SILENT, Progress

KEY = "prefix"
PLACEHOLDER = "a"  # a word that every tower reads as one token; its embedding is never used
_LAST_NAMES = ("token_embedding", "token_embed", "embed_tokens", "wte")


@dataclass(frozen=True, eq=False)
class Prefix:
    """`vector`: (d,) in the space of the text tower's token embeddings. `about`: where it is from, as JSON strings."""

    vector: Float[Tensor, " d"]
    about: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_tensors(Path(path), {KEY: self.vector}, metadata=self.about)


def load_prefix(path: str | Path) -> Prefix:
    """From safetensors, .npz or .npy: the array "prefix", or the only one there is, (d,) or (1, d).

    Raises FileNotFoundError, and ValueError for a file that holds anything else. No code in it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is no prefix here.")
    about: dict[str, str] = {}
    if path.suffix == ".safetensors":
        with open_tensors(path) as stored:
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
            about = dict(stored.metadata() or {})
    elif path.suffix in (".npz", ".npy"):
        arrays = _numpy_arrays(path)
    else:
        raise ValueError(f"a prefix is a .safetensors, .npz or .npy file, got {path.name}; pickles are not read.")
    chosen = arrays[KEY] if KEY in arrays else next(iter(arrays.values())) if len(arrays) == 1 else None
    if chosen is None:
        raise ValueError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}: name the prefix's array {KEY!r}.")
    vector = chosen.float().squeeze()
    if vector.ndim != 1 or not bool(torch.isfinite(vector).all()):
        raise ValueError(f"a prefix is one row of finite numbers, {path} holds {tuple(chosen.shape)}.")
    return Prefix(vector, about)


def _numpy_arrays(path: Path) -> dict[str, Tensor]:
    try:
        found: Any = np.load(path, allow_pickle=False)
        arrays = {name: found[name] for name in found.files} if path.suffix == ".npz" else {KEY: found}
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a readable array without pickles: {error}") from error
    if any(array.dtype.kind not in "fiu" for array in arrays.values()):
        raise ValueError(f"{path} holds something other than numbers.")
    return {name: torch.from_numpy(np.asarray(array, dtype=np.float32)) for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------------- in the tower


def token_embedding(backbone: Backbone) -> nn.Embedding:
    """The module that turns the text tower's tokens into rows.

    Raises ValueError for a model without a text tower, or whose tower has no such module of a known name (towers that
    embed texts elsewhere, such as SigLIP's from a library's pipeline, cannot take a prefix).
    """
    if backbone.text is None:
        raise ValueError(
            f"{backbone.name} has no text tower: a prefix needs one, class embeddings alone cannot take it."
        )
    found = [
        module
        for name, module in backbone.module.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _LAST_NAMES
    ]
    if len(found) != 1:
        raise ValueError(
            f"the text tower of {backbone.name} shows {len(found)} token embeddings ({' or '.join(_LAST_NAMES)}); a "
            "prefix takes the place of one token's, so exactly one is needed."
        )
    return found[0]


@contextmanager
def prefixed(backbone: Backbone, vector: Float[Tensor, " d"], *, words_before: str) -> Iterator[TextTower]:
    """While open, a text "BEFORE a NAME" has `vector` for the token "a". `words_before`: what stands before it."""
    module, tower = token_embedding(backbone), backbone.text
    assert tower is not None
    if vector.shape != (module.embedding_dim,):
        told = f"token embeddings of {backbone.name} are {module.embedding_dim} wide"
        raise ValueError(f"{told}, the prefix is {tuple(vector.shape)}.")
    place = _place(module, tower, words_before)

    def put(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        # Functional, so that autograd follows it into the vector.
        at = torch.arange(output.shape[1], device=output.device) == place
        return torch.where(at[:, None], vector.to(output), output)

    handle = module.register_forward_hook(put)
    try:
        yield tower
    finally:
        handle.remove()


def _place(module: nn.Module, tower: TextTower, words_before: str) -> int:
    """The position of the word after these: the first at which the tokens differ when one is added."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].detach().cpu()))
    try:
        with torch.no_grad():
            for text in (words_before, f"{words_before} {PLACEHOLDER}".strip()):
                tower.encode([text])
    finally:
        handle.remove()
    short, long = (tokens[0] for tokens in seen)
    length = min(len(short), len(long))
    differing = torch.nonzero(short[:length] != long[:length])
    return int(differing[0]) if len(differing) else length - 1


def prefixed_embeddings(
    backbone: Backbone,
    vector: Float[Tensor, " d"],
    class_names: Sequence[str],
    templates: Sequence[str] = OPENAI_SIMPLE,
) -> Float[Tensor, "n_classes d_embed"]:
    """`class_embeddings` with the prefix before each name. Gradients, where enabled, reach `vector`."""
    rows = []
    for template in templates:
        before, marked, _ = template.partition("{}")
        if not marked:
            raise ValueError(f"a template must hold {{}} where the class name goes, got {template!r}.")
        with prefixed(backbone, vector, words_before=before.strip()) as tower:
            rows.append(tower.encode([template.format(f"{PLACEHOLDER} {name}") for name in class_names]))
    return normalize(torch.stack(rows).mean(0), dim=1)


def prefixed_head(
    backbone: Backbone, prefix: Prefix, class_names: Sequence[str], templates: Sequence[str] = OPENAI_SIMPLE
) -> ZeroShotHead:
    """For any evaluation that takes a head: the text side with the prefix, whatever is done on the image side."""
    with torch.no_grad():
        classes = prefixed_embeddings(backbone, prefix.vector, class_names, templates)
    assert backbone.text is not None
    return ZeroShotHead(classes=classes, logit_scale=backbone.text.logit_scale)


# ----------------------------------------------------------------------------------------------------------- training


def train_prefix(
    backbone: Backbone,
    attacked: Float[Tensor, "n d_embed"],
    clean: Float[Tensor, "m d_embed"],
    right: Bool[Tensor, "n n_classes"],
    class_names: Sequence[str],
    *,
    templates: Sequence[str] = OPENAI_SIMPLE,
    weight: float = 3.0,
    n_steps: int = 200,
    batch_size: int = 128,
    lr: float = 0.02,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Prefix:
    """`attacked`, `clean`: image embeddings of training pictures. `right[i, c]`: class c is an answer for attacked i.

    The vector starts at the embedding of PLACEHOLDER. The tower's parameters stay as they are.
    Raises ValueError for shapes that do not fit or an attacked picture without a right answer.
    """
    if right.shape != (len(attacked), len(class_names)) or not bool(right.any(1).all()):
        raise ValueError(f"right must be ({len(attacked)}, {len(class_names)}) with an answer in each row.")
    module, tower = token_embedding(backbone), backbone.text
    assert tower is not None
    scale, generator = tower.logit_scale, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        plain = class_embeddings(tower, class_names, templates)
        before = (scale * normalize(clean.to(plain), dim=1) @ plain.T).log_softmax(1)
    vector = nn.Parameter(_start(module, tower, templates[0]))
    optimizer = torch.optim.Adam([vector], lr=lr)
    images = normalize(attacked.to(plain), dim=1), normalize(clean.to(plain), dim=1)
    losses = []
    with torch.enable_grad(), progress.task("prefix", n_steps, "steps") as task:
        for _ in range(n_steps):
            classes = prefixed_embeddings(backbone, vector, class_names, templates)
            i, j = (_some(len(one), batch_size, generator) for one in images)
            said = (scale * images[0][i] @ classes.T).log_softmax(1)
            share = right[i].to(said)
            defence = -(share / share.sum(1, keepdim=True) * said).sum(1).mean()
            after = (scale * images[1][j] @ classes.T).log_softmax(1)
            kept = (before[j].exp() * (before[j] - after)).sum(1).mean()
            (gradient,) = torch.autograd.grad(defence + weight * kept, [vector])
            vector.grad = gradient
            optimizer.step()
            losses.append(float(defence.detach()))
            task.advance(1)
    about = {"backbone": backbone.name, "template": templates[0], "seed": str(seed), "n_steps": str(n_steps)}
    about |= {"weight": str(weight), "loss_first": f"{losses[0]:.4f}", "loss_last": f"{losses[-1]:.4f}"}
    return Prefix(vector.detach().clone(), about)


def _some(n: int, size: int, generator: torch.Generator) -> Int[Tensor, " b"]:
    return torch.randperm(n, generator=generator)[:size]


def _start(module: nn.Embedding, tower: TextTower, template: str) -> Float[Tensor, " d"]:
    before = template.partition("{}")[0].strip()
    rows: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _arguments, output: rows.append(output.detach()))
    try:
        with torch.no_grad():
            tower.encode([f"{before} {PLACEHOLDER}".strip()])
    finally:
        handle.remove()
    return rows[0][0, _place(module, tower, before)].clone()
