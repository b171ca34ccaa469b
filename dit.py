"""The Wan2.1 diffusion transformer (arXiv 2503.20314), and how InstructX (arXiv 2510.08485) lets it see pictures.

A transformer over the latent patches of all frames at once, after the official wan/modules/model.py: self-attention
with rotary positions in time, height and width, cross-attention to the instruction, feed-forward; modulated by t.

What is unusual:
- One projection of the time embedding serves all blocks; a block only adds a small table of its own to it.
- Queries and keys are normalized over the whole width, before it is split into heads.
- A source is added to the noisy tokens. References stand behind them in the sequence, each as one more latent frame
  after the last, on a grid of its own, so of any size; the head never sees them.
- What stays the same from step to step (`condition`) is kept apart from the step itself (`denoise`).
- The residual stream, norms, rotations, modulation, time embedding and head are float32, as in the official code,
  whatever dtype the large matrices have. (diffusers rounds the stream after every branch.)

Letters: B batch, C channels of a latent, F h w its frames, height and width, L tokens of z, R tokens of all references,
Q tokens of the context, D width, K heads, d = D/K.

    python dit.py [FOLDER]      # what the presets cost, and a step of the tiny preset or of a checkpoint, with shapes
"""

import argparse
import json
import math
import os
import re
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class WanDiTConfig:
    """The keys of the official config.json; defaults are the released 14B. ValueError for sizes that make no model."""

    dim: int = 5120             # D
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256         # of the sinusoids of t
    text_dim: int = 4096        # width of the context; 0: it already is D wide, and there is no text_embedding
    eps: float = 1e-6
    patch_size: tuple = (1, 2, 2)
    source_embedding: bool = False  # ours: the source has a patch embedding of its own

    def __post_init__(self):
        self.patch_size = tuple(self.patch_size) if isinstance(self.patch_size, list) else self.patch_size
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) is not kind or kind is int and value < (field.name != "text_dim"):
                raise ValueError(f"{field.name} is {value!r}; it should be of the kind of {field.default!r}")
        if len(self.patch_size) != 3 or not all(type(size) is int and size > 0 for size in self.patch_size):
            raise ValueError(f"patch_size is {self.patch_size}; it should be three whole numbers above 0")
        if self.dim % (2 * self.num_heads) or self.freq_dim % 2:
            raise ValueError(f"dim {self.dim} should be a multiple of 2 * num_heads = {2 * self.num_heads}, "
                             f"and freq_dim {self.freq_dim} of 2")


PRESETS = {
    "14B": WanDiTConfig(),
    "1.3B": WanDiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "tiny": WanDiTConfig(dim=64, ffn_dim=128, num_heads=4, num_layers=2, freq_dim=32, text_dim=48),
}


# Small parts.


