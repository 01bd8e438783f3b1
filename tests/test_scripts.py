"""The bash entry points: what they delete, which Python they take, what relative paths mean, and what they start."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ovdet.config import format_config
from ovdet.vild.assemble import read_config
from training.scenes.compose import SceneOptions
from training.scenes.generate import write_dataset

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "scripts/train_clipself_coco_image_patches_eva_vitb16.sh"
SALIENT = "scripts/train_clipself_coco_salient_regions_eva_vitb16.sh"
STUDIES = {  # script: (folder of its scenes, a folder of its runs, that of its environment's stamp)
    "scripts/quickstart.sh": ("data", "logs/clipself", ".installed"),
    "F-ViT/scripts/demo.sh": ("data", None, ".installed-fvit"),
    "ViLD/scripts/study.sh": ("data", "seed_0", ".installed-vild"),
    "GLIP/scripts/study.sh": ("b", "trained_1", ".installed-glip"),
}
# Says what it was asked to run. A text it runs indeed, and the generator of scenes too, unless it is to be quick:
# then it makes their folder alone.
PYTHON = """#!/bin/sh
case "$1 $2" in
    "- "* | "-c "*) exec "{python}" "$@" ;;
    "-m training.scenes") if [ -n "{quick}" ]; then exec mkdir -p "$4"; else exec "{python}" "$@"; fi ;;
esac
echo "ran with $OMP_NUM_THREADS threads: $*"
case " $* " in *" training.main "*) exit {status} ;; esac
"""


def fake_python(file: Path, status: int = 0, *, quick: bool = False) -> Path:
    """An interpreter that starts no training: asked to, it ends with ``status``. ``quick``: nor does it draw scenes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(PYTHON.format(python=sys.executable, status=status, quick="yes" if quick else ""))
    file.chmod(0o755)
    return file


def fake_environment(folder: Path, *, quick: bool = False) -> Path:
    """A virtual environment with such an interpreter, marked as filled for all studies."""
    fake_python(folder / "bin" / "python", status=3, quick=quick)
    state = subprocess.check_output("cat setup.py requirements.txt | cksum", shell=True, text=True, cwd=ROOT).strip()
    for _, _, stamp in STUDIES.values():
        (folder / stamp).write_text(f"{ROOT} {state}\n")
    return folder


def run(
    script: str, *arguments: str, cwd: Path, root: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script, from another folder than the clone, in an environment without variables of the user."""
    own = ("PYTHON", "CLIPSELF_VENV", "VIRTUAL_ENV", "CONDA_PREFIX", "OMP_NUM_THREADS", "DATA", "LVIS", "OUT", "SEEDS",
           "REGIONS", "CHECKPOINTS", "MAX_RESTARTS", "NNODES", "QUICKSTART", "CLIPSELF_DOCS_SMOKE")  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if k not in own}
    return subprocess.run(
        ["bash", str(root / script), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**kept, "NPROC": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2, and one line that says all of these words."""
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# -- what is deleted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", STUDIES)
def test_folders_of_others_are_left_alone(script, tmp_path):
    """Whatever lies where a study has its scenes and its runs, unless it made them itself: COCO, photographs, runs."""
    scenes, runs, _ = STUDIES[script]
    mark = '{"description":"generated scenes"}'
    foreign = {
        "COCO in data": {f"{scenes}/coco/train2017/1.jpg": "a photograph", f"{scenes}/README.md": "Data"},
        "COCO itself": {f"{scenes}/train2017/1.jpg": "a photograph", f"{scenes}/annotations/instances.json": "{}",
                        f"{scenes}/complete": "yes"},
        "something beside scenes": {f"{scenes}/mine/1.jpg": "a photograph", f"{scenes}/scenes.json": mark},
        "a file": {scenes: "text"},
    }  # fmt: skip
    if runs is not None:
        foreign["a run"] = {f"{runs}/checkpoints/clipself.pt": "two weeks"}
    venv = fake_environment(tmp_path / "venv")
    for number, content in enumerate(foreign.values()):
        out = tmp_path / str(number)
        for name, text in content.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text)
        before = files_of(out)
        for place in ({"OUT": "."}, {"OUT": str(out)}):
            done = run(script, "--smoke", cwd=out, CLIPSELF_VENV=str(venv), QUICKSTART=str(tmp_path / "none"), **place)
            refused(done, str(out / (runs if scenes not in str(content) else scenes)).split("/checkpoints")[0], "OUT")
            assert files_of(out) == before and "ran with" not in done.stdout


