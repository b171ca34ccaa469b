"""dit.py against plain formulas in float64, against diffusers, and against what a user may do wrong.

All models are random and tiny, with sizes that differ wherever a mix-up is possible.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import dit as module
from dit import PRESETS, WanDiT, WanDiTConfig, official_name, rope_table, rotate

TOLERANCE = 2e-5
CONFIG = WanDiTConfig(
    dim=48, ffn_dim=80, num_heads=3, num_layers=2, in_dim=4, out_dim=4, freq_dim=32, text_dim=24
)
# The same in the keys of the official config.json.
OFFICIAL = dict(
    _class_name="WanModel",
    _diffusers_version="0.30.0",
    dim=48,
    eps=1e-06,
    ffn_dim=80,
    freq_dim=32,
    in_dim=4,
    model_type="t2v",
    num_heads=3,
    num_layers=2,
    out_dim=4,
    text_len=512,
    text_dim=24,
)
MANIFESTS = json.loads((Path(__file__).parent / "manifests" / "wan2.1_t2v.json").read_text())


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def randomize(model, seed=0):
    """Weights under which every term matters: gains not 1, biases and tables not 0, attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1 or "modulation" in name or "table" in name:
                p.copy_(0.3 * noise + (p.ndim == 1 and "norm" in name and name.endswith("weight")))
            else:
                p.copy_(noise * 1.3 / math.sqrt(p[0].numel()))
    return model


@pytest.fixture(scope="module")
def model():
    return randomize(WanDiT(CONFIG)).requires_grad_(False)


