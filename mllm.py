"""Qwen2.5-VL in plain PyTorch: from pictures, words and learnable queries to hidden states.

    pictures ─► patches ─► vision tower ─► one embedding per 2x2 patches ─┐
    words ─► token embeddings ────────────────────────────────────────────┴► + queries ─► decoder

What is unusual, compared with an ordinary vision-language model:
- Vision attention is local, in windows of 112x112 pixels. 4 of the 32 blocks see the whole frame.
  A patch spans 2 frames, and no block sees more of a clip than these 2 at once.
- Positions have three axes: time, row and column (M-RoPE). A text token advances all three
  together. In a clip the time axis follows the seconds.
- `forward` returns hidden states after the final norm, not logits. The editor keeps those at the
  queries. Queries follow the last token and take the positions of text there. The decoder stays
  causal: a query sees the prompt and the queries before it. `lm_head` and `generate` make a chat
  model.
- LoRA adapts the language model only. Its tensors have PEFT's names.

Sources: the Qwen2.5-VL report (arXiv 2502.13923) and its release in transformers 4.49. The model
was trained with the positions of that release. Later versions place text after a clip differently:
4.56 first rounds the seconds per frame down, 5.x ignores the time axis. Parameter names are
official.

Letters: B batch, L prompt tokens, Q queries, T = L + Q, D width, N patches, H heads, G key heads,
d head width.

    python mllm.py [PHOTO ["What is this?"]] [--weights FOLDER]
"""

import argparse
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower of the 3B and the 7B. Only their `out_hidden_size` differs."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames
    spatial_merge_size: int = 2  # 2x2 patches become one token of the language model
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple = (7, 15, 23, 31)
    out_hidden_size: int = 2048
    tokens_per_second: float = 2.0  # M-RoPE steps per second of video

    def __post_init__(self):
        if self.num_heads < 1 or self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"vision hidden_size {self.hidden_size}: not 4 * num_heads * n")
        if self.window_size < self.spatial_merge_size * self.patch_size:
            raise ValueError(
                f"window_size {self.window_size} holds no {self.patch_size}-px patches"
            )


@dataclass(frozen=True)
class Qwen2_5_VLConfig:
    """The fields of the hub's config.json. The defaults are Qwen2.5-VL-3B."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple = (16, 24, 24)  # channel pairs that turn with time, row, column
    tie_word_embeddings: bool = True
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652  # not used here; other programs need both in config.json
    vision_end_token_id: int = 151653
    vision_config: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self):
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} is not half of {self.head_dim}")

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw):
        """Reads the hub's config.json, flat or nested as in newer exports. Raises ValueError."""
        return config_from_dict(raw)

    def to_dict(self):
        """The entries of the hub's config.json."""
        return config_to_dict(self)


PRESETS = {
    "3B": Qwen2_5_VLConfig(),
    "tiny": Qwen2_5_VLConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(2, 3, 3),
        image_token_id=505,
        video_token_id=506,
        vision_config=VisionConfig(
            depth=4,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            patch_size=8,
            window_size=32,
            fullatt_block_indexes=(1, 3),
            out_hidden_size=64,
        ),
    ),
}


def attention(q, k, v, mask=None, causal=False):
    """q (B, T, H, d), k and v (B, S, G, d) -> like q.

    mask: (B, 1, 1 or T, S), True where seen, or numbers that are added to the scores.
    """
    if k.shape[2] != q.shape[2]:  # explicit: not every SDPA kernel takes fewer key heads
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.transpose(1, 2)


