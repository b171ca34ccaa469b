"""Measures ours against theirs: the same random weights and inputs, in turn in one process.

    python tests/benchmark.py                           # every row, float32 on the CPU: ten minutes
    python tests/benchmark.py dit vae-image --rounds 5 --json result.json
    python tests/benchmark.py --device cuda --dtype bfloat16 --compile

Theirs are transformers 4.49 and diffusers, called as a careful user would call them: no logits
where none are wanted, no cache that is never read, guidance as a batch of two. Both sides read one
checkpoint with their own from_pretrained.

A row runs ours, theirs, ours, theirs, ... after one run of each as warm-up. Seconds are medians,
ratio is ours / theirs. GB is what a run holds at its peak beyond what was there before it (weights
and inputs). The outputs of the warm-up are compared, and where they differ there is no comparison
but exit code 2.
"""

import argparse
import copy
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from conftest import randomize, tiny_tokenizer

from connector import InstructX, compile_blocks
from dit import PRESETS as DITS
from dit import WanDiT, step_flops
from mllm import PRESETS as MLLMS
from mllm import Processor, Qwen2_5_VL, Qwen2_5_VLConfig, VisionConfig
from sampler import FlowSampler
from vae import PRESETS as VAES
from vae import VAEConfig, WanVAE

# Real widths and few layers, so that matrix products dominate as they do at full size.
IDS = {  # tiny_tokenizer's
    "vocab_size": 512,
    "vision_start_token_id": 259,
    "vision_end_token_id": 260,
    "image_token_id": 261,
    "video_token_id": 262,
}
DIT, VAE = replace(DITS["1.3B"], num_layers=2), VAEConfig()
VISION = VisionConfig(depth=4, fullatt_block_indexes=(3,))
MLLM = Qwen2_5_VLConfig(num_hidden_layers=2, vision_config=VISION, **IDS)
MID = {
    "dit": {  # an image of 1024x1024: 4,096 tokens
        "dit": replace(DIT, num_layers=1), "latent": (1, 128, 128), "queries": 256, "steps": 1},
    "dit-256": {"dit": DIT, "latent": (1, 32, 32), "queries": 256, "steps": 10},
    "vae-image": {"vae": VAE, "frames": 1, "side": 256},
    "vae-clip": {"vae": VAE, "frames": 9, "side": 128},
    "mllm": {"mllm": MLLM, "side": 448, "queries": 256},
    "load": {"dit": replace(DIT, num_layers=5)},  # 1.0 GB
    "edit": {
        "dit": DIT, "mllm": MLLM, "vae": VAE, "side": 256, "queries": 256, "steps": 4,
        "guidance": 3.0},
    "train": {
        "dit": DIT, "mllm": MLLM, "side": 256, "latent": (1, 32, 32), "queries": 256, "rank": 64,
        "batch": 2},
    "blocks": {  # 81 frames of 832x480: 32,760 tokens
        "dit": replace(DITS["14B"], num_layers=2), "latent": (21, 60, 104), "queries": 512},
}
TINY_DIT, TINY_VAE, TINY_MLLM = DITS["tiny"], VAES["tiny"], replace(MLLMS["tiny"], **IDS)
TINY = {
    "dit": {"dit": TINY_DIT, "latent": (2, 4, 6), "queries": 5, "steps": 2},
    "dit-256": {"dit": TINY_DIT, "latent": (1, 4, 6), "queries": 5, "steps": 2},
    "vae-image": {"vae": TINY_VAE, "frames": 1, "side": 16},
    "vae-clip": {"vae": TINY_VAE, "frames": 5, "side": 16},
    "mllm": {"mllm": TINY_MLLM, "side": 48, "queries": 4},
    "load": {"dit": TINY_DIT},
    "edit": {
        "dit": TINY_DIT, "mllm": TINY_MLLM, "vae": TINY_VAE, "side": 32, "queries": 4, "steps": 2,
        "guidance": 2.0},
    "train": {
        "dit": TINY_DIT, "mllm": TINY_MLLM, "side": 32, "latent": (1, 4, 4), "queries": 4,
        "rank": 2, "batch": 2},
    "blocks": {"dit": TINY_DIT, "latent": (2, 4, 6), "queries": 5},
}
TARGETS = {
    "dit": 0.95, "vae-image": 0.45, "vae-clip": 0.9, "mllm": 0.9, "load": 0.5, "load memory": 1.05,
    "train": 0.9}

