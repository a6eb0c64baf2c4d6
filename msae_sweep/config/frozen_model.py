"""Base class of the pydantic models into which a search-space file is validated."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

SHOWN_CHARACTERS = 100
"""Number of characters after which error messages cut off a value that they repeat."""


class FrozenModel(BaseModel):
    """Immutable pydantic model that rejects unknown keys, and rejects NaN, infinity and booleans as numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Reject booleans as numbers; pydantic would read 0 or 1. YAML reads yes, no, on and off as true and false."""
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, bool) for number in numbers):
            assert info.field_name is not None
            kinds = plain_types(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("must be a number, not true or false (YAML reads yes, no, on and off as these)")
        return value


def plain_types(annotation: Any) -> set[Any]:
    """Return the types that an annotation is made of, e.g. {int, NoneType} for `Annotated[int, …] | None`."""
    parts = get_args(annotation)
    return set().union(*map(plain_types, parts)) if parts else {annotation} if isinstance(annotation, type) else set()


def short_repr(value: object) -> str:
    """Return the `repr` of a value for an error message, cut off after `SHOWN_CHARACTERS`."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
