"""The export target `sparse-cpu`: models whose zeros are neither stored nor multiplied, for onnxruntime on a CPU."""

from spdtool.plugins import targets
from spdtool_sparse_cpu.target import SparseCpu

targets.register("sparse-cpu")(SparseCpu)