# Largest relative difference of the outputs. In bfloat16 the two round at different places.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
COLUMNS = {
    "row": 12, "ours": 10, "theirs": 10, "ratio": 7, "target": 7, "": 7, "ours GB": 9,
    "theirs GB": 10, "difference": 11}


@dataclass
class Setting:
    """What all rows of one call have in common."""

    sizes: dict  # MID or TINY
    folder: Path  # where checkpoints may be written
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False  # the DiT's blocks, on both sides
    rounds: int = 3
    peak_tflops: float = 790.0  # of the device, for the share that `blocks` reports

    def tensor(self, *shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, self.torch_dtype)

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)


@dataclass
class Run:
    seconds: float
    gigabytes: float | None  # None where the system does not tell
    output: torch.Tensor


@dataclass
class Result:
    """One line of the table. `ratio` is what is held against `target`, where there is one."""

    row: str
    ours: float
    theirs: float
    ratio: float
    target: float | None
    difference: float
    ours_gb: float | None = None
    theirs_gb: float | None = None
    unit: str = "s"
    note: str = ""
    ours_rounds: tuple = ()
    theirs_rounds: tuple = ()

    @property
    def met(self):
        return None if self.target is None else self.ratio <= self.target

    def line(self):
        verdict = {None: "-", True: "met", False: "missed"}[self.met]
        cells = [self.row, f"{self.ours:.3f} {self.unit}", f"{self.theirs:.3f} {self.unit}"]
        cells += [f"{self.ratio:.3f}", optional(self.target, 2), verdict]
        cells += [optional(self.ours_gb, 3), optional(self.theirs_gb, 3), f"{self.difference:.1e}"]
        return columns(cells)


def optional(number, digits):
    return "-" if number is None else f"{number:.{digits}f}"


def columns(cells):
    """The first column to the left, the others to the right."""
    first, *others = zip(cells, COLUMNS.values())
    return f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others)


# Measuring.


def difference(a, b):
    """Norm of the difference over the norm of b: infinite for another shape, NaN with NaN."""
    a, b = (x.detach().to("cpu", torch.float64) for x in (a, b))
    return ((a - b).norm() / b.norm()).item() if a.shape == b.shape else math.inf


def resident(key):
    """VmRSS or VmHWM, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(key))


def held(device):
    """GB held now; peaks are counted from here on."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed shall not count as held
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except (OSError, AttributeError):  # not Linux
        return None


@torch.inference_mode()
def measured(run, device):
    """Run of a function that returns a tensor."""
    before = held(device)
    start = time.perf_counter()
    output = run()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if before is None:
        return Run(seconds, None, output)
    peak = resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 1e9
    return Run(seconds, max(0.0, peak - before), output)


def compare(row, ours, theirs, rounds, tolerance, note=""):
    """Result of two functions that return a Run. ValueError if their outputs differ."""
    gap = difference(ours().output, theirs().output)
    if not gap <= tolerance:
        raise ValueError(
            f"{row}: the outputs differ by {gap:.1e} relative, more than {tolerance:.0e}; times of "
            f"different results are not compared")
    our_runs, their_runs = zip(*((ours(), theirs()) for _ in range(rounds)))
    our_seconds = tuple(run.seconds for run in our_runs)
    their_seconds = tuple(run.seconds for run in their_runs)
    a, b = statistics.median(our_seconds), statistics.median(their_seconds)
    return Result(
        row, a, b, a / b, TARGETS.get(row), gap, peak_of(our_runs), peak_of(their_runs), note=note,
        ours_rounds=our_seconds, theirs_rounds=their_seconds)


