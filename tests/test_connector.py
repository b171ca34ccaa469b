"""connector.py: the seams between the four models, and the machines below them, on tiny weights."""

import contextlib
import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_weights, randomize
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import connector
from connector import (
    InstructX,
    compile_blocks,
    dit_block,
    fit_reference,
    in_tiles,
    locate,
    offload_blocks,
    recompute_blocks,
    reference_size,
    tile,
)
from dit import FLOAT32, WanDiT
from dit import PRESETS as DIT_PRESETS
from mllm import Qwen2_5_VL, lora_layers
from sampler import FlowSampler
from train import flow_loss
from vae import WanVAE, to_frames, to_video

TOLERANCE = 2e-5
SHAPES = Path(connector.__file__).parent / "weights" / "shapes"


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


IMAGE, CLIP = picture(1, 24, 40), picture(6, 24, 40, seed=1)
REFERENCES = [picture(16, 24, seed=2), picture(40, 64, seed=3)]


@pytest.fixture(scope="module")
def model(tiny_weights):
    """Shared by all tests here: none may change it for good."""
    return InstructX.from_pretrained(tiny_weights)


@pytest.fixture
def folder(tiny_weights, tmp_path):
    """A weights folder of one's own."""
    shutil.copytree(tiny_weights, tmp_path / "weights")
    return tmp_path / "weights"


@torch.inference_mode()
def by_hand(model, frames, instruction, references=(), guidance=2.0, seed=0):
    """One edit, each branch by itself and nothing shared between steps: what `edit` must equal."""
    area = frames.shape[1] * frames.shape[2]
    references = [fit_reference(image, area) for image in references]
    prompts = [model.prompt(frames, words, references) for words in (instruction, "")]
    instructed, empty = (model.context(prompt, len(frames) > 1) for prompt in prompts)
    source = model.encode(frames)
    latents = [model.encode(image[None]) for image in references]

    def velocity(z, t):
        v = model.dit(z, t, empty, source, latents)
        return v + guidance * (model.dit(z, t, instructed, source, latents) - v)

    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed))
    z = FlowSampler(steps=2, shift=3.0).sample(velocity, noise)
    return np.concatenate(list(model.decode(z, frames.shape)))


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def same(a, b):
    """Equal but for the order of sums: at most one level of 255 apart, and hardly anywhere."""
    difference = np.abs(np.asarray(a).astype(int) - np.asarray(b))
    return difference.max() <= 1 and (difference > 0).mean() < 0.01


# An edit.


@pytest.mark.parametrize(
    "frames, references", [(IMAGE, []), (CLIP, []), (IMAGE, REFERENCES), (CLIP, REFERENCES)]
)
def test_edit_is_two_branches_and_the_sampler(model, frames, references):
    """A batch of two in the wrong order, guidance with the wrong sign, or a stale condition."""
    result = model.edit(frames, "make it night", references, seed=5)
    assert result.dtype == np.uint8 and result.std() > 1
    assert same(result, by_hand(model, frames, "make it night", references, seed=5))


def test_guidance_one_is_what_the_formula_gives(model):
    """It runs a single branch, that of the instruction and not the empty one."""
    expected = by_hand(model, IMAGE, "make it night", guidance=1.0)
    assert same(model.edit(IMAGE, "make it night", guidance=1), expected)


def test_a_picture_in_is_a_picture_out(model):
    """PIL images are what a notebook has; other modes than RGB must not shift the channels."""
    image, reference = Image.fromarray(IMAGE[0]), Image.fromarray(REFERENCES[0])
    result = model.edit(image, "make it night", [reference])
    assert isinstance(result, Image.Image) and result.mode == "RGB" and result.size == (40, 24)
    assert np.array_equal(result, model.edit(IMAGE, "make it night", REFERENCES[:1])[0])
    assert np.array_equal(model.edit(image.convert("RGBA"), "x"), model.edit(image, "x"))
    grey = np.asarray(image.convert("L").convert("RGB"))[None]
    assert np.array_equal(model.edit(image.convert("L"), "x"), model.edit(grey, "x")[0])


def test_pieces_are_written_as_they_come(model):
    """A long clip must not pile up in memory where the caller takes its pieces."""
    pieces = []
    assert model.edit(CLIP, "x", write=pieces.append) is None
    assert len(pieces) > 1 and np.array_equal(np.concatenate(pieces), model.edit(CLIP, "x"))


def test_all_that_an_edit_depends_on(model, tiny_weights):
    """Each argument and setting must change the result; the same ones must give it again."""
    results = [
        model.edit(CLIP, "make it night"),
        model.edit(CLIP, "make it day"),
        model.edit(CLIP, "make it night", REFERENCES[:1]),
        model.edit(CLIP, "make it night", REFERENCES),
        model.edit(CLIP, "make it night", steps=3),
        model.edit(CLIP, "make it night", guidance=4),
        model.edit(CLIP, "make it night", seed=1),
        model.edit(CLIP, "make it night", fps=2.0),
    ]
    # With two steps both solvers are the same.
    for settings in ({"shift": 7.0}, {"solver": "euler", "steps": 3}, {"guidance": 3.0}):
        other = InstructX.from_pretrained(tiny_weights, **settings)
        results.append(other.edit(CLIP, "make it night"))
    assert len({result.tobytes() for result in results}) == len(results)
    again = model.edit(CLIP, "make it night", steps=2, guidance=2, seed=0, fps=16.0)
    assert np.array_equal(results[0], again)


