"""`spdtool.load`: the answers of the checkpoint in transformers, for texts and token ids, without torch."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pandas
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import spdtool
from spdtool import plugins
from spdtool.errors import DataError, DeviceError, ModelError, PluginError
from spdtool.export import onnx_session
from spdtool.export.classifier import Classifier
from spdtool.export.target import RIGHT_PADDED
from spdtool.export.targets import Onnx
from spdtool.models.layers import max_positions
from spdtool.models.load import save_model
from spdtool.tasks.decision import SeveralLabels

TEXTS = ["the film was very good", "bad", "a meal and a book , so cold it was", ".", "good bad good"]
LONG = " ".join(["good film"] * 80)


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Path:
    """A folder with `checkpoint` and `export/student` of a BERT with three labels; read only."""
    folder = tmp_path_factory.mktemp("load")
    names = {0: "no", 1: "maybe", 2: "yes"}
    model = toys.bert(labels=3, id2label=names, label2id={name: index for index, name in names.items()})
    save_model(model, toys.tokenizer(), folder / "checkpoint")
    Onnx().export(folder / "checkpoint", folder / "export/student", toys.recipe())
    toys.seal(folder / "export/student")
    return folder


@pytest.fixture(scope="module")
def loaded(model_folders: Path) -> Classifier:
    return spdtool.load(model_folders / "export/student", threads=1)


def expected(model_folders: Path, *columns: list[str]) -> np.ndarray:
    """Compute the logits of the checkpoint in transformers, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(model_folders / "checkpoint")
    model = AutoModelForSequenceClassification.from_pretrained(model_folders / "checkpoint").eval()
    with torch.inference_mode():
        rows = [
            model(**tokenizer(*row, truncation=True, return_tensors="pt")).logits for row in zip(*columns, strict=True)
        ]
    return torch.cat(rows).numpy()


# Text ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_logits_of_texts_equal_those_of_the_checkpoint(
    loaded: Classifier, model_folders: Path, batch_size: int
) -> None:
    logits = loaded.logits([*TEXTS, LONG], batch_size=batch_size)
    assert (logits.dtype, logits.shape) == (np.float32, (6, 3))
    np.testing.assert_allclose(logits, expected(model_folders, [*TEXTS, LONG]), atol=1e-5)


def test_long_pairs_are_truncated_as_in_transformers(loaded: Classifier, model_folders: Path) -> None:
    first, second = ["good film", LONG, "bad", LONG], ["a book", "bad", LONG, LONG]
    np.testing.assert_allclose(loaded.logits(first, second), expected(model_folders, first, second), atol=1e-5)
    assert loaded(first[0], second[0]) == loaded(first, second)[0]
    assert np.abs(loaded.logits(first, second) - loaded.logits(first)).max() > 1e-3


def test_one_text_gives_a_label_and_several_a_list(loaded: Classifier, model_folders: Path) -> None:
    named = [("no", "maybe", "yes")[index] for index in expected(model_folders, TEXTS).argmax(axis=1)]
    assert loaded(TEXTS) == loaded(tuple(TEXTS)) == loaded(np.array(TEXTS)) == loaded.labels(TEXTS) == named
    assert loaded(TEXTS[0]) == named[0]
    assert loaded.labels(TEXTS[0]) == named[:1]
    assert loaded.logits(TEXTS[0]).shape == (1, 3)
    assert loaded([]) == []
    assert loaded.logits([]).shape == (0, 3)


def test_columns_of_other_libraries_are_texts(loaded: Classifier) -> None:
    first, second = ["good film", "bad"], ["a book", "fine"]
    answers = loaded(first, second)
    for kind in (np.array, pandas.Series, iter, lambda texts: np.array(texts, object)):
        assert loaded(kind(first)) == loaded(first), kind
        assert loaded(kind(first), kind(second)) == answers, kind
        assert np.array_equal(loaded.logits(kind(first), kind(second)), loaded.logits(first, second)), kind
    for kind in (list, pandas.Series):
        with pytest.raises(DataError, match=r"row 1 is (None|nan), and others are texts"):
            loaded(kind(["good", None]))


def test_a_regression_gives_values(tmp_path: Path, toys: ModuleType) -> None:
    model = toys.bert(layers=1, labels=1, id2label={0: "score"}, label2id={"score": 0}, problem_type="regression")
    save_model(model, toys.tokenizer(), tmp_path / "checkpoint")
    Onnx().export(tmp_path / "checkpoint", tmp_path / "out", toys.recipe())
    classify = spdtool.load(tmp_path / "out", unverified=True)
    assert classify(TEXTS) == classify.logits(TEXTS)[:, 0].tolist()
    assert isinstance(classify("bad"), float)


