"""A real ComfyUI server on the CPU, in a base directory of its own, with this pack as its registry zip would
hold it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACK = "ComfyUI-APT"
START_SECONDS = 1200
PROMPT_SECONDS = 1200


class Rejected(Exception):
    """POST /prompt said no. `node_errors` maps node ids to what is wrong with them."""

    def __init__(self, answer: dict):
        super().__init__(json.dumps(answer, indent=1))
        self.error, self.node_errors = answer["error"], answer["node_errors"]

    @property
    def sentences(self) -> list[str]:
        """What is said of each node, in the server's order."""
        return [
            f"{node['class_type']}: {error['message']}: {error['details']}"
            for node in self.node_errors.values()
            for error in node["errors"]
        ]


class Server:
    """Runs from `start` to `stop`; with `with` it does both. `base` holds models, input, output and
    custom_nodes.
    """

    def __init__(self, comfyui_dir: Path, base: Path, *arguments: str):
        self.comfyui_dir, self.base, self.arguments = comfyui_dir, base, arguments
        self.models, self.output, self.log_file = base / "models", base / "output", base / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Lay the pack into custom_nodes and run main.py until /object_info answers."""
        copy_pack(self.base / "custom_nodes" / PACK)
        command = [os.environ.get("COMFYUI_PYTHON", sys.executable), str(self.comfyui_dir / "main.py")]
        command += [
            "--cpu",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
            "--database-url",
            "sqlite:///:memory:",
        ]
        command += ["--disable-auto-launch", "--disable-api-nodes", *self.arguments]
        with self.log_file.open("w") as log:
            # Not in the checkout: ComfyUI writes beside its working directory, and `nodes` must be ComfyUI's
            # own.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.base, env=one_thread()
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (
                f"the server ended with {self.process.returncode}:\n{self.log()[-6000:]}"
            )
            try:
                self.get("/object_info/KSampler")
                return
            except urllib.error.URLError:
                time.sleep(0.5)
        self.stop()
        raise TimeoutError(f"the server did not answer within {START_SECONDS} s:\n{self.log()[-6000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def get(self, path: str):
        return self._answer(urllib.request.Request(self.url + path))

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return self._answer(request)

    def queue(self, prompt: dict) -> str:
        """The id under which the server accepted an API-format prompt. Raises Rejected."""
        prompt_id = str(uuid.uuid4())
        try:
            return self.post("/prompt", {"prompt": prompt, "prompt_id": prompt_id})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Rejected(json.load(error)) from None

    def wait(self, prompt_id: str, seconds: float = PROMPT_SECONDS) -> dict:
        """The prompt's entry in the history, when it is there: {outputs, status, prompt, ...}."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            assert self.process.poll() is None, (
                f"the server ended with {self.process.returncode}:\n{self.log()[-6000:]}"
            )
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt_id} took longer than {seconds} s:\n{self.log()[-6000:]}")

    def run(self, prompt: dict) -> dict[str, list[Path]]:
        """Queue, wait, and return the files that each output node wrote. Fails with the node's message."""
        entry = self.wait(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", failure(entry)
        return {node: self.files(output) for node, output in entry["outputs"].items()}

    def files(self, output: dict) -> list[Path]:
        """Paths of what a history entry lists for one output node."""
        places = {"output": self.output, "temp": self.base / "temp"}
        items = [
            item
            for value in output.values()
            for item in value
            if isinstance(item, dict) and "filename" in item
        ]
        return [places[item["type"]] / item["subfolder"] / item["filename"] for item in items]

    def interrupt(self, prompt_id: str | None = None) -> None:
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def memory(self) -> int:
        """Resident bytes of the server's process (Linux)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _answer(self, request: urllib.request.Request):
        with urllib.request.urlopen(request, timeout=600) as response:
            body = response.read()
        return json.loads(body) if body else None


def one_thread() -> dict[str, str]:
    """The environment of a process of ComfyUI: beside other load, threads that wait for one another in every
    operation stall it.
    """
    return os.environ | {"OMP_NUM_THREADS": "1"}


def failure(entry: dict) -> str:
    """The message of the node that failed, as the user sees it ("" when none did)."""
    errors = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    return f"{errors[0]['node_type']}: {errors[0]['exception_message'].strip()}" if errors else ""


def packed_files() -> list[str]:
    """What the registry's zip holds, relative to the root: files git knows or would add, without what
    .comfyignore names.
    """
    ignored = ["--ignored", "--exclude-from=.comfyignore"]
    files = _git("--cached", "--others", "--exclude-standard")
    return sorted(
        file
        for file in files - _git("--cached", *ignored) - _git("--others", *ignored)
        if (ROOT / file).is_file()
    )


def copy_pack(folder: Path) -> None:
    for file in packed_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)


def _git(*arguments: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return set(listed.split("\0")) - {""}
