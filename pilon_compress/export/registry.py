"""How an exporter registers: a name, one sentence, its options, a reason to refuse, and the function that writes.

    @exporter("dense", about="...", load="AutoModel.from_pretrained({folder!r})", options=("dtype",), refuse=refuse)
    def write(model, job):
        ...
        return {}

The function gets a PILON model, loaded, and a `Job`; it writes `job.output` by `io.folders.fresh_folder` and returns
figures for the caller, as plain JSON types.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pilon_compress.errors import BadInput
from pilon_compress.models.checkpoint import DTYPES
from pilon_compress.plugins import Registry

CHOICES: Mapping[str, tuple[str, ...]] = {"dtype": DTYPES, "encoding": ("base3", "2bit"), "rest": ("none", "int8")}
FLAGS = {"dtype": "--dtype", "encoding": "--format", "rest": "--rest"}  # on the command line


@dataclass(frozen=True)
class Options:
    """The options of an export, None where they are left to the exporter; CHOICES has the values of each.

    dtype: of floating-point tensors   encoding: of ternary weights   rest: of attention, head and token embeddings
    """

    dtype: str | None = None
    encoding: str | None = None
    rest: str | None = None


DEFAULTS = Options()


@dataclass(frozen=True)
class Job:
    """One export: the folder `source`, as the user names it, and where it goes."""

    source: str
    output: Path
    options: Options
    overwrite: bool


@dataclass(frozen=True)
class Exporter:
    """A form to export to.

    about: one sentence   load: Python that loads the result, with the field {folder!r}
    options: fields of `Options` that it reads
    dtype_when_saved: load the model as it is stored, and apply `dtype` to what is saved; False: load in `dtype`
    refuse: why it cannot take a model, as the end of a sentence that begins with the model's name; None if it can
    """

    name: str
    about: str
    load: str
    write: Callable[[PreTrainedModel, Job], dict[str, Any]]
    refuse: Callable[[PreTrainedModel, Options], str | None]
    options: tuple[str, ...] = ("dtype",)
    dtype_when_saved: bool = False

    def check(self, options: Options) -> None:
        """Raise BadInput for an option that this exporter does not read, and for a value that there is not."""
        for one in fields(options):
            value, flag = getattr(options, one.name), FLAGS[one.name]
            if value is None:
                continue
            if one.name not in self.options:
                own = " and ".join(FLAGS[name] for name in self.options)
                reads = f"it reads {own}" if own else "it has no options"
                raise BadInput(f"{flag} does not apply to an export to {self.name}: {reads}")
            if value not in CHOICES[one.name]:
                raise BadInput(f"{flag} {value!r} is none of {', '.join(CHOICES[one.name])}")


EXPORTERS: Registry[Exporter] = Registry("export target", "pilon_compress.export")
Write = Callable[[PreTrainedModel, Job], dict[str, Any]]


def exporter(
    name: str,
    *,
    about: str,
    load: str,
    refuse: Callable[[PreTrainedModel, Options], str | None],
    options: tuple[str, ...] = ("dtype",),
    dtype_when_saved: bool = False,
) -> Callable[[Write], Write]:
    """Register the decorated function as the exporter `name`; the other arguments are those of `Exporter`."""

    def register(write: Write) -> Write:
        EXPORTERS.add(name, Exporter(name, about, load, write, refuse, options, dtype_when_saved))
        return write

    return register
