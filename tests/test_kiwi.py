"""Kiwi-Edit and Wan2.2 against transformers, diffusers and code that is written out here.

`Libraries` is one edit of Kiwi-Edit put together from the reference libraries. The folder that it
writes has the layout of the published one, tiny and random. Each of our parts is compared with
its counterpart there, and edit.py from the terminal with all of it.
"""

import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_tokenizer
from PIL import Image, ImageOps, ImageSequence
from safetensors.torch import load_file, save_file

import connector
import dit as dit_module
import edit
import mllm
import train
import vae as vae_module
from connector import InstructX, locate
from dit import WanDiT, WanDiTConfig
from mllm import PRESETS, Qwen2_5_VL, Qwen2_5_VLConfig, VisionConfig
from vae import VAEConfig, WanVAE

TOLERANCE = 2e-5
SCRIPT = Path(edit.__file__)
MANIFESTS = Path(__file__).parent / "manifests"
KIWI_FILE = "diffusion_pytorch_model.safetensors"
INSTRUCTION = "Replace the car with an orange one."
SYSTEM = (
    "You will be given an image and instruction. Please describe the content of the image in "
    "detail based on instruction in your own words."
)
LATENTS, WIDTH, STATES = 6, 48, 64  # channels of latents, widths of DiT and Qwen
QUERIES = {"image": 4, "video": 6, "ref": 8}
VARIANTS = ("instruct-only", "reference-only", "instruct-reference")


def error(a, b):
    assert a.shape == b.shape and torch.isfinite(a).all()
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def randomize(model, generator):
    """Weights under which every term matters: gains are not 1, biases and tables not 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_gain = "gamma" in name or (p.ndim == 1 and "norm" in name and "bias" not in name)
            if "embed_tokens" in name:
                p.copy_(noise)
            elif p.ndim == 1 or is_gain or "table" in name:
                p.copy_(0.3 * noise + is_gain)
            else:
                p.copy_(noise * 1.2 / math.sqrt(p[0].numel()))
    return model.eval().requires_grad_(False)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0):
    """Smooth random pictures, so that scaling and levels matter; uint8 (..., H, W, 3)."""
    coarse = noise(*shape[:-3], 3, shape[-3] // 8, shape[-2] // 8, seed=seed)
    flat = coarse.reshape(-1, *coarse.shape[-3:])
    smooth = F.interpolate(flat, shape[-3:-1], mode="bilinear") * 60 + 128
    return smooth.clamp(0, 255).byte().movedim(1, -1).reshape(shape).numpy()


# Kiwi-Edit by the libraries.


def released_vae(diffusers, **changes):
    """diffusers' Wan2.2 VAE, tiny."""
    mean = [0.1 * i - 0.2 for i in range(LATENTS)]
    std = [0.8 + 0.1 * i for i in range(LATENTS)]
    settings = dict(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=LATENTS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
        latents_mean=mean,
        latents_std=std,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
    )
    return diffusers.AutoencoderKLWan(**settings | changes)


