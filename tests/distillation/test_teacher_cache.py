"""The teacher's outputs are computed once, and teach the same as the teacher that looks at every batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spdtool import ranks as processes
from spdtool.data import cache
from spdtool.data import tokens as data
from spdtool.distillation import lesson, outputs
from spdtool.distillation import teacher_cache as teacher_outputs
from spdtool.errors import DeviceError, PeerLost, RunMismatch
from spdtool.models import collectives
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import override
from spdtool.run.folder import Run
from spdtool.stages.prune import prune
from spdtool.training import snapshot

pytestmark = pytest.mark.slow  # it trains whole stages

# epsilon: where a gradient is nothing but rounding, AdamW would step by rounding alone
CALM = ("prune.epochs=2", "prune.dropout=0.0", "prune.epsilon=1e-4")
LESSONS = {
    "logits": ("prune.loss.hidden=0.0",),
    "hidden": (),
    "relation": ("prune.loss.hidden=0.0", "prune.loss.relation=1.0", "prune.loss.relation_heads=2"),
    "one layer of two": ("prune.loss.layer_map=[2, 2]",),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spdtool"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every model that looks at a batch."""
    seen: list[Any] = []

    def compute_outputs(model: Any, *args: Any, **options: Any) -> outputs.ModelOutputs:
        seen.append("student" if any(weight.requires_grad for weight in model.parameters()) else "teacher")
        return outputs.compute_outputs(model, *args, **options)

    monkeypatch.setattr(lesson, "compute_outputs", compute_outputs)
    return seen


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.use_input("prune") / "model.safetensors")


@pytest.mark.parametrize("start", [pytest.param(1.0, marks=pytest.mark.long), 0.5])
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_phase_learns_the_same_without_looking_at_the_teacher(
    toy_run: Callable[..., Run], looks: list[Any], monkeypatch: pytest.MonkeyPatch, lesson: str, start: float
) -> None:
    sets = (*CALM, *LESSONS[lesson], f"prune.grafting.start={start}")
    kept = toy_run(*sets, until="teacher", folder="kept")
    prune(kept)
    steps = looks.count("student")
    assert looks.count("teacher") < steps, "once over the rows, in larger batches"
    assert looks == ["teacher"] * looks.count("teacher") + ["student"] * steps
    looks.clear()
    plain = toy_run(*sets, until="teacher", folder="plain")
    monkeypatch.setattr("spdtool.stages.phase.is_worth_caching", lambda *_: False)
    prune(plain)
    assert looks == ["teacher", "student"] * steps
    ours, theirs = weights(kept), weights(plain)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-4)


