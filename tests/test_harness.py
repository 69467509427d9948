"""The harness on real ComfyUI servers: without the pack, so that a failure here is the harness's own."""

import contextlib
import io
import os
import subprocess
import sys
import tarfile
import textwrap
import time

import psutil
import pytest
from PIL import Image

from harness import comfyui, paths, setup
from harness.prompt_result import GraphRejected, PromptFailed, PromptLost, ServerGone
from harness.server import ComfyServer, ServerFailed, link_or_copy

TEST_NODES = textwrap.dedent(
    """
    import time
    import comfy.utils
    from server import PromptServer

    class Raises:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "execute", True, "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"message": ("STRING", {})}}

        def execute(self, message):
            raise ValueError(message)

    class Steps:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "execute", True, "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {
                "required": {"steps": ("INT", {"max": 10000}), "seconds": ("FLOAT", {})},
                "hidden": {"unique_id": "UNIQUE_ID"},
            }

        def execute(self, steps, seconds, unique_id):
            PromptServer.instance.send_progress_text("stepping", unique_id)
            bar = comfy.utils.ProgressBar(steps)
            for _ in range(steps):
                time.sleep(seconds)
                bar.update(1)
            return {"ui": {"text": [f"{steps} steps"]}}

    NODE_CLASS_MAPPINGS = {"HarnessRaises": Raises, "HarnessSteps": Steps}
    """
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    nodes = tmp_path_factory.mktemp("pack") / "harness_test_nodes.py"
    nodes.write_text(TEST_NODES)
    with pytest.MonkeyPatch.context() as patch:
        # The repository on PYTHONPATH would hide ComfyUI's nodes.py behind the pack's folder of that name.
        patch.setenv("PYTHONPATH", str(paths.REPO))
        running = ComfyServer(tmp_path_factory.mktemp("base"), include_pack=False, packs=[nodes]).start()
    yield running
    running.stop()


@pytest.fixture
def client(server):
    with server.client() as connected:
        yield connected


def image_graph(color: int, prefix: str = "harness") -> dict:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 48, "height": 32, "batch_size": 1, "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def steps_graph(steps: int, seconds: float) -> dict:
    return {"7": {"class_type": "HarnessSteps", "inputs": {"steps": steps, "seconds": seconds}}}


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until_gone(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


# The client


def test_object_info(client):
    assert "KSampler" in client.object_info()
    assert "steps" in client.object_info("KSampler")["KSampler"]["input"]["required"]
    assert client.object_info("NoSuchNode") == {}


def test_image_comes_back(client, server):
    result = client.run(image_graph(0x336699, "folder/harness"), check=True)

    assert result.status == "success"
    assert result.error is None
    assert result.executed == ["1", "2"]
    (image,) = result.outputs["2"]["images"]
    assert (server.base_directory / "output" / "folder" / image["filename"]).is_file()
    picture = Image.open(io.BytesIO(client.view(**image)))
    assert picture.size == (48, 32)
    assert picture.getpixel((5, 5)) == (0x33, 0x66, 0x99)


def test_second_run_is_cached(client):
    client.run(image_graph(0x010203), check=True)
    again = client.run(image_graph(0x010203), check=True)

    assert again.cached == ["1", "2"]
    assert again.executed == []


def test_unknown_node_is_rejected(client):
    with pytest.raises(GraphRejected, match=r"'NoSuchNode' not found.*Node ID '#5'"):
        client.queue({"5": {"class_type": "NoSuchNode", "inputs": {}}})


def test_bad_value_is_rejected_with_node_and_input(client):
    graph = image_graph(0)
    graph["1"]["inputs"]["width"] = -3

    with pytest.raises(GraphRejected, match=r"node 1 \(EmptyImage\): .*min.*width") as rejection:
        client.queue(graph)

    assert list(rejection.value.node_errors) == ["1"]


def test_partly_valid_graph_does_not_pass_as_success(client):
    graph = image_graph(0x040506)
    graph["3"] = {"class_type": "HarnessSteps", "inputs": {"steps": 20000, "seconds": 0.0}}

    with pytest.raises(PromptFailed, match=r"node 3 \(HarnessSteps\): .*max.*steps"):
        client.run(graph, check=True)


def test_node_error_names_node_and_message(client):
    graph = {"9": {"class_type": "HarnessRaises", "inputs": {"message": "the reason"}}}

    result = client.run(graph)

    assert result.status == "error"
    assert (result.error.node_id, result.error.node_type) == ("9", "HarnessRaises")
    assert result.error.exception_type == "ValueError"
    assert result.error.exception_message == "the reason"
    assert "harness_test_nodes.py" in result.error.traceback
    with pytest.raises(PromptFailed, match=r"Node 9 \(HarnessRaises\) raised ValueError: the reason"):
        client.run(graph, check=True)


def test_events_of_a_run(client):
    seen = []

    result = client.run(steps_graph(3, 0.15), on_event=seen.append, check=True)

    assert result.outputs == {"7": {"text": ["3 steps"]}}
    assert result.progress == [("7", 1, 3), ("7", 2, 3), ("7", 3, 3)]
    assert result.progress_texts == [("7", "stepping")]
    assert seen == result.events
    assert 0.45 <= result.seconds < 30


def test_events_are_kept_for_a_late_listener(client):
    prompt_id = client.queue(steps_graph(2, 0.0))
    deadline = time.monotonic() + 30
    while any(client.queue_state().values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.queue_state() == {"running": [], "pending": []}

    result = client.wait(prompt_id)

    assert result.executed == ["7"]
    assert result.events[-1].data["node"] is None


def test_interrupt(client):
    result = client.run(
        steps_graph(3000, 0.02),
        on_event=lambda event: client.interrupt() if event.type == "progress" else None,
        timeout=30,
    )

    assert result.status == "interrupted"
    assert result.error is None


def test_timeout_says_what_was_going_on(client):
    prompt_id = client.queue(steps_graph(3000, 0.02))
    with pytest.raises(TimeoutError, match=rf"{prompt_id} has not ended after 1.0 s.*Last event: progress"):
        client.wait(prompt_id, timeout=1.0)
    client.interrupt()
    assert client.wait(prompt_id).status == "interrupted"


def test_unknown_prompt(client):
    with pytest.raises(PromptLost, match="neither queued, nor running"):
        client.wait("00000000-0000-0000-0000-000000000000", timeout=10)


def test_free_leaves_the_server_usable(client):
    client.run(image_graph(0x0A0B0C), check=True)
    client.free()
    time.sleep(2)  # the server frees when its queue loop wakes up

    assert client.run(image_graph(0x0A0B0C), check=True).executed == ["1", "2"]


# The server


def test_log_since_a_mark(client, server):
    client.run(steps_graph(1, 0.0), check=True)
    mark = server.mark()
    client.run(steps_graph(2, 0.0), check=True)

    assert server.log_since(mark).count("got prompt") == 1
    assert server.log.count("got prompt") > 1


def test_server_ends_with_its_context_even_on_ctrl_c(server):
    """The last test of the file's server, which it ends."""
    client, pid = server.client(), server.pid
    assert is_running(pid)

    def session():
        with contextlib.ExitStack() as stack:
            stack.push(server)  # its `__exit__`: the server runs already
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session()

    assert not is_running(pid)
    assert server.pid is None
    assert "To see the GUI" in server.log
    assert server.base_directory.is_dir(), "a given base directory stays"
    with pytest.raises(ServerGone):
        client.object_info()
    client.close()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a child with its parent")
def test_server_ends_when_its_owner_is_killed(tmp_path):
    """Killed while the server starts: the kernel asks for no more than a child."""
    script = (
        "import os, signal, sys, threading, time\n"
        "from harness.server import ComfyServer\n"
        "server = ComfyServer(sys.argv[1], include_pack=False)\n"
        "def kill():\n"
        "    while server.pid is None:\n"
        "        time.sleep(0.01)\n"
        "    time.sleep(0.5)\n"
        "    print(server.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=kill).start()\n"
        "server.start()\n"
    )
    owner = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=paths.REPO, stdout=subprocess.PIPE, text=True, check=False
    )

    assert owner.returncode == -9
    assert wait_until_gone(int(owner.stdout))


@pytest.mark.slow
def test_failed_start_shows_the_log():
    server = ComfyServer(include_pack=False, comfy_args=["--no-such-option"])
    with pytest.raises(ServerFailed, match=r"(?s)exit code 2 at its start.*unrecognized arguments: --no-such-option"):
        server.start()
    assert server.pid is None


def test_missing_pack_is_named(tmp_path):
    with pytest.raises(ServerFailed, match="nothing-here does not exist"):
        ComfyServer(tmp_path / "base", include_pack=False, packs=[tmp_path / "nothing-here"]).start()


def test_pack_is_copied_where_links_fail(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    (tmp_path / "pack" / ".git").mkdir(parents=True)
    (tmp_path / "pack" / "__init__.py").write_text("")

    link_or_copy(tmp_path / "pack", tmp_path / "copy")

    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["__init__.py"]


# Fetching ComfyUI


def test_unknown_comfyui_version(monkeypatch):
    monkeypatch.setenv("COMFYUI_VERSION", "0.1.2")
    with pytest.raises(comfyui.FetchError, match=r"'0\.1\.2' is not known: expected one of 0\.30\.0"):
        ComfyServer(include_pack=False)


def test_fetched_source_is_the_default_version(monkeypatch):
    monkeypatch.delenv("COMFYUI_VERSION", raising=False)
    source = comfyui.fetch()
    assert source == paths.CACHE / "comfyui" / comfyui.DEFAULT_VERSION
    assert (source / "main.py").is_file()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x/vendor/ComfyUI/../../escaped.py", tarfile.REGTYPE),
        ("x/vendor/ComfyUI/link.py", tarfile.SYMTYPE),
        ("x/vendor/ComfyUI/link.py", tarfile.LNKTYPE),
    ],
)
def test_unpacking_refuses_what_could_leave_the_folder(tmp_path, name, kind):
    archive = tmp_path / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member, io.BytesIO())

    with pytest.raises(comfyui.FetchError, match=f"refused to unpack '{name}'"):
        comfyui.unpack(archive, tmp_path / "target")

    assert not list(tmp_path.rglob("escaped.py"))


