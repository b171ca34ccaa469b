"""connector.py: the seams between the four models, on tiny random weights."""

import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from threading import Thread
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from conftest import make_tiny_weights
from safetensors.torch import load_file, save_file

import connector
from connector import InstructX, InstructXConfig, Offload, locate, pad, shrink, spread
from dit import FLOAT32, WanDiT
from dit import PRESETS as DIT_PRESETS
from mllm import Qwen2_5_VL, merge_lora
from sampler import FlowSampler


@pytest.fixture(scope="module")
def model(tiny_weights):
    """Shared by all tests here: none may change it for good."""
    return InstructX.from_pretrained(tiny_weights)


@pytest.fixture
def copy(tiny_weights, tmp_path):
    """A weights folder of one's own."""
    shutil.copytree(tiny_weights, tmp_path / "weights")
    return tmp_path / "weights"


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


IMAGE, CLIP = picture(1, 24, 40), picture(6, 24, 40, seed=1)
REFERENCES = [picture(16, 24, seed=2), picture(40, 64, seed=3)]


@torch.inference_mode()
def by_hand(
    model, frames, instruction, references=(), steps=2, guidance=2.0, shift=3.0, seed=0, fps=16.0
):
    """One edit, each branch by itself and nothing shared between steps: what `edit` must be equal to."""
    references = [shrink(image, frames.shape[1] * frames.shape[2]) for image in references]
    prompts = [model.prompt(frames, words, references, fps) for words in (instruction, "")]
    contexts = [model.context(prompt, len(frames) > 1) for prompt in prompts]
    source, latents = model.encode(frames), [model.encode(image[None]) for image in references]

    def velocity(z, t):
        wanted, empty = (model.dit(z, t, context, source, latents) for context in contexts)
        return empty + guidance * (wanted - empty)

    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed))
    z = FlowSampler(steps, shift).sample(velocity, noise)
    return np.concatenate(list(model.decode(z, frames.shape)))


def same(a, b):
    """Equal up to the rounding of sums in another order: at most one level of 255, and hardly anywhere."""
    difference = np.abs(a.astype(int) - b)
    return difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize(
    "frames, references", [(IMAGE, []), (CLIP, []), (IMAGE, REFERENCES), (CLIP, REFERENCES)]
)
def test_edit_is_two_branches_and_the_sampler(model, frames, references):
    """A batch of two in the wrong order, guidance with the wrong sign, or a condition that goes stale between steps."""
    result = model.edit(frames, "make it night", references, seed=5)
    assert result.dtype == np.uint8 and result.std() > 1
    assert same(result, by_hand(model, frames, "make it night", references, seed=5))


def test_guidance_one_is_a_single_branch(model, monkeypatch):
    """Half the work, and the same numbers as the formula gives for 1."""
    batches, denoise = [], model.dit.denoise
    monkeypatch.setattr(
        model.dit, "denoise", lambda z, *rest: batches.append(len(z)) or denoise(z, *rest)
    )
    assert same(
        model.edit(IMAGE, "make it night", guidance=1),
        by_hand(model, IMAGE, "make it night", guidance=1.0),
    )
    assert set(batches) == {1}
    model.edit(IMAGE, "make it night", guidance=1.5)
    assert set(batches) == {1, 2}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("frames, references", [(IMAGE, REFERENCES), (CLIP, [])])
