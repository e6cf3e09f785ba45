"""Membership inference: attacks, exact statistics with intervals, and the audit that runs them."""

from kr_fast.membership.attacks import lira
from kr_fast.membership.audit import AuditReport, audit
from kr_fast.membership.metrics import Curve, aop, roc

__all__ = ["AuditReport", "Curve", "aop", "audit", "lira", "roc"]
