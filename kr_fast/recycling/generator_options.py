"""What options of the generator and its training may be together."""

from typing import Any

from kr_fast.runtime.errors import fail


def check_generator(config: Any) -> None:
    """Refuse what cannot work together in a :class:`RecycleConfig`. Raises: UserError naming the option."""
    if config.generator_stop_above < 1 and (config.budget or config.generator):
        other = "generator, a given one" if config.generator else "budget, whose rounds end by short Students"
        fail("run", "generator_stop_above", f"be 1 with {other}", config.generator_stop_above)
    if config.budget and config.generator_ema != type(config).generator_ema:
        rule = "be left out with budget, whose average of the weights remembers a share of all steps"
        fail("run", "generator_ema", rule, config.generator_ema)
    if config.generator and config.budget:
        fail("run", "budget", "be left out with generator, a given one, which no time is divided with", config.budget)
    if config.generator and config.audit_generator == "retrained":
        rule = "be shared with generator, a given one, which cannot be trained again"
        fail("run", "audit_generator", rule, config.audit_generator)
    if not config.generator_widths:
        fail("run", "generator_widths", "hold channel counts above 0", list(config.generator_widths))
    if config.generator_augment and not (config.generator_shift or config.generator_rotate or config.generator_scale):
        rule = "be 0 unless generator_shift, generator_rotate or generator_scale is above 0"
        fail("run", "generator_augment", rule, config.generator_augment)
    if config.checkpoints > (most := max(config.generator_steps // 2, 1)):
        rule = f"be at most {most}, the steps in the second half of generator_steps"
        fail("run", "checkpoints", rule, config.checkpoints)
    if config.few_steps and config.budget:
        fail("run", "few_steps", "be 0 with budget, which keeps no share for its training", config.few_steps)
    if config.few_steps and config.generator:
        fail("run", "few_steps", "be 0 with generator, a given one, which is not trained", config.few_steps)
    if config.few_steps and config.generator_objective == "epsilon":  # the noise is known there, and the image is not
        rule = "be 0 with generator_objective epsilon, by which a network says nothing of an image in pure noise"
        fail("run", "few_steps", rule, config.few_steps)
