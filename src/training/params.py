"""The command line. Names of flags are those of the published code and of OpenCLIP."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from training.data.options import SOURCES
from training.engine.errors import UserError
from training.engine.flags import COUNT, Parser, add_flags, flags_of, spelling, take
from training.engine.folder import RESUME
from training.engine.journal import check_report
from training.methods import Entry, find_method, find_recipe, list_methods
from training.options import ROOMS, TITLES, Options

# What a dataset type meant before --method: old command lines mean the same.
_METHOD_OF = {"region_clip": "regionclip", "contrastive": "contrastive"}

# Flags of the published code and of OpenCLIP that change nothing here, with the number of their values.
_WITHOUT_EFFECT = {
    "test_type": 1, "test_data": 1, "train_ceph_root": 1, "val_ceph_root": 1, "train_num_samples": 1,
    "val_num_samples": 1, "train_data_upsampling_factors": 1, "dataset_resampled": 0, "csv_separator": 1,
    "csv_img_key": 1, "csv_caption_key": 1, "imagenet_val": 1, "imagenet_v2": 1, "log_local": 0, "val_frequency": 1,
    "use_bn_sync": 0, "pretrained_image": 0,
    "lock_image_freeze_bn_stats": 0, "image_mean": "+", "image_std": "+", "image_ave_pool": 0, "aug_cfg": "*",
    "local_loss": 0, "gather_with_grad": 0, "force_image_size": "+", "force_patch_dropout": 1, "force_custom_text": 0,
    "torchscript": 0, "trace": 0, "dist_url": 1, "wandb_notes": 1, "wandb_project_name": 1, "debug": 0,
    "copy_codebase": 0, "horovod": 0, "ddp_static_graph": 0, "no_set_device_rank": 0, "lock_text": 0,
    "lock_text_unlocked_layers": 1, "lock_text_freeze_layer_norm": 0, "coca_caption_loss_weight": 1,
    "coca_contrastive_loss_weight": 1, "remote_sync": 1, "remote_sync_frequency": 1, "remote_sync_protocol": 1,
    "delete_previous_checkpoint": 0, "distill_model": 1, "distill_pretrained": 1, "max_masks": 1,
    "input_size": 1,
}  # fmt: skip

_EXAMPLES = """
Train a dense CLIP, and evaluate it on COCO panoptic.

examples:
  CLIPSelf on image patches, as published for B/16:
    python -m training.main --recipe clipself-b16 --name mine \\
        --pretrained eva --cache-dir EVA02_CLIP_B_psz16_s8B.pt \\
        --train-data instances_train2017.json --train-image-root train2017 \\
        --val-data panoptic_val2017.json --val-image-root val2017
  after an interruption:       the same command and --resume latest
  to evaluate a checkpoint:    no --train-data, and --pretrained logs/mine/checkpoints/clipself.pt
  on 8 GPUs:                   torchrun --nproc_per_node 8 -m -- training.main ...
  flags of one method:         --method declip --help;  all flags: --help-all
"""

# Flags that --help lists; --help-all lists all.
_FIRST = {
    "model", "pretrained", "lock_image", "lock_image_unlocked_groups", "dataset_type", "train_data",
    "train_image_root", "det_image_size", "batch_size", "epochs", "lr", "alpha", "val_data", "val_image_root", "name",
    "resume", "seed", "device",
}  # fmt: skip


def make_parser(chosen: Entry | None = None, *, everything: bool = False) -> argparse.ArgumentParser:
    """The parser: flags of all rooms and of all methods. Flags that were not given leave nothing behind.

    Args:
        chosen: the method whose flags ``--help`` lists; None for no method's.
        everything: whether it lists all flags of the rooms.
    """
    methods = list_methods().values()
    listed = "".join(f"  {e.name:<16} {e.summary}\n" for e in methods)
    recipes = _wrapped(sorted(r for e in methods for r in e.recipes))
    parser = Parser(
        prog="python -m training.main",
        usage="python -m training.main --method NAME --train-data FILE --train-image-root DIR [flags]",
        description=_EXAMPLES,
        epilog=f"methods:\n{listed}\nrecipes:\n{recipes}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--help-all", action="store_true", help="list all flags")
    method = parser.add_argument_group("method")
    method.add_argument("--method", metavar="NAME", help="how to train; see below (clipself)")
    method.add_argument("--recipe", metavar="NAME", help="flags under one name; flags given by hand override")
    seen: dict = {}
    if chosen is not None:
        add_flags(method, chosen.options, seen)
    for room, cls in ROOMS.items():
        show = flags_of(cls).keys() if everything else _FIRST
        add_flags(parser.add_argument_group(TITLES[room]), cls, seen, show=show)
    for entry in methods:
        add_flags(method, entry.options, seen, show=())
    # OpenCLIP's names for what has another one here.
    parser.add_argument("--epochs-cooldown", dest="lr_cooldown_epochs", type=COUNT, help=argparse.SUPPRESS)
    parser.add_argument("--skip-scheduler", action="store_true", help=argparse.SUPPRESS)
    for name, values in _WITHOUT_EFFECT.items():
        nargs = {"action": "store_true"} if values == 0 else {} if values == 1 else {"nargs": values}
        parser.add_argument(spelling(name), help=argparse.SUPPRESS, **nargs)
    return parser


def _wrapped(words: Sequence[str], width: int = 100) -> str:
    lines = [" "]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append(" ")
        lines[-1] += " " + word
    return "\n".join(lines) + "\n"


def parse_args(argv: Sequence[str] | None = None, *, check: bool = True) -> Options:
    """Parse flags and check them against each other.

    Args:
        argv: the flags; those of the process when None.
        check: False for a part of the program's options, without data.

    Raises:
        UserError: an unknown flag or value, or flags that do not go together.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    entry, source, recipe = _chosen(argv)
    if "--help-all" in argv:
        argv.append("--help")
    parser = make_parser(entry if "--method" in argv or recipe else None, everything="--help-all" in argv)
    given = vars(parser.parse_args([*shlex.split(recipe), *argv]))
    for name in ("method", "recipe", "help_all"):
        given.pop(name, None)
    idle = [name for name in _WITHOUT_EFFECT if given.pop(name, None) is not None]
    if given.pop("skip_scheduler", False):  # as there: the rate stays what it is, from the first step on
        given = {"lr_scheduler": "const", "warmup": 0} | given
    given["dataset_type"] = source
    rooms = {room: take(cls, given) for room, cls in ROOMS.items()}
    options = Options(entry=entry, own=take(entry.options, given), given=frozenset(given), **rooms)
    if check:
        _check(options)
    sizes = tuple(dict.fromkeys(options.eval.eval_image_sizes or (options.data.det_image_size,)))
    warnings = [f"{', '.join(map(spelling, idle))}: without effect here"] if idle else []
    warnings += _unused(options, given)
    return replace(options, eval=replace(options.eval, eval_image_sizes=sizes), warnings=tuple(warnings))


