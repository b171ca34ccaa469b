"""train.py on tiny random weights: what moves, the order of the data, killing and resuming, bad data, processes."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image
from safetensors.torch import load_file

import train
from connector import InstructX
from dit import WanDiT, WanDiTConfig, costs
from sampler import FlowSampler

FRESH = "--config image_queries=4 video_queries=6 mllm_frames=3 lora_rank=2 lora_alpha=4 steps=2 guidance=2".split()


def draw(path, frames, rng, size=(16, 16)):
    """Random pixels: an image, or with `frames` a clip as a folder. Returns its name."""
    save = lambda file: Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(file)
    if not frames:
        save(path.with_suffix(".png"))
        return path.with_suffix(".png").name
    path.mkdir()
    for i in range(frames):
        save(path / f"{i}.png")
    return path.name


def write_data(folder, images=6, clips=3, references=2, seed=0):
    """A data file of small pairs; the first few images have a reference. Returns it."""
    rng, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images + clips):
        frames = 5 if i >= images else 0
        row = {"source": draw(folder / f"{i}s", frames, rng), "target": draw(folder / f"{i}t", frames, rng),
               "instruction": f"edit {i} " * (i + 1)}
        rows.append(row | ({"references": [draw(folder / f"{i}r", 0, rng)]} if i < references else {}))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


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
def arguments(base, data, tmp_path):
    """A command line for a stage; further arguments take precedence."""
    def make(stage, *more, out=tmp_path / "out"):
        return [*map(str, ("--stage", stage, "--data", data, "--weights", base, "--out", out)),
                *"--device cpu --lr 1e-2 --image-batch 4 --video-batch 2 --micro-batch 2 --warmup 2 --seed 3".split(),
                *FRESH, *map(str, more)]
    return make


@pytest.fixture
def trainer(arguments):
    def make(stage, *more, out=None):
        args = train.settings(arguments(stage, *more, **({"out": out} if out else {})))
        args.out.mkdir(exist_ok=True)
        return train.Trainer(args)
    return make


def steps(trainer, count):
    """Runs `count` steps, and returns the figures of each."""
    figures = []
    for _ in range(count):
        figures.append(trainer.update(*trainer.load(trainer.step)))
        trainer.step += 1
    return figures


def metrics(out):
    """The lines of metrics.jsonl without what is measured by the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "waited", "samples_per_second", "memory")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def close(a, b, tolerance=2e-5):
    return float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm())


@pytest.mark.parametrize("stage, more, moving", [
    (1, [], ("connector.", "lora_")), (2, [], ("connector.", "lora_", "dit.")),
    (3, [], ("connector.", "lora_", "dit.")),
    (1, ["--train-all"], ("connector.", "mllm.model.")), (2, ["--train-all"], ("connector.", "mllm.model.", "dit."))])
def test_what_trains_and_what_is_frozen(trainer, stage, more, moving):
    """A frozen tower that drifts, or a trained part that an optimizer does not know, spoils a run without a sign."""
    made = trainer(stage, "--video-share", 0.5, *more)
    tensors = [*made.model.named_parameters(), *made.model.named_buffers()]
    state = lambda: {name: p.detach().clone() for name, p in tensors}
    before = state()
    steps(made, 4)
    after = state()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if any(part in name for part in moving)}
    if stage == 1:
        expected.remove("connector.video_queries")      # images alone
    assert moved == expected, moved ^ expected
    assert ("dit.source_embedding.weight" in moved) == (stage > 1)
    assert not any(name.startswith(("vae.", "mllm.visual.")) for name in moved)
    if "--train-all" in more:
        words = "mllm.model.embed_tokens.weight"
        moved = (before[words] != after[words]).any(dim=1)
        assert moved.any() and not moved.all()          # words that were not seen keep their meaning


