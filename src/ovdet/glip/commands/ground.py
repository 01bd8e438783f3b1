"""Find what a caption or a list names: python ground.py IMAGE... --checkpoint FILE --caption "..." | --classes ..."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovdet.evaluation.coco import write_json
from ovdet.glip import phrases as ph
from ovdet.glip.assemble import config_of_checkpoint, load_model, read_config
from ovdet.glip.config import GlipConfig
from ovdet.glip.data.dataset import pad_images
from ovdet.glip.data.transforms import resized_view, target_size
from ovdet.glip.decode import AGGREGATIONS
from ovdet.glip.draw import draw
from ovdet.glip.inference import Query, encode_prompts, find
from ovdet.glip.model import GLIP
from ovdet.glip.prompts import ClassPrompt, clean_name, make_prompts, read_class_prompts
from ovdet.glip.task import FLAGS
from ovdet.glip.testing import selection
from ovdet.precision import choose_precision
from training.engine.data.images import ImageError, read_image
from training.engine.distributed import init_distributed
from training.engine.errors import UserError, run_program
from training.engine.flags import Parser
from training.engine.journal import setup_logging


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="ground.py", description="Find what a caption or a list of names says.")
    parser.add_argument("images", nargs="+", help="image files")
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
    parser.add_argument("--out", type=Path, default=Path("grounded"), help="folder of the pictures and results.json")
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
    path = Path(text)
    if len(text) < 255 and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {text}: cannot be read as utf-8 text ({error}); save it so") from error
        return ph.split_list("\n".join(lines), "\n")
    if re.search(r"\.(txt|json|csv|names)$", text):
        raise UserError(f"--classes {text}: no such file; give one, or names separated by commas")
    return ph.split_list(text, "," if "," in text else ".")


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


def understand(args: argparse.Namespace, config: GlipConfig, model: GLIP) -> Wanted:
    """Phrases or classes of the command line, encoded.

    Raises:
        UserError: a caption without phrases, spans outside of it, too long a text, no names.
    """
    if args.caption is None:
        names = read_names(args.classes)
        entries: list[str | ClassPrompt] = list(read_class_prompts(args.prompts, names)) if args.prompts else [*names]
        prompts = make_prompts(entries, model.tokenizer, chunk=config.test.chunk, separator=config.test.separator)
        return Wanted([clean_name(name).strip() for name in names], [], encode_prompts(model, prompts))
    caption = " ".join(args.caption.split())
    if args.spans is not None:
        phrases = ph.phrases_of_spans(caption, read_spans(args.spans))
    elif args.phrases is not None:
        phrases = ph.phrases_of_texts(caption, [p for p in args.phrases.split(";") if p.strip()])
    else:
        phrases = ph.noun_phrases(caption, args.tagger, args.tagger_data)
        if not phrases:
            how = "the built-in rule" if args.tagger == "rule" else args.tagger
            raise UserError(f'{how} finds no noun phrase in "{caption[:60]}": name them with --phrases or --spans')
    prompt = ph.caption_prompt(caption, phrases, model.tokenizer)
    return Wanted([p.text for p in phrases], phrases, encode_prompts(model, [prompt]))


@torch.no_grad()
def ground(model: GLIP, image: Tensor, wanted: Wanted, config: GlipConfig) -> dict[str, Tensor]:
    """Detections in an image uint8 ``[3, H, W]``: boxes within it, scores, labels, by falling score."""
    original = (image.shape[-2], image.shape[-1])
    size = target_size(*original, config.data.test_size, config.data.longest)
    resized, _ = resized_view(image, torch.zeros(0, 4), size, flip=False)
    batch, sizes = pad_images([resized], model.image.divisor)
    device = model.head.bias0.device
    with choose_precision(config.train, device, training=False).autocast():
        (found,) = find(model, batch.to(device), sizes, [original], wanted.query, selection(config))
    found = {key: value.cpu() for key, value in found.items()}
    limit = torch.tensor([original[1], original[0]] * 2)
    return found | {"boxes": torch.minimum(found["boxes"].clamp(min=0), limit)}


def _target(out: Path, image: Path, used: set[str]) -> Path:
    """Where an image's picture goes; images of the same name get numbers."""
    name, number = image.stem, 2
    while name in used:
        name, number = f"{image.stem}_{number}", number + 1
    used.add(name)
    return out / f"{name}.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; gives the exit status. UserError for faulty input."""
    args = parse_args(argv)
    changes = [*args.set, f"test.score={min(0.05, 0.99 * args.score**2)}"]
    if args.aggregation:
        changes.append(f"test.aggregation={args.aggregation}")
    config = read_config(args.config, changes) if args.config else config_of_checkpoint(args.checkpoint, changes)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    model = load_model(config, args.checkpoint, ema=args.ema).to(dist.device)
    wanted = understand(args, config, model)
    args.out.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    results: list[dict[str, Any]] = []
    failed = 0
    for name in args.images:
        try:
            image = read_image(name)
        except ImageError as error:
            print(f"skipped {error}")
            failed += 1
            continue
        found = ground(model, image, wanted, config)
        shown = found["scores"] >= args.score
        found = {key: value[shown] for key, value in found.items()}
        target = _target(args.out, Path(name), used)
        labels, scores = found["labels"].tolist(), found["scores"].tolist()
        draw(
            image, found["boxes"], labels, scores, wanted.names,
            caption=" ".join((args.caption or "").split()), phrases=wanted.phrases,
        ).save(target)  # fmt: skip
        print(f"{name} -> {target}")
        for box, label, score in zip(found["boxes"].tolist(), labels, scores, strict=True):
            print(f"  {wanted.names[label]:<24} {score:.3f}  {' '.join(f'{v:.0f}' for v in box)}")
            results.append({"image": name, "name": wanted.names[label], "score": score, "box": box})
    if failed == len(args.images):
        raise UserError("none of the images could be read: see the reasons above")
    write_json(args.out / "results.json", results)
    return 0


def run(argv: Sequence[str] | None = None) -> int:
    """:func:`main`, with its errors as an exit status, see :func:`~training.engine.errors.run_program`."""
    return run_program(lambda: main(argv), FLAGS)
