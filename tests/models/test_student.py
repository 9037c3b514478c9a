"""A student of another shape than its teacher: what the plan counts and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from spdtool.distillation.layer_map import check_phases
from spdtool.errors import ModelError, RecipeError
from spdtool.models.layers import find_layer_stack, find_prunable_weights, model_shape
from spdtool.models.load import build_empty_teacher, load_model, save_model
from spdtool.models.student import (
    build_empty_student,
    check_positions,
    choose_layers,
    choose_tokenizer,
    keep_layers,
    match_labels,
    same_architecture,
    unread_columns,
)
from spdtool.pruning.allocation import zeros_in
from spdtool.run.folder import Run
from spdtool.stages import plan as planning
from spdtool.tasks.prepare import find_task, task_of

MakeRun = Callable[..., Run]


@pytest.fixture
def make_student(toys: ModuleType, tmp_path: Path) -> Callable[..., str]:
    """Return `make_student(layers=1, hidden_size=16)`, which saves a smaller BERT classifier and returns its folder."""

    def make(**config: Any) -> str:
        model = toys.classifier("bert", **{"hidden_size": 16, "intermediate_size": 24, "layers": 1} | config)
        save_model(model, toys.tokenizer(), tmp_path / "small")
        return str(tmp_path / "small")

    return make


def test_the_plan_counts_the_students_weights(toy_run: MakeRun, make_student: Callable[..., str]) -> None:
    folder = make_student()
    parameters = planning.make_plan(toy_run(student=folder, sparsity=0.3)).parameters
    model = load_model(folder)
    sizes = [weight.numel() for weight in find_prunable_weights(model).values()]
    assert parameters.all == sum(parameter.numel() for parameter in model.parameters())
    assert parameters.prunable == sum(sizes) < planning.make_plan(toy_run()).parameters.prunable
    assert parameters.zeros == sum(zeros_in(size, 0.3) for size in sizes)


def test_memory_falls_with_a_smaller_student_and_grows_with_relations_and_blends(
    toy_run: MakeRun, make_student: Callable[..., str]
) -> None:
    def bytes_of(*sets: str, **flags: Any) -> int:
        return int(planning.make_plan(toy_run(*sets, **flags)).estimate.memory_bytes)

    copy = bytes_of()
    assert bytes_of(student=make_student()) < copy
    assert bytes_of("prune.loss.relation=1", "prune.loss.relation_heads=8") > copy
    assert bytes_of("prune.grafting.kind=blend") > copy


def test_a_student_that_copies_the_teacher_is_planned_as_the_teacher(toy_run: MakeRun) -> None:
    recipe = toy_run().recipe
    task = find_task(recipe)
    teacher = build_empty_teacher(recipe, task)
    assert build_empty_student(recipe, task, teacher) is teacher
    check_positions(recipe, teacher, teacher)
    check_phases(recipe, model_shape(teacher), model_shape(teacher))


@pytest.mark.parametrize(
    ("setting", "config", "error", "message"),
    [
        (
            "distill.loss.layer_map=[1, 2]",
            {},
            RecipeError,
            r"distill.loss: layer_map = \[1, 2\]: a student of 1 layers",
        ),
        ("prune.loss.layer_map=last", {"layers": 3}, RecipeError, "3 layers and the teacher only 2"),
        ("finetune.loss.relation=1", {}, RecipeError, "finetune.loss: relation_heads = 12 does not divide"),
        ("prune.loss.attention=1", {"num_attention_heads": 4}, RecipeError, "prune.loss: attention compares head"),
        ("max_length=64", {"max_position_embeddings": 20}, ModelError, "20 positions, and rows may have 64 tokens"),
    ],
)
def test_settings_that_do_not_fit_the_student_are_refused_by_the_plan(
    toy_run: MakeRun,
    make_student: Callable[..., str],
    setting: str,
    config: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    run = toy_run(setting, student=make_student(**config))
    with pytest.raises(error, match=message):
        planning.make_plan(run)
    with pytest.raises(error, match=message):
        planning.check_run(run)
    assert not run.path.exists()


def test_another_vocabulary_is_refused_by_the_plan(toy_run: MakeRun, make_student: Callable[..., str]) -> None:
    folder = Path(make_student())
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"quite"', '"rather"'), "utf-8")
    with pytest.raises(
        ModelError, match=r"another vocabulary than the teacher's: 25 and 25 tokens; 'quite' is unknown"
    ):
        planning.make_plan(toy_run(student=str(folder)))


def test_a_new_head_that_would_stay_random_is_refused_by_the_plan(
    toy_run: MakeRun, make_student: Callable[..., str]
) -> None:
    planning.make_plan(toy_run("prune.train=layers", student=make_student()))
    for student in ("pretrained", make_student(num_labels=3), make_student(id2label={0: "cat", 1: "dog"})):
        with pytest.raises(RecipeError, match="gets a new head, and prune.train = 'layers' would leave it random"):
            planning.make_plan(toy_run("prune.train=layers", student=student))


def test_a_student_that_is_not_there_is_refused_by_the_plan(toy_run: MakeRun) -> None:
    for source in ("./no-such-folder", "/nowhere/at/all"):
        with pytest.raises(ModelError, match=f"cannot load the model '{source}': it does not exist"):
            planning.make_plan(toy_run(student=source))


def test_a_list_of_layers_for_the_real_depth_is_no_obstacle_to_a_smoke_run(toy_run: MakeRun) -> None:
    recipe = toy_run("prune.loss.layer_map=[1, 2, 3, 4, 5, 6]", smoke=True).recipe
    assert recipe.prune.loss.layer_map == "uniform"


def test_the_order_of_the_logits(toys: ModuleType) -> None:
    """Labels without names (LABEL_0, LABEL_1) follow the order of the task: bad, good."""
    task = task_of(toys.dataset())
    for student, teacher, order in (
        (["good", "bad"], ["bad", "good"], [1, 0]),
        (["BAD", "Good"], ["bad", "good"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["good", "bad"], [1, 0]),
        (["good", "bad"], ["LABEL_0", "LABEL_1"], [1, 0]),
        (["LABEL_0", "LABEL_1"], ["0", "1"], [0, 1]),
    ):
        assert match_labels(student, teacher, task) == order, (student, teacher)


def test_layers_stand_in_only_for_layers_of_their_kind(toys: ModuleType) -> None:
    bert = toys.classifier("bert")
    assert same_architecture(bert, toys.classifier("bert", intermediate_size=16))
    assert not same_architecture(bert, toys.classifier("bert", layers=2))
    assert not same_architecture(bert, toys.classifier("bert", hidden_size=16))
    assert not same_architecture(bert, toys.classifier("electra"))


def test_the_tokenizer_with_more_columns_is_chosen(toys: ModuleType) -> None:
    rich, plain = toys.tokenizer(), toys.tokenizer(token_types=False)
    assert (unread_columns(rich), unread_columns(plain)) == (set(), {"token_type_ids"})
    assert choose_tokenizer(plain, rich) is rich
    assert choose_tokenizer(rich, plain) is rich
    assert choose_tokenizer(plain, toys.tokenizer(token_types=False)) is plain


def test_the_kept_layers_compute_what_they_computed_in_every_family(toys: ModuleType) -> None:
    for family in toys.ARCHITECTURES:
        model = toys.classifier(family)
        shallow = keep_layers(model, [1, 3])
        assert shallow.config.num_hidden_layers == len(find_layer_stack(shallow)) == 2, family
        stack = find_layer_stack(model)
        for copied, original in zip(find_layer_stack(shallow), (stack[0], stack[2]), strict=True):
            for name, weight in original.state_dict().items():
                assert torch.equal(copied.state_dict()[name], weight), f"{family}: {name}"
        del stack[1]
        batch = toys.batch(architecture=family)
        with torch.no_grad():
            assert torch.equal(shallow(**batch).logits, model(**batch).logits), family


def test_a_layer_that_cannot_come_first_is_refused(toys: ModuleType) -> None:
    with pytest.raises(ModelError, match="attn_norm") as error:
        keep_layers(toys.classifier("modernbert"), [2, 3])
    assert "keep the first layer" in str(error.value.hint)


def test_a_single_number_selects_that_many_evenly_spread_layers() -> None:
    assert choose_layers([3], 6) == [2, 4, 6]
    assert choose_layers([4], 12) == [3, 6, 9, 12]
    assert choose_layers([1, 4], 6) == [1, 4]
    for layers in ([7], [0], [2, 1], [1, 1], [1, 7]):
        with pytest.raises(RecipeError, match="the teacher has the layers 1 to 6"):
            choose_layers(layers, 6)
