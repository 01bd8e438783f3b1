"""GLIP: where the time of testing and of a training step goes, each part against its plain form, in one run.

    python benchmarks/glip.py                                   GLIP-T on a 640x448 image
    python benchmarks/glip.py --config GLIP/configs/glip_t_small.toml --height 256 --width 320      small, for a CPU

Weights and pixels are random, which changes no time. "Plain" is what the published code does: attention with the
matrix of logits, texts padded to all 256 tokens, a text encoded anew for every image, the image side computed anew for
every chunk of a long list of classes. Uses a GPU when there is one. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import torch
from common import ROOT, Clock, print_table
from torch.profiler import ProfilerActivity, profile

from ovdet.glip import boxes as ops
from ovdet.glip.assemble import read_config
from ovdet.glip.build import build_glip
from ovdet.glip.decode import Selection, select_detections
from ovdet.glip.head import Text, flatten_levels
from ovdet.glip.inference import Query, encode_prompts, find
from ovdet.glip.losses import GroundTruth
from ovdet.glip.model import GLIP, Prompt
from ovdet.glip.tokens import Encoded

CLASSES, TOKENS_A_CLASS = 80, 2  # of COCO's prompt, 194 tokens with separators and ends: 2.4 a class
DEFORM = "deform_conv2d"


class Numbers:
    """A tokenizer for random texts."""

    padding = 0

    def __init__(self, size: int, limit: int) -> None:
        self.size, self.limit = size, limit

    def encode(self, text: str) -> Encoded:
        """As many tokens as the text has words."""
        ids = [1 + hash(word) % (self.size - 1) for word in text.split()]
        return Encoded(ids, [(0, 0)] * len(ids))


def prompt(model: GLIP, classes: int, length: int) -> Prompt:
    """A text of random tokens with a phrase for each class."""
    ids = torch.randint(1, model.tokenizer.size, (length,)).tolist()
    step = max((length - 2) // classes, 1)
    tokens = [[min(1 + i * step, length - 1)] for i in range(classes)]
    return Prompt(Encoded(ids, [(0, 0)] * length), tokens, list(range(classes)))


def padded(text: Text, length: int) -> Text:
    """A text with padding up to ``length`` tokens."""
    more = length - text.mask.shape[1]
    hidden = torch.cat([text.hidden, text.hidden.new_zeros(len(text.hidden), more, text.hidden.shape[2])], dim=1)
    return Text(hidden, torch.cat([text.mask, text.mask.new_zeros(len(text.mask), more)], dim=1))


@torch.no_grad()
def testing(model: GLIP, images: torch.Tensor, length: int, time: Callable) -> list[tuple[str, float, float | None]]:
    """(part, seconds, seconds of its plain form) for a batch."""
    sizes, limit = [tuple(images.shape[-2:])] * len(images), model.tokenizer.limit
    asked = prompt(model, CLASSES, length)
    rows: list[tuple[str, float, float | None]] = []
    levels = model.image(model.image.normalize(images, sizes))
    rows.append(("image encoder", time(lambda: model.image(model.image.normalize(images, sizes))), None))
    text = model.encode_text([asked.encoded] * len(images))
    once = time(lambda: model.encode_text([asked.encoded]))
    rows.append((f"text encoder, {length} tokens, once a list", once, None))
    block, visual = model.head.blocks[0], flatten_levels(levels)
    if block.fusion is not None:
        long = padded(text, limit)

        def fuse(fused: bool, of: Text) -> float:
            for b in model.head.blocks:
                b.fusion.attn.fused = fused
            return len(model.head.blocks) * time(lambda: block.fusion(visual, of.hidden, of.mask))

        rows.append(("fusion, all blocks (plain: logits, 256 tokens)", fuse(True, text), fuse(False, long)))
        fuse(True, text)
        layer = block.text_layer
        short, full = (time(lambda t=t: layer(t.hidden, t.mask)) for t in (text, long))
        number = len(model.head.blocks)
        rows.append(("text layers, all blocks (plain: 256 tokens)", short * number, full * number))
    rows.append(("dynamic blocks, all", len(model.head.blocks) * time(lambda: block.dyconv(levels)), None))
    out = model.head(levels, text)
    anchors = ops.make_anchors(out.grids, model.image.strides, images.device)
    rows.append(("dot product, boxes, centerness", time(lambda: model.head.predict(levels, text)), None))
    options = Selection()
    rows.append(("decoding and NMS", time(lambda: select_detections(out, anchors, asked.tokens, sizes, options)), None))
    query = encode_prompts(model, [asked])
    whole = time(lambda: find(model, images, sizes, sizes, query, options))
    plain = whole + once
    rows.append(("whole image, one prompt (plain: text encoded anew)", whole, plain))
    return rows


@torch.no_grad()
def chunks(model: GLIP, images: torch.Tensor, number: int, time: Callable) -> tuple[float, float]:
    """Seconds of a list of classes in ``number`` prompts: image side once, and once a prompt."""
    sizes = [tuple(images.shape[-2:])] * len(images)
    query = encode_prompts(model, [prompt(model, 40, 160) for _ in range(number)])
    shared = time(lambda: find(model, images, sizes, sizes, query, Selection(per_image=300)))

    def anew() -> None:
        for p, t in zip(query.prompts, query.texts, strict=True):
            find(model, images, sizes, sizes, Query([p], [t]), Selection(per_image=300))

    return shared, time(anew)


def training(model: GLIP, images: torch.Tensor, length: int, time: Callable) -> dict[str, float]:
    """Seconds of a step, forward and backward, with and without recomputing; and deformable convolution's share."""
    sizes = [tuple(images.shape[-2:])] * len(images)
    texts = [prompt(model, CLASSES, length).encoded] * len(images)
    height, width = sizes[0]
    boxes = torch.rand(7, 2, 2, device=images.device) * torch.tensor([width, height], device=images.device)
    boxes = torch.cat([boxes.amin(1), boxes.amax(1)], dim=1)
    tokens = torch.zeros(7, model.tokenizer.limit, dtype=torch.bool, device=images.device)
    tokens[range(7), range(1, 8)] = True
    truths = [GroundTruth(boxes, tokens)] * len(images)
    model.train()

    def step() -> None:
        sum(model(images, sizes, texts, truths).values()).backward()
        model.zero_grad(set_to_none=True)

    results = {}
    for recompute in (True, False):
        model.image.set_grad_checkpointing(recompute)
        model.text.set_grad_checkpointing(recompute)
        for block in model.head.blocks:
            block.recompute = recompute
        results["recomputing" if recompute else "keeping activations"] = time(step)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if images.is_cuda else [])
    with profile(activities=activities) as trace:
        step()
    events = trace.key_averages()
    field = "self_device_time_total" if images.is_cuda else "self_cpu_time_total"
    total = sum(getattr(e, field) for e in events)
    results["deformable convolution, share"] = sum(getattr(e, field) for e in events if DEFORM in e.key) / total
    model.eval()
    return results