@pytest.mark.parametrize("shape", [(1, 33, 47), (1, 16, 16), (2, 17, 40), (7, 40, 23), (5, 32, 48)])
def test_any_size_in_is_the_same_size_out(model, shape):
    """Cropping or scaling to what the models take is what shifts an edit against its source."""
    frames = picture(*shape)
    assert model.edit(frames, "x", steps=1).shape == frames.shape
    side = model.multiple()
    extra = ((1 - shape[0]) % model.vae.temporal_stride, -shape[1] % side, -shape[2] % side)
    padded = np.pad(frames, [*((0, n) for n in extra), (0, 0)], mode="edge")
    z = model.encode(frames)
    assert torch.equal(z, model.encode(padded))
    ours = np.concatenate(list(model.decode(z, frames.shape)))
    whole = np.concatenate(list(model.decode(z, padded.shape)))
    assert np.array_equal(ours, whole[: shape[0], : shape[1], : shape[2]])


def test_decoded_pieces_are_the_whole(model):
    """Streamed decoding must not lose, double or reorder frames."""
    z = model.encode(CLIP)
    pieces = list(model.decode(z, CLIP.shape))
    whole = to_frames(model.vae.decode(z))[:6, :24, :40]
    assert len(pieces) > 1 and np.array_equal(np.concatenate(pieces), whole)


def test_progress_tells_every_phase(model):
    """The progress bar of edit.py hangs on it: phases in order, each up to its total."""
    calls = []
    model.edit(CLIP, "x", REFERENCES, steps=3, progress=lambda *call: calls.append(call))
    phases = list(dict.fromkeys(phase for phase, _, _ in calls))
    assert phases == ["understand", "encode", "denoise", "decode"]
    for phase in phases:
        steps = [(done, total) for name, done, total in calls if name == phase]
        assert steps == sorted(steps) and steps[0][0] == 0 and steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"frames": IMAGE.astype(np.float32)}, "frames are float32"),
        ({"frames": IMAGE[0]}, r"frames are uint8 \(24, 40, 3\)"),
        ({"frames": IMAGE[:0]}, r"frames are uint8 \(0, 24, 40, 3\)"),
        ({"frames": IMAGE[..., :2]}, r"frames are uint8 \(1, 24, 40, 2\)"),
        ({"references": [IMAGE]}, r"a picture is uint8 \(1, 24, 40, 3\)"),
        ({"references": [IMAGE[0].astype(float)]}, "a picture is float64"),
        ({"guidance": 0.5}, "guidance is 0.5"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"frames": CLIP, "fps": 0.0}, "fps is 0"),
        ({"instruction": "<|image_pad|>"}, "special token"),
        ({"instruction": None}, "must be a string"),
    ],
)
def test_arguments_that_make_no_edit(model, arguments, message):
    """A wrong dtype or a NaN must not come out as a grey picture after minutes."""
    with pytest.raises(ValueError, match=message) as raised:
        model.edit(**{"frames": IMAGE, "instruction": "x", **arguments})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("guidance", [1, 3])
def test_known_frames_stay_and_the_others_go_on_from_them(tiny_weights, solver, guidance):
    """Known frames that come out changed, or that the others never see: a jump at every join."""
    model = InstructX.from_pretrained(tiny_weights, solver=solver)
    clip, start = picture(9, 24, 40, seed=4), picture(5, 24, 40, seed=5)
    seen, velocity = [], model.velocity

    def spied(*arguments):
        v = velocity(*arguments)
        return lambda z, t: seen.append((z.clone(), t)) or v(z, t)

    model.velocity = spied
    settings = dict(steps=5, guidance=guidance, seed=3)
    free = model.edit(clip, "make it night", **settings)
    apart, seen[:] = seen[:], []
    held = model.edit(clip, "make it night", **settings, start=start)
    with torch.inference_mode():
        known = model.encode(start)
        round_trip = torch.cat(list(model.vae.decode_stream(known)), dim=2)
    noise = torch.randn(1, *seen[0][0].shape[1:], generator=torch.Generator().manual_seed(3))
    count = known.shape[2]
    for z, t in seen:  # as noisy as the others, and on the line from the noise to what is known
        sigma = t[0] / seen[0][1][0]
        expected = sigma * noise[:, :, :count] + (1 - sigma) * known
        assert error(z[:1, :, :count], expected) < TOLERANCE
    cropped = to_frames(round_trip[..., :24, :40])
    assert np.abs(held[:5].astype(int) - cropped).max() <= 1
    assert not np.array_equal(held[5:], free[5:])
    assert len(seen) == len(apart) == 5


@pytest.mark.parametrize(
    "start, message",
    [
        (picture(4, 24, 40), "4 known frames; it should be 1 [+] a multiple of 4"),
        (picture(9, 24, 40), "cannot start with"),
        (picture(5, 24, 48), "cannot start with"),
        (picture(5, 24, 40).astype(float), "not uint8"),
        (picture(0, 24, 40), "not uint8"),
    ],
)
def test_known_frames_that_do_not_fit(model, start, message):
    """Shapes that torch would report from within, after the work."""
    with pytest.raises(ValueError, match=message):
        model.edit(picture(9, 24, 40), "x", start=start)


