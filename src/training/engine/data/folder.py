"""Images without their annotations: those of a folder, or of a file's list."""

from __future__ import annotations

import os
from pathlib import Path

from training.engine.data.annotations import Annotations, load_annotations, parse
from training.engine.data.images import is_url
from training.engine.data.samples import check_image_root
from training.engine.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def image_names(folder: str | Path) -> list[str]:
    """Names of the image files below a folder, relative to it, sorted; hidden files and folders are left out."""
    names = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inside = os.path.relpath(base, folder)
        names += [
            os.path.normpath(os.path.join(inside, f)).replace(os.sep, "/")
            for f in files
            if f.lower().endswith(SUFFIXES) and not f.startswith(".")
        ]
    return sorted(names)


def folder_annotations(folder: str | Path, flag: str) -> Annotations:
    """The images of a folder, numbered from 1 in the order of their names, with no annotation.

    Raises:
        UserError: it holds no image; names the flag.
    """
    names = image_names(folder)
    if not names:
        raise UserError(f"{flag} {folder}: no image below this folder ({', '.join(SUFFIXES)})")
    images = [{"id": i, "file_name": name} for i, name in enumerate(names, 1)]
    return parse({"images": images, "annotations": [], "categories": []}, str(folder), flag)


def list_images(images: Path, root: str, flag: str = "--images") -> tuple[list[int], list[str], str]:
    """(ids, file names, image root) of a folder, or of a COCO or LVIS file whatever its objects are like.

    Args:
        root: folder or URL of a file's images.
        flag: that named ``images``, for messages.

    Raises:
        UserError: no image, no root, or none of some images, spread over the list, is there.
    """
    if images.is_dir():
        found = folder_annotations(images, flag)
        return found.image_ids.tolist(), list(found.file_names), str(images)
    found = load_annotations(str(images), flag=flag, images_only=True)
    if not os.path.isdir(root) and not is_url(root):
        raise UserError(f"--image-root {root or '(not given)'}: no such folder; give that of the images of {images}")
    names = list(found.file_names)
    check_image_root(root, names[:: max(len(names) // 100, 1)], str(images), "--image-root")
    return found.image_ids.tolist(), names, root
