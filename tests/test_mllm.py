"""mllm.py against the release of Qwen2.5-VL (transformers 4.49) and PEFT, tiny random weights."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

import mllm
from connector import recompute_blocks
from mllm import (
    PRESETS,
    SPECIAL_TOKENS,
    LoRALinear,
    Processor,
    Qwen2_5_VL,
    Qwen2_5_VLConfig,
    add_lora,
    left_padding_mask,
    load_lora,
    lora_layers,
    lora_state_dict,
    mrope_positions,
    smart_resize,
)

TINY = dataclasses.replace(PRESETS["tiny"], vision_start_token_id=503, vision_end_token_id=504)
MANIFEST = json.loads((Path(__file__).parent / "manifests" / "qwen2.5_vl_3b.json").read_text())
# The official chat template, as far as our prompts use it.
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}<|im_end|>\n{% else %}"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randomize(model, seed=0):
    """Random weights under which every term matters: gains not 1, biases not 0, sharp attention."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * (1.0 if "embed_tokens" in name else 1.3 / math.sqrt(p[0].numel())))
            else:
                p.copy_(noise * 0.3 + ("norm" in name or "ln_q" in name))
    return model.eval()


def reference(model):
    """The release with the same weights. Eager attention, so that SDPA is checked too."""
    hf = pytest.importorskip("transformers")
    if hf.__version__ != "4.49.0":
        pytest.skip("later versions place text after a clip elsewhere; 4.49.0 is the release")
    config = hf.Qwen2_5_VLConfig(**model.config.to_dict())
    make = hf.Qwen2_5_VLForConditionalGeneration._from_config
    theirs = make(config, attn_implementation="eager").eval()
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    tied = model.config.tie_word_embeddings
    assert not unexpected and missing == (["lm_head.weight"] if tied else [])
    return theirs


def error(a, b):
    assert a.shape == b.shape and torch.isfinite(a).all()
    return ((a - b).norm() / b.norm()).item()


def patches(grids, seed=0):
    number = sum(t * h * w for t, h, w in grids)
    return torch.randn(number, 3 * 2 * 8 * 8, generator=seeded(seed))


