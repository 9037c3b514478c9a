"""Real clients of a bundle give the predictions of the student in torch; each client has its own environment.

They need the network (PyPI, npm): `make test-clients` runs them, `make test` never does.
SPDTOOL_CLIENTS names a folder that keeps the environments between runs. SPDTOOL_RUN names a finished run to use
instead of a small one of the demo task.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import spdtool
from spdtool import plugins
from spdtool.data.dataset import Dataset, Rows
from spdtool.errors import GateError
from spdtool.export.bundle.layouts import write_layout
from spdtool.export.bundle.manifest import read_manifest
from spdtool.export.bundle.write import write_bundle
from spdtool.export.gates.checked_export import export_and_check
from spdtool.export.gates.reference import Reference, prepare_dev_sets
from spdtool.export.target import get_target
from spdtool.models.load import save_model
from spdtool.recipe import reading as recipe
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run
from spdtool.run.records import BundleManifest, ExportResult, TargetExport
from spdtool.stages.distill import distill
from spdtool.stages.export import export
from spdtool.stages.finetune import finetune
from spdtool.stages.prune import prune
from spdtool.stages.teacher import teacher
from spdtool.tasks.prepare import find_task

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif("SPDTOOL_TEST_CLIENTS" not in os.environ, reason="needs the network: make test-clients"),
]

HERE = Path(__file__).parent
ROWS = 200
DTYPES = {"onnx/model.onnx": "fp32", "onnx/model_fp16.onnx": "fp16", "onnx/model_quantized.onnx": "q8"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished export."""
    if "SPDTOOL_RUN" in os.environ:
        return Run.open(os.environ["SPDTOOL_RUN"])
    sets = [f"{stage}.max_steps=60" for stage in ("teacher", "prune", "distill", "finetune")]
    sets += ["export.skip=[]", "teacher.accept=true"]
    settings = recipe.build_recipe("default", {"task": "demo", "device": "cpu"}, sets)
    run = Run.for_recipe(tmp_path_factory.mktemp("clients") / "demo", settings)
    for stage in (teacher, prune, distill, finetune):
        stage(run)
    with contextlib.suppress(GateError):  # a refused variant is only missing from the bundle
        export(run)
    return run


@pytest.fixture(scope="module")
def rows(run: Run) -> dict[str, Any]:
    """Dev sentences, their token ids, and their logits by the checkpoint in torch."""
    dev_rows = find_task(run.recipe).read_rows(run.recipe)["dev"].select(range(ROWS))
    tokenizer = AutoTokenizer.from_pretrained(run.path / "finetune")
    model = AutoModelForSequenceClassification.from_pretrained(run.path / "finetune").eval()
    pairs = dev_rows.second or [None] * ROWS
    encoded = [tokenizer(*texts, truncation=True) for texts in zip(dev_rows.first, pairs, strict=True)]
    with torch.inference_mode():
        logits = [model(**{name: torch.tensor([ids]) for name, ids in row.items()}).logits[0] for row in encoded]
    return {
        "texts": dev_rows.first,
        "pairs": dev_rows.second,
        "encoded": [dict(row) for row in encoded],
        "logits": torch.stack(logits).numpy(),
    }


