"""The world of shapes: what is drawn, said and judged there must be true."""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "weights" / "shapes"
sys.path.insert(0, str(FOLDER))
import world  # noqa: E402
from world import KINDS, Scene, Thing, draw, judge, render, rivals, sample  # noqa: E402


def case_rivals(case):
    return scene_rivals(
        case.source_scene, case.target_scene, case.target.shape[1], len(case.target)
    )


scene_rivals = functools.lru_cache(maxsize=1)(rivals)  # a test asks many times about one case


def accepts(case, scene):
    """Whether the judge takes a picture of scene for the answer to case."""
    output = render(scene, case.target.shape[1], len(case.target))
    return judge(case.source, case.target, output, case_rivals(case))["success"]


def edited(case):
    """[(thing before, thing after)], None where there was or is none; a swap keeps the path."""
    before = [thing for thing in case.source_scene.things if thing not in case.target_scene.things]
    after = [thing for thing in case.target_scene.things if thing not in case.source_scene.things]
    heir = lambda old: next(
        (new for new in after if (new.start, new.end) == (old.start, old.end)), None
    )
    pairs = [(old, heir(old)) for old in before]
    return pairs + [(None, new) for new in after if new not in [pair[1] for pair in pairs]]


def with_things(scene, old, new):
    things = [new if thing == old else thing for thing in scene.things] + (
        [new] if old is None else []
    )
    return replace(scene, things=tuple(thing for thing in things if thing))


def cases(kinds, count, video=False, split="train"):
    return [sample(seed, video, split, kind) for kind in kinds for seed in range(count)]


@pytest.mark.parametrize("video", [False, True])
def test_same_seed_same_bytes(video):
    """State kept between calls (a global generator, a mutated cache) would change what a seed
    means.
    """
    first = [sample(seed, video) for seed in range(12)]
    for one in reversed(first):
        other = sample(one.seed, video)
        assert one.instruction == other.instruction and one.kind == other.kind
        assert np.array_equal(one.source, other.source) and np.array_equal(one.target, other.target)
        assert all(
            np.array_equal(a, b) for a, b in zip(one.references, other.references, strict=True)
        )
    assert len({one.source.tobytes() for one in first}) == 12


@pytest.mark.parametrize("video", [False, True])
def test_held_out_combinations_never_in_train(video):
    """A leak into a source, a target, a reference or a question would make the held-out score
    meaningless.
    """
    names = [f"{color} {shape}" for color, shape in world.HELD_OUT_NAMES]
    centers = np.array([world.cell_center(place) for place in world.PLACES])
    rng = np.random.default_rng(0)
    for seed in range(2000):
        _, draft = draw(seed, video)
        for scene in (draft.source, draft.scene, *draft.references):
            for thing in scene.things:
                assert thing.name not in world.HELD_OUT_NAMES
                far = np.abs(thing.path(9)[:, None] - centers).max(
                    axis=-1
                )  # the nearest cell in every frame
                assert (
                    not {(*thing.name, world.PLACES[i]) for i in far.argmin(axis=1)}
                    & world.HELD_OUT_PLACES
                )
        texts = [draft.instruction, world.caption(draft.source), world.caption(draft.scene)]
        texts += [text for pair in world.questions(draft.source, rng) for text in pair]
        assert not any(name in text for name in names for text in texts)


def test_held_out_split_always_tests_something():
    """A held-out case whose edit touches nothing held out would be a training case under another
    name.
    """
    for seed in range(1500):
        kind, draft = draw(seed, video=seed % 2 == 1, split="heldout")
        source, target = set(draft.source.things), set(draft.scene.things)
        assert any(thing.held_out() for thing in (source ^ target or source)), (seed, kind)


