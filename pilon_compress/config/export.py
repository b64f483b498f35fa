"""An export: of which model, in which form."""

from typing import Annotated, Literal

from pilon_compress.config.fields import SOURCES, DType
from pilon_compress.config.option import Argument, Option
from pilon_compress.config.ratio import Part
from pilon_compress.config.reading import Section, Text


class ExportOptions(Section):
    """Options of exporters; None where the exporter decides."""

    dtype: Annotated[DType | None, Option()] = None
    """Number type of floating-point weights. Default: auto, that of the model."""
    encoding: Annotated[Literal["base3", "2bit"] | None, Option("--format")] = None
    """Encoding of ternary weights in a packed export: base3 takes 1.6 bits each, 2bit takes 2. Default: base3."""
    rest: Annotated[Literal["none", "int8", "int4"] | None, Option()] = None
    """Number format of attention, head and token embeddings in a packed export: int8, whose layers round activations to
    8 bits too; int4, a scale for 64 weights; or none to leave them as they are. Default: none."""
    type: Annotated[Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"] | None, Option()] = None
    """Number type of the matrices of a GGUF file; q4_k_m takes llama.cpp's own quantiser, the package xllamacpp.
    Default: that which holds the model's integers, or f16."""
    keep: Annotated[Part | None, Option(metavar="SHARE")] = None
    """Cut a model that was converted with --elastic: largest share of its stored feed-forward numbers, above 0 and at
    most 1. Default: all."""
    calibration: Annotated[Text | None, Option(metavar="SOURCE", tail=SOURCES)] = None
    """Text on which the layers of a cut, `keep`, are refitted one behind the other; it takes as long as a part of a
    conversion. Default: none, they are refitted by what the file knows of its neurons."""


class ExportConfig(ExportOptions):
    """Everything that decides an export."""

    model: Annotated[Text, Argument()]
    """PILON model to export: a local folder, or hub id."""
    to: Annotated[Text | None, Option(metavar="FORM")] = None
    """Form to write, such as dense, self-contained or packed; --list shows all. Default: pilon with --keep, else
    it must be named."""
