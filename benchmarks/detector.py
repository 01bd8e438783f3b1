"""The detector (F-ViT): training by stages, the test loop, masks, and memory; beside it the usual way to write it.

    python benchmarks/detector.py                                     the OV-COCO B/16 config at its own size, 640
    python benchmarks/detector.py --image-size 320 --batch-size 2     smaller, for a CPU
    python benchmarks/detector.py --part masks loader waits           these alone

Runs on generated photographs with 65 classes, 17 of them novel; weights are random. "plain" is the path of
detector_plain.py, which goes through images and masks one by one; the two take turns. Each part has a process of its
own. Host waits are places where the CPU waits for its GPU, counted without one. Uses a GPU when there is one. Ends with
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
from common import ROOT, Clock, photograph, print_table, random_boxes, run_self  # noqa: E402
from detector_plain import WholeMasks, paste_and_encode, plain_losses  # noqa: E402
from host_waits import HostWaits  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from ovdet.data.dataset import TestDataset  # noqa: E402
from ovdet.data.loader import collate_train, test_loader  # noqa: E402
from ovdet.fvit.assemble import read_config  # noqa: E402
from ovdet.fvit.backbone import FrozenViT  # noqa: E402
from ovdet.fvit.config import FViTConfig  # noqa: E402
from ovdet.fvit.run import make_dataset, make_task  # noqa: E402
from ovdet.parts import boxes as box_ops  # noqa: E402
from ovdet.parts.losses import classification_loss  # noqa: E402
from ovdet.parts.masks import encode_pasted  # noqa: E402
from ovdet.parts.rois import sample_rois  # noqa: E402
from ovdet.precision import choose_precision  # noqa: E402
from ovdet.testing import detect  # noqa: E402
from training.engine.distributed import Dist  # noqa: E402
from training.engine.memory import peak_memory  # noqa: E402

CLASSES, NOVEL = 65, 17
WARM_UP = 2  # steps, or batches, that are not counted
PARTS = ("stages", "train", "test", "masks", "loader", "waits", "memory")
MASKS = 300  # detections of an image of LVIS


def prepare(folder: Path, count: int, *, objects: int = 7) -> Path:
    """``count`` 640x480 JPEGs in ``folder``, and annotations with as many boxes and masks as COCO has a picture.

    A folder that holds as many is used as it is. Returns the annotation file.
    """
    file = folder / f"objects_{count}.json"
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        Image.fromarray(photograph(rng)).save(folder / f"{i}.jpg", quality=90)
        images.append({"id": i + 1, "file_name": f"{i}.jpg", "width": 640, "height": 480})
        for x, y, w, h in random_boxes(rng, objects):
            angle, radius = np.sort(rng.uniform(0, 2 * np.pi, 24)), rng.uniform(0.6, 1, 24)
            outline = [x + w / 2 * (1 + radius * np.cos(angle)), y + h / 2 * (1 + radius * np.sin(angle))]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i + 1, "category_id": int(rng.integers(1, CLASSES + 1)),
                 "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                 "segmentation": [np.stack(outline, 1).round(2).ravel().tolist()]}
            )  # fmt: skip
    categories = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(CLASSES)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def make_config(args: argparse.Namespace, **changes: Any) -> FViTConfig:
    """The config to measure, on the generated data, with random weights and embeddings."""
    folder = Path(args.data)
    file = str(prepare(folder, max(args.images, args.batch_size)))
    import open_clip

    values = {
        "model.pretrained": "", "model.cache_dir": "", "data.novel_frequency": [],
        "data.novel": [f"class {i + 1}" for i in range(CLASSES - NOVEL, CLASSES)],
        "data.train_annotations": file, "data.train_images": str(folder),
        "data.val_annotations": file, "data.val_images": str(folder), "data.protocol": "coco",
        "data.workers": args.workers, "train.precision": args.precision, "train.batch_size": args.batch_size,
        "train.log_every": 1, "train.eval_every": 0, "train.epochs": 10**6, **changes,
    }  # fmt: skip
    if args.image_size and "data.image_size" not in changes:
        values["data.image_size"] = args.image_size
    config = read_config(args.config, [*(f"{k}={json.dumps(v)}" for k, v in values.items()), *args.overrides])
    config.data.embeddings = str(folder / f"{config.model.name}.npy")
    dim = open_clip.get_model_config(config.model.name)["embed_dim"]
    np.save(config.data.embeddings, np.random.default_rng(0).normal(size=(CLASSES + 1, dim)).astype(np.float32))
    return config


class Watch(Clock):
    """A clock that waits for the GPU, where there is one."""

    def __call__(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().__call__()


def one_process(args: argparse.Namespace) -> Dist:
    return Dist(0, 1, 0, torch.device(args.device), False)


def paired(ours: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median seconds of both, which take turns, after a first call that is not counted."""
    times: dict[str, list[float]] = {"ours_s": [], "plain_s": []}
    for number in range(rounds + 1):
        for name, function in (("ours_s", ours), ("plain_s", plain)):
            clock = Watch()
            function()
            if number:
                times[name].append(clock())
    values = {name: statistics.median(seconds) for name, seconds in times.items()}
    return values | {"ratio": values["plain_s"] / values["ours_s"]}