def prompt(*items):
    """Inputs as of a processor.

    Ints are text tokens; ("image" or "video", (t, h, w), seconds of a video) is a picture.
    """
    ids, pictures = [], {"image": [], "video": []}
    for item in items:
        if isinstance(item, int):
            ids.append(item)
            continue
        kind, (t, h, w), *_ = item
        token = TINY.image_token_id if kind == "image" else TINY.video_token_id
        ids += [TINY.vision_start_token_id, *[token] * (t * h * w // 4), TINY.vision_end_token_id]
        pictures[kind].append(item[1:])
    inputs = {"input_ids": torch.tensor([ids])}
    if pictures["image"]:
        grids = [grid for grid, in pictures["image"]]
        inputs |= {"pixel_values": patches(grids), "image_grid_thw": torch.tensor(grids)}
    if pictures["video"]:
        grids = [grid for grid, _ in pictures["video"]]
        seconds = torch.tensor([seconds for _, seconds in pictures["video"]])
        inputs |= {"pixel_values_videos": patches(grids, 1), "video_grid_thw": torch.tensor(grids),
                   "second_per_grid_ts": seconds}
    return inputs


GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
PROMPTS = {
    "text": (1, 2, 3, 4, 5, 6, 7),
    "image": (1, 2, ("image", (1, 4, 4)), 3, 4),
    "one window": (1, ("image", (1, 2, 2)), 3),
    "ragged": (1, 2, 3, ("image", (1, 6, 10)), 3, 4),
    "several": (("image", (1, 14, 6)), 9, ("image", (1, 4, 4)), ("image", (1, 2, 10)), 8, 7),
    "clip": (1, 2, ("video", (5, 6, 4), 0.35), 3, 4),
    "clip and references": (
        1, ("video", (3, 4, 10), 2 / 3), ("image", (1, 6, 6)), ("image", (1, 4, 4)), 3, 4, 5),
    "two clips": (
        ("video", (2, 4, 4), 0.7), 5, ("video", (4, 2, 6), 1.3), ("image", (1, 4, 2)), 6),
}


def collate(*names):
    return Processor.collate(SimpleNamespace(pad_id=0), [prompt(*PROMPTS[name]) for name in names])


@pytest.fixture(scope="module")
def model():
    return randomize(Qwen2_5_VL(TINY))


@pytest.fixture(scope="module")
def theirs(model):
    return reference(model)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE with Qwen's pre-tokeniser, trained on a few words."""
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    words = "You are a helpful assistant. system user assistant make the sky blue, remove the dog"
    tokenizer.train_from_iterator([words] * 3, trainer)
    names = ("<|endoftext|>", *SPECIAL_TOKENS)
    special = [AddedToken(name, normalized=False, special=True) for name in names]
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, patch_size=8, min_pixels=256, max_pixels=4096)


@pytest.fixture(scope="module")
def speaker(tokenizer):
    """A model whose ids are the tokenizer's."""
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    config = dataclasses.replace(
        TINY, vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=False,
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"])
    return randomize(Qwen2_5_VL(config), 3)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# Against the release.


@pytest.mark.parametrize("name", PROMPTS)
def test_hidden_states_and_logits_equal_the_release(name, model, theirs):
    """Any slip in windows, rope, positions, norms, GQA or merging ends here."""
    inputs = prompt(*PROMPTS[name])
    with torch.no_grad():
        hidden = model(**inputs)
        expected = theirs(**inputs, output_hidden_states=True)
    assert error(hidden, expected.hidden_states[-1]) < 2e-5
    assert error(model.lm_head(hidden), expected.logits) < 2e-5


def test_untied_head_and_other_sizes_equal_the_release():
    """Sizes taken from elsewhere than the config: window, heads, eps, theta, sections, own head."""
    vision = dataclasses.replace(
        TINY.vision_config, num_heads=4, window_size=48, depth=3, fullatt_block_indexes=(2,),
        out_hidden_size=96, tokens_per_second=5)
    config = dataclasses.replace(
        TINY, hidden_size=96, num_attention_heads=6, num_key_value_heads=3,
        mrope_section=(4, 1, 3), rope_theta=1e4, rms_norm_eps=1e-2, tie_word_embeddings=False,
        vision_config=vision)
    model = randomize(Qwen2_5_VL(config), 1)
    theirs = reference(model)
    inputs = prompt(1, ("video", (3, 8, 14), 0.45), ("image", (1, 10, 6)), 2)
    with torch.no_grad():
        hidden, expected = model(**inputs), theirs(**inputs, output_hidden_states=True)
    assert error(hidden, expected.hidden_states[-1]) < 2e-5
    assert error(model.lm_head(hidden), expected.logits) < 2e-5


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", ["text", "ragged", "clip and references"])
def test_queries_are_text_after_the_last_token(name, batched, model, theirs):
    """Queries must take the positions of Q more text tokens, and nobody before may see them."""
    inputs, count = prompt(*PROMPTS[name]), 5
    queries = torch.randn(count, TINY.hidden_size, generator=seeded(2))
    longer = F.pad(inputs["input_ids"], (0, count), value=1)
    positions, _ = theirs.get_rope_index(longer, **{key: inputs.get(key) for key in GRIDS})
    with torch.no_grad():
        x = theirs.model.embed_tokens(inputs["input_ids"])
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels in inputs:
                seen = theirs.visual(inputs[pixels], grid_thw=inputs[f"{kind}_grid_thw"])
                where = inputs["input_ids"] == getattr(TINY, f"{kind}_token_id")
                x = x.masked_scatter(where[..., None], seen)
        x = torch.cat([x, queries[None]], dim=1)
        expected = theirs.model(inputs_embeds=x, position_ids=positions).last_hidden_state
        hidden = model(**inputs, queries=queries[None] if batched else queries)
        plain = model(**inputs)
    assert error(hidden, expected) < 2e-5
    assert error(hidden[:, :-count], plain) < 1e-6


def test_gradients_reach_the_queries_with_and_without_recomputation():
    """Queries train through a frozen model; recomputing must not change a gradient."""
    model, gradients = randomize(Qwen2_5_VL(TINY)).requires_grad_(False), []
    for recompute in (False, True):
        if recompute:
            recompute_blocks(model.model.layers)
        queries = torch.randn(3, TINY.hidden_size, generator=seeded(2)).requires_grad_()
        hidden = model(**prompt(*PROMPTS["image"]), queries=queries)
        hidden[:, -3:].square().sum().backward()
        gradients.append(queries.grad)
    assert gradients[0].norm() > 0 and torch.equal(*gradients)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("seconds", [1.0, 0.125, 0.35, 0.5, 2 / 3, 0.7, 1.3, 0.29])
def test_positions_equal_the_release(name, seconds, model, theirs):
    """4.56 truncates fractions of seconds, 5.x forgets time after a clip: queries would move."""
    inputs = prompt(*PROMPTS[name])
    grids = {key: inputs.get(key) for key in GRIDS[:2]}
    if grids["video_grid_thw"] is not None:
        grids["second_per_grid_ts"] = [seconds] * len(grids["video_grid_thw"])
    expected, _ = theirs.get_rope_index(inputs["input_ids"], **grids)
    assert torch.equal(model.positions(inputs["input_ids"], **grids), expected)


def test_positions_by_hand():
    """The rule itself: a clip of 3 frames 0.75 s apart at 2 steps a second, then text."""
    ids = [1, 2, *[TINY.video_token_id] * 6, 3, 4]
    positions = mrope_positions(ids, iter([]), iter([(3, 2, 1, 0.75)]), TINY)
    assert positions.tolist() == [[0, 1, 2, 2, 3, 3, 5, 5, 6, 7],
                                  [0, 1, 2, 3, 2, 3, 2, 3, 6, 7],
                                  [0, 1, 2, 2, 2, 2, 2, 2, 6, 7]]


def test_long_clips_keep_the_rounding_of_the_release(model, theirs):
    """floor() of a product that is nearly whole: float64 and float32 disagree on some frames."""
    seconds = [0.29, 0.57, 1.15, 0.1, 2.3 / 7]
    inputs = prompt(*(("video", (120, 2, 2), s) for s in seconds))
    ids, grids = inputs["input_ids"], inputs["video_grid_thw"]
    expected, _ = theirs.get_rope_index(ids, None, grids, seconds)
    assert torch.equal(model.positions(ids, None, None, grids, torch.tensor(seconds)), expected)


# Batches.


@pytest.mark.parametrize("count", [0, 4])
def test_left_padding_changes_nothing_real(count, model):
    """Each row of a batch must be what it is alone: padding may leak by mask, position or NaN."""
    names = ("text", "clip and references", "several")
    batch, rows = collate(*names), [prompt(*PROMPTS[name]) for name in names]
    queries = torch.randn(3, count, TINY.hidden_size, generator=seeded(1)) if count else None
    with torch.no_grad():
        together = model(**batch, queries=queries)
        for b, row in enumerate(rows):
            alone = model(**row, queries=queries[b:b + 1] if count else None)
            assert error(together[b:b + 1, -alone.shape[1]:], alone) < 2e-6
    assert batch["attention_mask"].sum(1).tolist() == [row["input_ids"].shape[1] for row in rows]
    assert torch.isfinite(together).all()


def test_padded_batch_trains(model):
    """A row of padding that sees nothing makes NaN gradients even where its output is ignored."""
    queries = torch.zeros(2, TINY.hidden_size, requires_grad=True)
    model(**collate("text", "image"), queries=queries)[:, -2:].sum().backward()
    assert torch.isfinite(queries.grad).all() and queries.grad.norm() > 0
    model.zero_grad()


def test_padding_sees_itself():
    """A token that sees nothing is NaN in some kernels, and NaN times 0 reaches the real ones."""
    like = torch.empty(0, dtype=torch.float16)
    mask = left_padding_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), 1, like)
    assert mask.dtype == like.dtype and mask.stride(2) == 8
    assert {*mask.unique().tolist()} == {0, -math.inf}
    mask = mask == 0
    assert mask.shape == (2, 1, 5, 5) and mask.any(dim=-1).all()
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert torch.equal(mask[1, 0], torch.ones(5, 5).tril().bool())
    assert left_padding_mask(torch.ones(2, 4), 1, like) is None


