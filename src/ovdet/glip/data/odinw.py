"""Object detection in the wild: folders of data sets, each with splits in COCO's form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.engine.errors import UserError

ANNOTATIONS = ("annotations_without_background.json", "_annotations.coco.json", "annotations.json")
SPLITS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
#: The thirteen sets of the paper's tables.
ODINW13 = (
    "AerialMaritimeDrone", "Aquarium", "CottontailRabbits", "EgoHands", "NorthAmericaMushrooms", "Packages",
    "PascalVOC", "Raccoon", "ShellfishOpenImages", "VehiclesOpenImages", "pistols", "pothole", "thermalDogsAndPeople",
)  # fmt: skip


@dataclass(frozen=True)
class WildSet:
    """A data set: its name, and (annotation file, image root) of each split that it has."""

    name: str
    splits: dict[str, tuple[Path, Path]]

    def few_shot(self, shots: int, seed: int) -> Path | None:
        """The published choice of so many images of each class, beside the training annotations; None: not there."""
        if not shots or "train" not in self.splits:
            return None
        file = self.splits["train"][0].with_name(f"fewshot_train_shot{shots}_seed{seed}.json")
        return file if file.is_file() else None


def find_sets(root: str | Path, names: list[str] | None = None) -> list[WildSet]:
    """Data sets below a folder, by name.

    A set is a folder with splits, at any depth (``Aquarium/Aquarium Combined.v2-raw-1024.coco``); it is called by the
    first folder below the root. Of several versions of a set the first by name is taken.

    Args:
        names: only these; all of them must be there.

    Raises:
        UserError: no such folder, none in it, or not all of ``names``.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"ODinW folder {root} does not exist: unpack the data sets there")
    found: dict[str, WildSet] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        if names is not None and folder.name not in names:
            continue
        for place in [folder, *sorted(p for p in folder.rglob("*") if p.is_dir())]:
            splits = _splits(place)
            if splits:
                found[folder.name] = WildSet(folder.name, splits)
                break
    missing = sorted(set(names or ()) - set(found))
    if missing or not found:
        what = f"lacks {', '.join(missing[:5])} ({len(missing)} in all)" if missing else "holds no data set"
        raise UserError(f"ODinW folder {root} {what}: each is a folder with train, valid and test in COCO's form")
    return list(found.values())


def _splits(folder: Path) -> dict[str, tuple[Path, Path]]:
    splits = {}
    for split, folders in SPLITS.items():
        for place in (folder / name for name in folders):
            file = next((place / name for name in ANNOTATIONS if (place / name).is_file()), None)
            if file is not None:
                splits[split] = (file, place)
                break
    return splits
