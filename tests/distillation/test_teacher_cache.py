"""Cached teacher outputs: computed once, with the same training result as a teacher pass for every batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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

# a large epsilon, because AdamW would amplify gradients that are only rounding
STEADY = ("prune.epochs=2", "prune.dropout=0.0", "prune.epsilon=1e-4")
TERMS = {
    "logits": ("prune.loss.hidden=0.0",),
    "hidden": (),
    "relation": ("prune.loss.hidden=0.0", "prune.loss.relation=1.0", "prune.loss.relation_heads=2"),
    "one layer of two": ("prune.loss.layer_map=[2, 2]",),
}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spdtool"


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record "student" or "teacher" for each forward pass of training."""
    passes: list[Any] = []

    def compute_outputs(model: Any, *args: Any, **options: Any) -> outputs.ModelOutputs:
        passes.append("student" if any(weight.requires_grad for weight in model.parameters()) else "teacher")
        return outputs.compute_outputs(model, *args, **options)

    monkeypatch.setattr(lesson, "compute_outputs", compute_outputs)
    return passes


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.use_input("prune") / "model.safetensors")


@pytest.mark.parametrize("start", [pytest.param(1.0, marks=pytest.mark.long), 0.5])
@pytest.mark.parametrize("terms", TERMS)
def test_a_phase_with_cached_outputs_trains_the_same_weights(
    toy_run: Callable[..., Run], forward_passes: list[Any], monkeypatch: pytest.MonkeyPatch, terms: str, start: float
) -> None:
    sets = (*STEADY, *TERMS[terms], f"prune.grafting.start={start}")
    cached_run = toy_run(*sets, until="teacher", folder="kept")
    prune(cached_run)
    steps = forward_passes.count("student")
    assert forward_passes.count("teacher") < steps, "once over the rows, in larger batches"
    assert forward_passes == ["teacher"] * forward_passes.count("teacher") + ["student"] * steps
    forward_passes.clear()
    plain_run = toy_run(*sets, until="teacher", folder="plain")
    monkeypatch.setattr("spdtool.stages.phase.is_worth_caching", lambda *_: False)
    prune(plain_run)
    assert forward_passes == ["teacher", "student"] * steps
    cached_weights, plain_weights = weights(cached_run), weights(plain_run)
    for name, weight in plain_weights.items():
        torch.testing.assert_close(cached_weights[name], weight, rtol=0, atol=1e-4)


