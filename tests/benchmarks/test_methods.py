"""The ranking of methods: its statistics by closed forms, and (slow) the whole of it at smoke size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import open_clip

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import methods  # noqa: E402
import photographs  # noqa: E402
import program_runs  # noqa: E402
import ranking  # noqa: E402
import ranking_rows  # noqa: E402
import ranking_start  # noqa: E402
import segments  # noqa: E402


def write_run(folder: Path, boxes: float, unseen: float) -> None:
    folder.mkdir(parents=True)
    record = {"kind": "student", "step": 7, "count.images": 3}
    for name in ("128.rois", "128.maskpool"):
        record |= {f"{name}.thing.macc1": boxes, f"{name}.stuff.macc1": 0.5}
    classes = [{"class": "dotted star", "kind": "thing", "segments": 4, "top1": unseen, "top5": 1.0},
               {"class": "waved moon", "kind": "thing", "segments": 4, "top1": 0.9, "top5": 1.0}]  # fmt: skip
    (folder / "results.json").write_text(json.dumps([record]))
    content = {n: classes for n in ("rois", "maskpool", "128.rois", "128.maskpool")}
    (folder / "per_class_student_7.json").write_text(json.dumps(content))
    for name in ("rois", "maskpool"):
        record |= {f"{name}.thing.macc1": boxes, f"{name}.stuff.macc1": 0.5}
    (folder / "results.json").write_text(json.dumps([record]))


def test_scores_and_paired_differences(tmp_path):
    for seed, (base, other) in enumerate([(0.2, 0.25), (0.3, 0.36), (0.4, 0.37)]):
        write_run(tmp_path / f"clipself-{seed}", base, 0.1)
        write_run(tmp_path / f"declip-{seed}", other, 0.3)
    runs = {
        row: {s: ranking.scores_of(tmp_path / f"{row}-{s}", [128], ["dotted star"]) for s in range(3)}
        for row in ("clipself", "declip")
    }
    assert runs["declip"][0]["128 boxes things"] == pytest.approx(25) and runs["declip"][0]["128 masks unseen"] == 30
    assert ranking.scores_of(tmp_path / "none", [128], []) is None
    differences = np.array([5.0, 6.0, -3.0])
    mean, error, wins, seeds = ranking.compare(runs["declip"], runs["clipself"], "128 boxes things")
    assert mean == pytest.approx(differences.mean()) and (wins, seeds) == (2, 3)
    assert error == pytest.approx(differences.std(ddof=1) / math.sqrt(3))
    assert all(math.isnan(v) for v in ranking.compare({}, runs["clipself"], "128 boxes things")[:2])
    names = ranking.metrics([128])
    text = ranking.table(runs, {"value": runs["clipself"][0]}, names, "clipself", {"declip": 1e-3})
    assert "| untrained, `value` |" in text and "32.7 (+2.7 ± 2.8, 2/3)" in text and text.count("\n") == 5
    some = {"128 boxes things": 1.0, "128 boxes stuff": 2.0, "192 boxes things": 6.0, "192 boxes stuff": 7.0,
            "128 boxes unseen": 50.0, "128 masks things": 9.0}  # fmt: skip
    wanted = {"128 boxes": 1.5, "boxes": 4.0, "masks": 9.0, "boxes things": 3.5, "128 boxes unseen": 50.0}
    assert {name: ranking.value(some, name) for name in wanted} == wanted
    with pytest.raises(KeyError):
        ranking.value(some, "256 boxes")
    ranking.picture(runs, names, "clipself", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_what_of_another_ranking_can_be_used():
    """Rates always; a seed's runs where its start model is this one, or where all its rows are there."""
    names = ["clipself-lr0.001", "untrained-multi-v-3", "clipself-0", "sc-0", "clipself-1", "clipself-2", "sc-2"]
    record = {"scores": {n: {} for n in names}, "key": {"start": "b"}, "starts": {"0": "a", "1": "b"}}
    scores, whole = ranking.usable(record, "b", ["clipself", "sc"])
    assert set(scores) == set(names) and whole == {0: "a"}
    scores, whole = ranking.usable(record, "c", ["clipself", "sc"])
    assert set(scores) == set(names) - {"untrained-multi-v-3", "clipself-1"} and whole == {0: "a", 2: "b"}
    scores, whole = ranking.usable(record, "c", ["clipself", "sc", "clim"])
    assert set(scores) == {"clipself-lr0.001"} and not whole


