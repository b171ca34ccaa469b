"""train.py on tiny random weights, from outside: metrics, files, exit codes and what is exported.

A name says what holds, a docstring what would go wrong otherwise.
"""

import fcntl
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file
from safetensors.torch import save as to_bytes

import train
from connector import InstructX, fit_reference
from dit import WanDiT, WanDiTConfig
from edit import read_frames, write_clip
from sampler import FlowSampler

FRESH = (
    "--config image_queries=4 video_queries=6 mllm_frames=3 lora_rank=2 lora_alpha=4 "
    "steps=2 guidance=2"
).split()
COMMON = (
    "--device cpu --lr 1e-2 --image-batch 4 --video-batch 2 --micro-batch 2 --warmup 2 --seed 3"
).split()
MIXED = ("--video-share", 0.5)


def draw(path, frames, rng, size=(16, 16)):
    """Random pixels: an image, or with `frames` a clip as a folder. Returns its name."""

    def save(file):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(file)

    if not frames:
        save(path.with_suffix(".png"))
        return path.with_suffix(".png").name
    path.mkdir()
    for i in range(frames):
        save(path / f"{i}.png")
    return path.name


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_data(folder, images=6, clips=3, references=2, seed=0):
    """A data file of small pairs; the first few images have a reference. Returns it."""
    rng, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images + clips):
        frames = 5 if i >= images else 0
        source, target = draw(folder / f"{i}s", frames, rng), draw(folder / f"{i}t", frames, rng)
        row = {"source": source, "target": target, "instruction": f"edit {i} " * (i + 1)}
        if i < references:
            row["references"] = [draw(folder / f"{i}r", 0, rng, (20, 24))]
        rows.append(row)
    return write_rows(folder / "data.jsonl", rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def base(tiny_weights, tmp_path_factory):
    """The released models alone, as training finds them."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("mllm", "dit", "vae"):
        (folder / name).symlink_to(tiny_weights / name)
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def arguments(base, data, out):
    """A command line for a stage; further arguments take precedence."""

    def make(stage, *more, out=out):
        line = ["--stage", stage, "--data", data, "--weights", base, "--out", out]
        return [*map(str, line), *COMMON, *FRESH, *map(str, more)]

    return make


@pytest.fixture
def settings(arguments):
    """What train.py makes of a command line."""

    def make(stage, *more):
        args = train.settings(arguments(stage, *more))
        train.complete(args)
        args.out.mkdir(exist_ok=True)
        return args

    return make


@pytest.fixture
def loader(settings):
    """A Loader of the one process of a run."""

    def make(stage, *more):
        args = settings(stage, *more)
        model = train.build_model(args)
        pairs = train.Pairs(args, args.data, model.multiple(), model.vae.temporal_stride)
        return train.Loader(args, model, pairs)

    return make


def metrics(out):
    """metrics.jsonl without what a clock or the machine says."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "waited", "memory")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def steps(out):
    return [row for row in metrics(out) if "loss" in row]


def checkpoint(out, step):
    tensors = {}
    for file in (out / "checkpoints" / f"step-{step:07d}").glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def result(out):
    files = sorted((out / "instructx").rglob("*.safetensors"))
    return {
        f"{file.parent.name} {name}": t for file in files for name, t in load_file(file).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, tolerance=2e-5):
    return float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm())


def spy(found, change=None):
    """A `build` for train.main that puts the model and its first weights into `found`."""

    def build(args):
        model = train.build_model(args)
        found["model"] = model
        found["before"] = {name: value.clone() for name, value in model.state_dict().items()}
        if change:
            model.dit.forward = change(model.dit.forward)
        return model

    return build


