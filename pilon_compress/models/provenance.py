"""Read from recipes which dense model a folder was made from, and which text it was made or trained on."""

from dataclasses import dataclass
from pathlib import Path

from pilon_compress.config import strict_yaml
from pilon_compress.data.memory import in_memory
from pilon_compress.errors import BadInput
from pilon_compress.io import manifest
from pilon_compress.io.disk import read_bounded
from pilon_compress.models.in_memory import held_model, record_of

RECIPE, REPORT = "recipe.yaml", "report.json"
GENERATIONS = 20  # of recovery and fine-tuning that are followed back; more is a circle


@dataclass(frozen=True)
class Lineage:
    """The origin of a model folder by its recipes.

    `dense`: reference of the dense model. `texts`: text sources that the model was converted or trained on.
    `evaluation`: text source that its recipe evaluates on, or else the one of the last conversion or training.
    """

    dense: str | None = None
    texts: tuple[str, ...] = ()
    evaluation: str | None = None


def lineage(folder: str | Path) -> Lineage:
    """Return the origin of a converted or trained model; an empty one for anything else. Raises BadInput for recipes
    that cannot be read."""
    dense: str | None = None
    evaluation: str | None = None
    texts: list[str] = []
    place: str | None = str(folder)
    gated = False
    for _ in range(GENERATIONS):
        recipe = _recipe(Path(place).expanduser()) if place is not None else {}
        if gated and not recipe:  # the weights of task gates are those of the model that it began with
            dense = dense or place
        gated = recipe.get("task") == "gates"
        data = recipe.get("calibration") or recipe.get("data") or {}
        sources = [data.get(key) for key in ("data", "source")] if isinstance(data, dict) else []
        texts += [one for one in sources if isinstance(one, str) and one]
        evaluation = evaluation or _evaluation(recipe, data)
        origin = recipe.get("model") or recipe.get("teacher") or (recipe.get("start") if recipe.get("shrink") else None)
        dense = dense or _located(origin, place)
        if "task" not in recipe or recipe.get("start") is None:
            break
        place = _located(recipe["start"], place)
    return Lineage(dense, tuple(texts), evaluation)


def _evaluation(recipe: dict[str, object], data: object) -> str | None:
    """Return the text source that one folder's recipe evaluates on."""
    settings = recipe.get("evaluation")
    candidates = [settings.get("data")] if isinstance(settings, dict) else []
    if isinstance(data, dict):
        candidates += [data.get(key) for key in ("validation", "data", "source")]
    chosen = [one for one in candidates if isinstance(one, str) and one not in ("none", "stdin")]
    chosen = [one for one in chosen if not in_memory(one)]
    return chosen[0] if chosen else None


def _recipe(folder: Path) -> dict[str, object]:
    """Return the fields of a folder's recipe, or the model in its report; {} where it has neither. Raises BadInput."""
    model = held_model(str(folder))
    try:
        if model is not None and (written := record_of(model).recipe) is not None:
            recipe = strict_yaml.parse(written, RECIPE).data
        elif (folder / RECIPE).is_file():
            text = read_bounded(folder / RECIPE, strict_yaml.LENGTH)
            recipe = strict_yaml.parse(text, str(folder / RECIPE)).data
        elif (folder / REPORT).is_file():
            recipe = {"model": manifest.read_ours(folder / REPORT).get("source")}
        else:
            return {}
    except BadInput:
        raise
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read where {folder} comes from: {error}") from None
    return recipe if isinstance(recipe, dict) else {}


def _located(reference: object, folder: str | None) -> str | None:
    """Resolve a reference in a folder's recipe: a path counts from that folder, or else from the working directory.

    None for a model that was in memory: its name may be another one's by now.
    """
    if not isinstance(reference, str) or in_memory(reference):
        return None
    path = Path(reference).expanduser()
    if folder is not None and not path.is_absolute() and (Path(folder) / path).is_dir():
        return str(Path(folder) / path)
    return reference
