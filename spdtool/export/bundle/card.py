"""The model card of a bundle, as the Hugging Face hub reads it: front matter, a measured table, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spdtool.data.dataset import find_dataset
from spdtool.models.load import HUB_NAME
from spdtool.models.student import PRETRAINED
from spdtool.recipe.fields import Recipe
from spdtool.run.records import Variant

USE = """
## Use

```python
import spdtool  # needs neither torch nor transformers

classify = spdtool.load("FOLDER")
classify({example})
```

Or with plain onnxruntime and tokenizers (`selftest.py` is a worked example), or with transformers.js:

```js
const classify = await pipeline("text-classification", "FOLDER", {{ dtype: "fp32" }}); // {dtypes}
```

`python selftest.py` replays `golden.json`, sentences of the dev set with the logits of the checkpoint, on every file
whose libraries are there, and checks every sha256 of `manifest.json`.
"""
DTYPES = {"onnx/model.onnx": "fp32", "onnx/model_fp16.onnx": "fp16", "onnx/model_quantized.onnx": "q8"}


def render_card(recipe: Recipe, variants: Mapping[str, Variant], config: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        variants: what the manifest says of each; each has a `dev`, by metric.
        config: the model's config.json.
    """
    named = list((config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}).values())
    title = f"{config.get('model_type', 'encoder')} for {recipe.task}, {recipe.sparsity:.0%} zeros"
    lines = [
        "---",
        *_front(recipe, title, next(iter(variants.values()))),
        "---",
        "",
        f"# {title}",
        "",
        *(["**Smoke run: a few steps on a random model. Its numbers mean nothing.**", ""] if recipe.smoke else []),
        f"A sparse encoder, pruned and distilled with spdtool (recipe `{recipe.name}`, seed {recipe.seed}). "
        f"Labels: {', '.join(map(str, named))}.",
        "",
        *_table(variants),
    ]
    files = [variant.file for variant in variants.values()]
    dtypes = ", ".join(f'"{name}"' for file, name in DTYPES.items() if file in files)
    example = '"one text"' if _single(recipe) else '"first text", "second text"'
    return "\n".join(lines) + "\n" + USE.format(example=example, dtypes=dtypes)


def _single(recipe: Recipe) -> bool:
    return len(find_dataset(recipe).text) == 1


def _front(recipe: Recipe, title: str, variant: Variant) -> list[str]:
    """YAML; texts are written as JSON, which is YAML and needs no further care."""
    lines = ["pipeline_tag: text-classification", "library_name: transformers.js"]
    lines += ["tags:", *(f"- {tag}" for tag in ("onnx", "sparse", "pruned", "distilled", "spdtool"))]
    base = _base(recipe)
    if base is not None:
        lines.append(f"base_model: {json.dumps(base)}")
    metrics = [(name, value) for name, value in (variant.dev or {}).items() if name != "score"]
    if not metrics:
        return lines
    lines += ["model-index:", f"- name: {json.dumps(title)}", "  results:", "  - task:"]
    lines += ["      type: text-classification", "    dataset:"]
    lines += [f"      name: {json.dumps(recipe.task)}", f"      type: {json.dumps(recipe.task)}", "      split: dev"]
    lines += ["    metrics:"]
    for name, value in metrics:
        lines += [f"    - type: {json.dumps(name)}", f"      value: {value:.6f}"]
    return lines


def _base(recipe: Recipe) -> str | None:
    """The hub's name of the model that the student was made from; None: it is a folder, random, or the task's own.

    A student of its own is made from that one, and learns from the teacher; else it is a copy of the teacher, which was
    given or fine-tuned from `model`.
    """
    given = recipe.student if recipe.student not in (None, PRETRAINED) else None
    if given is None and recipe.student is None:
        given = recipe.given_teacher
    if recipe.smoke or (given is None and find_dataset(recipe).build is not None):
        return None
    source = given or recipe.model
    folder = Path(source).is_absolute() or source.startswith((".", "~"))
    return source if HUB_NAME.fullmatch(source) and not folder and not Path(source).exists() else None


def _table(variants: Mapping[str, Variant]) -> list[str]:
    """What each file was measured to be; the change is that against the checkpoint, on the same dev set."""
    lines = [
        "| file | runs on | bytes | zeros | dev score | change | predictions flipped |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in variants.values():
        measured = ["-", "-", "-"]
        if variant.dev is not None and variant.checkpoint_dev is not None:
            score, before = variant.dev["score"], variant.checkpoint_dev["score"]
            measured = [f"{score:.4f}", f"{score - before:+.4f}", f"{variant.flipped} of {variant.rows}"]
        needs = f"{variant.hardware}, with {variant.library.distribution}" if variant.library else "any"
        cells = [f"`{variant.file}`", needs, f"{variant.bytes:,}", f"{variant.sparsity:.2%}", *measured]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
