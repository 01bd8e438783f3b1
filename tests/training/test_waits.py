"""Where a GPU would keep the program waiting, counted on the CPU: nowhere in a step, once a batch in an evaluation.

Values of boxes, which are looked at where they lie on the CPU, are not at hand here, as on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import open_clip
from training.data.prepare import DevicePrefetcher
from training.engine.step import Stepper
from training.evaluation.evaluate import evaluate
from training.evaluation.options import EvalOptions
from training.evaluation.panoptic import build_eval_data
from training.methods import Method

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from host_waits import HostWaits  # noqa: E402


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in ("open_clip.checks", "open_clip.regions"):
        monkeypatch.setattr(f"{module}.values_are_at_hand", lambda tensor: False)


@pytest.mark.parametrize("extra", [[], ["--drop-padding"], ["--crop-on", "device"], ["--multiscale"]])
def test_a_training_step_waits_for_nothing(program, as_on_a_gpu, monkeypatch, extra):
    places, steps = Counter(), []
    original = Stepper.__call__

    def counted(self, *args, **kwargs):
        with HostWaits() as waits:
            outcome = original(self, *args, **kwargs)
        steps.append(self.deferred)
        places.update(waits.places)
        return outcome

    monkeypatch.setattr(Stepper, "__call__", counted)
    assert program(*extra, name="waits", max_steps=4) == 0
    assert steps == [True] * 4 and not places
    # As one of two processes: what all count comes back to the device.
    begin, scales = Method.begin_step, []

    def as_one_of_two(self, *args, **kwargs):
        self.world_size = 2
        begin(self, *args, **kwargs)
        scales.append(self.scale["regions"])

    monkeypatch.setattr(Method, "begin_step", as_one_of_two)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    assert program(*extra, name="two", max_steps=4) == 0
    assert len(scales) == 4 and all(isinstance(s, torch.Tensor) for s in scales) and not places


def test_an_evaluation_waits_once_a_batch(scenes, tiny_config, as_on_a_gpu):
    torch.manual_seed(0)
    open_clip.add_model_config(tiny_config)
    model = open_clip.create_model(tiny_config.stem).eval()
    options = EvalOptions(
        val_data=str(scenes / "annotations" / "panoptic_val2017.json"), val_image_root=str(scenes / "val2017")
    )
    data = build_eval_data(options, image_sizes=[64, 32], patch_size=8, crop_size=32, batch_size=2)
    batches = list(data.loader)
    embeddings = torch.randn(len(data.class_names), model.embed_dim)
    counts = []
    for times in (1, 2):
        with HostWaits() as waits:
            evaluate(model, replace(data, loader=batches * times), embeddings, device="cpu", progress=False)
        counts.append(waits.count)
    assert counts[1] - counts[0] <= len(batches), waits.places


def test_a_batch_is_asked_for_when_the_step_before_is_queued():
    """With streams and events that only take notes."""
    events = []

    def loader():
        for i in range(3):
            events.append(f"load {i}")
            yield i

    def prepare(i):
        events.append(f"prepare {i}")
        return {"number": i}

    with mock.patch("torch.cuda.Stream"), mock.patch("torch.cuda.stream"), mock.patch("torch.cuda.current_stream"):
        for batch in DevicePrefetcher(loader(), prepare, torch.device("cuda")):
            events.append(f"step {batch['number']}")
    assert events == [f"{what} {i}" for i in range(3) for what in ("load", "prepare", "step")]


def test_all_epochs_share_a_stream(program, monkeypatch):
    """PyTorch gives memory of one side stream to no other: with one an epoch, each epoch would reserve its own."""
    with (
        mock.patch("torch.cuda.Stream") as streams, mock.patch("torch.cuda.stream"),
        mock.patch("torch.cuda.current_stream"),
    ):  # fmt: skip
        prefetcher = DevicePrefetcher([1, 2], lambda i: {"number": i}, torch.device("cuda"))
        assert [[batch["number"] for batch in prefetcher] for _ in range(3)] == [[1, 2]] * 3
        assert streams.call_count == 1
    made, original = [], DevicePrefetcher.__init__
    monkeypatch.setattr(DevicePrefetcher, "__init__", lambda self, *a: made.append(self) or original(self, *a))
    assert program(name="run", epochs=3) == 0
    assert len(made) == 1
