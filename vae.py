"""WanVAE: the 3D causal autoencoder of Wan2.1, video to latents and back.

It turns (B, 3, T, H, W) video in [-1, 1] into (B, 16, F, h, w) latents: 8 times smaller in height and width, 4 times in
time. Time runs one way. Two rules say everything, and the official code (wan/modules/vae.py of Wan2.1) and diffusers
(AutoencoderKLWan) compute the same two behind their feature caches:

  1. every convolution over time sees only the past; before the clip the past is zeros;
  2. frame 0 is special: temporal downsampling keeps it and halves the rest, temporal upsampling keeps it and doubles
     the rest. So T = 4n + 1 frames make F = n + 1 latent frames, and an image is simply a clip with T = 1.

Unusual here: a clip is never processed whole. Frame 0 goes through alone, then `chunk` latent frames at a time; each
convolution remembers its own last two frames in a dict keyed by itself. The result equals the whole clip at once, and
memory no longer grows with T (one 96-channel float32 map of 81 x 480 x 832 alone would be 12.4 GB).

Letters: B batch, C channels, T frames, F latent frames = 1 + (T-1)/4, H W pixels, h w = H/8 W/8 latent pixels.
Precision: everything runs in the weights' dtype (input is cast to it, output has it); only norms go through float32.

    python vae.py [clip.mp4 [roundtrip.mp4]] [--weights Wan2.1_VAE.pth]     # what survives the round trip
"""

import argparse
import dataclasses
import json
import math
import os
import re
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    """The released Wan2.1 VAE. Each entry of `dim_mult` is one resolution; between two of them height and width halve,
    and time too where `temporal_downsample` says so. `latents_*` are statistics of the posterior mean, per channel."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                                       0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
    latents_std: tuple[float, ...] = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                                      3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

    def __post_init__(self):
        for field in dataclasses.fields(self):  # JSON has lists; a config must be hashable and comparable
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, tuple(value) if isinstance(value, list) else value)
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(f"temporal_downsample needs one entry fewer than dim_mult: {len(self.dim_mult) - 1}, "
                             f"not {len(self.temporal_downsample)}")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(f"latents_mean and latents_std need z_dim = {self.z_dim} values, "
                             f"not {len(self.latents_mean)} and {len(self.latents_std)}")


PRESETS = {
    "wan2.1": VAEConfig(),
    "tiny": VAEConfig(dim=8, num_res_blocks=1),  # the released layout, for tests
    "shapes": VAEConfig(dim=24, dim_mult=(1, 2, 4), num_res_blocks=1, temporal_downsample=(True, True),
                        latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16),
}


# Layers. Inside, x is (B, T, H, W, C): convolutions and norms are fastest on this order in memory, CPU and GPU alike.
# `cache` is the dict of everyone's past, or None for a lone image, which has neither past nor future.


def conv2d(x, weight, bias, stride=1, padding=0):
    """Every frame of x (B, T, H, W, C) by itself."""
    y = F.conv2d(x.flatten(0, 1).movedim(-1, 1), weight, bias, stride, padding)
    return y.movedim(1, -1).unflatten(0, x.shape[:2]).contiguous()


def pointwise(x, conv):
    """A convolution whose kernel is one point is a linear layer over the channels; x (..., C)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class CausalConv3d(nn.Conv3d):
    """Convolution that sees, over time, only the present and the past. Zeros stand before the clip."""

    def __init__(self, in_channels, out_channels, kernel, stride=(1, 1, 1), past=2):
        super().__init__(in_channels, out_channels, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.past = past  # how many earlier frames it keeps and puts before a chunk

    def forward(self, x, cache):
        seen = torch.cat([cache[self], x], dim=1) if cache and self in cache else x
        if cache is not None and self.past:
            cache[self] = seen[:, -self.past :].clone()  # a view would keep the whole chunk alive
        if self.past and seen.shape[1] == 1:  # all but the last tap of the kernel would meet zeros
            return conv2d(x, self.weight[:, :, -1], self.bias, padding=self.padding[1:])
        zeros = self.past + x.shape[1] - seen.shape[1]
        seen = F.pad(seen, (0, 0, 0, 0, 0, 0, zeros, 0)) if zeros else seen
        return super().forward(seen.movedim(-1, 1)).movedim(1, -1).contiguous()


class RMSNorm(nn.Module):
    """RMSNorm over the channels, x (..., C). Official: F.normalize(x) * sqrt(C) * gamma, whose eps of 1e-12 is a lower
    bound of the norm and no term inside the mean: with nn.RMSNorm's eps small activations would come out smaller. At the
    scale of 1e-12 the two forms are one, and this one reads x once."""

    def __init__(self, dim, spatial_dims=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))  # the official shape

    def forward(self, x):
        C = self.gamma.shape[0]
        return F.rms_norm(x.float(), (C,), self.gamma.float().flatten(), eps=1e-24 / C).type_as(x)


