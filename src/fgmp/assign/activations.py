"""From scored activation blocks to a threshold a site."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fgmp.assign.policy import Policy
from fgmp.formats.activation import Site, site_threshold
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.sensitivity.histogram import ScoreHistogram, achieved_fraction, global_threshold


@dataclass(frozen=True)
class ActivationAssignment:
    """Records with their T_site, and the share of FP4 blocks on the calibration tokens.

    Attributes:
        records: by site.
        fp4_fractions: by site.
        fp4_fraction: over all sites.
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
    """Give every site the threshold that reaches ``fp4_fraction``, over all sites or in each."""
    shared = global_threshold(list(histograms.values()), fp4_fraction)
    done, fractions = {}, {}
    for name, record in records.items():
        histogram = histograms[name]
        own = global_threshold([histogram], fp4_fraction) if policy.per_layer else shared
        done[name] = replace(record, threshold=site_threshold(own, record.r, record.gamma))
        # The two ends decide for every score, also at a site without any.
        exact = {THRESHOLD_ALL_FP8: 0.0, THRESHOLD_ALL_FP4: 1.0}.get(done[name].threshold)
        reached = achieved_fraction(histogram, done[name].threshold)
        fractions[name] = reached if exact is None else exact
    blocks = {name: histogram.total for name, histogram in histograms.items()}
    count = sum(blocks.values())
    overall = sum(fractions[n] * blocks[n] for n in done) / count if count else fp4_fraction
    return ActivationAssignment(done, fractions, overall)
