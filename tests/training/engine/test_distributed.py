"""Who started this process, and the collectives that carry errors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from training.engine.distributed import adopt_slurm, first_host, init_distributed, tasks_of_node
from training.engine.errors import UserError

SRC = Path(__file__).parents[3] / "src"
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[07-09,12],login", "SLURM_NTASKS": "2"}  # fmt: skip
OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


@pytest.fixture
def bare(monkeypatch):
    for name in [n for n in os.environ if n in OURS or n.startswith("SLURM")]:
        monkeypatch.delenv(name)
    yield monkeypatch
    for name in OURS:  # set by what is tested
        os.environ.pop(name, None)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("a,b", "a"), ("gpu[07-09,12],login", "gpu07"), ("n[3]-ib", "n3-ib"), ("r1n[2,4]", "r1n2")],
)
def test_first_host_of_slurms_lists(nodes, first):
    assert first_host(nodes) == first
    with pytest.raises(UserError, match="MASTER_ADDR"):
        first_host("")


@pytest.mark.parametrize(
    ("tasks", "node", "number"), [("4(x2),3", 0, 4), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("8", 0, 8), ("8", 1, None)]
)
def test_tasks_of_a_machine_by_slurms_counts(tasks, node, number):
    assert tasks_of_node(tasks, node) == number and tasks_of_node("", node) is None


def test_tasks_of_srun_find_each_other(bare):
    for name, value in SLURM.items():
        bare.setenv(name, value)
    bare.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2),3")
    bare.setenv("SLURM_NODEID", "2")
    adopt_slurm()
    assert os.environ["LOCAL_WORLD_SIZE"] == "3"
    assert [os.environ[name] for name in OURS[:4]] == ["1", "2", "0", "gpu07"]
    assert 20_000 <= int(os.environ["MASTER_PORT"]) < 30_000


@pytest.mark.parametrize("missing", [{"SLURM_STEP_NUM_TASKS"}, {"SLURM_PROCID"}, None])
def test_a_batch_script_and_torchrun_under_slurm_are_left_alone(bare, missing):
    for name, value in SLURM.items():
        if name not in (missing or ()):
            bare.setenv(name, value)
    if missing is None:
        bare.setenv("RANK", "0")
    adopt_slurm()
    assert "WORLD_SIZE" not in os.environ


def test_two_tasks_of_srun_make_one_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from training.engine.distributed import *\nimport torch\nd = init_distributed('cpu', timeout_s=60)\n"
        "print(d.rank, d.world_size, all_reduce_sum(torch.tensor(d.rank + 1)).item())\nend_distributed()"
    )
    environment = {"PYTHONPATH": str(SRC), "PATH": os.defpath, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"} | SLURM
    environment |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment | {"SLURM_PROCID": n, "SLURM_LOCALID": n},
                         stdout=subprocess.PIPE, text=True)
        for n in "01"
    ]  # fmt: skip
    assert [process.communicate(timeout=120)[0] for process in started] == ["0 2 3\n", "1 2 3\n"]


def test_a_task_that_sees_its_own_gpu_only(bare):
    import torch

    chosen = []
    bare.setattr(torch.cuda, "is_available", lambda: True)
    bare.setattr(torch.cuda, "device_count", lambda: 1)
    bare.setattr(torch.cuda, "set_device", chosen.append)
    bare.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 1 of this machine has no GPU .1 visible"):
        init_distributed("cuda")
    bare.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert init_distributed("cuda").device == torch.device("cuda", 0) and chosen == [0]


def test_too_few_gpus_end_all_processes_of_a_machine(bare):
    """Also the first one, which has a GPU, and which is the one that prints."""
    import torch

    bare.setattr(torch.cuda, "is_available", lambda: True)
    bare.setattr(torch.cuda, "device_count", lambda: 2)
    bare.setattr(torch.cuda, "set_device", lambda index: None)
    bare.setenv("LOCAL_WORLD_SIZE", "4")
    for local_rank in "0123":
        bare.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(UserError, match="process 3 of this machine has no GPU .2 visible.: start fewer"):
            init_distributed("cuda")
    bare.setenv("LOCAL_WORLD_SIZE", "2")
    bare.setenv("LOCAL_RANK", "1")
    assert init_distributed("cuda").device == torch.device("cuda", 1)


def test_nobody_waits_for_a_process_that_has_failed(two_processes):
    """One fails in a stretch of set-up; the other is already where it waits for it, or in a stretch within."""
    outputs = two_processes("""
        import time
        import torch
        from torch import nn
        from training.engine.distributed import barrier, from_master, gather_objects, gather_to_master, on_master
        from training.engine.distributed import together, wrap
        from training.engine.errors import UserError

        def within():
            with together():
                pass

        waits = {"wrap": lambda: wrap(nn.Linear(1, 1), dist), "barrier": barrier, "together": within,
                 "on_master": lambda: on_master(lambda: time.sleep(60)), "from_master": lambda: from_master(1),
                 "gather_objects": lambda: gather_objects(1), "gather_to_master": lambda: gather_to_master(1)}
        for name, wait in waits.items():
            for failing in (0, 1):
                begin = time.monotonic()
                try:
                    with together():
                        if dist.rank == failing:
                            raise UserError(f"the root is missing ({name})")
                        wait()
                    raise AssertionError(name)
                except UserError as error:
                    who = "process 1: " if failing else ""
                    assert str(error) == f"{who}the root is missing ({name})", error
                    assert error.rank == failing and time.monotonic() - begin < 20, name
        assert gather_objects(dist.rank) == [0, 1]  # nobody is a step behind
        wrap(nn.Linear(1, 1), dist)
        print("all ended")
    """)
    assert all(output.endswith("all ended\n") for output in outputs)


def test_class_embeddings_and_full_sharding_wait_for_nobody_that_has_failed(two_processes, as_module):
    common = as_module("tests/training/engine/test_sharding.py").COMMON
    two_processes(common + """
