"""MM-RLHF: fetch it, unpack it, and make scored preference data of its human ratings."""

from unidpo.data.formats.ratings import parse_weights
from unidpo.data.mm_rlhf.fetch import Fetched, fetch
from unidpo.data.mm_rlhf.fetch_plan import FetchPlan, plan_fetch
from unidpo.data.mm_rlhf.scored import from_mm_rlhf, scored_groups
from unidpo.data.mm_rlhf.scoring import RatingsReport, Scoring

__all__ = [
    "FetchPlan",
    "Fetched",
    "RatingsReport",
    "Scoring",
    "fetch",
    "from_mm_rlhf",
    "parse_weights",
    "plan_fetch",
    "scored_groups",
]