def inputs(config, grid=(3, 4, 6), batch=1, seed=0):
    """z, t (another for each sample) and context."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, config.in_dim, *grid, generator=generator)
    t = 1000 * torch.rand(batch, generator=generator)
    return z, t, torch.randn(batch, 7, config.text_dim or config.dim, generator=generator)


def latents(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Plain formulas, in float64. Position is written out token by token and rotation is complex, as in the official code.


def plain(model, z, t, context, source=None, references=()):
    w, config = {name: p.double() for name, p in model.state_dict().items()}, model.config
    z, t, context = z.double(), t.double(), context.double()
    linear = lambda name, x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    norm = lambda x: (
        (x - x.mean(-1, keepdim=True))
        / (x.var(-1, unbiased=False, keepdim=True) + config.eps).sqrt()
    )
    rms = lambda name, x: (
        x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() * w[f"{name}.weight"]
    )
    silu = lambda x: x / (1 + (-x).exp())
    gelu = lambda x: x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
    conv = lambda x, weight, bias=None: (
        F.conv3d(x.double(), weight, bias, stride=config.patch_size).flatten(2).mT
    )

    def positions(shape, first):
        f, h, w_ = (n // p for n, p in zip(shape[2:], config.patch_size))
        return [(first + i, j, k) for i in range(f) for j in range(h) for k in range(w_)]

    d = config.dim // config.num_heads
    widths = [d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6)]

    def rotated(x, places):  # x (B, L, K, d)
        turns = torch.tensor(
            [
                [
                    place[axis] * 10000 ** (-2 * i / width)
                    for axis, width in enumerate(widths)
                    for i in range(width // 2)
                ]
                for place in places
            ],
            dtype=torch.float64,
        )
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2).contiguous())
        return torch.view_as_real(
            pairs * torch.polar(torch.ones_like(turns), turns)[:, None]
        ).flatten(-2)

    def attend(name, x, y, places=None):
        split = lambda v: v.unflatten(-1, (config.num_heads, d))
        q, k = (
            split(rms(f"{name}.norm_{n}", linear(f"{name}.{n}", v)))
            for n, v in (("q", x), ("k", y))
        )
        if places:
            q, k = rotated(q, places), rotated(k, places)
        scores = torch.einsum("blkd,bmkd->bklm", q, k) / math.sqrt(d)
        v = split(linear(f"{name}.v", y))
        return linear(
            f"{name}.o", torch.einsum("bklm,bmkd->blkd", scores.softmax(-1), v).flatten(2)
        )

    weight, bias = w["patch_embedding.weight"], w["patch_embedding.bias"]
    x = conv(z, weight, bias)
    if source is not None:
        x = x + conv(source, w.get("source_embedding.weight", weight))
    places, count = positions(z.shape, 0), x.shape[1]
    for i, reference in enumerate(references):
        x = torch.cat([x, conv(reference, weight, bias).expand(len(x), -1, -1)], dim=1)
        places = places + positions(reference.shape, z.shape[2] // config.patch_size[0] + i)
    if config.text_dim:
        context = linear("text_embedding.2", gelu(linear("text_embedding.0", context)))
    half = config.freq_dim // 2
    angles = t[:, None] * torch.tensor(
        [10000 ** (-i / half) for i in range(half)], dtype=torch.float64
    )
    e = linear("time_embedding.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    e = linear("time_embedding.2", silu(e))
    e6 = linear("time_projection.1", silu(e)).view(len(z), 6, -1)
    for i in range(config.num_layers):
        name = f"blocks.{i}"
        m = (w[f"{name}.modulation"] + e6)[:, :, None]
        y = norm(x) * (1 + m[:, 1]) + m[:, 0]
        x = x + m[:, 2] * attend(f"{name}.self_attn", y, y, places)
        x = x + attend(
            f"{name}.cross_attn",
            norm(x) * w[f"{name}.norm3.weight"] + w[f"{name}.norm3.bias"],
            context,
        )
        y = norm(x) * (1 + m[:, 4]) + m[:, 3]
        x = x + m[:, 5] * linear(f"{name}.ffn.2", gelu(linear(f"{name}.ffn.0", y)))
    m = (w["head.modulation"] + e[:, None])[:, :, None]
    v = linear("head.head", norm(x[:, :count]) * (1 + m[:, 1]) + m[:, 0])
    (F_, h, w_), (p, q, r) = z.shape[2:], config.patch_size
    v = v.view(len(z), F_ // p, h // q, w_ // r, p, q, r, config.out_dim)
    return torch.einsum("bfhwpqrc->bcfphqwr", v).reshape(z.shape)


CASES = {
    "image": dict(grid=(1, 4, 6)),
    "clip": dict(),
    "batch of two": dict(batch=2),
    "source": dict(source=(1, 3, 4, 6)),
    "source for each": dict(batch=2, source=(2, 3, 4, 6)),
    "source for both": dict(batch=2, source=(1, 3, 4, 6)),
    "source with an embedding of its own": dict(
        batch=2, source=(1, 3, 4, 6), config=dict(source_embedding=True)
    ),
    "reference": dict(references=[(1, 4, 6)]),
    "references of other sizes": dict(references=[(1, 2, 2), (1, 8, 2), (1, 2, 10)]),
    "references for each": dict(batch=2, references=[(2, 6, 4), (1, 2, 4)]),
    "everything": dict(batch=2, source=(1, 3, 4, 6), references=[(1, 2, 8), (2, 4, 2)]),
    "no text embedding": dict(batch=2, config=dict(text_dim=0)),
    "patch of one": dict(
        grid=(2, 3, 5),
        source=(1, 2, 3, 5),
        references=[(1, 3, 1)],
        config=dict(patch_size=(1, 1, 1)),
    ),
    "patch in time": dict(grid=(4, 6, 5), source=(1, 4, 6, 5), config=dict(patch_size=(2, 3, 1))),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_formulas(case):
    """Every path of the model, with and without what is held per edit."""
    case = dict(CASES[case])
    config = replace(CONFIG, **case.pop("config", {}))
    model = randomize(WanDiT(config)).requires_grad_(False)
    source = case.pop("source", None)
    source = None if source is None else latents(source[0], config.in_dim, *source[1:])
    references = [
        latents(b, config.in_dim, 1, h, w, seed=i)
        for i, (b, h, w) in enumerate(case.pop("references", []))
    ]
    z, t, context = inputs(config, **case)
    expected = plain(model, z, t, context, source, references)
    assert expected.std() > 0.3
    whole = model(z, t, context, source=source, references=references)
    step = model.denoise(z, t, model.condition(context, z.shape, source, references))
    assert whole.shape == z.shape and whole.dtype == torch.float32
    assert error(whole, expected) < TOLERANCE and error(step, expected) < TOLERANCE


def test_rotation_equals_the_complex_one_at_full_size():
    """Tables in float32 lose the far rows of a video; pairs must be neighbors; time has 44 of 128 channels."""
    grid, d = (21, 6, 52), 128
    cos, sin = rope_table(grid, d, first_frame=3)
    assert cos.shape == (21 * 6 * 52, 1, 64) and cos.dtype == torch.float32
    x = latents(1, len(cos), 1, d)
    f, h, w = (i.flatten() for i in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    turns = torch.cat(
        [
            p.double()[:, None] * 10000 ** (-torch.arange(0, width, 2).double() / width)
            for p, width in ((f + 3, 44), (h, 42), (w, 42))
        ],
        dim=1,
    )
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(
        pairs * torch.polar(torch.ones_like(turns), turns)[:, None]
    ).flatten(-2)
    assert (rotate(x, cos, sin) - expected).abs().max() < 2e-6


# Diffusers.


@pytest.fixture(scope="module")
def theirs():
    diffusers = pytest.importorskip("diffusers")
    return (
        randomize(
            diffusers.WanTransformer3DModel(
                num_attention_heads=3,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                text_dim=24,
                freq_dim=32,
                ffn_dim=80,
                num_layers=2,
            )
        )
        .eval()
        .requires_grad_(False)
    )


@pytest.fixture(scope="module")
def converted(theirs, tmp_path_factory):
    theirs.save_pretrained(tmp_path_factory.mktemp("diffusers"))
    return WanDiT.from_pretrained(tmp_path_factory.getbasetemp() / "diffusers0")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 2, 14), (5, 6, 2), (3, 10, 6), (2, 2, 2)])
def test_equals_diffusers(theirs, converted, grid, batch):
    """Images, clips, odd numbers of patches, another t for each sample."""
    z, t, context = inputs(CONFIG, grid, batch)
    expected = theirs(z, t, context, return_dict=False)[0]
    assert error(converted(z, t, context), expected) < TOLERANCE
    assert (
        error(converted.denoise(z, t, converted.condition(context, z.shape)), expected) < TOLERANCE
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_reference_is_one_more_frame(theirs, converted, batch):
    """On the grid of z, a reference is what diffusers would do with it as frame F+1, and the head drops that frame."""
    z, t, context = inputs(CONFIG, (3, 6, 4), batch)
    reference, other = latents(batch, 4, 1, 6, 4), latents(batch, 4, 1, 6, 4, seed=2)
    for references in ([reference], [reference, other]):
        expected = theirs(torch.cat([z, *references], dim=2), t, context, return_dict=False)[0][
            :, :, :3
        ]
        assert error(converted(z, t, context, references=references), expected) < TOLERANCE
    assert (
        error(converted(z, t, context, references=[other, reference]), expected) > 0.01
    )  # their order counts


def shards(model, folder):
    """Two safetensors files and their index, as the official 14B is stored."""
    names = list(model.state_dict())
    parts = {"a-1-of-2.safetensors": names[::2], "a-2-of-2.safetensors": names[1::2]}
    folder.mkdir(exist_ok=True)
    for file, chosen in parts.items():
        save_file({name: model.state_dict()[name].contiguous() for name in chosen}, folder / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, chosen in parts.items() for name in chosen},
    }
    (folder / "a.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(OFFICIAL))
    return folder


@pytest.mark.parametrize(
    "layout", ["diffusers", "diffusers shards", "official", "official shards", "pth", "file"]
)
def test_every_layout_is_the_same_model(theirs, converted, layout, tmp_path):
    """Names of either kind, one file or many: one wrong rename leaves a random layer, or with strict loading none."""
    path = tmp_path
    if layout.startswith("diffusers"):
        theirs.save_pretrained(tmp_path, max_shard_size="40KB" if "shards" in layout else "1GB")
        assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == ("shards" in layout)
    elif layout == "official shards":
        shards(converted, tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
        path = (
            tmp_path / "model.pth"
            if layout == "pth"
            else tmp_path / "diffusion_pytorch_model.safetensors"
        )
        torch.save(converted.state_dict(), path) if layout == "pth" else save_file(
            converted.state_dict(), path
        )
        # Beside the official DiT lie the pickles of T5 and VAE, which are not its weights.
        if layout == "official":
            torch.save({"x": torch.zeros(1)}, tmp_path / "Wan2.1_VAE.pth")
        path = path if layout == "file" else tmp_path
    found = WanDiT.from_pretrained(path)
    assert found.config == CONFIG
    assert all(
        torch.equal(found.state_dict()[name], t) for name, t in converted.state_dict().items()
    )
    z, t, context = inputs(CONFIG, batch=2)
    assert error(found(z, t, context), theirs(z, t, context, return_dict=False)[0]) < TOLERANCE


# The released checkpoints.


def expand(manifest):
    tensors = dict(manifest["tensors"])
    for layer in manifest["layers"]:
        for i in range(layer["count"]):
            tensors |= {
                layer["prefix"].format(i) + name: shape for name, shape in layer["tensors"].items()
            }
    return tensors


@pytest.mark.parametrize("preset, heads", [("14B", 40), ("1.3B", 12)])
def test_full_size_has_exactly_the_released_tensors(preset, heads):
    """Names and shapes of the official files, and of the diffusers ones after renaming."""
    with torch.device("meta"):
        found = {name: list(t.shape) for name, t in WanDiT(PRESETS[preset]).state_dict().items()}
    assert found == expand(MANIFESTS[preset])
    assert sum(map(math.prod, found.values())) == MANIFESTS[preset]["parameters"]
    diffusers, config = pytest.importorskip("diffusers"), PRESETS[preset]
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=128,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    assert {official_name(name): list(t.shape) for name, t in theirs.state_dict().items()} == found


# Sources, and the embedding of their own.


def test_source_is_added_to_the_latents(model):
    """The paper's addition, as far as rounding allows; with the bias counted twice it would be off."""
    (z, t, context), source = inputs(CONFIG, batch=2), latents(2, 4, 3, 4, 6)
    assert error(model(z, t, context, source=source), model(z + source, t, context)) < TOLERANCE
    assert error(model(z, t, context), model(z + source, t, context)) > 0.1


