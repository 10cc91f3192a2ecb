"""`GymWorld`: a simulated world as a Gymnasium environment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spartan.errors import MissingExtraError, WorldError
from spartan.world_model.drawing import draw_world
from spartan.world_model.environments.base import Environment

try:
    import gymnasium
except ImportError as error:
    raise MissingExtraError(
        "Gymnasium environments need gymnasium: pip install 'spartan-torch[world]'."
    ) from error


class GymWorld(gymnasium.Env[np.ndarray, int]):
    """One world; an action is the number of the intervention that is on for the next step.

    Observations are features `[N, F]`. `info` holds `mask` `[N]` and, after a step, the true local
    graph `edges` `[N, N]` and `targets` `[N]` of it. There is no reward.

    Args:
        world: Which.
        horizon: Steps until an episode is truncated.
        render_mode: `"rgb_array"`, or None.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 7}  # noqa: RUF012

    def __init__(
        self, world: Environment, horizon: int = 100, render_mode: str | None = None
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise WorldError(f'render_mode={render_mode!r} given; None or "rgb_array" needed.')
        self.world = world
        self.horizon = horizon
        self.render_mode = render_mode
        shape = (world.objects, len(world.features))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(world.interventions))  # type: ignore[assignment]
        self._generator = torch.Generator()
        self._steps = 0
        self._state: Tensor | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw a new world."""
        super().reset(seed=seed)
        self._generator.manual_seed(int(self.np_random.integers(2**62)))
        self._state, self._mask = self.world.start(1, self._generator)
        n = self.world.objects
        self._graph = torch.zeros(n, n + 1, dtype=torch.bool)
        self._steps = 0
        return self._state[0].numpy().copy(), {"mask": self._mask[0].numpy().copy()}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Simulate one step under an intervention."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("Call reset() before step().")
        if not self.action_space.contains(action):
            raise gymnasium.error.InvalidAction(
                f"Action {action!r} given; a number from 0 to {len(self.world.interventions) - 1} "
                "needed."
            )
        choice = torch.tensor([int(action)])
        step = self.world.step(self._state, self._mask, choice, self._generator)
        self._state = step.states
        self._graph = torch.cat((step.edges[0], step.targets[0].unsqueeze(-1)), -1)
        self._steps += 1
        info = {
            "mask": self._mask[0].numpy().copy(),
            "edges": step.edges[0].numpy(),
            "targets": step.targets[0].numpy(),
            "event": bool(step.events[0]),
        }
        return step.states[0].numpy().copy(), 0.0, False, self._steps >= self.horizon, info

    def render(self) -> np.ndarray | None:
        """Return a picture with the graph of the last step, `[height, width, 3]`."""
        if self.render_mode is None or self._state is None:
            return None
        image = draw_world(self.world, self._state[0], self._mask[0], self._graph)
        return np.asarray(image)
