"""Try an unknown architecture before hours are spent on training it.

Two random layers of the same architecture are traced and run. The families of `TESTED_FAMILIES` are
known to be exported; any other one has to show it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable

import numpy as np
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from spdtool.errors import GateError, ModelError
from spdtool.export import runtime
from spdtool.export.gates.logits import compare_logits
from spdtool.export.graph.trace import ATTENTION_OPSET, INPUT_NAMES, UNTESTED_HINT, trace_model
from spdtool.export.target import required_targets
from spdtool.models.layers import TESTED_FAMILIES
from spdtool.models.predict import onnx_forward, torch_forward
from spdtool.recipe.fields import Recipe

SHAPES = ((1, 7), (3, 16))  # rows and tokens on which the graph is tried
LAYERS = 2


def check_exportable(recipe: Recipe, configs: Iterable[PretrainedConfig]) -> None:
    """Refuse a model whose architecture cannot be traced, or gives other logits then; a few seconds each.

    Nothing is tried where the family is a tested one, or no target of the recipe is made of the
    traced graph.

    Args:
        configs: the configurations of student and teacher.

    Raises:
        ModelError: names the architecture, and what stands in the way.
    """
    if not any(choice.target.traces_model for choice in required_targets(recipe.export)):
        return
    untested = {config.model_type: config for config in configs if config.model_type not in TESTED_FAMILIES}
    for config in untested.values():
        _try_architecture(config, recipe)


def _try_architecture(config: PretrainedConfig, recipe: Recipe) -> None:
    model = _shallow_model(config, eager=recipe.export.opset < ATTENTION_OPSET)
    if model is None:
        return
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in INPUT_NAMES if name in accepted]
    proto = trace_model(model, names, recipe.export.opset)
    session = onnx_forward(runtime.open_session(proto.SerializeToString()))
    batches = [(f"shape {shape}", {name: np.ones(shape, np.int64) for name in names}) for shape in SHAPES]
    try:
        compare_logits(torch_forward(model), session, batches, recipe.export.tolerance)
    except GateError as error:
        raise ModelError(f"{config.model_type!r} is not exported as it is: {error.message}", UNTESTED_HINT) from None


def _shallow_model(config: PretrainedConfig, *, eager: bool) -> PreTrainedModel | None:
    """Build a random classifier of two layers; None where the configuration cannot be shortened like that."""
    config = copy.deepcopy(config)  # the caller trains with it
    options = {"attn_implementation": "eager"} if eager else {}
    try:
        config.num_hidden_layers = min(LAYERS, config.num_hidden_layers)
        model = AutoModelForSequenceClassification.from_config(config, **options)  # type: ignore[no-untyped-call]
        model = model.float().eval()
    except Exception:  # whatever is wrong with it, loading the real model will say so
        return None
    assert isinstance(model, PreTrainedModel)
    return model
