"""`pilon-compress inspect`: the projections of a model, dense or converted. Loads no weights."""

from collections.abc import Sequence
from typing import Any

from pilon_compress.config.inspection import InspectConfig

from .options import configured
from .output import print_json, print_table, say
from .parameters import Json, Verbose
from .part_table import SCREEN, Part, join_equal, name_label, print_parts


@configured(InspectConfig)
def inspect(settings: InspectConfig, verbose: Verbose = False, as_json: Json = False) -> None:
    """Show the projections of a model per layer, with parameters, bytes and MACs per token.

    pilon-compress inspect gpt2
    """
    from pilon_compress.evaluate.inspect import anatomy

    result = anatomy(settings.model, settings.targets, settings.ignore).dump()
    if as_json:
        print_json(result)
        return
    print_converted(result, verbose) if result["form"] == "pilon" else print_dense(result, verbose)
    for note in result["notes"]:
        say(note)


def print_dense(result: dict[str, Any], verbose: bool = False) -> None:
    """Print the projections that a conversion would replace, in the dtype of the model's file."""
    from pilon_compress.report.formatting import mib, number, short_count

    parts = [
        {**entry, "names": [entry["name"]], "layers": [entry["layer"]], "stored": entry["parameters"]}
        for entry in result["projections"]
    ]
    groups: list[list[Part]] = [[part] for part in parts]
    if len(groups) > SCREEN and not verbose:
        groups = join_equal(parts)

    def row(label: str, group: Sequence[Part], shape: str) -> list[str]:
        counts, size, macs = (sum(part[key] for part in group) for key in ("parameters", "bytes", "macs"))
        return [label, group[0]["role"] if shape else "", shape, short_count(counts), mib(size), short_count(macs)]

    rows = [row(name_label(group), group, f"{group[0]['d_in']}→{group[0]['d_out']}") for group in groups]
    roles = dict.fromkeys(part["role"] for part in parts)
    totals = [row(f"all {role}", [part for part in parts if part["role"] == role], "") for role in roles]
    columns = ["projection", "role", "shape", "parameters", f"bytes ({result['dtype']})", "MACs per token"]
    title = f"{result['model']}  {result['architecture']}"
    print_table(title, columns, rows, totals=[*totals, row("total", parts, "")], optional=["role", "shape"])
    total, replaced = result["parameters"], result["replaced"]
    say(
        f"{number(replaced)} of {number(total)} parameters ({number(100 * replaced / total)} %) would be replaced, "
        f"{number(result['replaced_macs'])} of {number(result['macs'])} MACs per token"
    )


def print_converted(result: dict[str, Any], verbose: bool = False) -> None:
    """Print the banks and matrices of a PILON model as they are stored, its ratios, and its evaluation."""
    from pilon_compress.report.formatting import circumstances, number, parts_of, quality

    title = f"{result['model']}  {result['architecture']}"
    print_parts(title, result["parts"], result["dtype"], names=True, verbose=verbose)
    kinds = dict.fromkeys(part["quantization"].replace("none", result["dtype"]) for part in result["parts"])
    say(f"Banks and matrices are stored as {', '.join(kinds)}, everything else as {result['dtype']}.")
    if experts := {(part["experts"], part["active"]) for part in result["parts"] if part.get("experts")}:
        counts = ", ".join(f"{active} of {recipes}" for recipes, active in sorted(experts))
        say(f"A token is computed by {counts} experts of its block, recipes over one bank that a router chooses.")
    if routing := result.get("routing"):
        say(
            f"Routers on the validation text: entropy {number(routing['entropy'])}, load {number(routing['load_max'])} "
            f"times the mean at most, cosine of two experts {number(routing['similarity'])}."
        )
    for key, part in parts_of(result, "model_size"):
        sizes, source = result[key], result["source_dtype"]
        text = (
            f"{part}: {number(sizes['stored_ratio'])} of the dense parameters, {number(sizes['mac_ratio'])} of its "
            f"MACs, {number(sizes['bytes_ratio_to_source'])} of its bytes in {source}"
        )
        if source != "bfloat16":
            text += f", {number(sizes['bytes_ratio_to_bf16'])} in bfloat16"
        say(text)
    if exits := list((result.get("exits") or {}).values()):
        kind = f"a linear map of rank {exits[0]['substitute']}" if exits[0]["substitute"] else "a constant"
        limits = dict.fromkeys(f"{gate['threshold']:.3g}" for gate in exits)
        say(
            f"{len(exits)} blocks have exit gates: a token skips a block, and {kind} answers, where the predicted log "
            f"of the divergence in nats is below {', '.join(limits)}. MACs are those of a token that skips nothing."
        )
    figures = quality(result["evaluation"])
    if figures:
        rows = [[figure.label, figure.value, figure.dense] for figure in figures]
        data = dict(circumstances(result["evaluation"])).get("Text", "text that the report does not name")
        print()
        print_table(f"Quality on {data}, from its report", ["", "PILON", "dense"], rows)
    else:
        say("Quality: not evaluated yet; `pilon-compress eval` measures it.")
