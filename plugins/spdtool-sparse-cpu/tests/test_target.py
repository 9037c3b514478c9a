"""The export target: the files that it writes, the stored weights, and its refusals.

The compiled library is a dummy file here, unless a test needs the real one and it is installed.
"""

import shutil

import numpy as np
import onnx
import pytest
from faults import FILE_FAULTS, WEIGHT_FAULTS
from onnx.reference import ReferenceEvaluator
from spdtool_sparse_cpu import library, packing
from spdtool_sparse_cpu.target import SparseCpu

from spdtool import plugins
from spdtool.errors import DeviceError, GateError, ModelError
from spdtool.export.bundle.manifest import write_manifest
from spdtool.export.gates.checked_export import ExportAttempt
from spdtool.export.gates.folder import check_folder
from spdtool.export.gates.reference import Reference, prepare_dev_sets
from spdtool.export.gates.weights import check_weight, check_weights
from spdtool.export.graph.weights import parameters_of
from spdtool.export.target import MODEL_FILE, get_target
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_model, save_model
from spdtool.models.predict import torch_forward


@pytest.fixture
def library_file(tmp_path, monkeypatch):
    """A dummy file in place of the compiled library."""
    file = tmp_path / "installed" / library.FILE
    file.parent.mkdir()
    file.write_bytes(b"machine code")
    monkeypatch.setattr(library, "path", lambda: file)
    monkeypatch.setattr(library, "version", lambda: "1.2.3")
    return file


@pytest.fixture(scope="module")
def checkpoints(toys, tmp_path_factory):
    """Return `checkpoints(architecture)`, which saves a sparse model with a tokenizer once and returns its folder."""
    folders = {}

    def make(architecture):
        if architecture not in folders:
            model = toys.classifier(architecture, **toys.TRACED)
            for number, weight in enumerate(find_prunable_weights(model).values()):
                weight.data[:, number % 3 :: 3] = 0
                weight.data[:, (number + 1) % 3 :: 3] = 0
            folders[architecture] = tmp_path_factory.mktemp(architecture) / "checkpoint"
            tokenizer = toys.tokenizer(token_types=toys.ARCHITECTURES[architecture][1])
            save_model(model, tokenizer, folders[architecture])
        return folders[architecture]

    return make


def storage_settings(values, embeddings):
    return f"export.values={values}", f"export.embeddings={embeddings}"


