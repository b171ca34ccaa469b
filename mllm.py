"""Qwen2.5-VL by hand: what sees the pictures, reads the instruction, and carries the learnable queries.

    pictures ─► patches ─► vision tower ─► one embedding per 2x2 patches ─┐
    words ─► token embeddings ────────────────────────────────────────────┴► + queries ─► decoder ─► hidden states

What is unusual, beside an ordinary vision-language model:
- Vision attention is local: windows of 112 px, and full attention in 4 of 32 blocks. Full means full per frame: no
  vision block sees two frames of a clip at once (beyond the 2 frames of a patch). Patches are sorted once so that
  windows of equal size are neighbours: attention is then a few batched SDPA calls, and no n x n mask is ever built.
- Positions have three axes (time, row, column: M-RoPE). Text counts all three up together. Time is in seconds.
- `forward` returns hidden states, not logits: the editor keeps those at the queries, which stand after the last token
  as if they were text. `lm_head` and `generate` make it an ordinary chat model, for captions and to check what it sees.
- LoRA lives here too, on the language model only, under the names that PEFT writes.

From the Qwen2.5-VL report (arXiv 2502.13923) and its release in transformers 4.49, whose positions it was trained with.
Later versions differ for text after a clip: 4.56 rounds the seconds per frame down first, and 5.x starts that text
after the largest row or column whatever the time. Parameter names are the official checkpoint's.

Letters: B batch, L prompt tokens, Q queries, T = L + Q, D width, N patches, H heads, G heads of keys, d head width.

    python mllm.py [photo.jpg ["What is this?"]] [--weights FOLDER]
"""

import argparse
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, the same in the 3B and 7B releases but for the width that it writes."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14                # pixels
    temporal_patch_size: int = 2        # frames
    spatial_merge_size: int = 2         # 2x2 patches become one token of the language model
    window_size: int = 112              # pixels
    fullatt_block_indexes: tuple = (7, 15, 23, 31)
    out_hidden_size: int = 2048
    tokens_per_second: float = 2        # M-RoPE steps per second of video

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"vision hidden_size {self.hidden_size} is no multiple of 4 * {self.num_heads} heads")
        if self.window_size < self.patch_size * self.spatial_merge_size:
            raise ValueError(f"window_size {self.window_size} is smaller than one merged patch")


@dataclass(frozen=True)
class Qwen2_5_VLConfig:
    """Defaults are Qwen2.5-VL-3B. Field names are those of the hub's config.json."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple = (16, 24, 24)  # rotated pairs per head that turn with time, row, column
    tie_word_embeddings: bool = True
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision_config: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"heads do not divide: hidden_size {self.hidden_size}, num_attention_heads "
                             f"{self.num_attention_heads}, num_key_value_heads {self.num_key_value_heads}")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must add up to half the head width {self.head_dim}")
        if (width := self.vision_config.out_hidden_size) != self.hidden_size:
            raise ValueError(f"vision out_hidden_size {width} is not hidden_size {self.hidden_size}")

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw):
        """Reads the hub's flat layout and the nested one of newer exports. ValueError for what is not supported."""
        flat = {**(raw.get("text_config") or {}), **{key: value for key, value in raw.items() if value is not None}}
        flat.pop("text_config", None)
        flat |= (flat.pop("rope_scaling", None) or {}) | (flat.pop("rope_parameters", None) or {})
        vision = {key: value for key, value in (flat.pop("vision_config", None) or {}).items() if value is not None}
        if "in_chans" in vision:                                    # the hub's name; transformers calls it in_channels
            vision["in_channels"] = vision.pop("in_chans")
        if vision.pop("spatial_patch_size", None) not in (None, vision.get("patch_size", VisionConfig.patch_size)):
            raise ValueError("config.json: spatial_patch_size and patch_size differ")
        return cls(**known(cls, flat), vision_config=VisionConfig(**known(VisionConfig, vision)))

    def to_dict(self):
        """The hub's flat layout."""
        flat = asdict(self)
        rope = {"type": "mrope", "mrope_section": list(flat.pop("mrope_section"))}
        return {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
                "hidden_act": "silu", **flat, "rope_scaling": rope}


PRESETS = {
    "3B": Qwen2_5_VLConfig(),
    "7B": Qwen2_5_VLConfig(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False, vision_config=VisionConfig(out_hidden_size=3584)),
    "tiny": Qwen2_5_VLConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mrope_section=(2, 3, 3), vision_start_token_id=503, vision_end_token_id=504,
        image_token_id=505, video_token_id=506,
        vision_config=VisionConfig(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8,
                                   window_size=32, fullatt_block_indexes=(1, 3), out_hidden_size=64)),
}

# What other models of the family set and this one does not do: a config.json may only repeat these values.
FIXED = {"hidden_act": ("silu",), "type": ("mrope", "default"), "rope_type": ("mrope", "default"),
         "use_sliding_window": (False,)}
# Bookkeeping, training settings and generation defaults in released config.json files: they change no hidden state.
IRRELEVANT = {
    "architectures", "model_type", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
    "vision_token_id", "initializer_range", "max_position_embeddings", "max_window_layers", "sliding_window",
    "layer_types", "torch_dtype", "dtype", "transformers_version", "return_dict", "output_hidden_states",
    "output_attentions",
}