class Linear(nn.Linear):
    """Computes in the dtype of its weights, whatever comes in."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class QuantizedLinear(nn.Module):
    """A Linear for use alone, with its weight in int8 or float8_e4m3fn and a scale for each output: half the memory.

    The product runs in the dtype that the weight had, which holds all values of both kinds exactly.
    """

    def __init__(self, linear, dtype):
        super().__init__()
        weight, largest = linear.weight.detach().float(), 127 if dtype == torch.int8 else torch.finfo(dtype).max
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / largest
        steps = weight / scale
        self.weight = nn.Parameter((steps.round() if dtype == torch.int8 else steps).to(dtype), requires_grad=False)
        self.scale, self.bias = nn.Parameter(scale[:, 0], requires_grad=False), linear.bias
        self.dtype = linear.weight.dtype

    def forward(self, x):
        y = F.linear(x.to(self.dtype), self.weight.to(self.dtype)) * self.scale
        return (y + self.bias).to(self.dtype)


class Linear32(nn.Linear):
    """Computes in float32, whatever its weights are stored in, and inside a caller's autocast too."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class LayerNorm(nn.LayerNorm):
    """In float32, and float32 is what comes out."""

    def forward(self, x):
        weight, bias = (self.weight.float(), self.bias.float()) if self.elementwise_affine else (None, None)
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """In float32, and float32 is what comes out."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class PatchEmbedding(nn.Conv3d):
    """Latents (B, C, F, h, w) -> tokens (B, L, D), float32.

    Stored as a convolution, but with a kernel as large as its stride, so it is run as what it is: one matrix for all
    patches. (Some releases of torch fall back to very slow convolutions in 3-D and bfloat16.)
    """

    def __init__(self, config, bias=True):
        super().__init__(config.in_dim, config.dim, config.patch_size, stride=config.patch_size, bias=bias)

    def forward(self, z, use_bias=True):
        patches = patchify(z.to(self.weight.dtype), self.kernel_size)
        return F.linear(patches, self.weight.flatten(1), self.bias if use_bias else None).float()


def patchify(z, patch):
    """(B, C, F, h, w) -> (B, L, C*p*q*r): patches of p frames, q rows, r columns, in the order frame, row, column."""
    p, q, r = patch
    z = z.unflatten(4, (-1, r)).unflatten(3, (-1, q)).unflatten(2, (-1, p))     # (B, C, f, p, h, q, w, r)
    return z.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x, grid, patch):
    """(B, L, p*q*r*C) -> (B, C, F, h, w). Not the reverse of patchify: the head puts the channels last, as Wan does."""
    x = x.unflatten(2, (*patch, -1)).unflatten(1, grid)                         # (B, f, h, w, p, q, r, C)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


def modulate(x, shift, scale):
    """x (B, L, D); shift and scale (B or 1, 1, D)."""
    return x * (1 + scale) + shift


def sinusoids(t, width):
    """t (B,) -> (B, width) float32: cosines, then sines. In float64, since 1000 radians leave float32 few digits."""
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device=t.device) / (width // 2))
    angles = t.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def rope_table(grid, head_dim, first_frame=0):
    """cos, sin of a grid (f, h, w) of tokens, each (f*h*w, 1, d/2), float32, whose frames count from `first_frame`.

    A third of the channels turns with each axis; what does not divide goes to time (44 + 42 + 42 of 128).
    """
    space = 2 * (head_dim // 6)
    angles = []
    for axis, (length, width) in enumerate(zip(grid, (head_dim - 2 * space, space, space))):
        positions = torch.arange(length).double() + (first_frame if axis == 0 else 0)
        frequencies = 10000.0 ** (-torch.arange(0, width, 2).double() / max(width, 1))
        shape = [length if i == axis else 1 for i in range(3)]
        angles.append(torch.outer(positions, frequencies).view(*shape, -1))
    spread = lambda parts: torch.cat([part.float().expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2)[:, None]
    return spread([angle.cos() for angle in angles]), spread([angle.sin() for angle in angles])


def rotate(x, cos, sin):
    """x (B, L, K, d) float32. A pair is two neighboring channels here; Qwen's rotation pairs halves."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def attention(q, k, v):
    """(B, L, K, d), (B, M, K, d) twice -> (B, L, D)."""
    x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))     # (B, K, L, d)
    return x.transpose(1, 2).flatten(2)


# Ulysses (arXiv 2309.14509): each of P processes holds n tokens, but for attention all tokens of K/P heads.


def own_tokens(x, group):
    """(B, L, D) -> this process's (B, n, D) of them; zeros fill up the last."""
    x = F.pad(x, (0, 0, 0, -x.shape[1] % group.size()))
    return x.chunk(group.size(), dim=1)[group.rank()]


