"""Finding the compiled library, with clear errors; tests compile small substitutes if there is a compiler."""

import ctypes
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import spdtool_sparse_cpu
from onnx import TensorProto, helper, numpy_helper
from spdtool_sparse_cpu import library, packing

from spdtool import plugins
from spdtool.errors import DeviceError, ModelError
from spdtool.export import onnx_session

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
SOURCE = """
const char* spdtool_sparse_cpu_version(void) {{ return "{}"; }}
const char* spdtool_sparse_cpu_isa(void) {{ return "avx2"; }}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package installed in a temporary folder as version 1.2.3, still without a library."""
    monkeypatch.setattr(spdtool_sparse_cpu, "__path__", [str(tmp_path / "source"), str(tmp_path)])
    monkeypatch.setattr(metadata, "version", lambda name: {"spdtool-sparse-cpu": "1.2.3"}[name])
    monkeypatch.setattr(metadata, "files", lambda _: None)
    return tmp_path


def compiled(folder, text):
    if COMPILER is None:
        pytest.skip("no C compiler")
    (folder / "made.c").write_text(text)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", folder / library.FILE, folder / "made.c"], check=True)


def test_the_error_for_a_missing_library_names_the_searched_folders(package):
    with pytest.raises(DeviceError, match=f"{library.FILE} is not in .*source or {package}") as error:
        library.path()
    assert "pip install" in error.value.hint


def test_the_library_is_found_in_any_folder_of_the_package(package):
    compiled(package, SOURCE.format("1.2.3"))
    assert library.path() == (package / library.FILE).resolve()
    assert (library.version(), library.isa()) == ("1.2.3", "avx2")


@pytest.mark.usefixtures("package")
def test_the_library_is_found_through_the_installed_files(tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("site")
    compiled(elsewhere, SOURCE.format("1.2.3"))

    class Recorded:
        name = library.FILE

        def locate(self):
            return elsewhere / library.FILE

    monkeypatch.setattr(metadata, "files", lambda _: [Recorded()])
    assert library.path() == (elsewhere / library.FILE).resolve()


def test_another_version_is_refused(package):
    compiled(package, SOURCE.format("1.2.4"))
    with pytest.raises(DeviceError, match=r"of version 1\.2\.4; spdtool-sparse-cpu 1\.2\.3 is installed"):
        library.path()
    with pytest.raises(DeviceError):
        library.isa()


def test_another_library_is_refused(package):
    compiled(package, "int nothing(void) { return 0; }\n")
    with pytest.raises(DeviceError, match="no spdtool_sparse_cpu_version"):
        library.path()


def test_a_file_that_is_not_a_library_is_refused(package):
    (package / library.FILE).write_bytes(b"not a library")
    with pytest.raises(DeviceError, match="cannot be loaded"):
        library.path()


def test_a_distribution_that_is_not_installed(package, monkeypatch):
    compiled(package, SOURCE.format("1.2.3"))

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(DeviceError, match="is not installed"):
        library.path()


def test_the_installed_library_has_the_version_of_the_package():
    try:
        file = library.path()
    except DeviceError as error:
        pytest.skip(error.message)
    assert hasattr(ctypes.CDLL(str(file)), "RegisterCustomOps")
    assert library.isa() in ("avx512", "avx2", "baseline", "neon")


def test_the_target_of_8_bits_names_an_instruction_set_of_its_own():
    try:
        isa = plugins.find_library("sparse-cpu-int8").module.isa()
    except DeviceError as error:
        pytest.skip(error.message)
    assert isa in ("avx512_vnni", "avx512", "avx_vnni", "avx2", "baseline", "neon", "neon_dotprod", "neon_i8mm")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert (isa == "avx512_vnni") == ("avx512_vnni" in flags)


def timing_model(tokens: int) -> bytes:
    weight = packing.pack("w", np.eye(40, 24, dtype=np.float32), "fp32")
    node = helper.make_node("SparseProductTime", ["repeats", "w"], ["seconds"], domain="spdtool", tokens=tokens)
    graph = helper.make_graph(
        [node],
        "timing",
        [helper.make_tensor_value_info("repeats", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("seconds", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(weight, "w")],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("spdtool", 1)]
    return bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())


def test_a_product_is_timed() -> None:
    try:
        library.path()
    except DeviceError as error:
        pytest.skip(error.message)
    session = onnx_session.open_session(timing_model(32), threads=1, libraries=[library.path()])
    (seconds,) = session.run(None, {"repeats": np.array([20])})
    assert 0 < seconds[0] < 1
    with pytest.raises(Exception, match="repeats = 0"):
        session.run(None, {"repeats": np.array([0])})
    with pytest.raises(ModelError, match="tokens = 2000"):
        onnx_session.open_session(timing_model(2000), threads=1, libraries=[library.path()])
