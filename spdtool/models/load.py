"""Load and save encoders as ordinary Hugging Face checkpoints.

A model without weights is called *empty* here: it has every shape, for counting, or for weights
from elsewhere.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from spdtool import ranks
from spdtool.data.kinds.embedding import is_sentence_encoder
from spdtool.errors import ModelError, first_line
from spdtool.models import fsdp
from spdtool.models.checks.checkpoint import Checkpoint, find_model_class, open_checkpoint
from spdtool.models.checks.tables import fit_tokenizer
from spdtool.models.checks.weight_files import read_weight_files
from spdtool.models.config import has_head, read_config, reading_hint, unreadable_model
from spdtool.models.layers import find_layer_stack, select_trained_parameters
from spdtool.models.sentence import add_pooling, sentence_settings
from spdtool.recipe.fields import Recipe
from spdtool.tasks.head import SEQUENCE_CLASSIFIER, Head, head_of_config, head_of_model
from spdtool.tasks.sentence_settings import read_sentence_settings
from spdtool.tasks.task import ProblemType, Task

transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
# it announces every retry of a hub that is silent
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

# Enough for a layer map and a graft; a smoke run has to end in seconds.
SMOKE_LAYERS = 2


def load_model(
    source: str | Path,
    *,
    labels: Sequence[str] | None = None,
    head: Head = SEQUENCE_CLASSIFIER,
    problem_type: ProblemType | None = "single_label_classification",
    dropout: float | None = None,
    eager: bool = False,
    smoke: bool = False,
) -> PreTrainedModel:
    """Load a model with its head in float32 and eval mode; reads safetensors only.

    Args:
        labels: label names for a new head. None: the checkpoint's head, which must exist.
        head: the new one, see `Task.head`.
        problem_type: of the new head, see `Task.problem_type`.
        dropout: replaces every dropout probability; None leaves the configuration's.
        eager: use the attention implementation whose softmax can be observed (for the attention
            loss).
        smoke: a random model with two layers of the same architecture instead of the trained
            weights.

    Raises:
        ModelError: it cannot be found or read, has no safetensors, or needs remote code.
    """
    fields: dict[str, object] = {}
    if eager:
        fields["attn_implementation"] = "eager"
    if labels is not None:
        fields["num_labels"] = len(labels)
        fields["id2label"] = dict(enumerate(labels))
        # Both ways: pipelines of transformers read one, its training scripts the other.
        fields["label2id"] = {name: index for index, name in enumerate(labels)}
        fields["problem_type"] = problem_type
    new_head = None if labels is None else head
    checkpoint = open_checkpoint(source, finetuned=new_head is None, new_head=new_head, fields=fields)
    config = checkpoint.config
    if dropout is not None:
        _set_dropout(config, dropout)
    try:
        if smoke:
            return _add_pooling(build_shallow(config), source)
        model = _read_model(checkpoint)
    # transformers, safetensors and the hub's client each raise what they like
    except Exception as error:
        raise unreadable_model(source, error) from None
    if not checkpoint.files:  # a hub name whose weights were downloaded just now
        open_checkpoint(source, finetuned=new_head is None, new_head=new_head, fields=fields)
    model.eval()  # type: ignore[no-untyped-call]
    return _add_pooling(model, source)


def _add_pooling(model: PreTrainedModel, source: str | Path) -> PreTrainedModel:
    """Add the pooling of its folder to an encoder alone; return any other model as it is."""
    return add_pooling(model, source) if head_of_model(model).pools else model


def _read_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Read the weights of a checked checkpoint into its model, in float32."""
    source: str | None = str(checkpoint.source)
    weights: dict[str, Tensor] | None = None
    if checkpoint.renamed:
        source, weights = None, read_weight_files(checkpoint.files, checkpoint.renamed)
    # another size is refused by the check, unless it is that of a head which is replaced
    result: Any = find_model_class(checkpoint.config).from_pretrained(
        source,
        config=checkpoint.config,
        state_dict=weights,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = result
    assert isinstance(model, PreTrainedModel)
    if head_of_model(model).pools:
        for name in report["missing_keys"]:  # a pooler that nothing reads: random numbers would differ between runs
            torch.nn.init.zeros_(model.get_parameter(name))
    return model


def build_empty_model(
    source: str | Path,
    *,
    finetuned: bool = False,
    head: Head = SEQUENCE_CLASSIFIER,
    smoke: bool = False,
    device: str = "meta",
    has_weights: bool = True,
) -> PreTrainedModel:
    """Build the model of a checkpoint, in float32 and without its weights, which are checked all the same.

    Args:
        finetuned: with the head of its configuration, which must be that of a kind of task.
        head: otherwise the new one.
        smoke: with two layers, as `load_model` has it.
        device: `meta` allocates nothing; `cpu` makes room for weights from elsewhere
            (`fill_weights`).
        has_weights: False for an exported folder, whose weights are in another file.

    Raises:
        ModelError: the checkpoint cannot be used, or has no head.
    """
    new_head = None if finetuned else head
    config = open_checkpoint(source, finetuned=finetuned, new_head=new_head, has_weights=has_weights).config
    try:
        with torch.device(device):
            model = build_shallow(config) if smoke else _build(config)
            return _add_pooling(model, source)
    except Exception as error:
        raise unreadable_model(source, error) from None


def build_empty_teacher(recipe: Recipe, task: Task) -> PreTrainedModel:
    """Build the recipe's teacher without its weights, for counting; raises as `load_model` does."""
    if recipe.given_teacher is not None:
        return build_empty_model(recipe.given_teacher, finetuned=True, smoke=recipe.smoke)
    if task.dataset.build is not None:
        model: PreTrainedModel = task.dataset.build(recipe.seed)[0]
        return model
    return build_empty_model(recipe.model, head=task.head, smoke=recipe.smoke)


def fill_weights(model: PreTrainedModel, weights: Iterable[tuple[str, np.ndarray]]) -> list[str]:
    """Copy named arrays into a model; return the names of parameters that got none.

    Raises:
        ModelError: the model has no parameter of that name, or one of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = set()
    for name, array in weights:
        parameter = parameters.get(name)
        if parameter is None or tuple(parameter.shape) != array.shape:
            expected = "no such weight" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise ModelError(f"{name} of shape {array.shape} does not fit: the model has {expected}")
        # A copy: an array read from a file may be read-only, which torch warns of.
        parameter.data.copy_(torch.from_numpy(np.array(array, np.float32)))
        filled.add(id(parameter))  # tied weights are one parameter with two names
    return [name for name, parameter in parameters.items() if id(parameter) not in filled]


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `source`, a folder or a hub name; it gives only what the model beside it can read.

    Raises:
        ModelError: there is none, or it gives tokens that the model has no embedding for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        problem = f"cannot load the tokenizer of {str(source)!r}: {first_line(error)}"
        raise ModelError(problem, reading_hint(source)) from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    # where there are no files, transformers makes one of special tokens alone
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"the tokenizer of {str(source)!r} has no vocabulary", reading_hint(source))
    if not Path(source).is_dir() or (Path(source) / "config.json").is_file():
        fit_tokenizer(source, tokenizer, read_config(source, new_head=True))
    if is_sentence_encoder(source):
        _fit_sentence_tokenizer(source, tokenizer)
    return tokenizer


def _fit_sentence_tokenizer(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the longest input and the prompts of its folder of sentence-transformers, as the library does.

    A folder that is used as an encoder alone may pool in a way that is not supported: its tokenizer
    stays as it is.
    """
    try:
        settings = read_sentence_settings(source)
    except ModelError:
        return
    if settings.max_length is not None:
        tokenizer.model_max_length = min(settings.max_length, tokenizer.model_max_length)
    tokenizer.sentence_prompt = settings.prompt
    tokenizer.sentence_prompts = tuple(text for _, text in settings.prompts if text)


def move_to_device(
    model: PreTrainedModel, recipe: Recipe, device: torch.device, train: str | None = None
) -> PreTrainedModel:
    """Move a model to a device, or shard it over the ranks as the recipe says.

    Args:
        train: what will be trained, as in `select_trained_parameters`; None: nothing.
    """
    if not recipe.shard or ranks.world_size() == 1:
        # Alone, FSDP would only cost its gathering.
        model.to(device)  # type: ignore[arg-type]
        return model
    if train is not None:
        select_trained_parameters(model, train)  # FSDP takes frozen parameters as they are now
    fsdp.shard_model(model, find_layer_stack(model), device)
    return model


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer for stock transformers.

    Args:
        weights: the full weights of a sharded model.
    """
    dropout = getattr(model.config, "_dropout_before", None)
    if dropout:
        for name, value in dropout.items():
            setattr(model.config, name, value)
        del model.config._dropout_before
    options: Any = {}
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        # transformers 5 would save some families under older names, and the masks go by the model's own
        options["save_original_format"] = False
    model.save_pretrained(folder, state_dict=weights, **options)
    settings = sentence_settings(model)
    if settings is not None:
        settings.write(folder)
    save_tokenizer(tokenizer, folder)


def save_on_rank_zero(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the checkpoint from rank 0. Collective: call on every rank."""
    # Before the branch: every rank gives its rows, and only rank 0 keeps them all.
    weights = fsdp.gather_state_dict(model, keep=ranks.is_main())
    if ranks.is_main():
        save_model(model, tokenizer, folder, weights)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, or a slow tokenizer's older files."""
    tokenizer.save_pretrained(folder, legacy_format=False if tokenizer.is_fast else None)
    if tokenizer.is_fast:
        # transformers 4 writes it all the same
        (folder / "special_tokens_map.json").unlink(missing_ok=True)


def label_names(model: PreTrainedModel) -> list[str]:
    """Label names in the order of the logits, as config.json has them."""
    return _ordered_labels(model.config)


def read_head_labels(source: str | Path, head: Head) -> list[str] | None:
    """Read the label names of a model with this head; None for one with another or none. Raises as `load_model`."""
    config = read_config(source)
    return _ordered_labels(config) if has_head(config, head) else None


@torch.no_grad()
def relabel(model: PreTrainedModel, names: Sequence[str], order: Sequence[int] | None = None) -> None:
    """Give the labels the names `names`, and put the head's logits into their order.

    Args:
        order: for each of `names`, the number of its logit until now; None: the logits stay as
            they are.

    Raises:
        ModelError: the order changes, and the linear layer that makes the logits is not found.
    """
    if order is not None and list(order) != sorted(order):
        encoder = {id(module) for module in model.base_model.modules()}
        linears = []
        for module in model.modules():
            if isinstance(module, nn.Linear) and id(module) not in encoder:
                linears.append(module)
        # The last linear layer outside of the encoder makes the logits in every supported family.
        if not linears or linears[-1].out_features != len(names):
            raise ModelError(
                f"the labels of this {model.config.model_type!r} stand in another order, and its head is not found",
                "give an encoder without a head",
            )
        for parameter in linears[-1].parameters():
            parameter.copy_(parameter[list(order)])
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}


