"""Accuracy on the real test images, which are read only here; the Student's is the Classification Accuracy Score."""

from typing import Any

from kr_fast.ensemble import accuracy
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import gkd, teacher


def run(context: Context) -> dict[str, Any]:
    """Test accuracy of Teacher and Student."""
    models = {"teacher": teacher.load(context), "student": gkd.load(context)}
    return {"test_accuracy": {name: accuracy(model, context.data.test) for name, model in models.items()}}
