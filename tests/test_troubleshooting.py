"""Messages that docs/troubleshooting.md quotes are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GAP = "\N{HORIZONTAL ELLIPSIS}"


def texts_of_the_code() -> list[str]:
    """All strings in the sources; what is filled in stands as a gap."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.0-9]*[a-z]", GAP, node.value))
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else GAP for v in node.values)
                found.append("".join(map(str, parts)))
    return found


def test_quoted_messages_are_real():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", text, re.M)
    assert len(messages) >= 20 and len(set(messages)) == len(messages)
    code = texts_of_the_code()
    for message in messages:
        fragments = [part.strip() for part in message.split(GAP) if len(part.strip(" :;,()")) > 4]
        assert fragments, message
        missing = [f for f in fragments if not any(f.removeprefix("is ") in line for line in code)]
        assert not missing, f"{message}: the code says nothing like {missing}"