def known(cls, given):
    """The fields of a config class out of a dict. ValueError for a setting that would be lost or is not supported."""
    names = {entry.name for entry in fields(cls)}
    for key, allowed in FIXED.items():
        if given.get(key, allowed[0]) not in allowed:
            raise ValueError(f"config.json: {key} is {given[key]!r}; only {allowed[0]!r} is supported")
    odd = sorted(key for key in given.keys() - names - IRRELEVANT - FIXED.keys() if not key.startswith("_"))
    if odd:
        raise ValueError(f"config.json: unknown settings {', '.join(odd)}; known are {', '.join(sorted(names))}")
    return {key: tuple(given[key]) if isinstance(given[key], list) else given[key] for key in names & given.keys()}


def attention(q, k, v, mask=None, causal=False):
    """q (B, T, H, d), k and v (B, S, G, d), mask (B, 1, T, S) True where seen -> (B, T, H, d). G divides H."""
    if k.shape[2] != q.shape[2]:                    # spelled out: not every SDPA kernel takes fewer heads of keys
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def rotate(x, cos, sin):
    """x (..., H, d), cos and sin (..., 1, d/2). Channel i turns with i + d/2: halves, where Wan pairs neighbours."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def frequencies(width, theta, device):
    """(width/2,) turning speeds of a rotated head, from 1 down to about 1/theta."""
    return 1.0 / theta ** (torch.arange(0, width, 2, device=device).float() / width)


class RMSNorm(nn.Module):
    """Over the last axis, in float32; the gain multiplies what was rounded to x's dtype, as in the release."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).type_as(x)


class SwiGLU(nn.Module):
    """The feed-forward of both towers; the vision tower's has biases."""

    def __init__(self, width, inner, bias):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def patch_layout(grids, config):
    """Where every patch is, in the order of the checkpoint: merged patches in raster order, their 2x2 patches inside.

    grids: list of (frames, rows, columns) in patches. Returns four (N,) tensors: row, column, window id, frame id.
    """
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size                         # of a window, in merged patches
    parts, windows, frames = [], 0, 0
    for t, h, w in grids:
        ranges = map(torch.arange, (t, h // merge, w // merge, merge, merge))
        f, y, x, inner_y, inner_x = torch.cartesian_prod(*ranges).T
        down, across = -(-h // merge // side), -(-w // merge // side)               # those at the edges may be smaller
        window = (f * down + y // side) * across + x // side
        parts.append(torch.stack([y * merge + inner_y, x * merge + inner_x, window + windows, f + frames]))
        windows, frames = windows + t * down * across, frames + t
    return torch.cat(parts, dim=1)


def pack(segment):
    """Sorts patches by the segment (window or frame) they belong to, segments of equal size next to each other.

    segment (N,) ids -> order (N,), and runs [(number of segments, patches in each), ...] of the sorted patches.
    """
    counts = torch.bincount(segment)
    order = torch.argsort(counts[segment] * len(counts) + segment, stable=True)
    sizes, numbers = counts[counts > 0].unique(return_counts=True)
    return order, list(zip(numbers.tolist(), sizes.tolist()))


class PatchEmbed(nn.Module):
    """Patches (N, channels * frames * pixels) -> (N, width). Stored as the convolution that would also cut them."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches):
        # The patches are cut already, so the convolution is one matrix product (and much faster as one).
        return F.linear(patches.type_as(self.proj.weight), self.proj.weight.flatten(1))


class VisionAttention(nn.Module):
    """Among the patches of each segment, a window or a frame: x (N, width) sorted by them, runs as from `pack`."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, runs, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)         # (N, H, d)
        q, k = rotate(q, *rope), rotate(k, *rope)
        lengths = [number * size for number, size in runs]
        parts = []
        for run, *qkv in zip(runs, *(y.split(lengths) for y in (q, k, v))):
            parts.append(attention(*(y.unflatten(0, run) for y in qkv)).flatten(0, 1))
        return self.proj(torch.cat(parts).flatten(1))


class VisionBlock(nn.Module):
    """Attention and feed-forward, each after its norm."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)
        self.attn = VisionAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x, runs, rope):
        x = x + self.attn(self.norm1(x), runs, rope)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Joins 2x2 patches into one token of the language model: (N, width) -> (N/4, D)."""

    def __init__(self, config):
        super().__init__()
        self.patches = config.spatial_merge_size ** 2
        width = config.hidden_size * self.patches
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.out_hidden_size))

    def forward(self, x):
        return self.mlp(self.ln_q(x).unflatten(0, (-1, self.patches)).flatten(1))


class VisionTower(nn.Module):
    """Patches of any number of pictures -> embeddings that stand among those of words."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.offload = None                                                 # see Qwen2_5_VL.from_pretrained
        self.merger = PatchMerger(config)

    def rope(self, rows, columns):
        """(N,) rows and columns -> cos, sin (N, 1, d/2): one half turns with the row, the other with the column."""
        speed = frequencies(self.config.hidden_size // self.config.num_heads // 2, 10000.0, rows.device)
        angles = torch.cat([rows[:, None] * speed, columns[:, None] * speed], dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def forward(self, patches, grids):
        """patches (N, channels * frames * pixels) of all pictures in turn, grids a list of (t, h, w) -> (N/4, D)."""
        rows, columns, window, frame = patch_layout(grids, self.config)
        by_window, windows = pack(window)
        by_frame, frames = pack(frame)
        to_raster = torch.argsort(by_window)
        to_frames = to_raster[by_frame]                                     # from window order to frame order, and back
        index = torch.stack([rows, columns, by_window, by_frame, to_raster, to_frames, torch.argsort(to_frames)])
        rows, columns, by_window, by_frame, to_raster, to_frames, to_windows = index.to(patches.device)
        rope = self.rope(rows, columns)
        window_rope, frame_rope = [y[by_window] for y in rope], [y[by_frame] for y in rope]

        x = self.patch_embed(patches)[by_window]                            # (N, width)
        for i, block in enumerate(self.offload or self.blocks):
            if i in self.config.fullatt_block_indexes:
                x = block(x[to_frames], frames, frame_rope)[to_windows]     # (N, width)
            else:
                x = block(x, windows, window_rope)                          # (N, width)
        return self.merger(x[to_raster])                                    # (N/4, D)


class Attention(nn.Module):
    """Causal, with fewer heads of keys than of queries (GQA), and biases on q, k and v alone."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, keys)
        self.v_proj = nn.Linear(config.hidden_size, keys)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, rope, mask=None, cache=None):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)                           # q (B, T, H, d), k v (B, T, G, d)
        if cache is not None:                                               # a dict: each layer finds its own past
            if self in cache:
                k, v = (torch.cat([past, new], dim=1) for past, new in zip(cache[self], (k, v)))
            cache[self] = k, v
        # A single token after a cached prompt sees everything; is_causal would show it the first key alone.
        return self.o_proj(attention(q, k, v, mask, causal=mask is None and x.shape[1] > 1).flatten(-2))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each after its norm."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x, rope, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The language model without its head: word embeddings, layers, final norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Filled later: nn.Embedding's own start takes seconds, and on the meta device imports torch's compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.offload = None                                                 # see Qwen2_5_VL.from_pretrained
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rope(self, positions):
        """(3, B, T) positions -> cos, sin (B, T, 1, d/2). A pair of channels turns with one axis: see mrope_section."""
        speed = frequencies(self.config.head_dim, self.config.rope_theta, positions.device)
        axis = [axis for axis, number in enumerate(self.config.mrope_section) for _ in range(number)]
        angles = (positions[axis].movedim(0, -1) * speed)[:, :, None]
        return angles.cos(), angles.sin()

    def forward(self, x, positions, mask=None, cache=None, recompute=False):
        """x (B, T, D) embeddings, positions (3, B, T), mask (B, 1, T, T) or None for causal -> (B, T, D).

        recompute: keep only each layer's input for the backward pass. cache: a dict that this fills and reads; after a
        prompt, one token at a time.
        """
        rope = self.rope(positions.to(x.device))
        for layer in self.offload or self.layers:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache)
        return self.norm(x)