def all_tokens(x, group):
    """The reverse, zeros included: (B, n, D) -> (B, P*n, D)."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def exchange(parts, group):
    """(P, ...) -> (P, ...): part i goes to process i, and what comes from it takes its place."""
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received


def tokens_to_heads(x, group, L):
    """(B, n, K, d) -> (B, L, K/P, d)"""
    return exchange(x.unflatten(2, (group.size(), -1)).movedim(2, 0), group).movedim(0, 1).flatten(1, 2)[:, :L]


def heads_to_tokens(x, group):
    """(B, L, K/P, d) -> (B, n, K, d)"""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % group.size()))
    return exchange(x.unflatten(1, (group.size(), -1)).movedim(1, 0), group).movedim(0, 2).flatten(2, 3)


# Layers.


class Attention(nn.Module):
    """What self- and cross-attention share: four matrices, and norms of queries and keys over the whole width."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim))             # (B, L, D) -> (B, L, K, d)


class SelfAttention(Attention):
    """Of all tokens among each other, with rotary positions: x (B, L+R, D) -> the same, in the weights' dtype."""

    group = None                                                # of processes that share the tokens; see `parallelize`

    def forward(self, x, cos, sin):
        q, k, v = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))
        if self.group:
            q, k, v = (tokens_to_heads(y, self.group, len(cos)) for y in (q, k, v))
        q = rotate(q, cos, sin).type_as(v)                      # one after the other, so that the float32 ones are gone
        k = rotate(k, cos, sin).type_as(v)
        y = attention(q, k, v)
        if self.group:
            y = heads_to_tokens(self.heads(y), self.group).flatten(2)
        return self.o(y)


