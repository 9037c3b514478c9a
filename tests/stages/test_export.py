"""Export on a fabricated run: what is written, what is measured, what is refused."""

from __future__ import annotations

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
from spdtool.data import tokens as data
from spdtool.errors import (
    DataError,
    DeviceError,
    GateError,
    ModelError,
    PluginError,
    RunError,
    StageMissing,
    UnknownName,
)
from spdtool.export import runtime
from spdtool.export.gates.score import DevComparison, DevSets, compare_predictions, metric_over_budget
from spdtool.export.targets import Onnx
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import save_model
from spdtool.run.folder import Run
from spdtool.stages.export import export, export_checkpoint
from spdtool.tasks import Task

Fabricate = Callable[..., Run]


@pytest.fixture
def fabricate(tmp_path: Path, toys: ModuleType, toy_task: Callable[..., Task]) -> Fabricate:
    """`fabricate("export.opset=20")`: a run of the task `toy` with a dense teacher and a student of 75 % zeros."""

    def make(*sets: str, **how: Any) -> Run:
        toy_task(**{"dev": 20} | how)
        run = Run.at(tmp_path / "run", toys.recipe("export.sentences=8", *sets))
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


def test_both_are_written_measured_and_equal_to_their_checkpoints(
    fabricate: Fabricate, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fabricate(pairs=True)
    metrics = export(run)
    layout = ["config.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"]
    written = [name for name in files(run.path / "export") if not name.startswith("bundle/")]
    assert written == sorted(["stage.json", *(f"{role}/{name}" for role in ("student", "teacher") for name in layout)])
    assert run.export_result() == metrics
    assert set(run.record("export").inputs) == {"teacher", "finetune"}
    student, teacher = metrics.student, metrics.teacher
    assert (student.sparsity, teacher.sparsity) == (0.75, 0.0)
    assert student.zeros * 4 == student.size * 3
    for measured in (student, teacher):
        assert measured.dev == measured.checkpoint_dev
        assert set(measured.dev) == {"score", "accuracy"}
        assert (measured.flipped, measured.rows) == (0, 20)
        assert 0 < measured.largest_difference < 1e-4
        assert measured.largest_difference_at
        assert (measured.providers, measured.files, measured.positions) == (["cpu"], ["onnx/model.onnx"], 64)
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
    return files(run.path) == sorted(
        [".lock", "run.json"]
        + [
            f"{stage}/{name}"
            for stage in ("teacher", "finetune")
            for name in ("config.json", "model.safetensors", "stage.json", "tokenizer.json", "tokenizer_config.json")
        ]
    )


@pytest.mark.parametrize(
    ("name", "error"), [("onnxx", UnknownName), ("data", DataError), ("runtime", DeviceError), ("cuda", DeviceError)]
)
def test_bad_input_leaves_nothing_half_written(
    name: str, error: type[Exception], fabricate: Fabricate, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fabricate(
        *(['export.targets=["onnxx"]'] if name == "onnxx" else []), **({"dev": 0} if name == "data" else {})
    )
    if name == "runtime":
        monkeypatch.setattr(runtime, "installed_distributions", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    if name in ("runtime", "cuda"):
        run.recipe = run.recipe.model_copy(update={"device": "cuda"})
    with pytest.raises(error):
        export(run)
    assert nothing_half_written(run)


class Faulty(Onnx):
    """An export whose student's file is not its checkpoint."""

    change: Callable[[np.ndarray], None]

    def export(self, checkpoint: Path, folder: Path, recipe: Any) -> list[Path]:
        written = Onnx().export(checkpoint, folder, recipe)
        proto = onnx.load(written[0])
        tensor = next(t for t in proto.graph.initializer if t.name.endswith("layer.0.intermediate.dense.weight.T"))
        array = numpy_helper.to_array(tensor).copy()
        type(self).change(array)
        tensor.raw_data = array.tobytes()
        onnx.save(proto, written[0])
        return written


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda array: array.__setitem__(array == 0, 1e-30),
            "layer.0.intermediate.dense.weight: the exported file has",
        ),
        (lambda array: array.__imul__(1.1), "checkpoint and exported file differ by .* on 8 dev rows"),
    ],
    ids=["lost zeros", "perturbed matrix"],
)
def test_a_file_that_is_not_its_checkpoint_is_refused(
    change: Any, what: str, fabricate: Fabricate, clean_plugins: None
) -> None:
    run = fabricate('export.targets=["faulty"]')
    plugins.targets.register("faulty")(type("Broken", (Faulty,), {"change": staticmethod(change)}))
    checkpoints = (run.path / "teacher", run.path / "finetune")
    (run.path / "teacher").rename(run.path / "dense")
    (run.path / "finetune").rename(checkpoints[0])  # a teacher with zeros, so that the first export shows the fault
    (run.path / "dense").rename(checkpoints[1])
    with pytest.raises(GateError, match=what) as caught:
        export(run)
    assert caught.value.exit_code == 3
    assert nothing_half_written(run)