# What trains, on what, by which formula.


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_trains_and_what_is_frozen(arguments, stage):
    """A frozen tower that drifts, or a part that no optimizer knows, spoils a run unseen."""
    found = {}
    assert train.main(arguments(stage, *MIXED, "--steps", 4), spy(found)) == 0
    before, after = found["before"], found["model"].state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("connector.", "lora_") if stage == 1 else ("connector.", "lora_", "dit.")
    expected = {name for name in before if any(part in name for part in parts)}
    if stage == 1:
        expected.remove("connector.video_queries")  # images alone
    assert moved == expected, moved ^ expected
    assert ("dit.source_embedding.weight" in moved) == (stage > 1)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_dit_sees_source_and_references_from_stage_2_on(arguments, stage):
    """The paper brings source latents in with stage 2; forgetting them there would still train."""
    seen = set()

    def watch(forward):
        def watched(z, t, context, source, references):
            seen.add((z.shape[2], source is not None, len(references)))
            return forward(z, t, context, source=source, references=references)

        return watched

    assert train.main(arguments(stage, *MIXED, "--steps", 4), spy({}, watch)) == 0
    assert seen == ({(1, False, 0)} if stage == 1 else {(1, True, 0), (1, True, 1), (2, True, 0)})


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_loss_and_gradient_are_the_formula(weight):
    """x_σ, the direction of the velocity, t = 1000σ, the mean: a wrong sign trains to noise."""
    random = torch.Generator().manual_seed(0)
    z, source, noise = torch.randn(3, 2, 16, 2, 4, 6, generator=random, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    a, b = torch.tensor([0.7, -0.3], dtype=torch.float64, requires_grad=True)

    def dit(x, t, context, source, references):
        return a * x + b * source * t.view(-1, 1, 1, 1, 1) / 1000 + context.mean()

    context = torch.full((2, 1, 1), 0.1, dtype=torch.float64)
    loss = train.flow_loss(dit, context, z, source, [], sigma, noise, FlowSampler(), weight)
    gradient = torch.autograd.grad(loss.sum(), (a, b))
    x, s, e = z.numpy(), source.numpy(), noise.numpy()
    for i, level in enumerate(sigma.tolist()):
        mixed = (1 - level) * x[i] + level * e[i]
        residual = 0.7 * mixed - 0.3 * s[i] * level + 0.1 - (e[i] - x[i])
        change = ((x[i] - s[i]) ** 2).mean(axis=0)
        share = 1 + weight * change / change.max()
        share = np.broadcast_to(share / share.mean(), residual.shape)
        assert math.isclose(loss[i].item(), (share * residual**2).mean(), rel_tol=1e-12)
        terms = zip(gradient, (mixed, s[i] * level))
        gradient = [g - 2 * (share * residual * term).mean() for g, term in terms]
    assert all(abs(g.item()) < 1e-12 for g in gradient)


def test_a_run_is_a_plain_loop(arguments, loader, tmp_path):
    """Micro-batches, padded prompts, cached latents, clipping, decay, warm-up: none may differ.

    The plain loop takes one sample at a time, adds their mean up, and writes AdamW out.
    """
    more = "--video-share 0 --drop 0.3 --steps 4 --warmup 3 --lr 1e-3".split()
    assert train.main(arguments(2, *more, "--cache", tmp_path / "cache")) == 0
    plain = loader(2, *more)
    model = plain.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {}
    for step, row in enumerate(steps(tmp_path / "out")):
        losses = []
        for sample in [sample for samples in plain.step(step)[1] for sample in samples]:
            random = torch.Generator().manual_seed(sample.seed)
            level = torch.randn(1, generator=random).sigmoid()
            level = 3 * level / (1 + 2 * level)
            pictures = sample.target, sample.source, *sample.references
            videos = [
                torch.tensor(picture.frames).permute(3, 0, 1, 2)[None] for picture in pictures
            ]
            x, source, *references = [model.vae.encode(video / 127.5 - 1) for video in videos]
            noise = torch.randn(x.shape[1:], generator=random)[None]
            context = model.context(sample.inputs, False)
            noisy = (1 - level) * x + level * noise
            velocity = model.dit(noisy, 1000 * level, context, source, references)
            losses.append((velocity - (noise - x)).square().mean())
        loss = torch.stack(losses).mean()
        model.zero_grad()
        loss.backward()
        assert len(losses) == 4 and math.isclose(row["loss"], loss.item(), rel_tol=3e-5)
        gradients = {name: p.grad.double() for name, p in trained.items() if p.grad is not None}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert math.isclose(row["gradient"], norm, rel_tol=1e-4) and norm > 1
        rate = 1e-3 * min(1, (step + 1) / 3)
        assert math.isclose(row["lr"], rate)
        for name, g in gradients.items():
            first, second, count = moments.get(name, (0, 0, 0))
            first, count = 0.9 * first + 0.1 * g / norm, count + 1
            second = 0.95 * second + 0.05 * (g / norm) ** 2
            moments[name] = first, second, count
            p = trained[name].data
            if p.ndim > 1 and "queries" not in name and "modulation" not in name:
                p *= 1 - rate * 0.01
            scale = (second / (1 - 0.95**count)).sqrt() + 1e-8
            p -= rate * first / (1 - 0.9**count) / scale
    state = checkpoint(tmp_path / "out", 4)
    for name, p in trained.items():
        assert close(state[name], p.detach(), 1e-4), name


def test_muon_trains_the_matrices_of_the_blocks(arguments, base, out):
    """Its step has a spectral norm of about 1 however small the gradient; AdamW moves all else."""
    found = {}
    line = arguments(2, "--video-share", 0, "--muon-lr", 0.1, "--lr", 1e-3, "--steps", 1)
    assert train.main(line, spy(found)) == 0
    state = checkpoint(out, 1)
    by_muon = {name.split(" ")[1] for name in state if name.startswith("momentum_buffer ")}
    for name, before in found["before"].items():
        if name in by_muon:
            assert name.startswith("dit.blocks.") and before.ndim == 2
            step = (before * (1 - 0.05 * 0.01) - state[name]) / 0.05
            step /= max(1, before.shape[0] / before.shape[1]) ** 0.5
            assert 0.6 < torch.linalg.matrix_norm(step, 2) < 1.3, name
        elif name in state:
            assert (before - state[name]).abs().max() < 0.002  # by the rate of the others
            assert not (name.startswith("dit.blocks.") and before.ndim == 2)
    assert len(by_muon) == 2 * 10


def test_learning_rates(settings):
    """The paper's is constant; the other two must end at 0, not before and not below."""
    args = settings(1, "--steps", 100, "--warmup", 10)
    rates = {}
    for args.schedule in ("constant", "linear", "cosine"):
        rates[args.schedule] = [train.learning_rate(step, args, 2) for step in range(100)]
        assert np.allclose(rates[args.schedule][:10], np.arange(1, 11) * 0.2)
    assert set(rates["constant"][10:]) == {2}
    assert np.allclose(rates["linear"][10:], 2 * (1 - np.arange(1, 91) / 90))
    assert np.allclose(rates["cosine"][10:], 1 + np.cos(np.pi * np.arange(1, 91) / 90))


def test_gradient_checkpointing_changes_no_bit(arguments, tmp_path):
    """Recomputed layers must see what they saw: references, and the mask of padded prompts."""
    for name, more in (("plain", []), ("again", ["--gradient-checkpointing"])):
        line = arguments(2, *MIXED, "--steps", 4, *more, out=tmp_path / name)
        assert train.main(line) == 0
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "again")


def test_precision(arguments, tmp_path):
    """bfloat16 holds three digits: a step of 1e-5 vanishes in it, so what trains stays float32."""
    found, losses = {}, []
    for precision in ("float32", "bfloat16"):
        line = arguments(2, "--video-share", 0, "--steps", 3, "--precision", precision)
        line[line.index("--out") + 1] = str(tmp_path / precision)
        assert train.main(line, spy(found)) == 0
        losses.append([row["loss"] for row in steps(tmp_path / precision)])
    assert losses[0] != losses[1] and np.allclose(*losses, rtol=0.03)
    assert {t.dtype for t in checkpoint(tmp_path / "bfloat16", 3).values()} == {torch.float32}
    frozen = {n: p.dtype for n, p in found["model"].named_parameters() if not p.requires_grad}
    assert {kind for name, kind in frozen.items() if name.startswith("mllm.")} == {torch.bfloat16}
    assert {kind for name, kind in frozen.items() if name.startswith("vae.")} == {torch.float32}


def test_low_rank_matrices_in_the_dit(arguments, base, out):
    """14B on one GPU. Nothing of the DiT may move; the result is the plain DiT with LoRA merged."""
    found = {}
    assert train.main(arguments(2, *MIXED, "--dit-lora", 2, "--steps", 3), spy(found)) == 0
    trained = {name for name in checkpoint(out, 3) if name.startswith("dit.")}
    assert all("lora_" in name or name == "dit.source_embedding.weight" for name in trained)
    assert len(trained) == 1 + 2 * 2 * 10  # A and B of 8 projections and 2 FFN matrices, 2 blocks
    frames = np.random.default_rng(0).integers(0, 256, (5, 24, 40, 3), np.uint8)
    again = InstructX.from_pretrained(base, instructx=out / "instructx")
    expected = found["model"].edit(frames, "x").astype(int)
    assert np.abs(again.edit(frames, "x") - expected).max() <= 1
    plain = {name.removeprefix("dit.") for name in found["before"] if name.startswith("dit.")}
    assert again.dit.state_dict().keys() == {name for name in plain if "lora_" not in name}


# Data.


def order(pairs, first, last):
    """[(is_video, [pair numbers])] of some steps."""
    plans = [pairs.plan(step) for step in range(first, last)]
    return [(video, [number for chunk in chunks for number in chunk]) for video, chunks in plans]


def test_share_of_clips_is_exact(settings):
    """0.6 of the steps, also over any short stretch; all or none where one kind is missing."""
    args = settings(2, "--video-share", 0.6)
    pairs = train.Pairs(args, args.data, 16, 4)
    media = [pairs.is_video(step) for step in range(1000)]
    assert sum(video for video, _ in media) == 600
    for i in range(950):
        assert sum(video for video, _ in media[i : i + 50]) in (29, 30, 31)
    seen = {False: 0, True: 0}
    for video, before in media:
        assert before == seen[video]
        seen[video] += 1
    args = settings(1)
    assert not any(video for video, _ in order(train.Pairs(args, args.data, 16, 4), 0, 50))
    pairs.buckets[False] = {}
    assert [pairs.is_video(step) for step in range(3)] == [(True, 0), (True, 1), (True, 2)]


