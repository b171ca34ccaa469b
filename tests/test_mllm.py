"""mllm.py against the release of Qwen2.5-VL (transformers 4.49) and PEFT, on tiny random weights."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import mllm
from mllm import PRESETS, SPECIAL_TOKENS, LoRALinear, Processor, Qwen2_5_VL, Qwen2_5_VLConfig, add_lora
from mllm import adapter_config, left_padding_mask, load_lora, lora_state_dict, merge_lora, mrope_positions
from mllm import smart_resize

TINY = PRESETS["tiny"]
MANIFEST = json.loads((Path(__file__).parent / "manifests" / "qwen2.5_vl_3b.json").read_text())
# The official chat template, as far as our prompts use it.
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}<|im_end|>\n{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in c %}{{ c['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def randomize(model, seed=0):
    """Random weights under which every term matters: gains not 1, biases not 0, attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
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
    theirs = hf.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    return theirs


def error(a, b):
    assert a.shape == b.shape and torch.isfinite(a).all()
    return ((a - b).norm() / b.norm()).item()


def patches(grids, seed=0):
    number = sum(t * h * w for t, h, w in grids)
    return torch.randn(number, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(seed))


def prompt(*parts):
    """Ints are text tokens; ("image" | "video", (t, h, w)[, seconds]) is a picture -> inputs, as of a processor."""
    ids, seen = [], {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        kind, (t, h, w), *_ = part
        token = TINY.image_token_id if kind == "image" else TINY.video_token_id
        ids += [TINY.vision_start_token_id] + [token] * (t * h * w // 4) + [TINY.vision_end_token_id]
        seen[kind].append(part[1:])
    inputs = {"input_ids": torch.tensor([ids])}
    if seen["image"]:
        grids = [grid for grid, in seen["image"]]
        inputs |= {"pixel_values": patches(grids), "image_grid_thw": torch.tensor(grids)}
    if seen["video"]:
        grids = [grid for grid, _ in seen["video"]]
        inputs |= {"pixel_values_videos": patches(grids, 1), "video_grid_thw": torch.tensor(grids),
                   "second_per_grid_ts": torch.tensor([seconds for _, seconds in seen["video"]])}
    return inputs


PROMPTS = {
    "text": (1, 2, 3, 4, 5, 6, 7),
    "image": (1, 2, ("image", (1, 4, 4)), 3, 4),
    "one window": (1, ("image", (1, 2, 2)), 3),
    "ragged": (1, 2, 3, ("image", (1, 6, 10)), 3, 4),
    "several": (("image", (1, 14, 6)), 9, ("image", (1, 4, 4)), ("image", (1, 2, 10)), 8, 7),
    "clip": (1, 2, ("video", (5, 6, 4), 0.35), 3, 4),
    "clip and references": (1, ("video", (3, 4, 10), 2 / 3), ("image", (1, 6, 6)), ("image", (1, 4, 4)), 3, 4, 5),
    "two clips": (("video", (2, 4, 4), 0.7), 5, ("video", (4, 2, 6), 1.3), ("image", (1, 4, 2)), 6),
}


@pytest.fixture(scope="module")
def model():
    return randomize(Qwen2_5_VL(TINY))


@pytest.fixture(scope="module")
def theirs(model):
    return reference(model)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE with Qwen's pre-tokeniser, trained on a few words."""
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words = "You are a helpful assistant. system user assistant make the sky blue, remove the dog"
    made.train_from_iterator([words] * 3, trainer)
    names = ("<|endoftext|>", *SPECIAL_TOKENS)
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return made


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, patch_size=8, min_pixels=256, max_pixels=4096)


@pytest.fixture(scope="module")
def speaker(tokenizer):
    """A model whose ids are the tokenizer's."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<|{token}|>") for name, token in names.items()}
    config = dataclasses.replace(TINY, vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=False, **ids)
    return randomize(Qwen2_5_VL(config), 3)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


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
    """Sizes taken from somewhere else than the config: window, heads, eps, theta, sections, an own head."""
    config = dataclasses.replace(
        TINY, hidden_size=96, num_attention_heads=6, num_key_value_heads=3, mrope_section=(4, 1, 3), rope_theta=1e4,
        rms_norm_eps=1e-2, tie_word_embeddings=False, vision_config=dataclasses.replace(
            TINY.vision_config, num_heads=4, window_size=48, depth=3, fullatt_block_indexes=(2,), out_hidden_size=96,
            tokens_per_second=5))
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
    """Queries must take the positions that Q more text tokens would, and be seen by nobody before them."""
    inputs, count = prompt(*PROMPTS[name]), 5
    queries = torch.randn(count, TINY.hidden_size, generator=torch.Generator().manual_seed(2))
    longer = F.pad(inputs["input_ids"], (0, count), value=1)
    grids = {key: inputs.get(key) for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    positions, _ = theirs.get_rope_index(longer, **grids)
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


def test_gradients_reach_the_queries_with_and_without_recomputation(model):
    """Training the queries needs the graph through a frozen model; recomputing must not change a gradient."""
    grads = []
    for recompute in (False, True):
        queries = torch.randn(3, TINY.hidden_size, generator=torch.Generator().manual_seed(2)).requires_grad_()
        model.gradient_checkpointing = recompute
        model(**prompt(*PROMPTS["image"]), queries=queries)[:, -3:].square().sum().backward()
        model.gradient_checkpointing = False
        grads.append(queries.grad)
    assert grads[0].norm() > 0 and torch.equal(*grads)
    model.zero_grad()


def test_positions_may_be_given(model):
    """An argument that is taken but not used would go unnoticed."""
    inputs = prompt(*PROMPTS["clip"])
    grids = {key: inputs[key] for key in ("video_grid_thw", "second_per_grid_ts")}
    positions = model.positions(inputs["input_ids"], **grids)
    with torch.no_grad():
        assert torch.equal(model(**inputs, position_ids=positions), model(**inputs))
        assert error(model(**inputs, position_ids=positions * 2), model(**inputs)) > 1e-2


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("seconds", [1.0, 0.125, 0.35, 0.5, 2 / 3, 0.7, 1.3, 0.29])
def test_positions_equal_the_release(name, seconds, model, theirs):
    """4.56 truncates fractional seconds, 5.x forgets the time after a clip; both would put the queries elsewhere."""
    inputs = prompt(*PROMPTS[name])
    grids = {key: inputs.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    if grids["video_grid_thw"] is not None:
        grids["second_per_grid_ts"] = [seconds] * len(grids["video_grid_thw"])
    expected, _ = theirs.get_rope_index(inputs["input_ids"], **grids)
    assert torch.equal(model.positions(inputs["input_ids"], **grids), expected)


def test_positions_by_hand():
    """The rule itself, without a reference: a clip of 3 frames 0.75 s apart at 2 steps a second, then text."""
    ids = [1, 2, *[TINY.video_token_id] * 6, 3, 4]
    found = mrope_positions(ids, iter([]), iter([(3, 2, 1, 0.75)]), TINY)
    assert found.tolist() == [[0, 1, 2, 2, 3, 3, 5, 5, 6, 7],
                              [0, 1, 2, 3, 2, 3, 2, 3, 6, 7],
                              [0, 1, 2, 2, 2, 2, 2, 2, 6, 7]]


def test_long_clips_keep_the_rounding_of_the_release(model, theirs):
    """floor() of a product that is a whole number but for rounding: float64 and float32 disagree on some frames."""
    seconds = [0.29, 0.57, 1.15, 0.1, 2.3 / 7]
    inputs = prompt(*(("video", (120, 2, 2), s) for s in seconds))
    grids = inputs["video_grid_thw"]
    expected, _ = theirs.get_rope_index(inputs["input_ids"], None, grids, seconds)
    assert torch.equal(model.positions(inputs["input_ids"], None, None, grids, torch.tensor(seconds)), expected)


@pytest.mark.parametrize("count", [0, 4])
def test_left_padding_changes_nothing_real(count, model):
    """A batch of different lengths must give each row what it gets alone: padding may leak by mask, position or NaN."""
    rows = [prompt(*PROMPTS[name]) for name in ("text", "clip and references", "several")]
    batch = Processor.collate(type("pad", (), {"pad_id": 0}), rows)
    queries = torch.randn(3, count, TINY.hidden_size, generator=torch.Generator().manual_seed(1)) if count else None
    with torch.no_grad():
        together = model(**batch, queries=queries)
        for b, row in enumerate(rows):
            alone = model(**row, queries=queries[b:b + 1] if count else None)
            assert error(together[b:b + 1, -alone.shape[1]:], alone) < 2e-6
    assert batch["attention_mask"].sum(1).tolist() == [row["input_ids"].shape[1] for row in rows]
    assert torch.isfinite(together).all()


def test_padded_batch_trains(model):
    """A row of padding that sees nothing makes NaN gradients even where its output is ignored."""
    rows = [prompt(*PROMPTS[name]) for name in ("text", "image")]
    queries = torch.zeros(2, TINY.hidden_size, requires_grad=True)
    model(**Processor.collate(type("pad", (), {"pad_id": 0}), rows), queries=queries)[:, -2:].sum().backward()
    assert torch.isfinite(queries.grad).all() and queries.grad.norm() > 0
    model.zero_grad()


def test_padding_sees_itself():
    """Where a kernel gives NaN for a token that sees nothing, NaN times weight zero reaches the real ones."""
    mask = left_padding_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), 1)
    assert mask.shape == (2, 1, 5, 5) and mask.any(dim=-1).all()
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0],
                                         [0, 0, 1, 1, 1]]
    assert torch.equal(mask[1, 0], torch.ones(5, 5).tril().bool())
    assert left_padding_mask(torch.ones(2, 4), 1) is None


def test_positions_of_padded_rows_equal_the_release(model, theirs):
    """Attention sees differences of positions only, so a shifted row passes every other test."""
    batch = Processor.collate(type("pad", (), {"pad_id": 0}), [prompt(*PROMPTS[name]) for name in ("clip", "several")])
    grids = {key: batch[key] for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    expected, _ = theirs.get_rope_index(batch["input_ids"], **grids, attention_mask=batch["attention_mask"])
    found, real = model.positions(batch["input_ids"], batch["attention_mask"], **grids), batch["attention_mask"].bool()
    assert not real.all() and torch.equal(found[:, real], expected[:, real])


def test_right_padding_is_refused(model):
    """Queries behind the padding would be far from their prompt, silently."""
    with pytest.raises(ValueError, match="left"):
        model(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 1, 0]]))
    with pytest.raises(ValueError, match="left"):
        model(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 0, 1]]))


def test_full_attention_is_full_per_frame_only(model):
    """Full attention over a whole clip looks plausible and is wrong: no frame may see another in the vision tower."""
    tower, pixels = model.visual, patches([(3, 8, 8)])
    changed = pixels.clone()
    changed[64:128] += 1                                                    # the second frame
    with torch.no_grad():
        before, after = (tower(p, [(3, 8, 8)]).unflatten(0, (3, 16)) for p in (pixels, changed))
    assert torch.allclose(before[[0, 2]], after[[0, 2]], atol=1e-6)
    assert (before[1] - after[1]).abs().min(dim=-1).values.max() > 0        # and within the frame every token changes
    assert ((before[1] - after[1]).norm(dim=-1) > 1e-3).all()


def test_windows_do_not_see_each_other_but_full_blocks_do():
    """Window attention that is full attention (or full blocks that are windows) passes any test on a single window."""
    pixels = patches([(1, 8, 12)])
    changed = pixels.clone()
    changed[:4] += 1                                                        # the first merged patch of the first window
    for full, others in (((), False), ((1,), True)):
        vision = dataclasses.replace(TINY.vision_config, fullatt_block_indexes=full)
        tower = randomize(Qwen2_5_VL(dataclasses.replace(TINY, vision_config=vision))).visual
        with torch.no_grad():
            moved = ((tower(pixels, [(1, 8, 12)]) - tower(changed, [(1, 8, 12)])).norm(dim=-1) > 1e-5).view(4, 6)
        inside = torch.zeros(4, 6, dtype=torch.bool)
        inside[:2, :2] = True                                               # windows of 32 px: 2 x 2 merged patches
        assert moved[inside].all() and moved[~inside].all() == others and moved[~inside].any() == others


def test_vision_attention_never_builds_a_mask(model, monkeypatch):
    """An n x n mask of a 4K picture is gigabytes. Windows of one size must be one call, not thousands."""
    calls, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        calls.append((tuple(q.shape), attn_mask))
        return real(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    grids = [(1, 14, 10), (2, 8, 8)]
    with torch.no_grad():
        model.visual(patches(grids), grids)
    assert all(mask is None for _, mask in calls)
    sizes = [(b, n) for (b, _, n, _), _ in calls[:5]]                       # 8 px patches: 4 x 4 of them in a window
    assert sizes == [(1, 4), (5, 8), (14, 16), (2, 64), (1, 140)]           # a window block, then a full one


def test_norms_and_rope_compute_in_float32():
    """In bfloat16 both lose digits that the release keeps; end to end it hides in the rounding of everything else."""
    x = torch.randn(4, 5, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
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
    with torch.no_grad():
        out = half(**prompt(*PROMPTS["clip and references"]), queries=torch.ones(2, TINY.hidden_size))
        expected = model(**prompt(*PROMPTS["clip and references"]), queries=torch.ones(2, TINY.hidden_size))
    assert out.dtype == torch.bfloat16 and error(out.float(), expected) < 0.05


@pytest.mark.parametrize("name", ["text", "clip and references", "several"])
def test_greedy_equals_the_release_and_the_uncached(name):
    """A cache with wrong positions after pictures is right for one token only. (A tied random model only echoes.)"""
    model = randomize(Qwen2_5_VL(dataclasses.replace(TINY, tie_word_embeddings=False)))
    theirs, inputs = reference(model), prompt(*PROMPTS[name])
    ids = model.greedy(inputs, {TINY.vocab_size}, 12)
    mask = torch.ones_like(inputs["input_ids"])
    expected = theirs.generate(**inputs, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
                               pad_token_id=0)
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
        steps = [model.model(x[:, :3], positions[..., :3], cache=cache)]
        steps += [model.model(x[:, i:i + 1], positions[..., i:i + 1], cache=cache) for i in range(3, 6)]
    assert error(torch.cat(steps, dim=1), whole) < 2e-6


def test_generate_stops_and_answers_in_words(speaker, processor):
    """The end of a turn must stop it and not be printed; padding from collate must not change the answer."""
    inputs = processor("make the sky blue", image=noise(40, 56, 3))
    ids = speaker.greedy(inputs, (), 8)
    assert speaker.generate(inputs, processor, 8) == processor.tokenizer.decode(ids)
    assert speaker.greedy(inputs, {ids[3]}, 8) == ids[:ids.index(ids[3])]
    assert speaker.greedy(inputs, (), 0) == []
    batch = processor.collate([inputs, processor("make the sky blue, remove the dog", image=noise(64, 64, 3))])
    first = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1],
             "pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
    assert batch["attention_mask"][0, 0] == 0 and speaker.greedy(first, (), 8) == ids
    with pytest.raises(ValueError, match="one prompt"):
        speaker.generate(batch, processor, 8)


def test_pictures_that_do_not_fit_are_named(model):
    """Features must never be spread over the wrong tokens."""
    inputs = prompt(*PROMPTS["image"])
    for change in ({"image_grid_thw": torch.tensor([[1, 4, 6]])}, {"pixel_values": inputs["pixel_values"][:-4]},
                   {"pixel_values": inputs["pixel_values"][:, :-1]}, {"pixel_values": None},
                   {"pixel_values": None, "image_grid_thw": None},
                   {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 2]])}):
        with pytest.raises(ValueError, match="token|patches"):
            model(**{**inputs, **change})
    with pytest.raises(ValueError, match="second_per_grid_ts"):
        model(**{**prompt(*PROMPTS["clip"]), "second_per_grid_ts": [0.5, 0.5]})


def expand(manifest):
    tensors = dict(manifest["tensors"])
    for layer in manifest["layers"]:
        for i in range(layer["count"]):
            tensors |= {layer["prefix"].format(i) + name: shape for name, shape in layer["tensors"].items()}
    return tensors


def test_3b_has_exactly_the_tensors_of_the_release():
    """One renamed tensor and the vision tower stays random (with strict loading: an error for every user)."""
    with torch.device("meta"):
        model = Qwen2_5_VL()
    found = {name: list(t.shape) for name, t in model.state_dict().items()}
    assert found == expand(MANIFEST)
    assert sum(math.prod(shape) for shape in found.values()) == MANIFEST["parameters"]


def test_7b_preset_has_the_released_number_of_parameters():
    """8,292,166,656 is the hub's own count; a wrong size in the preset changes it."""
    with torch.device("meta"):
        assert sum(p.numel() for p in Qwen2_5_VL(PRESETS["7B"]).parameters()) == 8_292_166_656


def newer(name):
    """The name that transformers 4.52 and later give a tensor."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def shard(folder, tensors):
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_equals_loaded(tied, tmp_path, model):
    """Also by the release itself, which reads the folder we write."""
    made = randomize(Qwen2_5_VL(dataclasses.replace(TINY, tie_word_embeddings=tied))).bfloat16()
    made.save_pretrained(tmp_path)
    read = Qwen2_5_VL.from_pretrained(tmp_path)
    assert same(made, read) and read.config == made.config and not read.training
    assert same(made, Qwen2_5_VL.from_pretrained(tmp_path / "model.safetensors"))
    assert same(Qwen2_5_VL.from_pretrained(tmp_path, dtype=torch.float32).bfloat16(), made)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    hf = pytest.importorskip("transformers")
    theirs = hf.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, torch_dtype=torch.float32).eval()
    inputs, read = prompt(*PROMPTS["clip"]), read.float()
    with torch.no_grad():
        assert error(read.lm_head(read(**inputs)), theirs(**inputs).logits) < 2e-5


@pytest.mark.parametrize("names", ["official", "newer"])
@pytest.mark.parametrize("sharded", [False, True])
def test_both_layouts_load(names, sharded, tmp_path, model):
    """Renamed keys with strict=False leave a random tower: the commonest bug of the neighbours."""
    tensors = {newer(name) if names == "newer" else name: t for name, t in model.state_dict().items()}
    shard(tmp_path, tensors) if sharded else save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(nested(TINY) if names == "newer" else TINY.to_dict()))
    read = Qwen2_5_VL.from_pretrained(tmp_path)
    assert same(model, read)
    with torch.no_grad():
        assert torch.equal(read(**prompt(*PROMPTS["clip"])), model(**prompt(*PROMPTS["clip"])))


def nested(config):
    """As transformers 5 writes it: text fields and rope in their own dicts."""
    flat = config.to_dict()
    own = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "architectures",
           "model_type", "vision_config", "tie_word_embeddings")
    rope = {"rope_type": "default", "rope_theta": flat.pop("rope_theta"), **flat.pop("rope_scaling")}
    rope.pop("type")
    text = {key: value for key, value in flat.items() if key not in own} | {
        "rope_parameters": rope, "image_token_id": None, "model_type": "qwen2_5_vl_text",
        "layer_types": ["full_attention"]}
    return {key: flat[key] for key in own} | {"text_config": text, "dtype": "bfloat16", "_attn_implementation": "sdpa"}


def test_config_layouts():
    """The hub's own config.json (3B), a nested one, and the defaults must all be the same model."""
    vision = {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
        "temporal_patch_size": 2}
    hub = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "hidden_act": "silu",
        "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 128000, "use_cache": True,
        "max_window_layers": 70, "model_type": "qwen2_5_vl", "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
        "use_sliding_window": False, "vision_config": vision, "vocab_size": 151936,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    assert Qwen2_5_VLConfig.from_dict(hub) == Qwen2_5_VLConfig() == PRESETS["3B"]
    for config in PRESETS.values():
        assert Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(nested(config)))) == config
        assert Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    odd = Qwen2_5_VLConfig.from_dict({**hub, "rms_norm_eps": 1e-5, "rope_theta": 2e6, "video_token_id": 7})
    assert (odd.rms_norm_eps, odd.rope_theta, odd.video_token_id) == (1e-5, 2e6, 7)


