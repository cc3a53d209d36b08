"""ReBRAC's update written a second time, from the formulas, in float64 and without modules.

Tarasov et al. 2023 (arXiv 2305.09836) on TD3: the penalty of the target counts inside the
bootstrap, the policy climbs the smaller of both critics over its mean size, and its target follows
the policy of before the step. Parameters are plain dicts. A weight per row goes on both penalties.
"""

import torch
from oracle_iql import Adam, descend, double

NETWORKS = ("actor", "critic_1", "critic_2")


def network(params, x):
    """Linear, ReLU and, where there are parameters of it, LayerNorm with epsilon 1e-6."""
    layers = [name.removesuffix(".weight") for name in params if name.endswith("weight")]
    for number, layer in enumerate(layers):
        weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
        if weight.ndim == 1:
            centered = x - x.mean(1, keepdim=True)
            variance = (centered**2).mean(1, keepdim=True)
            x = centered / (variance + 1e-6).sqrt() * weight + bias
            continue
        x = x @ weight.T + bias
        if number < len(layers) - 1:
            x = x * (x > 0)
    return x


class OracleReBRAC:
    """Takes the start weights of a trainer; `train(batch, noise)` does one update in float64."""

    def __init__(self, trainer, config, max_action=1.0):
        self.now = {k: double(getattr(trainer, k).state_dict()) for k in NETWORKS}
        self.target = {k: dict(v) for k, v in self.now.items()}
        rates = {"actor": config.actor_lr}
        self.opt = {k: Adam(rates.get(k, config.qf_lr)) for k in NETWORKS}
        self.config, self.max_action, self.updates = config, max_action, 0

    def act(self, params, s):
        return self.max_action * torch.tanh(network(params, s))

    def q(self, params, s, a):
        return network(params, torch.cat([s, a], 1))[:, 0]

    def smaller_q(self, params, s, a):
        return torch.minimum(*(self.q(params[k], s, a) for k in NETWORKS[1:]))

    def train(self, batch, noise, coefs, weight=None):
        """noise (B, A) standard normal; coefs of policy and target; weight (B,) of the rows."""
        c = self.config
        s, a, r, s2, d, a2_data = (x.double() for x in batch)
        r, d = r[:, 0], d[:, 0]
        weight = torch.ones_like(r) if weight is None else weight.double()
        bound = c.noise_clip * self.max_action
        error = (noise.double() * c.policy_noise * self.max_action).clamp(-bound, bound)
        a2 = (self.act(self.target["actor"], s2) + error).clamp(
            -self.max_action, self.max_action
        )
        penalty = coefs[1] * weight * ((a2 - a2_data) ** 2).sum(1)
        y = r + c.discount * (1 - d) * (self.smaller_q(self.target, s2, a2) - penalty)
        q_min = self.smaller_q(self.now, s, a).mean().item()
        losses = [
            descend(
                self.now[k], self.opt[k], lambda p: ((self.q(p, s, a) - y) ** 2).mean()
            )
            for k in NETWORKS[1:]
        ]
        self.updates += 1
        if (self.updates - 1) % c.policy_freq:
            return sum(losses), q_min, None

        def policy_loss(params):
            policy = self.act(params, s)
            q = self.smaller_q(self.now, s, policy)
            penalty = weight * ((policy - a) ** 2).sum(1)
            scale = 1 / q.abs().mean().detach() if c.normalize_q else 1.0
            return (coefs[0] * penalty - scale * q).mean()

        before = {k: dict(self.now[k]) for k in NETWORKS}
        actor_loss = descend(self.now["actor"], self.opt["actor"], policy_loss)
        for k in NETWORKS:
            for name, value in before[k].items():
                old = self.target[k][name]
                self.target[k][name] = (1 - c.tau) * old + c.tau * value
        return sum(losses), q_min, actor_loss
