"""FamO2O's updates written a second time, from the formulas, in float64 and without modules.

Wang et al. 2023 (arXiv 2310.17966) in the order of the public code, on IQL and on CQL, with its
faults mended or not. Parameters are plain dicts; Adam is spelled out.
"""

import math

import torch
from oracle_cql import gradients, leaves_of, log_normal, log_tanh_slope
from oracle_iql import Adam, descend, double, mlp


def encoded(beta, base, pairs):
    """(B,) -> (B, 2 pairs), number by number."""
    columns = []
    for i in range(pairs):
        angle = beta / base ** (2 * i / (2 * pairs))
        columns += [torch.sin(angle), torch.cos(angle)]
    return torch.stack(columns, 1)


def part(params, prefix):
    """The parameters below a prefix, without it."""
    start = f"{prefix}."
    return {k[len(start) :]: v for k, v in params.items() if k.startswith(start)}


def squashed(mean, std, noise):
    """tanh of a draw and its log-density."""
    raw = mean + std * noise
    return torch.tanh(raw), log_normal(raw, mean, std) - log_tanh_slope(raw)


class Family:
    """What both bases share: the range, the encoding, the balance model's draws."""

    def __init__(self, trainer, config):
        self.config = config
        actor = double(trainer.actor.state_dict())
        self.policy, self.balance = part(actor, "policy"), part(actor, "balance")

    def inputs(self, s, beta):
        code = encoded(beta, self.config.encoding_base, self.config.encoding_pairs)
        return torch.cat([s, code], 1)

    def even(self, share):
        c = self.config
        return c.beta_low + share.double() * (c.beta_high - c.beta_low)


class OracleFamO2OIQL(Family):
    """Takes the start weights of a trainer; `train` does one update in float64."""

    def __init__(self, trainer, config, max_action=1.0):
        super().__init__(trainer, config)
        self.max_action = max_action
        self.q = double(trainer.qf.state_dict())
        self.q_target = double(trainer.q_target.state_dict())
        self.v = double(trainer.vf.state_dict())
        self.eta = double(trainer.log_eta.state_dict())
        rates = dict(q=config.qf_lr, v=config.vf_lr, policy=config.actor_lr)
        rates.update(balance=config.balance_lr, eta=config.eta_lr)
        self.opt = {k: Adam(rate) for k, rate in rates.items()}
        self.updates = 0

    def both(self, params, s, a):
        sa = torch.cat([s, a], 1)
        return mlp(params, "q1.net", sa)[:, 0], mlp(params, "q2.net", sa)[:, 0]

    def value(self, params, s):
        return mlp(params, "v.net", s)[:, 0]

    def mean_std(self, params, s, beta):
        mean = torch.tanh(mlp(params, "net.net", self.inputs(s, beta)))
        return mean, params["log_std"].clamp(-5, 2).exp()

    def drawn(self, params, s, noise):
        """Coefficients of pi_b and the log-densities of what is squashed."""
        mean = mlp(params, "network.net", s)
        std = params["log_std"].clamp(-10, 2).exp()
        x, log_prob = squashed(mean, std, noise.double()[:, None])
        c = self.config
        return c.beta_low + (x[:, 0] + 1) / 2 * (c.beta_high - c.beta_low), log_prob

    def train(self, batch, noise, online):
        """One update; returns what the trainer logs."""
        c, s, a, r, s2, d = self.config, *(x.double() for x in batch)
        r, d, logs = r[:, 0], d[:, 0], {}
        self.updates += 1
        target_q = torch.minimum(*self.both(self.q_target, s, a))

        def v_loss(params):
            u = target_q - self.value(params, s)
            return (torch.where(u > 0, c.iql_tau, 1 - c.iql_tau) * u**2).mean()

        logs["value_loss"] = descend(self.v, self.opt["v"], v_loss)
        if online:
            beta, _ = self.drawn(self.balance, s, noise.drawn)
        else:
            beta = self.even(noise.share)
        if self.updates % c.balance_period == 0:
            self.learn_balance(s, noise, logs)
        adv = target_q - self.value(self.v, s)
        rows = len(adv)
        if c.weights_of == "own":
            weight = (beta * adv).exp().clamp(max=100.0)
        else:
            matrix = [[beta[i] * adv[j] for j in range(rows)] for i in range(rows)]
            matrix = torch.stack([torch.stack(row) for row in matrix])
            weight = matrix.exp().clamp(max=100.0).mean(0)

        def policy_loss(params):
            mean, std = self.mean_std(params, s, beta)
            return -(weight * log_normal(a / self.max_action, mean, std)).mean()

        logs["actor_loss"] = descend(self.policy, self.opt["policy"], policy_loss)
        y = r + c.discount * (1 - d) * self.value(self.v, s2)

        def q_loss(params):
            return sum(((q - y) ** 2).mean() for q in self.both(params, s, a))

        logs["q_loss"] = descend(self.q, self.opt["q"], q_loss)
        for k in self.q:
            self.q_target[k] = (1 - c.tau) * self.q_target[k] + c.tau * self.q[k]
        return logs

    def learn_balance(self, s, noise, logs):
        eta = self.eta["constant"].exp()
        found = {}

        def balance_loss(params):
            beta, log_prob = self.drawn(params, s, noise.balance)
            mean, std = self.mean_std(self.policy, s, beta)
            action = self.max_action * (mean + std * noise.action.double())
            q = torch.minimum(*self.both(self.q_target, s, action))
            found["entropy"] = -log_prob.detach().mean()
            logs["beta_mean"], logs["beta_std"] = (
                beta.mean().item(),
                beta.detach().std(correction=0).item(),
            )
            return (eta * log_prob - q).mean()

        logs["balance_loss"] = descend(self.balance, self.opt["balance"], balance_loss)
        excess = found["entropy"] - self.config.target_entropy
        logs["eta_loss"] = descend(
            self.eta, self.opt["eta"], lambda p: p["constant"].exp() * excess
        )
        logs["eta"] = self.eta["constant"].exp().item()


