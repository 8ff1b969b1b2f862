// ComfyUI lists a pack's templates as the file system does, in any order. Here the one to begin with comes
// first, the others by name, which puts those first that need no download.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.match(/\/extensions\/([^/]+)\//)[1]);

const FIRST = "apt_mini_text_to_video";

app.registerExtension({
  name: "ComfyUI-APT.TemplateOrder",
  init() {
    const listed = api.getWorkflowTemplates;
    api.getWorkflowTemplates = async function (...rest) {
      const templates = await listed.apply(this, rest);
      templates[PACK]?.sort((a, b) => (b === FIRST) - (a === FIRST) || (a < b ? -1 : 1));
      return templates;
    };
  },
});
