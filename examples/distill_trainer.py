"""Distil a teacher into a smaller student with the Trainer of Hugging Face (needs ``pip install transformers``).

    python examples/distill_trainer.py

Only ``compute_loss`` is new; precision, processes, checkpoints and logs are the Trainer's. Replace the two networks by
``AutoModelForImageClassification.from_pretrained(...)``, and the digits by your own data.
"""

import argparse
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import kr_fast
from kr_fast.data import Split, load, to_float


class DistillationTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    teacher: nn.Module | None = None
    temperature = 4.0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs)
        outputs = model(pixel_values=inputs["pixel_values"])
        with torch.no_grad():
            soft = self.teacher(pixel_values=inputs["pixel_values"]).logits
        loss = kr_fast.distillation_loss(
            outputs.logits, soft, inputs["labels"], temperature=self.temperature, soft_weight=0.9, hard_weight=0.1
        )
        return (loss, outputs) if return_outputs else loss


def network(width: int, depth: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth}
    layout = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_attention_heads": 4, "num_labels": 10}
    model: nn.Module = ViTForImageClassification(ViTConfig(**sizes, **layout))
    return model


def rows(split: Split) -> list[dict[str, Tensor]]:
    pairs = zip(to_float(split.images), split.labels, strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()

    digits = load("digits")
    train, test = rows(digits.train), rows(digits.test)

    def fit(model: nn.Module, teacher: nn.Module | None) -> nn.Module:
        with tempfile.TemporaryDirectory() as out:
            options = TrainingArguments(
                out,
                num_train_epochs=arguments.epochs,
                per_device_train_batch_size=64,
                learning_rate=3e-3,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = DistillationTrainer(model, options, train_dataset=train, eval_dataset=test)
            trainer.teacher = None if teacher is None else teacher.to(options.device).eval()
            trainer.train()
            found = trainer.predict(test)
        accuracy = (found.predictions.argmax(1) == found.label_ids).mean()
        print(f"{'teacher' if teacher is None else 'student'}: test accuracy {accuracy:.3f}")
        return model

    torch.manual_seed(0)
    fit(network(32, 2), fit(network(64, 4), None))


if __name__ == "__main__":
    main()
