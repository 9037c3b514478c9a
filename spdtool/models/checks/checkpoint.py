"""Check a checkpoint when it is opened: are the files those of one whole, finite, float model of its config.json?

Everything that opens a checkpoint calls `open_checkpoint`: a given teacher or student, an encoder
to fine-tune, the stages of a run, an export, and the plan. Names and shapes are compared by the
headers of the files, without loading a weight; then every weight that the model uses is read once,
for NaN and infinity. A checkpoint that passed is not read again until one of its files changes.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from spdtool.errors import ModelError
from spdtool.models.checks.foreign import refuse_foreign_weights
from spdtool.models.checks.weight_files import (
    FLOATS,
    INDEX_FILE,
    WEIGHTS_FILE,
    Header,
    find_weight_files,
    read_headers,
    refuse_contradicting_index,
    refuse_not_finite,
    strip_wrappers,
)
from spdtool.models.config import announce_once, read_config, require_head, unreadable_model
from spdtool.tasks.head import Head, head_of_config

# Parts of the names that PEFT gives to the weights that it adds, and to those that it wraps.
ADAPTER_MARKS = (".lora_", "lora_embedding_", ".base_layer.", ".modules_to_save.", ".ia3_", ".prompt_embeddings.")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_adapter.bin")
# Buffers that older versions of transformers saved, and a head's parameters of pretraining.
UNUSED_ENDINGS = ("position_ids", "token_type_ids", "inv_freq", "relative_position_index")
PRETRAINING_HEADS = (
    *("cls", "lm_head", "vocab_transform", "vocab_layer_norm", "vocab_projector", "qa_outputs", "pred_layer"),
    *("generator_predictions", "generator_lm_head", "discriminator_predictions", "lm_predictions", "mask_predictions"),
    *("predictions", "sop_classifier", "head_lm", "loss_fct", "criterion", "class_weights"),
)
NUMBERED = re.compile(r"\.\d+\.")  # in the names of weights inside a layer of a stack
LISTED_KEYS = 3


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed the check.

    Attributes:
        source: the folder or hub name.
        config: read anew, so the caller may change it.
        files: its weights; empty where they are not on this machine yet.
        renamed: name in the files to the model's name, where a wrapper's prefix was dropped; empty
            where none was.
    """

    source: str | Path
    config: PretrainedConfig
    files: tuple[Path, ...]
    renamed: Mapping[str, str]


def open_checkpoint(
    source: str | Path,
    *,
    finetuned: bool = False,
    new_head: Head | None = None,
    has_weights: bool = True,
    fields: Mapping[str, object] | None = None,
) -> Checkpoint:
    """Read the configuration of `source`, and check its weights against it.

    Args:
        source: a folder or a hub name. The weights of a hub name are checked if they were downloaded.
        finetuned: refuse a configuration that names no head of a kind of task.
        new_head: the head to give to an encoder, whose own is not used; None: that of its configuration.
        has_weights: False for an exported folder, whose weights are in another file.
        fields: of the configuration to set, by name.

    Raises:
        ModelError: names the file, the weight or field, both values, and what to do.
    """
    if Path(source).is_dir():
        _refuse_adapter(Path(source))
    config = read_config(source, new_head=new_head is not None, fields=fields)
    named_file = getattr(config, "transformers_weights", None)
    if named_file not in (None, WEIGHTS_FILE):  # transformers would read that one, unchecked
        raise ModelError(
            f"config.json of {str(source)!r} names the weights {named_file!r}; what is read is {WEIGHTS_FILE}",
            f"rename the right file to {WEIGHTS_FILE}, and remove transformers_weights from config.json",
        )
    if finetuned:
        require_head(source, config)
    if new_head is not None:  # whatever builds this model reads its class from here
        config.architectures = [find_model_class(config, new_head).__name__]
    if not has_weights:
        return Checkpoint(source, config, (), {})
    files = find_weight_files(source)
    if not files:
        return Checkpoint(source, config, (), {})
    # Not the hash: reading gigabytes again would cost what this saves.
    index = files[0].with_name(INDEX_FILE)
    read_files = (*files, index) if index.is_file() else files
    identity = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in read_files]
    key = (new_head, config.to_json_string(use_diff=False), *identity)
    if key not in _passed:
        try:
            _passed[key] = _check_weights(source, files, config, new_head=new_head is not None)
        except Exception as error:  # building the model of a config.json raises what it likes
            raise unreadable_model(source, error) from None
    return Checkpoint(source, config, files, _passed[key])


_passed: dict[tuple[object, ...], dict[str, str]] = {}  # what `_check_weights` returned, for files that passed