def test_kinds_are_balanced():
    """Rejected scenes must not thin out the kinds that need more room; make() gives every kind the
    same number.
    """
    counts = {kind: 0 for kind in KINDS}
    for seed in range(1800):
        counts[draw(seed)[0]] += 1
    assert min(counts.values()) > 150 and max(counts.values()) < 250
    planned = list(world.plan(900, 0.3))
    assert {planned.count((kind, True)) for kind in KINDS} == {30}
    assert {planned.count((kind, False)) for kind in KINDS} == {70}
    assert sorted(kind for kind, video in world.plan(27, 1 / 3) if video) == sorted(KINDS)
    planned = list(world.plan(40, 0.5, ("style", "swap")))
    assert {planned.count(case) for case in product(("style", "swap"), (False, True))} == {10}


def test_nothing_overlaps_or_leaves_the_frame():
    """A shape cut by the frame or covered by another has no certain answer after an edit."""
    for seed in range(400):
        _, draft = draw(seed, video=seed % 4 > 0)
        for scene in (draft.source, draft.scene):
            radius = [world.RADII[thing.size] for thing in scene.things]
            paths = [thing.path(9) for thing in scene.things]
            for i, path in enumerate(paths):
                assert path.min() >= radius[i] and path.max() <= 1 - radius[i]
                for j in range(i):
                    assert (np.abs(path - paths[j]).max(axis=1) > radius[i] + radius[j]).all()


def test_shapes_stay_in_their_box():
    """apart() and the frame check trust the radius: no painted pixel may lie outside that box, in
    any shape or size.
    """
    for shape in world.SHAPES:
        for size in ("small", "large", "huge"):
            thing = Thing("black", shape, size, (0.5, 0.5), (0.5, 0.5))
            painted = (render(Scene("white", (thing,)))[0] < 240).any(axis=-1)
            radius = world.RADII[size] * 64
            inside = np.abs(np.arange(64) + 0.5 - 32) < radius + 1
            assert painted.any() and not painted[~inside].any() and not painted[:, ~inside].any()
            assert painted.sum() > 1.1 * radius**2  # and a star is more than its tips


def test_a_shape_is_painted_where_it_is():
    """Swapped axes or an offset of half a pixel would make every place word and every trajectory
    wrong.
    """
    still = Thing("black", "circle", "small", (0.25, 0.7), (0.25, 0.7))
    moving = replace(still, start=(0.25, 0.3), end=(0.75, 0.6))
    for thing in (still, moving):
        for frame, center in zip(render(Scene("white", (thing,)), frames=9), thing.path(9) * 64):
            weight = 244.0 - frame[..., 0]
            y, x = (
                (np.arange(64) + 0.5) @ weight.sum(axis=1),
                (np.arange(64) + 0.5) @ weight.sum(axis=0),
            )
            assert np.allclose(np.array([x, y]) / weight.sum(), center, atol=0.05)
    assert (world.where(still), world.where(moving)) == (
        "bottom left",
        "from the top left to the right",
    )


def test_clips_move_and_images_do_not():
    """Clips in which nothing moves would teach and test nothing about time; the edited things must
    keep their path.
    """
    for seed in range(60):
        case = sample(seed, video=True)
        assert (
            len(case.source) == len(case.target) == 9 and (case.source[0] != case.source[-1]).any()
        )
        for old, new in edited(case):
            if old and new:
                assert (old.start, old.end, old.size) == (new.start, new.end, new.size)
            elif new:
                assert new.start == new.end
    assert len(sample(0).source) == 1 and sample(0, size=96).source.shape == (1, 96, 96, 3)


def test_every_color_can_be_seen_on_every_ground_in_every_look():
    """A yellow star on sand in fog that differs by a shade would be invisible to people and to the
    judge.
    """
    for ground in world.GROUNDS:
        for look in world.LOOK:
            empty = render(Scene(ground, (), look)).astype(int)
            for color in world.COLORS:
                for y in (1 / 6, 5 / 6):
                    thing = Thing(color, "square", "large", (0.5, y), (0.5, y))
                    difference = np.abs(render(Scene(ground, (thing,), look)) - empty).max()
                    assert difference >= 28, (ground, look, color)


def test_colors_are_far_apart():
    """Neighboring colors that differ by less than the judge's window limit would be confused by
    people too.
    """
    colors = [np.array(color) / 255 for color in world.COLORS.values()]
    assert min(np.abs(a - b).mean() for i, a in enumerate(colors) for b in colors[:i]) > 0.2