@pytest.fixture(scope="module")
def servable(run: Run) -> Path:
    return run.path / "export/bundle"


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return `python("ov", "openvino", ...)`, which creates an environment with only these distributions."""
    environments = Path(os.environ.get("SPDTOOL_CLIENTS") or tmp_path_factory.mktemp("environments"))
    clean = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}

    def make(name: str, *distributions: str) -> Path:
        interpreter = environments / name / "bin/python"
        if not interpreter.exists():
            subprocess.run([sys.executable, "-m", "venv", str(environments / name)], check=True)
            words = [str(interpreter), "-m", "pip", "install", "--quiet", *distributions]
            process = subprocess.run(words, capture_output=True, text=True, env=clean, check=False)
            if process.returncode:
                shutil.rmtree(environments / name)
                pytest.skip(f"{' '.join(distributions)} cannot be installed: {process.stderr.strip()[-300:]}")
        return interpreter

    return make


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers.js and onnxruntime-web installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node")
    folder = Path(os.environ.get("SPDTOOL_CLIENTS") or tmp_path_factory.mktemp("environments")) / "js"
    if not (folder / "node_modules/@huggingface/transformers").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text("{}")
        words = ["npm", "install", "@huggingface/transformers", "onnxruntime-web"]
        environment = os.environ | {"ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
        process = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if process.returncode:
            pytest.skip(f"npm install failed: {process.stderr.strip()[-300:]}")
    return folder


def run_client(words: list[Any], request: Any, folder: Path | None = None) -> dict[str, Any]:
    """Run a client that reads a JSON request from stdin, and return its JSON answer."""
    words = [str(word) for word in words]
    process = subprocess.run(words, input=json.dumps(request), capture_output=True, text=True, cwd=folder, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    answer: dict[str, Any] = json.loads(process.stdout)
    return answer


def count_flips(client: str, version: str, logits: np.ndarray, expected: np.ndarray) -> int:
    """Count the predictions that differ; print the figures, for the documents."""
    flipped = int((logits.argmax(1) != expected.argmax(1)).sum())
    print(f"\n{client} {version}: {flipped} of {len(logits)} differ; logits by {np.abs(logits - expected).max():.1e}")
    return flipped


def test_openvino(servable: Path, rows: dict[str, Any], python: Make) -> None:
    words = [python("ov", "openvino", "numpy"), HERE / "openvino_logits.py", servable / "onnx/model.onnx"]
    answer = run_client(words, rows["encoded"])
    assert count_flips("OpenVINO", answer["version"], np.array(answer["logits"]), rows["logits"]) == 0


@pytest.mark.parametrize("file", DTYPES)
def test_transformers_js(file: str, servable: Path, rows: dict[str, Any], node: Path) -> None:
    if not (servable / file).is_file():
        pytest.skip(f"the bundle has no {file}")
    dtype = DTYPES[file]
    words = ["node", HERE / "transformers_js.mjs", servable.parent, servable.name, dtype]
    answer = run_client(words, {"texts": rows["texts"], "pairs": rows["pairs"]}, node)
    logits = np.array(answer["logits"])
    flipped = count_flips(f"transformers.js ({dtype})", answer["version"], logits, rows["logits"])
    assert flipped <= (0 if dtype == "fp32" else 0.02 * ROWS)
    names = json.loads((servable / "config.json").read_text())["id2label"]
    assert answer["labels"] in ([], [names[str(index)] for index in logits.argmax(1)])


def test_onnxruntime_web(servable: Path, rows: dict[str, Any], node: Path) -> None:
    words = ["node", HERE / "onnxruntime_web.mjs", servable / "onnx/model.onnx"]
    answer = run_client(words, rows["encoded"], node)
    assert count_flips("onnxruntime-web", answer["version"], np.array(answer["logits"]), rows["logits"]) == 0


def test_optimum(servable: Path, rows: dict[str, Any], python: Make, tmp_path: Path) -> None:
    interpreter = python("optimum", "optimum-onnx[onnxruntime]")
    words = [interpreter, HERE / "optimum_logits.py", servable, "model.onnx"]
    answer = run_client(words, {"texts": rows["texts"], "pairs": rows["pairs"]}, tmp_path)
    assert count_flips("optimum-onnx", answer["version"], np.array(answer["logits"]), rows["logits"]) == 0


def test_plain_onnxruntime_replays_the_golden_examples(servable: Path, python: Make) -> None:
    interpreter = python("bare", "onnxruntime", "tokenizers", "numpy")
    absent = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ('torch', 'spdtool', 'transformers'))))"
    subprocess.run([interpreter, "-I", "-c", absent], check=True)
    process = subprocess.run([interpreter, "-I", servable / "selftest.py"], capture_output=True, text=True, check=False)
    assert (process.returncode, "failed" in process.stdout) == (0, False), process.stdout


def test_plain_onnxruntime_gives_the_student_s_predictions(servable: Path, rows: dict[str, Any]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(servable / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    logits = []
    for row in rows["encoded"]:
        feeds = {name: np.array([row[name]], np.int64) for name in names}
        logits.append(session.run(None, feeds)[0])
    assert count_flips("onnxruntime", onnxruntime.__version__, np.concatenate(logits), rows["logits"]) == 0


def test_the_onnx_checker(servable: Path) -> None:
    manifest = read_manifest(servable)
    assert isinstance(manifest, BundleManifest)
    for name, variant in manifest.variants.items():
        model = onnx.load(servable / variant.file)
        standard = {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
        assert standard or name != "onnx"
        if standard:
            onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize(("device", "kind"), [("cpu", "KIND_CPU"), ("cuda", "KIND_GPU")])
def test_triton_reads_its_repository(device: str, kind: str, run: Run, python: Make, tmp_path: Path) -> None:
    interpreter = python("triton", "tritonclient[grpc]")
    device_run = Run(run.path, run.recipe.model_copy(update={"device": device}))
    write_layout(device_run, "triton", tmp_path / "my.model")
    models = run_client([interpreter, HERE / "triton_config.py", tmp_path / "my.model"], None)["models"]
    assert set(models) == {"my_model", "my_model_tokenizer", "my_model_model"}
    assert models["my_model_model"]["backend"] == "onnxruntime"
    assert [group["kind"] for group in models["my_model_model"]["instance_group"]] == [kind]
    assert models["my_model_model"]["dynamic_batching"]["max_queue_delay_microseconds"] == "2000"
    steps = models["my_model"]["ensemble_scheduling"]["step"]
    assert [step["model_name"] for step in steps] == ["my_model_tokenizer", "my_model_model"]
    ids = {tensor["name"] for tensor in models["my_model_tokenizer"]["output"]}
    assert ids == {tensor["name"] for tensor in models["my_model_model"]["input"]}
    assert ids == set(steps[1]["input_map"]) == set(steps[0]["output_map"])


KINDS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "single": (False, ("bad", "good")),
    "pairs": (True, ("bad", "fair", "good")),
    "regression": (True, ()),
}
LOCAL = """import {{ env }} from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = {parent};
"""


def write_toy_bundle(folder: Path, checkpoint: Path, settings: Recipe) -> Path:
    """Export a checkpoint to ONNX and bundle it, in `folder`."""
    reference = Reference(checkpoint, prepare_dev_sets(checkpoint, settings), settings)
    exported = export_and_check(get_target("onnx"), reference, folder / "export/student", ["cpu"])
    result = ExportResult(first="onnx", targets={"onnx": TargetExport(student=exported)})
    assert write_bundle(folder / "export", checkpoint, settings, result) is None
    return folder / "export/bundle"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> dict[str, Path]:
    """Toy bundles, by kind of task."""
    folders = {}
    for kind, (pairs, labels) in KINDS.items():
        toys.register(toys.dataset(kind, pairs=pairs, labels=labels))
        folder, names = tmp_path_factory.mktemp(kind), labels or ("score",)
        model = toys.bert(
            labels=len(names), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
        )
        save_model(model, toys.tokenizer(), folder / "checkpoint")
        folders[kind] = write_toy_bundle(folder, folder / "checkpoint", toys.recipe(task=kind))
        plugins.datasets.unregister(kind)
    return folders


def run_snippets(bundle: Path, node: Path, replacements: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Run the snippets of a bundle's card, with other texts where `replacements` has them; return what they print."""
    printed = []
    for language, code in re.findall(r"```(python|js)\n(.*?)```", (bundle / "README.md").read_text(), re.DOTALL):
        for text, replacement in replacements.items():
            code = code.replace(text, replacement)
        if "sentence_transformers" in code:
            continue  # test_sentence_transformers.py has them
        if language == "python":
            words = [sys.executable, "-c", code.replace("FOLDER", str(bundle))]
        else:
            # Beside node_modules, because modules are looked for from the file on.
            file = node / "card.mjs"
            file.write_text(LOCAL.format(parent=json.dumps(f"{bundle.parent}/")) + code.replace("FOLDER", bundle.name))
            words = ["node", str(file)]
        process = subprocess.run(words, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr[-2000:]
        printed.append(process.stdout.strip())
    return printed


@pytest.mark.parametrize("kind", KINDS)
def test_every_snippet_of_the_card_gives_the_answer_of_the_model(
    kind: str, bundles: dict[str, Path], node: Path
) -> None:
    arguments = ("first text", "second text") if KINDS[kind][0] else ("one text",)
    answer = spdtool.load(bundles[kind])(*arguments)
    printed = run_snippets(bundles[kind], node)
    assert len(printed) == 3
    for text in printed:
        if KINDS[kind][1]:
            assert str(answer) in text
        else:
            assert float(text) == pytest.approx(answer, abs=1e-4)


def bundle_of(toys: ModuleType, dataset: Dataset, model: Any, folder: Path) -> Path:
    """Bundle a random model for the data set."""
    toys.register(dataset)
    save_model(model, toys.tokenizer(), folder / "checkpoint")
    bundle = write_toy_bundle(folder, folder / "checkpoint", toys.recipe(task=dataset.name))
    plugins.datasets.unregister(dataset.name)
    return bundle


def test_snippets_of_several_labels_give_their_probabilities(toys: ModuleType, tmp_path: Path, node: Path) -> None:
    def rows(count: int, seed: int) -> Rows:
        sets = np.random.default_rng(seed).random((count, 3)) < 0.5
        return Rows(toys.rows(count, seed).first, None, sets.astype(np.float32))

    names = ("joy", "anger", "fear")
    dataset = Dataset(
        "toy-sets", "multilabel", ("text",), names, ("f1_micro",), lambda *_: {"train": rows(40, 1), "dev": rows(20, 2)}
    )
    model = toys.bert(
        labels=3,
        problem_type="multi_label_classification",
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    bundle = bundle_of(toys, dataset, model, tmp_path)
    _, python, script = run_snippets(bundle, node)
    probabilities = {name: float(score) for name, score in re.findall(r"label: '(\w+)', score: ([\d.e-]+)", script)}
    assert set(probabilities) == set(names)
    assert ast.literal_eval(python) == [name for name in names if probabilities[name] > 0.5]


def test_snippets_of_a_tagger_give_the_same_tags(toys: ModuleType, tmp_path: Path, node: Path) -> None:
    bundle = bundle_of(toys, toys.tag_dataset(), toys.tagger(), tmp_path)
    answer, python, script = run_snippets(bundle, node, {"one text": "the film was good"})
    tags = ast.literal_eval(python)[1:-1]  # without [CLS] and [SEP]
    assert {tag for tag in tags if tag != "O"}
    assert re.findall(r"entity: '([^']+)'", script) == [tag for tag in tags if tag != "O"]
    assert [entity["entity_group"] for entity in ast.literal_eval(answer)]


def test_snippets_of_question_answering_point_to_the_same_tokens(toys: ModuleType, tmp_path: Path, node: Path) -> None:
    bundle = bundle_of(toys, toys.question_dataset(), toys.span_finder(), tmp_path)
    texts = {"a question": "a good film", "its context": "the film was good"}
    answer, python, script = run_snippets(bundle, node, texts)
    assert ast.literal_eval(answer)["answer"] in texts["its context"]
    assert python == script


def test_snippets_of_a_reranker_give_the_same_score(toys: ModuleType, tmp_path: Path, node: Path) -> None:
    printed = run_snippets(bundle_of(toys, toys.ranking_dataset(), toys.bert(labels=1), tmp_path), node)
    assert [float(text) for text in printed] == pytest.approx([float(printed[0])] * 3, abs=1e-5)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), ("lasttoken", True)])
def test_snippets_of_a_sentence_encoder_give_the_same_vector(
    pooling: str, normalize: bool, toys: ModuleType, tmp_path: Path, node: Path
) -> None:
    prompts = {"query": "the "}
    teacher = toys.sentence_encoder(
        tmp_path / "teacher", pooling=pooling, normalize=normalize, prompts=prompts, default_prompt="query"
    )
    (tmp_path / "texts.txt").write_text("\n".join(dict.fromkeys(toys.rows(60).first)), "utf-8")
    sets = ["neighbour_texts=12", "dev_share=0.4", "export.sentences=8", "max_length=16"]
    settings = recipe.request_recipe(data=tmp_path / "texts.txt", teacher=teacher, sets=sets)
    bundle = write_toy_bundle(tmp_path, teacher, settings)
    expected = spdtool.load(bundle)("one text")
    script = run_snippets(bundle, node)[-1]
    vector = [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", script)]
    np.testing.assert_allclose(vector, expected, atol=1e-5)