@pytest.mark.parametrize(
    ("architecture", "side"), [("roberta", "right"), ("distilbert", "right"), ("deberta-v2", "left")]
)
def test_other_families_and_padding_on_the_left(architecture: str, side: str, tmp_path: Path, toys: ModuleType) -> None:
    model = toys.classifier(architecture, **toys.TRACED)
    core = toys.tokenizer().backend_tokenizer
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if toys.ARCHITECTURES[architecture][1] else [])]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=inputs, padding_side=side, **names
    )  # says nothing of a longest input
    save_model(model, tokenizer, tmp_path / "checkpoint")
    Onnx().export(tmp_path / "checkpoint", tmp_path / "out", toys.recipe())
    classify = spdtool.load(tmp_path / "out", unverified=True)
    assert classify.max_length == max_positions(model) or architecture == "deberta-v2"
    stock_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    with torch.inference_mode():  # one batch: a classifier that reads token 0 sees the padding on the left
        logits = model(**stock_tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(classify.logits(TEXTS), logits, atol=1e-5)
    assert classify.logits([LONG]).shape == (1, 3)


# Token ids ----------------------------------------------------------------------------------------------------------


def test_token_ids_give_the_same_as_their_text(loaded: Classifier, model_folders: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folders / "checkpoint")
    ids, logits = [tokenizer(text)["input_ids"] for text in TEXTS], loaded.logits(TEXTS)
    batch = tokenizer(TEXTS, padding=True, return_tensors="np")
    tensors = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for inputs in (ids, {"input_ids": ids}, [np.array(row) for row in ids], dict(batch), batch, tensors):
        np.testing.assert_allclose(loaded.logits(inputs), logits, atol=1e-5)
    for inputs in (ids[0], np.array(ids[0]), {"input_ids": ids[0]}, {"input_ids": np.array([ids[0]])}):
        np.testing.assert_allclose(loaded.logits(inputs), logits[:1], atol=1e-5)
    assert loaded(ids) == loaded(TEXTS)


def test_token_types_and_holes_in_the_mask_count(loaded: Classifier, model_folders: Path) -> None:
    inputs = {
        "input_ids": np.array([[2, 6, 8, 3], [2, 7, 9, 3]]),
        "token_type_ids": np.array([[0, 0, 1, 1], [0, 0, 0, 0]]),
        "attention_mask": np.array([[1, 0, 1, 1], [0, 1, 1, 1]]),
    }
    model = AutoModelForSequenceClassification.from_pretrained(model_folders / "checkpoint").eval()
    with torch.inference_mode():
        logits = model(**{name: torch.from_numpy(column) for name, column in inputs.items()}).logits.numpy()
    np.testing.assert_allclose(loaded.logits(inputs), logits, atol=1e-5)


def test_a_file_that_takes_row_lengths_refuses_masks_with_gaps(model_folders: Path, tmp_path: Path) -> None:
    """Its attention would see the masked tokens, without a word."""
    folder = shutil.copytree(model_folders / "export/student", tmp_path / "out")
    (folder / "manifest.json").unlink(missing_ok=True)
    proto = onnx.load(folder / "onnx/model.onnx")
    onnx.helper.set_model_props(proto, {RIGHT_PADDED: "true"})
    onnx.save(proto, folder / "onnx/model.onnx")
    classify = spdtool.load(folder, threads=1, unverified=True)
    for mask in ([[1, 0, 1, 1]], [[0, 1, 1, 1]]):
        with pytest.raises(DataError, match="row 0 masks tokens before others, and this file computes padding on the"):
            classify.logits({"input_ids": [[2, 6, 8, 3]], "attention_mask": mask})
    padded = classify.logits({"input_ids": [[2, 6, 8, 3]], "attention_mask": [[1, 1, 1, 0]]})
    np.testing.assert_allclose(padded, classify.logits([[2, 6, 8]]), atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "texts .* or rows of whole numbers were expected, found NoneType"),
        (7, "found int"),
        (b"bytes", "found bytes"),
        (np.array(3), "found ndarray"),
        (object(), "found object"),
        (["text", 3], "row 1 is 3, and others are texts"),
        ([["text"], ["text"]], r"row 0 is \['text'\]"),
        ([[1.5, 2.0]], r"row 0 is \[1.5, 2.0\]"),
        ([[1, [2]]], "row 0 is"),
        ([None], "row 0 is None"),
        (np.ones((1, 2, 3), int), "row 0 is"),
        ([[2, 25]], "row 0 has the token 25; the model knows 0 to 24"),
        ([[2, 3], [-1]], "row 1 has the token -1"),
        ([[2, 3], []], "row 1 has no token"),
        ([[5] * 65], "row 0 has 65 tokens; the model takes 64"),
        ({"ids": [[1]]}, "the inputs hold ids"),
        ({"input_ids": [[1]], "labels_": [1]}, "the inputs hold input_ids, labels_"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "differ in length"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1], [1, 1]]}, "different numbers of rows"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "row 0 has no token"),
        ({"input_ids": "text"}, "input_ids: texts .* or rows of whole numbers were expected, found str"),
    ],
)
def test_invalid_inputs_are_refused(loaded: Classifier, inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loaded.logits(inputs)


@pytest.mark.parametrize("pairs", ["one", ["one"], [1, 2], ["one", None], 3])
def test_pairs_that_do_not_fit_are_refused(loaded: Classifier, pairs: Any) -> None:
    with pytest.raises(DataError, match="2 texts and, as their pairs, (1|something else than texts): as many texts"):
        loaded.logits(["one", "two"], pairs)


@pytest.mark.parametrize(("texts", "pairs"), [(["bad", " "], None), (["bad", "good"], ["a", ""])])
def test_an_empty_text_is_refused_as_training_refuses_it(loaded: Classifier, texts: Any, pairs: Any) -> None:
    with pytest.raises(DataError, match="row 1 has an empty text"):
        loaded(texts, pairs)


def test_a_lone_surrogate_is_refused(loaded: Classifier) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        loaded.logits(["\ud800"])


def test_a_token_type_that_the_model_lacks_is_refused(loaded: Classifier) -> None:
    with pytest.raises(DataError, match="row 0 has the token type 7; the model knows 0 to 1"):
        loaded.logits({"input_ids": [[2, 3]], "token_type_ids": [[0, 7]]})


def test_a_classifier_can_be_pickled(loaded: Classifier) -> None:
    unpickled = pickle.loads(pickle.dumps(loaded))
    np.testing.assert_array_equal(unpickled.logits([[2, 3]]), loaded.logits([[2, 3]]))


def test_several_labels_a_row_are_those_above_one_half(loaded: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "decision", SeveralLabels(loaded.names))
    logits = np.full((2, len(loaded.names)), -1.0)
    logits[1] = 1.0
    monkeypatch.setattr(loaded, "outputs", lambda *_: logits)
    assert loaded(["a", "b"]) == [[], loaded.names]


@pytest.mark.parametrize("threads", ["2", 1.5, -1, True, None])
def test_an_invalid_number_of_threads_is_refused(model_folders: Path, threads: Any) -> None:
    with pytest.raises(DeviceError, match="threads ="):
        spdtool.load(model_folders / "export/student", threads=threads)


def test_pairs_with_ids_and_a_batch_of_nothing_are_refused(loaded: Classifier) -> None:
    with pytest.raises(DataError, match="pairs were given with token ids"):
        loaded.logits([[2, 3]], ["text"])
    with pytest.raises(DataError, match="batch_size = 0"):
        loaded.logits(["text"], batch_size=0)


# Folders and libraries ----------------------------------------------------------------------------------------------


def test_a_folder_of_roles_opens_its_student(model_folders: Path, loaded: Classifier) -> None:
    from_roles = spdtool.load(str(model_folders / "export"))
    assert (from_roles.names, from_roles.max_length) == (["no", "maybe", "yes"], 64)
    np.testing.assert_array_equal(from_roles.logits(TEXTS), loaded.logits(TEXTS))


def labels_of(labels: Any) -> Any:
    """Return a fault that writes other labels into config.json."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"id2label": labels}))

    return damage


WRONG_LABELS: list[tuple[Any, str]] = [
    ({"1": "a"}, "does not number the labels"),
    (["no", "maybe", "yes"], "does not number the labels"),
    ({"0": "no", "1": 1, "2": "yes"}, "does not number the labels"),
    ({"0": "no", "1": "no", "2": "yes"}, "gives two labels one name"),
    ({"0": "no"}, r"output of shape \['batch', 3\]; config.json names 1 labels"),
    ({"0": "a", "1": "b", "2": "c", "3": "d"}, "config.json names 4 labels"),
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("["), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json names 2 labels"),
        *((labels_of(labels), message) for labels, message in WRONG_LABELS),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"id2label": NaN}'), "NaN is no JSON number"),
        (lambda folder: (folder / "onnx/model.onnx").write_bytes(b"junk"), "onnxruntime cannot open"),
        (lambda folder: (folder / "onnx/model.onnx").unlink(), "has no onnx/model.onnx"),
    ],
)
def test_a_damaged_folder_is_refused(damage: Any, message: str, model_folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folders / "export/student", tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ModelError, match=r"is damaged or was changed|lacks|bytes; manifest|has no onnx/model.onnx"):
        spdtool.load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ModelError, match="has no onnx/model.onnx|has no manifest.json"):
        spdtool.load(folder)
    with pytest.raises(ModelError, match=message):
        spdtool.load(folder, unverified=True)


def test_a_path_that_is_not_a_folder_is_refused(model_folders: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        spdtool.load(model_folders / "nowhere")
    with pytest.raises(ModelError, match="a folder was expected, found a NoneType"):
        spdtool.load(None)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="there is no provider 'tpu'"):
        spdtool.load(model_folders / "export", provider="tpu")
    with pytest.raises(ModelError, match="has no onnx/model.onnx"):
        spdtool.load(model_folders / "checkpoint")


class TestLibrary:
    """A folder whose model needs custom operators."""

    @pytest.fixture
    def folder(self, model_folders: Path, tmp_path: Path, toys: ModuleType) -> Path:
        copied = shutil.copytree(model_folders / "export/student", tmp_path / "sparse")
        library = {"file": "lib/ops.so", "distribution": "spdtool-sparse-cpu", "version": "0.3.0"}
        toys.seal(copied, target="sparse-cpu", library=library)
        (copied / "lib").mkdir()
        (copied / "lib/ops.so").write_bytes(b"a stranger's code")
        return copied

    @pytest.fixture
    def opened_libraries(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """Record the libraries of each opened session; none is loaded."""
        libraries_seen: list[list[str]] = []
        open_session = onnx_session.open_session

        def record_session(model: Path, provider: str = "cpu", threads: int = 0, libraries: Any = ()) -> Any:
            libraries_seen.append([str(path) for path in libraries])
            return open_session(model, provider, threads)

        monkeypatch.setattr(onnx_session, "open_session", record_session)
        return libraries_seen

    def install(self, monkeypatch: pytest.MonkeyPatch, path: Any, version: str = "0.3.0") -> None:
        """Install a plugin whose library is at `path()`."""
        library = plugins.Library("spdtool-sparse-cpu", version, SimpleNamespace(path=path))
        monkeypatch.setattr(plugins, "find_library", {"sparse-cpu": library}.__getitem__)

    def test_the_library_of_the_installed_plugin_is_used_not_the_folders(
        self, folder: Path, opened_libraries: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.install(monkeypatch, lambda: Path("/installed/ops.so"))
        assert spdtool.load(folder)("bad") in ("no", "maybe", "yes")
        assert opened_libraries == [["/installed/ops.so"]]

    def test_a_named_library_is_used(self, folder: Path, opened_libraries: list[list[str]]) -> None:
        spdtool.load(folder, library=folder / "lib/ops.so")
        assert opened_libraries == [[str(folder / "lib/ops.so")]]
        with pytest.raises(ModelError, match="there is no library"):
            spdtool.load(folder, library=folder / "lib/none.so")

    def test_a_library_that_does_not_load_is_refused(self, folder: Path) -> None:
        with pytest.raises(ModelError, match=r"onnxruntime cannot load the operators in .*ops.so") as error:
            spdtool.load(folder, library=folder / "lib/ops.so")
        assert error.value.hint

    def test_a_missing_plugin_is_named(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugins, "entry_points", lambda **_: [])
        with pytest.raises(PluginError, match="'sparse-cpu'") as error:
            spdtool.load(folder)
        assert "pip install spdtool-sparse-cpu" in str(error.value.hint)

    def test_a_plugin_without_its_compiled_library_says_so(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def path() -> Path:
            raise DeviceError("the library was not compiled", "install a compiler")

        self.install(monkeypatch, path)
        with pytest.raises(DeviceError, match="was not compiled"):
            spdtool.load(folder)

    @pytest.mark.parametrize(("version", "is_told"), [("0.1.0", True), ("0.3.0", False)])
    def test_a_library_of_another_version_is_reported_if_it_does_not_load(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, is_told: bool
    ) -> None:
        self.install(monkeypatch, lambda: folder / "lib/ops.so", version)
        with pytest.raises(ModelError, match="onnxruntime cannot load the operators") as error:
            spdtool.load(folder)
        assert ("was written by spdtool-sparse-cpu 0.3.0; 0.1.0 is installed" in error.value.message) == is_told
        assert (error.value.hint == "pip install spdtool-sparse-cpu==0.3.0") == is_told

    def test_custom_operators_run_on_the_cpu_only(self, folder: Path) -> None:
        with pytest.raises(DeviceError, match="run on the CPU only"):
            spdtool.load(folder, provider="cuda")


def test_neither_torch_nor_transformers_is_imported(model_folders: Path) -> None:
    code = (
        "import sys, spdtool\n"
        "assert 'numpy' not in sys.modules, 'import spdtool is not light'\n"
        f"print(spdtool.load({str(model_folders / 'export')!r})('good film'))\n"
        "sys.exit(', '.join({'torch', 'transformers', 'onnx', 'datasets'} & sys.modules.keys()) or 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.strip() in ("no", "maybe", "yes")


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        spdtool.laod  # type: ignore[attr-defined]  # noqa: B018