@pytest.mark.parametrize("settings", [{"shift": 0.0}, {"solver": "magic"}, {"steps": 0}])
def test_settings_that_make_no_edit(tiny_weights, settings):
    """A bad setting of the sampler is told before the pictures are encoded."""
    phases = []
    model = InstructX.from_pretrained(tiny_weights, **settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        model.edit(IMAGE, "x", progress=lambda *call: phases.append(call))
    assert not phases


@pytest.mark.parametrize(
    "weight, name", [("connector.mlp.2.bias", "context"), ("dit.head.head.bias", "result")]
)
def test_numbers_that_overflow(tiny_weights, weight, name):
    """NaN would become a black picture, without a word."""
    broken = InstructX.from_pretrained(tiny_weights)
    with torch.no_grad():
        broken.get_parameter(weight)[0] = float("nan")
    with pytest.raises(FloatingPointError, match=f"the {name} is not finite .*float32"):
        broken.edit(IMAGE, "x")


# Sampling, as validation does it.


def test_sample_without_a_source(model):
    """Stage 1 has no source: one row of context is sampled plainly, two with guidance."""
    with torch.no_grad():
        rows = [model.context(model.prompt(IMAGE, words), False) for words in ("night", "")]
    shape, calls = (1, 16, 1, 4, 6), []
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    for guidance in (1, 2.0):

        @torch.no_grad()
        def velocity(z, t, guidance=guidance):
            instructed, empty = model.dit(z, t, rows[0]), model.dit(z, t, rows[1])
            return empty + guidance * (instructed - empty)

        expected = FlowSampler(steps=3, shift=3.0).sample(velocity, noise)
        z = model.sample(torch.cat(rows), shape, steps=3, guidance=guidance, seed=7)
        assert z.shape == shape and z.dtype == torch.float32
        assert error(z, expected) < TOLERANCE
        if guidance == 1:
            progress = dict(progress=lambda *call: calls.append(call))
            alone = model.sample(rows[0], shape, steps=3, seed=7, **progress)
            assert error(alone, expected) < TOLERANCE
    assert calls == [("denoise", 1, 3), ("denoise", 2, 3), ("denoise", 3, 3)]


# What the MLLM sees, and what leaves it.


@torch.inference_mode()
def test_padded_batch_is_separate_prompts(model):
    """The empty instruction is shorter than the other and padded, which it must not notice."""
    for frames in (IMAGE, CLIP):
        instructions = ("a long instruction, to be padded for", "", "x")
        prompts = [model.prompt(frames, words, REFERENCES) for words in instructions]
        for same_pictures in (False, True):
            batch = model.processor.collate(prompts, same_pictures)
            together = model.context(batch, len(frames) > 1)
            for row, prompt in zip(together, prompts):
                assert error(row, model.context(prompt, len(frames) > 1)[0]) < TOLERANCE


@torch.inference_mode()
def test_only_the_queries_leave_the_mllm(model):
    """Off by one, and the last token of the prompt would pass for a query."""
    prompt, queries = model.prompt(IMAGE, "x"), model.config.image_queries
    before = model.context(prompt, False)

    def scramble(module, inputs, hidden):
        hidden[:, :-queries] = torch.randn_like(hidden[:, :-queries])

    hook = model.mllm.register_forward_hook(scramble)
    after = model.context(prompt, False)
    hook.remove()
    assert before.shape == (1, queries, model.config.context_dim) and torch.equal(before, after)


@torch.inference_mode()
def test_images_and_clips_have_their_own_queries(model):
    """The paper's two sets: shared or swapped ones would still run."""
    contexts = {}
    for name, frames in (("image_queries", IMAGE), ("video_queries", CLIP)):
        prompt = model.prompt(frames, "x")
        contexts[name] = [model.context(prompt, len(frames) > 1)]
        for changed in ("image_queries", "video_queries"):
            weight = getattr(model.connector, changed)
            kept = weight.clone()
            weight.zero_()
            contexts[name].append(model.context(prompt, len(frames) > 1))
            weight.copy_(kept)
    before, no_image, no_video = contexts["image_queries"]
    assert before.shape[1] == 4
    assert not torch.allclose(before, no_image) and torch.equal(before, no_video)
    before, no_image, no_video = contexts["video_queries"]
    assert before.shape[1] == 6
    assert torch.equal(before, no_image) and not torch.allclose(before, no_video)


def test_what_the_mllm_sees_of_a_clip(tiny_weights):
    """The paper: 13 frames, spread evenly, with their times in seconds of the clip."""
    model = InstructX.from_pretrained(tiny_weights, mllm_frames=13)
    clip = picture(81, 16, 16)
    frames = clip[[0, 7, 13, 20, 27, 33, 40, 47, 53, 60, 67, 73, 80]]
    prompt, expected = model.prompt(clip, "x", fps=8.0), model.prompt(frames, "x", fps=1.2)
    assert torch.equal(prompt["pixel_values_videos"], expected["pixel_values_videos"])
    assert prompt["video_grid_thw"][0, 0] == 7  # two frames to a patch, the last one doubled
    seconds = prompt["second_per_grid_ts"]  # two frames of 80/12 frames of the clip each
    assert seconds.tolist() == pytest.approx([2 * 80 / 12 / 8.0])
    assert seconds.tolist() == pytest.approx(expected["second_per_grid_ts"].tolist())
    short = model.prompt(clip[:5], "x")
    assert short["video_grid_thw"][0, 0] == 3 and short["second_per_grid_ts"].tolist() == [2 / 16]
    assert "pixel_values" not in prompt and "pixel_values_videos" not in model.prompt(IMAGE, "x")


def test_frames_of_a_clip_are_scaled_down_for_the_mllm(tiny_weights):
    """A clip of many large frames would make a prompt of many thousand tokens."""
    clip = picture(4, 32, 32)
    grids = []
    for pixels in (32 * 32, 16 * 16):
        model = InstructX.from_pretrained(tiny_weights, frame_pixels=pixels)
        grids.append(model.prompt(clip, "x")["video_grid_thw"].tolist())
    assert grids == [[[2, 4, 4]], [[2, 2, 2]]]


# References.


def test_large_references_are_scaled_down(model):
    """A 12-megapixel reference of a small source would cost hundreds of times its tokens."""
    assert fit_reference(picture(480, 200), 24 * 40).shape == (48, 20, 3)
    assert np.array_equal(fit_reference(REFERENCES[0], 24 * 40), REFERENCES[0])
    flat = np.full((500, 300, 3), (10, 100, 200), np.uint8)
    assert (fit_reference(Image.fromarray(flat), 100) == (10, 100, 200)).all()
    large = picture(480, 200)
    small = fit_reference(large, 24 * 40)
    assert np.array_equal(model.edit(IMAGE, "x", [large]), model.edit(IMAGE, "x", [small]))


@pytest.mark.parametrize("height, width", [(3000, 4000), (1, 5000), (5000, 2), (24, 40), (7, 3)])
def test_reference_size(height, width):
    """At most the area, the same shape, and no side of 0."""
    h, w = reference_size(height, width, 24 * 40)
    if height * width <= 24 * 40:
        assert (h, w) == (height, width)
    else:
        scale = (24 * 40 / (height * width)) ** 0.5
        assert h == max(1, round(height * scale)) and w == max(1, round(width * scale))
    assert h >= 1 and w >= 1


# Loading and saving.


def change_checkpoint(folder, change):
    file = folder / "instructx" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def drop_lora(tensors):
    tensors.pop(next(name for name in tensors if "lora_B" in name))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("connector.mlp.2.bias"), "mlp.2.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra"),
        (lambda tensors: tensors.update({"connector.extra": torch.zeros(1)}), "extra"),
        (
            lambda tensors: tensors.update({"connector.image_queries": torch.zeros(3, 64)}),
            "image_queries: .*3, 64.*4, 64",
        ),
        (drop_lora, "lora_B"),
    ],
)
def test_own_checkpoint_that_does_not_fit(folder, change, message):
    """What strict=False would leave random, or drop in silence."""
    change_checkpoint(folder, change)
    with pytest.raises(ValueError, match=f"instructx/model.safetensors: .*{message}") as raised:
        InstructX.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_own_checkpoint_that_is_damaged(folder):
    """The error must name the file, not the offset of a header."""
    file = folder / "instructx" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="instructx/model.safetensors is damaged"):
        InstructX.from_pretrained(folder)


