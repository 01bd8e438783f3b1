"""Make docs/api/*.md from the docstrings; ``--check`` only says what is missing.

The source is read, not imported, so that nothing needs to be installed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
# Page -> packages or modules whose public names it lists, and what it says first.
PAGES = {
    "open_clip": (("open_clip",), "The model package: models, dense and region embeddings, weights, prompts."),
    "training": (("training",), "Training programs: the engine, methods, teachers, data and evaluation."),
    "ovdet": (("ovdet",), "Open-vocabulary detection."),
    "ovseg": (("ovseg",), "Open-vocabulary segmentation."),
}
_OF_TORCH = ("forward", "backward", "train", "extra_repr", "state_dict", "load_state_dict")  # torch says what they do
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: Sequence[ast.stmt], names: set[str] | None = None) -> Iterator[Definition]:
    """Definitions of a module or class that callers may use: without underscore, or those that ``__all__`` lists."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_") and (names is None or node.name in names):
            yield node


def exported(tree: ast.Module) -> set[str] | None:
    """Names of a module's ``__all__``; None when it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return None


def is_plain(node: Definition) -> bool:
    """Whether a definition explains itself: a nested protocol stub, an overload, or a property's setter."""
    decorators = {ast.unparse(d).split(".")[-1] for d in node.decorator_list}
    return bool(decorators & {"overload", "setter", "override"})


def signature(node: Definition) -> str:
    """``name(arguments) -> result`` of a function, or of a class's constructor."""
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None:
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            return f"{node.name}({', '.join(ast.unparse(f) for f in fields)})" if fields else node.name
        return f"{node.name}({_without_self(init)})"
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"{node.name}({_without_self(node)}){result}"


def _without_self(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = ast.unparse(node.args)
    for own in ("self", "cls"):
        text = text.removeprefix(own).removeprefix(", ") if text == own or text.startswith(own + ",") else text
    return text


def modules(packages: Sequence[str]) -> Iterator[tuple[str, ast.Module]]:
    """(dotted name, syntax tree) of every public module below the packages."""
    for package in packages:
        for file in sorted((SRC / package.replace(".", "/")).rglob("*.py")):
            parts = file.relative_to(SRC).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if any(p.startswith("_") for p in parts):
                continue
            yield ".".join(parts), ast.parse(file.read_text(encoding="utf-8"))


def _documented_by_a_base(name: str, bases: Sequence[str], classes: dict[str, ast.ClassDef]) -> bool:
    """Whether a class above says what a method of this name does."""
    for base in bases:
        node = classes.get(base.split(".")[-1].split("[")[0])
        if node is None:
            continue
        own = next((m for m in node.body if isinstance(m, Definition) and m.name == name), None)
        if own is not None and ast.get_docstring(own):
            return True
        if _documented_by_a_base(name, [ast.unparse(b) for b in node.bases], classes):
            return True
    return False


def undocumented(packages: Sequence[str]) -> list[str]:
    """Public names without a docstring; a method may leave it to the base class that it overrides."""
    every = [tree for _, tree in modules([p for pages, _ in PAGES.values() for p in pages if (SRC / p).is_dir()])]
    classes = {n.name: n for tree in every for n in tree.body if isinstance(n, ast.ClassDef)}
    missing = []
    for name, tree in modules(packages):
        if ast.get_docstring(tree) is None and tree.body:
            missing.append(name)
        for node in public(tree.body):
            if ast.get_docstring(node) is None and not is_plain(node):
                missing.append(f"{name}.{node.name}")
            if not isinstance(node, ast.ClassDef):
                continue
            bases = [ast.unparse(b) for b in node.bases]
            for method in public(node.body):
                plain = isinstance(method, ast.ClassDef) or is_plain(method) or method.name in _OF_TORCH
                if not plain and ast.get_docstring(method) is None:
                    if not _documented_by_a_base(method.name, bases, classes):
                        missing.append(f"{name}.{node.name}.{method.name}")
    return missing


def page(packages: Sequence[str], title: str, intro: str) -> str:
    """One page in Markdown."""
    lines = [f"# `{title}`", "", intro, "", "Made by `python tools/api_reference.py` from the docstrings.", ""]
    for name, tree in modules(packages):
        definitions = list(public(tree.body, exported(tree)))
        if not definitions:
            continue
        lines += [f"## {name}", "", *_text(ast.get_docstring(tree)), ""]
        for node in definitions:
            lines += [f"### `{node.name}`", "", "```python", signature(node), "```", ""]
            lines += [*_text(ast.get_docstring(node)), ""]
            if isinstance(node, ast.ClassDef):
                for method in public(node.body):
                    text = ast.get_docstring(method)
                    if isinstance(method, ast.ClassDef) or not text:
                        continue
                    lines += [f"#### `{node.name}.{method.name}`", ""]
                    lines += ["```python", signature(method), "```", "", *_text(text), ""]
    return "\n".join(lines).rstrip() + "\n"


def _text(docstring: str | None) -> list[str]:
    """A docstring as Markdown: double backquotes become single, sections become bold, items become lists."""
    if not docstring:
        return []
    out = []
    for line in inspect.cleandoc(docstring).replace("``", "`").splitlines():
        stripped = line.strip()
        if stripped in ("Args:", "Returns:", "Raises:", "Attributes:", "Yields:", "Example:", "Examples:"):
            out += ["", f"**{stripped[:-1]}**", ""]
        elif line.startswith("    ") and not line.startswith("     "):
            out.append("- " + stripped)
        elif line.startswith("     "):
            out.append("  " + stripped)
        else:
            out.append(stripped)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the pages. Exit status 1 when a check finds something."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a docstring is missing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "api", help="folder of the pages")
    args = parser.parse_args(argv)
    missing = []
    for title, (packages, intro) in PAGES.items():
        packages = [p for p in packages if (SRC / p).is_dir()]
        if not packages:
            continue
        missing += undocumented(packages)
        if not args.check:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{title}.md").write_text(page(packages, title, intro), encoding="utf-8")
            print(f"{args.out / title}.md")
    for name in missing:
        print(f"no docstring: {name}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
