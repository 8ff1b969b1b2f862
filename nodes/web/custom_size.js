// The custom size of Empty APT Latent starts at the size that the connected model was trained for, as the
// metadata of its file has it.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

// Node: widget with the file's name, folders in which it can be.
const MODELS = {
  APTLoadCheckpoint: ["checkpoint", "diffusion_models", "apt"],
  UNETLoader: ["unet_name", "diffusion_models"],
};
const LORAS = { LoraLoaderModelOnly: ["lora_name", "loras"], LoraLoader: ["lora_name", "loras"] };
const START = { width: 832, height: 480, frames: 49 };

async function metadata(node, [widget, ...folders]) {
  const file = node.widgets?.find((w) => w.name === widget)?.value;
  for (const folder of folders) {
    const answer = await api.fetchApi(`/view_metadata/${folder}?filename=${encodeURIComponent(file)}`);
    if (answer.ok) return JSON.parse((await answer.json()).apt ?? "{}");
  }
  return {};
}

function modelAbove(node) {
  const slot = node.inputs?.findIndex((input) => input.type === "MODEL") ?? -1;
  return slot < 0 ? null : node.getInputNode(slot);
}

// As read_model of nodes/wan_model.py: the model's own file, but of a base the last LoRA on it tells what
// became of it.
async function nativeSize(latent) {
  let lora;
  for (let node = modelAbove(latent); node; node = modelAbove(node)) {
    if (LORAS[node.type]) lora ??= (await metadata(node, LORAS[node.type])).native;
    if (!MODELS[node.type]) continue;
    const file = await metadata(node, MODELS[node.type]);
    return (file.kind !== "generator" && lora) || file.native;
  }
}

async function fill(latent) {
  const native = await nativeSize(latent);
  for (const [name, start] of Object.entries(START)) {
    const widget = latent.widgets.find((w) => w.name === `size.${name}`);
    if (native && widget?.value === start) widget.value = native[name];
  }
  latent.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "ComfyUI-APT.CustomSize",
  nodeCreated(node) {
    if (node.comfyClass !== "APTEmptyLatent") return;
    const size = node.widgets.find((w) => w.name === "size");
    const callback = size.callback;
    size.callback = function (value, ...more) {
      const result = callback?.call(this, value, ...more);
      if (value === "custom") fill(node).catch((error) => console.warn(`Empty APT Latent: ${error}`));
      return result;
    };
  },
});
