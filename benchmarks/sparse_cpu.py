"""Measure how fast engines run exact zeros on this CPU: encoders with random weights and random zeros.

    python benchmarks/sparse_cpu.py                               the whole table; about a quarter of an hour
    python benchmarks/sparse_cpu.py --models minilm-90 --threads 1 --shapes 1x32 1x128
    python benchmarks/sparse_cpu.py --models modernbert-90 mpnet-90 deberta-90
    python benchmarks/sparse_cpu.py --deepsparse-python PATH      with DeepSparse 1.8, by an interpreter that has it

Engines: onnxruntime on the file with zeros (all optimisations, and only basic ones; the faster of the two is the 1x: it
multiplies zeros as fast as anything else), its dynamic int8, the target sparse-cpu if it is installed, DeepSparse on
the same zeros if it is given. Speed does not depend on what the weights are, but on where the zeros are; these are
spread at random, evenly over each matrix. The files are kept under --out and used again. Prints one Markdown table a
model: medians of paired rounds.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from spdtool import console
from spdtool.bench import ledger, ledger_tables
from spdtool.bench.dense_int8 import quantize_dynamic_int8
from spdtool.bench.engines import Engine, Shape
from spdtool.bench.latency import TimingResult, time_engines
from spdtool.bench.ratios import BenchData, paired_ratio
from spdtool.errors import SpdError
from spdtool.export.target import get_target
from spdtool.export.targets import Onnx
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_model, save_model
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import build_recipe

VOCABULARY = 30522  # of BERT's uncased tokenizer
# batch x length; `p`: rows padded to that length
SHAPES = ("1x32", "1x128", "8x128", "32x128", "8x128p", "32x128p")
LONG_SHAPES = ("1x32", "1x128", "8x128", "1x1024", "1x8192")  # of models that are made for long texts
WORKER = Path(__file__).with_name("deepsparse_worker.py")
IR_VERSION = 8  # the newest that DeepSparse 1.8 reads is 9
SIZES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "mpnet": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "deberta": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "modernbert": {"hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152},
}
# Of the sizes whose architecture is another than BERT's: its name, and the configuration of the published base model.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("mpnet", {"max_position_embeddings": 514}),
    "deberta": (
        "deberta-v2",
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_buckets": 256,
            "max_relative_positions": -1,
            "type_vocab_size": 0,
        },
    ),
    "modernbert": ("modernbert", {"max_position_embeddings": 8192, "local_attention": 128}),
}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}


@dataclass(frozen=True)
class Files:
    """The files of one model; `sparse` is the folder of the target sparse-cpu, None if it is not installed."""

    dense: Path
    int8: Path
    classic: Path
    sparse: Path | None


def make_files(name: str, out: Path, values: str) -> Files:
    """Make the missing files of a model such as `minilm-90`; return all of them."""
    size, sparsity = name.split("-")
    folder = out / name
    if not (folder / "checkpoint/config.json").exists():
        save_model(_model(size, int(sparsity) / 100), _tokenizer(folder, size), folder / "checkpoint")
    recipe = build_recipe(flags={"device": "cpu"}, sets=[f"export.values={values}", f"export.embeddings={values}"])
    files = Files(
        folder / "dense/onnx/model.onnx",
        folder / "int8.onnx",
        folder / "classic.onnx",
        _sparse(folder / "checkpoint", folder / f"sparse-{values}", recipe),
    )
    if not files.dense.exists():
        Onnx().export(folder / "checkpoint", folder / "dense", recipe)
    if not files.int8.exists():
        quantize_dynamic_int8(files.dense, files.int8)
    if size not in ARCHITECTURES and not files.classic.exists():
        _classic(folder / "checkpoint", files.classic)
    return files


def _model(size: str, sparsity: float) -> Any:
    torch.manual_seed(0)
    architecture, further = ARCHITECTURES.get(size, ("bert", {}))
    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, **SPECIAL_TOKENS, **SIZES[size], **further)
    model: Any = AutoModelForSequenceClassification.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for weight in find_prunable_weights(model).values():
            order = torch.rand(weight.numel()).argsort()  # exactly that share of each matrix
            weight.view(-1)[order[: round(sparsity * weight.numel())]] = 0
    return model


def _tokenizer(folder: Path, size: str) -> Any:
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]  # a name that transformers 5 adds late

    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = folder / "vocab.txt"
    words.write_text("\n".join([*special, *(f"w{number}" for number in range(VOCABULARY - len(special)))]) + "\n")
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if size not in ARCHITECTURES else [])
    return BertTokenizerFast(str(words), model_input_names=inputs)


def _sparse(checkpoint: Path, folder: Path, recipe: Recipe) -> Path | None:
    """Export the checkpoint for sparse-cpu, every time, because the plugin may have changed since the last call."""
    try:
        get_target("sparse-cpu").export(checkpoint, folder, recipe)
    except SpdError as error:
        console.warn(f"without sparse-cpu: {error.message}")
        return None
    return folder


def _classic(checkpoint: Path, file: Path) -> None:
    """Export the same weights with torch's older exporter, whose attention DeepSparse recognises."""
    model = load_model(checkpoint, eager=True)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
            return logits

    names = ["input_ids", "attention_mask", "token_type_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits().eval(),
            tuple(torch.ones((2, 9), dtype=torch.long) for _ in names),
            str(file),
            dynamo=False,
            opset_version=14,
            input_names=names,
            output_names=["logits"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names},
        )
    proto = onnx.load(file)
    proto.ir_version = IR_VERSION
    onnx.save(proto, file)