@pytest.mark.parametrize("change, word", [
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "type|factor"),
    ({"use_sliding_window": True}, "sliding"),
    ({"num_experts": 8}, "num_experts"),
    ({"rope_scaling": {"mrope_section": [1, 1, 1]}}, "mrope"),
    ({"num_key_value_heads": 3}, "heads"),
    ({"vision_config": {"out_hidden_size": 5}}, "out_hidden_size"),
    ({"vision_config": {"deepstack": 1}}, "deepstack"),
    ({"vision_config": {"patch_size": 99}}, "window"),
    ({"vision_config": {"spatial_patch_size": 9}}, "spatial_patch_size"),
    ({"vision_config": {"num_heads": 7}}, "heads"),
    ({"hidden_size": "wide"}, "config"),
    ({"vision_config": "big"}, "config"),
])
def test_config_of_another_model_is_refused(change, word, tmp_path):
    """A setting that we would ignore gives a model that loads and is wrong."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY.to_dict(), **change}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=word):
        Qwen2_5_VL.from_pretrained(tmp_path)


def test_odd_checkpoints_are_named(tmp_path, model):
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
    for part in ("missing: visual.merger.ln_q.weight", "unexpected: visual.extra",
                 "model.norm.weight [7] instead of [64]"):
        assert part in text
    assert "\n" not in text and str(tmp_path) in text
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        Qwen2_5_VL.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="none found"):
        Qwen2_5_VL.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Qwen2_5_VL.from_pretrained(tmp_path / "nowhere")
    shard(tmp_path, tensors)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="index.json names model-00002-of-00002"):
        Qwen2_5_VL.from_pretrained(tmp_path)
    shard(tmp_path, tensors)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        Qwen2_5_VL.from_pretrained(tmp_path)


def test_a_second_copy_of_the_tied_head_is_dropped_but_not_another_head(tmp_path, model):
    """Some exports store the tied head twice; an untied head under a tied config is another model."""
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for head, fits in ((tensors["model.embed_tokens.weight"].clone(), True), (torch.zeros(512, 64), False)):
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
        if fits:
            assert same(model, Qwen2_5_VL.from_pretrained(tmp_path))
        else:
            with pytest.raises(ValueError, match="unexpected: lm_head.weight"):
                Qwen2_5_VL.from_pretrained(tmp_path)


def with_lora(seed=5, **options):
    """A tiny model whose LoRA does something: B away from zero."""
    model = randomize(Qwen2_5_VL(TINY))
    add_lora(model, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    return model


def test_fresh_lora_changes_nothing_and_trains_alone(model):
    """B must start at zero; base and vision tower must be frozen, or the optimiser takes 3.7B parameters."""
    fresh = randomize(Qwen2_5_VL(TINY))
    add_lora(fresh, rank=4, alpha=8)
    with torch.no_grad():
        assert torch.equal(fresh(**prompt(*PROMPTS["image"])), model(**prompt(*PROMPTS["image"])))
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {name.removeprefix("base_model.model.") for name in lora_state_dict(fresh)}
    assert len(trained) == 2 * 7 * TINY.num_hidden_layers and not any("visual" in name for name in trained)
    assert all(layer.lora_A.weight.std() > 0 for _, layer in mllm.lora_layers(fresh))
    fresh(**prompt(*PROMPTS["image"])).square().sum().backward()
    assert all(layer.lora_B.weight.grad.norm() > 0 for _, layer in mllm.lora_layers(fresh))


def test_merged_equals_unmerged_and_is_plain():
    """Scale alpha / rank forgotten on one side is the classic."""
    model = with_lora(rank=4, alpha=12)
    inputs, names = prompt(*PROMPTS["clip and references"]), set(Qwen2_5_VL(TINY).state_dict())
    with torch.no_grad():
        before = model(**inputs)
        with pytest.raises(ValueError, match="merge_lora"):
            model.save_pretrained("never-written")
        merge_lora(model)
        assert error(model(**inputs), before) < 2e-5
        assert error(randomize(Qwen2_5_VL(TINY))(**inputs), before) > 1e-2
    assert set(model.state_dict()) == names and not any(isinstance(m, LoRALinear) for m in model.modules())
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(model)


def test_lora_saved_equals_loaded(tmp_path):
    """Under either layout's names; whatever does not fit is an error, not ignored."""
    model, inputs = with_lora(rank=4, alpha=8), prompt(*PROMPTS["clip"])
    stored = lora_state_dict(model)
    prefix = "base_model.model."
    for tensors in (stored, {prefix + newer(name.removeprefix(prefix)): t for name, t in stored.items()}):
        fresh = randomize(Qwen2_5_VL(TINY))
        with pytest.raises(ValueError, match="add_lora"):
            load_lora(fresh, tensors)
        add_lora(fresh, 4, 8)
        load_lora(fresh, tensors)
        with torch.no_grad():
            assert torch.equal(fresh(**inputs), model(**inputs))
        assert all(p.requires_grad == (".lora_" in name) for name, p in fresh.named_parameters())
    first = next(iter(stored))
    for odd, word in (({**stored, "x": stored[first]}, "unexpected: x"),
                      ({**stored, first: torch.zeros(1)}, "misshaped"),
                      ({name: t for name, t in stored.items() if name != first}, "missing")):
        with pytest.raises(ValueError, match=word):
            load_lora(fresh, odd)
    for options, word in (({"rank": 0}, "rank"), ({"targets": ("qkv",)}, "targets"), ({"targets": ()}, "targets")):
        with pytest.raises(ValueError, match=word):
            add_lora(randomize(Qwen2_5_VL(TINY)), **options)
    with pytest.raises(ValueError, match="already"):
        add_lora(model)


