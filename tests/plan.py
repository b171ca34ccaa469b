"""Parameters, memory and days of a training stage, before anything is downloaded or rented.

    python tests/plan.py 14B --stage 2 --gpus 8 --gradient-checkpointing
    python tests/plan.py 14B --stage 2 --micro-batch 1 --dit-lora 64 --weights FOLDER

The sizes are those of the config.json files in --weights, else as released with the DiT named. All
other options go to train.py; batches are the paper's unless given. No weights and no memory are
needed: models on the meta device run on fake tensors, which have shapes and no content, so what is
counted is what PyTorch would do and keep.
"""

import argparse
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # there is no public name
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from connector import InstructX, locate
from connector import read_config as read_settings
from dit import PRESETS, WanDiT
from dit import read_config as read_dit_config
from edit import Parser, number
from mllm import Qwen2_5_VL, Qwen2_5_VLConfig
from mllm import read_config as read_mllm_config
from vae import VAEConfig, WanVAE
from vae import read_config as read_vae_config

WORDS = 64  # tokens of an instruction


def parse(arguments=None):
    """(options of this script, settings of train.py)."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="plan.py", description=__doc__, formatter_class=raw)
    parser.add_argument("dit", choices=PRESETS, help="size of the DiT where --weights has none")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="config.json files will do")
    parser.add_argument("--gpus", type=number(int, 1, 10**6), default=1, help="how many")
    text = "GB of each (default: 80)"
    parser.add_argument("--gpu-memory", type=number(float, 0, 1e9), default=80.0, help=text)
    text = "what each reaches, about 40 %% of its peak (default: 400)"
    parser.add_argument("--gpu-tflops", type=number(float, 0.001, 1e6), default=400.0, help=text)
    options, others = parser.parse_known_args(arguments)
    paper = "--image-batch 128 --video-batch 32 --precision bfloat16".split()
    unused = ["--device", "cpu", "--data", __file__, "--out", "-", "--weights", "-"]
    args = train.settings([*paper, *others, *unused])
    train.complete(args)
    return options, args


def build(options, args, layers=None):
    """InstructX on the meta device with what trains marked; `layers` for another depth."""
    folders = locate(options.weights, args.start) if options.weights else {}

    def config_of(name, read, released):
        if name not in folders:
            return released
        folder = folders[name] if folders[name].is_dir() else folders[name].parent
        return read(folder / "config.json")

    mllm = config_of("mllm", read_mllm_config, Qwen2_5_VLConfig())
    dit = config_of("dit", read_dit_config, PRESETS[options.dit])
    vae = config_of("vae", read_vae_config, VAEConfig())
    settings = config_of("instructx", read_settings, None)
    if layers:
        mllm, dit = replace(mllm, num_hidden_layers=layers), replace(dit, num_layers=layers)
    settings = (asdict(settings) if settings else {}) | args.config
    with torch.device("meta"):
        models = Qwen2_5_VL(mllm), None, WanDiT(dit), WanVAE(vae)
        model = InstructX.untrained(*models, **settings)
        train.trainable(model, args)
    return model


def held_bytes(parameters, args):
    """Of weights {name: parameter} and, where they train, of gradients and moments, all float32."""
    total = 0
    for name, p in parameters.items():
        by_muon = args.muon_lr and name.startswith("dit.blocks.") and p.ndim == 2  # one moment
        copies = 3 if by_muon else 4
        total += p.numel() * (4 * copies if p.requires_grad else p.element_size())
    return total


def cost_of_layers(build, call, layers):
    """[FLOP forward, FLOP backward, bytes kept between them] of call(model), and what a layer adds.

    Of models with one and two layers, which build(n) makes; all further layers are alike.
    """
    costs = []
    for n in (1, 2):
        model, kept = build(n), {}
        forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with FakeTensorMode():
            for module in model.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    fake = torch.empty(p.shape, dtype=p.dtype)
                    setattr(module, name, nn.Parameter(fake, p.requires_grad))
            with forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = call(model)
            with backward:
                result.sum().backward()
            weights = {p.untyped_storage()._cdata for p in model.parameters()}
            storages = [t.untyped_storage() for key, t in kept.items() if key not in weights]
            size = sum(storage.nbytes() for storage in storages)
        costs.append(np.array([forward.get_total_flops(), backward.get_total_flops(), size], float))
    one_layer = costs[1] - costs[0]
    return costs[0] + one_layer * (layers - 1), one_layer


def step_cost(options, args, model, frames, batch):
    """(FLOP, bytes kept for the backward pass, tokens in the DiT) of some samples on one GPU.

    The frozen vision tower is left out.
    """
    config, vae, compute = model.config, model.vae, getattr(torch, args.precision)
    side = round(args.area**0.5 / model.multiple()) * model.multiple() // vae.spatial_stride
    latent_frames = (frames - 1) // vae.temporal_stride + 1
    shape = (batch, model.dit.config.in_dim, latent_frames, side, side)
    queries = config.video_queries if frames > 1 else config.image_queries
    vision = model.mllm.config.vision_config
    pixels_per_token = (vision.patch_size * vision.spatial_merge_size) ** 2
    pictures = -(-min(frames, config.mllm_frames) // 2) if frames > 1 else 1  # two frames a patch
    tokens = WORDS + pictures * args.area // pixels_per_token + queries

    def understand(model):
        x = torch.randn(batch, tokens, config.mllm_dim, dtype=compute, requires_grad=True)
        with train.autocast(torch.device("cpu"), args):
            hidden = model.mllm.model(x, torch.zeros(3, batch, tokens))
            return model.connector(hidden[:, -queries:])

    def denoise(model):
        context = torch.randn(batch, queries, config.context_dim, requires_grad=True)
        z = torch.randn(shape)
        with train.autocast(torch.device("cpu"), args):
            return model.dit(z, torch.zeros(batch), context, z if args.stage > 1 else None)

    dit_tokens = math.prod(model.dit.grid(shape))
    flop = kept = 0
    for call, layers, input_bytes in (
        (
            understand,
            model.mllm.config.num_hidden_layers,
            tokens * config.mllm_dim * compute.itemsize,
        ),
        (denoise, model.dit.config.num_layers, dit_tokens * model.dit.config.dim * 4),
    ):
        total, layer = cost_of_layers(lambda n: build(options, args, n), call, layers)
        flop += total[0] + total[1]
        kept += total[2]
        if args.gradient_checkpointing:  # each layer keeps its input and runs again
            flop += layer[0] * layers
            kept += input_bytes * batch * layers - layer[2] * (layers - 1)
    return flop, kept, dit_tokens


def plan(options, args):
    """Prints parameters, FLOP, memory of each GPU and days of a stage."""
    gpus, model = options.gpus, build(options, args)
    print(
        f"{'':10}{'parameters':>12}{'trained':>12}{'GB per GPU':>12}  (weights, gradients, moments)"
    )
    # Sharded, the weights of a block and of the next one are gathered while it runs.
    held = 2 * 4 * sum(p.numel() for p in model.dit.blocks[0].parameters()) if gpus > 1 else 0
    for part in ("mllm", "connector", "dit", "vae"):
        named = getattr(model, part).named_parameters()
        parameters = {f"{part}.{name}": p for name, p in named}
        size = held_bytes(parameters, args) / (gpus if part == "dit" else 1)
        held += size
        count = sum(p.numel() for p in parameters.values())
        trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        print(f"{part:10}{count / 1e6:10.1f} M{trained / 1e6:10.1f} M{size / 1e9:12.2f}")
    seconds, clips = 0.0, args.video_share if args.stage > 1 else 0.0
    for media, batch, frames, share in (
        ("image", args.image_batch, 1, 1 - clips),
        ("clip", args.video_batch, args.frames, clips),
    ):
        if not share:
            continue
        sizes = range(1, min(batch, args.micro_batch) + 1)
        chunk = max(size for size in sizes if batch % size == 0)  # as Pairs.batch_sizes
        each = -(-chunk // gpus)
        flop, kept, tokens = step_cost(options, args, model, frames, each)
        step = flop * batch / chunk / (options.gpu_tflops * 1e12)
        seconds += share * step
        print(
            f"{media} step: {batch} of {tokens} tokens, {each} at once on each GPU; "
            f"{flop / each * batch / 1e15:.3f} PFLOP, {step:.2f} s; {kept / 1e9:.2f} GB kept for "
            f"the backward pass, {(held + kept) / 1e9:.2f} GB in all"
        )
        if chunk < gpus:
            idle = gpus - chunk
            print(f"    {idle} of {gpus} GPUs have nothing to do; a larger --micro-batch helps")
        if held + kept > options.gpu_memory * 1e9:
            print(
                f"    more than {options.gpu_memory:g} GB: try --gradient-checkpointing, a smaller "
                "--micro-batch, --dit-lora, more GPUs"
            )
    print(
        f"stage {args.stage}: {args.steps} steps of {seconds:.2f} s, "
        f"{args.steps * seconds / 86400:.2f} days with {gpus} GPUs at {options.gpu_tflops:g} "
        "TFLOP/s each"
    )


def main(arguments=None):
    """Prints the plan. Returns 2 after one line where there is none to make."""
    try:
        plan(*parse(arguments))
        return 0
    except (ValueError, OSError) as error:
        print(f"plan.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
