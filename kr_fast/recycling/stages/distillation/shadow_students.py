"""Shadow Students: shadow pipelines, so that the Student is attacked with models that were trained as it was.

Shadow Student ``k`` learns the soft labels of shadow Teacher ``k`` by the Student's own recipe. Its images come from

- ``shared``: this run's generator. They are the images that the Student saw, drawn once for all shadow Students. The
  generator was trained on all members, so no shadow Student shows what it leaks of a member: the audit then covers the
  path through the labels only.
- ``retrained``: a generator trained on shadow Teacher ``k``'s half by the run's recipe, as long as the chosen
  checkpoint was, and made few-step where the run's is. How well it takes noise off each image is kept for the attack
  on the generator's weights, and how near its images come to each record for the one on the released images.

With an ablation there is a second set of them, which differ in that alone in which the ablation's Student with the
run's labels differs from the Student: one synthetic set for all periods, or a new one each. Weights, shuffles, Teachers
and retrained generators are the same.

Sampling is as it was tuned for the run; the period is chosen on the validation split, as the Student's. Models are
shared out over the ranks, and on a CPU over processes of one thread each.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kr_fast.data import Split
from kr_fast.ensemble import Shadows, load_shadows
from kr_fast.ensemble.shadows import data_digest, recipe_record
from kr_fast.recycling.context import Context
from kr_fast.recycling.drawing import Draw, KeptSets, ahead
from kr_fast.recycling.stages import control, shadows
from kr_fast.recycling.stages.distillation import ablation, gkd, nearest_images, student
from kr_fast.recycling.stages.generation import few_step, generator, generator_attack
from kr_fast.recycling.stages.generation.sampling import Sampling, student_sampling, tuned_sampling
from kr_fast.runtime import seeds
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage import files


@dataclasses.dataclass(frozen=True)
class Job:
    """The training of shadow Students, as worker processes receive it."""

    context: Context
    of_ablation: bool = False

    @property
    def folder(self) -> Path:
        """Folder of the models."""
        folder = self.context.folder
        return folder.ablation_students if self.of_ablation else folder.shadow_students

    @property
    def sampling(self) -> Sampling:
        """As the Student's images are drawn."""
        return student_sampling(self.context)

    @property
    def shared(self) -> KeptSets | None:
        """The sets that all shadow Students learn from; None where each has its own."""
        retrained = self.context.config.audit_generator == "retrained"
        return None if retrained else gkd.shared_sets(self.context, self.sampling)

    def retrained(self, index: int) -> Draw:
        """Images of the generator of split ``index``, which is trained first."""
        context, step = self.context, self.sampling.checkpoint
        seed = seeds.derive(context.config.seed, "shadow generator", index)
        images, labels, _ = shadows.pool(context)
        members = shadows.keep(context)[index]
        checkpoint = context.folder.shadow_students / f"generator-{index:03d}"
        if not checkpoint.exists():
            generator.train(
                context,
                Split(images, labels).rows(members),
                [step],
                lambda _: checkpoint,
                seed=seed,
                state_path=self.state(f"shadow-generator-{index:03d}"),
                single_process=True,
                ema_length=self.sampling.ema_length,
            )
        if context.config.attacks_generator:
            generator_attack.keep_errors(context, index, checkpoint)
        if context.config.few_steps:
            checkpoint = self.few_step(index, checkpoint, labels[members], seed)
        options = {"checkpoint": checkpoint, "real": labels[members], "seed": seed}
        # Those of the ablation are drawn by the same generator.
        path = nearest_images.shadow_file(context, index)
        seen = None if self.of_ablation else nearest_images.keeping(context, path)
        return gkd.drawn(context, self.sampling, gkd.student_schedule(context).images, **options, seen=seen)

    def few_step(self, index: int, source: Path, labels: Tensor, seed: int) -> Path:
        """The generator of few steps that is made from ``source``, a generator trained on images of ``labels``."""
        path = self.context.folder.shadow_students / f"few-step-{index:03d}"
        if not path.exists():
            tuned, state_path = tuned_sampling(self.context), self.state(f"shadow-few-step-{index:03d}")
            few_step.train(self.context, source, path, tuned, labels=labels, seed=seed, state_path=state_path)
        return path

    def state(self, name: str) -> Path:
        """File of an unfinished training's state."""
        return self.context.folder.state / f"{name}.pt"

    def train(self, index: int, device: torch.device) -> None:
        """Train shadow Student ``index``, and save it; the index behind the last is the audit's positive control."""
        context, c = self.context, self.context.config
        if index == c.num_students:
            control.train(context, device)
            return
        model = context.seeded(c.student_arch, c.student_width, "shadow student", index)
        gkd.distil(
            context,
            shadows.load_one(context, context.folder.shadows, index),
            model,
            self.retrained(index) if self.shared is None else gkd.shared_draw(context, self.sampling),
            gkd.student_schedule(context),
            confidence=self.sampling.confidence,
            seed=seeds.derive(c.seed, "shadow student", index),
            state_path=self.state(f"{'ablation' if self.of_ablation else 'shadow'}-student-{index:03d}"),
        )
        files.save_tensors(shadows.file(self.folder, index), model.state_dict())