def test_an_interrupted_quick_start_is_made_anew(tmp_path):
    """Its own scenes, half made, and its own runs go; what it did not make and need not delete stays."""
    venv = fake_environment(tmp_path / "venv")

    def quickstart() -> subprocess.CompletedProcess[str]:
        done = run("scripts/quickstart.sh", "--smoke", cwd=tmp_path, CLIPSELF_VENV="venv", OUT="out")
        assert done.returncode == 3 and "--name start" in done.stdout, done.stderr  # it came to the first training
        return done

    quickstart()
    data, runs = tmp_path / "out" / "data", tmp_path / "out" / "logs"
    complete = files_of(data)
    assert len(list((data / "train2017").iterdir())) == 32 and venv.is_dir()
    (runs / "clipself" / "checkpoints").mkdir(parents=True)
    (runs / "mine").mkdir()
    again = quickstart()
    assert "Using the data in" in again.stdout and files_of(data) == complete
    assert sorted(f.name for f in runs.iterdir()) == ["mine"]
    # Broken off while scenes were drawn: the generator's mark is there, and a picture that belongs to nothing.
    for name in ("complete", "annotations/instances_train2017.json"):
        (data / name).unlink()
    (data / "train2017" / "000000009999.jpg").write_text("left over")
    (runs / "start").mkdir()
    quickstart()
    assert files_of(data) == complete and sorted(f.name for f in runs.iterdir()) == ["mine"]


def test_scenes_of_a_former_version_are_known(tmp_path):
    """They have no mark of the generator, and their runs none of the script: the annotations and ``complete`` tell."""
    out = tmp_path / "out"
    write_dataset(out / "data", train=2, val=1, options=SceneOptions(size=48, things=4, stuff=2))
    (out / "data" / "scenes.json").unlink()
    (out / "logs" / "start").mkdir(parents=True)
    fake_environment(tmp_path / "venv")
    place = {"cwd": tmp_path, "CLIPSELF_VENV": "venv", "OUT": "out"}
    refused(run("scripts/quickstart.sh", "--smoke", **place), "logs/start")  # scenes of somebody, with a run
    (out / "data" / "complete").write_text("123 45 --train 2 --val 1\n")
    done = run("scripts/quickstart.sh", "--smoke", **place)
    assert done.returncode == 3 and not (out / "logs" / "start").exists(), done.stderr
    assert len(list((out / "data" / "train2017").iterdir())) == 32


# -- which Python -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path) -> Path:
    """The scripts alone, with an environment of their own."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "F-ViT").mkdir()
    shutil.copy(ROOT / "F-ViT" / "dist_train.sh", root / "F-ViT")
    (root / "setup.py").write_text("")
    (root / "requirements.txt").write_text("")
    fake_python(root / ".venv" / "bin" / "python")
    state = subprocess.check_output("cat setup.py requirements.txt | cksum", shell=True, text=True, cwd=root).strip()
    (root / ".venv" / ".installed-test").write_text(f"{root} {state}\n")
    return root


STARTED = [(RECIPE,), ("F-ViT/dist_train.sh", "config.toml", "1", "--work-dir", "x"), ("scripts/test.sh",)]


@pytest.mark.parametrize("command", STARTED, ids=lambda command: command[0])
def test_another_environment_than_the_active_one_is_told(clone, tmp_path, command):
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        done = run(*command, cwd=tmp_path, root=clone, **{name: "/somewhere/else"})
        assert done.returncode == 0 and "ran with" in done.stdout
        assert done.stderr.count("\n") == 1 and "/somewhere/else" in done.stderr and str(clone / ".venv") in done.stderr
    for environment in ({}, {"VIRTUAL_ENV": str(clone / ".venv")}):
        done = run(*command, cwd=tmp_path, root=Path("clone"), **environment)  # by a relative path, too
        assert done.returncode == 0 and not done.stderr and "ran with" in done.stdout
    if command[0] != "scripts/test.sh":  # which takes PYTHON for the making of an environment
        own = fake_python(tmp_path / "own" / "python")
        for python in (str(own), "own/python"):
            done = run(*command, cwd=tmp_path, root=clone, VIRTUAL_ENV="/somewhere/else", PYTHON=python)
            assert done.returncode == 0 and not done.stderr and "ran with" in done.stdout


def test_an_interpreter_for_a_new_environment_is_not_ignored_in_silence(clone, tmp_path):
    own = fake_python(tmp_path / "own" / "python")
    done = run("scripts/test.sh", cwd=tmp_path, root=clone, PYTHON=str(own))
    assert done.returncode == 0 and "CLIPSELF_VENV" in done.stderr and done.stderr.count("\n") == 1
    own.unlink()
    own.symlink_to(clone / ".venv" / "bin" / "python")  # that which made it
    assert not run("scripts/test.sh", cwd=tmp_path, root=clone, PYTHON=str(own)).stderr


@pytest.mark.parametrize("command", [*STARTED, ("scripts/segment_voc.sh",)], ids=lambda command: command[0])
def test_an_interpreter_that_is_not_there_is_refused(clone, tmp_path, command):
    for python in ("python3.99", "./python", str(tmp_path)):
        refused(run(*command, cwd=tmp_path, root=clone, PYTHON=python), "PYTHON: there is no", Path(python).name)


# -- what is started, and what relative paths mean --------------------------------------------------------------------


def words(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The last command that the interpreter was given."""
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[-1].partition("threads: ")[2])