def test_the_dit_sees_source_and_references_from_stage_2_on(trainer, monkeypatch):
    """The paper brings source latents in with stage 2; forgetting them there would still train."""
    for stage in (1, 2):
        made, seen = trainer(stage, "--video-share", 0.5), []
        forward = made.model.dit.forward
        watched = lambda z, t, context, source, references: (
            seen.append((z.shape[2], source, len(references))) or forward(z, t, context, source, references))
        monkeypatch.setattr(made.model.dit, "forward", watched)
        steps(made, 4)
        if stage == 1:
            assert all(frames == 1 and source is None and count == 0 for frames, source, count in seen)
        else:
            assert {frames for frames, _, _ in seen} == {1, 2} and {count for _, _, count in seen} == {0, 1}
            assert all(source is not None for _, source, _ in seen)


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_loss_and_gradient_are_the_formula(weight):
    """x_σ, the direction of the velocity, t = 1000σ, and the mean: a sign wrong here trains to noise. In float64."""
    random = torch.Generator().manual_seed(0)
    z, source, noise = torch.randn(3, 2, 16, 2, 4, 6, generator=random, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    a, b = torch.tensor([0.7, -0.3], dtype=torch.float64, requires_grad=True)
    dit = lambda x, t, context, source, references: a * x + b * source * t.view(-1, 1, 1, 1, 1) / 1000 + context.mean()
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
        assert math.isclose(loss[i].item(), (share * residual ** 2).mean(), rel_tol=1e-12)
        gradient = [g - 2 * (share * residual * part).mean() for g, part in zip(gradient, (mixed, s[i] * level))]
    assert all(abs(g.item()) < 1e-12 for g in gradient)


def test_a_step_is_the_mean_over_its_samples(trainer, tmp_path):
    """Chunks, padding of prompts, latents from the cache: none may change a gradient. Against one sample at a time."""
    made = trainer(2, "--video-share", 0, "--cache", tmp_path, "--drop", 0.3, "--clip", 1e9)
    steps(made, 1)                                      # from B = 0 half of the LoRA would have no gradient
    video, batches = made.load(1)
    assert [len(samples) for samples in batches] == [2, 2]
    gradients, clip = {}, made.clip_gradients

    def capture():
        gradients.update({name: p.grad.clone() for name, p in made.parameters.items() if p.grad is not None})
        return clip()

    made.clip_gradients, made.optimizers = capture, []
    figures = made.update(video, batches)
    losses = []
    for sample in (sample for samples in batches for sample in samples):
        random = torch.Generator().manual_seed(sample.seed)
        level = torch.randn(1, generator=random).sigmoid()
        level = 3 * level / (1 + 2 * level)
        pictures = sample.target, sample.source, *sample.references
        x, source, *references = (made.latents([picture]) for picture in pictures)
        noise = torch.randn(x.shape[1:], generator=random)[None]
        context = made.model.context(sample.inputs, False)
        velocity = made.model.dit((1 - level) * x + level * noise, 1000 * level, context, source, references)
        losses.append((velocity - (noise - x)).square().mean())
    torch.stack(losses).mean().backward()
    assert math.isclose(figures["loss"], float(np.mean([loss.item() for loss in losses])), rel_tol=2e-5)
    assert gradients.keys() == {name for name, p in made.parameters.items() if p.grad is not None}
    for name, gradient in gradients.items():
        assert close(gradient, made.parameters[name].grad, 5e-5), name
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert math.isclose(figures["gradient"], norm.item(), rel_tol=1e-4)


def test_the_optimizer_is_adamw_by_hand(trainer):
    """Clipping before the moments, decay on matrices alone, warm-up from the first step: in float64, from gradients."""
    made = trainer(1, "--lr", 1e-2, "--warmup", 3, "--weight-decay", 0.1, "--clip", 0.5)
    expected = {name: p.detach().double() for name, p in made.parameters.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p), [0]) for name, p in expected.items()}
    gradients, clip = {}, made.clip_gradients

    def capture():
        gradients.update({name: p.grad.double().clone() for name, p in made.parameters.items() if p.grad is not None})
        return clip()

    made.clip_gradients = capture
    for i in range(4):
        gradients.clear()
        figures, = steps(made, 1)
        rate, norm = 1e-2 * min(1, (i + 1) / 3), math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert math.isclose(figures["lr"], rate) and norm > 0.5
        assert math.isclose(figures["gradient"], norm, rel_tol=1e-6)
        for name, g in gradients.items():
            first, second, count = moments[name]
            count[0] += 1
            first.mul_(0.9).add_(0.1 * g * 0.5 / norm)
            second.mul_(0.95).add_(0.05 * (g * 0.5 / norm) ** 2)
            if g.ndim > 1 and "queries" not in name:
                expected[name] *= 1 - rate * 0.1
            update = first / (1 - 0.9 ** count[0]) / ((second / (1 - 0.95 ** count[0])).sqrt() + 1e-8)
            expected[name] -= rate * update
    for name, p in made.parameters.items():
        assert close(p.detach(), expected[name]), name