@pytest.mark.parametrize("whole", [False, True])
def test_saved_and_loaded_edits_the_same(model, folder, whole):
    """Every trained weight must be in the checkpoint, and the alpha of the LoRA in its config."""
    own = folder / "instructx"
    if not whole:
        shutil.copytree(own / "dit", folder / "source_dit")
        shutil.rmtree(folder / "dit")
        (folder / "source_dit").rename(folder / "dit")
    shutil.rmtree(own)
    model.save_pretrained(own, dit=whole)
    names = load_file(own / "model.safetensors").keys()
    assert all(name.startswith(("connector.", "base_model.")) for name in names)
    assert not list(folder.rglob("*partial*"))
    assert locate(folder)["dit"] == (own / "dit" if whole else folder / "dit")
    again = InstructX.from_pretrained(folder)
    assert again.trained and again.config == model.config and not again.training
    assert again.dit.source_embedding is not None
    for frames in (IMAGE, CLIP):
        expected = model.edit(frames, "x", REFERENCES)
        assert np.array_equal(again.edit(frames, "x", REFERENCES), expected)


def test_trained_dit_replaces_the_released_one(folder):
    """From stage 2 on the DiT beside the connector counts, not the one it was started from."""
    trained = InstructX.from_pretrained(folder)
    with torch.no_grad():
        trained.dit.patch_embedding.bias.add_(1)
    trained.save_pretrained(folder / "instructx", dit=True)
    again = InstructX.from_pretrained(folder)
    assert np.array_equal(again.edit(IMAGE, "x"), trained.edit(IMAGE, "x"))


def test_trained_folder_from_elsewhere(folder, tmp_path):
    """Training starts from the folder of the stage before, whose DiT and MLLM come with it."""
    trained = InstructX.from_pretrained(folder)
    for name, layer in lora_layers(trained.mllm):
        trained.mllm.set_submodule(name, layer.merged())
    trained.config.lora_rank = 0
    with torch.no_grad():
        trained.dit.patch_embedding.bias.add_(1)
        trained.mllm.model.norm.weight.mul_(2)
    trained.save_pretrained(tmp_path / "stage2", dit=True, mllm=True)
    again = InstructX.from_pretrained(folder, instructx=tmp_path / "stage2", guidance=3.0)
    assert again.config == replace(trained.config, guidance=3.0)
    expected = trained.edit(CLIP, "x", guidance=2)
    assert np.array_equal(again.edit(CLIP, "x", guidance=2), expected)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        InstructX.from_pretrained(folder, instructx=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="image_queries"):
        InstructX.from_pretrained(folder, image_queries=9)
    shutil.rmtree(folder / "instructx")
    fresh = InstructX.from_pretrained(folder, image_queries=9, lora_rank=1)
    assert fresh.connector.image_queries.shape == (9, 64) and fresh.config.lora_rank == 1