def _check_weights(
    source: str | Path, files: tuple[Path, ...], config: PretrainedConfig, *, new_head: bool
) -> dict[str, str]:
    """Check the weights in `files`; return the names that change.

    Raises:
        ModelError: see `open_checkpoint`.
    """
    headers = read_headers(files)
    refuse_contradicting_index(headers)
    _refuse_adapter_keys(source, headers)
    refuse_foreign_weights(source, headers)
    renamed = strip_wrappers(headers, files[0])
    if renamed:
        key, name = next(iter(renamed.items()))
        announce_once(
            f"{source} was saved from a wrapped model; its names are read without the wrapper: {key} as {name}"
        )
    plain = {renamed.get(key, key): header for key, header in headers.items()}
    model, report = _match_names(config, plain)
    judge = _Judge(source, plain, model, new_head)
    # In this order: a wrong shape explains a missing weight, and that an unused one.
    judge.refuse_other_shapes(report["mismatched_keys"])
    judge.refuse_missing(report["missing_keys"])
    unused = set(report["unexpected_keys"])
    judge.refuse_unused(unused)
    judge.refuse_quantized(unused)
    used = {}
    for key, header in headers.items():
        name = renamed.get(key, key)
        if name not in unused and not name.endswith(UNUSED_ENDINGS):
            used[key] = header
    refuse_not_finite(used)
    return renamed


