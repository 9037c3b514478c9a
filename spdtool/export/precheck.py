"""A trial export before hours are spent on training: two random layers of the same architecture, the way that the
student will go.

The families of `TESTED_FAMILIES` are known to be exported; any other one has to show it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification

from spdtool.errors import GateError, ModelError
from spdtool.export import runtime
from spdtool.export import target as targets
from spdtool.export.gates.logits import compare_logits
from spdtool.export.graph import trace as onnx
from spdtool.models.layers import TESTED_FAMILIES
from spdtool.models.predict import onnx_forward, torch_forward
from spdtool.recipe.fields import Recipe

SHAPES = ((1, 7), (3, 16))  # rows and tokens that the graph is tried on
LAYERS = 2


def check(recipe: Recipe, configs: Iterable[Any]) -> None:
    """Refuse a model whose architecture cannot be exported, or gives other logits then; a few seconds each.

    Nothing is tried where the family is a tested one, or no target of the recipe is made of the ONNX graph.

    Args:
        configs: the configurations of student and teacher.

    Raises:
        ModelError: names the architecture, and what stands in the way.
    """
    made = [choice.target for choice in targets.demanded(recipe.export)]
    if not any(isinstance(target, type) and issubclass(target, onnx.Onnx) for target in made):
        return
    untested = {config.model_type: config for config in configs if config.model_type not in TESTED_FAMILIES}
    for config in untested.values():
        _try(config, recipe)


def _try(config: Any, recipe: Recipe) -> None:
    model = _small(config, eager=recipe.export.opset < onnx.ATTENTION)
    if model is None:
        return
    taken = inspect.signature(model.forward).parameters
    names = [name for name in onnx.INPUTS if name in taken]
    proto = onnx.trace(model, names, recipe.export.opset)
    session = onnx_forward(runtime.open_session(proto.SerializeToString()))
    batches = [(f"shape {shape}", {name: np.ones(shape, np.int64) for name in names}) for shape in SHAPES]
    try:
        compare_logits(torch_forward(model), session, batches, recipe.export.tolerance)
    except GateError as error:
        raise ModelError(f"{config.model_type!r} is not exported as it is: {error.message}", onnx.UNTESTED) from None


def _small(config: Any, *, eager: bool) -> Any:
    """A random classifier of two layers; None where the configuration does not let itself be cut like that."""
    config = copy.deepcopy(config)
    options = {"attn_implementation": "eager"} if eager else {}
    try:
        config.num_hidden_layers = min(LAYERS, config.num_hidden_layers)
        return AutoModelForSequenceClassification.from_config(config, **options).float().eval()
    except Exception:  # whatever is wrong with it, the real model will tell
        return None
