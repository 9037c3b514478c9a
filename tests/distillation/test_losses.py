"""The distillation losses, against plain loops over their formulas; padding on either side changes nothing."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spdtool.data.tokens import IGNORED, LABELED
from spdtool.distillation import projections
from spdtool.distillation.layer_map import select_layers
from spdtool.distillation.losses import (
    attention_loss,
    distillation_loss,
    hidden_loss,
    relation_loss,
)
from spdtool.distillation.outputs import ModelOutputs, compute_outputs
from spdtool.models.layers import install_capture_hooks
from spdtool.recipe.training import Loss
from spdtool.tasks.classification import Classification
from spdtool.tasks.regression import Regression
from spdtool.tasks.spans import Spans
from spdtool.tasks.tokens import Tokens


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(x - max(row)) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def logits(rows: int = 4, labels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(rows, labels) * 2, torch.randn(rows, labels) * 2, torch.randint(0, labels, (rows,))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
@pytest.mark.parametrize("hardness", [0.0, 0.3, 1.0])
def test_the_logit_loss_is_the_divergence_times_t_squared_mixed_with_the_gold_labels(
    temperature: float, hardness: float
) -> None:
    student, teacher, labels = logits()
    soft = hard = 0.0
    for student_row, teacher_row, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p, q = softmax([x / temperature for x in teacher_row]), softmax([x / temperature for x in student_row])
        soft += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)) * temperature**2 / 4
        hard += -math.log(softmax(student_row)[label]) / 4
    weights = Loss(temperature=temperature, hardness=hardness)
    expected = hardness * soft + (1 - hardness) * hard
    assert float(Classification.logit_loss(student, teacher, labels, weights)) == pytest.approx(expected, rel=1e-5)


def test_the_factor_t_squared_keeps_the_size_of_the_gradient() -> None:
    def gradient(temperature: float) -> float:
        student, teacher, labels = logits()
        student = (student / 100).requires_grad_()
        Classification.logit_loss(student, teacher / 100, labels, Loss(temperature=temperature)).backward()
        assert student.grad is not None
        return float(student.grad.norm())

    assert gradient(8.0) == pytest.approx(gradient(1.0), rel=0.02), "near zero it does not depend on T"


def test_the_published_form_is_a_mean_over_labels_without_t_squared() -> None:
    student, teacher, labels = logits()
    total = 0.0
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax([x / 2 for x in teacher_row]), softmax([x / 2 for x in student_row])
        total += sum(-a * math.log(b) for a, b in zip(p, q, strict=True))
    weights = Loss(per_label=True, temperature=2.0)
    assert float(Classification.logit_loss(student, teacher, labels, weights)) == pytest.approx(total / 12, rel=1e-5)


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    student, _, labels = logits()
    assert float(Classification.logit_loss(student, student.clone(), labels, Loss())) == pytest.approx(0, abs=1e-6)
    assert float(Regression.logit_loss(student[:, :1], student[:, :1].clone(), torch.zeros(4), Loss())) == 0


@pytest.mark.parametrize("hardness", [0.0, 0.25, 1.0])
def test_regression_is_squared_error_to_teacher_and_gold(hardness: float) -> None:
    student, teacher, _ = logits(labels=1)
    gold = torch.tensor([1.0, 2.0, 3.0, 4.0])
    student_scores, teacher_scores = student[:, 0].tolist(), teacher[:, 0].tolist()
    soft = sum((a - b) ** 2 for a, b in zip(student_scores, teacher_scores, strict=True)) / 4
    hard = sum((a - b) ** 2 for a, b in zip(student_scores, gold.tolist(), strict=True)) / 4
    value = float(Regression.logit_loss(student, teacher, gold, Loss(regression_hardness=hardness)))
    assert value == pytest.approx(hardness * soft + (1 - hardness) * hard, rel=1e-5)


def states(seed: int, layers: int = 3, rows: int = 3, tokens: int = 5, width: int = 4) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(rows, tokens, width) for _ in range(layers)]


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def test_the_hidden_loss_is_a_mean_over_real_tokens_summed_over_layers() -> None:
    student, teacher = states(0), states(1)
    expected = expected_unmasked = 0.0
    for student_state, teacher_state in zip(student, teacher, strict=True):
        errors = [
            [float(((student_state[r, t] - teacher_state[r, t]) ** 2).mean()) for t in range(5)] for r in range(3)
        ]
        token_errors = [errors[r][t] for r in range(3) for t in range(5) if MASK[r, t]]
        expected += sum(token_errors) / len(token_errors)
        expected_unmasked += sum(map(sum, errors)) / 15
    assert float(hidden_loss(student, teacher, MASK)) == pytest.approx(expected, rel=1e-5)
    assert float(hidden_loss(student, teacher, None)) == pytest.approx(expected_unmasked, rel=1e-5)


def maps(seed: int, layers: int = 2, masked: float = torch.finfo(torch.float32).min) -> list[Tensor]:
    torch.manual_seed(seed)
    attention_scores = [torch.randn(3, 2, 5, 5) for _ in range(layers)]
    return [scores.masked_fill(MASK[:, None, None, :] == 0, masked) for scores in attention_scores]


@pytest.mark.parametrize("masked", [torch.finfo(torch.float32).min, -math.inf, -65504.0, -1e9])
def test_the_attention_loss_is_a_mean_over_pairs_of_real_tokens_and_heads(masked: float) -> None:
    student, teacher = maps(0, masked=masked), maps(1, masked=masked)
    expected = 0.0
    for student_map, teacher_map in zip(student, teacher, strict=True):
        errors = [
            float((student_map[r, h, i, j] - teacher_map[r, h, i, j]) ** 2)
            for r in range(3)
            for h in range(2)
            for i in range(5)
            for j in range(5)
            if MASK[r, i] and MASK[r, j]
        ]
        expected += sum(errors) / len(errors)
    assert float(attention_loss(student, teacher, MASK)) == pytest.approx(expected, rel=1e-5)


def test_pairs_masked_by_the_model_do_not_count() -> None:
    """In a local attention window some pairs of real tokens are masked."""
    student, teacher = maps(0, layers=1), maps(1, layers=1)
    window = (torch.arange(5)[:, None] - torch.arange(5)[None]).abs() <= 1
    near = [scores.masked_fill(~window, -math.inf) for scores in (*student, *teacher)]
    pairs = MASK[:, :, None].bool() & MASK[:, None, :].bool() & window
    errors = (student[0] - teacher[0]).square().transpose(0, 1)[:, pairs]
    assert float(attention_loss(near[:1], near[1:], MASK)) == pytest.approx(float(errors.mean()), rel=1e-5)


def test_masked_pairs_count_as_zero_error_if_padding_counts() -> None:
    student, teacher = maps(0), maps(1)
    expected = sum(
        float(
            (student_map.masked_fill(student_map < -1e4, 0) - teacher_map.masked_fill(teacher_map < -1e4, 0))
            .square()
            .mean()
        )
        for student_map, teacher_map in zip(student, teacher, strict=True)
    )
    assert float(attention_loss(student, teacher, None)) == pytest.approx(expected, rel=1e-5)


def test_masked_pairs_give_no_nan_in_the_gradient() -> None:
    student = [scores.clone().requires_grad_() for scores in maps(0, masked=-math.inf)]
    attention_loss(student, maps(1, masked=-math.inf), MASK).backward()
    for scores in student:
        assert scores.grad is not None
        assert bool(torch.isfinite(scores.grad).all())
        assert bool((scores.grad[torch.isinf(scores.detach())] == 0).all())


def relation(states: Tensor, heads: int, row: int, head: int, tokens: list[int]) -> list[list[float]]:
    """Softmax of scaled dot products between the tokens of a row, for one head of the width, in plain loops."""
    width = states.shape[-1] // heads
    slices = states[row, :, head * width : (head + 1) * width].tolist()
    scores = [
        [sum(a * b for a, b in zip(slices[i], slices[j], strict=True)) / math.sqrt(width) for j in tokens]
        for i in tokens
    ]
    return [softmax(line) for line in scores]


def test_the_relation_loss_is_a_divergence_per_real_query_summed_over_layers() -> None:
    student, teacher = states(0, width=8), states(1, width=4)  # widths that differ
    for masked, heads in itertools.product((True, False), (1, 2, 4)):
        expected = relation_loss_in_loops(student, teacher, masked, heads)
        value = float(relation_loss(student, teacher, MASK if masked else None, heads))
        assert value == pytest.approx(expected, rel=1e-5), (masked, heads)
        assert value > 0


def relation_loss_in_loops(student: list[Tensor], teacher: list[Tensor], masked: bool, heads: int) -> float:
    expected = 0.0
    for student_state, teacher_state in zip(student, teacher, strict=True):
        queries = []
        for row in range(3):
            tokens = [token for token in range(5) if MASK[row, token] or not masked]
            for head in range(heads):
                teacher_rows, student_rows = (
                    relation(state, heads, row, head, tokens) for state in (teacher_state, student_state)
                )
                queries += [
                    sum(p * (math.log(p) - math.log(q)) for p, q in zip(a, b, strict=True))
                    for a, b in zip(teacher_rows, student_rows, strict=True)
                ]
        expected += sum(queries) / len(queries)
    return expected


def test_padding_changes_no_relation_loss_and_gets_no_gradient() -> None:
    student, teacher = states(0), states(1)
    expected = relation_loss(student, teacher, MASK, 2)
    dirty = [[s.masked_fill(MASK[..., None] == 0, 1e3 * (1 + i)).requires_grad_() for s in model_states]
             for i, model_states in enumerate((student, teacher))]  # fmt: skip
    value = relation_loss(dirty[0], dirty[1], MASK, 2)
    torch.testing.assert_close(value, expected)
    value.backward()
    for state in dirty[0]:
        assert state.grad is not None
        assert bool((state.grad[MASK == 0] == 0).all())
        assert bool((state.grad[MASK == 1] != 0).any())
        assert bool(torch.isfinite(state.grad).all())


def test_rotated_states_have_no_relation_loss() -> None:
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    states_of = states(0)
    assert float(relation_loss([s @ rotation for s in states_of], states_of, MASK, 1)) == pytest.approx(0, abs=1e-5)


def test_relations_are_computed_in_float32_under_autocast() -> None:
    student, teacher = states(0), states(1)
    expected = relation_loss(student, teacher, MASK, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(relation_loss(student, teacher, MASK, 2), expected)


def test_the_losses_compare_mapped_layers_through_projections() -> None:
    """A student of one layer of width 2 beside a teacher of two layers of width 4."""
    matrices = projections.create_projections(1, 2, 4, seed=0)
    student = ModelOutputs(logits()[0][:3], tuple(states(0, layers=2, width=2)), tuple(maps(0, layers=1)))
    teacher = ModelOutputs(logits()[1][:3], tuple(states(1, layers=3)), tuple(maps(1, layers=2)))
    batch = {"attention_mask": MASK, "labels": torch.tensor([0, 1, 2])}
    weights = Loss(attention=1.0, relation=1.0, relation_heads=2)
    assert student.hidden_states is not None
    assert teacher.hidden_states is not None
    assert student.attentions is not None
    assert teacher.attentions is not None
    for layer in (1, 2):
        selected = select_layers(teacher, (layer,))
        terms = distillation_loss(
            student, selected, batch, weights, logit_loss=Classification.logit_loss, projections=matrices
        )
        teacher_states = [teacher.hidden_states[0], teacher.hidden_states[layer]]
        projected = [student.hidden_states[i] @ matrices[f"projection.{i}"].T for i in range(2)]
        torch.testing.assert_close(terms["hidden"], hidden_loss(projected, teacher_states, MASK))
        torch.testing.assert_close(terms["relation"], relation_loss(student.hidden_states, teacher_states, MASK, 2))
        teacher_maps = [teacher.attentions[layer - 1]]
        torch.testing.assert_close(terms["attention"], attention_loss(student.attentions, teacher_maps, MASK))
    terms["loss"].backward()
    assert all(weight.grad is not None and bool((weight.grad != 0).any()) for weight in matrices.values())


def observation(seed: int) -> ModelOutputs:
    return ModelOutputs(logits(3, 3, seed)[0], tuple(states(seed)), tuple(maps(seed)))


@pytest.mark.parametrize(
    "weights",
    [
        Loss(logits=0.5, hidden=2.0, attention=0.3),
        Loss(hidden=0),
        Loss(logits=0),
        Loss(logits=0, hidden=0),
        Loss(hidden=0, relation=0.7, relation_heads=2),
        Loss(relation=3.0, relation_heads=4),
    ],
)
def test_the_loss_is_the_weighted_sum_of_its_nonzero_terms(weights: Loss) -> None:
    batch = {"attention_mask": MASK, "labels": torch.tensor([0, 1, 2])}
    terms = distillation_loss(observation(0), observation(1), batch, weights, logit_loss=Classification.logit_loss)
    names = {name for name in ("logits", "hidden", "attention", "relation") if getattr(weights, name) > 0}
    assert set(terms) == {"loss"} | names
    expected = sum(getattr(weights, name) * float(terms[name]) for name in names)
    assert float(terms["loss"]) == pytest.approx(expected)


def test_regression_uses_its_logit_loss_and_mask_padding_affects_both_terms() -> None:
    batch = {"attention_mask": MASK, "labels": torch.tensor([0.5, 1.5, 2.5])}
    student_outputs, teacher_outputs = observation(0), observation(1)
    student, teacher = (
        ModelOutputs(o.logits[:, :1], o.hidden_states, o.attentions) for o in (student_outputs, teacher_outputs)
    )
    terms = distillation_loss(student, teacher, batch, Loss(attention=1), logit_loss=Regression.logit_loss)
    assert torch.equal(terms["logits"], F.mse_loss(student.logits[:, 0], teacher.logits[:, 0]))
    unmasked = distillation_loss(
        student, teacher, batch, Loss(attention=1, mask_padding=False), logit_loss=Regression.logit_loss
    )
    assert student.hidden_states is not None
    assert teacher.hidden_states is not None
    assert torch.equal(unmasked["hidden"], hidden_loss(student.hidden_states, teacher.hidden_states, None))
    assert float(unmasked["attention"]) < float(terms["attention"]), "diluted by padding"


def padded(batch: dict[str, Tensor], extra: int, on_left: bool) -> dict[str, Tensor]:
    """Return the same rows with `extra` more padding positions, all on one side."""
    longer: dict[str, Tensor] = {"labels": batch["labels"]}
    rows, length = batch["input_ids"].shape
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        longer[name] = torch.zeros(rows, length + extra, dtype=torch.long)
        for row, length_of_row in enumerate(batch["attention_mask"].sum(1).tolist()):
            start = length + extra - length_of_row if on_left else 0
            longer[name][row, start : start + length_of_row] = batch[name][row, :length_of_row]
    return longer


@pytest.mark.parametrize("on_left", [False, True], ids=["right", "left"])
def test_padding_on_either_side_changes_no_loss(toys: ModuleType, on_left: bool) -> None:
    """Position embeddings are zero, so that left padding moves tokens without changing their states."""
    student, teacher = (toys.classifier("bert", seed=seed) for seed in (0, 1))
    for model in (student, teacher):
        install_capture_hooks(model)
        with torch.no_grad():
            model.bert.embeddings.position_embeddings.weight.zero_()
            model.bert.pooler.dense.weight.zero_()  # it reads the first position, which left padding moves
    weights, captured = (
        Loss(attention=1.0, relation=1.0, relation_heads=4),
        {"hidden_states": True, "attention": "scores"},
    )

    def terms(batch: dict[str, Tensor]) -> dict[str, float]:
        with torch.no_grad():
            losses = distillation_loss(
                compute_outputs(student, batch, **captured),
                compute_outputs(teacher, batch, **captured),
                batch,
                weights,
                logit_loss=Classification.logit_loss,
            )
        return {name: float(value) for name, value in losses.items()}

    plain = toys.batch()
    expected = terms(plain)
    assert min(expected["hidden"], expected["attention"], expected["relation"]) > 0
    assert terms(padded(plain, 7, on_left)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_layers_compared_together_are_those_compared_one_by_one(masked: bool) -> None:
    torch.manual_seed(0)
    student = [torch.randn(3, 5, 8, requires_grad=True) for _ in range(4)]
    teacher = [torch.randn(3, 5, 8) for _ in range(4)]
    mask = (torch.arange(5)[None] < torch.tensor([5, 3, 1])[:, None]).long() if masked else None
    outcomes = []
    for together in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=together):  # as on a GPU
            loss = hidden_loss(student, teacher, mask)
        outcomes.append([loss, *torch.autograd.grad(loss, student)])
    for expected, actual in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected)
    wider = hidden_loss([*student[:3], torch.randn(3, 5, 4)], [*teacher[:3], torch.randn(3, 5, 4)], mask)
    assert bool(wider.isfinite()), "shapes that differ are compared one by one"


@pytest.mark.parametrize("hardness", [1.0, 0.4])
def test_labels_of_unlabelled_rows_say_what_is_compared_and_never_what_is_right(hardness: float) -> None:
    """Each word counts alike, in whichever row it is; each window of a question has one begin and one end."""
    generator = torch.Generator().manual_seed(0)
    words = torch.tensor([[0, 1, 2], [IGNORED, 0, IGNORED], [0, 0, IGNORED]])
    marks = torch.tensor([True, False, False])
    section, teacher_only = Loss(hardness=hardness, hidden=0), Loss(hidden=0)
    for kind, labels, width in ((Tokens, words, 3), (Spans, torch.tensor([[1, 2], [0, 0], [0, 0]]), 2)):
        student, teacher = (torch.randn(3, 3, width, generator=generator) for _ in range(2))
        outputs = [ModelOutputs(each, None, None) for each in (student, teacher)]
        batch = {"attention_mask": torch.ones(3, 3), "labels": labels, LABELED: marks}
        loss = distillation_loss(*outputs, batch, section, logit_loss=kind.logit_loss)["loss"]
        counts = (labels != IGNORED).sum(1)
        expected = 0.0
        for row in range(3):
            only = slice(row, row + 1)
            term = kind.logit_loss(student[only], teacher[only], labels[only], section if marks[row] else teacher_only)
            expected += float(term * counts[row] / counts.sum())
        assert float(loss) == pytest.approx(expected, rel=1e-5), kind
        changed = torch.where(marks[:, None] | (labels == IGNORED), labels, 1)
        other = distillation_loss(*outputs, batch | {"labels": changed}, section, logit_loss=kind.logit_loss)["loss"]
        assert torch.equal(loss, other), kind
