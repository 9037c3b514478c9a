"""What every kind of task has to say of itself."""

from __future__ import annotations

from spdtool import plugins


def test_every_kind_says_what_its_files_hold() -> None:
    entries = plugins.task_kinds.builtin_entries()
    assert len(entries) >= 7
    for entry in entries:
        assert entry.value.columns, entry.name
        assert not entry.summary.endswith("]."), f"{entry.name}: shapes do not belong into a listing"
