"""The policy that acts: of each state the member of the family that the balance model picks."""

from typing import Any

import numpy as np
import torch
import torch.nn as nn

from policy_family.balance import BalanceModel


class FamilyActor(nn.Module):
    """A family of policies and its balance model.

    Args:
        policy: pi_u, a module; its `choose(states (B, S), coefficients (B,))` gives executable
            actions (B, A), samples in training mode.
        balance: pi_b; its mode acts in both modes.
    """

    def __init__(self, policy: Any, balance: BalanceModel):
        super().__init__()
        self.policy: Any = policy
        self.balance = balance

    @torch.inference_mode()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,), or (N, A) for (N, S); training mode explores."""
        states = torch.as_tensor(state, dtype=torch.float32, device=device).unsqueeze(0)
        actions = self.policy.choose(states, self.balance.mode(states))
        return actions[0].cpu().numpy()
