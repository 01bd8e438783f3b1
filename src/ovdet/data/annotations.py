"""Annotation files of a config, read by the engine's reader."""

from __future__ import annotations

import logging
import os
from typing import Any

from ovdet.config import Config
from training.engine.data import annotations as reader
from training.engine.data.images import ImageError, is_url, read_bytes, resolve
from training.engine.data.records import Annotations, log_left_out
from training.engine.errors import UserError

log = logging.getLogger(__name__)


def load(config: Config, part: str, *, masks: bool = False, images: bool = False) -> Annotations:
    """Annotations of ``data.train_annotations`` or ``data.val_annotations``; every process calls it.

    Args:
        part: ``"train"`` or ``"val"``.
        masks: keep segmentations.
        images: see that their images are there.

    Raises:
        UserError: no file is given, or it cannot be used; or there are no images.
    """
    key = f"data.{part}_annotations"
    found = load_annotations(config.locate(getattr(config.data, f"{part}_annotations")), key=key, masks=masks)
    if part == "val":  # what training leaves out is said by its task
        log_left_out(found.file, found.skipped)
        if not len(found.boxes):
            log.warning("%s %s lists no object: detections are written, AP cannot be computed", key, found.file)
    if images:
        key = f"data.{part}_images"
        check_image_root(found, config.locate(getattr(config.data, f"{part}_images")), key=key)
    return found


def load_annotations(path: str, *, key: str, masks: bool = False) -> Annotations:
    """Labelled objects of a COCO or LVIS file; see :func:`training.engine.data.annotations.load_annotations`.

    Args:
        key: where the path comes from, for messages.

    Raises:
        UserError: no file is given, it cannot be used, or it lists no category.
    """
    if not path:
        raise UserError(f"{key} is empty: give a COCO or LVIS json ({key}=FILE)")
    if key.startswith("data.") and not is_url(path) and not os.path.isfile(path):
        raise UserError(
            f"{key} {path}: no such file; F-ViT/tools/prepare_open_vocabulary.py makes it from the official one"
        )
    return reader.load_annotations(path, flag=key, masks=masks, labelled=True)


def read_json(path: str, key: str) -> dict[str, Any]:
    """Content of an annotation file. UserError unless it has images, annotations and categories."""
    content = reader.read_json(path, key)
    for part in ("annotations", "categories"):
        if not isinstance(content.get(part), list):
            raise UserError(f'{key} {path}: no list "{part}" in it; give a COCO or LVIS json')
    if not content["categories"]:
        raise UserError(f"{key} {path}: it lists no category")
    return content


def check_image_root(annotations: Annotations, root: str, *, key: str, tries: int = 20) -> None:
    """See that images are where they are said to be, before anything is written.

    Raises:
        UserError: no such folder, or none of the first ``tries`` images is in it.
    """
    if not is_url(root) and not os.path.isdir(root):
        raise UserError(f"{key} {root or '(empty)'}: no such folder; give the folder of the images ({key}=FOLDER)")
    failure = ""
    for number in range(min(tries, len(annotations))):
        try:
            read_bytes(resolve(root, annotations.file_name(number)))
            return
        except ImageError as error:
            failure = failure or str(error)
    raise UserError(
        f"{key} {root}: none of the first {min(tries, len(annotations))} images of {annotations.file} can be opened "
        f"there (first: {failure}); give the folder that their file names are relative to"
    )
