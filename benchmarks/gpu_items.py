"""Items of `gpu.py` that need torch, transformers and, for the last one, onnxruntime; none of them trains."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

from gpu import Context, Item, NotAvailableError

SHAPES = ((1, 128), (8, 128), (32, 128), (128, 128))
TINY_SHAPES = ((1, 8), (2, 8))
SECONDS = 0.4  # of each timing
SMI_FIELDS = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,mig.mode.current"


def measure_machine(context: Context) -> dict[str, Any]:
    """Versions, the processor and the card."""
    from importlib import metadata

    import torch

    figures: dict[str, Any] = {"python": platform.python_version(), "processor": processor()}
    for package in ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "onnx", "pydantic"):
        try:
            figures[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            figures[package] = "not installed"
    figures["CUDA of torch"] = torch.version.cuda or "none"
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        if answer:
            figures |= dict(zip(SMI_FIELDS.split(","), map(str.strip, answer[0].split(",")), strict=False))
    if context.device == "cuda":
        if not torch.cuda.is_available():
            raise NotAvailableError("torch finds no CUDA device")
        figures["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
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
    figures: dict[str, Any] = {}
    source = torch.empty(2**16 if context.tiny else 2**30, dtype=torch.float32, device=context.device)
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

    figures: dict[str, Any] = {}
    for form in ("fp32", "tf32", "bf16", "fp16", "fp16 graph", "fp16 compiled"):
        if form.endswith("compiled") and context.tiny:
            continue  # the compiler alone takes longer than all else
        precision, _, way = form.partition(" ")
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        model = encoder(context).to(context.device).to(dtype).eval()
        if way == "compiled":
            model = torch.compile(model, dynamic=False)
        shapes: tuple[tuple[int, int], ...] = TINY_SHAPES if context.tiny else SHAPES
        if way == "compiled":
            shapes = (SHAPES[2],)  # half a minute of compiling for each
        for rows, tokens in shapes:
            try:
                figures[f"{form} {rows}x{tokens}"] = time_form(context, model, rows, tokens, graph=way == "graph")
            except (RuntimeError, AssertionError) as error:
                figures[f"{form} {rows}x{tokens}"] = f"not possible: {str(error).splitlines()[0]}"
    torch.set_float32_matmul_precision("highest")
    return figures


def encoder(context: Context, width: int = 768, layers: int = 12) -> Any:
    """Build a BERT with random weights, or a toy."""
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
    figures: dict[str, Any] = {}
    peak = context.measured.get("ceilings", {}).get("bf16 TFLOP/s")
    for name, (width, layers, rows) in TRAINED.items():
        forms = ["bf16", "bf16 graph"]
        if name == "BERT-base 32":
            forms = ["fp32", "tf32", *forms, *([] if context.tiny else ["bf16 compiled"])]
        for form in forms:
            try:
                milliseconds = time_training(context, form, width, layers, rows)
            except (RuntimeError, AssertionError) as error:
                figures[f"{name} {form}"] = f"not possible: {str(error).splitlines()[0]}"
                continue
            products = 12 * width * width * layers + 2 * TRAINED_TOKENS * width * layers
            teraflops = 6 * rows * TRAINED_TOKENS * products / milliseconds / 1e9
            figures[f"{name} {form}"] = {"ms": milliseconds, "TFLOP/s": teraflops}
            if peak:
                figures[f"{name} {form}"]["share of the bf16 peak"] = teraflops / peak
    return figures


def time_training(context: Context, form: str, width: int, layers: int, rows: int) -> float:
    """Milliseconds of a training step in one form."""
    import torch

    precision, _, way = form.partition(" ")
    if way == "graph" and context.device != "cuda":
        raise RuntimeError("a CPU has no CUDA graph")
    on_gpu = context.device == "cuda"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    model = encoder(context, width, layers).to(context.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=way == "graph" and on_gpu)
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

    call: Callable[[], object] = step
    if way == "graph":
        from spdtool.bench.gpu.torch_forms import capture_graph

        call, _loss = capture_graph(step)
    try:
        return time_calls(context, call)
    finally:
        torch.set_float32_matmul_precision("highest")


def time_form(context: Context, model: Any, rows: int, tokens: int, *, graph: bool) -> dict[str, float]:
    """Time a model at one shape without padding."""
    import torch

    host = torch.randint(5, 90, (rows, tokens))
    inputs = host.to(context.device)

    def compute() -> Any:
        with torch.no_grad():
            return model(input_ids=inputs).logits

    if graph:
        if context.device != "cuda":
            raise RuntimeError("a CPU has no CUDA graph")
        from spdtool.bench.gpu.torch_forms import capture_graph

        replay, logits = capture_graph(compute)
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
    figures: dict[str, Any] = {}
    for name, proto in forms.items():
        file = context.folder / f"{name}.onnx"
        onnx.save(proto, file)
        plain = Engine(name, "onnxruntime", str(file), vocabulary=90, provider=context.device, threads=1)
        engines = {name: plain}
        if name == "fused fp16":
            engines |= {f"{name} bound": replace(plain, bound=True), f"{name} graph": replace(plain, graph=True)}
        for form, engine in engines.items():
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
    Item("facts", 5, {"name": "NVIDIA H200", "power.limit": "700 W", "mig": "Disabled"}, measure_machine),
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
    ),
    Item(
        "plain training",
        70,
        {
            "BERT-base 32 fp32": "45 ms: 2.1 TFLOP at 50 TFLOP/s",
            "BERT-base 32 tf32": "12 ms",
            "BERT-base 32 bf16": "12 ms: the host launches 900 operations",
            "BERT-base 32 bf16 graph": "7 ms: 40 % of the peak",
            "BERT-base 128 bf16": "27 ms: 40 % of the peak",
            "MiniLM 32 bf16 graph": "1.5 ms",
        },
        measure_plain_training,
    ),
]
SECOND = [
    Item("facts", 5, {}, measure_machine),
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
    ),
]