def peak_of(runs):
    peaks = [run.gigabytes for run in runs]
    return None if None in peaks else max(peaks)


def side_by_side(row, s, ours, theirs, note="", tolerance=None):
    """`compare` for two functions that return a tensor."""
    ours, theirs = partial(measured, ours, s.device), partial(measured, theirs, s.device)
    return compare(row, ours, theirs, s.rounds, tolerance or TOLERANCE[s.dtype], note)


# Both sides of each model: theirs writes a checkpoint of random weights, each reads it its own way.


def write(make, folder):
    """Saves a model of theirs. It is made empty: no time goes into weights that are overwritten."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = make()
    model = model.to_empty(device="cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    randomize(model, torch.Generator().manual_seed(0)).save_pretrained(folder)
    return folder


def write_dit(c, folder):
    from diffusers import WanTransformer3DModel

    return write(lambda: WanTransformer3DModel(
        num_attention_heads=c.num_heads, attention_head_dim=c.dim // c.num_heads,
        in_channels=c.in_dim, out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim, num_layers=c.num_layers), folder)


def write_vae(c, folder):
    from diffusers import AutoencoderKLWan

    return write(lambda: AutoencoderKLWan(
        base_dim=c.dim, z_dim=c.z_dim, dim_mult=list(c.dim_mult), num_res_blocks=c.num_res_blocks,
        temperal_downsample=list(c.temporal_downsample), latents_mean=list(c.latents_mean),
        latents_std=list(c.latents_std)), folder)


def write_mllm(c, folder):
    import transformers as hf

    config = hf.Qwen2_5_VLConfig(**c.to_dict())
    processor(c).save_pretrained(folder)
    return write(lambda: hf.Qwen2_5_VLForConditionalGeneration(config), folder)


def processor(c):
    """Ours for both sides: its ids and pixels equal those of theirs bit by bit (test_mllm.py)."""
    return Processor(tiny_tokenizer(), patch_size=c.vision_config.patch_size)


def dits(folder, s):
    from diffusers import WanTransformer3DModel

    ours = WanDiT.from_pretrained(folder, s.device, s.torch_dtype)
    theirs = WanTransformer3DModel.from_pretrained(folder, torch_dtype=s.torch_dtype).to(s.device)
    if s.compile:
        torch._dynamo.reset()  # else shapes of a row before make kernels for any shape
        compile_blocks(ours.blocks)
        theirs.compile_repeated_blocks(fullgraph=True)
    return ours.eval(), theirs.eval()


def vaes(folder, s):
    from diffusers import AutoencoderKLWan

    ours = WanVAE.from_pretrained(folder, s.device, s.torch_dtype)
    theirs = AutoencoderKLWan.from_pretrained(folder, torch_dtype=s.torch_dtype).to(s.device)
    return ours.eval(), theirs.eval()


def mllms(folder, s):
    from transformers import Qwen2_5_VLForConditionalGeneration

    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, torch_dtype=s.torch_dtype, low_cpu_mem_usage=True)
    ours = Qwen2_5_VL.from_pretrained(folder, s.device, s.torch_dtype)
    return ours, theirs.to(s.device).eval()


def latent_statistics(vae, like):
    """Mean and std of the latents, which diffusers leaves to the caller."""
    statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std]).to(like)
    return statistics.view(2, 1, -1, 1, 1, 1)


def their_hidden(model, inputs, queries):
    """Hidden states (B, L + Q, D), queries after the prompt as text, without logits or cache."""
    ids, grids, mask = inputs["input_ids"], inputs["image_grid_thw"], inputs.get("attention_mask")
    count = queries.shape[-2]
    x = model.model.embed_tokens(ids)  #                                               (B, L, D)
    seen = model.visual(inputs["pixel_values"].to(x.dtype), grid_thw=grids)
    x = x.masked_scatter((ids == model.config.image_token_id)[..., None], seen)
    positions, _ = model.get_rope_index(ids, grids, attention_mask=mask)  #            (3, B, L)
    more = torch.arange(1, count + 1, device=ids.device)
    more = positions.amax(dim=(0, 2))[:, None] + more  #                               (B, Q)
    positions = torch.cat([positions, more.expand(3, -1, -1)], dim=2)
    x = torch.cat([x, queries.expand(len(x), -1, -1)], dim=1)
    mask = None if mask is None else F.pad(mask, (0, count), value=1)
    return model.model(
        inputs_embeds=x, position_ids=positions, attention_mask=mask, use_cache=False)[0]


# Rows. Each writes what it needs below s.folder and returns its lines.


def dit(row, s):
    """All steps of one edit with guidance: what ours does once per edit counts."""
    size = s.sizes[row]
    config, steps = size["dit"], size["steps"]
    ours, theirs = dits(write_dit(config, s.folder / "dit"), s)
    z = s.tensor(2, config.in_dim, *size["latent"])
    context = s.tensor(2, size["queries"], config.text_dim, seed=1)
    times = torch.linspace(999, 20, steps).to(s.device).unbind()

    def our_edit():
        condition = ours.condition(context, z.shape)
        return torch.cat([ours.denoise(z, t.expand(2), condition) for t in times])

    def their_edit():
        return torch.cat([theirs(z, t.expand(2), context, return_dict=False)[0] for t in times])

    tokens = math.prod(size["latent"]) // math.prod(config.patch_size)
    note = f"{steps} steps, 2 x {tokens} tokens, {size['queries']} of context"
    return [side_by_side(row, s, our_edit, their_edit, f"{note}, {config.num_layers} layers")]


def vae(row, s):
    """Encode and decode; both normalise the latents."""
    size = s.sizes[row]
    ours, theirs = vaes(write_vae(size["vae"], s.folder / "vae"), s)
    video = s.tensor(1, 3, size["frames"], size["side"], size["side"]).clamp(-1, 1)
    mean, std = latent_statistics(theirs, video)

    def our_round_trip():
        z = ours.encode(video)
        return join(z, ours.decode(z))

    def their_round_trip():
        z = (theirs.encode(video, return_dict=False)[0].mode() - mean) / std
        return join(z, theirs.decode(z * std + mean, return_dict=False)[0])

    def join(z, x):  # latents and pixels weigh the same, however many there are
        return torch.cat([(part / part.numel() ** 0.5).flatten() for part in (z, x)])

    note = f"{size['frames']} x {size['side']} x {size['side']} pixels, width {size['vae'].dim}"
    return [side_by_side(row, s, our_round_trip, their_round_trip, note)]


def mllm(row, s):
    """A picture, words and queries, up to the hidden states."""
    size = s.sizes[row]
    config = size["mllm"]
    ours, theirs = mllms(write_mllm(config, s.folder / "mllm"), s)
    words = "turn the scene into night, and leave all else as it is"
    inputs = processor(config)(words, picture(size["side"]))
    on_device = {name: x.to(s.device) for name, x in inputs.items()}
    queries = s.tensor(size["queries"], config.hidden_size)
    note = (
        f"{len(inputs['pixel_values'])} patches, "
        f"{inputs['input_ids'].shape[1]} + {size['queries']} tokens, "
        f"{config.vision_config.depth} + {config.num_hidden_layers} layers")
    run_ours = partial(ours, **inputs, queries=queries)
    run_theirs = partial(their_hidden, theirs, on_device, queries)
    return [side_by_side(row, s, run_ours, run_theirs, note)]


def picture(side):
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def load(row, s):
    """from_pretrained until every page has been read; both find the file in the page cache."""
    folder = write_dit(s.sizes[row]["dit"], s.folder / "load")
    gigabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    ours, theirs = partial(fresh_load, "ours", folder, s), partial(fresh_load, "theirs", folder, s)
    note = f"a file of {gigabytes:.2f} GB; GB: resident, beyond the imports"
    result = compare(row, ours, theirs, s.rounds, TOLERANCE[s.dtype], note)
    if result.ours_gb is None:
        return [result]
    memory = Result(
        "load memory", result.ours_gb, result.theirs_gb, result.ours_gb / gigabytes,
        TARGETS["load memory"], result.difference, unit="GB",
        note="ratio: our peak over the size of the file")
    return [result, memory]


def fresh_load(side, folder, s):
    """`timed_load` in a process of its own: the peak of a process never falls."""
    arguments = f"{side!r}, {str(folder)!r}, {s.device!r}, {s.dtype!r}"
    code = f"import benchmark, json; print(json.dumps(benchmark.timed_load({arguments})))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=TESTS, check=True, stdout=subprocess.PIPE, text=True)
    seconds, gigabytes, sums = json.loads(done.stdout.splitlines()[-1])
    return Run(seconds, gigabytes, torch.tensor(sums))


def timed_load(side, folder, device, dtype):
    """Seconds, GB on the host, and a sorted sum of each tensor, since names and order differ."""
    dtype = getattr(torch, dtype)
    if side == "theirs":
        import diffusers

        diffusers.logging.set_verbosity_error()
        diffusers.WanTransformer3DModel  # imported when it is named; ours is imported by now

    def whole_model():
        if side == "ours":
            model = WanDiT.from_pretrained(folder, device, dtype)
        else:
            model = diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
            model = model.to(device)
        every_page = [t.flatten()[:: 4096 // t.element_size()] for t in model.state_dict().values()]
        return torch.tensor(sorted(values.double().sum().item() for values in every_page))

    torch.zeros(1, device=device)  # a GPU's own start belongs to neither side
    run = measured(whole_model, "cpu")
    return run.seconds, run.gigabytes, run.output.tolist()


def edit(row, s):
    """The whole edit of a picture, from bytes to bytes, without references.

    Theirs gets the source as the paper says, added to the noisy latents, and the connector is ours
    on both sides. diffusers rounds t down to whole numbers for the model; here it gets 1000 sigma
    and our schedule, as ours does.
    """
    from diffusers import UniPCMultistepScheduler

    size, words = s.sizes[row], "turn the scene into night"
    steps, guidance, shift = size["steps"], size["guidance"], 3.0
    our_mllm, their_mllm = mllms(write_mllm(size["mllm"], s.folder / "mllm"), s)
    our_dit, their_dit = dits(write_dit(size["dit"], s.folder / "dit"), s)
    our_vae, their_vae = vaes(write_vae(size["vae"], s.folder / "vae"), replace(s, dtype="float32"))
    model = InstructX.untrained(
        our_mllm, processor(size["mllm"]), our_dit, our_vae, lora_rank=0, shift=shift,
        image_queries=size["queries"]).eval()
    frames = picture(size["side"])[None]
    mean, std = latent_statistics(their_vae, torch.zeros((), device=s.device))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2,
        solver_type="bh2")

    def our_edit():
        return torch.from_numpy(model.edit(frames, words, steps=steps, guidance=guidance, seed=0))

    def their_edit():
        inputs = model.processor.collate([model.prompt(frames, text) for text in (words, "")])
        inputs = {name: x.to(s.device) for name, x in inputs.items()}
        queries = model.connector.queries(False)
        hidden = their_hidden(their_mllm, inputs, queries)[:, -len(queries):]
        context = model.connector(hidden)  #                                        (2, Q, 4096)
        video = torch.from_numpy(frames).to(s.device).permute(3, 0, 1, 2)[None]  #  (1, 3, 1, H, W)
        source = their_vae.encode(video / 127.5 - 1, return_dict=False)[0].mode()
        source = (source - mean) / std
        z = torch.randn(source.shape, generator=torch.Generator().manual_seed(0)).to(s.device)
        scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            both = (z + source).to(s.torch_dtype).expand(2, -1, -1, -1, -1)
            time_of_both = (1000 * sigma).to(s.device).expand(2)
            v = their_dit(both, time_of_both, context, return_dict=False)[0].float()
            instructed, empty = v.chunk(2)
            v = empty + guidance * (instructed - empty)
            z = scheduler.step(v, t, z, return_dict=False)[0]
        x = their_vae.decode(z * std + mean, return_dict=False)[0][0]  #            (3, 1, H, W)
        return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu()

    note = f"{size['side']} x {size['side']} pixels, {steps} steps"
    note += "; a value between two bytes may fall to either"
    return [side_by_side(row, s, our_edit, their_edit, note, 10 * TOLERANCE[s.dtype])]


def train(row, s):
    """A step of stage 2 on images: forward, backward, AdamW. LoRA in the MLLM, all of the DiT.

    Theirs are transformers with PEFT's LoRA, and diffusers, which gets the source as the paper
    says, added to the noisy latents. Latents are given, as train.py keeps them.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from train import flow_loss

    size, rank, batch = s.sizes[row], s.sizes[row]["rank"], s.sizes[row]["batch"]
    our_mllm, their_mllm = mllms(write_mllm(size["mllm"], s.folder / "mllm"), s)
    our_dit, their_dit = dits(write_dit(size["dit"], s.folder / "dit"), s)
    model = InstructX.untrained(
        our_mllm, processor(size["mllm"]), our_dit, None, lora_rank=rank, lora_alpha=rank,
        image_queries=size["queries"])
    model.dit.add_source_embedding()
    matrices = r"model\.layers\..*_proj"
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=matrices)
    inject_adapter_in_model(lora, their_mllm)
    connector = copy.deepcopy(model.connector)
    prompt = model.prompt(picture(size["side"])[None], "turn the scene into night")
    inputs = model.processor.collate([prompt] * batch)  # ours computes positions on the CPU
    on_device = {name: x.to(s.device) for name, x in inputs.items()}
    shape = batch, size["dit"].in_dim, *size["latent"]
    z, source, noise = (s.tensor(*shape, seed=seed) for seed in range(3))
    sigma = torch.linspace(0.3, 0.8, batch, device=s.device)

    def our_loss():
        context = model.context(inputs, is_video=False)
        return flow_loss(our_dit, context, z, source, [], sigma, noise, FlowSampler()).mean()

    def their_loss():
        queries = connector.queries(False)
        hidden = their_hidden(their_mllm, on_device, queries)[:, -len(queries) :]
        noisy = (FlowSampler().add_noise(z, noise, sigma) + source).to(s.torch_dtype)
        v = their_dit(noisy, 1000 * sigma, connector(hidden), return_dict=False)[0]
        return F.mse_loss(v, noise - z)

    ours = training_step(our_loss, our_mllm, model.connector, our_dit)
    theirs = training_step(their_loss, their_mllm, connector, their_dit)
    tokens = math.prod(size["latent"]) // math.prod(size["dit"].patch_size)
    prompt = f"{inputs['input_ids'].shape[1]} + {size['queries']} tokens of the MLLM"
    note = f"{batch} images, {tokens} tokens of the DiT, {prompt}, LoRA of rank {rank}"
    return [side_by_side(row, s, ours, theirs, note)]


