"""The mAcc evaluation, from annotation file to table, against the conventional one and against its own limit.

    python benchmarks/evaluate.py

Conventional: images and crops as padded float32, one dense pass for boxes and another for masks, eager attention. The
limit is one dense pass and the crops' forward pass, timed alone between the measured evaluations. All three see the
same images and take turns in one process. From the same pixels the accuracies of both evaluations must be the same; the
conventional one also shows those from its own pixels, which Pillow makes (a level or two of 255 apart), as random
weights bring some segments so close to a tie that this is enough to turn them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
from common import Clock, add_data_flags, dataset_of, print_table  # noqa: E402
from conventional import Panoptic, use_eager_attention  # noqa: E402

import open_clip  # noqa: E402
from training.evaluation.evaluate import CROP_CHUNK, CROP_CHUNK_DEFAULT, evaluate  # noqa: E402
from training.evaluation.metrics import KINDS, TOP_K  # noqa: E402
from training.evaluation.options import EvalOptions  # noqa: E402
from training.evaluation.panoptic import build_eval_data  # noqa: E402

KINDS_OF_PREDICTION = ("rois", "maskpool", "crops")


def conventional_evaluation(
    model: nn.Module, loader: Iterable, classes: Tensor, is_thing: list[bool], device: torch.device
) -> dict[str, float]:
    """Mean accuracy as in :func:`training.evaluation.evaluate.evaluate`, written plainly. Keys are the same."""
    # right[prediction][k][class], and the number of segments of each class
    right = {name: {k: torch.zeros(len(classes), dtype=torch.float64) for k in TOP_K} for name in KINDS_OF_PREDICTION}
    number = torch.zeros(len(classes), dtype=torch.float64)
    with torch.no_grad():
        for images, boxes, labels, masks, crops in loader:
            images, boxes, masks, crops = (t.to(device) for t in (images, boxes, masks, crops))
            used = labels >= 0
            counts = used.sum(1).tolist()
            boxes = [part[:n] for part, n in zip(boxes, counts, strict=True)]
            masks = [part[:n] > 0 for part, n in zip(masks, counts, strict=True)]
            features = {
                "rois": model.encode_pseudo_boxes(images, boxes, normalize=True),
                "maskpool": model.encode_masks(images, masks, normalize=True),
                "crops": model.encode_image(crops[used.to(device)], normalize=True),
            }
            truth = labels[used]
            number += torch.bincount(truth, minlength=len(classes))
            for name, feature in features.items():
                order = (feature @ classes.T).argsort(dim=1, descending=True).cpu()
                for k in TOP_K:
                    hit = (order[:, :k] == truth[:, None]).any(1)
                    right[name][k] += torch.bincount(truth[hit], minlength=len(classes))
    things = torch.tensor(is_thing)
    results = {}
    for name, hits in right.items():
        for kind, chosen in zip(KINDS, (things, ~things), strict=True):
            present = chosen & (number > 0)
            if present.any():
                for k in TOP_K:
                    results[f"{name}.{kind}.macc{k}"] = (hits[k][present] / number[present]).mean().item()
    return results


def conventional_batches(loader: DataLoader, model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """This package's batches in the conventional form: normalised float32, labels, boxes, masks and crops padded."""
    for batch in loader:
        images, crops = (
            open_clip.transform.normalize(t, model.visual.image_mean, model.visual.image_std)
            for t in (next(iter(batch["images"].values())), batch["crops"])
        )
        boxes, masks = (next(iter(batch[key].values())).float() for key in ("boxes", "masks"))
        regions = (
            pad_sequence(values.split(batch["counts"].tolist()), batch_first=True, padding_value=filling)
            for values, filling in ((boxes, 0), (batch["labels"], -1), (masks, 0), (crops, 0))
        )
        yield images, *regions


@contextlib.contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Unfused attention for the time being."""
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    use_eager_attention(model)
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


@torch.inference_mode()
def limit(model: nn.Module, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Seconds of the dense pass over all images and of the global pass over all crops, inputs at hand, one by one."""
    chunk = CROP_CHUNK.get(device.type, CROP_CHUNK_DEFAULT)
    seconds = 0.0
    for images, crops in batches:
        for passes, inputs in ((model.encode_dense, [images]), (model.encode_image, crops.split(chunk))):
            for pixels in inputs:
                clock = Clock()
                passes(pixels)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds += clock()
    return seconds


