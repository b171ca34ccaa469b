"""Measures ours against theirs, side by side: the same random weights, the same inputs, in turn in one process.

    python tests/benchmark.py                               # every row in float32 on the CPU, a minute or so each
    python tests/benchmark.py dit vae-image --rounds 5 --json result.json
    python tests/benchmark.py --device cuda --dtype bfloat16 --compile

Theirs are transformers 4.49 and diffusers, called as a careful user would call them: no logits where none are wanted,
no cache that is never read, guidance as a batch of two. Both sides read one checkpoint with their own from_pretrained.

A row runs ours, theirs, ours, theirs, ... after one run of each as warm-up; seconds are medians, ratio is ours / theirs.
GB is what a run holds at its peak beyond what was there before it (the weights, and inputs). The outputs of the warm-up
are compared, and where they differ there is no comparison but exit code 2.
"""

import argparse
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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from conftest import randomize, tiny_tokenizer
from connector import InstructX
from dit import PRESETS as DITS, WanDiT
from mllm import PRESETS as MLLMS, Processor, Qwen2_5_VL, Qwen2_5_VLConfig, VisionConfig
from vae import PRESETS as VAES, VAEConfig, WanVAE

# Real widths and few layers, so that matrix products dominate as they do at full size. Token ids are tiny_tokenizer's.
IDS = {"vocab_size": 512, "vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 261,
       "video_token_id": 262}
DIT, VAE = replace(DITS["1.3B"], num_layers=2), VAEConfig()
MLLM = Qwen2_5_VLConfig(num_hidden_layers=2, vision_config=VisionConfig(depth=4, fullatt_block_indexes=(3,)), **IDS)
MID = {
    "dit": {"dit": DIT, "latent": (1, 32, 32), "queries": 256, "steps": 10},
    "vae-image": {"vae": VAE, "frames": 1, "side": 256},
    "vae-clip": {"vae": VAE, "frames": 9, "side": 128},
    "mllm": {"mllm": MLLM, "side": 448, "queries": 256},
    "load": {"dit": replace(DIT, num_layers=5)},                                                    # 1.0 GB
    "edit": {"dit": DIT, "mllm": MLLM, "vae": VAE, "side": 256, "queries": 256, "steps": 4, "guidance": 3.0},
    "blocks": {"dit": replace(DITS["14B"], num_layers=2), "latent": (21, 60, 104), "queries": 512},  # 32,760 tokens
}
TINY_MLLM = replace(MLLMS["tiny"], **IDS)
TINY = {
    "dit": {"dit": DITS["tiny"], "latent": (2, 4, 6), "queries": 5, "steps": 2},
    "vae-image": {"vae": VAES["tiny"], "frames": 1, "side": 16},
    "vae-clip": {"vae": VAES["tiny"], "frames": 5, "side": 16},
    "mllm": {"mllm": TINY_MLLM, "side": 48, "queries": 4},
    "load": {"dit": DITS["tiny"]},
    "edit": {"dit": DITS["tiny"], "mllm": TINY_MLLM, "vae": VAES["tiny"], "side": 32, "queries": 4, "steps": 2,
             "guidance": 2.0},
    "blocks": {"dit": DITS["tiny"], "latent": (2, 4, 6), "queries": 5},
}
TARGETS = {"dit": 0.85, "vae-image": 0.45, "vae-clip": 0.9, "mllm": 0.9, "load": 0.5, "load memory": 1.05}

# Largest relative difference of the outputs. In bfloat16 the two round at different places, diffusers the stream too.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
COLUMNS = (("row", 12), ("ours", 10), ("theirs", 10), ("ratio", 7), ("target", 7), ("", 7), ("ours GB", 9),
           ("theirs GB", 10), ("difference", 11))


@dataclass
class Setting:
    """What all rows of one call have in common."""

    sizes: dict                 # MID or TINY
    folder: Path                # where checkpoints may be written
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False       # the DiT's blocks, on both sides
    rounds: int = 3
    peak_tflops: float = 790.0  # of the device, for the share that `blocks` reports

    def tensor(self, *shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, getattr(torch, self.dtype))


