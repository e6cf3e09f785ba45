"""The files of a run and of an audit, by who may have them.

``OUT/release/`` holds what may leave the institution once it has decided so, ``OUT/private/`` everything else.
``OUT/README.txt`` lists every entry, and says which of the two it is and why. In a run under differential privacy
(``guaranteed``) ``release/`` holds what the guarantee covers and nothing else: every figure of real images is private.
"""

import os
import textwrap
from pathlib import Path

from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage import files

README = "README.txt"
RELEASE, PRIVATE = "release", "private"

# Folder -> entry -> what it is, and why it is there. Not every run has every entry.
ENTRIES: dict[str, dict[str, str]] = {
    RELEASE: {
        "student.safetensors": "the Student. It was trained on synthetic images and on the Teacher's answers, never on "
        "a real image. The verdict is about it alone. The audit says how much its attacks found: empirical, no "
        "guarantee",
        "student/": "the same Student as a folder that stands alone (kr_fast.load_student reads it): weights, classes, "
        "normalisation and a model card with its figures, audit and verdict",
        "synthetic/": "images.npy and labels.npy: the synthetic images of the last period, by a generator that was "
        "trained on the real ones. The verdict is not about them: see what the attacks on them found",
        "report.html": "the report",
        "report.md": "the same report as text",
        "figures/": "the figures of report.md",
        "metrics.json": "every figure of the report, versions and options",
        "audit.html": "every attack with all of its figures",
        "audit.json": "the figures of audit.html",
    },
    PRIVATE: {
        "teacher.safetensors": "the Teacher. Its weights were trained on the real images and can leak them",
        "generator/": "the generator. Its weights were trained on the real images, some of which it may draw again",
        "few_step/": "the generator of few steps, which was made from images of the generator and leaks what they do",
        "shadows/": "networks for the attacks, trained on halves of the real images; keep.npy says by record which of "
        "them saw it",
        "shadow_students/": "the same for the Student, and generators that were trained on halves of the real images; "
        "denoising-*.npy says how well they take noise off every record, nearest-*.npy how near their images come",
        "ablation/": "Students that learned from other labels or images than the one that may be released, to be "
        "compared with it",
        "ablation_students/": "as shadow_students/, for one of the Students in ablation/",
        "canaries/": "twins of Teacher and Student, some of whose training images had a wrong label; canaries.json "
        "says which images, keep.npy which twin saw them",
        "control.safetensors": "the positive control: a network that has memorised the real images on purpose",
        "control.json": "what the positive control was trained from",
        "synthetic/": "ids.npy: with the generator, an id draws its image again",
        "signals/": "answers of the networks for every record",
        "audit.npz": "for every record: whether it is a member, its number, and its score in every attack",
        "denoising.npz": "for every record: how well the generator takes noise off it, and its score in the attack on "
        "the generator's weights",
        "nearest.npy": "for every record: how near the synthetic images come to it, those of all periods and the last",
        "exposed.json": "the members that the attacks identify most surely, by number",
        "closest_pairs.json": "the members that released images come closest to, by number",
        "records.csv": "the risk of each record, by number",
        "groups.csv": "the risk of each group of records (a patient, a site), by name or number",
        "duplicates.csv": "images that occur again in the data, whole or nearly, by number",
        "report.html": "the report with real images, where it was asked for by name (--show-real-images)",
        "report.md": "the same report as text",
        "figures/": "the figures of report.md",
        "audit.html": "every attack, with real images or single records, where it was asked for by name",
        "logs/": "curves and figures of the trainings, as the trackers write them that were asked for (--log-with)",
        "state/": "positions of trainings that are under way (weights, optimizer), results of short trainings",
    },
    ".": {
        "config.yaml": "the options, with the paths of your data. The same command continues from it",
        "journal.json": "which stages are finished, their results, and the SHA-256 of their files",
        ".lock": "held by the process at work here",
        README: "this text",
        "../*.private-images/": "beside this folder, where the set is large: the real images, decoded once. They must "
        "not leave",
    },
}
# What a run under differential privacy has in place of the entries above.
REPORTS = ("report.html", "report.md", "figures/", "metrics.json", "audit.html", "audit.json")
GUARANTEED: dict[str, dict[str, str]] = {
    RELEASE: {
        "student.safetensors": "the Student. What it says of any one training image is bounded by the guarantee in "
        "ledger.json, against every attack",
        "student/": "the same Student as a folder that stands alone (kr_fast.load_student reads it): weights, classes, "
        "normalisation and a model card with the guarantee, without a figure of real images",
        "synthetic/": "images.npy and labels.npy: the synthetic images of the last period, which the same guarantee "
        "covers, and their data card",
        "ledger.json": "the guarantee: epsilon, delta, what two sets differ in, and every use of the training images, "
        "from which it can be computed again",
    },
    PRIVATE: {
        **{name: ENTRIES[RELEASE][name] for name in REPORTS},
        **{name: words for name, words in ENTRIES[PRIVATE].items() if name not in REPORTS},
    },
    ".": ENTRIES["."],
}
COVERED = (
    "release/: what the guarantee covers: made of the private Teacher and generator alone. It holds no real image and "
    "no figure that was computed from real images without noise, such as a test accuracy. More than release/ must not "
    "leave, or the guarantee is of no use. With --dp-seed there is none, and nothing must leave: ledger.json says so."
)
HEADING = {
    RELEASE: "release/: what may leave the institution, once the institution has decided so, by the verdict and the "
    "figures of the report. It holds no real image and nothing about a single record.",
    PRIVATE: "private/: what must not leave. Whoever has these files can learn about single real images.",
    ".": "Beside them: what belongs to the command. It must not leave, as it names your files.",
}


