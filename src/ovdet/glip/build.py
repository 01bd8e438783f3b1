"""From a config to a GLIP, with the weights that it starts from: never random ones unasked."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

import open_clip
from ovdet.glip.config import GlipConfig
from ovdet.glip.head import GroundingHead, HeadOptions
from ovdet.glip.image import ClipPyramid, ImageEncoder, SwinPyramid
from ovdet.glip.model import GLIP
from ovdet.glip.swin import Swin, load_swin_weights
from ovdet.glip.text import BertText, ClipText, is_hub_name
from ovdet.glip.tokens import ClipPairs, Tokenizer, WordPieces
from training.engine.checkpoint import warn_of_student
from training.engine.errors import UserError, as_user_error

log = logging.getLogger(__name__)

RANDOM = "random"


def build_glip(config: GlipConfig, tokenizer: Tokenizer, *, clip: open_clip.CLIP | None = None) -> GLIP:
    """The network of a config with random weights (but for the towers of ``clip``).

    Args:
        tokenizer: see :func:`make_tokenizer`.
        clip: the model of ``[clip]``, see :func:`load_clip`.

    Raises:
        UserError: sizes that do not fit each other.
    """
    with as_user_error():
        image, text = _image(config, clip), _text(config, clip)
        head = config.head
        options = HeadOptions(
            channels=head.channels, text_width=text.width, blocks=head.blocks, fusion=head.fusion,
            fusion_width=head.fusion_width, fusion_heads=head.fusion_heads, fusion_dropout=head.fusion_dropout,
            text_heads=head.text_heads, text_hidden=head.text_hidden, text_dropout=head.text_dropout,
            groups=head.groups, offsets=head.offsets, deform=head.deform, classifier=head.classifier,
            checkpoint=config.model.checkpoint,
        )  # fmt: skip
        prompt = config.train.mode in ("language_prompt_v2", "language_prompt_v4")
        model = GLIP(image, text, GroundingHead(options), tokenizer, prompt=prompt)
    if text.vocabulary != tokenizer.size:
        raise UserError(
            f"text.vocabulary has {tokenizer.size} tokens, but the text encoder knows {text.vocabulary}: give the "
            "vocabulary that belongs to it"
        )
    return model


def _image(config: GlipConfig, clip: open_clip.CLIP | None) -> ImageEncoder:
    image = config.image
    if image.kind == "clip":
        if clip is None:
            raise UserError('image.kind is "clip", but [clip] names no model: set clip.name')
        return ClipPyramid(clip.visual, image.blocks, config.head.channels, frozen=image.frozen, drop=image.drop_block)
    swin = Swin(
        image.width, image.depths, image.heads, image.window, drop_path=image.drop_path, freeze_at=image.freeze_at
    )
    return SwinPyramid(swin, config.head.channels, drop=image.drop_block)


def _text(config: GlipConfig, clip: open_clip.CLIP | None) -> BertText | ClipText:
    text = config.text
    if text.kind == "clip":
        if clip is None:
            raise UserError('text.kind is "clip", but [clip] names no model: set clip.name')
        encoder: BertText | ClipText = ClipText(clip.text)
    else:
        encoder = BertText(
            width=text.width, layers=text.layers, heads=text.heads, hidden=text.hidden, vocabulary=text.tokens,
            dropout=text.dropout,
        )  # fmt: skip
    if text.frozen:
        encoder.requires_grad_(False)
    return encoder


def make_tokenizer(config: GlipConfig, clip: open_clip.CLIP | None = None) -> Tokenizer:
    """The tokenizer of a config.

    Args:
        clip: the model of ``[clip]``, whose text tower says how long a text may be.

    Raises:
        UserError: BERT's vocabulary is missing or of another size than the text encoder.
    """
    text = config.text
    if text.kind == "clip":
        return ClipPairs(min(text.limit, clip.context_length if clip is not None else text.limit))
    source = config.locate(text.vocabulary)
    if not Path(source).exists() and is_hub_name(source):
        source = _hub_vocabulary(source)
    return WordPieces(source, text.limit, text.tokens)


def _hub_vocabulary(name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, "vocab.txt")
    except Exception as error:  # the hub raises connection, authorisation and cache errors of many kinds
        raise UserError(
            f"text.vocabulary {name} is neither a file nor in the cache, and cannot be fetched "
            f"({type(error).__name__}): give BERT's vocab.txt, or the folder that holds it (text.vocabulary=FILE)"
        ) from error


def load_clip(config: GlipConfig) -> open_clip.CLIP | None:
    """The model of ``[clip]``, on the CPU; None where no part of it is used.

    Raises:
        UserError: unknown model, or weights that are missing, unnamed or of another architecture.
    """
    clip = config.clip
    if "clip" not in (config.image.kind, config.text.kind):
        return None
    if not clip.name or not clip.pretrained:
        missing = "name" if not clip.name else "pretrained"
        raise UserError(f'clip.{missing} is empty: name the model and its weights (clip.pretrained="random" for none)')
    with as_user_error():
        name = _clip_name(config)
        text_cfg = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
        if config.text.kind == "clip" and text_cfg.get("hf_tokenizer_name"):
            # Tokenizers of the hub do not say which characters of the text a token stands for.
            raise UserError(f'clip.name {name}: its tokenizer is not CLIP\'s own; use text.kind="bert" with it')
        pretrained = None if clip.pretrained == RANDOM else clip.pretrained
        if pretrained and Path(config.locate(pretrained)).is_file():
            pretrained = config.locate(pretrained)
        folder = config.locate(clip.cache_dir) if clip.cache_dir and pretrained == "eva" else clip.cache_dir or None
        warn_of_student((folder if pretrained == "eva" else pretrained) or "")
        return open_clip.create_model(name, pretrained, cache_dir=folder)


def _clip_name(config: GlipConfig) -> str:
    """Name of the model of ``[clip]``; a model config file is registered."""
    name = config.clip.name
    if name.endswith(".json"):
        path = Path(config.locate(name))
        name = path.parent.name if path.stem == "config" else path.stem
        open_clip.add_model_config(path, name)
    return name


def load_start_weights(model: GLIP, config: GlipConfig) -> None:
    """Weights of the encoders that training from scratch begins with.

    Raises:
        UserError: none are named, or they are missing or do not fit.
    """
    _start_part("image", config.image.kind, config.image.weights, config, model)
    _start_part("text", config.text.kind, config.text.weights, config, model)


def _start_part(section: str, kind: str, weights: str, config: GlipConfig, model: GLIP) -> None:
    if kind == "clip":
        if section == "text" and weights == RANDOM:
            model.text.tower.init_weights()
        return
    if weights == RANDOM:
        return
    if not weights:
        raise UserError(
            f"{section}.weights is empty, and so is model.weights: name the weights that training starts from, or ask "
            f'for random ones ({section}.weights="random")'
        )
    if section == "image":
        load_swin_weights(model.image.swin, config.locate(weights))
    else:
        model.text.load_pretrained(config.locate(weights))


def count_parameters(module: nn.Module) -> int:
    """Numbers in the parameters of a module, each shared tensor once."""
    return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())


def trained_parameters(model: GLIP) -> list[tuple[str, nn.Parameter]]:
    """Parameters with gradients, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def on_meta(config: GlipConfig, tokenizer: Tokenizer) -> GLIP:
    """The network of a config without memory for its numbers, for names and shapes."""
    with torch.device("meta"):
        return build_glip(config, tokenizer)
