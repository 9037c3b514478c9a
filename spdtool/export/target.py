"""The base class of export targets, and the targets that a recipe asks for.

Importing this module is cheap: no torch, no onnx. A plugin can therefore define its target in the
module that its entry point names.
"""

# ruff: noqa: ARG002  (a target need not use every argument of a method)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from spdtool import plugins
from spdtool.errors import PluginError, RecipeError, SpdError, UnknownName
from spdtool.run.records import Role

if TYPE_CHECKING:
    from spdtool.data.tokens import Batch, Encoded
    from spdtool.export.graph.weights import StoredWeight
    from spdtool.models.predict import Forward
    from spdtool.recipe.delivery import Export
    from spdtool.recipe.fields import Recipe

MODEL_FILE = "onnx/model.onnx"
ROLES: tuple[Role, ...] = ("teacher", "student")
RIGHT_PADDED = "right_padded"  # metadata of an ONNX file: whether it takes row lengths, and so right padding only
SMALLEST = "smallest"  # value of `export.values` and `export.embeddings`
INSTALLED = "installed"  # value of `export.optional`: every installed target that suits the recipe


class StorageFormats(NamedTuple):
    """How a target stores pruned matrices and embeddings: as `fp32`, `fp16` or `int8`, and embeddings as `int6` too."""

    matrices: str
    embeddings: str


@dataclass(frozen=True)
class Rounding:
    """What the export stage decides for a target that rounds.

    Attributes:
        float32_modules: modules to leave in float32; some of the target's `float32_candidates`.
        calibration_rows: encoded training rows, where the target `calibrates`.
    """

    float32_modules: tuple[str, ...] = ()
    calibration_rows: Encoded | None = None


