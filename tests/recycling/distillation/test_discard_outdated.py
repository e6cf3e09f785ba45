"""Students that were made from something else are deleted, and so is what their trainings would continue from."""

from toy_runs import new_context

from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation.sampling import default_sampling


def test_an_unfinished_training_on_other_images_is_not_continued(tmp_path, monkeypatch):
    run = new_context(tmp_path)
    chosen = {"tuning": {"sampling": default_sampling(run, 8).values()}}
    monkeypatch.setattr(run, "result", chosen.get)
    folder, state = run.folder.shadow_students, run.folder.state
    names = (folder / "model-000.safetensors", state / "shadow-student-001.pt", state / "student.pt")
    folder.mkdir(parents=True)
    state.mkdir(parents=True)

    def left(step):
        chosen["tuning"]["sampling"]["checkpoint"] = step
        gkd.discard_outdated(run, folder, "shadows", "shadow-*.pt")
        return [path.name for path in names if path.exists()]

    for path in names:
        path.touch()
    assert left(8) == left(8) == [path.name for path in names]
    assert left(12) == ["student.pt"]
