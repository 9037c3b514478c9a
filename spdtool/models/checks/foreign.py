"""Checkpoints that other tools for pruning left behind: what of them cannot be opened as it is, and why.

Most open: what is pruned is zero, and the file is that of stock transformers. Refused is what would
open and compute something else, or lacks a weight, with the name of the tool and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdtool.errors import ModelError


@dataclass(frozen=True)
class ForeignMark:
    """A mark of one tool in the names of weights.

    Attributes:
        words: one of them is in a weight's name.
        tool: that writes such names.
        reason: why the checkpoint cannot be used as it is.
        hint: what to do.
    """

    words: tuple[str, ...]
    tool: str
    reason: str
    hint: str


MARKS = (
    ForeignMark(
        ("fake_quant", "activation_post_process", ".module.weight_fake", "quant.activation", "input_quantizer"),
        "SparseML, or another trainer of int8 weights",
        "it was trained with rounded weights, and their scales lie beside them",
        "give the checkpoint from before the rounding; spdtool rounds by itself: --set finetune.quantize=int8",
    ),
    ForeignMark(
        ("mask_scores", "mask_module", "ampere_permut_scores"),
        "nn_pruning, or movement pruning",
        "the scores say which weights are zero, and the weights themselves are still dense",
        "apply them once: compile_model of nn_pruning's ModelPatchingCoordinator, or bertarize.py of movement pruning",
    ),
    ForeignMark(
        ("weight_orig", "weight_mask"),
        "torch.nn.utils.prune",
        "masks lie beside dense weights",
        "apply them once: torch.nn.utils.prune.remove(module, 'weight') for each layer, then save_pretrained",
    ),
    ForeignMark(
        ("scc_layer", ".scc_"),
        "BERT-of-Theseus",
        "it holds both the predecessor's layers and those of the successor",
        "save the successor alone: model.bert.encoder.layer = model.bert.encoder.scc_layer, num_hidden_layers = its "
        "length, then save_pretrained",
    ),
    ForeignMark(
        ("layer_transformation", "l0_module", "head_z", "intermediate_z", "hidden_z"),
        "CoFi",
        "its layers have sizes of their own, and a projection that stock transformers does not have",
        "prune anew with --set prune.heads and prune.neurons, from the dense model as --teacher",
    ),
)
CONFIG_MARKS: Mapping[str, tuple[Any, str]] = {
    # NoNorm has a weight and a bias as LayerNorm has: the folder would open, and compute something else.
    "layer_norm_type": ("no_norm", "nn_pruning replaced its layer normalization by a product"),
    "model_type": ("masked_bert", "movement pruning saved it with its scores, and the weights are still dense"),
}


def refuse_foreign_config(source: str | Path, raw: Mapping[str, Any]) -> None:
    """Raise ModelError for a config.json whose model stock transformers would compute otherwise.

    Args:
        raw: content of config.json.
    """
    for name, (value, reason) in CONFIG_MARKS.items():
        if raw.get(name) == value:
            raise ModelError(
                f"config.json of {str(source)!r} has {name} = {value!r}: {reason}",
                "give the dense model from before as --teacher, and prune it anew: docs/how-to/migrate.md",
            )


def refuse_foreign_weights(source: str | Path, names: Iterable[str]) -> None:
    """Raise ModelError for weights by whose names another tool can be told; names the tool and the reason."""
    for name in names:
        for mark in MARKS:
            if any(word in name for word in mark.words):
                raise ModelError(
                    f"{str(source)!r} was saved by {mark.tool} ({name}): {mark.reason}",
                    f"{mark.hint}; see docs/how-to/migrate.md",
                )
