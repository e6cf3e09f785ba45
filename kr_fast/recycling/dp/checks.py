"""The data against the options of differential privacy: what cannot be covered is refused, what must be known noted."""

from kr_fast.data.pixel_range import OVER_ALL
from kr_fast.privacy.accounting import check_target
from kr_fast.recycling.context import Context
from kr_fast.recycling.dp import ledger, spending
from kr_fast.runtime.errors import fail


def check(context: Context) -> list[str]:
    """Notes on a run with epsilon. Raises: UserError naming the option; also for a target that no noise reaches."""
    c, data = context.config, context.data
    if not c.epsilon:
        return []
    records = len(data.train)
    check_target("run", c.epsilon, c.delta, records)
    for name in ("teacher_batch_size", "generator_batch_size"):
        if (size := getattr(c, name)) > records:
            rule = f"be at most the {records} training images, each of which is in a step with a probability"
            fail("run", name, rule, size)
    if any(OVER_ALL in note for note in data.notes):
        rule = "hold pixels of a known range with epsilon: a window by percentiles over all images is not noised"
        fail("run", "data", f"{rule}; bring them to 8 bit by a window that is fixed beforehand", c.data)
    ledger.noise(context)
    notes = []
    if c.delta * records > 1:
        words = "a mechanism that publishes each of them whole with probability delta would satisfy the guarantee"
        notes.append(f"delta is {c.delta:g}, above 1 / {records} training images: {words}; take one well below")
    if data.train.groups is not None:
        notes.append(
            "epsilon is for one image: of a patient or another group with several images more may be told, up to as "
            "many times epsilon"
        )
    return notes


def describe(context: Context) -> list[str]:
    """The plan of a run with epsilon in lines for a reader."""
    c = context.config
    steps = [
        f"privacy: {name}: {own.steps:,} steps of {own.expected_batch_size:,.0f} images on average, noise multiplier "
        f"{own.noise_multiplier:.4g}"
        for name, own in ledger.noise(context).items()
    ]
    counts = "noised" if spending.counts_are_read(c) else "unused" if c.label_plan == "balanced" else "public"
    return [f"privacy: epsilon {c.epsilon:g} at delta {c.delta:g}, class counts {counts}", *steps]