# -- the parts --------------------------------------------------------------------------------------------------------


def stages(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each stage of a training step, and the whole step of both ways."""
    config = make_config(args)
    task = make_task(config, one_process(args), Path(args.data))
    detector, optimizer = task.detector.train(), task.optimizer()
    precision = choose_precision(config.train, task.dist.device, training=False)
    clock = Watch()
    batch = collate_train([task.dataset[(0, i)] for i in range(args.batch_size)])
    seconds: dict[str, list[float]] = {"data (one process)": [clock()] * args.steps}
    batch = task.to_device(batch)
    images, sizes, targets = batch["images"], batch["sizes"], batch["targets"]
    truth, labels = [t["boxes"] for t in targets], [t["labels"] for t in targets]

    def step(losses: Callable[..., dict[str, Tensor]]) -> None:
        with precision.autocast():
            total = sum(losses(images, sizes, targets).values())
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model = config.model
    for number in range(args.steps + 1):
        now: dict[str, Callable[[dict[str, Any]], Any]] = {
            "backbone": lambda s: detector.backbone(images, dense=False).levels,
            "neck": lambda s: detector.neck(s["backbone"]),
            "RPN": lambda s: detector.rpn(s["neck"]),
            "anchors: matched, drawn, loss": lambda s: detector.rpn.losses(s["RPN"], sizes, truth),
            "proposals": lambda s: detector.rpn.propose(s["RPN"], sizes)[0],
            "RoIs: matched, drawn": lambda s: sample_rois(
                s["proposals"], sizes, truth, labels, len(detector.base_mask), number=model.roi_samples
            ),
            "box head": lambda s: detector.box_head(s["neck"][:4], s["RoIs: matched, drawn"].boxes),
            "class loss": lambda s: classification_loss(
                detector.classifier(s["box head"][0], detector.class_embeddings), s["RoIs: matched, drawn"].labels,
                detector.base_mask, model.background_weight,
            ),
            "backward": lambda s: (sum(s["anchors: matched, drawn, loss"]) + s["class loss"]).backward(),
            "optimizer": lambda s: (optimizer.step(), optimizer.zero_grad(set_to_none=True)),
        }  # fmt: skip
        state: dict[str, Any] = {}
        for name, function in now.items():
            clock = Watch()
            with precision.autocast():
                state[name] = function(state)
            if number:
                seconds.setdefault(name, []).append(clock())
    whole = paired(lambda: step(detector), lambda: step(lambda *a: plain_losses(detector, *a)), args.steps)
    return {name: statistics.median(values) for name, values in seconds.items()} | {"step": whole}


def train_speed(args: argparse.Namespace) -> dict[str, float]:
    """Median step fed by the loader."""
    config = make_config(args)
    task = make_task(config, one_process(args), Path(args.data))
    precision = choose_precision(config.train, task.dist.device, training=False)
    model, optimizer = task.module.train(), task.optimizer()
    waited, whole, clock = [], [], Clock()
    batches = task.batches(0, 0)
    for number in range(args.steps + WARM_UP):
        try:
            batch = next(batches)
        except StopIteration:
            batches = task.batches(number, 0)
            batch = next(batches)
        data = clock()
        with precision.autocast():
            loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        waited.append(data)
        whole.append(clock())
        clock = Watch()
    seconds = statistics.median(whole[WARM_UP:])
    return {"images_per_s": args.batch_size / seconds, "step_s": seconds,
            "waited_for_data_s": statistics.median(waited[WARM_UP:])}  # fmt: skip


def test_speed(args: argparse.Namespace) -> dict[str, float]:
    """The test loop from JPEG to boxes in pixels of the file; AP is not part of it."""
    config = make_config(args)
    task = make_task(config, one_process(args), Path(args.data))
    size, data = config.test.batch_size, config.data
    count = (args.steps + WARM_UP) * size
    names = [f"{i % args.images}.jpg" for i in range(count)]
    dataset = TestDataset(names, root=data.val_images, image_size=data.image_size, resize=data.resize)
    loader = test_loader(dataset, batch_size=size, workers=data.workers, rank=0, world_size=1, pin=False)
    precision, clock, found = choose_precision(config.train, task.dist.device, training=False), None, 0
    detector = task.detector.eval()
    for number, image in enumerate(detect(detector, loader, device=task.dist.device, precision=precision)):
        if number + 1 == WARM_UP * size:
            clock = Watch()
        elif clock is not None:
            found += len(image["boxes"])
    seconds = clock() / (args.steps * size)
    return {"images_per_s": 1 / seconds, "boxes_per_image": found / (args.steps * size)}


def mask_speed(args: argparse.Namespace) -> dict[str, float]:
    """300 masks of a 640x480 image, from the mask head's answers to run lengths."""
    generator = torch.Generator().manual_seed(0)
    side = torch.exp(torch.rand(MASKS, 2, generator=generator) * 3.2 + 2.8)
    centre = torch.rand(MASKS, 2, generator=generator) * torch.tensor([640.0, 480.0])
    boxes = torch.cat([centre - side / 2, centre + side / 2], 1).clamp(min=0)
    boxes = torch.minimum(boxes, torch.tensor([640.0, 480.0, 640.0, 480.0])).to(args.device)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 28)] * 2, indexing="ij")
    radius = 0.6 + 0.3 * torch.rand(MASKS, 1, 1, generator=generator)
    masks = (8 * (radius - (x**2 + y**2).sqrt())).sigmoid().to(args.device)
    ours, plain = encode_pasted(masks, boxes, (480, 640)), paste_and_encode(masks, boxes, (480, 640))
    same = sum(a["counts"] == b["counts"] for a, b in zip(ours, plain, strict=True))
    return paired(
        lambda: encode_pasted(masks, boxes, (480, 640)), lambda: paste_and_encode(masks, boxes, (480, 640)), args.steps
    ) | {"identical": same / MASKS}