def test_positions_of_padded_rows_equal_the_release(model, theirs):
    """Attention sees differences of positions only, so a shifted row passes every other test."""
    batch = collate("clip", "several")
    grids = {key: batch[key] for key in GRIDS}
    mask, ids = batch["attention_mask"], batch["input_ids"]
    expected, _ = theirs.get_rope_index(ids, **grids, attention_mask=mask)
    positions, real = model.positions(ids, mask, **grids), mask.bool()
    assert not real.all() and torch.equal(positions[:, real], expected[:, real])


def test_right_padding_is_refused(model):
    """Queries behind the padding would be far from their prompt, silently."""
    for mask in ([1, 1, 0], [1, 0, 1]):
        with pytest.raises(ValueError, match="left"):
            model(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([mask]))


# The vision tower.


def test_full_attention_is_full_per_frame_only(model):
    """No frame may see another: full attention over a whole clip looks plausible and is wrong."""
    tower, pixels = model.visual, patches([(3, 8, 8)])
    changed = pixels.clone()
    changed[64:128] += 1  # the second frame
    with torch.no_grad():
        before, after = (tower(p, [(3, 8, 8)]).unflatten(0, (3, 16)) for p in (pixels, changed))
    assert torch.allclose(before[[0, 2]], after[[0, 2]], atol=1e-6)
    assert ((before[1] - after[1]).norm(dim=-1) > 1e-3).all()  # every token of the second changes


def test_windows_do_not_see_each_other_but_full_blocks_do():
    """Window attention that is full attention, or the reverse, passes tests on a single window."""
    pixels, grid = patches([(1, 8, 12)]), [(1, 8, 12)]
    changed = pixels.clone()
    changed[:4] += 1  # the first merged patch of the first window
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[:2, :2] = True  # windows of 32 px: 2 x 2 merged patches
    for full, others in (((), False), ((1,), True)):
        vision = dataclasses.replace(TINY.vision_config, fullatt_block_indexes=full)
        tower = randomize(Qwen2_5_VL(dataclasses.replace(TINY, vision_config=vision))).visual
        with torch.no_grad():
            change = (tower(pixels, grid) - tower(changed, grid)).norm(dim=-1).view(4, 6)
        moved = change > 1e-5
        assert moved[inside].all()
        assert moved[~inside].all() == others and moved[~inside].any() == others


# Numbers.


def test_norms_and_rope_compute_in_float32():
    """In bfloat16 both lose digits that the release keeps; end to end other roundings hide it."""
    x = torch.randn(4, 5, 3, 64, generator=seeded(0)).bfloat16()
    norm = mllm.RMSNorm(64).bfloat16()
    norm.weight.data = torch.linspace(0.5, 2, 64).bfloat16()
    exact = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), exact.bfloat16() * norm.weight)
    angles = torch.linspace(0, 500, 32)
    cos, sin = angles.cos(), angles.sin()
    assert torch.equal(mllm.rotate(x, cos, sin), mllm.rotate(x.float(), cos, sin).bfloat16())


def test_bfloat16_stays_close_and_bfloat16(model):
    """A tensor left in float32 fails on the GPU only, where matrix products refuse to mix."""
    half = Qwen2_5_VL(TINY)
    half.load_state_dict(model.state_dict())
    half = half.bfloat16()
    inputs = prompt(*PROMPTS["clip and references"])
    inputs["queries"] = torch.ones(2, TINY.hidden_size)
    with torch.no_grad():
        out, expected = half(**inputs), model(**inputs)
    assert out.dtype == torch.bfloat16 and error(out.float(), expected) < 0.05


def test_a_fresh_model_starts_as_the_family_does():
    """Training from nothing: PyTorch's defaults are wide for embeddings, and biases are not 0."""
    torch.manual_seed(0)
    model = Qwen2_5_VL(TINY).initialize()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.full_like(p, "norm" in name or "ln_q" in name)), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
    with torch.no_grad():
        assert torch.isfinite(model(**prompt(*PROMPTS["clip and references"]))).all()


# Answers in words.


