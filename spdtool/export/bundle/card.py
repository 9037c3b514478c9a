"""Write the model card of a bundle for the Hugging Face hub: metadata, measured table, usage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from spdtool.data.dataset import find_dataset
from spdtool.models.config import HUB_NAME
from spdtool.models.student import PRETRAINED
from spdtool.recipe.fields import Recipe
from spdtool.run.records import Quality, Variant
from spdtool.tasks.head import head_of_config
from spdtool.tasks.prepare import find_task
from spdtool.tasks.sentence_settings import SentenceSettings
from spdtool.tasks.task import Task

PYTHON = """
## Use

```python
import spdtool  # needs neither torch nor transformers

{name} = spdtool.load("FOLDER")
print({name}({arguments}))  # {answer}
```

`selftest.py` is a worked example with plain onnxruntime and tokenizers. With transformers and onnxruntime:

```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
session = onnxruntime.InferenceSession("FOLDER/{model}")
encoding = tokenizer({arguments}, truncation=True, return_tensors="np")
names = [value.name for value in session.get_inputs()]
{outputs} = session.run(None, {{name: encoding[name].astype(np.int64) for name in names}})
print({python})
```
"""
# The pipeline of transformers.js reads one text and drops a second one without a word.
PIPELINE = """
With transformers.js (`dtype` is one of {dtypes}):

```js
import {{ pipeline }} from "@huggingface/transformers";

const {name} = await pipeline("{pipeline}", "FOLDER", {{ dtype: "{dtype}" }});
console.log(await {name}({arguments}{options}));
```
"""
MODEL = """
With transformers.js (`dtype` is one of {dtypes}); its pipeline {reason}:

```js
import {{ AutoTokenizer, {auto_class} }} from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("FOLDER");
const model = await {auto_class}.from_pretrained("FOLDER", {{ dtype: "{dtype}" }});
const inputs = await tokenizer({arguments});
const {{ {outputs} }} = await model(inputs);
console.log({script});
```
"""
SENTENCES = """
## Use

```python
import spdtool  # needs neither torch nor transformers

embed = spdtool.load("FOLDER")
print(embed("one text"))  # the vector, float32
```

With sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER", backend="onnx")
print(model.encode(["one text"]))
```

With transformers.js (`dtype` is one of {dtypes}), which has to be told the pooling{prompt_note}:

```js
import {{ pipeline }} from "@huggingface/transformers";

