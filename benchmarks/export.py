"""Size, speed and scores of a trained network in every exported form.

    python benchmarks/export.py --run-dir runs/sample --out results/sample/export.json

Exports ``checkpoints/best.pt`` of the run into a temporary folder and scores each form on the
run's test photos. Times are of the network alone, one photo at a time, on the CPU.
"""

import argparse
import tempfile
from pathlib import Path

from mlnet_utils.export import export
from mlnet_utils.exported import measure
from mlnet_utils.runtime import display_path, versions, write_json

VARIANTS = ["PyTorch", "torch.export", "ONNX", "ONNX, 8 bits"]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a Markdown table, and write a record where ``--out`` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="default: the run's checkpoints/best.pt")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="to calibrate with")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=0, help="photos to score, 0 = all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON record to write")
    options = parser.parse_args(arguments)
    checkpoint = options.checkpoint or options.run_dir / "checkpoints" / "best.pt"

    with tempfile.TemporaryDirectory() as folder:
        network = Path(folder) / "network"
        reports = [
            export(checkpoint, network.with_suffix(".pt2"), "torch-export", photos=options.photos),
            export(checkpoint, network.with_suffix(".onnx"), photos=options.photos),
            export(checkpoint, network.with_suffix(".int8.onnx"), int8=True, photos=options.photos),
        ]
        files = [checkpoint, *(report.path for report in reports)]
        rows = measure(
            dict(zip(VARIANTS, files, strict=True)),
            options.run_dir,
            options.split,
            options.limit,
            options.threads,
            options.repeats,
        )
    for row, report in zip(rows[1:], reports, strict=True):
        row |= {"deviation": report.deviation, "lowest_correlation": report.correlation}
    print(table(rows))
    if options.out:
        record = {
            "checkpoint": display_path(checkpoint),
            "split": options.split,
            "limit": options.limit,
            "threads": options.threads,
            "rows": rows,
            "versions": versions(),
        }
        write_json(options.out, record)


def table(rows: list[dict]) -> str:
    """Markdown: size, time, and every metric with its change against PyTorch."""
    metrics = [key for key in rows[0] if key not in ("variant", "megabytes", "milliseconds")]
    lines = [
        "| variant | MB | ms per photo | " + " | ".join(metrics) + " |",
        "|---" * (len(metrics) + 3) + "|",
    ]
    for row in rows:
        cells = [f"{row[m]:.4f} ({row[m] - rows[0][m]:+.4f})" for m in metrics]
        lines.append(
            f"| {row['variant']} | {row['megabytes']:.1f} | {row['milliseconds']:.1f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
