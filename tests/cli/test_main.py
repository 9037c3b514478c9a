"""The command line: JSON of every command, bad input, and errors of the machine."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from typer.main import get_command

from spdtool.cli import doctor
from spdtool.cli import main as cli
from spdtool.cli.options import WORKFLOW
from spdtool.errors import SpdError
from spdtool.recipe import STAGES
from spdtool.run.lock import lock_folder

ROOT = Path(__file__).parents[2]
Call = Callable[..., Any]


COMMANDS = (*WORKFLOW, "doctor", "tasks", "recipes", "plugins")

# Help and lists -------------------------------------------------------------------------------------------------------


def test_help_lists_every_command(spdtool: Call) -> None:
    result = spdtool("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert name in result.stdout


def test_the_command_line_stays_small() -> None:
    commands = get_command(cli.app).commands
    for name in COMMANDS:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {"--json", "--plugins-dir"} <= options, name
        assert len(options) <= 27, f"{name}: a new knob is a field of the recipe, reached by --set"


def test_the_version_and_the_short_help(spdtool: Call) -> None:
    assert spdtool("--version").stdout == f"spdtool {metadata.version('spdtool')}\n"
    for arguments in ((), ("compress",), ("doctor",)):
        assert spdtool(*arguments, "-h").stdout == spdtool(*arguments, "--help").stdout != "", arguments
    assert "--install-completion" in spdtool("-h").stdout


def test_python_without_docstrings_is_refused() -> None:
    words = [sys.executable, "-OO", "-m", "spdtool", "tasks"]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "unset PYTHONOPTIMIZE" in " ".join(process.stderr.split())
    assert "Traceback" not in process.stderr


def test_a_recipe_without_grafting_reports_it_as_off(spdtool: Call) -> None:
    assert "grafting: off in this recipe" in spdtool("recipes", "default").stdout
    assert "grafting: on in prune and distill" in spdtool("recipes", "spd").stdout


def test_json_is_all_of_standard_output(spdtool: Call) -> None:
    contents = {
        ("tasks",): "cola",
        ("recipes",): "default",
        ("recipes", "default"): "prune.criterion",
        ("plugins",): "magnitude",
        ("doctor",): "onnxruntime",
    }
    for arguments, content in contents.items():
        result = spdtool(*arguments, "--json")
        assert result.exit_code in (0, 2), result.output
        assert content in json.dumps(json.loads(result.stdout)), arguments
        assert content in result.stderr, arguments
        assert content in spdtool(*arguments).stdout, arguments


def test_json_of_every_stage_and_of_inspect(spdtool: Call, compressed: Path) -> None:
    for stage in ("prune", "distill", "finetune", "export"):
        output = json.loads(spdtool(stage, "--run", compressed, "--json").stdout)
        assert output == json.loads((compressed / stage / "stage.json").read_text())["result"]
    assert json.loads(spdtool("bench", "--run", compressed, "--json").stdout)["rows"][1][0] == "student"
    assert len(json.loads(spdtool("inspect", compressed, "--json").stdout)["stages"]) == 6
    shown = spdtool("inspect", compressed).stdout
    assert "\\n" not in shown, "a line break was spelt out"
    assert re.search(r"prune \w{8}, teacher \w{8}", shown)


def test_json_of_an_error(spdtool: Call) -> None:
    calls = [
        ("inspect", "nowhere"),
        ("compress", "--task", "mprc"),
        ("compress",),
        ("compress", "--task", "demo", "--sparsity", "abc"),
        ("compress", "--nonsense"),
        ("prune",),
        ("prnue",),
    ]
    for arguments in calls:
        result = spdtool(*arguments, "--json")
        assert result.exit_code == 2, arguments
        error = json.loads(result.stdout)
        assert error["error"], arguments
        assert error["message"], arguments
        assert result.stderr == "", arguments


def test_doctor_fails_when_a_check_does(spdtool: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        doctor.Check("torch", "ok", "2.13"),
        doctor.Check("onnxruntime", "warn", "old", "pip install spdtool[cpu]"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    result = spdtool("doctor")
    assert result.exit_code == 0
    assert "spdtool[cpu]" in result.stdout, "brackets were taken for markup"
    checks.append(doctor.Check("disk", "fail", "full"))
    result = spdtool("doctor", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)[2] == {"name": "disk", "status": "fail", "found": "full", "advice": ""}


@pytest.mark.usefixtures("clean_plugins")
def test_a_plugins_folder_adds_its_plugins_and_lists_failures(spdtool: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from spdtool.plugins import criteria\n"
        "@criteria.register('mine')\n"
        "def mine(weight, stats):\n    'The sign.'\n    return weight\n"
    )
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    output = json.loads(spdtool("plugins", "--plugins-dir", tmp_path, "--json").stdout)
    assert {"kind": "criterion", "name": "mine", "source": "mine", "about": "The sign."} in output["parts"]
    states = {plugin["name"]: plugin["state"] for plugin in output["plugins"]}
    assert states["mine"] == "loaded"
    assert "no_such_module_anywhere" in states["broken"]


# Bad input: exit code 2, a message with advice, and no half-written files ---------------------------------------------


def copy(source: Path, target: Path, **fields: Any) -> Path:
    """Copy a model folder and set `fields` in its config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


