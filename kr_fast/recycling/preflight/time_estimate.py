"""An estimate of the time of each stage: a few steps of each network are timed and extrapolated."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kr_fast.data import Split
from kr_fast.ensemble import accuracy, fit
from kr_fast.ensemble.inference.queries import AUGMENTS
from kr_fast.ensemble.training.recipe import Steps
from kr_fast.membership.attacks.control import overfitted_recipe
from kr_fast.recycling import given
from kr_fast.recycling.budget.ledger import DIVIDED
from kr_fast.recycling.budget.planner import Costs, Sizes
from kr_fast.recycling.commands import of_command
from kr_fast.recycling.context import Context
from kr_fast.recycling.preflight import networks
from kr_fast.recycling.preflight.networks import make_generator
from kr_fast.recycling.stages import shadows, teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.distillation.student_training import Schedule
from kr_fast.recycling.stages.generation import checkpoints, generator, generator_attack, memorisation, tuning
from kr_fast.recycling.stages.generation import few_step as few_steps
from kr_fast.recycling.stages.generation.augmentation import condition
from kr_fast.recycling.stages.generation.generator_loss import batch_loss, make_scheduler
from kr_fast.recycling.stages.generation.sampling import Sampling, default_sampling, few_step_sampling, network_calls
from kr_fast.recycling.stages.generation.search_space import costliest
from kr_fast.synthesis import Sampler
from kr_fast.synthesis.optimized.optimize import optimize
from kr_fast.training import AdamW
from kr_fast.training.precision import autocast

BUDGET = 0.3  # seconds of one measurement, approximately
STEPS = 3  # of a training at a time
PRIVATE = 1.6  # of a private step, beside a plain one on as many rows
ATTACKS, REPORT, WORKER = 1.0, 2.0, 1.5  # seconds of the attacks, the report, and the start of a worker process


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds per image: trained on, sampled (one network call), evaluated; ``setup``: for making a sampler.

    0 for what the command does not do.
    """

    teacher: float
    shadow: float
    control: float
    student: float
    shadow_student: float
    generator: float
    sampled: float
    setup: float
    evaluated: float


