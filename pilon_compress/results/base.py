"""The base of all results."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pilon_compress.errors import BadInput

R = TypeVar("R", bound="Result")


class Result(BaseModel):
    """Figures that a call returns. They never change; fields that were not measured are at their default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def dump(self) -> dict[str, Any]:
        """The figures as plain data, with the keys of the JSON files; those that were not measured are left out."""
        return self.model_dump(exclude_unset=True)

    @classmethod
    def of(cls: type[R], data: Mapping[str, Any], origin: str) -> R:
        """The result that was dumped as `data`. Raises BadInput, naming `origin`, where it is no such result."""
        try:
            return cls.model_validate(data)
        except ValidationError as invalid:
            first = invalid.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise BadInput(f"{origin} is damaged, or of another version: {place}: {first['msg']}") from None
