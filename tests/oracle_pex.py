"""PEX's online update written a second time, from the formulas, in float64 and without modules.

Zhang, Xu, Yu 2023 (arXiv 2302.00935), the IQL variant: V, Q and targets as in IQL; then the new
policy follows actions of the composite policy, weighted by their advantage under the new networks.
"""

import math

import torch
from oracle_iql import Adam, OracleIQL, descend, double, mlp


class OraclePEX(OracleIQL):
    """Takes the start weights of a trainer; `expand(batch, ...)` does one online update."""

    def __init__(self, trainer, config):
        super().__init__(
            trainer,
            beta=config.beta,
            iql_tau=config.iql_tau,
            discount=config.discount,
            tau=config.tau,
            lr=config.actor_lr,
            max_steps=1,
            deterministic=False,
        )
        self.config = config
        self.new = double(trainer.actor_online.state_dict())
        self.opt["new"] = Adam(config.actor_lr)

    def law(self, params, s, low):
        mean = torch.tanh(mlp(params, "net.net", s))
        return mean, params["log_std"].clamp(low, 2).exp()

    def composite(self, s, noise, uniform):
        """Actions (B, A), the probability of the new policy (B,) and Q's gain (B,)."""
        first, _ = self.law(self.actor, s, -20)
        mean, std = self.law(self.new, s, -5)
        second = mean + std * noise.double()
        if self.config.clip_actions:
            second = second.clamp(-1, 1)
        both = [torch.minimum(*self.both(self.q, s, a)) for a in (first, second)]
        chances = torch.softmax(self.config.inv_temperature * torch.stack(both), 0)
        new = uniform.double() < chances[1]
        rows = zip(first, second, new, strict=True)
        actions = torch.stack([b if n else a for a, b, n in rows])
        return actions, chances[1], both[1] - both[0]

    def expand(self, batch, noise, uniform):
        """One online update; returns what the trainer logs."""
        offline, optimizer = dict(self.actor), self.opt["actor"]
        v_loss, q_loss, _ = self.train(batch)
        # IQL's update of the offline policy does not belong here.
        self.actor, self.opt["actor"] = offline, optimizer
        s = batch[0].double()
        actions, chances, gain = self.composite(s, noise, uniform)
        adv = torch.minimum(*self.both(self.q_target, s, actions)) - self.value(
            self.v, s
        )

        def loss(params):
            mean, std = self.law(params, s, -5)
            z = (actions - mean) / std
            bc = (0.5 * z**2 + std.log() + 0.5 * math.log(2 * math.pi)).sum(1)
            return ((self.beta * adv).exp().clamp(max=100.0) * bc).mean()

        return {
            "value_loss": v_loss,
            "q_loss": q_loss,
            "actor_loss": descend(self.new, self.opt["new"], loss),
            "new_policy": chances.mean().item(),
            "q_gain": gain.mean().item(),
        }
