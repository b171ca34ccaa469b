"""WanVAE: the 3D causal autoencoder of Wan2.1 and 2.2, from video to latents and back.

It turns (B, 3, T, H, W) video in [-1, 1] into (B, 16, F, h, w) latents: 8 times smaller in height
and width, 4 times in time (Wan2.2: 48 channels, 16 times smaller). They are the posterior's mean,
normalised; nothing is sampled. The VAE is causal in time. Two rules define its behaviour. The
official code (wan/modules/vae.py of Wan2.1) and diffusers (AutoencoderKLWan) implement them by
feature caches:

  1. every convolution over time sees only the present and the past; before the clip the past is
     zeros;
  2. frame 0 is special: temporal downsampling keeps it and halves the rest, temporal upsampling
     keeps it and doubles the rest. So T = 4n + 1 frames make F = n + 1 latent frames, and an image
     is a clip with T = 1.

What is unusual: a clip is never processed whole. Frame 0 goes through alone, then `chunk` latent
frames at a time. Each convolution keeps its last two input frames in a dict, under itself as key.
The result is that of the whole clip, but memory does not grow with T. (One float32 feature map of
96 channels at 81 x 480 x 832 alone would take 12.4 GB.)

Letters: B batch, C channels, T frames, F latent frames = 1 + (T-1)/4, H W pixels, h w = H/8 W/8.
Precision: everything runs in the weights' dtype except the norms. They are float32, because squares
overflow in float16 and their sums lose digits in bfloat16.

    python vae.py [IMAGE] [--weights Wan2.1_VAE.pth]     # error of the round trip
"""

import argparse
import json
import math
import os
import re
import shutil
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

MEAN_2_2 = (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542)
MEAN_2_2 += (0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109)
MEAN_2_2 += (0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899)
MEAN_2_2 += (-0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748)
MEAN_2_2 += (0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667)
STD_2_2 = (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344)
STD_2_2 += (0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804)
STD_2_2 += (0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999)
STD_2_2 += (0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887)
STD_2_2 += (0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)


@dataclass(frozen=True)
class VAEConfig:
    """The defaults are the Wan2.1 VAE; PRESETS["wan2.2"] is its successor.

    Each entry of `dim_mult` is one resolution. From one to the next height and width halve. Time
    halves too if the entry of `temporal_downsample` is True. `latents_*` are statistics of the
    posterior mean.
    """

    dim: int = 96
    decoder_dim: int = 0  # width of the decoder; 0: `dim`
    z_dim: int = 16
    dim_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple = (False, True, True)
    patch: int = 1  # Wan2.2: squares of 2x2 pixels become channels first
    stage_shortcuts: bool = False  # Wan2.2: shortcuts around each resolution
    latents_mean: tuple = MEAN
    latents_std: tuple = STD

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temporal_downsample needs one entry fewer than dim_mult")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(f"latents_mean and latents_std need z_dim = {self.z_dim} values each")


PRESETS = {
    "wan2.1": VAEConfig(),
    "wan2.2": VAEConfig(
        dim=160,
        decoder_dim=256,
        z_dim=48,
        patch=2,
        stage_shortcuts=True,
        latents_mean=MEAN_2_2,
        latents_std=STD_2_2,
    ),
    "tiny": VAEConfig(dim=8, num_res_blocks=1),
}

# Inside the networks x is (B, T, H, W, C), the fastest memory order for convolutions and norms on
# CPU and GPU alike. `cache` maps each layer to its past frames. It is None for a single image,
# which has neither past nor future.


def conv2d(x, weight, bias, stride=1, padding=0):
    """Convolves each frame of x (B, T, H, W, C) separately."""
    y = F.conv2d(x.flatten(0, 1).movedim(-1, 1), weight, bias, stride, padding)
    return y.movedim(1, -1).unflatten(0, x.shape[:2]).contiguous()


