"""Command-line flags. Names are those of the published code and of OpenCLIP."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from training.engine.errors import UserError
from training.engine.precision import PRECISIONS

DATASET_TYPES = ("grid_distill", "proposals_distill", "region_clip", "contrastive")


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, and the same exit for every process."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists all flags)")


def _number(kind: type, low: float, high: float = math.inf, *, open_low: bool = False):
    """argparse type: a finite number of ``kind`` in [low, high], or (low, high]."""

    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
            bounds = f"{'above' if open_low else 'at least'} {low:g}" + (
                f", at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range: give a number {bounds}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


_count, _natural = _number(int, 1), _number(int, 0)
_positive, _not_negative, _share = _number(float, 0, open_low=True), _number(float, 0), _number(float, 0, 1)


def make_parser() -> argparse.ArgumentParser:
    """The parser, in groups."""
    parser = _Parser(
        prog="python -m training.main",
        description="Train a dense CLIP (CLIPSelf, RegionCLIP or plain contrastive) and evaluate it on COCO panoptic.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_model(parser.add_argument_group("model"))
    _add_data(parser.add_argument_group("training data"))
    _add_method(parser.add_argument_group("method"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_evaluation(parser.add_argument_group("evaluation"))
    _add_run(parser.add_argument_group("run, checkpoints, logs"))
    _add_machine(parser.add_argument_group("machine"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", default="EVA02-CLIP-B-16", help="name of the model (open_clip.list_models()), or a config json")
    add("--pretrained", default="", help='tag, checkpoint file, or "eva" with --cache-dir; "" for random weights')
    add("--cache-dir", default=None, help="download cache; with --pretrained eva the checkpoint file")
    add("--lock-image", action="store_true", help="freeze the image tower but for --lock-image-unlocked-groups")
    add("--lock-image-unlocked-groups", type=_natural, default=0, metavar="N",
        help="last N groups that train: blocks for EVA; for CLIP ViT also positions and stem before them")  # fmt: skip


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset-type", choices=DATASET_TYPES, default="grid_distill",
        help="CLIPSelf on patches, CLIPSelf on proposals, RegionCLIP, or image-text pairs")  # fmt: skip
    add("--train-data", default="", help='COCO or LVIS json (captions for contrastive); "" to evaluate only')
    add("--train-image-root", default="", help="folder or URL that the file names are relative to")
    add("--train-embed-path", default="", help="noun embeddings [C, D] for region_clip; computed when empty")
    add("--train-ratio", type=_number(float, 0, 1, open_low=True), default=1.0, help="share of the images to use")
    add("--det-image-size", type=_count, default=1024, help="side of the dense input in pixels")
    add(
        "--downsample-factor",
        type=_count,
        default=None,
        help="must equal the patch size; read from the model if absent",
    )
    add("--max-boxes", type=_count, default=20, help="regions an image")
    add("--max-split", type=_count, default=6, help="rows and columns of a grid at most")
    add("--crop-scale", type=_number(float, 1), default=1.0, help="grid crops are the cells enlarged by this factor")
    add(
        "--min-size",
        type=_not_negative,
        default=8,
        help="smaller regions (square root of the area, pixels) are left out",
    )
    add("--max-size", type=_positive, default=1024, help="larger regions are left out")
    add("--crop-on", choices=("worker", "device"), default="worker",
        help="where images are resized and cropped: loader workers, or the GPU from the original image")  # fmt: skip
    add("--max-skipped", type=_share, default=0.1, help="share of unusable images at which the run stops")
    add("--cache-teacher", default=None, metavar="DIR",
        help="proposals_distill: compute the teacher's embeddings once, keep them here, train without it")  # fmt: skip
    add("--annotation-cache", default=None, metavar="DIR",
        help='keep parsed annotations here; they open in a moment. By default files of 16 MB and more are kept in '
             '~/.cache/open_clip/annotations; "" for never')  # fmt: skip


def _add_method(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--extract-type", choices=("v1", "v2"), default="v2", help="RoIAlign (v2) or masked tokens (v1, CLIP ViT only)")
    add("--multiscale", action="store_true", help="resize each step's images to a random size")
    add("--cosine-weight", type=_not_negative, default=1.0, help="weight of the CLIPSelf loss")
    add("--contrast-weight", type=_not_negative, default=1.0, help="weight of the RegionCLIP loss")
    add("--alpha", type=_share, default=1.0, help="released weights are alpha * student + (1 - alpha) * start model")


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=_count, default=6, help="passes over the data")
    add("--batch-size", type=_count, default=2, help="images per process and micro-batch")
    add("--accum-freq", type=_count, default=1, help="micro-batches per optimizer step")
    add("--lr", type=_not_negative, default=1e-5, help="base learning rate")
    add("--wd", type=_not_negative, default=0.1, help="weight decay")
    add("--beta1", type=_share, default=None, help="AdamW; by default 0.9")
    add("--beta2", type=_share, default=None, help='AdamW; by default 0.98 for models named "vit", else 0.999')
    add("--eps", type=_not_negative, default=None, help='AdamW; by default 1e-6 for models named "vit", else 1e-8')
    add("--warmup", type=_natural, default=1000, help="steps of linear warm-up")
    add("--lr-scheduler", choices=("cosine", "const", "const-cooldown"), default="cosine", help="after the warm-up")
    add("--lr-cooldown-epochs", type=_count, default=1, help="length of the cooldown (const-cooldown)")
    add("--lr-cooldown-power", type=_positive, default=1.0, help="power of its polynomial")
    add("--lr-cooldown-end", type=_not_negative, default=0.0, help="rate at its end")
    add("--grad-clip-norm", type=_positive, default=None, help="clip gradients to this norm")
    add("--grad-checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    add("--max-nan-steps", type=_count, default=10, help="steps in a row with a loss that is not finite, then stop")


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--val-data", default="", help='COCO panoptic json; "" to train only')
    add("--val-image-root", default="", help="folder or URL of its images")
    add("--val-segm-root", default="", help="folder of its PNGs; by default the json's path without .json")
    add("--embed-path", default="", help="class embeddings [C, D] (.npy); computed by the text tower when empty")
    add(
        "--eval-image-sizes",
        type=_count,
        nargs="+",
        default=None,
        metavar="S",
        help="input sizes; --det-image-size if absent",
    )
    add("--zeroshot-frequency", type=_natural, default=1, help="evaluate every N epochs; 0 never")
    add("--skip-first-eval", action="store_true", help="do not evaluate before training")
    add("--mask-antialias", action="store_true", help="bring masks to the grid with antialias (not as published)")


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--name", default=None, help="of the experiment; by default date, model and method")
    add("--logs", default="logs", help="folder of all experiments")
    add("--resume", default=None, metavar="latest|FILE", help="go on from a checkpoint")
    add("--save-frequency", type=_natural, default=1, help="save every N epochs; 0 only at the end")
    add("--save-every-n-steps", type=_natural, default=0, help="also save inside epochs; 0 never")
    add("--save-most-recent", action="store_true", help="keep epoch_latest.pt up to date after every epoch")
    add("--keep-checkpoints", type=_natural, default=0, help="newest checkpoints of whole epochs to keep; 0 all")
    add("--log-every-n-steps", type=_count, default=50, help="steps between lines of the log and TensorBoard points")
    add("--seed", type=_natural, default=0, help="of weights, data order and regions")
    add("--max-steps", type=_natural, default=0, help="end after this many optimizer steps; 0: after --epochs")
    add("--profile", type=_natural, default=0, metavar="N", help="write a trace of N steps to the experiment's folder")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--workers", type=_natural, default=4, help="loader processes for each training process")
    add("--precision", choices=PRECISIONS, default=None, help="amp_bf16 on GPUs that have it, else fp32, if absent")
    add("--device", choices=("cuda", "cpu"), default=None, help="a GPU when there is one, if absent")
    add("--compile", action="store_true", help="compile the transformer blocks")
    add("--dist-backend", choices=("nccl", "gloo"), default=None, help="nccl on GPUs, gloo on CPUs, if absent")
    add("--dist-timeout", type=_positive, default=1800, help="seconds until a lost process ends the run")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check flags against each other.

    Raises:
        UserError: an unknown flag or value, or flags that do not go together.
    """
    args = make_parser().parse_args(argv)
    if not args.train_data and not args.val_data:
        raise UserError("--train-data and --val-data are both empty: nothing to do")
    if args.train_data and args.train_image_root == "":
        raise UserError("--train-image-root is empty: give the folder that the images of --train-data are in")
    if args.val_data and args.val_image_root == "":
        raise UserError("--val-image-root is empty: give the folder that the images of --val-data are in")
    if args.min_size >= args.max_size:
        raise UserError(f"--min-size {args.min_size} is not below --max-size {args.max_size}")
    if args.lock_image_unlocked_groups and not args.lock_image:
        raise UserError("--lock-image-unlocked-groups has an effect with --lock-image only: add it")
    if args.cache_teacher and args.dataset_type != "proposals_distill":
        raise UserError(
            f"--cache-teacher needs a teacher and regions that stay the same, which {args.dataset_type} has not: leave "
            "it out, or use --dataset-type proposals_distill"
        )
    if args.resume == "latest" and not args.name:
        raise UserError("--resume latest needs --name: which experiment?")
    args.eval_image_sizes = list(dict.fromkeys(args.eval_image_sizes or [args.det_image_size]))
    return args
