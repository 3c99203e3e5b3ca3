"""What the recipe's sections are made of: strict groups of fields, and the types of their values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from rankwise.files import expand_user, is_text

# A method is a name from its table, or that name and its options: {name: lora-ga, gamma: 16}.
Method = str | dict[str, Any]

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]


UserPath = Annotated[str, AfterValidator(expand_user)]  # a path, or a name that stands for something built in


class Section(BaseModel):
    """A group of fields. Strict: a wrong type is an error, never a guess."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if not is_text(value):
            raise ValueError("text in UTF-8 without zero bytes")
        return value
