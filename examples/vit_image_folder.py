"""Train a vision transformer on a folder that holds one folder of images for each class.

    python examples/vit_image_folder.py --data photos --out runs/vit

The images are augmented on the device, a whole batch in one pass.
"""

import argparse

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from bigkernel import Trainer, TrainingArguments
from bigkernel import transforms as T
from bigkernel.data import collate_images, load_image_folder


def accuracy(result) -> dict[str, float]:
    return {"accuracy": float(np.mean(result.predictions.argmax(-1) == result.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="DATA/<class>/<image>")
    parser.add_argument("--out", default="runs/vit")
    parser.add_argument("--size", type=int, default=224, help="pixels a side into the model")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=100)
    parser.add_argument("--lr", type=float, default=5e-4)
    options = parser.parse_args()

    data = load_image_folder(options.data)
    train, held_back = data.split(0.2)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=options.size,
            patch_size=options.patch,
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.width // 64),
            id2label=dict(enumerate(data.label_names)),
            label2id={name: i for i, name in enumerate(data.label_names)},
        )
    )
    scale = [T.ToDtype(torch.float32, scale=True), T.Normalize([0.5] * 3, [0.5] * 3)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            weight_decay=0.05,
            eval_strategy="epoch",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=held_back,
        data_collator=collate_images,
        compute_metrics=accuracy,
        augmentation=T.Compose(
            [T.RandomResizedCrop(options.size, (0.35, 1.0)), T.RandomHorizontalFlip(), *scale]
        ),
        eval_augmentation=T.Compose([T.Resize((options.size, options.size)), *scale]),
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.1%} of {len(held_back)} held back")


if __name__ == "__main__":
    main()
