"""The Wan2.1 diffusion transformer (arXiv 2503.20314), with InstructX's source and references.

A transformer over the latent patches of all frames at once, after the official
wan/modules/model.py. A block has self-attention with rotary positions in time, height and width,
cross-attention to the instruction, and a feed-forward layer. The timestep modulates it. InstructX
(arXiv 2510.08485, section 3.1) replaces the text by the connector's output, adds the latents of
the source to the noisy ones, and appends the latents of the references to the sequence.

What is unusual:
- One projection of the time embedding serves all blocks. Each block adds a small table of its own.
- Queries and keys are normalised over the whole width, before it is split into heads.
- A reference counts as one more frame after the last one. It has its own grid, so its size may
  differ from that of the source. Rows and columns start at 0 again: only time tells its tokens from
  those of z. They are clean, yet modulated by the same t, and are dropped before the head.
- `condition` runs once per edit. It embeds context, source and references, and computes the rotary
  tables. `denoise` runs once per step. It embeds z and t, and runs all blocks and the head.
- The large matrices may have any dtype. The residual stream, norms, rotations, modulation, time
  embedding and head are float32, as in the official code. bfloat16 has 8 significant bits: sums of
  squares lose digits, and small branches vanish in a large stream. (diffusers rounds the stream
  after every branch.)

Letters: B batch, C latent channels, F h w latent frames, height and width, L tokens of z, R tokens
of all references, Q tokens of the context, D width, K heads, d = D/K.

    python dit.py [FOLDER]      # costs of the presets, and the shapes of one step
"""

import argparse
import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


@dataclass
class WanDiTConfig:
    """Keys of the official config.json. The defaults are the 14B."""

    dim: int = 5120  # D
    ffn_dim: int = 13824
    num_heads: int = 40  # K
    num_layers: int = 40
    in_dim: int = 16  # C
    out_dim: int = 16
    freq_dim: int = 256  # sinusoids of the timestep
    text_dim: int = 4096  # width of the context; 0: the context is D wide, without text_embedding
    eps: float = 1e-6
    patch_size: tuple = (1, 2, 2)
    source_embedding: bool = False  # ours: a separate patch embedding for the source
    source_bias: bool = False  # Kiwi-Edit: the source embedding has a bias
    source_scaled: bool = False  # Kiwi-Edit: the source's tokens are scaled by σ
    reference_embedding: bool = False  # Kiwi-Edit: a separate one for references too
    references_first: bool = False  # a Kiwi-Edit variant: references precede the clip

    def __post_init__(self):
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"dim {self.dim} is no multiple of 2 * num_heads = {2 * self.num_heads}"
            )


PRESETS = {
    "14B": WanDiTConfig(),
    "1.3B": WanDiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "5B": WanDiTConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48),
    "tiny": WanDiTConfig(dim=64, ffn_dim=128, num_heads=4, num_layers=2, freq_dim=32, text_dim=48),
}


class Linear(nn.Linear):
    """Computes in the dtype of its weight."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Linear32(nn.Linear):
    """Computes in float32 for any dtype of the weight, even under autocast."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class LayerNorm(nn.LayerNorm):
    """Computes in float32 and returns float32."""

    def forward(self, x):
        if not self.elementwise_affine:
            return F.layer_norm(x.float(), self.normalized_shape, eps=self.eps)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Computes in float32 and returns float32."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


def patchify(z, patch):
    """(B, C, F, h, w) -> (B, L, C*p*q*r): patches of p frames, q rows, r columns, raster order."""
    p, q, r = patch
    z = z.unflatten(4, (-1, r)).unflatten(3, (-1, q)).unflatten(2, (-1, p))
    # z is (B, C, f, p, h, q, w, r) now.
    return z.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x, grid, patch):
    """(B, L, p*q*r*C) -> (B, C, F, h, w). The head has the channels last, not first."""
    x = x.unflatten(2, (*patch, -1)).unflatten(1, grid)  # (B, f, h, w, p, q, r, C)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