@pytest.mark.parametrize("name", ["text", "clip and references", "several"])
def test_answers_equal_the_release_and_the_uncached(name):
    """A cache with wrong positions after pictures is right for one token only.

    (A tied random model only echoes, so the head is untied.)
    """
    model = randomize(Qwen2_5_VL(dataclasses.replace(TINY, tie_word_embeddings=False)))
    theirs, inputs = reference(model), prompt(*PROMPTS[name])
    decoder = SimpleNamespace(decode=lambda ids, skip_special_tokens: ids)  # no words, ids
    ids = model.generate(inputs, SimpleNamespace(stop_ids=set(), tokenizer=decoder), 12)
    expected = theirs.generate(
        **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=12,
        do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids == expected[0, -12:].tolist() and len(set(ids)) > 3
    again = dict(inputs)
    for token in ids[:5]:
        with torch.no_grad():
            assert int(model.lm_head(model(**again)[0, -1]).argmax()) == token
        again["input_ids"] = F.pad(again["input_ids"], (0, 1), value=token)


def test_cached_hidden_states_equal_uncached(model):
    """Equal tokens may hide unequal states."""
    ids = torch.tensor([[5, 9, 2, 7, 4, 11]])
    positions, cache = torch.arange(6).expand(3, 1, 6), {}
    with torch.no_grad():
        x = model.model.embed_tokens(ids)
        whole = model.model(x, positions)
        steps = []
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
            steps.append(model.model(x[:, start:end], positions[..., start:end], cache=cache))
    assert error(torch.cat(steps, dim=1), whole) < 2e-6


def test_generate_stops_and_answers_in_words(speaker, processor):
    """The end of a turn must stop it, unprinted; padding must not change the answer."""
    inputs = processor("make the sky blue", image=noise(40, 56, 3))
    words = [speaker.generate(inputs, processor, count) for count in range(9)]
    assert words[0] == "" and words[8].startswith(words[4]) and len(words[8]) > len(words[4]) > 0
    ids = []  # the answer, token by token
    again = dict(inputs)
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(speaker.lm_head(speaker(**again)[0, -1]).argmax()))
        again["input_ids"] = F.pad(again["input_ids"], (0, 1), value=ids[-1])
    assert words[8] == processor.tokenizer.decode(ids)
    ends = SimpleNamespace(stop_ids={ids[3]}, tokenizer=processor.tokenizer)
    assert speaker.generate(inputs, ends, 8) == processor.tokenizer.decode(ids[:ids.index(ids[3])])
    other = processor("make the sky blue, remove the dog", image=noise(64, 64, 3))
    batch = processor.collate([inputs, other])
    first = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    assert first["attention_mask"][0, 0] == 0
    assert speaker.generate({**inputs, **first}, processor, 8) == words[8]
    with pytest.raises(ValueError, match="one prompt"):
        speaker.generate(batch, processor, 8)


def test_pictures_that_do_not_fit_are_named(model):
    """Features must never be spread over the wrong tokens."""
    inputs = prompt(*PROMPTS["image"])
    for change in (
            {"image_grid_thw": torch.tensor([[1, 4, 6]])},
            {"pixel_values": inputs["pixel_values"][:-4]},
            {"pixel_values": inputs["pixel_values"][:, :-1]},
            {"pixel_values": None},
            {"pixel_values": None, "image_grid_thw": None},
            {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 2]])}):
        with pytest.raises(ValueError, match="token|patches"):
            model(**{**inputs, **change})
    with pytest.raises(ValueError, match="second_per_grid_ts"):
        model(**{**prompt(*PROMPTS["clip"]), "second_per_grid_ts": [0.5, 0.5]})


# Files.


def test_3b_has_exactly_the_tensors_of_the_release():
    """One renamed tensor, and no checkpoint of the hub loads."""
    expected = dict(MANIFEST["tensors"])
    for layer in MANIFEST["layers"]:
        for i in range(layer["count"]):
            prefix = layer["prefix"].format(i)
            expected |= {prefix + name: shape for name, shape in layer["tensors"].items()}
    with torch.device("meta"):
        model = Qwen2_5_VL()
    shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
    assert shapes == expected
    assert sum(math.prod(shape) for shape in shapes.values()) == MANIFEST["parameters"]


def newer(name):
    """The name that transformers 4.52 and later give a tensor."""
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return name