def test_connector_that_writes_the_width_of_the_dit(folder):
    """Without text_embedding the context already has the DiT's width."""
    shutil.rmtree(folder / "instructx")
    model = InstructX.from_pretrained(folder)
    settings = {"text_embedding": False, "context_dim": model.dit.config.dim, "lora_rank": 0}
    mllm = Qwen2_5_VL.from_pretrained(folder / "mllm")  # without the LoRA of the model above
    fresh = InstructX.untrained(mllm, model.processor, model.dit, model.vae, steps=1, **settings)
    assert not any("text_embedding" in name for name in fresh.state_dict())
    for with_dit in (False, True):
        fresh.save_pretrained(folder / "instructx", dit=with_dit)
        again = InstructX.from_pretrained(folder)
        assert same(again.edit(IMAGE, "x"), fresh.edit(IMAGE, "x"))


def test_official_downloads_side_by_side(folder):
    """The folders as they are downloaded: told by their config.json, the VAE by its file's name."""
    shutil.rmtree(folder / "instructx")
    (folder / "mllm").rename(folder / "Qwen2.5-VL-3B-Instruct")
    (folder / "dit").rename(folder / "Wan2.1-T2V-1.3B")
    (folder / "vae").rename(folder / "Wan2.1-VAE")
    assert {name: path.name for name, path in locate(folder).items()} == {
        "mllm": "Qwen2.5-VL-3B-Instruct",
        "dit": "Wan2.1-T2V-1.3B",
        "vae": "Wan2.1-VAE",
    }
    model = InstructX.from_pretrained(folder)
    assert not model.trained and model.edit(IMAGE, "x", steps=1).shape == IMAGE.shape
    shutil.rmtree(folder / "Wan2.1-VAE")
    file = folder / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth"
    torch.save(model.vae.state_dict(), file)
    assert locate(folder)["vae"] == file


def test_folders_that_are_missing_or_doubled(folder, tmp_path):
    """Two DiTs side by side: to take either in silence would be a guess."""
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        locate(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is what training wrote .*--instructx"):
        locate(folder / "instructx")
    (folder / "dit").rename(folder / "one")
    shutil.rmtree(folder / "instructx")
    shutil.copytree(folder / "one", folder / "two")
    with pytest.raises(ValueError, match="holds dit more than once: .*one.*two"):
        locate(folder)
    shutil.rmtree(folder / "one")
    shutil.rmtree(folder / "two")
    with pytest.raises(FileNotFoundError, match="holds no dit/.*README"):
        locate(folder)


def test_untrained_is_the_same_every_time(tmp_path):
    """Fresh queries must not depend on what was drawn before, nor change what is drawn after."""
    folder = make_tiny_weights(tmp_path, trained=False)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = InstructX.from_pretrained(folder)
    assert torch.equal(torch.rand(1), expected)
    second = InstructX.from_pretrained(folder)
    assert not first.trained and first.config.lora_rank == 64
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_precision_of_each_model(tiny_weights):
    """The VAE stays in float32, whatever the rest computes in: its rounding would be seen."""
    half = InstructX.from_pretrained(tiny_weights, dtype=torch.bfloat16)
    for name, p in half.named_parameters():
        exact = name.startswith("vae.")
        exact |= name.startswith("dit.") and bool(FLOAT32.search(name.removeprefix("dit.")))
        assert "lora_" in name or p.dtype == (torch.float32 if exact else torch.bfloat16), name
    full = InstructX.from_pretrained(tiny_weights)
    rounded = half.edit(CLIP, "x", REFERENCES).astype(int)
    exact = full.edit(CLIP, "x", REFERENCES).astype(int)
    other = full.edit(CLIP, "x", REFERENCES, seed=1).astype(int)
    assert 0 < np.abs(rounded - exact).mean() < np.abs(other - exact).mean() / 2


@pytest.mark.parametrize("trained", [False, True])
def test_released_precisions_together(folder, trained):
    """As on the hub the MLLM is bfloat16 and the 1.3B float32: each stays so without a dtype."""
    half = Qwen2_5_VL.from_pretrained(folder / "mllm", dtype=torch.bfloat16)
    half.save_pretrained(folder / "mllm")
    if not trained:
        shutil.rmtree(folder / "instructx")
    mixed = InstructX.from_pretrained(folder)
    assert mixed.mllm.model.norm.weight.dtype == torch.bfloat16
    assert mixed.connector.image_queries.dtype == torch.float32
    full = InstructX.from_pretrained(folder, dtype=torch.float32)
    result, exact = (one.edit(CLIP, "x", REFERENCES) for one in (mixed, full))
    assert np.abs(result.astype(int) - exact).mean() < 3


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("instructx/config.json", {"querys": 3}, "querys.*image_queries"),
        ("instructx/config.json", {"image_queries": "4"}, "image_queries is '4'"),
        ("instructx/config.json", {"steps": 2.5}, "steps is 2.5"),
        ("instructx/config.json", {"guidance": "a"}, "guidance is 'a'"),
        ("instructx/config.json", {"text_embedding": 0}, "text_embedding is 0"),
        ("instructx/config.json", {"lora_rank": -1}, "lora_rank is -1"),
        ("instructx/config.json", {"hidden_dim": 0}, "hidden_dim is 0, below 1"),
        ("instructx/dit/config.json", {"num_layers": 2.0}, "num_layers is 2.0"),
        ("instructx/dit/config.json", {"ffn_dim": "128"}, "ffn_dim is '128'"),
        ("instructx/dit/config.json", {"text_dim": -1}, "text_dim is -1"),
        ("instructx/dit/config.json", {"eps": None}, "eps is None"),
        ("instructx/dit/config.json", {"source_embedding": 1}, "source_embedding is 1"),
        ("vae/config.json", {"base_dim": "8"}, "dim is '8'"),
        ("vae/config.json", {"num_res_blocks": 1.5}, "num_res_blocks is 1.5"),
        ("vae/config.json", {"temperal_downsample": "abc"}, "temporal_downsample is 'abc'"),
        ("mllm/config.json", {"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ("mllm/config.json", {"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
        ("mllm/config.json", {"image_token_id": 5}, "image_token_id is .* and 5 by the model's"),
        ("mllm/preprocessor_config.json", {"patch_size": 4}, "patch_size is 4 .* and 8 by"),
    ],
)
def test_configs_that_make_no_model(folder, file, change, message):
    """One line that names folder and setting, not a trace from inside a layer."""
    raw = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message) as raised:
        InstructX.from_pretrained(folder)
    assert str((folder / file).parent) in str(raised.value) and "\n" not in str(raised.value)


