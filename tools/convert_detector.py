"""Turn a published F-ViT detector (.pth of MMDetection 2) into a detector file, and a detector file into such a .pth.

    python tools/convert_detector.py CONFIG published.pth detector.pt       which way is seen from the file
    python tools/convert_detector.py CONFIG detector.pt published.pth

CONFIG is the one that belongs to the file, such as F-ViT/configs/ov_coco_vitb16_clipself_proposals.toml; the ViT's
weights must be where it says (model.cache_dir), and are compared with those in the published file. Every name and shape
must fit. Nothing that a file names is executed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_clip.weights import export_state_dict, load_state
from ovdet import files
from ovdet.clip import Clip
from ovdet.config import config_to_dict, differing_settings
from ovdet.data.annotations import load
from ovdet.fvit.assemble import GOES_WITH, WHEREABOUTS, config_of_checkpoint, load_vit, read_config
from ovdet.fvit.config import FViTConfig
from ovdet.fvit.detector import build_detector
from ovdet.fvit.published import EMBEDDINGS, UNUSED, VIT, from_published, to_published
from ovdet.fvit.published_file import read_published
from ovdet.vocabulary import Vocabulary, make_vocabulary, vocabulary_embeddings
from training.engine.checkpoint import read_file, save_atomically
from training.engine.errors import UserError, as_user_error, reason_of, run_program
from training.engine.files import replacing
from training.engine.flags import PATH, Parser


def vit_state(vit: Clip) -> dict[str, Tensor]:
    """The ViT under EVA-CLIP's names, rotary tables included, without a prefix."""
    state = export_state_dict(vit.model)
    return {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}


def empty_detector(config: FViTConfig, vit: Clip) -> torch.nn.Module:
    """A detector without classes."""
    with as_user_error():
        width = vit.model.visual.embed_dim
        return build_detector(config, vit.model, torch.ones(2, width), torch.ones(1, dtype=torch.bool))


def class_names(config: FViTConfig, published: Sequence[str]) -> Vocabulary | None:
    """Classes of the validation file that the config names; None where it is not there.

    Args:
        published: classes that the published file lists; none where it lists none.

    Raises:
        UserError: the published file lists other ones.
    """
    if not Path(config.locate(config.data.val_annotations)).is_file():
        return None
    vocabulary = make_vocabulary(config, load(config, "val"))
    if published and sorted(map(_plain, published)) != sorted(map(_plain, vocabulary.names)):
        raise UserError(
            f"data.val_annotations {config.data.val_annotations} lists other classes than the published file "
            f"({', '.join(published[:4])}, ...): give the file that belongs to it"
        )
    return vocabulary


def classes_of(config: FViTConfig, published: Sequence[str], count: int, source: Path) -> Vocabulary:
    """Classes of a published detector that has so many.

    From ``data.val_annotations`` where the file is there, else from the published file and ``data.novel``.

    Args:
        published: classes that the published file (``source``) lists.

    Raises:
        UserError: neither tells, or they are not so many.
    """
    if published and len(published) != count:
        raise UserError(
            f"{source}: {len(published)} classes are listed in it, but it has embeddings of {count}: it is damaged, "
            "fetch it again"
        )
    vocabulary = class_names(config, published)
    if vocabulary is None:
        if not published or config.data.novel_frequency:
            raise UserError(
                f"which of its {count} classes are novel is not in the published file: give the annotation file of the "
                "validation set (data.val_annotations=FILE), which lists them"
            )
        novel = set(map(_plain, config.data.novel))
        return Vocabulary(tuple(published), tuple(range(count)), tuple(_plain(name) in novel for name in published))
    if len(vocabulary.names) != count:
        raise UserError(
            f"{source} has embeddings of {count} classes, but data.val_annotations {config.data.val_annotations} "
            f"lists {len(vocabulary.names)}: give the file that belongs to it"
        )
    return vocabulary


def in_label_order(embeddings: Tensor, published: Sequence[str], names: Sequence[str]) -> Tensor:
    """Published embeddings ``[D, C + 1]`` as ``[C + 1, D]`` in the order of ``names``, background last.

    Args:
        published: classes in the published order; none where the file lists none, and its order is taken as it is.

    Raises:
        UserError: a class is listed twice.
    """
    rows = embeddings.T
    if published:
        key = str if set(published) == set(names) else _plain
        places = {key(name): place for place, name in enumerate(published)}
        if len(places) < len(names):
            raise UserError("--embeddings: the published file lists a class twice, its embeddings are of unknown order")
        rows = rows[[*(places[key(name)] for name in names), len(names)]]
    return rows.contiguous().float()


def _plain(name: object) -> str:
    return str(name).lower().replace("_", " ")


