"""What an accelerator computes, against the CPU: skipped where there is none.

Command lines only, so that what is tested is what a user runs. tests/gpu.sh runs this.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

TOP = Path(__file__).resolve().parents[1]
CUDA, MPS = torch.cuda.is_available(), torch.backends.mps.is_available()
DEVICE = "cuda" if CUDA else "mps" if MPS else None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DEVICE, reason="there is no accelerator")]


def run(script, *arguments):
    # NVIDIA's TF32 would round convolutions to 10 bits, and the CPU does not.
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    command = [sys.executable, TOP / script, *map(str, arguments)]
    subprocess.run(command, check=True, env=environment)


def draw(file, frames, seed, size=(88, 72)):
    """A picture or an animation of smooth random colors."""
    noise = np.random.default_rng(seed).integers(0, 256, (frames, 4, 5, 3), np.uint8)
    pictures = [Image.fromarray(frame).resize(size) for frame in noise]
    pictures[0].save(file, save_all=frames > 1, append_images=pictures[1:], duration=100)
    return file


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("options", [
    "", "--offload", "--quantize int8", "--tile 64 --guidance 1", "--compile"])
def test_an_edit_equals_the_cpus(tiny_weights, tmp_path, frames, options):
    """A tensor left on the CPU fails, and weights copied too early or late make noise."""
    source, reference = tmp_path / "source.png", tmp_path / "reference.png"
    draw(source, frames, 0), draw(reference, 1, 1, (24, 40))
    results = []
    for device in ("cpu", DEVICE):
        file = tmp_path / f"{device}.png"
        run("edit.py", source, "make it night", "-o", file, "--ref", reference, "--weights",
            tiny_weights, "--device", device, "--dtype", "float32", *options.split())
        with Image.open(file) as image:
            pictures = [np.asarray(p.convert("RGB"), int) for p in ImageSequence.Iterator(image)]
        results.append(np.stack(pictures))
    assert len(results[0]) == frames and results[0].shape == results[1].shape
    assert np.abs(results[0] - results[1]).max() <= 1


@pytest.mark.parametrize("options", ["--stage 1", "--stage 2", "--stage 3 --dit-lora 2",
                                     "--stage 3 --gradient-checkpointing"])
def test_training_equals_the_cpus(tiny_weights, tmp_path, options):
    """The second loss is that of weights which the device has updated."""
    rows = []
    for i, frames in enumerate((1, 1, 5, 5)):
        source, target = (draw(tmp_path / f"{i}{side}.png", frames, i, (16, 16)) for side in "st")
        rows.append({"source": source.name, "target": target.name, "instruction": f"edit {i}"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    losses = []
    for device in ("cpu", DEVICE):
        out = tmp_path / device
        run("train.py", *options.split(), "--data", tmp_path / "data.jsonl", "--weights",
            tiny_weights, "--out", out, "--device", device, "--precision", "float32", "--steps", 2,
            "--lr", 1e-3, "--warmup", 1, "--image-batch", 2, "--video-batch", 2)
        metrics = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, metrics) if "loss" in row])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)