def test_lora_over_bfloat16_trains_in_float32():
    """Steps of 1e-5 on bfloat16 weights are rounded away: training would stand still without an error."""
    model = randomize(Qwen2_5_VL(TINY)).bfloat16()
    add_lora(model, rank=4, alpha=8)
    assert {t.dtype for t in lora_state_dict(model).values()} == {torch.float32}
    assert model(**prompt(*PROMPTS["image"])).dtype == torch.bfloat16
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_lora_equals_peft(tmp_path):
    """PEFT must read our folder and compute the same; its own names must be ours."""
    peft = pytest.importorskip("peft")
    model, inputs = with_lora(rank=4, alpha=6), prompt(*PROMPTS["clip and references"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(model)))
    save_file(lora_state_dict(model), tmp_path / "adapter_model.safetensors")
    adapted = peft.PeftModel.from_pretrained(reference(randomize(Qwen2_5_VL(TINY))), tmp_path).eval()
    with torch.no_grad():
        expected = adapted(**inputs, output_hidden_states=True).hidden_states[-1]
        assert error(model(**inputs), expected) < 2e-5
    adapted.save_pretrained(tmp_path / "theirs")
    theirs, ours = load_file(tmp_path / "theirs" / "adapter_model.safetensors"), lora_state_dict(model)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def official(processor):
    """The release's processor with our tokenizer and settings; the slow image processor is its reference."""
    hf = pytest.importorskip("transformers")
    fast = hf.Qwen2TokenizerFast(tokenizer_object=processor.tokenizer)
    images = hf.Qwen2VLImageProcessor(min_pixels=processor.min_pixels, max_pixels=processor.max_pixels,
                                      patch_size=processor.patch_size, merge_size=processor.merge_size,
                                      temporal_patch_size=processor.temporal_patch_size)
    return hf.Qwen2_5_VLProcessor(images, fast, chat_template=TEMPLATE)


