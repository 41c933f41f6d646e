// The viewer: nothing is decoded before it is opened, and everything is let go when it is closed.
const LAYOUTS = [["planes + 3D", 3], ["axial", 0], ["coronal", 1], ["sagittal", 2], ["3D", 4]];
const KEYS = "1–5 layout · s next scan · w window · m masks · x prediction or what to compare it with · u uncertainty · g grid · " +
  "o outlines · +/− opacity · arrows, page up/down: move · c cut 3D · [ ] scene · f full screen · Esc close";
const UNCERTAIN = [13, 140]; // of 255: where its colours begin and end

const make = (tag, attributes = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
};
const unzipped = async (bytes) =>
  new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
const decoded = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const lacking = () => {
  if (typeof DecompressionStream === "undefined") return "it is too old";
  if (!document.createElement("canvas").getContext("webgl2")) return "it lacks WebGL 2";
  return "";
};

let library = null;
const niivueOf = (box) => {
  library ??= unzipped(decoded(box.querySelector("script.code").textContent)).then((code) => {
    document.head.append(make("script", { textContent: new TextDecoder().decode(code) }));
    return globalThis.niivue;
  });
  return library;
};

class Viewer {
  constructor(box, niivue) {
    Object.assign(this, { box, niivue, stage: box.querySelector(".stage"), said: box.querySelector(".said") });
    this.scenes = [...box.querySelectorAll("script.scene")].map((block) => JSON.parse(block.textContent));
    this.controls = {};
    this.layout = 0;
    this.opacity = 0.5;
  }

  async open() {
    this.canvas = make("canvas");
    this.canvas.setAttribute("aria-label", "slices and 3D");
    this.picture = make("div", { className: "canvas" }, this.canvas);
    this.bars = make("div", { className: "bars" });
    this.place = make("p", { className: "hint place" });
    this.stage.append(this.bars, this.picture, this.place, make("p", { className: "hint keys", textContent: KEYS }));
    this.stage.hidden = false;
    this.nv = new this.niivue.Niivue({
      dragAndDropEnabled: false, isRadiologicalConvention: true, sagittalNoseLeft: true, logLevel: "error",
      multiplanarShowRender: 1, clipPlaneHotKey: "", cycleClipPlaneHotKey: "", viewModeHotKey: "",
      crosshairColor: [1, 0.85, 0.4, 0.8], crosshairWidth: 0.25, crosshairWidthUnit: "percent", crosshairGap: 4,
      scrollRequiresFocus: true, isSliceMM: true, meshThicknessOn2D: 4, fontColor: [1, 1, 1, 1], fontMinPx: 12,
      fontSizeScaling: 0.3, loadingText: "", tileMargin: 4, isAlphaClipDark: true, isCornerOrientationText: true,
      clipPlaneColor: [0, 0, 0, 0],
    });
    await this.nv.attachToCanvas(this.canvas, true);
    this.nv.onLocationChange = (found) => this.tell(found);
    this.stage.addEventListener("keydown", this.key, true);
    await this.show(0);
    this.stage.focus({ preventScroll: true });
  }

  close() {
    this.stage.removeEventListener("keydown", this.key, true);
    this.nv.cleanup();
    this.nv.gl.getExtension("WEBGL_lose_context")?.loseContext();
    this.stage.replaceChildren();
    this.stage.hidden = true;
  }

  async show(number) {
    this.number = number;
    this.said.textContent = "reading …";
    const block = this.scenes[number];
    const scene = block.at ? await served(block.at) : block;
    this.clear();
    this.scans = [];
    this.layers = [];
    for (const layer of scene.layers) await this.add(layer);
    this.scan = this.scans.length - 1;
    this.window = 0;
    this.draw();
    this.clip(this.cut || this.layers.some((layer) => layer.kind === "surface"));
    if (this.scans.length) this.apply();
    else this.update();
    this.arrange(this.flat ? this.layout : 4);
    this.said.textContent = scene.remarks.join(" ");
  }

