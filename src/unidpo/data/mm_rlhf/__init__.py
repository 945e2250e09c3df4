"""MM-RLHF: fetch it, unpack it, and make scored preference data of its human ratings."""

from unidpo.data.mm_rlhf.archives import ArchiveError, Extracted, extract
from unidpo.data.mm_rlhf.fetch import Fetched, FetchPlan, fetch, plan_fetch
from unidpo.data.mm_rlhf.hubs import FetchError
from unidpo.data.mm_rlhf.ratings import parse_weights
from unidpo.data.mm_rlhf.report import RatingsReport, Scoring
from unidpo.data.mm_rlhf.scored import Scored, from_mm_rlhf, scored_groups

__all__ = [
    "ArchiveError",
    "Extracted",
    "FetchError",
    "FetchPlan",
    "Fetched",
    "RatingsReport",
    "Scored",
    "Scoring",
    "extract",
    "fetch",
    "from_mm_rlhf",
    "parse_weights",
    "plan_fetch",
    "scored_groups",
]
