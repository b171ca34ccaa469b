"""plan.py: what it says is what a real step holds and keeps, at a size that fits here."""

import math
import shutil

import plan
import pytest
import torch
from test_train import FRESH, arguments, base, checkpoint, data, out  # noqa: F401

import train
from dit import step_flops


@pytest.fixture
def configs(base, tmp_path):  # noqa: F811
    """A weights folder of config.json files alone, as before a download."""
    for name in ("mllm", "dit", "vae"):
        (tmp_path / "weights" / name).mkdir(parents=True)
        shutil.copy(base / name / "config.json", tmp_path / "weights" / name)
    return tmp_path / "weights"


@pytest.mark.parametrize("more", [[], ["--dit-lora", 2], ["--muon-lr", 0.02]])
def test_held_bytes_are_those_of_a_run(arguments, out, more):  # noqa: F811
    """A GPU that is rented by the plan must hold weights, gradients and moments."""
    parameters, line = {}, arguments(2, "--video-share", 0, "--steps", 1, *more)

    def build(args):
        model = train.build_model(args)
        parameters.update(model.named_parameters())
        return model

    assert train.main(line, build) == 0
    state = [t.numel() for name, t in checkpoint(out, 1).items() if not name.startswith("step ")]
    others = [p.numel() for p in parameters.values()]  # gradients, and frozen weights
    unseen = 2 * parameters["connector.video_queries"].numel()  # no clip yet, so no moments
    held = plan.held_bytes(parameters, train.settings(line))
    assert 4 * (sum(state) + sum(others) + unseen) == held


def test_kept_bytes_and_flop_are_those_of_a_step(configs):
    """Activations are most of what a GPU needs: measured in a real forward pass of the DiT."""
    line = ["tiny", "--weights", str(configs), "--stage", "2", "--precision", "float32", *FRESH]
    options, args = plan.parse(line)

    def build(layers):
        return plan.build(options, args, layers)

    def denoise(model):
        z, context = torch.randn(2, 16, 1, 8, 8), torch.randn(2, 4, 48, requires_grad=True)
        return model.dit(z, torch.zeros(2), context, z)

    (forward, backward, planned), layer = plan.cost_of_layers(build, denoise, 2)
    model, kept = plan.build(options, args).to_empty(device="cpu"), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        denoise(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    assert math.isclose(planned, real, rel_tol=0.02)
    flop = step_flops(model.dit.config, 16, 4)
    assert 0.9 < layer[0] * 2 / (2 * flop) < 1.1
    assert 1.8 < backward / forward < 2.2


def test_a_plan_from_the_terminal(configs, capsys):
    """Before anything is downloaded: released sizes, or those of config.json files."""
    line = f"tiny --stage 2 --frames 5 --area 4096 --gpus 16 --gpu-memory 0.001 --weights {configs}"
    assert plan.main([*line.split(), *FRESH]) == 0
    text = capsys.readouterr().out
    assert "image step: 128 of 16 tokens" in text and "clip step: 32 of 32 tokens" in text
    assert "20000 steps" in text and "more than 0.001 GB" in text
    assert "8 of 16 GPUs have nothing to do" in text
    options, args = plan.parse(["1.3B", "--stage", "1"])
    released = plan.build(options, args)
    assert round(sum(p.numel() for p in released.dit.parameters()) / 1e6) == 1419
    assert plan.main(["1.3B", "--stage", "1", "--weights", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("plan.py: error: nowhere")