class PatchEmbedding(nn.Conv3d):
    """Latents (B, C, F, h, w) -> tokens (B, L, D), float32.

    Kernel and stride are equal, so the convolution is one matrix product over the patches. (Some
    releases of torch run 3-D convolutions in bfloat16 very slowly.)
    """

    def __init__(self, config, bias=True):
        super().__init__(config.in_dim, config.dim, config.patch_size, config.patch_size, bias=bias)

    def forward(self, z, use_bias=True):
        patches = patchify(z.to(self.weight.dtype), self.kernel_size)
        return F.linear(patches, self.weight.flatten(1), self.bias if use_bias else None).float()


def modulate(x, shift, scale):
    """x (B, L, D); shift and scale (B or 1, 1, D)."""
    return x * (1 + scale) + shift


def sinusoids(t, width):
    """t (B,) -> (B, width) float32: cosines, then sines of t / 10000^(i / half).

    For an angle of 1000, float32 keeps few digits after the point, and some devices have no
    float64. So angles are counted in turns. A whole t times the first 13 binary digits of a
    frequency is exact. Whole turns are removed from this product before the rest is added.
    """
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half).double() / half) / (2 * math.pi)  # turns per t
    leading = (frequencies * 2**13).round() / 2**13
    frequencies, leading, trailing = (
        x.float().to(t.device) for x in (frequencies, leading, frequencies - leading)
    )
    t = t.float()[:, None]
    whole, fraction = t.round(), t - t.round()
    turns = whole * leading
    turns = turns - turns.round() + whole * trailing + fraction * frequencies
    return torch.cat([(2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()], dim=1)


def rope_table(grid, head_dim, first_frame=0):
    """cos and sin for a grid (f, h, w) of tokens, each (f*h*w, 1, d/2), float32.

    Each axis rotates a third of the channels. Time takes the remainder too: 44 + 42 + 42 of 128.
    """
    space = 2 * (head_dim // 6)
    cosines, sines = [], []
    for axis, width in enumerate((head_dim - 2 * space, space, space)):
        positions = torch.arange(grid[axis]).double() + (first_frame if axis == 0 else 0)
        frequencies = 10000.0 ** (-torch.arange(0, width, 2).double() / width)
        angles = positions[:, None] * frequencies  # (n, width/2), whatever the other positions
        angles = angles.view(*(n if i == axis else 1 for i, n in enumerate(grid)), -1)
        cosines.append(angles.cos().float().expand(*grid, -1))
        sines.append(angles.sin().float().expand(*grid, -1))
    return tuple(torch.cat(x, dim=-1).flatten(0, 2)[:, None] for x in (cosines, sines))


def rotate(x, cos, sin):
    """x (B, L, K, d) float32. Wan pairs neighbouring channels; Qwen pairs halves."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def attention(q, k, v):
    """q (B, L, K, d), k and v (B, M, K, d) -> (B, L, D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Cross-attention to a context or, without one, self-attention."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def forward(self, x, context=None, rope=None):
        """x (B, L, D), context (B, M, D), rope: cos and sin -> (B, L, D) in the weights' dtype."""
        context = x if context is None else context
        v = self.heads(self.v(context))                              # (B, M, K, d)
        q = self.heads(self.norm_q(self.q(x)))                       # (B, L, K, d), float32
        q = (rotate(q, *rope) if rope else q).type_as(v)
        k = self.heads(self.norm_k(self.k(context)))                 # (B, M, K, d), float32
        k = (rotate(k, *rope) if rope else k).type_as(v)
        return self.o(attention(q, k, v))

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim))  # (B, L, D) -> (B, L, K, d)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward.

    The timestep shifts, scales and gates self-attention and feed-forward, not cross-attention.
    Names are official: norm3 comes second, norm2 third.
    """

    def __init__(self, config):
        super().__init__()
        self.norm1 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = Attention(config)
        self.norm2 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, x, t_projection, context, rope):
        """x (B, L+R, D) and t_projection (B, 6, D) float32, context (B, Q, D) -> like x."""
        modulation = (self.modulation.float() + t_projection).chunk(6, dim=1)  # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.self_attn(modulate(self.norm1(x), shift1, scale1), rope=rope)
        x = x + self.cross_attn(self.norm3(x), context)
        return x + gate2 * self.ffn(modulate(self.norm2(x), shift2, scale2))


class Head(nn.Module):
    """Tokens (B, L, D) -> velocities of their patches (B, L, p*q*r*C), float32."""

    def __init__(self, config):
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear32(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x, t_embedding):
        """x (B, L, D), t_embedding (B, D): not projected, unlike the one of the blocks."""
        shift, scale = (self.modulation.float() + t_embedding[:, None]).chunk(2, dim=1)
        return self.head(modulate(self.norm(x), shift, scale))


@dataclass
class Condition:
    """Inputs that all steps of one edit share. `WanDiT.condition` computes them."""

    context: torch.Tensor  # (B, Q, D)
    rope: tuple  # cos and sin, (L+R, 1, d/2) each
    source: torch.Tensor | None  # (1 or B, L, D)
    references: torch.Tensor | None  # (B, R, D)


class WanDiT(nn.Module):
    """Predicts the velocity of noisy latents from an instruction, a source and references.

    Without `config.source_embedding` the tensors are exactly those of the official checkpoint.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.dim
        self.patch_embedding = PatchEmbedding(config)
        self.source_embedding = self.reference_embedding = None
        if config.source_embedding:
            self.source_embedding = PatchEmbedding(config, bias=config.source_bias)
        if config.reference_embedding:
            self.reference_embedding = PatchEmbedding(config)
        self.text_embedding = nn.Identity()
        if config.text_dim:
            self.text_embedding = nn.Sequential(
                Linear(config.text_dim, D), nn.GELU(approximate="tanh"), Linear(D, D)
            )
        self.time_embedding = nn.Sequential(Linear32(config.freq_dim, D), nn.SiLU(), Linear32(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(D, 6 * D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(self, z, t, context, source=None, references=()):
        """`condition`, then `denoise`: one velocity, as in training. Arguments are theirs."""
        return self.denoise(z, t, self.condition(context, z.shape, source, references))

    def denoise(self, z, t, condition):
        """z (B, C, F, h, w) of any float dtype, t (B,) in [0, 1000] -> velocity like z."""
        x = self.patch_embedding(z)                                                # (B, L, D)
        L = x.shape[1]
        if condition.source is not None:
            sigma = t.view(-1, 1, 1) / 1000 if self.config.source_scaled else 1
            x = x + sigma * condition.source                                       # (B, L, D)
        if condition.references is not None:
            x = torch.cat([x, condition.references], dim=1)                        # (B, L+R, D)
        t_embedding = self.time_embedding(sinusoids(t, self.config.freq_dim))      # (B, D)
        t_projection = self.time_projection(t_embedding).unflatten(1, (6, -1))     # (B, 6, D)
        for block in self.blocks:
            x = block(x, t_projection, condition.context, condition.rope)          # (B, L+R, D)
        v = self.head(x[:, :L], t_embedding)                                       # (B, L, pqrC)
        v = unpatchify(v, self.grid(z.shape), self.config.patch_size)              # (B, C, F, h, w)
        return v.type_as(z)

    def condition(self, context, shape, source=None, references=()):
        """Computes the inputs that all steps of an edit share; none depends on z or t.

        Args:
            context: (B, Q, text_dim), or (B, Q, D) without text_embedding. With guidance B is 2.
            shape: shape of z, (B, C, F, h, w).
            source: None or latents (B or 1, C, F, h, w), on the grid of z.
            references: latents (B or 1, C, 1, h', w') of any sizes.

        Raises ValueError for shapes that do not fit each other.
        """
        check_shapes(self, context, shape, source, references)
        head_dim = self.config.dim // self.config.num_heads
        context = self.text_embedding(context.to(self.patch_embedding.weight.dtype))  # (B, Q, D)
        grid, references = self.grid(shape), list(references)
        frame = len(references) if self.config.references_first else 0
        tables = [rope_table(grid, head_dim, first_frame=frame)]
        tokens = []
        embed = self.reference_embedding or self.patch_embedding
        for i, reference in enumerate(references):  # each is one frame in time
            frame = i if self.config.references_first else grid[0] + i
            tables.append(rope_table(self.grid(reference.shape), head_dim, first_frame=frame))
            tokens.append(embed(reference).expand(shape[0], -1, -1))
        cos, sin = (torch.cat(table).to(context.device) for table in zip(*tables))  # (L+R, 1, d/2)
        return Condition(
            context=context,
            rope=(cos, sin),
            source=None if source is None else self.embed_source(source),  # (B or 1, L, D)
            references=torch.cat(tokens, dim=1) if tokens else None,  # (B, R, D)
        )

    def embed_source(self, source):
        """Tokens of the source, to be added to those of z.

        Without an embedding of its own, the source takes that of z, but without the bias, which the
        tokens of z already contain. This is linear, so adding tokens is adding latents.
        """
        if self.source_embedding is None:
            return self.patch_embedding(source, use_bias=False)
        return self.source_embedding(source)

    def add_source_embedding(self):
        """Gives the source a separate embedding, a copy at first, so that nothing changes yet."""
        if self.source_embedding is None:
            with torch.device("meta"):
                self.source_embedding = PatchEmbedding(self.config, bias=self.config.source_bias)
            weight = self.patch_embedding.weight.detach().clone()
            self.source_embedding.weight = nn.Parameter(weight)
            if self.config.source_bias:
                self.source_embedding.bias = nn.Parameter(torch.zeros_like(weight[:, 0, 0, 0, 0]))
            self.config = replace(self.config, source_embedding=True)

    def remove_text_embedding(self):
        """Takes the context as it is, D wide."""
        self.text_embedding = nn.Identity()
        self.config = replace(self.config, text_dim=0)

    def grid(self, shape):
        """(f, h, w) of the tokens of latents (B, C, F, h, w)."""
        return tuple(size // patch for size, patch in zip(shape[2:], self.config.patch_size))

    def initialize(self):
        """Wan's initial weights, to train from scratch: Xavier, small embeddings, zero head."""
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
        return self

    # Loading.

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, blocks=True):
        """Loads a checkpoint with official or diffusers names: a file or a folder.

        dtype None keeps the stored dtypes. With a dtype, the tensors that the official code runs in
        float32 (1.3 % of the 14B) still become float32. `blocks=False` leaves the blocks without
        weights, on the meta device. Raises FileNotFoundError or ValueError.
        """
        tensors = read_tensors(path)
        config = read_config(path)
        if config.num_layers > len(tensors):  # a damaged config could ask for a million layers
            raise ValueError(f"{path} has too few tensors for {config.num_layers} layers")
        for name, tensor in tensors.items():  # one by one: never two copies of the model
            home = device if blocks or not name.startswith("blocks.") else "meta"
            tensors[name] = tensor.to(home, stored_dtype(name, tensor.dtype, dtype))
        try:
            with torch.device("meta"):
                model = cls(config)
            model.load_state_dict(tensors, assign=True)
        except (RuntimeError, TypeError) as error:  # it names the tensors at fault
            raise ValueError(f"{path}: {' '.join(str(error).split())[:600]}") from None
        return model

    def save_pretrained(self, folder, dtype=None):
        """Writes config.json and model.safetensors under the official names.

        `dtype` as in `from_pretrained`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "WanModel", "model_type": "t2v", "text_len": 512}
        config |= asdict(self.config)
        tensors = {}
        for name, tensor in self.state_dict().items():
            stored = stored_dtype(name, tensor.dtype, dtype)
            tensors[name] = tensor.detach().to("cpu", stored).contiguous()
        # Write to another name first: the tensors may be mapped from the existing file.
        partial = folder / "model.safetensors.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        # safetensors makes its files readable by the owner only.
        shutil.copymode(folder / "config.json", partial)
        os.replace(partial, folder / "model.safetensors")


FLOAT32 = re.compile(r"^time_|^head\.|norm|modulation$")

CONFIG_KEYS = {
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "num_attention_heads": "num_heads",
}

# diffusers name -> official name, applied in this order. diffusers' norm2 is norm3.
RENAMES = {
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    ".norm2.": ".norm3.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    "proj_out.": "head.head.",
    ".scale_shift_table": ".modulation",
    "scale_shift_table": "head.modulation",
}


def official_name(name):
    """The official name of a tensor. Official names contain no key of RENAMES, and stay."""
    for theirs, official in RENAMES.items():
        name = name.replace(theirs, official)
    return name


def stored_dtype(name, stored, dtype):
    """The dtype of a loaded tensor: `dtype`, or float32 where Wan's code runs in float32."""
    if dtype is None:
        return stored
    return torch.float32 if FLOAT32.search(name) else dtype


def check_shapes(dit, context, shape, source, references):
    """Raises ValueError for shapes that do not fit each other."""
    B, C, *size = shape
    patch = dit.config.patch_size
    width = dit.config.text_dim or dit.config.dim
    divisible = len(size) == 3 and all(length and not length % p for length, p in zip(size, patch))
    if C != dit.config.in_dim or not divisible:
        raise ValueError(
            f"z is {tuple(shape)}, not (B, {dit.config.in_dim}, F, h, w) in patches {patch}"
        )
    if context.ndim != 3 or context.shape[0] != B or context.shape[2] != width:
        raise ValueError(f"context is {tuple(context.shape)}, not ({B}, Q, {width})")
    if source is not None and tuple(source.shape) not in (tuple(shape), (1, C, *size)):
        raise ValueError(f"source is {tuple(source.shape)}, not like z, {tuple(shape)}")
    for reference in references:
        batch, *front = reference.shape[:3]
        sides = zip(reference.shape[3:], patch[1:])
        divisible = all(length and not length % p for length, p in sides)
        if reference.ndim != 5 or batch not in (1, B) or front != [C, patch[0]] or not divisible:
            shape = tuple(reference.shape)
            raise ValueError(f"a reference is {shape}, not one frame ({B} or 1, {C}, 1, h, w)")


def checkpoint_files(path):
    """The files that hold the weights: `path` itself, the shards of an index, or the only file."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; it should be the DiT's checkpoint")
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


def read_config(path):
    """Reads an official or diffusers config.json. Without a file, returns the 14B's config."""
    path = Path(path)
    file = (path.parent if path.is_file() else path) / "config.json"
    if not file.exists():
        return WanDiTConfig()
    raw = {CONFIG_KEYS.get(key, key): value for key, value in read_json(file).items()}
    if raw.get("model_type", "t2v") not in ("t2v", "ti2v") or raw.get("image_dim") is not None:
        raise ValueError(f"{file} describes no Wan model of model_type t2v or ti2v")
    try:
        if "attention_head_dim" in raw:
            raw["dim"] = raw["attention_head_dim"] * raw["num_heads"]
        if "patch_size" in raw:
            raw["patch_size"] = tuple(raw["patch_size"])
        names = [field.name for field in fields(WanDiTConfig)]
        return WanDiTConfig(**{name: raw[name] for name in names if name in raw})
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: {error!r}") from None


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


def step_flops(config, tokens, queries):
    """FLOPs of one step: matrix products only, two per multiply-add."""
    D = config.dim
    products = 6 * D * D + 2 * D * config.ffn_dim  # one token: q k v o, the context's q and o, ffn
    return 2 * tokens * config.num_layers * (products + 2 * D * (tokens + queries))


def main():
    """Prints the costs of the presets, and the shapes of one step."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "folder", nargs="?", help="checkpoint; the tiny preset at random without one"
    )
    args = parser.parse_args()
    print("81 frames of 832x480:   M parameters   tokens   TFLOP a step (guidance doubles it)")
    for name, config in PRESETS.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in WanDiT(config).parameters())
        tokens = 21 * (15 * 26 if name == "5B" else 30 * 52)  # its VAE halves the sides once more
        tflop = step_flops(config, tokens, 512) / 1e12
        print(f"{name:>20} {parameters / 1e6:14,.1f} {tokens:9,} {tflop:9,.1f}")
    try:
        model = WanDiT.from_pretrained(args.folder) if args.folder else WanDiT(PRESETS["tiny"])
    except (ValueError, OSError) as error:
        parser.exit(2, f"dit.py: {error}\n")
    z = torch.randn(1, model.config.in_dim, 3, 8, 8)
    context = torch.randn(1, 256, model.config.text_dim or model.config.dim)
    with torch.inference_mode():
        condition = model.condition(context, z.shape, source=z, references=[z[:, :, :1]])
        v = model.denoise(z, torch.tensor([500.0]), condition)
    print(f"z {tuple(z.shape)}, a source and a reference: {len(condition.rope[0])} tokens")
    print(f"context {tuple(context.shape)} -> {tuple(condition.context.shape)}")
    print(f"velocity {tuple(v.shape)}")


if __name__ == "__main__":
    main()
