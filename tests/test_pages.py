"""The pages: every command, link, name and figure in them."""

import functools
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dit
import train
import vae
from connector import Connector, InstructX, InstructXConfig
from mllm import Qwen2_5_VL, add_lora, smart_resize
from sampler import FlowSampler

TOP = Path(__file__).resolve().parents[1]
PAGES = [
    TOP / name
    for name in (
        "README.md",
        "tests/README.md",
        "weights/README.md",
        "weights/shapes/README.md",
        "weights/shapes/claims/README.md",
    )
]
README, TESTS_PAGE = PAGES[0].read_text(), PAGES[1].read_text()
ALL_PAGES = "\n".join(page.read_text() for page in PAGES)


def command_lines():
    """Every `python FILE ...` of the README, in blocks and in sentences, as lists of words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", ALL_PAGES, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(
        r"`(python [^`]+)`",
        re.sub(r"^```\w*\n.*?^```$", "", ALL_PAGES, flags=re.DOTALL | re.MULTILINE),
    )
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


@functools.cache
def options(script, *command):
    """The options in the --help of a script."""
    command = [sys.executable, TOP / script, *command, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(re.findall(r"(?<![\w-])--?\w[\w-]*", done.stdout))


@pytest.mark.slow
def test_commands_of_the_readme_have_such_options():
    """An option that was renamed, in a command that nobody has typed since."""
    lines = command_lines()
    assert len(lines) > 15 and {"edit.py", "train.py", "weights/shapes/world.py"} <= {
        script for script, *_ in lines
    }
    for script, *words in lines:
        used = {word for word in words if word.startswith("-")}
        hand_on = {"tests/full_size.py": "edit.py", "tests/plan.py": "train.py"}
        if script in hand_on:  # what it does not know
            used -= options(hand_on[script])
        with_commands = "weights/shapes/world.py", "tests/score.py"
        command = words[:1] if script in with_commands else []
        assert used <= options(script, *command), f"{script} {used}"
        for word in words:
            assert not word.startswith("weights/shapes") or (TOP / word).exists(), word


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_links_lead_somewhere(page):
    """Links to files that were moved, and to headings that were reworded."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            assert heading in map(
                anchor, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            ), link


def test_the_map_names_what_exists():
    """From the paper to the code: a class that was renamed would lead nowhere."""
    section = README.partition("## From the paper to the code")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()[4:]
        if line
    ]
    assert len(rows) > 9 and all(len(row) == 4 for row in rows)
    for row in rows:
        module = owner = None
        for name in re.findall(r"`([\w./]+)`", row[3]):
            if name.endswith(".py"):
                assert (TOP / name).is_file(), name
                module = importlib.import_module(Path(name).stem)
                continue
            found, _, method = name.partition(".")
            if hasattr(module, found):
                owner = getattr(module, found)
                name = method
            attributes = dir(owner) + re.findall(
                r"self\.(\w+) =", Path(module.__file__).read_text()
            )
            assert not name or name in attributes, f"{row[3]}: {name}"


def test_figures_of_the_readme():
    """What the pages say of sizes, computed from the models."""
    count = lambda model: sum(p.numel() for p in model.parameters())
    rows, sums = {}, []
    for name, wan, own in (
        ("1.3B", "Wan2.1", "queries, connector, LoRA"),
        ("14B", "Wan2.1", "queries, connector, LoRA"),
        ("5B", "Wan2.2", "queries and connectors of Kiwi-Edit"),
    ):
        mllm, connector, codec, model = parts_of(name)
        lora = sum(p.numel() for key, p in mllm.named_parameters() if "lora_" in key)
        sizes = {  # parameters and bytes
            "Qwen2.5-VL-3B": (count(mllm) - lora, 2 * (count(mllm) - lora)),
            own: (count(connector) + lora, 2 * (count(connector) + lora)),
            f"{wan} DiT {name}": (count(model), bytes_of(model)),
            f"{wan} VAE, in float32": (count(codec), 4 * count(codec)),
        }
        rows |= {part: f"| {n:,} | {size / 1e9:.2f} |" for part, (n, size) in sizes.items()}
        sums.append(f"{sum(size for _, size in sizes.values()) / 1e9:.2f}")
    rows["together with the 1.3B, the 14B, Kiwi-Edit"] = f"| | {', '.join(sums)} |"
    for part, figures in rows.items():
        assert f"| {part} {figures}" in TESTS_PAGE, (part, figures)
    for name in ("1.3B", "14B"):
        tokens = 21 * 30 * 52
        flop = dit.step_flops(dit.PRESETS[name], tokens, 512)
        assert f"{tokens:,} tokens" in TESTS_PAGE and f"{flop / 1e12:,.0f} TFLOP" in TESTS_PAGE