class CrossAttention(Attention):
    """Of the tokens to the context, without positions. The context's keys and values can be kept: see `kv`."""

    def kv(self, context):
        """(B, Q, D) -> keys and values, (B, Q, K, d) each."""
        v = self.heads(self.v(context))
        return self.heads(self.norm_k(self.k(context))).type_as(v), v

    def forward(self, x, context):
        k, v = context if isinstance(context, tuple) else self.kv(context)
        q = self.heads(self.norm_q(self.q(x))).type_as(v)
        return self.o(attention(q, k, v))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; t shifts, scales and gates the first and the last."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(config.dim, config.eps)          # the official names: norm3 comes second, norm2 third
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(self, x, e, context, cos, sin):
        """x (B, L+R, D) and e (B, 6, D) float32; context (B, Q, D), or its keys and values (B, Q, K, d) as a tuple."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation.float() + e).chunk(6, dim=1)  # (B, 1, D)
        x = x + gate * self.self_attn(modulate(self.norm1(x), shift, scale), cos, sin)
        x = x + self.cross_attn(self.norm3(x), context)
        return x + ffn_gate * self.ffn(modulate(self.norm2(x), ffn_shift, ffn_scale))


class Head(nn.Module):
    """Tokens -> velocities of their patches: x (B, L, D) -> (B, L, p*q*r*C), float32."""

    def __init__(self, config):
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear32(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x, e):
        """x (B, L, D), e (B, D): here the time embedding itself, where the blocks get its projection."""
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)
        return self.head(modulate(self.norm(x), shift, scale))


@dataclass
class Condition:
    """What all steps of one edit have in common. Made by WanDiT.condition."""

    shape: tuple                        # of z: (B, C, F, h, w)
    context: list                       # per block: (keys, values), each (B, Q, K, d); or embedded context (B, Q, D)
    rope: tuple                         # cos, sin: (L+R, 1, d/2)
    source: torch.Tensor | None         # (1 or B, L, D)
    references: torch.Tensor | None     # (B, R, D)
    times: dict                         # t: what `embed_time` makes of it for one row, (1, D) and (1, 6, D)


class WanDiT(nn.Module):
    """The velocity of noisy latents, given an instruction, a source and references.

    `source_embedding` is None unless the config asks for it: the tensors are then exactly those of the official
    checkpoint. `gradient_checkpointing` recomputes each block in the backward pass: less memory, a third more time.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.offload = self.group = None
        D = config.dim
        self.patch_embedding = PatchEmbedding(config)
        self.source_embedding = None
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, D), nn.GELU(approximate="tanh"), Linear(D, D)) if config.text_dim else nn.Identity()
        self.time_embedding = nn.Sequential(Linear32(config.freq_dim, D), nn.SiLU(), Linear32(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(D, 6 * D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if not self.head.modulation.is_meta:        # there is nothing to fill, and normal_ would import torch's compiler
            self.initialize()
        if config.source_embedding:
            self.add_source_embedding()

    def forward(self, z, t, context, source=None, references=()):
        """One step, for training. Arguments as of `condition` and `denoise`, which it is the sum of.

        Keys and values of the context are computed inside the blocks here: FSDP only gathers the weights of a block
        while it runs, and gradient checkpointing only saves memory inside it. (FSDP2's mixed precision needs
        cast_forward_inputs=False, or it rounds the float32 stream.)
        """
        return self.denoise(z, t, self.condition(context, z.shape, source, references, cache=False))

    def denoise(self, z, t, condition):
        """z (B, C, F, h, w) of any float dtype, t (B,) in [0, 1000] -> velocity like z. ValueError for other shapes."""
        if tuple(z.shape) != condition.shape or t.shape != z.shape[:1]:
            raise ValueError(f"z is {tuple(z.shape)} and t {tuple(t.shape)}; this condition is for z {condition.shape} "
                             f"and t {condition.shape[:1]}")
        x = self.patch_embedding(z)                                                     # (B, L, D)
        L = x.shape[1]
        if condition.source is not None:
            x = x + condition.source                                                    # (B, L, D)
        if condition.references is not None:
            x = torch.cat([x, condition.references], dim=1)                             # (B, L+R, D)
        known = condition.times.get(t[0].item()) if condition.times and t.min() == t.max() else None
        e, e6 = known or self.embed_time(t)                                             # (B, D), (B, 6, D)
        x = own_tokens(x, self.group) if self.group else x                              # (B, n, D) of (B, L+R, D)
        for block, context in zip(self.turns(), condition.context):
            x = self.run(block, x, e6, context, *condition.rope)                        # (B, L+R, D)
        x = all_tokens(x, self.group) if self.group else x
        v = self.head(x[:, :L], e)                                                      # (B, L, p*q*r*C)
        return unpatchify(v, self.grid(z.shape), self.config.patch_size).type_as(z)     # (B, C, F, h, w)

    def condition(self, context, shape, source=None, references=(), timesteps=(), cache=True):
        """All the work that is the same in every step of an edit.

        Args:
            context: (B, Q, text_dim), from the connector. Guidance is a batch of two.
            shape: of z, (B, C, F, h, w).
            source: None or latents (B or 1, C, F, h, w), on the grid of z.
            references: latents (B or 1, C, 1, h', w') of any sizes.
            timesteps: all that `denoise` will be called with, each for the whole batch; without them it embeds t itself.
            cache: hold the keys and values of the context for every block (14B, B = 2, Q = 512, bfloat16: 0.8 GB); not
                where the weights are shared out, since a block is whole only while it runs.

        Raises ValueError for shapes that do not go together.
        """
        shape, references = tuple(shape), list(references)
        self.check(context, shape, source, references)
        context = self.text_embedding(context.to(self.patch_embedding.weight.dtype))        # (B, Q, D)
        grids = [(0, self.grid(shape))]             # a reference is one more frame after the last, wherever that is
        grids += [(grids[0][1][0] + i, self.grid(z.shape)) for i, z in enumerate(references)]
        tables = [rope_table(grid, self.config.dim // self.config.num_heads, first) for first, grid in grids]
        tokens = [self.patch_embedding(z).expand(shape[0], -1, -1) for z in references]     # (B, h'w', D) each
        return Condition(
            shape=shape,
            context=([block.cross_attn.kv(context) for block in self.turns()] if cache and not self.group
                     else [context] * len(self.blocks)),
            rope=tuple(torch.cat(parts).to(context.device) for parts in zip(*tables)),      # (L+R, 1, d/2) each
            source=None if source is None else self.embed_source(source),                   # (B, L, D)
            references=torch.cat(tokens, dim=1) if tokens else None,                        # (B, R, D)
            times={t.item(): self.embed_time(t[None].to(context.device))
                   for t in torch.as_tensor(timesteps, dtype=torch.float32)})

    def embed_time(self, t):
        """t (B,) -> its embedding (B, D), for the head, and the projection of that (B, 6, D), for the blocks."""
        e = self.time_embedding(sinusoids(t, self.config.freq_dim))
        return e, self.time_projection(e).unflatten(1, (6, -1))

    def embed_source(self, source):
        """A patch embedding is linear: without its bias, adding tokens is adding latents, as the paper says."""
        if self.source_embedding is None:
            return self.patch_embedding(source, use_bias=False)
        return self.source_embedding(source)

    def add_source_embedding(self):
        """Gives the source a trainable embedding of its own that starts as a copy, so that nothing changes yet."""
        if self.source_embedding is None:
            with torch.device("meta"):
                self.source_embedding = PatchEmbedding(self.config, bias=False)
            self.source_embedding.weight = nn.Parameter(self.patch_embedding.weight.detach().clone())

    def compile_blocks(self):
        """torch.compile for each block, in place, so that no name in state_dict() changes.

        A block is the seam that pays: nearly all time goes there, and as all blocks are alike, one compilation of
        seconds serves them all. Compiled as a whole, the model is unrolled, and that takes minutes.
        """
        for block in self.blocks:
            block.compile()

    def parallelize(self, group, device):
        """Shares this model out among the processes of `group` and moves it to `device`; for use without gradients.

        Each holds a part of every block's weights (FSDP2), which come together while the block runs, and works on a
        part of the tokens (Ulysses). All must call with the same inputs, and all get the whole result. A block that is
        offloaded is read and cut up when it is its turn. ValueError if the heads do not divide.
        """
        if self.config.num_heads % group.size():
            raise ValueError(f"{self.config.num_heads} heads cannot be shared out among {group.size()} processes")
        from torch.distributed.device_mesh import DeviceMesh    # here and not at the top: these take a second
        from torch.distributed.fsdp import fully_shard
        mesh = DeviceMesh.from_group(group, torch.device(device).type)
        for i, block in enumerate(self.blocks):
            if self.offload:
                block.load_state_dict(self.offload.read(i), assign=True)
            fully_shard(block.to(device).requires_grad_(False), mesh=mesh)
            block.self_attn.group = group
        self.group, self.offload = group, None
        return self.to(device)

    def quantize(self, dtype):
        """Rounds the blocks' large matrices to `dtype`, torch.int8 or torch.float8_e4m3fn; for use without gradients.

        A block that is offloaded is read and rounded when it is its turn, so the whole is never there at full size.
        """
        for i, block in enumerate(self.blocks):
            if self.offload:
                block.load_state_dict(self.offload.read(i), assign=True)
            for name, linear in [(name, layer) for name, layer in block.named_modules() if isinstance(layer, Linear)]:
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, QuantizedLinear(linear, dtype))
        self.offload = None
        return self

    def turns(self):
        """The blocks in turn. Where they are offloaded, each has its weights from here to the next one only."""
        return self.blocks if self.offload is None else self.offload

    def run(self, block, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def grid(self, shape):
        """(f, h, w) of the tokens of latents (B, C, F, h, w)."""
        return tuple(length // patch for length, patch in zip(shape[2:], self.config.patch_size))

    def context_width(self):
        return self.config.dim if isinstance(self.text_embedding, nn.Identity) else self.config.text_dim

    def check(self, context, shape, source, references):
        """Raises ValueError for shapes that do not go together."""
        B, patch = shape[0], self.config.patch_size
        for name, given in (("z", shape), *((f"reference {i}", tuple(z.shape)) for i, z in enumerate(references, 1))):
            if len(given) != 5 or given[1] != self.config.in_dim or 0 in given:
                raise ValueError(f"{name} is {given}; latents should be (B, {self.config.in_dim}, F, h, w)")
            if any(length % size for length, size in zip(given[2:], patch)):
                raise ValueError(f"{name} is {given}; F, h and w should be multiples of the patch {patch}")
            if name != "z" and (given[2] != patch[0] or given[0] not in (1, B)):
                raise ValueError(f"{name} is {given}; it should be one latent frame, for a batch of {B} or 1")
        if context.ndim != 3 or context.shape[0] != B or context.shape[2] != self.context_width():
            raise ValueError(f"context is {tuple(context.shape)}; it should be ({B}, Q, {self.context_width()})")
        if source is not None and tuple(source.shape) not in (shape, (1, *shape[1:])):
            raise ValueError(f"source is {tuple(source.shape)}; it should be like z, {shape}, or have batch 1")

    def initialize(self):
        """Wan's own start, for training from nothing: Xavier; text and time embeddings small, the head zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, PatchEmbedding):
                nn.init.xavier_uniform_(module.weight.flatten(1))
            elif isinstance(module, (Block, Head)):
                nn.init.normal_(module.modulation, std=self.config.dim**-0.5)
        for module in [*self.text_embedding.modules(), *self.time_embedding.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, offload=None):
        """A checkpoint with official or diffusers names: a file, or a folder with one file or an index of shards.

        dtype None keeps what is stored. With a dtype, what the official code runs in float32 (time embedding and
        projection, modulation tables, norms and head: 1.3 % of the 14B) becomes float32 all the same.
        offload: leaves the weights of the blocks in their files; offload(blocks, read), with read(i) -> {name: tensor}
        of block i, makes what the model then walks through in place of its blocks (see connector.py).
        Raises FileNotFoundError, or ValueError for anything that does not fit.
        """
        files = find_files(Path(path))
        with torch.device("meta"):
            model = cls(read_config(files[0].parent / "config.json"))
        tensors, names = {}, []
        for name, tensor in read_tensors(files, "cpu" if offload else device):
            names.append(name)
            name = official_name(name)
            if name in tensors:
                raise ValueError(f"{path} holds {name} twice")
            dtype_here = stored_dtype(name, tensor.dtype, dtype)    # cast one by one, never two copies of the model
            tensors[name] = tensor.to("meta" if offload and name.startswith("blocks.") else device, dtype_here)
        check_tensors(model.state_dict(), tensors, path)
        model.load_state_dict(tensors, assign=True)

        def read(i):
            # One tensor at a time: what was read of a file stays in memory until the file is closed.
            found = ((official_name(name), tensor) for name in names if name.startswith(f"blocks.{i}.")
                     for _, tensor in read_tensors(files, "cpu", name.__eq__))
            return {name.removeprefix(f"blocks.{i}."): tensor.to(device, stored_dtype(name, tensor.dtype, dtype))
                    for name, tensor in found}

        model.offload = offload and offload(model.blocks, read)
        return model

    def save_pretrained(self, folder, dtype=None):
        """Writes config.json and model.safetensors under the official names; `dtype` as of from_pretrained."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "WanModel", "model_type": "t2v", "text_len": 512, **asdict(self.config)}
        # What is there now, not what the model was built with: both embeddings may have changed since.
        config["source_embedding"] = self.source_embedding is not None
        config["text_dim"] = 0 if isinstance(self.text_embedding, nn.Identity) else self.config.text_dim
        tensors = {name: t.detach().to("cpu", stored_dtype(name, t.dtype, dtype)).contiguous()
                   for name, t in self.state_dict().items()}
        replace(folder / "model.safetensors", lambda file: save_file(tensors, file, metadata={"format": "pt"}))
        replace(folder / "config.json", lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))


# Files: diffusers' keys and names become the official ones.

CONFIG_KEYS = {"in_channels": "in_dim", "out_channels": "out_dim", "num_attention_heads": "num_heads"}
CONFIG_FIXED = {"model_type": ["t2v"], "qk_norm": [True, "rms_norm_across_heads"], "cross_attn_norm": [True],
                "window_size": [[-1, -1]], "image_dim": [None], "added_kv_proj_dim": [None],
                "pos_embed_seq_len": [None]}
CONFIG_UNUSED = {"_class_name", "_diffusers_version", "_name_or_path", "text_len", "rope_max_seq_len"}

# diffusers name -> official name, applied in this order. Note its norm2, which is the official norm3.
RENAMES = {"condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
           "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
           "condition_embedder.time_proj.": "time_projection.1.",
           "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
           "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
           ".attn1.": ".self_attn.", ".attn2.": ".cross_attn.", ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.",
           ".to_out.0.": ".o.", ".norm2.": ".norm3.", ".ffn.net.0.proj.": ".ffn.0.", ".ffn.net.2.": ".ffn.2.",
           "proj_out.": "head.head.", ".scale_shift_table": ".modulation", "scale_shift_table": "head.modulation"}

FLOAT32 = re.compile(r"^time_|^head\.|norm|modulation$")


def official_name(name):
    """Official names pass: none of them contains a piece of diffusers' names."""
    for theirs, official in RENAMES.items():
        name = name.replace(theirs, official)
    return name


def stored_dtype(name, stored, wanted):
    """Of a tensor once loaded: `wanted`, but float32 for what Wan's code runs in float32; None keeps what is stored."""
    return stored if wanted is None else torch.float32 if FLOAT32.search(name) else wanted


def read_config(file):
    """WanDiTConfig from an official or diffusers config.json; the released 14B where there is no such file."""
    if not file.exists():
        return WanDiTConfig()
    try:
        given = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from None
    for key, allowed in CONFIG_FIXED.items():
        if key in given and given.pop(key) not in allowed:
            raise ValueError(f"{file}: {key} must be {json.dumps(allowed[-1])}; this is no Wan2.1 text-to-video model")
    given = {CONFIG_KEYS.get(key, key): value for key, value in given.items() if key not in CONFIG_UNUSED}
    known = [field.name for field in fields(WanDiTConfig)]
    try:
        if "attention_head_dim" in given:
            given["dim"] = given.pop("attention_head_dim") * given.get("num_heads", WanDiTConfig.num_heads)
        if unknown := sorted(given.keys() - set(known)):
            raise ValueError(f"unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
        return WanDiTConfig(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def find_files(path):
    """The file(s) that hold the weights: path itself, or in a folder the shards of its index, or its one file."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; it should be the DiT's checkpoint file, or its folder")
    kinds = ("*.safetensors.index.json", "*.safetensors", "*.pth")
    found = next(filter(None, (sorted(path.glob(kind)) for kind in kinds)), [])
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise FileNotFoundError(f"{path} should hold one .safetensors or .pth file or one index of shards, not {names}")
    if found[0].suffix != ".json":
        return found
    try:
        names = set(json.loads(found[0].read_text())["weight_map"].values())
        files = [path / Path(name).name for name in sorted(names)]      # shards lie beside their index
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{found[0]} is no index of shards: {error!r}") from None
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{path}: {found[0].name} names {', '.join(missing)}, not found there")
    return files


def read_tensors(files, device, wanted=lambda name: True):
    """Yields (name, tensor) of all files, as far as `wanted`, mapped rather than read."""
    for file in files:
        if file.suffix != ".safetensors":
            yield from ((name, tensor.to(device)) for name, tensor in read_pickle(file).items() if wanted(name))
            continue
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                yield from ((name, tensors.get_tensor(name)) for name in tensors.keys() if wanted(name))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from None


def read_pickle(file):
    """{name: tensor}. The pickle is opened as data only: it cannot run code."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever a damaged pickle may raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is damaged, or not a plain tensor file: {reason}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} must hold a dict of tensors and nothing else")
    return tensors


def check_tensors(expected, given, path):
    """Raises one ValueError that names what is missing, left over, of another shape, or no plain float."""
    shape = {name: list(t.shape) for name, t in expected.items()}
    plain = (torch.float32, torch.bfloat16, torch.float16)
    classes = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "misshaped": [f"{name} {list(t.shape)} instead of {shape[name]}"
                      for name, t in given.items() if name in shape and list(t.shape) != shape[name]],
        "quantized": [f"{name} is {t.dtype}" for name, t in given.items() if t.dtype not in plain]}
    problems = [f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                for kind, names in classes.items() if names]
    if problems:
        raise ValueError(f"{path} does not fit this DiT: {'; '.join(problems)}")


def replace(file, write):
    """Writes by way of a temporary file, so that a crash never leaves half a checkpoint under the real name."""
    partial = file.with_name(file.name + ".partial")
    write(partial)
    os.replace(partial, file)


# Run alone: what a step costs, and how it flows.


def costs(config, shape, Q):
    """(parameters, tokens, FLOP of one step): matrix products only, 2 FLOP per multiplication."""
    with torch.device("meta"):
        model = WanDiT(config)
    L = model.grid(shape)[0] * model.grid(shape)[1] * model.grid(shape)[2]
    D, layers = config.dim, config.num_layers
    products = 6 * D * D + 2 * D * config.ffn_dim       # a token in a layer: q k v o, q and o to the context, ffn
    return sum(p.numel() for p in model.parameters()), L, 2 * L * layers * (products + 2 * D * (L + Q))


def show(model, size, device):
    """One step on an image, and one on a clip with a source and two references: the shapes and seconds of both."""
    C, patch = model.config.in_dim, model.config.patch_size
    latents = lambda frames, height, width: torch.randn(1, C, frames, height, width, device=device)
    context, t = torch.randn(1, 256, model.context_width(), device=device), torch.full((1,), 500.0, device=device)
    image, clip = latents(1, *size[1:]), latents(*size)
    for z, source, references in ((image, None, []), (clip, clip, [latents(1, *size[1:]), latents(*patch)])):
        start = time.perf_counter()
        condition = model.condition(context, z.shape, source, references)
        ready = time.perf_counter()
        v = model.denoise(z, t, condition)
        print(f"z {tuple(z.shape)}, {'a' if source is not None else 'no'} source, {len(references)} references"
              f" -> {len(condition.rope[0])} tokens -> velocity {tuple(v.shape)}"
              f"   condition {ready - start:.3f} s, step {time.perf_counter() - ready:.3f} s")


def main():
    """Prints what the presets cost, and a step; ends with code 2 after one line of what is wrong."""
    parser = argparse.ArgumentParser(description="What the DiT costs, and the shapes of one step.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", nargs="?", help="checkpoint file or folder; without one, the tiny preset at random")
    parser.add_argument("--latent", default="3x8x8", help="frames, height and width of the latents to try, as FxHxW")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("stored", "float32", "bfloat16"), default="stored", help="of the matrices")
    args = parser.parse_args()
    try:
        size = tuple(map(int, args.latent.split("x")))
        print("81 frames of 832x480:  preset  M parameters  tokens  TFLOP a step (guidance doubles it)")
        for name, config in PRESETS.items():
            parameters, tokens, flop = costs(config, (1, 16, 21, 60, 104), 512)
            print(f"{name:>29}{parameters / 1e6:>14,.1f}{tokens:>8}{flop / 1e12:>17,.1f}")
        dtype = None if args.dtype == "stored" else getattr(torch, args.dtype)
        torch.manual_seed(0)
        model = (WanDiT.from_pretrained(args.folder, args.device, dtype) if args.folder
                 else WanDiT(PRESETS["tiny"]).to(args.device, dtype))
        print(f"\n{sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M parameters, matrices in "
              f"{model.patch_embedding.weight.dtype}")
        with torch.inference_mode():
            show(model, size, args.device)
    except (ValueError, OSError) as error:
        parser.exit(2, f"dit.py: {error}\n")


if __name__ == "__main__":
    main()