CASES = {
    "text": {},
    "system": {"system": "Describe the edit."},
    "image": {"image": noise(50, 70, 3)},
    "large": {"image": noise(300, 210, 3)},
    "small": {"image": noise(17, 20, 3)},
    "narrow": {"image": noise(16, 200, 3)},
    "image and references": {"image": noise(64, 48, 3), "references": [noise(33, 90, 3, seed=1), noise(40, 40, 3)]},
    "clip": {"video": noise(4, 40, 60, 3), "fps": 3.0},
    "odd clip and reference": {"video": noise(13, 48, 32, 3), "fps": 0.7, "references": [noise(80, 20, 3)],
                               "system": "Look."},
    "one frame": {"video": noise(1, 32, 48, 3)},
}


@pytest.mark.parametrize("name", CASES)
def test_processor_equals_the_release(name, processor):
    """Ids, pixels, grids and seconds, bit by bit: one blank or half a pixel more is input the model never saw."""
    case, hf = CASES[name], official(processor)
    words = " Make the sky blue\n\nplease, it's 12 o'clock… ünïcode 東京 "
    pictures = ([case["image"]] if "image" in case else []) + list(case.get("references", ()))
    content = [{"type": "text", "text": words}] + [{"type": "video"}] * ("video" in case)
    messages = [{"role": "user", "content": content + [{"type": "image"}] * len(pictures)}]
    if "system" in case:
        messages.insert(0, {"role": "system", "content": case["system"]})
    text = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = hf(text=[text], images=[Image.fromarray(p) for p in pictures] or None,
                  videos=[[Image.fromarray(frame) for frame in case["video"]]] if "video" in case else None,
                  fps=case.get("fps", 2.0), return_tensors="pt")
    found = processor(words, **case)
    expected.pop("attention_mask")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        value = torch.as_tensor(value)
        assert torch.equal(found[key].to(value.dtype), value), key
        assert found[key].dtype == (torch.float32 if value.is_floating_point() else torch.int64), key


