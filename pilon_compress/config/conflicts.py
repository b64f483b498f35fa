"""Fields that another field switches off: a recipe that sets one of them is refused, whichever way it was set."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

if TYPE_CHECKING:
    from pilon_compress.config.conversion import Recipe

SHAPE = ("bands", "n_primitives", "rank", "top_k")


class Context(NamedTuple):
    """A setting that switches fields off: a test of the recipe, and its name in messages."""

    holds: Callable[["Recipe"], bool]
    words: Callable[["Recipe"], str]


def fixed_shape(recipe: "Recipe") -> list[str]:
    """Return the fields of the budget that fix the shape of banks."""
    return [name for name in SHAPE if getattr(recipe.budget, name) is not None]


FIXED = Context(lambda r: bool(fixed_shape(r)), lambda r: f"budget.{fixed_shape(r)[0]}, which fixes the banks' shape")
BASELINE = Context(lambda r: r.method != "pilon", lambda r: f"method {r.method}")
SCALAR = Context(lambda r: r.form.composition == "scalar", lambda _: "form.composition scalar")
LARGER = Context(lambda r: r.budget.ratio > 1, lambda _: "budget.ffn_ratio above 1")
WHOLE = Context(lambda r: r.budget.ratio == 1, lambda _: "budget.ffn_ratio 1, which keeps every layer dense")
MACS = Context(
    lambda r: r.budget.mac_ratio is not None or r.budget.optimize == "compute",
    lambda r: (
        "a limit on MACs ("
        + ("budget.mac_ratio" if r.budget.mac_ratio is not None else "budget.optimize compute")
        + ")"
    ),
)
MAC_RATIO = Context(lambda r: r.budget.mac_ratio is not None, lambda _: "budget.mac_ratio, which sets the limit itself")
UNREFINED = Context(lambda r: r.refine.steps == 0, lambda _: "refine.steps 0")
UNEVALUATED = Context(lambda r: r.evaluation.data == "none", lambda _: "evaluation.data none")

TABLE: dict[str, tuple[Context, ...]] = {
    "budget.sharing": (FIXED, BASELINE, SCALAR, MACS, LARGER, WHOLE),
    "budget.neurons": (FIXED, BASELINE, SCALAR, LARGER),
    "budget.bands": (BASELINE,),
    "budget.n_primitives": (BASELINE,),
    "budget.top_k": (BASELINE,),
    "budget.optimize": (MAC_RATIO,),
    "effort": (BASELINE,),
    "refine.minutes": (UNREFINED,),
    "refine.samples": (UNREFINED,),
    "evaluation.samples": (UNEVALUATED,),
    "evaluation.window": (UNEVALUATED,),
    "evaluation.stride": (UNEVALUATED,),
    "evaluation.batch_size": (UNEVALUATED,),
}
"""Field -> settings that leave it without effect. A field at its default is never refused."""

EXPLICIT = {"budget.neurons"}  # its default asks for something: refused also where it is written out


def conflicts(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """Yield (dotted field, what is wrong) for every field that is set and has no effect."""
    for path, contexts in TABLE.items():
        if _is_set(recipe, path):
            for context in contexts:
                if context.holds(recipe):
                    yield path, f"has no effect with {context.words(recipe)}: leave out one of the two"
                    break
    budget = recipe.budget
    if budget.top_k is not None and budget.n_primitives is not None and budget.top_k > budget.n_primitives:
        yield "budget.top_k", f"is more than the {budget.n_primitives} primitives of a bank: lower it to that at most"
    if recipe.refine.steps and recipe.form.bank_dtype != "auto":
        yield "refine.steps", "quantised weights cannot be refined: leave out refine.steps, or form.bank_dtype"


def refuse_conflicts(section: Any, found: Iterable[tuple[str, str]]) -> None:
    """Raise pydantic's ValidationError for `found`, (dotted field of `section`, what is wrong), if there is any."""
    errors = [_error(path, message, _value(section, path)) for path, message in found]
    if errors:
        raise ValidationError.from_exception_data(type(section).__name__, errors)


def refuse_field(path: str, message: str, value: Any) -> None:
    """Raise pydantic's ValidationError at the dotted field `path`, from a validator of the section that has it."""
    raise ValidationError.from_exception_data("Recipe", [_error(path, message, value)])


def _error(path: str, message: str, value: Any) -> InitErrorDetails:
    kind = PydanticCustomError("conflict", "{reason}", {"reason": message})
    return InitErrorDetails(type=kind, loc=tuple(path.split(".")), input=value)


def _is_set(recipe: "Recipe", path: str) -> bool:
    *parents, name = path.split(".")
    section: Any = recipe
    for parent in parents:
        section = getattr(section, parent)
    if path in EXPLICIT and name in section.model_fields_set:
        return True
    return bool(getattr(section, name) != type(section).model_fields[name].default)


def _value(section: Any, path: str) -> Any:
    value = section
    for name in path.split("."):
        value = getattr(value, name)
    return value