def training_step(loss_of, mllm, connector, dit):
    """A function that takes one step and returns the loss and the gradient of the queries."""
    for name, parameter in mllm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    trained = [p for m in (mllm, connector, dit) for p in m.parameters() if p.requires_grad]
    # A step so small that ours and theirs stay the same model.
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)

    def step():
        with torch.inference_mode(False), torch.enable_grad():
            loss = loss_of()
            loss.backward()
            gradient = connector.image_queries.grad.flatten().clone()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([loss.detach()[None], gradient / gradient.norm()])

    return step


def blocks(row, s):
    """A step of two layers as wide as the 14B on a long clip: how well the device is used."""
    s = replace(s, dtype="bfloat16", compile=s.device != "cpu")
    size = s.sizes[row]
    config, Q = size["dit"], size["queries"]
    ours, theirs = dits(write_dit(config, s.folder / "blocks"), s)
    z = s.tensor(1, config.in_dim, *size["latent"])
    context, t = s.tensor(1, Q, config.text_dim, seed=1), torch.full((1,), 500.0, device=s.device)
    with torch.inference_mode():
        condition = ours.condition(context, z.shape)
    result = side_by_side(
        row, s, lambda: ours.denoise(z, t, condition),
        lambda: theirs(z, t, context, return_dict=False)[0])
    tokens = math.prod(size["latent"]) // math.prod(config.patch_size)
    tflop = step_flops(config, tokens, Q) / 1e12
    note = f"{tokens} tokens, bfloat16, compiled"
    for side, seconds in (("ours", result.ours), ("theirs", result.theirs)):
        rate = tflop / seconds
        note += f"; {side} {rate:.0f} TFLOP/s, {rate / s.peak_tflops:.0%} of {s.peak_tflops:g}"
    return [replace(result, note=note)]