def test_an_epoch_visits_every_pair(settings, tmp_path):
    """Drawing with replacement leaves a third of a small set unseen. Seed and step decide alone."""
    file = write_data(tmp_path / "data", images=16, clips=6, references=4)

    def pairs(seed):
        args = settings(2, "--data", file, "--seed", seed, *MIXED)
        return train.Pairs(args, args.data, 16, 4)

    plans = order(pairs(1), 0, 24)  # 12 steps of 4 images, 12 of 2 clips
    for is_video, size, first, epoch in ((False, 4, 0, 4), (True, 2, 16, 3)):
        visits = [numbers for video, numbers in plans if video == is_video]
        assert len(visits) == 12 and all(len(numbers) == size for numbers in visits)
        epochs = [sum(visits[start : start + epoch], []) for start in range(0, 12, epoch)]
        assert all(
            sorted(numbers) == list(range(first, first + epoch * size)) for numbers in epochs
        )
        assert len({tuple(numbers) for numbers in epochs}) == len(epochs)
    assert order(pairs(1), 7, 19) == plans[7:19] != order(pairs(2), 7, 19)


def test_a_chunk_is_of_one_shape(settings, tmp_path):
    """Else nothing could be stacked; and buckets for each odd size would allow no batch at all."""
    rng, rows = np.random.default_rng(0), []
    sizes = [(int(h), int(w)) for h, w in rng.integers(200, 900, (200, 2))]
    for i, size in enumerate(sizes):
        Image.new("1", size[::-1]).save(tmp_path / f"{i}.png")
        rows.append({"source": f"{i}.png", "target": f"{i}.png", "instruction": "x"})
    args = settings(1, "--data", write_rows(tmp_path / "d.jsonl", rows), "--area", 256 * 256)
    pairs = train.Pairs(args, args.data, 16, 4)
    assert not pairs.broken and len(pairs.buckets[False]) < 40
    for (height, width), ((length, h, w),) in zip(sizes, pairs.shapes):
        assert length == 1 and h % 16 == w % 16 == 0
        assert 0.85 < h * w / min(256**2, height * width) < 1.15
        assert abs(math.log(h / w * width / height)) < 0.13  # stretched by an eighth at the most
    for chunk in pairs.order(False, 0):
        assert len({pairs.shapes[number] for number in chunk}) == 1


@pytest.mark.parametrize("batch, limit, size", [(4, 3, 2), (128, 8, 8), (6, 8, 6), (7, 4, 1)])
def test_a_batch_is_cut_evenly(settings, batch, limit, size):
    """Chunks of unequal size would weigh samples unequally, or leave some out."""
    args = settings(1, "--image-batch", batch, "--micro-batch", limit)
    assert train.Pairs(args, args.data, 16, 4).batch_sizes(False) == (batch, size)


def test_clips_are_cut_to_what_the_vae_takes(settings, tmp_path):
    """4n + 1 frames, of the shorter of the two, at most --frames."""
    rng, rows = np.random.default_rng(0), []
    for i, (source, target) in enumerate([(9, 9), (12, 9), (9, 6), (30, 30)]):
        source, target = (
            draw(tmp_path / f"{i}s", source, rng),
            draw(tmp_path / f"{i}t", target, rng),
        )
        rows.append({"source": source, "target": target, "instruction": "x"})
    args = settings(2, "--data", write_rows(tmp_path / "d.jsonl", rows), "--frames", 20)
    assert [shape[0][0] for shape in train.Pairs(args, args.data, 16, 4).shapes] == [9, 9, 5, 17]


@pytest.mark.parametrize("size", [(8, 10), (16, 16), (20, 24), (301, 97), (17, 700)])
def test_references_are_those_that_an_edit_sees(loader, tmp_path, size):
    """Another size or padding in training than in editing: a reference would be a stranger."""
    rng = np.random.default_rng(0)
    names = (
        draw(tmp_path / "s", 0, rng),
        draw(tmp_path / "t", 0, rng),
        draw(tmp_path / "r", 0, rng, size),
    )
    row = {"source": names[0], "target": names[1], "instruction": "x", "references": names[2:]}
    made = loader(2, "--data", write_rows(tmp_path / "d.jsonl", [row]))
    image = fit_reference(read_frames(tmp_path / "r.png").frames[0], 16 * 16)
    shape = made.pairs.shapes[0]
    assert shape == ((1, 16, 16), (1, *image.shape[:2]))
    sample = made.sample(made.pairs.pairs[0], shape, "x")
    with torch.no_grad():
        assert torch.equal(made.latents(sample.references), made.model.encode(image[None]))
    frames = read_frames(tmp_path / "s.png").frames
    seen = made.model.prompt(frames, "x", [image])
    assert torch.equal(sample.inputs["pixel_values"], seen["pixel_values"])


def test_readers_compute_on_one_core_each():
    """A team of threads for each reader made every step on two cores half as long again."""
    threads = torch.get_num_threads()
    seen = [count for _, count in train.read_ahead(lambda step: torch.get_num_threads(), 0, 4)]
    assert seen == [1] * 4
    assert torch.get_num_threads() == threads


def test_instructions_are_dropped(loader):
    """Guidance needs the empty instruction: words are dropped, never pictures, by the seed."""
    made = loader(1, "--drop", 0.3)

    def text(seed):
        ids = made.try_sample(4, seed).inputs["input_ids"]
        return made.model.processor.tokenizer.decode(ids[0].tolist())

    texts = {seed: text(seed) for seed in range(200)}
    dropped = {seed for seed, words in texts.items() if "edit 4" not in words}
    assert 35 < len(dropped) < 85  # 60 expected, with a deviation of 6.5
    assert len({texts[seed] for seed in dropped}) == 1
    assert all(texts[seed] == text(seed) for seed in range(20))
    kept = min(set(texts) - dropped)
    a, b = (made.try_sample(0, seed).inputs for seed in (min(dropped), kept))
    assert torch.equal(a["pixel_values"], b["pixel_values"])


