"""What Python calls: `compress` a model in one run folder, and `export_model` for any checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spdtool import console, ranks
from spdtool.errors import GateError
from spdtool.recipe import STAGES
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import request_recipe
from spdtool.run.folder import Run, default_path
from spdtool.run.forecast import Forecast, StageCost
from spdtool.run.records import ExportedModel, FinalScores, Plan, Scores
from spdtool.stages.run_stages import run_missing

BUNDLE = "export/bundle"
# Value of `goal.table` in a plan, in place of a digest: no run has measured the table that its shape was chosen by.
GUESS = "guess"


@dataclass(frozen=True)
class CompressionResult:
    """Result of `compress`.

    Attributes:
        run: the run folder.
        finished: whether every stage that was asked for is done.
        teacher, student: dev scores of the dense and of the sparse model, as far as they are trained.
        test: both on test rows, where there are any.
        sparsity: fraction of zeros in the student's prunable matrices.
        bundle: folder to load or serve, where one was exported.
        files: exported files, relative to `run`.
        refused: target to the reason why its files were not shipped.
        refusal: error of this call's export stage, if a target that the recipe demands was refused,
            or of its bench, if the goal was missed.
    """

    run: Path
    finished: bool
    teacher: Scores | None = None
    student: Scores | None = None
    sparsity: float | None = None
    bundle: Path | None = None
    files: tuple[Path, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    refusal: GateError | None = None
    test: FinalScores | None = None


@dataclass(frozen=True)
class ExportedCheckpoint:
    """Result of `export_model`: the written folder, the target's name, and the figures of the checks."""

    folder: Path
    target: str
    model: ExportedModel


def compress(
    task: str | None = None,
    *,
    sparsity: float | None = None,
    speedup: float | None = None,
    max_mb: float | None = None,
    max_drop: float | None = None,
    kind: str | None = None,
    model: str | Path | None = None,
    teacher: str | Path | None = None,
    data: str | Path | None = None,
    text: Iterable[str] = (),
    label: str | None = None,
    test_share: float | None = None,
    unlabeled: str | Path | None = None,
    recipe: str | Recipe | None = None,
    seed: int | None = None,
    device: str | None = None,
    metric: str | None = None,
    run: str | Path | None = None,
    sets: Iterable[str] = (),
    smoke: bool = False,
    until: str = STAGES[-1],
    on_plan: Callable[[Plan], None] | None = None,
) -> CompressionResult:
    """Run every stage that is missing: fine-tune a teacher, prune and distil a student, export and time both.

    A run that was stopped goes on where it was; stages that are done are skipped.
    `compress(run=FOLDER)` goes on with the recipe that the run has recorded.

    Args:
        task: name of a task, such as `mrpc`; None: the rows of `data`, or those of `run`.
        sparsity: share of zeros among the weights of the encoder's matrices, in [0, 1); None: that
            of the recipe.
        speedup: goal in place of a sparsity: so many times faster than the dense teacher.
        max_mb: goal: a file of at most so many MB of 1,000,000 bytes.
        max_drop: goal: at most so many points of dev score lost (1.0: from 0.90 to 0.89).
        kind: student that a goal is reached with: `small`, `sparse`, `blocks` or `auto`.
        model: encoder to fine-tune, a folder or a hub name; None: that of the recipe.
        teacher: fine-tuned model to use as it is, a folder or a hub name.
        data: csv, tsv, jsonl or parquet file, or a folder of them, to read in place of the hub.
        text: text columns of `data`, one or two; empty: guessed.
        label: label column of `data`; None: guessed.
        test_share: share of the training rows that is set aside and scored once, at the end.
        unlabeled: file of texts without labels, which the teacher labels for the student.
        recipe: name, TOML file, or a recipe that is used as it is; None: `default`, or that of `run`.
        seed: of everything that is random.
        device: `auto`, `cpu`, or `cuda`, which refuses to fall back.
        metric: metric of the task that picks the best checkpoint; None: the mean of its metrics.
        run: run folder; None: `runs/<task>-<sparsity>`.
        sets: assignments to any field of the recipe, such as `prune.epochs=3`.
        smoke: take a few steps with a random model of two layers; what comes out is no result.
        until: last stage to run.
        on_plan: called with the plan before anything is spent.

    Returns:
        The run folder and the scores of both models, as far as the stages have come.

    Raises:
        SpdError: see `spdtool.errors`; what can be refused early is refused before the first stage.
    """
    if not isinstance(recipe, Recipe):
        recipe = request_recipe(
            task,
            recipe=recipe,
            sparsity=sparsity,
            goal={"speedup": speedup, "max_mb": max_mb, "max_drop": max_drop, "kind": kind},
            model=model,
            teacher=teacher,
            data=data,
            text=text,
            label=label,
            test_share=test_share,
            unlabeled=unlabeled,
            seed=seed,
            device=device,
            metric=metric,
            sets=sets,
            smoke=smoke,
            recorded=recorded_recipe(run),
        )
    path = Path(run) if run is not None else default_path(recipe)
    if recipe.goal.searches and until != STAGES[0]:
        from spdtool.stages.search import compress_fastest

        def compress_one(candidate: Recipe, folder: Path, last_stage: str) -> CompressionResult:
            # One plan is enough: the students differ only in their sizes.
            return _compress_one(candidate, folder, last_stage, on_plan if folder == path else None)

        return compress_fastest(recipe, path, until, compress_one)
    return _compress_one(recipe, path, until, on_plan)


