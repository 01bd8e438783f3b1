"""A folder of images as annotations without boxes: training data for regions that need none."""

from __future__ import annotations

import os
from pathlib import Path

from training.engine.data.annotations import Annotations, parse
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
