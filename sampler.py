"""Flow matching: sampling turns noise into a result, training mixes results with noise.

One straight line joins data x and noise ε: x_σ = (1-σ)x + σε. The model learns its direction,
v = ε - x (InstructX, section 3.3; Wan2.1, section 4). Sampling walks the line from σ = 1 down to
0. The network appears here only as a function `velocity(z, t)`, with t = 1000σ because Wan was
trained on timesteps from 0 to 1000.

What is unusual: one object serves training and sampling, so both shift σ by the same formula.
UniPC, Wan's default solver, is here in one variant only (it predicts x, B(h) = e^h - 1, order 2):
one page instead of 800 lines.

    python sampler.py     # errors of both solvers, with the exact velocity of two moons
"""

import argparse
import math

import torch


class FlowSampler:
    """Schedule, solver and noise of flow matching.

    Args:
        steps: model calls in one run. With guidance each call is a batch of two.
        shift: s in σ' = sσ / (1 + (s-1)σ). Larger pictures lose their layout only at higher noise,
            so more of the steps go there: 5 for video sizes, 3 for small images.
        solver: "unipc", second order, Wan's default; or "euler", first order.

    Raises ValueError for unusable arguments.
    """

    def __init__(self, steps=50, shift=5.0, solver="unipc"):
        if not (isinstance(steps, int) and steps > 0):
            raise ValueError(f"steps is {steps}; it should be a whole number of 1 or more")
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift is {shift}; it should be a number above 0; 1 shifts nothing")
        if solver not in ("unipc", "euler"):
            raise ValueError(f"solver is {solver!r}; it should be 'unipc' or 'euler'")
        self.steps, self.shift, self.solver = steps, shift, solver

    def shifted(self, sigma):
        """σ' for σ in [0, 1]."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def sigmas(self):
        """(steps + 1,) float64, from almost 1 down to exactly 0.

        As in Wan's own solver, `steps` evenly spaced values from 0.999 down to 0, without the 0,
        are shifted, and then 0 is appended. diffusers differs: UniPC goes from 1 to 0.001 without
        the 0.001, Euler from 1 to the shifted 0.001 inclusive. Wan also rounds t down to a whole
        number for the model. Here t is exactly 1000σ.
        """
        even = torch.linspace(0.999, 0, self.steps + 1, dtype=torch.float64)[:-1]
        return torch.cat([self.shifted(even), torch.zeros(1, dtype=torch.float64)])

    def sample(self, velocity, noise, progress=None):
        """Walks from `noise` (B, ...), preferably float32, to a result of the same shape.

        velocity(z, t) -> v like z, with t (B,) in [0, 1000], float32. After each step `progress`
        is called with the number of steps done.
        """
        sigmas = self.sigmas()
        step = UniPC(sigmas) if self.solver == "unipc" else Euler(sigmas)
        z = noise
        for i, sigma in enumerate(sigmas[:-1].tolist()):
            t = torch.full((len(z),), 1000 * sigma, dtype=torch.float32, device=z.device)
            z = step(i, z, velocity(z, t))
            if progress:
                progress(i + 1)
        return z

    def draw_sigma(self, count, generator=None, uniform=False):
        """(count,) noise levels to train on, float32: logit-normal(0, 1) or uniform, shifted."""
        if uniform:
            return self.shifted(torch.rand(count, generator=generator))
        return self.shifted(torch.randn(count, generator=generator).sigmoid())

    def add_noise(self, x, noise, sigma):
        """x_σ for x and noise (B, ...) and sigma (B,)."""
        sigma = sigma.view(-1, *[1] * (x.ndim - 1))
        return (1 - sigma) * x + sigma * noise

    def target(self, x, noise):
        """The velocity, constant along the line from x to noise."""
        return noise - x


class Euler:
    """One step along the velocity, exact on a straight path."""

    def __init__(self, sigmas):
        self.sigmas = sigmas.tolist()

    def __call__(self, i, z, v):
        return z + (self.sigmas[i + 1] - self.sigmas[i]) * v


class UniPC:
    """Second-order UniPC (arXiv 2302.04867) for flow matching.

    A step has a predictor and a corrector. The corrector needs no further call of the model.
    Let λ = log((1-σ)/σ), and let x = z - σv be the model's estimate of the data. A step from σ to
    τ is exactly
        z_τ = τ/σ z_σ + (1-τ) ∫ e^(λ - λ_τ) x(λ) dλ.
    The only error is that of approximating x(λ) between the points. Let r run from 0 to 1 over the
    step; the previous point then lies at some r < 0. A constant x gives Euler's step. The
    predictor extrapolates x linearly from the last two points. After the model has been called at
    r = 1, the corrector repeats the step with a parabola through all three points.
    """

    def __init__(self, sigmas):
        self.sigmas, self.last = sigmas.tolist(), len(sigmas) - 2
        self.lambdas = ((1 - sigmas).log() - sigmas.log()).tolist()  # ±inf at σ = 0, 1: harmless
        self.x, self.z = [], None  # x at the last two points, and z at the start of the step

    def __call__(self, i, z, v):
        x = z - self.sigmas[i] * v
        if i > 0:
            z = self.advance(i - 1, arrived=x)
        self.x, self.z = [*self.x[-1:], x], z
        return self.advance(i)

    def advance(self, i, arrived=None):
        """Step i of the predictor or, if x at its end (`arrived`) is known, of the corrector."""
        h = self.lambdas[i + 1] - self.lambdas[i]
        weight = -math.expm1(-h)  # ∫ e^(λ - λ_τ) dλ
        now, change = self.x[-1], 0  # x at r = 0, and its mean change over the step
        second_order = 0 < i < self.last  # a previous point exists, and h is finite
        if second_order:
            r = (self.lambdas[i - 1] - self.lambdas[i]) / h
            slope = (self.x[-2] - now) / r
        if arrived is None and second_order:
            change = slope / 2  # UniPC's variant bh2 takes 1/2 as the mean of r
        elif arrived is not None and not second_order:
            change = (arrived - now) / 2
        elif arrived is not None:
            mean_r = (1 - weight / h) / weight  # mean of r, weighted by e^λ
            mean_r2 = (1 - 2 * (1 - weight / h) / h) / weight  # and of r squared
            slope_weight = (mean_r2 - mean_r) / (r - 1)
            change = slope_weight * slope + (mean_r - slope_weight) * (arrived - now)
        sigma, tau = self.sigmas[i : i + 2]
        return tau / sigma * self.z + (1 - tau) * weight * (now + change)


def guided(velocity, guidance):
    """Classifier-free guidance (arXiv 2207.12598) in one batch.

    The batch holds z twice, for the instruction and then for the empty instruction:
    v = v_empty + guidance (v_instruction - v_empty). Only the difference that the instruction
    makes is amplified. With guidance 1 the batch holds z once.
    """
    if guidance == 1:
        return velocity

    def guided_velocity(z, t):
        instructed, empty = velocity(torch.cat([z, z]), torch.cat([t, t])).chunk(2)
        return empty + guidance * (instructed - empty)

    return guided_velocity


# A demonstration: a velocity without a network.


def exact_velocity(data, blur):
    """E[ε - x | z], the velocity of a perfect model of `data` (N, D), blurred by Gaussians."""

    def velocity(z, t):
        sigma = (t.double() / 1000).view(-1, 1)
        variance = ((1 - sigma) * blur).square() + sigma.square()  # (B, 1) of x_σ around a point
        away = z[:, None] - (1 - sigma)[:, None] * data  # (B, N, D)
        logits = -away.square().sum(-1) / (2 * variance)
        posterior = logits.softmax(dim=1)  # (B, N) of each point, given z
        offset = (posterior[:, :, None] * away).sum(dim=1) / variance  # (B, D)
        return sigma * offset - (posterior @ data + (1 - sigma) * blur**2 * offset)

    return velocity


def main():
    """Samples two moons from noise, and prints the error of each solver."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    angle = torch.linspace(0, math.pi, 50, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    moons = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper])  # (100, 2)
    velocity = exact_velocity(1.5 * (moons - torch.tensor([0.5, 0.25])), blur=0.05)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 2, dtype=torch.float64, generator=generator)
    end = FlowSampler(320, shift=1.0).sample(velocity, noise)
    print("steps    euler    unipc   (mean distance to where 320 steps of unipc end)")
    for steps in (5, 10, 20, 40, 80):
        errors = []
        for solver in ("euler", "unipc"):
            z = FlowSampler(steps, 1.0, solver).sample(velocity, noise)
            errors.append((z - end).norm(dim=1).mean().item())
        print(f"{steps:5} {errors[0]:8.4f} {errors[1]:8.4f}")


if __name__ == "__main__":
    main()
