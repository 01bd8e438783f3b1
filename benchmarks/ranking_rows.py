"""Rows of the ranking bench: the flags of each, and which kept answers of teachers they share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from foundation import TRUNK  # noqa: E402

MODEL, SIZE, LARGER = "ViT-Ti-8-64", 128, 192
BASE = "clipself"

# Flags of each row; {data}, {trunk}, {teacher} and {answers} are filled in. All train on grids unless they say so.
KEPT = ["--cache-teacher", "{answers}"]
CROPS = ["--fixed-regions", *KEPT]
VFM = ["--vfm", TRUNK, "--vfm-weights", "{trunk}", *CROPS]
DENSE = ["--names", "{data}/names.json", "--dense-teacher", MODEL, "--dense-teacher-weights", "{teacher}",
         "--logit-temperature", "0.02"]  # fmt: skip
BOXES = ["--dataset-type", "proposals_distill"]
PROPOSED = ["--dataset-type", "mixed_distill", "--train-data", "{data}/proposed.json"]  # of the foundation model
# MixRC's own parts, each added alone to CLIPSelf on the same regions; the plain rows "mixrc" have DenseRC's parts.
PARTS = ["--method", "mixrc", "--readout", "value", "--coherence-weight", "0", *PROPOSED]
METHODS: dict[str, list[str]] = {
    BASE: CROPS,
    "clipself, v": ["--readout", "value_bare", *CROPS],
    "clipself, 3 v": ["--readout", "multi-v:3", *CROPS],
    "clipself, windows": ["--readout", "window:4", *CROPS],
    "clipself, fewer cells": ["--max-split", "3", *CROPS],  # 4.3 regions an image, in place of 6.8
    "clipself, more cells": ["--max-split", "5", *CROPS],  # as many regions as the next two rows have: 8.3 an image
    "clipself, mixed": ["--dataset-type", "mixed_distill", *CROPS],
    "clipself, proposed": [*PROPOSED, *CROPS],
    "clipself, proposed, as many": [*PROPOSED, *CROPS, "--max-boxes", "8"],  # as plain grids have: 6.8
    "sc": ["--method", "sc", *CROPS],
    "declip": ["--method", "declip", *VFM, "--context-weight", "0.1"],
    "synclip, free": ["--method", "synclip", *VFM, "--classes-from", "teacher", "--names", "{data}/names.json",
                      "--context-weight", "0.1", "--dataset-type", "grid_distill"],
    "denserc": ["--method", "denserc", *VFM],
    "densevlm": ["--method", "densevlm", *DENSE, *CROPS],
    "clipself, boxes": [*BOXES, *KEPT],
    "mixrc": ["--method", "mixrc", *VFM],
    "mixrc, proposed": ["--method", "mixrc", *PROPOSED, *VFM],
    "mixrc, teacher": [*PARTS, *CROPS, *DENSE, "--alignment-weight", "0.2"],
    "mixrc, names": [*PARTS, *VFM, "--names", "{data}/names.json", "--semantic-weight", "0.05"],
    "fineclip": ["--method", "fineclip", *BOXES, "--train-data", "{data}/captioned.json"],
    "regionclip": ["--method", "regionclip"],
    "clim": ["--method", "clim", "--train-data", "{data}/base_pairs.json", "--train-image-root", "{data}/scenes/pairs",
             "--mosaic-size", str(SIZE), "--batch-size", "32"],
}  # fmt: skip

# Rows that ask what of a method does what, beside the methods themselves.
ABLATIONS = ("clipself, v", "clipself, 3 v", "clipself, fewer cells", "clipself, more cells", "clipself, mixed",
             "clipself, proposed, as many", "mixrc, proposed", "mixrc, teacher", "mixrc, names")  # fmt: skip

# Rows that add one thing to another, whose learning rate they take: they differ in nothing else.
VARIANTS = {"clipself, fewer cells": BASE, "clipself, more cells": BASE, "clipself, mixed": BASE,
            "clipself, proposed": BASE, "clipself, proposed, as many": BASE, "mixrc, proposed": "mixrc",
            "mixrc, teacher": BASE, "mixrc, names": BASE}  # fmt: skip


def chosen(names: Collection[str] | None, *, ablations: bool) -> list[str]:
    """Rows to run: the named ones, by default all but ablations, with these if they are asked for; CLIPSelf always."""
    names = set(METHODS).difference(ABLATIONS) if names is None else set(names)
    wanted = names.union([BASE], ABLATIONS if ablations else [])
    return [row for row in METHODS if row in wanted]


def check_packages(rows: Mapping[str, Sequence[str]]) -> None:
    """SystemExit where rows need a package that is not installed: hours before they would stop for it.

    Args:
        rows: their flags.
    """
    proposed = [row for row, flags in rows.items() if "{data}/proposed.json" in flags]
    if proposed and find_spec("sklearn") is None:
        raise SystemExit(f'error: {proposed[0]} needs scikit-learn: pip install -e ".[proposals]", or leave it out')


def needs_trunk(row: str) -> bool:
    """Whether a row has a foundation model."""
    return not {"{trunk}", "{data}/proposed.json"}.isdisjoint(METHODS[row])


def tuned(row: str, rows: Collection[str]) -> str:
    """The row whose learning rate a row takes: its own, or that of the method it is a variant of."""
    return VARIANTS[row] if VARIANTS.get(row) in rows else row


def shared_answers(flags: Sequence[str], seed: int) -> dict[str, str]:
    """Where a row's kept answers are, by the teacher's name.

    Those about crops are the same for all rows that draw the same regions from the same seed, those about whole images
    for all seeds; what one method asks the start model about images is its own.
    """
    method = flags[flags.index("--method") + 1] if "--method" in flags else BASE
    regions = "boxes" if "proposals_distill" in flags else "grid"
    if "mixed_distill" in flags or (method == "mixrc" and "grid_distill" not in flags):
        regions = "proposed" if "{data}/proposed.json" in flags else "mixed"
    for flag in {"--max-boxes", "--max-split"}.intersection(flags):
        regions += f"-of-{flags[flags.index(flag) + 1]}"
    shared = {"crops": f"crops-{regions}-{seed}"} if method != "densevlm" else {}
    shared |= {"vfm": "vfm"} if "--vfm" in flags else {}
    shared |= {"dense": "dense"} if "--dense-teacher" in flags else {}
    return shared | ({"start": f"start-{method}"} if "--names" in flags and "--dense-teacher" not in flags else {})


def kept_answers(folder: Path, flags: Sequence[str], seed: int) -> Path:
    """A folder for ``--cache-teacher`` of links to what a row shares with others; made if it is not there."""
    shared = shared_answers(flags, seed)
    own = folder / "+".join(sorted(shared.values()))
    own.mkdir(parents=True, exist_ok=True)
    for teacher, store in shared.items():
        (folder / "stores" / store).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (own / teacher).symlink_to(Path("..") / "stores" / store)
    return own


def row_name(row: str) -> str:
    """A row's name in names of folders."""
    return "".join(c if c.isalnum() else "-" for c in row).replace("--", "-")