def test_download_of_kiwi_edit():
    """The size of its files, from the names and shapes of their tensors."""
    read = lambda file: json.loads((TOP / "tests" / "manifests" / file).read_text())
    wan, kiwi = read("wan2.2_ti2v_5b.json"), read("kiwi_edit_5b.json")
    qwen = read("qwen2.5_vl_3b.json")["parameters"]
    own = sum(entry["parameters"] for name, entry in kiwi.items() if name != "note")
    dit_size, vae_size = (wan[name]["parameters"] for name in ("dit, diffusers", "vae, official"))
    total = 2 * (dit_size + qwen + own) + 4 * vae_size  # bfloat16, but for the VAE
    assert f"[{total / 1e9:.2f} GB]" in README
    page = (TOP / "weights" / "README.md").read_text()
    assert f"{total:,} bytes" in page
    for size in (2 * dit_size, 2 * qwen, 4 * vae_size):
        assert f"| {size / 1e9:.2f} |" in page


class Live(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at the same time, at the most."""

    def __init__(self, *models):
        super().__init__()
        self.peak = 0
        weights = [
            StorageWeakRef(p.untyped_storage()) for model in models for p in model.parameters()
        ]
        self.alive = {
            weight.cdata: (weight, 0) for weight in weights
        }  # what is only a view of them takes nothing

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.alive.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.alive = {key: both for key, both in self.alive.items() if not both[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def bytes_of(model, name=lambda name: True):
    """In bfloat16, but for what stays in float32: parts of the DiT, LoRA, the VAE."""
    exact = lambda key: (
        isinstance(model, vae.WanVAE)
        or "lora_" in key
        or isinstance(model, dit.WanDiT)
        and dit.FLOAT32.search(key)
    )
    return sum(
        p.numel() * (4 if exact(key) else 2) for key, p in model.named_parameters() if name(key)
    )


@functools.cache
def vae_peak(frames, release="wan2.1"):
    """Bytes that the VAE holds at its peak for each pixel of a frame, beyond its weights.

    All it does grows with area.
    """
    with torch.device("meta"):
        codec = vae.WanVAE(vae.PRESETS[release])
    codec.to_empty(device="cpu")
    length, side, peaks = min(frames, 9), 64, []  # from the third latent frame on, chunks are alike
    stride, channels = codec.spatial_stride, codec.config.z_dim
    video, z = (
        torch.zeros(1, 3, length, side, side),
        torch.zeros(1, channels, (length - 1) // 4 + 1, side // stride, side // stride),
    )
    for run, held in (
        (lambda: codec.encode(video), 3 * 4 * frames),
        (lambda: deque(codec.decode_stream(z), 0), 0),
    ):
        with Live(codec) as live, torch.no_grad():
            run()
        peaks.append(live.peak / side**2 + held)  # the whole clip is there while it is encoded
    return max(peaks)


def parts_of(preset):
    """(MLLM, connector, VAE, DiT) on the meta device: Kiwi-Edit's with the 5B, else InstructX's."""
    with torch.device("meta"):
        mllm = Qwen2_5_VL()
        if preset != "5B":
            add_lora(mllm)
            connector = Connector(InstructXConfig())
            return mllm, connector, vae.WanVAE(), dit.WanDiT(dit.PRESETS[preset])
        widths = {"hidden_dim": 3072, "context_dim": 3072}
        connector = Connector(InstructXConfig(reference_queries=768, **widths))
        flags = dict.fromkeys(
            ("source_embedding", "source_bias", "source_scaled", "reference_embedding"), True
        )
        model = dit.WanDiT(replace(dit.PRESETS["5B"], text_dim=0, **flags))
        return mllm, connector, vae.WanVAE(vae.PRESETS["wan2.2"]), model


def needs(preset, shape, queries):
    """GB that an edit holds at most: all in memory, blocks in int8, blocks offloaded.

    With guidance, but for the 5B. The peak is in a step of the DiT or, where that is small, in
    the VAE.
    """
    mllm, connector, codec, model = parts_of(preset)
    narrow, batch = replace(model.config, num_layers=2), 1 if preset == "5B" else 2
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        step = dit.WanDiT(narrow)
        torch.set_default_dtype(torch.float32)
        latents = torch.empty(batch, *shape)
        width = narrow.text_dim or narrow.dim
        context = torch.empty(batch, queries, width, dtype=torch.bfloat16)
        with Live(step) as live:
            condition = step.condition(context, latents.shape, latents[:1])
            step.denoise(latents, torch.empty(batch), condition)
    matrix = lambda key: key.startswith("blocks.") and key.endswith("weight") and "norm" not in key
    tower = lambda key: key.startswith(("visual.blocks.", "model.layers.")) and "lora_" not in key
    others, whole = bytes_of(connector) + bytes_of(codec), bytes_of(mllm) + bytes_of(model)
    block = bytes_of(model, lambda key: key.startswith("blocks.0."))
    apart = bytes_of(mllm, tower) + bytes_of(model, lambda key: key.startswith("blocks."))
    denoise = live.peak
    release = "wan2.2" if preset == "5B" else "wan2.1"
    pixels = codec.spatial_stride**2 * shape[2] * shape[3]
    code = vae_peak(4 * shape[1] - 3, release) * pixels
    return [
        (others + max(size + denoise, between + code)) / 1e9
        for size, between in (
            (whole, whole),
            [whole - bytes_of(model, matrix) / 2] * 2,
            (whole - apart + 2 * block, whole - apart),
        )
    ]


WAN2_1_SIZES = (
    ("an image of 1024x1024", (16, 1, 128, 128), 256),
    ("81 frames of 832x480", (16, 21, 60, 104), 512),
    ("81 frames of 1280x720", (16, 21, 90, 160), 512),
)
KIWI_SIZES = (  # at most the 921,600 pixels that it was trained on; 720 is padded to 736
    ("an image of 960x960", (48, 1, 60, 60), 256),
    ("81 frames of 832x480", (48, 21, 30, 52), 512),
    ("81 frames of 1280x720", (48, 21, 46, 80), 512),
)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["14B", "1.3B", "5B"])
def test_needs_of_the_readme(preset):
    """What an edit takes by size, computed from the tensors of a step."""
    for name, shape, queries in KIWI_SIZES if preset == "5B" else WAN2_1_SIZES:
        row = (
            f"| {preset}, {name} | "
            + " | ".join(f"{size:.1f}" for size in needs(preset, shape, queries))
            + " |"
        )
        assert row in TESTS_PAGE, row
        flop = dit.step_flops(dit.PRESETS[preset], shape[1] * shape[2] * shape[3] // 4, queries)
        total = 50 * flop * (1 if preset == "5B" else 2)  # steps, guidance
        seconds = [total / (peak * 1e12) for peak in (790, 312, 165)]
        row = (
            f"| {preset}, {name} | {total / 1e15:,.1f} | "
            + " | ".join(f"{time:,.0f}" for time in seconds)
            + " |"
        )
        assert row in TESTS_PAGE, row


def test_shapes_of_the_readme():
    """The figure of the flow, from the code that it tells of."""
    height, width = smart_resize(480, 832, 28, 3136, 12845056)
    patches = 7 * (height // 14) * (width // 14)  # 13 frames, two to a patch
    assert f"patches ({patches}, 1176), which become {patches // 4} of" in README
    assert f"(1, {InstructXConfig().video_queries}, {InstructXConfig().context_dim})" in README


def test_the_file_guide_counts_lines():
    """Who plans an afternoon of reading should not find twice as much."""
    guide = README.partition("## Read it")[2]
    for name in ("connector", "dit", "sampler", "mllm", "vae", "edit", "train"):
        lines = len((TOP / f"{name}.py").read_text().splitlines())
        row = next(line for line in guide.splitlines() if line.startswith(f"| [{name}.py]"))
        assert row.endswith(f"| {lines:,} |"), f"{name}.py has {lines} lines"
    stops = [InstructX.edit, Connector, InstructX.context, dit.Block.forward]
    stops += [dit.WanDiT.condition, dit.WanDiT.denoise, FlowSampler.sample, train.flow_loss]
    lines = sum(len(inspect.getsource(stop).splitlines()) for stop in stops)
    assert f"Six stops, {lines} lines in all:" in guide, f"the stops have {lines} lines"
