"""Few examples of each class, chosen by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def choose_shots(
    classes_of: Mapping[int, Sequence[int]], classes: Sequence[int], shots: int, seed: int | None = None
) -> list[int]:
    """Ids of the images that give every class ``shots`` images, if there are as many.

    An image is taken if any of its classes still needs one; then all its classes have one more, so that common classes
    get more than they need.

    Args:
        classes_of: class ids of each image's objects, by image id.
        classes: all class ids.
        shots: images for each class; 0 takes all.
        seed: of the order in which images are offered; None offers them by ascending id.

    Returns:
        Image ids, ascending.
    """
    ids = sorted(i for i, present in classes_of.items() if len(present))
    if not shots:
        return ids
    if seed is not None:
        ids = [ids[i] for i in np.random.default_rng(seed).permutation(len(ids))]
    needed = dict.fromkeys(classes, shots)
    chosen = []
    for identity in ids:
        present = set(classes_of[identity])
        if any(needed.get(c, 0) > 0 for c in present):
            chosen.append(identity)
            for c in present & needed.keys():
                needed[c] -= 1
    return sorted(chosen)
