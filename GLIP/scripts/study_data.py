"""Grounding data from generated scenes: captions with phrases, some of whose colour-shape pairs are never trained.

    python study_data.py SCENES --known quickstart/data/annotations/instances_train2017.json

Reads ``SCENES/annotations/instances_{train,val}2017.json`` and ``split.json``, and writes into ``SCENES/glip``:

- ``train.json``: captions, with boxes, of the images without any held-out thing;
- ``detection.json``: the same images with the classes that are trained;
- ``val.json`` with ``Sentences`` and ``Annotations``, in Flickr30k Entities' form. The type of a phrase is "seen", or
  "unseen", and also "unknown" where the start model's captions had not shown the pair either;
- ``chance.json``.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def caption_of(names: list[str]) -> tuple[str, list[list[int]]]:
    """A caption of things, and the characters of each: "a red circle and a blue star and ..."."""
    text, spans = "", []
    for name in names:
        phrase = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        text += " and " if text else ""
        spans.append([len(text), len(text) + len(phrase)])
        text += phrase
    return text, spans


def objects_by_image(content: dict[str, Any]) -> dict[int, list[tuple[str, list[float]]]]:
    """(name, box xywh) of the objects of each image."""
    names = {c["id"]: c["name"] for c in content["categories"]}
    found: dict[int, list[tuple[str, list[float]]]] = defaultdict(list)
    for entry in content["annotations"]:
        found[entry["image_id"]].append((names[entry["category_id"]], entry["bbox"]))
    return found


def write_training(content: dict[str, Any], held_out: set[str], folder: Path) -> int:
    """``train.json`` and ``detection.json``; returns the number of images."""
    objects, images, annotations = objects_by_image(content), [], []
    for image in content["images"]:
        things = objects.get(image["id"], [])
        if not things or any(name in held_out for name, _ in things):
            continue
        names = list(dict.fromkeys(name for name, _ in things))
        text, spans = caption_of(names)
        images.append(image | {"caption": text})
        for name, box in things:
            place = {"id": len(annotations) + 1, "image_id": image["id"], "bbox": box}
            annotations.append(place | {"tokens_positive": [spans[names.index(name)]]})
    (folder / "train.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    kept = {image["id"] for image in images}
    categories = [c for c in content["categories"] if c["name"] not in held_out]
    detection = {
        "images": [image for image in content["images"] if image["id"] in kept],
        "annotations": [a for a in content["annotations"] if a["image_id"] in kept],
        "categories": categories,
    }
    (folder / "detection.json").write_text(json.dumps(detection))
    return len(images)


def write_test(content: dict[str, Any], held_out: set[str], known: set[str], folder: Path) -> dict[str, float]:
    """``val.json`` with its sentences and boxes; returns the chance level of each type of phrase.

    Images with one kind of thing tell nothing and are left out. Chance is a uniform choice among an image's objects.
    """
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(exist_ok=True)
    chance: dict[str, list[float]] = defaultdict(list)
    images, objects = [], objects_by_image(content)
    for image in content["images"]:
        things = objects[image["id"]]
        names = list(dict.fromkeys(name for name, _ in things))
        if len(names) < 2:
            continue
        text, spans = caption_of(names)
        key = str(image["id"])
        marked, boxes = text, []
        for i in reversed(range(len(names))):
            kinds = ["seen"] if names[i] not in held_out else ["unseen"] if names[i] in known else ["unseen", "unknown"]
            begin, end = spans[i]
            marked = f"{marked[:begin]}[/EN#{i + 1}/{'/'.join(kinds)} {marked[begin:end]}]{marked[end:]}"
            share = sum(name == names[i] for name, _ in things) / len(things)
            for kind in ("all", *kinds):
                chance[kind].append(share)
        for name, (x, y, w, h) in things:
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            inner = "".join(f"<{k}>{v}</{k}>" for k, v in corners.items())
            boxes.append(f"<object><name>{names.index(name) + 1}</name><bndbox>{inner}</bndbox></object>")
        (folder / "Sentences" / f"{key}.txt").write_text(marked + "\n")
        (folder / "Annotations" / f"{key}.xml").write_text(f"<annotation>{''.join(boxes)}</annotation>")
        asked = {"tokens_positive_eval": [[span] for span in spans], "sentence_id": 0, "original_img_id": key}
        images.append(image | {"caption": text} | asked)
    (folder / "val.json").write_text(json.dumps({"images": images, "annotations": []}))
    return {kind: sum(values) / len(values) for kind, values in chance.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, help="folder of generated scenes, with --novel things")
    parser.add_argument("--known", type=Path, required=True, help="instances json of the start model's scenes")
    args = parser.parse_args()
    annotations, folder = args.scenes / "annotations", args.scenes / "glip"
    folder.mkdir(exist_ok=True)
    held_out = set(json.loads((annotations / "split.json").read_text())["novel"])
    known = {c["name"] for c in json.loads(args.known.read_text())["categories"]}
    training = json.loads((annotations / "instances_train2017.json").read_text())
    number = write_training(training, held_out, folder)
    chance = write_test(json.loads((annotations / "instances_val2017.json").read_text()), held_out, known, folder)
    summary = {"training images": number, "held out": sorted(held_out), "unknown": sorted(held_out - known)}
    (folder / "chance.json").write_text(json.dumps({"chance": chance, **summary}, indent=1))
    print(f"{number} images to train on; held out: {', '.join(sorted(held_out))}")
    print("chance: " + ", ".join(f"{kind} {value:.3f}" for kind, value in chance.items()))


if __name__ == "__main__":
    main()
