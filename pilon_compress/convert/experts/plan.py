"""Plan experts without training: each feed-forward block keeps its neurons, in slices of equal size."""

from collections.abc import Sequence

from pilon_compress.config.experts import SlicesConfig
from pilon_compress.convert.plan import NeuronBankPlan, Plan, down_of
from pilon_compress.errors import BadInput
from pilon_compress.models.expert_layouts import expert_blocks
from pilon_compress.models.families import Site
from pilon_compress.nn.specs import RouterSpec


def plan_slices(sites: Sequence[Site], asked: SlicesConfig) -> Plan:
    """Return the plan whose blocks are slices of their own neurons, with a router for each block.

    Raises BadInput where projections of attention are to be replaced, too, where a block is no module of its own or
    not to be replaced as a whole, and where its neurons do not divide into slices.
    """
    experts, shared, top_k = asked.shape
    recipes = experts + shared
    other = next((site.name for site in sites if site.target != "ffn"), None)
    if other is not None:
        raise BadInput(f"form.moe slices feed-forward blocks alone, and {other} is to be replaced: leave out --targets")
    banks, routers = [], {}
    for band, (name, members) in enumerate(expert_blocks(sites).items()):
        down = down_of(members)
        if down is None:
            raise BadInput(
                f"form.moe slices whole blocks, and {name} is replaced in part: change --targets or --ignore"
            )
        if down.d_in % recipes:
            raise BadInput(
                f"{name} has {down.d_in} neurons, which do not divide into {recipes} slices: give --moe "
                "experts=N,shared=M,top_k=K with other N + M"
            )
        banks.append(NeuronBankPlan(band, tuple(members), down.d_in, (down.d_in // recipes,)))
        routers[name] = RouterSpec(down.d_out, experts, top_k, kind=asked.router, shared=shared, gates="ones")
    return Plan(1.0, [[members.sites[0].layer] for members in banks], [], neuron_banks=banks, routers=routers)