def check_published(state: dict[str, Tensor], source: Path) -> None:
    """See that a state is a whole detector's, and that its weights are numbers.

    Raises:
        UserError: weights of a ViT or of something else, or NaN or infinite ones.
    """
    for prefix, what in (("roi_head.", "a detector"), (VIT, "the ViT of a detector")):
        if not any(name.startswith(prefix) for name in state):
            raise UserError(
                f"{source} is no published detector: it has no {prefix}* entries ({what}), but {min(state)} and the "
                "like; give a published .pth of F-ViT (a ViT's own weights belong to model.cache_dir)"
            )
    check_finite(state, source)


def check_finite(state: dict[str, Tensor], source: Path) -> None:
    """UserError where a weight that is used is NaN or infinite."""
    for name, value in state.items():
        if value.is_floating_point() and not name.startswith(UNUSED) and not value.isfinite().all():
            number = int((~value.isfinite()).sum())
            raise UserError(
                f"{source}: {number} of {value.numel()} values of {name} are NaN or infinite: fetch the file again, "
                "or use one from before the training diverged"
            )


def compare_vit(state: dict[str, Tensor], vit: Clip, source: Path) -> None:
    """See that a published file was trained on the ViT at hand.

    Raises:
        UserError: names, shapes or values differ.
    """
    mine = vit_state(vit)
    theirs = {name.removeprefix(VIT): value for name, value in state.items() if name.startswith(VIT)}
    differing = sorted(mine.keys() ^ theirs.keys()) or [
        name
        for name, value in mine.items()
        # Rotary tables are computed, and differ in their last digits from one machine to the next.
        if value.shape != theirs[name].shape
        or not torch.allclose(value.float(), theirs[name].float(), rtol=0, atol=1e-5 if "rope" in name else 0)
    ]
    if differing:
        raise UserError(
            f"{source} was trained on another ViT than {vit.identity['weights']} ({len(differing)} entries differ, "
            f"such as {differing[0]}): give its weights as model.cache_dir=FILE, or --write-vit FILE to take them from "
            "the published file"
        )


def take_vit(state: dict[str, Tensor], vit: Clip, path: Path) -> None:
    """Put the published file's ViT into the model at hand, whose text tower stays. ``path``: where it will be."""
    theirs = {f"visual.{name.removeprefix(VIT)}": value for name, value in state.items() if name.startswith(VIT)}
    whole = {name: value for name, value in export_state_dict(vit.model).items() if not name.startswith("visual.")}
    with as_user_error():
        load_state(vit.model, whole | theirs, source="the published file's ViT")
    vit.identity.update(weights=str(path), hash=files.vit_hash(vit.model))


def to_detector_file(
    config: FViTConfig, source: Path, target: Path, *, vit_file: Path | None, table: Path | None
) -> str:
    """Convert a published file; nothing is written before everything fits. Returns what was done, in a line."""
    state, meta = read_published(source)
    check_published(state, source)
    vit = load_vit(config)
    if vit_file is not None:
        take_vit(state, vit, vit_file)
        config.model.pretrained, config.model.cache_dir = str(vit_file), ""
    compare_vit(state, vit, source)
    detector = empty_detector(config, vit)
    try:
        mine = from_published(state, detector.trainable_state_dict(), mask_convs=config.model.mask_convs)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    embeddings = state.get(EMBEDDINGS)
    lacking = [name for name in (EMBEDDINGS, f"{UNUSED}weight", f"{UNUSED}bias") if name not in state]
    if lacking or embeddings.ndim != 2 or state[f"{UNUSED}bias"].shape != embeddings.shape[1:]:
        raise UserError(f"{source}: {', '.join(lacking) or EMBEDDINGS} does not fit; it is no published F-ViT detector")
    published = meta.get("CLASSES")
    published = [str(name) for name in published] if isinstance(published, (tuple, list)) else []
    vocabulary = classes_of(config, published, embeddings.shape[1] - 1, source)
    detector.load_trainable_state_dict(mine)
    content = files.detector_content(
        detector, vit=vit.identity, config=config_to_dict(config), names=vocabulary.names, novel=vocabulary.novel
    )  # fmt: skip
    rows = None if table is None else in_label_order(embeddings, published, vocabulary.names)
    novel = sum(vocabulary.novel)
    done = f"{len(mine)} tensors of {len(state)}, {len(vocabulary.names)} classes, {novel} of them novel"
    if table is not None:
        save_table(rows, table)
        if not published:
            done += f"; {table} is in the published file's order: it lists no classes, see that this is label order"
    if vit_file is not None:
        save_atomically({"state_dict": export_state_dict(vit.model)}, vit_file, "--write-vit")
    save_atomically(content, target, "target")  # last: where it is, the others are
    return done


def save_table(table: Tensor, path: Path) -> None:
    """Write embeddings as .npy, whole or not at all. UserError where that fails."""
    try:
        with replacing(path) as file:
            np.save(file, table.numpy())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({reason_of(error)}): free some space or choose another --embeddings"
        ) from error


