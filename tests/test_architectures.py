"""Every supported family, as tiny random models from the rows of `toys.ARCHITECTURES`."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from toys import ARCHITECTURES, POSITIONS
from transformers import AutoModelForSequenceClassification

from spdtool.distillation.grafting import LayerDraw
from spdtool.distillation.losses import distillation_loss
from spdtool.distillation.outputs import compute_outputs
from spdtool.errors import ModelError
from spdtool.models import predict as evaluation
from spdtool.models.layers import (
    configure_layers,
    find_layer_stack,
    find_prunable_weights,
    install_capture_hooks,
    max_positions,
    select_trained_parameters,
)
from spdtool.models.load import load_model, save_model
from spdtool.pruning.allocation import zeros_in
from spdtool.recipe.training import Loss
from spdtool.run.folder import Run
from spdtool.tasks.classification import Classification
from spdtool.tasks.task import Task

DEPTH = 3
each_family = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
ALIKE = ("roberta", "xlm-roberta", "electra", "mpnet")  # their layers are named and computed nearly as BERT's
SCORES = Loss(attention=1.0)


def pair(toys: ModuleType, architecture: str, layers: int = DEPTH) -> tuple[Any, Any]:
    """Return a student and a teacher that differ only in their layers, with capture hooks."""
    teacher = toys.classifier(architecture, layers=layers).requires_grad_(False)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for weight in find_prunable_weights(student).values():
            weight.mul_(0.8)
    select_trained_parameters(student, "layers")
    for model in (student, teacher):
        install_capture_hooks(model)
    return student, teacher


def graft(student: Any, teacher: Any, seed: int = 0) -> LayerDraw:
    return LayerDraw(find_layer_stack(student), find_layer_stack(teacher), seed=seed)


def forward(model: Any, batch: dict[str, torch.Tensor], **outputs: bool) -> Any:
    return model(**{name: column for name, column in batch.items() if name != "labels"}, **outputs)


@each_family
def test_the_stack_and_its_linears_are_found(toys: ModuleType, architecture: str) -> None:
    model = toys.classifier(architecture, layers=DEPTH)
    stack = find_layer_stack(model)
    assert len(stack) == DEPTH
    prunable = find_prunable_weights(model)
    assert len(prunable) == DEPTH * ARCHITECTURES[architecture][2]
    inside = {id(parameter) for parameter in stack.parameters()}
    parameters = dict(model.named_parameters())
    for name, weight in prunable.items():
        assert weight is parameters[name]
        assert weight.dim() == 2
        assert id(weight) in inside
        assert min(weight.shape) >= 32, "a whole matrix of the layer"
    matrices = {name for name, weight in parameters.items() if id(weight) in inside and weight.dim() == 2}
    assert matrices == set(prunable), "no matrix of a layer is left out"
    assert max_positions(model) in (POSITIONS, None)


@each_family
def test_a_grafted_forward_always_returns_every_hidden_state(toys: ModuleType, architecture: str) -> None:
    student, teacher = pair(toys, architecture)
    grafting, batch = graft(student, teacher), toys.batch(architecture=architecture)
    modules = {name: id(module) for name, module in student.named_modules()}
    of_teacher = forward(teacher, batch, output_hidden_states=True, output_attentions=True)
    draws = set()
    with torch.no_grad():
        for _ in range(64):
            with grafting.mix(0.5) as draw:
                draws.add(tuple(draw))
                outputs = forward(student, batch, output_hidden_states=True, output_attentions=True)
            assert len(outputs.hidden_states) == DEPTH + 1
            assert len(outputs.attentions) == DEPTH
            first = draw.index(True) if True in draw else DEPTH
            for index in range(DEPTH):  # up to the student's first layer, the network is the teacher
                is_equal = torch.equal(outputs.hidden_states[index], of_teacher.hidden_states[index])
                assert is_equal == (index <= first), (draw, index)
            assert len(forward(teacher, batch, output_hidden_states=True).hidden_states) == DEPTH + 1
    assert len(draws) == 2**DEPTH, "every draw was tried"
    assert {name: id(module) for name, module in student.named_modules()} == modules


@each_family
def test_at_rate_0_the_student_computes_as_the_teacher_and_at_rate_1_as_itself(
    toys: ModuleType, architecture: str
) -> None:
    student, teacher = pair(toys, architecture)
    grafting, batch = graft(student, teacher), toys.batch(architecture=architecture)
    student_logits = forward(student, batch).logits
    assert not torch.allclose(student_logits, forward(teacher, batch).logits)
    with grafting.mix(0.0):
        assert torch.equal(forward(student, batch).logits, forward(teacher, batch).logits)
    with grafting.mix(1.0):
        assert torch.equal(forward(student, batch).logits, student_logits)


@each_family
def test_the_softmax_of_captured_scores_equals_the_attention(toys: ModuleType, architecture: str) -> None:
    model, batch = toys.classifier(architecture, layers=DEPTH), toys.batch(architecture=architecture)
    install_capture_hooks(model)
    with torch.no_grad():
        observed = compute_outputs(model, batch, hidden_states=True, attention="scores")
        outputs = forward(model, batch, output_attentions=True, output_hidden_states=True)
        probabilities = compute_outputs(model, batch, attention="probabilities")
    assert observed.attentions is not None
    assert probabilities.attentions is not None
    assert len(observed.attentions) == len(outputs.attentions) == DEPTH
    is_token = batch["attention_mask"].bool()
    for scores, attention, probability in zip(
        observed.attentions, outputs.attentions, probabilities.attentions, strict=True
    ):
        torch.testing.assert_close(scores.softmax(-1)[is_token[:, None].expand(-1, 2, -1)],
                                   attention[is_token[:, None].expand(-1, 2, -1)])  # fmt: skip
        assert torch.equal(probability, attention)
    assert torch.equal(observed.logits, outputs.logits)


@each_family
def test_gradient_checkpointing_gives_the_same_gradients(toys: ModuleType, architecture: str) -> None:
    if not toys.classifier(architecture).supports_gradient_checkpointing:
        with pytest.raises(ModelError, match="does not support gradient checkpointing"):
            configure_layers(toys.classifier(architecture), checkpointing=True, compile_layers=False)
        return
    batch = toys.batch(architecture=architecture)

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        student, teacher = pair(toys, architecture)
        configure_layers(student, checkpointing=checkpointing, compile_layers=False)
        student.train()
        grafting = graft(student, teacher, seed=3)
        for _ in range(2):
            with torch.no_grad():
                teacher_outputs = compute_outputs(teacher, batch, hidden_states=True, attention="scores")
            with grafting.mix(0.6) as draw:
                student_outputs = compute_outputs(student, batch, hidden_states=True, attention="scores")
            assert student_outputs.attentions is not None
            assert len(student_outputs.attentions) == DEPTH
            distillation_loss(student_outputs, teacher_outputs, batch, SCORES, logit_loss=Classification.logit_loss)[
                "loss"
            ].backward()
        assert any(draw)
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) >= len(find_prunable_weights(toys.classifier(architecture))) // DEPTH
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=pytest.mark.long if name in ALIKE else ()) for name in ARCHITECTURES],
)
def test_a_prune_stage_writes_exact_zeros_that_stock_transformers_reads(
    toys: ModuleType, architecture: str, toy_task: Callable[..., Task], toy_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    toy_task(architecture=architecture, layers=2, train=16, dev=8)
    at_save: dict[str, Any] = {}

    def save(model: Any, tokenizer: Any, folder: Path, weights: Any = None) -> None:
        logits = forward(model.eval(), toys.batch(architecture=architecture)).logits.detach()
        at_save.update(logits=logits, keys=set(model.state_dict()))
        original(model, tokenizer, folder, weights)

    original = save_model
    monkeypatch.setattr("spdtool.models.load.save_model", save)
    run = toy_run("prune.loss.attention=1", "teacher.epochs=1", sparsity=0.7, until="prune")
    folder = shutil.copytree(run.path / "prune", run.path.parent / "elsewhere")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for name, weight in find_prunable_weights(model).items():
        assert int((weight == 0).sum()) == zeros_in(weight.numel(), 0.7), name
    assert set(model.state_dict()) == at_save["keys"]
    logits = forward(model.eval(), toys.batch(architecture=architecture)).logits
    torch.testing.assert_close(logits, at_save["logits"], rtol=1e-5, atol=1e-5)
    metrics = run.training_result("prune")
    assert set(metrics.zeros) == set(find_prunable_weights(model))


@each_family
def test_every_key_survives_saving_and_loading(
    toys: ModuleType, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toys.classifier(architecture, layers=DEPTH)
    save_model(model, toys.tokenizer(), tmp_path)
    loaded = load_model(tmp_path, dropout=0.3, eager=True)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    smoke = load_model(tmp_path, smoke=True)
    rows = {name: column.numpy() for name, column in toys.batch(architecture=architecture).items()}
    assert len(find_layer_stack(smoke)) == 2
    assert np.isfinite(evaluation.torch_forward(smoke)(rows)).all()


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("albert", {"embedding_size": 16}, "albert_layer_groups of 1.*its 3 layers share the weights of 1"),
        ("mobilebert", {"embedding_size": 16}, "ffn of 3"),
        ("xlm", {"emb_dim": 32, "n_layers": 3, "n_heads": 2}, "attentions of 3"),
        ("flaubert", {"emb_dim": 32, "n_layers": 3, "n_heads": 2}, "attentions of 3"),
        ("bart", {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3}, "decoder.layers of 3"),
        ("squeezebert", {"embedding_size": 32}, "Conv1d"),
        ("ibert", {}, "QuantLinear"),
    ],
)
def test_an_unsupported_family_is_refused_with_the_reason(
    toys: ModuleType, architecture: str, config: dict[str, Any], message: str
) -> None:
    model = toys.classifier(architecture, layers=DEPTH, **config)
    with pytest.raises(ModelError, match=message) as error:
        find_prunable_weights(model)
    assert architecture in error.value.message


def test_funnel_is_refused_with_the_reason(toys: ModuleType) -> None:
    from transformers import FunnelConfig, FunnelForSequenceClassification

    config = FunnelConfig(vocab_size=24, block_sizes=[2, 2], d_model=32, n_head=2, d_head=16, d_inner=64)
    with pytest.raises(ModelError, match=r"one list of 4 layers was expected, found .*blocks of 2"):
        find_layer_stack(FunnelForSequenceClassification(config))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "g++", "clang"))), reason="torch.compile needs a compiler")
@pytest.mark.parametrize("attention", [0.0, 1.0], ids=["without attention", "with attention scores"])
def test_compiling_layer_by_layer_gives_the_same_loss_and_gradients(toys: ModuleType, attention: float) -> None:
    batch, weights = toys.batch(), Loss(attention=attention)
    attention_kind = "scores" if attention else None

    def run(compiled: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        student, teacher = pair(toys, "bert", layers=2)
        for model in (student, teacher):
            configure_layers(model, checkpointing=False, compile_layers=compiled)
        student.train()
        grafting, losses = graft(student, teacher, seed=1), []
        for _ in range(4):
            with torch.no_grad():
                teacher_outputs = compute_outputs(teacher, batch, hidden_states=True, attention=attention_kind)
            with grafting.mix(0.5):
                student_outputs = compute_outputs(student, batch, hidden_states=True, attention=attention_kind)
            loss = distillation_loss(
                student_outputs, teacher_outputs, batch, weights, logit_loss=Classification.logit_loss
            )["loss"]
            if loss.requires_grad:  # some layer of the draw is the student's
                loss.backward()
            losses.append(float(loss.detach()))
        return losses, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    plain, compiled = run(False), run(True)
    torch._dynamo.reset()
    assert compiled[0] == pytest.approx(plain[0], abs=1e-5)
    assert plain[1].keys() == compiled[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(compiled[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
def test_no_variant_of_a_compiled_layer_falls_back_to_plain_python(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiling(self, backend="eager", **options))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    student, teacher = pair(toys, "bert", layers=2)
    for model in (student, teacher):
        configure_layers(model, checkpointing=False, compile_layers=True)
    grafting = graft(student, teacher, seed=1)
    for number, (rows, length, unpadded) in enumerate(
        [(4, 9, 0), (3, 7, 1), (4, 5, 0), (1, 6, 1), (5, 11, 0), (2, 8, 1)]
    ):
        batch = toys.batch(rows, length, seed=number)
        if unpadded:
            batch["attention_mask"].fill_(1)
        for training in (True, False):  # in eval mode with gradients: calibration batches
            student.train(training)
            with torch.no_grad():
                compute_outputs(teacher, batch, hidden_states=True)
            for _ in range(3):
                with grafting.mix(0.5):
                    compute_outputs(student, batch, hidden_states=True)
        student.eval()
        with torch.inference_mode():
            student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    assert counters["frames"]["ok"] > 8
    assert counters["frames"]["ok"] == counters["frames"]["total"], "the rest hit the limit on forms of one function"