def complete(context: Context, kept: KeptSets) -> None:
    """Draw the sets that the Student's training did not leave, on every rank."""
    runtime, schedule = context.runtime, gkd.student_schedule(context)
    with runtime.main_first() as main:
        if main:
            kept.discard_outdated()
    count = 1 if context.config.fixed_images else schedule.periods
    periods = [period for period in runtime.shard(count) if period not in kept]
    if periods:
        sampling = student_sampling(context)
        with (
            bar(len(periods), "shared images", "period") as progress,
            ahead(gkd.drawn(context, sampling, schedule.images, kept=kept), periods) as sets,
        ):
            for _ in sets:
                progress.update()
    runtime.barrier()


def run(context: Context) -> dict[str, Any]:
    """Train what is missing of the shadow Students, on every rank."""
    c, runtime = context.config, context.runtime
    jobs = [Job(context)]
    if c.ablation and c.num_students:
        jobs.append(Job(ablation.other_images(c).context(context), of_ablation=True))
    for job in jobs:
        _train(job.context, job)
    if runtime.is_main:
        shutil.rmtree(context.folder.shared, ignore_errors=True)
    return {"models": c.num_students, "generator": c.audit_generator}


def _train(context: Context, job: Job) -> None:
    """Train what is missing of one set of shadow Students, and write what they are."""
    c, runtime = context.config, context.runtime
    with runtime.main_first() as main:
        if main and c.num_students:
            unfinished = "ablation-student-*.pt" if job.of_ablation else "shadow-*.pt"
            gkd.discard_outdated(context, job.folder, "shadows", unfinished)
    mine = shadows.missing(context, job.folder, c.num_students)
    left = runtime.broadcast(len(list(job.folder.glob("model-*.safetensors"))) < c.num_students)
    if left and (kept := job.shared) is not None:
        complete(context, kept)
    share, workers = len(runtime.shard(c.num_students)), shadows.workers(context)
    if workers > 1 and mine and runtime.is_main and c.audit_control and not context.folder.control.exists():
        mine, share = [c.num_students, *mine], share + 1  # first, as it trains longest
    shadows.train_missing(context, job, mine, share, "ablation's students" if job.of_ablation else "shadow students")
    if runtime.is_main and c.num_students:
        images, labels, _ = shadows.pool(context)
        keep = shadows.keep(context)[: c.num_students]
        record = {"data": data_digest(images, labels), "num_models": c.num_students, "generator": c.audit_generator}
        record |= recipe_record(student.recipe(context), keep)
        files.write_json(job.folder / "shadows.json", record)  # read by kr-fast audit --shadows
        files.save_array(job.folder / "keep.npy", keep.numpy())


def load(context: Context, of_ablation: bool = False) -> Shadows:
    """All shadow Students, or those of the ablation, with the examples that their Teachers were trained on."""
    make_model = context.make_network(context.config.student_arch, context.config.student_width)
    return load_shadows(make_model, Job(context, of_ablation).folder, device=context.runtime.device)