def rotate(x, cos, sin):
    """x (..., H, d), cos and sin (..., 1, d/2). Channels i and i + d/2 pair; in Wan, neighbours."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def frequencies(width, theta, device):
    """(width/2,) angles per position, from 1 down to about 1/theta."""
    return 1.0 / theta ** (torch.arange(0, width, 2, device=device).float() / width)


class RMSNorm(nn.Module):
    """Normalises in float32, since a mean of squares loses digits in bfloat16.

    As released, the result is rounded to x's dtype before the gain multiplies it.
    """

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.type_as(x)


class SwiGLU(nn.Module):
    """The feed-forward layer of vision tower and decoder. Only the vision tower has biases."""

    def __init__(self, width, inner, bias):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# The vision tower. The patches of all pictures form one sequence, in the checkpoint's order: frame
# by frame, then merged patches in raster order, then the 2x2 patches of each.


def patch_layout(grids, config):
    """Computes the row, column and window slot of each patch.

    Args:
        grids: list of (frames, rows, columns) of each picture, in patches.

    Returns rows, columns and slots, (N,) each, and (windows, capacity). A window has `capacity`
    slots. At the edges of a picture some slots stay empty.
    """
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size  # of a window, in merged patches
    capacity = (side * merge) ** 2
    rows, columns, slots, windows = [], [], [], 0
    for t, h, w in grids:
        axes = map(torch.arange, (t, h // merge, w // merge, merge, merge))
        frame, y, x, inner_y, inner_x = torch.cartesian_prod(*axes).T
        down, across = -(-h // merge // side), -(-w // merge // side)
        window = windows + (frame * down + y // side) * across + x // side
        within = ((y % side * side + x % side) * merge + inner_y) * merge + inner_x
        rows.append(y * merge + inner_y)
        columns.append(x * merge + inner_x)
        slots.append(window * capacity + within)
        windows += t * down * across
    return torch.cat(rows), torch.cat(columns), torch.cat(slots), (windows, capacity)


class PatchEmbed(nn.Module):
    """Patches (N, channels * frames * pixels) -> (N, width).

    The weight is that of a convolution that also cuts the patches. Here they are already cut, so
    one matrix product is enough.
    """

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, kernel, bias=False)

    def forward(self, patches):
        return F.linear(patches.type_as(self.proj.weight), self.proj.weight.flatten(1))


class FrameAttention:
    """Each patch attends to its whole frame."""

    def __init__(self, grids):
        self.grids = grids

    def __call__(self, q, k, v):
        """q, k, v (N, H, d) -> (N, H, d)."""
        sizes = [t * h * w for t, h, w in self.grids]
        outputs = []
        for (t, h, w), *qkv in zip(self.grids, q.split(sizes), k.split(sizes), v.split(sizes)):
            frames = [x.unflatten(0, (t, h * w)) for x in qkv]  # (t, h*w, H, d)
            outputs.append(attention(*frames).flatten(0, 1))
        return torch.cat(outputs)


class WindowAttention:
    """Each patch attends to its window."""

    def __init__(self, slots, shape):
        self.slots, self.shape = slots, shape  # shape: (windows, capacity)
        filled = torch.zeros(math.prod(shape), dtype=torch.bool, device=slots.device)
        filled[slots] = True
        self.mask = None if len(slots) == len(filled) else filled.view(shape[0], 1, 1, shape[1])

    def __call__(self, q, k, v):
        """q, k, v (N, H, d) -> (N, H, d)."""
        q, k, v = self.to_windows(q), self.to_windows(k), self.to_windows(v)
        return attention(q, k, v, self.mask).flatten(0, 1)[self.slots]

    def to_windows(self, x):
        """(N, H, d) -> (windows, capacity, H, d), zeros in the empty slots."""
        empty = x.new_zeros(math.prod(self.shape), *x.shape[1:])
        return empty.index_copy(0, self.slots, x).unflatten(0, self.shape)


class VisionAttention(nn.Module):
    """x (N, width), rope: cos and sin (N, 1, d/2), attend: one of the above -> (N, width)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, rope, attend):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (N, H, d)
        return self.proj(attend(rotate(q, *rope), rotate(k, *rope), v).flatten(1))


class VisionBlock(nn.Module):
    """Attention and feed-forward, each after its norm."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.norm2 = RMSNorm(config.hidden_size)
        self.attn = VisionAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x, rope, attend):
        x = x + self.attn(self.norm1(x), rope, attend)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Joins 2x2 patches into one token of the language model: (N, width) -> (N/4, D)."""

    def __init__(self, config):
        super().__init__()
        self.patches = config.spatial_merge_size**2
        width = config.hidden_size * self.patches
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.out_hidden_size)
        )

    def forward(self, x):
        return self.mlp(self.ln_q(x).unflatten(0, (-1, self.patches)).flatten(1))