def loader_speed(args: argparse.Namespace) -> dict[str, float]:
    """A training sample with masks at 1024, made in one process, and the bytes of its masks."""
    from ovdet.data.annotations import load
    from ovdet.vocabulary import make_vocabulary

    config = make_config(args, **{"model.masks": True, "data.image_size": 1024})
    annotations = load(config, "train", masks=True)
    ours = make_dataset(config, annotations, make_vocabulary(config, annotations))
    plain = WholeMasks(annotations, labels=ours.labels, root=ours.root, options=ours.options, masks=True)
    rows = range(min(len(ours), 8))
    times = paired(
        lambda: [ours[(0, i)] for i in rows], lambda: [plain[(0, i)] for i in rows], max(args.steps, 3)
    )  # fmt: skip
    bits = statistics.mean(sum(part.nbytes for part in ours[(0, i)]["masks"]) for i in rows)
    whole = statistics.mean(plain[(0, i)]["masks"].nbytes for i in rows)
    per_image = {name: value / len(rows) if name.endswith("_s") else value for name, value in times.items()}
    return per_image | {"ours_mb": bits / 1e6, "plain_mb": whole / 1e6}


def host_waits(args: argparse.Namespace) -> dict[str, Any]:
    """Places of a training forward where the host would wait for a GPU, as both ways are written."""
    config = make_config(args)
    task = make_task(config, Dist(0, 1, 0, torch.device("cpu"), False), Path(args.data))
    batch = task.to_device(collate_train([task.dataset[(0, i)] for i in range(args.batch_size)]))
    box_ops.suppress = box_ops._suppress_at_once  # as on a GPU
    task.detector.train().check_targets = lambda *a: None  # looks at what is on the host
    values = batch["images"], batch["sizes"], batch["targets"]
    counts = {}
    for name, function in (("ours", task.detector), ("plain", lambda *a: plain_losses(task.detector, *a))):
        function(*values)
        with HostWaits() as waits:
            function(*values)
        counts[name] = waits.count
    return counts