class OracleFamCQL(Family):
    """Takes the start weights of a trainer; `train` does one update in float64."""

    def __init__(self, trainer, config, action_dim, max_action=1.0):
        super().__init__(trainer, config)
        self.action_dim, self.max_action = action_dim, max_action
        self.q = [double(c.state_dict()) for c in (trainer.critic_1, trainer.critic_2)]
        self.target = [dict(q) for q in self.q]
        self.log_alpha = {"constant": torch.zeros((), dtype=torch.float64)}
        rates = dict(policy=config.policy_lr, balance=config.balance_lr)
        rates["alpha"] = config.policy_lr
        self.opt = {k: Adam(rate) for k, rate in rates.items()}
        self.opt_q = [Adam(config.qf_lr), Adam(config.qf_lr)]

    def value(self, params, s, a):
        """Q (B,) of actions (B, A), or (B, n) of (B, n, A); layers are normalized."""
        if a.dim() == 3:
            s = s[:, None].expand(-1, a.shape[1], -1)
        x = torch.cat([s, a], -1)
        for i in (0, 1, 3, 4, 6):
            weight, bias = params[f"network.{i}.weight"], params[f"network.{i}.bias"]
            if weight.dim() == 2:
                x = x @ weight.T + bias
                continue
            mean = x.mean(-1, keepdim=True)
            spread = ((x - mean) ** 2).mean(-1, keepdim=True)
            x = (x - mean) / (spread + 1e-6).sqrt() * weight + bias
            x = x * (x > 0)
        return x[..., 0]

    def least(self, critics, s, a):
        return torch.minimum(*(self.value(q, s, a) for q in critics))

    def act(self, params, s, beta, noise):
        """Actions for noise (B, A) or (B, n, A), and log-densities in units of the box."""
        out = mlp(params, "base_network", self.inputs(s, beta))
        half, noise = out.shape[-1] // 2, noise.double()
        log_std = params["log_std_multiplier.constant"] * out[:, half:]
        std = (log_std + params["log_std_offset.constant"]).clamp(-20, 2).exp()
        mean = out[:, :half]
        if noise.dim() == 3:
            mean, std = (x[:, None].expand_as(noise) for x in (mean, std))
        action, log_prob = squashed(mean, std, noise)
        return self.max_action * action, log_prob

    def drawn(self, params, s, noise):
        out = mlp(params, "network", s)
        log_std = params["log_std_multiplier"] * out[:, 1:]
        std = (log_std + params["log_std_offset"]).clamp(-20, 2).exp()
        x, _ = squashed(out[:, :1], std, noise.double()[:, None])
        c = self.config
        share = (x[:, 0] + 1) / 2 if c.balance_range == "full" else x[:, 0]
        return c.beta_low + share * (c.beta_high - c.beta_low)

    def train(self, batch, noise, online, weight=None):
        """One update, with weights (B,) of the gaps; what the trainer logs, but for means of Q."""
        c, s, a, r, s2, d = self.config, *(x.double() for x in batch)
        a = a.clamp(-0.999 * self.max_action, 0.999 * self.max_action)
        r, d = r[:, 0], d[:, 0]
        own = self.drawn(self.balance, s, noise.balance)
        beta = own if online else self.even(noise.share)
        next_beta = own
        if c.next_beta == "own":
            next_beta = self.drawn(self.balance, s2, noise.next_balance)
        of_action = noise.policy if online else noise.induced

        leaves = leaves_of(self.balance)
        coefficient = self.drawn(leaves, s, noise.balance)
        action, _ = self.act(self.policy, s, coefficient, of_action)
        balance_loss = -self.least(self.q, s, action).mean()
        of_balance = gradients(balance_loss, leaves)

        leaves = leaves_of(self.policy)
        action, log_pi = self.act(leaves, s, beta, noise.policy)
        alpha = self.log_alpha["constant"].exp() * c.alpha_multiplier
        policy_loss = (alpha * log_pi - beta * self.least(self.q, s, action)).mean()
        of_policy = gradients(policy_loss, leaves)
        excess = log_pi.detach().mean() - self.action_dim
        logs = {
            "policy_loss": policy_loss.item(),
            "balance_loss": balance_loss.item(),
            "alpha": alpha.item(),
            "alpha_loss": -(self.log_alpha["constant"] * excess).item(),
            "log_pi": log_pi.mean().item(),
            "beta_mean": own.mean().item(),
            "beta_std": own.std(correction=0).item(),
        }

        ahead, _ = self.act(self.policy, s2, next_beta, noise.backup)
        y = r + c.discount * (1 - d) * self.least(self.target, s2, ahead)
        # Gaps are known of the leading rows that there is noise for.
        rows = len(noise.uniform)
        share = (torch.ones(len(s)) if weight is None else weight)[:rows].double()
        now, log_now = self.act(self.policy, s[:rows], beta[:rows], noise.current)
        ahead = s2[:rows], next_beta[:rows], noise.following
        then, log_then = self.act(self.policy, *ahead)
        random = self.max_action * noise.uniform.double()
        conservative = 0.0
        for i in range(2):
            leaves = leaves_of(self.q[i])
            p = self.value(leaves, s, a)
            every = [
                self.value(leaves, s[:rows], random) - self.action_dim * math.log(0.5),
                self.value(leaves, s[:rows], then) - log_then,
                self.value(leaves, s[:rows], now) - log_now,
            ]
            gap = share * (torch.cat(every, 1).exp().sum(1).log() - p[:rows])
            gap = gap.sum() / len(p)
            conservative += len(p) * gap.item() / 2
            td = ((p - y) ** 2).mean()
            self.opt_q[i].step(self.q[i], gradients(td + c.cql_alpha * gap, leaves))
            logs[f"qf{i + 1}_loss"], logs[f"cql_qf{i + 1}_diff"] = td.item(), gap.item()
        if weight is not None and rows:
            logs["conservative_loss"] = conservative / share.sum().item()
        self.opt["balance"].step(self.balance, of_balance)
        self.opt["policy"].step(self.policy, of_policy)
        self.opt["alpha"].step(self.log_alpha, {"constant": -excess})
        tau = c.soft_target_update_rate
        for target, params in zip(self.target, self.q, strict=True):
            for k in target:
                target[k] = (1 - tau) * target[k] + tau * params[k]
        return logs
