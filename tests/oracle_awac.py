"""AWAC's update written a second time, from the formulas, in float64 and without modules.

Nair et al. 2020 (arXiv 2006.09359) eq. 13 in CORL's order: both critics, the policy with the
advantage under the new critics, both target critics. Parameters are plain dicts. DARE's
released rows have SAC's policy loss (arXiv 2511.03828 eq. 16) on the sample of pi(s) under the
advantage. Its derivative by the policy is spelled out: that of Q by its action is taken at the
clipped action and passed on to mean and std as if nothing had been clipped.
"""

import math

import torch
from oracle_iql import Adam, descend, double, mlp

CRITICS = ("critic_1", "critic_2")
LAYERS = (0, 2, 4, 6)


class OracleAWAC:
    """Takes the start weights of a trainer; `train(batch, noise)` does one update in float64."""

    def __init__(self, trainer, config, max_action=1.0):
        self.actor = double(trainer.actor.state_dict())
        self.now = {k: double(getattr(trainer, k).state_dict()) for k in CRITICS}
        self.target = {k: dict(v) for k, v in self.now.items()}
        self.opt = {k: Adam(config.learning_rate) for k in ("actor", *CRITICS)}
        self.config, self.max_action = config, max_action

    def mean_std(self, params, s):
        return mlp(params, "_mlp", s, LAYERS), params["_log_std"].clamp(-20, 2).exp()

    def sample(self, s, noise):
        mean, std = self.mean_std(self.actor, s)
        return (mean + std * noise.double()).clamp(-self.max_action, self.max_action)

    def q(self, params, s, a):
        return mlp(params, "_mlp", torch.cat([s, a], 1), LAYERS)[:, 0]

    def least(self, critics, s, a):
        return torch.minimum(*(self.q(critics[k], s, a) for k in CRITICS))

    def q_slope(self, s, a):
        """Derivative (B, A) of min(Q1, Q2) by the action."""
        a = a.detach().clone().requires_grad_(True)
        return torch.autograd.grad(self.least(self.now, s, a).sum(), a)[0]

    def released(self, params, s, noise, entropy_alpha):
        """Rows (B,) whose value is alpha log pi - Q, with the gradient that is spelled out."""
        mean, std = self.mean_std(params, s)
        noise = noise.double()
        executed = (mean + std * noise).detach().clamp(-self.max_action, self.max_action)
        # The density of mean + std noise at itself does not depend on the mean.
        log_prob = -(0.5 * noise**2 + std.log() + 0.5 * math.log(2 * math.pi)).sum(1)
        q, slope = self.least(self.now, s, executed), self.q_slope(s, executed)
        linear = (slope * (mean + std * noise)).sum(1)
        return entropy_alpha * log_prob - q.detach() - (linear - linear.detach())

    def train(self, batch, noise, weight=None, entropy_alpha=0.2):
        """noise: standard normal of the policy at s' and at s, each (B, A); weight (B,)."""
        c = self.config
        s, a, r, s2, d = (x.double() for x in batch)
        r, d = r[:, 0], d[:, 0]
        y = r + c.discount * (1 - d) * self.least(
            self.target, s2, self.sample(s2, noise[0])
        )
        critic_loss = sum(
            descend(
                self.now[k], self.opt[k], lambda p: ((self.q(p, s, a) - y) ** 2).mean()
            )
            for k in CRITICS
        )
        adv = self.least(self.now, s, a)
        adv = adv - self.least(self.now, s, self.sample(s, noise[1]))
        factor = (adv / c.awac_lambda).exp().clamp(max=100.0)

        def policy_loss(params):
            mean, std = self.mean_std(params, s)
            z = (a - mean) / std
            nll = (0.5 * z**2 + std.log() + 0.5 * math.log(2 * math.pi)).sum(1)
            rows = factor * nll
            if weight is not None:
                w = weight.double()
                rows = w * rows + (1 - w) * self.released(
                    params, s, noise[1], entropy_alpha
                )
            return rows.mean()

        actor_loss = descend(self.actor, self.opt["actor"], policy_loss)
        for k in CRITICS:
            for name, value in self.now[k].items():
                old = self.target[k][name]
                self.target[k][name] = (1 - c.tau) * old + c.tau * value
        return critic_loss, actor_loss
