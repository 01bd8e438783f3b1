"""Two data-parallel processes against one with both batches: equal weights, however unevenly regions are spread.

Run as a script (``test_ddp_equivalence.py RANK FOLDER``) this file is one of the two processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import open_clip
from open_clip.factory import build_model
from training.engine.distributed import Dist, wrap
from training.methods import build_method
from training.models import build_optimizer

STEPS, SIZE, CROP, WORDS, CLASSES = 3, 64, 32, 8, 150
TEXT = {"context_length": WORDS, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
SIZES = {"image_size": CROP, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8}
EVA = {"eva_model_name": "tiny", "rope": True, "naiveswiglu": True, "subln": True, "mlp_ratio": 2.6667}


@dataclass
class Case:
    """A setting.

    Attributes:
        counts: regions of each image (pairs of each batch) by [process][micro-batch][image], the same in every step.
        args: what differs from the defaults.
    """

    counts: list
    args: dict
    vit: bool = False
    bias: bool = False

    @property
    def accumulate(self) -> int:
        return len(self.counts[0])


DISTIL, NOUNS, PAIRS = ({"dataset_type": t} for t in ("grid_distill", "region_clip", "contrastive"))
CASES = {
    "clipself": Case([[[5, 1]], [[2, 0]]], DISTIL),
    "clipself accumulated": Case([[[5, 1], [3, 2]], [[0, 0], [1, 4]]], DISTIL),
    "clipself v1, a process without regions": Case([[[4, 1]], [[0, 0]]], {**DISTIL, "extract_type": "v1"}, vit=True),
    "clipself locked, clipped, multiscale": Case(
        [[[2, 2]], [[1, 0]]], {**DISTIL, "lock_image": True, "multiscale": True, "clip": 0.05}
    ),
    "regionclip accumulated": Case([[[2, 1], [0, 0]], [[6, 0], [1, 3]]], NOUNS),
    "contrastive": Case([[4], [1]], PAIRS, vit=True, bias=True),
    "contrastive accumulated, a batch without pairs": Case([[3, 2], [0, 4]], PAIRS),
    "nothing at all": Case([[[0, 0]], [[0, 0]]], DISTIL),
}


def make_batch(case: Case, step: int, process: int, micro: int) -> dict:
    """The same for whoever asks. The size of images and crops is that of the model, nothing else matters."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * process + micro)
    counts = case.counts[process][micro]
    if case.args["dataset_type"] == "contrastive":
        return {
            "images": torch.randn(counts, 3, CROP, CROP, generator=generator),
            "texts": torch.randint(1, 50, (counts, WORDS), generator=generator),
        }
    total = sum(counts)
    corner, side = (torch.rand(total, 2, generator=generator) * 0.5 for _ in range(2))
    return {
        "images": torch.randn(len(counts), 3, SIZE, SIZE, generator=generator),
        "boxes": list(torch.cat([corner, corner + side + 0.1], dim=1).clamp(max=1).split(counts)),
        "crops": torch.randn(total, 3, CROP, CROP, generator=generator),
        "labels": torch.randint(0, CLASSES, (total,), generator=generator),
    }


def join(batches: list[dict]) -> dict:
    """One batch of several."""
    return {
        k: sum((b[k] for b in batches), []) if k == "boxes" else torch.cat([b[k] for b in batches]) for k in batches[0]
    }


def train(case: Case, process: int | None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """(state dict after a few steps, loss of each step); ``process`` None has the batches of all processes."""
    world = 1 if process is None else len(case.counts)
    torch.manual_seed(0)
    config = {"embed_dim": 24, "vision_cfg": {**SIZES, **({} if case.vit else EVA)}, "text_cfg": TEXT}
    if case.bias:
        config["init_logit_bias"] = -10.0
    student, teacher = (build_model(config) for _ in range(2))
    nouns = torch.randn(CLASSES, 24)
    defaults = dict(
        lock_image=False, lock_image_unlocked_groups=2, cosine_weight=1.0, contrast_weight=0.5, extract_type="v2",
        multiscale=False, clip=None, model="tiny", lr=1e-3, wd=0.1, beta1=None, beta2=None,
        eps=1e-3,  # AdamW's default would blow rounding noise in near-zero gradients up to a full step
    )  # fmt: skip
    args = argparse.Namespace(**{**defaults, **case.args})
    method = build_method(
        args, student=student, teacher=teacher, noun_embeddings=nouns, rank=process or 0, world_size=world
    )
    optimizer = build_optimizer(args, method.student)
    model = wrap(method, Dist(process or 0, world, 0, torch.device("cpu"), world > 1)).train()
    losses = []
    for step in range(STEPS):
        micro = [
            join([make_batch(case, step, p, m) for p in range(len(case.counts))])
            if process is None
            else make_batch(case, step, process, m)
            for m in range(case.accumulate)
        ]
        method.begin_step(micro, seed=step)
        loss = torch.zeros(())
        for m, batch in enumerate(micro):
            inner = world > 1 and m + 1 < len(micro)
            with model.no_sync() if inner else contextlib.nullcontext():
                part = model(batch)["loss"]
                part.backward()
            loss += part.detach()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world)
        trainable = [p for p in student.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trainable)
        if args.clip is not None:
            assert torch.nn.utils.clip_grad_norm_(trainable, args.clip) > args.clip
        optimizer.step()
        optimizer.zero_grad()
        method.end_step()
    return student.state_dict(), losses


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save({name: train(case, rank) for name, case in CASES.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory) -> list[dict]:
    """What each of the two processes ended with, by case."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(Path(open_clip.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in running:
            output = process.communicate(timeout=240)[0]  # a process that waits for the other one for ever ends here
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(of_processes, name):
    (first, losses), (second, _) = (results[name] for results in of_processes)
    torch.manual_seed(0)
    expected, expected_losses = train(CASES[name], None)
    assert losses == pytest.approx(expected_losses, abs=1e-5, rel=1e-5)
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_something_was_learnt(of_processes):
    """The comparison above would hold for weights that never change."""
    first = of_processes[0]
    for name, (state, losses) in first.items():
        start = first["nothing at all"][0] if not CASES[name].vit else None
        if name == "nothing at all":
            assert losses == [0.0] * STEPS
        elif start is not None:
            assert max((v - start[k]).abs().max() for k, v in state.items()) > 1e-4
        assert len(set(losses)) == (1 if name == "nothing at all" else STEPS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(int(sys.argv[1]), Path(sys.argv[2]))