def test_offloaded_is_resident(tmp_path, trained, frames, references):
    """Weights that are read block by block edit alike, byte for byte, and LoRA on layers without weights is not lost."""
    folder = make_tiny_weights(tmp_path, trained=trained)
    half = Qwen2_5_VL.from_pretrained(
        folder / "mllm", dtype=torch.bfloat16
    )  # so that reading it as float32 is a cast
    half.save_pretrained(folder / "mllm")
    resident, offloaded = (
        InstructX.from_pretrained(folder, dtype=torch.float32, offload=offload)
        for offload in (False, True)
    )
    results = [
        model.edit(frames, "make it night", references, steps=2) for model in (resident, offloaded)
    ]
    assert np.array_equal(*results)
    blocks = [*offloaded.dit.blocks, *offloaded.mllm.model.layers, *offloaded.mllm.visual.blocks]
    lora = {name for name, _ in offloaded.mllm.named_parameters() if "lora_" in name}
    assert all(
        p.is_meta for block in blocks for name, p in block.named_parameters() if "lora_" not in name
    )
    assert lora and not any(offloaded.mllm.get_parameter(name).is_meta for name in lora)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_offloaded_dit_reads_every_layout(tmp_path, dtype):
    """One file, shards and a pickle, each with the dtypes that the whole model would have."""
    torch.manual_seed(0)
    dit = WanDiT(DIT_PRESETS["tiny"])
    dit.save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    for folder in ("shards", "pickle"):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "one" / "config.json", tmp_path / folder)
    files = {
        "a.safetensors": list(tensors)[::2],
        "b.safetensors": list(tensors)[1::2],
    }  # each block lies in both
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, tmp_path / "shards" / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(tensors, tmp_path / "pickle" / "model.pth")
    z, context = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 7, 48)
    for folder in ("one", "shards", "pickle"):
        resident, offloaded = (
            WanDiT.from_pretrained(tmp_path / folder, dtype=dtype, offload=offload)
            for offload in (None, Offload)
        )
        with torch.no_grad():
            assert torch.equal(
                *(model(z, torch.tensor([300.0]), context) for model in (resident, offloaded))
            )
        read = offloaded.offload.read(0)
        for name, parameter in resident.blocks[0].named_parameters():
            assert read[name].dtype == parameter.dtype and torch.equal(read[name], parameter), name


def test_offload_holds_two_blocks_at_most():
    """The one that works, and the one that is read meanwhile."""
    alive, most = weakref.WeakSet(), []

    def read(i):
        weight = torch.full((2, 2), float(i))
        alive.add(weight)
        most.append(len(alive))
        return {"weight": weight}

    blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False, device="meta") for _ in range(6))
    for _ in range(2):
        seen = [block.weight[0, 0].item() for block in Offload(blocks, read)]
        assert seen == [0, 1, 2, 3, 4, 5] and all(block.weight.is_meta for block in blocks)
    assert len(most) == 12 and max(most) == 2


def test_offload_on_a_gpu_waits_for_its_copies_and_for_its_work(monkeypatch):
    """Copies run on one stream of their own, which lets each use the memory of the last; torch.cuda is made up here."""
    events, copies, work = [], Mock(), Mock()
    copies.synchronize = lambda: events.append("copied")
    work.synchronize = lambda: events.append(("worked", [block.weight.is_meta for block in blocks]))
    made, copying = Mock(return_value=copies), Mock(return_value=contextlib.nullcontext())
    for name, fake in (
        ("Stream", made),
        ("stream", copying),
        ("current_stream", lambda device: work),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)

    blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False, device="meta") for _ in range(3))
    offload = Offload(blocks, lambda i: {"weight": torch.ones(2, 2)}, "cuda:1")
    for walk in range(2):
        for i, block in enumerate(offload):
            assert events.count("copied") > 3 * walk + i and not block.weight.is_meta
    assert made.call_args_list == [call(torch.device("cuda:1"))] and copying.call_args_list == 6 * [
        call(copies)
    ]
    worked = [event[1] for event in events if event[0] == "worked"]
    assert worked == 2 * [
        [j != i for j in range(3)] for i in range(3)
    ]  # a block lets go of its weights only then


def test_offload_says_what_cannot_be_read():
    """An error in the reading thread is the error of the edit, not a hang."""

    def read(i):
        if i == 2:
            raise ValueError("block 2 is damaged")
        return {"weight": torch.ones(2, 2)}

    blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False, device="meta") for _ in range(4))
    with pytest.raises(ValueError, match="block 2 is damaged"):
        list(Offload(blocks, read))


def test_all_that_an_edit_depends_on(model):
    """Each argument must change the result; the same ones must give it again."""
    calls = [
        ("make it night",),
        ("make it day",),
        ("make it night", REFERENCES[:1]),
        ("make it night", REFERENCES),
    ]
    results = [model.edit(CLIP, *call) for call in calls]
    results += [
        model.edit(CLIP, "make it night", **{name: value})
        for name, value in (("steps", 3), ("guidance", 4), ("shift", 7), ("seed", 1), ("fps", 2.0))
    ]
    results += [
        model.edit(CLIP, "make it night", steps=3, solver="euler")
    ]  # with two steps both solvers are the same
    assert len({result.tobytes() for result in results}) == len(results)
    assert np.array_equal(
        results[0], model.edit(CLIP, "make it night", steps=2, guidance=2, shift=3, seed=0)
    )