class VisionTower(nn.Module):
    """Patches of any number of pictures -> embeddings for the language model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def rope(self, rows, columns):
        """(N,) rows and columns -> cos and sin (N, 1, d/2), half of the pairs for each."""
        head_dim = self.config.hidden_size // self.config.num_heads
        speed = frequencies(head_dim // 2, 10000.0, rows.device)
        angles = torch.cat([rows[:, None] * speed, columns[:, None] * speed], dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def forward(self, patches, grids):
        """patches (N, channels * frames * pixels), a grid (t, h, w) per picture -> (N/4, D)."""
        rows, columns, slots, shape = patch_layout(grids, self.config)
        rope = self.rope(rows.to(patches.device), columns.to(patches.device))
        windows = WindowAttention(slots.to(patches.device), shape)
        frames = FrameAttention(grids)
        x = self.patch_embed(patches)                                           # (N, width)
        for i, block in enumerate(self.blocks):
            full = i in self.config.fullatt_block_indexes
            x = block(x, rope, frames if full else windows)                     # (N, width)
        return self.merger(x)                                                   # (N/4, D)


# The language model.


class Attention(nn.Module):
    """Causal attention with fewer key heads than query heads (GQA). q, k and v have biases."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, keys)
        self.v_proj = nn.Linear(config.hidden_size, keys)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, rope, mask=None, cache=None):
        q = rotate(self.heads(self.q_proj(x)), *rope)  # (B, T, H, d)
        k = rotate(self.heads(self.k_proj(x)), *rope)  # (B, T, G, d)
        v = self.heads(self.v_proj(x))  # (B, T, G, d)
        if cache is not None:  # a dict: layer -> its past keys and values
            if self in cache:
                past_k, past_v = cache[self]
                k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
            cache[self] = k, v
        # A single token after a cached prompt sees everything; is_causal would show it one key.
        causal = mask is None and x.shape[1] > 1
        return self.o_proj(attention(q, k, v, mask, causal).flatten(-2))

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim))


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
        # Zeros: nn.Embedding's own initialisation takes seconds, on the meta device too.
        table = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rope(self, positions):
        """(3, B, T) positions -> cos and sin (B, T, 1, d/2). Each channel pair follows one axis."""
        config = self.config
        speed = frequencies(config.head_dim, config.rope_theta, positions.device)
        sections = torch.tensor(config.mrope_section)
        axis = torch.arange(3).repeat_interleave(sections, output_size=config.head_dim // 2)
        angles = (positions[axis].movedim(0, -1) * speed)[:, :, None]
        return angles.cos(), angles.sin()

    def forward(self, x, positions, mask=None, cache=None):
        """x (B, T, D), positions (3, B, T), mask (B, 1, T, T) or None for causal -> (B, T, D).

        cache: a dict that each call reads and extends. After the prompt, a call takes one token.
        """
        rope = self.rope(positions.to(x.device))
        for layer in self.layers:
            x = layer(x, rope, mask, cache)
        return self.norm(x)


def mrope_positions(ids, images, videos, config):
    """Positions (3, L) int64 of one prompt, a list of token ids without padding.

    images, videos: iterators of (t, h, w, seconds per t), h and w in merged patches. A text token
    has the same index on all axes. A picture starts after the largest index so far and spans
    (time, h, w). Text after it starts after its largest index on any axis. Raises ValueError if
    the grids do not fit.
    """
    pictures = {config.image_token_id: images, config.video_token_id: videos}
    blocks, start, i = [], 0, 0
    while i < len(ids):
        if ids[i] in pictures:
            t, h, w, seconds = next(pictures[ids[i]], (0, 0, 0, 0))
            if not 0 < t * h * w == ids[i : i + t * h * w].count(ids[i]):
                raise ValueError(f"the vision tokens at {i} do not fit their grid {t} x {h} x {w}")
            # float32 as released: float64 could truncate some products to another integer.
            times = torch.arange(t, dtype=torch.float32) * seconds
            times = (times * config.vision_config.tokens_per_second).long()
            block = torch.cartesian_prod(times, torch.arange(h), torch.arange(w)).T
        else:
            length = 1
            while i + length < len(ids) and ids[i + length] not in pictures:
                length += 1
            block = torch.arange(length).expand(3, -1)
        blocks.append(block + start)
        start = int(blocks[-1].max()) + 1
        i += block.shape[1]
    return torch.cat(blocks, dim=1)


def left_padding_mask(attention_mask, queries, like):
    """(B, L) of 0 (padding) and 1 -> (B, 1, T, T), 0 where seen, else -inf; None: no padding.

    A padding token sees itself. Its softmax over nothing would be NaN, and NaN would spread. SDPA
    would turn True and False into these numbers in each layer, and training would keep them all.
    It would copy rows, too, unless they lie a multiple of 8 apart. `like` has dtype and device.
    """
    real = attention_mask.bool().cpu()
    if real.all():
        return None  # SDPA's own causal kernel is much faster
    if not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError("attention_mask must be padded on the left: zeros first, then ones")
    real = F.pad(real, (0, queries), value=True).to(like.device)  # (B, T)
    B, T = real.shape
    options = {"dtype": torch.bool, "device": like.device}
    seen = torch.ones(T, T, **options).tril() & real[:, None] | torch.eye(T, **options)  # (B, T, T)
    bias = like.new_zeros(B, 1, T, -(-T // 8) * 8)[..., :T]
    return bias.masked_fill_(~seen[:, None], -math.inf)


class TiedHead(nn.Module):
    """Logits from the word embeddings. The tuple hides their weight from state_dict()."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = (embedding,)

    def forward(self, x):
        return F.linear(x, self.embedding[0].weight.type_as(x))


class Qwen2_5_VL(nn.Module):
    """The vision tower `visual`, the decoder `model`, and `lm_head`."""

    def __init__(self, config=PRESETS["3B"]):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision_config)
        self.model = Decoder(config)
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.model.embed_tokens)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_grid_thw=None,
        pixel_values_videos=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        queries=None,
    ):
        """Hidden states after the final norm, (B, L + Q, D), in the weights' dtype.

        Args:
            input_ids: (B, L) int64, best on the CPU, where the positions are computed.
            attention_mask: (B, L), 0 for padding, which must be on the left.
            pixel_values, pixel_values_videos: (N, 1176) patches of the images and of the videos,
                row after row. If all rows show the same pictures, those of one row are enough.
            image_grid_thw, video_grid_thw: (n, 3) their frames, rows and columns in patches.
            second_per_grid_ts: (n videos,) seconds from one temporal patch to the next; None: 1.0.
            queries: (Q, D) or (B, Q, D) embeddings that follow the last token.

        Raises ValueError if tokens, pictures, grids and mask do not fit each other.
        """
        count = 0 if queries is None else queries.shape[-2]
        mask = None
        if attention_mask is not None:
            mask = left_padding_mask(attention_mask, count, like=self.model.norm.weight)
        grids = image_grid_thw, video_grid_thw
        positions = self.positions(input_ids, attention_mask, *grids, second_per_grid_ts, count)
        x = self.embed(input_ids, pixel_values, pixel_values_videos, *grids)   # (B, L, D)
        if queries is not None:
            queries = queries.to(x).expand(len(x), -1, -1)                     # (B, Q, D)
            x = torch.cat([x, queries], dim=1)                                 # (B, L + Q, D)
        return self.model(x, positions, mask)                                  # (B, L + Q, D)

    def embed(self, input_ids, images=None, videos=None, image_grids=None, video_grids=None):
        """Word embeddings (B, L, D), with picture embeddings at the picture tokens."""
        x = self.words(input_ids)
        for patches, grids, token in (
            (images, image_grids, self.config.image_token_id),
            (videos, video_grids, self.config.video_token_id),
        ):
            index = (input_ids.cpu().flatten() == token).nonzero()[:, 0]
            if patches is None:
                vision = x.new_zeros(0, x.shape[-1])
            else:
                check_patches(patches, grids, self.config.vision_config)
                vision = self.visual(patches.to(x.device), grid_list(grids)).type_as(x)  # (N/4, D)
            if len(index) == len(x) * len(vision):
                vision = vision.repeat(len(x), 1)  # every row shows the same pictures
            if len(index) != len(vision):
                raise ValueError(f"{len(index)} tokens of id {token}, but {len(vision)} embeddings")
            x = x.flatten(0, 1).index_copy(0, index.to(x.device), vision).view_as(x)
        return x

    def words(self, ids):
        """Embeddings of token ids, in the dtype of the rest of the decoder."""
        table = self.model.embed_tokens
        embeddings = table(ids.to(table.weight.device))
        return embeddings.to(self.model.norm.weight.device, self.model.norm.weight.dtype)

    def positions(
        self,
        input_ids,
        attention_mask=None,
        image_grid_thw=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        queries=0,
    ):
        """(3, B, L + queries) int64. Queries get the positions of further text, padding 0."""
        merge = self.config.vision_config.spatial_merge_size
        video_grids = grid_list(video_grid_thw)
        seconds = [1.0] * len(video_grids)
        if second_per_grid_ts is not None:
            seconds = torch.as_tensor(second_per_grid_ts).tolist()
        if len(seconds) != len(video_grids):
            raise ValueError(f"{len(seconds)} second_per_grid_ts for {len(video_grids)} videos")
        images = [(t, h // merge, w // merge, 0.0) for t, h, w in grid_list(image_grid_thw)]
        videos = [(t, h // merge, w // merge, s) for (t, h, w), s in zip(video_grids, seconds)]
        images, videos = cycle(images), cycle(videos)  # rows may all show the same pictures
        length = input_ids.shape[1]
        padding = [0] * len(input_ids)
        if attention_mask is not None:
            padding = (length - attention_mask.sum(dim=1)).tolist()
        positions = torch.zeros(3, len(input_ids), length + queries, dtype=torch.long)
        for row, (ids, skip) in enumerate(zip(input_ids.tolist(), padding)):
            prompt = mrope_positions(ids[skip:], images, videos, self.config)
            positions[:, row, skip:length] = prompt
            positions[:, row, length:] = prompt.max() + 1 + torch.arange(queries)
        return positions

    @torch.no_grad()
    def generate(self, inputs, processor, max_new_tokens=128):
        """Decodes one prompt greedily, up to the end of the turn -> text."""
        prompt = inputs["input_ids"]
        if len(prompt) != 1:
            raise ValueError(f"generate takes one prompt, not a batch of {len(prompt)}")
        if inputs.get("attention_mask") is not None:
            prompt = prompt[:, inputs["attention_mask"][0].bool()]  # without the padding
        image_grids, video_grids = inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
        seconds = inputs.get("second_per_grid_ts")
        positions = self.positions(prompt, None, image_grids, video_grids, seconds)
        images, videos = inputs.get("pixel_values"), inputs.get("pixel_values_videos")
        x = self.embed(prompt, images, videos, image_grids, video_grids)
        answer, cache = [], {}
        while len(answer) < max_new_tokens:
            hidden = self.model(x, positions, cache=cache)[:, -1:]
            token = self.lm_head(hidden).argmax(dim=-1)  # (1, 1)
            if int(token) in processor.stop_ids:
                break
            answer.append(int(token))
            x = self.words(token)
            positions = positions.max() + torch.ones(3, 1, 1, dtype=torch.long)
        return processor.tokenizer.decode(answer, skip_special_tokens=True)

    def initialize(self):
        """Qwen's initial weights, to train from scratch: N(0, 0.02), zero biases."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        return self

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, blocks=True, config=None):
        """Loads a safetensors file, or a folder with config.json and one file or indexed shards.

        dtype None keeps the stored dtypes. `config`: path of a config.json elsewhere. Without any
        config.json the config is the 3B's. `blocks=False` leaves the blocks of both towers without
        weights, on the meta device. Raises FileNotFoundError or ValueError.
        """
        return load_model(cls, path, device, dtype, blocks, config)

    def save_pretrained(self, folder):
        """Writes config.json (hub layout), model.safetensors. Raises ValueError with LoRA."""
        save_model(self, folder)


PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Linear):
    """y = W x + b + alpha/rank * B A x (arXiv 2106.09685).

    B starts at zero, so training starts from the unchanged model. A is random, so B has a gradient.
    New A and B are float32 for any dtype of W, because steps of 1e-5 vanish in bfloat16 weights.
    """

    def __init__(self, linear, rank, alpha, device=None):
        nn.Module.__init__(self)  # not Linear's: no new weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha = rank, alpha
        options = {"bias": False, "dtype": torch.float32, "device": device or self.weight.device}
        self.lora_A = nn.Linear(self.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, self.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        update = self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))
        y = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return y + (update * (self.alpha / self.rank)).type_as(y)

    def merged(self):
        """A plain Linear with the same function."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        update = self.lora_B.weight.float() @ self.lora_A.weight.float() * (self.alpha / self.rank)
        weight = (self.weight.float() + update).type_as(self.weight)
        linear.weight, linear.bias = nn.Parameter(weight.detach()), self.bias
        return linear


def lora_layers(model):
    """[(name, LoRALinear)] in the order of the model."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]


