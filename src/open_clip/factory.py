"""Models by name: construction, weights, image preparation and tokenizers, with OpenCLIP's calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import pretrained as pretrained_weights
from .build import build_image_tower as build_image_tower
from .build import build_model as build_model
from .configs import add_model_config as add_model_config
from .configs import list_models as list_models
from .hub import Source, parse_source
from .loss import create_loss as create_loss
from .model import CLIP
from .precision import DTYPES
from .tokenizer import HFTokenizer, SimpleTokenizer
from .weight_files import load_state_dict_file
from .weights import load_state, load_tower, proves_quick_gelu
from .whole_images import AugmentationCfg, PreprocessCfg, image_transform

log = logging.getLogger(__name__)

_MODEL_KEYS = ("init_logit_scale", "init_logit_bias")


def get_model_config(model_name: str) -> dict | None:
    """A copy of the config of a model, or None when there is no such model.

    Args:
        model_name: one of :func:`list_models`, ``hf-hub:REPOSITORY`` or ``local-dir:FOLDER``.
    """
    try:
        return parse_source(model_name).config()
    except (ValueError, FileNotFoundError):
        return None


def create_model(
    model_name: str,
    pretrained: str | Path | None = None,
    load_weights: bool = True,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    jit: bool = False,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | tuple[int, int] | None = None,
    force_preprocess_cfg: dict[str, Any] | None = None,
    force_context_length: int | None = None,
    pretrained_image: bool = False,
    pretrained_text: bool = True,
    pretrained_image_path: str | Path | None = None,
    pretrained_text_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    output_dict: bool | None = None,
    require_pretrained: bool = False,
    weights_only: bool = True,
    **model_kwargs: Any,
) -> CLIP:
    """Build a model and load its weights.

    Args:
        model_name: one of :func:`list_models`; ``hf-hub:OWNER/REPOSITORY`` (its config and weights are fetched);
            ``local-dir:FOLDER`` (``open_clip_config.json`` and weights that lie there).
        pretrained: a tag of :func:`list_pretrained` (downloaded), a checkpoint file in any layout, ``"eva"`` with
            ``cache_dir`` naming the file, or None / ``""``: random weights, or those beside a hub or local config.
        load_weights: False builds the model alone, whatever ``pretrained`` says.
        precision: ``"fp32"``; ``"fp16"`` / ``"bf16"`` (or ``pure_*``) store the weights so; ``amp*`` keep float32.
        device: where the model is put.
        jit: only False; compile the model with ``torch.compile`` or :func:`trace_model` instead.
        force_quick_gelu: use QuickGELU although the config does not say so. OpenAI's own files choose it themselves.
        force_custom_text: accepted for OpenCLIP's callers: the text tower is a module of its own in every model.
        force_patch_dropout: only 0, as dense maps need every patch.
        force_image_size: another native size, a side or (height, width); position embeddings are resized.
        force_preprocess_cfg: changes to the preparation of images: ``mean``, ``std``, ``interpolation``,
            ``resize_mode``, ``fill_color``.
        force_context_length: another number of tokens a text; text positions are resized.
        pretrained_image: start the image trunk from timm's own weights (timm trunks, without ``pretrained``).
        pretrained_text: accepted for OpenCLIP's callers; no text tower here has weights of its own.
        pretrained_image_path, pretrained_text_path: checkpoint files from which one tower is loaded, after the rest.
        cache_dir: folder of the download cache; with ``pretrained="eva"`` the checkpoint file.
        output_dict: whether the model's ``forward`` returns a dict.
        require_pretrained: raise an error instead of returning random weights.
        weights_only: only True: files are read without running the code in them.
        model_kwargs: ``init_logit_scale``, ``init_logit_bias``.

    Raises:
        ValueError: unknown model, tag, precision or option, or weights of another architecture.
        FileNotFoundError, RuntimeError: weights that are missing, damaged or cannot be fetched.
    """
    if precision not in DTYPES:
        raise ValueError(f'precision is "{precision}": use one of {", ".join(DTYPES)}')
    if jit:
        raise ValueError("jit=True is not offered: use torch.compile(model), or open_clip.trace_model(model)")
    if not weights_only:
        raise ValueError("weights_only=False would run code that a file brings along: leave it out")
    if force_patch_dropout:
        raise ValueError(f"force_patch_dropout is {force_patch_dropout}: dense maps need every patch, give 0")
    source = parse_source(model_name)
    config = source.config(cache_dir if pretrained != "eva" else None)
    of_file = pretrained and (str(pretrained) == "eva" or Path(pretrained).is_file())  # of any size, for all we know
    native = None if of_file else config["vision_cfg"].get("image_size")
    _force(config, model_kwargs, force_quick_gelu, force_image_size, force_context_length)
    file = _weights_file(source, pretrained, cache_dir, config) if load_weights else None
    if file is None and require_pretrained:
        raise ValueError(f"{model_name} is to have pretrained weights, and none are named: give a tag or a file")
    state = None if file is None else load_state_dict_file(file)
    if state is not None and proves_quick_gelu(state) and not config["quick_gelu"]:
        log.warning("%s is one of OpenAI's own files: %s is built with QuickGELU, as they need", file, model_name)
        config["quick_gelu"] = True
    config["preprocess_cfg"] = {**(config.get("preprocess_cfg") or {}), **(force_preprocess_cfg or {})}
    model = build_model(config, output_dict=bool(output_dict), pretrained_image=pretrained_image and state is None)
    if state is not None:
        resize = force_image_size is not None or force_context_length is not None
        load_state(model, state, source=str(file), resize=resize, image_size=native)
    elif not (pretrained_image or pretrained_image_path) and load_weights:
        log.warning("%s has random weights: no pretrained tag or file is given", model_name)
    for tower, path in (("visual", pretrained_image_path), ("text", pretrained_text_path)):
        if path is not None:
            load_tower(model, tower, path)
    return model.to(device=device, dtype=DTYPES[precision])


def _force(
    config: dict, model_kwargs: dict, quick_gelu: bool, image_size: int | tuple | None, context_length: int | None
) -> None:
    """Write what the caller forces into a config."""
    if unknown := sorted(set(model_kwargs) - set(_MODEL_KEYS)):
        raise TypeError(
            f"create_model has no argument {', '.join(unknown)}: beside its own it takes {', '.join(_MODEL_KEYS)}; "
            "other sizes are a config of their own (open_clip.add_model_config)"
        )
    config.update(model_kwargs)
    config["quick_gelu"] = bool(config.get("quick_gelu", False)) or quick_gelu
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size if isinstance(image_size, int) else tuple(image_size)
    if context_length is not None:
        config["text_cfg"]["context_length"] = context_length


def _names_a_start(file: str | Path) -> bool:
    return Path(file).name.startswith("EVA")


def _weights_file(
    source: Source, pretrained: str | Path | None, cache_dir: str | Path | None, config: dict
) -> Path | None:
    """The checkpoint file that ``pretrained`` means, downloaded if need be; None for random weights.

    A tag whose weights were trained with QuickGELU or with another preparation changes ``config`` accordingly.
    """
    if not pretrained:
        return source.weights(cache_dir)
    if str(pretrained) == "eva":
        if cache_dir is None:
            raise ValueError('pretrained="eva" takes the checkpoint file in cache_dir: give cache_dir=FILE')
        if not Path(cache_dir).is_file():
            tags = pretrained_weights.list_pretrained_tags_by_model(source.place)
            # A tag's weights are start models, no substitute for a distilled one that is missing.
            tag = f', or download it by its tag: pretrained="{tags[0]}"' if tags and _names_a_start(cache_dir) else ""
            raise FileNotFoundError(
                f'checkpoint {cache_dir} (cache_dir of pretrained="eva") does not exist: checkpoints/README.md says '
                f"where to get it, or which recipe makes it{tag}"
            )
        return Path(cache_dir)
    name = source.place
    if not source.scheme and pretrained_weights.is_pretrained_cfg(name, str(pretrained)):
        info = pretrained_weights.pretrained_info(name, str(pretrained))
        if info.quick_gelu:
            config["quick_gelu"] = True
        config["preprocess_cfg"] = {**(config.get("preprocess_cfg") or {}), **info.preprocess}
        return Path(pretrained_weights.download(name, str(pretrained), cache_dir=cache_dir))
    if Path(pretrained).is_file():
        return Path(pretrained)
    tags = ", ".join(pretrained_weights.list_pretrained_tags_by_model(name)) or "none"
    raise ValueError(f'pretrained "{pretrained}" is neither a file nor a tag of {name}: its tags are {tags}')


def load_checkpoint(
    model: CLIP,
    checkpoint_path: str | Path,
    strict: bool = True,
    weights_only: bool = True,
    device: str | torch.device = "cpu",
) -> Any:
    """Load a checkpoint file of any layout into a model, resizing positions where the sizes differ.

    Args:
        strict: only True: a file that does not fit is refused whole.
        weights_only: only True.
        device: accepted for OpenCLIP's callers: tensors are read on the CPU and copied to where the model is.

    Returns:
        What ``load_state_dict`` of torch returns: ``missing_keys`` and ``unexpected_keys``, both empty.

    Raises:
        ValueError: names or shapes differ from the model's; nothing has been loaded.
    """
    if not strict or not weights_only:
        raise ValueError("load_checkpoint loads strictly and without running code: leave strict and weights_only alone")
    return load_state(model, load_state_dict_file(checkpoint_path), source=str(checkpoint_path), resize=True)


def load_state_dict(
    checkpoint_path: str | Path, device: str | torch.device = "cpu", weights_only: bool = True
) -> dict[str, Tensor]:
    """Tensors of a checkpoint file on a device; see :func:`open_clip.weight_files.load_state_dict_file`."""
    if not weights_only:
        raise ValueError("weights_only=False would run code that a file brings along: leave it out")
    return {name: value.to(device) for name, value in load_state_dict_file(checkpoint_path).items()}


# -- models with what goes round them ---------------------------------------------------------------------------------


def _preprocess_overrides(
    mean: Sequence[float] | None, std: Sequence[float] | None, interpolation: str | None, resize_mode: str | None
) -> dict[str, Any]:
    given = {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": resize_mode}
    return {key: value for key, value in given.items() if value is not None}


def _transform(model: CLIP, is_train: bool, aug_cfg: dict | AugmentationCfg | None = None) -> Callable:
    cfg = PreprocessCfg.of(model.visual.preprocess_cfg)
    return image_transform(
        cfg.size, is_train, mean=cfg.mean, std=cfg.std, resize_mode=cfg.resize_mode, interpolation=cfg.interpolation,
        fill_color=cfg.fill_color, aug_cfg=aug_cfg,
    )  # fmt: skip


def create_model_and_transforms(
    model_name: str,
    pretrained: str | Path | None = None,
    load_weights: bool = True,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    jit: bool = False,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | tuple[int, int] | None = None,
    force_context_length: int | None = None,
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    aug_cfg: dict[str, Any] | AugmentationCfg | None = None,
    pretrained_image: bool = False,
    pretrained_text: bool = True,
    pretrained_image_path: str | Path | None = None,
    pretrained_text_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    output_dict: bool | None = None,
    weights_only: bool = True,
    **model_kwargs: Any,
) -> tuple[CLIP, Callable, Callable]:
    """(model, preprocess_train, preprocess_val), as OpenCLIP.

    Both transforms turn a PIL image (or uint8 ``[3, H, W]``) into a normalised float ``[3, h, w]`` of the native size;
    the training one crops at random (90 to 100 % of the area). Their steps stand in ``.transforms``.

    Args:
        image_mean, image_std, image_interpolation, image_resize_mode: instead of the model's own.
        aug_cfg: an :class:`AugmentationCfg` or a dict, for ``preprocess_train``.

    The other arguments and the errors are those of :func:`create_model`.
    """
    model = create_model(
        model_name, pretrained, load_weights, precision, device, jit, force_quick_gelu, force_custom_text,
        force_patch_dropout, force_image_size,
        _preprocess_overrides(image_mean, image_std, image_interpolation, image_resize_mode), force_context_length,
        pretrained_image, pretrained_text, pretrained_image_path, pretrained_text_path, cache_dir, output_dict,
        weights_only=weights_only, **model_kwargs,
    )  # fmt: skip
    return model, _transform(model, True, aug_cfg), _transform(model, False)


def create_model_from_pretrained(
    model_name: str,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    jit: bool = False,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_image_size: int | tuple[int, int] | None = None,
    force_context_length: int | None = None,
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    return_transform: bool = True,
    cache_dir: str | Path | None = None,
    weights_only: bool = True,
    **model_kwargs: Any,
) -> CLIP | tuple[CLIP, Callable]:
    """(model in eval mode, preprocess), or the model alone with ``return_transform=False``; weights are required.

    The arguments and the errors are those of :func:`create_model_and_transforms`.
    """
    model = create_model(
        model_name, pretrained, True, precision, device, jit, force_quick_gelu, force_custom_text,
        force_image_size=force_image_size,
        force_preprocess_cfg=_preprocess_overrides(image_mean, image_std, image_interpolation, image_resize_mode),
        force_context_length=force_context_length, cache_dir=cache_dir, require_pretrained=True,
        weights_only=weights_only, **model_kwargs,
    ).eval()  # fmt: skip
    return (model, _transform(model, False)) if return_transform else model


def get_tokenizer(
    model_name: str = "", context_length: int | None = None, cache_dir: str | Path | None = None, **kwargs: Any
) -> Callable[..., Tensor]:
    """Tokenizer of a model: a callable from a text or list of texts to ids ``[N, L]`` (int64).

    Args:
        model_name: as for :func:`create_model`; CLIP's own tokenizer when empty.
        context_length: L; the model's when None.
        cache_dir: the hub's cache folder.
        kwargs: options of the tokenizer, such as ``clean``, instead of the config's.

    Raises:
        ValueError: unknown model or option. FileNotFoundError: a tokenizer of the hub that cannot be had.
        ImportError: a package that the tokenizer needs is not installed.
    """
    if not model_name:
        return SimpleTokenizer(context_length=context_length or 77, **kwargs)
    source = parse_source(model_name)
    text_cfg = source.config(cache_dir)["text_cfg"]
    options = {**(text_cfg.get("tokenizer_kwargs") or {}), **kwargs}
    length = context_length or text_cfg.get("context_length", 77)
    if name := source.tokenizer(text_cfg.get("hf_tokenizer_name")):
        return HFTokenizer(name, context_length=length, cache_dir=cache_dir, **options)
    return SimpleTokenizer(context_length=length, **options)
