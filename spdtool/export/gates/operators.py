"""The gate on operators: a file has none but those of the domains that its target names."""

from __future__ import annotations

from pathlib import Path

import onnx

from spdtool.errors import GateError
from spdtool.export.graph.fuse import operator_domains
from spdtool.export.target import Target


def check_operators(target: Target, file: Path) -> None:
    """Refuse operators of a domain that the target does not name.

    Raises:
        GateError: names the domain.
    """
    if target.operator_domains is None:
        return
    proto = onnx.load(file, load_external_data=False)
    unexpected = operator_domains(proto) - set(target.operator_domains)
    if unexpected:
        raise GateError(f"{file.name} has operators of the domain {', '.join(sorted(unexpected))}")