def compare_settings(config: FViTConfig, content: dict[str, Any], source: Path) -> None:
    """See that a detector was trained with the network and the input that a config describes.

    A published file says neither: whoever loads it takes them from the config.

    Raises:
        UserError: settings that differ.
    """
    trained = config_of_checkpoint(content, str(source))
    theirs, own = (differing_settings(a, b, GOES_WITH, WHEREABOUTS) for a, b in ((trained, config), (config, trained)))
    if theirs:
        raise UserError(
            f"{source} was trained with {', '.join(theirs)}, but {config.path} has {', '.join(own)}: give the config "
            f"that it was trained with, or add {shlex.join(theirs)}"
        )


def to_published_file(config: FViTConfig, content: dict[str, Any], source: Path, target: Path) -> str:
    """Convert a detector file. Returns what was done, in a line."""
    compare_settings(config, content, source)
    check_finite(files.detector_state(content), source)
    vit = load_vit(config)
    files.check_vit(content, vit.identity, vit.model, source)
    detector = empty_detector(config, vit)
    with as_user_error():
        detector.load_trainable_state_dict(files.detector_state(content))
        names = files.class_order(content)
        embeddings = vocabulary_embeddings(config, vit.model, vit.tokenizer, names, progress=True)
        state = to_published(
            detector.trainable_state_dict(), vit_state(vit), embeddings, mask_convs=config.model.mask_convs
        )
    save_atomically({"meta": {"CLASSES": tuple(names)}, "state_dict": state}, target, "target")
    return f"{len(state)} tensors, {len(names)} classes"


def check_outputs(outputs: dict[str, Path | None], inputs: dict[str, Path], *, force: bool) -> None:
    """See that every file to write can be written, and that none takes the place of another.

    Args:
        outputs: by what the command line calls them; None: not asked for.
        inputs: files that are read, likewise.

    Raises:
        UserError: a missing folder, an existing file without ``force``, or one file given twice.
    """
    places = {path.resolve(): (path, name) for name, path in inputs.items()}
    for name, path in outputs.items():
        if path is None:
            continue
        try:
            twin = places.setdefault(path.resolve(), (path, name))
            folder, there = path.is_dir(), path.exists()
        except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, a null byte
            raise UserError(f"{name} {path}: {reason_of(error)}; choose another name") from error
        if folder:
            raise UserError(f"{name} {path} is a folder: give the name of a file")
        if twin[1] != name:
            raise UserError(f"{name} {path} is the same file as {twin[1]} {twin[0]}: choose another name")
        if there and not force:
            raise UserError(f"{path} exists: choose another name, or add --force")
        if not path.parent.is_dir():
            raise UserError(f"{name} {path}: the folder {path.parent} does not exist: make it first")
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{name} {path}: the folder {path.parent} is not writable: choose another one")
    table = outputs.get("--embeddings")
    if table is not None and table.suffix != ".npy":
        raise UserError(f"--embeddings {table}: give a name that ends in .npy")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert. UserError for faulty input."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the config that belongs to the detector")
    parser.add_argument("source", type=PATH, help="a published .pth, or a detector file")
    parser.add_argument("target", type=PATH, help="file to write: the other kind")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--write-vit", type=PATH, metavar="FILE", help="write the published file's ViT as weights too")
    parser.add_argument("--embeddings", type=PATH, metavar="FILE.npy", help="write its class embeddings too")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.config, args.overrides)
    named = {"model.pretrained": config.model.pretrained, "model.cache_dir": config.model.cache_dir,
             "data.val_annotations": config.data.val_annotations}  # fmt: skip
    read = {name: Path(config.locate(path)) for name, path in named.items() if path}
    check_outputs(
        {"target": args.target, "--write-vit": args.write_vit, "--embeddings": args.embeddings},
        {"source": args.source, "CONFIG": Path(args.config)} | {n: path for n, path in read.items() if path.is_file()},
        force=args.force,
    )
    content = _detector_file(args.source)
    if content is None:
        done = to_detector_file(config, args.source, args.target, vit_file=args.write_vit, table=args.embeddings)
    else:
        given = [flag for flag, path in (("--write-vit", args.write_vit), ("--embeddings", args.embeddings)) if path]
        if given:
            raise UserError(f"{' and '.join(given)}: {args.source} is a detector file, which has none: leave it out")
        done = to_published_file(config, content, args.source, args.target)
    print(f"{args.target}: {done}")


def _detector_file(path: Path) -> dict[str, Any] | None:
    """Content of a detector file; None for any other file."""
    try:
        content = read_file(path)
    except UserError:
        return None
    return files.load(path) if isinstance(content, dict) and content.get("format") == files.FORMAT else None


if __name__ == "__main__":
    sys.exit(run_program(main))
