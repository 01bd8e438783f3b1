"""The command line: what old lines mean, what recipes expand to, and which flags are refused or said to do nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from training.engine.errors import UserError
from training.engine.flags import PATH, Parser, add_flags, flag, flags_of, take
from training.engine.folder import named_folder
from training.methods import list_methods
from training.options import ROOMS
from training.params import make_parser, parse_args

DATA = ["--train-data", "x.json", "--train-image-root", "images"]


def parse(*flags: str):
    return parse_args([*DATA, *flags])


@pytest.mark.parametrize(
    ("flags", "method", "source"),
    [
        ([], "clipself", "grid_distill"),
        (["--dataset-type", "grid_distill"], "clipself", "grid_distill"),
        (["--dataset-type=proposals_distill"], "clipself", "proposals_distill"),
        (["--dataset-type", "region_clip"], "regionclip", "region_clip"),
        (["--dataset-type", "contrastive"], "contrastive", "contrastive"),
        (["--method", "regionclip"], "regionclip", "region_clip"),
        (["--method", "declip", "--dataset-type", "mixed_distill"], "declip", "mixed_distill"),
        (["--recipe", "synclip-b16-free"], "synclip", "grid_distill"),
        (["--recipe", "synclip-b16-free", "--dataset-type", "mixed_distill"], "synclip", "mixed_distill"),
    ],
)
def test_method_and_data_source(flags, method, source):
    options = parse(*flags)
    assert (options.entry.name, options.data.dataset_type) == (method, source)


def test_published_command_lines():
    """A line of the published scripts: flags that are never read there, or do nothing here, are named once."""
    options = parse(
        "--batch-size=2", "--lr=1e-5", "--wd=0.1", "--epochs=6", "--workers=4", "--model", "EVA02-CLIP-B-16",
        "--pretrained", "eva", "--warmup", "1000", "--zeroshot-frequency", "1", "--dataset-type", "grid_distill",
        "--test-type", "coco_panoptic", "--lock-image", "--save-frequency", "6", "--lock-image-unlocked-groups", "12",
        "--extract-type=v2", "--downsample-factor", "16", "--det-image-size", "1024", "--alpha", "0.7",
        "--force-image-size", "336", "--image-mean", "0.5", "0.5", "0.5", "--ddp-static-graph", "--force-quick-gelu",
    )  # fmt: skip
    idle = "--test-type, --image-mean, --force-image-size, --ddp-static-graph"
    assert options.warnings == (f"{idle}: without effect here",)
    assert options.model.force_quick_gelu and options.optim.alpha == 0.7 and options.own.extract_type == "v2"
    assert options.model.lock_image_unlocked_groups == 12 and options.regions.max_boxes == 20


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset-type", "region_clip", "--cosine-weight", "2"], ["--cosine-weight", "regionclip"]),
        (["--method", "contrastive", "--multiscale"], ["--multiscale is a flag of", "not of contrastive"]),
        (["--method", "contrastive", "--dataset-type", "grid_distill"], ["contrastive", "cannot learn from"]),
        (["--method", "nonsense"], ["nonsense", "clipself"]),
        (["--recipe", "nonsense"], ["nonsense", "declip-b16"]),
        (["--recipe", "declip-b16", "--method", "clipself"], ["declip-b16", "--method declip"]),
        (["--dataset-type", "nonsense"], ["nonsense", "grid_distill"]),
        (["--method", "a.b"], ["a.b", "docs/extending.md"]),
        (["--cache-teacher", "x"], ["--fixed-regions", "proposals_distill"]),
        (["--dataset-type", "region_clip", "--cache-teacher", "x"], ["regionclip has no teacher"]),
        (["--batch-siz", "2"], ["--batch-siz"]),
        (["--min-size", "30", "--max-size", "20"], ["30", "20"]),
    ],
)
def test_what_does_not_go_together(flags, words):
    with pytest.raises(UserError) as caught:
        parse(*flags)
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value), caught.value


def test_flags_of_regions_that_are_not_drawn_are_named():
    warnings = parse("--dataset-type", "proposals_distill", "--max-split", "3", "--min-size", "4").warnings
    assert warnings == ("--max-split: without effect with --dataset-type proposals_distill",)
    assert parse("--max-split", "3").warnings == ()


@pytest.mark.parametrize("recipe", [r for e in list_methods().values() for r in e.recipes])
def test_recipes(recipe):
    """They parse, belong to their method, and what is given by hand goes first."""
    options = parse("--recipe", recipe)
    assert recipe in options.entry.recipes and not options.warnings
    if "alpha" in options.given:
        assert 0 < options.optim.alpha < 1 and parse("--recipe", recipe, "--alpha", "0.25").optim.alpha == 0.25
    if recipe.endswith("-released"):
        usual = parse("--recipe", recipe.removesuffix("-released"))
        assert options.own.as_released and not usual.own.as_released
        assert dataclasses.replace(options.own, as_released=False) == usual.own


def test_options_are_typed_frozen_and_complete():
    options = parse("--eval-image-sizes", "512", "1024", "512", "--seed", "3")
    assert options.eval.eval_image_sizes == (512, 1024) and parse().eval.eval_image_sizes == (1024,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.run.seed = 4
    flat = options.flat()
    assert flat["method"] == "clipself" and flat["seed"] == 3 and flat["eval_image_sizes"] == [512, 1024]
    for cls in (*ROOMS.values(), options.entry.options):
        assert set(flags_of(cls)) <= set(flat)


def test_no_two_flags_of_one_name_differ():
    make_parser()  # raises otherwise

    @dataclasses.dataclass(frozen=True)
    class Other:
        alpha: str = flag("x", "another alpha")

    seen: dict = {}
    parser = make_parser()
    for cls in ROOMS.values():
        seen |= flags_of(cls)
    with pytest.raises(ValueError, match="--alpha"):
        add_flags(parser, Other, seen)
    assert take(Other, {"alpha": "y", "beta": 1}) == Other("y")


def test_an_empty_word_is_no_path():
    """It would be the working folder."""
    parser = Parser()
    parser.add_argument("--out", type=PATH)
    assert parser.parse_args(["--out", "a/b"]).out == Path("a/b")
    with pytest.raises(UserError, match="--out: an empty word is no path"):
        parser.parse_args(["--out", ""])
    with pytest.raises(UserError, match="--logs is an empty word"):
        named_folder("", "run")


def test_help_is_short_and_has_examples(capsys):
    for flags, least, most in ((["--help"], 30, 90), (["--help-all"], 90, 250)):
        with pytest.raises(SystemExit) as end:
            parse_args(flags)
        text = capsys.readouterr().out
        assert end.value.code == 0 and least < text.count("\n") < most, text.count("\n")
        assert text.count("\n", 0, text.index("examples:")) < 8 and "--recipe clipself-b16" in text
        assert all(name in text for name in list_methods()) and "--vfm" not in text
    with pytest.raises(SystemExit):
        parse_args(["--method", "declip", "--help"])
    assert "--vfm" in capsys.readouterr().out


def test_openclips_names_of_the_schedule():
    options = parse("--lr-scheduler", "const-cooldown", "--epochs-cooldown", "3")
    assert options.optim.lr_cooldown_epochs == 3 and options.warnings == ()
    options = parse("--skip-scheduler")
    assert (options.optim.lr_scheduler, options.optim.warmup, options.warnings) == ("const", 0, ())