def test_latents_are_kept_by_content(loader, tmp_path):
    """Latents of a file that was replaced, or of another VAE, would teach the wrong picture."""
    cache = tmp_path / "cache"
    made, rng = loader(2, "--cache", cache), np.random.default_rng(0)
    draw(tmp_path / "a", 0, rng), draw(tmp_path / "clip", 5, rng)
    (tmp_path / "clip" / ".ipynb_checkpoints").mkdir()
    image, clip = tmp_path / "a.png", tmp_path / "clip"

    def get(path, shape, latents=made.latents):
        return latents([latents.look_up(path, shape)])

    def count():
        return len(list(cache.glob("*/*.safetensors")))

    first, moving = get(image, (1, 16, 16)), get(clip, (5, 16, 16))
    assert first.shape == (1, 16, 1, 2, 2) and moving.shape == (1, 16, 2, 2, 2) and count() == 2
    assert torch.equal(first, get(image, (1, 16, 16))) and torch.equal(
        moving, get(clip, (5, 16, 16))
    )
    (tmp_path / "copy.png").write_bytes(image.read_bytes())
    assert torch.equal(first, get(tmp_path / "copy.png", (1, 16, 16))) and count() == 2
    draw(clip / "0", 0, rng), draw(image.with_suffix(""), 0, rng)  # other pictures, same names
    assert not torch.equal(first, get(image, (1, 16, 16)))
    assert not torch.equal(moving, get(clip, (5, 16, 16))) and count() == 4
    get(clip, (1, 32, 32))
    assert count() == 5
    made.model.vae.encoder.conv1.weight.data.mul_(1.01)
    get(clip, (1, 32, 32), train.Latents(made.model.vae, cache))
    assert count() == 6


def test_damaged_and_left_over_latents(loader, tmp_path):
    """An empty file of the cache would leave its pair out of every step, for good."""
    cache = tmp_path / "cache"
    made = loader(2, "--cache", cache)
    draw(tmp_path / "a", 0, np.random.default_rng(0))
    picture = made.latents.look_up(tmp_path / "a.png", (1, 16, 16))
    z = made.latents([picture])
    for content in (b"", b"x" * 100, picture.file.read_bytes()[:-10]):
        picture.file.write_bytes(content)
        again = made.latents.look_up(tmp_path / "a.png", (1, 16, 16))
        assert again.z is None and torch.equal(made.latents([again]), z)
    tensors = load(picture.file.read_bytes())
    for other in (z + 1, z.half(), torch.cat([z, z]), torch.zeros(()), z * math.nan):
        picture.file.write_bytes(to_bytes({**tensors, "z": other}))
        assert made.latents.look_up(tmp_path / "a.png", (1, 16, 16)).z is None
    picture.file.write_bytes(to_bytes(tensors))
    assert torch.equal(made.latents.look_up(tmp_path / "a.png", (1, 16, 16)).z, z)
    left = picture.file.with_name(".killed.1234.safetensors")
    left.touch()
    train.Latents(made.model.vae, cache)
    assert left.exists()  # another run may be writing it
    os.utime(left, (1, 1))
    train.Latents(made.model.vae, cache)
    assert not left.exists() and picture.file.exists()


def test_damaged_sizes_are_looked_up_again(settings, data, tmp_path):
    """A wrong size would squeeze its picture, or leave it out, in every run with this cache."""
    args, cache = settings(2, "--cache", tmp_path), tmp_path / "sizes.json"
    shapes = train.Pairs(args, [data], 16, 4).shapes
    text = cache.read_text()
    others = text.replace("16, 16", "16, 64"), text.replace("[1,", "[null,")
    for damaged in ("", "[]", "[" * 10**5, *others):
        cache.write_text(damaged)
        assert train.Pairs(args, [data], 16, 4).shapes == shapes
        assert cache.read_text() != damaged


def test_files_have_the_mode_that_the_umask_says(arguments, out, tmp_path):
    """With 0600 nobody else could read a shared cache, or go on from a checkpoint."""
    old = os.umask(0o022)
    try:
        assert train.main(arguments(1, "--steps", 1, "--cache", tmp_path / "cache")) == 0
    finally:
        os.umask(old)
    files = [*(tmp_path / "cache").rglob("*"), *(out / "checkpoints").rglob("*"), *out.glob("*")]
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in files if file.is_file()}
    assert set(modes.values()) == {"0o644"}, modes


@pytest.mark.parametrize("before, between", [("\ufeff", "\n"), ("", "\r\n"), ("\n", "\n \n\n")])
def test_json_lines_as_others_write_them(settings, data, tmp_path, before, between):
    """Windows writes a byte order mark and CRLF; JSON may hold U+2028, where splitlines() cuts."""
    rows = [json.loads(line) for line in data.read_text().splitlines()][:3]
    for row, separator in zip(rows, "\u2028\u2029\x85"):
        row["instruction"] = f"one{separator}two"
        row["source"], row["target"] = (str(data.parent / row[key]) for key in ("source", "target"))
        row["references"] = None
    text = before + between.join(json.dumps(row, ensure_ascii=False) for row in rows) + between
    (tmp_path / "d.jsonl").write_bytes(text.encode())
    args = settings(2, "--data", tmp_path / "d.jsonl")
    pairs = train.Pairs(args, args.data, 16, 4)
    assert not pairs.broken
    assert [p.instruction for p in pairs.pairs] == [row["instruction"] for row in rows]


@pytest.mark.parametrize(
    "rates, whole", [((30, 15), False), ((24, 25), False), ((30, 29.97), True)]
)
def test_clips_of_different_rates(settings, tmp_path, rates, whole):
    """Frame 30 of the one would be a second away from frame 30 of the other."""
    for name, rate in zip(("s.mp4", "t.mp4"), rates):
        frames = np.random.default_rng(0).integers(0, 256, (33, 16, 16, 3), np.uint8)
        write_clip(tmp_path / name, frames, rate)
    row = {"source": "s.mp4", "target": "t.mp4", "instruction": "x"}
    args = settings(2, "--data", write_rows(tmp_path / "d.jsonl", [row]))
    pairs = train.Pairs(args, args.data, 16, 4)
    assert (not pairs.broken) == whole
    assert whole or "frames per second" in str(pairs.broken) and "t.mp4" in str(pairs.broken)


