"""Turn a published F-ViT detector (.pth of MMDetection 2) into a detector file, and a detector file into such a .pth.

    python tools/convert_detector.py CONFIG published.pth detector.pt       which way is seen from the file
    python tools/convert_detector.py CONFIG detector.pt published.pth

CONFIG is the one that belongs to the file, such as F-ViT/configs/ov_coco_vitb16_clipself_proposals.toml; the ViT's
weights must be where it says (model.cache_dir), and are compared with those in the published file. Every name and shape
must fit. Nothing that a file names is executed.
"""

from __future__ import annotations

import argparse
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
from ovdet.config import config_to_dict
from ovdet.data.annotations import load
from ovdet.fvit.assemble import load_vit, read_config
from ovdet.fvit.config import FViTConfig
from ovdet.fvit.detector import build_detector
from ovdet.fvit.published import EMBEDDINGS, UNUSED, VIT, from_published, to_published
from ovdet.fvit.published_file import read_published
from ovdet.vocabulary import Vocabulary, make_vocabulary, vocabulary_embeddings
from training.engine.checkpoint import read_file, save_atomically
from training.engine.errors import UserError, as_user_error, run_program
from training.engine.flags import Parser


def vit_state(vit: Clip) -> dict[str, Tensor]:
    """The ViT under EVA-CLIP's names, rotary tables included, without a prefix."""
    state = export_state_dict(vit.model)
    return {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}


def empty_detector(config: FViTConfig, vit: Clip) -> torch.nn.Module:
    """A detector without classes."""
    with as_user_error():
        width = vit.model.visual.embed_dim
        return build_detector(config, vit.model, torch.ones(2, width), torch.ones(1, dtype=torch.bool))


def class_names(config: FViTConfig, meta: dict[str, Any]) -> Vocabulary | None:
    """Classes of the validation file that the config names; None where it is not there.

    Raises:
        UserError: the published file lists other ones.
    """
    if not Path(config.locate(config.data.val_annotations)).is_file():
        return None
    vocabulary = make_vocabulary(config, load(config, "val"))
    theirs = meta.get("CLASSES")
    if isinstance(theirs, (tuple, list)) and theirs and set(map(_plain, theirs)) != set(map(_plain, vocabulary.names)):
        raise UserError(
            f"data.val_annotations {config.data.val_annotations} lists other classes than the published file "
            f"({', '.join(map(str, theirs[:4]))}, ...): give the file that belongs to it"
        )
    return vocabulary


def classes_of(config: FViTConfig, meta: dict[str, Any], count: int) -> Vocabulary:
    """Classes of a published detector that has so many.

    From ``data.val_annotations`` where the file is there, else from the published file and ``data.novel``.

    Raises:
        UserError: neither tells.
    """
    vocabulary = class_names(config, meta)
    if vocabulary is None:
        names = [str(name) for name in meta.get("CLASSES") or ()]
        if len(names) != count or config.data.novel_frequency:
            raise UserError(
                f"which of its {count} classes are novel is not in the published file: give the annotation file of the "
                "validation set (data.val_annotations=FILE), which lists them"
            )
        novel = set(map(_plain, config.data.novel))
        vocabulary = Vocabulary(tuple(names), tuple(range(count)), tuple(_plain(name) in novel for name in names))
    return vocabulary


def _plain(name: object) -> str:
    return str(name).lower().replace("_", " ")


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


def write_vit(state: dict[str, Tensor], vit: Clip, path: Path) -> None:
    """Put the published file's ViT into the model at hand, whose text tower stays, and write that as weights."""
    theirs = {f"visual.{name.removeprefix(VIT)}": value for name, value in state.items() if name.startswith(VIT)}
    whole = {name: value for name, value in export_state_dict(vit.model).items() if not name.startswith("visual.")}
    with as_user_error():
        load_state(vit.model, whole | theirs, source="the published file's ViT")
    save_atomically({"state_dict": export_state_dict(vit.model)}, path, "--write-vit")
    vit.identity.update(weights=str(path), hash=files.vit_hash(vit.model))


def to_detector_file(
    config: FViTConfig, source: Path, target: Path, *, vit_file: Path | None, table: Path | None
) -> str:
    """Convert a published file. Returns what was done, in a line."""
    state, meta = read_published(source)
    vit = load_vit(config)
    if vit_file is not None:
        write_vit(state, vit, vit_file)
        config.model.pretrained, config.model.cache_dir = str(vit_file), ""
    compare_vit(state, vit, source)
    detector = empty_detector(config, vit)
    with as_user_error():
        mine = from_published(state, detector.trainable_state_dict(), mask_convs=config.model.mask_convs)
    embeddings = state.get(EMBEDDINGS)
    lacking = [name for name in (EMBEDDINGS, f"{UNUSED}weight", f"{UNUSED}bias") if name not in state]
    if lacking or embeddings.ndim != 2 or state[f"{UNUSED}bias"].shape != embeddings.shape[1:]:
        raise UserError(f"{source}: {', '.join(lacking) or EMBEDDINGS} does not fit; it is no published F-ViT detector")
    vocabulary = classes_of(config, meta, embeddings.shape[1] - 1)
    detector.load_trainable_state_dict(mine)
    content = files.detector_content(
        detector, vit=vit.identity, config=config_to_dict(config), names=vocabulary.names, novel=vocabulary.novel
    )  # fmt: skip
    files.save(content, target)
    if table is not None:
        np.save(table, embeddings.T.contiguous().float().numpy())
    novel = sum(vocabulary.novel)
    return f"{len(mine)} tensors of {len(state)}, {len(vocabulary.names)} classes, {novel} of them novel"


def to_published_file(config: FViTConfig, content: dict[str, Any], source: Path, target: Path) -> str:
    """Convert a detector file. Returns what was done, in a line."""
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


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert. UserError for faulty input."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the config that belongs to the detector")
    parser.add_argument("source", type=Path, help="a published .pth, or a detector file")
    parser.add_argument("target", type=Path, help="file to write: the other kind")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--write-vit", type=Path, metavar="FILE", help="write the published file's ViT as weights too")
    parser.add_argument("--embeddings", type=Path, metavar="FILE.npy", help="write its class embeddings too")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    args = parser.parse_intermixed_args(argv)
    for path in (args.target, args.write_vit, args.embeddings):
        if path is not None and path.exists() and not args.force:
            raise UserError(f"{path} exists: choose another name, or add --force")
    config = read_config(args.config, args.overrides)
    content = _detector_file(args.source)
    if content is None:
        done = to_detector_file(config, args.source, args.target, vit_file=args.write_vit, table=args.embeddings)
    else:
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
