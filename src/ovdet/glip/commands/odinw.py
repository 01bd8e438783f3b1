"""Test, or tune and test, on many data sets: python odinw.py ROOT --checkpoint FILE [--mode MODE --shots N ...]."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovdet.config import config_from_dict, config_to_dict
from ovdet.glip.assemble import config_for, load_model
from ovdet.glip.config import TUNING, GlipConfig
from ovdet.glip.data.odinw import WildSet, find_sets
from ovdet.glip.evaluation.wild import averages, format_averages, write_leader_board
from ovdet.glip.run import train
from ovdet.glip.task import BEST, FLAGS
from ovdet.glip.testing import open_test
from ovdet.precision import choose_precision
from ovdet.results import METRICS, settings_of
from training.engine.checkpoint import weights_hash
from training.engine.data.keyed import check_key, write_key, writing
from training.engine.distributed import Dist, barrier, init_distributed, on_master, together
from training.engine.errors import UserError, run_program
from training.engine.files import write_json
from training.engine.flags import PATH, Parser
from training.engine.journal import setup_logging

log = logging.getLogger(__name__)

EPOCHS = 200  # at most; patience ends most runs before
COPIES = {1: 8, 3: 4, 5: 2}  # of a few-shot set in an epoch; other numbers of shots: 1
#: Evaluations without gain after which the rate falls, and after which a run ends: with few shots, and with all data.
PATIENCE, PATIENCE_ALL = (3, 8), (2, 4)
WARMUP = 10  # steps; an epoch may have no more than four, and pre-training's 2000 would outlast most runs


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="odinw.py", description="Detection in the wild: many data sets, averaged.")
    parser.add_argument("root", type=PATH, help="folder of data sets, each with train, valid and test in COCO's form")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--checkpoint", required=True, help="the model that is tested or tuned")
    parser.add_argument("--config", help="its variant; default: the config in the checkpoint")
    parser.add_argument("--sets", nargs="+", help="only these data sets")
    parser.add_argument("--mode", choices=TUNING, help="tune in this mode; default: test as it is")
    parser.add_argument("--shots", type=int, nargs="+", default=[0], help="images of each class, 0: all data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3], help="of the choice of images (3 30 300)")
    parser.add_argument("--prompts", type=PATH, help="folder with a SET.json for each set that has prompts of its own")
    parser.add_argument("--out", type=PATH, required=True, help="folder of runs, metrics and leader-board files")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_intermixed_args(argv)
    if args.mode is None and args.shots != [0]:
        raise UserError("--shots needs --mode: say what is tuned")
    return args


def with_values(config: GlipConfig, values: dict[str, Any]) -> GlipConfig:
    """A copy of a config with other values, by ``section.key``."""
    content = config_to_dict(config)
    for name, value in values.items():
        section, key = name.split(".")
        content[section][key] = value
    made = config_from_dict(GlipConfig, content, source=config.path or "config")
    made.path = config.path
    return made


def test_values(wild: WildSet, split: str, prompts: Path | None = None) -> dict[str, Any]:
    """Where a split's images and annotations are, and the set's own prompts in a folder of them, if it has any.

    Raises:
        UserError: the set has no such split.
    """
    if split not in wild.splits:
        raise UserError(f"data set {wild.name} has no {split} split: unpack it again")
    annotations, images = wild.splits[split]
    values = {"data.val_annotations": str(annotations), "data.val_images": str(images), "data.protocol": "coco"}
    own = prompts / f"{wild.name}.json" if prompts else None
    return values | ({"data.prompts": str(own.resolve())} if own and own.is_file() else {})


def tuned_config(
    config: GlipConfig, wild: WildSet, mode: str, shots: int, seed: int, checkpoint: str, given: Sequence[str] = ()
) -> GlipConfig:
    """The config of a tuning run on a set: trained on its train split, watched on its valid one.

    Args:
        given: config values of the command line, ``section.key=value``; where the mode has values of its own (rate,
            decay, warm-up, frozen stages), these go first.
    """
    annotations, images = wild.splits.get("train", (None, None))
    if annotations is None:
        raise UserError(f"data set {wild.name} has no train split: unpack it again")
    prepared = wild.few_shot(shots, seed)
    if prepared:
        log.info("%s: %s", wild.name, prepared)
        annotations = prepared
    patience, stop = PATIENCE if shots else PATIENCE_ALL
    values: dict[str, Any] = {
        "model.weights": str(Path(checkpoint).resolve()), "train.mode": mode, "train.epochs": EPOCHS,
        "train.patience": patience, "train.stop_patience": stop, "train.eval_every": 1,
        "data.train_annotations": str(annotations), "data.train_images": str(images), "data.train_sets": [],
        "data.shots": 0 if prepared else shots, "data.shot_seed": seed, "data.copies": COPIES.get(shots, 1),
    }  # fmt: skip
    usual: dict[str, Any] = {"train.warmup_steps": min(config.train.warmup_steps, WARMUP)}
    if mode in ("language_prompt_v2", "language_prompt_v4"):
        usual |= {"train.lr": 0.05, "train.weight_decay": 0.25}
    if mode == "full":  # patch embedding and first stage, as published for these sets
        usual["image.freeze_at"] = max(config.image.freeze_at, 2)
    chosen = {value.partition("=")[0].strip() for value in given}
    values |= {name: value for name, value in usual.items() if name not in chosen}
    return with_values(config, values | test_values(wild, "valid" if "valid" in wild.splits else "test"))


def take_up(folder: Path, key: dict[str, Any]) -> None:
    """Take up the folder of a set's run, or make it; every process calls it.

    Args:
        key: what the results in it depend on. Numbers of another model would stand in the averages of this one.

    Raises:
        UserError: the folder holds a run with another key, or one of a former version, which kept none.
    """

    def take() -> None:
        where = f"--out {folder}"
        check_key(folder, key, where)
        with writing(where):
            write_key(folder, key)

    on_master(take)


def run_set(
    wild: WildSet, config: GlipConfig, args: argparse.Namespace, dist: Dist, shots: int, seed: int, weights: str
) -> tuple[dict[str, float], Path]:
    """Metrics on the test split of a set, and the folder that holds them; what is there already is not run again.

    Args:
        weights: hash of those that are tested or tuned.

    Raises:
        UserError: the folder holds a run of other weights or settings.
    """
    folder = args.out / wild.name / (f"{args.mode}_{shots}_{seed}" if args.mode else "zero_shot")
    own = test_values(wild, "test", args.prompts)
    run, test_config = None, with_values(config, own)
    if args.mode:
        run = tuned_config(test_config, wild, args.mode, shots, seed, args.checkpoint, args.overrides)
        test_config = with_values(run, own)
    take_up(folder, {"weights": weights, **settings_of(test_config, training=run is not None)})
    if (folder / "test" / METRICS).is_file():
        return json.loads((folder / "test" / METRICS).read_text()), folder / "test"
    checkpoint = args.checkpoint
    if run is not None:
        started = (folder / "run" / "checkpoints").is_dir()
        status = train(run, dist, folder / "run", save_every_steps=1000, resume=started)
        if status:
            raise SystemExit(status)
        checkpoint = str(folder / "run" / BEST)
    with together():
        model = load_model(test_config, checkpoint).to(dist.device)
        test = open_test(test_config, model.tokenizer, model.image.divisor, dist)
    metrics = test(model, choose_precision(test_config.train, dist.device, training=False), folder / "test")
    barrier()
    return metrics, folder / "test"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; gives the exit status. UserError for faulty input."""
    args = parse_args(argv)
    config = config_for(args.checkpoint, args.config, args.overrides)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    sets = find_sets(args.root, args.sets)
    with together():
        weights = weights_hash(load_model(config, args.checkpoint).state_dict())
    for shots in args.shots:
        seeds = args.seeds if args.mode and shots else args.seeds[:1]
        results: dict[str, dict[int, dict[str, float]]] = {}
        detections: dict[str, dict[int, Any]] = {}
        for wild in sets:
            for seed in seeds:
                log.info(
                    "%s: %s",
                    wild.name,
                    f"{args.mode}, {shots or 'all'} shots, seed {seed}" if args.mode else "zero shot",
                )
                metrics, folder = run_set(wild, config, args, dist, shots, seed, weights)
                results.setdefault(wild.name, {})[seed] = metrics
                if dist.is_master:
                    found = json.loads((folder / "results.bbox.json").read_text())
                    detections.setdefault(wild.name, {})[seed] = found
        if dist.is_master:
            _report(args, shots, seeds, results, detections)
    return 0


def run(argv: Sequence[str] | None = None) -> int:
    """:func:`main`, with its errors as an exit status, see :func:`~training.engine.errors.run_program`."""
    return run_program(lambda: main(argv), FLAGS)


def _report(
    args: argparse.Namespace, shots: int, seeds: Sequence[int], results: dict[str, dict[int, dict[str, float]]],
    detections: dict[str, dict[int, Any]],
) -> None:  # fmt: skip
    """Tables and files of a number of shots; several seeds are averaged by set."""
    name = f"{args.mode}_{shots or 'all'}" if args.mode else "zero_shot"
    means = {
        wild: {key: sum(m[key] for m in by_seed.values()) / len(by_seed) for key in ("AP", "AP50")}
        for wild, by_seed in results.items()
    }
    few = args.mode is not None and shots > 0
    board = detections if few else {wild: by_seed[seeds[0]] for wild, by_seed in detections.items()}
    write_leader_board(args.out / f"leader_board_{name}.json", board, seeds=seeds if few else None)
    write_json(args.out / f"metrics_{name}.json", {"sets": results, "means": averages(means)})
    print(f"\n{name}, AP of {len(seeds)} seed(s)\n{format_averages(means)}")