  clip(cut) { // surfaces lie inside the scan: only its far side stays behind them
    this.cut = cut;
    const deep = this.layers.some((layer) => layer.kind === "surface");
    this.nv.setClipPlane(cut ? [deep ? -0.45 : 0, deep ? 0 : 270, 0] : [2, 0, 0]);
  }

  clear() {
    for (const mesh of [...this.nv.meshes]) this.nv.removeMesh(mesh);
    this.nv.volumes = [];
    this.nv.back = null;
    this.nv.overlays = [];
  }

  async add(layer) {
    const content = await unzipped(layer.at ? await servedBytes(layer.at) : decoded(layer.data));
    const entry = { ...layer, data: null, on: layer.shown };
    if (layer.kind === "lines" || layer.kind === "surface") {
      const lines = layer.kind === "lines";
      const colour = new Uint8Array([...(layer.colour ?? [86, 180, 233]), 255]);
      entry.mesh = await this.niivue.NVMesh.readMesh(
        content, `${layer.name}.${lines ? "tck" : "mz3"}`, this.nv.gl, 1, colour, true,
      );
      if (lines) Object.assign(entry.mesh, { fiberColor: "Fixed", fiberRadius: 0 });
      if (lines) entry.mesh.updateMesh(this.nv.gl);
      this.nv.opts.meshThicknessOn2D = lines ? 0.55 * layer.step : 2; // in every slice lie lines, and none twice
      this.nv.addMesh(entry.mesh);
    } else {
      entry.image = await this.niivue.NVImage.new(content, `${layer.name}.nii`, "gray", 1);
      if (layer.kind === "labels") this.colour(entry);
      if (layer.kind === "share") {
        entry.image.colormap = "inferno"; // see-through where low
        [entry.image.cal_min, entry.image.cal_max] = UNCERTAIN;
      }
      if (layer.kind !== "scan" || !this.scans.length) this.nv.addVolume(entry.image);
    }
    (layer.kind === "scan" ? this.scans : this.layers).push(entry);
  }

  colour(entry) {
    const rows = [{ name: "", colour: [0, 0, 0] }, ...entry.labels];
    const [R, G, B] = [0, 1, 2].map((channel) => rows.map((row) => row.colour[channel]));
    entry.image.setColormapLabel({
      R, G, B, A: rows.map((_, index) => (index ? 255 : 0)), I: rows.map((_, index) => index),
      labels: rows.map((row) => row.name),
    });
  }

  get seen() {
    const state = this.scans[this.scan]?.name;
    return this.layers.filter((layer) => layer.on && (!layer.state || layer.state === state));
  }

  apply() { // the chosen scan in the chosen window
    const { image, windows } = this.scans[this.scan];
    const { low, high } = windows[this.window];
    [image.cal_min, image.cal_max] = [low, high];
    this.update();
  }

  update() { // only what is seen lies in the stack: NiiVue lets layers of no opacity cover others
    const seen = this.seen;
    for (const layer of this.layers) {
      if (layer.mesh) layer.mesh.visible = seen.includes(layer);
      else layer.image._opacity = !seen.includes(layer) ? 0 : layer.kind === "share" ? 0.6 : this.opacity;
    }
    const ground = this.scans[this.scan]?.image ?? this.layers.find((layer) => layer.image)?.image;
    const over = seen.map((layer) => layer.image).filter((image) => image && image !== ground);
    this.nv.volumes = ground ? [ground, ...over] : [];
    this.nv.back = ground ?? null;
    this.nv.overlays = over;
    this.nv.updateGLVolume();
    if (ground) this.nv.createOnLocationChange();
    this.controls.sync?.();
  }

  arrange(layout) {
    if (this.flat) this.layout = layout;
    this.nv.setSliceType(LAYOUTS[layout][1]);
    this.now = layout;
    this.controls.sync?.();
  }

