"""vae.py against diffusers' AutoencoderKLWan, and streamed against the whole clip at once."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vae as module
from vae import (
    PRESETS,
    CausalConv3d,
    Downsample,
    RMSNorm,
    Upsample,
    VAEConfig,
    WanVAE,
    official_names,
    to_frames,
    to_video,
)

NARROW = dict(latents_mean=(0.3, -0.2, 0.1, 0.5), latents_std=(1.5, 0.7, 2.0, 1.1), z_dim=4, dim=8)
CONFIGS = {
    "tiny": PRESETS["tiny"],
    "stride 4": VAEConfig(
        **NARROW, dim_mult=(1, 2, 4), num_res_blocks=1, temporal_downsample=(True, True)
    ),
    "2 blocks": VAEConfig(
        **NARROW, dim_mult=(1, 3, 2), num_res_blocks=2, temporal_downsample=(False, True)
    ),
}


def relative(a, b):
    assert a.shape == b.shape
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def random_vae(config, seed=0):
    """Weights under which every term matters: gains are not 1, biases and attention not 0."""
    torch.manual_seed(seed)
    vae = WanVAE(config)
    with torch.no_grad():
        for name, p in vae.named_parameters():
            noise = torch.randn_like(p)
            scale = 0.3 if "gamma" in name or "bias" in name else 1.5 / p[0].numel() ** 0.5
            p.copy_(noise * scale + (1 if "gamma" in name else 0))
    return vae


def video_of(config, B, T, h, w, seed=1):
    stride = 2 ** len(config.temporal_downsample)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, 3, T, h * stride, w * stride, generator=generator) * 2 - 1


def reference(vae):
    """diffusers' model with the same weights, by way of the rename map under test."""
    diffusers = pytest.importorskip("diffusers")
    c = vae.config
    model = diffusers.AutoencoderKLWan(
        base_dim=c.dim,
        z_dim=c.z_dim,
        dim_mult=list(c.dim_mult),
        num_res_blocks=c.num_res_blocks,
        temperal_downsample=list(c.temporal_downsample),
        latents_mean=list(c.latents_mean),
        latents_std=list(c.latents_std),
    )
    theirs = list(model.state_dict())
    ours = official_names(dict(zip(theirs, theirs)), c)  # official name -> diffusers name
    model.load_state_dict({ours[name]: t for name, t in vae.state_dict().items()})
    return model.eval()


# The whole clip at once, from the two rules in vae.py's docstring alone: no cache, no chunks,
# channels first.


