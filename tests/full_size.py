"""Runs edit.py at full size: random checkpoints in the official layouts, one edit of a photo.

    python tests/full_size.py FOLDER PHOTO --dit 1.3B --size 384x256 --guidance 1 --dtype bfloat16
    python tests/full_size.py FOLDER PHOTO --dit 14B --stored bfloat16 --size 256x256 --offload
    python tests/full_size.py FOLDER PHOTO --dit kiwi --size 512x512 --offload

Shows before tens of gigabytes are downloaded whether this machine carries the edit. FOLDER gets
what the hub would put there, under the same names and, but for --stored, in the same precision:
14 GB with the 1.3B, 65 GB with the 14B, of which bfloat16 saves 2.8 and 28.6; or, with kiwi, the
20 GB of Kiwi-Edit-5B by the lists of its tensors in tests/manifests. Tensors are written
one by one, so this script itself needs little memory. What is there already is used again. All
other options go to edit.py, which prints seconds and memory; give it -o too for a clip. The result
is noise, since random weights edit nothing.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))

from dit import PRESETS, WanDiT
from edit import whole
from mllm import Processor, Qwen2_5_VL, Qwen2_5_VLConfig
from vae import WanVAE

SPECIAL_TOKENS = (  # in the order of their ids
    "endoftext",
    "im_start",
    "im_end",
    "object_ref_start",
    "object_ref_end",
    "box_start",
    "box_end",
    "quad_start",
    "quad_end",
    "vision_start",
    "vision_end",
    "vision_pad",
    "image_pad",
    "video_pad",
)
FIRST_SPECIAL_ID = 151643
WAN_SHARDS = {"1.3B": 1, "14B": 6}
MANIFESTS = Path(__file__).resolve().parent / "manifests"
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def shapes(make):
    """{name: shape} of a model that is never filled."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in make().state_dict().items()}