def test_muon_trains_the_matrices_of_the_blocks(trainer):
    """Its step has a spectral norm of about 1, however small the gradient; decay, and the rate, are on top."""
    made = trainer(2, "--video-share", 0, "--muon-lr", 0.1, "--lr", 1e-3, "--warmup", 2, "--weight-decay", 0.5)
    before = {name: p.detach().clone() for name, p in made.parameters.items()}
    steps(made, 1)
    for name, p in made.parameters.items():
        assert set(made.moments(name)) in ({"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}, set())
        if "momentum_buffer" in made.moments(name):
            assert name.startswith("dit.blocks.") and name.endswith(".weight") and p.ndim == 2
            step = (before[name] * (1 - 0.05 * 0.5) - p.detach()) / 0.05 / max(1, p.shape[0] / p.shape[1]) ** 0.5
            assert 0.6 < torch.linalg.matrix_norm(step, 2) < 1.3, name
        elif made.moments(name):
            assert (before[name] - p.detach()).abs().max() < 0.002          # by the rate of the others
    assert sum("momentum_buffer" in made.moments(name) for name in made.parameters) == 2 * 10


def test_learning_rates():
    """The paper's is constant; the other two must end at 0, not before and not below."""
    args = train.settings([*"--stage 1 --data x --weights x --out x --steps 100 --warmup 10".split()])
    rates = {}
    for args.schedule in ("constant", "linear", "cosine"):
        rates[args.schedule] = [train.learning_rate(step, args, 2) for step in range(100)]
        assert np.allclose(rates[args.schedule][:10], np.arange(1, 11) * 0.2)
    assert set(rates["constant"][10:]) == {2}
    assert np.allclose(rates["linear"][10:], 2 * (1 - np.arange(1, 91) / 90))
    assert np.allclose(rates["cosine"][10:], 1 + np.cos(np.pi * np.arange(1, 91) / 90))


def pairs_of(trainer_or_pairs, first, last):
    """[(is_video, [pair numbers])] of some steps."""
    plans = [trainer_or_pairs.plan(step) for step in range(first, last)]
    return [(video, [number for chunk in chunks for number in chunk]) for video, chunks in plans]


def test_share_of_clips_is_exact(trainer):
    """0.6 of the steps, also over any short stretch, and none where there are no clips to take, or no images."""
    pairs = trainer(2, "--video-share", 0.6).pairs
    kinds = [pairs.is_video(step) for step in range(1000)]
    assert sum(video for video, _ in kinds) == 600
    assert all(sum(video for video, _ in kinds[i:i + 50]) in (29, 30, 31) for i in range(950))
    seen = {False: 0, True: 0}
    for video, before in kinds:
        assert before == seen[video]
        seen[video] += 1
    assert not any(video for video, _ in pairs_of(trainer(1).pairs, 0, 50))
    for kind, buckets in ((False, pairs.buckets[True]), (True, pairs.buckets[False])):
        pairs.buckets[not kind], kept = {}, pairs.buckets[not kind]
        assert {pairs.is_video(step) for step in range(9)} == {(kind, step) for step in range(9)}
        pairs.buckets[not kind] = kept


def test_an_epoch_visits_every_pair(trainer, base, tmp_path):
    """Drawing with replacement would leave a third of a small set unseen in an epoch. Order: by seed and step alone."""
    data = write_data(tmp_path / "data", images=16, clips=6, references=4)
    made = lambda seed: trainer(2, "--data", data, "--seed", seed, "--video-share", 0.5).pairs
    pairs = made(1)
    plans = pairs_of(pairs, 0, 24)                      # 12 steps of 4 images, 12 of 2 clips
    for video, size, first, epoch in ((False, 4, 0, 4), (True, 2, 16, 3)):
        visits = [numbers for kind, numbers in plans if kind == video]
        assert len(visits) == 12 and all(len(numbers) == size for numbers in visits)
        epochs = [sum(visits[start:start + epoch], []) for start in range(0, 12, epoch)]
        assert all(sorted(numbers) == list(range(first, first + epoch * size)) for numbers in epochs)
        assert len({tuple(numbers) for numbers in epochs}) == len(epochs)
    assert pairs_of(made(1), 7, 19) == plans[7:19] != pairs_of(made(2), 7, 19)


def test_a_chunk_is_of_one_shape(trainer, tmp_path):
    """Else nothing could be stacked; and with a bucket for each odd size of picture no batch would be larger than 1."""
    rng, rows = np.random.default_rng(0), []
    sizes = [(int(h), int(w)) for h, w in rng.integers(200, 900, (200, 2))]
    for i, size in enumerate(sizes):
        row = {"source": f"{i}.png", "target": f"{i}.png", "instruction": "x"}
        Image.new("1", size[::-1]).save(tmp_path / f"{i}.png")
        rows.append(row)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = trainer(1, "--data", tmp_path / "data.jsonl", "--area", 256 * 256).pairs
    assert not pairs.broken and len(pairs.buckets[False]) < 40
    for (height, width), ((length, h, w),) in zip(sizes, pairs.shapes):
        assert length == 1 and h % 16 == w % 16 == 0 and 0.85 < h * w / min(256 ** 2, height * width) < 1.15
        assert abs(math.log(h / w * width / height)) < 0.13                 # stretched by an eighth at the most
    assert pairs.working(64, 64, 256 ** 2) == (64, 64) and pairs.working(480, 832, 480 * 832) == (480, 832)
    for chunk in pairs.epoch(False, 0):
        assert len({pairs.shapes[number] for number in chunk}) == 1


def test_clips_are_cut_to_what_the_vae_takes(trainer, tmp_path):
    """4n + 1 frames, of the shorter of the two, at most --frames; a reference is no larger than a frame."""
    rng, rows = np.random.default_rng(0), []
    for i, (source, target) in enumerate([(9, 9), (12, 9), (9, 6), (30, 30)]):
        source, target = draw(tmp_path / f"{i}s", source, rng), draw(tmp_path / f"{i}t", target, rng)
        rows.append({"source": source, "target": target, "instruction": "x",
                     "references": [draw(tmp_path / f"{i}r", 0, rng, (64, 64))]})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = trainer(2, "--data", tmp_path / "data.jsonl", "--frames", 20)
    assert [shape[0][0] for shape in made.pairs.shapes] == [9, 9, 5, 17]
    assert {shape[1] for shape in made.pairs.shapes} == {(1, 16, 16)}
    sample = made.load_sample((0, 0), 2, seed=0)
    assert made.latents([sample.target]).shape == made.latents([sample.source]).shape == (1, 16, 2, 2, 2)


def test_sizes_by_header_are_those_that_are_read(tmp_path):
    """A photo that its EXIF turns, an animation, a clip, a folder: a wrong size would put it into a wrong bucket."""
    from edit import write_clip
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (7, 20, 36, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("photo.jpg", "photo.png", "photo.webp"):
        Image.fromarray(frames[0]).save(tmp_path / name, exif=turned)
    Image.fromarray(frames[0]).save(tmp_path / "plain.png")
    for name in ("clip.mp4", "clip.gif"):
        write_clip(tmp_path / name, frames, 8)
    draw(tmp_path / "folder", 3, rng)
    index = train.Index(tmp_path / "sizes.json")
    found = {path.name: index(path) for path in sorted(tmp_path.iterdir())}
    assert found == {name: train.read_frames(tmp_path / name).frames.shape[:3] for name in found}
    assert found["photo.jpg"] == (1, 36, 20) and found["clip.mp4"] == (7, 20, 36)
    index.save()
    again = train.Index(tmp_path / "sizes.json")
    train_shape, train.media_shape = train.media_shape, None            # not read again
    try:
        assert {name: again(tmp_path / name) for name in found} == found
    finally:
        train.media_shape = train_shape
    Image.fromarray(frames[0, :, :8]).save(tmp_path / "plain.png")
    assert again(tmp_path / "plain.png") == (1, 20, 8)                  # unless it has changed


def test_instructions_are_dropped(trainer):
    """Guidance needs the empty instruction; dropped are words alone, never pictures, and by the seed of the sample."""
    made = trainer(1, "--drop", 0.3)
    inputs = lambda seed, number=4: made.load_sample((0, 0), number, seed).inputs
    text = lambda seed: made.model.processor.tokenizer.decode(inputs(seed)["input_ids"][0].tolist())
    texts = {seed: text(seed) for seed in range(200)}
    dropped = {seed for seed, words in texts.items() if "edit 4" not in words}
    assert 35 < len(dropped) < 85                       # 60 expected, with a deviation of 6.5
    assert {texts[seed] for seed in dropped} == {texts[min(dropped)]} and texts == {seed: text(seed) for seed in texts}
    whole, empty = (inputs(seed, 0) for seed in (min(set(texts) - dropped), min(dropped)))
    assert torch.equal(whole["pixel_values"], empty["pixel_values"])
    assert not any("edit 4" in text(seed) for seed in range(20) if setattr(made.args, "drop", 1.0) is None)
    assert all("edit 4" in text(seed) for seed in range(20) if setattr(made.args, "drop", 0.0) is None)


def test_latents_are_kept_by_content(trainer, tmp_path, monkeypatch):
    """Latents of a file that was replaced, or of another VAE, would teach the wrong picture for the rest of the run."""
    made = trainer(2, "--cache", tmp_path / "cache")
    count, encode = [], made.model.vae.encode
    monkeypatch.setattr(made.model.vae, "encode", lambda video: count.append(1) or encode(video))
    path, clip = tmp_path / "a.png", tmp_path / "clip"
    rng = np.random.default_rng(0)
    draw(path, 0, rng), draw(clip, 5, rng)
    get = lambda path, shape, latents=made.latents: latents([latents.look_up(path, shape)])
    for path, shape in ((path, (1, 16, 16)), (clip, (5, 16, 16))):
        count.clear()
        first = get(path, shape)
        shutil.copytree(path, tmp_path / "copy") if path.is_dir() else shutil.copy(path, tmp_path / "copy.png")
        copy = tmp_path / ("copy" if path.is_dir() else "copy.png")
        assert torch.equal(first, get(path, shape)) and torch.equal(first, get(copy, shape)) and len(count) == 1
        draw((copy / "0.png") if path.is_dir() else copy, 0, rng)
        assert not torch.equal(first, get(copy, shape)) and len(count) == 2
        video = torch.tensor(train.read(path, shape)[0]).permute(3, 0, 1, 2)[None] / 127.5 - 1
        assert torch.equal(first, encode(video))
    get(clip, (1, 16, 16)), get(clip, (1, 32, 32))
    assert len(count) == 4
    with torch.no_grad():
        made.model.vae.encoder.conv1.weight.mul_(1.01)
    other = train.Latents(made.model.vae, tmp_path / "cache")
    get(clip, (5, 16, 16), other)
    assert len(count) == 5


def break_everything(folder):
    """A data file of whole pairs and one of every kind of broken one. Returns it, and {line: what must be said}."""
    from edit import write_clip
    file = write_data(folder, images=3, clips=1, references=1)
    rows, rng = [json.loads(line) for line in file.read_text().splitlines()], np.random.default_rng(1)
    good, clip = rows[1], rows[3]
    whole = (folder / "0s.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty").mkdir()
    draw(folder / "wide", 0, rng, (16, 32)), draw(folder / "short", 3, rng), draw(folder / "damaged", 5, rng)
    (folder / "damaged" / "3.png").write_bytes(whole[:len(whole) // 2])
    write_clip(folder / "a.mp4", rng.integers(0, 256, (9, 16, 16, 3), np.uint8), 8)
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:2000])
    lines = [(good | {"source": "nowhere.png"}, "does not exist"), (good | {"target": "cut.png"}, "cut.png"),
             (good | {"source": "text.png"}, "text.png"), (good | {"source": "empty"}, "folder without images"),
             (good | {"target": "wide.png"}, "another aspect"),
             (good | {"target": clip["target"]}, "an image, the other a clip"),
             (clip | {"source": "short", "target": "short"}, "5 or more"),
             (clip | {"target": "damaged"}, "3.png"), (clip | {"source": "cut.mp4"}, "cut.mp4"),
             (good | {"references": ["nowhere.png"]}, "does not exist"),
             (good | {"instruction": "<|image_pad|>"}, "special token"),
             (good | {"instruction": 3}, "instruction"), ({"source": "0s.png", "instruction": "x"}, "target"),
             ([], "not an edit"), ({**good, "references": 5}, "not an edit")]
    text = file.read_text() + "".join(json.dumps(row) + "\n" for row, _ in lines) + "{\n"
    file.write_text(text)
    return file, {f"{file}:{i}": said for i, (_, said) in enumerate([*lines, (None, "not an edit")], len(rows) + 1)}


def test_check_data_lists_every_kind_of_broken_pair(arguments, tmp_path, capsys):
    """Found after hours on a rented GPU otherwise. Each is named by file and line, and no whole one is."""
    file, said = break_everything(tmp_path / "data")
    assert train.main(arguments(2, "--data", file, "--check-data")) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    found = {line.split(": ")[0]: line for line in lines}
    assert found.keys() == said.keys()
    assert not [(said[where], found[where]) for where in said if said[where] not in found[where]]
    assert f"{len(said)} pairs are broken" in summary
    file.write_text("\n".join(file.read_text().splitlines()[:4]))
    assert train.main(arguments(2, "--data", file, "--check-data")) == 0
    assert "3 images and 1 clips in 3 buckets; 0 pairs are broken" in capsys.readouterr().out


def test_broken_pairs_are_left_out_of_training(arguments, trainer, tmp_path, capsys):
    """One bad file of a million must not end a run, nor go unnoticed; the whole pairs train as if it were not there."""
    file, said = break_everything(tmp_path / "data")
    made = trainer(2, "--data", file, "--video-share", 0.5)
    figures = steps(made, 16)
    assert made.pairs.broken.keys() == said.keys()
    assert all(said[where] in problem for where, problem in made.pairs.broken.items())
    assert len({row["samples"] for row in figures}) > 1 and all(row["used"] == (row["samples"] > 0) for row in figures)
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert train.main(arguments(1, "--data", tmp_path / "bad.jsonl")) == 2
    assert "bad.jsonl:1: not an edit" in capsys.readouterr().err


def test_csv_of_the_neighbors(trainer, data, tmp_path):
    """Their columns, a byte order mark as spreadsheets write it, quoted commas, and rows without a reference."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    (tmp_path / "data.csv").write_text("\ufeffsrc_video,tgt_video,prompt,ref_image,more\n" + "".join(
        f'{data.parent / row["source"]},{data.parent / row["target"]},"make it, {i}",'
        f'{data.parent / row["references"][0] if "references" in row else ""},1\n'
        for i, row in enumerate(rows)), encoding="utf-8")
    ours, theirs = (list(train.read_lines(file)) for file in (data, tmp_path / "data.csv"))
    assert [(p.source, p.target, p.references) for p in ours] == [(p.source, p.target, p.references) for p in theirs]
    assert theirs[3].instruction == "make it, 3" and theirs[3].where.endswith("data.csv:5")
    (tmp_path / "data.csv").write_text("video,text\na,b\n")
    assert "not an edit" in str(next(train.read_lines(tmp_path / "data.csv")))


def test_killed_runs_go_on_bit_for_bit(arguments, tmp_path):
    """kill -9 at any moment, several times: losses, order and weights must be those of the run without a kill."""
    common = ["--steps", 24, "--save-every", 3, "--video-share", 0.5, "--schedule", "cosine", "--drop", 0.5,
              "--cache", tmp_path / "cache", "--muon-lr", 0.02]
    assert train.main(arguments(2, *common, out=tmp_path / "whole")) == 0
    out = tmp_path / "killed"
    log = out / "metrics.jsonl"
    inode = lambda: log.stat().st_ino if log.exists() else None
    for moment in [*sorted(np.random.default_rng().choice(range(2, 22), 3, replace=False)), None]:
        old = inode()
        command = [sys.executable, train.__file__, *arguments(2, *common, out=out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None:                   # the log is a new file once the run goes on
            if moment is not None and inode() != old and len(log.read_bytes().splitlines()) > moment:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        assert process.wait() == (0 if moment is None else -signal.SIGKILL), process.stderr.read()
        process.stderr.close()
    assert metrics(out) == metrics(tmp_path / "whole") and [row["step"] for row in metrics(out)] == list(range(24))
    names = ("checkpoints/step-0000024/shard-00001-model-00001-of-00001", "instructx/model", "instructx/dit/model")
    for name in names:
        killed, whole = (load_file(folder / f"{name}.safetensors") for folder in (out, tmp_path / "whole"))
        assert killed.keys() == whole.keys() and all(torch.equal(killed[key], whole[key]) for key in whole)
    kept = load_file(out / f"{names[0]}.safetensors")
    assert all(any(key.startswith(kind) for key in kept) for kind in ("exp_avg_sq dit.", "momentum_buffer dit.blocks."))
    assert [path.name for path in train.checkpoints(out)] == ["step-0000021", "step-0000024"]


def test_other_data_are_noticed(arguments, tmp_path, capsys):
    """Training may go on with more data than before, but it is then no longer the run that was planned."""
    data, out, said = write_data(tmp_path / "data"), tmp_path / "out", []
    lines = data.read_text().splitlines()
    for i, rows in enumerate((lines, lines, lines[:-1])):
        data.write_text("\n".join(rows))
        assert train.main(arguments(1, "--data", data, "--steps", i + 1, out=out)) == 0
        said.append("the data are not those" in capsys.readouterr().err)
    assert said == [False, False, True]


def test_other_settings_do_not_go_on(arguments, capsys):
    """A resumed run with another learning rate or data order would be neither the one nor the other."""
    assert train.main(arguments(1, "--steps", 1)) == 0
    assert train.main(arguments(1, "--steps", 2, "--lr", 1e-3)) == 2
    assert "lr was 0.01 and is 0.001" in capsys.readouterr().err
    assert train.main(arguments(1, "--steps", 2, "--keep", 1)) == 0
    assert [row["step"] for row in metrics(train.settings(arguments(1)).out)] == [0, 1]


def test_a_full_disk_leaves_the_checkpoint_before(arguments, trainer, monkeypatch, capsys):
    """The run ends with a message; half a checkpoint must not be taken for one, and the next start has the last."""
    written, save = [], train.checkpoint.save

    def full(state, storage_writer, no_dist):
        written.append(storage_writer.path)
        if len(written) > 1:
            (Path(storage_writer.path) / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, storage_writer=storage_writer, no_dist=no_dist)

    monkeypatch.setattr(train.checkpoint, "save", full)
    assert train.main(arguments(1, "--steps", 6, "--save-every", 2)) == 2
    said = capsys.readouterr().err
    assert "step-0000004 could not be written" in said and "No space left" in said
    out = train.settings(arguments(1)).out
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000002"]
    assert not (out / "instructx").exists()
    monkeypatch.setattr(train.checkpoint, "save", save)
    (out / "checkpoints" / "step-0000009.partial").mkdir()              # as kill -9 leaves it
    assert train.main(arguments(1, "--steps", 6, "--save-every", 2)) == 0
    assert [row["step"] for row in metrics(out)] == list(range(6))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-0000004", "step-0000006"]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(trainer, monkeypatch, kind):
    """One NaN in the weights, or in the optimizer's moments, and the run is lost."""
    made, flow_loss = trainer(1), train.flow_loss
    steps(made, 2)
    before = {key: tensor.clone() for key, tensor in made.state().items()}

    def broken(*args):
        loss = flow_loss(*args)
        if kind == "loss":
            return loss * math.nan
        loss.register_hook(lambda gradient: gradient * math.inf)        # the loss looks well
        return loss

    monkeypatch.setattr(train, "flow_loss", broken)
    figures, = steps(made, 1)
    assert not figures["used"] and made.unusable == 1 and math.isfinite(figures["loss"]) == (kind == "gradient")
    assert made.state().keys() == before.keys() and all(torch.equal(before[key], x) for key, x in made.state().items())
    monkeypatch.setattr(train, "flow_loss", flow_loss)
    figures, = steps(made, 1)
    assert figures["used"] and made.unusable == 0


def test_ten_unusable_steps_in_a_row_end_the_run(arguments, monkeypatch, capsys):
    """A run that diverged would else fill its hours with skipped steps."""
    flow_loss, calls = train.flow_loss, []

    def broken(*args):
        calls.append(1)                                 # two chunks a step: steps 0 to 4 and from 6 on
        return flow_loss(*args) * (1 if len(calls) in (11, 12) else math.nan)

    monkeypatch.setattr(train, "flow_loss", broken)
    assert train.main(arguments(1, "--steps", 100)) == 2
    *lines, last = capsys.readouterr().err.splitlines()
    assert "10 steps in a row" in last and "step 15" in last and "data.jsonl:" in last
    assert [int(line.split()[2]) for line in lines if "skipped" in line] == [*range(5), *range(6, 15)]
    assert len(metrics(train.settings(arguments(1)).out)) == 16         # NaN too is in the log


@pytest.mark.parametrize("stage, more", [(1, []), (2, []), (1, ["--train-all"]), (2, ["--train-all"])])
def test_the_result_loads_and_goes_on(arguments, base, tmp_path, stage, more):
    """What is exported must be what was trained, complete, and a start for the next stage, alone or among weights."""
    out = tmp_path / "first"
    args = train.settings(arguments(stage, "--steps", 3, "--video-share", 0.5, *more, out=out))
    out.mkdir()
    trained = train.Trainer(args)
    steps(trained, 3)
    folder = trained.finish()
    assert sorted(path.name for path in out.iterdir()) == ["instructx", "sizes.json"]
    (tmp_path / "weights").mkdir()
    for name in ("mllm", "dit", "vae"):
        (tmp_path / "weights" / name).symlink_to(base / name)
    (tmp_path / "weights" / "instructx").symlink_to(folder)
    frames = np.random.default_rng(0).integers(0, 256, (5, 24, 40, 3), np.uint8)
    expected = trained.model.edit(frames, "x")
    for again in (InstructX.from_pretrained(base, instructx=folder), InstructX.from_pretrained(tmp_path / "weights")):
        assert np.array_equal(again.edit(frames, "x"), expected)
    fresh = InstructX.from_pretrained(base, image_queries=4, video_queries=6, lora_rank=2, steps=2, guidance=2.0)
    assert not np.array_equal(fresh.edit(frames, "x"), expected)
    words = [word for word in arguments(2, "--start", folder, *more, out=out) if "=" not in word and word != "--config"]
    later = train.Trainer(train.settings(words))
    for name, p in trained.parameters.items():
        assert torch.equal(dict(later.model.named_parameters())[name], p), name
    steps(later, 1)
    second = tmp_path / "second"
    assert train.main(arguments(3, "--start", folder, "--config", "guidance=3", "--steps", 1, *more, out=second)) == 0
    assert InstructX.from_pretrained(base, instructx=second / "instructx").config.guidance == 3


def test_metrics_and_curves(arguments, tmp_path):
    """What a trainer looks at: every step is a line, the picture is there, and a line that was cut off does no harm."""
    assert train.main(arguments(2, "--steps", 4, "--video-share", 0.5)) == 0
    out = train.settings(arguments(1)).out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["video"], row["samples"]) for row in rows] == [(False, 4), (True, 2)] * 2
    assert all(row["seconds"] > row["waited"] >= 0 and row["memory"] > 0 for row in rows)
    known = [sum(value is not None for value in row["by_sigma"]) for row in rows]
    assert all(0 < count <= 4 for count in known)
    with Image.open(out / "curves.png") as image:
        assert image.size == (1200, 800) and len(image.convert("RGB").getcolors(10**6)) > 20
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert len(train.Metrics(out, 3).rows) == 3 and len(metrics(out)) == 3


def test_bad_arguments_are_one_line(arguments, data, tmp_path, capsys):
    """Each is found before any work, said in one line, and ends with 2."""
    for more, said in ((["--config", "image_querys=3"], "image_querys"), (["--config", "steps=many"], "'many'"),
                       (["--change-weight", "1"], "--change-weight"), (["--muon-lr", "0.1"], "--muon-lr"), (["--lr", "-1"], "--lr"),
                       (["--steps", "0"], "--steps"),
                       (["--data", tmp_path / "none.jsonl"], "none.jsonl"), (["--weights", tmp_path / "none"], "none"),
                       (["--start", tmp_path], "config.json"), (["--micro-batch", "3"], "no multiple")):
        try:
            code = train.main(arguments(1, *more))
        except SystemExit as end:
            code = end.code
        *rest, last = capsys.readouterr().err.splitlines()
        assert code == 2 and not rest and last.startswith("train.py: error: ") and said in last, last


@pytest.mark.parametrize("frames", [0, 5])
def test_one_pair_can_be_learnt(base, tmp_path, frames):
    """If a single pair does not go to near zero, something on the way from the words to the velocity is cut; and
    an edit must walk that way in the same direction, or it ends elsewhere than at the target."""
    torch.manual_seed(0)
    weights = tmp_path / "weights"
    weights.mkdir()
    config = WanDiTConfig(dim=128, ffn_dim=256, num_heads=4, num_layers=2, freq_dim=32, text_dim=48)
    WanDiT(config).save_pretrained(weights / "dit")
    for name in ("mllm", "vae"):
        (weights / name).symlink_to(base / name)
    data = write_data(tmp_path / "data", images=0 if frames else 1, clips=1 if frames else 0, references=1)
    data.write_text(data.read_text() * 8)               # eight noises of the one pair in each step
    paths = ("--data", data, "--weights", weights, "--out", weights, "--cache", tmp_path / "cache")
    assert train.main([*map(str, paths),
                       *"--stage 2 --steps 150 --image-batch 8 --video-batch 8 --lr 8e-3 --warmup 20 --schedule cosine "
                       "--drop 0 --device cpu".split(), *FRESH]) == 0
    losses = [row["loss"] for row in metrics(weights)]
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5]), losses[::10]

    row, folder = json.loads(data.read_text().splitlines()[0]), data.parent
    read = lambda name: train.read_frames(folder / name).frames
    model, ends = InstructX.from_pretrained(weights), []
    decode, target = model.decode, model.encode(read(row["target"]))
    model.decode = lambda z, shape: ends.append(z) or decode(z, shape)      # a random VAE would hide it in pixels
    references = [read(name)[0] for name in row.get("references", [])]
    model.edit(read(row["source"]), row["instruction"], references, steps=10, guidance=1)
    distance = lambda z: float((z - target).norm() / target.norm())
    assert distance(ends[0]) < 0.3 and distance(torch.randn(target.shape)) > 0.8, distance(ends[0])