def _seconds(function: Callable, device: str) -> float:
    clock = Clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "GLIP" / "configs" / "glip_t.toml"))
    parser.add_argument("--height", type=int, default=448)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=4, help="prompts of the long list (LVIS has 31)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    config = read_config(args.config)
    model = build_glip(config, Numbers(config.text.tokens, config.text.limit)).eval().to(args.device)
    shape = (args.batch_size, 3, args.height, args.width)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=args.device)

    def time(function: Callable) -> float:
        function()
        return min(_seconds(function, args.device) for _ in range(args.repeats))

    length = min(round(CLASSES * TOKENS_A_CLASS * 1.2) + 2, config.text.limit)
    rows = testing(model, images, length, time)
    shared, anew = chunks(model, images, args.chunks, time)
    rows.append((f"{args.chunks} prompts of 40 classes (plain: image side anew)", shared, anew))
    table = [[name, s, *(("", "") if p is None else (p, f"{p / s:.2f}x"))] for name, s, p in rows]
    print_table(f"testing, {args.device}", ["part", "s", "plain, s", "gain"], table)
    steps = training(model, images, length, time)
    print_table("training step", ["", "s or share"], [[name, value] for name, value in steps.items()])
    speed = {"test": args.batch_size / rows[-2][1], "train": args.batch_size / steps["keeping activations"]}
    result = {
        "config": args.config, "size": [args.height, args.width], "batch": args.batch_size, "device": args.device,
        "testing": {name: [s, p] for name, s, p in rows}, "training": steps,
        "images_per_second": speed,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
