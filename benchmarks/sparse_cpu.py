"""Measure how fast engines run exact zeros on this CPU: encoders with random weights and random zeros.

    python benchmarks/sparse_cpu.py                               the whole table; about a quarter of an hour
    python benchmarks/sparse_cpu.py --models minilm-90 --threads 1 --shapes 1x32 1x128
    python benchmarks/sparse_cpu.py --models modernbert-90 mpnet-90 deberta-90
    python benchmarks/sparse_cpu.py --pattern 1x4                 zeros in blocks: sparse-cpu-int8 too
    python benchmarks/sparse_cpu.py --deepsparse-python PATH      with DeepSparse 1.8, by an interpreter that has it
    python benchmarks/sparse_cpu.py --openvino-python PATH        with OpenVINO int8, by one that has openvino and nncf

Engines: onnxruntime on the file with zeros (all optimisations, and only basic ones; the faster of the two is the 1x: it
multiplies zeros as fast as anything else), its dynamic int8, the targets sparse-cpu and sparse-cpu-int8 if they are
installed; OpenVINO's static int8 of the same weights, once with all else in float32 and once as OpenVINO chooses, which
is bfloat16 where the CPU has AMX; DeepSparse on the same zeros, in float32, and in int8 where they are in blocks. Speed
does not depend on what the weights are, but on where the zeros are; these are spread at random, evenly over each
matrix. The files are kept under --out and used again. Prints one Markdown table a model: medians of paired rounds.
"""

from __future__ import annotations

import argparse
import subprocess
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from deepsparse_int8 import quantize_for_deepsparse
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
BLOCK = 4  # inputs that are zero together in --pattern 1x4
CALIBRATION_ROWS = 8  # with random ids: they decide the scales, not the speed
DEEPSPARSE_WORKER = Path(__file__).with_name("deepsparse_worker.py")
OPENVINO_WORKER = Path(__file__).with_name("openvino_worker.py")
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
    """The files of one model.

    Attributes:
        packed: by the targets with kernels for zeros, without those that are not installed.
        openvino: of OpenVINO's int8, or None if there is no interpreter that has it.
        deepsparse: by name of the engine; none for architectures whose attention DeepSparse does not recognise.
    """

    dense: Path
    int8: Path
    packed: dict[str, Path]
    openvino: Path | None
    deepsparse: dict[str, Path]


def make_files(name: str, options: argparse.Namespace) -> Files:
    """Make the missing files of a model such as `minilm-90`; return all of them."""
    size, sparsity = name.split("-")
    in_blocks = options.pattern == "1x4"
    folder = options.out / (f"{name}-1x4" if in_blocks else name)
    if not (folder / "checkpoint/config.json").exists():
        model = _model(size, int(sparsity) / 100, BLOCK if in_blocks else 1)
        save_model(model, _tokenizer(folder, size), folder / "checkpoint")
    values = options.values
    recipe = build_recipe(flags={"device": "cpu"}, sets=[f"export.values={values}", f"export.embeddings={values}"])
    packed = _pack(folder, recipe, {"sparse-cpu": f"sparse-{values}"})
    if in_blocks:
        packed |= _pack(folder, build_recipe(flags={"device": "cpu"}), {"sparse-cpu-int8": "sparse-int8-blocks"})
    dense, int8 = folder / "dense/onnx/model.onnx", folder / "int8.onnx"
    if not dense.exists():
        Onnx().export(folder / "checkpoint", folder / "dense", recipe)
    if not int8.exists():
        quantize_dynamic_int8(dense, int8)
    openvino = folder / "openvino-int8.xml" if options.openvino_python else None
    if openvino is not None and not openvino.exists():
        _quantize_by_openvino(options.openvino_python, dense, openvino)
    deepsparse = {}
    if options.deepsparse_python and size not in ARCHITECTURES:
        deepsparse["deepsparse"] = folder / "classic.onnx"
        if not deepsparse["deepsparse"].exists():
            _classic(folder / "checkpoint", deepsparse["deepsparse"])
        if in_blocks:
            deepsparse["deepsparse int8"] = folder / "classic-int8.onnx"
            quantize_for_deepsparse(deepsparse["deepsparse"], deepsparse["deepsparse int8"])
    return Files(dense, int8, packed, openvino, deepsparse)


def _model(size: str, sparsity: float, block: int) -> Any:
    torch.manual_seed(0)
    architecture, further = ARCHITECTURES.get(size, ("bert", {}))
    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, **SPECIAL_TOKENS, **SIZES[size], **further)
    model: Any = AutoModelForSequenceClassification.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for weight in find_prunable_weights(model).values():
            blocks = weight.view(-1, block)
            order = torch.rand(len(blocks)).argsort()  # exactly that share of each matrix
            blocks[order[: round(sparsity * len(blocks))]] = 0
    return model


