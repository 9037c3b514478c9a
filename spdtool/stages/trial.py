"""The trial of a family of encoders that is not a tested one: a whole run with two random layers, in the plan."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PretrainedConfig

from spdtool import console
from spdtool.errors import DataError, DeviceError, ModelError, RecipeError, first_line
from spdtool.models.layers import TESTED_FAMILIES
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import make_smoke
from spdtool.run.folder import Run
from spdtool.stages.run_stages import run_stage
from spdtool.tasks.task import Task

TRIED_STAGES = ("teacher", "prune", "distill", "finetune", "export")
LONGEST_REASON = 300  # characters; some errors of libraries are essays


def try_families(recipe: Recipe, task: Task, configs: Iterable[PretrainedConfig]) -> None:
    """Run the whole recipe with two random layers of a family that is not a tested one, before hours are spent on it.

    Every stage up to the export of the first target runs as it will: masks and sparse products,
    prune events, the checkpoint that is saved and loaded again, and the gates of the exported file.

    Args:
        configs: of student and teacher.

    Raises:
        ModelError: names the family, the stage that failed, and the reason.
        SpdError: what is wrong is not the family.
    """
    untested = [config.model_type for config in configs if config.model_type not in TESTED_FAMILIES]
    builds_model = task.dataset.build is not None and recipe.given_teacher is None
    if not untested or recipe.smoke or builds_model:
        return
    trial = make_smoke(recipe)
    export = trial.export.model_copy(update={"targets": trial.export.targets[:1], "optional": ()})
    trial = trial.model_copy(update={"export": export})
    stage = ""
    text = f"trying every step with two random layers of a {untested[0]!r}, which is not among the tested families"
    with console.busy(text), console.mute(), TemporaryDirectory(prefix="spdtool-trial-") as folder:
        try:
            with torch.random.fork_rng(devices=[]):
                for stage in TRIED_STAGES:
                    run_stage(Run.for_recipe(Path(folder) / "run", trial), stage)
        except (RecipeError, DataError, DeviceError):
            raise
        except Exception as error:  # the family's own code raises what it likes
            reason = textwrap.shorten(getattr(error, "message", first_line(error)), LONGEST_REASON, placeholder=" ...")
            raise ModelError(
                f"{untested[0]!r} does not go through {stage}, tried with two random layers: {reason}",
                f"families that are tested: {', '.join(TESTED_FAMILIES)}; docs/reference/families.md has further ones",
            ) from None