def value(words: list[str], flag: str) -> str:
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


def test_a_run_on_one_process_restarts_as_well(tmp_path):
    python = str(fake_python(tmp_path / "python"))
    alone = words(run(RECIPE, cwd=tmp_path, PYTHON=python))
    assert alone[:2] == ["-m", "training.main"]
    given = words(run(RECIPE, cwd=tmp_path, PYTHON=python, MAX_RESTARTS="3"))
    assert given[:2] == ["-m", "torch.distributed.run"] and value(given, "--max-restarts") == "3"
    assert value(given, "--nproc_per_node") == "1" and alone[2:] == given[given.index("training.main") + 1 :]


def test_relative_paths_are_those_of_the_caller(tmp_path):
    """Variables and flags alike; what is not named lies in the clone, from wherever the command is given."""
    fake_python(tmp_path / "python")
    place = {"cwd": tmp_path, "PYTHON": "./python"}
    given = words(run(RECIPE, "--train-data", "mine", **place, DATA="coco", CHECKPOINTS="start"))
    assert value(given, "--train-data") == "mine" and value(given, "--train-image-root") == "coco/train2017"
    assert value(given, "--cache-dir").startswith("start/") and value(given, "--logs") == str(ROOT / "logs")
    given = words(run(RECIPE, **place))
    assert value(given, "--train-image-root") == str(ROOT / "data/coco/train2017")
    given = words(run(RECIPE, cwd=ROOT, PYTHON=str(tmp_path / "python")))
    assert value(given, "--train-image-root") == "data/coco/train2017" and "--logs" not in given
    given = words(run("scripts/segment_coco.sh", **place, DATA="sets", PRETRAINED="a.pt"))
    assert value(given, "--data-root") == "sets" and value(given, "--pretrained") == "a.pt"
    assert value(words(run("scripts/segment_coco.sh", **place)), "--data-root") == f"{ROOT}/data"


def test_lvis_lies_where_the_detectors_have_it_or_where_the_recipes_had_it(tmp_path):
    python = str(fake_python(tmp_path / "python"))
    script = "scripts/train_clipself_lvis_image_patches_eva_vitb16.sh"

    def read() -> str:
        return value(words(run(script, cwd=tmp_path, PYTHON=python, LVIS="lvis")), "--train-data")

    assert read() == "lvis/annotations/lvis_v1_train.json"
    (tmp_path / "lvis").mkdir()
    (tmp_path / "lvis" / "lvis_v1_train.json").write_text("{}")
    assert read() == "lvis/lvis_v1_train.json"
    (tmp_path / "lvis" / "annotations").mkdir()
    (tmp_path / "lvis" / "annotations" / "lvis_v1_train.json").write_text("{}")
    assert read() == "lvis/annotations/lvis_v1_train.json"