def test_packed_start_model(tmp_path):
    """Texts of the scenes keep their embeddings but for float16; the model of the repository is the one ranked from."""
    model = open_clip.create_model(ranking_rows.MODEL)
    texts = ["a photo of a dotted ring on sky.", "this is sand."]
    packed = ranking_start.pack(model.state_dict(), texts)
    save_file(packed, tmp_path / "start.safetensors")
    ranking_start.write_start(tmp_path / "start.safetensors", tmp_path / "logs/start.pt")
    again = open_clip.create_model(ranking_rows.MODEL, pretrained=str(tmp_path / "logs/start.pt"))
    tokens = open_clip.get_tokenizer(ranking_rows.MODEL)(texts)
    with torch.no_grad():
        before, after = (m.eval().encode_text(tokens, normalize=True) for m in (model, again))
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)
    assert len(packed[ranking_start.tokens_of(packed)]) == len(tokens.unique())
    assert sum(t.numel() * t.element_size() for t in packed.values()) < 4 * 2**20
    ranking_start.write_start(ranking_start.FILE, tmp_path / "own.pt")
    record = json.loads((ROOT / "benchmarks/ranking.json").read_text())
    assert methods.weights_of(tmp_path / "own.pt") == record["key"]["start"]


def test_auc_and_cells():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert segments.auc(scores, positive) == pytest.approx(np.mean(pairs))
    ids = np.kron(np.array([[1, 1], [2, 7]]), np.ones((4, 4), int))
    assert segments.pure_cells(ids, 2).tolist() == [0, 0, 1, 2]
    ids[0, :4] = 9
    assert segments.pure_cells(ids, 2).tolist() == [-1, 0, 1, 2]


def test_flags_that_are_given_replace_the_common_ones():
    kept = methods.without(["--a", 1, "--b", 2, 3, "--switch", "--c", 4], {"--b", "--switch"})
    assert kept == ["--a", 1, "--c", 4]


def test_a_folder_keeps_its_settings(tmp_path):
    """Runs that are complete are not repeated, so other settings need another folder."""
    (tmp_path / "r").mkdir()
    for _ in range(2):
        program_runs.claim_folder(tmp_path / "r", methods.Plan().settings())
        (tmp_path / "r/run").touch()
    with pytest.raises(SystemExit, match=r"was made with other steps \(steps: 1000, now 200\)"):
        program_runs.claim_folder(tmp_path / "r", methods.Plan(steps=200).settings())
    with pytest.raises(SystemExit, match="was made with other start"):
        methods.main(["--out", str(tmp_path / "r")])
    (tmp_path / "else").mkdir()
    (tmp_path / "else/file").touch()
    with pytest.raises(SystemExit, match="holds something else"):
        program_runs.claim_folder(tmp_path / "else", {})


def test_no_method_is_told_of_the_unseen_classes(tmp_path):
    """Neither by a scene that shows one nor by a caption that names one; the start model knows them."""
    from training.scenes.generate import main as generate

    generate(["--out", str(tmp_path / "scenes"), "--train", "24", "--val", "4", "--pairs", "8", "--size", "64",
              "--things", "8", "--stuff", "3", "--novel", "2"])  # fmt: skip
    made = methods.Ranking(tmp_path, methods.SMOKE, ["clipself"], None, 1)
    made.data.mkdir()
    made.split(tmp_path / "scenes/annotations")
    unseen = json.loads((tmp_path / "scenes/annotations/split.json").read_text())["novel"]
    every = (made.data / "pairs.json").read_text()
    assert any(name in every for name in unseen)
    for file in ("base_pairs", "base", "captioned"):
        content = json.loads((made.data / f"{file}.json").read_text())
        assert 0 < len(content["images"]) < (60 if file == "base_pairs" else 24)
        assert {a["image_id"] for a in content["annotations"]} <= {i["id"] for i in content["images"]}
        assert not any(name in json.dumps(content["annotations"]) for name in unseen)


def test_rows_are_command_lines_of_the_program(tmp_path):
    from training.params import parse_args

    for row, flags in methods.METHODS.items():
        filled = [f.format(data=tmp_path, trunk="t", answers=tmp_path, teacher="w") for f in flags]
        assert row.startswith(parse_args(filled, check=False).entry.name)
    # A variant has the rate of its method, where that is ranked as well.
    assert methods.tuned("mixrc, names", methods.METHODS) == "clipself" and methods.tuned("sc", methods.METHODS) == "sc"
    assert methods.tuned("mixrc, proposed", ["clipself", "mixrc, proposed"]) == "mixrc, proposed"


def test_rows_share_answers_where_they_ask_the_same(tmp_path):
    rows = {name: methods.shared_answers(flags, 3) for name, flags in methods.METHODS.items() if "{answers}" in flags}
    assert rows["clipself"] == rows["clipself, v"] == {"crops": "crops-grid-3"}
    assert rows["declip"] == {"crops": "crops-grid-3", "vfm": "vfm"} and rows["densevlm"] == {"dense": "dense"}
    assert rows["clipself, boxes"] == {"crops": "crops-boxes-3"}
    assert rows["clipself, more cells"]["crops"] == "crops-grid-of-5-3"
    fewer = rows["clipself, proposed, as many"]["crops"]
    assert fewer != rows["clipself, proposed"]["crops"] == rows["mixrc, proposed"]["crops"] == "crops-proposed-3"
    assert rows["mixrc"]["crops"] == rows["clipself, mixed"]["crops"] == "crops-mixed-3"
    assert rows["synclip, free"]["start"] != rows["mixrc, names"]["start"]  # by other readings
    for _ in range(2):
        folders = [methods.kept_answers(tmp_path, methods.METHODS[row], 3) for row in ("declip", "denserc", "clipself")]
    assert folders[0] == folders[1] != folders[2]
    (folders[0] / "crops/shard").touch()
    assert (folders[2] / "crops/shard").exists() and not (folders[2] / "vfm").exists()


