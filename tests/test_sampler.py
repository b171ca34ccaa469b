"""sampler.py against closed forms, and against diffusers' schedulers."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import sampler as module
from sampler import FlowSampler, guided

TOLERANCE = 2e-5


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def bent(z, t):
    """A velocity that depends on everything, and not linearly."""
    mix = torch.linspace(-1, 1, z.shape[-1] ** 2, dtype=z.dtype).view(z.shape[-1], -1).cos()
    return torch.tanh(z @ mix) * (1 + t.to(z.dtype)[:, None] / 1000) + 0.5 * z


def gaussian(mean, width):
    """Data N(mean, width²) in closed form: the velocity, and the way of noise u to any σ."""

    def velocity(z, t):
        sigma = t.double()[:, None] / 1000
        offset = (z - (1 - sigma) * mean) / (((1 - sigma) * width) ** 2 + sigma**2)
        return sigma * offset - (mean + (1 - sigma) * width**2 * offset)

    return (
        velocity,
        lambda u, sigma: (1 - sigma) * mean + math.hypot((1 - sigma) * width, sigma) * u,
    )


# The schedule.


@pytest.mark.parametrize("steps, shift", [(1, 5.0), (7, 1.0), (50, 5.0), (50, 3.0)])
def test_schedule_is_the_official_one(steps, shift):
    """Wan's FlowUniPC takes its ends from 1000 training alphas: σ starts at 0.999, not at 1."""
    alphas = np.linspace(1, 1 / 1000, 1000)[::-1]
    largest, smallest = 1 - alphas[0], 1 - alphas[-1]
    even = np.linspace(largest, smallest, steps + 1)[:-1]
    expected = np.append(shift * even / (1 + (shift - 1) * even), 0)
    sigmas = FlowSampler(steps, shift).sigmas()
    assert sigmas.dtype == torch.float64 and np.abs(sigmas.numpy() - expected).max() < 1e-12
    assert sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_what_the_schedule_says_of_diffusers():
    """What the docstring says of their schedules must stay true."""
    diffusers = pytest.importorskip("diffusers")

    def shift(sigma):
        return 5 * sigma / (1 + 4 * sigma)

    theirs = unipc(diffusers, 5.0)
    theirs.set_timesteps(50)
    expected = shift(np.linspace(1, 0.001, 51)[:-1])
    assert np.abs(theirs.sigmas[:-1].numpy() - expected).max() < 2e-6
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    euler.set_timesteps(50)
    assert np.abs(euler.sigmas[:-1].numpy() - shift(np.linspace(1, shift(0.001), 50))).max() < 2e-6


# The solvers.


def unipc(diffusers, shift):
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=2,
        solver_type="bh2",
    )


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize(
    "steps, shift", [(1, 5.0), (2, 3.0), (3, 5.0), (4, 1.0), (20, 3.0), (50, 5.0)]
)
def test_whole_trajectory_equals_diffusers(solver, steps, shift):
    """First and last steps have rules of their own, so every point of the way is compared."""
    diffusers = pytest.importorskip("diffusers")
    even = np.linspace(0.999, 0, steps + 1)[:-1]  # they shift what they are given
    if solver == "unipc":
        scheduler = unipc(diffusers, shift)
        scheduler.set_timesteps(sigmas=even)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=list(even))
    z = noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(steps))
    expected = []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        expected.append(z)
        z = scheduler.step(bent(z, (1000 * sigma).expand(4)), t, z).prev_sample
    expected.append(z)
    way = []

    def velocity(z, t):
        way.append(z)
        return bent(z, t)

    end = FlowSampler(steps, shift, solver).sample(velocity, noise)
    assert len(way) == steps
    for point, truth in zip([*way, end], expected):
        assert error(point, truth) < TOLERANCE


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_a_single_picture_is_reached_exactly(solver):
    """If the model always guesses the same x, every step is exact. float64 shows any slip."""
    x, noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = FlowSampler(9, 3.0, solver)
    sigmas, start = sampler.sigmas(), noise.clone()
    way = []

    def velocity(z, t):
        way.append(z)
        return (z - x) / sigmas[len(way) - 1]

    z = sampler.sample(velocity, (1 - sigmas[0]) * x + sigmas[0] * noise)
    assert torch.equal(noise, start)
    assert (z - x).abs().max() < 1e-12
    for point, sigma in zip(way, sigmas):
        assert (point - (1 - sigma) * x - sigma * noise).abs().max() < 1e-12


@pytest.mark.parametrize("solver, order", [("euler", 1), ("unipc", 2)])
def test_order_of_convergence(solver, order):
    """Twice the steps leave half or a quarter of the error; a slip makes any solver first order."""
    velocity, place = gaussian(mean=0.7, width=0.5)
    u = torch.tensor([[1.3], [-0.4]], dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160, 320):
        sampler = FlowSampler(steps, 1.0, solver)
        z = sampler.sample(velocity, place(u, sampler.sigmas()[0].item()))
        errors.append((z - place(u, 0.0)).abs().max().item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(measured - order) < 0.15 for measured in orders), (errors, orders)
    assert solver == "euler" or errors[0] < 0.002


