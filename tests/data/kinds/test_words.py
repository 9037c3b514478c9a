"""Words with tags: CoNLL files and columns of lists, brought into BIO; what cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from spdtool.data.dataset import Dataset, Rows, hash_labels
from spdtool.data.kinds.words import read_unlabeled_words
from spdtool.data.local import check_header, local_dataset
from spdtool.errors import DataError
from spdtool.recipe.reading import build_recipe

CONLL = "-DOCSTART- -X- O O\n\nAnna NNP B-NP B-PER\nSmith NNP I-NP I-PER\nwon VBD B-VP O\n\n\nParis NNP B-NP B-LOC\n"


def local(path: Path, **flags: Any) -> Dataset:
    recipe = build_recipe("default", {"task": "local", "data": str(path)} | flags, [])
    check_header(recipe)
    return local_dataset(recipe)


def read(dataset: Dataset, split: str = "train") -> list[list[tuple[str, str]]]:
    """Words and tags of every row, in the order of the texts."""
    rows: Rows = dataset.load(None, 0)[split]
    pairs = zip(rows.first, rows.labels, strict=True)
    return [[(text[start:end], dataset.labels[tag]) for start, end, tag in words] for text, words in pairs]


def folder_of(tmp_path: Path, content: str, ending: str = ".conll") -> Path:
    for split in ("train", "dev"):
        (tmp_path / f"{split}{ending}").write_text(content, "utf-8")
    return tmp_path


def test_conll_files_are_read_with_spaces_or_tabs_and_without_the_starts_of_documents(tmp_path: Path) -> None:
    for number, content in enumerate((CONLL, CONLL.replace(" ", "\t"), CONLL.replace("\n", "\r\n"))):
        (tmp_path / str(number)).mkdir()
        dataset = local(folder_of(tmp_path / str(number), content))
        assert dataset.kind == "tokens"
        assert dataset.labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
        assert read(dataset) == [[("Anna", "B-PER"), ("Smith", "I-PER"), ("won", "O")], [("Paris", "B-LOC")]]
        assert dataset.load(None, 0)["train"].first == ["Anna Smith won", "Paris"]
    pos_dataset = local(folder_of(tmp_path, CONLL), label="column2")
    assert (pos_dataset.labels, pos_dataset.metrics) == (("NNP", "VBD"), ("accuracy", "f1_macro"))


def test_other_schemes_become_bio_and_what_was_changed_is_said(tmp_path: Path) -> None:
    cases: tuple[tuple[list[str], list[str], str], ...] = (
        (["B-X", "E-X", "S-Y", "O"], ["B-X", "I-X", "B-Y", "O"], "E-... was read as I-..."),
        (["B-X", "L-X", "U-Y", "O"], ["B-X", "I-X", "B-Y", "O"], "U-... was read as B-..."),
        (["I-X", "I-X", "I-Y", "O"], ["B-X", "I-X", "B-Y", "O"], "4 times I-... that goes on with no span"),
        (["B-X", "I-Y", "O", "B-X"], ["B-X", "B-Y", "O", "B-X"], "2 times I-... that goes on with no span"),
        (["NOUN", "VERB", "NOUN", "X"], ["NOUN", "VERB", "NOUN", "X"], ""),
    )
    for tags, expected, note in cases:
        dataset = local(folder_of(tmp_path, "\n".join(f"w{number}\t{tag}" for number, tag in enumerate(tags)) + "\n"))
        assert [tag for _, tag in read(dataset)[0]] == expected
        assert note in dataset.about, dataset.about


def test_lists_of_words_and_tags_come_from_jsonl_and_from_parquet_of_datasets(tmp_path: Path) -> None:
    rows = [{"id": i, "tokens": ["New York", "is", "", f"big{i}"], "ner_tags": [1, 0, 0, 0]} for i in range(40)]
    names = ["O", "B-LOC", "I-LOC"]
    expected = [("New York", "B-LOC"), ("is", "O")]
    class_label = {"names": names, "_type": "ClassLabel"}
    for number, feature in enumerate(
        ({"feature": class_label, "_type": "Sequence"}, {"feature": class_label, "_type": "List"}, [class_label])
    ):
        table = pa.Table.from_pylist(rows)
        metadata = {"huggingface": json.dumps({"info": {"features": {"ner_tags": feature}}})}
        parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{number}.parquet")
        dataset = local(tmp_path / f"{number}.parquet")
        assert dataset.labels == ("O", "B-LOC", "I-LOC"), feature
        assert read(dataset)[0][:2] == expected
        assert "40 empty words were left out" in dataset.about
    named = [{"words": row["tokens"], "labels": [names[tag] for tag in row["ner_tags"]]} for row in rows]  # type: ignore[attr-defined]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    assert read(local(tmp_path / "rows.jsonl"))[0][:2] == expected


def test_files_of_several_shards_are_read_together(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("validation", 1)):
        for number in range(count):
            rows = [{"tokens": [f"w{number}{i}", "is"], "ner_tags": ["B-X", "O"]} for i in range(3)]
            file = tmp_path / f"{split}-{number:05}-of-{count:05}.parquet"
            parquet.write_table(pa.Table.from_pylist(rows), file)
    dataset = local(tmp_path)
    assert (dataset.kind, len(read(dataset)), len(read(dataset, "dev"))) == ("tokens", 6, 3)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    cases: tuple[tuple[str, str, dict[str, Any], str], ...] = (
        ("a.conll", "Anna B-PER\nSmith\n", {}, "line 2: 'Smith' is no word with its tag"),
        ("b.conll", "Anna B-PER\nSmith NNP I-PER\n", {}, "line 2: 3 fields where the lines before have 2"),
        ("c.conll", "\n\n \n", {}, "is empty"),
        ("d.conll", "Anna O\n", {}, "every word in .* has the tag 'O'"),
        ("e.jsonl", '{"tokens": ["a"], "ner_tags": ["O", "B-X"]}', {}, "line 1: 1 words and 2 tags"),
        ("f.jsonl", '{"tokens": ["a"], "x": 1}', {}, "no column that is clearly the tags of its words"),
        ("g.jsonl", '{"tokens": ["a"], "ner_tags": ["O"], "pos_tags": ["X"]}', {}, "more than one column"),
        ("h.jsonl", '{"tokens": ["a"], "x": "O"}', {"label": "x"}, "'x' holds no lists of tags"),
        ("i.jsonl", '{"tokens": ["a"], "ner_tags": [null]}', {}, "the tag None is no text and no number"),
        ("j.jsonl", '{"tokens": ["a", 7], "ner_tags": ["O", "B-X"]}', {}, "no list of words"),
        ("k.jsonl", '{"tokens": [" "], "ner_tags": ["O"]}\n{"tokens": [""], "ner_tags": ["B-X"]}', {}, "no sentence"),
        ("l.csv", "tokens,ner_tags\na,B\n", {}, "without lists of words"),
    )
    for name, content, flags, message in cases:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            local(tmp_path / name, **flags)


def test_a_tag_that_no_training_row_has_is_refused_in_dev(tmp_path: Path) -> None:
    folder_of(tmp_path, CONLL)
    for tag in ("B-TOWN", "X-TOWN"):
        (tmp_path / "dev.conll").write_text(f"Rome {tag}\n")
        with pytest.raises(DataError, match=f"the tag '{tag}' is in no training row"):
            local(tmp_path)


def test_labels_of_lists_are_hashed_by_their_values() -> None:
    assert hash_labels([[(0, 1, 2)]]) == hash_labels([[[0, 1, 2]]])
    assert len({hash_labels(labels) for labels in ([[(0, 1, 2)]], [[(0, 1, 3)]], [1, 2], [[]])}) == 4


SENTENCES = "Anna B-PER\nSmith I-PER\nwon O\n\nParis B-LOC\n\nBob B-PER\nran O\n\n"


def test_tags_that_are_nearly_spans_are_refused_and_not_scored_word_by_word(tmp_path: Path) -> None:
    cases = (
        (SENTENCES.replace("B-LOC", "LOC"), "line 5: the tag 'LOC' is neither O nor of the form of 'B-PER'"),
        (SENTENCES.replace(" O", " o"), "line 1: the tag 'o' is neither O nor"),
        (SENTENCES.replace("B-", "b-").replace("I-", "i-"), "the tag 'b-LOC' looks like the begin of a span"),
        (SENTENCES.replace("B-", "B_").replace("I-", "I_"), "the tag 'B_LOC' looks like"),
        (SENTENCES.replace("B-PER", "PER-B").replace("I-PER", "PER-I").replace("B-LOC", "LOC-B"), "'LOC-B' looks like"),
        (SENTENCES.replace("-PER", "").replace("-LOC", ""), "the tags B, I name no type of span"),
        ("1 Anna B-PER\n2 Smith I-PER\n\n1 Bob B-PER\n2 ran O\n\n", "numbers the words of each sentence"),
    )
    for content, message in cases:
        with pytest.raises(DataError, match=message):
            local(folder_of(tmp_path, content))
    plain = local(folder_of(tmp_path, SENTENCES.replace("B-", "").replace("I-", "")))
    assert plain.metrics == ("accuracy", "f1_macro")
    assert "no tag begins with B- or I-: each is a class of its word" in plain.about


def test_tags_that_are_numbers_without_names_or_marks_of_pieces_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    for column, tags, message in (
        ("ner_tags", [0, 1], "'ner_tags' holds numbers, and nothing names them"),
        ("ner_tags", [0, -100], "line 1: the tag is -100"),
        ("tags", ["O", "B-\ud800"], "line 1: the tag .* holds half a surrogate pair"),
    ):
        rows = [{"tokens": ["a", "b"], column: tags}, {"tokens": ["c"], column: tags[:1]}]
        file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        with pytest.raises(DataError, match=message):
            local(file)
    file.write_text("\n".join(json.dumps({"tokens": [f"w{i}"], "tags": [i % 3]}) for i in range(9)), "utf-8")
    assert local(file).labels == ("0", "1", "2")
    with pytest.raises(DataError, match="no column 'words'"):
        local(file, text=("words",))


def test_comments_before_a_sentence_are_passed_over(tmp_path: Path) -> None:
    content = "# id 5f-1\tdomain=en\nAnna _ _ B-PER\n# _ _ O\n\n# text = Bob\nBob _ _ B-PER\nran _ _ O\n"
    expected = [[("Anna", "B-PER"), ("#", "O")], [("Bob", "B-PER"), ("ran", "O")]]
    assert read(local(folder_of(tmp_path, content))) == expected


def test_a_test_file_with_secret_tags_is_left_alone_and_a_dev_file_without_spans_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, SENTENCES)
    (folder / "test.conll").write_text("one O\n\ntwo O\n", "utf-8")
    dataset = local(folder)
    assert set(dataset.load(None, 0)) == {"train", "dev"}
    assert "test.conll has no labels" in dataset.about
    (folder / "test.conll").write_text(SENTENCES, "utf-8")
    assert "test.conll is scored once, at the end" in local(folder).about
    (folder / "dev.conll").write_text("one O\n\ntwo O\n", "utf-8")
    with pytest.raises(DataError, match=r"dev.conll has the tag 'O': there is no span to score"):
        local(folder)


UNLABELED_FILES = {
    "sentences.txt": "Anna's \u5317\u4eac trip\n\nBob ran.\n",
    "text.jsonl": '{"id": 1, "text": "Anna\'s \u5317\u4eac trip"}\n{"id": 2, "text": "Bob ran."}\n',
    "lists.jsonl": '{"id": 1, "words": ["Anna", "\'", "s", "\u5317", "\u4eac", "trip"]}\n'
    '{"id": 2, "words": ["Bob", "", "ran", "."], "tags": []}\n',
    "words.conll": "Anna\n'\ns\n\u5317\n\u4eac\ntrip\n\nBob\nran\n.\n",
    "tagged.conll": "Anna O\n' O\ns O\n\u5317 B-X\n\u4eac O\ntrip O\n\nBob O\nran O\n. O\n",
}


def test_words_without_tags_are_read_from_texts_lists_and_conll_files(tmp_path: Path) -> None:
    dataset = local(folder_of(tmp_path, CONLL))
    for name, content in UNLABELED_FILES.items():
        (tmp_path / name).write_text(content, "utf-8")
        rows = read_unlabeled_words(tmp_path / name, (), dataset)
        words = [
            [text[start:end] for start, end, _ in spans] for text, spans in zip(rows.first, rows.labels, strict=True)
        ]
        assert words == [["Anna", "'", "s", "\u5317", "\u4eac", "trip"], ["Bob", "ran", "."]], name
        assert rows.first[1] == ("Bob ran." if "text" in name or "txt" in name else "Bob ran ."), name
        assert {tag for spans in rows.labels for _, _, tag in spans} == {0}, name


def test_words_without_tags_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    dataset = local(folder_of(tmp_path, CONLL))
    for name, content, columns, message in (
        ("a.jsonl", '{"ner_tags": ["O"]}\n', (), "no column of words, only 'ner_tags'"),
        ("a.jsonl", '{"id": "1", "ner_tags": ["O"]}\n', (), "has no column 'tokens'"),
        ("a.jsonl", '{"id": "1", "text": "a"}\n', ("body",), "has no column 'body'"),
        ("a.jsonl", '{"tokens": ["a"]}\n{"tokens": [" "]}\n', (), "line 2: no word in the column 'tokens'"),
        ("a.jsonl", '{"tokens": [1, 2]}\n', (), r"line 1: the column 'tokens' holds '\[1, 2\]', no list of words"),
        ("a.jsonl", '{"text": "a"}\n{"text": " "}\n', (), "line 2: no text in the column 'text'"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', (), "line 2: the column 'text' holds a int, not text"),
        ("a.txt", " \n\n", (), "a.txt is empty"),
        ("a.txt", "Anna B-PER\n\nran O\n", (), "every line of .*a.txt ends in a tag"),
        ("a.conll", "Anna\nran fast\n", (), "line 2: 2 fields where the lines before have 1"),
    ):
        (tmp_path / name).write_text(content, "utf-8")
        with pytest.raises(DataError, match=message):
            read_unlabeled_words(tmp_path / name, columns, dataset)


def test_numbers_of_tags_are_named_by_a_file_of_labels(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"tokens": [f"Anna{number}", "won"], "ner_tags": [1, 0]} for number in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(DataError) as caught:
        local(file)
    assert "lay a labels.txt beside the file" in str(caught.value.hint)
    (tmp_path / "labels.txt").write_text("O\nB-PER\nI-PER\n", "utf-8")
    assert local(file).labels == ("O", "B-PER", "I-PER")


def test_a_file_without_blank_lines_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.conll"
    file.write_text("Anna B-PER\nwon O\nRome B-LOC\n" * 9, "utf-8")
    with pytest.raises(DataError, match="is one sentence of 27 words"):
        local(file)
