"""A real ComfyUI server in a process of its own, with its own folders, that never outlives its owner."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness import comfyui
from harness.client import Client, http_request
from harness.paths import CACHE, REPO
from harness.processes import die_with_parent, free_port, signal_group
from harness.prompt_result import ServerGone

PACK_NAME = "flux-hotswap"
HOST = "127.0.0.1"
_LOG_TAIL_LINES = 40
_PORT_ATTEMPTS = 3
_PORT_TAKEN = "is already in use on address"
# A link to the repository is the rule; where links need a privilege (Windows), a copy leaves these out.
_NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", ".cache", ".*_cache", ".hypothesis", "__pycache__", "demo-output", "bench-output"
)


class ServerFailed(RuntimeError):
    """The server ended or did not get ready; the message holds the end of its log."""


class ComfyServer:
    """Start a fetched ComfyUI on a free loopback port; leaving the context ends it.

    ```python
    with ComfyServer() as server, server.client() as client:
        result = client.run(graph, check=True)
    ```

    Start it in a thread that lives as long as the server should: on Linux the kernel ends the server together with
    the thread that started it, so that it dies even when its owner is killed.

    Args:
        base_directory: holds custom_nodes, models, input, output, temp and user, created as needed; put models there
            before or after the start. None: a temporary folder, deleted at the end.
        version: ComfyUI version, see `harness.comfyui.fetch`.
        include_pack: make this repository a custom node pack of the server.
        packs: further custom node packs (folders or single .py files).
        comfy_args: further command line arguments, for example ["--cache-none"].
        env: further environment variables.
        cpu: pass --cpu.
        ready_timeout_s: how long the start may take.
    """

    def __init__(
        self,
        base_directory: Path | None = None,
        *,
        version: str | None = None,
        include_pack: bool = True,
        packs: Iterable[Path] = (),
        comfy_args: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        cpu: bool = True,
        ready_timeout_s: float = 240.0,
    ) -> None:
        self.version = comfyui.resolve_version(version)
        self.host = HOST
        self.port = 0
        self._given_base = Path(base_directory).absolute() if base_directory else None
        self._packs = {Path(pack).name: Path(pack).absolute() for pack in packs}
        if include_pack:
            self._packs[PACK_NAME] = REPO
        self._comfy_args = [*(["--cpu"] if cpu else []), *comfy_args]
        self._env = dict(env or {})
        self._ready_timeout_s = ready_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._base = self._given_base
        self._final_log = ""

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address for a browser."""
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def base_directory(self) -> Path:
        """The folder with custom_nodes, models, input, output, temp and user. A temporary one exists from the start."""
        if self._base is None:
            raise ServerFailed("The server was not started, so it has no base directory yet: call start() first.")
        return self._base

    @property
    def models(self) -> Path:
        """The folder whose sub-folders hold model files (loras, diffusion_models, …)."""
        return self.base_directory / "models"

    @property
    def log(self) -> str:
        """All that the server wrote to stdout and stderr; also after it ended."""
        return self.log_since(0)

    def mark(self) -> int:
        """A position in the log, for `log_since`."""
        return self._log_path.stat().st_size if self._base and self._log_path.is_file() else 0

    def log_since(self, mark: int) -> str:
        """What the server wrote after `mark()` was taken."""
        if self._base and self._log_path.is_file():
            content = self._log_path.read_bytes()
        else:
            content = self._final_log.encode()
        return content[mark:].decode(errors="replace")

    def client(self) -> Client:
        """A new client of this server."""
        return Client(self.host, self.port)

    def start(self) -> ComfyServer:
        """Start the server and wait until it answers.

        Raises:
            ServerFailed: it ended or did not get ready in time.
            harness.comfyui.FetchError: there is no such ComfyUI.
        """
        if self._process is not None:
            raise ServerFailed(f"The server is already running on {self.url}: call stop() first.")
        source = comfyui.fetch(self.version)
        if self._base is None:
            self._base = Path(tempfile.mkdtemp(prefix="comfyui-"))
        atexit.register(self.stop)
        try:
            self._prepare(source)
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                try:
                    self._launch(source)
                    self._wait_until_ready()
                    break
                except ServerFailed:
                    # Another process can take the port between our look and ComfyUI's bind.
                    if attempt == _PORT_ATTEMPTS or _PORT_TAKEN not in self.log:
                        raise
                    self._end_process()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, grace_s: float = 5.0) -> None:
        """End the server and its children: SIGTERM, then SIGKILL after the grace period. Safe to call twice."""
        atexit.unregister(self.stop)
        self._end_process(grace_s)
        if self._base is not None and self._given_base is None:
            self._final_log = self.log
            shutil.rmtree(self._base, ignore_errors=True)
            self._base = None

    @property
    def _log_path(self) -> Path:
        return self.base_directory / "comfyui.log"

    def _prepare(self, source: Path) -> None:
        for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.base_directory / folder).mkdir(parents=True, exist_ok=True)
        for folder in (source / "models").iterdir():
            if folder.is_dir():
                (self.models / folder.name).mkdir(exist_ok=True)
        for name, target in self._packs.items():
            link_or_copy(target, self.base_directory / "custom_nodes" / name)

    def _launch(self, source: Path) -> None:
        self.port = free_port(HOST)
        command = [sys.executable, str(source / "main.py"), *self._comfy_args]
        command += ["--base-directory", str(self.base_directory), "--port", str(self.port)]
        command += ["--disable-api-nodes", "--disable-all-custom-nodes", "--database-url", "sqlite:///:memory:"]
        if self._packs:
            command += ["--whitelist-custom-nodes", *self._packs]
        with open(self._log_path, "wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.base_directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own process group, so that it can be ended with its children, and Ctrl-C reaches us alone.
                start_new_session=os.name != "nt",
                preexec_fn=die_with_parent(),
            )

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        # A path to the repository would put its `nodes` folder before ComfyUI's nodes.py; a "safe path" would hide
        # ComfyUI's own folder.
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            environment.pop(name, None)
        # Compiled kernels are shared among runs: a cold compile takes most of a minute on two cores.
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
        return {**environment, **self._env}

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while True:
            code = self._process.poll()
            if code is not None:
                raise ServerFailed(f"ComfyUI {self.version} ended with exit code {code} at its start. {self._tail()}")
            if self._answers():
                return
            if time.monotonic() >= deadline:
                raise ServerFailed(
                    f"ComfyUI {self.version} did not answer on {self.url} within {self._ready_timeout_s} s; "
                    f"raise ready_timeout_s if the machine is slow. {self._tail()}"
                )
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            stats = json.loads(http_request(f"{self.url}/system_stats", timeout=5))
        except (ServerGone, urllib.error.HTTPError, ValueError):
            return False
        # Not just any server on that port: ours.
        return str(self.base_directory) in stats["system"]["argv"]

    def _tail(self) -> str:
        lines = self.log.splitlines()[-_LOG_TAIL_LINES:]
        return "The end of its log:\n" + "\n".join(f"  | {line}" for line in lines)

    def _end_process(self, grace_s: float = 5.0) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.poll() is None:
                signal_group(process, force=False)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace_s)
        finally:
            # Also when the server itself is gone: its children (compile workers) may not be.
            signal_group(process, force=True)
            process.wait()


def link_or_copy(target: Path, link: Path) -> None:
    """Make `link` a link to a pack; a copy of it where the system allows no links."""
    if not target.exists():
        raise ServerFailed(f"Custom node pack {target} does not exist: expected a folder or a .py file.")
    if link.is_symlink():
        link.unlink()
    try:
        link.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        if target.is_dir():
            shutil.copytree(target, link, ignore=_NOT_COPIED, dirs_exist_ok=True)
        else:
            shutil.copyfile(target, link)
