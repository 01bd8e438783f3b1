"""The detector (F-ViT): images per second of training and testing, and the memory of a training step with a frozen ViT.

    python benchmarks/detector.py                                     the OV-COCO B/16 config at its own size, 640
    python benchmarks/detector.py --image-size 320 --batch-size 2     smaller, for a CPU

Runs the real trainer and the real test loop, JPEGs included, on generated photographs with 65 classes, 17 of them
novel; weights are random, which changes neither time nor memory of training. Memory is measured on a training step in
a fresh process each: once as the detector is (ViT frozen, no autograd), once with a ViT that is trained as well.
Uses a GPU when there is one. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from common import ROOT, Clock, peak_memory_gb, photograph, print_table, random_boxes, run_self
from PIL import Image

sys.path.append(str(ROOT / "F-ViT"))  # at the end: the folder holds a train.py and a test.py

from ovdet.distributed import Process  # noqa: E402
from ovdet.schedule import make_optimizer  # noqa: E402

from ovdet.data.annotations import load_annotations  # noqa: E402
from ovdet.data.dataset import TestDataset, TrainDataset  # noqa: E402
from ovdet.data.loader import TrainSampler, test_loader, train_loader  # noqa: E402
from ovdet.engine import Trainer  # noqa: E402
from ovdet.fvit.assemble import load_vit, make_detector, read_config  # noqa: E402
from ovdet.fvit.backbone import FrozenViT  # noqa: E402
from ovdet.fvit.config import FViTConfig  # noqa: E402
from ovdet.fvit.detector import Detector  # noqa: E402
from ovdet.testing import autocast, detect, to_device  # noqa: E402
from ovdet.vocabulary import make_vocabulary, training_labels  # noqa: E402

CLASSES, NOVEL = 65, 17
WARM_UP = 2  # steps, or batches, that are not counted
PARTS = ("train", "test", "frozen", "trained")


def prepare(folder: Path, count: int, *, objects: int = 7) -> Path:
    """``count`` 640x480 JPEGs in ``folder``, and annotations with as many boxes as COCO has a picture.

    A folder that holds as many is used as it is. Returns the annotation file.
    """
    file = folder / f"detector_{count}.json"
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        Image.fromarray(photograph(rng)).save(folder / f"{i}.jpg", quality=90)
        images.append({"id": i + 1, "file_name": f"{i}.jpg", "width": 640, "height": 480})
        annotations += [
            {"id": len(annotations) + n + 1, "image_id": i + 1, "category_id": int(rng.integers(1, CLASSES + 1)),
             "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
            for n, box in enumerate(random_boxes(rng, objects))
        ]  # fmt: skip
    categories = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(CLASSES)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def make_config(args: argparse.Namespace) -> FViTConfig:
    """The config to measure, on the generated data, with random weights."""
    folder = Path(args.data)
    file = str(prepare(folder, max(args.images, args.batch_size)))
    novel = [f"class {i + 1}" for i in range(CLASSES - NOVEL, CLASSES)]
    values = {
        "model.pretrained": "", "model.cache_dir": "", "data.novel": novel, "data.novel_frequency": [],
        "data.train_annotations": file, "data.train_images": str(folder),
        "data.val_annotations": file, "data.val_images": str(folder),
        "data.workers": args.workers, "train.precision": args.precision, "train.batch_size": args.batch_size,
        "train.log_every": 1, "train.eval_every": 0, "train.epochs": 10**6,
    }  # fmt: skip
    config = read_config(args.config, [*(f"{k}={json.dumps(v)}" for k, v in values.items()), *args.overrides])
    if args.image_size:
        config.data.image_size = args.image_size
    return config


def add_embeddings(config: FViTConfig, folder: Path) -> None:
    """Random class embeddings: the text tower is not what is measured."""
    import open_clip

    dim = open_clip.get_model_config(config.model.name)["embed_dim"]
    config.data.embeddings = str(folder / "embeddings.npy")
    np.save(config.data.embeddings, np.random.default_rng(0).normal(size=(CLASSES + 1, dim)).astype(np.float32))


def build(config: FViTConfig, device: torch.device) -> tuple[Detector, object, object]:
    """(detector, annotations, vocabulary)."""
    annotations = load_annotations(config.data.train_annotations, key="data.train_annotations")
    vocabulary = make_vocabulary(config, annotations)
    return make_detector(config, load_vit(config), vocabulary, device=device), annotations, vocabulary


def train_speed(config: FViTConfig, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Median step of the trainer, its data loading included."""
    process = Process(0, 1, torch.device(args.device))
    Trainer(config, process, folder / "run", max_steps=args.steps + WARM_UP).run()
    text = (folder / "run" / "train.log").read_text()
    steps = [(float(a), float(b)) for a, b in re.findall(r"(\S+) images/s  data ([\d.]+) s", text)][WARM_UP:]
    seconds = statistics.median(config.train.batch_size / speed for speed, _ in steps)
    return {
        "images_per_s": config.train.batch_size / seconds,
        "step_s": seconds,
        "waited_for_data_s": statistics.median(waited for _, waited in steps),
    }