def test_a_changed_dev_metric_is_refused(
    fabricate: Fabricate, monkeypatch: pytest.MonkeyPatch, clean_plugins: None
) -> None:
    """The probes may all pass and the dev set still tell: here, because the tolerance is set absurdly wide."""

    class Contrary(Onnx):
        def session(self, folder: Path, provider: str = "cpu", threads: int = 0) -> Any:
            forward = Onnx().session(folder, provider, threads)
            return lambda batch: -forward(batch)

    plugins.targets.register("contrary")(Contrary)
    run = fabricate('export.targets=["contrary"]', "export.tolerance=1000")
    with pytest.raises(GateError, match=r"the exported file has .* on the dev set; its checkpoint has") as caught:
        export(run)
    assert caught.value.hint == "export.budget is 0.001"
    assert nothing_half_written(run)


def test_compare_counts_flips_and_every_dev_set(toys: ModuleType, toy_task: Callable[..., Task]) -> None:
    task = toy_task()
    rows = toys.rows(6)
    dev = DevSets(task, data.encode_splits(toys.tokenizer(), {"dev": rows, "dev_mm": rows}, 32))

    def answer(sign: float) -> Callable[[Any], np.ndarray]:
        def forward(batch: Any) -> np.ndarray:
            gold = batch["labels"].astype(np.float32) * 2 - 1
            return np.stack([-gold, gold * sign], axis=1)

        return forward

    change = compare_predictions(task, dev.predict(answer(1.0)), dev.predict(answer(-2.0)), dev.sets, 1e-4)
    assert change.checkpoint == {"score": 1.0, "accuracy": 1.0, "accuracy_mm": 1.0}
    assert change.metrics["accuracy"] == change.metrics["accuracy_mm"] < 1
    assert change.flipped == 2 * 6 * (1 - change.metrics["accuracy"])
    assert change.difference == 3.0


@pytest.mark.parametrize(
    ("after", "worse", "refused"), [(0.98, 1, False), (0.98, 2, True), (0.999, 9, False), (float("nan"), 0, True)]
)
def test_one_prediction_is_never_over_the_budget(after: float, worse: int, refused: bool) -> None:
    change = DevComparison({"accuracy": after}, {"accuracy": 1.0}, worse, 50, 0.1, worse)
    assert metric_over_budget(change, 0.002) == ("accuracy" if refused else None)


def test_compare_takes_a_regression_by_its_values(toys: ModuleType, toy_task: Callable[..., Task]) -> None:
    task = toy_task(labels=())
    dev = DevSets(task, data.encode_splits(toys.tokenizer(), {"dev": toys.rows(6, labels=1)}, 32))

    def answer(shift: float) -> Any:
        return dev.predict(lambda batch: batch["labels"][:, None] + np.float32(shift) * (batch["labels"] > 1)[:, None])

    assert compare_predictions(task, answer(0), answer(1e-6), dev.sets, 1e-4).flipped == 0
    assert compare_predictions(task, answer(0), answer(1e-2), dev.sets, 1e-4).flipped == 3


def test_a_second_target_lies_under_its_name(fabricate: Fabricate, clean_plugins: None) -> None:
    plugins.targets.register("other")(type("Other", (Onnx,), {}))
    run = fabricate('export.targets=["onnx", "other"]')
    metrics = export(run)
    assert metrics.targets["other"].student.bytes == metrics.student.bytes
    assert (run.path / "export/other/student/onnx/model.onnx").is_file()
    assert (run.path / "export/teacher/onnx/model.onnx").is_file()


