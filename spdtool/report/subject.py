"""What a run is about, for its page: data and model, the scores of each class, and how to use the result."""

from __future__ import annotations

import json
import shlex
from typing import Any

from spdtool.errors import UnknownName
from spdtool.report.records import RunRecords, TextTable, format_score, text_table
from spdtool.run.folder import Run
from spdtool.tasks.decision import ExampleCall, find_decision
from spdtool.tasks.scores.metrics import describe_headline

CLASS_COLUMNS = (
    *("class", "support", "teacher: precision", "recall", "f1"),
    *("student: precision", "recall", "f1"),
)
MODEL_FIELDS = {
    **dict.fromkeys(("num_hidden_layers", "n_layers"), "{} layers"),
    **dict.fromkeys(("hidden_size", "dim"), "width {}"),
    "vocab_size": "vocabulary of {:,} tokens",
}


def describe_subject(run: Run, records: RunRecords) -> list[tuple[str, str]]:
    """Describe the data and the model of a run as names and texts."""
    recipe, lines = run.recipe, [("task", run.recipe.task)]
    kind = read_bundle_manifest(run).get("kind")
    if kind is not None:
        lines.append(("kind of task", str(kind)))
    if recipe.data:
        lines.append(("data", recipe.data))
    data = next((record.data for record in records.stages.values() if record.data is not None), None)
    if data is not None:
        lines.append(("rows", ", ".join(f"{count:,} {split}" for split, count in data.rows.items())))
    trained = list(records.training.values())
    if trained and trained[0].classes:
        lines.append(("labels", ", ".join(trained[0].classes)))
    if trained:
        names = [name for name in trained[0].dev if name != "score"]
        # A further dev set has the same metrics with its suffix, and does not enter the score.
        metrics = []
        for name in names:
            if not any(name.startswith(f"{other}_") for other in names):
                metrics.append(name)
        lines.append(("dev score", recipe.metric or describe_headline(metrics)))
    config_file = run.path / "teacher" / "config.json"
    source = recipe.given_teacher or recipe.model
    if config_file.is_file():
        config = json.loads(config_file.read_text("utf-8"))
        shape = [str(config.get("model_type", ""))]
        shape += [text.format(config[key]) for key, text in MODEL_FIELDS.items() if key in config]
        source = f"{source}: {', '.join(shape)}" if recipe.task != "demo" else ", ".join(shape)
    lines.append(("model", source))
    if recipe.student:
        lines.append(("student", recipe.student))
    return lines


def class_scores(records: RunRecords) -> TextTable:
    """Return the dev scores of each class, of the teacher and of the student as far as it is trained."""
    teacher = records.training.get("teacher")
    phase = records.last_phase
    student = None if phase is None else records.training[phase]
    rows = []
    for name, scores in (teacher.classes if teacher is not None else {}).items():
        cells: list[object] = [name, scores.rows]
        for result in (teacher, student):
            of_class = None if result is None else result.classes.get(name)
            cells += [format_score(getattr(of_class, figure, None)) for figure in ("precision", "recall", "f1")]
        rows.append(cells)
    return text_table("dev scores x 100 of each class", CLASS_COLUMNS, rows)


def read_bundle_manifest(run: Run) -> dict[str, Any]:
    """Return the content of the bundle's manifest.json; empty before there is a bundle."""
    file = run.path / "export" / "bundle" / "manifest.json"
    if not file.is_file():
        return {}
    manifest: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return manifest


def serving_commands(run: Run) -> list[str]:
    """Return what to type to use the exported model; empty before there is a bundle."""
    bundle = read_bundle_manifest(run)
    if not bundle:
        return []
    folder = shlex.quote(str(run.path))
    config = json.loads((run.path / "export" / "bundle" / "config.json").read_text("utf-8"))
    try:
        example = find_decision(config, bundle.get("kind")).example
    except UnknownName:  # of a plugin that is not installed here
        example = ExampleCall()
    texts = [json.dumps(text) for text in example.texts(paired=len(bundle.get("text") or ()) == 2)]
    return [
        f"spdtool predict {folder} {' --pair '.join(texts)}",
        f"spdtool serve {folder} --port 8000",
        "# or in Python",
        "import spdtool",
        f"{example.name} = spdtool.load({json.dumps(str(run.path))})",
        f"{example.name}({', '.join(texts)})",
    ]
