"""The recipe of the shapes model in a miniature: parts run, go on, and what ships loads."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weights" / "shapes"))

import pretrain
import world

from connector import InstructX
from vae import WanVAE


@pytest.fixture
def few(monkeypatch):
    """A bank of 16 images and 4 clips, instead of thousands."""
    for name, value in {"IMAGES": 16, "CLIPS": 4}.items():
        monkeypatch.setattr(pretrain, name, value)


def run(monkeypatch, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments), "--out", str(out)])
    pretrain.main()


@pytest.mark.slow
def test_all_parts_and_what_ships(few, tmp_path, monkeypatch):
    """The parts are run hours apart by hand: one that no longer fits would be noticed late."""
    out, shipped = tmp_path / "base", tmp_path / "shapes"
    parts = ("vae", "decoder", "refine", "vision", "mllm", "instruct", "dit")
    steps = [word for part in parts for word in (f"--{part}-steps", 2)]
    run(monkeypatch, out, "tokenizer", *parts, *steps)
    settings = dict(lora_rank=2, lora_alpha=2, image_queries=3, video_queries=4, steps=2)
    trained = InstructX.from_pretrained(out, **settings)
    trained.save_pretrained(tmp_path / "trained", dit=True)
    monkeypatch.setattr(pretrain, "HERE", shipped)
    run(monkeypatch, out, "ship", "--trained", tmp_path / "trained")
    case = world.sample(3, kind="ref_add", video=True)
    model = InstructX.from_pretrained(out, instructx=tmp_path / "trained")
    original = model.edit(case.source, "x", case.references)
    model = InstructX.from_pretrained(shipped, dtype=torch.float32)
    result = model.edit(case.source, "x", case.references)
    assert result.shape == case.source.shape
    # half precision, and nothing left out
    assert np.abs(result.astype(int) - original).mean() < 1


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vae", "refine", "instruct", "dit"])
def test_goes_on_where_it_was(part, few, tmp_path, monkeypatch):
    """Four steps in one go, or in two runs: the second has to find optimizer, rate and data."""
    before = {
        "vae": (),
        "refine": ("vae", "--vae-steps", 1),
        "instruct": ("tokenizer", "vision", "mllm", "--vision-steps", 1, "--mllm-steps", 1),
        "dit": ("tokenizer", "vae", "--vae-steps", 1),
    }[part]
    if before:
        run(monkeypatch, tmp_path / "whole", *before)
        shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    run(monkeypatch, tmp_path / "whole", part, f"--{part}-steps", 4)

    class Killed(Exception):
        pass

    def killed_at(step, rng, loss_of):
        if step == 3:
            raise Killed
        return loss_of(step, rng)

    fit = pretrain.fit

    def fit_until_killed(name, out, model, loss_of, *rest, **more):
        def dying(step, rng):
            return killed_at(step, rng, loss_of)

        fit(name, out, model, dying, *rest, minutes_between_saves=0, **more)

    monkeypatch.setattr(pretrain, "fit", fit_until_killed)
    with pytest.raises(Killed):
        run(monkeypatch, tmp_path / "halves", part, f"--{part}-steps", 4)
    monkeypatch.setattr(pretrain, "fit", fit)
    log = tmp_path / "halves" / f"{part}.jsonl"
    log.write_text('{"step": 20, "loss": 0.5}\n')  # of a later step, which runs again
    run(monkeypatch, tmp_path / "halves", part, f"--{part}-steps", 4)
    assert not log.read_text()
    kept = {"refine": "vae", "instruct": "mllm"}.get(part, part)
    whole = load_file(tmp_path / "whole" / kept / "model.safetensors")
    halves = load_file(tmp_path / "halves" / kept / "model.safetensors")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_start_of_the_vae_shows_still_frames():
    """Before any training, a clip in which nothing moves has equal frames: time is not mixed up."""
    torch.manual_seed(0)
    vae = WanVAE(pretrain.VAEConfig(**pretrain.VAE))
    pretrain.quick_start(vae)
    still = torch.rand(1, 3, 1, 16, 16).mul(2).sub(1).expand(-1, -1, 5, -1, -1)
    with torch.no_grad():
        shown = vae.reconstruct(vae.moments(still)[0])
    assert shown.std() > 0.05 and (shown - shown[:, :, :1]).abs().max() < 1e-4


def test_labels_are_what_the_caption_says():
    case = world.sample(12)
    labels = pretrain.Look.labels(world.caption(case.source_scene))
    assert (labels[0] < 2).sum() == len(case.source_scene.things)
    for thing in case.source_scene.things:
        cell = world.PLACES.index(thing.places()[0])
        numbers = labels[:, cell].tolist()
        words = [words[number] for words, number in zip(pretrain.Look.words, numbers)]
        assert words == [thing.size, thing.color, thing.shape]


def test_words_know_their_phrase():
    """A color must not be the same wherever it stands, or nothing says which thing has it.

    What is not there is zero.
    """
    tokenizer = Tokenizer.from_file(str(Path(pretrain.HERE) / "mllm" / "tokenizer.json"))
    captions = [
        "a red star at the left, a blue circle at the top",
        "a red circle at the left, a blue star at the top",
    ]
    one, other = pretrain.caption_context(tokenizer, captions, 64)
    words = [tokenizer.encode(caption).tokens for caption in captions]
    red, left, comma = words[0].index("Ġred"), words[0].index("Ġleft"), words[0].index(",")
    assert words[1].index("Ġred") == red and not torch.allclose(one[red], other[red])
    assert not torch.allclose(one[left], other[left])
    assert one[: len(words[0])].abs().sum(dim=1).min() > 0 and not one[len(words[0]) :].any()
    same = pretrain.caption_context(tokenizer, [captions[0][: captions[0].index(",")]], 64)[0]
    # what another phrase says is no matter
    assert torch.allclose(one[:comma], same[:comma], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_decoder_leaves_latents_alone_and_refine_does_not(precision, few, tmp_path, monkeypatch):
    """What the DiT has learnt holds after the one, and has to be learnt again after the other."""
    run(monkeypatch, tmp_path, "vae", "--vae-steps", 1)
    video = pretrain.paint(np.random.default_rng(3), 2, video=True)
    latents, pictures = [], []
    for part in (None, "decoder", "refine"):
        if part:
            run(monkeypatch, tmp_path, part, f"--{part}-steps", 2, "--precision", precision)
        vae = WanVAE.from_pretrained(tmp_path / "vae")
        with torch.no_grad():
            latents.append(vae.encode(video))
            pictures.append(vae.decode(latents[0]))
    assert torch.equal(latents[0], latents[1]) and not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(latents[1], latents[2])
