"""Put a trained network into the package: ``mlnet_utils/weights/mlnet.safetensors``.

Matrices become float16. The card inside the file names the data, the recipe and the validation
scores; test scores are made with the published file itself and stand in ``weights/README.md``.

    python tools/publish_network.py runs/osie-eyecrowd --command "python -m mlnet_utils train ..."
"""

import argparse
import subprocess
from pathlib import Path

from mlnet_utils.model.checkpoints import load_checkpoint, save_published
from mlnet_utils.runtime import SHIPPED, sha256_file

LARGEST = 12_000_000  # bytes: it travels with every installation


def main() -> None:
    """Write the file and print its size and checksum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished training")
    parser.add_argument("--command", required=True, help="the command that trained it")
    parser.add_argument("--commit", default="", help="of the code that trained it (default: HEAD)")
    parser.add_argument(
        "--backbone",
        default="",
        help="SHA-256 of the backbone's file, where the checkpoint is from before it was kept",
    )
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args()

    checkpoint = options.run / "checkpoints" / "best.pt"
    content = load_checkpoint(checkpoint)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    card = {
        "title": "ML-Net in PyTorch, trained on OSIE and EyeCrowd",
        "command": options.command,
        "commit": options.commit or head.stdout.strip(),
        "validation": content["scores"],
        "versions": content["versions"],
        "backbone_sha256": content.get("backbone_sha256") or options.backbone,
        "checkpoint_sha256": sha256_file(checkpoint),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_published(options.out, checkpoint, card)
    size = options.out.stat().st_size
    if size > LARGEST:
        options.out.unlink()
        raise SystemExit(f"{options.out}: {size} bytes, at most {LARGEST}; not published")
    print(f"{options.out}: {size} bytes, SHA-256 {sha256_file(options.out)}")


if __name__ == "__main__":
    main()
