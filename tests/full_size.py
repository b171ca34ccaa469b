"""Runs edit.py at full size: random checkpoints in the official layouts, one edit of a photo, seconds and memory.

    python tests/full_size.py FOLDER PHOTO --dit 1.3B --size 384x256 --guidance 1 --dtype bfloat16
    python tests/full_size.py FOLDER PHOTO --dit 14B --stored bfloat16 --size 256x256 --offload

Shows before tens of gigabytes are downloaded whether this machine carries the edit. FOLDER gets what the hub would put
there, under the same names and, but for --stored, in the same precision: 14 GB with the 1.3B, 65 GB with the 14B, of
which bfloat16 saves 2.8 and 28.6. It is written tensor by tensor, so this script itself needs little memory, and what is there already is used again. All other options go to
edit.py, which prints the table; give it -o too for a clip. The result is noise, since random weights edit nothing.
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
from mllm import Qwen2_5_VL, replace
from vae import WanVAE

# As on the hub: the text fields lie at the top level.
MLLM_CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 128000, "max_window_layers": 70,
    "model_type": "qwen2_5_vl", "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936}
PREPROCESSOR_CONFIG = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
SPECIAL_TOKENS = ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end",
                  "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
FIRST_SPECIAL_ID = 151643
WAN_SHARDS = {"1.3B": 1, "14B": 6}


def shapes(make):
    """{name: shape} of a model that is never filled."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in make().state_dict().items()}


def random_tensor(name, shape, dtype):
    """Gains of 1, biases of 0 and weights that keep the size of what goes through, so that nothing overflows."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if name.endswith("gamma") or len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.randn(shape, dtype=dtype) * math.prod(shape[1:]) ** -0.5


def write_safetensors(file, entries, dtype):
    """save_file for {name: shape}, but with one tensor in memory at a time."""
    size, header, offset = dtype.itemsize, {"__metadata__": {"format": "pt"}}, 0
    for name, shape in entries.items():
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype], "shape": shape,
                        "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)

    def write(partial):
        with partial.open("wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            for name, shape in entries.items():
                out.write(random_tensor(name, shape, dtype).view(torch.uint8).flatten().numpy())
    replace(file, write)
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
    replace(folder / f"{stem}.safetensors.index.json", lambda file: file.write_text(json.dumps(index, indent=2)))


def write_tokenizer(file):
    """Bytes as tokens, and the special tokens under their official ids; in between, words that no text has."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"unused {i}": i for i in range(len(vocab), FIRST_SPECIAL_ID)}
    names = [f"<|{name}|>" for name in SPECIAL_TOKENS]
    vocab |= {name: FIRST_SPECIAL_ID + i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    tokenizer.save(str(file))


def write_mllm(folder):
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, "model", shapes(Qwen2_5_VL), torch.bfloat16, 2)
    write_tokenizer(folder / "tokenizer.json")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR_CONFIG, indent=2))
    (folder / "config.json").write_text(json.dumps(MLLM_CONFIG, indent=2))


def write_wan(folder, size, dtype):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: random_tensor(name, shape, torch.float32) for name, shape in shapes(WanVAE).items()}
    replace(folder / "Wan2.1_VAE.pth", lambda file: torch.save(tensors, file))
    write_shards(folder, "diffusion_pytorch_model", shapes(lambda: WanDiT(PRESETS[size])), dtype,
                 WAN_SHARDS[size])
    preset = PRESETS[size]
    config = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": preset.dim, "eps": 1e-06,
              "ffn_dim": preset.ffn_dim, "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "out_dim": 16,
              "num_heads": preset.num_heads, "num_layers": preset.num_layers, "text_len": 512}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoints go, one folder for each size of the DiT")
    parser.add_argument("photo", type=Path, help="the image to edit")
    parser.add_argument("--dit", choices=WAN_SHARDS, default="1.3B", help="size of the DiT (default: 1.3B)")
    parser.add_argument("--stored", choices=("float32", "bfloat16"), default="float32",
                        help="precision of the DiT's file (default: float32, as on the hub)")
    args, others = parser.parse_known_args()
    for name, write in (("Qwen2.5-VL-3B-Instruct", write_mllm),
                        (f"Wan2.1-T2V-{args.dit}", lambda folder: write_wan(folder, args.dit, getattr(torch, args.stored)))):
        if not (args.folder / name / "config.json").exists():       # written last: with it, the folder is whole
            write(args.folder / name)
    command = [sys.executable, TOP / "edit.py", args.photo, "make it night", "-o", args.folder / "result.png",
               "--weights", args.folder, "--steps", "2", *others]
    print(*command, file=sys.stderr)
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
