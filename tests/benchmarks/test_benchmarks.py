"""Every benchmark runs at a tiny size and ends with its JSON line; the two paths that it compares agree."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--model", "ViT-Ti-8-64", "--device", "cpu"]
Run = Callable[..., tuple[str, dict]]


@pytest.fixture
def load() -> Iterator[Callable[[str], ModuleType]]:
    """A benchmark as a module. What they share are modules of common names, which are gone afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def run(load: Callable[[str], ModuleType]) -> Run:
    """Runs a benchmark: (what it printed before its last line, the JSON object in that line).

    The processes that it starts for its parts run in this one, which saves their start.
    """

    def run(name: str, *flags: str) -> tuple[str, dict]:
        module = load(name)

        def within(*arguments: str) -> list[str]:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                module.main(list(arguments))
            return out.getvalue().strip().splitlines()

        module.run_self = lambda script, arguments: json.loads(within(*arguments)[-1])
        *table, last = within(*flags)
        return "\n".join(table), json.loads(last)

    return run


def test_a_part_runs_in_a_process_of_its_own(load: Callable[[str], ModuleType]) -> None:
    load("train_step")
    from common import run_self

    script = str(BENCHMARKS / "train_step.py")
    assert run_self(script, ["--part", "peak", "--device", "cpu"])["flop_per_s"] > 1e8
    with pytest.raises(RuntimeError, match="no-such-flag"):
        run_self(script, ["--no-such-flag"])


def test_data_compares_delivery(run: Run) -> None:
    flags = ["--size", "64", "--patch", "8", "--crop-size", "32", "--count", "2", "--workers", "1", "--rounds", "1"]
    table, result = run("data", *flags, "--seconds", "0.2", "--device", "cpu")
    assert "grid patches, crops on the device" in table
    grid, panoptic = result["grid"], result["panoptic"]
    assert grid["ratio"] > 0 and grid["ratio_device"] > 0 and panoptic["ratio"] > 0
    # Padded float32 of the conventional path: the image, 20 boxes of five numbers, 20 crops.
    assert grid["baseline_bytes_per_sample"] == 4 * (3 * 64**2 + 20 * 5 + 20 * 3 * 32**2)
    # uint8 here: the image and at most 20 crops, and little else.
    assert 3 * 64**2 < grid["bytes_per_sample"] < 3 * 64**2 + 20 * 3 * 32**2 + 1000
    assert grid["bytes_per_sample_device"] == pytest.approx(3 * 480 * 640, rel=0.01)


def test_padding_compares_steps(run: Run) -> None:
    table, result = run("padding", "steps", *TINY, "--size", "64", "--crops", "2", "--rounds", "1")
    assert "dropped" in table and result["faster"] > 0 and set(result["memory_gb"]) == {"padded", "dropped"}
    assert result["loss"]["padded"] != result["loss"]["dropped"]


def test_annotations_open_and_serve(run: Run) -> None:
    table, result = run(
        "annotations", "--images", "300", "--annotations", "2000", "--kinds", "lvis", "--sizes", "200", "400",
        "--seconds", "0.3", "--workers", "1",
    )  # fmt: skip
    assert result["lvis"]["images"] == 300 and result["lvis"]["annotations"] == 2000
    assert result["lvis"]["cached_open_s"] < 5 and result["lvis"]["worker_mb"] > 1
    assert set(result["curve"]["images_per_s"]) == {"200", "400"}
    assert "lvis, conventional" in table


def test_both_training_steps_have_the_same_loss(run: Run) -> None:
    table, result = run(
        "train_step", *TINY, "--sizes", "64", "--crops", "3", "--steps", "1", "--loader-steps", "1",
        "--curve-size", "64", "--curve-regions", "1", "2", "3", "--curve-sizes", "64",
    )  # fmt: skip
    plain, ours = result["steps"]
    assert (plain["step"], ours["step"]) == ("conventional", "this package")
    assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-3) and 0.01 < ours["loss"] < 2
    assert ours["peak_gb"] > 0.1 and ours["speedup"] > 0 and ours["tflop"] == plain["tflop"] > 0
    assert 0 <= result["data_wait_share"] < 1
    assert set(result["curves"]["regions"]["seconds"]) == {"1", "2", "3"}
    assert "Step time against tokens" in table


def test_both_evaluations_give_the_same_accuracies(run: Run) -> None:
    table, result = run("evaluate", *TINY, "--size", "64", "--count", "2", "--rounds", "1", "--workers", "0")
    assert result["metrics_difference"] == 0 and result["segments"] > 10
    assert result["ratio"] > 0 and result["limit_seconds_per_image"] > 0
    assert "rois.thing.macc1" in table


def test_flop_of_a_step_against_pytorch_s_own_count(load: Callable[[str], ModuleType]) -> None:
    """Matrix products and convolutions that PyTorch counts in a real forward pass, attention unfused."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import open_clip

    forward_flop, use_eager_attention = load("steps").forward_flop, load("conventional").use_eager_attention
    tower = open_clip.create_model("ViT-Ti-8-64").visual.eval()
    use_eager_attention(tower)
    for dense in (False, True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            tower.encode_dense(torch.zeros(1, 3, 96, 96)) if dense else tower(torch.zeros(1, 3, 96, 96))
        assert forward_flop(tower, 96, dense=dense) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_both_segmentation_scores_agree(run: Run) -> None:
    table, result = run(
        "segmentation", "--model", "ViT-Ti-8-64", "--count", "2", "--short-side", "64", "--window", "48",
        "--readouts", "value", "naclip", "--workers", "0", "--width", "90", "--height", "70", "--classes", "5",
        "--memory-side", "32",
    )  # fmt: skip
    speed, memory = result["speed"], result["memory"]
    assert speed["ratio"] > 0 and speed["images"] == 2 and speed["classes"] == 133
    assert speed["share_of_pixels_that_differ"] < 1e-3  # ties only
    assert memory["peak_gb"] > 0.1 and memory["scores_alone_gb"] == pytest.approx(4e-9 * 90 * 70 * 5)
    assert "labelled differently" in table


def test_glip(run: Run):
    pytest.importorskip("transformers")
    config = str(BENCHMARKS.parent / "GLIP" / "configs" / "glip_t_small.toml")
    flags = ["--height", "64", "--width", "96", "--repeats", "1", "--chunks", "2", "--device", "cpu"]
    text, result = run("glip", "--config", config, *flags)
    assert "dynamic blocks" in text and 0 < result["training"]["deformable convolution, share"] < 1
    assert all(seconds > 0 for seconds, _ in result["testing"].values())


@pytest.mark.slow
def test_the_store_of_vild_beside_the_usual_loop(load: Callable[[str], ModuleType]) -> None:
    """Both ways give the same rows; a store is filled by two processes."""
    load("vild")
    from common import run_self

    small = ["model.channels=16", "model.box_width=32", "model.roi_samples=8", "model.mask_convs=1"]
    result = run_self(
        str(BENCHMARKS / "vild.py"),
        ["--teacher", "ViT-Ti-8-64", "--images", "2", "--proposals", "6", "--processes", "2", "--trunk", "test_resnet",
         "--size", "64", "--read-images", "3", *small],
    )  # fmt: skip
    assert result["cosine"] > 0.999 and result["ratio"] > 0 and result["crops_ratio"] > 0
    assert 0 < result["read_share"] == pytest.approx(result["read_s"] / result["step_s"])