def test_gradient_checkpointing_changes_no_bit(trainer):
    """Recomputed layers must see what they saw, among them the references and the mask of padded prompts."""
    results = []
    for more in ([], ["--gradient-checkpointing"]):
        made = trainer(2, "--video-share", 0.5, *more)
        assert made.model.dit.gradient_checkpointing == made.model.mllm.gradient_checkpointing == bool(more)
        results.append((steps(made, 4), {name: p.detach().clone() for name, p in made.parameters.items()}))
    (figures, weights), (again, same) = results
    assert figures == again and all(torch.equal(weights[name], same[name]) for name in weights)


def test_averaged_weights(arguments, trainer):
    """The export holds the averages, training goes on with the weights, and a resumed run averages on."""
    made = trainer(2, "--video-share", 0.5, "--ema", 0.9)
    expected = {name: p.detach().double() for name, p in made.parameters.items()}
    for i in range(4):
        steps(made, 1)
        decay = min(0.9, (1 + i) / (10 + i))
        for name, p in made.parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    assert all(close(made.average[name], value) for name, value in expected.items())
    weights = {name: p.detach().clone() for name, p in made.parameters.items()}
    exported = load_file(made.finish() / "dit" / "model.safetensors")
    name = "blocks.0.ffn.0.weight"
    assert torch.equal(exported[name], made.average[f"dit.{name}"])
    assert not torch.equal(exported[name], weights[f"dit.{name}"])
    assert all(torch.equal(p, weights[name]) for name, p in made.parameters.items())
    made.save()
    again = trainer(2, "--video-share", 0.5, "--ema", 0.9)
    again.resume()
    assert again.step == 4 and again.state().keys() == made.state().keys()
    assert all(torch.equal(value, made.state()[key]) for key, value in again.state().items())


