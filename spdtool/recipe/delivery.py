"""The sections of a recipe that decide what is delivered: the exports, the bench, and the goal of the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from spdtool.recipe.section import Section, TargetNames

Storage = Literal["smallest", "fp32", "fp16", "int8"]
TableStorage = Literal["smallest", "fp32", "fp16", "int8", "int6"]
# Allowed change of the dev metric, by the coarsest storage of the exported file.
BUDGETS: Mapping[str, float] = {"fp32": 0.001, "fp16": 0.002, "int8": 0.005, "int6": 0.005}


class Export(Section):
    """Teacher and student as files for a runtime, each checked against its checkpoint."""

    targets: tuple[str, ...] = ("onnx",)
    """export targets; `spdtool plugins` lists them"""
    optional: TargetNames = "installed"
    """further targets; a refused one is left out; "installed": every installed one that is exported by default"""
    skip: tuple[str, ...] = ()
    """targets of `optional` to leave out"""
    values: Storage = "smallest"
    """how a target that packs pruned matrices stores them; smallest: int8 or fp16, by the dev set within the budget"""
    embeddings: TableStorage = "smallest"
    """how a target that packs pruned matrices stores the embeddings; as `values`, or int6 where the target has it"""
    # 18 is the first that torch's exporter writes without converting.
    opset: int = Field(18, ge=18)
    """ONNX operator set; from 23 on, attention is one operator of it, which not every runtime has"""
    sparse_initializers: bool = False
    """store matrices of over two thirds zeros as sparse constants: smaller, no faster; OpenVINO refuses them"""
    reduce_range: bool | None = None
    """int8 weights with 7 bits, for CPUs whose products saturate; none: where this CPU has no VNNI"""
    calibration: int = Field(128, ge=1)
    """training rows on which onnx-int8-static sees the ranges of activations"""
    tries: int = Field(24, ge=4)
    """most trial exports that look for the layers to keep in float32 where int8 breaks the budget"""
    # float32 sums in another order differ by less, a wrong graph by far more.
    tolerance: float = Field(1e-4, gt=0)
    """largest difference of a logit between the checkpoint and the exported file"""
    rounded_tolerance: float = Field(0.25, gt=0)
    """the same for fp16 or int8 arithmetic: root mean square, relative to the logits; below it the budget decides"""
    budget: float | None = Field(None, ge=0)
    """largest change of the dev metric, beyond one prediction; none: 0.001, fp16 0.002, int8 0.005"""
    sentences: int = Field(64, ge=1)
    """real dev sentences on which the logits are compared"""
    # Percentile intervals of fewer wobble in their second digit.
    resamples: int = Field(1000, ge=100)
    """resamples of the test rows from which the intervals of the test scores come, drawn by `seed`"""
    confidence: float = Field(0.95, gt=0, lt=1)
    """confidence of these intervals"""
    calibrate: bool = True
    """fit a temperature on the dev rows, by which logits are divided before they become probabilities"""
    bins: int = Field(15, ge=2)
    """intervals of the probability in which it is compared with the share of right answers"""
    differing_rows: int = Field(20, ge=0)
    """most dev rows to show on which student and teacher differ"""

    def allowed_change(self, *, rounds: bool, storage: tuple[str, ...] = ()) -> float:
        """Return the largest change of the dev metric that passes.

        Args:
            rounds: whether the target stores the weights rounded, rather than exactly.
            storage: how it stores them.
        """
        if self.budget is not None:
            return self.budget
        if not rounds:
            return BUDGETS["fp32"]
        return max(BUDGETS[kind] for kind in storage)


class Bench(Section):
    """Student against dense teacher, side by side in one run."""

    batches: tuple[int, ...] = (1, 8)
    """batch sizes"""
    lengths: tuple[int, ...] = (32, 128)
    """sequence lengths in tokens"""
    padded: tuple[tuple[int, int], ...] = ((8, 128),)
    """batch sizes and lengths that are also timed with padding: real lengths vary as they do in the dev set"""
    threads: tuple[int, ...] = (1, 0)
    """numbers of threads, each with rounds of its own; 0: all cores"""
    rounds: int = Field(12, ge=1)
    """most interleaved rounds; each engine is timed once a round"""
    warmup: int = Field(1, ge=0)
    """rounds that are not counted"""
    seconds: float = Field(90.0, ge=0)
    """time for all rounds; fewer are made if they would take longer, but at least six per number of threads"""
    unfused: bool = True
    """also time the dense teacher without onnxruntime's fused operators; the faster of the two is the 1x"""
    int8: bool = True
    """also time the dense teacher in onnxruntime's dynamic int8, unless onnx-int8 was exported"""
    openvino: bool = True
    """also time the dense teacher in OpenVINO's static int8, where openvino and nncf are installed"""
    variants: bool = True
    """also time the further forms that were exported of both (fused, fp16, int8), side by side"""
    torch: bool = True
    """also time the dense teacher in PyTorch, eager"""
    compiled: bool = True
    """and in torch.compile, where there is a compiler; only with `bench.torch`"""
    ledger: bool = True
    """measure the machine's peak and bandwidth, and each pruned matrix alone against them"""


