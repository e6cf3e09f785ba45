"""Membership inference: attacks, exact statistics with intervals, and the audit that runs them."""

from kr_fast.membership.attacks import lira
from kr_fast.membership.audit import AuditReport, audit
from kr_fast.membership.curve import Curve, roc
from kr_fast.membership.epsilon import epsilon_clopper_pearson, epsilon_of_mu, epsilon_one_run, gaussian_mu
from kr_fast.membership.intervals import bootstrap, delong_test
from kr_fast.membership.summaries import across_targets, aop, operating_point, shadow_threshold

__all__ = [
    "AuditReport",
    "Curve",
    "across_targets",
    "aop",
    "audit",
    "bootstrap",
    "delong_test",
    "epsilon_clopper_pearson",
    "epsilon_of_mu",
    "epsilon_one_run",
    "gaussian_mu",
    "lira",
    "operating_point",
    "roc",
    "shadow_threshold",
]