def mrope_positions(ids, images, videos, config):
    """Positions of one row of token ids (a list, without padding) -> (3, L) int64. ValueError if the grids do not fit.

    images, videos: iterators of (t, h, w, seconds per t) with h and w in merged patches. A text token has the same
    index on all axes. A picture starts after the largest index so far and spans (time, h, w); what follows starts after
    its largest index on any axis.
    """
    kinds, blocks, start, i = {config.image_token_id: images, config.video_token_id: videos}, [], 0, 0
    while i < len(ids):
        if ids[i] in kinds:
            t, h, w, seconds = next(kinds[ids[i]], (0, 0, 0, 0))
            if not 0 < t * h * w == ids[i:i + t * h * w].count(ids[i]):
                raise ValueError(f"the vision tokens at position {i} do not match their grid of {t} x {h} x {w} tokens")
            # In float32 as released, so that a product just below a whole number rounds to it here when it did there.
            times = (torch.arange(t, dtype=torch.float32) * seconds * config.vision_config.tokens_per_second).long()
            block = torch.cartesian_prod(times, torch.arange(h), torch.arange(w)).T
        else:
            length = next((n for n, token in enumerate(ids[i:]) if token in kinds), len(ids) - i)
            block = torch.arange(length).expand(3, -1)
        blocks.append(block + start)
        start, i = int(blocks[-1].max()) + 1, i + block.shape[1]
    return torch.cat(blocks, dim=1)


def left_padding_mask(attention_mask, queries):
    """(B, L) of 0 (padding) and 1 -> (B, 1, T, T) True where a row's token sees another; None if nothing is padded.

    A padding token sees itself: with nothing to see its softmax would be NaN, and NaN times zero weight would spread.
    """
    valid = attention_mask.bool().cpu()
    if valid.all():
        return None                                                         # SDPA's own causal kernel is much faster
    if not valid[:, -1].all() or (valid[:, :-1] & ~valid[:, 1:]).any():
        raise ValueError("attention_mask must be padded on the left: zeros first, then ones up to the last column")
    valid = F.pad(valid, (0, queries), value=True)[:, None]                 # (B, 1, T)
    length = valid.shape[-1]
    return (torch.ones(length, length).tril().bool() & valid | torch.eye(length).bool())[:, None]


