"""The flow-matching sampler: how noise becomes a result, and how training makes noise out of results.

One straight line joins data x and noise ε: x_σ = (1-σ)x + σε, and the model learns its direction, v = ε - x (InstructX, section 3;
Wan2.1, section 4). Sampling walks the line from σ = 1 down to 0. The network is out of sight here: a `velocity(z, t)` is all it is,
with t = 1000σ because Wan was trained on timesteps from 0 to 1000.

What is unusual: one object serves training and sampling, so both shift σ by the same formula; and UniPC, Wan's default solver, is
written for this one case (data prediction, B(h) = e^h - 1, order 2), which leaves a page of the 800 lines of its general form.

    python sampler.py [OUT.png]     # carries Gaussian noise to two moons with an exact velocity, and prints the error by steps
"""

import math
import sys

import torch


class FlowSampler:
    """Schedule, solver and noise of flow matching.

    Args:
        steps: calls of the model in one run (with guidance each is a batch of two).
        shift: s in σ' = sσ / (1 + (s-1)σ). Larger pictures need more noise to lose their layout, so more of the steps: 5 for
            video sizes, 3 for small images.
        solver: "unipc", second order, Wan's default; or "euler", first order.

    Raises ValueError for values that make no schedule.
    """

    def __init__(self, steps=50, shift=5.0, solver="unipc"):
        if steps != int(steps) or steps < 1:
            raise ValueError(f"steps is {steps}; it should be a whole number of 1 or more")
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift is {shift}; it should be a number above 0, and 1 leaves σ as it is")
        if solver not in ("unipc", "euler"):
            raise ValueError(f"solver is {solver!r}; it should be 'unipc' or 'euler'")
        self.steps, self.shift, self.solver = int(steps), shift, solver

    def shifted(self, sigma):
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def sigmas(self):
        """(steps + 1,) float64, from almost 1 down to exactly 0.

        As in Wan's own solvers: evenly spaced from 0.999 to 0, without the end, then shifted, then 0. (diffusers spaces from 1 to
        0.001 instead. Wan also rounds t down to whole numbers for the model; we hand it 1000σ as it is.)
        """
        even = torch.linspace(0.999, 0, self.steps + 1, dtype=torch.float64)[:-1]
        return torch.cat([self.shifted(even), torch.zeros(1, dtype=torch.float64)])

    def sample(self, velocity, noise, progress=None, sigmas=None):
        """Walks from `noise` (B, ...) to a result of the same shape.

        velocity(z, t) -> v like z, with t (B,) in [0, 1000], float32. `progress(done)` is called after each step. `sigmas` replaces
        the schedule: a falling row of steps + 1 numbers that ends in 0.
        """
        sigmas = self.sigmas() if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64)
        step = UniPC(sigmas) if self.solver == "unipc" else Euler(sigmas)
        z = noise
        for i, sigma in enumerate(sigmas[:-1].tolist()):
            t = torch.full((len(z),), 1000 * sigma, dtype=torch.float32, device=z.device)
            z = step(i, z, velocity(z, t))
            if progress:
                progress(i + 1)
        return z

    def draw_sigma(self, count, generator=None, uniform=False):
        """(count,) noise levels in (0, 1) to train on: logit-normal(0, 1) or uniform, then shifted."""
        draw = torch.rand(count, generator=generator) if uniform else torch.randn(count, generator=generator).sigmoid()
        return self.shifted(draw)

    def add_noise(self, x, noise, sigma):
        """x_σ for x and noise (B, ...) and sigma (B,)."""
        sigma = sigma.view(-1, *[1] * (x.ndim - 1))
        return (1 - sigma) * x + sigma * noise

    def target(self, x, noise):
        """What the model should say at any point of the line from x to noise."""
        return noise - x


class Euler:
    """One step along the velocity. Exact if the path were straight."""

    def __init__(self, sigmas):
        self.sigmas = sigmas.tolist()

    def __call__(self, i, z, v):
        return z + (self.sigmas[i + 1] - self.sigmas[i]) * v