def test_a_killed_phase_resumes_with_the_cached_outputs(
    toy_run: Callable[..., Run], forward_passes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phase is killed at its first snapshot; the result equals an uninterrupted run to the bit."""
    uninterrupted = toy_run(*STEADY, until="teacher", folder="calm")
    prune(uninterrupted)
    interrupted = toy_run(*STEADY, until="teacher", folder="killed")
    forward_passes.clear()
    write = snapshot.write_snapshot

    def write_and_interrupt(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "write_snapshot", write_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(interrupted)
    monkeypatch.setattr(snapshot, "write_snapshot", write)
    prune(Run.open(interrupted.path))
    assert set(forward_passes) == {"student"}, "both were found in the cache"
    actual, expected = weights(interrupted), weights(uninterrupted)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_deleted_cache_is_computed_again(
    toy_run: Callable[..., Run], forward_passes: list[Any], cache_folder: Path
) -> None:
    first = toy_run(*STEADY, until="teacher", folder="first")
    prune(first)
    shutil.rmtree(cache_folder / "teacher-states")
    forward_passes.clear()
    second = toy_run(*STEADY, until="teacher", folder="second")
    prune(second)
    assert forward_passes[0] == "teacher"
    assert all(torch.equal(weight, weights(first)[name]) for name, weight in weights(second).items())


def test_on_a_full_disk_the_states_are_cached_in_memory_with_the_same_bits(
    toy_run: Callable[..., Run], forward_passes: list[Any], cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_run = toy_run(*STEADY, until="teacher", folder="calm")
    prune(expected_run)
    shutil.rmtree(cache_folder)
    states: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
        "full": lambda patch: patch.setattr(teacher_outputs, "free_disk_space", lambda: 1000),
        "cannot be written": lambda patch: patch.setattr(cache, "arrays_on_disk", lambda *_: None),
        "is a file": lambda patch: cache_folder.write_text("a file stands where the folder should be"),
    }
    for name, break_disk in states.items():
        forward_passes.clear()
        with monkeypatch.context() as patch:
            break_disk(patch)
            run = toy_run(*STEADY, until="teacher", folder=name)
            prune(run)
        assert forward_passes[0] == "teacher", name
        assert set(forward_passes[1:]) == {"student"}, name
        assert all(torch.equal(weight, weights(expected_run)[key]) for key, weight in weights(run).items()), name


def test_without_disk_and_memory_the_run_stops_with_advice(
    toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running the teacher on every batch gives other bits, so the run never falls back to it silently."""
    monkeypatch.setattr(teacher_outputs, "free_disk_space", lambda: 1000)
    monkeypatch.setattr(teacher_outputs, "free_memory", lambda: 1000)
    run = toy_run(*STEADY, until="teacher")
    with pytest.raises(DeviceError, match="hidden states of all rows take") as error:
        prune(run)
    assert "teacher_states_gb=0" in (error.value.hint or "")
    prune(Run.for_recipe(run.path, override(run.recipe, ["teacher_states_gb=0"])))


def test_an_entry_is_read_from_a_full_disk(
    toy_run: Callable[..., Run], forward_passes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(toy_run(*STEADY, until="teacher", folder="first"))
    forward_passes.clear()
    monkeypatch.setattr(teacher_outputs, "free_disk_space", lambda: 0)
    monkeypatch.setattr(teacher_outputs, "free_memory", lambda: 0)
    prune(toy_run(*STEADY, until="teacher", folder="second"))
    assert set(forward_passes) == {"student"}


def test_a_stage_does_not_resume_with_caching_switched_off(
    toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage half with cached states and half without would equal neither result."""
    run = toy_run(*STEADY, until="teacher")
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
def is_worth_caching(toys: ModuleType) -> Callable[..., bool]:
    """Return a function of assignments that tells whether the prune phase would cache teacher outputs."""

    def ask(*sets: str, rows: int = 100) -> bool:
        recipe: Recipe = toys.recipe("prune.epochs=2", "prune.batch_size=8", *sets)
        encoded = data.tokenize(toys.tokenizer(), toys.rows(rows), 32)
        return teacher_outputs.is_worth_caching(recipe, recipe.prune, encoded, toys.bert(), (0, 1, 2))

    return ask


def test_hidden_states_are_cached_if_they_are_read_twice(is_worth_caching: Callable[..., bool]) -> None:
    without_hidden = [f"{phase}.loss.hidden=0.0" for phase in ("distill", "finetune")]
    assert is_worth_caching()
    assert is_worth_caching(*without_hidden)
    assert not is_worth_caching(*without_hidden, "prune.epochs=1")
    assert is_worth_caching("prune.epochs=1", "distill.epochs=1"), "the phases share them"


def test_logits_alone_are_cached_even_for_one_epoch(is_worth_caching: Callable[..., bool]) -> None:
    assert is_worth_caching("prune.loss.hidden=0.0", "prune.epochs=1")
    assert not is_worth_caching("prune.loss.hidden=0.0", "prune.max_steps=2"), "one run over all rows costs more"


@pytest.mark.parametrize(
    "assignment",
    ["prune.loss.attention=1.0", "prune.loss.mask_padding=false", "teacher_states_gb=0", "teacher_states_gb=1e-6"],
)
def test_outputs_that_do_not_fit_or_need_attention_are_not_cached(
    is_worth_caching: Callable[..., bool], assignment: str
) -> None:
    assert not is_worth_caching(assignment)


def test_left_padding_prevents_caching(toys: ModuleType) -> None:
    """Padding on the left moves the tokens to other positions."""
    tokenizer = toys.tokenizer()
    tokenizer.padding_side = "left"
    rows, recipe = data.tokenize(tokenizer, toys.rows(100), 32), toys.recipe("prune.epochs=2")
    assert not teacher_outputs.is_worth_caching(recipe, recipe.prune, rows, toys.bert(), (0, 1, 2))


def test_free_space_does_not_decide_whether_to_cache(
    is_worth_caching: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_outputs, "free_disk_space", lambda: 0)
    monkeypatch.setattr(teacher_outputs, "free_memory", lambda: 0)
    assert is_worth_caching()


def test_the_free_memory_has_a_plausible_size() -> None:
    assert 10**6 < teacher_outputs.free_memory() < 10**14


def count_passes(model: Any, batch_sizes: list[int]) -> teacher_outputs.TeacherForward:
    def compute(batch: dict[str, torch.Tensor]) -> outputs.ModelOutputs:
        batch_sizes.append(len(batch["labels"]))
        with torch.no_grad():
            return outputs.compute_outputs(model, batch, hidden_states=True)

    return compute


def test_a_cache_entry_belongs_to_one_teacher_and_its_rows(toys: ModuleType) -> None:
    batch_sizes: list[int] = []

    def cache_toy_outputs(model: Any, rows: Any) -> Any:
        return teacher_outputs.cache_outputs(rows, model, count_passes(model, batch_sizes), (0, 1, 2))

    rows, other_rows = (data.tokenize(toys.tokenizer(), toys.rows(20, seed), 32) for seed in (0, 1))
    first, repeated = cache_toy_outputs(toys.bert(), rows), cache_toy_outputs(toys.bert(), rows)
    assert batch_sizes == [20]
    assert np.array_equal(first.per_token[teacher_outputs.STATES], repeated.per_token[teacher_outputs.STATES])
    cache_toy_outputs(toys.bert(seed=1), rows)
    cache_toy_outputs(toys.bert(), other_rows)
    assert batch_sizes == [20, 20, 20]


def test_a_batch_gets_the_states_of_its_own_tokens(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_outputs, "CHUNK_BYTES", 20_000)  # several chunks, so that their boundaries are tested
    rows, model = data.tokenize(toys.tokenizer(), toys.rows(30), 32), toys.bert()
    batch_sizes: list[int] = []
    cached = teacher_outputs.cache_outputs(rows, model, count_passes(model, batch_sizes), (0, 1, 2))
    assert len(batch_sizes) > 1
    batch = {name: torch.from_numpy(column) for name, column in cached.collate(np.array([7, 2, 29])).items()}
    cached_outputs = teacher_outputs.pop_cached_outputs(batch)
    assert cached_outputs is not None
    assert cached_outputs.hidden_states is not None
    expected, is_token = count_passes(model, [])(batch), batch["attention_mask"].bool()
    torch.testing.assert_close(cached_outputs.logits, expected.logits)
    for cached_state, expected_state in zip(cached_outputs.hidden_states, expected.hidden_states or (), strict=True):
        torch.testing.assert_close(cached_state[is_token], expected_state[is_token])
        assert not cached_state[~is_token].any()


def test_other_ranks_do_not_wait_forever_if_rank_0_fails(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 raises before the barrier; the barrier of the other ranks then raises PeerLost."""
    rows, model = data.tokenize(toys.tokenizer(), toys.rows(20), 32), toys.bert()

    def fail(_: Any) -> Any:
        raise MemoryError

    def raise_peer_lost() -> None:
        raise PeerLost("it has ended")

    with pytest.raises(MemoryError):
        teacher_outputs.cache_outputs(rows, model, fail, (0,))
    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(collectives, "barrier", raise_peer_lost)
    with pytest.raises(PeerLost):
        teacher_outputs.cache_outputs(rows, model, fail, (0,))
