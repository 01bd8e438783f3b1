"""Files that are complete or not there, and are verified when they are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from training.engine.errors import UserError


@contextlib.contextmanager
def replacing(path: Path, *, text: bool = False) -> Iterator[IO[Any]]:
    """A file to write that is complete or not there: beside its place, flushed to disk, then renamed.

    A failure leaves what was there as it was, and nothing beside it.

    Args:
        text: UTF-8, not bytes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w" if text else "wb", encoding="utf-8" if text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is complete or not there; see :func:`replacing`."""
    with replacing(path, text=True) as file:
        file.write(text)


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """Write a text file, part after part, that is complete or not there; its folder is made where it is missing.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, text=True) as file:
            file.writelines(parts)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): free some space or choose another folder"
        ) from error


def check_writable(path: Path, flag: str) -> None:
    """See that a file can be written, before the work whose result it is to hold. Nothing is left behind.

    Args:
        flag: the option that names it, for messages.

    Raises:
        UserError: it is a folder, or its folder is not writable or cannot be made.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: give a file")
    folder = next(f for f in path.absolute().parents if f.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror}): choose another folder") from error


def write_json(path: Path, content: Any) -> None:
    """Write a json file that is complete or not there; see :func:`write_parts`."""
    write_parts(path, [json.dumps(content)])


def save_atomically(content: dict[str, Any], path: Path, folder_flag: str = "--logs") -> None:
    """``torch.save`` to a file that is complete or not there; a failure leaves the old file as it was.

    Args:
        folder_flag: the option that chooses the folder, for messages.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        with replacing(path) as file:
            torch.save(content, file)
        flush(path.parent)  # the rename itself
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"checkpoint {path} cannot be written ({reason}): free some space or choose another {folder_flag}"
        ) from error


def read_file(path: Path) -> Any:
    """What :func:`save_atomically` wrote, on the CPU. Nothing in it is executed, and every part's checksum is verified,
    which torch does not: a damaged file is never taken for good.

    Raises:
        UserError: missing, or damaged.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: check the path")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is cut off, or no checkpoint at all")
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle raise a dozen kinds for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"checkpoint {path} is damaged ({reason}): use an earlier one") from error


def checksum(file: Path) -> str:
    """BLAKE2b of a file's content, in hexadecimal."""
    digest = hashlib.blake2b()
    with open(file, "rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """See a file, or the entries of a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
