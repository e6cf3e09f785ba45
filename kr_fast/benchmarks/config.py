"""The options of ``kr-fast bench``, and the case of synthesis that they describe."""

import dataclasses

import torch

from kr_fast.models import unet
from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import check, option

CLASSES = 10
PROVIDERS = ("documented", "loop", "compile", "kr_fast")
# Untrained networks of the sizes that people train: time does not depend on the weights.
MODELS = {
    "digits": lambda: unet(8, 8, 1, CLASSES, widths=(32, 64)),
    "unet28": lambda: unet(28, 28, 1, CLASSES, widths=(32, 64, 64)),
    "unet32": lambda: unet(32, 32, 3, CLASSES, widths=(128, 256, 256, 256), layers=2),
}
DEVICE = option("auto", "where it runs", choices=("auto", "cpu", "cuda"))
THREADS = option(0, "CPU threads; 0 for torch's choice", least=0, most=4096)
COMPARE = option(
    "", "KIND.json of an earlier run, or a folder of them: exit with 3 where a ratio to a baseline has fallen"
)
MARGIN = option(0.1, "relative fall of a ratio that --compare allows", least=0, most=1)
FORMATS = ("npy", "npz", "webdataset", "parquet", "device", "none")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: ``images`` images in micro-batches of ``batch``."""

    model: str
    scheduler: str
    steps: int
    batch: int
    images: int
    guidance_scale: float | None
    format: str | None
    device: str
    threads: int

    @property
    def evaluations(self) -> int:
        """Network evaluations per image."""
        return self.steps * (1 if self.guidance_scale is None else 2)


@dataclasses.dataclass(frozen=True)
class CasesConfig:
    """How ``kr-fast bench loss``, ``training``, ``privacy``, ``models``, ``audit`` and ``all`` measure."""

    only: tuple[str, ...] = option((), "baselines beside kr_fast, such as eager or compiled; all of them without")
    cases: str = option("", "only cases whose names hold this text")
    repeats: int = option(5, "timed runs of each; the median counts", least=1, most=1_000_000)
    device: str = DEVICE
    threads: int = THREADS
    out: str = option("bench-results", "folder for KIND.json and KIND.png")
    compare: str = COMPARE
    margin: float = MARGIN

    def __post_init__(self):
        check(self, "bench")

    @property
    def where(self) -> str:
        """The device. Raises: UserError for a GPU that is not there."""
        return _device(self.device)


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What ``kr-fast bench synthesis`` measures."""

    model: str = option(
        "unet28",
        "untrained network to sample: unet28 has 1.7 M weights, unet32 the widths of ddpm-cifar10",
        choices=tuple(MODELS),
    )
    scheduler: str = option("DDIMScheduler", "diffusers scheduler")
    steps: int = option(10, "solver steps", least=1, most=10000)
    batch: int = option(64, "images in one network call", least=1, most=1_000_000)
    images: int = option(
        0, "images in one timed run; 0 for four batches on a GPU, two on a CPU", least=0, most=1_000_000_000
    )
    guidance_scale: float = option(1.0, "classifier-free guidance; 1 for none", least=0, most=100)
    format: str = option("npy", "sink of the end-to-end rate", choices=FORMATS)
    providers: tuple[str, ...] = option(
        PROVIDERS,
        "documented (float32, PNG by PIL), loop (channels_last, half precision on a GPU), compile (that loop under "
        "torch.compile), kr_fast",
        choices=PROVIDERS,
    )
    repeats: int = option(3, "timed runs; the fastest counts", least=1, most=1_000_000)
    device: str = DEVICE
    threads: int = THREADS
    out: str = option("bench-results", "folder for synthesis.json and synthesis.png")
    compare: str = COMPARE
    margin: float = MARGIN

    def __post_init__(self):
        check(self, "bench")
        if not self.providers:
            fail("bench", "providers", "name at least one", "none")

    def case(self) -> Case:
        """The case on this machine. Raises: UserError for a GPU that is not there."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Case)}
        values["guidance_scale"] = None if self.guidance_scale == 1 else self.guidance_scale
        values["format"] = None if self.format == "none" else self.format
        values["device"] = _device(self.device)
        values["images"] = self.images or self.batch * (4 if values["device"] == "cuda" else 2)
        values["threads"] = self.threads or torch.get_num_threads()
        return Case(**values)


def _device(name: str) -> str:
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        fail("bench", "device", "be cpu or auto where there is no GPU", name)
    return ("cuda" if gpu else "cpu") if name == "auto" else name
