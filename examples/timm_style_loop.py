"""An image recipe as timm's users write it, with bigkernel's transforms and AdamW.

    python examples/timm_style_loop.py --epochs 30

Label smoothing, warm-up and cosine, averaged weights, mixed precision; the model is any nn.Module
from images to scores, such as timm.create_model(...). The data are scikit-learn's digits.
"""

import argparse

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from bigkernel import transforms as T
from bigkernel.data import collate_images, load_digits
from bigkernel.optim import AdamW


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)  # 16 of them
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True)
        self.body = nn.TransformerEncoder(block, 2)
        self.head = nn.Linear(16 * width, 10)

    def forward(self, images):  # [N, 1, 8, 8]
        return self.head(self.body(self.patches(images).flatten(2).transpose(1, 2)).flatten(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, held_back = load_digits().split(0.2)
    loader = DataLoader(train, options.batch_size, shuffle=True, collate_fn=collate_images)
    to_float = [T.ToDtype(torch.float32, scale=True), T.Normalize([0.5], [0.5])]
    augment = T.Compose([T.RandomAffine(8, (0.06, 0.06), interpolation="bilinear"), *to_float])
    prepare = T.Compose(to_float)

    model = Model(options.width).to(device)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = AdamW(model.parameters(), options.lr, weight_decay=0.05, max_grad_norm=1.0)
    steps = options.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, steps, pct_start=0.1)
    for epoch in range(options.epochs):
        for batch in loader:
            seed = torch.Generator().manual_seed(epoch)  # other draws in each epoch, by image
            images = augment(batch["pixel_values"].to(device), seed, batch["sample_ids"])
            with torch.autocast(device, torch.bfloat16):
                scores = model(images)
            target = batch["labels"].to(device)
            loss = nn.functional.cross_entropy(scores.float(), target, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, gradient {optimizer.grad_norm:.2f}")

    test = collate_images([held_back[i] for i in range(len(held_back))])
    with torch.no_grad():
        found = averaged.eval()(prepare(test["pixel_values"].to(device))).argmax(1).cpu()
    print(f"accuracy {(found == test['labels']).float().mean():.1%}")


if __name__ == "__main__":
    main()