def test_source_embedding_starts_as_a_copy_and_then_goes_its_own_way(model):
    """Stage 2 must start where stage 1 ended; a shared tensor would train both at once."""
    (z, t, context), source, changed = inputs(CONFIG), latents(1, 4, 3, 4, 6), copy.deepcopy(model)
    before = changed(z, t, context, source=source)
    random = torch.get_rng_state()
    changed.add_source_embedding()
    assert torch.equal(random, torch.get_rng_state())
    assert set(changed.state_dict()) - set(model.state_dict()) == {"source_embedding.weight"}
    assert torch.equal(changed(z, t, context, source=source), before)
    changed(z, t, context, source=source).square().mean().backward()
    assert changed.source_embedding.weight.grad.abs().sum() > 0
    assert changed.patch_embedding.weight.grad is None  # frozen, and not the same tensor
    with torch.no_grad():
        changed.source_embedding.weight.mul_(2)
    assert (
        error(changed(z, t, context, source=source), model(z, t, context, source=2 * source))
        < TOLERANCE
    )
    changed.add_source_embedding()  # a second call must not undo training
    assert (
        error(changed(z, t, context, source=source), model(z, t, context, source=2 * source))
        < TOLERANCE
    )


# The work of an edit and that of a step.


def test_steps_do_no_work_of_the_edit(model):
    """Keys and values of the context, and everything about the pictures, are computed once, not in each of 50 steps."""
    calls = []
    watched = {"text": model.text_embedding, "patch": model.patch_embedding}
    watched |= {
        f"{i}{n}": getattr(block.cross_attn, n)
        for i, block in enumerate(model.blocks)
        for n in "kv"
    }
    hooks = [
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, part in watched.items()
    ]
    z, t, context = inputs(CONFIG)
    condition = model.condition(context, z.shape, latents(*z.shape), [latents(1, 4, 1, 2, 2)])
    assert sorted(calls) == ["0k", "0v", "1k", "1v", "patch", "patch", "text"]
    calls.clear()
    model.denoise(z, t, condition)
    model.denoise(z, t / 2, condition)
    assert calls == ["patch", "patch"]  # of z
    for hook in hooks:
        hook.remove()


