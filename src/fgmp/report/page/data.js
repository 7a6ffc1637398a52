// What the page carries: numbers as JSON, and maps and windows of codes, compressed by zlib.

const DATA = JSON.parse(document.getElementById("data").textContent);
const CHECKPOINTS = DATA.checkpoints;
const SEVERAL = CHECKPOINTS.length > 1;

const byId = (id) => document.getElementById(id);

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** Bytes of a script element that holds base64 of compressed bytes. */
async function inflated(id) {
  const compressed = new Blob([bytesOf(byId(id).textContent)]).stream();
  const stream = compressed.pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Little-endian bf16 numbers of base64. */
function bf16Of(base64) {
  const bytes = bytesOf(base64);
  const view = new DataView(new ArrayBuffer(4));
  return Float64Array.from({ length: bytes.length >> 1 }, (_, i) => {
    view.setUint16(0, bytes[2 * i] | (bytes[2 * i + 1] << 8));
    return view.getFloat32(0);
  });
}

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;
const short = (number) => (number === 0 ? "0" : Number(number).toPrecision(3));

function sizeOf(bytes) {
  const units = ["bytes", "kB", "MB", "GB"];
  let unit = 0;
  while (bytes >= 1000 && unit < 3) {
    bytes /= 1000;
    unit++;
  }
  return `${unit ? bytes.toPrecision(3) : bytes} ${units[unit]}`;
}

/** Values of `key` in order of appearance. */
const distinct = (list, key) => [...new Set(list.map((item) => item[key]))];
const total = (list, value) => list.reduce((sum, item) => sum + value(item), 0);
const layerLabel = (layer) => (/^\d+$/.test(layer) ? `layer ${layer}` : layer);