@pytest.mark.parametrize("shape", [(1, 33, 47), (1, 16, 16), (2, 17, 40), (7, 40, 23), (5, 32, 48)])
def test_any_size_in_is_the_same_size_out(model, shape):
    """Cropping or scaling to what the models take is what shifts an edit against its source."""
    frames = picture(*shape)
    assert model.edit(frames, "x", steps=1).shape == frames.shape
    padded = pad(frames, model.multiple(), model.vae.temporal_stride)
    assert np.array_equal(padded[: shape[0], : shape[1], : shape[2]], frames)
    whole = np.concatenate(list(model.decode(model.encode(padded), padded.shape)))
    ours = np.concatenate(list(model.decode(model.encode(frames), frames.shape)))
    assert np.array_equal(ours, whole[: shape[0], : shape[1], : shape[2]])


def test_pieces_are_the_whole(model):
    """Streamed decoding must not lose, double or reorder frames, nor round other than the whole clip does."""
    z = model.encode(CLIP)
    pieces = list(model.decode(z, CLIP.shape))
    whole = (model.vae.decode(z)[0].permute(1, 2, 3, 0) + 1) * 127.5
    whole = whole[:6, :24, :40].round().byte().numpy()
    assert len(pieces) > 1 and np.array_equal(np.concatenate(pieces), whole)


def test_progress_tells_every_phase(model):
    """The progress bar of edit.py hangs on it: phases in order, each up to its total."""
    calls = []
    model.edit(CLIP, "x", REFERENCES, steps=3, progress=lambda *call: calls.append(call))
    phases = list(dict.fromkeys(phase for phase, _, _ in calls))
    assert phases == ["understand", "encode", "denoise", "decode"]
    for phase in phases:
        steps = [(done, total) for name, done, total in calls if name == phase]
        assert steps == sorted(steps) and steps[0][0] == 0 and steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"frames": IMAGE.astype(np.float32)}, "uint8"),
        ({"frames": IMAGE[0]}, "uint8"),
        ({"frames": IMAGE[:0]}, "uint8"),
        ({"references": [IMAGE]}, "uint8"),
        ({"guidance": 0.5}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"steps": 0}, "steps"),
        ({"shift": -1.0}, "shift"),
        ({"solver": "magic"}, "solver"),
        ({"instruction": "<|image_pad|>"}, "special token"),
        ({"instruction": None}, "string"),
    ],
)
def test_arguments_that_make_no_edit(model, arguments, said):
    """A wrong dtype or a NaN must not come out as a grey picture after minutes."""
    with pytest.raises(ValueError, match=said):
        model.edit(**{"frames": IMAGE, "instruction": "x", **arguments})


@torch.inference_mode()
def test_padded_batch_is_separate_prompts(model):
    """Instruction and empty instruction differ in length: the shorter one is padded, which it must not notice."""
    for frames in (IMAGE, CLIP):
        instructions = ("a long instruction, to be padded for", "", "x")
        prompts = [model.prompt(frames, words, REFERENCES) for words in instructions]
        together = model.context(model.processor.collate(prompts), len(frames) > 1)
        for one, prompt in zip(together, prompts):
            alone = model.context(prompt, len(frames) > 1)[0]
            assert (one - alone).norm() / alone.norm() < 2e-5


@torch.inference_mode()
def test_only_the_queries_leave_the_mllm(model):
    """Off by one, and the last token of the prompt would pass for a query."""
    prompt, queries = model.prompt(IMAGE, "x"), model.config.image_queries
    before = model.context(prompt, False)

    def scramble(module, inputs, hidden):
        hidden[:, :-queries] = torch.randn_like(hidden[:, :-queries])

    hook = model.mllm.register_forward_hook(scramble)
    after = model.context(prompt, False)
    hook.remove()
    assert before.shape == (1, queries, model.config.context_dim) and torch.equal(before, after)


@torch.inference_mode()
def test_images_and_clips_have_their_own_queries(model):
    """The paper's two sets: shared or swapped ones would still run."""
    seen = {}
    for name, frames in (("image_queries", IMAGE), ("video_queries", CLIP)):
        prompt = model.prompt(frames, "x")
        seen[name] = [model.context(prompt, len(frames) > 1)]
        for changed in ("image_queries", "video_queries"):
            weight = getattr(model.connector, changed)
            kept = weight.clone()
            weight.zero_()
            seen[name].append(model.context(prompt, len(frames) > 1))
            weight.copy_(kept)
    assert [x.shape[1] for x in seen["image_queries"]] == [4] * 3 and seen["video_queries"][
        0
    ].shape[1] == 6
    before, no_image, no_video = seen["image_queries"]
    assert not torch.allclose(before, no_image) and torch.equal(before, no_video)
    before, no_image, no_video = seen["video_queries"]
    assert torch.equal(before, no_image) and not torch.allclose(before, no_video)


