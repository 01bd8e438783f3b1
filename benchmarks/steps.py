"""One training step of CLIPSelf, twice: by this package, and by the conventional path. And what it costs in FLOP."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
import conventional  # noqa: E402
from common import photograph  # noqa: E402

import open_clip  # noqa: E402
from open_clip.image_tower import ImageTower  # noqa: E402
from open_clip.transform import crop_region, resize_longest  # noqa: E402
from training.data import View, prepare_batch  # noqa: E402
from training.data.collate import Collate  # noqa: E402
from training.engine.distributed import Dist  # noqa: E402
from training.engine.precision import make_precision  # noqa: E402
from training.methods import Setting  # noqa: E402
from training.models import build_optimizer, load_model, prepare_student, prepare_teachers  # noqa: E402
from training.params import parse_args  # noqa: E402


def regions(images: int, crops: int, seed: int = 0) -> list[tuple[Image.Image, Tensor]]:
    """Pictures of 640x480, each with ``crops`` boxes ``[crops, 4]`` (xyxy in pixels)."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(images):
        sides = rng.uniform(40, 320, (crops, 2))
        corners = rng.uniform(0, 1, (crops, 2)) * ((640, 480) - sides)
        boxes = np.concatenate([corners, corners + sides], 1).astype(np.float32)
        out.append((Image.fromarray(photograph(rng)), torch.from_numpy(boxes)))
    return out


class OurStep:
    """The step of ``training.main``, from a collated batch on.

    Args:
        flags: further flags of the program.
        pictures: see :func:`regions`.
        classes: of methods that want some; their embeddings are random.
    """

    def __init__(
        self, flags: list[str], *, size: int, device: torch.device, pictures: list, classes: int = 2
    ) -> None:
        blocks = "1000"  # every group that there is
        locked = ["--lock-image", "--lock-image-unlocked-groups", blocks, "--det-image-size", str(size)]
        options = parse_args([*locked, *flags], check=False)
        dist = Dist(0, 1, 0, device, False)
        self.precision = make_precision(options.machine.precision, device)
        model = load_model(options)
        self.size, self.crop_size, self.device = size, model.visual.image_size, device
        teachers = prepare_teachers(options, model, dist, self.precision)
        student = prepare_student(options, model, dist, self.precision)
        setting = Setting(
            student, teachers, options.model.readout or options.entry.readout,
            class_names=[f"class {i}" for i in range(classes)],
            embed=lambda names, teacher=None, plain=False: torch.randn(
                classes, (teachers[teacher].model if teacher else student).embed_dim, device=device
            ),
        )  # fmt: skip
        self.method = options.entry.build(options.own, setting)
        self.optimizer = build_optimizer(options.optim, options.model.model, student)
        self.method.train()
        self.visual = student.visual
        pixels = (self.visual.image_mean, self.visual.image_std, self.precision.input_dtype)
        self.views = {"images": View("images", size, *pixels)} | {n: t.view for n, t in teachers.items()}
        if "crops" in options.entry.fields(options.own):  # of the student itself, where no teacher looks at them
            self.views.setdefault("crops", View("crops", self.crop_size, *pixels))
        self.batch = self.collated(pictures)

    def collated(self, pictures: list) -> dict:
        """A batch of pictures (see :func:`regions`), on the CPU."""
        samples = []
        for index, (picture, boxes) in enumerate(pictures):
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            crops = [crop_region(image, box, self.crop_size) for box in boxes.tolist()]
            sample = {"image": resize_longest(image, self.size), "boxes": boxes / 640, "image_id": index}
            samples.append({**sample, "index": index, **({"crops": crops} if crops else {})})
        collate = Collate(image_size=self.size, crop_size=self.crop_size)
        batch = collate(samples)
        if self.device.type == "cuda":
            batch = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
        return batch

    def prepare(self, batch: dict) -> dict:
        """A collated batch on the device."""
        return prepare_batch(batch, self.views, self.device)

    def __call__(self, prepared: dict | None = None) -> Tensor:
        """One step on the fixed batch, or on a prepared one. Returns the loss, detached."""
        batch = self.prepare(self.batch) if prepared is None else prepared
        self.method.begin_step([batch], seed=0)
        with self.precision.autocast():
            loss = self.method(batch)["loss"]
        scaler = self.precision.scaler
        if scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.end_step()
        return loss.detach()


class ConventionalStep:
    """The same step as a plain script has it: float32 from the CPU, padded crops, eager attention, whole models on the
    device, a teacher under ``no_grad`` in the student's precision, AdamW as it comes."""

    def __init__(self, flags: list[str], *, size: int, device: torch.device, pictures: list) -> None:
        options = parse_args(flags, check=False)
        self.device, self.precision = device, make_precision(options.machine.precision, device)
        torch.manual_seed(options.run.seed)
        model = options.model
        self.student = open_clip.create_model(model.model, pretrained=model.pretrained or None).to(device)
        self.student.lock_image_tower(1000)
        self.student.text.requires_grad_(False)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        for model in (self.student, self.teacher):
            conventional.use_eager_attention(model)
        trained = [p for p in self.student.visual.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=options.optim.lr, weight_decay=options.optim.wd)
        crop_size = self.student.visual.image_size
        self.images = torch.stack([conventional.resize_and_pad(p, size, centre=False) for p, _ in pictures])
        self.boxes = torch.stack([boxes / 640 for _, boxes in pictures])
        self.crops = torch.stack(
            [torch.stack([conventional.crop(p, box, crop_size) for box in boxes.tolist()]) for p, boxes in pictures]
        )

    def __call__(self) -> Tensor:
        """One step on the fixed batch. Returns the loss, detached."""
        images, boxes, crops = (t.to(self.device) for t in (self.images, self.boxes, self.crops))
        with self.precision.autocast():
            with torch.no_grad():
                target = self.teacher.encode_image(crops.flatten(0, 1), normalize=True)
            student = self.student.encode_pseudo_boxes(images, list(boxes), normalize=True)
        loss = 1 - F.cosine_similarity(student.float(), target.float()).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


# -- cost -------------------------------------------------------------------------------------------------------------


def forward_flop(tower: ImageTower, side: int, *, dense: bool) -> float:
    """FLOP of one image's forward pass, 2 per multiplication and addition; norms and activations are not counted.

    Every matrix of a block is applied to every token; attention takes 4 N^2 W in a block. The dense reading leaves
    attention, query and key of the last block out.
    """
    trunk, width = tower.trunk, tower.width
    tokens = (side // tower.patch_size) ** 2 + tower.num_prefix_tokens
    total = 2.0 * trunk.patch_embed.proj.weight.numel() * (side // tower.patch_size) ** 2
    for index, block in enumerate(trunk.blocks):
        matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
        if dense and index + 1 == len(trunk.blocks) and not tower.pools_by_attention:
            total += 2.0 * tokens * (matrices - 2 * width * width)
        else:
            total += 2.0 * tokens * matrices + 4.0 * tokens**2 * width
    if isinstance(trunk.head, nn.Linear):
        total += 2.0 * trunk.head.weight.numel() * (tokens if dense else 1)
    return total


def step_flop(tower: ImageTower, side: int, crops: int) -> float:
    """FLOP of one image's training step: three student passes (backward costs two forwards), one teacher per crop."""
    return 3 * forward_flop(tower, side, dense=True) + crops * forward_flop(tower, tower.image_size, dense=False)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: what the device does at best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
