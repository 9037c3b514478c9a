"""Statistics: what is gathered from gradients and inputs, what is left out, and that it survives an interruption."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spdtool.pruning.masks import Masks
from spdtool.pruning.observation import Observation
from spdtool.pruning.statistics import STATISTICS, Settings, Stats, blocks_of

NEEDS = tuple(STATISTICS)
GRADIENTS = tuple(need for need, kind in STATISTICS.items() if kind.reads == "gradient")


def made(needs: tuple[str, ...] = NEEDS, seed: int = 0) -> tuple[Observation, dict[str, nn.Linear]]:
    torch.manual_seed(seed)
    layers = {"a": nn.Linear(5, 3), "b": nn.Linear(3, 4)}
    masks = Masks({name: layer.weight for name, layer in layers.items()})
    return Observation(masks, needs, Settings(block=4), layers), layers


def shown(layers: dict[str, nn.Linear], seed: int, *names: str) -> None:
    """Give the layers random gradients; None to those that are not named."""
    draw = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        gradient = torch.randn(layer.weight.shape, generator=draw)
        layer.weight.grad = gradient if not names or name in names else None


def test_every_statistic_has_its_field() -> None:
    assert set(NEEDS) == set(Stats.__dataclass_fields__)


def test_what_is_read_of_gradients_and_of_inputs() -> None:
    reads = {need: (made((need,))[0].reads("gradient"), made((need,))[0].reads("input")) for need in NEEDS}
    assert {need for need, (_, inputs) in reads.items() if inputs} == {"input_norm", "input_gram"}
    assert all(gradients != inputs for gradients, inputs in reads.values())
    assert {need for need in NEEDS if made((need,))[0].learns} == {"movement", "movement_soft"}
    nothing = made(())[0]
    assert not nothing.reads("gradient")
    assert not nothing.reads("input")
    assert not nothing.empty()


def test_a_loss_scale_is_taken_out_of_the_gradients() -> None:
    (plain, layers), (scaled, others) = made(GRADIENTS), made(GRADIENTS)
    shown(layers, 1)
    shown(others, 1)
    for layer in others.values():
        assert layer.weight.grad is not None
        layer.weight.grad *= 8.0
    plain.gradients(1.0)
    scaled.gradients(8.0)
    for need in GRADIENTS:
        assert torch.equal(getattr(plain.stats("a"), need), getattr(scaled.stats("a"), need)), need


def test_a_step_that_left_the_layer_out_counts_as_zero() -> None:
    observation, layers = made(("gradient",))
    shown(layers, 1)
    first = layers["b"].weight.grad
    observation.gradients(1.0)
    shown(layers, 2, "a")
    observation.gradients(1.0)
    torch.testing.assert_close(observation.stats("b").gradient, first / 2)


def test_gradients_of_what_stays_dead_have_no_part_in_the_fisher_blocks() -> None:
    observation, layers = made(("fisher_blocks",))
    observation.masks.dead["a"][0, 1] = True
    shown(layers, 1)
    observation.gradients(1.0)
    block = observation.stats("a").fisher_blocks[0]
    assert block[1, [0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert block[[0, 2, 3], 1].tolist() == [0.0, 0.0, 0.0]
    assert float(block[0, 2]) != 0.0
    observation.masks.regrow()
    observation.forget()
    observation.gradients(1.0)
    assert float(observation.stats("a").fisher_blocks[0, 0, 1]) != 0.0


def test_movement_counts_the_dead_with_their_kept_value_only_if_they_may_grow_again() -> None:
    for regrowth in (False, True):
        observation, layers = made(("movement",))
        masks, weight = observation.masks, layers["a"].weight
        if regrowth:
            masks.regrow()
        value = float(weight[0, 0].detach())
        dead = torch.zeros_like(weight, dtype=torch.bool)
        dead[0, 0] = True
        masks.bury({"a": dead, "b": masks.dead["b"]})
        shown(layers, 1)
        gradient = float(weight.grad[0, 0])
        observation.gradients(1.0)
        expected = -value * gradient if regrowth else 0.0
        assert float(observation.stats("a").movement[0, 0]) == pytest.approx(expected)


def test_the_fisher_sum_is_made_once_and_grows_in_place() -> None:
    observation, layers = made(("fisher_blocks",))
    shown(layers, 1)
    observation.gradients(1.0)
    total = observation._kept["a"]["fisher_blocks"].total
    where = total.data_ptr()
    observation.gradients(1.0)
    assert observation._kept["a"]["fisher_blocks"].total.data_ptr() == where


def test_weights_are_cut_into_blocks_and_padded() -> None:
    assert blocks_of(torch.arange(6).view(2, 3), 4).tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]
    assert blocks_of(torch.arange(6).view(2, 3), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_padding_is_left_out_where_the_inputs_are_laid_out_like_the_mask() -> None:
    observation, layers = made(("input_norm", "input_gram"))
    x = torch.randn(2, 4, 5)
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    with observation.watching(real), torch.no_grad():
        layers["a"](x)
        layers["b"](torch.randn(6, 3))  # another layout: all of it counts
    seen = torch.cat([x[0, :3], x[1, :1]])
    torch.testing.assert_close(observation.stats("a").input_norm, seen.square().mean(0).sqrt())
    gram = seen.T @ seen / 4
    torch.testing.assert_close(
        observation.stats("a").input_gram, gram + 0.01 * gram.diagonal().mean() * torch.eye(5), rtol=1e-5, atol=1e-6
    )
    assert int(observation._kept["b"]["input_norm"].count) == 6


def test_inputs_are_seen_in_float32_and_only_while_somebody_watches() -> None:
    observation, layers = made(("input_gram",))
    x = torch.randn(9, 5)
    with torch.autocast("cpu", torch.bfloat16), observation.watching(None):
        layers["a"](x)
    layers["a"](x)
    raw = x.T @ x / 9
    torch.testing.assert_close(
        observation.stats("a").input_gram, raw + 0.01 * raw.diagonal().mean() * torch.eye(5), rtol=1e-5, atol=1e-6
    )
    assert not layers["a"]._forward_pre_hooks


def test_hooks_are_taken_away_when_a_forward_pass_fails() -> None:
    observation, layers = made(("input_norm",))
    with pytest.raises(RuntimeError), observation.watching(None):
        layers["a"](torch.randn(2, 7))
    assert not layers["a"]._forward_pre_hooks


def test_what_is_learned_is_not_forgotten() -> None:
    observation, layers = made(("gradient", "movement"))
    assert observation.empty()
    assert observation.stats("a").movement is None
    shown(layers, 1)
    observation.gradients(1.0)
    assert not observation.empty()
    learned = observation.stats("a").movement.clone()
    observation.forget()
    assert observation.empty()
    assert torch.equal(observation.stats("a").movement, learned)
    assert not bool(observation.stats("a").gradient.any())


def test_a_nearly_settled_score_is_drawn_down_less() -> None:
    """The penalty's slope is steepest at 0, so that undecided scores fall behind decided ones."""
    weight = nn.Parameter(torch.tensor([[1.0, 1.0]]))
    kind = STATISTICS["movement_soft"](weight, Settings(penalty=1.0))
    kind.sum().copy_(torch.tensor([[0.0, 4.0]]))
    observation = Observation(Masks({"w": weight}), ("movement_soft",), Settings(penalty=1.0))
    observation._kept["w"]["movement_soft"] = kind
    weight.grad = torch.zeros_like(weight)
    observation.gradients(1.0)
    undecided, settled = kind.read().flatten().tolist()
    assert 0 > undecided > settled - 4.0 - 1.0
    assert abs(undecided) > 5 * abs(settled - 4.0) > 0


def test_an_interrupted_observation_goes_on_to_the_last_bit() -> None:
    def run(stop: int | None) -> list[Tensor]:
        observation, layers = made()
        for step in range(4):
            shown(layers, step)
            observation.gradients(1.0)
            with observation.watching(None), torch.no_grad():
                layers["a"](torch.randn(6, 5, generator=torch.Generator().manual_seed(step)))
            if step == stop:
                state = {key: value.clone() for key, value in observation.state_dict().items()}
                observation = Observation(observation.masks, NEEDS, Settings(block=4), layers)
                observation.load_state_dict(state)
        return [getattr(observation.stats(name), need) for name in layers for need in NEEDS]

    undisturbed = run(None)
    for stop in range(3):
        assert all(torch.equal(one, other) for one, other in zip(run(stop), undisturbed, strict=True))