class ResidualBlock(nn.Module):
    """Two causal convolutions, each after norm and SiLU, added to x; a linear layer where the width changes."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            RMSNorm(out_dim), nn.SiLU(), nn.Identity(), CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        )  # the Identity holds the place of a dropout of 0, so that the last layer keeps its number
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x, cache):
        skip = x if self.shortcut is None else pointwise(x, self.shortcut)
        return skip + run(self.residual, x, cache)


class AttentionBlock(nn.Module):
    """Self-attention with one head among the H*W positions of each frame; frames do not see each other."""

    def __init__(self, dim):
        super().__init__()
        self.norm = RMSNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)  # the block starts as the identity, as in the official code

    def forward(self, x, cache):
        tokens = self.norm(x).flatten(2, 3)                                   # (B, T, HW, C)
        q, k, v = pointwise(tokens, self.to_qkv).chunk(3, dim=-1)             # T stands where heads would
        y = F.scaled_dot_product_attention(q, k, v)                           # (B, T, HW, C)
        return x + pointwise(y, self.proj).unflatten(2, x.shape[2:4])         # (B, T, H, W, C)


class Downsample(nn.Module):
    """Halves height and width, then, if `temporal`, all frames but the first."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim, 3))  # official names: the layer is resample.1
        # Joins the frame before the chunk with the chunk, in steps of two: it needs one frame of the past, not two.
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1), past=0) if temporal else None

    def forward(self, x, cache):
        conv = self.resample[1]
        x = F.pad(x, (0, 0, 0, 1, 0, 1))  # right and bottom only, so that an even size halves exactly
        x = conv2d(x, conv.weight, conv.bias, stride=2)
        if self.time_conv is None or cache is None:
            return x
        past, cache[self] = cache.get(self), x[:, -1:].clone()
        return x if past is None else self.time_conv(torch.cat([past, x], dim=1), cache)


class Upsample(nn.Module):
    """Doubles, if `temporal`, all frames but the first, then height and width; halves the channels."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim // 2, 3))  # as in Downsample
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if temporal else None

    def forward(self, x, cache):
        if self.time_conv is not None and cache is not None:
            # time_conv never sees frame 0: not as input, and not as past of frame 1, which has zeros there instead
            x, cache[self] = (self.double(x, cache) if self in cache else x), True
        conv = self.resample[1]
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1).flatten(2, 3).flatten(3, 4)  # nearest neighbor
        return conv2d(x, conv.weight, conv.bias, padding=1)

    def double(self, x, cache):
        even, odd = self.time_conv(x, cache).chunk(2, dim=-1)
        return torch.stack([even, odd], dim=2).flatten(1, 2)


def run(layers, x, cache):
    """Sequential's loop, for layers of which some have a past."""
    for layer in layers:
        x = layer(x) if isinstance(layer, (RMSNorm, nn.SiLU, nn.Identity)) else layer(x, cache)
    return x


def middle(dim):
    """What stands at the lowest resolution of encoder and decoder."""
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def head(dim, out_dim):
    """The last layers of encoder and decoder."""
    return nn.Sequential(RMSNorm(dim), nn.SiLU(), CausalConv3d(dim, out_dim, (3, 3, 3)))


class Encoder(nn.Module):
    """x (B, t, H, W, 3), the next frames of a clip -> (B, f, h, w, 2 * z_dim): mean and log-variance, not yet mixed."""

    def __init__(self, config):
        super().__init__()
        width, layers = config.dim, []
        self.conv1 = CausalConv3d(3, width, (3, 3, 3))
        for mult, temporal in zip(config.dim_mult, (*config.temporal_downsample, None)):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(width, config.dim * mult))
                width = config.dim * mult
            if temporal is not None:
                layers.append(Downsample(width, temporal))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(width)
        self.head = head(width, config.z_dim * 2)

    def forward(self, x, cache):
        x = self.conv1(x, cache)
        x = run(self.downsamples, x, cache)
        x = run(self.middle, x, cache)
        return run(self.head, x, cache)


