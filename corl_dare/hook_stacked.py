"""`StackedHook`: the hooks of several seeds as one; `hook.prepare` makes it with `over_seeds`."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from corl_dare.hook import DareHook, Drawn


class _Holder(torch.nn.Module):
    """A network that `functional_call` can put other tensors into, whatever is called of it."""

    def __init__(self, network: torch.nn.Module | None):
        super().__init__()
        self.network = network

    def forward(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return function(*args)


class StackedHook(DareHook):
    """The hooks of N seeds, whose batches (N, B, ...) are exchanged in one go.

    Every seed keeps a hook of its own for its state; the first one's exchange runs under
    `torch.vmap`, so scores need a density and the rule no generator. Lots are drawn before it.

    Args:
        members: one hook per seed, alike but for the seed.
        offline, online: buffers of all seeds: `draw(n)` gives (N, n), `gather` (N, n, ...).
        over_seeds: turns a function of one seed's policy and of tensors into one of all seeds.
        capture: on a GPU, turns that into one launch, see `DareHook`.

    Raises:
        ValueError: what is configured draws random numbers for each seed.
    """

    def __init__(
        self,
        members: Sequence[DareHook],
        offline: Any,
        online: Any,
        over_seeds: Callable[..., Callable[..., Any]],
        capture: Callable[..., Callable[..., Any]] | None = None,
    ):
        first = members[0]
        if why := first.config.not_stacked():
            raise ValueError(f"the hooks of several seeds cannot be stacked: {why}")
        # What a hook has besides is the first member's.
        vars(self).update(vars(first))
        self.members, self.offline, self.online = list(members), offline, online
        self.refused = torch.stack([hook.refused for hook in members])
        self._over_seeds, self._capture_all = over_seeds, capture
        self._arranged: Callable[..., Any] | None = None

    def _bind(self) -> Callable[..., Any]:
        """`arrange` of all seeds. Made late, when the behavior models are fitted."""
        # The mass beyond a bound is computed seed by seed, and torch would say so.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        first, holder = self.members[0], _Holder(self.members[0].behavior)
        holders = [_Holder(hook.behavior) for hook in self.members]
        together = {}
        for name, tensor in holder.state_dict().items():
            others = [other.state_dict()[name] for other in holders]
            together[name] = torch.stack([tensor, *others[1:]])

        def of_one(
            tensors: dict[str, torch.Tensor],
            offline: Any,
            online: Any,
            weight: Any,
            lots: Any,
        ) -> Any:
            args = first.arrange, (offline, online, [None, None], weight, lots)
            return torch.func.functional_call(holder, tensors, args)

        # The models are frozen: a graph may hold them, and nothing is copied at a call.
        of_all = functools.partial(self._over_seeds(of_one), together)
        return of_all if self._capture_all is None else self._capture_all(of_all)

    def sample(self, batch_size: int) -> Drawn:
        """The batches of all seeds; see `DareHook.sample`."""
        if self._arranged is None:
            self._arranged = self._bind()
        self.samples += 1
        n_offline = int(batch_size * self.mixing_ratio)
        rows, (offline, online) = self._draw_halves(n_offline, batch_size - n_offline)
        # Of all seeds alike: it has no dimension.
        weight = self._weight_tensor(offline[0])
        lots = None
        if self.config.permute != "none":
            drawn = [hook.draw_lots(n_offline, batch_size) for hook in self.members]
            lots = torch.stack(drawn)
        batch, weight, log, states = self._arranged(offline, online, weight, lots)
        log = self._count_refused(log)
        release = self._release(weight, n_offline)
        return Drawn(batch, release, log, states, rows)

    def spread(self) -> None:
        """Give every member its counts."""
        for hook, refused in zip(self.members, self.refused, strict=True):
            hook.samples, hook.refused = self.samples, refused.clone()