class TiedHead(nn.Module):
    """Logits by the token embedding. The tuple hides it from state_dict: one tensor, one name, as in the checkpoint."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = (embedding,)

    def forward(self, x):
        return F.linear(x, self.embedding[0].weight.type_as(x))


class Qwen2_5_VL(nn.Module):
    """`visual`, `model` (the decoder) and `lm_head`. The config says which sizes; random weights as N(0, 0.02)."""

    def __init__(self, config=PRESETS["3B"]):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False             # training: keep each layer's input, recompute the rest
        self.visual = VisionTower(config.vision_config)
        self.model = Decoder(config)
        self.lm_head = (TiedHead(self.model.embed_tokens) if config.tie_word_embeddings
                        else nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        if not self.model.norm.weight.is_meta:      # there is nothing to fill, and normal_ would import torch's compiler
            self.apply(init_weights)

    def embed(self, input_ids, image_patches=None, image_grids=None, video_patches=None, video_grids=None):
        """(B, L) ids and patches as of `forward` -> (B, L, D): vision embeddings in place of their tokens."""
        weight, ids = self.model.embed_tokens.weight, input_ids.cpu()
        x = self.words(input_ids)
        for patches, grids, token in ((image_patches, image_grids, self.config.image_token_id),
                                      (video_patches, video_grids, self.config.video_token_id)):
            places = (ids.flatten() == token).nonzero()[:, 0]
            needed = sum(t * h * w for t, h, w in grids_of(grids)) // self.config.vision_config.spatial_merge_size ** 2
            times = showings(ids, token, needed)
            if len(places) != needed * times or (patches is None) != (grids is None):
                raise ValueError(f"the prompt has {len(places)} tokens of id {token}, the pictures have {needed}")
            if patches is not None:
                check_patches(patches, grids, self.config.vision_config)
                seen = self.visual(patches.to(weight.device), grids_of(grids)).type_as(x)           # (N/4, D)
                seen = seen.repeat(times, 1)
                x = x.flatten(0, 1).index_copy(0, places.to(x.device), seen).view_as(x)
        return x

    def words(self, ids):
        """Embeddings of token ids, in the dtype of the rest: an offloaded table keeps the one of its file."""
        table = self.model.embed_tokens
        return table(ids.to(table.weight.device)).to(self.model.norm.weight.dtype)

    def positions(self, input_ids, attention_mask=None, image_grid_thw=None, video_grid_thw=None,
                  second_per_grid_ts=None, queries=0):
        """(3, B, L + queries) int64 on the CPU. Queries count on from the last token as text does. Padding gets 0."""
        merge = self.config.vision_config.spatial_merge_size
        videos = grids_of(video_grid_thw)
        seconds = [1.0] * len(videos) if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist()
        if len(seconds) != len(videos):
            raise ValueError(f"{len(seconds)} second_per_grid_ts for {len(videos)} videos")
        images = [(t, h // merge, w // merge, 0.0) for t, h, w in grids_of(image_grid_thw)]
        videos = [(t, h // merge, w // merge, s) for (t, h, w), s in zip(videos, seconds)]
        rows, length = input_ids.tolist(), input_ids.shape[1]
        images, videos = (
            iter(blocks * showings(input_ids, token, sum(t * h * w for t, h, w, _ in blocks)))
            for blocks, token in ((images, self.config.image_token_id), (videos, self.config.video_token_id)))
        padding = [0] * len(rows) if attention_mask is None else (length - attention_mask.sum(dim=1)).tolist()
        result = torch.zeros(3, len(rows), length + queries, dtype=torch.long)
        for b, (ids, skip) in enumerate(zip(rows, padding)):
            found = mrope_positions(ids[skip:], images, videos, self.config)
            result[:, b, skip:length] = found
            result[:, b, length:] = found.max() + 1 + torch.arange(queries)
        return result

    def forward(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None, pixel_values_videos=None,
                video_grid_thw=None, second_per_grid_ts=None, queries=None, position_ids=None):
        """Hidden states after the final norm, (B, L + Q, D), in the weights' dtype.

        Args:
            input_ids: (B, L) int64. Best left on the CPU, as the processor returns it: positions are computed there.
            attention_mask: (B, L), 0 for padding, which must be on the left and changes nothing for the real tokens.
            pixel_values, pixel_values_videos: (N, 1176) patches of the images, of the videos, of all rows in turn; or
                of one row, if every row shows the same.
            image_grid_thw, video_grid_thw: (n, 3) their frames, rows and columns in patches.
            second_per_grid_ts: (n videos,) seconds from one temporal patch to the next; 1.0 if left out, as released.
            queries: (Q, D) or (B, Q, D) embeddings to stand after the last token.
            position_ids: (3, B, L + Q), only to override the positions.

        Raises ValueError where tokens, pictures, grids or the mask do not fit each other.
        """
        count = 0 if queries is None else queries.shape[-2]
        mask = None if attention_mask is None else left_padding_mask(attention_mask, count)
        if position_ids is None:
            position_ids = self.positions(input_ids, attention_mask, image_grid_thw, video_grid_thw,
                                          second_per_grid_ts, count)                            # (3, B, L + Q)
        x = self.embed(input_ids, pixel_values, image_grid_thw, pixel_values_videos,
                       video_grid_thw)                                                          # (B, L, D)
        if queries is not None:
            queries = queries.to(x).expand(len(x), -1, -1)                                      # (B, Q, D)
            x = torch.cat([x, queries], dim=1)                                                  # (B, L + Q, D)
        mask = mask if mask is None else mask.to(x.device)                                      # (B, 1, L + Q, L + Q)
        return self.model(x, position_ids, mask, recompute=self.gradient_checkpointing)         # (B, L + Q, D)

    @torch.no_grad()
    def greedy(self, inputs, stop, max_new_tokens):
        """The likeliest continuation of one prompt as a list of ids, up to and without the first id in `stop`."""
        prompt, ids, cache = inputs["input_ids"], [], {}
        if len(prompt) != 1:
            raise ValueError(f"generate takes one prompt, not a batch of {len(prompt)}")
        if inputs.get("attention_mask") is not None:
            prompt = prompt[:, inputs["attention_mask"][0].bool()]                              # drop the padding
        images, videos = inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
        positions = self.positions(prompt, None, images, videos, inputs.get("second_per_grid_ts"))
        x = self.embed(prompt, inputs.get("pixel_values"), images, inputs.get("pixel_values_videos"), videos)
        start = int(positions.max()) + 1
        while len(ids) < max_new_tokens:
            token = self.lm_head(self.model(x, positions, cache=cache)[:, -1:]).argmax(dim=-1)  # (1, 1)
            if int(token) in stop:
                break
            positions = torch.full((3, 1, 1), start + len(ids))
            ids.append(int(token))
            x = self.words(token)
        return ids

    def generate(self, inputs, processor, max_new_tokens=128):
        """Answers one prompt: what `processor` returned -> text, without sampling. Stops at the end of the turn."""
        ids = self.greedy(inputs, processor.stop_ids, max_new_tokens)
        return processor.tokenizer.decode(ids, skip_special_tokens=True)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, offload=None):
        """path: a folder with config.json and safetensors (one file, or an index of shards), or one file beside it.

        dtype None keeps what is stored. On the CPU tensors are mapped, not read. Without a config.json it is the 3B.
        offload: leaves the weights of the blocks of both towers in their files; offload(blocks, read), with read(i) ->
        {name: tensor} of block i, makes what a tower then walks through in place of its blocks (see connector.py).
        Raises FileNotFoundError, or ValueError for anything that does not fit.
        """
        files = find_files(Path(path))
        with torch.device("meta"):
            model = cls(read_config(files[0].parent / "config.json"))
        tensors = read_tensors(files, "cpu" if offload else device)
        if model.config.tie_word_embeddings and "lm_head.weight" in tensors:
            # Some exports store the tied head a second time. Only a copy may be dropped: otherwise it is no tied model.
            if torch.equal(tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight", torch.empty(0))):
                del tensors["lm_head.weight"]
        check_tensors(model.state_dict(), tensors, path)
        towers = {"visual.blocks.": model.visual, "model.layers.": model.model} if offload else {}
        kept = "model.embed_tokens.weight" if offload else ""       # on the CPU it then stays mapped, and few rows are read
        model.load_state_dict({name: t.to("meta" if name.startswith(tuple(towers)) else device,
                                          t.dtype if name == kept else dtype or t.dtype)
                               for name, t in tensors.items()}, assign=True)
        for prefix, tower in towers.items():
            blocks = model.get_submodule(prefix.rstrip("."))
            tower.offload = offload(blocks, partial(read_block, files, prefix, device, dtype))
        return model.eval()

    def save_pretrained(self, folder):
        """Writes config.json (the hub's layout) and model.safetensors (official names). ValueError if it has LoRA."""
        if lora_layers(self):
            raise ValueError("this model carries LoRA: merge_lora(model) first, or save lora_state_dict(model) instead")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        replace(folder / "model.safetensors", lambda file: save_file(tensors, file, metadata={"format": "pt"}))
        config = json.dumps(self.config.to_dict(), indent=2) + "\n"
        replace(folder / "config.json", lambda file: file.write_text(config))


def init_weights(module):
    """N(0, 0.02) and zero biases, the family's initialisation: PyTorch's N(0, 1) embedding would swamp a tied head."""
    if isinstance(module, (nn.Linear, nn.Conv3d, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def showings(input_ids, token, needed):
    """How often the pictures, of `needed` tokens in all, are shown: by every row, if each has that many, else once."""
    return len(input_ids) if ((input_ids == token).sum(dim=1) == needed).all() else 1


def grids_of(grid_thw):
    """(n, 3) tensor, list or None -> list of (t, h, w)."""
    return [] if grid_thw is None else [tuple(grid) for grid in torch.as_tensor(grid_thw).tolist()]


def check_patches(patches, grids, config):
    """ValueError unless the patches are those of the grids, cut as the config says."""
    width = config.in_channels * config.temporal_patch_size * config.patch_size ** 2
    number = sum(t * h * w for t, h, w in grids_of(grids))
    if tuple(patches.shape) != (number, width):
        raise ValueError(f"patches are {tuple(patches.shape)}; their grids and the config ask for ({number}, {width})")


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Linear):
    """y = W x + b + alpha/rank * B A x. Keeps the names `weight` and `bias`; A and B are float32 whatever W is.

    Float32 because steps of 1e-5 vanish in bfloat16 weights. B starts at zero, so nothing changes before training.
    """

    def __init__(self, linear, rank, alpha, device=None):
        nn.Module.__init__(self)                                    # not Linear's: the weight is taken over, not made
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.rank, self.alpha = linear.weight, linear.bias, rank, alpha
        options = {"bias": False, "device": device or linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(linear.in_features, rank, **options)  # nn.Linear starts as kaiming_uniform(a=sqrt(5))
        self.lora_B = nn.Linear(rank, linear.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        update = self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))) * (self.alpha / self.rank)
        return super().forward(x) + update.type_as(x)

    def merged(self):
        """The plain Linear that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        update = self.lora_B.weight.float() @ self.lora_A.weight.float() * (self.alpha / self.rank)
        linear.weight = nn.Parameter((self.weight.float() + update).type_as(self.weight).detach())
        linear.bias = self.bias
        return linear


def lora_layers(model):
    """[(name, LoRALinear)] in the order of the model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def add_lora(model, rank=64, alpha=64, targets=LORA_TARGETS):
    """Wraps the targeted layers of the language model (the vision tower has some of these names), freezes all else.

    Raises ValueError for a target that no layer has, a rank below 1, or a model that has LoRA already.
    """
    if lora_layers(model):
        raise ValueError("the model has LoRA already; merge_lora(model) first")
    layers = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    unknown = set(targets) - {name.split(".")[-1] for name in layers}
    if unknown or rank < 1 or not targets:
        raise ValueError(f"LoRA of rank {rank} on {list(targets)}: rank is 1 or more, targets are of {LORA_TARGETS}")
    model.requires_grad_(False)
    device = model.model.embed_tokens.weight.device                 # offloaded layers have none of their own
    for name, linear in layers.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in targets:
            setattr(model.model.get_submodule(parent), leaf, LoRALinear(linear, rank, alpha, device))


def merge_lora(model):
    """Adds the updates to the weights, in float32, and puts plain layers back: no cost is left. ValueError if none."""
    if not lora_layers(model):
        raise ValueError("the model has no LoRA to merge")
    for name, layer in lora_layers(model):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.merged())


