"""The model that ships, used from a shell as the README says."""

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from edit import read_frames

TOP = Path(__file__).resolve().parents[1]
SHAPES = TOP / "weights" / "shapes"
EXAMPLE = SHAPES / "example.png"
CLIP = SHAPES / "example.mp4"
REFERENCE = SHAPES / "reference.png"
sys.path.append(str(SHAPES))

import world


def shell(script, *arguments, **options):
    command = [sys.executable, TOP / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def edited(*arguments):
    """edit.py on the shipped weights -> its standard error. It must succeed."""
    done = shell("edit.py", *arguments, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return done.stderr


def sound(path):
    """Checksums of the packets of sound, nothing decoded."""
    command = [
        get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        path,
        "-map",
        "0:a",
        "-c",
        "copy",
        "-f",
        "framecrc",
        "-",
    ]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split(",")[5] for line in lines if not line.startswith("#")]


def pixels(path):
    return read_frames(path).frames.astype(int)


def test_the_first_command(tmp_path):
    """A result of another size, or a comparison of something else than was written."""
    edited(EXAMPLE, "turn the scene into night", "-o", tmp_path / "night.png", "--compare")
    source, result = pixels(EXAMPLE), pixels(tmp_path / "night.png")
    assert result.shape == source.shape
    assert np.array_equal(
        pixels(tmp_path / "night_compare.png"), np.concatenate([source, result], axis=2)
    )


def test_the_model_that_ships_edits(tmp_path):
    """Weights that are untrained, or of another code than this one, still make a picture of the
    right size.
    """
    edited(EXAMPLE, "turn the scene into night", "-o", tmp_path / "night.png")
    source, result = pixels(EXAMPLE), pixels(tmp_path / "night.png")
    target = (world.LOOK["night"](source / np.float32(255)) * 255).round()
    assert np.abs(result - target).mean() < 0.25 * np.abs(source - target).mean()


def test_the_python_of_the_readme(tmp_path, monkeypatch):
    """Lines that everybody copies first, and that should make the file of the terminal."""
    code = re.search(r"```python\n(.*?)```", (TOP / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "weights").symlink_to(TOP / "weights")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    edited(EXAMPLE, "turn the scene into night", "-o", tmp_path / "terminal.png")
    assert Path("night.png").read_bytes() == Path("terminal.png").read_bytes()


def test_clip_with_sound(tmp_path):
    """Size, number of frames, rate and sound are those of the input, whatever the models were
    trained on.
    """
    source, result = tmp_path / "source.mp4", tmp_path / "result.mp4"
    subprocess.run(
        [
            get_ffmpeg_exe(),
            "-v",
            "error",
            "-i",
            CLIP,
            "-f",
            "lavfi",
            "-i",
            "sine=440",
            "-vf",
            "setpts=N/(24000/1001)/TB,scale=72:58",
            "-r",
            "24000/1001",
            "-shortest",
            source,
        ],
        check=True,
    )
    edited(source, "turn the scene into night", "-o", result, "--steps", 8)
    before, after = read_frames(source), read_frames(result)
    assert before.frames.shape == after.frames.shape == (9, 58, 72, 3)
    assert before.fps == after.fps == Fraction(24000, 1001)
    assert sound(source) == sound(result) != []


@pytest.mark.parametrize(
    "count, options, remarked",
    [(9, [], False), (10, [], True), (10, ["--frames", 9, "--overlap", 5], False)],
)
def test_a_clip_longer_than_it_knows_gets_a_remark(tmp_path, count, options, remarked):
    first, *others = [Image.new("RGB", (64, 64), (20 * i, 90, 90)) for i in range(count)]
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others)
    out = tmp_path / "out.gif"
    said = edited(tmp_path / "clip.gif", "remove the star", "-o", out, "--steps", 1, *options)
    assert len(read_frames(out).frames) == count
    assert ("--frames 9 --overlap 5" in said) == remarked


def test_an_image_gets_no_remark_on_clips(tmp_path):
    out = tmp_path / "out.png"
    said = edited(EXAMPLE, "remove the star", "-o", out, "--steps", 1, "--overlap", 5)
    assert "clips" not in said


def test_the_reference_decides(tmp_path):
    """A reference that is read but not shown to the model must not swap in the right thing."""
    words = "replace the black triangle with the object in the reference image"
    case = world.sample(0, split="heldout")
    assert case.kind == "ref_swap" and np.array_equal(pixels(EXAMPLE), case.source)
    edited(EXAMPLE, words, "--ref", REFERENCE, "-o", tmp_path / "swapped.png")
    swapped, target = pixels(tmp_path / "swapped.png"), case.target.astype(int)
    changed = world.differs(case.source, case.target)
    error = np.abs(swapped - target)[changed].mean()
    assert error < 0.3 * np.abs(case.source.astype(int) - target)[changed].mean()
    Image.new("RGB", (40, 56), "white").save(tmp_path / "white.png")
    edited(EXAMPLE, words, "--ref", tmp_path / "white.png", "-o", tmp_path / "white_swapped.png")
    without = np.abs(pixels(tmp_path / "white_swapped.png") - target)[changed].mean()
    assert without > 2 * error


def test_same_seed_same_bytes(tmp_path):
    """In two processes: what depends on the order of a set or on the clock agrees with itself
    within one.
    """
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        edited(
            CLIP,
            "make the green square red",
            "-o",
            tmp_path / f"{name}.mp4",
            "--steps",
            2,
            "--seed",
            seed,
        )
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([__file__, "x", "-o", "out.png"], "neither an image nor a video"),
        ([EXAMPLE, "x", "-o", "out.png", "--ref", __file__], "neither an image nor a video"),
        ([EXAMPLE, "x", "-o", "out.png", "--guidance", "nan"], "not a number"),
        ([EXAMPLE, "x", "-o", "out.xyz"], "no known extension"),
        ([EXAMPLE, "x", "-o", "out.png", "--weights", TOP / "tests"], "holds no mllm/"),
        ([EXAMPLE, "x", "-o", "out.png", "--weights", SHAPES / "vae"], "holds no mllm/"),
    ],
)
def test_bad_input_in_a_shell(arguments, said, tmp_path):
    """tests/test_edit.py has every kind within one process; here is what a shell gets: code, one
    line, no file.
    """
    done = shell("edit.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert (
        done.stderr.startswith("edit.py: error: ")
        and done.stderr.count("\n") == 1
        and said in done.stderr
    )


