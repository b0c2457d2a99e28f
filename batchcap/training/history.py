"""Scores of each epoch, as a table and a figure."""

import csv
from pathlib import Path

from batchcap.process.environment import import_matplotlib
from batchcap.storage.files import replacing

matplotlib = import_matplotlib()

HISTORY_FILE = "history.csv"
CURVES_FILE = "history.png"


def write_history(history: list[dict[str, float]], folder: Path) -> None:
    """Write the results of each epoch to `history.csv` and `history.png`."""
    with replacing(folder / HISTORY_FILE) as temporary, temporary.open("w", newline="") as file:
        columns = dict.fromkeys(name for row in history for name in row)
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(history)
    figure = matplotlib.figure.Figure(figsize=(12, 4), layout="constrained")
    panels = {
        "loss (nats a word)": ("loss", "val_loss"),
        "share of words right": ("accuracy", "val_accuracy"),
        "validation metrics x100": ("cider_d", "bleu_4", "rouge_l"),
    }
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            rows = [row for row in history if name in row]  # phases measure different things
            axes.plot(
                [row["epoch"] for row in rows],
                [row[name] for row in rows],
                marker=".",
                label=name,
            )
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(folder / CURVES_FILE) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
