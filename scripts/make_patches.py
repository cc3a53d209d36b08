"""Writes patches/*.patch, which add DARE to upstream CORL's own files, and applies them.

    python scripts/make_patches.py --write --corl PATH      # make patches
    python scripts/make_patches.py --apply --corl PATH      # make corl

A patch only inserts lines and has no context lines, so it holds none of upstream's text. That
makes it depend on line numbers: it fits exactly one version of its target, which is checked by
sha256 before anything is touched.
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).parent.parent
COMMIT = "6afec90484bbf47dee05fdf525e26a3ebe028e9b"  # of tinkoff-ai/CORL


@dataclass(frozen=True)
class Patch:
    """Lines to insert into one upstream file."""

    target: str  # path in CORL
    sha256: str  # of the target at COMMIT
    insertions: dict[int, str]  # after upstream's line N -> text


def method_of(name: str, algorithm: str) -> str:
    """A method of our DARE file, word for word: the patch and the file cannot drift apart."""
    lines = (ROOT / "algorithms" / f"dare_{algorithm}.py").read_text().splitlines()
    start = next(
        i for i, line in enumerate(lines) if line.startswith(f"    def {name}(")
    )
    first = start - 1 if lines[start - 1].startswith("    @") else start
    end = start + 1
    while not lines[end] or lines[end].startswith(("     ", "    )")):
        end += 1
    return "\n".join(lines[first:end]).rstrip() + "\n"


def class_of(name: str, algorithm: str) -> str:
    """A dataclass of our DARE file, word for word."""
    lines = (ROOT / "algorithms" / f"dare_{algorithm}.py").read_text().splitlines()
    start = lines.index(
        next(line for line in lines if line.startswith(f"class {name}("))
    )
    end = start + 1
    while not lines[end] or lines[end].startswith(" "):
        end += 1
    return "\n".join(lines[start - 1 : end]).rstrip() + "\n"


def code(text: str, depth: int) -> str:
    return indent(text.strip("\n") + "\n", "    " * depth)


def iql_patch() -> Patch:
    methods = "\n".join(
        method_of(name, "iql")
        for name in ("_noise", "_propose", "_max_backup", "_released_losses")
    )
    setup = """
dare_online_buffer = ReplayBuffer(
    state_dim, action_dim, config.buffer_size, config.device
)
dare_hook = dare_for_corl(
    config,
    trainer,
    replay_buffer,
    dare_online_buffer,
    dataset=dataset,
    return_range=return_reward_range(dataset, max_steps),
    state_mean=state_mean,
    state_std=state_std,
    policy_log_prob=clipped_log_prob(trainer.actor, max_action),
    clipped_policy=True,
    q_function=lambda s, a: trainer.q_target(s, a),
)
"""
    return Patch(
        "algorithms/finetune/iql.py",
        "e13a91b99a4a2982b0747198c240ba1b8494d79163d6a5b288ccf58426a570cb",
        {
            20: "import dataclasses\n"
            "from typing import ClassVar\n\n"
            "from corl_dare.config import DareConfig\n"
            "from corl_dare.hook import clipped_log_prob\n"
            "from corl_dare.upstream import ExchangedBuffer, dare_for_corl\n",
            22: "EXPECTILE_RELEASED = 0.99  # of V on released rows in DARE-IV, Eq. 35\n",
            29: "\n" + class_of("DareIQLConfig", "iql"),
            63: code(
                "dare: DareIQLConfig = dataclasses.field(default_factory=DareIQLConfig)",
                1,
            ),
            455: code(
                "self.dare, self.dare_release = None, None\n"
                "self.dare_generator, self.dare_noise = None, None",
                2,
            ),
            456: methods + "\n",
            464: code(
                """
release = self.dare_release
if release is not None and self.dare.value == "iv":
    weight = release.weight
    expectile = weight * self.iql_tau + (1.0 - weight) * EXPECTILE_RELEASED
    v_loss = asymmetric_l2_loss(adv, expectile)
if release is not None and self.dare.value == "offline":
    v_loss = asymmetric_l2_loss(release.weight.sqrt() * adv, self.iql_tau)
