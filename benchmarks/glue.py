"""Score the recipes on five GLUE tasks, one JSON line a trial, in calls that may be killed and resumed.

    python benchmarks/glue.py --spdtool .venv/bin/spdtool --data GLUE --model all-MiniLM-L6-v2 --work runs/glue
    python benchmarks/glue.py ... --minutes 9                                   # stop after that; call again to go on
    python benchmarks/glue.py ... --recipes default --sparsities 0.8,0.9 --variant blocks --set prune.pattern=1x4
    python benchmarks/glue.py --table docs/results/glue.jsonl

The official dev set of each task is halved by a fixed seed. One half picks: the tool sees it as its dev set and keeps
the best epoch by it; the search for the teacher goes by it too. The other half reports: no run ever reads it. Every
recipe gets the same teacher, one for each task and seed. `qnli-sample` is QNLI with the training rows of the folder.

While the file WORK/pause exists, the running command is stopped and none is started, so that others can time something
on the same machine. The script needs transformers and scikit-learn; the measured tool runs as a command of its own.

    WORK/data/TASK/        train.tsv, dev.tsv (the picking half), report.tsv
    WORK/teachers/TASK/    one run folder for each point of the search, and for each further seed
    WORK/trials/TASK/      one run folder for each trial; of a finished one only the last checkpoint stays,
                           or all of them with --keep-checkpoints
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # as it stands in a file of JSON lines

SPLIT_SEED = 2026  # arbitrary, and never changed, so that all results use the same halves
STAGES = ("teacher", "prune", "distill", "finetune")
RATES = "1e-4,2e-4,4e-4"  # of the teacher; around the 3e-4 that suited three layers of the same encoder
EPOCHS = "4,8"  # all rates are tried with the first, the best one also with the others
EVERYWHERE = ("precision=fp32", "save_minutes=5")
MAX_LENGTH = 128  # tokens, as in the recipes


@dataclass(frozen=True)
class Task:
    """One GLUE task: its folder of official files, and the numbers of its columns."""

    folder: str
    text: tuple[int, ...]
    label: int
    labels: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    header: bool = True


ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "rte": Task("RTE", text=(1, 2), label=3, labels=ENTAILMENT),
    "mrpc": Task("MRPC", text=(3, 4), label=0, metrics=("accuracy", "f1")),
    "cola": Task("CoLA", text=(3,), label=1, metrics=("matthews",), header=False),
    "sst2": Task("SST-2", text=(0,), label=1),
    "qnli-sample": Task("QNLI", text=(1, 2), label=3, labels=ENTAILMENT),
}
SMALL, LARGE = ("rte", "mrpc", "cola"), ("sst2", "qnli-sample")

# tasks, recipes, sparsities and seeds of trials
Block = tuple[Sequence[str], Sequence[str], Sequence[float], Sequence[int]]

# In the order in which a table becomes useful. `reference` comes late: it takes 60 epochs of batches padded to 128
# tokens, about ten times as long as any other recipe.
BLOCKS: tuple[Block, ...] = (
    (SMALL, ("default", "spd"), (0.9,), (0,)),
    (SMALL, ("gmp",), (0.9,), (0,)),
    (SMALL, ("default", "spd"), (0.9,), (1, 2)),
    (SMALL, ("obert", "movement", "theseus", "no-distillation"), (0.9,), (0,)),
    (SMALL, ("gmp", "obert", "movement", "theseus", "no-distillation"), (0.9,), (1, 2)),
    (SMALL, ("default",), (0.8, 0.95), (0, 1, 2)),
    (LARGE, ("default", "spd", "gmp"), (0.9,), (0,)),
    (SMALL, ("reference",), (0.9,), (0,)),
    (LARGE, ("default", "spd", "gmp"), (0.9,), (1, 2)),
    (LARGE, ("obert", "movement", "theseus", "no-distillation"), (0.9,), (0, 1, 2)),
    (LARGE, ("default",), (0.8, 0.95), (0, 1, 2)),
    (SMALL, ("reference",), (0.9,), (1, 2)),
    (LARGE, ("reference",), (0.9,), (0, 1, 2)),
)


@dataclass(frozen=True)
class Trial:
    """One recipe at one sparsity with one seed; `variant` names the further `--set` assignments."""

    task: str
    recipe: str
    sparsity: float
    seed: int
    variant: str = ""
    sets: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, float, int, str]:
        """The fields that identify its row in a file."""
        return (self.task, Path(self.recipe).stem, self.sparsity, self.seed, self.variant)

    @property
    def folder(self) -> str:
        """Its run folder, relative to WORK."""
        name = "-".join(filter(None, [Path(self.recipe).stem, self.variant]))
        return f"trials/{self.task}/{name}-{self.sparsity:g}-seed{self.seed}"


class TimeUp(Exception):
    """The minutes of this call are over."""


class CommandFailed(Exception):
    """A command of the measured tool ended with an error."""


@dataclass(frozen=True)
class Runner:
    """Runs commands of the measured tool until `deadline`, a time of time.monotonic."""

    spdtool: Path
    model: Path
    work: Path
    deadline: float
    rates: tuple[float, ...]
    epochs: tuple[int, ...]
    settings: tuple[str, ...] = EVERYWHERE
    keeps_checkpoints: bool = False

    def run_stage(self, stage: str, folder: str, options: Sequence[str] = ()) -> None:
        """Run one stage of the run folder WORK/`folder` unless it is done, and record its CPU seconds beside it."""
        run = self.work / folder
        if (run / stage / "stage.json").is_file():
            return
        run.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self.spdtool), stage, "--run", str(run), *options]
        cpu_before = children_cpu_seconds()
        try:
            self.run_command(command, run.with_name(f"{run.name}.log"))
        finally:  # a stage that is killed goes on in a later call: its seconds are the sum of its lines
            note = {
                "stage": stage,
                "cpu_seconds": children_cpu_seconds() - cpu_before,
                "command": self.anonymous(command),
            }
            append(run.with_name(f"{run.name}.commands.jsonl"), note)

    def run_command(self, command: Sequence[str], log: Path) -> None:
        """Run `command`, stopped while the pause file exists.

        Raises:
            TimeUp: the deadline has passed; the command was ended.
            CommandFailed: it ended with an error.
        """
        pause, is_stopped = self.work / "pause", False
        self.wait_while_paused()
        with log.open("ab") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)
            try:
                while process.poll() is None:
                    if time.monotonic() > self.deadline:
                        raise TimeUp
                    if pause.exists() != is_stopped:
                        is_stopped = not is_stopped
                        process.send_signal(signal.SIGSTOP if is_stopped else signal.SIGCONT)
                    time.sleep(0.5)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.send_signal(signal.SIGCONT)  # a stopped process ends only once it runs again
                process.wait()
        if process.returncode != 0:
            last_lines = log.read_text("utf-8", "replace").splitlines()[-8:]
            raise CommandFailed("\n".join([f"{' '.join(self.anonymous(command))} failed:", *last_lines]))

    def wait_while_paused(self) -> None:
        """Wait until there is no pause file. Raises TimeUp."""
        while (self.work / "pause").exists():
            if time.monotonic() > self.deadline:
                raise TimeUp
            time.sleep(0.5)

    def anonymous(self, command: Sequence[str]) -> list[str]:
        """Replace this machine's folders in `command` by names."""
        names = {self.spdtool: "spdtool", self.model: "MODEL", self.work: "WORK"}
        for folder, name in names.items():
            command = [argument.replace(str(folder), name) for argument in command]
        return list(command)