@dataclass
class Run:
    seconds: float
    gigabytes: float | None     # None where the system does not tell
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
        number = lambda x, form: "-" if x is None else format(x, form)
        cells = (self.row, f"{self.ours:.3f} {self.unit}", f"{self.theirs:.3f} {self.unit}", f"{self.ratio:.3f}",
                 number(self.target, ".2f"), {None: "-", True: "met", False: "missed"}[self.met],
                 number(self.ours_gb, ".3f"), number(self.theirs_gb, ".3f"), f"{self.difference:.1e}")
        return columns(cells)


def columns(cells):
    """The first column to the left, the others to the right."""
    return "".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
                   for i, (cell, (_, width)) in enumerate(zip(cells, COLUMNS)))


# Measuring.


def difference(a, b):
    """Norm of the difference over the norm of b; infinite for another shape, and never small with NaN in either."""
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
        ctypes.CDLL(None).malloc_trim(0)            # what earlier runs have freed shall not count as held
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except (OSError, AttributeError):               # not Linux
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
        raise ValueError(f"{row}: the outputs differ by {gap:.1e} relative, more than {tolerance:.0e}; times of "
                         f"different results are not compared")
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    seconds = [tuple(run.seconds for run in side) for side in zip(*pairs)]
    peaks = [None if any(run.gigabytes is None for run in side) else max(run.gigabytes for run in side)
             for side in zip(*pairs)]
    a, b = map(statistics.median, seconds)
    return Result(row, a, b, a / b, TARGETS.get(row), gap, *peaks, note=note, ours_rounds=seconds[0],
                  theirs_rounds=seconds[1])


def side_by_side(row, s, ours, theirs, note="", tolerance=None):
    """`compare` for two functions that return a tensor."""
    return compare(row, lambda: measured(ours, s.device), lambda: measured(theirs, s.device), s.rounds,
                   tolerance or TOLERANCE[s.dtype], note)


# Both sides of each model: theirs writes a checkpoint of random weights, and each reads it as its users do.


def empty(make):
    """A model whose parameters are made but not filled: no seconds go into weights that are overwritten."""
    from accelerate import init_empty_weights
    with init_empty_weights():
        model = make()
    return model.to_empty(device="cpu")


def write(model, folder):
    randomize(model, torch.Generator().manual_seed(0)).save_pretrained(folder)
    return folder


def write_dit(c, folder):
    from diffusers import WanTransformer3DModel
    return write(empty(lambda: WanTransformer3DModel(
        num_attention_heads=c.num_heads, attention_head_dim=c.dim // c.num_heads, in_channels=c.in_dim,
        out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim,
        num_layers=c.num_layers)), folder)


def write_vae(c, folder):
    from diffusers import AutoencoderKLWan
    return write(empty(lambda: AutoencoderKLWan(
        base_dim=c.dim, z_dim=c.z_dim, dim_mult=list(c.dim_mult), num_res_blocks=c.num_res_blocks,
        temperal_downsample=list(c.temporal_downsample), latents_mean=list(c.latents_mean),
        latents_std=list(c.latents_std))), folder)


def write_mllm(c, folder):
    import transformers as hf
    model = empty(lambda: hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(**c.to_dict())))
    model.tie_weights()
    processor(c).save_pretrained(folder)
    return write(model, folder)


def processor(c):
    """Ours for both sides: its ids and pixels equal those of theirs bit by bit (test_mllm.py)."""
    return Processor(tiny_tokenizer(), patch_size=c.vision_config.patch_size)


def dits(folder, s):
    from diffusers import WanTransformer3DModel
    dtype = getattr(torch, s.dtype)
    ours = WanDiT.from_pretrained(folder, s.device, dtype)
    theirs = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).to(s.device)
    if s.compile:
        ours.compile_blocks()
        theirs.compile_repeated_blocks(fullgraph=True)
    return ours.eval(), theirs.eval()


def vaes(folder, s):
    from diffusers import AutoencoderKLWan
    dtype = getattr(torch, s.dtype)
    theirs = AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype)
    return WanVAE.from_pretrained(folder, s.device, dtype).eval(), theirs.to(s.device).eval()


def mllms(folder, s):
    from transformers import Qwen2_5_VLForConditionalGeneration
    dtype = getattr(torch, s.dtype)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=True)
    return Qwen2_5_VL.from_pretrained(folder, s.device, dtype), theirs.to(s.device).eval()


def statistics_of(vae, like):
    """Mean and std of the latents, which diffusers leaves to the caller."""
    return (torch.tensor(x).view(1, -1, 1, 1, 1).to(like) for x in (vae.config.latents_mean, vae.config.latents_std))


