"""Load APT Prompts with the text files of `files` as ComfyUI's input folder."""

import json
import os

from comfyui import start

paths, _ = start()

import folder_paths
from apt_nodes import load_nodes, sentence

folder_paths.set_input_directory(paths["files"])
node = load_nodes(paths["pack"]).APTLoadPrompts


def read(file: str, start: int = 0, count: int = 0) -> list[str]:
    return node.execute(file, start, count).args[0]


listed = node.INPUT_TYPES()["required"]["file"][1]["options"]
before = node.fingerprint_inputs("good.txt", 0, 0)
again = node.fingerprint_inputs("good.txt", 0, 0)
result = {
    "listed": listed,
    "is a list": node.OUTPUT_IS_LIST,
    "built in": read("apt_mini_prompts"),
    "all": read("good.txt"),
    "from the second": read("good.txt", 1),
    "one": read("good.txt", 1, 1),
    "more than there are": read("good.txt", 2, 50),
    "sentences": [
        sentence(node.execute, "good.txt", 3, 0),
        sentence(node.execute, "empty.txt", 0, 0),
        sentence(node.execute, "latin.txt", 0, 0),
        sentence(node.execute, "gone.txt", 0, 0),
        sentence(node.execute, os.path.join("..", "outside.txt"), 0, 0),
    ],
    "same while untouched": before == again,
}
with open(os.path.join(paths["files"], "good.txt"), "a", encoding="utf-8") as file:
    file.write("\na new one")
result["anew"] = node.fingerprint_inputs("good.txt", 0, 0) != before and read("good.txt")[-1] == "a new one"
print(json.dumps(result))
