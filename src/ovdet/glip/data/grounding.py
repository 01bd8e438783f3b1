"""Grounding sets in COCO's form: Flickr30k Entities, the mixed set of COCO, Visual Genome and GQA, and your own.

Images carry ``caption``, annotations ``bbox`` (xywh) and ``tokens_positive``, the characters of the phrase.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ovdet.glip.data.records import Builder, Records, is_id, read_box, read_spans
from training.engine.data.parsing import image_file_name, read_json
from training.engine.errors import UserError


def load_grounding(
    path: str, *, key: str, evaluation: bool = False, folders: Mapping[str, str] | None = None
) -> Records:
    """Read a grounding file. Entries that cannot be used are left out, counted and named in the log.

    Args:
        key: what the path was given as, for messages.
        folders: where images of each ``data_source`` lie below the image root, for sets that are made of several.
        evaluation: keep ``tokens_positive_eval`` (the phrases asked for), ``sentence_id`` and ``original_img_id``.

    Raises:
        UserError: missing, not json, not of this form, or without one usable image.
    """
    content = read_json(path, key)
    entries = content.get("annotations", [])
    if not isinstance(entries, list):
        raise UserError(f'{key} {path}: "annotations" is no list')
    builder = Builder(path, extra=evaluation)
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        if isinstance(entry, dict) and is_id(entry.get("image_id")):
            objects[entry["image_id"]].append(entry)
        else:
            builder.skipped["annotation without an image"] += 1
    seen: set[int] = set()
    for image in content["images"]:
        identity = image.get("id") if isinstance(image, dict) else None
        if not is_id(identity) or identity in seen or not image_file_name(image):
            builder.skipped["image without an id of its own or without a file name"] += 1
            continue
        seen.add(identity)
        caption = image.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            builder.skipped["image without a caption"] += 1
            continue
        name = image_file_name(image)
        if folders:
            folder = folders.get(str(image.get("data_source")))
            if folder is None:
                builder.skipped[f"image of the source {image.get('data_source')!r}, which has no folder"] += 1
                continue
            name = f"{folder}/{name}"
        found = [o for o in (_object(entry, caption, builder) for entry in objects.pop(identity, [])) if o]
        extra = None
        if evaluation:
            keys = ("tokens_positive_eval", "sentence_id", "original_img_id", "data_source")
            extra = {name: image[name] for name in keys if name in image}
        builder.add(identity, name, caption, found, extra)
    if objects:
        builder.skipped["annotation of an image that is not listed"] += sum(map(len, objects.values()))
    return builder.finish(key)


def _object(entry: dict[str, Any], caption: str, builder: Builder) -> tuple | None:
    reason, box = read_box(entry.get("bbox"), xywh=True)
    if not reason and entry.get("iscrowd"):
        reason = "crowd"
    spans: list = []
    if not reason:
        reason, spans = read_spans(entry.get("tokens_positive"), caption)
    if reason:
        builder.skipped[reason] += 1
        return None
    return box, 1.0, spans
