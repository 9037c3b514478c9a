"""Encoders: load and save them as ordinary Hugging Face checkpoints, find their layer stack and what may be pruned.

No modelling code of transformers is copied or subclassed. An architecture is supported when its layers stand in one
`ModuleList` of `config.num_hidden_layers` entries under `model.base_model`; a plugin may name the stack of another one:

    from spdtool.plugins import stacks

    @stacks.register("my-model-type")
    def stack(model):
        return model.base_model.blocks
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from spdtool import plugins
from spdtool import ranks as processes
from spdtool.errors import ModelError, SpdError, first_line
from spdtool.models import fsdp as shards
from spdtool.models import onednn
from spdtool.recipe.fields import Recipe
from spdtool.tasks import Task

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry of a hub that is silent

PRIMING_TOKENS = 4
COMPILED_FORMS = 32  # of a layer: trained, stand-in, teacher, scored; each with padding and without
TESTED = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet", "deberta-v2", "modernbert")
HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")


def load(
    source: str | Path,
    *,
    labels: Sequence[str] | None = None,
    dropout: float | None = None,
    eager: bool = False,
    smoke: bool = False,
) -> PreTrainedModel:
    """A sequence classifier in float32, in eval mode, from a folder or a hub name. Reads safetensors only.

    Args:
        labels: label names for a new head (empty: regression). None: the checkpoint's own head, which must exist.
        dropout: replaces every dropout probability; None leaves the configuration's.
        eager: use the attention implementation whose softmax can be observed (for the attention loss).
        smoke: a random model with two layers of the same architecture instead of the trained weights.

    Raises:
        ModelError: it cannot be found or read, has no safetensors, or needs remote code.
    """
    options: dict[str, Any] = {"attn_implementation": "eager"} if eager else {}
    if labels is not None:
        names = list(labels) or ["score"]
        options |= {"num_labels": len(names), "id2label": dict(enumerate(names))}
        options |= {"label2id": {name: index for index, name in enumerate(names)}}
        options |= {"problem_type": "single_label_classification" if labels else "regression"}
    config = _config(source, **options)
    _refuse_without_head(source, config, labels)
    if dropout is not None:
        _set_dropout(config, dropout)
    try:
        if smoke:
            config.num_hidden_layers = 2
            return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=labels is not None,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and the hub's client each raise what they like
        raise _unreadable(source, error) from None
    _refuse_random_weights(source, model, report, new_head=labels is not None)
    return model.eval()


def skeleton(recipe: Recipe, task: Task) -> PreTrainedModel:
    """The recipe's model without its weights, for counting; raises as `load` does."""
    if task.build is not None and recipe.given_teacher is None:
        model: PreTrainedModel = task.build(recipe.seed)[0]
        return model
    return outline(recipe.given_teacher or recipe.model, smoke=recipe.smoke, tuned=recipe.given_teacher is not None)


def outline(source: str | Path, *, smoke: bool = False, tuned: bool = False) -> PreTrainedModel:
    """The classifier that the configuration of `source` makes, without its weights; raises as `load` does.

    Args:
        tuned: refuse what has no head of its own.
    """
    config = _config(source)
    if tuned:
        _refuse_without_head(source, config, None)
    if smoke:
        config.num_hidden_layers = 2
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    except Exception as error:
        raise _unreadable(source, error) from None


def blank(folder: Path) -> PreTrainedModel:
    """The classifier that the config.json in `folder` describes, in float32, its weights still to be filled in.

    Raises:
        ModelError: config.json cannot be read, or makes no classifier.
    """
    config = _config(folder)
    _refuse_without_head(folder, config, None)
    try:
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    except Exception as error:
        raise _unreadable(folder, error) from None