class Decoder(nn.Module):
    """x (B, f, h, w, z_dim), the next latent frames -> (B, t, H, W, 3)."""

    def __init__(self, config):
        super().__init__()
        width, layers = config.dim * config.dim_mult[-1], []
        self.conv1 = CausalConv3d(config.z_dim, width, (3, 3, 3))
        self.middle = middle(width)
        for mult, temporal in zip(config.dim_mult[::-1], (*config.temporal_downsample[::-1], None)):
            for _ in range(config.num_res_blocks + 1):  # one more than in the encoder
                layers.append(ResidualBlock(width, config.dim * mult))
                width = config.dim * mult
            if temporal is not None:
                layers.append(Upsample(width, temporal))
                width = width // 2
        self.upsamples = nn.Sequential(*layers)
        self.head = head(width, 3)

    def forward(self, x, cache):
        x = self.conv1(x, cache)
        x = run(self.middle, x, cache)
        x = run(self.upsamples, x, cache)
        return run(self.head, x, cache)


class WanVAE(nn.Module):
    """encode/decode are for use: normalised latents, no gradients. moments/reconstruct are for training the VAE itself:
    raw latents, no clamp, differentiable. `chunk` is always the number of latent frames per step; it trades memory for
    fewer, larger steps and does not change the result.

    `tile`: None, or pixels, a multiple of the stride: encode and decode then work on overlapping squares of this side,
    one after the other, so that memory no longer grows with the picture but for the result. This one does change it:
    near its border a tile sees zeros, and the attention in the middle sees the tile alone."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config, self.tile = config, None
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(config.z_dim * 2, config.z_dim * 2, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.set_latent_statistics(config.latents_mean, config.latents_std)

    @property
    def spatial_stride(self):
        """Pixels per latent pixel, in height and in width."""
        return 2 ** len(self.config.temporal_downsample)

    @property
    def temporal_stride(self):
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.config.temporal_downsample)

    def set_latent_statistics(self, mean, std):
        """Sets what encode subtracts and divides by: z_dim numbers each, measured on the means from `moments`."""
        mean, std = (tuple(map(float, values)) for values in (mean, std))
        self.config = dataclasses.replace(self.config, latents_mean=mean, latents_std=std)
        like = self.conv1.weight
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            values = torch.tensor(values, dtype=like.dtype, device=like.device)
            self.register_buffer(name, values.view(1, -1, 1, 1, 1), persistent=False)

    @torch.no_grad()
    def encode(self, video, chunk=1):
        """video (B, 3, T, H, W) in [-1, 1], any device and float dtype; T = 4n + 1, H and W multiples of 8 (or as the
        strides say) -> normalised posterior mean (B, z_dim, F, h, w), in the weights' dtype. ValueError for other
        shapes. Memory beyond input and result is that of one chunk."""
        self.check_video(video)
        stride, encode = self.spatial_stride, lambda part: self.moments(part, chunk)[0]
        mean = in_tiles(encode, video, self.tile, stride, lambda x: x // stride) if self.tile else encode(video)
        return (mean - self.latents_mean) / self.latents_std

    @torch.no_grad()
    def decode(self, z, chunk=1):
        """z as from encode -> video (B, 3, T, H, W) in [-1, 1], in the weights' dtype. ValueError for other shapes."""
        return torch.cat(list(self.decode_stream(z, chunk)), dim=2).contiguous()

    @torch.no_grad()
    def decode_stream(self, z, chunk=1):
        """Yields decode's frames as they come: first frame 0 alone, then 4 * chunk frames (B, 3, t, H, W) at a time."""
        self.check_latents(z)
        z = z.to(self.conv1.weight) * self.latents_std + self.latents_mean
        if self.tile:
            stride, decode = self.spatial_stride, lambda part: self.reconstruct(part, chunk)
            yield in_tiles(decode, z, self.tile // stride, 1, lambda x: x * stride).clamp(-1, 1)
            return
        for frames in self.decode_raw(z, chunk):
            yield frames.clamp(-1, 1)

    def moments(self, video, chunk=1):
        """video as for encode -> posterior mean and log-variance, each (B, z_dim, F, h, w), not normalised."""
        self.check_video(video)
        stride = self.temporal_stride
        chunks = video.split([1, *(stride * n for n in parts((video.shape[2] - 1) // stride, chunk))], dim=2)
        cache = {} if len(chunks) > 1 else None
        features = torch.cat([self.encoder(self.channels_last(frames), cache) for frames in chunks], dim=1)
        return pointwise(features, self.conv1).movedim(-1, 1).contiguous().chunk(2, dim=1)

    def reconstruct(self, z, chunk=1):
        """z not normalised, for instance a sample from `moments` -> video (B, 3, T, H, W), not clamped."""
        self.check_latents(z)
        return torch.cat(list(self.decode_raw(z, chunk)), dim=2).contiguous()

    def decode_raw(self, z, chunk):
        """Yields reconstruct's frames as they come."""
        chunks = z.split([1, *parts(z.shape[2] - 1, chunk)], dim=2)
        cache = {} if len(chunks) > 1 else None
        for latents in chunks:
            yield self.decoder(pointwise(self.channels_last(latents), self.conv2), cache).movedim(-1, 1)

    def channels_last(self, x):
        return x.to(self.conv1.weight).movedim(1, -1).contiguous()

    def check_video(self, video):
        space, stride = self.spatial_stride, self.temporal_stride
        if video.ndim != 5 or video.shape[1] != 3 or not video.numel():
            raise ValueError(f"video must be (B, 3, T, H, W), not {tuple(video.shape)}")
        if not video.is_floating_point():
            raise ValueError(f"video must be floating point in [-1, 1] (bytes / 127.5 - 1), not {video.dtype}")
        T, H, W = video.shape[2:]
        if T % stride != 1 % stride:
            raise ValueError(f"T must be {stride}n + 1 frames (1, {stride + 1}, {2 * stride + 1}, ...), not {T}")
        if H % space or W % space:
            raise ValueError(f"H and W must be multiples of {space}, not {H} x {W}")

    def check_latents(self, z):
        if z.ndim != 5 or z.shape[1] != self.config.z_dim or not z.numel():
            raise ValueError(f"latents must be (B, {self.config.z_dim}, F, h, w), not {tuple(z.shape)}")

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None):
        """path: a file (.safetensors or .pth, official or diffusers names) or a folder with one; config.json beside it
        is read. dtype None keeps what is stored. FileNotFoundError, or ValueError for anything that does not fit."""
        files = find_files(Path(path))
        with torch.device("meta"):
            model = cls(read_config(files[0].parent / "config.json"))
        tensors = {name: t for file in files for name, t in read_tensors(file, device).items()}
        tensors = official_names(tensors, model.config)
        check_tensors(model.state_dict(), tensors, path)
        model.load_state_dict({name: t.to(dtype or t.dtype) for name, t in tensors.items()}, assign=True)
        model.set_latent_statistics(model.config.latents_mean, model.config.latents_std)  # until here on meta
        return model

    def save_pretrained(self, folder):
        """Writes model.safetensors under the official names, and config.json under diffusers' keys."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: getattr(self.config, ours) for key, ours in CONFIG_KEYS.items()}
        config = json.dumps({"_class_name": "AutoencoderKLWan", **config, "attn_scales": []}, indent=2) + "\n"
        replace(folder / "config.json", lambda file: file.write_text(config))
        tensors = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        replace(folder / "model.safetensors", lambda file: save_file(tensors, file))


def in_tiles(run, x, side, multiple, scaled):
    """run(x) from overlapping squares of x (..., H, W), which fade into each other over a quarter of their side.

    `scaled`: a length in x -> the length in the result. `side` is rounded to what `multiple` divides.
    """
    side = max(side // multiple, 4) * multiple
    overlap = side // multiple // 4 * multiple
    result = weight = None
    for top in starts(x.shape[-2], side, overlap):
        for left in starts(x.shape[-1], side, overlap):
            y = run(x[..., top : top + side, left : left + side])
            if result is None:
                result = y.new_zeros(*y.shape[:-2], scaled(x.shape[-2]), scaled(x.shape[-1]))
                weight = torch.zeros_like(result[0, 0, 0])
            rows, columns = (fade(length, scaled(overlap)).to(y) for length in y.shape[-2:])
            place = (..., slice(scaled(top), scaled(top) + len(rows)), slice(scaled(left), scaled(left) + len(columns)))
            result[place] += y * rows[:, None] * columns
            weight[place] += rows[:, None] * columns
    return result / weight


def starts(length, side, overlap):
    """Where the tiles of one axis start: the last ends where the axis does."""
    return [min(start, max(length - side, 0)) for start in range(0, max(length - overlap, 1), side - overlap)]


def fade(length, overlap):
    """(length,) weights that rise over `overlap` steps to 1, and fall at the end; never 0."""
    steps = torch.arange(1, length + 1)
    return torch.minimum(steps, steps.flip(0)).clamp(max=overlap) / overlap


def parts(total, size):
    """parts(7, 3) = [3, 3, 1]"""
    if size < 1:
        raise ValueError(f"chunk must be at least 1 latent frame, not {size}")
    return [min(size, total - start) for start in range(0, total, size)]


# Files: diffusers' keys and names become ours.

CONFIG_KEYS = {"base_dim": "dim", "z_dim": "z_dim", "dim_mult": "dim_mult", "num_res_blocks": "num_res_blocks",
               "temperal_downsample": "temporal_downsample",  # their spelling
               "latents_mean": "latents_mean", "latents_std": "latents_std"}
CONFIG_FIXED = {"attn_scales": [], "is_residual": False, "patch_size": None, "in_channels": 3, "out_channels": 3,
                "decoder_base_dim": None}
CONFIG_UNUSED = {"dropout", "scale_factor_temporal", "scale_factor_spatial", "_class_name", "_diffusers_version",
                 "_name_or_path"}

# diffusers name -> official name, applied in this order; the ResidualBlock's conv1 before conv_in becomes a conv1
RENAMES = {".norm1.": ".residual.0.", ".conv1.": ".residual.2.", ".norm2.": ".residual.3.", ".conv2.": ".residual.6.",
           ".conv_shortcut.": ".shortcut.", ".down_blocks.": ".downsamples.", ".mid_block.resnets.0.": ".middle.0.",
           ".mid_block.attentions.0.": ".middle.1.", ".mid_block.resnets.1.": ".middle.2.", ".conv_in.": ".conv1.",
           ".norm_out.": ".head.0.", ".conv_out.": ".head.2.", "post_quant_conv.": "conv2.",
           "quant_conv.": "conv1."}


def official_names(tensors, config):
    """Renames diffusers' tensors; official ones, told by their names, pass. Diffusers nests the decoder's upsampling
    layers by resolution, the official list is flat: num_res_blocks + 1 residual blocks, then the upsampling."""
    if not any("_block" in name for name in tensors):
        return tensors
    step = config.num_res_blocks + 2

    def flat(match):
        block, kind, index = match.groups()
        return f".upsamples.{int(block) * step + int(index) + (step - 1 if kind == 'upsamplers' else 0)}."

    def rename(name):
        name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat, name)
        for theirs, ours in RENAMES.items():
            name = name.replace(theirs, ours)
        return name

    return {rename(name): t for name, t in tensors.items()}


def read_config(file):
    """VAEConfig from a config.json; the released one if there is no such file, or if it is of the DiT, beside which the
    official repository puts Wan2.1_VAE.pth."""
    if not file.exists():
        return VAEConfig()
    try:
        given = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from None
    if given.get("_class_name") == "WanModel":
        return VAEConfig()
    given = {key: value for key, value in given.items() if key not in CONFIG_UNUSED}
    if given.get("decoder_base_dim") == given.get("base_dim"):
        given.pop("decoder_base_dim", None)
    for key, value in CONFIG_FIXED.items():
        if given.pop(key, value) != value:
            raise ValueError(f"{file}: {key} must be {json.dumps(value)}; this is not the Wan2.1 VAE's layout")
    if unknown := sorted(given.keys() - CONFIG_KEYS.keys()):
        raise ValueError(f"{file}: unknown keys {', '.join(unknown)}; known are {', '.join(CONFIG_KEYS)}")
    return VAEConfig(**{CONFIG_KEYS[key]: value for key, value in given.items()})


def find_files(path):
    """The file(s) that hold the weights: path itself, or in a folder Wan2.1_VAE.pth (the official one has the DiT's
    files beside it), the shards of an index, or the only .safetensors or .pth."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; it should be the VAE's checkpoint file, or its folder")
    if (path / "Wan2.1_VAE.pth").is_file():
        return [path / "Wan2.1_VAE.pth"]
    for index in path.glob("*.safetensors.index.json"):
        files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{path}: {index.name} names {', '.join(missing)}, not found there")
        return files
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pth"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise FileNotFoundError(f"{path} should hold one .safetensors or .pth file ({names} found); or name the file")
    return found


def read_tensors(file, device):
    """{name: tensor} of one file, mapped rather than read. A pickle is opened as data only: it cannot run code."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}
        tensors = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # each format has its own kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is damaged, or not a plain tensor file: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} must hold a dict of tensors and nothing else")
    return tensors


def check_tensors(expected, given, path):
    """Raises one ValueError that names what is missing, left over, or of another shape."""
    shape = {name: list(t.shape) for name, t in expected.items()}
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    misshaped = [f"{name} {list(t.shape)} instead of {shape[name]}"
                 for name, t in given.items() if name in shape and list(t.shape) != shape[name]]
    classes = (("missing", missing), ("unexpected", extra), ("misshaped", misshaped))
    problems = [f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                for kind, names in classes if names]
    if problems:
        raise ValueError(f"{path} does not fit this VAE: {'; '.join(problems)}")


def replace(file, write):
    """Writes by way of a temporary file, so that a crash never leaves half a checkpoint under the real name."""
    partial = file.with_name(file.name + ".partial")
    write(partial)
    os.replace(partial, file)


def read_media(file):
    """An image or a clip -> uint8 frames (T, H, W, 3), and frames per second (None for an image)."""
    try:
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        return torch.from_numpy(np.array(image))[None], None
    except UnidentifiedImageError:  # so it should be a clip
        return torch.from_numpy(iio.imread(file, plugin="FFMPEG")), iio.immeta(file, plugin="FFMPEG")["fps"]


def write_media(file, frames, fps):
    """The reverse: one image if fps is None, else a clip."""
    if fps is None:
        return Image.fromarray(frames[0].numpy()).save(file)
    even = frames.shape[1] % 2 == frames.shape[2] % 2 == 0  # yuv420p halves its colors' resolution
    imageio.mimwrite(file, frames.numpy(), fps=fps, quality=9, macro_block_size=1,
                     pixelformat="yuv420p" if even else "yuv444p")


def pad(video, vae):
    """Repeats the last frame, row and column until the VAE takes the shape; video (B, 3, T, H, W)."""
    T, H, W = video.shape[2:]
    right, bottom, end = -W % vae.spatial_stride, -H % vae.spatial_stride, -(T - 1) % vae.temporal_stride
    return F.pad(video, (0, right, 0, bottom, 0, end), mode="replicate")


def roundtrip(args):
    """Reads, encodes, decodes, writes, and prints what was lost and how long it took."""
    dtype = None if args.dtype == "stored" else getattr(torch, args.dtype)
    vae = WanVAE.from_pretrained(args.weights, args.device, dtype)
    frames, fps = read_media(args.input)                                      # (T, H, W, 3)
    T, H, W, _ = frames.shape
    video = pad(frames.movedim(-1, 0)[None].float() / 127.5 - 1, vae)         # (1, 3, T', H', W')
    start = time.perf_counter()
    z = vae.encode(video)                                                     # (1, C, F, h, w)
    encoded = time.perf_counter()
    chunks = [((x.float().cpu() + 1) * 127.5).round().byte() for x in vae.decode_stream(z)]
    decoded = time.perf_counter()
    result = torch.cat(chunks, dim=2)[0, :, :T, :H, :W].movedim(0, -1)        # (T, H, W, 3)
    if args.output:
        write_media(args.output, result, fps)

    mse = (result.float() - frames.float()).square().mean().item()
    psnr = 10 * math.log10(255**2 / mse) if mse else math.inf
    print(f"{T} x {H} x {W} pixels -> latents {' x '.join(map(str, z.shape[1:]))}: "
          f"{frames.numel() / z.numel():.1f} times fewer numbers")
    print(f"PSNR {psnr:.2f} dB, encode {encoded - start:.2f} s, decode {decoded - encoded:.2f} s"
          + (f" -> {args.output}" if args.output else ""))


def main():
    """Prints what the round trip of a picture loses; ends with code 2 after one line of what is wrong."""
    parser = argparse.ArgumentParser(description="Sends an image or a clip through the VAE and back, and says how much "
                                     "is lost.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shapes = Path(__file__).resolve().parent / "weights" / "shapes"
    parser.add_argument("input", type=Path, nargs="?", default=shapes / "example.mp4", help="image or clip")
    parser.add_argument("output", type=Path, nargs="?", help="where the round trip goes: .png, .jpg, .mp4, ...")
    parser.add_argument("--weights", default=shapes / "vae", help="checkpoint file or folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("stored", "float32", "bfloat16", "float16"), default="stored",
                        help="precision to run in; stored is that of the checkpoint")
    args = parser.parse_args()
    try:
        roundtrip(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"vae.py: {error}\n")


if __name__ == "__main__":
    main()