def released_qwen(hf, tokenizer):
    """transformers' Qwen2.5-VL, tiny, with the patches and the windows of the release."""
    ids = {
        f"{name}_token_id": tokenizer.token_to_id(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    vision = VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=STATES,
        fullatt_block_indexes=(1,),
    )
    config = dataclasses.replace(PRESETS["tiny"], vision_config=vision, **ids)
    make = hf.Qwen2_5_VLForConditionalGeneration._from_config
    return make(hf.Qwen2_5_VLConfig(**config.to_dict()), attn_implementation="eager"), config


class Libraries:
    """What Kiwi-Edit does with an edit, by transformers, diffusers and a few plain lines."""

    def __init__(self):
        hf, self.diffusers = pytest.importorskip("transformers"), pytest.importorskip("diffusers")
        if hf.__version__ != "4.49.0":
            pytest.skip("later versions place text after a clip elsewhere; 4.49.0 is the release")
        from transformers.models.qwen2_vl import image_processing_qwen2_vl

        self.images = image_processing_qwen2_vl
        random = torch.Generator().manual_seed(0)
        self.tokenizer = tiny_tokenizer()
        qwen, self.qwen_config = released_qwen(hf, self.tokenizer)
        self.qwen = randomize(qwen, random)
        self.vae = randomize(released_vae(self.diffusers), random)
        self.dit = randomize(
            self.diffusers.WanTransformer3DModel(
                num_attention_heads=3,
                attention_head_dim=16,
                in_channels=LATENTS,
                out_channels=LATENTS,
                text_dim=20,
                freq_dim=32,
                ffn_dim=80,
                num_layers=2,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=64,
            ),
            random,
        )
        shapes = {f"{name}_queries": (count, STATES) for name, count in QUERIES.items()}
        for name in ("connector", "ref_connector"):
            shapes |= {f"{name}.0.weight": (WIDTH, STATES), f"{name}.0.bias": (WIDTH,)}
            shapes |= {f"{name}.2.weight": (WIDTH, WIDTH), f"{name}.2.bias": (WIDTH,)}
        self.own = {
            name: noise(*shape, seed=i) / 4 for i, (name, shape) in enumerate(shapes.items())
        }
        self.embedders = {}
        for i, name in enumerate(("source", "ref")):
            conv = torch.nn.Conv3d(LATENTS, WIDTH, (1, 2, 2), (1, 2, 2))
            self.embedders[name] = randomize(conv, random)

    # The published folder.

    def write(self, folder, variant):
        """The layout of linyq/kiwi-edit-5b-*-diffusers."""
        has_reference = variant != "instruct-only"
        self.dit.save_pretrained(folder / "transformer")
        self.write_vae(folder / "vae")
        encoder, processor = folder / "mllm_encoder", folder / "processor"
        encoder.mkdir(), processor.mkdir()
        own = {n: t for n, t in self.own.items() if has_reference or not n.startswith("ref_")}
        save_file(own, encoder / KIWI_FILE)
        self.write_qwen(encoder)
        config = {
            "_class_name": "MLLMEncoder",
            "mllm_model_path": ".",
            "dit_dim": WIDTH,
            "hidden_size": STATES,
            "max_object_token": 768,
            "max_frames": 16,
            "max_pixels_per_frame": 262144,
        }
        config |= {f"num_{name}_queries": count for name, count in QUERIES.items()}
        write_json(encoder / "config.json", config)
        write_json(processor / "qwen_config.json", self.qwen_config.to_dict())
        self.tokenizer.save(str(processor / "tokenizer.json"))
        write_json(processor / "preprocessor_config.json", PREPROCESSOR)
        for name, conv in self.embedders.items():
            if name == "ref" and not has_reference:
                continue
            place = folder / f"{name}_embedder"
            place.mkdir()
            first = variant == "reference-only"
            write_json(place / "config.json", {"in_dim": LATENTS, "ref_pad_first": first})
            tensors = {f"patch_embedding.{n}": t for n, t in conv.state_dict().items()}
            save_file(tensors, place / KIWI_FILE)
        return folder

    def write_vae(self, folder):
        """Official names, and a config.json with keys of its own."""
        folder.mkdir(parents=True)
        c = self.vae.config
        config = {
            "_class_name": "VAE",
            "dim": c.base_dim,
            "decoder_base_dim": c.decoder_base_dim,
            "z_dim": c.z_dim,
            "latents_mean": c.latents_mean,
            "latents_std": c.latents_std,
            "vae_pth": KIWI_FILE,
        }
        write_json(folder / "config.json", config)
        save_file(official_vae(self.vae), folder / KIWI_FILE)

    def write_qwen(self, folder, prefix=lambda name: name):
        """Two shards and their index, without the tied head."""
        state = self.qwen.state_dict()
        names = [name for name in state if name != "lm_head.weight"]
        weight_map = {}
        for i, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-0000{i}-of-00002.safetensors"
            save_file({prefix(name): state[name].clone() for name in part}, folder / file)
            weight_map |= {prefix(name): file for name in part}
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})

    # The MLLM.

    def text(self, instruction, source_pads, reference_pads=""):
        """The prompt as Kiwi-Edit's template writes it, up to the queries."""
        if reference_pads:
            instruction += " Use the reference input from last frame."
            reference_pads = f"<|vision_start|>{reference_pads}<|vision_end|>"
        return (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
            f"<|im_start|>user\n<|vision_start|>{source_pads}<|vision_end|>{instruction}"
            f"{reference_pads}"
        )

    def size(self, frame, factor, least, most):
        """(width, height) by the release's own rule."""
        height, width = self.images.smart_resize(frame.height, frame.width, factor, least, most)
        return width, height

    def seen_frames(self, frames):
        """The frames of a clip as the MLLM sees them, [uint8 (H, W, 3)]."""
        count = min(16, len(frames))
        frames = [Image.fromarray(frames[round(i)]) for i in np.linspace(0, len(frames) - 1, count)]
        size = self.size(frames[0], 56, 12544, 262144)
        frames = [frame.resize(size, Image.BICUBIC) for frame in frames]
        if size[0] * size[1] < 100352:
            width, height = self.size(frames[0], 28, 100352, 262144)
            frames = [np.rint(plain_bicubic(frame, width, height)) for frame in frames]
        return [np.asarray(frame, np.uint8) for frame in frames]

    def inputs(self, frames, instruction, reference=None):
        """Ids up to the queries, patches and grids, by Qwen's own image processor."""
        image, video, pads = {}, {}, None
        if len(frames) == 1 and reference is None:
            image = self.patches(Image.fromarray(frames[0]), 12845056)
            pads = "<|image_pad|>" * (int(image["image_grid_thw"].prod()) // 4)
        else:
            processor = self.images.Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)
            seen = self.seen_frames(frames)
            video = dict(processor(images=None, videos=[seen], return_tensors="pt"))
            pads = "<|video_pad|>" * (int(video["video_grid_thw"].prod()) // 4)
        reference_pads = ""
        if reference is not None:
            image = self.patches(Image.fromarray(reference), 602112)
            reference_pads = "<|image_pad|>" * (int(image["image_grid_thw"].prod()) // 4)
        text = self.text(instruction, pads, reference_pads)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor([ids]), {**image, **video}

    def patches(self, picture, most):
        processor = self.images.Qwen2VLImageProcessor(min_pixels=3136, max_pixels=most)
        return dict(processor(images=[picture], return_tensors="pt"))

    def states(self, ids, pictures, queries):
        """All hidden states: the prompt, the queries, and the two tokens that end the turn."""
        end = self.tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
        assert len(end) == 2
        x = self.qwen.model.embed_tokens(ids)
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if name in pictures:
                seen = self.qwen.visual(pictures[name], grid_thw=pictures[f"{kind}_grid_thw"])
                where = ids == getattr(self.qwen_config, f"{kind}_token_id")
                x = x.masked_scatter(where[..., None], seen)
        x = torch.cat([x, queries[None], self.qwen.model.embed_tokens(torch.tensor([end]))], dim=1)
        text_token = self.tokenizer.encode("a").ids[0]
        longer = F.pad(ids, (0, len(queries) + 2), value=text_token)
        grids = {key: pictures.get(key) for key in ("image_grid_thw", "video_grid_thw")}
        seconds = [1.0] if "video_grid_thw" in pictures else None  # two frames, at 2 in a second
        positions, _ = self.qwen.get_rope_index(longer, **grids, second_per_grid_ts=seconds)
        return self.qwen.model(inputs_embeds=x, position_ids=positions).last_hidden_state

    def connected(self, states, name="connector"):
        hidden = F.linear(states, self.own[f"{name}.0.weight"], self.own[f"{name}.0.bias"])
        hidden = F.gelu(hidden, approximate="tanh")
        return F.linear(hidden, self.own[f"{name}.2.weight"], self.own[f"{name}.2.bias"])

    def context(self, frames, instruction, reference=None):
        ids, pictures = self.inputs(frames, instruction, reference)
        name = "image" if len(frames) == 1 else "video"
        queries = self.own[f"{'ref' if reference is not None else name}_queries"]
        states = self.states(ids, pictures, queries)
        context = self.connected(states[:, -len(queries) :])
        if reference is not None:
            row = ids[0].tolist()
            last = len(row) - 1 - row[::-1].index(self.tokenizer.token_to_id("<|vision_start|>"))
            end = last + row[last:].index(self.tokenizer.token_to_id("<|vision_end|>"))
            seen = self.connected(states[:, last + 1 : end], "ref_connector")
            context = torch.cat([seen, context], dim=1)
        return context

    # The DiT and the VAE.

    def velocity(self, z, sigma, context, source=None, reference=None, first=False):
        """The reference is one more frame of z, whose embedding a hook replaces."""
        x = z
        if reference is not None:
            x = torch.cat([reference, z] if first else [z, reference], dim=2)
        start = int(first and reference is not None)
        frames = slice(start, start + z.shape[2])

        def embed(module, inputs, output):
            output = output.clone()
            if source is not None:
                scale = sigma.view(-1, 1, 1, 1, 1)
                output[:, :, frames] += scale * self.embedders["source"](source)
            if reference is not None:
                place = slice(0, 1) if first else slice(-1, None)
                output[:, :, place] = self.embedders["ref"](reference)
            return output

        text_embedder = self.dit.condition_embedder.text_embedder
        self.dit.condition_embedder.text_embedder = torch.nn.Identity()
        hook = self.dit.patch_embedding.register_forward_hook(embed)
        try:
            output = self.dit(x, 1000 * sigma, context, return_dict=False)[0]
        finally:
            hook.remove()
            self.dit.condition_embedder.text_embedder = text_embedder
        return output[:, :, frames]

    def statistics(self):
        shape = (1, -1, 1, 1, 1)
        config = self.vae.config
        return [torch.tensor(x).view(shape) for x in (config.latents_mean, config.latents_std)]

    def encode(self, frames):
        """uint8 (T, H, W, 3) -> latents"""
        video = torch.tensor(frames).movedim(-1, 0)[None] / 127.5 - 1
        mean, std = self.statistics()
        return (self.vae.encode(video).latent_dist.mode() - mean) / std

    def decode(self, z):
        mean, std = self.statistics()
        video = self.vae.decode(z * std + mean).sample
        return ((video[0] + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).numpy()

    # An edit.

    @torch.no_grad()
    def edit(self, frames, instruction, reference=None, first=False, steps=2, seed=0):
        """uint8 (T, H, W, 3), sides in multiples of 32 -> the same."""
        context, source, framed = self.context(frames, instruction, reference), None, None
        source = self.encode(frames)
        if reference is not None:
            size = frames.shape[2], frames.shape[1]
            padded = ImageOps.pad(
                Image.fromarray(reference), size, Image.BICUBIC, color=(255, 255, 255)
            )
            framed = self.encode(np.asarray(padded)[None])
        z = noise(*source.shape, seed=seed)
        even = [0.999 * (steps - i) / steps for i in range(steps)]
        sigmas = [5 * sigma / (1 + 4 * sigma) for sigma in even] + [0.0]
        for now, after in zip(sigmas, sigmas[1:]):
            sigma = torch.tensor([now])
            z = z + (after - now) * self.velocity(z, sigma, context, source, framed, first)
        return self.decode(z)


PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_json(file, content):
    file.write_text(json.dumps(content))


def official_vae(model):
    """The tensors of diffusers' VAE under the official names, by the map that is under test."""
    config = VAEConfig(
        num_res_blocks=model.config.num_res_blocks, stage_shortcuts=model.config.is_residual
    )
    tensors = vae_module.official_names(model.state_dict(), config)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def plain_bicubic(frame, width, height):
    """Keys' cubic with a = -0.5 as sums in float64, not rounded yet; scales up only."""
    x = np.asarray(frame).astype(np.float64)
    for axis, length in enumerate((height, width)):
        x = np.moveaxis(x, axis, 0)
        scale, rows = len(x) / length, []
        assert scale <= 1
        for i in range(length):
            center, total, weights = (i + 0.5) * scale - 0.5, 0.0, 0.0
            for j in range(math.floor(center) - 1, math.floor(center) + 3):
                d = abs(center - j)
                near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
                weight = near if d < 1 else far
                if 0 <= j < len(x):
                    total, weights = total + weight * x[j], weights + weight
            rows.append(total / weights)
        x = np.moveaxis(np.stack(rows), 0, axis)
    return x.clip(0, 255)


@pytest.fixture(scope="module")
def libraries():
    return Libraries()


@pytest.fixture(scope="module")
def weights(libraries, tmp_path_factory):
    """{variant: folder in the published layout}"""
    top = tmp_path_factory.mktemp("kiwi")
    return {variant: libraries.write(top / variant, variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def model(weights):
    return InstructX.from_pretrained(weights["instruct-reference"])


IMAGE = pixels(1, 64, 96, 3)
CLIP = pixels(9, 64, 96, 3, seed=1)
REFERENCE = pixels(40, 56, 3, seed=2)


# The VAE of Wan2.2.


@pytest.fixture(scope="module")
def vaes(libraries, tmp_path_factory):
    """{names: our VAE, loaded from such a file}"""
    folder = tmp_path_factory.mktemp("vae")
    libraries.write_vae(folder / "kiwi")
    libraries.vae.save_pretrained(folder / "diffusers")
    return {name: WanVAE.from_pretrained(folder / name) for name in ("kiwi", "diffusers")}


@pytest.mark.parametrize("names", ["kiwi", "diffusers"])
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_vae_equals_diffusers(names, frames, vaes, libraries):
    """A shortcut that reads channels in another order, or a first frame that is doubled."""
    video = noise(2, 3, frames, 32, 48, seed=frames).clamp(-2, 2) / 2
    mean, std = libraries.statistics()
    with torch.no_grad():
        z = (libraries.vae.encode(video).latent_dist.mode() - mean) / std
        expected = libraries.vae.decode(z * std + mean).sample
    assert z.shape == (2, LATENTS, (frames + 3) // 4, 2, 3)
    for chunk in (1, 2, 3, 100):
        assert error(vaes[names].encode(video, chunk=chunk), z) < TOLERANCE
        assert error(vaes[names].decode(z, chunk=chunk), expected) < TOLERANCE


@pytest.mark.parametrize("frames", [1, 9])
def test_other_sizes_of_the_vae_equal_diffusers(frames, libraries, tmp_path):
    """In the released sizes the copies of a frame are alike, so that their order is not seen."""
    sizes = dict(num_res_blocks=1, temperal_downsample=[True, False, True])
    theirs = released_vae(libraries.diffusers, **sizes)
    randomize(theirs, torch.Generator().manual_seed(2)).save_pretrained(tmp_path)
    ours, (mean, std) = WanVAE.from_pretrained(tmp_path), libraries.statistics()
    video = noise(1, 3, frames, 32, 48).clamp(-1, 1)
    with torch.no_grad():
        z = (theirs.encode(video).latent_dist.mode() - mean) / std
        expected = theirs.decode(z * std + mean).sample
    for chunk in (1, 2):
        assert error(ours.encode(video, chunk=chunk), z) < TOLERANCE
        assert error(ours.decode(z, chunk=chunk), expected) < TOLERANCE


def test_tiles_of_the_vae_are_those_of_diffusers(libraries):
    """Strides are 16 here: tiles cut by Wan2.1's 8 would shift or blend wrongly."""
    ours = WanVAE(VAEConfig(**vae_settings(libraries.vae)))
    ours.load_state_dict(official_vae(libraries.vae))
    connector.tile(ours, 64)
    video, (mean, std) = noise(1, 3, 5, 64, 96).clamp(-1, 1), libraries.statistics()
    with torch.no_grad():
        tiles = [
            libraries.vae.encode(video[..., left : left + 64]).latent_dist.mode()
            for left in (0, 32)
        ]
        z = torch.zeros(1, LATENTS, 2, 4, 6)
        z[..., :4] += tiles[0]
        z[..., 2:] += tiles[1]
        z[..., 2:4] /= 2  # both tiles see these
        z = (z - mean) / std
        tiles = [
            libraries.vae.decode((z * std + mean)[..., left : left + 4]).sample for left in (0, 2)
        ]
    ramp = (torch.arange(64) + 1).clamp(max=16) / 16  # over a quarter of a tile
    fade = torch.minimum(ramp, ramp.flip(0))
    total, weight = torch.zeros(1, 3, 5, 64, 96), torch.zeros(96)
    for left, tile in zip((0, 32), tiles):
        total[..., left : left + 64] += tile * fade
        weight[left : left + 64] += fade
    assert error(ours.encode(video), z) < TOLERANCE
    assert error(ours.decode(z), total / weight) < TOLERANCE


def vae_settings(model):
    c = model.config
    return dict(
        dim=c.base_dim,
        decoder_dim=c.decoder_base_dim,
        z_dim=c.z_dim,
        patch=2,
        stage_shortcuts=True,
        latents_mean=tuple(c.latents_mean),
        latents_std=tuple(c.latents_std),
    )


def test_a_vae_that_is_saved_is_the_same(vaes, tmp_path):
    """A field that save_pretrained forgets, such as the decoder's width."""
    vaes["kiwi"].save_pretrained(tmp_path)
    again, z = WanVAE.from_pretrained(tmp_path), noise(1, LATENTS, 2, 2, 2)
    assert again.config == vaes["kiwi"].config and torch.equal(
        again.decode(z), vaes["kiwi"].decode(z)
    )


def test_diffusers_reads_the_config_that_we_save(vaes, libraries, tmp_path):
    """Others should load what training an autoencoder writes."""
    vaes["kiwi"].save_pretrained(tmp_path)
    theirs = libraries.diffusers.AutoencoderKLWan.load_config(tmp_path)
    for key, value in libraries.vae.config.items():
        known = key in theirs and not key.startswith("_")
        assert not known or theirs[key] in (value, list(np.atleast_1d(value))), key


# The DiT.


def our_dit(libraries, first=False):
    flags = dict(
        source_embedding=True,
        source_bias=True,
        source_scaled=True,
        reference_embedding=True,
        references_first=first,
        text_dim=0,
    )
    config = WanDiTConfig(
        dim=WIDTH,
        ffn_dim=80,
        num_heads=3,
        num_layers=2,
        in_dim=LATENTS,
        out_dim=LATENTS,
        freq_dim=32,
        **flags,
    )
    dit = WanDiT(config)
    tensors = {dit_module.official_name(n): t for n, t in libraries.dit.state_dict().items()}
    tensors = {n: t for n, t in tensors.items() if not n.startswith("text_embedding.")}
    for name, place in (("source", "source_embedding"), ("ref", "reference_embedding")):
        tensors |= {f"{place}.{n}": t for n, t in libraries.embedders[name].state_dict().items()}
    dit.load_state_dict(tensors)
    return dit.requires_grad_(False)


@pytest.mark.parametrize("seen", ["nothing", "source", "reference last", "reference first"])
def test_the_dit_equals_diffusers(seen, libraries):
    """σ on the wrong term, a bias that is not scaled, a position of the reference off by one."""
    z, source, reference = noise(2, 6, 3, 4, 6), noise(2, 6, 3, 4, 6, seed=1), noise(2, 6, 1, 4, 6)
    sigma, context = torch.tensor([0.83, 0.21]), noise(2, 7, WIDTH, seed=3)
    first = seen == "reference first"
    source = None if seen == "nothing" else source
    reference = reference if "reference" in seen else None
    with torch.no_grad():
        expected = libraries.velocity(z, sigma, context, source, reference, first)
        velocity = our_dit(libraries, first)(
            z, 1000 * sigma, context, source, [] if reference is None else [reference]
        )
    assert error(velocity, expected) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_loads_as_the_parts_it_holds(variant, weights, libraries):
    """A tensor that goes to another place, or a variant that is taken for another one."""
    model = InstructX.from_pretrained(weights[variant])
    first, has_reference = variant == "reference-only", variant != "instruct-only"
    expected = our_dit(libraries, first).state_dict()
    if not has_reference:
        expected = {n: t for n, t in expected.items() if not n.startswith("reference_")}
    state = model.dit.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert model.dit.config.references_first == first and model.dit.config.source_scaled
    assert model.trained and model.config.max_references == int(has_reference)
    assert model.config.guidance == 1 and model.config.steps == 50 and model.config.shift == 5
    names = {"image_queries", "video_queries", "ref_queries"}
    names = names if has_reference else names - {"ref_queries"}
    own = model.connector.state_dict()
    for name in names:
        assert torch.equal(own[name.replace("ref_", "reference_")], libraries.own[name])


# What the MLLM sees.


@pytest.mark.parametrize("size", [(64, 96), (80, 56), (720, 1280), (232, 408)])
def test_frames_are_scaled_twice(size, model, libraries):
    """Multiples of 56 by Pillow, then small ones again by torch: the weights were trained so."""
    frames = pixels(2, *size, 3)
    ours = model.prompt(frames, INSTRUCTION, fps=12.0)
    _, theirs = libraries.inputs(frames, INSTRUCTION)
    assert ours["video_grid_thw"].tolist() == theirs["video_grid_thw"].tolist()
    if size == (720, 1280):
        assert ours["video_grid_thw"].tolist() == [[1, 24, 48]]  # 336x672 pixels
    assert_levels(ours["pixel_values_videos"], theirs["pixel_values_videos"])


def assert_levels(ours, theirs):
    """Equal pixels, but for a few where float32 rounds a tie to the other of two levels."""
    assert ours.shape == theirs.shape
    gap = (ours.float() - theirs.float()).abs()
    assert gap.max() < 1.01 / 255 / 0.26 and (gap > 1e-5).float().mean() < 5e-3


def test_the_second_scaling_is_a_plain_cubic():
    """Pillow's integer weights would differ by a level here and there, and not at ties alone."""
    frame = Image.fromarray(pixels(56, 112, 3))
    exact = plain_bicubic(frame, 420, 252)
    ours = np.asarray(mllm.resize_by_torch(frame, 252, 420))
    is_tie = np.abs(exact % 1 - 0.5) < 1e-3
    assert is_tie.mean() < 0.05 and np.array_equal(ours[~is_tie], np.rint(exact)[~is_tie])


CASES = {
    "image": (IMAGE, None),
    "clip": (CLIP, None),
    "long clip": (pixels(21, 64, 64, 3, seed=4), None),
    "clip and reference": (CLIP, REFERENCE),
    "image and reference": (IMAGE, REFERENCE),
}


@pytest.mark.parametrize("case", CASES)
def test_prompt_and_context_equal_the_libraries(case, model, libraries):
    """Order of the prompt, its words, sizes of pictures, the two tokens, which states are kept."""
    frames, reference = CASES[case]
    references = [] if reference is None else [reference]
    with torch.no_grad():
        inputs = model.prompt(frames, INSTRUCTION, references, fps=30.0)
        context = model.context(inputs, len(frames) > 1)
        ids, pictures = libraries.inputs(frames, INSTRUCTION, reference)
        expected = libraries.context(frames, INSTRUCTION, reference)
    assert torch.equal(inputs["input_ids"], ids)
    for name, value in pictures.items():
        if "grid" in name:
            assert torch.equal(inputs[name], value)
        else:
            assert_levels(inputs[name], value)
    # With the libraries' own pixels, so that rounding a tie elsewhere does not count.
    with torch.no_grad():
        context = model.context({**inputs, **pictures}, len(frames) > 1)
    assert error(context, expected) < TOLERANCE


@pytest.mark.parametrize("names", ["official", "newer"])
def test_names_of_the_mllm(names, weights, libraries, tmp_path):
    """The published prefixes are not known for sure: both must be read."""

    def prefix(name):
        if names == "official":
            return name
        return f"model.{name}" if name.startswith("visual.") else f"model.language_{name}"

    folder = copy_without(weights["instruct-only"], tmp_path / "kiwi", "mllm_encoder")
    encoder = folder / "mllm_encoder"
    encoder.mkdir()
    for name in (KIWI_FILE, "config.json"):
        shutil.copy(weights["instruct-only"] / "mllm_encoder" / name, encoder)
    libraries.write_qwen(encoder, prefix)
    model = InstructX.from_pretrained(folder)
    expected = libraries.qwen.state_dict()
    for name, tensor in model.mllm.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# Edits from the terminal.


def write_clip(file, frames):
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=125)
    return file


def read_all(file):
    with Image.open(file) as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    return np.stack(frames)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(IMAGE[0]).save(folder / "photo.png")
    Image.fromarray(REFERENCE).save(folder / "hat.png")
    write_clip(folder / "clip.png", CLIP)
    return folder


def run(*words):
    command = [sys.executable, SCRIPT, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "variant, case",
    [
        ("instruct-only", "image"),
        ("instruct-only", "clip"),
        ("instruct-reference", "image and reference"),
        ("instruct-reference", "clip and reference"),
        ("reference-only", "clip and reference"),
    ],
)
def test_edits_equal_the_libraries(variant, case, weights, media, libraries, tmp_path):
    """All of it: any rule that is broken on the way shows in the pixels."""
    frames, reference = CASES[case]
    source = media / ("clip.png" if len(frames) > 1 else "photo.png")
    words = [] if reference is None else ["--ref", media / "hat.png"]
    settings = ["--weights", weights[variant], "--steps", 2, "--seed", 5]
    done = run(source, INSTRUCTION, "-o", tmp_path / "out.png", *settings, *words)
    assert done.returncode == 0, done.stderr
    first = variant == "reference-only"
    expected = libraries.edit(frames, INSTRUCTION, reference, first, steps=2, seed=5)
    result = read_all(tmp_path / "out.png")
    assert result.shape == frames.shape
    assert np.abs(result.astype(int) - expected).max() <= 1
    assert np.abs(result.astype(int) - frames).mean() > 5  # something was edited


def refused(words, capsys):
    """The one line on stderr of an edit that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        edit.main([*map(str, words)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_a_reference_that_the_weights_cannot_take(weights, media, tmp_path, capsys):
    """An edit that forgets the hat without a word."""
    words = [media / "photo.png", INSTRUCTION, "-o", tmp_path / "out.png", "--steps", 1]
    words += ["--weights", weights["instruct-only"], "--ref", media / "hat.png"]
    assert "these weights take at most 0" in refused(words, capsys)
    words[-3] = weights["instruct-reference"]
    words += ["--ref", media / "hat.png"]
    assert "these weights take at most 1" in refused(words, capsys)
    assert not list(tmp_path.iterdir())


def copy_without(folder, copy, part):
    """A copy of a folder, by links, in which one part is missing."""
    for file in folder.rglob("*"):
        relative = file.relative_to(folder)
        if file.is_file() and not str(relative).startswith(part):
            (copy / relative).parent.mkdir(parents=True, exist_ok=True)
            (copy / relative).symlink_to(file)
    return copy


@pytest.mark.parametrize(
    "part, named",
    [
        ("transformer", "the DiT"),
        ("vae", "Wan's VAE"),
        ("mllm_encoder", "Qwen2.5-VL"),
        (f"mllm_encoder/{KIWI_FILE}", "queries"),
        ("mllm_encoder/model-00002", "model-00002-of-00002.safetensors"),
        ("processor", "qwen_config.json"),
        ("processor/qwen_config.json", "which Qwen2.5-VL"),
        ("processor/tokenizer.json", "tokenizer.json"),
        ("source_embedder", "source_embedder"),
        ("ref_embedder", "ref_embedder"),
    ],
)
def test_a_part_that_is_missing_is_named(part, named, weights, media, tmp_path, capsys):
    """A download that broke off: a traceback, or a model that is random where the file is not."""
    folder = copy_without(weights["instruct-reference"], tmp_path / "kiwi", part)
    words = [media / "photo.png", INSTRUCTION, "-o", tmp_path / "out.png", "--steps", 1]
    assert named in refused([*words, "--weights", folder], capsys)
    assert not (tmp_path / "out.png").exists()


def test_guidance_is_remarked_on(weights, media, tmp_path, capsys):
    """These weights never saw an empty instruction; a user should not tune in vain."""
    words = [media / "photo.png", INSTRUCTION, "-o", tmp_path / "out.png", "--steps", 1]
    words = [*map(str, words), "--weights", str(weights["instruct-only"])]
    edit.main(words)
    assert "guidance" not in capsys.readouterr().err
    plain = read_all(tmp_path / "out.png")
    edit.main([*words, "--guidance", "3"])
    assert "never saw an empty instruction" in capsys.readouterr().err
    assert (read_all(tmp_path / "out.png") != plain).any()


def test_large_pictures_are_edited_at_the_trained_size(weights, tmp_path, capsys):
    """Padding, or more pixels than 720p, were never seen in training; the result keeps its size."""
    Image.fromarray(pixels(1, 72, 96, 3)[0]).resize((1400, 800)).save(tmp_path / "large.png")
    words = [tmp_path / "large.png", INSTRUCTION, "-o", tmp_path / "out.png", "--steps", 1]
    words += ["--weights", weights["instruct-only"]]
    edit.main([*map(str, words), "--area", "2048"])  # the same way, without the work of 720p
    assert "scaled back to 1400x800" in capsys.readouterr().err
    assert read_all(tmp_path / "out.png").shape == (1, 800, 1400, 3)
    args = edit.parse([*map(str, words)])
    assert edit.trained_area(args) == 1280 * 720
    width, height = edit.working_size(1400, 800, edit.trained_area(args))
    assert width % 32 == height % 32 == 0 and 0.9 * 921600 < width * height <= 921600


@pytest.mark.parametrize("machine", ["--offload", "--quantize"])
def test_machines_work_with_kiwi(machine, weights, media, tmp_path):
    """Blocks are read from transformer/ and mllm_encoder/, whose names are not ours."""
    words = [media / "photo.png", INSTRUCTION, "-o", tmp_path / "out.png", "--steps", 2]
    words = [*map(str, words), "--weights", str(weights["instruct-only"])]
    edit.main(words)
    expected = read_all(tmp_path / "out.png").astype(int)
    edit.main([*words, machine, *(["int8"] if machine == "--quantize" else [])])
    gap = np.abs(read_all(tmp_path / "out.png") - expected)
    assert gap.max() == 0 if machine == "--offload" else 0 < gap.mean() < 12


# Training goes on from it.


def write_csv(folder, count=3):
    """Kiwi-Edit's own table: images, the first of them with a reference."""
    rows = []
    for i in range(count):
        for name in ("source", "target", "reference"):
            Image.fromarray(pixels(32, 32, 3, seed=10 * i + len(name))).save(
                folder / f"{name}{i}.png"
            )
        row = {
            "src_video": f"source{i}.png",
            "tgt_video": f"target{i}.png",
            "prompt": "make it red",
        }
        rows.append({**row, "ref_image": "" if i else "reference0.png"})
    with (folder / "data.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "data.csv"


def test_training_goes_on_from_kiwi(weights, media, tmp_path):
    """A run that loses the reference's embedding, σ or the words of the prompt on the way.

    Two steps of rate 0 must change no pixel, so all that an edit needs is in what they write.
    """
    base = weights["instruct-reference"]

    def trained(stage, rate, *more):
        out = tmp_path / f"stage{stage}"
        words = ["--stage", stage, "--data", write_csv(tmp_path), "--weights", base, "--out", out]
        words += ["--steps", 2, "--image-batch", 2, "--warmup", 0, "--lr", rate, *more]
        assert train.main([*map(str, words)]) == 0
        return out / "instructx"

    def edited(*more):
        words = [media / "photo.png", INSTRUCTION, "-o", tmp_path / "out.png", "--steps", 2]
        words += ["--ref", media / "hat.png", "--weights", base, *more]
        edit.main([*map(str, words)])
        return read_all(tmp_path / "out.png").astype(int)

    before = edited()
    second = trained(2, 0, "--dit-lora", 2)
    assert np.array_equal(edited("--instructx", second), before)
    third = trained(3, 1e-2, "--start", second)
    assert 0.05 < np.abs(edited("--instructx", third) - before).mean() < 100
    published = load_file(base / "ref_embedder" / KIWI_FILE)
    for folder, moved in ((second, False), (third, True)):
        tensors = load_file(folder / "dit" / "model.safetensors")
        kept = tensors["reference_embedding.bias"]
        assert torch.equal(kept, published["patch_embedding.bias"]) != moved


def test_stage_1_goes_on_from_kiwi(weights, media, tmp_path):
    """Stage 1 writes no DiT: the published one must still come with its embeddings."""
    base = weights["instruct-only"]
    words = ["--stage", 1, "--data", write_csv(tmp_path), "--weights", base, "--lr", 0]
    words += ["--out", tmp_path / "run", "--steps", 1, "--image-batch", 1]
    assert train.main([*map(str, words)]) == 0
    frames = pixels(1, 32, 32, 3)
    before = InstructX.from_pretrained(base).edit(frames, INSTRUCTION, steps=1)
    after = InstructX.from_pretrained(base, instructx=tmp_path / "run" / "instructx")
    assert np.array_equal(after.edit(frames, INSTRUCTION, steps=1), before)


# Names and shapes of the released files, and the layouts that users have.


def manifest(file, name):
    """({name: shape}, parameters) of a released file."""
    entry = json.loads((MANIFESTS / file).read_text())[name]
    shapes = dict(entry["tensors"])
    for layer in entry["layers"]:
        for i in range(layer["count"]):
            prefix = layer["prefix"].format(i)
            shapes |= {prefix + key: shape for key, shape in layer["tensors"].items()}
    return shapes, entry["parameters"]


def shapes_of(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def test_names_and_shapes_of_wan2_2():
    """The released files cannot be downloaded here; their names and shapes are known."""
    with torch.device("meta"):
        dit, vae = WanDiT(dit_module.PRESETS["5B"]), WanVAE(vae_module.PRESETS["wan2.2"])
    file = "wan2.2_ti2v_5b.json"
    for part, module in (("dit", dit), ("vae", vae)):
        official, parameters = manifest(file, f"{part}, official")
        diffusers, _ = manifest(file, f"{part}, diffusers")
        assert shapes_of(module) == official and len(diffusers) == len(official)
        assert sum(p.numel() for p in module.parameters()) == parameters
        if part == "dit":
            renamed = {dit_module.official_name(n): shape for n, shape in diffusers.items()}
        else:
            renamed = vae_module.official_names(diffusers, vae.config)
        assert renamed == official


def test_names_and_shapes_of_kiwi_edit():
    """Its own tensors, by the names that loading gives them."""
    with torch.device("meta"):
        config = connector.InstructXConfig(
            mllm_dim=2048, hidden_dim=3072, context_dim=3072, reference_queries=768
        )
        ours = shapes_of(connector.Connector(config))
        embedding = shapes_of(dit_module.PatchEmbedding(dit_module.PRESETS["5B"]))
    file, renamed = "kiwi_edit_5b.json", {}
    for name, shape in manifest(file, "mllm_encoder")[0].items():
        place, _, rest = name.partition(".")
        place = {"connector": "mlp", "ref_connector": "reference_mlp"}.get(place, place)
        renamed[f"{place}.{rest}" if rest else place.replace("ref_", "reference_")] = shape
    assert renamed == ours
    for name in ("source_embedder", "ref_embedder"):
        expected = {f"patch_embedding.{key}": shape for key, shape in embedding.items()}
        assert manifest(file, name)[0] == expected


def test_the_official_folder_of_wan2_2(libraries, tmp_path):
    """Wan2.2_VAE.pth lies beside the shards of the DiT and shares its config.json."""
    folder = tmp_path / "Wan2.2-TI2V-5B"
    write_tiny_wan(folder)
    write_full_vae(folder / "Wan2.2_VAE.pth")
    write_tiny_qwen(tmp_path / "Qwen2.5-VL-3B-Instruct", libraries)
    folders = locate(tmp_path)
    assert folders["dit"] == folder and folders["vae"] == folder / "Wan2.2_VAE.pth"
    model = InstructX.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.vae.config == vae_module.PRESETS["wan2.2"] and not model.trained
    assert model.dit.config == dataclasses.replace(
        dit_module.PRESETS["5B"], dim=WIDTH, ffn_dim=80, freq_dim=32, num_heads=3, num_layers=2
    )
    assert model.multiple() == 32


@pytest.mark.parametrize("config", [None, {"_class_name": "VAE", "dim": 160, "z_dim": 48}])
def test_the_config_of_the_vae_may_say_little(config, libraries, tmp_path):
    """The published config.json is not known for sure: what it leaves out is as released."""
    write_tiny_wan(tmp_path / "dit")
    write_tiny_qwen(tmp_path / "mllm", libraries)
    (tmp_path / "vae").mkdir()
    write_full_vae(tmp_path / "vae" / "Wan2.2_VAE.pth")
    if config:
        write_json(tmp_path / "vae" / "config.json", config)
    assert InstructX.from_pretrained(tmp_path).vae.config == vae_module.PRESETS["wan2.2"]


EXPORTS = json.loads((MANIFESTS / "qwen2.5_vl_tiny.json").read_text())


def with_unknown(config):
    """The same with a setting that nobody knows, on every level."""
    nested = {key: with_unknown(value) for key, value in config.items() if isinstance(value, dict)}
    return {**config, **nested, "made_up": True}


@pytest.mark.parametrize("release", [name for name in EXPORTS if name != "note"])
@pytest.mark.parametrize("unknown", [False, True])
def test_configs_of_later_transformers(release, unknown, tmp_path):
    """5.x moved theta and sections into rope_parameters, and gave the vision tower its own."""
    config = with_unknown(EXPORTS[release]) if unknown else EXPORTS[release]
    model = randomize(Qwen2_5_VL(PRESETS["tiny"]), torch.Generator().manual_seed(1))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", config)
    read = Qwen2_5_VL.from_pretrained(tmp_path)
    assert read.config == dataclasses.replace(
        PRESETS["tiny"],
        vision_start_token_id=config["vision_start_token_id"],
        vision_end_token_id=config["vision_end_token_id"],
    )
    assert all(torch.equal(read.state_dict()[n], t) for n, t in model.state_dict().items())


def test_a_folder_that_transformers_saves(libraries, tmp_path):
    """By the release that is installed: names of tensors and of settings change between them."""
    libraries.qwen.save_pretrained(tmp_path)
    read = Qwen2_5_VL.from_pretrained(tmp_path)
    assert read.config == libraries.qwen_config
    expected = libraries.qwen.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state_dict().items())


def test_whole_numbers_are_saved_as_such():
    """transformers 5.24 refuses a config.json with 2.0 tokens per second."""
    raw = Qwen2_5_VLConfig().to_dict()["vision_config"]
    assert raw["tokens_per_second"] == 2 and isinstance(raw["tokens_per_second"], int)
    half = VisionConfig(tokens_per_second=2.5)
    config = Qwen2_5_VLConfig(vision_config=half).to_dict()
    assert config["vision_config"]["tokens_per_second"] == 2.5


@pytest.mark.parametrize("part", ["transformer", "vae", "mllm_encoder", "source_embedder"])
def test_settings_that_nobody_knows(part, weights, tmp_path):
    """A later export writes one more key, and an edit that needs none of it ends."""
    folder = copy_without(weights["instruct-only"], tmp_path / "kiwi", f"{part}/config.json")
    config = json.loads((weights["instruct-only"] / part / "config.json").read_text())
    write_json(folder / part / "config.json", with_unknown(config))
    model, plain = map(InstructX.from_pretrained, (folder, weights["instruct-only"]))
    for ours, theirs in ((model, plain), (model.dit, plain.dit), (model.vae, plain.vae)):
        assert ours.config == theirs.config


def write_tiny_wan(folder):
    """A DiT in the layout of Wan2.2-TI2V-5B: three shards and an index, but few weights."""
    folder.mkdir()
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": WIDTH,
        "eps": 1e-06,
        "ffn_dim": 80,
        "freq_dim": 32,
        "in_dim": 48,
        "model_type": "ti2v",
        "num_heads": 3,
        "num_layers": 2,
        "out_dim": 48,
        "text_len": 512,
    }
    write_json(folder / "config.json", config)
    tensors = WanDiT(dit_module.read_config(folder)).state_dict()
    weight_map, names = {}, sorted(tensors)
    for i in range(3):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[i::3]}, folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    write_json(index, {"weight_map": weight_map})


def write_full_vae(file):
    """The released shapes in a small file: every tensor is one zero, seen many times."""
    shapes, _ = manifest("wan2.2_ti2v_5b.json", "vae, official")
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, file)


def write_tiny_qwen(folder, libraries):
    folder.mkdir()
    libraries.write_qwen(folder)
    write_json(folder / "config.json", libraries.qwen_config.to_dict())
    libraries.tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