def test_what_the_mllm_sees_of_a_clip(model):
    """The paper: 13 frames, spread evenly; the first alone was worse. Their times are in seconds of the clip."""
    assert spread(81, 13).tolist() == [0, 7, 13, 20, 27, 33, 40, 47, 53, 60, 67, 73, 80]
    assert spread(5, 13).tolist() == [0, 1, 2, 3, 4] and spread(1, 13).tolist() == [0]
    clip = np.repeat(picture(1, 24, 40), 9, axis=0)
    prompt = model.prompt(clip, "x", fps=8.0)  # mllm_frames is 3: frames 0, 4 and 8
    assert prompt["video_grid_thw"][0, 0] == 2  # two frames to a patch, the last one doubled
    assert prompt["second_per_grid_ts"].tolist() == [2 * 4 / 8.0]  # two frames of half a second
    assert "pixel_values" not in prompt and "pixel_values_videos" not in model.prompt(IMAGE, "x")


def test_large_references_are_scaled_down(model, monkeypatch):
    """A 12-megapixel reference of a small source would cost hundreds of times the source's tokens."""
    sizes, encode = [], model.encode
    monkeypatch.setattr(
        model, "encode", lambda frames: sizes.append(frames.shape) or encode(frames)
    )
    model.edit(IMAGE, "x", [picture(480, 200), picture(10, 12)], steps=1)
    assert sizes == [(1, 24, 40, 3), (1, 48, 20, 3), (1, 10, 12, 3)]


def weights_with(folder, change):
    file = folder / "instructx" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tensors: tensors.pop("connector.mlp.2.bias"), "missing connector.mlp.2.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda tensors: tensors.update({"connector.image_queries": torch.zeros(3, 64)}),
            r"connector.image_queries is \(3, 64\), should be \(4, 64\)",
        ),
        (
            lambda tensors: tensors.pop(next(name for name in tensors if "lora_B" in name)),
            "missing base_model.*lora_B",
        ),
        (
            lambda tensors: tensors.pop("source_embedding.weight"),
            None,
        ),  # a stage 1 checkpoint has none
        (
            lambda tensors: tensors.update({"source_embedding.weight": torch.zeros(1)}),
            "source_embedding.weight is",
        ),
    ],
)
def test_own_checkpoint_that_does_not_fit(copy, change, said):
    """What strict=False would leave random or drop in silence."""
    weights_with(copy, change)
    if said:
        with pytest.raises(ValueError, match=said):
            InstructX.from_pretrained(copy)
    else:
        assert InstructX.from_pretrained(copy).dit.source_embedding is None


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system has no such call")
def test_weights_are_read_ahead_where_they_fit(tiny_weights, monkeypatch):
    """All weights and nothing else, in the order of their use; and none where the last would push out the first."""
    asked = []
    monkeypatch.setattr(
        os,
        "posix_fadvise",
        lambda file, *rest: asked.append((os.readlink(f"/proc/self/fd/{file}"), *rest)),
    )
    place = locate(tiny_weights)
    connector.read_ahead(place.values())
    files = [file for folder in place.values() for file in sorted(folder.rglob("*.safetensors"))]
    assert files and asked == [
        (str(file), start, 2**17, os.POSIX_FADV_WILLNEED)
        for file in files
        for start in range(0, file.stat().st_size, 2**17)
    ]
    asked.clear()
    size = sum(file.stat().st_size for file in files)
    monkeypatch.setattr(
        os, "sysconf", lambda name: {"SC_PHYS_PAGES": size, "SC_PAGE_SIZE": 1}[name]
    )
    connector.read_ahead(place.values())
    assert not asked


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="asks Linux what it holds in memory"
)
def test_what_is_read_ahead_lies_in_memory(tmp_path):
    """Asked for a whole file in one call, Linux reads its first 128 KB and says nothing of the rest."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(2**24))

    def share():
        with open(file, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as pages:
            held = (ctypes.c_ubyte * (len(pages) // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(pages)
            assert (
                ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(pages)), held)
                == 0
            )
            del start
            return sum(page & 1 for page in held) / len(held)

    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if share() > 0.01:
        pytest.skip("this file system lives in memory")
    connector.read_ahead([file])
    end = time.monotonic() + 20
    while share() < 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert share() == 1


def test_reading_ahead_says_nothing(tmp_path, capfd):
    """A file that cannot be read is told of where it is loaded, in one line, and not by a thread's traceback beside it."""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    reading = Thread(target=connector.read_ahead, args=([tmp_path],))
    reading.start()
    reading.join()
    assert capfd.readouterr() == ("", "")


