"""Command-line options that the programs of this package share: model, classes, settings of a prediction."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

import open_clip
from open_clip import CLIP
from open_clip.readouts import build_readout
from ovseg.classes import TEMPLATE_NAMES, ClassList, embed_words, parse_classes, read_classes
from ovseg.external import load_external
from ovseg.protocols import PROTOCOLS, Protocol, preset
from ovseg.refine import KEY_FORMS
from ovseg.segment import Segmenter
from training.engine.checkpoint import warn_of_student
from training.engine.distributed import together
from training.engine.errors import UserError, as_user_error, reason_of
from training.engine.flags import spelling
from training.engine.precision import make_precision

log = logging.getLogger(__name__)

#: Published thresholds of MaskCLIP's refinements, by the names that the programs give them.
REFINEMENTS: dict[str, dict[str, float]] = {
    "none": {},
    "pd": {"denoise": 0.5},
    "ks": {"smooth": 1.0},
    "pdks": {"denoise": 0.5, "smooth": 1.0},
}


def add_model_options(
    parser: argparse.ArgumentParser, *, several: bool = False, default_model: str | None = None
) -> None:
    """The model, its weights, where and how precisely it computes; with ``several``, more than one checkpoint."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=default_model is None, default=default_model,
        help="name of the model, or the path of its config json",
    )  # fmt: skip
    group.add_argument(
        "--pretrained",
        nargs="+" if several else None,
        default=[""] if several else "",
        help="tag or checkpoint file" + ("; several stand side by side" if several else ""),
    )
    group.add_argument("--cache-dir", default=None, help="folder of downloads; the checkpoint for --pretrained eva")
    group.add_argument(
        "--embed-path", default="", help="embeddings of the words (.npy, .pt) instead of the text tower's"
    )
    group.add_argument("--device", default=None, choices=("cpu", "cuda"), help="a GPU if there is one, by default")
    group.add_argument("--precision", default=None, help="fp32, amp_bf16, ...; bfloat16 on a GPU by default")
    group.add_argument(
        "--external",
        default="",
        metavar="NAME[:FILE]",
        help="timm trunk for the reading proxyclip (random: its weights)",
    )
    group.add_argument(
        "--drop-padding", action="store_true", help="read the image without the padding around it, as weights trained "
        "with --drop-padding are read in any case",
    )  # fmt: skip


def add_protocol_options(parser: argparse.ArgumentParser) -> None:
    """The protocol by name, and a flag for each of its settings."""
    group = parser.add_argument_group("settings", "a protocol by name, and changes to it")
    group.add_argument("--protocol", default="own", choices=PROTOCOLS, help="published settings, or this project's own")
    group.add_argument("--short-side", type=int, help="pixels of the shorter side of the network's input")
    group.add_argument("--long-side", type=int, help="pixels that its longer side may have")
    group.add_argument("--window", type=int, help="sliding windows of this size; 0 for the whole image")
    group.add_argument("--stride", type=int, help="distance of windows, at most their size; 0 for half")
    group.add_argument("--words", help="whose class words: names, maskclip, sclip, naclip, clearclip, proxyclip")
    group.add_argument("--templates", choices=TEMPLATE_NAMES, help="prompt templates")
    group.add_argument("--scale", type=float, help="factor of cosines before the softmax")
    group.add_argument("--threshold", type=float, help="probability under which a pixel becomes background")
    group.add_argument("--area", type=float, help="share of the foreground that a class must exceed")
    group.add_argument("--denoise", type=float, help="threshold of prompt denoising (MaskCLIP: 0.5)")
    group.add_argument("--smooth", type=float, help="threshold of key smoothing (MaskCLIP: 1.0)")
    group.add_argument("--key-form", choices=KEY_FORMS, help="how key smoothing normalises keys")
    group.add_argument("--pamr-steps", type=int, help="steps of PAMR; 0 for none")


#: What the model's own dense reading is called among others.
OWN_READING = "own"

