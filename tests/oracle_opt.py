"""OPT's updates written a second time, from the formulas, in float64 and without modules.

Shin et al. 2025 (arXiv 2507.08387). The base's offline updates are those of its own oracle. The
pre-training's gradient is spelled out: g + c (v - alpha H v), g of L_off, v of L_on at p - alpha g,
and H v, the second derivatives of L_off along v, by a central difference of first ones. Parameters
are plain dicts.
"""

import torch
from oracle_iql import Adam, descend, double, mlp


def critic(params, s, a):
    return mlp(params, "net", torch.cat([s, a], 1))[:, 0]


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
        self.base.opt = {
            k: Adam(rates.get(k, self.config.qf_lr)) for k in self.base.now
        }

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

    def gradients(self, pair, batch, y):
        """Sum of both critics' squared errors, and its gradient for each of them."""
        s, a = batch[0].double(), batch[1].double()
        leaves = [
            {k: v.clone().requires_grad_(True) for k, v in params.items()}
            for params in pair
        ]
        loss = sum(((critic(params, s, a) - y) ** 2).mean() for params in leaves)
        found = [
            torch.autograd.grad(loss, list(params.values()), retain_graph=True)
            for params in leaves
        ]
        pairs = zip(leaves, found, strict=True)
        return loss.item(), [dict(zip(p, g, strict=True)) for p, g in pairs]

    @staticmethod
    def moved(pair, direction, length):
        """The parameters, so far along a direction."""
        pairs = zip(pair, direction, strict=True)
        return [{k: p[k] + length * d[k] for k in p} for p, d in pairs]

    def pretrain(self, offline, online, noise, number):
        c = self.config
        ys = [
            self.y(batch, normal, self.pair_target)
            for batch, normal in zip((offline, online), noise, strict=True)
        ]
        first, g = self.gradients(self.pair, offline, ys[0])
        fast = self.moved(self.pair, g, -c.inner_lr)
        second, v = self.gradients(fast, online, ys[1])
        weight = min(first, second) / second if c.weigh_outer else 1.0
        length = 1e-6 / max(x.abs().max().item() for p in v for x in p.values())
        sides = [
            self.gradients(self.moved(self.pair, v, x), offline, ys[0])[1]
            for x in (length, -length)
        ]
        for i, params in enumerate(self.pair):
            total = {}
            for k in params:
                along = (sides[0][i][k] - sides[1][i][k]) / (2 * length)
                total[k] = g[i][k] + weight * (v[i][k] - c.inner_lr * along)
            self.adams[i].step(params, total)
        if number % c.policy_freq == 0:
            self.follow(self.pair, self.pair_target)
        return first, second

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
            descend(base.now[k], base.opt[k], lambda p: ((critic(p, s, a) - y) ** 2).mean())
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
