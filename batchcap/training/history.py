"""Scores of each epoch, as a table and a figure."""

from pathlib import Path

import pandas as pd

from batchcap.process.environment import import_matplotlib
from batchcap.storage.files import replacing

matplotlib = import_matplotlib()

HISTORY_FILE = "history.csv"
CURVES_FILE = "history.png"


def write_history(history: list[dict[str, float]], folder: Path) -> None:
    """Write the results of each epoch to `history.csv` and `history.png`."""
    table = pd.DataFrame(history)
    with replacing(folder / HISTORY_FILE) as temporary:
        table.to_csv(temporary, index=False)
    figure = matplotlib.figure.Figure(figsize=(12, 4), layout="constrained")
    panels = {
        "loss (nats per word)": ("loss", "val_loss"),
        "share of correct words": ("accuracy", "val_accuracy"),
        "validation metrics x100": ("cider_d", "bleu_4", "rouge_l"),
    }
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            if name in table:  # phases measure different things
                axes.plot(table["epoch"], table[name], marker=".", label=name)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(folder / CURVES_FILE) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