def pointwise(x, conv):
    """A convolution with a one-point kernel is a linear layer over the channels of x (..., C)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that sees only the present and the past in time."""

    def __init__(self, in_channels, out_channels, kernel, stride=(1, 1, 1), past=2):
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_channels, out_channels, kernel, stride, padding)
        self.past = past  # number of earlier frames to keep and to prepend to a chunk

    def forward(self, x, cache):
        seen = torch.cat([cache[self], x], dim=1) if cache and self in cache else x
        if cache is not None and self.past:
            cache[self] = seen[:, -self.past :].clone()  # a view would keep the whole chunk alive
        if self.past and seen.shape[1] == 1:  # zeros before it: only the last tap counts
            return conv2d(x, self.weight[:, :, -1], self.bias, padding=self.padding[1:])
        zeros = self.past + x.shape[1] - seen.shape[1]
        if zeros:
            seen = F.pad(seen, (0, 0, 0, 0, 0, 0, zeros, 0))
        return super().forward(seen.movedim(-1, 1)).movedim(1, -1).contiguous()


class RMSNorm(nn.Module):
    """RMSNorm over the channels of x (..., C).

    Official: F.normalize(x) * sqrt(C) * gamma, which clamps the norm at 1e-12. This form agrees up
    to rounding and reads x once. (nn.RMSNorm's default eps would shrink small activations.)
    """

    def __init__(self, dim, spatial_dims=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))  # the official shape

    def forward(self, x):
        C = self.gamma.shape[0]
        return F.rms_norm(x.float(), (C,), self.gamma.float().flatten(), eps=1e-24 / C).type_as(x)