def test_released_settings_equal_the_release():
    """14 px patches between 3,136 and 12,845,056 pixels: the defaults are those of the hub's file."""
    hf = pytest.importorskip("transformers")
    theirs = hf.Qwen2VLImageProcessor(max_pixels=12845056)
    made = Processor(vocabulary())
    for size in ((90, 130), (30, 41), (500, 375)):
        picture = Image.fromarray(noise(*size, 3))
        expected = theirs(images=picture, return_tensors="pt")
        pixels, grid = made.patches([picture])
        assert torch.equal(pixels, expected["pixel_values"]) and list(grid) == expected["image_grid_thw"][0].tolist()
    assert pixels.shape[1] == 1176


def vocabulary():
    made = Tokenizer(models.BPE())
    made.add_special_tokens(list(SPECIAL_TOKENS))
    return made


@pytest.mark.parametrize("height, width", [(1, 199), (199, 1), (28, 28), (27, 3000), (42, 42), (14, 2000), (4000, 6000),
                                           (70, 98), (5000, 26), (768, 1152)])
def test_smart_resize(height, width):
    """Sides in multiples and never 0 (the release rounds thin pictures down to nothing), else the release's size."""
    h, w = smart_resize(height, width, 28, 3136, 1003520)
    assert h % 28 == w % 28 == 0 and h > 0 and w > 0
    assert min(smart_resize(height, width, 28, 3136, 28 * 56)) >= 28
    hf = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl")
    if min(height, width) >= 28:
        assert (h, w) == hf.smart_resize(height, width, 28, 3136, 1003520)