def test_training_computes_keys_and_values_inside_the_blocks(model):
    """FSDP gathers a block's weights when its forward runs: whatever uses them before would see shards."""
    inside, seen = [], []
    hooks = []
    for block in model.blocks:
        hooks.append(block.register_forward_pre_hook(lambda *_: inside.append(1)))
        hooks.append(block.register_forward_hook(lambda *_: inside.clear()))
        hooks += [
            part.register_forward_hook(lambda *_: seen.append(len(inside)))
            for part in block.modules()
            if not list(part.children())
        ]
    model(*inputs(CONFIG))
    for hook in hooks:
        hook.remove()
    assert len(seen) > 30 and set(seen) == {1}


def test_guidance_as_one_batch(model):
    """Two contexts, one z: samples of a batch must not see each other. Also the source of one edit serves both."""
    (z, t, _), (_, _, context) = inputs(CONFIG), inputs(CONFIG, batch=2)
    source, references = latents(*z.shape), [latents(1, 4, 1, 4, 2)]
    condition = model.condition(context, (2, *z.shape[1:]), source, references)
    both = model.denoise(torch.cat([z, z]), torch.cat([t, t]), condition)
    for i in range(2):
        assert (
            error(
                both[i : i + 1],
                model(z, t, context[i : i + 1], source=source, references=references),
            )
            < TOLERANCE
        )


def test_checkpointing_changes_memory_only(model):
    """Gradients with recomputed blocks must be those without, for every parameter and for the context."""
    trained, (z, t, context) = copy.deepcopy(model).requires_grad_(True), inputs(CONFIG, batch=2)
    runs, gradients = [], []
    hooks = [block.register_forward_pre_hook(lambda *_: runs.append(1)) for block in trained.blocks]
    trained.add_source_embedding()
    for recompute in (False, True):
        trained.gradient_checkpointing = recompute
        trained.zero_grad()
        context = context.detach().requires_grad_()
        trained(
            z, t, context, source=latents(*z.shape), references=[latents(1, 4, 1, 2, 2)]
        ).square().mean().backward()
        gradients.append([context.grad, *(p.grad for p in trained.parameters())])
    assert len(runs) == len(hooks) * 3  # once, then once and again
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0])
    assert all(error(a, b) < TOLERANCE for a, b in zip(*gradients))
    with torch.no_grad():
        assert error(trained(z, t, context), model(z, t, context)) < TOLERANCE


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_equals_eager(model):
    """In place, under the same names, one compilation for all blocks and steps, and one more for all other sizes."""
    from torch._dynamo.utils import counters

    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile_blocks()
    assert list(compiled.state_dict()) == list(model.state_dict())
    graphs = []
    for grid in ((3, 4, 6), (1, 6, 4), (2, 8, 6), (5, 2, 2)):
        z, t, context = inputs(CONFIG, grid, batch=2)
        condition = compiled.condition(
            context, z.shape, latents(*z.shape), [latents(1, 4, 1, 2, 2)]
        )
        for step in (t, t / 2):
            assert (
                error(compiled.denoise(z, step, condition), model.denoise(z, step, condition))
                < 1e-5
            )
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("rounded", [False, True])
def test_compiled_goes_with_the_rest(model, tmp_path, rounded):
    """Blocks that get their weights anew in every turn, or have them in int8, are still one compilation."""
    from torch._dynamo.utils import counters

    from connector import Offload

    model.save_pretrained(tmp_path)
    eager, compiled = (WanDiT.from_pretrained(tmp_path, offload=Offload) for _ in range(2))
    if rounded:
        eager, compiled = eager.quantize(torch.int8), compiled.quantize(torch.int8)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile_blocks()
    z, t, context = inputs(CONFIG, batch=2)
    with torch.no_grad():
        conditions = [
            one.condition(context, z.shape, latents(*z.shape)) for one in (eager, compiled)
        ]
        for step in (t, t / 2):
            assert (
                error(
                    compiled.denoise(z, step, conditions[1]), eager.denoise(z, step, conditions[0])
                )
                < 1e-5
            )
    assert counters["stats"]["unique_graphs"] == 1