def test_instruction_names_exactly_one_thing():
    """Two red circles, or a new red circle beside an old one, would leave open which is meant."""
    for seed in range(1500):
        kind, draft = draw(seed, video=seed % 2 == 1)
        for scene in (draft.source, draft.scene):
            assert len({thing.name for thing in scene.things}) == len(scene.things)
        changed = set(draft.source.things) - set(draft.scene.things)
        for thing in draft.source.things:
            assert (world.the(thing) in draft.instruction) == (thing in changed), draft.instruction
        new = {thing.name for thing in set(draft.scene.things) - set(draft.source.things)}
        assert not new & {thing.name for thing in draft.source.things}


def test_instruction_says_what_the_target_shows():
    """Words drawn from another object than the edit used would teach nonsense."""
    for case in cases(("swap", "color", "add", "ref_swap", "ref_add", "style", "tone"), 40):
        text, target = case.instruction, case.target_scene
        if case.kind in ("style", "tone"):
            assert world.LOOKS[target.look] in text and target.things == case.source_scene.things
            assert target.look in (world.STYLES if case.kind == "style" else world.TONES)
            continue
        [(old, new)] = edited(case)
        if case.kind.startswith("ref"):
            [reference] = case.reference_scenes
            assert reference.things[0].name == new.name and "reference" in text
            assert reference.ground != target.ground and case.references[0].shape == (64, 64, 3)
        else:
            assert new.color in text and (case.kind == "color" or new.shape in text)
            assert case.kind != "add" or new.size in text
        if old is None:
            assert text.endswith(f"at the {world.where(new)}") or text.startswith(
                f"at the {world.where(new)} add"
            )


@pytest.mark.parametrize("seed, split", [(180000094, "heldout"), (300000001, "train")])
def test_every_edit_changes_something(seed, split):
    """The judge refuses a whole dataset for one edit that shows nothing: black on white, gray."""
    for video in (False, True):
        case = sample(seed, video, split, "style")
        assert world.differs(case.source, case.target).any()


def test_every_kind_has_four_wordings():
    """Fewer, and an editor learns the sentence, not the meaning."""
    assert (
        all(len(wordings) >= 4 for wordings in world.WORDINGS.values())
        and len(world.REFERENCE) >= 4
    )
    assert (
        set(world.WORDINGS) | {"hybrid", "ref_swap", "ref_add"} == set(KINDS)
        and len(world.JOINTS) >= 4
    )


def test_caption_and_answers():
    """The language pretraining believes every answer, so one scene is checked against answers
    written by hand.
    """
    still = Thing("red", "circle", "large", (0.15, 0.15), (0.15, 0.15))
    star = Thing("orange", "star", "small", (0.5, 0.5), (0.5, 0.8))
    twin = Thing("red", "square", "small", (0.85, 0.5), (0.85, 0.5))
    scene = Scene("gray", (star, twin, still))
    assert world.caption(scene) == (
        "a large red circle at the top left, a small orange star moving from the center to "
        "the bottom, a small red square at the right, on a gray ground"
    )
    assert world.caption(Scene("sky", (), "night")) == "on a sky ground, as night"
    asked = {}
    for seed in range(60):
        asked |= dict(world.questions(scene, np.random.default_rng(seed)))
    answers = {
        "how many shapes are there?": "three",
        "what is the ground?": "gray",
        "where is the red circle?": "top left",
        "what size is the red circle?": "large",
        "where is the orange star?": "from the center to the bottom",
        "what color is the star?": "orange",
        "is the orange star moving?": "yes",
        "is the red square moving?": "no",
        "what shape is orange?": "star",
        "what is at the right?": "a small red square",
        "what is at the top?": "nothing",
        "is there an orange star?": "yes",
        "is there a pink star?": "no",
    }
    assert answers.items() <= asked.items()
    assert (
        not {"what shape is red?", "what is at the center?", "what is at the bottom?"}
        & asked.keys()
    )
    with pytest.raises(ValueError, match="plain scenes"):
        world.questions(replace(scene, look="gray"), np.random.default_rng(0))


