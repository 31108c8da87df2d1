"""Videos: a map per frame, in a video of the same size and timing."""

import re
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import files

from mlnet_utils.__main__ import main
from mlnet_utils.plots import overlay
from mlnet_utils.predict.folders import to_8_bits
from mlnet_utils.predict.predictor import load
from mlnet_utils.predict.video import predict_videos


def video(path: Path, size=(64, 48), times=range(5), rate=10) -> Path:
    """A bright square that moves over a dark ground, with a frame at each of the times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv444p"
        for number, time in enumerate(times):
            pixels = np.full((size[1], size[0], 3), 40, np.uint8)
            pixels[10:26, 5 * number : 5 * number + 16] = (220, 180, 120)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn(path: Path) -> None:
    """Say in the file, as phones do, that players should turn it by 90 degrees clockwise."""
    one, content = 1 << 16, path.read_bytes()
    track = content.index(b"tkhd")
    as_stored = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:track] + content[track:].replace(as_stored, turned, 1))


def read(path: Path) -> tuple[list[np.ndarray], list[float]]:
    """Pictures as stored, (H, W, 3) uint8, and their times in seconds."""
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [f.time for f in frames]


@pytest.mark.parametrize(("size", "times"), [
    ((64, 48), range(5)), ((65, 49), range(5)), ((64, 48), (0, 1, 4, 5, 9))
], ids=["even", "odd", "uneven times"])  # fmt: skip
def test_maps_have_the_size_and_the_times_of_the_frames(checkpoint, tmp_path, size, times):
    source, out = video(tmp_path / "clip.mp4", size, times), tmp_path / "out"
    result = predict_videos(checkpoint, [source], out, overlay=True, batch_size=2)
    assert (result.done, result.failed) == ([source], {})
    assert files(out) == {"clip.mp4", "clip_overlay.mp4", "prediction.json"}
    written = (source, out / "clip.mp4", out / "clip_overlay.mp4")
    (pictures, maps, overlays), seconds = zip(*map(read, written), strict=True)
    assert len(pictures) == 5
    assert seconds[0] == seconds[1] == seconds[2]
    predictor = load(checkpoint)
    for picture, found, painted in zip(pictures, maps, overlays, strict=True):
        density = predictor.predict(picture)
        assert np.abs(found[..., 0].astype(int) - to_8_bits(density)).mean() < 3  # compression
        assert np.abs(painted.astype(int) - overlay(picture, density)).mean() < 8
    assert np.abs(maps[0].astype(int) - maps[-1]).mean() > 6  # each frame has its own


def test_a_turned_video_is_predicted_upright(checkpoint, tmp_path):
    source = video(tmp_path / "clip.mp4")
    turn(source)
    predict_videos(checkpoint, [source], tmp_path / "out", overlay=True)
    upright = np.rot90(read(source)[0][0], -1)
    found = read(tmp_path / "out" / "clip.mp4")[0][0]
    assert found.shape == upright.shape == (64, 48, 3)
    expected = to_8_bits(load(checkpoint).predict(np.ascontiguousarray(upright)))
    assert np.abs(found[..., 0].astype(int) - expected).mean() < 3


def test_broken_videos_stop_nothing_and_done_ones_are_skipped(checkpoint, tmp_path):
    folder, out = tmp_path / "clips", tmp_path / "out"
    good = video(folder / "trip" / "good.mkv")
    video(folder / "icon.mp4", (64, 16))
    (folder / "broken.mp4").write_bytes(good.read_bytes()[:200])
    with av.open(folder / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    for force, done, skipped in ((False, [good], []), (False, [], [good]), (True, [good], [])):
        result = predict_videos(checkpoint, [folder], out, overlay=True, force=force)
        assert (result.done, result.skipped) == (done, skipped)
        assert {path.stem for path in result.failed} == {"icon", "broken", "sound"}
        assert "64x16" in result.failed[folder / "icon.mp4"]
    assert files(out) == {"trip/good.mp4", "trip/good_overlay.mp4", "prediction.json"}
    video(good, (80, 48))
    assert predict_videos(checkpoint, [folder], out, overlay=True).done == [good]


def test_command_line(checkpoint, tmp_path, capsys):
    out, source = str(tmp_path / "out"), str(video(tmp_path / "a.mp4"))
    call = ["predict", "--checkpoint", str(checkpoint), "--out", out, "--video", source]
    assert main(call) == 0
    assert "1 done, 0 " in capsys.readouterr().out
    for option in (["--npy"], ["--megapixels", "300"]):
        assert main([*call, *option]) == 1
        assert re.search("--npy.*--megapixels", capsys.readouterr().err)
