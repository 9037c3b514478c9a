"""Sharded parameters: each rank stores its rows and gathers the others."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

from spdtool.errors import DeviceError, RecipeError
from spdtool.models import fsdp
from spdtool.models.layers import find_layer_stack, install_capture_hooks
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import build_recipe
from spdtool.training.accelerator import create_accelerator

RANKS = 3


def model() -> nn.Sequential:
    """Build a model whose rows do not divide by three ranks: 7 rows, then 2, so that one rank gets none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))


def run_rank(number: int, port: int, folder: Path) -> None:
    """Run the checks on one rank; write an error to a file for the parent process."""
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=number, world_size=RANKS)
        check_rows(number)
        for architecture in ("bert", "distilbert", "deberta-v2", "modernbert"):
            check_grafts(architecture, number)
        (folder / str(number)).write_text("well")
    except BaseException as error:
        (folder / str(number)).write_text(repr(error))
        raise
    finally:
        dist.destroy_process_group()


def check_rows(number: int) -> None:
    plain, sharded = model(), model()
    fsdp.shard_model(sharded, [sharded[0]], torch.device("cpu"))
    batch = torch.arange(15.0).view(3, 5)
    plain(batch).square().sum().backward()
    sharded(batch[number : number + 1]).square().sum().backward()
    for full, shard in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert fsdp.is_sharded(shard)
        assert not fsdp.is_sharded(full)
        chunks = full.detach().chunk(RANKS)
        expected = chunks[number] if number < len(chunks) else full.detach()[:0]
        rows = fsdp.local_rows(shard)
        assert torch.equal(rows, expected)
        assert torch.equal(fsdp.gather_rows(rows, shard), full)
        assert torch.equal(fsdp.gather_rows(rows > 0, shard), full > 0)
        assert torch.equal(fsdp.take_local_rows(full.detach(), shard), expected)
        assert torch.equal(fsdp.local_rows(fsdp.shard_like(full.detach(), shard)), expected)
        assert torch.allclose(fsdp.mean_over_shards(rows, shard), full.mean())
        assert shard.grad is not None
        assert full.grad is not None
        assert torch.allclose(fsdp.gather_rows(fsdp.local_rows(shard.grad), shard), full.grad), "a sum, no mean"
        rows.mul_(2)  # in place: the parameter itself
    state = fsdp.gather_state_dict(sharded, keep=number == 0)
    assert state is not None
    assert sorted(state) == (sorted(plain.state_dict()) if number == 0 else [])
    for name, tensor in state.items():
        assert torch.equal(tensor, 2 * plain.state_dict()[name]), name
    assert int(fsdp.sum_over_shards(torch.tensor(number), next(sharded.parameters()))) == sum(range(RANKS))


def check_grafts(architecture: str, number: int) -> None:
    """Compare gradients and logits of a grafted student with and without sharding."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import toys

    def pair(sharded: bool) -> list[Any]:
        models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            models.append(toys.classifier(architecture, layers=3).requires_grad_(seed == 0))
            if sharded:
                fsdp.shard_model(models[-1], find_layer_stack(models[-1]), torch.device("cpu"))
            install_capture_hooks(models[-1])
        return models

    def run_backward(student: Any, teacher: Any, tokens: torch.Tensor, grafted: tuple[int, ...]) -> torch.Tensor:
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "output_hidden_states": True}
        layers = list(stack := find_layer_stack(student))
        for index in grafted:
            stack[index] = find_layer_stack(teacher)[index]
        outputs = student(**inputs)
        for index in grafted:
            stack[index] = layers[index]
        with torch.no_grad():
            targets = teacher(**inputs)
        pairs = [*zip(outputs.hidden_states, targets.hidden_states, strict=True), (outputs.logits, targets.logits)]
        sum((student_state - teacher_state).square().sum() for student_state, teacher_state in pairs).backward()
        return outputs.logits.detach()

    plain, sharded = pair(False), pair(True)
    tokens = torch.arange(RANKS * 5).view(RANKS, 5) % 7 + 5
    for grafted in ((), (0, 2), (1,)):
        expected = run_backward(*plain, tokens, grafted)
        logits = run_backward(*sharded, tokens[number : number + 1], grafted)
        assert torch.allclose(logits, expected[number : number + 1], atol=1e-5), (architecture, grafted)
        for (name, full), shard in zip(plain[0].named_parameters(), sharded[0].parameters(), strict=True):
            case = (architecture, grafted, name)
            assert (full.grad is None) == (shard.grad is None), case
            if full.grad is not None and shard.grad is not None:
                gradient, size = fsdp.gather_rows(fsdp.local_rows(shard.grad), shard), float(full.grad.abs().max())
                assert float((gradient - full.grad).abs().max()) <= 1e-4 * max(1.0, size), case
            full.grad = shard.grad = None


@pytest.mark.long
def test_rows_and_gathered_tensors_of_three_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = torch.multiprocessing.start_processes(
        run_rank, (port, tmp_path), nprocs=RANKS, join=False, start_method="spawn"
    )
    while not ranks.join():  # it returns when one of them has ended
        pass
    assert [(tmp_path / str(number)).read_text() for number in range(RANKS)] == ["well"] * RANKS


def test_an_unsharded_parameter_is_returned_whole() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    assert fsdp.local_rows(weight).data_ptr() == weight.data_ptr()
    assert not fsdp.local_rows(weight).requires_grad
    full = torch.ones(2, 2)
    for function in (fsdp.gather_rows, fsdp.take_local_rows, fsdp.sum_over_shards, fsdp.shard_like):
        assert function(full, weight) is full
    assert float(fsdp.mean_over_shards(full, weight)) == 1.0
    assert fsdp.gather_state_dict(nn.Linear(2, 2), keep=True) is None


def test_settings_incompatible_with_sharding_are_refused_at_once() -> None:
    for setting in (
        {"compile": True},
        {"precision": "fp16"},
        {"prune": {"grafting": {"kind": "blend"}}},
        {"finetune": {"clip_over": "all"}},
        {"prune": {"saliency": "logits"}},
    ):
        Recipe.model_validate(setting)
        with pytest.raises(ValueError, match="sharded weights do not go with"):
            Recipe.model_validate(setting | {"shard": True})


def test_the_refusal_is_one_line() -> None:
    with pytest.raises(RecipeError) as error:
        build_recipe("default", {"task": "demo"}, ["shard=true", "compile=true"])
    assert error.value.message == "sharded weights do not go with compile=true"


def test_accelerate_does_not_shard_behind_our_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(DeviceError, match="accelerate was told to use FSDP") as error:
        create_accelerator(Recipe(device="cpu"))
    assert "--set shard=true" in (error.value.hint or "")


def test_one_process_ignores_sharding_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    create_accelerator(Recipe(device="cpu", shard=True))
    assert "shard is ignored" in capsys.readouterr().err