""",
                2,
            ),
            508: code(
                """
release = self.dare_release
if release is not None and self.dare.policy == "sac":
    released = self._released_losses(
        observations, policy_out, self.dare_noise[:1], release.kept
    )
    policy_loss = torch.mean(release.mix(exp_adv * bc_losses, released))
""",
                2,
            ),
            527: code(
                """
if self.dare_release is not None:
    release = self.dare_release
    self.dare_noise = self._noise(actions)
    next_q = self._max_backup(next_observations, self.dare_noise[1:], release.kept)
    next_v = release.mix(next_v, next_q)
""",
                2,
            ),
            660: "\n" + code(setup, 1),
            677: code(
                """
if dare_hook is not None:
    dare_hook.pretrain()
    replay_buffer = ExchangedBuffer(dare_hook, trainer)
""",
                3,
            ),
        },
    )


def cal_ql_patch() -> Patch:
    setup = """
if config.dare.keep_calibration:
    raise ValueError(
        "dare.keep_calibration needs corl_dare's own file: this buffer stores a return of 0 "
        "for online rows"
    )
dare_hook = dare_for_corl(
    config,
    trainer,
    offline_buffer,
    online_buffer,
    dataset=dataset,
    return_range=return_reward_range(dataset, max_steps),
    state_mean=state_mean,
    state_std=state_std,
    policy_log_prob=lambda s, a: dare_log_prob(trainer.actor, s, a),
    q_function=lambda s, a: dare_target_q(trainer, s, a),
    reward_scale=config.reward_scale if config.normalize_reward else 1.0,
    mixing_ratio=config.mixing_ratio,
)
"""
    functions = """
def dare_log_prob(actor, observations, actions):
    # Of given actions; the policy's own method scores a new sample.
    mean, log_std = actor.base_network(observations).chunk(2, dim=-1)
    log_std = actor.log_std_multiplier() * log_std + actor.log_std_offset()
    inside = (actions / actor.max_action).clamp(-(1.0 - 1e-6), 1.0 - 1e-6)
    return actor.tanh_gaussian.log_prob(mean, log_std, inside)


def dare_target_q(trainer, observations, actions):
    return torch.minimum(
        trainer.target_critic_1(observations, actions),
        trainer.target_critic_2(observations, actions),
    )
"""
    return Patch(
        "algorithms/finetune/cal_ql.py",
        "97790ec99466a118fcba19fb8dc1044e76707f0a5e38a2c096afc659a8c892ae",
        {
            19: "import dataclasses\n"
            "from typing import ClassVar\n\n"
            "from corl_dare.config import DareConfig\n"
            "from corl_dare.upstream import ExchangedBuffer, dare_for_corl\n",
            24: "\n" + class_of("DareCalQLConfig", "cal_ql"),
            73: code(
                "dare: DareCalQLConfig = dataclasses.field(default_factory=DareCalQLConfig)",
                1,
            ),
            540: code(functions, 0) + "\n\n",
            624: code("self.dare, self.dare_release = None, None", 2),
            814: code(
                """
if self.dare_release is not None:
    bounds = self.cql_clip_diff_min, self.cql_clip_diff_max
    gaps = [cql_qf1_ood - q1_predicted, cql_qf2_ood - q2_predicted]
    cql_qf1_diff, cql_qf2_diff = (
        (self.dare_release.weight * gap.clamp(*bounds)).mean() for gap in gaps
    )
    if self.cql_lagrange and self.dare.lagrange_gap == "weighted":
        # The whole target is subtracted below.
        released = 1.0 - self.dare_release.weight.mean()
        cql_qf1_diff = cql_qf1_diff + released * self.cql_target_action_gap
        cql_qf2_diff = cql_qf2_diff + released * self.cql_target_action_gap
""",
                2,
            ),
            1115: code(setup, 1) + "\n",
            1132: code(
                """
if dare_hook is not None:
    dare_hook.pretrain()
    # The hook draws both halves; the loop's own second half stays empty.
    offline_buffer = ExchangedBuffer(dare_hook, trainer)
    batch_size_offline, batch_size_online = config.batch_size, 0
