"""Report pages of runs and sweeps: well-formed, without network, with user-supplied names escaped."""

from __future__ import annotations

import errno
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from spdtool.errors import Corrupt, RunError
from spdtool.recipe import reading as recipes
from spdtool.recipe import spelling
from spdtool.recipe.fields import MAY_CHANGE
from spdtool.report import commands, curves, page
from spdtool.report import content as gather
from spdtool.report.records import RunRecords
from spdtool.report.subject import serving_commands
from spdtool.run.folder import Run
from spdtool.run.records import MachineRecord, Ratio, StageRecord, StudentRow

SECTIONS = {"speed", "subject", "quality", "serve", "lineage", "curves", "overfitting", "sparsity", "repeat"}
VOID = {"meta", "link", "br", "img", "hr", "input"}
LOADS = {"src", "srcset", "data", "action", "poster", "formaction"}


class Reader(HTMLParser):
    """Collects sections and text of a page, and its faults: unpaired tags, external addresses, scripts."""

    def __init__(self):
        super().__init__()
        self.open, self.faults, self.sections, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self._look(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self._look(tag, dict(attrs))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "style" and re.search(r"@import|url\((?!#)", data):
            self.faults.append("the style loads something")

    def _look(self, tag, attributes):
        if tag == "section":
            self.sections.append(attributes.get("class"))
        if tag in ("script", "link", "iframe", "object", "img"):
            self.faults.append(f"<{tag}>")
        for name, value in attributes.items():
            if name in LOADS or name.startswith("on") or (name.endswith("href") and not (value or "").startswith("#")):
                self.faults.append(f"{tag} {name}={value}")


def read(file):
    reader = Reader()
    text = file.read_text("utf-8")
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert reader.faults == []
    assert not re.search(r"https?://", text)
    return reader


@pytest.fixture(scope="module")
def finished_page(compressed, tmp_path_factory):
    """The parsed page of a finished run, and the result of `write_page`."""
    written = page.write_page([compressed], tmp_path_factory.mktemp("page") / "report.html")
    return read(written.file), written


def test_the_page_of_a_finished_run_is_well_formed_and_has_every_section(finished_page):
    reader, written = finished_page
    assert set(reader.sections) == SECTIONS
    names = {image.name for image in written.images}
    assert names == {"report-student.png", "report-teacher.png", "report-sparsity.png", "report-reliability-dev.png"}
    assert all(image.is_file() and image.parent == written.file.parent for image in written.images)


def test_the_page_shows_the_records_of_the_stages(finished_page, compressed):
    text = " ".join(finished_page[0].words)
    run = Run.open(compressed)
    result = run.training_result("finetune")
    assert f"{100 * result.score:.2f}" in text
    assert f"{100 * result.train_score:.2f}" in text
    for line in run.bench_result().verdict:
        assert line in text
    assert "--sparsity 0.5" in text
    assert run.record("bench").machine.python in text
    assert "Not finished" not in text


@pytest.mark.parametrize(
    ("until", "missing", "messages"),
    [
        (None, "teacher, prune, distill, finetune, export, bench", ["Nothing is pruned yet", "Nothing is scored yet"]),
        ("teacher", "prune, distill, finetune, export, bench", ["Nothing is pruned yet", "Not timed yet"]),
        ("prune", "distill, finetune, export, bench", ["after prune", "Not timed yet"]),
    ],
)
def test_the_page_of_an_unfinished_run_names_the_missing_stages(toy_run, until, missing, messages):
    run = toy_run(until=until)
    if until is None:
        with pytest.raises(KeyboardInterrupt), run.stage("teacher"):  # leaves run.json alone
            raise KeyboardInterrupt
    reader = read(page.write_page([run.path]).file)
    text = " ".join(reader.words)
    assert set(reader.sections) == SECTIONS
    assert missing in text
    assert all(line in text for line in messages)


def test_the_page_shows_a_killed_phase_up_to_its_last_step(toy_run):
    run = toy_run(until="teacher")
    log = run.path / ".prune.partial" / "metrics.jsonl"
    log.parent.mkdir()
    event = {"event": "eval", "step": 3, "metrics": {"score": 0.5}}
    log.write_text(json.dumps(event) + '\n{"event": "ev', "utf-8")
    (phase,) = curves.student_curves(run).phases
    assert (phase.name, phase.finished, phase.dev, phase.train) == ("prune", False, [(3, 0.5)], [])
    assert "prune (unfinished)" in " ".join(read(page.write_page([run.path]).file).words)


def test_a_page_on_a_full_disk_leaves_the_older_page(toy_run, tmp_path, monkeypatch):
    run, file = toy_run(until="teacher"), tmp_path / "pages/report.html"
    before = page.write_page([run.path], file).file.read_bytes()

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        page.write_page([run.path], file)
    assert file.read_bytes() == before
    assert not [each.name for each in file.parent.iterdir() if each.name.startswith(".")]


def test_older_runs_without_train_scores_have_empty_gaps(compressed, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(compressed, folder)
    for stage in ("teacher", "prune", "distill", "finetune"):
        file = folder / stage / "stage.json"
        record = json.loads(file.read_text("utf-8"))
        record["result"].pop("train")
        file.write_text(json.dumps(record), "utf-8")
        log = folder / stage / "metrics.jsonl"
        events = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        log.write_text("".join(json.dumps(e | {"train": None}) + "\n" for e in events), "utf-8")
    run = Run.open(folder)
    assert [row[1::2] for row in gather.content_of(run).gaps.rows] == [["-", "-"]] * 4
    assert "there is no gap to show" in " ".join(read(page.write_page([folder]).file).words)


def test_names_that_are_markup_are_shown_as_text(toy_task, toy_run):
    hostile = '<script>alert("&amp;$x$")</script>'
    toy_task(hostile)
    run = toy_run("teacher.epochs=1", until="teacher", task=hostile)
    text = page.write_page([run.path]).file.read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#34;&amp;amp;$x$&#34;)&lt;/script&gt;" in text
    assert hostile in " ".join(read(run.path / "report" / "report.html").words)


@pytest.mark.parametrize("caveats", [{}, {1: "2 rounds are too few to tell it from noise"}])
def test_the_headline_is_for_one_thread_and_has_a_caveat(compressed, caveats):
    run = Run.open(compressed)
    records = gather.read_records(run)
    bench = records.bench
    bench.speeds = {2: Ratio(median=9.0, low=8.0, high=9.5), 1: Ratio(median=3.0, low=2.5, high=3.5)}
    bench.caveats = caveats
    row = StudentRow(task="demo", recipe="default", sparsity=0.5, seed=0, run="r", bytes=1, teacher_bytes=1)
    (tile,) = [tile for tile in gather.headline_tiles(row, records) if tile.name == "speed"]
    assert (tile.figure, f"{bench.best}, 1 thread" in tile.note) == ("3.00x", True)
    assert ("too few" in tile.note) == bool(caveats)


def test_a_smoke_run_is_marked(toy_run):
    run = toy_run(smoke=True, until="teacher")
    assert "SMOKE RUN, NO RESULT" in " ".join(read(page.write_page([run.path]).file).words)


@pytest.mark.slow
def test_several_runs_are_compared(toy_run, tmp_path):
    folders = []
    for sparsity in (0.5, 0.8):
        run = toy_run(*(f"{stage}.epochs=1" for stage in ("teacher", "prune", "distill", "finetune")),
                      until="finetune", folder=f"run-{sparsity}", sparsity=sparsity)  # fmt: skip
        folders.append(run.path)
    written = page.write_page(folders, tmp_path / "out" / "both.html")
    reader = read(written.file)
    assert "comparison" in reader.sections
    assert set(reader.sections) >= SECTIONS
    assert "both-pareto-toy-nonzeros.png" in {image.name for image in written.images}
    assert "Comparison of 2 runs" in " ".join(reader.words)


@pytest.mark.parametrize("content", [None, "", "{}", '{"rows": [{"task": 1}]}'])
def test_a_folder_that_is_neither_run_nor_sweep_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content, "utf-8")
    with pytest.raises(RunError):
        page.write_page([tmp_path])
    assert not (tmp_path / "report").exists()


def test_a_record_that_cannot_be_read_is_refused(toy_run):
    run = toy_run(until="teacher")
    (run.path / "teacher" / "stage.json").write_text("{", "utf-8")
    with pytest.raises(Corrupt):
        page.write_page([run.path])


@pytest.mark.parametrize(
    ("sets", "flags"),
    [
        ([], {}),
        (["prune.epochs=3", "bench.lengths=[8, 16]", "prune.loss.attention=0.5", "max_rows=10"], {"seed": 3}),
        (["teacher.dropout=none", "export.optional=[]", "bench.padded=[[2, 8]]"], {"model": "a model", "smoke": True}),
        (["prune.criterion=magnitude"], {"task": "local", "data": "it's.csv", "text": ("a", "b"), "label": "c"}),
        ([], {"name": "reference", "given_teacher": "/somewhere/teacher"}),
    ],
)
def test_the_printed_command_rebuilds_the_recipe(sets, flags, monkeypatch):
    from spdtool.cli.options import RecipeOptions

    name = flags.pop("name", "default")
    recipe = recipes.build_recipe(name, {"task": "demo", "sparsity": 0.75} | flags, sets)
    arguments = spelling.recipe_options(recipe)
    options = {"sets": [arguments[index + 1] for index, word in enumerate(arguments) if word == "--set"]}
    names = {"--task": "task", "--data": "data", "--text": "text", "--label": "label", "--model": "model",
               "--teacher": "teacher", "--sparsity": "sparsity", "--seed": "seed", "--recipe": "name"}  # fmt: skip
    options |= {names[word]: arguments[index + 1] for index, word in enumerate(arguments) if word in names}
    options |= {"sparsity": float(options["sparsity"]), "seed": int(options["seed"]), "smoke": "--smoke" in arguments}
    reread = RecipeOptions(**options).build()
    assert [change for change in recipe.diff(reread) if change[0] not in MAY_CHANGE] == []


def test_the_printed_commands_name_the_finished_stages(distilled):
    first, second, third = commands.commands_of(Run.open(distilled))
    assert first.startswith("spdtool teacher --task toy")
    assert (second, third) == (f"spdtool prune --run {distilled}", f"spdtool distill --run {distilled}")


def test_the_page_begins_with_speed_size_and_score_and_says_how_to_use_the_model(finished_page, compressed):
    reader, _ = finished_page
    assert reader.sections[:3] == ["speed", "subject", "serve"]
    tiles = gather.content_of(Run.open(compressed)).tiles
    assert [tile.name for tile in tiles[:3]] == ["speed", "file, times smaller", "kept"]
    text = " ".join(reader.words)
    for words in (
        f"spdtool predict {compressed}",
        f"spdtool serve {compressed}",
        "spdtool.load(",
        "mean of accuracy and f1",
    ):
        assert words in text, words


def test_the_page_calls_a_model_by_what_its_kind_of_task_does(tmp_path):
    run = Run.for_recipe(tmp_path / "run", recipes.build_recipe("default", {"task": "demo"}, []))
    bundle = run.path / "export" / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text("{}", "utf-8")
    pair = ["first", "second"]
    for kind, text, command, call in (
        ("classification", ["text"], 'run "one text"', 'classify("one text")'),
        ("classification", pair, 'run "first text" --pair "second text"', 'classify("first text", "second text")'),
        ("tokens", ["words"], 'run "one text"', 'find("one text")'),
        ("ranking", pair, 'run "a query" --pair "a passage"', 'score("a query", "a passage")'),
        ("spans", pair, 'run "a question" --pair "its context"', 'answer("a question", "its context")'),
        ("embedding", ["text"], 'run "one text"', 'embed("one text")'),
        ("of a plugin that is not here", ["text"], 'run "one text"', 'classify("one text")'),
    ):
        (bundle / "manifest.json").write_text(json.dumps({"kind": kind, "text": text}), "utf-8")
        lines = serving_commands(run)
        assert lines[0].endswith(command), kind
        assert lines[-1] == call, kind
        assert lines[-2].startswith(f"{call.partition('(')[0]} = spdtool.load("), kind


def test_the_page_names_the_stages_that_another_machine_made():
    here = MachineRecord(python="3.11", system="Linux", cpus=2, versions={"torch": "2"})
    trained = here.model_copy(update={"training_threads": 2, "arithmetic": "abc", "device": "cpu"})
    elsewhere = trained.model_copy(update={"arithmetic": "def"})
    updated = trained.model_copy(update={"versions": {"torch": "3"}})
    for teacher, prune, expected in (
        (trained, trained, None),
        (elsewhere, trained, "teacher"),
        (trained, updated, "prune"),
        (trained, None, "prune"),
    ):
        machines = {"teacher": teacher, "prune": prune, "export": here}
        records = RunRecords()
        for stage, machine in machines.items():
            records.stages[stage] = StageRecord(stage=stage, inputs={}, files=[], machine=machine)
        assert dict(gather.environment_lines(records)).get("made on another machine") == expected, expected


def test_the_page_scores_each_class(compressed):
    content = gather.content_of(Run.open(compressed))
    run = Run.open(compressed)
    assert [row[0] for row in content.classes.rows] == ["bad", "good"]
    for stage in ("teacher", "finetune"):
        result = run.training_result(stage)
        assert sum(scores.rows for scores in result.classes.values()) == run.record("teacher").data.rows["dev"]
        correct = sum(scores.recall * scores.rows for scores in result.classes.values())
        assert correct / run.record("teacher").data.rows["dev"] == pytest.approx(result.dev["accuracy"])


def test_control_characters_of_labels_are_spelt_out_on_the_page(toy_run, toy_task):
    labels = ("good\u202ebad", "\x1b[31m<b>red</b>")
    toy_task("toy", labels=labels)
    run = toy_run("teacher.epochs=1", until="teacher")
    text = page.write_page([run.path]).file.read_text("utf-8")
    assert not {"\u202e", "\x1b"} & set(text)
    assert "good\\u202ebad" in text
    assert "&lt;b&gt;red" in text