@torch.inference_mode()
def class_embeddings(model: nn.Module, loader: DataLoader, classes: int, device: torch.device) -> Tensor:
    """Embeddings ``[C, D]`` that suit random weights: each class is the mean of its boxes, masks and crops.

    Random weights map all images to nearly one direction. Without the mean directions of the three kinds of prediction,
    classes come apart, and accuracies are neither 0 nor 1. Classes without a segment are mixtures of others.
    """
    found: list[tuple[Tensor, ...]] = []
    labels = []
    for batch in loader:
        images, crops = (
            open_clip.transform.normalize(t.to(device), model.visual.image_mean, model.visual.image_std)
            for t in (next(iter(batch["images"].values())), batch["crops"])
        )
        boxes, masks = (
            [t.to(device) for t in next(iter(batch[key].values())).split(batch["counts"].tolist())]
            for key in ("boxes", "masks")
        )
        regions = model.encode_regions(images, boxes, masks, normalize=True)
        found.append((*regions, model.encode_image(crops, normalize=True)))
        labels.append(batch["labels"])
    kinds = torch.stack([torch.cat(parts) for parts in zip(*found, strict=True)]).double()  # [3, K, D]
    directions = torch.linalg.qr(kinds.mean(1).T).Q  # [D, 3]
    kinds = kinds - kinds @ directions @ directions.T
    each = F.normalize(kinds, dim=-1).mean(0)  # [K, D]
    truth = torch.cat(labels).to(device)
    mixture = torch.randn(classes, len(each), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = mixture.to(device) @ each
    for label in truth.unique().tolist():
        out[label] = each[truth == label].mean(0)
    return F.normalize(out, dim=-1).float()


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_data_flags(parser)
    add("--model", default="EVA02-CLIP-B-16", help="name of the model (EVA02-CLIP-B-16)")
    add("--pretrained", default=None, help="tag or checkpoint file; random weights if absent")
    add("--cache-dir", default=None, help="checkpoint file of --pretrained eva")
    add("--size", type=int, default=512, help="side of the dense input, pixels (512)")
    add("--count", type=int, default=8, help="images (8)")
    add("--batch-size", type=int, default=2, help="images of a batch (2)")
    add("--workers", type=int, default=2, help="loader processes (2)")
    add("--rounds", type=int, default=3, help="rounds over the three; medians count (3)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data = dataset_of(args, Path(folder), count=args.count, entries=args.count)
        run(args, data)


def run(args: argparse.Namespace, data: dict[str, str]) -> None:
    """Measure and print."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = open_clip.create_model(args.model, pretrained=args.pretrained, cache_dir=args.cache_dir)
    del model.text  # class embeddings come from elsewhere
    model = model.to(device).eval()
    patch, crop_size = model.visual.patch_size, model.visual.image_size
    options = EvalOptions(
        val_data=data["annotations"], val_image_root=data["images"], val_segm_root=data["segments"]
    )
    loading = {"batch_size": args.batch_size, "workers": args.workers, "patch_size": patch, "crop_size": crop_size}
    eval_data = build_eval_data(options, image_sizes=[args.size], **loading)
    classes = class_embeddings(model, eval_data.loader, len(eval_data.class_names), device)
    alone = [
        tuple(open_clip.transform.normalize(t.to(device), model.visual.image_mean, model.visual.image_std)
              for t in (batch["images"][args.size], batch["crops"]))
        for batch in eval_data.loader
    ]  # fmt: skip

    seconds: dict[str, list[float]] = {"conventional": [], "ours": [], "limit": []}
    for _ in range(args.rounds):  # in turns, so that a slow spell of the machine meets all of them
        clock = Clock()
        eval_data = build_eval_data(options, image_sizes=[args.size], **loading)
        ours = evaluate(model, eval_data, classes, device=device, progress=False)
        seconds["ours"].append(clock())
        seconds["limit"].append(limit(model, alone, device))
        with eager_attention(model):
            clock = Clock()
            dataset = Panoptic(data["images"], data["annotations"], data["segments"], args.size, patch, crop_size)
            loader = DataLoader(dataset, args.batch_size, num_workers=args.workers)
            plain = conventional_evaluation(model, loader, classes, eval_data.is_thing, device)
            seconds["conventional"].append(clock())

    with eager_attention(model):
        same_pixels = conventional_evaluation(
            model, conventional_batches(eval_data.loader, model), classes, eval_data.is_thing, device
        )
    images = eval_data.num_images
    segments = int(sum(ours[f"count.{kind}"] for kind in KINDS))
    difference, by_pixels = (
        max(abs(ours[key] - value) for key, value in other.items()) for other in (same_pixels, plain)
    )
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    speedup = statistics.median(c / o for c, o in zip(seconds["conventional"], seconds["ours"], strict=True))
    over = statistics.median(o / l for o, l in zip(seconds["ours"], seconds["limit"], strict=True))
    titles = {"conventional": "conventional", "ours": "this package", "limit": "one dense pass and the crops, alone"}
    print_table(
        f"mAcc evaluation of {args.model} at {args.size} on {args.device}: {segments} segments of {images} images "
        f"({data['what']})",
        ["evaluation", "s an image", "images/s"],
        [[titles[name], value / images, images / value] for name, value in middle.items()],
    )
    print(
        f"\n{speedup:.2f} times the conventional evaluation's images/s; {100 * (over - 1):.1f} % above the limit; "
        f"accuracies differ by {difference:.2g} at most from the same pixels, {by_pixels:.2g} from Pillow's"
    )
    shown = {key: round(value, 4) for key, value in ours.items() if "macc" in key}
    print("accuracies:", ", ".join(f"{key} {value}" for key, value in shown.items()))
    result = {
        "ratio": speedup, "over_limit": over - 1, "metrics_difference": difference,
        "metrics_difference_pillow": by_pixels, "images": images,
        "segments": segments, **{f"{name}_seconds_per_image": value / images for name, value in middle.items()},
        "rounds": seconds, "model": args.model, "size": args.size, "device": args.device,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