def their_hidden(model, inputs, queries):
    """Hidden states (B, L + Q, D) with the least work: no logits, no cache; queries stand after the prompt as text."""
    ids, grids, mask = inputs["input_ids"], inputs["image_grid_thw"], inputs.get("attention_mask")
    count = queries.shape[-2]
    x = model.model.embed_tokens(ids)                                                           # (B, L, D)
    seen = model.visual(inputs["pixel_values"].to(x.dtype), grid_thw=grids)
    x = x.masked_scatter((ids == model.config.image_token_id)[..., None], seen)
    positions, _ = model.get_rope_index(ids, grids, attention_mask=mask)                        # (3, B, L)
    more = positions.amax(dim=(0, 2))[:, None] + torch.arange(1, count + 1, device=ids.device)  # (B, Q)
    positions = torch.cat([positions, more.expand(3, -1, -1)], dim=2)
    x = torch.cat([x, queries.expand(len(x), -1, -1)], dim=1)
    mask = None if mask is None else F.pad(mask, (0, count), value=1)
    return model.model(inputs_embeds=x, position_ids=positions, attention_mask=mask, use_cache=False)[0]


# Rows. Each writes what it needs below s.folder and returns its lines.


def dit(s):
    """All steps of one edit with guidance: what ours does once per edit counts."""
    size = s.sizes["dit"]
    config, steps = size["dit"], size["steps"]
    ours, theirs = dits(write_dit(config, s.folder / "dit"), s)
    z, context = s.tensor(2, config.in_dim, *size["latent"]), s.tensor(2, size["queries"], config.text_dim, seed=1)
    times = torch.linspace(999, 20, steps).to(s.device).unbind()

    def our_edit():
        condition = ours.condition(context, z.shape, timesteps=[t.item() for t in times])
        return torch.cat([ours.denoise(z, t.expand(2), condition) for t in times])

    def their_edit():
        return torch.cat([theirs(z, t.expand(2), context, return_dict=False)[0] for t in times])

    tokens = math.prod(size["latent"]) // math.prod(config.patch_size)
    return [side_by_side("dit", s, our_edit, their_edit,
                         f"{steps} steps, 2 x {tokens} tokens, {size['queries']} of condition, {config.num_layers} layers")]


def vae(row, s):
    """Encode and decode; both normalise the latents."""
    size = s.sizes[row]
    ours, theirs = vaes(write_vae(size["vae"], s.folder / "vae"), s)
    video = s.tensor(1, 3, size["frames"], size["side"], size["side"]).clamp(-1, 1)
    mean, std = statistics_of(theirs, video)
    ours_there = lambda: (z := ours.encode(video), ours.decode(z))

    def theirs_there():
        z = (theirs.encode(video, return_dict=False)[0].mode() - mean) / std
        return z, theirs.decode(z * std + mean, return_dict=False)[0]

    # Latents and pixels weigh the same, however many there are.
    join = lambda z, x: torch.cat([(z / z.numel()**0.5).flatten(), (x / x.numel()**0.5).flatten()])
    return [side_by_side(row, s, lambda: join(*ours_there()), lambda: join(*theirs_there()),
                         f"{size['frames']} x {size['side']} x {size['side']} pixels, width {size['vae'].dim}")]


def mllm(s):
    """A picture, words and queries, up to the hidden states."""
    size = s.sizes["mllm"]
    config = size["mllm"]
    ours, theirs = mllms(write_mllm(config, s.folder / "mllm"), s)
    inputs = processor(config)("turn the scene into night, and leave all else as it is", picture(size["side"]))
    there, queries = {name: x.to(s.device) for name, x in inputs.items()}, s.tensor(size["queries"], config.hidden_size)
    length, patches = inputs["input_ids"].shape[1], len(inputs["pixel_values"])
    return [side_by_side("mllm", s, lambda: ours(**inputs, queries=queries),
                         lambda: their_hidden(theirs, there, queries),
                         f"{patches} patches, {length} + {size['queries']} tokens, "
                         f"{config.vision_config.depth} + {config.num_hidden_layers} layers")]


