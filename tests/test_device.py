"""What needs no GPU to go wrong on one: a tensor left on the CPU. Here a device is made up, and everything runs on it.

A tensor of that device lies on the CPU like any other, but says that it does not. As on a GPU, an operation on tensors
of both raises, numpy() does too, and only a copy moves what is in one to the other. So what runs here mixes no devices.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule, _DummyPrivateUse1Hook, _setup_privateuseone_for_python_backend)

import connector
import edit
import train
from mllm import Processor, Qwen2_5_VL
from test_train import arguments, base, data, metrics

aten = torch.ops.aten
DEVICE = "npu"      # safetensors knows it, and no other package here; torch has no such device unless a plugin adds it


class Elsewhere(torch.Tensor):
    """A tensor on the made-up device; `here` holds its numbers."""

    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=f"{DEVICE}:0")

    def __init__(self, here):
        self.here = here

    def tolist(self):
        return self.here.tolist()

    def __repr__(self):
        return f"Elsewhere({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} ran outside of the made-up device")


def elsewhere(here):
    with torch.inference_mode(here.is_inference()):     # a view of a tensor from outside of inference mode is none
        return Elsewhere(here)


def is_tensor(value):
    return isinstance(value, torch.Tensor)


class MadeUpDevice(TorchDispatchMode):
    """Inside, the device exists. `ran` counts its operations."""

    ran = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        with self:                                  # in inference mode, what is made of others comes as a whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        given = [value for value in pytree.tree_leaves((args, kwargs)) if is_tensor(value)]
        there = [isinstance(value, Elsewhere) for value in given]
        # Kernels take a single number along, but for those of optimizers.
        strangers = [value for value, is_there in zip(given, there)
                     if not is_there and (value.ndim or "_fused_" in func.__name__)]
        if any(there) and strangers and func not in (aten._to_copy.default, aten.copy_.default):
            raise RuntimeError(f"{func} on two devices: {[(value.device, tuple(value.shape)) for value in given]}")
        goes = any(there)
        if kwargs.get("device") is not None:
            goes = torch.device(kwargs["device"]).type == DEVICE
            kwargs["device"] = torch.device("cpu")
        elif func is aten.copy_.default:
            goes = there[0]
        arguments = pytree.tree_map(lambda value: value.here if isinstance(value, Elsewhere) else value, (args, kwargs))
        result = func(*arguments[0], **arguments[1])
        if not goes:
            return result
        self.ran += 1
        result = pytree.tree_map(lambda value: elsewhere(value) if is_tensor(value) else value, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if any(there) else result


class Backend(_DummyBackendModule):
    """What torch asks of a device: here, of one whose work is done as soon as it is asked for."""

    available, queue = False, Mock()

    def is_available(self):
        return self.available

    def current_stream(self):
        return self.queue

    def stream(self, queue):
        return nullcontext()

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class Hook(_DummyPrivateUse1Hook):
    def is_available(self):
        return BACKEND.available


BACKEND = Backend()
# Here and not in the fixture: torch counts devices at the first backward pass of the process, and never again.
_setup_privateuseone_for_python_backend(DEVICE, BACKEND, Hook())


@pytest.fixture
def device(monkeypatch):
    """The mode, in this thread and in those of pools."""
    for module in (connector, train):
        monkeypatch.setattr(module, "ThreadPoolExecutor", partial(ThreadPoolExecutor, initializer=MadeUpDevice().__enter__))
    monkeypatch.setattr(BACKEND, "available", True)
    torch._C._set_only_lift_cpu_tensors(True)           # torch.tensor(..., device=...) comes through the mode only with this
    with MadeUpDevice() as mode:
        yield
    torch._C._set_only_lift_cpu_tensors(False)
    assert mode.ran > 100


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("how", [[], ["--offload"], ["--quantize", "int8"], ["--tile", "64", "--guidance", "1"]])
def test_an_edit(device, tiny_weights, tmp_path, frames, how):
    """The whole way from file to file, with a reference."""
    rng, name = np.random.default_rng(0), "clip.png" if frames > 1 else "image.png"
    pictures = [Image.fromarray(rng.integers(0, 256, (72, 88, 3), np.uint8)) for _ in range(frames)]
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100)
    pictures[0].crop((0, 0, 24, 40)).save(tmp_path / "reference.png")
    results = []
    for place in (f"{DEVICE}:0", "cpu"):
        edit.main([str(tmp_path / name), "make it night", "-o", str(tmp_path / f"{place[:3]}.png"), "--ref",
                   str(tmp_path / "reference.png"), "--weights", str(tiny_weights), "--device", place, *how])
        results.append(edit.read_frames(tmp_path / f"{place[:3]}.png").frames.astype(int))
    assert results[0].shape == results[1].shape and np.abs(results[0] - results[1]).max() <= 1


@pytest.mark.parametrize("stage, more", [
    (1, []), (2, ["--muon-lr", "0.02", "--change-weight", "2"]), (3, ["--dit-lora", "2", "--gradient-checkpointing"])])
def test_training(device, arguments, data, tmp_path, stage, more):
    """Two steps, a third after going on from their checkpoint, and edits rendered by averaged weights in between."""
    runs, shown = [], data.with_name("shown.jsonl")
    lines = data.read_text().splitlines(keepends=True)
    shown.write_text(lines[0] + lines[-1])                  # an image with a reference, and a clip
    more = [*more, "--ema", "0.5", "--validate", shown, "--validate-every", "2"]
    for place, out in ((f"{DEVICE}:0", tmp_path / "there"), ("cpu", tmp_path / "here")):
        for steps in ("2", "3"):
            assert train.main(arguments(stage, *more, "--device", place, "--steps", steps, out=out)) == 0
        runs.append([row["loss"] for row in metrics(out)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)      # Muon's steps are rounded to bfloat16, all others agree to 1e-6


def test_a_caption(device, tiny_weights):
    """What no edit does: words out of the MLLM, with its cache."""
    inputs = Processor.from_pretrained(tiny_weights / "mllm")("what is this?", image=np.zeros((40, 56, 3), np.uint8))
    texts = []
    for place in (f"{DEVICE}:0", "cpu"):
        mllm, processor = Qwen2_5_VL.from_pretrained(tiny_weights / "mllm", place), Processor.from_pretrained(tiny_weights / "mllm")
        texts.append(mllm.generate(inputs, processor, 5))
    assert texts[0] == texts[1]