def add_lora(model, rank=64, alpha=64):
    """Wraps all linear layers of the decoder, q k v o gate up down, and freezes everything else.

    The vision tower stays as it is. Raises ValueError for a rank below 1, or a model that has LoRA.
    """
    if rank < 1 or lora_layers(model):
        raise ValueError(f"LoRA of rank {rank}: rank is 1 or more, and the model has no LoRA yet")
    model.requires_grad_(False)
    device = model.model.norm.weight.device  # the layers' own weights may not be loaded yet
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.model.set_submodule(name, LoRALinear(layer, rank, alpha, device))


def lora_state_dict(model):
    """{name: tensor} under the names of PEFT's adapter_model.safetensors."""
    return {PEFT_PREFIX + name: t for name, t in model.state_dict().items() if ".lora_" in name}


def load_lora(model, tensors):
    """Loads {PEFT's name: tensor} into the LoRA of add_lora. Raises ValueError unless all fit."""
    tensors = {official_name(name.removeprefix(PEFT_PREFIX)): t for name, t in tensors.items()}
    lora = {name: t for name, t in model.state_dict().items() if ".lora_" in name}
    for name in sorted(lora.keys() | tensors.keys()):
        if name not in lora or name not in tensors or lora[name].shape != tensors[name].shape:
            raise ValueError(
                f"the LoRA does not fit the model: {name} is missing, unexpected or of "
                "another shape"
            )
    device = model.model.norm.weight.device
    tensors = {name: t.to(device) for name, t in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)


SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
BICUBIC = Image.Resampling.BICUBIC
CHAT_PROMPT = "You are a helpful assistant."  # the chat template's own system prompt


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """The nearest size with sides in multiples of `factor` and an area within the bounds.

    The aspect ratio is nearly kept. Raises ValueError if it is beyond 200 to 1.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {width}x{height} is too narrow: sides of at most 200 to 1")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * scale / factor) * factor
        w = math.ceil(width * scale / factor) * factor
    return h, w


def to_pil(picture):
    """A PIL image or uint8 (H, W, 3) array -> RGB PIL image. Raises ValueError."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"a picture is {array.dtype} {array.shape}, not PIL or uint8 (H, W, 3)")
    return Image.fromarray(np.ascontiguousarray(array))


def resize_by_torch(frame, height, width):
    """Bicubic as in torchvision, which differs slightly from Pillow's."""
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
    size = (height, width)
    pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy())


RESIZERS = {
    "pillow": lambda frame, height, width: frame.resize((width, height), BICUBIC),
    "torch": resize_by_torch,
}


class Processor:
    """The official chat template, resizing and patches.

    The settings are those of preprocessor_config.json. `max_pixels` bounds a picture or frame, and
    so memory and time. One token covers 28x28 pixels; in a clip, those of two frames.
    """

    def __init__(
        self,
        tokenizer,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=3136,
        max_pixels=12845056,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
    ):
        self.tokenizer = tokenizer  # a tokenizers.Tokenizer
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.ids = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
        missing = [name for name, number in self.ids.items() if number is None]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}")
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = {number for number, token in added.items() if token.special}
        self.special_ids |= set(self.ids.values())
        end_of_text = tokenizer.token_to_id("<|endoftext|>")
        self.pad_id = self.ids["<|im_end|>"] if end_of_text is None else end_of_text
        self.stop_ids = {self.ids["<|im_end|>"], self.pad_id}

    def __call__(
        self,
        instruction,
        image=None,
        video=None,
        references=(),
        system=None,
        fps=2.0,
        frame_pixels=None,
        reference_pixels=None,
        frame_resizes=(),
        source_first=False,
    ):
        """One prompt: system prompt, instruction, source image or video, references.

        Args:
            instruction: text; may be empty.
            image: the source, a PIL image or uint8 (H, W, 3).
            video: the source as a clip instead, uint8 (T, H, W, 3), at `fps` frames per second.
            references: pictures like `image`, of any sizes.
            system: the system prompt; None: that of the chat template.
            frame_pixels, reference_pixels: larger frames of a clip, or larger references, are
                scaled down to this area; None: `max_pixels`.
            frame_resizes: scalings of the frames before that, each
                ("pillow" or "torch", factor, min_pixels, max_pixels).
            source_first: the source precedes the instruction, and the user's turn stays open for
                the queries.

        Returns a dict of CPU tensors for Qwen2_5_VL.forward, batch 1. Raises ValueError.
        """
        if image is not None and video is not None:
            raise ValueError("the source is an image or a video, not both")
        if not isinstance(instruction, str):
            raise ValueError("the instruction must be a string")
        source = []
        if video is not None:
            frames = [to_pil(frame) for frame in self.check_video(video, fps)]
            for resize, *bounds in frame_resizes:
                size = smart_resize(frames[0].height, frames[0].width, *bounds)
                frames = [RESIZERS[resize](frame, *size) for frame in frames]
            source = [self.cut(frames, frame_pixels, clip=True)]
        elif image is not None:
            source = [self.cut([to_pil(image)])]
        shown = [self.cut([to_pil(picture)], reference_pixels) for picture in references]
        if source_first:
            return self.chat([*source, instruction, *shown], system, fps, open_turn=True)
        return self.chat([instruction, *source, *shown], system, fps)

    def chat(self, parts, system=None, fps=2.0, open_turn=False):
        """One prompt: system prompt, and a user's turn of any parts in any order.

        Args:
            parts: each a text, a picture as for `__call__`, a clip, uint8 (T, H, W, 3), or what
                `cut` returns.
            system: the system prompt; None: that of the chat template.
            fps: frames per second of every clip.
            open_turn: the user's turn stays open.

        Returns a dict of CPU tensors for Qwen2_5_VL.forward, batch 1. Raises ValueError.
        """
        system = CHAT_PROMPT if system is None else system
        if not isinstance(system, str):
            raise ValueError("the system prompt must be a string")
        start, end = [self.ids["<|im_start|>"]], self.turn_end()
        ids, text = start + self.encode("system\n" + system) + end + start, "user\n"
        clips, images = [], []  # (patches, grid) of each
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            if not isinstance(part, tuple):
                clip = not isinstance(part, Image.Image) and np.ndim(part) == 4
                frames = self.check_video(part, fps) if clip else [part]
                part = self.cut(map(to_pil, frames), clip=clip)
            pad, patches, grid = part
            (clips if pad == "<|video_pad|>" else images).append((patches, grid))
            ids += self.encode(text) + self.vision_ids(pad, grid)
            text = ""
        ids += self.encode(text) + ([] if open_turn else end + start + self.encode("assistant\n"))
        inputs = {"input_ids": torch.tensor([ids])}
        if clips:
            inputs["pixel_values_videos"] = torch.cat([patches for patches, _ in clips])
            inputs["video_grid_thw"] = torch.tensor([grid for _, grid in clips])
            inputs["second_per_grid_ts"] = torch.full((len(clips),), self.temporal_patch_size / fps)
        if images:
            inputs["pixel_values"] = torch.cat([patches for patches, _ in images])
            inputs["image_grid_thw"] = torch.tensor([grid for _, grid in images])
        return inputs

    def cut(self, frames, max_pixels=None, clip=False):
        """PIL images of a picture or a clip -> (pad token, patches, grid), a part of `chat`."""
        pad = "<|video_pad|>" if clip else "<|image_pad|>"
        return pad, *self.patches(list(frames), max_pixels or self.max_pixels)

    def turn_end(self):
        """Token ids that end a turn."""
        return [self.ids["<|im_end|>"], *self.encode("\n")]

    def vision_ids(self, pad, grid):
        """Token ids of one picture in the prompt."""
        pads = [self.ids[pad]] * (math.prod(grid) // self.merge_size**2)
        return [self.ids["<|vision_start|>"], *pads, self.ids["<|vision_end|>"]]

    def encode(self, text):
        """Token ids of words. Raises ValueError for special tokens, which could open a turn."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        special = self.special_ids.intersection(ids)
        if special:
            token = self.tokenizer.id_to_token(min(special))
            raise ValueError(f"text must not contain the special token {token}")
        return ids

    def check_video(self, frames, fps):
        """Frames as an array. Raises ValueError without four axes, a frame, and an fps above 0."""
        frames = np.asarray(frames)
        if frames.ndim != 4 or not len(frames):
            raise ValueError(f"a video is {frames.dtype} {frames.shape}, not uint8 (T, H, W, 3)")
        if not 0 < fps < math.inf:
            raise ValueError(f"fps is {fps}; it should be frames per second, above 0")
        return frames

    def patches(self, frames, max_pixels):
        """PIL images of one size -> float32 (N, channels * frames * pixels), grid (t, h, w)."""
        patch, merge, depth = self.patch_size, self.merge_size, self.temporal_patch_size
        bounds = min(self.min_pixels, max_pixels), max_pixels
        height, width = smart_resize(frames[0].height, frames[0].width, patch * merge, *bounds)
        pixels = np.stack([np.asarray(frame.resize((width, height), BICUBIC)) for frame in frames])
        last = pixels[-1:].repeat(-len(pixels) % depth, axis=0)  # completes the last patch
        pixels = np.concatenate([pixels, last])
        t, h, w = len(pixels) // depth, height // patch, width // patch
        x = pixels.reshape(t, depth, h // merge, merge, patch, w // merge, merge, patch, 3)
        x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # the 2x2 patches of a token are adjacent
        x = x.reshape(t * h * w, 3, -1)
        # Each of the 256 levels is normalised once, with the release's rounding, and looked up.
        levels = (np.arange(256) * (1 / 255)).astype(np.float32)
        channels = []
        for channel, (mean, std) in enumerate(zip(self.image_mean, self.image_std)):
            table = (levels - np.float32(mean)) / np.float32(std)
            channels.append(table.take(x[:, channel]))
        return torch.from_numpy(np.stack(channels, axis=1)).flatten(1), (t, h, w)

    def collate(self, prompts, same_pictures=False):
        """Several prompts -> one batch, padded on the left, with an attention_mask.

        same_pictures: all prompts show the same pictures; the vision tower encodes them once.
        """
        length = max(prompt["input_ids"].shape[1] for prompt in prompts)
        padding = [length - prompt["input_ids"].shape[1] for prompt in prompts]
        ids = [F.pad(p["input_ids"], (n, 0), value=self.pad_id) for p, n in zip(prompts, padding)]
        mask = torch.arange(length) >= torch.tensor(padding)[:, None]
        batch = {"input_ids": torch.cat(ids), "attention_mask": mask.long()}
        for key in PICTURE_INPUTS:
            tensors = [prompt[key] for prompt in prompts if key in prompt]
            if tensors:
                batch[key] = tensors[0] if same_pictures else torch.cat(tensors)
        return batch

    @classmethod
    def from_pretrained(cls, folder):
        """Reads tokenizer.json, and preprocessor_config.json or processor_config.json.

        Raises FileNotFoundError or ValueError.
        """
        return load_processor(cls, folder)

    def save_pretrained(self, folder):
        """Writes tokenizer.json and preprocessor_config.json."""
        save_processor(self, folder)


PICTURE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)


# Loading.


def load_model(cls, path, device, dtype, blocks, config):
    """See Qwen2_5_VL.from_pretrained."""
    tensors = read_tensors(path)
    config = read_config(path, config)
    # A damaged config could ask for a million layers.
    if max(config.num_hidden_layers, config.vision_config.depth) > len(tensors):
        raise ValueError(f"{path} has too few tensors for the layers of its config.json")
    tied, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and tied is not None and table is not None:
        if torch.equal(tied, table):  # some exports store the tied head again
            del tensors["lm_head.weight"]
    for name, tensor in tensors.items():
        if blocks:
            tensors[name] = tensor.to(device, dtype)
        elif name.startswith(BLOCKS):
            tensors[name] = tensor.to("meta")
        elif name != "model.embed_tokens.weight":  # stays mapped on the CPU: few rows are read
            tensors[name] = tensor.to(device, dtype)
    try:
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, TypeError) as error:  # it names the tensors at fault
        raise ValueError(f"{path}: {' '.join(str(error).split())[:600]}") from None
    return model.eval()


def save_model(model, folder):
    """See Qwen2_5_VL.save_pretrained."""
    if lora_layers(model):
        raise ValueError("this model carries LoRA; save lora_state_dict(model) instead")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    partial = folder / "model.safetensors.partial"  # the tensors may be mapped from the old file
    save_file(tensors, partial, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    # safetensors makes its files readable by the owner only.
    shutil.copymode(folder / "config.json", partial)
    os.replace(partial, folder / "model.safetensors")


BLOCKS = ("visual.blocks.", "model.layers.")

# Newer exports nest vision tower and decoder in `model`: their prefix -> official prefix.
RENAMES = {"model.visual.": "visual.", "model.language_model.": "model."}


def official_name(name):
    """A tensor's name in any export -> its official name, which this module uses."""
    for theirs, official in RENAMES.items():
        if name.startswith(theirs):
            return official + name.removeprefix(theirs)
    return name


def read_tensors(path, prefix=""):
    """{official name: tensor} of all names with this prefix, memory-mapped."""
    tensors = {}
    for file in checkpoint_files(path):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():
                    if official_name(name).startswith(prefix):
                        tensors[official_name(name)] = stored.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            known = "float32, bfloat16 or float16"
            raise ValueError(f"{path}: {name} is {tensor.dtype}; it should be {known}")
    return tensors


def checkpoint_files(path):
    """The files that hold the weights: `path` itself, the shards of an index, or the only file."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; it should be a folder of Qwen2.5-VL")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        names = read_json(indices[0]).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{indices[0]} is no index of shards: it has no weight_map")
        files = [path / Path(str(name)).name for name in sorted(set(map(str, names.values())))]
    else:
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(f"{path} holds {len(files)} .safetensors files and no index")
    for file in files:
        if not file.is_file():
            reason = f"{indices[0].name} names it" if indices else "it should be a file"
            raise FileNotFoundError(f"{file} is missing; {reason}")
    return files


def read_json(file):
    """Reads the object in a JSON file. Raises ValueError with the file's name."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from None


def read_config(path, file=None):
    """Reads the config.json of a checkpoint, or `file`. Without one, returns the 3B's config."""
    path = Path(path)
    file = Path(file or (path.parent if path.is_file() else path) / "config.json")
    if not file.exists():
        return PRESETS["3B"]
    try:
        return Qwen2_5_VLConfig.from_dict(read_json(file))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: {error}") from None


def config_to_dict(config):
    """See Qwen2_5_VLConfig.to_dict."""
    raw = asdict(config)
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": list(raw.pop("mrope_section"))}
    vision = raw["vision_config"]
    if vision["tokens_per_second"] == int(vision["tokens_per_second"]):
        vision["tokens_per_second"] = int(vision["tokens_per_second"])  # 5.x rejects 2.0
    raw |= {"model_type": "qwen2_5_vl", "hidden_act": "silu"}
    return raw | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}