import time
from argparse import Namespace
from training.class_embeddings import load_or_compute
from training.engine.distributed import together

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.text = Namespace(embed_dim=4), nn.Linear(1, 1)

def embeddings():
    return load_or_compute(Namespace(), Slow(), lambda texts: torch.zeros(len(texts), 3, dtype=torch.int64), ["cat"],
                           cache_folder=None, prompts=lambda name: time.sleep(60))

def sharded():
    usual = LoopOptions(epochs=1, batch_size=4, fsdp=True)
    Loop(Divided(), usual, dist=dist, precision=make_precision("fp32", dist.device))

for wait in (embeddings, sharded):
    begin = time.monotonic()
    try:
        with together():
            if dist.rank == 1:
                raise UserError("the root is missing")
            wait()
        raise AssertionError
    except UserError as error:
        assert str(error) == "process 1: the root is missing", error
        assert time.monotonic() - begin < 20
""")  # fmt: skip


def test_a_name_that_is_made_up_is_the_same_on_all_processes(two_processes, tmp_path):
    """Around the turn of a second, when clocks give different ones."""
    outputs = two_processes("""
        import time
        from training.main import named
        from training.params import parse_args

        options = parse_args(["--train-data=a.json", "--train-image-root=a", "--model=ViT-B-16", "--device=cpu"])
        strftime = time.strftime
        time.strftime = lambda form, *rest: strftime(form, time.gmtime(1e9 + dist.rank))
        print(named(options).run.name)
    """)
    assert outputs[0] == outputs[1] and outputs[0].startswith("2001_09_09-01_46_40-ViT-B-16-")


def test_errors_and_values_reach_all_processes(two_processes):
    two_processes("""
        import pytest, torch
        from torch import nn
        from training.engine.distributed import average_batch_norm, gather_objects, gather_to_master, on_master
        from training.engine.distributed import together, wrap
        from training.engine.errors import UserError

        def refuse():
            raise UserError("no such file")

        assert on_master(lambda: dist.rank + 5) == 5
        with pytest.raises(UserError, match="no such file"):
            on_master(refuse)
        with pytest.raises(UserError, match="one of us"):
            with together():
                if dist.rank == 1:
                    raise UserError("one of us")
        with together():
            pass
        assert gather_objects(dist.rank) == [0, 1]
        assert gather_to_master(dist.rank) == ([0, 1] if dist.is_master else None)
        norm = nn.Sequential(nn.BatchNorm2d(2))
        norm[0].running_mean += dist.rank
        average_batch_norm(norm)
        assert norm[0].running_mean.tolist() == [0.5, 0.5] and norm[0].running_var.tolist() == [1, 1]
        frozen = nn.Linear(1, 1)
        frozen.bias.requires_grad_(False)
        frozen.bias.data.fill_(dist.rank)
        wrapped = wrap(frozen, dist)
        frozen.weight.grad = None
        (wrapped(torch.full((1, 1), 1.0 + dist.rank))).sum().backward()
        assert frozen.weight.grad.item() == 1.5 and frozen.bias.item() == dist.rank
    """)