def without_safetensors(source: Path, target: Path) -> Path:
    copy(source, target)
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    return target


def truncated(source: Path, target: Path) -> Path:
    copy(source, target)
    os.truncate(target / "model.safetensors", 20_000)
    return target


def not_json(source: Path, target: Path) -> Path:
    copy(source, target)
    (target / "config.json").write_text("{nope")
    return target


def without_tokenizer(source: Path, target: Path) -> Path:
    copy(source, target)
    for file in (*target.glob("*token*"), *target.glob("vocab*")):  # transformers 4 wrote more of them
        file.unlink()
    return target


MODELS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "missing": (lambda source, target: target, "does not exist"),
    "a file": (lambda source, target: source / "config.json", "is a file"),
    "pickle only": (without_safetensors, "only safetensors are read"),
    "cut short": (truncated, "cannot be read"),
    "config is not JSON": (not_json, "not a valid JSON file"),
    "config of another type": (
        lambda source, target: copy(source, target, hidden_size="wide"),
        "cannot load the model",
    ),
    "config that makes no model": (lambda source, target: copy(source, target, hidden_size=33), "not a multiple"),
    "weights of another shape": (
        lambda source, target: copy(source, target, hidden_size=48),
        "and [48] by config.json",
    ),
    "more layers than weights": (
        lambda source, target: copy(source, target, num_hidden_layers=3),
        "weights of its config.json",
    ),
    "no tokenizer": (without_tokenizer, "tokenizer"),
    "unsupported": (lambda source, target: copy(source, target, model_type="no-such-type"), "no-such-type"),
}


def test_a_bad_model(spdtool: Call, encoder_folder: Path, quick_words: tuple[str, ...], tmp_path: Path) -> None:
    for case, (make, message) in MODELS.items():
        model = make(encoder_folder, tmp_path / case)
        assert_refused(spdtool("teacher", *quick_words, "--model", model, "--run", tmp_path / "run"), message)
        assert not (tmp_path / "run").exists(), case


DATA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "only a header": (b"sentence,label\n", "has no rows"),
    "not UTF-8": (b"sentence,label\ncaf\xe9,a\nb,c\n", "not UTF-8"),
    "ragged": (b"sentence,label\na,b\nc\n", "1 fields where 2 were expected"),
    "one class": (b"sentence,label\na,x\nb,x\n", "every label"),
    "no such column": (b"text,stars\na,x\nb,y\n", "column"),
    "label missing": (b"sentence,label\na,\nb,y\n", "no label"),
}


def test_bad_data(spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path) -> None:
    arguments = (*quick_words, "--data", tmp_path / "bad.csv", "--text", "sentence", "--label", "label")
    for case, (content, message) in DATA.items():
        (tmp_path / "bad.csv").write_bytes(content)
        assert_refused(spdtool("compress", *arguments, "--run", tmp_path / "run"), message)
        assert not (tmp_path / "run").exists(), case