def _tokenizer(folder: Path, size: str) -> Any:
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]  # a name that transformers 5 adds late

    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = folder / "vocab.txt"
    words.write_text("\n".join([*special, *(f"w{number}" for number in range(VOCABULARY - len(special)))]) + "\n")
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if size not in ARCHITECTURES else [])
    return BertTokenizerFast(str(words), model_input_names=inputs)


def _pack(folder: Path, recipe: Recipe, folders: dict[str, str]) -> dict[str, Path]:
    """Export the checkpoint for targets, every time, because the plugin may have changed since the last call."""
    packed = {}
    for name, subfolder in folders.items():
        try:
            packed[name] = get_target(name).export(folder / "checkpoint", folder / subfolder, recipe)[0]
        except SpdError as error:
            console.warn(f"without {name}: {error.message}")
    return packed


def _quantize_by_openvino(python: str, dense: Path, out: Path) -> None:
    """Quantise a model statically by NNCF, on rows of random ids."""
    lengths = np.full(CALIBRATION_ROWS, 64)
    rows = out.with_name("calibration.npz")
    ids = np.random.default_rng(0).integers(1, VOCABULARY, lengths.sum())
    np.savez(rows, offsets=np.concatenate([[0], lengths.cumsum()]), input_ids=ids)
    subprocess.run([python, OPENVINO_WORKER, "quantize", dense, rows, out], check=True, stdout=subprocess.DEVNULL)


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


def engines(files: Files, options: argparse.Namespace) -> list[Engine]:
    """List the engines that can be timed here."""
    dense = Engine("onnxruntime", "onnxruntime", str(files.dense), VOCABULARY, baseline=True)
    other = replace(dense, baseline=False)
    timed_engines = [dense, replace(dense, name="onnxruntime basic", fused=False)]
    timed_engines.append(replace(other, name="int8", path=str(files.int8)))
    for name, file in files.packed.items():
        libraries = tuple(map(str, get_target(name).libraries(file.parent)))
        timed_engines.append(replace(other, name=name, path=str(file), libraries=libraries))
    if files.openvino is not None:
        exact = replace(other, name="openvino int8", path=str(files.openvino))
        exact = replace(exact, command=(options.openvino_python, str(OPENVINO_WORKER)))
        rounded = replace(exact, name="openvino int8 + bf16", command=(*exact.command, "serve-rounded"))
        timed_engines += [exact, rounded]
    for name, path in files.deepsparse.items():
        command = (options.deepsparse_python, str(DEEPSPARSE_WORKER))
        timed_engines.append(replace(other, name=name, path=str(path), command=command))
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
    ours = [name for name in other_engines if name.startswith("sparse-cpu")]
    rival_engines = [name for name in other_engines if name not in ours]
    head = [
        "threads",
        "shape",
        "rounds",
        "fused ms",
        "basic ms",
        *other_engines,
        *(f"{ours[-1]} / {name}" for name in rival_engines if ours),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for threads in bench.threads:
        for shape in bench.timings[0].rounds:
            dense = [bench.timing(name, threads).rounds[shape] for name in ("onnxruntime", "onnxruntime basic")]
            cells = [str(threads), str(shape), str(len(dense[0])), *(f"{np.median(times):.2f}" for times in dense)]
            cells += [str(bench.speedup(bench.timing(name, threads), [shape])) for name in other_engines]
            if ours:
                fastest = bench.timing(ours[-1], threads)
                cells += [str(paired_ratio([bench.timing(name, threads)], fastest, [shape])) for name in rival_engines]
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
    parser.add_argument("--pattern", default="unstructured", choices=("unstructured", "1x4"), help="of the zeros")
    parser.add_argument("--deepsparse-python", help="an interpreter that has deepsparse 1.8")
    parser.add_argument("--openvino-python", help="an interpreter that has openvino and nncf")
    parser.add_argument("--ledger", action="store_true", help="also every pruned matrix alone")
    parser.add_argument("--out", type=Path, default=Path("runs/sparse-cpu"))
    options = parser.parse_args()
    console.configure(as_json=True)  # keep standard output for the tables
    for name in options.models:
        files = make_files(name, options)
        timed_engines = engines(files, options)
        sizes = {engine.name: _model_bytes(Path(engine.path)) for engine in timed_engines}
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


def _model_bytes(file: Path) -> int:
    """Return the bytes of a model; OpenVINO keeps the weights in a second file."""
    weights = file.with_suffix(".bin")
    return file.stat().st_size + (weights.stat().st_size if weights.exists() else 0)


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