class Folder:
    """The paths in the folder ``out`` of a run or an audit.

    ``guaranteed``: of a run under differential privacy, whose reports and figures are private.
    """

    def __init__(self, out: str | Path, guaranteed: bool = False):
        self.out, self.guaranteed = Path(out), guaranteed
        self.release, self.private = self.out / RELEASE, self.out / PRIVATE
        self.config, self.journal = self.out / "config.yaml", self.out / "journal.json"
        self.student, self.student_folder = self.release / "student.safetensors", self.release / "student"
        self.images, self.labels = (self.release / "synthetic" / f"{name}.npy" for name in ("images", "labels"))
        self.metrics, self.audit_figures = (self.pages(False) / f"{name}.json" for name in ("metrics", "audit"))
        self.teacher, self.generators = self.private / "teacher.safetensors", self.private / "generator"
        self.few_step = self.private / "few_step"  # as a checkpoint of the generator
        self.ids = self.private / "synthetic" / "ids.npy"
        self.shadows, self.shadow_students = self.private / "shadows", self.private / "shadow_students"
        self.ablation, self.ablation_students = self.private / "ablation", self.private / "ablation_students"
        self.canaries = self.private / "canaries"
        self.twin_teachers, self.twin_students = self.canaries / "teachers", self.canaries / "students"
        self.control, self.signals = self.private / "control.safetensors", self.private / "signals"
        self.records = self.private / "records.csv"
        self.group_risks = self.private / "groups.csv"
        self.duplicates = self.private / "duplicates.csv"
        self.closest_pairs = self.private / "closest_pairs.json"
        self.audit_arrays, self.exposed = self.private / "audit.npz", self.private / "exposed.json"
        self.denoising = self.private / "denoising.npz"
        self.nearest = self.private / "nearest.npy"
        self.logs = self.private / "logs"
        self.state = self.private / "state"
        self.mapped_images = Path(os.path.abspath(self.out) + ".private-images")  # of a large set; beside the run
        self.shared = self.state / "shadow_students"  # images of all shadow Students, until their stage ends

    @property
    def privacy_ledger(self) -> Path:
        """What a differentially private run has spent, and on what."""
        return self.release / "ledger.json"

    @property
    def set_card(self) -> Path:
        """The data card of the synthetic images of a differentially private run."""
        return self.release / "synthetic" / "README.md"

    def generator(self, step: int, ema_length: float = 0.0) -> Path:
        """Checkpoint ``step`` in diffusers' format: ``unet/`` and ``scheduler/``; 0 for the usual moving average."""
        return self.generators / (f"step-{step:06d}" + (f"-ema-{ema_length:g}" if ema_length else ""))

    def made(self) -> list[Path]:
        """The folders that a command makes here, outermost first."""
        inside = [side / name for side in (self.release, self.private) for name in ("synthetic", "figures")]
        inside += [self.student_folder, self.generators, self.shadows, self.shadow_students, self.state]
        inside += [self.ablation, self.ablation_students]
        inside += [self.canaries, self.twin_teachers, self.twin_students]
        return [self.out, self.release, self.private, *inside, self.shared]

    def pages(self, shows_private: bool) -> Path:
        """Where pages lie: in ``private/`` where they show real images or single records because that was asked for,
        or where ``release/`` holds nothing but what a guarantee covers."""
        return self.private if shows_private or self.guaranteed else self.release

    def make(self) -> "Folder":
        """Create the two folders and the text beside them, where they are missing."""
        for path in (self.release, self.private):
            path.mkdir(parents=True, exist_ok=True)
        path, text = self.out / README, readme(self.guaranteed)
        other = readme(not self.guaranteed).encode()  # of a run with other options that never began
        if not path.exists() or path.read_bytes() == other:
            files.write_text(path, text)
        return self

    def check(self, where: str, argument: str) -> "Folder":
        """Refuse a folder with a configuration but without ``private/``: that of an older version."""
        if not self.private.is_dir():
            rule = f"hold {RELEASE}/ and {PRIVATE}/ (an older kr-fast wrote another layout: make the run again)"
            fail(where, argument, rule, self.out)
        return self


def readme(guaranteed: bool = False) -> str:
    """The text of ``README.txt``; ``guaranteed``: as of :class:`Folder`."""
    lines = ["What lies in this folder, and who may have it", ""]
    for folder, entries in (GUARANTEED if guaranteed else ENTRIES).items():
        heading = COVERED if guaranteed and folder == RELEASE else HEADING[folder]
        lines += [*textwrap.wrap(heading, 110), ""]
        for name, words in entries.items():
            lines += textwrap.wrap(f"{name}: {words}.", 106, initial_indent="  ", subsequent_indent="      ")
        lines.append("")
    return "\n".join(lines)
