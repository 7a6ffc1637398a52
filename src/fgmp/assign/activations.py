"""Thresholds of activation sites from histograms of their scores."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fgmp.assign.policy import Policy
from fgmp.formats.activation import Site, site_threshold
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.sensitivity.histogram import ScoreHistogram, achieved_fraction, global_threshold


@dataclass(frozen=True)
class ActivationAssignment:
    """Site constants with thresholds, and fractions of FP4 blocks on the calibration tokens.

    Attributes:
        records: constants by site, T_site included.
        fp4_fractions: fraction of FP4 blocks by site.
        fp4_fraction: fraction of FP4 blocks over all sites.
    """

    records: dict[str, Site]
    fp4_fractions: dict[str, float]
    fp4_fraction: float


def assign_activations(
    records: Mapping[str, Site],
    histograms: Mapping[str, ScoreHistogram],
    policy: Policy,
    fp4_fraction: float,
) -> ActivationAssignment:
    """Give every site the threshold with a fraction ``fp4_fraction`` of its blocks in FP4.

    Args:
        records: constants by site; their thresholds are replaced.
        histograms: scores on the calibration tokens, by site.
        policy: whether the fraction holds over all sites together or at each site.
        fp4_fraction: fraction of FP4 blocks to reach.
    """
    shared = global_threshold(list(histograms.values()), fp4_fraction)
    assigned, fractions = {}, {}
    for name, record in records.items():
        histogram = histograms[name]
        threshold = global_threshold([histogram], fp4_fraction) if policy.per_layer else shared
        assigned[name] = replace(
            record, threshold=site_threshold(threshold, record.r, record.gamma)
        )
        # These two thresholds decide for every score, even at a site without scores.
        exact = {THRESHOLD_ALL_FP8: 0.0, THRESHOLD_ALL_FP4: 1.0}.get(assigned[name].threshold)
        reached = achieved_fraction(histogram, assigned[name].threshold)
        fractions[name] = reached if exact is None else exact
    blocks = {name: histogram.total for name, histogram in histograms.items()}
    count = sum(blocks.values())
    overall = sum(fractions[n] * blocks[n] for n in assigned) / count if count else fp4_fraction
    return ActivationAssignment(assigned, fractions, overall)
