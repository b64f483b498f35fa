"""Register exporters: name, one sentence, options, a reason to refuse, and the function that writes.

    @exporter("dense", about="...", load="AutoModel.from_pretrained({folder!r})", options=("dtype",), refuse=refuse)
    def write(model, job):
        ...
        return Exported()

The function gets a PILON model, loaded, and an `ExportJob`; it writes `job.output` by `io.folders.fresh_folder` and
returns figures for the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from pilon_compress.config.export import ExportOptions
from pilon_compress.config.option import flags
from pilon_compress.errors import BadInput
from pilon_compress.plugins import Registry
from pilon_compress.results.export import Exported

FLAGS = {one.path: one.name for one in flags(ExportOptions)}  # on the command line
DEFAULTS = ExportOptions()
COMMON = ("keep", "calibration")  # options of every form: they change the model that is written


@dataclass(frozen=True)
class ExportJob:
    """An export: the folder `source`, as the user names it, its output and options."""

    source: str
    output: Path
    options: ExportOptions
    overwrite: bool


def takes_any(source: str, model: PreTrainedModel) -> None:
    """Refuse nothing that lies beside a model's weights."""
    return None


@dataclass(frozen=True)
class Exporter:
    """A form to export to.

    about: one sentence   load: Python that loads the result, with the field {folder!r}
    options: fields of `ExportOptions` that it reads
    dtype_when_saved: load the model as it is stored, and apply `dtype` to what is saved; False: load in `dtype`
    refuse: why it cannot take a model, as the end of a sentence that begins with the model's name; None if it can
    refuse_source: the same of what lies beside the model's weights, by the source's name
    """

    name: str
    about: str
    load: str
    write: Callable[[PreTrainedModel, ExportJob], Exported]
    refuse: Callable[[PreTrainedModel, ExportOptions], str | None]
    options: tuple[str, ...] = ("dtype",)
    dtype_when_saved: bool = False
    refuse_source: Callable[[str, PreTrainedModel], str | None] = takes_any

    def reason(self, source: str, model: PreTrainedModel, options: ExportOptions) -> str | None:
        """Return why it cannot take `model`, loaded from `source`; None if it can."""
        return self.refuse(model, options) or self.refuse_source(source, model)

    def check(self, options: ExportOptions) -> None:
        """Raise BadInput for an option that this exporter does not read."""
        for name, flag in FLAGS.items():
            if getattr(options, name) is not None and name not in (*self.options, *COMMON):
                own = " and ".join(FLAGS[one] for one in self.options)
                reads = f"it reads {own}" if own else "it has no options"
                raise BadInput(f"{flag} does not apply to an export to {self.name}: {reads}")


EXPORTERS: Registry[Exporter] = Registry("export target", "pilon_compress.export")
Write = Callable[[PreTrainedModel, ExportJob], Exported]


def exporter(
    name: str,
    *,
    about: str,
    load: str,
    refuse: Callable[[PreTrainedModel, ExportOptions], str | None],
    options: tuple[str, ...] = ("dtype",),
    dtype_when_saved: bool = False,
    refuse_source: Callable[[str, PreTrainedModel], str | None] = takes_any,
) -> Callable[[Write], Write]:
    """Register the decorated function as the exporter `name`; the other arguments are those of `Exporter`."""

    def register(write: Write) -> Write:
        EXPORTERS.add(name, Exporter(name, about, load, write, refuse, options, dtype_when_saved, refuse_source))
        return write

    return register