def test_saving_that_is_interrupted(model, tmp_path):
    """The checkpoint before must survive a full disk."""
    resource = pytest.importorskip("resource")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(Exception, match="File too large"):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_run_alone(tiny_weights, tmp_path):
    """`python connector.py FOLDER` is how a reader looks at the models."""
    command = [sys.executable, connector.__file__]
    done = subprocess.run([*command, tiny_weights], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "context (1, 6, " in done.stdout and "velocity" in done.stdout
    done = subprocess.run([*command, tmp_path / "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("connector.py: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("frames", [IMAGE, CLIP], ids=["image", "clip"])
def test_no_tensor_stays_on_the_cpu(folder, monkeypatch, frames):
    """A GPU takes no tensor of the CPU's in its sums. The meta device does not either."""
    monkeypatch.setattr(torch, "autocast", lambda *names, **options: contextlib.nullcontext())
    model = InstructX.from_pretrained(folder).to("meta")
    with pytest.raises(RuntimeError):
        torch.ones(2, device="meta") + torch.ones(2)
    words = ("make it night", "")  # of different lengths, so that one is padded
    prompts = [model.prompt(frames, text, REFERENCES[:1]) for text in words]
    context = model.context(model.processor.collate(prompts), len(frames) > 1)
    source, reference = model.encode(frames), model.encode(REFERENCES[0][None])
    batch = [torch.cat([x, x]) for x in (source, reference)]
    velocity = model.velocity(context, batch[0].shape, source, [reference])
    v = velocity(torch.zeros_like(batch[0]), torch.ones(2, device="meta"))
    pieces = [*model.vae.decode_stream(source)]
    data = batch[0], batch[0], batch[1:], torch.ones(2, device="meta"), torch.ones_like(batch[0])
    flow_loss(model.dit, context, *data, FlowSampler(), change_weight=1.0).sum().backward()
    gradients = [p.grad for p in model.dit.parameters()]
    assert {x.device.type for x in (context, v, *pieces, *gradients)} == {"meta"}


# Machines: offloading.


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "frames, references", [(IMAGE, []), (CLIP, []), (IMAGE, REFERENCES), (CLIP, REFERENCES[:1])]
)
def test_offloaded_is_resident(tmp_path, trained, frames, references):
    """Read block by block, the weights edit alike, byte for byte, and LoRA is not lost."""
    folder = make_tiny_weights(tmp_path, trained=trained)
    half = Qwen2_5_VL.from_pretrained(folder / "mllm", dtype=torch.bfloat16)
    half.save_pretrained(folder / "mllm")  # so that reading it as float32 is a cast
    resident = InstructX.from_pretrained(folder, dtype=torch.float32)
    offloaded = InstructX.from_pretrained(folder, dtype=torch.float32, offload=True)
    expected = resident.edit(frames, "make it night", references)
    for _ in range(2):
        result = offloaded.edit(frames, "make it night", references)
        assert np.array_equal(result, expected)
    for blocks in (offloaded.dit.blocks, offloaded.mllm.model.layers, offloaded.mllm.visual.blocks):
        for name, p in blocks.named_parameters():
            assert p.is_meta == ("lora_" not in name), name
    lora = {name for name, p in offloaded.mllm.named_parameters() if "lora_" in name}
    assert lora and lora == {
        name for name, p in resident.mllm.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_offloaded_dit_reads_every_layout(tmp_path, dtype):
    """One file and shards, each with the dtypes that the whole model would have."""
    dit = randomize(WanDiT(DIT_PRESETS["tiny"]), torch.Generator().manual_seed(0))
    dit.save_pretrained(tmp_path / "one")
    tensors, weight_map = load_file(tmp_path / "one" / "model.safetensors"), {}
    (tmp_path / "shards").mkdir()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "shards")
    for i, file in enumerate(("a.safetensors", "b.safetensors")):  # each block lies in both
        names = list(tensors)[i::2]
        save_file({name: tensors[name] for name in names}, tmp_path / "shards" / file)
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"weight_map": weight_map})
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(index)
    z, t, context = torch.randn(1, 16, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 7, 48)
    for layout in ("one", "shards"):
        path = tmp_path / layout
        resident = WanDiT.from_pretrained(path, dtype=dtype)
        offloaded = WanDiT.from_pretrained(path, dtype=dtype, blocks=False)
        offload_blocks(offloaded.blocks, lambda i, path=path: dit_block(path, dtype, i), "cpu")
        with torch.no_grad():
            assert torch.equal(offloaded(z, t, context), resident(z, t, context))


