"""Tasks: what a model predicts from the rows of a data set, how it learns that and how it is scored.

There is one file for each kind of task, such as `regression.py`, all on the base class `Task` (`task.py`). Between
them stand `NamedLabels`, for labels that are matched by name, and `WindowedTask`, for texts of any length. What an
exported folder answers is a `Decision` (`decision.py`, `entities.py`, `answers.py`). `prepare.py` finds the task of a
recipe and reads its rows. A plugin adds a kind by the same door:

    from spdtool import Task
    from spdtool.plugins import task_kinds

    @task_kinds.register("ordinal")
    class Ordinal(Task): ...

Nothing outside this folder asks of which kind a task is. Neither torch nor transformers is imported before a loss is
computed or a text is tokenized, so that code that only lists or scores does not wait for them.
"""