def test_pil_and_array_are_the_same_and_modes_become_rgb(processor):
    """A grey or transparent picture has no 3 channels; it must be converted, not fail or be read as rows."""
    array = noise(40, 60, 3)
    one, two = processor("x", image=array), processor("x", image=Image.fromarray(array))
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert torch.equal(processor("x", image=torch.from_numpy(array))["pixel_values"], one["pixel_values"])
    for mode in ("L", "RGBA", "P"):
        converted = Image.fromarray(array).convert(mode)
        expected = processor("x", image=np.asarray(converted.convert("RGB")))
        assert torch.equal(processor("x", image=converted)["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("bad", [
    {"image": noise(40, 60, 3).astype(np.float32)}, {"image": noise(40, 60)}, {"image": noise(3, 40, 60)},
    {"image": noise(0, 60, 3)}, {"image": noise(2, 400, 3)}, {"image": "photo.jpg"}, {"video": noise(40, 60, 3)},
    {"video": noise(0, 40, 60, 3)}, {"video": noise(2, 40, 60, 4)}, {"video": noise(2, 40, 60, 3), "fps": 0},
    {"video": noise(2, 40, 60, 3), "fps": float("nan")}, {"video": noise(2, 40, 60, 3), "image": noise(40, 60, 3)},
    {"references": [noise(40, 60)]}, {"instruction": None}, {"system": 3}])