def test_vocabulary_is_small_and_complete():
    """A word that the tokenizer never saw in training would be unknown to it in an instruction."""
    split = lambda text: text.replace(",", " ,").replace("?", " ?").split()
    words = {word for text in world.vocabulary_texts(4000) for word in split(text)}
    assert len(words) <= 95 and all(word == word.lower() for word in words)
    assert list(world.vocabulary_texts(50)) == list(world.vocabulary_texts(50))
    for seed in range(500):
        assert set(split(draw(10**6 + seed, split="heldout")[1].instruction)) <= words


@pytest.mark.parametrize("video", [False, True])
def test_judge_accepts_the_truth_and_rejects_the_untouched_source(video):
    """A judge that an untouched source satisfies, or that the truth does not, measures nothing."""
    for case in cases(KINDS, 2 if video else 8, video):
        wrong = case_rivals(case)
        perfect = judge(case.source, case.target, case.target, wrong)
        assert perfect == {"inside": 0, "outside": 0, "window": 0, "rival": 0, "success": True}
        noop = judge(case.source, case.target, case.source, wrong)
        assert not noop["success"] and noop["inside"] == pytest.approx(1)


@pytest.mark.parametrize("video", [False, True])
def test_judge_forgives_what_a_vae_does(video):
    """Soft edges and a little noise are not a wrong edit: a judge that asks for perfect pixels
    scores every model 0.
    """
    rng = np.random.default_rng(0)
    verdicts = []
    for case in cases(KINDS, 2 if video else 8, video):
        soft = case.target.astype(np.float32)
        for axis in (1, 2):
            soft = 0.6 * soft + 0.2 * np.roll(soft, 1, axis) + 0.2 * np.roll(soft, -1, axis)
        output = np.clip(soft + rng.normal(0, 4, soft.shape), 0, 255).astype(np.uint8)
        verdicts.append(judge(case.source, case.target, output, case_rivals(case))["success"])
    assert np.mean(verdicts) > 0.9


def test_judge_rejects_every_wrong_color():
    """Orange for yellow on a small star is a small error in pixels; it is a wrong edit all the
    same.
    """
    for case in cases(("color", "swap", "add", "ref_swap", "ref_add"), 5):
        [(_, new)] = edited(case)
        for color in set(world.COLORS) - {new.color}:
            assert not accepts(
                case, with_things(case.target_scene, new, replace(new, color=color))
            ), (case.kind, color)


def test_judge_rejects_every_wrong_shape_and_size():
    """A circle covers most of a square: the pixel limits alone accept one for the other."""
    for case in cases(("swap", "add", "ref_swap", "ref_add"), 10):
        [(_, new)] = edited(case)
        other = {"small": "large", "large": "small"}[new.size]
        wrong = [replace(new, shape=shape) for shape in set(world.SHAPES) - {new.shape}] + [
            replace(new, size=other)
        ]
        for thing in wrong:
            assert not accepts(case, with_things(case.target_scene, new, thing)), (case.kind, thing)


def test_judge_rejects_the_wrong_place():
    """What was added must stand where the words say."""
    for case in cases(("add", "ref_add"), 10):
        [(_, new)] = edited(case)
        for place in set(world.PLACES) - set(new.places()):
            spot = world.cell_center(place)
            assert not accepts(
                case, with_things(case.target_scene, new, replace(new, start=spot, end=spot))
            )


@pytest.mark.parametrize("video", [False, True])
def test_judge_rejects_the_right_edit_of_the_wrong_object(video):
    """Which object is meant is the hardest part of an instruction, so it must count."""
    tried = 0
    for case in cases(("color", "swap", "remove", "ref_swap"), 12 if not video else 4, video):
        [(old, new)] = edited(case)
        for other in set(case.source_scene.things) - {old}:
            changed = new and replace(new, start=other.start, end=other.end, size=other.size)
            assert not accepts(case, with_things(case.source_scene, other, changed))
            tried += 1
    assert tried > 10


