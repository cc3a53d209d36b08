"""TD3+BC's update written a second time, from the formulas, in float64 and without modules.

Fujimoto and Gu 2021 (arXiv 2106.06860) eq. 4 and 5 on TD3: both critics, and in every second update
the policy on the new first critic and then all target networks. Parameters are plain dicts. A
weight per row goes on the distance to the data's action alone.
"""

import torch
from oracle_iql import Adam, descend, double, mlp

NETWORKS = ("actor", "critic_1", "critic_2")


class OracleTD3BC:
    """Takes the start weights of a trainer; `train(batch, noise)` does one update in float64."""

    def __init__(self, trainer, config, max_action=1.0):
        self.now = {k: double(getattr(trainer, k).state_dict()) for k in NETWORKS}
        self.target = {k: dict(v) for k, v in self.now.items()}
        rates = {"actor": config.actor_lr}
        self.opt = {k: Adam(rates.get(k, config.qf_lr)) for k in NETWORKS}
        self.config, self.max_action, self.updates = config, max_action, 0

    def act(self, params, s):
        return self.max_action * torch.tanh(mlp(params, "net", s))

    def q(self, params, s, a):
        return mlp(params, "net", torch.cat([s, a], 1))[:, 0]

    def train(self, batch, noise, bc_weight=1.0, weight=None):
        """noise (B, A) standard normal; weight (B,) of the rows' cloning distances."""
        c = self.config
        s, a, r, s2, d = (x.double() for x in batch)
        r, d = r[:, 0], d[:, 0]
        bound = c.noise_clip * self.max_action
        error = (noise.double() * c.policy_noise * self.max_action).clamp(-bound, bound)
        a2 = (self.act(self.target["actor"], s2) + error).clamp(
            -self.max_action, self.max_action
        )
        values = [self.q(self.target[k], s2, a2) for k in NETWORKS[1:]]
        y = r + c.discount * (1 - d) * torch.minimum(*values)
        losses = [
            descend(
                self.now[k], self.opt[k], lambda p: ((self.q(p, s, a) - y) ** 2).mean()
            )
            for k in NETWORKS[1:]
        ]
        self.updates += 1
        if self.updates % c.policy_freq:
            return sum(losses), None

        def policy_loss(params):
            policy = self.act(params, s)
            q = self.q(self.now["critic_1"], s, policy)
            distance = ((policy - a) ** 2).mean(1)
            if weight is not None:
                distance = distance * weight.double()
            scale = c.alpha / q.abs().mean().detach()
            return -scale * q.mean() + bc_weight * distance.mean()

        actor_loss = descend(self.now["actor"], self.opt["actor"], policy_loss)
        for k in NETWORKS:
            for name, value in self.now[k].items():
                old = self.target[k][name]
                self.target[k][name] = (1 - c.tau) * old + c.tau * value
        return sum(losses), actor_loss
