"""Every command that the documents show exists and parses; the slow test runs those that small data allows."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ovdet.fvit.assemble import read_config
from ovdet.vild.assemble import read_config as read_vild_config
from training.engine.errors import UserError
from training.engine.flags import flags_of, spelling
from training.methods import list_methods
from training.options import ROOMS
from training.params import _WITHOUT_EFFECT

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    f for p in ("*.md", "*/README.md", "docs/*.md") for f in ROOT.glob(p) if not f.parent.name.startswith(".")
)
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:python|bash|torchrun) \S")
LAUNCHER_ALONE = re.compile(r"^torchrun(?!.*(\.py| -m))")  # a flag of torchrun, not a command
OWN_EXAMPLE = re.compile(r"--method (mine|areas)\b")  # of the text; tests/training/methods/test_extending.py runs it
READERS = {"F-ViT": read_config, "ViLD": read_vild_config}  # of configs, by the folder of a document
# Words that stand for what a user has.
MEANING = {
    "CONFIG": "configs/ov_coco_vitb16_original.toml", "MODE": "full", "CHECKPOINT": "epoch_3.pt",
    "NUM_PROCESSES": "2", "N": "2", "IMAGE|FOLDER...": "a.jpg", "DIR": "folder",
    "IMAGE...": "a.jpg", "FILE": "epoch_3.pt", "bbox|segm": "bbox", "NAME": "mine", "CLASS": "cat", "FOLDER": "folder",
    "PHOTOS": "--images val2017 --annotations panoptic_val2017.json",
}  # fmt: skip
THEIRS = {"ViLD/README.md": {"CONFIG": "configs/lvis_r50_ensemble.toml"}}  # in a document
# Scripts hand further arguments on to a program.
FORWARDS = {
    r"scripts/(train|test)_\w+\.sh": "training.main", r"scripts/segment_\w+\.sh": "ovseg.evaluate",
    r"dist_train\.sh": "train.py", r"dist_test\.sh": "test.py",
}  # fmt: skip
OTHERS_FLAGS = {"--nproc_per_node", "--nnodes", "--node_rank", "--max-restarts", "--logs-specs", "--slow", "--smoke",
                "--force-reinstall", "--help"}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A command of a document: its text, the number of its line, and whether it stands in a code block."""

    document: str
    line: int
    text: str
    block: bool = False


def commands_of(document: Path) -> list[Shown]:
    """Commands in the code blocks and in the inline code of a document, with continued lines joined."""
    found, fence, pending, start = [], None, "", 0
    name = str(document.relative_to(ROOT))
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fence, pending = line.strip() if fence is None else None, ""
            continue
        if fence in ("```", "```bash"):
            pending, start = pending + line.strip(), start if pending else number
            if pending.endswith("\\"):
                pending = pending[:-1]
                continue
            found.append((start, pending, True))
            pending = ""
        elif fence is None:
            found += [(number, code, False) for code in re.findall(r"`([^`]+)`", line)]
    texts = ((number, re.sub(r"\s+#\s.*$", "", text), block) for number, text, block in found)
    shown = [Shown(name, n, " ".join(t.replace("\\|", "|").split()), b) for n, t, b in texts if COMMAND.match(t)]
    shown = [s for s in shown if "..." not in re.sub(r"\[[^\]]*\]|[A-Z]\.\.\.", "", s.text)]  # a part of a command
    return [s for s in shown if not LAUNCHER_ALONE.search(s.text) and not OWN_EXAMPLE.search(s.text)]


ALL = [shown for document in DOCUMENTS for shown in commands_of(document)]


class Parsed(BaseException):
    """Stops a program where its command line is understood."""


