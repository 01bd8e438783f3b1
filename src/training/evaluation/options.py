"""Flags of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from training.engine.flags import COUNT, NATURAL, flag


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated, and when."""

    val_data: str = flag("", 'COCO panoptic json; "" to train only', metavar="FILE")
    val_image_root: str = flag("", "folder or URL of its images", metavar="DIR")
    val_segm_root: str = flag("", "folder of its PNGs; by default the json's path without .json", metavar="DIR")
    embed_path: str = flag(
        "", "class embeddings [C, D] (.npy); computed by the text tower when empty", metavar="FILE"
    )
    eval_image_sizes: tuple[int, ...] = flag(
        (), "input sizes; --det-image-size if absent", type=COUNT, nargs="+", metavar="S"
    )
    zeroshot_frequency: int = flag(1, "evaluate every N epochs; 0: before and after alone", type=NATURAL, metavar="N")
    skip_first_eval: bool = flag(False, "do not evaluate before training")
    mask_antialias: bool = flag(False, "bring masks to the grid with antialias (not as published)")
    per_class: bool = flag(
        False, "also write the accuracy of each class, per_class_KIND_STEP.json in the experiment's folder"
    )
    per_segment: bool = flag(
        False, "also write what was said of each segment, per_segment_KIND_STEP.json, for errors by resampling images"
    )
    log_images: int = flag(
        0, "pictures of N validation images (labels, components of the dense map) to TensorBoard at each evaluation",
        type=NATURAL, metavar="N",
    )  # fmt: skip