def split_dev(data: Path, work: Path) -> None:
    """Write WORK/data/TASK for every task with official files in `data`, unless it exists."""
    for task in TASKS.values():
        source, target = data / task.folder, work / "data" / task.folder
        if target.exists() or not source.is_dir():
            continue
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shutil.copy(source / "train.tsv", partial)
        picking, reporting = halve((source / "dev.tsv").read_bytes(), header=task.header)
        (partial / "dev.tsv").write_bytes(picking)
        (partial / "report.tsv").write_bytes(reporting)
        partial.rename(target)


def halve(content: bytes, *, header: bool) -> tuple[bytes, bytes]:
    """Split a file's rows into the picking and the reporting half, each in the file's order with its header."""
    lines = content.rstrip(b"\r\n").split(b"\n")
    header_lines = [lines.pop(0)] if header else []
    order = list(range(len(lines)))
    random.Random(SPLIT_SEED).shuffle(order)
    middle = (len(order) + 1) // 2
    halves = []
    for numbers in (order[:middle], order[middle:]):
        rows = [lines[number] for number in sorted(numbers)]
        halves.append(b"\n".join([*header_lines, *rows]) + b"\n")
    return halves[0], halves[1]


def read_rows(task: Task, file: Path) -> tuple[list[list[str]], list[int]]:
    """Read a file; return its text columns, each a list over the rows, and the label index of each row."""
    lines = file.read_text("utf-8-sig").rstrip("\r\n").split("\n")  # not splitlines: some rows hold other line ends
    rows = [line.removesuffix("\r").split("\t") for line in lines[int(task.header) :]]
    columns = [[row[column] for row in rows] for column in task.text]
    return columns, [task.labels.index(row[task.label]) for row in rows]


