"""What command lines name: classes, image files and folders, and where the pictures of images go."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from training.engine.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_LIKE_A_FILE = re.compile(r"[\\/]|\.(txt|names|csv|json|list|tsv|md)$", re.IGNORECASE)


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a list of names may be longer than file names are."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_names(text: str, flag: str = "--classes", *, once: bool = True) -> list[str]:
    """Class names of ``"cat, dog"``, or of a file with one name a line.

    A single name that has a slash or ends like a text file is taken for a file that was mistyped, not for a class.

    Args:
        once: whether repeated names are refused; otherwise they count once.

    Raises:
        UserError: such a file, one that is no text, no name at all, or one twice.
    """
    path = Path(text)
    if _is_file(path):
        try:
            names = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{flag} {text}: not readable as UTF-8 text ({type(error).__name__}); save it as UTF-8, one name a line"
            ) from None
    elif "," not in text and _LIKE_A_FILE.search(text.strip()):
        raise UserError(f'{flag} {text}: no such file; for classes with such names give several, as in "a/b,c"')
    else:
        names = text.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError(f'{flag} "{text}": give names separated by commas, or a file with one name a line')
    if not once:
        return list(dict.fromkeys(names))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f'{flag}: "{repeated[0]}" is named twice')
    return names


def list_images(places: Sequence[str], flag: str = "IMAGE") -> list[str]:
    """Image files, and those in and below folders, in order; each file once.

    Raises:
        UserError: a folder without an image.
    """
    found: list[str] = []
    for place in places:
        if not Path(place).is_dir():
            found.append(str(place))
            continue
        inside = sorted(str(p) for p in Path(place).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not inside:
            raise UserError(f"{flag} {place}: the folder holds no image ({', '.join(SUFFIXES)})")
        found += inside
    return list(dict.fromkeys(found))


def place_pictures(sources: Sequence[str], folder: Path, suffix: str = ".png") -> list[Path]:
    """Where the picture of each image goes: ``folder/NAME.png``, below the folders by which images of one name differ.

    Raises:
        UserError: a picture would replace an image.
    """
    stems = [Path(source).stem for source in sources]
    parents = [str(Path(source).resolve().parent) for source in sources]
    top = os.path.commonpath(parents) if parents else ""
    targets: list[Path] = []
    taken: set[Path] = set()
    for source, stem, parent in zip(sources, stems, parents, strict=True):
        below = os.path.relpath(parent, top) if stems.count(stem) > 1 else "."
        target = folder / below / f"{stem}{suffix}"
        if target in taken:  # a.jpg and a.png of one folder
            target = folder / below / f"{Path(source).name}{suffix}"
        taken.add(target)
        targets.append(target)
    originals = {Path(source).resolve() for source in sources}
    for target in targets:
        if target.resolve() in originals:
            raise UserError(f"--out {folder}: {target} would replace one of the images; choose another folder")
    return targets