def test_precision(trainer):
    """bfloat16 holds three digits: steps of 1e-5 would vanish in such weights, so what trains stays float32."""
    exact, rounded = trainer(2, "--video-share", 0), trainer(2, "--video-share", 0, "--precision", "bfloat16")
    kinds = {name: p.dtype for name, p in rounded.model.named_parameters()}
    assert all(kinds[name] == torch.float32 for name in rounded.parameters)
    frozen = {name: kind for name, kind in kinds.items() if name not in rounded.parameters}
    assert {kind for name, kind in frozen.items() if name.startswith("mllm.")} == {torch.bfloat16}
    assert {kind for name, kind in frozen.items() if name.startswith("vae.")} == {torch.float32}
    losses = [[row["loss"] for row in steps(made, 4)] for made in (exact, rounded)]
    assert losses[0] != losses[1] and np.allclose(*losses, rtol=0.03)
    assert {value.dtype for key, value in rounded.state().items()} == {torch.float32}
    frozen = {name: p.dtype for name, p in trainer(1, "--precision", "bfloat16").model.dit.named_parameters()}
    assert frozen["blocks.0.ffn.0.weight"] == torch.bfloat16 and frozen["time_embedding.0.weight"] == torch.float32


def test_low_rank_matrices_in_the_dit(trainer, base):
    """14B on one GPU. Nothing of the DiT itself may move; the export is the plain DiT with the matrices merged in."""
    made = trainer(2, "--video-share", 0.5, "--dit-lora", 2)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    steps(made, 3)
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == made.parameters.keys()
    inside = {name for name in moved if name.startswith("dit.")}
    assert all("lora_" in name or name == "dit.source_embedding.weight" for name in inside)
    assert len(inside) == 1 + 2 * 2 * 10                # A and B of 8 projections and 2 FFN matrices, in 2 blocks
    frames = np.random.default_rng(0).integers(0, 256, (5, 24, 40, 3), np.uint8)
    expected = made.model.edit(frames, "x")
    again = InstructX.from_pretrained(base, instructx=made.finish())
    assert np.abs(again.edit(frames, "x").astype(int) - expected).max() <= 1
    assert {f"dit.{name}" for name in again.dit.state_dict()} == {
        name for name in before if name.startswith("dit.") and "lora" not in name}


