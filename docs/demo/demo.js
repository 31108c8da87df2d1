"use strict";
/*
 * A saliency network of this project in the browser, see docs/prediction.md.
 *
 * This file is loaded twice: by the page, which shows photos and maps, and by a worker, which runs
 * `network.onnx` with onnxruntime-web so that the page never freezes. The file in ONNX says itself
 * what it needs: input size, head, resizing, mirroring. The worker's computations are those of
 * mlnet_utils/data/geometry.py and mlnet_utils/predict/predictor.py; a test compares the maps.
 */

const SMALLEST_SIDE = 32; // pixels, as in predictor.py
const LARGEST_SIDE = 4096; // of what the network is given; phones refuse larger canvases
const VIEW_SIDE = 2048; // of the map on the screen and of the saved picture
const FLOOR = 1e-12; // of a probability, before its logarithm is taken

// ---- geometry: everything is a pair of sparse matrices, for rows and for columns ---------------
/*
 * A sparse matrix is a list with an entry per output: {start, weights} says which inputs are read.
 * Numbers are rounded to single precision where torch rounds them: then the bytes that the network
 * is given are nearly always the same.
 */

/** Matrix of torch's bilinear resize along one axis, `size` to `out`, antialiased or not. */
function resizeMatrix(size, out, antialias) {
  const scale = Math.fround(size / out);
  const support = antialias ? Math.max(scale, 1) : 1;
  return Array.from({ length: out }, (_, i) => {
    const centre = Math.fround(scale * (i + 0.5));
    if (!antialias) {
      const position = Math.max(Math.fround(centre - 0.5), 0);
      const start = Math.min(Math.floor(position), size - 1);
      const weight = Math.fround(position - start);
      return { start, weights: Float32Array.from(start + 1 < size ? [1 - weight, weight] : [1]) };
    }
    const start = Math.max(Math.trunc(centre - support + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support + 0.5), size);
    const weights = new Float32Array(end - start);
    for (let j = 0; j < weights.length; j++) {
      weights[j] = Math.max(0, 1 - Math.abs((start + j - centre + 0.5) / support));
    }
    const total = weights.reduce((a, b) => Math.fround(a + b));
    return { start, weights: weights.map((weight) => weight / total) };
  });
}

/** Matrix that reads a map of `grid` cells at photo pixel centres (geometry.py, _sampling_matrix). */
function samplingMatrix(grid, size, photo, content, offset) {
  const first = Math.floor((offset * grid) / size);
  const last = Math.ceil(((offset + content) * grid) / size) - 1;
  return Array.from({ length: photo }, (_, i) => {
    const centre = ((i + 0.5) * content) / photo + offset;
    const position = Math.min(Math.max((centre * grid) / size - 0.5, first), last);
    const start = Math.min(Math.max(Math.floor(position), 0), Math.max(grid - 2, 0));
    const weight = position - start;
    return { start, weights: Float32Array.from(grid > 1 ? [1 - weight, weight] : [1]) };
  });
}

/**
 * rows @ values @ columns.T for an image of `width` columns.
 * Of interleaved channels, `stride` many, the one at `channel` is read.
 */
function apply(rows, columns, values, width, stride = 1, channel = 0) {
  const height = values.length / stride / width;
  const narrow = new Float32Array(height * columns.length);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < columns.length; x++) {
      const { start, weights } = columns[x];
      let sum = 0;
      let from = (y * width + start) * stride + channel;
      for (let j = 0; j < weights.length; j++, from += stride) {
        sum = Math.fround(sum + weights[j] * values[from]);
      }
      narrow[at++] = sum;
    }
  }
  const result = new Float32Array(rows.length * columns.length);
  for (let y = 0; y < rows.length; y++) {
    const { start, weights } = rows[y];
    for (let j = 0; j < weights.length; j++) {
      const weight = weights[j];
      let from = (start + j) * columns.length;
      let to = y * columns.length;
      for (let x = 0; x < columns.length; x++) result[to++] += weight * narrow[from++];
    }
  }
  return result;
}

/** How a photo is fitted into the network's input (geometry.py, Letterbox). */
function letterboxOf(photoHeight, photoWidth, height, width) {
  const tall = photoHeight * width > photoWidth * height;
  const contentHeight = tall ? height : Math.max(1, Math.floor((photoHeight * width) / photoWidth));
  const contentWidth = tall ? Math.max(1, Math.floor((photoWidth * height) / photoHeight)) : width;
  const top = Math.floor((height - contentHeight) / 2);
  const left = Math.floor((width - contentWidth) / 2);
  return { height, width, contentHeight, contentWidth, top, left };
}