def fill(model: PreTrainedModel, weights: Iterable[tuple[str, np.ndarray]]) -> list[str]:
    """Copy arrays into the parameters of their names; return the names of the parameters that none was for.

    Raises:
        ModelError: a name that the model does not have, or an array of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = set()
    for name, array in weights:
        parameter = parameters.get(name)
        if parameter is None or tuple(parameter.shape) != array.shape:
            expected = "no such weight" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise ModelError(f"{name} of shape {array.shape} does not fit: the model has {expected}")
        parameter.data.copy_(torch.from_numpy(np.array(array, np.float32)))
        filled.add(id(parameter))  # tied weights are one parameter with two names
    return [name for name, parameter in parameters.items() if id(parameter) not in filled]


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer that belongs to `source`.

    Raises:
        ModelError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        raise ModelError(
            f"cannot load the tokenizer of {str(source)!r}: {first_line(error)}", _reading_hint(source)
        ) from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of no files
        raise ModelError(f"the tokenizer of {str(source)!r} has no vocabulary", _reading_hint(source))
    return tokenizer


def place(model: PreTrainedModel, recipe: Recipe, device: torch.device, train: str | None = None) -> PreTrainedModel:
    """`model` on `device`: this process's rows of it, if the recipe shards and there are several processes.

    Args:
        train: the part that will be trained, as in `trained_parameters`; None: nothing.
    """
    if not recipe.shard or processes.count() == 1:
        return model.to(device)  # type: ignore[arg-type]
    if train is not None:
        trained_parameters(model, train)  # freezes the rest
    shards.shard(model, layer_stack(model), device)
    return model


def save(model: PreTrainedModel, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer's files: stock transformers reads them back.

    Args:
        weights: the whole weights of a sharded model.
    """
    dropped = getattr(model.config, "_dropout_before", None)
    if dropped:
        for name, value in dropped.items():
            setattr(model.config, name, value)
        del model.config._dropout_before
    model.save_pretrained(folder, state_dict=weights)
    save_tokenizer(tokenizer, folder)


