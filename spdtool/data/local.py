"""A data set of the user: a csv, tsv, jsonl, parquet or arrow file, or a folder with one for train, dev and test.

    spdtool compress --data reviews.csv --text review --label stars
    spdtool compress --data my-folder        # train.jsonl and dev.jsonl; columns named sentence1, sentence2 and label

A file alone gives up `dev_share` of its rows as the dev set, drawn by the recipe's seed and the texts; before that,
`test_share` of them as the test set, if the recipe asks for one. Labels that are text or whole numbers are classes, in
sorted order; other numbers make it a regression (`regression` decides).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spdtool.data.columns import Columns, choose_columns, refuse_unsupported_kind, table_to_rows
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.files import LINES, READERS, hint_of_lines, read_file, read_header
from spdtool.data.formats.table import Table
from spdtool.data.kinds.annotations import is_annotated, list_words
from spdtool.data.kinds.embedding import embedding_dataset, find_text_files, is_sentence_encoder
from spdtool.data.kinds.label_sets import LabelSets, find_label_sets, name_numbers, read_names
from spdtool.data.kinds.passage_lists import find_passage_lists, read_triples, unfold_passages
from spdtool.data.kinds.qrels import find_qrels, read_judged_tables
from spdtool.data.kinds.questions import has_answers, holds_questions, question_dataset
from spdtool.data.kinds.ranking import choose_ranking_columns, has_relevance, holds_ranking, ranking_dataset
from spdtool.data.kinds.words import find_word_columns, has_tags, word_dataset
from spdtool.data.labels import LabelSummary, order_by_schema, read_labels
from spdtool.data.readme import ClassNames, name_classes, read_class_names
from spdtool.data.splits import TRAIN_NAMES, describe_unused, draw_dev_rows, draw_test_rows, find_split_files
from spdtool.errors import DataError
from spdtool.recipe.fields import Recipe

LISTED_FILES = 10


def local_dataset(recipe: Recipe) -> Dataset:
    """Describe the data set in `recipe.data`, with the columns `recipe.text` and `recipe.label`.

    Raises:
        DataError: no data was given; a file cannot be read, is ragged, or lacks values; the columns are unclear.
    """
    if recipe.data is None:
        raise DataError("the task local needs rows", "give --data FILE or --data FOLDER")
    if recipe.given_teacher is not None and is_sentence_encoder(recipe.given_teacher):
        return embedding_dataset(recipe)
    if recipe.pairs is not None:
        raise DataError(
            "pairs are what a sentence encoder is scored by, and none was given",
            "leave pairs out, or give --teacher FOLDER with a folder of sentence-transformers",
        )
    judged = find_qrels(Path(recipe.data))
    if judged is not None:
        tables = read_judged_tables(judged, recipe.negatives, recipe.seed)
        return _ranking_dataset(recipe, tables, [*judged.queries, judged.passages])
    from spdtool.data.sharded import find_shards, sharded_dataset  # it imports this module

    shards = find_shards(Path(recipe.data))
    if shards is None:
        tables = read_tables(Path(recipe.data))
    else:
        if not _reads_whole_tables(read_header(shards["train"][0]), recipe):
            dataset = sharded_dataset(recipe, shards)
            if dataset is not None:
                return dataset
        tables = join_shards(shards, read_class_names(Path(recipe.data)))
    tables = unfold_passages(tables, recipe) or tables
    if holds_ranking(tables["train"].columns, recipe):
        return _ranking_dataset(recipe, tables)
    listed = list_words(tables, recipe)
    if listed is None:
        word_columns = find_word_columns(tables["train"], recipe.text, recipe.label)
    else:
        tables, word_columns = listed
    if word_columns is not None:
        _refuse_settings(recipe, "words with tags")
        unlabeled_test = drop_unlabeled_test(tables, lambda table: has_tags(table, word_columns))
        _refuse_two_test_sets(recipe, tables)
        dataset = word_dataset(recipe, tables, word_columns, read_tables)
        return _with_files(dataset, recipe, tables, unlabeled_test, "sentences")
    if holds_questions(tables["train"], recipe.text, recipe.label):
        _refuse_settings(recipe, "questions with answers")
        unlabeled_test = drop_unlabeled_test(tables, has_answers)
        _refuse_two_test_sets(recipe, tables)
        dataset = question_dataset(recipe, tables, read_tables)
        return _with_files(dataset, recipe, tables, unlabeled_test, "contexts")
    columns = choose_columns(tables["train"], recipe.text, recipe.label, recipe.multilabel)
    unlabeled_test = drop_unlabeled_test(tables, lambda table: has_labels(table, columns))
    _refuse_two_test_sets(recipe, tables)
    several = find_label_sets(tables["train"], columns, _folder_of(recipe), recipe.multilabel)
    if several is not None:
        return _several_labels_dataset(recipe, tables, several, unlabeled_test)
    summary = LabelSummary()
    as_numbers = recipe.regression is True
    summary.add(tables["train"], read_labels(tables["train"], columns.label, as_numbers=as_numbers))
    classes = summary.classes(str(tables["train"].path), recipe.regression)
    if classes:
        classes = order_by_schema(classes, tables["train"].class_names.get(columns.label))

    def convert(table: Table) -> Rows:
        return table_to_rows(table, columns, classes)

    return Dataset(
        name="local",
        kind=kind_of_labels(classes),
        text=columns.text,
        labels=classes,
        metrics=metrics_of_labels(classes),
        load=_loader(recipe, tables, columns, convert),
        about=f"{' and '.join(columns.text)} of {recipe.data}, by {columns.label}"
        + _describe_files(recipe, tables, unlabeled_test),
    )


def _ranking_dataset(recipe: Recipe, tables: dict[str, Table], further_files: Sequence[Path] = ()) -> Dataset:
    """Describe queries with their passages.

    Args:
        further_files: that were read for the tables.
    """
    _refuse_settings(recipe, "queries with passages")
    columns = choose_ranking_columns(tables["train"], recipe)
    unlabeled_test = drop_unlabeled_test(tables, lambda table: has_relevance(table, columns))
    dataset = ranking_dataset(recipe, tables)
    return _with_files(dataset, recipe, tables, unlabeled_test, "queries", further_files)


def _with_files(
    dataset: Dataset,
    recipe: Recipe,
    tables: dict[str, Table],
    unlabeled_test: Path | None,
    drawn: str,
    further_files: Sequence[Path] = (),
) -> Dataset:
    """Return the data set of a kind with a reader of its own, whose description names the files."""
    files = _describe_files(recipe, tables, unlabeled_test, drawn, further_files)
    return replace(dataset, about=dataset.about + files)


def _refuse_settings(recipe: Recipe, rows: str) -> None:
    """Raise DataError for settings of other kinds of rows, which would change nothing."""
    for name in ("regression", "multilabel"):
        if getattr(recipe, name):
            raise DataError(f"{name}=true, and {recipe.data} holds {rows}", f"leave {name} out")


def _refuse_two_test_sets(recipe: Recipe, tables: Mapping[str, Table]) -> None:
    if recipe.test_share and "test" in tables:
        raise two_test_sets(tables["test"].path)


def _reads_whole_tables(header: Table, recipe: Recipe) -> bool:
    """Tell whether rows are of a kind whose reader needs all of them at once: words, questions, rankings."""
    if holds_ranking(header.columns, recipe) or find_passage_lists(header, recipe) is not None:
        return True
    if holds_questions(header, recipe.text, recipe.label):
        return True
    return is_annotated(header, recipe) or find_word_columns(header, recipe.text, recipe.label) is not None


def join_shards(shards: Mapping[str, Sequence[Path]], names: ClassNames) -> dict[str, Table]:
    """Read the files of each split into one table: rows whose labels are lists are all kept in memory.

    Raises:
        DataError: the files of a split have different columns, or different names of classes.
    """
    tables = {}
    for split, files in shards.items():
        if not files:
            continue
        first = name_classes(read_file(files[0]), names)
        rows, lines = [*first.rows], [*first.lines]
        for file in files[1:]:
            table = name_classes(read_file(file), names)
            if set(table.columns) != set(first.columns) or table.class_names != first.class_names:
                raise DataError(
                    f"{file} has the columns {', '.join(table.columns)}, and {files[0]} has "
                    f"{', '.join(first.columns)}; names of classes have to be alike too",
                    "the files of a split are one table: give them the same columns",
                )
            indices = [table.columns.index(name) for name in first.columns]  # in any order
            rows += [[row[index] for index in indices] for row in table.rows]
            lines += table.lines
        tables[split] = replace(first, path=files[0].parent, rows=rows, lines=lines)
    return tables


def _several_labels_dataset(
    recipe: Recipe, tables: dict[str, Table], several: LabelSets, unlabeled_test: Path | None
) -> Dataset:
    """Describe rows that may have several labels."""
    if recipe.regression:
        raise DataError("regression=true: numbers to predict, and rows with several labels", "leave one of them out")
    columns = several.columns
    return Dataset(
        name="local",
        kind="multilabel",
        text=columns.text,
        labels=several.names,
        metrics=("f1_micro", "f1_macro", "map"),
        load=_loader(recipe, tables, columns, several.table_to_rows),
        about=f"{' and '.join(columns.text)} of {recipe.data}; a row may have several labels: {several.reason}"
        + _describe_files(recipe, tables, unlabeled_test),
    )


def _loader(
    recipe: Recipe, tables: dict[str, Table], columns: Columns, convert: Callable[[Table], Rows]
) -> Callable[[str | None, int], dict[str, Rows]]:
    """Return `Dataset.load`, which converts the tables that are read already, unless others are asked for."""

    def load(data: str | None, seed: int) -> dict[str, Rows]:
        current = tables
        if data not in (None, recipe.data):
            current = read_tables(Path(data or ""))
            drop_unlabeled_test(current, lambda table: has_labels(table, columns))
        splits = {name: convert(table) for name, table in current.items()}
        if recipe.test_share:  # before the dev rows are drawn: nothing may have chosen among the rows
            splits |= draw_test_rows(splits["train"], seed, recipe.test_share)
        return splits if "dev" in splits else splits | draw_dev_rows(splits["train"], seed, recipe.dev_share)

    return load


def _folder_of(recipe: Recipe) -> Path:
    path = Path(recipe.data or "")
    return path if path.is_dir() else path.parent


def check_header(recipe: Recipe) -> None:
    """Refuse a user's data by the header of its training rows, without reading the rest of them.

    Raises:
        DataError: there are no training rows, or the columns are missing, unclear, or those of another kind of task.
    """
    if recipe.task != "local" or recipe.data is None:
        return
    path = Path(recipe.data)
    if recipe.given_teacher is not None and is_sentence_encoder(recipe.given_teacher):
        find_text_files(path)
        return
    if find_qrels(path) is not None:
        return
    if path.is_dir():
        files = find_split_files(path)["train"]
        if not files:
            raise _no_training_rows(path)
        path = files[0]
    elif not path.exists():
        raise DataError(f"{path} does not exist", "--data takes a file or a folder")
    table = read_triples(read_header(path))
    if _reads_whole_tables(table, recipe):
        return
    if path.suffix.lower() == ".jsonl":  # a later line may have further columns
        refuse_unsupported_kind(table)
    else:
        choose_columns(table, recipe.text, recipe.label, recipe.multilabel)


def drop_unlabeled_test(tables: dict[str, Table], is_labeled: Callable[[Table], bool]) -> Path | None:
    """Remove the table `test` if no row of it has a label, as in the files of competitions; return its file then."""
    table = tables.get("test")
    if table is None or is_labeled(table):
        return None
    del tables["test"]
    return table.path


def has_labels(table: Table, columns: Columns) -> bool:
    """Tell whether a row of a table has a label: neither nothing, nor the -1 of labels that are kept secret."""
    for name in columns.switches or (columns.label,):
        cells = table.column(name) if name in table.columns else []
        if any(cell is not None and str(cell).strip() not in ("", "-1") for cell in cells):
            return True
    return False


def two_test_sets(file: Path) -> DataError:
    """Return the error of a test share beside a test set."""
    return DataError(f"a test share was asked for, and the data have the test rows {file}", "leave --test-share out")


def _describe_files(
    recipe: Recipe,
    tables: dict[str, Table],
    unlabeled_test: Path | None,
    drawn: str = "rows",
    further_files: Sequence[Path] = (),
) -> str:
    """Say where dev and test sets come from, how files were read, and which were left alone.

    Args:
        drawn: what dev and test sets are drawn of.
        further_files: that were read beside those of the tables.
    """
    sentence = ""
    if "test" in tables:
        sentence = f"; {tables['test'].path.name} is scored once, at the end"
    elif recipe.test_share:
        sentence = f"; {recipe.test_share:.0%} of its {drawn} is the test set, scored once, at the end"
    elif unlabeled_test is not None:
        sentence = f"; {unlabeled_test.name} has no labels: `spdtool predict` gives it some"
    if "dev" not in tables:
        share = "a tenth" if recipe.dev_share == 0.1 else f"{recipe.dev_share:.0%}"
        sentence += f"; {share} of its {drawn} is the dev set"
    used = [*(table.path for table in tables.values()), *further_files]
    if unlabeled_test is not None:
        used.append(unlabeled_test)
    sentence += describe_unused(Path(recipe.data or ""), used)
    note = tables["train"].note
    return f"{sentence}; {note}" if note else sentence


def kind_of_labels(classes: tuple[str, ...]) -> str:
    """Return the kind of task for these classes; without classes the labels are numbers."""
    return "classification" if classes else "regression"


def metrics_of_labels(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Choose accuracy and F1 for two classes (the second is positive), macro F1 for more, else correlations."""
    if not classes:
        return ("pearson", "spearman")
    if len(classes) == 2:
        return ("accuracy", "f1")
    return ("accuracy", "f1_macro")