def test_times_of_the_schedule(model):
    """Embedded once for all steps, they are those that each step would embed; a t that is not among them is no error."""
    z, _, context = inputs(CONFIG, batch=2)
    scheduled = model.condition(context, z.shape, timesteps=[999.0, 412.5])
    plain = model.condition(context, z.shape)
    calls, embed = [], model.embed_time
    model.embed_time = lambda t: calls.append(t) or embed(t)
    try:
        for t, count in (
            ([412.5, 412.5], 0),
            ([999.0, 999.0], 0),
            ([412.5, 999.0], 1),
            ([3.0, 3.0], 1),
        ):
            calls.clear()
            result = model.denoise(z, torch.tensor(t), scheduled)
            assert len(calls) == count
            assert error(result, model.denoise(z, torch.tensor(t), plain)) < TOLERANCE
    finally:
        del model.embed_time


PARALLEL = """
import sys
import torch
import torch.distributed as dist
from connector import Offload
from dit import WanDiT

dist.init_process_group("gloo")
cases, folder = torch.load(sys.argv[1], weights_only=True), sys.argv[2]
whole = WanDiT.from_pretrained(folder).parallelize(dist.group.WORLD, "cpu")
read = WanDiT.from_pretrained(folder, offload=Offload).parallelize(dist.group.WORLD, "cpu")
results = []
for model in (whole, read):
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.blocks.parameters())
    for z, t, context, source, references in cases:
        with torch.inference_mode():
            condition = model.condition(context, z.shape, source, references, [t[0].item()])
            results.append((model.denoise(z, t, condition), model(z, t, context, source, references)))
torch.save((results, held), f"{sys.argv[1]}.{dist.get_rank()}")
dist.barrier()                  # one that left while the other still talks to it would be taken down with an error
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    """Each has half of the weights and half of the tokens, also where these do not divide; both get the whole result."""
    model = randomize(WanDiT(replace(CONFIG, num_heads=4))).requires_grad_(False)
    model.save_pretrained(tmp_path / "dit")
    cases = []
    for grid, batch, references in (
        ((3, 4, 6), 2, [latents(1, 4, 1, 2, 2)]),
        ((1, 6, 4), 1, []),
        ((1, 2, 2), 2, []),
    ):
        z, t, context = inputs(CONFIG, grid, batch=batch)
        cases.append((z, t, context, latents(*z.shape), references))
    torch.save(cases, tmp_path / "cases")
    (tmp_path / "parallel.py").write_text(PARALLEL)
    top = Path(module.__file__).parent
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            tmp_path / "parallel.py",
            tmp_path / "cases",
            tmp_path / "dit",
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(top), "OMP_NUM_THREADS": "1"},
    )
    total = sum(p.numel() for p in model.blocks.parameters())
    for rank in (0, 1):
        results, held = torch.load(tmp_path / f"cases.{rank}", weights_only=True)
        assert held < 0.6 * total
        for (z, t, context, source, references), both in zip([*cases, *cases], results):
            for result in both:
                assert error(result, model(z, t, context, source, references)) < 1e-5


@pytest.mark.parametrize("dtype, worst", [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.08)])
def test_quantized(model, tmp_path, dtype, worst):
    """Exactly the model whose matrices are the rounded ones, near the full one, and the same when it is read by blocks."""
    from connector import Offload

    rounded, expected = copy.deepcopy(model).quantize(dtype), copy.deepcopy(model)
    layers = dict(rounded.named_modules())
    for name, linear in expected.named_modules():
        if isinstance(linear, module.Linear) and name.startswith("blocks."):
            stored = layers[name]
            assert stored.weight.dtype == dtype
            dense = stored.weight.double() * stored.scale.double()[:, None]
            step = (
                linear.weight.abs().amax(dim=1) / 127
                if dtype == torch.int8
                else linear.weight.abs().amax(dim=1) / 14
            )
            assert ((dense - linear.weight).abs() <= step[:, None] * 0.5001).all()
            linear.weight.data = dense.float()
    z, t, context = inputs(CONFIG, batch=2)
    result = rounded(z, t, context, latents(*z.shape))
    assert error(result, expected(z, t, context, latents(*z.shape))) < TOLERANCE
    assert 1e-4 < error(result, model(z, t, context, latents(*z.shape))) < worst
    model.save_pretrained(tmp_path)
    read = WanDiT.from_pretrained(tmp_path, offload=Offload).quantize(dtype).requires_grad_(False)
    assert torch.equal(read(z, t, context, latents(*z.shape)), result) and read.offload is None


def test_heads_that_cannot_be_shared_out(model):
    class Pair:
        size = staticmethod(lambda: 2)

    with pytest.raises(ValueError, match="3 heads cannot be shared out among 2"):
        model.parallelize(Pair(), "cpu")


# Precision.

KEPT = ("time_embedding.", "time_projection.", "head.", "norm", "modulation")


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def test_dtype(folder):
    """Stored as it is, unless told otherwise; what the official code runs in float32 stays that."""
    assert {p.dtype for p in WanDiT.from_pretrained(folder).parameters()} == {torch.float32}
    half = WanDiT.from_pretrained(folder, dtype=torch.bfloat16)
    for name, p in half.named_parameters():
        assert p.dtype == (
            torch.float32 if any(part in name for part in KEPT) else torch.bfloat16
        ), name
    save_file(
        {name: p.bfloat16() for name, p in half.state_dict().items()}, folder / "model.safetensors"
    )
    assert {p.dtype for p in WanDiT.from_pretrained(folder).parameters()} == {torch.bfloat16}


def test_bfloat16_is_as_close_as_it_can_be(theirs, converted, tmp_path):
    """With stream and norms in float32 only the matrices round; diffusers rounds the stream as well."""
    converted.save_pretrained(tmp_path)
    half = WanDiT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    their_half = type(theirs).from_pretrained(
        save_theirs(theirs, tmp_path / "theirs"), torch_dtype=torch.bfloat16
    )
    ours, other = [], []
    for seed in range(4):
        z, t, context = inputs(CONFIG, batch=2, seed=seed)
        source, expected = latents(*z.shape), converted(z, t, context)
        found = half(z, t, context)
        assert (
            found.dtype == torch.float32
            and half(z.bfloat16(), t, context.bfloat16()).dtype == torch.bfloat16
        )
        ours.append(error(found, expected))
        other.append(
            error(their_half(z.bfloat16(), t, context.bfloat16(), return_dict=False)[0], expected)
        )
        assert (
            error(half(z, t, context, source=source), converted(z, t, context, source=source))
            < 0.03
        )
    assert max(ours) < 0.03 and sum(ours) < sum(other)


def save_theirs(theirs, folder):
    theirs.save_pretrained(folder)
    return folder


def test_time_is_float32_under_autocast(model):
    """Training runs under autocast, which turns plain Linears into bfloat16 whatever dtype their input has."""
    z, t, context = inputs(CONFIG, batch=2)
    outputs = {}
    parts = {
        "e": model.time_embedding,
        "e6": model.time_projection,
        "head": model.head,
        "x": model.blocks[1],
    }
    for run in ("plain", "autocast"):
        hooks = [
            part.register_forward_hook(
                lambda _, i, out, name=name: outputs.setdefault((run, name), out)
            )
            for name, part in parts.items()
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=run == "autocast"):
            v = model(z, t, context)
        for hook in hooks:
            hook.remove()
        assert v.dtype == torch.float32
    assert {out.dtype for out in outputs.values()} == {torch.float32}
    assert torch.equal(outputs["autocast", "e"], outputs["plain", "e"])
    assert torch.equal(outputs["autocast", "e6"], outputs["plain", "e6"])
    assert 0 < error(outputs["autocast", "head"], outputs["plain", "head"]) < 0.03


# Saving and starting.


def test_saved_is_what_was_there(model, tmp_path):
    """What was added or taken away since it was built must be in the config, or the file can't be loaded again."""
    changed, (z, t, _) = copy.deepcopy(model), inputs(CONFIG)
    changed.add_source_embedding()
    changed.text_embedding = torch.nn.Identity()
    with torch.no_grad():
        changed.source_embedding.weight.add_(0.1)
    changed.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert set(load_file(tmp_path / "model.safetensors")) == set(changed.state_dict())
    again = WanDiT.from_pretrained(tmp_path)
    assert again.config == replace(CONFIG, source_embedding=True, text_dim=0)
    context, source = latents(1, 5, CONFIG.dim), latents(*z.shape)
    assert all(torch.equal(again.state_dict()[name], t) for name, t in changed.state_dict().items())
    assert (
        error(again(z, t, context, source=source), changed(z, t, context, source=source))
        < TOLERANCE
    )
    changed.save_pretrained(tmp_path, dtype=torch.bfloat16)
    found = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for name, t in found.items() if any(part in name for part in KEPT)} == {
        torch.float32
    }
    assert (
        found["blocks.0.self_attn.q.weight"].dtype
        == found["source_embedding.weight"].dtype
        == torch.bfloat16
    )


