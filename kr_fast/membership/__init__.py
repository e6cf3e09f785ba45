"""Membership inference: attacks, exact statistics with intervals, and the audit that runs them."""

from kr_fast.membership.attacks.blind import blind
from kr_fast.membership.attacks.calibrated import calibrated_nearest
from kr_fast.membership.attacks.canaries import attack_canaries, draw_canaries
from kr_fast.membership.attacks.catalog import CATALOG, DEFAULT
from kr_fast.membership.attacks.control import overfitted, overfitted_recipe
from kr_fast.membership.attacks.denoising import denoising_attack, denoising_errors
from kr_fast.membership.attacks.learned import quantile_regression, shadow_network
from kr_fast.membership.attacks.negative_controls import negative_controls
from kr_fast.membership.attacks.released import generated_density, nearest_synthetic
from kr_fast.membership.attacks.released_tests import ReleasedTests, released_tests
from kr_fast.membership.attacks.scores import (
    attack_p,
    attack_r,
    base,
    label_only,
    lira,
    lira_carlini2021,
    threshold_per_class,
)
from kr_fast.membership.attacks.scores import rmia as rmia_attack
from kr_fast.membership.audit.api import audit
from kr_fast.membership.audit.choices import Auxiliary, Choices, Target
from kr_fast.membership.audit.recipe import across_targets
from kr_fast.membership.audit.report import AuditReport, audit_signals
from kr_fast.membership.inputs.data import AuditData, ShadowSignals, TargetSignals, from_logits
from kr_fast.membership.inputs.duplicates import Duplicates, duplicates_across
from kr_fast.membership.inputs.loading import load_npz, save_npz
from kr_fast.membership.inputs.other_tools import load_lira_tree, load_privacy_meter
from kr_fast.membership.statistics.auc_intervals import delong_test
from kr_fast.membership.statistics.balanced import partners
from kr_fast.membership.statistics.bounds import epsilon_of_mu
from kr_fast.membership.statistics.curve import Curve, roc
from kr_fast.membership.statistics.epsilon import epsilon_clopper_pearson, epsilon_one_run, gaussian_mu
from kr_fast.membership.statistics.intervals import bootstrap
from kr_fast.membership.statistics.records import RecordRisk, record_risk
from kr_fast.membership.statistics.summaries import aop, operating_point, shadow_threshold
from kr_fast.membership.verdict.limits import Limits
from kr_fast.ops.membership.rmia import rmia

__all__ = [
    "CATALOG",
    "DEFAULT",
    "AuditData",
    "AuditReport",
    "Auxiliary",
    "Choices",
    "Curve",
    "Duplicates",
    "Limits",
    "RecordRisk",
    "ReleasedTests",
    "ShadowSignals",
    "Target",
    "TargetSignals",
    "across_targets",
    "aop",
    "attack_canaries",
    "attack_p",
    "attack_r",
    "audit",
    "audit_signals",
    "base",
    "blind",
    "bootstrap",
    "calibrated_nearest",
    "delong_test",
    "denoising_attack",
    "denoising_errors",
    "draw_canaries",
    "duplicates_across",
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
    "negative_controls",
    "operating_point",
    "overfitted",
    "overfitted_recipe",
    "partners",
    "quantile_regression",
    "record_risk",
    "released_tests",
    "rmia",
    "rmia_attack",
    "roc",
    "save_npz",
    "shadow_network",
    "shadow_threshold",
    "threshold_per_class",
]