def picture(side):
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def load(s):
    """from_pretrained until every page of every tensor has been read; the file is in the page cache for both."""
    folder = write_dit(s.sizes["load"]["dit"], s.folder / "load")
    gigabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    result = compare("load", lambda: fresh_load("ours", folder, s), lambda: fresh_load("theirs", folder, s), s.rounds,
                     TOLERANCE[s.dtype], f"a file of {gigabytes:.2f} GB; GB: resident, beyond the imports")
    if result.ours_gb is None:
        return [result]
    memory = result.ours_gb / gigabytes
    return [result, Result("load memory", result.ours_gb, result.theirs_gb, memory, TARGETS["load memory"],
                           result.difference, unit="GB", note="ratio: our peak over the size of the file")]


def fresh_load(side, folder, s):
    """`timed_load` in a process of its own: the peak of a process never falls."""
    code = (f"import benchmark, json; "
            f"print(json.dumps(benchmark.timed_load({side!r}, {str(folder)!r}, {s.device!r}, {s.dtype!r})))")
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, check=True, stdout=subprocess.PIPE, text=True)
    seconds, gigabytes, sums = json.loads(done.stdout.splitlines()[-1])
    return Run(seconds, gigabytes, torch.tensor(sums))


def timed_load(side, folder, device, dtype):
    """Seconds, GB on the host, and a sum for each tensor, sorted, since the two name and order them differently."""
    dtype = getattr(torch, dtype)
    if side == "theirs":
        import diffusers
        diffusers.logging.set_verbosity_error()
        make = lambda: diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).to(device)
    else:
        make = lambda: WanDiT.from_pretrained(folder, device, dtype)

    def whole():
        tensors = make().state_dict().values()
        every_page = (t.flatten()[::4096 // t.element_size()] for t in tensors)
        return torch.tensor(sorted(part.double().sum().item() for part in every_page))

    run = measured(whole, "cpu")
    return run.seconds, run.gigabytes, run.output.tolist()


def edit(s):
    """The whole edit of a picture, from bytes to bytes, without references.

    Theirs gets the source as the paper says, added to the noisy latents, and the connector is ours on both sides.
    diffusers rounds t down to whole numbers for the model; here it gets 1000 sigma and our schedule, as ours does.
    """
    from diffusers import UniPCMultistepScheduler
    size, words = s.sizes["edit"], "turn the scene into night"
    steps, guidance, shift = size["steps"], size["guidance"], 3.0
    mllm_, vision = mllms(write_mllm(size["mllm"], s.folder / "edit" / "mllm"), s)
    dit_, transformer = dits(write_dit(size["dit"], s.folder / "edit" / "dit"), s)
    vae_, autoencoder = vaes(write_vae(size["vae"], s.folder / "edit" / "vae"), replace(s, dtype="float32"))
    model = InstructX.untrained(mllm_, processor(size["mllm"]), dit_, vae_, lora_rank=0,
                                image_queries=size["queries"]).eval()
    frames, dtype = picture(size["side"])[None], getattr(torch, s.dtype)
    mean, std = statistics_of(autoencoder, torch.zeros((), device=s.device))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
                                        solver_order=2, solver_type="bh2")

    def our_edit():
        return torch.from_numpy(model.edit(frames, words, steps=steps, guidance=guidance, shift=shift, seed=0))

    def their_edit():
        inputs = model.processor.collate([model.prompt(frames, text) for text in (words, "")])
        inputs = {name: x.to(s.device) for name, x in inputs.items()}
        queries = model.connector.queries(False)
        context = model.connector(their_hidden(vision, inputs, queries)[:, -len(queries):])     # (2, Q, 4096)
        video = torch.from_numpy(frames).to(s.device).permute(3, 0, 1, 2)[None] / 127.5 - 1     # (1, 3, 1, H, W)
        source = (autoencoder.encode(video, return_dict=False)[0].mode() - mean) / std
        z = torch.randn(source.shape, generator=torch.Generator().manual_seed(0)).to(s.device)
        scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            both = (z + source).to(dtype).expand(2, -1, -1, -1, -1)
            v = transformer(both, (1000 * sigma).to(s.device).expand(2), context, return_dict=False)[0].float()
            wanted, without = v.chunk(2)
            z = scheduler.step(without + guidance * (wanted - without), t, z, return_dict=False)[0]
        x = autoencoder.decode(z * std + mean, return_dict=False)[0][0]                         # (3, 1, H, W)
        return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu()

    note = f"{size['side']} x {size['side']} pixels, {steps} steps; a value between two bytes may fall to either"
    return [side_by_side("edit", s, our_edit, their_edit, note, 10 * TOLERANCE[s.dtype])]


def blocks(s):
    """A step of two layers as wide as the 14B, on a clip of 81 frames of 832x480: how well the device is used."""
    s = replace(s, dtype="bfloat16", compile=True)
    size = s.sizes["blocks"]
    config, Q = size["dit"], size["queries"]
    ours, theirs = dits(write_dit(config, s.folder / "blocks"), s)
    z, context, t = s.tensor(1, config.in_dim, *size["latent"]), s.tensor(1, Q, config.text_dim, seed=1), s.tensor(1)
    t = torch.full_like(t, 500.0, dtype=torch.float32)
    with torch.inference_mode():
        condition = ours.condition(context, z.shape)
    result = side_by_side("blocks", s, lambda: ours.denoise(z, t, condition),
                          lambda: theirs(z, t, context, return_dict=False)[0])
    D, L = config.dim, math.prod(size["latent"]) // math.prod(config.patch_size)
    # A token in a layer: q k v o, q and o to the context, ffn; and its scores and sums. 2 FLOP per multiplication.
    flop = 2 * L * config.num_layers * (6 * D * D + 2 * D * config.ffn_dim + 2 * D * (L + Q))
    rates = [flop / seconds / 1e12 for seconds in (result.ours, result.theirs)]
    shares = [f"{rate:.0f} TFLOP/s, {rate / s.peak_tflops:.0%} of {s.peak_tflops:g}" for rate in rates]
    return [replace(result, note=f"{L} tokens, bfloat16, compiled; ours {shares[0]}; theirs {shares[1]}")]


ROWS = {"dit": dit, "vae-image": lambda s: vae("vae-image", s), "vae-clip": lambda s: vae("vae-clip", s),
        "mllm": mllm, "load": load, "edit": edit, "blocks": blocks}


def measure(rows, s, show=print):
    """Results of the rows, in order; each line is shown as soon as it is known."""
    show(columns([name for name, _ in COLUMNS]))
    results = []
    for row in rows:
        with tempfile.TemporaryDirectory(dir=s.folder) as folder:
            for result in ROWS[row](replace(s, folder=Path(folder))):
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
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}
    about = {"device": torch.cuda.get_device_name() if s.device != "cpu" else "cpu", "dtype": s.dtype,
             "compile": s.compile, "rounds": s.rounds, "threads": torch.get_num_threads()}
    rows = [{**vars(result), "met": result.met} for result in results]
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps({**versions, **about, "rows": rows}, indent=2) + "\n")
    os.replace(partial, file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all; blocks on CUDA)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of the matrices (default: float32)")
    parser.add_argument("--compile", action="store_true", help="compile the DiT's blocks, on both sides")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side after the warm-up (default: 3)")
    parser.add_argument("--peak-tflops", type=float, default=790, help="of the device, for blocks (default: 790)")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: checks the rows, says nothing of speed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args(argv)
    rows = args.rows or [row for row in ROWS if row != "blocks" or args.device == "cuda"]
    try:
        if odd := [row for row in rows if row not in ROWS]:
            raise ValueError(f"no row {', '.join(odd)}; there are {', '.join(ROWS)}")
        if "blocks" in rows and args.device != "cuda":
            raise ValueError("blocks is for a GPU: add --device cuda, or leave the row out")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("this machine has no CUDA device")
        if args.rounds < 1 or args.peak_tflops <= 0:
            raise ValueError("--rounds is 1 or more, --peak-tflops above 0")
        try:
            import accelerate, diffusers, transformers
        except ImportError as error:
            raise ValueError(f"{error}; theirs come with pip install -e '.[test,parity]'") from None
        for theirs in (diffusers, transformers):
            theirs.logging.set_verbosity_error()
            theirs.logging.disable_progress_bar()
        torch.backends.cudnn.allow_tf32 = args.dtype != "float32"       # float32 shall be float32, on both sides
        with tempfile.TemporaryDirectory() as folder:
            s = Setting(TINY if args.tiny else MID, Path(folder), args.device, args.dtype, args.compile, args.rounds,
                        args.peak_tflops)
            results = measure(rows, s)
        if args.json:
            write_json(args.json, results, s)
    except (ValueError, OSError) as error:
        parser.exit(2, f"benchmark.py: {error}\n")


if __name__ == "__main__":
    main()