def measure(context: Context) -> Rates:
    """Time each kind of step that the command takes on this machine. Nothing is written; no network of the run is
    touched."""
    c = context.config
    distils = bool(of_command(c, {"gkd": True}))  # as every command with a Teacher does
    rates = dict.fromkeys((field.name for field in dataclasses.fields(Rates)), 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch, share = min(c.student_batch_size, c.images), c.generator_batch_size // context.runtime.world_size
        start = time.perf_counter()
        sample = given.work(context) if c.generator else sampling(context)
        sample(1)
        rates["setup"] = time.perf_counter() - start
        rates["sampled"] = _rate(sample, c.micro_batch)
        if not c.generator:
            rates["generator"] = _rate(denoising(context), share)
        if distils:
            arch, recipe = (c.teacher_arch, c.teacher_width), teacher.recipe(context)
            teacher_model = teacher.build(context).eval() if c.teacher else _network(context, *arch)
            half = max((len(context.data.train) + len(context.data.test)) // 2, 1)
            of_train, of_half = (Steps.of(recipe, count).batch for count in (len(context.data.train), half))
            rates["student"] = _rate(_distilling(context, teacher_model), batch)
            rates["evaluated"] = _rate(lambda count: accuracy(teacher_model, _split(context, count)), 1024)
            if not c.teacher:
                rates["teacher"] = _rate(_training(context, arch, recipe), of_train)
            if c.num_shadows and c.audit_control:
                rates["control"] = _rate(_training(context, arch, overfitted_recipe(recipe)), of_train)
            with _threads(1 if shadows.workers(context) > 1 else torch.get_num_threads()):
                if c.num_shadows:
                    rates["shadow"] = _rate(_training(context, arch, recipe), of_half)
                if c.num_students:
                    rates["shadow_student"] = _rate(_distilling(context, _network(context, *arch)), batch)
    return Rates(**rates)


def work(context: Context) -> dict[str, float]:
    """The work of each stage, in operations of its networks: nothing is timed.

    A training step is three forward passes; distillation also evaluates the Teacher. Empty with a given generator: most
    of the work is to draw its images, and what that takes is not known.
    """
    if context.config.generator:
        return {}
    sizes = networks.sizes(context)
    evaluated, student, denoised = (each.operations for each in (sizes.teacher, sizes.student, sizes.generator))
    trained, distilled = 3.0 * evaluated, 3.0 * student + evaluated
    sampling = {"generator": 3.0 * denoised, "sampled": float(denoised), "setup": 0.0}
    rates = Rates(trained, trained, trained, distilled, distilled, **sampling, evaluated=float(evaluated))
    return stages(context, rates)


def stages(context: Context, rates: Rates) -> dict[str, float]:
    """Seconds of each stage; where tuning decides the cost of an image, the mean of the lowest and the highest."""
    c, data = context.config, context.data
    world, workers = context.runtime.world_size, shadows.workers(context)
    pool, recipe = len(data.train) + len(data.test), teacher.recipe(context)
    validation = len(data.val) * rates.evaluated

    def trained(count: int, epochs: int, rate: float) -> float:
        steps = Steps.of(recipe, count)
        return epochs * steps.batch * steps.per_epoch * rate

    def drawn(count: int, sampling: Sampling) -> float:
        whole = -(-count // c.micro_batch) * c.micro_batch
        return whole * network_calls(sampling) * rates.sampled

    def distilled(periods: int, count: int, epochs: int, rate: float) -> float:
        batch = min(c.student_batch_size, count)
        return periods * (epochs * (count // batch) * batch * rate + validation)

    def short(sampling: Sampling, length: int = 1) -> float:
        each = gkd.trial_schedule(c, sampling, length)
        images = (1 if c.fixed_images else each.periods) * drawn(each.images, sampling)
        return rates.setup + images + distilled(each.periods, each.images, each.epochs, rates.student)

    usual = default_sampling(context, 0)
    most, few_step = costliest(c, usual), 0.0
    more = gkd.most_drawn(c) / (c.periods * c.images)  # where tuning may draw sets anew more often
    drawing = (drawn(c.images, usual) + more * drawn(c.images, most)) / 2
    if c.few_steps:  # an image of it costs the same whatever tuning decides
        few = few_step_sampling(usual, c.few_steps)
        drawing = (1 + more) / 2 * drawn(c.images, few)
        calls = [network_calls(few_steps.many_step(each, c.few_steps)) for each in (usual, most)]
        few_step = c.few_step_training * c.generator_batch_size * rates.generator
        few_step += few_steps.drawn_images(c) * sum(calls) / 2 * rates.sampled
    drawings = (1 if c.fixed_images else c.periods) * drawing
    private = PRIVATE if c.epsilon else 1.0
    training = private * trained(len(data.train), c.teacher_epochs, rates.teacher) + c.teacher_epochs * validation
    saved = generator.checkpoint_steps(c.generator_steps, c.checkpoints)
    denoising = private * c.dp_multiplicity if c.epsilon else 1.0
    memorised = 0.0 if c.epsilon else len(saved) * (rates.setup + drawn(memorisation.IMAGES, usual))
    seconds = {
        "teacher": validation if c.teacher else training,
        "generator": denoising * c.generator_steps * (c.generator_batch_size // world) * rates.generator + memorised,
        "checkpoints": sum(count * short(usual, length) for count, length in checkpoints.trials_of(c)),
        "tuning": sum(short(each, length) * count for each, length, count in tuning.expected(c, usual)),
        **({"few_step": few_step + 2 * rates.setup + (0.0 if c.epsilon else short(few))} if c.few_steps else {}),
        "gkd": drawings + distilled(c.periods, c.images, c.student_epochs, rates.student),
        "student": (3 * len(data.test) + 2 * min(c.images, len(data.train))) * rates.evaluated,  # and features
    }
    if c.ablation:  # the run's Student leaves its sets, which are all or one
        seconds["ablation"] = 3 * distilled(c.periods, c.images, c.student_epochs, rates.student)
        seconds["ablation"] += c.periods * drawing - drawings + 4 * (len(data.val) + len(data.test)) * rates.evaluated
    if c.num_shadows:
        turns, start = _turns(c.num_shadows, world, workers), WORKER if workers > 1 else 0.0
        seconds["shadows"] = start + turns * trained(pool // 2, c.teacher_epochs, rates.shadow)
        denoised = _denoised(context, rates)
        student, students = distilled(c.periods, c.images, c.student_epochs, rates.shadow_student), 0.0
        if c.audit_canaries:
            each = trained(len(data.train) - c.audit_canaries // 2, c.teacher_epochs, rates.shadow)
            seconds["canaries"] = start + turns * (each + c.teacher_epochs * validation)
            twins = _turns(c.num_students, world, workers)
            seconds["canary_students"] = start * bool(twins) + twins * student
        if c.num_students:
            each = student
            if c.retrains_generators:
                each += c.generator_steps * c.generator_batch_size * rates.generator + few_step + drawings + denoised
            if c.ablation:  # on sets that are there, or drawn by the same retrained generators
                each += student + c.retrains_generators * (c.periods if c.fixed_images else 1) * drawing
            students = start + _turns(c.num_students, world, workers) * each
        seconds["shadow_students"] = students
        models = c.num_shadows + (2 if c.ablation else 1) * c.num_students + 3
        seconds["audit"] = ATTACKS + models * pool * len(AUGMENTS[c.audit_augment]) * rates.evaluated
        seconds["audit"] += denoised * (1 if c.retrains_generators else 2)  # of an early checkpoint too
        if c.audit_control:
            beside = workers if c.num_students else 1  # shadow Students: its time counts as the audit's all the same
            seconds["audit"] += trained(len(data.train), overfitted_recipe(recipe).epochs, rates.control) / beside
    seconds["report"] = REPORT
    return of_command(c, seconds)


def costs(context: Context, rates: Rates) -> tuple[Costs, dict[str, float]]:
    """What a budget is divided by, and seconds of the stages that it does not change."""
    c, world = context.config, context.runtime.world_size
    seconds = stages(context, rates)
    validation = len(context.data.val) * rates.evaluated
    turns = _turns(c.num_students, world, shadows.workers(context))
    retrained = turns if c.audit_generator == "retrained" else 0
    students = turns * rates.shadow_student / rates.student
    twins = students if c.audit_canaries else 0.0
    fixed = {stage: value for stage, value in seconds.items() if stage not in DIVIDED}
    if retrained:  # the rest of that stage is divided
        fixed["shadow_students"] = turns * _denoised(context, rates)
    return Costs(
        step=c.generator_batch_size // world * rates.generator,
        image=network_calls(default_sampling(context, 0)) * rates.sampled,
        trained=rates.student,
        trial=rates.setup + validation,
        period=validation,
        generators=1.0 + retrained * world,
        drawings=1.0 + retrained,  # shadow Students that share images learn from the Student's own
        students=1.0 + students + twins,
        twins=twins,
    ), fixed


def asked(context: Context) -> Sizes:
    """What the data and the configuration ask of a budget."""
    c, data = context.config, context.data
    batch = min(c.student_batch_size, c.images)
    tuned = round(sum(length * count for _, length, count in tuning.expected(c, default_sampling(context, 0))))
    steps = -(-len(data.train) // c.generator_batch_size)
    return Sizes(steps, max(c.trial_images, batch), c.images, batch, tuned, len(data.val))


def _denoised(context: Context, rates: Rates) -> float:
    """Of one checkpoint, for the attack on the generator's weights."""
    return generator_attack.network_calls(context) * rates.sampled if context.config.attacks_generator else 0.0


def _turns(models: int, world: int, workers: int) -> int:
    return -(-models // world // workers)


def _rate(run: Callable[[int], Any], most: int) -> float:
    """Seconds an image of ``run(count)``, which handles ``STEPS`` batches or one of ``count`` images, at ``most``.

    Where ``most`` images take longer than the budget allows, fewer are timed. The shorter of two times counts: what
    else happens on a machine only adds to it.
    """
    count = min(most, 8)
    run(count)  # warms up
    rate = _timed(run, count)
    if count < most:
        count = max(count, min(most, int(count * BUDGET / max(rate * count, 1e-6))))
        rate = _timed(run, count)
    return min(rate, _timed(run, count))


def _timed(run: Callable[[int], Any], count: int) -> float:
    _wait()
    start = time.perf_counter()
    images = run(count)
    _wait()
    return (time.perf_counter() - start) / (images if isinstance(images, int) else count)


def _wait() -> None:
    if torch.cuda.is_available():  # needs a GPU
        torch.cuda.synchronize()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _network(context: Context, arch: str, width: int) -> nn.Module:
    return context.network(arch, width).to(context.runtime.device).eval()


def _split(context: Context, count: int) -> Split:
    """``count`` training images, the same ones again where there are not as many."""
    return context.data.train.rows(torch.arange(count) % len(context.data.train))


def _training(context: Context, arch: tuple[str, int], recipe: Any) -> Callable[[int], int]:
    def run(count: int) -> int:
        split = _split(context, STEPS * count)
        options = {"seed": 0, "precision": context.precision.classifiers}
        fit(_network(context, *arch), split, dataclasses.replace(recipe, epochs=1, batch_size=count), **options)
        return len(split)

    return run


def _distilling(context: Context, teacher_model: nn.Module) -> Callable[[int], int]:
    c = context.config
    without_validation = dataclasses.replace(context, data=dataclasses.replace(context.data, val=_split(context, 1)))

    def run(count: int) -> int:
        split = _split(context, STEPS * count)
        synthetic = (torch.arange(len(split)), split.labels, split.images.to(context.runtime.device))
        student = _network(context, c.student_arch, c.student_width)
        options = {"student_batch_size": count, "student_choose": "accuracy"}  # one image has no AUC
        changed = dataclasses.replace(without_validation, config=dataclasses.replace(c, **options))
        schedule = Schedule((1,), len(split), 1)
        gkd.distil(changed, teacher_model, student, lambda _: synthetic, schedule, confidence=0.0, seed=0)
        return len(split)

    return run


def denoising(context: Context) -> Callable[[int], int]:
    """``run(count)``: STEPS steps of the generator on batches of ``count``; returns the number of images."""
    c, device = context.config, context.runtime.device
    network = make_generator(context)
    condition(network, c)
    network, precision = generator.for_training(context, network.to(device).train()), context.precision.generator
    optimizer = AdamW(network.parameters(), lr=1e-4, max_grad_norm=1.0, ema_decay=c.generator_ema)
    split = _split(context, min(len(context.data.train), 256))
    images, labels = split.images.to(device), split.labels.to(device)

    def run(count: int) -> int:
        config = dataclasses.replace(c, generator_batch_size=count)
        changed = dataclasses.replace(context, config=config)
        for step in range(STEPS):
            with autocast(device, precision):
                loss = batch_loss(changed, network, images, labels, step, 0, torch.arange(count))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return STEPS * count

    return run


def sampling(context: Context) -> Callable[[int], int]:
    """``run(count)``: two solver steps of ``count`` images; returns the number of images that the network processed."""
    c = context.config
    network = make_generator(context).to(context.runtime.device).eval()
    optimize(network)
    scheduler = make_scheduler(c.generator_objective)

    def run(count: int) -> int:
        sampler = Sampler(network, scheduler, 2, seed=0, micro_batch=count, crop=context.data.image_shape[:2])
        ids = torch.arange(count)
        sampler(ids, ids % context.data.num_classes)
        return 2 * count

    return run
