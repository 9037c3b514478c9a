"""The names of classes in the README of a data set's repository on the hub, where its rows hold numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from spdtool.data.formats.table import Table, compose

ClassNames = Mapping[str, tuple[str, ...]]
"""Column of class numbers to the names of its classes."""


def read_class_names(folder: Path) -> ClassNames:
    """Return the names of classes by column, as `dataset_info` in the front matter of `folder`/README.md has them.

    A repository may describe several configurations; columns that they describe differently are left out.
    """
    file = folder / "README.md"
    if not file.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(file) or {}
    except Exception:  # the README of a stranger is no reason to refuse the rows; its YAML may be anything
        return {}
    described = metadata.get("dataset_info")
    by_column: dict[str, set[tuple[str, ...]]] = {}
    for configuration in described if isinstance(described, list) else [described]:
        features = configuration.get("features") if isinstance(configuration, dict) else None
        for feature in features if isinstance(features, list) else []:
            names = _names_of_feature(feature)
            if names:
                by_column.setdefault(compose(str(feature["name"])), set()).add(names)
    return {column: names.pop() for column, names in by_column.items() if len(names) == 1}


def name_classes(table: Table, names: ClassNames) -> Table:
    """Return the table with the names of classes that a README gives; those of the file's own schema win."""
    if not names:
        return table
    return replace(table, class_names={**names, **table.class_names})


def _names_of_feature(feature: object) -> tuple[str, ...]:
    """Return the class names of a feature; none of another kind.

    It is `{name: label, dtype: {class_label: {names: {'0': neg, '1': pos}}}}`, and of lists the same with `sequence` or
    `list` in the place of `dtype`.
    """
    if not isinstance(feature, dict) or "name" not in feature:
        return ()
    for key in ("dtype", "sequence", "list"):
        try:
            names = feature[key]["class_label"]["names"]
            if isinstance(names, dict):
                names = [names[number] if number in names else names[str(number)] for number in range(len(names))]
            return tuple(map(str, names))
        except (KeyError, TypeError):
            continue
    return ()