def lora_state_dict(model):
    """{name: tensor} under the names of PEFT's adapter_model.safetensors."""
    return {PEFT_PREFIX + name: t for name, t in model.state_dict().items() if ".lora_" in name}


def load_lora(model, tensors):
    """Fills the LoRA that add_lora made. tensors: {PEFT's name: tensor}, either layout. ValueError unless all fit."""
    given = {official_name(name.removeprefix(PEFT_PREFIX)): t for name, t in tensors.items()}
    expected = {name: t for name, t in model.state_dict().items() if ".lora_" in name}
    if not expected:
        raise ValueError("the model has no LoRA to fill: call add_lora(model, rank, alpha, targets) first")
    check_tensors(expected, given, "the LoRA")
    given = {name: t.to(model.model.embed_tokens.weight.device) for name, t in given.items()}
    model.load_state_dict(given, strict=False, assign=True)


def adapter_config(model):
    """What PEFT's adapter_config.json must say beside lora_state_dict(model) to be read there."""
    layers = lora_layers(model)
    names = sorted({name.split(".")[-1] for name, _ in layers})
    return {"peft_type": "LORA", "r": layers[0][1].rank, "lora_alpha": layers[0][1].alpha, "bias": "none",
            "target_modules": rf"model\.(language_model\.)?layers\.\d+\.\w+\.({'|'.join(names)})"}


