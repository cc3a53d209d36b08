"""EDIS here against liuxhym/EDIS (commit 28bf16d): diffusion update, sampler, energies.

Both sides get the same weights, rows and noise on the CPU. The authors' files are read from a
checkout and not changed. What they import and a CPU lacks is a stand-in: gin, accelerate, wandb,
d4rl and gym. einops and ema_pytorch are used where they are installed.
"""

import importlib
import io
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from transition_diffusion.energies import KINDS, PublicEnergies
from transition_diffusion.fit import DiffusionFit
from transition_diffusion.sampler import trajectory
from transition_diffusion.transitions import Layout

S, A, B, K, WIDTH, DEPTH, STEPS = 11, 3, 256, 10, 64, 2, 128
LAYOUT = Layout(S, A)
UPDATES = 150  # past 100, where the averaged weights leave their copies
LR = 3e-4
SCALES = {"state": 2.0, "transition": 0.1, "policy": 0.3}
Case = tuple[str, dict[str, float], str]
ROUNDING = "float32: noise levels and sums are rounded in another order"
# A constant added to all energies of a group changes no loss.
NO_GRADIENT = "; the last bias has no gradient but rounding, of which Adam makes 1e-3"


# ---------------------------------------------------------------- the authors' files


class _Anything(types.ModuleType):
    """A module with whatever name somebody asks for; called, it gives back what it was given."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda thing=None, *args, **options: thing


def _einops() -> types.ModuleType:
    """The two forms that the authors use."""
    module = types.ModuleType("einops")
    forms = {"b -> b 1": (-1, 1), "d -> 1 d": (1, -1)}
    module.rearrange = lambda x, form: x.reshape(forms[form])  # type: ignore[attr-defined]
    module.reduce = lambda x, form, how: x.flatten(1).mean(1)  # type: ignore[attr-defined]
    return module


@contextmanager
def _imported(checkout: Path) -> Iterator[SimpleNamespace]:
    """The authors' modules; what was imported for them is forgotten afterwards."""
    before, path = dict(sys.modules), list(sys.path)
    for name in ("gin", "accelerate", "wandb", "d4rl", "gym"):
        sys.modules[name] = _Anything(name)
    for name in ("einops", "ema_pytorch"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = _einops() if name == "einops" else _Anything(name)
    sys.path.insert(0, str(checkout))
    try:
        names = {
            "network": "diffusion.denoiser_network",
            "model": "diffusion.elucidated_diffusion",
            "norm": "diffusion.norm",
            "trainer": "diffusion.trainer",
            "energy": "common.energy",
        }
        yield SimpleNamespace(
            **{k: importlib.import_module(v) for k, v in names.items()},
            ema=sys.modules["ema_pytorch"],
        )
    finally:
        sys.path[:] = path
        sys.modules.clear()
        sys.modules.update(before)


ENV = SimpleNamespace(
    observation_space=SimpleNamespace(shape=(S,)),
    action_space=SimpleNamespace(shape=(A,)),
)
GUIDES = {
    **dict.fromkeys(("state_guide", "transition_guide", "policy_guide"), True),
    "ope_clip": SCALES["state"],
    "te_clip": SCALES["transition"],
    "pe_clip": SCALES["policy"],
}


def their_diffusion(edis: Any, rows: torch.Tensor, steps: int = 32) -> Any:
    """Their model with a small network of the form of their gin file."""
    network = edis.network.ResidualMLPDenoiser(
        LAYOUT.width, dim_t=256, mlp_width=WIDTH, num_layers=DEPTH, layer_norm=False
    )
    norm = edis.norm.Normalizer(rows, skip_dims=[LAYOUT.reward])
    return edis.model.ElucidatedDiffusion(
        network, norm, [LAYOUT.width], steps, args=SimpleNamespace(**GUIDES)
    )


def our_weights(network: Any) -> dict[str, torch.Tensor]:
    """The weights of their network under the names of `Denoiser`."""
    names = {
        "residual_mlp.network.0": "first",
        "residual_mlp.final_linear": "last",
        "proj": "project",
        "time_mlp.1": "noise.1",
        "time_mlp.3": "noise.3",
        **{f"residual_mlp.network.{i + 1}.linear": f"blocks.{i}" for i in range(DEPTH)},
    }
    theirs = dict(network.named_parameters())
    found = {
        f"{ours}.{kind}": theirs[f"{name}.{kind}"].detach().clone()
        for name, ours in names.items()
        for kind in ("weight", "bias")
    }
    return {
        **found,
        "noise.0.frequencies": theirs["time_mlp.0.weights"].detach().clone(),
    }


def our_fit(network: Any) -> DiffusionFit:
    """A fit that starts from the weights of their network."""
    fit = DiffusionFit(LAYOUT.width, WIDTH, DEPTH, LR, UPDATES, seed=0)
    fit.denoiser.load_state_dict(our_weights(network))
    fit.average.module.load_state_dict(fit.denoiser.state_dict())
    return fit


def our_energies(theirs: dict[str, Any], norm: Any) -> PublicEnergies:
    """The energies in the authors' form, with the weights of theirs and their normalizer."""
    ours = PublicEnergies(LAYOUT, K, STEPS, 8)
    for kind in KINDS:
        own = theirs[kind].mlp.model.state_dict()
        ours.networks[kind].load_state_dict(own)
    ours.normalizer.mean.copy_(norm.mean)
    ours.normalizer.std.copy_(norm.std)
    return ours


def largest(
    one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Name -> largest difference of the tensors of that name."""
    return {k: float((one[k] - two[k]).abs().max()) for k in two}


@contextmanager
def _recorded(draws: list[torch.Tensor]) -> Iterator[None]:
    """Inside, what `torch.randn` and `torch.randn_like` draw is kept, in order."""
    randn, randn_like = torch.randn, torch.randn_like

    def keep(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def drawing(*args: Any, **options: Any) -> torch.Tensor:
            draws.append(make(*args, **options))
            return draws[-1]

        return drawing

    torch.randn, torch.randn_like = keep(randn), keep(randn_like)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randn, torch.randn_like = randn, randn_like  # type: ignore[assignment]


def replay(draws: Sequence[torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """A source of noise that hands out what was drawn."""
    left = iter(draws)

    def normal(shape: Any) -> torch.Tensor:
        found = next(left)
        assert tuple(found.shape) == tuple(shape)
        return found

    return normal


# ---------------------------------------------------------------- cases


def rows_of(seed: int, n: int) -> torch.Tensor:
    """Events whose columns have other means and standard deviations."""
    stream = torch.Generator().manual_seed(seed)
    scale = 0.3 + torch.rand(LAYOUT.width, generator=stream)
    rows = torch.randn(n, LAYOUT.width, generator=stream) * scale + scale
    rows[:, LAYOUT.action] = rows[:, LAYOUT.action].clamp(-1, 1)
    return rows


def trainer_of(edis: Any, diffusion: Any) -> Any:
    """Their trainer as its constructor makes it, without accelerate."""
    made = object.__new__(edis.trainer.REDQTrainer)
    parameters = list(diffusion.parameters())
    made.model = diffusion
    made.opt = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    made.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(made.opt, UPDATES)
    made.step, made.save_and_sample_every = 0, 10**9
    made.accelerator = SimpleNamespace(
        device="cpu",
        autocast=nullcontext,
        backward=lambda loss: loss.backward(),
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        wait_for_everyone=lambda: None,
        is_main_process=True,
    )
    made.ema = SimpleNamespace(to=lambda device: None, update=lambda: None)
    if hasattr(edis.ema.EMA, "update"):
        made.ema = edis.ema.EMA(diffusion, beta=0.995, update_every=10)
    return made


def update_case(edis: Any) -> Case:
    """Whole updates of the diffusion model: loss, clip, Adam, cosine, averaged weights."""
    torch.manual_seed(0)
    rows = rows_of(1, 4096)
    diffusion = their_diffusion(edis, rows)
    fit = our_fit(diffusion.net)
    trainer, norm = trainer_of(edis, diffusion), diffusion.normalizer
    losses = []
    for _ in range(UPDATES):
        batch = rows[torch.randint(len(rows), (B,))]
        draws: list[torch.Tensor] = []
        with _recorded(draws):
            theirs = trainer.train_on_batch(batch, use_wandb=False)
        ours = fit.update(norm.normalize(batch), *draws)
        losses.append(abs(float(ours) - theirs))
    found = largest(our_weights(diffusion.net), fit.denoiser.state_dict())
    what = ROUNDING
    if hasattr(trainer.ema, "ema_model"):
        own = our_weights(trainer.ema.ema_model.net)
        average = largest(own, fit.average.module.state_dict())
        found.update({f"averaged {k}": v for k, v in average.items()})
    else:
        what += "; averaged weights left out, ema_pytorch is not installed"
    name = f"diffusion model, {UPDATES} updates"
    return name, {"loss": max(losses), **found}, what


def sampler_case(edis: Any) -> Case:
    """Guided samples: 128 steps, three energies, their constant factors."""
    torch.manual_seed(2)
    # As the averaged model that they sample from.
    diffusion = their_diffusion(edis, rows_of(1, 4096)).requires_grad_(False)
    theirs = {kind: energy_of(edis) for kind in KINDS}
    fit, draws = our_fit(diffusion.net), []
    with _recorded(draws):
        own = diffusion.sample(
            *(theirs["state"], theirs["transition"], theirs["policy"], ENV, 1.0),
            batch_size=32,
            num_sample_steps=STEPS,
            clamp=False,
            disable_tqdm=True,
        ).detach()
    ours = our_energies(theirs, diffusion.normalizer)
    guide = ours.guide(SCALES, exact=False)
    *_, last = trajectory(fit.average, (32, LAYOUT.width), STEPS, replay(draws), guide)
    samples = largest({"samples": own}, {"samples": ours.normalizer.undo(last)})
    return f"guided samples, {STEPS} steps", samples, ROUNDING + ", over 255 evaluations"


def energy_of(edis: Any) -> Any:
    """One of their energies, as their launchers make it."""
    return edis.energy.energy_model(S, A, 3, "relu", True, with_reward=True)


def _noise_of(kind: str, draws: list[torch.Tensor]) -> list[torch.Tensor]:
    """What they drew for one energy, in the order and the shapes in which ours draws."""
    event = (A, S, 1, S)  # the order of their draws: action, state, reward, next state

    def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        assert tuple(p.shape[1] for p in parts) == event
        return torch.cat((parts[1], parts[0], parts[2], parts[3]), 1)

    if kind == "state":
        return [torch.cat(draws[4:]), joined(draws[:4]).unsqueeze(0)]
    # First level: the start of the sampler, then the noise of the positives. Second level:
    # start and steps of the sampler, all overwritten, then the noise of the positives.
    return [draws[0], torch.stack([joined(draws[1:5]), joined(draws[-4:])])]


def energies_case(edis: Any, kind: str) -> Case:
    """One step of an energy: negatives, groups, loss, Adam."""
    torch.manual_seed(3)
    rows = rows_of(1, 4096)
    diffusion, net = their_diffusion(edis, rows), energy_of(edis)
    events = rows_of(4, B)
    actions = events[:, LAYOUT.action].flip(0).clone()
    ours = our_energies(dict.fromkeys(KINDS, net), diffusion.normalizer)
    trainer = object.__new__(edis.trainer.REDQTrainer)
    trainer.accelerator = SimpleNamespace(device="cpu")
    trainer.ema = SimpleNamespace(ema_model=diffusion)
    setattr(trainer, f"{kind}_energy", net)
    optimizer = {"state": "ope", "transition": "te", "policy": "pe"}[kind]
    setattr(trainer, f"{optimizer}_optim", torch.optim.Adam(net.parameters(), 1e-3))
    parts = [events[:, c] for c in (LAYOUT.state, LAYOUT.action)]
    parts += [events[:, S + A : S + A + 1], events[:, LAYOUT.next_state]]
    batch = [*parts, torch.zeros(B, 1), torch.zeros(B, 1)]
    before = [batch, lambda states: (actions, None)] if kind == "policy" else [batch]
    draws: list[torch.Tensor] = []
    with _recorded(draws):
        theirs = getattr(trainer, f"train_{kind}_energy")(*before, K, ENV)
    if kind == "policy":
        events = LAYOUT.join([parts[0], actions, *parts[2:]])
    noise = replay(_noise_of(kind, draws))
    loss = ours.losses(kind, events, diffusion.net, noise).sum()
    network = ours.networks[kind]
    mine = torch.optim.Adam(network.parameters(), 1e-3)
    loss.backward()
    mine.step()
    found = largest(net.mlp.model.state_dict(), network.state_dict())
    relative = abs(loss.item() - theirs.item()) / abs(theirs.item())
    return (
        f"{kind} energy, one step",
        {"loss, relative": relative, **found},
        ROUNDING + NO_GRADIENT,
    )


def normalizer_case(edis: Any) -> Case:
    """Mean and standard deviation of all rows."""
    rows, ours = rows_of(1, 4096), PublicEnergies(LAYOUT, K, STEPS, 8).normalizer
    theirs = edis.norm.Normalizer(rows, skip_dims=[LAYOUT.reward])
    buffer = SimpleNamespace(
        size=len(rows),
        gather=lambda i: list(torch.tensor_split(rows[i], (S, S + A, S + A + 1), 1)),
    )
    ours.fit(buffer, LAYOUT, [LAYOUT.reward])
    pairs = {k: getattr(theirs, k) for k in ("mean", "std")}
    return "normalizer", largest(pairs, dict(ours.named_buffers())), "float64 sums here"


def cases(checkout: Path | str) -> list[Case]:
    """(name, {parameter: largest difference}, what explains it) of every comparison.

    Args:
        checkout: of liuxhym/EDIS.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stream = torch.get_rng_state()
    try:
        # They print what they do, with a bar for every batch of samples.
        quiet = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
        with quiet[0], quiet[1], _imported(Path(checkout)) as edis:
            found = [normalizer_case(edis), update_case(edis), sampler_case(edis)]
            return found + [energies_case(edis, kind) for kind in KINDS]
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(stream)