/** RGBA pixels -> the network's input: (3, height, width) bytes, then the mirrored one if wanted. */
function networkInput(pixels, photoHeight, photoWidth, box, antialias, flip) {
  const area = box.height * box.width;
  const input = new Uint8ClampedArray(3 * area * (flip ? 2 : 1)); // rounds half to even, as torch
  const rows = resizeMatrix(photoHeight, box.contentHeight, antialias);
  const columns = resizeMatrix(photoWidth, box.contentWidth, antialias);
  for (let channel = 0; channel < 3; channel++) {
    const content = apply(rows, columns, pixels, photoWidth, 4, channel);
    for (let y = 0; y < box.contentHeight; y++) {
      const line = content.subarray(y * box.contentWidth, (y + 1) * box.contentWidth);
      const at = channel * area + (box.top + y) * box.width;
      input.set(line, at + box.left);
      if (flip) {
        input.set(line.reverse(), 3 * area + at + box.width - box.left - box.contentWidth);
      }
    }
  }
  return new Uint8Array(input.buffer);
}

/** The network's output, averaged with that of the mirrored photo (predictor.py, predict_maps). */
function averaged(output, grid, config) {
  const maps = Float64Array.from(output.subarray(0, grid.height * grid.width));
  if (!config.test_flip) return maps;
  const mirrored = output.subarray(maps.length);
  return maps.map((value, i) => {
    const x = i % grid.width;
    const other = mirrored[i - x + grid.width - 1 - x];
    return config.head === "density" ? Math.sqrt(value * other) : (value + other) / 2;
  });
}

/** A map on the grid as a density of `view`'s size that sums to 1 (predictor.py, to_density). */
function toDensity(maps, grid, config, box, view) {
  let density;
  if (config.head !== "density" && config.compat === "theano") {
    density = authorsPostprocess(maps, grid, view);
  } else {
    const geometric = config.head === "density";
    const rows = samplingMatrix(grid.height, box.height, view.height, box.contentHeight, box.top);
    const columns = samplingMatrix(grid.width, box.width, view.width, box.contentWidth, box.left);
    const source = geometric ? maps.map((value) => Math.log(Math.max(value, FLOOR))) : maps;
    density = apply(rows, columns, source, grid.width);
    if (geometric) for (let i = 0; i < density.length; i++) density[i] = Math.exp(density[i]);
  }
  let total = 0;
  for (let i = 0; i < density.length; i++) total += density[i];
  const result = new Float32Array(density.length).fill(1 / density.length);
  if (!(total > 0 && total < Infinity)) return result; // a dead network: uniform
  for (let i = 0; i < density.length; i++) result[i] = density[i] / total;
  return result;
}

/** The authors' own way back to the photo, for their networks (geometry.py, authors_postprocess). */
function authorsPostprocess(maps, grid, view) {
  let { height, width } = view;
  if (height * grid.width > width * grid.height) {
    width = Math.floor((grid.width * height) / grid.height);
  } else {
    height = Math.floor((grid.height * width) / grid.width);
  }
  const top = Math.floor((height - view.height) / 2);
  const left = Math.floor((width - view.width) / 2);
  const rows = resizeMatrix(grid.height, height, false).slice(top, top + view.height);
  const columns = resizeMatrix(grid.width, width, false).slice(left, left + view.width);
  return apply(rows, columns, maps, grid.width);
}

// ---- the worker: it holds the network ----------------------------------------------------------
/** An error unless the file ends in the SHA-256 of all before it, see _seal() in export.py. */
async function checkDigest(bytes) {
  if (!crypto.subtle) return; // pages from elsewhere without https
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes.subarray(0, -76)));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (new TextDecoder().decode(bytes.subarray(-64)) !== hex) throw new Error("network.onnx is damaged: export it again");
}

