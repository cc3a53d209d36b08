"""IQL's update written a second time, from the formulas, in float64 and without modules.

Kostrikov et al. 2021 (arXiv 2110.06169) eq. 5-7 in CORL's order: V, Q with the V of before,
target, actor with the advantage of before. Parameters are plain dicts; Adam is spelled out.
DARE's rows (eq. 15, 16, 35) are the same formulas with a weight per row.
"""

import math

import torch


def double(state_dict):
    return {k: v.detach().double().clone() for k, v in state_dict.items()}


def mlp(params, prefix, x, layers=(0, 2, 4)):
    for i in layers:
        x = x @ params[f"{prefix}.{i}.weight"].T + params[f"{prefix}.{i}.bias"]
        if i != layers[-1]:
            x = x * (x > 0)
    return x


class Adam:
    def __init__(self, lr):
        self.lr, self.t, self.m, self.v = lr, 0, {}, {}

    def step(self, params, grads):
        self.t += 1
        for k, g in grads.items():
            self.m[k] = 0.9 * self.m.get(k, torch.zeros_like(g)) + 0.1 * g
            self.v[k] = 0.999 * self.v.get(k, torch.zeros_like(g)) + 0.001 * g * g
            m_hat = self.m[k] / (1 - 0.9**self.t)
            v_hat = self.v[k] / (1 - 0.999**self.t)
            params[k] = params[k] - self.lr * m_hat / (v_hat.sqrt() + 1e-8)


def descend(params, optimizer, loss_of):
    leaves = {k: v.clone().requires_grad_(True) for k, v in params.items()}
    loss = loss_of(leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    optimizer.step(params, dict(zip(leaves, grads, strict=True)))
    return loss.item()


class OracleIQL:
    """Takes the start weights of a trainer; `train(batch, ...)` does one update in float64."""

    def __init__(
        self, trainer, beta, iql_tau, discount, tau, lr, max_steps, deterministic
    ):
        self.q = double(trainer.qf.state_dict())
        self.q_target = double(trainer.q_target.state_dict())
        self.v = double(trainer.vf.state_dict())
        self.actor = double(trainer.actor.state_dict())
        self.beta, self.iql_tau, self.discount, self.tau = beta, iql_tau, discount, tau
        self.lr, self.max_steps, self.deterministic = lr, max_steps, deterministic
        self.opt = {k: Adam(lr) for k in ("q", "v", "actor")}
        self.updates = 0

    def both(self, params, s, a):
        sa = torch.cat([s, a], 1)
        return mlp(params, "q1.net", sa)[:, 0], mlp(params, "q2.net", sa)[:, 0]

    def value(self, params, s):
        return mlp(params, "v.net", s)[:, 0]

    def mean_std(self, params, s):
        mean = torch.tanh(mlp(params, "net.net", s))
        if self.deterministic:
            return mean, None
        return mean, params["log_std"].clamp(-20, 2).exp()

    def train(self, batch, weight=None, dare=None):
        """`dare`: noise (B, A), backup_noise (n, B, A), entropy_alpha, value, policy."""
        s, a, r, s2, d = (x.double() for x in batch)
        r, d = r[:, 0], d[:, 0]
        w = None if weight is None else weight.double()
        next_v = self.value(self.v, s2)
        if w is not None:
            mean, std = self.mean_std(self.actor, s2)
            candidates = (mean + std * dare["backup_noise"].double()).clamp(-1, 1)
            q = [torch.minimum(*self.both(self.q_target, s2, c)) for c in candidates]
            next_v = w * next_v + (1 - w) * torch.stack(q).max(0).values
        target_q = torch.minimum(*self.both(self.q_target, s, a))
        adv = target_q - self.value(self.v, s)

        def v_loss(params):
            u = target_q - self.value(params, s)
            tau = torch.full_like(u, self.iql_tau)
            if w is not None and dare["value"] == "iv":
                tau = w * self.iql_tau + (1 - w) * 0.99
            rows = torch.where(u < 0, 1 - tau, tau) * u**2
            if w is not None and dare["value"] == "offline":
                rows = rows * w
            return rows.mean()

        losses = [descend(self.v, self.opt["v"], v_loss)]
        y = r + (1 - d) * self.discount * next_v

        def q_loss(params):
            q1, q2 = self.both(params, s, a)
            return 0.5 * (((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean())

        losses.append(descend(self.q, self.opt["q"], q_loss))
        for k in self.q:
            self.q_target[k] = (1 - self.tau) * self.q_target[k] + self.tau * self.q[k]

        def actor_loss(params):
            mean, std = self.mean_std(params, s)
            if self.deterministic:
                bc = ((mean - a) ** 2).sum(1)
            else:
                z = (a - mean) / std
                bc = (0.5 * z**2 + std.log() + 0.5 * math.log(2 * math.pi)).sum(1)
            rows = (self.beta * adv).exp().clamp(max=100.0) * bc
            if w is not None and dare["policy"] == "sac":
                noise = dare["noise"].double()
                new = mean + std * noise
                log_prob = (
                    -0.5 * noise**2 - std.log() - 0.5 * math.log(2 * math.pi)
                ).sum(1)
                q = torch.minimum(*self.both(self.q, s, new.clamp(-1, 1)))
                released = dare["entropy_alpha"] * log_prob - q
                rows = w * rows + (1 - w) * released
            return rows.mean()

        anneal = 0.5 * (1 + math.cos(math.pi * self.updates / self.max_steps))
        self.opt["actor"].lr = self.lr * anneal
        losses.append(descend(self.actor, self.opt["actor"], actor_loss))
        self.updates += 1
        return losses
