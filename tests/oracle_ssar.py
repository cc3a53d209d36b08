"""SSAR's updates written a second time, from the formulas, in float64 and without modules.

Luo et al. 2025 (arXiv 2505.19923) eq. 5 to 14 in the public code's order of steps: TD3+BC(SA) and
CQL(SA) with the IQL filter's update and the threshold's schedule. Parameters are plain dicts.
"""

import math

import torch
from oracle_cql import gradients, leaves_of, mean_std, policy
from oracle_iql import Adam, descend, double, mlp


def normed(params, prefix, x):
    """A network with normalized layers: what has two dimensions is linear, ReLU comes last."""
    numbers = sorted({int(k.split(".")[1]) for k in params if k.startswith(prefix)})
    for i in numbers:
        weight, bias = params[f"{prefix}.{i}.weight"], params[f"{prefix}.{i}.bias"]
        if weight.dim() == 2:
            x = x @ weight.T + bias
            continue
        mean = x.mean(-1, keepdim=True)
        spread = ((x - mean) ** 2).mean(-1, keepdim=True)
        x = (x - mean) / (spread + 1e-5).sqrt() * weight + bias
        x = x * (x > 0)
    return x[..., 0]


class Coefficient:
    """beta, its optimizer with a gradient of at most 0.5, and n."""

    def __init__(self, trainer, config, beta_init):
        self.now, self.highest = double(trainer.beta.state_dict()), 1.5 * beta_init
        self.opt, self.n, self.rising = Adam(config.beta_lr), config.n_start, True
        self.config = config

    def of(self, params, s):
        out = mlp(params, "net", s, (0, 2, 4, 6))[:, 0]
        return self.highest / (1 + (-out).exp())

    def step(self, s, gaps, trust, due):
        leaves = leaves_of(self.now)
        loss = (gaps * trust * self.of(leaves, s)).mean()
        found = gradients(loss, leaves)
        flagged = gaps[trust == 1]
        if due and self.rising and len(flagged):
            if flagged.mean() > 0:
                self.rising = False
            else:
                c = self.config
                self.n = min(c.n_end, self.n + (c.n_end - c.n_start) / c.n_raises)
        norm = math.sqrt(sum((g**2).sum().item() for g in found.values()))
        shorter = min(1.0, 0.5 / (norm + 1e-6))
        self.opt.step(self.now, {k: g * shorter for k, g in found.items()})
        return loss.item(), norm


class OracleTD3BCSA:
    """Takes the start weights of a trainer; `train` does one update in float64."""

    NETWORKS = ("actor", "critic_1", "critic_2")

    def __init__(self, trainer, config, max_action=1.0):
        self.now = {k: double(getattr(trainer, k).state_dict()) for k in self.NETWORKS}
        self.target = {k: dict(v) for k, v in self.now.items()}
        rates = {"actor": config.actor_lr}
        self.opt = {k: Adam(rates.get(k, config.qf_lr)) for k in self.NETWORKS}
        self.beta = Coefficient(trainer, config, 1 / config.alpha)
        self.config, self.max_action, self.updates = config, max_action, 0

    def act(self, params, s):
        return self.max_action * torch.tanh(mlp(params, "net", s))

    def q(self, params, s, a):
        return normed(params, "net", torch.cat([s, a], 1))

    def train(self, batch, noise, trust, decay=1.0, learn=True):
        """noise (B, A) standard normal, trust (B,)."""
        c, top = self.config, self.max_action
        s, a, r, s2, d = (x.double() for x in batch)
        r, d, trust = r[:, 0], d[:, 0], trust.double()
        bound = c.noise_clip * top
        error = (noise.double() * c.policy_noise * top).clamp(-bound, bound)
        a2 = (self.act(self.target["actor"], s2) + error).clamp(-top, top)
        values = [self.q(self.target[k], s2, a2) for k in self.NETWORKS[1:]]
        y = r + c.discount * (1 - d) * torch.minimum(*values)
        for k in self.NETWORKS[1:]:
            descend(
                self.now[k], self.opt[k], lambda p: ((self.q(p, s, a) - y) ** 2).mean()
            )
        self.updates += 1
        if self.updates % c.policy_freq:
            return None
        weight = self.beta.of(self.beta.now, s) * decay
        weight = weight * trust if c.trust_penalty else weight
        before = self.act(self.now["actor"], s)

        def policy_loss(params):
            out = self.act(params, s)
            q = self.q(self.now["critic_1"], s, out)
            distance = weight[:, None] * (out - a) ** 2
            return -q.mean() / q.abs().mean().detach() + distance.mean()

        loss = descend(self.now["actor"], self.opt["actor"], policy_loss)
        if learn:
            errors = ((before - a) ** 2).clamp(max=1.0).mean(1)
            gaps = self.beta.n**2 * c.delta**2 - errors
            self.beta.step(s, gaps, trust, self.updates % c.n_period == 0)
        for k in self.NETWORKS:
            for name, value in self.now[k].items():
                old = self.target[k][name]
                self.target[k][name] = (1 - c.tau) * old + c.tau * value
        return loss


