"""RLPD's and WSRL's updates written a second time, from the formulas, in float64 without modules.

SAC (Haarnoja et al. 2018, arXiv 1812.05905) with N critics: Ball et al. 2023 (arXiv 2302.02948)
Algorithm 1; Zhou et al. 2024 (arXiv 2412.07762) with the penalty of CQL (arXiv 2006.04779 eq. 4)
and the bound of Cal-QL (arXiv 2303.05479 eq. 5.1). Each critic is computed alone, from its own
matrices. Parameters are plain dicts; `noise` is what the trainer drew.
"""

import math

import torch
from oracle_iql import Adam, descend, double


def normalized(x, scale, shift):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * scale + shift


def critic(params, number, s, a):
    """Q (...) of one critic at states and actions of one shape in front."""
    x = torch.cat([s, a], -1)
    for i in range(sum(k.startswith("hidden.") for k in params) // 2):
        x = x @ params[f"hidden.{i}.weight"][number] + params[f"hidden.{i}.bias"][number]
        if f"norms.{i}.weight" in params:
            own = (params[f"norms.{i}.{k}"][number] for k in ("weight", "bias"))
            x = normalized(x, *own)
        x = x * (x > 0)
    weight, bias = params["last.weight"], params["last.bias"]
    if weight.dim() == 2:  # one for all
        return x @ weight[0] + bias
    return (x @ weight[number] + bias[number])[..., 0]


def values(params, s, a, members=None):
    """A list of Q, one for each critic that is asked; more actions of a state: (B, n, A)."""
    if a.dim() > s.dim():
        s = torch.stack([s] * a.shape[1], 1)
    count = len(params["hidden.0.weight"])
    numbers = range(count) if members is None else members.tolist()
    return [critic(params, number, s, a) for number in numbers]


def gaussian(params, s, low, high):
    x = s
    names = sorted({int(k.split(".")[1]) for k in params if k.startswith("trunk.")})
    for i in names:
        weight, bias = params[f"trunk.{i}.weight"], params[f"trunk.{i}.bias"]
        if weight.dim() == 2:
            x = x @ weight.T + bias
            if i + 1 not in names:
                x = x * (x > 0)
        else:
            x = normalized(x, weight, bias)
            x = x * (x > 0)
    mean = x @ params["mean.weight"].T + params["mean.bias"]
    if "log_std" in params:
        log_std = params["log_std"] + torch.zeros_like(mean)
    else:
        log_std = x @ params["log_std.weight"].T + params["log_std.bias"]
    return mean, log_std.clamp(low, high)


def act(params, s, noise, low=-20.0, high=2.0):
    """Actions in the unit box and their log-densities, for noise (B, A) or (B, n, A)."""
    mean, log_std = gaussian(params, s, low, high)
    if noise.dim() > s.dim():
        mean, log_std = mean[:, None], log_std[:, None]
    u = mean + log_std.exp() * noise
    log_prob = -((u - mean) ** 2) / (2 * (2 * log_std).exp()) - log_std
    log_prob = log_prob - 0.5 * math.log(2 * math.pi) - torch.log1p(-(u.tanh() ** 2))
    return u.tanh(), log_prob.sum(-1)


class Oracle:
    """Takes the start weights of a trainer."""

    LOW, HIGH = -20.0, 2.0

    def __init__(self, trainer, config, action_dim, max_action=1.0):
        self.config, self.action_dim, self.max_action = config, action_dim, max_action
        names = ("critics", "actor", "temperature", "multiplier")
        parts = [name for name in names if hasattr(trainer, name)]
        self.now = {name: double(getattr(trainer, name).state_dict()) for name in parts}
        self.target = dict(self.now["critics"])
        rates = {
            "critics": config.qf_lr,
            "actor": config.actor_lr,
            "temperature": config.temperature_lr,
            "multiplier": getattr(config, "multiplier_lr", 0.0),
        }
        self.opt = {name: Adam(rates[name]) for name in parts}

    def act(self, params, s, noise):
        a, log_pi = act(params, s, noise.double(), self.LOW, self.HIGH)
        return self.max_action * a, log_pi

    def step(self, name, loss_of):
        return descend(self.now[name], self.opt[name], loss_of)

    def coast(self, *names):
        for name in names:
            zeros = {k: torch.zeros_like(v) for k, v in self.now[name].items()}
            self.opt[name].step(self.now[name], zeros)

    def step_critics(self, loss_of):
        loss = self.step("critics", loss_of)
        tau = self.config.tau
        for k, v in self.now["critics"].items():
            self.target[k] = (1 - tau) * self.target[k] + tau * v
        return loss

    def td_loss(self, params, s, a, y):
        errors = [((q - y) ** 2).mean() for q in values(params, s, a)]
        return sum(errors) / len(errors)


def minimum(tensors):
    return torch.stack(tensors).min(0).values


class OracleRLPD(Oracle):
    """`train(batch, noise, learns)` does one update in float64."""

    def temperature(self, params=None):
        return (params or self.now["temperature"])["raw"].exp()

    def train(self, batch, noise, learns):
        c = self.config
        s, a, r, s2, d = (x.double() for x in batch)
        r, d = r[:, 0], d[:, 0]
        a2, log_pi = self.act(self.now["actor"], s2, noise.backup)
        v = minimum(values(self.target, s2, a2, noise.members))
        if c.backup_entropy:
            v = v - self.temperature() * log_pi
        y = r + c.discount * (1 - d) * v
        found = {"critic_loss": self.step_critics(lambda p: self.td_loss(p, s, a, y))}
        if not learns:
            return found
        temperature, entropy = self.temperature(), []

        def policy_loss(params):
            new, log_pi = self.act(params, s, noise.policy)
            entropy.append(-log_pi.mean().detach())
            q = values(self.now["critics"], s, new)
            return (temperature * log_pi - sum(q) / len(q)).mean()

        found["actor_loss"] = self.step("actor", policy_loss)
        goal = -self.action_dim / 2
        found["temperature_loss"] = self.step(
            "temperature", lambda p: self.temperature(p) * (entropy[0] - goal)
        )
        return found


class OracleWSRL(Oracle):
    """`train(batch, noise, rows, online, release)` does one update in float64.

    The gap of a row is multiplied by its weight in the release, where there is one; the noise is
    then that of the leading rows that are kept.
    """

    LOW, HIGH = math.log(1e-5), math.log(10.0)

    def positive(self, params):
        return (1 + params["raw"].exp()).log()

    def train(self, batch, noise, rows, online, release=None):
        # What every loss of an offline update is computed with.
        old = {name: dict(params) for name, params in self.now.items()}
        found = {}
        critic_loss, gap = self.critic_loss(old, batch, noise, online, release)
        if online:
            found["critic_loss"] = self.step_critics(critic_loss)
            old["critics"] = dict(self.now["critics"])
            if self.config.zero_gradient_steps:
                self.coast("actor", "temperature")
                if gap is not None:
                    self.coast("multiplier")
                old = {name: dict(params) for name, params in self.now.items()}
        if rows is not None:
            found.update(self.policy_steps(old, rows, noise))
            if gap is not None and self.config.cql_lagrange:
                target = self.config.cql_target_action_gap
                if release is not None and self.config.dare.lagrange_gap == "weighted":
                    target = target * release.weight.double().mean()
                excess = gap - target
                found["multiplier_loss"] = self.step(
                    "multiplier", lambda p: -self.positive(p) * excess
                )
            if online and self.config.zero_gradient_steps:
                self.coast("critics")
        if not online:
            found["critic_loss"] = self.step_critics(critic_loss)
        return found

    def critic_loss(self, old, batch, noise, online, release):
        c = self.config
        s, a, r, s2, d, mc = (x.double() for x in batch)
        r, d = r[:, 0], d[:, 0]
        a2, _ = self.act(old["actor"], s2, noise.backup)
        v = minimum(values(self.target, s2, a2, noise.members))
        y = r + c.discount * (1 - d) * (v.max(1).values if v.dim() == 2 else v)
        weight = c.cql_alpha_online if online else c.cql_alpha
        if not weight:
            return lambda p: self.td_loss(p, s, a, y), None
        if c.cql_lagrange:
            weight = weight * self.positive(old["multiplier"])
        shares = torch.ones(len(s), dtype=torch.float64)
        if release is not None:
            shares = release.weight.double()
        # The rows whose gaps are asked for.
        k = len(noise.current)
        current, log_pi = self.act(old["actor"], s[:k], noise.current)
        following, next_log_pi = self.act(old["actor"], s2[:k], noise.following)
        uniform = self.max_action * noise.uniform.double()

        def gap(params):
            gaps = []
            for member in noise.penalized:
                ask = lambda x, m=member: values(params, s[:k], x, m[None])[0]  # noqa: E731
                q = [ask(x) for x in (current, following)]
                if c.base == "cal_ql":
                    q = [torch.where(x < mc[:k], mc[:k].expand_as(x), x) for x in q]
                density = math.log(0.5**self.action_dim)
                corrected = [ask(uniform) - density, q[0] - log_pi, q[1] - next_log_pi]
                soft = torch.cat(corrected, 1).exp().sum(1).log()
                gaps.append((shares[:k] * (soft - ask(a[:k]))).sum() / len(s))
            return sum(gaps) / len(gaps)

        loss = lambda p: self.td_loss(p, s, a, y) + weight * gap(p)  # noqa: E731
        return loss, gap(old["critics"])

    def policy_steps(self, old, rows, noise):
        s, s2 = (x.double() for x in rows)
        temperature = self.positive(old["temperature"])

        def policy_loss(params):
            new, log_pi = self.act(params, s, noise.policy)
            return (
                temperature * log_pi - minimum(values(old["critics"], s, new))
            ).mean()

        _, log_pi = self.act(old["actor"], s2, noise.temperature)
        entropy, goal = -log_pi.mean(), -self.action_dim
        return {
            "actor_loss": self.step("actor", policy_loss),
            "temperature_loss": self.step(
                "temperature", lambda p: self.positive(p) * (entropy - goal)
            ),
        }
