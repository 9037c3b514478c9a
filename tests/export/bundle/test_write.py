"""Which variant of a bundle comes first on which hardware."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from spdtool.export.bundle.write import order_variants


def test_fused_fp16_comes_first_on_a_gpu_that_has_run_it() -> None:
    def variants(fused_on: tuple[str, ...]) -> Any:
        providers = {"onnx": (), "onnx-fp16": ("cpu", "cuda"), "onnx-int8": ("cpu",), "onnx-ort-fp16": fused_on}
        return {name: SimpleNamespace(target=name, providers=on) for name, on in providers.items()}

    assert order_variants(variants(("cpu", "cuda")), "cuda") == ["onnx-ort-fp16", "onnx-fp16", "onnx"]
    assert order_variants(variants(("cpu",)), "cuda") == ["onnx-fp16", "onnx"], "it was checked on a CPU alone"
    assert order_variants(variants(("cpu", "cuda")), "web") == ["onnx-int8", "onnx"]
    assert order_variants(variants(("cpu", "cuda")), "cpu") == ["onnx"]
