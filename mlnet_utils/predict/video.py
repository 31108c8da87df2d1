"""Saliency maps for videos: every frame is a photo, the maps are a video of the same timing.

The network knows nothing of motion. Maps are scaled frame by frame. Sound is not copied.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mlnet_utils.plots import overlay as paint_overlay
from mlnet_utils.predict.folders import MADE_OF, FolderResult, begin, gather, to_8_bits
from mlnet_utils.predict.predictor import Predictor
from mlnet_utils.runtime import atomic_path, progress, require, sha256_file

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")


def predict_videos(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    out: str | Path,
    overlay: bool = False,
    force: bool = False,
    batch_size: int = 8,
    device: str | None = None,
    fast: bool = False,
) -> FolderResult:
    """Write the saliency maps of videos as videos of the same size and timing.

    Every video gets ``<stem>.mp4`` (grey, every frame's maximum 255), with ``overlay`` also
    ``<stem>_overlay.mp4``, with the map on top. Videos with all outputs in place are skipped
    unless ``force`` is given; an interrupted video starts anew. Of several processes each takes
    whole videos. Paths are videos and folders of videos, ``batch_size`` counts frames; the rest,
    the result, and the errors beside ``ImportError`` (the extra ``video`` is not installed), are
    those of :func:`~mlnet_utils.predict.folders.predict_folder`.
    """
    require("av", "video")
    endings = ["_overlay.mp4", ".mp4"] if overlay else [".mp4"]
    call = (checkpoint, paths, Path(out), endings, force, batch_size, device, fast, VIDEO_SUFFIXES)
    with begin(*call, _made_of) as (predictor, targets, result, mark):
        for video, made in targets.items():
            try:
                _predict_video(predictor, video, made, mark(sha256_file(video)), batch_size)
            except Exception as error:  # whatever it is, the other videos go on
                result.failed[video] = str(error) or type(error).__name__
            else:
                result.done.append(video)
        return gather(result)


def _predict_video(
    predictor: Predictor, video: Path, paths: list[Path], mark: str, batch_size: int
) -> None:
    """Write one video's files: the overlay, if wanted, and the map, with its mark."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(require("av", "video").open(video))
        frames = _frames(source)
        first = next(frames, None) if source.streams.video else None
        if first is None:
            raise ValueError(f"{video} holds no pictures")
        stream, size = source.streams.video[0], first[0].shape[1::-1]
        form = (stream, size, mark)
        writers = [
            stack.enter_context(_writer(stack.enter_context(atomic_path(path)), *form))
            for path in paths
        ]
        total = -(-stream.frames // batch_size) or None  # some files do not say
        frames = itertools.chain([first], frames)
        batches = iter(lambda: list(itertools.islice(frames, batch_size)), [])
        for batch in progress(batches, video.name, total, unit="batch"):
            densities = predictor.predict_batch([pixels for pixels, _ in batch])
            for (pixels, time), density in zip(batch, densities, strict=True):
                writers[-1](to_8_bits(density), time)
                if len(writers) == 2:
                    writers[0](paint_overlay(pixels, density), time)


def _made_of(path: Path) -> str:
    with require("av", "video").open(path) as container:
        return container.metadata.get("comment", "").removeprefix(f"{MADE_OF}=")


def _frames(source) -> Iterator[tuple[np.ndarray, int]]:
    """(H, W, 3) uint8 pictures, upright, each with its time in the stream's units."""
    for frame in source.decode(video=0):
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        yield np.ascontiguousarray(pixels), frame.pts


@contextlib.contextmanager
def _writer(path: Path, timing, size: tuple[int, int], mark: str) -> Iterator[Callable]:
    """A new video of given size and another's timing: call it with picture and time."""
    av = require("av", "video")
    with av.open(path, "w") as container:
        container.metadata["comment"] = f"{MADE_OF}={mark}"
        # Quality 18 of 0 (best) to 51: hardly to be told from the original.
        stream = container.add_stream(
            "libx264", rate=timing.average_rate or timing.guessed_rate, options={"crf": "18"}
        )
        stream.width, stream.height = size
        # Players want colours at half the resolution, which odd sizes do not have.
        stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        stream.codec_context.time_base = timing.time_base

        def write(pixels: np.ndarray, time: int) -> None:
            form = "gray" if pixels.ndim == 2 else "rgb24"
            frame = av.VideoFrame.from_ndarray(pixels, format=form)
            frame.pts, frame.time_base = time, timing.time_base
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode(None))
