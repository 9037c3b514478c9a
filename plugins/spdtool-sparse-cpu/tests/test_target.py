"""The export target: the folder that it writes, its manifest, what it says of the weights, and its refusals.

The compiled library is a stand-in file here, unless a test needs the real one and it is installed.
"""

import hashlib
import json

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from spdtool_sparse_cpu import library
from spdtool_sparse_cpu.target import SparseCpu

from spdtool.errors import DeviceError, ModelError
from spdtool.export.gates.weights import check_zeros
from spdtool.export.target import get_target
from spdtool.models.layers import count_zeros, find_prunable_weights
from spdtool.models.load import load_model, save_model
from spdtool.models.predict import torch_forward


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A file in place of the compiled library."""
    file = tmp_path / "installed" / library.FILE
    file.parent.mkdir()
    file.write_bytes(b"machine code")
    monkeypatch.setattr(library, "path", lambda: file)
    monkeypatch.setattr(library, "version", lambda: "1.2.3")
    return file


@pytest.fixture(scope="module")
def checkpoints(toys, tmp_path_factory):
    """`checkpoints(architecture)`: a checkpoint folder with zeros in its layers, and a tokenizer."""
    kept = {}

    def make(architecture):
        if architecture not in kept:
            model = toys.classifier(architecture, layers=2, vocab_size=160)
            for number, weight in enumerate(find_prunable_weights(model).values()):
                weight.data[:, number % 3 :: 3] = 0
                weight.data[:, (number + 1) % 3 :: 3] = 0
            kept[architecture] = tmp_path_factory.mktemp(architecture) / "checkpoint"
            tokenizer = toys.tokenizer(token_types=toys.ARCHITECTURES[architecture][1])
            save_model(model, tokenizer, kept[architecture])
        return kept[architecture]

    return make


def sets(values, embeddings):
    return f"export.values={values}", f"export.embeddings={embeddings}"


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_folder_manifest_and_weights(toys, reference, checkpoints, tmp_path, architecture):
    checkpoint, folder = checkpoints(architecture), tmp_path / "export" / "student"
    recipe = toys.recipe(*sets("fp32", "fp32"))
    files = SparseCpu().export(checkpoint, folder, recipe)
    assert files == [folder / "onnx/model.onnx"]

    written = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    expected = ["config.json", "manifest.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert written == sorted([*expected, f"lib/{library.FILE}"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == set(written) - {"manifest.json"}
    for name, facts in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert (manifest["format"], manifest["target"], manifest["model"]) == (1, "sparse-cpu", "onnx/model.onnx")
    assert manifest["library"].pop("platform")
    assert manifest["library"] == {
        "file": f"lib/{library.FILE}",
        "distribution": "spdtool-sparse-cpu",
        "version": "1.2.3",
        "sha256": hashlib.sha256(b"machine code").hexdigest(),
    }
    assert (manifest["values"], manifest["embeddings"], len(manifest["labels"])) == ("fp32", "fp32", 2)
    assert str(tmp_path) not in (folder / "manifest.json").read_text()

    model = load_model(checkpoint, eager=True)
    check_zeros(SparseCpu().count_zeros(folder), count_zeros(checkpoint, list(find_prunable_weights(model))))
    held = dict(SparseCpu().stored_weights(folder))
    assert len(list(SparseCpu().stored_weights(folder))) == len(held)
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters(remove_duplicate=False)}
    assert set(held) == set(parameters)
    assert all(np.array_equal(held[name], value) for name, value in parameters.items())

    batch = {
        "input_ids": np.array([[2, 7, 9, 3], [2, 8, 3, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    if toys.ARCHITECTURES[architecture][1]:
        batch["token_type_ids"] = np.zeros((2, 4), np.int64)
    found = ReferenceEvaluator(onnx.load(files[0]), new_ops=reference.OPERATORS).run(None, batch)[0]
    assert np.abs(found - torch_forward(model)(batch)).max() < 2e-5


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("architecture", ["bert", "mpnet"])
@pytest.mark.parametrize(("values", "embeddings"), [("fp16", "fp16"), ("int8", "int8")])
def test_zeros_survive_every_way_of_storing(toys, checkpoints, tmp_path, architecture, values, embeddings):
    checkpoint = checkpoints(architecture)
    SparseCpu().export(checkpoint, tmp_path / "out", toys.recipe(*sets(values, embeddings)))
    model = load_model(checkpoint)
    check_zeros(SparseCpu().count_zeros(tmp_path / "out"), count_zeros(checkpoint, list(find_prunable_weights(model))))
    assert {name for name, _ in SparseCpu().stored_weights(tmp_path / "out")} == {
        name for name, _ in model.named_parameters()
    }


@pytest.mark.usefixtures("stand_in")
def test_two_exports_are_the_same(toys, checkpoints, tmp_path):
    for name in ("one", "two"):
        SparseCpu().export(checkpoints("bert"), tmp_path / name, toys.recipe())
    for file in ("onnx/model.onnx", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


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


def test_the_library_in_the_folder_is_never_run(stand_in, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / library.FILE).write_bytes(b"a stranger's")
    assert SparseCpu().libraries(tmp_path) == [stand_in]


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\x08\x0a\xff\xff\xff\xff"])
def test_a_file_that_is_no_model(tmp_path, content):
    (tmp_path / "onnx").mkdir()
    if content is not None:
        (tmp_path / "onnx/model.onnx").write_bytes(content)
    if content == b"":  # protobuf reads it: a model without anything in it
        assert SparseCpu().count_zeros(tmp_path) == {}
        return
    with pytest.raises(ModelError, match=r"model\.onnx cannot be read"):
        SparseCpu().count_zeros(tmp_path)


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
    SparseCpu().export(checkpoint, tmp_path / "out", toys.recipe(*sets("fp32", "fp32")))
    forward = SparseCpu().session(tmp_path / "out", threads=1)
    batch = {
        "input_ids": np.array([[2, 7, 9, 3], [2, 8, 3, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    batch["token_type_ids"] = np.zeros((2, 4), np.int64)
    taken = [name for name in batch if name != "token_type_ids" or toys.ARCHITECTURES[architecture][1]]
    expected = torch_forward(load_model(checkpoint, eager=True))({name: batch[name] for name in taken})
    assert np.abs(forward(batch) - expected).max() < 1e-4
