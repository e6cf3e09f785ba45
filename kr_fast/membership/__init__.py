"""Membership inference: attacks, exact statistics with intervals, and the audit that runs them."""

from kr_fast.membership.attacks import attack_p, attack_r, base, label_only, lira, lira_carlini2021, threshold_per_class
from kr_fast.membership.attacks import rmia as rmia_attack
from kr_fast.membership.auc_intervals import delong_test
from kr_fast.membership.audit import audit
from kr_fast.membership.audit_data import AuditData, ShadowSignals, TargetSignals, from_logits
from kr_fast.membership.audit_report import AuditReport, audit_signals
from kr_fast.membership.balanced import partners
from kr_fast.membership.catalog import CATALOG, DEFAULT
from kr_fast.membership.control import overfitted, overfitted_recipe
from kr_fast.membership.curve import Curve, roc
from kr_fast.membership.epsilon import epsilon_clopper_pearson, epsilon_of_mu, epsilon_one_run, gaussian_mu
from kr_fast.membership.intervals import bootstrap
from kr_fast.membership.learned import quantile_regression, shadow_network
from kr_fast.membership.loading import load_npz, save_npz
from kr_fast.membership.other_tools import load_lira_tree, load_privacy_meter
from kr_fast.membership.recipe import across_targets
from kr_fast.membership.released import generated_density, nearest_synthetic
from kr_fast.membership.summaries import aop, operating_point, shadow_threshold
from kr_fast.ops.rmia import rmia

__all__ = [
    "CATALOG",
    "DEFAULT",
    "AuditData",
    "AuditReport",
    "Curve",
    "ShadowSignals",
    "TargetSignals",
    "across_targets",
    "aop",
    "attack_p",
    "attack_r",
    "audit",
    "audit_signals",
    "base",
    "bootstrap",
    "delong_test",
    "epsilon_clopper_pearson",
    "epsilon_of_mu",
    "epsilon_one_run",
    "from_logits",
    "gaussian_mu",
    "generated_density",
    "label_only",
    "lira",
    "lira_carlini2021",
    "load_lira_tree",
    "load_npz",
    "load_privacy_meter",
    "nearest_synthetic",
    "operating_point",
    "overfitted",
    "overfitted_recipe",
    "partners",
    "quantile_regression",
    "rmia",
    "rmia_attack",
    "roc",
    "save_npz",
    "shadow_network",
    "shadow_threshold",
    "threshold_per_class",
]
