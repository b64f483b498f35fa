"""A look into a model: which one, and which of its modules."""

from typing import Annotated

from pydantic import Field

from pilon_compress.config.conversion import Scope
from pilon_compress.config.fields import MODEL
from pilon_compress.config.option import Argument
from pilon_compress.config.reading import Text


class InspectConfig(Scope):
    """Everything that decides what is shown."""

    model: Annotated[Text, Field(description=f"Dense or PILON model: {MODEL}"), Argument()]
