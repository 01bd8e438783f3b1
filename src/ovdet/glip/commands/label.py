"""Label captions with a teacher: python label.py CAPTIONS --images ROOT --checkpoint FILE --out FOLDER."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from ovdet.glip.assemble import config_for, load_model
from ovdet.glip.phrases import TAGGERS
from ovdet.glip.pseudo import Labeller, LabelOptions, choose, read_captions
from ovdet.glip.task import FLAGS
from ovdet.glip.testing import selection, views
from ovdet.precision import choose_precision
from training.engine.checkpoint import weights_hash
from training.engine.distributed import barrier, init_distributed, together
from training.engine.errors import UserError, run_program
from training.engine.flags import PATH, Parser
from training.engine.journal import setup_logging


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="label.py", description="Boxes of a teacher for the noun phrases of captions, for a student to train on."
    )
    parser.add_argument("captions", help="a COCO captions json, or json lines of image and caption")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--images", required=True, help="folder that the file names are relative to")
    parser.add_argument("--checkpoint", required=True, help="the teacher")
    parser.add_argument("--config", help="its variant; default: the config in the checkpoint")
    parser.add_argument("--out", type=PATH, required=True, help="folder of the shards; it is continued where it ended")
    parser.add_argument("--score", type=float, default=0.5, help="boxes must exceed it")
    parser.add_argument("--shard", type=int, default=1000, help="captions of a shard")
    parser.add_argument("--limit", type=int, default=0, help="label so many captions, drawn by --seed (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions")
    parser.add_argument("--tagger", choices=TAGGERS, default="rule", help="what finds noun phrases")
    parser.add_argument("--tagger-data", help="folder of the tagger's data (nltk_data, a spaCy pipeline)")
    parser.add_argument("--batch-size", type=int, default=4, help="images of a batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.score <= 1:
        raise UserError(f"--score {args.score}: give a number between 0 and 1")
    for name in ("shard", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; gives the exit status. UserError for faulty input."""
    args = parse_args(argv)
    changes = [*args.overrides, f"test.score={min(0.05, 0.99 * args.score**2)}"]
    config = config_for(args.checkpoint, args.config, changes)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    options = LabelOptions(
        args.score, args.tagger, args.shard, args.limit, args.seed, config.data.test_size, config.data.longest,
        exif=config.data.exif,
    )  # fmt: skip
    with together():
        captions = choose(read_captions(args.captions), options)
        model = load_model(config, args.checkpoint)
        labeller = Labeller(
            model, weights_hash(model.state_dict()), args.images, args.out, options=options,
            selection=selection(config), precision=choose_precision(config.train, dist.device, training=False),
            source=args.captions, batch_size=args.batch_size, tagger_data=args.tagger_data, views=views(config),
        )  # fmt: skip
        labeller.check_folder(write=False)
    with together():
        if dist.is_master:  # alone: others could see the folder half made
            labeller.check_folder(write=True)
    model.to(dist.device)
    shards = -(-len(captions) // args.shard)
    with tqdm(total=len(captions), desc="captions", unit="", disable=not dist.is_master, dynamic_ncols=True) as bar:
        labeller.label(captions, range(dist.rank, shards, dist.world_size), bar.update)
    barrier()
    if dist.is_master:
        for name, number in sorted(labeller.summary(shards).items()):
            print(f"{name:<48} {number:>10}")
    return 0


def run(argv: Sequence[str] | None = None) -> int:
    """:func:`main`, with its errors as an exit status, see :func:`~training.engine.errors.run_program`."""
    return run_program(lambda: main(argv), FLAGS)
