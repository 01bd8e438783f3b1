"""Embed the crops of all proposals with the teacher: python embed.py CONFIG [section.key=value ...].

``data.proposals`` names the list that make_proposals.py wrote for the images of ``data.train_annotations``,
``data.store`` the folder to fill. An interrupted run goes on where it was; torchrun shares the work among processes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ovdet.data.annotations import load
from ovdet.precision import choose_precision
from ovdet.sections import TrainConfig
from ovdet.task import FLAGS
from ovdet.vild.assemble import load_teacher, read_config
from ovdet.vild.embed import Embedder, announcement, fill, open_store
from ovdet.vild.proposals import ProposalList
from training.engine.distributed import init_distributed, together
from training.engine.errors import UserError, run_program
from training.engine.flags import Parser
from training.engine.journal import setup_logging


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and fill the store. UserError for faulty input."""
    parser = Parser(description="Embed the crops of all proposals with the teacher.")
    parser.add_argument("config", help="the config of the detector that is to be trained")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--verify", action="store_true", help="read all bytes, and compare them with their checksums")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.config, args.overrides)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    data = config.data
    with together():
        annotations = load(config, "train", images=True)
        proposals = ProposalList.open(config.locate(data.proposals))
        proposals.rows_of(annotations)
        if args.verify and not proposals.is_undamaged():
            raise UserError(f"data.proposals {data.proposals} is damaged: delete it and make it again")
        teacher = load_teacher(config, needed=True)
        store = open_store(config.locate(data.store), config, proposals, teacher.model)
        if args.verify:
            damaged = store.missing(range(dist.rank, store.num_shards, dist.world_size), read=True)
            if damaged:
                raise UserError(
                    f"{store.where}: {len(damaged)} shards are missing or were damaged (and are now gone); run without "
                    "--verify to fill them again"
                )
    if args.verify:
        if dist.is_master:
            print(f"{announcement(store)}: complete and undamaged")
        return
    precision = choose_precision(TrainConfig(precision=config.teacher.precision), dist.device, training=False)
    embedder = Embedder(teacher.model, config.teacher, device=dist.device, precision=precision)
    fill(
        store, proposals, embedder, root=config.locate(data.train_images), exif=data.exif, dist=dist,
        workers=data.workers, max_skipped=data.max_skipped,
    )  # fmt: skip
    if dist.is_master:
        print(f"{announcement(store)}: complete")


def run() -> int:
    """The command line of this process; gives its exit status."""
    return run_program(main, FLAGS)