def test_salient_regions_are_searched_for_a_training_that_can_begin(tmp_path):
    """118 thousand images are not looked at for a mistyped flag, a dry run, help, or a training on another file."""
    python = str(fake_python(tmp_path / "python"))

    def recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run(SALIENT, *arguments, cwd=tmp_path, PYTHON=python, DATA="coco")

    refused(recipe("--batchsize", "16"), "--batchsize")
    refused(recipe("--dry-run"), "--dry-run", "coco/coco_salient_regions.json")
    for others in (["--train-data", "mine.json"], ["--help-all"], ["--help"]):
        done = recipe(*others)
        assert "training.propose" not in done.stdout and words(done)[1] == "training.main"
    both = recipe("--batch-size", "16").stdout.splitlines()
    assert ["training.propose" in line for line in both] == [True, False] and "coco_salient_regions.json" in both[0]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "coco_salient_regions.json").write_text("{}")
    done = recipe("--dry-run")
    assert words(done)[1] == "training.main" and "training.propose" not in done.stdout


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one thread is all there is")
def test_the_quick_start_before_a_study_has_its_own_threads(tmp_path):
    fake_environment(tmp_path / "venv", quick=True)
    done = run("ViLD/scripts/study.sh", "--smoke", cwd=tmp_path, CLIPSELF_VENV="venv", QUICKSTART="quick", OUT="out")
    assert done.returncode == 3 and "--name start" in done.stdout and "ran with 1 threads" not in done.stdout
    assert (tmp_path / "quick" / "data" / "complete").is_file() and not (tmp_path / "out" / "data").exists()


# -- ViLD's pipeline --------------------------------------------------------------------------------------------------


def test_a_detector_that_was_trained_otherwise_is_not_taken_for_this_one(tmp_path):
    """Config and values of a run that is done, or was interrupted, are compared; what only tests read is not."""
    python = str(fake_python(tmp_path / "python"))
    for name in ("images", "other"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name}))
    common = ["data.novel=['cat']", f"data.train_annotations={tmp_path / 'images.json'}", "model.variant=text",
              "train.steps=9"]  # fmt: skip
    proposer = ["model.variant=supervised", "data.single_class=true", "model.masks=false", "data.sampling=uniform",
                "data.keep_empty=false"]  # fmt: skip
    r50, r152 = (str(ROOT / "ViLD" / "configs" / f"lvis_{n}_ensemble.toml") for n in ("r50", "r152"))
    out = tmp_path / "out"
    for name, values in (("text", common), ("proposer", [*common, *proposer])):
        (out / name).mkdir(parents=True)
        trained = read_config(r50, [*values, "train.epochs=3"])  # as a run writes it: epochs follow from the steps
        (out / name / "config.toml").write_text(format_config(trained))
        (out / name / "done").touch()
    (out / "slow").mkdir()

    def pipeline(config: str, *values: str, **environment: str) -> subprocess.CompletedProcess[str]:
        script = "ViLD/scripts/pipeline.sh"
        return run(script, config, "out", "1", *common, *values, cwd=tmp_path, PYTHON=python, **environment)

    again = pipeline(r50, "test.score=0.5", "data.workers=7", "model.variant=text")
    assert again.returncode == 0 and "train.py" not in again.stdout and "test.py" in again.stdout, again.stderr
    assert "note:" not in again.stdout
    done = pipeline(r50, "train.lr=0.5", "model.start=other.pt")
    refused(done, "out/text", "train.lr was 0.02, now it is 0.5", "model.start", "other.pt", "DETECTOR")
    refused(pipeline(r152), "out/text", "model.trunk")
    another = pipeline(r50, "train.lr=0.5", DETECTOR="slow")
    assert another.returncode == 0 and "--work-dir out/slow" in another.stdout, another.stderr
    assert "note: out/proposer is taken as it is, though train.lr was 0.02, now it is 0.5" in another.stdout
    done = pipeline(r50, "data.novel=['dog']", f"data.train_annotations={tmp_path / 'other.json'}", DETECTOR="new")
    refused(done, "out/proposer", "data.novel", "data.train_annotations", "another OUT")
    refused(pipeline(r50, DETECTOR="store"), "DETECTOR", "store")
