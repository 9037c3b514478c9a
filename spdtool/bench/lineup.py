"""The rows of a bench: the exported files of both roles, and the dense teacher in what people really run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from spdtool import console
from spdtool.bench import openvino_int8
from spdtool.bench.dense_int8 import quantize_dynamic_int8
from spdtool.bench.engines import Engine
from spdtool.bench.ratios import ModelFile
from spdtool.bench.runtimes import ONNXRUNTIME, TIMED_RUNTIMES, require_runtime, run_in
from spdtool.bench.shape_graphs import DEVIATION
from spdtool.errors import ModelError, RecipeError, SpdError
from spdtool.export.target import MODEL_FILE, Target, get_target, optional_targets
from spdtool.recipe.fields import Recipe
from spdtool.run.records import ExportedModel, ExportResult

OPENVINO_INT8 = "openvino int8"
DYNAMIC_INT8 = "int8"  # engine of the teacher, unless the target below was exported: its score was measured
INT8_TARGET = "onnx-int8"
FLOAT32 = "fp32"
SHAPE = "shape"  # in the name of an engine: the student's shape, with no zeros inside, in the form of a sparse one
DENSE = "dense"  # in the name of an engine: the teacher in the form of a sparse one


@dataclass
class Lineup:
    """The engines to time, and what is known of them.

    Attributes:
        files: by name of the engine.
        dense_forms, shape_forms: see `BenchData`.
        sparse: engines of targets that export the student only: sparse forms.
        pairs: engine of the student to engine of the teacher, of targets that export both.
        timing_operators: of sparse forms whose single products can be timed.
        dense: engines of the dense teacher whose dev score is its checkpoint's or passes the budget
            of an export.
        students: on a GPU, engines of the student in the form of a dense row.
        notes: what has to be said beside the figures.
    """

    engines: list[Engine] = field(default_factory=list)
    files: dict[str, ModelFile] = field(default_factory=dict)
    sparse: list[str] = field(default_factory=list)
    pairs: dict[str, str] = field(default_factory=dict)
    dense_forms: dict[str, list[str]] = field(default_factory=dict)
    shape_forms: dict[str, str] = field(default_factory=dict)
    timing_operators: dict[str, tuple[str, str]] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    students: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_export(self, name: str, folder: Path, model: ExportedModel, target: Target, provider: str) -> None:
        """Add the files that a target exported to `folder` as an engine."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        is_onnx = target.opened_by == "onnxruntime"
        engine = Engine(
            name=name,
            kind=target.opened_by,
            path=str(folder / model.files[0] if is_onnx else folder),
            vocabulary=config["vocab_size"],
            pad=config.get("pad_token_id") or 0,
            provider=provider,
            libraries=tuple(map(str, target.libraries(folder))) if is_onnx else (),
            target=target.name,
        )
        self.engines.append(engine)
        self.files[name] = ModelFile.of_export(model)

    def engine(self, name: str) -> Engine:
        """The engine of that name."""
        return next(engine for engine in self.engines if engine.name == name)


def line_up_exports(folder: Path, exported: ExportResult, provider: str, recipe: Recipe) -> Lineup:
    """Collect the plain files of both roles, and the files of each further target that runs on `provider`."""
    lineup = Lineup()
    first = get_target(exported.first)
    lineup.add_export("teacher", folder / "teacher", exported.teacher, first, provider)
    lineup.engines[0] = replace(lineup.engines[0], baseline=True)  # the 1x
    lineup.add_export("student", folder / "student", exported.student, first, provider)
    for name, refusal in exported.refused.items():
        lineup.notes.append(f"Not shipped, so not timed: {name}: {refusal}.")
    for name, files in exported.further().items():
        try:
            target = get_target(name)
        except RecipeError as error:  # its plugin is not installed any more
            lineup.notes.append(f"Not timed: {name}: {error.message}.")
            continue
        reason = reason_not_to_time(target, provider, recipe, both_roles=files.teacher is not None)
        if reason is not None:
            lineup.notes.append(f"Not timed: {name}: {reason}.")
            if name == INT8_TARGET and files.teacher is not None:  # its bytes are compared all the same
                lineup.files[f"{name} teacher"] = ModelFile.of_export(files.teacher)
            continue
        for role, model in files.models().items():
            engine_name = name if role == "student" else f"{name} {role}"
            lineup.add_export(engine_name, folder / name / role, model, target, provider)
        if files.teacher is None:
            lineup.sparse.append(name)
            if target.timing_operator is not None:
                lineup.timing_operators[name] = target.timing_operator
        else:
            lineup.pairs[name] = f"{name} teacher"
    lineup.notes += not_exported_notes(exported, recipe)
    return lineup


