"""Train a segmentation network on dense labels of CLIP (MaskCLIP+).

Annotation-free: every class is filled in by CLIP, guided to the end. With a data set, pixels that its annotations
ignore or call background stay out, as in the published numbers; with --images no annotation is looked at.
Zero-shot: annotations of the seen classes are kept, the unseen ones are filled in, first by CLIP, then by the student.
Labels are made inside the step, of the sample as it was drawn; label maps of ovseg.pseudo_labels are not read.

The student is torchvision's DeepLabV3 (or LR-ASPP), where the published ones are DeepLabV2 with ResNet-101 v1c and, for
Context's zero-shot setting, DeepLabV3+; its backbone has random weights without --backbone-weights.

Examples:
    python -m ovseg.maskclip_plus --model ViT-B-16-quickgelu --pretrained openai --dataset voc20 --data-root data \\
        --split trainaug --name voc20
    torchrun --nproc_per_node 4 -m ovseg.maskclip_plus --model ViT-B-16-quickgelu --pretrained openai \\
        --setting zero-shot --dataset coco_stuff171 --data-root data --name stuff
    python -m ovseg.maskclip_plus --model EVA02-CLIP-B-16 --pretrained clipself.pt --images photos \\
        --classes road sky tree car --steps 2000 --name mine
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip import CLIP
from open_clip.identity import identity
from ovseg.classes import ClassList, embed_words
from ovseg.data.sets import DATASETS, SegmentationSet, open_dataset
from ovseg.dense import DenseReader
from ovseg.evaluate import evaluate, format_table, results_of
from ovseg.external import ExternalModel, load_external
from ovseg.maskclip_plus.data import Augmentation, Photographs, TrainingData, TrainingSamples
from ovseg.maskclip_plus.network import BACKBONES, Student, StudentSegmenter
from ovseg.maskclip_plus.task import MaskClipPlus, Recipe, Teaching
from ovseg.options import (
    add_class_options,
    add_model_options,
    check_sources,
    classes_from,
    embeddings_digest,
    load_model,
    tokenizer_of,
)
from ovseg.pictures import list_images
from ovseg.protocols import Protocol, preset
from ovseg.refine import KEY_FORMS
from training.engine.checkpoint import seed_generators
from training.engine.distributed import Dist, init_distributed, together
from training.engine.errors import Flags, UserError, run_program
from training.engine.flags import SHARE, Parser, spelling
from training.engine.folder import check_folder, named_folder, open_folder, resume_after_restart
from training.engine.journal import Journal, setup_logging
from training.engine.loop import Loop, LoopOptions, Progress
from training.engine.precision import make_precision

log = logging.getLogger(__name__)

FLAGS = Flags(accum_freq="--batch-size", checkpointing="a smaller --crop")

#: Published schedules: (setting, data set) -> changes to the recipe and to the augmentation.
_PUBLISHED: dict[tuple[str, str], tuple[dict, dict]] = {
    ("annotation-free", "voc20"): ({"steps": 2000}, {}),
    ("annotation-free", "context59"): ({"steps": 4000}, {"crop": 480, "long_side": 520, "short_side": 520}),
    ("annotation-free", "cityscapes19"): ({"steps": 4000}, {}),
    ("annotation-free", "ade150"): ({"steps": 8000}, {}),
    ("annotation-free", "coco_stuff171"): ({"steps": 8000}, {}),
    ("zero-shot", "voc21"): ({"steps": 20000, "guided": 0.1}, {}),
    ("zero-shot", "context60"): (
        {"steps": 40000, "guided": 0.1, "lr": 0.004, "weight_decay": 1e-4},
        {"crop": 480, "long_side": 520, "short_side": 520},
    ),
    ("zero-shot", "coco_stuff171"): ({"steps": 80000, "guided": 0.1}, {}),
}
_RECIPE = ("steps", "guided", "lr", "weight_decay", "denoise", "smooth", "key_form", "confidence", "distil", "readout")


def published(setting: str, dataset: str) -> tuple[Recipe, Augmentation]:
    """The published schedule of a data set; for others, that of a short annotation-free run or a tenth guided."""
    recipe, augmentation = _PUBLISHED.get(
        (setting, dataset), ({"steps": 4000, "guided": 0.1 if setting == "zero-shot" else 1.0}, {})
    )
    return Recipe(setting=setting, **recipe), Augmentation(**augmentation)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The program's arguments."""
    parser = Parser(
        "python -m ovseg.maskclip_plus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="", choices=DATASETS, help="a data set; its classes are learned")
    group.add_argument("--data-root", default="", help="folder that the data set was unpacked into")
    group.add_argument("--split", default="train", help="part that is trained on (VOC: trainaug)")
    group.add_argument("--image-root", default=None, help="photographs of a panoptic set, where they lie elsewhere")
    group.add_argument("--val-split", default="", help="part that the student is evaluated on; none without")
    group.add_argument(
        "--words", help="whose class words: names, maskclip, sclip, ...; MaskCLIP's by default where it has some"
    )
    group.add_argument("--templates", default="maskclip", help="prompt templates")
    group.add_argument(
        "--images", nargs="+", default=[], help="photographs without annotations, in place of a data set"
    )
    add_class_options(parser)
    group.add_argument(
        "--unseen", nargs="+", default=[], help="names of unseen classes, in place of the published ones"
    )
    group = parser.add_argument_group(
        "training", "steps, rates and sizes are by default those published for setting and data set"
    )
    group.add_argument("--setting", default="annotation-free", choices=("annotation-free", "zero-shot"))
    group.add_argument("--backbone", default="resnet50", choices=BACKBONES)
    group.add_argument(
        "--backbone-weights",
        default="",
        help="file of torchvision's ResNet or MobileNet, as trained on ImageNet; random weights without",
    )
    group.add_argument("--steps", type=int, help="optimizer steps")
    group.add_argument("--guided", type=float, help="share of the steps in which CLIP fills in the labels")
    group.add_argument("--lr", type=float, help="rate of SGD at the start")
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--batch-size", type=int, default=4, help="images of a process; at least 2")
    group.add_argument("--crop", type=int, help="side of a training sample")
    group.add_argument("--short-side", type=int, help="of a photograph before scaling, and of the evaluation's input")
    group.add_argument("--readout", help="dense reading of the teacher")
    group.add_argument("--denoise", type=float, help="threshold of prompt denoising (MaskCLIP: 0.5)")
    group.add_argument("--smooth", type=float, help="threshold of key smoothing (MaskCLIP: 1.0)")
    group.add_argument("--key-form", choices=KEY_FORMS, help="how key smoothing normalises keys")
    group.add_argument("--confidence", type=float, help="probability under which a filled pixel is left out")
    group.add_argument("--distil", type=float, help="weight of the L1 loss between the student's and CLIP's features")
    group = parser.add_argument_group("run")
    group.add_argument("--name", required=True, help="of the run; its folder is LOGS/NAME")
    group.add_argument("--logs", default="logs", help="folder of runs")
    group.add_argument(
        "--resume", default=None, help='"latest", "auto" (the same where there is a run), or a checkpoint file'
    )
    group.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    group.add_argument("--log-every", type=int, default=50, help="steps between lines of the log")
    group.add_argument("--max-skipped", type=SHARE, default=0.1, help="share of unusable images that is put up with")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--workers", type=int, default=4, help="processes that read images, per process")
    return parser.parse_args(argv)


def recipe_from(args: argparse.Namespace) -> tuple[Recipe, Augmentation]:
    """The published schedule with the changes that the flags ask for."""
    recipe, augmentation = published(args.setting, args.dataset)
    changes = {name: getattr(args, name) for name in _RECIPE if getattr(args, name) is not None}
    sizes = {"crop": args.crop, "short_side": args.short_side}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if any(value < 1 for value in sizes.values()) or args.batch_size < 2:
        raise UserError("--crop and --short-side are pixels, at least 1; --batch-size is at least 2, for batch norm")
    return replace(recipe, **changes), replace(augmentation, **sizes)


def open_data(args: argparse.Namespace) -> tuple[SegmentationSet | Photographs, ClassList]:
    """Training images, and the classes.

    Raises:
        UserError: neither or both of --dataset and --images, or a setting that they do not allow.
    """
    check_sources(args)
    if args.images:
        if args.setting == "zero-shot":
            raise UserError("--setting zero-shot needs annotations of the seen classes: use --dataset")
        if args.val_split:
            raise UserError("--val-split belongs to --dataset: photographs of --images have no annotations to score by")
        return Photographs([str(path) for path, _ in list_images(args.images)]), classes_from(args)
    args.words = args.words or preset("maskclip", args.dataset).words
    data = open_dataset(args.dataset, args.data_root, args.split, words=args.words, image_root=args.image_root)
    return data, data.classes


def filled_classes(args: argparse.Namespace, classes: ClassList) -> list[int]:
    """Labels that are filled in: the unseen classes, or all of them.

    Raises:
        UserError: a zero-shot setting without unseen classes, or names that are none.
    """
    if args.setting == "annotation-free":
        if args.unseen:
            raise UserError("--unseen belongs to --setting zero-shot")
        return list(range(len(classes)))
    unknown = [name for name in args.unseen if name not in classes.names]
    if unknown:
        raise UserError(f"--unseen {unknown[0]}: not a class of {args.dataset}")
    unseen = [classes.names.index(name) for name in args.unseen] or list(classes.unseen)
    if not unseen:
        raise UserError(f"--setting zero-shot: {args.dataset} has no published unseen classes; name them with --unseen")
    if len(unseen) == len(classes):
        raise UserError("--unseen names every class: use --setting annotation-free")
    return unseen


def open_external(
    args: argparse.Namespace, teacher: CLIP, recipe: Recipe, crop: int, name: str
) -> ExternalModel | None:
    """The model of ``--external``, or None. What does not go together is said now, not in the first step.

    Args:
        crop: side of a sample; name: of the teacher's model, for messages.

    Raises:
        UserError: no such model, a reading that does not follow it (or lacks it), or patches that do not fit.
    """
    visual = teacher.visual
    external = load_external(args.external, next(visual.parameters()).device) if args.external else None
    DenseReader(teacher, [recipe.readout], external=external)
    patches = [(visual.patch_size, name)]
    if external is not None:
        patches += [(external.patch_size, f"--external {args.external}")]
        if visual.drop_padding:
            raise UserError(
                f"--external {args.external} reads the padding of samples, which this teacher leaves out: use another "
                "--readout, or weights without --drop-padding"
            )
        if recipe.smooth is not None and external.patch_size != visual.patch_size:
            raise UserError(
                f"--smooth: the reading proxyclip lies on the grid of --external {args.external}, the keys on that of "
                f"{name}; leave it out, or use an external model with patches of {visual.patch_size} pixels"
            )
    multiple = math.lcm(*(size for size, _ in patches))
    if crop % multiple:
        whose = " and ".join(f"{size} of {model}" for size, model in patches)
        near = max(round(crop / multiple), 1) * multiple
        raise UserError(f"--crop {crop}: no multiple of the patch size {whose}; use {near}")
    return external


def class_vectors(words: Tensor, classes: ClassList) -> Tensor:
    """One unit vector per class ``[C, D]``: the mean of its words' embeddings ``[words, D]``."""
    sums = words.new_zeros(len(classes), words.shape[1]).index_add_(0, classes.word_classes, words)
    return F.normalize(sums, dim=-1)


def about_run(
    args: argparse.Namespace,
    data: SegmentationSet | Photographs,
    classes: ClassList,
    filled: Sequence[int],
    size: Augmentation,
    teacher: CLIP,
) -> dict[str, Any]:
    """What a resumed run must have in common with this one besides the recipe, by the user's names.

    The teacher is to be as it was loaded: cast to another type it would be another one.
    """
    unseen = [classes.names[i] for i in sorted(filled)] if args.setting == "zero-shot" else []
    return {
        "classes": list(classes.names), "--words": args.words, "--templates": args.templates,
        "--embed-path": embeddings_digest(args), "--dataset": args.dataset, "--unseen": unseen,
        "--external": args.external,
        "the training images": images_in_short(data), "--backbone": args.backbone, "--crop": size.crop,
        "--short-side": size.short_side, "--seed": args.seed, "the teacher": identity(teacher.visual),
    }  # fmt: skip


def images_in_short(data: SegmentationSet | Photographs) -> str:
    """How many images there are, and a fingerprint of their names below the folder that holds them all."""
    files = [os.path.abspath(data.files(i)[0]) for i in range(len(data))]
    common = os.path.commonpath([os.path.dirname(file) for file in files])
    digest = hashlib.blake2b(digest_size=4)
    for file in files:
        digest.update(os.path.relpath(file, common).encode() + b"\n")
    return f"{len(files)} ({digest.hexdigest()})"


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The program's flags as they were given, for the log of a resume that changes them."""
    return {spelling(name): value for name, value in vars(args).items() if name != "resume"}


class Evaluation:
    """Scores of the student on a part of the data set, into the log, TensorBoard and results.json."""

    def __init__(
        self,
        args: argparse.Namespace,
        classes: ClassList,
        unseen: Sequence[int],
        size: Augmentation,
        teacher,
        dist: Dist,
    ) -> None:
        self.args, self.dist, self.teacher = args, dist, teacher
        self.classes = replace(classes, unseen=tuple(unseen) if args.setting == "zero-shot" else ())
        self.protocol = Protocol(long_side=size.long_side, short_side=size.short_side)
        self.data = open_dataset(args.dataset, args.data_root, args.val_split, image_root=args.image_root)
        self.data.classes = self.classes

    def __call__(self, student: Student, progress: Progress, journal: Journal) -> None:
        """Evaluate; every process calls it."""
        visual, training = self.teacher.visual, student.training
        student.eval()
        segmenter = StudentSegmenter(
            student, self.classes, self.protocol, mean=visual.image_mean, std=visual.image_std
        )  # fmt: skip
        confusions = evaluate(
            segmenter, self.data, self.dist, workers=self.args.workers, max_skipped=self.args.max_skipped
        )  # fmt: skip
        results = results_of(confusions, self.data, zero_shot=bool(self.classes.unseen))
        student.train(training)
        if self.dist.is_master:
            (scores,) = results.values()
            log.info("after step %d:\n%s", progress.step, format_table({"student": scores}))
            numbers = {k: v for k, v in scores.items() if k != "per_class" and v is not None}
            journal.scalars({f"val/{k}": v for k, v in numbers.items()}, progress.step)
            journal.result({"epoch": progress.begun, "step": progress.step, "kind": "student", **scores})


def run(args: argparse.Namespace, dist: Dist) -> int:
    """Check everything, then train. Returns the exit status."""
    precision = make_precision(args.precision, dist.device)
    recipe, augmentation = recipe_from(args)
    with together():
        folder = named_folder(args.logs, args.name)
        args.resume = resume_after_restart(folder, args.resume, FLAGS)
        check_folder(folder, args.resume, FLAGS)
        data, classes = open_data(args)
        filled = filled_classes(args, classes)
        teacher, name = load_model(args, args.pretrained, dist.device)
        external = open_external(args, teacher, recipe, augmentation.crop, name)
    words = embed_words(
        teacher, tokenizer_of(args, name), classes, templates=args.templates, embed_path=args.embed_path,
        device=dist.device, progress=dist.is_master,
    )  # fmt: skip
    about = about_run(args, data, classes, filled, augmentation, teacher)
    teacher.visual.to(precision.input_dtype)
    with together():
        torch.manual_seed(args.seed)
        # A background with annotations is learned; where it is filled in, it is described by words as any class.
        learned = None if classes.background in filled else classes.background
        student = Student(class_vectors(words, classes), backbone=args.backbone, background=learned)
        if args.backbone_weights:
            student.load_backbone(args.backbone_weights)
        teaching = Teaching(student.to(dist.device), teacher, recipe, filled, external)
        batches = TrainingData(
            TrainingSamples(data, augmentation, args.seed), batch_size=args.batch_size, workers=args.workers, dist=dist
        )
        evaluation = None
        if args.val_split and args.dataset:
            evaluation = Evaluation(args, classes, filled, augmentation, teacher, dist)
        source = f"--images {args.images[0]}" if args.images else f"--data-root {args.data_root}"
        task = MaskClipPlus(
            teaching, batches, dist, source=source, about=about, options=options_of(args), seed=args.seed,
            evaluation=evaluation,
        )  # fmt: skip
        options = LoopOptions(
            epochs=math.ceil(recipe.steps / batches.batches_per_epoch), max_steps=recipe.steps,
            batch_size=args.batch_size, max_skipped=args.max_skipped, log_every=args.log_every,
            save_every_steps=args.save_every, save_every_epochs=0, evaluate_first=False, evaluate_every=0, flags=FLAGS,
        )  # fmt: skip
        loop = Loop(task, options, dist=dist, precision=precision)
    texts = {"params.json": json.dumps(vars(args), indent=1, sort_keys=True) + "\n"}
    with open_folder(folder, args.resume, dist, FLAGS):
        setup_logging(dist.rank, folder / "out.log" if dist.is_master else None)
        log.info("run %s: %d process(es) on %s, precision %s", folder, dist.world_size, dist.device, precision.name)
        if not args.backbone_weights:
            log.warning(
                "the student's %s starts from random weights, the published ones from ImageNet's: give torchvision's "
                "file with --backbone-weights", args.backbone,
            )  # fmt: skip
        return loop.train(folder, args.resume, texts=texts)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv), FLAGS)


def _main(argv: Sequence[str] | None) -> int:
    args = parse_args(argv)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    seed_generators(args.seed + dist.rank)
    return run(args, dist)


if __name__ == "__main__":
    sys.exit(main())
