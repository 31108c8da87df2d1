"""Time per photo of the page in docs/demo, in headless Chromium, beside PyTorch's.

    python benchmarks/in_a_browser.py            # the package's network, scikit-image's astronaut
    python benchmarks/in_a_browser.py --smoke    # a minute, to see that it works

Each time is from decoded pixels to the map at the photo's size (2048 pixels at most in the page),
the median of the rounds. Needs Chromium and npm, as `make demo` does.
"""

import argparse
import importlib.util
import json
import tempfile
from functools import partial
from pathlib import Path

import measure
import torch
from PIL import Image

from mlnet_utils.config import load_config
from mlnet_utils.data.images import read_image
from mlnet_utils.model.checkpoints import save_checkpoint
from mlnet_utils.model.network import MLNet
from mlnet_utils.predict.export import export
from mlnet_utils.predict.predictor import load
from mlnet_utils.runtime import SHIPPED, display_path, require

TOOL = Path(__file__).resolve().parents[1] / "tools" / "demo.py"
SCRIPT = """\
const page = await open("page", 1280);
const seconds = [];
for (let round = 0; round < ROUNDS; round++) {
  seconds.push((await predict(page, "page/PHOTO")).seconds);
}
await post("seconds", JSON.stringify(seconds.slice(1)));
"""


def load_tool():
    """``tools/demo.py``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("demo", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_network(folder: Path) -> Path:
    """A checkpoint of the smallest preset."""
    config = load_config("tiny")
    save_checkpoint(folder / "best.pt", config, MLNet(config).state_dict(), scores={})
    return folder / "best.pt"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photo", type=Path, nargs="?", help="what is predicted")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="a trained network")
    parser.add_argument("--rounds", type=int, default=20, help="timed photos of every form")
    parser.add_argument("--smoke", action="store_true", help="small and short, nothing saved")
    options = parser.parse_args()
    pictures = Path(require("skimage.data", "notebooks").__file__).parent
    options.photo = options.photo or pictures / "astronaut.png"
    demo = load_tool()
    with tempfile.TemporaryDirectory() as name:
        site = Path(name)
        if options.smoke:
            options.checkpoint, options.rounds = random_network(site), 2
            options.photo = site / "photo.png"
            Image.radial_gradient("L").save(options.photo)
        page = demo.link_page(site / "page", demo.place_runtime(site))
        export(options.checkpoint, page / "network.onnx", photos=[options.photo])
        (page / options.photo.name).symlink_to(options.photo.absolute())

        script = SCRIPT.replace("ROUNDS", str(options.rounds + 1))
        script = script.replace("PHOTO", options.photo.name)
        times = {}
        for label, isolated in (("one thread", False), ("threads", True)):
            posts = demo.visit(site, script, isolated, timeout=60 * options.rounds).posts
            times[f"Chromium, {label}"] = json.loads(posts["seconds"])
        photo = read_image(options.photo)
        predictor = load(options.checkpoint, "cpu")
        for threads in (1, measure.cpu_count()):
            torch.set_num_threads(threads)
            function = {f"PyTorch, threads: {threads}": partial(predictor.predict, photo)}
            times |= measure.seconds(function, options.rounds)
    rows = [
        {"form": form, "ms": 1e3 * measure.median(found), "least ms": 1e3 * min(found)}
        for form, found in times.items()
    ]
    measure.print_table(rows)
    if not options.smoke:
        config = predictor.config
        content = {
            "checkpoint": display_path(options.checkpoint),
            "backbone": config.backbone,
            "size": [config.height, config.width],
            "photo": list(photo.shape[1:]),
            "onnxruntime-web": demo.VERSION,
            "rows": rows,
        }
        measure.save("in_a_browser", content)


if __name__ == "__main__":
    main()