def predict(checkpoint: Path, columns: Sequence[Sequence[str]]) -> list[int]:
    """Predict the label index of each row with the classifier at `checkpoint`."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    order = sorted(range(len(columns[0])), key=lambda row: sum(len(column[row]) for column in columns))
    predictions = [0] * len(order)
    for start in range(0, len(order), 32):  # rows of like length together, so that little is padded
        batch = order[start : start + 32]
        texts = [[column[row] for row in batch] for column in columns]
        inputs = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits
        for row, prediction in zip(batch, logits.argmax(-1).tolist(), strict=True):
            predictions[row] = prediction
    return predictions


def score(task: Task, gold: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Compute every metric of the task, and their mean as `score`."""
    from sklearn import metrics

    functions = {
        "accuracy": metrics.accuracy_score,
        "f1": metrics.f1_score,
        "matthews": metrics.matthews_corrcoef,
    }
    values = {name: float(functions[name](gold, predictions)) for name in task.metrics}
    return {"score": statistics.fmean(values.values())} | values


def score_both_halves(runner: Runner, task_name: str, checkpoint: Path, metrics: Row) -> Row:
    """Score a checkpoint on the picking half, the reporting half and training rows.

    Args:
        metrics: the tool's own scores of the checkpoint; that on the picking half must equal the one computed here.
    """
    runner.wait_while_paused()
    task = TASKS[task_name]
    scores: Row = {}
    for half, file in (("pick", "dev.tsv"), ("report", "report.tsv")):
        columns, gold = read_rows(task, runner.work / "data" / task.folder / file)
        scores[half] = score(task, gold, predict(checkpoint, columns))
    difference = abs(scores["pick"]["score"] - metrics["dev"]["score"])
    # Another padding may turn a row whose logits are equal to the last digits; more than that is a wrong reader.
    assert difference < 0.03, f"{checkpoint}: {scores['pick']} here, {metrics['dev']} by the tool"
    return {"pick": metrics["dev"], "report": scores["report"], "train": metrics["train"]}


def make_teacher(runner: Runner, task: str, rate: float, epochs: int, seed: int) -> str:
    """Fine-tune one teacher unless that is done; return its run folder, relative to WORK."""
    folder = f"teachers/{task}/{rate:g}x{epochs}-seed{seed}"
    options = [
        "--task",
        task.removesuffix("-sample"),
        "--data",
        str(runner.work / "data"),
        "--model",
        str(runner.model),
    ]
    sets = [*runner.settings, f"teacher.learning_rate={rate}", f"teacher.epochs={epochs}"]
    options += ["--seed", str(seed), *(f"--set={assignment}" for assignment in sets)]
    runner.run_stage("teacher", folder, options)
    return folder


def best_teacher(runner: Runner, task: str, seed: int) -> tuple[str, dict[str, float]]:
    """Make the teacher of `task` for `seed`, with the setting that was best on the picking half with seed 0.

    Returns:
        its run folder, relative to WORK, and the setting.
    """

    def pick_score(setting: tuple[float, int]) -> float:
        folder = make_teacher(runner, task, *setting, seed=0)
        return float(read_record(runner.work / folder, "teacher")["result"]["dev"]["score"])

    best_rate = max(((rate, runner.epochs[0]) for rate in runner.rates), key=pick_score)[0]
    rate, epochs = max(((best_rate, epochs) for epochs in runner.epochs), key=pick_score)
    return make_teacher(runner, task, rate, epochs, seed), {"learning_rate": rate, "epochs": epochs}


def run_trial(runner: Runner, trial: Trial) -> Row:
    """Run the missing stages of `trial`, its teacher included; return its row."""
    teacher, setting = best_teacher(runner, trial.task, trial.seed)
    options = ["--task", trial.task.removesuffix("-sample"), "--data", str(runner.work / "data")]
    options += ["--teacher", str(runner.work / teacher / "teacher"), "--recipe", trial.recipe]
    options += ["--sparsity", f"{trial.sparsity:g}", "--seed", str(trial.seed)]
    options += [f"--set={assignment}" for assignment in (*runner.settings, *trial.sets)]
    for stage in STAGES:
        runner.run_stage(stage, trial.folder, options if stage == "teacher" else ())
    row = row_of(runner, trial, teacher, setting)
    if not runner.keeps_checkpoints:
        for stage in STAGES[:-1]:  # 90 MB each; the records stay
            for weights in (runner.work / trial.folder / stage).rglob("*.safetensors"):
                weights.unlink()
    return row


