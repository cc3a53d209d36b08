"""CQL, Cal-QL and their DARE twins written a second time, from the formulas, in float64.

CQL: Kumar et al. 2020 (arXiv 2006.04779); Cal-QL: Nakamoto et al. 2023 (arXiv 2303.05479); the
order of updates and draws is CORL's. DARE's part (eq. 14) is a weight per row on the clipped
conservative gap, averaged over the whole batch; with `lagrange_gap` weighted it is on the target
of the gap, too. Parameters are plain dicts; Adam is spelled out; every loss of a step is made from
the parameters of before the step.
"""

import math
from dataclasses import dataclass

import torch
from oracle_iql import Adam, double, mlp


@dataclass
class Settings:
    """The trainers' arguments; the last five are not upstream's constructor arguments."""

    target_entropy: float
    discount: float = 0.99
    alpha_multiplier: float = 1.0
    use_automatic_entropy_tuning: bool = True
    backup_entropy: bool = False
    policy_lr: float = 3e-4
    qf_lr: float = 3e-4
    soft_target_update_rate: float = 5e-3
    bc_steps: int = 0
    target_update_period: int = 1
    cql_n_actions: int = 10
    cql_importance_sample: bool = True
    cql_lagrange: bool = False
    cql_target_action_gap: float = -1.0
    cql_temp: float = 1.0
    cql_alpha: float = 5.0
    cql_max_target_backup: bool = False
    cql_clip_diff_min: float = -math.inf
    cql_clip_diff_max: float = math.inf
    max_action: float = 1.0
    no_tanh: bool = False
    calibrated: bool = False
    lagrange_gap: str = "literal"
    resampled_bc: bool = (
        True  # upstream's warm-up does not look at the dataset's actions
    )


def layers(params, prefix):
    indices = {int(k.split(".")[1]) for k in params if k.startswith(prefix)}
    return sorted(indices)


def q_value(params, s, a):
    """s (B, S) with a (B, A) → (B,), or with a (B, n, A) → (B, n)."""
    if a.dim() == 3:
        s = s[:, None].expand(-1, a.shape[1], -1)
    x = torch.cat([s, a], -1)
    return mlp(params, "network", x, layers(params, "network"))[..., 0]


def mean_std(params, s):
    out = mlp(params, "base_network", s, layers(params, "base_network"))
    half = out.shape[-1] // 2
    multiplier = params["log_std_multiplier.constant"]
    offset = params["log_std_offset.constant"]
    log_std = (multiplier * out[..., half:] + offset).clamp(-20.0, 2.0)
    return out[..., :half], log_std.exp()


def log_normal(x, mean, std):
    rows = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return rows.sum(-1)


def log_tanh_slope(x):
    """Σ log(1 − tanh² x), which is 2·log sech."""
    stable = x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2.0)  # log cosh
    return -2.0 * stable.sum(-1)


def policy(params, s, noise, settings):
    """Actions of the noise and their log-probability in nats."""
    if noise.dim() == 3:
        s = s[:, None].expand(-1, noise.shape[1], -1)
    mean, std = mean_std(params, s)
    x = mean + std * noise
    log_prob = log_normal(x, mean, std)
    if settings.no_tanh:
        return settings.max_action * x, log_prob
    return settings.max_action * torch.tanh(x), log_prob - log_tanh_slope(x)


def log_prob_of(params, s, a, settings):
    mean, std = mean_std(params, s)
    a = a / settings.max_action
    if settings.no_tanh:
        return log_normal(a, mean, std)
    x = 0.5 * torch.log((1 + a) / (1 - a))
    return log_normal(x, mean, std) - log_tanh_slope(x)


