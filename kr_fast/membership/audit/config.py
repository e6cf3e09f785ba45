"""The options of ``kr-fast audit``, checked before anything is read or written."""

import dataclasses
from typing import Any, ClassVar

from kr_fast.data import TEST_FRACTION, VAL_FRACTION, Augment, ReadOptions
from kr_fast.ensemble import TrainConfig
from kr_fast.membership.audit.choices import Choices
from kr_fast.membership.verdict.limits import MOVABLE, Limits, limits_of
from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import check, option, option_of, record

SPLITS = ("train", "val", "test", "all")
SOURCES = {
    "signals": ("probabilities",),
    "lira_tree": ("target",),
    "privacy_meter": ("signal", "signal_name", "target"),
}
# Fields of Choices that are options of the same name and meaning.
SHARED = ("level", "delta", "priors", "random_members", "rmia_gamma", "rmia_offline_a", "rmia_predicate", "seed")
SHARED += ("leave_out_duplicates",)
OF_ALL = ("out", "attacks", "primary", "every_shadow", "show_real_images", "show_records", *SHARED, *MOVABLE)


@dataclasses.dataclass(frozen=True)
class AuditConfig(ReadOptions):
    """Configuration of ``kr-fast audit``."""

    GROUPS: ClassVar[dict[str, str]] = {
        "out": "folder",
        "model": "the model and the data",
        "shadows": "shadow models",
        "signals": "saved signals in place of models",
        "attacks": "attacks and figures",
        "fail_above": "verdict: the same command with other limits takes the figures that there are",
        "table": "how the data are read",
    }

    out: str = option("runs/audit", "folder of the audit; the same command continues one that was stopped")

    model: str = option(
        "", "pkg.mod:factory of the classifier, or resnet8, resnet14, resnet20, resnet32 (with -gn: GroupNorm)"
    )
    width: int = option(16, "channels of the first stage, for a resnet of this package", least=1, most=4096)
    checkpoint: tuple[str, ...] = option(
        (),
        "weights under attack, .safetensors or .pt state dicts: FILE, or NAME=FILE for several (shadows imitate the "
        "first), or NAME=FILE@MODEL for another architecture",
    )
    mean: tuple[float, ...] = option(
        (), "the model sees (x / 255 - mean) / std, by channel; nothing: x / 127.5 - 1", least=-10, most=10
    )
    std: tuple[float, ...] = option((), "see mean", above=0, most=10)
    data: str = option(
        "", "digits; .npz, .parquet or .tar file; folder of images or of a data set (docs/reference/data.md)"
    )
    cut: int = option(
        -1, "seed with which kr-fast run cut the splits that the data lack; -1 takes the data as they are", least=-1
    )
    val_fraction: float = option(
        VAL_FRACTION, "that run's share of training images for validation, with cut", above=0, below=1
    )
    test_fraction: float = option(
        TEST_FRACTION, "that run's share of all images for the test, with cut", above=0, below=1
    )
    members: str = option(
        "train", "splits (train,val), or an .npy, .txt or .csv file of indices, or of a mask (0 and 1) over all images"
    )
    non_members: str = option("auto", "likewise; auto: test, or all others where members are a file")
    population: str = option("auto", "further non-members: splits, a share of the non-members, none, or auto (val)")
    synthetic: str = option(
        "", ".npy file of released synthetic images, uint8 [S, H, W, C], which are then attacked too"
    )

    shadows: str = option("", "folder of shadow models (of train_shadows, or kr-fast run); empty: they are trained")
    kind: str = option(
        "auto",
        "full: the shadows were made as the first model under attack was; transfer: they were not, a lower "
        "bound; auto: transfer with shadows of yours or for another architecture, else full",
        choices=("auto", "full", "transfer"),
    )
    num_shadows: int = option(16, "shadow models to train, even; 64 and more for a release", least=4, most=10_000)
    epochs: int = option_of(TrainConfig, "epochs", "of a shadow: give the recipe of the model under attack")
    batch_size: int = option_of(TrainConfig, "batch_size", "of a shadow")
    learning_rate: float = option(
        TrainConfig.learning_rate, "peak of a shadow's one-cycle schedule", least=1e-6, most=10
    )
    weight_decay: float = option(TrainConfig.weight_decay, "of a shadow", least=0, most=1)
    label_smoothing: float = option_of(TrainConfig, "label_smoothing", "of a shadow")
    mixup: float = option_of(TrainConfig, "mixup", "alpha of a shadow's mixup, which mixes pairs of images; 0 for none")
    shift: int = option(0, "augmentation of a shadow: largest shift in pixels", least=0, most=224)
    flip: bool = option(False, "augmentation of a shadow: mirror half of the images")
    rotate: float = option(0.0, "augmentation of a shadow: largest angle in degrees", least=0, most=180)
    scale: float = option(0.0, "augmentation of a shadow: largest relative change of size", least=0, below=1)
    control: bool = option(True, "train a positive control, which the attacks must find")

    signals: str = option("", "an .npz file of saved logits or signals, in place of models (docs/audit/signals.md)")
    lira_tree: str = option("", "a folder of experiment-*/{keep,logits,scores}, in place of models")
    privacy_meter: str = option("", "a folder with memberships.npy and signals/, in place of models")
    signal: str = option(
        "probability",
        "what the arrays of privacy_meter hold: probability or loss",
        choices=("probability", "loss"),
    )
    signal_name: str = option("rmia", "first part of their names: signals/NAME_signals.npy")
    target: str = option("", "the experiment or model of such a folder under attack; empty: each from the others")
    probabilities: bool = option(False, "the saved logits are probabilities; take their logarithm")

    attacks: tuple[str, ...] = option((), "names of attacks (docs/audit/attacks.md); none for all of the default set")
    primary: str = option("", "the attack whose figures are the result; empty: lira")
    augment: str = option(
        Choices.augment, "queries of the attacks: none, flip, shift or lira", choices=("none", "flip", "shift", "lira")
    )
    every_shadow: bool = option(
        False, "attack shadows from each other by every attack, and those of sets that no target uses"
    )
    level: float = option_of(Choices, "level")
    delta: float = option_of(Choices, "delta")
    priors: tuple[float, ...] = option_of(Choices, "priors")
    random_members: bool = option_of(Choices, "random_members")
    rmia_gamma: float = option_of(Choices, "rmia_gamma")
    rmia_offline_a: float = option_of(Choices, "rmia_offline_a")
    rmia_predicate: str = option_of(Choices, "rmia_predicate")
    leave_out_duplicates: bool = option_of(Choices, "leave_out_duplicates")
    seed: int = option_of(Choices, "seed", "of shadows, control and splits")
    show_real_images: bool = option(False, "show the images of the most exposed members; the page then says so")
    show_records: bool = option(False, "name the most exposed members by index and score; the page then says so")

    fail_above: tuple[str, ...] = option_of(Limits, "fail_above")
    verdict_auc: float = option_of(Limits, "auc")
    verdict_records: int = option_of(Limits, "records")
    verdict_controls: bool = option_of(Limits, "controls")

    def __post_init__(self):
        check(self, "audit")
        self.check_reading("audit")
        given = [name for name in ("signals", "lira_tree", "privacy_meter") if getattr(self, name)]
        if len(given) > 1 or (given and (self.model or self.checkpoint or self.data)):
            rule = "be models (model, checkpoint, data) or one of signals, lira_tree, privacy_meter"
            also = [name for name in ("model", "checkpoint", "data") if getattr(self, name)]
            fail("audit", "input", rule, ", ".join([*given, *also]))
        if not given:
            for name in ("model", "checkpoint", "data"):
                if not getattr(self, name):
                    fail("audit", name, "be given (or signals, lira_tree or privacy_meter)", "nothing")
        if bool(self.mean) != bool(self.std):
            fail("audit", "mean and std", "be given together", f"mean {list(self.mean)}, std {list(self.std)}")
        if len(self.mean) != len(self.std):
            got = f"{len(self.mean)} and {len(self.std)}"
            fail("audit", "mean and std", "hold as many numbers as each other", got)
        if self.num_shadows % 2:
            fail("audit", "num_shadows", "be even and at least 4", self.num_shadows)
        self._refuse_idle(given[0] if given else "")
        for name, usual in (("val_fraction", VAL_FRACTION), ("test_fraction", TEST_FRACTION)):
            if self.cut < 0 and getattr(self, name) != usual:
                fail("audit", name, "be left out without cut, where it does nothing", getattr(self, name))
        self.choices()

    def _refuse_idle(self, source: str) -> None:
        """Refuse what would do nothing with this source of signals; "" for models."""
        of_saved = {name for names in SOURCES.values() for name in names} | set(SOURCES)
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            used = name in (source, *SOURCES[source]) if source else name not in of_saved
            if not used and name not in OF_ALL and value != field.default:
                text = " ".join(map(str, value)) if isinstance(value, tuple) else value
                fail("audit", name, f"be left out with {source or 'models'}, where it does nothing", text)

    @property
    def saved(self) -> bool:
        """Whether signals were saved before."""
        return bool(self.signals or self.lira_tree or self.privacy_meter)

    def record(self) -> dict[str, Any]:
        """The configuration as plain values, without ``out``."""
        return record(self)

    def choices(self) -> Choices:
        """What is fixed before a score is seen. Raises: UserError naming the option."""
        return Choices(
            attacks=self.attacks or None,
            primary=self.primary or None,
            targets="shadows" if self.every_shadow else "given",
            augment=self.augment,
            limits=limits_of(self),
            **{name: getattr(self, name) for name in SHARED},
        )

    def recipe(self) -> TrainConfig:
        """How shadows are trained."""
        names = ("epochs", "batch_size", "learning_rate", "weight_decay", "label_smoothing", "mixup")
        augment = Augment(self.shift, self.flip, self.rotate, self.scale)
        return TrainConfig(**{name: getattr(self, name) for name in names}, augment=augment)
