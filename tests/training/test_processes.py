"""Two processes against one: equal weights, equal evaluation, and nobody left waiting."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import open_clip
from training.engine.checkpoint import read_checkpoint
from training.engine.loop import Loop
from training.main import main

ROOT = Path(__file__).parents[2]


def torchrun(program, *extra, processes: int = 2, **flags) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "--", "training.main", *program.arguments(*extra, **flags)]
    environment = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HOME": str(program.logs.parent),
                   "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def train_together(rank: int, port: int, arguments: list[str], compare: bool = False) -> None:
    """One of two processes of a run, as torchrun would start them; ``compare``: their weights after each epoch."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    if compare:
        original = Loop._after_epoch

        def check(self: Loop) -> None:
            flat = torch.cat([p.detach().flatten() for p in self.task.student.parameters()])
            others = [torch.empty_like(flat) for _ in range(2)]
            dist.all_gather(others, flat)
            assert torch.equal(others[0], others[1])
            compared.append(1)
            original(self)

        compared, Loop._after_epoch = [], check
    assert main(arguments) == 0
    assert not compare or compared


@pytest.fixture
def two(program, in_processes):
    """Runs the program in two processes."""

    def run(*extra: str, compare: bool = False, **flags) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        in_processes(train_together, 2, port, program.arguments(*extra, **flags), compare)

    return run


@pytest.mark.parametrize("method", ["grid_distill", "region_clip", "contrastive"])
def test_two_processes_equal_one_with_the_doubled_batch(program, two, method):
    """Region counts differ between images, so this fails when losses are averaged per process or not exchanged."""
    accumulate = 1 if method == "contrastive" else 2
    # A large eps: AdamW would blow rounding noise in near-zero gradients up to a full step.
    common = {"train": method, "max_steps": 3, "warmup": 1, "val": True, "eval_image_sizes": 64, "eps": 1e-3,
              "accum_freq": accumulate}  # fmt: skip
    two(name="two", batch_size=2, **common)
    assert program(name="one", batch_size=4, **common) == 0
    a, b = (read_checkpoint(program.logs / n / "checkpoints" / "epoch_1.pt") for n in ("one", "two"))
    assert a["step"] == b["step"] == 3
    torch.manual_seed(0)
    start = open_clip.create_model("tiny-eva").state_dict()
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], value, rtol=0, atol=1e-6)
    assert max(float((v - start[n]).abs().max()) for n, v in a["state_dict"].items()) > 1e-4
    one, both = (results(program, n) for n in ("one", "two"))
    # The start model: every segment counted once.
    assert one[0].keys() == both[0].keys()
    for key, value in one[0].items():
        assert both[0][key] == (pytest.approx(value, abs=1e-12) if isinstance(value, float) else value), key


