"""Everything about a conversion that can be known before weights are loaded: sites, plan, sizes, estimates."""

from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.config.conversion import Recipe
from pilon_compress.config.effort import EFFORTS
from pilon_compress.convert.allocate.uniform import check_limits, dense_plan, make_plan, preview
from pilon_compress.convert.experts.plan import plan_slices
from pilon_compress.convert.plan import Plan, blocks_of, down_of
from pilon_compress.convert.texts import Calibration, held_out, read_calibration, read_evaluation
from pilon_compress.data.batch import Batch
from pilon_compress.data.text import DEFAULT_ENCODER, DEFAULT_LM
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.inspect import stored_dtype
from pilon_compress.evaluate.untouched import notes, untouched
from pilon_compress.models import checkpoint
from pilon_compress.models.families import Site, find_sites
from pilon_compress.models.limits import check_length, longest_input
from pilon_compress.models.source import available
from pilon_compress.models.stream_check import check_walk
from pilon_compress.models.task import vocabulary
from pilon_compress.nn.formats.registry import conversion_format
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import model_size, target_ratios
from pilon_compress.nn.targets import LABELS, label, targets_of
from pilon_compress.report.layout_parts import layout_parts
from pilon_compress.results import conversion
from pilon_compress.results.conversion import ConversionPlan

ENCODER_LENGTH = 128
CAUSAL_LENGTH = 512
PARAGRAPH = 0.42  # of an encoder's sequence length that a docstring's paragraph fills, measured
STORE_SHARE, STORE_BYTES = 1 / 16, 2**28  # of the memory, and bytes at most, that a tensor store holds
PROCESS_BYTES = 700 * 2**20  # Python with torch and transformers, measured


@dataclass(frozen=True)
class ConversionJob:
    """A conversion before it starts. `dense` is the model on the meta device: shapes without weights.

    `recipe` has every default that depends on the model filled in, so that saving it pins the run down.
    """

    recipe: Recipe
    config: PretrainedConfig
    dense: PreTrainedModel
    causal: bool
    sites: list[Site]
    plan: Plan
    layout: Layout
    calibration: Calibration
    dtype: torch.dtype
    source_dtype: torch.dtype
    """Type of the numbers in the dense model's file."""
    final: bool = True
    """False while `plan` is a guess by uniform shares: the calibration text decides the sizes of the layers."""

    def planned(self, plan: Plan) -> "ConversionJob":
        """Return the conversion with its final plan."""
        return replace(self, plan=plan, layout=plan.layout(self.quantization), final=True)

    def seeded(self, seed: int) -> "ConversionJob":
        """Return the conversion with another seed."""
        return replace(self, recipe=self.recipe.model_copy(update={"seed": seed}))

    def read_calibration(self, tokenizer: PreTrainedTokenizerBase, text: Calibration | None = None) -> list[Batch]:
        """Read the calibration text, or another `text` of the same model: see `texts.read_calibration`."""
        size, seed = vocabulary(self.config), self.recipe.seed
        asked = text or self.calibration
        return read_calibration(asked, tokenizer, causal=self.causal, vocabulary=size, seed=seed)

    def read_held_out(self, tokenizer: PreTrainedTokenizerBase, batches: list[Batch]) -> list[Batch]:
        """Read text that is not among the calibration's `batches`: see `texts.held_out`."""
        size, seed = vocabulary(self.config), self.recipe.seed
        return held_out(self.calibration, tokenizer, batches, causal=self.causal, vocabulary=size, seed=seed)

    def read_evaluation(self) -> list[str] | str:
        """Read the documents to judge by, or say why there are none: see `texts.read_evaluation`."""
        return read_evaluation(self.recipe.evaluation, self.calibration.data, self.causal)

    def describe(self) -> ConversionPlan:
        """The plan and its sizes; before the plan is `final` no bank is listed, and sizes are about."""
        shown = self.plan if self.final else Plan(self.plan.ratio, [], [])
        itemsize, source = self.dtype.itemsize, self.source_dtype.itemsize
        return ConversionPlan(
            plan=describe_plan(shown, itemsize, self.quantization, self.replaced == LABELS["ffn"]),
            dtype=str(self.dtype).removeprefix("torch."),
            source_dtype=str(self.source_dtype).removeprefix("torch."),
            **target_ratios(self.layout, itemsize, source),
            model=model_size(self.layout, self.dense, itemsize).over_dense(source),
            untouched=untouched(self.dense, self.sites),
            notes=notes(self.dense, self.sites),
        )

    @property
    def replaced(self) -> str:
        """Return the kinds of blocks that are replaced, for messages, as in `FFN and attention`."""
        return label(targets_of(site.name for site in self.sites))

    @property
    def quantization(self) -> str | None:
        """The number format that banks and matrices are quantised to; None if they are not."""
        return asked_format(self.recipe)

    @property
    def allocated(self) -> bool:
        """True if sizes follow from the calibration text."""
        return allocated(self.recipe)

    @property
    def sequential(self) -> bool:
        """True if each layer is fitted to what the converted layers before it pass on."""
        return self.recipe.method == "pilon" and EFFORTS[self.recipe.effort].sequential

    @property
    def share(self) -> str:
        """Return none, auto or always: the bands that share banks."""
        return self.recipe.budget.sharing