def _build(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration with random weights, in float32 and eval mode."""
    model = getattr(transformers, head_of_config(config).auto_class).from_config(config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def build_shallow(config: PretrainedConfig, layers: int = SMOKE_LAYERS) -> PreTrainedModel:
    """Build a model of few layers with random weights; of all layers where the family cannot be shortened."""
    depth, shallow = getattr(config, "num_hidden_layers", None), copy.deepcopy(config)
    try:
        for name, value in config.to_dict().items():
            if isinstance(value, list) and len(value) == depth:  # one entry for each layer
                setattr(shallow, name, value[:layers])
        shallow.num_hidden_layers = layers
        return _build(shallow)
    except Exception:  # with all layers it may be built; if not, that error tells more
        return _build(config)


def _ordered_labels(config: PretrainedConfig) -> list[str]:
    """Label names in the order of the logits; where the head has none, names of its outputs."""
    named = head_of_config(config).name_outputs(config.to_dict())
    if named:
        return named
    # transformers turns the keys of config.json into numbers, and declares them as strings
    names = cast("dict[int, str]", config.id2label)
    return [str(names[index]) for index in range(len(names))]


def _set_dropout(config: PretrainedConfig, value: float) -> None:
    """Set every dropout probability, and remember the ones before for `save_model`."""
    before = {}
    for name, probability in config.to_dict().items():
        # A bool is an int to Python, and no probability.
        is_number = isinstance(probability, int | float) and not isinstance(probability, bool)
        if "dropout" in name and is_number:
            before[name] = probability
            setattr(config, name, value)
    config._dropout_before = before