# Newer exports put both towers below `model`: their prefix -> the official one.
RENAMES = {"model.visual.": "visual.", "model.language_model.": "model."}


def official_name(name):
    """A tensor's name in any export -> its name in the official checkpoint, which is ours."""
    for theirs, ours in RENAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def read_json(file):
    """The object in a JSON file. ValueError that names the file if there is none in it."""
    try:
        given = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{file} should hold a JSON object, not a {type(given).__name__}")
    return given


def read_config(file):
    """Qwen2_5_VLConfig from a config.json; the 3B where there is none. ValueError if it describes no such model."""
    try:
        return Qwen2_5_VLConfig.from_dict(read_json(file)) if file.exists() else PRESETS["3B"]
    except (TypeError, AttributeError) as error:                    # a word where a number should be, and the like
        raise ValueError(f"{file} is not a Qwen2.5-VL config: {error}") from None


def find_files(path):
    """The files that hold the weights: path itself, or in a folder the shards of an index, or the only .safetensors."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; it should be a folder with config.json and *.safetensors")
    for index in sorted(path.glob("*.safetensors.index.json")):
        files = [path / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{path}: {index.name} names {', '.join(missing)}, not found there")
        return files
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise FileNotFoundError(f"{path} should hold one .safetensors file or an index of shards ({names} found)")
    return found


def read_tensors(files, device, wanted=lambda name: True):
    """{official name: tensor} of all files, as far as `wanted`; on the CPU mapped rather than read."""
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device=str(device)) as stored:
                names = {official_name(name): name for name in stored.keys()}
                tensors |= {ours: stored.get_tensor(name) for ours, name in names.items() if wanted(ours)}
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated, damaged, or not a safetensors file: {error}") from None
    return tensors


def read_block(files, prefix, device, dtype, i):
    """{name: tensor} of the block whose official names start with `prefix` and i."""
    block = f"{prefix}{i}."
    tensors = read_tensors(files, "cpu", lambda name: name.startswith(block))
    return {name.removeprefix(block): t.to(device, dtype or t.dtype) for name, t in tensors.items()}


def check_tensors(expected, given, source):
    """Raises one ValueError that names what is missing, left over, or of another shape."""
    shapes = {name: list(t.shape) for name, t in expected.items()}
    odd = {"missing": [name for name in shapes if name not in given],
           "unexpected": [name for name in given if name not in shapes],
           "misshaped": [f"{name} {list(t.shape)} instead of {shapes[name]}" for name, t in given.items()
                         if name in shapes and list(t.shape) != shapes[name]]}
    problems = [f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
                for kind, names in odd.items() if names]
    if problems:
        raise ValueError(f"{source} does not fit this model: {'; '.join(problems)}")


def replace(file, write):
    """Writes by way of a temporary file, so that a crash never leaves half a file under the real name."""
    partial = file.with_name(file.name + ".partial")
    write(partial)
    os.replace(partial, file)


SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SYSTEM_PROMPT = "You are a helpful assistant."          # what the chat template says when nobody says anything else


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """The nearest size with sides in multiples of `factor` and an area in bounds. The aspect ratio is almost kept."""
    if max(height, width) >= 200 * min(height, width):
        raise ValueError(f"a picture of {width}x{height} is too narrow: one side must be less than 200 times the other")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return h, w


def picture(image):
    """A PIL image or uint8 (H, W, 3) array -> RGB PIL image. ValueError for anything else."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"a picture is {array.dtype} {array.shape}; it should be PIL or uint8 (height, width, 3)")
    return Image.fromarray(np.ascontiguousarray(array))