def whole(layer, x):
    """x (B, C, T, H, W)"""
    if isinstance(layer, CausalConv3d):
        k = layer.kernel_size
        return F.conv3d(
            F.pad(x, (k[2] // 2,) * 2 + (k[1] // 2,) * 2 + (k[0] - 1, 0)), layer.weight, layer.bias
        )
    if isinstance(layer, torch.nn.Conv3d):
        return F.conv3d(x, layer.weight, layer.bias)
    if isinstance(layer, RMSNorm):
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * layer.gamma.view(-1, 1, 1, 1)
    if isinstance(layer, module.ResidualBlock):
        return whole_sequence(layer.residual, x) + (
            x if layer.shortcut is None else whole(layer.shortcut, x)
        )
    if isinstance(layer, module.AttentionBlock):
        return x + torch.stack(
            [whole_attention(layer, frame) for frame in whole(layer.norm, x).unbind(2)], dim=2
        )
    if isinstance(layer, Downsample):
        x = whole_frames(F.pad(x, (0, 1, 0, 1)), layer.resample[1], stride=2)
        if layer.time_conv is None or x.shape[2] == 1:
            return x
        return torch.cat(
            [
                x[:, :, :1],
                F.conv3d(x, layer.time_conv.weight, layer.time_conv.bias, stride=(2, 1, 1)),
            ],
            2,
        )
    if isinstance(layer, Upsample):
        if layer.time_conv is not None and x.shape[2] > 1:
            a, b = whole(layer.time_conv, x[:, :, 1:]).chunk(2, dim=1)
            x = torch.cat([x[:, :, :1], torch.stack([a, b], dim=3).flatten(2, 3)], dim=2)
        return whole_frames(
            x.repeat_interleave(2, -1).repeat_interleave(2, -2), layer.resample[1], padding=1
        )
    return layer(x)


def whole_sequence(layers, x):
    for layer in layers:
        x = whole(layer, x)
    return x


def whole_frames(x, conv, **how):
    return torch.stack(
        [F.conv2d(frame, conv.weight, conv.bias, **how) for frame in x.unbind(2)], dim=2
    )


def whole_attention(layer, x):
    q, k, v = (
        F.conv2d(x, layer.to_qkv.weight, layer.to_qkv.bias).flatten(2).chunk(3, dim=1)
    )  # each (B, C, HW)
    weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
    y = (v @ weights.transpose(1, 2)).view_as(x)
    return F.conv2d(y, layer.proj.weight, layer.proj.bias)


@torch.no_grad()
def whole_moments(vae, video):
    e = vae.encoder
    return whole_sequence([e.conv1, *e.downsamples, *e.middle, *e.head, vae.conv1], video).chunk(
        2, dim=1
    )


@torch.no_grad()
def whole_reconstruct(vae, z):
    d = vae.decoder
    return whole_sequence([vae.conv2, d.conv1, *d.middle, *d.upsamples, *d.head], z)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("B, T, h, w", [(1, 1, 3, 5), (2, 5, 4, 2), (1, 9, 2, 3), (1, 13, 3, 2)])
def test_parity(config, B, T, h, w):
    """Any difference to the released model: a padding, an order of channels, the frame-0 rule."""
    vae = random_vae(config)
    theirs, video = reference(vae), video_of(config, B, T, h, w)
    with torch.no_grad():
        posterior = theirs.encode(video).latent_dist
        mean, logvar = vae.moments(video)
        assert relative(mean, posterior.mean) < 2e-5
        assert relative(logvar.clamp(-30, 20), posterior.logvar) < 2e-5
        stats = [
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        ]
        assert relative(vae.encode(video), (posterior.mean - stats[0]) / stats[1]) < 2e-5
        z = torch.randn_like(mean)
        expected = theirs.decode(z * stats[1] + stats[0]).sample
        assert 0.2 < (expected.abs() < 1).float().mean()  # else clamping would hide everything
        assert relative(vae.decode(z), expected) < 2e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("T", [1, 5, 17])
def test_streamed_equals_whole(config, T):
    """A chunk border that shows: zeros for the past, one of the wrong length, frame 0 doubled."""
    vae = random_vae(config)
    video = video_of(config, 2, T, 2, 3)
    mean, logvar = whole_moments(vae, video)
    z = torch.randn_like(mean)
    frames = whole_reconstruct(vae, z)
    assert frames.shape == video.shape
    with torch.no_grad():
        for chunk in (1, 2, 3, 100):
            streamed = vae.moments(video, chunk)
            assert relative(streamed[0], mean) < 2e-5 and relative(streamed[1], logvar) < 2e-5
            assert relative(vae.reconstruct(z, chunk), frames) < 2e-5


def test_decode_stream_yields_decode():
    """Frames lost, doubled or unclamped on the way out; the first chunk must be frame 0 alone."""
    vae = random_vae(PRESETS["tiny"])
    z = torch.randn(1, 16, 4, 2, 2)
    chunks = list(vae.decode_stream(z, chunk=2))
    assert [chunk.shape[2] for chunk in chunks] == [1, 8, 4]
    assert relative(torch.cat(chunks, dim=2), vae.decode(z)) < 1e-6
    assert max(chunk.abs().max() for chunk in chunks) == 1  # some values do get clamped
    assert vae.reconstruct(z).abs().max() > 1


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        sources = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in sources:  # else it is a view
                self.bytes = max(self.bytes, storage.nbytes())
        return result


def test_memory_does_not_grow_with_the_clip():
    """A clip that is processed whole after all runs out of memory on real clips."""
    vae, largest = random_vae(PRESETS["tiny"]), []
    for T in (9, 41):
        video = video_of(PRESETS["tiny"], 1, T, 2, 2)
        with LargestTensor() as encoding:
            z = vae.encode(video)
        with LargestTensor() as decoding:
            for _ in vae.decode_stream(z):
                pass
        largest.append((encoding.bytes, decoding.bytes))
    assert largest[0] == largest[1] and min(largest[0]) > 0


def test_an_image_is_the_first_frame_of_a_clip():
    """A lone image takes a short way through the convolutions, which must change nothing."""
    vae = random_vae(PRESETS["tiny"])
    clip = video_of(PRESETS["tiny"], 2, 5, 3, 2)
    z, image = vae.encode(clip), vae.encode(clip[:, :, :1])
    assert relative(image, z[:, :, :1]) < 2e-6
    assert relative(vae.decode(z[:, :, :1]), vae.decode(z)[:, :, :1]) < 2e-6


def test_time_is_causal():
    """A convolution that looks ahead: what comes later must not change what came before."""
    vae = random_vae(PRESETS["tiny"])
    a = video_of(PRESETS["tiny"], 1, 9, 2, 2)
    b = torch.cat([a[:, :, :5], -a[:, :, 5:]], dim=2)
    za, zb = vae.encode(a), vae.encode(b)
    assert torch.equal(za[:, :, :2], zb[:, :, :2]) and relative(za[:, :, 2:], zb[:, :, 2:]) > 0.01


def test_norm_near_zero():
    """As officially, norms are at least 1e-12: black stays black, tiny values become full size."""
    norm = RMSNorm(4)
    assert torch.equal(norm(torch.zeros(1, 1, 1, 1, 4)), torch.zeros(1, 1, 1, 1, 4))
    assert torch.allclose(norm(torch.full((1, 1, 1, 1, 4), 1e-8)), torch.ones(4))


def test_training_gradients():
    """Training the VAE: chunks must not cut the graph, and every parameter must get a gradient."""
    vae = random_vae(CONFIGS["stride 4"])
    video = video_of(vae.config, 1, 9, 2, 2).requires_grad_()
    mean, logvar = vae.moments(video)
    output = vae.reconstruct(mean + 0.1 * (0.5 * logvar).exp())
    (output - video.detach()).abs().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vae.parameters())
    assert video.grad[:, :, 0].abs().max() > 0 and video.grad[:, :, -1].abs().max() > 0
    assert not vae.encode(video).requires_grad and not vae.decode(mean).requires_grad


def test_statistics_set_after_training(tmp_path):
    """Statistics measured after training must reach encode, decode and the file."""
    vae = random_vae(CONFIGS["stride 4"])
    video = video_of(vae.config, 4, 5, 3, 3)
    mean = vae.moments(video)[0].detach()
    vae.set_latent_statistics(mean.mean((0, 2, 3, 4)), mean.std((0, 2, 3, 4)))
    z = vae.encode(video)
    assert z.mean((0, 2, 3, 4)).abs().max() < 1e-5 and (z.std((0, 2, 3, 4)) - 1).abs().max() < 1e-5
    assert relative(vae.decode(z), vae.reconstruct(mean).clamp(-1, 1)) < 1e-5
    vae.save_pretrained(tmp_path)
    again = WanVAE.from_pretrained(tmp_path)
    assert again.config == vae.config and torch.equal(again.encode(video), z)


def test_bfloat16(tmp_path):
    """dtype must hold for weights, statistics and output, whatever dtype the input has."""
    vae = random_vae(PRESETS["tiny"])
    vae.save_pretrained(tmp_path)
    half = WanVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    video = video_of(PRESETS["tiny"], 1, 5, 2, 2)
    z = half.encode(video.double())
    assert z.dtype == half.decode(z.float()).dtype == half.latents_std.dtype == torch.bfloat16
    assert 1e-4 < relative(z, vae.encode(video)) < 0.05


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 4, 16, 16), r"4 x 16 x 16; T should be 4n \+ 1"),
        ((1, 3, 5, 12, 16), "5 x 12 x 16; .* sides 8n"),
        ((1, 4, 5, 16, 16), "B, 3, T, H, W"),
        ((3, 5, 16, 16), "B, 3, T, H, W"),
        ((1, 3, 0, 16, 16), "B, 3, T, H, W"),
    ],
)
def test_bad_videos(shape, message):
    """A wrong shape must be named, not cropped or crash inside a convolution."""
    with pytest.raises(ValueError, match=message):
        WanVAE(PRESETS["tiny"]).encode(torch.zeros(shape))


