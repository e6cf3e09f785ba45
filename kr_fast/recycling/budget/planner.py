"""How a run's time is divided, in numbers of steps: pure arithmetic on what each kind of work was measured to cost.

No work is stopped by a clock. How many steps, images and periods come next is decided between two pieces of work, from
what the earlier ones took, and written down before the next one begins: a killed run continues with the same steps.
"""

import dataclasses
import math
from collections.abc import Sequence

GENERATOR, TRIALS = 0.5, 0.12  # shares of the time that is divided; the Student and its shadows get the rest
ROUNDS, GROWTH = 6, 1.5  # of the generator's training: at most so many, and by what factor their ends grow
WORTHWHILE = 1.1  # times the steps so far, below which no further round is begun
PASSES = (3, 10)  # a Student's passes over its images: so many that they cost about as much as drawing the images
MOST_TRIAL_IMAGES = 4096
CYCLES, CYCLE_STEPS = 4, 300  # of the Student at first: at most so many, the shortest of at least so many steps
GAIN = 0.002  # relative decrease of the generator's validation loss that counts as one
PACE = 1.5  # work that takes so many times as long as such work took before, or as short, changes all costs
NOTICE = 0.01  # of the budget: the least difference that is taken for a change of the machine


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of each kind of work.

    Attributes:
        step: of the generator's training.
        image: of drawing a synthetic image.
        trained: of a Student's pass over one image.
        trial, period: of a short Student, and of a period of a Student, besides images and passes.
        generators, drawings, students: what run and shadows pay together for ``step``, ``image`` and ``trained``, as
            multiples of what the run alone pays.
        twins: the part of ``students`` that twin Students pay, which learn from canaries' Teachers.
    """

    step: float
    image: float
    trained: float
    trial: float
    period: float
    generators: float = 1.0
    drawings: float = 1.0
    students: float = 1.0
    twins: float = 0.0

    def scaled(self, generator: float, student: float) -> "Costs":
        """With other seconds for a step of the generator, and for all that Students do."""
        names = ("image", "trained", "trial", "period")
        students = {name: getattr(self, name) * student for name in names}
        return dataclasses.replace(self, step=self.step * generator, **students)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What data and configuration ask for.

    Attributes:
        pass_steps: of the generator, in which it sees as many images as there are.
        trial_images: the least of a short Student.
        images, batch: of a period, and of a step of the Student.
        tuned: short Students of the tuning.
        validation: real images on which everything is chosen.
    """

    pass_steps: int
    trial_images: int
    images: int
    batch: int
    tuned: int
    validation: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers of steps.

    Attributes:
        rounds: step of the generator at the end of each round.
        trial_images: synthetic images of a short Student.
        passes: of Students, short or not, over the images of a period.
        cycles: periods of each of the Student's cycles.
    """

    rounds: tuple[int, ...]
    trial_images: int
    passes: int
    cycles: tuple[int, ...]


def passes(costs: Costs) -> int:
    """Passes over an image that cost about as much as drawing it, in ``PASSES``."""
    low, high = PASSES
    return min(max(round(costs.image / costs.trained), low), high)


def least(costs: Costs, sizes: Sizes) -> Plan:
    """One pass of each stage: a round in which the generator sees each image once, the trials, one period."""
    return Plan((sizes.pass_steps,), sizes.trial_images, passes(costs), (1,))


def divide(costs: Costs, sizes: Sizes, seconds: float) -> Plan:
    """The plan that takes about ``seconds``; :func:`least` where they are not enough for more."""
    each = TRIALS * seconds / (ROUNDS + sizes.tuned) - costs.trial
    images = int(each / (costs.image + passes(costs) * costs.trained)) // sizes.batch * sizes.batch
    images = max(min(images, MOST_TRIAL_IMAGES), sizes.trial_images)
    steps = int(GENERATOR * seconds / (costs.step * costs.generators))
    while True:
        ends = rounds(0, max(steps, sizes.pass_steps), sizes.pass_steps)
        plan = Plan(ends, images, passes(costs), ())
        left = seconds - total(costs, sizes, plan)
        if left >= period_seconds(costs, sizes, plan.passes):
            break
        if images > sizes.trial_images:
            images = max(images // 2, sizes.trial_images)
        elif steps > sizes.pass_steps:
            steps = int(steps * 0.8)
        else:
            return least(costs, sizes)
    count = int(left / period_seconds(costs, sizes, plan.passes))
    return dataclasses.replace(plan, cycles=cycles(count, period_steps(sizes, plan.passes)))


def rounds(done: int, last: int, pass_steps: int) -> tuple[int, ...]:
    """Ends of the rounds after step ``done`` up to ``last``, each about ``GROWTH`` times the one before; () for none.

    The first of all has at least ``pass_steps``.
    """
    if last < WORTHWHILE * done:
        return ()
    first = done or min(max(last / GROWTH ** (ROUNDS - 1), pass_steps), last)
    number = max(min(round(math.log(last / first) / math.log(GROWTH)), ROUNDS), int(done > 0))
    ends = [round(first * (last / first) ** (k / max(number, 1))) for k in range(number + 1)]
    return tuple(sorted({*(end for end in ends if done < end < last), last}))


def period_steps(sizes: Sizes, of_images: int) -> int:
    """Steps of the Student in a period of ``of_images`` passes."""
    return max(sizes.images // sizes.batch, 1) * of_images


def period_seconds(costs: Costs, sizes: Sizes, of_images: int, *, own: bool = False) -> float:
    """Seconds of a period of ``of_images`` passes of the Student and its shadows, or of the Student's ``own``."""
    drawn, trained = sizes.images * costs.image, sizes.images * of_images * costs.trained + costs.period
    return drawn + trained if own else costs.drawings * drawn + costs.students * trained