def _compress_one(recipe: Recipe, path: Path, until: str, on_plan: Callable[[Plan], None] | None) -> CompressionResult:
    """Run the stages up to `until` that are missing in one folder; arguments and errors are those of `compress`."""
    recipe = adopt_choice(recipe, path)
    wanted = STAGES[: STAGES.index(until) + 1]
    forecast = Forecast()
    # A launcher has planned, and checked, for its ranks.
    if not ranks.has_launcher():
        from spdtool.data.local import check_header

        check_header(recipe)  # before torch is imported
        if recipe.goal.is_set:
            from spdtool.goals.settle import settle_sparsity

            recipe = settle_sparsity(recipe, path)
        plan = plan_run(recipe, path)
        if "export" in wanted:
            from spdtool.export import onnx_session

            onnx_session.require_onnxruntime()  # fail before hours are spent, not after
        forecast = forecast_of(plan, wanted)
        if on_plan is not None:
            on_plan(plan)
    # Opened anew: ranks that a launcher has started may have made stages meanwhile.
    opened = Run.for_recipe(path, recipe)
    with console.forecast_run(forecast):
        refusal = run_missing(opened, wanted)
    return _describe_result(opened, wanted, refusal)


def adopt_choice(recipe: Recipe, path: Path) -> Recipe:
    """Return the recipe with the shape that the run at `path` has chosen for the same goal, if it has."""
    if not recipe.goal.is_set:
        return recipe
    from spdtool.goals.settle import adopt_recorded

    return adopt_recorded(recipe, recorded_recipe(path))


def plan_run(recipe: Recipe, path: Path, redo: str | None = None, *, measure: bool = True) -> Plan:
    """Plan the run at `path`; raises as `stages.plan.make_plan`, and where its goal cannot be reached.

    Args:
        redo: this stage and every later one are about to be discarded.
        measure: time the layers of the encoder now, where a goal needs it; without, the shape is a guess.
    """
    from spdtool.stages.plan import make_plan

    lines: list[str] = []
    if recipe.goal.is_set:
        from spdtool.goals.settle import foresee_recipe

        recipe, lines = foresee_recipe(recipe, path, GUESS, measure=measure)
    plan = make_plan(Run.for_recipe(path, recipe, redo=redo, dry=True), redo)
    plan.goal = lines
    if recipe.goal.table == GUESS:  # the user has set neither field
        plan.changes = [change for change in plan.changes if change[0] not in ("prune.shape", "goal.table")]
    return plan