def test_second_order_needs_fewer_steps():
    """What UniPC is for: at the steps and the schedule of an edit it beats Euler by far."""
    velocity, place = gaussian(mean=0.7, width=0.5)
    u = torch.tensor([[1.3], [-0.4], [0.2]], dtype=torch.float64)
    errors = {}
    for solver in ("euler", "unipc"):
        sampler = FlowSampler(50, 5.0, solver)
        z = sampler.sample(velocity, place(u, sampler.sigmas()[0].item()))
        errors[solver] = (z - place(u, 0.0)).abs().max().item()
    assert errors["unipc"] < errors["euler"] / 8


def test_the_model_is_called_once_a_step():
    """The corrector must not cost a call; t is 1000σ for each sample, in float32 as for the DiT."""
    times, done = [], []
    sampler = FlowSampler(6, 3.0)

    def velocity(z, t):
        times.append(t)
        return bent(z, t)

    z = sampler.sample(velocity, torch.randn(3, 4), progress=done.append)
    assert z.shape == (3, 4) and done == [1, 2, 3, 4, 5, 6]
    expected = (1000 * sampler.sigmas()[:-1]).float()[:, None].expand(6, 3)
    assert torch.equal(torch.stack(times), expected)


def test_a_coarse_model_does_not_make_a_coarse_result():
    """Velocities in bfloat16 must not pull z down to bfloat16: 50 roundings of z would be seen."""
    z = FlowSampler(4).sample(lambda z, t: bent(z, t).bfloat16(), torch.randn(2, 4))
    assert z.dtype == torch.float32 and not torch.equal(z, z.bfloat16().float())


# Guidance.


def test_guidance_is_one_batch():
    """Instruction first: with the halves swapped, guidance drives away from what was asked."""
    batches = []

    def velocity(z, t):
        batches.append(len(z))
        assert torch.equal(t, torch.tensor([3.0, 4.0] * (len(z) // 2)))
        return z * torch.tensor([2.0, 2.0, -1.0, -1.0])[: len(z), None]

    z, t = torch.randn(2, 3), torch.tensor([3.0, 4.0])
    assert torch.allclose(guided(velocity, 4.0)(z, t), -z + 4 * (2 * z + z))
    assert torch.allclose(guided(velocity, 0.0)(z, t), -z)
    assert torch.equal(guided(velocity, 1)(z, t), 2 * z)
    assert batches == [4, 4, 2]


# Training.


def test_noise_and_target_are_one_line():
    """The ends of the line, σ apart for each sample, and its direction by difference."""
    sampler, (x, noise) = FlowSampler(), torch.randn(2, 3, 4, 1, 2, 2, dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    noisy = sampler.add_noise(x, noise, sigma)
    assert torch.equal(noisy[0], x[0]) and torch.equal(noisy[2], noise[2])
    assert torch.allclose(noisy[1], 0.7 * x[1] + 0.3 * noise[1])
    step = (sampler.add_noise(x, noise, sigma + 1e-3) - noisy) / 1e-3
    assert torch.allclose(step, sampler.target(x, noise), atol=1e-9)
    back = noisy - sigma.view(3, 1, 1, 1, 1) * sampler.target(x, noise)
    assert torch.allclose(back, x)  # as UniPC finds x


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_noise_levels_to_train_on(shift, uniform):
    """Training must shift as sampling does; the share of draws below a level is known exactly."""
    draw = FlowSampler(shift=shift).draw_sigma(20000, torch.Generator().manual_seed(0), uniform)
    assert (
        draw.shape == (20000,)
        and draw.dtype == torch.float32
        and 0 <= draw.min()
        and draw.max() < 1
    )
    for level in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        before = level / (shift - (shift - 1) * level)  # the level before the shift
        share = (
            before
            if uniform
            else 0.5 + 0.5 * math.erf(math.log(before / (1 - before)) / math.sqrt(2))
        )
        assert abs((draw < level).float().mean().item() - share) < 0.012, level


def test_noise_levels_follow_their_generator():
    """Resumed training must draw the same levels again."""

    def draw(seed):
        return FlowSampler().draw_sigma(5, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


# Mistakes of the user.


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(steps=0), "steps is 0"),
        (dict(steps=2.5), "steps is 2.5"),
        (dict(shift=0), "shift is 0"),
        (dict(shift=-1.0), "shift is -1"),
        (dict(shift=math.nan), "shift is nan"),
        (dict(shift=math.inf), "shift is inf"),
        (dict(solver="heun"), "'heun'.*'unipc' or 'euler'"),
    ],
)
def test_settings_that_make_no_schedule(arguments, said):
    """Caught when the sampler is made, not as nan after a minute of encoding."""
    with pytest.raises(ValueError, match=said):
        FlowSampler(**arguments)


def test_command_line():
    """python sampler.py runs with torch alone, and what it prints shows the orders."""
    done = subprocess.run([sys.executable, module.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["5", "10", "20", "40", "80"]
    assert all(float(unipc) < float(euler) / 2 for _, euler, unipc in rows)
