"""Weights that several linears share: packed once, whatever each of the linears reads.

A linear *shares* a weight if an earlier linear, the *holder*, has the same parameter. The two may
read different sites. Everything that belongs to a weight (scales, scores, masks, planes) is kept
under the holder's name alone; ``shared`` maps the names of the other linears to it.

All linears of a site have one tensor scale, so sites that a shared weight connects have one, too.
Compensation minimizes the sum of the errors of all uses: the moments of a shared weight are the
sums of the moments of the sites whose linears use it. If no weight is shared, the groups that the
functions below return correspond to the sites.
"""

from collections.abc import Collection, Iterable, Mapping


def joined(sets: Iterable[Collection[str]]) -> list[list[str]]:
    """Unions of sets that overlap, directly or by way of others, in order of first appearance."""
    groups: dict[str, list[str]] = {}
    for names in sets:
        merged: dict[str, None] = {}
        for name in names:
            merged |= dict.fromkeys(groups.get(name, [name]))
        group = list(merged)
        for name in group:
            groups[name] = group
    unique = {id(group): group for group in groups.values()}
    return list(unique.values())


def weights_by_scale(
    linears_of: Mapping[str, list[str]], shared: Mapping[str, str]
) -> list[list[str]]:
    """Holders of weights that have one tensor scale, grouped."""
    return joined([shared.get(n, n) for n in names] for names in linears_of.values())


def readers(linears_of: Mapping[str, list[str]], shared: Mapping[str, str]) -> dict[str, list[str]]:
    """Owners of the sites whose linears use a weight, by the weight's holder."""
    owners: dict[str, dict[str, None]] = {}
    for owner, names in linears_of.items():
        for name in names:
            owners.setdefault(shared.get(name, name), {})[owner] = None
    return {holder: list(of_weight) for holder, of_weight in owners.items()}


def weights_by_readers(
    linears_of: Mapping[str, list[str]], shared: Mapping[str, str]
) -> list[list[str]]:
    """Holders of weights, grouped: a group's weights are used by linears of the same sites."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for holder, owners in readers(linears_of, shared).items():
        groups.setdefault(tuple(owners), []).append(holder)
    return list(groups.values())
