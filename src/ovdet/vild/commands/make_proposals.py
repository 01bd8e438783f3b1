"""Write the proposals of a detector: python make_proposals.py CONFIG CHECKPOINT --split train|val --out FOLDER.

The folder holds boxes with objectness as arrays that open as memory maps. Where the images' objects are annotated, the
recall of the proposals is printed, for base and novel classes. An interrupted run goes on where it was; torchrun shares
the work among processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ovdet.data.annotations import load
from ovdet.evaluation.recall import format_recall
from ovdet.task import FLAGS
from ovdet.vild.assemble import learned, load_into, load_teacher, make_detector, read_config
from ovdet.vild.proposals import ProposalList, ProposalWriter
from ovdet.vild.propose import MIN_SIDE, proposal_key, recall_of, write_proposals
from ovdet.vocabulary import Vocabulary, make_vocabulary
from training.engine.checkpoint import weights_hash
from training.engine.data.records import Annotations
from training.engine.distributed import init_distributed, together
from training.engine.errors import UserError, run_program
from training.engine.files import write_json
from training.engine.flags import PATH, Parser
from training.engine.journal import setup_logging

MOST = {"train": 300, "val": 1000}  # proposals an image


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, propose and print recall. UserError for faulty input."""
    parser = Parser(description="Write the proposals of a detector for all images, and print their recall.")
    parser.add_argument("config", help="the config of the detector")
    parser.add_argument("checkpoint", help="a detector file")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--split", choices=tuple(MOST), default="train", help="images of data.train_* or data.val_*")
    parser.add_argument("--out", type=PATH, required=True, help="folder of the list")
    parser.add_argument("--most", type=int, help="proposals an image (default: 300 of train, 1000 of val)")
    parser.add_argument("--min-side", type=float, default=MIN_SIDE, help="thinner boxes are left out, in pixels")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_intermixed_args(argv)
    most = MOST[args.split] if args.most is None else args.most
    if most < 1 or not args.min_side >= 0:
        raise UserError(f"--most {most} --min-side {args.min_side}: give 1 or more, and 0 or more")
    config = read_config(args.config, args.overrides)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    with together():
        annotations = load(config, args.split, images=True)
        reference = load(config, "val") if config.data.val_annotations else annotations
        vocabulary = make_vocabulary(config, reference)
        teacher = load_teacher(config)
    detector = make_detector(config, teacher, learned(config, vocabulary), device=dist.device, trained=True)
    content = load_into(args.checkpoint, detector, config, teacher)
    with together():
        key = proposal_key(config, weights_hash(content["detector"]), most=most, min_side=args.min_side)
        writer = ProposalWriter(args.out, annotations, key)
    root = config.locate(getattr(config.data, f"{args.split}_images"))
    proposals = write_proposals(
        writer, config, detector.eval(), root, dist=dist, most=most, min_side=args.min_side
    )  # fmt: skip
    if dist.is_master:
        counts = np.diff(proposals.offsets)
        print(
            f"{args.out}: {len(proposals.boxes)} proposals of {len(proposals)} images "
            f"({counts.mean():.0f} an image, {int((counts == 0).sum())} images without any)"
        )
        _print_recall(proposals, annotations, vocabulary, most, args.out)


def _print_recall(
    proposals: ProposalList, annotations: Annotations, vocabulary: Vocabulary, most: int, folder: Path
) -> None:
    """Recall over the objects of the file, by groups of the classes that are evaluated."""
    if not len(annotations.boxes):
        return
    novel = dict(zip(vocabulary.names, vocabulary.novel, strict=True))
    own = Vocabulary(
        tuple(annotations.names), tuple(annotations.category_ids.tolist()),
        tuple(novel.get(name, False) for name in annotations.names),
    )  # fmt: skip
    values = recall_of(lambda row: proposals.boxes[proposals.of(row)], annotations, own, most=most)
    write_json(folder / "recall.json", values)
    print(format_recall(values))


def run() -> int:
    """The command line of this process; gives its exit status."""
    return run_program(main, FLAGS)
