"""Fields that several configs have, described once."""

from typing import Annotated, Literal

from pydantic import Field

from pilon_compress.config.option import RUNNING, Option
from pilon_compress.config.reading import Text

DEVICE = "Device to compute on: cpu, cuda, cuda:1 and so on; auto takes cuda where there is one, else cpu."
MODEL = "hub id, local folder, or package:NAME of an installed package that ships a checkpoint."
READERS = "pilon_compress.data.readers.registry"
SOURCES = f"Sources are {{{READERS}:SOURCES}}, files {{{READERS}:FORMATS}}."

Device = Annotated[Text, Field(description=DEVICE), Option(panel=RUNNING, metavar="DEVICE")]
DType = Literal["auto", "float32", "bfloat16", "float16"]