def read_tables(path: Path) -> dict[str, Table]:
    """Read the table `train` of a file; of a folder also `dev` and `test`, if it has them.

    Raises:
        DataError: there is no such file, none of the training rows, two for a split, or it cannot be read.
    """
    if path.is_dir():
        files = find_split_files(path)
        if not files["train"]:
            raise _no_training_rows(path)
        names, numbered = read_class_names(path), read_names(path)
        tables = {}
        for split, paths in files.items():
            if paths:
                tables[split] = name_numbers(name_classes(read_file(paths[0]), names), numbered)
        return tables
    if not path.exists():
        raise DataError(f"{path} does not exist", "--data takes a file or a folder")
    return {"train": name_numbers(read_file(path), read_names(path.parent))}


def _no_training_rows(folder: Path) -> DataError:
    looked_for = ", ".join(TRAIN_NAMES[0] + ending for ending in READERS)
    hint = "name the file train, or give the file itself"
    lines = folder / f"{TRAIN_NAMES[0]}{LINES}"
    if lines.is_file():
        hint = hint_of_lines(lines)
    return DataError(f"{folder} has no training rows: looked for {looked_for}; found {_list_folder(folder)}", hint)


def _list_folder(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "nothing"
    more = " and more" if len(names) > LISTED_FILES else ""
    return ", ".join(names[:LISTED_FILES]) + more
