"""Class embeddings for evaluation and region-text training: read from a file, or computed once and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import open_clip
from open_clip.identity import identity
from open_clip.prompts import class_embeddings as compute_class_embeddings
from open_clip.prompts import class_prompts
from open_clip.weights import load_torch_file
from training.engine.checkpoint import weights_hash
from training.engine.distributed import on_master
from training.engine.errors import UserError

logger = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]  # texts to token ids [N, L]
Prompts = Callable[[str], list[str]]  # a class name to its prompts

CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "open_clip" / "class_embeddings"
REMEDY = "make a fitting file with tools/generate_text_embeddings.py, or leave the flag out to compute and cache one"


def load_or_compute(
    args: Namespace,
    model: nn.Module,
    tokenizer: Tokenizer | None,
    class_names: Sequence[str],
    *,
    embed_dim: int | None = None,
    flag: str = "--embed-path",
    names_file: str = "",
    device: torch.device | str | None = None,
    cache_folder: str | Path | None = CACHE_FOLDER,
    progress: bool = False,
    prompts: Prompts = class_prompts,
) -> Tensor:
    """Unit-length class embeddings, float32 ``[C, D]`` on the CPU, in the order of ``class_names``.

    From the file of ``flag`` when it is given, else from the model's text tower (cached in ``cache_folder`` under a
    hash of the tower's weights, the names and their prompts). With several processes, process 0 computes and
    all others receive; every process must call it.

    Args:
        args: the attribute of ``flag`` (``embed_path`` or ``train_embed_path``) is read.
        model: its text tower is used when there is no file; ``embed_dim`` (D) always.
        tokenizer: texts to token ids; None when only a file is to be read.
        class_names: C names in label order.
        embed_dim: D, when the model does not tell.
        flag: the command-line flag that names the file.
        names_file: the annotation file that ``class_names`` come from, for messages.
        device: where the text tower is; by default that of its weights.
        cache_folder: where computed embeddings are kept; None for a text tower that trains, whose entries never recur.
        progress: show a progress bar while computing.
        prompts: a class name to the prompts that its embedding is the mean of.

    Raises:
        UserError: a file that is missing, unreadable, or of another count or width.
    """
    if embed_dim is None:
        embed_dim = model.visual.embed_dim
    path = getattr(args, flag.lstrip("-").replace("-", "_"), None)
    if path:
        return load_class_embeddings(path, class_names, embed_dim, flag=flag, names_file=names_file)
    if tokenizer is None:
        raise ValueError("class embeddings are to be computed, but there is no tokenizer")
    # On one process: on CPUs the prompts of a class list take minutes.
    return on_master(lambda: _compute_or_cached(model, tokenizer, class_names, device, cache_folder, progress, prompts))


def load_class_embeddings(
    path: str | Path, class_names: Sequence[str], embed_dim: int, *, flag: str = "--embed-path", names_file: str = ""
) -> Tensor:
    """Read class embeddings from a file: float32 ``[C, D]`` of unit length.

    ``.npy``: an array ``[C, D]`` in label order, any float type. ``.pt``/``.pth``: such a tensor, or a dict from class
    name (whatever its case, ``_`` or space) to ``[D]``, which may hold more classes.

    Raises:
        UserError: a file that is missing, unreadable, not finite, or of another count or width.
    """
    where = f"{flag} {path}"
    if not os.path.isfile(path):
        raise UserError(f"{where}: no such file; {REMEDY}")
    try:
        if str(path).endswith((".pt", ".pth")):
            content = load_torch_file(path)
        else:
            content = torch.from_numpy(np.load(path, allow_pickle=False))
    except Exception as error:  # numpy and torch raise many kinds for a damaged file
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{where}: not readable as class embeddings ({reason}); {REMEDY}") from None
    if isinstance(content, dict):
        # "Potted plant" and "potted_plant" are one class to the makers of such files.
        plain = {_plain(name): value for name, value in content.items()}
        content = {**{name: plain[_plain(name)] for name in class_names if _plain(name) in plain}, **content}
        missing = [name for name in class_names if name not in content]
        if missing:
            raise UserError(
                f"{where}: no embedding of {', '.join(map(repr, missing[:3]))}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''} of the {len(class_names)} classes"
                f"{f' of {names_file}' if names_file else ''}; {REMEDY}"
            )
        shapes = {tuple(torch.as_tensor(content[name]).shape) for name in class_names}
        if len(shapes) > 1:
            raise UserError(f"{where}: embeddings of different shapes {sorted(shapes)}; {REMEDY}")
        content = torch.stack([torch.as_tensor(content[name]) for name in class_names])
    if not isinstance(content, Tensor) or not content.is_floating_point():
        raise UserError(f"{where}: holds no array of floats; {REMEDY}")
    if tuple(content.shape) != (len(class_names), embed_dim):
        raise UserError(
            f"{where}: shape {tuple(content.shape)}, but {names_file or 'the annotation file'} has {len(class_names)} "
            f"classes and the model's embeddings are {embed_dim} wide; {REMEDY}"
        )
    content = content.float()
    length = content.norm(dim=-1)
    if not torch.isfinite(content).all() or (length == 0).any():
        raise UserError(f"{where}: an embedding is zero or not finite; {REMEDY}")
    return F.normalize(content, dim=-1)  # half-precision files are off unit length by up to 1e-3


def _plain(name: object) -> str:
    return str(name).lower().replace("_", " ")


def _compute_or_cached(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    device: torch.device | str | None,
    cache_folder: str | Path | None,
    progress: bool,
    prompts: Prompts,
) -> Tensor:
    file = None
    if cache_folder is not None:
        file = Path(cache_folder).expanduser() / f"{cache_key(model, tokenizer, class_names, prompts)}.npy"
        cached = _read(file)
        if cached is not None:
            logger.info("class embeddings of %d classes from %s", len(class_names), file)
            return cached
    logger.info("computing class embeddings of %d classes", len(class_names))
    embeddings = compute_class_embeddings(
        model,
        _without_padding(tokenizer, model.text),
        list(class_names),
        device=device,
        progress=progress,
        prompts=prompts,
    )
    if file is not None:
        _save(file, embeddings.numpy())
    return embeddings


def cache_key(
    model: nn.Module, tokenizer: Tokenizer, class_names: Sequence[str], prompts: Prompts = class_prompts
) -> str:
    """Hash of what the embeddings depend on: the text tower, the names, their tokens and their prompts."""
    digest = hashlib.sha256(json.dumps([list(class_names), [prompts(name) for name in class_names]]).encode())
    digest.update(tokenizer(list(class_names)).numpy().tobytes())
    if isinstance(model.text, open_clip.TextTower):
        digest.update(identity(model.text).encode())
    else:  # a text encoder of somebody's own: its weights are all that is known of it
        digest.update(weights_hash(model.text.state_dict()).encode())
    return digest.hexdigest()[:32]


def _without_padding(tokenizer: Tokenizer, text_tower: nn.Module) -> Tokenizer:
    """A tokenizer whose rows end with the longest text.

    A causal tower that is read at the end token never sees what follows it, and prompts fill a fifth of the context.
    """
    if not (getattr(text_tower, "causal", False) and getattr(text_tower, "pool", None) == "argmax"):
        return tokenizer

    def tokenize(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts)
        return tokens[:, : int(tokens.argmax(1).max()) + 1]  # the end token has the largest id

    return tokenize


def _read(file: Path) -> Tensor | None:
    """A cache file; None when there is none or it is damaged."""
    try:
        return torch.from_numpy(np.load(file, allow_pickle=False))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s is damaged (%s); computing the class embeddings anew", file, error)
        return None


def _save(file: Path, array: np.ndarray) -> None:
    """Write a cache file so that no reader ever sees half of it. A cache that cannot be written is only a warning."""
    temporary = file.with_name(f"{file.stem}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            np.save(stream, array)
        os.replace(temporary, file)
    except OSError as error:
        logger.warning("class embeddings are not cached: %s", error)