def test_a_phase_that_is_killed_goes_on_with_what_is_kept(
    toy_run: Callable[..., Run], looks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its first snapshot, with the bits of a run that nobody disturbed in the end."""
    calm = toy_run(*CALM, until="teacher", folder="calm")
    prune(calm)
    killed = toy_run(*CALM, until="teacher", folder="killed")
    looks.clear()
    write = snapshot.write_snapshot

    def killing(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "write_snapshot", killing)
    with pytest.raises(KeyboardInterrupt):
        prune(killed)
    monkeypatch.setattr(snapshot, "write_snapshot", write)
    prune(Run.open(killed.path))
    assert set(looks) == {"student"}, "both were found in the cache"
    ours, theirs = weights(killed), weights(calm)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_lost_on_the_way_is_computed_again(toy_run: Callable[..., Run], looks: list[Any], home: Path) -> None:
    first = toy_run(*CALM, until="teacher", folder="first")
    prune(first)
    shutil.rmtree(home / "teacher-states")
    looks.clear()
    second = toy_run(*CALM, until="teacher", folder="second")
    prune(second)
    assert looks[0] == "teacher"
    assert all(torch.equal(weight, weights(first)[name]) for name, weight in weights(second).items())


def test_without_room_on_the_disk_the_states_are_computed_in_memory_to_the_same_bits(
    toy_run: Callable[..., Run], looks: list[Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = toy_run(*CALM, until="teacher", folder="calm")
    prune(calm)
    shutil.rmtree(home)
    states: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
        "full": lambda patch: patch.setattr(teacher_outputs, "free_disk_space", lambda: 1000),
        "cannot be written": lambda patch: patch.setattr(cache, "arrays_on_disk", lambda *_: None),
        "is a file": lambda patch: home.write_text("a file stands where the folder should be"),
    }
    for name, break_disk in states.items():
        looks.clear()
        with monkeypatch.context() as patch:
            break_disk(patch)
            run = toy_run(*CALM, until="teacher", folder=name)
            prune(run)
        assert looks[0] == "teacher", name
        assert set(looks[1:]) == {"student"}, name
        assert all(torch.equal(weight, weights(calm)[key]) for key, weight in weights(run).items()), name


def test_without_room_in_memory_either_the_run_stops_and_says_what_to_do(
    toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's look at every batch gives other bits, so it never takes over in silence."""
    monkeypatch.setattr(teacher_outputs, "free_disk_space", lambda: 1000)
    monkeypatch.setattr(teacher_outputs, "free_memory", lambda: 1000)
    run = toy_run(*CALM, until="teacher")
    with pytest.raises(DeviceError, match="hidden states of all rows take") as error:
        prune(run)
    assert "teacher_states_gb=0" in (error.value.hint or "")
    prune(Run.for_recipe(run.path, override(run.recipe, ["teacher_states_gb=0"])))


def test_an_entry_is_read_from_a_full_disk(
    toy_run: Callable[..., Run], looks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(toy_run(*CALM, until="teacher", folder="first"))
    looks.clear()
    monkeypatch.setattr(teacher_outputs, "free_disk_space", lambda: 0)
    monkeypatch.setattr(teacher_outputs, "free_memory", lambda: 0)
    prune(toy_run(*CALM, until="teacher", folder="second"))
    assert set(looks) == {"student"}


def test_a_stage_does_not_go_on_by_the_other_route(
    toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of it with cached states and half with the teacher's look would be the weights of neither."""
    run = toy_run(*CALM, until="teacher")
    write = snapshot.write_snapshot

    def killing(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "write_snapshot", killing)
        with pytest.raises(KeyboardInterrupt):
            prune(run)
    prune(Run.for_recipe(run.path, override(run.recipe, ["teacher_states_gb=0"])))
    assert "the stage begins anew: its snapshot belongs to other settings" in capsys.readouterr().err
    with pytest.raises(RunMismatch, match="teacher_states_gb"):
        Run.for_recipe(run.path, run.recipe)


@pytest.fixture
def pays(toys: Any) -> Callable[..., bool]:
    """`pays("field=value", ..., rows=100)`: whether the teacher's outputs are worth keeping in the prune phase."""

    def asked(*sets: str, rows: int = 100) -> bool:
        recipe: Recipe = toys.recipe("prune.epochs=2", "prune.batch_size=8", *sets)
        encoded = data.tokenize(toys.tokenizer(), toys.rows(rows), 32)
        return teacher_outputs.is_worth_caching(recipe, recipe.prune, encoded, toys.bert(), (0, 1, 2))

    return asked


def test_hidden_states_are_kept_where_they_are_read_twice(pays: Callable[..., bool]) -> None:
    others = [f"{phase}.loss.hidden=0.0" for phase in ("distill", "finetune")]
    assert pays()
    assert pays(*others)
    assert not pays(*others, "prune.epochs=1")
    assert pays("prune.epochs=1", "distill.epochs=1"), "the phases share them"


def test_logits_alone_are_kept_for_one_epoch(pays: Callable[..., bool]) -> None:
    assert pays("prune.loss.hidden=0.0", "prune.epochs=1")
    assert not pays("prune.loss.hidden=0.0", "prune.max_steps=2"), "one run over all rows costs more"


@pytest.mark.parametrize(
    "needs_more",
    ["prune.loss.attention=1.0", "prune.loss.mask_padding=false", "teacher_states_gb=0", "teacher_states_gb=1e-6"],
)
def test_what_cannot_be_kept_is_not(pays: Callable[..., bool], needs_more: str) -> None:
    assert not pays(needs_more)


def test_what_depends_on_the_padding_is_not_kept(toys: Any) -> None:
    """Padding on the left moves the tokens to other positions."""
    tokenizer = toys.tokenizer()
    tokenizer.padding_side = "left"
    rows, recipe = data.tokenize(tokenizer, toys.rows(100), 32), toys.recipe("prune.epochs=2")
    assert not teacher_outputs.is_worth_caching(recipe, recipe.prune, rows, toys.bert(), (0, 1, 2))


def test_the_machine_has_no_say_in_what_is_kept(pays: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_outputs, "free_disk_space", lambda: 0)
    monkeypatch.setattr(teacher_outputs, "free_memory", lambda: 0)
    assert pays()


def test_the_free_memory_is_that_of_the_machine() -> None:
    assert 10**6 < teacher_outputs.free_memory() < 10**14


def look(model: Any, made: list[int]) -> teacher_outputs.TeacherForward:
    def looking(batch: dict[str, torch.Tensor]) -> outputs.ModelOutputs:
        made.append(len(batch["labels"]))
        with torch.no_grad():
            return outputs.compute_outputs(model, batch, hidden_states=True)

    return looking


def test_they_belong_to_the_teacher_and_the_rows(toys: Any) -> None:
    made: list[int] = []

    def of(model: Any, rows: Any) -> Any:
        return teacher_outputs.cache_outputs(rows, model, look(model, made), (0, 1, 2))

    rows, other = (data.tokenize(toys.tokenizer(), toys.rows(20, seed), 32) for seed in (0, 1))
    first, again = of(toys.bert(), rows), of(toys.bert(), rows)
    assert made == [20]
    assert np.array_equal(first.per_token[teacher_outputs.STATES], again.per_token[teacher_outputs.STATES])
    of(toys.bert(seed=1), rows)
    of(toys.bert(), other)
    assert made == [20, 20, 20]


def test_a_batch_gets_the_states_of_its_own_tokens(toys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_outputs, "CHUNK_BYTES", 20_000)  # several, so that rows and pieces must fit together
    rows, model = data.tokenize(toys.tokenizer(), toys.rows(30), 32), toys.bert()
    made: list[int] = []
    kept = teacher_outputs.cache_outputs(rows, model, look(model, made), (0, 1, 2))
    assert len(made) > 1
    batch = {name: torch.from_numpy(column) for name, column in kept.collate(np.array([7, 2, 29])).items()}
    shown = teacher_outputs.pop_cached_outputs(batch)
    assert shown is not None
    assert shown.hidden_states is not None
    fresh, real = look(model, [])(batch), batch["attention_mask"].bool()
    torch.testing.assert_close(shown.logits, fresh.logits)
    for mine, its in zip(shown.hidden_states, fresh.hidden_states or (), strict=True):
        torch.testing.assert_close(mine[real], its[real])
        assert not mine[~real].any()


def test_the_others_do_not_wait_for_ever_for_a_first_rank_that_fails(
    toys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one raises before it reaches the place where they meet; the others are told that it has gone."""
    rows, model = data.tokenize(toys.tokenizer(), toys.rows(20), 32), toys.bert()

    def broken(_: Any) -> Any:
        raise MemoryError

    def gone() -> None:
        raise PeerLost("it has ended")

    with pytest.raises(MemoryError):
        teacher_outputs.cache_outputs(rows, model, broken, (0,))
    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(collectives, "barrier", gone)
    with pytest.raises(PeerLost):
        teacher_outputs.cache_outputs(rows, model, broken, (0,))