@pytest.mark.parametrize("video", [False, True])
def test_judge_rejects_damage_to_what_should_stay(video):
    """The right edit with a second object gone, recolored, or a third one invented is not a
    success.
    """
    tried = 0
    for case in cases(KINDS, 6 if not video else 1, video):
        for thing in set(case.target_scene.things) & set(case.source_scene.things):
            assert not accepts(case, with_things(case.target_scene, thing, None)), (
                case.kind,
                case.seed,
            )
            if case.target_scene.look not in ("gray", "sketch"):
                color = "green" if thing.color != "green" else "red"
                damaged = with_things(case.target_scene, thing, replace(thing, color=color))
                assert not accepts(case, damaged), (case.kind, case.seed, thing)
            tried += 1
    assert tried > 12


@pytest.mark.parametrize("video", [False, True])
def test_judge_rejects_half_a_hybrid(video):
    """The large half of a hybrid (the night) must not carry the small one (a star recolored)."""
    for case in cases(("hybrid",), 40 if not video else 6, video):
        pairs, look = edited(case), case.target_scene.look
        halves = [with_things(case.target_scene, new, old) for old, new in pairs if new]
        halves += [
            replace(case.target_scene, things=(*case.target_scene.things, old))
            for old, new in pairs
            if not new
        ]
        halves += [replace(case.target_scene, look=None)] * bool(look)
        assert len(halves) == 2
        for half in halves:
            assert not accepts(case, half), (case.seed, case.instruction)


def test_judge_rejects_the_wrong_look():
    """Night for sunset, mosaic for blur."""
    for case in cases(("style", "tone"), 6):
        for look in set(world.LOOK) - {case.target_scene.look}:
            assert not accepts(case, replace(case.target_scene, look=look)), (
                case.target_scene,
                look,
            )


def test_rivals_are_the_target_with_one_fact_wrong():
    """A missing kind of rival shows only in blurry results, where the other limits pass; so check
    the list.
    """
    gone = Thing("red", "circle", "large", (0.2, 0.2), (0.2, 0.2))
    old = Thing("blue", "square", "small", (0.8, 0.2), (0.8, 0.2))
    new, kept = (
        replace(old, color="green", shape="star"),
        Thing("pink", "star", "large", (0.5, 0.8), (0.5, 0.8)),
    )
    source, target = Scene("gray", (gone, old, kept)), Scene("gray", (new, kept), "fog")
    listed = {picture.tobytes() for picture in rivals(source, target)}
    wrong = [
        replace(target, look=None),
        replace(target, look="night"),
        with_things(target, None, gone),
        with_things(target, new, old),
        with_things(target, new, None),
        with_things(target, kept, None),
    ]
    for thing in (new, kept):
        changed = [replace(thing, color="black"), replace(thing, shape="square")]
        changed.append(replace(thing, size="small" if thing.size == "large" else "large"))
        wrong += [with_things(target, thing, other) for other in changed]
    assert all(render(scene).tobytes() in listed for scene in wrong)
    assert render(target).tobytes() not in listed


def test_judge_arithmetic():
    """Each figure on a picture small enough to do by hand: limits mean nothing if the figures are
    other ones.
    """
    source = np.zeros((2, 16, 16, 3), np.uint8)
    target, output, rival = source.copy(), source.copy(), source.copy()
    target[:, :4, :4] = 255
    output[:, :4, :4] = 204  # a fifth short
    output[1, 8:, 8:, 0] = 51  # 64 pixels of one frame a fifth too red: a mean error of a fifteenth
    rival[:, :4, :2] = 255
    scores = judge(source, target, output, [rival])
    assert scores["inside"] == pytest.approx(0.2)
    assert scores["outside"] == pytest.approx(64 / 15 / (2 * 240))
    assert scores["window"] == pytest.approx(1 / 15)
    assert scores["rival"] == pytest.approx(0.2 / 0.8)
    assert scores["success"]
    output[1, 8:, 8:] = 51  # now a fifth in all channels: above the window's limit in one frame
    scores = judge(source, target, output)
    assert (
        scores["window"] == pytest.approx(0.2)
        and scores["outside"] < 0.03
        and not scores["success"]
    )
    with pytest.raises(ValueError, match="must be one shape"):
        judge(source, target, output[:1])
    with pytest.raises(ValueError, match="no edit"):
        judge(source, source, output)


