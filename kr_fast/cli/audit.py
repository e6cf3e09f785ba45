"""``kr-fast audit``: membership attacks on any torch classifier, or on signals that were saved before."""

import argparse
from typing import Any

from kr_fast.cli import options
from kr_fast.runtime.text import aligned


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from kr_fast.membership.audit.run import AuditConfig

    parser = subparsers.add_parser(
        "audit",
        help="attack a classifier, or saved signals, and report what leaks",
        description="Membership inference with exact statistics. The same command continues one that was stopped.",
    )
    options.add_flags(parser, AuditConfig)
    parser.set_defaults(run=run, needs_arguments=True)


def run(arguments: argparse.Namespace) -> int:
    """Build the configuration, run, print the verdict and the table; returns the exit code."""
    from kr_fast.membership.audit.run import AuditConfig, run_audit
    from kr_fast.membership.verdict.decision import GATE, fails
    from kr_fast.report.sections import verdict

    done = run_audit(options.config_from(arguments, AuditConfig, "audit"))
    if done is None:  # on another rank than the first
        return 0
    report, page = done
    print("\n".join(verdict.lines(report.verdict)))
    print()
    print(table(report.to_dict()))
    print(f"report: {page}")
    return GATE if fails(report.verdict) else 0


def table(audit: dict[str, Any]) -> str:
    """The last screen: one line for each attack on shadows (their mean) and on targets, and the warnings."""
    from kr_fast.report import audit_tables
    from kr_fast.report.tables import rounded_down

    rows = [("target", "attack", "AUC", "TPR at 1 % FPR", "epsilon at least")]
    for name, each in audit["leave_one_out"].items():
        for attack, row in each.items():
            mark = " *" if row["role"] == "primary" else ""
            mean = row["tpr_at_fpr"]["0.01"]["mean"]
            tpr = "below 10 false positives" if mean is None else audit_tables.averaged(row["tpr_at_fpr"]["0.01"])
            words = f"mean of {row['targets']} {name}"
            rows.append((words, attack + mark, audit_tables.averaged(row["auc"]), tpr, ""))
    for name in audit["setting"]["targets"]:
        for attack, row in audit[name].items():
            low, high = row["tpr_at_fpr"]["0.01"]["interval"]
            tpr = row["tpr_at_fpr"]["0.01"]["tpr"]
            point = "" if tpr is None else f"{tpr:.4f} "
            mark = " *" if row["role"] == "primary" else ""
            auc = f"{row['auc']:.3f} [{row['auc_ci'][0]:.3f}, {row['auc_ci'][1]:.3f}]"
            bound = rounded_down(row["epsilon"]["clopper_pearson"])
            rows.append((name, attack + mark, auc, f"{point}[{low:.4f}, {high:.4f}]", bound))
    lines = aligned(rows)
    if audit["setting"]["targets"]:
        lines.append("* named beforehand; the others are exploratory. Empirical, not differential privacy.")
    return "\n".join(lines)