def config_from_dict(raw):
    """See Qwen2_5_VLConfig.from_dict.

    Raises ValueError for rotary embeddings or attention that this model does not have.
    """
    text = {**(raw.get("text_config") or {})}
    text |= {key: value for key, value in raw.items() if value is not None}
    text |= (text.get("rope_scaling") or {}) | (text.get("rope_parameters") or {})
    vision = {**(raw.get("vision_config") or {})}
    vision.setdefault("in_channels", vision.get("in_chans", VisionConfig.in_channels))
    rope = ("mrope", "default")
    for key, known in (("type", rope), ("rope_type", rope), ("hidden_act", ("silu",))):
        if text.get(key, known[0]) not in known:
            raise ValueError(f"{key} {text[key]!r} is not supported; Qwen2.5-VL has {known[0]!r}")
    if text.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported")
    vision = VisionConfig(**config_fields(VisionConfig, vision))
    return Qwen2_5_VLConfig(**config_fields(Qwen2_5_VLConfig, text), vision_config=vision)


def config_fields(cls, raw):
    """Entries of `raw` that are fields of a config class, except nested configs."""
    values = {}
    for entry in fields(cls):
        value = raw.get(entry.name)
        if value is None or entry.name == "vision_config":
            continue
        value = tuple(value) if isinstance(value, list) else value
        allowed = (int, float) if isinstance(entry.default, float) else type(entry.default)
        if not isinstance(value, allowed):
            raise ValueError(f"{entry.name} is {value!r}, not like {entry.default!r}")
        values[entry.name] = value
    return values


