"""Quantization-aware training: the forward pass of the engine, the gradient of unrounded numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from spdtool.errors import RecipeError
from spdtool.models.int8 import INPUT_CHUNK, multiply_rounded, round_weight_rows, use_int8_products
from spdtool.models.layers import find_prunable_layers, find_prunable_weights
from spdtool.models.load import label_names, load_model, load_tokenizer
from spdtool.models.predict import evaluate_split, torch_forward
from spdtool.run.folder import Run
from spdtool.tasks.prepare import prepare_data
from spdtool.training.quantize import RoundedProducts, imitate_row_rounding, imitate_token_rounding


def make_layer(inputs: int, outputs: int = 8) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs)
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight[:, ::4] = 0
    return layer


@pytest.mark.parametrize("inputs", [12, INPUT_CHUNK + 4], ids=["one chunk", "two chunks"])
def test_a_layer_rounds_like_the_engine_from_its_starting_step(inputs: int) -> None:
    layer = make_layer(inputs)
    x = torch.randn(3, 5, inputs, generator=torch.Generator().manual_seed(0))
    plain = layer(x)
    rounding = RoundedProducts([layer], start=0.5, steps=5)
    for step, is_rounded in enumerate((False, False, False, True, True)):
        rounding.switch(step)
        expected = multiply_rounded(x, round_weight_rows(layer.weight), layer.bias) if is_rounded else plain
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5, msg=f"step {step}")
        assert rounding.was_on(step + 1) == is_rounded, f"step {step}"
    assert not torch.equal(layer(x), plain)


def test_the_gradient_is_that_of_the_rounded_numbers() -> None:
    layer = make_layer(12)
    RoundedProducts([layer], start=0.0, steps=1).switch(0)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ imitate_row_rounding(layer.weight).detach())
    torch.testing.assert_close(layer.weight.grad, gradient.T @ imitate_token_rounding(x).detach())
    assert (imitate_row_rounding(layer.weight)[layer.weight == 0] == 0).all()


def test_a_finetuned_student_is_scored_as_the_engine_computes(toy_run: Callable[..., Run]) -> None:
    run = toy_run("finetune.quantize=int8", "finetune.quantize_start=0.4", sparsity=0.5, until="finetune")
    result = run.training_result("finetune")
    assert all(count.zeros == count.size // 2 for count in result.zeros.values())
    model = load_model(run.path / "finetune")
    assert all(type(layer) is nn.Linear for layer in find_prunable_layers(model).values()), "the checkpoint is ordinary"
    use_int8_products(model, find_prunable_weights(model))
    task, splits = prepare_data(run.recipe, load_tokenizer(run.path / "finetune"), label_names(model))
    for name, score in evaluate_split(task, torch_forward(model), splits["dev"]).items():
        assert result.dev[name] == pytest.approx(score, abs=1e-6), name


def test_quantization_of_sharded_weights_is_refused(toy_recipe: Callable[..., object]) -> None:
    with pytest.raises(RecipeError, match=r"sharded weights do not go with finetune\.quantize"):
        toy_recipe("finetune.quantize=int8", "shard=true")