@dataclass(frozen=True)
class _Judge:
    """Decides what a difference between the files and config.json means.

    Attributes:
        source: for messages.
        headers: of the files, by the model's names.
        model: built from config.json, without weights.
        new_head: the head in the files is not used.
    """

    source: str | Path
    headers: Mapping[str, Header]
    model: PreTrainedModel
    new_head: bool

    @property
    def _file(self) -> Path:
        return next(iter(self.headers.values())).file

    def _is_encoder(self, name: str) -> bool:
        """Tell whether a name of the model or of the files belongs to the encoder; files may leave out its prefix."""
        prefix = self.model.base_model_prefix + "."
        if any(key.startswith(prefix) for key in self.headers):
            return name.startswith(prefix)
        return name.startswith(prefix) or name not in self._head_names()

    def _head_names(self) -> set[str]:
        prefix = self.model.base_model_prefix + "."
        return {name for name in self.model.state_dict() if not name.startswith(prefix)}

    def refuse_other_shapes(self, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
        """Raise ModelError for a weight of another shape; `mismatched` has its name, and shapes in file and model."""
        head = self._head_names()
        wrong = sorted(item for item in mismatched if not (self.new_head and item[0] in head))
        removed_heads = getattr(self.model.config, "pruned_heads", None)
        if not wrong and not removed_heads:
            return
        hint = "copy the folder again: config.json and the weights belong together"
        if removed_heads:
            problem = f"config.json has pruned_heads = {dict(removed_heads)}"
            hint = "attention heads were removed from it: give the checkpoint from before"
        if wrong:
            name, stored, expected = wrong[0]
            shapes = f"{name} is {list(stored)} in {self._file}, and {list(expected)} by config.json"
            problem = f"{problem}: {shapes}" if removed_heads else shapes
            if not removed_heads and name in head:
                hint = f"the head must have one output for each label: config.json names {self.model.config.num_labels}"
            elif not removed_heads and name.endswith("word_embeddings.weight"):
                hint = f'write "vocab_size": {stored[0]} in config.json, if the tokenizer has as many tokens'
            elif not removed_heads and self._are_layers_smaller(wrong):
                hint = (
                    "rows or heads were removed from its layers, and stock transformers builds them whole: give the "
                    "checkpoint from before, or write the sizes into config.json if all layers have the same"
                )
        raise ModelError(f"{self.source}: {problem}{_count_further(wrong)}", hint)

    @staticmethod
    def _are_layers_smaller(wrong: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> bool:
        name, stored, expected = wrong[0]
        return bool(NUMBERED.search(name)) and sum(stored) < sum(expected)

    def refuse_missing(self, missing: Iterable[str]) -> None:
        """Raise ModelError for weights that the files lack, which transformers would make random.

        Random weights are right for a new head, and for a pooler, which encoders that were only pretrained lack.
        """
        head = self._head_names()
        wrong = []
        is_encoder = self.model.base_model is self.model  # without a head, which alone would read the pooler
        for name in sorted(missing):
            is_optional = "pooler" in name and (self.new_head or is_encoder)
            if not is_optional and not (self.new_head and name in head):
                wrong.append(name)
        if not wrong:
            return
        hint = "copy the folder again: config.json and model.safetensors belong together"
        first_segments = {key.split(".")[0] for key in self.headers}
        if len(first_segments) == 1 and not (first_segments & {name.split(".")[0] for name in wrong}):
            prefix = first_segments.pop()
            hint = f"every name in {self._file.name} begins with {prefix!r}: save the model inside, without that prefix"
        raise ModelError(
            f"{self._file} lacks {len(wrong)} weights of its config.json: {_list_keys(wrong)}",
            hint,
        )

    def refuse_unused(self, unused: Iterable[str]) -> None:
        """Raise ModelError for weights that the model of config.json does not have; warn of odd ones."""
        suspicious, odd = [], []
        for name in sorted(unused):
            if name.endswith(UNUSED_ENDINGS) or "pooler" in name or name.split(".")[0] in PRETRAINING_HEADS:
                continue
            if not self.new_head or (self._is_encoder(name) and NUMBERED.search(name)):
                suspicious.append(name)
            elif self._is_encoder(name):
                odd.append(name)
        if odd:
            announce_once(f"{self.source}: not used by a {self.model.config.model_type!r}: {_list_keys(odd)}")
        if not suspicious:
            return
        depth = getattr(self.model.config, "num_hidden_layers", None)
        hint = "copy the folder again: config.json and the weights belong together"
        if any(NUMBERED.search(name) for name in suspicious):
            hint = f"config.json says {depth} layers: write the number that was trained under num_hidden_layers"
        raise ModelError(
            f"{self._file} has {len(suspicious)} weights that the model of config.json has no use for: "
            f"{_list_keys(suspicious)}",
            hint,
        )

    def refuse_quantized(self, unused: Iterable[str]) -> None:
        """Raise ModelError for a weight that is stored in integers or in eight bits."""
        skipped, expected = set(unused), self.model.state_dict()
        for name, header in self.headers.items():
            if name in skipped or header.dtype in FLOATS:
                continue
            weight = expected.get(name, expected.get(f"{self.model.base_model_prefix}.{name}"))
            if weight is not None and weight.is_floating_point():
                raise ModelError(
                    f"{header.file}: {name} is stored as {header.dtype}, and a float was expected",
                    "the weights are quantized: give the checkpoint from before",
                )


def _match_names(config: PretrainedConfig, headers: Mapping[str, Header]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build the model without weights, and let transformers match the names and shapes in the files.

    Returns:
        the model, and what `from_pretrained` reports with `output_loading_info`.
    """
    model_class = find_model_class(config)
    weights = {}
    for name, header in headers.items():
        # On the meta device no number is loaded: names and shapes alone are compared.
        weights[name] = torch.empty(header.shape, dtype=torch.float32, device="meta")
    result: Any = model_class.from_pretrained(
        None,
        # `from_pretrained` writes into what it gets.
        config=copy.deepcopy(config),
        state_dict=weights,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = result
    return model, report


def find_model_class(config: PretrainedConfig, head: Head | None = None) -> type[PreTrainedModel]:
    """Find the class of a family that has a head.

    Args:
        head: None: that which the configuration names.

    Raises:
        ModelError: transformers has none.
    """
    head = head or head_of_config(config)
    auto_class: Any = getattr(transformers, head.auto_class)
    try:
        model_class: Any = auto_class._model_mapping[type(config)]
    except KeyError:
        problem = f"transformers has no {head.auto_class} for {config.model_type!r}: it cannot be {head.about}"
        raise ModelError(problem, "give an encoder of another family") from None
    family_class: type[PreTrainedModel] = model_class
    return family_class


def _refuse_adapter(folder: Path) -> None:
    present = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    if not present:
        return
    kind, base = "an adapter", "BASE"
    if present[0] == ADAPTER_FILES[0]:
        try:
            content = json.loads((folder / present[0]).read_text("utf-8"))
            kind = f"an adapter ({content.get('peft_type', 'unknown kind')})"
            base = content.get("base_model_name_or_path") or base
        except (ValueError, AttributeError):
            pass
    beside = ""
    if (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file():
        beside = ", and beside it weights without it: which of both is meant is not clear"
    _refuse_unmerged(f"{folder} holds {kind} of {base!r} in {present[0]}{beside}", base)


def _refuse_adapter_keys(source: str | Path, headers: Mapping[str, Header]) -> None:
    for key, header in headers.items():
        if key.startswith("base_model.model.") or any(mark in f".{key}" for mark in ADAPTER_MARKS):
            _refuse_unmerged(f"{source}: {header.file.name} holds weights of an adapter, such as {key}", "BASE")


def _refuse_unmerged(problem: str, base: str) -> NoReturn:
    raise ModelError(
        problem,
        "merge it into its base, and give the new folder: "
        f"PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained({base!r}), FOLDER)"
        ".merge_and_unload().save_pretrained(NEW)",
    )


def _list_keys(names: Sequence[str]) -> str:
    further = f" and {len(names) - LISTED_KEYS} more" if len(names) > LISTED_KEYS else ""
    return ", ".join(names[:LISTED_KEYS]) + further


def _count_further(wrong: Sequence[object]) -> str:
    return f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