class Target:
    """Base class of export targets: what turns a checkpoint into files for a runtime.

    A target writes a folder that Hugging Face clients can open. Only `export` has to be written;
    the defaults of everything else fit a folder with one ONNX file of standard operators and
    unrounded weights:

        folder/config.json  tokenizer.json  tokenizer_config.json  onnx/model.onnx

    Register a subclass. The first line of its docstring is what `spdtool plugins` shows:

        from spdtool import Target
        from spdtool.export.graph.trace import save_folder, trace_checkpoint
        from spdtool.plugins import targets

        @targets.register("transposed")
        class Transposed(Target):
            "ONNX with every matrix transposed, for a runtime that wants it so."

            def export(self, checkpoint, folder, recipe):
                proto = trace_checkpoint(checkpoint, recipe.export.opset)
                ...  # change the graph; `spdtool.export.graph` has tools for it
                return save_folder(proto, checkpoint, folder)

    The export stage puts every file through the same gates. The weights that `stored_weights` reads
    must be those of the checkpoint, `session` must give its logits on real and synthetic batches,
    and `spdtool.load` its answers and its score on the dev set.

    A target that rounds weights sets `rounds_weights`. Its logits are compared with the checkpoint
    after that was filled with `stored_weights`, which proves the arithmetic; its dev score with the
    checkpoint as it is, which says what the rounding costs. Where the arithmetic is rounded too
    (fp16, int8), the target also sets `rounds_arithmetic`: then `float32_form` is compared tightly,
    and the file itself within `export.rounded_tolerance`.

    Any method may raise DeviceError or PluginError where something that the target needs is missing
    on this machine. An optional target is then left out with a warning.

    Attributes:
        name: that under which it is registered; `register` sets it, and manifests name it.
        roles: which of teacher and student the target exports. The first target of a recipe must
            export both.
        providers: onnxruntime providers that run its files, of `cpu` and `cuda`.
        exported_by_default: whether `export.optional = "installed"` includes the target.
        operator_domains: ONNX operator domains that its files may use ("" is ONNX itself); None:
            any domain.
        traces_model: whether the file is made of the graph that torch.onnx traces. Then an
            architecture that nobody has tried is traced before hours are spent on training.
        rounds_weights: whether the files hold other weights than the checkpoint.
        rounds_arithmetic: whether activations are rounded as well; then small weights may become zero.
        clipped_share: largest share of a parameter's weights that the target clips on purpose. A
            weight may be further away than half a step only where it is clipped.
        packs: whether it stores weights as `export.values` and `export.embeddings` say, in
            whichever form is the smallest that keeps the dev score.
        smallest: the forms to try for that, the smallest first.
        calibrates: whether `export_rounded` needs training rows of the task.
        bundle_stem: name of its file in a bundle, without `.onnx`; empty: made of the target's
            name.
        preferred_on: where a bundle prefers this target to the portable file, of `cpu`, `cuda` and
            `web`.
        preference: where several targets are preferred, the highest comes first.
        opened_by: what opens its files. `onnxruntime`: they are ONNX, so `spdtool.load` opens the
            folder, the bundle holds them, and the bench times them in onnxruntime. `session`: this
            target's own method alone. Then the dev set is read by token ids, the bundle goes
            without them, and the bench calls `session` in the process that it times.
        changed_fields: fields of config.json that may differ from the checkpoint's.
        times_dense: whether the bench also exports the dense teacher in a form of the student
            alone, so that what the form gives to any weights is not credited to zeros. Off where
            the form cannot hold dense weights.
        timing_operator: domain and name of an operator (repeats int64 [1], packed matrix uint8) ->
            float32 seconds of one product with a packed matrix; None: the ledger cannot time its
            products.
    """

    name: str = ""
    roles: tuple[Role, ...] = ROLES
    providers: tuple[str, ...] = ("cpu", "cuda")
    exported_by_default: bool = False
    operator_domains: tuple[str, ...] | None = None
    traces_model: bool = False
    rounds_weights: bool = False
    rounds_arithmetic: bool = False
    clipped_share: float = 0.0
    packs: bool = False
    smallest: tuple[StorageFormats, ...] = (
        StorageFormats("int8", "int8"),
        StorageFormats("fp16", "int8"),
        StorageFormats("fp16", "fp16"),
    )
    calibrates: bool = False
    bundle_stem: str = ""
    preferred_on: tuple[str, ...] = ()
    preference: int = 0
    opened_by: Literal["onnxruntime", "session"] = "onnxruntime"
    changed_fields: tuple[str, ...] = ()
    times_dense: bool = True
    timing_operator: tuple[str, str] | None = None

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write everything that a deployment needs to `folder`.

        Returns:
            The files that hold the model; their bytes are reported.

        Raises:
            ModelError: the checkpoint cannot be read or converted.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `export`")

    def suits(self, recipe: Recipe) -> bool:
        """Tell whether `export.optional = "installed"` includes the target for this recipe."""
        return self.exported_by_default

    def export_rounded(self, checkpoint: Path, folder: Path, recipe: Recipe, rounding: Rounding) -> list[Path]:
        """Export with the choices that only a rounding target needs; others ignore them."""
        return self.export(checkpoint, folder, recipe)

    def session(self, folder: Path, provider: str = "cpu", threads: int = 0) -> Forward:
        """Open the exported files as a function from a batch to float32 logits, see `models.predict.Forward`.

        Args:
            threads: threads of one operator; 0: one for each core.

        Raises:
            DeviceError: onnxruntime, the provider or a library is missing.
            ModelError: the file cannot be opened.
        """
        from spdtool.export import onnx_session
        from spdtool.models.predict import onnx_forward
        from spdtool.tasks.head import read_head

        session = onnx_session.open_session(folder / MODEL_FILE, provider, threads, self.libraries(folder))
        return onnx_forward(session, read_head(folder))

    def libraries(self, folder: Path) -> list[Path]:
        """List the libraries of custom operators that a session of `folder` must load."""
        return []

    def stored_weights(self, folder: Path) -> Iterator[StoredWeight]:
        """Yield every parameter of the checkpoint with the values that the files really hold.

        A parameter that is stored twice comes twice. One that is missing has to be zero, or unused.
        The gate on weights compares each value with the checkpoint's: see `gates.weights`.
        """
        import onnx

        from spdtool.export.graph.weights import read_weights

        yield from read_weights(onnx.load(folder / MODEL_FILE))

    def storage_formats(self, recipe: Recipe) -> StorageFormats:
        """Formats of the stored weights; they decide which change of the dev score passes.

        `smallest` stands for fp16 here: where there is a dev set to judge by, the export stage of a
        target that `packs` has put a format in its place.
        """
        if not self.rounds_weights:
            return StorageFormats("fp32", "fp32")
        matrices, embeddings = recipe.export.values, recipe.export.embeddings
        return StorageFormats(
            "fp16" if matrices == SMALLEST else matrices, "fp16" if embeddings == SMALLEST else embeddings
        )

    def float32_form(self, folder: Path) -> Forward:
        """Open the files with the stored weights and float32 arithmetic; needed where the target rounds arithmetic."""
        raise NotImplementedError(f"{type(self).__name__} rounds its arithmetic and has no `float32_form`")

    def float32_candidates(self, checkpoint: Path, recipe: Recipe) -> list[str]:
        """List the modules that may stay in float32 where rounding all of them breaks the budget; empty: none may."""
        return []

    def verify(self, folder: Path, checkpoint: Path, batches: list[tuple[str, Batch]], provider: str) -> None:
        """Look for faults that only this target's files can have.

        Args:
            batches: the batches on which logits are compared, each with a description.

        Raises:
            GateError: the files are faulty.
        """

    def takes_left_padding(self, folder: Path) -> bool:
        """Whether the files compute rows that are padded on the left, or with gaps in the mask; else on the right only.

        Where they do not, a tokenizer that pads on the left is refused, and the gates compare the other batches.
        """
        return True

    def library_record(self, folder: Path) -> dict[str, str] | None:
        """Describe the library of custom operators that the files need, for manifest.json; None: they need none.

        The keys are `file` (a copy in the folder), `distribution`, `version` and `platform`.
        """
        return None

    def properties(self, folder: Path) -> dict[str, object]:
        """Collect further JSON values about the files, for `stage.json`."""
        return {}