def test_no_two_runs_fill_the_same_answers_at_a_time(tmp_path, monkeypatch):
    """What several rows, or all seeds, have in common is asked for once; what is known already asks for nothing."""
    ranking_of = methods.Ranking(tmp_path, methods.SMOKE, list(methods.METHODS), tmp_path / "trunk", jobs=4)
    under_way, asked = set(), []

    def train(name, flags, *, seed, **_):
        if not name.startswith("answers"):
            return
        stores = set(methods.shared_answers(flags, seed).values()) - ranking_of.asked
        assert stores and not stores & under_way
        under_way.update(stores)
        time.sleep(0.02)
        under_way.difference_update(stores)
        asked.extend(stores)

    def propose():
        assert "proposed" not in under_way
        under_way.add("proposed")
        time.sleep(0.02)
        under_way.remove("proposed")

    monkeypatch.setattr(ranking_of, "train", train)
    monkeypatch.setattr(ranking_of, "propose", propose)
    monkeypatch.setattr(ranking_of, "found", lambda name: {} if name.endswith("-0") else None)
    tasks = [(row, str(seed), seed) for seed in range(4) for row in ranking_of.rows]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda task: ranking_of.run_row(*task, "rows", 1e-3), tasks))
    wanted = {"vfm", "dense", "crops-grid-1", "crops-mixed-3", "crops-proposed-2"}
    assert len(asked) == len(set(asked)) and wanted <= set(asked)
    assert not any(store.endswith("-0") for store in asked)


def test_cost_of_a_step(tmp_path):
    """Each in a process of its own; a method without a teacher does fewer operations than CLIPSelf."""
    command = [sys.executable, str(ROOT / "benchmarks/method_cost.py"), "--model", "ViT-Ti-8-64", "--size", "64",
               "--crops", "2", "--rounds", "1", "--device", "cpu", "--methods", "regionclip", "fineclip"]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]["1"]
    assert rows["regionclip"]["tflop"] < rows["clipself"]["tflop"] < rows["fineclip"]["tflop"]
    assert all(row["seconds"] > 0 and row["memory_gb"] > 0 for row in rows.values())


def test_which_rows_are_run():
    plain, every = (ranking_rows.chosen(None, ablations=a) for a in (False, True))
    assert every == list(methods.METHODS) and set(every) - set(plain) == set(ranking_rows.ABLATIONS)
    assert ranking_rows.chosen(["sc"], ablations=False) == ["clipself", "sc"]


def test_a_missing_package_is_told_of_at_once(monkeypatch):
    monkeypatch.setattr(ranking_rows, "find_spec", lambda name: None)
    ranking_rows.check_packages({row: methods.METHODS[row] for row in ("clipself", "sc")})
    for program in (methods, photographs):
        flags = ["--out", "never", "--methods", "clipself, proposed"]
        if program is photographs:
            flags += [f"--{n}=x" for n in ("train-annotations", "train-images", "val-annotations", "val-images")]
            flags += ["--embeddings=x"]
        with pytest.raises(SystemExit, match="clipself, proposed needs scikit-learn"):
            program.main(flags)


@pytest.mark.slow
def test_smoke(tmp_path):
    flags = ["--out", str(tmp_path / "r"), "--smoke", "--seeds", "1", "--methods", "sc", "fineclip", "--jobs", "1"]
    command = [sys.executable, str(ROOT / "benchmarks/methods.py"), *flags]
    for _ in range(2):  # the second time everything is there
        done = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "**fineclip**" in done.stdout and "untrained, `multi-v:3`" in done.stdout
    record = json.loads((tmp_path / "r/results.json").read_text())
    assert set(record["runs"]) == {"clipself", "sc", "fineclip"} and not record["seconds_a_run"]
    assert (tmp_path / "r/picture.png").is_file()
    # Elsewhere, with what is known: the start model alone is made again.
    known = ["--known", str(tmp_path / "r/results.json")]
    command = [str(tmp_path / "elsewhere") if part == str(tmp_path / "r") else part for part in command] + known
    done = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    elsewhere = json.loads((tmp_path / "elsewhere/results.json").read_text())
    assert elsewhere["scores"] == record["scores"] and len(elsewhere["seconds_a_run"]) == 1
    record["key"]["start"], record["starts"] = "another", {}
    (tmp_path / "r/results.json").write_text(json.dumps(record))
    done = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "from another start model: its choice of rates and its whole seeds (0) are taken" in done.stdout
    assert json.loads((tmp_path / "elsewhere/results.json").read_text())["starts"] == {"0": "another"}
