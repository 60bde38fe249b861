"""What a plan may ask of an adapter; both the server that makes it and its client look."""

from fedlora.adapter import AdapterSpec, MethodTraits
from fedlora.messages import HEADS, RoundPlan


def plan_problem(plan: RoundPlan, spec: AdapterSpec, traits: MethodTraits) -> str:
    """Why no client can do as the plan says; "" if it can.

    Args:
        spec: the adapter at the global rank.
    """
    if not 1 <= plan.rank <= spec.rank:
        return f"gives rank {plan.rank}; the adapter has {spec.rank}"
    known = traits.factor_shapes(spec.layers[0])
    for verb, names in (
        ("trains", plan.factors),
        ("keeps", [name for name in plan.kept if name != HEADS]),
        ("gives a rate to", list(plan.rates)),
    ):
        if odd := [name for name in names if name not in known]:
            return f"{verb} factor {odd[0][:64]!r}; method {traits.name!r} has {', '.join(known)}"
    if len(set(plan.factors)) < len(plan.factors):
        return f"names a factor twice: {', '.join(plan.factors)}"
    for field, asked in (
        ("proximal_product", plan.proximal_product),
        ("tail_weight", plan.tail_weight > 0),
        ("slots", plan.slots > 0),
    ):
        if asked and not traits.product:
            return f"has {field}, for which the change must be s B A; method {traits.name!r} is not"
    if plan.tail_weight > 0 and set(plan.factors) != set(known):
        return f"has tail_weight, for which {' and '.join(known)} must be trained"
    if plan.slots > 0 and (len(plan.factors) != 1 or plan.kept or plan.control):
        return "has slots, for which one factor must be trained and sent, without control"
    return ""
