"""The model that ships, used as the README says: every file from a shell, and the README's own words checked."""

import functools
import importlib
import re
import shlex
import subprocess
import sys
from collections import deque
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dit
import vae
from connector import Connector, InstructXConfig
from edit import read_frames
from mllm import Qwen2_5_VL, add_lora

TOP = Path(__file__).resolve().parents[1]
SHAPES = TOP / "weights" / "shapes"
PAGES = [TOP / "README.md", TOP / "weights" / "README.md"]
README = PAGES[0].read_text()
EXAMPLE, CLIP, REFERENCE = (SHAPES / name for name in ("example.png", "example.mp4", "reference.png"))
sys.path.append(str(SHAPES))

import world


def shell(script, *arguments, **more):
    return subprocess.run([sys.executable, TOP / script, *map(str, arguments)], capture_output=True, text=True, **more)


def edited(*arguments):
    """edit.py on the shipped weights -> its standard error. It must succeed."""
    done = shell("edit.py", *arguments, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return done.stderr


def sound(path):
    """Checksums of the packets of sound, nothing decoded."""
    command = [get_ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:a", "-c", "copy", "-f", "framecrc", "-"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split(",")[5] for line in lines if not line.startswith("#")]


def pixels(path):
    return read_frames(path).frames.astype(int)


def test_the_first_command(tmp_path):
    """A result of another size, or a comparison of something else than was written."""
    edited(EXAMPLE, "turn the scene into night", "-o", tmp_path / "night.png", "--compare")
    source, result = pixels(EXAMPLE), pixels(tmp_path / "night.png")
    assert result.shape == source.shape
    assert np.array_equal(pixels(tmp_path / "night_compare.png"), np.concatenate([source, result], axis=2))


def test_the_model_that_ships_edits(tmp_path):
    """Weights that are untrained, or of another code than this one, still make a picture of the right size."""
    edited(EXAMPLE, "turn the scene into night", "-o", tmp_path / "night.png")
    source, result = pixels(EXAMPLE), pixels(tmp_path / "night.png")
    target = (world.LOOK["night"](source / np.float32(255)) * 255).round()
    assert np.abs(result - target).mean() < 0.25 * np.abs(source - target).mean()


def test_clip_with_sound(tmp_path):
    """Size, number of frames, rate and sound are those of the input, whatever the models were trained on."""
    source, result = tmp_path / "source.mp4", tmp_path / "result.mp4"
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-i", CLIP, "-f", "lavfi", "-i", "sine=440", "-vf",
                    "setpts=N/(24000/1001)/TB,scale=72:58", "-r", "24000/1001", "-shortest", source], check=True)
    edited(source, "turn the scene into night", "-o", result, "--steps", 8)
    before, after = read_frames(source), read_frames(result)
    assert before.frames.shape == after.frames.shape == (9, 58, 72, 3)
    assert before.fps == after.fps == Fraction(24000, 1001)
    assert sound(source) == sound(result) != []


def test_the_reference_decides(tmp_path):
    """References that are read but not shown to the model leave the result as it is."""
    Image.new("RGB", (40, 56), "white").save(tmp_path / "white.png")
    words = "replace the black triangle with the object in the reference image"
    for name, reference in (("a", REFERENCE), ("b", tmp_path / "white.png")):
        edited(EXAMPLE, words, "--ref", reference, "-o", tmp_path / f"{name}.png", "--steps", 4)
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert a.shape == b.shape == pixels(EXAMPLE).shape and not np.array_equal(a, b)