class ResidualBlock(nn.Module):
    """Two causal convolutions, each after norm and SiLU, added to x."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            RMSNorm(out_dim),
            nn.SiLU(),
            nn.Identity(),  # the official dropout of 0: keeps the next layer's index
            CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        )
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x, cache):
        skip = x if self.shortcut is None else pointwise(x, self.shortcut)
        return skip + run(self.residual, x, cache)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the H*W positions of each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm = RMSNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)  # as officially: at first the block adds a bias alone

    def forward(self, x, cache):
        tokens = self.norm(x).flatten(2, 3)                               # (B, T, HW, C)
        q, k, v = pointwise(tokens, self.to_qkv).chunk(3, dim=-1)         # T acts as the heads
        y = F.scaled_dot_product_attention(q, k, v)                       # (B, T, HW, C)
        return x + pointwise(y, self.proj).unflatten(2, x.shape[2:4])     # (B, T, H, W, C)


class Downsample(nn.Module):
    """Halves height and width, then, if `temporal`, the number of frames after frame 0."""

    def __init__(self, dim, temporal):
        super().__init__()
        # The Identity replaces the official padding, so that the convolution is resample.1.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim, 3))
        self.time_conv = None
        if temporal:  # stride 2, from the last frame before the chunk
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1), past=0)

    def forward(self, x, cache):
        conv = self.resample[1]
        x = F.pad(x, (0, 0, 0, 1, 0, 1))  # right and bottom only: an even size halves exactly
        x = conv2d(x, conv.weight, conv.bias, stride=2)
        if self.time_conv is None or cache is None:
            return x
        past = cache.get(self)
        cache[self] = x[:, -1:].clone()
        if past is None:  # frame 0
            return x
        return self.time_conv(torch.cat([past, x], dim=1), cache)


class Upsample(nn.Module):
    """Doubles, if `temporal`, the number of frames after frame 0, then height and width."""

    def __init__(self, dim, out_dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, out_dim, 3))
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if temporal else None

    def forward(self, x, cache):
        if self.time_conv is not None and cache is not None:
            # time_conv never sees frame 0. In its place frame 1 has zeros as its past.
            if self in cache:
                even, odd = self.time_conv(x, cache).chunk(2, dim=-1)
                x = torch.stack([even, odd], dim=2).flatten(1, 2)
            cache[self] = True
        conv = self.resample[1]
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)  # nearest neighbour
        x = x.flatten(2, 3).flatten(3, 4)
        return conv2d(x, conv.weight, conv.bias, padding=1)


def run(layers, x, cache):
    """Runs the layers in order and passes the cache to those that look back in time."""
    for layer in layers:
        x = layer(x) if isinstance(layer, (RMSNorm, nn.SiLU, nn.Identity)) else layer(x, cache)
    return x


def middle_layers(dim):
    """The layers at the lowest resolution of encoder and decoder."""
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def head_layers(dim, out_dim):
    """The last layers of encoder and decoder."""
    return nn.Sequential(RMSNorm(dim), nn.SiLU(), CausalConv3d(dim, out_dim, (3, 3, 3)))


def to_patches(x, p):
    """Squares of p x p pixels become channels: (B, T, H, W, C) -> (B, T, H/p, W/p, C*p*p)."""
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, T, h, row, w, column, C)
    return x.permute(0, 1, 2, 4, 6, 5, 3).flatten(4)


def to_pixels(x, p):
    """The reverse of `to_patches`."""
    x = x.unflatten(-1, (-1, p, p))  # (B, T, h, w, C, column, row)
    return x.permute(0, 1, 2, 6, 3, 5, 4).flatten(4, 5).flatten(2, 3)


class DownStage(nn.Module):
    """One resolution of the Wan2.2 encoder: layers, and a shortcut that averages their input.

    `temporal` is None at the last resolution, which is not downsampled.
    """

    def __init__(self, layers, dim, temporal):
        super().__init__()
        self.downsamples = nn.Sequential(*layers)
        self.dim = dim  # output channels
        self.space = 1 if temporal is None else 2
        self.time = 2 if temporal else 1

    def forward(self, x, cache):
        y = F.pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % self.time, 0))  # zeros before a lone frame 0
        y = y.unflatten(3, (-1, self.space)).unflatten(2, (-1, self.space))
        y = y.unflatten(1, (-1, self.time))  # (B, f, time, h, row, w, column, C)
        y = y.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)  # (B, f, h, w, C*time*row*column)
        return run(self.downsamples, x, cache) + y.unflatten(-1, (self.dim, -1)).mean(-1)


class UpStage(nn.Module):
    """One resolution of the Wan2.2 decoder: layers, and a shortcut that repeats their input.

    `temporal` is None at the last resolution, which is not upsampled and has no shortcut.
    """

    def __init__(self, layers, dim, temporal):
        super().__init__()
        self.upsamples = nn.Sequential(*layers)
        self.dim = dim  # output channels
        self.space, self.time = 2, 2 if temporal else 1
        self.shortcut = temporal is not None

    def forward(self, x, cache):
        if not self.shortcut:
            return run(self.upsamples, x, cache)
        copies = self.dim * self.time * self.space**2 // x.shape[-1]
        y = x.repeat_interleave(copies, dim=-1)
        y = y.unflatten(-1, (self.dim, self.time, self.space, self.space))
        y = y.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, f, time, h, row, w, column, C)
        y = y.flatten(5, 6).flatten(3, 4).flatten(1, 2)  # (B, t, H, W, C)
        x = run(self.upsamples, x, cache)
        return x + y[:, -x.shape[1] :]  # frame 0 takes the last of its copies


class Encoder(nn.Module):
    """Encodes the next frames of a clip, in patches of p pixels a side (Wan2.1: 1, Wan2.2: 2).

    (B, t, H/p, W/p, 3*p*p) -> (B, f, h, w, 2 * z_dim).
    """

    def __init__(self, config):
        super().__init__()
        width, stages = config.dim, []
        self.conv1 = CausalConv3d(3 * config.patch**2, width, (3, 3, 3))
        for mult, temporal in zip(config.dim_mult, (*config.temporal_downsample, None)):
            layers = []
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(width, config.dim * mult))
                width = config.dim * mult
            if temporal is not None:
                layers.append(Downsample(width, temporal))
            if config.stage_shortcuts:
                layers = [DownStage(layers, width, temporal)]
            stages += layers
        self.downsamples = nn.Sequential(*stages)
        self.middle = middle_layers(width)
        self.head = head_layers(width, config.z_dim * 2)

    def forward(self, x, cache):
        x = self.conv1(x, cache)
        x = run(self.downsamples, x, cache)
        x = run(self.middle, x, cache)
        return run(self.head, x, cache)


class Decoder(nn.Module):
    """Decodes the next latent frames: (B, f, h, w, z_dim) -> (B, t, H/p, W/p, 3*p*p)."""

    def __init__(self, config):
        super().__init__()
        dim = config.decoder_dim or config.dim
        width, stages = dim * config.dim_mult[-1], []
        self.conv1 = CausalConv3d(config.z_dim, width, (3, 3, 3))
        self.middle = middle_layers(width)
        for mult, temporal in zip(config.dim_mult[::-1], (*config.temporal_downsample[::-1], None)):
            layers = []
            for _ in range(config.num_res_blocks + 1):  # one more than in the encoder
                layers.append(ResidualBlock(width, dim * mult))
                width = dim * mult
            if temporal is not None:  # Wan2.1 halves the channels here, Wan2.2 keeps them
                out_dim = width if config.stage_shortcuts else width // 2
                layers.append(Upsample(width, out_dim, temporal))
                width = out_dim
            if config.stage_shortcuts:
                layers = [UpStage(layers, width, temporal)]
            stages += layers
        self.upsamples = nn.Sequential(*stages)
        self.head = head_layers(width, 3 * config.patch**2)

    def forward(self, x, cache):
        x = self.conv1(x, cache)
        x = run(self.middle, x, cache)
        x = run(self.upsamples, x, cache)
        return run(self.head, x, cache)


def to_video(frames, like):
    """uint8 (T, H, W, 3) -> (1, 3, T, H, W) in [-1, 1], with the dtype and device of `like`."""
    video = torch.tensor(frames).to(like.device).permute(3, 0, 1, 2)[None].to(like.dtype)
    return video.div_(127.5).sub_(1)  # in place: a copy of a clip takes gigabytes


def to_frames(video):
    """(1, 3, T, H, W) in [-1, 1] -> uint8 (T, H, W, 3)."""
    levels = ((video[0].float() + 1) * 127.5).round().clamp(0, 255).byte()
    return levels.permute(1, 2, 3, 0).cpu().numpy()


class WanVAE(nn.Module):
    """Encoder and decoder. `encode` and `decode` use normalised latents and no gradients.

    `moments` and `reconstruct` serve to train the VAE itself: latents are not normalised, frames
    are not clamped, and gradients flow. `chunk` is the number of latent frames per step. More
    frames take more memory and fewer steps; the result stays the same.
    """

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(config.z_dim * 2, config.z_dim * 2, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.set_latent_statistics(config.latents_mean, config.latents_std)

    @property
    def spatial_stride(self):
        """Pixels per latent pixel, in height and in width."""
        return self.config.patch * 2 ** len(self.config.temporal_downsample)

    @property
    def temporal_stride(self):
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.config.temporal_downsample)

    def set_latent_statistics(self, mean, std):
        """Sets the mean and std by which `encode` normalises: z_dim numbers each."""
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        self.config = replace(self.config, latents_mean=mean, latents_std=std)
        weight = self.conv1.weight
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            values = torch.tensor(values, dtype=weight.dtype, device=weight.device)
            self.register_buffer(name, values.view(1, -1, 1, 1, 1), persistent=False)

    @torch.no_grad()
    def encode(self, video, chunk=1):
        """Normalised posterior mean (B, z_dim, F, h, w), in the weights' dtype.

        `video` is (B, 3, T, H, W) in [-1, 1], of any float dtype. T is 4n + 1, H and W are
        multiples of 8 (in general, of the strides). Raises ValueError for other shapes.
        """
        mean, _ = self.moments(video, chunk)
        return (mean - self.latents_mean) / self.latents_std

    @torch.no_grad()
    def decode(self, z, chunk=1):
        """Normalised z (B, z_dim, F, h, w) -> video (B, 3, T, H, W) in [-1, 1].

        It has the weights' dtype. Raises ValueError for other shapes.
        """
        return torch.cat(list(self.decode_stream(z, chunk)), dim=2).contiguous()

    @torch.no_grad()
    def decode_stream(self, z, chunk=1):
        """Yields the frames of `decode` in pieces: frame 0 alone, then 4 * chunk at a time."""
        check_latents(self, z)
        z = z.to(self.conv1.weight) * self.latents_std + self.latents_mean
        for frames in self.reconstruct_stream(z, chunk):
            yield frames.clamp(-1, 1)

    def moments(self, video, chunk=1):
        """Posterior mean and log-variance of `video`, each (B, z_dim, F, h, w), not normalised."""
        check_video(self, video)
        chunks = split_frames(video, chunk * self.temporal_stride)
        cache = {} if len(chunks) > 1 else None
        features = []
        for frames in chunks:
            x = to_patches(self.channels_last(frames), self.config.patch)
            features.append(self.encoder(x, cache))
        features = pointwise(torch.cat(features, dim=1), self.conv1)  # (B, F, h, w, 2 * z_dim)
        return features.movedim(-1, 1).contiguous().chunk(2, dim=1)

    def reconstruct(self, z, chunk=1):
        """z, not normalised, as from `moments` -> video (B, 3, T, H, W), not clamped."""
        return torch.cat(list(self.reconstruct_stream(z, chunk)), dim=2).contiguous()

    def reconstruct_stream(self, z, chunk=1):
        """Yields the frames of `reconstruct` in pieces."""
        check_latents(self, z)
        chunks = split_frames(z, chunk)
        cache = {} if len(chunks) > 1 else None
        for latents in chunks:
            x = pointwise(self.channels_last(latents), self.conv2)
            yield to_pixels(self.decoder(x, cache), self.config.patch).movedim(-1, 1)

    def channels_last(self, x):
        return x.to(self.conv1.weight).movedim(1, -1).contiguous()

    # Loading.

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None):
        """Loads a file (.safetensors or .pth, official or diffusers names) or its folder.

        dtype None keeps the stored dtype. Raises FileNotFoundError or ValueError.
        """
        file = checkpoint_file(path)
        tensors = read_tensors(file)
        nested = any(".downsamples.0.downsamples." in name for name in tensors)
        released = PRESETS["wan2.2" if nested else "wan2.1"]
        config = read_config(file.parent / "config.json", released)
        if config.num_res_blocks > len(tensors):  # a damaged config could ask for millions
            raise ValueError(f"{path} has too few tensors for {config.num_res_blocks} blocks")
        tensors = official_names(tensors, config)
        tensors = {name: t.to(device, dtype or t.dtype) for name, t in tensors.items()}
        try:
            with torch.device("meta"):
                model = cls(config)
            model.load_state_dict(tensors, assign=True)
        except (RuntimeError, TypeError) as error:  # it names the tensors at fault
            raise ValueError(f"{path}: {' '.join(str(error).split())[:600]}") from None
        model.set_latent_statistics(config.latents_mean, config.latents_std)  # they were on meta
        return model

    def save_pretrained(self, folder):
        """Writes model.safetensors under the official names, config.json under diffusers' keys."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "AutoencoderKLWan", "attn_scales": []}
        for key, name in CONFIG_KEYS.items():
            config[key] = getattr(self.config, name)
        config["decoder_base_dim"] = self.config.decoder_dim or None
        config["patch_size"] = self.config.patch if self.config.patch > 1 else None
        config["in_channels"] = config["out_channels"] = 3 * self.config.patch**2
        tensors = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        # Write to another name first: the tensors may be mapped from the existing file.
        partial = folder / "model.safetensors.partial"
        save_file(tensors, partial)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        # safetensors makes its files readable by the owner only.
        shutil.copymode(folder / "config.json", partial)
        os.replace(partial, folder / "model.safetensors")


