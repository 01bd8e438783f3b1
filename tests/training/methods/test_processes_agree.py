"""Two processes, with whole models or with divided ones, against one with both batches: equal weights, however unevenly
items are spread.

Run as a script (``test_processes_agree.py RANK FOLDER``) this file is one of the two processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import open_clip
from open_clip.factory import build_model
from training.engine.distributed import Dist, wrap
from training.engine.sharding import Sharded, total_norm, whole_state
from training.methods import Method, Setting, list_methods, make_method
from training.models import build_optimizer, separable_blocks, undecayed_names
from training.options import OptimOptions
from training.teachers.build import build_teacher
from training.teachers.describe import TeacherSpec

STEPS, SIZE, CROP, WORDS, CLASSES, DIM = 3, 64, 32, 8, 150, 24
TEXT = {"context_length": WORDS, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
SIZES = {"image_size": CROP, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8}
EVA = {"eva_model_name": "tiny", "rope": True, "naiveswiglu": True, "subln": True, "mlp_ratio": 2.6667}
SPECS = (
    TeacherSpec("crops", source="crops", emits="embedding"), TeacherSpec("cells", source="crops"),
    TeacherSpec("start", readout="csa"),
)  # fmt: skip


@dataclass
class Case:
    """A setting.

    Attributes:
        method: its name.
        counts: regions of each image (pairs of each batch) by [process][micro-batch][image], the same in every step; of
            a micro-batch without images nothing usable was left.
        flags: of the method.
        lock: groups that train; None for all.
    """

    method: str
    counts: list
    flags: dict = field(default_factory=dict)
    lock: int | None = None
    clip: float | None = None
    vit: bool = False
    bias: bool = False

    @property
    def accumulate(self) -> int:
        return len(self.counts[0])

    @property
    def paired(self) -> bool:
        return self.method in ("contrastive", "clim")


SPREAD = [[[5, 1], [0, 0]], [[2, 0], [1, 4]]]  # one micro-batch has no region
LOST = [[[], [5, 1]], [[2, 0], [1, 4]]]  # one has no image
CASES = {
    "clipself": Case("clipself", [[[5, 1]], [[2, 0]]]),
    "clipself accumulated": Case("clipself", [[[5, 1], [3, 2]], [[0, 0], [1, 4]]]),
    "clipself v1, a process without regions": Case(
        "clipself", [[[4, 1]], [[0, 0]]], {"extract_type": "v1"}, vit=True
    ),
    "clipself locked, clipped, multiscale": Case(
        "clipself", [[[2, 2]], [[1, 0]]], {"multiscale": True}, lock=2, clip=0.05
    ),
    "clipself in windows": Case("clipself", SPREAD, {"readout": "window:4"}),
    "regionclip accumulated": Case("regionclip", [[[2, 1], [0, 0]], [[6, 0], [1, 3]]], {"contrast_weight": 0.5}),
    "contrastive": Case("contrastive", [[4], [1]], vit=True, bias=True),
    "contrastive accumulated, a batch without pairs": Case("contrastive", [[3, 2], [0, 4]]),
    "declip": Case("declip", SPREAD, {"readout": "qq", "context_weight": 0.1}),
    "declip, context alone": Case("declip", SPREAD, {"readout": "qq", "context_weight": 0.1, "cosine_weight": 0.0}),
    "declip csa": Case("declip", SPREAD, {"readout": "csa", "context_weight": 0.1}, lock=3, vit=True),
    "synclip": Case("synclip", SPREAD, {"readout": "csa", "context_weight": 0.1}),
    "synclip without annotations": Case(
        "synclip", SPREAD, {"readout": "csa", "classes_from": "teacher", "names": "names.json"}
    ),
    "densevlm": Case("densevlm", SPREAD, {"names": "names.json", "threshold": 0.01, "logit_temperature": 0.2}),
    "sc": Case("sc", SPREAD),
    "denserc": Case("denserc", SPREAD),
    "fineclip": Case("fineclip", SPREAD),
    "fineclip, distance alone": Case("fineclip", SPREAD, {"caption_weight": 0.0, "region_caption_weight": 0.0}),
    "fineclip, regions alone": Case("fineclip", SPREAD, {"cosine_weight": 0.0, "caption_weight": 0.0}),
    "mixrc": Case("mixrc", SPREAD, {"names": "names.json", "alignment_weight": 0.5, "semantic_weight": 0.2,
                                    "threshold": 0.01, "logit_temperature": 0.2}),
    "clipself, nothing left of a batch": Case("clipself", LOST),
    "clipself v1, nothing left of a batch": Case("clipself", LOST, {"extract_type": "v1"}, vit=True),
    "synclip, nothing left of a batch": Case("synclip", LOST, {"readout": "csa", "context_weight": 0.1}),
    "sc, nothing left of a batch": Case("sc", LOST),
    "fineclip, nothing left of a batch": Case("fineclip", LOST),
    "mixrc, nothing left of a batch": Case("mixrc", LOST, {"names": "names.json", "alignment_weight": 0.5,
                                                           "semantic_weight": 0.2, "threshold": 0.01,
                                                           "logit_temperature": 0.2}),
    "clim": Case("clim", [[4], [3]], {"mosaics": (2,), "mosaic_size": SIZE}),
    "nothing at all": Case("clipself", [[[0, 0]], [[0, 0]]]),
}


def make_batch(case: Case, step: int, process: int, micro: int) -> dict:
    """The same for whoever asks. The size of images and crops is that of the model, nothing else matters."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * process + micro)
    counts = case.counts[process][micro]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def words(number: int) -> torch.Tensor:
        return torch.randint(1, 50, (number, WORDS), generator=generator)

    if case.paired:
        return {"images": random(counts, 3, CROP, CROP), "texts": words(counts)}
    total, images, usable = sum(counts), max(len(counts), 1), bool(counts)
    corner, side = (torch.rand(total, 2, generator=generator) * 0.5 for _ in range(2))
    some = torch.arange(0, total, 2)  # every other region has a caption
    side_cells = SIZE // SIZES["patch_size"]
    pixels = random(images, 3, SIZE, SIZE) * usable  # black where nothing is left
    return {
        "images": pixels, "start": pixels, "samples": len(counts),
        "boxes": list(torch.cat([corner, corner + side + 0.1], dim=1).clamp(max=1).split(counts or [0])),
        "crops": (crops := random(total, 3, CROP, CROP)), "cells": crops,
        "labels": torch.randint(0, CLASSES, (total,), generator=generator),
        "classes": torch.randint(0, CLASSES, (3,), generator=generator)[: 3 * usable],
        "classes_of": torch.tensor([0, 0, images - 1])[: 3 * usable],
        "captions": words(1)[:usable], "captions_of": torch.tensor([process % images])[:usable],
        "region_captions": words(len(some)), "region_captions_of": some,
        "answers": {"vfm": random(images, side_cells**2, 10), "dense": random(images, 25, DIM + 8)},
    }  # fmt: skip


