"""The export stage on a fabricated run: files, measurements, gates."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from transformers import AutoConfig, AutoTokenizer

from spdtool import plugins
from spdtool.errors import (
    DataError,
    DeviceError,
    GateError,
    ModelError,
    PluginError,
    RunError,
    SpdError,
    StageMissing,
    Stopped,
    UnknownName,
)
from spdtool.export import onnx_session
from spdtool.export.finished import FinishedTargets
from spdtool.export.gates.reference import Reference
from spdtool.export.gates.score import DevComparison, compare_predictions
from spdtool.export.graph.weights import StoredWeight
from spdtool.export.target import ChosenTarget, Target
from spdtool.export.targets import Onnx
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import save_model
from spdtool.models.predict import Forward
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run
from spdtool.run.records import ExportedModel, Quality, TargetExport
from spdtool.stages.bench import bench
from spdtool.stages.export import export, export_checkpoint
from spdtool.tasks.task import Task

Fabricate = Callable[..., Run]


@pytest.fixture
def fabricate(tmp_path: Path, toys: ModuleType, toy_task: Callable[..., Task]) -> Fabricate:
    """Return `fabricate("export.opset=20")`, which makes a run with a dense teacher and a student of 75 % zeros."""

    def make(*sets: str, **options: Any) -> Run:
        toy_task(**{"dev": 20} | options)
        run = Run.for_recipe(tmp_path / "run", toys.recipe("export.sentences=8", *sets))
        names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
        for stage, seed in (("teacher", 1), ("finetune", 2)):
            model = toys.bert(seed=seed, **names)
            if stage == "finetune":
                for weight in find_prunable_weights(model).values():
                    weight.data.view(-1)[np.arange(weight.numel()) % 4 > 0] = 0
            with run.stage(stage) as work:
                save_model(model, toys.tokenizer(), work.folder)
        return run

    return make


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_teacher_and_student_exports_equal_their_checkpoints(
    fabricate: Fabricate, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fabricate("test_share=0.25", pairs=True)
    result = export(run)
    final = result.quality.final
    assert final is not None
    assert (final.rows, final.drawn, final.test.method) == (12, True, "mcnemar")
    for scores, interval in ((final.teacher, final.teacher_score), (final.student, final.student_score)):
        assert set(scores) == {"score", "accuracy"}
        assert interval.low <= interval.value == scores["score"] <= interval.high
    assert final.difference.value == pytest.approx(final.student["score"] - final.teacher["score"])
    assert "- test rows: 12, taken from the training rows" in (run.path / "export/bundle/README.md").read_text("utf-8")
    expected = ["stage.json"]
    for role in ("student", "teacher"):
        for name in ("config.json", "manifest.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"):
            expected.append(f"{role}/{name}")
    assert [name for name in files(run.path / "export") if not name.startswith("bundle/")] == sorted(expected)
    assert run.export_result() == result
    assert set(run.record("export").inputs) == {"teacher", "finetune"}
    student, teacher = result.student, result.teacher
    assert (student.sparsity, teacher.sparsity) == (0.75, 0.0)
    assert student.zeros * 4 == student.size * 3
    for exported in (student, teacher):
        assert exported.dev == exported.checkpoint_dev
        assert set(exported.dev) == {"score", "accuracy"}
        assert (exported.flipped, exported.rows) == (0, 20)
        assert 0 < exported.largest_difference < 1e-4
        assert exported.largest_difference_at
        assert (exported.providers, exported.files, exported.positions) == (["cpu"], ["onnx/model.onnx"], 64)
    assert student.bytes == (run.path / "export/student/onnx/model.onnx").stat().st_size
    config = AutoConfig.from_pretrained(run.path / "export/student")
    assert config.id2label == {0: "good", 1: "bad"}
    assert AutoTokenizer.from_pretrained(run.path / "export/student")("good", "film")["token_type_ids"][-1] == 1
    out = capsys.readouterr().out
    assert "student: " in out
    assert "75.00% zeros as in its checkpoint" in out


def test_it_needs_its_predecessors(toy_run: Callable[..., Run]) -> None:
    with pytest.raises(StageMissing, match="no finished stage 'teacher'"):
        export(toy_run())


def nothing_half_written(run: Run) -> bool:
    """Tell whether the run folder contains only the fabricated stages."""
    expected = ["run.json"]
    for stage in ("teacher", "finetune"):
        for name in ("config.json", "model.safetensors", "stage.json", "tokenizer.json", "tokenizer_config.json"):
            expected.append(f"{stage}/{name}")
    return files(run.path) == sorted(expected)


@pytest.mark.parametrize(
    ("sets", "options", "device", "error"),
    [
        (['export.targets=["onnxx"]'], {}, "cpu", UnknownName),
        ([], {"dev": 0}, "cpu", DataError),
        ([], {}, "cuda", DeviceError),
    ],
    ids=["unknown target", "no dev rows", "no GPU"],
)
def test_bad_input_leaves_nothing_half_written(
    sets: list[str], options: dict[str, int], device: str, error: type[Exception], fabricate: Fabricate
) -> None:
    run = fabricate(*sets, **options)
    run.recipe = run.recipe.model_copy(update={"device": device})
    with pytest.raises(error):
        export(run)
    assert nothing_half_written(run)


def test_two_runtimes_side_by_side_leave_nothing_half_written(
    fabricate: Fabricate, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fabricate()
    monkeypatch.setattr(onnx_session, "installed_distributions", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    run.recipe = run.recipe.model_copy(update={"device": "cuda"})
    with pytest.raises(DeviceError):
        export(run)
    assert nothing_half_written(run)


def fill_zeros(array: np.ndarray) -> None:
    array[array == 0] = 1e-30


def scale(array: np.ndarray) -> None:
    array *= 1.1


def faulty_target(change: Callable[[np.ndarray], None]) -> type[Onnx]:
    """Make a target that applies `change` to one matrix of the file it has written."""

    class Faulty(Onnx):
        def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
            files = super().export(checkpoint, folder, recipe)
            proto = onnx.load(files[0])
            tensor = next(t for t in proto.graph.initializer if t.name.endswith("layer.0.intermediate.dense.weight.T"))
            array = numpy_helper.to_array(tensor).copy()
            change(array)
            tensor.raw_data = array.tobytes()
            onnx.save(proto, files[0])
            return files

    return Faulty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fill_zeros, "layer.0.intermediate.dense.weight: .* holds other numbers in place of 1536 zeros"),
        (scale, "layer.0.intermediate.dense.weight: 512 of 2048 weights .* further from the checkpoint's"),
    ],
    ids=["lost zeros", "perturbed matrix"],
)
def test_a_file_that_differs_from_its_checkpoint_is_refused(
    change: Callable[[np.ndarray], None], message: str, fabricate: Fabricate, clean_plugins: None
) -> None:
    run = fabricate('export.targets=["faulty"]')
    plugins.targets.register("faulty")(faulty_target(change))
    # The teacher is exported first: give it the zeros, so that its export shows the fault.
    teacher, student, spare = run.path / "teacher", run.path / "finetune", run.path / "aside"
    teacher.rename(spare)
    student.rename(teacher)
    spare.rename(student)
    with pytest.raises(GateError, match=message) as error:
        export(run)
    assert error.value.exit_code == 3
    assert nothing_half_written(run)


def test_a_changed_dev_score_is_refused(fabricate: Fabricate, clean_plugins: None) -> None:
    """The dev score is the last gate; here the tolerance lets all logits pass."""

    class Contrary(Onnx):
        opened_by = "session"

        def session(self, folder: Path, provider: str = "cpu", threads: int = 0) -> Forward:
            forward = super().session(folder, provider, threads)
            return lambda batch: -forward(batch)

    plugins.targets.register("contrary")(Contrary)
    run = fabricate('export.targets=["contrary"]', "export.tolerance=1000")
    with pytest.raises(GateError, match=r"the exported file has .* on the dev set; its checkpoint has") as error:
        export(run)
    assert error.value.hint == "export.budget is 0.001"
    assert nothing_half_written(run)


def test_a_second_target_is_written_into_a_folder_of_its_name(fabricate: Fabricate, clean_plugins: None) -> None:
    plugins.targets.register("other")(type("Other", (Onnx,), {}))
    run = fabricate('export.targets=["onnx", "other"]')
    result = export(run)
    assert result.targets["other"].student.bytes == result.student.bytes
    assert (run.path / "export/other/student/onnx/model.onnx").is_file()
    assert (run.path / "export/teacher/onnx/model.onnx").is_file()


DOCUMENTED_PLUGIN = re.compile(r"^```python\n# my-plugins/(\w+)\.py\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def guide_targets(fabricate: Fabricate, tmp_path: Path, clean_plugins: None) -> Run:
    """A run that exports the targets of the guide too."""
    guide = Path(__file__).parents[2] / "docs/how-to/write-a-target.md"
    sources = dict(DOCUMENTED_PLUGIN.findall(guide.read_text("utf-8")))
    del sources["annotated"]  # the plain target with one more line of metadata
    assert sources.keys() == {"zipped", "rounded"}
    folder = tmp_path / "my-plugins"
    folder.mkdir()
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, "utf-8")
    plugins.use_folder(folder)
    return fabricate(
        'export.optional=["zipped", "rounded"]',
        *("bench.torch=false", "bench.int8=false", "bench.unfused=false", "bench.ledger=false", "bench.padded=[]"),
        *("bench.batches=[1]", "bench.lengths=[8]", "bench.rounds=1", "bench.warmup=0", "bench.threads=1"),
    )


@pytest.mark.slow  # it exports three targets
def test_the_targets_of_the_guide_pass_the_gates(guide_targets: Run, capsys: pytest.CaptureFixture[str]) -> None:
    result = export(guide_targets)
    assert result.refused == {}
    assert set(result.targets) == {"onnx", "zipped", "rounded"}
    zipped, rounded = result.targets["zipped"].student, result.targets["rounded"].student
    assert zipped.files == ["model.gz"]
    assert zipped.dev == zipped.checkpoint_dev
    assert zipped.bytes < result.student.bytes
    assert (zipped.rounds, rounded.values, rounded.embeddings) == (False, "fp16", "fp16")
    manifest = json.loads((guide_targets.path / "export/bundle/manifest.json").read_text("utf-8"))
    assert set(manifest["variants"]) == {"onnx", "rounded"}
    assert "the bundle goes without zipped: spdtool.load does not open it" in capsys.readouterr().out


@pytest.mark.long  # it exports three targets, and times them
def test_the_targets_of_the_guide_are_timed(guide_targets: Run) -> None:
    export(guide_targets)
    metrics = bench(guide_targets)
    assert [row[0] for row in metrics.rows] == ["teacher", "student", "zipped teacher", "zipped"]
    assert {record.provider for record in metrics.latency if "zipped" in record.engine} == {"zipped cpu"}
    assert any("rounded: a CPU computes it in float32" in line for line in metrics.verdict)


def lacking_target(error: type[SpdError]) -> type[Onnx]:
    """Make a target that raises `error` when it exports."""

    class Lacking(Onnx):
        def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
            super().export(checkpoint, folder, recipe)
            raise error("the compiled library is missing", "build it")

    return Lacking


class TestOptional:
    """`export.optional`: a target that cannot work here gives a warning, not an error."""

    def test_it_lies_under_its_name_with_the_roles_that_it_has(
        self, fabricate: Fabricate, rounded: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = fabricate('export.optional=["rounded"]', "export.budget=1")
        result = export(run)
        assert set(result.targets) == {"onnx", "rounded"}
        assert result.targets["rounded"].teacher is None
        entries = {name.split("/")[0] for name in files(run.path / "export")}
        assert entries == {"teacher", "student", "rounded", "bundle", "stage.json"}
        assert {name.split("/")[0] for name in files(run.path / "export/rounded")} == {"student"}
        assert "student (rounded): " in capsys.readouterr().out
        assert run.export_result() == result

    def test_one_that_is_not_installed_is_named_once_and_the_others_are_exported(
        self, fabricate: Fabricate, clean_plugins: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert set(export(fabricate('export.optional=["absent"]')).targets) == {"onnx"}
        warnings = capsys.readouterr().err
        assert warnings.count("the export to absent is left out: there is no export target 'absent'") == 1

    def test_one_that_cannot_work_here_is_named_once_and_leaves_nothing(
        self, fabricate: Fabricate, clean_plugins: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        errors = (DeviceError, PluginError, ModelError)
        for error in errors:
            plugins.targets.register(error.__name__.lower())(lacking_target(error))
        names = ", ".join(f'"{error.__name__.lower()}"' for error in errors)
        run = fabricate(f"export.optional=[{names}]")
        assert set(export(run).targets) == {"onnx"}
        warnings = capsys.readouterr().err
        for error in errors:
            name = error.__name__.lower()
            assert warnings.count(f"{name} is left out: the compiled library is missing (build it)") == 1
            assert not [file for file in files(run.path / "export") if name in file]

    def test_a_required_one_that_cannot_work_is_an_error(self, fabricate: Fabricate, clean_plugins: None) -> None:
        plugins.targets.register("lacking")(lacking_target(DeviceError))
        run = fabricate('export.targets=["onnx", "lacking"]', 'export.optional=["lacking"]')
        with pytest.raises(DeviceError, match="the compiled library is missing"):
            export(run)
        assert not run.done("export")
        partial = run.partial_folder("export")
        assert sorted(path.name for path in partial.iterdir()) == ["state", "student", "teacher"]
        assert files(partial / "state") == ["onnx.json"]

    @pytest.mark.parametrize("required", [True, False], ids=["required", "optional"])
    def test_a_wrong_result_of_one_is_never_shipped_and_an_error_where_it_was_required(
        self, required: bool, fabricate: Fabricate, clean_plugins: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plugins.targets.register("faulty")(faulty_target(lambda array: array.fill(1.0)))
        plugins.targets.register("sound")(type("Sound", (Onnx,), {}))
        sets = ['export.optional=["faulty", "sound"]']
        if required:
            run = fabricate(*sets, 'export.targets=["onnx", "faulty"]')
            with pytest.raises(
                GateError, match="not shipped: faulty: .* weights in the exported file are further"
            ) as error:
                export(run)
            assert error.value.exit_code == 3
        else:
            run = fabricate(*sets)
            export(run)
        warnings = capsys.readouterr().err
        assert "weights in the exported file are further from the checkpoint's than fp32 rounds" in warnings
        assert ("--set 'export.skip=[\"faulty\"]' does without it" in warnings) == (not required)
        assert run.done("export")
        result = run.export_result()
        assert set(result.refused) == {"faulty"}
        assert "faulty" not in result.targets
        assert (run.path / "export/sound/student/onnx/model.onnx").is_file()
        assert not (run.path / "export/faulty").exists()

    def test_one_that_runs_on_another_provider_only(
        self, fabricate: Fabricate, clean_plugins: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plugins.targets.register("gpu-only")(type("Gpu", (Onnx,), {"providers": ("cuda",)}))
        assert set(export(fabricate('export.optional=["gpu-only"]')).targets) == {"onnx"}
        assert "the target runs on cuda; what works here is cpu" in capsys.readouterr().err


class TestStopped:
    """An export that is stopped in the middle: the same command takes over what is finished."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch, clean_plugins: None) -> list[str]:
        """The target and role of each export; the third target is stopped the first time, the second refused."""
        exported: list[str] = []

        def export_one(target: Target, reference: Reference, folder: Path, _providers: list[str]) -> ExportedModel:
            exported.append(f"{target.name} {folder.name}")
            folder.mkdir(parents=True)
            (folder / "model.onnx").write_text(f"{target.name} of {reference.checkpoint.name}", "utf-8")
            if target.name == "refused":
                raise GateError("its logits differ")
            if exported[-1] == "stopped student" and exported.count("stopped student") == 1:
                raise KeyboardInterrupt
            return ExportedModel(files=["model.onnx"], bytes=9, zeros=1, size=3, sparsity=1 / 3, positions=64)

        for name in ("plain", "refused", "stopped"):
            plugins.targets.register(name)(type(name.title(), (Target,), {}))
        monkeypatch.setattr("spdtool.stages.export.export_and_check", export_one)
        monkeypatch.setattr("spdtool.stages.export.prepare_dev_sets", lambda *_: None)
        monkeypatch.setattr("spdtool.stages.export.measure_quality", lambda *_: Quality())
        monkeypatch.setattr("spdtool.stages.export.write_bundle", lambda *_: "it is a stub")
        return exported

    def test_finished_targets_are_taken_over_and_the_result_is_that_of_a_calm_export(
        self, toy_run: Callable[..., Run], calls: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = toy_run('export.targets=["plain"]', 'export.optional=["refused", "stopped"]')
        for name in ("teacher", "finetune"):
            with run.stage(name):
                pass
        with pytest.raises(Stopped, match="2 of 3 targets are finished and saved") as stopped:
            export(run)
        assert stopped.value.exit_code == 130
        first_calls = ["plain teacher", "plain student", "refused teacher", "stopped teacher", "stopped student"]
        assert calls == first_calls
        assert not run.done("export")
        assert sorted(path.name for path in run.partial_folder("export").iterdir()) == ["state", "student", "teacher"]
        capsys.readouterr()

        calls.append("again")
        export(Run.open(run.path))
        assert calls[6:] == ["stopped teacher", "stopped student"]
        output = capsys.readouterr()
        assert "plain: exported and checked before this command was stopped; taken over" in output.out
        assert "refused: refused before this command was stopped; taken over" in output.out
        assert "target 3 of 3: stopped: exporting the student" in output.out
        assert "refused is not shipped: its logits differ" in output.err
        resumed = describe_export(run)
        assert not run.partial_folder("export").exists()

        calls.append("anew")
        assert run.discard("export") == ["export"]
        export(Run.open(run.path))
        assert calls[9:] == first_calls
        assert describe_export(run) == resumed

    def test_a_full_disk_gets_the_space_of_the_unfinished_target_back(
        self, toy_run: Callable[..., Run], calls: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = toy_run('export.targets=["plain", "stopped"]')
        for name in ("teacher", "finetune"):
            with run.stage(name):
                pass
        save = FinishedTargets.save

        def fill_disk(finished: FinishedTargets, choice: ChosenTarget, outcome: TargetExport | str) -> None:
            if choice.name == "stopped":
                raise OSError(errno.ENOSPC, "No space left on device")
            save(finished, choice, outcome)

        calls.append("stopped student")  # this time it is not stopped
        monkeypatch.setattr(FinishedTargets, "save", fill_disk)
        with pytest.raises(RunError, match="the disk is full"):
            export(run)
        partial = run.partial_folder("export")
        assert files(partial) == ["state/plain.json", "student/model.onnx", "teacher/model.onnx"]


def describe_export(run: Run) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return every file of a finished export, and its stage.json but for times."""
    contents = {name: (run.path / "export" / name).read_bytes() for name in files(run.path / "export")}
    record = json.loads(contents.pop("stage.json"))
    return contents, {name: value for name, value in record.items() if name not in ("finished", "seconds")}


class TestRounding:
    """A target that rounds the weights: the gates prove its arithmetic and measure the cost of rounding."""

    def test_the_cost_is_measured_against_the_checkpoint_and_the_arithmetic_is_not(
        self, fabricate: Fabricate, rounded: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = fabricate('export.optional=["rounded"]', "export.budget=1", "export.values=int8")
        exported = export(run).targets["rounded"].student
        assert (exported.values, exported.embeddings) == ("int8", "fp16")
        assert exported.largest_difference < 1e-4 < 1e-3 < exported.largest_change
        assert exported.sparsity == 0.75
        assert set(exported.dev) == set(exported.checkpoint_dev) == {"score", "accuracy"}
        lines = capsys.readouterr().out.splitlines()
        (line,) = [line for line in lines if "weights in int8, embeddings in fp16" in line]
        before, after = exported.checkpoint_dev["score"], exported.dev["score"]
        assert f"dev score {before:.4f} before, {after:.4f} after" in line
        assert f"{exported.flipped} of 20 predictions flipped" in line
        assert f"largest logit change {exported.largest_change:.1e}" in line

    def test_stored_exactly_nothing_changes(self, fabricate: Fabricate, rounded: Any) -> None:
        sets = ("export.values=fp32", "export.embeddings=fp32")
        exported = export(fabricate('export.optional=["rounded"]', *sets)).targets["rounded"].student
        assert exported.largest_change < 1e-4
        assert exported.dev == exported.checkpoint_dev

    def test_a_fault_of_the_arithmetic_is_caught_though_rounding_moves_more(
        self, fabricate: Fabricate, rounded: Any
    ) -> None:
        def session(folder: Path, provider: str = "cpu", threads: int = 0) -> Forward:
            forward = Onnx().session(folder, provider, threads)
            return lambda batch: forward(batch) + 2e-4

        rounded.session = staticmethod(session)
        run = fabricate('export.targets=["onnx", "rounded"]', "export.budget=1", "export.values=int8")
        with pytest.raises(GateError, match=r"not shipped: rounded: checkpoint and exported file differ by 0\.0002"):
            export(run)
        assert run.done("export")
        assert set(run.export_result().targets) == {"onnx"}
        assert not (run.path / "export/rounded").exists()

    def test_weights_that_do_not_fit_the_model_are_a_fault_of_the_export(
        self, fabricate: Fabricate, rounded: Any
    ) -> None:
        rounded.stored_weights = staticmethod(
            lambda folder: iter([StoredWeight("bert.pooler.dense.bias", np.zeros(3, np.float32))])
        )
        with pytest.raises(GateError, match=r"bert.pooler.dense.bias: the exported file holds shape \(3,\)"):
            export(fabricate('export.targets=["onnx", "rounded"]', "export.budget=1"))

    @pytest.mark.parametrize(("values", "budget"), [("fp32", "0.002"), ("fp16", "0.002"), ("int8", "0.005")])
    def test_the_budget_goes_by_the_storage(
        self, values: str, budget: str, fabricate: Fabricate, rounded: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[DevComparison] = []

        def worsen(*arguments: Any) -> DevComparison:
            """Lower the score of the third comparison, the rounded student's; teacher and student come first."""
            comparison = compare_predictions(*arguments)
            calls.append(comparison)
            if len(calls) < 3:
                return comparison
            scores = {name: score - 0.0051 for name, score in comparison.file_scores.items()}
            return replace(comparison, file_scores=scores, worsened=2)

        monkeypatch.setattr("spdtool.export.gates.score.compare_predictions", worsen)
        run = fabricate('export.targets=["onnx", "rounded"]', f"export.values={values}")
        with pytest.raises(GateError, match="of 20 predictions flipped") as error:
            export(run)
        assert f"export.budget is {budget}; export.values={values}" in error.value.message


class TestOfNoRun:
    """`export_checkpoint`: a checkpoint that does not belong to a run."""

    @pytest.fixture
    def checkpoint(self, fabricate: Fabricate, tmp_path: Path) -> Path:
        run = fabricate()
        folder = tmp_path / "checkpoint"
        shutil.copytree(run.path / "finetune", folder)
        (folder / "stage.json").unlink()
        return folder

    def test_without_data_random_tokens_are_compared(
        self, checkpoint: Path, rounded: Any, tmp_path: Path, toys: ModuleType, capsys: pytest.CaptureFixture[str]
    ) -> None:
        exported = export_checkpoint(checkpoint, "rounded", tmp_path / "out", toys.recipe(), with_task=False)
        assert 0 < exported.largest_difference < 1e-4
        assert "shape" in exported.largest_difference_at
        assert exported.dev is None
        assert exported.sparsity == 0.75
        assert (tmp_path / "out/manifest.json").is_file()
        assert "no dev set was given" in capsys.readouterr().out

    def test_with_a_task_its_dev_set_counts_too(
        self, checkpoint: Path, tmp_path: Path, toys: ModuleType, clean_plugins: None
    ) -> None:
        exported = export_checkpoint(checkpoint, "onnx", tmp_path / "out", toys.recipe(), with_task=True)
        assert (exported.rows, exported.flipped) == (20, 0)
        assert exported.dev == exported.checkpoint_dev

    def test_a_fault_leaves_nothing(self, checkpoint: Path, tmp_path: Path, toys: ModuleType, rounded: Any) -> None:
        rounded.stored_weights = staticmethod(lambda folder: iter(()))
        with pytest.raises(GateError, match="the exported file does not store it"):
            export_checkpoint(checkpoint, "rounded", tmp_path / "out", toys.recipe(), with_task=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "run"]

    def test_what_lies_in_the_way_is_not_touched(self, checkpoint: Path, toys: ModuleType, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="is not an empty folder"):
            export_checkpoint(checkpoint, "onnx", checkpoint, toys.recipe(), with_task=False)
        with pytest.raises(ModelError, match="there is no folder"):
            export_checkpoint(tmp_path / "none", "onnx", tmp_path / "out", toys.recipe(), with_task=False)

    def test_a_tokenizer_of_another_model_is_refused(
        self, toys: ModuleType, toy_task: Callable[..., Task], tmp_path: Path
    ) -> None:
        toy_task()
        save_model(toys.bert(vocab_size=9), toys.tokenizer(), tmp_path / "small")
        with pytest.raises(ModelError, match="the model has 9 word embeddings"):
            export_checkpoint(tmp_path / "small", "onnx", tmp_path / "out", toys.recipe(), with_task=True)
        assert not (tmp_path / "out").exists()
