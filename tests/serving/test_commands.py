"""`spdtool predict` and `serve-check`: texts, lines, damaged bundles; without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spdtool as library
from spdtool.serving import predict as lines

Call = Callable[..., Any]


def piped(*words: Any, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spdtool", *map(str, words)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_one_text_and_one_pair(spdtool: Call, older_bundle: Path) -> None:
    classify = library.load(older_bundle)
    result = spdtool("predict", older_bundle, "good film", "--pair", "bad")
    assert (result.exit_code, result.stdout.split("\t")[0]) == (0, classify("good film", "bad"))
    output = json.loads(spdtool("predict", older_bundle, "good film", "--json").stdout)
    assert (output["line"], output["label"]) == (1, classify("good film"))
    assert output["logits"] == pytest.approx(classify.logits("good film")[0].tolist(), abs=1e-5)


LINES = {
    "text": (["good film", "", "bad {", "a meal\r"], {2: "is empty"}, ["good film", "bad {", "a meal"], None),
    "tsv": (
        ["good film\tbad", "alone", "a\tb\tc", "\tx", "bad\tgood"],
        {2: "has 1 filled columns of 1", 3: "has 3 filled columns of 3", 4: "has 1 filled columns of 2"},
        ["good film", "bad"],
        ["bad", "good"],
    ),
    "jsonl": (
        ['{"text": "good film"}', "{", "[1]", '{"text": 3}', '{"text": "\\ud800"}', '{"text": "bad", "pair": null}'],
        {2: "is no JSON", 3: "is no JSON object", 4: 'has no "text"', 5: "lone surrogate"},
        ["good film", "bad"],
        None,
    ),
}


@pytest.mark.parametrize("form", LINES)
def test_lines_keep_their_order_and_invalid_lines_are_named(form: str, older_bundle: Path) -> None:
    raw_lines, expected_errors, texts, pairs = LINES[form]
    classify = library.load(older_bundle)
    results = list(lines.predict_lines(classify, lines.parse_lines(raw_lines), batch_size=2))
    assert [row["line"] for row in results] == list(range(1, len(raw_lines) + 1))
    errors = {row["line"]: row["error"] for row in results if "error" in row}
    assert errors.keys() == expected_errors.keys()
    assert all(words in errors[number] for number, words in expected_errors.items())
    assert [row["label"] for row in results if "error" not in row] == classify(texts, pairs)


def test_many_lines_with_and_without_a_pair(older_bundle: Path) -> None:
    classify = library.load(older_bundle)
    records = [{"text": f"{'good ' * (n % 9)}film"} | ({"pair": "bad"} if n % 3 else {}) for n in range(70)]
    results = list(lines.predict_lines(classify, lines.parse_lines(map(json.dumps, records)), batch_size=4))
    for row, record in zip(results, records, strict=True):
        expected = classify.logits(record["text"], record.get("pair"))[0].tolist()
        assert row["logits"] == pytest.approx(expected, abs=1e-5)


def test_predict_reads_a_pipe_and_a_file(older_bundle: Path, tmp_path: Path, spdtool: Call) -> None:
    process = piped("predict", older_bundle, "--input", "-", "--json", text="good film\n\nbad\n")
    assert process.returncode == 2
    assert [json.loads(line).get("error") for line in process.stdout.splitlines()] == [None, "is empty", None]
    assert "line 2 is empty" in process.stderr
    file = tmp_path / "lines.tsv"
    file.write_text("good film\tbad\nbad\tgood\n")
    result = spdtool("predict", older_bundle, "--input", file, "--format", "tsv")
    assert result.exit_code == 0
    labels = library.load(older_bundle)(["good film", "bad"], ["bad", "good"])
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == labels
    file.write_bytes(b"\xff\xfe")
    for arguments, message in (
        (("--input", tmp_path / "none"), "there is no file"),
        (("--input", file), "is no text in UTF-8"),
        ((), "neither a text nor --input was given"),
        (("x", "--input", "-"), "a text and --input exclude each other"),
        (("x", "--text", "a"), "--text names columns of --input"),
        (("--input", "-", "--text", "a"), "--text names columns, and standard input is read as lines"),
        (("--input", tmp_path), "is a folder"),
        (("--input", "-", "--pair", "x"), "--pair belongs to a text"),
        (("--input", "-", "--format", "csv"), "there is no format 'csv'"),
        (("x", "--variant", "onnx-fp61"), "did you mean 'onnx-fp16'"),
    ):
        result = spdtool("predict", older_bundle, *arguments)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_the_serving_commands_do_not_import_torch(older_bundle: Path) -> None:
    arguments = ["predict", str(older_bundle), "good film"]
    code = (
        "import sys\nfrom spdtool.cli.main import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "import spdtool.serving.verify, spdtool.serving.predict, spdtool.serving.batching, spdtool.serving.server\n"
        "sys.exit(', '.join({'torch', 'transformers', 'onnx', 'datasets'} & sys.modules.keys()) or 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")


# The check ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(servable: Path, tmp_path: Path) -> Path:
    return shutil.copytree(servable, tmp_path / "bundle")


def test_serve_check_accepts_an_intact_bundle(spdtool: Call, servable: Path) -> None:
    result = spdtool("serve-check", servable, "--json")
    assert result.exit_code == 0
    output = json.loads(result.stdout)
    assert {name: check["state"] for name, check in output["variants"].items()} == {"onnx": "ok", "onnx-fp16": "ok"}
    assert all(check["rows"] == 20 and check["difference"] < 1e-4 for check in output["variants"].values())


def swap(folder: Path, first_name: str, second_name: str) -> None:
    first, second = (folder / first_name).read_bytes(), (folder / second_name).read_bytes()
    (folder / first_name).write_bytes(second)
    (folder / second_name).write_bytes(first)


def flip(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder, "onnx/model.onnx"), "onnx/model.onnx is damaged"),
        (lambda folder: flip(folder, "tokenizer.json"), "tokenizer.json is damaged"),
        (lambda folder: flip(folder, "golden.json"), "golden.json is damaged"),
        (lambda folder: flip(folder, "selftest.py"), "selftest.py is damaged"),
        (lambda folder: swap(folder, "config.json", "golden.json"), "config.json has"),
        (lambda folder: (folder / "onnx/model_fp16.onnx").unlink(), "onnx/model_fp16.onnx is missing"),
        (lambda folder: (folder / "onnx/model.onnx").write_bytes(b""), "onnx/model.onnx has 0 bytes"),
    ],
)
def test_serve_check_names_a_changed_file(damage: Any, message: str, copied: Path, spdtool: Call) -> None:
    damage(copied)
    result = spdtool("serve-check", copied)
    assert (result.exit_code, message in result.stderr) == (3, True), result.stderr


def forge(folder: Path, **fields: Any) -> None:
    """Rewrite manifest.json with the current checksums of all files and with other `fields`."""
    from spdtool.export.bundle.manifest import seal
    from spdtool.run.fingerprint import sha256

    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        file = folder / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (folder / "manifest.json").write_text(json.dumps(seal(manifest | fields)))


def test_a_replaced_model_with_a_forged_checksum_fails_the_golden_examples(copied: Path, spdtool: Call) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(copied / "onnx/model.onnx")
    weight = max((tensor for tensor in model.graph.initializer if len(tensor.dims) == 2), key=lambda t: t.ByteSize())
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    (copied / "onnx/model.onnx").unlink()
    onnx.save(model, copied / "onnx/model.onnx")
    forge(copied)
    result = spdtool("serve-check", copied)
    assert result.exit_code == 3
    assert "onnx/model.onnx differs from the checkpoint by" in result.stderr


def test_a_replaced_tokenizer_with_a_forged_checksum_is_detected(copied: Path, spdtool: Call) -> None:
    text = (copied / "tokenizer.json").read_text()
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer.json").write_text(text.replace('"film"', '"flim"'))
    forge(copied)
    result = spdtool("serve-check", copied)
    assert (result.exit_code, "of golden.json has other token ids" in result.stderr) == (3, True)


def test_serve_check_executes_no_code_of_the_folder(copied: Path, spdtool: Call, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    (copied / "selftest.py").unlink()
    (copied / "selftest.py").write_text(f"open({str(mark)!r}, 'w')")
    for name in ("numpy.py", "onnxruntime.py", "sitecustomize.py"):
        (copied / name).write_text(f"open({str(mark)!r}, 'w')")
    (copied / "lib").mkdir()
    (copied / "lib/ops.so").write_bytes(b"a stranger's code")
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["lib/ops.so"] = {}
    wanted = {"file": "lib/ops.so", "distribution": "ops", "platform": "any"}
    fp16 = manifest["variants"]["onnx-fp16"] | {"target": "strange", "library": wanted}
    fp16["files"] = [*fp16["files"], "lib/ops.so"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    forge(copied, variants=manifest["variants"] | {"onnx-fp16": fp16})
    result = spdtool("serve-check", copied, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["variants"]["onnx-fp16"]["state"] == "skipped"
    assert not mark.exists()


def test_folders_that_are_not_bundles_are_refused(spdtool: Call, exported: Any, copied: Path) -> None:
    result = spdtool("serve-check", exported.folder / "student")
    assert (result.exit_code, "is no bundle" in result.stderr) == (2, True)
    result = spdtool("serve-check", exported.folder / "nosuch")
    assert (result.exit_code, "there is no folder" in result.stderr) == (2, True)
    forge(copied, files={"../../../../etc/passwd": {"bytes": 1, "sha256": "x"}}, prefer={})
    assert spdtool("serve-check", copied).exit_code == 2


def test_the_self_test_of_a_bundle_passes_and_detects_damage(servable: Path, copied: Path) -> None:
    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(folder / "selftest.py")]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))

    process = run(servable)
    assert (process.returncode, "ok: " in process.stdout, process.stderr) == (0, True, "")
    flip(copied, "onnx/model_fp16.onnx")
    process = run(copied)
    assert (process.returncode, "FAILED  onnx/model_fp16.onnx is damaged" in process.stdout) == (1, True)
    (copied / "manifest.json").write_text("{")
    assert run(copied).returncode == 1