def random_tensor(name, shape, dtype):
    """Gains are 1, biases 0, and weights keep the size of what passes, so nothing overflows."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if name.endswith("gamma") or len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.randn(shape, dtype=dtype) * math.prod(shape[1:]) ** -0.5


def write_safetensors(file, entries, dtype):
    """save_file for {name: shape}, but with one tensor in memory at a time."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in entries.items():
        end = offset + dtype.itemsize * math.prod(shape)
        tensor_dtype = SAFETENSORS_NAMES[dtype]
        header[name] = {"dtype": tensor_dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with whole(file) as unfinished, unfinished.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name, shape in entries.items():
            out.write(random_tensor(name, shape, dtype).flatten().view(torch.uint8).numpy())
    print(f"{file}   {offset / 1e9:.2f} GB", file=sys.stderr)


def write_shards(folder, stem, entries, dtype, count):
    """One file STEM.safetensors, or `count` shards of about equal size and their index."""
    if count == 1:
        return write_safetensors(folder / f"{stem}.safetensors", entries, dtype)
    total, done, shards = sum(map(math.prod, entries.values())), 0, [{} for _ in range(count)]
    for name, shape in entries.items():
        shards[min(count - 1, done * count // total)][name] = shape
        done += math.prod(shape)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = folder / f"{stem}-{i:05d}-of-{count:05d}.safetensors"
        write_safetensors(file, shard, dtype)
        weight_map |= dict.fromkeys(shard, file.name)
    index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def tokenizer():
    """Bytes, the special tokens under their official ids, and between them words of no text."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"unused {i}": i for i in range(len(vocab), FIRST_SPECIAL_ID)}
    names = [f"<|{name}|>" for name in SPECIAL_TOKENS]
    vocab |= {name: FIRST_SPECIAL_ID + i for i, name in enumerate(names)}
    result = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    special = [AddedToken(name, normalized=False, special=True) for name in names]
    result.add_special_tokens(special)
    return result


def write_mllm(folder):
    """Qwen2.5-VL-3B, as its hub page has it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, "model", shapes(Qwen2_5_VL), torch.bfloat16, 2)
    Processor(tokenizer()).save_pretrained(folder)
    write_config(folder, Qwen2_5_VLConfig().to_dict())


def write_wan(folder, size, dtype):
    """Wan2.1, DiT and VAE, as its hub page has it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, shape in shapes(WanVAE).items():
        tensors[name] = random_tensor(name, shape, torch.float32)
    with whole(folder / "Wan2.1_VAE.pth") as unfinished:
        torch.save(tensors, unfinished)
    preset = PRESETS[size]
    entries = shapes(lambda: WanDiT(preset))
    write_shards(folder, "diffusion_pytorch_model", entries, dtype, WAN_SHARDS[size])
    write_config(
        folder,
        {
            "_class_name": "WanModel",
            "_diffusers_version": "0.30.0",
            "dim": preset.dim,
            "eps": 1e-06,
            "ffn_dim": preset.ffn_dim,
            "freq_dim": 256,
            "in_dim": 16,
            "model_type": "t2v",
            "out_dim": 16,
            "num_heads": preset.num_heads,
            "num_layers": preset.num_layers,
            "text_len": 512,
        },
    )


def released(file, *names):
    """{name: shape} of the tensors in a manifest."""
    entry = json.loads((MANIFESTS / file).read_text())
    for name in names:
        entry = entry[name]
    tensors = dict(entry["tensors"])
    for layer in entry["layers"]:
        for i in range(layer["count"]):
            prefix = layer["prefix"].format(i)
            tensors |= {prefix + name: shape for name, shape in layer["tensors"].items()}
    return tensors


def write_kiwi(folder):
    """Kiwi-Edit-5B, instruct-reference, as its hub page has it."""
    stem, bfloat16 = "diffusion_pytorch_model", torch.bfloat16
    encoder, processor = folder / "mllm_encoder", folder / "processor"
    wan = "wan2.2_ti2v_5b.json"
    parts = {
        "transformer": (released(wan, "dit, diffusers"), bfloat16),
        "vae": (released(wan, "vae, official"), torch.float32),
    }
    for name in ("mllm_encoder", "source_embedder", "ref_embedder"):
        parts[name] = released("kiwi_edit_5b.json", name), bfloat16
    for name, (entries, dtype) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / name / f"{stem}.safetensors", entries, dtype)
    write_shards(encoder, "model", released("qwen2.5_vl_3b.json"), bfloat16, 2)
    Processor(tokenizer()).save_pretrained(processor)
    (processor / "qwen_config.json").write_text(json.dumps(Qwen2_5_VLConfig().to_dict()))
    write_config(
        folder / "transformer",
        {
            "_class_name": "WanTransformer3DModel",
            "attention_head_dim": 128,
            "eps": 1e-06,
            "cross_attn_norm": True,
            "ffn_dim": 14336,
            "freq_dim": 256,
            "in_channels": 48,
            "num_attention_heads": 24,
            "num_layers": 30,
            "out_channels": 48,
            "patch_size": [1, 2, 2],
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": 4096,
        },
    )
    write_config(folder / "vae", {"_class_name": "VAE", "dim": 160, "z_dim": 48})
    for name in ("source_embedder", "ref_embedder"):
        write_config(folder / name, {"in_dim": 48, "dim": 3072, "ref_pad_first": False})
    write_config(
        encoder,
        {
            "_class_name": "MLLMEncoder",
            "dit_dim": 3072,
            "hidden_size": 2048,
            "max_frames": 16,
            "max_pixels_per_frame": 262144,
            "num_image_queries": 256,
            "num_video_queries": 512,
            "num_ref_queries": 768,
        },
    )


def write_config(folder, config):
    """Written last: where it is, the folder is complete."""
    with whole(folder / "config.json") as unfinished:
        unfinished.write_text(json.dumps(config, indent=2))


def main():
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="where the checkpoints go, one folder for each size of the DiT")
    add("photo", type=Path, help="the image to edit")
    choices = "size of Wan2.1's DiT, or Kiwi-Edit-5B (default: 1.3B)"
    add("--dit", choices=(*WAN_SHARDS, "kiwi"), default="1.3B", help=choices)
    stored = "precision of the DiT's file (default: float32, as on the hub)"
    add("--stored", choices=("float32", "bfloat16"), default="float32", help=stored)
    args, others = parser.parse_known_args()
    weights = args.folder
    if args.dit == "kiwi":
        weights = args.folder / "kiwi"
        if not (weights / "mllm_encoder" / "config.json").exists():
            write_kiwi(weights)
    else:
        mllm, wan = weights / "Qwen2.5-VL-3B-Instruct", weights / f"Wan2.1-T2V-{args.dit}"
        if not (mllm / "config.json").exists():
            write_mllm(mllm)
        if not (wan / "config.json").exists():
            write_wan(wan, args.dit, getattr(torch, args.stored))
    command = [sys.executable, TOP / "edit.py", args.photo, "make it night"]
    command += ["-o", args.folder / "result.png", "--weights", weights, "--steps", "2", *others]
    print(*command, file=sys.stderr)
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
