"""What crops on the device cost there, counted on the meta device: kernels, and bytes of copies."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
from counting import counting  # noqa: E402

from training.data.resample import device_crops, device_image


def test_crops_of_an_image_take_few_kernels_and_no_copy_of_it():
    image = torch.empty(3, 1536, 2048, dtype=torch.uint8, device="meta")
    boxes = torch.tensor([[float(10 * i), 5.0, 10 * i + 300.0, 400.0] for i in range(20)])
    with counting() as count:
        crops = device_crops(image, boxes, 224)
    assert crops.shape == (20, 3, 224, 224) and len(count.kernels) <= 40
    # Weights and lines are the largest there is, read and written: a copy of the image for each crop is far more.
    copies = 20 * 4 * image.numel()
    assert max(moved for flop, moved, _ in count.kernels if not flop) <= 4 * 4 * 2 * 20 * 224 * 2048 < copies
    assert sum(flop > 0 for flop, _, _ in count.kernels) == 2
    with counting() as count:
        device_image(image, 1024)
    assert len(count.kernels) <= 40