class ReadError(Exception):
    pass


def hollow_blocks(read, count=5):
    """Linear layers without weights that read theirs while they run."""
    blocks = nn.Sequential(*(nn.Linear(2, 2, bias=False, device="meta") for _ in range(count)))
    offload_blocks(blocks, read, "cpu")
    return blocks


def test_one_block_has_weights_at_a_time():
    """What all blocks keep, memory must hold; a walk must also be possible more than once."""
    blocks = hollow_blocks(lambda i: {"weight": (torch.eye(2) * (i + 1), torch.float32)})
    loaded = []
    for block in blocks:
        block.register_forward_pre_hook(
            lambda *_: loaded.append([not other.weight.is_meta for other in blocks])
        )
    for inference in (True, False, True):
        loaded.clear()
        with torch.inference_mode(inference):
            assert torch.equal(blocks(torch.ones(1, 2)), torch.full((1, 2), 120.0))
        assert loaded == torch.eye(5).bool().tolist()
        assert all(block.weight.is_meta for block in blocks)


def test_offload_says_what_cannot_be_read():
    """An error in the reading thread is the error of the edit, and the next edit is whole again."""
    damaged = {2}

    def read(i):
        if i in damaged:
            raise ReadError(f"block {i} is damaged")
        return {"weight": (torch.eye(2) * (i + 1), torch.float32)}

    blocks = hollow_blocks(read)
    with pytest.raises(ReadError, match="block 2 is damaged"):
        blocks(torch.ones(1, 2))
    damaged.clear()
    assert torch.equal(blocks(torch.ones(1, 2)), torch.full((1, 2), 120.0))


# Machines: int8.


def test_quantized_is_the_model_of_the_rounded_matrices(model, tiny_weights):
    """Every matrix of the blocks within half a step, everything else as it was."""
    rounded = InstructX.from_pretrained(tiny_weights, quantize=True)
    expected = copy.deepcopy(model.dit)
    count = 0
    for name, linear in expected.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith("blocks."):
            stored = rounded.dit.get_submodule(name)
            assert stored.weight.dtype == torch.int8
            dense = stored.weight.double() * stored.scale.double()[:, None]
            step = linear.weight.abs().amax(dim=1, keepdim=True) / 127
            assert ((dense - linear.weight).abs() <= step * 0.5001).all()
            linear.weight.data = dense.float()
            count += 1
    assert count == 10 * len(expected.blocks)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 16, 3, 4, 6, generator=generator)
    t, context = torch.tensor([900.0, 100.0]), torch.randn(2, 7, 48, generator=generator)
    with torch.no_grad():
        result = rounded.dit(z, t, context, z)
        assert error(result, expected(z, t, context, z)) < TOLERANCE
        assert 1e-4 < error(result, model.dit(z, t, context, z)) < 0.02


def test_quantized_edits(model, tiny_weights):
    """int8 must go with an MLLM that is read block by block, and with bfloat16."""
    exact = model.edit(CLIP, "x", REFERENCES).astype(int)
    other = model.edit(CLIP, "x", REFERENCES, seed=1).astype(int)
    results = []
    for options in ({}, {"offload": True}, {"dtype": torch.bfloat16}):
        rounded = InstructX.from_pretrained(tiny_weights, quantize=True, **options)
        results.append(rounded.edit(CLIP, "x", REFERENCES).astype(int))
        difference = np.abs(results[-1] - exact).mean()
        assert 0 < difference < np.abs(other - exact).mean() / 2
    assert np.array_equal(results[0], results[1])


def test_a_row_of_zeros_stays_zeros(folder):
    """A matrix that training has not moved yet has a largest value of 0 to divide by."""
    file = folder / "instructx" / "dit" / "model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.ffn.0.weight"].zero_()
    save_file(tensors, file)
    rounded = InstructX.from_pretrained(folder, quantize=True)
    layer = rounded.dit.blocks[0].ffn[0]
    assert torch.equal(layer(torch.randn(3, 64)), layer.bias.expand(3, -1))


# Machines: recomputing and compiling.