def split_frames(x, size):
    """(B, C, T, H, W) -> frame 0, then `size` frames at a time."""
    if size < 1:
        raise ValueError("chunk must be at least 1 latent frame")
    return [x[:, :, :1], *(x[:, :, 1:].split(size, dim=2) if x.shape[2] > 1 else [])]


def check_video(vae, video):
    """Raises ValueError unless `video` has a shape and a dtype that the VAE can encode."""
    space, stride = vae.spatial_stride, vae.temporal_stride
    if video.ndim != 5 or video.shape[1] != 3 or not video.numel():
        raise ValueError(f"video is {tuple(video.shape)}, not (B, 3, T, H, W)")
    if not video.is_floating_point():
        raise ValueError(f"video is {video.dtype}; it should be in [-1, 1], bytes / 127.5 - 1")
    T, H, W = video.shape[2:]
    if T % stride != 1 % stride or H % space or W % space:
        raise ValueError(f"video is {T} x {H} x {W}; T should be {stride}n + 1, sides {space}n")


def check_latents(vae, z):
    """Raises ValueError unless `z` has a shape that the VAE can decode."""
    if z.ndim != 5 or z.shape[1] != vae.config.z_dim or not z.numel():
        raise ValueError(f"latents are {tuple(z.shape)}, not (B, {vae.config.z_dim}, F, h, w)")


