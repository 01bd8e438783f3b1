"""What first users stumbled over, by number, with the tests that hold it; and those tests that have no other place."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.engine.data.images import ImageError, read_bytes
from training.engine.data.samples import check_image_root
from training.engine.errors import UserError
from training.engine.lock import FolderLock
from training.main import main

ROOT = Path(__file__).parents[1]
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8, "mlp_ratio": 2.6667,
                   "eva_model_name": "tiny", "rope": True, "naiveswiglu": True, "subln": True},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1},
}  # fmt: skip
HERE = "test_findings.py"
MISTAKES = "test_mistakes.py::test_one_line_and_nothing_written"
COMMANDS = "test_documented_commands.py::test_it_exists_and_parses"

# Finding -> tests (file below tests/, function).
FINDINGS = {
    "N1 generated scenes over real data": ["training/scenes/test_scenes.py::test_folders_of_others_are_left_alone"],
    "N2 warm-up longer than the run": [f"{HERE}::test_n2_a_warm_up_no_shorter_than_the_run_is_said"],
    "N3 README's commands": [COMMANDS, "test_documented_commands.py::test_readme_runs_literally"],
    "N4 OpenCLIP's calls": ["open_clip/test_upstream_surface.py::test_functions",
                            "open_clip/test_upstream_surface.py::test_members",
                            "open_clip/test_upstream_surface.py::test_models_and_why_others_are_refused"],
    "N5 two runs in one folder": [f"{HERE}::test_n5_a_run_in_progress_is_left_alone",
                                  "training/engine/test_lock.py::"
                                  "test_a_second_run_is_refused_and_a_killed_one_leaves_nothing"],
    "N6 URLs without their packages": [f"{HERE}::test_n6_a_missing_package_is_a_fault_of_the_set_up", MISTAKES],
    "N7 proposals without annotations": ["training/methods/test_program.py::test_proposals_that_are_not_there"],
    "N8 wrong input to the API": ["open_clip/test_wrong_input.py::test_one_sentence",
                                  "open_clip/test_wrong_input.py::test_an_empty_mask_is_said"],
    "N9 what is no checkpoint": ["open_clip/test_weight_files.py::test_other_files_are_named",
                                 "open_clip/test_weight_files.py::test_no_advice_to_run_code"],
    "N10 detect.py": [MISTAKES, "ovdet/test_tools_fvit.py::test_names_and_files_of_command_lines",
                      "ovdet/test_tools_fvit.py::test_drawing"],
    "N11 byte-order marks": [f"{HERE}::test_n11_byte_order_marks_are_no_part_of_names",
                             "open_clip/test_wrong_input.py::test_class_names_of_a_file"],
    "N12 one set of flags": [f"{HERE}::test_n12_flags_are_called_the_same_everywhere",
                             "tools/test_show.py::test_titles_differ"],
    "N13 where start models come from": [f"{HERE}::test_n13_a_missing_start_model_says_where_to_get_it"],
    "N14 where the model is": ["training/test_first_hour.py::test_a_folder_of_images_is_training_data"],
    "N15 messages of flags and names": [MISTAKES, f"{HERE}::test_n15_the_table_of_a_test_is_shown_once"],
    "N16 CLIPSELF_VENV and .venv": [f"{HERE}::test_n16_the_environment_is_honoured",
                                    f"{HERE}::test_n16_a_linked_environment_is_ignored_by_git"],
    "U1 published command lines": ["training/test_params.py::test_published_command_lines"],
    "U2 SLURM": ["training/engine/test_distributed.py::test_two_tasks_of_srun_make_one_run"],
    "U3 one process parses": ["training/engine/data/test_annotations.py::test_one_process_parses_and_the_others_wait"],
    "U4 two checkpoints are kept": [f"{HERE}::test_u4_two_checkpoints_are_kept_by_default"],
    "U5 help": ["training/test_params.py::test_help_is_short_and_has_examples",
                "training/test_params.py::test_what_does_not_go_together"],
    "U6 dry run, wandb, ensembles of epochs": [
        "training/test_first_hour.py::test_a_dry_run_says_what_the_run_takes_and_writes_nothing",
        "training/test_first_hour.py::test_scalars_go_where_they_are_asked_to",
        "tools/test_ensemble_weights.py::test_a_training_checkpoint_is_loaded_as_its_ensemble",
    ],
    "C4 ensembles": ["tools/test_ensemble_weights.py::test_two_files_and_alpha",
                     "tools/test_ensemble_weights.py::test_a_training_checkpoint_is_loaded_as_its_ensemble"],
}  # fmt: skip


@pytest.mark.parametrize("finding", FINDINGS)
def test_it_has_its_test(finding):
    for name in FINDINGS[finding]:
        file, function = name.split("::")
        assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M), name


@pytest.fixture
def place(tmp_path, monkeypatch) -> list[str]:
    """The working folder has a tiny model and four photographs; gives the flags that train on them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    Path("tiny-found.json").write_text(json.dumps(TINY))
    Path("photos").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"photos/{i}.jpg")
    return ["--model", "tiny-found.json", "--train-data", "photos", "--det-image-size", "64", "--workers", "0",
            "--device", "cpu", "--batch-size", "2", "--name", "run"]  # fmt: skip


