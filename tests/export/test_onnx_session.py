"""onnxruntime sessions: missing or broken installations, and providers that claim more than they run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from onnx import TensorProto, helper

from spdtool.errors import DeviceError, ModelError
from spdtool.export import onnx_session


def pretend(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Pretend that exactly the distributions `names` are installed."""

    def version(name: str) -> str:
        if name in names:
            return "1.2.3"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(onnx_session.metadata, "version", version)


def test_both_distributions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(DeviceError, match=r"onnxruntime 1.2.3 and onnxruntime-gpu 1.2.3 are both installed") as error:
        onnx_session.require_onnxruntime()
    assert "pip uninstall onnxruntime onnxruntime-gpu" in str(error.value.hint)


@pytest.mark.parametrize("name", onnx_session.DISTRIBUTIONS)
def test_either_distribution_alone_is_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, name)
    assert onnx_session.installed_distributions() == {name: "1.2.3"}
    assert onnx_session.require_onnxruntime().InferenceSession


def test_a_missing_runtime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match="cannot be imported") as error:
        onnx_session.require_onnxruntime()
    assert 'pip install "spdtool[cpu]"' in str(error.value.hint)


def test_a_broken_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(DeviceError, match="files of it are missing"):
        onnx_session.require_onnxruntime()


def test_a_session_runs_on_the_cpu_and_reports_it() -> None:
    session = onnx_session.open_session(onnx_session.small_model(), threads=1)
    assert onnx_session.node_placement(session) == {"CPUExecutionProvider": {"MatMul": 1}}
    identity = np.eye(2, dtype=np.float32)
    assert (session.run(None, {"x": identity})[0] == identity).all()
    assert onnx_session.provider_problem("cpu") is None


def test_a_damaged_model_is_refused_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model at all")
    for file in (tmp_path / "model.onnx", tmp_path / "none.onnx"):
        with pytest.raises(ModelError, match=f"onnxruntime cannot open .*{file.name}"):
            onnx_session.open_session(file)
    with pytest.raises(ModelError, match="onnxruntime cannot open the model"):
        onnx_session.open_session(b"nor this")
    assert capfd.readouterr() == ("", "")


def test_importing_onnx_session_does_not_import_torch() -> None:
    code = "import sys, spdtool.bench.engines; print(sorted({'torch', 'onnxruntime', 'onnx'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@dataclass
class Claim:
    """A fake onnxruntime that lists CUDA, with the provider that it runs and the placement of nodes."""

    lists: tuple[str, ...] = ("CUDAExecutionProvider", "CPUExecutionProvider")
    runs: str = "CUDAExecutionProvider"
    nodes: dict[str, list[str]] | None = field(default_factory=lambda: {"CUDAExecutionProvider": ["MatMul"]})
    refuses_strict: bool = False
    opened: list[dict[str, Any]] = field(default_factory=list)
    preloaded: int = 0

    InferenceSession: ClassVar[Any] = None

    def get_available_providers(self) -> list[str]:
        return list(self.lists)

    def preload_dlls(self) -> None:
        print("Failed to load a library")
        self.preloaded += 1

    def SessionOptions(self) -> Any:
        entries: dict[str, str] = {}
        return SimpleNamespace(entries=entries, add_session_config_entry=entries.__setitem__)

    def open(self, _model: Any, options: Any, providers: Any, enable_fallback: int) -> Any:
        self.opened.append({"strict": options.entries.get(onnx_session.NO_FALLBACK), "providers": providers})
        assert enable_fallback == 0
        if self.refuses_strict and options.entries.get(onnx_session.NO_FALLBACK):
            raise RuntimeError("nodes are assigned to the CPU EP, but fallback to CPU EP has been disabled")
        session = SimpleNamespace(
            get_providers=lambda: [self.runs, "CPUExecutionProvider"],
            disable_fallback=lambda: None,
            run=lambda _names, inputs: [inputs["x"] @ inputs["x"]],
        )
        if self.nodes is not None:
            subgraphs = [
                SimpleNamespace(
                    ep_name=name,
                    get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops],  # type: ignore[misc]
                )
                for name, ops in self.nodes.items()
            ]
            session.get_provider_graph_assignment_info = lambda: subgraphs
        return session