def engines(files: Files, deepsparse: str | None) -> list[Engine]:
    """List the engines that can be timed here."""
    dense = Engine("onnxruntime", "onnxruntime", str(files.dense), VOCABULARY, baseline=True)
    timed_engines = [dense, replace(dense, name="onnxruntime basic", fused=False)]
    timed_engines.append(replace(dense, name="int8", path=str(files.int8), baseline=False))
    if files.sparse is not None:
        file = files.sparse / json.loads((files.sparse / "manifest.json").read_text("utf-8"))["model"]
        libraries = tuple(map(str, get_target("sparse-cpu").libraries(files.sparse)))
        timed_engines.append(replace(dense, name="sparse-cpu", path=str(file), baseline=False, libraries=libraries))
    if deepsparse and files.classic.exists():
        command = (deepsparse, str(WORKER))
        timed_engines.append(
            replace(dense, name="deepsparse", path=str(files.classic), baseline=False, command=command)
        )
    return timed_engines


def shape_of(text: str) -> Shape:
    """Parse `8x128`, or `8x128p` for padded rows with shuffled real lengths spread evenly from 1 to 128."""
    batch, length = map(int, text.removesuffix("p").split("x"))
    if not text.endswith("p"):
        return Shape(batch, length)
    spread = np.maximum(1, np.rint(np.linspace(1, length, batch)).astype(int))
    return Shape(batch, length, tuple(np.random.default_rng(batch).permutation(spread).tolist()))


def table(result: TimingResult) -> str:
    """Format a Markdown table with a row per thread count and shape: dense milliseconds, then ratios to the faster."""
    bench = BenchData(result.timings, {})
    other_engines = [name for name in bench.engines if not name.startswith("onnxruntime")]
    rival_engines = [name for name in ("int8", "deepsparse") if "sparse-cpu" in other_engines and name in other_engines]
    head = [
        "threads",
        "shape",
        "rounds",
        "fused ms",
        "basic ms",
        *other_engines,
        *(f"sparse-cpu / {name}" for name in rival_engines),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for threads in bench.threads:
        for shape in bench.timings[0].rounds:
            dense = [bench.timing(name, threads).rounds[shape] for name in ("onnxruntime", "onnxruntime basic")]
            cells = [str(threads), str(shape), str(len(dense[0])), *(f"{np.median(times):.2f}" for times in dense)]
            cells += [str(bench.speedup(bench.timing(name, threads), [shape])) for name in other_engines]
            for name in rival_engines:
                cells.append(
                    str(paired_ratio([bench.timing(name, threads)], bench.timing("sparse-cpu", threads), [shape]))
                )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Make the models, time every engine, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["minilm-80", "minilm-90", "minilm-95", "bert-90"])
    parser.add_argument("--shapes", nargs="+", help="batch x length; a p at the end: padded")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=120.0, help="for the rounds of one model")
    parser.add_argument("--values", default="fp16", choices=("fp32", "fp16", "int8"), help="as sparse-cpu stores them")
    parser.add_argument("--deepsparse-python", help="an interpreter that has deepsparse 1.8")
    parser.add_argument("--ledger", action="store_true", help="also every pruned matrix alone")
    parser.add_argument("--out", type=Path, default=Path("runs/sparse-cpu"))
    options = parser.parse_args()
    console.configure(as_json=True)  # keep standard output for the tables
    for name in options.models:
        files = make_files(name, options.out, options.values)
        timed_engines = engines(files, options.deepsparse_python)
        sizes = {engine.name: Path(engine.path).stat().st_size for engine in timed_engines}
        print(f"\n## {name}\n\nBytes: " + ", ".join(f"{key} {size:,}" for key, size in sizes.items()) + "\n")
        result = time_engines(
            timed_engines,
            [shape_of(text) for text in options.shapes or (LONG_SHAPES if "modernbert" in name else SHAPES)],
            threads=options.threads,
            rounds=options.rounds,
            warmup=1,
            seconds=options.seconds,
        )
        print(table(result), flush=True)
        if options.ledger:
            packed = next((engine for engine in timed_engines if engine.name == "sparse-cpu"), None)
            _print_ledger(files, packed, options.threads)


def _print_ledger(files: Files, packed: Engine | None, threads: list[int]) -> None:
    sparse = None
    if packed is not None:
        operator = get_target("sparse-cpu").timing_operator
        assert operator is not None
        sparse = ledger.SparseFile(packed.path, packed.libraries, operator)
    machines, entries = ledger.measure_ledger(files.dense, sparse, threads)
    for count, peak in machines.items():
        print(f"\n{count} threads: peak {peak}", end="")
    first_of_shape = {(entry.rows, entry.columns): entry for entry in reversed(entries)}
    print("\n\n" + ledger_tables.matrix_table(list(reversed(first_of_shape.values()))), flush=True)


if __name__ == "__main__":
    main()