def _chosen(argv: Sequence[str]) -> tuple[Entry, str, str]:
    """(method, dataset type, command line of the recipe) of a command line."""
    first = Parser(add_help=False, allow_abbrev=False)
    for name in ("--method", "--recipe", "--dataset-type"):
        first.add_argument(name)
    asked = first.parse_known_args(argv)[0]
    recipe, of_recipe = "", None
    if asked.recipe:
        of_recipe, recipe = find_recipe(asked.recipe)
        if asked.method not in (None, of_recipe.name):
            raise UserError(f"--recipe {asked.recipe} is one of --method {of_recipe.name}, not of {asked.method}")
    source = asked.dataset_type or first.parse_known_args(shlex.split(recipe))[0].dataset_type
    entry = of_recipe or find_method(asked.method or _METHOD_OF.get(source, "clipself"))
    if source is None:
        return entry, entry.sources[0], recipe
    if source not in SOURCES:
        raise UserError(f"--dataset-type {source}: use one of {', '.join(SOURCES)} (--help lists all flags)")
    if source not in entry.sources:
        raise UserError(
            f"--method {entry.name} cannot learn from --dataset-type {source}: use {' or '.join(entry.sources)}"
        )
    return entry, source, recipe


def _check(options: Options) -> None:
    """UserError for flags that do not go together."""
    model, data, regions, val = options.model, options.data, options.regions, options.eval
    if not data.train_data and not val.val_data:
        raise UserError("--train-data and --val-data are both empty: nothing to do")
    if data.train_data and data.train_image_root == "" and not Path(data.train_data).is_dir():
        raise UserError("--train-image-root is empty: give the folder that the images of --train-data are in")
    if val.val_data and val.val_image_root == "":
        raise UserError("--val-image-root is empty: give the folder that the images of --val-data are in")
    if regions.min_size >= regions.max_size:
        raise UserError(f"--min-size {regions.min_size} is not below --max-size {regions.max_size}")
    if model.lock_image_unlocked_groups and not model.lock_image:
        raise UserError("--lock-image-unlocked-groups has an effect with --lock-image only: add it")
    teachers = options.entry.teachers(options.own)
    if data.cache_teacher and not teachers:
        raise UserError(f"--cache-teacher: --method {options.entry.name} has no teacher; leave it out")
    anew = data.dataset_type in ("grid_distill", "mixed_distill") and not regions.fixed_regions
    if data.cache_teacher and anew and all(t.source == "crops" for t in teachers):
        raise UserError(
            f"--cache-teacher needs regions that recur, which {data.dataset_type} draws anew in every epoch: add "
            "--fixed-regions, or use --dataset-type proposals_distill"
        )
    if options.run.dry_run and not data.train_data:
        raise UserError("--dry-run is about a training: give --train-data")
    if not options.trains:  # else the loop does it
        check_report(options.run.report_to)
    if options.run.resume in RESUME and not options.run.name:
        raise UserError(f"--resume {options.run.resume} needs --name: which experiment?")


# Flags of the regions that a dataset type reads.
_READ = {
    "grid_distill": {"max_boxes", "max_split", "grid", "crop_scale", "fixed_regions"},
    "proposals_distill": {"max_boxes", "min_size", "max_size", "fixed_regions"},
    "mixed_distill": {"max_boxes", "max_split", "grid", "crop_scale", "fixed_regions", "min_size", "max_size",
                      "proposal_share"},
    "region_clip": {"max_boxes"},
    "contrastive": set(),
}  # fmt: skip


def _unused(options: Options, given: dict[str, object]) -> list[str]:
    """Warnings about flags of regions that the data source does not read.

    Raises:
        UserError: a flag of other methods was given.
    """
    if not options.trains:
        return []
    own = flags_of(options.entry.options)
    shared = {name for cls in ROOMS.values() for name in flags_of(cls)}
    for entry in list_methods().values():
        foreign = [n for n in flags_of(entry.options) if n in given and n not in own and n not in shared]
        if foreign:
            users = [e.name for e in list_methods().values() if foreign[0] in flags_of(e.options)]
            raise UserError(
                f"{spelling(foreign[0])} is a flag of --method {' or '.join(users)}, not of {options.entry.name}: "
                "leave it out"
            )
    kind = options.data.dataset_type
    idle = [n for n in flags_of(ROOMS["regions"]) if n in given and n not in _READ[kind]]
    return [f"{', '.join(map(spelling, idle))}: without effect with --dataset-type {kind}"] if idle else []
