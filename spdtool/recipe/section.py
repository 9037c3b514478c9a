"""The base class of every section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

TargetNames = tuple[str, ...] | Literal["installed"]
LIST_TYPES = (tuple[str, ...], TargetNames, tuple[int, ...], tuple[float, ...])


class Section(BaseModel):
    """A frozen group of fields that refuses unknown names."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # a learning rate of inf would only fail hours later
    )

    # A stage that starts from another default names it here, so that each field is described once.
    stage_defaults: ClassVar[Mapping[str, float]] = {}

    @model_validator(mode="before")
    @classmethod
    def _fill_stage_defaults(cls, values: object) -> object:
        # Not a dict: a section that is complete, or a value that pydantic refuses next.
        return {**cls.stage_defaults, **values} if isinstance(values, dict) else values

    @field_validator("*", mode="before")
    @classmethod
    def _read_list(cls, value: object, info: ValidationInfo) -> object:
        """Let a list field also take a single value, or words separated by commas."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if annotation not in LIST_TYPES or (annotation == TargetNames and value == "installed"):
            return value
        if isinstance(value, str):
            words = (word.strip() for word in value.split(","))
            return list(filter(None, words))
        if isinstance(value, int | float):
            return [value]
        return value