@contextlib.contextmanager
def stopped_after_parsing(monkeypatch):
    """Programs end with :class:`Parsed` as soon as their command line has been taken."""
    for method in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, method)

        def stop(self, args=None, namespace=None, original=original):
            raise Parsed(original(self, args, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, method, stop)
    yield


def program_file(name: str, folder: Path) -> Path:
    """A script by the name that a command gives it, in the repository's folder or in that of its document."""
    found = [f for f in (folder / name, ROOT / name) if f.is_file()]
    assert found, f"{name} is neither in {folder} nor in {ROOT}"
    return found[0]


def entry_point(file: Path):
    """The function that takes the command line of a python file."""
    if file.parent.name in ("F-ViT", "GLIP", "ViLD") or file.parent.parent.name in ("F-ViT", "GLIP", "ViLD"):
        module = re.search(r"from (ovdet[\w.]*) import (\w+)", file.read_text())
        return importlib.import_module(f"{module[1]}.{module[2]}").main
    sys.path.insert(0, str(file.parent))  # as for a script: benchmarks import each other
    try:
        spec = importlib.util.spec_from_file_location(f"documented_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module.main


def words_of(shown: Shown) -> list[str]:
    """The words of a command, without what is optional in it being marked so, and with meaning for placeholders."""
    words = []
    for word in shlex.split(re.sub(r"(?<=\s)\[([^\]]*)\]", r"\1", shown.text).replace(" ...", "")):
        if words[-1:] == ["--method"] and word == "NAME":
            word = "declip"
        meaning = {**MEANING, **THEIRS.get(shown.document, {})}
        words += meaning[word].split() if word in meaning else [word.split("|")[0]]
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words.pop(0)
    return [w for w in words if w != "section.key=value"]


def check(words: list[str], folder: Path) -> None:
    """AssertionError or UserError where a command would not start."""
    kind, *rest = words
    if kind == "torchrun":
        assert "--" in rest, "torchrun needs -- before the program"
        kind, rest = "python", (["-m"] if "-m" in rest else []) + rest[rest.index("--") + 1 :]
    if kind == "bash":
        script = program_file(rest[0], folder)
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        forward = next((p for pattern, p in FORWARDS.items() if re.fullmatch(pattern, rest[0])), None)
        if forward is None:
            return
        rest = [w for i, w in enumerate(rest[1:]) if not (rest[0].startswith("scripts/test_") and i < 2)]
        if forward == "training.main":
            rest += ["--train-data", "x", "--train-image-root", "x"]
        elif forward == "ovseg.evaluate":
            rest += ["--model", "x", "--dataset", "voc20", "--data-root", "x"]
        else:  # the number of processes
            rest.pop(1 if forward == "train.py" else 2)
        kind, rest = "python", (["-m"] if "." in forward and not forward.endswith(".py") else []) + [forward, *rest]
    if rest[0] == "-m":
        found = importlib.util.find_spec(rest[1])
        assert found, f"there is no module {rest[1]}"
        module = importlib.import_module(rest[1] + (".__main__" if found.submodule_search_locations else ""))
        main, arguments = module.main, rest[2:]
    elif rest[0] == "-c":
        compile(rest[1], "-c", "exec")
        return
    else:
        main, arguments = entry_point(program_file(rest[0], folder)), rest[1:]
    if not arguments:  # named in a sentence
        return
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["program", *arguments])
            main()
    except Parsed as parsed:
        given = parsed.args[0]
        if folder.name in READERS and hasattr(given, "overrides"):
            READERS[folder.name](str(program_file(given.config, folder)), given.overrides)
        return
    raise AssertionError(f"{' '.join(words)} ended before its command line was taken")


def test_documents_have_commands():
    documents = {"README.md", "F-ViT/README.md", "ViLD/README.md", "benchmarks/README.md"}
    assert len(ALL) > 30 and documents <= {s.document for s in ALL}


@pytest.mark.parametrize("shown", ALL, ids=[f"{s.document}:{s.line}" for s in ALL])
def test_it_exists_and_parses(shown, monkeypatch, capsys):
    """Programs answer a wrong command line with exit status 2; here nothing of the kind may happen."""
    folder = (ROOT / shown.document).parent
    with stopped_after_parsing(monkeypatch):
        check(words_of(shown), folder)


def test_a_wrong_command_is_found(monkeypatch, capsys):
    """The check itself fails for what is not there."""
    for text, error in [
        ("bash scripts/nothing.sh", AssertionError), ("python tools/show.py a.jpg --model x --outt y", AssertionError),
        ("bash scripts/segment_voc.sh --reedouts value", AssertionError),
        ("python -m training.main --epoch 3 --nme x", AssertionError), ("python -m training.nothing", AssertionError),
    ]:  # fmt: skip
        with stopped_after_parsing(monkeypatch), pytest.raises(error):
            check(words_of(Shown("README.md", 1, text)), ROOT)
    with pytest.raises(UserError, match="batch_size"):
        read_config(str(ROOT / "F-ViT/configs/ov_coco_vitb16_original.toml"), ["train.batchsize=1"])


def test_flags_in_the_text_exist():
    """Every ``--flag`` in inline code is one that some program has, or the example in docs/extending.md adds."""
    known = {"--area-power"} | set(OTHERS_FLAGS) | {spelling(n) for n in _WITHOUT_EFFECT}
    for cls in (*ROOMS.values(), *(e.options for e in list_methods().values())):
        known |= {spelling(n) for n in flags_of(cls)}
    for place in ("src", "tools", "benchmarks", "scripts", "F-ViT", "GLIP", "ViLD"):
        for file in (f for suffix in ("*.py", "*.sh") for f in (ROOT / place).rglob(suffix)):
            known |= set(re.findall(r"--[a-z][a-z0-9-]+", file.read_text(encoding="utf-8")))
    unknown = [
        f"{document.relative_to(ROOT)}:{number}: {flag}"
        for document in DOCUMENTS
        for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1)
        for code in re.findall(r"`([^`]+)`", line)
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", code)
        if flag not in known
    ]
    assert not unknown, "\n".join(unknown)


def test_links_lead_somewhere():
    broken = []
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target and not target.startswith("mailto:") and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