class UniPC:
    """Second-order UniPC (Zhao et al. 2023, arXiv 2302.04867) for flow matching: a predictor, and a corrector at no further call.

    In λ = log((1-σ)/σ) the path has the exact form
        z_t = σ_t/σ_s z_s + (1-σ_t) ∫ e^(λ - λ_t) x(λ) dλ,   x = z - σv the model's guess of the data.
    With x constant over the step that is first order; the predictor lets x change at the rate seen over the last step. Once
    the model has been called at the new point, its x there gives a better rate, and the corrector redoes the last step with it.
    """

    def __init__(self, sigmas):
        self.sigmas = sigmas.tolist()
        self.lambdas = ((1 - sigmas).log() - sigmas.log()).tolist()      # the last is inf, and e^-inf = 0 is right
        self.guesses = []       # x at the last two points
        self.z = None           # where the last step set out from
        self.order = 1

    def __call__(self, i, z, v):
        guess = z - self.sigmas[i] * v
        if i > 0:
            z = self.advance(i - 1, self.z, self.order, arrived=guess)
        self.guesses = [*self.guesses[-1:], guess]
        # First order where there is no past yet, and in the last step, whose λ is infinite.
        self.order, self.z = (1 if i == 0 or i == len(self.sigmas) - 2 else 2), z
        return self.advance(i, z, self.order)

    def advance(self, i, z, order, arrived=None):
        """Step i from z; `arrived` is the model's guess at its end, where it is known already (the corrector)."""
        h = self.lambdas[i + 1] - self.lambdas[i]
        growth = -math.expm1(-h)                        # ∫ e^(λ - λ_t) dλ over the step
        now, change = self.guesses[-1], 0
        if order == 2:                                  # how x changed over the step before, per λ-length h
            ratio = (self.lambdas[i - 1] - self.lambdas[i]) / h
            past = (self.guesses[-2] - now) / ratio
        if arrived is None and order == 2:
            change = past / 2
        elif arrived is not None:
            first = 1 / growth - 1 / h                  # exact for x linear in λ, were only `arrived` used
            second = (1 + 2 * (growth / h - 1) / h) / growth
            share = (second - first) / (ratio - 1) if order == 2 else 0     # with `past` too: exact for x quadratic in λ
            change = (first - share) * (arrived - now) + share * past if order == 2 else (arrived - now) / 2
        return self.sigmas[i + 1] / self.sigmas[i] * z + (1 - self.sigmas[i + 1]) * growth * (now + change)


def guided(velocity, guidance):
    """Classifier-free guidance in one batch: `velocity` takes two copies of z, the instruction's and the empty one's, in that order.

    v = v_empty + guidance (v_instruction - v_empty). With guidance 1 that is v_instruction, and `velocity` sees z alone.
    """
    if guidance == 1:
        return velocity

    def both(z, t):
        wanted, empty = velocity(torch.cat([z, z]), torch.cat([t, t])).chunk(2)
        return empty + guidance * (wanted - empty)

    return both


def moons(count, generator):
    """(count, 2) points on two interleaved half circles."""
    angle = math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x - 0.5, y - 0.25], dim=1) * 1.5


def exact_velocity(data, blur=0.05):
    """The velocity that flow matching would learn for `data` (N, 2), each point a Gaussian of width `blur`: no network needed."""

    def velocity(z, t):
        sigma = (t / 1000).double()[:, None]                                        # (B, 1)
        scale = (((1 - sigma) * blur).square() + sigma.square())                    # variance of x_σ around each point
        away = z[:, None] - (1 - sigma)[:, None] * data                             # (B, N, 2)
        weight = (-away.square().sum(-1) / (2 * scale)).softmax(dim=1)[..., None]   # (B, N, 1)
        noise = (weight * away).sum(1) * sigma / scale                              # E[ε | z]
        clean = (weight * (data + away * ((1 - sigma) * blur**2 / scale)[:, None])).sum(1)  # E[x | z]
        return noise - clean

    return velocity


def main():
    generator = torch.Generator().manual_seed(0)
    velocity = exact_velocity(moons(400, generator))
    noise = torch.randn(1000, 2, generator=generator, dtype=torch.float64)
    truth = FlowSampler(400, shift=1.0).sample(velocity, noise)
    print("mean distance to where 400 steps end\nsteps    euler    unipc")
    for steps in (5, 10, 20, 40, 80):
        ends = {solver: FlowSampler(steps, 1.0, solver).sample(velocity, noise) for solver in ("euler", "unipc")}
        print(f"{steps:5}" + "".join(f"{(end - truth).norm(dim=1).mean():9.4f}" for end in ends.values()))
    if len(sys.argv) > 1:
        from PIL import Image, ImageDraw

        picture = Image.new("RGB", (800, 400), "white")
        for left, points in ((0, noise), (400, truth)):
            for x, y in (200 + 100 * points).tolist():
                ImageDraw.Draw(picture).circle((left + x, 400 - y), 1.5, fill=(28, 82, 226))
        picture.save(sys.argv[1])
        print(f"{sys.argv[1]}: where the points start and end")


if __name__ == "__main__":
    main()