def allocated(recipe: Recipe) -> bool:
    """True if sizes follow from the calibration text: the banks' shape is not fixed, and something must go, now or
    later."""
    asked, component = recipe.budget, recipe.form.composition == "component"
    smaller = asked.stored_limit < 1 or asked.stored_limit == 1 and ((asked.mac_limit or 1) < 1 or recipe.form.elastic)
    return recipe.method == "pilon" and component and smaller and not recipe.budget.fixed_shape


def initial_plan(recipe: Recipe, sites: list[Site]) -> Plan:
    """The plan where it is known without calibration; else a guess at it by uniform shares. Raises BadInput."""
    asked = recipe.budget
    if recipe.form.moe is not None:
        return plan_slices(sites, recipe.form.moe)
    if allocated(recipe):
        guess = preview(sites, min(asked.stored_limit, asked.mac_limit or 1))
        return guess or make_plan(sites, asked, "whitened-svd", recipe.form.composition)
    whole = recipe.method == "pilon" and recipe.form.composition == "component" and not recipe.budget.fixed_shape
    if whole and asked.stored_limit == 1:
        return dense_plan(sites)
    plan = make_plan(sites, asked, recipe.method, recipe.form.composition)
    check_limits(plan, asked)
    return plan


def asked_format(recipe: Recipe) -> str | None:
    """Return the number format that `recipe` asks for, None for that of the other weights.

    Raises BadInput for a format that conversions do not make.
    """
    return conversion_format(recipe.form.bank_dtype)


def describe_plan(
    plan: Plan, itemsize: int, quantization: str | None = None, ffn_alone: bool = True
) -> conversion.Plan:
    """The plan bank by bank and matrix by matrix, for the terminal, report.json and the card."""
    sites = plan.sites
    band = {layer: index for index, layers in enumerate(plan.bands) for layer in layers}
    parts = layout_parts(plan.layout(quantization), sites, itemsize)
    entries = [conversion.PlannedPart(band=band[part.layers[0]], **vars(part)) for part in parts]
    order = {role: place for place, role in enumerate(dict.fromkeys(entry.role for entry in entries))}
    entries.sort(key=lambda entry: (entry.band, order[entry.role]))
    ffn_ratio = plan.ratio if ffn_alone else None
    return conversion.Plan(ratio=plan.ratio, ffn_ratio=ffn_ratio, bands=plan.bands, banks=entries)


def prepare(recipe: Recipe) -> ConversionJob:
    """Read the config, find the projections and solve the plan. Loads no weights. Raises BadInput."""
    asked_format(recipe)
    config = checkpoint.load_config(recipe.model)
    checkpoint.check_dense(recipe.model, config)
    dense = checkpoint.empty_model(config)
    causal = checkpoint.is_causal(config)
    sites = find_sites(dense, recipe.scope.targets, recipe.scope.ignore)
    check_targets(recipe, sites)
    check_walk(dense)
    recipe.evaluation.check_kind(causal)
    if recipe.budget.sharing != "none":
        check_sharing(sites, "budget.share" if recipe.budget.share != "none" else "budget.bands")
    plan = initial_plan(recipe, sites)
    asked = recipe.calibration
    longest = longest_input(dense) or CAUSAL_LENGTH
    length = asked.sequence_length or min(longest, CAUSAL_LENGTH if causal else ENCODER_LENGTH)
    check_length(dense, length, "calibration.sequence_length")
    calibration = Calibration(
        data=asked.data or (DEFAULT_LM if causal else DEFAULT_ENCODER),
        samples=asked.samples or EFFORTS[recipe.effort].samples(causal, max(site.d_in for site in sites), length),
        sequence_length=length,
        batch_size=asked.batch_size,
    )
    stored = stored_dtype(config)
    dtype = checkpoint.find_dtype(recipe.dtype) or stored
    pinned = recipe.model_copy(update={"calibration": asked.model_copy(update=vars(calibration))})
    job = ConversionJob(pinned, config, dense, causal, sites, plan, plan.layout(), calibration, dtype, stored)
    return replace(job.planned(plan), final=not job.allocated)


def check_targets(recipe: Recipe, sites: list[Site]) -> None:
    """Raise BadInput for settings that are of feed-forward blocks alone, where other projections are replaced, too."""
    targets = targets_of(site.name for site in sites)
    if targets == ["ffn"]:
        return
    if recipe.budget.ffn_ratio is not None:
        raise BadInput(
            f"budget.ffn_ratio counts feed-forward parameters alone, and {label(targets)} are to be replaced: give "
            "the size of everything that is replaced as budget.ratio (--ratio)"
        )
    if recipe.form.elastic:
        raise BadInput(
            f"form.elastic cuts feed-forward blocks alone, and {label(targets)} are to be replaced: leave out "
            "--elastic, or --targets"
        )


def check_sharing(sites: list[Site], field: str) -> None:
    """Raise BadInput where no band could share: layers whose feed-forward block is not replaced as a whole."""
    layers: dict[int, list[Site]] = {}
    for site in sites:
        layers.setdefault(site.layer, []).append(site)
    whole = [layer for layer, members in layers.items() if down_of(blocks_of(members).get("ffn", [])) is not None]
    if len(whole) < 2:
        raise BadInput(
            f"{field} has no effect: it needs two layers whose feed-forward block is replaced as a whole; "
            "leave it out, or change --targets and --ignore"
        )


def store_bytes(limit: float | None) -> int:
    """Return the bytes that moments, and outputs to compare with, may each take, under a memory `limit` in GiB."""
    return min(STORE_BYTES, int(STORE_SHARE * available(limit)))
