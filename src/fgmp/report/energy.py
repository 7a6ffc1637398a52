"""Energy of a checkpoint's matmuls by layer, from the table of measured lanes.

Pairs of blocks are counted as if the formats of weights and activations were independent, since a
checkpoint stores only the fraction of FP8 activation blocks of each site. ``fgmp hw energy``
measures the pairs, and the lanes on the model's own operands.
"""

from collections.abc import Iterable, Sequence

from fgmp.errors import InputError
from fgmp.formats.rules import QuantizerConfig
from fgmp.hardware.inference import Work, independent
from fgmp.hardware.relative_energy import percent_of_fp8
from fgmp.report.records import Energy, Matrix, SiteShare


def energy_of(
    matrices: Sequence[Matrix],
    sites: Iterable[SiteShare],
    shared: dict[str, str],
    quantizers: set[QuantizerConfig],
) -> Energy:
    """Energy by layer, relative to FP8 lanes.

    Args:
        matrices: the packed weights.
        sites: their activation sites.
        shared: linears that use the weight of another, and the name of that one, by name.
        quantizers: configurations of all sites.

    Raises:
        InputError: the sites need several quantizers, or one whose energy was not measured; or the
            model routes tokens to experts, in shares that a checkpoint does not store.
    """
    if len(quantizers) != 1:
        raise InputError(
            f"sites must share one quantizer, got {'; '.join(sorted(map(str, quantizers)))}"
        )
    (quantizer,) = quantizers
    by_name = {matrix.facts.name: matrix for matrix in matrices}
    work: list[Work] = []
    narrow: list[Work] = []
    layers: dict[str, list[Work]] = {}
    for site in sites:
        for name in site.linears:
            if ".experts." in name:
                raise InputError(
                    "tokens are routed to experts, in shares that a checkpoint does not store"
                )
            matrix = by_name[shared.get(name, name)]
            facts = matrix.facts
            mix = independent(1 - site.fp8_share, 1 - facts.fp8_share)
            work.append(Work(name, site.owner, facts.n, facts.k, mix))
            narrow.append(Work(name, site.owner, facts.n, facts.k, independent(1.0, 1.0)))
            layers.setdefault(site.layer, []).append(work[-1])
    return Energy(
        percent_of_fp8(work, quantizer),
        percent_of_fp8(narrow, quantizer),
        {layer: percent_of_fp8(own, quantizer) for layer, own in layers.items()},
    )
