"""Items of `gpu.py` that need torch, transformers and, for the last one, onnxruntime; none of them trains."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

from gpu import Context, Item, NotAvailableError, describe_error

SHAPES = ((1, 128), (8, 128), (32, 128), (128, 128))
TINY_SHAPES = ((1, 8), (2, 8))
SECONDS = 0.4  # of each timing
SMI_FIELDS = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,mig.mode.current"
SMI_TIMEOUT = 30.0  # seconds
COPIED = 2**30  # float32 numbers
TYPES = {"bf16": "bfloat16", "fp16": "float16"}  # the others are float32
FACTS_SECONDS = 30  # torch is read from a cold disk, and the driver is loaded
ROW_SECONDS, COMPILED_SECONDS = 5, 60  # that a row may take; compiling has a compiler started
MODELS = ("torch", "transformers")
GRAPHS = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "pydantic", "rich")


def measure_machine(context: Context) -> dict[str, Any]:
    """Versions, the processor and the card."""
    from importlib import metadata

    import torch

    figures = context.figures
    figures |= {"python": platform.python_version(), "processor": processor()}
    for package in ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "onnx", "pydantic"):
        try:
            figures[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            figures[package] = "not installed"
    figures["CUDA of torch"] = torch.version.cuda or "none"
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
        # the first call after a boot loads the driver
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SMI_TIMEOUT)
        for line in answer.stdout.splitlines()[:1]:
            figures |= dict(zip(SMI_FIELDS.split(","), map(str.strip, line.split(",")), strict=False))
    for program_name in ("nvcc", "gcc"):
        figures[program_name] = shutil.which(program_name) or "not there"
    if context.device == "cuda":
        if not torch.cuda.is_available():
            raise NotAvailableError("torch finds no CUDA device")
        figures["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        free, total = torch.cuda.mem_get_info()
        figures["free GB"], figures["total GB"] = free / 1e9, total / 1e9  # less where others are on the card
    return figures


def processor() -> str:
    """Model of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure_ceilings(context: Context) -> dict[str, Any]:
    """Bytes a second of a copy, and operations a second of a large product in each precision."""
    import torch

    size = 128 if context.tiny else 8192
    figures = context.figures
    numbers = 2**16 if context.tiny else COPIED
    if context.device == "cuda":  # a shared card, or a part of one
        numbers = min(numbers, torch.cuda.mem_get_info()[0] // 16)
    source = torch.empty(numbers, dtype=torch.float32, device=context.device)
    target = torch.empty_like(source)
    milliseconds = time_calls(context, functools.partial(target.copy_, source))
    figures["copy GB/s"] = 2 * source.numel() * 4 / milliseconds / 1e6
    del source, target  # 8 GB that the products do not need
    for name, dtype, precision in (
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
        ("fp16", torch.float16, "highest"),
    ):
        first, second = (torch.randn(size, size, device=context.device).to(dtype) for _ in range(2))
        torch.set_float32_matmul_precision(precision)
        milliseconds = time_calls(context, functools.partial(torch.matmul, first, second))
        figures[f"{name} TFLOP/s"] = 2 * size**3 / milliseconds / 1e9
    torch.set_float32_matmul_precision("highest")
    return figures


def time_calls(context: Context, call: Callable[[], object]) -> float:
    """Milliseconds of a call, without waiting between calls; the first ones do not count."""
    import torch

    wait: Callable[[], object] = torch.cuda.synchronize if context.device == "cuda" else lambda: None
    for _ in range(1 if context.tiny else 3):
        call()
    wait()
    start, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start < (0.01 if context.tiny else SECONDS):
        call()
        count += 1
        if count % 10 == 0:
            wait()  # else the queue grows for as long as the host is ahead
    wait()
    return (time.perf_counter() - start) / count * 1000


def measure_torch_inference(context: Context) -> dict[str, Any]:
    """Milliseconds of a batch in every form of torch: as a client sees it, and on the device."""
    import torch

    shapes: tuple[tuple[int, int], ...] = TINY_SHAPES if context.tiny else SHAPES
    for form in ("fp32", "tf32", "bf16", "fp16", "fp16 graph"):
        precision, _, way = form.partition(" ")
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        model = encoder(context).to(getattr(torch, TYPES.get(precision, "float32")))
        for rows, tokens in shapes:
            add_row(context, f"{form} {rows}x{tokens}", time_form, model.eval(), rows, tokens, graph=way == "graph")
    torch.set_float32_matmul_precision("highest")
    if not context.tiny:  # the compiler alone takes longer than all else
        compiled = torch.compile(encoder(context).half().eval(), dynamic=False)
        rows, tokens = SHAPES[2]
        name = f"fp16 compiled {rows}x{tokens}"
        add_row(context, name, time_form, compiled, rows, tokens, graph=False, seconds=COMPILED_SECONDS)
    return context.figures


def add_row(
    context: Context,
    name: str,
    measure: Callable[..., dict[str, float]],
    *arguments: Any,
    seconds: float = ROW_SECONDS,
    **options: Any,
) -> None:
    """Add the figures of one row, or why there are none: a row that does not work must not cost the others theirs."""
    if not context.has_time(seconds):
        context.figures[name] = f"skipped: it may take {seconds:.0f} s, and the item would not end in time"
        return
    try:
        context.figures[name] = measure(context, *arguments, **options)
    except Exception as error:  # compilers raise many kinds
        context.figures[name] = f"not possible: {describe_error(error)}"


def encoder(context: Context, width: int = 768, layers: int = 12) -> Any:
    """Build a BERT with random weights on the device, or a toy."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    if context.tiny:
        width, layers = 32, 2
    config = BertConfig(
        vocab_size=100 if context.tiny else 30522,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        intermediate_size=4 * width,
    )
    with torch.device(context.device):  # drawing 110 million numbers takes a processor longer than a row
        return BertForSequenceClassification(config)


# model (width, layers), rows
TRAINED = {
    "BERT-base 32": (768, 12, 32),
    "BERT-base 128": (768, 12, 128),
    "MiniLM 32": (384, 6, 32),
}
TRAINED_TOKENS = 128


def measure_plain_training(context: Context) -> dict[str, Any]:
    """Milliseconds of a step of plain torch, without spdtool: forward, backward, clipping and AdamW."""
    for name, (width, layers, rows) in TRAINED.items():
        forms = ["fp32", "tf32"] if name == "BERT-base 32" else []
        for form in (*forms, "bf16", "bf16 graph"):
            add_row(context, f"{name} {form}", time_training, form, width, layers, rows)
    if not context.tiny:
        shape = TRAINED["BERT-base 32"]
        add_row(context, "BERT-base 32 bf16 compiled", time_training, "bf16 compiled", *shape, seconds=COMPILED_SECONDS)
    return context.figures


def time_training(context: Context, form: str, width: int, layers: int, rows: int) -> dict[str, float]:
    """Milliseconds of a training step in one form, and its share of the peak."""
    import torch

    precision, _, way = form.partition(" ")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    model = encoder(context, width, layers).train()
    # a graph counts its steps on the device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=way == "graph")
    tokens = 8 if context.tiny else TRAINED_TOKENS
    inputs = torch.randint(5, 90, (2 if context.tiny else rows, tokens), device=context.device)
    labels = torch.zeros(len(inputs), dtype=torch.long, device=context.device)
    forward = torch.compile(model, dynamic=False) if way == "compiled" else model

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(context.device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss.detach()

    try:
        milliseconds = time_calls(context, capture(context, step)[0] if way == "graph" else step)
    finally:
        torch.set_float32_matmul_precision("highest")
    products = 12 * width * width * layers + 2 * TRAINED_TOKENS * width * layers
    return with_share(context, milliseconds, 6 * rows * TRAINED_TOKENS * products)


def with_share(context: Context, milliseconds: float, operations: float) -> dict[str, float]:
    """Return the figures of a row that has this many floating-point operations."""
    teraflops = operations / milliseconds / 1e9
    figures = {"ms": milliseconds, "TFLOP/s": teraflops}
    peak = context.measured.get("ceilings", {}).get("bf16 TFLOP/s")
    if peak:
        figures["share of the bf16 peak"] = teraflops / peak
    return figures


def capture(context: Context, compute: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    """Capture a computation in a CUDA graph; return what replays it, and its result."""
    if context.device != "cuda":
        raise RuntimeError("a CPU has no CUDA graph")
    from spdtool.bench.gpu.torch_forms import capture_graph

    return capture_graph(compute)


def time_form(context: Context, model: Any, rows: int, tokens: int, *, graph: bool) -> dict[str, float]:
    """Time a model at one shape without padding."""
    import torch

    host = torch.randint(5, 90, (rows, tokens))
    inputs = host.to(context.device)

    def compute() -> Any:
        with torch.no_grad():
            return model(input_ids=inputs).logits

    if graph:
        replay, logits = capture(context, compute)
        device = time_calls(context, replay)

        def answer() -> Any:
            inputs.copy_(host)
            replay()
            return logits.cpu()

    else:
        device = time_calls(context, compute)

        def answer() -> Any:
            inputs.copy_(host)
            return compute().cpu()

    return {"client ms": time_calls(context, answer), "device ms": device}


def measure_onnx_inference(context: Context) -> dict[str, Any]:
    """Milliseconds of a batch in onnxruntime: fp32, fp16, fused fp16; plain, bound and as a CUDA graph."""
    from dataclasses import replace

    import onnx

    from spdtool.bench.engines import Engine, Shape, make_batch, open_onnxruntime, time_batch
    from spdtool.bench.gpu.packing import pack_rows
    from spdtool.errors import SpdError
    from spdtool.export import onnx_session

    problem = onnx_session.provider_problem(context.device)
    if problem is not None:
        raise NotAvailableError(f"onnxruntime does not run on {context.device}: {problem}")
    forms = onnx_forms(context)
    figures = context.figures
    for name, proto in forms.items():
        file = context.folder / f"{name}.onnx"
        onnx.save(proto, file)
        plain = Engine(name, "onnxruntime", str(file), vocabulary=90, provider=context.device, threads=1)
        engines = {name: plain}
        if name == "fused fp16":
            engines |= {f"{name} bound": replace(plain, bound=True), f"{name} graph": replace(plain, graph=True)}
        for form, engine in engines.items():
            if not context.has_time(ROW_SECONDS):
                figures[form] = "skipped: the item would not end in time"
                continue
            try:
                opened = open_onnxruntime(engine)
                for rows, tokens in TINY_SHAPES if context.tiny else SHAPES:
                    batch = make_batch(Shape(rows, tokens), engine)
                    opened.run(batch)
                    timed = time_batch(opened, batch, 0.01 if context.tiny else SECONDS)
                    figures[f"{form} {rows}x{tokens}"] = {"client ms": timed["ms"], "device ms": timed["device_ms"]}
            except SpdError as error:
                figures[form] = f"not possible: {error.message}"
    packed = forms["fused fp16"]
    pack_rows(packed)
    figures["packed fp16"] = time_packed(context, packed)
    return figures


def time_packed(context: Context, proto: Any) -> Any:
    """Time a batch that is half padding, with padding removed."""
    import onnx

    from spdtool.bench.engines import Engine, Shape, make_batch, open_onnxruntime, time_batch
    from spdtool.errors import SpdError

    file = context.folder / "packed.onnx"
    onnx.save(proto, file)
    rows, tokens = (TINY_SHAPES if context.tiny else SHAPES)[-1]
    real = tuple(max(1, tokens * (row + 1) // rows) for row in range(rows))
    engine = Engine("packed", "onnxruntime", str(file), vocabulary=90, provider=context.device, threads=1)
    try:
        opened = open_onnxruntime(engine)
        timed = time_batch(opened, make_batch(Shape(rows, tokens, real), engine), 0.01 if context.tiny else SECONDS)
    except SpdError as error:
        return f"not possible: {error.message}"
    return {f"{rows}x{tokens} half padding, client ms": timed["ms"]}


def onnx_forms(context: Context) -> dict[str, Any]:
    """Graphs of the encoder: float32, fp16, and fused fp16 with row lengths."""
    from spdtool.data.demo import demo_tokenizer
    from spdtool.export.graph.fp16 import convert_to_fp16
    from spdtool.export.graph.fuse import fuse_operators
    from spdtool.export.graph.row_lengths import remove_dead_nodes, use_row_lengths
    from spdtool.export.graph.trace import trace_checkpoint
    from spdtool.models.load import save_model

    checkpoint = context.folder / "encoder"
    save_model(encoder(context), demo_tokenizer(), checkpoint)
    plain = trace_checkpoint(checkpoint, 18)
    fused = fuse_operators(trace_checkpoint(checkpoint, 18))
    use_row_lengths(fused)
    remove_dead_nodes(fused.graph)
    half = convert_to_fp16(trace_checkpoint(checkpoint, 18))
    return {"fp32": plain, "fp16": half, "fused fp16": convert_to_fp16(fused)}


FIRST = [
    Item(
        "facts",
        5,
        {"name": "NVIDIA H200", "power.limit": "700 W", "mig": "Disabled", "gcc": "/usr/bin/gcc"},
        measure_machine,
    ),
    Item(
        "ceilings",
        15,
        {
            "copy GB/s": "4,000 (4,800 on paper)",
            "fp32 TFLOP/s": "50 (67 on paper)",
            "tf32 TFLOP/s": "400 (495 on paper)",
            "bf16 TFLOP/s": "700 (989 on paper)",
            "fp16 TFLOP/s": "700",
        },
        measure_ceilings,
        ("torch",),
    ),
]
LAST = [
    Item(
        "plain training",
        40,
        {
            "BERT-base 32 fp32": "45 ms: 2.1 TFLOP at 50 TFLOP/s",
            "BERT-base 32 tf32": "12 ms",
            "BERT-base 32 bf16": "12 ms: the host launches 900 operations",
            "BERT-base 32 bf16 graph": "7 ms: 40 % of the peak",
            "BERT-base 128 bf16": "27 ms: 40 % of the peak",
            "MiniLM 32 bf16 graph": "1.5 ms",
            "BERT-base 32 bf16 compiled": "8 ms",
        },
        measure_plain_training,
        MODELS,
    ),
]
SECOND = [
    Item("facts", FACTS_SECONDS, {}, measure_machine),
    Item(
        "torch inference",
        120,
        {
            "fp32 32x128": "20 ms: 710 GFLOP at 40 TFLOP/s",
            "tf32 32x128": "4 ms",
            "bf16 1x128": "6 ms: the host launches 300 kernels",
            "fp16 32x128": "6 ms by the host, 2 on the device",
            "fp16 graph 1x128": "0.8 ms",
            "fp16 graph 32x128": "2.2 ms: 710 GFLOP at 350 TFLOP/s",
            "fp16 graph 128x128": "7 ms",
            "fp16 compiled 32x128": "2.2 ms",
        },
        measure_torch_inference,
        MODELS,
    ),
    Item(
        "onnxruntime inference",
        60,
        {
            "fp32 32x128": "22 ms",
            "fp16 32x128": "4 ms",
            "fused fp16 32x128": "2.8 ms",
            "fused fp16 graph 1x128": "1.0 ms",
            "fused fp16 graph 32x128": "2.6 ms: within 1.2x of torch fp16 in a CUDA graph",
            "packed fp16": "5 ms: half of a full batch",
        },
        measure_onnx_inference,
        GRAPHS,
    ),
]