def test_own_checkpoint_that_is_damaged(copy):
    """The error must name the file and what to look for, not the offset of a header."""
    file = copy / "instructx" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="instructx/model.safetensors"):
        InstructX.from_pretrained(copy)


@pytest.mark.parametrize("dit", [False, True])
def test_saved_and_loaded_edits_the_same(model, copy, dit):
    """Every trained weight must be in the checkpoint, among them the source embedding and the LoRA's alpha."""
    shutil.rmtree(copy / "instructx")
    model.save_pretrained(copy / "instructx", dit=dit)
    again = InstructX.from_pretrained(copy)
    assert again.trained and again.config == model.config and not again.training
    assert not [file for file in copy.rglob("*") if "partial" in file.name]
    for frames in (IMAGE, CLIP):
        assert np.array_equal(
            again.edit(frames, "x", REFERENCES), model.edit(frames, "x", REFERENCES)
        )
    assert locate(copy)["dit"] == copy / ("instructx/dit" if dit else "dit")


def test_trained_dit_replaces_the_released_one(copy):
    """From stage 2 on the DiT beside the connector counts, not the one it was started from."""
    trained = InstructX.from_pretrained(copy)
    with torch.no_grad():
        trained.dit.patch_embedding.bias.add_(1)
    trained.save_pretrained(copy / "instructx", dit=True)
    assert np.array_equal(
        InstructX.from_pretrained(copy).edit(IMAGE, "x"), trained.edit(IMAGE, "x")
    )


def test_trained_folder_from_elsewhere(copy, tmp_path):
    """Training starts from the folder of the stage before: its own DiT and MLLM must come with it, whatever lies in `folder`."""
    trained = InstructX.from_pretrained(copy)
    merge_lora(trained.mllm)
    trained.config.lora_rank = 0
    with torch.no_grad():
        trained.dit.patch_embedding.bias.add_(1)
        trained.mllm.model.norm.weight.mul_(2)
    trained.save_pretrained(tmp_path / "stage2", dit=True, mllm=True)
    again = InstructX.from_pretrained(copy, instructx=tmp_path / "stage2", guidance=3.0)
    assert again.config == dataclasses.replace(trained.config, guidance=3.0)
    assert np.array_equal(again.edit(CLIP, "x", guidance=2), trained.edit(CLIP, "x", guidance=2))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        InstructX.from_pretrained(copy, instructx=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="image_queries"):
        InstructX.from_pretrained(copy, image_queries=9)
    shutil.rmtree(copy / "instructx")
    fresh = InstructX.from_pretrained(copy, image_queries=9, lora_rank=1)
    assert fresh.connector.image_queries.shape == (9, 64) and fresh.config.lora_rank == 1


def test_connector_that_writes_the_width_of_the_dit(tiny_weights, tmp_path):
    """The other way a checkpoint may be: without text_embedding, the context already has the DiT's width."""
    shutil.copytree(tiny_weights, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / "instructx")
    model = InstructX.from_pretrained(tmp_path / "weights")
    config = InstructXConfig(
        mllm_dim=64,
        hidden_dim=32,
        context_dim=model.dit.config.dim,
        image_queries=3,
        video_queries=5,
        text_embedding=False,
        lora_rank=0,
        steps=1,
    )
    mllm = Qwen2_5_VL.from_pretrained(
        tmp_path / "weights" / "mllm"
    )  # without the LoRA of the model above
    fresh = InstructX.untrained(mllm, model.processor, model.dit, model.vae, config)
    for with_dit in (False, True):
        fresh.save_pretrained(tmp_path / "weights" / "instructx", dit=with_dit)
        again = InstructX.from_pretrained(tmp_path / "weights")
        assert same(again.edit(IMAGE, "x"), fresh.edit(IMAGE, "x"))