@pytest.mark.parametrize("stage", [1, 2])
def test_validation_shows_the_same_edits_every_time(arguments, trainer, data, stage):
    """Rendered with one noise, so that what changes from picture to picture is the model; and as edit.py does it."""
    more = ["--validate", data, "--validate-every", 2, "--validate-count", 3, "--ema", 0.5]
    assert train.main(arguments(stage, "--steps", 4, *more)) == 0
    files = sorted((train.settings(arguments(stage)).out / "validation").iterdir())
    assert [file.name for file in files] == ["step-0000002.png", "step-0000004.png"]
    assert files[0].read_bytes() != files[1].read_bytes()
    made = trainer(stage, *more)
    made.resume()
    made.validate()
    assert (files[1].parent / "step-0000004.png").read_bytes() == files[1].read_bytes()
    pair, shape = made.shown[0]
    with torch.no_grad():
        ours = made.render(pair, shape)
    if stage > 1:
        read = lambda path: train.read_frames(path).frames
        references = [read(path)[0] for path in pair.references]
        theirs = made.model.edit(read(pair.source), pair.instruction, references, seed=3)
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert ours.shape == (1, 16, 16, 3)
    (data.parent / "bad.jsonl").write_text('{"source": "0s.png", "target": "none.png", "instruction": "x"}')
    assert train.main(arguments(stage, "--validate", data.parent / "bad.jsonl", out=made.args.out / "new")) == 2


