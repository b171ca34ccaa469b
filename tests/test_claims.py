"""claims.py at a tiny size on the weights that ship: arms, data, every experiment run."""

import functools
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "weights" / "shapes"
sys.path.insert(0, str(FOLDER))

import claims
import world
from claims import ARMS, CLAIMS, GROUPS, MEDIA

import train

TINY = (
    (
        "--weights {} --seeds 1 --steps 2 2 --batch 2 2 2 --video-share 0.5 --data 4 2 2 "
        "--test 1 1 1 --queries 3 --sampling-steps 1 --device cpu"
    )
    .format(FOLDER)
    .split()
)
COSTS = dict.fromkeys(
    (
        "step of stage 1",
        "image step of stage 2",
        "clip step of stage 2",
        "validation in stage 1",
        "validation in stage 2",
        "all edits",
    ),
    360.0,
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An OUT with models and data, and no run yet."""
    out = tmp_path_factory.mktemp("claims")
    claims.prepare(claims.parse([*CLAIMS, *TINY, "--out", str(out)]))
    return out


@pytest.fixture
def make(out, tmp_path):
    """make(arm, stage, seed): (train.py's settings, the model that it trains); stage 2 afresh."""
    options = claims.parse(["a", *TINY, "--out", str(out)])

    def build(arm, stage, seed=0):
        line = claims.command_line(options, arm, stage, seed, tmp_path)
        args = train.settings(line)
        train.complete(args)
        return args, claims.build(arm, False, args)

    return build


@pytest.mark.parametrize("name", ["transformer", "qformer"])
def test_other_connectors(make, name):
    """Padding that reaches the context of a prompt, or a connector that is no larger."""
    (_, made), (_, baseline) = make(ARMS[name], 1), make(ARMS["baseline"], 1)
    frames = world.sample(3, video=True).source
    for shown in (frames[:1], frames):
        prompts = [
            made.prompt(shown, words)
            for words in ("make it night", "replace the blue star with a red circle")
        ]
        with torch.no_grad():
            both = made.context(made.processor.collate(prompts), len(shown) > 1)
            alone = [made.context(prompt, len(shown) > 1) for prompt in prompts]
        assert both.shape == (2, 3, made.dit.config.text_dim)
        assert torch.allclose(both, torch.cat(alone), atol=1e-4) and not torch.allclose(
            *alone, atol=1e-2
        )
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count(made) > 3 * count(baseline)


@pytest.mark.parametrize(
    "name, stage",
    [
        ("transformer", 1),
        ("qformer", 1),
        ("baseline", 1),
        ("qformer", 2),
        ("oneset", 2),
        ("zero", 2),
        ("none", 2),
    ],
)
def test_what_an_arm_trains(out, tmp_path, name, stage):
    """A frozen MLLM that moves, or queries that stand still: then the claim is another."""
    options, before, models = claims.parse(["a", *TINY, "--out", str(out)]), {}, []

    def build(args):
        model = claims.build(ARMS[name], False, args)
        before.update({key: value.clone() for key, value in model.state_dict().items()})
        models.append(model)
        return model

    line = claims.command_line(options, ARMS[name], stage, 0, tmp_path / "out")
    assert train.main(line, build, lambda *_: {}) == 0  # two steps: in stage 2 images, then clips
    after = models[0].state_dict()
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    queries = ("image", "video") if stage == 2 and name != "oneset" else ("image",)
    expected = {f"connector.{media}_queries" for media in queries}
    expected |= {key for key in before if key.startswith("connector.mlp") or ".lora_" in key}
    expected |= {key for key in before if stage == 2 and key.startswith("dit.")}
    expected -= {"dit.source_embedding.weight"} if name == "none" else set()
    assert moved == expected, moved ^ expected
    assert any(".lora_" in key for key in before) == (name not in ("transformer", "qformer"))
    if stage == 2:
        source = before["dit.source_embedding.weight"]
        assert source.any() == (name not in ("zero", "none"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "transformer", "qformer"])
def test_half_precision(out, tmp_path, name):
    """--precision reaches training and validation of every connector, and hardly changes a loss."""
    losses, builder = [], functools.partial(claims.build, ARMS[name], False)
    for precision in ("float32", "bfloat16"):
        options = claims.parse(["a", *TINY, "--out", str(out), "--precision", precision])
        folder = tmp_path / precision
        line = claims.command_line(options, ARMS[name], 2, 0, folder)
        assert train.main(line, builder, claims.validate) == 0
        rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([*rows[0]["held_out"].values(), rows[1]["loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled(out, monkeypatch, compiled):
    """--compile reaches the layers of DiT and MLLM, and nothing is compiled without it."""
    models, chosen = [], []

    def main(line, builder, validate):
        args = train.settings(line)
        train.complete(args)
        models.append(builder(args))
        return 1

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(claims, "compile_blocks", chosen.extend)
    line = ["a", *TINY, "--out", str(out), *["--compile"] * compiled]
    assert claims.run(claims.parse(line), ARMS["baseline"], 0) == 1
    layers = [*models[0].dit.blocks, *models[0].mllm.model.layers]
    assert chosen == (layers if compiled else [])


def test_seeds(make):
    """What is drawn is the same in every arm, and different in every seed."""
    made = {
        (name, seed): make(ARMS[name], 1, seed)
        for name in ("baseline", "qformer")
        for seed in (0, 1)
    }
    queries = {key: model.connector.image_queries for key, (_, model) in made.items()}
    assert torch.equal(queries["baseline", 0], queries["qformer", 0])
    one, other = (dict(made["baseline", seed][1].named_parameters()) for seed in (0, 1))
    random = [
        name
        for name in one
        if name.startswith("connector.mlp.")
        and name.endswith("weight")
        or "queries" in name
        or "lora_A" in name
    ]
    assert random and not any(torch.equal(one[name], other[name]) for name in random)
    orders = {
        key: train.Pairs(args, args.data, 16, 2).order(False, 0) for key, (args, _) in made.items()
    }
    assert orders["baseline", 0] == orders["qformer", 0] != orders["baseline", 1]


def test_the_first_frame_is_all_that_its_arm_sees(make):
    clip = world.sample(3, video=True).source
    other = np.concatenate([clip[:1], clip[:0:-1]])
    shown = {
        name: [make(ARMS[name], 1)[1].prompt(frames, "x") for frames in (clip, other)]
        for name in ("baseline", "first")
    }
    assert "pixel_values_videos" in shown["baseline"][0]
    assert not torch.equal(*(prompt["pixel_values_videos"] for prompt in shown["baseline"]))
    assert torch.equal(*(prompt["pixel_values"] for prompt in shown["first"]))


def test_late_clips():
    """Nothing of the edit is in the first half; the truth passes, and late mistakes do not."""
    for seed in range(len(claims.LATE_KINDS)):
        case, start = claims.draw("late", seed, "train")
        assert claims.FRAMES // 2 <= start <= claims.FRAMES - 3
        assert np.array_equal(case.source[:start], case.target[:start])
        assert all(
            world.differs(case.source[i : i + 1], case.target[i : i + 1]).any()
            for i in range(start, claims.FRAMES)
        )
        edited = set(case.source_scene.things) ^ set(case.target_scene.things)
        shown = replace(case.source_scene, things=tuple(set(case.source_scene.things) - edited))
        assert edited and np.array_equal(
            world.render(shown, frames=claims.FRAMES)[:start], case.source[:start]
        )
        line = {
            "late": start,
            "source_scene": vars(case.source_scene),
            "target_scene": vars(case.target_scene),
        }
        line = json.loads(json.dumps(line, default=vars))
        wrong = claims.rivals(line, case.target)
        judge = lambda output: world.judge(case.source, case.target, output, wrong)["success"]
        assert judge(case.target) and not judge(case.source)
        assert not any(
            judge(rival)
            for rival in wrong[::4]
            if (differs := world.differs(case.target, rival)).any()
            and world.far(case.target, rival, differs) >= world.VISIBLE
        )


@pytest.fixture(scope="module")
def whole(out):
    """All claims, run once. Nothing is timed for the estimate: that would take as long again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "measure", lambda options, arm: COSTS)
        assert claims.main([*CLAIMS, *TINY, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_every_arm_yields_its_rows(whole):
    for arm in ARMS.values():
        folder = whole / f"{arm.name}-0"
        rows = claims.read_lines(folder / "results.jsonl")
        assert [(row["arm"], row["seed"], row["media"], row["cases"]) for row in rows] == [
            (arm.name, 0, group, 1) for group in GROUPS
        ]
        for row in rows:
            measures = [row[key] for key in ("loss", "success", "inside", "outside")]
            assert np.isfinite(measures).all()
        assert {"stage1", "stage1_mean"} <= rows[0].keys()
        assert not list(folder.glob("*/checkpoints"))
        assert (folder / "stage1").exists() == (arm.stage1 == arm.name)
        assert (folder / "stage2").exists() == (arm.stage2 == "")
        assert (folder / "stage3").exists() == bool(arm.quality)
        last = claims.last_stage(whole, arm, 0)
        steps = [row["video"] for row in claims.read_lines(last / "metrics.jsonl") if "loss" in row]
        assert steps == ([False] if arm.quality else [False, arm.clips])
        steps = [step for step, _ in claims.curve_of(last, "late")]
        assert steps == ([0, 1] if arm.quality else [0, 2])
    losses = set()
    for arm in ARMS.values():
        losses.add(claims.curve_of(claims.last_stage(whole, arm, 0), "clip")[-1][1])
    assert len(losses) == len(ARMS)  # no arm is another in disguise
    assert all((whole / f"claim-{claim}.png").exists() for claim in CLAIMS)


@pytest.mark.slow
def test_what_is_there_is_not_made_again(whole, monkeypatch, capsys):
    """A whole run is left alone; of one that was cut off while editing, the rest alone is made."""
    file, edit = whole / "zero-0" / "results.jsonl", whole / "zero-0" / "edits" / "image-00000.png"
    rows, pixels = file.read_text(), edit.read_bytes()
    others = {
        path: path.stat().st_mtime_ns
        for path in whole.rglob("*")
        if path.is_file() and path.parent != whole
    }
    file.unlink(), edit.unlink()
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(claims, "measure", lambda options, arm: COSTS)
    assert claims.main([*CLAIMS, *TINY, "--out", str(whole)]) == 0
    assert file.read_text() == rows and edit.read_bytes() == pixels
    assert all(
        path.stat().st_mtime_ns == time for path, time in others.items() if path not in (file, edit)
    )
    capsys.readouterr()
    monkeypatch.setattr(claims, "run", lambda *_: None)
    assert claims.main(["table", "plot", "--out", str(whole)]) == 0
    said = capsys.readouterr().out
    assert said.count("### ") == len(CLAIMS) and "| no source | late | 1 | 1 | " in said
    assert said in (whole / "claims.md").read_text()


@pytest.mark.slow
def test_estimate(out, tmp_path, monkeypatch, capsys):
    """A stage that several arms share counts once; what is measured is what it adds up."""
    monkeypatch.setattr(claims, "measure", lambda options, arm: COSTS)

    def estimate(claim):
        options = claims.parse([claim, *TINY, "--out", str(tmp_path)])
        claims.estimate(options, [(ARMS[name], 0) for name in CLAIMS[claim][1]])
        return capsys.readouterr().out

    # 2 steps and 2 validations; twice 2 steps, 2 validations, and the edits
    text = "1 of stage 1, 2 of stage 2, edits of 2 runs; about 1.40 hours"
    assert text in estimate("c")
    # the same, and three times a step, 2 validations, and the edits
    text = "1 of stage 1, 2 of stage 2, 3 of stage 3, edits of 3 runs; about 2.40 hours"
    assert text in estimate("quality")
    monkeypatch.undo()
    costs = claims.measure(claims.parse(["c", *TINY, "--out", str(out)]), ARMS["baseline"])
    assert costs.keys() == COSTS.keys() and all(value > 0 for value in costs.values())


def test_data_of_the_quality_stage(out):
    """A fault that is too faint, or that the sources have too, would leave nothing to repair."""
    for media in MEDIA:
        folder = out / "data" / media
        clean, faulty = (claims.read_lines(folder / f"{n}.jsonl") for n in ("data", "faulty"))
        for one, other in zip(clean, faulty, strict=True):
            targets = [world.read_frames(folder / line["target"]) for line in (one, other)]
            assert one | {"target": other["target"]} == other
            source = world.read_frames(folder / one["source"])
            assert not world.judge(source, *targets)["success"]


def test_looks_are_withheld_from_clips_alone(out):
    """A style among the clips, or none among the images, and transfer is not what is seen."""
    for media in MEDIA:
        folder = out / "data" / media
        lines, plain = (claims.read_lines(folder / f"{n}.jsonl") for n in ("data", "plain"))
        looks = [line["target_scene"]["look"] for line in lines]
        if media == "image":
            assert plain == lines
        else:
            assert plain == [line for line, look in zip(lines, looks) if look is None]
        assert any(looks) == (media != "late")
    options = claims.parse(["transfer", *TINY, "--out", str(out)])
    line = claims.command_line(options, ARMS["withheld"], 2, 0, out)
    files = [str(out / "data" / media / "plain.jsonl") for media in MEDIA]
    assert [word for word in line if word.endswith("plain.jsonl")] == files
    assert not any(word.endswith("data.jsonl") for word in line[: 1 + len(files)])
    groups = [
        claims.groups_of(row["id"]) for row in claims.read_lines(out / "data/test/data.jsonl")
    ]
    assert groups == [["image"], ["clip", "styled"], ["late"]]


def test_table_has_mean_and_deviation():
    values = {"baseline": [0.25, 0.35, 0.3], "first": [0.5]}
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "media": "clip",
            "cases": 27,
            "loss": value,
            "success": 100 * value,
            "inside": 2 * value,
            "outside": value / 10,
        }
        for arm in values
        for seed, value in enumerate(values[arm])
    ]
    lines = claims.table("d", rows).splitlines()
    assert statistics.stdev(values["baseline"]) == pytest.approx(0.05)
    assert lines[0].startswith("### (d) ") and len(lines) == 6
    assert lines[4] == (
        "| baseline | clip | 27 | 3 | 0.3000 ± 0.0500 | 30.0 ± 5.0 | 0.600 ± 0.100 | "
        "0.0300 ± 0.0050 |  |  |"
    )
    assert lines[5] == "| first frame | clip | 27 | 1 | 0.5000 | 50.0 | 1.000 | 0.0500 |  |  |"
    assert {line.count("|") for line in lines[2:]} == {11}
    assert claims.compared(rows) == ["d"]


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["a", "--weights", "nowhere"], "nowhere does not exist"),
        (["table"], "no two arms"),
        (["f"], "invalid choice"),
        (["a", "--seeds", "0"], "--seeds"),
        (["a", "--steps", "9"], "--steps"),
    ],
)
def test_refusals(arguments, why, tmp_path, capsys):
    try:
        code = claims.main([*arguments, "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and why in said and said.count("\n") == 1


def test_runs_of_other_settings_are_refused(out, capsys):
    """Means over runs of 2 and of 3 steps would say nothing."""
    capsys.readouterr()
    assert claims.main(["a", *TINY, "--out", str(out), "--steps", "2", "3"]) == 2
    said = capsys.readouterr().err
    assert "steps was [2, 2] and is [2, 3]" in said and said.count("\n") == 1
