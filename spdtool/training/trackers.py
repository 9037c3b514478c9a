"""The training log in TensorBoard and others, through accelerate's own trackers: `--set log=tensorboard`.

They get what `metrics.jsonl` holds. Files of a tracker go to `RUN/logs`, outside of the folders of the stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from spdtool import ranks
from spdtool.console import Event, OnEvent
from spdtool.errors import RecipeError, UnknownName
from spdtool.recipe.fields import Recipe

FOLDER = "logs"


def check_trackers(recipe: Recipe) -> None:
    """Refuse a tracker of `recipe.log` that accelerate does not know, or whose package is not installed.

    Raises:
        UnknownName, RecipeError: names it.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in recipe.log:
        if name not in map(str, LOGGER_TYPE_TO_CLASS):
            raise UnknownName("tracker", name, map(str, LOGGER_TYPE_TO_CLASS))
        if name not in available:
            raise RecipeError(
                f"log={name}: the package of this tracker is not installed",
                f"pip install {name.replace('_', '-')}, or leave it out: --set log=[]",
            )


@contextmanager
def track_events(recipe: Recipe, run_folder: Path, stage: str, on_event: OnEvent) -> Iterator[OnEvent]:
    """Yield a function that passes each event on to `on_event`, and its numbers to the trackers of the recipe."""
    if not recipe.log or not ranks.is_main():
        yield on_event
        return
    trackers = [open_tracker(name, run_folder, stage) for name in recipe.log]

    def track(event: Event) -> None:
        on_event(event)
        numbers = dict(flatten_numbers(event))
        step = numbers.pop("step", None)
        if step is None or not numbers:
            return
        for tracker in trackers:
            tracker.log(numbers, step=int(step))

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


def open_tracker(name: str, run_folder: Path, stage: str) -> GeneralTracker:
    """Open a tracker for one stage of a run."""
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    project = f"{run_folder.name}-{stage}"
    if tracker_class.requires_logging_directory:
        folder = run_folder / FOLDER
        folder.mkdir(exist_ok=True)
        tracker = tracker_class(stage, logging_dir=str(folder))
    else:
        tracker = tracker_class(project)
    tracker.start()
    return tracker


def flatten_numbers(event: Event, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of an event by name, such as `losses/hidden` and `dev/score`."""
    for name, value in event.items():
        path = prefix + {"metrics": "dev"}.get(name, name)
        if isinstance(value, dict):
            yield from flatten_numbers(value, f"{path}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, value
