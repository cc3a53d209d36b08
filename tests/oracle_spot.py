"""SPOT's updates written a second time, from the formulas, in float64 and without modules.

Wu et al. 2022 (arXiv 2202.06239): a VAE of the data's actions; both critics as in TD3; in every
`policy_freq`-th update the policy on -Q1 / mean |Q1| + lambda (negative ELBO of its own action) and
then all target networks. Parameters are plain dicts. A weight per row goes on the negative ELBO
alone.
"""

import math

import torch
from oracle_iql import Adam, descend, double, mlp

NETWORKS = ("actor", "critic_1", "critic_2")


class OracleSPOT:
    """Takes the start weights of a trainer; every method does one update in float64."""

    def __init__(self, trainer, config, max_action=1.0):
        self.now = {k: double(getattr(trainer, k).state_dict()) for k in NETWORKS}
        self.target = {k: dict(v) for k, v in self.now.items()}
        self.vae = double(trainer.vae.state_dict())
        self.config, self.max_action, self.updates = config, max_action, 0
        self.discount = config.discount
        self.vae_adam = Adam(config.vae_lr)
        self.start_adam()

    def start_adam(self):
        rates = {"actor": self.config.actor_lr}
        self.opt = {k: Adam(rates.get(k, self.config.qf_lr)) for k in NETWORKS}

    def start_online(self):
        self.discount = self.config.online_discount
        self.start_adam()

    def act(self, params, s):
        return self.max_action * torch.tanh(mlp(params, "net", s))

    def q(self, params, s, a):
        return mlp(params, "net", torch.cat([s, a], 1))[:, 0]

    def latent(self, vae, s, a):
        """Mean and log-std of the posterior, (B, L)."""
        hidden = mlp(vae, "encoder_shared", torch.cat([s, a], 1), (0, 2))
        hidden = hidden * (hidden > 0)
        mean = hidden @ vae["mean.weight"].T + vae["mean.bias"]
        log_std = hidden @ vae["log_std.weight"].T + vae["log_std.bias"]
        return mean, log_std.clamp(-4, 15)

    def decoded(self, vae, s, z):
        return self.max_action * torch.tanh(
            mlp(vae, "decoder", torch.cat([s, z], 1), (0, 2, 4))
        )

    def elbo_terms(self, vae, s, a, noise):
        """Reconstruction error and divergence, each (B,); noise (B, n, L)."""
        mean, log_std = self.latent(vae, s, a)
        errors = 0.0
        for sample in range(noise.shape[1]):
            z = mean + log_std.exp() * noise[:, sample].double()
            errors = errors + ((self.decoded(vae, s, z) - a) ** 2).mean(1)
        variance = (2 * log_std).exp()
        divergence = 0.5 * (mean**2 + variance - 2 * log_std - 1).mean(1)
        return errors / noise.shape[1], divergence

    def importance_bound(self, vae, s, a, noise):
        """log of the mean over samples of p(a|z) p(z) / q(z), (B,)."""
        mean, log_std = self.latent(vae, s, a)
        ratios = []
        for sample in range(noise.shape[1]):
            z = mean + log_std.exp() * noise[:, sample].double()
            normal = torch.distributions.Normal
            std = math.sqrt(self.config.beta / 4)
            ratio = normal(self.decoded(vae, s, z), std).log_prob(a).sum(1)
            ratio = ratio + normal(0.0, 1.0).log_prob(z).sum(1)
            ratios.append(ratio - normal(mean, log_std.exp()).log_prob(z).sum(1))
        return torch.stack(ratios).exp().mean(0).log()

    def vae_train(self, batch, noise):
        """noise (B, L) standard normal."""
        s, a = (x.double() for x in batch[:2])
        self.updates += 1

        def loss(vae):
            errors, divergence = self.elbo_terms(vae, s, a, noise.unsqueeze(1))
            return errors.mean() + self.config.beta * divergence.mean()

        return descend(self.vae, self.vae_adam, loss)

    def train(self, batch, noise, latent_noise, lambd, weight=None):
        """noise (B, A), latent_noise (B, n, L) standard normal; weight (B,) of the rows."""
        c = self.config
        s, a, r, s2, d = (x.double() for x in batch)
        r, d = r[:, 0], d[:, 0]
        bound = c.noise_clip * self.max_action
        error = (noise.double() * c.policy_noise * self.max_action).clamp(-bound, bound)
        a2 = (self.act(self.target["actor"], s2) + error).clamp(
            -self.max_action, self.max_action
        )
        values = [self.q(self.target[k], s2, a2) for k in NETWORKS[1:]]
        y = r + self.discount * (1 - d) * torch.minimum(*values)
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
            if getattr(c, "iwae", False):
                rows = -self.importance_bound(self.vae, s, policy, latent_noise)
            else:
                errors, divergence = self.elbo_terms(self.vae, s, policy, latent_noise)
                rows = errors + c.beta * divergence
            if weight is not None:
                rows = rows * weight.double()
            return -q.mean() / q.abs().mean().detach() + lambd * rows.mean()

        actor_loss = descend(self.now["actor"], self.opt["actor"], policy_loss)
        for k in NETWORKS:
            for name, value in self.now[k].items():
                old = self.target[k][name]
                self.target[k][name] = (1 - c.tau) * old + c.tau * value
        return sum(losses), actor_loss
