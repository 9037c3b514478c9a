"""Give an ONNX encoder the int8 graph that DeepSparse 1.8 runs fastest; for timing, not for answers.

    python benchmarks/deepsparse_int8.py CLASSIC.onnx OUT.onnx

DeepSparse recognises the graph that SparseML's exporter wrote after quantization-aware training: a static
QuantizeLinear, MatMulInteger, an int32 bias, Cast and Mul for a linear layer, and QLinearMatMul for the two products of
attention. It runs QDQ graphs several times slower, and refuses DynamicQuantizeLinear. The scales here are guesses, as
speed does not depend on them. CLASSIC.onnx comes from torch's older exporter: see `_classic` in sparse_cpu.py.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

ACTIVATION = (6.0 / 127, 128)  # scale and zero point of what a layer normalization gives
PROBABILITY = (1.0 / 255, 0)
SCORE = (20.0 / 127, 128)  # of queries times keys


class Int8Graph:
    """A graph whose matrix products are replaced one by one.

    Args:
        model: an encoder in float32, changed in place by `quantize`.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {constant.name: numpy_helper.to_array(constant) for constant in self.graph.initializer}
        self.producers = {output: node for node in self.graph.node for output in node.output}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.consumers[name].append(node)
        self.nodes: list[NodeProto] = []
        self.quantized: dict[str, list[str]] = {}
        self.replaced: set[str] = set()  # first outputs of additions that a product has taken over

    def quantize(self) -> int:
        """Replace every matrix product; return how many there were."""
        products = 0
        for node in self.graph.node:
            if node.output[0] in self.replaced:
                continue
            if node.op_type != "MatMul":
                self.nodes.append(node)
            elif node.input[1] in self.constants:
                products += 1
                self._replace_linear(node)
            else:
                products += 1
                self._replace_attention(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        del self.graph.initializer[:]
        self.graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in self.constants.items() if name in used
        )
        del self.graph.value_info[:]
        return products

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{operator}_{output}", **attributes))
        return output

    def _quantize(self, name: str, scale: float, zero_point: int) -> list[str]:
        """Quantise an activation once for all its products; return the names of bytes, scale and zero point."""
        if name not in self.quantized:
            scale_name = self._constant(f"{name}_scale", np.asarray(scale, np.float32))
            zero_name = self._constant(f"{name}_zero", np.asarray(zero_point, np.uint8))
            code = self._add("QuantizeLinear", [name, scale_name, zero_name], f"{name}_code")
            self.quantized[name] = [code, scale_name, zero_name]
        return self.quantized[name]

    def _replace_linear(self, node: NodeProto) -> None:
        """Multiply codes by an int8 matrix, and add the bias to the integers where one follows."""
        base, weight = node.output[0], self.constants[node.input[1]]
        scale, (input_scale, zero_point) = float(np.abs(weight).max()) / 127, ACTIVATION
        code = np.rint(weight / scale).astype(np.int8)
        code[(weight != 0) & (code == 0)] = 1  # what is no zero stays none
        inputs, _, zero = self._quantize(node.input[0], input_scale, zero_point)
        matrix = self._constant(f"{base}_matrix", code)
        matrix_zero = self._constant(f"{base}_matrix_zero", np.asarray(0, np.int8))
        value = self._add("MatMulInteger", [inputs, matrix, zero, matrix_zero], f"{base}_integers")
        output = base
        followers = self.consumers[base]
        if len(followers) == 1 and followers[0].op_type == "Add":
            bias = next((name for name in followers[0].input if name in self.constants), None)
            if bias is not None:
                steps = np.rint(self.constants[bias] / (scale * input_scale)).astype(np.int32)
                value = self._add("Add", [value, self._constant(f"{base}_bias", steps)], f"{base}_sum")
                output = followers[0].output[0]
                self.replaced.add(output)
        value = self._add("Cast", [value], f"{base}_float", to=TensorProto.FLOAT)
        step = self._constant(f"{base}_step", np.asarray(scale * input_scale, np.float32))
        self._add("Mul", [value, step], output)

    def _replace_attention(self, node: NodeProto) -> None:
        """Multiply two activations as codes."""
        base = node.output[0]
        producer = self.producers.get(node.input[0])
        follows_softmax = producer is not None and producer.op_type == "Softmax"
        left = self._quantize(node.input[0], *(PROBABILITY if follows_softmax else ACTIVATION))
        right = self._quantize(node.input[1], *ACTIVATION)
        scale, zero_point = ACTIVATION if follows_softmax else SCORE
        result = [
            self._constant(f"{base}_scale", np.asarray(scale, np.float32)),
            self._constant(f"{base}_zero", np.asarray(zero_point, np.uint8)),
        ]
        code = self._add("QLinearMatMul", [*left, *right, *result], f"{base}_product")
        self._add("DequantizeLinear", [code, *result], base)


def quantize_for_deepsparse(source: Path, target: Path) -> int:
    """Write the int8 form of a file; return how many products it has."""
    model = onnx.load(source)
    products = Int8Graph(model).quantize()
    onnx.checker.check_model(model)
    onnx.save(model, target)
    return products


if __name__ == "__main__":
    print(quantize_for_deepsparse(Path(sys.argv[1]), Path(sys.argv[2])), "products in int8")