  tell(found) {
    const [x, y, z] = found.mm;
    const sides = [[x, "R", "L"], [y, "A", "P"], [z, "S", "I"]].map(
      ([mm, above, below]) => `${Math.abs(mm).toFixed(1)} ${mm < 0 ? below : above}`,
    );
    const told = this.seen.filter((layer) => layer.image).map((layer) => {
      const value = found.values[this.nv.volumes.indexOf(layer.image)]?.value;
      if (layer.kind === "share") return `${layer.name} ${((value / 255) * 100).toFixed(0)} %`;
      return value ? `${layer.name}: ${layer.labels[value - 1]?.name}` : "";
    });
    if (this.scans.length) told.unshift(`${this.scans[this.scan].name} ${+found.values[0].value.toPrecision(4)}`);
    this.place.textContent = [`${sides.join(", ")} mm`, ...told.filter(Boolean)].join(" · ");
  }

  draw() { // the controls of this scene
    const bars = [], sync = [];
    const bar = (...children) => bars.push(make("div", { className: "legend" }, ...children));
    const press = (title, act, on) => {
      const button = make("button", { type: "button", textContent: title, onclick: () => { act(); this.controls.sync(); } });
      if (on) sync.push(() => button.setAttribute("aria-pressed", on()));
      return button;
    };
    const choose = (title, options, value, act) => {
      const list = make("select", { ariaLabel: title }, ...options.map((name, i) => new Option(name, i)));
      list.onchange = () => act(+list.value);
      sync.push(() => { list.value = value(); });
      return list;
    };
    if (this.scenes.length > 1) {
      const names = this.scenes.map((scene) => scene.title);
      bar(press("‹", () => this.step(-1)), choose("scene", names, () => this.number, (i) => this.show(i)), press("›", () => this.step(1)));
    }
    const layouts = LAYOUTS.map(([name], i) => ({ name, i })).filter(({ i }) => this.flat || i === 4);
    if (this.flat) bar(...layouts.map(({ name, i }) => press(name, () => this.arrange(i), () => this.now === i)));
    if (this.scans.length > 1) {
      bar(...this.scans.map((scan, i) => press(scan.name, () => this.pick(i), () => this.scan === i)));
    }
    if (this.scans.length) {
      const names = this.scans[0].windows.map((one) => `window: ${one.name}`);
      bar(choose("window", names, () => this.window, (i) => { this.window = i; this.apply(); }), ...this.opacities());
    }
    const boxes = this.layers.map((layer) => this.tick(layer, sync));
    const parts = boxes.filter((_, i) => this.layers[i].kind === "surface");
    bar(...boxes.filter((_, i) => this.layers[i].kind !== "surface"));
    bars.push(this.fold(`${parts.length} parts`, parts, 12));
    const names = this.layers.find((layer) => layer.labels)?.labels ?? [];
    const swatches = names.map(({ name, colour }) => make("span", { className: "swatch" }, this.dot(colour), name));
    bars.push(this.fold(`${names.length} labels`, swatches, 6));
    this.bars.replaceChildren(...bars.filter((row) => row?.childElementCount));
    this.controls.sync = () => sync.forEach((act) => act());
  }

  get flat() {
    return this.layers.some((layer) => layer.image) || this.scans.length > 0;
  }

  dot(colour) {
    const mark = make("i");
    mark.style.background = `rgb(${colour.join()})`;
    return mark;
  }

  tick(layer, sync) {
    const input = make("input", { type: "checkbox" });
    input.onchange = () => { layer.on = input.checked; this.update(); };
    const label = make("label", {}, input, ...(layer.colour ? [this.dot(layer.colour)] : []), layer.name);
    sync.push(() => {
      input.checked = layer.on;
      label.hidden = Boolean(layer.state) && layer.state !== this.scans[this.scan]?.name;
    });
    return label;
  }