def break_everything(folder):
    """A data file of whole pairs and every kind of broken one -> it, {where: what must be said}."""
    file = write_data(folder, images=3, clips=1, references=1)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rng = np.random.default_rng(1)
    good, clip = rows[1], rows[3]
    picture = (folder / "0s.png").read_bytes()
    (folder / "cut.png").write_bytes(picture[: len(picture) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe.png")
    draw(folder / "wide", 0, rng, (16, 32)), draw(folder / "short", 3, rng)
    draw(folder / "damaged", 5, rng)
    (folder / "damaged" / "3.png").write_bytes(picture[: len(picture) // 2])
    write_clip(folder / "a.mp4", rng.integers(0, 256, (9, 16, 16, 3), np.uint8), 8)
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:2000])
    broken = [
        (good | {"source": "nowhere.png"}, "does not exist"),
        (good | {"source": "pipe.png"}, "pipe.png"),
        (good | {"target": "cut.png"}, "cut.png"),
        (good | {"source": "text.png"}, "text.png"),
        (good | {"source": "empty"}, "empty"),
        (good | {"target": "wide.png"}, "another aspect"),
        (good | {"target": clip["target"]}, "an image, one a clip"),
        (clip | {"source": "short", "target": "short"}, "5 or more"),
        (clip | {"target": "damaged"}, "3.png"),
        (clip | {"source": "cut.mp4"}, "cut.mp4"),
        (good | {"references": ["nowhere.png"]}, "does not exist"),
        (good | {"references": ["a.mp4"]}, "a reference is an image"),
        (good | {"instruction": "<|image_pad|>"}, "special token"),
        (good | {"instruction": 3}, "instruction"),
        ({"source": "0s.png", "instruction": "x"}, "target"),
        ([], "not an edit"),
        ({**good, "references": 5}, "not an edit"),
    ]
    text = file.read_text() + "".join(json.dumps(row) + "\n" for row, _ in broken)
    file.write_bytes(text.encode() + b"{\n" + b'{"source": "\xff"}\n')
    reasons = [*(reason for _, reason in broken), "not an edit", "not an edit"]
    return file, {f"{file}:{i}": reason for i, reason in enumerate(reasons, len(rows) + 1)}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_data_of_other_encodings(settings, data, tmp_path, encoding):
    """PowerShell writes UTF-16: a line cut at the byte of a line end would lose edits."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["source"], row["target"] = (str(data.parent / row[key]) for key in ("source", "target"))
        row |= {"instruction": f"\u010a{row['instruction']}", "references": []}
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "d.jsonl").write_bytes(text.encode(encoding))
    args = settings(2, "--data", tmp_path / "d.jsonl")
    pairs = train.Pairs(args, args.data, 16, 4)
    assert not pairs.broken
    assert [pair.instruction for pair in pairs.pairs] == [row["instruction"] for row in rows]


def test_odd_fields_break_their_line_alone(settings, data, tmp_path):
    """An empty path is the data folder, a string a list of letters: both could be read as media."""
    row = json.loads(data.read_text().splitlines()[-1])
    row = {
        **row,
        "source": str(data.parent / row["source"]),
        "target": str(data.parent / row["target"]),
    }
    changes = [{"source": ""}, {"target": None}, {"references": "a.png"}, {"references": [""]}]
    lines = [json.dumps({**row, **change}).encode() for change in [*changes, {"references": [[]]}]]
    lines += [json.dumps(row).replace("edit", "\xe9dit").encode("latin-1"), b"[" * 10**5, b"\0"]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([*lines, json.dumps(row).encode()]))
    args = settings(2, "--data", tmp_path / "d.jsonl")
    pairs = train.Pairs(args, args.data, 16, 4)
    assert len(pairs.broken) == len(lines) and len(pairs.pairs) == 1


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("d.jsonl", "", "there is none"),
        ("d.csv", "", "no column prompt, src_video, tgt_video"),
        ("d.csv", "src_video,tgt_video\na,b\n", "no column prompt"),
        ("d.csv", 'src_video,tgt_video,prompt\na,b,"c\nd,e,f\n', "unexpected end of data"),
        ("d.csv", "src_video,tgt_video,prompt\n" + "a" * 200000, "field larger than"),
    ],
)
def test_data_files_that_are_none(arguments, tmp_path, capsys, name, text, reason):
    """What is wrong with the whole file ends the run in one line that names it."""
    (tmp_path / name).write_text(text)
    assert train.main(arguments(2, "--data", tmp_path / name)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ") and name in line and reason in line


def test_broken_pairs_are_named_and_skipped(arguments, out, tmp_path, capsys):
    """One bad file of a million must not end a run, nor go unnoticed; each is said in one line."""
    file, reasons = break_everything(tmp_path / "data")
    assert train.main(arguments(2, "--data", file, *MIXED, "--steps", 16)) == 0
    prefix, found = "train.py: left out: ", {}
    for line in capsys.readouterr().err.splitlines():
        if line.startswith(prefix):
            where, _, reason = line.removeprefix(prefix).partition(": ")
            assert where not in found
            found[where] = reason
    assert found.keys() == reasons.keys()
    assert not [where for where in reasons if reasons[where] not in found[where]], found
    rows = steps(out)
    assert rows[-1]["broken"] == len(reasons) and len({row["samples"] for row in rows}) > 1
    assert all(row["used"] == (row["samples"] > 0) for row in rows)


def test_data_without_a_usable_pair_are_one_line(arguments, data, tmp_path, capsys):
    """Twenty lines about broken pairs would hide what ends the run."""
    clips = [line for line in data.read_text().splitlines() if "references" not in line][-1:]
    (tmp_path / "clips.jsonl").write_text(clips[0].replace('"6', f'"{data.parent}/6'))
    (tmp_path / "bad.jsonl").write_text("{\n" * 30)
    for name, reason in (("bad.jsonl", "bad.jsonl:1: not an edit"), ("none.jsonl", "none.jsonl")):
        assert train.main(arguments(1, "--data", tmp_path / name)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("train.py: error: ") and reason in line


# Checkpoints: killed, stopped, damaged, finished.


def test_a_resumed_run_is_the_whole_run(arguments, tmp_path, data):
    """Losses, order and weights must be those of a run without a stop, bit for bit."""
    common = [*MIXED, "--drop", 0.5, "--muon-lr", 0.02, "--save-every", 3]
    common += ["--validate", data, "--validate-every", 2]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train.main(arguments(2, *common, "--steps", 7, out=whole)) == 0
    for count in (3, 4, 7):
        assert train.main(arguments(2, *common, "--steps", count, out=halves)) == 0
    rows = metrics(halves)
    assert [row["step"] for row in rows if "loss" in row] == list(range(7))
    # The run with stops has validated at its ends too.
    assert [row for row in rows if "loss" in row or row["step"] in (0, 2, 4, 6, 7)] == metrics(
        whole
    )
    assert same(checkpoint(whole, 7), checkpoint(halves, 7)) and same(result(whole), result(halves))
    assert any(name.startswith("momentum_buffer dit.") for name in checkpoint(whole, 7))
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == [
        "step-0000006",
        "step-0000007",
    ]


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(arguments, tmp_path):
    """kill -9 at any moment, several times: nothing may differ from the run without a kill."""
    common = ["--steps", 24, "--save-every", 3, *MIXED, "--schedule", "cosine", "--drop", 0.5]
    common += ["--cache", tmp_path / "cache", "--muon-lr", 0.02]
    assert train.main(arguments(2, *common, out=tmp_path / "whole")) == 0
    out = tmp_path / "killed"
    log = out / "metrics.jsonl"
    moments = sorted(np.random.default_rng().choice(range(2, 22), 3, replace=False))
    for moment in [*moments, None]:
        old = log.stat().st_ino if log.exists() else None
        command = [sys.executable, train.__file__, *arguments(2, *common, out=out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None:  # the log is a new file once the run goes on
            started = log.exists() and log.stat().st_ino != old
            if moment is not None and started and len(log.read_bytes().splitlines()) > moment:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        _, text = process.communicate()
        assert process.returncode == (0 if moment is None else -signal.SIGKILL), text
    assert metrics(out) == metrics(tmp_path / "whole")
    assert same(checkpoint(out, 24), checkpoint(tmp_path / "whole", 24))
    assert same(result(out), result(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_writes_a_checkpoint_first(arguments, out, tmp_path, number, code):
    """Ctrl-C, a cluster that wants its machine back, or a terminal that closes must not cost the
    steps since the last checkpoint.
    """
    common = [*MIXED, "--save-every", 1000]
    command = [sys.executable, train.__file__, *arguments(2, *common, "--steps", 10**6)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # the tests may run under nohup
    )
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_bytes().splitlines()) > 2):
        time.sleep(0.01)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in text and "the same command" in text
    count = len(steps(out))
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{count:07d}"]
    whole = tmp_path / "whole"
    assert train.main(arguments(2, *common, "--steps", count + 2)) == 0
    assert train.main(arguments(2, *common, "--steps", count + 2, out=whole)) == 0
    assert metrics(out) == metrics(whole) and same(result(out), result(whole))


def test_under_nohup_training_outlives_the_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.stop_signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "damage",
    ["cut", "missing", "empty state", "odd state", "other step", "nan", "no moments", "copied"],
)
def test_a_damaged_checkpoint_is_not_the_end(arguments, out, capsys, damage):
    """The one before it is there for this; and a copy made by hand is none of ours."""
    common = [*MIXED, "--save-every", 2]
    assert train.main(arguments(2, *common, "--steps", 4)) == 0
    newest = out / "checkpoints" / "step-0000004"
    (shard,) = newest.glob("*.safetensors")
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "missing":
        shard.unlink()
    elif damage == "other step":
        state = json.loads((newest / "state.json").read_text())
        (newest / "state.json").write_text(json.dumps({**state, "step": -1}))
    elif damage == "no moments":
        with safe_open(shard, "pt") as file:
            about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        tensors = {key: tensor for key, tensor in tensors.items() if " " not in key}
        shard.write_bytes(to_bytes(tensors, about))
    elif damage == "nan":
        content = bytearray(shard.read_bytes())
        content[-4:] = np.float32(math.nan).tobytes()
        shard.write_bytes(content)
    elif damage == "copied":
        newest.rename(newest.with_name("step-0000004 (copy)"))
    else:
        (newest / "state.json").write_text("" if damage == "empty state" else '{"step": 4}')
    capsys.readouterr()
    assert train.main(arguments(2, *common, "--steps", 6)) == 0
    text = capsys.readouterr().err
    assert "going on at step 2" in text
    assert damage == "copied" or f"{newest} is damaged" in text
    assert [row["step"] for row in steps(out)] == list(range(6))
    for state in (out / "checkpoints").glob("*/state.json"):
        state.write_text("")
    assert train.main(arguments(2, *common, "--steps", 8)) == 2
    assert "no checkpoint in" in capsys.readouterr().err.splitlines()[-1]


def test_a_log_edited_by_hand_does_not_end_a_run(arguments, out, capsys):
    """Its curves cannot be drawn then; the training is not concerned."""
    assert train.main(arguments(1, "--steps", 1)) == 0
    (out / "metrics.jsonl").write_text('{"step": 0, "loss": "low", "video": []}\n' + "[" * 10**5)
    capsys.readouterr()
    assert train.main(arguments(1, "--steps", 2)) == 0
    assert "curves.png could not be drawn" in capsys.readouterr().err


def test_a_second_ctrl_c_in_a_checkpoint(arguments, out, capsys, monkeypatch):
    """It interrupts and leaves nothing behind; it is no disk that is full."""
    assert train.main(arguments(1, "--steps", 1)) == 0

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        torch.distributed.checkpoint.filesystem, "_write_files_from_queue", interrupt
    )
    assert train.main(arguments(1, "--steps", 2)) == 130
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000001"]


def test_two_runs_in_one_folder(arguments, out, capsys):
    """A requeued job while the old one hangs on: both would write the same files."""
    out.mkdir()
    with (out / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert train.main(arguments(1, "--steps", 1)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "another run is training in" in line and not (out / "metrics.jsonl").exists()
    assert train.main(arguments(1, "--steps", 1)) == 0


def test_a_finished_run_says_so_and_changes_nothing(arguments, out, capsys):
    """Whoever reads the result meanwhile must find it whole."""
    assert train.main(arguments(1, "--steps", 2)) == 0
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.name != ".lock"}
    capsys.readouterr()
    assert train.main(arguments(1, "--steps", 2)) == 0
    said = capsys.readouterr()
    assert "is finished" in said.err and said.out.strip() == str(out / "instructx")
    assert times == {
        file: file.stat().st_mtime_ns for file in out.rglob("*") if file.name != ".lock"
    }
    assert train.main(arguments(1, "--steps", 3)) == 0 and len(steps(out)) == 3


def test_other_data_are_noticed(arguments, out, tmp_path, capsys):
    """Training may go on with more data, but it is then no longer the run that was planned."""
    file, said = write_data(tmp_path / "data"), []
    rows = file.read_text().splitlines()
    for count, kept in ((1, rows), (2, rows), (3, rows[:-1])):
        file.write_text("\n".join(kept))
        assert train.main(arguments(1, "--data", file, "--steps", count)) == 0
        said.append("the data are not those" in capsys.readouterr().err)
    assert said == [False, False, True]


def test_other_settings_do_not_go_on(arguments, out, capsys):
    """A resumed run with another learning rate would be neither the one nor the other."""
    assert train.main(arguments(1, "--steps", 1)) == 0
    assert train.main(arguments(1, "--steps", 2, "--lr", 1e-3)) == 2
    assert "lr was 0.01 and is 0.001" in capsys.readouterr().err
    assert train.main(arguments(1, "--steps", 2, "--save-every", 7)) == 0
    assert len(steps(out)) == 2


def test_a_full_disk_leaves_the_checkpoint_before(arguments, out, capsys):
    """Half a checkpoint must not be taken for one, and the next start goes on from the last."""
    assert train.main(arguments(1, "--steps", 2)) == 0
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.SIG_IGN
    handler = signal.signal(signal.SIGXFSZ, ignored)
    (shard,) = (out / "checkpoints" / "step-0000002").glob("*.safetensors")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (shard.stat().st_size // 2, limits[1]))
        code = train.main(arguments(1, "--steps", 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "step-0000004 could not be written" in last
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000002"]
    (out / "checkpoints" / "step-0000009.partial").mkdir()  # as kill -9 leaves it
    assert train.main(arguments(1, "--steps", 4)) == 0
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {"step-0000002", "step-0000004"} and len(steps(out)) == 4


def test_a_killed_run_leaves_no_file_for_good(arguments, out):
    """SIGKILL inside the writing of a log or a picture, which the next start writes again."""
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    out.mkdir()
    stale = out / f".00000000-{platform.node()}-{int(ended.stdout)}.partial"
    stale.touch()
    assert train.main(arguments(1, "--steps", 1)) == 0
    assert not stale.exists() and (out / "instructx").is_dir()


def nan_in_calls(numbers, in_gradient=False):
    """A change of the DiT's forward for `spy`: NaN in its calls of these numbers."""

    def change(forward):
        calls = iter(range(10**6))

        def changed(*args, **more):
            v = forward(*args, **more)
            if next(calls) not in numbers:
                return v
            if in_gradient:
                v.register_hook(lambda gradient: gradient * math.inf)
                return v
            return v * math.nan

        return changed

    return change


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(arguments, out, capsys, in_gradient):
    """One NaN in the weights, or in an optimizer's moments, and the run is lost."""
    build = spy({}, nan_in_calls({4, 5}, in_gradient))  # two chunks a step: this is step 2
    assert train.main(arguments(1, "--steps", 3, "--save-every", 1), build) == 0
    assert [row["used"] for row in steps(out)] == [True, True, False]
    assert same(checkpoint(out, 2), checkpoint(out, 3))
    assert "step 2 skipped" in capsys.readouterr().err
    assert math.isfinite(steps(out)[2]["loss"]) == in_gradient


def test_a_run_without_one_usable_step_is_an_error(arguments, out, capsys):
    """Its result would be the untrained model, with exit code 0."""
    build = spy({}, nan_in_calls(range(100)))
    assert train.main(arguments(2, *MIXED, "--steps", 3), build) == 2
    assert "3 unusable steps in a row" in capsys.readouterr().err.splitlines()[-1]
    assert not (out / "instructx").exists()


def test_ten_unusable_steps_in_a_row_end_the_run(arguments, out, capsys):
    """A run that diverged would fill its hours with skipped steps."""
    build = spy({}, nan_in_calls(set(range(100)) - {10, 11}))  # steps 0 to 4, and from 6 on
    assert train.main(arguments(1, "--steps", 100), build) == 2
    *said, last = capsys.readouterr().err.splitlines()
    assert "10 unusable steps in a row" in last and "step 15" in last and "data.jsonl:" in last
    skipped = [int(line.split()[2]) for line in said if "skipped" in line]
    assert skipped == [*range(5), *range(6, 15)] and len(steps(out)) == 16


# The result, validation, and the terminal.


@pytest.mark.parametrize("stage", [1, 2])
def test_the_result_loads_and_goes_on(arguments, base, out, tmp_path, stage):
    """What is exported must be what was trained, alone or among weights, and start a stage."""
    found = {}
    assert train.main(arguments(stage, "--steps", 3, *MIXED), spy(found)) == 0
    folder, weights = out / "instructx", tmp_path / "weights"
    weights.mkdir()
    for name in ("mllm", "dit", "vae"):
        (weights / name).symlink_to(base / name)
    (weights / "instructx").symlink_to(folder)
    frames = np.random.default_rng(0).integers(0, 256, (5, 24, 40, 3), np.uint8)
    expected = found["model"].edit(frames, "x")
    assert np.array_equal(
        InstructX.from_pretrained(base, instructx=folder).edit(frames, "x"), expected
    )
    assert np.array_equal(InstructX.from_pretrained(weights).edit(frames, "x"), expected)
    trained, later = found["model"].state_dict(), {}
    line = arguments(3, "--start", folder, "--steps", 1, out=tmp_path / "second")
    start = line.index("--config")
    line[start + 1 : start + len(FRESH)] = ["guidance=3"]
    assert train.main(line, spy(later)) == 0
    assert all(torch.equal(later["before"][name], value) for name, value in trained.items())
    again = InstructX.from_pretrained(base, instructx=tmp_path / "second" / "instructx")
    assert again.config.guidance == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_validation(arguments, loader, data, out, stage):
    """One noise at every step, so that what changes is the model; edits as InstructX makes them."""
    more = ["--validate", data, "--validate-every", 2]
    assert train.main(arguments(stage, "--steps", 4, "--lr", 0, "--warmup", 0, *more)) == 0
    held_out = [row for row in metrics(out) if "held_out" in row]
    assert [row["step"] for row in held_out] == [0, 2, 4]
    assert held_out[0]["held_out"].keys() == ({"images"} if stage == 1 else {"images", "clips"})
    assert held_out[0]["held_out"] == held_out[1]["held_out"] == held_out[2]["held_out"]
    pictures = [(out / "validation" / f"step-000000{i}.png").read_bytes() for i in (0, 2, 4)]
    assert pictures[0] == pictures[1] == pictures[2]
    made = loader(stage)
    for number in (0, 2, *([6] if stage > 1 else [])):  # with a reference, without, and a clip
        pair, shape = made.pairs.pairs[number], made.pairs.shapes[number]
        with torch.no_grad():
            ours = train.render(made.args, made.model, made, pair, shape)
        assert ours.shape == (*shape[0], 3)
        if stage > 1:
            references = [read_frames(path).frames[0] for path in pair.references]
            frames = read_frames(pair.source).frames
            theirs = made.model.edit(frames, pair.instruction, references, seed=3)
            assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_validation_that_fails(arguments, data, out, monkeypatch):
    """Nine hours of training must not be lost for a picture of NaN."""

    def broken(*others):
        raise FloatingPointError("the picture is not finite")

    monkeypatch.setattr(train, "render", broken)
    more = ["--validate", data, "--validate-every", 2]
    assert train.main(arguments(2, "--steps", 2, *more)) == 0
    assert (out / "validation" / "step-0000002.png").is_file()


def test_memory_that_runs_out(arguments, monkeypatch, capsys):
    """torch has an error of its own for CUDA alone."""

    def full(*others):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train, "flow_loss", full)
    assert train.main(arguments(2, "--steps", 2)) == 2
    assert "error: out of memory; try --gradient-checkpointing" in capsys.readouterr().err


def test_edits_have_the_size_of_the_training(arguments, out):
    """A model that only saw small pictures should not be asked for large ones."""
    config = out / "instructx" / "config.json"
    for area in (16 * 16, 100):
        more = [] if area == 16 * 16 else ["--config", *FRESH[1:], f"area={area}"]
        assert train.main(arguments(2, "--steps", 1, *more)) == 0
        assert json.loads(config.read_text())["area"] == area
        shutil.rmtree(out)


def test_the_held_out_loss_is_that_of_training(arguments, loader, out, tmp_path):
    """Overfitting shows where the two curves part, so both must be the same measure."""
    file = write_data(tmp_path / "others", images=1, clips=1, references=1, seed=9)
    more = ["--validate", file, "--lr", 0, "--sigma", "uniform", "--change-weight", 2]
    assert train.main(arguments(2, *more, "--steps", 1)) == 0
    made = loader(2, *more, "--data", file, "--drop", 0)
    found = {}
    for number, media in enumerate(("images", "clips")):
        losses = []
        for draw_number in range(train.DRAWS):
            seed = train.hash_of(3, number, draw_number)
            sample = made.try_sample(number, seed)
            with torch.no_grad():
                loss = train.sample_losses(
                    made.model, made.latents, [sample], number > 0, made.args
                )
            losses.append(loss.item())
        found[media] = sum(losses) / len(losses)
        assert len(set(losses)) == train.DRAWS
    held_out = [row["held_out"] for row in metrics(out) if "held_out" in row]
    assert held_out == [pytest.approx(found, rel=1e-5)] * 2


def test_metrics_and_curves(arguments, out, data):
    """Every step is a line, the curves are there, and lines that were cut off do no harm."""
    assert train.main(arguments(2, "--steps", 4, *MIXED, "--validate", data)) == 0
    log = out / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    first, *trained, last = rows
    assert [(row["video"], row["samples"]) for row in trained] == [(False, 4), (True, 2)] * 2
    assert all(row["seconds"] > row["waited"] >= 0 and row["memory"] > 0 for row in trained)
    assert "held_out" in first and "held_out" in last
    with Image.open(out / "curves.png") as image:
        colors = image.convert("RGB").getcolors(10**6)
        assert image.size == (1200, 800) and len(colors) > 20
        curves = {tuple(bytes.fromhex(color[1:])) for color in train.COLORS[:4]}
        assert curves <= {color for _, color in colors}  # images, clips, and both held out
    log.write_bytes(log.read_bytes() + b'{"step": 4, "lo\n[]\n\xff\n{}\n')
    assert train.main(arguments(2, "--steps", 5, *MIXED, "--validate", data)) == 0
    assert [row["step"] for row in steps(out)] == list(range(5))


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--config", "image_querys=3"], "image_querys"),
        (["--config", "steps=many"], "steps=many"),
        (["--config", "guidance=nan"], "guidance=nan"),
        (["--config", "steps=0"], "steps=0"),
        (["--change-weight", "1"], "--change-weight"),
        (["--muon-lr", "0.1"], "--muon-lr"),
        (["--lr", "-1"], "--lr"),
        (["--steps", "0"], "--steps"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "/dev/zero"], "/dev/zero"),
        (["--validate", "/"], "there is no data file /"),
        (["--weights", "nowhere"], "nowhere"),
        (["--start", "/"], "config.json"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--device", "meta"], "--device meta"),
        (["--device", "hpu"], "--device hpu"),
        (["--out", "/dev/null"], "/dev/null"),
    ],
)
def test_bad_arguments_are_one_line(arguments, out, capsys, more, reason):
    """Each is found before any work, said in one line, and ends with 2."""
    try:
        code = train.main(arguments(1, *more))
    except SystemExit as end:
        code = end.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("train.py: error: ") and reason in line, line
    assert not (out / "metrics.jsonl").exists()


