"""The README's table of models agrees with the configs and the tags, and what other documents list is all there is."""

from __future__ import annotations

import re
from pathlib import Path

import timm

import open_clip

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| (\d+) \| (.*) \|$", re.M)


def test_models_have_the_sizes_and_tags_of_the_table():
    rows = ROW.findall((ROOT / "README.md").read_text(encoding="utf-8").partition("## Models")[2])
    assert len(rows) > 10
    for name, patch, size, width, tags in rows:
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        trunk = vision.get("timm_model_name")
        # timm names the patch, and its configs hold no number of it.
        own = int(re.search(r"patch(\d+)", trunk)[1]) if trunk else vision["patch_size"]
        assert not trunk or timm.is_model(trunk), name
        assert [own, vision["image_size"], config["embed_dim"]] == [int(patch), int(size), int(width)], name
        assert set(re.findall(r"`(\w+)`", tags)) <= set(open_clip.list_pretrained_tags_by_model(name)), name


# -- the other documents ----------------------------------------------------------------------------------------------


def documented_paths() -> set[str]:
    """Every path in the tree of data/README.md: an entry stands below the last one that is less indented."""
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8").split("```")[1]
    paths, above = set(), []
    for line in text.splitlines():
        entry = re.match(r"( *)(\S.*?)(?:   |$)", line)
        if not line.strip() or len(entry[1]) > 20:  # what goes on from the line above
            continue
        above = [(depth, place) for depth, place in above if depth < len(entry[1])]
        for name in entry[2].split("  "):
            path = "".join(place for _, place in above) + name.split(" ")[0].removesuffix("*.jpg").removesuffix("*.png")
            paths.add(path.rstrip("/"))
        above.append((len(entry[1]), entry[2].split(" ")[0]))
    return paths


def values(section: dict, *endings: str) -> set[str]:
    return {v for k, v in section.items() if k.endswith(endings) and isinstance(v, str) and v.startswith("data/")}


def test_every_path_of_a_config_is_in_the_layout_of_the_data():
    """One layout, and one spelling of each folder, over all detectors."""
    known, named = documented_paths(), set()
    for file in (f for folder in ("F-ViT", "GLIP", "ViLD") for f in (ROOT / folder / "configs").rglob("*.toml")):
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        named |= values(content.get("data", {}), "_annotations", "_images", "proposals", "store", "sentences")
        grounding = content.get("set", {})
        named |= values(grounding, "annotations", "images") | {
            f"{grounding['images']}/{pair.split('=')[1]}" for pair in grounding.get("folders", [])
        }
    named -= {"data/coco", "data"}  # roots of file names that begin with a folder
    assert len(named) > 20 and not named - known, sorted(named - known)
    recipes = "".join(f.read_text() for f in (ROOT / "scripts").glob("*.sh"))
    for variable, folder in (("DATA", "data/coco"), ("LVIS", "data/lvis_v1")):
        for path in re.findall(rf"\${variable}/([\w/]+\.json)", recipes):
            assert f"{folder}/{path}" in known or path == "lvis_v1_train.json", path


def test_every_weights_file_of_a_config_is_made_by_a_recipe():
    text = (ROOT / "checkpoints" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+\.pt)` \| .* \| `?([^|`]+)`? \|$", text, re.M))
    found = set()
    for file in (ROOT / "F-ViT" / "configs").rglob("*.toml"):
        named = tomllib.loads(file.read_text(encoding="utf-8")).get("model", {}).get("cache_dir", "")
        if named:
            name = Path(named).name
            assert name in rows, f"checkpoints/README.md does not say where {name} comes from"
            if file.stem.startswith("ov_"):
                assert f"`{file.stem}`" in text and (ROOT / rows[name]).is_file(), name
            found.add(name)
    assert found == set(rows)


def test_every_extra_is_named():
    declared = re.findall(r'^    "(\w+)": ', (ROOT / "setup.py").read_text(encoding="utf-8"), re.M)
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Install")[2].partition("## ")[0]
    assert len(declared) > 5 and all(f"`{extra}`" in text or f"[{extra}]" in text for extra in declared)


def test_the_citation_has_what_its_format_asks_for():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert {"authors", "cff-version", "message", "title"} <= set(re.findall(r"^([\w-]+):", text, re.M))


def test_tables_that_new_parts_are_entered_in_are_named():
    """docs/extending.md promises no more than that: what stands in a table, stands there under this name."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for table, file in [
        ("_READOUTS", "src/open_clip/readouts/__init__.py"), ("SOURCES", "src/training/data/options.py"),
        ("REGION_SOURCES", "src/training/data/loader.py"), ("_READ", "src/training/params.py"),
    ]:  # fmt: skip
        assert f"`{table}`" in text, table
        assert re.search(rf"^{table}\b", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file} has no {table}"
