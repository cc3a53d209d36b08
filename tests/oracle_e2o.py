"""E2O's update written a second time, from the formulas, in float64 and without modules.

Zhao et al. 2023 (arXiv 2306.06871) in the order of the authors' code: temperature, critics, policy,
targets, each with what the one before has left. Every critic is asked alone, and every pair of
critics is looked at.
"""

import itertools
import math

import torch
from oracle_iql import Adam, double
from oracle_sac import act, gaussian
from oracle_sac import values as q_values


def policy(params, s, noise, max_action):
    """An action of the noise (B, A) and the log-density of action / max_action."""
    action, log_pi = act(params, s, noise)
    return max_action * action, log_pi


def mean_of_pair_minima(values):
    pairs = list(itertools.combinations(values, 2))
    return sum(torch.minimum(one, other) for one, other in pairs) / len(pairs)


RULES = {
    "weighted_min_pair": mean_of_pair_minima,
    "min": lambda values: torch.stack(values).min(0).values,
    "mean": lambda values: sum(values) / len(values),
}


class OracleE2O:
    """Takes the first weights of a trainer; `train` makes one update of a phase in float64."""

    def __init__(self, trainer, config, action_dim, max_action=1.0):
        self.config, self.entropy, self.bound = config, -action_dim, max_action
        self.actor = double(trainer.actor.state_dict())
        self.q = double(trainer.critics.state_dict())
        self.target = double(trainer.target_critics.state_dict())
        self.scalars = {"log_alpha": torch.zeros((), dtype=torch.float64)}
        rates = {
            "actor": config.policy_lr,
            "q": config.qf_lr,
            "alpha": config.temperature_lr,
        }
        self.adam = {name: Adam(rate) for name, rate in rates.items()}

    def train(self, batch, noise, online):
        c = self.config
        s, a, r, s2, d = (x.double() for x in batch)
        noise = {k: None if v is None else v.double() for k, v in noise.items()}
        log_pi = policy(self.actor, s, noise["policy"], self.bound)[1]
        slope = -self.scalars["log_alpha"].exp() * (log_pi + self.entropy).mean()
        self.adam["alpha"].step(self.scalars, {"log_alpha": slope})
        alpha = self.scalars["log_alpha"].exp()
        y = r[:, 0] + (1 - d[:, 0]) * c.discount * self.next_value(
            s2, noise["backup"], alpha, online
        )
        factor, spread = self.factor(s2, noise["spread"])
        leaves = {k: v.clone().requires_grad_(True) for k, v in self.q.items()}
        predicted = q_values(leaves, s, a)
        rows = sum((q - y) ** 2 for q in predicted)
        qf_loss = rows.mean().item() / len(predicted)
        weight = c.cql_alpha_online if online else c.cql_alpha
        if weight:
            rows = rows + weight * self.gap(leaves, predicted, s, s2, noise)
        self.step("q", self.q, leaves, (factor * rows).mean())
        leaves = {k: v.clone().requires_grad_(True) for k, v in self.actor.items()}
        new, log_pi = policy(leaves, s, noise["policy"], self.bound)
        lowest = torch.stack(q_values(self.q, s, new)).min(0).values
        policy_loss = (alpha * log_pi - lowest).mean()
        self.step("actor", self.actor, leaves, policy_loss)
        tau = c.soft_target_update_rate
        for k, value in self.q.items():
            self.target[k] = (1 - tau) * self.target[k] + tau * value
        found = {"qf_loss": qf_loss, "policy_loss": policy_loss.item()}
        return found | ({"spread": spread.mean().item()} if online else {})

    def step(self, name, params, leaves, loss):
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        self.adam[name].step(params, dict(zip(leaves, gradients, strict=True)))

    def next_value(self, s2, noise, alpha, online):
        if not online:
            mode = self.bound * torch.tanh(gaussian(self.actor, s2, -20.0, 2.0)[0])
            return RULES["min"](q_values(self.target, s2, mode))
        a2, log_pi = policy(self.actor, s2, noise, self.bound)
        rule = RULES[self.config.target_rule]
        return rule(q_values(self.target, s2, a2)) - alpha * log_pi

    def factor(self, s2, noise):
        """The factor on the critics' loss and the spread, of the batch or (B,)."""
        if noise is None:
            return torch.ones(()), torch.zeros(())
        found = []
        for i in range(noise.shape[1]):
            drawn = policy(self.actor, s2, noise[:, i], self.bound)[0]
            values = torch.stack(q_values(self.target, s2, drawn))
            if self.config.uncertainty_by == "batch":
                values = values.mean(1)
            middle = values.mean(0)
            found.append(((values - middle) ** 2).mean(0).sqrt())
        spread = sum(found) / len(found)
        temperature = self.config.uncertainty_temperature
        return 1 / (1 + torch.exp(temperature * spread)) + 0.5, spread

    def gap(self, leaves, predicted, s, s2, noise):
        """CQL's gap of a row, the mean over the critics."""
        n, a = noise["uniform"].shape[1:]
        terms = [[] for _ in predicted]
        for i in range(n):
            now, log_now = policy(self.actor, s, noise["current"][:, i], self.bound)
            then, log_then = policy(self.actor, s2, noise["following"][:, i], self.bound)
            actions = (
                (self.bound * noise["uniform"][:, i], a * math.log(0.5)),
                *((now, log_now), (then, log_then)),
            )
            for action, log_density in actions:
                for place, q in zip(terms, q_values(leaves, s, action), strict=True):
                    place.append(q - log_density)
        gaps = [
            torch.stack(place).exp().sum(0).log() - q
            for place, q in zip(terms, predicted, strict=True)
        ]
        return sum(gaps) / len(gaps)
