"""The observer: it feeds the statistics, gradients after backward passes and inputs in forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spdtool.models import collectives, fsdp
from spdtool.pruning.masks import Masks
from spdtool.pruning.statistics import STATISTICS, Statistic, Stats, WeightGradient
from spdtool.recipe.training import Prune


class Observer:
    """Gather the statistics in `needs` of every weight of `masks`.

    Args:
        section: settings of the statistics.
        layers: parameter name to the linear layer that it belongs to, to observe inputs.
        names: the weights to observe; None: all.
    """

    def __init__(
        self,
        masks: Masks,
        needs: Sequence[str],
        section: Prune,
        layers: Mapping[str, nn.Linear] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.masks, self.section, self.layers = masks, section, dict(layers or {})
        self.kinds = {need: STATISTICS[need] for need in needs}
        self.statistics: dict[str, dict[str, Statistic]] = {}
        for name in masks.parameters if names is None else names:
            self.statistics[name] = {}
        self._start_anew(self.kinds)

    def reads(self, source: str) -> bool:
        """Whether `gradient` or `input` is observed."""
        return any(kind.reads == source for kind in self.kinds.values())

    @property
    def learns(self) -> bool:
        """Whether scores are learned over the whole stage."""
        return any(kind.is_learned for kind in self.kinds.values())

    @torch.no_grad()
    def add_gradients(self, overflow: Tensor | None = None) -> None:
        """Add the gradients of an optimiser step, once all backward passes are done.

        Args:
            overflow: scalar on the device, above 0 if fp16 overflowed: the step then does not
                count. None: it counts.
        """
        counts = None if overflow is None else overflow == 0
        for name in self.statistics:
            weight, statistics = self.masks.parameters[name], self._reading("gradient", name)
            for statistic in statistics:
                statistic.count += 1 if counts is None else counts
            if statistics and weight.grad is not None:  # None: a layer that the draw left out
                gradient = fsdp.local_rows(weight.grad).float()
                if counts is not None:
                    # not a product with 0, which makes an infinity no number
                    gradient = gradient.masked_fill(~counts, 0.0)
                dead = None if self.masks.can_regrow else self.masks.dead[name]
                sample = WeightGradient(gradient, self.masks.build_full_weight(name), dead, counts)
                for statistic in statistics:
                    statistic.add_gradient(sample)

    @contextmanager
    def observe_inputs(self, attention_mask: Tensor | None) -> Iterator[None]:
        """Add the layers' inputs in forward passes inside the context; see `Pruner.observe_inputs`."""
        handles, tokens = [], None if attention_mask is None else RealTokens(attention_mask)
        for name, layer in self.layers.items():
            if name in self.statistics and (statistics := self._reading("input", name)):
                hook = make_input_hook(statistics, tokens)
                handles.append(layer.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sum_inputs_over_ranks(self) -> None:
        """Sum the statistics of inputs over the ranks, each of which has other rows. Collective."""
        tensors = []
        for name in self.statistics:
            for statistic in self._reading("input", name):
                tensors += [statistic.sum(), statistic.count]
        collectives.sum_over_ranks(tensors)

    def is_empty(self) -> bool:
        """Whether a statistic that is not learned over the stage has observed no weight at all."""
        if not self.statistics:
            return bool(self._not_learned())
        for need in self._not_learned():
            # one read from the device for all of them
            if not bool(torch.stack([statistics[need].count for statistics in self.statistics.values()]).any()):
                return True
        return False

    def reset(self) -> None:
        """Drop everything that is not learned over the stage."""
        self._start_anew(self._not_learned())

    def stats(self, name: str) -> Stats:
        """Everything that was observed of the weight called `name`."""
        return Stats(**{need: statistic.read() for need, statistic in self.statistics[name].items()})

    def state_dict(self) -> dict[str, Tensor]:
        """The statistics as flat tensors, named `entry.need.parameter`. Collective."""
        state = {}
        for name, statistics in self.statistics.items():
            for need, statistic in statistics.items():
                for entry, value in statistic.state_dict().items():
                    state[f"{entry}.{need}.{name}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        states: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in state.items():
            entry, need, name = key.split(".", 2)
            states.setdefault((need, name), {})[entry] = value
        for name, statistics in self.statistics.items():
            for need, statistic in statistics.items():
                statistic.load_state_dict(states[need, name])

    def _not_learned(self) -> list[str]:
        return [need for need, kind in self.kinds.items() if not kind.is_learned]

    def _start_anew(self, needs: Iterable[str]) -> None:
        for name, statistics in self.statistics.items():
            for need in needs:
                statistics[need] = self.kinds[need](self.masks.parameters[name], self.section)

    def _reading(self, source: str, name: str) -> list[Statistic]:
        """The statistics of one weight that read its gradient, or its layer's inputs."""
        return [statistic for statistic in self.statistics[name].values() if statistic.reads == source]


class RealTokens:
    """Which tokens of a batch are no padding, as numbers on the device of the layers: nothing is asked of it.

    Args:
        mask: attention mask [rows, tokens], best on the CPU.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        self._numbers = mask.bool().flatten().nonzero().flatten()

    def select(self, inputs: Tensor) -> Tensor:
        """Return the inputs of real tokens, [tokens, width], of a layer's inputs [rows, tokens, width]."""
        self._numbers = self._numbers.to(inputs.device)  # once a batch
        return inputs.reshape(-1, inputs.shape[-1]).index_select(0, self._numbers)


def make_input_hook(
    statistics: list[Statistic], real_tokens: RealTokens | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Make a forward hook that adds a layer's inputs to its statistics."""

    @torch.no_grad()
    def add_inputs(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs = arguments[0].detach()
        # under autocast the products would be bf16: the sums need all digits of float32
        with torch.autocast(inputs.device.type, enabled=False), full_float32():
            tokens = inputs
            # some architectures drop padding before their layers, and have no row for it here
            if real_tokens is not None and real_tokens.shape == inputs.shape[:-1]:
                tokens = real_tokens.select(inputs)
            tokens = tokens.float().reshape(-1, inputs.shape[-1])
            for statistic in statistics:
                statistic.count += len(tokens)
                statistic.add_inputs(tokens)

    return add_inputs


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply with all bits of float32 inside the block, also where a recipe trains in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
