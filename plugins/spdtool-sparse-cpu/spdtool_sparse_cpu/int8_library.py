"""The compiled library as the target sparse-cpu-int8 uses it: products in 8 bits have instruction sets of their own."""

from spdtool_sparse_cpu.library import DOMAINS, path, version
from spdtool_sparse_cpu.library import int8_isa as isa

__all__ = ["DOMAINS", "isa", "path", "version"]
