"""Hugging Face transformers: CLIP, SigLIP, ViT (DINO's weights too) and DINOv2 with and without registers.

The output is the logits of a classifier, `image_embeds` of CLIP and SigLIP, or else `pooler_output`; for a ViTModel
without a pooler, the CLS token after the final norm. Tried with transformers 4.57 and 5.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitrail.backbones.base import Backbone
from vitrail.backbones.checkpoints import read_weights
from vitrail.backbones.huggingface_families import BY_TYPE, FAMILIES, UNDERSTOOD
from vitrail.backbones.huggingface_preprocess import preprocess_of
from vitrail.backbones.preprocess import Preprocess
from vitrail.backbones.text import TokenizedTextTower
from vitrail.backbones.torchvision_shim import ensure_torchvision


def load(
    name: str,
    *,
    weights: Path | None = None,
    pretrained: bool | str | None = None,
    image_px: int | tuple[int, int] | None = None,
    allow_pickle: bool = False,
) -> Backbone:
    """A repository on the hub, or a folder with config.json and model.safetensors. `weights`: another file for it."""
    if isinstance(pretrained, str):
        raise ValueError(
            f"a repository holds one set of weights: pretrained must be True or False, got {pretrained!r}."
        )
    transformers = _import()
    full_name = f"hf/{name}"
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{name} is not a folder with a config.json here, nor to be had from the hub: {reason}"
        ) from error
    architecture = _architecture(config, full_name)
    cls = getattr(transformers, architecture)
    if weights is not None:
        state = read_weights(weights, allow_pickle=allow_pickle)
        model = _filled(cls, full_name, strict=True, config=config, state_dict=state)
    elif pretrained is False:
        model = cls(_own_config(cls, config))
    else:
        model = _filled(cls, full_name, source=name, use_safetensors=None if allow_pickle else True)
    size = (image_px, image_px) if isinstance(image_px, int) else image_px
    preprocess = preprocess_of(FAMILIES[architecture].name, _vision_config(model), source=name, image_px=size)
    return wrap(model.float(), name=full_name, preprocess=preprocess, tokenizer_source=name)


def wrap(
    model: nn.Module, *, name: str, preprocess: Preprocess | None = None, tokenizer_source: str | None = None
) -> Backbone:
    """A transformers model as a Backbone. `tokenizer_source`: repository or folder of the text tower's tokenizer."""
    architecture = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)
    if architecture is None:
        raise ValueError(f"{name} is a {type(model).__name__}. {UNDERSTOOD}")
    family, config = FAMILIES[architecture], _vision_config(model)
    preprocess = preprocess or preprocess_of(family.name, config)
    n_cls = int(family.name != "siglip")
    text = None
    if hasattr(model, "text_model"):
        text = _text_tower(model, name, tokenizer_source)
    names = getattr(model.config, "id2label", None) if architecture.endswith("ForImageClassification") else None
    class_names = tuple(names[i] for i in range(len(names))) if names else ()
    if all(class_name == f"LABEL_{i}" for i, class_name in enumerate(class_names)):  # transformers' placeholders
        class_names = ()
    return Backbone(
        model,
        family.parts(model, preprocess.image_px != _square(config.image_size)),
        name=name,
        preprocess=preprocess,
        patch_px=config.patch_size,
        n_cls=n_cls,
        n_registers=getattr(config, "num_register_tokens", 0),
        has_head=architecture.endswith("ForImageClassification"),
        class_names=class_names,
        text=text,
    )


def _import() -> Any:
    ensure_torchvision()
    try:
        import transformers
    except ImportError as error:
        raise ImportError('Hugging Face models need transformers: pip install "vitrail[hf]".') from error
    return transformers


def _architecture(config: Any, name: str) -> str:
    for architecture in config.architectures or ():
        if architecture in FAMILIES:
            return architecture
    if config.model_type not in BY_TYPE:
        found = (config.architectures or [config.model_type])[0]
        raise ValueError(f"{name} is a {found}. {UNDERSTOOD}")
    return BY_TYPE[config.model_type]


def _own_config(cls: Any, config: Any) -> Any:
    """A vision tower alone, described by the config of the dual encoder it comes from."""
    return config if isinstance(config, cls.config_class) else config.vision_config


def _filled(
    cls: Any, name: str, *, strict: bool = False, source: str | None = None, config: Any = None, **arguments: Any
) -> Any:
    """from_pretrained, refusing weights that leave some of the model random (`strict`: or that are left over)."""
    if config is not None:
        arguments["config"] = _own_config(cls, config)
    with _quiet():
        model, info = cls.from_pretrained(source, output_loading_info=True, **arguments)
        missing = set(info["missing_keys"])
        if missing and all(key.startswith("pooler.") for key in missing) and cls.__name__ == "ViTModel":
            # DINO's checkpoints have no pooler; a random one would be put behind the model.
            model, info = cls.from_pretrained(source, output_loading_info=True, add_pooling_layer=False, **arguments)
            missing = set(info["missing_keys"])
    problems = {
        "missing": missing,
        "unexpected": info["unexpected_keys"] if strict else (),
        "of another shape": [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]],
    }
    found = [f"{kind}: {', '.join(sorted(keys)[:6])}" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"these weights are not those of {name}, a {cls.__name__}. {'; '.join(found)}.")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a progress bar and prints a table of keys; `_filled` says what matters of them."""
    log = _import().utils.logging
    bars, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _vision_config(model: Any) -> Any:
    return getattr(model.config, "vision_config", model.config)


def _square(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _text_tower(model: Any, name: str, source: str | None) -> TokenizedTextTower:
    length = model.config.text_config.max_position_embeddings

    def tokenizer() -> Callable[[list[str]], Tensor]:
        if source is None:
            raise ValueError("wrap() was given no tokenizer_source")
        tokenize = _import().AutoTokenizer.from_pretrained(source)
        # To full length always: SigLIP reads its embedding off the last position, padding or not.
        keywords = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return lambda texts: tokenize(texts, **keywords)["input_ids"]

    def embed(ids: Tensor) -> Tensor:
        features = model.get_text_features(input_ids=ids)
        return features if isinstance(features, Tensor) else features.pooler_output

    return TokenizedTextTower(name=name, tokenizer=tokenizer, embed=embed, log_scale=lambda: model.logit_scale)