def test_n2_a_warm_up_no_shorter_than_the_run_is_said(place):
    assert main([*place, "--epochs", "2"]) == 0
    log = Path("logs/run/out.log").read_text()
    assert "the warm-up of 1000 steps (--warmup) is no shorter than the run of 4 steps" in log
    assert main([*place, "--epochs", "2", "--warmup", "1", "--name", "short"]) == 0
    assert "warm-up" not in Path("logs/short/out.log").read_text()


def test_n5_a_run_in_progress_is_left_alone(place, capsys):
    assert main([*place, "--epochs", "1", "--warmup", "1"]) == 0
    capsys.readouterr()
    before = sorted(Path("logs").rglob("*"))
    with FolderLock(Path("logs/run")):
        assert main([*place, "--epochs", "2", "--warmup", "1", "--resume", "latest"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "run" in error[0]
    assert [p for p in sorted(Path("logs").rglob("*")) if p.suffix != ".lock"] == [
        p for p in before if p.suffix != ".lock"
    ]


def test_n6_a_missing_package_is_a_fault_of_the_set_up(monkeypatch):
    def missing(path: str, mode: str):
        raise ImportError('HTTPFileSystem requires "requests" and "aiohttp" to be installed')

    monkeypatch.setattr("training.engine.data.images.fsspec.open", missing)
    with pytest.raises(UserError, match=r"--train-image-root http://x.*aiohttp.*pip install -e '\.\[remote\]'"):
        check_image_root("http://x", ["a.jpg"], "a.json", "--train-image-root")
    with pytest.raises(ImportError):
        read_bytes("http://x/a.jpg")
    monkeypatch.undo()
    with pytest.raises(ImageError, match="no such file"):
        read_bytes("memory://nothing/a.jpg")


def test_n11_byte_order_marks_are_no_part_of_names(tmp_path, as_module):
    from open_clip.prompts import read_class_names
    from ovdet.listing import read_names
    from ovseg.classes import read_classes

    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffdog\ncat\n".encode())
    assert list(read_classes(file).names) == read_names(str(file)) == ["dog", "cat"]
    assert list(read_class_names(file)) == ["dog", "cat"]
    assert as_module("tools/generate_text_embeddings.py").read_names(file) == ["dog", "cat"]


def _help(main_of, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main_of(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_n12_flags_are_called_the_same_everywhere(capsys, as_module):
    from ovdet.commands import detect
    from ovseg import evaluate, pseudo_labels

    programs = {
        "show": as_module("tools/show.py").main,
        "generate_text_embeddings": as_module("tools/generate_text_embeddings.py").main,
        "detect": detect.main, "pseudo_labels": pseudo_labels.main,
    }  # fmt: skip
    for name, program in programs.items():
        text = _help(program, capsys)
        assert all(re.search(rf"(?<!-){flag}\b", text) for flag in ("--out", "--classes", "--classes-from")), name
    assert "--out" in _help(evaluate.main, capsys)
    assert "--out" in _help(as_module("tools/quickstart_report.py").main, capsys)


def test_n13_a_missing_start_model_says_where_to_get_it(place, capsys):
    flags = ["--model", "EVA02-CLIP-B-16", "--pretrained", "eva", "--cache-dir", "checkpoints/EVA02_CLIP_B.pt"]
    assert main([*place, *flags]) == 2
    error = capsys.readouterr().err
    assert "checkpoints/README.md" in error and "merged2b_s8b_b131k" in error and error.count("\n") == 1


def test_n15_the_table_of_a_test_is_shown_once():
    source = (ROOT / "src/ovdet/fvit/commands/test.py").read_text()
    assert source.count("format_table(metrics") == 1 and "level=logging.DEBUG" in source


def _launched_with(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "CLIPSELF_VENV")}
    return subprocess.run(
        command, cwd=cwd, env={**kept, "NPROC": "1", **environment}, capture_output=True, text=True, timeout=60
    )


def test_n16_the_environment_is_honoured(tmp_path):
    """Recipes and the detector's launcher run the Python of CLIPSELF_VENV, here a script that says so."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "that of the environment: $*"\n')
    python.chmod(0o755)
    recipe = ["bash", str(ROOT / "scripts/train_clipself_coco_image_patches_eva_vitb16.sh")]
    detector = ["bash", str(ROOT / "F-ViT/dist_train.sh"), "config.toml", "1", "--work-dir", "x"]
    for command in (recipe, detector):
        for value in (str(tmp_path / "venv"), "venv"):  # a relative one is meant from where the command is given
            done = _launched_with(command, tmp_path, CLIPSELF_VENV=value)
            assert done.returncode == 0 and "that of the environment: " in done.stdout, done.stderr
        wrong = _launched_with(command, tmp_path, CLIPSELF_VENV=str(tmp_path / "nothing"))
        assert wrong.returncode == 2 and "CLIPSELF_VENV" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_n16_a_linked_environment_is_ignored_by_git():
    assert ".venv" in (ROOT / ".gitignore").read_text().splitlines()  # without a slash: a link is no folder


def test_u4_two_checkpoints_are_kept_by_default(place, caplog):
    with caplog.at_level(logging.ERROR):
        assert main([*place, "--epochs", "4", "--warmup", "1"]) == 0
    kept = sorted(p.name for p in Path("logs/run/checkpoints").glob("epoch_*.pt"))
    assert kept == ["epoch_3.pt", "epoch_4.pt"]