class TestOptional:
    """A target that is exported where it can be, and told of where it cannot."""

    def test_it_lies_under_its_name_with_the_roles_that_it_has(
        self, fabricate: Fabricate, rounded: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = fabricate('export.optional=["rounded"]', "export.budget=1")
        metrics = export(run)
        assert set(metrics.targets) == {"onnx", "rounded"}
        assert metrics.targets["rounded"].teacher is None
        written = {name.split("/")[0] for name in files(run.path / "export")}
        assert written == {"teacher", "student", "rounded", "bundle", "stage.json"}
        assert {name.split("/")[0] for name in files(run.path / "export/rounded")} == {"student"}
        assert "student (rounded): " in capsys.readouterr().out
        assert run.export_result() == metrics

    def test_one_that_is_not_installed_is_told_once_and_the_rest_goes_on(
        self, fabricate: Fabricate, clean_plugins: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        metrics = export(fabricate('export.optional=["absent"]'))
        assert set(metrics.targets) == {"onnx"}
        said = capsys.readouterr().err
        assert said.count("the export to absent is left out: there is no export target 'absent'") == 1

    @pytest.mark.parametrize("error", [DeviceError, PluginError, ModelError])
    def test_one_that_cannot_work_here_is_told_once_and_leaves_nothing(
        self, error: Any, fabricate: Fabricate, clean_plugins: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Lacking(Onnx):
            def export(self, checkpoint: Path, folder: Path, recipe: Any) -> list[Path]:
                Onnx().export(checkpoint, folder, recipe)
                raise error("the compiled library is missing", "build it")

        plugins.targets.register("lacking")(Lacking)
        run = fabricate('export.optional=["lacking"]')
        assert set(export(run).targets) == {"onnx"}
        assert capsys.readouterr().err.count("lacking is left out: the compiled library is missing (build it)") == 1
        assert not [name for name in files(run.path / "export") if "lacking" in name]

    def test_a_demanded_one_that_cannot_work_is_an_error(self, fabricate: Fabricate, clean_plugins: None) -> None:
        class Lacking(Onnx):
            def export(self, checkpoint: Path, folder: Path, recipe: Any) -> list[Path]:
                raise DeviceError("the compiled library is missing")

        plugins.targets.register("lacking")(Lacking)
        run = fabricate('export.targets=["onnx", "lacking"]', 'export.optional=["lacking"]')
        with pytest.raises(DeviceError, match="the compiled library is missing"):
            export(run)
        assert nothing_half_written(run)

    @pytest.mark.parametrize("demanded", [True, False])
    def test_a_wrong_result_of_one_is_never_shipped_and_an_error_where_it_was_demanded(
        self, demanded: bool, fabricate: Fabricate, clean_plugins: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plugins.targets.register("faulty")(type("Broken", (Faulty,), {"change": staticmethod(lambda a: a.fill(1.0))}))
        plugins.targets.register("sound")(type("Sound", (Onnx,), {}))
        sets = ['export.targets=["onnx", "faulty"]'] if demanded else []
        run = fabricate('export.optional=["faulty", "sound"]', *sets)
        if demanded:
            with pytest.raises(GateError, match="not shipped: faulty: checkpoint and exported file differ") as caught:
                export(run)
            assert caught.value.exit_code == 3
        else:
            export(run)
        said = capsys.readouterr().err
        assert "faulty is not shipped: checkpoint and exported file differ by" in said
        assert ("--set 'export.skip=[\"faulty\"]' does without it" in said) == (not demanded)
        assert run.done("export")
        metrics = run.export_result()
        assert set(metrics.refused) == {"faulty"}
        assert "faulty" not in metrics.targets
        assert (run.path / "export/sound/student/onnx/model.onnx").is_file()
        assert not (run.path / "export/faulty").exists()

    def test_one_that_runs_on_another_provider_only(
        self, fabricate: Fabricate, clean_plugins: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plugins.targets.register("gpu-only")(type("Gpu", (Onnx,), {"providers": ("cuda",)}))
        assert set(export(fabricate('export.optional=["gpu-only"]')).targets) == {"onnx"}
        assert "the target runs on cuda; what works here is cpu" in capsys.readouterr().err


class TestRounding:
    """A target that rounds the weights: the arithmetic and the cost of the rounding are told apart."""

    def test_the_cost_is_measured_against_the_checkpoint_and_the_arithmetic_is_not(
        self, fabricate: Fabricate, rounded: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = fabricate('export.optional=["rounded"]', "export.budget=1", "export.values=int8")
        measured = export(run).targets["rounded"].student
        assert (measured.values, measured.embeddings) == ("int8", "fp16")
        assert measured.largest_difference < 1e-4 < 1e-3 < measured.largest_change
        assert measured.sparsity == 0.75
        assert set(measured.dev) == set(measured.checkpoint_dev) == {"score", "accuracy"}
        lines = capsys.readouterr().out.splitlines()
        (told,) = [line for line in lines if "weights in int8, embeddings in fp16" in line]
        before, after = measured.checkpoint_dev["score"], measured.dev["score"]
        assert f"dev score {before:.4f} before, {after:.4f} after" in told
        assert f"{measured['flipped']} of 20 predictions flipped" in told
        assert f"largest logit change {measured['largest_change']:.1e}" in told

    def test_stored_exactly_nothing_changes(self, fabricate: Fabricate, rounded: Any) -> None:
        sets = ("export.values=fp32", "export.embeddings=fp32")
        measured = export(fabricate('export.optional=["rounded"]', *sets)).targets["rounded"].student
        assert measured.largest_change < 1e-4
        assert measured.dev == measured.checkpoint_dev

    def test_a_fault_of_the_arithmetic_is_caught_though_rounding_moves_more(
        self, fabricate: Fabricate, rounded: Any
    ) -> None:
        def session(folder: Path, provider: str = "cpu", threads: int = 0) -> Any:
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
            lambda folder: iter([("bert.pooler.dense.bias", np.zeros(3, np.float32))])
        )
        with pytest.raises(GateError, match=r"bert.pooler.dense.bias of shape \(3,\) does not fit"):
            export(fabricate('export.targets=["onnx", "rounded"]', "export.budget=1"))

    @pytest.mark.parametrize(("values", "budget"), [("fp32", "0.002"), ("fp16", "0.002"), ("int8", "0.005")])
    def test_the_budget_goes_by_the_storage(
        self, values: str, budget: str, fabricate: Fabricate, rounded: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def worse(*given: Any) -> DevComparison:
            change = compare_predictions(*given)
            metrics = {name: value - 0.0051 for name, value in change.metrics.items()}
            return replace(change, metrics=metrics, worse=2) if len(seen) == 2 else seen.append(change) or change

        seen: list[DevComparison] = []  # those of teacher and student, of which nothing is rounded
        monkeypatch.setattr("spdtool.export.gates.compare_predictions", worse)
        run = fabricate('export.targets=["onnx", "rounded"]', f"export.values={values}")
        with pytest.raises(GateError, match="of 20 predictions flipped") as caught:
            export(run)
        assert f"export.budget is {budget}; export.values={values}" in caught.value.message


class TestOfNoRun:
    """`export_checkpoint`: a checkpoint that nobody trained here."""

    @pytest.fixture
    def checkpoint(self, fabricate: Fabricate, tmp_path: Path) -> Path:
        run = fabricate()
        folder = tmp_path / "theirs"
        shutil.copytree(run.path / "finetune", folder)
        (folder / "stage.json").unlink()
        return folder

    def test_without_data_random_tokens_are_compared(
        self, checkpoint: Path, rounded: Any, tmp_path: Path, toys: ModuleType, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = export_checkpoint(checkpoint, "rounded", tmp_path / "out", toys.recipe(), with_task=False)
        assert 0 < found.largest_difference < 1e-4
        assert "shape" in found.largest_difference_at
        assert found.dev is None
        assert found.sparsity == 0.75
        assert (tmp_path / "out/manifest.json").is_file()
        assert "no dev set was given" in capsys.readouterr().out

    def test_with_a_task_its_dev_set_counts_too(
        self, checkpoint: Path, tmp_path: Path, toys: ModuleType, clean_plugins: None
    ) -> None:
        found = export_checkpoint(checkpoint, "onnx", tmp_path / "out", toys.recipe(), with_task=True)
        assert (found.rows, found.flipped) == (20, 0)
        assert found.dev == found.checkpoint_dev

    def test_a_fault_leaves_nothing(self, checkpoint: Path, tmp_path: Path, toys: ModuleType, rounded: Any) -> None:
        rounded.audit = staticmethod(lambda folder: {})
        with pytest.raises(GateError, match="no such matrix"):
            export_checkpoint(checkpoint, "rounded", tmp_path / "out", toys.recipe(), with_task=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "theirs"]

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
