"""OpenCLIP: image towers that are its own VisionTransformer or a timm trunk, with the text tower beside them.

The output is the image embedding before normalisation: what `encode_image(images)` gives.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitrail.backbones import timm
from vitrail.backbones.base import Backbone, Parts
from vitrail.backbones.checkpoints import load_exactly, read_weights
from vitrail.backbones.preprocess import Preprocess
from vitrail.backbones.text import TokenizedTextTower
from vitrail.backbones.torchvision_shim import ensure_torchvision
from vitrail.hooks import Site


def load(
    name: str,
    *,
    weights: Path | None = None,
    pretrained: bool | str | None = None,
    image_px: int | tuple[int, int] | None = None,
    allow_pickle: bool = False,
) -> Backbone:
    """ "ViT-B-32@openai": a model and the tag of its weights; "laion/CLIP-ViT-B-32-...": a repository on the hub.

    With `weights` the tag only says how the model was trained (OpenAI's need quick_gelu, and get it).
    """
    open_clip = _import()
    model_name, _, tag = name.partition("@")
    tag = pretrained if isinstance(pretrained, str) else tag
    if "/" in model_name and ":" not in model_name:
        model_name = f"hf-hub:{model_name}"
    if ":" not in model_name and model_name not in open_clip.list_models():
        nearest = difflib.get_close_matches(model_name, open_clip.list_models(), n=3, cutoff=0.0)
        raise KeyError(f"open_clip has no model {model_name!r}. Nearest: {', '.join(nearest)}.")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    from_hub = weights is None and pretrained is not False
    if ":" not in model_name and ((tag and tag not in tags) or (from_hub and not tag)):
        raise ValueError(f"open_clip/{name} must be open_clip/{model_name}@TAG with a TAG of {', '.join(tags)}.")
    model = open_clip.create_model(
        model_name,
        pretrained=(tag or None) if from_hub else None,
        load_weights=from_hub,
        pretrained_hf=False,
        force_quick_gelu=bool(tag) and bool((open_clip.get_pretrained_cfg(model_name, tag) or {}).get("quick_gelu")),
        force_image_size=image_px,
    )
    if weights is not None:
        state = _converted(read_weights(weights, allow_pickle=allow_pickle), model)
        load_exactly(model, state, what=f"open_clip/{name}")
    return wrap(model, name=f"open_clip/{name}", tokenizer=lambda: open_clip.get_tokenizer(model_name))


def wrap(
    model: nn.Module,
    *,
    name: str,
    preprocess: Preprocess | None = None,
    tokenizer: Callable[[], Callable[..., Any]] | None = None,
) -> Backbone:
    """An open_clip CLIP, CustomTextCLIP or CoCa as a Backbone. `tokenizer`: makes one; default, CLIP's own."""
    open_clip = _import()
    own: Any = model
    visual = own.visual
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        parts, (n_cls, n_registers, patch_px) = _native(visual), (1, 0, visual.patch_size[0])
        if not visual.transformer.batch_first or visual.patch_size[0] != visual.patch_size[1]:
            raise ValueError(f"{name} must have batch_first=True and square patches.")
    elif isinstance(visual, open_clip.timm_model.TimmModel):
        timm.require_understood(visual.trunk, f"{name} (its timm trunk)")
        parts = timm.parts(visual.trunk, project=visual.head)
        n_cls, n_registers, patch_px = timm.tokens_of(visual.trunk, name)
    else:
        raise ValueError(
            f"{name} has an image tower of class {type(visual).__name__}. Of open_clip, vitrail opens "
            "VisionTransformer and TimmModel."
        )
    text = TokenizedTextTower(
        name=name,
        tokenizer=tokenizer or (lambda: open_clip.SimpleTokenizer(context_length=own.context_length)),
        embed=own.encode_text,
        log_scale=lambda: own.logit_scale,
    )
    return Backbone(
        model,
        parts,
        name=name,
        preprocess=preprocess or _preprocess(visual, name),
        patch_px=patch_px,
        n_cls=n_cls,
        n_registers=n_registers,
        has_head=False,
        text=text,
    )


def _import() -> Any:
    ensure_torchvision()
    try:
        import open_clip
        import open_clip.timm_model
        import open_clip.transformer
    except ImportError as error:
        raise ImportError('OpenCLIP models need open-clip-torch: pip install "vitrail[open-clip]".') from error
    return open_clip


def _native(visual: Any) -> Parts:
    def pool(tokens: Tensor) -> Tensor:
        pooled, _ = visual._pool(tokens)
        return pooled if visual.proj is None else pooled @ visual.proj

    return Parts(
        embed=visual._embeds,
        blocks=tuple(visual.transformer.resblocks),
        pool=pool,
        head=lambda embedding: embedding,
        patches=Site(visual.conv1, "output", layout="channels_first"),
        full_embed=Site(visual.ln_pre, "input"),
        ln_final=Site(visual.ln_post, "output"),
    )


def _preprocess(visual: Any, name: str) -> Preprocess:
    config = getattr(visual, "preprocess_cfg", None) or {}
    defaults = _import().transform.PreprocessCfg()
    mode = config.get("resize_mode", defaults.resize_mode)
    if mode not in ("shortest", "squash"):
        raise ValueError(f"{name} wants resize_mode {mode!r}, which is not understood; pass preprocess= to wrap().")
    size = visual.image_size
    return Preprocess.of(
        (size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(config.get("mean", defaults.mean)),
        std=tuple(config.get("std", defaults.std)),
        resize="squash" if mode == "squash" else "shorter_side",
        interpolation=config.get("interpolation", defaults.interpolation),
    )


def _converted(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """As open_clip's own load_checkpoint does: foreign names, positions resampled, buffers of old versions dropped."""
    import open_clip.convert
    import open_clip.model

    state = dict(open_clip.convert.convert_state_dict(model, state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if name in state and own is not None:
            state[name] = state[name].reshape(own.shape)
    state.pop("text.transformer.embeddings.position_ids", None)
    open_clip.model.resize_pos_embed(state, model)
    open_clip.model.resize_text_pos_embed(state, model)
    return state
