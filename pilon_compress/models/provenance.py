"""Where a model folder comes from, as its recipe tells: the dense model at the beginning, and the text that it saw."""

from dataclasses import dataclass
from pathlib import Path

from pilon_compress.config import strict_yaml
from pilon_compress.errors import BadInput
from pilon_compress.io import manifest
from pilon_compress.io.disk import read_bounded

RECIPE, REPORT = "recipe.yaml", "report.json"
GENERATIONS = 20  # of healing and fine-tuning; more is a circle


@dataclass(frozen=True)
class Lineage:
    """`dense`: the dense model, as the folder's recipe names it. `texts`: text sources it was made or trained on.

    `judged_by`: the text that its recipe evaluates on, or else the one that it was last made or trained on.
    """

    dense: str | None = None
    texts: tuple[str, ...] = ()
    judged_by: str | None = None


def lineage(folder: str | Path) -> Lineage:
    """Of a converted or trained model; empty for anything else."""
    dense: str | None = None
    judged_by: str | None = None
    texts: list[str] = []
    place: str | None = str(folder)
    for _ in range(GENERATIONS):
        found = _told(Path(place).expanduser()) if place is not None else {}
        data = found.get("calibration") or found.get("data") or {}
        named = [data.get(key) for key in ("data", "source")] if isinstance(data, dict) else []
        texts += [one for one in named if isinstance(one, str) and one]
        judged_by = judged_by or _judged_by(found, data)
        origin = found.get("model") or found.get("teacher") or (found.get("start") if found.get("shrink") else None)
        dense = dense or _located(origin, place)
        if "task" not in found or found.get("start") is None:
            break
        place = _located(found["start"], place)
    return Lineage(dense, tuple(texts), judged_by)


def _judged_by(found: dict[str, object], data: object) -> str | None:
    """The text source by which one folder's recipe judges its result."""
    evaluation = found.get("evaluation")
    candidates = [evaluation.get("data")] if isinstance(evaluation, dict) else []
    if isinstance(data, dict):
        candidates += [data.get(key) for key in ("validation", "data", "source")]
    chosen = [one for one in candidates if isinstance(one, str) and one not in ("none", "stdin")]
    return chosen[0] if chosen else None


def _told(folder: Path) -> dict[str, object]:
    """The fields of a folder's recipe; of a report, where there is no recipe."""
    try:
        if (folder / RECIPE).is_file():
            text = read_bounded(folder / RECIPE, strict_yaml.LENGTH)
            found = strict_yaml.parse(text, str(folder / RECIPE)).data
        elif (folder / REPORT).is_file():
            found = {"model": manifest.read_ours(folder / REPORT).get("source")}
        else:
            return {}
    except BadInput:
        raise
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} does not tell where it comes from: {error}") from None
    return found if isinstance(found, dict) else {}


def _located(reference: object, folder: str | None) -> str | None:
    """A reference in a folder's recipe: a path counts from that folder, or else from the one that the user is in."""
    if not isinstance(reference, str):
        return None
    path = Path(reference).expanduser()
    if folder is not None and not path.is_absolute() and (Path(folder) / path).is_dir():
        return str(Path(folder) / path)
    return reference