# -- really run, on small data ----------------------------------------------------------------------------------------

TINY_VISION = {"layers": 12, "width": 32, "head_width": 8, "mlp_ratio": 2.0, "eva_model_name": "tiny", "rope": True,
               "naiveswiglu": True, "subln": True}  # fmt: skip
TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
NOT_RUN = {
    r"quickstart\.sh|scripts/test\.sh": "installs; tests of their own",
    r"segment_\w+\.sh|ovseg\.evaluate": "needs a data set; tests/ovseg runs it",
    r"training\.scenes": "2000 scenes; tests/training/scenes runs it",
    r"torchrun": "8 GPUs",
    r"training\.propose": "downloads a foundation model; tests/training/test_propose.py and a recipe run it",
    r"real_photos": "tests/test_real_photos.py runs it",
}  # fmt: skip
RECIPES = sorted(f.name for f in (ROOT / "scripts").glob("train_*.sh"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository whose B/16 and L/14 are tiny, with data and checkpoints where README puts them."""
    import torch

    import open_clip
    from open_clip.weight_files import save_weights
    from open_clip.weights import export_state_dict
    from training.scenes.compose import SceneOptions
    from training.scenes.generate import write_dataset

    root = tmp_path_factory.mktemp("clone") / "repository"
    for name in ("src", "scripts", "tools", "metadata"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (root / "checkpoints").mkdir()
    for name, size, patch, file in [
        ("EVA02-CLIP-B-16", 32, 16, "EVA02_CLIP_B_psz16_s8B.pt"),
        ("EVA02-CLIP-L-14-336", 28, 14, "EVA02_CLIP_L_336_psz14_s6B.pt"),
    ]:
        vision = {**TINY_VISION, "image_size": size, "patch_size": patch}
        layers = 24 if "L-14" in name else 12
        config = {"embed_dim": 16, "vision_cfg": {**vision, "layers": layers}, "text_cfg": TINY_TEXT}
        (root / "src" / "open_clip" / "model_configs" / f"{name}.json").write_text(json.dumps(config))
        alias = f"documented-{patch}"
        (root / f"{alias}.json").write_text(json.dumps(config))
        open_clip.add_model_config(root / f"{alias}.json", alias)
        torch.manual_seed(0)
        model = open_clip.create_model(alias, pretrained=None)
        save_weights(export_state_dict(model), root / "checkpoints" / file, name)
    coco = root / "data" / "coco"
    write_dataset(coco, train=4, val=2, options=SceneOptions(size=64, things=4, stuff=2))
    instances = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    for name in ("coco_proposals.json", "coco_pseudo_4764.json"):
        (coco / name).write_text(json.dumps(instances))
    for image in instances["images"]:
        image["file_name"] = f"train2017/{image['file_name']}"
    (root / "data" / "lvis_v1" / "annotations").mkdir(parents=True)
    (root / "data" / "lvis_v1" / "annotations" / "lvis_v1_train.json").write_text(json.dumps(instances))
    shutil.copytree(coco / "train2017", root / "my_images")
    shutil.copy(next((root / "my_images").glob("*.jpg")), root / "my_images" / "a.jpg")
    (root / "my_classes.txt").write_text("dog\nsky\n")
    for run in ("my_run", "mine"):
        (root / "logs" / run / "checkpoints").mkdir(parents=True)
        shutil.copy(root / "checkpoints" / "EVA02_CLIP_B_psz16_s8B.pt", root / "logs" / run / "checkpoints/clipself.pt")
    return root


def really_run(command: str, clone: Path) -> None:
    """AssertionError with the end of what the command said, unless its exit status is 0."""
    environment = {
        **os.environ, "CLIPSELF_DOCS_SMOKE": "1", "NPROC": "1", "PYTHON": sys.executable, "HOME": str(clone),
        "PYTHONPATH": str(clone / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.pop("CLIPSELF_VENV", None)
    command = re.sub(r"^python ", f"{sys.executable} ", command)
    run = subprocess.run(
        ["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, f"{command}\n{run.stdout[-1500:]}\n{run.stderr[-3000:]}"


@pytest.mark.slow
def test_readme_runs_literally(clone):
    """README's commands in their order, each as it stands there."""
    ran = []
    for shown in (s for s in ALL if s.document == "README.md" and s.block):
        if any(re.search(pattern, shown.text) for pattern in NOT_RUN):
            continue
        if "--name mine" in shown.text:
            shutil.rmtree(clone / "logs" / "mine")
        really_run(shown.text, clone)
        ran.append(shown.text)
    assert len(ran) >= 4, ran


@pytest.mark.slow
@pytest.mark.parametrize("script", RECIPES)
def test_every_recipe_runs(clone, script):
    really_run(f"bash scripts/{script}", clone)
    folder = clone / "logs" / script.removeprefix("train_").removesuffix(".sh")
    assert (folder / "checkpoints" / "clipself.pt").is_file() and (folder / "results.json").is_file()