class Goal(Section):
    """What the student must reach; sparsity or shape are then derived, and the bench measures the promise."""

    speedup: float | None = Field(None, gt=1)
    """how many times faster than the dense teacher the student must be, in `goal.runtime`; none: no such goal"""
    max_mb: float | None = Field(None, gt=0)
    """largest size of the student's file in MB (1 MB: 1,000,000 bytes); none: no such goal"""
    max_drop: float | None = Field(None, ge=0, le=100)
    """largest loss of dev score in points (1.0: from 0.90 to 0.89); none: no such goal"""
    family: tuple[float, ...] = ()
    """smaller speed-ups, such as 2,3, of students that are saved and scored on the way to `goal.speedup`"""
    kind: Literal["auto", "sparse", "blocks", "small"] = "auto"
    """student that is made: `small` has fewer heads and neurons, `sparse` has zeros and needs a plugin to be faster"""
    runtime: Literal["onnxruntime", "openvino", "cuda", "web"] = "onnxruntime"
    """runtime in which the speed-up is asked for; `web` needs Node.js with onnxruntime-web, `cuda` a `goal.profile`"""
    profile: str | None = None
    """file with the times of a layer at every shape, from `spdtool bench --profile`; none: measured in the run"""
    batch: int = Field(1, ge=1)
    """batch size at which the speed-up is asked for"""
    length: int | None = Field(None, ge=4)
    """tokens of a row at which the speed-up is asked for; none: `max_length`, or the model's positions"""
    threads: int = Field(1, ge=0)
    """threads with which the speed-up is asked for; 0: all cores"""
    calibration: int = Field(512, ge=1)
    """training rows from whose hidden states the loss of every removal is computed, before a shape is chosen"""
    table: str | None = None
    """sha256 of the table of times or bytes by which `prune.shape` was chosen; a run fills in both"""
    # Two processes of one machine differ by as much.
    tolerance: float = Field(0.05, ge=0, lt=1)
    """fraction by which the measured speed-up may fall short beyond its interval before the promise is broken"""

    @property
    def is_set(self) -> bool:
        """Whether anything is asked for."""
        return self.speedup is not None or self.max_mb is not None or self.max_drop is not None

    @model_validator(mode="after")
    def _check_wishes(self) -> Goal:
        """Refuse wishes that contradict each other."""
        if self.profile is not None and self.speedup is None and self.max_drop is None:
            raise ValueError("goal.profile has times, and no speed-up is asked for: add goal.speedup, or leave it out")
        if self.runtime == "cuda" and self.speedup is not None and self.profile is None:
            raise ValueError("goal.runtime = 'cuda' needs goal.profile, a table of times that was measured there")
        if self.family and (self.speedup is None or not all(1 < speedup < self.speedup for speedup in self.family)):
            raise ValueError("goal.family has speed-ups above 1 and below goal.speedup, which has to be set")
        if self.has_full_width:
            if self.family:
                raise ValueError(
                    f"goal.family is of students without heads and neurons, not of kind {self.kind!r}: "
                    "prune.save_at names sparsities"
                )
            if self.runtime != "onnxruntime":
                raise ValueError(f"goal.kind = {self.kind!r} is not faster in {self.runtime}, which skips no zeros")
            if self.profile is not None:
                raise ValueError(
                    "goal.profile has the times of layers with fewer heads and neurons: a sparse student has all"
                )
        return self

    @property
    def has_full_width(self) -> bool:
        """Whether the student keeps every head and neuron, and is fast by its zeros."""
        return self.kind in ("sparse", "blocks")

    @property
    def searches(self) -> bool:
        """Whether several students are tried: how small the student may be depends on its score."""
        return self.max_drop is not None and self.speedup is None and self.table is None

    @property
    def label(self) -> str:
        """What is asked for, for names of folders: such as `3x` or `20MB`."""
        wishes = []
        if self.speedup is not None:
            wishes.append(f"{self.speedup:g}x")
        if self.max_mb is not None:
            wishes.append(f"{self.max_mb:g}MB")
        if self.max_drop is not None:
            wishes.append(f"drop{self.max_drop:g}")
        return "-".join(wishes)

    def describe(self) -> str:
        """Say what is asked for, such as `3x in onnxruntime, at most 20 MB`."""
        wishes = []
        if self.speedup is not None:
            wishes.append(f"{self.speedup:g}x in {self.runtime}")
        if self.max_mb is not None:
            wishes.append(f"at most {self.max_mb:g} MB")
        if self.max_drop is not None:
            wishes.append(f"at most {self.max_drop:g} points of dev score lost")
        return ", ".join(wishes)
