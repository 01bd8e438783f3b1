"""Every public name says what it does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "tools" / "api_reference.py"
spec = importlib.util.spec_from_file_location("api_reference", FILE)
api_reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(api_reference)


def test_every_public_name_has_a_docstring(capsys):
    status = api_reference.main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_pages_show_signatures_and_sections(tmp_path):
    assert api_reference.main(["--out", str(tmp_path)]) in (0, 1)
    text = (tmp_path / "open_clip.md").read_text()
    assert "create_model(" in text and "**Raises**" in text and "``" not in text.replace("```", "")