def test_help_and_mistyped_options_do_not_wait_for_torch(tmp_path):
    """Seconds of imports for a typing error."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for more, code in ((["--help"], 0), (["--stage", "1", "--dada", "x"], 2), ([], 2)):
        command = [sys.executable, train.__file__, *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == code and "torch was imported" not in done.stderr, done.stderr
        assert (len(done.stderr.splitlines()), "--muon-lr" in done.stdout) == (code // 2, code == 0)


@pytest.mark.slow
@pytest.mark.parametrize("frames", [0, 5])
def test_one_pair_can_be_learnt(base, tmp_path, frames):
    """If a single pair does not go to near zero, something between words and velocity is cut.

    And an edit must walk that way in the same direction, or it ends elsewhere than at the target.
    """
    torch.manual_seed(0)
    weights = tmp_path / "weights"
    weights.mkdir()
    config = WanDiTConfig(dim=128, ffn_dim=256, num_heads=4, num_layers=2, freq_dim=32, text_dim=48)
    WanDiT(config).save_pretrained(weights / "dit")
    for name in ("mllm", "vae"):
        (weights / name).symlink_to(base / name)
    images, clips = (0, 1) if frames else (1, 0)
    data = write_data(tmp_path / "data", images=images, clips=clips, references=1)
    data.write_text(data.read_text() * 8)  # eight noises of the one pair in each step
    line = ["--data", data, "--weights", weights, "--out", weights, "--cache", tmp_path / "cache"]
    more = "--stage 2 --steps 150 --image-batch 8 --video-batch 8 --lr 8e-3 --warmup 20 --drop 0"
    more += " --schedule cosine --device cpu"
    assert train.main([*map(str, line), *more.split(), *FRESH]) == 0
    losses = [row["loss"] for row in steps(weights)]
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5]), losses[::10]

    row, folder = json.loads(data.read_text().splitlines()[0]), data.parent
    source, target = (read_frames(folder / row[name]).frames for name in ("source", "target"))
    model, ends = InstructX.from_pretrained(weights), []
    decode = model.decode

    def watched(z, shape):  # a random VAE would hide it in pixels
        ends.append(z)
        return decode(z, shape)

    model.decode = watched
    references = [read_frames(folder / name).frames[0] for name in row.get("references", [])]
    model.edit(source, row["instruction"], references, steps=10, guidance=1)
    with torch.no_grad():
        z = model.encode(target)
    distance, of_noise = (float((x - z).norm() / z.norm()) for x in (ends[0], torch.randn(z.shape)))
    assert distance < 0.3 and of_noise > 0.8, (distance, of_noise)


# Processes.


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--dit-lora", 2]])
def test_two_processes_are_one(arguments, data, tmp_path, more):
    """Losses may not depend on how many share the work, even when that changes at a checkpoint.

    A chunk of three is shared unevenly, and of a single clip one process gets nothing: it must
    still take part.
    """
    common = [*MIXED, *more, "--validate", data, "--validate-every", 3, "--save-every", 3]
    common += "--image-batch 3 --video-batch 1 --micro-batch 3 --lr 1e-4".split()
    common.append("--gradient-checkpointing")

    def two(out, count):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "--", train.__file__]
        command += arguments(2, *common, "--steps", count, out=out)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def one(out, count):
        assert train.main(arguments(2, *common, "--steps", count, out=out)) == 0

    whole, shared, joined, split = (
        tmp_path / name for name in ("whole", "shared", "joined", "split")
    )
    one(whole, 6)
    two(shared, 6)
    two(joined, 3)
    one(joined, 6)
    one(split, 3)
    two(split, 6)
    assert len(list((shared / "checkpoints" / "step-0000006").glob("*.safetensors"))) == 2
    for out in (shared, joined, split):
        rows = metrics(out)
        assert len(rows) == len(metrics(whole))
        for row, expected in zip(rows, metrics(whole)):
            assert row["step"] == expected["step"] and row.get("samples") == expected.get("samples")
            for name, loss in expected.get("held_out", {}).items():
                assert math.isclose(row["held_out"][name], loss, rel_tol=1e-5)
            if "loss" in expected:
                assert math.isclose(row["loss"], expected["loss"], rel_tol=1e-5)
                assert math.isclose(row["gradient"], expected["gradient"], rel_tol=1e-4)
        ours, theirs = result(out), result(whole)
        assert ours.keys() == theirs.keys()
        assert all(close(ours[name], theirs[name], 1e-3) for name in ours)


def test_torchrun_leaves_our_options_to_us():
    """--start reads like an option of torchrun's own: the command has to keep them apart."""
    command = "torchrun --nproc-per-node 8 -- train.py"
    ours = "--stage 2 --start runs/stage1/instructx --out runs/stage2".split()
    read = torch.distributed.run.parse_args(command.split()[1:] + ours)
    assert read.training_script == "train.py" and read.training_script_args == ours
    assert command in train.__doc__