CONFIG_KEYS = {
    "base_dim": "dim",
    "decoder_base_dim": "decoder_dim",
    "is_residual": "stage_shortcuts",
    "patch_size": "patch",
    "z_dim": "z_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",  # diffusers' spelling
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}

# diffusers name -> official name, in this order: `.conv1.` goes before `.conv_in.` takes its name.
RENAMES = {
    ".norm1.": ".residual.0.",
    ".conv1.": ".residual.2.",
    ".norm2.": ".residual.3.",
    ".conv2.": ".residual.6.",
    ".conv_shortcut.": ".shortcut.",
    ".down_blocks.": ".downsamples.",
    ".mid_block.resnets.0.": ".middle.0.",
    ".mid_block.attentions.0.": ".middle.1.",
    ".mid_block.resnets.1.": ".middle.2.",
    ".conv_in.": ".conv1.",
    ".norm_out.": ".head.0.",
    ".conv_out.": ".head.2.",
    "post_quant_conv.": "conv2.",
    "quant_conv.": "conv1.",
}


def official_names(tensors, config):
    """Gives diffusers' tensors their official names. Official names stay unchanged.

    In Wan2.2 both nest the layers by resolution. In Wan2.1 only diffusers nests the decoder's. The
    official list is flat: for each resolution num_res_blocks + 1 residual blocks, then upsampling.
    """
    if not any("_block" in name for name in tensors):
        return tensors
    blocks = config.num_res_blocks

    def nested(match):
        side, resolution, index = match.groups()
        index = index or blocks + (side == "up")  # the sampler comes after the residual blocks
        return f".{side}samples.{resolution}.{side}samples.{index}."

    def flat(match):
        resolution, layers, index = int(match[1]), match[2], int(match[3])
        last = blocks + 1 if layers == "upsamplers" else 0
        return f".upsamples.{resolution * (blocks + 2) + index + last}."

    renamed = {}
    for name, tensor in tensors.items():
        if config.stage_shortcuts:
            layer = r"(?:resnets\.(\d+)|downsampler|upsampler)"
            name = re.sub(rf"\.(down|up)_blocks\.(\d+)\.{layer}\.", nested, name)
        name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat, name)
        for theirs, official in RENAMES.items():
            name = name.replace(theirs, official)
        renamed[name] = tensor
    return renamed