def join(batches: list[dict]) -> dict:
    """One batch of several, without those of which nothing is left."""
    joined: dict = {}
    images = regions = 0
    for batch in batches:
        if batch.get("samples") == 0:
            continue
        for name, value in batch.items():
            if name.endswith("_of"):
                value = value + (regions if name.startswith("region") else images)
            joined.setdefault(name, []).append(value)
        images += len(batch["images"])
        regions += sum(map(len, batch.get("boxes", [])))
    for name, parts in joined.items():
        if name == "answers":
            joined[name] = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        elif name == "boxes":
            joined[name] = sum(parts, [])
        else:
            joined[name] = sum(parts) if name == "samples" else torch.cat(parts)
    return joined


def class_embeddings(names, *, teacher: str | None = None, plain: bool = False) -> torch.Tensor:
    """The same for whoever asks: one row for each of the classes."""
    width, seed = (DIM + 8, 1) if teacher else (DIM, 2 + plain)
    return F.normalize(torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def prepare(case: Case, process: int | None, folder: Path):
    """(method, world size) for one of the processes, or for all of them."""
    world = 1 if process is None else len(case.counts)
    torch.manual_seed(0)
    config = {"embed_dim": DIM, "vision_cfg": {**SIZES, **({} if case.vit else EVA)}, "text_cfg": TEXT}
    if case.bias:
        config["init_logit_bias"] = -10.0
    student, teacher = (build_model(config) for _ in range(2))
    if case.lock is not None:
        student.lock_image_tower(case.lock)
    flags = dict(case.flags)
    if "names" in flags:
        flags["names"] = str(folder / flags["names"])
    setting = Setting(
        student, {s.name: build_teacher(s, teacher, image_size=SIZE) for s in SPECS}, flags.pop("readout", None),
        class_names=[str(i) for i in range(CLASSES)], embed=class_embeddings, rank=process or 0, world_size=world,
    )  # fmt: skip
    return make_method(case.method, setting, **flags), world


def divide(method: Method, where: Dist) -> Sharded:
    """The method under full sharding, as :class:`training.trainer.Distillation` has it."""
    asked = [(method.student, None), *((t.model, t.spec.readout) for t in method.teachers.values())]
    blocks = [block for model, readout in asked for block in separable_blocks(model, readout)]
    for teacher in method.teachers.values():
        teacher.chunk = 3  # crops at a time: processes differ in how many times that is
    return Sharded(SimpleNamespace(module=method, blocks=lambda: blocks, whole_parts=list), where)


def train(
    case: Case, process: int | None, folder: Path, *, divided: bool = False
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """(state dict after a few steps, loss of each step); ``process`` None has the batches of all processes."""
    method, world = prepare(case, process, folder)
    student, undecayed = method.student, undecayed_names(method.student)
    where = Dist(process or 0, world, 0, torch.device("cpu"), world > 1)
    model = (divide if divided else wrap)(method, where).train()
    # AdamW's own eps would blow rounding noise in near-zero gradients up to a full step.
    optimizer = build_optimizer(OptimOptions(lr=1e-3, eps=1e-3), "tiny", student, undecayed)
    losses = []
    for step in range(STEPS):
        micro = [
            join([make_batch(case, step, p, m) for p in range(len(case.counts))])
            if process is None
            else make_batch(case, step, process, m)
            for m in range(case.accumulate)
        ]
        begin = partial(method.begin_step, micro, seed=step)
        if divided:
            model.ahead(begin)
        else:
            begin()
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
        if divided:
            model.average_whole()
        trainable = [p for p in student.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trainable) == method.reaches_all
        if case.clip is not None:
            norm = total_norm([p.grad for p in trainable])
            torch.nn.utils.clip_grads_with_norm_(trainable, case.clip, norm)
            assert norm > case.clip
        optimizer.step()
        optimizer.zero_grad()
        method.end_step()
    return whole_state(student.state_dict()), losses


def worker(rank: int, folder: Path, kind: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / kind}", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))  # fmt: skip
    found = {name: train(case, rank, folder, divided=kind == "divided") for name, case in CASES.items()}
    torch.save(found, folder / f"{kind}{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    names = [{"name": str(i), "isthing": int(i < CLASSES // 2)} for i in range(CLASSES)]
    (folder / "names.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module", params=["whole", "divided"])
def of_processes(request, folder) -> list[dict]:
    """What each of the two processes ended with, by case."""
    if request.param == "divided" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch divides no model on CPUs")
    environment = {**os.environ, "PYTHONPATH": str(Path(open_clip.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder), request.param], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
    return [torch.load(folder / f"{request.param}{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(of_processes, folder, name):
    (first, losses), (second, _) = (results[name] for results in of_processes)
    expected, expected_losses = train(CASES[name], None, folder)
    assert losses == pytest.approx(expected_losses, abs=1e-5, rel=1e-5)
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=0, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_something_was_learnt(of_processes):
    """The comparison above would hold for weights that never change."""
    first = of_processes[0]
    for name, (state, losses) in first.items():
        start = first["nothing at all"][0] if not CASES[name].vit else None
        if name == "nothing at all":
            assert losses == [0.0] * STEPS
        elif start is not None:
            assert max((v - start[k]).abs().max() for k, v in state.items() if k in start) > 1e-4
        assert len(set(losses)) == (1 if name == "nothing at all" else STEPS)


def test_every_method_is_among_the_cases():
    assert {case.method for case in CASES.values()} == set(list_methods())


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