def shard(folder, tensors):
    names, weight_map = sorted(tensors), {}
    for i in (1, 2):
        file = f"model-0000{i}-of-00002.safetensors"
        half = {name: tensors[name] for name in names[i - 1::2]}
        save_file(half, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_equals_loaded(tied, tmp_path):
    """Also by the release itself, which reads the folder we write."""
    model = randomize(Qwen2_5_VL(dataclasses.replace(TINY, tie_word_embeddings=tied))).bfloat16()
    model.save_pretrained(tmp_path)
    read = Qwen2_5_VL.from_pretrained(tmp_path)
    assert same(model, read) and read.config == model.config and not read.training
    assert same(model, Qwen2_5_VL.from_pretrained(tmp_path / "model.safetensors"))
    assert same(Qwen2_5_VL.from_pretrained(tmp_path, dtype=torch.float32).bfloat16(), model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    hf = pytest.importorskip("transformers")
    load = hf.Qwen2_5_VLForConditionalGeneration.from_pretrained
    theirs = load(tmp_path, torch_dtype=torch.float32).eval()
    inputs, read = prompt(*PROMPTS["clip"]), read.float()
    with torch.no_grad():
        assert error(read.lm_head(read(**inputs)), theirs(**inputs).logits) < 2e-5


def test_loading_without_blocks_leaves_their_weights_in_the_file(tmp_path, model):
    """Offloading starts there: blocks that were read first would take the memory it is to save."""
    model.save_pretrained(tmp_path)
    read = Qwen2_5_VL.from_pretrained(tmp_path, dtype=torch.bfloat16, blocks=False)
    for name, tensor in read.state_dict().items():
        assert tensor.is_meta == (".blocks." in name or ".layers." in name), name


@pytest.mark.parametrize("names", ["official", "newer"])
@pytest.mark.parametrize("sharded", [False, True])
def test_both_layouts_load(names, sharded, tmp_path, model):
    """Renamed tensors that are ignored leave a random tower: the commonest bug of its kind."""
    tensors, config = model.state_dict(), TINY.to_dict()
    if names == "newer":
        tensors, config = {newer(name): t for name, t in tensors.items()}, nested(TINY)
    shard(tmp_path, tensors) if sharded else save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = Qwen2_5_VL.from_pretrained(tmp_path)
    assert same(model, read) and read.config == TINY
    with torch.no_grad():
        assert torch.equal(read(**prompt(*PROMPTS["clip"])), model(**prompt(*PROMPTS["clip"])))


def nested(config):
    """As transformers 5.23 writes it: text fields and rope have dicts of their own."""
    flat = config.to_dict()
    vision = {**flat.pop("vision_config"), "hidden_act": "silu", "in_chans": 3,
              "model_type": "qwen2_5_vl_vision", "spatial_patch_size": 14,
              "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}}
    rope = {"rope_type": "default", "rope_theta": flat.pop("rope_theta"), **flat["rope_scaling"]}
    text = {"hidden_act": flat.pop("hidden_act"), "model_type": "qwen2_5_vl_text",
            "layer_types": ["full_attention"], "pad_token_id": None, "sliding_window": None,
            "rope_parameters": rope, "use_sliding_window": False}
    del flat["rope_scaling"]
    for field in dataclasses.fields(config):
        if field.name in flat and "token_id" not in field.name and "tie" not in field.name:
            text[field.name] = flat.pop(field.name)
    return {**flat, "dtype": "bfloat16", "text_config": text, "vision_config": vision,
            "transformers_version": "5.23.0"}


def test_config_layouts():
    """The hub's own config.json (3B), the nested one, and the defaults must be the same model."""
    vision = {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2}
    hub = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
        "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 128000,
        "max_window_layers": 70, "model_type": "qwen2_5_vl", "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "vision_config": vision, "vocab_size": 151936}
    read = Qwen2_5_VLConfig.from_dict
    assert read(hub) == Qwen2_5_VLConfig() == PRESETS["3B"]
    for config in PRESETS.values():
        assert read(json.loads(json.dumps(nested(config)))) == config
        assert read(json.loads(json.dumps(config.to_dict()))) == config
    other = read({**hub, "rms_norm_eps": 1e-5, "rope_theta": 2e6, "video_token_id": 7})
    assert (other.rms_norm_eps, other.rope_theta, other.video_token_id) == (1e-5, 2e6, 7)


@pytest.mark.parametrize("change, named", [
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn"),
    ({"use_sliding_window": True}, "sliding"),
    ({"rope_scaling": {"mrope_section": [1, 1, 1]}}, "mrope_section"),
    ({"num_key_value_heads": 3}, "k_proj"),
    ({"vision_config": {"out_hidden_size": 5}}, "merger"),
    ({"vision_config": {"patch_size": 16}}, "patch_embed"),
    ({"vision_config": {"window_size": 8}}, "window_size"),
    ({"vision_config": {"num_heads": 7}}, "num_heads"),
    ({"vision_config": {"num_heads": 0}}, "num_heads"),
    ({"vision_config": {"depth": "deep"}}, "depth"),
    ({"num_hidden_layers": 10**9}, "layers"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"hidden_size": "wide"}, "config.json"),
    ({"vision_config": "big"}, "config.json"),
])
def test_config_of_another_model_is_refused(change, named, tmp_path, model):
    """A setting that does not fit the weights must not end in a traceback, nor in noise."""
    model.save_pretrained(tmp_path)
    config = TINY.to_dict()
    if isinstance(change.get("vision_config"), dict):
        change = {"vision_config": {**config["vision_config"], **change["vision_config"]}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=named) as caught:
        Qwen2_5_VL.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_checkpoints_are_named(tmp_path, model):
    """Missing, left over, misshaped, truncated, absent: one line that says which."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    renamed = {**tensors, "visual.extra": torch.zeros(1), "model.norm.weight": torch.zeros(7)}
    del renamed["visual.merger.ln_q.weight"]
    save_file(renamed, file)
    with pytest.raises(ValueError) as caught:
        Qwen2_5_VL.from_pretrained(tmp_path)
    text = str(caught.value)
    for name in ("visual.merger.ln_q.weight", "visual.extra", "model.norm.weight", str(tmp_path)):
        assert name in text
    assert "\n" not in text
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        Qwen2_5_VL.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds 0 .safetensors"):
        Qwen2_5_VL.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Qwen2_5_VL.from_pretrained(tmp_path / "nowhere")
    shard(tmp_path, tensors)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.*index.json names it"):
        Qwen2_5_VL.from_pretrained(tmp_path)
    shard(tmp_path, tensors)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not a JSON"):
        Qwen2_5_VL.from_pretrained(tmp_path)


def test_a_second_copy_of_the_tied_head_is_dropped_but_not_another_head(tmp_path, model):
    """Some exports store a tied head twice; another head under a tied config is another model."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert same(model, Qwen2_5_VL.from_pretrained(tmp_path))
    save_file({**tensors, "lm_head.weight": torch.zeros(512, 64)}, file)
    with pytest.raises(ValueError, match="lm_head.weight"):
        Qwen2_5_VL.from_pretrained(tmp_path)


# LoRA.


def with_lora(seed=5, **options):
    """A tiny model whose LoRA does something: B away from zero."""
    model, generator = randomize(Qwen2_5_VL(TINY)), seeded(seed)
    add_lora(model, **options)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    return model


def test_fresh_lora_changes_nothing_and_trains_alone(model):
    """B must start at zero; all else must be frozen, or the optimizer takes 3.7B parameters."""
    fresh, inputs = randomize(Qwen2_5_VL(TINY)), prompt(*PROMPTS["image"])
    add_lora(fresh, rank=4, alpha=8)
    with torch.no_grad():
        assert torch.equal(fresh(**inputs), model(**inputs))
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {name.removeprefix("base_model.model.") for name in lora_state_dict(fresh)}
    assert len(trained) == 2 * 7 * TINY.num_hidden_layers
    assert not any("visual" in name for name in trained)
    assert all(layer.lora_A.weight.std() > 0 for _, layer in lora_layers(fresh))
    fresh(**inputs).square().sum().backward()
    assert all(layer.lora_B.weight.grad.norm() > 0 for _, layer in lora_layers(fresh))


def test_merged_layers_compute_the_same():
    """Scale alpha / rank forgotten on one side is the classic."""
    model, inputs = with_lora(rank=4, alpha=12), prompt(*PROMPTS["clip and references"])
    with torch.no_grad():
        before = model(**inputs)
        with pytest.raises(ValueError, match="LoRA"):
            model.save_pretrained("never-written")
        for name, layer in lora_layers(model):
            model.set_submodule(name, layer.merged())
        assert error(model(**inputs), before) < 2e-5
        assert error(randomize(Qwen2_5_VL(TINY))(**inputs), before) > 1e-2
    assert set(model.state_dict()) == set(Qwen2_5_VL(TINY).state_dict())
    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())


def test_lora_saved_equals_loaded():
    """Under either layout's names; whatever does not fit is an error, not ignored."""
    model, inputs = with_lora(rank=4, alpha=8), prompt(*PROMPTS["clip"])
    stored, prefix = lora_state_dict(model), "base_model.model."
    renamed = {prefix + newer(name.removeprefix(prefix)): t for name, t in stored.items()}
    for tensors in (stored, renamed):
        fresh = randomize(Qwen2_5_VL(TINY))
        with pytest.raises(ValueError, match="does not fit"):
            load_lora(fresh, tensors)
        add_lora(fresh, 4, 8)
        load_lora(fresh, tensors)
        with torch.no_grad():
            assert torch.equal(fresh(**inputs), model(**inputs))
        assert all(p.requires_grad == (".lora_" in name) for name, p in fresh.named_parameters())
    first = next(iter(stored))
    without_first = {name: t for name, t in stored.items() if name != first}
    own_name = first.removeprefix(prefix)
    for tensors, name in (({**stored, "x": stored[first]}, "x is"),
                          ({**stored, first: torch.zeros(1)}, own_name), (without_first, own_name)):
        with pytest.raises(ValueError, match=name):
            load_lora(fresh, tensors)


def test_lora_that_cannot_be_added_is_refused():
    """Of rank 0 it would train nothing, and a second one would hide the first."""
    model = randomize(Qwen2_5_VL(TINY))
    with pytest.raises(ValueError, match="rank is 1 or more"):
        add_lora(model, rank=0)
    add_lora(model, rank=1)
    with pytest.raises(ValueError, match="no LoRA yet"):
        add_lora(model)


def test_lora_over_bfloat16_trains_in_float32():
    """Steps of 1e-5 on bfloat16 weights are rounded away: training would stand still unnoticed."""
    model = randomize(Qwen2_5_VL(TINY)).bfloat16()
    add_lora(model, rank=4, alpha=8)
    assert {t.dtype for t in lora_state_dict(model).values()} == {torch.float32}
    assert model(**prompt(*PROMPTS["image"])).dtype == torch.bfloat16
    assert {layer.merged().weight.dtype for _, layer in lora_layers(model)} == {torch.bfloat16}


def test_lora_equals_peft(tmp_path):
    """PEFT must read our tensors and compute the same; its own names must be ours."""
    peft = pytest.importorskip("peft")
    model, inputs = with_lora(rank=4, alpha=6), prompt(*PROMPTS["clip and references"])
    names = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    layers = r".*layers\.\d+\..*(" + "|".join(names) + ")"  # not those of the vision tower
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=layers)
    adapted = peft.get_peft_model(reference(randomize(Qwen2_5_VL(TINY))), config).eval()
    ours = lora_state_dict(model)
    result = peft.set_peft_model_state_dict(adapted, ours)
    assert not result.unexpected_keys
    with torch.no_grad():
        expected = adapted(**inputs, output_hidden_states=True).hidden_states[-1]
        assert error(model(**inputs), expected) < 2e-5
    adapted.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