@dataclass(frozen=True)
class ChosenTarget:
    """A target that a recipe asks for.

    Attributes:
        optional: whether the export goes on without it where it cannot be used.
        prefix: its folder inside the export stage; empty for the first target, its name for every
            other.
    """

    name: str
    target: Target
    optional: bool
    prefix: str


def check_target(name: str, value: object) -> Target:
    """Turn what was registered into a target.

    Raises:
        PluginError: it is no subclass of `Target`.
    """
    if isinstance(value, type) and issubclass(value, Target):
        target = value()
        target.name = name
        return target
    raise PluginError(
        f"the export target {name!r} is no subclass of spdtool.Target",
        f"class {name.title().replace('-', '')}(spdtool.Target): ... with a method export(checkpoint, folder, recipe)",
    )


def get_target(name: str) -> Target:
    """Look up a registered target.

    Raises:
        UnknownName: nothing provides it.
    """
    target: Target = plugins.targets.get(name)
    return target


def required_targets(section: Export) -> list[ChosenTarget]:
    """Look up `export.targets`, in order.

    Raises:
        UnknownName: nothing provides one of them.
        RecipeError: there is none, or the first one does not export the teacher, with which the
            bench compares.
    """
    if not section.targets:
        raise RecipeError("export.targets is empty", 'for example export.targets=["onnx"]')
    names = tuple(dict.fromkeys(section.targets))
    chosen = []
    for name in names:
        prefix = "" if name == names[0] else name
        chosen.append(ChosenTarget(name, get_target(name), False, prefix))
    # The first target's files of both roles are what every other figure is compared with.
    missing_roles = set(ROLES) - set(chosen[0].target.roles)
    if missing_roles:
        listed = ", ".join(f'"{name}"' for name in dict.fromkeys(("onnx", *names)))
        raise RecipeError(
            f"the target {names[0]!r} does not export the {' and '.join(sorted(missing_roles))}: "
            "it cannot be the first one",
            f"export.targets=[{listed}]",
        )
    return chosen


def optional_targets(recipe: Recipe) -> tuple[list[ChosenTarget], dict[str, SpdError]]:
    """Look up `export.optional`.

    Returns:
        The installed ones, without those of `export.targets` and `export.skip`; and by name, why
        another one that the recipe names cannot be used.
    """
    section = recipe.export
    chosen: list[ChosenTarget] = []
    errors: dict[str, SpdError] = {}
    for name in dict.fromkeys(optional_names(recipe)):
        if name in section.targets or name in section.skip:  # a required one is exported already
            continue
        try:
            chosen.append(ChosenTarget(name, get_target(name), True, name))
        except UnknownName as error:
            errors[name] = error
    return chosen, errors


def optional_names(recipe: Recipe) -> list[str]:
    """List the names that `export.optional` stands for."""
    if recipe.export.optional != INSTALLED:
        return list(recipe.export.optional)
    entries = [entry for entry in plugins.targets.entries() if entry.value.suits(recipe)]
    # A target from a plugin was installed on purpose: it comes before the built-in ones in every
    # table.
    entries.sort(key=lambda entry: entry.source.startswith(plugins.BUILTIN))
    return [entry.name for entry in entries]