@pytest.mark.parametrize("method", ["declip", "densevlm", "mixrc"])
def test_full_sharding_with_teachers_equals_whole_models(program, two, scenes, method):
    """Also where teachers are asked ahead of the forward pass, and read from other blocks than their own reading's."""
    vfm = ["--vfm", "test_vit", "--vfm-weights", "random"]
    named = ["--dense-teacher", "tiny-eva", "--dense-teacher-weights", "random", "--names",
             str(scenes / "annotations/panoptic_val2017.json"), "--threshold", "0.01"]  # fmt: skip
    flags = {"declip": vfm, "densevlm": named,
             "mixrc": [*vfm, *named, "--alignment-weight", "0.5", "--semantic-weight", "0.2"]}[method]  # fmt: skip
    states = []
    for name, more in (("whole", []), ("divided", ["--fsdp"])):
        two("--method", method, *flags, *more, "--precision", "fp32", name=name, max_steps=3, warmup=1, eps=1e-3)
        states.append(torch.load(program.logs / name / "checkpoints/clipself.pt", weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=2e-6, msg=lambda text, name=name: name + text)


def results(program, name: str) -> list[dict]:
    return json.loads((program.logs / name / "results.json").read_text())


def test_full_sharding_evaluates_shares_that_differ(program, two, scenes, tmp_path):
    """Five images for two processes, one at a time: one of them makes more passes than the other."""
    content = json.loads((scenes / "annotations/panoptic_val2017.json").read_text())
    content["images"], content["annotations"] = content["images"][:5], content["annotations"][:5]
    (tmp_path / "five.json").write_text(json.dumps(content))
    common = {"val_data": tmp_path / "five.json", "val_image_root": scenes / "val2017", "alpha": 0.7, "max_steps": 2,
              "val_segm_root": scenes / "annotations/panoptic_val2017", "batch_size": 1, "eval_image_sizes": 64,
              "dist_timeout": 60, "log_images": 1, "eps": 1e-3}  # fmt: skip
    two("--precision", "fp32", name="whole", **common)
    two("--precision", "fp32", "--fsdp", name="divided", **common)
    whole, divided = (results(program, name) for name in ("whole", "divided"))
    assert [r["kind"] for r in divided] == ["start", "ensemble"] and divided[0]["count.images"] == 5
    for one, other in zip(whole, divided, strict=True):
        assert other == {k: pytest.approx(v, abs=1e-9) if isinstance(v, float) else v for k, v in one.items()}


@pytest.mark.parametrize("cached", [False, True])
def test_full_sharding_trains_on_batches_of_which_nothing_is_left(program, two, scenes, tmp_path, cached):
    """A third of the images is gone, so that often one process has nothing while the other has an image."""
    images = tmp_path / "images"
    shutil.copytree(scenes / "train2017", images)
    for file in sorted(images.iterdir())[::3]:
        file.unlink()
    flags = ["--method", "declip", "--vfm", "test_vit", "--vfm-weights", "random", "--precision", "fp32"]
    common = {"train": "proposals_distill", "train_image_root": images, "max_skipped": 0.5, "batch_size": 1,
              "epochs": 1, "warmup": 1, "dist_timeout": 60, "eps": 1e-3}  # fmt: skip
    if cached:
        common["cache_teacher"] = tmp_path / "cache"
    states = []
    for name, more in (("whole", []), ("divided", ["--fsdp"])):
        two(*flags, *more, name=name, **common)
        states.append(torch.load(program.logs / name / "checkpoints/clipself.pt", weights_only=True)["state_dict"])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=2e-6, msg=lambda text, name=name: name + text)


def test_weights_are_identical_on_both_processes(two):
    two(name="run", max_steps=4, compare=True)


def test_an_error_of_the_user_ends_all_processes_with_one_line(program, tmp_path):
    done = torchrun(program, name="run", train_data=tmp_path / "none.json")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        f"error: --train-data {tmp_path / 'none.json'}: no such file; give a COCO-style json"
    ]
    assert not program.logs.exists()


def refused(rank: int, port: int, arguments: list[str], root: str) -> None:
    """One of two processes of a run, on the second of which a folder is missing."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    assert main([*arguments, "--dist-timeout=60", *([f"--train-image-root={root}"] if rank else [])]) == 2


@pytest.mark.parametrize("val", [False, True])
def test_what_one_machine_lacks_ends_all_processes(program, in_processes, tmp_path, capfd, val):
    """The other process is by then where it waits for this one: it computes class embeddings, or wraps its model."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    in_processes(refused, 2, port, program.arguments(name="run", val=val), str(tmp_path / "none"))
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")] == [
        f"error: process 1: --train-image-root {tmp_path / 'none'}: no such folder"
    ]
    assert not program.logs.exists()


def test_resuming_on_another_number_of_processes_follows_the_same_data(program, two):
    """Same global batch: one process to the middle, two to the end, against one throughout."""
    common = {"batch_size": 4, "epochs": 2, "warmup": 1}
    assert program(name="whole", **common) == 0
    assert program(name="half", **common, max_steps=0, save_frequency=1) == 0
    (program.logs / "half/checkpoints/epoch_2.pt").unlink()
    two(name="half", resume="latest", **{**common, "batch_size": 2})
    a, b = (read_checkpoint(program.logs / n / "checkpoints" / "epoch_2.pt") for n in ("whole", "half"))
    assert a["step"] == b["step"] == 12
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], value, rtol=0, atol=2e-5)