def test_bad_input_is_refused(bad, processor):
    """A float picture read as bytes is noise; the user must hear of it."""
    with pytest.raises(ValueError):
        processor(**{"instruction": "make the sky blue", **bad})


@pytest.mark.parametrize("token", ["<|endoftext|>", *SPECIAL_TOKENS])
def test_words_cannot_spell_special_tokens(token, processor):
    """An instruction with <|image_pad|> would shift every picture; with <|im_end|> it could speak as the system."""
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


def test_processor_files(processor, tmp_path):
    """Newer exports name the bounds otherwise; broken or absent files are named."""
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Processor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    raw = json.loads(file.read_text())
    raw |= {"size": {"shortest_edge": raw.pop("min_pixels"), "longest_edge": raw["max_pixels"]}, "max_pixels": None}
    file.write_text(json.dumps(raw))
    read = Processor.from_pretrained(tmp_path)
    assert (read.min_pixels, read.max_pixels) == (processor.min_pixels, processor.max_pixels)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Processor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="im_start"):
        Processor(Tokenizer(models.BPE()))


def test_processor_and_model_fit_together(processor, speaker):
    """Collated prompts with pictures of different sizes, queries and all, equal each prompt alone."""
    prompts = [processor("make the sky blue", image=noise(40, 56, 3), references=[noise(30, 90, 3)]),
               processor("remove the dog", video=noise(5, 32, 48, 3), fps=3.0), processor("")]
    queries = torch.randn(4, speaker.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = speaker(**processor.collate(prompts), queries=queries)
        for b, one in enumerate(prompts):
            assert error(together[b, -4:], speaker(**one, queries=queries)[0, -4:]) < 2e-6
    alone = processor.collate(prompts[:1])
    assert alone["attention_mask"].all() and torch.equal(alone["input_ids"], prompts[0]["input_ids"])


def test_terminal_answers_about_images_and_clips(processor, speaker, tmp_path, monkeypatch, capsys):
    """The file by itself: an image, a clip, and one-line errors."""
    speaker.save_pretrained(tmp_path / "weights")
    processor.save_pretrained(tmp_path / "weights")
    Image.fromarray(noise(48, 64, 3)).save(tmp_path / "photo.png")
    import imageio
    imageio.mimwrite(tmp_path / "clip.mp4", noise(20, 64, 64, 3), fps=10, macro_block_size=1)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mllm.py", *map(str, args), "--max-new-tokens", "5", "--device", "cpu"])
        mllm.main()
        return capsys.readouterr().out

    inputs = processor("make it blue", image=noise(48, 64, 3))
    assert run(tmp_path / "photo.png", "make it blue", "--weights", tmp_path / "weights") == (
        speaker.generate(inputs, processor, 5) + "\n")
    clip = mllm.open_media(tmp_path / "clip.mp4", 5)
    assert clip["video"].shape == (5, 64, 64, 3) and clip["fps"] == pytest.approx(10 * 4 / 19)
    assert len(run(tmp_path / "clip.mp4", "what", "--weights", tmp_path / "weights", "--frames", 5)) > 1
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # a phone held upright
    Image.fromarray(noise(48, 64, 3)).save(tmp_path / "phone.jpg", exif=exif)
    assert mllm.open_media(tmp_path / "phone.jpg", 5)["image"].size == (48, 64)
    for media, weights in ((tmp_path / "none.png", "weights"), (tmp_path / "photo.png", "nowhere")):
        with pytest.raises(SystemExit) as stop:
            run(media, "what", "--weights", tmp_path / weights)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.startswith("mllm.py: ") and message.count("\n") == 1


def test_stands_alone():
    """A leaf imports none of the other files and none of the reference libraries."""
    code = ("import sys, mllm; names = 'transformers diffusers peft einops dit vae sampler connector'.split();"
            "odd = set(names) & set(sys.modules); sys.exit(str(odd) if odd else 0)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(mllm.__file__).parent)
