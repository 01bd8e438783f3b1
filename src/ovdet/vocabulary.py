"""The vocabulary of a detector: names, which of them are novel, and their embeddings."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip.prompts import PROMPT_TEMPLATES, class_embeddings
from ovdet.config import Config
from ovdet.data.annotations import Annotations
from ovdet.distributed import broadcast
from ovdet.errors import UserError

log = logging.getLogger(__name__)

BACKGROUND = "background"
CACHE_FOLDER = "~/.cache/open_clip/class_embeddings"
Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Vocabulary:
    """C classes in label order.

    Attributes:
        names: class names; label i is ``names[i]``.
        category_ids: their ids in the annotation file; int64 ``[C]``.
        novel: bool ``[C]``, True for classes without training labels.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    novel: tuple[bool, ...]

    @property
    def base_mask(self) -> Tensor:
        """bool ``[C]``, True for base classes."""
        return ~torch.tensor(self.novel, dtype=torch.bool)


def make_vocabulary(config: Config, annotations: Annotations) -> Vocabulary:
    """Classes of an annotation file, in category-id order, with the config's choice of novel ones.

    Raises:
        UserError: ``data.novel`` names a class that the file lacks, or ``data.novel_frequency`` is given for a file
            without frequencies.
    """
    data = config.data
    unknown = [name for name in data.novel if name not in annotations.names]
    if unknown:
        raise UserError(
            f"data.novel names {_some(unknown)}, which {annotations.file} does not list: its categories must be those "
            "evaluated (tools/prepare_open_vocabulary.py makes such a file), or correct data.novel"
        )
    if data.novel_frequency and not set(annotations.frequencies) & set(data.novel_frequency):
        raise UserError(
            f"data.novel_frequency is {data.novel_frequency}, but no category of {annotations.file} has such a "
            '"frequency": give an LVIS file, or data.novel_frequency=[]'
        )
    novel = tuple(
        name in data.novel or (frequency != "" and frequency in data.novel_frequency)
        for name, frequency in zip(annotations.names, annotations.frequencies, strict=True)
    )
    return Vocabulary(tuple(annotations.names), tuple(int(i) for i in annotations.category_ids), novel)


def training_labels(annotations: Annotations, vocabulary: Vocabulary) -> np.ndarray:
    """Label of each annotated object in the vocabulary, int64 ``[A]``; -1 where it must not be learned.

    Classes are found by name. Objects of novel classes, and of classes that the vocabulary lacks, are left out with a
    message: an open-vocabulary detector never sees them.

    Raises:
        UserError: nothing is left.
    """
    rows = {name: label for label, name in enumerate(vocabulary.names) if not vocabulary.novel[label]}
    table = np.array([rows.get(name, -1) for name in annotations.names], np.int64)
    labels = table[annotations.labels]
    dropped = Counter(annotations.names[label] for label in annotations.labels[labels < 0].tolist())
    for kind, names in (
        ("novel", [n for n in dropped if n in vocabulary.names]),
        ("not among those evaluated", [n for n in dropped if n not in vocabulary.names]),
    ):
        if names:
            number = sum(dropped[n] for n in names)
            log.warning("%s: %d objects of %d classes that are %s are left out of training (%s)",
                        annotations.file, number, len(names), kind, _some(names))  # fmt: skip
    if not ((labels >= 0) & ~annotations.crowd).any():
        raise UserError(
            f"data.train_annotations {annotations.file}: no object is of a base class of the vocabulary "
            f"({_some(list(vocabulary.names))}); give the training file that belongs to the validation file"
        )
    return labels


def vocabulary_embeddings(
    config: Config,
    model: nn.Module,
    tokenizer: Tokenizer,
    names: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    cache_folder: str | Path = CACHE_FOLDER,
    progress: bool = False,
) -> Tensor:
    """Embeddings of classes and background, float32 ``[C+1, D]`` of unit length; every process must call it.

    From ``data.embeddings`` when that is given, else from the model's text tower, on process 0, which keeps them in a
    cache under a hash of the tower's weights, the names and the prompts.

    Raises:
        UserError: a file that is missing, unreadable, of another size, or without one of the classes.
    """
    width = model.visual.embed_dim
    if config.data.embeddings:
        return read_embeddings(config.locate(config.data.embeddings), names, width)
    return broadcast(
        lambda: compute_embeddings(
            model, tokenizer, [*names, BACKGROUND], device=device, cache_folder=cache_folder, progress=progress
        ),
        shape=(len(names) + 1, width),
    )