def step_memory(args: argparse.Namespace) -> dict[str, float]:
    """GB that autograd keeps for one step (parameters aside), with the ViT frozen and with it trained as well."""
    result = {}
    for name in ("frozen", "trained"):
        config = make_config(args)
        task = make_task(config, one_process(args), Path(args.data))
        detector = task.detector.train()
        if name == "trained":  # the same pass, within autograd
            detector.backbone.requires_grad_(True)
            detector.backbone.forward = types.MethodType(FrozenViT.forward.__wrapped__, detector.backbone)
        batch = task.to_device(collate_train([task.dataset[(0, i)] for i in range(args.batch_size)]))
        own = {t.untyped_storage().data_ptr() for t in [*detector.parameters(), *detector.buffers(), batch["images"]]}
        kept: dict[int, int] = {}

        def note(tensor: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:  # autograd holds all of them until backward: no address comes twice
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        precision = choose_precision(config.train, task.dist.device, training=False)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), precision.autocast():
            losses = task.module(batch)
        losses["loss"].backward()
        result[f"{name}_gb"] = sum(kept.values()) / 1e9
        del losses, task, detector, batch
        if name == "frozen":
            result["peak_gb"] = peak_memory(torch.device(args.device)) / 1e9
    return result


RUN = {"stages": stages, "train": train_speed, "test": test_speed, "masks": mask_speed, "loader": loader_speed,
       "waits": host_waits, "memory": step_memory}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--config", default=str(ROOT / "F-ViT" / "configs" / "ov_coco_vitb16_original.toml"))
    parser.add_argument("--image-size", type=int, default=0, help="side of the input in pixels (0: the config's)")
    parser.add_argument("--batch-size", type=int, default=8 if cuda else 2, help="images per training step")
    parser.add_argument("--steps", type=int, default=30 if cuda else 5, help="steps, and test batches, that count")
    parser.add_argument("--precision", choices=("fp32", "amp_bf16"), default="amp_bf16" if cuda else "fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--workers", type=int, default=4 if cuda else 1, help="data loading processes")
    parser.add_argument("--images", type=int, default=32, help="generated photographs")
    parser.add_argument("--data", default=str(Path(tempfile.gettempdir()) / "fvit_benchmark"), help="their folder")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--alone", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def main() -> None:
    """Measure each part in a process of its own and print the tables."""
    args = parse()
    logging.disable(logging.WARNING)
    if args.alone:
        torch.manual_seed(0)
        print(json.dumps(RUN[args.alone](args)))
        return
    config = make_config(args)
    results = {part: run_self(__file__, [*sys.argv[1:], "--alone", part]) for part in args.part}
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = f"{config.data.image_size} px, batch {args.batch_size}"
    setting = f"{Path(args.config).stem}, {size}, {args.precision}, {where}"
    for part, values in results.items():
        rows = [(name, v) for name, v in values.items() if not isinstance(v, dict)]
        rows += [(f"{name}, {k}", v) for name, own in values.items() if isinstance(own, dict) for k, v in own.items()]
        print_table(f"{part}: {setting}", ("", "value"), rows)
    print()
    print(json.dumps({
        "benchmark": "detector", "config": Path(args.config).stem, "image_size": config.data.image_size,
        "batch_size": args.batch_size, "test_batch_size": config.test.batch_size, "precision": args.precision,
        "device": where, "torch": torch.__version__, **results,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
