// ComfyUI lists a pack's templates as the file system does, in any order. By name, those that need no download come first.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.match(/\/extensions\/([^/]+)\//)[1]);

app.registerExtension({
  name: "ComfyUI-APT.TemplateOrder",
  init() {
    const listed = api.getWorkflowTemplates;
    api.getWorkflowTemplates = async function (...rest) {
      const templates = await listed.apply(this, rest);
      templates[PACK]?.sort();
      return templates;
    };
  },
});
