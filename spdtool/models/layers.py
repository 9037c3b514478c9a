"""The encoder's layers: the layer stack, what can be pruned in it, what is trained.

No modelling code of transformers is copied or subclassed. An architecture is supported when its
layers are the entries of one `ModuleList` of `config.num_hidden_layers` under `model.base_model`;
a plugin can name the stack of another one:

    from spdtool.plugins import stacks

    @stacks.register("my-model-type")
    def stack(model):
        return model.base_model.blocks
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from spdtool import plugins
from spdtool.errors import ModelError
from spdtool.models import onednn

TESTED_FAMILIES = (
    *("bert", "roberta", "xlm-roberta", "distilbert"),
    *("electra", "mpnet", "deberta-v2", "modernbert"),
)
HOOK_TOKENS = 4  # length of the input that installs the capture hooks: any will do
COMPILED_FORMS = 32  # of a layer: trained, stand-in, teacher, scored; each with padding and without


def find_layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """Find the ModuleList of the encoder's layers, first to last.

    Raises:
        ModelError: no ModuleList, or more than one, has `config.num_hidden_layers` entries; names
            those that exist.
    """
    registered = plugins.stacks.find(model.config.model_type)
    # A plugin's word comes first: it may know a family that also looks regular.
    if registered is not None:
        stack: nn.ModuleList = registered(model)
        return stack
    depth = getattr(model.config, "num_hidden_layers", None)
    candidates, sizes = [], []
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList):
            sizes.append(f"{name} of {len(module)}")
            if len(module) == depth:
                candidates.append(module)
    if len(candidates) == 1:
        return candidates[0]
    refusal = (
        f"{model.config.model_type!r} is not supported: one list of {depth} layers was expected, "
        f"found {', '.join(sizes) or 'no ModuleList at all'}"
    )
    # ALBERT: the weights of one layer serve a whole group
    groups = getattr(model.config, "num_hidden_groups", depth)
    if groups != depth:
        raise ModelError(
            f"{refusal}: its {depth} layers share the weights of {groups}, and none can be pruned or replaced alone",
            f"families that are tested: {', '.join(TESTED_FAMILIES)}",
        )
    raise ModelError(refusal, "a plugin can name the layer stack: see docs/how-to/package-a-plugin.md")


def find_prunable_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Find every linear layer inside the layer stack, by the name of its weight.

    Raises:
        ModelError: there is none; some architectures compute with layers of another kind.
    """
    stack = find_layer_stack(model)
    # By identity: names differ between the stack and the model.
    linears = {id(module.weight): module for module in stack.modules() if isinstance(module, nn.Linear)}
    if not linears:
        leaves = [module for module in stack.modules() if not list(module.children())]
        kinds = ", ".join(sorted({type(module).__name__ for module in leaves}))
        raise ModelError(
            f"{model.config.model_type!r} has no linear layer to prune; its layers are made of {kinds}",
            f"what is pruned is torch.nn.Linear; families that are tested: {', '.join(TESTED_FAMILIES)}",
        )
    layers = {}
    for name, weight in model.named_parameters():  # in the model's order, and a tied weight once
        if id(weight) in linears:
            layers[name] = linears[id(weight)]
    return layers


def find_prunable_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Find the weights, [out, in], of `find_prunable_layers`; raises as that does."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in find_prunable_layers(model)}


class ModelShape(NamedTuple):
    """Number of layers, width of the hidden states, and attention heads of one layer (0: it has none)."""

    layers: int
    width: int
    heads: int


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Read the shape of an encoder; raises as `find_layer_stack`."""
    config = model.config
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise ModelError(f"{config.model_type!r} is not supported: its configuration has no hidden_size")
    heads = getattr(config, "num_attention_heads", 0)  # FNet mixes tokens without attention
    return ModelShape(len(find_layer_stack(model)), width, heads)


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest input, in tokens, that the position embeddings allow; None for relative positions."""
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts from the position after the padding index: the first rows are never used
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    return None


def select_trained_parameters(model: PreTrainedModel, which: str) -> dict[str, nn.Parameter]:
    """Freeze all parameters but those that a stage trains; return these by name.

    Args:
        which: `layers`, `layers+head` (all but the embeddings) or `all`.
    """
    in_layers = {id(parameter) for parameter in find_layer_stack(model).parameters()}
    # An encoder without a head has no prefix.
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    trained = {}
    for name, parameter in model.named_parameters():
        is_embedding = name.startswith(prefix) and "embeddings" in name
        is_trained = which == "all" or id(parameter) in in_layers
        if which == "layers+head":
            is_trained = is_trained or not is_embedding
        parameter.requires_grad_(is_trained)
        if is_trained:
            trained[name] = parameter
    return trained


def install_capture_hooks(model: PreTrainedModel) -> None:
    """Let transformers install the hooks that capture hidden states and attentions.

    transformers 5 installs its hooks at the first request, on the modules that are in the tree at
    that moment. If the first request came while grafted layers stand in, later forwards would
    return too few or too many hidden states without an error.

    Raises:
        ModelError: the model does not return one hidden state for each layer and one for the
            embeddings.
    """
    device = next(model.parameters()).device
    tokens = torch.ones((1, HOOK_TOKENS), dtype=torch.long, device=device)
    was_training = model.training
    with torch.no_grad():
        model.train(False)  # dropout would draw random numbers, and shift those of the training
        outputs = model(input_ids=tokens, attention_mask=tokens, output_hidden_states=True)
        if model.config._attn_implementation == "eager":  # the fused ones return no attention maps
            model(input_ids=tokens, attention_mask=tokens, output_attentions=True)
    model.train(was_training)
    depth = len(find_layer_stack(model))
    if len(outputs.hidden_states) != depth + 1:
        states = len(outputs.hidden_states)
        raise ModelError(f"{model.config.model_type!r} returns {states} hidden states for {depth} layers")


def configure_layers(model: PreTrainedModel, *, checkpointing: bool, compile_layers: bool) -> None:
    """Trade time for memory (gradient checkpointing), or start-up time for speed (torch.compile).

    A model that is not compiled multiplies with the faster of the CPU's libraries (`onednn.py`).

    Raises:
        ModelError: the architecture does not support gradient checkpointing.
    """
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(
                f"{model.config.model_type!r} does not support gradient checkpointing",
                "leave it off, and cut batches into pieces: --set prune.accumulate=2",
            )
        older = model.gradient_checkpointing_enable  # the name in transformers 4
        enable = getattr(model, "activation_checkpointing_enable", older)
        enable({"use_reentrant": False})
    if not compile_layers:
        onednn.use_onednn(model)
        return
    torch._dynamo.config.recompile_limit = max(COMPILED_FORMS, torch._dynamo.config.recompile_limit)
    # layer by layer: every draw of grafted layers would need another graph of the whole model
    for layer in find_layer_stack(model):
        layer.compile(dynamic=True)  # lengths differ from batch to batch


def count_zeros(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Read `(zeros, size)` of each named weight back from the checkpoint in `folder`.

    Raises:
        ModelError: the file lacks one of them.
    """
    counts = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
        for name in names:
            if name not in stored:
                raise ModelError(
                    f"{folder}/model.safetensors has no weight {name!r}",
                    "was it saved by another version?",
                )
            weight = file.get_tensor(name)
            # Of the file, not of memory: this is what the next stage and the user read.
            counts[name] = (int((weight == 0).sum()), weight.numel())
    return counts