/** The metadata of a file in ONNX: field 14 of its outermost message, pairs of key and value. */
function readMetadata(bytes) {
  const text = new TextDecoder();
  const fields = function* (from, end) {
    let at = from;
    const varint = () => {
      let value = 0;
      for (let factor = 1; ; factor *= 128) {
        const byte = bytes[at++];
        value += (byte & 127) * factor;
        if (!(byte & 128)) return value;
      }
    };
    while (at < end) {
      const tag = varint();
      const type = tag % 8;
      if (type === 0) varint();
      else if (type === 1) at += 8;
      else if (type === 5) at += 4;
      else if (type === 2) {
        const length = varint();
        yield { number: (tag - type) / 8, start: at, end: at + length };
        at += length;
      } else throw new Error("network.onnx is damaged: export it again");
    }
  };
  const metadata = {};
  for (const { number, start, end } of fields(0, bytes.length)) {
    if (number !== 14) continue;
    const pair = [...fields(start, end)].map((part) => text.decode(bytes.subarray(part.start, part.end)));
    metadata[pair[0]] = pair[1];
  }
  if (!metadata.config) throw new Error("network.onnx was not exported by mlnet_utils");
  return metadata;
}

/** The worker's life: load the network, then answer each photo with its map. */
function work() {
  const network = loadNetwork().then(
    (loaded) => {
      postMessage({ kind: "ready", facts: loaded.facts });
      return loaded;
    },
    (error) => postMessage({ kind: "failed", text: error.message }),
  );
  let turn = network; // photos are answered one after another
  onmessage = ({ data }) => {
    turn = turn.then(() => network).then(async (loaded) => {
      if (!loaded) return;
      try {
        const found = await predict(loaded, data);
        postMessage({ kind: "map", number: data.number, ...found }, [found.density.buffer]);
      } catch (error) {
        postMessage({ kind: "unpredicted", number: data.number, text: String(error.message ?? error) });
      }
    });
  };
}

async function loadNetwork() {
  const parts = {};
  const advance = (name, loaded, total) => {
    parts[name] = [loaded, total];
    const sums = Object.values(parts).reduce((a, b) => [a[0] + b[0], a[1] + b[1]]);
    if (Object.keys(parts).length === 2) postMessage({ kind: "progress", share: sums[0] / sums[1] });
  };
  const [runtime, binary, bytes] = await Promise.all([
    import("./runtime/ort.wasm.bundle.min.mjs").catch(() => {
      throw new Error("runtime/ is missing: run make demo");
    }),
    download("runtime/ort-wasm-simd-threaded.wasm", advance),
    download("network.onnx", advance),
  ]);
  await checkDigest(bytes);
  const metadata = readMetadata(bytes);
  const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  runtime.env.wasm.wasmBinary = binary.buffer;
  runtime.env.wasm.numThreads = threads;
  runtime.env.logLevel = "error";
  const session = await runtime.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  const config = JSON.parse(metadata.config);
  const facts = {
    Network: `ML-Net on ${metadata.backbone}, ${(bytes.length / 1e6).toFixed(1)} MB, ${metadata.precision}`,
    "Learnt from": metadata.dataset,
    Input: `${config.width} × ${config.height} pixels${config.test_flip ? ", averaged with the mirrored photo" : ""}`,
    Runtime: `onnxruntime-web ${runtime.env.versions.web}, WebAssembly, ${threads} ${threads > 1 ? "threads" : "thread"}`,
    "Checkpoint's SHA-256": metadata.checkpoint_sha256,
  };
  const network = { runtime, session, config, facts };
  const [height, width] = [config.height, config.width];
  const blank = new Uint8ClampedArray(4 * height * width);
  await predict(network, { pixels: blank, height, width, view: { height, width } }); // warms up
  return network;
}