# The processor.


def official(processor):
    """The release's processor with our tokenizer and settings, and its slow image processor."""
    hf = pytest.importorskip("transformers")
    fast = hf.Qwen2TokenizerFast(tokenizer_object=processor.tokenizer)
    names = ("min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size")
    images = hf.Qwen2VLImageProcessor(**{name: getattr(processor, name) for name in names})
    return hf.Qwen2_5_VLProcessor(images, fast, chat_template=TEMPLATE)


CASES = {
    "text": {},
    "system": {"system": "Describe the edit."},
    "image": {"image": noise(50, 70, 3)},
    "large": {"image": noise(300, 210, 3)},
    "small": {"image": noise(17, 20, 3)},
    "narrow": {"image": noise(16, 200, 3)},
    "image and references": {
        "image": noise(64, 48, 3), "references": [noise(33, 90, 3, seed=1), noise(40, 40, 3)]},
    "clip": {"video": noise(4, 40, 60, 3), "fps": 3.0},
    "odd clip and reference": {
        "video": noise(13, 48, 32, 3), "fps": 0.7, "references": [noise(80, 20, 3)],
        "system": "Look."},
    "one frame": {"video": noise(1, 32, 48, 3)},
}


@pytest.mark.parametrize("name", CASES)
def test_processor_equals_the_release(name, processor):
    """Ids, pixels, grids and seconds, bit by bit: half a pixel more is input Qwen never saw."""
    case, hf = CASES[name], official(processor)
    words = " Make the sky blue\n\nplease, it's 12 o'clock… ünïcode 東京 "
    pictures = ([case["image"]] if "image" in case else []) + list(case.get("references", ()))
    content = [{"type": "text", "text": words}] + [{"type": "video"}] * ("video" in case)
    messages = [{"role": "user", "content": content + [{"type": "image"}] * len(pictures)}]
    if "system" in case:
        messages.insert(0, {"role": "system", "content": case["system"]})
    text = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [Image.fromarray(picture) for picture in pictures] or None
    videos = [[Image.fromarray(frame) for frame in case["video"]]] if "video" in case else None
    expected = hf(text=[text], images=images, videos=videos, fps=case.get("fps", 2.0),
                  return_tensors="pt")
    expected.pop("attention_mask")
    inputs = processor(words, **case)
    assert inputs.keys() == expected.keys()
    for key, value in expected.items():
        value = torch.as_tensor(value)
        assert torch.equal(inputs[key].to(value.dtype), value), key
        expected_dtype = torch.float32 if value.is_floating_point() else torch.int64
        assert inputs[key].dtype == expected_dtype, key


CHATS = {
    "pictures first": [noise(50, 70, 3), noise(33, 90, 3, seed=1), "Which is better?"],
    "words between": ["one ", noise(300, 210, 3), "\ntwo: ", "it's", noise(17, 20, 3), " Score:"],
    "two clips": ["add a dog ", noise(5, 40, 60, 3), noise(4, 48, 32, 3, seed=1)],
    "picture between clips": [noise(3, 40, 60, 3), noise(40, 40, 3), noise(2, 32, 48, 3), ""],
}