_SETTINGS = (
    "short_side", "long_side", "window", "stride", "words", "templates", "scale", "threshold", "area", "denoise",
    "smooth", "key_form", "pamr_steps",
)  # fmt: skip


def protocol_from(args: argparse.Namespace, dataset: str) -> Protocol:
    """The protocol that the flags ask for."""
    changes = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    return replace(preset(args.protocol, dataset), **changes)


def with_readout(protocol: Protocol, readout: str | None) -> Protocol:
    """The protocol with another dense reading; :data:`OWN_READING` is the model's own."""
    return replace(protocol, readout=None if readout == OWN_READING else readout)


def name_unused(args: argparse.Namespace, classes: ClassList) -> None:
    """Warn of flags that say what becomes background, where there is no such class."""
    given = [f"--{name}" for name in ("threshold", "area") if getattr(args, name) is not None]
    if given and classes.background is None:
        log.warning("%s: not used, there is no background class among those that are given", " and ".join(given))


def embeddings_digest(args: argparse.Namespace) -> str:
    """Fingerprint of the file of ``--embed-path``; empty without one."""
    if not args.embed_path:
        return ""
    try:
        return hashlib.sha256(Path(args.embed_path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"--embed-path {args.embed_path}: {reason_of(error)}") from None


def variants_from(protocol: Protocol, readouts: list[str] | None, refinements: list[str]) -> dict[str, Protocol]:
    """Every reading with every refinement, by name (``sclip``, ``sclip+pd``).

    ``own`` among the readings is the model's own, whichever the protocol's is.

    Raises:
        UserError: a refinement or a combination is given twice, or an unknown one.
    """
    variants: dict[str, Protocol] = {}
    for readout in readouts or [protocol.readout]:
        for refinement in refinements:
            if refinement not in REFINEMENTS:
                raise UserError(f'no refinement is called "{refinement}": use {", ".join(REFINEMENTS)}')
            # "none" keeps what --denoise and --smooth say.
            name = (readout or "model's own") + ("" if refinement == "none" else f"+{refinement}")
            if name in variants:
                raise UserError(f"{name} is asked for twice: give each reading and refinement once")
            variants[name] = replace(with_readout(protocol, readout), **REFINEMENTS[refinement])
    return variants


def short_names(paths: Sequence[str]) -> list[str]:
    """Names of checkpoints by the parts of their paths that differ; of a single one, its file name.

    Raises:
        UserError: two are the same.
    """
    if len(set(paths)) < len(paths):
        raise UserError(f"--pretrained {' '.join(paths)}: the same checkpoint twice")
    parts = [PurePosixPath(path.replace("\\", "/")).parts for path in paths]
    names = [p[-1] if p else "random weights" for p in parts]
    if len(set(names)) == len(names):
        return names
    shortest = min(map(len, parts))
    first = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    last = next((i for i in range(shortest) if len({p[-1 - i] for p in parts}) > 1), shortest)
    pieces = [p[first : len(p) - last] for p in parts]
    if not all(pieces):  # one path is a part of another: its end is needed to tell what it is
        pieces = [p[first:] or p[-1:] for p in parts]
    return ["/".join(piece) for piece in pieces]


def load_model(args: argparse.Namespace, pretrained: str, device: torch.device) -> tuple[CLIP, str]:
    """A model on its device in eval mode, and its name. Random weights (an empty ``pretrained``) are always the same.

    Raises:
        UserError: an unknown name, a config or checkpoint that cannot be read or does not fit.
    """
    name = args.model
    torch.manual_seed(0)
    with as_user_error():
        if name.endswith(".json"):
            path = Path(name)
            name = path.parent.name if path.stem == "config" else path.stem
            open_clip.add_model_config(args.model, name)
        model = open_clip.create_model(name, pretrained or None, device=device, cache_dir=args.cache_dir)
        warn_of_student((args.cache_dir if pretrained == "eva" else pretrained) or "")
        if args.drop_padding:
            model.visual.set_drop_padding(True)
    return model.eval().requires_grad_(False), name


def tokenizer_of(args: argparse.Namespace, name: str) -> Callable[[list[str]], Tensor] | None:
    """The model's tokenizer; None where embeddings are read from a file."""
    return None if args.embed_path else open_clip.get_tokenizer(name)


def build_segmenter(
    args: argparse.Namespace,
    classes: ClassList,
    variants: Protocol | Mapping[str, Protocol],
    device: torch.device,
    *,
    pretrained: str | None = None,
    only: Sequence[int] | None = None,
    progress: bool = True,
) -> Segmenter:
    """The segmenter that the flags describe; with several processes, every one must call it.

    Args:
        pretrained: in place of ``--pretrained``.
        only: labels of the classes that are scored, as if there were no others; None for all. ``--embed-path`` is read
            for all classes.
        progress: show a bar where class embeddings are computed.

    Raises:
        UserError: anything for the user to mend.
    """
    precision = make_precision(args.precision, device)
    protocols = [variants] if isinstance(variants, Protocol) else list(variants.values())
    with together():
        model, name = load_model(args, args.pretrained if pretrained is None else pretrained, device)
        for readout in {p.readout for p in protocols if p.readout}:
            as_user_error(build_readout, readout, model.visual)  # a wrong name, before minutes of prompts
        external = load_external(args.external, device) if args.external else None
        tokenizer = tokenizer_of(args, name)
    embeddings = embed_words(
        model, tokenizer, classes, templates=protocols[0].templates, embed_path=args.embed_path, device=device,
        progress=progress,
    )  # fmt: skip
    if only is not None:
        embeddings = torch.cat([embeddings[classes.word_classes == label] for label in only])
        classes = classes.only(only)
    model.visual.to(precision.param_dtype)
    dtype = precision.autocast_dtype or torch.float32
    with together():
        return Segmenter(model, classes, embeddings, variants, external=external, dtype=dtype)


def add_class_options(parser: argparse.ArgumentParser) -> None:
    """``--classes`` and ``--classes-from``, and background words."""
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--classes", nargs="+", default=[], help='names, divided by spaces or commas; "a|b" are synonyms'
    )
    group.add_argument("--classes-from", default="", help="text file with a name per line, or a COCO-style json")
    group.add_argument("--background", default="", metavar="WORDS", help='add a class for the rest, e.g. "wall|sky"')


