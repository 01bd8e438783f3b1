"""Files of boxes that were found in images, in COCO's layout, to train on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def boxes_file(
    found: Iterable[dict[str, Any]], ids: Sequence[int], names: Sequence[str], categories: Sequence[str], *,
    unannotated: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Content of a COCO file of boxes.

    Args:
        found: for each image ``index`` (of ``ids`` and ``names``), ``original`` (height, width), ``boxes`` ``[K, 4]``
            xyxy in pixels, ``scores`` ``[K]`` and, where the boxes have names, ``nouns`` ``[K]`` (rows of
            ``categories``).
        ids, names: of all images.
        categories: their names, numbered from 1.
        unannotated: whether they were found without learning from any annotation, see
            :class:`~training.engine.data.records.Annotations`.
    """
    images, annotations = [], []
    for image in found:
        height, width = image["original"]
        images.append({"id": ids[image["index"]], "file_name": names[image["index"]], "height": height, "width": width})
        for i, (x1, y1, x2, y2) in enumerate(image["boxes"].astype(np.float64).round(2).tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": ids[image["index"]],
                    "category_id": int(image["nouns"][i]) + 1 if "nouns" in image else 1,
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "area": round((x2 - x1) * (y2 - y1), 2),
                    "iscrowd": 0,
                    "score": round(float(image["scores"][i]), 5),
                }
            )
    return {
        "info": {"unannotated": unannotated},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
    }