def test_saved_config_has_the_official_keys(folder):
    """The official loader, and ours for a file from there, tell a DiT by these."""
    config = json.loads((folder / "config.json").read_text())
    assert (
        config.items()
        >= {key: value for key, value in OFFICIAL.items() if key != "_diffusers_version"}.items()
    )


def test_a_failed_save_leaves_the_old_file(folder, model, monkeypatch):
    """A full disk must not cost the checkpoint that was there."""
    before = (folder / "model.safetensors").read_bytes()

    def full(tensors, file, **more):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_fresh_model_starts_at_zero_and_learns():
    """Wan's start: a head of zeros, so that the first velocity is none; gradients still reach the head."""
    torch.manual_seed(0)
    fresh, (z, t, context) = WanDiT(CONFIG), inputs(CONFIG)
    v = fresh(z, t, context)
    assert v.abs().max() == 0
    (v - 1).square().mean().backward()
    assert fresh.head.head.weight.grad.abs().sum() > 0
    assert abs(fresh.time_embedding[0].weight.std().item() - 0.02) < 0.002
    assert abs(fresh.text_embedding[2].weight.std().item() - 0.02) < 0.002
    bound = math.sqrt(6 / (16 + 48))  # Xavier, of a patch of 16 numbers
    assert 0.95 * bound < fresh.patch_embedding.weight.abs().max() <= bound


