"""Read config.json, and refuse one that contradicts itself.

What only switches how `forward` answers is set back. What says which logit is which must be clear.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, PretrainedConfig

from spdtool import console
from spdtool.data.kinds.embedding import is_sentence_encoder
from spdtool.data.kinds.unsupported import SUPPORTED, kind_of_architectures
from spdtool.errors import ModelError, SpdError, first_line
from spdtool.models.checks.foreign import refuse_foreign_config
from spdtool.tasks.head import Head, find_head
from spdtool.tasks.task import Task

RawConfig: TypeAlias = dict[str, Any]
"""The content of config.json."""

HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")
PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers writes for want of names
MULTI_LABEL = "multi_label_classification"
# Each changes what `forward` returns or how it computes, and none what the weights mean.
SWITCHES = (
    *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("gradient_checkpointing", "chunk_size_feed_forward", "reference_compile", "use_bfloat16"),
)


def read_config(
    source: str | Path, *, new_head: bool = False, fields: Mapping[str, object] | None = None
) -> PretrainedConfig:
    """Read the configuration of `source`, a folder or a hub name.

    Args:
        new_head: the labels are not read: `fields` may bring those of another head.
        fields: to set, by name.

    Raises:
        ModelError: it cannot be found or read, or contradicts itself.
    """
    _refuse_absent(source)
    try:
        raw, _ = PretrainedConfig.get_config_dict(source)
    except Exception as error:
        raise unreadable_model(source, error) from None
    if not isinstance(raw, dict):
        raise ModelError(f"config.json of {str(source)!r} is no JSON object", reading_hint(source))
    for name in SWITCHES:
        raw.pop(name, None)
    _read_activation(source, raw)
    refuse_foreign_config(source, raw)
    _refuse_quantized(source, raw)
    _refuse_decoder(source, raw)
    if new_head:
        for name in ("id2label", "label2id", "num_labels", "problem_type"):
            raw.pop(name, None)
    else:
        _mend_labels(source, raw)
    try:
        if raw.get("model_type") in CONFIG_MAPPING:
            if not new_head:
                _name_encoder(source, raw)
            config_class = CONFIG_MAPPING[raw["model_type"]]
            return config_class.from_dict(raw, name_or_path=str(source), **(fields or {}))
        # without a known type transformers says best what is wrong
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **(fields or {}))
    except Exception as error:
        raise unreadable_model(source, error) from None
    assert isinstance(config, PretrainedConfig)
    return config


def _name_encoder(source: str | Path, raw: RawConfig) -> None:
    """Name the class of the encoder alone, where the folder says how its tokens are pooled.

    Some name the class of their pretraining, with a head that nothing reads.
    """
    if is_sentence_encoder(source):
        model_class: Any = MODEL_MAPPING[CONFIG_MAPPING[raw["model_type"]]]
        raw["architectures"] = [model_class.__name__]


def _read_activation(source: str | Path, raw: RawConfig) -> None:
    """Put into the configuration what a cross-encoder applies to its output, which newer versions store beside it."""
    file = Path(source) / "config_sentence_transformers.json"
    if not file.is_file():
        return
    try:
        stored = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return  # a file of another library: who needs it says what is wrong with it
    if isinstance(stored, dict) and isinstance(stored.get("activation_fn"), str):
        raw.setdefault("sentence_transformers", {})["activation_fn"] = stored["activation_fn"]


def has_head(config: PretrainedConfig, head: Head) -> bool:
    """Tell whether the configuration names a class with this head."""
    return find_head(getattr(config, "architectures", None)) == head


def require_head(source: str | Path, config: PretrainedConfig) -> None:
    """Raise ModelError unless the configuration names a class with the head of some kind of task."""
    architectures = getattr(config, "architectures", None) or []
    head = find_head(architectures)
    if head is not None and head.opens(source):
        return
    kind = kind_of_architectures(architectures)
    if kind is not None:
        raise ModelError(f"{str(source)!r} is a model for {kind}, which is not supported", SUPPORTED)
    raise ModelError(
        f"{str(source)!r} is no fine-tuned classifier: its config names {', '.join(architectures) or 'nothing'}",
        "give it as --model, and a teacher is fine-tuned from it",
    )


def check_kind(source: str | Path, config: PretrainedConfig, task: Task) -> None:
    """Refuse a fine-tuned model with another head than the task's, or for another kind of labels.

    Raises:
        ModelError: names both heads, or both values of `problem_type`.
    """
    head = find_head(getattr(config, "architectures", None))
    if head is not None and head != task.head:
        raise ModelError(
            f"{str(source)!r} is {head.about} ({', '.join(config.architectures or ())}); "
            f"the task {task.name!r} needs {task.head.about} (...{task.head.ending})",
            "give a teacher of this task, or the encoder alone as --model",
        )
    stored, expected = getattr(config, "problem_type", None), task.problem_type
    if stored in (None, expected) or expected is None:
        return
    kinds = "a row may have several labels" if stored == MULTI_LABEL else f"it was trained as {stored}"
    raise ModelError(
        f"config.json of {str(source)!r} has problem_type {stored!r} ({kinds}); the task's is {expected!r}",
        f'give a teacher of this task; if it is one, write "problem_type": "{expected}" in its config.json',
    )


def unreadable_model(source: str | Path, error: Exception) -> SpdError:
    """Turn whatever a library raised while it read `source` into an error for the user."""
    if isinstance(error, SpdError):
        return error
    if type(error).__name__ == "SafetensorError":
        return ModelError(f"the weights of {str(source)!r} cannot be read: {error}", "copy them again")
    return ModelError(f"cannot load the model {str(source)!r}: {first_line(error)}", reading_hint(source))


def reading_hint(source: str | Path) -> str:
    """Say what to give instead of a source that cannot be read."""
    path = Path(source)
    if not path.exists():
        return "give a folder with config.json, model.safetensors and tokenizer files, or a name on a hub that answers"
    if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
        return "only safetensors are read: convert the pickled weights with transformers' save_pretrained"
    return "the folder needs config.json, model.safetensors and tokenizer files"


def _refuse_absent(source: str | Path) -> None:
    path = Path(source)
    # a path is told from a hub name first, since an absent hub answers slowly
    if not path.is_dir() and (path.exists() or not HUB_NAME.fullmatch(str(source))):
        problem = "is a file" if path.exists() else "does not exist"
        raise ModelError(f"cannot load the model {str(source)!r}: it {problem}", reading_hint(source))


def _refuse_quantized(source: str | Path, raw: RawConfig) -> None:
    quantization = raw.get("quantization_config") or raw.get("compression_config")
    if not quantization:
        return
    method = "another tool"
    if isinstance(quantization, Mapping):
        method = quantization.get("quant_method") or quantization.get("format") or method
    raise ModelError(
        f"the weights of {str(source)!r} are quantized (config.json has a quantization_config of {method})",
        "give the checkpoint from before it was quantized: what is pruned and exported are float weights",
    )


def _refuse_decoder(source: str | Path, raw: RawConfig) -> None:
    for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        if raw.get(name) is True:
            raise ModelError(
                f"{str(source)!r} is no encoder: config.json has {name} = true",
                "give an encoder: every token must see the whole text",
            )


def _mend_labels(source: str | Path, raw: RawConfig) -> None:
    """Write `id2label` and `label2id` of config.json as the two sides of one numbering from 0.

    Where `id2label` is missing or has placeholders, `label2id` has the names.

    Raises:
        ModelError: they contradict each other, or the numbering has gaps.
    """
    by_index = _read_id2label(source, raw)
    by_name = _read_label2id(source, raw)
    if not by_index and not by_name:
        return
    if by_name and not _are_placeholders(by_name) and (not by_index or _are_placeholders(by_index.values())):
        named = {index: name for name, index in by_name.items()}
        if by_index and len(named) != len(by_index):
            _refuse_labels(source, f"id2label has {len(by_index)} labels and label2id {len(named)}", named)
        if len(named) < len(by_name):
            _refuse_labels(source, f"label2id gives several names one number: {by_name}", named)
        by_index = named
    if sorted(by_index) != list(range(len(by_index))):
        numbers = ", ".join(map(str, sorted(by_index)[:8]))
        _refuse_labels(source, f"the labels have the numbers {numbers}, and logits are counted from 0", by_index)
    names = [by_index[index] for index in range(len(by_index))]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        _refuse_labels(source, f"two labels are called {repeated!r}", by_index)
    if by_name and not _are_placeholders(by_name):
        plain = {name.casefold(): index for name, index in by_name.items()}
        for index, name in enumerate(names):
            if plain.get(name.casefold()) != index:
                number = plain.get(name.casefold(), "no number")
                _refuse_labels(
                    source, f"id2label calls logit {index} {name!r}, and label2id gives it {number}", by_index
                )
    count = raw.pop("num_labels", len(names))
    if count != len(names):
        _refuse_labels(source, f"num_labels is {count}, and there are {len(names)} labels", by_index)
    if len(names) == 1 and raw.get("problem_type") == "single_label_classification":
        del raw["problem_type"]  # of one output there is nothing to choose: it is a number
    raw["id2label"] = dict(enumerate(names))
    raw["label2id"] = {name: index for index, name in enumerate(names)}


def _read_id2label(source: str | Path, raw: RawConfig) -> dict[int, str]:
    stored = raw.get("id2label") or {}
    if isinstance(stored, list):
        stored = dict(enumerate(stored))
    labels = {}
    try:
        for index, name in stored.items():
            labels[int(index)] = str(name)
    except (AttributeError, TypeError, ValueError):
        _refuse_labels(source, f"id2label is {stored!r}", {})
    if None in stored.values():
        _refuse_labels(source, f"id2label has a label without a name: {stored}", {})
    return labels


def _read_label2id(source: str | Path, raw: RawConfig) -> dict[str, int]:
    stored = raw.get("label2id") or {}
    labels = {}
    try:
        for name, index in stored.items():
            labels[str(name)] = int(index)
    except (AttributeError, TypeError, ValueError):
        _refuse_labels(source, f"label2id is {stored!r}", {})
    return labels


def _are_placeholders(names: Sequence[str] | Mapping[str, int] | Any) -> bool:
    return all(PLACEHOLDER.fullmatch(name) for name in names)


def _refuse_labels(source: str | Path, problem: str, by_index: Mapping[int, str]) -> NoReturn:
    names = [by_index[index] for index in sorted(by_index)] or ["NAME OF LOGIT 0", "NAME OF LOGIT 1"]
    example = json.dumps({str(number): name for number, name in enumerate(names[:4])}, ensure_ascii=False)
    raise ModelError(
        f"config.json of {str(source)!r}: {problem}",
        f'leave label2id and num_labels out, and name the logits in their order, such as "id2label": {example}',
    )


_announced: set[str] = set()


def announce_once(text: str) -> None:
    """Warn about a checkpoint, and only once: an export opens each many times."""
    if text not in _announced:
        _announced.add(text)
        console.warn(text)