def test_same_seed_same_bytes(tmp_path):
    """In two processes: what depends on the order of a set or on the clock agrees with itself within one."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        edited(CLIP, "make the green square red", "-o", tmp_path / f"{name}.mp4", "--steps", 2, "--seed", seed)
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("arguments, said", [
    ([__file__, "x", "-o", "out.png"], "neither an image nor a video"),
    ([EXAMPLE, "x", "-o", "out.png", "--ref", __file__], "neither an image nor a video"),
    ([EXAMPLE, "x", "-o", "out.png", "--guidance", "nan"], "not a number"),
    ([EXAMPLE, "x", "-o", "out.xyz"], "no known extension"),
    ([EXAMPLE, "x", "-o", "out.png", "--weights", TOP / "tests"], "holds no mllm/"),
    ([EXAMPLE, "x", "-o", "out.png", "--weights", SHAPES / "vae"], "holds no mllm/")])
def test_bad_input_in_a_shell(arguments, said, tmp_path):
    """tests/test_edit.py has every kind within one process; here is what a shell gets: code, one line, no file."""
    done = shell("edit.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.startswith("edit.py: error: ") and done.stderr.count("\n") == 1 and said in done.stderr


def test_instructions_with_special_tokens(tmp_path):
    """Words that place a picture or open a turn are for the processor alone; here they end in one line."""
    done = shell("edit.py", EXAMPLE, "add <|image_pad|>", "-o", tmp_path / "out.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "<|image_pad|>" in done.stderr


@pytest.mark.parametrize("script, arguments, said", [
    ("vae.py", [], "PSNR"), ("mllm.py", [], r"\w"), ("dit.py", [], "velocity"), ("sampler.py", [], "unipc"),
    ("connector.py", [], "velocity"), ("edit.py", ["--help"], "--compare"), ("train.py", ["--help"], "--stage")])
def test_each_file_runs_by_itself(script, arguments, said, tmp_path):
    """From any folder, on nothing but what ships."""
    done = shell(script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, arguments", [
    ("vae.py", ["nothing.mp4"]), ("mllm.py", ["nothing.png"]), ("dit.py", ["nowhere"]), ("connector.py", ["nowhere"])])
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
    files = [file for file in SHAPES.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 25e6


def test_examples_are_of_the_world():
    """They are the first held-out cases, and not chosen for how well they go."""
    case, clip = world.sample(0, split="heldout"), world.sample(0, video=True, split="heldout")
    assert np.array_equal(pixels(EXAMPLE), case.source) and np.array_equal(pixels(REFERENCE)[0], case.references[0])
    media = read_frames(CLIP)
    assert media.fps == 16 and np.abs(media.frames.astype(int) - clip.source).mean() < 3


def command_lines():
    """Every `python FILE ...` of the README, in blocks and in sentences, as lists of words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(python [^`]+)`", re.sub(r"^```\w*\n.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE))
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


@functools.cache
def options(script, *command):
    return set(re.findall(r"(?<![\w-])--?\w[\w-]*", shell(script, *command, "--help").stdout))


def test_commands_of_the_readme_have_such_options():
    """An option that was renamed, in a command that nobody has typed since."""
    lines = command_lines()
    assert len(lines) > 15 and {"edit.py", "train.py", "weights/shapes/world.py"} <= {script for script, *_ in lines}
    for script, *words in lines:
        used = {word for word in words if word.startswith("-")}
        if script == "tests/full_size.py":                          # hands what it does not know to edit.py
            used -= options("edit.py")
        command = words[:1] if script == "weights/shapes/world.py" else []
        assert used <= options(script, *command), f"{script} {used}"
        for word in words:
            assert not word.startswith("weights/shapes") or (TOP / word).exists(), word


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_links_lead_somewhere(page):
    """Links to files that were moved, and to headings that were reworded."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            assert heading in map(anchor, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), link


def test_the_map_names_what_exists():
    """From the paper to the code: a class that was renamed would lead nowhere."""
    section = README.partition("## From the paper to the code")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()[4:] if line]
    assert len(rows) > 15 and {row[3] for row in rows} == {"paper says", "we chose"}
    for row in rows:
        module = owner = None
        for name in re.findall(r"`([\w./]+)`", row[2]):
            if name.endswith(".py"):
                assert (TOP / name).is_file(), name
                module = importlib.import_module(Path(name).stem)
                continue
            found, _, method = name.partition(".")
            if hasattr(module, found):
                owner = getattr(module, found)
                name = method
            attributes = dir(owner) + re.findall(r"self\.(\w+) =", Path(module.__file__).read_text())
            assert not name or name in attributes, f"{row[2]}: {name}"


def gigabytes(count, size):
    return f"{count * size / 1e9:.2f} GB"


def test_figures_of_the_readme():
    """What the tables say of sizes, computed from the models."""
    count = lambda model: sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        mllm, connector, codec = Qwen2_5_VL(), Connector(InstructXConfig()), vae.WanVAE(vae.PRESETS["wan2.1"])
        dits = {name: dit.WanDiT(dit.PRESETS[name]) for name in ("1.3B", "14B")}
        before = count(mllm)
        add_lora(mllm)
    ours = count(mllm) - before + count(connector)
    rows = {"Qwen2.5-VL-3B": [f"{before:,}", gigabytes(before, 2)],
            "queries, connector, LoRA": [f"{ours:,}", gigabytes(ours, 2)],
            "Wan2.1 VAE": [f"{count(codec):,}", gigabytes(count(codec), 4)]}
    sums = {}
    for name, model in dits.items():
        exact = sum(p.numel() for key, p in model.named_parameters() if dit.FLOAT32.search(key))
        loaded = 2 * count(model) + 2 * exact                       # bytes: what is kept in float32 has two more
        rows[f"Wan2.1 DiT {name}"] = [f"{count(model):,}", gigabytes(count(model), 4), gigabytes(loaded, 1)]
        sums[name] = (2 * before + 2 * ours + loaded + 4 * count(codec)) / 1e9
    rows["together with the 1.3B / the 14B"] = [f"{sums['1.3B']:.2f} / {sums['14B']:.2f} GB"]
    for name, figures in rows.items():
        line = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
        assert all(f" {figure}" in line for figure in figures), (line, figures)
    big = dit.PRESETS["14B"]
    assert gigabytes(2 * big.num_layers * 2 * 512 * big.dim, 2) in README                   # keys and values
    for name in dits:
        _, tokens, flop = dit.costs(dit.PRESETS[name], (1, 16, 21, 60, 104), 512)
        assert f"{tokens:,} tokens" in README and f"{flop / 1e12:,.0f} TFLOP" in README


class Live(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at the same time, at the most."""

    def __init__(self, *models):
        super().__init__()
        self.peak = 0
        weights = [StorageWeakRef(p.untyped_storage()) for model in models for p in model.parameters()]
        self.alive = {weight.cdata: (weight, 0) for weight in weights}      # what is only a view of them takes nothing

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.alive.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.alive = {key: both for key, both in self.alive.items() if not both[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def bytes_of(model, name=lambda name: True):
    """In bfloat16, but for what stays in float32: parts of the DiT, LoRA, the VAE."""
    exact = lambda key: (isinstance(model, vae.WanVAE) or "lora_" in key
                         or isinstance(model, dit.WanDiT) and dit.FLOAT32.search(key))
    return sum(p.numel() * (4 if exact(key) else 2) for key, p in model.named_parameters() if name(key))


@functools.cache
def vae_peak(frames):
    """Bytes that the VAE holds at its peak for each pixel of a frame, beyond its weights. All it does grows with area."""
    with torch.device("meta"):
        codec = vae.WanVAE()
    codec.to_empty(device="cpu")
    length, side, peaks = min(frames, 9), 64, []                    # from the third latent frame on, chunks are alike
    video, z = torch.zeros(1, 3, length, side, side), torch.zeros(1, 16, (length - 1) // 4 + 1, side // 8, side // 8)
    for run, held in ((lambda: codec.encode(video), 3 * 4 * frames), (lambda: deque(codec.decode_stream(z), 0), 0)):
        with Live(codec) as live, torch.no_grad():
            run()
        peaks.append(live.peak / side ** 2 + held)                  # the whole clip is there while it is encoded
    return max(peaks)


def needs(preset, shape, queries):
    """GB that an edit with guidance holds at most: all in memory, blocks in int8, blocks offloaded.

    The peak is in a step of the DiT or, where that is small, in the VAE.
    """
    config, narrow = dit.PRESETS[preset], replace(dit.PRESETS[preset], num_layers=2)
    with torch.device("meta"):
        mllm, connector, codec, model = Qwen2_5_VL(), Connector(InstructXConfig()), vae.WanVAE(), dit.WanDiT(config)
        add_lora(mllm)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        step = dit.WanDiT(narrow)
        torch.set_default_dtype(torch.float32)
        latents = torch.empty(2, *shape, dtype=torch.bfloat16)
        context = torch.empty(2, queries, 4096, dtype=torch.bfloat16)
        with Live(step) as live:
            condition = step.condition(context, latents.shape, latents[:1], cache=False)
            step.denoise(latents, torch.empty(2), condition)
    matrix = lambda key: key.startswith("blocks.") and key.endswith("weight") and "norm" not in key
    tower = lambda key: key.startswith(("visual.blocks.", "model.layers.")) and "lora_" not in key
    others, whole = bytes_of(connector) + bytes_of(codec), bytes_of(mllm) + bytes_of(model)
    block = bytes_of(model, lambda key: key.startswith("blocks.0."))
    apart = bytes_of(mllm, tower) + bytes_of(model, lambda key: key.startswith("blocks."))
    denoise = live.peak + 2 * 2 * 2 * queries * config.dim * config.num_layers
    code = vae_peak(4 * shape[1] - 3) * 64 * shape[2] * shape[3]
    return [(others + max(size + denoise, between + code)) / 1e9
            for size, between in ((whole, whole), [whole - bytes_of(model, matrix) / 2] * 2,
                                  (whole - apart + 2 * block, whole - apart))]


@pytest.mark.parametrize("preset", ["14B", "1.3B"])
def test_needs_of_the_readme(preset):
    """What an edit takes by size, computed from the tensors of a step."""
    for name, shape, queries in (("an image of 1024x1024", (16, 1, 128, 128), 256),
                                 ("81 frames of 832x480", (16, 21, 60, 104), 512),
                                 ("81 frames of 1280x720", (16, 21, 90, 160), 512)):
        row = f"| {preset}, {name} | " + " | ".join(f"{size:.1f}" for size in needs(preset, shape, queries)) + " |"
        assert row in README, row
        _, _, flop = dit.costs(dit.PRESETS[preset], (1, *shape), queries)
        seconds = [2 * 50 * flop / (peak * 1e12) for peak in (790, 312, 165)]       # guidance, steps
        row = f"| {preset}, {name} | {100 * flop / 1e15:,.1f} | " + " | ".join(f"{time:,.0f}" for time in seconds) + " |"
        assert row in README, row


def test_shapes_of_the_readme():
    """The figure of the flow, from the code that it tells of."""
    from mllm import smart_resize
    height, width = smart_resize(480, 832, 28, 3136, 12845056)
    patches = 7 * (height // 14) * (width // 14)                    # 13 frames, two to a patch
    assert f"patches ({patches}, 1176), which become {patches // 4} of" in README
    assert f"(1, {InstructXConfig().video_queries}, {InstructXConfig().context_dim})" in README