def run(*arguments):
    return subprocess.run(
        [sys.executable, FOLDER / "world.py", *map(str, arguments)], capture_output=True, text=True
    )


def test_files_hold_exactly_the_case(tmp_path):
    """Lossy or reordered frames, or a still clip stored as one frame, would train on other data
    than the seed says.
    """
    world.make(tmp_path, 36, video_share=0.5, seed=3)
    lines = [json.loads(line) for line in open(tmp_path / "data.jsonl")]
    assert len(lines) == 36 and sum(line["video"] for line in lines) == 18
    assert not (tmp_path / "data.jsonl.tmp").exists()
    for line in lines:
        case = sample(line["seed"], line["video"], line["split"], line["kind"])
        assert line["instruction"] == case.instruction
        assert np.array_equal(world.read_frames(tmp_path / line["source"]), case.source)
        assert np.array_equal(world.read_frames(tmp_path / line["target"]), case.target)
        assert (tmp_path / line["source"]).is_dir() == line["video"]
        references = [world.read_frames(tmp_path / path)[0] for path in line["references"]]
        assert all(np.array_equal(a, b) for a, b in zip(references, case.references, strict=True))
        assert Scene.from_dict(line["source_scene"]) == case.source_scene
        assert Scene.from_dict(line["target_scene"]) == case.target_scene


def test_make_takes_the_kinds_it_is_asked_for(tmp_path):
    """Data for what a model still lacks are mixed in by this; a kind that is not known must not end
    in a traceback.
    """
    assert run("make", tmp_path, "--count", 4, "--kinds", "ref_add", "tone").returncode == 0
    assert [json.loads(line)["kind"] for line in open(tmp_path / "data.jsonl")] == [
        "ref_add",
        "tone",
    ] * 2
    wrong = run("make", tmp_path / "other", "--kinds", "paint")
    assert wrong.returncode == 2 and "paint" in wrong.stderr and not (tmp_path / "other").exists()


def test_make_never_mixes_two_datasets(tmp_path):
    """Pictures of a second run under the lines of a first would be silently wrong."""
    assert run("make", tmp_path, "--count", 2).returncode == 0
    again = run("make", tmp_path, "--count", 2, "--seed", 1)
    assert again.returncode == 1 and "exists" in again.stderr and "Traceback" not in again.stderr


def test_results_of_every_format_are_read(tmp_path):
    """An editor may answer a clip with frames, an animated PNG or a video."""
    import imageio.v3 as imageio

    frames = sample(1, video=True, kind="color").source
    pages = [Image.fromarray(frame) for frame in frames]
    pages[0].save(tmp_path / "000000.png", save_all=True, append_images=pages[1:])
    imageio.imwrite(tmp_path / "000001.mp4", frames, fps=8, quality=10, macro_block_size=8)
    assert np.array_equal(world.read_frames(world.find_result(tmp_path, "000000")), frames)
    decoded = world.read_frames(world.find_result(tmp_path, "000001"))
    assert decoded.shape == frames.shape and np.abs(decoded.astype(int) - frames).mean() < 10
    assert world.find_result(tmp_path, "000002") is None