def claim(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Claim:
    """Put a `Claim` in place of onnxruntime."""
    fake = Claim(**fields)
    fake.InferenceSession = fake.open  # type: ignore[misc]
    monkeypatch.setattr(onnx_session, "require_onnxruntime", lambda: fake)
    return fake


class TestCuda:
    def test_cuda_is_refused_if_it_is_not_listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        claim(monkeypatch, lists=("CPUExecutionProvider",))
        with pytest.raises(DeviceError, match="this onnxruntime has no CUDAExecutionProvider") as error:
            onnx_session.open_session(b"", "cuda")
        assert "spdtool[gpu]" in str(error.value.hint)

    def test_cuda_is_accepted_if_it_runs(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fake = claim(monkeypatch)
        onnx_session.open_session(b"", "cuda")
        assert fake.opened == [{"strict": "1", "providers": [("CUDAExecutionProvider", {"use_tf32": "0"})]}]
        assert fake.preloaded == 1
        assert capsys.readouterr().out == ""
        assert onnx_session.provider_problem("cuda") is None
        assert onnx_session.working_providers("auto") == ["cpu", "cuda"]

    def test_a_silent_fallback_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        claim(monkeypatch, runs="CPUExecutionProvider")
        with pytest.raises(DeviceError, match="ran CPUExecutionProvider when CUDAExecutionProvider was asked for"):
            onnx_session.open_session(b"", "cuda")
        assert "ran CPUExecutionProvider" in str(onnx_session.provider_problem("cuda"))
        assert onnx_session.working_providers("auto") == ["cpu"]
        with pytest.raises(DeviceError, match="CUDA was demanded"):
            onnx_session.working_providers("cuda")

    def test_shape_computations_on_the_cpu_are_accepted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nodes = {"CUDAExecutionProvider": ["MatMul", "Softmax"], "CPUExecutionProvider": ["Gather", "Concat"]}
        fake = claim(monkeypatch, nodes=nodes, refuses_strict=True)
        session = onnx_session.open_session(b"", "cuda")
        assert [entry["strict"] for entry in fake.opened] == ["1", None]
        assert onnx_session.node_placement(session) == {
            "CPUExecutionProvider": {"Concat": 1, "Gather": 1},
            "CUDAExecutionProvider": {"MatMul": 1, "Softmax": 1},
        }

    @pytest.mark.parametrize(
        ("nodes", "message"),
        [
            (
                {"CUDAExecutionProvider": ["Add"], "CPUExecutionProvider": ["MatMul", "Gather"]},
                "left MatMul to the CPU",
            ),
            ({"CPUExecutionProvider": ["Add"]}, "left every node to the CPU"),
            (None, "does not tell which provider"),
        ],
    )
    def test_arithmetic_on_the_cpu_is_refused(
        self, nodes: dict[str, list[str]] | None, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claim(monkeypatch, nodes=nodes, refuses_strict=True)
        with pytest.raises(DeviceError, match=message):
            onnx_session.open_session(b"", "cuda")

    def test_another_error_is_not_mistaken_for_a_fallback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = claim(monkeypatch)

        def fail(*args: Any, **options: Any) -> Any:
            raise RuntimeError("out of memory\nand more")

        fake.InferenceSession = fail  # type: ignore[misc]
        with pytest.raises(ModelError, match=r"cannot open the model: out of memory$"):
            onnx_session.open_session(b"", "cuda")


def test_the_cpu_needs_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_session, "provider_problem", lambda _provider: pytest.fail("CUDA was tried"))
    assert onnx_session.working_providers("cpu") == ["cpu"]


def test_a_provider_with_wrong_results_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    session = SimpleNamespace(run=lambda _names, inputs: [inputs["x"]])
    monkeypatch.setattr(onnx_session, "open_session", lambda *_given, **_named: session)
    assert "wrong product" in str(onnx_session.provider_problem("cpu"))


# Libraries of custom operators ---------------------------------------------------------------------------------------


def custom(domain: str) -> bytes:
    """Make a model of one operator that onnxruntime does not know."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("SparseLinear", ["x"], ["y"], domain=domain)], "custom", [x], [y])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def test_unregistered_spdtool_operators_name_the_plugin() -> None:
    with pytest.raises(ModelError, match=r"needs the operator SparseLinear of the domain 'spdtool'") as error:
        onnx_session.open_session(custom("spdtool"))
    assert "the plugin spdtool-sparse-cpu" in str(error.value.hint)


def test_other_unregistered_operators_ask_for_their_library() -> None:
    with pytest.raises(ModelError, match=r"of the domain 'their.ops', which is not registered") as error:
        onnx_session.open_session(custom("their.ops"))
    assert error.value.hint == "give the library that holds it, or install the plugin whose target wrote the file"


@pytest.mark.parametrize("content", [None, b"no library", Path(np.__file__).read_bytes()])
def test_a_library_that_cannot_be_loaded_is_refused_in_silence(
    content: bytes | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "ops.so").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot load the operators in .*ops.so") as error:
        onnx_session.open_session(onnx_session.small_model(), libraries=[tmp_path / "ops.so"])
    assert "built for this machine" in str(error.value.hint)
    assert capfd.readouterr() == ("", "")


def test_a_shared_library_without_operators_is_refused() -> None:
    import _ctypes  # any extension module of Python is a shared library

    with pytest.raises(ModelError, match="RegisterCustomOps"):
        onnx_session.open_session(onnx_session.small_model(), libraries=[_ctypes.__file__])


def test_every_library_is_registered_before_the_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime_module, registered = onnx_session.require_onnxruntime(), []

    class Options(onnxruntime_module.SessionOptions):
        def register_custom_ops_library(self, path: str) -> None:
            registered.append(path)

    attributes = {name: getattr(onnxruntime_module, name) for name in ("InferenceSession", "get_available_providers")}
    monkeypatch.setattr(
        onnx_session, "require_onnxruntime", lambda: SimpleNamespace(**attributes, SessionOptions=Options)
    )
    onnx_session.open_session(onnx_session.small_model(), threads=1, libraries=["a.so", Path("b.so")])
    assert registered == ["a.so", "b.so"]


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(DeviceError, match="there is no provider 'tpu'"):
        onnx_session.open_session(onnx_session.small_model(), "tpu")