class Processor:
    """The official chat template, resizing and patches. Settings are those of preprocessor_config.json.

    `max_pixels` (of one picture or frame) is the knob for memory and time: 28 x 28 pixels become one token, and in a
    clip 28 x 28 pixels of two frames.
    """

    def __init__(self, tokenizer, patch_size=14, temporal_patch_size=2, merge_size=2, min_pixels=3136,
                 max_pixels=12845056, image_mean=(0.48145466, 0.4578275, 0.40821073),
                 image_std=(0.26862954, 0.26130258, 0.27577711)):
        self.tokenizer = tokenizer                                  # a tokenizers.Tokenizer
        self.patch_size, self.temporal_patch_size, self.merge_size = patch_size, temporal_patch_size, merge_size
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.ids = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
        if missing := [name for name, number in self.ids.items() if number is None]:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}")
        added = tokenizer.get_added_tokens_decoder()
        self.reserved = {number for number, token in added.items() if token.special} | set(self.ids.values())
        end = tokenizer.token_to_id("<|endoftext|>")
        self.pad_id = self.ids["<|im_end|>"] if end is None else end
        self.stop_ids = {self.ids["<|im_end|>"], self.pad_id}

    @classmethod
    def from_pretrained(cls, folder):
        """Reads tokenizer.json and preprocessor_config.json. Raises FileNotFoundError or ValueError."""
        folder = Path(folder)
        for file in (folder / "tokenizer.json", folder / "preprocessor_config.json"):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; it comes with the Qwen2.5-VL weights")
        raw = read_json(folder / "preprocessor_config.json")
        for ours, theirs in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if raw.get(ours) is None:                               # newer exports have the bounds under other names
                raw[ours] = (raw.get("size") or {}).get(theirs)
        names = ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels", "image_mean",
                 "image_std")
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:                                  # tokenizers raises bare Exception
            raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from None
        return cls(tokenizer, **{name: raw[name] for name in names if raw.get(name) is not None})

    def save_pretrained(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
                    "patch_size": self.patch_size, "temporal_patch_size": self.temporal_patch_size,
                    "merge_size": self.merge_size, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels,
                    "image_mean": self.image_mean, "image_std": self.image_std}
        text = json.dumps(settings, indent=2) + "\n"
        replace(folder / "preprocessor_config.json", lambda file: file.write_text(text))
        replace(folder / "tokenizer.json", lambda file: self.tokenizer.save(str(file)))

    def encode(self, text):
        """Token ids of text. ValueError if it spells a special token: words must not open a turn or place a picture."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if found := self.reserved.intersection(ids):
            raise ValueError(f"text must not contain the special token {self.tokenizer.id_to_token(min(found))}")
        return ids

    def patches(self, frames):
        """List of PIL images of one size -> float32 (N, channels * frames * pixels), and their grid (t, h, w)."""
        patch, merge, depth = self.patch_size, self.merge_size, self.temporal_patch_size
        height, width = smart_resize(frames[0].height, frames[0].width, patch * merge, self.min_pixels, self.max_pixels)
        pixels = np.stack([np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in frames])
        pixels = np.concatenate([pixels, pixels[-1:].repeat(-len(pixels) % depth, axis=0)])  # fill the last patch
        t, h, w = len(pixels) // depth, height // patch, width // patch
        cut = pixels.reshape(t, depth, h // merge, merge, patch, w // merge, merge, patch, 3)
        cut = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3, -1)   # 2x2 to merge are neighbours
        # A channel has 256 values: normalise those, with the roundings of the release, and look them up.
        mean, std = np.float32(self.image_mean)[:, None], np.float32(self.image_std)[:, None]
        table = ((np.arange(256) * (1 / 255)).astype(np.float32) - mean) / std      # (3, 256)
        values = np.stack([table[channel].take(cut[:, channel]) for channel in range(3)], axis=1)
        return torch.from_numpy(values).flatten(1), (t, h, w)

    def __call__(self, instruction, image=None, video=None, references=(), system=None, fps=2.0):
        """One prompt, in the order of the paper: system prompt, instruction, source image or video, references.

        Args:
            instruction: text; may be empty.
            image: the source, a PIL image or uint8 (H, W, 3).
            video: or else the source, uint8 (T, H, W, 3), sampled at `fps` frames per second.
            references: pictures, each as `image`, of any sizes.
            system: the system prompt; None for the chat template's own.

        Returns a dict of CPU tensors for Qwen2_5_VL.forward, batch 1. Raises ValueError for what cannot be shown.
        """
        if image is not None and video is not None:
            raise ValueError("the source is an image or a video, not both")
        system = SYSTEM_PROMPT if system is None else system
        if not isinstance(instruction, str) or not isinstance(system, str):
            raise ValueError("instruction and system prompt must be strings")
        inputs, shown = {}, []
        if video is not None:
            inputs |= self.video(video, fps)
            shown.append(("<|video_pad|>", inputs["video_grid_thw"][0]))
        if pictures := [picture(x) for x in (*([] if image is None else [image]), *references)]:
            patches, grids = zip(*(self.patches([x]) for x in pictures))
            inputs |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
            shown += [("<|image_pad|>", grid) for grid in inputs["image_grid_thw"]]
        start, end = [self.ids["<|im_start|>"]], [self.ids["<|im_end|>"], *self.encode("\n")]
        ids = start + self.encode("system\n" + system) + end
        ids += start + self.encode("user\n" + instruction)
        for name, grid in shown:
            pads = [self.ids[name]] * (int(grid.prod()) // self.merge_size ** 2)
            ids += [self.ids["<|vision_start|>"], *pads, self.ids["<|vision_end|>"]]
        ids += end + start + self.encode("assistant\n")
        return {"input_ids": torch.tensor([ids]), **inputs}

    def video(self, frames, fps):
        frames = np.asarray(frames)
        if frames.ndim != 4 or not len(frames):
            raise ValueError(f"a video is {frames.dtype} {frames.shape}; it should be uint8 (frames, height, width, 3)")
        if not 0 < fps < math.inf:
            raise ValueError(f"fps is {fps}; it should be the frames per second of the video, above 0")
        patches, grid = self.patches([picture(frame) for frame in frames])
        return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid]),
                "second_per_grid_ts": torch.tensor([self.temporal_patch_size / fps])}

    def collate(self, prompts, same_pictures=False):
        """What several calls returned -> one batch, padded on the left, with an attention_mask.

        same_pictures: all prompts show the same, so the vision tower need see them only once.
        """
        length = max(prompt["input_ids"].shape[1] for prompt in prompts)
        left = [length - prompt["input_ids"].shape[1] for prompt in prompts]
        ids = [F.pad(prompt["input_ids"], (n, 0), value=self.pad_id) for prompt, n in zip(prompts, left)]
        mask = torch.arange(length) >= torch.tensor(left)[:, None]
        batch = {"input_ids": torch.cat(ids), "attention_mask": mask.long()}
        for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
            if found := [prompt[key] for prompt in (prompts[:1] if same_pictures else prompts) if key in prompt]:
                batch[key] = torch.cat(found)
        return batch


def open_media(path, count):
    """An image file -> {"image"}; a clip -> {"video", "fps"}: `count` frames spread evenly, first and last included."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return {"image": ImageOps.exif_transpose(Image.open(path))}
    except Image.UnidentifiedImageError:
        pass
    with imageio.get_reader(path, "ffmpeg") as reader:
        length, rate = reader.count_frames(), reader.get_meta_data()["fps"]
        wanted = set(np.linspace(0, length - 1, min(length, count)).round().astype(int).tolist())
        video = np.stack([frame for i, frame in enumerate(reader) if i in wanted])
    return {"video": video, "fps": rate * max(1, len(video) - 1) / max(1, length - 1)}


