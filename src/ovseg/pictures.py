"""Label maps as files, the colours of their classes, and lists of photographs."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ovseg.classes import IGNORE, ClassList
from training.engine.data.folder import SUFFIXES, image_names
from training.engine.errors import UserError
from training.engine.pictures import distinct_colours


def class_colours(classes: ClassList) -> np.ndarray:
    """RGB uint8 ``[C, 3]``: the data set's palette where it has one without repetitions, else colours made here."""
    palette = [tuple(colour) for colour in classes.palette]
    if palette and len(set(palette)) == len(palette):
        return np.asarray(palette, dtype=np.uint8)
    return distinct_colours(len(classes), background=classes.background)


def write_label_png(path: Path, labels: np.ndarray, colours: np.ndarray) -> None:
    """Labels uint8 ``[H, W]`` as a palette PNG whose values are the labels; 255 (nothing) is white.

    The file is complete or not there.

    Raises:
        UserError: it cannot be written.
    """
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: len(colours)] = colours
    palette[IGNORE] = 255
    image = Image.fromarray(labels)
    image.putpalette(palette.tobytes())  # makes it a picture of mode P
    content = io.BytesIO()
    image.save(content, format="PNG")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def list_images(places: Sequence[str | Path]) -> list[tuple[Path, Path]]:
    """Photographs of files and folders: (path, name below its place), folders in order and with what is inside them.

    Raises:
        UserError: a place that does not exist, or no photograph at all.
    """
    found: list[tuple[Path, Path]] = []
    for place in map(Path, places):
        if place.is_dir():
            found += [(place / name, Path(name)) for name in image_names(place)]
        elif place.is_file():
            found.append((place, Path(place.name)))
        else:
            raise UserError(f"{place}: no such file or folder")
    if not found:
        raise UserError(f"{', '.join(map(str, places))}: no photographs ({', '.join(SUFFIXES)}) in there")
    return found