def add_dense_forms(
    lineup: Lineup, name: str, model: ExportedModel, checkpoint: Path, scratch: Path, recipe: Recipe
) -> None:
    """Export the dense teacher in the form of a sparse engine, and add it as engines behind that one.

    Its weights are stored as the student's are; where that rounds them, also once more in float32.

    Args:
        model: the student in that form.
        checkpoint: the teacher's.
    """
    target = get_target(name)
    if not target.times_dense:
        return
    stored = (model.values or FLOAT32, model.embeddings or FLOAT32)
    forms = {f"{name} {DENSE}": stored}
    if stored != (FLOAT32, FLOAT32):
        forms[f"{name} {DENSE} {FLOAT32}"] = (FLOAT32, FLOAT32)
    lineup.dense_forms[name] = []
    for engine_name, (values, embeddings) in forms.items():
        folder = scratch / engine_name
        try:
            with console.busy(f"exporting the dense teacher for the row {engine_name}"):
                files = target.export(checkpoint, folder, store_as(recipe, values, embeddings))
        except SpdError as error:
            lineup.notes.append(f"Not timed: {engine_name}: {error.message}.")
            continue
        size = sum(file.stat().st_size for file in files)
        teacher = lineup.files["teacher"]
        insert_form(lineup, name, engine_name, folder, 1 + len(lineup.dense_forms[name]))
        lineup.files[engine_name] = ModelFile(size, size=teacher.size, sparsity=teacher.sparsity)
        lineup.dense_forms[name].append(engine_name)


def add_shape_form(
    lineup: Lineup, name: str, model: ExportedModel, checkpoint: Path, scratch: Path, recipe: Recipe
) -> None:
    """Export a smaller student without the zeros inside its shape in the form of a sparse engine, and add it.

    Args:
        model: the student in that form.
        checkpoint: the student's.
    """
    target = get_target(name)
    if not target.times_dense:
        return
    engine_name = f"{name} {SHAPE}"
    folder = scratch / engine_name
    filled = scratch / f"{engine_name} checkpoint"
    stored = store_as(recipe, model.values or FLOAT32, model.embeddings or FLOAT32)
    try:
        with console.busy(f"exporting the student's shape without zeros for the row {engine_name}"):
            fill_zeros_inside(checkpoint, filled)
            files = target.export(filled, folder, stored)
    except SpdError as error:
        lineup.notes.append(f"Not timed: {engine_name}: {error.message}.")
        return
    insert_form(lineup, name, engine_name, folder, 1)
    lineup.files[engine_name] = ModelFile(sum(file.stat().st_size for file in files))
    lineup.shape_forms[name] = engine_name


def store_as(recipe: Recipe, values: str, embeddings: str) -> Recipe:
    """Return the recipe with these forms of stored numbers, see `StorageFormats`."""
    export = recipe.export.model_copy(update={"values": values, "embeddings": embeddings})
    return recipe.model_copy(update={"export": export})


def insert_form(lineup: Lineup, name: str, engine_name: str, folder: Path, places: int) -> None:
    """Add the model in a folder as an engine, `places` behind the sparse one: the table reads as a comparison."""
    sparse = lineup.engine(name)
    path = folder / MODEL_FILE if sparse.kind == "onnxruntime" else folder
    # Optional: some forms cannot hold such weights, which is no fault of the student's.
    engine = replace(sparse, name=engine_name, path=str(path), optional=True)
    lineup.engines.insert(lineup.engines.index(sparse) + places, engine)


def fill_zeros_inside(checkpoint: Path, folder: Path) -> None:
    """Save a smaller student with random weights in place of the zeros inside its heads and neurons."""
    import torch

    from spdtool.models.layers import find_prunable_weights
    from spdtool.models.load import load_model, load_tokenizer, save_model
    from spdtool.models.structures import find_structures
    from spdtool.pruning.structured import StructuredMasks

    model = load_model(checkpoint)
    weights = find_prunable_weights(model)
    removed = StructuredMasks.from_structures(weights, find_structures(model)).dead
    with torch.no_grad():
        for name, weight in weights.items():
            is_zero_inside = (weight == 0) & ~removed[name]
            weight.copy_(torch.where(is_zero_inside, DEVIATION * torch.randn_like(weight), weight))
    save_model(model, load_tokenizer(checkpoint), folder)


def add_openvino_int8(lineup: Lineup, checkpoint: Path, scratch: Path, recipe: Recipe) -> None:
    """Add the teacher in OpenVINO's static int8; it is a dense rival only if its dev score passes."""
    plain, file = lineup.engines[0], scratch / "openvino_int8.xml"
    try:
        with console.busy("quantizing the teacher with OpenVINO, to compare with"):
            quantized, passes = openvino_int8.quantize_static_int8(Path(plain.path), checkpoint, file, recipe)
    except SpdError as error:
        lineup.notes.append(f"Not timed: {OPENVINO_INT8}: {error.message}.")
        return
    engine = replace(
        plain, name=OPENVINO_INT8, kind="openvino", path=str(file), precision="bf16", baseline=False, optional=True
    )
    lineup.engines.append(engine)
    lineup.files[OPENVINO_INT8] = quantized
    # A rival that lost its score would make any student look slow.
    if passes:
        lineup.dense.append(OPENVINO_INT8)
    else:
        lineup.notes.append(
            f"{OPENVINO_INT8} is no rival: its dev score is {quantized.score or 0:.4f}, that of its checkpoint "
            f"{quantized.checkpoint_score or 0:.4f}."
        )