def main():
    """Prints the answer to a question about a picture; ends with code 2 after one line of what is wrong."""
    parser = argparse.ArgumentParser(description="Asks Qwen2.5-VL about a picture or a clip.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shapes = Path(__file__).resolve().parent / "weights" / "shapes"
    parser.add_argument("media", nargs="?", default=shapes / "example.png", help="an image or a video file")
    parser.add_argument("question", nargs="?", default="what is in the picture?", help="what to ask")
    parser.add_argument("--weights", default=shapes / "mllm",
                        help="folder with config.json, *.safetensors, tokenizer.json")
    parser.add_argument("--frames", type=int, default=13, help="how many frames of a clip are shown")
    parser.add_argument("--max-pixels", type=int, default=602112, help="larger pictures and frames are scaled down")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    args = parser.parse_args()
    try:
        processor = Processor.from_pretrained(args.weights)
        processor.max_pixels = min(processor.max_pixels, args.max_pixels)
        inputs = processor(args.question, **open_media(args.media, args.frames))
        model = Qwen2_5_VL.from_pretrained(args.weights, args.device)
        print(model.generate(inputs, processor, args.max_new_tokens))
    except (ValueError, OSError) as error:
        parser.exit(2, f"mllm.py: {error}\n")


if __name__ == "__main__":
    main()