""",
                3,
            ),
        },
    )


def awac_patch() -> Patch:
    methods = """
def dare_q(self, critics, states, actions):
    return torch.min(*(critic(states, actions) for critic in critics)).squeeze(-1)

def dare_target_q(self, states, actions):
    return self.dare_q((self._target_critic_1, self._target_critic_2), states, actions)

def _released_losses(self, states, noise):
    # SAC's policy loss, Eq. 16. The gradient of Q passes the clip as if there were none.
    policy = self._actor._get_policy(states)
    actions = policy.mean + noise * policy.stddev
    bounds = self._actor._min_action, self._actor._max_action
    executed = actions.detach().clamp(*bounds) + (actions - actions.detach())
    log_prob = policy.log_prob(actions).sum(-1)
    q = self.dare_q((self._critic_1, self._critic_2), states, executed)
    return self.dare.entropy_alpha * log_prob - q

def _dare_actor_loss(self, states, actions):
    critics, release = (self._critic_1, self._critic_2), self.dare_release
    # Both losses read the same sample of the policy.
    noise = torch.randn_like(actions)
    with torch.no_grad():
        policy = self._actor._get_policy(states)
        sample = policy.mean + noise * policy.stddev
        sample = sample.clamp(self._actor._min_action, self._actor._max_action)
        v = self.dare_q(critics, states, sample)
        adv = self.dare_q(critics, states, actions) - v
        weights = (adv / self._awac_lambda).exp().clamp(max=self._exp_adv_max)
    losses = -self._actor.log_prob(states, actions).squeeze(-1) * weights
    kept = release.kept
    released = self._released_losses(states[kept:], noise[kept:])
    return release.mix(losses, released).mean(-1)
"""
    setup = """
dare_online_buffer = ReplayBuffer(
    state_dim, action_dim, config.buffer_size, config.device
)
dare_hook = dare_for_corl(
    config,
    awac,
    replay_buffer,
    dare_online_buffer,
    dataset=dataset,
    return_range=return_reward_range(dataset, max_steps),
    state_mean=state_mean,
    state_std=state_std,
    policy_log_prob=clipped_log_prob(actor._get_policy, actor._max_action),
    clipped_policy=True,
    q_function=awac.dare_target_q,
)
"""
    return Patch(
        "algorithms/finetune/awac.py",
        "9f3671f0a2933c98b1bbecb11b9d213a2aa4bce93822a8e0d085427b2a591b6e",
        {
            16: "import dataclasses\n"
            "from typing import ClassVar\n\n"
            "from corl_dare.config import DareConfig\n"
            "from corl_dare.hook import clipped_log_prob\n"
            "from corl_dare.upstream import ExchangedBuffer, dare_for_corl\n",
            20: "\n\n" + class_of("DareAWACConfig", "awac"),
            49: code(
                "dare: DareAWACConfig = dataclasses.field(default_factory=DareAWACConfig)",
                1,
            ),
            248: code("self.dare, self.dare_release = None, None", 2),
            249: code(methods, 1) + "\n",
            254: code(
                """
if self.dare_release is not None:
    return self._dare_actor_loss(states, actions)
""",
                2,
            ),
            523: code(setup, 1),
            546: code(
                """
if dare_hook is not None:
    dare_hook.pretrain()
    replay_buffer = ExchangedBuffer(dare_hook, awac)
""",
                3,
            ),
        },
    )


SPOT_SETUP = """
dare_online_buffer = ReplayBuffer(
    state_dim, action_dim, config.buffer_size, config.device
)
dare_std = config.dare.density_std(config.expl_noise) * max_action
dare_hook = dare_for_corl(
    config,
    trainer,
    replay_buffer,
    dare_online_buffer,
    dataset=dataset,
    return_range=return_reward_range(dataset, max_steps),
    state_mean=state_mean,
    state_std=state_std,
    policy_log_prob=noisy_log_prob(trainer.actor, dare_std, max_action),
    clipped_policy=True,
    q_function=lambda s, a: dare_target_q(trainer, s, a),
)
"""


def spot_patch() -> Patch:
    function = """