def test_other_bad_inputs():
    """Bytes would encode as pure white; latents of another model and chunk 0 must not pass."""
    vae = WanVAE(PRESETS["tiny"])
    with pytest.raises(ValueError, match="uint8; it should be in"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))
    for shape in ((1, 12, 1, 2, 2), (16, 1, 2, 2), (1, 16, 0, 2, 2)):
        with pytest.raises(ValueError, match=r"\(B, 16, F, h, w\)"):
            vae.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        vae.decode(torch.zeros(1, 16, 2, 2, 2), chunk=0)
    with pytest.raises(ValueError, match="z_dim = 8"):
        VAEConfig(z_dim=8)
    with pytest.raises(ValueError, match="temporal_downsample"):
        VAEConfig(dim_mult=(1, 2))


def test_no_temporal_stride():
    """A config without temporal downsampling takes any number of frames."""
    vae = random_vae(
        VAEConfig(**NARROW, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(False,))
    )
    video = video_of(vae.config, 1, 4, 2, 2)
    assert (
        vae.encode(video).shape == (1, 4, 4, 2, 2)
        and vae.decode(vae.encode(video)).shape == video.shape
    )


def test_bytes_to_video_and_back():
    """All 256 values must come back, in float32 and in bfloat16; what overshoots is clipped."""
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 8, 16, 3)
    video = to_video(frames, like=torch.zeros(1))
    assert video.shape == (1, 3, 2, 8, 16) and video.dtype == torch.float32
    assert video.min() == -1 and video.max() == 1
    assert np.array_equal(to_frames(video), frames)
    half = to_video(frames, like=torch.zeros(1, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert np.abs(to_frames(half).astype(int) - frames).max() <= 1  # bfloat16 has 256 steps in 1
    assert to_frames(torch.full((1, 3, 1, 1, 2), -1.2)).max() == 0
    assert to_frames(torch.full((1, 3, 1, 1, 2), 1.2)).min() == 255


def official_tensors():
    """The names and shapes of Wan2.1_VAE.pth, written out by hand from the released file's list."""
    shapes = {}

    def conv(name, out, *rest):
        shapes[name + ".weight"], shapes[name + ".bias"] = [out, *rest], [out]

    def residual(name, a, b):
        shapes[name + ".residual.0.gamma"], shapes[name + ".residual.3.gamma"] = (
            [a, 1, 1, 1],
            [b, 1, 1, 1],
        )
        conv(name + ".residual.2", b, a, 3, 3, 3)
        conv(name + ".residual.6", b, b, 3, 3, 3)
        if a != b:
            conv(name + ".shortcut", b, a, 1, 1, 1)

    def ends(name, width, a, b, first, last):
        residual(name + ".middle.0", width, width)
        residual(name + ".middle.2", width, width)
        shapes[name + ".middle.1.norm.gamma"] = [width, 1, 1]
        conv(name + ".middle.1.to_qkv", 3 * width, width, 1, 1)
        conv(name + ".middle.1.proj", width, width, 1, 1)
        conv(name + ".conv1", first[0], first[1], 3, 3, 3)
        shapes[name + ".head.0.gamma"] = [last[1], 1, 1, 1]
        conv(name + ".head.2", last[0], last[1], 3, 3, 3)

    ends("encoder", 384, 96, 384, (96, 3), (32, 384))
    ends("decoder", 384, 384, 96, (384, 16), (3, 96))
    conv("conv1", 32, 32, 1, 1, 1)
    conv("conv2", 16, 16, 1, 1, 1)
    for i, (a, b) in {
        0: (96, 96),
        1: (96, 96),
        3: (96, 192),
        4: (192, 192),
        6: (192, 384),
        7: (384, 384),
        9: (384, 384),
        10: (384, 384),
    }.items():
        residual(f"encoder.downsamples.{i}", a, b)
    for i, width in {2: 96, 5: 192, 8: 384}.items():
        conv(f"encoder.downsamples.{i}.resample.1", width, width, 3, 3)
    conv("encoder.downsamples.5.time_conv", 192, 192, 3, 1, 1)
    conv("encoder.downsamples.8.time_conv", 384, 384, 3, 1, 1)
    for i, (a, b) in {
        0: (384, 384),
        1: (384, 384),
        2: (384, 384),
        4: (192, 384),
        5: (384, 384),
        6: (384, 384),
        8: (192, 192),
        9: (192, 192),
        10: (192, 192),
        12: (96, 96),
        13: (96, 96),
        14: (96, 96),
    }.items():
        residual(f"decoder.upsamples.{i}", a, b)
    for i, width in {3: 384, 7: 384, 11: 192}.items():
        conv(f"decoder.upsamples.{i}.resample.1", width // 2, width, 3, 3)
    conv("decoder.upsamples.3.time_conv", 768, 384, 3, 1, 1)
    conv("decoder.upsamples.7.time_conv", 768, 384, 3, 1, 1)
    return shapes


def test_official_tensors():
    """The released file must fit the default config tensor by tensor."""
    with torch.device("meta"):
        vae = WanVAE()
    assert {name: list(t.shape) for name, t in vae.state_dict().items()} == official_tensors()
    assert vae.spatial_stride == 8 and vae.temporal_stride == 4
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531


def same(a, b):
    tensors = a.state_dict(), b.state_dict()
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(t, tensors[1][n]) for n, t in tensors[0].items()
    )


@pytest.fixture
def folder(tmp_path):
    random_vae(PRESETS["tiny"]).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_load_own_folder(folder):
    """Statistics left on meta, tensors left random, a config that does not survive its file."""
    vae = WanVAE.from_pretrained(folder)
    assert same(vae, random_vae(PRESETS["tiny"])) and vae.config == PRESETS["tiny"]
    assert vae.latents_mean.flatten().tolist() == pytest.approx(PRESETS["tiny"].latents_mean)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert set(load_file(folder / "model.safetensors")) == set(vae.state_dict())


def test_load_official_pth(folder, tmp_path):
    """The official folder: Wan2.1_VAE.pth lies beside the DiT's shards and its config.json."""
    vae = random_vae(PRESETS["tiny"])
    (folder / "model.safetensors").unlink()
    torch.save(vae.state_dict(), folder / "any.pth")
    assert same(WanVAE.from_pretrained(folder), vae)
    assert same(WanVAE.from_pretrained(folder / "any.pth"), vae)

    official = tmp_path / "official"
    official.mkdir()
    zero = torch.zeros(1)  # expanded, so that the file is small
    tensors = {name: zero.expand(shape) for name, shape in official_tensors().items()}
    torch.save(tensors, official / "Wan2.1_VAE.pth")
    torch.save({}, official / "models_t5_umt5-xxl-enc-bf16.pth")
    (official / "config.json").write_text('{"_class_name": "WanModel", "dim": 5120}')
    (official / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert WanVAE.from_pretrained(official).config == VAEConfig()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_load_diffusers_folder(config, tmp_path):
    """A renamed key that lands on the wrong layer, and diffusers' spelling of the config."""
    vae = random_vae(config)
    reference(vae).save_pretrained(tmp_path)
    again = WanVAE.from_pretrained(tmp_path)
    assert same(again, vae)
    assert again.config == vae.config


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda tensors: tensors.pop("conv1.bias"), "conv1.bias"),
        (lambda tensors: tensors.update(stray=torch.zeros(1)), "stray"),
        (lambda tensors: tensors.update({"conv2.bias": torch.zeros(17)}), "conv2.bias.*17.*16"),
        (lambda tensors: tensors.update({"conv2.bias": torch.zeros(16).int()}), "conv2.bias"),
    ],
    ids=["missing", "left over", "misshaped", "integers"],
)
def test_load_misfits(folder, change, name):
    """A tensor that does not fit must be named in one line, never filled in or dropped."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=name) as raised:
        WanVAE.from_pretrained(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_load_damaged(folder, tmp_path):
    """A download cut short must name its file."""
    for file in (folder / "model.safetensors", tmp_path / "cut.pth"):
        if file.suffix == ".pth":
            torch.save(random_vae(PRESETS["tiny"]).state_dict(), file)
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=f"{file.name} is damaged"):
            WanVAE.from_pretrained(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="cut.pth is damaged"):
        WanVAE.from_pretrained(file)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


def test_pickles_cannot_run_code(tmp_path):
    """A .pth is a pickle: opening one from the internet must not run what is inside."""
    file = tmp_path / "bad.pth"
    for zipped in (True, False):
        content = {"conv1.weight": Malicious(str(tmp_path / "owned"))}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="bad.pth is damaged, or no plain tensor file"):
            WanVAE.from_pretrained(file)
    assert not (tmp_path / "owned").exists()
    torch.save({"model": {"conv1.weight": torch.zeros(1)}}, file)
    with pytest.raises(ValueError, match="bad.pth: model is no floating point tensor"):
        WanVAE.from_pretrained(file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"is_residual": True}, "Missing key"),
        ({"patch_size": 2}, "size mismatch for encoder.conv1"),
        ({"num_res_blocks": 2**63}, "too few tensors for 9223372036854775808 blocks"),
        ({"attn_scales": [1.0]}, "has attn_scales"),
        ({"z_dim": 8}, "z_dim = 8"),
        ({"dim_mult": 3}, "config.json: "),
        ({"latents_std": [0.0] * 16}, "latents_std above 0"),
        ({"latents_mean": [float("nan")] * 16}, "latents_mean should be numbers"),
    ],
)
def test_bad_configs(folder, change, message):
    """A config of another VAE must not be read as if it were that of these tensors."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message) as raised:
        WanVAE.from_pretrained(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_paths(folder, tmp_path):
    """Nothing there, nothing inside, or too much inside: say so."""
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        WanVAE.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds 0 checkpoint files"):
        WanVAE.from_pretrained(tmp_path / "empty")
    (folder / "fp16.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="vae holds 2 checkpoint files"):
        WanVAE.from_pretrained(folder)
    (folder / "fp16.safetensors").unlink()
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a JSON object"):
        WanVAE.from_pretrained(folder)


def test_command_line(folder, tmp_path, monkeypatch, capsys):
    """An image of odd size is cropped to what the model takes; a mistake is one line."""
    pixels = np.random.default_rng(0).integers(0, 255, (21, 33, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    done = subprocess.run([sys.executable, module.__file__], capture_output=True, text=True)
    assert done.returncode == 0 and "PSNR of the round trip" in done.stdout, done.stderr

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vae.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    out = run(tmp_path / "in.png", "--weights", folder)
    assert "16 x 32 pixels -> latents (1, 16, 1, 2, 4): 12.0 to 1" in out
    (tmp_path / "text.png").write_text("no picture")
    for picture, weights in (("nothing.png", folder), ("text.png", folder), ("in.png", "nowhere")):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / picture, "--weights", weights)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.startswith("vae.py: ")
        assert message.count("\n") == 1 and (picture in message or "nowhere" in message)
