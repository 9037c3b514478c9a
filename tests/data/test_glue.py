"""GLUE files: the official layout, broken files, and the real files if they are available."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from spdtool.data.dataset import Rows, find_dataset
from spdtool.data.glue import GLUE, load_glue
from spdtool.errors import DataError, RecipeError, UnknownName
from spdtool.recipe.fields import Recipe

REAL = Path(__file__).parents[3] / "shared" / "data" / "GLUE"
PARSES = ("sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse")
MNLI_COLUMNS = ["index", "promptID", "pairID", "genre", *PARSES, "sentence1", "sentence2", "label1", "gold_label"]
STSB_COLUMNS = ["index", "genre", "filename", "year", "old_index", "source1", "source2"]

# name: header row (None: there is none), a row for texts a and b with {} for the label, labels as the files spell them
LAYOUT: dict[str, tuple[list[str] | None, list[str], list[str]]] = {
    "cola": (None, ["gj04", "{}", "", "a"], ["0", "1"]),
    "sst2": (["sentence", "label"], ["a", "{}"], ["0", "1"]),
    "mrpc": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["{}", "7", "8", "a", "b"], ["0", "1"]),
    "stsb": ([*STSB_COLUMNS, "sentence1", "sentence2", "score"], ["0", *["none"] * 6, "a", "b", "{}"], ["0.0", "3.75"]),
    "qqp": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], [*"123", "a", "b", "{}"], ["0", "1"]),
    "mnli": (
        MNLI_COLUMNS,
        ["0", "1", "2", "fiction", *["( a )"] * 4, "a", "b", "neutral", "{}"],
        ["entailment", "neutral", "contradiction"],
    ),
    "qnli": (["index", "question", "sentence", "label"], ["0", "a", "b", "{}"], ["entailment", "not_entailment"]),
    "rte": (["index", "sentence1", "sentence2", "label"], ["0", "a", "b", "{}"], ["entailment", "not_entailment"]),
    "wnli": (["index", "sentence1", "sentence2", "label"], ["0", "a", "b", "{}"], ["0", "1"]),
}
METRICS = {
    "cola": ("matthews",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
}


def file_of(name: str, labels: list[str] | None = None) -> str:
    """Return the text of an official file of `name` with one row per label."""
    header, row, default_labels = LAYOUT[name]
    rows = ["\t".join(row).format(label) for label in (default_labels if labels is None else labels)]
    return "\n".join([*(["\t".join(header)] if header else []), *rows]) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Return `folder(name, **files)`, which writes official files of a task; train and dev default to valid ones."""

    def write(name: str, **files: str | bytes | None) -> Path:
        task_folder = tmp_path / GLUE[name].folder
        task_folder.mkdir(exist_ok=True)
        for stem in ("train", *(file.removesuffix(".tsv") for _, file, _ in GLUE[name].dev)):
            content = files.get(stem, file_of(name))
            if content is not None:
                (task_folder / f"{stem}.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return task_folder

    return write


def test_every_task_is_read_from_its_official_layout(folder: Callable[..., Path]) -> None:
    for name in GLUE:
        dataset = find_dataset(Recipe(task=name))
        splits = dataset.load(str(folder(name)), 0)
        count = len(LAYOUT[name][2])
        expected = [0.0, 3.75] if name == "stsb" else list(range(count))
        assert list(splits) == ["train", "dev", *(["dev_mm"] if name == "mnli" else [])], name
        for rows in splits.values():
            assert rows == Rows(["a"] * count, ["b"] * count if len(dataset.text) == 2 else None, expected), name
            assert {type(label) for label in rows.labels} == {float if name == "stsb" else int}, name
        assert dataset.metrics == METRICS.get(name, ("accuracy",))
        assert dataset.kind == ("regression" if name == "stsb" else "classification")
        assert len(dataset.labels) == (0 if name == "stsb" else count)


def test_there_are_nine_tasks_and_the_hub_orders_their_labels() -> None:
    assert sorted(GLUE) == sorted(LAYOUT)
    assert len(GLUE) == 9
    assert GLUE["qnli"].labels == GLUE["rte"].labels == ("entailment", "not_entailment")
    assert GLUE["wnli"].labels == ("not_entailment", "entailment")
    assert GLUE["mnli"].labels == ("entailment", "neutral", "contradiction")


def test_the_papers_spellings_are_understood() -> None:
    spellings = {"SST-2": "sst2", "sts-b": "stsb", "CoLA": "cola", "RTE": "rte", "sts_b": "stsb", "MNLI": "mnli"}
    for spelling, name in spellings.items():
        assert find_dataset(Recipe(task=spelling)).name == name


def test_an_unknown_task_names_the_near_ones_and_columns_are_refused() -> None:
    with pytest.raises(UnknownName, match="no task 'qnlu'") as error:
        find_dataset(Recipe(task="qnlu"))
    assert "'qnli'" in str(error.value.hint)
    with pytest.raises(RecipeError, match="knows its own columns"):
        find_dataset(Recipe(task="rte", label="label"))


def test_the_parent_folder_is_accepted_in_any_spelling(folder: Callable[..., Path], tmp_path: Path) -> None:
    task_folder = folder("sst2")
    expected = load_glue("sst2", str(task_folder))
    assert load_glue("sst2", str(tmp_path)) == expected
    task_folder.rename(tmp_path / "sst2")
    assert load_glue("sst2", str(tmp_path)) == expected


def test_rows_end_at_newlines_and_fields_at_tabs_only(folder: Callable[..., Path]) -> None:
    field = 'He said "\x0b one\x1c \u2028 two \x85 "" three'
    text = (
        f'\ufeffindex\tquestion\tsentence\tlabel\r\n0\t"{field}\t{field}\tentailment\r\n1\t"a\t\'b\tnot_entailment\r\n'
    )
    rows = load_glue("qnli", str(folder("qnli", train=text)))["train"]
    assert rows == Rows(['"' + field, '"a'], [field, "'b"], [0, 1])


def test_a_byte_order_mark_is_not_part_of_the_first_column(folder: Callable[..., Path]) -> None:
    assert load_glue("sst2", str(folder("sst2", train="\ufeff" + file_of("sst2"))))["train"] == Rows(
        ["a"] * 2, None, [0, 1]
    )


def test_only_one_carriage_return_is_taken_off_the_end(folder: Callable[..., Path]) -> None:
    text = "gj04\t1\t\tfirst\r\r\ngj04\t0\t\tsec\rond"
    assert load_glue("cola", str(folder("cola", train=text)))["train"] == Rows(["first\r", "sec\rond"], None, [1, 0])


def test_qqp_leaves_out_its_few_short_rows(folder: Callable[..., Path]) -> None:
    intact = file_of("qqp", ["0", "1"] * 1000)
    task_folder = folder("qqp", dev=intact + "9\t8\t7\tcut short\n", train=intact)
    assert load_glue("qqp", str(task_folder))["dev"] == load_glue("qqp", str(task_folder))["train"]
    (task_folder / "dev.tsv").write_text(intact + "9\t8\t7\tcut short\n" * 3)
    with pytest.raises(DataError, match=r"dev\.tsv, line 2002: 4 fields where 6 were expected"):
        load_glue("qqp", str(task_folder))


BAD = {
    "empty": ("rte", b"", "is empty"),
    "blank": ("rte", b"\n\r\n", "is empty"),
    "only a header": ("rte", "index\tsentence1\tsentence2\tlabel\n", "has no rows"),
    "too few fields": ("rte", file_of("rte") + "5\ta\tentailment\n", "line 4: 3 fields where 4 were expected"),
    "too many fields": ("rte", file_of("rte") + "5\ta\tb\tc\tentailment\n", "line 4: 5 fields where 4 were expected"),
    "a blank line inside": ("cola", "\n".join([*file_of("cola").splitlines(), "", "x\t1\t\ta"]), "line 3: 1 fields"),
    "short rows elsewhere": ("sst2", file_of("sst2", ["0", "1"] * 1000) + "cut\n", "line 2002: 1 fields"),
    "latin-1": ("rte", file_of("rte").encode() + b"5\tcaf\xe9\tb\tentailment\n", "line 4: byte 0xe9 is not UTF-8"),
    "latin-1 after a mark": ("sst2", b"\xef\xbb\xbfsentence\tlabel\n\xe9\t1\n", "line 2: byte 0xe9 is not UTF-8"),
    "utf-16": ("rte", file_of("rte").encode("utf-16"), "is UTF-16, not UTF-8"),
    "unknown name": ("mnli", file_of("mnli", ["neutral", "-"]), "line 3: the label '-' is none of mnli's"),
    "unknown digit": ("sst2", file_of("sst2", ["0", "2"]), "line 3: the label '2' is none of sst2's"),
    "unknown digit without header": ("cola", file_of("cola", ["0", "1", "x"]), "line 3: the label 'x'"),
    "padded digit": ("sst2", file_of("sst2", ["0", "01"]), "line 3: the label '01'"),
    "digit for a name": ("rte", file_of("rte", ["0"]), "line 2: the label '0' is none of rte's"),
    "name for a digit": ("wnli", file_of("wnli", ["entailment"]), "line 2: the label 'entailment' is none of wnli's"),
    "no number": ("stsb", file_of("stsb", ["1.5", "high"]), "line 3: the label 'high' is none of stsb's"),
    "not finite": ("stsb", file_of("stsb", ["nan"]), "line 2: the label 'nan' is none of stsb's"),
    "other task's columns": ("mrpc", file_of("rte"), "has no column '#1 String', which mrpc needs; it has 'index'"),
    "header in capitals": ("sst2", "Sentence\tlabel\na\t1\n", "has no column 'sentence'"),
    "other task's rows": ("cola", file_of("qnli"), "line 1: the label 'question' is none of cola's"),
}


def test_a_broken_file_is_refused_by_name_and_line(folder: Callable[..., Path]) -> None:
    for case, (name, content, problem) in BAD.items():
        for stem in ("train", "dev_mismatched" if name == "mnli" else "dev"):
            task_folder = folder(name, **{stem: content})
            with pytest.raises(DataError) as error:
                load_glue(name, str(task_folder))
            assert str(task_folder / f"{stem}.tsv") in error.value.message, case
            assert problem in error.value.message, case
            assert error.value.hint, case


def test_missing_files_and_folders_say_what_was_looked_for(folder: Callable[..., Path], tmp_path: Path) -> None:
    task_folder = folder("mnli", dev_mismatched=None)
    with pytest.raises(DataError, match=r"dev_mismatched\.tsv is missing"):
        load_glue("mnli", str(task_folder))
    with pytest.raises(DataError, match=r"no train\.tsv; looked for train\.tsv and RTE/train\.tsv"):
        load_glue("rte", str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        load_glue("rte", str(tmp_path / "none"))
    with pytest.raises(DataError, match="is a file"):
        load_glue("mnli", str(task_folder / "train.tsv"))


def hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, str], object]) -> None:
    """Replace the client of the hub by `answer`."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=answer))  # type: ignore[arg-type]


def test_the_hubs_splits_and_columns_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, task in GLUE.items():
        labels: list[int] | list[float] = [0.5, 5.0] if name == "stsb" else [0, 1]
        split = {column: ["a", "b"] for column in task.hub_text} | {"label": labels, "idx": [0, 1]}
        dev = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
        source = dict.fromkeys(["train", *dev, "test"], split)
        calls = []

        def answer(path: str, config: str, source: object = source, calls: list[object] = calls) -> object:
            calls.append((path, config))
            return source

        hub(monkeypatch, answer)
        expected = Rows(["a", "b"], ["a", "b"] if len(task.hub_text) == 2 else None, labels)
        assert load_glue(name, None) == dict.fromkeys(["train", "dev", "dev_mm"][: 1 + len(dev)], expected), name
        assert calls == [("nyu-mll/glue", name)]


def test_a_hub_that_does_not_answer_points_to_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(path: str, config: str) -> None:
        raise ConnectionError("no route to host\nand a long story")

    hub(monkeypatch, answer)
    with pytest.raises(DataError, match=r"nyu-mll/glue \(rte\) .*ConnectionError: no route to host$") as error:
        load_glue("rte", None)
    assert "--data FOLDER" in str(error.value.hint)


def test_a_hub_label_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    split = {"sentence": ["a", "b"], "label": [1, -1]}
    hub(monkeypatch, lambda *_: {"train": split, "validation": split})
    with pytest.raises(DataError, match=r"labels \[-1\] in train"):
        load_glue("sst2", None)


@pytest.mark.glue
@pytest.mark.skipif(not REAL.is_dir(), reason="the real GLUE files are not here")
@pytest.mark.parametrize(
    ("name", "train", "dev", "positive", "first"),
    [
        ("rte", 2490, 277, 131, "Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer"),
        ("mrpc", 3668, 408, 279, "He said the foodservice pie business doesn 't fit the company 's long-term growth"),
        ("cola", 8551, 1043, 721, "The sailors rode the breeze clear of the rocks."),
        ("sst2", 67349, 872, 444, "it 's a charming and often affecting journey ."),
        ("qnli", 12259, 5463, 2761, "What came into force after the new constitution was herald?"),
    ],
)
def test_the_real_files_are_read_to_the_last_row(name: str, train: int, dev: int, positive: int, first: str) -> None:
    splits = load_glue(name, str(REAL))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": train, "dev": dev}
    assert sum(splits["dev"].labels) == positive
    assert splits["dev"].first[0].startswith(first)
    for rows in splits.values():
        assert set(rows.labels) == {0, 1}
        for column in (rows.first, rows.second or rows.first):
            assert all(text.strip() for text in column)
            assert not any("\t" in text or "\n" in text or text.startswith("\ufeff") for text in column)
