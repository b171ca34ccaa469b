"""dit.py against plain formulas in float64, against diffusers, and against a user's mistakes.

All models are random and tiny, with sizes that differ wherever a mix-up is possible.
"""

import copy
import json
import math
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
    """Weights under which every term matters: gains not 1, biases not 0, attention not uniform."""
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


# Plain formulas, in float64. Positions are written out token by token, and the rotation is complex,
# as in the official code.


def plain(model, z, t, context, source=None, references=()):
    w, config = {name: p.double() for name, p in model.state_dict().items()}, model.config
    z, t, context = z.double(), t.double(), context.double()
    d = config.dim // config.num_heads
    widths = [d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6)]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x):
        variance = x.var(-1, unbiased=False, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (variance + config.eps).sqrt()

    def rms(name, x):
        square = x.square().mean(-1, keepdim=True)
        return x / (square + config.eps).sqrt() * w[f"{name}.weight"]

    def silu(x):
        return x / (1 + (-x).exp())

    def gelu(x):
        return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())

    def conv(x, weight, bias=None):
        return F.conv3d(x.double(), weight, bias, stride=config.patch_size).flatten(2).mT

    def positions(shape, first):
        f, h, w = (n // p for n, p in zip(shape[2:], config.patch_size))
        return [(first + i, j, k) for i in range(f) for j in range(h) for k in range(w)]

    def angles_of(position):
        angles = []
        for axis, width in enumerate(widths):
            angles += [position[axis] * 10000 ** (-2 * i / width) for i in range(width // 2)]
        return angles

    def rotated(x, places):  # x (B, L, K, d)
        angles = torch.tensor([angles_of(place) for place in places], dtype=torch.float64)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    def attend(name, x, y, places=None):
        q = rms(f"{name}.norm_q", linear(f"{name}.q", x)).unflatten(-1, (config.num_heads, d))
        k = rms(f"{name}.norm_k", linear(f"{name}.k", y)).unflatten(-1, (config.num_heads, d))
        v = linear(f"{name}.v", y).unflatten(-1, (config.num_heads, d))
        if places:
            q, k = rotated(q, places), rotated(k, places)
        scores = torch.einsum("blkd,bmkd->bklm", q, k) / math.sqrt(d)
        y = torch.einsum("bklm,bmkd->blkd", scores.softmax(-1), v)
        return linear(f"{name}.o", y.flatten(2))

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
    """float32 angles lose the far rows; pairs are neighbours; time has 44 of 128 channels."""
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
    step = converted.denoise(z, t, converted.condition(context, z.shape))
    assert error(converted(z, t, context), expected) < TOLERANCE
    assert error(step, expected) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
def test_reference_is_one_more_frame(theirs, converted, batch):
    """On the grid of z, a reference is frame F+1 of diffusers, and the head drops that frame."""
    z, t, context = inputs(CONFIG, (3, 6, 4), batch)
    reference, other = latents(batch, 4, 1, 6, 4), latents(batch, 4, 1, 6, 4, seed=2)
    for references in ([reference], [reference, other]):
        frames = torch.cat([z, *references], dim=2)
        expected = theirs(frames, t, context, return_dict=False)[0][:, :, :3]
        assert error(converted(z, t, context, references=references), expected) < TOLERANCE
    swapped = converted(z, t, context, references=[other, reference])
    assert error(swapped, expected) > 0.01


def shards(model, folder):
    """Two safetensors files and their index, as the official 14B is stored."""
    tensors, weight_map = model.state_dict(), {}
    folder.mkdir(exist_ok=True)
    for part in (0, 1):
        file, names = f"a-{part + 1}-of-2.safetensors", list(tensors)[part::2]
        save_file({name: tensors[name].contiguous() for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "a.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(OFFICIAL))
    return folder


@pytest.mark.parametrize(
    "layout", ["diffusers", "diffusers shards", "official", "official shards", "file"]
)
def test_every_layout_is_the_same_model(theirs, converted, layout, tmp_path):
    """Official or diffusers names, one file or many: one wrong rename would lose a layer."""
    path = tmp_path
    if layout.startswith("diffusers"):
        theirs.save_pretrained(tmp_path, max_shard_size="40KB" if "shards" in layout else "1GB")
        assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == ("shards" in layout)
    elif layout == "official shards":
        shards(converted, tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        save_file(converted.state_dict(), file)
        # Beside the official DiT lie the pickles of T5 and VAE, which are not its weights.
        torch.save({"x": torch.zeros(1)}, tmp_path / "Wan2.1_VAE.pth")
        path = file if layout == "file" else tmp_path
    model = WanDiT.from_pretrained(path)
    assert model.config == CONFIG
    for name, tensor in converted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    z, t, context = inputs(CONFIG, batch=2)
    expected = theirs(z, t, context, return_dict=False)[0]
    assert error(model(z, t, context), expected) < TOLERANCE


def test_without_its_blocks(model, folder):
    """What `offload_blocks` starts from: all weights but those of the blocks are there."""
    hollow = WanDiT.from_pretrained(folder, blocks=False)
    for name, tensor in hollow.state_dict().items():
        assert tensor.is_meta == name.startswith("blocks."), name
        assert tensor.is_meta or torch.equal(tensor, model.state_dict()[name]), name


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
        shapes = {name: list(t.shape) for name, t in WanDiT(PRESETS[preset]).state_dict().items()}
    assert shapes == expand(MANIFESTS[preset])
    assert sum(map(math.prod, shapes.values())) == MANIFESTS[preset]["parameters"]
    diffusers, config = pytest.importorskip("diffusers"), PRESETS[preset]
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=128,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    assert {official_name(name): list(t.shape) for name, t in theirs.state_dict().items()} == shapes


# Sources, and the embedding of their own.


def test_source_is_added_to_the_latents(model):
    """The paper's addition, up to rounding; with the bias counted twice it would be off."""
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
    expected = model(z, t, context, source=2 * source)
    assert error(changed(z, t, context, source=source), expected) < TOLERANCE
    changed.add_source_embedding()  # a second call must not undo training
    assert error(changed(z, t, context, source=source), expected) < TOLERANCE


def test_guidance_as_one_batch(model):
    """Two contexts, one z: samples of a batch must not see each other; one source serves both."""
    (z, t, _), (_, _, context) = inputs(CONFIG), inputs(CONFIG, batch=2)
    source, references = latents(*z.shape), [latents(1, 4, 1, 4, 2)]
    condition = model.condition(context, (2, *z.shape[1:]), source, references)
    both = model.denoise(torch.cat([z, z]), torch.cat([t, t]), condition)
    for i in range(2):
        alone = model(z, t, context[i : i + 1], source=source, references=references)
        assert error(both[i : i + 1], alone) < TOLERANCE


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
        exact = any(part in name for part in KEPT)
        assert p.dtype == (torch.float32 if exact else torch.bfloat16), name
    stored = {name: p.bfloat16() for name, p in half.state_dict().items()}
    save_file(stored, folder / "model.safetensors")
    assert {p.dtype for p in WanDiT.from_pretrained(folder).parameters()} == {torch.bfloat16}


def test_bfloat16_is_as_close_as_it_can_be(theirs, converted, tmp_path):
    """With stream and norms in float32 only matrices round; diffusers rounds the stream as well."""
    converted.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    half = WanDiT.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    their_half = type(theirs).from_pretrained(tmp_path / "theirs", torch_dtype=torch.bfloat16)
    ours, other = [], []
    for seed in range(4):
        z, t, context = inputs(CONFIG, batch=2, seed=seed)
        source, expected = latents(*z.shape), converted(z, t, context)
        result = half(z, t, context)
        assert result.dtype == torch.float32
        assert half(z.bfloat16(), t, context.bfloat16()).dtype == torch.bfloat16
        ours.append(error(result, expected))
        theirs_result = their_half(z.bfloat16(), t, context.bfloat16(), return_dict=False)[0]
        other.append(error(theirs_result, expected))
        with_source = converted(z, t, context, source=source)
        assert error(half(z, t, context, source=source), with_source) < 0.03
    assert max(ours) < 0.03 and sum(ours) < sum(other)


def test_time_is_float32_under_autocast(model):
    """Autocast turns plain Linears into bfloat16, whatever dtype their input has."""
    z, t, context = inputs(CONFIG, batch=2)
    watched = {"time_embedding", "time_projection", "head", "blocks.1"}
    plain_outputs, outputs = {}, {}
    for store, autocast in ((plain_outputs, False), (outputs, True)):
        hooks = []
        for name in watched:

            def keep(part, inputs, output, store=store, name=name):
                store[name] = output

            hooks.append(model.get_submodule(name).register_forward_hook(keep))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            v = model(z, t, context)
        for hook in hooks:
            hook.remove()
        assert v.dtype == torch.float32
        assert {output.dtype for output in store.values()} == {torch.float32}
    assert torch.equal(outputs["time_embedding"], plain_outputs["time_embedding"])
    assert torch.equal(outputs["time_projection"], plain_outputs["time_projection"])
    assert 0 < error(outputs["head"], plain_outputs["head"]) < 0.03


# Saving and starting.


def test_saved_is_what_was_there(model, tmp_path):
    """What was added or taken away must be in the config, or the file cannot be loaded again."""
    changed, (z, t, _) = copy.deepcopy(model), inputs(CONFIG)
    changed.add_source_embedding()
    changed.remove_text_embedding()
    with torch.no_grad():
        changed.source_embedding.weight.add_(0.1)
    changed.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert set(load_file(tmp_path / "model.safetensors")) == set(changed.state_dict())
    again = WanDiT.from_pretrained(tmp_path)
    assert again.config == replace(CONFIG, source_embedding=True, text_dim=0)
    for name, tensor in changed.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    context, source = latents(1, 5, CONFIG.dim), latents(*z.shape)
    expected = changed(z, t, context, source=source)
    assert error(again(z, t, context, source=source), expected) < TOLERANCE
    changed.save_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        exact = any(part in name for part in KEPT)
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name


def test_saved_config_has_the_official_keys(folder):
    """The official loader, and ours for a file from there, tell a DiT by these."""
    config = json.loads((folder / "config.json").read_text())
    for key in OFFICIAL.keys() - {"_diffusers_version"}:
        assert config[key] == OFFICIAL[key], key


def test_a_failed_save_leaves_the_old_file(folder, model):
    """A full disk must not cost the checkpoint that was there."""
    resource = pytest.importorskip("resource")
    before = (folder / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(Exception, match="File too large"):
            model.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "model.safetensors").read_bytes() == before


def test_initialized_model_starts_at_zero_and_learns():
    """Wan's start: a head of zeros, so the first velocity is none, but gradients reach the head."""
    torch.manual_seed(0)
    fresh, (z, t, context) = WanDiT(CONFIG).initialize(), inputs(CONFIG)
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
    "change, message",
    [
        (dict(z=(1, 4, 3, 5, 6)), r"z is \(1, 4, 3, 5, 6\).* in patches \(1, 2, 2\)"),
        (dict(z=(1, 3, 3, 4, 6)), r"z is .* not \(B, 4, F, h, w\)"),
        (dict(z=(4, 3, 4, 6)), "z is"),
        (dict(z=(1, 4, 4, 6)), "z is"),
        (dict(z=(1, 4, 0, 4, 6)), "z is"),
        (dict(context=(1, 7, 25)), r"context is \(1, 7, 25\), not \(1, Q, 24\)"),
        (dict(context=(2, 7, 24)), "context is"),
        (dict(context=(7, 24)), "context is"),
        (dict(context=(1, 24)), "context is"),
        (dict(source=(1, 4, 3, 4, 4)), "source is .* like z"),
        (dict(source=(2, 4, 3, 4, 6)), "source is"),
        (dict(references=[(1, 4, 1, 3, 2)]), r"a reference is \(1, 4, 1, 3, 2\)"),
        (dict(references=[(1, 4, 1, 2, 2), (1, 4, 2, 2, 2)]), r"\(1, 4, 2, 2, 2\), not one frame"),
        (dict(references=[(2, 4, 1, 2, 2)]), "a reference is"),
        (dict(references=[(1, 5, 1, 2, 2)]), "a reference is"),
        (dict(references=[(4, 1, 2, 2)]), "a reference is"),
        (dict(references=[(1, 4, 1, 0, 2)]), "a reference is"),
    ],
)
def test_shapes_that_do_not_go_together(model, change, message):
    """One line that names the input, where broadcasting would give a wrong picture."""
    shapes = dict(z=(1, 4, 3, 4, 6), context=(1, 7, 24), source=(1, 4, 3, 4, 6), references=[])
    shapes |= change
    references = [torch.zeros(shape) for shape in shapes.pop("references")]
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message) as raised:
        model(**tensors, t=torch.zeros(1), references=references)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dim=50), "dim 50 is no multiple of 2"),
        (dict(num_heads=0), "config.json: "),
        (dict(patch_size=2), "config.json: "),
        (dict(attention_head_dim="16"), "config.json: "),
        (dict(patch_size=[2, 2]), "patch_embedding.weight"),
        (dict(freq_dim=31), "time_embedding.0.weight"),
        (dict(num_layers=1), "blocks.1"),
        (dict(num_layers=3), "blocks.2"),
        (dict(num_layers=10**12), "too few tensors for 1000000000000 layers"),
        (dict(model_type="i2v"), "no Wan model"),
        (dict(image_dim=1280, added_kv_proj_dim=5120), "no Wan model"),
    ],
)
def test_configs_that_make_no_model(folder, change, message):
    """Image-to-video models have other layers: half loaded, they would run and give noise."""
    (folder / "config.json").write_text(json.dumps(OFFICIAL | change))
    with pytest.raises(ValueError, match=message) as raised:
        WanDiT.from_pretrained(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[1]", "{", "3"])
def test_config_that_is_no_json(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is not a JSON object"):
        WanDiT.from_pretrained(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("blocks.1.modulation"), "Missing .*blocks.1.modulation"),
        (lambda tensors: tensors.update(stray=torch.zeros(1)), "Unexpected .*stray"),
        (
            lambda tensors: tensors.update({"head.head.bias": torch.zeros(3)}),
            "head.head.bias: .*3.*16",
        ),
        (
            lambda tensors: tensors.update({"head.head.bias": torch.zeros(16).char()}),
            "head.head.bias is torch.int8",
        ),
        (lambda tensors: tensors.clear(), "too few tensors"),
    ],
    ids=["missing", "left over", "misshaped", "quantized", "none"],
)
def test_tensors_that_do_not_fit(folder, change, message):
    """A tensor that does not fit is named in one line; nothing is left random."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        WanDiT.from_pretrained(folder)
    said = str(raised.value)
    assert str(folder) in said and "\n" not in said and len(said) < 800


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
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ValueError, match="a-2-of-2.safetensors is damaged"):
        WanDiT.from_pretrained(folder)
    second.unlink()
    with pytest.raises(
        FileNotFoundError, match="a-2-of-2.safetensors is missing; a.safetensors.index"
    ):
        WanDiT.from_pretrained(folder)
    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (folder / "a.safetensors.index.json").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match="a.safetensors.index.json"):
            WanDiT.from_pretrained(folder)


def test_paths(folder, tmp_path):
    """Nothing there, nothing inside, two models in one folder, or a pickle."""
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        WanDiT.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds 0 .safetensors files"):
        WanDiT.from_pretrained(tmp_path / "empty")
    shutil.copy(folder / "model.safetensors", folder / "ema.safetensors")
    with pytest.raises(FileNotFoundError, match="dit holds 2 .safetensors files"):
        WanDiT.from_pretrained(folder)
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="model.pth is damaged, or no safetensors file"):
        WanDiT.from_pretrained(tmp_path / "model.pth")


def test_without_a_config_it_is_the_14B(folder):
    """The default is the released model: another one must be refused, not read as if it were it."""
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="dit: .*blocks.2.modulation"):
        WanDiT.from_pretrained(folder)


def test_command_line(folder, monkeypatch, capsys):
    """Runs with nothing at all and with a folder, and says in one line what is wrong."""
    done = subprocess.run([sys.executable, module.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "14,288.5" in done.stdout and "1,419.0" in done.stdout
    assert "velocity (1, 16, 3, 8, 8)" in done.stdout

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dit.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    assert "velocity (1, 4, 3, 8, 8)" in run(folder)
    with pytest.raises(SystemExit) as stop:
        run(folder / "nowhere")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("dit.py: ") and message.count("\n") == 1