def read_config(file, released=VAEConfig()):
    """Reads VAEConfig from a config.json. Missing keys take the values of `released`.

    A config.json of the DiT is ignored: the official repositories put the VAE's .pth beside it.
    """
    if not file.exists():
        return released
    try:
        raw = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from None
    if raw.get("_class_name") == "WanModel":
        return released
    if raw.get("attn_scales"):
        raise ValueError(f"{file} has attn_scales, which no VAE of Wan2.1 or Wan2.2 has")
    if raw.get("z_dim") == PRESETS["wan2.2"].z_dim:
        released = PRESETS["wan2.2"]
    settings = {}
    for key, value in raw.items():
        name = CONFIG_KEYS.get(key, key)
        if value is not None and name in CONFIG_KEYS.values():
            settings[name] = tuple(value) if isinstance(value, list) else value
    try:
        config = replace(released, **settings)
        if not all(map(math.isfinite, config.latents_mean)) or not min(config.latents_std) > 0:
            raise ValueError("latents_mean should be numbers, latents_std above 0")
        if not all(isinstance(halved, bool) for halved in config.temporal_downsample):
            raise ValueError(f"temporal_downsample is {config.temporal_downsample!r}, not booleans")
        return config
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def checkpoint_file(path):
    """The file that holds the weights: `path`, or in a folder Wan2.?_VAE.pth or its only one."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; it should be the VAE's checkpoint")
    for name in ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth"):  # the DiT's files may lie beside it
        if (path / name).is_file():
            return path / name
    if any(path.glob("*.index.json")):
        raise ValueError(f"{path} holds an index of shards; the VAE comes in one file")
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pth"))
    if len(files) != 1:
        raise FileNotFoundError(f"{path} holds {len(files)} checkpoint files; it should be one")
    return files[0]


def read_tensors(file):
    """{name: tensor}, memory-mapped. A pickle is opened as data only, so it runs no code."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        else:
            mapped = zipfile.is_zipfile(file)  # old pickles cannot be mapped
            tensors = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=mapped))
    except Exception as error:  # pickle, zip and safetensors have classes of their own
        raise ValueError(
            f"{file} is damaged, or no plain tensor file: {str(error)[:200]}"
        ) from None
    for name, tensor in tensors.items():
        floating = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if not floating or tensor.itemsize < 2:  # 8 bits come with scales
            raise ValueError(f"{file}: {name} is no floating point tensor of 16 bits or more")
    return tensors


def main():
    """Encodes and decodes an image, and prints the error."""
    shapes = Path(__file__).resolve().parent / "weights" / "shapes"
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("image", nargs="?", default=shapes / "example.png", help="a picture")
    parser.add_argument("--weights", default=shapes / "vae", help="checkpoint file or folder")
    args = parser.parse_args()
    try:
        vae = WanVAE.from_pretrained(args.weights)
        with Image.open(args.image) as image:
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
        H, W = (side // vae.spatial_stride * vae.spatial_stride for side in pixels.shape[:2])
        video = to_video(pixels[None, :H, :W], like=vae.conv1.weight)  # (1, 3, 1, H, W)
        z = vae.encode(video)  # (1, 16, 1, h, w)
        error = (vae.decode(z) - video).float().square().mean().item()
    except (ValueError, OSError) as error:
        parser.exit(2, f"vae.py: {error}\n")
    print(f"{H} x {W} pixels -> latents {tuple(z.shape)}: {video.numel() / z.numel():.1f} to 1")
    print(f"PSNR of the round trip: {10 * math.log10(4 / error):.2f} dB")


if __name__ == "__main__":
    main()
