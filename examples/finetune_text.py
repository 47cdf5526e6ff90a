"""Fine-tune a causal language model with bigkernel's Trainer.

    python examples/finetune_text.py --model gpt2 --data my-texts --out runs/finetuned

Documents are packed into rows without padding, and no document sees another.
"""

import argparse
import math

from transformers import AutoModelForCausalLM, AutoTokenizer

from bigkernel import Trainer, TrainingArguments
from bigkernel.data import PackedDataset, PackingCollator, load_corpus, split_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2", help="a folder or hub name")
    parser.add_argument("--data", default=None, help="default: help texts of Python's own library")
    parser.add_argument("--out", default="runs/finetuned")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1, help="ends earlier than the epochs")
    parser.add_argument("--lr", type=float, default=5e-5)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    texts, held_back = split_corpus(load_corpus(options.data).documents, fraction=0.1)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            weight_decay=0.01,
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=PackedDataset(texts, tokenizer, options.max_length),
        eval_dataset=PackedDataset(held_back, tokenizer, options.max_length),
        data_collator=PackingCollator(),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint="auto")
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"perplexity {math.exp(before):.2f} before, {math.exp(after):.2f} after")


if __name__ == "__main__":
    main()
