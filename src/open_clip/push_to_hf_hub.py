"""Models as folders and repositories in OpenCLIP's form: ``open_clip_config.json`` beside the weights.

What is written loads here (``local-dir:``, ``hf-hub:``), in OpenCLIP and, as an image encoder, in timm.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from .factory import create_model_from_pretrained, get_tokenizer
from .hub import CONFIG_NAME, WEIGHT_NAMES
from .model import CLIP
from .readouts import SPEC_KEY
from .tokenizer import HFTokenizer
from .upstream_api import ImageSize
from .weights import export_state_dict

log = logging.getLogger(__name__)

SAFE_NAME, PICKLE_NAME = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"

# timm's names of the EVA-CLIP schema's trunks, by (width, layers, patch, sub-norms).
_EVA_IN_TIMM = {
    (768, 12, 16, True): "eva02_base_patch16_clip_224",
    (1024, 24, 14, True): "eva02_large_patch14_clip_224",
    (1408, 40, 14, False): "eva_giant_patch14_clip_224",
    (1792, 64, 14, False): "eva02_enormous_patch14_clip_224",
}
_TEXT_WITHOUT_EFFECT = ("xattn", "fusedLN", "masked_language_modeling", "attn_mask", "head_width")


def upstream_config(config: dict) -> dict:
    """A model config in a schema that OpenCLIP reads; ``preprocess_cfg`` is left out, as it stands beside it there.

    Raises:
        ValueError: a trunk in the EVA-CLIP schema for which timm has no name.
    """
    out = {k: v for k, v in config.items() if k != "preprocess_cfg" and (k != "quick_gelu" or v)}
    vision = dict(config["vision_cfg"])
    out["text_cfg"] = {k: v for k, v in config["text_cfg"].items() if k not in _TEXT_WITHOUT_EFFECT}
    if "eva_model_name" in vision:
        key = (vision["width"], vision["layers"], vision["patch_size"], bool(vision.get("subln")))
        if key not in _EVA_IN_TIMM:
            raise ValueError(
                f"timm has no EVA trunk of width {key[0]}, {key[1]} layers and patch {key[2]}, and OpenCLIP builds EVA "
                "trunks by timm's names only: keep this model as a checkpoint file"
            )
        vision = {
            "image_size": vision["image_size"], "timm_model_name": _EVA_IN_TIMM[key], "timm_pool": "token",
            "timm_proj": "",
        }  # fmt: skip
    if "timm_model_name" in vision:
        vision = {"timm_model_pretrained": False, **vision}
        if vision.get("timm_proj") == "":
            vision["timm_proj"] = None
        out["custom_text"] = True
    if vision.get("image_size") is not None and not isinstance(vision["image_size"], int):
        vision["image_size"] = list(vision["image_size"])
    out["vision_cfg"] = vision
    return out


def upstream_state_dict(model: CLIP, config: dict) -> dict[str, Tensor]:
    """The weights by the names that OpenCLIP gives them in a model of ``upstream_config(config)``."""
    vision = config["vision_cfg"]
    if "timm_model_name" in vision or "eva_model_name" in vision:
        state = export_state_dict(model, "timm")
        if "timm_model_name" in vision and vision.get("timm_proj", "linear") == "linear":
            state = {k.replace("visual.trunk.head.", "visual.head.proj."): v for k, v in state.items()}
    else:
        state = export_state_dict(model, "openai")
        if config.get("custom_text"):
            text = {k[len("text.") :] for k in model.state_dict() if k.startswith("text.")}
            state = {f"text.{k}" if k in text else k: v for k, v in state.items()}
    return state


def _config_of(model: CLIP, model_config: dict | None) -> dict:
    config = model_config or model.config
    if config is None:
        raise ValueError("the model was put together by hand: give the config that describes it as model_config")
    return config


def save_config_for_hf(model: CLIP, config_path: str | Path, model_config: dict | None = None) -> None:
    """Write ``open_clip_config.json``: how to build the model and how its images are prepared.

    Args:
        model_config: the config that it was built from; ``model.config`` when None.

    Raises:
        ValueError: no config, or one that OpenCLIP cannot read.
    """
    config = _config_of(model, model_config)
    prep = {k: v for k, v in model.visual.preprocess_cfg.items() if k != "size"}
    content = {"model_cfg": upstream_config(config), "preprocess_cfg": prep}
    Path(config_path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _say_other_size(model: CLIP, config: dict) -> None:
    """OpenCLIP builds a trunk of timm at timm's size, whatever the config says, and resizes it after loading only."""
    name = config["vision_cfg"].get("timm_model_name")
    known = timm.get_pretrained_cfg(name) if name else None
    if known is None or not known.input_size:
        return
    grid = tuple(side // model.visual.patch_size for side in known.input_size[1:])
    if grid != tuple(model.visual.native_grid):
        height, width = ImageSize.of(model.visual.image_size)
        log.warning(
            "OpenCLIP builds %s for %dx%d pixels: make the model there with load_weights=False, "
            "force_image_size=(%d, %d), then load %s by load_checkpoint",
            name, *known.input_size[1:], height, width, SAFE_NAME,
        )  # fmt: skip


def save_pretrained(
    model: CLIP,
    save_directory: str | Path,
    tokenizer: Any = None,
    model_config: dict | None = None,
    safe_serialization: bool | str = True,
    skip_weights: bool = False,
) -> Path:
    """Write a model into a folder, for ``create_model("local-dir:FOLDER")`` here and in OpenCLIP.

    Args:
        model: as it comes from :func:`create_model`.
        save_directory: folder, made if need be; files of these names in it are replaced, and weights under other names
            that loaders look for are removed.
        tokenizer: one of the hub is saved as well; CLIP's own needs no file.
        model_config: the config that it was built from; ``model.config`` when None.
        safe_serialization: True for safetensors, False for a torch file, ``"both"`` for both.
        skip_weights: write the config (and tokenizer) alone.

    Returns:
        The folder.

    Raises:
        ValueError: a model that OpenCLIP has no config for, or an unknown ``safe_serialization``.
    """
    if safe_serialization not in (True, False, "both"):
        raise ValueError(f"safe_serialization is {safe_serialization!r}: use True, False or 'both'")
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:  # nothing half-written under its name
        made = Path(name)
        save_config_for_hf(model, made / CONFIG_NAME, model_config)
        _say_other_size(model, upstream_config(_config_of(model, model_config)))
        if not skip_weights:
            state = upstream_state_dict(model, _config_of(model, model_config))
            if SPEC_KEY in state:
                log.warning(
                    "the weights name their dense reading, %s: they load here, but OpenCLIP refuses the entry; for it, "
                    'save again after model.visual.set_readout("value")', model.visual.readout.name,
                )  # fmt: skip
            state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
            if safe_serialization:
                save_file(state, made / SAFE_NAME, metadata={"format": "pt"})
            if safe_serialization != True:  # noqa: E712 ("both" too)
                torch.save(state, made / PICKLE_NAME)
        if isinstance(tokenizer, HFTokenizer):
            tokenizer.save_pretrained(made)
        written = {file.name for file in made.iterdir()}
        for file in made.iterdir():
            shutil.move(file, folder / file.name)
    if not skip_weights:
        _remove_older(folder, written)
    return folder


def _remove_older(folder: Path, written: set[str]) -> None:
    """Weights of an earlier save in another format go: loaders would take them for the model's."""
    for name in set(WEIGHT_NAMES) - written:
        if (folder / name).is_file():
            log.info("%s is of an earlier save, removed", folder / name)
            (folder / name).unlink()


def save_for_hf(
    model: CLIP,
    tokenizer: Any,
    model_config: dict | None,
    save_directory: str | Path,
    safe_serialization: bool | str = "both",
    skip_weights: bool = False,
) -> None:
    """:func:`save_pretrained` with OpenCLIP's order of arguments."""
    save_pretrained(model, save_directory, tokenizer, model_config, safe_serialization, skip_weights)


def generate_readme(model_card: dict, model_name: str) -> str:
    """Model card in Markdown.

    Args:
        model_card: ``tags``, ``library_name``, ``license``, ``pipeline_tag`` for the head; ``description``, ``details``
            (a dict), ``usage`` and ``citation`` for the text; all optional.
    """
    head = ["---", "tags:", *(f"- {tag}" for tag in model_card.get("tags", ("zero-shot-image-classification", "clip")))]
    head += [f"library_name: {model_card.get('library_name', 'open_clip')}"]
    head += [f"pipeline_tag: {model_card.get('pipeline_tag', 'zero-shot-image-classification')}"]
    head += [f"license: {model_card.get('license', 'mit')}", "---", f"# Model card for {model_name}", ""]
    for title, key in (
        ("", "description"),
        ("## Details", "details"),
        ("## Usage", "usage"),
        ("## Citation", "citation"),
    ):
        if value := model_card.get(key):
            lines = [f"- **{k}:** {v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
            head += [*([title, ""] if title else []), *lines, ""]
    return "\n".join(head)


def push_to_hf_hub(
    model: CLIP,
    tokenizer: Any,
    model_config: dict | None,
    repo_id: str,
    commit_message: str = "Add model",
    token: str | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    model_card: dict | None = None,
    safe_serialization: bool | str = "both",
) -> Any:
    """Publish a model on the Hugging Face hub in OpenCLIP's form.

    Args:
        model, tokenizer, model_config, safe_serialization: as for :func:`save_pretrained`.
        repo_id: ``owner/name``; made if need be, ``private`` or not.
        commit_message, token, revision, create_pr: passed to the hub.
        model_card: see :func:`generate_readme`; written only where the repository has no card yet.

    Returns:
        The hub's description of the commit.

    Raises:
        ValueError: a model that OpenCLIP has no config for. Errors of the hub pass through.
    """
    from huggingface_hub import create_repo, file_exists, upload_folder

    with tempfile.TemporaryDirectory() as name:
        folder = save_pretrained(model, name, tokenizer, model_config, safe_serialization)
        repo = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        if not file_exists(repo, "README.md", token=token, revision=revision):
            text = generate_readme(model_card or {}, repo.split("/")[-1])
            (folder / "README.md").write_text(text, encoding="utf-8")
        return upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, token=token, create_pr=create_pr,
            commit_message=commit_message,
        )  # fmt: skip


def push_pretrained_to_hf_hub(
    model_name: str,
    pretrained: str,
    repo_id: str,
    precision: str = "fp32",
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    commit_message: str = "Add model",
    token: str | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    model_card: dict | None = None,
    hf_tokenizer_self: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a model by name and weights (see :func:`create_model_from_pretrained`) and publish it.

    Args:
        hf_tokenizer_self: the config names the new repository as the place of its tokenizer.
        kwargs: further arguments of :func:`create_model_from_pretrained`.

    The other arguments are those of :func:`push_to_hf_hub`.
    """
    model = create_model_from_pretrained(
        model_name, pretrained, precision, image_mean=image_mean, image_std=image_std,
        image_interpolation=image_interpolation, image_resize_mode=image_resize_mode, return_transform=False, **kwargs,
    )  # fmt: skip
    config = model.config
    if hf_tokenizer_self and config["text_cfg"].get("hf_tokenizer_name"):
        config = {**config, "text_cfg": {**config["text_cfg"], "hf_tokenizer_name": repo_id}}
    return push_to_hf_hub(
        model,
        get_tokenizer(model_name),
        config,
        repo_id,
        commit_message,
        token,
        revision,
        private,
        create_pr,
        model_card,
    )
