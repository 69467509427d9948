"""The loop of optimizer steps that every stage of the training runs, which goes on where it was stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SAVE_S = 90.0
TIMES = "times.json"  # in the folder of states: what each stage took, over all its runs


@dataclass(frozen=True)
class Stage:
    """What one stage trains, and how.

    Attributes:
        name: of the state's file and in progress lines.
        steps: in all.
        cooldown: of them, the last ones before those of `again`, over which learning rates fall to zero.
        modules: what the state holds.
        optimizers: likewise.
        step: gives the loss of a step; draws from the generator only, which is seeded by the step.
        after: called after each step.
        show: called when a state was written.
        autocast: whether to multiply in bfloat16.
        again: of the steps, the last ones, in which learning rates rise and fall once more.
    """

    name: str
    steps: int
    cooldown: int
    modules: Sequence[nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    step: Callable[[int, torch.Generator], Tensor]
    after: Callable[[int], None] = lambda index: None
    show: Callable[[int], None] = lambda index: None
    autocast: bool = True
    again: int = 0


class Loop:
    """Takes a stage's optimizer steps; writes a state every minute, and what each stage took."""

    def __init__(self, work: Path, seed: int, say: Callable[[str], None]) -> None:
        """Begin to count the time.

        Args:
            work: folder of the states.
            seed: of everything random.
            say: gets progress lines.
        """
        self._work, self._seed, self._say = work, seed, say
        self._counted = time.monotonic(), time.process_time()

    def run(self, stage: Stage) -> None:
        """Take steps up to `stage.steps`, from the last state that was written."""
        path = self._work / f"{stage.name}.state.pt"
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in stage.optimizers]
        first = self._resume(stage, path)  # its rates are those of the step that it was written after
        started = saved = time.monotonic()
        losses: list[float] = []
        for index in range(first, stage.steps):
            for optimizer, base in zip(stage.optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * schedule(index, stage.steps - stage.again, stage.cooldown, stage.again)
            losses.append(self._step(stage, index))
            if not (index + 1) % 50:
                rate = (index + 1 - first) / (time.monotonic() - started)
                left = (stage.steps - index - 1) / rate / 60
                self._say(
                    f"{stage.name}: step {index + 1} of {stage.steps}, loss {np.mean(losses[-200:]):.4f}, "
                    f"{left:.0f} min left"
                )
            if time.monotonic() - saved > SAVE_S or index + 1 == stage.steps:
                owners = stage.modules, stage.optimizers
                save_whole(path, (index + 1, *([owner.state_dict() for owner in each] for each in owners)))
                stage.show(index + 1)
                self._count_time(stage.name)
                saved = time.monotonic()

    def _resume(self, stage: Stage, path: Path) -> int:
        """Load the last state that was written, if there is one. Returns the step to go on from."""
        if not path.exists():
            return 0
        first, states, optimizer_states = torch.load(path, weights_only=True)
        owners = [*stage.modules, *stage.optimizers]
        for owner, state in zip(owners, [*states, *optimizer_states], strict=True):
            owner.load_state_dict(state)
        self._say(f"{stage.name}: goes on from step {first}")
        return first

    def _step(self, stage: Stage, index: int) -> float:
        random = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.autocast):
            loss = stage.step(index, random)
        loss.backward()
        for optimizer in stage.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        stage.after(index)
        return float(loss.detach())

    def _count_time(self, name: str) -> None:
        """Add the time since the last call to a stage's in `TIMES`."""
        path, now = self._work / TIMES, (time.monotonic(), time.process_time())
        times = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        spent = times.setdefault(name, {"wall_s": 0.0, "cpu_s": 0.0})
        for unit, before, after in zip(spent, self._counted, now, strict=True):
            spent[unit] = round(spent[unit] + after - before, 2)
        path.write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")
        self._counted = now

    def total_min(self) -> dict[str, float]:
        """What all stages took in minutes, over all their runs: `wall_s` and `cpu_s`."""
        times = json.loads((self._work / TIMES).read_text(encoding="utf-8"))
        return {unit: sum(stage[unit] for stage in times.values()) / 60 for unit in ("wall_s", "cpu_s")}


def schedule(index: int, steps: int, cooldown: int, again: int = 0) -> float:
    """The factor of the learning rate at a step: up over the first ones, then 1, then down to zero.

    Behind them come the steps of `again`: up once more, and down over all of them.
    """
    if index >= steps:
        return schedule(index - steps, again, again)
    warm = min(100, max(1, steps // 10))
    return min(1.0, (index + 1) / warm) * min(1.0, (steps - index) / cooldown)


def save_whole(path: Path, state: object) -> None:
    """Write a state with `torch.save`, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