def saved_bytes(run):
    """What `run()` returns, and the bytes that it keeps for its backward pass."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(storages.values())


@pytest.mark.parametrize("name", ["dit", "mllm"])
def test_recomputing_changes_memory_only(tiny_weights, name):
    """Gradients must be those without it, for every parameter, and the memory must be less."""
    losses, memory, gradients = [], [], []
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 16, 3, 4, 6, generator=generator)
    t, context = torch.tensor([900.0, 100.0]), torch.randn(2, 7, 48, generator=generator)
    for recompute in (False, True):
        model = InstructX.from_pretrained(tiny_weights)
        prompt = model.prompt(CLIP, "make it night", REFERENCES)
        trained = getattr(model, name)
        if name == "dit":
            trained.requires_grad_(True)
        if recompute and name == "dit":
            recompute_blocks(model.dit.blocks)
        elif recompute:
            recompute_blocks(model.mllm.model.layers)
            recompute_blocks(model.mllm.visual.blocks)

        def run(model=model, prompt=prompt):
            if name == "dit":
                return model.dit(z, t, context, z, [z[:1, :, :1]]).square().mean()
            return model.context(prompt, True).square().mean()

        loss, kept = saved_bytes(run)
        loss.backward()
        losses.append(loss.item())
        memory.append(kept)
        gradients.append({n: p.grad for n, p in trained.named_parameters() if p.requires_grad})
        with torch.no_grad():
            assert run().item() == pytest.approx(losses[0])
    assert losses[0] == pytest.approx(losses[1]) and memory[1] < 0.8 * memory[0]
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for parameter, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, parameter
        assert error(gradients[1][parameter], gradient) < TOLERANCE, parameter


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize(
    "options",
    [{}, {"offload": True}, {"quantize": True}, {"offload": True, "quantize": True}],
    ids=["resident", "offload", "int8", "offload and int8"],
)
def test_compiled_equals_eager(tiny_weights, options):
    """One compilation for all blocks and steps, one more for all other sizes, under old names."""
    from torch._dynamo.utils import counters

    eager = InstructX.from_pretrained(tiny_weights, **options)
    compiled = InstructX.from_pretrained(tiny_weights, **options)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(compiled.dit.blocks)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    generator, graphs = torch.Generator().manual_seed(0), []
    for grid in ((3, 4, 6), (1, 6, 4), (2, 8, 6), (5, 2, 2)):
        z = torch.randn(2, 16, *grid, generator=generator)
        context = torch.randn(2, 7, 48, generator=generator)
        with torch.inference_mode():
            condition = eager.dit.condition(context, z.shape, z, [z[:1, :, :1]])
            for t in (torch.tensor([900.0, 100.0]), torch.tensor([450.0, 50.0])):
                expected = eager.dit.denoise(z, t, condition)
                assert error(compiled.dit.denoise(z, t, condition), expected) < 1e-5
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2]
    assert same(compiled.edit(IMAGE, "x"), eager.edit(IMAGE, "x"))


# Machines: tiles.


def halve(x):
    return F.avg_pool3d(x, (1, 2, 2))


def double(x):
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)


@pytest.mark.parametrize("H, W, side", [(16, 16, 16), (20, 36, 16), (8, 40, 24), (68, 24, 20)])
def test_tiles_join_without_a_seam(H, W, side):
    """Of what looks no further than a pixel, tiles are the whole: none is left out or shifted."""
    x, sizes = torch.rand(2, 3, 2, H, W), []

    def watched(part):
        sizes.append(max(part.shape[-2:]))
        return halve(part)

    assert error(in_tiles(watched, x, side, 2, 1 / 2), halve(x)) < 1e-6
    assert error(in_tiles(double, x, side, 1, 2), double(x)) < 1e-6
    assert max(sizes) <= side and (len(sizes) > 1) == (max(H, W) > side)


def test_neighbouring_tiles_fade_into_each_other():
    """Tiles that disagree must not leave an edge: each step across the overlap is a small one."""
    values = iter((0.0, 1.0))
    x = torch.zeros(1, 1, 1, 16, 28)
    row = in_tiles(lambda part: torch.full_like(part, next(values)), x, 16, 1, 1)[0, 0, 0, 0]
    steps = row.diff()
    assert row[0] == 0 and row[-1] == 1 and (steps >= 0).all() and steps.max() < 0.3
    assert (row[:12] == 0).all() and (row[16:] == 1).all()


def test_tiles_of_a_vae():
    """One tile is the whole; several are near it, on a VAE that was trained."""
    whole = WanVAE.from_pretrained(SHAPES / "vae")
    pixels = np.array(Image.open(SHAPES / "example.png").convert("RGB"))
    video = to_video(np.tile(pixels, (2, 3, 1))[None], like=whole.conv1.weight)  # 128 x 192
    z = whole.encode(video)
    for side, least, most in ((192, -1, 1e-6), (96, 1e-4, 0.1)):
        tiled = WanVAE.from_pretrained(SHAPES / "vae")
        tile(tiled, side)
        assert least < error(tiled.encode(video), z) < most
        assert least < error(tiled.decode(z), whole.decode(z)) < most
    clip = tiled.decode(z.expand(1, 16, 3, -1, -1))
    assert clip.shape == (1, 3, 1 + 2 * whole.temporal_stride, 128, 192)


def test_tiled_edits(model, tiny_weights):
    """An edit goes through the tiles, for an image, a clip and references of other sizes."""
    tiled = InstructX.from_pretrained(tiny_weights)
    tile(tiled.vae, 32)
    small, large = picture(1, 24, 30), picture(5, 72, 40)
    assert np.array_equal(tiled.edit(small, "x"), model.edit(small, "x"))
    result = tiled.edit(large, "x", REFERENCES)
    assert result.shape == large.shape
    assert not np.array_equal(result, model.edit(large, "x", REFERENCES))