@pytest.mark.parametrize("system", [None, "You are a judge."])
@pytest.mark.parametrize("name", CHATS)
def test_chat_equals_the_release(name, system, processor):
    """A judge that sees the result where it expects the source scores the wrong one."""
    parts, hf = CHATS[name], official(processor)
    kinds = ["text" if isinstance(part, str) else "video" if part.ndim == 4 else "image"
             for part in parts]
    content = [{"type": kind, "text": part} if kind == "text" else {"type": kind}
               for kind, part in zip(kinds, parts)]
    messages = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    text = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [Image.fromarray(part) for kind, part in zip(kinds, parts) if kind == "image"]
    videos = [[Image.fromarray(frame) for frame in part]
              for kind, part in zip(kinds, parts) if kind == "video"]
    expected = hf(text=[text], images=images or None, videos=videos or None, fps=3.0,
                  return_tensors="pt")
    expected.pop("attention_mask")
    inputs = processor.chat(parts, system, fps=3.0)
    assert inputs.keys() == expected.keys()
    for key, value in expected.items():
        value = torch.as_tensor(value)
        assert torch.equal(inputs[key].to(value.dtype), value), key


def test_chat_refuses_bad_parts(processor):
    """A path, or a float picture, must not be asked about as if it were seen."""
    for part in (None, noise(40, 60), noise(2, 40, 60, 4), noise(40, 60, 3) / 255, Path("a.png")):
        with pytest.raises(ValueError):
            processor.chat(["Which is better?", part])
    with pytest.raises(ValueError, match="fps"):
        processor.chat([noise(2, 40, 60, 3)], fps=0)


def test_released_settings_equal_the_release():
    """14 px patches, 3,136 to 12,845,056 pixels: the defaults are those of the hub's file."""
    hf = pytest.importorskip("transformers")
    theirs = hf.Qwen2VLImageProcessor(max_pixels=12845056)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    processor = Processor(tokenizer)
    for size in ((90, 130), (30, 41), (500, 375)):
        picture = Image.fromarray(noise(*size, 3))
        expected = theirs(images=picture, return_tensors="pt")
        inputs = processor("x", image=picture)
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(inputs["image_grid_thw"], expected["image_grid_thw"])
    assert inputs["pixel_values"].shape[1] == 1176


def test_frame_pixels_bounds_the_frames_of_a_clip_alone(processor, tokenizer):
    """Qwen's own pipeline scales frames down, not images; 13 of 720p are 8,372 tokens else."""
    case = {"video": noise(3, 60, 80, 3), "references": [noise(60, 80, 3)]}
    whole = processor("x", **case)
    bounded = processor("x", **case, frame_pixels=1024)
    small = Processor(tokenizer, patch_size=8, min_pixels=256, max_pixels=1024)("x", **case)
    assert torch.equal(bounded["pixel_values_videos"], small["pixel_values_videos"])
    assert torch.equal(bounded["pixel_values"], whole["pixel_values"])
    t, h, w = bounded["video_grid_thw"][0].tolist()
    assert 64 * h * w <= 1024 < 64 * whole["video_grid_thw"][0, 1:].prod()
    frames = noise(3, 32, 24, 3)  # below the bound nothing changes, and nothing is scaled up
    inputs = [processor("x", video=frames, frame_pixels=bound) for bound in (None, 1024)]
    assert torch.equal(*(i["pixel_values_videos"] for i in inputs))


@pytest.mark.parametrize("height, width", [
    (1, 199), (199, 1), (1, 200), (28, 5600), (5600, 28), (28, 28), (27, 3000), (42, 42),
    (14, 2000), (4000, 6000), (70, 98), (5000, 26), (768, 1152)])
def test_smart_resize(height, width):
    """Sides in multiples and never 0 (the release makes thin pictures 0), else the release's size.

    A ratio of exactly 200 is still a picture.
    """
    h, w = smart_resize(height, width, 28, 3136, 1003520)
    assert h % 28 == w % 28 == 0 and h > 0 and w > 0
    assert min(smart_resize(height, width, 28, 3136, 28 * 56)) >= 28
    hf = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl")
    if min(height, width) >= 28:
        assert (h, w) == hf.smart_resize(height, width, 28, 3136, 1003520)


@pytest.mark.parametrize("height, width", [(1, 201), (5601, 28), (10, 2001)])
def test_smart_resize_refuses_what_the_release_refuses(height, width):
    """More than 200 to 1 is no picture that the model can see."""
    with pytest.raises(ValueError, match="200"):
        smart_resize(height, width, 28, 3136, 1003520)


def test_pil_and_array_are_the_same_and_modes_become_rgb(processor):
    """A grey or transparent picture has no 3 channels; it must be converted, not read as rows."""
    array = noise(40, 60, 3)
    pixels = processor("x", image=array)["pixel_values"]
    for picture in (Image.fromarray(array), torch.from_numpy(array)):
        assert torch.equal(processor("x", image=picture)["pixel_values"], pixels)
    for mode in ("L", "RGBA", "P"):
        converted = Image.fromarray(array).convert(mode)
        expected = processor("x", image=np.asarray(converted.convert("RGB")))["pixel_values"]
        assert torch.equal(processor("x", image=converted)["pixel_values"], expected)


@pytest.mark.parametrize("bad", [
    {"image": noise(40, 60, 3).astype(np.float32)}, {"image": noise(40, 60)},
    {"image": noise(3, 40, 60)}, {"image": noise(0, 60, 3)}, {"image": noise(2, 402, 3)},
    {"image": "photo.jpg"}, {"video": noise(40, 60, 3)}, {"video": noise(0, 40, 60, 3)},
    {"video": noise(2, 40, 60, 4)}, {"video": noise(2, 40, 60, 3), "fps": 0},
    {"video": noise(2, 40, 60, 3), "fps": float("nan")},
    {"video": noise(2, 40, 60, 3), "image": noise(40, 60, 3)},
    {"references": [noise(40, 60)]}, {"instruction": None}, {"system": 3}])