def dare_target_q(trainer, observations, actions):
    return torch.minimum(
        trainer.critic_1_target(observations, actions),
        trainer.critic_2_target(observations, actions),
    ).squeeze(-1)
"""
    return Patch(
        "algorithms/finetune/spot.py",
        "5a26ab30855e4da0af37fcb9d6bb52e5724f0c83146ffb4a68ed64454928c6d6",
        {
            19: "import dataclasses\n\n"
            "from corl_dare.config import NoisyDareConfig\n"
            "from corl_dare.hook import noisy_log_prob\n"
            "from corl_dare.upstream import ExchangedBuffer, dare_for_corl\n",
            69: code(
                "dare: NoisyDareConfig = dataclasses.field(default_factory=NoisyDareConfig)",
                1,
            ),
            71: code(
                """
if self.dare.enabled and self.lambd_cool:
    raise ValueError(
        "lambd_cool true and dare would both release the support constraint; set "
        "lambd_cool to false, or dare.enabled to false"
    )
""",
                2,
            ),
            458: code(function, 0) + "\n\n",
            518: code("self.dare, self.dare_release = None, None", 2),
            625: code(
                """
if self.dare_release is not None:
    neg_log_beta = self.dare_release.weight * neg_log_beta
""",
                3,
            ),
            791: "\n" + code(SPOT_SETUP, 1),
            828: code(
                """
if dare_hook is not None:
    dare_hook.pretrain()
    replay_buffer = ExchangedBuffer(dare_hook, trainer)
""",
                3,
            ),
        },
    )


def patches() -> dict[str, Patch]:
    return {
        "iql": iql_patch(),
        "cal_ql": cal_ql_patch(),
        "awac": awac_patch(),
        "spot": spot_patch(),
    }


def render(patch: Patch) -> str:
    """A unified diff with insertions only and no context."""
    out = [f"--- a/{patch.target}\n", f"+++ b/{patch.target}\n"]
    shift = 0
    for line in sorted(patch.insertions):
        text = patch.insertions[line].splitlines()
        out.append(f"@@ -{line},0 +{line + shift + 1},{len(text)} @@\n")
        out += [f"+{row}".rstrip() + "\n" for row in text]
        shift += len(text)
    return "".join(out)


def patched_text(patch: Patch, source: str) -> str:
    """The target with the lines inserted."""
    lines = source.splitlines(keepends=True)
    out = []
    for number, line in enumerate(lines, start=1):
        out.append(line)
        if number in patch.insertions:
            out += [f"{row}\n" for row in patch.insertions[number].splitlines()]
    return "".join(out)


def check_target(patch: Patch, corl: Path) -> str:
    """Text of the target.

    Raises:
        SystemExit: it is missing or another version than the patch was made for.
    """
    path = corl / patch.target
    if not path.is_file():
        raise SystemExit(f"error: {path} does not exist; --corl must be a CORL checkout")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != patch.sha256:
        raise SystemExit(
            f"error: {path} is not the file this patch was made for; check out CORL at "
            f"{COMMIT} without changes (or is it patched already?)"
        )
    return data.decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corl", type=Path, required=True, help="a CORL checkout")
    parser.add_argument("--write", action="store_true", help="write patches/*.patch")
    parser.add_argument("--apply", action="store_true", help="patch the checkout")
    args = parser.parse_args()
    if not (args.write or args.apply):
        parser.error("nothing to do: --write or --apply")
    texts = {name: check_target(p, args.corl) for name, p in patches().items()}
    for name, patch in patches().items():
        result = patched_text(patch, texts[name])
        compile(result, patch.target, "exec")
        if args.write:
            (ROOT / "patches" / f"{name}.patch").write_text(render(patch))
            print(
                f"patches/{name}.patch: {sum(map(len, patch.insertions.values()))} bytes"
            )
        if args.apply:
            (args.corl / patch.target).write_text(result)
            print(f"patched {patch.target}", file=sys.stderr)


if __name__ == "__main__":
    main()