@pytest.mark.usefixtures("library_file")
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_folder_manifest_and_weights(toys, reference, checkpoints, tmp_path, architecture):
    checkpoint, folder = checkpoints(architecture), tmp_path / "export" / "student"
    recipe = toys.recipe(*storage_settings("fp32", "fp32"))
    files = SparseCpu().export(checkpoint, folder, recipe)
    assert files == [folder / "onnx/model.onnx"]

    written = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    expected = ["config.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert written == sorted([*expected, f"lib/{library.FILE}"])
    record = SparseCpu().library_record(folder)
    assert record.pop("platform")
    assert record == {"file": f"lib/{library.FILE}", "distribution": "spdtool-sparse-cpu", "version": "1.2.3"}
    assert (folder / f"lib/{library.FILE}").read_bytes() == b"machine code"

    model = load_model(checkpoint, eager=True)
    stored_arrays = {stored.name: stored.array for stored in SparseCpu().stored_weights(folder)}
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters(remove_duplicate=False)}
    assert set(stored_arrays) == set(parameters)
    assert all(np.array_equal(stored_arrays[name], value) for name, value in parameters.items())

    batch = {
        "input_ids": np.array([[2, 7, 9, 3], [2, 8, 3, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    if toys.ARCHITECTURES[architecture][1]:
        batch["token_type_ids"] = np.zeros((2, 4), np.int64)
    logits = ReferenceEvaluator(onnx.load(files[0]), new_ops=reference.OPERATORS).run(None, batch)[0]
    assert np.abs(logits - torch_forward(model)(batch)).max() < 2e-5


@pytest.mark.usefixtures("library_file")
@pytest.mark.parametrize("architecture", ["bert", "mpnet"])
@pytest.mark.parametrize(("values", "embeddings"), [("fp16", "fp16"), ("int8", "int8"), ("fp16", "int6")])
def test_zeros_survive_every_storage_format(toys, checkpoints, tmp_path, architecture, values, embeddings):
    checkpoint = checkpoints(architecture)
    SparseCpu().export(checkpoint, tmp_path / "out", toys.recipe(*storage_settings(values, embeddings)))
    model = load_model(checkpoint)
    parameters = dict(model.named_parameters())
    names = set()
    for stored in SparseCpu().stored_weights(tmp_path / "out"):
        weight = parameters[stored.name].detach().numpy()
        check_weight(stored, weight)
        assert np.array_equal(stored.array == 0, weight == 0), stored.name
        names.add(stored.name)
    assert names == set(parameters)


@pytest.mark.usefixtures("library_file")
def test_two_exports_are_the_same(toys, checkpoints, tmp_path):
    for name in ("one", "two"):
        SparseCpu().export(checkpoints("bert"), tmp_path / name, toys.recipe())
    first, second = (tmp_path / name / "onnx/model.onnx" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_without_the_library_nothing_is_written(toys, tmp_path, monkeypatch):
    def missing():
        raise DeviceError("the compiled library is missing")

    monkeypatch.setattr(library, "path", missing)
    with pytest.raises(DeviceError, match="missing"):
        SparseCpu().export(tmp_path / "checkpoint", tmp_path / "out", toys.recipe())
    assert not (tmp_path / "out").exists()
    with pytest.raises(DeviceError, match="missing"):
        SparseCpu().libraries(tmp_path)


def test_another_provider_is_refused(tmp_path):
    with pytest.raises(DeviceError, match="runs on the CPU only, not on 'cuda'"):
        SparseCpu().session(tmp_path, "cuda")


def test_the_library_in_an_exported_folder_is_never_loaded(library_file, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / library.FILE).write_bytes(b"a stranger's")
    assert SparseCpu().libraries(tmp_path) == [library_file]


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\x08\x0a\xff\xff\xff\xff"])
def test_a_file_that_is_not_a_model_is_refused(tmp_path, content):
    (tmp_path / "onnx").mkdir()
    if content is not None:
        (tmp_path / "onnx/model.onnx").write_bytes(content)
    if content == b"":  # protobuf reads it: a model without anything in it
        assert list(SparseCpu().stored_weights(tmp_path)) == []
        return
    with pytest.raises(ModelError, match=r"model\.onnx cannot be read"):
        list(SparseCpu().stored_weights(tmp_path))


def test_it_is_registered_for_the_student_on_the_cpu():
    import spdtool_sparse_cpu  # noqa: F401

    target = get_target("sparse-cpu")
    assert isinstance(target, SparseCpu)
    assert (target.roles, target.providers) == (("student",), ("cpu",))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra", "mpnet", "modernbert"])
def test_the_real_library_computes_the_same(toys, checkpoints, tmp_path, architecture):
    try:
        library.path()
    except DeviceError as error:
        pytest.skip(error.message)
    checkpoint = checkpoints(architecture)
    SparseCpu().export(checkpoint, tmp_path / "out", toys.recipe(*storage_settings("fp32", "fp32")))
    forward = SparseCpu().session(tmp_path / "out", threads=1)
    batch = {
        "input_ids": np.array([[2, 7, 9, 3], [2, 8, 3, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    batch["token_type_ids"] = np.zeros((2, 4), np.int64)
    names = [name for name in batch if name != "token_type_ids" or toys.ARCHITECTURES[architecture][1]]
    expected = torch_forward(load_model(checkpoint, eager=True))({name: batch[name] for name in names})
    assert np.abs(forward(batch) - expected).max() < 1e-4


@pytest.mark.slow
def test_every_planted_fault_is_detected(toys, tmp_path):
    """Plant the faults of `tests/faults.py`; changed weights are packed again."""
    try:
        library.path()
    except DeviceError as error:
        pytest.skip(error.message)
    toys.register(toys.dataset("planted", dev=12))
    try:
        checkpoint = tmp_path / "checkpoint"
        names = {0: "bad", 1: "good"}
        model = toys.bert(id2label=names, label2id={"bad": 0, "good": 1})
        for weight in find_prunable_weights(model).values():
            weight.data.view(-1)[np.arange(weight.numel()) % 4 > 1] = 0
        save_model(model, toys.tokenizer(), checkpoint)
        for storage in ("fp16", "int8"):
            passed = plant_faults(toys, checkpoint, tmp_path / storage, storage_settings(storage, storage))
            assert passed == [], storage
    finally:
        plugins.datasets.unregister("planted")


def plant_faults(toys, checkpoint, folder, storage):
    """Return the faults that no gate found."""
    recipe = toys.recipe("export.sentences=4", "export.budget=1", *storage, task="planted")
    reference = Reference(checkpoint, prepare_dev_sets(checkpoint, recipe), recipe)
    target = get_target("sparse-cpu")
    intact = folder / "sound"
    ExportAttempt(target, reference, intact, ["cpu"]).write()
    pass_gates(target, reference, intact)
    plants = dict(FILE_FAULTS)
    for title, (parameter, change) in WEIGHT_FAULTS.items():
        plants[title] = lambda copy, parameter=parameter, change=change: repack(copy, parameter, change)
    passed = []
    for title, plant in plants.items():
        copy = shutil.copytree(intact, folder / "faulty")
        plant(copy)
        try:
            pass_gates(target, reference, copy)
            passed.append(title)
        except GateError:
            pass
        shutil.rmtree(copy)
    return passed


def pass_gates(target, reference, folder):
    """Seal the folder as the export does, and open it; the gate on logits would find no more faults here."""
    write_manifest(folder, ExportAttempt(target, reference, folder, ["cpu"]).describe_folder(folder / MODEL_FILE))
    check_weights(target, reference, folder)
    check_folder(target, reference, folder, "cpu")


def repack(folder, parameter, change):
    """Change the numbers of a packed parameter."""
    proto = onnx.load(folder / MODEL_FILE)
    (tensor,) = [tensor for tensor in proto.graph.initializer if parameter in parameters_of(tensor)]
    packed = np.frombuffer(tensor.raw_data, np.uint8)
    header = packing.read_header(packed)
    array = packing.unpack(packed)
    if header.rows == 1:
        array = array[0]
    changed = change(array)
    assert not np.array_equal(changed, array)
    content = packing.pack(parameter, changed, header.values, table=header.gap_bits == 0)
    tensor.raw_data = content.tobytes()
    tensor.dims[0] = len(content)
    onnx.save(proto, folder / MODEL_FILE)