def test_bad_input_is_refused(bad, processor):
    """A float picture read as bytes is noise; the user must hear of it."""
    with pytest.raises(ValueError):
        processor(**{"instruction": "make the sky blue", **bad})


@pytest.mark.parametrize("token", ["<|endoftext|>", *SPECIAL_TOKENS])
def test_words_cannot_spell_special_tokens(token, processor):
    """With <|image_pad|> words would shift every picture; with <|im_end|> speak as the system."""
    for words in ({"instruction": f"make{token}it"}, {"instruction": "x", "system": token}):
        with pytest.raises(ValueError, match="special token"):
            processor(**words)
    assert processor("a <|image|> | <|im_ start|>")["input_ids"].numel() > 10


def test_processor_saved_equals_loaded(processor, tmp_path):
    """Also by the release's image processor, from the same file."""
    processor.save_pretrained(tmp_path)
    read, case = Processor.from_pretrained(tmp_path), CASES["image and references"]
    a, b = processor("make the sky blue", **case), read("make the sky blue", **case)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    hf = pytest.importorskip("transformers")
    theirs = hf.Qwen2VLImageProcessor.from_pretrained(tmp_path)
    pixels = theirs(images=Image.fromarray(case["image"]), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, a["pixel_values"][:len(pixels)])


def test_newer_processor_files_are_read(processor, tmp_path):
    """transformers 4.5x names the bounds otherwise, and 5.x moves them to processor_config.json."""
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    raw = json.loads(file.read_text())
    bounds = {"shortest_edge": raw.pop("min_pixels"), "longest_edge": raw["max_pixels"]}
    raw |= {"size": bounds, "max_pixels": None}
    file.write_text(json.dumps(raw))
    nested = {"image_processor": raw, "processor_class": "Qwen2_5_VLProcessor"}
    for content in (None, json.dumps(nested)):
        if content:
            file.unlink()
            (tmp_path / "processor_config.json").write_text(content)
        read = Processor.from_pretrained(tmp_path)
        assert (read.min_pixels, read.max_pixels) == (processor.min_pixels, processor.max_pixels)
        assert (read.patch_size, read.image_std) == (processor.patch_size, processor.image_std)


def test_damaged_processor_files_are_named(processor, tmp_path):
    """Broken or absent files are named."""
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Processor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Processor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        Processor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="im_start"):
        Processor(Tokenizer(models.BPE()))


def test_processor_and_model_fit_together(processor, speaker):
    """Collated prompts with pictures of different sizes, queries and all, equal each alone."""
    prompts = [
        processor("make the sky blue", image=noise(40, 56, 3), references=[noise(30, 90, 3)]),
        processor("remove the dog", video=noise(5, 32, 48, 3), fps=3.0),
        processor("")]
    queries = torch.randn(4, speaker.config.hidden_size, generator=seeded(0))
    with torch.no_grad():
        together = speaker(**processor.collate(prompts), queries=queries)
        for b, one in enumerate(prompts):
            assert error(together[b, -4:], speaker(**one, queries=queries)[0, -4:]) < 2e-6
    alone = processor.collate(prompts[:1])
    assert alone["attention_mask"].all()
    assert torch.equal(alone["input_ids"], prompts[0]["input_ids"])


@pytest.mark.parametrize("source", [
    {"image": noise(40, 56, 3)}, {"video": noise(5, 32, 48, 3), "fps": 3.0}])
def test_prompts_about_the_same_pictures_share_them(source, processor, speaker):
    """Guidance asks twice about one source; seen once, it must not go to the wrong row."""
    pictures = {**source, "references": [noise(30, 90, 3)]}
    prompts = [processor(words, **pictures) for words in ("make the sky blue", "")]
    shared = processor.collate(prompts, same_pictures=True)
    each = processor.collate(prompts)
    assert 2 * len(shared["pixel_values"]) == len(each["pixel_values"])
    with torch.no_grad():
        assert error(speaker(**shared), speaker(**each)) < 2e-6


# From the terminal.


def test_terminal_answers_about_a_picture(processor, speaker, tmp_path, monkeypatch, capsys):
    """The file by itself: a picture, and one-line errors."""
    speaker.save_pretrained(tmp_path / "weights")
    processor.save_pretrained(tmp_path / "weights")
    Image.fromarray(noise(48, 64, 3)).save(tmp_path / "photo.png")

    def run(photo, weights):
        arguments = [str(tmp_path / photo), "make it blue", "--weights", str(tmp_path / weights)]
        monkeypatch.setattr(sys, "argv", ["mllm.py", *arguments])
        mllm.main()
        return capsys.readouterr().out

    inputs = processor("make it blue", image=noise(48, 64, 3))
    assert run("photo.png", "weights") == speaker.generate(inputs, processor) + "\n"
    (tmp_path / "broken.png").write_bytes((tmp_path / "photo.png").read_bytes()[:200])
    for photo, weights in (("none.png", "weights"), ("broken.png", "weights"),
                           ("photo.png", "nowhere")):
        with pytest.raises(SystemExit) as stop:
            run(photo, weights)
        message = capsys.readouterr().err
        assert stop.value.code == 2
        assert message.startswith("mllm.py: ") and message.count("\n") == 1


def test_stands_alone():
    """A leaf imports no other file and no reference library.

    Nor does it start torch's compiler (sympy), a second of every edit, to make an empty model.
    """
    code = ("import sys, torch, mllm\n"
            "with torch.device('meta'): mllm.Qwen2_5_VL()\n"
            "foreign = 'transformers diffusers peft einops sympy dit vae sampler connector edit'\n"
            "sys.exit(' '.join(set(foreign.split()) & set(sys.modules)) or 0)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(mllm.__file__).parent)
