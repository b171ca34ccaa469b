"""A whole weights folder with random models of a few thousand weights, for tests of what joins
them.
"""

import os

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models here are so small that threads only get in each other's way


def tiny_tokenizer():
    """Bytes as tokens, and the special tokens of Qwen2.5-VL."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from mllm import SPECIAL_TOKENS

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    names = ("<|endoftext|>", *SPECIAL_TOKENS)
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in names]
    )
    return tokenizer


def randomize(model, generator):
    """Random weights under which every term matters: none starts at zero, gains stand around 1."""
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_gain = p.ndim == 1 and name.endswith("weight") or name.endswith("gamma")
            p.copy_(
                1 + 0.2 * noise
                if is_gain
                else noise * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
            )
    return model


def make_tiny_weights(folder, trained=True):
    """Writes mllm/, dit/, vae/ and, if `trained`, instructx/ into `folder`, as weights/README.md
    says.
    """
    import dataclasses

    import torch

    import dit
    import mllm
    import vae
    from connector import InstructX

    random, tokenizer = torch.Generator().manual_seed(0), tiny_tokenizer()
    ids = {
        f"{name}_token_id": tokenizer.token_to_id(f"<|{name}_pad|>") for name in ("image", "video")
    }
    qwen = randomize(mllm.Qwen2_5_VL(dataclasses.replace(mllm.PRESETS["tiny"], **ids)), random)
    processor = mllm.Processor(tokenizer, patch_size=8, min_pixels=256, max_pixels=1024)
    wan = randomize(dit.WanDiT(dit.PRESETS["tiny"]), random)
    autoencoder = randomize(vae.WanVAE(vae.PRESETS["tiny"]), random)
    for model, name in ((qwen, "mllm"), (processor, "mllm"), (wan, "dit"), (autoencoder, "vae")):
        model.save_pretrained(folder / name)
    if trained:
        model = InstructX.untrained(
            qwen,
            processor,
            wan,
            autoencoder,
            hidden_dim=48,
            image_queries=4,
            video_queries=6,
            mllm_frames=3,
            lora_rank=2,
            lora_alpha=4.0,
            steps=2,
            guidance=2.0,
            shift=3.0,
        )
        model.dit.add_source_embedding()
        for name, p in model.named_parameters():
            if "lora_" in name or name.startswith("connector."):
                torch.nn.init.normal_(p, std=0.3, generator=random)
        model.save_pretrained(folder / "instructx", dit=True)
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A weights folder with random models.

    Shared by all tests of a run: copy it before changing anything in it.
    """
    return make_tiny_weights(tmp_path_factory.mktemp("tiny") / "weights")