def test_official_downloads_side_by_side(copy):
    """The folders as they are downloaded, without renaming: told by their config.json, the VAE by its file's name."""
    shutil.rmtree(copy / "instructx")
    (copy / "mllm").rename(copy / "Qwen2.5-VL-3B-Instruct")
    (copy / "dit").rename(copy / "Wan2.1-T2V-1.3B")
    shutil.move(copy / "vae", copy / "Wan2.1-VAE")
    place = locate(copy)
    assert {name: path.name for name, path in place.items()} == {
        "mllm": "Qwen2.5-VL-3B-Instruct",
        "dit": "Wan2.1-T2V-1.3B",
        "vae": "Wan2.1-VAE",
    }
    model = InstructX.from_pretrained(copy)
    assert not model.trained and model.edit(IMAGE, "x", steps=1).shape == IMAGE.shape
    shutil.rmtree(copy / "Wan2.1-VAE")
    torch.save(model.vae.state_dict(), copy / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth")
    assert locate(copy)["vae"] == copy / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth"


def test_places_that_are_missing_or_doubled(copy, tmp_path):
    """Two DiTs side by side: to take either in silence would be a guess."""
    with pytest.raises(FileNotFoundError, match="no such folder"):
        locate(tmp_path / "nowhere")
    (copy / "dit").rename(copy / "one")
    shutil.copytree(copy / "one", copy / "two")
    with pytest.raises(ValueError, match="more than one dit.*one.*two"):
        locate(copy)
    shutil.rmtree(copy / "one"), shutil.rmtree(copy / "two")
    with pytest.raises(FileNotFoundError, match="dit/.*README"):
        locate(copy)


def test_untrained_is_the_same_every_time(tmp_path):
    """Fresh queries must not depend on what was drawn before, nor change what is drawn after."""
    folder = make_tiny_weights(tmp_path, trained=False)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = InstructX.from_pretrained(folder)
    assert torch.equal(torch.rand(1), expected)
    second = InstructX.from_pretrained(folder)
    assert not first.trained and first.config.lora_rank == 64
    for name, tensor in first.own_tensors().items():
        assert torch.equal(tensor, second.own_tensors()[name]), name


def test_precision_of_each_part(tiny_weights):
    """The VAE stays in float32, whatever the rest computes in: its rounding would be seen. So does the DiT's modulation."""
    half = InstructX.from_pretrained(tiny_weights, dtype=torch.bfloat16)
    for name, p in half.named_parameters():
        exact = (
            name.startswith("vae.")
            or name.startswith("dit.")
            and FLOAT32.search(name.removeprefix("dit."))
        )
        assert "lora_" in name or p.dtype == (torch.float32 if exact else torch.bfloat16), name
    full = InstructX.from_pretrained(tiny_weights)
    rounded, exact, other = (
        m.edit(CLIP, "x", REFERENCES, seed=seed) for m, seed in ((half, 0), (full, 0), (full, 1))
    )
    assert (
        0
        < np.abs(rounded.astype(int) - exact).mean()
        < np.abs(other.astype(int) - exact).mean() / 2
    )


@pytest.mark.parametrize("trained", [False, True])
def test_released_precisions_together(copy, trained):
    """As on the hub the MLLM is bfloat16 and the 1.3B float32: without a dtype each stays so, and they work together."""
    Qwen2_5_VL.from_pretrained(copy / "mllm", dtype=torch.bfloat16).save_pretrained(copy / "mllm")
    if not trained:
        shutil.rmtree(copy / "instructx")
    mixed = InstructX.from_pretrained(copy)
    assert (
        mixed.mllm.model.norm.weight.dtype == torch.bfloat16
        and mixed.connector.image_queries.dtype == torch.float32
    )
    result, exact = (
        mixed.edit(CLIP, "x", REFERENCES),
        InstructX.from_pretrained(copy, dtype=torch.float32).edit(CLIP, "x", REFERENCES),
    )
    assert np.abs(result.astype(int) - exact).mean() < 3


def test_config_that_is_not_ours(copy):
    """A setting that is not known would be ignored; the error lists those that are."""
    file = copy / "instructx" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "querys": 3}))
    with pytest.raises(ValueError, match="config.json.*querys.*image_queries"):
        InstructX.from_pretrained(copy)


def test_saving_that_is_interrupted(model, tmp_path, monkeypatch):
    """The checkpoint before must survive a full disk."""
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        connector,
        "save_file",
        lambda tensors, file, **rest: (Path(file).write_bytes(b"half"), 1 / 0),
    )
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_run_alone(tiny_weights):
    """`python connector.py FOLDER` is how a reader looks at the parts."""
    done = subprocess.run(
        [sys.executable, connector.__file__, tiny_weights], capture_output=True, text=True
    )
    assert (
        done.returncode == 0 and "context (1, 6, " in done.stdout and "velocity" in done.stdout
    ), done.stderr