def row_of(runner: Runner, trial: Trial, teacher: str, setting: dict[str, float]) -> Row:
    """Make the row of a finished trial."""
    run = runner.work / trial.folder
    records = {stage: read_record(run, stage) for stage in STAGES}
    no_fit = {"steps": 0, "epochs": 0}  # of a given teacher, or of a phase of no epochs
    fits = {stage: record["result"]["fit"] or no_fit for stage, record in records.items()}
    scores = {
        "teacher": score_both_halves(
            runner, trial.task, runner.work / teacher / "teacher", records["teacher"]["result"]
        ),
        "student": score_both_halves(runner, trial.task, run / "finetune", records["finetune"]["result"]),
    }
    commands = read_rows_of(run.with_name(f"{run.name}.commands.jsonl"))
    seconds: dict[str, float] = defaultdict(float)
    for command in commands:
        seconds[command["stage"]] += command["cpu_seconds"]
    report = {model: halves["report"]["score"] for model, halves in scores.items()}
    gaps = {model: halves["train"]["score"] - halves["report"]["score"] for model, halves in scores.items()}
    return {
        "task": trial.task,
        "recipe": Path(trial.recipe).stem,
        "variant": trial.variant,
        "sets": [*runner.settings, *trial.sets],
        "sparsity": trial.sparsity,
        "seed": trial.seed,
        "split_seed": SPLIT_SEED,
        **scores,
        "teacher_setting": setting,
        "after": {stage: records[stage]["result"]["dev"]["score"] for stage in STAGES},
        "share_of_teacher": report["student"] / report["teacher"],
        "gap_train_report": gaps,
        "zeros": records["finetune"]["result"]["sparsity"],
        "steps": {stage: fit["steps"] for stage, fit in fits.items()},
        "epochs": {stage: fit["epochs"] for stage, fit in fits.items()},
        "cpu_seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "cpu": cpu_model(),
        "machine": records["finetune"]["machine"],
        "spdtool": records["finetune"]["spdtool"],
        "commit": commit_of(runner.spdtool),
        "finished": records["finetune"]["finished"],
        "commands": [" ".join(command["command"]) for command in commands],
    }


def read_record(run: Path, stage: str) -> Row:
    """Read the stage.json of a finished stage."""
    record: Row = json.loads((run / stage / "stage.json").read_text("utf-8"))
    return record


def children_cpu_seconds() -> float:
    """Return the CPU time of all ended child processes, which a busy core does not change as it does wall time."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_model() -> str:
    """Return the processor's name, family and model number."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    values = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    return f"{values.get('model name', '').strip()}, family{values.get('cpu family')}, model{values.get('model')}"