const embed = await pipeline("feature-extraction", "FOLDER", {{ dtype: "{dtype}" }});
const vector = await embed({text}, {{ pooling: "{pooling}", normalize: {normalize} }});
console.log(Array.from(vector.data));
```
"""
# What a stranger can run before he trusts any number of the card.
SELFTEST_NOTE = """
`python selftest.py` replays `golden.json`, sentences of the dev set with the logits of the checkpoint, on every file
whose libraries are there, and checks every sha256 of `manifest.json`.
"""
SPEED_NOTE = (
    "The speed of a file with a library is not that of the zeros alone. `spdtool bench` times the dense model in the "
    "same form too, and says what fused operators, padding, rounding and zeros each give."
)
SCRIPT_ARGMAX = "model.config.id2label[logits.data.indexOf(Math.max(...logits.data))]"
# What transformers.js calls the poolings of sentence-transformers.
SCRIPT_POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last_token"}
TAGS = ("onnx", "sparse", "pruned", "distilled", "spdtool")
# File names and what transformers.js calls them, for its option `dtype`.
DTYPES = {"onnx/model.onnx": "fp32", "onnx/model_fp16.onnx": "fp16", "onnx/model_quantized.onnx": "q8"}


def render_card(
    recipe: Recipe,
    variants: Mapping[str, Variant],
    config: Mapping[str, JsonValue],
    quality: Quality,
    sentence: SentenceSettings | None = None,
) -> str:
    """Render README.md.

    Args:
        variants: by target, the portable one first.
        config: the model's config.json.
        quality: what was measured of teacher and student.
        sentence: settings of a sentence encoder; None: the model is none.
    """
    # A configuration without names stands for two classes.
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    assert isinstance(labels, dict), "transformers wrote it"
    title = f"{config.get('model_type', 'encoder')} for {recipe.task}, {recipe.size_label}"
    task = find_task(recipe)
    lines = [
        "---",
        *_metadata(recipe, title, next(iter(variants.values())), head_of_config(config).pipeline),
        "---",
        "",
        f"# {title}",
        "",
    ]
    if recipe.smoke:
        lines += ["**Smoke run: a few steps on a random model. Its numbers mean nothing.**", ""]
    kind = "smaller" if recipe.prune.is_structured else "sparse"
    head = head_of_config(config)
    outputs = head.name_outputs(config)
    content = f"Labels: {', '.join(map(str, labels.values()))}."
    if head.pools:
        content = f"It gives a vector of {len(outputs)} numbers for a text."
    lines += [
        f"A {kind} encoder, pruned and distilled with spdtool (recipe `{recipe.name}`, seed {recipe.seed}). {content}",
        "",
        *_measured_table(variants),
        "",
        *(f"- {name}: {text}" for name, text in quality.lines()),
    ]
    if any(variant.library is not None for variant in variants.values()):
        lines += ["", SPEED_NOTE]
    files = [variant.file for variant in variants.values()]
    if sentence is not None:
        return "\n".join(lines) + "\n" + _sentence_usage(sentence, files) + SELFTEST_NOTE
    return "\n".join(lines) + "\n" + _usage(task, [str(name) for name in labels.values()], files, config)


def _sentence_usage(sentence: SentenceSettings, files: Sequence[str]) -> str:
    """Render the snippets of a sentence encoder, with its own pooling and prompt."""
    dtypes = [dtype for file, dtype in DTYPES.items() if file in files]
    return SENTENCES.format(
        dtypes=", ".join(f"`{dtype}`" for dtype in dtypes),
        dtype=dtypes[0],
        text=json.dumps(sentence.prompt + "one text"),
        prompt_note=" and knows no prompt" if sentence.prompt else "",
        pooling=SCRIPT_POOLING[sentence.pooling],
        normalize=str(sentence.normalize).lower(),
    )


def _usage(task: Task, labels: Sequence[str], files: Sequence[str], config: Mapping[str, JsonValue]) -> str:
    """Render the snippets that are right for this kind of task.

    Args:
        labels: names, in the order of the logits.
        files: models, the portable one first.
        config: the model's config.json.
    """
    decision = task.decision(labels, task.decision.settings_of(config))
    head, snippets, example = task.head, decision.snippets(), decision.example
    pairs = len(task.dataset.text) == 2
    dtypes = [dtype for file, dtype in DTYPES.items() if file in files]
    texts = [json.dumps(text) for text in example.texts(paired=pairs)]
    arguments = script_arguments = ", ".join(texts)
    if pairs:
        # JavaScript's tokenizers take the second text as an option.
        script_arguments = f"{texts[0]}, {{ text_pair: {texts[1]} }}"
    names = ", ".join(head.outputs)
    usage = PYTHON.format(
        name=example.name,
        arguments=arguments,
        answer=snippets.answer.replace("\n", " "),
        model=files[0],
        outputs=names if len(head.outputs) > 1 else f"{names}, *_",
        python=snippets.python,
    )
    script = {"dtypes": ", ".join(f"`{dtype}`" for dtype in dtypes), "dtype": dtypes[0]}
    if not pairs and not snippets.script:
        script |= {
            "name": example.name,
            "arguments": script_arguments,
            "pipeline": head.pipeline,
            "options": snippets.options,
        }
        return usage + snippets.note + PIPELINE.format(**script) + SELFTEST_NOTE
    script |= {
        "arguments": script_arguments,
        "auto_class": head.auto_class,
        "outputs": names,
        "script": snippets.script or ("logits.data" if snippets.options else SCRIPT_ARGMAX),
        "reason": snippets.reason if snippets.script else "takes no second text",
    }
    return usage + snippets.note + MODEL.format(**script) + SELFTEST_NOTE


def _metadata(recipe: Recipe, title: str, variant: Variant, pipeline: str) -> list[str]:
    """Lines of YAML that the hub reads; texts are written as JSON, which is YAML too."""
    lines = [f"pipeline_tag: {pipeline}", "library_name: transformers.js", "tags:"]
    lines += [f"- {tag}" for tag in TAGS]
    base_model = _base_model(recipe)
    if base_model is not None:
        lines.append(f"base_model: {json.dumps(base_model)}")
    metrics = dict(variant.dev or {})
    metrics.pop("score", None)  # our mean of the task's metrics means nothing on the hub
    if not metrics:
        return lines
    task = json.dumps(recipe.task)
    lines += [
        "model-index:",
        f"- name: {json.dumps(title)}",
        "  results:",
        "  - task:",
        f"      type: {pipeline}",
        "    dataset:",
        f"      name: {task}",
        f"      type: {task}",
        "      split: dev",
        "    metrics:",
    ]
    for name, value in metrics.items():
        lines += [f"    - type: {json.dumps(name)}", f"      value: {value:.6f}"]
    return lines


def _base_model(recipe: Recipe) -> str | None:
    """Name of the hub's model from which the student was made; None where it came from elsewhere.

    A student that the recipe names was made from that one. Any other is a copy of the teacher,
    which was given or fine-tuned from `model`.
    """
    source = None
    if recipe.student is None:
        source = recipe.given_teacher
    elif recipe.student != PRETRAINED:
        source = recipe.student
    if recipe.smoke or (source is None and find_dataset(recipe).build is not None):
        return None
    source = source or recipe.model
    # A local path can look like a name of the hub, and must not end up in a public card.
    is_path = Path(source).is_absolute() or source.startswith((".", "~")) or Path(source).exists()
    if is_path or not HUB_NAME.fullmatch(source):
        return None
    return source


def _measured_table(variants: Mapping[str, Variant]) -> list[str]:
    """One row for each file; the change is that against the checkpoint on the same dev set."""
    first = next(iter(variants.values()))
    change = "predictions flipped"
    if first.rank_correlation is not None:
        change = "largest change, mean change, rank correlation"
    lines = [f"| file | runs on | bytes | zeros | dev score | change | {change} |", "|---|---|---|---|---|---|---|"]
    for variant in variants.values():
        scores = ["-", "-", "-"]
        if variant.dev is not None and variant.checkpoint_dev is not None:
            score, before = variant.dev["score"], variant.checkpoint_dev["score"]
            scores = [f"{score:.4f}", f"{score - before:+.4f}", _prediction_change(variant)]
        runs_on = "any"
        if variant.library is not None:
            runs_on = f"{variant.hardware}, with {variant.library.distribution}"
        cells = [f"`{variant.file}`", runs_on, f"{variant.bytes:,}", f"{variant.sparsity:.2%}", *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _prediction_change(variant: Variant) -> str:
    if variant.rank_correlation is None:
        return f"{variant.flipped} of {variant.rows}"
    largest = max(variant.largest_change or 0.0, variant.largest_difference or 0.0)
    return f"{largest:.1e}, {variant.mean_change:.1e}, {variant.rank_correlation:.6f}"