def test_two_processes_are_one(arguments, tmp_path):
    """Losses of a run may not depend on how many share the work, not even when that number changes at a checkpoint.

    A chunk of three is shared unevenly, and of a single clip one process gets nothing: it must still take part.
    """
    common = ("--video-share 0.5 --image-batch 3 --video-batch 1 --micro-batch 3 --lr 1e-4 --save-every 3 --keep 9 "
              "--ema 0.5 --gradient-checkpointing").split()

    def two(out, steps):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   "--", train.__file__, *arguments(2, *common, "--steps", steps, out=out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def one(out, steps):
        assert train.main(arguments(2, *common, "--steps", steps, out=out)) == 0

    whole, shared, joined, split = (tmp_path / name for name in ("whole", "shared", "joined", "split"))
    one(whole, 6)
    two(shared, 6)
    shutil.copytree(shared, joined)
    shutil.rmtree(joined / "checkpoints" / "step-0000006")
    one(joined, 6)
    shutil.copytree(whole, split)
    shutil.rmtree(split / "checkpoints" / "step-0000006")
    two(split, 6)
    assert len(list((shared / "checkpoints" / "step-0000006").glob("*.safetensors"))) == 2
    for other in (shared, joined, split):
        rows = metrics(other)
        assert [row["samples"] for row in rows] == [row["samples"] for row in metrics(whole)] and len(rows) == 6
        for row, expected in zip(rows, metrics(whole)):
            assert math.isclose(row["loss"], expected["loss"], rel_tol=1e-5)
            assert math.isclose(row["gradient"], expected["gradient"], rel_tol=1e-4)
        for name in ("instructx/model.safetensors", "instructx/dit/model.safetensors"):
            ours, theirs = load_file(other / name), load_file(whole / name)
            assert ours.keys() == theirs.keys() and all(close(ours[key], theirs[key], 1e-3) for key in ours)
        assert (other / "instructx/dit/config.json").read_bytes() == (whole / "instructx/dit/config.json").read_bytes()


def test_torchrun_leaves_our_options_to_us():
    """Of the options of train.py, --start reads like one of torchrun's: the command in the docs has to keep them apart."""
    command = "torchrun --nproc-per-node 8 -- train.py"
    ours = "--stage 2 --start runs/stage1/instructx --out runs/stage2".split()
    read = torch.distributed.run.parse_args(command.split()[1:] + ours)
    assert read.training_script == "train.py" and read.training_script_args == ours
    for text in (train.__doc__, (Path(train.__file__).parent / "README.md").read_text()):
        assert command in text and "torchrun --nproc-per-node 8 train.py" not in text


def test_plan_is_what_a_step_takes(trainer, base, monkeypatch):
    """A GPU that is rented by the plan must hold the run: what is held and kept is measured in a real step."""
    for more in ([], ["--dit-lora", 2], ["--ema", 0.5], ["--muon-lr", 0.02]):
        made = trainer(2, "--video-share", 0, "--image-batch", 2, *more)
        steps(made, 1)
        held = train.held_bytes(dict(made.model.named_parameters()), made.args)
        state = [value.numel() * 4 for key, value in made.state().items() if not key.startswith("step ")]
        frozen_and_gradients = [p.numel() * p.element_size() for p in made.model.parameters()]
        unseen = 2 * 4 * made.parameters["connector.video_queries"].numel()     # no clip yet, so no moments
        assert sum(state) + sum(frozen_and_gradients) == held - unseen

    args, kept = made.args, {}
    args.area = 64 * 64
    costs_of = {}
    cost_of_layers = train.cost_of_layers
    watched = lambda build, call, layers: costs_of.setdefault(call.__name__, cost_of_layers(build, call, layers))
    monkeypatch.setattr(train, "cost_of_layers", watched)
    train.step_cost(args, made.model, 1, 2, torch.float32)
    z, context = torch.randn(2, 16, 1, 8, 8), torch.randn(2, 4, 48, requires_grad=True)
    keep = lambda tensor: kept.setdefault(tensor.untyped_storage()._cdata, tensor) is None or tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made.model.dit(z, torch.zeros(2), context, z)
    weights = {p.untyped_storage()._cdata for p in made.model.parameters()}
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)
    (forward, backward, planned), one = costs_of["denoise"]
    assert math.isclose(planned, real, rel_tol=0.02)
    _, tokens, flop = costs(made.model.dit.config, (2, 16, 1, 8, 8), 4)
    assert tokens == 16 and 0.9 < one[0] * 2 / (2 * flop) < 1.1 and 1.8 < backward / forward < 2.2


def test_plan_from_the_terminal(base, tmp_path, capsys):
    """Before anything is downloaded: the released sizes, or those of config.json files. It says what does not fit."""
    for name in ("mllm", "dit", "vae"):
        (tmp_path / name).mkdir()
        shutil.copy(base / name / "config.json", tmp_path / name)
    assert train.main([*"--stage 2 --plan --frames 5 --area 4096 --gpus 16 --gpu-memory 0.001 --weights".split(),
                       str(tmp_path), *FRESH]) == 0
    said = capsys.readouterr().out
    assert "image step: 128 of 16 tokens" in said and "clip step: 32 of 32 tokens" in said and "20000 steps" in said
    assert "more than 0.001 GB" in said and "8 of 16 GPUs have nothing to do" in said
    with torch.device("meta"):
        released = train.skeleton(train.settings(["--stage", "1", "--plan", "1.3B"]))
    assert round(sum(p.numel() for p in released.dit.parameters()) / 1e6) == 1419