def log_densities(mean, std, a):
    """Of tanh of a normal, each dimension alone."""
    x = 0.5 * ((1 + a) / (1 - a)).log()
    normal = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return normal - (1 - a**2).log()


class OracleCQLSA:
    """Takes the start weights of a trainer; `train` does one update in float64."""

    def __init__(self, trainer, config, actions, max_action=1.0):
        self.config, self.max_action, self.actions = config, max_action, actions
        self.no_tanh = False
        self.q = [double(c.state_dict()) for c in (trainer.critic_1, trainer.critic_2)]
        self.target = [dict(q) for q in self.q]
        self.actor = double(trainer.actor.state_dict())
        zero = torch.zeros((), dtype=torch.float64)
        self.scalars = {"log_alpha": zero, "log_alpha_prime": zero + 1.0}
        self.opt = {
            "actor": Adam(config.policy_lr),
            "q": [Adam(config.qf_lr), Adam(config.qf_lr)],
            "log_alpha": Adam(config.policy_lr),
            "log_alpha_prime": Adam(config.qf_lr),
        }
        self.beta = Coefficient(trainer, config, config.cql_alpha)
        self.updates = 0

    def value(self, params, s, a):
        if a.dim() == 3:
            s = s[:, None].expand(-1, a.shape[1], -1)
        return normed(params, "network", torch.cat([s, a], -1))

    def train(self, batch, noise, trust, decay=1.0, learn=True, release=None):
        """noise: the trainer's `Noise`; trust (B,); release (B,), weights of another method."""
        c = self.config
        s, a, r, s2, d = (x.double() for x in batch)
        a = a.clamp(-0.9999 * self.max_action, 0.9999 * self.max_action)
        r, d, trust = r[:, 0], d[:, 0], trust.double()
        noise = type(noise)(*(x.double() for x in noise))
        self.updates += 1
        alpha = self.scalars["log_alpha"].exp() * c.alpha_multiplier
        leaves = leaves_of(self.actor)
        new, log_pi = policy(leaves, s, noise.policy, self)
        alpha_gradient = -(log_pi.mean() - self.actions).detach()
        best = torch.minimum(*(self.value(q, s, new) for q in self.q))
        cloned = c.actor_bc_weight * ((new - a) ** 2).sum(1)
        actor_loss = (alpha * log_pi - best + cloned).mean()
        actor_gradient = gradients(actor_loss, leaves)
        y = self.td_target(s2, r, d, noise)
        weight = self.beta.of(self.beta.now, s) * decay
        weight = weight * trust if c.trust_penalty else weight
        weight = weight if release is None else weight * release.double()
        # Gaps are known of the leading rows that there is noise for; the others weigh 0.
        rows = len(noise.uniform)
        weight, known = weight[:rows], (s[:rows], a[:rows], s2[:rows], noise)
        multiplier = self.scalars["log_alpha_prime"].exp() if c.cql_lagrange else 1.0
        aim = c.cql_target_action_gap if c.cql_lagrange else 0.0
        critic_gradients, excesses, conservative = [], [], 0.0
        for params in self.q:
            leaves = leaves_of(params)
            gap = self.gap(leaves, *known)
            conservative += (weight * gap).sum().item() / 2
            excess = (weight * (gap - aim)).sum() / len(s)
            td = ((self.value(leaves, s, a) - y) ** 2).mean()
            critic_gradients.append(gradients(td + multiplier * excess, leaves))
            excesses.append(excess.detach())
        if release is not None:
            self.conservative = conservative / release.sum().item() if rows else None
        if c.cql_lagrange:
            slope = -0.5 * multiplier * sum(excesses)
            self.opt["log_alpha_prime"].step(self.scalars, {"log_alpha_prime": slope})
        self.opt["log_alpha"].step(self.scalars, {"log_alpha": alpha_gradient})
        self.opt["actor"].step(self.actor, actor_gradient)
        for params, opt, found in zip(
            self.q, self.opt["q"], critic_gradients, strict=True
        ):
            opt.step(params, found)
        if learn:
            gaps = self.beta_gaps(s, a)
            self.beta.step(s, gaps, trust, self.updates % c.n_period == 0)
        tau = c.soft_target_update_rate
        for target, params in zip(self.target, self.q, strict=True):
            for k in target:
                target[k] = (1 - tau) * target[k] + tau * params[k]
        return actor_loss.item()

    def td_target(self, s2, r, d, noise):
        next_a, _ = policy(self.actor, s2, noise.backup, self)
        value = torch.minimum(*(self.value(q, s2, next_a) for q in self.target))
        value = value.max(1).values if self.config.cql_max_target_backup else value
        return r + (1 - d) * self.config.discount * value

    def gap(self, params, s, a, s2, noise):
        c = self.config
        current, log_current = policy(self.actor, s, noise.current, self)
        ahead, log_ahead = policy(self.actor, s2, noise.following, self)
        z = [
            self.value(params, s, noise.uniform) - self.actions * math.log(0.5),
            self.value(params, s, ahead) - log_ahead,
            self.value(params, s, current) - log_current,
        ]
        soft = c.cql_temp * torch.logsumexp(torch.cat(z, 1) / c.cql_temp, 1)
        rows = soft - self.value(params, s, a)
        return rows.clamp(c.cql_clip_diff_min, c.cql_clip_diff_max)

    def beta_gaps(self, s, a):
        mean, std = mean_std(self.actor, s)

        def away(n):
            sides, near = [], n * self.config.threshold_cap
            for side in (n, -n):
                u = torch.tanh(mean + side * std).clamp(-0.99999, 0.99999)
                u = torch.minimum(
                    torch.maximum(u, mean.tanh() - near), mean.tanh() + near
                )
                sides.append(log_densities(mean, std, u))
            return torch.minimum(*sides)

        data = torch.maximum(log_densities(mean, std, a / self.max_action), away(10.0))
        return (data - away(self.beta.n)).mean(1)