#: What is said of one kind of photographs and does nothing for the other.
_OF_IMAGES = ("classes", "classes_from", "background")
_OF_DATASET = ("data_root", "image_root", "words")


def check_sources(args: argparse.Namespace) -> None:
    """See that photographs are named one way, and that every option says something of them.

    Raises:
        UserError: neither or both of ``--images`` and ``--dataset``, or an option that belongs to the other one.
    """
    if bool(args.images) == bool(args.dataset):
        raise UserError("give photographs with --images, or a data set with --dataset and --data-root")
    given = [spelling(name) for name in (_OF_DATASET if args.images else _OF_IMAGES) if getattr(args, name)]
    if given and args.images:
        raise UserError(f"{given[0]} does nothing with --images: it is said of a --dataset; leave it out")
    if given:
        raise UserError(
            f"{given[0]} does nothing with --dataset {args.dataset}, which has classes of its own: leave it out, or "
            "give photographs with --images"
        )


def classes_from(args: argparse.Namespace) -> ClassList:
    """The classes that the flags name.

    Raises:
        UserError: none, or some twice.
    """
    if not args.classes and not args.classes_from:
        raise UserError("no class names: give them with --classes, or a file of them with --classes-from")
    parts = [parse_classes(args.classes)] if args.classes else []
    parts += [read_classes(args.classes_from)] if args.classes_from else []
    classes = ClassList(
        tuple(name for part in parts for name in part.names), tuple(words for part in parts for words in part.words)
    )
    if args.background:
        classes = classes.with_background([w.strip() for w in args.background.split("|") if w.strip()])
    return classes
