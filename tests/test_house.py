"""The house: who may import whom, how long a file may be, and that a thing stands once."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
FLOORS = ("open_clip", "training", "ovseg", "ovdet")
PROGRAMS = ("F-ViT", "ViLD", "GLIP")  # folders of commands, on top of ovdet
MAX_LINES = 400
TWIN_LINES = 8


def module_name(file: Path) -> str:
    parts = file.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@lru_cache
def modules() -> dict[str, Path]:
    return {module_name(f): f for floor in FLOORS for f in sorted((SRC / floor).rglob("*.py"))}


def imported(file: Path, name: str, *, everywhere: bool = True) -> set[str]:
    """Modules of the project that a file imports: all of them, or only those that run when it is imported itself."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not everywhere:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not everywhere:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules() else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {m for m in found if m.split(".")[0] in FLOORS}


def within(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


# Who (by the longest fitting name) may import what of the project.
ALLOWED = {
    "open_clip": ("open_clip",),
    "training": ("open_clip", "training"),
    "training.engine": ("training.engine",),
    "training.class_embeddings": ("open_clip", "training.engine"),
    "training.data": ("open_clip.transform", "training.engine", "training.data"),
    "training.scenes": ("training.engine", "training.scenes"),
    "training.teachers": ("open_clip", "training.engine", "training.data", "training.teachers"),
    "training.methods": ("open_clip", "training.engine", "training.teachers", "training.methods"),
    "training.evaluation": ("open_clip", "training.engine", "training.class_embeddings", "training.evaluation"),
    "ovseg": ("open_clip", "training.engine", "training.class_embeddings", "ovseg"),
    "ovdet": ("open_clip", "training.engine", "training.class_embeddings", "ovdet"),
    "ovdet.parts": ("open_clip", "training.engine", "ovdet.parts"),
}
DETECTORS = ("ovdet.fvit", "ovdet.vild", "ovdet.glip")


def test_imports_go_one_way():
    wrong = []
    for name, file in modules().items():
        owner = max((a for a in ALLOWED if within(name, a)), key=len)
        for other in imported(file, name):
            if not within(other, *ALLOWED[owner]):
                wrong.append(f"{name} imports {other}; {owner} may import {', '.join(ALLOWED[owner])}")
            mine = next((d for d in DETECTORS if within(name, d)), None)
            theirs = next((d for d in DETECTORS if within(other, d)), None)
            if mine and theirs and mine != theirs:
                wrong.append(f"{name} imports {other}: detectors know the shared parts, not each other")
            if within(name, "ovdet.parts") and "config" in other:
                wrong.append(f"{name} imports {other}: parts take numbers and modules, never a config")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_import_runs_in_a_circle():
    graph = {n: {o for o in imported(f, n, everywhere=False) if o in modules()} for n, f in modules().items()}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "imports run in a circle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name] - {name}):
                walk(other, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("folder", [p for p in PROGRAMS if (ROOT / p).is_dir()])
def test_commands_import_the_detection_package_only(folder):
    wrong = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            lower = [n for n in names if within(n, "open_clip", "training", "ovseg")]
            wrong += [f"{file.relative_to(ROOT)} imports {name}" for name in lower]
    assert not wrong, "\n".join(wrong)


def test_files_stay_short():
    folders = [SRC, *(ROOT / p for p in PROGRAMS), ROOT / "tools", ROOT / "benchmarks"]
    long = {
        str(f.relative_to(ROOT)): n
        for folder in folders
        for f in sorted(folder.rglob("*.py"))
        if (n := len(f.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"files of more than {MAX_LINES} lines: {long}"


COLLECTIVES = ("all_reduce_sum", "all_reduce", "all_gather", "broadcast", "reduce")
FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange")


def made_on_the_host(function: ast.AST) -> list[int]:
    """Lines of a function where a collective gets a tensor that was made there without a device."""

    def hostly(node: ast.AST | None) -> bool:
        made = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES
        return made and ast.unparse(node.func.value) == "torch" and not any(k.arg == "device" for k in node.keywords)

    values: dict[str, list[ast.AST]] = defaultdict(list)
    for node in ast.walk(function):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            values[ast.unparse(target)].append(node.value)
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and n.args]
    calls = [n for n in calls if ast.unparse(n.func).split(".")[-1] in COLLECTIVES]
    return [n.lineno for n in calls if any(map(hostly, [n.args[0], *values[ast.unparse(n.args[0])]]))]


def test_collectives_get_tensors_of_a_device():
    """NCCL has no collectives for tensors on the host: several GPUs would fail where several CPUs do not."""
    faulty = (
        "all_reduce_sum(torch.zeros(2))", "x = torch.tensor([1.0])\nall_reduce_sum(x)",
        "x = torch.zeros(2)\nx += 1\ndist.all_reduce(x)",
    )  # fmt: skip
    sound = (
        "all_reduce_sum(torch.zeros(2, device=d))", "x = torch.zeros(2)\nall_reduce_sum(x.to(d))",
        "x = y.sum()\nall_reduce_sum(x)",
    )  # fmt: skip
    assert all(made_on_the_host(ast.parse(content)) for content in faulty)
    assert not any(made_on_the_host(ast.parse(content)) for content in sound)
    wrong = []
    for name, file in modules().items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for function in (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))):
            wrong += [f"{name}:{line}" for line in made_on_the_host(function)]
    assert not wrong, f"tensors without a device in a collective: {', '.join(sorted(set(wrong)))}"


def code_lines(file: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that say something: no blank lines, comments, lone brackets or imports."""
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text = line.split("  #")[0].strip()
        if not re.search(r"\w", text) or text.startswith(("#", "import ", "from ", '"""')):
            continue
        lines.append((number, text))
    return lines


def test_nothing_stands_twice():
    """No run of eight lines stands in two of the packages, or in two detectors, or in one and in what they share.

    Declarations are no such run: a section of a config is the list of its own keys.
    """
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, file in modules().items():
        lines = code_lines(file)
        for i in range(len(lines) - TWIN_LINES + 1):
            window = tuple(text for _, text in lines[i : i + TWIN_LINES])
            places[window].append(f"{name}:{lines[i][0]}")
    twins = []
    for window, found in places.items():
        owners = {next((d for d in DETECTORS if within(p.split(":")[0], d)), p.split(".")[0]) for p in found}
        if len(owners) > 1 and not all(re.match(r"\w+: [^=]+ = ", line) for line in window):
            twins.append(" = ".join(found))
    assert not twins, "\n".join(twins)