# Mistakes of the user.


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(z=(1, 4, 3, 5, 6)), r"z is \(1, 4, 3, 5, 6\).*multiples of the patch \(1, 2, 2\)"),
        (dict(z=(1, 3, 3, 4, 6)), r"z is .*should be \(B, 4, F, h, w\)"),
        (dict(z=(4, 3, 4, 6)), "z is"),
        (dict(z=(1, 4, 0, 4, 6)), "z is"),
        (dict(context=(1, 7, 25)), r"context is \(1, 7, 25\); it should be \(1, Q, 24\)"),
        (dict(context=(2, 7, 24)), "context is"),
        (dict(context=(7, 24)), "context is"),
        (dict(source=(1, 4, 3, 4, 4)), "source is .* like z"),
        (dict(source=(2, 4, 3, 4, 6)), "source is"),
        (dict(references=[(1, 4, 1, 3, 2)]), "reference 1 is .* multiples"),
        (dict(references=[(1, 4, 1, 2, 2), (1, 4, 2, 2, 2)]), "reference 2 is .* one latent frame"),
        (dict(references=[(2, 4, 1, 2, 2)]), "reference 1 is .* batch of 1"),
        (dict(references=[(1, 5, 1, 2, 2)]), "reference 1 is .* 4, F, h, w"),
        (dict(t=(2,)), r"t \(2,\); .* and t \(1,\)"),
        (dict(t=()), r"t \(\)"),
    ],
)
def test_shapes_that_do_not_go_together(model, change, said):
    """One line that names the input, where broadcasting would give a wrong picture or a trace from deep inside."""
    shapes = dict(
        z=(1, 4, 3, 4, 6),
        t=(1,),
        context=(1, 7, 24),
        source=(1, 4, 3, 4, 6),
        references=[(1, 4, 1, 2, 2)],
    )
    shapes |= change
    made = {
        name: [torch.zeros(s) for s in shape] if name == "references" else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=said) as raised:
        model(**made)
    assert "\n" not in str(raised.value)