def commit_of(program: Path) -> str | None:
    """Return the commit of the checkout that contains the measured program, or None."""
    command = ["git", "-C", str(program.parent), "rev-parse", "--short", "HEAD"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return process.stdout.strip() or None


def append(file: Path, row: Row) -> None:
    """Append one JSON line and flush it to disk."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_rows_of(file: Path) -> list[Row]:
    """Read a file of JSON lines; return [] if it does not exist."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def finished_keys(file: Path) -> set[tuple[Any, ...]]:
    """Return the keys of the trials that have a row in `file`."""
    return {
        tuple(row[name] for name in ("task", "recipe", "sparsity", "seed", "variant")) for row in read_rows_of(file)
    }


def plan(options: argparse.Namespace) -> list[Trial]:
    """List the trials in order: those of BLOCKS, or of the one block that the command line describes."""
    blocks: Iterable[Block] = BLOCKS
    if options.recipes or options.tasks or options.sparsities or options.variant:
        chosen_sparsities = [float(word) for word in words(options.sparsities)] or [0.9]
        chosen_seeds = [int(word) for word in words(options.seeds)]
        chosen_recipes = words(options.recipes) or ["default"]
        blocks = [(words(options.tasks) or SMALL, chosen_recipes, chosen_sparsities, chosen_seeds)]
    trials = []
    for tasks, recipes, sparsities, seeds in blocks:
        for seed, sparsity, recipe, task in product(seeds, sparsities, recipes, tasks):
            trials.append(Trial(task, recipe, sparsity, seed, options.variant, tuple(options.set)))
    return trials


def words(text: str | None) -> list[str]:
    """Split a text at its commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def table(rows: Sequence[Row]) -> str:
    """Format mean and sample deviation over the seeds of every task, recipe and sparsity as Markdown."""
    groups: dict[tuple[float, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        name = "-".join(filter(None, [row["recipe"], row["variant"]]))
        groups[row["sparsity"], list(TASKS).index(row["task"]), name].append(row)
    lines = [
        "| zeros | task | recipe | seeds | teacher | student | kept | gap teacher | gap student | CPU minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (sparsity, task, name), group in sorted(groups.items()):
        cells = [f"{100 * sparsity:g} %", list(TASKS)[task], f"`{name}`", str(len(group))]
        for model in ("teacher", "student"):
            cells.append(mean_and_deviation([100 * row[model]["report"]["score"] for row in group]))
        cells.append(f"{100 * statistics.fmean(row['share_of_teacher'] for row in group):.1f} %")
        for model in ("teacher", "student"):
            cells.append(f"{100 * statistics.fmean(row['gap_train_report'][model] for row in group):.1f}")
        cells.append(f"{statistics.fmean(sum(row['cpu_seconds'].values()) for row in group) / 60:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format values as `81.0 ± 0.8`; a single value has no deviation."""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="ROWS", help="only print the table of a file of rows")
    parser.add_argument("--spdtool", type=Path, help="the program to measure")
    parser.add_argument("--data", type=Path, help="folder of the official files, a folder for each task")
    parser.add_argument("--model", type=Path, help="folder of the encoder")
    parser.add_argument("--work", type=Path, help="folder for splits, teachers and trials")
    parser.add_argument("--out", type=Path, help="file of rows to append to (default: WORK/glue.jsonl)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after that long")
    parser.add_argument(
        "--tasks", help=f"of {','.join(TASKS)}; with this or the next three, instead of the usual order"
    )
    parser.add_argument("--recipes", help="recipe names or TOML files: default,spd")
    parser.add_argument("--sparsities", help="shares of zeros: 0.8,0.9")
    parser.add_argument("--variant", default="", help="name of what --set changes, for its rows and folders")
    parser.add_argument("--seeds", default="0,1,2", help="with the options above (default: 0,1,2)")
    parser.add_argument("--set", action="append", default=[], help="any recipe field, for the students")
    parser.add_argument("--max-rows", type=int, help="training rows, of teachers and students (default: all)")
    parser.add_argument("--teacher-rates", default=RATES, help=f"learning rates to try (default: {RATES})")
    parser.add_argument("--teacher-epochs", default=EPOCHS, help=f"epochs to try (default: {EPOCHS})")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep those of every stage, to export from")
    options = parser.parse_args(arguments)
    if options.table is None and None in (options.spdtool, options.data, options.model, options.work):
        parser.error("give --spdtool, --data, --model and --work, or --table ROWS")
    if options.set and not options.variant:
        parser.error("--set makes other rows than the recipe alone: name them with --variant")
    return options


def run_trials(runner: Runner, trials: Sequence[Trial], out: Path) -> int:
    """Run the trials that have no row in `out` yet; return the exit code."""
    failures = 0
    for number, trial in enumerate(trials, start=1):
        if trial.key in finished_keys(out):
            continue
        print(f"{time.strftime('%F %T')} [{number}/{len(trials)}] {trial.folder}", flush=True)
        try:
            append(out, run_trial(runner, trial))
        except TimeUp:
            print("time is up: call again to go on", flush=True)
            return 0
        except CommandFailed as error:  # the other trials may still do
            failures += 1
            print(error, flush=True)
    print(f"all is done: {out}" if not failures else f"{failures} trials failed; call again to try them once more")
    return int(failures > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or run the missing trials; return the exit code."""
    options = parse_options(arguments)
    if options.table is not None:
        print(table(read_rows_of(options.table)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running command is ended too
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it however this process ends
        except BlockingIOError:
            print(f"another call works in {work}; wait for it, or give another --work", file=sys.stderr)
            return 1
        split_dev(options.data, work)
        deadline = time.monotonic() + 60 * options.minutes
        rates = tuple(float(word) for word in words(options.teacher_rates))
        epochs = tuple(int(word) for word in words(options.teacher_epochs))
        settings = EVERYWHERE if options.max_rows is None else (*EVERYWHERE, f"max_rows={options.max_rows}")
        spdtool, model = options.spdtool.absolute(), options.model.absolute()
        runner = Runner(spdtool, model, work, deadline, rates, epochs, settings, options.keep_checkpoints)
        return run_trials(runner, plan(options), options.out or work / "glue.jsonl")


if __name__ == "__main__":
    sys.exit(main())