def grid_list(grid_thw):
    """(n, 3) tensor, list or None -> list of (t, h, w)."""
    return [] if grid_thw is None else [tuple(grid) for grid in torch.as_tensor(grid_thw).tolist()]


def check_patches(patches, grids, config):
    """Raises ValueError unless number and width of the patches fit grids and config."""
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    number = sum(t * h * w for t, h, w in grid_list(grids))
    if tuple(patches.shape) != (number, width):
        raise ValueError(
            f"patches are {tuple(patches.shape)}; their grids ask for {(number, width)}"
        )


PROCESSOR_SETTINGS = (
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "min_pixels",
    "max_pixels",
    "image_mean",
    "image_std",
)


def load_processor(cls, folder):
    """See Processor.from_pretrained."""
    folder = Path(folder)
    settings_file = folder / "preprocessor_config.json"
    newer = folder / "processor_config.json"  # newer exports write this one instead
    if newer.is_file() and not settings_file.is_file():
        settings_file = newer
    for file in (folder / "tokenizer.json", settings_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; it comes with Qwen2.5-VL")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from None
    raw = read_json(settings_file)
    try:
        raw = raw.get("image_processor", raw)
        size = raw.get("size") or {}  # newer exports keep the bounds here
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if raw.get(name) is None:
                raw[name] = size.get(edge)
        settings = {name: raw[name] for name in PROCESSOR_SETTINGS if raw.get(name) is not None}
        sizes = [settings[name] for name in PROCESSOR_SETTINGS[:5] if name in settings]
        if not all(isinstance(size, int) and 0 < size < 2**31 for size in sizes):
            raise ValueError(f"sizes should be whole numbers above 0, not {sizes}")
        for name in {"image_mean", "image_std"} & set(settings):
            settings[name] = [float(level) for level in settings[name]]
            least = 1e-6 if name == "image_std" else 0
            if len(settings[name]) != 3 or not min(settings[name]) >= least:
                known = f"three numbers from {least}"
                raise ValueError(f"{name} should be {known}, not {settings[name]}")
        return cls(tokenizer, **settings)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{settings_file}: {error}") from None


def save_processor(processor, folder):
    """See Processor.save_pretrained."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(processor, name) for name in PROCESSOR_SETTINGS}
    settings["image_processor_type"] = "Qwen2VLImageProcessor"
    settings["processor_class"] = "Qwen2_5_VLProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    processor.tokenizer.save(str(folder / "tokenizer.json"))


def main():
    """Asks Qwen2.5-VL about a picture."""
    shapes = Path(__file__).resolve().parent / "weights" / "shapes"
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("photo", nargs="?", default=shapes / "example.png", help="a picture")
    parser.add_argument("question", nargs="?", default="what is in the picture?")
    parser.add_argument("--weights", default=shapes / "mllm", help="folder of Qwen2.5-VL")
    args = parser.parse_args()
    try:
        processor = Processor.from_pretrained(args.weights)
        with Image.open(args.photo) as photo:
            inputs = processor(args.question, image=photo)
        model = Qwen2_5_VL.from_pretrained(args.weights)
        print(model.generate(inputs, processor))
    except (ValueError, OSError) as error:
        parser.exit(2, f"mllm.py: {error}\n")


if __name__ == "__main__":
    main()