# The set-up


def test_comfyui_requirements_leave_out_what_is_installed_or_unused():
    names = {setup.requirement_name(line) for line in setup.comfyui_requirements()}

    assert {"aiohttp", "transformers", "comfyui-frontend-package", "torchsde"} <= names
    assert not names & setup.NOT_FROM_COMFYUI


@pytest.mark.slow
def test_interrupted_setup_goes_on(monkeypatch, tmp_path, capfd):
    venv, requirements = tmp_path / "venv", tmp_path / "requirements.txt"
    monkeypatch.setattr(setup, "VENV", venv)
    monkeypatch.setattr(setup, "VENV_PYTHON", venv / paths.VENV_PYTHON.relative_to(paths.VENV))
    monkeypatch.setattr(setup, "PACK_REQUIREMENTS", [requirements])
    (venv / "bin").mkdir(parents=True)  # a creation that was interrupted
    setup.create_venv()
    capfd.readouterr()
    setup.create_venv()
    assert "already there" in capfd.readouterr().out

    # A failed installation is tried again, a finished one is not, and a changed list is installed anew.
    requirements.write_text(f"{tmp_path / 'no-such-package'}\n")
    for _ in range(2):
        with pytest.raises(setup.SetupError, match="pip install"):
            setup.install_pack_requirements()
    requirements.write_text("pip\n")
    capfd.readouterr()
    for expected in ("Requirement already satisfied: pip", "already installed"):
        setup.install_pack_requirements()
        assert expected in capfd.readouterr().out
    requirements.write_text("pip>=1\n")
    setup.install_pack_requirements()
    assert "Requirement already satisfied: pip>=1" in capfd.readouterr().out


@pytest.mark.slow
def test_setup_reports_an_unknown_version_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "harness.setup", "--for", "demo"],
        cwd=paths.REPO,
        env={**os.environ, "COMFYUI_VERSION": "9.9.9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ComfyUI version '9.9.9' is not known")