def hand_over(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Let the main process `save` the model, of which all give what they hold; all call this together."""
    weights = shards.state_dict(model, keep=processes.is_main())
    if processes.is_main():
        save(model, tokenizer, folder, weights)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which hold everything that the older files held."""
    tokenizer.save_pretrained(folder, legacy_format=False if tokenizer.is_fast else None)
    if tokenizer.is_fast:
        (folder / "special_tokens_map.json").unlink(missing_ok=True)  # transformers 4 writes it all the same


def layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """The ModuleList that holds the encoder's layers, first to last.

    Raises:
        ModelError: no ModuleList, or more than one, has `config.num_hidden_layers` entries; says what was found.
    """
    named = plugins.stacks.find(model.config.model_type)
    if named is not None:
        return named(model)
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = {name: part for name, part in model.base_model.named_modules() if isinstance(part, nn.ModuleList)}
    fitting = [part for part in lists.values() if len(part) == depth]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{name} of {len(part)}" for name, part in lists.items()) or "no ModuleList at all"
    refused = f"{model.config.model_type!r} is not supported: one list of {depth} layers was expected, found {found}"
    groups = getattr(model.config, "num_hidden_groups", depth)
    if groups != depth:
        raise ModelError(
            f"{refused}: its {depth} layers share the weights of {groups}, and none can be pruned or replaced alone",
            f"families that are tested: {', '.join(TESTED)}",
        )
    raise ModelError(refused, "a plugin can name the layer stack: see docs/how-to/package-a-plugin.md")


def prunable_linears(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Name to weight [out, in] of every linear layer inside the encoder's layer stack; raises as `prunable_layers`."""
    named = dict(model.named_parameters())
    return {name: named[name] for name in prunable_layers(model)}


def prunable_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The name of its weight to every linear layer inside the encoder's layer stack.

    Raises:
        ModelError: there is none; some architectures compute with layers of another kind.
    """
    stack = layer_stack(model)
    inside = {id(part.weight): part for part in stack.modules() if isinstance(part, nn.Linear)}
    if not inside:
        kinds = sorted({type(part).__name__ for part in stack.modules() if not list(part.children())})
        raise ModelError(
            f"{model.config.model_type!r} has no linear layer to prune; its layers are made of {', '.join(kinds)}",
            f"what is pruned is torch.nn.Linear; families that are tested: {', '.join(TESTED)}",
        )
    return {name: inside[id(weight)] for name, weight in model.named_parameters() if id(weight) in inside}


def positions(model: PreTrainedModel) -> int | None:
    """The longest input in tokens that the position embeddings allow; None for relative positions."""
    for name, part in model.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return None


def trained_parameters(model: PreTrainedModel, which: str) -> dict[str, nn.Parameter]:
    """Name to parameter of the part that a stage trains; the rest is frozen by setting `requires_grad`.

    Args:
        which: `layers`, `layers+head` (all but the embeddings) or `all`.
    """
    layers = {id(parameter) for parameter in layer_stack(model).parameters()}
    prefix = model.base_model_prefix + "."
    trained = {}
    for name, parameter in model.named_parameters():
        embedding = name.startswith(prefix) and "embeddings" in name
        wanted = which == "all" or id(parameter) in layers or (which == "layers+head" and not embedding)
        parameter.requires_grad_(wanted)
        if wanted:
            trained[name] = parameter
    return trained


def prime(model: PreTrainedModel) -> None:
    """Ask once for hidden states and attentions, so that transformers hooks this model's own layers to capture them.

    transformers 5 installs its hooks at the first request, on whatever modules stand in the tree then. If that request
    came while grafted layers stand in, later forwards would silently return too few or too many hidden states.
    """
    device = next(model.parameters()).device
    tokens = torch.ones((1, PRIMING_TOKENS), dtype=torch.long, device=device)
    mode, implementation = model.training, model.config._attn_implementation
    with torch.no_grad():
        model.eval()
        outputs = model(input_ids=tokens, attention_mask=tokens, output_hidden_states=True)
        if implementation == "eager":
            model(input_ids=tokens, attention_mask=tokens, output_attentions=True)
    model.train(mode)
    depth = len(layer_stack(model))
    if len(outputs.hidden_states) != depth + 1:
        raise ModelError(
            f"{model.config.model_type!r} returns {len(outputs.hidden_states)} hidden states for {depth} layers"
        )


def tune(model: PreTrainedModel, *, checkpointing: bool, compile_layers: bool) -> None:
    """Trade time for memory (gradient checkpointing) or start-up for speed (torch.compile, layer by layer).

    Each layer is compiled on its own: compiling the whole model would need a graph for every draw of grafted layers.
    What is not compiled computes its products with the faster of the CPU's libraries (`onednn.py`).

    Raises:
        ModelError: the architecture does not support gradient checkpointing.
    """
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(
                f"{model.config.model_type!r} does not support gradient checkpointing",
                "leave it off, and cut batches into pieces: --set prune.accumulate=2",
            )
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )  # its older name
        enable({"use_reentrant": False})
    if compile_layers:
        torch._dynamo.config.recompile_limit = max(COMPILED_FORMS, torch._dynamo.config.recompile_limit)
        for layer in layer_stack(model):
            layer.compile(dynamic=True)  # lengths differ from batch to batch
    else:
        onednn.use(model)


def zeros(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """`(zeros, size)` of each named weight, read back from the checkpoint in `folder`.

    Raises:
        ModelError: the file lacks one of them.
    """
    counts = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        held = set(file.keys())
        for name in names:
            if name not in held:
                raise ModelError(
                    f"{folder}/model.safetensors has no weight {name!r}", "was it saved by another version?"
                )
            weight = file.get_tensor(name)
            counts[name] = (int((weight == 0).sum()), weight.numel())
    return counts


def label_names(model: PreTrainedModel) -> list[str]:
    """Label names in the order of the logits, as config.json has them."""
    names: Any = model.config.id2label
    return [str(names[index]) for index in range(len(names))]


def head_labels(source: str | Path) -> list[str] | None:
    """The label names of the classifier that `source` is; None for an encoder alone. Raises as `load` does."""
    config = _config(source)
    if not any("SequenceClassification" in name for name in getattr(config, "architectures", None) or []):
        return None
    return [str(config.id2label[index]) for index in range(len(config.id2label))]


@torch.no_grad()
def relabel(model: PreTrainedModel, names: Sequence[str], order: Sequence[int] | None = None) -> None:
    """Name the labels `names`, whose logits were those numbered `order` before (None: as they are).

    Raises:
        ModelError: the order changes, and the linear layer that makes the logits is not found.
    """
    if order is not None and list(order) != sorted(order):
        body = {id(part) for part in model.base_model.modules()}
        linears = [part for part in model.modules() if isinstance(part, nn.Linear) and id(part) not in body]
        if not linears or linears[-1].out_features != len(names):
            raise ModelError(
                f"the labels of this {model.config.model_type!r} stand in another order, and its head is not found",
                "give an encoder without a head",
            )
        for parameter in linears[-1].parameters():
            parameter.copy_(parameter[list(order)])
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}


def _set_dropout(config: Any, value: float) -> None:
    before = {
        name: old
        for name, old in config.to_dict().items()
        if "dropout" in name and isinstance(old, int | float) and not isinstance(old, bool)
    }
    for name in before:
        setattr(config, name, value)
    config._dropout_before = before


def _config(source: str | Path, **options: Any) -> Any:
    """The configuration of `source`; a path is told from a hub name first, since an absent hub answers slowly."""
    path = Path(source)
    if not path.is_dir() and (path.exists() or not HUB_NAME.fullmatch(str(source))):
        problem = "is a file" if path.exists() else "does not exist"
        raise ModelError(f"cannot load the model {str(source)!r}: it {problem}", _reading_hint(source))
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        raise _unreadable(source, error) from None


def _unreadable(source: str | Path, error: Exception) -> SpdError:
    if isinstance(error, SpdError):
        return error
    if type(error).__name__ == "SafetensorError":
        return ModelError(f"the weights of {str(source)!r} cannot be read: {error}", "copy them again")
    return ModelError(f"cannot load the model {str(source)!r}: {first_line(error)}", _reading_hint(source))


def _refuse_random_weights(source: str | Path, model: Any, report: dict[str, Any], *, new_head: bool) -> None:
    """What the file lacks, or holds in another shape, transformers fills with random numbers without a word.

    That is right for a new head, and for a pooler, which encoders that were only pretrained do not have.
    """
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    body = f"{model.base_model_prefix}."
    head = {name for name in model.state_dict() if not name.startswith(body)}
    wrong = sorted(key for key in lacking if not new_head or (key not in head and "pooler" not in key))
    if wrong:
        raise ModelError(
            f"the weights of {str(source)!r} are not those of its config.json: "
            f"{len(wrong)} are missing or of another shape, among them {wrong[0]}",
            "copy the folder again: config.json and model.safetensors belong together",
        )


def _refuse_without_head(source: str | Path, config: Any, labels: Sequence[str] | None) -> None:
    architectures = getattr(config, "architectures", None) or []
    if labels is None and not any("SequenceClassification" in name for name in architectures):
        raise ModelError(
            f"{str(source)!r} is no fine-tuned classifier: its config names {', '.join(architectures) or 'nothing'}",
            "give it as --model, and a teacher is fine-tuned from it",
        )


def _reading_hint(source: str | Path) -> str:
    path = Path(source)
    if not path.exists():
        return "give a folder with config.json, model.safetensors and tokenizer files, or a name on a hub that answers"
    if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
        return "only safetensors are read: convert the pickled weights with transformers' save_pretrained"
    return "the folder needs config.json, model.safetensors and tokenizer files"