def test_a_label_that_only_dev_has(spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("sentence,label\na,x\nb,y\nc,x\nd,y\n")
    (tmp_path / "dev.csv").write_text("sentence,label\na,x\nb,z\n")
    assert_refused(
        spdtool("compress", *quick_words, "--data", tmp_path, "--run", tmp_path / "run"), "'z'", "dev.csv, line 3"
    )
    assert not (tmp_path / "run").exists()


SETTINGS: dict[str, tuple[tuple[str, ...], str]] = {
    "task": (("--task", "mprc"), "did you mean 'mrpc'"),
    "recipe": (("--recipe", "defalt"), "did you mean 'default'"),
    "criterion": (("--set", "prune.criterion=magnitud"), "did you mean 'magnitude'"),
    "pattern": (("--set", "prune.pattern=unstructred"), "did you mean 'unstructured'"),
    "target": (("--set", 'export.targets=["onx"]'), "did you mean 'onnx'"),
    "grafting schedule": (("--set", "distill.grafting.schedule=liner"), "did you mean 'linear'"),
    "field": (("--set", "prune.epoch=3"), "did you mean 'prune.epochs'"),
    "field like nothing": (("--set", "zzz=3"), "spdtool recipes default"),
    "field in a field": (("--set", "seed.x=3"), "seed = {'x': 3}"),
    "section": (("--set", "prune=3"), "prune is a section"),
    "section in a section": (("--set", "prune.loss=3"), "prune.loss is a section"),
    "no equals sign": (("--set", "prune.epochs"), "not of the form field=value"),
    "no field": (("--set", "=3"), "no recipe field ''"),
    "sparsity 1": (("--sparsity", "1.0"), "less than 1"),
    "sparsity below 0": (("--sparsity", "-0.1"), "greater than or equal to 0"),
    "sparsity that is no number": (("--sparsity", "abc"), "Invalid value for '--sparsity'"),
    "sparsity nan": (("--sparsity", "nan"), "finite number"),
    "batch size 0": (("--set", "prune.batch_size=0"), "prune.batch_size = 0"),
    "a seed too large": (("--seed", "99999999999999999999"), "seed = 99999999999999999999"),
    "more events than steps": (("--set", "prune.events=1000"), "1000 prune events do not fit"),
    "columns of a GLUE task": (("--task", "cola", "--text", "a"), "knows its own columns"),
    "two columns that are one": (("--text", "sentence,sentence"), "twice"),
    "device": (("--device", "tpu"), "device = 'tpu'"),
    "precision": (("--set", "precision=fp16"), "fp16 training needs a CUDA device"),
    "plugins folder": (("--plugins-dir", "no/such/folder"), "does not exist"),
}


def test_bad_settings(spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path) -> None:
    for case, (arguments, message) in SETTINGS.items():
        result = spdtool("compress", *quick_words, *arguments, "--run", tmp_path / "run")
        assert_refused(result, message)
        assert not (tmp_path / "run").exists(), case
        assert len(result.stderr) < 2500, f"{case}: nobody reads that much"


def test_cuda_where_there_is_none(
    spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(
        spdtool("compress", *quick_words, "--device", "cuda", "--run", tmp_path / "run"), "CUDA was demanded"
    )
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_number_of_labels(
    spdtool: Call, toys: ModuleType, quick_words: tuple[str, ...], tmp_path: Path
) -> None:
    toys.bert(labels=3).save_pretrained(tmp_path / "three")
    toys.tokenizer().save_pretrained(tmp_path / "three")
    result = spdtool("compress", *quick_words, "--teacher", tmp_path / "three", "--run", tmp_path / "run")
    assert_refused(result, "the model has 3 labels", "fine-tuned on this task")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model(
    spdtool: Call, toys: ModuleType, quick_words: tuple[str, ...], tmp_path: Path
) -> None:
    toys.bert(vocab_size=9).save_pretrained(tmp_path / "small")
    toys.tokenizer().save_pretrained(tmp_path / "small")
    result = spdtool("teacher", *quick_words, "--model", tmp_path / "small", "--run", tmp_path / "run")
    assert_refused(result, "the model has 9 word embeddings")
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_runs(spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    assert_refused(spdtool("compress", *quick_words, "--run", tmp_path / "foreign"), "is not a run folder")
    assert_refused(spdtool("compress", *quick_words, "--run", tmp_path / "file"), "is not a run folder")
    assert_refused(spdtool("compress", *quick_words, "--run", tmp_path / "file/run"), "Not a directory")
    assert_refused(spdtool("teacher", *quick_words, "--run", tmp_path / "foreign", "--again"), "is not a run folder")
    assert_refused(spdtool("prune", "--run", tmp_path / "nowhere"), "has no run.json", "spdtool compress")
    assert_refused(spdtool("inspect", tmp_path / "file"), "has no run.json")
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


def test_the_run_of_another_recipe(spdtool: Call, quick_words: tuple[str, ...], compressed: Path) -> None:
    result = spdtool("compress", *quick_words, "--sparsity", "0.7", "--run", compressed)
    assert_refused(result, "sparsity is 0.5 there and 0.7 here", "another --run")


def test_a_stage_before_its_predecessor(spdtool: Call, compressed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(compressed / "run.json", run)
    for stage, missing in (("prune", "teacher"), ("distill", "prune"), ("finetune", "distill"), ("bench", "export")):
        assert_refused(spdtool(stage, "--run", run), f"no finished stage '{missing}'", f"spdtool {missing} --run")
    assert [path.name for path in run.iterdir()] == ["run.json"]


@pytest.mark.parametrize("damage", ["cut short", "altered", "gone"])
def test_a_damaged_checkpoint(spdtool: Call, compressed: Path, tmp_path: Path, damage: str) -> None:
    run = shutil.copytree(compressed, tmp_path / "run")
    shutil.rmtree(run / "finetune")
    weights = run / "distill/model.safetensors"
    if damage == "cut short":
        os.truncate(weights, 10_000)
    elif damage == "altered":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    else:
        weights.unlink()
    message = {"cut short": "holds 10000 bytes", "altered": "was altered", "gone": "is missing"}[damage]
    for arguments in (("finetune", "--run", run), ("inspect", run)):
        assert_refused(spdtool(*arguments), message, f"spdtool distill --run {run} --again")
    assert not (run / "finetune").exists()


def test_a_folder_in_which_another_process_works(
    spdtool: Call, quick_words: tuple[str, ...], compressed: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(compressed, tmp_path / "run")
    shutil.rmtree(run / "finetune")
    with lock_folder(run):
        assert_refused(spdtool("finetune", "--run", run), "another process is working")
    assert not (run / "finetune").exists()


def test_a_signal_during_training_saves_and_names_the_command_to_resume(
    spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("teacher", *quick_words, "--run", tmp_path / "run")
    step = torch.optim.AdamW.step
    for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)):

        def step_and_signal(self: Any, *args: Any, name: str = name, **options: Any) -> Any:
            result = step(self, *args, **options)
            os.kill(os.getpid(), getattr(signal, name))
            return result

        monkeypatch.setattr(torch.optim.AdamW, "step", step_and_signal)
        called = spdtool(*arguments)
        assert called.exit_code == code, called.output
        output = " ".join(called.stderr.split())
        assert f"teacher was stopped by {name} and saved step" in output
        assert "the same command goes on from there" in output
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert spdtool(*arguments).exit_code == 0


def test_no_permission(
    spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(self: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", deny)
    assert_refused(spdtool("teacher", *quick_words, "--run", tmp_path / "run"), "Permission denied", "another --run")


def assert_refused(result: Any, *messages: str) -> None:
    """Require exit code 2 and each of `messages` on stderr, without a traceback."""
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    output = " ".join(result.stderr.replace("│", " ").split())
    for message in messages:
        assert message in output, output
    assert "Traceback" not in result.output


def test_the_plan_reports_how_the_rows_were_read(spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path) -> None:
    rows = [f"row {i % 33},{('pos', 'neg', 'NA')[i % 3]}" for i in range(66)]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]) + "\n", "utf-8")
    arguments = ("compress", "--data", tmp_path / "mine.csv", *quick_words[2:], "--run", tmp_path / "run", "--dry-run")
    result = spdtool(*arguments)
    assert result.exit_code == 0, result.output
    assert f"text of {tmp_path}/mine.csv, by label; a tenth of its rows is the dev set" in result.stdout
    assert "3 classes: NA " in result.stdout
    assert "the label 'NA' is taken for a class" in result.stderr
    planned = json.loads(spdtool(*arguments, "--json").stdout)
    assert sum(sum(counts.values()) for counts in planned["classes"].values()) == 66
    assert (
        "regression, 0 to 4"
        in spdtool(*arguments[:2], numbers(tmp_path), *arguments[3:], "--set", "regression=true").stdout
    )


def test_the_plan_is_short_unless_all_of_it_is_requested(
    spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = ("compress", *quick_words, "--run", tmp_path / "run", "--dry-run")
    result = spdtool(*arguments)
    assert result.exit_code == 0, result.output
    _, title, *lines = result.stdout.splitlines()
    assert title == f"{tmp_path}/run: recipe default, 0.5 sparsity"
    names = ("data", "labels", "dev score", "model", "teacher", "prune", "distill", "finetune", "export, bench", "time")
    for name, line in zip((*names, "disk", "result", ""), lines, strict=False):
        assert line.startswith(name), line
    assert all(words in lines[8] for words in ("export to onnx", "; bench ")), lines[8]
    assert "1 epoch, " in lines[4] or "epochs, " in lines[4], lines[4]
    changed = result.stdout.split("changed field")[1]
    assert "export.optional" in changed
    assert "learning_rate" not in changed, "only what differs from the recipe"
    assert "prune.learning_rate" in spdtool(*arguments, "--all").stdout
    plan = json.loads(spdtool(*arguments, "--json").stdout)
    shortest, longest = plan["estimate"]["seconds"]
    assert 0 < shortest < longest
    assert plan["score"] == "mean of accuracy and f1"
    assert json.loads(spdtool(*arguments, "--metric", "f1", "--json").stdout)["score"] == "f1"
    assert_refused(spdtool(*arguments, "--metric", "f2"), "no metric of task 'local' 'f2'", "did you mean 'f1'")


def test_a_run_says_that_zeros_save_nothing_where_no_operators_are_installed(
    spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("compress", *quick_words, "--run", tmp_path / "run", "--dry-run")
    for optional in ("installed", "[]"):
        for installed in ([], ["some-target"]):
            monkeypatch.setattr("spdtool.plugins.library_targets", lambda installed=installed: installed)
            result = spdtool(*arguments, "--set", f"export.optional={optional}")
            warned = "zeros save neither time nor bytes" in result.stderr and "pip install" in result.stderr
            assert warned == (optional == "installed" and not installed), (optional, installed)


def numbers(folder: Path) -> Path:
    """Write a data file whose labels are whole numbers."""
    (folder / "stars.csv").write_text("text,label\n" + "".join(f"row {i},{i % 5}\n" for i in range(60)), "utf-8")
    return folder / "stars.csv"


@pytest.mark.slow
def test_rows_that_change_between_stages_are_refused_until_all_is_redone(
    spdtool: Call, quick_words: tuple[str, ...], rows_file: Path, tmp_path: Path
) -> None:
    data_file, run = tmp_path / "mine.csv", tmp_path / "run"
    shutil.copy(rows_file, data_file)
    arguments = ("--data", data_file, *quick_words[2:], "--run", run)
    assert spdtool("teacher", *arguments).exit_code == 0
    lines = data_file.read_text("utf-8").splitlines()
    data_file.write_text("\n".join([lines[0], "the film was new,good", *lines[1:]]) + "\n", "utf-8")
    for call in (("prune", "--run", run), ("compress", *arguments), ("compress", *arguments, "--dry-run")):
        assert_refused(spdtool(*call), "the rows are not those of the stage 'teacher'", f"teacher --run {run} --again")
    assert spdtool("teacher", *arguments, "--again").exit_code == 0
    assert spdtool("prune", "--run", run).exit_code == 0
    shutil.copy(rows_file, data_file)
    assert_refused(spdtool("prune", "--run", run, "--again"), "the rows are not those of the stage 'teacher'")
    assert (run / "prune" / "stage.json").exists(), "nothing was dropped"


# Checkpoints outside of runs ------------------------------------------------------------------------------------------


@pytest.fixture
def foreign_checkpoint(compressed: Path, tmp_path: Path) -> Path:
    """A sparse checkpoint without the record of a stage, as from another tool."""
    folder = shutil.copytree(compressed / "finetune", tmp_path / "theirs")
    (folder / "stage.json").unlink()
    return folder


def test_export_and_unpack_of_any_checkpoint(
    spdtool: Call, foreign_checkpoint: Path, rounded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("export", "--from", foreign_checkpoint, "--target", "rounded", "--set", "export.values=fp32")
    result = spdtool(*arguments, "--json")
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    assert (output["folder"], output["target"], output["sparsity"], output["values"]) == (
        "theirs-rounded",
        "rounded",
        0.5,
        "fp32",
    )
    assert "50.00% zeros as in its checkpoint" in result.stderr
    assert_refused(spdtool(*arguments), "theirs-rounded exists and is not an empty folder")
    result = spdtool("unpack", "theirs-rounded", "plain", "--json")
    assert json.loads(result.stdout) == {"folder": "theirs-rounded", "checkpoint": "plain"}
    assert load_file("plain/model.safetensors").keys() == load_file(foreign_checkpoint / "model.safetensors").keys()
    assert_refused(spdtool("unpack", "theirs-rounded", "plain"), "plain exists and is not an empty folder")
    assert_refused(spdtool("unpack", foreign_checkpoint, "other"), "has no onnx/model.onnx", "spdtool export --from")


def test_export_of_any_checkpoint_on_data(
    spdtool: Call, foreign_checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ("--data", rows_file, "--text", "sentence", "--label", "label", "--set", "device=cpu")
    result = spdtool("export", "--from", foreign_checkpoint, "--to", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    assert "predictions flipped" in result.stdout
    assert (tmp_path / "out/onnx/model.onnx").is_file()


def test_export_refuses_bad_arguments(spdtool: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls: dict[tuple[str, ...], tuple[str, ...]] = {
        (): ("neither --run nor --from was given", "--from CHECKPOINT"),
        ("--run", "x", "--from", "y"): ("--run and --from exclude each other",),
        ("--run", "x", "--to", "y", "--task", "z"): ("--to, --task belongs to --from",),
        ("--from", "y", "--again"): ("--again belongs to --run", "--to FOLDER"),
        ("--from", "y"): ("there is no folder y",),
        ("--from", "y", "--target", "onx"): ("did you mean 'onnx'",),
        ("--from", "y", "--label", "z"): ("which was not given", "--data FILE"),
        ("--from", "y", "--set", "export.values=int3"): ("export.values = 'int3'",),
    }
    for arguments, messages in calls.items():
        assert_refused(spdtool("export", *arguments), *messages)
        assert list(tmp_path.iterdir()) == [], arguments


# Errors of the machine ------------------------------------------------------------------------------------------------


class SafetensorError(Exception):
    """Stands for the class of that name in safetensors, which is no OSError."""


class OutOfMemoryError(RuntimeError):
    """Stands for torch's."""


STOPPING: list[tuple[BaseException, int, str]] = [
    (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "the disk is full"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "--set prune.accumulate=2"),
    (MemoryError(), 2, "out of memory"),
    (OSError(errno.EROFS, "Read-only file system"), 2, "Read-only"),
    (KeyboardInterrupt(), 130, "the same command goes on from the last snapshot"),
]


@pytest.mark.slow
def test_errors_that_stop_a_stage_are_reported_without_a_traceback(
    spdtool: Call, quick_words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call goes on where the one before was stopped, and the last one finishes the stage."""
    saves: list[BaseException] = []
    for error, code, message in STOPPING:

        def stop(*_: Any, error: BaseException = error) -> None:
            saves.append(error)
            raise error

        monkeypatch.setattr("spdtool.models.load.save_model", stop)
        result = spdtool("teacher", *quick_words, "--run", tmp_path / "run")
        case = repr(error)
        assert saves[-1] is error, f"{case}: the stage did not come to its end"
        assert result.exit_code == code, case
        assert message in result.stderr, case
        assert "Traceback" not in result.output, case
        assert not (tmp_path / "run/teacher").exists(), case
    monkeypatch.undo()
    assert spdtool("teacher", *quick_words, "--run", tmp_path / "run").exit_code == 0


def test_an_unexpected_exception_keeps_its_traceback(spdtool: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(doctor, "examine", fail)
    assert isinstance(spdtool("doctor").exception, ZeroDivisionError)


def test_a_refused_result_has_an_exit_code_of_its_own(spdtool: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from spdtool.errors import GateError

    def fail() -> None:
        raise GateError("not exact")

    monkeypatch.setattr(doctor, "examine", fail)
    assert spdtool("doctor").exit_code == 3


def test_every_error_class_exits_with_two_or_three() -> None:
    def tree(kind: type[SpdError]) -> list[type[SpdError]]:
        return [kind, *(inner for child in kind.__subclasses__() for inner in tree(child))]

    assert {kind.exit_code for kind in tree(SpdError)} == {2, 3}


# The script and make --------------------------------------------------------------------------------------------------


def test_the_script_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom spdtool.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnxruntime', 'datasets'} & sys.modules.keys()\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "compress" in process.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_bench_runs_each_missing_stage_in_its_order(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage in ("teacher", "prune"):
        (run / stage).mkdir(parents=True)
        (run / stage / "stage.json").touch()

    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}  # no flags of an outer make

    def planned(*words: str) -> list[str]:
        process = subprocess.run(
            ["make", "-n", "bench", *words], cwd=ROOT, capture_output=True, text=True, check=True, env=clean
        )
        calls = [line.split() for line in process.stdout.splitlines() if "/spdtool " in line]
        return [words[1] for words in calls]

    assert planned("TASK=mrpc", f"RUN={run}") == ["distill", "finetune", "export", "bench"]
    assert planned("TASK=mrpc", f"RUN={tmp_path}/none") == list(STAGES)