def test_speed(config: FViTConfig, args: argparse.Namespace) -> dict[str, float]:
    """The test loop from JPEG to boxes in pixels of the file; AP is not part of it."""
    device = torch.device(args.device)
    detector, annotations, _ = build(config, device)
    size = config.test.batch_size
    count = (args.steps + WARM_UP) * size
    names = (annotations.file_names * (count // len(annotations.file_names) + 1))[:count]
    dataset = TestDataset(names, root=config.data.val_images, image_size=config.data.image_size)
    loader = test_loader(dataset, batch_size=size, workers=config.data.workers, rank=0, world_size=1, pin=False)
    process, clock, found = Process(0, 1, device), None, 0
    with torch.inference_mode():
        detector.eval()
        for number, image in enumerate(detect(detector, iter(loader), process=process, precision=args.precision)):
            if number + 1 == WARM_UP * size:
                clock = Clock()
            elif clock is not None:
                found += len(image["boxes"])
        seconds = clock() / (args.steps * size)
    return {"images_per_s": 1 / seconds, "boxes_per_image": found / (args.steps * size)}


def step_memory(config: FViTConfig, args: argparse.Namespace, *, frozen: bool) -> dict[str, float]:
    """Bytes that autograd keeps for one step (parameters aside), and the peak of two whole steps, in GB."""
    device = torch.device(args.device)
    detector, annotations, vocabulary = build(config, device)
    detector.train()
    if not frozen:  # the same pass, within autograd
        detector.backbone.requires_grad_(True)
        detector.backbone.forward = types.MethodType(FrozenViT.forward.__wrapped__, detector.backbone)
    optimizer = make_optimizer(detector.named_parameters(), config.train)
    data = config.data
    dataset = TrainDataset(
        annotations, labels=training_labels(annotations, vocabulary), root=data.train_images,
        image_size=data.image_size, jitter=(1.0, 1.0), flip=data.flip, min_box_side=data.min_box_side,
        keep_empty=True, seed=0, masks=config.model.masks,
    )  # fmt: skip
    sampler = TrainSampler(size=len(dataset), batch_size=config.train.batch_size, rank=0, world_size=1, seed=0)
    batch = next(iter(train_loader(dataset, sampler, workers=0, pin=False)))
    images = to_device(batch, detector, device)
    targets = [{k: v.to(device) for k, v in t.items()} for t in batch["targets"]]
    own = {t.untyped_storage().data_ptr() for t in [*detector.parameters(), *detector.buffers(), images]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:  # autograd holds all of them until backward: no address comes twice
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for _ in range(2):  # the second one with the optimizer's states
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast(args.precision, device):
            losses = detector(images, batch["sizes"], targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del losses
    on_gpu = device.type == "cuda"
    return {
        "saved_gb": sum(kept.values()) / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else peak_memory_gb(),
    }


def run_part(args: argparse.Namespace) -> dict[str, float]:
    """One measurement in this process."""
    torch.manual_seed(0)
    config = make_config(args)
    with tempfile.TemporaryDirectory() as folder:
        add_embeddings(config, Path(folder))
        if args.part == "train":
            return train_speed(config, args, Path(folder))
        if args.part == "test":
            return test_speed(config, args)
        return step_memory(config, args, frozen=args.part == "frozen")


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
    parser.add_argument("--part", choices=PARTS, help="one measurement only, as a line of JSON")
    return parser.parse_intermixed_args(argv)


def main() -> None:
    """Measure each part in a process of its own and print the tables."""
    args = parse()
    logging.disable(logging.INFO if args.part != "train" else logging.NOTSET)
    if args.part:
        print(json.dumps(run_part(args)))
        return
    config = make_config(args)
    results = {part: run_self(__file__, [*sys.argv[1:], "--part", part]) for part in PARTS}
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    setting = (
        f"{Path(args.config).stem}, {config.data.image_size} px, batch {args.batch_size} (testing "
        f"{config.test.batch_size}), {args.precision}, {where}"
    )
    train, test = results["train"], results["test"]
    print_table(
        f"Speed: {setting}",
        ("", "images/s", "note"),
        [
            ("training", train["images_per_s"], f"{train['waited_for_data_s']:.3f} s of a step wait for data"),
            ("testing", test["images_per_s"], f"{test['boxes_per_image']:.0f} boxes an image"),
        ],
    )
    peak = "peak of the GPU, GB" if args.device == "cuda" else "peak of the process, GB"
    print_table(
        "Memory of training",
        ("ViT", "kept for backward, GB", peak),
        [(name, results[part]["saved_gb"], results[part]["peak_gb"])
         for name, part in (("frozen (as it is)", "frozen"), ("trained, for comparison", "trained"))],
    )  # fmt: skip
    print()
    print(json.dumps({
        "benchmark": "detector", "config": Path(args.config).stem, "image_size": config.data.image_size,
        "batch_size": args.batch_size, "test_batch_size": config.test.batch_size, "precision": args.precision,
        "device": where, "torch": torch.__version__, **results,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
