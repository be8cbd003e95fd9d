import * as ort from "/ort.mjs";
const element = (id) => document.getElementById(id), make = (name, of) => Object.assign(document.createElement(name), of);
Object.assign(ort.env.wasm, { numThreads: 1, wasmPaths: { wasm: "/ort.wasm" } });
const student = await (await fetch("/student.json")).json(), [height, width, channels] = student.shape;
const session = await ort.InferenceSession.create("/student.onnx", { executionProviders: ["wasm"] });
const compute = (pixels) => session.run({ images: new ort.Tensor("uint8", pixels, [1, height, width, channels]) });
await compute(new Uint8Array(height * width * channels)); // the first time takes longer

// Whether pipeline/core/images.py takes a file's pixels: 8-bit grey, RGB or palette, without transparency; and they are still.
function isSupported(bytes) {
  if (/tiff:Orientation(="|>)[2-8]/.test(new TextDecoder("latin1").decode(bytes))) throw new Error("turned by XMP");
  const view = new DataView(bytes.buffer), chunk = (at) => String.fromCharCode(...bytes.subarray(at + 4, at + 8));
  if (view.getUint32(0) === 0x89504e47) {
    let at = 8;
    while (!["IDAT", "tRNS", "acTL"].includes(chunk(at))) at += 12 + view.getUint32(at);
    return bytes[24] < 16 && bytes[24] + bytes[25] > 1 && !(bytes[25] & 4) && chunk(at) === "IDAT"; // bits, kind of colour
  }
  if (view.getUint16(0) !== 0xffd8) throw new Error("neither PNG nor JPEG (pipeline.serving.predict reads TIFF, too)");
  let at = 2; // of a segment, before which more FF may stand; the frame is C0 to CF, but for C4, C8 and CC
  while (bytes[at + 1] >> 4 !== 0xc || [0xc4, 0xc8, 0xcc].includes(bytes[at + 1]))
    at += bytes[at + 1] === 0xff ? 1 : 2 + view.getUint16(at + 2);
  return [1, 3].includes(bytes[at + 9]);
}

// A file's image, upright, a plane for each of the student's channels; grey is ITU-R 601's luma with Pillow's rounding.
async function read(file) {
  if (!isSupported(new Uint8Array(await file.arrayBuffer()))) throw new Error("only 8-bit grey, RGB or palette, opaque, still");
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }), { width: w, height: h } = bitmap;
  if (w * h > 89478485) throw new Error("over 89 million pixels");
  const context = new OffscreenCanvas(w, h).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, w, h), planes = Array.from({ length: channels }, () => new Uint8Array(w * h));
  for (let i = 0; i < data.length; i += 4)
    if (channels === 1) planes[0][i / 4] = (19595 * data[i] + 38470 * data[i + 1] + 7471 * data[i + 2] + 32768) >> 16;
    else planes.forEach((pixels, c) => (pixels[i / 4] = data[i + c]));
  return planes.map((pixels) => ({ pixels, w, h }));
}

// The `part` middle columns of a plane as `count` columns, transposed: a second call does the rows. Pillow's bilinear filter,
// its arithmetic: ends are floats of 32 bits, weights whole numbers of 2^-22.
function scale({ pixels, w, h }, part, count) {
  const from = Math.fround((w - part) / 2), step = Math.fround(Math.fround((w - part) / 2 + part) - from) / count;
  const reach = Math.max(step, 1), scaled = { pixels: new Uint8Array(count * h), w: h, h: count };
  for (let x = 0; x < count; x++) {
    const centre = from + (x + 0.5) * step, first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const length = Math.min(Math.trunc(centre + reach + 0.5), w) - first;
    const shares = Array.from({ length }, (_, i) => Math.max(1 - Math.abs((i + first - centre + 0.5) * (1 / reach)), 0));
    const whole = shares.reduce((a, b) => a + b), weights = shares.map((share) => Math.trunc((share / whole) * 2 ** 22 + 0.5));
    for (let y = 0; y < h; y++)
      scaled.pixels[x * h + y] = weights.reduce((sum, weight, i) => sum + weight * pixels[y * w + first + i], 2 ** 21) >> 22;
  }
  return scaled;
}

// A plane in the student's size by the rule of its training images, fit_image of pipeline/core/images.py; halves round to even.
function fit(plane) {
  const { w, h } = plane, ratio = width / height, round = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));
  const wide = w / h > ratio, high = w / h < ratio, crop = student.resize === "crop", pad = student.resize === "pad";
  if (!student.resize && (w !== width || h !== height)) throw new Error(`${w}x${h} pixels; ${width}x${height} are wanted`);
  const [columns, rows] = [pad && high ? round((w / h) * height) : width, pad && wide ? round((h / w) * width) : height];
  const { pixels } = scale(scale(plane, crop && wide ? ratio * h : w, columns), crop && high ? w / ratio : h, rows);
  const fitted = new Uint8Array(width * height), [x, y] = [round((width - columns) / 2), round((height - rows) / 2)];
  for (let row = 0; row < rows; row++) fitted.set(pixels.subarray(row * columns, (row + 1) * columns), (y + row) * width + x);
  return fitted;
}

async function answer(file) {
  const say = (text) => (element("answer").textContent = `${file.name}: ${text}`), started = performance.now();
  element("result").hidden = true;
  try {
    const planes = (await read(file)).map(fit), pixels = new Uint8Array(width * height * channels);
    planes.forEach((plane, c) => plane.forEach((value, i) => (pixels[i * channels + c] = value)));
    const ready = performance.now(), { data } = (await compute(pixels)).probabilities, finished = performance.now();
    const times = `computed in ${(finished - ready).toFixed(1)} ms, read and resized in ${(ready - started).toFixed(1)} ms`;
    element("probabilities").replaceChildren();
    student.classes.forEach((name, k) => {
      const row = element("probabilities").insertRow(), value = data[k], textContent = `${(100 * value).toFixed(2)} %`;
      for (const cell of [name, make("data", { value, textContent }), make("meter", { value })]) row.insertCell().append(cell);
    });
    const seen = new ImageData(width, height);
    seen.data.forEach((_, i) => (seen.data[i] = i % 4 === 3 ? 255 : planes[(i % 4) % channels][i >> 2]));
    Object.assign(element("seen"), { width, height }).getContext("2d").putImageData(seen, 0, 0);
    element("result").hidden = false;
    say(`${student.classes[data.indexOf(Math.max(...data))]} (${times})`);
  } catch (error) {
    say(`cannot be read as an image: ${error instanceof RangeError ? "damaged" : error.message}`);
  }
}

let last = Promise.resolve(); // one image after the other
const take = ([file]) => (last = file ? last.then(() => answer(file)) : last);
ondragover = (event) => event.preventDefault();
ondrop = (event) => (event.preventDefault(), take(event.dataTransfer.files));
Object.assign(element("file"), { disabled: false, onchange: ({ target }) => take(target.files) });
const rule = student.resize ? `are resized by the rule ${student.resize}` : "are refused", names = student.classes.join(", ");
element("about").textContent = `${student.file} tells apart: ${names}. Images that are not ${width}x${height} ${rule}.`;
