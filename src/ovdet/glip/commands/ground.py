"""Find what a caption or a list names: python ground.py IMAGE... --checkpoint FILE --caption "..." | --classes ..."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ovdet.data.images import read_image
from ovdet.glip import phrases as ph
from ovdet.glip.assemble import config_for, load_model
from ovdet.glip.decode import AGGREGATIONS
from ovdet.glip.draw import draw
from ovdet.glip.inference import Query
from ovdet.glip.library import Grounder, Phrases
from ovdet.glip.prompts import ClassPrompt, clean_name, read_class_prompts
from ovdet.glip.task import FLAGS
from ovdet.listing import list_images, place_pictures
from ovdet.listing import read_names as listed_names
from training.engine.data.images import ImageError
from training.engine.distributed import init_distributed
from training.engine.errors import UserError, run_program
from training.engine.files import write_json
from training.engine.flags import PATH, Parser
from training.engine.journal import setup_logging

_STOP = re.compile(r"\s*\.\s+|\s+\.|\.$")  # a full stop between names: "cat . dog ." or "cat. dog", as GLIP's texts


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="ground.py", description="Find what a caption or a list of names says.")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--checkpoint", required=True, help="a file of this program, of the published code, ...")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--caption", help="a sentence; its phrases are looked for")
    text.add_argument("--classes", help='"cat, dog", "cat . dog .", or a file with a name on each line')
    parser.add_argument("--phrases", help='with --caption: its phrases, "two dogs; the shelf"; default: noun phrases')
    parser.add_argument("--spans", help='with --caption: characters of its phrases, "0-12; 16-19,23-32"')
    parser.add_argument("--tagger", choices=ph.TAGGERS, default="rule", help="what finds noun phrases")
    parser.add_argument("--tagger-data", help="folder of the tagger's data (nltk_data, a spaCy pipeline)")
    parser.add_argument("--prompts", help="with --classes: json of prefix, name and suffix of classes")
    parser.add_argument("--config", help="the variant; default: the config in the checkpoint")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config values: section.key=value")
    parser.add_argument("--score", type=float, default=0.5, help="smallest score shown, 0 to 1")
    parser.add_argument("--aggregation", choices=AGGREGATIONS, help="scores of phrases from those of their tokens")
    parser.add_argument("--ema", action="store_true", help="the averaged weights in the checkpoint")
    parser.add_argument("--out", type=PATH, default=Path("grounded"), help="folder of the pictures and results.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_args(argv)
    for flag, owner in (("phrases", "caption"), ("spans", "caption"), ("prompts", "classes")):
        if getattr(args, flag) is not None and getattr(args, owner) is None:
            raise UserError(f"--{flag} belongs to --{owner}: give both, or neither")
    if args.phrases is not None and args.spans is not None:
        raise UserError("--phrases and --spans name the same thing: give one of them")
    if not 0 <= args.score <= 1:
        raise UserError(f"--score {args.score}: give a number between 0 and 1")
    return args


def read_names(text: str) -> list[str]:
    """Names of a file, or separated by commas, or by full stops where there is no comma; each once.

    Raises:
        UserError: none, or a file that is not there.
    """
    if "," not in text and _STOP.search(text) and not Path(text).is_file():
        return ph.split_list(_STOP.sub(" . ", text))
    return listed_names(text, once=False)


def read_spans(text: str) -> list[list[tuple[int, int]]]:
    """``"0-12; 16-19,23-32"``: two phrases, the second of two spans. UserError where it is not of this form."""
    groups = []
    for group in text.split(";"):
        spans = [re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part) for part in group.split(",")]
        if not all(spans):
            raise UserError(f'--spans "{group.strip()}": give begin-end, as "0-12" or "16-19,23-32"')
        groups.append([(int(m[1]), int(m[2])) for m in spans if m])
    return groups


@dataclass
class Wanted:
    """What is looked for."""

    names: list[str]
    phrases: list[ph.Phrase]
    query: Query


def understand(args: argparse.Namespace, grounder: Grounder) -> Wanted:
    """Phrases or classes of the command line, encoded.

    Raises:
        UserError: a caption without phrases, spans outside of it, too long a text, no names.
    """
    if args.caption is None:
        names = read_names(args.classes)
        entries: list[str | ClassPrompt] = list(read_class_prompts(args.prompts, names)) if args.prompts else [*names]
        return Wanted([clean_name(name).strip() for name in names], [], grounder.classes(entries))
    caption = " ".join(args.caption.split())
    given: Phrases = None
    if args.spans is not None:
        given = read_spans(args.spans)
    elif args.phrases is not None:
        given = [p for p in args.phrases.split(";") if p.strip()]
    elif not ph.noun_phrases(caption, args.tagger, args.tagger_data):
        how = "the built-in rule" if args.tagger == "rule" else args.tagger
        raise UserError(f'{how} finds no noun phrase in "{caption[:60]}": name them with --phrases or --spans')
    phrases, query = grounder.caption(caption, given, tagger=args.tagger, tagger_data=args.tagger_data)
    return Wanted([p.text for p in phrases], phrases, query)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; gives the exit status. UserError for faulty input."""
    args = parse_args(argv)
    changes = [*args.set, f"test.score={min(0.05, 0.99 * args.score**2)}"]
    if args.aggregation:
        changes.append(f"test.aggregation={args.aggregation}")
    config = config_for(args.checkpoint, args.config, changes)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    images = list_images(args.images, output=args.out)
    targets = place_pictures(images, args.out)
    model = load_model(config, args.checkpoint, ema=args.ema).to(dist.device)
    grounder = Grounder(model, config, dist.device)
    wanted = understand(args, grounder)
    results: list[dict[str, Any]] = []
    failed = 0
    for name, target in zip(images, targets, strict=True):
        try:
            image = read_image(name, exif=config.data.exif)
        except ImageError as error:
            print(f"skipped {error}")
            failed += 1
            continue
        (found,) = grounder.find([image], wanted.query)
        shown = found["scores"] >= args.score
        boxes, scores = found["boxes"][shown], found["scores"][shown].tolist()
        labels = found["labels"][shown].astype(int).tolist()
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(
            image, torch.from_numpy(boxes), labels, scores, wanted.names,
            caption=" ".join((args.caption or "").split()), phrases=wanted.phrases,
        ).save(target)  # fmt: skip
        print(f"{name} -> {target}")
        for box, label, score in zip(boxes.tolist(), labels, scores, strict=True):
            print(f"  {wanted.names[label]:<24} {score:.3f}  {' '.join(f'{v:.0f}' for v in box)}")
            results.append({"image": name, "name": wanted.names[label], "score": score, "box": box})
    if failed == len(images):
        raise UserError("none of the images could be read: see the reasons above")
    write_json(args.out / "results.json", results)
    return 0


def run(argv: Sequence[str] | None = None) -> int:
    """:func:`main`, with its errors as an exit status, see :func:`~training.engine.errors.run_program`."""
    return run_program(lambda: main(argv), FLAGS)