class OracleFilter:
    """IQL's critics and values without a policy."""

    def __init__(self, made):
        self.q, self.v = (
            double(made.critics.state_dict()),
            double(made.value.state_dict()),
        )
        self.target = dict(self.q)
        self.opt, self.made = (Adam(3e-4), Adam(3e-4)), made

    def both(self, params, s, a):
        x = torch.cat([s, a], 1)
        return mlp(params, "q1", x)[:, 0], mlp(params, "q2", x)[:, 0]

    def values(self, params, s):
        return mlp({f"v.{k}": x for k, x in params.items()}, "v", s)[:, 0]

    def train(self, batch):
        s, a, r, s2, d = (x.double() for x in batch)
        r, d = r[:, 0], d[:, 0]
        y = r + self.made.discount * (1 - d) * self.values(self.v, s2)
        target = torch.minimum(*self.both(self.target, s, a))

        def v_loss(params):
            u = target - self.values(params, s)
            tau = self.made.expectile
            return torch.where(u < 0, (1 - tau) * u**2, tau * u**2).mean()

        def q_loss(params):
            return sum(0.5 * ((q - y) ** 2).mean() for q in self.both(params, s, a))

        losses = [descend(self.v, self.opt[0], v_loss)]
        losses.append(descend(self.q, self.opt[1], q_loss))
        for k in self.q:
            self.target[k] = 0.995 * self.target[k] + 0.005 * self.q[k]
        return losses
