"""The vocabulary of a detector: names, which of them are novel, and their embeddings."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ovdet.config import Config
from training.class_embeddings import load_class_embeddings, load_or_compute
from training.engine.data.records import Annotations
from training.engine.errors import UserError

log = logging.getLogger(__name__)

BACKGROUND = "background"
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


def free_vocabulary(names: Sequence[str], base: Sequence[str] = ()) -> Vocabulary:
    """A vocabulary of one's own; classes that the detector was trained on (``base``) count as base, others as novel."""
    known = {name.lower().replace("_", " ") for name in base}
    novel = tuple(name.lower().replace("_", " ") not in known for name in names)
    return Vocabulary(tuple(names), tuple(range(1, len(names) + 1)), novel)


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
    progress: bool = False,
) -> Tensor:
    """Embeddings of classes and background, float32 ``[C+1, D]`` of unit length; every process must call it.

    From ``data.embeddings`` when that is given (see :func:`read_embeddings`), else from the model's text tower, and
    kept; see :func:`training.class_embeddings.load_or_compute`.

    Raises:
        UserError: a file that is missing, unreadable, of another size, or without one of the classes.
    """
    if config.data.embeddings:
        return read_embeddings(config.locate(config.data.embeddings), names, model.visual.embed_dim)
    return noun_embeddings(model, tokenizer, [*names, BACKGROUND], device=device, progress=progress)


def read_embeddings(path: str, names: Sequence[str], width: int) -> Tensor:
    """Read class embeddings ``[C+1, D]``, background last, from a file.

    ``.npy`` (or a tensor in ``.pt``): ``[C+1, D]`` in label order. ``.pt`` with a dict from name to ``[D]``: any
    classes, one of them "background".

    Raises:
        UserError: see :func:`vocabulary_embeddings`.
    """
    return load_class_embeddings(path, [*names, BACKGROUND], width, flag="data.embeddings")


def noun_embeddings(
    model: nn.Module,
    tokenizer: Tokenizer,
    names: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """Embeddings ``[N, D]`` of names by the prompt ensemble, from the cache when they are there; called together."""
    nothing = Namespace(embeddings=None)
    return load_or_compute(nothing, model, tokenizer, names, flag="embeddings", device=device, progress=progress)


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