  opacities() {
    const range = make("input", { type: "range", min: 0.1, max: 1, step: 0.1, value: this.opacity, ariaLabel: "opacity of masks" });
    range.oninput = () => { this.opacity = +range.value; this.update(); };
    this.range = range;
    return [make("label", {}, "masks", range)];
  }

  fold(title, children, few) {
    if (!children.length) return null;
    const list = make("div", { className: "legend" }, ...children);
    if (children.length <= few) return list;
    return make("details", {}, make("summary", { textContent: title }), list);
  }

  pick(scan) {
    this.scan = scan;
    this.apply();
  }

  step(by) {
    return this.show((this.number + by + this.scenes.length) % this.scenes.length);
  }

  swap(kinds) { // all of these layers on, or all of them off
    const layers = this.layers.filter(kinds);
    const on = !layers.some((layer) => layer.on);
    for (const layer of layers) layer.on = on;
    this.update();
  }

  exchange() { // the labels to compare with instead of those shown at first, and back
    const labels = this.layers.filter((layer) => layer.kind === "labels");
    if (!labels.some((layer) => !layer.shown)) return;
    const back = labels.some((layer) => !layer.shown && layer.on);
    for (const layer of labels) layer.on = layer.shown === back;
    this.update();
  }

  fade(by) {
    this.opacity = Math.min(1, Math.max(0.1, this.opacity + by));
    if (this.range) this.range.value = this.opacity;
    this.update();
  }

  key = (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || /^(select|textarea)$/i.test(event.target.tagName)) return;
    const move = (x, y, z) => () => this.nv.moveCrosshairInVox(x, y, z);
    const act = {
      ArrowLeft: move(1, 0, 0), ArrowRight: move(-1, 0, 0), ArrowUp: move(0, 1, 0), ArrowDown: move(0, -1, 0),
      PageUp: move(0, 0, 1), PageDown: move(0, 0, -1),
      s: () => this.scans.length > 1 && this.pick((this.scan + 1) % this.scans.length),
      w: () => { if (this.scans.length) { this.window = (this.window + 1) % this.scans[0].windows.length; this.apply(); } },
      m: () => this.swap((layer) => layer.kind === "labels"),
      u: () => this.swap((layer) => layer.kind === "share"),
      g: () => this.swap((layer) => layer.kind === "lines"),
      x: () => this.exchange(),
      o: () => this.nv.setAtlasOutline(this.nv.opts.atlasOutline ? 0 : 1),
      c: () => this.clip(!this.cut),
      "+": () => this.fade(0.1), "=": () => this.fade(0.1), "-": () => this.fade(-0.1),
      "[": () => this.step(-1), "]": () => this.step(1),
      f: () => (document.fullscreenElement ? document.exitFullscreen() : this.stage.requestFullscreen?.()),
      Escape: () => this.box.querySelector(".start button").click(),
    }[event.key] ?? (/^[1-5]$/.test(event.key) && this.flat ? () => this.arrange(event.key - 1) : null);
    if (!act || (event.target.type === "range" && event.key.startsWith("Arrow"))) return;
    event.preventDefault();
    event.stopPropagation();
    act();
    this.controls.sync?.();
  };
}

for (const box of document.querySelectorAll(".viewer")) {
  const button = box.querySelector(".start button"), said = box.querySelector(".said");
  const why = lacking();
  let open = null;
  if (why) {
    said.textContent = `This browser cannot show the viewer: ${why}. The pictures on this page show the same.`;
    continue;
  }
  button.hidden = false;
  button.addEventListener("click", async () => {
    if (open) {
      open.close();
      open = null;
      button.textContent = "Open the viewer";
      said.textContent = "";
      return;
    }
    button.disabled = true;
    said.textContent = "opening …";
    try {
      open = new Viewer(box, await niivueOf(box));
      await open.open();
      button.textContent = "Close the viewer";
    } catch (error) {
      open?.stage.replaceChildren();
      open = null;
      said.textContent = `The viewer could not be opened (${error.message}). The pictures on this page show the same.`;
    }
    button.disabled = false;
  });
}