def test_condition_of_another_edit(model):
    """A condition belongs to the shape it was made for."""
    z, t, context = inputs(CONFIG)
    condition = model.condition(context, z.shape)
    with pytest.raises(ValueError, match="this condition is for z"):
        model.denoise(z[:, :, :2], t, condition)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(dim=50), "dim 50 should be a multiple of 2"),
        (dict(num_heads=0), "num_heads is 0"),
        (dict(num_layers=2.0), "num_layers is 2.0"),
        (dict(ffn_dim="80"), "ffn_dim is '80'"),
        (dict(freq_dim=31), "freq_dim 31"),
        (dict(eps=None), "eps is None"),
        (dict(patch_size=[2, 2]), "patch_size is"),
        (dict(patch_size=2), "patch_size is 2"),
        (dict(patch_size=[1, 2, 0]), "patch_size is"),
        (dict(text_dim=-1), "text_dim is -1"),
        (dict(source_embedding=1), "source_embedding is 1"),
        (dict(window=3), "unknown keys window; known are dim"),
        (dict(model_type="i2v"), 'model_type must be "t2v"'),
        (dict(added_kv_proj_dim=5120), "added_kv_proj_dim must be null"),
        (dict(attention_head_dim="16"), "config.json: "),
    ],
)
def test_configs_that_make_no_model(folder, change, said):
    """Image-to-video models have other layers: half loaded, they would run and give noise."""
    (folder / "config.json").write_text(json.dumps(OFFICIAL | change))
    with pytest.raises(ValueError, match=said) as raised:
        WanDiT.from_pretrained(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[1]", "{", "3"])
def test_config_that_is_no_json(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is not a JSON object"):
        WanDiT.from_pretrained(folder)


def drop(tensors):
    del tensors["head.head.bias"], tensors["blocks.1.modulation"]


def twice(tensors):
    tensors["proj_out.bias"] = tensors["head.head.bias"].clone()


@pytest.mark.parametrize(
    "change, said",
    [
        (drop, "2 missing: .*blocks.1.modulation"),
        (
            lambda tensors: tensors.update({"img_emb.proj.0.weight": torch.zeros(1)}),
            "1 unexpected: img_emb.proj.0.weight",
        ),
        (
            lambda tensors: tensors.update({"head.head.bias": torch.zeros(3)}),
            r"head.head.bias \[3\] instead of \[16\]",
        ),
        (
            lambda tensors: tensors.update({"head.head.bias": torch.zeros(16, dtype=torch.int8)}),
            "quantized: .*torch.int8",
        ),
        (twice, "holds head.head.bias twice"),
        (lambda tensors: tensors.clear(), r"69 missing: .*, \.\.\.$"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, said):
    """Every odd tensor is named in one line; nothing is left random."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=said) as raised:
        WanDiT.from_pretrained(folder)
    assert (
        str(folder) in str(raised.value)
        and "\n" not in str(raised.value)
        and len(str(raised.value)) < 600
    )


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_damaged_file(folder, size):
    """A download that was cut off: say which file."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        WanDiT.from_pretrained(folder)


def test_damaged_shards(model, tmp_path):
    """One of the six files of the 14B is missing, cut off, or its index is no index."""
    folder = shards(model, tmp_path / "x")
    second = folder / "a-2-of-2.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="a-2-of-2.safetensors is damaged"):
        WanDiT.from_pretrained(folder)
    second.unlink()
    with pytest.raises(
        FileNotFoundError, match="a.safetensors.index.json names a-2-of-2.safetensors, not found"
    ):
        WanDiT.from_pretrained(folder)
    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (folder / "a.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="a.safetensors.index.json is no index of shards"):
            WanDiT.from_pretrained(folder)


class Malice:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    "content", [Malice(), [torch.zeros(1)], {"x": 1}, None], ids=["code", "list", "int", "bytes"]
)
def test_pickles_are_data(tmp_path, content):
    """A pickle may hold code, which must not run, or something other than tensors."""
    file = tmp_path / "model.pth"
    file.write_bytes(b"no pickle") if content is None else torch.save(content, file)
    with pytest.raises(ValueError, match="model.pth (is damaged|must hold)") as raised:
        WanDiT.from_pretrained(file)
    assert "\n" not in str(raised.value)


def test_paths(folder, tmp_path):
    """Nothing there, nothing inside, or two models in one folder."""
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        WanDiT.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not none"):
        WanDiT.from_pretrained(tmp_path / "empty")
    shutil.copy(folder / "model.safetensors", folder / "ema.safetensors")
    with pytest.raises(FileNotFoundError, match="not ema.safetensors, model.safetensors"):
        WanDiT.from_pretrained(folder)


def test_without_a_config_it_is_the_14B(folder):
    """The default is the released model, so another one must be refused by its shapes, not read as if it were that."""
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"misshaped: .*instead of \[5120"):
        WanDiT.from_pretrained(folder)


def test_command_line(folder, monkeypatch, capsys):
    """Runs with nothing at all, with a folder, and says in one line what is wrong."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dit.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    done = subprocess.run(
        [sys.executable, module.__file__, "--device", "cpu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        "14,288.5" in done.stdout
        and "1,419.0" in done.stdout
        and "velocity (1, 16, 3, 8, 8)" in done.stdout
    )
    out = run(folder, "--latent", "2x4x10", "--dtype", "bfloat16", "--device", "cpu")
    assert "velocity (1, 4, 2, 4, 10)" in out and "torch.bfloat16" in out
    for wrong in (
        (folder / "nowhere",),
        (folder, "--latent", "2x3x10"),
        (folder, "--latent", "big"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*wrong, "--device", "cpu")
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.startswith("dit.py: ") and message.count("\n") == 1