/** A file beside the page, with its progress. */
async function download(name, advance) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} is missing: run make demo`);
  const total = Number(response.headers.get("content-length"));
  const chunks = [];
  let loaded = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    chunks.push(part.value);
    loaded += part.value.length;
    advance(name, loaded, Math.max(total, loaded));
  }
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}

/** {density, seconds} of RGBA pixels; the density has the size of `view`. */
async function predict({ runtime, session, config }, { pixels, height, width, view }) {
  const start = performance.now();
  const box = letterboxOf(height, width, config.height, config.width);
  const antialias = config.compat === ""; // as in config.py
  const input = networkInput(pixels, height, width, box, antialias, config.test_flip);
  const count = config.test_flip ? 2 : 1;
  const image = new runtime.Tensor("uint8", input, [count, 3, config.height, config.width]);
  const { saliency } = await session.run({ image });
  const grid = { height: saliency.dims[2], width: saliency.dims[3] };
  const density = toDensity(averaged(saliency.data, grid, config), grid, config, box, view);
  return { density, seconds: (performance.now() - start) / 1000 };
}

// ---- the page ----------------------------------------------------------------------------------
/** Matplotlib's magma at 256 levels, interpolated between nine of its colours. */
const MAGMA = (() => {
  const stops = [
    [0, 0, 4], [29, 17, 71], [81, 18, 124], [131, 38, 129], [183, 55, 121],
    [231, 82, 99], [252, 137, 97], [254, 196, 136], [252, 253, 191],
  ];
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((value, c) => value + (stops[low + 1][c] - value) * (place - low));
  });
})();

const newCanvas = ({ height, width }) =>
  Object.assign(document.createElement("canvas"), { height, width });

/** Where a density is largest: index of the pixel. */
function peakOf(density) {
  let at = 0;
  for (let i = 1; i < density.length; i++) if (density[i] > density[at]) at = i;
  return at;
}

/** A density as a picture: the root of its share of the maximum, as colour and as opacity. */
function colourMap(density, view) {
  const peak = density[peakOf(density)];
  const picture = new ImageData(view.width, view.height);
  const { data } = picture;
  for (let i = 0; i < density.length; i++) {
    const share = Math.sqrt(density[i] / peak);
    const colour = MAGMA[Math.round(share * 255)];
    data[4 * i] = colour[0];
    data[4 * i + 1] = colour[1];
    data[4 * i + 2] = colour[2];
    data[4 * i + 3] = 255 * share;
  }
  const canvas = newCanvas(view);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

/** Draw the photo and its map on top, as plots.py's overlay does. */
function paint(canvas, photo, map, opacity) {
  const context = canvas.getContext("2d");
  const { height, width } = canvas;
  context.globalAlpha = 1;
  context.globalCompositeOperation = "source-over";
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // below a transparent photo
  context.fillRect(0, 0, width, height);
  context.drawImage(photo, 0, 0, width, height);
  if (!map) return;
  context.globalAlpha = opacity;
  context.globalCompositeOperation = "source-over";
  context.drawImage(map, 0, 0);
}

/** The part of the picture in which the density peaks, in words. */
function placeOfPeak(density, { height, width }) {
  const at = peakOf(density);
  const row = ["upper", "middle", "lower"][Math.floor((3 * Math.floor(at / width)) / height)];
  const column = ["left", "centre", "right"][Math.floor((3 * (at % width)) / width)];
  return row === "middle" && column === "centre" ? "centre" : `${row} ${column}`;
}

/** A photo's RGBA pixels, upright and over white, no colour profile applied: as Pillow reads them. */
async function readPixels(blob) {
  const bitmap = await createImageBitmap(blob, {
    imageOrientation: "from-image",
    colorSpaceConversion: "none",
  });
  const scale = Math.min(1, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const height = Math.max(1, Math.round(bitmap.height * scale));
  const context = newCanvas({ height, width }).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return { pixels: context.getImageData(0, 0, width, height).data, height, width };
}

/** The page's life. */
function start() {
  const find = (id) => document.getElementById(id);
  const [drop, file, problem, result, status, overlay, opacity] =
    ["drop", "file", "problem", "result", "status", "overlay", "opacity"].map(find);
  const shown = { number: 0, name: "", view: null, photo: new Image(), map: null };
  let loaded = false;

  const say = (text) => {
    if (status.textContent !== text) status.textContent = text; // screen readers say it once
  };
  const complain = (text) => {
    problem.textContent = text;
    problem.hidden = !text;
    if (text) problem.scrollIntoView({ block: "nearest" });
  };
  const repaint = () => paint(overlay, shown.photo, shown.map, opacity.value / 100);
  const busy = (state) => {
    find("stage").classList.toggle("busy", state);
    result.setAttribute("aria-busy", state);
  };

  if (location.protocol === "file:") {
    say("");
    complain("Browsers run no network from a file. Run make demo in the repository's folder, and open the address that it prints.");
    return;
  }

  // The network.
  const worker = new Worker("demo.js");
  say("Loading the network…");
  const answers = {
    progress({ share }) {
      find("loading").hidden = share >= 1;
      find("loading").value = share;
      if (share >= 1) say("Starting the network…");
    },
    ready({ facts }) {
      loaded = true;
      find("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) =>
        [["dt", name], ["dd", value]].map(([tag, textContent]) =>
          Object.assign(document.createElement(tag), { textContent }))));
      say(shown.view ? "Looking…" : "The network is ready.");
    },
    failed({ text }) {
      find("loading").hidden = true;
      busy(false);
      say("");
      complain(`The network could not be started. ${text}`);
    },
    map({ number, density, seconds }) {
      if (number !== shown.number) return; // another photo came meanwhile
      shown.map = colourMap(density, shown.view);
      repaint();
      const place = placeOfPeak(density, shown.view);
      overlay.setAttribute("aria-label", `${shown.name} with its map, which peaks in the ${place}`);
      busy(false);
      find("save").disabled = false;
      say(`Peak: ${place} · ${seconds.toFixed(2)} s on this device`);
      const detail = { density, seconds, ...shown.view };
      document.dispatchEvent(new CustomEvent("prediction", { detail }));
    },
    unpredicted({ number, text }) {
      if (number !== shown.number) return;
      busy(false);
      say("");
      complain(`The network failed on this photo: ${text}`);
    },
  };
  worker.onmessage = ({ data }) => answers[data.kind](data);
  worker.onerror = () => answers.failed({ text: "This browser may be too old for it." });

  // A photo, from wherever it comes.
  async function show(blob, name) {
    const number = ++shown.number;
    complain("");
    const picture = new Image(); // what is shown keeps its colour profile
    picture.src = URL.createObjectURL(blob);
    let photo;
    try {
      photo = await readPixels(blob);
      await picture.decode();
    } catch {
      URL.revokeObjectURL(picture.src);
      if (number === shown.number) {
        complain(`${name} is not a picture that this browser can read. Take a JPEG, PNG, WebP or AVIF.`);
      }
      return;
    }
    if (number !== shown.number) return;
    const { pixels, height, width } = photo;
    if (Math.min(height, width) < SMALLEST_SIDE) {
      complain(`${name} has ${width} × ${height} pixels; both sides need at least ${SMALLEST_SIDE}.`);
      return;
    }
    const scale = Math.min(1, VIEW_SIDE / Math.max(height, width));
    const view = {
      height: Math.max(1, Math.round(height * scale)),
      width: Math.max(1, Math.round(width * scale)),
    };
    URL.revokeObjectURL(shown.photo.src);
    Object.assign(shown, { view, name, photo: picture, map: null });
    Object.assign(overlay, view);
    overlay.setAttribute("aria-label", name);
    repaint();
    find("stage").style.setProperty("--ratio", width / height);
    find("save").disabled = true;
    busy(true);
    result.hidden = false;
    document.body.classList.add("filled");
    result.scrollIntoView({ block: "nearest" });
    find("choose").textContent = "Choose another";
    if (loaded) say("Looking…");
    worker.postMessage({ number, pixels, height, width, view }, [pixels.buffer]);
  }
  const take = (files) => {
    if (files.length) show(files[0], files[0].name || "The photo");
  };

  find("choose").onclick = () => file.click();
  file.onchange = () => {
    take(file.files);
    file.value = ""; // the same photo may be chosen again
  };
  addEventListener("paste", (event) => take(event.clipboardData.files));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.classList.remove("over");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files);
    else complain("That was no file. Drop a photo from a folder, or save it first.");
  });

  // The camera.
  const viewfinder = find("viewfinder");
  const live = find("live");
  find("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  find("camera").onclick = async () => {
    complain("");
    try {
      const video = { facingMode: "environment", width: { ideal: 1920 } };
      live.srcObject = await navigator.mediaDevices.getUserMedia({ video });
      viewfinder.showModal();
    } catch (error) {
      complain(error.name === "NotAllowedError"
        ? "The camera is not allowed here. Allow it in the browser's settings for this page."
        : "There is no camera that this page could use.");
    }
  };
  viewfinder.onclose = () => {
    live.srcObject?.getTracks().forEach((track) => track.stop());
    live.srcObject = null;
  };
  find("leave").onclick = () => viewfinder.close();
  find("shoot").onclick = () => {
    if (!live.videoWidth) return; // the camera is still starting
    const picture = newCanvas({ height: live.videoHeight, width: live.videoWidth });
    picture.getContext("2d").drawImage(live, 0, 0);
    picture.toBlob((blob) => show(blob, "camera.png"));
    viewfinder.close();
  };

  // The overlay.
  opacity.oninput = () => {
    find("percent").textContent = `${opacity.value} %`;
    repaint();
  };
  find("save").onclick = () => {
    overlay.toBlob((blob) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = `${shown.name.replace(/\.[^.]*$/, "")}_overlay.png`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    });
  };
}

if (typeof document === "undefined") work();
else start();