def recorded_recipe(run: str | Path | None) -> Recipe | None:
    """Return the recipe of a run that exists, else None; raises RunError where its run.json cannot be read."""
    if run is None or not (Path(run) / "run.json").is_file():
        return None
    return Run.open(run).recipe


def forecast_of(plan: Plan, wanted: Iterable[str]) -> Forecast:
    """Return the forecast of the stages of `wanted` that are not done."""
    costs = {}
    for stage in plan.stages:
        estimate = stage.estimate
        if stage.stage in wanted and estimate is not None:
            costs[stage.stage] = StageCost(
                estimate.steps, estimate.step_seconds, tuple(estimate.events), estimate.other_seconds
            )
    return Forecast(costs)


def export_model(
    checkpoint: str | Path,
    target: str | None = None,
    to: str | Path | None = None,
    *,
    task: str | None = None,
    data: str | Path | None = None,
    text: Iterable[str] = (),
    label: str | None = None,
    device: str | None = None,
    sets: Iterable[str] = (),
) -> ExportedCheckpoint:
    """Export any fine-tuned classifier for a runtime, and check the files against the checkpoint.

    Args:
        checkpoint: folder of a Hugging Face checkpoint, whoever pruned it.
        target: export target; None: the first of the recipe, `onnx`.
        to: folder to write; None: `./<checkpoint's name>-<target>`.
        task: name of the task on whose dev rows the score is compared too; without it and `data`,
            logits on random tokens are compared.
        data: file or folder to read the task's rows from, in place of the hub.
        text: text columns of `data`, one or two; empty: guessed.
        label: label column of `data`; None: guessed.
        device: `auto`, `cpu` or `cuda`, on which the checkpoint is computed.
        sets: assignments to fields of the recipe, such as `export.values=fp32`.

    Returns:
        The written folder, the name of the target and the figures of the checks.

    Raises:
        SpdError: the checkpoint cannot be read, or the exported file is not the checkpoint; nothing
            is left of it.
    """
    from spdtool.data.kinds.embedding import is_sentence_encoder
    from spdtool.export import onnx_session
    from spdtool.stages.export import export_checkpoint

    onnx_session.require_onnxruntime()
    with_task = task is not None or data is not None
    if not with_task:
        task = "demo"  # only its recipe is used
    # Rows of a sentence encoder have no label: the checkpoint tells what they are.
    teacher = checkpoint if is_sentence_encoder(checkpoint) else None
    recipe = request_recipe(task, data=data, text=text, label=label, teacher=teacher, device=device, sets=sets)
    name = target or recipe.export.targets[0]
    source = Path(checkpoint)
    folder = Path(to) if to is not None else Path(f"{source.resolve().name}-{name}")
    return ExportedCheckpoint(folder, name, export_checkpoint(source, name, folder, recipe, with_task=with_task))


def _describe_result(run: Run, wanted: Iterable[str], refusal: GateError | None) -> CompressionResult:
    """Read the result of `compress` from the records of the run, as far as its stages have come."""
    finished = all(run.done(stage) for stage in wanted)
    teacher = run.training_result("teacher").dev if run.done("teacher") else None
    student, sparsity = None, None
    if run.done("finetune"):
        final = run.training_result("finetune")
        student, sparsity = final.dev, final.sparsity
    if not run.done("export"):
        return CompressionResult(run.path, finished, teacher, student, sparsity)
    exported, bundle = run.export_result(), run.path / BUNDLE
    return CompressionResult(
        run=run.path,
        finished=finished,
        teacher=teacher,
        student=student,
        sparsity=sparsity,
        bundle=bundle if bundle.is_dir() else None,
        files=tuple(Path("export") / file.path for file in run.record("export").files),
        refused=exported.refused,
        refusal=refusal,
        test=exported.quality.final,
    )
