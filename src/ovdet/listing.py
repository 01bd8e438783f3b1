"""What command lines name: classes, image files and folders, and where the pictures of images go."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.engine.data.folder import SUFFIXES
from training.engine.errors import UserError

log = logging.getLogger(__name__)

_COMMON = r"txt|names|csv|jsonl?|list|tsv|md|toml|ya?ml|npy|npz|pth?|jpe?g|png|webp|bmp|tiff?|gif"
_LIKE_A_FILE = re.compile(rf"[\\/]|\.({_COMMON})$", re.IGNORECASE)
# Of several names "bow/tie" is a class; "lists/animals.names" is none.
_SURELY_A_FILE = re.compile(rf"[\\/][^\\/]*\w\.\w{{1,5}}$|\.({_COMMON})$", re.IGNORECASE)


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a list of names may be longer than file names are."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_names(text: str, flag: str = "--classes", *, once: bool = True) -> list[str]:
    """Class names of ``"cat, dog"``, or of a file with one name a line.

    A single name that has a slash or ends like a file is taken for a file that was mistyped, not for a class. Several
    names hold no file: it would be looked for in the images as a class.

    Args:
        once: whether repeated names are refused; otherwise they count once.

    Raises:
        UserError: such a file, one that is no text, no name at all, one twice, or a file among names.
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
        for name in (n.strip() for n in names):
            if name and (_is_file(Path(name)) or _SURELY_A_FILE.search(name)):
                raise UserError(
                    f'{flag}: "{name}" among the names is a file, or looks like one: give one file of names alone, or '
                    "names only (images go before the options; names like files can stand in a file, one a line)"
                )
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError(f'{flag} "{text}": give names separated by commas, or a file with one name a line')
    if not once:
        return list(dict.fromkeys(names))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f'{flag}: "{repeated[0]}" is named twice')
    return names


def list_images(places: Sequence[str], flag: str = "IMAGE", *, output: Path | None = None) -> list[str]:
    """Image files, and those in and below folders, in order; each file once, however it is spelled.

    Args:
        output: where pictures go: what lies there is left out of the folders around it, with a message. A former run
            drew it.

    Raises:
        UserError: a folder without an image.
    """
    real = functools.cache(os.path.realpath)  # of the folders: there may be many images in each
    top = real(output) if output else ""
    found: list[str] = []
    for place in places:
        if not Path(place).is_dir():
            found.append(str(place))
            continue
        inside = sorted(str(p) for p in Path(place).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if output and Path(real(place)) in Path(top).parents:
            others = [f for f in inside if not f"{real(os.path.dirname(f))}{os.sep}".startswith(f"{top}{os.sep}")]
            if len(others) < len(inside):
                drawn = len(inside) - len(others)
                log.warning("%s %s: %d pictures in the output folder %s are left out", flag, place, drawn, output)
            inside = others
        if not inside:
            raise UserError(f"{flag} {place}: the folder holds no image ({', '.join(SUFFIXES)})")
        found += inside
    once: dict[str, str] = {}
    for file in found:  # links within a folder stay apart: they are images of different names
        once.setdefault(os.path.join(real(os.path.dirname(file)), os.path.basename(file)), file)
    return list(once.values())


def check_folder(folder: Path, flag: str) -> None:
    """UserError where a folder to write to is a file, or lies below one; it need not be there yet."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if os.path.lexists(place):
            raise UserError(f"{flag} {folder}: {place} is a file, no folder; give a folder to write to")


def place_pictures(sources: Sequence[str], folder: Path, suffix: str = ".png") -> list[Path]:
    """Where the picture of each image goes: ``folder/NAME.png``, below the folders by which images of one name differ.

    No two pictures have one name.

    Raises:
        UserError: ``folder`` is a file, or a picture would replace an image.
    """
    check_folder(folder, "--out")
    stems = [Path(source).stem for source in sources]
    parents = [str(Path(source).resolve().parent) for source in sources]
    top = os.path.commonpath(parents) if parents else ""
    number = Counter(stems)
    targets: list[Path] = []
    taken: set[Path] = set()
    for source, stem, parent in zip(sources, stems, parents, strict=True):
        below = os.path.relpath(parent, top) if number[stem] > 1 else "."
        target = next(name for name in _names(folder / below, Path(source), suffix) if name not in taken)
        taken.add(target)
        targets.append(target)
    originals = {Path(source).resolve() for source in sources}
    for target in targets:
        if target.resolve() in originals:
            raise UserError(f"--out {folder}: {target} would replace one of the images; choose another folder")
    return targets


def _names(folder: Path, source: Path, suffix: str) -> Iterator[Path]:
    """Names for a picture in the order of preference: others serve a.jpg and a.png of one folder, and a.png.png."""
    yield folder / f"{source.stem}{suffix}"
    yield folder / f"{source.name}{suffix}"
    for number in itertools.count(2):
        yield folder / f"{source.name}-{number}{suffix}"
