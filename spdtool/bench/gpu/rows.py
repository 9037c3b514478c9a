"""The rows of a bench on a GPU: the dense teacher in what people really run there, and the student in the same.

torch in four precisions, in a CUDA graph and compiled; onnxruntime with buffers on the device, in a
CUDA graph, and with padding removed. A row is the 1x only if its dev score was measured and passes;
see `scores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from spdtool.bench.engines import Precision
from spdtool.bench.gpu.hardware import free_gpu_memory
from spdtool.bench.gpu.packing import pack_rows
from spdtool.bench.gpu.scores import TorchScore, score_precisions
from spdtool.bench.lineup import Lineup
from spdtool.bench.ratios import ModelFile
from spdtool.bench.sizes import STUDENT_IN
from spdtool.errors import ModelError, SpdError
from spdtool.recipe.fields import Recipe

PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")
TORCH_GRAPH = "torch fp16 graph"
TWO_OF_FOUR = "torch 2:4"
FUSED_FP16 = "onnx-ort-fp16"
CONTEXT_BYTES = 2**30  # of a CUDA context with the kernels of torch or onnxruntime, and some activations
WEIGHT_COPIES = 3  # of the checkpoint's bytes: weights, workspace of the products, what an allocator holds on to


def add_gpu_rows(lineup: Lineup, checkpoints: dict[str, Path], scratch: Path, recipe: Recipe) -> None:
    """Add the rows of a GPU, and say of each dense one whether its score passes.

    Args:
        checkpoints: by role.
    """
    plain = lineup.engines[0]
    add_torch_rows(lineup, checkpoints, recipe)
    if plain.kind == "onnxruntime":
        add_onnx_rows(lineup, scratch)
    dense = set(lineup.dense)
    lineup.engines = [replace(engine, baseline=engine.name in dense) for engine in lineup.engines]


def add_torch_rows(lineup: Lineup, checkpoints: dict[str, Path], recipe: Recipe) -> None:
    """Add the torch rows of the teacher, and of the student in a CUDA graph, with their scores."""
    if not recipe.bench.torch:
        return
    plain = lineup.engines[0]
    eager = replace(plain, kind="torch", path=str(checkpoints["teacher"]), libraries=(), target="", optional=True)
    rows = [replace(eager, name=f"torch {precision}", precision=precision) for precision in PRECISIONS]
    half = replace(eager, precision="fp16")
    rows.append(replace(half, name=TORCH_GRAPH, graph=True))
    if recipe.bench.compiled:
        rows.append(replace(half, name="torch fp16 compiled", compiled=True))
    rows.append(replace(half, name=TWO_OF_FOUR, semi_structured=True))
    scores = try_scores(lineup, checkpoints["teacher"], PRECISIONS, recipe)
    for row in rows:
        lineup.engines.append(row)
        if row.semi_structured:
            lineup.notes.append(f"{TWO_OF_FOUR}: two weights of four without training; its score means nothing.")
        elif row.precision == "fp32" or scores.get(row.precision, TorchScore(None, None, passes=False)).passes:
            lineup.dense.append(row.name)  # float32 computes the checkpoint itself
        else:
            lineup.notes.append(f"{row.name} is no 1x: {reason_against(scores.get(row.precision))}.")
    student = lineup.files["student"]
    student_score = try_scores(lineup, checkpoints["student"], ("fp16",), recipe).get("fp16")
    name = f"{STUDENT_IN} {TORCH_GRAPH}"
    row = replace(half, name=name, path=str(checkpoints["student"]), graph=True, shrinks=True, baseline=False)
    lineup.engines.append(row)
    lineup.students.append(name)
    lineup.files[name] = ModelFile(
        checkpoint_bytes(checkpoints["student"]),
        size=student.size,
        sparsity=student.sparsity,
        score=student_score.score if student_score else None,
        checkpoint_score=student_score.checkpoint_score if student_score else None,
    )


def try_scores(lineup: Lineup, checkpoint: Path, precisions: Sequence[str], recipe: Recipe) -> dict[str, TorchScore]:
    """Score a checkpoint in torch, in each precision; empty, with a note, where its dev set cannot be read."""
    try:
        return score_precisions(checkpoint, precisions, recipe, device="cuda")
    except (SpdError, RuntimeError) as error:  # torch raises RuntimeError where memory runs out
        lineup.notes.append(f"torch in other precisions is not scored: {str(error).splitlines()[0]}.")
        return {}


def reason_against(score: TorchScore | None) -> str:
    """Why a row cannot be the 1x."""
    if score is None or score.score is None:
        return "its dev score is not measured"
    return f"its dev score is {score.score:.4f}, that of its checkpoint {score.checkpoint_score or 0:.4f}"


def add_onnx_rows(lineup: Lineup, scratch: Path) -> None:
    """Add the files of the teacher with buffers on the device, as CUDA graphs and packed, and the student's graph."""
    lineup.dense += [name for name in ("teacher", *lineup.pairs.values()) if name not in lineup.dense]
    best = FUSED_FP16 if FUSED_FP16 in lineup.pairs else next(iter(lineup.pairs), None)
    dense_name = "teacher" if best is None else lineup.pairs[best]
    student_name = "student" if best is None else best
    dense, student = lineup.engine(dense_name), lineup.engine(student_name)
    for row in (
        replace(dense, name=f"{dense_name} bound", bound=True, optional=True),
        replace(dense, name=f"{dense_name} graph", graph=True, optional=True),
    ):
        lineup.engines.append(row)
        lineup.files[row.name] = lineup.files[dense_name]
        lineup.dense.append(row.name)
    name = f"{STUDENT_IN} {dense_name} graph"
    lineup.engines.append(replace(student, name=name, graph=True, optional=True))
    lineup.files[name] = lineup.files[student_name]
    lineup.students += [name, *lineup.pairs]
    if best != FUSED_FP16:
        return
    file = scratch / "packed.onnx"
    try:
        proto = onnx.load(dense.path)
        pack_rows(proto)
        onnx.save(proto, file)
    except ModelError as error:
        lineup.notes.append(f"Not timed: packed: {error.message}.")
        return
    lineup.engines.append(replace(dense, name=f"{dense_name} packed", path=str(file), optional=True))
    lineup.notes.append("The packed row computes no padding; its score is not measured, so it is no 1x.")


def use_torch_only(lineup: Lineup, checkpoints: dict[str, Path], reason: str) -> None:
    """Time both roles in torch in place of their files, where onnxruntime does not run on the GPU."""
    names = {"teacher": checkpoints["teacher"], "student": checkpoints["student"]}
    engines = []
    for engine in lineup.engines:
        if engine.name in names:
            path = str(names[engine.name])
            shrinks = engine.name == "student"
            engines.append(replace(engine, kind="torch", path=path, provider="cuda", libraries=(), shrinks=shrinks))
    lineup.engines = engines
    lineup.pairs.clear()
    lineup.sparse.clear()
    lineup.dense.append("teacher")
    lineup.notes.append(f"Only torch was timed, teacher and student among it: {reason}.")


def checkpoint_bytes(checkpoint: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def engines_at_once(checkpoint: Path) -> int | None:
    """How many engines fit into the GPU's free memory together; None where it does not tell."""
    free = free_gpu_memory()
    if free is None:
        return None
    return max(2, free // (CONTEXT_BYTES + WEIGHT_COPIES * checkpoint_bytes(checkpoint)))
