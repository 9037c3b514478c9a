"""Contents of manifest.json and golden.json."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from spdtool.run.records.base import FileDigest, LibraryRecord, Record, Scores


class Variant(Record):
    """One form of the model in a bundle, with what it was measured to cost: see `ExportedModel`."""

    target: str
    file: str
    files: list[str]
    hardware: str = "any"
    library: LibraryRecord | None = None
    bytes: int = 0
    sparsity: float = 0.0
    providers: list[str] = Field(default_factory=list)
    dev: Scores | None = None
    checkpoint_dev: Scores | None = None
    flipped: int | None = None
    mean_change: float | None = None
    rank_correlation: float | None = None
    rows: int | None = None
    largest_difference: float | None = None
    largest_change: float | None = None
    values: str | None = None
    embeddings: str | None = None
    kept_fp32: list[str] | None = None
    tolerance: float = 0.0


class FolderManifest(Record):
    """Contents of manifest.json in a folder of one model (format 1).

    Attributes:
        target: name of the target; empty: the folder does not say.
        model: ONNX file, relative to the folder.
        library: of custom operators; None where the model needs none.
        text: names of the one or two text columns; None: the model was exported without a task.
        kind: registered name of its kind of task; None: config.json tells. settings: of its decision.
        values, embeddings: storage of the weights.
        files: by path, all but the model card and the manifest itself.
    """

    format: Literal[1] = 1
    target: str = ""
    model: str = "onnx/model.onnx"
    library: LibraryRecord | None = None
    text: list[str] | None = None
    kind: str | None = None
    settings: dict[str, JsonValue] | None = None
    values: str | None = None
    embeddings: str | None = None
    files: dict[str, FileDigest] = Field(default_factory=dict)

    @field_validator("text")
    @classmethod
    def _name_one_or_two_columns(cls, text: list[str] | None) -> list[str] | None:
        if text is not None and len(text) not in (1, 2):
            raise ValueError("a model has one or two text columns")
        return text


class BundleManifest(Record):
    """Contents of a bundle's manifest.json (format 2).

    Attributes:
        text: names of the one or two text columns; None: an older bundle does not say.
        kind, settings: see `FolderManifest`.
        model: file of the portable variant. prefer: hardware to names of variants, the best first.
        files: by path, all of them.
    """

    format: Literal[2] = 2
    spdtool: str = ""
    task: str = ""
    text: list[str] | None = None
    kind: str | None = None
    settings: dict[str, JsonValue] | None = None
    sparsity: float = 0.0
    smoke: bool = False
    model: str
    prefer: dict[str, list[str]]
    variants: dict[str, Variant]
    files: dict[str, FileDigest]

    @field_validator("text")
    @classmethod
    def _name_one_or_two_columns(cls, text: list[str] | None) -> list[str] | None:
        if text is None or len(text) not in (1, 2):
            raise ValueError("a model has one or two text columns")
        return text

    @model_validator(mode="after")
    def _refer_to_listed_files(self) -> Self:
        """Refuse a manifest whose variants and preferences name what is not there: it may come from a stranger."""
        for variant in self.variants.values():
            if not {variant.file, *variant.files} <= self.files.keys():
                raise ValueError(f"the variant {variant.target!r} has a file that is not listed")
        if self.model not in [variant.file for variant in self.variants.values()]:
            raise ValueError("the portable model is of no variant")
        for names in self.prefer.values():
            if not names or not set(names) <= self.variants.keys():
                raise ValueError("a preference names no variant, or an unknown one")
        return self


class Padding(Record):
    """How a row is padded: on which side, and with which id in each input."""

    side: Literal["left", "right"]
    input_ids: int | None
    token_type_ids: int


class GoldenRow(Record):
    """One dev sentence with its token ids, and the checkpoint's logits in float32, of the row or of each token."""

    text: str
    pair: str | None
    input_ids: list[int]
    token_type_ids: list[int] | None = None
    logits: list[float] | list[list[float]]


class GoldenExamples(Record):
    """Contents of golden.json: the checkpoint's logits, by which a bundle is tested anywhere.

    Attributes:
        max_length: in tokens; longer texts are truncated.
        truncation: which text of a pair is cut, in the words of the library tokenizers.
        labels: by class index.
        rows: computed one by one, without padding.
    """

    format: Literal[1]
    max_length: int
    padding: Padding
    truncation: Literal["longest_first", "only_first", "only_second"] = "longest_first"
    labels: list[str]
    rows: list[GoldenRow]