ROWS = {
    "dit": dit, "dit-256": dit, "vae-image": vae, "vae-clip": vae, "mllm": mllm, "load": load,
    "edit": edit, "train": train, "blocks": blocks}


def measure(rows, s, show=print):
    """Results of the rows, in order; each line is shown as soon as it is known."""
    show(columns(COLUMNS))
    results = []
    for row in rows:
        with tempfile.TemporaryDirectory(dir=s.folder) as folder:
            for result in ROWS[row](row, replace(s, folder=Path(folder))):
                show(result.line())
                results.append(result)
    for result in results:
        if result.note:
            show(f"{result.row}: {result.note}")
    return results


def write_json(file, results, s):
    """Under its name only when whole."""
    import diffusers
    import transformers

    about = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if s.device != "cpu" else "cpu",
        "dtype": s.dtype,
        "compile": s.compile,
        "rounds": s.rounds,
        "threads": torch.get_num_threads(),
        "rows": [{**vars(result), "met": result.met} for result in results],
    }
    partial_file = file.with_name(file.name + ".partial")
    partial_file.write_text(json.dumps(about, indent=2) + "\n")
    os.replace(partial_file, file)


def main(argv=None):
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    rows_help = f"of {', '.join(ROWS)} (default: all; blocks on CUDA)"
    add("rows", nargs="*", metavar="ROW", help=rows_help)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--dtype", choices=TOLERANCE, default="float32", help="of matrices (default: float32)")
    add("--compile", action="store_true", help="compile the DiT's blocks, on both sides")
    add("--rounds", type=int, default=3, help="of each side after the warm-up (default: 3)")
    add("--peak-tflops", type=float, default=790, help="of the device (default: 790)")
    add("--tiny", action="store_true", help="the smallest sizes, which say nothing of speed")
    add("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args(argv)
    rows = args.rows or [row for row in ROWS if row != "blocks" or args.device == "cuda"]
    try:
        unknown = [row for row in rows if row not in ROWS]
        if unknown:
            raise ValueError(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
        if "blocks" in rows and args.device != "cuda":
            raise ValueError("blocks is for a GPU: add --device cuda, or leave the row out")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("this machine has no CUDA device")
        if args.rounds < 1 or args.peak_tflops <= 0:
            raise ValueError("--rounds is 1 or more, --peak-tflops above 0")
        try:
            import accelerate  # noqa: F401
            import diffusers
            import transformers
        except ImportError as error:
            raise ValueError(f"{error}; pip install -e '.[test,parity]' brings theirs") from None
        for library in (diffusers, transformers):
            library.logging.set_verbosity_error()
            library.logging.disable_progress_bar()
        torch.backends.cudnn.allow_tf32 = args.dtype != "float32"  # float32 shall be float32
        with tempfile.TemporaryDirectory() as folder:
            s = Setting(
                TINY if args.tiny else MID, Path(folder), args.device, args.dtype, args.compile,
                args.rounds, args.peak_tflops)
            results = measure(rows, s)
        if args.json:
            write_json(args.json, results, s)
    except (ValueError, OSError) as error:
        parser.exit(2, f"benchmark.py: {error}\n")


if __name__ == "__main__":
    main()