def cycles(count: int, steps: int) -> tuple[int, ...]:
    """``count`` periods of ``steps`` steps in up to ``CYCLES`` cycles, each twice as long as the one before."""
    number = CYCLES
    while number > 1 and count // (2**number - 1) * steps < CYCLE_STEPS:
        number -= 1
    lengths = [count // (2**number - 1) << k for k in range(number)]
    return (*lengths[:-1], count - sum(lengths[:-1]))


def next_cycle(done: Sequence[int], left: int, steps: int) -> int:
    """Periods of the cycle after ``done`` where ``left`` more can be paid for; 0 for none that is long enough."""
    if not done:
        return cycles(max(left, 1), steps)[0]
    following = 2 * done[-1]
    if 2 * left < done[-1]:
        return 0
    return following if left >= 3 * following else left


def trial_seconds(costs: Costs, plan: Plan) -> float:
    """Seconds of a short Student."""
    return costs.trial + plan.trial_images * (costs.image + plan.passes * costs.trained)


def stages(costs: Costs, sizes: Sizes, plan: Plan) -> dict[str, float]:
    """Seconds of each stage that a plan decides on."""
    steps, trial = plan.rounds[-1] if plan.rounds else 0, trial_seconds(costs, plan)
    periods = sum(plan.cycles)
    own = period_seconds(costs, sizes, plan.passes, own=True)
    of_twins = costs.twins * (sizes.images * plan.passes * costs.trained + costs.period)
    of_shadows = period_seconds(costs, sizes, plan.passes) - own - of_twins
    return {
        "generator": steps * costs.step + len(plan.rounds) * trial,
        "tuning": sizes.tuned * trial,
        "gkd": periods * own,
        **({"canary_students": periods * of_twins} if of_twins else {}),
        "shadow_students": periods * of_shadows + (costs.generators - 1) * steps * costs.step,
    }


def total(costs: Costs, sizes: Sizes, plan: Plan) -> float:
    """Seconds of all of :func:`stages`."""
    return sum(stages(costs, sizes, plan).values())


def improving(losses: Sequence[float], accuracies: Sequence[float], validation: int) -> bool:
    """Whether one of the generator's last two rounds brought something: its loss, or its short Student's accuracy.

    Args:
        losses, accuracies: of all rounds, on the same ``validation`` images; the loss with the same noise. A loss has
            to fall by ``GAIN`` of itself, an accuracy to rise by more than its standard error.
    """
    if len(losses) < 3:
        return True
    before, after = max(accuracies[:-2]), max(accuracies[-2:])
    return after > before + standard_error(before, validation) or min(losses[-2:]) < (1 - GAIN) * min(losses[:-2])


def standard_error(accuracy: float, count: int) -> float:
    """Of an accuracy on ``count`` images."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


def student_improves(accuracies: Sequence[float]) -> bool:
    """Whether one of the Student's last two cycles, of which these are the best accuracies, brought something."""
    return len(accuracies) < 3 or max(accuracies[-2:]) > max(accuracies[:-2])


def best_round(losses: Sequence[float], accuracies: Sequence[float], validation: int) -> int:
    """The round of the lowest validation loss among those whose short Student is within a standard error of the best.

    The loss tells apart what an accuracy on few images cannot, and rises where a generator repeats training images.
    """
    least = max(accuracies) - standard_error(max(accuracies), validation)
    return min((loss, index) for index, loss in enumerate(losses) if accuracies[index] >= least)[1]


def revised(costs: Costs, kind: str, planned: float, took: float, budget: float, first: bool) -> tuple[Costs, float]:
    """Costs after work of a ``kind``, generator or student, ``took`` other seconds than planned, and the pace.

    The pace is 1 unless such work, which had been timed before (not ``first``), took longer by ``PACE`` or shorter:
    then the machine has become slower or faster, and all costs change with it. A difference below ``NOTICE`` of the
    budget may be an accident of a short piece of work: it changes costs by ``PACE`` at most.
    """
    ratio = took / planned
    if abs(took - planned) < NOTICE * budget:
        ratio, first = min(max(ratio, 1 / PACE), PACE), True
    pace = ratio if not first and not 1 / PACE <= ratio <= PACE else 1.0
    return costs.scaled(*((ratio if each == kind else pace) for each in ("generator", "student"))), pace