def test_instructions_with_special_tokens(tmp_path):
    """Words that place a picture or open a turn are for the processor alone; here they end in one
    line.
    """
    done = shell("edit.py", EXAMPLE, "add <|image_pad|>", "-o", tmp_path / "out.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "<|image_pad|>" in done.stderr


@pytest.mark.slow
def test_an_edit_is_taught_in_minutes(tmp_path):
    """The README's experiment: its losses, and the edit of a photo that was not shown."""
    data, out = tmp_path / "data" / "data.jsonl", tmp_path / "out"
    done = shell("weights/shapes/teach.py", data.parent, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    options = ["--steps", 300, "--lr", "1e-3", "--muon-lr", "0.02", "--device", "cpu"]
    options += ["--data", data, "--weights", SHAPES, "--out", out]
    done = shell("train.py", "--stage", 3, *options)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    said = re.search(r"loss fell from ([\d.]+) to ([\d.]+)\.", (TOP / "README.md").read_text())
    assert round(losses[0], 2) == float(said[1])
    assert losses[-1] == pytest.approx(float(said[2]), abs=0.002)
    cat, result = tmp_path / "cat.png", tmp_path / "blue.png"
    edited(cat, "swap red and blue", "--instructx", out / "instructx", "-o", result)
    target = pixels(cat)[..., ::-1]
    assert np.abs(pixels(result) - target).mean() < 0.3 * np.abs(pixels(cat) - target).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, arguments, said",
    [
        ("vae.py", [], "PSNR"),
        ("mllm.py", [], r"\w"),
        ("dit.py", [], "velocity"),
        ("sampler.py", [], "unipc"),
        ("connector.py", [], "velocity"),
        ("edit.py", ["--help"], "--compare"),
        ("train.py", ["--help"], "--stage"),
    ],
)
def test_each_file_runs_by_itself(script, arguments, said, tmp_path):
    """From any folder, on nothing but what ships."""
    done = shell(script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, arguments",
    [
        ("vae.py", ["nothing.png"]),
        ("mllm.py", ["nothing.png"]),
        ("dit.py", ["nowhere"]),
        ("connector.py", ["nowhere"]),
    ],
)
def test_each_file_refuses_by_itself(script, arguments, tmp_path):
    """A mistyped name is no reason for a traceback."""
    done = shell(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{script}: ") and arguments[0] in done.stderr


def test_the_world_edits_in_float32():
    """What ships has half precision, in which a CPU is several times slower than it need be."""
    assert {p.dtype for p in world.load_model(SHAPES).parameters()} == {torch.float32}


def test_what_ships_is_small():
    """A clone carries it for ever."""
    files = [
        file for file in SHAPES.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    ]
    assert sum(file.stat().st_size for file in files) <= 25e6


def test_examples_are_of_the_world():
    """They are the first held-out cases, and not chosen for how well they go."""
    case, clip = world.sample(0, split="heldout"), world.sample(0, video=True, split="heldout")
    assert np.array_equal(pixels(EXAMPLE), case.source) and np.array_equal(
        pixels(REFERENCE)[0], case.references[0]
    )
    media = read_frames(CLIP)
    assert media.fps == 16 and np.abs(media.frames.astype(int) - clip.source).mean() < 3
