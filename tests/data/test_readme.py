"""Class names in the README of a cloned data set, for numeric labels in files without a schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spdtool.data.local import local_dataset
from spdtool.data.readme import read_class_names
from spdtool.recipe.fields import Recipe

FEATURES = """
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': pos
          '1': neg
"""
README = f"---\nlicense: mit\ndataset_info:\n  features:{FEATURES}---\n# Reviews\n"


def write_rows(file: Path, labels: list[object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"{file.stem} {row}", "label": label}) for row, label in enumerate(labels)]
    file.write_text("\n".join(lines), "utf-8")


def test_numbers_get_the_names_of_the_readme_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, files in {"whole": ("train",), "sharded": ("train-00000-of-00002", "train-00001-of-00002")}.items():
        clone = tmp_path / name
        for file in files:
            write_rows(clone / f"data/{file}.jsonl", [0, 1, "0", "neg"] * 3)
        write_rows(clone / "data/dev.jsonl", [0, 1] * 3)
        (clone / "README.md").write_text(README, "utf-8")
        data = local_dataset(Recipe(task="local", data=str(clone)))
        assert data.labels == ("pos", "neg"), name
        assert list(data.load(None, 0)["train"].labels)[:4] == [0, 1, 0, 1], name


def test_a_readme_without_class_names_is_ignored(tmp_path: Path) -> None:
    assert read_class_names(tmp_path) == {}
    other_readme = README.replace("pos", "good")
    texts = {
        "# no front matter": {},
        "---\n- a list\n---\n": {},
        "---\ndataset_info: [\n---\n": {},
        "---\ndataset_info:\n  features: none\n---\n": {},
        README: {"label": ("pos", "neg")},
        f"---\ndataset_info:\n- features:{FEATURES}- features:{FEATURES}---\n": {"label": ("pos", "neg")},
        f"---\ndataset_info:\n- features:{FEATURES}- features:{FEATURES.replace('pos', 'good')}---\n": {},
        other_readme: {"label": ("good", "neg")},
    }
    for text, names in texts.items():
        (tmp_path / "README.md").write_text(text, "utf-8")
        assert read_class_names(tmp_path) == names, text


def test_the_names_of_lists_are_read(tmp_path: Path) -> None:
    for key in ("sequence", "list"):
        features = FEATURES.replace("    dtype:\n      class_label", f"    {key}:\n      class_label")
        (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features:{features}---\n", "utf-8")
        assert read_class_names(tmp_path) == {"label": ("pos", "neg")}, key