def read_embeddings(path: str, names: Sequence[str], width: int) -> Tensor:
    """Read class embeddings ``[C+1, D]``, background last.

    ``.npy`` (or a tensor in ``.pt``): ``[C+1, D]`` in label order. ``.pt`` with a dict from name to ``[D]``: any
    classes, one of them "background"; names are compared without regard to case and ``_``.

    Raises:
        UserError: see :func:`vocabulary_embeddings`.
    """
    where = f"data.embeddings {path}"
    remedy = 'make one with the text tower of the same model, or give data.embeddings="" to compute and cache it'
    if not os.path.isfile(path):
        raise UserError(f"{where}: no such file; {remedy}")
    try:
        if path.endswith((".pt", ".pth")):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            content = torch.from_numpy(np.load(path, allow_pickle=False))
    except Exception as error:  # numpy and torch raise many kinds for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"{where}: not readable as embeddings ({reason}); {remedy}") from None
    if isinstance(content, dict):
        known = {_plain(name): torch.as_tensor(value).flatten() for name, value in content.items()}
        missing = [name for name in (*names, BACKGROUND) if _plain(name) not in known]
        if missing:
            raise UserError(f"{where}: no embedding of {_some(missing)}; {remedy}")
        rows = [known[_plain(name)] for name in (*names, BACKGROUND)]
        if len({len(row) for row in rows}) > 1:
            raise UserError(f"{where}: its embeddings are of different lengths; {remedy}")
        content = torch.stack(rows)
    if not isinstance(content, Tensor) or not content.is_floating_point() or content.ndim != 2:
        raise UserError(f"{where}: holds no table of floats; {remedy}")
    if tuple(content.shape) != (len(names) + 1, width):
        raise UserError(
            f"{where}: shape {tuple(content.shape)}, but {len(names)} classes and a last row for {BACKGROUND} of width "
            f"{width} are needed; {remedy}"
        )
    content = content.float()
    if not content.isfinite().all() or (content.norm(dim=1) == 0).any():
        raise UserError(f"{where}: an embedding is zero or not finite; {remedy}")
    return F.normalize(content, dim=-1)


def compute_embeddings(
    model: nn.Module,
    tokenizer: Tokenizer,
    names: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    cache_folder: str | Path = CACHE_FOLDER,
    progress: bool = False,
) -> Tensor:
    """Embeddings ``[len(names), D]`` by the prompt ensemble, from the cache when they are there."""
    file = Path(cache_folder).expanduser() / f"{_cache_key(model, tokenizer, names)}.npy"
    try:
        cached = torch.from_numpy(np.load(file, allow_pickle=False))
        if len(cached) == len(names) and cached.isfinite().all():
            log.info("embeddings of %d classes from %s", len(names), file)
            return cached
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError):
        log.warning("%s is damaged: the class embeddings are computed anew", file)
    log.info("computing the embeddings of %d classes", len(names))
    embeddings = class_embeddings(
        model, _trimmed(tokenizer, model.text), list(names), device=device, progress=progress
    ).float().cpu()  # fmt: skip
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            np.save(stream, embeddings.numpy())
        os.replace(temporary, file)
    except OSError as error:
        log.warning("the class embeddings are not cached: %s", error)
    return embeddings


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types and values of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _cache_key(model: nn.Module, tokenizer: Tokenizer, names: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([list(names), list(PROMPT_TEMPLATES)]).encode())
    digest.update(tokenizer(list(names)).numpy().tobytes())
    digest.update(weights_hash(model.text).encode())
    return digest.hexdigest()[:32]


def _trimmed(tokenizer: Tokenizer, text_tower: nn.Module) -> Tokenizer:
    """A tokenizer whose rows end with the longest text: a causal tower read at the end token never sees the rest."""
    if not (getattr(text_tower, "causal", False) and getattr(text_tower, "pool", None) == "argmax"):
        return tokenizer

    def tokenize(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts)
        return tokens[:, : int(tokens.argmax(1).max()) + 1]  # the end token has the largest id

    return tokenize


def _plain(name: str) -> str:
    return name.lower().replace("_", " ")


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
