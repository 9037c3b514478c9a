"""What a criterion asked to observe of every weight: gradients after backward passes, inputs in forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spdtool.models.fsdp import local_rows
from spdtool.pruning.masks import Masks
from spdtool.pruning.statistics import STATISTICS, Gradient, Settings, Statistic, Stats


class Observation:
    """Keeps the statistics of every weight of `masks` that `needs` names.

    Args:
        layers: parameter name to the linear layer that it belongs to, to observe inputs.
    """

    def __init__(
        self, masks: Masks, needs: Sequence[str], settings: Settings, layers: Mapping[str, nn.Linear] | None = None
    ) -> None:
        self.masks, self.settings, self.layers = masks, settings, dict(layers or {})
        self.kinds = {need: STATISTICS[need] for need in needs}
        self._kept: dict[str, dict[str, Statistic]] = {name: {} for name in masks.parameters}
        self._renew(list(self.kinds))

    def reads(self, what: str) -> bool:
        """Whether `gradient` or `input` is observed."""
        return any(kind.reads == what for kind in self.kinds.values())

    @property
    def learns(self) -> bool:
        """Whether scores are learned over the whole stage."""
        return any(kind.learned for kind in self.kinds.values())

    @torch.no_grad()
    def gradients(self, scale: float) -> None:
        """After a backward pass: take in the gradients, which a loss scale multiplied."""
        for name, weight in self.masks.parameters.items():
            wanted = self._reading("gradient", name)
            for statistic in wanted:
                statistic.count += 1
            if wanted and weight.grad is not None:  # None: a layer that the draw left out
                gradient = local_rows(weight.grad).float()
                value = gradient if scale == 1.0 else gradient / scale
                seen = Gradient(value, self.masks.filled(name), None if self.masks.kept else self.masks.dead[name])
                for statistic in wanted:
                    statistic.add(seen)

    @contextmanager
    def watching(self, real: Tensor | None) -> Iterator[None]:
        """Take in what goes into the layers while the context is open."""
        handles = []
        for name, layer in self.layers.items():
            if wanted := self._reading("input", name):
                handles.append(layer.register_forward_pre_hook(_hook(wanted, real)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def pool(self, total: Callable[[Iterable[Tensor]], None]) -> None:
        """Add up the statistics of inputs over several processes, each of which saw rows of its own.

        Args:
            total: replaces tensors, in place, by their sums over the processes.
        """
        seen = [statistic for name in self._kept for statistic in self._reading("input", name)]
        total(tensor for statistic in seen for tensor in (statistic.sum(), statistic.count))

    def empty(self) -> bool:
        """Whether a statistic that is not learned over the stage has observed no weight at all."""
        fresh = [need for need, kind in self.kinds.items() if not kind.learned]
        return any(not any(int(kept[need].count) for kept in self._kept.values()) for need in fresh)

    def forget(self) -> None:
        """Drop what is not learned over the stage."""
        self._renew([need for need, kind in self.kinds.items() if not kind.learned])

    def stats(self, name: str) -> Stats:
        """What was observed of the weight called `name`."""
        return Stats(**{need: statistic.read() for need, statistic in self._kept[name].items()})

    def state_dict(self) -> dict[str, Tensor]:
        """The statistics as flat tensors, named `part.need.parameter`."""
        return {
            f"{part}.{need}.{name}": value
            for name, kept in self._kept.items()
            for need, statistic in kept.items()
            for part, value in statistic.state().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        found: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in state.items():
            part, need, name = key.split(".", 2)
            found.setdefault((need, name), {})[part] = value
        for name, kept in self._kept.items():
            for need, statistic in kept.items():
                statistic.load(found[need, name])

    def _renew(self, needs: Sequence[str]) -> None:
        for name, weight in self.masks.parameters.items():
            self._kept[name] |= {need: self.kinds[need](weight, self.settings) for need in needs}

    def _reading(self, what: str, name: str) -> list[Statistic]:
        return [statistic for statistic in self._kept[name].values() if statistic.reads == what]


def _hook(wanted: list[Statistic], real: Tensor | None) -> Callable[[nn.Module, Any], None]:
    @torch.no_grad()
    def look(_: nn.Module, inputs: Any) -> None:
        seen: Tensor = inputs[0].detach()
        with torch.autocast(seen.device.type, enabled=False):
            tokens = (seen[real.bool()] if real is not None and real.shape == seen.shape[:-1] else seen).float()
            tokens = tokens.reshape(-1, seen.shape[-1])
            for statistic in wanted:
                statistic.count += len(tokens)
                statistic.add_inputs(tokens)

    return look