def add_goal_runtime(lineup: Lineup, runtime: str) -> None:
    """Add both plain files in the runtime that a speed-up is promised in, where it can be timed here."""
    if runtime == ONNXRUNTIME or runtime not in TIMED_RUNTIMES:
        return
    if lineup.engine("student").kind != ONNXRUNTIME:
        lineup.notes.append(f"Not timed in {runtime}: the student is no ONNX file.")
        return
    try:
        require_runtime(runtime)
    except SpdError as error:
        lineup.notes.append(f"Not timed in {runtime}: {error.message}.")
        return
    for role in ("teacher", "student"):
        name = goal_engine(runtime, role)
        # A runtime of the goal's that fails must not cost the figures of all others.
        engine = replace(run_in(lineup.engine(role), runtime), name=name, baseline=False, optional=True)
        lineup.engines.append(engine)
        lineup.files[name] = lineup.files[role]
    lineup.pairs[goal_engine(runtime, "student")] = goal_engine(runtime, "teacher")


def goal_engine(runtime: str, role: str) -> str:
    """Name the engine that runs the plain file of a role in the runtime of the goal."""
    return runtime if role == "student" else f"{runtime} {role}"


def reason_not_to_time(target: Target, provider: str, recipe: Recipe, *, both_roles: bool) -> str | None:
    """Why a target's files are not timed here, or None."""
    runs_here = provider in target.providers
    if not both_roles:
        return None if runs_here else f"it does not run on {provider}; compare it with --set device=cpu"
    if not recipe.bench.variants:
        return "bench.variants is off"
    if provider == "cpu" and target.storage_formats(recipe).matrices == "fp16":
        return "a CPU computes it in float32, with conversions between; it is for a GPU, and onnxruntime has none here"
    return None if runs_here else f"it does not run on {provider}"


def not_exported_notes(exported: ExportResult, recipe: Recipe) -> list[str]:
    """Name the optional targets that the export stage left out, with the reason where it is known."""
    available, errors = optional_targets(recipe)
    notes = []
    for name in [*errors, *(choice.name for choice in available)]:
        if name in exported.targets or name in exported.refused:
            continue
        note, error = f"Not exported, so not timed: {name}", errors.get(name)
        if error is not None:
            note += f": {error.message}"
            if error.hint:
                note += f"; {error.hint}"
        notes.append(f"{note}.")
    return notes


def add_teacher_engines(lineup: Lineup, checkpoint: Path, scratch: Path, recipe: Recipe) -> None:
    """Add the teacher's further rows on a CPU that the recipe wants."""
    section, plain = recipe.bench, lineup.engines[0]
    # what was exported has passed the gate on its score; int8 that is made here has none
    lineup.dense += ["teacher", *lineup.pairs.values()]
    plain_on_cpu = plain.kind == "onnxruntime"
    if section.unfused and plain_on_cpu:
        lineup.dense.append("unfused")
        lineup.engines.append(replace(plain, name="unfused", fused=False))
        lineup.notes.append("1x is the dense teacher, fused or unfused, whichever is the faster at that shape.")
    if section.int8 and plain_on_cpu and INT8_TARGET not in lineup.pairs:
        file = scratch / "int8.onnx"
        try:
            with console.busy("quantising the teacher to int8, to compare with"):
                quantize_dynamic_int8(Path(plain.path), file)
        except ModelError as error:
            lineup.notes.append(f"Not timed: {DYNAMIC_INT8}: {error.message}.")
        else:
            # Optional: a runtime that quantizes a model need not be able to run it.
            engine = replace(plain, name=DYNAMIC_INT8, path=str(file), baseline=False, optional=True)
            lineup.engines.append(engine)
            lineup.files[DYNAMIC_INT8] = ModelFile(file.stat().st_size)
    if section.openvino and plain_on_cpu and openvino_int8.is_installed():
        add_openvino_int8(lineup, checkpoint, scratch, recipe)
    if section.torch:
        # What most people run before they export anything.
        eager = replace(plain, name="torch", kind="torch", path=str(checkpoint), baseline=False)
        lineup.engines.append(eager)
        lineup.dense += ["torch", "compiled"]
        if section.compiled:
            lineup.engines.append(replace(eager, name="compiled", compiled=True, optional=True))