class OracleCQL:
    """Takes the start weights of a trainer; `train` does one update in float64.

    `calibrated` may be switched between updates; DARE is `train` with a weight per row.
    """

    def __init__(self, trainer, settings):
        self.settings = settings
        self.q = [double(c.state_dict()) for c in (trainer.critic_1, trainer.critic_2)]
        targets = (trainer.target_critic_1, trainer.target_critic_2)
        self.target = [double(c.state_dict()) for c in targets]
        self.actor = double(trainer.actor.state_dict())
        zero = torch.zeros((), dtype=torch.float64)
        self.scalars = {"log_alpha": zero, "log_alpha_prime": zero + 1.0}
        self.opt = {
            "actor": Adam(settings.policy_lr),
            "q": [Adam(settings.qf_lr), Adam(settings.qf_lr)],
            "log_alpha": Adam(settings.policy_lr),
            "log_alpha_prime": Adam(settings.qf_lr),
        }
        self.updates = 0

    def draws(self, generator, rows, actions, kept=None):
        """The next update's random numbers, in the trainer's order, as float64.

        With `kept` only so many rows get actions under the soft maximum; the others' are 0.
        """
        settings, flat = self.settings, (rows, actions)
        many = (rows, settings.cql_n_actions, actions)
        few = (rows if kept is None else kept, *many[1:])
        normal = lambda shape: torch.randn(shape, generator=generator).double()  # noqa: E731
        drawn = {"new": normal(flat)}
        if self.updates + 1 <= settings.bc_steps and settings.resampled_bc:
            drawn["warm_up"] = normal(flat)
        drawn["backup"] = normal(many if settings.cql_max_target_backup else flat)
        uniform = torch.empty(few).uniform_(-1.0, 1.0, generator=generator)
        drawn["uniform"] = uniform.double()
        drawn["current"], drawn["next"] = normal(few), normal(few)
        for name in ("uniform", "current", "next"):
            rest = torch.zeros(rows - few[0], *many[1:], dtype=torch.float64)
            drawn[name] = torch.cat([drawn[name], rest])
        return drawn

    def train(self, batch, drawn, weight=None, kept=None, td_weight=1.0):
        """`batch`: s, a, r, s', d and, when calibrated, returns to go; `weight`: (B,).

        `kept`: what is logged of the actions under the soft maximum is of so many rows.
        `td_weight`: of the squared TD errors, (B,).
        """
        settings, self.kept = self.settings, kept
        s, a, r, s2, d = (x.double() for x in batch[:5])
        r, d = r[:, 0], d[:, 0]
        mc_returns = batch[5].double() if len(batch) > 5 else None  # (B, 1)
        self.updates += 1
        logs = {}

        alpha, alpha_gradient = self.entropy(s, drawn, logs)
        actor_gradient = self.policy_gradient(s, a, drawn, alpha, logs)
        y = self.td_target(s2, r, d, drawn, alpha, logs)
        leaves = [leaves_of(params) for params in self.q]
        target = self.gap_target(weight)
        gaps = [
            self.gap(i, leaves[i], s, a, s2, mc_returns, drawn, weight, logs)
            for i in range(2)
        ]
        if weight is not None:
            weighted = sum(gap.item() for gap in gaps) / 2 * len(weight)
            logs["conservative_loss"] = weighted / weight.double().sum().item()
        penalty, prime_gradient = self.penalty([g.detach() for g in gaps], target, logs)
        critic_gradients = []
        for i in range(2):
            td = (td_weight * (q_value(leaves[i], s, a) - y) ** 2).mean()
            conservative = penalty * (gaps[i] - target)
            critic_gradients.append(gradients(td + conservative, leaves[i]))
            logs[f"qf{i + 1}_loss"] = td.item()
            logs[f"cql_min_qf{i + 1}_loss"] = conservative.item()

        if settings.cql_lagrange:
            self.step("log_alpha_prime", prime_gradient)
        if settings.use_automatic_entropy_tuning:
            self.step("log_alpha", alpha_gradient)
        self.opt["actor"].step(self.actor, actor_gradient)
        for params, optimizer, gradient in zip(
            self.q, self.opt["q"], critic_gradients, strict=True
        ):
            optimizer.step(params, gradient)
        if self.updates % settings.target_update_period == 0:
            tau = settings.soft_target_update_rate
            for target, params in zip(self.target, self.q, strict=True):
                for k in target:
                    target[k] = (1 - tau) * target[k] + tau * params[k]
        return logs

    def step(self, name, gradient):
        self.opt[name].step(self.scalars, {name: gradient})

    def entropy(self, s, drawn, logs):
        """α of before the step, and the gradient of −mean(log α·(log π + target))."""
        settings = self.settings
        log_alpha = self.scalars["log_alpha"]
        _, log_pi = policy(self.actor, s, drawn["new"], settings)
        logs["log_pi"] = log_pi.mean().item()
        excess = log_pi.mean() + settings.target_entropy
        alpha = torch.tensor(settings.alpha_multiplier, dtype=torch.float64)
        logs["alpha_loss"] = 0.0
        if settings.use_automatic_entropy_tuning:
            alpha = log_alpha.exp() * settings.alpha_multiplier
            logs["alpha_loss"] = -(log_alpha * excess).item()
        logs["alpha"] = alpha.item()
        return alpha, -excess

    def policy_gradient(self, s, a, drawn, alpha, logs):
        settings, leaves = self.settings, leaves_of(self.actor)
        new, log_pi = policy(leaves, s, drawn["new"], settings)
        if self.updates > settings.bc_steps:
            wanted = torch.minimum(*(q_value(q, s, new) for q in self.q))
        elif settings.resampled_bc:
            _, wanted = policy(leaves, s, drawn["warm_up"], settings)
        else:
            wanted = log_prob_of(leaves, s, a, settings)
        loss = (alpha * log_pi - wanted).mean()
        logs["policy_loss"] = loss.item()
        return gradients(loss, leaves)

    def td_target(self, s2, r, d, drawn, alpha, logs):
        settings = self.settings
        next_a, log_pi = policy(self.actor, s2, drawn["backup"], settings)
        value = torch.minimum(*(q_value(q, s2, next_a) for q in self.target))
        if settings.cql_max_target_backup:
            best = value.argmax(1, keepdim=True)
            value, log_pi = value.gather(1, best)[:, 0], log_pi.gather(1, best)[:, 0]
        if settings.backup_entropy:
            value = value - alpha * log_pi
        logs["average_target_q"] = value.mean().item()
        return r + (1 - d) * settings.discount * value

    def gap_target(self, weight):
        """Without the Lagrange multiplier the gap itself is the loss."""
        if not self.settings.cql_lagrange:
            return 0.0
        target = self.settings.cql_target_action_gap
        if weight is not None and self.settings.lagrange_gap == "weighted":
            target = (weight.double() * target).mean()
        return target

    def gap(self, i, params, s, a, s2, mc_returns, drawn, weight, logs):
        """Mean conservative gap of one critic; its terms go into the log."""
        settings, name = self.settings, f"q{i + 1}"
        p = q_value(params, s, a)
        current, log_current = policy(self.actor, s, drawn["current"], settings)
        ahead, log_ahead = policy(self.actor, s2, drawn["next"], settings)
        rand = q_value(params, s, drawn["uniform"])  # (B, n)
        now, then = q_value(params, s, current), q_value(params, s, ahead)  # (B, n)
        for key, q in (("current", now), ("next", then)):
            if mc_returns is not None:
                below = (q < mc_returns).double()[: self.kept].mean()
                logs[f"bound_rate_cql_{name}_{key}_actions"] = below.item()
        if settings.calibrated:
            now = torch.where(now < mc_returns, mc_returns, now)
            then = torch.where(then < mc_returns, mc_returns, then)
        every = torch.cat([rand, p[:, None], then, now], 1)  # (B, 3n + 1)
        if settings.cql_importance_sample:
            log_uniform = math.log(0.5) * drawn["uniform"].shape[-1]
            z = torch.cat([rand - log_uniform, then - log_ahead, now - log_current], 1)
        else:
            z = every
        scaled = z / settings.cql_temp
        top = scaled.detach().max(1, keepdim=True).values
        soft = settings.cql_temp * (top[:, 0] + (scaled - top).exp().sum(1).log())
        rows = (soft - p).clamp(settings.cql_clip_diff_min, settings.cql_clip_diff_max)
        if weight is not None:
            rows = weight.double() * rows
        logs[f"average_qf{i + 1}"] = p.mean().item()
        every, rand, now, then = (x[: self.kept] for x in (every, rand, now, then))
        logs[f"cql_std_{name}"] = every.std(1).mean().item()
        logs[f"cql_{name}_rand"] = rand.mean().item()
        logs[f"cql_{name}_current_actions"] = now.mean().item()
        logs[f"cql_{name}_next_actions"] = then.mean().item()
        logs[f"cql_qf{i + 1}_diff"] = rows.mean().item()
        return rows.mean()

    def penalty(self, gaps, target, logs):
        """Weight of the gaps in the critic losses, and the gradient of log α'."""
        settings = self.settings
        logs["alpha_prime"] = logs["alpha_prime_loss"] = 0.0
        if not settings.cql_lagrange:
            return settings.cql_alpha, None
        multiplier = self.scalars["log_alpha_prime"].exp()
        prime = multiplier.clamp(0.0, 1e6)
        excess = sum(gap - target for gap in gaps)
        slope = multiplier * (multiplier <= 1e6)
        logs["alpha_prime"] = prime.item()
        logs["alpha_prime_loss"] = -0.5 * (prime * settings.cql_alpha * excess).item()
        return prime * settings.cql_alpha, -0.5 * settings.cql_alpha * excess * slope


def leaves_of(params):
    return {k: v.clone().requires_grad_(True) for k, v in params.items()}


def gradients(loss, leaves):
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def returns_to_go(dataset, limit, discount, lowest=None):
    """Discounted return of every row until its episode ends, by a plain walk in float64.

    `lowest`: the reward of a step that misses the goal, for sparse rewards; an episode that ends
    with it is worth `lowest / (1 − discount)` everywhere.
    """
    rewards = [float(r) for r in dataset["rewards"]]
    found, start = [0.0] * len(rewards), 0
    for t in range(len(rewards)):
        jump = t + 1 < len(rewards) and (
            math.dist(dataset["observations"][t + 1], dataset["next_observations"][t])
            > 1e-6
        )
        last = t + 1 == len(rewards)
        if not (dataset["terminals"][t] or last or jump or t + 1 - start == limit):
            continue
        after = 0.0
        for i in reversed(range(start, t + 1)):
            after = rewards[i] + discount * (0.0 if dataset["terminals"][i] else after)
            found[i] = after
        if lowest is not None and rewards[t] == lowest:
            found[start : t + 1] = [lowest / (1 - discount)] * (t + 1 - start)
        start = t + 1
    return found