def test_score_table(tmp_path):
    """The table is what is quoted: right results 100 %, wrong and missing ones 0 %, the untouched
    source 0 %.
    """
    data, results = tmp_path / "data", tmp_path / "results"
    world.make(data, 18, video_share=0.5)
    results.mkdir()
    for i, line in enumerate(json.loads(line) for line in open(data / "data.jsonl")):
        case = sample(line["seed"], line["video"], kind=line["kind"])
        frames = {"swap": case.target, "color": case.source}.get(line["kind"])
        if frames is not None:
            world.write_frames(frames, results / line["id"], line["video"])
    done = run("score", data, results, "--json", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    rows = {
        (row["kind"], row["media"]): row
        for row in json.loads((tmp_path / "scores.json").read_text())["rows"]
    }
    assert set(rows) == {(kind, media) for kind in (*KINDS, "all") for media in ("image", "clip")}
    for media in ("image", "clip"):
        assert rows["swap", media]["result"] == {
            "success": 100,
            "inside": 0,
            "outside": 0,
            "missing": 0,
        }
        assert (
            rows["color", media]["result"]["success"] == 0
            and rows["color", media]["result"]["missing"] == 0
        )
        assert rows["add", media]["result"] == {
            "success": 0,
            "inside": None,
            "outside": None,
            "missing": 1,
        }
        assert rows["all", media]["result"]["success"] == pytest.approx(100 / 9)
        assert all(rows[kind, media]["no-op"]["success"] == 0 for kind in KINDS)
    lines = done.stdout.splitlines()
    assert "inside < 0.3" in lines[0] and len(lines) == 3 + len(rows) + 1
    assert [line for line in lines if line.startswith("swap     image")][0].split()[4] == "100.0%"
    assert lines[-1].startswith("14 results are missing")


def test_score_of_a_vae(tmp_path):
    """The round trip must hand the VAE (1, 3, T, H, W) in [-1, 1] and return the same bytes."""
    import torch

    seen = []

    class Identity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Linear(1, 1)

        def encode(self, video):
            assert video.shape[:2] == (1, 3) and video.shape[2] in (1, 9)
            seen.extend((video.min().item(), video.max().item()))
            return video

        decode = encode

    world.make(tmp_path, 18, video_share=0.5)
    scores = world.score(tmp_path, vae=Identity())
    assert -1 <= min(seen) < -0.75 and 0.75 < max(seen) <= 1
    assert all(
        row["vae"] == {"success": 100, "inside": 0, "outside": 0, "missing": 0}
        for row in scores["rows"]
    )
    assert "result" not in scores["rows"][0] and "vae" in world.table(scores)


def test_show_draws_a_sheet(tmp_path):
    """The pictures of the README come from here, so both sheets must be drawn in full."""
    for extra in ((), ("--video",)):
        done = run("show", tmp_path / "sheet.png", "--seed", 5, *extra)
        assert done.returncode == 0, done.stderr
        page = np.asarray(Image.open(tmp_path / "sheet.png"))
        assert (
            page.shape[0] > 600 and page.shape[1] > 1200 and (page < 200).any(axis=-1).mean() > 0.02
        )


def test_user_errors_are_one_line(tmp_path):
    """A traceback tells a user nothing."""
    one_frame, no_cases = (
        ("make", tmp_path / "a", "--frames", 1),
        ("make", tmp_path / "b", "--count", 0),
    )
    for arguments in (one_frame, no_cases, ("score", tmp_path)):
        done = run(*arguments)
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr
    with pytest.raises(ValueError, match="train or heldout"):
        sample(0, split="test")
    for size in (0, 60, 88):
        with pytest.raises(ValueError, match="multiple of 16"):
            sample(0, size=size)


def test_joins_are_measured_where_they_are(tiny_weights, monkeypatch, capsys):
    """A target is without error; a result that jumps at its joins jumps nowhere else."""
    import joins

    [case] = joins.draw(1)
    perfect = joins.measure(case, case.target, [9, 17])
    assert {value for values in perfect.values() for value in values} == {0}
    late = case.target.copy()
    late[17:] = 255 - late[17:]
    rows = joins.measure(case, late, [17])
    assert len(rows["jump, join"]) == 1 and rows["jump, join"][0] > 10
    assert max(rows["jump, middle"][:15]) == 0
    assert rows["inside, join"][0] == 0 < rows["inside, join"][1]
    monkeypatch.setattr(sys, "argv", ["joins.py", "--count", "1", "--weights", str(tiny_weights)])
    joins.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        "| apart",
        "| held 1",
        "| held 5",
        "| blended",
    ]
    assert all(line.count("|") == 9 and "nan" not in line for line in lines)
