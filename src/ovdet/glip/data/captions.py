"""Captions whose phrases have boxes of a teacher: json, json lines (one record a line), and TSV.

A record has ``image`` (or ``file_name``), ``caption``, ``bboxes`` (xyxy), ``scores`` and ``tokens_positive``, one entry
for each box. In the nested form ``bboxes`` and ``scores`` hold a list for each phrase.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import nms

from ovdet.glip.data.records import Builder, Records, is_id, read_box, read_spans
from training.engine.errors import UserError


def load_captions(path: str, *, key: str, score: float = 0.0, overlap: float = -1.0) -> Records:
    """Read caption records.

    Args:
        path: a ``.json`` list, a ``.jsonl`` file, a folder of ``.jsonl`` shards, or a pattern of files.
        score: boxes must exceed it (0.5 for GLIP-L).
        overlap: IoU above which the weaker of two boxes of one phrase is dropped; negative keeps all.

    Raises:
        UserError: no such file, not of this form, or without one usable record.
    """
    builder = Builder(path)
    for number, entry in enumerate(_entries(path, key)):
        add_caption(builder, entry, identity=number, image=None, score=score, overlap=overlap)
    return builder.finish(key)


def _entries(path: str, key: str) -> Iterator[Any]:
    """Records of all files that a path means, in the order of their names."""
    files = sorted(str(f) for f in Path(path).glob("*.jsonl")) if Path(path).is_dir() else sorted(glob.glob(path))
    if not files:
        raise UserError(f"{key} {path}: no such file; give caption records (.json, .jsonl or a folder of shards)")
    for file in files:
        try:
            with open(file, encoding="utf-8-sig") as opened:
                if file.endswith(".jsonl"):
                    yield from (json.loads(line) for line in opened if line.strip())
                else:
                    content = json.load(opened)
                    if not isinstance(content, list):
                        raise UserError(f"{key} {file}: no list of records in it; give caption records")
                    yield from content
        except (OSError, ValueError) as error:
            raise UserError(f"{key} {file}: cannot be read ({str(error)[:120]}); make it anew") from error


def add_caption(
    builder: Builder, entry: Any, *, identity: int, image: str | None, score: float, overlap: float
) -> None:
    """Check a record and add it; reasons against it are counted.

    Args:
        identity: used where the record has no id.
        image: its file, where the record does not say.
    """
    if not isinstance(entry, dict):
        builder.skipped["record that is no object"] += 1
        return
    image = image or entry.get("image") or entry.get("file_name")
    caption = entry.get("caption")
    if not isinstance(image, str) or not isinstance(caption, str) or not caption.strip():
        builder.skipped["record without image or caption"] += 1
        return
    objects = _objects(entry, caption, builder)
    objects = [o for o in objects if o[1] > score]
    if overlap >= 0:
        objects = _suppress(objects, overlap)
    if not objects:
        builder.skipped["caption without a box that is good enough"] += 1
        return
    builder.add(entry["id"] if is_id(entry.get("id")) else identity, image, caption, objects)


def _objects(entry: dict[str, Any], caption: str, builder: Builder) -> list[tuple]:
    boxes, scores, phrases = (entry.get(k) for k in ("bboxes", "scores", "tokens_positive"))
    if not isinstance(boxes, list) or not isinstance(phrases, list) or len(boxes) != len(phrases):
        builder.skipped["record whose boxes and phrases do not pair up"] += 1
        return []
    scores = [1.0] * len(boxes) if scores is None else scores
    if not isinstance(scores, list) or len(scores) != len(boxes):
        builder.skipped["record whose boxes and scores do not pair up"] += 1
        return []
    objects = []
    for box, value, phrase in zip(boxes, scores, phrases, strict=True):
        nested = isinstance(box, list) and (not box or isinstance(box[0], list))
        values = value if nested and isinstance(value, list) else [value] * (len(box) if nested else 1)
        for one, one_value in zip(box if nested else [box], values, strict=False):
            reason, corners = read_box(one, xywh=False)
            spans: list = []
            if not reason:
                reason, spans = read_spans(phrase, caption)
            if not reason and not isinstance(one_value, (int, float)):
                reason = "score that is no number"
            if reason:
                builder.skipped[reason] += 1
            else:
                objects.append((corners, float(one_value), spans))
    return objects


def _suppress(objects: list[tuple], overlap: float) -> list[tuple]:
    """NMS within each phrase; the order stays."""
    kept: list[int] = []
    groups: dict[tuple, list[int]] = {}
    for i, (_, _, spans) in enumerate(objects):
        groups.setdefault(tuple(spans), []).append(i)
    for rows in groups.values():
        boxes = torch.tensor([objects[i][0] for i in rows], dtype=torch.float32)
        scores = torch.tensor([objects[i][1] for i in rows], dtype=torch.float32)
        kept += [rows[j] for j in nms(boxes, scores, overlap).tolist()]
    return [objects[i] for i in sorted(kept)]
