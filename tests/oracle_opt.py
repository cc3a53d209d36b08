"""OPT's updates written a second time, from the formulas, in float64 and without modules.

Shin et al. 2025 (arXiv 2507.08387). The base's offline updates are those of its own oracle. The
pre-training's gradient is spelled out: g + c (v - alpha H v), g of L_off, v of L_on at p - alpha g,
and H v, the second derivatives of L_off along v (Pearlmutter 1994). Parameters are plain dicts.
"""

import torch
from oracle_iql import Adam, descend, double, mlp


def critic(params, s, a):
    return mlp(params, "net", torch.cat([s, a], 1))[:, 0]


def layers(params):
    """Weight and bias of the three layers."""
    values = list(params.values())
    return zip(values[::2], values[1::2], strict=True)


class OracleOPT:
    """Takes the start weights of a trainer; every method does one update in float64.

    `base` is the oracle of the offline updates: OracleTD3BC or OracleSPOT.
    """

    def __init__(self, trainer, config, base, max_action=1.0):
        self.base = base(trainer, config, max_action)
        self.config, self.max_action = config, max_action
        state = double(trainer.online_critics.state_dict())
        self.pair = [
            {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(name)}
            for name in ("first", "second")
        ]
        self.pair_target = [dict(params) for params in self.pair]
        self.adams = [Adam(config.qf_lr) for _ in self.pair]
        self.discount = config.discount

    def start_online(self):
        self.discount = getattr(self.config, "online_discount", self.discount)
        rates = {"actor": self.config.actor_lr}
        self.base.opt = {k: Adam(rates.get(k, self.config.qf_lr)) for k in self.base.now}

    def y(self, batch, noise, targets):
        """TD target (B,) from the smaller of two target critics."""
        c, base = self.config, self.base
        r, s2, d = batch[2][:, 0].double(), batch[3].double(), batch[4][:, 0].double()
        bound = c.noise_clip * self.max_action
        error = (noise.double() * c.policy_noise * self.max_action).clamp(-bound, bound)
        a2 = base.act(base.target["actor"], s2) + error
        a2 = a2.clamp(-self.max_action, self.max_action)
        values = [critic(params, s2, a2) for params in targets]
        return r + self.discount * (1 - d) * torch.minimum(*values)

    # -- pre-training

    @staticmethod
    def derivatives(p, v, batch, y):
        """Mean squared error of a critic, its gradient, and H v, spelled out (R is along v)."""
        x = torch.cat([batch[0].double(), batch[1].double()], 1)
        (w1, b1), (w2, b2), (w3, b3) = layers(p)
        (v1, c1), (v2, c2), (v3, c3) = layers(v)
        z1 = x @ w1.T + b1
        h1, m1 = z1.clamp(min=0), (z1 > 0).double()
        z2 = h1 @ w2.T + b2
        h2, m2 = z2.clamp(min=0), (z2 > 0).double()
        error = (h2 @ w3.T + b3)[:, 0] - y
        r1 = m1 * (x @ v1.T + c1)
        r2 = m2 * (h1 @ v2.T + r1 @ w2.T + c2)
        r3 = h2 @ v3.T + r2 @ w3.T + c3
        d3, e3 = 2 * error[:, None] / len(y), 2 * r3 / len(y)
        d2, e2 = (d3 @ w3) * m2, (e3 @ w3 + d3 @ v3) * m2
        d1, e1 = (d2 @ w2) * m1, (e2 @ w2 + d2 @ v2) * m1
        g = [d1.T @ x, d1.sum(0), d2.T @ h1, d2.sum(0), d3.T @ h2, d3.sum(0)]
        hv = [
            *(e1.T @ x, e1.sum(0)),
            *(e2.T @ h1 + d2.T @ r1, e2.sum(0)),
            *(e3.T @ h2 + d3.T @ r2, e3.sum(0)),
        ]
        return (error**2).mean().item(), *(
            dict(zip(p, found, strict=True)) for found in (g, hv)
        )

    def pretrain(self, offline, online, noise, number):
        c = self.config
        ys = [
            self.y(batch, normal, self.pair_target)
            for batch, normal in zip((offline, online), noise, strict=True)
        ]
        nothing = [{k: torch.zeros_like(x) for k, x in p.items()} for p in self.pair]
        first = [
            self.derivatives(p, v, offline, ys[0])
            for p, v in zip(self.pair, nothing, strict=True)
        ]
        fast = [
            {k: p[k] - c.inner_lr * g[k] for k in p}
            for p, (_, g, _) in zip(self.pair, first, strict=True)
        ]
        second = [
            self.derivatives(p, v, online, ys[1])
            for p, v in zip(fast, nothing, strict=True)
        ]
        losses = [sum(found[0] for found in both) for both in (first, second)]
        weight = min(losses) / losses[1] if c.weigh_outer else 1.0
        for p, adam, (_, g, _), (_, v, _) in zip(
            self.pair, self.adams, first, second, strict=True
        ):
            _, _, hv = self.derivatives(p, v, offline, ys[0])
            adam.step(p, {k: g[k] + weight * (v[k] - c.inner_lr * hv[k]) for k in p})
        if number % c.policy_freq == 0:
            self.follow(self.pair, self.pair_target)
        return losses

    # -- fine-tuning

    def follow(self, now, target):
        """Targets move towards their networks, in two lists of parameters."""
        tau = self.config.tau
        for source, old in zip(now, target, strict=True):
            for k in source:
                old[k] = (1 - tau) * old[k] + tau * source[k]

    def train(self, batch, noise, own_noise, kappa, support=None):
        """One online update.

        `support` takes the policy's parameters and gives what is added to the scaled -Q; without it
        -Q is not scaled.
        """
        c, base = self.config, self.base
        s, a = batch[0].double(), batch[1].double()
        names = ("critic_1", "critic_2")
        y = self.y(batch, noise, [base.target[k] for k in names])
        own_y = self.y(batch, own_noise, self.pair_target)
        losses = [
            descend(
                base.now[k], base.opt[k], lambda p: ((critic(p, s, a) - y) ** 2).mean()
            )
            for k in names
        ]
        own = [
            descend(p, adam, lambda p: ((critic(p, s, a) - own_y) ** 2).mean())
            for p, adam in zip(self.pair, self.adams, strict=True)
        ]
        base.updates += 1
        if base.updates % c.policy_freq:
            return sum(losses), sum(own), None

        def policy_loss(params):
            policy = base.act(params, s)
            q = (1 - kappa) * critic(base.now["critic_1"], s, policy)
            q = q + kappa * critic(self.pair[0], s, policy)
            if support is None:
                return -q.mean()
            return -q.mean() / q.abs().mean().detach() + support(s, policy)

        actor_loss = descend(base.now["actor"], base.opt["actor"], policy_loss)
        self.follow(
            [*base.now.values(), *self.pair], [*base.target.values(), *self.pair_target]
        )
        return sum(losses), sum(own), actor_loss
