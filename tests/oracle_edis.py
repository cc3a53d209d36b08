"""EDIS's diffusion model and energies written a second time, in float64 and without modules.

Karras et al. 2022 (arXiv 2206.00364), Table 1 and Algorithm 2, and InfoNCE. Parameters are plain
dicts; Adam with the clipped gradient, the cosine and the averaged weights are spelled out.
"""

import math

import torch
from oracle_iql import double


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def denoise(p, x, sigma, label=None):
    """D(x; sigma) of (B, D), (B,) and label numbers, from a `Denoiser`'s parameters."""
    c = (sigma.log() / 4)[:, None]
    angles = 2 * math.pi * c * p["noise.0.frequencies"]
    h = linear(p, "noise.1", torch.cat([c, angles.sin(), angles.cos()], 1))
    h = linear(p, "noise.3", h / (1 + (-h).exp()))
    if label is not None:
        h = h + torch.stack([p["label.weight"][k] for k in label])
    s = sigma[:, None]
    h = linear(p, "first", linear(p, "project", x / (s**2 + 1).sqrt()) + h)
    depth = len({name.split(".")[1] for name in p if name.startswith("blocks")})
    for i in range(depth):
        h = h + linear(p, f"blocks.{i}", h * (h > 0))
    out = linear(p, "last", h * (h > 0))
    return x / (s**2 + 1) + s / (s**2 + 1).sqrt() * out


def denoising_loss(p, x, level, noise, label=None):
    sigma = (-1.2 + 1.2 * level).exp()
    weight = (sigma**2 + 1) / sigma**2
    error = denoise(p, x + sigma[:, None] * noise, sigma, label) - x
    return (weight * (error**2).mean(1)).mean()


class OracleFit:
    """Takes the start weights of a fit; `update` makes one step in float64."""

    def __init__(self, fit, lr, updates):
        self.p, self.lr, self.updates = double(fit.denoiser.state_dict()), lr, updates
        self.average = dict(self.p)
        self.m = {k: torch.zeros_like(v) for k, v in self.p.items()}
        self.v, self.done = dict(self.m), 0

    def update(self, x, level, noise, label=None):
        leaves = {k: v.clone().requires_grad_(True) for k, v in self.p.items()}
        batch = x.double(), level.double(), noise.double()
        loss = denoising_loss(leaves, *batch, label)
        learned = [k for k in leaves if "frequencies" not in k]
        grads = torch.autograd.grad(loss, [leaves[k] for k in learned])
        norm = sum(float((g**2).sum()) for g in grads) ** 0.5
        rate = self.lr * (1 + math.cos(math.pi * self.done / self.updates)) / 2
        t = self.done + 1
        for k, g in zip(learned, grads, strict=True):
            g = g * min(1.0, 1.0 / (norm + 1e-6))
            self.m[k] = 0.9 * self.m[k] + 0.1 * g
            self.v[k] = 0.99 * self.v[k] + 0.01 * g**2
            step = self.m[k] / (1 - 0.9**t) / ((self.v[k] / (1 - 0.99**t)).sqrt() + 1e-8)
            self.p[k] = self.p[k] - rate * step
        if self.done % 10 == 0:
            beyond = self.done - 100
            keep = 0.0 if beyond <= 0 else min(0.995, 1 - (1 + beyond) ** (-2 / 3))
            for k, v in self.p.items():
                self.average[k] = keep * self.average[k] + (1 - keep) * v
        self.done = t
        return loss.item()


def levels(n):
    a, b = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return [(a + i / (n - 1) * (b - a)) ** 7 for i in range(n)] + [0.0]


def heun(model, x, n, i, noise, pull=lambda x, sigma: 0.0):
    """One step of Algorithm 2 from level i, model(x, sigma) -> D."""
    now, after = levels(n)[i], levels(n)[i + 1]
    gamma = min(80 / n, 2**0.5 - 1) if 0.05 <= now <= 50 else 0.0
    hat = now + gamma * now
    x_hat = x + (hat**2 - now**2) ** 0.5 * 1.003 * noise
    d = (x_hat - model(x_hat, hat)) / hat + pull(x_hat, hat)
    euler = x_hat + (after - hat) * d
    if after == 0:
        return euler
    d_after = (euler - model(euler, after)) / after + pull(euler, after)
    return x_hat + (after - hat) * (d + d_after) / 2


def info_nce(positive, negative):
    """Groups of energies, lists of lists -> one loss per positive, by plain loops."""
    found = []
    for pos, neg in zip(positive, negative, strict=True):
        total = sum(math.exp(-e) for e in [*pos, *neg])
        found.append([-math.log(math.exp(-e) / total) for e in pos])
    return found
